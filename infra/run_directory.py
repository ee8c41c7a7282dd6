"""A run's directory: who may write there, which checkpoint to go on from, which ones stay.

What it teaches: a directory outlives the process that made it, so everything in it is checked as if a
stranger had left it. A lock keeps a second process out. The newest checkpoint that is whole is the one
to go on from, and only if options and data are what they were; asking for more of the same run is
welcome. Old ones go once a newer one is there, and the best one stays.

    run/.lock        held by the process that writes
        log.jsonl    one line a step (infra/journal.py)
        run.json     options and code revision, for people
        checkpoints/ step-00000120/ step-00000240/ ..       (infra/checkpoint.py: what is in one)

Training waits only for a copy in host memory; a thread writes it. Where several ranks write, each has
such a thread, and rank 0's waits for the sums of all before it renames:

    step ── copy ── step ── step ── step ── copy (waits until the former one is there) ── step ..
            `begin`                           `finish`, `begin`
               └─ thread: files, sums ─ (rank 0: all sums) ─ manifest ─ rename

A full disk costs one checkpoint, never the run. Weights that are not finite are never written.
"""

import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable
from uuid import uuid4

from torch import Tensor, nn

from infra import weights
from infra.checkpoint import (
    STATE,
    Draft,
    announce,
    checkpoints,
    commit,
    fault,
    not_finite,
    put_aside,
    refuse,
)
from infra.identity import differences, revision
from infra.system import PRIVATE, flush_to_disk, lock_file
from infra.tracker import require_tracker
from scale import parallel
from scale.shards import Writers

LAST_WORDS = 2.0  # seconds that a run which ends waits for the other ranks' parts of a checkpoint

# options that a finished run may be given more of
MAY_GROW = ("stage.steps", "stage.epochs")


@dataclass
class RunDirectory:
    """Where a run lives and how it is kept. Raises ValueError for settings that mean nothing.

    `open` raises ValueError when another process writes here, when the configuration changed (with
    the differences), or when the data did.
    """

    path: Path
    config: dict = field(default_factory=dict)  # resolved options: a resumed run must have the same
    every: int = 0  # executed steps between checkpoints; 0: only when told to stop, and at the end
    keep: int = 2  # newest checkpoints that stay, beside the best by score
    resume: bool = True  # False: remove the checkpoints that are there and begin again
    check: Callable[[int], dict] | None = None  # step -> what to log; "score": lower is better
    check_every: int = 0  # steps between checks; 0: never
    tracker: str = ""  # tensorboard, or a module with init and log: wandb, trackio, ...
    tokenizer: Any = None  # something with save(directory): every checkpoint is a complete model
    data_identity: str = ""  # of infra.identity.data_identity; "": not compared
    grace: float = 8.0  # seconds from SIGTERM to the end of a step (twice a step's time, if that is
    # longer); a process that has not ended its step by then ends without a checkpoint of it
    failures: int = 0  # checkpoints that could not be written
    best: list | None = None  # [score, executed] of the best checkpoint
    committed: int = 0  # executed steps at the last one that was written; 0: none
    lock: int | None = None  # of the open lock file
    draft: Draft | None = None  # the checkpoint that is being written

    def __post_init__(self):
        if self.keep < 1 or self.every < 0 or self.check_every < 0:
            raise ValueError(
                f"--keep {self.keep} must be at least 1, --save-every {self.every} and "
                f"--check-every {self.check_every} at least 0"
            )
        require_tracker(self.tracker)
        self.config = json.loads(json.dumps(self.config, default=str))

    @property
    def folder(self) -> Path:
        return self.path / "checkpoints"

    def improves(self, score: float | None) -> bool:
        """Whether a check is the best so far: such a checkpoint is written at once, and stays."""
        return score is not None and (self.best is None or score < self.best[0])

    def open(self, ranks: parallel.Ranks) -> Path | None:
        """Take the directory for this run; returns the checkpoint to resume from, if any."""
        candidates = self._decide(ranks, self._take)

        # The newest whole one: every rank compares the sums of some files
        found = None
        for path in candidates:
            problem = self._fault_of_all(path)
            if problem is None:
                found = path
                break
            if ranks.main:
                refuse(path, problem)
        self._decide(ranks, lambda: self._settle(found))
        return found

    def _decide(self, ranks: parallel.Ranks, work: Callable[[], Any]) -> Any:
        """What rank 0 finds is what all do: a refusal ends all of them, with its reason."""
        answer = (None, "")
        if ranks.main:
            try:
                answer = (work(), "")
            except (ValueError, OSError) as error:
                answer = (None, str(error))
        found, refusal = parallel.gather([answer] if ranks.main else [], everyone=True)[0]
        if refusal:
            self.close()
            raise ValueError(refusal)
        return found

    def _fault_of_all(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, found by all ranks. Raises ValueError where one sees nothing."""
        rank, size = parallel.place_of_all()
        found = (rank, path.exists(), fault(path, rank, size))
        everyone = parallel.gather([found], everyone=True)
        for rank, sees, _ in everyone:
            if not sees:
                self.close()
                raise ValueError(
                    f"rank {rank} does not see {path}: --out must be in a file system that all "
                    "nodes share"
                )
        return next((problem for *_, problem in everyone if problem), None)

    def close(self) -> None:
        """Let go of the directory; what is being written is finished first, if the other ranks' parts come.

        No collective: other ranks may be gone.
        """
        if self.draft is not None:
            longest = time.monotonic() - self.draft.began + LAST_WORDS
            self.draft.patience = min(self.draft.patience, longest)
            self.draft.written.result()
            self.draft = None
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _take(self) -> list[Path]:
        """On rank 0: lock, clean; the checkpoints, newest first."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()

        # what a killed run left, and what nobody wants any more
        self.folder.mkdir(exist_ok=True)
        for left in self.folder.glob("tmp-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not self.resume:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        flush_to_disk(self.path)
        return list(reversed(checkpoints(self.folder).values()))

    def _settle(self, found: Path | None) -> None:
        """On rank 0: see that the checkpoint is this run's; say what this run is, for people."""
        if found:
            self._compare(json.loads((found / STATE).read_text()))
        weights.write_json(self.path / "run.json", self.config | {"revision": revision()})

    def _lock(self) -> None:
        """One writer at a time. The file is neither followed nor emptied: it may be somebody's."""
        file = self.path / ".lock"
        if file.is_symlink():
            raise ValueError(f"{file} is a symbolic link, which is not followed; remove it")
        self.lock = os.open(file, os.O_RDWR | os.O_CREAT | PRIVATE, 0o644)
        if not lock_file(self.lock):
            raise ValueError(
                f"{self.path}: another process is writing here; wait for it, or choose another --out"
            )

    def _compare(self, state: dict) -> None:
        """The same options and the same data as the checkpoint's; more steps are welcome."""
        # options
        changed = differences(state["config"], self.config)
        grown = {name: pair for name, pair in changed.items() if is_growth(name, *pair)}
        lines = [
            f"  {name}: {old!r} -> {new!r}"
            for name, (old, new) in changed.items()
            if name not in grown
        ]
        if lines:
            listed = "\n".join(lines)
            raise ValueError(
                f"{self.path} holds a run with another configuration:\n{listed}\nGive the same "
                "options, another --out, or --resume false to begin again."
            )

        # data, where both know what it was
        saved = state.get("data_identity", "")
        if saved and self.data_identity and saved != self.data_identity:
            raise ValueError(
                f"{self.path}: the data is not what its checkpoint was trained on (files of other "
                "size or content). Give the same data, another --out, or --resume false to begin "
                "again."
            )

        for name, (old, new) in grown.items():
            announce(
                f"{self.path}: {name} grows from {old} to {new}; from step {state['step']} on the "
                f"schedule is the one of {new}"
            )

    def write(
        self, executed: int, model: nn.Module, tensors: dict[str, Tensor], values: dict
    ) -> bool:
        """One checkpoint, from one process, there when this returns. See `begin`."""
        self.begin(executed, model, tensors, values)
        return self.finish()

    def begin(
        self,
        executed: int,
        model: nn.Module,
        tensors: dict[str, Tensor],
        values: dict,
        ranks: parallel.Ranks = parallel.Ranks(),
    ) -> None:
        """One checkpoint: copied now, written by a thread; `finish` says whether it was.

        All ranks that write call it together. A full disk (or any OSError) on one leaves the previous
        ones, and costs only this. Weights or optimizer state that are not finite are refused: they would
        push out good ones.
        """
        assert self.draft is None, "the one before is still being written"
        # Whose, and what is in the way
        writers = Writers.among(ranks)
        draft = Draft(self.folder, executed, writers, values, ranks.timeout)

        # Rank 0 makes room; every rank looks for what must not be written
        there, problem = self._make_room(draft) if writers.main else (False, "")
        broken = None if there else not_finite(model, tensors)
        if broken:
            problem = problem or f"{broken} is not finite"
        everyone = writers.gather([(there, problem, uuid4().hex)])
        draft.token = everyone[0][2]
        problems = [problem for _, problem, _ in everyone if problem]
        if everyone[0][0] or problems:
            if problems and writers.main:
                self._fail(draft, problems[0])
            draft.part.set_result(({}, ""))
            draft.written.set_result(not problems)
            self.draft = draft
            return

        # Copies, from here on nobody's but the thread's
        draft.copy(model, tensors)
        own = {
            "config": self.config,
            "data_identity": self.data_identity,
            "revision": revision(),
        }
        draft.state = json.dumps(values | own)
        self.draft = draft
        threading.Thread(target=self._write_apart, args=[draft], daemon=True).start()

    def finish(self) -> bool:
        """Wait for what was begun, all writers together. Whether it is written: rank 0 knows."""
        draft = self.draft
        if draft is None:
            return False
        draft.parts = draft.writers.gather([draft.part.result()])
        written = draft.written.result()
        if draft.writers.main and not written:
            # what another rank still wrote after it was given up
            shutil.rmtree(draft.temporary, ignore_errors=True)
        self.draft = None
        return written

    def _make_room(self, draft: Draft) -> tuple[bool, str]:
        """A directory that is no checkpoint yet. Returns (whether the checkpoint is there already,
        what is wrong)."""
        try:
            # one that is there already holds the same bits, if it is whole
            if draft.final.exists():
                if fault(draft.final) is None:
                    return True, ""
                put_aside(draft.final)
            if draft.temporary.is_dir():  # of an attempt that failed
                shutil.rmtree(draft.temporary)
            draft.temporary.mkdir(parents=True)
        except OSError as error:
            return False, str(error)
        return False, ""

    def _write_apart(self, draft: Draft) -> None:
        """What the thread does: this rank's files, and on rank 0 the checkpoint once all have theirs."""
        try:
            draft.part.set_result(draft.write(self.tokenizer))
            draft.written.set_result(self._commit(draft) if draft.writers.main else True)
        except Exception as error:  # a fault of this program: raised where the outcome is asked for
            for future in (draft.part, draft.written):
                if not future.done():
                    future.set_exception(error)

    def _commit(self, draft: Draft) -> bool:
        try:
            commit(draft.temporary, draft.final, draft.entries_of_all())
        except OSError as error:
            return self._fail(draft, str(error))
        self.committed = draft.executed
        self.best = draft.values.get("best", self.best)
        self._prune(draft.executed)
        return True

    def _fail(self, draft: Draft, reason: str) -> bool:
        shutil.rmtree(draft.temporary, ignore_errors=True)
        self.failures += 1
        announce(
            f"CHECKPOINT NOT WRITTEN after {draft.executed} steps ({reason}); training goes on, the "
            f"previous one stands ({self.failures} so far)"
        )
        return False

    def _prune(self, executed: int) -> None:
        """The newest `keep` and the best stay. Renamed, then removed: half of one is never a checkpoint.

        What claims to be newer than the one just written is no checkpoint of this run, and is let be.
        """
        mine = {n: path for n, path in checkpoints(self.folder).items() if n <= executed}
        best = self.best[1] if self.best else None
        for number in list(mine)[: -self.keep]:
            if number == best:
                continue
            gone = self.folder / f"tmp-old-{mine[number].name}"
            try:
                os.rename(mine[number], gone)
                shutil.rmtree(gone)
            except OSError as error:
                announce(f"an old checkpoint could not be removed: {error}")


def is_growth(name: str, old: object, new: object) -> bool:
    """Whether a changed option asks only for more of the same run."""
    numbers = isinstance(old, (int, float)) and isinstance(new, (int, float))
    return name in MAY_GROW and numbers and new > old
