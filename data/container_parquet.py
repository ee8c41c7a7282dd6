"""Parquet: rows, found by row group and place in it.

What it teaches: columns are compressed together, so a row cannot be fetched alone; a row group is
decoded and kept for its neighbours. And equal values take no room in a file: a thousand bytes can
hold gigabytes, so what a file claims is compared with its size, and decoding is given up when it
grows beyond measure.

    footer --parquet_spans--> (row group, row in it, number) ... --parquet_fields--> {column: value}

A column that is null in a row is absent from it. Needs pyarrow, which nothing else here does.
Simplified: a row group is decoded whole; those of a gigabyte and more are refused.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Iterator

from data.container_base import MAX_BYTES, MAX_VALUES, Span, stamp_of
from data.sample import BadSample

MAX_GROUP = 1 << 30  # decoded bytes of a row group, and of all that are kept
MAX_RATIO = 1024  # of decoded to stored bytes: more is a bomb
SMALLER = f"the limit is {MAX_GROUP} bytes; write it again with row_group_size=100"

_groups: OrderedDict = OrderedDict()  # row groups in memory, the one used last at the end


def parquet_file(path: Path):
    """Raises ValueError without pyarrow, and pyarrow's errors for a file that it cannot open."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"{path}: parquet files need pyarrow: pip install -r requirements/data.txt"
        ) from error
    return ParquetFile(path)


def parquet_spans(path: Path) -> Iterator[Span | BadSample]:
    """Not bytes but row group and row in it."""
    try:
        metadata = parquet_file(path).metadata
    except ValueError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        # pyarrow's error for what is no parquet file does not name the file
        yield BadSample.because(error, "damaged file", str(path))
        return

    # Runs of equal values take no room in a file: a few hundred bytes can claim any number of rows.
    size = path.stat().st_size
    number = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        # a file that claims too much, and a group that is too large
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


def row_group(path: Path, g: int):
    """A decoded row group, or the BadSample that it is; the last four are kept, as long as they fit."""
    key = (path, stamp_of(path), g)
    if key not in _groups:
        # a group that cannot be decoded is kept as its fault: each of its rows would ask for it again
        try:
            _groups[key] = decode_group(path, g)
        except BadSample as fault:
            _groups[key] = fault
        except Exception as error:
            _groups[key] = BadSample.because(error, "damaged file", f"{path}: row group {g}")

    # the ones used longest ago go first
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

    # a little more than the footer promises is normal: equal values are stored once
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

    # how large the row is, before it becomes Python objects
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
