"""Four tokens are sent to three experts: `moe.py` by hand.

What it teaches: a router is a softmax, of which the best K are kept; their weights are divided by their sum.
The balance loss multiplies how often an expert was chosen (a count, which has no gradient) by the probability
that it was given (which has one), so that probability moves away from the busy expert. It is K where all
experts are used alike.

    logits --softmax--> p --top K--> chosen, weights = p / sum of the chosen p
    f_e = choices of expert e per token     P_e = its mean p     balance = E (f_0 P_0 + f_1 P_1 + f_2 P_2)

Simplified: one layer, one rank. With several ranks f counts the tokens of all.
"""

import torch

from lessons.page import Lesson, Values, controls_row, number_box, slider, tick_box
from moe import balance_loss, entropy, route, tokens_per_expert, z_loss


def routing_numbers(given: Values) -> Values:
    """logits (S, E), k and normalise -> what the layer decides, and its losses.

    Raises ValueError for K = 1 with re-normalisation, as `route` does.
    """
    logits = torch.tensor(given["logits"], dtype=torch.float64)  # (S, E)
    routing = route(logits, given["k"], given["normalise"])
    counts = tokens_per_expert([routing])  # (1, E)
    probabilities = routing.logits.softmax(-1)
    return {
        "probabilities": probabilities.tolist(),
        "chosen": routing.indices.tolist(),
        "weights": routing.weights.tolist(),
        "counts": counts[0].tolist(),
        "f": (counts[0].double() / len(logits)).tolist(),
        "P": probabilities.mean(0).tolist(),
        "balance": float(balance_loss([routing])),
        "entropy": float(entropy(counts.double())[0]),
        "z": float(z_loss([routing])),
    }


EXAMPLE = {
    "logits": [[2.0, 1.0, 0.0], [1.5, 1.2, -0.5], [0.8, 0.3, 0.5], [1.0, -1.0, 0.6]],
    "k": 2,
    "normalise": True,
}


def logit_boxes(token: int) -> str:
    """The row of a token: a number for each expert."""
    boxes = []
    for expert, logit in enumerate(EXAMPLE["logits"][token]):
        boxes.append(number_box(f"logits.{token}.{expert}", f"expert {expert}", -9, 9, logit, 0.1))
    return controls_row(f"Logits of token {token}", *boxes)


LESSON = Lesson(
    name="routing",
    title="Four tokens, three experts",
    teaches="A mixture of experts computes only K of its E feed-forwards for each token. Change "
    "what the router says and see who is chosen, with which weight, and what keeps the others "
    "alive.",
    example=EXAMPLE,
    numbers=routing_numbers,
    controls=(
        *(logit_boxes(token) for token in range(4)),
        controls_row(
            "Rule",
            slider("k", "experts of a token (K)", 1, 3, EXAMPLE["k"]),
            tick_box("normalise", "weights sum to 1", EXAMPLE["normalise"]),
        ),
    ),
    parts=(
        (
            "routed",
            "Who is chosen",
            "Probabilities over all experts; the chosen ones are blue, and their weights stand at the right.",
        ),
        (
            "first",
            "Token 0 by hand",
            "The softmax, the choice, and the division by the sum of what is kept.",
        ),
        (
            "balance",
            "The balance loss",
            "f counts, so it has no gradient; P has one. The loss is K when all experts are used alike.",
        ),
    ),
    source="moe.py: route, balance_loss, z_loss, entropy; objective.py: router_losses; the "
    "paper's section 2.2, which names the loss and gives no formula: this is Qwen3-MoE's.",
)
