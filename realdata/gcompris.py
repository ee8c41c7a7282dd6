"""GCompris: photographs of animals, monuments and music, with what a teacher would say about them.

What it teaches: a container that nobody uses for data is still only a table of names and places. An
activity of this program for children is one file of Qt's resource format (.rcc), which is read here.

    "qres"  version, places of tree, data, names
    tree    entries of 14 bytes (22 from version 2): name, flags, and where its bytes or its children lie
    data    a length and bytes, as they are or packed by zlib

    explore_monuments.rcc --> eiffelTower.webp, board3.qml: "title", "text" --> travel & places

From Debian's gcompris-qt-data (GPL-3+; photographs public domain, CC0, CC-BY-SA). Held out by title. A text
is only ever read (`words`): nobody could say it of a photograph that they never saw.

Simplified: entries packed by zstd are left out (none of these is).
"""

import io
import random
import re
import struct
import zlib
from pathlib import Path

from PIL import Image

from realdata.emoji import moved
from realdata.example import SIDE, Example, Question, on_test_side

FOLDER = Path("usr/share/gcompris-qt/rcc")
GROUP_OF_ACTIVITY = {
    "explore_farm_animals": "animals & nature",
    "explore_world_animals": "animals & nature",
    "explore_monuments": "travel & places",
    "explore_world_music": "activities",
}
# What a board says of a place: its title, its text, its photograph.
SAID = re.compile(
    r'"title": qsTr\("(?P<title>[^"]+)"\),\s*"text": qsTr\("(?P<text>[^"]+)"\),.*?'
    r'"image2": "qrc:/(?P<file>[^"]+)"',
    re.DOTALL,
)
DIRECTORY, ZLIB, ZSTD = 2, 1, 4  # flags of an entry
COPIES = 3  # of a training photograph


def files_in(resource: bytes) -> dict[str, bytes]:
    """All files of a Qt resource: path -> content. Raises ValueError for other bytes."""
    if resource[:4] != b"qres":
        raise ValueError("not a Qt resource: it does not begin with qres")
    version, tree, data, names = struct.unpack_from(">4I", resource, 4)
    entry_size = 14 if version == 1 else 22

    # Directories name their children's first entry and number; the root is entry 0, without a name
    found = {}
    waiting = [(0, "")]
    while waiting:
        entry, above = waiting.pop()
        place = tree + entry * entry_size
        name_at, flags, first, second = struct.unpack_from(">IHII", resource, place)
        path = f"{above}/{name_in_resource(resource, names + name_at)}" if entry else ""
        if flags & DIRECTORY:
            waiting += [(second + child, path) for child in range(first)]
            continue

        # A length, and the bytes; packed ones say their own size first
        (start,) = struct.unpack_from(">I", resource, place + 10)
        (length,) = struct.unpack_from(">I", resource, data + start)
        content = resource[data + start + 4 :][:length]
        if flags & ZLIB:
            content = zlib.decompress(content[4:])
        if not flags & ZSTD:
            found[path.strip("/")] = content
    return found


def name_in_resource(resource: bytes, place: int) -> str:
    """A length in characters, a hash, and UTF-16."""
    (length,) = struct.unpack_from(">H", resource, place)
    return resource[place + 6 :][: 2 * length].decode("utf-16-be")


def told_photographs(files: dict[str, bytes]) -> list[tuple[str, str, Image.Image]]:
    """(title, text, photograph), in the order of the boards."""
    told = []
    for path, content in sorted(files.items()):
        if "/board/" in path and path.endswith(".qml"):
            for said in SAID.finditer(content.decode("utf-8")):
                if said["file"] in files:
                    photograph = Image.open(io.BytesIO(files[said["file"]])).convert("RGB")
                    told.append((said["title"], said["text"], photograph))
    return told


def in_a_square(photograph: Image.Image) -> Image.Image:
    """Its middle, at the toy's size."""
    side = min(photograph.size)
    left = (photograph.width - side) // 2
    top = (photograph.height - side) // 2
    middle = photograph.crop((left, top, left + side, top + side))
    return middle.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def photograph_examples(debian: Path | None, seed: int) -> list[Example]:
    """What kind of thing each shows; none without the package."""
    examples = []
    for activity, group in GROUP_OF_ACTIVITY.items():
        path = (debian or Path()) / FOLDER / f"{activity}.rcc"
        told = told_photographs(files_in(path.read_bytes())) if debian and path.is_file() else []
        for number, (title, text, photograph) in enumerate(told):
            test = on_test_side(title, 4)
            small = in_a_square(photograph)
            questions = (
                Question("kind", "what kind of thing is it?", group),
                Question("caption", "describe the picture.", group, visible=True),
            )
            for copy in range(1 if test else COPIES):
                name = f"photograph-{'test' if test else 'train'}-{activity}-{number}-{copy}"
                picture = moved(small, random.Random(f"{seed}/{name}"))
                words = "" if test else f"{title}. {text.split('. ')[0]}"
                source = "GCompris (GPL-3, photographs CC)"
                examples.append(Example(name, (picture,), words, questions, test, source))
    return examples
