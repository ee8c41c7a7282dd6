"""What every source yields: a picture that people made, what it is known to show, and questions about it.

What it teaches: a held-out score says something only if its split is right. A sample is held out
because of *what people made*: a drawing, a typeface, a table. Whoever wants to do well on it must
have learned to see, for the thing itself was never there.

    a source of this room --> Example: pictures, words, questions, test or train
                                |
                                +-- in training: one row a family, several turns; a part described in words
                                +-- held out:    one row a question, for the families that are graded

    1 picture: one picture      several: the frames of a video, in order      none: read as a description

Rows are LLaVA's. `task` is what mixtures call such data (the drawn world's own names where it has one:
rl.py asks for those), `facts.family` what it is graded as.
"""

import hashlib
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIDE = 32  # pixels of a picture's side
CELL = 16  # pixels of a cell's side: each becomes one visual token
CORNERS = ("northwest", "northeast", "southwest", "southeast")
TURNS = 3  # questions about a description in training, at most


@dataclass(frozen=True)
class RealFamily:
    """A line of the table of scores.

    reasoning: whether its questions have chains of thought. alone: in training one question a row about a
    picture, since an earlier answer would tell a later one, which is then copied and not looked up.
    in_words: share of its training questions that are asked about the description, too. Look-ups are
    learned in words first; where the answer is merely copied from the description, a few are enough.
    """

    task: str  # what mixtures call it
    made_of: str  # what people made
    split: str  # what is held out
    reasoning: bool = False
    grader: str = ""  # a key of graders.GRADERS; none: by the form of the answer
    graded: bool = True
    alone: bool = False
    in_words: float = 0.5


TABLE = {
    "caption": RealFamily("caption", "all of them", "as below", grader="phrases"),
    "listing": RealFamily("listing", "digits, charts", "a drill", graded=False, in_words=1.0),
    "shapes": RealFamily("shapes", "easy-VQA", "pictures: its own test split", alone=True),
    "kind": RealFamily(
        "attributes", "emoji, stamps, photographs", "drawings; what photographs show", in_words=0.05
    ),
    "kind-zh": RealFamily("attributes", "emoji", "drawings, by code point", in_words=0.05),
    "colour": RealFamily("attributes", "emoji", "drawings, by code point"),
    "spatial": RealFamily("spatial", "handwriting", "drawings, by their pixels", alone=True),
    "counting": RealFamily("counting", "handwriting", "drawings, by their pixels", True),
    "digits": RealFamily("reading", "handwriting", "drawings, by their pixels", in_words=0.05),
    "codes": RealFamily("codes", "typefaces", "typefaces, and airports' codes", in_words=0.1),
    "charts": RealFamily("charts", "tables", "tables, countries", True, alone=True),
    "arithmetic": RealFamily(
        "arithmetic", "handwriting", "drawings, by their pixels", True, alone=True
    ),
    "odd": RealFamily("odd", "handwriting", "drawings, by their pixels", True),
    "order": RealFamily("video", "handwriting", "drawings, by their pixels"),
    "trend": RealFamily("video", "tables", "tables, countries"),
    "text": RealFamily("text", "all of them, in words", "as above"),
}


@dataclass(frozen=True)
class Question:
    """family: a key of TABLE. visible: only of the picture; a description does not say it."""

    family: str
    question: str
    answer: str
    chain: str = ""
    visible: bool = False


@dataclass(frozen=True)
class Example:
    """pictures: one, or frames. words: all that they are known to show, "" when that is not said.

    name: of its files, without suffix. source: whose work it is, for whoever reads the row.
    """

    name: str
    pictures: tuple[Image.Image, ...]
    words: str
    questions: tuple[Question, ...]
    test: bool
    source: str = ""


# --------------------------------------------------------------------------------------- the split


def on_test_side(made: object, one_in: int = 5) -> bool:
    """Whether a thing that people made is kept for grading: one hash in `one_in` is."""
    digest = hashlib.blake2b(repr(made).encode(), digest_size=4).digest()
    return digest[0] % one_in == 0


def package_folder(package: str, install: str) -> Path:
    """Where a package lies, without importing it. Raises ValueError when it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"package {install} is missing: pip install -r requirements/real.txt")
    return Path(spec.origin).parent


# ------------------------------------------------------------------------------------------- pictures


def empty_paper(rng: random.Random) -> Image.Image:
    """An empty picture, nearly white."""
    shade = rng.randrange(235, 256)
    return Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))


def cell_corner(cell: int) -> tuple[int, int]:
    """Top left pixel of a cell, 0 to 3 in reading order."""
    return cell % 2 * CELL, cell // 2 * CELL


# ------------------------------------------------------------------------------------------------ rows


def picture_files(example: Example) -> list[str]:
    """Where an example's pictures stand, below the folder of the rows."""
    if len(example.pictures) == 1:
        return [f"images/{example.name}.png"]
    return [f"images/{example.name}-{i}.png" for i in range(len(example.pictures))]


def row_about(example: Example, asked: list[Question], task: str, described: bool = False) -> dict:
    """A LLaVA row: these questions in turn, about the pictures or (`described`) about their words."""
    # What stands before the first question
    files = picture_files(example)
    row: dict = {"id": example.name, "task": task}
    if described:
        opening = f"picture: {example.words}.\n"
    elif len(files) == 1:
        opening = "<image>\n"
        row["image"] = files[0]
    else:
        opening = "<video>"
        row["video"] = files

    # Question and answer in turn
    turns = []
    for question in asked:
        turns.append({"from": "human", "value": opening + question.question})
        turns.append({"from": "gpt", "value": question.answer})
        opening = ""
    row["conversations"] = turns

    # What grading knows: of the last turn
    last = asked[-1]
    row["facts"] = {
        "answer": last.answer,
        "family": "text" if described else last.family,
        "words": example.words,
        "source": example.source,
    }
    if last.chain:
        row["facts"]["chain"] = last.chain
    if TABLE[last.family].grader:
        row["facts"]["grader"] = TABLE[last.family].grader
    return row


def training_rows(example: Example, rng: random.Random) -> list[dict]:
    """One row a family, with its questions (or one each, where they are `alone`): an answer must not tell
    that of another family. Some pictures are asked about in words, too."""
    asked_at_once: list[list[Question]] = []
    by_family: dict[str, list[Question]] = {}
    for question in example.questions:
        if TABLE[question.family].alone:
            asked_at_once.append([question])
        else:
            by_family.setdefault(question.family, []).append(question)
    asked_at_once += by_family.values()
    rows = [row_about(example, asked, TABLE[asked[0].family].task) for asked in asked_at_once]

    # A description is repeated, too: who copies has learned half of looking up
    describable = [q for q in example.questions if not q.visible]
    some = [q for q in describable if rng.random() < TABLE[q.family].in_words]
    if example.words and some:
        rng.shuffle(some)
        rows.append(row_about(example, some[:TURNS], "text", described=True))
    return rows


def as_often(examples: list[Example], count: int) -> list[Example]:
    """At most `count`, no answer to the last question commoner than another: a guess must not be worth
    more for it."""
    by_answer: dict[str, list[Example]] = {}
    for example in examples:
        by_answer.setdefault(example.questions[-1].answer, []).append(example)
    if not by_answer:
        return []
    each = min(count // len(by_answer), min(map(len, by_answer.values())))
    return [example for mine in by_answer.values() for example in mine[:each]]


def held_out_rows(examples: list[Example], most: int, rng: random.Random) -> list[dict]:
    """At most so many rows of each graded family, one question each; and as many described ones."""
    asked: dict[str, list[tuple[Example, Question]]] = {}
    for example in examples:
        for question in example.questions:
            if TABLE[question.family].graded:
                asked.setdefault(question.family, []).append((example, question))

    # Some of each family, and of those some in words
    rows = []
    described = []
    for family, pairs in asked.items():
        for example, question in rng.sample(pairs, min(most, len(pairs))):
            rows.append(row_about(example, [question], TABLE[question.family].task))
            if example.words and not question.visible:
                described.append(row_about(example, [question], "text", described=True))
    return rows + rng.sample(described, min(most, len(described)))
