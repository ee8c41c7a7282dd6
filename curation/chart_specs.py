"""Specs of charts: what is drawn, as data that a model may write and a check can refuse.

What it teaches: SAIL-VL2 has a language model write the *code* of a chart (section 3.1, Figure 3). Code
of a model is a program of a stranger; a spec is data. It says as much (kind, texts, numbers, style), is
checked before anything is drawn, and its numbers are the truth that questions are answered from.

    seed ---------invent_spec--+
    {"kind": "bar", ...} ------+--> ChartSpec --validate--> chart_pictures.py, chart_questions.py
    a model's JSON ---spec_of--+         \\--> BadSample: "negative pie", "names repeat", ...

    kind       categories   series: name -> values                   edges
    bar, line, area         a number for each category
    heatmap    columns      rows: a number for each column
    pie        slices       one: a number for each slice
    box        groups       one: a list of numbers for each group
    scatter    none         a pair (x, y) for each point
    histogram  none         one: any numbers                         of its bars

Our choice, as the paper publishes kinds and languages alone: this format, all words and all limits.
"""

import math
import random
import unicodedata
from dataclasses import asdict, dataclass, field
from typing import Any

from data.sample import BadSample

KINDS = ("bar", "line", "pie", "scatter", "area", "histogram", "heatmap", "box")
LANGUAGES = ("en", "zh")
PALETTES = ("bold", "soft", "deep")
COLOR_NAMES = ("red", "blue", "green", "orange", "purple", "grey", "pink", "brown")

# What still can be read
MOST_CATEGORIES = {"bar": 12, "line": 16, "area": 16, "pie": 8, "heatmap": 8, "box": 8}
MOST_SERIES = {"bar": 4, "line": 5, "area": 4, "scatter": 4, "heatmap": 8}  # others: 1
FEWEST_CATEGORIES = {"line": 3, "area": 3}  # others: 2
MOST_POINTS = 120
MOST_EDGES = 16
LARGEST = 1e7
LONGEST_TITLE = 60  # columns of a terminal: a Chinese character has two
LONGEST_NAME = 24
DECIMALS = 2


@dataclass(frozen=True)
class ChartStyle:
    """How a chart looks; nothing in it changes an answer but colours."""

    palette: str = "bold"
    colors: tuple[str, ...] = COLOR_NAMES  # of series, or of bars, slices and boxes, in order
    grid: bool = False
    dark: bool = False
    serif: bool = False
    horizontal: bool = False  # bars, boxes
    stacked: bool = False  # bars; areas always are
    printed: bool = False  # values beside their shapes
    markers: bool = True  # lines
    wide: bool = True


@dataclass(frozen=True)
class ChartSpec:
    """A chart. x: what its categories are (scatter, histogram: what is measured along x). y: what is
    measured. unit: of y, "" for none. See the module for categories, series and edges."""

    kind: str
    language: str
    title: str
    x: str
    y: str
    unit: str
    categories: tuple[str, ...]
    series: dict[str, tuple]
    edges: tuple[float, ...] = ()
    style: ChartStyle = field(default_factory=ChartStyle)

    @property
    def y_label(self) -> str:
        return with_unit(self.y, self.unit, self.language)

    @property
    def lies(self) -> bool:
        """Whether its numbers go from left to right."""
        return self.style.horizontal and self.kind in ("bar", "box")

    def record(self) -> dict:
        """As JSON; the inverse of `spec_of`."""
        return asdict(self)


def with_unit(name: str, unit: str, language: str) -> str:
    if not unit:
        return name
    return f"{name}（{unit}）" if language == "zh" else f"{name} ({unit})"


def said_number(number: float) -> str:
    """A number as it is printed and answered: at most two decimals, no zeros behind them."""
    text = f"{number:.{DECIMALS}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def interval_name(left: float, right: float, language: str) -> str:
    """The name of a histogram's bar."""
    return f"{said_number(left)}{'至' if language == 'zh' else ' to '}{said_number(right)}"


# ------------------------------------------------------------------------------------- from JSON


def spec_of(record: Any) -> ChartSpec:
    """A spec of JSON, whoever wrote it. Raises BadSample for wrong types; `validate` judges the rest."""
    if not isinstance(record, dict):
        raise BadSample("no spec", f"a spec is an object, not {type(record).__name__}")
    texts = {}
    for name in ("kind", "language", "title", "x", "y", "unit"):
        texts[name] = record.get(name, "")
        if not isinstance(texts[name], str):
            raise BadSample("not a text", f"{name} is {type(texts[name]).__name__}")

    # Names and numbers
    categories = record.get("categories") or []
    series = record.get("series") or {}
    if not isinstance(categories, (list, tuple)):
        raise BadSample("not a list", "categories")
    if not isinstance(series, dict):
        raise BadSample("not an object", "series: give {name: [numbers]}")
    return ChartSpec(
        **texts,
        categories=tuple(map(str, categories)),
        series={str(name): numbers_in(values, str(name)) for name, values in series.items()},
        edges=numbers_in(record.get("edges") or [], "edges"),
        style=style_of(record.get("style") or {}),
    )


def numbers_in(values: Any, name: str, depth: int = 0) -> tuple:
    """Numbers, or lists of numbers, rounded to what is said of them."""
    if not isinstance(values, (list, tuple)) or depth > 1:
        raise BadSample("not a list", f"{name}: {str(values)[:80]}")
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found.append(numbers_in(value, name, depth + 1))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(as_number(value, name))
        else:
            raise BadSample("not a number", f"{name}: {str(value)[:80]!r}")
    return tuple(found)


def as_number(value: float, name: str) -> float:
    """Raises BadSample for NaN, infinities, and numbers that no axis should bear."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadSample("not a number", f"{name}: {value}")
    if abs(value) > LARGEST:
        raise BadSample("number too large", f"{name}: over {LARGEST:g}")
    return round(float(value), DECIMALS)


def style_of(record: Any) -> ChartStyle:
    """What is not given is the default; what is not known is an error, as everywhere."""
    if not isinstance(record, dict):
        raise BadSample("not an object", "style")
    # Switches and words of the right type
    known = asdict(ChartStyle())
    for name, value in record.items():
        if name not in known:
            raise BadSample("unknown style", f"{name!r}; there are {', '.join(known)}")
        if name != "colors" and type(value) is not type(known[name]):
            raise BadSample("unknown style", f"{name}: {value!r}")

    # Words from a list
    colors = record.get("colors", COLOR_NAMES)
    if not isinstance(colors, (list, tuple)) or not colors or not set(colors) <= {*COLOR_NAMES}:
        raise BadSample("unknown style", f"colors: some of {', '.join(COLOR_NAMES)}")
    style = ChartStyle(**(record | {"colors": tuple(colors)}))
    if style.palette not in PALETTES:
        raise BadSample("unknown style", f"palette: one of {', '.join(PALETTES)}")
    return style


# --------------------------------------------------------------------------------------- validity


def validate_spec(spec: ChartSpec) -> None:
    """Raises BadSample for a spec that cannot be drawn, read and asked about."""
    if spec.kind not in KINDS:
        raise BadSample("unknown kind", f"{spec.kind!r}; there are {', '.join(KINDS)}")
    if spec.language not in LANGUAGES:
        raise BadSample("unknown language", f"{spec.language!r}; there are {', '.join(LANGUAGES)}")
    check_texts(spec)
    check_name_counts(spec)
    if spec.kind == "histogram":
        check_histogram(spec)
    elif spec.kind == "scatter":
        check_scatter(spec)
    else:
        check_table(spec)


def check_texts(spec: ChartSpec) -> None:
    """Nothing is missing, nothing is longer than its place."""
    for name in ("title", "x", "y"):
        if not getattr(spec, name).strip():
            raise BadSample("text missing", name)
    names = [spec.x, spec.y, spec.unit, *spec.categories, *spec.series]
    limits = [(spec.title, LONGEST_TITLE)] + [(name, LONGEST_NAME) for name in names]
    for text, limit in limits:
        if columns_of(text) > limit:
            raise BadSample("text too long", f"{text[:80]!r} has over {limit} columns")
        if any(not character.isprintable() for character in text):
            raise BadSample("unprintable text", repr(text[:80]))


def columns_of(text: str) -> int:
    """How wide a text is: wide characters count twice."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def check_name_counts(spec: ChartSpec) -> None:
    """As many names as can be told apart."""
    wants_categories = spec.kind not in ("scatter", "histogram")
    if wants_categories:
        fewest = FEWEST_CATEGORIES.get(spec.kind, 2)
        if len(spec.categories) < fewest:
            raise BadSample("too few categories", f"{len(spec.categories)}, at least {fewest}")
        if len(spec.categories) > MOST_CATEGORIES[spec.kind]:
            raise BadSample("too many categories", f"{len(spec.categories)} in a {spec.kind}")

    # One that is part of another would make questions ambiguous
    if not spec.series:
        raise BadSample("empty", "no series")
    if len(spec.series) > MOST_SERIES.get(spec.kind, 1):
        raise BadSample("too many series", f"{len(spec.series)} in a {spec.kind}")
    for names in (spec.categories, tuple(spec.series)):
        trimmed = [name.strip().lower() for name in names]
        if len(set(trimmed)) < len(names):
            raise BadSample("names repeat", ", ".join(names))
        if len(names) > 1 and "" in trimmed:
            raise BadSample("text missing", "a name is empty")
        if any(name.startswith("_") for name in trimmed):
            raise BadSample("hidden name", "legends leave out what begins with an underscore")


def check_table(spec: ChartSpec) -> None:
    """A number for each category (of a box a list of numbers)."""
    for name, values in spec.series.items():
        if len(values) != len(spec.categories):
            detail = f"{name}: {len(values)} values for {len(spec.categories)} categories"
            raise BadSample("lengths differ", detail)

        # Lists of numbers in boxes, numbers in all others
        nested = [isinstance(value, tuple) for value in values]
        if any(nested) != (spec.kind == "box") or (spec.kind == "box" and not all(nested)):
            raise BadSample("not a number", f"{name}: values of a {spec.kind}")
        if spec.kind == "box" and min(map(len, values)) < 5:
            raise BadSample("too few values", f"{name}: a box wants five")

    # Shares and heaps of less than nothing
    numbers = [v for values in spec.series.values() for v in values if not isinstance(v, tuple)]
    heaps = spec.kind in ("pie", "area") or (spec.kind == "bar" and spec.style.stacked)
    if heaps and min(numbers) < 0:
        raise BadSample(f"negative {spec.kind}", said_number(min(numbers)))
    if spec.kind == "pie" and min(numbers) < 0.03 * sum(numbers):
        raise BadSample(
            "slice too thin", f"{said_number(min(numbers))} of {said_number(sum(numbers))}"
        )
    if numbers and not any(numbers):
        raise BadSample("empty", "all values are zero")


def check_histogram(spec: ChartSpec) -> None:
    """Edges rise, and every value lies between them."""
    (values,) = spec.series.values()
    if not values or any(isinstance(value, tuple) for value in values):
        raise BadSample("empty", "a histogram wants numbers")
    if not 3 <= len(spec.edges) <= MOST_EDGES or any(isinstance(e, tuple) for e in spec.edges):
        raise BadSample("bad edges", f"{len(spec.edges)}, from 3 to {MOST_EDGES}")
    if any(left >= right for left, right in zip(spec.edges, spec.edges[1:])):
        raise BadSample("bad edges", "they do not rise")
    if min(values) < spec.edges[0] or max(values) > spec.edges[-1]:
        raise BadSample("bad edges", "values lie outside of them")


def check_scatter(spec: ChartSpec) -> None:
    """Pairs, at least three of each series."""
    points = [point for values in spec.series.values() for point in values]
    if any(not isinstance(point, tuple) or len(point) != 2 for point in points):
        raise BadSample("not a number", "points are pairs [x, y]")
    if min(map(len, spec.series.values())) < 3:
        raise BadSample("too few values", "a scatter plot wants three points of each series")
    if len(points) > MOST_POINTS:
        raise BadSample("too many points", f"{len(points)}, at most {MOST_POINTS}")


# ---------------------------------------------------------------------------------- drawn by seed


@dataclass(frozen=True)
class Theme:
    """What a chart may be about. ordered: the categories have an order, so that lines make sense."""

    x: str
    y: str
    unit: str
    categories: tuple[str, ...]
    low: int
    high: int
    ordered: bool = False


def themes_of(table: str) -> tuple[Theme, ...]:
    """One theme a line: x, y, unit, lowest and highest, categories (`a<b<c` where they have an order)."""
    themes = []
    for line in table.strip().splitlines():
        x, y, unit, numbers, names = (cell.strip() for cell in line.split("|"))
        low, high = numbers.split()
        ordered = "<" in names
        categories = tuple(name.strip() for name in names.split("<" if ordered else ","))
        themes.append(Theme(x, y, unit, categories, int(low), int(high), ordered))
    return tuple(themes)


THEMES = {
    "en": themes_of("""
        month   | rainfall            | mm        | 10 140  | Jan<Feb<Mar<Apr<May<Jun<Jul<Aug<Sep<Oct
        weekday | number of visitors  |           | 40 400  | Mon<Tue<Wed<Thu<Fri<Sat<Sun
        hour    | temperature         | °C        | 4 35    | 6 h<8 h<10 h<12 h<14 h<16 h<18 h<20 h
        year    | production          | tonnes    | 200 900 | 2015<2016<2017<2018<2019<2020<2021<2022
        quarter | revenue             | million $ | 5 60    | Q1<Q2<Q3<Q4
        fruit   | weight sold         | kg        | 20 260  | apple, pear, plum, grape, lemon, mango
        sport   | number of members   |           | 12 180  | tennis, rowing, chess, judo, golf, fencing
        animal  | number of sightings |           | 3 48    | fox, deer, owl, hare, badger, heron
        subject | number of pupils    |           | 15 120  | maths, art, music, history, biology
        fuel    | consumption         | GWh       | 30 300  | coal, gas, wind, solar, hydro
    """),
    "zh": themes_of("""
        月份 | 降雨量   | 毫米   | 10 140  | 一月<二月<三月<四月<五月<六月<七月<八月<九月<十月
        星期 | 游客人数 | 人     | 40 400  | 周一<周二<周三<周四<周五<周六<周日
        时间 | 气温     | 摄氏度 | 4 35    | 6时<8时<10时<12时<14时<16时<18时<20时
        年份 | 产量     | 吨     | 200 900 | 2015<2016<2017<2018<2019<2020<2021<2022
        季度 | 营业额   | 百万元 | 5 60    | 一季度<二季度<三季度<四季度
        水果 | 销量     | 公斤   | 20 260  | 苹果, 梨子, 李子, 葡萄, 柠檬, 芒果
        运动 | 会员数   | 人     | 12 180  | 网球, 划船, 象棋, 柔道, 高尔夫, 击剑
        动物 | 观测次数 | 次     | 3 48    | 狐狸, 梅花鹿, 猫头鹰, 野兔, 獾, 苍鹭
        科目 | 学生数   | 人     | 15 120  | 数学, 美术, 音乐, 历史, 生物
        能源 | 消费量   | 吉瓦时 | 30 300  | 煤炭, 天然气, 风能, 太阳能, 水能
    """),
}
# Names of series
GROUPS = {
    "en": ("north|south|east|west", "Oslo|Lima|Cairo|Delhi", "city|village", "plan|outcome"),
    "zh": ("东区|西区|南区|北区", "北京|上海|广州|成都", "城市|乡村", "计划|实际"),
}
# Two measured things, with their ranges: x, its low and high, y, its unit, low and high
PAIRS = {
    "en": (
        ("height in cm", 150, 195, "weight", "kg", 45, 100),
        ("age in years", 18, 70, "income", "thousand $", 15, 90),
        ("hours of study", 0, 12, "score", "", 20, 100),
        ("area in m²", 25, 160, "rent", "$", 400, 2400),
    ),
    "zh": (
        ("身高（厘米）", 150, 195, "体重", "公斤", 45, 100),
        ("年龄（岁）", 18, 70, "收入", "千元", 15, 90),
        ("学习时间（小时）", 0, 12, "成绩", "分", 20, 100),
        ("面积（平方米）", 25, 160, "租金", "元", 400, 2400),
    ),
}
TITLES = {
    "en": ("{Y} by {x}", "{Y} for each {x}, {year}", "{Y} in {year}", "Report: {y} by {x}"),
    "zh": ("各{x}{y}", "{year}年{y}统计", "不同{x}的{y}对比", "{year}年各{x}{y}报告"),
}
PAIR_TITLES = {"en": ("{Y} and {x}", "{Y} against {x}"), "zh": ("{y}与{x}的关系", "{x}与{y}")}
SAMPLE_TITLES = {
    "en": ("Distribution of {x}", "Frequency of {x}"),
    "zh": ("{x}的分布", "{x}分布情况"),
}
NUMBER_OF = {"en": "count", "zh": "数量"}


def invent_spec(rng: random.Random, kind: str, language: str, plain: bool = False) -> ChartSpec:
    """A spec drawn at random. plain: few, clearly different values, for pictures without a text."""
    style = invent_style(rng, plain)
    if kind == "scatter":
        return invent_scatter(rng, language, style, plain)
    if kind == "histogram":
        return invent_histogram(rng, language, style, plain)

    # A theme, and some of its categories
    theme = rng.choice([theme for theme in THEMES[language] if theme_suits(theme, kind)])
    known = theme.categories
    most = min(len(known), MOST_CATEGORIES[kind], 6 if plain else 10)
    number = rng.randint(FEWEST_CATEGORIES.get(kind, 2) if plain else 3, most)
    if theme.ordered:
        first = rng.randint(0, len(known) - number)
        categories = known[first : first + number]
    else:
        categories = tuple(rng.sample(known, number))

    # Rows of numbers
    names = invent_names(rng, kind, language, plain)
    series = {name: invent_values(rng, kind, theme, number, plain) for name in names}
    title = say_title(rng, TITLES[language], theme.x, theme.y)
    return ChartSpec(
        kind, language, title, theme.x, theme.y, theme.unit, categories, series, style=style
    )


def theme_suits(theme: Theme, kind: str) -> bool:
    """Lines want an order, and parts of a whole want none."""
    if kind in ("line", "area"):
        return theme.ordered
    return kind != "pie" or not theme.ordered


def invent_style(rng: random.Random, plain: bool) -> ChartStyle:
    colors = tuple(rng.sample(COLOR_NAMES, len(COLOR_NAMES)))
    if plain:
        return ChartStyle(colors=colors, markers=False, wide=False)
    return ChartStyle(
        palette=rng.choice(PALETTES),
        colors=colors,
        grid=rng.random() < 0.4,
        dark=rng.random() < 0.15,
        serif=rng.random() < 0.3,
        horizontal=rng.random() < 0.3,
        stacked=rng.random() < 0.3,
        printed=rng.random() < 0.5,
        markers=rng.random() < 0.6,
        wide=rng.random() < 0.7,
    )


def invent_names(rng: random.Random, kind: str, language: str, plain: bool) -> list[str]:
    """Names of the series; a single one needs none."""
    if kind in ("pie", "box") or (plain and kind != "heatmap"):
        return [""]
    group = rng.choice(GROUPS[language]).split("|")
    number = rng.randint(2 if kind == "heatmap" else 1, min(4, len(group)))
    return [""] if number == 1 else group[:number]


def invent_values(
    rng: random.Random, kind: str, theme: Theme, number: int, plain: bool
) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
    """Numbers in the theme's range, no two alike; lines rise, fall, or do neither."""
    # A box stands for a sample; nine have their quartiles among themselves
    if kind == "box":
        return tuple(invent_sample(rng, theme, 9) for _ in range(number))

    # Of pictures without a text, at most as many heights as can be told apart
    if plain:
        step = (theme.high - theme.low) // 8 or 1
        found = [theme.low + step * level for level in rng.sample(range(8), number)]
    else:
        found = rng.sample(range(theme.low, theme.high + 1), number)
    if kind == "pie":
        smallest = math.ceil(0.25 * max(found))
        found = [max(value, smallest + place) for place, value in enumerate(found)]

    # A trend, two times in three
    if kind in ("line", "area"):
        way = rng.choice(("rising", "falling", "neither"))
        if way != "neither":
            found.sort(reverse=way == "falling")
    return tuple(map(float, found))


def invent_sample(rng: random.Random, theme: Theme, size: int) -> tuple[float, ...]:
    middle = rng.uniform(theme.low, theme.high)
    spread = (theme.high - theme.low) * rng.uniform(0.05, 0.15)
    numbers = []
    for _ in range(size):
        number = max(0.0, rng.gauss(middle, spread))
        numbers.append(round(number, 1))
    return tuple(numbers)


def invent_scatter(rng: random.Random, language: str, style: ChartStyle, plain: bool) -> ChartSpec:
    """Points along a line that rises or falls, or a cloud."""
    # Two things that are measured
    x, x_low, x_high, y, unit, y_low, y_high = rng.choice(PAIRS[language])
    names = invent_names(rng, "scatter", language, plain)
    series = {}
    for name in names:
        points = []
        for along, across in invent_points(rng, plain):
            measured_x = x_low + along * (x_high - x_low)
            measured_y = y_low + across * (y_high - y_low)
            points.append((round(measured_x, 1), round(measured_y, 1)))
        series[name] = tuple(points)
    title = say_title(rng, PAIR_TITLES[language], x, y)
    return ChartSpec("scatter", language, title, x, y, unit, (), series, style=style)


def invent_points(rng: random.Random, plain: bool) -> list[tuple[float, float]]:
    """Points in the unit square, near a diagonal or anywhere."""
    way = rng.choice(("rising", "falling", "cloud"))
    number = rng.randint(5, 9) if plain else rng.randint(8, 20)
    points = []
    for _ in range(number):
        along = rng.random()
        across = 1 - along if way == "falling" else along
        if way == "cloud":
            across = rng.random()
        near = across + rng.gauss(0, 0.06)
        points.append((along, min(1.0, max(0.0, near))))
    return points


def invent_histogram(
    rng: random.Random, language: str, style: ChartStyle, plain: bool
) -> ChartSpec:
    """Numbers around one middle; of pictures without a text, bars of clearly different heights."""
    # Something measured, in intervals of one width
    x, low, high, *_ = rng.choice(PAIRS[language])
    bars = rng.randint(3, 6) if plain else rng.randint(4, 8)
    width = math.ceil((high - low) / bars)
    edges = tuple(float(low + width * k) for k in range(bars + 1))

    # As many values in each bar as it is high, none on an edge
    heights = rng.sample(range(1, 9), bars) if plain else rng.choices(range(2, 20), k=bars)
    values = []
    for left, height in zip(edges, heights):
        values += [round(left + width * rng.uniform(0.1, 0.9), 1) for _ in range(height)]
    rng.shuffle(values)
    title = say_title(rng, SAMPLE_TITLES[language], x, x)
    y = NUMBER_OF[language]
    return ChartSpec("histogram", language, title, x, y, "", (), {"": tuple(values)}, edges, style)


def say_title(rng: random.Random, titles: tuple[str, ...], x: str, y: str) -> str:
    """A title in one of the ways; what is counted by years is not of one year."""
    years = x in ("year", "年份")
    chosen = rng.choice([title for title in titles if not (years and "year" in title)])
    year = rng.randint(2012, 2025)
    return chosen.format(x=x, y=y, Y=y[0].upper() + y[1:], year=year)
