"""A group of completions becomes a gradient: `policy_losses.py` by hand, for four of its algorithms.

What it teaches: four answers to one question get rewards; what counts is how each differs from the group.
Then three choices tell the algorithms apart: what the difference is divided by, how far a token's probability
may move before it loses its gradient, and what the sum over tokens is divided by (so, how much a token of a
long answer counts).

    rewards --(r - mean) / std--> advantages --x ratio, clipped--> gain --/ tokens, ...--> gradient

DAPO differs from GRPO in four places, all on the page: a wider clip upwards, every token counts the same,
groups that agree are not used, and answers near the length limit are punished.

Simplified: all tokens of a completion have the same ratio (so GSPO's, one a sequence, is that ratio, too).
"""

import torch
from torch import Tensor

from lessons.page import Lesson, Values, controls_row, slider, tick_box
from policy_losses import ALGORITHMS, divisor, group_advantage, loss, overlong_penalty

SHOWN = ("grpo", "dr_grpo", "dapo", "gspo")
LIMIT = 12  # tokens that a completion may have: Dr.GRPO's budget
SOFT = 4  # the last of them are punished, where DAPO's penalty is on


def push_of(name: str, rewards: Tensor, lengths: Tensor, ratios: Tensor) -> Values:
    """What an algorithm makes of a group (N,): advantages, who is clipped, the pull on each token's log p."""
    # from ratios to log-probabilities, on as many tokens as each completion has
    algorithm = ALGORITHMS[name]
    advantage = algorithm.advantage(rewards, len(rewards))
    logp = ratios.log()[:, None].repeat(1, LIMIT).requires_grad_()  # (N, L)
    old = torch.zeros_like(logp)
    mask = (torch.arange(LIMIT) < lengths[:, None]).double()

    # the loss as the loop divides it, and its gradient
    total, _ = loss(name, logp, old, mask, advantage)
    divided_by = divisor(mask, algorithm.aggregation, LIMIT)
    (total / divided_by).backward()
    _, clipped = algorithm.term(logp.detach(), old, mask, advantage, algorithm.low, algorithm.high)
    return {
        "advantage": advantage.tolist(),
        "clipped": clipped[:, 0].tolist(),
        "divisor": divided_by,
        "push": (-logp.grad[:, 0]).tolist(),
    }


def group_numbers(given: Values) -> Values:
    """rewards, lengths and ratios (N,), and whether long answers are punished (DAPO) -> all algorithms."""
    rewards = torch.tensor(given["rewards"], dtype=torch.float64)
    lengths = torch.tensor(given["lengths"])
    ratios = torch.tensor(given["ratios"], dtype=torch.float64)
    soft = SOFT if given["overlong"] else 0
    penalties = [overlong_penalty(length, LIMIT, soft) for length in given["lengths"]]
    shaped = rewards + torch.tensor(penalties, dtype=torch.float64)

    algorithms = {}
    for name in SHOWN:
        own = shaped if name == "dapo" else rewards
        algorithms[name] = push_of(name, own, lengths, ratios)
    return {
        "penalties": penalties,
        "agrees": not group_advantage(rewards, len(rewards)).any().item(),
        "algorithms": algorithms,
    }


def algorithm_rows() -> Values:
    """The columns of `ALGORITHMS` that the script needs."""
    rows = {}
    for name in SHOWN:
        algorithm = ALGORITHMS[name]
        rows[name] = {
            "low": algorithm.low,
            "high": algorithm.high,
            "aggregation": algorithm.aggregation,
            "by_std": algorithm.advantage is group_advantage,
        }
    return rows


EXAMPLE = {
    "rewards": [1, 0, 0, 1],
    "lengths": [3, 6, 12, 10],
    "ratios": [1.0, 1.0, 0.9, 1.25],
    "overlong": False,
}


def completion_row(i: int) -> str:
    """What a reader may say about one completion."""
    return controls_row(
        f"Answer {i + 1}",
        slider(f"rewards.{i}", "reward", 0, 1, EXAMPLE["rewards"][i], 0.25),
        slider(f"lengths.{i}", "tokens", 1, LIMIT, EXAMPLE["lengths"][i]),
        slider(f"ratios.{i}", "ratio", 0.5, 1.5, EXAMPLE["ratios"][i], 0.01),
    )


LESSON = Lesson(
    name="group",
    title="A group of answers",
    teaches="Four answers to one question were sampled and rewarded. How hard is each of their "
    "tokens pushed up or down? Change a reward until all agree; make a wrong answer long; let a "
    "ratio pass the clip.",
    example=EXAMPLE,
    numbers=group_numbers,
    controls=(
        *(completion_row(i) for i in range(4)),
        controls_row(
            "DAPO", tick_box("overlong", "punish the last 4 of 12 tokens", EXAMPLE["overlong"])
        ),
    ),
    parts=(
        (
            "advantages",
            "Rewards become advantages",
            "What counts is the difference from the group.",
        ),
        (
            "clips",
            "Ratios are clipped",
            "Only on the way that the advantage asks for, never on the way back.",
        ),
        (
            "pushes",
            "What each token is pushed by",
            "The gradient on the log-probability of one token: green up, red down; "
            "clipped ones have none. The same answers, four ways to add up.",
        ),
        ("dapo", "What DAPO changes", "Each of its four changes, with this group's numbers."),
    ),
    source="policy_losses.py: ALGORITHMS, group_advantage, clipped, divisor, overlong_penalty; "
    "rollout.py: Group.disagrees; the paper's section 4.2.3.",
    data={"algorithms": algorithm_rows(), "limit": LIMIT, "soft": SOFT},
)
