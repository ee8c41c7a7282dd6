"""Questions about charts, with answers from the numbers that a chart was drawn from, in two languages.

What it teaches: once the numbers are known, questions cost nothing and their answers are right. What has
to be seen to is that a question has *one* answer: no highest bar among two of one height, no trend where
there is none to name. A question that this chart has no answer to is not asked of it.

    ask          of                          its answer
    kind         all                         bar chart, 柱状图
    title, axis  all with letters            as they stand there
    value        all but scatter             a number
    highest, lowest   all but scatter        a name
    difference   all but scatter             a number
    comparison   all but scatter             yes or no
    count        shapes of one series        a number
    sum, mean    bar, line, area, pie, ...   a number
    trend        line, area, scatter         rising, falling, neither
    place        upright shapes              a number, counted from the left
    colour       shapes of different colours a word

SAIL-VL2 names charts with captions and questions (section 3.1); which questions is our choice.
"""

import random
from dataclasses import dataclass
from typing import Callable

from curation.chart_pictures import each_own_color
from curation.chart_specs import ChartSpec, interval_name, said_number

# --------------------------------------------------------------------------------------- wordings

KIND_NAMES = {
    "en": {
        "bar": "bar chart",
        "line": "line chart",
        "pie": "pie chart",
        "scatter": "scatter plot",
        "area": "area chart",
        "histogram": "histogram",
        "heatmap": "heatmap",
        "box": "box plot",
    },
    "zh": {
        "bar": "柱状图",
        "line": "折线图",
        "pie": "饼图",
        "scatter": "散点图",
        "area": "面积图",
        "histogram": "直方图",
        "heatmap": "热力图",
        "box": "箱线图",
    },
}
# What is counted, in one and in many
THINGS = {
    "en": {
        "bar": ("bar", "bars"),
        "histogram": ("bar", "bars"),
        "pie": ("slice", "slices"),
        "line": ("line", "lines"),
        "area": ("area", "areas"),
        "box": ("box", "boxes"),
        "scatter": ("point", "points"),
        "heatmap": ("cell", "cells"),
    },
    "zh": {
        "bar": ("根柱子", "柱子"),
        "histogram": ("根柱子", "柱子"),
        "pie": ("个扇形", "扇形"),
        "line": ("条折线", "折线"),
        "area": ("块区域", "区域"),
        "box": ("个箱子", "箱子"),
        "scatter": ("个点", "点"),
        "heatmap": ("个格子", "格子"),
    },
}
COLOR_WORDS = {
    "red": "红色",
    "blue": "蓝色",
    "green": "绿色",
    "orange": "橙色",
    "purple": "紫色",
    "grey": "灰色",
    "pink": "粉色",
    "brown": "棕色",
}
WORDS = {
    "yes": "是",
    "no": "否",
    "rising": "上升",
    "falling": "下降",
    "neither": "都不是",
    **COLOR_WORDS,
}

# Ask, or ask and kind -> wordings. {of}: " of NAME" or "NAME的" where there are several series
ENGLISH = {
    "kind": ("What kind of chart is this?", "Which type of chart is shown?"),
    "title": ("What is the title of the chart?", "What does the title say?"),
    "axis": ("What does the y axis show?", "What is measured along the y axis?"),
    "axis lying": ("What does the x axis show?",),
    "value": ("What is the {y}{of} for {a}?", "How high is {a}{of}?"),
    "value box": ("What is the median {y} for {a}?",),
    "value histogram": ("How many values lie between {a}?",),
    "highest": ("Which {x} has the highest {y}{of}?", "Where is the {y} the highest{of}?"),
    "lowest": ("Which {x} has the lowest {y}{of}?", "Where is the {y} the lowest{of}?"),
    "highest box": ("Which {x} has the highest median?",),
    "lowest box": ("Which {x} has the lowest median?",),
    "highest histogram": ("Between which two numbers do most values lie?",),
    "lowest histogram": ("Between which two numbers do the fewest values lie?",),
    "difference": ("What is the difference in {y} between {a} and {b}{of}?",),
    "difference box": ("How far apart are the medians of {a} and {b}?",),
    "difference histogram": ("How many more values lie between {a} than between {b}?",),
    "comparison": ("Is the {y}{of} higher for {a} than for {b}?",),
    "comparison box": ("Is the median of {a} higher than that of {b}?",),
    "comparison histogram": ("Are there more values between {a} than between {b}?",),
    "count": ("How many {things} are there?", "How many {things} does the chart show?"),
    "sum": ("What do the values{of} add up to?", "What is the sum of all values{of}?"),
    "sum histogram": ("How many values are there in all?",),
    "mean": ("What is the average {y}{of}?",),
    "trend": ("Is the {y}{of} rising, falling, or neither?",),
    "trend scatter": ("Do the points{of} go with a rising or a falling line, or neither?",),
    "place": ("Counted from the left, which {thing} is the highest?",),
    "place line": ("Counted from the left, which point is the highest?",),
    "place area": ("Counted from the left, at which place is it the highest?",),
    "place box": ("Counted from the left, which box has the highest median?",),
    "colour": ("What colour is the highest {thing}?",),
    "colour pie": ("What colour is the largest slice?",),
    "colour box": ("What colour is the box with the highest median?",),
    "colour series": ("Which colour stands for {a}?",),
}
CHINESE = {
    "kind": ("这是什么类型的图表？", "图中是哪种图表？"),
    "title": ("图表的标题是什么？", "标题写的是什么？"),
    "axis": ("纵轴表示什么？", "纵轴的标签是什么？"),
    "axis lying": ("横轴表示什么？",),
    "value": ("{of}{a}的{y}是多少？", "{of}{a}对应的数值是多少？"),
    "value box": ("{a}的{y}中位数是多少？",),
    "value histogram": ("有多少个数值在{a}之间？",),
    "highest": ("{of}{y}最高的{x}是哪个？", "哪个{x}的{of}{y}最高？"),
    "lowest": ("{of}{y}最低的{x}是哪个？", "哪个{x}的{of}{y}最低？"),
    "highest box": ("哪个{x}的中位数最高？",),
    "lowest box": ("哪个{x}的中位数最低？",),
    "highest histogram": ("哪个区间的数值最多？",),
    "lowest histogram": ("哪个区间的数值最少？",),
    "difference": ("{of}{a}与{b}的{y}相差多少？",),
    "difference box": ("{a}与{b}的中位数相差多少？",),
    "difference histogram": ("{a}之间的数值比{b}之间的多多少个？",),
    "comparison": ("{of}{a}的{y}是否高于{b}？",),
    "comparison box": ("{a}的中位数是否高于{b}？",),
    "comparison histogram": ("{a}之间的数值是否多于{b}之间的？",),
    "count": ("图中有多少{thing}？", "一共有几{thing}？"),
    "sum": ("{of}各数值的总和是多少？", "{of}所有数值加起来是多少？"),
    "sum histogram": ("一共有多少个数值？",),
    "mean": ("{of}{y}的平均值是多少？",),
    "trend": ("{of}{y}是上升、下降，还是都不是？",),
    "trend scatter": ("{of}各点呈上升趋势、下降趋势，还是都不是？",),
    "place": ("从左数第几{thing}最高？",),
    "place line": ("从左数第几个点最高？",),
    "place area": ("从左数第几个位置最高？",),
    "place box": ("从左数第几个箱子的中位数最高？",),
    "colour": ("最高的{things}是什么颜色？",),
    "colour pie": ("最大的扇形是什么颜色？",),
    "colour box": ("中位数最高的箱子是什么颜色？",),
    "colour series": ("{a}用什么颜色表示？",),
}
WORDINGS = {"en": ENGLISH, "zh": CHINESE}
TOO_CLOSE = 0.04  # of the range: two values that differ by less are not compared


@dataclass(frozen=True)
class Asked:
    """A question with its answer. series, names: what it is about, for who checks it."""

    ask: str
    question: str
    answer: str
    series: str = ""
    names: tuple[str, ...] = ()

    @property
    def grader(self) -> str:
        return "relaxed" if self.ask in NUMBERS else "auto"


NUMBERS = ("value", "difference", "sum", "mean")


# ------------------------------------------------------------------------------------ the numbers


def spec_table(spec: ChartSpec) -> dict[str, dict[str, float]]:
    """Series -> name -> number. Of a histogram, how many values lie in each bar; of a box, the median."""
    if spec.kind == "scatter":
        return {}
    if spec.kind == "histogram":
        (values,) = spec.series.values()
        return {"": counts_of(values, spec)}
    table = {}
    for series, values in spec.series.items():
        if spec.kind == "box":
            values = [median_of(sample) for sample in values]
        table[series] = dict(zip(spec.categories, values))
    return table


def counts_of(values: tuple, spec: ChartSpec) -> dict[str, float]:
    """A value on an edge belongs to the bar at its right, the last one to the last bar."""
    counts = {}
    for left, right in zip(spec.edges, spec.edges[1:]):
        last = right == spec.edges[-1]
        inside = [v for v in values if left <= v < right or (last and v == right)]
        counts[interval_name(left, right, spec.language)] = float(len(inside))
    return counts


def median_of(sample: tuple[float, ...]) -> float:
    """The median."""
    ordered = sorted(sample)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def readable_gap(row: dict[str, float]) -> float:
    """Two numbers of a series that differ by no more than this look alike."""
    return TOO_CLOSE * (max(row.values()) - min(row.values()))


# ----------------------------------------------------------------------------------------- asking


class Asking:
    """Questions about one chart, in its language."""

    def __init__(self, spec: ChartSpec, rng: random.Random):
        self.spec = spec
        self.rng = rng
        self.table = spec_table(spec)

    def asked(
        self, ask: str, answer: str, series: str = "", names: tuple[str, ...] = (), form: str = ""
    ) -> Asked:
        """The question in words. form: which wording, where the kind does not decide it."""
        # What is said of this kind, or of any
        spec = self.spec
        wordings = WORDINGS[spec.language]
        found = wordings.get(form or f"{ask} {spec.kind}") or wordings[ask]
        thing, things = THINGS[spec.language][spec.kind]
        of = ""
        if series and len(spec.series) > 1:
            of = f" of {series}" if spec.language == "en" else f"{series}的"
        words = {"x": spec.x, "y": spec.y, "of": of, "thing": thing, "things": things}

        # Names that it is about; "between 10 and 20" is how an interval is asked for
        for letter, name in zip("ab", names):
            between = spec.kind == "histogram" and spec.language == "en"
            words[letter] = name.replace(" to ", " and ") if between else name
        wording = self.rng.choice(found)
        return Asked(ask, wording.format(**words), self.word(answer), series, names)

    def word(self, answer: str) -> str:
        return WORDS.get(answer, answer) if self.spec.language == "zh" else answer

    def row(self) -> tuple[str, dict[str, float]]:
        """One of the series, with its numbers by name."""
        series = self.rng.choice([*self.table])
        return series, self.table[series]

    def pair(self) -> tuple[str, str, str] | None:
        """A series and two of its names whose numbers clearly differ, the higher one first."""
        series, row = self.row()
        higher_first = {"key": row.get, "reverse": True}
        one, other = sorted(self.rng.sample([*row], 2), **higher_first)
        clear = row[one] - row[other] > readable_gap(row)
        return (series, one, other) if clear else None

    # ------------------------------------------------------------------------- reading and naming

    def ask_kind(self) -> Asked | None:
        return self.asked("kind", KIND_NAMES[self.spec.language][self.spec.kind])

    def ask_title(self) -> Asked | None:
        return self.asked("title", self.spec.title)

    def ask_axis(self) -> Asked | None:
        """The axis of the numbers, wherever it lies; a heatmap has a scale instead, a pie nothing."""
        if self.spec.kind in ("pie", "heatmap"):
            return None
        form = "axis lying" if self.spec.lies else ""
        return self.asked("axis", self.spec.y_label, form=form)

    # ------------------------------------------------------------------------------------ numbers

    def ask_value(self) -> Asked | None:
        if not self.table:
            return None
        series, row = self.row()
        name = self.rng.choice([*row])
        return self.asked("value", said_number(row[name]), series, (name,))

    def extreme(self, ask: str) -> Asked | None:
        """The name at the top or the bottom, if it is there alone."""
        if not self.table:
            return None
        series, row = self.row()
        ordered = sorted(row, key=row.get, reverse=ask == "highest")
        first, second = ordered[:2]
        if abs(row[first] - row[second]) <= readable_gap(row):
            return None
        return self.asked(ask, ordered[0], series)

    def ask_highest(self) -> Asked | None:
        return self.extreme("highest")

    def ask_lowest(self) -> Asked | None:
        return self.extreme("lowest")

    def ask_difference(self) -> Asked | None:
        found = self.pair() if self.table else None
        if found is None:
            return None
        series, high, low = found
        row = self.table[series]
        return self.asked("difference", said_number(row[high] - row[low]), series, (high, low))

    def ask_comparison(self) -> Asked | None:
        """Yes and no come equally often."""
        found = self.pair() if self.table else None
        if found is None:
            return None
        series, *names = found
        self.rng.shuffle(names)
        row = self.table[series]
        answer = "yes" if row[names[0]] > row[names[1]] else "no"
        return self.asked("comparison", answer, series, tuple(names))

    def ask_count(self) -> Asked | None:
        """How many shapes: of one series its bars, slices, boxes, points; lines and areas by series."""
        # Kinds whose shapes are not categories
        spec = self.spec
        if spec.kind in ("line", "area"):
            return self.asked("count", str(len(spec.series)))
        if spec.kind == "histogram":
            return self.asked("count", str(len(spec.edges) - 1))
        if spec.kind == "heatmap":
            return self.asked("count", str(len(spec.series) * len(spec.categories)))

        # One shape a value
        if len(spec.series) > 1:
            return None
        (values,) = spec.series.values()
        return self.asked("count", str(len(values)))

    def ask_sum(self) -> Asked | None:
        if not self.table or self.spec.kind == "box":
            return None
        series, row = self.row()
        return self.asked("sum", said_number(sum(row.values())), series)

    def ask_mean(self) -> Asked | None:
        if not self.table or self.spec.kind in ("box", "histogram"):
            return None
        series, row = self.row()
        return self.asked("mean", said_number(sum(row.values()) / len(row)), series)

    # ------------------------------------------------------------------------------------- shapes

    def ask_trend(self) -> Asked | None:
        """Rising or falling all the way; of points by their correlation, if it is clear."""
        kind = self.spec.kind
        if kind == "scatter":
            series = self.rng.choice([*self.spec.series])
            return self.trend_of_points(series)
        if kind not in ("line", "area") or (kind == "area" and len(self.table) > 1):
            return None

        # Every step counts
        series, row = self.row()
        steps = [b - a for a, b in zip([*row.values()], [*row.values()][1:])]
        answer = "neither"
        if min(steps) > 0:
            answer = "rising"
        if max(steps) < 0:
            answer = "falling"
        return self.asked("trend", answer, series)

    def trend_of_points(self, series: str) -> Asked | None:
        r = pearson_r(self.spec.series[series])
        if abs(r) > 0.8:
            return self.asked("trend", "rising" if r > 0 else "falling", series)
        return self.asked("trend", "neither", series) if abs(r) < 0.3 else None

    def ask_place(self) -> Asked | None:
        """Of one series, the highest shape's place from the left."""
        suits = self.spec.kind in ("bar", "histogram", "line", "area", "box") and not self.spec.lies
        if not suits or len(self.table) > 1:
            return None
        top = self.extreme("highest")
        if top is None:
            return None
        (row,) = self.table.values()
        return self.asked("place", str(1 + [*row].index(top.answer)))

    def ask_colour(self) -> Asked | None:
        """Of the highest shape, or, where series have colours, of a series."""
        # The legend says which
        spec = self.spec
        if not each_own_color(spec):
            if len(spec.series) < 2 or spec.kind == "heatmap":
                return None
            name = self.rng.choice([*spec.series])
            color = spec.style.colors[[*spec.series].index(name) % len(spec.style.colors)]
            return self.asked("colour", color, names=(name,), form="colour series")

        # Each has its own, unless there are too many
        if len(spec.categories) > len(spec.style.colors):
            return None
        top = self.extreme("highest")
        if top is None:
            return None
        return self.asked("colour", spec.style.colors[spec.categories.index(top.answer)])


def pearson_r(points: tuple[tuple[float, float], ...]) -> float:
    """Pearson's r."""
    n = len(points)
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    mean_x = sum(xs) / n
    mean_y = sum(ys) / n

    # Sums of products of the distances from the middle
    sxy = sum((x - mean_x) * (y - mean_y) for x, y in points)
    sxx = sum((x - mean_x) ** 2 for x in xs)
    syy = sum((y - mean_y) ** 2 for y in ys)
    return sxy / (sxx * syy) ** 0.5 if sxx and syy else 0.0


ASKS: dict[str, Callable[[Asking], Asked | None]] = {
    "kind": Asking.ask_kind,
    "title": Asking.ask_title,
    "axis": Asking.ask_axis,
    "value": Asking.ask_value,
    "highest": Asking.ask_highest,
    "lowest": Asking.ask_lowest,
    "difference": Asking.ask_difference,
    "comparison": Asking.ask_comparison,
    "count": Asking.ask_count,
    "sum": Asking.ask_sum,
    "mean": Asking.ask_mean,
    "trend": Asking.ask_trend,
    "place": Asking.ask_place,
    "colour": Asking.ask_colour,
}
PLAIN = ("kind", "count", "trend", "place", "colour")  # those that need no letter


def questions_of(
    spec: ChartSpec, rng: random.Random, number: int, rates: dict[str, float], plain: bool = False
) -> list[Asked]:
    """At most `number` different questions, kinds of them drawn by their rates."""
    # All that may be asked, in a random order
    asking = Asking(spec, rng)
    known = [ask for ask in (PLAIN if plain else ASKS) if rates.get(ask, 0.0 if rates else 1.0) > 0]

    # As far as this chart has an answer
    found: list[Asked] = []
    for ask in order_by_rates(rng, {ask: rates.get(ask, 1.0) for ask in known}):
        asked = ASKS[ask](asking)
        if asked is not None and len(found) < number:
            found.append(asked)
    return found


def order_by_rates(rng: random.Random, rates: dict[str, float]) -> list[str]:
    """All names in a random order, those of high rates rather first.

    A name is first as often as its rate says (Efraimidis and Spirakis, 2006).
    """
    keys = {name: rng.random() ** (1 / rate) for name, rate in rates.items()}
    return sorted(keys, key=keys.get, reverse=True)


# ---------------------------------------------------------------------------------------- caption

CAPTION_REQUESTS = {
    "en": ("Describe the chart.", "What does the chart show?"),
    "zh": ("请描述这张图表。", "这张图表展示了什么？"),
}


def caption_of(spec: ChartSpec, plain: bool = False) -> str:
    """What the chart shows, in sentences: kind, title, names, and the two ends of its numbers."""
    if spec.language == "zh":
        return chinese_caption(spec, plain)
    # What it is
    kind = KIND_NAMES["en"][spec.kind]
    article = "An" if kind[0] in "aeiou" else "A"
    if plain:
        return f"{article} {kind}."

    # What it shows
    sentences = [f'{article} {kind} titled "{spec.title}".']
    if spec.kind == "scatter":
        sentences.append(f"It shows {spec.y_label} over {spec.x}.")
    elif spec.kind == "histogram":
        sentences.append(f"It shows how many values of {spec.x} lie in each interval.")
    else:
        sentences.append(f"It shows {spec.y_label} for {', '.join(spec.categories)}.")
    if len(spec.series) > 1:
        sentences.append(f"It compares {', '.join(spec.series)}.")

    # Where it is highest and lowest
    measure = {"box": "median", "histogram": "count"}.get(spec.kind, "value")
    for ask, where in ends_of(spec):
        sentences.append(f"The {ask} {measure} is {where[1]}, at {where[0]}.")
    return " ".join(sentences)


def chinese_caption(spec: ChartSpec, plain: bool) -> str:
    kind = KIND_NAMES["zh"][spec.kind]
    if plain:
        return f"一张{kind}。"
    sentences = [f"这是一张{kind}，标题为“{spec.title}”。"]
    if spec.kind == "scatter":
        sentences.append(f"图中展示了{spec.y_label}随{spec.x}的变化。")
    elif spec.kind == "histogram":
        sentences.append(f"图中展示了{spec.x}在各区间的数量。")
    else:
        sentences.append(f"图中展示了{'、'.join(spec.categories)}的{spec.y_label}。")
    if len(spec.series) > 1:
        sentences.append(f"图中比较了{'、'.join(spec.series)}。")
    measure = {"box": "中位数", "histogram": "数量"}.get(spec.kind, "值")
    for ask, where in ends_of(spec):
        way = "最高" if ask == "highest" else "最低"
        sentences.append(f"{way}{measure}为{where[1]}，对应{where[0]}。")
    return "".join(sentences)


def ends_of(spec: ChartSpec) -> list[tuple[str, tuple[str, str]]]:
    """The highest and the lowest number, as (where, number): at the first place that has it."""
    # All numbers, with their places in words
    cells = []
    for series, row in spec_table(spec).items():
        for name, value in row.items():
            cells.append((value, f"{name}, {series}" if len(spec.series) > 1 else name))
    if not cells:
        return []

    # Both ends
    ends = []
    for ask, choose in (("highest", max), ("lowest", min)):
        value, where = choose(cells, key=lambda cell: cell[0])
        where = where.replace(", ", "、") if spec.language == "zh" else where
        ends.append((ask, (where, said_number(value))))
    return ends
