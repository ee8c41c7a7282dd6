"""Containers: where a record lies in a file, and that record's bytes as a dictionary of fields.

What it teaches: random access needs no database. One walk over a file finds the place of every
record, a *span* of three integers; from then on any process can fetch any record with one seek and
one read. The walk looks only at what separates records (line ends, quotes, brackets, headers), so
that damage inside a record is met when that record is read, and costs it alone.

    file --spans_of--> (first byte, byte after the last, number), BadSample, ... --fields_of--> {"image": ..., "answer": ...}

    .jsonl .ndjson    a line; a line that is a list is as many records as it has items
    .json             an item of a list (or of several, one after the other); an object; the one list inside an object
    .tsv              a row, as Python's csv module reads it
    .tar              neighbouring files of one key (WebDataset's rule), by their kinds; __key__ is the key
    .parquet          a row: (row group, row in the group, number)

Damage that leaves other records readable is a BadSample in its place; a file that cannot be walked
over raises ValueError naming it. Limits hold before memory is allocated, whatever a file claims of
itself: our choice, all of them. Simplified: compressed files are not read (nothing can be sought in
them), and a row group of a parquet file is decoded whole.
"""

import base64
import csv
import io
import json
import math
import re
import tarfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, NamedTuple

from data.sample import BadSample

# first byte, byte after the last, and the record's number in its file, from 1
Span = tuple[int, int, int]

MAX_BYTES = 1 << 26  # of one record, its images included
MAX_VALUES = 1 << 20  # in one record: an empty JSON list takes twenty times its two bytes
MAX_GROUP = 1 << 30  # decoded bytes of a parquet row group, and of all that are kept
MAX_RATIO = 1024  # of decoded to stored bytes of a parquet file: more is a bomb
MAX_GARBAGE = 1 << 20  # broken blocks of a tar in which the next header is searched
MAX_HEADER = 1 << 20  # bytes of a tar's extended header

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
LINES = (".jsonl", ".ndjson", ".jsonlines")
TEXT = (*LINES, ".json", ".tsv")

# What a record is told by: an object without any of these is something around records.
RECORD_FIELDS = ("conversations", "messages", "texts", "prompt", "question", "problem")


# ---------------------------------------------------------------------------------- any file


def spans_of(path: Path) -> Iterator[Span | BadSample]:
    """The place of every record of a file, in order. Raises ValueError naming the file when it
    cannot be walked over."""
    problem = unreadable(path)
    if problem:
        yield BadSample("damaged file", f"{path}: {problem}")
        return
    try:
        yield from SPANS[path.suffix.lower()](path)
    except ValueError:
        raise
    except Exception as error:
        yield BadSample.because(error, "damaged file", str(path))


def unreadable(path: Path) -> str:
    """Why a file cannot be what its name says, judged by its first bytes; "" when nothing speaks
    against it."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the data: run `git lfs pull`"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        return "compressed: unpack it first, nothing can be sought in it"
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 4
    if path.suffix.lower() in TEXT and wide:
        return "not UTF-8: convert it, for instance with `iconv -f UTF-16 -t UTF-8`"
    return ""


def fields_of(path: Path, first: int, last: int) -> dict:
    """The record at a span, as a dictionary. Raises BadSample or what a decoder raises when it
    cannot be read."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return parquet_fields(path, first, last)
    if last - first > MAX_BYTES:
        raise BadSample("oversized record", f"{last - first} bytes; the limit is {MAX_BYTES}")
    with open(path, "rb") as file:
        file.seek(first)
        raw = file.read(last - first)
    if kind == ".tar":
        return tar_fields(raw)
    if kind == ".tsv":
        return table_fields(path, raw)
    return strict_json(decode_text(raw))


def decode_text(raw: bytes) -> str:
    """UTF-8, or what its byte order mark says. Raises ValueError for anything else."""
    code = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    return raw.decode(code).removeprefix("\ufeff")


def text_start(path: Path) -> int:
    """The first byte after a byte order mark."""
    with open(path, "rb") as file:
        return 3 if file.read(3) == b"\xef\xbb\xbf" else 0


def stamp_of(path: Path) -> tuple[int, int]:
    """Changes when the file does: part of the key of what is kept of it."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


# ---------------------------------------------------------------------------------- JSON


def strict_json(text: str):
    """JSON without NaN and infinities, which would be numbers nobody wrote. Raises ValueError or
    RecursionError."""
    values = text.count(",") + text.count("[") + text.count("{")
    if values > MAX_VALUES:
        raise BadSample("oversized record", f"about {values} values; the limit is {MAX_VALUES}")
    return json.loads(text, parse_constant=refuse_number, parse_float=finite)


def refuse_number(digits: str):
    raise ValueError(f"{digits[:40]} is no JSON number")


def finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else refuse_number(digits)


def json_spans(path: Path) -> Iterator[Span | BadSample]:
    """Lines, items of lists, or whole objects: by how the file begins. Raises ValueError for a list
    that does not end."""
    start = text_start(path)
    with open(path, "rb") as file:
        begins = first_sign(file, start)
        file.seek(start)
        line = file.readline(MAX_BYTES) if path.suffix.lower() in LINES else b""
    if begins == b"[":
        # one list a line is read as lines: damage to one does not reach the next
        return line_spans(path, start) if list_items(line) else value_spans(path, start)
    if begins == b"{":
        return object_spans(path, start)
    return line_spans(path, start)


def first_sign(file: BinaryIO, start: int) -> bytes:
    """The first byte that is no white space, b"" when there is none."""
    file.seek(start)
    while block := file.read(1 << 16):
        rest = block.lstrip()
        if rest:
            return rest[:1]
    return b""


def line_spans(path: Path, start: int) -> Iterator[Span | BadSample]:
    """A record for each line that is not blank; of a line that is a list, one for each item."""
    with open(path, "rb") as file:
        for number, (first, last, line) in enumerate(bounded_lines(file, start), 1):
            if line is None:
                size = last - first
                yield BadSample("oversized record", f"{path.name}:{number}: a line of {size} bytes")
                continue
            items = list_items(line)
            for a, b in items:
                yield first + a, first + b, number
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

        # too long to be held: walk to its end in pieces
        while not whole and piece and not piece.endswith(b"\n"):
            piece = file.readline(1 << 20)
            end += len(piece)
        yield start, end, line if whole else None
        start = end


def list_items(line: bytes) -> list[tuple[int, int]]:
    """Places of the items of a line that is one JSON list; none when it is anything else."""
    if not line.lstrip().startswith(b"["):
        return []
    items = list(values_in(io.BytesIO(line), 0))
    whole = all(item is not None and item[1] is not None for item in items)
    return items if whole else []


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
    first = end = start  # of the item that is being walked over; of the last value
    opened = ""  # the sign that opened the value in which we are
    filled = False  # whether the item holds more than white space, as far as we know
    for place, sign, depth in structure(file, start):
        if depth == 0 and not opened and sign in "[{":
            # a value begins
            if not blank(file, end, place):
                yield None
            opened = sign
            first = place + (sign == "[")
            filled = False
        elif depth == 0 and opened and sign in "]}":
            # it ends, and its last item with it
            if opened == "{":
                yield first, place + 1
            elif filled or not blank(file, first, place):
                yield first, place
            opened = ""
            end = place + 1
            if alone:
                return
        elif opened == "[" and depth == 1 and sign == ",":
            if filled or not blank(file, first, place):
                yield first, place
            first = place + 1
            filled = False
        elif opened:
            filled = True

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


SHALLOW = re.compile(rb'[^"\[\]{},]*')
DEEP = re.compile(rb'[^"\[\]{}]*')
STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


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
        file.seek(start)
        block = file.read(1 << 20)
        if not block:
            return
        at = int(escaped)
        escaped = False
        while at < len(block):
            if inside:
                at = STRING.match(block, at).end()
                escaped = block[at : at + 1] == b"\\"
                inside = at == len(block) or escaped
                at += 1
                continue
            at = (SHALLOW if depth <= 1 else DEEP).match(block, at).end()
            sign = block[at : at + 1].decode("latin-1")
            inside = sign == '"'
            depth -= sign != "" and sign in "]}" and depth > 0
            if sign and depth <= 1:
                yield start + at, sign, depth
            depth += sign != "" and sign in "[{"
            at += 1
        start += len(block)


# ------------------------------------------------------------------------------------ JSON that begins with an object


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

    if alone and leading.lists and not is_record:
        if len(leading.lists) > 1:
            names = ", ".join(sorted(leading.lists))[:200]
            raise ValueError(
                f"{path}: an object around several lists ({names}): "
                "write the one that is meant to a file of its own"
            )
        return value_spans(path, *leading.lists.values(), alone=True)
    # lines, and the first is broken: it found its end somewhere in the others
    return value_spans(path, start) if parses and not in_one_line else line_spans(path, start)


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


# ---------------------------------------------------------------------------------- TSV


def table_spans(path: Path) -> Iterator[Span | BadSample]:
    """Rows after the header. Raises ValueError when the header cannot be read."""
    rows = table_rows(path)
    header = next(rows, None)
    if isinstance(header, BadSample):
        raise ValueError(f"{path}: its first line is no header: {header}")
    return rows


def table_rows(path: Path) -> Iterator[Span | BadSample]:
    """The rows that `csv.reader(delimiter="\\t")` gives, the header with number 0: a quote opens a
    cell only at its beginning, and a quoted cell may hold line ends. Blank lines are no rows."""
    first = end = text_start(path)
    number = lines = 0
    quoted = False
    with open(path, encoding="latin-1", newline="") as file:  # a character is a byte
        file.seek(first)
        while line := file.readline(MAX_BYTES + 1):
            end += len(line)
            lines += 1
            if len(line) > MAX_BYTES:
                while line and not line.endswith(("\r", "\n")):
                    line = file.readline(1 << 20)
                    end += len(line)
                yield BadSample("oversized record", f"{path.name}:{number}: over {MAX_BYTES} bytes")
                quoted = False
            else:
                quoted = ends_quoted(line, quoted)
                if quoted:
                    continue
                if lines > 1 or line.strip("\r\n"):
                    yield first, end, number
                    number += 1
            first = end
            lines = 0

    # The last quote was never closed. Of a single line csv makes a row all the same; of more, that is no row.
    if quoted and lines == 1:
        yield first, end, number
    elif quoted:
        yield BadSample(
            "malformed record",
            f"{path.name}:{number}: a quote that is never closed takes in the last {lines} lines; "
            'inside a cell that begins with a quote, write each quote twice ("")',
        )


QUOTED = re.compile(
    r'[^"]*(?:""[^"]*)*'
)  # up to the quote that closes a cell: two are one of its characters


def ends_quoted(line: str, quoted: bool) -> bool:
    """Whether the end of the line is inside a quoted cell, given whether its beginning is."""
    at = 0  # the beginning of a cell
    while at < len(line):
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
    if csv.field_size_limit() < MAX_BYTES:
        csv.field_size_limit(MAX_BYTES)
    (cells,) = csv.reader(io.StringIO(decode_text(raw), newline=""), delimiter="\t")
    return cells


@lru_cache(16)
def header_of(path: Path, stamp: tuple) -> list[str]:
    first, last, _ = next(table_rows(path))
    with open(path, "rb") as file:
        file.seek(first)
        return cells_of(file.read(last - first))


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
    if len(cells) > len(names):
        raise ValueError(f"{len(cells)} cells where the header has {len(names)}")
    return dict(zip(names, cells + [""] * (len(names) - len(cells))))


LIST_ITEM = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)")\s*(?:,|$)""")


def listed_cell(cell: str) -> list[str]:
    """A cell that may be a list as Python or JSON writes it: ['a', 'b']. Raises ValueError for one
    that is neither."""
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell] if cell else []
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

    place = table_index(path, stamp_of(path)).get(text)
    if place is None or hops == 0:
        raise ValueError(f"image {text!r} is neither base64, nor a path, nor the index of a row")
    with open(path, "rb") as file:
        file.seek(place[0])
        row = cells_by_name(path, file.read(place[1] - place[0]))
    (picture,) = listed_cell(row["image"])
    return table_picture(path, picture, hops - 1)


def is_picture(name: str) -> bool:
    return name.lower().endswith(tuple("." + kind for kind in PICTURES))


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


# ---------------------------------------------------------------------------------- tar


class Member(NamedTuple):
    """A file in a tar: where its header begins, its data begin, and its data end."""

    name: str
    first: int
    data: int
    last: int


def members(file: BinaryIO) -> Iterator[Member | str]:
    """The files in a tar that can belong to samples; a string tells of damage, behind which the
    next header is searched block by block. tarfile itself ends in silence there."""
    size = file.seek(0, io.SEEK_END)
    first = at = (
        0  # where the member begins (long names stand in headers before its own), and where we are
    )
    long_name = ""
    garbage = 0
    while True:
        file.seek(at)
        block = file.read(512)
        if len(block) < 512:
            yield "it ends without an end mark"
            return
        if not block.strip(b"\0"):
            return

        try:
            info = tar_header(block)
        except tarfile.HeaderError as error:
            if garbage == 0:
                yield f"bad header at byte {at} ({error})"
            garbage += 1
            if garbage > MAX_GARBAGE:
                return
            at += 512
            first = at
            long_name = ""
            continue

        garbage = 0
        data = at + 512
        last = data + info.size
        at = data + (info.size + 511) // 512 * 512
        if last > size:
            yield f"{info.name} is cut short"
            return
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            long_name = name_in(file.read(min(info.size, MAX_HEADER)), info.type) or long_name
            continue

        name = long_name or info.name
        if info.isreg() and not is_noise(name):
            yield Member(name, first, data, last)
        first = at
        long_name = ""


def tar_header(block: bytes) -> tarfile.TarInfo:
    """Raises tarfile.HeaderError for a block that is none."""
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if info.size < 0:
        raise tarfile.InvalidHeaderError("negative size")
    return info


def name_in(body: bytes, kind: bytes) -> str:
    """The name that an extended header states for the member after it, "" when it states none."""
    pattern = rb"\d+ path=(.*)\n" if kind == tarfile.XHDTYPE else rb"([^\0]*)"
    found = re.search(pattern, body)
    return found.group(1).decode("utf-8", "replace") if found else ""


def is_noise(name: str) -> bool:
    """Files that no sample is made of: hidden ones, what macOS and Windows leave behind,
    WebDataset's own notes, and names without a kind."""
    *folders, base = name.split("/")
    if base.startswith(".") or "." not in base or "__MACOSX" in folders:
        return True
    return base in ("Thumbs.db", "desktop.ini") or re.match(r"__[^/]*__", base) is not None


def key_of(name: str) -> tuple[str, str]:
    """WebDataset's rule: the path up to the first dot of the file's name is the sample, the rest
    says what it is."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}", kind.lower()


def dotted_key_of(name: str) -> tuple[str, str]:
    """The same with the last dot: for names like img_0.5.jpg."""
    stem, _, kind = name.rpartition(".")
    return stem, kind.lower()


def runs_of(group: list[Member], key) -> list[list[Member]]:
    """Neighbours whose names have the same key."""
    runs: list[list[Member]] = []
    for member in group:
        if runs and key(runs[-1][0].name)[0] == key(member.name)[0]:
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def is_whole(names: Iterable[str], key) -> bool:
    """Whether there is something to see and something to say about it."""
    kinds = {key(name)[1] for name in names}
    return bool(kinds & {"txt", "json"}) and bool(kinds & {*PICTURES, "pdf", "tif"})


def group_spans(path: Path) -> Iterator[Span | BadSample]:
    """Neighbouring files of one key. Damage is one fault, together with the samples beside it that
    it leaves incomplete."""
    group: list[Member] = []
    seen: set[str] = set()
    number = 0
    damaged = False  # since the group began, or just before
    with open(path, "rb") as file:
        for found in members(file):
            begins = bool(group) and (
                isinstance(found, str) or key_of(found.name)[0] != key_of(group[0].name)[0]
            )
            if begins:
                only_whole = damaged or isinstance(found, str)
                yield from records_of(path, group, number, seen, only_whole)
                number += 1
                group = []
                damaged = False
            if isinstance(found, str):
                damaged = True
                yield BadSample("damaged tar", f"{path.name}: {found}")
            else:
                group.append(found)
    if group:
        yield from records_of(path, group, number, seen, damaged)


def records_of(
    path: Path, group: list[Member], number: int, seen: set[str], only_whole: bool
) -> Iterator[Span | BadSample]:
    """The samples of a group of files: one, or several when their names have dots before the last one.

    only_whole: beside damage, what lacks its picture or its text is part of the damage, and no
    fault of its own.
    """
    key = key_of
    parts = [group]
    runs = runs_of(group, dotted_key_of)
    if len(runs) > 1:
        whole = sum(is_whole((m.name for m in run), dotted_key_of) for run in runs)
        plain = any("." not in key_of(m.name)[1] for m in group)
        if whole > 1 or not plain:
            key = dotted_key_of
            parts = runs

    for part in parts:
        if only_whole and not is_whole((m.name for m in part), key):
            continue
        number += 1
        stem = key(part[0].name)[0]
        kinds = [key(m.name)[1] for m in part]
        again = next((i for i, kind in enumerate(kinds) if kind in kinds[:i]), len(part))
        if stem in seen:
            again = 0
        seen.add(stem)
        if again > 0:
            yield part[0].first, part[again - 1].last, number
        if again < len(part):
            yield BadSample("repeated key", f"{path.name}: {part[again].name} occurs again")


def tar_fields(raw: bytes) -> dict:
    """The files of one sample by their kinds, and its key."""
    found = [m for m in members(io.BytesIO(raw)) if isinstance(m, Member)]
    stems = {dotted_key_of(m.name)[0] for m in found}
    key = dotted_key_of if len(stems) == 1 else key_of
    fields = {key(m.name)[1]: raw[m.data : m.last] for m in found}
    return fields | {"__key__": key(found[0].name)[0]}


# ---------------------------------------------------------------------------------- parquet


def parquet_file(path: Path):
    """Raises ValueError without pyarrow, and pyarrow's errors for a file that it cannot open."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
    return ParquetFile(path)


def parquet_spans(path: Path) -> Iterator[Span | BadSample]:
    """Not bytes but row group and row in it."""
    try:
        metadata = parquet_file(path).metadata
    except ValueError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        # pyarrow's own error for a file that is no parquet file is a ValueError, without the file's name
        yield BadSample.because(error, "damaged file", str(path))
        return

    # Runs of equal values take no room in a file: a few hundred bytes can claim any number of rows.
    size = path.stat().st_size
    number = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        where = f"{path}: row group {g}: {group.num_rows} rows, {group.total_byte_size} bytes"
        if number + group.num_rows > 64 * size or group.total_byte_size > MAX_RATIO * size:
            yield BadSample("oversized record", f"{where}, in a file of {size} bytes")
            return
        if group.total_byte_size > MAX_GROUP:
            yield BadSample("oversized record", f"{where}: {SMALLER}")
            continue
        for i in range(group.num_rows):
            number += 1
            yield g, i, number


SMALLER = f"the limit is {MAX_GROUP} bytes; write it again with row_group_size=100"

_groups: OrderedDict = OrderedDict()  # row groups in memory, the one used last at the end


def row_group(path: Path, g: int):
    """A decoded row group, or the BadSample that it is; the last four are kept, as long as they fit."""
    key = (path, stamp_of(path), g)
    if key not in _groups:
        try:
            _groups[key] = decode_group(path, g)
        except Exception as error:
            _groups[key] = BadSample.because(error, "damaged file", f"{path}: row group {g}")
    _groups.move_to_end(key)
    while len(_groups) > 4 or len(_groups) > 1 and kept_bytes() > MAX_GROUP:
        _groups.popitem(last=False)
    return _groups[key]


def kept_bytes() -> int:
    return sum(getattr(table, "nbytes", 0) for table in _groups.values())


def decode_group(path: Path, g: int):
    """A row group as a table, decoded in small pieces, so that one that grows beyond all measure is
    given up in time."""
    from pyarrow import Table

    file = parquet_file(path)
    group = file.metadata.row_group(g)
    limit = min(MAX_GROUP, MAX_BYTES + 16 * group.total_byte_size)
    pieces = []
    size = 0
    for piece in file.iter_batches(64, row_groups=[g], use_threads=False):
        size += piece.nbytes
        if size > limit:
            raise BadSample(
                "oversized record", f"{path}: row group {g} decodes to over {limit} bytes"
            )
        pieces.append(piece)
    return Table.from_batches(pieces).combine_chunks()


def parquet_fields(path: Path, g: int, i: int) -> dict:
    """A row as a dictionary; a field that is null is absent. Raises BadSample."""
    table = row_group(path, g)
    if isinstance(table, BadSample):
        raise table
    row = table.slice(i, 1)
    values = sum(values_of(column.combine_chunks()) for column in row.columns)
    if row.nbytes > MAX_BYTES or values > MAX_VALUES:
        raise BadSample("oversized record", f"{row.nbytes} bytes, {values} values")
    (fields,) = row.to_pylist()
    return {name: value for name, value in fields.items() if value is not None}


def values_of(array) -> int:
    """How many Python objects an Arrow array becomes."""
    from pyarrow import types

    if types.is_struct(array.type):
        return sum(values_of(child) for child in array.flatten())
    if types.is_list(array.type) or types.is_large_list(array.type):
        return len(array) + values_of(array.flatten())
    return len(array)


SPANS = {
    ".jsonl": json_spans,
    ".ndjson": json_spans,
    ".jsonlines": json_spans,
    ".json": json_spans,
    ".tsv": table_spans,
    ".tar": group_spans,
    ".parquet": parquet_spans,
}

# Parsed once at the start, to find faults and tasks; pictures in the others make that too dear.
CHEAP = TEXT
