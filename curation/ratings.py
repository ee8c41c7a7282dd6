"""Ratings: how complex, how challenging and how relevant a sample is, from 1 to 5.

What it teaches: a curriculum wants to know which of its files is the harder one before it trains on them.
SAIL-VL had people rate samples of its three SFT stages on three scales, and found that later stages are
harder, more complex and more tied to their pictures, while they become smaller:

    stage           size   difficulty  complexity  relevance     (SAIL-VL, Table 2)
    knowledge        21M         1.90        2.44       3.94
    instruction      12M         2.15        2.62       4.45
    preference      3.5M         2.20        2.74       4.55

    a.jsonl -> annotator, prompts/ratings.txt -> rated-a.jsonl: facts complexity, challenge, relevance
    rated-a.jsonl, rated-b.jsonl, ... -> the table

    python -m curation.ratings rate --data a.jsonl --out rated-a.jsonl --annotator.url ... --limit 200
    python -m curation.ratings rate ... --least relevance=3 challenge=2     # and drop what has less
    python -m curation.ratings table --data rated-a.jsonl rated-b.jsonl

Source: the scales are SAIL-VL's (arXiv 2501.05952, appendix F, figure 10), in our words; there people rate,
here whoever annotates does, and answers as JSON (our choice).
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Sequence

from tyro.conf import subcommand

from curation.annotators import AnnotatorOptions, open_annotator
from curation.pipeline import Item, PipelineOptions
from curation.questions import (
    AskStep,
    AtLeast,
    Scale,
    conversation_of,
    pictures_in,
    scores_in,
    walk_and_report,
)
from curation.requests import Request
from data.readers import Folder
from data.sample import BadSample
from infra.cli import command
from infra.table import markdown
from scale import parallel

RATINGS = {name: Scale(1, 5) for name in ("complexity", "challenge", "relevance")}


class Rated(AskStep):
    """Three ratings of each sample, as facts."""

    def __init__(self, annotator, name: str = "rated", before: str = ""):
        """before: stands in front of the facts' names, as in `old_relevance`."""
        super().__init__(annotator)
        self.name = name
        self.before = before

    def request(self, item: Item) -> Request:
        sample = item.sample
        fields = {"conversation": conversation_of(sample)}
        return Request("ratings", fields, pictures_in(sample), sample)

    def read(self, item: Item, reply: str) -> None:
        # As the history has them, and as facts
        scores = scores_in(reply, RATINGS)
        why = ", ".join(f"{name} {score}" for name, score in scores.items())
        facts = {self.before + name: score for name, score in scores.items()}
        item.keep(self.name, why, **facts)


# ------------------------------------------------------------------------------------------ table


@dataclass(frozen=True)
class Mean:
    """Of a file's ratings; error: how far the mean would be off in another draw of as many samples."""

    value: float
    error: float


def mean_of(scores: Sequence[float]) -> Mean:
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return Mean(statistics.fmean(scores), spread / len(scores) ** 0.5)


def ratings_of(path: Path) -> dict[str, list[int]]:
    """The ratings that a file's samples have as facts. Raises ValueError for a file without any."""
    folder = Folder(path)
    found: dict[str, list[int]] = {name: [] for name in RATINGS}
    for index in range(len(folder)):
        sample = folder[index]
        if isinstance(sample, BadSample) or not RATINGS.keys() <= sample.facts.keys():
            continue
        for name, scores in found.items():
            scores.append(int(sample.facts[name]))
    if not found["complexity"]:
        raise ValueError(f"{path}: no rated sample; `python -m curation.ratings rate` rates them")
    return found


def ratings_table(paths: Sequence[Path]) -> list[str]:
    """A line a file, as Markdown: rated samples, and the means with their standard errors."""
    rows = [["data", "rated", "challenge", "complexity", "relevance"]]
    for path in paths:
        # In the order of SAIL-VL's table
        ratings = ratings_of(path)
        cells = [path.stem, f"{len(ratings['complexity']):,}"]
        for name in ("challenge", "complexity", "relevance"):
            mean = mean_of(ratings[name])
            cells.append(f"{mean.value:.2f} ± {mean.error:.2f}")
        rows.append(cells)
    return markdown(*rows)


# --------------------------------------------------------------------------------------- commands


@dataclass
class RateOptions(PipelineOptions):
    """Have samples rated: complexity, challenge and relevance, 1 to 5."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    least: dict[str, float] = field(default_factory=dict)  # drop what has less, as in relevance=3


@dataclass
class RatingTableOptions:
    """The mean ratings of several files, a line each."""

    data: tuple[Path, ...]  # files that were rated


def rate_file(options: RateOptions) -> None:
    unknown = sorted(options.least.keys() - RATINGS.keys())
    if unknown:
        raise ValueError(f"--least {unknown[0]}: choose from {', '.join(RATINGS)}")

    # Rated, then what must have more
    ranks = parallel.start()
    annotator = open_annotator(options.annotator, options.seed)
    limits = [AtLeast(name, least) for name, least in options.least.items()]
    walk_and_report(options, ranks, [Rated(annotator), *limits], annotator=annotator)


def compare_ratings(options: RatingTableOptions) -> None:
    print("\n".join(ratings_table(options.data)))


def ratings_command(
    options: Annotated[RateOptions, subcommand("rate")]
    | Annotated[RatingTableOptions, subcommand("table")],
) -> None:
    """One of the two commands."""
    if isinstance(options, RateOptions):
        rate_file(options)
    else:
        compare_ratings(options)


if __name__ == "__main__":
    command(ratings_command)
