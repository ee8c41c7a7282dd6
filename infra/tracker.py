"""A run shown elsewhere: TensorBoard, or any module with `init` and `log` (wandb, trackio, ...).

What it teaches: a tracker is a guest. It is optional, it is asked for by name, its absence is found
before the first step, and its failure costs pictures, never the run.

    --tracker tensorboard   files in run/tensorboard, through torch.utils.tensorboard
    --tracker wandb         wandb.init(project="nanosail", name=<last part of --out>, config=...)
    --tracker mine          the same two functions of a module of yours
"""

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

TENSORBOARD = "tensorboard"


def require_tracker(name: str) -> None:
    """Raises ValueError, with the line that installs it, for a tracker that cannot be imported."""
    if not name:
        return
    try:
        present = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        present = False
    if not present:
        raise ValueError(
            f"--tracker {name}: no such module is installed; pip install {name}, or leave --tracker "
            "out (log.jsonl is always written)"
        )


def open_tracker(name: str, run: Path, config: dict) -> "TensorBoardTracker | ModuleTracker":
    """The tracker of a run. Raises ValueError when it is not there, or has no `init` and `log`."""
    require_tracker(name)
    if name == TENSORBOARD:
        return TensorBoardTracker(run)
    return ModuleTracker(name, run, config)


def numbers(row: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a log row, with their way as a name: {"tasks": {"vqa": 1.0}} -> tasks/vqa."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{key}"] = float(value)
    return found


class TensorBoardTracker:
    """Scalars only; pictures of them by `tensorboard --logdir`."""

    def __init__(self, run: Path):
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(log_dir=str(run / TENSORBOARD))

    def log(self, row: dict, step: int) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class ModuleTracker:
    """A module's own `init(project=, name=, config=)`, `log(row, step=)` and, if it has one, `finish()`."""

    def __init__(self, name: str, run: Path, config: dict):
        self.module: Any = importlib.import_module(name)
        if not all(callable(getattr(self.module, word, None)) for word in ("init", "log")):
            raise ValueError(f"--tracker {name}: that module has no functions init and log")
        wanted = {"project": "nanosail", "name": run.resolve().name, "config": config}
        self.module.init(**accepted(self.module.init, wanted))

    def log(self, row: dict, step: int) -> None:
        self.module.log(row, step=step)

    def close(self) -> None:
        finish = getattr(self.module, "finish", None)
        if callable(finish):
            finish()


def accepted(function: Any, wanted: dict) -> dict:
    """Those arguments that a function knows."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return wanted
    return {name: value for name, value in wanted.items() if name in parameters}
