"""Two captions of one picture side by side: good, same or bad, and whether that could be chance.

What it teaches: a score from 1 to 100 drifts with whoever gives it; which of two is better does not. So a
judge sees both. Judges also like what stands first, so each pair is shown twice, in both orders, and a
caption has won only if it won both times; anything else is "same".

    A, B --shown A B--> 1 --+--> good: A won both       wins of A and of B --sign test--> p
         --shown B A--> 2 --+    bad: B won both
                                 same: all others

    python -m curation.side_by_side --data ours.jsonl --other theirs.jsonl --out gsb.jsonl --annotator.url URL

Captions belong together when their pictures have the same pixels, wherever the files lie.

Source: SAIL-VL (arXiv 2501.05952) appendix D.1: good-same-bad of people on 100 samples of each set, beside
scores. Both orders, the test and the prompt (prompts/compare.txt) are ours.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from curation.annotators import AnnotatorOptions, open_annotator
from curation.captioner import caption_in, shown_pictures
from curation.pipeline import Item, PipelineOptions, run_pipeline
from curation.questions import digest_of_pictures
from curation.requests import Annotator, Request, Response, json_in
from data.readers import Folder
from data.sample import BadSample, Sample
from infra.cli import command
from infra.table import markdown
from scale import parallel

VERDICTS = ("good", "same", "bad")


def pixel_hash(sample: Sample) -> str:
    """`digest_of_pictures`. Raises BadSample for pictures that cannot be read, and for none."""
    if not shown_pictures(sample):
        raise BadSample("no picture", sample.origin)
    return digest_of_pictures(sample)


def captions_by_picture(path: Path, images: Path | None) -> dict[str, str]:
    """Captions of a file under their pictures' hashes; of several about one picture, the first.

    What cannot be read is left out, and said.
    """
    found: dict[str, str] = {}
    folder = Folder(path, images)
    for sample in folder.first():
        try:
            found.setdefault(pixel_hash(sample), caption_in(sample))
        except BadSample as fault:
            folder.faults.add(fault)
    if folder.faults.counts and parallel.place()[0] == 0:
        print(f"{path}:\n{folder.faults.report()}")
    return found


class CompareCaptions:
    """Marks each sample with the verdict on its caption against the other file's."""

    name = "compare"

    def __init__(self, annotator: Annotator, others: dict[str, str]):
        self.annotator = annotator
        self.others = others

    def __call__(self, items: list[Item]) -> None:
        # Who has a counterpart
        known = []
        requests = []
        for item in items:
            try:
                other = self.others.get(pixel_hash(item.sample))
            except BadSample as fault:
                item.drop(self.name, str(fault))
                continue
            if other is None:
                item.drop(self.name, "no counterpart: the other file has no such picture")
                continue
            known.append(item)
            requests += both_orders(item.sample, other)

        # Two answers each
        responses = self.annotator.annotate(requests)
        for item, forward, backward in zip(known, responses[::2], responses[1::2], strict=True):
            self.mark(item, forward, backward)

    def mark(self, item: Item, forward: Response, backward: Response) -> None:
        # Not answered, or not in a way that can be read
        if forward.lost or backward.lost:
            item.drop(self.name, forward.fault or backward.fault)
            return
        first = winner_in(forward.text or "")
        second = winner_in(backward.text or "")
        if first is None or second is None:
            fault = forward.fault or backward.fault or "unreadable reply"
            item.drop(self.name, f"no verdict: {fault}")
            return
        verdict = verdict_of(first, second)
        item.keep(
            self.name, f"{verdict}: {first}, then {second}", verdict=verdict, votes=[first, second]
        )


def both_orders(sample: Sample, other: str) -> list[Request]:
    own = caption_in(sample)
    pictures = shown_pictures(sample)
    return [
        Request("compare", {"first": own, "second": other}, pictures, sample),
        Request("compare", {"first": other, "second": own}, pictures, sample),
    ]


def winner_in(text: str) -> str | None:
    """1, 2 or same, out of a reply's JSON; None for anything else."""
    found = json_in(text)
    said = str(found.get("better", "")).lower() if isinstance(found, dict) else text.strip().lower()
    return said if said in ("1", "2", "same") else None


def verdict_of(first: str, second: str) -> str:
    """first: the winner when our caption stood first; second: when it stood second."""
    if (first, second) == ("1", "2"):
        return "good"
    if (first, second) == ("2", "1"):
        return "bad"
    return "same"


def sign_test(wins: int, losses: int) -> float:
    """The chance that two equal sides differ as much or more, two-sided and exact; ties are left out."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


# --------------------------------------------------------------------------------------- command


@dataclass
class CompareOptions(PipelineOptions):
    """Good, same or bad: the captions of --data against those of --other about the same pictures."""

    other: Path = Path()
    other_images: Path | None = None  # folder of the other file's images; default: beside it
    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)


def compare_files(options: CompareOptions) -> None:
    parallel.start()
    if options.other == Path():
        raise ValueError("--other: which captions shall these be compared with?")
    annotator = open_annotator(options.annotator, options.seed)
    others = captions_by_picture(options.other, options.other_images)
    outcome = run_pipeline(options, [CompareCaptions(annotator, others)])
    if parallel.place()[0] == 0:
        print(outcome.report())
        print(annotator.report())
        print(verdict_table(options.out, options.data, options.other))
    parallel.stop()


def verdict_table(out: Path, data: Path, other: Path) -> str:
    """Counts, the sign test, and how often a judge kept to a place instead of a caption."""
    folder = Folder(out)
    samples = [folder[index] for index in range(len(folder))]
    counts = Counter(sample.facts["verdict"] for sample in samples)
    votes = [tuple(sample.facts["votes"]) for sample in samples]
    places = sum(first == second and first != "same" for first, second in votes)
    p = sign_test(counts["good"], counts["bad"])
    heads = ("data", "against", *VERDICTS, "sign test", "chose a place")
    of_each = [counts[verdict] for verdict in VERDICTS]
    cells = (data.name, other.name, *of_each, f"p = {p:.2g}", places)
    return "\n".join(markdown(heads, cells, align="llrrrrr"))


if __name__ == "__main__":
    command(compare_files)
