"""What a training run will take, before it is paid for: memory, communication, days, dollars.

What it teaches: all of it can be computed. Bytes on a device are sums over parameters and activations
(scale/needs.py); a step takes as long as its kernels need on the roofline (scale/roofline.py) or its
collectives on the links, whichever is more, and what nothing hides comes on top; the rest is division.

    preset, stage, layout --needs--> bytes held, bytes sent --+
    the real modules --roofline--> FLOP and bytes of kernels -+--> seconds a step -> days, dollars
    device --devices--> memory, FLOP/s, bytes/s --------------+

    python -m scale.plan --preset 2b --devices 8                            # every stage; layouts searched
    python -m scale.plan --preset 8b --devices 16 --stage multitask         # one; and why others do not fit
    python -m scale.plan --preset 30b-a3b --devices 64 --layout.shard 64 --layout.ep 8 --layout.half
    python -m scale.plan --preset 2b --devices 64 --stage sft1 --dry-run    # the real code on fake ranks

    step = max(kernels of all micro-batches / (1 - bubble), collectives behind them) + the rest
    model FLOP utilisation (MFU) = FLOP of one forward and one backward pass / (step * devices * peak)

Assumed, as the paper publishes neither (`Load`): documents of 2,000 tokens (128B tokens / 64M samples),
seven eighths of a row's tokens visual (28 tiles in 8,192), a quarter labelled; in RL prompts and answers
of 1,000 tokens. Memory is of the worst case: rows full of visual tokens, answers as long as they may be.
Checked: tests/test_scale_plan.py. Not measured on a GPU: `python -m bench.gpu` prints both beside each
other.
"""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import functional_call

import pretrain
import rl
import sft
from attention import Segments, attend_inside
from infra.cli import command
from infra.memory import FP32, PATCHES, MicroBatch, meta_model
from scale.devices import ATTAINED_LINKS, DEVICES, Device, device_named
from scale.layout import Layout
from scale.needs import Flow, micro_batches, rank_memory, step_traffic
from scale.roofline import Work, work_of
from stage import BaseStage, RLStage
from vlm import PRESETS, SailVL, token_logprobs

PAPER_STAGES: dict[str, BaseStage] = pretrain.PAPER | sft.PAPER | rl.PAPER
RESERVE = 0.08  # of a device's memory: context, buffers of the transport, fragmentation
HOST_MEMORY = 50e9  # bytes a second of a host's memory, for each of its devices
DAY = 24 * 3600
GIB = 2**30


@dataclass(frozen=True)
class Load:
    """What rows are taken to hold on average."""

    document: int = 2000  # tokens of a document
    visual: float = 0.875  # share of the tokens that are visual
    labelled: float = 0.25  # share of the tokens with a label
    prompt: int = 1000  # tokens of a prompt in RL
    answer: int = 1000  # tokens of an answer in RL
