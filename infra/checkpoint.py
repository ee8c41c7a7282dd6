"""Checkpoints that a long run can be trusted to: atomic, verified, complete, and without pickle.

What it teaches: a checkpoint is believed, so it must be impossible to believe half of one. It is written into a temporary
directory, every file is flushed to the disk, a manifest of sha256 sums is written last, and only then is the directory renamed
to its name: a kill at any moment leaves the previous one. No format in torch notices a flipped bit, so sums are compared at
load; a checkpoint that fails is named, put aside, and the one before it is used.

    run/.lock  log.jsonl  run.json  checkpoints/step-00000120/{manifest.json, config.json, model.safetensors,
                                                                  state.safetensors, state.json}

    model.safetensors   weights in the released layout (`SailVL.from_pretrained` reads the directory as it is)
    state.safetensors   optimizers, AdaLRS's snapshot, random generators
    state.json          step, optimizer options, AdaLRS in the middle of a trial, data position, seeds, config, git revision

Everything is restored bit for bit: a run that was killed and resumed writes the same log as one that was not (on a CPU with the
same number of threads). Simplified: weights are replicated over ranks, so rank 0 writes; each rank's generators are kept.
"""

import fcntl
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, Protocol, TextIO, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adalrs import AdaLRS, load_optimizer_state, optimizer_state
from infra import weights
from scale import parallel

MANIFEST = "manifest.json"


@runtime_checkable
class Resumable(Protocol):
    """A data iterator that can say where it is, as JSON values, and go there."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Counted:
    """Makes any deterministic iterator resumable: its state is how much was drawn, and it gets there by drawing again."""

    def __init__(self, source: Iterator):
        self.source, self.drawn = iter(source), 0

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


# ------------------------------------------------------------------------------------------------------ random generators


def get_rng() -> tuple[Tensor, list]:
    """torch's generators (CPU, then accelerator) as bytes, and Python's and numpy's as JSON values."""
    parts = [torch.get_rng_state()]
    if torch.accelerator.is_available():
        parts.append(torch.get_device_module().get_rng_state())
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return torch.cat(parts), [
        len(parts[0]),
        [version, list(internal), gauss],
        [kind, keys.tolist(), *rest],
    ]


def set_rng(state: Tensor, values: list) -> None:
    at, python, (kind, keys, *rest) = values
    torch.set_rng_state(state[:at])
    if len(state) > at and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state[at:])
    random.setstate((python[0], tuple(python[1]), python[2]))
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))


# ------------------------------------------------------------------------------------------------- a directory, atomically


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def commit(temporary: Path, final: Path) -> None:
    """Sums of all files, everything to the disk, then the rename that makes it a checkpoint."""
    files = sorted(p for p in temporary.iterdir())
    manifest = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, temporary / MANIFEST, temporary):
        sync(path)
    os.rename(temporary, final)
    sync(final.parent)


def fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing, truncated, altered or foreign; None if nothing is."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} is unreadable ({e})"
    for name, (size, sha256) in listed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
        if digest(path) != sha256:
            return f"{name} was altered: its sha256 is not the one that was written"
    foreign = {p.name for p in directory.iterdir()} - set(listed) - {MANIFEST}
    return f"{min(foreign)} does not belong to it" if foreign else None


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint. A broken one is named, loudly, and renamed out of the way."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = fault(path)
        if problem is None:
            return path
        print(
            f"CHECKPOINT REFUSED: {path}: {problem}. It is kept as broken-{path.name}; the one before it is used.",
            file=sys.stderr,
            flush=True,
        )
        os.rename(path, folder / f"broken-{path.name}")
    return None


@functools.cache
def revision() -> str:
    """Commit of this code, marked when files differ from it; "unknown" outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit_id = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit_id + (" with changes" if changed.strip() else "")


# --------------------------------------------------------------------------------------------------------- a run's directory


@dataclass
class RunDirectory:
    """Where a run lives and how it is kept. `config` is the resolved configuration: a resumed run must have the same.

    every: steps between checkpoints (0: only at SIGTERM and at the end); keep: how many of the newest stay, beside the best by
    score. Raises ValueError when another process writes here, or when the configuration changed (with the diff).
    """

    path: Path
    config: dict = field(default_factory=dict)
    every: int = 0
    keep: int = 2
    resume: bool = True
    check: Callable[[int], dict] | None = (
        None  # step -> what to log; its "score" (lower is better) picks the best checkpoint
    )
    check_every: int = 0  # steps between checks; 0: never
    tracker: str = (
        ""  # a module with init(project=, config=) and log(row, step=): wandb, trackio, ...
    )
    failures: int = 0  # checkpoints that could not be written
    best: list | None = None  # [score, step]
    lock: TextIO | None = None

    def __post_init__(self):
        self.config = json.loads(json.dumps(self.config, default=str))

    def open(self, world: parallel.Ranks) -> Path | None:
        """Take the directory for this run; returns the checkpoint to resume from, if any."""
        if world.main:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise ValueError(
                    f"{self.path}: another process is writing here; wait for it, or choose another --out"
                ) from e
            self.folder.mkdir(exist_ok=True)
            for left in self.folder.glob("tmp-*"):  # of a run that was killed
                shutil.rmtree(left)
            if not self.resume:
                shutil.rmtree(self.folder)
                self.folder.mkdir()
        found = parallel.gather([str(latest(self.folder) or "")] if world.main else [])[0]
        if found:
            self._compare(json.loads((Path(found) / "state.json").read_text())["config"])
        elif world.main:
            weights.write_json(self.path / "run.json", self.config | {"revision": revision()})
        return Path(found) if found else None

    def close(self) -> None:
        if self.lock:
            self.lock.close()

    @property
    def folder(self) -> Path:
        return self.path / "checkpoints"

    def _compare(self, saved: dict) -> None:
        old, new = flat(saved), flat(self.config)
        odd = [
            f"  {k}: {old.get(k)!r} -> {new.get(k)!r}"
            for k in sorted(old.keys() | new.keys())
            if old.get(k) != new.get(k)
        ]
        if odd:
            self.close()
            raise ValueError(
                f"{self.path} holds a run with another configuration:\n"
                + "\n".join(odd)
                + "\nGive the same options, "
                "another --out, or --resume False to begin again."
            )

    def write(self, step: int, model, tensors: dict[str, Tensor], values: dict) -> bool:
        """One checkpoint. A full disk (or any OSError) leaves the previous one, is reported, and costs only this one."""
        final, temporary = self.folder / f"step-{step:08d}", self.folder / f"tmp-{step:08d}"
        if final.is_dir():
            return True
        try:
            if temporary.is_dir():  # of an attempt that failed
                shutil.rmtree(temporary)
            model.save_pretrained(temporary)
            save_file(
                {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()},
                temporary / "state.safetensors",
            )
            (temporary / "state.json").write_text(
                json.dumps(values | {"config": self.config, "revision": revision()})
            )
            commit(temporary, final)
        except (OSError, SafetensorError) as e:
            self.failures += 1
            shutil.rmtree(temporary, ignore_errors=True)
            print(
                f"CHECKPOINT NOT WRITTEN at step {step} ({e}); training goes on, the previous one stands ({self.failures} so far)",
                file=sys.stderr,
                flush=True,
            )
            return False
        self._prune()
        return True

    def _prune(self) -> None:
        """Newest `keep` and the best stay. A directory is renamed before it is removed: half of one is never a checkpoint."""
        stay = {f"step-{self.best[1]:08d}"} if self.best else set()
        for path in sorted(self.folder.glob("step-*"))[: -self.keep]:
            if path.name not in stay:
                os.rename(path, gone := self.folder / f"tmp-old-{path.name}")
                shutil.rmtree(gone)


def flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, for a diff that names what changed."""
    out = {}
    for key, value in values.items():
        out |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {prefix + key: value}
        )
    return out


class Keeper:
    """What the loop calls: resume at its start, save when it is due, save and leave when the scheduler says so (SIGTERM)."""

    def __init__(
        self,
        home: RunDirectory,
        model,
        optimizers: list,
        search: AdaLRS | None,
        data: Resumable,
        world: parallel.Ranks,
    ):
        self.home, self.model, self.optimizers, self.search, self.data, self.world = (
            home,
            model,
            optimizers,
            search,
            data,
            world,
        )
        self.told, self.last = False, 0
        self.before = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_) -> None:
        self.told = True

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self.before)
        self.home.close()

    def resume(self) -> dict:
        """Restores everything from the newest whole checkpoint; returns its values, {} when the run begins."""
        found = self.home.open(self.world)
        if found is None:
            return {}
        values, tensors = (
            json.loads((found / "state.json").read_text()),
            load_file(found / "state.safetensors"),
        )
        device = next(self.model.parameters()).device
        weights.load_weights(self.model, found, next(self.model.parameters()).dtype, device)
        part = lambda prefix: {
            k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)
        }
        load_optimizer_state(self.optimizers, part("optimizer."), values["optimizer"])
        if self.search:
            self.search.load_state_dict(
                {k: t.to(device) for k, t in part("adalrs.").items()}, values["adalrs"]
            )
        self.data.load_state_dict(values["data"])
        if self.world.rank < len(values["rng"]):
            set_rng(tensors[f"rng.{self.world.rank}"], values["rng"][self.world.rank])
        self.home.best, self.last = values["best"], values["step"]
        if self.world.main:
            print(f"resumed from {found} (code {values['revision'][:12]})", flush=True)
        return values

    def stop(self, step: int) -> None:
        """Leave after SIGTERM: 143 is what a scheduler that sent it expects to see."""
        print(
            f"SIGTERM: checkpoint of step {step} written in {self.home.folder}; run the same command to go on",
            file=sys.stderr,
        )
        self.close()
        sys.exit(143)

    def told_to_stop(self) -> bool:
        """Whether any rank was sent SIGTERM: all ranks get the same answer at the same step."""
        return parallel.total(float(self.told))[0] > 0

    def due(self, step: int) -> bool:
        return self.home.every > 0 and step - self.last >= self.home.every

    def save(self, step: int, made: int, score: float | None = None) -> bool:
        """`made`: executed steps, which is how many lines the log must have."""
        if score is not None and (self.home.best is None or score < self.home.best[0]):
            self.home.best = [score, step]
        state, rest = optimizer_state(self.optimizers)
        tensors = {f"optimizer.{k}": t for k, t in state.items()}
        values = {
            "step": step,
            "made": made,
            "optimizer": rest,
            "best": self.home.best,
            "data": self.data.state_dict(),
        }
        if self.search:
            found, values["adalrs"] = self.search.state_dict()
            tensors |= {f"adalrs.{k}": t for k, t in found.items()}
        own, more = get_rng()
        every = parallel.gather([(own, more)])
        tensors |= {f"rng.{i}": t for i, (t, _) in enumerate(every)}
        values["rng"], self.last = [m for _, m in every], step
        return self.home.write(step, self.model, tensors, values) if self.world.main else True
