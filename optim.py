"""Muon: momentum whose update is made orthogonal, so that every direction of a matrix moves equally far.

What it teaches: an update of a matrix has singular values that span orders of magnitude, and training follows the few large
ones. Muon replaces U S V^T by (nearly) U V^T, by five Newton-Schulz steps: an odd polynomial of the matrix whose fixed region
is around 1, made of nothing but matrix products. On a small model those products are a quarter of a training step, so here
matrices of one shape go through them as one batch, and the matrices are divided over the ranks, which send each other the
results. torch.optim.Muon does one matrix after the other on every rank; the tests find the same bits in both.

Legend: (m, n) one matrix, m <= n inside the iteration. Sources: Jordan 2024 (Muon), Liu et al. 2025 ("Muon is Scalable for LLM
Training": the factor 0.2 sqrt(max(m, n)), which makes the update as large as AdamW's). Muon is our choice for the toy; the
paper names AdamW.
"""

import math
from itertools import groupby

import torch
from torch import Tensor

from scale import parallel

A, B, C = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan's: x -> A x + B x^3 + C x^5 on the singular values, as steep at 0 as may be


def orthogonal(updates: list[Tensor]) -> list[Tensor]:
    """(m, n) matrices in bf16, neighbours of one shape best -> the same with singular values near 1."""
    found = []
    for (m, n), same in groupby(updates, key=lambda u: u.shape):
        x = torch.stack(list(same))  # (batch, m, n)
        x = x.mT if m > n else x
        x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
        found += (x.mT if m > n else x).unbind()
    return found


class Muon(torch.optim.Optimizer):
    """For the matrices of hidden layers; embeddings, norms and biases want AdamW. Raises ValueError for anything but matrices.

    The state (one momentum per matrix) is whole on every rank, so a checkpoint fits any number of ranks.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if odd := [tuple(p.shape) for g in self.param_groups for p in g["params"] if p.ndim != 2]:
            raise ValueError(f"Muon is for matrices, not for a parameter of shape {odd[0]}")

    @torch.no_grad()
    def step(self) -> None:
        moved = []  # (parameter, its group, Nesterov's look-ahead)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                    mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    moved.append((p, group, p.grad.lerp(mean, group["momentum"]).bfloat16()))
        moved.sort(key=lambda item: item[2].shape)
        updates = [update for *_, update in moved]
        costs = [u.numel() * min(u.shape) for u in updates]  # multiplications, up to a factor
        for (p, group, _), update in zip(moved, parallel.divide(updates, costs, orthogonal)):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * (0.2 * math.sqrt(max(p.shape))))
