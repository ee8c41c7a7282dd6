"""AdaLRS: slopes and their errors, every verdict by a forced trace, exact roll-backs and resumes, harm that
it must not do.
"""

import copy
import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import adalrs
from adalrs import (
    AdaLRS,
    clip_outliers,
    fit_line,
    gain,
    load_optimizer_state,
    noise,
    optimizer_state,
)
from optim import Muon

K = 5


def line(start: float, slope: float, n: int = K) -> list[float]:
    return [start + slope * i for i in range(n)]


class Training:
    """Two small parameters under Adam and momentum. The gradient of a step depends on the step: it is the
    step's data.
    """

    def __init__(self, rate: float = 1e-2):
        g = torch.Generator().manual_seed(0)
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=g)) for shape in ((4, 3), (5,))
        ]
        self.optimizers = [
            torch.optim.Adam([self.parameters[0]]),
            torch.optim.SGD([self.parameters[1]], momentum=0.9),
        ]
        self.rate = rate

    def step(self, step: int, scale: float) -> None:
        g = torch.Generator().manual_seed(100 + step)
        for p in self.parameters:
            p.grad = 1 + 0.3 * p.detach() + 0.3 * torch.randn(p.shape, generator=g)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.rate * scale
            optimizer.step()

    def state(self):
        moments = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        return copy.deepcopy(([p.data for p in self.parameters], moments))


def tensors_of(state) -> list[torch.Tensor]:
    parameters, optimizers = state
    moments = [v for o in optimizers for one in o.values() for _, v in sorted(one.items())]
    return parameters + [torch.as_tensor(v) for v in moments]


def identical(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def forced(trace, total: int = 100, window=(0.0, 1.0), up=1.5, down=1.5, decay=1.0, k=K, **options):
    """Train under the search while it is shown these losses.

    Returns search, training, the steps that `observe` returned, and the state after each observed loss."""
    training = Training()
    search = AdaLRS(
        training.parameters, training.optimizers, total, k, window, up, down, decay, **options
    )
    step = 0
    returned = []
    states = []
    for loss in trace:
        training.step(step, search.scale)
        step = search.observe(loss)
        returned.append(step)
        states.append(training.state())
    return search, training, returned, states


def never(steps: int, scale=lambda step: 1.0):
    """The state of a run that never tried anything."""
    training = Training()
    for step in range(steps):
        training.step(step, scale(step))
    return training.state()


def actions(search) -> list[str]:
    return [d.action for d in search.decisions]


# -------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("k", [3, 10, 50])
def test_the_fit_of_a_line_is_its_slope_without_error(k):
    velocity, error = fit_line(line(7.0, -0.25, k))
    assert velocity == pytest.approx(0.25, rel=1e-12) and error == pytest.approx(0, abs=1e-12)
    assert fit_line([3.0] * k) == (0.0, 0.0) and fit_line(line(7.0, 0.25, k))[0] < 0


def test_the_fit_is_that_of_least_squares():
    rng = random.Random(0)
    y = torch.tensor([rng.gauss(0, 1) for _ in range(12)], dtype=torch.double)
    x = torch.stack([torch.arange(12).double(), torch.ones(12).double()], 1)
    slope = torch.linalg.lstsq(x, y[:, None]).solution
    residual = (y - (x @ slope)[:, 0]).square().sum() / 10
    error = (residual * torch.linalg.inv(x.T @ x)[0, 0]).sqrt()
    assert fit_line(y.tolist()) == pytest.approx((-slope[0].item(), error.item()))


@pytest.mark.parametrize("k, sigma", [(5, 1.0), (10, 0.3), (20, 2.0)])
def test_the_standard_error_is_the_spread_of_the_slope_over_many_runs(k, sigma):
    rng = random.Random(k)
    fits = [fit_line([5 - 0.1 * i + rng.gauss(0, sigma) for i in range(k)]) for _ in range(3000)]
    slopes = torch.tensor([v for v, _ in fits])
    said = torch.tensor([e for _, e in fits]).square().mean().sqrt().item()
    assert slopes.mean().item() == pytest.approx(0.1, abs=4 * said / 3000**0.5)
    assert said == pytest.approx(slopes.std().item(), rel=0.05)


def test_the_gain_of_a_trial_is_the_slope_from_the_common_start_and_its_error_the_true_spread():
    assert gain(line(10, -0.1), line(10, -0.5)) == pytest.approx((0.4, 0), abs=1e-9)
    rng = random.Random(1)
    k = 12
    runs = [
        gain(*([10 - v * i + rng.gauss(0, 1) for i in range(k)] for v in (0.1, 0.3)))
        for _ in range(3000)
    ]
    slopes = torch.tensor([g for g, _ in runs])
    said = torch.tensor([e for _, e in runs]).square().mean().sqrt().item()
    true = math.sqrt(2 * 6 / (k * (k - 1) * (2 * k - 1)))
    assert slopes.mean().item() == pytest.approx(0.2, abs=0.01)
    assert slopes.std().item() == pytest.approx(true, rel=0.06)
    assert said == pytest.approx(true, rel=0.06)


def walk(rng: random.Random, n: int, memory: float) -> list[float]:
    """Noise that remembers: each value is `memory` of the one before and news; variance 1."""
    value = rng.gauss(0, 1)
    values = []
    for _ in range(n):
        value = memory * value + math.sqrt(1 - memory**2) * rng.gauss(0, 1)
        values.append(value)
    return values


def test_the_error_of_a_gain_sees_noise_that_remembers():
    rng = random.Random(2)
    runs = [gain(walk(rng, 64, 0.8), walk(rng, 64, 0.8)) for _ in range(400)]
    believed = sum(abs(g) > 3 * e for g, e in runs)
    assert believed <= 40  # by the errors of single losses it would be more than 100


def test_the_error_of_a_gain_counts_all_of_the_window():
    """A trial that is level for three quarters and then runs away: the last blocks are in the error."""
    n = 8 * adalrs.BLOCKS
    control = [5 + 0.5 * (-1) ** i for i in range(n)]
    trial = [loss - (0.4 if i >= 3 * n // 4 else 0) for i, loss in enumerate(control)]
    ahead = [a - b for a, b in zip(control, trial)]
    centres = [8 * block + 3.5 for block in range(adalrs.BLOCKS)]
    means = [sum(ahead[8 * block : 8 * block + 8]) / 8 for block in range(adalrs.BLOCKS)]
    _, wider = adalrs.through_origin(centres, means)
    assert gain(control, trial)[1] == pytest.approx(wider)


def test_outliers_move_neither_noise_nor_gain():
    rng = random.Random(3)
    control = [10 + rng.gauss(0, 1) for _ in range(30)]
    trial = [10 + rng.gauss(0, 1) for _ in range(30)]
    struck = [*control[:-1], 1e9]
    assert noise(struck[:20] + [1e9] + struck[20:29]) < 3
    assert abs(gain(struck, trial)[0] - gain(control, trial)[0]) < 0.03
    assert clip_outliers(control, trial) == [control, trial]


# --------------------------------------------------------------------------------------- verdicts

CONTROL = line(10, -0.1)
TRIALS = {  # from where the control began: trial, action, scale after by the paper's rule, extra steps
    "up": (line(10, -0.5), 1.5, K),
    "down": (line(9.99, -0.02), 1 / 1.5, K),
    "stay": (CONTROL, 1.0, K),
    "abort": ([9.9, 10.01], 1 / 1.5, 2),
}


@pytest.mark.parametrize("action", TRIALS)
def test_each_kind_of_trial_has_its_verdict_by_the_papers_rule(action):
    trial, scale, extra = TRIALS[action]
    search, training, returned, states = forced(CONTROL + trial, rule="paper")
    assert actions(search) == [action] and not search.trying
    assert search.scale == pytest.approx(scale)
    assert returned[K - 1] == 0 and returned[-1] == K == search.step and search.extra_steps == extra
    assert search.made == K + len(trial) == search.step + search.extra_steps
    assert identical(states[K - 1], never(0))  # the trial begins where the control began
    kept = never(K, lambda step: 1.5 if action == "up" else 1.0)
    assert identical(states[-1], kept) and identical(training.state(), kept)


RUNS_AWAY = [9.9, 30.0, 31.0, 32.0]


def test_the_safe_rule_never_lowers_for_a_trial():
    """A4: under Eq. 1, 49 of 140 runs were lowered from starts that were too low."""
    for trial, action in (
        (TRIALS["down"][0], "stay"),
        (TRIALS["stay"][0], "stay"),
        (RUNS_AWAY, "abort"),
    ):
        search, _, returned, states = forced(CONTROL + trial)
        assert actions(search) == [action] and search.scale == 1.0
        assert returned[-1] == K and identical(states[-1], never(K))


def test_the_safe_rule_keeps_a_clear_gain_and_tries_on_from_the_same_point():
    search, _, returned, states = forced(CONTROL + TRIALS["up"][0])
    assert actions(search) == ["up"] and search.trying
    assert returned[-1] == 0 and search.scale == pytest.approx(2.25)
    assert identical(states[-1], never(0))
    search, _, returned, states = forced(CONTROL + TRIALS["up"][0] + TRIALS["up"][0])
    assert actions(search) == ["up", "stay"] and search.scale == pytest.approx(1.5)
    assert returned[-1] == K and identical(states[-1], never(K, lambda step: 1.5))


def test_a_cautious_search_by_the_papers_rule_takes_a_slower_trial_back_and_lowers_only_for_harm():
    slower = forced(CONTROL + TRIALS["down"][0], rule="paper", cautious=True)[0]
    harmed = forced(CONTROL + TRIALS["abort"][0], rule="paper", cautious=True)[0]
    assert actions(slower) == ["stay"] and slower.scale == 1.0
    assert actions(harmed) == ["abort"] and harmed.scale == pytest.approx(1 / 1.5)


def test_two_rising_windows_lower_the_rate_by_the_papers_rule_and_undo_nothing():
    windows = line(20, -0.1) + line(5, -0.2) + line(9, -0.5) + line(14, -1.2)
    search, _, _, states = forced(windows, window=(0.06, 1.0), rule="paper")
    assert actions(search) == ["rising"] and search.scale == pytest.approx(1 / 1.5)
    assert search.extra_steps == 0 and identical(states[-1], never(4 * K))


def test_natural_deceleration_is_not_held_against_a_raise():
    """A falling exponential: every window is slower than the one before, at any rate; the faster arm still
    wins.
    """
    slow = [10 * math.exp(-0.1 * i) for i in range(1, K + 1)]
    fast = [10 * math.exp(-0.15 * i) for i in range(1, K + 1)]
    for rule in ("safe", "paper"):
        assert actions(forced(slow + fast, rule=rule)[0]) == ["up"]


def test_no_raise_is_tried_by_the_papers_rule_while_the_descent_still_accelerates():
    search, *_ = forced(CONTROL + line(10, -0.5) + line(7, -0.9), rule="paper")
    assert actions(search) == ["up"] and not search.trying
    search, *_ = forced(CONTROL + line(10, -0.5) + line(7, -0.5), rule="paper")
    assert search.trying and search.scale == pytest.approx(2.25)


@pytest.mark.parametrize(
    "decay, want",
    [
        (1.0, [1.5, 2.25, 3.375]),
        (0.99, [1.5, 1.5 * 1.485, 1.5 * 1.485 * 1.47015]),
        (0.5, [1.5, 1.5, 1.5]),
    ],
)
def test_the_factor_shrinks_with_every_adjustment_down_to_one(decay, want):
    """Three raises that are each kept: undecayed, they take the paper's 2e-4 to its 6.75e-4."""
    slopes = [(100, -0.1), (100, -0.5), (97, -0.5), (97, -2), (87, -2), (87, -8)]
    trace = [loss for start, slope in slopes for loss in line(start, slope)]
    search, *_ = forced(trace, decay=decay, rule="paper")
    assert actions(search) == ["up"] * 3
    assert [d.scale for d in search.decisions] == pytest.approx(want)
    if decay == 1.0:
        assert 2e-4 * search.scale == pytest.approx(6.75e-4)


def straight(scale: float, width: int = 4, noisy: float = 0.0, total: int = 400, seed: int = 0):
    """A run whose losses say nothing, and whose weights go straight (or are only noise). Returns the
    search.
    """
    rng = random.Random(seed)
    w = nn.Parameter(torch.zeros(width))
    search = AdaLRS([w], [torch.optim.SGD([w], lr=1.0)], total)
    step = 0
    while step < total:
        move = torch.tensor([1.0 + noisy * rng.gauss(0, 1) for _ in range(width)])
        w.data += 1e-3 * search.scale * move * scale
        step = search.observe(5 - 0.01 * float(w[0].detach()) + rng.gauss(0, 0.3))
    return search


def test_where_the_path_is_bent_nothing_is_tried():
    """At a right rate the search costs no step."""
    search = straight(1.0, 50, 1e6)
    assert not search.decisions and search.extra_steps == 0 and straight(1.0).decisions


def test_where_losses_say_nothing_a_straight_path_decides_for_the_raise():
    ups = [actions(straight(1.0, seed=seed)).count("up") for seed in range(10)]
    none = [actions(straight(1.0, 50, 30.0, seed=seed)).count("up") for seed in range(10)]
    assert sum(ups) >= 5 and sum(none) == 0


# --------------------------------------------------------------------------------- harm, A1 to A6


def learn(kind: str, seed: int = 0, steps: int = 400, **options):
    """A regression on a stream with Adam, too low a rate and cosine. Returns (final true loss, search)."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(20, generator=g)
    w = nn.Parameter(torch.zeros(20))
    optimizer = torch.optim.Adam([w])
    search = AdaLRS([w], [optimizer], steps, **options) if kind != "fixed" else None
    step = 0
    furthest = 0
    while step < steps:
        furthest = max(furthest, step)
        late = furthest > 0.15 * steps
        x = torch.randn(16, 20, generator=g)
        sigma = 0.6 if kind == "noise doubles" and late else 0.3
        error = x @ (w - truth) - sigma * torch.randn(16, generator=g)
        loss = error.square().mean()
        if kind == "level shift" and late:
            loss = loss * 1.15
        optimizer.param_groups[0]["lr"] = (
            3e-3
            * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            * (search.scale if search else 1)
        )
        missing = kind == "missing" and float(torch.rand(1, generator=g)) < 0.02
        if not missing:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        shown = math.nan if missing else float(loss.detach())
        step = search.observe(shown) if search else step + 1
    return float((w.detach() - truth).square().sum()), search


@pytest.mark.parametrize("kind", ["plain", "noise doubles", "level shift", "missing"])
def test_what_happens_to_the_data_is_not_the_rates_fault(kind):
    """A1 and A3: runs whose noise doubles, whose level shifts or that miss losses were lowered to 1e-5 of
    their rate.
    """
    for seed in range(2):
        fixed, _ = learn("fixed", seed)
        final, search = learn(kind, seed)
        assert search.scale >= 1 and search.extra_steps <= 100
        assert final < fixed, (kind, seed, actions(search))


def test_a_level_that_shifts_is_an_alarm_and_then_normal():
    trace = CONTROL + line(10, -0.5) + line(10, -0.5)  # a raise is in force
    higher = [12.0] * 60
    search, *_ = forced(trace + higher, window=(0.0, 0.1))
    assert actions(search) == ["up", "stay", "data"] and search.scale == pytest.approx(1.5)
    assert search.step == K + 60 - search.decisions[-1].lost[1] + search.decisions[-1].lost[0]


def test_a_raise_that_turns_out_bad_after_the_window_is_undone_with_its_damage():
    """A2: nothing guarded the run after the window: a final loss of 6.06 where the fixed rate ended at
    3.6e-6.
    """
    kept = CONTROL + line(10, -0.5) + line(10, -0.5)  # up, and a further raise that is not
    late = line(8, -0.2) + line(7, -0.2) + line(6, -0.1) + [6, 9, 11, 12, 13]
    search, _, returned, states = forced(kept + late + [6.0] * K, window=(0.0, 0.1))
    assert actions(search) == ["up", "stay", "rescue"]
    assert search.scale == 1.0 and not search.state.may_raise
    begun = len(kept) + len(late)
    assert returned[begun - 1] == search.step - K  # back to a step before the damage
    assert returned[begun - 1] <= 4 * K


def test_near_zero_nothing_matters():
    """A2: once the loss was near zero every raise fell faster; the scale reached 567 times the start."""
    trace = [2.0] * K
    for window in range(12):
        trace += line(1e-5, -1e-7)
        trace += line(1e-5, -1e-6)  # a trial, if it is one
    search, *_ = forced(trace, window=(0.06, 1.0), total=400)
    assert "up" not in actions(search) and search.scale == 1.0


@pytest.mark.parametrize("rule", ["safe", "paper"])
def test_one_missing_loss_halves_nothing(rule):
    """A3: at one loss in a hundred, the scale ended at .006."""
    trace = [loss for i in range(40) for loss in (10 - 0.01 * i, math.nan)]
    search, *_ = forced(trace, window=(0.9, 1.0), rule=rule)
    assert search.scale == 1.0 and search.step == 80 and not search.decisions


def test_losses_that_stay_missing_put_good_weights_back_and_the_second_time_lower():
    nan = [math.nan] * 3
    search, _, returned, states = forced(CONTROL + CONTROL + nan, window=(0.9, 1.0))
    assert returned[-1] == K and identical(states[-1], never(K))  # under check
    search, *_ = forced(CONTROL + CONTROL + nan + CONTROL, window=(0.9, 1.0))
    assert actions(search) == ["rescue"] and search.scale == 1.0
    search, *_ = forced(CONTROL + CONTROL + nan + CONTROL + nan + CONTROL, window=(0.9, 1.0))
    assert actions(search) == ["rescue"] * 2 and search.scale == pytest.approx(1 / 1.5)


def test_a_run_that_does_worse_than_untrained_is_lowered():
    search, *_ = forced(CONTROL + CONTROL + [50.0] * K + CONTROL, window=(0.9, 1.0))
    assert actions(search) == ["rescue"] and search.scale == pytest.approx(1 / 1.5)
    search, *_ = forced([10.0] * K + [5.0] * K + [9.0] * K, window=(0.9, 1.0))
    assert actions(search) == []  # ups and downs of the given rate


@pytest.mark.parametrize("rule", ["safe", "paper"])
def test_whatever_the_losses_are_no_exception_and_never_more_than_the_budget(rule):
    w = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for seed in range(150):
        rng = random.Random(seed)
        total = rng.choice([1, 5, 40, 130])
        search = AdaLRS([w], [optimizer], total, rng.choice([None, 3, 7]), (0.0, 0.8), rule=rule)
        level = 10.0
        step = 0
        made = 0
        while step < total:
            level = level * 0.98 if rng.random() < 0.95 else level * 10 ** rng.uniform(-3, 3)
            odd = rng.choice([math.nan, math.inf, -math.inf, 1e300, -1e300, 0.0])
            often = seed % 4 / 8
            w.data += 1e-3
            step = search.observe(odd if rng.random() < often else level + rng.gauss(0, 0.1))
            made += 1
        assert made <= total + total // 4 and made == search.made
        assert search.extra_steps == made - total >= 0
        assert 0 < search.scale < math.inf


def test_without_steps_for_a_check_the_given_rate_is_left_alone_but_missing_losses_go_back():
    falling = line(5.0, -0.1, 20)
    search, *_ = forced(falling + [50.0] * K, budget=0.0)
    assert (
        search.state.losses == [] and search.state.level is None
    )  # what comes says what is normal
    search, *_ = forced(falling + [50.0] * 30, budget=0.0)
    assert actions(search) == [] and search.scale == 1.0 and search.step == 50
    search, *_ = forced(falling + [math.nan] * 3 + [4.0] * 20, budget=0.0)
    assert actions(search) == ["rescue"] and search.scale == 1.0 and search.step == 43


def test_after_each_trial_in_vain_twice_as_many_windows_go_by():
    """One, then 1, 3, 7, 15 windows of 5 steps without a trial, and the one that is its control."""
    search, *_ = forced([5.0] * 200, 300, budget=0.5)
    assert actions(search) == ["stay"] * 5
    assert [d.step for d in search.decisions] == [5, 15, 35, 75, 155]
    assert [d.made for d in search.decisions] == [10, 25, 50, 95, 180]


def test_a_slope_is_no_noise():
    for slope in (-0.5, 0.0, 0.5):
        assert noise(line(3.0, slope, 20)) == pytest.approx(0.0, abs=1e-12)
        rough = [y + 0.1 * (-1) ** i for i, y in enumerate(line(3.0, slope, 200))]
        assert noise(rough) == pytest.approx(0.1 * adalrs.NORMAL, rel=0.01)


@pytest.mark.parametrize("spent, goes_back", [(19, True), (20, True), (21, False)])
def test_an_alarm_goes_back_as_long_as_the_budget_has_those_steps(spent, goes_back):
    """25 of 100 steps may be made again; 5 would be lost: with the last of them it still goes back."""
    training = Training()
    search = AdaLRS(training.parameters, training.optimizers, 100, k=K, rule="paper")
    search.older = replace(search.older, step=7)
    search.state.step = 12
    search.state.made = 12 + spent
    search._sound_alarm(math.inf)
    assert search.step == (7 if goes_back else 12)


def test_trials_stop_at_the_budget():
    for budget in (0.0, 0.1, 0.25):
        for rule in ("safe", "paper"):
            search, *_ = forced(CONTROL * 60, 200, budget=budget, rule=rule)
            assert search.extra_steps <= budget * 200 and (search.decisions or budget == 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 2},
        {"k": 0},
        {"up": 1.0},
        {"up": 0.5},
        {"down": 1.0},
        {"down": -2.0},
        {"decay": 0.0},
        {"decay": 1.01},
        {"up": 4.0, "down": 2.0},
        {"up": 3.0, "down": 3.0},
        {"rule": "bold"},
    ],
    ids=str,
)
def test_options_that_cannot_search_are_errors(wrong):
    """A6: co-primality was not checked."""
    training = Training()
    with pytest.raises(ValueError, match="AdaLRS"):
        AdaLRS(training.parameters, training.optimizers, 100, **wrong)


# ---------------------------------------------------------------------------------------- roll-back


@pytest.mark.parametrize("action", ["down", "stay", "abort"])
def test_after_a_roll_back_parameters_moments_and_step_counts_are_the_snapshots_bits(action):
    search, training, *_ = forced(CONTROL + TRIALS[action][0], rule="paper")
    assert identical(training.state(), never(K))
    assert int(training.optimizers[0].state_dict()["state"][0]["step"]) == K
    assert len(tensors_of(training.state())) == 2 + 3 + 1  # weights, Adam's three, momentum


@pytest.mark.parametrize("action", TRIALS)
def test_training_on_after_a_decision_is_a_run_that_never_tried(action):
    trial, scale, _ = TRIALS[action]
    tried = forced(CONTROL + trial + [9.0] * 7, window=(0.0, 0.06), rule="paper")
    kept = 1.5 if action == "up" else 1.0
    assert actions(tried[0]) == [action] and tried[0].step == K + 7
    assert identical(tried[1].state(), never(K + 7, lambda step: kept if step < K else scale))


def test_a_snapshot_is_not_touched_by_the_trial_that_follows_it():
    search, training, *_ = forced(CONTROL)
    assert search.trying
    snapshots = [search.older, search.newer]
    saved = [{name: t.clone() for name, t in s.tensors.items()} for s in snapshots]
    for step in range(3):
        training.step(step, search.scale)
    assert [len(one) for one in saved] == [
        2,
        2 + 3 + 1,
    ]  # before the first step there are no moments
    for snapshot, before in zip(snapshots, saved):
        assert all(torch.equal(t, snapshot.tensors[name]) for name, t in before.items())


class Scaler:
    """Has a state, as a GradScaler or a scheduler has."""

    def __init__(self):
        self.count = 0

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


def test_buffers_and_others_go_back_and_frozen_parameters_are_left_alone():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    buffer = torch.zeros(2)
    scaler = Scaler()
    training = Training()
    tensors = [*training.parameters, frozen, buffer]
    search = AdaLRS(tensors, training.optimizers, 100, K, (0.0, 1.0), others=(scaler,))
    for step, loss in enumerate(CONTROL):
        training.step(step, search.scale)
        scaler.count += 1
        search.observe(loss)
    assert search.trying and scaler.count == 0
    frozen.data.add_(1)
    buffer.add_(1)
    scaler.count = 17
    for _ in range(3):
        search.observe(math.nan)
    assert actions(search) == ["abort"] and search.step == K
    assert frozen.tolist() == [2, 2] and buffer.tolist() == [0, 0] and scaler.count == K


def test_half_precision_parameters_keep_their_wide_moments_through_a_roll_back():
    """`Optimizer.load_state_dict` would round them to the parameter's type."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.tensor([1.001, 2.002, 3.003])
    tensors, rest = optimizer_state([optimizer])
    saved = {k: v.clone() for k, v in tensors.items()}
    optimizer.state[p]["momentum_buffer"].zero_()
    load_optimizer_state([optimizer], saved, rest)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], saved["0.0.momentum_buffer"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "schedule-free"])
def test_every_optimizers_state_goes_through_json_and_back(name):
    """Three steps, save, three more; restored, the three more give the same bits."""
    w = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    if name == "schedule-free":
        schedulefree = pytest.importorskip("schedulefree")
        optimizer = schedulefree.AdamWScheduleFree([w], lr=0.1, warmup_steps=2)
        optimizer.train()
    elif name == "muon":
        optimizer = Muon([w], lr=0.1)
    elif name == "sgd":
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW([w], lr=0.1)

    def train() -> torch.Tensor:
        for i in range(3):
            w.grad = w.detach() * (i + 1)
            optimizer.step()
        return w.detach().clone()

    train()
    begin = w.detach().clone()
    tensors, rest = optimizer_state([optimizer])
    saved = {key: value.clone() for key, value in tensors.items()}
    rest = json.loads(json.dumps(rest))
    want = train()
    w.data.copy_(begin)
    load_optimizer_state([optimizer], saved, rest)
    assert torch.equal(train(), want) and not torch.equal(want, begin)


SLOPES = [
    [(20, -0.1), (20, -2), (19, -2.0), (12, -0.5), (11, -0.1), (11, -0.3)],
    [(10, -0.28), (10, -0.3), (9, 3.0), (9, 0.0), (9, -0.1), (8, -0.1), (8, -0.4), (8, -0.1)],
]
TRACE = [loss for part in SLOPES for start, slope in part for loss in line(start, slope)]
TRACE[47:50] = [math.nan] * 3


@pytest.mark.parametrize("rule", ["safe", "paper"])
@pytest.mark.parametrize("cut", range(1, len(TRACE), 3))
def test_a_search_resumed_anywhere_decides_the_same_to_the_last_bit(cut, rule):
    """Saved through JSON and tensors alone, in windows and in the middle of trials and checks, into fresh
    objects.
    """
    whole = forced(TRACE, rule=rule)
    first, training, returned, _ = forced(TRACE[:cut], rule=rule)
    tensors, values = first.state_dict()
    tensors = {key: value.clone() for key, value in tensors.items()}
    values = json.loads(json.dumps(values))
    moments, rest = optimizer_state(training.optimizers)

    other = Training()
    for p, q in zip(other.parameters, training.parameters):
        p.data.copy_(q.data)
    moments = {key: value.clone() for key, value in moments.items()}
    load_optimizer_state(other.optimizers, moments, json.loads(json.dumps(rest)))
    search = AdaLRS(
        other.parameters,
        other.optimizers,
        100,
        K,
        (0.0, 1.0),
        1.5,
        1.5,
        1.0,
        rule=rule,
        offload=cut % 2 == 0,
    )
    search.load_state_dict(tensors, values)
    step = returned[-1]
    for loss in TRACE[cut:]:
        other.step(step, search.scale)
        step = search.observe(loss)
    assert repr(search.decisions) == repr(whole[0].decisions) and len(search.decisions) >= 3
    assert step == whole[2][-1] and identical(other.state(), whole[1].state())


# ----------------------------------------------------------------------------------------- search


def test_the_search_tries_only_inside_its_window_and_then_holds_no_snapshot():
    flat = [10.0] * 200
    search, *_ = forced(flat, total=100, window=(0.1, 0.4), up=3.0, down=2.0)
    tried = [d for d in search.decisions if d.action in ("up", "stay", "abort")]
    assert tried and all(10 < d.step <= 40 + K for d in tried)
    assert search.older is None and search.state_dict()[0] == {}
    assert not forced(flat[:10], window=(0.1, 0.4))[0].trying
    assert search.observe(1e9) == search.step
    assert search.observe(math.nan) == search.step and search.scale == 1.0
    raised, *_ = forced(CONTROL + line(10, -0.5) + [9.0] * 40, window=(0.0, 0.1))
    assert raised.scale == pytest.approx(1.5) and raised.older is not None  # watched to the end


def test_a_log_line_has_what_decided():
    search, *_ = forced(CONTROL + line(10, -0.5), rule="paper")
    (entry,) = search.log()
    assert -1 <= entry.pop("agreement") <= 1
    assert entry == {
        "step": K,
        "made": 2 * K,
        "action": "up",
        "scale": 1.5,
        "k": K,
        "before": pytest.approx(0.1),
        "trial": pytest.approx(0.5),
        "error": pytest.approx(0, abs=1e-9),
        "lost": (0, K),
    }
    search, *_ = forced(CONTROL + CONTROL, rule="paper")
    assert search.decisions[0].lost == (K, 2 * K)


def quadratic(rate: float, adaptive: bool, steps: int = 600):
    """A noisy quadratic under plain gradient descent (stable below 20). Returns the final true loss and the
    search.
    """
    g = torch.Generator().manual_seed(1)
    w = nn.Parameter(5 * torch.ones(30))
    optimizer = torch.optim.SGD([w], lr=rate)
    search = AdaLRS([w], [optimizer], steps)
    step = 0
    while step < steps:
        optimizer.param_groups[0]["lr"] = rate * search.scale * (1 - step / steps)
        optimizer.zero_grad()
        loss = 0.05 * (w + 0.3 * torch.randn(30, generator=g)).square().sum()
        if math.isfinite(float(loss.detach())):
            loss.backward()
            optimizer.step()
        step = search.observe(float(loss.detach())) if adaptive else step + 1
    return float(w.detach().square().mean()), search


def test_rates_far_too_low_and_far_too_high_both_end_near_the_best():
    best, _ = quadratic(1.0, adaptive=False)
    for start in (0.03, 0.1, 3.0, 60.0):
        final, search = quadratic(start, adaptive=True)
        assert final < best + 0.02 and search.extra_steps <= 150, (start, final, best)
    assert quadratic(0.03, adaptive=False)[0] > best + 1
    assert not quadratic(60.0, adaptive=False)[0] < 1e9


def test_the_example_in_the_docstring_trains():
    """Ten lines, as they stand there, with batch norm's buffers among the tensors."""
    (block,) = re.findall(r"\n\n((?:    .*\n)+)\nWhat a step changes", adalrs.__doc__)
    example = "\n".join(row[4:] for row in block.splitlines())
    assert len(example.splitlines()) <= 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def stream():
        while True:
            x = torch.randn(8, 4)
            yield x, x[:, :1]

    def loss_of(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    names = {
        "AdaLRS": AdaLRS,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "schedule": lambda step: 1 - step / 1000,
        "loss_of": loss_of,
        "batches": stream(),
    }
    exec(example.replace("1000", "200"), names)
    assert names["search"].step == 200 and float(names["loss"].detach()) < 0.5
