"""Checkpoints that a long run can be trusted to: atomic, verified, complete, and without pickle.

What it teaches: a checkpoint is believed, so it must be impossible to believe half of one. It is
written into a temporary directory, every file is flushed to the disk, a manifest of sha256 sums is
written last, and only then is the directory renamed to its name: a kill at any moment leaves the
previous one. No format in torch notices a flipped bit, so sums are compared at load; a checkpoint
with any fault is named, put aside, and the one before it is used.

    run/.lock  log.jsonl  run.json  checkpoints/step-00000120/
                                        manifest.json      bytes and sha256 of every other file
                                        config.json, model.safetensors       a model, as released
                                        tokenizer.tiktoken, template.json    its tokenizer, if given
                                        state.safetensors  optimizers, AdaLRS's snapshot, generators
                                        state.json         the rest: steps, options, data position,
                                                           AdaLRS in the middle of a trial, config,
                                                           identity of the data, code revision

Two counts of steps: `step` is where the run is, and goes back when AdaLRS undoes a trial; `executed`
counts every step that was made, and only rises. Checkpoints are named by `executed`: the newest name
is the newest state, also in the middle of a trial.

Everything is restored bit for bit: a run that was killed and resumed writes the same log as one that
was not (on a CPU with the same number of threads). Weights that are not finite are never written.
Simplified: weights are replicated over ranks, so rank 0 writes; each rank's generators are kept.
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
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adalrs import AdaLRS, load_optimizer_state, optimizer_state
from infra import weights
from infra.identity import differences, fingerprint, revision
from infra.stopping import STOPPED, StopSignals
from infra.text import Terminal, printable
from infra.tracker import require_tracker
from scale import parallel

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "state.safetensors"
LONGEST_GRACE = 25.0  # seconds: torchrun and most schedulers kill 30 s after they told
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


def commit(temporary: Path, final: Path) -> None:
    """Sums of all files, everything to the disk, then the rename that makes it a checkpoint."""
    files = sorted(path for path in temporary.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, temporary / MANIFEST, temporary):
        sync(path)

    # the name itself is an entry of the parent directory, which has to reach the disk as well
    os.rename(temporary, final)
    sync(final.parent)


def fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint, as a sentence that names the file; None if it is whole."""
    try:
        listed = read_manifest(directory / MANIFEST)
    except FAULTS as error:
        return printable(f"{MANIFEST} is unreadable ({type(error).__name__}: {error})")[:300]

    # every file as it was written
    for name, (size, sha256) in listed.items():
        path = directory / name
        try:
            found = path.stat().st_size if path.is_file() else None
            altered = found == size and digest(path) != sha256
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
    for name in ("config.json", STATE, TENSORS):
        if name not in listed:
            return f"{MANIFEST} does not list {name}"
    if not any(re.fullmatch(r"model.*\.safetensors", name) for name in listed):
        return f"{MANIFEST} lists no weights"

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


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, sha256). Raises one of FAULTS for anything that `commit` did not write."""
    if path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError("too large")
    manifest = json.loads(path.read_text())
    listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    if any(Path(name).name != name for name in listed):
        raise ValueError("it names a file outside")
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
        aside = put_aside(path)
        where = f"kept as {aside.name}" if aside else "left where it is"
        announce(
            f"CHECKPOINT REFUSED: {path}: {problem}. It is {where}; the one before it is used."
        )
    return None


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
    """Name of the first tensor that holds a NaN or an infinity."""
    for name, tensor in itertools.chain(model.state_dict().items(), tensors.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
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
    lock: int | None = None  # of the open lock file

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
        answer = ("", "")
        if ranks.main:
            try:
                answer = (str(self._take() or ""), "")
            except (ValueError, OSError) as error:
                answer = ("", str(error))

        # what rank 0 found is what all do: a refusal ends all of them, with its reason
        found, refusal = parallel.gather([answer] if ranks.main else [])[0]
        if refusal:
            self.close()
            raise ValueError(refusal)
        return Path(found) if found else None

    def close(self) -> None:
        """Let go of the directory."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _take(self) -> Path | None:
        """On rank 0: lock, clean, find the newest whole checkpoint, see that it is this run's."""
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

        # what this run is, for people, once it is sure that it may be here
        found = latest(self.folder)
        if found:
            self._compare(json.loads((found / STATE).read_text()))
        weights.write_json(self.path / "run.json", self.config | {"revision": revision()})
        return found

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
        """One checkpoint. A full disk (or any OSError) leaves the previous ones, and costs only this.

        Weights or optimizer state that are not finite are refused: they would push out good ones.
        """
        final = self.folder / f"step-{executed:08d}"
        temporary = self.folder / f"tmp-{executed:08d}"

        # one that is there already holds the same bits, if it is whole
        if final.exists():
            if fault(final) is None:
                return True
            put_aside(final)

        broken = not_finite(model, tensors)
        if broken:
            return self._fail(executed, f"{broken} is not finite")

        copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        # everything into a directory that is no checkpoint yet
        own = {
            "config": self.config,
            "data_identity": self.data_identity,
            "revision": revision(),
        }
        try:
            if temporary.is_dir():  # of an attempt that failed
                shutil.rmtree(temporary)
            model.save_pretrained(temporary)
            if self.tokenizer is not None:
                self.tokenizer.save(temporary)
            save_file(copies, temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(values | own))
            commit(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return self._fail(executed, str(error))

        self.best = values.get("best", self.best)
        self._prune(executed)
        return True

    def _fail(self, executed: int, reason: str) -> bool:
        self.failures += 1
        announce(
            f"CHECKPOINT NOT WRITTEN after {executed} steps ({reason}); training goes on, the "
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


# --------------------------------------------------------------------------- the loop's keeper


class Keeper:
    """What the loop calls: resume at its start, save when due, save and leave when told to stop.

    keeper.resume() -> values of the checkpoint                 once
    keeper.told_to_stop(), .due(executed), .save(..), .stop(..) after every step
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
        self.last = 0  # executed steps at the last checkpoint that was due
        self.written = 0  # executed steps at the last one that was written; 0: none
        self.saved = False  # whether the last attempt was
        self.marked: dict | None = None  # position after the last step, for `leave`
        self.asked = time.monotonic()  # when the last step ended
        self.signals = StopSignals(home.grace, self.standing)

    def standing(self) -> str:
        """What is left if the process ends now."""
        if self.written:
            return f"the checkpoint after {self.written} steps in {self.home.folder} stands"
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
            if self.ranks.size > 1:
                parallel.agree({"weights": fingerprint(self.model)})
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
        """Model, optimizers, search, data and generators as a checkpoint has them."""
        values = json.loads((found / STATE).read_text())
        assert values["step"] <= values["executed"], "a step that was not reached"
        tensors = load_file(found / TENSORS)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}

        # model, optimizers, search
        first = next(self.model.parameters())
        weights.load_weights(self.model, found, first.dtype, first.device)
        load_optimizer_state(self.optimizers, part("optimizer."), values["optimizer"])
        if self.search:
            snapshot = {name: t.to(first.device) for name, t in part("adalrs.").items()}
            self.search.load_state_dict(snapshot, values["adalrs"])

        # data and generators: a rank that did not exist then goes on with its own
        self.data.load_state_dict(values["data"])
        if self.ranks.rank < len(values["rng"]):
            set_rng(tensors[f"rng.{self.ranks.rank}"], values["rng"][self.ranks.rank])

        self.home.best = values["best"]
        self.last = values["executed"]
        self.written = values["executed"]
        if self.ranks.main:
            print(f"resumed from {found} (code {values['revision'][:12]})", flush=True)
        return values

    # --------------------------------------------------------------------------- after a step

    def told_to_stop(self) -> bool:
        """Whether any rank was told to (SIGTERM, Ctrl-C): all ranks get the same answer at a step."""
        # a step that takes long is given the time to end, as far as launchers allow
        now = time.monotonic()
        patience = min(2 * (now - self.asked), LONGEST_GRACE)
        self.signals.grace = max(self.home.grace, patience)
        self.asked = now
        return parallel.total(float(self.signals.requested))[0] > 0

    def due(self, executed: int) -> bool:
        """Whether `every` steps were executed since the last checkpoint, steps taken back included."""
        return self.home.every > 0 and executed - self.last >= self.home.every

    def save(self, step: int, executed: int, score: float | None = None) -> bool:
        """A checkpoint, on rank 0; the others wait. `executed`: how many lines the log must have."""
        with self.signals.busy():
            position = self._position(step, executed)
            written = self._write(position, score) if self.ranks.main else False
            # what rank 0 did, and its best score: all ranks decide by it whether to save the next
            outcome = [(written, self.home.best)] if self.ranks.main else []
            ((self.saved, self.home.best),) = parallel.gather(outcome)
        self.last = executed
        if self.saved:
            self.written = executed
        return self.saved

    def stop(self, step: int) -> NoReturn:
        """Leave after `save`: 143 is what a scheduler that sent SIGTERM expects to see."""
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

        No collective is used, as other ranks may be anywhere. Weights and optimizers are still those
        of the last step.
        """
        with self.signals.busy():
            if self.marked and self.ranks.main:
                self.saved = self._write(self.marked, None)
                if self.saved:
                    self.written = self.marked["values"]["executed"]
                parallel.leave_note("left")
            elif self.marked:
                parallel.wait_for_note("left", seconds=120)
        if self.ranks.main:
            announce(f"told to stop in the middle of a step, which is given up: {self.standing()}")
        self.close()
        sys.exit(STOPPED)

    # ------------------------------------------------------------------------------- in parts

    def _position(self, step: int, executed: int) -> dict:
        """Where the run is: counts, data, every rank's generators. All ranks take part."""
        everyone = parallel.gather([get_rng()])
        values = {
            "step": step,
            "executed": executed,
            "data": self.data.state_dict(),
            "rng": [plain for _, plain in everyone],
        }
        tensors = {f"rng.{rank}": state for rank, (state, _) in enumerate(everyone)}
        return {"values": values, "tensors": tensors}

    def _write(self, position: dict, score: float | None) -> bool:
        """A position, with what the model and its optimizers are now."""
        values = dict(position["values"])
        tensors = dict(position["tensors"])

        # optimizers, and the search in the middle of whatever it does
        held, values["optimizer"] = optimizer_state(self.optimizers)
        tensors |= {f"optimizer.{name}": t for name, t in held.items()}
        if self.search:
            held, values["adalrs"] = self.search.state_dict()
            tensors |= {f"adalrs.{name}": t for name, t in held.items()}

        # it becomes the best one once it is written
        values["best"] = self.home.best
        if score is not None and (self.home.best is None or score < self.home.best[0]):
            values["best"] = [score, values["executed"]]
        return self.home.write(values["executed"], self.model, tensors, values)
