"""Ranks: unlike each other, stopped, killed, without a launcher, or with numbers that are not finite.

What it teaches: several processes fail in more ways than one. Ranks that differ train without an error
and come apart unseen, so they must end before the first step, with the rank and the thing that differs;
a rank that does not answer must be named by the others within the timeout; and a NaN that one rank
meets must be a step that all of them skip.
"""

import math
import shutil
import signal
import time
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file

import objective
import rollout
from tests.campaign import life, small
from tests.campaign.ledger import FOLDER, Ledger, Row, row_of
from tests.campaign.life import Forked, Life

JOB = small.TWO
SHORT = ("--timeout", "6")
WITHIN = 60.0  # seconds in which ranks must have ended


def pair(place: Path, words: list[list[str]], befores: tuple = (None, None)) -> Life:
    """Two ranks, each with a command of its own."""
    store = life.rendezvous()
    said = place / "said"
    places = [life.rank_environment(rank, 2, store) for rank in range(2)]
    processes = [Forked(words[r], said, places[r], before=befores[r]) for r in range(2)]
    run = Life(processes, said, store)
    run.start = 0
    return run


def command(place: Path, *more: str, job: small.Job = JOB) -> list[str]:
    return [*job.words, *SHORT, "--out", str(place / "run"), *more]


# ------------------------------------------------------------------------------------ ranks that differ


def other_model(place: Path) -> Path:
    small.write_model(place / "other", seed=1)
    return place / "other"


def other_data(place: Path) -> Path:
    """The same number of records, one of them another."""
    shutil.copytree(small.HOME / "data", place / "data")
    file = place / "data" / "samples.jsonl"
    file.write_text(file.read_text().replace("color 3?", "color 8?"))
    return file


DIFFERENCES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "a rate": ("options", lambda place: ["--lr", "1e-3"]),
    "a number of steps": ("options", lambda place: ["--steps", "9"]),
    "what trains": ("options", lambda place: ["--trains", "llm"]),
    "a seed": ("options", lambda place: ["--seed", "5"]),
    "when checkpoints are written": ("options", lambda place: ["--save-every", "7"]),
    "the length of rows": ("options", lambda place: ["--length", "256"]),
    "a model's weights": ("weights|options", lambda place: ["--model", str(other_model(place))]),
    "the content of the data": ("data|options", lambda place: ["--data", str(other_data(place))]),
}


def differing(place: Path, item: str, more: list[str]) -> str:
    """Rank 1 is started with something else: both must say what, before the first step."""
    ended = pair(place, [command(place), command(place, *more)]).end()
    named = [f"rank 1 has other {one}" for one in item.split("|")]
    if None in ended.statuses:
        return "hung"
    if ended.statuses != [1, 1]:
        return f"ended with {ended.statuses}"
    if "\nTraceback" in ended.said or not any(name in ended.said for name in named):
        return "without the reason"
    log = place / "run" / "log.jsonl"
    return "trained" if log.is_file() and log.read_text() else "both name it"


# ------------------------------------------------------------------------------- ranks that do not answer


def after_steps(run: Life, place: Path, steps: int) -> None:
    log = place / "run" / "log.jsonl"
    life.wait_until(run, lambda: life.lines_in(log) >= steps)


def hit(place: Path, which: int, number: int, steps: int) -> str:
    """A signal to one rank after some steps; the other must end, with its name."""
    run = pair(place, [command(place), command(place)])
    after_steps(run, place, steps)
    run.kill(which, number)
    began = time.monotonic()
    other = run.processes[1 - which]
    while not other.poll() and time.monotonic() - began < WITHIN:
        time.sleep(0.02)
    ended_itself = other.poll()
    if number == signal.SIGSTOP:
        run.kill(which, signal.SIGCONT)
    ended = run.end(longest=time.monotonic() - run.began + WITHIN)
    if not ended_itself or None in ended.statuses:
        return "hung"
    if f"rank {which} did not take part" not in ended.said:
        return "not named" if other.status == 1 else f"ended with {ended.statuses}"
    return "named by the other"


def alone(place: Path) -> str:
    """Rank 1 never comes."""
    store = life.rendezvous()
    said = place / "said"
    process = Forked(command(place), said, life.rank_environment(0, 2, store))
    ended = Life([process], said, store).end(longest=WITHIN)
    if ended.status is None:
        return "hung"
    return (
        "says so"
        if ended.status == 1 and "not all 2 ranks met" in ended.said
        else f"ended with {ended.status}"
    )


def fails_alone(place: Path) -> str:
    """Rank 1 cannot read its data: both end, and its own reason is there."""
    ended = pair(place, [command(place), command(place, "--data", str(place / "gone.jsonl"))]).end()
    if None in ended.statuses:
        return "hung"
    reason = "gone.jsonl: no such file" in ended.said and "\nTraceback" not in ended.said
    return (
        "both end with its reason"
        if 0 not in ended.statuses and reason
        else f"ended with {ended.statuses}"
    )


def orphaned(place: Path) -> str:
    """torchrun is killed: its ranks must end within a minute, with a checkpoint."""
    run = life.begin_real(command(place, "--steps", "100000"), place / "said", 2)
    after_steps(run, place, 6)
    workers = life.descendants(run.processes[0].pid)
    life.send(run.processes[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + WITHIN
    while time.monotonic() < deadline and workers & life.processes().keys():
        time.sleep(0.1)
    left = workers & life.processes().keys()
    for pid in left:
        life.send(pid, signal.SIGKILL)
    run.end()
    if left:
        return "left processes behind"
    saved = list((place / "run" / "checkpoints").glob("step-*"))
    return "all ended, saved" if saved and len(workers) >= 2 else "nothing saved"


# ------------------------------------------------------------------------------------- one rank's numbers


def wrapped(change: Callable, bad_steps: tuple[int, ...]) -> Callable[[], None]:
    """Before the script: an entry of OBJECTIVES that spoils some steps of this rank."""

    def before() -> None:
        real = objective.OBJECTIVES["supervised"]
        seen = [0]

        def spoiled(model, batch, stage):
            seen[0] += 1
            loss, statistics = real(model, batch, stage)
            if seen[0] in bad_steps:
                return change(model, loss, statistics)
            return loss, statistics

        objective.OBJECTIVES["supervised"] = spoiled

    return before


def bad_loss(value: float) -> Callable:
    def change(model, loss, statistics):
        return loss * value, statistics | {"loss": value}

    return change


def bad_gradient(value: float) -> Callable:
    """The loss is finite; what flows back is not."""

    def change(model, loss, statistics):
        loss.register_hook(lambda gradient: gradient * value)
        return loss, statistics

    return change


def bad_rewards(values: tuple[float, ...]) -> Callable[[], None]:
    """Before the script: some rewards of this rank are no numbers."""

    def before() -> None:
        real = rollout.earned

        def spoiled(reward, completions):
            earned = real(reward, completions)
            for n, value in enumerate(values):
                earned[n] = dict.fromkeys(earned[n], value)
            return earned

        rollout.earned = spoiled

    return before


NAN, INF = float("nan"), float("inf")
SPOILED = {
    "a loss of NaN": bad_loss(NAN),
    "a loss of infinity": bad_loss(INF),
    "a loss of minus infinity": bad_loss(-INF),
    "a gradient of NaN": bad_gradient(NAN),
    "a gradient of infinity": bad_gradient(INF),
}


def spoiled_steps(place: Path, change: Callable, bad: tuple[int, ...], which: int) -> str:
    """Some steps of one rank are not finite: all skip them, and the weights stay finite."""
    befores = [None, None]
    befores[which] = wrapped(change, bad)
    ended = pair(place, [command(place), command(place)], tuple(befores)).end()
    if None in ended.statuses:
        return "hung"
    in_a_row = len(bad) >= 5
    if in_a_row:
        told = ended.statuses == [1, 1] and "steps in a row with a non-finite" in ended.said
        return "stopped by name" if told else f"ended with {ended.statuses}"
    if ended.statuses != [0, 0]:
        return f"ended with {ended.statuses}"
    log = life.outcome(place / "run")["log"]
    skipped = [row["skipped"] for row in log].count(True)
    return finite_weights(place) or (
        "skipped by all" if skipped == len(bad) else f"{skipped} skipped"
    )


def spoiled_rewards(place: Path, values: tuple[float, ...], which: int) -> str:
    befores = [None, None]
    befores[which] = bad_rewards(values)
    words = command(place, job=small.TWO_RL)
    ended = pair(place, [words, words], tuple(befores)).end()
    if None in ended.statuses:
        return "hung"
    if ended.statuses != [0, 0]:
        return f"ended with {ended.statuses}"
    log = life.outcome(place / "run")["log"]
    skipped = [row["skipped"] for row in log].count(True)
    losses = all(row["loss"] is not None and math.isfinite(row["loss"]) for row in log)
    return finite_weights(place) or (
        "no step lost" if losses and not skipped else f"{skipped} skipped"
    )


def finite_weights(place: Path) -> str:
    weights = load_file(place / "run" / "model.safetensors")
    return (
        "" if all(bool(torch.isfinite(t).all()) for t in weights.values()) else "weights not finite"
    )


# --------------------------------------------------------------------------------------------- cases


def cases() -> dict[str, tuple[Callable[[Path], str], str]]:
    """Case -> (work, what must be seen)."""
    found: dict[str, tuple[Callable[[Path], str], str]] = {}
    for name, (item, more) in DIFFERENCES.items():
        found[f"rank 1 differs in {name}"] = (
            lambda place, item=item, more=more: differing(place, item, more(place)),
            "both name it",
        )
    for which in (0, 1):
        for word, number in (("stopped", signal.SIGSTOP), ("killed", signal.SIGKILL)):
            for steps in (0, 5, 17):
                found[f"rank {which} {word} after {steps} steps"] = (
                    lambda place, w=which, n=number, s=steps: hit(place, w, n, max(s, 1)),
                    "named by the other",
                )
    found["rank 1 never comes"] = (alone, "says so")
    found["rank 1 fails alone"] = (fails_alone, "both end with its reason")
    found["torchrun is killed"] = (orphaned, "all ended, saved")
    for name, change in SPOILED.items():
        for which in (0, 1):
            found[f"{name} on rank {which}"] = (
                lambda place, c=change, w=which: spoiled_steps(place, c, (3, 4, 9), w),
                "skipped by all",
            )
        found[f"{name} on rank 1, five steps in a row"] = (
            lambda place, c=change: spoiled_steps(place, c, (4, 5, 6, 7, 8), 1),
            "stopped by name",
        )
    for value in (NAN, INF, -INF):
        found[f"rewards of {value} on rank 1"] = (
            lambda place, v=value: spoiled_rewards(place, (v, v), 1),
            "no step lost",
        )
    return found


def run(count: int = 10**9) -> None:
    """All cases that the ledger does not have yet."""
    small.prepare()
    ledger = Ledger("ranks")
    for name, (work, _) in list(cases().items())[:count]:
        if name in ledger.done:
            continue
        place = life.fresh(FOLDER / "work" / "ranks")
        seen = work(place)
        said = (place / "said").read_text(errors="replace")
        row = ledger.add(name, seen=seen, said=said[-2500:])
        print(row["case"], row["seen"], sep="  ", flush=True)


def rows() -> list[Row]:
    """A line for each kind of fault."""
    ledger = Ledger("ranks")
    kinds = {
        "ranks that differ": "rank 1 differs",
        "a stopped rank (SIGSTOP)": "stopped",
        "a killed rank": "killed after",
        "a rank that never comes": "never comes",
        "a rank that fails alone": "fails alone",
        "a killed launcher": "torchrun",
        "a loss or gradient that is not finite, on one rank": "of ",
        "the same, five steps in a row": "in a row",
        "rewards that are not finite, on one rank": "rewards",
    }
    expected = cases()
    table = []
    for kind, part in kinds.items():
        names = [name for name in expected if part in name]
        if part == "of ":
            names = [n for n in names if " on rank" in n and "row" not in n and "rewards" not in n]
        found = [ledger.done[name] for name in names if name in ledger.done]
        if found:
            good = {expected[name][1] for name in names}
            table.append(row_of(kind, found, ", ".join(sorted(good)), good))
    return table
