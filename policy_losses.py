"""Policy losses: every algorithm of the GRPO family on one page, side by side.

What it teaches: all of them raise log p of what was sampled, weighted by an advantage, and stop where the policy has moved
far from the one that sampled. They differ in four small choices, which are the columns of `ALGORITHMS`:

    advantage    reward minus what? divided by the group's spread, or not?
    ratio        pi / pi_old per token, per sequence (its geometric mean), or none
    clip         which moves away from ratio 1 lose their gradient
    aggregation  what the sum over tokens is divided by

                 advantage       ratio     clip [1-low, 1+high]       aggregation               source
    reinforce    leave-one-out   none      none                       completions               RLOO, arXiv 2402.14740
    ppo          (r - mean)/std  token     0.2 / 0.2                  tokens                    1707.06347 (less its critic)
    dual         (r - mean)/std  token     0.2 / 0.2, and r < 3       tokens                    1912.09729
    grpo         (r - mean)/std  token     0.2 / 0.2                  sequences                 DeepSeekMath, 2402.03300
    dr_grpo      r - mean        token     0.2 / 0.2                  budget                    2503.20783
    dapo         (r - mean)/std  token     0.2 / 0.28                 tokens                    2503.14476 Eq. 8 and 9
    gspo         (r - mean)/std  sequence  3e-4 / 4e-4                sequences                 2507.18071 Eq. 5 to 7
    gspo_token   as gspo         sequence  3e-4 / 4e-4                sequences                 2507.18071 Eq. 13 and 14
    cispo        (r - mean)/std  token     weight bounded, none lost  tokens                    2506.13585 Eq. 4 and 5

Legend: N completions, L longest completion; logp, old (N, L) under the policy and the one that sampled; mask (N, L) 1 on
sampled tokens, the end token among them; A (N,) one advantage a completion, or (N, L); r = exp(logp - old).
Each term returns what is *maximised*, per token (N, L), and where its gradient was clipped (N, L). `aggregate` sums it and
`divisor` gives what to divide by; the caller adds divisors up over micro-batches and ranks first, so that no split of a batch
changes a gradient. On the sampling policy r = 1 and every term's gradient is A, that of REINFORCE.

Not published by SAIL-VL2, our choice: GSPO's clip range (its own paper's; the [0.20, 0.28] that SAIL-VL2 states for both
would never clip a sequence ratio), CISPO's bound (5, as in ScaleRL; MiniMax gives none), the spread with n, not n - 1.
"""

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

# -------------------------------------------------------------------------------------------------------------- advantage


def group_advantage(reward: Tensor, group: int, by_std: bool = True) -> Tensor:
    """(N,) rewards, `group` consecutive completions per prompt -> (N,): (r - mean) / std inside each group (GRPO; DAPO
    Eq. 9). A group that agrees gets exactly zero. by_std False leaves the difference alone (Dr.GRPO): the division weighs
    nearly unanimous prompts up."""
    r = reward.view(-1, group)
    centred = r - r.mean(1, keepdim=True)
    if by_std:
        centred = centred / (r.std(1, correction=0, keepdim=True) + 1e-6)
    centred = centred.masked_fill(
        (r == r[:, :1]).all(1, keepdim=True), 0.0
    )  # a mean of equal numbers may be off by rounding
    return centred.reshape(-1)


def centred(reward: Tensor, group: int) -> Tensor:
    """Dr.GRPO: r - mean. Its expected gradient is (G - 1)/G of the true one, as the mean contains r itself."""
    return group_advantage(reward, group, by_std=False)


def leave_one_out(reward: Tensor, group: int) -> Tensor:
    """RLOO: r minus the mean of the *others*, an unbiased baseline. Raises ValueError for a group of one."""
    if group < 2:
        raise ValueError(
            "leave-one-out wants at least two completions per prompt: with one there is nothing to compare"
        )
    return centred(reward, group) * group / (group - 1)


def overlong_penalty(length: int, limit: int, soft: int) -> float:
    """DAPO Eq. 13, added to the reward: 0 up to limit - soft tokens, then linearly down to -1 at the limit."""
    return 0.0 if soft == 0 or length <= limit - soft else max(-1.0, (limit - soft - length) / soft)


# ------------------------------------------------------------------------------------------------------------------ ratio


def log_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(N, L) log(pi / pi_old), zero on padding whatever stands there, bounded so that its exponential is finite."""
    return (logp - old).masked_fill(mask == 0, 0.0).clamp(-20, 20)


def sequence_log_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(N, 1) mean of the token log-ratios. The mean, not the sum: otherwise each length would want a clip range of its own,
    and a few tokens would move it (GSPO Eq. 7)."""
    return log_ratio(logp, old, mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def per_token(advantage: Tensor) -> Tensor:
    return advantage if advantage.ndim == 2 else advantage[:, None]


# ------------------------------------------------------------------------------------------------------------------ terms


def clipped(ratio: Tensor, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r, 1-low, 1+high) A). The gradient is lost where the policy has already moved far the way that A asks:
    A > 0 and r > 1+high, or A < 0 and r < 1-low; never on the way back."""
    gain = torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    return gain, (A > 0) & (ratio > 1 + high) | (A < 0) & (ratio < 1 - low)


def reinforce(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """A log p. No ratio: right for one update per rollout batch, biased after it."""
    return per_token(advantage) * logp, torch.zeros_like(logp, dtype=torch.bool)


def ppo(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Clipped token ratios: PPO, and with other advantages and sums GRPO, Dr.GRPO and DAPO. Clip-higher (high > low) lets
    unlikely tokens grow: at 0.2 a token of probability 0.01 may rise to 0.012 only."""
    return clipped(log_ratio(logp, old, mask).exp(), per_token(advantage), low, high)


def dual(
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    low: float,
    high: float,
    bound: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Dual clip: for A < 0 at least bound * A, so that a bad token that became much likelier cannot blow the update up."""
    ratio, A = log_ratio(logp, old, mask).exp(), per_token(advantage)
    gain, cut = clipped(ratio, A, low, high)
    return torch.where(A < 0, torch.maximum(gain, bound * A), gain), cut | (A < 0) & (ratio > bound)


def gspo(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """One ratio per sequence, s = (pi(o) / pi_old(o))^(1/|o|): all its tokens are clipped together or none."""
    assert advantage.ndim == 1, "GSPO has one advantage a completion; gspo_token takes one a token"
    gain, cut = clipped(sequence_log_ratio(logp, old, mask).exp(), advantage[:, None], low, high)
    return gain.expand_as(logp), cut.expand_as(logp)


def gspo_token(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """s_t = stop(s) pi_t / stop(pi_t): GSPO's value, clipping and (for equal advantages) gradient, but each token may have
    an advantage of its own."""
    moving = log_ratio(logp, logp.detach(), mask)  # zero, with the gradient of log p
    ratio = (sequence_log_ratio(logp, old, mask).detach() + moving).exp()
    return clipped(ratio, per_token(advantage), low, high)


def cispo(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """stop(clip(r)) A log p: the importance weight is bounded, no token's gradient is lost. low = 1 means no lower bound."""
    ratio = log_ratio(logp, old, mask).exp().detach()
    weight = ratio.clamp(1 - low, 1 + high)
    return weight * per_token(advantage) * logp, weight != ratio


# ------------------------------------------------------------------------------------------------------------ aggregation


def aggregate(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """Sum of per-token values (N, L) over the mask; `sequences` first takes the mean inside each completion."""
    total = values.masked_fill(mask == 0, 0.0).sum(1)
    return (total / mask.sum(1).clamp(min=1) if how == "sequences" else total).sum()


def divisor(mask: Tensor, how: str, budget: int) -> float:
    """What the sum of `aggregate` is divided by, to be added up over micro-batches and ranks before dividing:

    tokens       every token counts the same, so long completions count more (DAPO, CISPO)
    sequences    every completion counts the same, so a token of a long one counts less (GRPO: long wrong answers get away)
    budget       completions x `budget` tokens, a constant: no length enters (Dr.GRPO)
    completions  the sum of a completion's log-probabilities, averaged: the policy gradient as it is derived (REINFORCE)
    """
    sequences = float((mask.sum(1) > 0).sum())
    return {
        "tokens": float(mask.sum()),
        "sequences": sequences,
        "completions": sequences,
        "budget": sequences * budget,
    }[how]


AGGREGATIONS = ("tokens", "sequences", "budget", "completions")


# --------------------------------------------------------------------------------------------------------------------- KL


def kl_penalty(logp: Tensor, reference: Tensor, mask: Tensor, estimator: str = "k3") -> Tensor:
    """(N, L) estimates of KL(pi || reference) from samples of pi, with l = log pi - log reference. As a *value*:

        k1 = l               unbiased, noisy, negative half of the time
        k2 = l^2 / 2         biased a little, small variance
        k3 = e^-l - 1 + l    unbiased, never negative

    As a *loss* (gradient through logp, samples from pi) the expected gradient is another matter: k1 gives zero, k2 the
    gradient of KL(pi || reference), k3 that of KL(reference || pi). GRPO uses k3. Source: J. Schulman, "Approximating KL
    divergence"; the gradients are checked by enumeration in tests/test_rl.py.
    """
    l = log_ratio(logp, reference, mask)
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"unknown KL estimator {estimator!r}; choose k1, k2 or k3")
    return {"k1": lambda: l, "k2": lambda: l.square() / 2, "k3": lambda: (-l).exp() - 1 + l}[
        estimator
    ]()


# ------------------------------------------------------------------------------------------------------------------ table


@dataclass(frozen=True)
class Algorithm:
    """One row of the table above. term(logp, old, mask, advantage, low, high) -> (gain (N, L), clipped (N, L))."""

    term: Callable[..., tuple[Tensor, Tensor]]
    advantage: Callable[[Tensor, int], Tensor]
    aggregation: str
    low: float
    high: float


ALGORITHMS = {
    "reinforce": Algorithm(reinforce, leave_one_out, "completions", 0.0, 0.0),
    "ppo": Algorithm(ppo, group_advantage, "tokens", 0.2, 0.2),
    "dual": Algorithm(dual, group_advantage, "tokens", 0.2, 0.2),
    "grpo": Algorithm(ppo, group_advantage, "sequences", 0.2, 0.2),
    "dr_grpo": Algorithm(ppo, centred, "budget", 0.2, 0.2),
    "dapo": Algorithm(ppo, group_advantage, "tokens", 0.2, 0.28),
    "gspo": Algorithm(gspo, group_advantage, "sequences", 3e-4, 4e-4),
    "gspo_token": Algorithm(gspo_token, group_advantage, "sequences", 3e-4, 4e-4),
    "cispo": Algorithm(cispo, group_advantage, "tokens", 1.0, 4.0),
}


def loss(
    name: str,
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    low: float | None = None,
    high: float | None = None,
    how: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum to minimise, share of the tokens that were clipped). None: the algorithm's own range and aggregation."""
    a = ALGORITHMS[name]
    gain, cut = a.term(
        logp, old, mask, advantage, a.low if low is None else low, a.high if high is None else high
    )
    return -aggregate(gain, mask, how or a.aggregation), (
        cut & (mask > 0)
    ).sum() / mask.sum().clamp(min=1)
