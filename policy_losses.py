"""Policy losses: every algorithm of the GRPO family on one page, side by side.

What it teaches: all of them raise log p of what was sampled, weighted by an advantage, and stop
where the policy has moved far from the one that sampled. They differ in four small choices, which
are the columns of `ALGORITHMS`:

    advantage    reward minus what? divided by the group's spread, or not?
    ratio        pi / pi_old per token, per sequence (its geometric mean), or none
    clip         which moves away from ratio 1 lose their gradient
    aggregation  what the sum over tokens is divided by

                 advantage       ratio     clip [1-low, 1+high]       aggregation  source
    reinforce    leave-one-out   none      none                       completions  RLOO, 2402.14740
    ppo          (r - mean)/std  token     0.2 / 0.2                  tokens       1707.06347, no critic
    dual         (r - mean)/std  token     0.2 / 0.2, and r < 3       tokens       1912.09729
    grpo         (r - mean)/std  token     0.2 / 0.2                  sequences    DeepSeekMath, 2402.03300
    dr_grpo      r - mean        token     0.2 / 0.2                  budget       2503.20783
    dapo         (r - mean)/std  token     0.2 / 0.28                 tokens       2503.14476 Eq. 8, 9
    gspo         (r - mean)/std  sequence  3e-4 / 4e-4                sequences    2507.18071 Eq. 5 to 7
    gspo_token   as gspo         sequence  3e-4 / 4e-4                sequences    2507.18071 Eq. 13, 14
    cispo        (r - mean)/std  token     weight bounded, none lost  tokens       2506.13585 Eq. 4, 5

Legend: N completions, L longest completion; logp, old (N, L) under the policy and the one that
sampled; mask (N, L) 1 on sampled tokens, the end token among them; A (N,) one advantage a
completion, or (N, L); r = exp(logp - old).

Each term returns what is *maximised*, per token (N, L), and where its gradient was clipped (N, L).
`aggregate` sums it and `divisor` gives what to divide by; the caller adds divisors up over
micro-batches and ranks first, so that no split of a batch changes a gradient. On the sampling
policy r = 1 and every term's gradient is A, that of REINFORCE.

How to add an algorithm: its term, and a row of `ALGORITHMS`. `rl.py --algorithm NAME` knows it.

Not published by SAIL-VL2, our choice: GSPO's clip range (its own paper's; the [0.20, 0.28] that
SAIL-VL2 states for both would never clip a sequence ratio), CISPO's bound (5, as in ScaleRL;
MiniMax gives none), the spread with n, not n - 1, the bound of a log-ratio (`Bounded`).
"""

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------- advantage


def group_advantage(reward: Tensor, group: int, by_std: bool = True) -> Tensor:
    """(N,) rewards, `group` consecutive completions per prompt -> (N,): (r - mean) / std of each group.

    Source: GRPO; DAPO Eq. 9. A group that agrees gets exactly zero. by_std False leaves the
    difference alone (Dr.GRPO): the division weighs nearly unanimous prompts up.
    """
    r = reward.view(-1, group)
    advantage = r - r.mean(1, keepdim=True)
    if by_std:
        spread = r.std(1, correction=0, keepdim=True)
        advantage = advantage / (spread + 1e-6)

    # The mean of equal numbers may be off by rounding: a group that agrees is set to zero.
    agrees = (r == r[:, :1]).all(1, keepdim=True)
    return advantage.masked_fill(agrees, 0.0).reshape(-1)


def centred(reward: Tensor, group: int) -> Tensor:
    """Dr.GRPO: r - mean. Its expected gradient is (G - 1)/G of the true one: r is in its own mean."""
    return group_advantage(reward, group, by_std=False)


def leave_one_out(reward: Tensor, group: int) -> Tensor:
    """RLOO: r minus the mean of the *others*, an unbiased baseline.

    Raises ValueError for a group of one.
    """
    if group < 2:
        raise ValueError(
            "leave-one-out wants at least two completions per prompt: one has nothing to be compared with"
        )

    # r - mean of all = (r - mean of the others) * (G - 1)/G.
    return centred(reward, group) * group / (group - 1)


def overlong_penalty(length: int, limit: int, soft: int) -> float:
    """DAPO Eq. 13, added to the reward: 0 up to limit - soft tokens, then down to -1 at the limit."""
    allowed = limit - soft
    if soft == 0 or length <= allowed:
        return 0.0
    return max(-1.0, (allowed - length) / soft)


# -------------------------------------------------------------------------------------------- ratio


class Bounded(torch.autograd.Function):
    """A log-ratio held in [-20, 20], so that its exponential is finite; its gradient passes unchanged.

    With the gradient of `clamp`, which is zero outside, nothing would pull a token back that has
    moved that far: neither a negative advantage nor the KL penalty, which is there for it. So the
    *size* of the pull stops growing (at e^20; gradient clipping and `dual` bound it further), and
    its direction stays. Our choice.
    """

    @staticmethod
    def forward(context, log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(-20, 20)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient


def log_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(N, L) log(pi / pi_old), bounded, and zero on padding whatever stands there."""
    # Filled, not multiplied: 0 * inf would be NaN.
    moved = (logp - old).masked_fill(mask == 0, 0.0)
    return Bounded.apply(moved)


def sequence_log_ratio(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(N, 1) mean of the token log-ratios (GSPO Eq. 7).

    The mean, not the sum: otherwise each length would want a clip range of its own, and a few
    tokens would move it.
    """
    tokens = mask.sum(1, keepdim=True).clamp(min=1)  # (N, 1)
    return log_ratio(logp, old, mask).sum(1, keepdim=True) / tokens


def per_token(advantage: Tensor) -> Tensor:
    """(N,) -> (N, 1); (N, L) stays."""
    return advantage if advantage.ndim == 2 else advantage[:, None]


# -------------------------------------------------------------------------------------------- terms


def clipped(ratio: Tensor, A: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r, 1-low, 1+high) A).

    The gradient is lost where the policy has already moved far the way that A asks: A > 0 and
    r > 1+high, or A < 0 and r < 1-low; never on the way back.
    """
    # The smaller of the two promises less: moving further than the clip never looks better.
    bounded = ratio.clamp(1 - low, 1 + high)
    gain = torch.minimum(ratio * A, bounded * A)

    up_far = (A > 0) & (ratio > 1 + high)
    down_far = (A < 0) & (ratio < 1 - low)
    return gain, up_far | down_far


def reinforce(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """A log p. No ratio: right for one update per rollout batch, biased after it."""
    gain = per_token(advantage) * logp
    return gain, torch.zeros_like(logp, dtype=torch.bool)


def ppo(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Clipped token ratios: PPO, and with other advantages and sums GRPO, Dr.GRPO and DAPO.

    Clip-higher (high > low) lets unlikely tokens grow: at 0.2 a token of probability 0.01 may rise
    to 0.012 only.
    """
    ratio = log_ratio(logp, old, mask).exp()
    return clipped(ratio, per_token(advantage), low, high)


def dual(
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    low: float,
    high: float,
    bound: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Dual clip: for A < 0 at least bound * A.

    So a bad token that became much likelier cannot blow the update up.
    """
    ratio = log_ratio(logp, old, mask).exp()
    A = per_token(advantage)
    gain, is_clipped = clipped(ratio, A, low, high)

    # For A < 0 the gain sinks without end as the ratio grows: here it stops.
    floored = torch.maximum(gain, bound * A)
    is_floored = (A < 0) & (ratio > bound)
    return torch.where(A < 0, floored, gain), is_clipped | is_floored


def gspo(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """One ratio per sequence, s = (pi(o) / pi_old(o))^(1/|o|): all its tokens are clipped, or none."""
    assert advantage.ndim == 1, "GSPO has one advantage a completion; gspo_token takes one a token"
    # One ratio and one verdict a completion, the same at each of its tokens.
    ratio = sequence_log_ratio(logp, old, mask).exp()  # (N, 1)
    gain, is_clipped = clipped(ratio, advantage[:, None], low, high)
    return gain.expand_as(logp), is_clipped.expand_as(logp)


def gspo_token(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """s_t = stop(s) pi_t / stop(pi_t): GSPO's value and clipping, and each token's own advantage.

    For equal advantages its gradient is GSPO's, too.
    """
    # The sequence's ratio as a number, and a zero that has the gradient of the token's log p.
    moving = log_ratio(logp, logp.detach(), mask)
    ratio = (sequence_log_ratio(logp, old, mask).detach() + moving).exp()
    return clipped(ratio, per_token(advantage), low, high)


def cispo(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """stop(clip(r)) A log p: the importance weight is bounded, no token's gradient is lost.

    low = 1 means no lower bound.
    """
    # A weight, not a function of the policy: the gradient goes through log p alone.
    ratio = log_ratio(logp, old, mask).exp().detach()
    weight = ratio.clamp(1 - low, 1 + high)
    gain = weight * per_token(advantage) * logp
    return gain, weight != ratio


# -------------------------------------------------------------------------------------- aggregation


def aggregate(values: Tensor, mask: Tensor, aggregation: str) -> Tensor:
    """Sum of per-token values (N, L) over the mask.

    `sequences` first takes the mean inside each completion.
    """
    # Over the tokens of each completion, then over completions.
    total = values.masked_fill(mask == 0, 0.0).sum(1)  # (N,)
    if aggregation == "sequences":
        total = total / mask.sum(1).clamp(min=1)
    return total.sum()


def divisor(mask: Tensor, aggregation: str, budget: int) -> float:
    """What the sum of `aggregate` is divided by, added up over micro-batches and ranks before dividing.

    tokens       every token counts the same, so long completions count more (DAPO, CISPO)
    sequences    every completion counts the same, so a token of a long one counts less (GRPO: long
                 wrong answers get away)
    budget       completions x `budget` tokens, a constant: no length enters (Dr.GRPO)
    completions  the sum of a completion's log-probabilities, averaged: the policy gradient as it is
                 derived (REINFORCE)
    """
    # A completion without a sampled token is no completion (padding of a batch).
    sequences = float((mask.sum(1) > 0).sum())
    return {
        "tokens": float(mask.sum()),
        "sequences": sequences,
        "completions": sequences,
        "budget": sequences * budget,
    }[aggregation]


AGGREGATIONS = ("tokens", "sequences", "budget", "completions")


# ----------------------------------------------------------------------------------------------- KL


def kl_penalty(logp: Tensor, reference: Tensor, mask: Tensor, estimator: str = "k3") -> Tensor:
    """(N, L) estimates of KL(pi || reference) from samples of pi, with l = log pi - log reference.

    As a *value*:

        k1 = l               unbiased, noisy, negative half of the time
        k2 = l^2 / 2         biased a little, small variance
        k3 = e^-l - 1 + l    unbiased, never negative

    As a *loss* (gradient through logp, samples from pi) the expected gradient is another matter: k1
    gives zero, k2 the gradient of KL(pi || reference), k3 that of KL(reference || pi). GRPO uses k3.
    Source: J. Schulman, "Approximating KL divergence"; the gradients are checked by enumeration in
    tests/test_rl.py. Raises ValueError for another estimator.
    """
    l = log_ratio(logp, reference, mask)
    if estimator == "k1":
        return l
    if estimator == "k2":
        return l.square() / 2
    if estimator == "k3":
        return (-l).exp() - 1 + l
    raise ValueError(f"unknown KL estimator {estimator!r}; choose k1, k2 or k3")


# -------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Algorithm:
    """One row of the table above.

    term(logp, old, mask, advantage, low, high) -> (gain (N, L), where it is clipped (N, L)).
    """

    term: Callable[..., tuple[Tensor, Tensor]]
    advantage: Callable[[Tensor, int], Tensor]
    aggregation: str
    low: float
    high: float
    ratio: str = "token"  # what the clip range is about: token, sequence or none


ALGORITHMS = {
    "reinforce": Algorithm(reinforce, leave_one_out, "completions", 0.0, 0.0, "none"),
    "ppo": Algorithm(ppo, group_advantage, "tokens", 0.2, 0.2),
    "dual": Algorithm(dual, group_advantage, "tokens", 0.2, 0.2),
    "grpo": Algorithm(ppo, group_advantage, "sequences", 0.2, 0.2),
    "dr_grpo": Algorithm(ppo, centred, "budget", 0.2, 0.2),
    "dapo": Algorithm(ppo, group_advantage, "tokens", 0.2, 0.28),
    "gspo": Algorithm(gspo, group_advantage, "sequences", 3e-4, 4e-4, "sequence"),
    "gspo_token": Algorithm(gspo_token, group_advantage, "sequences", 3e-4, 4e-4, "sequence"),
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
    aggregation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum to minimise, clip fraction: the share of the sampled tokens that lost their gradient).

    None: the algorithm's own range and aggregation.
    """
    algorithm = ALGORITHMS[name]
    low = algorithm.low if low is None else low
    high = algorithm.high if high is None else high
    gain, is_clipped = algorithm.term(logp, old, mask, advantage, low, high)

    # Of the sampled tokens alone: padding is neither clipped nor counted.
    sampled = mask > 0
    clip_fraction = (is_clipped & sampled).sum() / mask.sum().clamp(min=1)
    return -aggregate(gain, mask, aggregation or algorithm.aggregation), clip_fraction
