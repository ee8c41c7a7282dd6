"""Model soup: the average of runs that began at the same place.

What it teaches: fine-tunes of one checkpoint that differ only in seed or data order lie in one
basin, and the mean of their weights is often better than either. Runs with different histories do
not, and their mean is noise: the paper's Table 5 has 74.91 + 74.54 -> 76.60 for homologous and
74.54 + 75.41 -> 12.86 for heterologous models. `distance` tells them apart before anything is
averaged.

    runs/a, runs/b, ... -> read tensor by tensor -> far apart? refuse
                                                 -> mean of all (uniform)
                                                 -> best first, next ones if they help (greedy)

    python soup.py --models runs/a runs/b --out runs/soup
    python soup.py --models runs/a runs/b runs/c --out runs/soup --greedy --data held_out.jsonl

Uniform: the mean of all. Greedy: best first, and each next one only if the mean does not get worse
with it (Wortsman et al., arXiv 2203.05482, recipe 1); the paper says only that it averages. Either
way tensors are read one at a time, so memory holds the mean and the model that it is put into,
however many ingredients there are. Greedy grades on `--device` in `--dtype`, on all ranks of
torchrun; what is written has the type of the files that were read.
"""

import functools
import math
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
from data.sample import Faults, Sample
from data.world import FAMILIES, World
from evaluate import askable, evaluate
from generate import load_model
from infra import weights
from infra.cli import command
from infra.device import Precision, pick_device, torch_type
from scale import parallel
from tokenizer import Tokenizer
from vlm import SailVL

# Our choice: relative distance above which models are taken to have no common history.
STRANGERS = 0.5


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
    """(name, that tensor of every model), one name at a time.

    Raises ValueError for different architectures.
    """
    # As sets: asking a Checkpoint whether it holds a name would read the tensor.
    names = list(states[0])
    for state in states[1:]:
        odd = sorted(set(names) ^ set(state))
        if odd:
            raise ValueError(
                f"cannot average different architectures: they disagree about {odd[0]}"
            )

    # One tensor of each model is in memory at a time.
    for name in names:
        tensors = [state[name] for state in states]
        shapes = [list(t.shape) for t in tensors]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"cannot average different architectures: {name} has shapes {shapes}")
        yield name, tensors


def average(states: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Uniform mean of state dictionaries (or Checkpoints), in fp32, tensor by tensor.

    Raises ValueError for different architectures.
    """
    # Summed in fp32: in bf16 every addition would round.
    mean = {}
    for name, tensors in side_by_side(states):
        total = sum(t.float() for t in tensors)
        mean[name] = (total / len(tensors)).to(tensors[0].dtype)
    return mean


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative distance of two models, |a - b| / sqrt(|a| |b|).

    A few percent between homologous runs, about 1.4 between strangers, 0 between zeros.
    """
    # Squares, summed over all tensors.
    gap = 0.0
    norm_a = 0.0
    norm_b = 0.0
    for _, (x, y) in side_by_side([a, b]):
        x = x.float()
        y = y.float()
        gap += float((x - y).square().sum())
        norm_a += float(x.square().sum())
        norm_b += float(y.square().sum())

    if gap == 0:
        return 0.0
    scale = (norm_a * norm_b) ** 0.25
    return gap**0.5 / scale if scale else math.inf


def greedy(
    states: list[Mapping[str, Tensor]], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """(mean, indices of its ingredients).

    `score` grades a state dictionary, higher is better; called 2n - 1 times.
    """
    # Best first.
    alone = [score(average([state])) for state in states]
    order = sorted(range(len(states)), key=lambda i: -alone[i])

    # Each next one stays if the mean with it is no worse.
    chosen = [order[0]]
    best = alone[order[0]]
    for i in order[1:]:
        candidate = [*chosen, i]
        reached = score(average([states[j] for j in candidate]))
        if reached >= best:
            chosen = candidate
            best = reached
    return average([states[j] for j in chosen]), chosen


def farthest(states: list[Mapping[str, Tensor]]) -> float:
    """Largest distance between any two; warns when they look like strangers.

    Raises ValueError for weights that are not finite.
    """
    # NaN compares with nothing, so it is asked for first.
    distances = [distance(a, b) for a, b in combinations(states, 2)]
    if any(math.isnan(d) for d in distances):
        raise ValueError("cannot average: one of the models holds numbers that are not finite")
    far = max(distances)
    if far > STRANGERS:
        warnings.warn(
            f"these models are {far:.2f} apart: they do not share a history and their mean is likely "
            "noise (paper, Table 5: 12.86)",
            stacklevel=2,
        )
    return far


# ---------------------------------------------------------------------------------------- command


@dataclass
class SoupOptions:
    """Average model directories of one architecture."""

    models: tuple[Path, ...]
    out: Path
    greedy: bool = False  # best first, and only what does not make the mean worse on held-out data
    data: Path | None = None  # held-out file for --greedy; none: the toy world's held-out side
    images: Path | None = None  # folder of the images; default: beside the data
    # image paths may lead out of the images' folder, also through links
    allow_outside: bool = False
    samples: int = 100  # held-out samples (per family of the toy world)
    force: bool = False  # average although the models are far apart
    device: str = ""  # where --greedy grades: cuda, npu, mps, cpu; default: what there is
    dtype: Precision = "float32"  # and in which precision


def cook_soup(options: SoupOptions) -> None:
    if len(options.models) < 2:
        raise ValueError("--models wants at least two directories")
    graded_on = options.data or options.images or options.allow_outside
    if graded_on and not options.greedy:
        raise ValueError(
            "--data, --images and --allow-outside are about what --greedy grades: add --greedy or leave "
            "them out"
        )
    if (options.images or options.allow_outside) and not options.data:
        raise ValueError("--images and --allow-outside are about --data, which is not given")
    ranks = parallel.start()
    device = pick_device(options.device, ranks.device)

    # Strangers are refused before anything else is done.
    states = [Checkpoint(directory) for directory in options.models]
    far = farthest(states)
    if ranks.main:
        print(f"largest relative distance between two models: {far:.3f}")
    if far > STRANGERS and not options.force:
        raise ValueError(
            f"not averaging models that are {far:.2f} apart; say --force to do it all the same"
        )

    # All of them, or those that help; one rank writes.
    if options.greedy:
        mean, chosen = greedy(states, scorer_of(options, device, ranks.main))
        if ranks.main:
            print(f"greedy soup of {', '.join(str(options.models[i]) for i in chosen)}")
    else:
        mean = average(states)
    if ranks.main:
        save_soup(options, mean)
    parallel.stop()


def scorer_of(
    options: SoupOptions, device: str, main: bool
) -> Callable[[dict[str, Tensor]], float]:
    """A function that gives a state dictionary's accuracy on the held-out samples.

    Raises ValueError when none can be used.
    """
    model, tokenizer = load_model(options.models[0], device, torch_type(options.dtype))
    held_out, encoder, faults = held_out_samples(options, model, tokenizer)
    if main and faults.counts:
        print(faults.report())

    def score(state: dict[str, Tensor]) -> float:
        fill(model, state)
        scores, _ = evaluate(model, encoder, held_out)
        return scores["overall"].accuracy

    return score


def held_out_samples(
    options: SoupOptions, model: SailVL, tokenizer: Tokenizer
) -> tuple[list[Sample], Encoder, Faults]:
    """Samples that can be asked; one with a picture that cannot be read costs itself."""
    # The user's, or those of the toy world.
    if options.data:
        folder = Folder(options.data, options.images, allow_outside=options.allow_outside)
        samples = folder.first(options.samples)
        encoder = Encoder(tokenizer, model.config, folder.root)
        faults = folder.faults
    else:
        samples = [s for family in FAMILIES for s in World().held_out(family, options.samples)]
        encoder = Encoder(tokenizer, model.config)
        faults = Faults()

    # Rendered once here, so that grading meets no bad picture.
    good = askable(samples, encoder, faults)
    if not good:
        raise ValueError(f"--data {options.data}: no sample can be graded\n{faults.report()}")
    return good, encoder, faults


def fill(model: SailVL, state: Mapping[str, Tensor]) -> None:
    """Put a state dictionary into a model, whatever the types of both."""
    with torch.no_grad():
        for name, view in weights.tensors(model).items():
            # A tied head has two names, and is stored under one.
            if name in state:
                view.copy_(state[name])


def save_soup(options: SoupOptions, mean: dict[str, Tensor]) -> None:
    """A model directory with the mean, in the widest type that the files have."""
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in mean.values()])
    model, tokenizer = load_model(options.models[0], "cpu", dtype)
    fill(model, mean)
    model.save_pretrained(options.out)
    tokenizer.save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    command(cook_soup)
