"""Model soup: the average of runs that began at the same place.

What it teaches: fine-tunes of one checkpoint that differ only in seed or data order lie in one basin, and the mean of their
weights is often better than either. Runs with different histories do not, and their mean is noise: the paper's Table 5 has
74.91 + 74.54 -> 76.60 for homologous and 74.54 + 75.41 -> 12.86 for heterologous models. `distance` tells them apart before
anything is averaged.

    python soup.py --models runs/a runs/b --out runs/soup
    python soup.py --models runs/a runs/b runs/c --out runs/soup --greedy True --data held_out.jsonl --images dir/

Uniform: the mean of all. Greedy: best first, and each next one only if the mean does not get worse with it (Wortsman et al.,
arXiv 2203.05482, recipe 1); the paper says only that it averages. Either way tensors are read one at a time, so memory holds
one model, however many there are.
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Callable, Iterator

import torch
from safetensors import safe_open
from torch import Tensor

from data.encode import Encoder
from data.readers import Folder
from data.world import FAMILIES, World
from evaluate import evaluate
from generate import load_model
from infra import weights

STRANGERS = (
    0.5  # our choice: relative distance above which models are taken to have no common history
)


class Checkpoint(Mapping):
    """The tensors of a model directory by name, each read from disk when it is asked for."""

    def __init__(self, directory: Path):
        self.where = weights.locate(directory)
        self.files = {path: safe_open(path, "pt") for path in set(self.where.values())}

    def __getitem__(self, name: str) -> Tensor:
        return self.files[self.where[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def side_by_side(states: list[Mapping[str, Tensor]]) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, that tensor of every model), one name at a time. Raises ValueError for different architectures."""
    names = list(states[0])
    for state in states[1:]:
        if odd := set(names) ^ set(
            state
        ):  # sets: asking a Checkpoint whether it holds a name would read the tensor
            raise ValueError(
                f"cannot average different architectures: they disagree about {sorted(odd)[0]}"
            )
    for name in names:
        tensors = [state[name] for state in states]
        if len({t.shape for t in tensors}) > 1:
            raise ValueError(
                f"cannot average different architectures: {name} has shapes {[list(t.shape) for t in tensors]}"
            )
        yield name, tensors


def average(states: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Uniform mean of state dictionaries (or Checkpoints), in fp32, tensor by tensor. Raises ValueError for different
    architectures."""
    return {
        name: (sum(t.float() for t in tensors) / len(tensors)).to(tensors[0].dtype)
        for name, tensors in side_by_side(states)
    }


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative distance of two models, |a - b| / sqrt(|a| |b|): a few percent between homologous runs, about 1.4 between
    strangers."""
    gap = norm_a = norm_b = 0.0
    for _, (x, y) in side_by_side([a, b]):
        x, y = x.float(), y.float()
        gap, norm_a, norm_b = (
            gap + float((x - y).square().sum()),
            norm_a + float(x.square().sum()),
            norm_b + float(y.square().sum()),
        )
    return gap**0.5 / (norm_a * norm_b) ** 0.25


def greedy(
    states: list[Mapping[str, Tensor]], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """(mean, indices of its ingredients). `score` grades a state dictionary, higher is better; called 2n - 1 times."""
    alone = [score(average([s])) for s in states]
    order = sorted(range(len(states)), key=lambda i: -alone[i])
    chosen, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        if (reached := score(average([states[j] for j in (*chosen, i)]))) >= best:
            chosen, best = [*chosen, i], reached
    return average([states[j] for j in chosen]), chosen


def farthest(states: list[Mapping[str, Tensor]]) -> float:
    """Largest distance between any two; warns when they look like strangers."""
    far = max(distance(a, b) for a, b in combinations(states, 2))
    if far > STRANGERS:
        warnings.warn(
            f"these models are {far:.2f} apart: they do not share a history and their mean is likely noise (paper, "
            "Table 5: 12.86)",
            stacklevel=2,
        )
    return far


@dataclass
class Options:
    """Average model directories of one architecture."""

    models: tuple[Path, ...]
    out: Path
    greedy: bool = False  # best first, and only what does not make the mean worse on held-out data
    data: Path | None = (
        None  # held-out LLaVA file for --greedy; none: the toy world's held-out side
    )
    images: Path | None = None
    samples: int = 100  # held-out samples (per family of the toy world)
    force: bool = False  # average although the models are far apart


def main(o: Options) -> int:
    if len(o.models) < 2:
        raise ValueError("--models wants at least two directories")
    states = [Checkpoint(directory) for directory in o.models]
    far = farthest(states)
    print(f"largest relative distance between two models: {far:.3f}")
    if far > STRANGERS and not o.force:
        raise ValueError(
            f"not averaging models that are {far:.2f} apart; say --force True to do it all the same"
        )
    model, tokenizer = load_model(o.models[0])

    def fill(state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, view in weights.tensors(model).items():
                if name in state:  # a tied head is stored once
                    view.copy_(state[name])

    if o.greedy:
        held = (
            Folder(o.data, o.images).first(o.samples)
            if o.data
            else [s for f in FAMILIES for s in World().held_out(f, o.samples)]
        )
        encoder = Encoder(tokenizer, model.config, o.images or (o.data and o.data.parent))

        def score(state: dict[str, Tensor]) -> float:
            fill(state)
            return evaluate(model, encoder, held)[0]["overall"].accuracy

        mean, chosen = greedy(states, score)
        print(f"greedy soup of {', '.join(str(o.models[i]) for i in chosen)}")
    else:
        mean = average(states)
    fill(mean)
    model.save_pretrained(o.out)
    tokenizer.save(o.out)
    print(f"wrote {o.out}")
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
