"""Supervised fine-tuning: the curriculum of Table 3, long chains, and think-fusion (Table 4), as data.

What it teaches: four phases of rising difficulty on all parameters; then a short run on long chains,
which teaches the *form* that RL needs (`<think>...</think>`, then one `\\boxed{}`); and, after RL, a
mixture of direct answers and the policy's own chains, so that one model answers directly by default and
thinks when it is asked to.

    stage       samples   on                                               paper section
    sft1        answers   questions about single things                    4.1 phase 1
    sft2        answers   + charts, places, boxes                          4.1 phase 2
    sft3        answers   + reasoning: sums, odd one out                   4.1 phase 3
    sft4        answers   image : video 1 : 1                              4.1 phase 4
    soup-a/b    answers   two runs from sft4 that differ in seed           4.1 model soup, Table 5
    long-cot    chains    chains on the reasoning families                 4.2.2, Eq. 2
    fusion      fusion    90 % direct, 10 % chains of the RL policy        4.2.4, Eq. 3

    python sft.py sft1 --data my.jsonl --images dir/ --model runs/pretrain
    python sft.py long-cot --data chains.jsonl --model runs/sft          # rows with <think>...</think>
    python sft.py fusion --data my.jsonl --harvest harvest.jsonl --model runs/rl

The loss is on answers only (chain and box for thinking samples). `--weighting` says what its sum is
divided by:
    sequence   samples: Eq. 2 and 3 as they stand, -(1/|D|) sum over samples of log P(T, A | I), a sum
               over each one's tokens
    token      tokens: the same direction, and a loss in nats a token that does not grow with chains
    sample     each sample's own tokens first, then samples: a chain counts as much as one word
    sqrt       between the two: a sample counts as the square root of its length (ours, the toy's)

`v1:` are the three SFT stages of the first SAIL-VL. Nothing runs here: `recipe.run_command` does.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from data.world import EARLIER
from recipe import RunOptions, run_command
from stage import ALL, BaseStage, Stage

# ------------------------------------------------------------------------------------------ the toy


def phase(name: str, new: dict[str, float], steps: int, **more) -> Stage:
    """A phase of the toy: what is new, and a little of all that earlier stages taught."""
    defaults = {"lr": 5e-3, "schedule": "wsd", "weighting": "sqrt"}
    return Stage(name, ALL, EARLIER | new, steps=steps, rows=4, **(defaults | more))


SINGLE_THINGS = {"listing": 1.0, "attributes": 3.0, "spatial": 4.0, "counting": 3.0}
# One question a picture, and few drills: an answer that stands in the conversation is copied, not looked up.
CHARTS = {"listing": 0.2, "charts": 6.0, "grounding": 4.0, "arithmetic": 0.2}
PHASE_3 = {"arithmetic": 5.0, "odd": 3.0, "charts": 3.0}
VIDEO = {"video": 5.0, "arithmetic": 2.0, "odd": 1.5}  # what came last is lost first
SOUP = {"video": 0.5, "charts": 1.2, "arithmetic": 2.0, "odd": 1.2}
BRANCH = SOUP | {"grounding": 1.0}
CHAINS = {"counting": 0.8, "charts": 1.8, "arithmetic": 3.0, "odd": 1.8}
# What the chains have overwritten most, and text. A quarter of chains, where the paper has a
# tenth: with a tenth the toy forgets to think while it learns to answer (our choice; LOG.md has both).
FUSION = {
    "video": 1.5,
    "text": 0.15,
    "caption": 0.8,
    "reading": 1.0,
    "grounding": 1.2,
    "counting": 0.8,
    "charts": 1.2,
    "arithmetic": 1.5,
    "odd": 1.0,
}

TOY: dict[str, BaseStage] = {
    "sft1": phase("sft1", SINGLE_THINGS, 150),
    "sft2": phase("sft2", CHARTS, 390, turns=1),
    "sft3": phase("sft3", PHASE_3, 280),
    "sft4": phase("sft4", VIDEO, 70, lr=3e-3),
    "soup-a": phase("soup-a", SOUP, 30, lr=3e-3, schedule="constant", seed=101),
    "soup-b": phase("soup-b", SOUP, 30, lr=3e-3, schedule="constant", seed=102),
    "moe-branch": phase("moe-branch", BRANCH, 40, lr=5e-4, seed=103),
    "long-cot": Stage(
        "long-cot",
        ALL,
        CHAINS,
        samples="chains",
        steps=260,
        rows=2,
        length=1024,
        lr=5e-3,
        schedule="wsd",
        turns=1,
    ),
    "fusion": phase("fusion", FUSION, 240, lr=3e-3, samples="fusion", think=0.25),
}

# --------------------------------------------------------------------------------------- the paper
# Certain: tokens 42B -> 40B -> 16B -> 70B and row lengths (Table 3); long CoT .4B, fusion 1B tokens, rows
# of 20,480, batches of 1024 samples, AdamW, cosine, 1e-6, one epoch (4.2.2, Table 4).
# Inferred: 1000 tokens a sample in both (.4B / 400K chains, 1B / 1M samples), hence rows a step.
# Not published: the phases' rate and batch; 1e-5 and 512 samples are the first SAIL-VL's. A video of 16
# frames has over 4,096 tokens: phase 4 is counted with 3200 a sample.


def paper_phase(
    name: str,
    tokens: float,
    batch: int,
    sample: int,
    length: int,
    multiple: int = 32,
    mixture: dict[str, float] | None = None,
    **more,
) -> Stage:
    """A stage of so many tokens in batches of `batch` samples of about `sample` tokens each.

    Rows are a multiple of `multiple`, so that ranks divide them. One row at a time on each rank.
    """
    rows = multiple * max(1, round(batch * sample / length / multiple))
    steps = round(tokens / (rows * length))
    return Stage(
        name,
        ALL,
        mixture or {},
        steps=steps,
        rows=rows,
        length=length,
        accumulate=0,
        recompute=True,
        optimizer="adamw",
        **({"lr": 1e-5} | more),
    )


HALF_VIDEO = {"image": 1.0, "video": 1.0}
AS_PRINTED = {"lr": 1e-6, "weighting": "sequence"}  # Eq. 2 and 3

PAPER: dict[str, BaseStage] = {
    "sft1": paper_phase("sft1", 42e9, 512, 2000, 8192),
    "sft2": paper_phase("sft2", 40e9, 512, 2000, 8192),
    "sft3": paper_phase("sft3", 16e9, 512, 2000, 8192),
    "sft4": paper_phase("sft4", 70e9, 512, 3200, 16384, mixture=HALF_VIDEO),
    "long-cot": paper_phase(
        "long-cot", 0.4e9, 1024, 1000, 20480, 8, samples="chains", **AS_PRINTED
    ),
    "fusion": paper_phase("fusion", 1e9, 1024, 1000, 20480, 8, samples="fusion", **AS_PRINTED),
}

# The first SAIL-VL (its Tables 2 and 3): 21M, 12M and 3.5M samples, batch 512, 1e-5, one epoch.
V1: dict[str, BaseStage] = {
    "knowledge": paper_phase("knowledge", 21e6 * 2000, 512, 2000, 8192),
    "instruction": paper_phase("instruction", 12e6 * 2000, 512, 2000, 8192),
    "preference": paper_phase("preference", 3.5e6 * 2000, 512, 2000, 8192),
}
RECIPES = {"toy": TOY, "paper": PAPER, "v1": V1}


@dataclass
class SFTOptions(RunOptions):
    """Run a stage of fine-tuning. Without --data it trains on the drawn world."""

    out: Path = Path("runs/sft")
    stage: tyro.conf.OmitArgPrefixes[Stage] = field(default_factory=Stage)


if __name__ == "__main__":
    run_command(SFTOptions, RECIPES)
