"""AdaLRS: slopes and their errors, every verdict by a forced trace, exact roll-backs and resumes, rates found from far off."""

import copy
import json
import math
import random

import pytest
import torch

from adalrs import AdaLRS, fit_line, gain, load_optimizer_state, optimizer_state, steps_needed

K = 5


def line(start: float, slope: float, n: int = K) -> list[float]:
    return [start + slope * i for i in range(n)]


class Training:
    """Two small parameters under Adam and momentum. The gradient of a step depends on the step: it is the step's data.

    `record(step)` keeps bit-exact copies of parameters and optimizer states.
    """

    def __init__(self, rate: float = 1e-2):
        g = torch.Generator().manual_seed(0)
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((4, 3), (5,))
        ]
        self.optimizers = [
            torch.optim.Adam([self.parameters[0]]),
            torch.optim.SGD([self.parameters[1]], momentum=0.9),
        ]
        self.rate, self.states = rate, {}

    def step(self, step: int, scale: float) -> None:
        g = torch.Generator().manual_seed(100 + step)
        for p in self.parameters:
            p.grad = p.detach() + torch.randn(p.shape, generator=g)
        for o in self.optimizers:
            o.param_groups[0]["lr"] = self.rate * scale
            o.step()

    def state(self):
        return copy.deepcopy(
            ([p.data for p in self.parameters], [o.state_dict()["state"] for o in self.optimizers])
        )


def tensors_of(state) -> list[torch.Tensor]:
    parameters, optimizers = state
    return parameters + [
        torch.as_tensor(v) for o in optimizers for one in o.values() for _, v in sorted(one.items())
    ]


def identical(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def forced(
    trace,
    total: int = 100,
    window=(0.0, 1.0),
    up: float = 1.5,
    down: float = 1.5,
    decay: float = 1.0,
    k=K,
    **how,
):
    """Train under the search while it is shown these losses. Returns search, training, the steps that `observe` returned, and
    the state after each observed loss."""
    training = Training()
    search = AdaLRS(
        training.parameters, training.optimizers, total, k, window, up, down, decay, **how
    )
    step, returned, states = 0, [], []
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


# ------------------------------------------------------------------------------------------------------------------ fit


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
    assert said == pytest.approx(sigma * math.sqrt(12 / (k * (k * k - 1))), rel=0.05)


def test_the_gain_of_a_trial_is_the_slope_from_the_common_start_and_its_error_the_true_spread():
    assert gain(line(10, -0.1), line(10, -0.5)) == pytest.approx((0.4, 0), abs=1e-9)
    rng, k = random.Random(1), 12
    runs = [
        gain(
            [10 - 0.1 * i + rng.gauss(0, 1) for i in range(k)],
            [10 - 0.3 * i + rng.gauss(0, 1) for i in range(k)],
        )
        for _ in range(3000)
    ]
    slopes = torch.tensor([g for g, _ in runs])
    assert slopes.mean().item() == pytest.approx(0.2, abs=0.01)
    assert slopes.std().item() == pytest.approx(
        math.sqrt(2 * 6 / (k * (k - 1) * (2 * k - 1))), rel=0.05
    )
    assert torch.tensor([e for _, e in runs]).square().mean().sqrt().item() == pytest.approx(
        slopes.std().item(), rel=0.05
    )


def test_at_the_k_that_the_formula_gives_a_good_raise_is_seen_nearly_always_and_at_a_quarter_of_it_rarely():
    rng, v, sigma = random.Random(2), 0.01, 0.5
    k = round(steps_needed(sigma, v, 3.0))

    def seen(k):
        hits = 0
        for _ in range(300):
            arms = [[10 - r * v * i + rng.gauss(0, sigma) for i in range(k)] for r in (1, 3)]
            faster, error = gain(*arms)
            hits += faster > 2 * error
        return hits / 300

    assert seen(k) > 0.93 and seen(k // 4) < 0.3


# ------------------------------------------------------------------------------------------------------------- verdicts

CONTROL = line(10, -0.1)
TRIALS = {  # from where the control began: trial, action, scale after, steps that no longer count
    "up": (line(10, -0.5), 1.5, K),
    "down": (line(9.99, -0.02), 1 / 1.5, K),
    "stay": (CONTROL, 1.0, K),
    "abort": ([9.9, 10.01], 1 / 1.5, 2),
}


@pytest.mark.parametrize("action", TRIALS)
def test_each_kind_of_trial_has_its_verdict(action):
    trial, scale, extra = TRIALS[action]
    search, training, returned, states = forced(CONTROL + trial)
    assert (
        actions(search) == [action] and search.scale == pytest.approx(scale) and not search.trying
    )
    assert returned[K - 1] == 0 and returned[-1] == K == search.step and search.extra_steps == extra
    assert search.made == K + len(trial) == search.step + search.extra_steps
    assert identical(states[K - 1], never(0))  # the trial begins where the control began
    assert identical(states[-1], never(K)) == (action != "up")  # the control's end, or the trial's
    assert identical(training.state(), states[-1]) and (
        action != "up" or identical(states[-1], never(K, lambda s: 1.5))
    )


def test_a_cautious_search_takes_a_slower_trial_back_and_lowers_only_for_harm():
    search, *_, states = forced(CONTROL + TRIALS["down"][0], cautious=True)
    assert actions(search) == ["stay"] and search.scale == 1.0 and identical(states[-1], never(K))
    for harm, scale in (("abort", 1 / 1.5), ("up", 1.5)):
        search, *_ = forced(CONTROL + TRIALS[harm][0], cautious=True)
        assert actions(search) == [harm] and search.scale == pytest.approx(scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("when", range(K))
def test_a_trial_that_blows_up_is_undone_at_once(bad, when):
    search, _, returned, states = forced(CONTROL + line(9.5, -0.5)[:when] + [bad])
    assert (
        actions(search) == ["abort"]
        and returned[-1] == K
        and search.scale == pytest.approx(1 / 1.5)
    )
    assert search.extra_steps == when + 1 and identical(states[-1], never(K))


def test_the_highest_loss_so_far_and_not_the_last_window_is_the_limit():
    rising = line(10, -0.1) + line(11, -0.5)  # kept trials look back to the run's highest
    assert "abort" in actions(forced(rising)[0])
    search, *_ = forced([12.0, 9.9, 9.8, 9.7, 9.6] + [11.9, 11.9])
    assert actions(search) == [] and search.trying


def test_a_noisy_loss_is_no_divergence():
    """Two standard deviations above the highest loss so far are allowed."""
    control = [10.0, 9.2, 9.5, 8.8, 8.6]
    assert forced(control + [10.3])[0].trying and actions(forced(control + [11.0])[0]) == ["abort"]


def test_a_blind_search_leaps_once_and_a_leap_that_fails_says_nothing():
    blind = [10.0, 9.0, 10.0, 9.0, 10.0]
    go = lambda trace: forced(blind * 3 + trace, up=3.0, window=(0.11, 1.0))
    search, *_ = go([])
    assert search.trying and search.scale == pytest.approx(9.0)
    kept, *_ = go(line(9, -4))
    assert actions(kept) == ["up"] and kept.scale == pytest.approx(9.0)
    for trial in ([30.0], line(9.4, 0.1)):
        failed, _, returned, states = go(trial)
        assert (
            actions(failed) == ["stay"]
            and failed.scale == 1.0
            and returned[-1] == 3 * K
            and identical(states[-1], never(3 * K))
        )
        again, *_ = go(trial + blind)
        assert again.trying and again.scale == pytest.approx(3.0)


def test_a_jump_that_then_falls_fast_is_not_kept():
    """Its own slope would keep this trial: it falls at five times the rate, from a height that the raise itself caused."""
    search, _, _, states = forced(line(20, -0.1) + CONTROL + line(14, -0.5), window=(0.06, 1.0))
    assert fit_line(line(14, -0.5))[0] > 0.4
    assert actions(search) == ["stay"] and identical(states[-1], never(2 * K))


def test_natural_deceleration_is_not_held_against_a_raise():
    """A falling exponential: every window is slower than the one before, at any rate; the faster arm still wins."""
    decay = lambda rate, n, start=10.0: [start * math.exp(-rate * i) for i in range(1, n + 1)]
    search, *_ = forced(decay(0.1, K) + decay(0.15, K))
    assert (
        fit_line(decay(0.15, 2 * K)[K:])[0] < fit_line(decay(0.1, K))[0]
    )  # consecutive windows would have said "slower"
    assert actions(search) == ["up"]


def test_two_rising_windows_lower_the_rate_and_undo_nothing():
    windows = (
        line(20, -0.1) + line(5, -0.2) + line(9, -0.5) + line(14, -1.2)
    )  # each falls faster and lies higher: no trials
    search, training, returned, states = forced(windows, window=(0.06, 1.0))
    assert (
        actions(search) == ["rising"]
        and search.scale == pytest.approx(1 / 1.5)
        and search.extra_steps == 0
    )
    assert identical(states[-1], never(4 * K)) and not search.trying


def test_no_raise_is_tried_while_the_descent_still_accelerates():
    search, *_ = forced(
        CONTROL + line(10, -0.5) + line(7, -0.9)
    )  # faster than when it was kept: leave it
    assert actions(search) == ["up"] and not search.trying
    search, *_ = forced(CONTROL + line(10, -0.5) + line(7, -0.5))
    assert search.trying and search.scale == pytest.approx(2.25)


def test_noise_decides_nothing():
    raised = lowered = 0
    for seed in range(60):
        rng = random.Random(seed)
        search, *_ = forced([10 + rng.gauss(0, 1) for _ in range(40)], k=20)
        raised, lowered = raised + ("up" in actions(search)), lowered + ("down" in actions(search))
    assert raised <= 6 and lowered <= 6  # a difference below twice its error is none: 2.5 % a side


def test_a_window_clearly_above_the_first_is_taken_back_at_a_lower_rate():
    search, _, returned, states = forced(CONTROL + line(30, 5.0), window=(0.5, 1.0))
    assert (
        actions(search) == ["rescue"]
        and returned[-1] == K
        and search.scale == pytest.approx(1 / 1.5)
    )
    assert identical(states[-1], never(K)) and search.extra_steps == K


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_rescued_at_once_and_a_hopeless_run_ends_with_the_reason(bad):
    search, _, returned, states = forced(CONTROL + [9.5, bad], window=(0.5, 1.0))
    assert actions(search) == ["rescue"] and returned[-1] == K and identical(states[-1], never(K))
    with pytest.raises(ValueError, match="not the rate's fault"):
        forced(CONTROL + [bad] * 21, window=(0.5, 1.0))


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
    rounds = [
        line(100, -0.1),
        line(100, -0.5),
        line(97, -0.5),
        line(97, -2),
        line(87, -2),
        line(87, -8),
    ]
    search, *_ = forced([loss for r in rounds for loss in r], decay=decay)
    assert actions(search) == ["up"] * 3 and [d.scale for d in search.decisions] == pytest.approx(
        want
    )
    if decay == 1.0:
        assert 2e-4 * search.scale == pytest.approx(6.75e-4)


# ------------------------------------------------------------------------------------------------------------ roll-back


@pytest.mark.parametrize("action", ["down", "stay", "abort"])
def test_after_a_roll_back_parameters_moments_and_step_counts_are_the_snapshots_bits(action):
    search, training, returned, states = forced(CONTROL + TRIALS[action][0])
    assert (
        identical(training.state(), never(K))
        and int(training.optimizers[0].state_dict()["state"][0]["step"]) == K
    )
    assert len(tensors_of(training.state())) == 2 + 3 + 1  # weights, Adam's three, momentum


@pytest.mark.parametrize("action", TRIALS)
def test_training_on_after_a_decision_is_a_run_that_never_tried(action):
    trial, scale, _ = TRIALS[action]
    tried = forced(CONTROL + trial + [9.0] * 7, window=(0.0, 0.06))  # no second trial after step 6
    kept = 1.5 if action == "up" else 1.0
    assert actions(tried[0]) == [action] and tried[0].step == K + 7
    assert identical(tried[1].state(), never(K + 7, lambda s: kept if s < K else scale))


def test_a_snapshot_is_not_touched_by_the_trial_that_follows_it():
    search, training, *_ = forced(CONTROL)
    assert search.trying
    saved = {name: t.clone() for name, t in search.end.tensors.items()}
    for step in range(3):
        training.step(step, search.scale)
    assert (
        all(torch.equal(t, search.end.tensors[name]) for name, t in saved.items())
        and len(saved) == 2 + 3 + 1
    )


def test_frozen_parameters_are_left_alone_and_buffers_are_restored():
    frozen, buffer, training = (
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
        torch.zeros(2),
        Training(),
    )
    search = AdaLRS([*training.parameters, frozen, buffer], training.optimizers, 100, K, (0.0, 1.0))
    for step, loss in enumerate(CONTROL + [9.0]):
        training.step(step, search.scale)
        search.observe(loss)
    frozen.data.add_(1)
    buffer.add_(1)
    assert search.observe(math.nan) == K and frozen.tolist() == [2, 2] and buffer.tolist() == [0, 0]


def test_half_precision_parameters_keep_their_wide_moments_through_a_roll_back():
    """`Optimizer.load_state_dict` would round them to the parameter's type."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.tensor([1.001, 2.002, 3.003])
    tensors, rest = optimizer_state([optimizer])
    saved = {k: v.clone() for k, v in tensors.items()}
    optimizer.state[p]["momentum_buffer"].zero_()
    load_optimizer_state([optimizer], saved, rest)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], saved["0.0.momentum_buffer"])


TRACE = [
    loss
    for r in (
        [20.0, 9.9, 9.8, 9.7, 9.6],
        line(19, -3),
        line(9.5, -0.1),
        line(9.5, -0.1),
        line(9, -0.3),
        line(9, -0.28),
        line(8, -0.3),
        [8.0, 30.0],
        line(8, -0.2),
        line(7, -0.1),
        line(7, -0.1),
    )
    for loss in r
]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("cut", range(1, len(TRACE), 3))
def test_a_search_resumed_anywhere_decides_the_same_to_the_last_bit(cut, offload):
    """Saved through JSON and tensors alone, in base windows and in the middle of trials, into fresh objects."""
    whole = forced(TRACE, k=None if offload else K, offload=offload)
    first, training, returned, _ = forced(TRACE[:cut], k=None if offload else K, offload=offload)
    tensors, values = first.state_dict()
    tensors, values = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(values))
    weights, (state, rest) = (
        [p.data.clone() for p in training.parameters],
        optimizer_state(training.optimizers),
    )
    other = Training()
    for p, w in zip(other.parameters, weights):
        p.data.copy_(w)
    load_optimizer_state(
        other.optimizers, {k: v.clone() for k, v in state.items()}, json.loads(json.dumps(rest))
    )
    search = AdaLRS(
        other.parameters,
        other.optimizers,
        100,
        None if offload else K,
        (0.0, 1.0),
        1.5,
        1.5,
        1.0,
        offload=offload,
    )
    search.load_state_dict(tensors, values)
    step = returned[-1]
    for loss in TRACE[cut:]:
        other.step(step, search.scale)
        step = search.observe(loss)
    assert search.decisions == whole[0].decisions and (offload or len(search.decisions) >= 4)
    assert step == whole[2][-1] and identical(other.state(), whole[1].state())


# --------------------------------------------------------------------------------------------------------------- search


def test_the_search_tries_only_inside_its_window_and_then_holds_no_snapshot():
    falling = [100 - 0.1 * i for i in range(200)]
    search, _, returned, _ = forced(falling, total=100, window=(0.1, 0.4))
    assert search.decisions and all(10 < d.step <= 40 + K for d in search.decisions)
    assert not forced(falling[:10], window=(0.1, 0.4))[0].trying
    assert search.end is None and search.state_dict()[0] == {}
    late = search.scale
    assert (
        search.observe(1e9) == search.step
        and search.observe(math.nan) == search.step
        and search.scale == late
    )


def test_trials_stop_at_the_budget():
    for budget in (0.0, 0.1, 0.25):
        search, *_ = forced(CONTROL * 60, total=200, window=(0.0, 1.0), budget=budget)
        assert search.extra_steps <= budget * 200 and (search.decisions or budget == 0)


def test_a_k_that_is_too_small_warns_with_the_one_that_is_needed():
    rng = random.Random(0)
    with pytest.warns(UserWarning, match=r"k = 5 is too small .* want k = \d+"):
        forced([10 - 0.001 * i + rng.gauss(0, 1) for i in range(20)])


def test_k_follows_the_noise():
    rng = random.Random(0)
    lengths = [
        forced(
            [100 - 0.05 * i + rng.gauss(0, s) for i in range(250)],
            total=1000,
            window=(0.9, 1.0),
            k=None,
            up=3.0,
        )[0]
        for s in (0.01, 1.0)
    ]
    assert (
        lengths[0].k == lengths[0].shortest == 10 and 15 <= lengths[1].k <= lengths[1].longest
    )  # 1 and 21 steps wanted
    assert steps_needed(1.0, 0.05, 3.0) == pytest.approx((6 * 16 / 0.1**2) ** (1 / 3))


def test_a_log_line_has_what_decided():
    search, *_ = forced(CONTROL + line(10, -0.5))
    assert search.log() == [
        {
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
    ]
    search, *_ = forced(CONTROL + CONTROL)
    assert search.decisions[0].lost == (K, 2 * K)


def quadratic(rate: float, adaptive: bool, steps: int = 600):
    """A noisy quadratic under plain gradient descent (stable below 20). Returns the final true loss and the search."""
    g = torch.Generator().manual_seed(1)
    w = torch.nn.Parameter(5 * torch.ones(30))
    optimizer = torch.optim.SGD([w], lr=rate)
    search = AdaLRS([w], [optimizer], steps)
    step = made = 0
    while step < steps:
        made += 1
        assert made < 2 * steps, "the search keeps going back"
        optimizer.param_groups[0]["lr"] = rate * search.scale * (1 - step / steps)
        optimizer.zero_grad()
        loss = 0.05 * (w + 0.3 * torch.randn(30, generator=g)).square().sum()
        loss.backward()
        optimizer.step()
        step = search.observe(float(loss.detach())) if adaptive else step + 1
    return float(w.detach().square().mean()), search


def test_rates_far_too_low_and_far_too_high_both_end_near_the_best():
    best, _ = quadratic(1.0, adaptive=False)
    for start in (0.03, 0.1, 3.0, 60.0):
        found, search = quadratic(start, adaptive=True)
        assert found < best + 0.02 and search.extra_steps <= 0.4 * 600, (start, found, best)
    assert (
        quadratic(0.03, adaptive=False)[0] > best + 1
        and not quadratic(60.0, adaptive=False)[0] < 1e9
    )


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
    ],
    ids=str,
)
def test_options_that_cannot_search_are_errors(wrong):
    training = Training()
    with pytest.raises(ValueError, match="AdaLRS wants"):
        AdaLRS(training.parameters, training.optimizers, 100, **wrong)
