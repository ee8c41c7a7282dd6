r"""Graders: is this answer the truth? One file, for evaluation and for rewards.

What it teaches: a grader that is too strict teaches a model that a right answer is wrong, and one
that is too lax will be found out by a policy. Between the two lies reading: `(B)`, `B.` and `b` are
one letter, `1{,}000`, `１０００` and `10^3` one number, `3 or 4` is two guesses and equals neither.
So every grader first reads what was written, into a letter, an exact number, a box, a set; compares
exactly; and equals nothing to a missing answer. What a model wrote is never evaluated as code.

    completion -- boxed, final_answer --> what was said --+
                                                          +-- grade(said, truth, grader) --> 0 .. 1
    sample.facts -- answer, one or several accepted ------+
                 -- grader_of(facts) ---------------------+

    key        for                        score      source of the definition
    auto       short answers              0, 1       ours: a letter, else a number, else the text
    text       short answers              0, 1       ours: the text, without what only dresses it
    exact      short answers              0, 1       exact match of SQuAD, arXiv 1606.05250
    number     numbers                    0, 1       ours: equal as exact fractions
    symbolic   mathematics                0, 1       ours: structure here, terms by math-verify
    list       lists in any order         0, 1       ours
    mcq        multiple choice            0, 1       rules after VLMEvalKit's, arXiv 2407.11691
    yesno      yes or no                  0, 1       POPE, arXiv 2305.10355 (see `yes_or_no`)
    vqa        several annotators         0 .. 1     VQA accuracy, arXiv 1505.00468
    anls       reading                    0, .5 .. 1 ST-VQA, arXiv 1905.13648
    relaxed    charts, within 5 %         0, 1       ChartQA, arXiv 2203.10244, section 5.1
    box        grounding, IoU >= .5       0, 1       RefCOCO's Acc@0.5; coordinates as the truth's
    iou        grounding                  0 .. 1     the overlap itself
    phrases    captions in phrases        0 .. 1     ours: F1 over the phrases between commas
    details    captions in sentences      0 .. 1     in the style of CAPTURE, arXiv 2405.19092

To add one: a function (said, truth) -> float and a line in GRADERS. Several accepted truths give the
best score of any; only "vqa" counts how many annotators agree.
"""

import functools
import importlib.util
import re
from collections import Counter
from fractions import Fraction
from typing import Callable

import numpy as np

from infra.judge import JUDGE

BOX = "\\boxed{"

# Limits in characters. A whole answer: more is none, and would only cost time.
LONGEST_ANSWER = 20_000
# What is looked at of a box, \boxed{} or of coordinates.
LONGEST_BOX = 1000
# A number, and an expression.
LONGEST_NUMBER = 40
LONGEST_EXPRESSION = 300
# A text that is compared letter by letter.
LONGEST_READING = 4000


# ------------------------------------------------------------------------------ what a text says


def boxed(text: str) -> str | None:
    """The content of the one balanced \\boxed{...}; None when there is none, two, or half of one.

    >>> boxed("so \\\\boxed{\\\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    if text.count(BOX) != 1:
        return None

    # from the opening brace to the one that closes it
    start = text.index(BOX) + len(BOX)
    depth = 1
    escaped = False
    for i, c in enumerate(text[start : start + LONGEST_BOX], start):
        # \{ and \} are printed braces
        if not escaped:
            depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[start:i].strip() or None
        escaped = c == "\\" and not escaped
    return None


def split_think(text: str) -> tuple[str | None, str]:
    """(chain, answer): the chain of one leading <think>...</think>, None for any other form.

    The answer is what is said outside of thinking: after <think> all is thought until </think>, to
    the end where it never comes; before a </think> that nothing opened all was thought, too (some
    prompts open the chain themselves).
    """
    # the form that the format reward asks for
    stripped = text.lstrip()
    well_formed = (
        text.count("<think>") == 1
        and text.count("</think>") == 1
        and stripped.startswith("<think>")
    )
    if well_formed:
        chain, _, answer = stripped[len("<think>") :].partition("</think>")
        return chain, answer

    # any other one: collect what lies outside
    thinking = False
    said = ""
    for piece in re.split("(</?think>)", text):
        if piece == "<think>":
            thinking = True
        elif piece == "</think>":
            said = said if thinking else ""
            thinking = False
        elif not thinking:
            said += piece
    return None, said


def final_answer(text: str) -> str:
    """What a completion answers: said after thinking, inside the box if there is exactly one."""
    answer = split_think(text)[1]
    return boxed(answer) or answer.strip()


# Full-width ASCII, as Chinese keyboards type it, and other signs that have a plain twin.
NARROW = {0xFF01 + i: 0x21 + i for i in range(94)} | {
    # the spaces of Chinese, of French and of typesetting
    0x3000: " ",
    0x00A0: " ",
    0x202F: " ",
    0x2009: " ",
    # minus, and dashes that stand for it
    0x2212: "-",
    0xFE63: "-",
    0x2013: "-",
    # quotes and the Chinese full stop
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x3002: ".",
    # signs of arithmetic
    0x00D7: "\\times ",
    0x00B7: "\\cdot ",
    0x00F7: "/",
}
FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
# Commands that only choose a font.
FONTS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"


# Beside these a space says nothing; between words and numbers it does.
PARTING = r"-+*/^=<>,;:()\[\]{}"


# The same few truths are read again and again.
@functools.lru_cache(2048)
def plain(text: str) -> str:
    """Without what only dresses an answer: math signs, fonts, spacing, a final stop, case."""
    return re.sub(rf"(?<=[{PARTING}]) | (?=[{PARTING}\\])", "", _spaced(text))


def _spaced(text: str) -> str:
    """`plain` with its spaces: 1, 000 is not 1,000."""
    text = without_fonts(undressed(text))
    text = re.sub(r"\^\{?\\circ\}?|°", "", text)
    text = text.replace("\\$", "").rstrip(". ")

    # case says nothing in words, but \Delta is not \delta
    text = re.sub(r"(\\[a-zA-Z]+)|([^\\]+)", lambda m: m[1] or m[2].lower(), text)
    return " ".join(text.split())


def without_fonts(text: str) -> str:
    r"""`\text{red}` is red."""
    return re.sub(FONTS + r"\{([^{}]*)\}", r"\1", text)


def undressed(text: str) -> str:
    """Without math delimiters, quotes, emphasis and spacing commands; case and words stay."""
    # signs that keyboards and typesetters use for plain ones; 1½ is 1 1/2
    text = text.translate(NARROW).strip()
    for mark in FRACTIONS.keys() & set(text):
        text = re.sub(rf"(?<=\d){mark}", f" {FRACTIONS[mark]}", text)
        text = text.replace(mark, FRACTIONS[mark])

    # commands that only move or size what they stand beside
    text = re.sub(r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])", "", text)
    text = re.sub(r"\{\\,\}|(?<!\\)\\[,;!:]", "", text)
    text = re.sub(r"\\(?:quad|qquad)(?![a-zA-Z])|(?<!\\)\\ |~", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = text.replace("{,}", ",").replace("\\%", "%")

    # from the outside in: $5$, \(5\), **5**, "5", \boxed{5}, and a full stop between two of them
    for _ in range(4):
        before = text
        text = text.strip().strip("$").removesuffix("\\")
        text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text, flags=re.DOTALL)
        text = re.sub(r"^(\*{1,3}|_{1,3}|`|\"|')(.*)\1$", r"\2", text, flags=re.DOTALL)
        if text.startswith(BOX) and text.endswith("}"):
            text = boxed(text) or text
        if text == before:
            break
        text = text.rstrip(".")
    return text


# --------------------------------------------------------------------------------------- numbers

DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
SIGN = r"[+-]? ?"
# Of a fraction: in braces, or one digit.
HALF = r"(?:\{([^{}]*)\}|(\d))"
POWER_OF_TEN = r"(?:\\times|\\cdot|\*) ?10\^(?:\{([+-]?\d{1,3})\}|([+-]?\d{1,3}))"


def number(text: str) -> Fraction | None:
    r"""An exact number; None for anything else, and for absurd lengths. A percentage counts whole.

    Read are 3, -2.5, 1/4, \frac{1}{4}, \frac14, 1\frac{1}{4}, 1,000, 1{,}000, 2 \times 10^3, 40% (as
    40), $5, (5), in ASCII or full-width.
    """
    value = _written_number(text)
    return None if value is None else value[0]


@functools.lru_cache(2048)
def _written_number(text: str) -> tuple[Fraction, bool] | None:
    """(value, whether it was written as a percentage)."""
    text = _spaced(text)
    if len(text) > 4 * LONGEST_NUMBER:
        return None

    # what may stand around a number, or around its parts
    percent = bool(re.search(r"(?:%| per ?cent)$", text))
    text = re.sub(r"(?:%| per ?cent)$", "", text).rstrip()
    text = re.sub(r"^[$€£¥] ?(?=[\d.])", "", text)
    text = re.sub(r"^([+-]?)(?:\((.*)\)|\{(.*)\})$", r"\1\2\3", text)
    text = re.sub(rf"(?<![\d.)}}])\(({SIGN}{DECIMAL})\)(?!\d)", r"\1", text)

    # 1,000 is a number, 1,2 a list
    thousands = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])"
    text = re.sub(thousands, lambda match: match[0].replace(",", ""), text)

    # \frac{1}{2} is 1/2, and behind a digit part of a mixed number
    text = re.sub(rf"(?<=\d)\\frac ?{HALF} ?{HALF}", r" \1\2/\3\4", text)
    text = re.sub(rf"\\frac ?{HALF} ?{HALF}", r"\1\2/\3\4", text)
    if len(text) > LONGEST_NUMBER:
        return None

    # the first reading that fits
    for read in (_decimal, _ratio, _scientific):
        value = read(text)
        if value is not None:
            return value, percent
    return None


def _decimal(text: str) -> Fraction | None:
    if not re.fullmatch(rf"{SIGN}{DECIMAL}", text, re.ASCII):
        return None
    return Fraction(text.replace(" ", "").rstrip("."))


def _ratio(text: str) -> Fraction | None:
    """1/2, -1/2, 1.5/2, and mixed: 1 1/2."""
    pattern = rf"({SIGN})(?:(\d+) )?({SIGN}{DECIMAL})/({SIGN}{DECIMAL})"
    match = re.fullmatch(pattern, text, re.ASCII)
    if not match:
        return None
    sign, whole, upper, lower = match.groups()
    above = Fraction(upper.replace(" ", ""))
    below = Fraction(lower.replace(" ", ""))
    if below == 0:
        return None
    value = Fraction(whole or 0) + above / below
    return -value if "-" in sign else value


def _scientific(text: str) -> Fraction | None:
    r"""2.5 \times 10^{-3}, and 10^3 alone."""
    if re.fullmatch(r"10\^(?:\{[+-]?\d{1,3}\}|[+-]?\d{1,3})", text, re.ASCII):
        text = f"1*{text}"
    match = re.fullmatch(rf"({SIGN}{DECIMAL}) ?{POWER_OF_TEN}", text, re.ASCII)
    if not match:
        return None
    mantissa, braced, bare = match.groups()
    return Fraction(mantissa.replace(" ", "")) * Fraction(10) ** int(braced or bare)


def numbers_equal(said: str, truth: str) -> float:
    """Equal as exact numbers: 0.5 is 1/2, 0.333 is not 1/3.

    Where only one of them is a percentage it may be meant either way: 50% is 50 and 0.5.
    """
    a = _written_number(said)
    b = _written_number(truth)
    if a is None or b is None:
        return 0.0
    (value, percent), (true_value, true_percent) = a, b
    if percent == true_percent:
        return float(value == true_value)
    if percent:
        return float(true_value in (value, value / 100))
    return float(value in (true_value, true_value / 100))


# --------------------------------------------------------------------------------------- letters

# An option's letter in its usual dress: (b), b), b., b:
DRESSED = r"\(([a-z])\)|([a-z])[).:]"
# Named by a sentence: "the answer is B", "Option (b)".
ANNOUNCED = re.compile(
    r"(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice|选项|答案|选)\s*"
    r"(?:is|are|would be|should be|为|是|选)?\s*:?\s*(?:(?:the )?option\s+)?[*\"'$]*"
    r"(?:\(([A-Za-z])\)|([A-Z])(?=$|[).:,;*\"'$]|\s*(?:\n|because|since|as\b|\()))",
)
# Another letter beside the first: "or C", ", C", "/C".
SECOND_GUESS = re.compile(
    r"(?:\bor\b|\band\b|[/,;&])\s*\(?[a-z](?:\)|(?=\s*$|\s*[.,;:/&?!]|\s+(?:or|and)\b))",
    re.IGNORECASE,
)
DENIAL = re.compile(r"\b(?:not|never|neither|nor|none|except|wrong|incorrect|cannot)\b|n't\b", re.I)


def choice_letter(text: str) -> str | None:
    """The one option that a text names, as a capital; None for no letter, and for two.

    Read are B, b, (B), B), B., "B. 12", "(B) 12", \\text{(B)}, "the answer is B", "Option B".
    """
    text = without_fonts(undressed(text))
    bare = " ".join(text.lower().split())

    # the letter alone
    alone = re.fullmatch(r"\(?\[?\{?([a-z])\}?\]?[).:,;、]?", bare)
    if alone:
        return alone[1].upper()

    # the letter first, then the option's own words
    first = re.match(rf"(?:{DRESSED})(?![a-z])\s*(.+)", bare, re.DOTALL)
    chinese = re.match(r"([a-z])[、,](.+)", bare) if "、" in text else None
    if first or chinese:
        *letters, rest = (first or chinese).groups()
        another = re.search(rf"(?<![a-z])(?:{DRESSED})(?![a-z])", rest)
        if another or SECOND_GUESS.search(rest):
            return None
        return next(letter for letter in letters if letter).upper()

    # announced: "the answer is B"
    announced = list(ANNOUNCED.finditer(text))
    named = {(match[1] or match[2]).upper() for match in announced}
    if len(named) != 1 or SECOND_GUESS.search(text[announced[0].end() :]):
        return None
    return named.pop()


def choice_in_sentence(text: str) -> str | None:
    """`choice_letter`, or else the only capital A to J that stands alone in a sentence.

    "A" and "I" before a word are an article and a person. A sentence that denies names nothing.
    """
    letter = choice_letter(text)
    if letter:
        return letter

    # not where another letter, or a denial, makes its meaning doubtful
    text = without_fonts(undressed(text))
    if DENIAL.search(text) or SECOND_GUESS.search(text):
        return None
    article = r"\s+(?!or\b|and\b)[a-z]"
    alone = re.findall(rf"(?<![A-Za-z0-9'])(?:[B-HJ]|[AI](?!{article}))(?![A-Za-z0-9'])", text)
    return alone[0] if len(set(alone)) == 1 else None


def options_of(question: str) -> dict[str, str]:
    """The options that stand on lines of their own in a question: letter -> text."""
    lines = re.findall(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t]*$", question, re.MULTILINE)
    return dict(lines) if len(lines) > 1 else {}


def choices_equal(said: str, truth: str) -> float:
    """Multiple choice: the same option named, wherever a letter can sensibly stand.

    After VLMEvalKit's rules (arXiv 2407.11691, `can_infer_option`): one option's letter and no other
    one. Ours are stricter where a policy would profit: what denies, or names two, is wrong.
    """
    letter = choice_letter(truth)
    if letter is None:
        return text_equal(said, truth)
    return float(choice_in_sentence(said) == letter)


def yes_or_no(text: str) -> str | None:
    """A yes or a no, by POPE's reading of the first sentence; None for neither (POPE: a yes).

    Its script (arXiv 2305.10355) takes everything that holds no "No", "not" or "no" for a yes. That
    is kept in `evaluate.yes_no_scores`; a grader that pays for any words at all would be found out.
    """
    sentence = undressed(text).split(".")[0].replace(",", " ")
    words = sentence.split()
    if {"No", "not", "no", "NO"} & set(words):
        return "no"
    return "yes" if "yes" in sentence.lower().split() else None


def yes_no_equal(said: str, truth: str) -> float:
    """The same of yes and no."""
    answer = yes_or_no(said)
    return float(answer is not None and answer == yes_or_no(truth))


# ----------------------------------------------------------------------------------- short answers


def text_equal(said: str, truth: str) -> float:
    return float(plain(said) == plain(truth) != "")


def exact_match(said: str, truth: str) -> float:
    """Equal without case, punctuation, articles and spacing (SQuAD, arXiv 1606.05250, section 6.1)."""

    def normal(text: str) -> list[str]:
        text = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
        return re.sub(r"\b(?:a|an|the)\b", " ", text).split()

    return float(normal(said) == normal(truth) != [])


def same_answer(said: str | None, truth: str | None) -> bool:
    """Equal as an option's letter if the truth is one, as numbers if both are, else as plain text.

    A number may be assigned to a letter (`x = 3`). None equals nothing.
    """
    if not said or not truth:
        return False
    if re.fullmatch(r"\(?\[?[a-z]\]?[).:]?", plain(truth)):
        return choice_letter(said) == choice_letter(truth)
    if number(truth) is not None:
        value = re.sub(r"^[a-z] ?= ?", "", _spaced(said))
        return bool(numbers_equal(value, truth) or text_equal(said, truth))
    return bool(text_equal(said, truth))


def lists_equal(said: str, truth: str) -> float:
    """The same things in any order, each as often: "red, blue" is "blue, red", not "red, red"."""

    def items(text: str) -> Counter:
        pieces = plain(text).replace("\\{", "").replace("\\}", "").strip("[](){} ").split(",")
        numbers = [number(piece) for piece in pieces]
        return Counter(plain(p) if n is None else n for p, n in zip(pieces, numbers))

    if not plain(said) or not plain(truth):
        return 0.0
    return float(items(said) == items(truth))


# What the VQA evaluation script puts an apostrophe into.
CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
        "how'd how'll how's I'd've I'm I've isn't it'd it'll let's ma'am mightn't might've mustn't "
        "must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't somebody'd "
        "someone'd someone's that'd that'll that's there'd there're there's they'd they'll they're "
        "they've wasn't we've weren't what'll what're what's what've when's where'd where's where've "
        "who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll "
        "you're you've"
    ).split()
}
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(i) for i, word in enumerate(NUMBER_WORDS)} | {"none": "0"}


def vqa_accuracy(said: str, annotators: list[str]) -> float:
    """min(1, matches / 3), averaged over the sets that leave one annotator out.

    VQA accuracy, arXiv 1505.00468, section 4, and the script at visualqa.org/evaluation: texts are
    normalised unless all annotators said the same. The script takes ten annotators; with fewer
    than four all who are left must agree, a lone one exactly (our choice).
    """
    # one spelling for all, where the annotators differ
    answer = " ".join(said.split())
    truths = list(annotators)
    if len(set(truths)) > 1:
        truths = [_vqa_punctuation(truth) for truth in truths]
        answer = _vqa_words(_vqa_punctuation(answer))
    if len(truths) < 2:
        return float(bool(truths) and _vqa_words(answer) == _vqa_words(truths[0]) != "")

    # against each annotator's colleagues
    needed = min(3, len(truths) - 1)
    scores = []
    for i in range(len(truths)):
        others = truths[:i] + truths[i + 1 :]
        scores.append(min(1.0, others.count(answer) / needed))
    return sum(scores) / len(scores)


def _vqa_punctuation(text: str) -> str:
    """Signs go, or become a space between two letters; a stop stays inside a number."""
    thousands = re.search(r"\d,\d", text)
    cleaned = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        at_an_edge = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if at_an_edge or thousands else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)


def _vqa_words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes where they belong."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def anls(said: str, truth: str) -> float:
    """1 - edits / length of the longer, zero below one half; without case and extra spaces.

    Normalised Levenshtein similarity of ST-VQA (arXiv 1905.13648, Eq. 1). At exactly one half the
    paper gives 0 and the challenge's script (rrc.cvc.uab.es) keeps it: as the script.
    """
    a = " ".join(said.lower().split())[:LONGEST_READING]
    b = " ".join(truth.lower().split())[:LONGEST_READING]
    if not a or not b:
        return 0.0
    similarity = 1 - edit_distance(a, b) / max(len(a), len(b))
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements between two texts."""
    letters = np.array([ord(c) for c in b])
    places = np.arange(len(b) + 1)
    row = places  # distances between nothing of `a` and each beginning of `b`
    for i, c in enumerate(a, 1):
        below = np.empty_like(row)
        below[0] = i
        below[1:] = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(c)))
        # an insertion comes from the left neighbour: a running minimum that grows by one a step
        row = np.minimum.accumulate(below - places) + places
    return int(row[-1])


def relaxed_equal(said: str, truth: str) -> float:
    """A number within 5 % of the truth; any other text the same without case.

    Relaxed accuracy of ChartQA (arXiv 2203.10244, section 5.1): |said - truth| / |truth| <= .05; a
    truth of zero, which has no 5 %, is compared as text. 5% is .05, as its scripts have it.
    """
    value = _as_float(said)
    target = _as_float(truth)
    if value is not None and target:
        return float(abs(value - target) / abs(target) <= 0.05)
    return float(said.strip().lower() == truth.strip().lower() != "")


def _as_float(text: str) -> float | None:
    text = text.strip()
    try:
        value = float(text.rstrip("%")) if text.isascii() else float("nan")
    except ValueError:
        return None
    if not np.isfinite(value):
        return None
    return value / 100 if text.endswith("%") else value


# ----------------------------------------------------------------------------------------- boxes

# A number of a box, four of them, and two corners in brackets.
COORDINATE = r"[+-]?(?:\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})"
BETWEEN = r"(?:\s*[,;]\s*|\s+)"
FOUR = BETWEEN.join([f"({COORDINATE})"] * 4)
CORNERS = rf"\(\s*({COORDINATE}){BETWEEN}({COORDINATE})\s*\)"


def box_of(text: str) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) of the one box that a text holds, in its own scale; None for none and for two.

    Read are four numbers, [x0, y0, x1, y1], (x0,y0),(x1,y1) and {"bbox_2d": [...]}, with signs and
    decimals, and words beside them.
    """
    text = text[:LONGEST_BOX].translate(NARROW)

    # four numbers in one pair of brackets, or two corners in a pair each; two boxes are two guesses
    for pattern in (rf"[\[(]\s*{FOUR}\s*[\])]", rf"{CORNERS}\s*,?\s*{CORNERS}"):
        written = re.findall(pattern, text, re.ASCII)
        if len(written) > 1:
            return None
        if written:
            return _corners(written[0])

    # else the only four numbers of the text; the 2 of bbox_2d is none
    numbers = re.findall(rf"(?<![\w.]){COORDINATE}(?![\w.]*\w)", text, re.ASCII)
    return _corners(numbers) if len(numbers) == 4 else None


def _corners(numbers) -> tuple[float, float, float, float] | None:
    x0, y0, x1, y1 = (float(n) for n in numbers)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def box_iou(said: str, truth: str) -> float:
    """Intersection over union of two boxes, 0 when either is none. The scale is the truth's.

    Nothing is rescaled: a box in pixels does not answer one in thousandths.
    """
    a = box_of(said)
    b = box_of(truth)
    if a is None or b is None:
        return 0.0

    # what lies in both, and in either
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    both = _area(a) + _area(b)
    return shared / (both - shared)


def _area(box: tuple[float, float, float, float]) -> float:
    x0, y0, x1, y1 = box
    return (x1 - x0) * (y1 - y0)


def boxes_overlap(said: str, truth: str) -> float:
    """IoU of at least one half: Acc@0.5 of the RefCOCO family."""
    return float(box_iou(said, truth) >= 0.5)


# ------------------------------------------------------------------------------------------ captions


def phrase_f1(said: str, truth: str) -> float:
    """F1 between the comma-separated phrases of two texts, each as often as it is said, any order."""
    a = Counter(_phrases(said))
    b = Counter(_phrases(truth))
    if not a or not b:
        return 0.0
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total())


def _phrases(text: str) -> list[str]:
    return [plain(phrase) for phrase in text.split(",") if plain(phrase)]


# Words by what they name. What is in none of the three lists names an object.
RELATIONS = frozenset(
    "above across against along among around at atop before behind below beneath beside between by "
    "east front held holding in inside into left near next north northeast northwest of off on onto "
    "opposite out outside over past right riding south southeast southwest through toward towards "
    "under underneath up wearing west with within".split()
)
ATTRIBUTES = frozenset(
    "beige big black blue bright broken brown calm clean clear closed cloudy colorful dark deep dry "
    "empty few flat fluffy full glass gold golden gray green grey happy heavy high huge large "
    "leather light little long low many metal metallic modern narrow old open orange pale pink "
    "plastic purple red rough round rustic sad sandy sharp shiny short silver small smooth soft "
    "square steep stone striped sunny tall thick thin tiny triangular vibrant vintage warm wet white "
    "wide wooden yellow young one two three four five six seven eight nine ten several".split()
)
UNSAID = frozenset(
    "a an and are as be been being but can could describe described depict depicted depicts does each "
    "feature featured features for from has have here image is it its itself like may might no not "
    "photo photograph picture scene seen shot show showing shown shows some that the their them "
    "there these they this those to view was were where which while who".split()
)
# Of objects, attributes and relations, as CAPTURE weighs them (arXiv 2405.19092, section 4.2).
DETAIL_WEIGHTS = {"objects": 5, "attributes": 5, "relations": 2}


def details_score(said: str, truth: str) -> float:
    """Weighted F1 over the objects, attributes and relations of two captions, in CAPTURE's style.

    CAPTURE extracts the three with a scene-graph parser and matches them in three stages (as they
    are, as synonyms, by embedding). Here words are sorted by lists, and there is one stage, after
    plurals are cut: no model, no download, the same verdict everywhere. A kind that neither caption
    has does not count. So it ranks captions alike, but its values are not those of the benchmark.
    """
    a = caption_elements(said)
    b = caption_elements(truth)
    total = 0.0
    weights = 0
    for kind, weight in DETAIL_WEIGHTS.items():
        if not a[kind] and not b[kind]:
            continue
        shared = len(a[kind] & b[kind])
        total += weight * 2 * shared / (len(a[kind]) + len(b[kind]))
        weights += weight
    return total / weights if weights else 0.0


def caption_elements(caption: str) -> dict[str, set[str]]:
    """The words of a caption that name something, by kind."""
    elements: dict[str, set[str]] = {kind: set() for kind in DETAIL_WEIGHTS}
    for word in re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", caption.lower()):
        if word in UNSAID:
            continue
        if word in RELATIONS:
            elements["relations"].add(word)
        elif word in ATTRIBUTES or word.isdigit():
            elements["attributes"].add(word)
        else:
            # cups are a cup; glass and bus stay
            plural = len(word) > 3 and word[-1] == "s" and word[-2] not in "su"
            elements["objects"].add(word[:-1] if plural else word)
    return elements


# ------------------------------------------------------------------------------------- expressions

# What may stand behind a number and say only in what it counts.
UNITS = frozenset(
    "mm cm dm km m in ft yd mi mg g kg lb oz ms s sec min h hr day days l ml cl hz khz mhz n j kj w "
    "kw v a k pa kpa mol rad deg degree degrees inch inches foot feet meter meters metre metres "
    "centimeter centimeters kilometer kilometers mile miles second seconds minute minutes hour "
    "hours gram grams kilogram kilograms liter liters litre litres dollar dollars cent cents euro "
    "euros percent unit units square cubic".split()
)
# Signs of relations in one spelling, and as they read from the other end.
RELATION_SIGNS = {
    "\\leq": "<=",
    "\\le": "<=",
    "≤": "<=",
    "\\geq": ">=",
    "\\ge": ">=",
    "≥": ">=",
    "\\lt": "<",
    "\\gt": ">",
    "\\neq": "!=",
    "\\ne": "!=",
    "≠": "!=",
    "\\in": "\\in",
}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
SIGNS = r"(?<![<>!=])=(?!=)|<=|>=|!=|<|>|\\in(?![a-zA-Z])"
# What parts alternatives, members of a list or a system, and pieces of a union.
OR = r"\\text\{ ?or ?\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\lor(?![a-zA-Z])"
AND = r",|;|\\text\{ ?and ?\}|(?<![a-zA-Z\\])and(?![a-zA-Z])|\\land(?![a-zA-Z])"
UNION = r"\\cup(?![a-zA-Z])|∪"
BRACKET = r"\\?[()\[\]{}]"
# What a value may be assigned to: x, \theta, x_1, f(x).
SYMBOL = r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?(?:\(\w\))?"
# Members of a list, a set or a system; questions to math-verify about one answer.
MOST_PIECES = 12
MOST_ASKED = 16


def symbolic_grading_available() -> bool:
    """Whether math-verify decides about expressions. Without it: exact arithmetic, then the text."""
    return bool(importlib.util.find_spec("math_verify")) and not JUDGE.broken


def symbolic_note(grader_names) -> str:
    """For a run's first lines and its log: a sentence if it grades symbolically without math-verify.

    Starts the judge where one is needed, so that what keeps it from starting is known at once.
    """
    if "symbolic" not in grader_names:
        return ""
    if symbolic_grading_available() and JUDGE.ask("x", "x") is not None:
        return ""
    reason = f"cannot be started: {JUDGE.broken}" if JUDGE.broken else "is missing"
    return (
        f"math-verify {reason}; symbolic answers are graded by exact arithmetic and by their text, "
        "so equal expressions may count as wrong (pip install math-verify)"
    )


def expressions_equal(said: str, truth: str) -> float:
    """Equal as mathematics. The structure is compared here, term by term; terms by math-verify.

    Lists, sets and systems in any order, tuples and intervals in theirs; an equation equals itself,
    with its sides swapped or moved (not multiplied by a number); `x = 3` answers 3. A unit must be
    the truth's where both have one. A second guess (`3 or 4`, `3 = 3`) equals no single truth.
    """
    if not plain(said) or not plain(truth):
        return 0.0
    a = _latex(said)
    b = _latex(truth)
    if _without_spaces(a) == _without_spaces(b) or text_equal(said, truth):
        return 1.0

    # too long to compare, or two formulas in one answer
    if max(len(a), len(b)) > LONGEST_EXPRESSION or "$" in a:
        return 0.0
    return float(_Comparison().structures(a, b))


def _latex(text: str) -> str:
    """One way to write what LaTeX can write in several."""
    text = undressed(text).rstrip(". ")

    # a system is a list of equations; the rows of a matrix stay
    text = re.sub(r"\\(?:begin|end)\{(?:cases|aligned|align\*?|array)\}(?:\{[lcr|]*\})?", " ", text)
    if "\\begin" not in text:
        text = text.replace("\\\\", ",").replace("&", "").strip(" ,")

    # one name for each sign
    text = re.sub(r" ?\\mid(?![a-zA-Z]) ?", "|", text)
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    for name, sign in RELATION_SIGNS.items():
        ending = r"(?![a-zA-Z])" if name.startswith("\\") else ""
        text = re.sub(re.escape(name) + ending, f" {sign} ".replace("\\", "\\\\"), text)
    return " ".join(text.split())


def _without_spaces(text: str) -> str:
    """Spaces go where they part no two words or numbers."""
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def _split(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand outside of all brackets."""
    depth = 0
    pieces = [""]
    at = 0
    for match in re.finditer(f"({separator})|{BRACKET}", text):
        pieces[-1] += text[at : match.start()]
        at = match.end()

        # a separator outside of brackets begins a piece; all else belongs to the present one
        if match[1] and depth == 0:
            pieces.append("")
            continue
        pieces[-1] += match[0]
        if not match[1]:
            depth += 1 if match[0][-1] in "([{" else -1
    pieces[-1] += text[at:]
    return [piece.strip() for piece in pieces if piece.strip()]


def _members(text: str) -> tuple[str, list[str]] | None:
    r"""(brackets, members) of a set, a tuple or an interval; None for anything else.

    >>> _members("[0, 1)")
    ('[)', ['0', '1'])
    """
    match = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text, re.DOTALL)
    if not match:
        return None
    opened, inside, closed = match.groups()
    members = _split(inside, ",|;")

    # (a)(b) begins and ends with brackets, too; and (3) only groups
    depth = 0
    for bracket in re.findall(r"[()\[\]{}]", inside):
        depth += 1 if bracket in "([{" else -1
        if depth < 0:
            return None
    is_set = opened == "\\{"
    if is_set != (closed == "\\}") or (len(members) < 2 and not is_set):
        return None
    return opened + closed, members


def _sides(text: str) -> tuple[list[str], list[str]]:
    """The terms of a relation, and the signs between them: ["1", "x", "2"], ["<", "<"]."""
    terms = _split(text, SIGNS)
    signs = []
    depth = 0
    for mark in re.finditer(f"({SIGNS})|{BRACKET}", text):
        if mark[1]:
            if depth == 0:
                signs.append(mark[1])
        else:
            depth += 1 if mark[0][-1] in "([{" else -1
    return terms, signs


def _unit_of(text: str) -> tuple[str, str, bool]:
    """(number, its unit, whether it can be nothing but a unit); the unit is empty for no number."""
    pattern = rf"(.*?) ?(?:{FONTS}\{{([^{{}}]*)\}}|([a-zA-Z]+))(\^\{{?\d\}}?)?"
    match = re.fullmatch(pattern, text)
    if not match or number(match[1]) is None:
        return text, "", False

    # letters behind a number may be variables, words in a font may not
    count, in_font, bare, power = match.groups()
    word = (in_font or bare or "").strip()
    known = all(part.lower() in UNITS for part in re.findall("[a-zA-Z]+", word))
    if bare and not known:
        return text, "", False
    sure = known and (in_font is not None or len(word) > 1)

    # metres is metre, ^{2} is ^2
    name = word.removesuffix("s") if len(word) > 3 else word
    return count, name + re.sub("[{}]", "", power or ""), sure


class _Comparison:
    """One answer against one truth, with a limit on how often math-verify is asked."""

    def __init__(self):
        self.asks_left = MOST_ASKED

    def structures(self, a: str, b: str, depth: int = 6) -> bool:
        """Compare from the outside in: alternatives, lists, unions, brackets, relations, terms."""
        if _without_spaces(a) == _without_spaces(b):
            return True
        if depth == 0:
            return False

        # `3 or 4`, `1, 2` and `[0,1) \cup (2,3)`: as many pieces, in any order. 1,000 is no list.
        for separator in (OR, AND, UNION):
            pieces = _split(a, separator) if number(a) is None else [a]
            true_pieces = _split(b, separator) if number(b) is None else [b]
            if len(pieces) > 1 or len(true_pieces) > 1:
                return self.any_order(pieces, true_pieces, depth - 1)

        # a set has no order, a tuple and an interval have
        group = _members(a)
        true_group = _members(b)
        if group and true_group:
            return self.groups(group, true_group, depth - 1)

        # two relations, one and a value that it may assign, or none
        terms, signs = _sides(a)
        true_terms, true_signs = _sides(b)
        if signs and true_signs:
            return self.relations((terms, signs), (true_terms, true_signs))
        if signs:
            return self.assigned(terms, signs, b, depth - 1)
        if true_signs:
            return self.assigned(true_terms, true_signs, a, depth - 1)

        # a set is none of its members
        if group or true_group:
            return False
        return self.terms(a, b)

    def any_order(self, pieces: list[str], true_pieces: list[str], depth: int) -> bool:
        """As many pieces, and a partner for each."""
        if len(pieces) != len(true_pieces) or len(pieces) > MOST_PIECES:
            return False
        left = list(true_pieces)
        for piece in pieces:
            # the same text first: it costs nothing
            left.sort(key=lambda other: _without_spaces(other) != _without_spaces(piece))
            for i, other in enumerate(left):
                if self.structures(piece, other, depth):
                    del left[i]
                    break
            else:
                return False
        return True

    def groups(self, group, true_group, depth: int) -> bool:
        """Members in the same kind of brackets: of a set in any order, else each in its place."""
        brackets, members = group
        true_brackets, true_members = true_group
        if brackets != true_brackets or max(len(members), len(true_members)) > MOST_PIECES:
            return False
        if brackets == "\\{\\}":
            return self.any_order(_distinct(members), _distinct(true_members), depth)
        if len(members) != len(true_members):
            return False
        return all(self.structures(a, b, depth) for a, b in zip(members, true_members))

    def relations(self, relation, true_relation) -> bool:
        """(terms, signs) of two: the same, the same from the other end, or rearranged."""
        terms, signs = relation
        true_terms, true_signs = true_relation
        if len(terms) != len(signs) + 1 or len(true_terms) != len(true_signs) + 1:
            return False
        if len(signs) != len(true_signs):
            return False

        # as it stands, and read from the other end
        if signs == true_signs and all(map(self.terms, terms, true_terms)):
            return True
        flipped = [FLIPPED.get(sign, "") for sign in reversed(true_signs)]
        if signs == flipped and all(map(self.terms, terms, reversed(true_terms))):
            return True

        # an equation whose terms changed sides: left - right is the same, or its negative
        if signs != ["="] or true_signs != ["="]:
            return False
        difference = f"({terms[0]})-({terms[1]})"
        true_difference = f"({true_terms[0]})-({true_terms[1]})"
        negative = f"({true_terms[1]})-({true_terms[0]})"
        return self.terms(difference, true_difference) or self.terms(difference, negative)

    def assigned(self, terms: list[str], signs: list[str], value: str, depth: int) -> bool:
        """`x = 3` and `x \\in [0, 1)` against a value alone: what is named must be a symbol."""
        names_it = len(terms) == 2 and signs[0] in ("=", "\\in")
        if not names_it or len(signs) > 1 or not re.fullmatch(SYMBOL, terms[0]):
            return False
        return self.structures(terms[1], value, depth)

    def terms(self, a: str, b: str) -> bool:
        """Two terms without structure: units, exact numbers and arithmetic, then math-verify."""
        if _without_spaces(a) == _without_spaces(b):
            return True

        # in the same unit, or one of them without
        a, unit, sure = _unit_of(a)
        b, true_unit, true_sure = _unit_of(b)
        if unit and true_unit and unit != true_unit:
            return False
        if bool(unit) != bool(true_unit) and not (sure or true_sure):
            return False

        # words are no mathematics: math-verify drops them, and `not 3` would be 3
        if set(re.findall(FONTS + r"\{[^{}]*\}", a)) != set(re.findall(FONTS + r"\{[^{}]*\}", b)):
            return False

        # what can be computed exactly is decided here
        if same_answer(a, b):
            return True
        value = arithmetic(plain(a))
        true_value = arithmetic(plain(b))
        if value is not None and true_value is not None:
            return value == true_value
        if number(a) is not None and number(b) is not None:
            return False
        return self.asked(a, b)

    def asked(self, a: str, b: str) -> bool:
        """math-verify's verdict; without it the text, without spaces."""
        if self.asks_left == 0 or would_take_long(a) or would_take_long(b):
            return False
        self.asks_left -= 1
        verdict = JUDGE.ask(a, b) if symbolic_grading_available() else None
        if verdict is None:
            return plain(a).replace(" ", "") == plain(b).replace(" ", "")
        return verdict


def would_take_long(expression: str) -> bool:
    """Whether it is a tower of powers, a large factorial or a pile of brackets.

    The judge's limits hold for all others; this only saves their time for what shows itself.
    """
    text = re.sub(r"[{} ]", "", expression.replace("**", "^"))

    # powers of powers, and by numbers of four digits
    tower = re.search(r"\^[-+(]*[\d.]+\^", text)
    large_power = re.search(r"\^[-+(]*\d{4,}", text)

    # factorials of three digits, of factorials, and of what is computed from numbers alone
    product = re.search(r"\d{3}!|!!", text)
    letters = re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", text))
    of_numbers = ")!" in text and not letters

    nested = max(expression.count(opening) for opening in "([{") > 30
    return bool(tower or large_power or product or of_numbers or nested)


def _distinct(members: list[str]) -> list[str]:
    """A set's members, each once."""
    return list({_without_spaces(member): member for member in members}.values())


def arithmetic(text: str) -> Fraction | None:
    """Exact value of an expression of numbers, + - * / ^, brackets, \\frac, \\cdot and \\times.

    None for anything else, and for whatever would take long (a tower of powers, deep brackets),
    which is refused before it is computed.
    """
    # LaTeX in signs
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    for name, sign in (("\\cdot", "*"), ("\\times", "*"), ("\\div", "/"), ("{", "("), ("}", ")")):
        text = text.replace(name, sign)
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\S", text, re.ASCII)
    if len(tokens) > 100 or text.count("(") > 20:
        return None
    try:
        return _Arithmetic(tokens).value()
    except (ArithmeticError, ValueError, IndexError):
        # divided by zero, a stray sign, an early end
        return None


class _Arithmetic:
    """A parser by recursive descent, which computes as it reads.

    The text comes from a model and is never handed to `eval`. One method for each rank of sign:

        sum     := product (+|- product)*
        product := power (*|/ power)*
        power   := (+|-) power | atom (^ power)?
        atom    := number | "(" sum ")"
    """

    # of numerator and denominator together
    MOST_BITS = 4096

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0

    def value(self) -> Fraction:
        """Raises ArithmeticError, ValueError or IndexError for what is no expression."""
        value = self.sum()
        if self.at < len(self.tokens):
            raise ValueError(f"{self.tokens[self.at]} follows a whole expression")
        return value

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            value = self.small(value + other if sign == "+" else value - other)
        return value

    def product(self) -> Fraction:
        value = self.power()
        while sign := self.take("*", "/"):
            other = self.power()
            value = self.small(value * other if sign == "*" else value / other)
        return value

    def power(self) -> Fraction:
        sign = self.take("+", "-")
        if sign:
            value = self.power()
            return -value if sign == "-" else value

        base = self.atom()
        if not self.take("^"):
            return base
        exponent = self.power()
        if exponent.denominator != 1 or abs(exponent) * self.bits(base) > self.MOST_BITS:
            raise ArithmeticError("not a small whole power")
        return base ** int(exponent)

    def atom(self) -> Fraction:
        if not self.take("("):
            self.at += 1
            return Fraction(self.tokens[self.at - 1])
        value = self.sum()
        if not self.take(")"):
            raise ArithmeticError("unbalanced")
        return value

    def take(self, *wanted: str) -> str | None:
        """The next token if it is one of these, which is then behind us."""
        if self.at == len(self.tokens) or self.tokens[self.at] not in wanted:
            return None
        self.at += 1
        return self.tokens[self.at - 1]

    def small(self, value: Fraction) -> Fraction:
        if self.bits(value) > self.MOST_BITS:
            raise ArithmeticError("too large")
        return value

    @staticmethod
    def bits(value: Fraction) -> int:
        return value.numerator.bit_length() + value.denominator.bit_length()


# ------------------------------------------------------------------------------------------ grading


def auto(said: str, truth: str) -> float:
    return float(same_answer(said, truth))


def vqa_alone(said: str, truth: str) -> float:
    """VQA accuracy with one annotator; `grade` hands all of them to `vqa_accuracy`."""
    return vqa_accuracy(said, [truth])


GRADERS: dict[str, Callable[[str, str], float]] = {
    # short answers
    "auto": auto,
    "text": text_equal,
    "exact": exact_match,
    # mathematics
    "number": numbers_equal,
    "symbolic": expressions_equal,
    "list": lists_equal,
    # benchmarks
    "mcq": choices_equal,
    "yesno": yes_no_equal,
    "vqa": vqa_alone,
    "anls": anls,
    "relaxed": relaxed_equal,
    # pictures: places and descriptions
    "box": boxes_overlap,
    "iou": box_iou,
    "phrases": phrase_f1,
    "details": details_score,
}
# For samples that name no grader: by their family.
FAMILY_GRADERS = {"caption": "phrases", "grounding": "box"}


# No function, but a model that is asked (rewards.judged_answer_reward): in RL, with --judge-url.
JUDGED = "judge"


def grader_of(facts: dict) -> str:
    """The key of GRADERS for a sample's facts, or JUDGED. Raises ValueError for an unknown one."""
    name = facts.get("grader") or FAMILY_GRADERS.get(facts.get("family", ""), "auto")
    if name not in GRADERS and name != JUDGED:
        raise ValueError(f"unknown grader {name!r}; choose from {', '.join(GRADERS)}")
    return name


def accepted_truths(truth) -> list[str]:
    """The truths that an answer is compared with, as texts: a list's items, or the one; none of None."""
    if truth is None:
        return []
    several = truth if isinstance(truth, (list, tuple)) else [truth]
    texts = [_truth_text(one) for one in several if one is not None]
    return [text for text in texts if text]


def _truth_text(truth) -> str:
    """Data files hold numbers and boxed answers as well: 5.0 is written 5, \\boxed{5} is 5."""
    if isinstance(truth, bool):
        return "yes" if truth else "no"
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)
    return final_answer(str(truth))


def grade(said: str | None, truth, grader: str = "auto") -> float:
    """What an answer is worth, 0 to 1: its best score against any of the accepted truths.

    truth: a text, a number, or a list of them. Nothing equals a missing answer. Raises ValueError
    for an unknown grader.
    """
    if grader == JUDGED:
        raise ValueError(
            f"facts.grader {JUDGED!r} wants a judge model: rl.py with --judge-url and --judge-model"
        )
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; choose from {', '.join(GRADERS)}")
    truths = accepted_truths(truth)
    if not said or not said.strip() or len(said) > LONGEST_ANSWER or not truths:
        return 0.0
    if grader == "vqa":
        return vqa_accuracy(said, truths)
    return max(GRADERS[grader](said, one) for one in truths)
