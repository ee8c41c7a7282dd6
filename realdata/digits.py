"""Handwritten digits, alone, in the cells of a picture, and one after another as a video.

What it teaches: one small set of scans (scikit-learn's 1,797, BSD-3; made by 13 people) asks for more than
their names. In a grid they have places, numbers, sums and exceptions; in time they have an order. The
digits that are held out appear in no training picture of any kind, so every score here is that of
reading handwriting that nobody has seen.

    8 x 8 scans --one in five held out--> one digit, in any cell     which digit?
                                      --> 1 to 4 in cells            where? how many? what is in each place?
                                      --> two                        their sum and difference
                                      --> 3 or 4, one of another kind  which is the odd one?
                                      --> three frames               rising or falling?

Ours: which scans stand together, where, and what is asked. Theirs: every stroke.
"""

import importlib.util
import random

import numpy as np
from PIL import Image

from realdata.example import (
    CORNERS,
    Example,
    Question,
    as_often,
    cell_corner,
    empty_paper,
    on_test_side,
)

SOURCE = "scikit-learn digits (UCI, BSD-3)"
Scans = dict[int, list[Image.Image]]  # digit -> its scans, ink is dark


def load_scans() -> tuple[Scans, Scans]:
    """(training, held out), 8 x 8 pixels each. Raises ValueError when scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("package scikit-learn is missing: pip install scikit-learn")
    from sklearn.datasets import load_digits

    sides: tuple[Scans, Scans] = ({}, {})
    bunch = load_digits()
    for pixels, label in zip(bunch.images, bunch.target):
        # Ink is 0 to 16; the picture is 255 where there is none.
        scan = Image.fromarray((255 - pixels * 15.9375).astype(np.uint8))
        side = sides[on_test_side(pixels.tolist())]
        side.setdefault(int(label), []).append(scan)
    return sides


# ---------------------------------------------------------------------------------------- pictures


def put_scan(picture: Image.Image, scan: Image.Image, cell: int, rng: random.Random) -> None:
    """A scan, 13 to 15 pixels wide, somewhere in its cell; darker of picture and scan counts."""
    side = rng.randint(13, 15)
    left, top = cell_corner(cell)
    x = left + rng.randint(0, 16 - side)
    y = top + rng.randint(0, 16 - side)

    # Ink on paper
    large = scan.resize((side, side), Image.Resampling.BICUBIC)
    picture.paste((20, 20, 30), (x, y), large.point(lambda value: 255 - value))


def grid_picture(
    scans: Scans, labels: list[int], cells: list[int], rng: random.Random
) -> Image.Image:
    """One scan of each label in its cell."""
    picture = empty_paper(rng)
    for label, cell in zip(labels, cells):
        put_scan(picture, rng.choice(scans[label]), cell, rng)
    return picture


# -------------------------------------------------------------------------------------------- examples


def in_places(labels: list[int], cells: list[int]) -> str:
    """`northwest 3, southeast 7`: place first, from which the rest is looked up."""
    return ", ".join(f"{CORNERS[cell]} {label}" for label, cell in zip(labels, cells))


def describe_it(words: str) -> Question:
    return Question("caption", "describe the picture.", words)


def single(scans: Scans, name: str, test: bool, rng: random.Random) -> Example:
    label = rng.randrange(10)
    picture = grid_picture(scans, [label], [rng.randrange(4)], rng)
    asked = Question("digits", "which digit is this?", str(label))
    return Example(name, (picture,), f"digit {label}", (asked,), test, SOURCE)


def grid(scans: Scans, name: str, test: bool, rng: random.Random) -> Example:
    """One to four different digits."""
    count = rng.randint(1, 4)
    labels = rng.sample(range(10), count)
    cells = sorted(rng.sample(range(4), count))
    words = in_places(labels, cells)
    places = [CORNERS[cell] for cell in cells]

    # Where each is, and what is in each place; held out, one of them is drawn
    spatial = []
    for label, place in zip(labels, places):
        spatial.append(Question("spatial", f"where is the {label}?", f"{label} {place}"))
        spatial.append(Question("spatial", f"what is {place}?", f"{place} {label}"))
    rng.shuffle(spatial)

    # A drill for looking up, as the drawn world has it
    drill = [(CORNERS[cell], str(label)) for label, cell in zip(labels, cells)]
    asked = "what is in each place?"
    if rng.random() < 0.5:
        drill = [(label, place) for place, label in drill]
        asked = "where is each digit?"
    listed = ", ".join(f"{key} {value}" for key, value in rng.choices(drill, k=8))

    # Counted aloud
    steps = [f"{n} {place} {label}" for n, (place, label) in enumerate(zip(places, labels), 1)]
    counted = Question("counting", "how many digits are there?", str(count), ", ".join(steps) + ".")
    listing = Question("listing", asked, listed)
    questions = (describe_it(words), listing, *spatial[:4], counted)
    return Example(name, (grid_picture(scans, labels, cells, rng),), words, questions, test, SOURCE)


def pair(scans: Scans, name: str, test: bool, rng: random.Random) -> Example:
    """Two digits, to add and to subtract."""
    labels = [rng.randrange(10), rng.randrange(10)]
    cells = sorted(rng.sample(range(4), 2))
    words = in_places(labels, cells)

    # The smaller is taken from the larger
    a, b = labels
    high, low = max(labels), min(labels)
    total = Question("arithmetic", "what is the sum?", str(a + b), f"{a} + {b} = {a + b}.")
    difference = Question(
        "arithmetic", "what is the difference?", str(high - low), f"{high} - {low} = {high - low}."
    )
    questions = (describe_it(words), total, difference)
    return Example(name, (grid_picture(scans, labels, cells, rng),), words, questions, test, SOURCE)


def odd_one(scans: Scans, name: str, test: bool, rng: random.Random) -> Example:
    """Three or four digits, all of one kind but one; no two by the same stroke."""
    usual, odd = rng.sample(range(10), 2)
    count = rng.choice((3, 4, 4))
    cells = sorted(rng.sample(range(4), count))
    exception = rng.randrange(count)
    labels = [odd if i == exception else usual for i in range(count)]

    # The chain says what is usual before it names the exception
    words = in_places(labels, cells)
    place = CORNERS[cells[exception]]
    chain = f"{words}. most are {usual}. {place} {odd}."
    questions = (
        describe_it(words),
        Question("odd", "where is the odd one out?", place, chain),
    )
    return Example(name, (grid_picture(scans, labels, cells, rng),), words, questions, test, SOURCE)


def video(scans: Scans, name: str, test: bool, rng: random.Random) -> Example:
    """Three frames of a digit each, which rise, fall or do neither."""
    low, middle, high = sorted(rng.sample(range(10), 3))
    answer = rng.choice(("rising", "falling", "neither"))
    orders = {
        "rising": [(low, middle, high)],
        "falling": [(high, middle, low)],
        "neither": [
            (low, high, middle),
            (middle, low, high),
            (middle, high, low),
            (high, low, middle),
        ],
    }
    labels = rng.choice(orders[answer])
    frames = tuple(grid_picture(scans, [label], [rng.randrange(4)], rng) for label in labels)
    words = ", ".join(str(label) for label in labels)
    asked = Question("order", "do the digits rise or fall?", answer)
    return Example(name, frames, words, (describe_it(words), asked), test, SOURCE)


# kind of example -> (how it is made, its share)
KINDS = {
    "single": (single, 0.12),
    "grid": (grid, 0.30),
    "pair": (pair, 0.22),
    "odd": (odd_one, 0.18),
    "video": (video, 0.18),
}


def digit_examples(train: int, test: int, seed: int) -> list[Example]:
    """So many examples of all kinds, from training scans and from held-out ones."""
    training, held_out = load_scans()
    examples = []
    for held, scans, count in ((False, training, train), (True, held_out, test)):
        for kind, (make, share) in KINDS.items():
            wanted = round(count * share)
            drawn = []
            for i in range(2 * wanted if make is video else wanted):
                name = f"digits-{kind}-{'test' if held else 'train'}-{i}"
                drawn.append(make(scans, name, held, random.Random(f"{seed}/{name}")))
            examples += as_often(drawn, wanted) if make is video else drawn
    return examples
