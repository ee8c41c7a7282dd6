"""Words in typefaces: people drew the letters, and chose the words.

What it teaches: reading is to see one letter in many shapes. Training has some families of type, grading
has others, and other words: what is read was in no picture, and looks like nothing that was.

    fonts of eight wheels (SIL OFL, Apache)  --three families held out--> 16 x 16 pixels a letter, in a line
    words of the published names of emoji  --one in five held out  -->  3 or 4 letters: 48 or 64 x 16

A line of four letters is four tiles and the whole line once more, small (data/tiling.py).
Ours: a letter stands in the middle of its cell, so a tile holds one.
"""

import functools
import random
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from realdata.example import CELL, Example, Question, empty_paper, on_test_side, package_folder

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


def line_picture(word: str, path: Path, rng: random.Random) -> Image.Image:
    """A word, each letter about the middle of its cell."""
    picture = empty_paper(rng, CELL * len(word), CELL)
    pen = ImageDraw.Draw(picture)
    face = face_at(path, rng.randint(14, 17))
    ink = rng.choice(INKS)
    for place, letter in enumerate(word):
        x = CELL * place + CELL // 2 + rng.randint(-1, 1)
        pen.text((x, 12 + rng.randint(-1, 1)), letter, fill=ink, font=face, anchor="ms")
    return picture


def short_words(names: list[str], test: bool) -> list[str]:
    """Words of three and four letters in these names, of one side."""
    words = {word for name in names for word in re.findall(r"[a-z]+", name.lower())}
    return sorted(w for w in words if 3 <= len(w) <= 4 and on_test_side(w) == test)


def word_examples(names: list[str], train: int, test: int, seed: int) -> list[Example]:
    """Words of published names, in training typefaces and in held-out ones."""
    examples = []
    for held, count in ((False, train), (True, test)):
        words = short_words(names, held)
        faces = font_files(held)
        for i in range(count):
            name = f"word-{'test' if held else 'train'}-{i}"
            rng = random.Random(f"{seed}/{name}")
            word = rng.choice(words)
            path = rng.choice(faces)
            questions = (
                Question("words", "what does it say?", word),
                Question("caption", "describe the picture.", f"text {word}"),
            )
            picture = line_picture(word, path, rng)
            examples.append(Example(name, (picture,), f"text {word}", questions, held, path.stem))
    return examples
