"""Airports' codes in typefaces: people drew the letters, and gave the codes.

What it teaches: reading is to see one letter in many shapes. Training has some families of type, grading
has others, and other codes: what is read was in no picture, and looks like nothing that was. (Common
words would not do: four hundred of them are learned by heart, and an unseen one is never said.)

    fonts of eight wheels (SIL OFL, Apache)  --three families held out--> 16 x 16 pixels a letter
    3,000 codes of vega-datasets' airports   --one in five held out----> JF above K: 32 x 32

Ours: a letter stands in the middle of a cell, as in the drawn world. A line of 48 x 16 pixels, which is
three tiles and a thumbnail, costs four times the tokens, and 150 steps did not teach it a single code.
"""

import csv
import functools
import random
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from realdata.example import (
    CELL,
    Example,
    Question,
    cell_corner,
    empty_paper,
    on_test_side,
    package_folder,
)

FAMILIES = {
    "font_source_sans_pro": "font-source-sans-pro",
    "font_source_serif_pro": "font-source-serif-pro",
    "font_caladea": "font-caladea",
    "font_hanken_grotesk": "font-hanken-grotesk",
    "font_manrope": "font-manrope",
    "font_fredoka_one": "font-fredoka-one",
    "font_intuitive": "font-intuitive",
    "font_amatic_sc": "font-amatic-sc",
}
HELD_OUT_FAMILIES = ("font_caladea", "font_manrope", "font_fredoka_one")  # serif, sans, display
FAINT = re.compile("Thin|ExtraLight")  # strokes that 16 pixels do not show
INKS = ((20, 20, 20), (190, 30, 30), (30, 60, 190), (20, 120, 50))


def font_files(test: bool) -> list[Path]:
    """The typefaces of one side; of a face in two formats one."""
    faces: dict[str, Path] = {}
    for package, install in FAMILIES.items():
        if (package in HELD_OUT_FAMILIES) == test:
            for path in sorted((package_folder(package, install) / "files").glob("*.[ot]tf")):
                if not FAINT.search(path.stem):
                    faces[path.stem] = path
    return list(faces.values())


@functools.lru_cache(maxsize=None)
def face_at(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def line_picture(text: str, path: Path, rng: random.Random) -> Image.Image:
    """Up to four letters in reading order, each about the middle of its cell."""
    picture = empty_paper(rng)
    pen = ImageDraw.Draw(picture)
    face = face_at(path, rng.randint(14, 17))
    ink = rng.choice(INKS)
    for place, letter in enumerate(text):
        left, top = cell_corner(place)
        x = left + CELL // 2 + rng.randint(-1, 1)
        y = top + 13 + rng.randint(-1, 1)
        pen.text((x, y), letter, fill=ink, font=face, anchor="ms")
    return picture


def airport_codes(test: bool) -> list[str]:
    """Three letters each, of one side."""
    path = package_folder("vega_datasets", "vega-datasets") / "_data" / "airports.csv"
    with open(path, newline="") as file:
        codes = {row["iata"] for row in csv.DictReader(file)}
    letters = [code for code in codes if re.fullmatch("[A-Z]{3}", code)]
    return sorted(code for code in letters if on_test_side(code) == test)


def code_examples(train: int, test: int, seed: int) -> list[Example]:
    """Codes in training typefaces, and others in held-out ones."""
    examples = []
    for held, count in ((False, train), (True, test)):
        codes = airport_codes(held)
        faces = font_files(held)
        for i in range(count):
            name = f"code-{'test' if held else 'train'}-{i}"
            rng = random.Random(f"{seed}/{name}")
            code = rng.choice(codes)
            path = rng.choice(faces)
            questions = (
                Question("codes", "what does it say?", code),
                Question("caption", "describe the picture.", f"text {code}"),
            )
            picture = line_picture(code, path, rng)
            examples.append(Example(name, (picture,), f"text {code}", questions, held, path.stem))
    return examples
