"""The keeper of a run: saves its state when due, restores it bit for bit, leaves in order when told to.

What it teaches: a run is more than its weights. Where the optimizers, AdaLRS, the data and every
random generator stand decides the next step as much, so all of it is saved and restored together: a
run that was killed and resumed writes the same log as one that was not (on a CPU with the same number
of threads). The loop knows one object for it and asks it after every step.

    train.py ── `Keeper` ── `RunDirectory` ── `Draft`
                when, what   whose, which      bytes, sums, rename

Two counts of steps: `step` is where the run is, and goes back when AdaLRS undoes a trial; `executed`
counts every step that was made, and only rises. Checkpoints are named by `executed`: the newest name
is the newest state, also in the middle of a trial.

    executed   1  2  3  4  5  6  7  8
    step       1  2  3  4  5  6  5  6       AdaLRS went back by two steps after the sixth

Any layout of ranks goes on from any other's checkpoint; those of before, which number their optimizers'
state, are read as well.
"""

import itertools
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from adalrs import AdaLRS, load_optimizer_state, optimizer_state
from infra.checkpoint import FAULTS, STATE, announce, part_files
from infra.identity import fingerprint, revision
from infra.run_directory import RunDirectory
from infra.stopping import STOPPED, StopSignals
from scale import parallel, shards
from scale.shards import Names, Part, Writers

LONGEST_GRACE = 25.0  # seconds: torchrun and most schedulers kill 30 s after they told
COMING = 15.0  # seconds in which all ranks of a sharded model must have left their work

# what a whole checkpoint can raise whose parts do not fit together, or not this run
RESTORE_FAULTS = (*FAULTS, IndexError, RuntimeError, AssertionError, SafetensorError)


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

        # The rest: what one rank refuses all refuse, and nobody waits for it
        problem = ""
        try:
            self._restore_state(found, values)
        except RESTORE_FAULTS as error:
            problem = f"{type(error).__name__}: {parallel.first_line(error)}"
        shards.refuse_together(problem)

        self.home.best = values["best"]
        self.home.committed = values["executed"]
        self.last = values["executed"]
        if self.ranks.main:
            print(f"resumed from {found} (code {values['revision'][:12]})", flush=True)
        return values

    def _restore_state(self, found: Path, values: dict) -> None:
        """All but the weights. No collectives in here: a rank may refuse."""
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
                parallel.leave_note(parallel.note_of("left", 0))
            elif self.marked:
                parallel.wait_for_note(parallel.note_of("left", 0), seconds=120)
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
