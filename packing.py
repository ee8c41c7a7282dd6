"""Stream packing: documents of any length become full rows with equal ViT work, and no document
sees another.

What it teaches: padding is wasted compute, and so is waiting for the rank that got the most
pictures; a buffer of 64 documents is enough to avoid both. Take the oldest document (so that none
waits longer than 64 rows), then choose among the others the subset whose tokens fill the row and
whose ViT work brings it to the stream's mean. That is a subset-sum in two dimensions over big
integers: bit s of `reach[c]` is set when some subset has s tokens and c units of vision. Every rank
aims at the same mean, so their ViTs finish together without a word between them.

    numbered Documents -> Lanes, each a `Rows` (a buffer, exact choice) -> rows -> Step of Batches

What a step weighs is known from its rows, so its pixels need not be there at once: a `Step` makes
its micro-batches one at a time (`laid_out` first, `pictures_of` last). With worker processes all of
it happens ahead of the loop in a process of its own (`StepsAhead`), and the same steps come out.

    python -m bench.packing_rules --example lengths.txt --mix tiles     # stated lengths to try it on
    python -m bench.packing_rules --lengths lengths.txt                 # against simpler rules

Legend: B rows, T tokens a row (the capacity), N images of all rows, L lanes. Source: SAIL-VL2
section 5.1 describes stream packing with a buffer per node and visual packing, and publishes no
rule: oldest first with subset-sum is our choice.
"""

import copy
import functools
import math
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Callable, Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from attention import Segments
from data.ahead import Ahead
from data.images import stacked
from data.sample import BadSample, Document, Faults
from data.stream import DEATHS, Documents
from scale import parallel

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


# -------------------------------------------------------------------------------------------- steps


class Step(Sequence[Batch]):
    """The micro-batches of a step, each made when it is asked for.

    weight: what their losses are divided by, together, known before the first is made. made: rows
    that have documents, of all lanes that this rank reads; after: where those lanes are behind this
    step, as `Batches.state_dict` has it.
    """

    def __init__(
        self, size: int, weight: float, made: int, after: dict, make: Callable[[int], Batch]
    ):
        self.size = size
        self.weight = weight
        self.made = made
        self.after = after
        self.make = make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < self.size:
            raise IndexError(f"micro-batch {i} of {self.size}")
        return self.make(i)


def weight_of(step: Sequence[Batch]) -> float:
    """What this rank's losses of a step weigh; of a `Step` without making its micro-batches."""
    if isinstance(step, Step):
        return step.weight
    return sum(batch.weight for batch in step)


@dataclass(frozen=True)
class Cut:
    """How this rank's rows are cut from the stream: see `Batches`."""

    capacity: int
    rows_per_step: int
    accumulate: int
    pad: int
    rank: int
    ranks: int
    buffer: int
    per_sample: bool
    lanes: int

    def lanes_of_rank(self) -> list[int]:
        """The rows of a rank come around to the same lanes again and again."""
        rows = range(self.rank, self.lanes * self.ranks, self.ranks)
        return sorted({row % self.lanes for row in rows})


class Lanes:
    """The lanes of this rank from row `row` on, each from the start or from its state, and the
    steps that are cut from them: all that needs no other rank.

    Behind their end come steps of empty rows: whether others have rows left, `Batches` asks.
    """

    def __init__(self, documents: Documents, cut: Cut, row: int, states: dict):
        self.documents = documents
        self.cut = cut
        self.row = row
        self.rows: dict[int, Rows] = {}
        for lane in cut.lanes_of_rank():
            share = documents.share(lane, cut.lanes)
            self.rows[lane] = Rows(share, cut.capacity, cut.buffer)
            # go on where the state says
            if str(lane) in states:
                state = states[str(lane)]
                self.rows[lane].waiting = self.read_again(state["waiting"])
                self.rows[lane].seen = list(state["seen"])
                share.go_to(state["next"])

    def read_again(self, numbers: list[int]) -> list[Document]:
        """The documents that waited in a buffer. One that cannot be read any more is a fault."""
        waiting = []
        for number in numbers:
            found = self.documents[number]
            if isinstance(found, Document):
                waiting.append(found)
            elif isinstance(found, BadSample):
                self.documents.faults.add(found)
        return waiting

    def step(self) -> Step:
        """The next step: the rows of these lanes are made, those of this rank are kept."""
        cut = self.cut
        made = 0
        kept: list[list[Document]] = []
        for g in range(self.row, self.row + cut.rows_per_step):
            lane = g % cut.lanes
            row = next(self.rows[lane], []) if lane in self.rows else []
            made += bool(row)
            if g % cut.ranks == cut.rank:
                kept.append(row)
        self.row += cut.rows_per_step

        # in micro-batches, for now without their pictures
        share = len(kept) // cut.accumulate
        groups = [kept[i * share : (i + 1) * share] for i in range(cut.accumulate)]
        plans = [laid_out(group, cut.capacity, cut.pad, cut.per_sample) for group in groups]
        weight = sum(plan.weight for plan in plans)

        def make(i: int) -> Batch:
            return replace(plans[i], images=pictures_of(groups[i]))

        return Step(cut.accumulate, weight, made, self.after(), make)

    def after(self) -> dict:
        """For each lane the next number to read, the numbers that wait in its buffer, two sums."""
        states = {}
        for lane, rows in self.rows.items():
            states[str(lane)] = {
                "next": rows.source.next,
                "waiting": [d.number for d in rows.waiting],
                "seen": list(rows.seen),
            }
        return states

    def close(self) -> None:
        """End the worker processes, if there are any."""
        self.documents.close()


# -------------------------------------------------------------------------------------------- ahead

# Micro-batches that may be made before they are asked for.
MOST_AHEAD = 8


@dataclass
class Opening:
    """What goes before a step's micro-batches on their way from another process: what a `Step`
    holds, and all faults so far."""

    size: int
    weight: float
    made: int
    after: dict
    faults: Faults


def pieces(
    samples: Any, encoder: Any, faults: Faults, workers: int, cut: Cut, row: int, states: dict
) -> Generator[Opening | dict, None, None]:
    """Steps without end, each an Opening and its micro-batches: what the packing process makes. Its
    own worker processes read and decode."""
    documents = Documents(samples, encoder, faults, workers=workers)
    try:
        lanes = Lanes(documents, cut, row, states)
        while True:
            step = lanes.step()
            yield Opening(len(step), step.weight, step.made, step.after, faults.copy())
            for batch in step:
                yield as_arrays(batch)
    finally:
        documents.close(wait=True)


TENSORS = ("ids", "labels", "weights", "positions")


def as_arrays(batch: Batch) -> dict:
    """A Batch as arrays, which travel as bytes; pixels in the order in which they were decoded."""
    images = batch.images
    if isinstance(images, list):
        images = [image.permute(1, 2, 0).numpy() for image in images]  # (H, W, 3)
    elif images is not None:
        images = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    plain = {part.name: getattr(batch, part.name) for part in fields(batch)}
    arrays = {name: plain[name].numpy() for name in TENSORS}
    return plain | arrays | {"segments": batch.segments.lengths, "images": images}


def from_arrays(plain: dict) -> Batch:
    """The inverse of `as_arrays`."""
    images = plain["images"]
    if isinstance(images, list):
        images = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    elif images is not None:
        images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, 3, H, W)
    tensors = {name: torch.from_numpy(plain[name]) for name in TENSORS}
    segments = Segments.of(plain["segments"])
    return Batch(**(plain | tensors | {"segments": segments, "images": images}))


class StepsAhead:
    """The steps of `Lanes`, made ahead of time by another process, which has `workers` of its own.

    Faults are counted when their step is taken. Micro-batches can be taken once and in order; those
    that nobody takes are passed over. A process that dies is replaced, and makes again what is
    missing; raises ValueError when it dies again and again.
    """

    def __init__(self, documents: Documents, workers: int, cut: Cut, row: int, states: dict):
        self.documents = documents
        self.workers = workers
        self.cut = cut
        # where the present step begins, how many of its pieces were taken, and where it ends
        self.row = row
        self.states = states
        self.faults = documents.faults.copy()
        self.taken = 0
        self.opening: Opening | None = None
        self.open()

    def open(self) -> None:
        """A process that begins with the present step; what was taken of it is to be passed over."""
        documents = self.documents
        work = (documents.samples, documents.encoder, self.faults, self.workers)
        make = functools.partial(pieces, *work, self.cut, self.row, self.states)
        self.ahead = Ahead(make, MOST_AHEAD)
        self.again = self.taken

    def step(self) -> Step:
        """The next step, the rest of the present one passed over."""
        present = self.opening
        if present is not None:
            while self.taken <= present.size:
                self.piece()
            self.row += self.cut.rows_per_step
            self.states = present.after
            self.faults = present.faults
            self.taken = 0

        opening = self.piece()
        self.opening = opening
        self.documents.faults.become(opening.faults)
        make = functools.partial(self.micro_batch, self.row)
        return Step(opening.size, opening.weight, opening.made, opening.after, make)

    def micro_batch(self, row: int, i: int) -> Batch:
        """Micro-batch i of the step that begins with that row."""
        assert (row, i + 1) == (self.row, self.taken), "micro-batches come once and in order"
        return from_arrays(self.piece())

    def piece(self) -> Any:
        """The next Opening or micro-batch."""
        for _ in range(DEATHS):
            try:
                while self.again:
                    next(self.ahead)
                    self.again -= 1
                found = next(self.ahead)
            except BrokenProcessPool:
                print("the packing process died and is replaced", file=sys.stderr, flush=True)
                self.ahead.close()
                self.open()
                continue
            self.taken += 1
            return found
        raise ValueError(
            f"--workers {self.workers}: the packing process died {DEATHS} times in a row; is there "
            "memory for it? --workers 0 packs in this process"
        )

    def close(self) -> None:
        """End the process and its workers."""
        self.ahead.close()


# ------------------------------------------------------------------------------------------ batches

# At most so many lanes: a power of two, so that as many ranks share nothing.
LANES = 32


class Batches:
    """An endless iterator over steps: a `Step` of `accumulate` micro-batches of this rank's rows.
    What the loop consumes.

    Row g of the run (g = 0, 1, 2, ...; `rows_per_step` of them are a step) comes from lane g %
    lanes and goes to rank g % ranks. The lanes are a function of `rows_per_step` alone (the largest
    power of two that divides it, at most 32), so the rows of every step are the same for any number
    of ranks that divides them, and for any accumulation, from the first step on. (Plain iterators
    have one lane.) When the documents end, the ranks go on until the last row of all is out; those
    without rows get padding of weight 0, so none waits for another and nothing is lost.

        8 rows, 8 lanes, 2 ranks                         6 rows, 2 lanes, 3 ranks
        row    0 1 2 3 4 5 6 7 | 8 ...                   row    0 1 2 3 4 5 | 6 ...
        lane   0 1 2 3 4 5 6 7 | 0                       lane   0 1 0 1 0 1 | 0
        rank   0 1 0 1 0 1 0 1 | 0                       rank   0 1 2 0 1 2 | 0
        rank 0 reads lanes 0 2 4 6                       every rank reads both lanes and keeps a
                                                         third of the rows

    A rank reads only the lanes of its rows: each record is decoded once while the number of ranks
    divides that of the lanes, and otherwise by each rank that has a part of its lane (`lanes`
    overrides their number).

    per_sample: the loss is divided by the number of documents instead of the sum of their weights
    (`Batch.weight`). workers: processes that read and decode, and one more that packs, ahead of the
    loop (0: all of it here, when a step is asked for; so are streams that have no numbers).

    `state_dict` (called on all ranks together) is small: for each lane the next number to read, the
    numbers that wait in the buffer and two sums. With it, any number of ranks and workers continues
    with exactly the rows that would have followed.

    Raises ValueError when ranks find different numbers of records (they would lose some samples and
    repeat others), when the rows do not divide over ranks and accumulation, and when the data has
    no usable document at all.
    """

    def __init__(
        self,
        documents: Any,
        capacity: int,
        rows_per_step: int,
        accumulate: int,
        pad: int,
        rank: int = 0,
        ranks: int = 1,
        buffer: int = 64,
        lanes: int = 0,
        per_sample: bool = False,
        workers: int = 0,
    ):
        # how a step is cut up: by ranks, then by micro-batches (0: a row at a time)
        check_division(rows_per_step, ranks, accumulate)
        accumulate = accumulate or rows_per_step // ranks
        if not isinstance(documents, Documents):
            documents = Documents(documents, None)
        self.documents = documents
        self.rows_per_step = rows_per_step
        self.workers = workers if documents.numbered else 0
        self.row = 0

        # all ranks must see the same data
        everyone = parallel.gather([self.documents.records])
        if any(records != everyone[0] for records in everyone):
            raise ValueError(
                f"the ranks find different data, {' and '.join(map(str, everyone))} records: "
                "wait until every node has all files"
            )

        usual = math.gcd(rows_per_step, LANES) if self.documents.numbered else 1
        self.cut = Cut(
            capacity,
            rows_per_step,
            accumulate,
            pad,
            rank,
            ranks,
            buffer,
            per_sample,
            lanes or usual,
        )
        self.reader: Lanes | StepsAhead | None = None
        self.open({})

    def open(self, states: dict) -> None:
        """Lanes from the start, or each from its state; here, or in a process of their own."""
        self.close()
        self.mine = self.cut.lanes_of_rank()
        self.after = {}
        for lane in self.mine:
            start = {"next": lane, "waiting": [], "seen": [0, 0]}
            self.after[str(lane)] = states.get(str(lane), start)
        if self.workers:
            self.reader = StepsAhead(self.documents, self.workers, self.cut, self.row, states)
        else:
            self.reader = Lanes(self.documents, self.cut, self.row, states)

    def close(self) -> None:
        """End the processes that read ahead, if there are any."""
        if self.reader is not None:
            self.reader.close()

    @property
    def lanes(self) -> int:
        return self.cut.lanes

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Step:
        step = self.reader.step()
        self.after = step.after
        made = step.made

        # the end: no rank has a row. With all lanes in sight, or without an end, there is nobody to ask
        alone = len(self.mine) == self.lanes or self.documents.endless
        if not alone:
            made = parallel.total(made)[0]
        if not made and self.row == 0:
            raise ValueError(
                f"the data has no usable document\n{self.documents.faults.report()}".rstrip()
            )
        if not made:
            raise StopIteration

        self.row += self.rows_per_step
        return step

    def state_dict(self) -> dict:
        # a lane that several ranks read is in the same state on all of them
        buffers: dict[str, dict] = {}
        for part in parallel.gather([self.after]):
            buffers |= part
        return {
            "row": self.row,
            "lanes": self.lanes,
            "records": self.documents.records,
            "buffers": buffers,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the step has another number of rows, or the data another number of
        records, than when it was saved."""
        # a row number must mean the same as before
        if state["row"] % self.rows_per_step:
            raise ValueError(
                f"the saved run stopped at row {state['row']}, which is no multiple of "
                f"{self.rows_per_step} rows a step"
            )
        # and so must the number of a record
        records = state.get("records", self.documents.records)
        if records != self.documents.records:
            raise ValueError(
                f"the saved run read {records} records, now there are {self.documents.records}: "
                "its place in them means nothing any more; put the files back, or begin again "
                "with --resume false"
            )
        self.row = state["row"]
        self.cut = replace(self.cut, lanes=state["lanes"])
        self.open(state["buffers"])


def check_division(rows: int, ranks: int, accumulate: int) -> None:
    """Raises ValueError for rows of a step that do not divide over ranks and micro-batches, with the
    nearest numbers that do."""
    parts = ranks * max(1, accumulate)
    if rows % parts == 0:
        return
    more = (rows // parts + 1) * parts
    least = max(0, more - parts)
    fitting = [n for n in range(1, rows + 1) if rows % (n * max(1, accumulate)) == 0]
    fewer = [n for n in fitting if n < ranks][-1:]
    further = [n for n in fitting if n > ranks][:1]
    counts = [str(n) for n in (least, more) if n]
    words = [f"--rows {' or '.join(counts)}"]
    if fewer + further:
        words.append(f"{' or '.join(map(str, fewer + further))} ranks")
    cut = f" x {accumulate} accumulation steps" if accumulate else ""
    raise ValueError(
        f"{rows} rows a step do not divide over {ranks} ranks{cut}; the nearest that do: "
        f"{', or '.join(words)}"
    )
