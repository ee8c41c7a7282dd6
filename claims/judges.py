"""Can a small model be taught to find bad captions? Table 2 on the drawn world, over seeds.

What it teaches: what the paper's judges are and how they are measured, in ten minutes a seed. Captions
spoiled in six known ways are scored by rule, resampled uniformly over the scores, and taught to the toy
in one go: two dimensions, a Score Judge and a Yes-or-No Judge each, four judges in one set of weights
(the paper: one model each).

    noise, rate .85 --uniform, as questions--> sft --> judge --+--> held-out scenes, uniform: Table 2
    the start, asked the same: zero-shot ----------------------+--> held-out scenes, rate .18: as found

    python -m claims.judges --model runs/toy/final --out runs/curation/judges

A judge of alignment says before it answers what it sees, and then the caption again with a `no` where that
is false: <think>northwest red circle; northwest green no circle</think>2. A model of four layers that shall
answer at once, or after saying what it sees, learned nothing of a wrong color in 500 steps (LOG.md).
Finished seeds stand in seed-N/numbers.json and are not run again.

Legend: the positive class is the captions to be dropped (curation/judges.py says why); mean over seeds,
and the smallest.
"""

import json
import statistics
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import sft
from curation.annotators import AnnotatorOptions
from curation.judges import (
    DIMENSIONS,
    QUESTIONS,
    MeasureOptions,
    Tally,
    UniformOptions,
    measure_judges,
    uniform_captions,
)
from curation.noise import NoiseOptions, write_noisy
from curation.pipeline import write_lines
from curation.requests import PROMPTS
from data.encode import Encoder
from data.readers import Folder
from generate import load_model
from infra.cli import command
from recipe import Setup, fit

TOY_PROMPTS = PROMPTS / "toy"
# Wrong attributes are the hardest to see, omissions alone have the middle scores: more of both.
TRAINED_ON = ("attribute",) * 3 + ("object",) + ("omission",) * 4 + ("gibberish", "short")
TRAINED_ON += ("mismatch",) * 2
MIXTURE = {"ita": 2.0, "ita_yesno": 1.5, "vir": 0.7, "vir_yesno": 0.7}
# What a judge says before it answers: facts of noisy rows.
SAID_FIRST = {"ita": "chain", "vir": "words"}
LONGEST = 96  # tokens of a reply, with what is said first


@dataclass
class JudgesClaimOptions:
    """Train judges on the toy over seeds, and measure them beside the model that they started from."""

    model: Path = Path("runs/toy/final")  # where every judge starts: it knows how to think
    out: Path = Path("runs/curation/judges")
    seeds: int = 3
    steps: int = 800
    pool: int = 16_000  # captions that are resampled for training
    tested: int = 1000  # captions of each test set


# ---------------------------------------------------------------------------------------- data


def write_tests(options: JudgesClaimOptions) -> dict[str, Path]:
    """Held-out scenes: uniform over the scores of either dimension, and as found (rate .18)."""
    folder = options.out / "test"
    pool = folder / "pool.jsonl"
    paths = {"as found": folder / "found.jsonl"}
    if not pool.exists():
        noise = NoiseOptions(pool, 8 * options.tested, 0.8, held_out=True, seed=1)
        write_noisy(replace(noise, kinds=(*noise.kinds, "omission", "omission")))
        write_noisy(NoiseOptions(paths["as found"], options.tested, held_out=True, seed=2))
    for dimension in DIMENSIONS:
        paths[dimension] = folder / f"{dimension}.jsonl"
        if not paths[dimension].exists():
            uniform_captions(
                UniformOptions(pool, paths[dimension], dimension=dimension, size=options.tested)
            )
    return paths


def write_lessons(options: JudgesClaimOptions, folder: Path, seed: int) -> Path:
    """Training rows of one seed, uniform over scores, for all four questions; a mixture file of them."""
    pool = folder / "pool.jsonl"
    write_noisy(NoiseOptions(pool, options.pool, 0.85, TRAINED_ON, seed=100 + seed))
    mixture = {}
    for question in QUESTIONS:
        dimension, _, verdict = question.partition("_")
        lesson = UniformOptions(
            pool,
            folder / "lessons" / f"{question}.jsonl",
            dimension=dimension,
            train=verdict or "score",
            prompts=TOY_PROMPTS,
            chain=SAID_FIRST[dimension],
            seed=seed,
        )
        with redirect_stdout(StringIO()):
            uniform_captions(lesson)
        mixture[question] = {"data": lesson.out.name}
    path = folder / "lessons" / "mixture.json"
    write_lines(path, [json.dumps({"datasets": mixture}, indent=1)])
    return path


# ------------------------------------------------------------------------------------ one seed


def teach(options: JudgesClaimOptions, data: Path, seed: int, out: Path) -> float:
    """Train all four judges into one directory of weights; returns the last loss."""
    model, tokenizer = load_model(options.model)
    encoder = Encoder(tokenizer, model.config, None)
    stage = replace(
        sft.TOY["sft1"],
        name="judges",
        mixture=MIXTURE,
        steps=options.steps,
        lr=3e-3,
        seed=seed,
    )
    run = fit(Setup(model, encoder, Folder(data)), stage)
    model.save_pretrained(out)
    tokenizer.save(out)
    return run.tail()


def examine(judge: Path, tests: dict[str, Path], tested: int, out: Path) -> dict:
    """What a model says of `tested` captions a question, and of half as many as found.

    test -> question -> kind of noise -> counts.
    """
    numbers = {}
    for name, path in tests.items():
        for question in QUESTIONS:
            if name in DIMENSIONS and not question.startswith(name):
                continue
            told = out / f"{path.stem}-{question}.jsonl"
            asked = AnnotatorOptions(judge, prompts=TOY_PROMPTS, max_new=LONGEST, batch=128)
            limit = tested if name in DIMENSIONS else tested // 2
            exam = MeasureOptions(path, told, limit=limit, annotator=asked, ask=(question,))
            exam.chunk = asked.batch
            with redirect_stdout(StringIO()):
                measure_judges(exam)
            table = json.loads(told.with_suffix(".table.json").read_text())
            numbers.setdefault(name, {}).update(table)
    return numbers


def numbers_of(options: JudgesClaimOptions, tests: dict[str, Path], seed: int | None) -> dict:
    """A seed's numbers, or those of the start (None); made once."""
    folder = options.out / ("start" if seed is None else f"seed-{seed}")
    path = folder / "numbers.json"
    if not path.exists():
        judge = options.model
        if seed is not None:
            judge = folder / "judge"
            if not (judge / "config.json").exists():
                teach(options, write_lessons(options, folder, seed), seed, judge)
        numbers = examine(judge, tests, options.tested, folder / "said")
        write_lines(path, [json.dumps(numbers, indent=1)])
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------- the table


def over_seeds(values: list[float]) -> str:
    """Mean, and the worst seed."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f})"


def judge_table(start: dict, seeds: list[dict], test: str) -> str:
    """Table 2's form: precision and recall of what is dropped, beside those of the start, zero-shot."""
    lines = [
        "| judge | precision | recall | of the kept: precision | recall | zero-shot precision | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for question in QUESTIONS:
        tested = test or question.partition("_")[0]
        tallies = [Tally(**numbers[tested][question]["all"]) for numbers in seeds]
        cells = []
        for i in range(2):
            cells.append(over_seeds([tally.dropping[i] for tally in tallies]))
        for i in range(2):
            cells.append(over_seeds([tally.keeping[i] for tally in tallies]))
        cells += [f"{value:.3f}" for value in Tally(**start[tested][question]["all"]).dropping]
        lines.append(f"| {question} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kind_table(seeds: list[dict]) -> str:
    """By kind of noise: of captions to be dropped how many were, of those to be kept how many were lost."""
    kinds = sorted({kind for kind in seeds[0]["ita"]["ita"]} - {"all"})
    lines = [f"| judge | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for question in QUESTIONS:
        dimension = question.partition("_")[0]
        cells = []
        for kind in kinds:
            of_seeds = [Tally(**n[dimension][question].get(kind, {})) for n in seeds]
            cells.append(right_of(of_seeds))
        lines.append(f"| {question} | {' | '.join(cells)} |")
    return "\n".join(lines)


def right_of(tallies: list[Tally]) -> str:
    """Shares of all seeds together: found of those to be dropped, kept of those to be kept."""
    cells = []
    for name, right, wrong in (("dropped", "found", "missed"), ("kept", "kept", "lost")):
        good = sum(getattr(tally, right) for tally in tallies)
        total = good + sum(getattr(tally, wrong) for tally in tallies)
        if total:
            cells.append(f"{name} {good / total:.1%} of {total:,}")
    return ", ".join(cells)


def claim_judges(options: JudgesClaimOptions) -> None:
    tests = write_tests(options)
    start = numbers_of(options, tests, None)
    seeds = [numbers_of(options, tests, seed) for seed in range(options.seeds)]
    parts = [
        "Held-out captions, uniform over scores:\n",
        judge_table(start, seeds, ""),
        "\nHeld-out captions as found, 18 % spoiled:\n",
        judge_table(start, seeds, "as found"),
        "\nBy kind of noise, uniform test sets:\n",
        kind_table(seeds),
    ]
    text = "\n".join(parts)
    write_lines(options.out / "table.md", [text])
    print(text)


if __name__ == "__main__":
    command(claim_judges)
