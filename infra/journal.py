"""What a run says while it trains: one JSON line a step, always; a progress bar; a tracker, if one is named.

What it teaches: the log is part of the result. `log.jsonl` holds every executed step (those that AdaLRS took back too): step,
rate, loss, loss per task, gradient norm whole and per module, tokens and images a second, seconds left. A resumed run cuts it
back to the lines that its checkpoint knew, so that it ends up as if nothing had happened.
"""

import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from infra.checkpoint import RunDirectory, sync


class Journal:
    """Writes on the main rank only. `rows` is the log so far, kept by every rank."""

    def __init__(
        self, stage, directory: Path | RunDirectory | None, main: bool, step: int = 0, made: int = 0
    ):
        home = directory if isinstance(directory, RunDirectory) else None
        path = home.path if home else directory
        self.rows: list[dict] = []
        self.file, self.tracker, self.steps, self.began, self.first = (
            None,
            None,
            stage.steps,
            time.time(),
            made,
        )
        if path is not None:
            log = path / "log.jsonl"
            self.rows = kept(log, made)
            if main:
                path.mkdir(parents=True, exist_ok=True)
                (path / "stage.json").write_text(json.dumps(asdict(stage), indent=1) + "\n")
                self.file = open(log, "a" if made else "w")
                self.file.truncate(sum(len(json.dumps(row)) + 1 for row in self.rows))
        if home and home.tracker and main:
            self.tracker = importlib.import_module(home.tracker)
            self.tracker.init(project="nanosail", config=home.config)
        self.bar = tqdm(
            total=stage.steps,
            initial=step,
            desc=f"{stage.name:>18s}",
            disable=not main,
            mininterval=1.0,
            ncols=110,
        )

    def write(self, row: dict, step: int) -> None:
        """`step` is where the run goes on: further back than the row's own when AdaLRS undid steps."""
        done = max(len(self.rows) + 1 - self.first, 1)
        row["eta"] = round((self.steps - step) * (time.time() - self.began) / done, 1)
        self.rows.append(row)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.tracker:
            self.tracker.log(row, step=len(self.rows))
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f} lr {row['lr']:.1e}", refresh=False)

    def sync(self) -> None:
        """To the disk, before a checkpoint counts on it."""
        if self.file:
            sync(self.file.name)

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()


def kept(log: Path, made: int) -> list[dict]:
    """The first `made` lines of an earlier log. Raises ValueError when it is shorter than its checkpoint says."""
    if made == 0:
        return []
    rows = [json.loads(line) for line in log.read_text().splitlines()[:made]]
    if len(rows) < made:
        raise ValueError(
            f"{log}: {len(rows)} lines, but the checkpoint was written after {made} steps; restore the log or begin "
            f"again with --resume False"
        )
    return rows
