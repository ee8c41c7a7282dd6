"""AdaLRS: find the learning rate while training, and roll back when a guess was wrong.

What it teaches: the *slope* of the loss curve says whether a rate is too low or too high long before the final loss does. For
one step of gradient descent on an L-smooth loss the expected fall is  rate |g|^2 - (L / 2) rate^2 |g|^2:  convex in the rate,
proportional to it while it is far too low, and largest at 1 / L, which is also where the final loss is lowest (the paper's
claim: loss and velocity share their best rate). So, inside a window of the run, raise the rate, train k steps and look: if
the loss falls faster, keep it; if slower, restore parameters and optimizer and lower the rate instead. Usable with any model
and optimizers, under any schedule; imports only torch.

    search = AdaLRS(model.parameters(), [optimizer], total_steps=1000)
    step = 0
    while step < 1000:
        set the rate to  schedule(step) * search.scale
        ... one optimizer step; `loss` is its value, averaged over all ranks, so that every rank decides alike ...
        step = search.observe(loss)        # usually step + 1; another when the search moved the run back

The update (SAIL-VL2 Eq. 1; v is the velocity, minus the slope of the loss, and e its error):

    rate <- a' rate  if v(a' rate) > v(rate) + 2e        a' = max(decay^n a, 1)
            b' rate  if v(a' rate) < v(rate) - 2e        b' = 1 / max(decay^n b, 1)
            rate     otherwise

**The paper's** (certain): the rule; trying upwards only, when the descent slows down; rolling parameters and optimizer state
back. Its 2e-4 -> 6.75e-4 is three kept raises of 3/2. **From secondary accounts** of AdaLRS (arXiv 2506.13274): velocities by
least squares over k steps, a / b = 3 / 2, decay .99, search within [0.1, 0.4] of the run, give a trial up when its loss exceeds
the highest so far, lower the rate when the loss rises over two windows. **Ours**, because nothing is published:

- *Two runs from one point.* The last k steps at the present rate are the control; the trial starts where they started. So the
  loss's own deceleration cancels, and so does any jump: with d_i = control_i - trial_i, v(a' rate) - v(rate) is the slope of d
  through the origin (least squares), e its standard error. Comparing consecutive windows instead takes a natural slow-down for
  a bad rate and a jump that then falls for a good one. The winner's weights stay: the loser's k steps are what a decision costs.
- *k from the noise.* A raise by a far below the best rate gives d_i = (a - 1) v i. Seeing that at z standard errors takes
      k = (6 z^2 s^2 / ((a - 1) v)^2)^(1/3),    s the noise of one loss, z = 4,
  measured over and over (k=None). A k that is given is used; a warning says when it is too small. Below it every verdict is
  "stay": the search is blind, not wrong.
- *Leaps.* Where even the longest window (a third of the search) is too short to see a raise by a work, the trial is a raise by
  a^2, which gains (a + 1) times as much. It is kept if it is faster; if not, nothing follows from it, the rate stays, and the
  next trial at this rate is an ordinary one.
- *n counts adjustments* (counted in steps, decay .99 would end the search after 110 of them). "Slows down" means that v has not
  clearly risen. A rise counts for the two-window rule when it exceeds its standard error. After a verdict "stay" that was not
  blind the search waits 1, 3, 7, ... windows.
- *Limit.* One noisy loss is no divergence: a trial is given up at the highest loss so far plus two standard deviations.
- *Rescue.* A loss that is not finite, or a window clearly above the run's first, restores the last window's start and lowers
  the rate: a start far too high ends lower, not at NaN. (With velocity alone, a start at 0.2 went to 63.)
- *Cautious* (off: the rule above is the paper's). That three times the rate is too much does not say that the rate is; near the
  best one the rule therefore lowers, and a rate too low costs more than one too high, which the schedule's decay heals. With
  `cautious` a slower trial is taken back and nothing else; only a loss that rises, or a trial that has to be given up, lowers.
- *Budget.* Trials stop before they cost more than a quarter of the run.

`python -m claims.rates` measures all of it.
"""

import math
import warnings
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


def fit_line(losses: list[float]) -> tuple[float, float]:
    """Least squares over equally spaced steps: (velocity = -slope, its standard error), both in loss per step."""
    k = len(losses)
    assert k >= 3, f"a slope and its error need at least 3 points, got {k}"
    x = [i - (k - 1) / 2 for i in range(k)]
    mean, spread = sum(losses) / k, k * (k * k - 1) / 12
    slope = sum(a * b for a, b in zip(x, losses)) / spread
    residual = sum((b - mean - slope * a) ** 2 for a, b in zip(x, losses)) / (k - 2)
    return -slope, math.sqrt(residual / spread)


def gain(control: list[float], trial: list[float]) -> tuple[float, float]:
    """How much faster a trial fell than its control from the same point: (difference of velocities, its standard error)."""
    d = [
        a - b for a, b in zip(control, trial, strict=True)
    ]  # d[0] is noise: both losses precede their first update
    spread = sum(i * i for i in range(len(d)))
    slope = sum(i * y for i, y in enumerate(d)) / spread
    residual = sum((y - slope * i) ** 2 for i, y in enumerate(d)) / (len(d) - 1)
    return slope, math.sqrt(residual / spread)


def noise(losses: list[float]) -> float:
    """Standard deviation of one loss about its line."""
    k = len(losses)
    return fit_line(losses)[1] * math.sqrt(k * (k * k - 1) / 12)


def steps_needed(noise: float, velocity: float, factor: float, z: float = 4.0) -> float:
    """The k at which a raise by `factor`, at a rate far below the best, gains z standard errors (formula above)."""
    return (6 * (z * noise / max((factor - 1) * velocity, 1e-12)) ** 2) ** (1 / 3)


def optimizer_state(optimizers: list) -> tuple[dict[str, Tensor], list[dict]]:
    """All that optimizers hold: tensors by name ("optimizer.parameter.key", views) and the rest as JSON values."""
    tensors, rest = {}, []
    for o, optimizer in enumerate(optimizers):
        numbers, every = {}, [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(every):
            for key, value in optimizer.state.get(p, {}).items():
                if torch.is_tensor(value):
                    tensors[f"{o}.{i}.{key}"] = value
                else:
                    numbers[f"{i}.{key}"] = value
        options = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        rest.append({"numbers": numbers, "options": options})
    return tensors, rest


def load_optimizer_state(optimizers: list, tensors: dict[str, Tensor], rest: list[dict]) -> None:
    """The inverse, exactly: no cast to the parameter's type, nothing shared, state that did not exist then is gone."""
    for o, (optimizer, saved) in enumerate(zip(optimizers, rest, strict=True)):
        optimizer.state.clear()
        owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        for name, value in [(n.split(".", 2), v) for n, v in tensors.items()]:
            if int(name[0]) == o:
                p, group = owners[int(name[1])]
                on_host = name[2] == "step" and not (group.get("fused") or group.get("capturable"))
                optimizer.state[p][name[2]] = value.detach().to(
                    "cpu" if on_host else p.device, copy=True
                )
        for name, value in saved["numbers"].items():
            i, key = name.split(".", 1)
            optimizer.state[owners[int(i)][0]][key] = value
        for group, options in zip(optimizer.param_groups, saved["options"], strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


@dataclass(frozen=True)
class Decision:
    """One adjustment, for the log. step: of the run; made: steps executed until then; action: up, down, stay, abort, rising or
    rescue; scale: of the rate, after it; k: length of the window; before, trial: velocities; error: of their difference;
    lost: first and last + 1 of the executed steps that no longer count."""

    step: int
    made: int
    action: str
    scale: float
    k: int
    before: float
    trial: float
    error: float
    lost: tuple[int, int]


@dataclass
class Snapshot:
    """Bits of parameters and optimizers at a step of the run."""

    step: int
    tensors: dict[str, Tensor]
    rest: list[dict]


class AdaLRS:
    """State machine over windows of k losses. `scale` multiplies the schedule's rate; `observe` is called once a step.

    tensors: parameters (and buffers, if the model has running statistics) to restore; frozen parameters are left alone.
    Holds one snapshot until the search ends (two for a moment when a trial begins); `offload` keeps it in host memory.
    `extra_steps` counts executed steps that no longer count.
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
    ):
        if (k is not None and k < 3) or up <= 1 or down <= 1 or not 0 < decay <= 1:
            raise ValueError(
                f"AdaLRS wants k >= 3, up > 1, down > 1 and 0 < decay <= 1; got {k}, {up}, {down}, {decay}"
            )
        self.tensors = [
            t for t in tensors if t.requires_grad or not isinstance(t, torch.nn.Parameter)
        ]
        self.optimizers, self.up, self.down, self.decay = optimizers, up, down, decay
        self.cautious, self.offload = cautious, offload
        self.start, self.stop = (int(total_steps * share) for share in window)
        self.shortest, self.longest = 10, max(10, (self.stop - self.start) // 3)
        self.given, self.k = k is not None, k or max(10, self.longest // 4)
        self.budget = int(budget * total_steps)
        self.scale, self.step, self.made, self.adjustments, self.extra_steps = 1.0, 0, 0, 0, 0
        self.losses: list[float] = []  # of the window in progress
        self.recent: list[float] = []  # of the last windows at this rate
        self.control: list[float] = []  # during a trial: the losses that it is compared with
        self.before = 1.0  # during a trial: the scale to return to,
        self.limit = math.inf  # and the loss at which to give it up
        self.factor = up  # of the next raise, or of the one on trial
        self.leapt = False  # a leap failed at this rate
        self.first: float | None = None  # mean loss of the first window,
        self.mean: float | None = None  # of the last one,
        self.velocity: float | None = None  # and its velocity
        self.highest = -math.inf
        self.rising = self.stays = self.wait = self.rescues = 0
        self.warned = False
        self.end: Snapshot | None = (
            self._copy()
        )  # where the last window ended and the one in progress began
        self.decisions: list[Decision] = []

    @property
    def trying(self) -> bool:
        return bool(self.control)

    def observe(self, loss: float) -> int:
        """Loss of the step just made (the same number on every rank). Returns the step to go on from."""
        self.step, self.made = self.step + 1, self.made + 1
        if self.end is None or (self.step > self.stop and not self.trying):
            self.end = None  # the search is over
            return self.step
        self.losses.append(loss)
        if self.trying and not loss <= self.limit:  # also catches nan
            self._give_up("abort", math.nan, math.nan)
        elif not math.isfinite(loss):
            self._rescue()
        elif len(self.losses) == (len(self.control) or self.k):
            self._judge() if self.trying else self._consider()
        return self.step

    def _consider(self) -> None:
        """A window at the present rate is over: rescue, lower the rate, start a trial, or go on."""
        window, begin = self.losses, self.end
        (velocity, error), k = fit_line(window), len(window)
        mean, level = (
            sum(window) / k,
            noise(window) * math.sqrt(2 / k),
        )  # level: error of the difference of two means
        if self.first is not None and mean > self.first + 3 * level:
            return self._rescue()
        self.losses, self.end, self.rescues = [], self._copy(), 0
        self.first = mean if self.first is None else self.first
        self.highest = max(self.highest, max(window))
        slowed = self.velocity is None or not velocity > self.velocity + 2 * error + 1e-9 * abs(
            velocity
        )
        self.rising = self.rising + 1 if self.mean is not None and mean > self.mean + level else 0
        self.velocity, self.mean, self.recent = velocity, mean, (self.recent + window)[-3 * k :]
        needed = self._choose_k()
        if not self.start < self.step < self.stop:
            return None
        if self.rising >= 2:
            self.scale /= self._factor(self.down)
            self._record("rising", velocity, math.nan, error, k, 0)
            self.rising, self.recent, self.velocity, self.leapt = 0, [], None, False
        elif self.wait > 0:
            self.wait -= 1
        elif slowed and needed <= 1.5 * k and self.extra_steps + k <= self.budget:
            self.control, self.before, self.scale = window, self.scale, self.scale * self.factor
            self.limit = self.highest + 2 * noise(window)
            self._restore(begin)

    def _choose_k(self) -> float:
        """Sets the next raise and the next window's length from noise and velocity at this rate; returns the length wanted."""
        velocity, error = fit_line(self.recent)
        wanted = lambda factor: steps_needed(noise(self.recent), max(velocity, error), factor)
        most, self.factor = 1.5 * self.k if self.given else self.longest, self._factor(self.up)
        if wanted(self.factor) > most and not self.leapt:
            self.factor **= 2
        needed = wanted(self.factor)
        if not self.given:
            self.k = round(min(max(needed, self.shortest), self.longest))
        elif needed > most and not self.warned and self.start < self.step < self.stop:
            self.warned = True
            warnings.warn(
                f"AdaLRS: k = {self.k} is too small to see a raise by {self.factor:.3g} work: noise "
                f"{noise(self.recent):.2g} a step and velocity {velocity:.2g} want k = {needed:.0f} (or larger batches)",
                stacklevel=4,
            )
        return self.k

    def _judge(self) -> None:
        """A trial is over: keep it, or take it back and lower the rate, or take it back and leave."""
        (faster, error), velocity, k = (
            gain(self.control, self.losses),
            fit_line(self.control)[0],
            len(self.control),
        )
        if faster > 2 * error + 1e-9 * abs(velocity):
            self.recent, self.velocity, self.mean = (
                self.losses,
                velocity + faster,
                sum(self.losses) / k,
            )
            self.losses, self.control, self.stays, self.leapt, self.end = (
                [],
                [],
                0,
                False,
                self._copy(),
            )
            self.extra_steps += k
            self._record("up", velocity, velocity + faster, error, k, k, at=self.made - 2 * k)
        else:
            self._give_up(
                "down" if faster < -2 * error - 1e-9 * abs(velocity) else "stay",
                velocity + faster,
                error,
            )

    def _give_up(self, action: str, velocity: float, error: float) -> None:
        """Back to where the control ended, at the rate before, or at a lower one."""
        before, k, made = fit_line(self.control)[0], len(self.control), len(self.losses)
        leap = self.factor > self._factor(self.up)
        action = "stay" if leap or (self.cautious and action == "down") else action
        self.control, self.scale = [], self.before
        self._restore(self.end)
        self.extra_steps += made
        if action == "stay":
            blind = leap or 2 * error > (self.factor - 1) * before
            self.stays, self.leapt = 0 if blind else self.stays + 1, leap or self.leapt
            self.wait = 2**self.stays - 1
        else:
            self.scale /= self._factor(self.down)
            self.stays, self.recent, self.velocity, self.leapt = 0, [], None, False
        self._record(action, before, velocity, error, k, made)

    def _rescue(self) -> None:
        self.rescues += 1
        if self.rescues > 20:
            raise ValueError(
                f"the loss is not finite or far above its start at {self.scale:.1e} of the first rate, restored "
                f"20 times from step {self.end.step}: not the rate's fault; look at the data and the model"
            )
        made = self.step - self.end.step
        self._restore(self.end)
        self.extra_steps += made
        self.scale /= self._factor(self.down)
        self.recent, self.velocity, self.leapt = [], None, False
        self._record("rescue", math.nan, math.nan, math.nan, made, made)

    def _factor(self, base: float) -> float:
        return max(self.decay**self.adjustments * base, 1.0)

    def _record(
        self,
        action: str,
        before: float,
        trial: float,
        error: float,
        k: int,
        lost: int,
        at: int | None = None,
    ) -> None:
        self.adjustments += 1
        at = self.made - lost if at is None else at
        self.decisions.append(
            Decision(
                self.step, self.made, action, self.scale, k, before, trial, error, (at, at + lost)
            )
        )

    def log(self) -> list[dict]:
        return [asdict(d) for d in self.decisions]

    # ------------------------------------------------------------------------------------------------- snapshots and resume

    def _copy(self) -> Snapshot:
        state, rest = optimizer_state(self.optimizers)
        every = {f"t.{i}": t.detach() for i, t in enumerate(self.tensors)} | {
            f"o.{name}": t for name, t in state.items()
        }
        copied = {
            name: t.to("cpu" if self.offload else t.device, copy=True) for name, t in every.items()
        }
        options = [
            {k: [dict(g) for g in v] if k == "options" else dict(v) for k, v in r.items()}
            for r in rest
        ]
        return Snapshot(self.step, copied, options)

    def _restore(self, s: Snapshot) -> None:
        with torch.no_grad():
            for i, t in enumerate(self.tensors):
                t.copy_(s.tensors[f"t.{i}"])
        load_optimizer_state(
            self.optimizers, {n[2:]: t for n, t in s.tensors.items() if n.startswith("o.")}, s.rest
        )
        self.step, self.losses = s.step, []

    PLAIN = (
        "k",
        "scale",
        "step",
        "made",
        "adjustments",
        "extra_steps",
        "losses",
        "recent",
        "control",
        "before",
        "limit",
        "factor",
        "leapt",
        "first",
        "mean",
        "velocity",
        "highest",
        "rising",
        "stays",
        "wait",
        "rescues",
        "warned",
    )

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Everything the search knows, in the middle of a trial too: tensors by name, and JSON values."""
        values = {name: getattr(self, name) for name in self.PLAIN} | {
            "decisions": self.log(),
            "end": None,
        }
        if self.end is None:
            return {}, values
        return self.end.tensors, values | {"end": {"step": self.end.step, "rest": self.end.rest}}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict) -> None:
        for name in self.PLAIN:
            setattr(self, name, values[name])
        self.decisions = [Decision(**d | {"lost": tuple(d["lost"])}) for d in values["decisions"]]
        self.end = values["end"] and Snapshot(
            values["end"]["step"], dict(tensors), values["end"]["rest"]
        )
