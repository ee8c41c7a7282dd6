"""What all containers share: limits, encodings, and what a file's first bytes give away.

What it teaches: the size that a file claims is not a reason to allocate it, and its name is not a
reason to believe it. Every limit on a record stands here, and is checked before memory is taken.

    first bytes --unreadable--> "a Git LFS pointer", "compressed", "not UTF-8", ""
    bytes --decode_text--> text --strict_json--> values that somebody wrote

All limits are our choice.
"""

import json
import math
import re
from pathlib import Path
from typing import BinaryIO

from data.sample import BadSample

# first byte, byte after the last, and the record's number in its file, from 1
Span = tuple[int, int, int]

MAX_BYTES = 1 << 26  # of one record, its images included
MAX_VALUES = 1 << 20  # in one record: an empty JSON list takes twenty times its two bytes

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
LINES = (".jsonl", ".ndjson", ".jsonlines")
TEXT = (*LINES, ".json", ".tsv")

# the first bytes of gzip, xz, zstandard and zip
COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")

# What a record is told by: an object without any of these is something around records.
RECORD_FIELDS = ("conversations", "messages", "texts", "prompt", "question", "problem")


# ------------------------------------------------------------------------------------ the first bytes


def unreadable(path: Path) -> str:
    """Why a file cannot be what its name says, judged by its first bytes; "" when nothing speaks
    against it."""
    with open(path, "rb") as file:
        head = file.read(64)

    # what clones and downloads leave in the place of data
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the data: run `git lfs pull`"
    if head.startswith(COMPRESSED) or head[4:10] == b"1AY&SY":  # the latter is bzip2's
        return "compressed: unpack it first, nothing can be sought in it"

    # a mark of UTF-16, or the zeros that it puts between Latin letters
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 4
    if path.suffix.lower() in TEXT and wide:
        return "not UTF-8: convert it, for instance with `iconv -f UTF-16 -t UTF-8`"
    return ""


def text_start(path: Path) -> int:
    """The first byte after a byte order mark."""
    with open(path, "rb") as file:
        return 3 if file.read(3) == b"\xef\xbb\xbf" else 0


def first_sign(file: BinaryIO, start: int) -> bytes:
    """The first byte that is no white space, b"" when there is none."""
    file.seek(start)
    while block := file.read(1 << 16):
        rest = block.lstrip()
        if rest:
            return rest[:1]
    return b""


def stamp_of(path: Path) -> tuple[int, int]:
    """Changes when the file does: part of the key of what is kept of it."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


# ------------------------------------------------------------------------------------ names


def is_picture(name: str) -> bool:
    return name.lower().endswith(tuple("." + kind for kind in PICTURES))


def is_noise(name: str) -> bool:
    """Files that no sample is made of: hidden ones, what macOS and Windows leave behind,
    WebDataset's own notes, and names without a kind."""
    *folders, base = name.split("/")
    # macOS writes ._name beside name, and __MACOSX beside folders; no kind means no part of a sample
    if base.startswith(".") or "." not in base or "__MACOSX" in folders:
        return True
    return base in ("Thumbs.db", "desktop.ini") or re.match(r"__[^/]*__", base) is not None


# ------------------------------------------------------------------------------------ text and values


def decode_text(raw: bytes) -> str:
    """UTF-8, or what its byte order mark says. Raises ValueError for anything else."""
    code = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    return raw.decode(code).removeprefix("\ufeff")


def strict_json(text: str):
    """JSON without NaN and infinities, which would be numbers nobody wrote. Raises ValueError or
    RecursionError."""
    # every value stands after one of these signs, or is the first
    values = text.count(",") + text.count("[") + text.count("{")
    if values > MAX_VALUES:
        raise BadSample("oversized record", f"about {values} values; the limit is {MAX_VALUES}")
    return json.loads(text, parse_constant=refuse_number, parse_float=finite)


def refuse_number(digits: str):
    raise ValueError(f"{digits[:40]} is no JSON number")


def finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else refuse_number(digits)
