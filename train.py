"""The loop. Every stage of the recipe, from image pre-training to RL, runs these lines.

What it teaches: stages differ in *what trains, on what, at which rate, with which objective*, and all of that is data (a
`Stage`); what is left is one loop: micro-batches, backward, sum over ranks, clip, step, log. The loss of every micro-batch is
divided by the weight of the whole global batch *before* the backward pass, so any split over accumulation steps or ranks
gives the same gradient.

    batches -> objective(model, batch) -> (loss sum, statistics) -> backward -> clip -> AdaLRS? -> step -> log.jsonl

What a long run needs besides stands in two files of its own: infra/journal.py (log, progress, tracker) and infra/checkpoint.py (save,
resume, SIGTERM). On an accelerator the forward pass runs in bf16 and the weights stay fp32.

Legend: B rows, T tokens a row. An objective returns the *sum* of weighted losses; `batch.weight` is what it is divided by.
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor

import moe
from adalrs import AdaLRS
from infra.checkpoint import Keeper, RunDirectory, resumable
from infra.journal import Journal
from infra.stopping import StopRequested
from llm import LLM, Block
from optim import Muon
from packing import Batch
from scale import parallel
from vit import VisionBlock, ViT
from vlm import SailVL

PARTS = {"vision": "vision_model", "adapter": "mlp1", "llm": "language_model"}
Objective = Callable[[torch.nn.Module, Batch], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Stage:
    """One row of the recipe. Derived: steps * rows * length = tokens seen (padding included)."""

    name: str = ""
    trains: tuple[str, ...] = ("vision", "adapter", "llm")  # the other parts are frozen
    mixture: dict[str, float] = field(
        default_factory=dict
    )  # task -> weight; "text" is the share of text-only samples
    steps: int = 100
    rows: int = 8  # packed rows a step, over all ranks
    length: int = 512  # tokens a row
    accumulate: int = 1  # micro-batches a step on each rank; 0: as many as rows (not in RL)
    lr: float = 3e-3  # peak learning rate
    schedule: str = (
        "cosine"  # constant, cosine (to a tenth) or wsd (linear to zero over the last fifth)
    )
    warmup: float = 0.05  # share of the steps
    optimizer: str = "muon"  # muon (matrices; AdamW for the rest) or adamw
    weight_decay: float = 0.0  # of matrices only
    lr_scale: dict[str, float] = field(
        default_factory=dict
    )  # part -> multiple of the rate; parts not named: 1
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    clip: float = 1.0  # gradient norm
    adalrs: bool = False  # search the rate while training
    adalrs_k: int = 0  # steps of a window; 0: from the measured noise
    adalrs_window: tuple[float, float] = (0.1, 0.4)  # share of the run in which to search
    adalrs_cautious: bool = False  # lower it only for harm (adalrs.py; ours)
    think: float = 0.0  # share of samples that ask for thinking
    turns: int = 0  # questions per picture; 0: as many as the kind of picture usually gets
    everything: bool = False  # supervise all text, not only answers
    weighting: str = "token"  # loss weight of a token: token, sample or sqrt
    balance: float = 0.001  # coefficient of the expert balance loss (MoE only)
    router_z: float = 0.0  # coefficient of the router z-loss (MoE only)
    expert_bias_rate: float = 0.0  # balance by a bias on the choice instead: its step (MoE only, for comparison; not saved)
    precision: str = "auto"  # of the forward pass: fp32, bf16 (weights stay fp32), or auto: bf16 on an accelerator
    recompute: bool = (
        False  # keep no activations inside blocks; run each again in the backward pass
    )
    compile: bool = False  # torch.compile each block
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step by the schedule alone."""
        warm = max(1, int(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        t = (step - warm) / max(1, self.steps - warm)
        if self.schedule == "cosine":
            return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * t)))
        if self.schedule == "wsd":
            return self.lr * min(1.0, 5 * (1 - t))
        if self.schedule == "constant":
            return self.lr
        raise ValueError(f"unknown schedule {self.schedule!r}; choose constant, cosine or wsd")


def answers(
    model: SailVL, batch: Batch, balance: float = 0.0, z: float = 0.0, expert_bias_rate: float = 0.0
) -> tuple[Tensor, dict]:
    """The objective of all supervised stages: -sum of weight * log p(label) over the labelled positions of a packed batch.

    For a MoE, adds `balance` times the balance loss and `z` times the router z-loss, scaled so that dividing by the weight
    leaves their coefficients, and logs how the experts are used.
    """
    routing: list | None = [] if model.config.text.num_experts else None
    at = (batch.labels.reshape(-1) >= 0).nonzero()[:, 0]
    logprobs = model.logprobs(
        batch.ids,
        batch.images,
        batch.positions,
        batch.segments,
        at,
        batch.labels.reshape(-1)[at],
        routing=routing,
    )
    weights = batch.weights.reshape(-1)[at]
    losses = -logprobs * weights
    loss = losses.sum()
    stats = {"loss": float(loss.detach()), "tasks": by_task(losses.detach(), weights, at, batch)}
    if routing:
        used, weight = expert_use(routing, batch, model.image_token_id)
        layers = [block.mlp for block in model.language_model.model.layers]
        aux = weight * moe.balance_loss(
            routing, batch.real(), (used.sum((0, 1)), float(used.sum()) / layers[0].top_k)
        )
        stats["balance"] = float(aux.detach())
        for kind, entropies in zip(("text", "vision"), moe.entropy(used).tolist()):
            stats |= {f"{kind}_entropy_{i}": h * batch.weight for i, h in enumerate(entropies)}
        loss = loss + balance * aux
        if z:
            loss = loss + z * moe.z_loss(routing, batch.real()) * batch.weight
        if expert_bias_rate and torch.is_grad_enabled():
            moe.update_expert_bias(layers, used.sum(0), expert_bias_rate)
    return loss, stats


def by_task(
    losses: Tensor, weights: Tensor, at: Tensor, batch: Batch
) -> dict[str, tuple[float, float]]:
    """(sum of losses, sum of weights) of each task, for losses (n,) at the flat positions `at` (n,)."""
    document = torch.bucketize(at, batch.segments.cu[1:].to(at.dtype), right=True)
    sums = losses.new_zeros(len(batch.owners), 2).index_add_(
        0, document, torch.stack((losses, weights), 1)
    )
    found: dict[str, tuple[float, float]] = {}
    for task, (loss, weight) in zip(batch.owners, sums.tolist()):
        if weight:
            before = found.get(task, (0.0, 0.0))
            found[task] = before[0] + loss, before[1] + weight
    return found


def expert_use(routing: list, batch: Batch, image_token: int) -> tuple[Tensor, float]:
    """How many slots went to each expert, (2: text and vision, layers, E), and the batch's weight, over all ranks. (Over the
    micro-batches of a step it is not summed: the gradient of the first would have to wait for the routing of the last.)"""
    image = batch.ids.reshape(-1) == image_token
    used = torch.stack(
        [
            moe.tokens_per_expert(routing, batch.real() & ~image),
            moe.tokens_per_expert(routing, image),
        ]
    )
    if not torch.is_grad_enabled():  # an evaluation, which ranks need not do together
        return used, batch.weight
    *everyone, weight = parallel.total(*used.flatten().tolist(), batch.weight)
    return torch.tensor(everyone, device=used.device).view_as(used), weight


def freeze(model: torch.nn.Module, trains: tuple[str, ...]) -> list[Tensor]:
    """Train these parts only; returns their parameters. Frozen parameters get no gradient and no optimizer state."""
    unknown = set(trains) - set(PARTS)
    if unknown:
        raise ValueError(
            f"stage trains unknown part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}"
        )
    for part, module in PARTS.items():
        if hasattr(model, module):
            getattr(model, module).requires_grad_(part in trains)
    return [p for p in model.parameters() if p.requires_grad]


def frozen(model: torch.nn.Module, optimizers: list) -> str:
    """One line: what trains, and what freezing the rest saves (a gradient and each optimizer's moments in fp32)."""
    state = sum(
        4 * p.numel() * (2 if isinstance(o, Muon) else 3)
        for o in optimizers
        for g in o.param_groups
        for p in g["params"]
    )
    some, every = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or all_)
        for all_ in (False, True)
    )
    return (
        f"trains {some / 1e6:.2f} of {every / 1e6:.2f} M parameters; gradients and optimizer state {state / 2**20:.1f} MiB, "
        f"{state * (every - some) / max(some, 1) / 2**20:.1f} MiB saved by what is frozen"
    )


def part_of(name: str) -> str:
    """The part that a parameter belongs to: vision, adapter, llm, or head (the image stage's)."""
    return next((part for part, module in PARTS.items() if name.startswith(module)), "head")


def make_optimizers(model: torch.nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest (embeddings, norms, stacked experts).

    Muon is our choice for the toy's pre-training (the paper names AdamW for its post-training only); its update is scaled to
    AdamW's size, so that one learning rate serves both. Weight decay touches matrices only. A group's "scale" is its part's
    `lr_scale`. Raises ValueError for an unknown optimizer or part.
    """
    if stage.optimizer not in ("muon", "adamw"):
        raise ValueError(f"unknown optimizer {stage.optimizer!r}; choose muon or adamw")
    if unknown := set(stage.lr_scale) - set(PARTS):
        raise ValueError(
            f"--lr-scale for unknown part {min(unknown)!r}; choose from {', '.join(PARTS)}"
        )
    outside = ("embed_tokens", "lm_head", "pos_embed", "patchifier")
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = (
                stage.optimizer == "muon" and p.ndim == 2 and not any(o in name for o in outside)
            )
            groups[hidden, p.ndim >= 2, stage.lr_scale.get(part_of(name), 1.0)].append(p)
    made = lambda muon: [
        {"params": ps, "weight_decay": stage.weight_decay if matrix else 0.0, "scale": scale}
        for (hidden, matrix, scale), ps in sorted(groups.items(), key=lambda g: g[0], reverse=True)
        if hidden == muon
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if made(False):
        optimizers.append(
            torch.optim.AdamW(made(False), lr=stage.lr, betas=stage.betas, fused=True)
        )
    if made(True):
        optimizers.append(Muon(made(True), lr=stage.lr))
    return optimizers


def prepare(model: torch.nn.Module, stage: Stage) -> None:
    """Recomputation and compilation, block by block: they change memory and speed, not names."""
    for m in model.modules():
        if isinstance(m, (LLM, ViT)):
            m.recompute = stage.recompute
        if stage.compile and isinstance(m, (Block, VisionBlock)):
            m.compile(dynamic=True)


def precision(stage: Stage, device: str) -> torch.autocast:
    kind = str(device).partition(":")[0]
    if stage.precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"unknown precision {stage.precision!r}; choose auto, fp32 or bf16")
    return torch.autocast(
        kind,
        torch.bfloat16,
        enabled=stage.precision == "bf16" or (stage.precision == "auto" and kind != "cpu"),
    )


@dataclass
class Run:
    """What a finished stage leaves: its log (a dict per step), AdaLRS's decisions, steps that were skipped."""

    log: list[dict] = field(default_factory=list)
    decisions: list[dict] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0

    def tail(self, key: str = "loss", share: float = 0.1) -> float:
        """Mean of a logged value over the last tenth of the stage."""
        values = [row[key] for row in self.log if key in row]
        n = max(1, int(len(values) * share))
        return sum(values[-n:]) / n


def train(
    model: torch.nn.Module,
    stage: Stage,
    data: Iterator[list[Batch]],
    objective: Objective,
    world=parallel.Ranks(),
    directory: Path | RunDirectory | None = None,
    patience: int = 5,
) -> Run:
    """Run one stage in place. Writes `log.jsonl` (one line a step, always) into `directory` when given; a `RunDirectory` also
    keeps checkpoints and resumes from them, leaves on SIGTERM, and checks the model on its schedule.

    A step with a non-finite loss or gradient changes nothing, is counted, and stops the run with ValueError after `patience`
    in a row. Raises ValueError when the data ends early.
    """
    parameters = (
        freeze(model, stage.trains) if isinstance(model, SailVL) else list(model.parameters())
    )
    prepare(model, stage)
    optimizers = make_optimizers(model, stage)
    search = (
        AdaLRS(
            parameters,
            optimizers,
            stage.steps,
            stage.adalrs_k or None,
            stage.adalrs_window,
            cautious=stage.adalrs_cautious,
        )
        if stage.adalrs
        else None
    )
    home, data = directory if isinstance(directory, RunDirectory) else None, resumable(data)
    keeper = Keeper(home, model, optimizers, search, data, world) if home else None
    saved = keeper.resume() if keeper else {}
    if home and world.main:
        print(frozen(model, optimizers))
    step, bad, started = saved.get("step", 0), 0, time.time()
    journal = Journal(stage, directory, world.main, step, saved.get("executed", 0))
    while step < stage.steps:
        try:
            micro = next(data, None)
        except StopRequested:
            journal.sync()
            keeper.leave()
        if micro is None:
            raise ValueError(f"stage {stage.name}: the data ended at step {step} of {stage.steps}")
        rate = stage.rate(step) * (search.scale if search else 1.0)
        row = {"step": step, "lr": rate} | one_step(
            model, optimizers, micro, objective, rate, stage, world
        )
        bad = bad + 1 if row["skipped"] else 0
        if bad >= patience:
            raise ValueError(
                f"stage {stage.name}: {bad} steps in a row with a non-finite loss or gradient, the last at step "
                f"{step} (rate {rate:.2e}); lower --lr or look at the data"
            )
        step = search.observe(row["loss"]) if search else step + 1
        if home and home.check and home.check_every and step % home.check_every == 0:
            row["check"] = home.check(step)
        journal.write(row, step)
        if keeper:
            executed = len(journal.rows)
            told = keeper.told_to_stop()
            if keeper.due(executed) or told or step == stage.steps:
                journal.sync()
                keeper.save(step, executed, row.get("check", {}).get("score"))
            if told:
                keeper.stop(step)
            keeper.mark(step, executed)
    journal.close()
    if keeper:
        keeper.close()
    return Run(
        journal.rows,
        search.log() if search else [],
        sum(row["skipped"] for row in journal.rows),
        time.time() - started,
    )


def one_step(
    model, optimizers, micro: list[Batch], objective: Objective, rate: float, stage: Stage, world
) -> dict:
    """Gradient of a global batch, clipped, applied. Returns loss, loss per task, gradient norms, tokens and images a second
    and the objective's statistics. A loss or gradient that is not finite on any rank skips the step on all of them."""
    began = time.time()
    (weight,) = parallel.total(sum(b.weight for b in micro))
    sums: dict[str, float] = defaultdict(float)
    tasks = []
    for batch in micro:
        with precision(stage, world.device):
            loss, stats = objective(model, batch.to(world.device))
        (loss / max(weight, 1e-8)).backward()
        tasks.append(stats.pop("tasks", {}))
        for key, value in stats.items():
            sums[key] += value
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parallel.sum_gradients([p for _, p in named])
    norm, norms = clip_gradients(named, stage.clip)
    seen = parallel.total(
        *sums.values(),
        sum(b.ids.numel() for b in micro),
        sum(len(b.images) for b in micro if b.images is not None),
    )
    row = {key: value / max(weight, 1e-8) for key, value in zip(sums, seen)}
    finite = math.isfinite(row["loss"]) and math.isfinite(norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    seconds = time.time() - began
    return row | {
        "tasks": mean_by_task(parallel.gather(tasks)),
        "grad_norm": norm,
        "grad_norms": norms,
        "skipped": not finite,
        "filled": sum(b.filled for b in micro) / len(micro),
        "tokens_per_second": seen[-2] / seconds,
        "images_per_second": seen[-1] / seconds,
    }


def clip_gradients(named: list[tuple[str, Tensor]], clip: float) -> tuple[float, dict[str, float]]:
    """Scale all gradients so that their joint norm is at most `clip`. Returns the norm before, and that of each part."""
    named = [(name, p) for name, p in named if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(p.grad) for _, p in named])
    total = torch.linalg.vector_norm(norms)
    torch.nn.utils.clip_grads_with_norm_([p for _, p in named], clip, total)
    parts: dict[str, float] = defaultdict(float)
    for (name, _), norm in zip(named, norms.tolist()):
        parts[part_of(name)] += norm**2
    return float(total), {part: math.sqrt(square) for part, square in parts.items()}


def mean_by_task(found: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Loss per unit of weight of each task, over all micro-batches of all ranks."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in found:
        for task, (loss, weight) in part.items():
            sums[task][0] += loss
            sums[task][1] += weight
    return {task: loss / weight for task, (loss, weight) in sorted(sums.items())}
