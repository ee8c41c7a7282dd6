"""How SmolLM2 learns to see: three stages, as data.

What it teaches: the paper's order at a laptop's price. A token through SmolLM2 costs two hundred times
what a token through the toy's language model costs, so the eyes learn beside the toy's (SAIL-ViT's
stages, section 3.1); then a *new* adapter joins them to the real language model (basic pre-training,
3.2), which stays frozen: what it knew of text, it knows.

    stage     trains              on                      through
    eyes      all                 captions, questions     the toy's language model, from nothing
    align     adapter (new)       captions                SmolLM2, frozen
    answers   vision + adapter    captions, questions     SmolLM2, frozen

    torchrun --nproc-per-node 2 -m smol.stages eyes --data real/train.jsonl --out runs/smol/eyes
    python -m smol.join                                    # eyes + SmolLM2 + a new adapter
    torchrun --nproc-per-node 2 -m smol.stages align --data real/train.jsonl --model runs/smol/start \\
        --out runs/smol/align
    torchrun --nproc-per-node 2 -m smol.stages answers --data real/train.jsonl --model runs/smol/align \\
        --out runs/smol/answers
    python -m smol.measure                                 # losses, answers, perplexity: a page

`make smol` is these lines. Each is a run like any other: stopped, it goes on where it was. On GPUs give
longer rows and more of them (`--rows 64 --length 1024 --steps 4000`), and `--trains vision adapter llm
--lr 1e-4` to thaw the language model: then watch what smol.measure says of text.

Steps and rates are ours; the paper published none for such sizes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from recipe import RunOptions, run_command
from stage import ALL, BaseStage, Stage

# Shares of tasks; those that a file does not have are left out.
CAPTIONS = {"caption": 3.0, "listing": 1.0, "reading": 1.0, "codes": 0.5}
QUESTIONS = {
    "attributes": 2.0,
    "shapes": 2.0,
    "spatial": 1.5,
    "charts": 1.0,
    "counting": 0.5,
    "odd": 0.5,
}


def frozen_stage(
    name: str, trains: tuple[str, ...], mixture: dict[str, float], steps: int, **more
) -> Stage:
    """A stage through the frozen language model: some thirty samples in four short rows a step."""
    return Stage(
        name,
        trains,
        mixture,
        steps=steps,
        rows=4,
        length=256,
        lr=1e-3,
        schedule="wsd",
        optimizer="adamw",
        **more,
    )


SMOL: dict[str, BaseStage] = {
    "eyes": Stage(
        "eyes",
        ALL,
        CAPTIONS | QUESTIONS,
        steps=1200,
        rows=4,
        lr=5e-3,
        schedule="wsd",
        weighting="sqrt",
    ),
    "align": frozen_stage("align", ("adapter",), CAPTIONS, 250),
    "answers": frozen_stage(
        "answers", ("vision", "adapter"), CAPTIONS | QUESTIONS, 500, lr_scale={"vision": 0.3}
    ),
}


@dataclass
class SmolOptions(RunOptions):
    """Run a stage on a person's data."""

    out: Path = Path("runs/smol/out")
    stage: tyro.conf.OmitArgPrefixes[Stage] = field(default_factory=Stage)


if __name__ == "__main__":
    run_command(SmolOptions, {"toy": SMOL})
