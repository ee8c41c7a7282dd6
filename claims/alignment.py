"""Alignment, measured: how far what the ViT says is from what the language model reads.

What it teaches: "the ViT speaks the language model's language" can be put into numbers, without training anything (Table 7: the
distances between two clouds of points) or with a small probe (Table 6), and a curve of scores over data into two (a log law).

    python -m claims.alignment --model runs/toy/vit3 --before runs/toy/image          # distances and probe of two models of one ladder
    python -m claims.alignment --toy 3                                                # over 3 seeds, from scratch: start -> SAIL-ViT
    python -m claims.alignment --model runs/toy/vit3 --curve runs/mine/log.jsonl      # accuracy of a run's checks over its steps

Legend: N vision tokens of width Cv, M rows of the embedding table of width C, P principal components.

Table 7 names three distances and defines none. Ours: PCA to two dimensions fitted to each side by itself (the widths differ);
nearest: mean over vision tokens of the distance to the nearest row; wasserstein: sliced W1 (mean over directions of the
one-dimensional distance, which sorting solves; a lower bound of W1); mean: over all pairs. Two clouds that were projected each
by itself share no unit, and features that spread grow away from any table; so the same three are also taken in each cloud's own
unit (its mean distance from its centre). Last, between the *adapter's* tokens and the rows, in the language model's own space:
of directions, because every block begins with an RMSNorm.
Table 6's probe: mean of the final tokens of an image, a two-layer MLP on top; the ViT stays frozen (the paper does not say).
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

from data.encode import Encoder
from data.images import normalise
from data.sample import Faults
from data.world import World
from generate import load_model
from infra.journal import read_log
from vlm import SailVL

TABLE7 = {
    "Qwen3-0.6B": ((1.42, 4.86, 10.78), (1.15, 3.88, 9.52)),
    "Qwen3-1.7B": ((1.30, 4.65, 11.11), (1.05, 3.60, 9.89)),
    "Qwen3-8B": ((0.78, 3.59, 11.24), (0.66, 2.63, 10.06)),
}  # AIMv2 -> SAIL-ViT: nearest, wasserstein, mean


@dataclass(frozen=True)
class Distances:
    nearest: float
    wasserstein: float
    mean: float


def pca(x: Tensor, dims: int) -> Tensor:
    """(N, C) -> (N, dims): the centred points in the directions of their largest variance."""
    centred = x - x.mean(0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:dims].T


def distances(a: Tensor, b: Tensor, directions: int = 128, seed: int = 0) -> Distances:
    """Between the clouds a (N, P) and b (M, P): nearest from a to b, sliced Wasserstein-1, mean over all pairs."""
    pairs = torch.cdist(a, b)
    way = F.normalize(
        torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(seed)), dim=0
    )
    share = (torch.arange(512) + 0.5) / 512
    along = [torch.quantile(points @ way, share, dim=0) for points in (a, b)]
    return Distances(
        float(pairs.min(1).values.mean()),
        float((along[0] - along[1]).abs().mean()),
        float(pairs.mean()),
    )


@torch.no_grad()
def vision_tokens(model: SailVL, images: list) -> tuple[Tensor, Tensor]:
    """uint8 images of one size -> (what the ViT says (N, tokens, Cv), what the adapter makes of it (N * tokens / 4, C))."""
    features, grids = model.vision_model(normalise(images))
    return features.view(len(images), -1, features.shape[1]), model.mlp1(features, grids)


def table7(model: SailVL, images: list, rows: int = 2000, seed: int = 0) -> dict[str, Distances]:
    """The distances after PCA (the paper's), the same in each cloud's own unit, and of directions in the language model's space."""
    features, adapted = vision_tokens(model, images)
    table = model.language_model.model.embed_tokens.weight.detach()
    pick = lambda x: x[
        torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:rows]
    ].float()
    text = pick(table)
    seen, read = pca(pick(features.flatten(0, 1)), 2), pca(text, 2)
    unit = lambda x: x / x.norm(dim=1).mean()
    return {
        "after PCA": distances(seen, read),
        "own units": distances(unit(seen), unit(read)),
        "adapter": distances(F.normalize(pick(adapted)), F.normalize(text)),
    }


def probe(
    features: Tensor, labels: Tensor, held: Tensor, truth: Tensor, epochs: int = 10, seed: int = 0
) -> float:
    """Accuracy on (held, truth) of a two-layer MLP trained for `epochs` on (features, labels); features (N, Cv) are means over
    the final tokens, labels (N,) int64."""
    torch.manual_seed(seed)
    mean, std = features.mean(0), features.std(0) + 1e-6
    width, classes = features.shape[1], int(max(labels.max(), truth.max())) + 1
    mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(features)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(mlp((features[part] - mean) / std), labels[part]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((mlp((held - mean) / std).argmax(1) == truth).float().mean())


def log_law(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares for y = a + b log10(x): (a, b, R^2). Raises ValueError for fewer than 3 points."""
    if len(x) < 3:
        raise ValueError(f"a log law has 2 parameters: {len(x)} points do not test it")
    u, n = [math.log10(v) for v in x], len(x)
    mu, my = sum(u) / n, sum(y) / n
    b = sum((p - mu) * (q - my) for p, q in zip(u, y)) / sum((p - mu) ** 2 for p in u)
    a = my - b * mu
    rest, all_ = sum((q - a - b * p) ** 2 for p, q in zip(u, y)), sum((q - my) ** 2 for q in y)
    return a, b, 1 - rest / all_ if all_ else 1.0


def pictures(encoder: Encoder, family: str, n: int, seed: int) -> tuple[list, list[str]]:
    """One held-out picture and the answer of each of n questions of a family (tiles of the toy are whole pictures)."""
    samples = World().held_out(family, n, seed)
    return [encoder.images(s)[0][0] for s in samples], [s.facts["answer"] for s in samples]


def table6(
    model: SailVL, encoder: Encoder, family: str = "reading", n: int = 600
) -> tuple[float, float]:
    """(probe accuracy, share of the commonest class) on a family with few answers; two thirds to train on."""
    images, said = pictures(encoder, family, n, 3)
    names = sorted(set(said))
    labels = torch.tensor([names.index(a) for a in said])
    features = vision_tokens(model, images)[0].mean(1)
    cut = 2 * n // 3
    return probe(features[:cut], labels[:cut], features[cut:], labels[cut:]), float(
        labels[cut:].bincount().max() / len(labels[cut:])
    )


def report(name: str, model: SailVL, encoder: Encoder, seed: int = 0) -> dict[str, Distances]:
    found = table7(model, pictures(encoder, "caption", 320, 2)[0], seed=seed)
    accuracy, chance = table6(model, encoder, "counting")
    cells = "  ".join(
        f"{kind}: {d.nearest:.2f} / {d.wasserstein:.2f} / {d.mean:.2f}" for kind, d in found.items()
    )
    print(f"{name:28s} {cells}  probe {accuracy:.1%} (commonest {chance:.1%})", flush=True)
    return found


def toy(seeds: int, effort: float) -> bool:
    """Stand-ins, then SAIL-ViT I to III, for each seed: do the distances fall, in own units? Prints the paper's beside them."""
    import pretrain
    import recipe

    fell = True
    for seed in range(seeds):
        torch.manual_seed(seed)
        source = World()
        model, tokenizer = recipe.new_model("toy", source, seed)
        encoder = Encoder(tokenizer, model.config, max_length=512)
        short = lambda name: replace(
            s := pretrain.TOY[name],
            steps=max(4, round(s.steps * effort)),
            seed=s.seed + 1000 * seed,
        )
        pretrain.run_stage(model, short("language"), source, encoder)
        pretrain.pretrain_vit(model, short("image"), source, encoder)
        before = report(f"seed {seed}: image stand-in", model, encoder, seed)
        for name in ("vit1", "vit2", "vit3"):
            pretrain.run_stage(model, short(name), source, encoder, faults=Faults())
        after = report(f"seed {seed}: SAIL-ViT", model, encoder, seed)
        fell &= all(
            getattr(after["own units"], d) < getattr(before["own units"], d)
            for d in ("nearest", "wasserstein", "mean")
        )
    for llm, (aim, sail) in TABLE7.items():
        print(
            f"{'paper, ' + llm:28s} after PCA: "
            + " / ".join(map(str, aim))
            + "  ->  "
            + " / ".join(map(str, sail))
        )
    print("in own units all distances fell for every seed" if fell else "NOT ALL DISTANCES FELL")
    return fell


@dataclass
class Options:
    """Distances between vision tokens and the embedding table, a probe, and log laws."""

    model: Path | None = None  # a saved model
    before: Path | None = None  # an earlier one, to compare with
    curve: Path | None = (
        None  # log.jsonl of a run with --check-every: fits accuracy = a + b log10(step)
    )
    toy: int = 0  # seeds to run from scratch
    effort: float = 0.5  # multiplies the toy's steps


def main(o: Options) -> int:
    for path in filter(None, (o.before, o.model)):
        model, tokenizer = load_model(path)
        report(path.name, model, Encoder(tokenizer, model.config))
    if o.curve:
        rows = [(r["step"] + 1, r["check"]["accuracy"]) for r in read_log(o.curve) if "check" in r]
        a, b, r2 = log_law(*map(list, zip(*rows)))
        print(f"accuracy = {a:.3f} + {b:.3f} log10(step), R^2 {r2:.3f}, {len(rows)} checks")
    return 0 if not o.toy or toy(o.toy, o.effort) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
