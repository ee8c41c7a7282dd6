"""The optimizer: Muon for the matrices, AdamW for the rest, gradients clipped as one vector.

What it teaches: an update of a matrix has singular values that span orders of magnitude, and training
follows the few large ones. Muon replaces U S V^T by (nearly) U V^T, by five Newton-Schulz steps: an odd
polynomial of the matrix whose fixed region is around 1, made of nothing but matrix products, so that
every direction of a matrix moves equally far. On a small model those products are a tenth of a
training step, so here matrices of one shape go through them as one batch, in the precision that the
device multiplies fastest, and the matrices are divided over the ranks, which send each other the results.
torch.optim.Muon does one matrix after the other, in bf16, on every rank; in bf16 the tests find the same
bits in both.

    model.named_parameters() -> hidden matrices -> Muon
                             -> embeddings, head, norms, biases, stacked experts -> AdamW

Legend: (m, n) one matrix, m <= n inside the iteration.
Sources: Jordan 2024 (Muon), Liu et al. 2025 ("Muon is Scalable for LLM Training": the factor
0.2 sqrt(max(m, n)), which makes the update as large as AdamW's). Muon is our choice for the toy; where
the paper names AdamW, the stage says AdamW.
"""

import math
from collections import defaultdict
from itertools import groupby

import torch
from torch import Tensor, nn

from scale import parallel
from stage import PARTS, BaseStage

# Jordan's coefficients: x -> A x + B x^3 + C x^5 on the singular values, as steep at 0 as may be.
A = 3.4445
B = -4.7750
C = 2.0315

# Matrices that are no hidden layer.
OUTSIDE = ("embed_tokens", "lm_head", "pos_embed", "patchifier")


# ------------------------------------------------------------------------------------------- Muon


def orthogonal(updates: list[Tensor]) -> list[Tensor]:
    """(m, n) matrices, neighbours of one shape best -> the same with singular values near 1."""
    results = []
    for (m, n), same_shape in groupby(updates, key=lambda update: update.shape):
        # One batch for all matrices of a shape, lying on their longer side
        if m > n:
            x = torch.stack([update.T for update in same_shape])
        else:
            x = torch.stack(list(same_shape))  # (batch, m, n)

        # Newton-Schulz wants singular values of at most 1
        norms = x.flatten(1).norm(dim=1).clamp(min=1e-7)
        x = x / norms[:, None, None]
        for _ in range(5):
            gram = x @ x.mT  # (batch, m, m)
            polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
            x = torch.baddbmm(x, polynomial, x, beta=A)

        if m > n:
            x = x.mT
        results += x.unbind()
    return results


def fast_precision(matrix: Tensor) -> torch.dtype:
    """What Newton-Schulz runs in: bf16, which is accurate enough, where a device is made for it.

    A CPU multiplies its own precision twice as fast (AVX-512; simplified: one with AMX does not).
    """
    return matrix.dtype if matrix.is_cpu else torch.bfloat16


class Muon(torch.optim.Optimizer):
    """For the matrices of hidden layers; embeddings, norms and biases want AdamW.

    The state is one momentum per matrix, whole or sharded as the matrix is. Raises ValueError for a
    parameter that is no matrix.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        f"Muon is for matrices, not for a parameter of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self) -> None:
        # Momentum, and Nesterov's look-ahead along it
        moving = []  # (parameter, its group, look-ahead)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                look_ahead = p.grad.lerp(momentum, group["momentum"])
                moving.append((p, group, look_ahead.to(fast_precision(look_ahead))))

        # Orthogonal updates: each rank does its share of about equal cost, and sends it to the others
        moving.sort(key=lambda item: item[2].shape)
        look_aheads = [look_ahead for _, _, look_ahead in moving]
        costs = [u.numel() * min(u.shape) for u in look_aheads]  # multiplications, up to a factor
        updates = parallel.divide(look_aheads, costs, orthogonal)

        # The step itself, as large as AdamW's would be
        for (p, group, _), update in zip(moving, updates):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * (0.2 * math.sqrt(max(p.shape))))


# ------------------------------------------------------------------------------ what trains, and how


def part_of(name: str) -> str:
    """The part that a parameter belongs to: vision, adapter, llm, or head (the image stage's)."""
    for part, module in PARTS.items():
        if name.startswith(module):
            return part
    return "head"


def freeze_all_but(model: nn.Module, trains: tuple[str, ...]) -> list[Tensor]:
    """Train these parts only; returns their parameters.

    Frozen parameters get no gradient and no optimizer state. Raises ValueError for an unknown part.
    """
    unknown = sorted(set(trains) - set(PARTS))
    if unknown:
        raise ValueError(f"--trains {unknown[0]}: unknown part; choose from {', '.join(PARTS)}")
    for part, module in PARTS.items():
        if hasattr(model, module):
            getattr(model, module).requires_grad_(part in trains)
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizers(model: nn.Module, stage: BaseStage) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Weight decay touches matrices only. A group's "scale" is its part's `lr_scale`. Raises ValueError
    for an unknown optimizer or part.
    """
    if stage.optimizer not in ("muon", "adamw"):
        raise ValueError(f"--optimizer {stage.optimizer}: choose muon or adamw")
    unknown = sorted(set(stage.lr_scale) - set(PARTS))
    if unknown:
        raise ValueError(
            f"--lr-scale for unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}"
        )

    # Parameters that are stepped alike: (by Muon?, a matrix?, multiple of the rate)
    alike: dict[tuple[bool, bool, float], list[Tensor]] = defaultdict(list)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        hidden_matrix = p.ndim == 2 and not any(word in name for word in OUTSIDE)
        by_muon = stage.optimizer == "muon" and hidden_matrix
        scale = stage.lr_scale.get(part_of(name), 1.0)
        alike[by_muon, p.ndim >= 2, scale].append(p)

    groups: dict[bool, list[dict]] = {False: [], True: []}
    for (by_muon, is_matrix, scale), parameters in sorted(
        alike.items(), key=lambda item: item[0], reverse=True
    ):
        decay = stage.weight_decay if is_matrix else 0.0
        groups[by_muon].append({"params": parameters, "weight_decay": decay, "scale": scale})

    # At most two optimizers, none without parameters
    optimizers: list[torch.optim.Optimizer] = []
    if groups[False]:
        optimizers.append(
            torch.optim.AdamW(groups[False], lr=stage.lr, betas=stage.betas, fused=True)
        )
    if groups[True]:
        optimizers.append(Muon(groups[True], lr=stage.lr))
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """The rate of the next step, each group's own multiple of it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]


def training_memory(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> str:
    """One line: what trains on this rank, and what freezing the rest saves (gradients and moments, fp32)."""
    # Parameters, and the bytes that each trained one takes beside itself
    trained = sum(parallel.local(p).numel() for p in model.parameters() if p.requires_grad)
    total = sum(parallel.local(p).numel() for p in model.parameters())
    state_bytes = 0
    for optimizer in optimizers:
        copies = 2 if isinstance(optimizer, Muon) else 3  # the gradient, and one or two moments
        for group in optimizer.param_groups:
            state_bytes += sum(4 * copies * parallel.local(p).numel() for p in group["params"])
    saved = state_bytes * (total - trained) / max(trained, 1)
    return (
        f"on this rank: trains {trained / 1e6:.2f} of {total / 1e6:.2f} M parameters; gradients and "
        f"optimizer state {state_bytes / 2**20:.1f} MiB, {saved / 2**20:.1f} MiB saved by what is frozen"
    )


def clip_gradients(model: nn.Module, limit: float) -> tuple[float, dict[str, float]]:
    """Scale all gradients so that their joint norm is at most `limit`.

    Returns the norm before, and that of each part. Of sharded gradients every rank measures what it
    holds; the sums of squares are of all ranks.
    """
    # What has a gradient here
    names = []
    gradients = []
    shares = []
    for name, p in model.named_parameters():
        if p.grad is not None:
            names.append(name)
            gradients.append(parallel.local(p.grad))
            shares.append(parallel.share_of(p.grad))

    # Their norms: the only wait for the device
    norms: list[float] = []
    if gradients:
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).tolist()

    # Squares by part, and how many gradients each part has, over all ranks
    squares = dict.fromkeys((*PARTS, "head"), 0.0)
    found = dict.fromkeys(squares, 0.0)
    for name, norm, share in zip(names, norms, shares):
        squares[part_of(name)] += share * norm**2
        found[part_of(name)] += 1
    sums = parallel.total_of_parts(*squares.values(), *found.values())
    by_part = {}
    for part, square, count in zip(squares, sums, sums[len(squares) :]):
        if count:
            by_part[part] = math.sqrt(square)

    # One factor for all
    total = math.sqrt(sum(sums[: len(squares)]))
    if total > limit:
        torch._foreach_mul_(gradients, limit / (total + 1e-6))
    return total, by_part
