"""AdaLRS: find the learning rate while training, and take a wrong guess back.

What it teaches: whether a rate is too low shows long before the final loss does, if two runs are
compared that differ in nothing else. So, inside a window of the run: raise the rate, train k steps, and
look. If that was better, keep it; if not, restore parameters and optimizer and go on as if nothing had
been tried. Usable with any model, optimizer and schedule; imports only torch:

    search = AdaLRS([*model.parameters(), *model.buffers()], [optimizer], total_steps=1000)
    step = 0
    while step < 1000:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * schedule(step) * search.scale
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step = search.observe(loss.item())  # usually step + 1; another when the search went back

What a step changes must be handed in, or it would not go back with the rest: buffers among the tensors
(the running statistics of batch norm); a GradScaler, or a scheduler that counts its own steps, as
`others` (anything that has state_dict and load_state_dict). Data need not go back. With several ranks,
hand in the mean loss of all of them, so that they decide alike. A step that the loop skips (a loss or
gradient that is not finite) is observed all the same.

**The theory.** For one step of gradient descent on a loss whose curvature is at most L, the expected
fall is rate |g|^2 - (L / 2) rate^2 |g|^2: concave in the rate, proportional to it while it is far too
low, largest at 1 / L. The paper's claim is that the final loss is lowest at the same rate. Its rule
(SAIL-VL2, Eq. 1; v is the velocity, minus the slope of the loss over k steps, and e its error; n counts
adjustments):

    rate <- a' rate  if v(a' rate) > v(rate) + 2e        a' = max(decay^n a, 1)
            b' rate  if v(a' rate) < v(rate) - 2e        b' = 1 / max(decay^n b, 1)
            rate     otherwise

**The paper's** (certain): the rule, with a and b co-prime integers; trying upwards only, when the
descent slows down; rolling parameters and optimizer state back. **From secondary accounts** of AdaLRS
(arXiv 2506.13274): least squares over k steps, decay .99, search within [0.1, 0.4] of the run, giving a
trial up when its loss exceeds the highest so far, lowering when the loss rises over two windows.
**Inferred**: a = 3, b = 2 (3 / 2 is reported); that n counts adjustments (in steps, .99 would end the
search after 110); that 2e-4 -> 6.75e-4 is three kept raises of 3/2 (it is 1.5^3, but 1.5 is no integer:
it may be three raises by 3 and three cuts by 2). `rule="paper"` is this and nothing else, but for what
no account tells: k (a twentieth of the run), e (below), and two runs from one point.

**Ours**: `rule="safe"`, the default. Eq. 1 fails in both directions. Near the best rate a *lower* one
wins every short race, as noise shrinks with the rate, and loses the run; and 10 times below the best, on
small batches, three times the rate shows nothing in the loss of a few dozen steps. So:

- *Two runs from one point.* The last k steps at the present rate are the control, the trial starts where
  they started. The loss's own deceleration cancels. The winner's weights stay: the loser's k steps are
  what a decision costs.
- *No trial without a reason.* Far below the best rate one window goes on where the last one went; near it the
  path is bent, and mostly noise. Where the cosine between the two is below .3 no raise is tried: at a right
  rate the search costs nothing, and changes nothing.
- *Two witnesses.* The loss: with d_i = control_i - trial_i, the gain is the slope of d through the
  origin, and its error the larger of two, from single losses and from blocks of them (autocorrelation);
  outliers are clipped first (heavy tails). The path: what control and trial added to the weights. They
  saw different data, so where they agree (cosine above .8) the weights go where the data send them, not
  the noise; and if the trial went further that way, by half of what its rate was raised by, the path is
  straight on that scale: the rate is far too low. Near the best rate each relaxes into its own noise. A
  raise is kept if it gains three errors, or if it gains at all and the path is straight. Either way the
  gain must matter: a thousandth of the first loss over a window. Near zero, everything is relatively
  fast.
- *Never lower for a slower trial.* That three times the rate is too much does not say that the rate is;
  one somewhat too high is healed by the schedule's decay, one too low by nothing.
- *A watch,* for as long as a raise is in force, and before that until the search ends. Harm is a running
  level of the loss (median of the last k / 4) clearly above its lowest; with no raise in force, a whole
  window clearly above the first level (to be worse than untrained; the given rate's other ups and downs
  are its own); or three losses in a row that are not finite. Then weights known to be good are put on
  the present data. If they do badly too, the data changed: everything continues where it was. If they do
  well, the run was damaged: they stay, and the last raise is undone for good; if none is in force, the
  rate is lowered (for missing losses only the second time: they may be the data's).
- *The recovery point* is one to two windows old: its successor becomes one when a window has passed
  without alarm.
- *Budget.* Never more than 1.25 times the steps. When they are spent, weights may still go back, the
  count does not.

**The promise**: no worse than the rate that was given, but for the steps of the trials, and far better
when that was far too low; no exception that the loop would not have raised. How often it is kept is
measured, not proven (RESULTS.md: all but 1 of 465 runs, that one by 11 %; and all of 160 on seeds and
problems that its thresholds had not seen). **Its limits**: what is good early may be bad late without ever
rising; `python -m claims.rates` counts how often. Where noise dominates the path (small batches, small
tables) only the loss can tell, and a rate ten times too low may stay. A rate too high is lowered if it
makes the run worse than untrained; if it only wastes it, the schedule's decay must heal that. Two snapshots
are held until the search ends, and to the end of the run if a raise is in force; `offload` puts them in
host memory.

A window, as `observe` sees it:

    1 control   k losses at the present rate; older -> newer are the snapshots at its two ends
    2 trial     back to `older`, the rate raised, k losses      (given up when they run away: back to `newer`)
    3 verdict   keep: `newer` becomes the trial's end, and a further raise is tried from `older`
                else: back to `newer`, and wait 1, 3, 7, ... windows

Of sharded weights the paths are compared by sums over all ranks: a cosine of parts would differ.
"""

import copy
import math
from dataclasses import asdict, dataclass, field
from statistics import fmean as mean
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scale import parallel

RULES = ("safe", "paper")
ERRORS = 3.0  # a gain of so many errors is believed without a second witness
STRAIGHT = 0.3  # cosine between the paths of two windows below which no raise is tried
AGREEMENT = 0.8  # cosine from which the paths of control and trial count as one,
REACH = 0.5  # if the trial also went further on it, by this share of what its rate was raised by
MATTERS = 1e-3  # share of the first loss that a raise must gain over a window
BLOCKS = 8  # of a window, for an error that sees autocorrelation
EQUAL = 1e-9  # relative: velocities that differ by less are equal
LARGEST = 1e100  # from here on a loss counts as not finite, too: its square would overflow
NORMAL = 1.4826  # standard deviations of a normal distribution in its median deviation
IN_A_ROW = 3  # losses that are not finite: fewer are the data's, and the loop has skipped them


# -------------------------------------------------------------------------------- what losses say


def fit_line(losses: list[float]) -> tuple[float, float]:
    """Least squares over equally spaced steps: (velocity = -slope, its standard error), in loss per step."""
    k = len(losses)
    assert k >= 3, f"a slope and its error need at least 3 points, got {k}"

    # Steps and losses about their means
    x = [i - (k - 1) / 2 for i in range(k)]
    middle = mean(losses)
    y = [loss - middle for loss in losses]

    # The line, and what it leaves
    spread = k * (k * k - 1) / 12  # sum of x^2
    slope = sum(a * b for a, b in zip(x, y)) / spread
    rest = [b - slope * a for a, b in zip(x, y)]
    variance = sum(r * r for r in rest) / (k - 2)
    return -slope, math.sqrt(variance / spread)


def clip_outliers(*runs: list[float]) -> list[list[float]]:
    """The same losses, none further from the median of all than four (robust) standard deviations."""
    pool = [loss for run in runs for loss in run]
    middle = median(pool)
    reach = 4 * NORMAL * median(abs(loss - middle) for loss in pool)
    low = middle - reach
    high = middle + reach
    return [[min(max(loss, low), high) for loss in run] for run in runs]


def noise(losses: list[float]) -> float:
    """Standard deviation of one loss about the line of all, from the median deviation: blind to outliers."""
    (losses,) = clip_outliers(losses)
    slope = -fit_line(losses)[0]
    level = [y - slope * i for i, y in enumerate(losses)]
    middle = median(level)
    return NORMAL * median(abs(y - middle) for y in level)


def through_origin(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope of y = slope x by least squares, and its standard error."""
    spread = sum(a * a for a in x)
    product = sum(a * b for a, b in zip(x, y))
    slope = product / spread

    # What the line leaves
    rest = [b - slope * a for a, b in zip(x, y)]
    squares = sum(r * r for r in rest)
    variance = squares / (len(x) - 1)
    return slope, math.sqrt(variance / spread)


def gain(control: list[float], trial: list[float]) -> tuple[float, float]:
    """How much faster a trial fell than its control from the same point, in loss per step.

    Returns (difference, its standard error). The first of the differences is noise: both losses precede
    their first update.
    """
    control, trial = clip_outliers(control, trial)
    steps = list(range(len(control)))
    ahead = [a - b for a, b in zip(control, trial, strict=True)]
    slope, error = through_origin(steps, ahead)
    if len(steps) < 2 * BLOCKS:
        return slope, error

    # Neighbours that resemble each other count as one: the same slope through means of blocks
    edges = [round(i * len(steps) / BLOCKS) for i in range(BLOCKS + 1)]
    blocks = [slice(a, b) for a, b in zip(edges, edges[1:])]
    centres = [mean(steps[block]) for block in blocks]
    means = [mean(ahead[block]) for block in blocks]
    _, wider = through_origin(centres, means)
    return slope, max(error, wider)


# ------------------------------------------------------------------------------ optimizers' state


def optimizer_state(optimizers: list) -> tuple[dict[str, Tensor], list[dict]]:
    """All that optimizers hold: tensors (views) as "optimizer.parameter.key", and the rest as JSON values."""
    tensors: dict[str, Tensor] = {}
    rest: list[dict] = []
    for at, optimizer in enumerate(optimizers):
        # What belongs to a parameter: moments, step counts
        numbers: dict[str, Any] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            for key, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value):
                    tensors[f"{at}.{i}.{key}"] = value
                else:
                    numbers[f"{i}.{key}"] = value

        # What belongs to a group: its rate, and whatever the optimizer counts there
        options = []
        for group in optimizer.param_groups:
            options.append({key: value for key, value in group.items() if key != "params"})
        rest.append({"numbers": numbers, "options": options})
    return tensors, rest


def load_optimizer_state(optimizers: list, tensors: dict[str, Tensor], rest: list[dict]) -> None:
    """The inverse, exactly: no cast to the parameter's type, nothing shared.

    State that did not exist then is gone.
    """
    owners = []
    for optimizer in optimizers:
        optimizer.state.clear()
        owners.append([(p, group) for group in optimizer.param_groups for p in group["params"]])

    # Moments go where their parameter is; a step count stays on the host, unless a fused kernel reads it
    for name, value in tensors.items():
        at, i, key = name.split(".", 2)
        p, group = owners[int(at)][int(i)]
        on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
        device = "cpu" if on_host else p.device
        optimizers[int(at)].state[p][key] = value.detach().to(device, copy=True)

    # Numbers, and the options of the groups
    for at, (optimizer, saved) in enumerate(zip(optimizers, rest, strict=True)):
        for name, value in saved["numbers"].items():
            i, key = name.split(".", 1)
            optimizer.state[owners[at][int(i)][0]][key] = value
        for group, options in zip(optimizer.param_groups, saved["options"], strict=True):
            for key, value in options.items():
                # (JSON has no tuples)
                group[key] = tuple(value) if isinstance(value, list) else value


# ----------------------------------------------------------------------------- what is remembered


@dataclass(frozen=True)
class Decision:
    """One decision, for the log.

    action: up, stay, abort (a trial that ran away); rescue (good weights put back, the rate returned or
    lowered); data (an alarm that was the data's); with the paper's rule also down and rising (the rate
    lowered). before, trial: velocities; error: of their difference, all in loss per step; agreement:
    cosine of the two paths.
    """

    step: int  # of the run, after it
    made: int  # steps executed until then
    action: str
    scale: float  # of the rate, after it
    k: int  # losses compared
    before: float
    trial: float
    error: float
    lost: tuple[int, int]  # first and last + 1 of the executed steps that no longer count
    agreement: float = math.nan


@dataclass
class SearchState:
    """All that the search knows but its two snapshots: what a checkpoint holds, as JSON values."""

    # Where the run is
    step: int = 0  # of the run, which may go back
    made: int = 0  # steps executed

    # The rate: scales known good, of which the last is in force; and the scale now, in a trial another
    kept: list[float] = field(default_factory=lambda: [1.0])
    scale: float = 1.0
    may_raise: bool = True  # no raise was ever undone
    wait: int = 0  # windows to go by before the next trial
    stays: int = 0  # trials in a row that were taken back

    # Losses: of the window in progress, and during a trial of what it is compared with
    losses: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    missing: int = 0  # in a row that were not finite

    # The watch: the level of the loss at the start; the lowest since, or since the data changed; its noise
    first: float | None = None
    level: float | None = None
    sigma: float = 0.0
    spared: bool = False  # missing losses have been put down to chance once

    # A check of the data: the level that raised the alarm (inf: not finite), the scale then, and its end
    alarm: float | None = None
    alarm_scale: float = 1.0
    check_ends: int = 0  # in executed steps

    # The paper's rule: velocity of the last window, highest loss so far, windows in a row that rose
    velocity: float | None = None
    highest: float = -math.inf
    rising: int = 0

    decisions: list[Decision] = field(default_factory=list)


@dataclass
class Snapshot:
    """Bits of parameters, optimizers and others at a step of the run."""

    step: int
    tensors: dict[str, Tensor]
    rest: dict  # JSON values: of optimizers and of others


# ------------------------------------------------------------------------------------- the search


class AdaLRS:
    """`scale` multiplies the schedule's rate; `observe` is called once a step and says where to go on.

    tensors: parameters and buffers to restore; frozen parameters are left alone. others: whatever else
    has a state (state_dict of plain values). k: steps of a window, None for a twentieth of the run.
    window: share of the run in which raises are tried. up, down, decay: a, b and lambda of Eq. 1.
    budget: extra steps, as a share of the run. cautious: with rule="paper", a slower trial is taken back
    and nothing else. Raises ValueError for options that cannot search.
    """

    def __init__(
        self,
        tensors,
        optimizers: list,
        total_steps: int,
        k: int | None = None,
        window: tuple[float, float] = (0.1, 0.4),
        up: float = 3.0,
        down: float = 2.0,
        decay: float = 0.99,
        budget: float = 0.25,
        cautious: bool = False,
        offload: bool = False,
        rule: str = "safe",
        others: tuple = (),
    ):
        # Options that cannot search
        if (k is not None and k < 3) or up <= 1 or down <= 1 or not 0 < decay <= 1:
            raise ValueError(
                f"AdaLRS wants k >= 3, up > 1, down > 1 and 0 < decay <= 1; got {k}, {up}, {down}, {decay}"
            )
        whole = float(up).is_integer() and float(down).is_integer()
        if whole and math.gcd(int(up), int(down)) != 1:
            raise ValueError(
                f"AdaLRS wants co-prime up and down (Eq. 1), so that more rates than powers of one number "
                f"can be reached; got {up:g} and {down:g}"
            )
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r} of AdaLRS; choose from {', '.join(RULES)}")

        self.tensors = [
            t for t in tensors if t.requires_grad or not isinstance(t, torch.nn.Parameter)
        ]
        self.optimizers = optimizers
        self.others = others
        self.up = up
        self.down = down
        self.decay = decay
        self.rule = rule
        self.cautious = cautious
        self.offload = offload

        # All in steps
        self.start = int(window[0] * total_steps)
        self.stop = int(window[1] * total_steps)
        self.k = k or max(10, total_steps // 20)
        self.short = min(self.k, max(5, self.k // 4))  # of a median of the watch, and of a check
        self.budget = int(budget * total_steps)
        self.reserve = min(self.short, self.budget // 5)  # of it, for the watch

        # What changes: the state, and snapshots of both ends of the control (None: the search is over)
        self.state = SearchState()
        start = self._copy()
        self.older: Snapshot | None = start
        self.newer: Snapshot | None = start

    @property
    def scale(self) -> float:
        return self.state.scale

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def made(self) -> int:
        return self.state.made

    @property
    def extra_steps(self) -> int:
        """Executed steps that no longer count."""
        return self.state.made - self.state.step

    @property
    def decisions(self) -> list[Decision]:
        return self.state.decisions

    @property
    def trying(self) -> bool:
        return bool(self.state.control)

    def log(self) -> list[dict]:
        return [asdict(decision) for decision in self.decisions]

    # ----------------------------------------------------------------------------------- one step

    def observe(self, loss: float) -> int:
        """Loss of the step just made (the same number on every rank). Returns the step to go on from."""
        state = self.state
        state.step += 1
        state.made += 1
        if self.older is None:
            return state.step

        # A loss that is not finite belongs to a step that the loop has skipped: one is none
        if abs(loss) < LARGEST:
            state.missing = 0
            state.losses.append(loss)
        else:
            state.missing += 1
        gone = state.missing >= IN_A_ROW

        # A check, a trial, or a window at the present rate
        if state.alarm is not None:
            if gone or state.made == state.check_ends:
                self._conclude()
        elif self.trying:
            self._follow_trial()
        elif gone:
            self._sound_alarm(math.inf)
        elif state.missing == 0:
            self._follow_window()
        return state.step

    # ------------------------------------------------------------------------------------ windows

    def _follow_window(self) -> None:
        """A loss at the present rate: look for harm, and see whether the window is over."""
        state = self.state
        losses = state.losses

        # Harm? (With a raise in force it is looked for at once, else over whole windows.)
        if self.rule == "safe" and len(losses) >= self.short:
            if state.level is None:
                self._set_level(median(losses), losses)
            looks = self.short if len(state.kept) > 1 else self.k
            level = median(losses[-looks:])
            if len(losses) >= looks and level > self._ceiling():
                self._sound_alarm(level)
                return
        if len(losses) < self.k:
            return

        # The window's end is a snapshot, and its start becomes the recovery point
        straight = self._goes_straight()
        state.losses = []
        self.older = self.newer
        self.newer = self._copy()

        # Is the search over, or is it time for a trial?
        if self.rule == "paper":
            ready = self._lower_when_rising(losses)
        else:
            ready = self._wait(losses) and straight
        if state.step >= self.stop and (self.rule == "paper" or state.scale <= 1):
            self.older = self.newer = None
        elif ready and self.start < state.step < self.stop and self._affordable(losses):
            self._begin_trial(losses)

    def _wait(self, losses: list[float]) -> bool:
        """A window passed without alarm. Returns whether it is time for a trial."""
        state = self.state
        level = median(losses)
        lowest = level if state.level is None else min(state.level, level)
        self._set_level(lowest, losses)
        ready = state.wait == 0
        state.wait = max(state.wait - 1, 0)
        return ready and state.may_raise

    def _lower_when_rising(self, losses: list[float]) -> bool:
        """The paper's guard: two windows in a row that rise. Returns whether the descent has slowed down."""
        state = self.state
        velocity, error = fit_line(losses)
        level = mean(losses)

        # Against the window before: is the descent slower, is the level higher?
        doubt = 2 * error + EQUAL * abs(velocity)
        slowed = state.velocity is None or velocity - state.velocity <= doubt
        spread = error * len(losses) / math.sqrt(6)  # error of the difference of two means
        rose = state.level is not None and level > state.level + spread

        state.rising = state.rising + 1 if rose else 0
        state.velocity = velocity
        state.level = level
        state.highest = max(state.highest, *losses)
        if state.rising < 2:
            return slowed

        self._lower()
        state.rising = 0
        state.velocity = None
        self._record("rising", before=velocity, error=error, k=len(losses))
        return False

    def _set_level(self, level: float, losses: list[float]) -> None:
        """What the watch compares with."""
        self.state.level = level
        self.state.sigma = noise(losses)
        if self.state.first is None:
            self.state.first = level

    def _ceiling(self) -> float:
        """What the level may not exceed: about the lowest so far, or the first if no raise is in force.

        A run at the rate that it was given has its ups and downs; only one that does worse than
        untrained is harmed.
        """
        state = self.state
        chance = 8 * state.sigma / math.sqrt(self.short)  # six errors of a median
        fallen = state.first - state.level
        rise = max(chance, 0.1 * fallen, MATTERS * abs(state.first))
        if len(state.kept) > 1:
            return state.level + rise
        return max(state.first, state.level) + rise

    # ------------------------------------------------------------------------------------- trials

    def _affordable(self, control: list[float]) -> bool:
        """Whether the budget has the steps of a trial, and then still those of a check."""
        steps = max(len(control), self.newer.step - self.older.step)
        reserve = self.reserve if self.rule == "safe" else 0
        return self.extra_steps + steps + reserve <= self.budget

    def _begin_trial(self, control: list[float]) -> None:
        self.state.control = control
        self.state.scale = self.state.kept[-1] * self._factor(self.up)
        self._restore(self.older)

    def _follow_trial(self) -> None:
        """A loss of a trial, or a missing one: give up, judge, or go on."""
        state = self.state
        spent = state.made - self.newer.step  # extra steps if the trial is taken back
        if self._runs_away():
            self._give_up("abort", math.nan, math.nan, math.nan)
        elif len(state.losses) == len(state.control):
            self._judge()
        elif spent >= self.budget:  # many of its losses were missing
            self._give_up("stay", math.nan, math.nan, math.nan)

    def _runs_away(self) -> bool:
        """Three losses in a row, missing or above all of the control (paper: one above all so far)."""
        losses = self.state.losses
        if self.state.missing >= IN_A_ROW:
            return True
        if self.rule == "paper":
            return bool(losses) and losses[-1] > self.state.highest
        limit = max(self.state.control) + 2 * self.state.sigma
        return len(losses) >= IN_A_ROW and min(losses[-IN_A_ROW:]) > limit

    def _judge(self) -> None:
        """A trial is over: keep it, or take it back (and, with the paper's rule, lower the rate)."""
        state = self.state
        faster, error = gain(state.control, state.losses)
        agreement, reach = self._compare_paths()

        # Eq. 1, or: a clear gain, or any gain on a straight path, if it matters
        if self.rule == "paper":
            doubt = 2 * error + EQUAL * abs(fit_line(state.control)[0])
            verdict = "up" if faster > doubt else "down" if faster < -doubt else "stay"
        else:
            straight = agreement > AGREEMENT and reach > REACH
            clear = faster > ERRORS * error or (faster > 0 and straight)
            matters = faster * len(state.losses) > MATTERS * abs(state.first)
            verdict = "up" if clear and matters else "stay"

        if verdict == "up":
            self._keep(faster, error, agreement)
        else:
            self._give_up(verdict, faster, error, agreement)

    def _keep(self, faster: float, error: float, agreement: float) -> None:
        """The trial's weights stay, and what it was compared with no longer counts."""
        state = self.state
        losses = state.losses
        begun = state.made - (state.step - self.older.step)
        lost = (begun - (self.newer.step - self.older.step), begun)
        velocity = fit_line(state.control)[0]

        # The rate is in force, its losses are what is normal, its weights are where to return to
        state.kept.append(state.scale)
        state.control = []
        state.losses = []
        state.stays = 0
        state.velocity = velocity + faster
        state.level = min(state.level, median(losses))
        state.sigma = noise(losses)
        self.newer = self._copy()
        self._record("up", velocity, velocity + faster, error, len(losses), lost, agreement)

        # With the safe rule, a further raise starts from the same point: the trial just kept is its control
        if self.rule == "safe" and self._affordable(losses):
            self._begin_trial(losses)

    def _give_up(self, verdict: str, faster: float, error: float, agreement: float) -> None:
        """Back to where the control ended, at the rate before; with the paper's rule at a lower one."""
        state = self.state
        velocity = fit_line(state.control)[0]
        begun = state.made - (state.step - self.older.step)
        compared = len(state.control)
        state.control = []
        state.missing = 0
        state.scale = state.kept[-1]
        self._restore(self.newer)

        # Only the paper's rule lowers
        if verdict == "down" and self.cautious:
            verdict = "stay"
        if self.rule == "paper" and verdict in ("abort", "down"):
            self._lower()
            state.velocity = None

        state.stays += 1
        state.wait = 2**state.stays - 1
        lost = (begun, state.made)
        self._record(verdict, velocity, velocity + faster, error, compared, lost, agreement)

    # ---------------------------------------------------------------------------------- the path

    def _added(self, i: int, begin: Snapshot, end: Snapshot | None) -> Tensor:
        """What was added to a tensor (of a sharded one: its part here) between two snapshots (None: now)."""
        now = parallel.local(self.tensors[i].detach())
        first = parallel.local(begin.tensors[f"t.{i}"]).to(now.device)
        last = now
        if end is not None:
            last = parallel.local(end.tensors[f"t.{i}"]).to(now.device)
        return last.float() - first.float()

    def _compare(self, one: tuple[Snapshot, Snapshot], two: Snapshot) -> tuple[float, float]:
        """The path between two snapshots, and that from a snapshot until now.

        Returns (their cosine, how far the second goes in the first's direction, in lengths of the first).
        """
        product = 0.0
        first = 0.0
        second = 0.0
        for i, tensor in enumerate(self.tensors):
            if tensor.requires_grad:
                a = self._added(i, *one)
                b = self._added(i, two, None)
                share = parallel.share_of(tensor)
                product += share * float((a * b).sum())
                first += share * float(a.square().sum())
                second += share * float(b.square().sum())
        product, first, second = parallel.total_of_parts(product, first, second)
        if not (0 < first < math.inf and 0 < second < math.inf):
            return 0.0, 0.0
        return product / math.sqrt(first * second), product / first

    def _goes_straight(self) -> bool:
        """Whether this window went on where the last one went; the first is taken to."""
        if self.rule == "paper" or self.older.step == self.newer.step:
            return True
        cosine, _ = self._compare((self.older, self.newer), self.newer)
        return cosine > STRAIGHT

    def _compare_paths(self) -> tuple[float, float]:
        """Of what control and trial added to the weights, from the same point: (cosine, reach).

        Reach: how much further the trial went in the control's direction, as a share of what its rate
        was raised by; 1 where the rate is far too low, 0 where more of it leads no further.
        """
        cosine, times = self._compare((self.older, self.newer), self.older)
        raised = self.state.scale / self.state.kept[-1] - 1
        return cosine, (times - 1) / raised if raised > 0 else 0.0

    # ---------------------------------------------------------------------------------- the watch

    def _sound_alarm(self, level: float) -> None:
        """The loss rose to this level (inf: it is missing): put known good weights on the present data."""
        state = self.state
        state.losses = []
        state.missing = 0

        # Back to the step of those weights, if there are steps left to make again
        lost = state.step - self.older.step
        step = self.older.step if self.extra_steps + lost <= self.budget else state.step

        if self.rule == "paper":
            self._restore(self.older, step)
            self._lower()
            self._record("rescue", k=lost, lost=(state.made - lost, state.made))
        elif self.extra_steps + self.short <= self.budget:
            self.newer = self._copy()  # the suspect
            state.alarm = level
            state.alarm_scale = state.scale
            state.check_ends = state.made + self.short
            state.scale = self._safer_scale(level)
            self._restore(self.older, step)
        else:
            self._retreat_unchecked(level)

    def _conclude(self) -> None:
        """The check is over: did the data change, or was the run damaged?"""
        state = self.state
        losses = state.losses
        begun = state.check_ends - self.short

        # Good weights do well if they are nearer to the lowest level than to the alarm's
        if state.level is None:
            ceiling = math.inf
        elif state.alarm == math.inf:
            ceiling = self._ceiling()
        else:
            ceiling = (state.level + state.alarm) / 2
        healthy = bool(losses) and state.missing < IN_A_ROW and median(losses) < ceiling

        # Damage: the good weights stay. The data: back to the suspect, whose level is normal from now on
        if healthy:
            back = self.newer.step + state.made - begun - state.step
            self._admit_harm()
            self.newer = self._copy()
            self._record("rescue", k=len(losses), lost=(begun - back, begun))
        else:
            self._restore(self.newer)
            state.scale = state.alarm_scale
            if state.alarm < math.inf:
                state.first += state.alarm - state.level
                state.level = state.alarm
                state.sigma = max(state.sigma, noise(losses) if len(losses) >= 3 else 0.0)
            self._record("data", k=len(losses), lost=(begun, state.made))

        state.alarm = None
        state.missing = 0
        state.losses = []

    def _retreat_unchecked(self, level: float) -> None:
        """An alarm when the budget is spent: undo the last raise; restore good weights for a missing loss."""
        state = self.state
        state.level = None  # the next losses say what is normal
        if len(state.kept) == 1 and level < math.inf:
            return
        state.scale = self._safer_scale(level)
        self._admit_harm()
        if level == math.inf:
            self._restore(self.older, state.step)
        self._record("rescue")

    def _safer_scale(self, level: float) -> float:
        """The scale to retreat to: that before the last raise; without one a lower one.

        Missing losses may be the data's: the first time, they lower nothing.
        """
        state = self.state
        if len(state.kept) > 1:
            return state.kept[-2]
        if level == math.inf and not state.spared:
            return state.kept[-1]
        return state.kept[-1] / self._factor(self.down)

    def _admit_harm(self) -> None:
        """The retreat stands."""
        state = self.state
        if len(state.kept) > 1:
            state.kept.pop()
            state.may_raise = False
        else:
            state.kept = [state.scale]
            state.spared = True

    # ------------------------------------------------------------------------------ rates and log

    def _factor(self, base: float) -> float:
        """a' or b' of Eq. 1."""
        return max(self.decay ** len(self.decisions) * base, 1.0)

    def _lower(self) -> None:
        self.state.kept[-1] /= self._factor(self.down)
        self.state.scale = self.state.kept[-1]

    def _record(
        self,
        action: str,
        before: float = math.nan,
        trial: float = math.nan,
        error: float = math.nan,
        k: int = 0,
        lost: tuple[int, int] | None = None,
        agreement: float = math.nan,
    ) -> None:
        state = self.state
        lost = lost or (state.made, state.made)
        decision = Decision(
            state.step, state.made, action, state.scale, k, before, trial, error, lost, agreement
        )
        state.decisions.append(decision)

    # ---------------------------------------------------------------------------------- snapshots

    def _copy(self) -> Snapshot:
        state, rest = optimizer_state(self.optimizers)
        views = {f"t.{i}": t.detach() for i, t in enumerate(self.tensors)}
        views |= {f"o.{name}": t for name, t in state.items()}
        tensors = {}
        for name, t in views.items():
            tensors[name] = t.to("cpu" if self.offload else t.device, copy=True)

        # The rest: plain values
        others = [other.state_dict() for other in self.others]
        values = copy.deepcopy({"optimizers": rest, "others": others})
        return Snapshot(self.state.step, tensors, values)

    def _restore(self, snapshot: Snapshot, step: int | None = None) -> None:
        """Everything as it was; the run goes on from the snapshot's step, or from the one given."""
        with torch.no_grad():
            for i, tensor in enumerate(self.tensors):
                tensor.copy_(snapshot.tensors[f"t.{i}"])

        optimizers = {name[2:]: t for name, t in snapshot.tensors.items() if name.startswith("o.")}
        rest = copy.deepcopy(snapshot.rest)
        load_optimizer_state(self.optimizers, optimizers, rest["optimizers"])

        for other, saved in zip(self.others, rest["others"], strict=True):
            other.load_state_dict(saved)
        self.state.step = snapshot.step if step is None else step
        self.state.losses = []

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Everything the search knows, in the middle of a trial too: tensors by name, and JSON values."""
        tensors: dict[str, Tensor] = {}
        values = asdict(self.state)
        for name in ("older", "newer"):
            snapshot = getattr(self, name)
            values[name] = None
            if snapshot is not None:
                tensors |= {f"{name}.{key}": t for key, t in snapshot.tensors.items()}
                values[name] = {"step": snapshot.step, "rest": snapshot.rest}
        return tensors, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict) -> None:
        """The inverse, from values that went through JSON."""
        values = dict(values)
        for name in ("older", "newer"):
            saved = values.pop(name)
            setattr(self, name, None)
            if saved:
                prefix = f"{name}."
                part = {
                    key[len(prefix) :]: t for key, t in tensors.items() if key.startswith(prefix)
                }
                if self.offload:
                    part = {key: t.cpu() for key, t in part.items()}
                setattr(self, name, Snapshot(saved["step"], part, saved["rest"]))

        # A tuple became a list in JSON
        decisions = [Decision(**d | {"lost": tuple(d["lost"])}) for d in values["decisions"]]
        self.state = SearchState(**values | {"decisions": decisions})
