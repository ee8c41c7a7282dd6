"""JSON: lines, lists, and objects around lists, cut into records without parsing what is between.

What it teaches: to find where a value ends, brackets, quotes and backslashes are enough. So a list
of gigabytes is walked over in blocks, nothing of it is kept, and an item that is no JSON is met
when it is read: it costs itself.

    {"a": 1}\\n{"a": 2}\\n            lines               (first byte, byte after the last, number) of each
    [{"a": 1}, {"a": 2}]            items               (0, 8, 1) ...
    [...][...]   [...]\\n[...]       lists in a row      all their items
    {"data": [{"a": 1}, ...]}       one list inside     its items
    {\\n  "a": 1\\n}                 over several lines  each object

Which of these it is, the first bytes tell, not the name. A list that does not end raises ValueError
naming the file; everything else costs what is damaged.
"""

import io
import re
from pathlib import Path
from typing import BinaryIO, Iterator, NamedTuple

from data.container_base import (
    LINES,
    MAX_BYTES,
    RECORD_FIELDS,
    Span,
    decode_text,
    first_sign,
    strict_json,
    text_start,
)
from data.sample import BadSample


def json_spans(path: Path) -> Iterator[Span | BadSample]:
    """Lines, items of lists, or whole objects: by how the file begins. Raises ValueError for a list
    that does not end."""
    # look at the first sign, and at the first line where lines are to be expected
    start = text_start(path)
    with open(path, "rb") as file:
        begins = first_sign(file, start)
        file.seek(start)
        line = file.readline(MAX_BYTES) if path.suffix.lower() in LINES else b""
    # one list a line is read as lines: damage to one does not reach the next
    if begins == b"[" and not items_of_line(line):
        return value_spans(path, start)
    if begins == b"{":
        return object_spans(path, start)
    return line_spans(path, start)


# ------------------------------------------------------------------------------------ lines


def line_spans(path: Path, start: int) -> Iterator[Span | BadSample]:
    """A record for each line that is not blank; of a line that holds several, one for each of them."""
    with open(path, "rb") as file:
        for number, (first, last, line) in enumerate(bounded_lines(file, start), 1):
            if line is None:
                size = last - first
                yield BadSample("oversized record", f"{path.name}:{number}: a line of {size} bytes")
                continue
            # several records: a list, or two lines whose line end was lost when files were joined
            items = items_of_line(line)
            for a, b in items:
                yield first + a, first + b, number

            # or one; whether it is JSON is seen when it is read
            if not items and line.strip():
                yield first, last, number


def bounded_lines(file: BinaryIO, start: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(first byte, byte after the last, line) of each line from `start`; None for a line of over
    MAX_BYTES."""
    file.seek(start)
    while line := file.readline(MAX_BYTES + 1):
        end = start + len(line)
        whole = len(line) <= MAX_BYTES
        piece = line

        # Too long to be held: walk to its end in pieces.
        while not whole and piece and not piece.endswith(b"\n"):
            piece = file.readline(1 << 20)
            end += len(piece)
        yield start, end, line if whole else None
        start = end


JOINED = re.compile(rb"\}\s*\{")


def items_of_line(line: bytes) -> list[tuple[int, int]]:
    """Places of the items of a line that is a JSON list, or several objects; none when it is
    anything else."""
    if not line.lstrip().startswith(b"[") and not JOINED.search(line):
        return []
    items = list(values_in(io.BytesIO(line), 0))
    whole = all(item is not None and item[1] is not None for item in items)
    return items if whole else []


# ------------------------------------------------------------------------------------ lists and objects


def value_spans(path: Path, start: int, alone: bool = False) -> Iterator[Span | BadSample]:
    """A record for each item of the lists and each object from `start`; with `alone` of the first
    of them only."""
    number = 0
    with open(path, "rb") as file:
        for place in values_in(file, start, alone):
            number += 1
            if place is None:
                yield BadSample(
                    "malformed record", f"{path.name}:{number}: text between JSON values"
                )
            elif place[1] is None:
                raise ValueError(f"{path}: not a JSON list (it does not end)")
            else:
                yield *place, number


def values_in(file: BinaryIO, start: int, alone: bool = False) -> Iterator[tuple | None]:
    """(first byte, byte after the last) of each item of the lists, and of each object, that follow
    one another in a file.

    None stands for text between them that is no JSON; (first, None) for a list or object that does not end.
    """
    end = start  # of the last value
    first = start  # of the item that is being walked over
    opened = ""  # the sign that opened the value in which we are
    filled = False  # whether the item holds more than white space, as far as we know
    for place, sign, depth in structure(file, start):
        if depth == 0 and not opened and sign in "[{":
            # A value begins.
            if not blank(file, end, place):
                yield None
            opened = sign
            first = place + (sign == "[")
            filled = False
        elif depth == 0 and opened and sign in "]}":
            # It ends, and its last item with it.
            if opened == "{":
                yield first, place + 1
            elif filled or not blank(file, first, place):
                yield first, place
            opened = ""
            end = place + 1
            if alone:
                return
        elif opened == "[" and depth == 1 and sign == ",":
            # An item of a list ends. Scalars leave no sign of themselves: look at the bytes.
            if filled or not blank(file, first, place):
                yield first, place
            first = place + 1
            filled = False
        elif opened:
            filled = True

    # What is left when the file ends.
    if opened:
        yield first, None
    elif not blank(file, end, file.seek(0, io.SEEK_END)):
        yield None


def blank(file: BinaryIO, first: int, last: int) -> bool:
    """Whether there is nothing but white space and commas; a stretch of over 64 KiB is something."""
    if last - first > 1 << 16:
        return False
    file.seek(first)
    return not file.read(last - first).strip(b" \t\r\n,")


BLOCK = 1 << 20  # bytes that are held at a time

# How far nothing happens: at depth 0 and 1, deeper (whole strings are nothing there), in a string.
SHALLOW = re.compile(rb'[^"\[\]{},]*')
DEEP = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def structure(file: BinaryIO, start: int) -> Iterator[tuple[int, str, int]]:
    """(place, sign, depth) of brackets, commas and opening quotes outside of strings, as far as
    they lie at depth 0 or 1.

    The depth is that outside of a bracket: [{"a": [1]}, 2] gives [ 0, { 1, } 1, "," 1, ] 0. Nothing
    is decoded, and only a block of the file is held.
    """
    depth = 0
    inside = False  # a string
    escaped = False  # a block ended with a backslash
    while True:
        # the caller may have sought elsewhere in the meantime
        file.seek(start)
        block = file.read(BLOCK)
        if not block:
            return
        at = int(escaped)
        escaped = False
        while at < len(block):
            # to the end of a string, or of the block if that comes first
            if inside:
                at = STRING.match(block, at).end()
                escaped = block[at : at + 1] == b"\\"
                inside = escaped or at == len(block)
                at += 1
                continue

            # to the next sign
            quiet = SHALLOW if depth <= 1 else DEEP
            at = quiet.match(block, at).end()
            if at == len(block):
                break
            sign = chr(block[at])
            inside = sign == '"'

            # a bracket belongs to the depth outside of it
            if sign in "]}":
                depth = max(0, depth - 1)
            if depth <= 1:
                yield start + at, sign, depth
            if sign in "[{":
                depth += 1
            at += 1
        start += len(block)


# ------------------------------------------------------------------------------------ an object first


class Leading(NamedTuple):
    """The first object of a file: the byte after its end, its keys, and where its lists of objects
    begin."""

    end: int
    keys: list[str]
    lists: dict[str, int]


def object_spans(path: Path, start: int) -> Iterator[Span | BadSample]:
    """JSON lines, objects written over several lines each, or one object around a list of records.

    Raises ValueError for an object around several lists: which one is meant, only its owner knows.
    """
    with open(path, "rb") as file:
        leading = leading_object(file, start)
        if leading is None:
            return line_spans(path, start)
        alone = first_sign(file, leading.end) == b""
        file.seek(start)
        in_one_line = start + len(file.readline(MAX_BYTES)) >= leading.end
        file.seek(start)
        parses = in_one_line or is_json(file.read(min(leading.end - start, MAX_BYTES + 1)))
    is_record = any(key in RECORD_FIELDS for key in leading.keys)

    # An object around lists.
    if alone and leading.lists and not is_record:
        if len(leading.lists) > 1:
            names = ", ".join(sorted(leading.lists))[:200]
            raise ValueError(
                f"{path}: an object around several lists ({names}): "
                "write the one that is meant to a file of its own"
            )
        return value_spans(path, *leading.lists.values(), alone=True)
    # Objects over several lines; or lines, when the first is broken and found its end in another.
    if parses and not in_one_line:
        return value_spans(path, start)
    return line_spans(path, start)


def is_json(raw: bytes) -> bool:
    try:
        strict_json(decode_text(raw))
    except (ValueError, RecursionError):
        return False
    return True


def leading_object(file: BinaryIO, start: int) -> Leading | None:
    """The first object of a file; None when it does not end: then these are lines, and the first is
    broken."""
    key = ""
    keys = []
    lists = {}
    for place, sign, depth in structure(file, start):
        if depth == 0 and sign in "]}":
            return Leading(place + 1, keys, lists)
        # a string at this depth is a key, or the value of one
        if depth == 1 and sign == '"':
            key = key_at(file, place) or key
            keys.append(key)
        if depth == 1 and sign == "[" and first_sign(file, place + 1) == b"{":
            lists[key] = place
        if len(keys) > 1000:
            break
    return None


def key_at(file: BinaryIO, place: int) -> str:
    """The key whose opening quote is at `place`, "" when a value is there."""
    file.seek(place)
    found = re.match(rb'"((?:[^"\\]|\\.){0,200})"\s*:', file.read(1000), re.DOTALL)
    return found.group(1).decode("utf-8", "replace") if found else ""
