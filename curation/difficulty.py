"""Difficulty: which questions can still teach, measured with the model that one has.

What it teaches: much of a recipe is choosing what to train on next. RL learns from questions that
the policy solves sometimes: a group of answers that are all right, or all wrong, has no better and
no worse, so nothing follows from it. Each question is asked several times; its pass rate decides.

    questions -> free_response -> pass rates -> between bounds -----------> verifiable RL
                                       |-> solved, but rarely (hard) -----> mixed RL
                                       `-> chains.py: the right answers --> think-fusion

    python -m curation.difficulty --model runs/long-cot --data questions.jsonl --out kept.jsonl
    python -m curation.difficulty --model runs/rl --data q.jsonl --out kept.jsonl --hard hard.jsonl
    torchrun --nproc-per-node 8 -m curation.difficulty --model ... (any number of ranks)

Interrupted, the same command goes on where it was; with other bounds it asks nothing again (see
curation/asking.py). The files that it writes hold the samples as they were, and what was measured
as facts: `pass_rate`, and `tries`.

Sources: SAIL-VL2 section 4.2.3 (pass@4 with the previous model; it keeps what lies strictly between
0 and 1, so a share of the four must be meant: inferred; questions that need no reasoning only lose
those that are always solved), 4.2.5 (hard, "suboptimal" questions for mixed RL; the bound of one
half is our choice).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from curation.asking import (
    AskOptions,
    Remembered,
    Sampling,
    ask_about_files,
    ask_all,
    open_funnel,
    sample_of,
)
from curation.rows import write_rows
from data.encode import Encoder
from data.sample import BadSample, Sample
from infra.cli import command
from scale import parallel
from vlm import SailVL


def pass_rates(
    model: SailVL, encoder: Encoder, samples: Sequence[Sample], sampling: Sampling = Sampling()
) -> list[float]:
    """The share of right answers to each question, 0 for one that cannot be asked."""
    answers = Remembered()
    ask_all(model, encoder, samples, sampling, answers)
    return [0.0 if r.fault else r.pass_rate for r in answers.records()]


def by_difficulty(samples: list[Sample], rates: list[float], reasoning: set[str]) -> list[Sample]:
    """What can still teach: reasoning questions that are solved sometimes, others unless always.

    reasoning: families. An impossible reasoning question gives groups without a lesson; an
    impossible look-up may only be unfamiliar.
    """
    # A family that wants no reasoning may be unsolved.
    kept = []
    for sample, rate in zip(samples, rates, strict=True):
        may_be_unsolved = label_of(sample) not in reasoning
        if rate < 1 and (rate > 0 or may_be_unsolved):
            kept.append(sample)
    return kept


def hard(samples: list[Sample], rates: list[float], ceiling: float = 0.5) -> list[Sample]:
    """Solved sometimes, but in at most `ceiling` of the tries: hardest first, else in order."""
    chosen = [i for i, rate in enumerate(rates) if 0 < rate <= ceiling]
    chosen.sort(key=lambda i: rates[i])
    return [samples[i] for i in chosen]


def label_of(sample: Sample) -> str:
    """The family of a question, else its task."""
    return sample.facts.get("family", sample.task)


# ---------------------------------------------------------------------------------------- command


@dataclass
class DifficultyOptions(AskOptions):
    """Measure how often a model solves each question, and keep those that can still teach."""

    low: float = 0.0  # kept: pass rates above it ...
    high: float = 1.0  # ... and below this
    keep_unsolved: tuple[str, ...] = ()  # families or tasks that are kept at a pass rate of 0 too
    hard: Path | None = None  # where the hard set is written, hardest first
    hard_ceiling: float = 0.5  # highest pass rate of the hard set


def measure_difficulty(options: DifficultyOptions) -> None:
    if not 0 <= options.low < options.high <= 1:
        raise ValueError(
            f"--low {options.low} --high {options.high}: 0 <= low < high <= 1 is wanted"
        )
    # All ranks ask, one writes.
    records, answers, ranks = ask_about_files(options)
    if ranks.main:
        write_by_difficulty(options, records, answers)
    parallel.stop()


def write_by_difficulty(options: DifficultyOptions, records, answers) -> None:
    """The kept and the hard questions as files, and the funnel."""
    funnel = open_funnel(records)
    rates: Counter[float] = Counter()
    kept: list[tuple[Sample, dict]] = []
    rare: list[tuple[Sample, dict]] = []
    tries = options.sampling.tries

    for record in funnel.asked(answers.records()):
        rate = record.pass_rate
        rates[rate] += 1
        try:
            sample = sample_of(record, records)
        except BadSample as fault:
            funnel.faults.add(fault)
            continue

        # Between the bounds; or not solved, and none of those that must be.
        excused = rate == 0 and label_of(sample) in options.keep_unsolved
        measured = {"pass_rate": rate, "tries": tries}
        if options.low < rate < options.high or excused:
            kept.append((sample, measured))
        if 0 < rate <= options.hard_ceiling:
            rare.append((sample, measured))

    # Both files, each whole or not at all.
    funnel.count("kept", len(kept))
    if kept:
        funnel.count("written", write_rows(options.out, kept, funnel.faults))
    if options.hard and rare:
        rare.sort(key=lambda row: row[1]["pass_rate"])
        funnel.count("hard, written", write_rows(options.hard, rare, funnel.faults))

    # How the questions spread: much at 0 or 1 wants another model, or other questions.
    print(funnel.report())
    print(f"\npass rate of {tries} tries   questions")
    for rate in sorted(rates):
        print(f"{rate:22.3f}   {rates[rate]:9d}")
    if not kept:
        raise ValueError(
            f"{options.out} not written: no pass rate lies between {options.low:g} and "
            f"{options.high:g}; ask more often (--tries), other questions, or another model"
        )
    print(f"wrote {options.out}")
    if options.hard:
        print(f"wrote {options.hard}" if rare else f"{options.hard} not written: nothing is hard")


if __name__ == "__main__":
    command(measure_difficulty)
