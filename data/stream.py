"""Streams that can be stopped anywhere: sample n is a pure function of the seed and n.

What it teaches: a data loader needs no hidden state. If sample n can be asked for by its number, a reader's whole state is the
next number; any worker process may prepare any number; and the count of ranks decides who reads a sample, never which samples
there are. Shuffling, mixing and epochs are arithmetic on n.

    Order[n] -> record (a mixture of groups, each shuffled anew every epoch) -> Sample -> Documents: encoded, faults counted
    Documents.share(l, L): numbers l, l + L, l + 2L, ... for lane l of L (packing.py deals the lanes to ranks)

Exact resume: with the state of `packing.Batches`, every later step has the same rows in the same order as without the stop,
bit for bit, for any number of ranks and workers; only which rank holds a row changes. Lanes make it so: their number is part
of the state, and each has its own share of the stream, its own buffer, its own rows.

Sources: "elastic determinism" as MosaicML Streaming calls it; SAIL-VL2 section 5.1 says "a buffer per node" and no more.
"""

import functools
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Callable, Iterable, Iterator

import numpy as np
import torch

from data.encode import Encoder
from data.sample import BadSample, Document, Faults, Sample

BLOCK = 1 << 16  # draws of the mixture that are made together
RUN, WINDOW = 1024, 8192  # records read in order, and records that are shuffled among each other


class Drawn:
    """An endless stream of samples from a function of the number."""

    endless = True

    def __init__(self, draw: Callable[[int], Sample]):
        self.draw, self.at = draw, 0

    def __getitem__(self, n: int) -> Sample:
        return self.draw(n)

    def __iter__(self) -> Iterator[Sample]:
        return self

    def __next__(self) -> Sample:
        self.at += 1
        return self[self.at - 1]


class Mapped(Drawn):
    def __init__(self, stream, function):
        super().__init__(None)
        self.stream, self.function = stream, function
        self.endless = getattr(stream, "endless", False)
        if hasattr(stream, "order"):
            self.order = stream.order

    def __getitem__(self, n):
        found = self.stream[n]
        return self.function(found) if isinstance(found, Sample) else found

    def __next__(self):
        while True:
            found = super().__next__()
            if isinstance(found, Sample):
                return found


class Walk:
    """Any iterator as a function of rising n. To resume it is walked again from its start, without encoding."""

    endless = False

    def __init__(self, iterator: Iterable):
        self.iterator, self.at = iter(iterator), 0

    def __getitem__(self, n: int):
        assert n >= self.at, (
            f"an iterator cannot go back from {self.at} to {n}; load the state into a new one"
        )
        for item in self.iterator:
            self.at += 1
            if self.at > n:
                return item
        raise IndexError(n)


class Order:
    """Which record is number n: `order[n]` -> (group, record), both int, or None where a group is used up.

    groups: a tensor of record numbers each (tensors, so that worker processes share them); weights: how often each is drawn;
    epochs: how often each may be read through (0: without end). Within an epoch a group is read in runs of RUN neighbouring
    records, the runs in random order, and shuffled inside a window of WINDOW records: disks like neighbours, training does
    not. Raises IndexError when every group is used up.
    """

    def __init__(
        self, groups: list[torch.Tensor], weights: list[float], epochs: list[float], seed: int
    ):
        if not groups or min(map(len, groups)) == 0 or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"groups of {[len(g) for g in groups]} records with weights {weights}: nothing to draw"
            )
        self.groups, self.seed = groups, seed
        self.edges = np.cumsum(weights) / np.sum(weights)
        self.limits = np.array(
            [int(e * len(g)) if e else np.iinfo(np.int64).max for g, e in zip(groups, epochs)]
        )
        self.endless = not all(epochs)
        self.before = [np.zeros(len(groups), np.int64)]  # draws of each group before block b
        self.block = functools.lru_cache(4)(self._block)
        self.shuffled = functools.lru_cache(16)(self._shuffled)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("block", "shuffled")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {
            "block": functools.lru_cache(4)(self._block),
            "shuffled": functools.lru_cache(16)(self._shuffled),
        }

    def _picks(self, b: int) -> np.ndarray:
        draws = np.random.default_rng([self.seed, 0, b]).random(BLOCK)
        return np.searchsorted(self.edges, draws, side="right").clip(max=len(self.groups) - 1)

    def _block(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """For each draw of block b: its group, and how often that group was drawn before."""
        while len(self.before) <= b:
            last = len(self.before) - 1
            self.before.append(
                self.before[-1] + np.bincount(self._picks(last), minlength=len(self.groups))
            )
        picks = self._picks(b)
        earlier = np.empty(BLOCK, np.int64)
        for k, count in enumerate(self.before[b]):
            mine = picks == k
            earlier[mine] = count + np.arange(mine.sum())
        return picks, earlier

    def _shuffled(self, group: int, epoch: int, window: int) -> np.ndarray:
        """Record numbers of one window of one epoch, in the order in which they are used."""
        records = self.groups[group]
        runs, rest = divmod(len(records), RUN)
        order = [
            *np.random.default_rng([self.seed, 1, group, epoch]).permutation(runs),
            *[runs] * bool(rest),
        ]  # the short run last
        chosen = order[window * WINDOW // RUN : (window + 1) * WINDOW // RUN]
        found = np.concatenate([records[r * RUN : (r + 1) * RUN].numpy() for r in chosen])
        return np.random.default_rng([self.seed, 2, group, epoch, window]).permutation(found)

    def __getitem__(self, n: int) -> tuple[int, int] | None:
        picks, earlier = self.block(n // BLOCK)
        group, count = int(picks[n % BLOCK]), int(earlier[n % BLOCK])
        if count >= self.limits[group]:
            if (self.before[n // BLOCK] >= self.limits).all():
                raise IndexError(n)
            return None
        epoch, place = divmod(count, len(self.groups[group]))
        return group, int(self.shuffled(group, epoch, place // WINDOW)[place % WINDOW])


# ------------------------------------------------------------------------------------------------------------- documents


class Documents:
    """Samples encoded: `documents[n]` is a Document, a BadSample, or None when there is nothing under n.

    samples: anything with `[n]` (IndexError at the end; a BadSample or None among them is passed on), or a plain iterator.
    Faults are counted when their turn comes. Raises ValueError after `patience` bad samples in a row: no data is an error, an
    endless silence is a worse one. workers: processes that read and encode ahead; the order does not depend on them.
    `records`: how many each group of an `Order` holds; another number would be another order.
    """

    def __init__(
        self, samples, encoder: Encoder, faults: Faults, patience: int = 1000, workers: int = 0
    ):
        self.numbered = hasattr(samples, "__getitem__")
        self.samples = samples if self.numbered else Walk(samples)
        self.endless = getattr(self.samples, "endless", False)
        self.records = [len(g) for g in samples.order.groups] if hasattr(samples, "order") else []
        self.encoder, self.faults, self.patience, self.bad = encoder, faults, patience, 0
        self.pool = None
        if workers and self.numbered:  # spawned: forking a process that has threads is not safe
            self.pool = ProcessPoolExecutor(
                workers, torch.multiprocessing.get_context("spawn"), _begin, (self.samples, encoder)
            )

    def __getitem__(self, n: int) -> Document | BadSample | None:
        return encoded(self.samples, self.encoder, n)

    def __iter__(self) -> "Share":
        return self.share(0, 1)

    def share(self, part: int, parts: int) -> "Share":
        return Share(self, part, parts)

    def count(self, fault: BadSample | None) -> None:
        """A fault, or None for a good sample, which makes patient again."""
        self.bad = self.bad + 1 if fault else 0
        if fault:
            self.faults.add(fault)
        if self.bad >= self.patience:
            raise ValueError(
                f"{self.bad} samples in a row cannot be used\n{self.faults.report()}"
            ) from fault


class Share:
    """An iterator over the documents part, part + parts, part + 2 parts, ...; `next` is the number that it will ask for next."""

    def __init__(self, documents: Documents, part: int, parts: int, ahead: int = 8):
        self.documents, self.next, self.step = documents, part, parts
        self.ahead = ahead  # documents in the works when there are worker processes
        self.coming: deque = deque()

    def __iter__(self) -> "Share":
        return self

    def __next__(self) -> Document:
        d = self.documents
        while True:
            if d.pool:
                while len(self.coming) < self.ahead:
                    self.coming.append(
                        d.pool.submit(_work, self.next + len(self.coming) * self.step)
                    )
            try:
                found = self.coming.popleft().result() if d.pool else d[self.next]
            except IndexError:
                raise StopIteration from None
            self.next += self.step
            if isinstance(found, BadSample):
                d.count(found)
            elif found is not None:
                d.count(None)
                return found

    def go_to(self, number: int) -> None:
        self.next = number
        self.coming.clear()


def encoded(samples, encoder: Encoder, n: int) -> Document | BadSample | None:
    sample = samples[n]
    if isinstance(sample, Document):  # encoded already
        return replace(sample, number=n)
    if not isinstance(sample, Sample):
        return sample
    try:
        return replace(encoder(sample), number=n)
    except BadSample as e:
        return e


def _begin(samples, encoder: Encoder) -> None:
    global _mine
    torch.set_num_threads(1)
    _mine = (samples, encoder)


def _work(n: int) -> Document | BadSample | None:
    return encoded(*_mine, n)
