"""The index of a source: found by one process of a machine, mapped into memory by the others.

What it teaches: eight ranks that parse the same two hundred thousand records do the same work eight
times. One can do it and write it down; files that are mapped are shared by all who map them. (A rank
with worker processes hands them a copy of the spans, 32 bytes a record.)

    first rank of the machine   walk over all shards -> spans.npy, records.npy, about.json -> one rename
    other ranks                 wait for it, with a limit -> map

A key says what an index is of: code, options, and size and time of change of every shard. So an index
that is there already is used again, also by the run that goes on after a stop. A rank that is told that
the first one failed walks by itself, and meets the same error; one that is told another key was
started with other data and walks by itself too: the comparison of all ranks will name it.

    spans    (N, 4) int64      shard, and the span of each record
    records  int64             of each group in turn, the numbers of its records

One process alone neither waits nor writes: it indexes in memory, unless the shards are remote.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np

from data.sample import Faults
from scale import parallel

KEPT = 8  # indexes on a machine, the newest: our choice
UNREADABLE = (OSError, ValueError, KeyError, EOFError)  # what a damaged one, or none, raises

_asked = itertools.count()  # all ranks ask for indexes in one order


@dataclass
class Index:
    """What a walk over all shards finds. files: path, and which dataset it is of."""

    spans: np.ndarray  # (N, 4)
    groups: dict[tuple[int, str], np.ndarray]  # (dataset, task) -> its records
    files: list[tuple[str, int]] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)


def place_on_node() -> tuple[int, int]:
    """(rank, number of ranks) among those of this machine, as torchrun tells it."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def key_of_index(parts: list) -> str:
    """A digest of what an index depends on: these parts, and the code of this room."""
    text = json.dumps(parts, default=str, sort_keys=True)
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:32]


def folder_of_indexes() -> Path:
    """This user's, on this machine. Raises ValueError for one that is another user's."""
    # on Windows the folder for temporary files is each user's own, and nobody has a number
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"nanosail-index-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != user or folder.is_symlink():
        raise ValueError(f"{folder}: belongs to somebody else; set TMPDIR")
    return folder


def shared_index(
    key: Callable[[], str], walk: Callable[[], Index], timeout: float, keep: bool = False
) -> Index:
    """The index with that key: as it was written down, or as `walk` finds it on the first rank of this
    machine. keep: write it down also for one process alone.

    Raises what `walk` raises, and TimeoutError when the first rank has not finished after `timeout`
    seconds.
    """
    rank, size = place_on_node()
    if size == 1 and not keep:
        return walk()

    # what the first rank of this machine looks for, where it can be asked
    folder = folder_of_indexes()
    name = key()
    place = folder / name
    failed = place.with_suffix(".failed")
    machine = int(os.environ.get("GROUP_RANK", 0))
    note = parallel.note_of(f"index {next(_asked)}", machine)
    if rank == 0:
        parallel.leave_note(note, name)
        failed.unlink(missing_ok=True)
        found = known_index(place) or first_index(walk, place, failed)
        forget_old(folder)
        return found

    # the others: a mark of failure from an earlier run costs them time, nothing else
    until = time.monotonic() + timeout
    while not place.is_dir() and not failed.exists():
        if parallel.read_note(note) not in (None, name):
            return walk()
        if time.monotonic() > until:
            raise TimeoutError(
                f"waited {timeout:g} s for the first rank of this machine to index the data ({place}): "
                "raise --timeout"
            )
        time.sleep(0.05)
    try:
        return map_index(place)
    except UNREADABLE:
        return walk()


def known_index(place: Path) -> Index | None:
    """The index in its place, which is the newest from now on; none, too, if it is damaged."""
    if not place.is_dir():
        return None
    try:
        found = map_index(place)
    except UNREADABLE:
        shutil.rmtree(place, ignore_errors=True)
        return None
    os.utime(place)
    return found


def first_index(walk: Callable[[], Index], place: Path, failed: Path) -> Index:
    """Walk, and write it down for the others; a mark says that there is nothing to wait for."""
    try:
        found = walk()
    except BaseException:
        failed.touch()
        raise
    try:
        put_index(found, place)
    except OSError:  # no room: the others walk, and find the same
        failed.touch()
        return found
    return map_index(place)


def put_index(index: Index, place: Path) -> None:
    """All of it in place at once. Raises OSError where there is no room."""
    part = Path(tempfile.mkdtemp(prefix="part-", dir=place.parent))
    records = list(index.groups.values()) or [np.zeros(0, np.int64)]
    about = {
        "files": index.files,
        "groups": [(k, task, len(found)) for (k, task), found in index.groups.items()],
        "faults": index.faults.held(),
    }
    try:
        np.save(part / "spans.npy", index.spans)
        np.save(part / "records.npy", np.concatenate(records))
        (part / "about.json").write_text(json.dumps(about))
        os.rename(part, place)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        # fine where another run has written the same one in the meantime
        if not place.is_dir():
            raise


def map_index(place: Path) -> Index:
    """The arrays are mapped: pages that nobody writes to are one for all processes."""
    about = json.loads((place / "about.json").read_text())
    records = np.load(place / "records.npy", mmap_mode="c")
    groups = {}
    start = 0
    for k, task, count in about["groups"]:
        groups[k, task] = records[start : start + count]
        start += count
    counts, examples, tracebacks = about["faults"]
    faults = Faults(False, Counter(counts), examples, tracebacks)
    files = [(path, k) for path, k in about["files"]]
    return Index(np.load(place / "spans.npy", mmap_mode="c"), groups, files, faults)


def forget_old(folder: Path) -> None:
    """All but the newest indexes. Who has mapped one keeps it."""
    places = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("part-")]
    for place in sorted(places, key=lambda p: p.stat().st_mtime_ns)[:-KEPT]:
        shutil.rmtree(place, ignore_errors=True)
