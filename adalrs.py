"""AdaLRS: find the learning rate while training, and roll back when a guess was wrong.

What it teaches: the *slope* of the loss curve says whether a learning rate is too low or too high long before the final loss
does. So, in a window of the run, raise the rate for k steps and look: if the loss falls faster, keep it; if slower, restore
parameters and optimizer as they were and lower the rate instead. Usable with any model and optimizers; imports only torch.

    search = AdaLRS(model.parameters(), [optimizer], total_steps=1000)
    while step < 1000:
        set the rate to  schedule(step) * search.scale
        ... one optimizer step, `loss` its value ...
        step += 1 - search.observe(loss)        # steps to go back: 0, or k after a rollback

The update (SAIL-VL2 Eq. 1; v is the velocity, minus the slope, and e its error):

    rate <- a' rate  if v(a' rate) > v(rate) + 2e        a' = max(decay^n a, 1)
            b' rate  if v(a' rate) < v(rate) - 2e        b' = 1 / max(decay^n b, 1)
            rate     otherwise

From the paper: the rule, trying upwards only, and rolling parameters and optimizer state back. From secondary accounts of
AdaLRS (arXiv 2506.13274): least squares over k steps, a/b = 3/2, decay .99, search within [0.1, 0.4] of the run, give a trial
up when its loss exceeds the historical maximum, lower the rate when the loss rises over two windows. Our choices, not
published: k; e = the standard error of the fitted slope, sigma * sqrt(12 / (k (k^2 - 1))); n counts adjustments; "slowed
down" means that v has not clearly risen; the weights of an undecided trial are restored; and a second guard: a trial is
kept only if its mean loss is below that of the window before (a jump that then falls would read as a high velocity).
"""
import copy
import math
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Decision:
    """One adjustment, for the log: step (of the run), action (up, down, stay, abort, rising), rate scale after it, the two
    velocities and the error that decided it."""
    step: int
    action: str
    scale: float
    before: float
    trial: float
    error: float


def fit(losses: list[float]) -> tuple[float, float]:
    """Least squares over equally spaced steps: (velocity = -slope, its standard error), both in loss per step."""
    k = len(losses)
    assert k >= 3, f"a slope and its error need at least 3 points, got {k}"
    x = [i - (k - 1) / 2 for i in range(k)]
    mean, spread = sum(losses) / k, k * (k * k - 1) / 12
    slope = sum(a * b for a, b in zip(x, losses)) / spread
    residual = sum((b - mean - slope * a) ** 2 for a, b in zip(x, losses)) / (k - 2)
    return -slope, math.sqrt(residual / spread)


class AdaLRS:
    """State machine over windows of k losses. `scale` multiplies the schedule's rate; `observe` is called once a step."""

    def __init__(self, parameters, optimizers: list[torch.optim.Optimizer], total_steps: int, k: int = 10,
                 window: tuple[float, float] = (0.1, 0.4), up: float = 3.0, down: float = 2.0, decay: float = 0.99):
        if k < 3 or up <= 1 or down <= 1 or not 0 < decay <= 1:
            raise ValueError(f"AdaLRS wants k >= 3, up > 1, down > 1 and 0 < decay <= 1; got {k}, {up}, {down}, {decay}")
        self.parameters = [p for p in parameters if p.requires_grad]
        self.optimizers, self.k, self.up, self.down, self.decay = optimizers, k, up, down, decay
        self.start, self.stop = (int(total_steps * share) for share in window)
        self.scale, self.step, self.adjustments, self.extra_steps = 1.0, 0, 0, 0
        self.losses: list[float] = []  # of the window in progress
        self.base: tuple[float, float, float] | None = None  # velocity, error, mean loss of the last window at this rate
        self.previous: float | None = None  # the velocity before that
        self.highest, self.rising = -math.inf, 0
        self.snapshot = None
        self.decisions: list[Decision] = []

    @property
    def trying(self) -> bool:
        return self.snapshot is not None

    def observe(self, loss: float) -> int:
        """Loss of the step just made (the same number on every rank). Returns how many steps to go back."""
        self.step += 1
        if self.step <= self.start or (self.step > self.stop and not self.trying):
            return 0
        self.losses.append(loss)
        if self.trying and not loss <= self.highest:  # also catches nan
            return self._roll_back("abort", -math.inf, self.base[1])
        self.highest = max(self.highest, loss) if not self.trying else self.highest
        if len(self.losses) < self.k:
            return 0
        velocity, error = fit(self.losses)
        mean = sum(self.losses) / self.k
        self.losses = []
        return self._judge(velocity, error, mean) if self.trying else self._consider(velocity, error, mean)

    def _consider(self, velocity: float, error: float, mean: float) -> int:
        """A window at the present rate is over: lower the rate, start a trial, or go on."""
        self.rising = self.rising + 1 if self.base and mean > self.base[2] else 0
        self.previous, self.base = self.base[0] if self.base else None, (velocity, error, mean)
        if self.rising >= 2:
            self.scale /= self._factor(self.down)
            self.rising = 0
            self._record("rising", velocity, math.nan, error)
        elif self.step < self.stop and (self.previous is None or velocity < self.previous + 2 * error):
            self.snapshot = self._copy()
            self.scale *= self._factor(self.up)
        return 0

    def _judge(self, velocity: float, error: float, mean: float) -> int:
        """A trial is over: keep, or roll back and lower, or roll back and leave."""
        before, base_error, base_mean = self.base
        error = max(error, base_error)
        if velocity > before + 2 * error and mean < base_mean:
            self.snapshot, self.base, self.previous = None, (velocity, error, mean), before
            self._record("up", before, velocity, error)
            return 0
        return self._roll_back("down" if velocity < before - 2 * error else "stay", velocity, error)

    def _roll_back(self, action: str, velocity: float, error: float) -> int:
        state, self.scale, at = self.snapshot
        with torch.no_grad():
            for p, saved in zip(self.parameters, state[0]):
                p.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state[1]):
            optimizer.load_state_dict(saved)
        back, self.step, self.snapshot, self.losses = self.step - at, at, None, []
        self.extra_steps += back
        before = self.base[0]
        if action != "stay":
            self.scale /= self._factor(self.down)
        self._record(action, before, velocity, error)
        return back

    def _copy(self):
        state = [p.detach().clone() for p in self.parameters], [copy.deepcopy(o.state_dict()) for o in self.optimizers]
        return state, self.scale, self.step

    def _factor(self, base: float) -> float:
        return max(self.decay ** self.adjustments * base, 1.0)

    def _record(self, action: str, before: float, trial: float, error: float) -> None:
        self.adjustments += 1
        self.decisions.append(Decision(self.step, action, self.scale, before, trial, error))

    def log(self) -> list[dict]:
        return [asdict(d) for d in self.decisions]
