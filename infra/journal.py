"""What a run says while it trains: one JSON line a step, always; a progress bar; a tracker, if one is named.

What it teaches: the log is part of the result, and no reason to lose one. `log.jsonl` holds every
executed step (those that AdaLRS took back too): step, rate, loss, loss per task, gradient norm whole
and per module, tokens and images a second, seconds left. A resumed run cuts it back to the lines that
its checkpoint knew, so that it ends up as if nothing had happened.

    row ── rows (memory) ── JSON ── log.jsonl      a disk that fails: said once, written later
      ├─── progress bar
      └─── tracker                                 one that fails: said once, left alone

JSON has no NaN. A number that is not finite is written as null and read back as NaN (`read_log`); a
line that is lost reads as LOST, so that line n is always the n-th executed step.
"""

import errno
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Callable

from tqdm import tqdm

from infra.checkpoint import announce
from infra.run_directory import RunDirectory
from infra.text import Terminal, printable
from infra.tracker import open_tracker

# what stands for a line of the log that cannot be read
LOST = {
    "step": -1,
    "lr": math.nan,
    "loss": math.nan,
    "grad_norm": math.nan,
    "skipped": False,
    "lost": True,
}


class Journal:
    """Writes on the main rank only. `rows` is the log so far, kept by every rank.

    step: where the run begins or goes on; executed: how many lines of an earlier log it goes on from.
    """

    def __init__(
        self,
        stage: Any,
        directory: Path | RunDirectory | None,
        main: bool,
        step: int = 0,
        executed: int = 0,
    ):
        home = directory if isinstance(directory, RunDirectory) else None
        path = home.path if home else directory
        self.steps = stage.steps
        self.began = time.time()
        self.first = executed
        self.rows: list[dict] = []
        self.log: LogFile | None = None
        self.tracker = None
        self.tracker_failed = False

        # the log, from where the checkpoint knew it
        if path is not None:
            file = path / "log.jsonl"
            self.rows = kept(file, executed, main)
            if main:
                self.log = LogFile(file, self.rows)
                self.log.describe(path / "stage.json", asdict(stage))

        # who else is told
        if home and home.tracker and main:
            self.tracker = open_tracker(home.tracker, home.path, home.config)
        self.bar = tqdm(
            total=stage.steps,
            initial=step,
            desc=f"{printable(stage.name):>18s}",
            disable=not main,
            mininterval=1.0,
            ncols=110,
            file=Terminal(sys.stderr),
        )

    def write(self, row: dict, step: int) -> None:
        """`step` is where the run goes on: further back than the row's own when AdaLRS undid steps."""
        # seconds left, at the pace of this process
        done = max(len(self.rows) + 1 - self.first, 1)
        row["eta"] = round((self.steps - step) * (time.time() - self.began) / done, 1)
        # memory, disk, tracker, terminal
        self.rows.append(row)
        if self.log:
            self.log.append(row)
        if self.tracker:
            self._guest(self.tracker.log, row, len(self.rows))
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f} lr {row['lr']:.1e}", refresh=False)

    def sync(self) -> None:
        """To the disk, before a checkpoint counts on it."""
        if self.log:
            self.log.sync()

    def close(self) -> None:
        self.bar.close()
        if self.log:
            self.log.close()
        if self.tracker:
            self._guest(self.tracker.close)

    def _guest(self, work: Callable, *arguments: Any) -> None:
        """Something that the tracker does. It is another's code, often on a network: it may fail."""
        try:
            work(*arguments)
        except Exception as error:
            if not self.tracker_failed:
                announce(f"TRACKER FAILED ({error}); training goes on, log.jsonl is complete")
            self.tracker_failed = True


class LogFile:
    """JSON lines on a disk that may fail: what could not be written waits, and is written when it can be.

    rows: those that the file is to begin with. Whatever else is in it is cut off.
    """

    def __init__(self, path: Path, rows: list[dict]):
        self.path = path
        self.file: IO[bytes] | None = None
        self.size = 0  # bytes that are known to be well
        self.waiting: list[bytes] = [line_of(row) for row in rows]
        self.failed = False
        self._write()

    def describe(self, path: Path, values: dict) -> None:
        """A small file beside the log."""
        try:
            path.write_text(json.dumps(values, indent=1) + "\n")
        except OSError as error:
            self._complain(error)

    def append(self, row: dict) -> None:
        self.waiting.append(line_of(row))
        self._write()

    def sync(self) -> None:
        try:
            if self.file:
                os.fsync(self.file.fileno())
        except OSError as error:
            self._complain(error)

    def close(self) -> None:
        try:
            if self.file:
                self.file.close()
        except OSError as error:
            self._complain(error)

    def _write(self) -> None:
        """All that waits, after the last byte that is well: half a line of an earlier attempt goes."""
        data = b"".join(self.waiting)
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0)
            self.file.seek(self.size)
            write_all(self.file, data)
            self.file.truncate()
        except OSError as error:
            self._complain(error)
            return

        # all of it is well
        self.size += len(data)
        self.waiting.clear()
        if self.failed:
            self.failed = False
            announce(f"{self.path} can be written again, and is complete")

    def _complain(self, error: OSError) -> None:
        if not self.failed:
            announce(
                f"LOG NOT WRITTEN: {self.path} ({error.strerror or error}); training goes on, and "
                "writes it as soon as it can"
            )
        self.failed = True


def write_all(file: IO[bytes], data: bytes) -> None:
    """An unbuffered file may take less than it is given."""
    rest = memoryview(data)
    while rest:
        taken = file.write(rest)
        if not taken:
            raise OSError(errno.EIO, "nothing was written")
        rest = rest[taken:]


# ------------------------------------------------------------------------------------- as JSON


def line_of(row: dict) -> bytes:
    return (json.dumps(without_nan(row), allow_nan=False) + "\n").encode()


def without_nan(value: Any) -> Any:
    """The same with None in place of every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def with_nan(value: Any) -> Any:
    """The inverse: null was a number that is not finite."""
    if isinstance(value, dict):
        return {key: with_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_nan(inner) for inner in value]
    return math.nan if value is None else value


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl, null as NaN; a line that is no JSON object is LOST."""
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        rows.append(with_nan(row) if isinstance(row, dict) else dict(LOST))
    return rows


def kept(log: Path, executed: int, main: bool = True) -> list[dict]:
    """The first `executed` lines of an earlier log; what cannot be read, or is missing, is LOST."""
    if executed == 0:
        return []
    try:
        rows = read_log(log)[:executed]
    except OSError as error:
        rows = []
        if main:
            announce(f"{log} cannot be read ({error.strerror or error})")
    rows += [dict(LOST) for _ in range(executed - len(rows))]

    # said, not refused: the weights are worth more than their history
    lost = sum("lost" in row for row in rows)
    if lost and main:
        announce(
            f"LOG DAMAGED: {lost} of the first {executed} lines of {log} are lost; training goes on"
        )
    return rows
