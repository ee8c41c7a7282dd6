"""Latent classes: an instruction set that is balanced over what its questions really are.

What it teaches: files have coarse labels ("VQA", "charts"), and inside a label most questions are of one
kind. Whoever samples by label samples mostly that kind. SAIL-Instruction2 asks a model for a phrase that
names the task of each sample, embeds the phrases, clusters them into about ten times as many buckets as
there are labels, and draws uniformly over the buckets.

    sample --> annotator: "comparing bars in a chart" --> our model's hidden states --> a vector
      vectors of all samples --> k-means --> buckets --> as many of each, as far as they go --> kept
      kept --> annotator answers again --> rated no worse than before? --> re-annotated

    python -m curation.classes balance --data vqa.jsonl --out even.jsonl --embedder DIR --annotator.url ...
    python -m curation.classes again --data even.jsonl --out again.jsonl --annotator.url ...
    python -m curation.classes table --data vqa.jsonl even.jsonl

The second command is the first half of the paper's two-stage check: an answer is replaced only by one that
is rated no worse. The other half, whether a model that trains on the new file is better, is an incremental
evaluation: `python -m curation.evaluating incremental` trains, grades and says so.

Source: SAIL-VL2 section 4.1. Not published: how phrases are embedded, the clustering, its K. Our choices: the
mean over the phrase's tokens of the last hidden states of a model of ours (the logits, which the paper
extracts as well, are not used), less the mean of all phrases, at unit length; k-means, begun by k-means++.
Simplified: one process clusters, with all vectors in memory.
"""

import base64
import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Callable, Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import subcommand

from attention import Segments
from curation.annotators import AnnotatorOptions, OwnModel, open_annotator
from curation.difficulty import label_of
from curation.pipeline import Item, PipelineOptions
from curation.questions import (
    AskStep,
    AtLeast,
    given_answer,
    last_question,
    pictures_in,
    walk_and_report,
    words_in,
)
from curation.ratings import RATINGS, Rated
from curation.requests import Request, generator_of
from data.encode import last_answer
from data.readers import Folder
from data.sample import BadSample, Sample
from generate import load_model
from infra.cli import command
from infra.device import pick_device, torch_type
from infra.table import markdown
from scale import parallel
from tokenizer import Tokenizer
from vlm import SailVL

LONGEST_PHRASE = 120  # characters of a phrase
FINER = 10  # buckets for each coarse class (paper: "about ten times")

# ---------------------------------------------------------------------------------------- phrases


class Phrased(AskStep):
    """The phrase that names a sample's task, as a fact."""

    name = "phrased"

    def request(self, item: Item) -> Request:
        sample = item.sample
        fields = {"question": last_question(sample), "answer": given_answer(sample)}
        return Request("class_phrase", fields, pictures_in(sample), sample)

    def read(self, item: Item, reply: str) -> None:
        phrase = " ".join(words_in(reply, LONGEST_PHRASE).split())
        if not any(character.isalpha() for character in phrase):
            raise BadSample("no phrase", repr(phrase))
        item.keep(self.name, phrase, phrase=phrase)


class Embedded:
    """The vector of each phrase, as a fact: half precision, in base 64."""

    name = "embedded"

    def __init__(self, model: SailVL, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer

    def __call__(self, items: list[Item]) -> None:
        phrases = [item.sample.facts["phrase"] for item in items]
        vectors = latents(self.model, self.tokenizer, phrases).cpu().numpy()

        # As text: facts are JSON
        for item, vector in zip(items, vectors.astype(np.float16)):
            raw = vector.tobytes()
            item.keep(self.name, latent=base64.b64encode(raw).decode())


@torch.inference_mode()
def latents(model: SailVL, tokenizer: Tokenizer, phrases: Sequence[str]) -> Tensor:
    """(N, C): the mean of the last hidden states over each phrase's tokens, at unit length."""
    if not phrases:
        return torch.zeros(0, model.config.text.hidden_size)

    # All phrases in one row, each of which sees itself alone
    ids = [tokenizer.encode(phrase) for phrase in phrases]
    lengths = [len(one) for one in ids]
    device = model.language_model.lm_head.weight.device
    packed = torch.tensor([sum(ids, [])], device=device)  # (1, S)
    hidden = model.hidden(packed, segments=Segments.of(lengths, device)).float()  # (S, C)

    # The sum points where the mean does
    rows = torch.repeat_interleave(torch.tensor(lengths)).to(device)  # (S,)
    sums = hidden.new_zeros(len(ids), hidden.shape[1]).index_add_(0, rows, hidden)  # (N, C)
    return F.normalize(sums, dim=-1)


def stored_latents(items: Sequence[Item]) -> Tensor:
    """(N, C) of what `Embedded` wrote."""
    vectors = []
    for item in items:
        raw = base64.b64decode(item.sample.facts["latent"])
        vectors.append(np.frombuffer(raw, np.float16).astype(np.float32))
    return torch.from_numpy(np.stack(vectors))


# ----------------------------------------------------------------------------------------- k-means


def kmeans(points: Tensor, k: int, seed: int = 0, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """The bucket of each of the points (N, C), and the buckets' centers (K, C), K <= k.

    Deterministic. K is below k where there are fewer different points. Raises ValueError for k < 1.
    """
    if k < 1 or not len(points):
        raise ValueError(f"{k} buckets of {len(points)} points: at least one of each is wanted")
    centers = spread_out(points, k, torch.Generator().manual_seed(seed))
    buckets = torch.full((len(points),), -1)
    for _ in range(rounds):
        distances, nearest = nearest_centers(points, centers)
        if torch.equal(nearest, buckets):
            break
        buckets = nearest
        centers = means_of_buckets(points, buckets, distances, len(centers))
    return buckets, centers


def spread_out(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Beginnings (K, C), as k-means++ draws them: a point is likelier the farther it is from those drawn."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [first]
    far = (points - points[first]).square().sum(-1).double()  # (N,) squared distances
    while len(chosen) < k and float(far.sum()) > 0:
        summed = far.cumsum(0)
        uniform = torch.rand(1, dtype=torch.float64, generator=generator)
        # Never a point at distance 0: it adds nothing to the sum
        place = int(torch.searchsorted(summed, (1 - uniform) * summed[-1]))
        chosen.append(place)
        far = torch.minimum(far, (points - points[place]).square().sum(-1).double())
    return points[chosen]


def nearest_centers(points: Tensor, centers: Tensor, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """Of each point the squared distance to the nearest center (N,), and which one it is (N,)."""
    distances, nearest = [], []
    for part in points.split(chunk):
        squared = torch.cdist(part, centers).square()  # (chunk, K)
        least = squared.min(-1)
        distances.append(least.values)
        nearest.append(least.indices)
    return torch.cat(distances), torch.cat(nearest)


def means_of_buckets(points: Tensor, buckets: Tensor, distances: Tensor, k: int) -> Tensor:
    """Centers (k, C); of an empty bucket it is the point that is farthest from its own center."""
    counts = torch.bincount(buckets, minlength=k)
    sums = points.new_zeros(k, points.shape[1]).index_add_(0, buckets, points)
    centers = sums / counts.clamp(min=1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    centers[empty] = points[distances.topk(len(empty)).indices]
    return centers


class Clustered:
    """Over the whole set: the bucket of each sample, as a fact in the vector's place.

    buckets: how many; 0: ten times as many as there are families or tasks.
    """

    name = "clustered"

    def __init__(self, buckets: int = 0, seed: int = 0):
        self.buckets = buckets
        self.seed = seed

    def __call__(self, items: list[Item]) -> None:
        if not items:
            return
        labels = {label_of(item.sample) for item in items}
        wanted = self.buckets or FINER * len(labels)

        # Directions from the middle of all: what phrases have in common tells nothing
        vectors = stored_latents(items)
        vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
        buckets, _ = kmeans(vectors, wanted, self.seed)
        for item, bucket in zip(items, buckets.tolist()):
            facts = {name: value for name, value in item.sample.facts.items() if name != "latent"}
            item.sample = replace(item.sample, facts=facts)
            item.keep(self.name, f"bucket {bucket}", bucket=bucket)


# ------------------------------------------------------------------------------------ even sampling


def even_quotas(sizes: Sequence[int], total: int) -> list[int]:
    """How many to take of each, as equal as the sizes allow, `total` together (or all there are).

    >>> even_quotas([100, 3, 50], 43)
    [20, 3, 20]
    """
    # The smallest first: what it lacks, the larger ones give
    quotas = [0] * len(sizes)
    left = min(total, sum(sizes))
    smallest_first = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for place, i in enumerate(smallest_first):
        share = left // (len(sizes) - place)
        quotas[i] = min(sizes[i], share)
        left -= quotas[i]
    return quotas


class EvenOver:
    """Over the whole set: keeps a share of it, drawn evenly over groups.

    group: what a sample belongs to. share: of all samples, 0 < share <= 1. Raises ValueError for another.
    """

    def __init__(self, name: str, group: Callable[[Sample], Hashable], share: float, seed: int = 0):
        if not 0 < share <= 1:
            raise ValueError(f"a share of {share:g} to keep: 0 < share <= 1 is wanted")
        self.name = name
        self.group = group
        self.share = share
        self.seed = seed

    def __call__(self, items: list[Item]) -> None:
        # Who belongs together, and how many of each may stay
        groups: dict[Hashable, list[Item]] = {}
        for item in items:
            groups.setdefault(self.group(item.sample), []).append(item)
        sizes = [len(members) for members in groups.values()]
        quotas = even_quotas(sizes, round(self.share * len(items)))

        # Who does is drawn by lot
        for (group, members), quota in zip(groups.items(), quotas):
            members.sort(key=self.lot)
            for item in members[:quota]:
                item.keep(self.name)
            for item in members[quota:]:
                item.drop(self.name, f"group is full: {group} keeps {quota} of {len(members)}")

    def lot(self, item: Item) -> float:
        return generator_of(self.seed, item.index, self.name).random()


def bucket_of(sample: Sample) -> int:
    return sample.facts["bucket"]


# ----------------------------------------------------------------------------------- re-annotation


class AnsweredAgain(AskStep):
    """Another answer in the place of the last one, which stays in the facts as `old_answer`."""

    name = "answered again"

    def __init__(self, annotator, longest: int):
        """longest: characters of an answer."""
        super().__init__(annotator)
        self.longest = longest

    def request(self, item: Item) -> Request:
        sample = item.sample
        given_answer(sample)
        fields = {"question": last_question(sample)}
        return Request("answer_again", fields, pictures_in(sample), sample)

    def read(self, item: Item, reply: str) -> None:
        old = given_answer(item.sample)
        new = words_in(reply, self.longest)
        if new == old:
            item.keep(self.name, "the same", old_answer=old)
        else:
            item.change(self.name, with_answer(item.sample, new), old_answer=old)


def with_answer(sample: Sample, answer: str) -> Sample:
    """The sample with these words as its last assistant turn, and nothing after it."""
    at = last_answer(sample)
    turn = replace(sample.messages[at], parts=(answer,))
    return replace(sample, messages=(*sample.messages[:at], turn))


class NoWorse:
    """Takes the old answer back where the new one has lower ratings, added up."""

    name = "no worse"

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            facts = item.sample.facts
            old = {name: facts[f"old_{name}"] for name in RATINGS}
            new = sum(facts[name] for name in RATINGS)
            why = f"{sum(old.values())} before, {new} now"
            if new >= sum(old.values()):
                item.keep(self.name, why)
            else:
                item.change(self.name, with_answer(item.sample, facts["old_answer"]), why, **old)


# ------------------------------------------------------------------------------------------ table


def entropy_of(labels: Sequence[Hashable]) -> float:
    """Of how often each label occurs, in bits."""
    counts = Counter(labels)
    shares = [count / len(labels) for count in counts.values()]
    return -sum(share * math.log2(share) for share in shares)


def purity_of(buckets: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """The share of samples that have the commonest label of their bucket."""
    inside: dict[Hashable, Counter] = {}
    for bucket, label in zip(buckets, labels, strict=True):
        inside.setdefault(bucket, Counter())[label] += 1
    commonest = sum(max(counts.values()) for counts in inside.values())
    return commonest / len(labels)


def classes_table(paths: Sequence[Path], seed: int = 0) -> list[str]:
    """A line a file, as Markdown: labels and their entropy; of what has buckets, those and their purity.

    Beside the purity stands that of the same buckets with labels dealt at random: small buckets alone
    make some.
    """
    measured = ("labels", "entropy, bits", "of at most", "buckets", "purity", "by chance")
    rows: list[Sequence[str]] = [("data", "samples", *measured)]
    for path in paths:
        samples = Folder(path).first()
        if not samples:
            raise ValueError(f"{path}: no sample that can be read")
        labels = [label_of(sample) for sample in samples]
        cells = [path.stem, f"{len(samples):,}", f"{len(set(labels))}"]
        cells += [f"{entropy_of(labels):.2f}", f"{math.log2(len(set(labels))):.2f}"]

        # Only what was clustered has them
        buckets = [sample.facts.get("bucket") for sample in samples]
        if None in buckets:
            cells += ["-", "-", "-"]
        else:
            dealt = random.Random(seed).sample(labels, len(labels))
            cells += [f"{len(set(buckets))}", f"{purity_of(buckets, labels):.3f}"]
            cells.append(f"{purity_of(buckets, dealt):.3f}")
        rows.append(cells)
    return markdown(*rows)


# --------------------------------------------------------------------------------------- commands


@dataclass
class ClassOptions(PipelineOptions):
    """Balance a file over latent classes: phrases, their embeddings, buckets, an even draw."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    embedder: Path | None = None  # a model of ours, for vectors; default: --annotator.model
    buckets: int = 0  # 0: ten for each family or task
    share: float = 0.5  # of the samples, to keep


@dataclass
class AgainOptions(PipelineOptions):
    """Have every question answered again, and keep the answers that are rated no worse."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    relevance: int = 3  # lowest rating that is kept
    longest: int = 4000  # characters of an answer


@dataclass
class ClassTableOptions:
    """How evenly files are spread over their families or tasks, and how pure their buckets are."""

    data: tuple[Path, ...]


def balance_classes(options: ClassOptions) -> None:
    if options.buckets < 0:
        raise ValueError(f"--buckets {options.buckets}: a number of buckets, or 0")
    even = EvenOver("even over buckets", bucket_of, options.share, options.seed)
    ranks = parallel.start()
    annotator = open_annotator(options.annotator, options.seed)
    embedded = Embedded(*embedder_of(options, annotator, ranks.device))
    clustered = Clustered(options.buckets, options.seed)
    walk_and_report(
        options, ranks, [Phrased(annotator), embedded], [clustered, even], annotator=annotator
    )


def embedder_of(options: ClassOptions, annotator, here: str) -> tuple[SailVL, Tokenizer]:
    """The model that makes vectors, on the device `here` unless the options name another.

    Raises ValueError when no model is named.
    """
    if options.embedder is not None:
        device = pick_device(options.annotator.device, here)
        return load_model(options.embedder, device, torch_type(options.annotator.dtype))
    if isinstance(annotator, OwnModel):
        return annotator.model, annotator.tokenizer
    raise ValueError("--embedder DIR: a model of ours makes the vectors; name one")


def answer_again(options: AgainOptions) -> None:
    ranks = parallel.start()
    annotator = open_annotator(options.annotator, options.seed)
    steps = [
        Rated(annotator, "rated before", "old_"),
        AnsweredAgain(annotator, options.longest),
        Rated(annotator, "rated after"),
        NoWorse(),
        AtLeast("relevance", options.relevance),
    ]
    walk_and_report(options, ranks, steps, annotator=annotator)


def compare_classes(options: ClassTableOptions) -> None:
    print("\n".join(classes_table(options.data)))


def classes_command(
    options: Annotated[ClassOptions, subcommand("balance")]
    | Annotated[AgainOptions, subcommand("again")]
    | Annotated[ClassTableOptions, subcommand("table")],
) -> None:
    """One of the three commands."""
    if isinstance(options, ClassOptions):
        balance_classes(options)
    elif isinstance(options, AgainOptions):
        answer_again(options)
    else:
        compare_classes(options)


if __name__ == "__main__":
    command(classes_command)
