"""Checkpoints that a long run can be trusted to: atomic, verified, complete, and without pickle.

What it teaches: a checkpoint is believed, so it must be impossible to believe half of one. It is
written into a temporary directory, every file is flushed to the disk, a manifest of sha256 sums is
written last, and only then is the directory renamed to its name: a kill at any moment leaves the
previous one. No format in torch notices a flipped bit, so sums are compared at load; a checkpoint
with any fault is named, put aside, and the one before it is used.

Training waits only for a copy in host memory; a thread writes it. Of a sharded model every rank copies,
writes and sums its own part (scale/shards.py), and rank 0 renames when all have told it their sums:

    step ── copy ── step ── step ── step ── copy (waits until the former one is there) ── step ..
               └─ thread: files, sums ─ (rank 0: all sums) ─ manifest ─ rename

    run/.lock  log.jsonl  run.json  checkpoints/step-00000120/
                                        manifest.json      bytes and sha256 of every other file
                                        config.json, model.safetensors       a model, as released
                                        tokenizer.tiktoken, template.json    its tokenizer, if given
                                        state.safetensors  optimizers, AdaLRS's snapshot, generators
                                                           (model-0000i-of-n, state-0000i-of-n: of n
                                                           ranks that write)
                                        state.json         the rest: steps, options, data position,
                                                           AdaLRS in the middle of a trial, config,
                                                           identity of the data, code revision

Two counts of steps: `step` is where the run is, and goes back when AdaLRS undoes a trial; `executed`
counts every step that was made, and only rises. Checkpoints are named by `executed`: the newest name
is the newest state, also in the middle of a trial.

Everything is restored bit for bit: a run that was killed and resumed writes the same log as one that
was not (on a CPU with the same number of threads). Weights that are not finite are never written.
Any layout of ranks goes on from any other's checkpoint; those of before, which number their optimizers'
state, are read as well. Simplified: where every rank holds all weights, rank 0 writes.
"""

import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NoReturn, Protocol, runtime_checkable
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from adalrs import AdaLRS, load_optimizer_state, optimizer_state
from infra import weights
from infra.identity import differences, fingerprint, revision
from infra.stopping import STOPPED, StopSignals
from infra.text import Terminal, printable
from infra.tracker import require_tracker
from scale import parallel, shards
from scale.shards import Names, Part, Writers

MANIFEST = "manifest.json"
STATE = "state.json"
LONGEST_GRACE = 25.0  # seconds: torchrun and most schedulers kill 30 s after they told
COMING = 15.0  # seconds in which all ranks of a sharded model must have left their work
LAST_WORDS = 2.0  # seconds that a run which ends waits for the other ranks' parts of a checkpoint
LARGEST_MANIFEST = 16 << 20  # bytes: one that is larger was not written here

# what a faulty file can raise while it is looked at
FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError)
# and what a whole one can raise whose parts do not fit together, or not this run
RESTORE_FAULTS = (*FAULTS, IndexError, RuntimeError, AssertionError, SafetensorError)

# what a state holds, if it holds it
STATE_KINDS = {"step": int, "executed": int, "data": dict, "rng": list, "optimizer": list}

# options that a finished run may be given more of
MAY_GROW = ("stage.steps", "stage.epochs")


# -------------------------------------------------------------------------- where data stands


@runtime_checkable
class Resumable(Protocol):
    """A data iterator that can say where it is, as JSON values, and go there.

    One that works for long inside `__next__` may set `interruptible = True` and call `check_stop()`:
    its position is then also noted after every step, and a stop in its middle goes back to there. What
    its `state_dict` returned must not change afterwards.
    """

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Counted:
    """Makes any deterministic iterator resumable: it gets where it was by drawing again."""

    def __init__(self, source: Iterator):
        self.source = iter(source)
        self.drawn = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        return next(self.source)

    def state_dict(self) -> dict:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict) -> None:
        assert self.drawn <= state["drawn"], "an iterator cannot go back"
        for _ in itertools.islice(self.source, state["drawn"] - self.drawn):
            self.drawn += 1


def resumable(data: Iterator) -> Resumable:
    return data if isinstance(data, Resumable) else Counted(data)


# -------------------------------------------------------------------------- random generators


def get_rng() -> tuple[Tensor, list]:
    """torch's generators (CPU, then accelerator) as bytes; Python's and numpy's as JSON values."""
    parts = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        parts.append(torch.get_device_module().get_rng_state())
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    values = [len(parts[0]), [version, list(internal), gauss], [kind, keys.tolist(), *rest]]
    return torch.cat(parts), values


def set_rng(state: Tensor, values: list) -> None:
    """The inverse of `get_rng`."""
    end, (version, internal, gauss), (kind, keys, *rest) = values
    torch.set_rng_state(state[:end])
    if len(state) > end and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state[end:])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))


# --------------------------------------------------------------------- a directory, atomically


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(paths: Iterable[Path]) -> dict[str, dict]:
    """Files to the disk, and their entries of the manifest."""
    entries = {}
    for path in paths:
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
        sync(path)
    return entries


def commit(temporary: Path, final: Path, entries: dict[str, dict]) -> None:
    """The manifest of files that are on the disk, and the rename that makes them a checkpoint."""
    (temporary / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")
    sync(temporary / MANIFEST)
    sync(temporary)

    # the name itself is an entry of the parent directory, which has to reach the disk as well
    os.rename(temporary, final)
    sync(final.parent)


def fault(directory: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, as a sentence that names the file; None if it is whole.

    Of several ranks each compares the sums of its share of the files.
    """
    try:
        listed = read_manifest(directory / MANIFEST)
    except FAULTS as error:
        return printable(f"{MANIFEST} is unreadable ({type(error).__name__}: {error})")[:300]

    # every file as it was written; large ones in turn, so that shares are alike
    by_size = sorted(listed, key=lambda name: -listed[name][0])
    for at, name in enumerate(by_size):
        size, sha256 = listed[name]
        path = directory / name
        try:
            found = path.stat().st_size if path.is_file() else None
            mine = at % shares == share
            altered = mine and found == size and digest(path) != sha256
        except OSError as error:
            return printable(f"{name} cannot be read ({error.strerror or error})")
        if found is None:
            return printable(f"{name} is missing")
        if found != size:
            return printable(f"{name} has {found} bytes, {size} were written")
        if altered:
            return printable(f"{name} was altered: its sha256 is not the one that was written")

    # nothing else, and nothing left out of the list
    foreign = {path.name for path in directory.iterdir()} - set(listed) - {MANIFEST}
    if foreign:
        return printable(f"{min(foreign)} does not belong to it")
    for name in ("config.json", STATE):
        if name not in listed:
            return f"{MANIFEST} does not list {name}"
    for stem in ("model", "state"):
        lacking = lacks(stem, listed)
        if lacking:
            return f"{MANIFEST} does not list {lacking}"

    # and a state that can be read
    try:
        state = json.loads((directory / STATE).read_text())
        config = state["config"]
    except FAULTS as error:
        return printable(f"{STATE} is unreadable ({type(error).__name__}: {error})")[:300]
    if not isinstance(config, dict):
        return f"{STATE} holds no configuration"
    return odd_state(state, directory.name)


def odd_state(state: dict, name: str) -> str | None:
    """What in a state is of another type, or belongs to a checkpoint of another name."""
    for key, kind in STATE_KINDS.items():
        value = state.get(key)
        wrong = not isinstance(value, kind) or (kind is int and value < 0)
        if key in state and wrong:
            return printable(f"{STATE}: {key} is {value!r:.80}")
    if state.get("rng") == []:
        return f"{STATE} holds no generators"
    executed = state.get("executed")
    if executed is not None and name != f"step-{executed:08d}":
        return f"{STATE} is that of a checkpoint after {executed} steps"
    if executed is not None and state.get("step", 0) > executed:
        return f"{STATE}: step {state['step']} was not reached in {executed} executed steps"
    return None


def part_files(stem: str, names: Iterable[str]) -> list[str]:
    """Those of these files that are parts of one thing: stem.safetensors, or stem-0000i-of-0000n."""
    pattern = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    return sorted(name for name in names if pattern.fullmatch(name))


def lacks(stem: str, names: Iterable[str]) -> str | None:
    """The first of those parts that is not there."""
    found = part_files(stem, names)
    of = re.search(r"of-(\d+)", found[0]) if found else None
    wanted = weights.file_names(int(of[1]) if of else 1, stem)
    return next((name for name in wanted if name not in found), None)


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, sha256). Raises one of FAULTS for anything that `commit` did not write."""
    if path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError("too large")
    manifest = json.loads(path.read_text())
    listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    if any(Path(name).name != name for name in listed):
        raise ValueError("it names a file outside")
    if not all(isinstance(size, int) for size, _ in listed.values()):
        raise ValueError("a number of bytes is none")
    return listed


def checkpoints(folder: Path) -> dict[int, Path]:
    """Executed steps -> checkpoint, oldest first."""
    names = {path: re.fullmatch(r"step-(\d+)", path.name) for path in folder.iterdir()}
    numbered = {int(match[1]): path for path, match in names.items() if match}
    return dict(sorted(numbered.items()))


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint. A broken one is named, loudly, and renamed out of the way."""
    for path in reversed(checkpoints(folder).values()):
        problem = fault(path)
        if problem is None:
            return path
        refuse(path, problem)
    return None


def refuse(path: Path, problem: str) -> None:
    """Name a broken checkpoint, loudly, and put it aside."""
    aside = put_aside(path)
    where = f"kept as {aside.name}" if aside else "left where it is"
    announce(f"CHECKPOINT REFUSED: {path}: {problem}. It is {where}; the one before it is used.")


def put_aside(path: Path) -> Path | None:
    """Rename a broken checkpoint; None when not even that is possible."""
    names = itertools.chain(
        [f"broken-{path.name}"], (f"broken-{path.name}-{n}" for n in itertools.count(2))
    )
    free = next(path.parent / name for name in names if not (path.parent / name).exists())
    try:
        os.rename(path, free)
    except OSError:
        return None
    return free


def not_finite(model: nn.Module, tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity, in what this rank has of it."""
    for name, tensor in itertools.chain(model.state_dict().items(), tensors.items()):
        values = parallel.local(tensor)
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            return name
    return None


def announce(text: str) -> None:
    """A line on stderr for people, whatever file names are in it."""
    print(printable(text, lines=True), file=Terminal(sys.stderr), flush=True)


# -------------------------------------------------------------------------- a run's directory


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
    draft: "Draft | None" = None  # the checkpoint that is being written

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
        sync(self.path)
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
        self.lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path}: another process is writing here; wait for it, or choose another --out"
            ) from error

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
        self.draft = None
        return written

    def _make_room(self, draft: "Draft") -> tuple[bool, str]:
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

    def _write_apart(self, draft: "Draft") -> None:
        """What the thread does: this rank's files, and on rank 0 the checkpoint once all have theirs."""
        try:
            draft.part.set_result(draft.write(self.tokenizer))
            draft.written.set_result(self._commit(draft) if draft.writers.main else True)
        except Exception as error:  # a fault of this program: raised where the outcome is asked for
            for future in (draft.part, draft.written):
                if not future.done():
                    future.set_exception(error)

    def _commit(self, draft: "Draft") -> bool:
        try:
            commit(draft.temporary, draft.final, draft.entries_of_all())
        except OSError as error:
            return self._fail(draft, str(error))
        self.committed = draft.executed
        self.best = draft.values.get("best", self.best)
        self._prune(draft.executed)
        return True

    def _fail(self, draft: "Draft", reason: str) -> bool:
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


@dataclass
class Draft:
    """A checkpoint that is being written: what this rank puts into which of its files."""

    folder: Path
    executed: int
    writers: Writers
    values: dict
    patience: float  # seconds that rank 0 waits for the others
    token: str = ""  # the same on all ranks, and nobody else's: what their notes are called
    began: float = field(default_factory=time.monotonic)

    # Copies
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # file -> what is in it
    metadata: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # file -> what it says of itself
    config: dict = field(default_factory=dict)  # the model's
    index: dict | None = None  # of the files of weights, where they are several
    state: str = ""  # JSON

    # Outcomes: this rank's entries of the manifest and what went wrong; whether all is written
    part: Future = field(default_factory=Future)
    written: Future = field(default_factory=Future)
    parts: list | None = None  # of all ranks, once they have met

    @property
    def final(self) -> Path:
        return self.folder / f"step-{self.executed:08d}"

    @property
    def temporary(self) -> Path:
        return self.folder / f"tmp-{self.executed:08d}"

    def note(self, rank: int) -> str:
        return parallel.note_of(f"wrote {self.token}", rank)

    def copy(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """To host memory: this rank's share of the weights, whole tensors as released, and its state."""
        writers = self.writers
        plan = shards.plan_files(model, writers)
        copies = shards.own_weights(model, writers)
        for file, planned in plan.items():
            if planned.rank == writers.rank:
                self.tensors[file] = {name: copies.pop(name) for name in planned.names}
                self.metadata[file] = {"format": "pt"}
        if len(plan) > 1:
            self.index = shards.index_of_plan(plan)
        self.config = model.config.to_dict()

        state = weights.file_names(writers.size, "state")[writers.rank]
        self.tensors[state], self.metadata[state] = shards.own_state(tensors, writers)

    def write(self, tokenizer) -> tuple[dict[str, dict], str]:
        """This rank's files, on the disk: (their entries of the manifest, or what went wrong)."""
        entries: dict[str, dict] = {}
        problem = ""
        try:
            paths = self.write_tensors()
            if self.writers.main:
                paths += self.write_rest(tokenizer)
            entries = seal(paths)
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if not self.writers.main:
            parallel.leave_note(self.note(self.writers.rank), json.dumps([entries, problem]))
        return entries, problem

    def write_tensors(self) -> list[Path]:
        paths = []
        for file in list(self.tensors):
            path = self.temporary / file
            save_file(self.tensors.pop(file), path, self.metadata[file] or None)
            paths.append(path)
        return paths

    def write_rest(self, tokenizer) -> list[Path]:
        """What exists once, on rank 0: how to read the tensors, the tokenizer, and the plain values.

        First in a place of its own: beside it other ranks are writing, under whatever names.
        """
        rest = self.temporary / "rest"
        rest.mkdir()
        weights.write_json(rest / "config.json", self.config)
        if self.index:
            weights.write_json(rest / weights.INDEX, self.index)
        if tokenizer is not None:
            tokenizer.save(rest)
        (rest / STATE).write_text(self.state)

        paths = []
        for path in sorted(rest.iterdir()):
            paths.append(path.replace(self.temporary / path.name))
        rest.rmdir()
        return paths

    def entries_of_all(self) -> dict[str, dict]:
        """On rank 0: the manifest, once all have written their files.

        Ranks leave a note; where none arrives, the loop brings their word when it comes to `finish`.
        Raises OSError where one has not written, or not in time.
        """
        entries, problem = self.part.result()
        for rank in range(1, self.writers.size):
            if problem:
                break
            theirs, problem = self.word_of(rank)
            problem = problem and f"rank {rank}: {problem}"
            entries = entries | theirs
        if problem:
            raise OSError(problem)
        return entries

    def word_of(self, rank: int) -> tuple[dict[str, dict], str]:
        """What another rank's `write` returned."""
        while time.monotonic() - self.began < self.patience:
            text = parallel.read_note(self.note(rank))
            if text is not None:
                return json.loads(text)
            if self.parts is not None:
                return self.parts[rank]
            time.sleep(0.02)
        return {}, f"its part is not written after {self.patience:g} s"


def is_growth(name: str, old: object, new: object) -> bool:
    """Whether a changed option asks only for more of the same run."""
    numbers = isinstance(old, (int, float)) and isinstance(new, (int, float))
    return name in MAY_GROW and numbers and new > old


# --------------------------------------------------------------------------- the loop's keeper


class Keeper:
    """What the loop calls: resume at its start, save when due, save and leave when told to stop.

    keeper.resume() -> values of the checkpoint                 once
    keeper.told_to_stop(), .due(executed), .improves(score), .save(..), .stop(..) after every step
    keeper.finish()                                             at the end
    keeper.mark(step, executed)                                 after every step
    keeper.leave()                                              where `next(data)` raised StopRequested
    """

    def __init__(
        self,
        home: RunDirectory,
        model: nn.Module,
        optimizers: list,
        search: AdaLRS | None,
        data: Resumable,
        ranks: parallel.Ranks,
    ):
        self.home = home
        self.model = model
        self.optimizers = optimizers
        self.search = search
        self.data = data
        self.ranks = ranks
        self.writers = Writers.among(ranks)
        self.last = 0  # executed steps at the last checkpoint that was due
        self.begun = 0  # executed steps at the one that is being written; 0: none
        self.saved = False  # whether the last one was written
        self.marked: dict | None = None  # position after the last step, for `leave`
        self.asked = time.monotonic()  # when the last step ended
        self.signals = StopSignals(home.grace, self.standing)

    def standing(self) -> str:
        """What is left if the process ends now."""
        if self.home.committed:
            return f"the checkpoint after {self.home.committed} steps in {self.home.folder} stands"
        return "there is no checkpoint yet"

    def close(self) -> None:
        self.signals.close()
        self.home.close()

    # ------------------------------------------------------------------------------ beginning

    def resume(self) -> dict:
        """Restores everything from the newest whole checkpoint; {} when the run begins.

        Raises ValueError when the directory is another run's, or when ranks were started unlike each other.
        """
        try:
            self._agree_on_the_run()
            found = self.home.open(self.ranks)
            values = self._restored(found) if found else {}
            self._agree_on_weights()
        except (ValueError, OSError):
            self.close()
            raise
        self.mark(values.get("step", 0), values.get("executed", 0))
        return values

    def _agree_on_the_run(self) -> None:
        saving = {
            "save_every": self.home.every,
            "check_every": self.home.check_every,
            "resume": self.home.resume,
        }
        parallel.agree(
            {
                "options": self.home.config | saving,
                "code": revision(),
                "data": self.home.data_identity,
            }
        )

    def _agree_on_weights(self) -> None:
        """Ranks that hold the same shards begin with the same."""
        shard = 0 if self.ranks.mesh is None else self.ranks.mesh["shard"].get_local_rank()
        parallel.agree({"weights": fingerprint(self.model)}, (self.ranks.stage, shard))

    def _restored(self, found: Path) -> dict:
        """As `_restore`; what does not fit together in a checkpoint is one line that names it."""
        try:
            return self._restore(found)
        except RESTORE_FAULTS as error:
            raise ValueError(
                f"{found} cannot be restored ({type(error).__name__}: {parallel.first_line(error)}); move it "
                "away to go on from the one before it"
            ) from error

    def _restore(self, found: Path) -> dict:
        """Model, optimizers, search, data and generators as a checkpoint has them, of whatever layout."""
        values = json.loads((found / STATE).read_text())
        assert values["step"] <= values["executed"], "a step that was not reached"
        numbered = values["optimizer"] and "names" not in values["optimizer"][0]
        assert not numbered or self.ranks.layout.pp == 1, (
            "an earlier version wrote it: go on from it for one checkpoint without --layout.pp"
        )
        shards.read_weights(self.model, found)

        # Optimizers and search, under the numbers that they have here
        names = self._names()
        files = [found / name for name in part_files("state", os.listdir(found))]
        with shards.SavedState(files) as state:
            rest = names.numbered_rest(values["optimizer"])
            load_optimizer_state(self.optimizers, Part(state, names, "optimizer."), rest)
            if self.search:
                snapshots = dict(Part(state, names, "adalrs."))
                plain = with_rests(values["adalrs"], names.numbered_rest)
                self.search.load_state_dict(snapshots, plain)

            # Data and generators: a rank that did not exist then goes on with its own
            self.data.load_state_dict(values["data"])
            rank, _ = parallel.place_of_all()
            if rank < len(values["rng"]):
                set_rng(state.tensor(f"rng.{rank}"), values["rng"][rank])

        self.home.best = values["best"]
        self.home.committed = values["executed"]
        self.last = values["executed"]
        if self.ranks.main:
            print(f"resumed from {found} (code {values['revision'][:12]})", flush=True)
        return values

    def _names(self) -> Names:
        searched = self.search.tensors if self.search else []
        whole = self.ranks.layout.pp == 1
        return Names(self.model, self.optimizers, searched, whole)

    # --------------------------------------------------------------------------- after a step

    def told_to_stop(self) -> bool:
        """Whether any rank was told to (SIGTERM, Ctrl-C): all ranks get the same answer at a step."""
        # a step that takes long is given the time to end, as far as launchers allow
        now = time.monotonic()
        patience = min(2 * (now - self.asked), LONGEST_GRACE)
        self.signals.grace = max(self.home.grace, patience)
        self.asked = now
        # also those of other stages of a pipeline: launchers tell one after the other
        return parallel.total(float(self.signals.requested), everyone=True)[0] > 0

    def due(self, executed: int) -> bool:
        """Whether `every` steps were executed since the last checkpoint, steps taken back included."""
        return self.home.every > 0 and executed - self.last >= self.home.every

    def improves(self, score: float | None) -> bool:
        """Whether a check is the best so far, also of what is still being written: all ranks ask."""
        if score is not None:
            self.finish()
        return self.home.improves(score)

    def save(self, step: int, executed: int, score: float | None = None) -> None:
        """Begin a checkpoint, once the one before is there. `executed`: how many lines the log must have."""
        self.finish()
        with self.signals.busy():
            self._begin(self._position(step, executed), score)
        self.last = executed

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written, on all ranks; whether the last one was."""
        if not self.begun:
            return self.saved
        with self.signals.busy():
            written = self.home.finish() if self.writers.writes else False
            # what rank 0 did, and its best score: all ranks decide by it whether to save the next
            outcome = [(written, self.home.best)] if self.ranks.main else []
            ((self.saved, self.home.best),) = parallel.gather(outcome, everyone=True)
        if self.saved:
            self.home.committed = self.begun
        self.begun = 0
        return self.saved

    def stop(self, step: int) -> NoReturn:
        """Leave after `save`: 143 is what a scheduler that sent SIGTERM expects to see."""
        self.finish()
        if self.ranks.main and self.saved:
            announce(
                f"told to stop: checkpoint of step {step} ({self.last} executed) written in "
                f"{self.home.folder}; run the same command to go on"
            )
        elif self.ranks.main:
            announce(
                f"told to stop, and NO CHECKPOINT of step {step} was written: {self.standing()}"
            )
        self.close()
        sys.exit(STOPPED)

    # ---------------------------------------------------------------------- in a step's middle

    def mark(self, step: int, executed: int) -> None:
        """Note where data and generators stand, for data that may be interrupted in its work."""
        if getattr(self.data, "interruptible", False):
            position = self._position(step, executed)
            # its state is a snapshot by contract, and may be large; the rest goes on changing
            data = position["values"].pop("data")
            position["values"] = json.loads(json.dumps(position["values"])) | {"data": data}
            self.marked = position

    def leave(self) -> NoReturn:
        """Stopped inside `next(data)`: the state after the last step is saved, and the process ends.

        Weights and optimizers are still those of the last step. Other ranks may be anywhere: where rank 0
        has all it needs it saves alone, else only if all of them come here.
        """
        with self.signals.busy():
            if self.marked and self.writers.size > 1:
                if parallel.all_come("leaves", COMING):
                    self._save_marked()
            elif self.marked and self.ranks.main:
                self._save_marked()
                parallel.leave_note("left")
            elif self.marked:
                parallel.wait_for_note("left", seconds=120)
        if self.ranks.main:
            announce(f"told to stop in the middle of a step, which is given up: {self.standing()}")
        self.close()
        sys.exit(STOPPED)

    def _save_marked(self) -> None:
        """What is being written, then the position after the last step; the writers together."""
        self.home.finish()
        self._begin(self.marked, None)
        self.saved = self.home.finish()

    # ------------------------------------------------------------------------------- in parts

    def _position(self, step: int, executed: int) -> dict:
        """Where the run is: counts, data, every rank's generators. All ranks take part."""
        everyone = parallel.gather([get_rng()], everyone=True)
        values = {
            "step": step,
            "executed": executed,
            "data": self.data.state_dict(),
            "rng": [plain for _, plain in everyone],
        }
        tensors = {f"rng.{rank}": state for rank, (state, _) in enumerate(everyone)}
        return {"values": values, "tensors": tensors}

    def _begin(self, position: dict, score: float | None) -> None:
        """Begin a checkpoint of a position, with what the model and its optimizers are now."""
        self.begun = position["values"]["executed"]
        if not self.writers.writes:
            return
        values = dict(position["values"])
        tensors = dict(position["tensors"]) if self.writers.main else {}

        # optimizers, and the search in the middle of whatever it does, by the names of parameters
        names = self._names()
        held, rest = optimizer_state(self.optimizers)
        tensors |= {names.named(f"optimizer.{key}"): t for key, t in held.items()}
        values["optimizer"] = self._of_all_stages(names.named_rest(rest))
        if self.search:
            held, plain = self.search.state_dict()
            tensors |= {names.named(f"adalrs.{key}"): t for key, t in held.items()}
            values["adalrs"] = with_rests(
                plain, lambda rest: self._of_all_stages(names.named_rest(rest))
            )

        # it becomes the best one once it is written
        values["best"] = self.home.best
        if self.home.improves(score):
            values["best"] = [score, values["executed"]]
        self.home.begin(values["executed"], self.model, tensors, values, self.ranks)

    def _of_all_stages(self, entries: list) -> list:
        """A pipeline's stages have optimizers of their own; ranks that share a stage have the same."""
        return self.writers.gather(entries if self.writers.row == 0 else [])


def with_rests(search: dict, change: Callable[[list], list]) -> dict:
    """AdaLRS's plain values, with another form of what its snapshots know of the optimizers."""
    changed = dict(search)
    for name in ("older", "newer"):
        if search[name]:
            rest = search[name]["rest"]
            changed[name] = search[name] | {
                "rest": rest | {"optimizers": change(rest["optimizers"])}
            }
    return changed
