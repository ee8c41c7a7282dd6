"""What the words of a drawn scene tell: questions about them, with their true answers.

What it teaches: whether a question-writer is right can only be counted where somebody knows every answer.
The captions of data/world.py are a small language; here it is read back.

    "northwest red circle, southeast blue cross" -> "where is the circle?"  "circle northwest"
                                                    "how many things are there?"  "2"   ...

The oracle asks and answers from here, and `true_answer` grades whoever else did.

Simplified: of a video's caption nothing is told, as it names one thing three times.
"""

import re

PLACED = re.compile(r"((?:north|south)(?:west|east)) (\w+) (\w+)")
BAR = re.compile(r"(\w+) (\d)")
DOTS = re.compile(r"\w+ dots (\d+)")
WRITTEN = re.compile(r"text (\w+)")
SUM = re.compile(r"sum (\d) ([+-]) (\d)")


def told_pairs(words: str) -> list[tuple[str, str]]:
    """(question, answer) about a caption in the world's words; nothing about other texts."""
    phrases = words.split(", ")
    placed = [PLACED.fullmatch(phrase) for phrase in phrases]
    if all(placed):
        return told_of_things([match.groups() for match in placed])
    bars = [BAR.fullmatch(phrase) for phrase in phrases]
    if all(bars):
        return told_of_bars([match.groups() for match in bars])

    # One phrase
    dots = DOTS.fullmatch(words)
    if dots:
        return [("how many things are there?", dots[1])]
    written = WRITTEN.fullmatch(words)
    if written:
        return [("what does it say?", written[1])]
    equation = SUM.fullmatch(words)
    if equation:
        return [("what is the result?", str(result_of(*equation.groups())))]
    return []


def result_of(a: str, sign: str, b: str) -> int:
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


def told_of_things(things: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """things: (place, color, shape) each, the places different."""
    places, colors, shapes = zip(*things)
    if len(set(places)) < len(places):
        return []

    pairs = [("how many things are there?", str(len(things)))]
    for place, color, shape in things:
        pairs.append((f"what color is the thing in the {place}?", f"{place} {color}"))
        pairs.append((f"what shape is the thing in the {place}?", f"{place} {shape}"))
        if shapes.count(shape) == 1:
            pairs.append((f"where is the {shape}?", f"{shape} {place}"))
            pairs.append((f"what color is the {shape}?", f"{shape} {color}"))
        if colors.count(color) == 1:
            pairs.append((f"where is the {color} thing?", f"{color} {place}"))
            pairs.append((f"what shape is the {color} thing?", f"{color} {shape}"))
    return pairs


def told_of_bars(bars: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """bars: (color, height) each."""
    pairs = []
    for color, height in bars:
        pairs.append((f"how high is the {color} bar?", f"{color} {height}"))
    for kind, choose in (("highest", max), ("lowest", min)):
        color, height = choose(bars, key=lambda bar: int(bar[1]))
        pairs.append((f"which bar is the {kind}?", f"{color} {height}"))
    return pairs


def true_answer(words: str, question: str) -> str | None:
    """What the words say to a question, None when it is none of `told_pairs`."""
    return dict(told_pairs(words)).get(question)
