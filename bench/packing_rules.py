"""Three ways to pack a stream into rows, compared: the stream as it comes, first fit, and
packing.py's.

What it teaches: how full the rows are is half of it. Rows that are full of text on one rank and
full of pictures on another make the ranks wait for each other; and a document that waits long in a
buffer is seen late. All three are measured here, on a list of lengths of your own data or on a
stated mix.

    lengths.txt (tokens, vision) -> rule -> rows -> fill, max / mean over ranks of vision and
                                                    attention, longest wait, time

    python -m bench.packing_rules --example lengths.txt --mix tiles        # write a list of a stated mix
    python -m bench.packing_rules --lengths lengths.txt --capacity 8192 --ranks 8

Vision is counted in whatever the list has: tiles, patches or pixels. The rows are drawn into an
image (`--out`).
"""

import functools
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from PIL import Image, ImageDraw

from infra.cli import command
from packing import Rows


@dataclass(slots=True)
class Size:
    """A document of which only the sizes are known."""

    tokens: int
    vision: int
    origin: str = ""

    def __len__(self) -> int:
        return self.tokens


# -------------------------------------------------------------------------------------- other rules


def naive(sizes: Iterator[Size], capacity: int) -> Iterator[list[Size]]:
    """The stream as it comes: a row ends when the next document does not fit."""
    row: list[Size] = []
    for document in sizes:
        if sum(map(len, row)) + len(document) > capacity:
            yield row
            row = []
        row.append(document)
    if row:
        yield row


def first_fit(sizes: Iterator[Size], capacity: int, most: int = 64) -> Iterator[list[Size]]:
    """Into the first of at most `most` open rows that has room; the fullest goes out when none
    has."""
    rows: list[list[Size]] = []
    tokens: list[int] = []  # of each open row
    for document in sizes:
        with_room = (i for i, n in enumerate(tokens) if n + len(document) <= capacity)
        at = next(with_room, None)
        if at is not None:
            rows[at].append(document)
            tokens[at] += len(document)
            continue
        if len(rows) == most:
            fullest = tokens.index(max(tokens))
            tokens.pop(fullest)
            yield rows.pop(fullest)
        rows.append([document])
        tokens.append(len(document))
    yield from rows


# ---------------------------------------------------------------------------------------- measuring


def measure_rule(
    rule: Callable, sizes: list[Size], capacity: int, ranks: int
) -> tuple[dict, list[list[Size]]]:
    """One rule on one stream: its figures and its rows. Row g goes to rank g % ranks.

    A stream's last row, which nothing can fill, is left out of fill. The two imbalances are the
    mean over steps of (largest rank / mean of ranks) of vision and of the sum of squared lengths.
    """
    entered: dict[int, int] = {}  # document -> rows that were out when it was read
    rows: list[list[Size]] = []
    longest_wait = 0

    def stream() -> Iterator[Size]:
        for document in sizes:
            entered[id(document)] = len(rows)
            yield document

    began = time.process_time()
    for row in rule(stream(), capacity):
        rows.append(row)
        oldest = min(entered[id(document)] for document in row)
        longest_wait = max(longest_wait, len(rows) - oldest)
    seconds = time.process_time() - began

    body = rows[:-1] or rows
    fill = sum(len(document) for row in body for document in row) / (capacity * len(body))
    figures = {
        "fill": fill,
        "padding": 1 - fill,
        "vision_max_over_mean": imbalance([sum(d.vision for d in row) for row in body], ranks),
        "attention_max_over_mean": imbalance(
            [sum(len(d) ** 2 for d in row) for row in body], ranks
        ),
        "max_wait_rows": longest_wait,
        "us_per_sample": 1e6 * seconds / len(sizes),
    }
    return figures, rows


def imbalance(costs: list[int], ranks: int) -> float:
    """Largest over mean of each step's rows, one row a rank; the mean over steps. 1 is even."""
    whole = range(0, len(costs) - ranks + 1, ranks)
    steps = [costs[i : i + ranks] for i in whole] or [costs]
    ratios = [max(step) * len(step) / sum(step) for step in steps if sum(step)]
    return sum(ratios) / len(ratios) if ratios else 1.0


def draw_rows(rows_of: dict[str, list[list[Size]]], capacity: int, path: Path, most: int = 48):
    """The first rows of each rule as bars: documents in blue, darker with more vision per token;
    padding in red."""
    height = sum(24 + 8 * len(rows[:most]) for rows in rows_of.values())
    sheet = Image.new("RGB", (820, height), "white")
    pen = ImageDraw.Draw(sheet)
    every = (document for rows in rows_of.values() for row in rows for document in row)
    densest = max((d.vision / len(d) for d in every), default=0) or 1

    y = 0
    for name, rows in rows_of.items():
        pen.text((10, y + 6), name, "black")
        y += 24
        for row in rows[:most]:
            pen.rectangle((10, y, 810, y + 5), "#d62728")
            at = 0
            for document in row:
                left = 10 + 800 * at // capacity
                at += len(document)
                right = 9 + 800 * at // capacity
                shade = int(210 - 170 * document.vision / len(document) / densest)
                pen.rectangle((left, y, right, y + 5), (shade, shade, 235), "white")
            y += 8
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# -------------------------------------------------------------------------------------------- mixes


def log_normal(rng: random.Random, median: int, sigma: float, least: int, most: int) -> int:
    return max(least, min(most, int(rng.lognormvariate(math.log(median), sigma))))


def draw_tiles(rng: random.Random) -> tuple[int, int]:
    if rng.random() < 0.3:
        return log_normal(rng, 150, 1.1, 16, 8192), 0
    tiles = 1 if rng.random() < 0.45 else rng.choice((3, 4, 5, 7, 9, 10, 13))
    return 256 * tiles + 2 + log_normal(rng, 80, 1.0, 16, 4096), tiles


def draw_any_resolution(rng: random.Random) -> tuple[int, int]:
    if rng.random() < 0.3:
        return log_normal(rng, 150, 1.1, 16, 8192), 0
    visual = log_normal(rng, 700, 0.9, 16, 4096)
    return visual + 2 + log_normal(rng, 80, 1.0, 16, 4000), 4 * visual


def draw_short(rng: random.Random) -> tuple[int, int]:
    return rng.randint(16, 200), 0


def draw_long(rng: random.Random) -> tuple[int, int]:
    tokens = rng.randint(1500, 4000)
    return tokens, rng.choice((0, tokens // 400, tokens // 300))


def draw_two_valued(rng: random.Random) -> tuple[int, int]:
    return rng.choice(((64, 0), (2000, 7)))


def draw_zipf(rng: random.Random) -> tuple[int, int]:
    tokens = min(8192, int(16 * rng.paretovariate(0.9)))
    return tokens, min(13, tokens // 300)


MIXES = {
    "tiles": draw_tiles,
    "any-resolution": draw_any_resolution,
    "short": draw_short,
    "long": draw_long,
    "two-valued": draw_two_valued,
    "zipf": draw_zipf,
}


def example_sizes(mix: str, n: int, seed: int = 0) -> list[tuple[int, int]]:
    """n pairs (tokens, vision). tiles: 30 % text of 150 tokens (median; log-normal, sigma 1.1);
    else 256 tokens for each of 1 (45 %) or 3 to 13 tiles plus text of 80 (sigma 1): mean 970
    tokens. any-resolution: the same with 4 patches for each of 700 (sigma 0.9) visual tokens.
    Raises ValueError for an unknown mix."""
    if mix not in MIXES:
        raise ValueError(f"--mix {mix!r}: choose from {', '.join(MIXES)}")
    rng = random.Random(seed)
    return [MIXES[mix](rng) for _ in range(n)]


# ------------------------------------------------------------------------------------------ command


@dataclass
class PackingOptions:
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


def read_sizes(path: Path) -> list[Size]:
    """Raises ValueError naming the first line that is not two whole numbers."""
    sizes = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            tokens, vision = map(int, line.split())
        except ValueError as e:
            raise ValueError(f"{path}:{number}: not two whole numbers: {line[:60]!r}") from e
        sizes.append(Size(tokens, vision, f"{path}:{number}"))
    return sizes


def compare_rules(options: PackingOptions) -> None:
    # write a list
    if options.example:
        pairs = example_sizes(options.mix, options.samples, options.seed)
        options.example.write_text("".join(f"{tokens} {vision}\n" for tokens, vision in pairs))
        print(f"{options.samples} pairs of mix {options.mix} in {options.example}")
        return

    # or read one
    if options.lengths is None:
        raise ValueError("give --lengths FILE, or --example FILE to write one")
    sizes = read_sizes(options.lengths)
    fit = [size for size in sizes if 0 < len(size) <= options.capacity]
    if not fit:
        raise ValueError(
            f"{options.lengths}: none of {len(sizes)} lengths fits in a row of {options.capacity}"
        )

    ours = functools.partial(Rows, buffer=options.buffer)
    figures, rows = {}, {}
    for name, rule in {"naive": naive, "first_fit": first_fit, "ours": ours}.items():
        figures[name], rows[name] = measure_rule(rule, fit, options.capacity, options.ranks)
    draw_rows(rows, options.capacity, options.out)

    if options.json:
        print(json.dumps(figures))
        return
    mean = sum(map(len, fit)) / len(fit)
    print(
        f"{len(fit)} samples, {len(sizes) - len(fit)} left out (longer than a row); mean {mean:.0f} tokens"
    )
    print(
        f"{'':10s} {'fill':>9s} {'padding':>9s} {'vision':>8s} {'attention':>9s} "
        f"{'wait':>6s} {'us/sample':>9s}"
    )
    for name, f in figures.items():
        print(
            f"{name:10s} {f['fill']:9.3%} {f['padding']:9.3%} {f['vision_max_over_mean']:8.3f} "
            f"{f['attention_max_over_mean']:9.3f} {f['max_wait_rows']:6d} {f['us_per_sample']:9.1f}"
        )
    print(
        f"vision, attention: max / mean over {options.ranks} ranks; wait: rows between entering and leaving; "
        f"rows drawn in {options.out}"
    )


if __name__ == "__main__":
    command(compare_rules)
