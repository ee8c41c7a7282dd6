"""Stream packing: documents of any length become full rows with equal ViT work, and no document
sees another.

What it teaches: padding is wasted compute, and so is waiting for the rank that got the most
pictures; a buffer of 64 documents is enough to avoid both. Take the oldest document (so that none
waits longer than 64 rows), then choose among the others the subset whose tokens fill the row and
whose ViT work brings it to the stream's mean. That is a subset-sum in two dimensions over big
integers: bit s of `reach[c]` is set when some subset has s tokens and c units of vision. Every rank
aims at the same mean, so their ViTs finish together without a word between them.

    Documents -> `Rows` (a buffer, `choose_subset`) -> rows of documents -> `collate` -> Batch

    a row      A A A | B B B B B | C C | . .     documents whole, one after another, then padding
    positions  0 1 2 | 0 1 2 3 4 | 0 1 | 0 1     each begins at 0,
    sees       A     | B         | C   | .       and attention stays inside (`Segments`)

What a batch weighs is known before its pixels are there: `laid_out` is all but the pictures, and
`pictures_of` adds them. Which rank gets which row, and who makes them when, is data/steps.py.

    python -m bench.packing_rules --example lengths.txt --mix tiles     # stated lengths to try it on
    python -m bench.packing_rules --lengths lengths.txt                 # against simpler rules

Legend: B rows, T tokens a row (the capacity), N images of all rows. Source: SAIL-VL2 section 5.1
describes stream packing with a buffer per node and visual packing, and publishes no rule: oldest
first with subset-sum is our choice.
"""

import copy
import functools
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from attention import Segments
from data.images import stacked
from data.sample import Document

# The task of the document that fills up a row.
PADDING = "padding"


@dataclass
class Batch:
    """Everything the model needs for one micro-batch, nothing else.

    ids, labels (B, T) int64 (labels shifted, -100 = ignored); weights (B, T) fp32; positions (B, T)
    restart per document; segments: the documents of all rows (padding is a document of its own);
    images: uint8 (N, 3, H, W), a list, or None; owners: per document (row-major) its task. `filled`
    is the share of real tokens, `count` the number of documents that have something to learn.

    `weight` is what the loss, a sum over tokens, is divided by: the sum of the loss weights, or
    with `per_sample` the number of documents (the paper's Eq. 2 and 3 as they stand).
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    segments: Segments
    images: Tensor | list[Tensor] | None
    owners: list[str] = field(default_factory=list)
    filled: float = 1.0
    count: int = 0
    per_sample: bool = False

    @cached_property
    def weight(self) -> float:
        return float(self.count) if self.per_sample else float(self.weights.sum())

    @cached_property
    def at(self) -> Tensor:
        """(n,) int64: flat positions that have a label."""
        return (self.labels.reshape(-1) >= 0).nonzero()[:, 0]

    @cached_property
    def real_at(self) -> Tensor:
        """(n,) int64: flat positions that belong to a document."""
        return self.real().nonzero()[:, 0]

    def real(self) -> Tensor:
        """(B*T,) bool: positions that belong to a document."""
        lengths = torch.tensor(self.segments.lengths)
        real = torch.tensor([owner != PADDING for owner in self.owners])
        return real.repeat_interleave(lengths).to(self.ids.device, non_blocking=True)

    def to(self, device) -> "Batch":
        """The same on a device, in copies that the host does not wait for.

        What has a size that only the numbers tell (`at`, `real_at`) is worked out before: there,
        each would be a wait for all work that the device has before it.
        """
        if str(device) == "cpu":
            return self
        known_here = (self.weight, self.at, self.real_at)
        assert all(value is not None for value in known_here), "a batch without positions"
        moved = copy.copy(self)
        for name, value in vars(self).items():
            vars(moved)[name] = moved_to(device, value)
        return moved


def moved_to(device, value):
    """A tensor, `Segments` or a list of tensors on a device; anything else as it is."""
    if isinstance(value, list):
        return [moved_to(device, part) for part in value]
    if torch.is_tensor(value):
        return sent(value, device)
    if isinstance(value, Segments):
        return replace(value, cu=sent(value.cu, device))
    return value


def sent(tensor: Tensor, device) -> Tensor:
    """The tensor on its way to a device. From pinned memory nobody waits for the copy: what is
    computed with it there comes after it."""
    if tensor.device.type == "cpu" and can_pin():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@functools.cache
def can_pin() -> bool:
    """Whether the accelerator can read host memory by itself; no accelerator cannot."""
    try:
        torch.empty(1).pin_memory()
    except RuntimeError:
        return False
    return True


# ----------------------------------------------------------------------------------------- choosing

# How much of a buffer's surplus of vision a row takes up: 0 lets it pile up, 1 makes rows as uneven
# as the stream.
GAIN = 0.15
# Vision is counted in about 80ths of what a row should hold, or in tiles when they are fewer.
UNITS = 80
# A row with one percent left empty is as bad as one with 60 percent too much vision.
FILL = 60


def choose_subset(
    sizes: list[tuple[int, int]], room: int, want: float = 0.0, unit: float = 1.0, slack: int = 0
) -> list[int]:
    """Indices of a subset of `sizes` (tokens, vision) with at most `room` tokens: as full as can
    be, vision near `want`.

    Stops at the first subset within `slack` tokens of full and half a unit of `want`; else takes
    the best by `FILL`. Without vision and slack it is exact subset-sum.

    Three items, (3 tokens, 1 tile), (4, 0) and (5, 1), room for 8 tokens, 1 tile wanted. What
    subsets of the items so far can make, by tiles; as an integer, {3, 7} is 1 << 3 | 1 << 7, and to
    add a tile's item is to shift into the next column:

        items so far      reach[0]    reach[1]     reach[2]
        none              {0}
        (3, 1)            {0}         {3}
        (4, 0)            {0, 4}      {3, 7}
        (5, 1)            {0, 4}      {3, 5, 7}    {8}         9 and 12 do not fit, and are masked away

    The best in column 1 is 7. Walking back: 7 could be made without the last item, so that one is
    not part of it; it could not be made without (4, 0), so that one is; 3 are left, which nothing
    makes without (3, 1). Chosen: items 1 and 0.
    """
    # vision in whole units; columns for somewhat more of them than are wanted
    units = [round(vision / unit) for _, vision in sizes]
    want = max(0.0, want / unit)
    columns = int(want) + UNITS // 4 if any(units) else 1
    near = range(1)
    if columns > 1:
        near = range(max(0, math.ceil(want - 0.5)), min(columns, int(want + 0.5) + 1))

    # add item after item; history[i] holds what the first i of them can make
    mask = (1 << room + 1) - 1
    full = max(0, room - slack)
    reach = [1] + [0] * (columns - 1)
    history = [reach]
    good_enough: list[int] = []
    for (tokens, _), vision in zip(sizes, units):
        shifted = [(old << tokens) & mask for old in reach[: max(0, columns - vision)]]
        with_item = [new | old for new, old in zip(reach[vision:], shifted)]
        reach = reach[:vision] + with_item
        history.append(reach)
        good_enough = [c for c in near if reach[c] >> full]
        if good_enough:
            break

    def quality(column: int) -> float:
        tokens = reach[column].bit_length() - 1
        return FILL * tokens / max(room, 1) - abs(column - want) / max(want, 1)

    # the best column, and the most tokens in it
    best = max(good_enough or (c for c in range(columns) if reach[c]), key=quality)
    tokens = reach[best].bit_length() - 1
    if columns > 1 and tokens < 0.98 * room:  # nothing that keeps the balance: then a full row
        return choose_subset([(n, 0) for n, _ in sizes], room)

    # walk back: what is not reachable without item i has it
    chosen = []
    for i in reversed(range(len(history) - 1)):
        if not history[i][best] >> tokens & 1:
            chosen.append(i)
            tokens -= sizes[i][0]
            best -= units[i]
    return chosen


@dataclass
class OpenRow:
    """A row while it is filled: `room` tokens are left, `want` is the vision that it should still
    get."""

    documents: list[Document]
    room: int
    want: float


class Rows:
    """An iterator over rows: lists of documents of at most `capacity` tokens together, from a
    buffer of `buffer` documents.

    A document leaves as the oldest or with an older one, so it waits for at most `buffer` rows.
    When the buffer holds too little to choose from (many short documents), the oldest that fit go
    in first and the buffer is filled up again. Raises ValueError for a document longer than a row
    (the encoder's `max_length` should have refused it).
    """

    def __init__(self, documents: Iterator[Document], capacity: int, buffer: int = 64):
        self.source = iter(documents)
        self.capacity = capacity
        self.buffer = buffer
        self.waiting: list[Document] = []
        # tokens and vision of all documents so far: their ratio is a row's aim
        self.seen = [0, 0]

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> list[Document]:
        self.refill(self.buffer)
        if not self.waiting:
            raise StopIteration

        # 1. what this row should hold
        row = OpenRow([], self.capacity, self.wanted_vision())
        unit = self.unit_of_vision(row.want)

        # 2. the oldest, and more of the oldest while the buffer holds too little to choose from
        fits = self.take(row, [self.waiting[0]])
        while fits and len(self.waiting) >= self.buffer - 1 and sum(map(len, fits)) < 2 * row.room:
            fits = self.take(row, [fits[0]])

        # 3. one of more than half a row: no two of these share a row, so one goes when it can
        largest = max(fits, key=len, default=row.documents[0])
        if fits and 2 * len(largest) > self.capacity and largest.vision <= row.want:
            fits = self.take(row, [largest])

        # 4. the subset of the others that fills the row best
        sizes = [(len(d), d.vision) for d in fits]
        chosen = choose_subset(sizes, row.room, row.want, unit, self.capacity // 2048)
        self.take(row, [fits[i] for i in chosen])
        return row.documents

    def refill(self, most: int) -> None:
        """Read until `most` documents wait."""
        while len(self.waiting) < most:
            # at the end of the stream the buffer runs empty
            document = next(self.source, None)
            if document is None:
                return
            if len(document) > self.capacity:
                raise ValueError(
                    f"{document.origin}: {len(document)} tokens do not fit in a row of {self.capacity}"
                )
            self.waiting.append(document)
            self.seen = [self.seen[0] + len(document), self.seen[1] + document.vision]

    def wanted_vision(self) -> float:
        """A full row at the stream's mean, and a little of what the buffer has too much or too
        little."""
        mean = self.seen[1] / self.seen[0]
        here = sum(d.vision for d in self.waiting) / sum(map(len, self.waiting))
        return self.capacity * (mean + GAIN * (here - mean))

    def unit_of_vision(self, want: float) -> int:
        """Whole tiles, so many that about `UNITS` of them are wanted. At any resolution a tile is
        next to nothing."""
        tile = math.gcd(*(d.vision for d in self.waiting)) or 1
        return tile * max(1, round(want / UNITS / tile))

    def take(self, row: OpenRow, documents: list[Document]) -> list[Document]:
        """Move documents into the row; returns those that wait and still fit, from a full
        buffer."""
        row.documents.extend(documents)
        row.room -= sum(map(len, documents))
        row.want -= sum(d.vision for d in documents)

        # others take their places; the oldest of all is in the row, and counts
        taken = set(map(id, documents))
        self.waiting = [d for d in self.waiting if id(d) not in taken]
        self.refill(self.buffer - 1)
        return [d for d in self.waiting if len(d) <= row.room]


# --------------------------------------------------------------------------------------------- rows


def collate(
    group: list[list[Document]], capacity: int | None, pad: int, per_sample: bool = False
) -> Batch:
    """B rows of documents -> a Batch. capacity None: as long as the longest row."""
    batch = laid_out(group, capacity, pad, per_sample)
    return replace(batch, images=pictures_of(group))


def pictures_of(group: list[list[Document]]) -> Tensor | list[Tensor] | None:
    """All pictures of some rows, in the order of their placeholders; None when there is none."""
    images = [image for row in group for document in row for image in document.images]
    return stacked(images) if images else None


def laid_out(
    group: list[list[Document]], capacity: int | None, pad: int, per_sample: bool = False
) -> Batch:
    """The Batch of `collate` without its pictures: all that is cheap, and all that its weight needs."""
    # empty rows
    B = len(group)
    T = capacity or max(sum(map(len, row)) for row in group)
    ids = np.full((B, T), pad, np.int64)
    labels = np.full((B, T), -100, np.int64)
    weights = np.zeros((B, T), np.float32)
    positions = np.zeros((B, T), np.int64)
    lengths: list[int] = []
    owners: list[str] = []
    for b, row in enumerate(group):
        # the documents one after another, each counting its positions from 0
        at = 0
        for document in row:
            place = slice(at, at + len(document))
            ids[b, place] = document.ids
            labels[b, place] = document.labels
            weights[b, place] = document.weights
            positions[b, place] = np.arange(len(document))
            lengths.append(len(document))
            owners.append(document.task)
            at += len(document)

        # what is left over is a document of its own, that nobody sees
        if at < T:
            positions[b, at:] = np.arange(T - at)
            lengths.append(T - at)
            owners.append(PADDING)

    documents = [document for row in group for document in row]
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        torch.from_numpy(positions),
        Segments.of(lengths),
        None,
        owners,
        filled=sum(map(len, documents)) / (B * T),
        count=sum(bool((document.labels >= 0).any()) for document in documents),
        per_sample=per_sample,
    )
