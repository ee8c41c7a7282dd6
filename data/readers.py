"""Readers: a person's files as a source of samples, for training and to look at.

What it teaches: a format is two questions. Where does a record lie (containers.py), and what does
it say (formats.py)? The first is answered by spans, which are all that is kept in memory: 32 bytes
a record, shared by all worker processes. So any record can be read at any time, by its number; and
whatever is wrong with it is a counted fault of that record, not the end of a run.

    path --mixture.py--> datasets --containers.py--> spans, tasks          once, at the start
    stream[n] --Order--> record --read--> fields --formats.py--> Sample    whenever it is asked for

A path may be a file, a folder of shards, a pattern ("shards/*.tar"), a mixture file or InternVL's
meta JSON. Nothing outside the images' folder is opened, unless its owner allows it.

Simplified: a shard must be a file that can be sought in; a parquet reader reads whole row groups,
so keep them small (Hugging Face writes 100 rows of images); text containers are parsed once at the
start, to find faults and tasks.
"""

from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.container_base import Span
from data.containers import CHEAP, fields_of, spans_of
from data.formats import to_sample
from data.mixture import Dataset, datasets_of, files_of, unread_files
from data.sample import BadSample, Faults, Sample, Video
from data.stream import Drawn, Order


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


class Folder:
    """A user's data as a source: `stream` for training, `first` to look at. Its records stay on
    disk; spans are kept.

    images: the folder where image paths start, and which they may not leave (default: that of their
    file). strict: the first fault is an error. allow_outside: image paths and a mixture file's
    paths may lead anywhere; nothing in a file can ask for it.

    `faults` counts what the first look finds; the rest is counted when it is read. Raises
    ValueError when nothing can be used.
    """

    def __init__(self, path, images=None, strict: bool = False, allow_outside: bool = False):
        self.path = Path(path)
        self.faults = Faults(strict)
        self.allow_outside = allow_outside
        self.datasets = datasets_of(self.path, images, allow_outside)
        self.files: list[tuple[Path, int]] = []  # of each shard its dataset
        self.groups: dict[tuple[int, str], torch.Tensor] = {}  # (dataset, task) -> its records
        spans = array("q")  # four numbers a record: shard, and its span there
        for k in range(len(self.datasets)):
            self.scan(k, spans)

        if not self.groups:
            raise ValueError(f"{self.path}: 0 usable samples\n{self.faults.report()}")
        # tensors, so that worker processes share them
        self.spans = torch.from_numpy(np.array(spans)).view(-1, 4)
        self.root = None
        if len(self.datasets) == 1:
            self.root = self.datasets[0].root(self.files[0][0])

    def scan(self, k: int, spans: array) -> None:
        """Walk over the shards of dataset k: append the spans of its records, and group by task
        those that are kept."""
        dataset = self.datasets[k]
        if dataset.weight == 0 or dataset.repeat == 0:
            self.faults.add(BadSample("nothing drawn", f"{dataset.data}: a weight of 0"))
            return
        for fault in unread_files(dataset):
            self.faults.add(fault)

        # the place and the task of each record, as numbers
        first = len(spans) // 4
        tasks = array("q")
        numbers: dict[str, int] = {}
        for file in files_of(dataset):
            for span in spans_of(file):
                task = self.look(file, span, dataset)
                if task is not None:
                    tasks.append(numbers.setdefault(task, len(numbers)))
                    spans.extend((len(self.files), *span))
            self.files.append((file, k))

        # the groups from which a stream draws
        kept = self.kept(len(tasks), dataset)
        task_of = torch.from_numpy(np.array(tasks))[kept]
        for task, number in numbers.items():
            mine = task_of == number
            if mine.any():
                self.groups[k, task] = first + kept[mine]

    def look(self, file: Path, span: Span | BadSample, dataset: Dataset) -> str | None:
        """The task of a record, None when it cannot be used. Counts the fault."""
        found = span
        if not isinstance(span, BadSample):
            if file.suffix.lower() not in CHEAP:
                return dataset.task
            found = read(file, *span, dataset)
        if isinstance(found, BadSample):
            self.faults.add(found)
            return None
        return found.task

    def kept(self, n: int, dataset: Dataset) -> torch.Tensor:
        """Which of n records are used: all, or as many as `cap` says, evenly spaced."""
        cap = n if dataset.cap is None else dataset.cap
        limit = int(cap) if cap >= 1 else int(cap * n)
        limit = min(n, limit)

        # a share that rounds to zero is none, and is said
        drawn = int(dataset.epochs * limit) if dataset.epochs else limit
        if n and not drawn:
            share = f"cap {cap:g}, epochs {dataset.epochs:g}, of {n} records"
            self.faults.add(BadSample("nothing drawn", f"{dataset.data}: {share}"))
            return torch.arange(0)
        return torch.arange(limit) * n // max(1, limit)

    def __getitem__(self, i: int) -> Sample | BadSample:
        file, *span = self.spans[i].tolist()
        path, k = self.files[file]
        found = read(path, *span, self.datasets[k])
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
