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
from typing import Callable, Sequence

import sft
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
from curation.pipeline import Item, Step
from curation.questions import AtLeast, last_question
from curation.ratings import Rated, RateOptions, mean_of, rate_file, ratings_of, ratings_table
from curation.rows import write_rows
from curation.video_scores import VideoScoreOptions, score_videos
from data.encode import Encoder, text_of_message
from data.readers import Folder
from data.sample import Faults, Message, Sample
from data.world import MOVES, PHASES, PLACES, REASONING, World, sample
from evaluate import evaluate
from generate import load_model
from graders import grade, grader_of
from infra.cli import command
from recipe import Setup, fit
from rewards import format_reward
from tokenizer import Tokenizer
from vlm import SailVL

PARTS = ("classes", "again", "videos", "ratings", "chains", "trained")


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


def drawn_samples(family: str, number: int, seed: int) -> list[Sample]:
    """Single questions of one family; the kind of scene is in the facts."""
    found = []
    for i in range(number):
        one = sample(i, seed, {family: 1.0}, turns=1)
        kind = one.origin.split("/")[1]
        found.append(replace(one, facts=one.facts | {"kind": kind}))
    return found


def saying(one: Sample, said: str, **facts) -> Sample:
    """The sample with these words for its answer; `facts` are changed as well."""
    turn = Message("assistant", (said,))
    return replace(one, messages=(*one.messages[:-1], turn), facts=one.facts | facts)


def spread(numbers: list[float], digits: int = 2) -> str:
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.fmean(numbers):.{digits}f} ± {deviation:.{digits}f}"


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


def walked(items: list[Item], *steps: Step) -> list[Item]:
    """What a chain of steps makes of samples that others go on with."""
    walking = [Item(item.index, item.origin, item.sample) for item in items]
    for step in steps:
        step([item for item in walking if item.alive])
    return [item for item in walking if item.alive]


def items_of(samples: list[Sample]) -> list[Item]:
    return [Item(index, one.origin, one) for index, one in enumerate(samples)]


# ---------------------------------------------------------------------------------------- classes

LABELS = {
    "look": ("attributes", "spatial", "caption", "grounding", "listing"),
    "read": ("reading", "charts"),
    "count": ("counting",),
    "reason": ("arithmetic", "odd", "video"),
}
SHARE = 0.25  # of the samples, to keep
SKEW = 1.7  # the n-th family has n ** -SKEW of them
TIMES = (1, 3, 10, 30)  # buckets for each label


def skewed_items(options: SetOptions, seed: int) -> list[Item]:
    """Families in a random order, each rarer than the one before; the task is the coarse label."""
    rng = random.Random(seed)
    label_of_family = {family: label for label, group in LABELS.items() for family in group}
    families = rng.sample(sorted(label_of_family), len(label_of_family))
    weights = [(place + 1) ** -SKEW for place in range(len(families))]
    samples = []
    for family, weight in zip(families, weights):
        number = max(1, round(options.samples * weight / sum(weights)))
        for one in drawn_samples(family, number, seed):
            named = replace(one, task=label_of_family[family], origin=f"{family} {one.origin}")
            samples.append(named)
    return items_of(samples)


def family(one: Sample) -> str:
    return one.facts["family"]


def even(group: Callable[[Sample], str | int], seed: int) -> EvenOver:
    return EvenOver("even", group, SHARE, seed)


class Bucketing:
    """Phrases by an erring oracle, their vectors, and buckets of these: for one file."""

    def __init__(
        self, items: list[Item], model: SailVL, tokenizer: Tokenizer, noise: float, seed: int
    ):
        self.seed = seed
        self.embedded = walked(items, Phrased(Oracle(noise, seed)), Embedded(model, tokenizer))

    def __call__(self, buckets: int) -> list[Item]:
        return walked(self.embedded, Clustered(buckets, self.seed))


def classes_part(options: SetOptions) -> tuple[list[str], dict]:
    """How even five draws are; how pure buckets are, by their number and by the model."""
    model, tokenizer = load_model(options.embedder)
    untrained = SailVL(model.config).init_weights(1).eval()
    draws: dict[str, list[Sequence[Sample]]] = {}
    purities: dict[str, list[list[Item]]] = {}
    ten = 10 * len(LABELS)
    for seed in range(options.seeds):
        items = skewed_items(options, seed)
        trained = Bucketing(items, model, tokenizer, options.noise, seed)
        learned_nothing = Bucketing(items, untrained, tokenizer, options.noise, seed)
        chance = random.Random(seed).sample(items, round(SHARE * len(items)))
        kept = {
            "the file": items,
            "by chance": chance,
            f"even over {len(LABELS)} labels": walked(items, even(lambda one: one.task, seed)),
            f"even over {ten} buckets": walked(trained(ten), even(bucket_of, seed)),
            "even over the hidden families": walked(items, even(family, seed)),
        }
        for name, walkers in kept.items():
            draws.setdefault(name, []).append([item.sample for item in walkers])
        for times in TIMES:
            number = times * len(LABELS)
            purities.setdefault(f"{number} buckets", []).append(trained(number))
        purities.setdefault(f"{ten} buckets, model from noise", []).append(learned_nothing(ten))
    return classes_lines(draws, purities)


def classes_lines(
    draws: dict[str, list[Sequence[Sample]]], purities: dict[str, list[list[Item]]]
) -> tuple[list[str], dict]:
    lines = ["| draw | samples | entropy over families, bits | share of the rarest three |"]
    lines.append("|---|---|---|---|")
    numbers: dict = {"entropy": {}, "rarest": {}, "purity": {}, "chance": {}}
    rare = [rarest_families(whole) for whole in draws["the file"]]
    for name, kept in draws.items():
        bits = [entropy_of(list(map(family, samples))) for samples in kept]
        shares = [
            statistics.fmean(family(one) in group for one in samples)
            for samples, group in zip(kept, rare)
        ]
        numbers["entropy"][name] = bits
        numbers["rarest"][name] = shares
        size = f"{statistics.fmean(map(len, kept)):,.0f}"
        lines.append(f"| {name} | {size} | {spread(bits)} | {spread(shares, 3)} |")

    lines += ["", "| | purity over families | families dealt by chance |", "|---|---|---|"]
    for name, made in purities.items():
        pure = [purity_of(buckets_of(items), families_of(items)) for items in made]
        dealt = [purity_of(buckets_of(items), shuffled(families_of(items))) for items in made]
        numbers["purity"][name] = pure
        numbers["chance"][name] = dealt
        lines.append(f"| {name} | {spread(pure, 3)} | {spread(dealt, 3)} |")
    return lines, numbers


def rarest_families(samples: Sequence[Sample]) -> set[str]:
    counts = Counter(map(family, samples)).most_common()
    return {name for name, _ in counts[-3:]}


def buckets_of(items: list[Item]) -> list[int]:
    return [bucket_of(item.sample) for item in items]


def families_of(items: list[Item]) -> list[str]:
    return [family(item.sample) for item in items]


def shuffled(labels: list[str]) -> list[str]:
    return random.Random(0).sample(labels, len(labels))


# ------------------------------------------------------------------------------------------ again

WRONG = 0.3  # share of the answers that belong to another picture


def is_right(one: Sample) -> bool:
    said = text_of_message(one.messages[-1])
    return grade(said, one.facts["answer"], grader_of(one.facts)) == 1


def partly_wrong(options: SetOptions, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for name in ("attributes", "spatial", "counting", "charts"):
        truths = drawn_samples(name, options.samples // 4, seed)
        answers = [one.facts["answer"] for one in truths]
        for one in truths:
            wrong = rng.random() < WRONG
            samples.append(saying(one, rng.choice(answers)) if wrong else one)
    return samples


def again_part(options: SetOptions) -> tuple[list[str], dict]:
    """Right answers as they were, given again, checked by ratings, and of relevance 3 at least."""
    found: dict[str, list[list[Sample]]] = {}
    for seed in range(options.seeds):
        oracle = Oracle(options.noise, seed)
        items = items_of(partly_wrong(options, seed))
        given = walked(items, Rated(oracle, "before", "old_"), AnsweredAgain(oracle, 1000))
        checked = walked(given, Rated(oracle, "after"), NoWorse())
        ways = {
            "as they were": items,
            "answered again": given,
            "and no worse by ratings": checked,
            "and relevance >= 3": walked(checked, AtLeast("relevance", 3)),
        }
        for name, walkers in ways.items():
            found.setdefault(name, []).append([item.sample for item in walkers])

    lines = ["| answers | samples | right |", "|---|---|---|"]
    numbers = {}
    for name, kept in found.items():
        numbers[name] = [statistics.fmean(map(is_right, samples)) for samples in kept]
        size = f"{statistics.fmean(map(len, kept)):,.0f}"
        lines.append(f"| {name} | {size} | {spread(numbers[name], 3)} |")
    return lines, numbers


# ----------------------------------------------------------------------------------------- videos

VIDEO_FAULTS = {"wrong answer": 0.08, "at rest": 0.06, "one frame is enough": 0.06}


def faulty_videos(options: SetOptions, seed: int) -> list[Sample]:
    """Questions about videos; facts["fault"] says what is wrong, "" for nothing."""
    rng = random.Random(seed)
    videos = []
    for one in drawn_samples("video", options.samples, seed):
        fault = drawn_fault(rng, VIDEO_FAULTS)
        videos.append(VIDEO_MAKERS[fault](one, rng))
        videos[-1].facts["fault"] = fault
    return videos


def drawn_fault(rng: random.Random, shares: dict[str, float]) -> str:
    names = [*shares, ""]
    weights = [*shares.values(), 1 - sum(shares.values())]
    return rng.choices(names, weights)[0]


def wrong_move(one: Sample, rng: random.Random) -> Sample:
    others = [move for move in MOVES if move != one.facts["answer"]]
    return saying(one, rng.choice(others))


def at_rest(one: Sample, rng: random.Random) -> Sample:
    """The first frame again and again; it moves nowhere, so that the answer is right."""
    frames = [part for part in one.messages[0].parts if not isinstance(part, str)]
    parts = tuple(p if isinstance(p, str) else frames[0] for p in one.messages[0].parts)
    still = replace(one, messages=(Message("user", parts), one.messages[1]))
    words = one.facts["words"].split(", ")
    return saying(still, "nowhere", answer="nowhere", words=", ".join(words[:1] * len(words)))


def easy_question(one: Sample, rng: random.Random) -> Sample:
    """What shape it has, which any frame shows."""
    shape = one.facts["words"].split(", ")[0].split()[-1]
    *pictures, _ = one.messages[0].parts
    asked = Message("user", (*pictures, "what shape is it?"))
    return saying(replace(one, messages=(asked, one.messages[1])), shape, answer=shape)


VIDEO_MAKERS = {
    "wrong answer": wrong_move,
    "at rest": at_rest,
    "one frame is enough": easy_question,
    "": lambda one, rng: replace(one, facts=dict(one.facts)),
}


def videos_part(options: SetOptions) -> tuple[list[str], dict]:
    """Who is kept, by what was wrong; precision and recall of what was dropped."""
    kept_shares: dict[str, list[float]] = {fault: [] for fault in VIDEO_MAKERS}
    good_kept = []
    for seed in range(options.seeds):
        data = put(options.out / f"videos-{seed}.jsonl", faulty_videos(options, seed))
        out = options.out / f"videos-{seed}-kept.jsonl"
        score_videos(VideoScoreOptions(data, out, seed=seed, annotator=oracle_of(options)))
        before = Counter(one.facts["fault"] for one in Folder(data).first())
        after = Counter(one.facts["fault"] for one in Folder(out).first())
        for fault, shares in kept_shares.items():
            shares.append(after[fault] / before[fault])
        good_kept.append(
            (after[""] / before[""], after[""] / after.total(), before[""] / before.total())
        )

    lines = ["| videos | kept |", "|---|---|"]
    for fault, shares in kept_shares.items():
        lines.append(f"| {fault or 'nothing wrong'} | {spread(shares, 3)} |")
    _, pure, pure_before = zip(*good_kept)
    lines.append(f"| share without a fault, before | {spread(list(pure_before), 3)} |")
    lines.append(f"| share without a fault, after | {spread(list(pure), 3)} |")
    return lines, {"kept": kept_shares, "pure before": pure_before, "pure after": pure}


# ---------------------------------------------------------------------------------------- ratings


def ratings_part(options: SetOptions) -> tuple[list[str], dict]:
    """The families of each SFT phase, rated by the oracle: later phases shall be harder."""
    rated = []
    for phase, families in PHASES.items():
        samples = []
        for name in families:
            samples += drawn_samples(name, options.samples // (4 * len(families)), 0)
        data = put(options.out / f"{phase}.jsonl", samples)
        rated.append(options.out / "rated" / f"{phase}.jsonl")
        rate_file(RateOptions(data, rated[-1], annotator=oracle_of(options)))
    means = {}
    for path in rated:
        means[path.stem] = {name: mean_of(found).value for name, found in ratings_of(path).items()}
    return ratings_table(rated), means


# ----------------------------------------------------------------------------------------- chains

CHAIN_SHARE = 0.05  # of the chains, for each of the faults


def chain_text(one: Sample) -> str:
    return one.facts["chain"]


def with_chain_text(one: Sample, chain: str | None, said: str = "") -> Sample:
    answer = said or f"\\boxed{{{one.facts['answer']}}}"
    turn = Message("assistant", (answer,), think=chain)
    return replace(one, messages=(*one.messages[:-1], turn))


def with_words(one: Sample, before: str, after: str) -> Sample:
    """The question with words around it."""
    user = one.messages[0]
    *first, last = user.parts
    break_, question = ("\n", last[1:]) if last.startswith("\n") else ("", last)
    said = replace(user, parts=(*first, f"{break_}{before}{question}{after}"))
    return replace(one, messages=(said, *one.messages[1:]))


def with_system(one: Sample) -> Sample:
    return replace(
        one, messages=(Message("system", ("You are a careful assistant.",)), *one.messages)
    )


def whole(one: Sample) -> Sample:
    return with_chain_text(one, chain_text(one))


def other_value(one: Sample, rng: random.Random) -> str:
    """An answer of the same kind that is wrong."""
    *key, value = one.facts["answer"].split()
    choices = PLACES if value in PLACES else [str(n) for n in range(10)]
    return " ".join([*key, rng.choice([choice for choice in choices if choice != value])])


def wrong_box(one: Sample, rng: random.Random) -> Sample:
    return with_chain_text(one, chain_text(one), f"\\boxed{{{other_value(one, rng)}}}")


def invented_chain(one: Sample, rng: random.Random) -> Sample:
    return with_chain_text(one, f"7 northwest purple star. so {one.facts['answer']}.")


def restated(one: Sample, rng: random.Random) -> Sample:
    return with_chain_text(one, f"{last_question(one)} {one.facts['answer']}.")


def looping(one: Sample, rng: random.Random) -> Sample:
    return with_chain_text(one, f"{chain_text(one)} " * 30 + one.facts["answer"])


def tagged(one: Sample, rng: random.Random) -> Sample:
    said = (
        f"<REASONING>{chain_text(one)}</REASONING>\n<CONCLUSION>{one.facts['answer']}</CONCLUSION>"
    )
    return with_chain_text(one, None, said)


# Name -> (what it makes of a sample, what should become of it)
CHAIN_FAULTS: dict[str, tuple[Callable[[Sample, random.Random], Sample], str]] = {
    "nothing wrong": (lambda one, rng: whole(one), "kept"),
    "system prompt": (lambda one, rng: with_system(whole(one)), "repaired"),
    "request to think": (
        lambda one, rng: with_words(whole(one), "", " Please think step by step."),
        "repaired",
    ),
    "hint in front": (
        lambda one, rng: with_words(whole(one), "Hint: look twice.\nQuestion: ", ""),
        "repaired",
    ),
    "tags of another kind": (tagged, "repaired"),
    "`####` before the answer": (
        lambda one, rng: with_chain_text(
            one, None, f"{chain_text(one)}\n#### {one.facts['answer']}"
        ),
        "repaired",
    ),
    "no chain": (lambda one, rng: with_chain_text(one, None), "repaired"),
    "question said again": (restated, "dropped"),
    "wrong answer in the box": (wrong_box, "dropped"),
    "chain that invents": (invented_chain, "dropped"),
    "chain that loops": (looping, "dropped"),
    "essay for an answer": (lambda one, rng: with_chain_text(one, None, "I see. " * 60), "dropped"),
}


def faulty_chains(options: SetOptions, seed: int, shares: dict[str, float]) -> list[Sample]:
    """Chains of the reasoning families with at most one fault each, named in the facts; and duplicates."""
    rng = random.Random(seed)
    samples = []
    for name in REASONING:
        for one in drawn_samples(name, options.samples // len(REASONING), seed):
            fault = drawn_fault(rng, shares) or "nothing wrong"
            made = CHAIN_FAULTS[fault][0](one, rng)
            samples.append(replace(made, facts=one.facts | {"fault": fault}))
    for one in rng.sample(samples, round(CHAIN_SHARE * len(samples))):
        samples.append(replace(one, facts=one.facts | {"fault": "a second time"}))
    return samples


def chains_part(options: SetOptions) -> tuple[list[str], dict]:
    """Of each fault: how many are left, and how many of those have the one right form."""
    left: dict[str, dict[bool, list[float]]] = {}
    shares = {name: CHAIN_SHARE for name in CHAIN_FAULTS if name != "nothing wrong"}
    for seed in range(options.seeds):
        data = put(options.out / f"chains-{seed}.jsonl", faulty_chains(options, seed, shares))
        before = Counter(one.facts["fault"] for one in Folder(data).first())
        for judge_all in (False, True):
            kept = curated_chains(options, data, seed, judge_all)
            after = Counter(one.facts["fault"] for one in kept)
            for fault in before:
                shares_left = left.setdefault(fault, {False: [], True: []})
                shares_left[judge_all].append(after[fault] / before[fault])
            for one in kept:
                check_form(one)

    lines = ["| chains | should be | left | with `--judge-all` |", "|---|---|---|---|"]
    for fault, (_, should) in (CHAIN_FAULTS | {"a second time": (None, "dropped")}).items():
        by_rule, judged = (spread(shares, 3) for shares in left[fault].values())
        lines.append(f"| {fault} | {should} | {by_rule} | {judged} |")
    return lines, left


def curated_chains(options: SetOptions, data: Path, seed: int, judge_all: bool) -> list[Sample]:
    out = data.with_name(f"{data.stem}-{'judged' if judge_all else 'kept'}.jsonl")
    oracle = oracle_of(options)
    curate_chains(
        LongCotOptions(data, out, seed=seed, annotator=oracle, share=1.0, judge_all=judge_all)
    )
    return Folder(out).first()


def check_form(one: Sample) -> None:
    """Everything that is left has the one form, and a question without hints."""
    turn = one.messages[-1]
    text = f"<think>{turn.think}</think>{text_of_message(turn)}"
    assert format_reward(text, finished=True), f"{one.origin}: not the form: {text[:100]}"
    asked = " ".join(text_of_message(message) for message in one.messages[:-1])
    assert one.messages[0].role == "user" and "step by step" not in asked and "Hint" not in asked


# ----------------------------------------------------------------------------------------- trained

HARMFUL = dict.fromkeys(
    (
        "question said again",
        "wrong answer in the box",
        "chain that invents",
        "chain that loops",
    ),
    0.15,
)
GRADED_CHAINS = 100  # held-out questions of each family


def trained_part(options: SetOptions) -> tuple[list[str], dict]:
    """Long-CoT SFT on chains of which six in ten have a harmful fault, and on what curation leaves of them.

    As many steps on both; what is done stands in OUT/trained.jsonl and is not done again.
    """
    rows = options.out / "trained.jsonl"
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    for seed in range(options.seeds):
        for name, path in chain_files(options, seed).items():
            if any((row["data"], row["seed"]) == (name, seed) for row in done):
                continue
            row = {"data": name, "seed": seed} | accuracy_after(options, path, seed)
            done.append(row)
            with open(rows, "a") as file:
                file.write(json.dumps(row) + "\n")

    lines = ["| chains | in the file | right when thinking | whole form |", "|---|---|---|---|"]
    for name in ("raw", "curated", "curated, all judged"):
        mine = [row for row in done if row["data"] == name]
        number = f"{statistics.fmean(row['chains'] for row in mine):,.0f}"
        right = spread([row["accuracy"] for row in mine], 3)
        form = spread([row["form"] for row in mine], 3)
        lines.append(f"| {name} | {number} | {right} | {form} |")
    return lines, {"rows": done}


def chain_files(options: SetOptions, seed: int) -> dict[str, Path]:
    """Both files, without facts: of data that people find, the truth is what stands there."""
    raw = put(options.out / f"trained-{seed}.jsonl", faulty_chains(options, seed, HARMFUL))
    sets = {
        "raw": Folder(raw).first(),
        "curated": curated_chains(options, raw, seed, judge_all=False),
        "curated, all judged": curated_chains(options, raw, seed, judge_all=True),
    }
    files = {}
    for name, samples in sets.items():
        without_facts = [replace(one, facts={}) for one in samples]
        place = options.out / f"trained-{seed}-{name.replace(', ', '-').replace(' ', '-')}.jsonl"
        files[name] = put(place, without_facts)
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
