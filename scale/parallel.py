"""Several processes, one model: the only file that knows about ranks.

What it teaches: data parallelism is one sum. Every rank holds the same weights and its share of the global batch; after the
backward pass the gradients are summed. Losses are already divided by the *global* weight, so a sum is exact however the
tokens fall. With one process nothing is initialised and every function returns at once: the loop has no branches.

    torchrun --nproc-per-node 2 pretrain.py --stage multitask

Simplified here: weights are replicated, and gradients travel in one bucket after the backward pass. `divide` is the other
thing that ranks do for each other: work on replicated tensors that need be done only once.
"""

import os
from dataclasses import dataclass
from itertools import accumulate
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        return self.rank == 0


def start() -> Ranks:
    """Join torchrun's process group if there is one. Chooses the device: CUDA, another accelerator, else the CPU."""
    kind = (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )
    kind = (
        "cpu" if kind == "mps" else kind
    )  # a model of the toy's size is faster there, and Muon is untested on MPS
    if "WORLD_SIZE" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
        return Ranks(device=kind)
    local = int(os.environ["LOCAL_RANK"])
    device = kind if kind == "cpu" else f"{kind}:{local}"
    if kind != "cpu":
        torch.accelerator.set_device_index(local)
    if not dist.is_initialized():
        dist.init_process_group()
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(*values: float) -> list[float]:
    """Sum over ranks of each value, in float64."""
    if not dist.is_initialized():
        return list(values)
    t = torch.tensor(values, dtype=torch.float64)
    t = t.cuda() if dist.get_backend() == "nccl" else t
    dist.all_reduce(t)
    return t.tolist()


def gather(values: list) -> list:
    """Python objects of all ranks, concatenated in rank order (metadata and rollout statistics, never weights)."""
    if not dist.is_initialized():
        return values
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return [v for part in everyone for v in part]


def divide(
    values: list[Tensor], costs: list[float], work: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """work(values), each rank doing a run of neighbours of about equal cost and sending what it made to the others.

    Results have the shapes and the type of their values, which every rank has alike."""
    rank, size = place()
    if size == 1 or not values:
        return work(values)
    ends = list(accumulate(costs))
    owners = [
        min(size - 1, int(size * (end - cost / 2) / ends[-1])) for end, cost in zip(ends, costs)
    ]
    shares = [[v for v, owner in zip(values, owners) if owner == r] for r in range(size)]
    made = work(shares[rank])
    for r, share in enumerate(shares):
        if share:
            bucket = torch.cat(
                [v.flatten() for v in (made if r == rank else share)]
            )  # of another rank: overwritten
            dist.broadcast(bucket.view(torch.uint8), r)
            shares[r] = [
                part.view_as(v) for part, v in zip(bucket.split([v.numel() for v in share]), share)
            ]
    return [v for share in shares for v in share]


def sum_gradients(parameters: list[Tensor]) -> None:
    """Sum the gradients of all ranks in place. A rank without a gradient for a parameter contributes zero."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(bucket)
    for p, part in zip(parameters, bucket.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))
