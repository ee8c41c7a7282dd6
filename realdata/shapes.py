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


def evenly_answered(
    triples: list[tuple[str, str, int]], rng: random.Random
) -> list[tuple[str, str, int]]:
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


def shape_examples(train: int, test: int, seed: int) -> list[Example]:
    """At most so many pictures of either side."""
    root = package_folder("easy_vqa", "easy-vqa") / "data"
    examples = []
    for side, most in (("train", train), ("test", test)):
        rng = random.Random(f"{seed}/shapes/{side}")
        triples = [tuple(triple) for triple in json.loads((root / side / "questions.json").read_text())]
        shown: dict[int, list] = defaultdict(list)
        for question, answer, image in triples:
            shown[image].append((question, answer))
        asked: dict[int, list] = defaultdict(list)
        for question, answer, image in evenly_answered(triples, rng):
            asked[image].append((question, answer))

        # A picture with some of its questions
        for image in rng.sample(sorted(asked), min(most, len(asked))):
            picture = Image.open(root / side / "images" / f"{image}.png").convert("RGB")
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            some = rng.sample(asked[image], min(TURNS, len(asked[image])))
            questions = [Question("shapes", *pair) for pair in some]
            words = given_away(shown[image])
            if words:
                questions.append(Question("caption", "describe the picture.", words))
            name = f"easyvqa-{side}-{image}"
            examples.append(
                Example(name, (small,), words, tuple(questions), side == "test", "easy-VQA (MIT)")
            )
    return examples
