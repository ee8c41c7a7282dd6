"""Tux Paint's stamps: photographs and drawings for children, filed by what they show (GPL-2, from Debian).

What it teaches: data that is only filed is labelled data. A folder's name is a class that somebody chose by
looking; 77 languages of captions stand beside each picture.

    usr/share/tuxpaint/stamps/animals/birds/owl.png  A great horned owl.  --> animals & nature

Folders are told by the emoji's groups that hold them (our choice), so photographs and drawings are asked
the same question. Held out by caption: a stamp and its cartoon, or its mirror image, stand on one
side. Held-out captions are never said.
"""

import random
from pathlib import Path

from PIL import Image

from data.images import open_image
from realdata.emoji import moved
from realdata.example import SIDE, Example, Question, on_test_side

STAMPS = Path("usr/share/tuxpaint/stamps")
GROUP_OF_FOLDER = {
    "animals": "animals & nature",
    "plants": "animals & nature",
    "food": "food & drink",
    "town": "travel & places",
    "vehicles": "travel & places",
    "household": "objects",
    "clothes": "objects",
}
COPIES = 3  # of a training stamp: shifted, and one in two in the mirror


def stamp_files(root: Path) -> list[tuple[Path, str, str]]:
    """(picture, caption, group) of those that have a caption and a group, in the order of their paths."""
    found = []
    for path in sorted((root / STAMPS).rglob("*.png")):
        folder = path.relative_to(root / STAMPS).parts[0]
        text = path.with_suffix(".txt")
        if folder in GROUP_OF_FOLDER and text.is_file():
            # The first line is English, the others name their language
            caption = text.read_text(encoding="utf-8", errors="replace").split("\n")[0]
            found.append((path, caption.strip().rstrip(".").lower(), GROUP_OF_FOLDER[folder]))
    return found


def on_paper(path: Path) -> Image.Image:
    """A stamp on a white square of the toy's size, its longer side as long as that."""
    stamp = open_image(path)
    stamp.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    paper = Image.new("RGB", (SIDE, SIDE), "white")
    paper.paste(stamp, ((SIDE - stamp.width) // 2, (SIDE - stamp.height) // 2))
    return paper


def stamp_examples(debian: Path | None, seed: int) -> list[Example]:
    """What kind of thing each shows; none without the package."""
    if debian is None:
        return []
    examples = []
    for number, (path, caption, group) in enumerate(stamp_files(debian)):
        test = on_test_side(caption.split()[-1:], 4)
        paper = on_paper(path)
        questions = (
            Question("kind", "what kind of thing is it?", group),
            Question("caption", "describe the picture.", group, visible=True),
        )
        for copy in range(1 if test else COPIES):
            name = f"stamp-{'test' if test else 'train'}-{number}-{copy}"
            rng = random.Random(f"{seed}/{name}")
            turned = paper
            if not test and rng.random() < 0.5:
                turned = paper.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            words = "" if test else caption
            examples.append(
                Example(name, (moved(turned, rng),), words, questions, test, "Tux Paint (GPL-2)")
            )
    return examples
