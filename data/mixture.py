"""Mixtures: which files a path stands for, and how often each dataset is drawn.

What it teaches: a mixture file is written by hand, so every value in it is checked once, here,
against the type of its field, and a mistake is a sentence with file, dataset, key and value. And it
often comes with the data, from somebody else: then it is data itself, and must not decide which
files of this machine are opened.

    --data path --datasets_of--> [Dataset, ...] --files--> shards (read by containers.py)

    my.jsonl   shards/   "shards/*.tar"      one dataset

    mix.json   {"datasets": {"ocr":  {"data": "ocr/*.tar", "weight": 2.0, "max_tiles": 12},
                             "chat": {"data": "chat.jsonl", "images": "photos", "cap": 0.5}}}

    meta.json  {"ocr": {"root": "photos", "annotation": "ocr.jsonl", "repeat_time": 0.5}}
               InternVL's form: a repeat_time below 1 is a share, above it a weight

A folder stands for all shards in it and below it. What lies there and is neither a shard nor a
picture is named as a fault.
"""

import dataclasses
import glob
import json
import math
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from data.container_base import (
    decode_text,
    first_sign,
    is_noise,
    is_picture,
    text_start,
    unreadable,
)
from data.containers import SPANS
from data.remote import files_in_store, is_remote, store_address
from data.sample import MAX_FRAMES, BadSample

MAX_META = 1 << 24  # bytes of a mixture file: a larger one is data
MAX_NUMBER = 1e9  # of any value in it

# what may lie beside shards without being meant as one
BESIDE = (".md", ".rst", ".pdf", ".log", ".lock", ".py", ".sh", ".yaml", ".yml", ".toml", ".sha256")
MOVIES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


@dataclass(frozen=True)
class Dataset:
    """One entry of a mixture.

    data: a file, a folder of shards, or a pattern. images: the folder where its image paths start
    ("": beside the file). weight: how often it is drawn (null: by its size, times `repeat`).
    epochs: how often it may be read (0: without end). cap: at most so many of its records, a share
    of them when below 1 (null: all), evenly spaced. max_tiles: for all images of a sample together
    (0: as the model). min_rating: FineVision's turns below it are left out. max_frames, frames: of
    a video, and how they are chosen: random or even.
    """

    data: str
    images: str = ""
    weight: float | None = None
    epochs: float = 0.0
    cap: float | None = None
    repeat: float = 1.0
    task: str = ""
    max_tiles: int = 0
    min_rating: int = 0
    max_frames: int = MAX_FRAMES
    frames: str = "random"

    def root(self, file: Path) -> Path:
        """Where the image paths of one of its files start."""
        return Path(self.images) if self.images else file.parent


@dataclass(frozen=True)
class Meta:
    """One entry of InternVL's meta JSON. repeat_time: below 1 it is a share. length and
    data_augment are not used."""

    annotation: str
    root: str = ""
    repeat_time: float = 1.0
    max_dynamic_patch: int = 0
    length: int | None = None
    data_augment: bool | None = None

    def as_dataset(self) -> dict:
        share = self.repeat_time < 1
        return {
            "data": self.annotation,
            "images": self.root,
            "max_tiles": self.max_dynamic_patch,
            "cap": self.repeat_time if share else None,
            "repeat": 1.0 if share else self.repeat_time,
        }


# ---------------------------------------------------------------------------------- reading


def datasets_of(path: Path, images=None, allow_outside: bool = False) -> list[Dataset]:
    """The datasets that a path stands for: those of a mixture file or an InternVL meta JSON, else
    the path itself.

    A mixture file's own paths must stay inside its folder, links followed, unless `allow_outside`.
    Raises ValueError.
    """
    entries = entries_of(path) if path.suffix.lower() == ".json" and path.is_file() else None
    if entries is None:
        return [Dataset(str(path), str(images or ""))]

    # a mixture: each entry by its name
    datasets = []
    for name, entry in entries.items():
        where = f"{path}: dataset {name!r}"
        values = entry.as_dataset() if isinstance(entry, Meta) else dataclasses.asdict(entry)
        # its paths start beside the mixture file, and stay there
        for key in ("data", "images"):
            if values[key]:
                if not is_remote(values[key]):
                    values[key] = str(path.parent / values[key])
                if not allow_outside:
                    check_inside(values[key], path.parent, f'{where}: "{key}"')
        # its shards as well: a pattern or a link may lead out
        dataset = Dataset(**values)
        try:
            files = files_of(dataset)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        except OSError as error:  # a name longer than the system takes, a folder that is closed
            raise ValueError(f'{where}: "data" cannot be read: {error.strerror}') from error
        if not allow_outside:
            for file in files:
                check_inside(str(file), path.parent, f'{where}: "data"')
        datasets.append(dataset)
    return datasets


def entries_of(path: Path) -> dict[str, Dataset | Meta] | None:
    """The entries of a mixture file by name, None when the file is something else. Raises
    ValueError for wrong ones."""
    if path.stat().st_size > MAX_META or unreadable(path):
        return None
    with open(path, "rb") as file:
        if first_sign(file, text_start(path)) != b"{":
            return None

    # JSON keeps the last of two equal keys without a word
    repeated: list[str] = []

    def note_repeated(pairs: list[tuple]) -> dict:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in entry if names.count(name) > 1)
        return entry

    try:
        meta = json.loads(decode_text(path.read_bytes()), object_pairs_hook=note_repeated)
    except (ValueError, RecursionError):
        return None  # lines, or no JSON at all: the container says more
    if not isinstance(meta, dict):
        return None

    # ours, InternVL's, or data
    kind = Dataset
    named = meta.get("datasets")
    if "datasets" not in meta:
        kind = Meta
        named = meta
        if not any(isinstance(entry, dict) and "annotation" in entry for entry in meta.values()):
            return None

    # from here on it is a mixture file, and what is wrong in it is said
    if repeated:
        raise ValueError(f"{path}: {repeated[0]!r} is there twice; only one of them would count")
    if not isinstance(named, dict) or not named:
        raise ValueError(
            f'{path}: "datasets" is {brief_json(named)}, wanted an object of name: {{...}}'
        )
    return {
        name: checked_entry(kind, entry, f"{path}: dataset {name!r}")
        for name, entry in named.items()
    }


def checked_entry(kind: type, entry, where: str):
    """An instance of a dataclass from a JSON object. Raises ValueError for a key that is unknown or
    missing, and for a value that is not of its field's type, negative, or absurd."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {brief_json(entry)}, wanted an object")

    # its keys
    hints = typing.get_type_hints(kind)
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    wrong = [key for key in entry if key not in hints] + [
        key for key in required if key not in entry
    ]
    if wrong:
        raise ValueError(
            f"{where}: {wrong[0]!r} is unknown or missing; keys are {', '.join(sorted(hints))}"
        )

    # its values
    values = {}
    for key, value in entry.items():
        problem = problem_with(value, hints[key])
        if problem:
            raise ValueError(f"{where}: {key!r} is {brief_json(value)}, wanted {problem}")
        values[key] = value

    # words that mean something
    if values.get("frames", "even") not in ("even", "random"):
        raise ValueError(f"{where}: 'frames' is {values['frames']!r}, wanted random or even")
    if values.get("max_frames") == 0:
        raise ValueError(f"{where}: 'max_frames' is 0, wanted 1 or more")
    return kind(**values)


def problem_with(value, hint) -> str:
    """What is wanted instead of a value, "" when it fits."""
    if isinstance(hint, types.UnionType):
        hint, _ = typing.get_args(hint)
        if value is None:
            return ""

    # true is an int to Python, and no number to a person
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return "" if isinstance(value, str) and "\0" not in value else "a text"
    if hint is bool:
        return "" if isinstance(value, bool) else "true or false"
    if hint is int and not (number and isinstance(value, int) and 0 <= value <= MAX_NUMBER):
        return "a whole number that is not negative"
    if hint is float and not (number and 0 <= value <= MAX_NUMBER and math.isfinite(value)):
        return "a number that is not negative"
    return ""


def brief_json(value) -> str:
    """A value as the user wrote it, cut short."""
    kinds = {str: "a text", bool: "a truth value", list: "a list", dict: "an object"}
    try:
        text = json.dumps(value, ensure_ascii=False)[:80]
    except (ValueError, RecursionError):
        text = "..."
    kind = kinds.get(type(value))
    return f"{text} ({kind})" if kind else text


def check_inside(path: str, folder: Path, where: str) -> None:
    """Raises ValueError for a path that leads out of the folder: by `..`, by being absolute, or
    through a link."""
    fixed = Path(os.path.normpath(path))
    while glob.has_magic(str(fixed)):  # of a pattern, the part before its first sign
        fixed = fixed.parent
    try:
        inside = not is_remote(path) and fixed.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        inside = False
    if not inside:
        raise ValueError(
            f"{where} leads out of the mixture file's folder: {path}; --allow-outside opens such files"
        )


# ---------------------------------------------------------------------------------- files


def files_of(dataset: Dataset) -> list[Path]:
    """The shards of a dataset, sorted. Raises ValueError when there is none."""
    # a folder, a file or a pattern, here or in a store
    path = Path(dataset.data)
    if is_remote(dataset.images):
        raise ValueError(f"--images {dataset.images}: pictures that are files must lie here")
    if is_remote(path):
        found = files_in_store(store_address(path))
        found = [file for file in found if is_shard(file) and not is_noise(file.name)]
    elif path.is_dir():
        found = [file for file in files_below(path) if is_shard(file)]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(file) for file in glob.glob(dataset.data, recursive=True)]
        found = [file for file in found if file.is_file() and not is_noise(file.name)]

    # what is asked for by name must be readable
    strange = [file for file in found if not is_shard(file)]
    if strange:
        raise ValueError(f"--data {dataset.data}: {strange[0]}: {why_unread(strange[0])}")
    if not found:
        message = (
            f"--data {dataset.data}: no such file, folder or pattern of {', '.join(SPANS)} files"
        )
        unread = next(unread_files(dataset), None)
        raise ValueError(f"{message}; {unread}" if unread else message)
    return sorted(found)


def unread_files(dataset: Dataset) -> Iterator[BadSample]:
    """What lies in the dataset's folder and is not read, so that nothing is left out without a word."""
    path = Path(dataset.data)
    if not path.is_dir():
        return
    for file in sorted(files_below(path)):
        known = is_shard(file) or is_picture(file.name) or file.suffix.lower() in BESIDE + MOVIES
        if not known and file.suffix:
            yield BadSample("unread file", f"{file}: {why_unread(file)}")


def why_unread(file: Path) -> str:
    try:
        problem = unreadable(file)
    except OSError as error:
        problem = str(error)
    return problem or f"none of {', '.join(SPANS)}"


def is_shard(file: Path) -> bool:
    return file.suffix.lower() in SPANS


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and below it, without hidden ones; links to folders are followed, each
    folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # a link may lead back to where we have been
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        for name in names:
            if not is_noise(name):
                yield Path(place, name)
