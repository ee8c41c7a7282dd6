"""Evaluating data: what a data set is worth is what a model becomes by it, so train one, shortly.

What it teaches: nobody can tell by reading whether a data set helps. A short training from the same
checkpoint, graded on the same questions, can; and its verdict is of use if it is the long training's.
Four commands, each of which trains through the ordinary loop, grades as evaluate.py does, and writes a
table (OUT/NAME.md, OUT/NAME.json):

    checkpoint --train, --steps, on some records--> --anneal--> grade on --held-out        one trial

    quick         equally many records of each data set, equally many steps: their ranking;
                  with --check also the whole of each: is it the same ranking?
    composition   one data set after another is halved; it stays so if the score is no worse
    incremental   one data set after another joins the --base; it stays if the score is no worse
    annealing     checkpoints of one run, each trained on the same small data at a falling rate before
                  it is graded: what they know counts, not at which rate they were stopped

    python -m curation.evaluating quick --mix mix.json --held-out test.jsonl --model runs/toy/vit3 \\
        --out runs/quick --steps 60 --seeds 3
    torchrun --nproc-per-node 8 -m curation.evaluating composition ... (any number of ranks)

--mix is a mixture file (data/mixture.py); its data sets are what is compared, by their names, and their
weights are not used: within a trial every record is read as often as any other. Interrupted, a command
goes on with the trials that OUT/trials.jsonl does not have.

Source: SAIL-VL (arXiv 2501.05952) section 3.3.1 for the first three (subsets of 2M samples; halved if
the model improves; added if it improves or stays level), section 3.2 for annealing (2M samples like
those before). Not published, ours: a halving that changes nothing is kept, as less data did the same;
what counts as level (--level); greedy, in the mixture's order; the annealing rate, a cosine to a tenth.
"""

import hashlib
import json
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Callable, Sequence

import torch
import tyro
from torch import Tensor
from tyro.conf import subcommand

from data.encode import Encoder
from data.mixture import entries_of
from data.readers import Folder, Picked
from data.sample import Faults, Sample
from data.stream import Order
from evaluate import evaluate, gradable, weights_digest
from generate import load_model
from infra.cli import command
from infra.device import pick_device
from infra.table import markdown
from infra.weights import write_json
from recipe import Setup, fit, refuse_impossible
from scale import parallel
from scale.parallel import Ranks
from scale.shard import whole_weights
from stage import Stage

# ------------------------------------------------------------------------------------- one trial


class Selection:
    """Some of the records of a Folder (or of a list of samples) as a source for a stage.

    Endless; every record as often as any other, in an order of its own in every pass.
    """

    def __init__(self, samples: Any, records: Tensor | None = None):
        self.samples = samples
        self.records = torch.arange(len(samples)) if records is None else records
        self.root = getattr(samples, "root", None)
        self.faults = getattr(samples, "faults", None) or Faults()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> Any:
        return self.samples[record]

    def stream(self, mixture: dict[str, float], seed: int, turns: int = 0) -> Picked:
        """As of any source; the mixture and the turns are what the records are."""
        return Picked(self, Order([self.records], [1.0], [0.0], seed))

    def identity(self) -> str:
        """Digest of the files and of which of their records these are."""
        records = hashlib.sha256(self.records.numpy().tobytes()).hexdigest()
        return f"{self.samples.identity()} {records}"


def train_and_grade(
    start: Path,
    work: Sequence[tuple[Any, Stage]],
    held_out: list[Sample],
    ranks: Ranks = Ranks(),
    max_new: int = 48,
) -> dict[str, float]:
    """The checkpoint, after a stage on each source in turn: accuracy by family, and "overall"."""
    # From the same weights every time
    model, tokenizer = load_model(start, ranks.device)
    encoder = Encoder(tokenizer, model.config)
    setup = Setup(model, encoder, None, ranks)

    # Stage after stage, as any command trains
    for source, stage in work:
        torch.manual_seed(stage.seed)
        setup.model.train()
        setup.source = source
        setup.faults = Faults()
        fit(setup, stage)

    with whole_weights(setup.model, ranks) as whole:
        scores, _ = evaluate(whole, encoder, held_out, max_new=max_new)
    return {family: score.accuracy for family, score in scores.items()}


class TrialBook:
    """Scores of trials by what they depend on, a JSON line each: what is known is not trained again.

    Rank 0 writes, all ranks know.
    """

    def __init__(self, path: Path):
        self.path = path
        self.main = parallel.place()[0] == 0
        lines = [self.whole_lines()] if self.main else []
        (known,) = parallel.gather(lines)
        self.known = {key_of_trial(line["trial"]): line["scores"] for line in known}

    def whole_lines(self) -> list[dict]:
        """What an earlier call wrote; a line that a kill cut short is dropped from the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        with open(self.path, "r+b") as file:
            file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def score(self, trial: dict, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The scores of a trial: remembered, or those of `run()`."""
        key = key_of_trial(trial)
        if key not in self.known:
            self.known[key] = run()
            if self.main:
                line = json.dumps({"trial": trial, "scores": self.known[key]}, default=str)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
        return self.known[key]


def key_of_trial(trial: dict) -> str:
    return json.dumps(trial, sort_keys=True, default=str)


# ----------------------------------------------------------------------------------- what is said


@dataclass
class Standing:
    """What one collection of data reached: a score for each seed, and the families' means.

    In [0, 1], accuracy or what the graders give; "overall" is the mean over families.
    """

    name: str
    records: int
    steps: int
    scores: list[float]
    families: dict[str, float] = field(default_factory=dict)
    verdict: str = ""

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; of one seed nothing is known."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def standings_table(standings: Sequence[Standing]) -> str:
    """Markdown: a line for each."""
    families = list(dict.fromkeys(name for s in standings for name in s.families))
    rows = [["data", "records", "steps", "score", "spread", *families, "verdict"]]
    for s in standings:
        by_family = [f"{s.families[f]:.3f}" if f in s.families else "" for f in families]
        cells = [s.name.replace("|", "/"), f"{s.records:,}", f"{s.steps:,}"]
        cells += [f"{s.mean:.3f}", f"{s.spread:.3f}", *by_family, s.verdict]
        rows.append(cells)
    return "\n".join(markdown(*rows))


def ranks_of(values: Sequence[float]) -> list[float]:
    """The place of each value, from 1 for the smallest; equal ones share the mean of their places."""
    places = defaultdict(list)
    for place, value in enumerate(sorted(values), 1):
        places[value].append(place)
    return [statistics.mean(places[value]) for value in values]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of the places. 0 where all of one side are equal.

    Raises ValueError for fewer than two values, or sides of different lengths.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"rankings of {len(x)} and {len(y)} values cannot be compared")
    places_x = ranks_of(x)
    places_y = ranks_of(y)
    if len(set(places_x)) == 1 or len(set(places_y)) == 1:
        return 0.0
    return statistics.correlation(places_x, places_y)


# ---------------------------------------------------------------------------------------- options


@dataclass(kw_only=True)
class TrialOptions:
    """What every comparison wants to know."""

    held_out: Path  # questions with answers: what is graded
    out: Path  # folder of the table, and of the trials to go on from
    images: Path | None = None  # folder of the pictures of --held-out; default: beside the file
    limit: int = 0  # questions of --held-out; 0: all
    max_new: int = 48  # tokens of an answer
    seeds: int = 1  # trainings of each collection, each in an order of its own
    anneal: Path | None = None  # data to end every training on, at a falling rate
    anneal_steps: int = 0  # and for how long
    # image paths may lead out of the images' folder, also through links
    allow_outside: bool = False
    device: str = ""  # cuda, npu, mps, cpu; default: the accelerator, if there is one
    stage: tyro.conf.OmitArgPrefixes[Stage] = field(
        default_factory=lambda: Stage("trial", steps=200, rows=4, lr=5e-3, schedule="wsd")
    )


@dataclass(kw_only=True)
class MixOptions(TrialOptions):
    """A comparison of the data sets of a mixture, from one checkpoint."""

    mix: Path  # a mixture file: {"datasets": {"name": {"data": ...}, ...}}
    model: Path  # the checkpoint that every training starts from


@dataclass(kw_only=True)
class QuickOptions(MixOptions):
    """Rank the data sets of a mixture by a short training on some of each."""

    amount: int = 0  # records of each; 0: a quarter of the smallest data set
    check: bool = False  # train on the whole of each as well, and compare the rankings


@dataclass(kw_only=True)
class CompositionOptions(MixOptions):
    """Halve one data set of a mixture after another; what is no worse stays halved."""

    # a score that is lower by no more than this is level (chance alone moves it: see --seeds)
    level: float = 0.0


@dataclass(kw_only=True)
class IncrementalOptions(MixOptions):
    """Let one data set of a mixture after another join those of --base; what is no worse stays."""

    base: tuple[str, ...]  # names of the data sets that are there already
    # a score that is lower by no more than this is level (chance alone moves it: see --seeds)
    level: float = 0.0


@dataclass(kw_only=True)
class AnnealingOptions(TrialOptions):
    """Grade checkpoints of a run before and after a short training at a falling rate."""

    models: tuple[Path, ...]  # directories, in the order of the run


# --------------------------------------------------------------------------------------- contests


class Contest:
    """Trainings that can be compared: one stage, one annealing, one held-out set, one book."""

    def __init__(self, options: TrialOptions):
        if options.seeds < 1:
            raise ValueError("--seeds must be positive")
        if bool(options.anneal) != (options.anneal_steps > 0):
            raise ValueError("--anneal DATA and --anneal-steps N belong together")
        refuse_other_stages(options.stage)
        self.options = options
        ranks = parallel.start()
        self.ranks = replace(ranks, device=pick_device(options.device or ranks.device))

        # What is graded; what cannot be is said once
        folder = Folder(options.held_out, options.images, allow_outside=options.allow_outside)
        self.held_out = gradable(folder.first(options.limit), folder.faults)
        if not self.held_out:
            raise ValueError(f"--held-out {options.held_out}: no sample can be graded")
        self.say_faults(folder)

        # What every training ends on
        self.annealing = None
        if options.anneal:
            data = Folder(options.anneal, allow_outside=options.allow_outside)
            self.annealing = Selection(data)
            self.say_faults(data)
        self.graded_on = [folder.identity(), options.limit, options.max_new]
        self.book = TrialBook(options.out / "trials.jsonl")

    def mix(self, path: Path) -> "Mix":
        """The data sets that are compared."""
        mix = Mix(path, self.options.allow_outside)
        self.say_faults(mix.folder)
        return mix

    def standing(self, name: str, model: Path, source: Selection | None, steps: int) -> Standing:
        """What the checkpoint reaches after so many steps on the source (None: after none)."""
        found = []
        for seed in range(self.options.seeds):
            work = self.work(source, steps, seed)
            trial = self.trial(model, work)
            found.append(self.book.score(trial, partial(self.run, model, work)))

        # Families by their means
        families = {}
        for family in found[0]:
            if family != "overall":
                families[family] = statistics.mean(scores[family] for scores in found)
        records = len(source) if source else 0
        overall = [scores["overall"] for scores in found]
        standing = Standing(name, records, steps, overall, families)
        self.say(f"{name}: {standing.mean:.3f} +- {standing.spread:.3f}")
        return standing

    def work(self, source: Selection | None, steps: int, seed: int) -> list[tuple]:
        """The sources and stages of one training."""
        stage = self.options.stage
        stage = replace(stage, steps=steps, seed=stage.seed + 1000 * seed)
        work = [(source, stage)] if source else []
        if self.annealing:
            work.append((self.annealing, annealed(stage, self.options.anneal_steps)))
        return work

    def trial(self, model: Path, work: list[tuple]) -> dict:
        """All that a score depends on."""
        return {
            "model": weights_digest(model),
            "sources": [selected.identity() for selected, _ in work],
            "stages": [asdict(stage) for _, stage in work],
            "graded on": self.graded_on,
            "ranks": self.ranks.size,
        }

    def run(self, model: Path, work: list[tuple]) -> dict[str, float]:
        return train_and_grade(model, work, self.held_out, self.ranks, self.options.max_new)

    def say(self, line: str) -> None:
        if self.ranks.main:
            print(line, flush=True)

    def say_faults(self, folder: Folder) -> None:
        if folder.faults.counts:
            self.say(f"{folder.path}:\n{folder.faults.report()}")

    def finish(self, name: str, standings: Sequence[Standing], verdict: str, **more: Any) -> None:
        """The table on the screen and as a file, and all numbers as JSON."""
        table = standings_table(standings)
        self.say(f"\n{table}\n\n{verdict}")
        if self.ranks.main:
            out = self.options.out
            (out / f"{name}.md").write_text(f"{table}\n\n{verdict}\n", encoding="utf-8")
            rows = [asdict(standing) for standing in standings]
            write_json(out / f"{name}.json", {"standings": rows, "verdict": verdict, **more})
        parallel.stop()


def annealed(stage: Stage, steps: int) -> Stage:
    """The stage as a short end of a training: no warm-up, and from its rate down to a tenth."""
    return replace(stage, steps=steps, schedule="cosine", warmup=0.0, adalrs=False)


def refuse_other_stages(stage: Stage) -> None:
    """Raises ValueError for a stage that no trial can be, and for options that none would read."""
    refuse_impossible(stage)
    if stage.objective != "supervised" or stage.samples not in ("answers", "chains"):
        raise ValueError(
            f"--objective {stage.objective} --samples {stage.samples}: a trial is supervised, on "
            "answers or chains"
        )
    for name in ("mixture", "epochs", "turns"):
        if getattr(stage, name):
            raise ValueError(f"--{name}: a trial reads all its records alike, for --steps")


class Mix:
    """The data sets of a mixture file by name, and collections of them."""

    def __init__(self, path: Path, allow_outside: bool):
        entries = entries_of(path) if path.is_file() else None
        if entries is None:
            raise ValueError(f'--mix {path}: no mixture file ({{"datasets": {{...}}}})')
        self.path = path
        self.folder = Folder(path, allow_outside=allow_outside)
        parts = defaultdict(list)
        for (number, _), records in self.folder.groups.items():
            parts[number].append(records)

        # Those of which nothing can be read were counted as faults
        self.records: dict[str, Tensor] = {}
        for number, name in enumerate(entries):
            if parts[number]:
                self.records[name] = torch.cat(parts[number]).sort().values

    def known(self, names: Sequence[str]) -> None:
        """Raises ValueError for a name that is no data set of this mixture."""
        for name in names:
            if name not in self.records:
                choices = ", ".join(self.records)
                raise ValueError(f"{self.path} has no data set {name!r}; choose from {choices}")

    def collection(self, amounts: dict[str, int]) -> Selection:
        """So many records of each, evenly spaced, as one source."""
        parts = [evenly(self.records[name], amount) for name, amount in amounts.items()]
        return Selection(self.folder, torch.cat(parts))

    def sizes(self) -> dict[str, int]:
        return {name: len(records) for name, records in self.records.items()}


def evenly(records: Tensor, amount: int) -> Tensor:
    """`amount` of the records, evenly spaced; all if there are no more."""
    amount = min(amount, len(records))
    return records[torch.arange(amount) * len(records) // max(1, amount)]


# --------------------------------------------------------------------------------------- commands


def quick_evaluation(options: QuickOptions) -> None:
    """Raises ValueError for a mixture with fewer than two data sets."""
    contest = Contest(options)
    mix = contest.mix(options.mix)
    sizes = mix.sizes()
    if len(sizes) < 2:
        raise ValueError(f"--mix {options.mix}: a ranking needs two data sets that can be read")

    # Equally many records, equally many steps
    if options.amount < 0:
        raise ValueError("--amount must not be negative; 0 is a quarter of the smallest data set")
    amount = options.amount or max(1, min(sizes.values()) // 4)
    steps = options.stage.steps
    short = []
    for name in sizes:
        source = mix.collection({name: amount})
        short.append(contest.standing(name, options.model, source, steps))
    best = max(short, key=lambda standing: standing.mean)
    verdict = f"best in quick evaluation: {best.name}"
    if not options.check:
        contest.finish("quick", short, verdict)
        return

    # The whole of each, with as many passes
    whole = []
    for name, size in sizes.items():
        passes = size / len(mix.collection({name: amount}))
        source = mix.collection({name: size})
        label = f"{name}, whole"
        whole.append(contest.standing(label, options.model, source, round(steps * passes)))
    correlation = rank_correlation([s.mean for s in short], [s.mean for s in whole])
    verdict += f"; rank correlation with the whole: {correlation:.2f}"
    contest.finish("quick", [*short, *whole], verdict, rank_correlation=correlation)


def composition_evaluation(options: CompositionOptions) -> None:
    contest = Contest(options)
    mix = contest.mix(options.mix)

    # As it is
    amounts = mix.sizes()
    steps = options.stage.steps
    first = contest.standing("all", options.model, mix.collection(amounts), steps)
    best = first.mean
    standings = [first]

    # One after another halved; less data that does the same is kept as well
    for name in mix.sizes():
        tried = amounts | {name: max(1, amounts[name] // 2)}
        standing = contest.standing(f"{name} halved", options.model, mix.collection(tried), steps)
        standing.verdict = "whole again"
        if standing.mean >= best - options.level:
            standing.verdict = "stays halved"
            amounts = tried
            best = max(best, standing.mean)
        standings.append(standing)

    halved = [name for name, size in mix.sizes().items() if amounts[name] < size]
    verdict = f"halved: {', '.join(halved) or 'nothing'}; {first.mean:.3f} -> {best:.3f}"
    contest.finish("composition", standings, verdict, records=amounts)


def incremental_evaluation(options: IncrementalOptions) -> None:
    """Raises ValueError for a base that is not in the mixture, or none."""
    contest = Contest(options)
    mix = contest.mix(options.mix)
    mix.known(options.base)
    if not options.base:
        raise ValueError("--base: name the data sets that the others are to join")

    # What is there already
    sizes = mix.sizes()
    amounts = {name: sizes[name] for name in options.base}
    steps = options.stage.steps
    first = contest.standing(" + ".join(amounts), options.model, mix.collection(amounts), steps)
    best = first.mean
    standings = [first]

    # Who comes: level is enough, as it makes the collection larger
    for name in [name for name in sizes if name not in options.base]:
        tried = amounts | {name: sizes[name]}
        standing = contest.standing(f"+ {name}", options.model, mix.collection(tried), steps)
        standing.verdict = "stays out"
        if standing.mean >= best - options.level:
            standing.verdict = "joins"
            amounts = tried
            best = max(best, standing.mean)
        standings.append(standing)

    verdict = f"collection: {', '.join(amounts)}; {first.mean:.3f} -> {best:.3f}"
    contest.finish("incremental", standings, verdict, records=amounts)


def annealed_evaluation(options: AnnealingOptions) -> None:
    """Raises ValueError without models, or without data to anneal on."""
    if not options.models or not options.anneal:
        raise ValueError("name --models and the data to --anneal on, with --anneal-steps")
    contest = Contest(options)
    annealing = contest.annealing

    standings = []
    for model in options.models:
        # As it was stopped
        contest.annealing = None
        standings.append(contest.standing(f"{model.name}, as it is", model, None, 0))

        # And with its rate let down
        contest.annealing = annealing
        standings.append(
            contest.standing(f"{model.name}, annealed", model, None, options.anneal_steps)
        )
    best = max(standings[1::2], key=lambda standing: standing.mean)
    contest.finish("annealing", standings, f"best when annealed: {best.name}")


def evaluate_data(
    options: Annotated[QuickOptions, subcommand("quick")]
    | Annotated[CompositionOptions, subcommand("composition")]
    | Annotated[IncrementalOptions, subcommand("incremental")]
    | Annotated[AnnealingOptions, subcommand("annealing")],
) -> None:
    """One of the four commands."""
    if isinstance(options, QuickOptions):
        quick_evaluation(options)
    elif isinstance(options, CompositionOptions):
        composition_evaluation(options)
    elif isinstance(options, IncrementalOptions):
        incremental_evaluation(options)
    else:
        annealed_evaluation(options)


if __name__ == "__main__":
    command(evaluate_data)
