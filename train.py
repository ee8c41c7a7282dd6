"""The loop. Every stage of the recipe, from image pre-training to RL, runs these lines.

What it teaches: stages differ in *what trains, on what, at which rate, with which objective*, and all of that is data (a
`Stage`); what is left is one loop: micro-batches, backward, sum over ranks, clip, step, log. The loss of every micro-batch is
divided by the weight of the whole global batch *before* the backward pass, so any split over accumulation steps or ranks
gives the same gradient.

    batches -> objective(model, batch) -> (loss sum, statistics) -> backward -> clip -> AdaLRS? -> step -> log.jsonl

Legend: B rows, T tokens a row. An objective returns the *sum* of weighted losses; `batch.weight` is what it is divided by.
"""
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import moe
import parallel
from adalrs import AdaLRS
from packing import Batch
from vlm import SailVL

PARTS = {"vision": "vision_model", "adapter": "mlp1", "llm": "language_model"}
Objective = Callable[[torch.nn.Module, Batch], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Stage:
    """One row of the recipe. Derived: steps * rows * length = tokens seen (padding included)."""
    name: str = ""
    trains: tuple[str, ...] = ("vision", "adapter", "llm")  # the other parts are frozen
    mixture: dict[str, float] = field(default_factory=dict)  # task -> weight; "text" is the share of text-only samples
    steps: int = 100
    rows: int = 8  # packed rows a step, over all ranks
    length: int = 512  # tokens a row
    accumulate: int = 1  # micro-batches a step on each rank
    lr: float = 3e-3  # peak learning rate
    schedule: str = "cosine"  # constant, cosine (to a tenth) or wsd (linear to zero over the last fifth)
    warmup: float = 0.05  # share of the steps
    optimizer: str = "muon"  # muon (matrices; AdamW for the rest) or adamw
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    clip: float = 1.0  # gradient norm
    adalrs: bool = False  # search the rate while training
    adalrs_k: int = 0  # steps of a window; 0: from the measured noise
    adalrs_window: tuple[float, float] = (0.1, 0.4)  # share of the run in which to search
    think: float = 0.0  # share of samples that ask for thinking
    turns: int = 0  # questions per picture; 0: as many as the kind of picture usually gets
    everything: bool = False  # supervise all text, not only answers
    weighting: str = "token"  # loss weight of a token: token, sample or sqrt
    balance: float = 0.001  # coefficient of the expert balance loss (MoE only)
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


def answers(model: SailVL, batch: Batch, balance: float = 0.0) -> tuple[Tensor, dict[str, float]]:
    """The objective of all supervised stages: -sum of weight * log p(label) over the labelled positions of a packed batch.

    For a MoE, adds the balance loss (over real tokens), scaled so that dividing by the weight leaves its coefficient.
    """
    routing: list | None = [] if model.config.text.num_experts else None
    at = (batch.labels.reshape(-1) >= 0).nonzero()[:, 0]
    logprobs = model.logprobs(batch.ids, batch.images, batch.positions, batch.segments, at, batch.labels.reshape(-1)[at],
                              routing=routing)
    loss = -(logprobs * batch.weights.reshape(-1)[at]).sum()
    stats = {"loss": float(loss.detach())}
    if routing:
        aux = moe.balance_loss(routing, batch.real())
        stats["balance"] = float(aux.detach()) * batch.weight
        loss = loss + balance * aux * batch.weight
    return loss, stats


def freeze(model: torch.nn.Module, trains: tuple[str, ...]) -> list[Tensor]:
    """Train these parts only; returns their parameters. Frozen parameters get no gradient and no optimizer state."""
    unknown = set(trains) - set(PARTS)
    if unknown:
        raise ValueError(f"stage trains unknown part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    for part, module in PARTS.items():
        if hasattr(model, module):
            getattr(model, module).requires_grad_(part in trains)
    return [p for p in model.parameters() if p.requires_grad]


def make_optimizers(model: torch.nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest (embeddings, norms, stacked experts).

    Muon is our choice for the toy's pre-training (the paper names AdamW for its post-training only); its update is scaled to
    AdamW's size, so that one learning rate serves both. Weight decay touches matrices only.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    outside = ("embed_tokens", "lm_head", "pos_embed", "patchifier")
    hidden = [p for n, p in named if p.ndim == 2 and not any(o in n for o in outside)] if stage.optimizer == "muon" else []
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": stage.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    made = [torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.lr, betas=stage.betas, fused=True)] if rest else []
    if hidden:
        made.append(torch.optim.Muon(hidden, lr=stage.lr, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"))
    if stage.optimizer not in ("muon", "adamw"):
        raise ValueError(f"unknown optimizer {stage.optimizer!r}; choose muon or adamw")
    return made


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


def train(model: torch.nn.Module, stage: Stage, data: Iterator[list[Batch]], objective: Objective, world=parallel.World(),
          directory: Path | None = None, patience: int = 5) -> Run:
    """Run one stage in place. Writes `log.jsonl` (one line a step, always) into `directory` when given.

    A step with a non-finite loss or gradient changes nothing, is counted, and stops the run with ValueError after `patience`
    in a row. Raises ValueError when the data ends early.
    """
    parameters = freeze(model, stage.trains) if isinstance(model, SailVL) else list(model.parameters())
    optimizers = make_optimizers(model, stage)
    search = AdaLRS(parameters, optimizers, stage.steps, stage.adalrs_k or None, stage.adalrs_window) if stage.adalrs else None
    run, step, bad, started = Run(), 0, 0, time.time()
    log = None
    if directory is not None and world.main:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "stage.json").write_text(json.dumps(asdict(stage), indent=1) + "\n")
        log = open(directory / "log.jsonl", "w")
    bar = tqdm(total=stage.steps, desc=f"{stage.name:>18s}", disable=not world.main, mininterval=1.0, ncols=110)
    while step < stage.steps:
        micro = next(data, None)
        if micro is None:
            raise ValueError(f"stage {stage.name}: the data ended at step {step} of {stage.steps}")
        rate = stage.rate(step) * (search.scale if search else 1.0)
        row = one_step(model, parameters, optimizers, micro, objective, rate, stage.clip, world)
        bad = 0 if row["finite"] else bad + 1
        run.skipped += not row.pop("finite")
        if bad >= patience:
            raise ValueError(f"stage {stage.name}: {bad} steps in a row with a non-finite loss or gradient, the last at step "
                             f"{step} (rate {rate:.2e}); lower --lr or look at the data")
        run.log.append({"step": step, "lr": rate} | row)
        if log:
            log.write(json.dumps(run.log[-1]) + "\n")
        at = step
        step = search.observe(row["loss"]) if search else step + 1
        bar.update(step - at)
        bar.set_postfix_str(f"loss {row['loss']:.3f} lr {rate:.1e}", refresh=False)
    bar.close()
    if log:
        log.close()
    run.decisions, run.seconds = search.log() if search else [], time.time() - started
    return run


def one_step(model, parameters, optimizers, micro: list[Batch], objective: Objective, rate: float, clip: float, world) -> dict:
    """Gradient of a global batch, clipped, applied. Returns loss, gradient norm, tokens a second and the statistics."""
    began = time.time()
    weight, = parallel.total(sum(b.weight for b in micro))
    sums: dict[str, float] = {}
    for batch in micro:
        loss, stats = objective(model, batch.to(world.device))
        (loss / max(weight, 1e-8)).backward()
        for key, value in stats.items():
            sums[key] = sums.get(key, 0.0) + value
    parallel.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    values = parallel.total(*sums.values(), sum(b.ids.numel() for b in micro))
    row = {key: value / max(weight, 1e-8) for key, value in zip(sums, values)}
    row["finite"] = math.isfinite(row["loss"]) and math.isfinite(norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if row["finite"]:
            optimizer.step()
        optimizer.zero_grad()
    filled = sum(b.filled for b in micro) / len(micro)
    return row | {"grad_norm": norm, "filled": filled, "tokens_per_second": values[-1] / (time.time() - began)}
