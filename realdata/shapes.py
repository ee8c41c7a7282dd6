"""easy-VQA: 5,000 pictures of a shape, and the questions that its author asked about them (MIT).

What it teaches: a published set brings its own answers, and its own short cuts. Some answers to a question
are commoner than others; here each is given as often as its rarest one, so that no guess is better than
another. Its yes-or-no questions are left out: whether a word of the question fits the picture
is a comparison that minutes of training do not teach, not even in words (LOG.md has the trials).

    questions.json --by picture--> every answer as often, for every question --> shapes
                   --answers that give away colour and shape--> a caption
    picture, 64 x 64 --a window around the shape--> 32 x 32

A window, since halving the picture makes a small circle of six pixels, which is a square. Its own
train / test split is kept: held out by picture.
"""

import json
import random
import re
from collections import defaultdict

from PIL import Image, ImageChops

from realdata.example import SIDE, Example, Question, package_folder

COLORS = {"black", "gray", "red", "green", "blue", "teal", "brown", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
SOURCE = "easy-VQA (MIT)"
DENIAL = re.compile(r"\b(no|not)\b")
Triple = tuple[str, str, int]  # question, answer, number of the picture
ASKED = 5  # questions of a picture, at most
WINDOW = 32  # pixels of a picture's side that are kept at least


def given_away(asked: list[tuple[str, str]]) -> str:
    """`red circle`, when a picture's own answers give both away; else "".

    A named thing is an answer; so is a yes to "is it red?", and a no to "is it not red?".
    """
    seen = {}
    for question, answer in asked:
        if answer not in ("yes", "no"):
            seen["color" if answer in COLORS else "shape"] = answer
            continue

        if (answer == "yes") == bool(DENIAL.search(question)):
            continue
        for word in re.findall(r"\w+", question):
            if word in COLORS | SHAPES:
                seen["color" if word in COLORS else "shape"] = word
                break
    return f"{seen['color']} {seen['shape']}" if len(seen) == 2 else ""


def evenly_answered(triples: list[Triple], rng: random.Random) -> list[Triple]:
    """(question, answer, picture) with every answer to a question as often as its rarest one."""
    by_question: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for triple in triples:
        question, answer, _ = triple
        by_question[question][answer].append(triple)

    kept = []
    for answers in by_question.values():
        rarest = min(map(len, answers.values()))
        # A question with one answer is no question
        if len(answers) > 1:
            for mine in answers.values():
                kept += rng.sample(mine, rarest)
    return kept


def questions_by_picture(triples: list[Triple]) -> dict[int, list[tuple[str, str]]]:
    """(question, answer) pairs of each picture."""
    pairs: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, picture in triples:
        pairs[picture].append((question, answer))
    return pairs


Box = tuple[int, int, int, int]  # left, top, right, bottom


def area(box: Box) -> int:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def shape_box(picture: Image.Image) -> Box:
    """Where the shape is: what differs from the paper, which one of two opposite corners shows."""
    last = (picture.width - 1, picture.height - 1)
    boxes = []
    for corner in ((0, 0), last):
        paper = Image.new("RGB", picture.size, picture.getpixel(corner))
        changed = ImageChops.difference(picture, paper).getbbox()
        boxes.append(changed or (0, 0, *picture.size))
    return min(boxes, key=area)


def around_shape(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A square of the (square) picture with the whole shape in it, somewhere; SIDE pixels wide."""
    # Its side
    left, top, right, bottom = shape_box(picture)
    side = max(WINDOW, right - left, bottom - top)

    # Its place
    x = rng.randint(max(0, right - side), min(left, picture.width - side))
    y = rng.randint(max(0, bottom - side), min(top, picture.height - side))
    window = picture.crop((x, y, x + side, y + side))
    return window.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def shape_examples(train: int, test: int, seed: int) -> list[Example]:
    """At most so many pictures of either side."""
    root = package_folder("easy_vqa", "easy-vqa") / "data"
    examples = []
    for side, most in (("train", train), ("test", test)):
        # All that the set says of a picture, and what is asked about it
        rng = random.Random(f"{seed}/shapes/{side}")
        listed = json.loads((root / side / "questions.json").read_text())
        triples = [tuple(triple) for triple in listed]
        shown = questions_by_picture(triples)
        named = [triple for triple in triples if triple[1] not in ("yes", "no")]
        asked = questions_by_picture(evenly_answered(named, rng))

        # A picture with some of its questions
        for number in rng.sample(sorted(asked), min(most, len(asked))):
            picture = Image.open(root / side / "images" / f"{number}.png").convert("RGB")
            small = around_shape(picture, rng)
            some = rng.sample(asked[number], min(ASKED, len(asked[number])))
            questions = [Question("shapes", question, answer) for question, answer in some]
            words = given_away(shown[number])
            if words:
                questions.append(Question("caption", "describe the picture.", words))
            name = f"easyvqa-{side}-{number}"
            held = side == "test"
            examples.append(Example(name, (small,), words, tuple(questions), held, SOURCE))
    return examples
