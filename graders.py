"""Graders: is this answer the truth? One file, for evaluation and for rewards."""

import atexit
import importlib.util
import logging
import multiprocessing
import re
import threading
from fractions import Fraction
from typing import Callable

BOX = "\\boxed{"

LONGEST = 1000  # characters of an answer that are looked at


def boxed(text: str) -> str | None:
    """The content of the one balanced \\boxed{...} in `text`, or None when there is none, two, or an unbalanced one. One pass.

    >>> boxed("so \\\\boxed{\\\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    if text.count(BOX) != 1:
        return None
    start = text.index(BOX) + len(BOX)
    depth, escaped = 1, False
    for i, c in enumerate(text[start : start + LONGEST], start):
        if not escaped:  # \{ and \} are printed braces
            depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[start:i].strip() or None
        escaped = c == "\\" and not escaped
    return None


def split_think(text: str) -> tuple[str | None, str]:
    """(chain, answer): the chain of one leading <think>...</think>, None when the text is not of that form."""
    if (
        text.count("<think>") == 1
        and text.count("</think>") == 1
        and text.lstrip().startswith("<think>")
    ):
        chain, _, answer = text.lstrip()[len("<think>") :].partition("</think>")
        return chain, answer
    return None, text


def plain(text: str) -> str:
    """Without what only dresses an answer: dollar signs, \\text{...}, spacing commands, \\left and \\right, outer space, a
    final stop, case."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text.strip().strip("$"))
    text = (
        re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;!]|\^\{?\\circ\}?", "", text)
        .replace("\\%", "%")
        .replace("\\$", "")
    )
    return " ".join(text.rstrip(". ").lower().split())


def number(text: str) -> Fraction | None:
    """An exact number: 3, -2.5, 1/4, \\frac{1}{4}, 1,000, 40% (as 40). None for anything else, and for absurd lengths."""
    text = plain(text).removesuffix("%")
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    if re.fullmatch(
        r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text, re.ASCII
    ):  # 1,000 is a number, 1,2 is a list
        text = text.replace(",", "")
    if len(text) > 40 or not re.fullmatch(
        r"[+-]?(\d+(\.\d*)?|\.\d+|\d+/0*[1-9]\d*)", text, re.ASCII
    ):
        return None
    return Fraction(text)


def numbers_equal(answer: str, truth: str) -> float:
    """Equal as exact numbers: 0.5 is 1/2, 0.333 is not 1/3."""
    a, b = number(answer), number(truth)
    return float(a is not None and a == b)


def text_equal(answer: str, truth: str) -> float:
    return float(plain(answer) == plain(truth) != "")


def same_answer(answer: str | None, truth: str | None) -> bool:
    """Equal as numbers if both are, else as plain text. None equals nothing."""
    if not answer or not truth:
        return False
    a, b = number(answer), number(truth)
    return a == b if a is not None and b is not None else bool(text_equal(answer, truth))


def lists_equal(answer: str, truth: str) -> float:
    """The same things in any order, each as often: "red, blue" is "blue, red", not "red, blue, red"."""
    a, b = (
        [w.strip() for w in t.strip("[](){} ").split(",")] for t in (plain(answer), plain(truth))
    )
    left = list(b)
    for one in a:
        found = next((i for i, other in enumerate(left) if same_answer(one, other)), None)
        if found is None:
            return 0.0
        del left[found]
    return float(not left)


def box_iou(a: str, b: str) -> float:
    """Overlap of two boxes written as four numbers (0 to 1000); 0 when either is not one."""
    corners = []
    for box in (a, b):
        found = re.findall(r"\d{1,4}", box[:80], re.ASCII)
        if len(found) != 4:
            return 0.0
        x0, y0, x1, y1 = map(int, found)
        if x1 <= x0 or y1 <= y0:
            return 0.0
        corners.append((x0, y0, x1, y1))
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = corners
    inter = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    return inter / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter)


def anls(answer: str, truth: str) -> float:
    """Normalised Levenshtein similarity, zero below one half: the score of reading tasks (ST-VQA, arXiv 1905.13648)."""
    a, b = plain(answer)[:200], plain(truth)[:200]
    if not a or not b:
        return 0.0
    row = list(range(len(b) + 1))
    for i, c in enumerate(a, 1):
        above, row = row, [i]
        for j, d in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (c != d)))
    similarity = 1 - row[-1] / max(len(a), len(b))
    return similarity if similarity >= 0.5 else 0.0


def expressions_equal(answer: str, truth: str, seconds: float = 5.0) -> float:
    """Equal as expressions: math-verify decides if it is installed, else exact arithmetic, else the text without spaces.

    A leading `x =` is dropped; any other sign of a second guess (=, $, or) makes the answer wrong before it is parsed:
    math-verify takes `4=3` for 3.
    """
    said, gold = (
        re.sub(r"^[a-zA-Z]\s*=", "", t.strip().strip("$")).strip() for t in (answer, truth)
    )
    if (
        max(len(said), len(gold)) > 300
        or not plain(said)
        or not plain(gold)
        or re.search(r"[=$]|\bor\b", said)
    ):
        return 0.0
    if same_answer(said, gold):
        return 1.0
    if importlib.util.find_spec("math_verify"):
        return float(JUDGE.ask(said, gold, seconds))
    a, b = (arithmetic(plain(t)) for t in (said, gold))
    return float(
        a == b
        if a is not None and b is not None
        else plain(said).replace(" ", "") == plain(gold).replace(" ", "")
    )


GRADERS: dict[str, Callable[[str, str], float]] = {
    "auto": lambda a, b: float(same_answer(a, b)),
    "number": numbers_equal,
    "symbolic": expressions_equal,
    "text": text_equal,
    "list": lists_equal,
    "box": lambda a, b: float(box_iou(a, b) >= 0.5),
    "anls": anls,
}


def arithmetic(text: str) -> Fraction | None:
    """Exact value of an expression of numbers, + - * / ^, brackets, \\frac, \\cdot and \\times; None for anything else.

    A parser of its own, by recursive descent: the text comes from a model and is never handed to `eval`. Whatever would take
    long (a tower of powers, deep brackets) is refused before it is computed.
    """
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = (
        text.replace("\\cdot", "*")
        .replace("\\times", "*")
        .replace("\\div", "/")
        .replace("{", "(")
        .replace("}", ")")
    )
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\S", text, re.ASCII)
    if len(tokens) > 100 or text.count("(") > 20:
        return None
    at = 0

    def take(*wanted: str) -> str | None:
        nonlocal at
        if at < len(tokens) and tokens[at] in wanted:
            at += 1
            return tokens[at - 1]

    def small(value: Fraction) -> Fraction:
        if value.numerator.bit_length() + value.denominator.bit_length() > 4096:
            raise ArithmeticError("too large")
        return value

    def total() -> Fraction:
        value = product()
        while sign := take("+", "-"):
            other = product()
            value = small(value + other if sign == "+" else value - other)
        return value

    def product() -> Fraction:
        value = power()
        while sign := take("*", "/"):
            other = power()
            value = small(value * other if sign == "*" else value / other)
        return value

    def power() -> Fraction:
        nonlocal at
        if sign := take("+", "-"):
            return -power() if sign == "-" else power()
        if take("("):
            value = total()
            if not take(")"):
                raise ArithmeticError("unbalanced")
        else:
            value, at = Fraction(tokens[at]), at + 1
        if take("^"):
            exponent = power()
            size = value.numerator.bit_length() + value.denominator.bit_length()
            if exponent.denominator != 1 or abs(exponent) * size > 4096:
                raise ArithmeticError("not a small whole power")
            value **= int(exponent)
        return value

    try:
        value = total()
    except (
        ArithmeticError,
        ValueError,
        IndexError,
    ):  # division by zero, a stray sign, an early end
        return None
    return value if at == len(tokens) else None


class Judge:
    """math-verify in a process of its own, which is ended when an answer takes too long.

    Its own time limit is a signal, which works in the main thread only; a thread cannot be stopped from outside; a process
    can. One at a time, so any thread may ask.
    """

    def __init__(self):
        self.lock, self.process, self.pipe = threading.Lock(), None, None

    def ask(self, answer: str, truth: str, seconds: float) -> bool:
        with self.lock:
            if self.process is None or not self.process.is_alive():
                context = multiprocessing.get_context("spawn")
                self.pipe, other = context.Pipe()
                self.process = context.Process(target=verify, args=(other,), daemon=True)
                self.process.start()
                self.pipe.recv()  # imported and ready: from here the clock runs
            self.pipe.send((answer, truth))
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            self.stop()
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def verify(pipe) -> None:
    """The judge's process: (answer, truth) in, verdict out. LaTeX only: the other extraction of math-verify goes through
    sympy's parse_expr, which evaluates its text as Python."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify import verify as equal

    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that its own time limits are off: ours is on
    read = lambda latex: parse(
        f"${latex}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None
    )
    pipe.send("ready")
    while True:
        answer, truth = pipe.recv()
        gold, said = read(truth), read(answer)
        pipe.send(bool(gold and said and equal(gold, said, timeout_seconds=None)))


JUDGE = Judge()

atexit.register(JUDGE.stop)


def phrase_f1(text: str, truth: str) -> float:
    """F1 between the comma-separated phrases of two texts, order ignored."""
    a, b = ([p.strip() for p in t.split(",") if p.strip()] for t in (text, truth))
    hits = sum(min(a.count(p), b.count(p)) for p in set(a))
    return 2 * hits / (len(a) + len(b)) if a and b else 0.0
