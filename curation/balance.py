"""Resampling: which datasets, and which of their texts, a model sees how often.

What it teaches: a mixture by size is a mixture by accident, and captions made by models say the same thing in the same words.
SAIL-VL2 (section 3.2.2) balances datasets and then the n-grams of captions and synthetic answers, and publishes no formula.
Both rules here are ours.

Datasets: weight = size ** (1 / temperature). 1 keeps sizes, 2 takes square roots, a large one makes all equal; or give targets.

N-grams: samples are visited in random order and a text is kept when at least half of its n-grams are still under `cap`, the
number of kept texts that may hold an n-gram; then its n-grams are counted. A common opening alone does not cost a text its
place, a text of common phrases only does. Measured by distinct-n (different n-grams / n-grams) and by the template share (texts
that open with one of the ten commonest openings), against a random choice of as many: fewer texts alone raise distinct-n.

    python -m curation.balance datasets --mix mix.json --out balanced.json --temperature 2
    python -m curation.balance ngrams --data captions.jsonl --out kept.jsonl --cap 20
    python -m curation.balance example --out captions.jsonl            # captions from a few templates, to try it on
"""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Iterable

import tyro

from data.readers import Folder
from data.sample import BadSample, Sample


def balanced(
    sizes: list[int], temperature: float = 1.0, targets: list[float] | None = None
) -> list[float]:
    """Shares of the datasets, summing to 1: size ** (1 / temperature), or in proportion to the targets.

    Raises ValueError for a temperature that is not positive or targets that do not fit.
    """
    if (
        temperature <= 0
        or targets is not None
        and (len(targets) != len(sizes) or min(targets) < 0 or sum(targets) <= 0)
    ):
        raise ValueError(
            f"temperature {temperature} must be positive, and {targets} one target for each of {len(sizes)} datasets"
        )
    weights = targets or [n ** (1 / temperature) for n in sizes]
    return [w / sum(weights) for w in weights]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All n-grams of the words; a text with fewer words is one."""
    found = words(text)
    return [tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))]


def thinned(texts: Iterable[str], cap: int, n: int = 4, seed: int = 0) -> list[int]:
    """Indices of the texts to keep, rising."""
    texts = list(texts)
    kept, seen = [], Counter()
    for i in random.Random(seed).sample(range(len(texts)), len(texts)):
        grams = set(ngrams(texts[i], n))
        if 2 * sum(seen[g] < cap for g in grams) >= len(grams):
            kept.append(i)
            seen.update(grams)
    return sorted(kept)


def distinct(texts: Iterable[str], n: int) -> float:
    grams = Counter(g for t in texts for g in ngrams(t, n))
    return len(grams) / max(1, grams.total())


def template_share(texts: Iterable[str], opening: int = 4, top: int = 10) -> float:
    """The share of texts that begin with one of the `top` commonest first `opening` words."""
    starts = Counter(tuple(words(t)[:opening]) for t in texts)
    return sum(count for _, count in starts.most_common(top)) / max(1, starts.total())


# --------------------------------------------------------------------------------------------------------------- commands


@dataclass
class Datasets:
    """Weights for a mixture file."""

    mix: Path
    out: Path
    temperature: float = 2.0
    targets: tuple[float, ...] = ()  # one share per dataset, instead of the temperature


@dataclass
class Ngrams:
    """A JSON lines file without the texts that only repeat others."""

    data: Path  # JSON or JSON lines
    out: Path
    cap: int = 20  # kept texts that may hold an n-gram
    n: int = 4
    seed: int = 0


@dataclass
class Example:
    """Captions as a model would write them: 70 % in five templates, objects by Zipf's law, the rest in free order."""

    out: Path
    samples: int = 20000
    seed: int = 0


def datasets(o: Datasets) -> int:
    if o.out.resolve().parent != o.mix.resolve().parent:
        raise ValueError(f"--out {o.out} must lie beside {o.mix}: the paths inside start there")
    entries, folder = json.loads(o.mix.read_text())["datasets"], Folder(o.mix)
    sizes = [
        sum(len(g) for (k, _), g in folder.groups.items() if k == number)
        for number in range(len(folder.datasets))
    ]
    before = [d.weight or d.repeat * n for d, n in zip(folder.datasets, sizes)]
    shares = balanced(sizes, o.temperature, list(o.targets) or None)
    print(
        f"{'dataset':20s} {'samples':>9s} {'before':>8s} {'after':>8s} {'epochs while all samples are drawn once':>40s}"
    )
    for (name, entry), n, old, new in zip(entries.items(), sizes, before, shares, strict=True):
        entry["weight"] = new
        print(
            f"{name:20s} {n:9d} {old / sum(before):8.1%} {new:8.1%} {new * sum(sizes) / max(1, n):40.2f}"
        )
    o.out.write_text(json.dumps({"datasets": entries}, indent=1) + "\n")
    return 0


def answers_of(sample: Sample) -> str:
    return " ".join(
        p for m in sample.messages if m.role == "assistant" for p in m.parts if isinstance(p, str)
    )


def thin(o: Ngrams) -> int:
    folder = Folder(o.data)
    samples = [folder[i] for i in range(len(folder))]
    texts = ["" if isinstance(s, BadSample) else answers_of(s) for s in samples]
    kept = thinned(texts, o.cap, o.n, o.seed)
    rows = {
        "before": texts,
        "random": random.Random(o.seed).sample(texts, len(kept)),
        "kept": [texts[i] for i in kept],
    }
    print(
        f"{'':8s} {'texts':>8s} "
        + " ".join(f"distinct-{n}" for n in (1, 2, 3, 4))
        + "  template share"
    )
    for name, found in rows.items():
        print(
            f"{name:8s} {len(found):8d} "
            + " ".join(f"{distinct(found, n):10.4f}" for n in (1, 2, 3, 4))
            + f" {template_share(found):15.1%}"
        )
    with open(o.out, "wb") as f:
        for i in kept:
            file, a, b, _ = folder.spans[i].tolist()
            path, _ = folder.files[file]
            if path.suffix not in (".json", ".jsonl"):
                raise ValueError(
                    f"{path}: only JSON and JSON lines can be thinned; convert it first"
                )
            with open(path, "rb") as source:
                source.seek(a)
                f.write(
                    b" ".join(source.read(b - a).splitlines()) + b"\n"
                )  # JSON has no raw line breaks inside strings
    return 0


def example(o: Example) -> int:
    rng = random.Random(o.seed)
    things = [
        f"{a} {b}"
        for a in "red old small wooden bright dark wet open tall broken".split()
        for b in "chair dog lamp street bottle window boat tree bird cup sign bridge table train coat".split()
    ]
    weights = [1 / (i + 1) for i in range(len(things))]
    shapes = [
        "The image shows a {} next to a {}.",
        "This is a photo of a {} and a {}.",
        "In this picture, there is a {} in front of a {}.",
        "The image features a {} beside a {}.",
        "A close up view of a {} with a {}.",
    ]
    with open(o.out, "w") as f:
        for _ in range(o.samples):
            a, b = rng.choices(things, weights, k=2)
            free = [
                *f"{a} {rng.choice('by under behind past near'.split())} {b}".split(),
                *rng.choice(things).split(),
            ]
            text = (
                rng.choice(shapes).format(a, b)
                if rng.random() < 0.7
                else " ".join(rng.sample(free, len(free))) + "."
            )
            f.write(
                json.dumps(
                    {
                        "conversations": [
                            {"from": "human", "value": "Describe it."},
                            {"from": "gpt", "value": text},
                        ]
                    }
                )
                + "\n"
            )
    return 0


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Datasets, tyro.conf.subcommand("datasets")]
        | Annotated[Ngrams, tyro.conf.subcommand("ngrams")]
        | Annotated[Example, tyro.conf.subcommand("example")]
    )
    sys.exit({Datasets: datasets, Ngrams: thin, Example: example}[type(chosen)](chosen))
