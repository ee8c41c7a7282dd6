"""A line that a person typed: a command, or words and the pictures that stand among them.

What it teaches: nobody types a path as a program would. Terminals paste what is dragged onto them between
quotes, with backslashes before spaces, or as file:// addresses; people put it in the middle of a sentence,
with a full stop behind it. So a line is read word by word, and a word is a picture when it is there, or has
a picture's ending.

    what is in '/tmp/my cat.png'?            words: what is in?        pictures: /tmp/my cat.png
    /tmp/my\\ cat.png file:///tmp/dog.png which is larger?    words: which is larger?    two pictures
    frames/ which way does it move?          a folder is a video, and so is a GIF that moves
    /think on                                a command: its name, and what follows it
"""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from data.images import SUFFIXES, frames_of
from data.sample import Video

# "in quotes", 'in quotes', or anything up to a space that no backslash hides
WORD = re.compile(r"""(?:"[^"]+"|'[^']+')(?=[\s.,;:!?)]|$)|(?:\\.|\S)+""", re.DOTALL)
MARKS = ".,;:!?)"  # what may stand behind a name in a sentence


def split_command(line: str) -> tuple[str, str]:
    """`/think on` -> ("think", "on"); ("", the line) when it begins with a word or a path."""
    name, _, rest = line.strip().partition(" ")
    if re.fullmatch(r"/[a-z]+", name) and not os.path.exists(name):
        return name[1:], rest.strip()
    return "", line.strip()


def split_pictures(line: str) -> tuple[list[Path], str]:
    """The pictures that a line names, in order, and the words that are left.

    Raises ValueError for an address in the web.
    """
    whole = whole_path(line)
    if whole is not None:
        return [whole], ""

    paths = []
    words: list[str] = []
    for match in WORD.finditer(line):
        word = match[0]
        bare = word.rstrip(MARKS)
        path = picture_path(word) or picture_path(bare)
        if path is None:
            words.append(word)
            continue
        paths.append(path)

        # the mark behind a picture's name ends the sentence before it
        mark = "" if picture_path(word) else word[len(bare) :]
        if mark and words:
            words[-1] += mark
    return paths, " ".join(words) if paths else line.strip()


def listed_paths(line: str) -> list[Path]:
    """Every word of a line as a path, where nothing but paths is expected. Raises ValueError as above."""
    whole = whole_path(line)
    if whole is not None:
        return [whole]
    words = [match[0] for match in WORD.finditer(line)]
    return [picture_path(word) or Path(spellings(unquoted(word)[0])[-1]) for word in words]


def whole_path(line: str) -> Path | None:
    """The picture that a line is the path of: with spaces, without quotes, and nothing else."""
    path = os.path.expanduser(line.strip())
    return Path(path) if path.lower().endswith(SUFFIXES) and os.path.isfile(path) else None


def picture_path(word: str) -> Path | None:
    """The path that a word stands for, None when it is only a word. Raises ValueError as above."""
    text, quoted = unquoted(word)
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    if re.match(r"https?://", text) and urlsplit(text).path.lower().endswith(SUFFIXES):
        raise ValueError(f"{text}: only files are read here; download it, and give its path")
    if not re.search(r"\w", text):
        return None
    for spelling in spellings(text):
        if names_picture(spelling, quoted):
            return Path(spelling)

    # not there, though it is called like one: the error will name it
    wanted = Path(spellings(text)[-1])
    return wanted if wanted.suffix.lower() in SUFFIXES else None


def unquoted(word: str) -> tuple[str, bool]:
    """A word without its quotes, and whether it had some."""
    quoted = len(word) > 2 and word[0] in "\"'" and word[-1] == word[0]
    return (word[1:-1] if quoted else word), quoted


def spellings(text: str) -> list[str]:
    """A path as it stands, and without the backslashes that a terminal has put before spaces."""
    without = re.sub(r"\\(.)", r"\1", text)
    return [os.path.expanduser(text), os.path.expanduser(without)]


def names_picture(path: str, quoted: bool) -> bool:
    """Whether a file or a folder is meant: "data" in a sentence is a word, "./data" is not."""
    named = quoted or "/" in path or os.sep in path
    if os.path.isfile(path):
        return named or path.lower().endswith(SUFFIXES)
    return named and os.path.isdir(path)


def read_picture(path: Path, most: int) -> Image.Image | Video:
    """A still picture, or of a folder or an animation at most so many frames, read now.

    Raises BadSample for one that is missing, damaged or too large.
    """
    frames = frames_of(Video(path, most, "even"), None, "picture")
    if len(frames) == 1 and not path.is_dir():
        return frames[0]
    return Video(tuple(frames), most, "even")


def told(picture: Image.Image | Video) -> str:
    """`picture 32 x 32`, or `video of 3 frames`."""
    if isinstance(picture, Video):
        return f"video of {len(picture.source)} frames"
    return f"picture {picture.width} x {picture.height}"
