"""Checkpoints that a long run can be trusted to: atomic, verified, complete, and without pickle.

What it teaches: a checkpoint is believed, so it must be impossible to believe half of one. It is
written into a temporary directory, every file is flushed to the disk, a manifest of sha256 sums is
written last, and only then is the directory renamed to its name: a kill at any moment leaves the
previous one. No format in torch notices a flipped bit, so sums are compared at load; a checkpoint
with any fault is named, put aside, and the one before it is used.

    written    tmp-00000120/ .. files, `seal` (sums, flushed) .. `commit`: manifest, rename
    believed   `latest`: newest first, `fault` -> a sentence and broken-step-00000120/, or None: whole

    checkpoints/step-00000120/
        manifest.json      bytes and sha256 of every other file
        config.json, model.safetensors       a model, as released
        tokenizer.tiktoken, template.json    its tokenizer, if given
        state.safetensors  optimizers, AdaLRS's snapshot, generators
                           (model-0000i-of-n, state-0000i-of-n: of n ranks that write)
        state.json         the rest: steps, options, data position, AdaLRS in the middle of a trial,
                           config, identity of the data, code revision

A `Draft` is one on its way: what a rank copied for it and into which files that goes. Of a sharded
model every rank copies, writes and sums its own part (scale/shards.py), and rank 0 renames when all
have told it their sums. Simplified: where every rank holds all weights, rank 0 writes.

Which checkpoints a run has, and who may write there: infra/run_directory.py. When one is due, and
what is restored from it: infra/keeper.py.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from infra import weights
from infra.system import flush_to_disk
from infra.text import Terminal, printable
from scale import parallel, shards
from scale.shards import Writers

MANIFEST = "manifest.json"
STATE = "state.json"
LARGEST_MANIFEST = 16 << 20  # bytes: one that is larger was not written here

# what a faulty file can raise while it is looked at
FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError)

# what a state holds, if it holds it
STATE_KINDS = {"step": int, "executed": int, "data": dict, "rng": list, "optimizer": list}


# --------------------------------------------------------------------- a directory, atomically


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(paths: Iterable[Path]) -> dict[str, dict]:
    """Files to the disk, and their entries of the manifest."""
    entries = {}
    for path in paths:
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
        flush_to_disk(path)
    return entries


def commit(temporary: Path, final: Path, entries: dict[str, dict]) -> None:
    """The manifest of files that are on the disk, and the rename that makes them a checkpoint."""
    (temporary / MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")
    flush_to_disk(temporary / MANIFEST)
    flush_to_disk(temporary)

    # the name itself is an entry of the parent directory, which has to reach the disk as well
    os.rename(temporary, final)
    flush_to_disk(final.parent)


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


# ------------------------------------------------------------------- one that is being written


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
        while True:
            # also when it is late already: what is there counts
            text = parallel.read_note(self.note(rank))
            if text is not None:
                return json.loads(text)
            if self.parts is not None:
                return self.parts[rank]
            if time.monotonic() - self.began >= self.patience:
                return {}, f"its part is not written after {self.patience:g} s"
            time.sleep(0.02)
