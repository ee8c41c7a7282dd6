"""Do latent classes, answering again, video scores, ratings and chain curation do what they say?

What it teaches: where every picture comes from a known scene, what a step should have kept is known as well.
So each pipeline gets a file with faults that were put in on purpose, and an annotator that errs in a tenth of
its answers, and is counted against the truth.

    classes   eleven families, the commonest 58 times the rarest, under four coarse labels: how evenly spread
              is a draw of a quarter of them? Over buckets, beside chance, labels, and the hidden truth
    again     three answers in ten are wrong: how many after they were given again, without and with ratings
    videos    wrong answers, things at rest, questions that one frame answers: who is kept
    ratings   the four phases of SFT, rated: means in the form of SAIL-VL's Table 2
    chains    a dozen faults among chains: how many of each are dropped or repaired
    trained   long-CoT SFT on faulty chains, and on what curation leaves of them: right answers after it

    python -m claims.curation_sets --embedder runs/toy/final --out runs/curation/sets
    python -m claims.curation_sets --embedder runs/toy/final --only classes

Prints Markdown, and writes it to OUT/NAME.md with the numbers of all seeds in OUT/NAME.json. Spreads are
standard deviations over seeds.
"""

import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Sequence, Sized

import sft
from claims.planted_faults import (
    CHAIN_FAULTS,
    EACH,
    HARMFUL,
    LABELS,
    REPAIRED,
    TWICE,
    VIDEO_FAULTS,
    drawn_samples,
    faulty_chains,
    faulty_videos,
    partly_wrong,
    skewed,
)
from curation.annotators import AnnotatorOptions
from curation.classes import (
    AnsweredAgain,
    Clustered,
    Embedded,
    EvenOver,
    NoWorse,
    Phrased,
    bucket_of,
    entropy_of,
    purity_of,
)
from curation.long_cot import LongCotOptions, curate_chains
from curation.oracle import Oracle
from curation.pipeline import Item, PipelineStep
from curation.questions import AtLeast
from curation.ratings import Rated, RateOptions, mean_of, rate_file, ratings_of, ratings_table
from curation.rows import write_rows
from curation.video_scores import VideoScoreOptions, score_videos
from data.encode import Encoder, text_of_message
from data.readers import Folder
from data.sample import Faults, Sample
from data.world import PHASES, REASONING, World
from evaluate import evaluate
from generate import load_model
from graders import grade, grader_of
from infra.cli import command
from infra.table import markdown
from recipe import Setup, fit
from rewards import format_reward
from tokenizer import Tokenizer
from vlm import SailVL

PARTS = ("classes", "again", "videos", "ratings", "chains", "trained")
Measured = tuple[list[str], dict]  # lines of Markdown, and the numbers of all seeds behind them


@dataclass
class SetOptions:
    """Count what the curation of instruction, video and chain data keeps, against the known truth."""

    embedder: Path  # a model of the toy world, for vectors
    out: Path = Path("runs/curation/sets")
    only: tuple[str, ...] = PARTS
    seeds: int = 3
    samples: int = 2000  # of a file
    noise: float = 0.1  # share of the annotator's answers that are wrong
    start: Path = Path("runs/toy/soup")  # the model that learns chains
    steps: int = 120  # that it trains


def oracle_of(options: SetOptions) -> AnnotatorOptions:
    return AnnotatorOptions(oracle=True, noise=options.noise)


def spread(numbers: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    mean = statistics.fmean(numbers)
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def mean_size(groups: Sequence[Sized]) -> str:
    mean = statistics.fmean(len(group) for group in groups)
    return f"{mean:,.0f}"


def put(path: Path, samples: list[Sample]) -> Path:
    """A file of them, unless it is there: what is asked about it goes on where it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_rows(path, ((one, {}) for one in samples), Faults(strict=True))
    return path


def check_settings(options: SetOptions) -> None:
    """Files of other options are not taken for files of these."""
    path = options.out / "settings.json"
    numbers = (options.samples, options.noise, options.steps)
    settings = json.dumps([str(options.embedder), str(options.start), *numbers])
    if path.exists() and path.read_text() != settings:
        raise ValueError(f"{options.out} holds files of {path.read_text()}: give another --out")
    path.write_text(settings)


def walked(items: list[Item], *steps: PipelineStep) -> list[Item]:
    """What a chain of steps makes of samples that others go on with."""
    walking = [Item(item.index, item.origin, item.sample) for item in items]
    for step in steps:
        step([item for item in walking if item.alive])
    return [item for item in walking if item.alive]


def items_of(samples: list[Sample]) -> list[Item]:
    items = []
    for index, one in enumerate(samples):
        items.append(Item(index, one.origin, one))
    return items


# ---------------------------------------------------------------------------------------- classes

SHARE = 0.25  # of the samples, to keep
TIMES = (1, 3, 10, 30)  # buckets for each label
RAREST = 3  # families, whose share is shown


def family(one: Sample) -> str:
    return one.facts["family"]


def label(one: Sample) -> str:
    return one.task


def families_of(items: Sequence[Item]) -> list[str]:
    return [family(item.sample) for item in items]


class Bucketing:
    """Phrases by an erring oracle and their vectors, once; called, buckets of these."""

    def __init__(
        self, items: list[Item], model: SailVL, tokenizer: Tokenizer, noise: float, seed: int
    ):
        phrased = Phrased(Oracle(noise, seed))
        self.seed = seed
        self.embedded = walked(items, phrased, Embedded(model, tokenizer))

    def __call__(self, times: int) -> list[Item]:
        return walked(self.embedded, Clustered(times * len(LABELS), self.seed))


def classes_part(options: SetOptions) -> Measured:
    """How even five draws are; how pure buckets are, by their number and by the model."""
    model, tokenizer = load_model(options.embedder)
    noise = SailVL(model.config).init_weights(1).eval()
    draws: list[dict[str, list[Item]]] = []
    buckets: list[dict[str, list[Item]]] = []
    for seed in range(options.seeds):
        items = items_of(skewed(options.samples, seed))
        bucketing = Bucketing(items, model, tokenizer, options.noise, seed)
        draws.append(five_draws(items, bucketing(10), seed))

        # By number, and with a model that has learned nothing
        made = {f"{times * len(LABELS)} buckets": bucketing(times) for times in TIMES}
        unlearned = Bucketing(items, noise, tokenizer, options.noise, seed)
        made[f"{10 * len(LABELS)} buckets, model from noise"] = unlearned(10)
        buckets.append(made)

    lines, numbers = entropies(draws)
    more_lines, more_numbers = purities(buckets)
    return [*lines, "", *more_lines], numbers | more_numbers


def five_draws(items: list[Item], bucketed: list[Item], seed: int) -> dict[str, list[Item]]:
    """The same number of samples in four ways, and all of them."""
    number = round(SHARE * len(items))
    return {
        "the file": items,
        "by chance": random.Random(seed).sample(items, number),
        f"even over {len(LABELS)} labels": walked(items, EvenOver("even", label, SHARE, seed)),
        f"even over {10 * len(LABELS)} buckets": walked(
            bucketed, EvenOver("even", bucket_of, SHARE, seed)
        ),
        "even over the hidden families": walked(items, EvenOver("even", family, SHARE, seed)),
    }


def entropies(draws: list[dict[str, list[Item]]]) -> Measured:
    """How evenly each draw is spread over families, and how much of the rarest it has."""
    rare = [rarest_families(draw["the file"]) for draw in draws]
    rows = [("draw", "samples", "entropy over families, bits", f"share of the rarest {RAREST}")]
    numbers: dict[str, dict] = {"entropy": {}, "rarest": {}}
    for name in draws[0]:
        kept = [draw[name] for draw in draws]
        bits = [entropy_of(families_of(items)) for items in kept]
        shares = [share_among(families_of(items), wanted) for items, wanted in zip(kept, rare)]
        rows.append((name, mean_size(kept), spread(bits, 2), spread(shares)))
        numbers["entropy"][name] = bits
        numbers["rarest"][name] = shares
    return markdown(*rows), numbers


def rarest_families(items: Sequence[Item]) -> set[str]:
    commonest_first = Counter(families_of(items)).most_common()
    return {name for name, _ in commonest_first[-RAREST:]}


def share_among(families: Sequence[str], wanted: set[str]) -> float:
    found = [name for name in families if name in wanted]
    return len(found) / len(families)


def purities(buckets: list[dict[str, list[Item]]]) -> Measured:
    """How pure buckets are, beside the same buckets with families dealt by chance."""
    rows = [("", "purity over families", "families dealt by chance")]
    numbers: dict[str, dict] = {"purity": {}, "chance": {}}
    for name in buckets[0]:
        pure, dealt = [], []
        for made in buckets:
            families = families_of(made[name])
            found = [bucket_of(item.sample) for item in made[name]]
            pure.append(purity_of(found, families))
            dealt.append(purity_of(found, random.Random(0).sample(families, len(families))))
        rows.append((name, spread(pure), spread(dealt)))
        numbers["purity"][name] = pure
        numbers["chance"][name] = dealt
    return markdown(*rows), numbers


# ------------------------------------------------------------------------------------------ again


def again_part(options: SetOptions) -> Measured:
    """Right answers as they were, given again, checked by ratings, and of relevance 3 at least."""
    found: dict[str, list[list[Item]]] = {}
    for seed in range(options.seeds):
        oracle = Oracle(options.noise, seed)
        items = items_of(partly_wrong(options.samples, seed))
        given = walked(items, Rated(oracle, "before", "old_"), AnsweredAgain(oracle, longest=1000))
        checked = walked(given, Rated(oracle, "after"), NoWorse())
        ways = {
            "as they were": items,
            "answered again": given,
            "and no worse by ratings": checked,
            "and relevance >= 3": walked(checked, AtLeast("relevance", 3)),
        }
        for name, walkers in ways.items():
            found.setdefault(name, []).append(walkers)

    rows = [("answers", "samples", "right")]
    numbers = {}
    for name, kept in found.items():
        numbers[name] = [
            statistics.fmean(is_right(item.sample) for item in items) for items in kept
        ]
        rows.append((name, mean_size(kept), spread(numbers[name])))
    return markdown(*rows), numbers


def is_right(one: Sample) -> bool:
    said = text_of_message(one.messages[-1])
    return grade(said, one.facts["answer"], grader_of(one.facts)) == 1


# ----------------------------------------------------------------------------------------- videos


def fault_of_sample(one: Sample) -> str:
    return one.facts["fault"]


def left_of(before: list[Sample], after: list[Sample]) -> dict[str, float]:
    """Of each fault the share of samples that are still there."""
    there = Counter(map(fault_of_sample, before))
    left = Counter(map(fault_of_sample, after))
    return {fault: left[fault] / number for fault, number in there.items()}


def videos_part(options: SetOptions) -> Measured:
    """Who is kept, by what was wrong; and how many have no fault, before and after."""
    left = []
    sound: dict[str, list[float]] = {"before": [], "after": []}
    for seed in range(options.seeds):
        data = put(options.out / f"videos-{seed}.jsonl", faulty_videos(options.samples, seed))
        out = options.out / f"videos-{seed}-kept.jsonl"
        score_videos(VideoScoreOptions(data, out, seed=seed, annotator=oracle_of(options)))
        before = Folder(data).first()
        after = Folder(out).first()
        left.append(left_of(before, after))
        for name, samples in (("before", before), ("after", after)):
            faults = list(map(fault_of_sample, samples))
            sound[name].append(share_among(faults, {"nothing wrong"}))

    rows = [("videos", "share that is kept")]
    rows += [(fault, spread([one[fault] for one in left])) for fault in VIDEO_FAULTS]
    rows += [(f"without a fault, {name}", spread(shares)) for name, shares in sound.items()]
    return markdown(*rows), {"left": left, "without a fault": sound}


# ---------------------------------------------------------------------------------------- ratings


def ratings_part(options: SetOptions) -> Measured:
    """The families of each SFT phase, rated by the oracle: later phases shall be harder."""
    rated = []
    for phase, families in PHASES.items():
        samples = []
        for name in families:
            samples += drawn_samples(name, options.samples // (len(PHASES) * len(families)), seed=0)
        data = put(options.out / f"{phase}.jsonl", samples)
        rated.append(options.out / "rated" / f"{phase}.jsonl")
        rate_file(RateOptions(data, rated[-1], annotator=oracle_of(options)))

    means = {}
    for path in rated:
        means[path.stem] = {name: mean_of(found).value for name, found in ratings_of(path).items()}
    return ratings_table(rated), means


# ----------------------------------------------------------------------------------------- chains


def chains_part(options: SetOptions) -> Measured:
    """Of each fault: how many are left, with a judge where rules do not settle it, and for all."""
    left: dict[str, list[dict[str, float]]] = {"rules first": [], "all judged": []}
    for seed in range(options.seeds):
        data = put(options.out / f"chains-{seed}.jsonl", faulty_chains(options.samples, seed, EACH))
        for name, shares in left.items():
            kept = curated_chains(options, data, seed, judge_all=name == "all judged")
            shares.append(left_of(Folder(data).first(), kept))
            for one in kept:
                check_form(one)

    rows = [("chains", "should be", "left", "left with `--judge-all`")]
    for fault in [*CHAIN_FAULTS, TWICE]:
        kept_as = "repaired" if fault in REPAIRED else "dropped"
        shares = [spread([one[fault] for one in found]) for found in left.values()]
        rows.append((fault, "kept" if fault == "nothing wrong" else kept_as, *shares))
    return markdown(*rows), left


def curated_chains(options: SetOptions, data: Path, seed: int, judge_all: bool) -> list[Sample]:
    """What the command leaves of a file."""
    ending = "judged" if judge_all else "kept"
    out = data.with_name(f"{data.stem}-{ending}.jsonl")
    oracle = oracle_of(options)
    chosen = LongCotOptions(data, out, seed=seed, annotator=oracle, share=1.0, judge_all=judge_all)
    curate_chains(chosen)
    return Folder(out).first()


def check_form(one: Sample) -> None:
    """Everything that is left has the one form, and a question without hints."""
    turn = one.messages[-1]
    text = f"<think>{turn.think}</think>{text_of_message(turn)}"
    assert format_reward(text, finished=True), f"{one.origin}: not the form: {text[:100]}"
    asked = " ".join(text_of_message(message) for message in one.messages[:-1])
    assert one.messages[0].role == "user" and "step by step" not in asked and "Hint" not in asked


# ----------------------------------------------------------------------------------------- trained

GRADED_CHAINS = 100  # held-out questions of each family


def trained_part(options: SetOptions) -> Measured:
    """Long-CoT SFT on chains of which six in ten have a harmful fault, and on what curation leaves of them.

    As many steps on each; what is done stands in OUT/trained.jsonl and is not done again.
    """
    log = options.out / "trained.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["data"], row["seed"]) for row in done}
    for seed in range(options.seeds):
        for name, path in chain_files(options, seed).items():
            if (name, seed) in known:
                continue
            row = {"data": name, "seed": seed} | accuracy_after(options, path, seed)
            done.append(row)
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")

    rows = [("chains", "in the file", "right when thinking", "whole form", "seeds")]
    for name in dict.fromkeys(row["data"] for row in done):
        mine = [row for row in done if row["data"] == name]
        number = f"{statistics.fmean(row['chains'] for row in mine):,.0f}"
        right = spread([row["accuracy"] for row in mine])
        form = spread([row["form"] for row in mine])
        rows.append((name, number, right, form, str(len(mine))))
    return markdown(*rows), {"rows": done}


def chain_files(options: SetOptions, seed: int) -> dict[str, Path]:
    """Three files, without facts: of data that people find, the truth is what stands there."""
    raw = put(options.out / f"trained-{seed}.jsonl", faulty_chains(options.samples, seed, HARMFUL))
    sets = {
        "raw": Folder(raw).first(),
        "curated": curated_chains(options, raw, seed, judge_all=False),
        "curated, all judged": curated_chains(options, raw, seed, judge_all=True),
    }

    # Beside the rows that know what is wrong
    files = {}
    for name, samples in sets.items():
        without_facts = [replace(one, facts={}) for one in samples]
        short = name.replace(", ", "-").replace(" ", "-")
        files[name] = put(options.out / f"trained-{seed}-{short}.jsonl", without_facts)
    return files


def accuracy_after(options: SetOptions, path: Path, seed: int) -> dict:
    """Train from `start` on the file, and grade with thinking on held-out questions."""
    model, tokenizer = load_model(options.start)
    source = Folder(path)
    encoder = Encoder(tokenizer, model.config, source.root)
    stage = replace(sft.TOY["long-cot"], seed=seed, steps=options.steps)
    fit(Setup(model.train(), encoder, source), stage)

    # Right answers in whole boxes; and the form, whatever is right
    held_out = []
    for name in REASONING:
        held_out += World().held_out(name, GRADED_CHAINS)
    scores, graded = evaluate(model.eval(), encoder, held_out, think=True, max_new=64)
    form = statistics.fmean(format_reward(one.said, finished=True) for one in graded)
    return {"chains": len(source), "accuracy": scores["overall"].accuracy, "form": form}


# ---------------------------------------------------------------------------------------- command

MEASURES = {
    "classes": classes_part,
    "again": again_part,
    "videos": videos_part,
    "ratings": ratings_part,
    "chains": chains_part,
    "trained": trained_part,
}


def measure_sets(options: SetOptions) -> None:
    unknown = sorted(set(options.only) - set(MEASURES))
    if unknown:
        raise ValueError(f"--only {unknown[0]}: choose from {', '.join(MEASURES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    for name in options.only:
        lines, numbers = MEASURES[name](options)
        (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")
        (options.out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"\n{name}\n" + "\n".join(lines), flush=True)


if __name__ == "__main__":
    command(measure_sets)
