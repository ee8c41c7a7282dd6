"""easy-VQA: 5,000 pictures of a shape, and the questions that its author asked about them (MIT).

What it teaches: a published set brings its own answers, and its own short cuts. "Is it red?" is mostly
no, and whoever always says so is right in two questions of three. Here each question is asked as
often for a yes as for a no; then a guess is worth one half.

    questions.json --by picture--> yes and no as often, for every question --> attributes, 32 x 32
                   --answers that give away colour and shape--> a caption

Its own train / test split is kept: held out by picture.
"""

import json
import random
import re
from collections import defaultdict

from PIL import Image

from realdata.example import SIDE, Example, Question, package_folder

COLORS = {"black", "gray", "red", "green", "blue", "teal", "brown", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
SOURCE = "easy-VQA (MIT)"
Triple = tuple[str, str, int]  # question, answer, number of the picture
TURNS = 5  # questions of a picture in training


def given_away(asked: list[tuple[str, str]]) -> str:
    """`red circle`, when a picture's own answers give both away; else "".

    A named thing is an answer; so is a yes to "is it red?", and a no to "is it not red?".
    """
    seen = {}
    for question, answer in asked:
        if answer not in ("yes", "no"):
            seen["color" if answer in COLORS else "shape"] = answer
            continue

        negated = bool(re.search(r"\b(no|not)\b", question))
        if (answer == "yes") == negated:
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
        asked = questions_by_picture(evenly_answered(triples, rng))

        # A picture with some of its questions
        for number in rng.sample(sorted(asked), min(most, len(asked))):
            picture = Image.open(root / side / "images" / f"{number}.png").convert("RGB")
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            some = rng.sample(asked[number], min(TURNS, len(asked[number])))
            questions = []
            for question, answer in some:
                family = "yes-no" if answer in ("yes", "no") else "shapes"
                questions.append(Question(family, question, answer))
            words = given_away(shown[number])
            if words:
                questions.append(Question("caption", "describe the picture.", words))
            name = f"easyvqa-{side}-{number}"
            held = side == "test"
            examples.append(Example(name, (small,), words, tuple(questions), held, SOURCE))
    return examples
