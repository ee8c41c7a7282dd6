"""Stream packing: documents of any length become full rows, and no document sees another.

What it teaches: padding is wasted compute, and a small buffer is enough to avoid it. Take the oldest document (so that none
waits for ever), then choose among the others in the buffer the subset whose lengths fill the rest of the row exactly. The
subset-sum over at most 63 lengths is one big-integer shift per document: bit s of `reach` is set when some subset sums to s.

    Documents -> `rows` (bounded buffer, exact fill) -> `collate` -> Batch(ids, labels, weights, positions, segments, images)

Legend: B rows, T tokens a row (the capacity), N images of all rows. Source: SAIL-VL2 section 5.1 describes stream packing
with a buffer per node and publishes no selection rule: oldest-first with subset-sum is our choice.
Simplified here: the visual balance (equal ViT work per rank) is not yet part of the choice.
"""
from dataclasses import dataclass, field
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from attention import Segments
from data import Document, normalise


@dataclass
class Batch:
    """Everything the model needs for one micro-batch, nothing else.

    ids, labels (B, T) int64 (labels shifted, -100 = ignored); weights (B, T) fp32; positions (B, T) restart per document;
    segments: the documents of all rows (padding is a document of its own); images: (N, 3, H, W), a list, or None;
    owners: per document (row-major) its task. `weight` is the sum of the loss weights, `filled` the share of real tokens.
    """
    ids: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    segments: Segments
    images: Tensor | list[Tensor] | None
    owners: list[str] = field(default_factory=list)
    filled: float = 1.0

    @property
    def weight(self) -> float:
        return float(self.weights.sum())

    def real(self) -> Tensor:
        """(B*T,) bool: positions that belong to a document."""
        lengths = torch.tensor(self.segments.lengths)
        return torch.tensor([o != "padding" for o in self.owners]).repeat_interleave(lengths).to(self.ids.device)

    def to(self, device) -> "Batch":
        if str(device) == "cpu":
            return self
        move = [t.to(device) for t in (self.ids, self.labels, self.weights, self.positions)]
        images = [i.to(device) for i in self.images] if isinstance(self.images, list) else self.images
        images = images.to(device) if torch.is_tensor(images) else images
        return Batch(*move, Segments(self.segments.lengths, self.segments.cu.to(device)), images, self.owners, self.filled)


def fill(lengths: list[int], room: int) -> list[int]:
    """Indices of a subset of `lengths` with the largest sum that is at most `room`: exact subset-sum.

    `reach[i]` holds, as bits of one integer, the sums that the first i lengths can make; walking back recovers the choice.
    """
    mask, reach = (1 << room + 1) - 1, [1]
    for n in lengths:
        reach.append(reach[-1] | (reach[-1] << n) & mask)
        if reach[-1] >> room:
            break  # the exact sum is reachable already
    target, chosen = reach[-1].bit_length() - 1, []
    for i in range(len(reach) - 2, -1, -1):
        if not reach[i] >> target & 1:  # not reachable without item i: it is part of the choice
            chosen.append(i)
            target -= lengths[i]
    return chosen


def rows(documents: Iterator[Document], capacity: int, buffer: int = 64) -> Iterator[list[Document]]:
    """Group a stream into rows of at most `capacity` tokens. Oldest first, so a document waits for at most `buffer` rows.

    Raises ValueError for a document longer than a row (the encoder's `max_length` should have refused it).
    """
    waiting: list[Document] = []
    source, ended = iter(documents), False
    while True:
        while not ended and len(waiting) < buffer:
            document = next(source, None)
            ended = document is None
            if document is not None:
                if len(document) > capacity:
                    raise ValueError(f"{document.origin}: {len(document)} tokens do not fit in a row of {capacity}")
                waiting.append(document)
        if not waiting:
            return
        first, rest = waiting[0], waiting[1:]
        chosen = set(fill([len(d) for d in rest], capacity - len(first)))
        yield [first] + [d for i, d in enumerate(rest) if i in chosen]
        waiting = [d for i, d in enumerate(rest) if i not in chosen]


def collate(group: list[list[Document]], capacity: int | None, pad: int) -> Batch:
    """B rows of documents -> a Batch. capacity None: as long as the longest row."""
    T = capacity or max(sum(map(len, row)) for row in group)
    B = len(group)
    ids, labels = np.full((B, T), pad, np.int64), np.full((B, T), -100, np.int64)
    weights, positions = np.zeros((B, T), np.float32), np.zeros((B, T), np.int64)
    lengths, images, owners, used = [], [], [], 0
    for b, row in enumerate(group):
        at = 0
        for d in row:
            n = len(d)
            ids[b, at:at + n], labels[b, at:at + n], weights[b, at:at + n] = d.ids, d.labels, d.weights
            positions[b, at:at + n] = np.arange(n)
            lengths.append(n)
            images += d.images
            owners.append(d.task)
            at += n
        used += at
        if at < T:
            lengths.append(T - at)
            positions[b, at:] = np.arange(T - at)
            owners.append("padding")
    arrays = (torch.from_numpy(a) for a in (ids, labels, weights, positions))
    return Batch(*arrays, Segments.of(lengths), normalise(images) if images else None, owners, used / (B * T))


def batches(documents: Iterator[Document], capacity: int, rows_per_step: int, accumulate: int, pad: int,
            rank: int = 0, world: int = 1, buffer: int = 64) -> Iterator[list[Batch]]:
    """One list of micro-batches per step. Every rank builds the same rows and keeps its share, so the global batch is the
    same for any number of ranks or accumulation steps."""
    if rows_per_step % (world * accumulate):
        raise ValueError(f"{rows_per_step} rows a step do not divide over {world} ranks x {accumulate} accumulation steps")
    stream, share = rows(documents, capacity, buffer), rows_per_step // (world * accumulate)
    while True:
        step = [row for _, row in zip(range(rows_per_step), stream)]
        if len(step) < rows_per_step:
            return
        mine = step[rank::world]
        yield [collate(mine[i * share:(i + 1) * share], capacity, pad) for i in range(accumulate)]
