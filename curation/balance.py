"""Resampling: which datasets, and which of their texts, a model sees how often.

What it teaches: a mixture by size is a mixture by accident, and captions made by models say the
same thing in the same words. SAIL-VL2 (section 3.2.2) balances datasets and then the n-grams of
captions and synthetic answers, and publishes no formula. Both rules here are ours.

    mixture.json -> sizes -> weights -----------------------> mixture with weights
    records -> their answers' n-grams -> kept or not -------> records that say something new
                                      -> distinct-n, template share, beside a random choice

Datasets: weight = size ** (1 / temperature). 1 keeps sizes, 2 takes square roots, a large one makes
all equal; or give targets.

N-grams: texts are visited in random order, and one is kept if none of its n-grams is in `cap` kept
texts already. So no n-gram is in more than `cap` of them. A common opening costs most texts their
place then; `--tolerance 0.5` keeps a text while no more than half of its n-grams are used up, which
removes texts of common phrases only. In scripts that are written without spaces (Chinese, Japanese,
Thai) a word is a character.

Measured by distinct-n (different n-grams / n-grams) and by the template share (texts that open with
one of the ten commonest openings), against a random choice of as many: fewer texts alone raise
distinct-n.

    python -m curation.balance datasets --mix mix.json --out balanced.json --temperature 2
    python -m curation.balance ngrams --data captions.jsonl --out kept.jsonl --cap 20
    python -m curation.balance example --out captions.jsonl     # captions from a few templates
"""

import json
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Iterable, Iterator

from tyro.conf import subcommand

from curation.rows import write_rows
from data.readers import Folder
from data.sample import BadSample, Sample
from infra.cli import command

# Thai, Lao, Burmese, Khmer; Japanese syllables; Chinese characters of all planes.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+|[^\\w\\s]")


# --------------------------------------------------------------------------------------- datasets


def balanced(
    sizes: list[int], temperature: float = 1.0, targets: list[float] | None = None
) -> list[float]:
    """Shares of the datasets, summing to 1: size ** (1 / temperature), or in proportion to the targets.

    Raises ValueError for a temperature that is not positive or targets that do not fit.
    """
    if targets is None:
        fits = True
    else:
        fits = len(targets) == len(sizes) and min(targets) >= 0 and sum(targets) > 0
    if not temperature > 0 or not fits:
        raise ValueError(
            f"temperature {temperature} must be positive, and {targets} one target for each of "
            f"{len(sizes)} datasets"
        )

    # A target is a weight already.
    weights = targets or [size ** (1 / temperature) for size in sizes]
    total = sum(weights)
    return [weight / total for weight in weights]


# ---------------------------------------------------------------------------------------- n-grams


def words(text: str) -> list[str]:
    """Words, signs, and single characters where a script has no spaces; case and width are ignored."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All n-grams of the words; a text with fewer words is one, an empty one has none."""
    found = words(text)
    if not found:
        return []
    return [tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1))]


def thinned(
    texts: Iterable[str], cap: int, n: int = 4, seed: int = 0, tolerance: float = 0.0
) -> list[int]:
    """Indices of the texts to keep, rising.

    cap: kept texts that may hold an n-gram; tolerance: share of a text's n-grams that may be in
    `cap` kept texts already. Raises ValueError for a cap or an n below 1.
    """
    if cap < 1 or n < 1 or not 0 <= tolerance < 1:
        raise ValueError(
            f"cap {cap} and n {n} must be positive, and the tolerance {tolerance} in [0, 1)"
        )
    # In random order: which of two alike stays is chance, not place in the file.
    texts = list(texts)
    order = random.Random(seed).sample(range(len(texts)), len(texts))

    kept = []
    held: Counter[tuple[str, ...]] = Counter()  # n-gram -> kept texts that hold it
    for i in order:
        grams = set(ngrams(texts[i], n))
        used_up = sum(held[gram] >= cap for gram in grams)
        if used_up <= tolerance * len(grams):
            kept.append(i)
            held.update(grams)
    return sorted(kept)


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n: the share of all n-grams that are different ones."""
    grams = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(grams) / max(1, grams.total())


def template_share(texts: Iterable[str], opening: int = 4, top: int = 10) -> float:
    """The share of texts that begin with one of the `top` commonest first `opening` words."""
    openings = Counter(tuple(words(text)[:opening]) for text in texts)
    commonest = openings.most_common(top)
    return sum(count for _, count in commonest) / max(1, openings.total())


def answers_as_text(sample: Sample) -> str:
    """What a sample teaches to say."""
    answers = [message for message in sample.messages if message.role == "assistant"]
    texts = [part for message in answers for part in message.parts if isinstance(part, str)]
    return " ".join(texts)


# --------------------------------------------------------------------------------------- commands


@dataclass
class BalanceOptions:
    """Weights for a mixture file."""

    mix: Path
    out: Path
    temperature: float = 2.0
    targets: tuple[float, ...] = ()  # one share per dataset, instead of the temperature


@dataclass
class ThinOptions:
    """A file without the texts that only repeat others."""

    data: Path  # JSON, JSONL, TSV, tar, parquet, a folder of them, or a mixture file
    out: Path  # JSONL, in our own format
    images: Path | None = None  # folder of the images; default: beside the data
    cap: int = 20  # kept texts that may hold an n-gram
    n: int = 4
    tolerance: float = 0.0  # share of a text's n-grams that may be in that many texts already
    seed: int = 0


@dataclass
class ExampleOptions:
    """Captions as a model would write them: 70 % in five templates, the rest in free order."""

    out: Path
    samples: int = 20000
    seed: int = 0


def balance_datasets(options: BalanceOptions) -> None:
    if options.out.resolve().parent != options.mix.resolve().parent:
        raise ValueError(
            f"--out {options.out} must lie beside {options.mix}: the paths inside start there"
        )
    folder = Folder(options.mix)
    meta = json.loads(options.mix.read_text("utf-8-sig"))
    # Other formats of mixtures have no weights to write.
    if "datasets" not in meta:
        raise ValueError(f'{options.mix}: no mixture file, it has no "datasets"')
    entries = meta["datasets"]

    # How many samples each has, and how often it is drawn without this.
    sizes = [0] * len(folder.datasets)
    for (number, _), records in folder.groups.items():
        sizes[number] += len(records)
    before = [d.weight or d.repeat * size for d, size in zip(folder.datasets, sizes)]
    shares = balanced(sizes, options.temperature, list(options.targets) or None)

    print(
        f"{'dataset':20s} {'samples':>9s} {'before':>8s} {'after':>8s}   epochs, if all are drawn once"
    )
    # The table, and the same file with its weights.
    for name, size, old, new in zip(entries, sizes, before, shares, strict=True):
        entries[name]["weight"] = new
        epochs = new * sum(sizes) / max(1, size)
        print(f"{name:20s} {size:9d} {old / sum(before):8.1%} {new:8.1%} {epochs:31.2f}")
    options.out.write_text(json.dumps({"datasets": entries}, indent=1) + "\n")
    print(f"wrote {options.out}")


def thin_file(options: ThinOptions) -> None:
    folder = Folder(options.data, options.images)

    # The texts; what cannot be read has none and is not kept.
    readable, texts = [], []
    for index in range(len(folder)):
        sample = folder[index]
        if isinstance(sample, BadSample):
            folder.faults.add(sample)
        else:
            readable.append(index)
            texts.append(answers_as_text(sample))

    # What is kept, measured beside as many at random.
    kept = thinned(texts, options.cap, options.n, options.seed, options.tolerance)
    chance = random.Random(options.seed).sample(texts, len(kept))
    print(
        f"{'':8s} {'texts':>8s} {'distinct-1':>10s} {'-2':>10s} {'-3':>10s} {'-4':>10s}  template share"
    )
    print_measures("before", texts)
    print_measures("random", chance)
    print_measures("kept", [texts[i] for i in kept])

    def rows() -> Iterator[tuple[Sample, dict]]:
        for i in kept:
            yield folder[readable[i]], {}

    written = write_rows(options.out, rows(), folder.faults)
    print(folder.faults.report())
    print(f"wrote {written} rows to {options.out}")


def print_measures(name: str, texts: list[str]) -> None:
    numbers = " ".join(f"{distinct(texts, n):10.4f}" for n in (1, 2, 3, 4))
    print(f"{name:8s} {len(texts):8d} {numbers} {template_share(texts):15.1%}")


ADJECTIVES = "red old small wooden bright dark wet open tall broken"
NOUNS = "chair dog lamp street bottle window boat tree bird cup sign bridge table train coat"
TEMPLATES = (
    "The image shows a {} next to a {}.",
    "This is a photo of a {} and a {}.",
    "In this picture, there is a {} in front of a {}.",
    "The image features a {} beside a {}.",
    "A close up view of a {} with a {}.",
)


def write_example(options: ExampleOptions) -> None:
    rng = random.Random(options.seed)
    things = [f"{a} {noun}" for a in ADJECTIVES.split() for noun in NOUNS.split()]
    weights = [1 / rank for rank in range(1, len(things) + 1)]

    with open(options.out, "w") as file:
        for _ in range(options.samples):
            a, b = rng.choices(things, weights, k=2)
            preposition = rng.choice("by under behind past near".split())
            free = f"{a} {preposition} {b} {rng.choice(things)}".split()

            # In a template, or in no order at all.
            if rng.random() < 0.7:
                text = rng.choice(TEMPLATES).format(a, b)
            else:
                text = " ".join(rng.sample(free, len(free))) + "."
            turns = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": text}]
            file.write(json.dumps({"conversations": turns}) + "\n")


def balance(
    options: Annotated[BalanceOptions, subcommand("datasets")]
    | Annotated[ThinOptions, subcommand("ngrams")]
    | Annotated[ExampleOptions, subcommand("example")],
) -> None:
    """One of the three commands."""
    if isinstance(options, BalanceOptions):
        balance_datasets(options)
    elif isinstance(options, ThinOptions):
        thin_file(options)
    else:
        write_example(options)


if __name__ == "__main__":
    command(balance)
