"""Reinforcement learning with verifiable rewards: sample a group of answers, compare them, make the better ones likelier.

What it teaches: around the losses of policy_losses.py, everything that must be exactly right for them to mean what they say.
The image and prompt of a group run once, in sampling and in a micro-batch; sampled ids are trained as sampled, never decoded
and encoded again; the end token is inside the mask; sampling and scoring share one temperature and one forward, so the ratio
starts at 1; log-probabilities are fp32.

    prompts -> generate (n answers each) -> rewards -> advantages -> minibatches -> train.train with `policy` as objective

    python rl.py --stage verifiable --model runs/toy/long-cot --out runs/rl
    python rl.py --stage verifiable --model runs/toy/long-cot --algorithm gspo
    torchrun --nproc-per-node 2 rl.py --stage verifiable --model runs/toy/long-cot

Rollouts are spread over ranks by calls to `generate`; answers and rewards (not pictures) then travel to all, so that every
rank knows the same groups, drops the same ones and trains on its share of each minibatch.

Legend: N completions, L longest completion, mask (N, L) 1 on sampled tokens including the end token.
Sources: SAIL-VL2 section 4.2.3 and 4.2.5 (DAPO for dense models, GSPO for MoE; 2,048 rollouts, 8 updates, minibatches of 512,
rate 1e-6, clip in [0.20, 0.28], which we read as DAPO's two sides). Not published, our choice: group size, temperature,
mixed weights, no KL (as SAIL-RL), GSPO's clip range, scoring samples again in bf16 (`rescored`).
"""

import copy
import math
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator

import torch
import tyro
from torch import Tensor

import moe
import recipe
import rewards
from attention import Segments
from data.encode import Encoder, with_thinking
from data.images import normalise
from data.sample import Sample
from evaluate import text_of
from generate import Answer, generate
from packing import Batch
from policy_losses import (
    AGGREGATIONS,
    ALGORITHMS,
    aggregate,
    divisor,
    kl_penalty,
    log_ratio,
    loss,
    overlong_penalty,
    sequence_log_ratio,
)
from scale import parallel
from train import Run, Stage, precision, train
from vlm import SailVL

Reward = Callable[
    [str, Sample, bool], dict[str, float]
]  # (completion, sample, finished) -> parts, "reward" among them


@dataclass(frozen=True)
class RLStage(Stage):
    """A stage whose batches are rollouts. `steps` counts gradient updates; one rollout batch gives `updates` of them."""

    algorithm: str = (
        "dapo"  # a row of policy_losses.ALGORITHMS; the paper: dapo (dense), gspo (MoE)
    )
    prompts: int = 64  # groups in a rollout batch, over all ranks
    group: int = 8  # completions per prompt
    updates: int = 2  # minibatches per rollout batch
    passes: int = 1  # times that each rollout is used
    batch: int = 0  # prompts in one call of generate (memory; a call is what a rank takes); 0: a rank's whole share
    low: float | None = (
        None  # clip range of the ratio, [1 - low, 1 + high]; none: the algorithm's own
    )
    high: float | None = None
    aggregation: str = ""  # tokens, sequences, budget or completions; none: the algorithm's own
    kl: float = 0.0  # weight of the KL penalty against the model that the stage starts from
    estimator: str = "k3"  # of the KL: k1, k2 or k3
    temperature: float = 1.0
    max_new: int = 64  # tokens
    overlong: int = 8  # tokens before max_new in which the length is punished, linearly down to -1 (DAPO Eq. 13)
    dynamic: bool = (
        True  # leave out groups that are all right or all wrong (DAPO's dynamic sampling)
    )
    tries: int = 3  # rollout rounds to fill the batch with groups that are neither
    replay: bool = (
        False  # MoE: the update uses the experts that the sampling policy chose (routing replay)
    )
    reward: str = "verifiable"  # verifiable (answer x format), mixed (answer + think + format), product, or random (control)


def check(stage: RLStage, experts: int = 0) -> list[str]:
    """What is odd about a stage's choices, as sentences. Raises ValueError for what cannot work."""
    if stage.algorithm not in ALGORITHMS:
        raise ValueError(
            f"unknown algorithm {stage.algorithm!r}; choose from {', '.join(ALGORITHMS)}"
        )
    if stage.aggregation and stage.aggregation not in AGGREGATIONS:
        raise ValueError(
            f"unknown aggregation {stage.aggregation!r}; choose from {', '.join(AGGREGATIONS)}"
        )
    if stage.reward not in (*rewards.COMBINE, "random"):
        raise ValueError(
            f"unknown reward {stage.reward!r}; choose from {', '.join(rewards.COMBINE)}, random"
        )
    if stage.group < 2:
        raise ValueError(
            f"--group {stage.group}: a group of one has nothing to be compared with, every advantage is zero"
        )
    if stage.overlong >= stage.max_new:
        raise ValueError(
            f"--overlong {stage.overlong} leaves no length of {stage.max_new} unpunished"
        )
    if stage.temperature <= 0:
        raise ValueError("--temperature must be positive: greedy groups agree and teach nothing")
    a, odd = ALGORITHMS[stage.algorithm], []
    high, how = a.high if stage.high is None else stage.high, stage.aggregation or a.aggregation
    sequence = stage.algorithm.startswith("gspo")
    if sequence and high > 0.05:
        odd.append(
            f"{stage.algorithm} with a clip of {high} never clips: a sequence ratio moves by thousandths, take 3e-4 and 4e-4"
        )
    if not sequence and 0 < high < 0.01:
        odd.append(
            f"{stage.algorithm} with a clip of {high} loses nearly every token after the first update: token ratios move by tenths"
        )
    if sequence and how in ("tokens", "budget"):
        odd.append(
            f"a sequence ratio summed per token ({how}) weighs each completion by its length: take sequences"
        )
    if stage.algorithm == "reinforce" and stage.updates * stage.passes > 1:
        odd.append(
            "reinforce has no ratio: updates after the first of a rollout batch are off-policy and biased"
        )
    if stage.kl and stage.estimator == "k1":
        odd.append(
            "k1 as a loss has an expected gradient of zero: it adds noise and no pull; take k2 or k3"
        )
    if stage.replay and not experts:
        odd.append("--replay does nothing: the model has no experts")
    if stage.replay and sequence:
        odd.append("routing replay with a sequence ratio: it was made so that this is not needed")
    return odd


# ---------------------------------------------------------------------------------------------------------------- rollout


@dataclass
class RolloutBatch(Batch):
    """A packed batch of completions with their prompts, plus what the policy loss needs.

    at (n,): flat positions whose label was sampled; sequence, place (n,): which completion and which of its tokens;
    old, reference (N, L) log-probabilities, mask (N, L), advantage (N,); choices: per MoE layer the experts to use (S, K).
    `weight` is what the loss is divided by.
    """

    at: Tensor = None
    sequence: Tensor = None
    place: Tensor = None
    old: Tensor = None
    mask: Tensor = None
    advantage: Tensor = None
    reference: Tensor | None = None
    choices: list[Tensor] | None = None
    divisor: float = 0.0
    stats: dict = field(default_factory=dict)

    @property
    def weight(self) -> float:
        return self.divisor

    def to(self, device) -> "RolloutBatch":
        if str(device) == "cpu":
            return self
        base = super().to(device)
        names = ("at", "sequence", "place", "old", "mask", "advantage", "reference")
        moved = {n: t if (t := getattr(self, n)) is None else t.to(device) for n in names}
        choices = None if self.choices is None else [c.to(device) for c in self.choices]
        return RolloutBatch(
            **vars(base), **moved, choices=choices, divisor=self.divisor, stats=self.stats
        )


@dataclass
class Group:
    """All completions of one prompt. `index`: the sample's place in the source; prompt: None on ranks that did not sample it."""

    index: int
    sample: Sample
    answers: list[Answer]
    parts: list[dict[str, float]]
    prompt: tuple | None = None

    def rewards(self, key: str = "reward") -> list[float]:
        return [p[key] for p in self.parts]


@dataclass
class Completion:
    """One completion that is to be trained on. choices: per MoE layer (S, K), when the routing is replayed."""

    index: int
    sample: Sample
    answer: Answer
    advantage: float
    prompt: tuple | None = None
    choices: list[Tensor] | None = None


def reward_parts(text: str, sample: Sample, finished: bool, kind: str) -> dict[str, float]:
    """Answer, think and format of one completion, and "reward", the stage's combination of them."""
    parts = rewards.parts(text, sample.facts, finished)
    return parts | {"reward": rewards.COMBINE[kind](parts)}


def reward_of(text: str, sample: Sample, finished: bool, kind: str) -> float:
    """The stage's reward of one completion. Raises ValueError for an unknown kind."""
    if kind not in rewards.COMBINE:
        raise ValueError(f"unknown reward {kind!r}; choose from {', '.join(rewards.COMBINE)}")
    return reward_parts(text, sample, finished, kind)["reward"]


@torch.no_grad()
def rollout(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    stage: RLStage,
    seed: int,
    reward: Reward | None = None,
) -> list[Group]:
    """`group` completions of every sample, with their rewards. An own `reward` replaces the stage's."""
    asked = [with_thinking(s, encoder.tokenizer.think_prompt) for s in samples]
    prompts = [encoder.prompt(s) for s in asked]
    answers = generate(
        model,
        prompts,
        encoder.tokenizer.end,
        stage.max_new,
        stage.group,
        stage.temperature,
        seed=seed,
    )
    coin = torch.Generator().manual_seed(seed)  # the control: a reward that nothing can learn from
    groups = [Group(i, s, [], [], p) for i, (s, p) in enumerate(zip(samples, prompts))]
    for a in answers:
        text, sample = text_of(a, encoder.tokenizer), samples[a.prompt]
        if reward:
            parts = reward(text, sample, a.finished)
        elif stage.reward == "random":
            parts = reward_parts(text, sample, a.finished, "verifiable") | {
                "reward": float(torch.rand((), generator=coin) < 0.5)
            }
        else:
            parts = reward_parts(text, sample, a.finished, stage.reward)
        groups[a.prompt].answers.append(a)
        groups[a.prompt].parts.append(parts)
    if torch.is_autocast_enabled(model.language_model.lm_head.weight.device.type):
        for g in groups:
            g.answers = rescored(model, encoder, g, stage)
    return groups


def rescored(model: SailVL, encoder: Encoder, group: Group, stage: RLStage) -> list[Answer]:
    """The answers with log-probabilities by the update's forward. In bf16 those of a cached step differ by half a percent, more than
    GSPO's clip range; in fp32 the two agree and this is not needed."""
    batch = pack_rollouts(
        [Completion(group.index, group.sample, a, 0.0, group.prompt) for a in group.answers],
        encoder,
        stage,
        {},
    )
    logp = score(model, batch.to(model.language_model.lm_head.weight.device), stage.temperature)
    return [replace(a, logprobs=row[: len(a.ids)].tolist()) for a, row in zip(group.answers, logp)]


class Rollouts:
    """Endless steps for `train.train`: sample with the present policy, keep groups that disagree, cut into `updates` parts.

    If `tries` rounds do not fill the batch with groups that disagree, train on what there is: dynamic sampling must end on
    data that is too easy or too hard. A reward of NaN (a judge without a verdict) drops its group; both are counted.
    All ranks hold the same groups, so `state_dict` is the same on all, is plain JSON, and fits any number of ranks.
    """

    def __init__(
        self,
        model: SailVL,
        encoder: Encoder,
        source: Iterator[Sample],
        stage: RLStage,
        world=parallel.Ranks(),
        reward: Reward | None = None,
        reference: SailVL | None = None,
    ):
        uses = stage.prompts * stage.passes
        if uses % stage.updates or uses // stage.updates < world.size:
            raise ValueError(
                f"{stage.prompts} prompts x {stage.passes} passes do not divide into {stage.updates} updates of at "
                f"least one prompt for each of {world.size} ranks"
            )
        self.model, self.encoder, self.source, self.stage, self.world = (
            model,
            encoder,
            source,
            stage,
            world,
        )
        self.reward, self.reference = reward, reference
        self.drawn, self.round = 0, 0  # samples taken from the source, calls for rollouts
        self.queue: list[list[Completion]] = []  # minibatches to come
        self.stats: dict[str, float] = {}

    def __iter__(self) -> "Rollouts":
        return self

    def __next__(self) -> list[RolloutBatch]:
        with precision(
            self.stage, self.world.device
        ):  # that of the update: else the ratio does not start at 1
            return self.micro_batches()

    def micro_batches(self) -> list[RolloutBatch]:
        """This rank's share of the next minibatch."""
        if not self.queue:
            self.collect()
        minibatch, rank, size = self.queue.pop(0), self.world.rank, self.world.size
        n, packed = (
            len(minibatch),
            lambda part, **how: pack_rollouts(
                part, self.encoder, self.stage, self.stats, self.reference, **how
            ),
        )
        mine = minibatch[rank * n // size : (rank + 1) * n // size]
        if (
            not mine
        ):  # fewer completions than ranks: run the same modules as the others, at weight zero
            return [packed(minibatch[:1], empty=True)]
        share = -(-len(mine) // self.stage.accumulate)
        return [packed(mine[i : i + share]) for i in range(0, len(mine), share)]

    def sample(self, n: int) -> list[Group]:
        """n new groups, rolled out by all ranks and known to all, in the source's order."""
        drawn = [next(self.source) for _ in range(n)]
        first, size = self.drawn, self.stage.batch or -(-n // self.world.size)
        self.drawn, self.round = self.drawn + n, self.round + 1
        mine: dict[int, Group] = {}
        for call, at in enumerate(range(0, n, size)):
            if call % self.world.size == self.world.rank:
                seed = self.stage.seed + 7919 * self.round + call
                for g in rollout(
                    self.model, self.encoder, drawn[at : at + size], self.stage, seed, self.reward
                ):
                    mine[at + g.index] = g
        told = dict(parallel.gather([(i, (g.answers, g.parts)) for i, g in mine.items()]))
        return [
            Group(first + i, drawn[i], *told[i], mine[i].prompt if i in mine else None)
            for i in range(n)
        ]

    def collect(self) -> None:
        """Fill the queue with one rollout batch."""
        s, kept, seen = self.stage, [], []
        for attempt in range(s.tries if s.dynamic else 1):
            new = self.sample(
                s.prompts if attempt == 0 else max(1, s.prompts // 2)
            )  # later rounds only fill the gaps
            seen += new
            kept += [
                g
                for g in new
                if not math.isnan(sum(g.rewards())) and (not s.dynamic or len(set(g.rewards())) > 1)
            ]
            if len(kept) >= s.prompts:
                break
        self.stats, uses = statistics(seen, s), []
        for g in kept[: s.prompts] or seen[:1]:
            shaped = torch.tensor(
                [
                    r + overlong_penalty(len(a.ids), s.max_new, s.overlong)
                    for r, a in zip(g.rewards(), g.answers)
                ]
            )
            advantage = (
                ALGORITHMS[s.algorithm].advantage(shaped, s.group) if kept else torch.zeros(s.group)
            )  # no lesson: a zero step
            uses.append(
                [
                    Completion(g.index, g.sample, a, float(A), g.prompt)
                    for a, A in zip(g.answers, advantage)
                ]
            )
        if s.replay and self.model.config.text.num_experts:
            for part in uses:  # on every rank, so that the queue stays the same everywhere
                batch = pack_rollouts(part, self.encoder, s, {})  # the prompt, then its completions
                layers = [
                    layer.split(batch.segments.lengths)
                    for layer in chosen_experts(self.model, batch)
                ]
                for i, c in enumerate(part):
                    c.choices = [torch.cat((prompt, answers[i])) for prompt, *answers in layers]
        uses = uses * s.passes
        size = -(-len(uses) // s.updates)
        self.queue = [sum(uses[i : i + size], []) for i in range(0, len(uses), size)]

    def state_dict(self) -> dict:
        """What a resumed run needs to go on exactly, as JSON: minibatches that were sampled by an older policy included."""
        queue = [
            [
                {
                    "index": c.index,
                    "answer": vars(c.answer),
                    "advantage": c.advantage,
                    "choices": c.choices and [layer.tolist() for layer in c.choices],
                }
                for c in part
            ]
            for part in self.queue
        ]
        return {"drawn": self.drawn, "round": self.round, "stats": self.stats, "queue": queue}

    def load_state_dict(self, state: dict) -> None:
        """On a fresh object with the same source: its first `drawn` samples are drawn again, not rolled out again."""
        assert self.drawn == 0, "load the state before the first batch"
        wanted = {c["index"] for part in state["queue"] for c in part}
        samples = {
            i: sample
            for i in range(state["drawn"])
            if (sample := next(self.source)) and i in wanted
        }
        self.drawn, self.round, self.stats = state["drawn"], state["round"], state["stats"]
        self.queue = [
            [
                Completion(
                    c["index"],
                    samples[c["index"]],
                    Answer(**c["answer"]),
                    c["advantage"],
                    choices=c["choices"] and [torch.tensor(layer) for layer in c["choices"]],
                )
                for c in part
            ]
            for part in state["queue"]
        ]


def statistics(groups: list[Group], stage: RLStage) -> dict[str, float]:
    """Of one rollout batch, every sampled group included: reward and its kinds, length, cut-off answers, pass@1 and pass@k,
    groups without a lesson, and how the useless ones split."""
    lengths = [len(a.ids) for g in groups for a in g.answers]
    mean = lambda values: sum(values) / max(1, len(values))
    out = {
        key: mean([v for g in groups for v in g.rewards(key) if v is not None and v == v])
        for key in groups[0].parts[0]
    }
    solved = [[p.get("answer", p["reward"]) > 0 for p in g.parts] for g in groups]
    agree = [len(set(g.rewards())) == 1 for g in groups]
    return out | {
        "length": mean(lengths),
        "cut": mean([not a.finished for g in groups for a in g.answers]),
        "overlong": mean([overlong_penalty(n, stage.max_new, stage.overlong) for n in lengths]),
        "pass@1": mean([x for s in solved for x in s]),
        f"pass@{stage.group}": mean([any(s) for s in solved]),
        "useless": mean(agree),
        "all_right": mean([a and all(s) for a, s in zip(agree, solved)]),
        "unjudged": mean([math.isnan(sum(g.rewards())) for g in groups]),
    }


def pack_rollouts(
    part: list[Completion],
    encoder: Encoder,
    stage: RLStage,
    stats: dict,
    reference: SailVL | None = None,
    empty: bool = False,
) -> RolloutBatch:
    """Completions as one packed row of sampled ids, never re-encoded, group by group. A prompt with several completions stands
    there once with its images, without its last token: each completion continues it, and begins with that token, which predicts
    its first. The last id of each is a label only, so it is not fed. `empty`: the same row at weight zero."""
    groups: dict[int, list[int]] = {}  # a prompt's completions
    for i, c in enumerate(part):
        groups.setdefault(c.index, []).append(i)
    documents, after, owners, images, routes, at, fed = [], [], [], [], [], [], 0
    for members in groups.values():
        first, begins = part[members[0]], len(documents)
        prompt, arrays = first.prompt or encoder.prompt(
            with_thinking(first.sample, encoder.tokenizer.think_prompt)
        )  # sampled elsewhere
        shared = len(prompt) - 1 if len(members) > 1 else 0
        documents, fed = documents + ([list(prompt[:shared])] if shared else []), fed + shared
        routes += [[layer[:shared] for layer in first.choices]] if shared and first.choices else []
        for i in members:
            documents.append([*prompt[shared:], *part[i].answer.ids[:-1]])
            fed += len(documents[-1])
            at += range(fed - len(part[i].answer.ids), fed)  # position t predicts token t + 1
            routes += [[layer[shared:] for layer in part[i].choices]] if first.choices else []
        after += [begins] * (len(documents) - begins)
        owners += [first.sample.task] * (len(documents) - begins)
        images += arrays
    segments, order = Segments.of(map(len, documents), after=after), sum(groups.values(), [])
    counts, labels = (
        [len(part[i].answer.ids) for i in order],
        [token for i in order for token in part[i].answer.ids],
    )
    sequence, place = (
        torch.tensor(order).repeat_interleave(torch.tensor(counts)),
        torch.cat([torch.arange(n) for n in counts]),
    )
    old, mask = torch.zeros(len(part), max(counts)), torch.zeros(len(part), max(counts))
    old[sequence, place], mask[sequence, place] = (
        torch.tensor([p for i in order for p in part[i].answer.logprobs]),
        float(not empty),
    )
    how = stage.aggregation or ALGORITHMS[stage.algorithm].aggregation
    ids = torch.tensor([[token for d in documents for token in d]])
    batch = RolloutBatch(
        ids,
        torch.tensor(labels),
        torch.ones(len(labels)),
        segments.positions()[None],
        segments,
        normalise(images) if images else None,
        owners,
        at=torch.tensor(at),
        sequence=sequence,
        place=place,
        old=old,
        mask=mask,
        advantage=torch.tensor([c.advantage for c in part]),
        choices=[torch.cat(layer) for layer in zip(*routes)] or None,
        divisor=divisor(mask, how, stage.max_new),
        stats=stats,
    )
    if reference is not None:
        with torch.no_grad():
            batch.reference = score(
                reference,
                batch.to(reference.language_model.lm_head.weight.device),
                stage.temperature,
            ).cpu()
    return batch


def score(
    model: SailVL, batch: RolloutBatch, temperature: float, routing: list | None = None
) -> Tensor:
    """(N, L) log-probabilities of the sampled tokens under `model`, zero on padding."""
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


@torch.no_grad()
def chosen_experts(model: SailVL, batch: RolloutBatch) -> list[Tensor]:
    """Per MoE layer the experts (S, K) that the present policy sends each token to."""
    routing: list = []
    batch = batch.to(model.language_model.lm_head.weight.device)
    model.hidden(batch.ids, batch.images, batch.positions, batch.segments, routing=routing)
    return [r.indices.cpu() for r in routing]


# --------------------------------------------------------------------------------------------------------------- objective


def policy(stage: RLStage):
    """The objective of RL: score the sampled tokens under the present policy, then the algorithm's loss."""
    how = stage.aggregation or ALGORITHMS[stage.algorithm].aggregation

    def objective(model: SailVL, batch: RolloutBatch) -> tuple[Tensor, dict[str, float]]:
        experts = model.config.text.num_experts
        routing: list | None = (
            moe.Replay(batch.choices) if batch.choices else [] if experts else None
        )
        logp = score(model, batch, stage.temperature, routing)  # (N, L)
        total, cut = loss(
            stage.algorithm,
            logp,
            batch.old,
            batch.mask,
            batch.advantage,
            stage.low,
            stage.high,
            how,
        )
        logged = batch.stats | {"clipped": float(cut)} | measured(logp.detach(), batch)
        if batch.reference is not None:
            penalty = aggregate(
                kl_penalty(logp, batch.reference, batch.mask, stage.estimator), batch.mask, how
            )
            total = total + stage.kl * penalty
            logged["kl_reference"] = float(penalty.detach()) / max(batch.weight, 1e-8)
        if routing:
            total = total + stage.balance * moe.balance_loss(routing, batch.real()) * batch.weight
        if batch.choices:
            logged["rerouted"] = routing.rerouted_share()
        return total, {"loss": float(total.detach())} | {
            k: v * batch.weight for k, v in logged.items()
        }

    return objective


def measured(logp: Tensor, batch: RolloutBatch) -> dict[str, float]:
    """How far the policy has moved from the one that sampled. entropy: mean of -log p over tokens that were sampled from it,
    an unbiased estimate of the policy's entropy per token at a fraction of the cost; kl: k3; the spreads are root mean squares
    of the token and sequence log-ratios (GSPO's is the smaller by far)."""
    mask, tokens = batch.mask, batch.mask.sum().clamp(min=1)
    moved, whole = log_ratio(logp, batch.old, mask), sequence_log_ratio(logp, batch.old, mask)
    return {
        "entropy": float(-(batch.old * mask).sum() / tokens),
        "kl": float(((moved.exp() - 1 - moved) * mask).sum() / tokens),
        "spread": float((moved.square().sum() / tokens).sqrt()),
        "spread_sequence": float(whole.square().mean().sqrt()),
    }


# ----------------------------------------------------------------------------------------------------------------- recipe

REASONING = {"counting": 1.0, "charts": 1.0, "arithmetic": 1.0, "odd": 1.0}
ALL = ("vision", "adapter", "llm")
TOY = {
    s.name: s
    for s in (
        RLStage(
            "verifiable",
            ALL,
            REASONING,
            steps=104,
            lr=1e-3,
            optimizer="muon",
            prompts=48,
            turns=1,
            tries=1,
            seed=21,
        ),
        RLStage(
            "mixed",
            ALL,
            REASONING,
            steps=32,
            lr=5e-4,
            optimizer="muon",
            prompts=48,
            turns=1,
            tries=1,
            seed=22,
            reward="mixed",
        ),
    )
}
# 2,048 rollouts an episode, 8 updates, minibatches of 512, rate 1e-6, clip in [0.20, 0.28], 16,384 + 4,096 tokens (paper).
# 8 x 512 is twice 2,048: we read two passes. Groups of 8 and steps are ours. One completion a micro-batch: with memory for eight,
# 512 / (8 x ranks) micro-batches are one group each, whose prompt then runs once.
PAPER = {
    s.name: s
    for s in (
        RLStage(
            "verifiable",
            ALL,
            {},
            steps=800,
            length=20480,
            lr=1e-6,
            optimizer="adamw",
            schedule="constant",
            turns=1,
            prompts=256,
            group=8,
            updates=8,
            passes=2,
            accumulate=512,
            max_new=4096,
            overlong=512,
        ),
        RLStage(
            "mixed",
            ALL,
            {},
            steps=800,
            length=20480,
            lr=1e-6,
            optimizer="adamw",
            schedule="constant",
            turns=1,
            prompts=256,
            group=8,
            updates=8,
            passes=2,
            accumulate=512,
            max_new=4096,
            overlong=512,
            reward="mixed",
        ),
    )
}
RECIPES = {"toy": TOY, "paper": PAPER}


def run(
    model: SailVL,
    stage: RLStage,
    source,
    encoder: Encoder,
    world=parallel.Ranks(),
    directory: Path | None = None,
    reward: Reward | None = None,
) -> Run:
    """One RL stage in place: the same loop as every other stage, fed by rollouts of the model that it trains.

    Questions are those with a reference chain: the others (captions) have no verifiable answer. `reward` replaces the
    stage's own: (completion, sample, finished) -> a dict with "reward" and anything else to log."""
    for sentence in check(stage, model.config.text.num_experts):
        warnings.warn(sentence, stacklevel=2)
    questions = (
        s for s in source.stream(stage.mixture, stage.seed, stage.turns) if s.facts.get("chain")
    )
    reference = copy.deepcopy(model).requires_grad_(False) if stage.kl else None
    return train(
        model,
        stage,
        Rollouts(model, encoder, questions, stage, world, reward, reference),
        policy(stage),
        world,
        directory,
    )


@dataclass
class Options(recipe.RunOptions):
    """Run an RL stage. Start from a model that was fine-tuned on long chains (--model)."""

    out: Path = Path("runs/rl")
    stage: tyro.conf.OmitArgPrefixes[RLStage] = field(default_factory=lambda: TOY["verifiable"])


if __name__ == "__main__":
    sys.exit(
        recipe.run(
            recipe.parse(Options, RECIPES),
            RECIPES,
            lambda model, stage, source, encoder, world, directory, faults: run(
                model, stage, source, replace(encoder, root=source.root), world, directory
            ),
        )
    )
