"""Reinforcement learning with verifiable rewards, as data: the recipe of sections 4.2.3 and 4.2.5.

What it teaches: sample a group of answers, compare them, make the better ones likelier. The parts stand in
files of their own, and the loop is everyone's:

    prompts -> rollout.py (n answers each) -> rewards.py -> policy_losses.py (advantages, loss) -> train.py

    stage        reward                                  on
    verifiable   answer x format                         questions with a rule to grade them   4.2.3
    mixed        .7 answer + .2 think + .1 format        hard ones, and general ones           4.2.5

    python rl.py verifiable --model runs/toy/long-cot --out runs/rl
    python rl.py verifiable --data verl.parquet --model runs/toy/long-cot --algorithm gspo
    torchrun --nproc-per-node 2 rl.py verifiable --model runs/toy/long-cot

Certain (paper): DAPO for dense models, GSPO for MoE; 2,048 rollouts an episode, 8 updates, minibatches of
512, rate 1e-6, clip in [0.20, 0.28], which we read as DAPO's two sides; 16,384 + 4,096 tokens; .1B and .2B
tokens, which are 50K and 100K questions of 2000. Inferred: 8 x 512 is twice 2,048, hence two passes.
Not published, our choice: group size, temperature, mixed weights, no KL (as SAIL-RL), GSPO's clip range.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from data.world import REASONING
from recipe import RunOptions, run_command
from stage import ALL, BaseStage, RLStage

# ------------------------------------------------------------------------------------------ the toy

QUESTIONS = dict.fromkeys(REASONING, 1.0) | {"arithmetic": 2.0}


def toy_rl(name: str, steps: int, lr: float, **more) -> RLStage:
    """48 questions x 8 answers for two updates under Muon."""
    return RLStage(name, ALL, QUESTIONS, steps=steps, lr=lr, prompts=48, turns=1, tries=1, **more)


TOY: dict[str, BaseStage] = {
    "verifiable": toy_rl("verifiable", 80, 1e-3, seed=21),
    "mixed": toy_rl("mixed", 96, 5e-4, seed=22, reward="mixed"),
}

# --------------------------------------------------------------------------------------- the paper
# On 8 ranks an update has 64 completions a rank: 8 micro-batches of one group, whose prompt runs once.
# A call of `generate` has one prompt, so that 8 rows of 20,480 cached tokens (2B: 19 GB) are the most.


def paper_rl(name: str, questions: int, **more) -> RLStage:
    """One epoch over so many questions."""
    prompts = 256
    updates = 8
    return RLStage(
        name,
        ALL,
        {},
        steps=updates * round(questions / prompts),
        lr=1e-6,
        optimizer="adamw",
        schedule="constant",
        recompute=True,
        prompts=prompts,
        group=8,
        updates=updates,
        passes=2,
        accumulate=8,
        batch=1,
        max_prompt=16384,
        max_new=4096,
        overlong=512,
        **more,
    )


PAPER: dict[str, BaseStage] = {
    "verifiable": paper_rl("verifiable", 50_000),
    "mixed": paper_rl("mixed", 100_000, reward="mixed"),
}
RECIPES = {"toy": TOY, "paper": PAPER}


@dataclass
class RLOptions(RunOptions):
    """Run a stage of RL. Start from a model that was fine-tuned on long chains (--model)."""

    out: Path = Path("runs/rl")
    stage: tyro.conf.OmitArgPrefixes[RLStage] = field(default_factory=RLStage)


if __name__ == "__main__":
    run_command(RLOptions, RECIPES)
