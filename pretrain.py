"""Pre-training: the recipe of Table 3, as data, and the few lines that run it.

What it teaches: SAIL-VL2 is not trained at once. A vision encoder is first made to speak the language model's language
(SAIL-ViT, three stages that thaw one part after another); then a *new* adapter joins it to a *fresh* language model (basic
pre-training, where AdaLRS finds the rate); then everything trains on everything (multi-task).

    stage       trains               on                                    paper section
    language    llm                  text           stand-in for Qwen3, toy only, not in the paper
    image       vision               pixels         stand-in for AIMv2, toy only: predict the next patch
    vit1        adapter              captions, text in images              3.1 "warm-up adaptation"
    vit2        vision + adapter     captions, text in images              3.1 "fine-grained alignment"
    vit3        all                  everything                            3.1 "world-knowledge injection"
    basic       adapter (new)        captions, text in images; AdaLRS      3.2 "basic multimodal pre-training"
    multitask   all                  understanding + instruction, text     3.2 "multi-task pre-training"

    python pretrain.py --stage multitask --data my.jsonl --images dir/
    torchrun --nproc-per-node 2 pretrain.py --stage multitask
    python vlm.py --vision SAILViT-Huge --text Qwen3-1.7B --out start      # released weights and a new adapter
    torchrun --nproc-per-node 8 pretrain.py --scale paper --stage basic --model start --data my.jsonl

Both scales are tables of `Stage` below; `python -m tools.readme` prints them side by side. Simplified: the image stand-in predicts
pixels with a linear head where AIMv2 has a decoder.
"""

import itertools
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

import recipe
from attention import sdpa
from data.encode import Encoder
from data.images import normalise
from data.sample import Faults
from data.stream import Documents
from packing import Batches
from scale import parallel
from train import Run, Stage, answers, train
from vit import ViT, patchify
from vlm import SailVL

CAPTION = {"caption": 1.0, "listing": 1.0, "reading": 0.5}
UNDERSTANDING = {"caption": 1.0, "listing": 1.0, "reading": 0.5, "grounding": 0.8}
INSTRUCTION = {
    "attributes": 3.0,
    "spatial": 3.0,
    "counting": 2.0,
    "charts": 2.0,
    "arithmetic": 2.0,
    "odd": 1.5,
}
ALL = ("vision", "adapter", "llm")

TOY = {
    s.name: s
    for s in (
        Stage(
            "language",
            ("llm",),
            {"text": 1.0} | UNDERSTANDING | INSTRUCTION | {"video": 0.5},
            steps=150,
            rows=4,
            lr=1e-2,
            schedule="wsd",
            weighting="sqrt",
        ),
        Stage("image", ("vision",), {"caption": 1.0}, steps=30, rows=4, lr=5e-3),
        Stage("vit1", ("adapter",), CAPTION, steps=30, rows=4, lr=5e-3),
        Stage("vit2", ("vision", "adapter"), CAPTION, steps=60, rows=4, lr=5e-3),
        Stage(
            "vit3",
            ALL,
            UNDERSTANDING | INSTRUCTION | {"text": 0.1},
            steps=90,
            rows=4,
            lr=5e-3,
            schedule="wsd",
            weighting="sqrt",
        ),
        Stage(
            "basic",
            ("adapter",),
            CAPTION,
            steps=120,
            rows=4,
            lr=1e-4,
            optimizer="adamw",
            schedule="constant",
            adalrs=True,
            adalrs_k=12,
            adalrs_window=(0.0, 0.7),
        ),
        Stage(
            "multitask",
            ALL,
            UNDERSTANDING | INSTRUCTION | {"text": 0.1},
            steps=540,
            rows=4,
            lr=5e-3,
            schedule="wsd",
            weighting="sqrt",
        ),
    )
}

# Paper scale. Certain (3.1, 3.2, Table 3): what trains, samples, 8192 tokens a row, batches of 1920 / 512 / 512 / 2048, rates of
# 2e-4 / 2e-5 / 1e-5 / 2e-4, AdaLRS in `basic` only. Inferred: 2000 tokens a sample (128B / 64M, 360B / 180M; SAIL-ViT's 121B give
# 2040), hence rows. Not published, ours: the multi-task batch and rate, AdamW and its betas, weight decay, warm-up, cosine, one
# rate for all parts (`--lr-scale.vision 0.5` changes it), shares inside a mixture but those of stage I and the multi-task halves
# (90M understanding, 90M instruction, text in both). Mixtures name tasks of --data; a file with none of them is used whole.
STAGE1 = {"caption": 4.9, "ocr": 3.1}  # millions of samples: SAIL-Caption, IDL-WDS
STAGE2 = {
    "caption": 9.6,
    "ocr": 4.1,
    "video": 1.0,
}  # + 6.7M more captions, DocStruct, video; their split is ours
STAGE3 = {"caption": 0.3, "ocr": 0.2, "open_qa": 0.15, "math": 0.1, "short_qa": 0.15, "text": 0.1}
MULTITASK = {"caption": 0.45, "caption2qa": 0.25, "vqa": 0.2, "text": 0.1}


def paper(
    name: str,
    trains: tuple[str, ...],
    mixture: dict[str, float],
    samples: float,
    batch: int,
    lr: float,
    **more,
) -> Stage:
    """A stage of `samples` in batches of `batch`: rows of 8192 tokens that hold as many (a multiple of 32, so that ranks divide
    them), and the steps that see all of them once. One row at a time on each rank, activations recomputed."""
    rows = 32 * round(batch * 2000 / 8192 / 32)
    return Stage(
        name,
        trains,
        mixture,
        steps=round(samples * 2000 / (rows * 8192)),
        rows=rows,
        length=8192,
        accumulate=0,
        lr=lr,
        warmup=0.03,
        optimizer="adamw",
        weight_decay=0.05,
        recompute=True,
        **more,
    )


PAPER = {
    s.name: s
    for s in (
        paper("vit1", ("adapter",), STAGE1, 8.0e6, 1920, 2e-4),
        paper("vit2", ("vision", "adapter"), STAGE2, 14.7e6, 512, 2e-5),
        paper("vit3", ALL, STAGE3, 36.5e6, 512, 1e-5),
        paper("basic", ("adapter",), STAGE1, 64e6, 2048, 2e-4, adalrs=True),
        paper("multitask", ALL, MULTITASK, 180e6, 2048, 2e-5),
    )
}
RECIPES = {"toy": TOY, "paper": PAPER}


def supervised(
    source, stage: Stage, encoder: Encoder, faults: Faults, world=parallel.Ranks(), workers: int = 0
) -> Iterator[list]:
    """The batches of a supervised stage: source -> documents -> packed rows -> this rank's micro-batches."""
    encoder = replace(
        encoder,
        everything=stage.everything,
        weighting=stage.weighting,
        max_length=min(stage.length, encoder.max_length),
        root=source.root,
    )
    found = Documents(
        source.stream(stage.mixture, stage.seed, stage.turns), encoder, faults, workers=workers
    )
    return Batches(
        found,
        stage.length,
        stage.rows,
        stage.accumulate,
        encoder.tokenizer.pad,
        world.rank,
        world.size,
    )


def run_stage(
    model: SailVL,
    stage: Stage,
    source,
    encoder: Encoder,
    world=parallel.Ranks(),
    directory: Path | None = None,
    faults: Faults | None = None,
    workers: int = 0,
) -> Run:
    """One supervised stage on a source (`world.World` or `readers.Folder`), in place. workers: processes that read and decode."""
    faults = faults or Faults()
    run = train(
        model,
        stage,
        supervised(source, stage, encoder, faults, world, workers),
        answers_of(stage),
        world,
        directory,
    )
    if faults.counts and world.main:
        print(faults.report())
    return run


def answers_of(stage: Stage):
    return lambda model, batch: answers(
        model, batch, stage.balance, stage.router_z, stage.expert_bias_rate
    )


# ------------------------------------------------------------------------------------------- the stand-in for AIMv2's ViT


class PatchPredictor(nn.Module):
    """A ViT that sees a random prefix of an image's patches both ways and the rest causally, and says the next patch.

    AIMv2's objective (autoregressive pixels under prefix attention) with a linear head in place of its decoder. Targets are
    normalised inside each patch, so that predicting the mean scores 1.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        c = vit.config
        self.vision_model = vit
        self.head = nn.Linear(c.hidden_size, 3 * c.patch_size**2)

    def loss(self, images: Tensor, prefix: int) -> Tensor:
        """images (N, 3, H, W) -> mean squared error over the patches after the prefix (a scalar)."""
        patches = patchify(images, self.vision_model.config.patch_size)  # (N, L, 3 p p)
        N, L, _ = patches.shape
        i, j = torch.arange(L)[:, None], torch.arange(L)[None]
        seen = (j <= i) | (j < prefix)  # (L, L): row i may look at column j

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(*(t.view(N, L, *t.shape[1:]) for t in (q, k, v)), attn_mask=seen).reshape(
                q.shape
            )

        features, _ = self.vision_model(images, attend)  # (N*L, C)
        said = self.head(features.view(N, L, -1)[:, max(prefix - 1, 0) : -1])
        target = patches[:, max(prefix, 1) :]
        target = (target - target.mean(-1, keepdim=True)) / (target.std(-1, keepdim=True) + 0.1)
        return F.mse_loss(said, target)


@dataclass
class Pixels:
    """A batch of images as the loop takes it; `ids` is what tokens per second are counted by (one per patch)."""

    images: Tensor
    prefix: int
    ids: Tensor
    filled: float = 1.0
    weight: float = 1.0

    def to(self, device) -> "Pixels":
        return replace(self, images=self.images.to(device))


def pixels(
    source, stage: Stage, encoder: Encoder, world=parallel.Ranks()
) -> Iterator[list[Pixels]]:
    """Images of the source, as many a step as would fill the stage's rows with patches."""
    c = encoder.config.vision
    per_image = (c.image_size // c.patch_size) ** 2
    n, rng = max(1, stage.rows * stage.length // per_image // world.size), random.Random(stage.seed)
    arrays = (a for s in source.stream(stage.mixture, stage.seed, 1) for a in encoder.images(s)[0])
    mine = itertools.islice(arrays, world.rank, None, world.size)
    while True:
        images = normalise(list(itertools.islice(mine, n)))
        yield [
            Pixels(
                images,
                rng.randrange(per_image // 2),
                torch.zeros(len(images), per_image),
                weight=1.0 / world.size,
            )
        ]


def pretrain_vit(
    model: SailVL,
    stage: Stage,
    source,
    encoder: Encoder,
    world=parallel.Ranks(),
    directory: Path | None = None,
) -> tuple[Run, PatchPredictor]:
    predictor = PatchPredictor(model.vision_model)
    predictor.requires_grad_(True)

    def objective(m: PatchPredictor, b: Pixels) -> tuple[Tensor, dict[str, float]]:
        loss = m.loss(b.images, b.prefix) * b.weight
        return loss, {"loss": float(loss.detach())}

    return train(
        predictor, stage, pixels(source, stage, encoder, world), objective, world, directory
    ), predictor


def stand_in_parts(model: SailVL) -> dict[str, Tensor]:
    """A copy of the language model as it is now: basic pre-training starts from it again (paper: from Qwen3, not from the
    language model that SAIL-ViT was trained with)."""
    return {k: v.clone() for k, v in model.language_model.state_dict().items()}


@dataclass
class Options(recipe.RunOptions):
    """Run pre-training stages. Without --data they train on the toy world."""

    out: Path = Path("runs/pretrain")
    stage: tyro.conf.OmitArgPrefixes[Stage] = field(default_factory=lambda: TOY["multitask"])


def main(o: Options) -> int:
    return recipe.run(
        o,
        RECIPES,
        lambda model, stage, source, encoder, world, directory, faults: (
            pretrain_vit(model, stage, source, encoder, world, directory.path)[0]
            if stage.name == "image"
            else run_stage(model, stage, source, encoder, world, directory, faults, o.workers)
        ),
    )


if __name__ == "__main__":
    sys.exit(main(recipe.parse(Options, RECIPES)))
