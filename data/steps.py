"""Steps: packed rows dealt out to ranks and micro-batches, the same for any number of either.

What it teaches: who computes a row must not decide which rows there are. So the stream is divided
into lanes, as many as the rows of a step allow and never by the number of ranks; each lane packs its
own share of the documents (packing.py), and row g of the run goes to rank g modulo the ranks. A run
may then stop on 8 ranks and go on with 4: the same rows follow, from a state of a few numbers a lane.

    numbered Documents -> Lanes, each a `Rows` of packing.py -> rows -> Step: micro-batches of one rank

What a step weighs is known from its rows, so its pixels need not be there at once: a `Step` makes
its micro-batches one at a time. Without worker processes that happens when the loop asks. With them
it happens ahead of the loop, in a process of its own, and the same steps come out:

    here, the loop                         `Batches` <- `StepsAhead` <- Opening, micro-batch, ..
    a process that packs (data/ahead.py)   `pieces`: `Lanes` -> `Step` -> as arrays ----^
    its workers (data/stream.py)           `Documents`: read, decode, encode

`Batches` stands in front of both: it alone asks other ranks, for whether any of them has a row left.
Source: our choice; SAIL-VL2 section 5.1 says no more than a buffer per node.
"""

import functools
import math
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Generator, Sequence

import torch

from attention import Segments
from data.ahead import Ahead
from data.sample import BadSample, Document, Faults
from data.stream import DEATHS, Documents
from packing import Batch, Rows, laid_out, pictures_of
from scale import parallel

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

# Micro-batches that may be made before they are asked for: our choice.
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
