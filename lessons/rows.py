"""Three documents become rows, and none sees another: `packing.py` and `attention.py` by hand.

What it teaches: a row of fixed length is filled with whole documents. Positions begin at 0 in each, labels
never cross from one into the next, attention stays inside; so every document gets exactly what it would get
alone, and hardly a place is empty. The row takes the oldest document first, then those of the others that
fill it best: C may go before B.

    sizes 5 4 3, rows of 8  -->  row 0   A A A A A C C C      row 1   B B B B . . . .
                                         0 1 2 3 4 0 1 2              0 1 2 3 0 1 2 3    positions

Simplified: documents without pictures, so that rows need not share out the ViT's work.
"""

import numpy as np
import torch

from attention import Segments, packed_attention
from data.sample import Document
from lessons.page import Lesson, Values, controls_row, slider
from packing import Rows, laid_out

PAD = -1  # the id on empty places
APART = 100  # between the ids of two documents: token 3 of document 2 is 203


def made_document(number: int, size: int) -> Document:
    """A document whose tokens tell whose they are, and which ask for their successors."""
    ids = APART * number + np.arange(size)
    labels = np.append(ids[1:], -100)
    weights = (labels >= 0).astype(np.float32)
    return Document(ids, labels, weights, (), "text", f"document {number}", {}, number=number)


def equal_weights(segments: Segments) -> list[list[float]]:
    """(S, S) what each position takes from each, all scores being equal.

    Values that are the unit vectors make the weights themselves come out.
    """
    S = sum(segments.lengths)
    scoreless = torch.zeros(S, 1, 1, dtype=torch.float64)
    unit = torch.eye(S, dtype=torch.float64)[:, None]  # (S, 1, S)
    return packed_attention(scoreless, scoreless, unit, segments, causal=True)[:, 0].tolist()


def packing_numbers(given: Values) -> Values:
    """sizes (n,) and capacity -> rows, positions, labels, running sums, attention."""
    sizes = given["sizes"]
    documents = [made_document(number, size) for number, size in enumerate(sizes)]
    rows = list(Rows(iter(documents), given["capacity"]))
    batch = laid_out(rows, given["capacity"], PAD)
    return {
        "rows": [[document.number for document in row] for row in rows],
        "ids": batch.ids.tolist(),
        "positions": batch.positions.tolist(),
        "labels": batch.labels.tolist(),
        "cu": batch.segments.cu.tolist(),
        "filled": batch.filled,
        "alone": sum(sizes) / (len(sizes) * given["capacity"]),
        "weights": equal_weights(batch.segments),
    }


EXAMPLE = {"sizes": [5, 4, 3], "capacity": 8}

LESSON = Lesson(
    name="rows",
    title="Three documents, packed",
    teaches="Documents of any length become full rows. Drag their sizes and see which of them "
    "share a row, where positions begin again, what each token is asked for, and what it may look "
    "at.",
    example=EXAMPLE,
    numbers=packing_numbers,
    controls=(
        controls_row(
            "Tokens of each document",
            *(
                slider(f"sizes.{i}", "ABC"[i], 1, 12, size)
                for i, size in enumerate(EXAMPLE["sizes"])
            ),
        ),
        controls_row("Tokens of a row", slider("capacity", "capacity", 4, 12, EXAMPLE["capacity"])),
    ),
    parts=(
        (
            "packed",
            "The rows",
            "The oldest document that waits goes first; then, of those that still fit, the set "
            "that fills the row best. What is left over is padding, a document of its own that "
            "nobody sees.",
        ),
        (
            "borders",
            "What the model is told",
            "No mask: the lengths of the documents, as their running sum, through all rows.",
        ),
        (
            "attention",
            "What a token may look at",
            "A line is a token that looks, a column one that is looked at. With equal scores, "
            "position p looks at p + 1 tokens and takes 1 / (p + 1) from each: the darker, the "
            "more.",
        ),
    ),
    source="packing.py: Rows, choose_subset, laid_out; attention.py: Segments, packed_attention; "
    "the paper's section 5.1.",
)
