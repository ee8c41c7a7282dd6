"""Published tables as small charts: bars to read and to compare, and series as videos.

What it teaches: the numbers of a chart need not be invented. Populations of Gapminder (CC-BY), prices,
harvests, weather and payrolls of vega-datasets (MIT, sources listed there) are what people counted;
the chart says which of three is highest, whoever made up the colours. Held out are whole tables: no
number of theirs is ever in training.

    table --groups--> numbers that may stand side by side --a nice unit--> bars of so many marks
          --series--> a number over the years             --three years--> frames: rising, falling, neither?

    32 x 32 pixels, five marks of 6 pixels with a thin line each; a bar is as high as its number says,
    not rounded; asked is the nearest mark, and numbers between two marks are not drawn

Simplified: bars are told by their colours, since names do not fit into 32 pixels.
"""

import csv
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from PIL import Image, ImageDraw

from realdata.example import (
    Example,
    Question,
    as_often,
    empty_paper,
    on_test_side,
    package_folder,
)

MARKS = 5  # of the axis
MARK = 6  # pixels between two marks
NEAR = 0.3  # of a mark: how far a number may be from one to be read there
INKS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "orange": (240, 150, 30),
    "black": (20, 20, 20),
}
# Tables of vega-datasets that are held out, and countries of Gapminder: one in five.
HELD_OUT_TABLES = ("barley", "iowa-electricity", "driving", "crimea")


@dataclass(frozen=True)
class Numbers:
    """Numbers of one kind, in one unit. title: where they stand. in_time: whether they are in order."""

    title: str
    values: tuple[float, ...]
    test: bool
    in_time: bool


# --------------------------------------------------------------------------------------------- tables


def rows_in(path: Path) -> list[dict]:
    """A CSV or JSON table as its rows."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def columns_by(
    table: str, rows: list[dict], value: str, apart: tuple[str, ...], in_time: bool, test: bool
) -> Iterator[Numbers]:
    """The numbers of a column, one group for each combination of what tells them `apart`."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in apart)].append(float(row[value]))
    for key, values in groups.items():
        title = " ".join([table, value, *map(str, key)])
        yield Numbers(title, tuple(values), test, in_time)


def gapminder_numbers() -> Iterator[Numbers]:
    """142 countries from 1952 to 2007: those of a continent in a year, and each over the years."""
    rows = rows_in(package_folder("gapminder", "gapminder") / "gapminder.csv")
    for test in (False, True):
        mine = [row for row in rows if on_test_side(row["country"]) == test]
        for value in ("lifeExp", "pop", "gdpPercap"):
            yield from columns_by("gapminder", mine, value, ("continent", "year"), False, test)
            yield from columns_by("gapminder", mine, value, ("country",), True, test)


# table -> (column, what tells its groups apart, whether they are in time)
COLUMNS = {
    "barley.json": [
        ("yield", ("site", "year"), False),
        ("yield", ("variety", "year"), False),
    ],
    "iowa-electricity.csv": [
        ("net_generation", ("year",), False),
        ("net_generation", ("source",), True),
    ],
    "stocks.csv": [("price", ("date",), False), ("price", ("symbol",), True)],
    "driving.json": [("miles", (), True), ("gas", (), True)],
    "crimea.json": [("wounds", (), True), ("other", (), True), ("disease", (), True)],
    "wheat.json": [("wheat", (), True)],
    "cars.json": [
        ("Horsepower", ("Year", "Origin"), False),
        ("Weight_in_lbs", ("Year", "Origin"), False),
    ],
    "iris.json": [("petalLength", (), False), ("petalWidth", (), False)],
    "seattle-weather.csv": [("wind", ("weather",), False), ("precipitation", ("weather",), False)],
    "us-employment.csv": [("information", (), True), ("manufacturing", (), True)],
}


def vega_numbers() -> Iterator[Numbers]:
    """The tables of vega-datasets that lie inside its wheel."""
    folder = package_folder("vega_datasets", "vega-datasets") / "_data"
    for name, columns in COLUMNS.items():
        table = Path(name).stem
        for value, apart, in_time in columns:
            # Some cells are empty
            rows = [row for row in rows_in(folder / name) if row[value] not in (None, "")]
            yield from columns_by(table, rows, value, apart, in_time, table in HELD_OUT_TABLES)


# ---------------------------------------------------------------------------------------------- charts


def nice_unit(largest: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 ... (or .5, .2 ...) of which the axis holds the largest number."""
    least = largest / (MARKS + NEAR)
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def heights_of(values: list[float]) -> list[float] | None:
    """Numbers in marks of a nice axis; None when one cannot be read there, or two read the same."""
    if min(values) <= 0:
        return None
    unit = nice_unit(max(values))
    heights = [value / unit for value in values]
    marks = [round(height) for height in heights]
    near = all(abs(height - mark) <= NEAR for height, mark in zip(heights, marks))
    return heights if near and min(marks) >= 1 and len(set(marks)) == len(marks) else None


def bar_picture(bars: list[tuple[str, float]], rng: random.Random) -> Image.Image:
    """Bars (colour, height in marks), each in one of four columns, before the lines of the marks."""
    picture = empty_paper(rng)
    pen = ImageDraw.Draw(picture)
    bottom = picture.height - 1
    for mark in range(1, MARKS + 1):
        y = bottom - mark * MARK
        pen.line((0, y, picture.width, y), fill=(215, 215, 215))

    # Columns are eight pixels wide, bars seven
    columns = sorted(rng.sample(range(4), len(bars)))
    for column, (colour, height) in zip(columns, bars):
        left = 8 * column + rng.randint(0, 1)
        top = bottom - round(height * MARK)
        pen.rectangle((left, top, left + 6, bottom), fill=INKS[colour])
    return picture


def in_marks(bars: list[tuple[str, float]]) -> str:
    """`red 3, blue 1`."""
    return ", ".join(f"{colour} {round(height)}" for colour, height in bars)


def chart_example(numbers: Numbers, heights: list[float], name: str, rng: random.Random) -> Example:
    """Three bars, and all that is asked about them."""
    bars = list(zip(rng.sample(list(INKS), 3), heights))
    words = in_marks(bars)
    highest = in_marks([max(bars, key=lambda bar: bar[1])])
    lowest = in_marks([min(bars, key=lambda bar: bar[1])])

    # One bar's height, the highest and the lowest
    colour, _ = about = rng.choice(bars)
    value = in_marks([about])
    questions = [
        Question("caption", "describe the picture.", words),
        Question("listing", "how high is each bar?", in_marks(rng.choices(bars, k=8))),
        Question("charts", f"how high is the {colour} bar?", value, f"{words}. {value}."),
        Question("charts", "which bar is the highest?", highest, f"{words}. highest {highest}."),
        Question("charts", "which bar is the lowest?", lowest, f"{words}. lowest {lowest}."),
    ]
    picture = bar_picture(bars, rng)
    return Example(name, (picture,), words, tuple(questions), numbers.test, numbers.title)


def trend_example(numbers: Numbers, heights: list[float], name: str, rng: random.Random) -> Example:
    """Three frames of one bar, in the order of the years."""
    colour = rng.choice(list(INKS))
    first, second, third = heights
    answer = "neither"
    if first < second < third:
        answer = "rising"
    elif first > second > third:
        answer = "falling"
    frames = tuple(bar_picture([(colour, height)], rng) for height in heights)
    words = ", ".join(in_marks([(colour, height)]) for height in heights)
    questions = (
        Question("caption", "describe the picture.", words),
        Question("trend", "does the bar rise or fall?", answer),
    )
    return Example(name, frames, words, questions, numbers.test, numbers.title)


# -------------------------------------------------------------------------------------------- examples


def three_of(numbers: Numbers, rng: random.Random) -> list[float] | None:
    """Heights of three of the numbers, in their order; None where they cannot be read."""
    if len(numbers.values) < 3:
        return None
    places = sorted(rng.sample(range(len(numbers.values)), 3))
    return heights_of([numbers.values[place] for place in places])


def examples_from(make, groups: list[Numbers], count: int, name: str, seed: int) -> list[Example]:
    """So many examples, every table as often; fewer where luck runs out."""
    rng = random.Random(f"{seed}/{name}")
    by_table = defaultdict(list)
    for numbers in groups:
        by_table[numbers.title.split()[0]].append(numbers)

    examples: list[Example] = []
    for _ in range(200 * count):
        numbers = rng.choice(by_table[rng.choice(list(by_table))])
        heights = three_of(numbers, rng)
        if heights is not None:
            examples.append(make(numbers, heights, f"{name}-{len(examples)}", rng))
        if len(examples) == count:
            break
    return examples


def table_examples(train: int, test: int, seed: int) -> list[Example]:
    """Charts of groups and videos of series, from training tables and from held-out ones."""
    everything = [*gapminder_numbers(), *vega_numbers()]
    examples = []
    for held, count in ((False, train), (True, test)):
        side = "test" if held else "train"
        mine = [numbers for numbers in everything if numbers.test == held]
        groups = [numbers for numbers in mine if not numbers.in_time]
        series = [numbers for numbers in mine if numbers.in_time]
        trends = round(0.35 * count)
        examples += examples_from(chart_example, groups, count - trends, f"chart-{side}", seed)
        # Series mostly rise
        more = examples_from(trend_example, series, 8 * trends, f"trend-{side}", seed)
        examples += as_often(more, trends)
    return examples
