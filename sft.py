"""Supervised fine-tuning: the curriculum of Table 3, long chains of thought, and think-fusion (Table 4), as data.

What it teaches: four phases of rising difficulty on all parameters; then a short run on long chains, which teaches the *form*
that RL needs (`<think>...</think>`, then one `\\boxed{}`); and, after RL, a mixture of direct answers and the policy's own
chains, so that one model answers directly by default and thinks when it is asked to.

    stage      on                                                         paper section
    sft1       questions about single things                              4.1 phase 1
    sft2       + charts, places, boxes                                    4.1 phase 2
    sft3       + reasoning: sums, odd one out                             4.1 phase 3
    sft4       image : video 1 : 1                                        4.1 phase 4
    soup-a/b   two runs from sft4 that differ in seed, averaged           4.1 model soup, Table 5
    long-cot   chains on the reasoning families                           4.2.2, Eq. 2
    fusion     90 % direct, 10 % chains of the RL policy                  4.2.4, Eq. 3

    python sft.py --stage sft1 --data my.jsonl --images dir/ --model runs/pretrain

The loss is on answers only (chain and box for thinking samples). What its sum is divided by is `--weighting`:
    sequence   samples: Eq. 2 and 3 as they stand, -(1/|D|) sum over samples of log P(T, A | I), a sum over each one's tokens
    token      tokens: the same direction, and a loss in nats a token that does not grow with the length of chains
    sample     each sample's own tokens first, then samples: a chain counts as much as a one-word answer
"""

import functools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator

import tyro

import recipe
from curation.chains import blend
from data.encode import Encoder, with_thinking
from data.sample import Faults, Sample
from data.stream import Documents
from packing import Batch, Batches
from pretrain import ALL, INSTRUCTION, UNDERSTANDING, answers_of, run_stage
from scale import parallel
from train import Run, Stage, train
from vlm import SailVL

PHASES = {
    "sft1": ("attributes", "spatial", "counting"),
    "sft2": ("charts", "grounding", "reading"),
    "sft3": ("arithmetic", "odd"),
    "sft4": ("video",),
}
REHEARSE = {"text": 0.05} | {
    f: 0.4 * w for f, w in (UNDERSTANDING | INSTRUCTION).items()
}  # what earlier stages taught

TOY = {
    s.name: s
    for s in (
        Stage(
            "sft1",
            ALL,
            REHEARSE | {"listing": 1.0, "attributes": 3.0, "spatial": 4.0, "counting": 3.0},
            steps=220,
            rows=4,
            lr=5e-3,
            schedule="wsd",
            weighting="sqrt",
        ),
        Stage(
            "sft2",
            ALL,
            REHEARSE | {"listing": 1.5, "charts": 6.0, "grounding": 4.0},
            steps=370,
            rows=4,
            lr=5e-3,
            schedule="wsd",
            weighting="sqrt",
        ),
        Stage(
            "sft3",
            ALL,
            REHEARSE | {"arithmetic": 4.0, "odd": 3.0, "charts": 1.5},
            steps=310,
            rows=4,
            lr=5e-3,
            schedule="wsd",
            weighting="sqrt",
        ),
        Stage(
            "sft4",
            ALL,
            REHEARSE | {"video": 5.0},
            steps=70,
            rows=4,
            lr=5e-3,
            schedule="wsd",
            weighting="sqrt",
        ),
        Stage(
            "soup-a",
            ALL,
            REHEARSE | {"video": 0.5, "charts": 1.2},
            steps=30,
            rows=4,
            lr=3e-3,
            schedule="constant",
            seed=101,
            weighting="sqrt",
        ),
        Stage(
            "soup-b",
            ALL,
            REHEARSE | {"video": 0.5, "charts": 1.2},
            steps=30,
            rows=4,
            lr=3e-3,
            schedule="constant",
            seed=102,
            weighting="sqrt",
        ),
        Stage(
            "moe-branch",
            ALL,
            REHEARSE | {"video": 0.5},
            steps=40,
            rows=4,
            lr=1e-3,
            schedule="wsd",
            weighting="sqrt",
            seed=103,
        ),
        Stage(
            "long-cot",
            ALL,
            {"counting": 0.6, "charts": 1.2, "arithmetic": 2.0, "odd": 0.8},
            steps=120,
            rows=2,
            length=1024,
            lr=5e-3,
            schedule="wsd",
            think=1.0,
            turns=1,
        ),
        Stage(
            "fusion",
            ALL,
            REHEARSE | {"video": 0.5},
            steps=100,
            rows=4,
            lr=3e-3,
            schedule="wsd",
            think=0.1,
        ),
    )
}

# Tokens 42B -> 40B -> 16B -> 70B (Table 3); long-CoT 0.4B, fusion 1B tokens, batch 1024, AdamW, cosine, 1e-6 (4.2.2). The
# phases' rate and batch are not published: 1e-5 and 512 are the first SAIL-VL's.
PAPER = {
    s.name: s
    for s in (
        Stage("sft1", ALL, {}, steps=10010, rows=512, length=8192, lr=1e-5, optimizer="adamw"),
        Stage("sft2", ALL, {}, steps=9540, rows=512, length=8192, lr=1e-5, optimizer="adamw"),
        Stage("sft3", ALL, {}, steps=3810, rows=512, length=8192, lr=1e-5, optimizer="adamw"),
        Stage(
            "sft4",
            ALL,
            {"image": 1.0, "video": 1.0},
            steps=8340,
            rows=512,
            length=16384,
            lr=1e-5,
            optimizer="adamw",
        ),
        Stage(
            "long-cot",
            ALL,
            {},
            steps=390,
            rows=1024,
            length=20480,
            lr=1e-6,
            think=1.0,
            optimizer="adamw",
            weighting="sequence",
        ),
        Stage(
            "fusion",
            ALL,
            {},
            steps=977,
            rows=1024,
            length=20480,
            lr=1e-6,
            think=0.1,
            optimizer="adamw",
            weighting="sequence",
        ),
    )
}
RECIPES = {"toy": TOY, "paper": PAPER}


class PerSample(Batch):
    """A batch whose loss is divided by its number of samples instead of its tokens."""

    @property
    def weight(self) -> float:
        return float(
            sum(
                bool((part >= 0).any())
                for part in self.labels.reshape(-1).split(self.segments.lengths)
            )
        )

    def to(self, device) -> "PerSample":
        return PerSample(**vars(super().to(device)))


def chains(source, stage: Stage, encoder: Encoder) -> Iterator[Sample]:
    """The source's questions asked with thinking, answered by its reference chains (those samples that have one)."""
    for s in source.stream(stage.mixture, stage.seed, stage.turns):
        if s.facts.get("chain"):
            yield with_thinking(s, encoder.tokenizer.think_prompt)
        elif any(m.think for m in s.messages):
            yield s


def run_samples(
    model: SailVL,
    stage: Stage,
    samples: Iterator[Sample],
    encoder: Encoder,
    world=parallel.Ranks(),
    directory: Path | None = None,
    faults: Faults | None = None,
) -> Run:
    """A supervised stage on a given stream of samples."""
    literal = stage.weighting == "sequence"
    encoder = replace(
        encoder,
        weighting="token" if literal else stage.weighting,
        max_length=min(stage.length, encoder.max_length),
    )
    data = Batches(
        Documents(samples, encoder, faults or Faults()),
        stage.length,
        stage.rows,
        stage.accumulate,
        encoder.tokenizer.pad,
        world.rank,
        world.size,
    )
    if literal:
        data = ([PerSample(**vars(batch)) for batch in micro] for micro in data)
    return train(model, stage, data, answers_of(stage), world, directory)


def long_cot(
    model: SailVL,
    stage: Stage,
    source,
    encoder: Encoder,
    world=parallel.Ranks(),
    directory: Path | None = None,
) -> Run:
    return run_samples(model, stage, chains(source, stage, encoder), encoder, world, directory)


def fusion(
    model: SailVL,
    stage: Stage,
    source,
    harvest: list[Sample],
    encoder: Encoder,
    world=parallel.Ranks(),
    directory: Path | None = None,
) -> Run:
    """Think-fusion: direct samples of the source, and `stage.think` of the stream from the harvested chains."""
    direct = source.stream(stage.mixture, stage.seed, stage.turns)
    return run_samples(
        model, stage, blend(direct, harvest, stage.think, stage.seed), encoder, world, directory
    )


@dataclass
class Options(recipe.RunOptions):
    """Run a fine-tuning stage. Without --data it trains on the toy world."""

    out: Path = Path("runs/sft")
    stage: tyro.conf.OmitArgPrefixes[Stage] = field(default_factory=lambda: TOY["sft1"])


def stage_runner(model, stage, source, encoder, world, directory, faults, workers: int = 0) -> Run:
    if stage.think:
        return long_cot(model, stage, source, replace(encoder, root=source.root), world, directory)
    return run_stage(model, stage, source, encoder, world, directory, faults, workers)


if __name__ == "__main__":
    options = recipe.parse(Options, RECIPES)
    sys.exit(recipe.run(options, RECIPES, functools.partial(stage_runner, workers=options.workers)))
