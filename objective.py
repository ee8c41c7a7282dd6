"""Objectives: what makes a loss of a batch. One signature for all; a stage names its own.

What it teaches: fine-tuning and reinforcement learning start from the same number, log p of each
supervised token under the present model (`SailVL.logprobs`). A supervised stage raises it for what was
given; a policy stage raises it for what was sampled and did well. Everything else, the experts' balance
included, is shared.

    batch  -> model.logprobs -> supervised   -weight * log p          \
                             -> policy       a row of policy_losses.py +-> loss sum, statistics
    pixels -> PatchPredictor -> next_patch   squared error            /

An objective returns the *sum* of its weighted losses over the batch; the loop divides by the weight of
the whole step over all ranks, so that no split of a batch changes a gradient (but of the router's
losses, which are of one micro-batch each: see `router_losses`). Statistics are sums too, divided by
the same weight, except "means", which count as often as the batch weighs, "tasks", which the loop
averages per task, and "expert_counts". They stay where they were computed: the loop fetches those of
all micro-batches at once (`fetch`), when the step is over and the device has nothing left to do.

Legend: B rows, T tokens a row, n supervised positions, N completions, L longest completion, E experts.
Sources: SAIL-VL2 section 4.2 (Eq. 2 and 3), section 2.2 (balance over ranks), Qwen3-MoE (its formula).
"""

from collections import defaultdict
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe
from attention import sdpa
from infra import weights
from packing import Batch
from policy_losses import ALGORITHMS, aggregate, kl_penalty, log_ratio, loss, sequence_log_ratio
from scale import parallel
from stage import BaseStage, RLStage, Stage
from vit import ViT, patchify
from vlm import SailVL

Statistics = dict[str, Any]
Objective = Callable[[nn.Module, Batch, BaseStage], tuple[Tensor, Statistics]]


# ------------------------------------------------------------------------------------- supervised


def supervised(model: SailVL, batch: Batch, stage: Stage) -> tuple[Tensor, Statistics]:
    """-sum of weight * log p(label) over the labelled positions of a packed batch (Eq. 2 and 3).

    For a MoE the router's losses are added; "loss" in the statistics is without them.
    """
    routing = moe.Decisions() if model.config.text.num_experts else None

    # log p, at supervised positions only
    at = batch.at  # (n,)
    labels = batch.labels.reshape(-1)[at]
    logprobs = model.logprobs(
        batch.ids, batch.images, batch.positions, batch.segments, at, labels, routing=routing
    )

    # Weighted, and told apart by task for the log
    token_weights = batch.weights.reshape(-1)[at]
    losses = -logprobs * token_weights  # (n,)
    total = losses.sum()
    statistics = {
        "loss": total.detach(),
        "tasks": document_losses(losses.detach(), token_weights, at, batch),
    }

    if routing:
        router_loss, router_statistics = router_losses(model, routing, batch, stage)
        total = total + router_loss
        statistics |= router_statistics
    return total, statistics


def document_losses(losses: Tensor, token_weights: Tensor, at: Tensor, batch: Batch) -> Tensor:
    """(documents, 2): sums of losses and of weights, for losses (n,) at the flat positions `at` (n,)."""
    # Which document a position belongs to
    ends = batch.segments.cu[1:].to(at.dtype)
    document = torch.bucketize(at, ends, right=True)  # (n,)
    sums = losses.new_zeros(len(batch.owners), 2)
    return sums.index_add_(0, document, torch.stack((losses, token_weights), 1))


def loss_by_task(owners: list[str], sums: list[list[float]]) -> dict[str, tuple[float, float]]:
    """(sum of losses, sum of weights) of each task, from those of the documents that it owns."""
    by_task: dict[str, tuple[float, float]] = {}
    for task, (document_loss, document_weight) in zip(owners, sums):
        if document_weight:
            task_loss, task_weight = by_task.get(task, (0.0, 0.0))
            by_task[task] = task_loss + document_loss, task_weight + document_weight
    return by_task


def fetch(tree: Any) -> Any:
    """The same dicts, lists and tuples with Python numbers (lists, for more than one) for tensors.

    One copy from the device, and so one wait for it, however many tensors there are.
    """
    tensors = list(tensors_of(tree))
    if not tensors:
        return tree
    numbers = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu()
    parts = numbers.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape).tolist() for part, tensor in zip(parts, tensors)]
    return with_numbers(tree, iter(shaped))


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested dicts, lists and tuples."""
    if torch.is_tensor(tree):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(part)


def with_numbers(tree: Any, numbers: Iterator) -> Any:
    """The same with the next of `numbers` in place of each tensor."""
    if torch.is_tensor(tree):
        return next(numbers)
    if isinstance(tree, dict):
        return {key: with_numbers(part, numbers) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_numbers(part, numbers) for part in tree)
    return tree


# ------------------------------------------------------------------------- mixture of experts


def router_losses(
    model: SailVL, routing: moe.Decisions, batch: Batch, stage: BaseStage
) -> tuple[Tensor, Statistics]:
    """What keeps experts alive, for every objective alike: balance loss and z-loss.

    Balance is of all ranks' tokens in this micro-batch ("average activation across ranks"): each rank
    contributes its part, scaled so that dividing by the step's weight leaves `stage.balance` its
    coefficient. Over the micro-batches of a step the losses are averaged; the counts are not summed,
    since the gradient of the first micro-batch would have to wait for the routing of the last.
    """
    counts, weight = expert_counts(routing, batch, model.image_token_id)
    # (a batch of padding decides nothing)
    decisions = (counts.sum() / model.config.text.num_experts_per_tok).clamp_min(1.0)
    everyone = (counts.sum((0, 1)), decisions)

    # The losses
    balance = weight * moe.balance_loss(routing, batch.real_at, everyone)
    total = stage.balance * balance
    if stage.router_z:
        total = total + stage.router_z * moe.z_loss(routing, batch.real_at) * batch.weight

    # How evenly the experts are used, by kind of token and layer; and the counts themselves, for
    # balancing by a bias, which moves after the step
    means = {}
    for kind, entropies in zip(("text", "vision"), moe.entropy(counts)):
        for layer, entropy in enumerate(entropies):
            means[f"{kind}_entropy_{layer}"] = entropy
    statistics = {"balance": balance.detach(), "means": means}
    if stage.expert_bias_rate:
        statistics["expert_counts"] = counts.sum(0)
    return total, statistics


def expert_counts(routing: moe.Decisions, batch: Batch, image_token: int) -> tuple[Tensor, float]:
    """Over all ranks: how many slots went to each expert (2: text and vision, layers, E), and the weight.

    In an evaluation, which ranks need not do together, over this rank alone.
    """
    counts = own_counts(routing, batch, image_token)
    if routing.earlier is not None:
        counts = torch.cat([routing.earlier.counts, counts], 1)
    if not torch.is_grad_enabled():
        return counts, batch.weight
    (weight,) = parallel.total(batch.weight)
    return parallel.sum_where_it_lies(counts.long()).float(), weight


def own_counts(routing: moe.Decisions, batch: Batch, image_token: int) -> Tensor:
    """(2: text and vision, layers, E) slots of each expert, of this rank's tokens and layers."""
    image = batch.ids.reshape(-1) == image_token
    text_counts = moe.tokens_per_expert(routing, batch.real() & ~image)
    return torch.stack([text_counts, moe.tokens_per_expert(routing, image)])


# ----------------------------------------------------------------------------------------- policy


def sampled_logprobs(
    model: SailVL, batch, temperature: float, routing: moe.Decisions | None = None
) -> Tensor:
    """(N, L) log-probabilities of a `rollout.RolloutBatch`'s sampled tokens, zero on padding."""
    flat = model.logprobs(
        batch.ids,
        batch.images,
        batch.positions,
        batch.segments,
        batch.at,
        batch.labels,
        temperature,
        routing,
    )
    return flat.new_zeros(batch.old.shape).index_put((batch.sequence, batch.place), flat)


def policy(model: SailVL, batch, stage: RLStage) -> tuple[Tensor, Statistics]:
    """The loss of the stage's algorithm on a `rollout.RolloutBatch` (section 4.2.3)."""
    aggregation = stage.aggregation or ALGORITHMS[stage.algorithm].aggregation

    # Score the sampled tokens under the present policy, with its own routing or the replayed one
    routing: moe.Decisions | None = None
    if batch.choices:
        routing = moe.Replay(batch.choices)
    elif model.config.text.num_experts:
        routing = moe.Decisions()
    logp = sampled_logprobs(model, batch, stage.temperature, routing)  # (N, L)

    # The algorithm
    total, clip_fraction = loss(
        stage.algorithm,
        logp,
        batch.old,
        batch.mask,
        batch.advantage,
        stage.low,
        stage.high,
        aggregation,
    )
    means = batch.stats | {"clip_fraction": clip_fraction} | policy_shift(logp.detach(), batch)

    # A leash to the model that the stage began with
    statistics: Statistics = {"means": {}}
    if batch.reference is not None:
        distance = kl_penalty(logp, batch.reference, batch.mask, stage.estimator)
        penalty = aggregate(distance, batch.mask, aggregation)
        total = total + stage.kl * penalty
        statistics["kl_reference"] = penalty.detach()

    # Experts are kept alive here as anywhere
    if routing:
        router_loss, router_statistics = router_losses(model, routing, batch, stage)
        total = total + router_loss
        statistics |= router_statistics
    if batch.choices:
        means["rerouted"] = routing.rerouted_share()
    statistics["means"] |= means
    return total, statistics | {"loss": total.detach()}


def policy_shift(logp: Tensor, batch) -> Statistics:
    """How far the policy has moved from the one that sampled.

    entropy: mean of -log p over tokens that were sampled from it, an unbiased estimate of the policy's
    entropy per token at a fraction of the cost; kl: k3; the spreads are root mean squares of the token
    and sequence log-ratios (GSPO's is the smaller by far).
    """
    mask = batch.mask
    tokens = mask.sum().clamp(min=1)
    by_token = log_ratio(logp, batch.old, mask)  # (N, L)
    by_sequence = sequence_log_ratio(logp, batch.old, mask)  # (N, 1)
    k3 = by_token.exp() - 1 - by_token
    return {
        "entropy": -(batch.old * mask).sum() / tokens,
        "kl": (k3 * mask).sum() / tokens,
        "spread": (by_token.square().sum() / tokens).sqrt(),
        "spread_sequence": by_sequence.square().mean().sqrt(),
    }


# ------------------------------------------------------------------------------------- next patch


class PatchPredictor(nn.Module):
    """A ViT that sees a random prefix of an image's patches both ways and the rest causally, and says
    the next patch: the toy's stand-in for AIMv2's own pre-training.

    AIMv2's objective (autoregressive pixels under prefix attention) with a linear head in place of its
    decoder. Targets are normalised inside each patch, so that predicting the mean scores 1.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        self.config = vit.config
        self.vision_model = vit
        self.head = nn.Linear(vit.config.hidden_size, 3 * vit.config.patch_size**2)
        self.requires_grad_(True)

    def loss(self, images: Tensor, prefix: int) -> Tensor:
        """images (N, 3, H, W) -> mean squared error over the patches after the prefix (a scalar)."""
        patches = patchify(images, self.config.patch_size)  # (N, L, 3 p p)
        N, L, _ = patches.shape

        # Row i may look at column j: all of the prefix, and what came before
        row = torch.arange(L, device=images.device)[:, None]
        column = torch.arange(L, device=images.device)[None]
        visible = (column <= row) | (column < prefix)  # (L, L)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q4, k4, v4 = (t.view(N, L, *t.shape[1:]) for t in (q, k, v))
            return sdpa(q4, k4, v4, attn_mask=visible).reshape(q.shape)

        features, _ = self.vision_model(images, attend)  # (N*L, C)
        before_each = features.view(N, L, -1)[:, max(prefix - 1, 0) : -1]
        predicted = self.head(before_each)

        target = patches[:, max(prefix, 1) :]
        mean = target.mean(-1, keepdim=True)
        spread = target.std(-1, keepdim=True) + 0.1
        return F.mse_loss(predicted, (target - mean) / spread)

    def save_pretrained(self, directory) -> None:
        """ViT and head, for a checkpoint in the middle of the stage."""
        weights.save_weights(self, directory, self.config.to_dict())


def next_patch(model: PatchPredictor, batch, stage: BaseStage) -> tuple[Tensor, Statistics]:
    """Squared error of the next patch on a `recipe.Pixels` batch."""
    total = model.loss(batch.images, batch.prefix) * batch.weight
    return total, {"loss": total.detach()}


OBJECTIVES: dict[str, Objective] = {
    "supervised": supervised,
    "policy": policy,
    "next_patch": next_patch,
}


def mean_by_task(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Loss per unit of weight of each task, over all micro-batches of all ranks."""
    losses: dict[str, float] = defaultdict(float)
    weight_of: dict[str, float] = defaultdict(float)
    for part in parts:
        for task, (loss_sum, weight_sum) in part.items():
            losses[task] += loss_sum
            weight_of[task] += weight_sum
    return {task: losses[task] / weight_of[task] for task in sorted(losses)}
