"""Alignment, measured: how far what the ViT says is from what the language model reads.

What it teaches: "the ViT speaks the language model's language" can be put into numbers, without
training anything (Table 7: the distances between two clouds of points) or with a small probe (Table
6), and a curve of scores over data into two (a log law).

    picture -> ViT -> vision tokens (N, Cv) --PCA--> (N, P) --+
    embedding table of the language model (M, C) --PCA--> (M, P) --+--> three distances
    vision tokens --mean over an image--> (Cv,) --two-layer MLP--> accuracy on a family's answers

    python -m claims.alignment --model runs/toy/vit3 --before runs/toy/image      # two models of a ladder
    python -m claims.alignment --toy 3                                            # 3 seeds, from scratch
    python -m claims.alignment --curve runs/mine/log.jsonl                        # accuracy over the steps

Legend: N vision tokens of width Cv, M rows of the embedding table of width C, P principal components.

Table 7 names three distances and defines none. Ours: PCA to two dimensions fitted to each side by
itself (the widths differ), then

    nearest       mean over vision tokens of the distance to the nearest row
    wasserstein   sliced W1: mean over directions of the one-dimensional distance, which sorting
                  solves; a lower bound of W1
    mean          over all pairs

Two clouds that were projected each by itself share no unit, and features that spread grow away from
any table; so the same three are also taken in each cloud's own unit (its mean distance from its
centre). Last, between the *adapter's* tokens and the rows, in the language model's own space: of
directions, because every block begins with an RMSNorm.

Table 6's probe: mean of the final tokens of an image, a two-layer MLP on top; the ViT stays frozen
(the paper does not say).
"""

import math
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import pretrain
import recipe
from data.encode import Encoder
from data.images import normalise
from data.world import World
from generate import load_model
from infra.cli import command
from infra.journal import read_log
from recipe import Setup, fit
from vlm import SailVL

# AIMv2 -> SAIL-ViT, by language model: nearest, wasserstein, mean.
TABLE7 = {
    "Qwen3-0.6B": ((1.42, 4.86, 10.78), (1.15, 3.88, 9.52)),
    "Qwen3-1.7B": ((1.30, 4.65, 11.11), (1.05, 3.60, 9.89)),
    "Qwen3-8B": ((0.78, 3.59, 11.24), (0.66, 2.63, 10.06)),
}
LADDER = ("vit1", "vit2", "vit3")


def new_toy(seed: int) -> tuple[SailVL, Encoder]:
    """An untrained toy. With `fit_toy_stage` all that is called of the recipe."""
    model, tokenizer = recipe.new_model("toy", World(), seed)
    return model, Encoder(tokenizer, model.config, max_length=512)


def fit_toy_stage(model: SailVL, encoder: Encoder, name: str, effort: float, seed: int) -> None:
    """One stage of the toy's ladder, in place, with a share of its steps."""
    stage = pretrain.TOY[name]
    steps = max(4, round(stage.steps * effort))
    stage = replace(stage, steps=steps, seed=stage.seed + 1000 * seed)
    fit(Setup(model, encoder, World()), stage)


# --------------------------------------------------------------------------- Table 7: distances


@dataclass(frozen=True)
class Distances:
    nearest: float
    wasserstein: float
    mean: float


def pca(x: Tensor, dims: int) -> Tensor:
    """(N, C) -> (N, dims): the centred points in the directions of their largest variance."""
    centred = x - x.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh  # (C, C), largest first
    return centred @ directions[:dims].T


def distances(a: Tensor, b: Tensor, directions: int = 128, seed: int = 0) -> Distances:
    """Between the clouds a (N, P) and b (M, P).

    Nearest from a to b, sliced Wasserstein-1, mean over all pairs.
    """
    pairs = torch.cdist(a, b)  # (N, M)

    # Both clouds on lines in random directions, at 512 quantiles each.
    generator = torch.Generator().manual_seed(seed)
    lines = F.normalize(torch.randn(a.shape[1], directions, generator=generator), dim=0)
    quantiles = (torch.arange(512) + 0.5) / 512
    along_a = torch.quantile(a @ lines, quantiles, dim=0)  # (512, directions)
    along_b = torch.quantile(b @ lines, quantiles, dim=0)

    nearest = pairs.min(1).values.mean()
    wasserstein = (along_a - along_b).abs().mean()
    return Distances(float(nearest), float(wasserstein), float(pairs.mean()))


@torch.no_grad()
def vision_tokens(model: SailVL, images: list) -> tuple[Tensor, Tensor]:
    """uint8 images of one size -> what the ViT says and what the adapter makes of it.

    (N, tokens, Cv) and (N * tokens / 4, C).
    """
    features, grids = model.vision_model(normalise(images))
    adapted = model.mlp1(features, grids)
    return features.view(len(images), -1, features.shape[1]), adapted


def in_own_unit(x: Tensor) -> Tensor:
    """A centred cloud in its mean distance from its centre."""
    return x / x.norm(dim=1).mean()


def table7(model: SailVL, images: list, rows: int = 2000, seed: int = 0) -> dict[str, Distances]:
    """The distances of a model, from at most `rows` points on each side.

    After PCA (the paper's), the same in each cloud's own unit, and of directions in the language
    model's space.
    """

    def some(x: Tensor) -> Tensor:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        return x[order[:rows]].float()

    features, adapted = vision_tokens(model, images)
    text = some(model.language_model.model.embed_tokens.weight.detach())  # (rows, C)
    seen = pca(some(features.flatten(0, 1)), 2)  # (rows, 2)
    read = pca(text, 2)
    directions = F.normalize(some(adapted))
    return {
        "after PCA": distances(seen, read),
        "own units": distances(in_own_unit(seen), in_own_unit(read)),
        "adapter": distances(directions, F.normalize(text)),
    }


# ----------------------------------------------------------------------------- Table 6: a probe


def probe_accuracy(
    features: Tensor, labels: Tensor, held: Tensor, truth: Tensor, epochs: int = 10, seed: int = 0
) -> float:
    """Accuracy on (held, truth) of a two-layer MLP trained on (features, labels).

    features (N, Cv) are means over the final tokens, labels (N,) int64.
    """
    torch.manual_seed(seed)
    mean = features.mean(0)
    std = features.std(0) + 1e-6
    features = (features - mean) / std
    held = (held - mean) / std

    width = features.shape[1]
    classes = int(max(labels.max(), truth.max())) + 1
    mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(features)).split(32):
            optimizer.zero_grad()
            loss = F.cross_entropy(mlp(features[batch]), labels[batch])
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        right = mlp(held).argmax(1) == truth
    return float(right.float().mean())


def held_out_pictures(encoder: Encoder, family: str, n: int, seed: int) -> tuple[list, list[str]]:
    """One held-out picture and the answer of each of n questions of a family.

    Tiles of the toy are whole pictures.
    """
    samples = World().held_out(family, n, seed)
    images = [encoder.images(sample)[0][0] for sample in samples]
    return images, [sample.facts["answer"] for sample in samples]


def table6(
    model: SailVL, encoder: Encoder, family: str = "reading", n: int = 600
) -> tuple[float, float]:
    """(probe accuracy, share of the commonest class) on a family with few answers.

    Two thirds of n pictures to train on, one third to score.
    """
    images, answers = held_out_pictures(encoder, family, n, seed=3)
    names = sorted(set(answers))
    labels = torch.tensor([names.index(answer) for answer in answers])
    tokens, _ = vision_tokens(model, images)
    features = tokens.mean(1)  # (n, Cv)

    train = 2 * n // 3
    held = features[train:]
    truth = labels[train:]
    commonest = truth.bincount().max() / len(truth)
    return probe_accuracy(features[:train], labels[:train], held, truth), float(commonest)


# ------------------------------------------------------------------------------------ a log law


def log_law(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares for y = a + b log10(x): (a, b, R^2). Raises ValueError for fewer than 3 points."""
    if len(x) < 3:
        raise ValueError(f"a log law has 2 parameters: {len(x)} points do not test it")
    u = torch.tensor([math.log10(value) for value in x], dtype=torch.float64)
    v = torch.tensor(y, dtype=torch.float64)
    du = u - u.mean()
    dv = v - v.mean()
    b = (du * dv).sum() / (du * du).sum()
    a = v.mean() - b * u.mean()

    unexplained = (v - a - b * u).square().sum()
    total = dv.square().sum()
    r2 = 1 - unexplained / total if total > 0 else torch.ones(())
    return float(a), float(b), float(r2)


def fit_curve(log: Path) -> str:
    """The law of the checks in a run's log: accuracy over steps."""
    steps = []
    accuracies = []
    for row in read_log(log):
        if "check" in row:
            steps.append(row["step"] + 1)
            accuracies.append(row["check"]["accuracy"])
    a, b, r2 = log_law(steps, accuracies)
    return f"accuracy = {a:.3f} + {b:.3f} log10(step), R^2 {r2:.3f}, {len(steps)} checks"


# ------------------------------------------------------------------------------------ the command


def report_alignment(
    name: str, model: SailVL, encoder: Encoder, seed: int = 0
) -> dict[str, Distances]:
    """Both tables of one model, printed on a line."""
    images, _ = held_out_pictures(encoder, "caption", 320, seed=2)
    found = table7(model, images, seed=seed)
    accuracy, commonest = table6(model, encoder, "counting")
    cells = []
    for kind, measured in found.items():
        numbers = " / ".join(f"{value:.2f}" for value in astuple(measured))
        cells.append(f"{kind}: {numbers}")
    probe = f"probe {accuracy:.1%} (commonest {commonest:.1%})"
    print(f"{name:28s} {'  '.join(cells)}  {probe}", flush=True)
    return found


def compare_from_scratch(seeds: int, effort: float) -> bool:
    """Stand-ins, then SAIL-ViT I to III, for each seed: do the distances fall, in own units?

    Prints the paper's beside them.
    """
    all_fell = True
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, encoder = new_toy(seed)
        for name in ("language", "image"):
            fit_toy_stage(model, encoder, name, effort, seed)
        before = report_alignment(f"seed {seed}: image stand-in", model, encoder, seed)
        for name in LADDER:
            fit_toy_stage(model, encoder, name, effort, seed)
        after = report_alignment(f"seed {seed}: SAIL-ViT", model, encoder, seed)
        for field in fields(Distances):
            then = getattr(before["own units"], field.name)
            now = getattr(after["own units"], field.name)
            all_fell &= now < then

    for llm, (aimv2, sail_vit) in TABLE7.items():
        then = " / ".join(map(str, aimv2))
        now = " / ".join(map(str, sail_vit))
        print(f"{'paper, ' + llm:28s} after PCA: {then}  ->  {now}")
    verdict = "in own units all distances fell for every seed"
    print(verdict if all_fell else "NOT ALL DISTANCES FELL")
    return all_fell


@dataclass
class AlignmentOptions:
    """Distances between vision tokens and the embedding table, a probe, and log laws."""

    model: Path | None = None  # a saved model
    before: Path | None = None  # an earlier one, to compare with
    curve: Path | None = None  # log.jsonl of a run with --check-every: fits accuracy over steps
    toy: int = 0  # seeds to run from scratch
    effort: float = 0.5  # multiplies the toy's steps


def measure_alignment(options: AlignmentOptions) -> int:
    """Everything that the options ask for; status 1 when the toy's distances did not fall."""
    if not (options.model or options.before or options.curve or options.toy):
        raise ValueError("nothing to measure: give --model, --curve or --toy")
    for path in (options.before, options.model):
        if path:
            model, tokenizer = load_model(path)
            report_alignment(path.name, model, Encoder(tokenizer, model.config))
    if options.curve:
        print(fit_curve(options.curve))
    if options.toy and not compare_from_scratch(options.toy, options.effort):
        return 1
    return 0


if __name__ == "__main__":
    command(measure_alignment)
