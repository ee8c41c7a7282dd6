"""Are the answers right? Charts as they were written, recomputed from what their pictures show.

What it teaches: whoever computes an answer should not be the one who confirms it. Answers come from the
spec (chart_questions.py). Here they are computed anew, by other means, from the numbers that were read
back off the drawn figure (`facts.shown`, chart_pictures.read_back): a bar that was drawn too high, a
label at the wrong place, a question about a name that is not in it, each makes the two differ.

    python -m curation.chart_check --data charts.jsonl     # exit status 1 if a chart is wrong

Part of the pipeline (the step "check"), and a command for files that travelled.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

from curation.chart_questions import KIND_NAMES, WORDS
from data.images import open_image
from data.readers import Folder
from data.sample import BadSample, Sample
from infra.cli import command

CLOSE = 0.00501  # half of the last decimal that is said


def chart_fault(sample: Sample) -> str:
    """What is wrong with a chart, as "class: details"; "" for nothing."""
    facts = sample.facts
    if not {"shown", "asked", "language"} <= facts.keys():
        return "no chart: facts hold no `shown`, `asked` and `language`"
    texts = spoken_turns(sample)
    for asked in facts["asked"]:
        # Asked as it was written, about names that stand in it
        turn = (asked["question"], asked["answer"])
        if turn not in texts:
            return f"not in the conversation: {turn}"
        absent = unnamed_in(asked, facts["shown"])
        if absent:
            return f"name not in the question: {absent!r}, {asked['question']!r}"

        # Answered as the picture has it
        found = recomputed(asked, facts["shown"], facts["language"])
        if not agrees(asked["answer"], found):
            return f"answer differs: {asked['question']!r} {asked['answer']!r}, shown {found!r}"
    caption = facts.get("caption", "")
    return caption_fault(caption, facts["shown"]) if caption else ""


def spoken_turns(sample: Sample) -> list[tuple[str, str]]:
    """Questions and answers of the conversation, without pictures."""
    words = []
    for message in sample.messages:
        words.append("".join(part for part in message.parts if isinstance(part, str)).strip())
    return list(zip(words[::2], words[1::2]))


def unnamed_in(asked: dict, shown: dict) -> str:
    """A name that the question is about and does not say; "" if it says all."""
    # The series too, where there are several
    names = list(asked["names"])
    if len(shown["table"]) > 1 or len(shown["points"]) > 1:
        names.append(asked["series"])
    for name in names:
        either = (name, name.replace(" to ", " and "))
        if not any(form in asked["question"] for form in either):
            return name
    return ""


def agrees(answer: str, found: Any) -> bool:
    if found is None:
        return False

    # Texts to the letter, numbers to the last decimal that is said
    if isinstance(found, str):
        return answer == found
    return re.fullmatch(r"-?\d+(\.\d+)?", answer) is not None and abs(float(answer) - found) < CLOSE


def caption_fault(caption: str, shown: dict) -> str:
    """The two ends of the numbers stand in the caption, if it speaks of numbers at all."""
    # Numbers of the caption, numbers of the picture
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", caption)]
    cells = np.array([[*row.values()] for row in shown["table"].values()])
    if not numbers or not cells.size or not shown["title"]:
        return ""

    # Names may have numbers too: it is enough that both ends are among them
    for end in (cells.min(), cells.max()):
        if not np.isclose(numbers, end, rtol=0, atol=CLOSE).any():
            return f"caption differs: {end:g} is not in {caption!r}"
    return ""


# -------------------------------------------------------------------------------- other arithmetic


def recomputed(asked: dict, shown: dict, language: str) -> str | float | None:
    """The answer by the picture: a text, a number, or None where it has none or more than one."""
    found = AGAIN[asked["ask"]](asked, shown)
    if language == "zh" and isinstance(found, str):
        return (
            KIND_NAMES["zh"][shown["kind"]] if asked["ask"] == "kind" else WORDS.get(found, found)
        )
    return found


def asked_row(asked: dict, shown: dict) -> tuple[list[str], np.ndarray]:
    """Names of the series that is asked about, and their numbers."""
    row = shown["table"][asked["series"]]
    return [*row], np.array([*row.values()])


def number_at(asked: dict, shown: dict, place: int) -> float:
    return shown["table"][asked["series"]][asked["names"][place]]


def only_place(numbers: np.ndarray) -> int | None:
    """Where the largest number is, if it is there once."""
    places = np.flatnonzero(numbers == numbers.max())
    return int(places[0]) if len(places) == 1 else None


def again_highest(asked: dict, shown: dict, sign: int = 1) -> str | None:
    names, numbers = asked_row(asked, shown)
    place = only_place(sign * numbers)
    return None if place is None else names[place]


def again_comparison(asked: dict, shown: dict) -> str:
    first = number_at(asked, shown, 0)
    second = number_at(asked, shown, 1)
    return "yes" if first - second > 0 else "no"


def again_count(asked: dict, shown: dict) -> float:
    if shown["kind"] == "scatter":
        return float(sum(map(len, shown["points"].values())))
    if shown["kind"] in ("line", "area"):
        return float(len(shown["table"]))
    return float(sum(map(len, shown["table"].values())))


def again_trend(asked: dict, shown: dict) -> str:
    if shown["kind"] == "scatter":
        points = np.array(shown["points"][asked["series"]])  # (points, 2)
        r = np.corrcoef(points.T)[0, 1]
        return "neither" if abs(r) < 0.5 else ("rising" if r > 0 else "falling")

    # One sign of all steps, or more
    _, numbers = asked_row(asked, shown)
    signs = {*np.sign(np.diff(numbers))}
    if signs == {1.0}:
        return "rising"
    return "falling" if signs == {-1.0} else "neither"


def again_place(asked: dict, shown: dict) -> float | None:
    place = only_place(asked_row(asked, shown)[1])
    return None if place is None or shown["horizontal"] else place + 1.0


def again_colour(asked: dict, shown: dict) -> str | None:
    """Of a series that is named, or of the highest shape."""
    if asked["names"]:
        return shown["colors"][asked["names"][0]]
    highest = again_highest(asked, shown)
    return None if highest is None else shown["colors"][highest]


AGAIN: dict[str, Callable[[dict, dict], str | float | None]] = {
    "kind": lambda asked, shown: KIND_NAMES["en"][shown["kind"]],
    "title": lambda asked, shown: shown["title"],
    "axis": lambda asked, shown: shown["y"],
    "value": lambda asked, shown: number_at(asked, shown, 0),
    "highest": again_highest,
    "lowest": lambda asked, shown: again_highest(asked, shown, -1),
    "difference": lambda asked, shown: abs(number_at(asked, shown, 0) - number_at(asked, shown, 1)),
    "comparison": again_comparison,
    "count": again_count,
    "sum": lambda asked, shown: float(asked_row(asked, shown)[1].sum()),
    "mean": lambda asked, shown: float(asked_row(asked, shown)[1].mean()),
    "trend": again_trend,
    "place": again_place,
    "colour": again_colour,
}


# ---------------------------------------------------------------------------------------- command


@dataclass
class ChartCheckOptions:
    """Check written charts: pictures open, answers recomputed."""

    data: Path  # rows that `python -m curation.charts` wrote


def check_charts(options: ChartCheckOptions) -> int:
    """Prints what there is and what is wrong; returns the exit status."""
    # Row by row
    folder = Folder(options.data)
    kinds: Counter = Counter()
    asks: Counter = Counter()
    wrong: Counter = Counter()
    first: dict[str, str] = {}
    for sample in (folder[index] for index in range(len(folder))):
        fault = str(sample) if isinstance(sample, BadSample) else row_fault(sample)
        if fault:
            reason = fault.split(": ")[0]
            wrong[reason] += 1
            first.setdefault(reason, fault)
            continue
        kinds[f"{sample.facts['shown']['kind']} {sample.facts['language']}"] += 1
        asks.update(asked["ask"] for asked in sample.facts["asked"])

    # What there is, then what is wrong
    print(f"{sum(kinds.values()):,} charts, {sum(asks.values()):,} answers recomputed")
    print("  " + ", ".join(f"{name} {number}" for name, number in sorted(kinds.items())))
    print("  " + ", ".join(f"{name} {number}" for name, number in asks.most_common()))
    for reason, number in wrong.most_common():
        print(f"  wrong: {number} x {reason}; first: {first[reason]}")
    return int(bool(wrong))


def row_fault(sample: Sample) -> str:
    """Of a row from a file: its picture too."""
    # One picture, that can be opened and has something on it
    pictures = [p for m in sample.messages for p in m.parts if not isinstance(p, str)]
    if len(pictures) != 1:
        return f"one picture: {len(pictures)} are there"
    try:
        picture = open_image(pictures[0], sample.root, sample.origin)
    except BadSample as fault:
        return str(fault)
    if all(darkest == lightest for darkest, lightest in picture.getextrema()):
        return f"blank picture: {sample.origin}"
    return chart_fault(sample)


if __name__ == "__main__":
    command(check_charts)
