"""Pre-training: the recipe of Table 3, as data.

What it teaches: SAIL-VL2 is not trained at once. A vision encoder is first made to speak the language
model's language (SAIL-ViT, three stages that thaw one part after another); then a *new* adapter joins it
to a *fresh* language model (basic pre-training, where AdaLRS finds the rate); then everything trains on
everything (multi-task).

    stage       trains               on                                    paper section
    language    llm                  text           stand-in for Qwen3, toy only, not in the paper
    image       vision               pixels         stand-in for AIMv2, toy only: predict the next patch
    vit1        adapter              captions, text in images              3.1 "warm-up adaptation"
    vit2        vision + adapter     captions, text in images              3.1 "fine-grained alignment"
    vit3        all                  everything                            3.1 "world-knowledge injection"
    basic       adapter (new)        captions, text in images; AdaLRS      3.2 "basic multimodal pre-training"
    multitask   all                  understanding + instruction, text     3.2 "multi-task pre-training"

    python pretrain.py multitask --data my.jsonl --images dir/ --out runs/mine
    torchrun --nproc-per-node 2 pretrain.py multitask
    python vlm.py --vision SAILViT-Huge --text Qwen3-1.7B --out start      # released weights, new adapter
    torchrun --nproc-per-node 8 pretrain.py paper:basic --model start --data my.jsonl

`v1:` and `v1-8b:` are the stages of the first SAIL-VL (arXiv 2501.05952, its Table 3). Nothing runs here:
`recipe.run_command` does. README has the toy's rows and the paper's side by side.
"""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from data.world import CAPTION, INSTRUCTION, UNDERSTANDING
from recipe import RunOptions, run_command
from stage import ALL, BaseStage, Stage

# ------------------------------------------------------------------------------------------ the toy

EVERYTHING = UNDERSTANDING | INSTRUCTION | {"text": 0.1}
TEXT = {"text": 1.0} | UNDERSTANDING | INSTRUCTION | {"video": 0.5}
# What the first phase of SFT teaches is asked half as often (our choice)
MULTITASK_TOY = EVERYTHING | {"attributes": 1.5, "spatial": 1.5}
ADAPTER = ("adapter",)
EYES = ("vision", "adapter")


def toy_stage(
    name: str, trains: tuple[str, ...], mixture: dict[str, float], steps: int, **more
) -> Stage:
    """A stage of the toy: rows of 512 tokens, four a step, under Muon."""
    return Stage(name, trains, mixture, steps=steps, rows=4, **({"lr": 5e-3} | more))


BROAD = {"schedule": "wsd", "weighting": "sqrt"}  # for stages on many kinds of question
SEARCH = {"adalrs": True, "adalrs_k": 12, "adalrs_window": (0.0, 0.7)}

TOY: dict[str, BaseStage] = {
    "language": toy_stage("language", ("llm",), TEXT, 150, lr=1e-2, **BROAD),
    "image": toy_stage("image", ("vision",), {"caption": 1.0}, 30, objective="next_patch"),
    "vit1": toy_stage("vit1", ADAPTER, CAPTION, 30),
    "vit2": toy_stage("vit2", EYES, CAPTION, 80),
    "vit3": toy_stage("vit3", ALL, EVERYTHING, 90, **BROAD),
    "basic": toy_stage(
        "basic", ADAPTER, CAPTION, 120, lr=3e-4, optimizer="adamw", schedule="constant", **SEARCH
    ),
    "multitask": toy_stage("multitask", ALL, MULTITASK_TOY, 400, **BROAD),
}

# --------------------------------------------------------------------------------------- the paper
# Certain (3.1, 3.2, Table 3): what trains, samples, 8192 tokens a row, batches of 1920 / 512 / 512 / 2048
# samples, rates of 2e-4 / 2e-5 / 1e-5 / 2e-4, AdaLRS in `basic` only, one epoch.
# Inferred: 2000 tokens a sample (128B / 64M, 360B / 180M; SAIL-ViT's 121B give 2040), hence rows a step.
# Not published, ours: the multi-task batch and rate, AdamW and its betas, weight decay, warm-up, cosine,
# one rate for all parts (`--lr-scale vision=0.5` changes it), shares inside a mixture but those of stage I
# and of the multi-task halves (90M understanding, 90M instruction, text in both).
# Mixtures name tasks of --data; a file with none of them is used whole.

TOKENS_A_SAMPLE = 2000
STAGE1 = {"caption": 4.9, "ocr": 3.1}  # millions of samples: SAIL-Caption, IDL-WDS
STAGE2 = {"caption": 11.6, "ocr": 4.1, "video": 1.0}  # + 6.7M captions; DocStruct, video: our split
STAGE3 = {"caption": 0.3, "ocr": 0.2, "open_qa": 0.15, "math": 0.1, "short_qa": 0.15, "text": 0.1}
MULTITASK = {
    "caption": 0.35,
    "ocr": 0.1,
    "caption2qa": 0.25,
    "vqa": 0.15,
    "math": 0.05,
    "text": 0.1,
}


def paper_stage(
    name: str,
    trains: tuple[str, ...],
    mixture: dict[str, float],
    samples: float,
    batch: int,
    lr: float,
    **more,
) -> Stage:
    """One epoch of `samples` in batches of `batch`, as rows of 8192 tokens that hold as many.

    Rows are a multiple of 32, so that ranks divide them. One row at a time on each rank, activations
    made again in the backward pass.
    """
    length = 8192
    rows = 32 * round(batch * TOKENS_A_SAMPLE / length / 32)
    steps = round(samples * TOKENS_A_SAMPLE / (rows * length))
    return Stage(
        name,
        trains,
        mixture,
        steps=steps,
        rows=rows,
        length=length,
        accumulate=0,
        recompute=True,
        lr=lr,
        warmup=0.03,
        optimizer="adamw",
        weight_decay=0.05,
        **more,
    )


PAPER: dict[str, BaseStage] = {
    "vit1": paper_stage("vit1", ADAPTER, STAGE1, 8.0e6, 1920, 2e-4),
    "vit2": paper_stage("vit2", EYES, STAGE2, 14.7e6, 512, 2e-5),
    "vit3": paper_stage("vit3", ALL, STAGE3, 36.5e6, 512, 1e-5),
    "basic": paper_stage("basic", ADAPTER, STAGE1, 64e6, 2048, 2e-4, adalrs=True),
    "multitask": paper_stage("multitask", ALL, MULTITASK, 180e6, 2048, 2e-5),
}

# The first SAIL-VL, 2B and 8B: samples, batch and rate as printed; tokens 131B and 524B for the 2B.
CAPTION_OCR = {"caption": 0.6, "ocr": 0.4}  # shares: ours
V1: dict[str, BaseStage] = {
    "align": paper_stage("align", ADAPTER, CAPTION_OCR, 64e6, 1920, 1e-4),
    "advance": paper_stage("advance", EYES, CAPTION_OCR, 256e6, 2048, 4e-5),
}
V1_8B: dict[str, BaseStage] = {
    "align": paper_stage("align", ADAPTER, CAPTION_OCR, 10e6, 512, 1e-3),
    "advance": paper_stage("advance", EYES, CAPTION_OCR, 16e6, 2048, 4e-5),
}
RECIPES = {"toy": TOY, "paper": PAPER, "v1": V1, "v1-8b": V1_8B}


@dataclass
class PretrainOptions(RunOptions):
    """Run a stage of pre-training. Without --data it trains on the drawn world."""

    out: Path = Path("runs/pretrain")
    stage: tyro.conf.OmitArgPrefixes[Stage] = field(default_factory=Stage)


if __name__ == "__main__":
    run_command(PretrainOptions, RECIPES)
