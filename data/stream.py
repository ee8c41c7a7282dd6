"""Streams that can be stopped anywhere: sample n is a pure function of the seed and n.

What it teaches: a data loader needs no hidden state. If sample n can be asked for by its number, a
reader's whole state is the next number; any worker process may prepare any number; and the count of
ranks decides who reads a sample, never which samples there are. Shuffling, mixing and epochs are
arithmetic on n.

    Order[n] -> record (a mixture of groups, each shuffled anew every epoch) -> Sample
    Mapped[n] = function(Sample): another question, a chain, or None where it has nothing for the stage
    Documents[n]: encoded
    Documents.share(l, L): numbers l, l + L, l + 2L, ... for lane l of L, faults counted

A stream is anything with `stream[n]` -> Sample | BadSample | None (nothing there), `EndOfStream` at
its end, and `endless`. One record costs one record: whatever goes wrong while it is read, rendered
or encoded is its fault, counted with the first traceback, and reading goes on. A stream that yields
nothing is an error within seconds, never a wait.

Exact resume: with the state of `steps.Batches`, every later step has the same rows in the same
order as without the stop, bit for bit, for any number of ranks and workers; only which rank holds a
row changes. Lanes make it so: their number is part of the state, and each has its own share of the
stream, its own buffer, its own rows.

Sources: "elastic determinism" as MosaicML Streaming calls it; SAIL-VL2 section 5.1 says "a buffer
per node" and no more.
"""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any, Callable, Iterable

import numpy as np
import torch

from data.encode import Encoder
from data.remote import StoreError
from data.sample import BadSample, Document, Faults, Sample
from infra.text import printable

# The order: draws of the mixture that are made together, records that are read in a row, and records
# that are shuffled among each other.
BLOCK = 1 << 16
RUN = 1024
WINDOW = 8192

# How long silence may last, in numbers in a row: with nothing for the stage, or of groups whose epochs
# are over; and how many worker processes may die in a row without a document.
SILENCE = 10_000
USED_UP = 1_000_000
DEATHS = 10


class EndOfStream(IndexError):
    """There is no such number any more. Only streams raise it: an IndexError of a decoder is a
    fault like any other."""


# ------------------------------------------------------------------------------------------ streams


class Patience:
    """Counts what cannot be used, and decides when silence has lasted too long.

    Raises ValueError when, since the last usable sample, there were `most` faults, or `SILENCE`
    numbers with nothing for the stage, or every record was tried.
    """

    def __init__(self, faults: Faults, most: int = 1000):
        self.faults = faults
        self.most = most
        self.tried: set[tuple[int, int]] = set()
        self.start()

    def start(self) -> None:
        """A usable sample makes patient again."""
        self.bad = 0
        self.empty = 0
        self.used_up = 0
        self.first_empty: int | None = None
        self.tried.clear()

    def accepts(self, found: Any, number: int, stream: Any) -> bool:
        """Whether this is something to use; what is not is counted."""
        if found is not None and not isinstance(found, BadSample):
            self.start()
            return True

        # which record it was, if the stream has an order
        order = getattr(stream, "order", None)
        record = order[number] if order is not None else None
        if record is not None:
            self.tried.add(record)

        if found is not None:
            self.count_fault(found)
        elif order is not None and record is None:
            self.count_used_up()
        else:
            self.count_empty(number, stream)
        return False

    def count_fault(self, fault: BadSample) -> None:
        self.bad += 1
        self.faults.add(fault)
        if self.bad >= self.most:
            raise ValueError(
                f"{self.bad} samples in a row cannot be used\n{self.faults.report()}"
            ) from fault

    def count_used_up(self) -> None:
        """A group whose epochs are over keeps its share of the numbers: they say nothing about what
        the other groups hold."""
        self.used_up += 1
        if self.used_up >= USED_UP:
            raise ValueError(
                f"{self.used_up} draws in a row fell on data whose epochs are over: "
                "what is left has next to no weight"
            )

    def count_empty(self, number: int, stream: Any) -> None:
        self.empty += 1
        if self.first_empty is None:
            self.first_empty = number

        # small data is known by heart soon, of large data a part must do
        order = getattr(stream, "order", None)
        all_tried = order is not None and len(self.tried) == order.drawable
        if self.empty < SILENCE and not all_tried:
            return
        wanted = getattr(stream, "wanted", "") or "something for this stage"
        example = describe(stream, self.first_empty)
        raise ValueError(
            f"{self.empty} samples in a row do not have {wanted}; the first: {example}\n"
            f"{self.faults.report()}".rstrip()
        )


class Stream:
    """The common part: subclasses give `[n]`, and iterating passes over what cannot be used,
    counting it in `faults`.

    `at` is the number that will be asked for next: all the state that iterating has (`go_to`).
    """

    endless = False
    # any number at any time; False: rising numbers only
    numbered = True

    def __init__(self, faults: Faults | None = None):
        self.faults = Faults() if faults is None else faults
        self.at = 0
        self.patience = Patience(self.faults)

    def __getitem__(self, n: int) -> Sample | BadSample | None:
        raise NotImplementedError

    def __iter__(self) -> "Stream":
        return self

    def go_to(self, number: int) -> None:
        """The next sample is this one, or the first usable one after it."""
        self.at = number

    def __next__(self) -> Sample:
        while True:
            try:
                found = read_sample(self, self.at)
            except EndOfStream:
                raise StopIteration from None
            self.at += 1
            if self.patience.accepts(found, self.at - 1, self):
                return found


class Drawn(Stream):
    """An endless stream of samples from a function of the number."""

    endless = True

    def __init__(self, draw: Callable[[int], Sample], faults: Faults | None = None):
        super().__init__(faults)
        self.draw = draw

    def __getitem__(self, n: int) -> Sample:
        return self.draw(n)


class Listed(Stream):
    """A list as a stream that ends with it."""

    def __init__(self, samples: Any, faults: Faults | None = None):
        super().__init__(faults)
        self.samples = samples

    def __getitem__(self, n: int) -> Any:
        if n >= len(self.samples):
            raise EndOfStream(n)
        return self.samples[n]


class Walk(Stream):
    """Any iterator as a function of rising n. To resume it is walked again from its start, without
    encoding.

    An iterator that raises is over, so its exceptions are not counted as faults of a record, but
    passed on.
    """

    numbered = False

    def __init__(self, iterator: Iterable, faults: Faults | None = None):
        super().__init__(faults)
        self.iterator = iter(iterator)
        self.position = 0

    def __getitem__(self, n: int) -> Any:
        assert n >= self.position, (
            f"an iterator cannot go back from {self.position} to {n}; load the state into a new one"
        )
        for item in self.iterator:
            self.position += 1
            if self.position > n:
                return item
        raise EndOfStream(n)


class Mapped(Stream):
    """Another stream with a function over its samples: sample -> sample, or None when it has
    nothing for the stage.

    Numbers, records and end are the other stream's, so that resuming, lanes and workers stay exact
    (worker processes need a function that can be pickled: one of a module, or a `functools.partial`
    of one). A BadSample that the function raises, or any other exception, is a fault of that
    sample. wanted: what the function looks for, as words after "do not have", for the error when
    there is none.
    """

    def __init__(
        self,
        stream: Any,
        function: Callable[[Sample], Sample | None],
        wanted: str = "",
        faults: Faults | None = None,
    ):
        self.stream = as_stream(stream)
        super().__init__(getattr(self.stream, "faults", None) if faults is None else faults)
        self.function = function
        self.wanted = wanted

        # what readers and `Batches` ask a stream about is answered by the one below
        self.endless = self.stream.endless
        self.numbered = getattr(self.stream, "numbered", True)
        if hasattr(self.stream, "order"):
            self.order = self.stream.order

    def __getitem__(self, n: int) -> Sample | BadSample | None:
        found = self.stream[n]
        if not isinstance(found, Sample):
            return found
        try:
            return self.function(found)
        except Exception as error:
            return fault_of(error, found.origin)


def as_stream(samples: Any) -> Any:
    """A stream as it is; a list, or a plain iterator, as one."""
    if hasattr(samples, "__getitem__") and hasattr(samples, "endless"):
        return samples
    if hasattr(samples, "__getitem__"):
        return Listed(samples)
    return Walk(samples)


def read_sample(stream: Any, n: int) -> Any:
    """stream[n]; any exception but the stream's end becomes a fault of that record."""
    # an iterator that raised cannot be asked again: its exception is not one record's
    if not getattr(stream, "numbered", True):
        return stream[n]
    try:
        return stream[n]
    except EndOfStream:
        raise
    except Exception as error:
        return fault_of(error, f"sample {n} of the stream")


def fault_of(error: Exception, origin: str) -> BadSample:
    """An exception as a fault; one that nobody foresaw brings its traceback, for `Faults` to keep
    the first of."""
    if isinstance(error, BadSample):
        return error
    # of a store that is away, no record is guilty
    if isinstance(error, StoreError):
        raise error
    kind = type(error).__name__
    fault = BadSample(f"unexpected {kind}", f"{origin}: {error}"[:300])
    fault.traceback = "".join(traceback.format_exception(error))
    return fault


def describe(stream: Any, n: int) -> str:
    """Sample n in a few words, as it is before a function says that it has nothing."""
    while isinstance(stream, Mapped):
        stream = stream.stream
    sample = read_sample(stream, n) if getattr(stream, "numbered", True) else None
    if not isinstance(sample, Sample):
        return f"sample {n} of the stream"

    # enough to see what is missing
    roles = ", ".join(m.role for m in sample.messages)
    facts = ", ".join(map(str, sample.facts)) or "none"
    return printable(f"{sample.origin or f'sample {n}'} (turns: {roles}; facts: {facts})")


# -------------------------------------------------------------------------------------------- order


class Order:
    """Which record is number n: `order[n]` -> (group, record), both int, or None where a group is
    used up.

    groups: a tensor of record numbers each (tensors, so that worker processes share them); weights:
    how often each is drawn; epochs: how often each may be read through (0: without end). Within an
    epoch a group is read in runs of RUN neighbouring records, the runs in random order, and
    shuffled inside a window of WINDOW records: disks like neighbours, training does not. Raises
    EndOfStream when every group is used up.
    """

    def __init__(
        self, groups: list[torch.Tensor], weights: list[float], epochs: list[float], seed: int
    ):
        if not groups or min(map(len, groups)) == 0 or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"groups of {[len(g) for g in groups]} records with weights {weights}: nothing to draw"
            )
        self.groups = groups
        self.seed = seed

        # a uniform number falls between the edges of its group
        self.edges = np.cumsum(weights) / np.sum(weights)

        # how many draws each group has in it: one of weight 0 is never drawn, so nothing waits for it
        unlimited = np.iinfo(np.int64).max
        limits = []
        for group, weight, count in zip(groups, weights, epochs):
            limit = int(count * len(group)) if count else unlimited
            limits.append(limit if weight > 0 else 0)
        self.limits = np.array(limits)
        self.endless = unlimited in limits
        self.drawable = sum(len(group) for group, limit in zip(groups, limits) if limit)

        # draws of each group before block b, for as many blocks as were asked for
        self.before = [np.zeros(len(groups), np.int64)]
        self._remember()

    def _remember(self) -> None:
        """The blocks and windows in use are kept; on their way to a worker process they are left
        behind."""
        self.block = functools.lru_cache(4)(self._block)
        self.shuffled = functools.lru_cache(16)(self._shuffled)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("block", "shuffled")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = dict(state)
        self._remember()

    def _picks(self, b: int) -> np.ndarray:
        """The group of each draw of block b."""
        draws = np.random.default_rng([self.seed, 0, b]).random(BLOCK)
        picks = np.searchsorted(self.edges, draws, side="right")
        return picks.clip(max=len(self.groups) - 1)

    def _block(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """For each draw of block b: its group, and how often that group was drawn before."""
        # count the blocks in front of it, those that were not counted yet
        while len(self.before) <= b:
            last = len(self.before) - 1
            counts = np.bincount(self._picks(last), minlength=len(self.groups))
            self.before.append(self.before[-1] + counts)

        # number the draws of each group inside the block
        picks = self._picks(b)
        earlier = np.empty(BLOCK, np.int64)
        for group, count in enumerate(self.before[b]):
            mine = picks == group
            earlier[mine] = count + np.arange(mine.sum())
        return picks, earlier

    def _shuffled(self, group: int, epoch: int, window: int) -> np.ndarray:
        """Record numbers of one window of one epoch, in the order in which they are used."""
        records = self.groups[group]

        # runs of neighbours in the epoch's order, the short run last
        runs, rest = divmod(len(records), RUN)
        of_epoch = np.random.default_rng([self.seed, 1, group, epoch])
        order = list(of_epoch.permutation(runs))
        if rest:
            order.append(runs)

        # the runs of this window, shuffled together
        first = window * WINDOW // RUN
        last = (window + 1) * WINDOW // RUN
        parts = []
        for run in order[first:last]:
            parts.append(records[run * RUN : (run + 1) * RUN].numpy())
        of_window = np.random.default_rng([self.seed, 2, group, epoch, window])
        return of_window.permutation(np.concatenate(parts))

    def __getitem__(self, n: int) -> tuple[int, int] | None:
        # which group it falls on, and how often that one was drawn before
        block, place = divmod(n, BLOCK)
        picks, earlier = self.block(block)
        group = int(picks[place])
        count = int(earlier[place])

        # a group that was read as often as it may be has nothing; when none has, this is the end
        if count >= self.limits[group]:
            if (self.before[block] >= self.limits).all():
                raise EndOfStream(n)
            return None

        # its place in the epoch's order
        epoch, place = divmod(count, len(self.groups[group]))
        window = self.shuffled(group, epoch, place // WINDOW)
        return group, int(window[place % WINDOW])


# ---------------------------------------------------------------------------------------- documents


class Documents:
    """Samples encoded: `documents[n]` is a Document, a BadSample, or None when there is nothing
    under n.

    samples: a stream, a list or a plain iterator. encoder None: samples (or Documents) pass through
    as they are. Faults are counted when their turn comes. Raises ValueError after `patience` bad
    samples, or `SILENCE` numbers with nothing, in a row: no data is an error, an endless silence is
    a worse one. workers: processes that read and encode ahead; the order does not depend on them.
    `records`: how many each group of an `Order` holds; another number would be another order.
    """

    def __init__(
        self,
        samples: Any,
        encoder: Encoder | None,
        faults: Faults | None = None,
        patience: int = 1000,
        workers: int = 0,
    ):
        # the stream, and what `Batches` wants to know about it
        self.samples = as_stream(samples)
        self.numbered = getattr(self.samples, "numbered", True)
        self.endless = self.samples.endless
        order = getattr(self.samples, "order", None)
        self.records = [len(group) for group in order.groups] if order is not None else []

        # what becomes of a sample, here or in worker processes
        self.encoder = encoder
        self.faults = Faults() if faults is None else faults
        self.patience = Patience(self.faults, patience)
        self.workers = (
            Workers(workers, self.samples, encoder) if workers and self.numbered else None
        )

    def __getitem__(self, n: int) -> Document | BadSample | None:
        return read_document(self.samples, self.encoder, n)

    def __iter__(self) -> "Share":
        return self.share(0, 1)

    def share(self, part: int, parts: int) -> "Share":
        return Share(self, part, parts)

    def close(self, wait: bool = False) -> None:
        """End the worker processes, if there are any; `wait` until they are gone."""
        if self.workers:
            self.workers.close(wait)


class Share:
    """An iterator over the documents part, part + parts, part + 2 parts, ...; `next` is the number
    that it will ask for next.

    ahead: documents in the works when there are worker processes.
    """

    def __init__(self, documents: Documents, part: int, parts: int, ahead: int = 8):
        self.documents = documents
        self.next = part
        self.step = parts
        # with worker processes: what was asked of which of their generations, and how many numbers
        # to ask for one at a time, after a death
        self.ahead = ahead
        self.coming: deque[Future] = deque()
        self.generation = 0
        self.careful = 0

    def __iter__(self) -> "Share":
        return self

    def __next__(self) -> Document:
        documents = self.documents
        while True:
            try:
                found = self.from_workers() if documents.workers else documents[self.next]
            except EndOfStream:
                raise StopIteration from None
            number = self.next
            self.next += self.step
            if documents.patience.accepts(found, number, documents.samples):
                return found

    def from_workers(self) -> Document | BadSample | None:
        """What the workers made of number `next`. When one dies, the others are replaced with it
        and the number is asked for again, alone: a record that kills its reader three times is a
        fault."""
        workers = self.documents.workers
        for _ in range(3):
            # what was asked of processes that are gone does not come any more
            if self.generation != workers.generation:
                self.coming.clear()
                self.generation = workers.generation

            # ask ahead, and wait for the first
            ahead = 1 if self.careful else self.ahead
            try:
                while len(self.coming) < ahead:
                    self.coming.append(workers.submit(self.next + len(self.coming) * self.step))
                found = self.coming[0].result()
            except BrokenProcessPool:
                workers.replace()
                self.careful = self.ahead
                continue
            self.coming.popleft()
            self.careful = max(0, self.careful - 1)
            workers.deaths = 0
            return found

        # three times alone with its reader, and the reader is dead
        self.careful = self.ahead
        return BadSample("killed its reader", f"sample {self.next} of the stream, three times")

    def go_to(self, number: int) -> None:
        self.next = number
        self.coming.clear()


def read_document(samples: Any, encoder: Encoder | None, n: int) -> Document | BadSample | None:
    """Sample n, encoded. Whatever goes wrong on the way is returned as its fault."""
    sample = read_sample(samples, n)
    # some are encoded already, and some are to be left as they are
    if isinstance(sample, Document):
        return replace(sample, number=n)
    if encoder is None or not isinstance(sample, Sample):
        return sample
    try:
        return replace(encoder(sample), number=n)
    except Exception as error:
        return fault_of(error, sample.origin)


# ------------------------------------------------------------------------------------------ workers


class Workers:
    """Processes that encode numbers, replaced when one dies. They end with their parent, however it
    ends.

    Spawned: forking a process that has threads is not safe. Raises ValueError when they die again
    and again.
    """

    def __init__(self, count: int, samples: Any, encoder: Encoder | None):
        self.count = count
        self.work = (samples, encoder)
        self.generation = 0
        self.deaths = 0  # since the last document
        self.open()

    def open(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(self.count, context, _begin, self.work)

    def submit(self, n: int) -> Future:
        return self.pool.submit(_work, n)

    def replace(self) -> None:
        self.deaths += 1
        if self.deaths >= DEATHS:
            raise ValueError(
                f"--workers {self.count}: processes died {self.deaths} times in a row without reading "
                "anything; is there memory for them? --workers 0 reads in this process"
            )

        # one that dies takes the executor with it: a new one, and a new generation of answers
        print("a data worker died and is replaced", file=sys.stderr, flush=True)
        self.close()
        self.generation += 1
        self.open()

    def close(self, wait: bool = False) -> None:
        self.pool.shutdown(wait=wait, cancel_futures=True)


def _begin(samples: Any, encoder: Encoder | None) -> None:
    """What a worker process does first."""
    global _mine
    _mine = (samples, encoder)
    end_with_starter()


def end_with_starter() -> None:
    """A process that works for another: one thread, and no longer life."""
    torch.set_num_threads(1)

    # Ctrl-C is for the parent, which saves first; and without a parent there is nothing to do
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Leave when the parent is gone, even if it was killed: an orphan would wait for work for
    ever."""
    wait([sentinel])
    os._exit(1)


def _work(n: int) -> Document | BadSample | None:
    return read_document(*_mine, n)
