"""The loop. Every stage of the recipe, from image pre-training to RL, runs these lines.

What it teaches: stages differ in data, and the data is a `Stage`; what is left is one loop: micro-batches,
backward, sum over ranks, clip, step, log. The loss of every micro-batch is divided by the weight of the
whole global batch *before* the backward pass, so any split over accumulation steps or ranks gives the
same gradient (the losses of a MoE's router excepted: objective.router_losses).

    next(data) -> objective(model, batch, stage) -> backward -> sum over ranks -> clip -> step -> log.jsonl
                                                                           AdaLRS? may take steps back

What a long run needs besides stands in two files of its own: infra/journal.py (log, progress, tracker)
and infra/keeper.py (save, resume, SIGTERM). On an accelerator the forward pass runs in bf16 and the
weights stay fp32. When AdaLRS begins a trial or takes one back, weights and optimizer go back; the data
does *not*: training goes on with the samples that come next.

Legend: an objective returns the *sum* of its weighted losses; `batch.weight` is what it is divided by.
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Sequence

import torch
from torch import Tensor, nn

import moe
from adalrs import AdaLRS
from data.steps import weight_of
from infra.device import half_by_default
from infra.journal import Journal
from infra.keeper import Keeper, resumable
from infra.run_directory import RunDirectory
from infra.stopping import StopRequested
from llm import LLM, Block
from objective import OBJECTIVES, Objective, Statistics, fetch, loss_by_task, mean_by_task
from optim import clip_gradients, freeze_all_but, make_optimizers, set_rate, training_memory
from packing import Batch
from scale import parallel
from scale.parallel import Ranks
from scale.pipeline import Staged, Work
from scale.shard import begin_micro_batch
from stage import BaseStage
from vit import VisionBlock, ViT
from vlm import SailVL


@dataclass
class Run:
    """What a finished stage leaves: its log (a dict per executed step) and AdaLRS's decisions."""

    log: list[dict] = field(default_factory=list)
    decisions: list[dict] = field(default_factory=list)
    skipped: int = 0  # steps with a loss or gradient that was not finite
    seconds: float = 0.0
    ended_early: bool = False  # the data ended before the steps did

    def tail(self, key: str = "loss", share: float = 0.1) -> float:
        """Mean of a logged value over the last tenth of the stage."""
        values = [row[key] for row in self.log if key in row]
        assert values, f"{key} is in no line of the log"
        last = max(1, int(len(values) * share))
        return sum(values[-last:]) / last


def train(
    model: nn.Module,
    stage: BaseStage,
    data: Iterator[Sequence[Batch]],
    objective: Objective | None = None,
    ranks: Ranks = Ranks(),
    directory: Path | RunDirectory | None = None,
    patience: int = 5,
) -> Run:
    """Run one stage in place. `data` yields this rank's micro-batches of a step; `objective`: one of your
    own, in place of the stage's.

    Writes `log.jsonl` (one line a step, always) into `directory` when given; a `RunDirectory` also keeps
    checkpoints and resumes from them, leaves on SIGTERM, and checks the model on its schedule. When the
    data ends early the stage ends well: it is saved, and says so.

    A step with a non-finite loss or gradient changes nothing, is counted, and stops the run with
    ValueError after `patience` in a row. Raises ValueError, too, when there is no data at all.
    """
    began = time.time()
    objective = objective or OBJECTIVES[stage.objective]

    # What moves, and what moves it
    if isinstance(model, SailVL):
        parameters = freeze_all_but(model, stage.trains)
    else:
        parameters = list(model.parameters())
    prepare_blocks(model, stage)
    optimizers = make_optimizers(model, stage)
    search = rate_search(parameters, optimizers, stage)

    # Where the run lives, and where an earlier life of it ended
    data = resumable(data)
    home = directory if isinstance(directory, RunDirectory) else None
    keeper = Keeper(home, model, optimizers, search, data, ranks) if home else None
    saved = keeper.resume() if keeper else {}
    if home and ranks.main:
        print(training_memory(model, optimizers))
    step = saved.get("step", 0)
    journal = Journal(stage, directory, ranks.main, step, saved.get("executed", 0))

    bad_steps = 0
    ended_early = False
    try:
        while step < stage.steps:
            # Data, or its end
            asked = time.time()
            try:
                micro_batches = next(data, None)
            except StopRequested:
                # Told in the middle of sampling: save the state after the last step
                journal.sync()
                keeper.leave()
            if micro_batches is None:
                ended_early = True
                break
            waited = time.time() - asked

            # One update of the weights
            rate = stage.rate(step) * (search.scale if search else 1.0)
            row = {"step": step, "lr": rate, "data_seconds": round(waited, 3)}
            with parallel.named_failure(mixed=True):
                row |= one_step(model, optimizers, micro_batches, objective, rate, stage, ranks)

            # A run of bad steps is no accident
            bad_steps = bad_steps + 1 if row["skipped"] else 0
            if bad_steps >= patience:
                raise ValueError(
                    f"stage {stage.name}: {bad_steps} steps in a row with a non-finite loss or gradient, "
                    f"the last at step {step} (rate {rate:.2e}); lower --lr or look at the data"
                )

            # Go on; or back, when AdaLRS begins a trial or takes one back
            step = search.observe(row["loss"]) if search else step + 1

            # Look at the model from time to time, unless told to leave, and write everything down
            stop = keeper.told_to_stop() if keeper else False
            check_due = home and home.check and home.check_every and step % home.check_every == 0
            if check_due and not stop:
                with keeper.signals.busy():
                    row["check"] = home.check(step)
                stop = keeper.told_to_stop()
            journal.write(row, step)

            # A checkpoint when it is due or the best so far, at the end, and when told to leave
            if keeper:
                executed = len(journal.rows)
                score = row.get("check", {}).get("score")
                due = keeper.due(executed) or keeper.improves(score)
                if stop or due or step == stage.steps:
                    journal.sync()
                    keeper.save(step, executed, score)
                if stop:
                    keeper.stop(step)
                keeper.mark(step, executed)

        # Data that ended early ends the stage well
        if ended_early and not journal.rows:
            raise ValueError(
                f"stage {stage.name}: the data ended before the first step; see the faults above"
            )
        if ended_early and keeper:
            journal.sync()
            keeper.save(step, len(journal.rows))
        if keeper:
            keeper.finish()
    finally:
        journal.close()
        if keeper:
            keeper.close()

    if ended_early and ranks.main:
        print(
            f"stage {stage.name}: the data ended at step {step} of {stage.steps}, at a rate of "
            f"{stage.rate(step):.1e} (peak {stage.lr:.1e}); the stage ends here, and is saved"
        )
    skipped = sum(row["skipped"] for row in journal.rows)
    decisions = search.log() if search else []
    return Run(journal.rows, decisions, skipped, time.time() - began, ended_early)


def one_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: Sequence[Batch],
    objective: Objective,
    rate: float,
    stage: BaseStage,
    ranks: Ranks,
) -> dict:
    """Gradient of a global batch, clipped, applied.

    Returns loss, loss per task, gradient norms, tokens and images a second, and the objective's
    statistics. A loss or gradient that is not finite on any rank skips the step on all of them.
    """
    began = time.time()

    # What the loss of the whole step, over all ranks, is divided by
    own_weight = weight_of(micro_batches)
    step_weight = max(agreed_weight(own_weight, len(micro_batches)), 1e-8)

    # Forward and backward, a micro-batch at a time, here or over the stages of a pipeline
    precision = autocast(stage, ranks.device)
    collected: list[Statistics] = []
    facts: list[Facts] = []
    if isinstance(model, Staged):
        batches = list(micro_batches)  # several of them are on their way at once
        facts += [Facts.of(batch) for batch in batches]
        work = Work(batches, objective, stage, step_weight, ranks.device, precision)
        collected += model.passes(work)
    else:
        for number, batch in enumerate(micro_batches, start=1):
            begin_micro_batch(model, ranks.layout, last=number == len(micro_batches))
            with precision:
                loss, statistics = objective(model, batch.to(ranks.device), stage)
            (loss / step_weight).backward()
            collected.append(statistics)
            facts.append(Facts.of(batch))
    counts = [said.pop("expert_counts") for said in collected if "expert_counts" in said]

    # One gradient for all ranks, of a bounded norm
    parallel.sum_gradients([p for p in model.parameters() if p.requires_grad])
    norm, norm_by_part = clip_gradients(model, stage.clip)

    # All else that the device has found out in this step, at once: it waits for the norm only
    sums, tasks = summed(fetch(collected), facts)

    # Statistics over all ranks
    tokens = sum(fact.tokens for fact in facts)
    images = sum(fact.images for fact in facts)
    *totals, all_tokens, all_images = parallel.total(*sums.values(), tokens, images)
    row = {key: value / step_weight for key, value in zip(sums, totals)}

    # The step, unless it would do harm; a gradient of zero (RL without a lesson) moves nothing, where
    # momentum alone would
    finite = math.isfinite(row["loss"]) and math.isfinite(norm)
    set_rate(optimizers, rate)
    for optimizer in optimizers:
        if finite and norm > 0:
            optimizer.step()
        optimizer.zero_grad()
    if counts and finite:  # balancing without a loss, for comparison; slots by layer and expert
        layers = [block.mlp for block in model.language_model.model.layers]
        summed_counts = sum(torch.as_tensor(count, device=ranks.device) for count in counts)
        moe.update_expert_bias(layers, summed_counts, stage.expert_bias_rate)

    # One line of the log
    seconds = time.time() - began
    return row | {
        "tasks": mean_by_task(parallel.gather(tasks)),
        "grad_norm": norm,
        "grad_norms": norm_by_part,
        "skipped": not finite,
        "filled": sum(fact.filled for fact in facts) / len(facts),
        "tokens_per_second": all_tokens / seconds,
        "images_per_second": all_images / seconds,
    }


@dataclass(frozen=True)
class Facts:
    """What the log wants to know of a micro-batch, and what is left when it is done with."""

    weight: float
    tokens: int
    images: int
    filled: float
    owners: list[str]

    @staticmethod
    def of(batch: Batch) -> "Facts":
        images = 0 if batch.images is None else len(batch.images)
        return Facts(batch.weight, batch.ids.numel(), images, batch.filled, batch.owners)


def summed(collected: list[Statistics], facts: list[Facts]) -> tuple[dict[str, float], list[dict]]:
    """Statistics of the micro-batches, as numbers -> their sums, and (loss, weight) by task of each."""
    sums: dict[str, float] = defaultdict(float)
    tasks = []
    for statistics, fact in zip(collected, facts, strict=True):
        documents = statistics.pop("tasks", [])
        means = statistics.pop("means", {})
        tasks.append(loss_by_task(fact.owners, documents) if documents else {})
        for key, value in statistics.items():
            sums[key] += value
        for key, value in means.items():
            sums[key] += value * fact.weight
    return sums, tasks


def agreed_weight(own_weight: float, micro_batches: int) -> float:
    """The weight of a step over all ranks.

    Raises ValueError when ranks have different numbers of micro-batches: some would wait in the
    collectives of a backward pass that the others never run.
    """
    weight, count, squares = parallel.total(own_weight, micro_batches, micro_batches**2)
    _, size = parallel.place()
    if size * squares != count**2:
        numbers = parallel.gather([micro_batches])
        raise ValueError(
            f"the ranks have {', '.join(map(str, numbers))} micro-batches in this step: their data must "
            "give each of them as many (empty ones, if need be)"
        )
    return weight


def rate_search(
    parameters: list[Tensor], optimizers: list[torch.optim.Optimizer], stage: BaseStage
) -> AdaLRS | None:
    """AdaLRS over these parameters, if the stage searches its rate."""
    if not stage.searches_rate:
        return None
    return AdaLRS(
        parameters,
        optimizers,
        stage.steps,
        k=stage.adalrs_k or None,
        window=stage.adalrs_window,
        up=stage.adalrs_up,
        down=stage.adalrs_down,
        decay=stage.adalrs_decay,
        rule=stage.adalrs_rule,
        offload=stage.adalrs_offload,
    )


def prepare_blocks(model: nn.Module, stage: BaseStage) -> None:
    """Recomputation and compilation, block by block: they change memory and speed, not names."""
    for module in model.modules():
        if isinstance(module, (LLM, ViT)):
            module.recompute = stage.recompute
        if stage.compile and isinstance(module, (Block, VisionBlock)):
            module.compile(dynamic=True)


def autocast(stage: BaseStage, device: str) -> torch.autocast:
    """The precision of the forward pass. Raises ValueError for an unknown one."""
    if stage.precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"--precision {stage.precision}: choose auto, fp32 or bf16")
    kind = str(device).partition(":")[0]
    half = stage.precision == "bf16" or (stage.precision == "auto" and half_by_default(kind))
    return torch.autocast(kind, torch.bfloat16, enabled=half)
