"""Containers: where a record lies in a file. JSON, JSONL, TSV, tar and parquet as byte spans."""

import csv
import io
import json
import re
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Iterator

from data.sample import BadSample

MAX_BYTES = 1 << 26  # of one record, its images included

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")

Span = tuple[
    int, int, int
]  # first byte, byte after the last, and the record's number in its file, from 1


def line_spans(path: Path) -> Iterator[Span]:
    with open(path, "rb") as f:
        start = 3 if f.read(3) == b"\xef\xbb\xbf" else 0
        f.seek(start)
        for number, line in enumerate(f, 1):
            if line.strip():
                yield start, start + len(line), number
            start += len(line)


def item_spans(path: Path) -> Iterator[Span]:
    """Items of a JSON list, or lines when it is none. Read as Latin-1, a character is a byte, and JSON's own signs are the same."""
    with open(path, "rb") as f:
        if not f.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from line_spans(path)
            return
    text, decoder, blank = path.read_text("latin-1"), json.JSONDecoder(), re.compile(r"[\s,]*")
    at, number = text.index("[") + 1, 0
    while (at := blank.match(text, at).end()) < len(text) and text[at] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not a JSON list ({e})") from e
        number += 1
        yield at, end, number
        at = end
    if at >= len(text):
        raise ValueError(f"{path}: not a JSON list (it does not end)")


def row_spans(path: Path) -> Iterator[Span]:
    """Lines of a TSV after its header; a quoted field may hold line breaks."""
    quotes = number = 0
    with open(path, "rb") as f:
        end = start = len(f.readline())
        for line in f:
            quotes, end = quotes + line.count(b'"'), end + len(line)
            if quotes % 2 == 0:
                number += 1
                yield start, end, number
                start = end
    if end > start:
        yield start, end, number + 1


def tar_header(block: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def members(f) -> Iterator[tuple[str, int, int, int] | str]:
    """(name, start, data, end) of each file in a tar, from the file's position; a string tells of damage, which is searched
    block by block for the next header. tarfile itself ends in silence there."""
    at, size, name = f.tell(), f.seek(0, 2), None
    start, broken = at, False
    while True:
        f.seek(at)
        block = f.read(512)
        if len(block) < 512:
            yield "it ends without an end mark"
        if len(block) < 512 or not block.strip(b"\0"):
            return
        try:
            info = tar_header(block)
        except tarfile.HeaderError as e:
            if not broken:
                yield f"bad header at byte {at} ({e})"
            broken, name, at = True, None, at + 512
            start = at
            continue
        data, broken = at + 512, False
        at = data + (info.size + 511) // 512 * 512
        if data + info.size > size:
            yield f"{info.name} is cut short"
            return
        if info.type in (b"L", b"x"):  # the next file's name is too long for its header
            body = f.read(info.size)
            found = (
                re.search(rb"\d+ path=(.*)\n", body)
                if info.type == b"x"
                else re.match(rb"([^\0]*)", body)
            )
            name = found.group(1).decode("utf-8", "replace") if found else name
            continue
        if info.isreg():
            yield name or info.name, start, data, data + info.size
        start, name = at, None


def key_of(name: str) -> tuple[str, str]:
    """WebDataset's rule: the path up to the first dot of the file's name is the sample, the rest says what it is."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}", kind.lower()


def group_spans(path: Path) -> Iterator[Span | BadSample]:
    """Neighbouring files of one key. Damage is one fault, together with the sample that it leaves incomplete."""
    key, kinds, start, end, number, damage = None, set(), 0, 0, 0, False

    def whole() -> bool:
        return bool(kinds & {"txt", "json"}) and bool(kinds & {*PICTURES, "pdf", "tif"})

    with open(path, "rb") as f:
        for found in members(f):
            if isinstance(found, str):
                if key is not None and whole():
                    yield start, end, number
                key, kinds, damage = None, set(), True
                yield BadSample("damaged tar", f"{path.name}: {found}")
                continue
            name, a, _, b = found
            here, kind = key_of(name)
            if here != key:
                if key is not None:
                    if whole() or not damage:
                        yield start, end, number
                    damage = False
                key, kinds, start, number = here, set(), a, number + 1
            kinds.add(kind)
            end = b
    if key is not None and (whole() or not damage):
        yield start, end, number


def parquet(path: Path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from e
    return ParquetFile(path)


def parquet_spans(path: Path) -> Iterator[Span]:
    """Not bytes but row group and row in it."""
    metadata, number = parquet(path).metadata, 0
    for g in range(metadata.num_row_groups):
        for i in range(metadata.row_group(g).num_rows):
            number += 1
            yield g, i, number


@lru_cache(4)
def row_group(path: Path, group: int):
    return parquet(path).read_row_group(group)


def strict_json(text: str):
    """JSON without NaN and infinities, which would be numbers nobody wrote."""

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON number")

    return json.loads(text, parse_constant=refuse)


def fields_of(path: Path, a: int, b: int) -> dict:
    """The record at a span, as a dictionary. Raises ValueError (or RecursionError) when it cannot be read."""
    kind = path.suffix
    if kind == ".parquet":
        return row_group(path, a).slice(b, 1).to_pylist()[0]
    if b - a > MAX_BYTES:
        raise ValueError(f"a record of {b - a} bytes; the limit is {MAX_BYTES}")
    with open(path, "rb") as f:
        f.seek(a)
        raw = f.read(b - a)
        if kind == ".tar":
            files = [m for m in members(io.BytesIO(raw)) if not isinstance(m, str)]
            return {key_of(name)[1]: raw[data:end] for name, _, data, end in files} | {
                "__key__": key_of(files[0][0])[0]
            }
        if kind == ".tsv":
            f.seek(0)
            names = f.readline().decode("utf-8-sig").rstrip("\r\n").split("\t")
            csv.field_size_limit(MAX_BYTES)
            (row,) = csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), delimiter="\t")
            return dict(zip(names, row, strict=True))
    return strict_json(raw.decode("utf-8"))


SPANS = {
    ".jsonl": item_spans,
    ".json": item_spans,
    ".tsv": row_spans,
    ".tar": group_spans,
    ".parquet": parquet_spans,
}

CHEAP = (
    ".jsonl",
    ".json",
    ".tsv",
)  # parsed once at the start; pictures in the others make that too dear
