"""Model soup: the average of runs that began at the same place.

What it teaches: fine-tunes of one checkpoint that differ only in seed or data order lie in one basin, and the mean of their
weights is often better than either. Runs with different histories do not, and their mean is noise: the paper's Table 5 has
74.91 + 74.54 -> 76.60 for homologous and 74.54 + 75.41 -> 12.86 for heterologous models. `distance` tells them apart before
anything is averaged.

    python soup.py --models runs/a runs/b --out runs/soup
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import weights
from generate import load


def average(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Uniform mean of state dictionaries, in fp32, tensor by tensor. Raises ValueError for different architectures."""
    first = states[0]
    for state in states[1:]:
        odd = {k for k in first.keys() ^ state.keys()} or {k for k in first if first[k].shape != state[k].shape}
        if odd:
            raise ValueError(f"cannot average different architectures: they disagree about {sorted(odd)[0]}")
    return {k: torch.stack([s[k].float() for s in states]).mean(0).to(first[k].dtype) for k in first}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative distance of two models, |a - b| / sqrt(|a| |b|): a few percent between homologous runs, about 1.4 between
    strangers."""
    gap = sum(float((a[k].float() - b[k].float()).square().sum()) for k in a) ** 0.5
    norms = [sum(float(v.float().square().sum()) for v in s.values()) ** 0.5 for s in (a, b)]
    return gap / (norms[0] * norms[1]) ** 0.5


@dataclass
class Options:
    """Average model directories of one architecture, uniformly."""
    models: tuple[Path, ...]
    out: Path
    force: bool = False  # average although the models are far apart


def main(o: Options) -> int:
    def read(directory: Path) -> dict[str, Tensor]:
        state = {}
        for name, path in weights.locate(directory).items():
            with safe_open(path, "pt") as f:
                state[name] = f.get_tensor(name)
        return state

    if len(o.models) < 2:
        raise ValueError("--models wants at least two directories")
    states = [read(directory) for directory in o.models]
    mean = average(states)
    far = max(distance(states[0], s) for s in states[1:])
    print(f"largest relative distance to the first model: {far:.3f}")
    if far > 0.5 and not o.force:
        raise ValueError(f"these models are {far:.2f} apart: they do not share a history and their mean is likely noise (paper, "
                         "Table 5: 12.86). Say --force True to average all the same")
    model, tokenizer = load(o.models[0])
    with torch.no_grad():
        for name, view in weights.tensors(model).items():
            view.copy_(mean[name])
    model.save_pretrained(o.out)
    tokenizer.save(o.out)
    print(f"wrote {o.out}")
    return 0


if __name__ == "__main__":
    import tyro
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
