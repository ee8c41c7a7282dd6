"""The bench of AdaLRS: its problems, its arithmetic, and what it says without its packages."""

import importlib.util
import math

import pytest
import torch

from claims import rates
from claims.rate_problems import PROBLEMS, Regression
from claims.rates import FLOOR, RatesOptions, Results, measure_rates, train_problem

TABLES = [name for name in PROBLEMS if name.startswith(("digits", "tumours", "diabetes"))]
CHEAP = [name for name in PROBLEMS if name not in ("language", "connector", *TABLES)]


class Short(Regression):
    steps = 30


@pytest.mark.parametrize("name", CHEAP)
def test_a_step_has_the_same_data_in_every_run_and_fresh_ones_when_made_again(name):
    one = PROBLEMS[name](seed=1)
    two = PROBLEMS[name](seed=1)
    losses = []
    for problem, steps in ((one, (0, 7, 7)), (two, (7, 0))):
        for step in steps:
            problem.begin_step(step)
            losses.append(float(problem.loss().detach()))
    first, again, other = losses[1], losses[2], losses[3]
    assert first == other or math.isnan(first)
    assert again != first
    assert math.isfinite(one.final()) and one.final() == two.final()


def test_what_keeps_nothing_ends_where_the_fixed_rate_does():
    fixed = train_problem(Short, 0, 1e-2)
    searched = train_problem(Short, 0, 1e-2, "safe")
    assert searched["scale"] == 1.0
    assert searched["final"] == fixed["final"]


def test_ratios_have_a_floor_and_runs_are_not_repeated(tmp_path):
    results = Results(tmp_path / "runs.jsonl")

    def run(final: float):
        return lambda: {"start": 2.0, "final": final, "steps": 1.0, "scale": 3.0, "decisions": []}

    for place, final in ((-2.0, 1.0), (-1.0, 1e-9)):
        results.get("quadratic", "grid", place, 0, run(final))
    results.get("quadratic", "safe", -1.0, 0, run(1e-8))
    again = Results(tmp_path / "runs.jsonl")
    again.get("quadratic", "safe", -1.0, 0, lambda: pytest.fail("it was measured before"))
    assert again.best("quadratic") == -1.0
    assert again.ratios("quadratic", "safe", -1.0) == [1.0]  # both are called zero
    assert again.ratios("quadratic", "fixed", -1.0) == [1.0 / (FLOOR * 2.0)]
    assert "| safe | known | 1 | 0 |" in rates.summary_table(again)
    assert "| quadratic | safe | 1.000 (1.000) |" in rates.table(again)
    assert (
        rates.ratio(math.nan, 1.0, 0.1) == math.inf and rates.ratio(math.nan, math.inf, 0.1) == 1.0
    )


def test_known_and_fresh_problems_are_summed_apart(tmp_path):
    """Thresholds were chosen on the known ones: only the others say what the promise is worth."""
    results = Results(tmp_path / "runs.jsonl")
    for name, final in (("quadratic", 1.0), ("crosswise", 1.2)):
        for rule, loss in (("grid", 1.0), ("safe", final)):
            row = {"start": 2.0, "final": loss, "steps": 1.0, "scale": 1.0, "decisions": []}
            results.get(name, rule, 0.0, 7, row.copy)
    known, fresh = rates.summary_table(results).splitlines()[2:4]
    assert known.startswith("| safe | known | 1 | 0 | 1 | 0 |")
    assert fresh.startswith("| safe | fresh | 1 | 1 | 1.2 | 0 |")
    assert "paper" not in rates.table(results)


def test_an_exception_is_a_result(tmp_path):
    def broken():
        raise ValueError("no")

    row = Results(tmp_path / "runs.jsonl").get("quadratic", "safe", 0, 0, broken)
    assert row["final"] == math.inf and "no" in row["raised"]


def test_without_its_packages_the_script_names_the_requirements_file(tmp_path, monkeypatch):
    """C20: No module named 'schedulefree'."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"schedulefree.*requirements/bench\.txt"):
        measure_rates(RatesOptions(out=tmp_path))


def losses_around(name: str, steps: int) -> tuple[float, float]:
    """Final losses of a problem before and after so many steps, at a rate of .01."""
    problem = PROBLEMS[name](seed=0)
    before = problem.final()
    optimizers = rates.optimizers_for(problem, 1e-2)
    for step in range(steps):
        problem.begin_step(step)
        rates.trial_step(problem, optimizers, 1e-2)
    assert all(torch.isfinite(p).all() for p in problem.parameters), name
    return before, rates.final_loss(problem, optimizers)


def test_every_problem_on_scikit_learns_tables_trains():
    pytest.importorskip("sklearn")
    for name in TABLES:
        if name == "digits schedule-free":
            continue
        before, after = losses_around(name, 60)
        assert after < before or name == "digits new task", name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["language", "connector"])
def test_the_repositorys_own_models_train(name):
    """They follow the recipe's code, which changes: the adapter's problem had long not been run."""
    before, after = losses_around(name, 20)
    assert after < before


@pytest.mark.parametrize("options", [{"rules": ("bold",)}, {"problems": ("mind",)}], ids=str)
def test_what_the_bench_does_not_know_is_an_error(tmp_path, monkeypatch, options):
    """An exception in a run is a result: a misspelt rule would have been one in every run."""
    monkeypatch.setattr(rates, "PACKAGES", ())
    with pytest.raises(ValueError, match="bold.*safe, paper|mind.*quadratic"):
        measure_rates(RatesOptions(out=tmp_path, **options))
    assert not list(tmp_path.iterdir())
