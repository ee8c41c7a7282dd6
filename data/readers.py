"""Readers: a person's files as a source of samples, for training and to look at.

What it teaches: a format is two questions. Where does a record lie (containers.py), and what does
it say (formats.py)? The first is answered by spans, which are all that is kept in memory: 32 bytes
a record, shared by all worker processes. So any record can be read at any time, by its number; and
whatever is wrong with it is a counted fault of that record, not the end of a run.

    path --mixture.py--> datasets --containers.py--> spans, tasks          once, at the start
    stream[n] --Order--> record --read--> fields --formats.py--> Sample    whenever it is asked for

A path may be a file, a folder of shards, a pattern ("shards/*.tar"), a mixture file or InternVL's
meta JSON. Nothing outside the images' folder is opened, unless its owner allows it.

An address ("s3://bucket/shards/*.tar") is read through copies on this machine (remote.py). The walk at
the start is made by one rank of a machine, for all of them (index.py).

Simplified: a shard must be a file that can be sought in; a parquet reader reads whole row groups,
so keep them small (Hugging Face writes 100 rows of images); text containers are parsed once at the
start, to find faults and tasks.
"""

import hashlib
import json
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.container_base import Span, stamp_of
from data.containers import CHEAP, fields_of, spans_of
from data.formats import to_sample
from data.index import Index, key_of_index, shared_index
from data.mixture import Dataset, datasets_of, files_of, unread_files
from data.remote import ShardCache, is_remote
from data.sample import BadSample, Faults, Sample, Video
from data.stream import Drawn, Order
from infra.identity import data_identity

# Where copies of remote shards lie unless a command says otherwise, and how many bytes of them.
CACHE = Path("~/.cache/nanosail/shards")
CACHE_BYTES = 64 << 30


def read(path: Path, first: int, last: int, number: int, dataset: Dataset) -> Sample | BadSample:
    """The record at a span. Whatever goes wrong is a fault of that record: nothing that a file
    holds can raise."""
    origin = f"{path.name}:{number}"
    try:
        row = fields_of(path, first, last)
        return to_sample(row, origin, dataset.root(path), dataset)
    except BadSample as error:
        return error.at(origin)
    except Exception as error:
        return BadSample.because(error, "malformed record", origin)


def unconfined(sample: Sample) -> Sample:
    """The sample with absolute image paths below the root of the file system: they may lead anywhere."""

    def absolute(source):
        if isinstance(source, Path):
            return Path(sample.root, source).absolute()
        if isinstance(source, tuple):
            return tuple(map(absolute, source))
        if isinstance(source, Video):
            return replace(source, source=absolute(source.source))
        return source

    messages = (replace(m, parts=absolute(m.parts)) for m in sample.messages)
    return replace(sample, messages=tuple(messages), root=Path(Path.cwd().anchor))


# ---------------------------------------------------------------------------------- source


def drawn(dataset: Dataset) -> bool:
    """Whether anything is ever drawn from it."""
    return dataset.weight != 0 and dataset.repeat != 0


class Folder:
    """A user's data as a source: `stream` for training, `first` to look at. Its records stay on
    disk; spans are kept.

    images: the folder where image paths start, and which they may not leave (default: that of their
    file). strict: the first fault is an error. allow_outside: image paths and a mixture file's
    paths may lead anywhere; nothing in a file can ask for it. cache: where copies of remote shards
    lie. timeout: seconds to wait for the rank of this machine that indexes.

    `faults` counts what the first look finds; the rest is counted when it is read. Raises
    ValueError when nothing can be used, StoreError when a remote shard cannot be read.
    """

    def __init__(
        self,
        path,
        images=None,
        strict: bool = False,
        allow_outside: bool = False,
        cache: ShardCache | None = None,
        timeout: float = 1800.0,
    ):
        self.path = Path(path)
        self.faults = Faults(strict)
        self.allow_outside = allow_outside
        self.cache = cache or ShardCache(CACHE, CACHE_BYTES)
        self.datasets = datasets_of(self.path, images, allow_outside)

        # one rank of a machine looks, all of them know
        self.shards = [files_of(d) if drawn(d) else [] for d in self.datasets]
        self.versions = self.versions_of_shards()
        remote = any(is_remote(file) for files in self.shards for file in files)
        index = shared_index(self.key, self.walk, timeout, keep=remote)
        self.faults.merge(index.faults)
        self.files = [(Path(file), k) for file, k in index.files]  # of each shard its dataset

        if not index.groups:
            raise ValueError(f"{self.path}: 0 usable samples\n{self.faults.report()}")
        # tensors, so that worker processes share them: (dataset, task) -> its records
        self.groups = {key: torch.from_numpy(found) for key, found in index.groups.items()}
        self.spans = torch.from_numpy(index.spans)
        self.root = None
        if len(self.datasets) == 1:
            self.root = self.datasets[0].root(self.files[0][0])

    def key(self) -> str:
        """What an index of these shards depends on, in short."""
        return key_of_index([self.datasets, self.faults.strict, self.versions])

    def versions_of_shards(self) -> list:
        """What tells each shard from another one in its place."""
        versions = []
        for file in (file for files in self.shards for file in files):
            if is_remote(file):
                versions.append(self.cache.renew(file))
            else:
                versions.append((str(file.absolute()), *stamp_of(file)))
        return versions

    def identity(self) -> str:
        """Digest of what the shards hold, for a run that goes on and for ranks to compare."""
        local = data_identity(file for file, _ in self.files if not is_remote(file))
        remote = [version for version in self.versions if isinstance(version, dict)]
        if not remote:
            return local
        return hashlib.sha256(json.dumps([local, remote]).encode()).hexdigest()

    def walk(self) -> Index:
        """What all shards hold."""
        spans = array("q")  # four numbers a record: shard, and its span there
        index = Index(np.zeros((0, 4), np.int64), {}, [], Faults(self.faults.strict))
        for k in range(len(self.datasets)):
            self.scan(k, spans, index)
        index.spans = np.array(spans).reshape(-1, 4)
        return index

    def scan(self, k: int, spans: array, index: Index) -> None:
        """Walk over the shards of dataset k: append the spans of its records, and group by task
        those that are kept."""
        dataset = self.datasets[k]
        if not drawn(dataset):
            index.faults.add(BadSample("nothing drawn", f"{dataset.data}: a weight of 0"))
            return
        for fault in unread_files(dataset):
            index.faults.add(fault)

        # the place and the task of each record, as numbers
        first = len(spans) // 4
        tasks = array("q")
        numbers: dict[str, int] = {}
        for file in self.shards[k]:
            with self.cache.held(file) as here:
                for span in spans_of(here):
                    task = self.look(here, span, dataset, index.faults)
                    if task is not None:
                        tasks.append(numbers.setdefault(task, len(numbers)))
                        spans.extend((len(index.files), *span))
            index.files.append((str(file), k))

        # the groups from which a stream draws
        kept = self.kept(len(tasks), dataset, index.faults)
        task_of = np.array(tasks, np.int64)[kept]
        for task, number in numbers.items():
            mine = task_of == number
            if mine.any():
                index.groups[k, task] = first + kept[mine]

    def look(
        self, file: Path, span: Span | BadSample, dataset: Dataset, faults: Faults
    ) -> str | None:
        """The task of a record, None when it cannot be used. Counts the fault."""
        found = span
        if not isinstance(span, BadSample):
            if file.suffix.lower() not in CHEAP:
                return dataset.task
            found = read(file, *span, dataset)
        if isinstance(found, BadSample):
            faults.add(found)
            return None
        return found.task

    def kept(self, n: int, dataset: Dataset, faults: Faults) -> np.ndarray:
        """Which of n records are used: all, or as many as `cap` says, evenly spaced."""
        cap = n if dataset.cap is None else dataset.cap
        limit = int(cap) if cap >= 1 else int(cap * n)
        limit = min(n, limit)

        # a share that rounds to zero is none, and is said
        drawn = int(dataset.epochs * limit) if dataset.epochs else limit
        if n and not drawn:
            share = f"cap {cap:g}, epochs {dataset.epochs:g}, of {n} records"
            faults.add(BadSample("nothing drawn", f"{dataset.data}: {share}"))
            return np.arange(0)
        return np.arange(limit) * n // max(1, limit)

    def __getitem__(self, i: int) -> Sample | BadSample:
        file, *span = self.spans[i].tolist()
        path, k = self.files[file]
        with self.cache.held(path) as here:
            found = read(here, *span, self.datasets[k])
        if self.allow_outside and isinstance(found, Sample):
            return unconfined(found)
        return found

    def __len__(self) -> int:
        return len(self.spans)

    def tasks(self) -> dict[str, int]:
        """How many records of each task there are to draw. Of a tar or parquet, the task is its
        dataset's."""
        counts = Counter()
        for (_, task), records in self.groups.items():
            counts[task] += len(records)
        return dict(counts)

    def first(self, limit: int = 0) -> list[Sample]:
        """The first usable ones, or all: for grading and small files. Pixels stay on disk unless
        the container holds them."""
        usable: list[Sample] = []
        for i in range(len(self)):
            found = self[i]
            if isinstance(found, Sample):
                usable.append(found)
            else:
                self.faults.add(found)
            if limit and len(usable) == limit:
                break
        return usable

    def stream(self, mixture: dict[str, float], seed: int, turns: int = 0) -> "Picked":
        """Tasks named in the mixture are drawn by weight; data without any of those tasks is drawn
        by the datasets' weights.

        `turns` is for sources that make their questions: a file has those that it has.
        """
        # what is drawn as one: a task of the mixture, or else a dataset
        by_task: dict[str, list] = {task: [] for task in mixture}
        by_dataset: dict[int, list] = {}
        for k, task in self.groups:
            by_dataset.setdefault(k, []).append((k, task))
            if task in mixture:
                by_task[task].append((k, task))
        if any(by_task.values()):
            parts = [keys for task, keys in by_task.items() if keys and mixture[task] > 0]
            weights = [mixture[keys[0][1]] for keys in parts]
        else:
            parts = list(by_dataset.values())
            weights = [self.weight(keys[0][0]) for keys in parts]

        # its records, and how often they may be read
        records = []
        epochs = []
        for keys in parts:
            records.append(torch.cat([self.groups[key] for key in keys]))
            limits = [self.datasets[k].epochs for k, _ in keys]
            epochs.append(max(limits) if min(limits) else 0)
        return Picked(self, Order(records, weights, epochs, seed))

    def weight(self, k: int) -> float:
        """How often dataset k is drawn: as its mixture says, else by its size."""
        dataset = self.datasets[k]
        if dataset.weight is not None:
            return dataset.weight
        return dataset.repeat * sum(len(self.groups[key]) for key in self.groups if key[0] == k)


class Picked(Drawn):
    """The stream of a folder: sample n is the record that the order has there; bad ones are passed
    over by `next`."""

    def __init__(self, folder: Folder, order: Order):
        super().__init__(None, folder.faults)
        self.folder = folder
        self.order = order
        self.endless = order.endless

    def __getitem__(self, n: int) -> Sample | BadSample | None:
        found = self.order[n]
        return None if found is None else self.folder[found[1]]
