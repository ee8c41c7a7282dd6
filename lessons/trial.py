"""One trial of AdaLRS: `adalrs.py` by hand, on a bowl with noise.

What it teaches: whether a higher rate is faster shows within a few steps, if two runs start from one point.
Twelve steps at the present rate, back to their start, twelve steps at a' times the rate. If the loss fell
faster by more than two errors, the raise is kept; if clearly slower, weights and optimizer go back and the
rate is lowered (Eq. 1); if the loss rises above all that was seen, the trial ends at once.

    loss of step i = (w - s_i)^2 / 2, s_i = noise times a fixed random number     w <- w - rate (w - s_i)
    rate <- a' rate if v(a' rate) > v(rate) + 2e,   rate / b' if v(a' rate) < v(rate) - 2e,   else rate

The numbers here come from the real `AdaLRS` with `rule="paper"`, on a model of one weight, with SGD.
Simplified: the first trial, where a' = a and b' = 1/b (n = 0 adjustments), with a window of 12 steps.
"""

import random

import torch

from adalrs import AdaLRS
from lessons.page import Lesson, Values, controls_row, slider

K = 12  # steps of a window
START = 4.0  # the weight before the first step
# one number a step, the same for every reader
DRAWS = [round(random.Random(f"trial/{i}").gauss(0, 1), 3) for i in range(2 * K)]
TOTAL = 10 * K  # of the run: its budget has room for the trial


def first_trial(given: Values) -> tuple[AdaLRS, list[float]]:
    """The search after its first decision, and the losses until then.

    Raises ValueError for factors that Eq. 1 does not allow.
    """
    weight = torch.full((), START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    search = AdaLRS(
        [weight],
        [optimizer],
        TOTAL,
        k=K,
        window=(0.0, 1.0),
        up=given["up"],
        down=given["down"],
        rule="paper",
    )

    # the loop that any training has
    losses = []
    while not search.decisions:
        optimizer.param_groups[0]["lr"] = 10 ** given["exponent"] * search.scale
        target = given["noise"] * DRAWS[len(losses)]
        loss = (weight - target).square() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        search.observe(losses[-1])
    return search, losses


def trial_numbers(given: Values) -> Values:
    """exponent (of the rate, to the base ten), noise, up and down -> losses, velocities, the verdict."""
    search, losses = first_trial(given)
    decision = search.decisions[0]
    judged = decision.action != "abort"
    return {
        "control": losses[:K],
        "trial": losses[K:],
        "action": decision.action,
        "before": decision.before,
        "after": decision.trial if judged else None,
        "error": decision.error if judged else None,
        "rate": 10 ** given["exponent"] * decision.scale,
    }


EXAMPLE = {"exponent": -2.0, "noise": 0.2, "up": 3, "down": 2}

LESSON = Lesson(
    name="trial",
    title="One trial of AdaLRS",
    teaches="Is a higher learning rate faster? Twelve steps at the present rate, twelve from the "
    "same point at a higher one. Drag the rate: far below 1 the raise is kept, near it nothing is "
    "certain, above it the trial runs away.",
    example=EXAMPLE,
    numbers=trial_numbers,
    controls=(
        controls_row(
            "The run",
            slider("exponent", "learning rate", -3, 0.5, EXAMPLE["exponent"], 0.05, power=True),
            slider("noise", "noise of the data", 0, 2, EXAMPLE["noise"], 0.05),
        ),
        controls_row(
            "The rule",
            slider("up", "raise by a", 2, 5, EXAMPLE["up"]),
            slider("down", "lower by b", 2, 5, EXAMPLE["down"]),
        ),
    ),
    parts=(
        (
            "race",
            "The race",
            "Blue: the loss at the present rate. Ochre: from the same point at the higher one.",
        ),
        ("verdict", "The verdict", "Eq. 1 with this trial's numbers."),
        (
            "theory",
            "Why it works",
            "What one step without noise gains, as a function of the rate: proportional to it "
            "while it is far too low, most at 1, nothing at 2, a loss above.",
        ),
    ),
    source='adalrs.py: AdaLRS with rule="paper", gain, fit_line; the paper\'s Eq. 1 (section '
    '3.2.3). The default rule, "safe", wants more than one witness, and never lowers a rate '
    "because a higher one was slower.",
    data={
        "k": K,
        "start": START,
        "draws": DRAWS,
    },
)
