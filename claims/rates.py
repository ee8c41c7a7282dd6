"""AdaLRS on trial: many problems, wrong starts, and the other ways of not choosing a learning rate.

What it teaches: a search for the rate is worth what it saves against a grid, so the grid is run too.
Each problem is trained at fixed rates half a decade apart; then from starts ten times below to ten times
above the best of them: fixed, with AdaLRS as published (rule="paper"), and with the rule that means to
do no harm (rule="safe", the default). The four oldest problems are also given to an LR range test,
Prodigy, D-Adaptation and Schedule-Free. Everything has the same schedule (warm-up over 5 %, cosine to a
tenth) but Schedule-Free, which has its own. The problems stand in claims/rate_problems.py.

    grid of fixed rates -> best -> starts .1 .. 10 of it -> fixed | paper | safe -> runs.jsonl -> table.md

    python -m claims.rates                                  # all, an hour on one core; resumes
    python -m claims.rates --problems quadratic regression  # a part
    python -m claims.rates --rules safe --first 5 --out runs/adalrs-fresh  # seeds that no threshold saw
    python -m claims.rates --report                         # only the table and runs/adalrs/report.html

Starts are kept relative to the best rate of the grid: remove runs.jsonl after changing a grid, a problem
or the seeds.

Losses below a thousandth of the one before training count as that thousandth (`FLOOR`): what lies below
is called zero. Every final loss is an expectation, or the mean over a whole set, not the loss of a
batch.

A stream of data is never rewound, so a step that was taken back draws fresh data when it is made again.
But the first time it is made, a step has the same data in every run (common random numbers): a search
that keeps nothing ends exactly where the fixed rate does, and what differs is what the search did.

Needs requirements/bench.txt.
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from adalrs import RULES, AdaLRS
from claims.rate_problems import FRESH, KNOWN, OLD, PROBLEMS, Problem
from infra.cli import command
from infra.system import require_packages
from optim import Muon
from tools import drawing, report

STARTS = tuple(10**e for e in (-1.0, -0.5, 0.0, 0.5, 1.0))
FLOOR = 1e-3  # of the loss before training: what lies below is called zero
SCHEDULE_FREE = (0.1, 1.0, 10.0)  # its starts, as multiples of the best fixed rate
PACKAGES = ("sklearn", "schedulefree", "prodigyopt", "dadaptation")


# --------------------------------------------------------------------------------------- training


def schedule(step: int, steps: int, decays: bool = True) -> float:
    """Share of the peak rate: warm-up over 5 %, then cosine to a tenth (or no decay)."""
    warm = steps // 20
    if step < warm:
        return (step + 1) / warm
    t = (step - warm) / (steps - warm) if decays else 0.0
    return 0.1 + 0.45 * (1 + math.cos(math.pi * t))


def optimizers_for(problem: Problem, rate: float) -> list:
    """As the problem's class names them."""
    parameters = problem.parameters
    kind = problem.optimizer
    if kind == "adamw":
        return [
            torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        ]
    if kind == "sgd":
        return [torch.optim.SGD(parameters, lr=rate)]
    if kind == "momentum":
        return [torch.optim.SGD(parameters, lr=rate, momentum=0.9)]
    if kind == "schedule-free":
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(
            parameters, lr=rate, warmup_steps=problem.steps // 20
        )
        optimizer.train()
        return [optimizer]
    assert kind == "muon", kind
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=rate, weight_decay=0.0), adam]


def trial_step(problem: Problem, optimizers: list, rate: float | None) -> float:
    """Draws a batch; a step whose loss is not finite is skipped. Returns the loss before the step."""
    loss = problem.loss()
    value = float(loss.detach())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if rate is not None:
                group["lr"] = rate
        optimizer.zero_grad()
    if math.isfinite(value):
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return value


def final_loss(problem: Problem, optimizers: list) -> float:
    """Schedule-Free's weights are those of its average; they are asked for by eval()."""
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    return problem.final()


def train_problem(kind: type[Problem], seed: int, rate: float, rule: str = "") -> dict:
    """One run. rule: of AdaLRS, "" for a fixed rate.

    Returns losses before and after training, the steps as a share of the plan, and with AdaLRS its
    decisions.
    """
    problem = kind(seed)
    optimizers = optimizers_for(problem, rate)
    decays = kind.optimizer != "schedule-free"  # which needs no schedule but the warm-up
    row: dict = {"start": problem.final()}
    search = None
    if rule:
        tensors = [*problem.parameters, *problem.buffers]
        search = AdaLRS(tensors, optimizers, kind.steps, rule=rule)

    # The loop that anyone would write
    step = 0
    losses: list[float] = []
    rates: list[float] = []
    while step < kind.steps:
        scale = search.scale if search else 1.0
        rates.append(rate * schedule(step, kind.steps, decays) * scale)
        problem.begin_step(step)
        losses.append(trial_step(problem, optimizers, rates[-1]))
        step = search.observe(losses[-1]) if search else step + 1

    # The result; curves are drawn for the first seed only
    row |= {"final": final_loss(problem, optimizers), "steps": len(losses) / kind.steps}
    if seed == 0:
        row |= {"losses": losses, "lrs": rates}
    if search:
        row |= {"scale": search.scale, "decisions": search.log()}
    return row


# ---------------------------------------------------------------------------------- other methods


def range_test(problem: Problem, low: float = 1e-6, high: float = 10.0, steps: int = 100) -> float:
    """Smith's LR range test: the rate grows exponentially; suggests where the smoothed loss falls fastest
    per decade.

    Stops at four times the best smoothed loss.
    """
    optimizers = optimizers_for(problem, low)
    rates: list[float] = []
    curve: list[float] = []
    mean = 0.0
    for i in range(steps):
        rates.append(low * (high / low) ** (i / (steps - 1)))
        problem.begin_step(i)

        # The smoothed loss, without the bias of its start
        mean = 0.9 * mean + 0.1 * trial_step(problem, optimizers, rates[-1])
        curve.append(mean / (1 - 0.9 ** (i + 1)))
        if not curve[-1] < 4 * min(curve):
            break
    falls = [curve[i + 1] - curve[i] for i in range(5, len(curve) - 1)]
    return rates[5 + falls.index(min(falls))]


def after_range_test(kind: type[Problem], seed: int) -> dict:
    rate = range_test(kind(seed))
    return train_problem(kind, seed, rate) | {"steps": 1 + 100 / kind.steps, "rate": rate}


def train_with(kind: type[Problem], seed: int, make: Callable, rate: Callable) -> dict:
    """A run with an optimizer made by `make(parameters)`; `rate(step)` is None where it sets its own."""
    problem = kind(seed)
    optimizers = [make(problem.parameters)]
    if hasattr(optimizers[0], "train"):
        optimizers[0].train()
    for step in range(kind.steps):
        problem.begin_step(step)
        trial_step(problem, optimizers, rate(step))
    return {"final": final_loss(problem, optimizers), "steps": 1.0}


def without_rate(name: str, kind: type[Problem], seed: int) -> dict:
    """Rate-free methods as their authors recommend them: lr 1 and the cosine schedule."""
    import dadaptation
    import prodigyopt

    def make(parameters: list) -> torch.optim.Optimizer:
        if name == "prodigy":
            return prodigyopt.Prodigy(parameters, lr=1.0, betas=(0.9, 0.95), safeguard_warmup=True)
        return dadaptation.DAdaptAdam(parameters, lr=1.0, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        return schedule(step, kind.steps)

    return train_with(kind, seed, make, rate)


def schedule_free(kind: type[Problem], seed: int, rate: float) -> dict:
    import schedulefree

    def make(parameters: list) -> torch.optim.Optimizer:
        adam = kind.optimizer == "adamw"
        method = schedulefree.AdamWScheduleFree if adam else schedulefree.SGDScheduleFree
        return method(parameters, lr=rate, warmup_steps=kind.steps // 20)

    def own(step: int) -> None:
        return None

    return train_with(kind, seed, make, own)


# -------------------------------------------------------------------------------------- measuring


def ratio(loss: float, other: float, floor: float) -> float:
    """What lies below the floor counts as the floor; two that diverged are equal."""
    if not math.isfinite(loss):
        return math.inf if math.isfinite(other) else 1.0
    return max(loss, floor) / max(other, floor)


class Results:
    """One JSON line per run, so that the measurement can be stopped and goes on where it was."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def get(
        self, problem: str, method: str, place: float, seed: int, run: Callable[[], dict]
    ) -> dict:
        """`place`: log10 of the rate, or of the start over the best rate. An exception is a result, too."""
        key = (problem, method, round(place, 3), seed)
        if key not in self.rows:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Prodigy's, on deprecated torch calls
                try:
                    row = run()
                except (ValueError, RuntimeError, ArithmeticError) as error:
                    row = {"final": math.inf, "steps": 1.0, "raised": repr(error)}
            self.rows[key] = row | {"key": key}
            with open(self.path, "a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]

    def of(self, problem: str, method: str, place: float) -> list[dict]:
        """All seeds that were measured."""
        place = round(place, 3)
        return [row for key, row in self.rows.items() if key[:3] == (problem, method, place)]

    def best(self, problem: str) -> float:
        """log10 of the best fixed rate, by the mean final loss over the seeds (of those all measured)."""
        places = {key[2] for key in self.rows if key[:2] == (problem, "grid")}
        seeds = max(len(self.of(problem, "grid", place)) for place in places)

        def badness(place: float) -> float:
            rows = self.of(problem, "grid", place)
            mean = sum(row["final"] for row in rows) / len(rows)
            return mean if math.isfinite(mean) and len(rows) == seeds else math.inf

        return min(places, key=badness)

    def ratios(
        self, problem: str, method: str, place: float, to: float | None = None
    ) -> list[float]:
        """Final losses over those of a fixed rate with the same seed (to: log10 of it; the best), floor
        below both.
        """
        best = self.best(problem)
        to = best if to is None else to
        if method == "fixed":
            method, place = "grid", best + place
        found = []
        for row in self.of(problem, method, place):
            other = self.rows[problem, "grid", round(to, 3), row["key"][3]]
            found.append(ratio(row["final"], other["final"], FLOOR * other["start"]))
        return found


def measure(results: Results, name: str, seeds: range, rules: tuple[str, ...]) -> None:
    """The grid, then everything that starts relative to its best rate."""
    kind = PROBLEMS[name]
    low, high = kind.grid
    for seed in seeds:
        for i in range(round((high - low) / 0.5) + 1):
            place = low + 0.5 * i
            results.get(name, "grid", place, seed, lambda: train_problem(kind, seed, 10**place))

    best = results.best(name)
    for seed in seeds:
        for start in STARTS:
            off = math.log10(start)
            rate = 10 ** (best + off)
            results.get(name, "grid", best + off, seed, lambda: train_problem(kind, seed, rate))
            for rule in rules:
                results.get(name, rule, off, seed, lambda: train_problem(kind, seed, rate, rule))
    if name in OLD:
        measure_others(results, name, seeds, best)


def measure_others(results: Results, name: str, seeds: range, best: float) -> None:
    kind = PROBLEMS[name]
    for seed in seeds:
        for start in SCHEDULE_FREE:
            rate = start * 10**best
            off = math.log10(start)
            results.get(name, "schedule-free", off, seed, lambda: schedule_free(kind, seed, rate))
        results.get(name, "range test", 0, seed, lambda: after_range_test(kind, seed))
        for method in ("prodigy", "d-adaptation"):
            results.get(name, method, 0, seed, lambda: without_rate(method, kind, seed))


# -------------------------------------------------------------------------------------- reporting


def cell(ratios: list[float]) -> str:
    """Mean (worst); a finite loss a thousand times too large has diverged too."""
    if not ratios:
        return ""
    if max(ratios) > 1000:
        return "diverged"
    return f"{sum(ratios) / len(ratios):.3f} ({max(ratios):.3f})"


def measured(results: Results) -> list[str]:
    return [name for name in PROBLEMS if any(key[:2] == (name, "safe") for key in results.rows)]


def table(results: Results) -> str:
    """Every problem under every rule: final loss over the best fixed rate's with the same seed."""
    starts = [math.log10(start) for start in STARTS]
    labels = " | ".join(f"{start:.2g}" for start in STARTS)
    out = [f"| problem | rule | {labels} | most steps |", "|---|---|" + "---:|" * (len(starts) + 1)]
    for name in measured(results):
        for rule in ("fixed", "paper", "safe"):
            cells = [cell(results.ratios(name, rule, start)) for start in starts]
            rows = [row for start in starts for row in results.of(name, rule, start)]
            if not any(cells):
                continue
            steps = max((row["steps"] for row in rows), default=1.0)
            out.append(f"| {name} | {rule} | " + " | ".join(cells) + f" | {steps:.2f} |")

    rates = ", ".join(f"{name} {10 ** results.best(name):.2g}" for name in measured(results))
    return "\n".join(out) + f"\n\nBest fixed rates: {rates}."


def table_of_others(results: Results) -> str:
    """The methods that choose no rate, on the problems that they were given."""
    names = [name for name in OLD if any(key[:2] == (name, "prodigy") for key in results.rows)]
    out = ["| method | start | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for method in ("range test", "prodigy", "d-adaptation", "schedule-free"):
        for start in SCHEDULE_FREE if method == "schedule-free" else (1.0,):
            cells = [cell(results.ratios(name, method, math.log10(start))) for name in names]
            label = f"{start:g}" if method == "schedule-free" else ""
            out.append(f"| {method} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def summary_table(results: Results) -> str:
    """What the rules promise, over problems, starts and seeds."""
    heads = "rule | problems | runs | above 1.05 of fixed | worst | below .95 | recovered from .1 | steps"
    out = [f"| {heads} | raised |", "|---|---|" + "---:|" * 7]
    for label, group in (("known", KNOWN), ("fresh", FRESH)):
        for rule in ("paper", "safe"):
            names = [name for name in group if any(k[:2] == (name, rule) for k in results.rows)]
            if names:
                out.append(summary_line(results, rule, label, names))
    note = (
        "Recovered: log10 of the final scale, mean over runs from a tenth of the best rate; in brackets, no "
        "run counted as more than 1. Raised: runs that ended with an exception."
    )
    return "\n".join(out) + f"\n\n{note}"


def summary_line(results: Results, rule: str, label: str, names: list[str]) -> str:
    """One rule over these problems."""
    against: list[float] = []  # final losses over the same start's at a fixed rate
    recovered: list[float] = []  # powers of ten
    rows: list[dict] = []
    for name in names:
        for start in STARTS:
            place = math.log10(start)
            rows += results.of(name, rule, place)
            against += results.ratios(name, rule, place, to=results.best(name) + place)
        found = results.of(name, rule, -1.0)
        recovered += [math.log10(row.get("scale", 1.0)) for row in found]

    # Sums and means
    worse = sum(ratio > 1.05 for ratio in against)
    better = sum(ratio < 0.95 for ratio in against)
    share = sum(recovered) / max(len(recovered), 1)
    capped = sum(min(x, 1.0) for x in recovered) / max(len(recovered), 1)
    steps = max((row["steps"] for row in rows), default=1.0)
    raised = sum("raised" in row for row in rows)
    return (
        f"| {rule} | {label} | {len(rows)} | {worse} | {max(against, default=1.0):.3g} | {better} "
        f"| {share:.2f} ({capped:.2f}) | {steps:.3f} | {raised} |"
    )


def shorten(losses: list[float]) -> list[float]:
    """Drawn up to one and a half times the first."""
    top = 1.5 * losses[0]
    return [min(loss, top) if math.isfinite(loss) else top for loss in losses]


def page(results: Results, path: Path) -> None:
    """Loss and rate with every decision, for each problem from each start (seed 0), beside the same start
    held fixed.
    """
    runs: dict[str, dict] = {}
    for (problem, method, place, seed), row in results.rows.items():
        if method not in ("safe", "paper") or seed or "losses" not in row:
            continue
        fixed = results.rows[problem, "grid", round(results.best(problem) + place, 3), 0]
        runs[f"{problem}, {method}, start {10**place:.2g} of the best"] = {
            "losses": shorten(row["losses"]),
            "lrs": row["lrs"],
            "decisions": row["decisions"],
            "compare": shorten(fixed["losses"]) if "losses" in fixed else [],
        }
    body = report.el("h1", "AdaLRS from wrong starts") + report.curves(runs)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">{report.el("title", "AdaLRS")}'
        f"{report.el('style', drawing.CSS)}<body>{body}</body></html>\n",
        encoding="utf-8",
    )


@dataclass
class RatesOptions:
    """Measure AdaLRS against a grid of fixed rates and the other methods."""

    problems: tuple[str, ...] = tuple(PROBLEMS)  # names, see claims/rate_problems.py
    seeds: int = 5  # how many of them,
    first: int = 0  # from this one on
    rules: tuple[str, ...] = RULES  # of AdaLRS
    out: Path = Path("runs/adalrs")
    report: bool = False  # only table and page, of what was measured so far


def measure_rates(options: RatesOptions) -> None:
    """Raises ValueError for unknown problems and rules, and when packages are missing."""
    if not options.report:
        require_packages("-r requirements/bench.txt", *PACKAGES)
    for name in options.problems:
        if name not in PROBLEMS:
            raise ValueError(f"--problems {name!r}: choose from {', '.join(PROBLEMS)}")
    for rule in options.rules:
        if rule not in RULES:
            raise ValueError(f"--rules {rule!r}: choose from {', '.join(RULES)}")

    seeds = range(options.first, options.first + options.seeds)
    results = Results(options.out / "runs.jsonl")
    for name in options.problems if not options.report else ():
        measure(results, name, seeds, options.rules)
    page(results, options.out / "report.html")
    for name, write in (("table", table), ("summary", summary_table), ("others", table_of_others)):
        text = write(results)
        (options.out / f"{name}.md").write_text(text + "\n")
        print(text, end="\n\n")


if __name__ == "__main__":
    command(measure_rates)
