"""TSV: rows as Python's csv module reads them, and the pictures of VLMEvalKit's tables.

What it teaches: a quote is a quote only where a cell begins; anywhere else it is an inch. Counting
quotes instead loses every row between two of them, without a word.

    question    answer            header: the names of the fields
    5" tall?    yes               a quote inside a cell is a character
    "a          no                a cell that begins with one may hold line ends, and "" for one quote
    b"

    image: base64 | a path | a list of them | the `index` of the row that has it

Simplified: the picture that a row borrows is looked up in an index of the whole table, built when
first needed.
"""

import base64
import csv
import io
import re
from functools import lru_cache
from pathlib import Path
from typing import Iterator

from data.container_base import (
    MAX_BYTES,
    Span,
    decode_text,
    is_picture,
    stamp_of,
    text_start,
)
from data.sample import BadSample

# ------------------------------------------------------------------------------------ rows


def table_spans(path: Path) -> Iterator[Span | BadSample]:
    """Rows after the header. Raises ValueError when the header cannot be read."""
    rows = tsv_rows(path)
    header = next(rows, None)
    if isinstance(header, BadSample):
        raise ValueError(f"{path}: its first line is no header: {header}")
    return rows


def tsv_rows(path: Path) -> Iterator[Span | BadSample]:
    """The rows that `csv.reader(delimiter="\\t")` gives, the header with number 0: a quote opens a
    cell only at its beginning, and a quoted cell may hold line ends. Blank lines are no rows."""
    first = text_start(path)  # of the row
    end = first
    number = 0  # of the row
    lines = 0  # that it takes so far
    quoted = False  # whether the last of them ended inside a quoted cell
    with open(path, encoding="latin-1", newline="") as file:  # a character is a byte
        file.seek(first)
        while line := file.readline(MAX_BYTES + 1):
            end += len(line)
            lines += 1
            if len(line) > MAX_BYTES:
                # Too long to be held: walk to its end in pieces, and begin anew.
                while line and not line.endswith(("\r", "\n")):
                    line = file.readline(1 << 20)
                    end += len(line)
                yield BadSample("oversized record", f"{path.name}:{number}: over {MAX_BYTES} bytes")
                quoted = False
                number += 1
            else:
                # A row ends with its line, unless a quoted cell goes on.
                quoted = ends_quoted(line, quoted)
                if quoted:
                    continue
                if lines > 1 or line.strip("\r\n"):
                    yield first, end, number
                    number += 1
            first = end
            lines = 0

    # The last quote was never closed. csv makes a row of a single line; many lines are no row.
    if quoted and lines == 1:
        yield first, end, number
    elif quoted:
        yield BadSample(
            "malformed record",
            f"{path.name}:{number}: a quote that is never closed takes in the last {lines} lines; "
            'inside a cell that begins with a quote, write each quote twice ("")',
        )


# up to the quote that closes a cell: two of them are one of its characters
QUOTED = re.compile(r'[^"]*(?:""[^"]*)*')


def ends_quoted(line: str, quoted: bool) -> bool:
    """Whether the end of the line is inside a quoted cell, given whether its beginning is."""
    at = 0  # the beginning of a cell
    while at < len(line):
        # a quoted cell: to its closing quote, which may be in another line
        if quoted or line[at] == '"':
            at = QUOTED.match(line, at if quoted else at + 1).end()
            if at == len(line):
                return True
            quoted = False

        # what follows up to the tab belongs to the cell, quotes included
        tab = line.find("\t", at)
        if tab < 0:
            return False
        at = tab + 1
    return False


def cells_of(raw: bytes) -> list[str]:
    """The cells of one row."""
    # csv has a limit of its own for a cell, the same for the whole process
    if csv.field_size_limit() < MAX_BYTES:
        csv.field_size_limit(MAX_BYTES)
    (cells,) = csv.reader(io.StringIO(decode_text(raw), newline=""), delimiter="\t")
    return cells


@lru_cache(16)
def header_of(path: Path, stamp: tuple) -> list[str]:
    first, last, _ = next(tsv_rows(path))
    with open(path, "rb") as file:
        file.seek(first)
        return cells_of(file.read(last - first))


# ------------------------------------------------------------------------------------ fields


def table_fields(path: Path, raw: bytes) -> dict:
    """A row by its header; cells that are left out at its end are empty. Instead of `image` it has
    `images`: bytes, and paths as they are written. Raises ValueError."""
    row = cells_by_name(path, raw)
    pictures = listed_cell(row.pop("image", "")) or listed_cell(row.get("image_path", ""))
    row["images"] = [table_picture(path, picture) for picture in pictures]
    return row


def cells_by_name(path: Path, raw: bytes) -> dict[str, str]:
    names = header_of(path, stamp_of(path))
    cells = cells_of(raw)
    missing = len(names) - len(cells)
    if missing < 0:
        raise ValueError(f"{len(cells)} cells where the header has {len(names)}")
    return dict(zip(names, cells + [""] * missing))


# 'text' or "text", and what separates it from the next
LIST_ITEM = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)")\s*(?:,|$)""")


def listed_cell(cell: str) -> list[str]:
    """A cell that may be a list as Python or JSON writes it: ['a', 'b']. Raises ValueError for one
    that is neither."""
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell] if cell else []
    # item by item: nothing is evaluated
    items = []
    body = cell[1:-1]
    at = 0
    while at < len(body):
        item = LIST_ITEM.match(body, at)
        if not item:
            raise ValueError("a list of images that cannot be read")
        items.append(item[1] if item[1] is not None else item[2])
        at = item.end()
    return items


def table_picture(path: Path, text: str, hops: int = 8) -> bytes | str:
    """A picture as VLMEvalKit's tables give it: base64, a path, or the index of the row that has it
    (circular evaluation asks about one picture several times, and stores it once). Raises
    ValueError."""
    if text.startswith(("data:", "http:", "https:")) or is_picture(text):
        return text
    if len(text) > 64:  # VLMEvalKit's rule: what is shorter is an index
        return base64.b64decode("".join(text.split()), validate=True)

    # the picture of another row, which may itself be borrowed
    place = table_index(path, stamp_of(path)).get(text)
    if place is None or hops == 0:
        raise ValueError(f"image {text!r} is neither base64, nor a path, nor the index of a row")
    with open(path, "rb") as file:
        file.seek(place[0])
        row = cells_by_name(path, file.read(place[1] - place[0]))
    (picture,) = listed_cell(row["image"])
    return table_picture(path, picture, hops - 1)


@lru_cache(4)
def table_index(path: Path, stamp: tuple) -> dict[str, tuple[int, int]]:
    """The place of each row by its `index`."""
    places: dict[str, tuple[int, int]] = {}
    with open(path, "rb") as file:
        for span in table_spans(path):
            if isinstance(span, BadSample):
                continue
            first, last, _ = span
            file.seek(first)
            try:
                row = cells_by_name(path, file.read(last - first))
            except ValueError:
                continue  # counted where it is read itself
            places.setdefault(row.get("index", ""), (first, last))
    return places
