"""Containers: where a record lies in a file, and that record's bytes as a dictionary of fields.

What it teaches: random access needs no database. One walk over a file finds the place of every
record, a *span* of three integers; from then on any process can fetch any record with one seek and
one read. The walk looks only at what separates records (line ends, quotes, brackets, headers), so
that damage inside a record is met when that record is read, and costs it alone.

    file --spans_of--> (first byte, byte after the last, number), BadSample, ...
    span --fields_of--> {"image": ..., "answer": ...}

    .jsonl .ndjson .json   lines, items of lists, objects     container_json.py
    .tsv                   rows                               container_tsv.py
    .tar                   neighbouring files of one key      container_tar.py
    .parquet               rows of row groups                 container_parquet.py

To add one: a function from a path to spans, one from a span to fields, and a line in each of the
two places below. Damage that leaves other records readable is a BadSample in its place; a file that
cannot be walked over raises ValueError naming it. Simplified: compressed files are not read,
nothing can be sought in them.
"""

from pathlib import Path
from typing import Iterator

from data.container_base import LINES, MAX_BYTES, TEXT, Span, decode_text, strict_json, unreadable
from data.container_json import json_spans
from data.container_parquet import parquet_fields, parquet_spans
from data.container_tar import group_spans, tar_fields
from data.container_tsv import table_fields, table_spans
from data.sample import BadSample

SPANS = {suffix: json_spans for suffix in (*LINES, ".json")} | {
    ".tsv": table_spans,
    ".tar": group_spans,
    ".parquet": parquet_spans,
}

# Parsed once at the start, to find faults and tasks; pictures in the others make that too dear.
CHEAP = TEXT


def spans_of(path: Path) -> Iterator[Span | BadSample]:
    """The place of every record of a file, in order. Raises ValueError naming the file when it
    cannot be walked over."""
    try:
        problem = unreadable(path)
        if problem:
            yield BadSample("damaged file", f"{path}: {problem}")
            return
        yield from SPANS[path.suffix.lower()](path)
    except Exception as error:
        # what names the file is meant for its owner; what does not is a decoder's
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        yield BadSample.because(error, "damaged file", str(path))


def fields_of(path: Path, first: int, last: int) -> dict:
    """The record at a span, as a dictionary. Raises BadSample or what a decoder raises when it
    cannot be read."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return parquet_fields(path, first, last)

    # everything else is a stretch of bytes
    if last - first > MAX_BYTES:
        raise BadSample("oversized record", f"{last - first} bytes; the limit is {MAX_BYTES}")
    with open(path, "rb") as file:
        file.seek(first)
        raw = file.read(last - first)

    # and means something else in each container
    if kind == ".tar":
        return tar_fields(raw)
    if kind == ".tsv":
        return table_fields(path, raw)
    return strict_json(decode_text(raw))
