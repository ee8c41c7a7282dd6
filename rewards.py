"""Rewards: what a completion is worth, decided by rules.

What it teaches: a verifiable reward is a parser and a comparison, and every laxness in either is something that a policy will
find. So: the box is read only after `</think>`, there must be exactly one, braces must balance, the completion must have
ended by itself, and nothing equals a missing answer. Model output is never evaluated as code.

Sources: SAIL-VL2 section 4.2 (answer, format and think rewards, each binary; mixed weights that sum to 1 but are not
published: ours are below). Each function is pure: text in, number out.
"""
import re
from fractions import Fraction

BOX = "\\boxed{"
# Our choice: the paper says only that the three coefficients sum to 1.
MIXED_WEIGHTS = {"answer": 0.7, "think": 0.2, "format": 0.1}


def boxed(text: str) -> str | None:
    """The content of the one balanced \\boxed{...} in `text`, or None when there is none, two, or an unbalanced one.

    >>> boxed("so \\\\boxed{\\\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    if text.count(BOX) != 1:
        return None
    start = text.index(BOX) + len(BOX)
    depth = 1
    for i, c in enumerate(text[start:start + 1000], start):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[start:i].strip() or None
    return None


def split_think(text: str) -> tuple[str | None, str]:
    """(chain, answer): the chain of one leading <think>...</think>, None when the text is not of that form."""
    if text.count("<think>") == 1 and text.count("</think>") == 1 and text.lstrip().startswith("<think>"):
        chain, _, answer = text.lstrip()[len("<think>"):].partition("</think>")
        return chain, answer
    return None, text


def number(text: str) -> Fraction | None:
    """An exact number: 3, -2.5, 1/4, 1,000, 40%. None for anything else, and for absurd lengths."""
    text = text.strip().rstrip(".").replace(",", "").removesuffix("%")
    if len(text) > 40 or not re.fullmatch(r"[+-]?(\d+(\.\d+)?|\.\d+|\d+/\d+)", text):
        return None
    return None if re.search(r"/0+$", text) else Fraction(text)


def box_iou(a: str, b: str) -> float:
    """Overlap of two boxes written as four numbers (0 to 1000); 0 when either is not one."""
    corners = []
    for text in (a, b):
        found = re.findall(r"\d+", text[:80])
        if len(found) != 4:
            return 0.0
        x0, y0, x1, y1 = map(int, found)
        if x1 <= x0 or y1 <= y0:
            return 0.0
        corners.append((x0, y0, x1, y1))
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = corners
    inter = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    return inter / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - inter)


def same(answer: str | None, truth: str | None) -> bool:
    """Equal as numbers if both are, else as text without case, outer space and a final stop. None equals nothing."""
    if not answer or not truth:
        return False
    a, b = number(answer), number(truth)
    if a is not None and b is not None:
        return a == b
    plain = [" ".join(t.lower().strip().rstrip(".").split()) for t in (answer, truth)]
    return plain[0] == plain[1] != ""


def format_reward(text: str, finished: bool) -> float:
    """1 for <think>chain</think> then exactly one box, ended by the model itself; else 0."""
    chain, answer = split_think(text)
    return float(finished and chain is not None and bool(chain.strip()) and boxed(answer) is not None)


def answer_reward(text: str, truth: str, finished: bool) -> float:
    """1 when the one box after the thinking holds the truth. A completion that was cut off earns nothing."""
    return float(finished and same(boxed(split_think(text)[1]), truth))


def think_reward(text: str, facts: dict) -> float:
    """Rules in place of a judge: every statement of the chain is true of the scene, and it states something.

    `facts["chain"]` and `facts["words"]` hold the reference; statements are the comma- and stop-separated pieces. A chain
    that is grounded may leave things out but may not invent (the paper asks for soundness, grounding and consistency).
    """
    chain, answer = split_think(text)
    said = statements(chain or "")
    true = statements(facts.get("chain", "")) | statements(facts.get("words", ""))
    box = boxed(answer)
    consistent = box is not None and (not said or number(box) is None or box in " ".join(sorted(said)))
    return float(bool(said) and said <= true and consistent)


def statements(text: str) -> set[str]:
    return {piece.strip() for piece in re.split(r"[,.]", text) if piece.strip()}


def overlap_reward(text: str, truth: str) -> float:
    """For answers that no rule decides (captions): F1 of comma-separated phrases, standing in for a judge model."""
    return phrase_f1(split_think(text)[1].replace(BOX, "").rstrip("} "), truth)


def phrase_f1(text: str, truth: str) -> float:
    """F1 between the comma-separated phrases of two texts, order ignored."""
    a, b = ([p.strip() for p in t.split(",") if p.strip()] for t in (text, truth))
    hits = sum(min(a.count(p), b.count(p)) for p in set(a))
    return 2 * hits / (len(a) + len(b)) if a and b else 0.0


def mixed_reward(text: str, facts: dict, finished: bool, weights: dict[str, float] = MIXED_WEIGHTS) -> float:
    """Weighted sum of answer, think and format. Raises ValueError unless the weights sum to 1."""
    if abs(sum(weights.values()) - 1) > 1e-9:
        raise ValueError(f"mixed reward weights must sum to 1 (paper, section 4.2.5), got {weights}")
    if facts.get("family") == "caption":
        right = overlap_reward(text, facts["answer"]) if finished else 0.0
    else:
        right = answer_reward(text, facts["answer"], finished)
    parts = {"answer": right, "think": think_reward(text, facts), "format": format_reward(text, finished)}
    return sum(w * parts[name] for name, w in weights.items())
