"""Where a model runs: `--device` and `--dtype` as every command reads them.

What it teaches: a device that is not there should cost a sentence, not a traceback from the depths
of the framework.

    "" -> what the process has anyway (its rank's accelerator, else the CPU)
    "cuda", "cuda:1", "npu", "mps", "cpu" -> the same, if this machine has it
"""

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]


def pick_device(name: str, default: str = "cpu") -> str:
    """The device that a user named, or the default. Raises ValueError when there is no such one here."""
    if not name:
        return default

    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no device is called that; try cpu or cuda") from error
    if wanted.type == "cpu":
        return name

    # What this machine has, and how many of them.
    available = torch.accelerator.is_available()
    kind = torch.accelerator.current_accelerator().type if available else "cpu"
    count = torch.accelerator.device_count() if available else 0
    if wanted.type != kind or (wanted.index or 0) >= count:
        there = f"it has {count} x {kind}" if available else "it has a CPU only"
        raise ValueError(f"--device {name}: this machine has no such device ({there})")
    return name


def torch_type(precision: Precision) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    return getattr(torch, precision)
