"""Where a model runs: `--device` and `--dtype` as every command reads them.

What it teaches: a device that is not there should cost a sentence, not a traceback from the depths
of the framework.

    "" -> what the process has anyway (its rank's accelerator, else the CPU)
    "cuda", "cuda:1", "npu", "mps", "cpu" -> the same, if this machine has it

Half precision is the default where it was made for: on CUDA and NPUs. A CPU emulates most of it. On a Mac's
GPU (MPS) what is in bf16 depends on the system's version and none of it was tried here, so there fp32 is the
default: our choice, as `--precision bf16` is the user's.
"""

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]


def pick_device(name: str, default: str = "cpu") -> str:
    """The device that a user named, or the default. Raises ValueError when there is no such one here."""
    if not name:
        return default

    # Frameworks say in many ways that something is missing: the first line of it is enough.
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--device {name}: no such device here ({reason})") from error
    return name


def half_by_default(device: str) -> bool:
    """Whether `--precision auto` means bf16 on such a device ("cpu", "cuda:1", "mps")."""
    return device.partition(":")[0] not in ("cpu", "mps")


def torch_type(precision: Precision) -> torch.dtype:
    """`bfloat16` -> torch.bfloat16."""
    return getattr(torch, precision)
