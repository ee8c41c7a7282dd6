"""Stream packing: documents of any length become full rows with equal ViT work, and no document sees another.

What it teaches: padding is wasted compute, and so is waiting for the rank that got the most pictures; a buffer of 64 documents
is enough to avoid both. Take the oldest document (so that none waits longer than 64 rows), then choose among the others the
subset whose tokens fill the row and whose ViT work brings it to the stream's mean. That is a subset-sum in two dimensions over
big integers: bit s of `reach[c]` is set when some subset has s tokens and c units of vision. Every rank aims at the same mean,
so their ViTs finish together without a word between them.

    numbered Documents -> Lane (a buffer, exact choice) -> rows -> `collate` -> Batch(ids, labels, weights, positions, segments, images)

    python packing.py --example lengths.txt --mix tiles                    # stated lengths to try it on
    python packing.py --lengths lengths.txt --capacity 8192 --ranks 8      # fill and balance against simpler rules

Legend: B rows, T tokens a row (the capacity), N images of all rows, L lanes. Source: SAIL-VL2 section 5.1 describes stream
packing with a buffer per node and visual packing, and publishes no rule: oldest first with subset-sum is our choice.
"""

import functools
import json
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from attention import Segments
from data.images import normalise
from data.sample import Document
from data.stream import Documents
from scale import parallel


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
        return (
            torch.tensor([o != "padding" for o in self.owners])
            .repeat_interleave(lengths)
            .to(self.ids.device)
        )

    def to(self, device) -> "Batch":
        if str(device) == "cpu":
            return self
        move = [t.to(device) for t in (self.ids, self.labels, self.weights, self.positions)]
        images = (
            [i.to(device) for i in self.images] if isinstance(self.images, list) else self.images
        )
        images = images.to(device) if torch.is_tensor(images) else images
        return Batch(*move, self.segments.to(device), images, self.owners, self.filled)


# -------------------------------------------------------------------------------------------------------------- choosing

GAIN = 0.15  # how much of a buffer's surplus of vision a row takes up: 0 lets it pile up, 1 makes rows as uneven as the stream
UNITS = 80  # vision is counted in about 80ths of what a row should hold, or in tiles when they are fewer
FILL = 60  # a row with one percent left empty is as bad as one with 60 percent too much vision


def choose_subset(
    sizes: list[tuple[int, int]], room: int, want: float = 0.0, unit: float = 1.0, slack: int = 0
) -> list[int]:
    """Indices of a subset of `sizes` (tokens, vision) with at most `room` tokens: as full as can be, vision near `want`.

    Stops at the first subset within `slack` tokens of full and half a unit of `want`; else takes the best by `FILL`. Without
    vision and slack it is exact subset-sum. `history[i]` holds what the first i sizes can make; walking back recovers it.
    """
    units = [round(v / unit) for _, v in sizes]
    want = max(0.0, want / unit)
    columns = int(want) + UNITS // 4 if any(units) else 1
    near = (
        range(max(0, math.ceil(want - 0.5)), min(columns, int(want + 0.5) + 1))
        if columns > 1
        else range(1)
    )
    mask, full = (1 << room + 1) - 1, max(0, room - slack)
    reach = [1] + [0] * (columns - 1)
    history, found = [reach], []
    for (tokens, _), v in zip(sizes, units):
        reach = reach[:v] + [new | (old << tokens) & mask for new, old in zip(reach[v:], reach)]
        history.append(reach)
        found = [c for c in near if reach[c] >> full]
        if found:
            break
    best = max(
        found or (c for c in range(columns) if reach[c]),
        key=lambda c: (
            FILL * (reach[c].bit_length() - 1) / max(room, 1) - abs(c - want) / max(want, 1)
        ),
    )
    tokens, chosen = reach[best].bit_length() - 1, []
    if columns > 1 and tokens < 0.98 * room:  # nothing that keeps the balance: then a full row
        return choose_subset([(n, 0) for n, _ in sizes], room)
    for i in reversed(range(len(history) - 1)):
        if (
            not history[i][best] >> tokens & 1
        ):  # not reachable without item i: it is part of the choice
            chosen.append(i)
            tokens, best = tokens - sizes[i][0], best - units[i]
    return chosen


class Rows:
    """An iterator over rows: lists of documents of at most `capacity` tokens together, from a buffer of `buffer` documents.

    A document leaves as the oldest or with an older one, so it waits for at most `buffer` rows. When the buffer holds too
    little to choose from (many short documents), the oldest that fit go in first and the buffer is filled up again.
    Raises ValueError for a document longer than a row (the encoder's `max_length` should have refused it).
    """

    def __init__(self, documents: Iterator[Document], capacity: int, buffer: int = 64):
        self.source, self.capacity, self.buffer = iter(documents), capacity, buffer
        self.waiting: list[Document] = []
        self.seen = [
            0,
            0,
        ]  # tokens and vision of all documents so far: their ratio is what a row aims at

    def __iter__(self) -> "Rows":
        return self

    def refill(self, most: int) -> None:
        while len(self.waiting) < most and (document := next(self.source, None)) is not None:
            if len(document) > self.capacity:
                raise ValueError(
                    f"{document.origin}: {len(document)} tokens do not fit in a row of {self.capacity}"
                )
            self.waiting.append(document)
            self.seen = [self.seen[0] + len(document), self.seen[1] + document.vision]

    def __next__(self) -> list[Document]:
        self.refill(self.buffer)
        if not self.waiting:
            raise StopIteration
        mean = self.seen[1] / self.seen[0]
        here = sum(d.vision for d in self.waiting) / sum(map(len, self.waiting))
        want = self.capacity * (mean + GAIN * (here - mean))  # vision that this row should hold
        tile = (
            math.gcd(*(d.vision for d in self.waiting)) or 1
        )  # at any resolution: next to nothing
        unit = tile * max(1, round(want / UNITS / tile))
        row, room = [], self.capacity

        def take(*documents: Document) -> list[Document]:
            """Move documents into the row; returns those that wait and still fit, from a full buffer."""
            nonlocal room, want
            row.extend(documents)
            room, want = room - sum(map(len, documents)), want - sum(d.vision for d in documents)
            taken = set(map(id, documents))
            self.waiting = [d for d in self.waiting if id(d) not in taken]
            self.refill(self.buffer - 1)  # the oldest is in the row and counts
            return [d for d in self.waiting if len(d) <= room]

        fits = take(self.waiting[0])
        while fits and len(self.waiting) >= self.buffer - 1 and sum(map(len, fits)) < 2 * room:
            fits = take(fits[0])
        big = max(fits, key=len, default=row[0])
        if (
            fits and 2 * len(big) > self.capacity and big.vision <= want
        ):  # no two of these share a row: one goes when it can
            fits = take(big)
        take(
            *[
                fits[i]
                for i in choose_subset(
                    [(len(d), d.vision) for d in fits], room, want, unit, self.capacity // 2048
                )
            ]
        )
        return row


# ------------------------------------------------------------------------------------------------------------------ rows


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
            ids[b, at : at + n], labels[b, at : at + n], weights[b, at : at + n] = (
                d.ids,
                d.labels,
                d.weights,
            )
            positions[b, at : at + n] = np.arange(n)
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
    return Batch(
        *arrays, Segments.of(lengths), normalise(images) if images else None, owners, used / (B * T)
    )


class PerSample(Batch):
    @property
    def weight(self):
        return float(
            sum(
                bool((part >= 0).any())
                for part in self.labels.reshape(-1).split(self.segments.lengths)
            )
        )

    def to(self, device):
        return PerSample(**vars(super().to(device)))


class Batches:
    """An endless iterator over steps: a list of `accumulate` micro-batches of this rank's rows. What the loop consumes.

    Row g of the run (g = 0, 1, 2, ...; `rows_per_step` of them are a step) comes from lane g % lanes and goes to rank g %
    world, so the global batch of a step is the same for any number of ranks and accumulation steps. A rank reads only the lanes
    of its rows. When the documents end, the ranks go on until the last row of all is out; those without rows get padding of
    weight 0, so none waits for another and nothing is lost.

    `state_dict` (called on all ranks together) is small: for each lane the next number to read, the numbers that wait in the
    buffer and two sums. With it, any number of ranks and workers continues with exactly the rows that would have followed.

    Raises ValueError when ranks find different numbers of records: they would lose some samples and repeat others.
    """

    def __init__(
        self,
        documents,
        capacity: int,
        rows_per_step: int,
        accumulate: int,
        pad: int,
        rank: int = 0,
        world: int = 1,
        buffer: int = 64,
        lanes: int = 0,
        per_sample: bool = False,
    ):
        self.per_sample = per_sample
        accumulate = accumulate or max(1, rows_per_step // world)  # 0: a row at a time
        if rows_per_step % (world * accumulate):
            raise ValueError(
                f"{rows_per_step} rows a step do not divide over {world} ranks x {accumulate} accumulation steps"
            )
        self.documents = (
            documents if isinstance(documents, Documents) else Documents(documents, None, None)
        )
        self.capacity, self.rows_per_step, self.accumulate, self.pad, self.buffer = (
            capacity,
            rows_per_step,
            accumulate,
            pad,
            buffer,
        )
        self.rank, self.world, self.row = rank, world, 0
        found = parallel.gather([self.documents.records])
        if any(f != found[0] for f in found):
            raise ValueError(
                f"the ranks find different data, {' and '.join(map(str, found))} records: wait until every node has all files"
            )
        usual = max(
            n for n in range(1, max(8, world) + 1) if rows_per_step % n == 0 and n % world == 0
        )
        self.open(lanes or (usual if self.documents.numbered else 1), {})

    def open(self, lanes: int, states: dict) -> None:
        """Lanes from the start, or each from its state."""
        self.lanes, self.mine = lanes, {}
        for lane in sorted({g % lanes for g in range(self.rank, lanes * self.world, self.world)}):
            share = self.documents.share(lane, lanes)
            self.mine[lane] = Rows(share, self.capacity, self.buffer)
            if str(lane) in states:
                state = states[str(lane)]
                self.mine[lane].waiting = [
                    d for n in state["waiting"] if isinstance(d := self.documents[n], Document)
                ]
                self.mine[lane].seen = list(state["seen"])
                share.go_to(state["next"])

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> list[Batch]:
        made, kept = 0, []
        for g in range(self.row, self.row + self.rows_per_step):
            row = next(self.mine[g % self.lanes], []) if g % self.lanes in self.mine else []
            made += bool(row)
            if g % self.world == self.rank:
                kept.append(row)
        alone = (
            self.lanes == 1 or self.documents.endless
        )  # every rank knows of every row, or there is always one
        if not (made if alone else parallel.total(made)[0]):
            raise StopIteration
        self.row += self.rows_per_step
        share = len(kept) // self.accumulate
        made_rows = [
            collate(kept[i * share : (i + 1) * share], self.capacity, self.pad)
            for i in range(self.accumulate)
        ]
        return [PerSample(**vars(b)) if self.per_sample else b for b in made_rows]

    def state_dict(self) -> dict:
        states = parallel.gather(
            [
                {
                    str(lane): {
                        "next": rows.source.next,
                        "waiting": [d.number for d in rows.waiting],
                        "seen": rows.seen,
                    }
                    for lane, rows in self.mine.items()
                }
            ]
        )
        return {
            "row": self.row,
            "lanes": self.lanes,
            "records": self.documents.records,
            "buffers": {k: v for part in states for k, v in part.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the step has another number of rows, or the data another number of records, than when it was saved."""
        if state["row"] % self.rows_per_step:
            raise ValueError(
                f"the saved run stopped at row {state['row']}, which is no multiple of {self.rows_per_step} rows a step"
            )
        if (records := state.get("records", self.documents.records)) != self.documents.records:
            raise ValueError(
                f"the saved run read {records} records, now there are {self.documents.records}: its place in them means "
                "nothing any more; put the files back, or begin again with --resume False"
            )
        self.row = state["row"]
        self.open(state["lanes"], state["buffers"])


# -------------------------------------------------------------------------------------------------- the command: compare rules


@dataclass(slots=True)
class Size:
    """A document of which only the sizes are known."""

    tokens: int
    vision: int
    origin: str = ""

    def __len__(self) -> int:
        return self.tokens


def naive(sizes: Iterator[Size], capacity: int) -> Iterator[list[Size]]:
    """The stream as it comes: a row ends when the next document does not fit."""
    row: list[Size] = []
    for d in sizes:
        if sum(map(len, row)) + len(d) > capacity:
            yield row
            row = []
        row.append(d)
    if row:
        yield row


def first_fit(sizes: Iterator[Size], capacity: int, most: int = 64) -> Iterator[list[Size]]:
    """Into the first of at most `most` open rows that has room; the fullest goes out when none has."""
    opened: list[tuple[int, list[Size]]] = []  # tokens, documents
    for d in sizes:
        at = next((i for i, (n, _) in enumerate(opened) if n + len(d) <= capacity), None)
        if at is not None:
            opened[at] = (opened[at][0] + len(d), opened[at][1] + [d])
            continue
        if len(opened) == most:
            yield opened.pop(max(range(most), key=lambda i: opened[i][0]))[1]
        opened.append((len(d), [d]))
    yield from (row for _, row in opened)


def measure(
    rule: Callable, sizes: list[Size], capacity: int, ranks: int
) -> tuple[dict, list[list[Size]]]:
    """One rule on one stream. Row g goes to rank g % ranks. A stream's last row, which nothing can fill, is left out of fill.

    The two imbalances are the mean over steps of (largest rank / mean of ranks) of pixels and of the sum of squared lengths.
    """
    entered, made, wait = {}, [], 0

    def stream() -> Iterator[Size]:
        for d in sizes:
            entered[id(d)] = len(made)
            yield d

    began = time.process_time()
    for row in rule(stream(), capacity):
        made.append(row)
        wait = max(wait, len(made) - min(entered[id(d)] for d in row))
    seconds = time.process_time() - began
    body = made[:-1] or made
    fill = sum(len(d) for row in body for d in row) / (capacity * len(body))

    def imbalance(cost: Callable[[Size], int]) -> float:
        costs = [sum(map(cost, row)) for row in body]
        steps = [costs[i : i + ranks] for i in range(0, len(costs) - ranks + 1, ranks)] or [costs]
        found = [max(step) * len(step) / sum(step) for step in steps if sum(step)]
        return sum(found) / len(found) if found else 1.0

    return {
        "fill": fill,
        "padding": 1 - fill,
        "vision_max_over_mean": imbalance(lambda d: d.vision),
        "attention_max_over_mean": imbalance(lambda d: len(d) ** 2),
        "max_wait_rows": wait,
        "us_per_sample": 1e6 * seconds / len(sizes),
    }, made


def draw(made: dict[str, list[list[Size]]], capacity: int, path: Path, most: int = 48) -> None:
    """The first rows of each rule as bars: documents in blue, darker with more vision per token; padding in red."""
    sheet = Image.new(
        "RGB", (820, sum(24 + 8 * len(rows[:most]) for rows in made.values())), "white"
    )
    pen, y = ImageDraw.Draw(sheet), 0
    densest = (
        max((d.vision / len(d) for rows in made.values() for row in rows for d in row), default=0)
        or 1
    )
    for name, rows in made.items():
        pen.text((10, y + 6), name, "black")
        y += 24
        for row in rows[:most]:
            pen.rectangle((10, y, 810, y + 5), "#d62728")
            at = 0
            for d in row:
                shade = int(210 - 170 * d.vision / len(d) / densest)
                pen.rectangle(
                    (10 + 800 * at // capacity, y, 9 + 800 * (at + len(d)) // capacity, y + 5),
                    (shade, shade, 235),
                    "white",
                )
                at += len(d)
            y += 8
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def example(mix: str, n: int, seed: int = 0) -> list[tuple[int, int]]:
    """n pairs (tokens, vision). tiles: 30 % text of 150 tokens (median; log-normal, sigma 1.1); else 256 tokens for each of 1
    (45 %) or 3 to 13 tiles plus text of 80 (sigma 1): mean 970 tokens. any-resolution: the same with 4 patches for each of
    700 (sigma 0.9) visual tokens. Raises ValueError for an unknown mix."""
    rng = random.Random(seed)

    def log_normal(median: int, sigma: float, least: int, most: int) -> int:
        return max(least, min(most, int(rng.lognormvariate(math.log(median), sigma))))

    def tiles() -> tuple[int, int]:
        if rng.random() < 0.3:
            return log_normal(150, 1.1, 16, 8192), 0
        n = 1 if rng.random() < 0.45 else rng.choice((3, 4, 5, 7, 9, 10, 13))
        return 256 * n + 2 + log_normal(80, 1.0, 16, 4096), n

    def any_resolution() -> tuple[int, int]:
        if rng.random() < 0.3:
            return log_normal(150, 1.1, 16, 8192), 0
        n = log_normal(700, 0.9, 16, 4096)
        return n + 2 + log_normal(80, 1.0, 16, 4000), 4 * n

    def long() -> tuple[int, int]:
        n = rng.randint(1500, 4000)
        return n, rng.choice((0, n // 400, n // 300))

    mixes = {
        "tiles": tiles,
        "any-resolution": any_resolution,
        "short": lambda: (rng.randint(16, 200), 0),
        "long": long,
        "two-valued": lambda: rng.choice(((64, 0), (2000, 7))),
        "zipf": lambda: ((n := min(8192, int(16 * rng.paretovariate(0.9)))), min(13, n // 300)),
    }
    if mix not in mixes:
        raise ValueError(f"--mix {mix!r}: choose from {', '.join(mixes)}")
    return [mixes[mix]() for _ in range(n)]


@dataclass
class Options:
    """Pack a list of lengths by three rules and compare them; or write such a list."""

    lengths: Path | None = None  # a line per sample: tokens and vision (tiles, patches or pixels)
    capacity: int = 8192  # tokens a row
    ranks: int = 8
    buffer: int = 64  # candidates of ours
    json: bool = False  # print JSON only
    out: Path = Path("runs/packing.png")  # the rows as an image
    example: Path | None = None  # write a list of this mix here, and stop
    mix: str = "tiles"  # tiles, any-resolution, short, long, two-valued, zipf
    samples: int = 20000
    seed: int = 0


def main(o: Options) -> int:
    if o.example:
        o.example.write_text("".join(f"{t} {v}\n" for t, v in example(o.mix, o.samples, o.seed)))
        print(f"{o.samples} pairs of mix {o.mix} in {o.example}")
        return 0
    if o.lengths is None:
        sys.exit("give --lengths FILE, or --example FILE to write one")
    sizes = [
        Size(*map(int, line.split()), f"{o.lengths}:{i}")
        for i, line in enumerate(o.lengths.read_text().splitlines(), 1)
        if line.strip()
    ]
    fit = [d for d in sizes if 0 < len(d) <= o.capacity]
    if not fit:
        sys.exit(f"{o.lengths}: none of {len(sizes)} lengths fits in a row of {o.capacity}")
    rules = {
        "naive": naive,
        "first_fit": first_fit,
        "ours": functools.partial(Rows, buffer=o.buffer),
    }
    found = {name: measure(rule, fit, o.capacity, o.ranks) for name, rule in rules.items()}
    draw({name: rows for name, (_, rows) in found.items()}, o.capacity, o.out)
    if o.json:
        print(json.dumps({name: figures for name, (figures, _) in found.items()}))
        return 0
    print(
        f"{len(fit)} samples, {len(sizes) - len(fit)} left out (longer than a row); mean {sum(map(len, fit)) / len(fit):.0f} tokens"
    )
    print(
        f"{'':10s} {'fill':>9s} {'padding':>9s} {'vision':>8s} {'attention':>9s} {'wait':>6s} {'us/sample':>9s}"
    )
    for name, (f, rows) in found.items():
        print(
            f"{name:10s} {f['fill']:9.3%} {f['padding']:9.3%} {f['vision_max_over_mean']:8.3f} {f['attention_max_over_mean']:9.3f} "
            f"{f['max_wait_rows']:6d} {f['us_per_sample']:9.1f}"
        )
    print(
        f"vision, attention: max / mean over {o.ranks} ranks; wait: rows between entering and leaving; rows drawn in {o.out}"
    )
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Options)))
