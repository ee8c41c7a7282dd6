"""Reinforcement learning with verifiable rewards: sample a group of answers, compare them, make the better ones likelier.

What it teaches: the GRPO family differs in three small choices: what the ratio is taken over, how it is clipped, and what the
sum is divided by. Each is a pure function below. Around them: group rollouts (image and prompt run once per group),
sampled ids trained as sampled, the end token inside the mask, one temperature for sampling and scoring, and log-probabilities
that are the training forward's own.

    prompts -> generate (n answers each) -> rewards -> advantages -> minibatches -> train.train with `policy` as objective

    python rl.py --stage verifiable --model runs/toy/long-cot --out runs/rl

Legend: N completions, L longest completion, mask (N, L) 1 on sampled tokens including the end token.
Sources: SAIL-VL2 section 4.2.3 and 4.2.5 (DAPO for dense models, GSPO for MoE; 2,048 rollouts, 8 updates, rate 1e-6, clip in
[0.20, 0.28]); DAPO arXiv 2503.14476; GSPO 2507.18071. Not published, our choice: group size, temperature, mixed weights,
GSPO's clip range (we take its own paper's: [0.20, 0.28] would never clip a sequence ratio).
"""
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator

import torch
import tyro
from torch import Tensor

import cli
import moe
import parallel
import rewards
from attention import Segments
from data import Encoder, Sample, normalise, with_thinking
from evaluate import text_of
from generate import generate
from packing import Batch
from train import Run, Stage, train
from vlm import SailVL


@dataclass(frozen=True)
class RLStage(Stage):
    """A stage whose batches are rollouts. `steps` counts gradient updates; one rollout batch gives `updates` of them."""
    algorithm: str = "dapo"  # dapo (dense) or gspo (MoE)
    prompts: int = 64  # groups in a rollout batch, over all ranks
    group: int = 8  # completions per prompt
    updates: int = 2  # minibatches per rollout batch
    low: float = 0.20  # clip range of the ratio: [1 - low, 1 + high]
    high: float = 0.28
    temperature: float = 1.0
    max_new: int = 64  # tokens
    overlong: int = 8  # tokens before max_new in which the length is punished, linearly down to -1 (DAPO Eq. 13)
    tries: int = 3  # rollout rounds to find groups that are neither all right nor all wrong (DAPO's dynamic sampling)
    reward: str = "verifiable"  # verifiable (answer and format) or mixed (answer, think, format)


# -------------------------------------------------------------------------------------------------------------- advantage

def group_advantage(reward: Tensor, group: int, by_std: bool = True) -> Tensor:
    """(N,) rewards, `group` consecutive completions per prompt -> (N,): (r - mean) / std inside each group (GRPO, DAPO
    Eq. 9). A group that agrees gets exactly zero. by_std False leaves the difference alone (Dr.GRPO)."""
    r = reward.view(-1, group)
    centred = r - r.mean(1, keepdim=True)
    if by_std:
        centred = centred / (r.std(1, correction=0, keepdim=True) + 1e-6)
    return centred.reshape(-1)


def overlong_penalty(length: int, limit: int, soft: int) -> float:
    """DAPO Eq. 13: 0 up to limit - soft tokens, then linearly down to -1 at the limit."""
    return 0.0 if soft == 0 or length <= limit - soft else max(-1.0, (limit - soft - length) / soft)


# ------------------------------------------------------------------------------------------------------------------- loss
# Each returns (sum to minimise, share of clipped terms). The caller divides the sum by the *global* number of tokens (dapo)
# or of sequences (gspo), so that splitting a batch over micro-batches or ranks changes nothing.

def dapo(logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Token ratios, clip-higher, summed over all tokens (DAPO Eq. 8): -sum min(r A, clip(r, 1-low, 1+high) A)."""
    ratio = ((logp - old) * mask).clamp(-20, 20).exp()
    A = advantage[:, None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    clipped = ((A > 0) & (ratio > 1 + high) | (A < 0) & (ratio < 1 - low)) * mask
    return -(gain * mask).sum(), clipped.sum() / mask.sum()


def gspo(logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """One ratio per sequence, the geometric mean of its token ratios (GSPO Eq. 5-7); summed over sequences."""
    ratio = (((logp - old) * mask).sum(1) / mask.sum(1)).clamp(-20, 20).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    clipped = (advantage > 0) & (ratio > 1 + high) | (advantage < 0) & (ratio < 1 - low)
    return -gain.sum(), clipped.float().mean()


ALGORITHMS: dict[str, Callable] = {"dapo": dapo, "gspo": gspo}
NORMALISER = {"dapo": "tokens", "gspo": "sequences"}


# ---------------------------------------------------------------------------------------------------------------- rollout

@dataclass
class RolloutBatch(Batch):
    """A packed batch of completions with their prompts, plus what the policy loss needs.

    at (n,): flat positions whose label was sampled; sequence, place (n,): which completion and which of its tokens;
    old (N, L), mask (N, L), advantage (N,). `weight` is what the loss is divided by.
    """
    at: Tensor = None
    sequence: Tensor = None
    place: Tensor = None
    old: Tensor = None
    mask: Tensor = None
    advantage: Tensor = None
    divisor: str = "tokens"
    stats: dict = field(default_factory=dict)

    @property
    def weight(self) -> float:
        return float(self.mask.sum()) if self.divisor == "tokens" else float(len(self.advantage))

    def to(self, device) -> "RolloutBatch":
        assert str(device) == "cpu" or self.ids.device.type != "cpu", "rollouts are built on the model's device"
        return self


def reward_of(text: str, sample: Sample, finished: bool, kind: str) -> float:
    """The stage's reward of one completion. Verifiable: 1 for a right answer in a right format, else 0 (both are binary in
    the paper, section 4.2.3, which does not say how they combine: their product is our choice)."""
    if kind == "mixed":
        return rewards.mixed_reward(text, sample.facts, finished)
    if kind == "verifiable":
        return rewards.answer_reward(text, sample.facts["answer"], finished) * rewards.format_reward(text, finished)
    raise ValueError(f"unknown reward {kind!r}; choose verifiable or mixed")


@torch.no_grad()
def rollout(model: SailVL, encoder: Encoder, samples: list[Sample], stage: RLStage, seed: int):
    """`group` completions of every sample, with rewards. Returns (prompts, answers, rewards (N,), texts)."""
    asked = [with_thinking(s, encoder.tokenizer.think_prompt) for s in samples]
    prompts = [encoder.prompt(s) for s in asked]
    answers = generate(model, prompts, encoder.tokenizer.end, stage.max_new, stage.group, stage.temperature, seed=seed)
    texts = [text_of(a, encoder.tokenizer) for a in answers]
    reward = torch.tensor([reward_of(t, samples[a.prompt], a.finished, stage.reward) for t, a in zip(texts, answers)])
    return prompts, answers, reward, texts


def rollouts(model: SailVL, encoder: Encoder, source: Iterator[Sample], stage: RLStage,
             world=parallel.World()) -> Iterator[list[RolloutBatch]]:
    """Endless steps for `train.train`: sample with the present policy, keep groups that disagree, cut into `updates` parts.

    Each rank rolls out its own prompts. If `tries` rounds do not fill the batch with mixed groups, train on what there is:
    dynamic sampling must end on data that is too easy or too hard.
    """
    share, round_number = stage.prompts // world.size, 0
    if share * world.size != stage.prompts or share % stage.updates:
        raise ValueError(f"{stage.prompts} prompts do not divide over {world.size} ranks x {stage.updates} updates")
    while True:
        kept, seen = [], {"reward": 0.0, "length": 0.0, "groups": 0, "useless": 0}
        for attempt in range(stage.tries):
            n = share if attempt == 0 else max(1, share // 2)  # later rounds only fill the gaps
            drawn = [next(source) for _ in range(n * world.size)][world.rank::world.size]
            round_number += 1
            prompts, answers, reward, texts = rollout(model, encoder, drawn, stage, stage.seed + 7919 * round_number + world.rank)
            shaped = reward + torch.tensor([overlong_penalty(len(a.ids), stage.max_new, stage.overlong) for a in answers])
            advantage = group_advantage(shaped, stage.group)
            for i, prompt in enumerate(prompts):
                part = slice(i * stage.group, (i + 1) * stage.group)
                mixed = bool(reward[part].min() < reward[part].max())
                seen["groups"] += 1
                seen["useless"] += not mixed
                if mixed:
                    kept.append((prompt, answers[part], advantage[part]))
            seen["reward"] += float(reward.sum())
            seen["length"] += sum(len(a.ids) for a in answers)
            full = parallel.total(float(len(kept) >= share))[0] == world.size  # all ranks go on, or none
            if full or attempt + 1 == stage.tries:
                break
        kept = kept[:share] or [(prompts[0], answers[:stage.group], advantage[:stage.group])]
        sampled = seen["groups"] * stage.group
        stats = {"reward": seen["reward"] / sampled, "length": seen["length"] / sampled, "useless": seen["useless"] / seen["groups"]}
        size = max(1, -(-len(kept) // stage.updates))
        for at in range(stage.updates):
            yield [pack_rollouts(kept[at * size:(at + 1) * size] or kept[:1], encoder, stage, stats)]


def pack_rollouts(groups: list, encoder: Encoder, stage: RLStage, stats: dict) -> RolloutBatch:
    """Completions as one packed row of documents: prompt and sampled ids, never re-encoded. The last id of each is a label
    only, so it is not fed."""
    documents = [(list(prompt[0]), prompt[1], a, float(A)) for prompt, answers, adv in groups for a, A in zip(answers, adv)]
    L = max(len(a.ids) for _, _, a, _ in documents)
    N, lengths = len(documents), [len(p) + len(a.ids) - 1 for p, _, a, _ in documents]
    old, mask = torch.zeros(N, L), torch.zeros(N, L)
    at, labels, sequence, place, start = [], [], [], [], 0
    for i, (prompt, _, a, _) in enumerate(documents):
        n = len(a.ids)
        old[i, :n], mask[i, :n] = torch.tensor(a.logprobs), 1.0
        at += range(start + len(prompt) - 1, start + len(prompt) - 1 + n)  # position t predicts token t + 1
        labels += a.ids
        sequence += [i] * n
        place += range(n)
        start += lengths[i]
    ids = torch.tensor([[t for prompt, _, a, _ in documents for t in prompt + a.ids[:-1]]])
    images = [array for _, arrays, _, _ in documents for array in arrays]
    segments = Segments.of(lengths)
    return RolloutBatch(ids, torch.tensor(labels), torch.ones(len(labels)), segments.positions()[None], segments,
                        normalise(images) if images else None, at=torch.tensor(at), sequence=torch.tensor(sequence),
                        place=torch.tensor(place), old=old, mask=mask, advantage=torch.tensor([A for *_, A in documents]),
                        divisor=NORMALISER[stage.algorithm], stats=stats)


def policy(stage: RLStage):
    """The objective of RL: score the sampled tokens under the present policy, then the algorithm's loss."""
    if stage.algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {stage.algorithm!r}; choose from {', '.join(ALGORITHMS)}")

    def objective(model: SailVL, batch: RolloutBatch) -> tuple[Tensor, dict[str, float]]:
        routing: list | None = [] if model.config.text.num_experts else None
        flat = model.logprobs(batch.ids, batch.images, batch.positions, batch.segments, batch.at, batch.labels,
                              stage.temperature, routing)
        logp = torch.zeros_like(batch.old).index_put((batch.sequence, batch.place), flat)  # (N, L)
        loss, clipped = ALGORITHMS[stage.algorithm](logp, batch.old, batch.mask, batch.advantage, stage.low, stage.high)
        if routing:
            loss = loss + stage.balance * moe.balance_loss(routing) * batch.weight
        with torch.no_grad():
            gap = (batch.old - logp) * batch.mask
            kl = ((-gap).exp() - 1 + gap).mul(batch.mask).sum() / batch.mask.sum()  # k3 estimate of KL(old || new)
        logged = batch.stats | {"clipped": float(clipped), "kl": float(kl), "surprise": float(-(batch.old * batch.mask).sum() /
                                                                                             batch.mask.sum())}
        return loss, {"loss": float(loss.detach())} | {k: v * batch.weight for k, v in logged.items()}

    return objective


# ----------------------------------------------------------------------------------------------------------------- recipe

REASONING = {"counting": 1.0, "charts": 1.0, "arithmetic": 1.0, "odd": 1.0}
ALL = ("vision", "adapter", "llm")
TOY = {s.name: s for s in (
    RLStage("verifiable", ALL, REASONING, steps=72, lr=1e-3, optimizer="muon", turns=1, tries=1, seed=21),
    RLStage("mixed", ALL, REASONING, steps=24, lr=5e-4, optimizer="muon", turns=1, tries=1, seed=22, reward="mixed"),
)}
# 2,048 rollouts an episode, 8 updates, rate 1e-6, clip in [0.20, 0.28], 16,384 + 4,096 tokens (paper); groups of 8 are ours.
PAPER = {s.name: s for s in (
    RLStage("verifiable", ALL, {}, steps=800, length=20480, lr=1e-6, optimizer="adamw", schedule="constant", turns=1,
            prompts=256, group=8, updates=8, max_new=4096, overlong=512),
    RLStage("mixed", ALL, {}, steps=800, length=20480, lr=1e-6, optimizer="adamw", schedule="constant", turns=1,
            prompts=256, group=8, updates=8, max_new=4096, overlong=512, reward="mixed"),
)}
RECIPES = {"toy": TOY, "paper": PAPER}


def run(model: SailVL, stage: RLStage, source, encoder: Encoder, world=parallel.World(), directory: Path | None = None) -> Run:
    """One RL stage in place: the same loop as every other stage, fed by rollouts of the model that it trains.

    Questions are those with a reference chain: the others (captions) have no verifiable answer."""
    questions = (s for s in source.stream(stage.mixture, stage.seed, stage.turns) if s.facts.get("chain"))
    return train(model, stage, rollouts(model, encoder, questions, stage, world), policy(stage), world, directory)


@dataclass
class Options(cli.RunOptions):
    """Run an RL stage. Start from a model that was fine-tuned on long chains (--model)."""
    out: Path = Path("runs/rl")
    stage: tyro.conf.OmitArgPrefixes[RLStage] = field(default_factory=lambda: TOY["verifiable"])


if __name__ == "__main__":
    sys.exit(cli.run(cli.parse(Options, RECIPES), RECIPES, lambda model, stage, source, encoder, world, directory, faults:
                     run(model, stage, source, replace(encoder, root=source.root), world, directory)))
