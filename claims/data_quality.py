"""Does curation pay? Six studies of data against data, at equal training budget.

What it teaches: SAIL-VL and SAIL-VL2 say what their data is made of, and that it is why they score. In
the drawn world the truth of every caption is known, so the claim can be tried: the same checkpoint, as
many steps, the same held-out pictures; what differs is the data.

    filter      captions of which 18 % or half are spoiled, as they are, and after a judge that errs in
                a tenth of its answers (SAIL-VL2 section 3.1: "drop if below 3", 15 to 20 % went)
    recaption   pictures with alt-texts (one word, or another picture's), and with the captions of a
                model that was trained on a small reference set (SAIL-Captioner)
    repeat      a few good captions read again and again, and the same few among many spoiled ones; the
                language model is frozen (SAIL-VL Table 5)
    balance     a set most of whose captions are of one sort: as it is, thinned by n-grams, drawn evenly
                from latent classes, and for comparison as many at random (SAIL-VL2 sections 3.2.2, 4.1)
    quick       four data sets, ranked by a short training on a third of each and by the whole
                (SAIL-VL Figure 4)
    scale       questions made of captions, more and more of them, each set read for as many steps:
                accuracy over log samples (Caption2QA)

    python -m claims.data_quality                          # all, about a quarter of an hour of one core
    python -m claims.data_quality --only filter --seeds 1  # a part

Prints a table for each study and one of all effects (score: mean F1 of captions, or accuracy, over held-out
pictures), and keeps them in OUT. An effect is the difference of two arms of the same seed, which share
pictures, noise and order; its spread is the standard deviation over seeds.

Ours: all sizes. The judge of `filter` and the questions of `scale` are the drawn world's own.
"""

import hashlib
import random
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, Sequence

import torch.nn.functional as F

from claims.alignment import log_law
from curation.balance import answers_as_text, thinned
from curation.caption2qa import PairsAsTurns, QuestionOptions, question_steps
from curation.classes import FINER, even_quotas, kmeans, latents
from curation.evaluating import Selection, TrialBook, rank_correlation, train_and_grade
from curation.noise import noisy_samples
from curation.oracle import Oracle
from curation.pipeline import Item
from curation.requests import generator_of
from data.encode import Encoder
from data.sample import Message, Sample
from data.world import facts_of, opening, scene
from evaluate import ask, text_of, weights_digest
from generate import load_model
from infra.cli import command
from infra.weights import write_json
from recipe import Setup, fit
from stage import ALL, Stage

EYES = ("vision", "adapter")
PICTURED = ("objects", "dots", "reading", "chart", "sum", "odd")  # scenes that are one picture
ASKED = ("chart", "dots")  # scenes that `scale` asks about
ALT_TEXT = ("short", "mismatch")  # what noise an alt-text is
SIZES = (48, 96, 192, 384, 768)
SKEWED = {"dots": 0.7, "sum": 0.15}  # shares of the skewed set
JUDGE_ERROR = 0.1  # share of a judge's answers that are wrong
ROWS = 2  # of a step
STEPS = 40
SCALE_STEPS = 60  # of which each reads about 15 samples
QUESTIONS_A_CAPTION = 4
POOL = 1000  # captions of a data set, of which those steps read about as many


@dataclass
class QualityOptions:
    """Try what curation is worth, at equal budget."""

    only: tuple[str, ...] = ()  # studies; none: all
    seeds: int = 3
    effort: float = 1.0  # multiplies steps and samples
    samples: int = 300  # held-out questions
    runs: Path = Path("runs/toy")  # a finished ladder, for its checkpoints
    out: Path = Path("runs/curation/data-quality")


@dataclass(frozen=True)
class Arm:
    """A data set, and for how long the checkpoint reads in it."""

    name: str
    samples: list[Sample]
    steps: int


@dataclass(frozen=True)
class Study:
    """arms: function of (lab, seed). claims: pairs of arms, the better one first.

    start: a rung of the ladder; trains: its parts; held_out: what is graded, a key of `Lab.held_out`.
    """

    arms: Callable[["Lab", int], Iterator[Arm]]
    claims: tuple[tuple[str, str], ...] = ()
    start: str = "vit3"
    trains: tuple[str, ...] = ALL
    held_out: str = "captions"


# ----------------------------------------------------------------------------------------- the lab


class Lab:
    """Checkpoints, held-out pictures, and the book of what was measured."""

    def __init__(self, options: QualityOptions):
        self.options = options
        self.book = TrialBook(options.out / "trials.jsonl")
        self.rows: list[dict] = []
        asked = captions_of_asked(max(2, options.samples), 1, test=True)
        self.held_out = {
            "captions": captions_by_kind(options.samples // len(PICTURED), 1, test=True),
            "questions": questions_from_captions(asked, 1, 1),
        }

    def sized(self, number: int) -> int:
        """A number of steps or samples with the options' effort."""
        return max(2, round(number * self.options.effort))

    def stage(self, study: Study, steps: int, seed: int) -> Stage:
        return Stage(
            "data-quality",
            study.trains,
            steps=steps,
            rows=ROWS,
            lr=5e-3,
            schedule="wsd",
            weighting="sqrt",
            seed=seed,
        )

    def measure(self, name: str, study: Study, arm: Arm, seed: int) -> None:
        """A row of the study's table: trained and graded, or remembered."""
        start = self.options.runs / study.start
        stage = self.stage(study, arm.steps, seed)
        held_out = self.held_out[study.held_out]
        trial = {
            "start": weights_digest(start),
            "data": digest_of(arm.samples),
            "held out": digest_of(held_out),
            "stage": asdict(stage),
        }
        work = [(Selection(arm.samples), stage)]
        scores = self.book.score(trial, lambda: train_and_grade(start, work, held_out))
        row = {"study": name, "arm": arm.name, "seed": seed, "records": len(arm.samples)}
        self.rows.append(row | {"steps": arm.steps, "scores": scores})
        print(f"{name}, {arm.name}, seed {seed}: {scores['overall']:.3f}", flush=True)

    def scores(self, name: str, arm: str) -> list[float]:
        """Of an arm, seed by seed."""
        found = [row for row in self.rows if row["study"] == name and row["arm"] == arm]
        return [row["scores"]["overall"] for row in found]

    def arms(self, name: str) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.rows if row["study"] == name))


def digest_of(samples: Sequence[Sample]) -> str:
    """Of what samples show (by where they come from) and say."""
    lines = []
    for each in samples:
        texts = [p for m in each.messages for p in m.parts if isinstance(p, str)]
        lines.append("\0".join([each.origin, *texts]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# -------------------------------------------------------------------------------------------- data


def captioned(kind: str, index: int, seed: int, test: bool = False) -> Sample:
    """A scene of this kind with its caption; graded by kind."""
    rng = generator_of(seed, index, kind)
    subject = scene(kind, rng, test)
    turn = subject.ask("caption", rng)
    messages = (opening(subject, turn.question, rng, False), Message("assistant", (turn.answer,)))
    facts = facts_of(subject, turn) | {"family": kind}
    return Sample(messages, "caption", f"{kind}/{seed}/{index}/{test}", facts)


def captions_by_kind(each: int, seed: int, test: bool) -> list[Sample]:
    """Equally many of every kind: their score is the mean over kinds."""
    return [captioned(kind, i, seed, test) for kind in PICTURED for i in range(max(1, each))]


def spoiled(number: int, seed: int, rate: float, kinds: tuple[str, ...] | None = None) -> list:
    """So many captions of the train side, a share of them spoiled; the same scenes for any rate."""
    found = noisy_samples(seed, rate, kinds) if kinds else noisy_samples(seed, rate)
    return list(islice(found, number))


def judged(samples: list[Sample], seed: int, error: float = JUDGE_ERROR) -> list[Sample]:
    """What a judge keeps that calls a share `error` of the good ones bad, and of the bad ones good."""
    kept = []
    for index, each in enumerate(samples):
        good = each.facts["vir"] >= 3 and each.facts["ita"] >= 3
        errs = generator_of(seed, index, "judge").random() < error
        if good != errs:
            kept.append(each)
    return kept


def answered(asked: Sample, caption: str) -> Sample:
    """The sample with another caption."""
    return replace(asked, messages=(*asked.messages[:-1], Message("assistant", (caption,))))


# ----------------------------------------------------------------------------------------- studies


def filter_arms(lab: Lab, seed: int) -> Iterator[Arm]:
    steps = lab.sized(STEPS)
    number = lab.sized(POOL)
    for rate in (0.18, 0.5):
        raw = spoiled(number, seed, rate)
        yield Arm(f"{rate:.0%} spoiled", raw, steps)
        yield Arm(f"{rate:.0%} spoiled, filtered", judged(raw, seed), steps)
    yield Arm("none spoiled", spoiled(number, seed, 0.0), steps)


def recaption_arms(lab: Lab, seed: int) -> Iterator[Arm]:
    steps = lab.sized(STEPS)
    raw = spoiled(lab.sized(POOL), seed, 1.0, ALT_TEXT)
    reference = spoiled(lab.sized(POOL // 5), seed + 100, 0.0)
    yield Arm("alt-texts", raw, steps)
    yield Arm("re-captioned", recaptioned(lab, raw, reference, steps, seed), steps)
    yield Arm("the reference set alone", reference, steps)


def recaptioned(
    lab: Lab, raw: list[Sample], reference: list[Sample], steps: int, seed: int
) -> list[Sample]:
    """The pictures with what a captioner says that was trained on the reference set."""
    start = lab.options.runs / STUDIES["recaption"].start
    stage = lab.stage(STUDIES["recaption"], steps, seed)
    trial = {
        "captioner": weights_digest(start),
        "reference": digest_of(reference),
        "stage": asdict(stage),
        "asked": digest_of(raw),
    }
    found = lab.book.score(trial, lambda: captions_by_trained(start, stage, reference, raw))
    return [answered(each, caption) for each, caption in zip(raw, found["captions"], strict=True)]


def captions_by_trained(
    start: Path, stage: Stage, reference: list[Sample], asked: list[Sample]
) -> dict[str, list[str]]:
    """Train the checkpoint on the reference set, and let it caption."""
    model, tokenizer = load_model(start)
    encoder = Encoder(tokenizer, model.config)
    fit(Setup(model.train(), encoder, Selection(reference)), stage)
    answers = ask(model, encoder, asked)
    return {"captions": [text_of(answer, tokenizer) for answer in answers]}


def repeat_arms(lab: Lab, seed: int) -> Iterator[Arm]:
    # Few enough that they are read six times
    steps = lab.sized(STEPS)
    good = spoiled(lab.sized(POOL // 5), seed + 200, 0.0)
    more = spoiled(lab.sized(POOL), seed + 300, 0.5)
    yield Arm("good, repeated", good, steps)
    yield Arm("good, and more but spoiled", good + more, steps)


def balance_arms(lab: Lab, seed: int) -> Iterator[Arm]:
    steps = lab.sized(STEPS)
    skewed = skewed_captions(lab.sized(2 * POOL), seed)
    texts = [answers_as_text(each) for each in skewed]
    kept = thinned(texts, cap=5, seed=seed, tolerance=0.5)
    chance = random.Random(seed).sample(range(len(skewed)), len(kept))
    yield Arm("as it is", skewed, steps)
    yield Arm("as many at random", [skewed[i] for i in chance], steps)
    yield Arm("thinned by n-grams", [skewed[i] for i in kept], steps)
    even = evenly_over_classes(lab, texts, len(kept), seed)
    yield Arm("even over latent classes", [skewed[i] for i in even], steps)


def evenly_over_classes(lab: Lab, phrases: list[str], amount: int, seed: int) -> list[int]:
    """So many of the samples whose phrases these are, drawn as evenly as they go from latent classes.

    A caption of this world is a phrase already: nobody is asked for another one.
    """
    # Ten buckets for each coarse class
    model, tokenizer = load_model(lab.options.runs / STUDIES["balance"].start)
    vectors = latents(model, tokenizer, phrases)
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    buckets, _ = kmeans(vectors, FINER * len(PICTURED), seed)

    # As many of each as there are
    members = defaultdict(list)
    for place, bucket in enumerate(buckets.tolist()):
        members[bucket].append(place)
    quotas = even_quotas([len(group) for group in members.values()], amount)
    rng = random.Random(seed)
    drawn = []
    for group, quota in zip(members.values(), quotas):
        drawn += rng.sample(group, quota)
    return sorted(drawn)


def skewed_captions(number: int, seed: int) -> list[Sample]:
    """Of dots most, of sums some, of everything else little; in random order."""
    found = []
    for kind in PICTURED:
        share = SKEWED.get(kind, (1 - sum(SKEWED.values())) / (len(PICTURED) - len(SKEWED)))
        found += [captioned(kind, i, seed) for i in range(max(1, round(share * number)))]
    random.Random(seed).shuffle(found)
    return found


def quick_arms(lab: Lab, seed: int) -> Iterator[Arm]:
    # Data sets of like size; a third of each, for a third of the steps
    number = lab.sized(POOL)
    steps = lab.sized(STEPS)
    for name, samples in (
        ("none spoiled", spoiled(number, seed, 0.0)),
        ("18% spoiled", spoiled(number, seed, 0.18)),
        ("50% spoiled", spoiled(number, seed, 0.5)),
        ("alt-texts", spoiled(number, seed, 1.0, ALT_TEXT)),
    ):
        yield Arm(name, samples, steps)
        yield Arm(f"{name}, quick", samples[::3], max(2, steps // 3))


def scale_arms(lab: Lab, seed: int) -> Iterator[Arm]:
    # Each is the beginning of the next; the fewer, the more often they are read
    captions = captions_of_asked(lab.sized(max(SIZES)), seed)
    rows = questions_from_captions(captions, seed, QUESTIONS_A_CAPTION)
    for size in SIZES:
        number = lab.sized(size)
        yield Arm(f"{number:,} captions", rows[:number], lab.sized(SCALE_STEPS))


def captions_of_asked(number: int, seed: int, test: bool = False) -> list[Sample]:
    """Captions of the kinds of scene that `scale` asks about, in turn."""
    return [captioned(ASKED[i % len(ASKED)], i, seed, test) for i in range(number)]


def questions_from_captions(captions: list[Sample], seed: int, count: int) -> list[Sample]:
    """The conversations that Caption2QA makes of captions, with the drawn world's oracle to ask."""
    steps = question_steps(QuestionOptions(count=count), Oracle(seed=seed), seed, needed=True)
    items = [Item(index, each.origin, each) for index, each in enumerate(captions)]
    for step in [*steps, PairsAsTurns()]:
        step([item for item in items if item.alive])

    # Graded by kind, which stands in front of the origin
    asked = [item.sample for item in items if item.alive]
    return [replace(s, facts=s.facts | {"family": s.origin.split("/")[0]}) for s in asked]


STUDIES = {
    "filter": Study(
        filter_arms,
        (
            ("18% spoiled, filtered", "18% spoiled"),
            ("50% spoiled, filtered", "50% spoiled"),
        ),
    ),
    "recaption": Study(recaption_arms, (("re-captioned", "alt-texts"),)),
    "repeat": Study(
        repeat_arms,
        (("good, repeated", "good, and more but spoiled"),),
        start="vit2",
        trains=EYES,
    ),
    "balance": Study(
        balance_arms,
        (
            ("thinned by n-grams", "as it is"),
            ("thinned by n-grams", "as many at random"),
            ("even over latent classes", "as it is"),
            ("even over latent classes", "as many at random"),
        ),
    ),
    "quick": Study(quick_arms),
    "scale": Study(scale_arms, held_out="questions"),
}

# ---------------------------------------------------------------------------------------- verdicts


def quality_table(lab: Lab, name: str) -> str:
    """Markdown: a line for each arm, and under it what the study says."""
    lines = ["| data | records | steps | score | spread | seeds |", "|---|---|---|---|---|---|"]
    for arm in lab.arms(name):
        scores = lab.scores(name, arm)
        row = next(row for row in lab.rows if (row["study"], row["arm"]) == (name, arm))
        numbers = f"{statistics.mean(scores):.3f} | {spread_of(scores):.3f} | {len(scores)}"
        lines.append(f"| {arm} | {row['records']:,} | {row['steps']:,} | {numbers} |")
    return "\n".join([*lines, "", *verdicts(lab, name)])


def spread_of(values: list[float]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdicts(lab: Lab, name: str) -> list[str]:
    if name == "quick":
        return [quick_verdict(lab)]
    if name == "scale":
        return scale_verdict(lab)
    return [effect(lab, name, better, worse) for better, worse in STUDIES[name].claims]


def effect(lab: Lab, name: str, better: str, worse: str) -> str:
    """The difference of two arms, in words."""
    gains = gains_of(lab, name, better, worse)
    won = sum(gain > 0 for gain in gains)
    size = f"{statistics.mean(gains):+.3f} +- {spread_of(gains):.3f}"
    return f"- {better}, against {worse}: {size}, better in {won} of {len(gains)} seeds"


def gains_of(lab: Lab, name: str, better: str, worse: str) -> list[float]:
    """The difference of two arms, seed by seed."""
    pairs = zip(lab.scores(name, better), lab.scores(name, worse), strict=True)
    return [one - other for one, other in pairs]


def effects_table(lab: Lab, names: Sequence[str]) -> str:
    """Markdown: all differences that the studies claim, a line each."""
    lines = ["| study | better | worse | score | instead of | effect | spread | seeds won |"]
    lines.append("|" + "---|" * 8)
    for name in names:
        for better, worse in STUDIES[name].claims:
            gains = gains_of(lab, name, better, worse)
            means = [statistics.mean(lab.scores(name, arm)) for arm in (better, worse)]
            cells = [name, better, worse, *[f"{mean:.3f}" for mean in means]]
            cells += [f"{statistics.mean(gains):+.3f}", f"{spread_of(gains):.3f}"]
            cells.append(f"{sum(gain > 0 for gain in gains)} of {len(gains)}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quick_verdict(lab: Lab) -> str:
    whole = [arm for arm in lab.arms("quick") if not arm.endswith(", quick")]
    by_seed = []
    for seed in range(lab.options.seeds):
        long = [lab.scores("quick", arm)[seed] for arm in whole]
        short = [lab.scores("quick", f"{arm}, quick")[seed] for arm in whole]
        by_seed.append(rank_correlation(short, long))
    told = ", ".join(f"{value:.2f}" for value in by_seed)
    same = sum(value == 1 for value in by_seed)
    return f"- rank correlation of quick and whole, by seed: {told}; same order in {same} of {len(by_seed)}"


def scale_verdict(lab: Lab) -> list[str]:
    arms = lab.arms("scale")
    sizes = [lab.sized(size) for size in SIZES]
    means = [statistics.mean(lab.scores("scale", arm)) for arm in arms]
    start, slope, fits = log_law(sizes, means)
    lines = [f"- means: score = {start:.3f} + {slope:.3f} log10(samples), R^2 {fits:.3f}"]
    for seed in range(lab.options.seeds):
        _, slope, fits = log_law(sizes, [lab.scores("scale", arm)[seed] for arm in arms])
        lines.append(f"- seed {seed}: {slope:.3f} a decade, R^2 {fits:.3f}")
    return lines


def study_data(options: QualityOptions) -> None:
    """Every study over its seeds; its table as soon as it is done."""
    unknown = sorted(set(options.only) - set(STUDIES))
    if unknown:
        raise ValueError(f"--only {unknown[0]}: choose from {', '.join(STUDIES)}")
    if options.seeds < 1:
        raise ValueError("--seeds must be positive")

    lab = Lab(options)
    names = options.only or tuple(STUDIES)
    for name in names:
        for seed in range(options.seeds):
            for arm in STUDIES[name].arms(lab, seed):
                lab.measure(name, STUDIES[name], arm, seed)
        table = quality_table(lab, name)
        (options.out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        write_json(options.out / f"{name}.json", [r for r in lab.rows if r["study"] == name])
        print(f"\n{table}\n", flush=True)

    # What they say together
    effects = effects_table(lab, names)
    (options.out / "effects.md").write_text(effects + "\n", encoding="utf-8")
    print(effects)


if __name__ == "__main__":
    command(study_data)
