"""A page and its figures as strings: elements, curves, bars, heat tables, packed rows.

What it teaches: a report needs no drawing library. One function makes an element, a few make the
figures, and every colour stands once, light and dark, in report.css.

    el("rect", x=3.25, y=0, cls="blue")  ->  <rect x="3.2" y="0" class="blue"></rect>

Same data, same bytes. In text from data or a model control characters are spelled out and markup
is escaped; the page's own policy forbids scripts and anything from a network.
"""

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from infra.text import printable

# A chart of curves: its width and the ends of its axis, in px.
SMALL = 340
LEFT = 42
RIGHT = 330

# What a page may load: pictures that stand in it, its own style, nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ elements


def safe(text: object) -> str:
    """Text from anywhere, as it may stand inside an element or an attribute."""
    return escape(printable(text, lines=True))


def el(name: str, *inside: str, tip: str = "", **attributes: object) -> str:
    """One element around finished markup.

    `cls` is class, floats are rounded, `tip` becomes <title>, which is SVG's tooltip.
    """
    opening = name
    for key, value in attributes.items():
        attribute = "class" if key == "cls" else key
        value = f"{value:.1f}" if isinstance(value, float) else str(value)
        opening += f' {attribute}="{safe(value)}"'
    title = el("title", safe(tip)) if tip else ""
    return f"<{opening}>{title}{''.join(inside)}</{name}>"


def svg(width: int, height: float, label: str, *inside: str) -> str:
    """A drawing that scales with its place; `label` is what a screen reader says."""
    box = f"0 0 {width} {height:g}"
    return el("svg", *inside, viewBox=box, role="img", **{"aria-label": label})


def word(text: object, x: float, y: float, cls: str = "", tip: str = "") -> str:
    """Text in a drawing, at a point."""
    return el("text", safe(text), x=x, y=y, cls=cls, tip=tip)


def line(x0: float, y0: float, x1: float, y1: float, *classes: str) -> str:
    """One line, or one for each class: a broad one under a thin one parts it from what it crosses."""
    return "".join(el("line", x1=x0, y1=y0, x2=x1, y2=y1, cls=c) for c in classes or [""])


def section(title: str, note: str, *body: str) -> str:
    """A headed part of the page; nothing at all when its body is empty."""
    if not any(body):
        return ""
    return el("section", el("h2", title), el("p", note, cls="note"), *body)


def facts(*items: tuple[str, str]) -> str:
    """Large numbers in a row, each with what it is."""
    if not items:
        return ""
    boxes = [el("div", el("b", safe(number)), safe(meaning)) for number, meaning in items]
    return el("div", *boxes, cls="facts")


def legend(*items: tuple[str, str, str]) -> str:
    """(sign, class, meaning) in a row; without a sign, a patch of the class's colour."""
    spans = []
    for sign, cls, meaning in items:
        if sign:
            mark = el("span", sign, cls=cls) + " "
        else:
            mark = svg(14, 10, "", el("rect", width=14, height=10, cls=cls))
        spans.append(el("span", mark, safe(meaning)))
    return el("div", *spans, cls="legend")


def duration(seconds: float) -> str:
    """12.3 s, or 2 min 05 s."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


# -------------------------------------------------------------------------------------- curves


def ticks(low: float, high: float) -> list[float]:
    """At most six round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    least = max(high - low, 1e-9) / 5
    round_steps = (m * 10.0**e for e in range(-12, 12) for m in (1, 2, 5))
    step = next(s for s in round_steps if s >= least * 0.999)

    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [step * i for i in range(first, last + 1)]


def smooth(values: list[float]) -> np.ndarray:
    """Centred mean over a thirtieth of the run, or 5 steps. Non-finite losses are left out."""
    values = np.asarray(values, float)
    reach = max(len(values) // 60, min(len(values) // 8, 2))
    kernel = np.ones(2 * reach + 1)

    # The mean of those inside the window that are numbers: their sum over their count.
    known = np.nan_to_num(values, posinf=0, neginf=0)
    total = np.convolve(known, kernel, "same")
    count = np.convolve(np.isfinite(values), kernel, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def axes(
    label: str,
    lines: list[tuple[list[float], str]],
    steps: int,
    top: float,
    height: float,
    log: bool = False,
) -> tuple[str, Callable]:
    """Lines (values, class) on y ticks; also the map from (step, value) to a point, to draw over them.

    The axis leaves out the highest hundredth of the values: the first steps of a run would flatten
    all others.
    """
    scale = math.log10 if log else float

    def usable(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    # How far the axis reaches.
    seen = [scale(v) for values, _ in lines for v in values if usable(v)] or [0.0]
    low, high = np.percentile(seen, (0, 100 if log else 99))
    if high - low <= 1e-9:
        low, high = low - 1, high + 1

    def at(step: float, value: float) -> tuple[float, float]:
        share = (scale(value) - low) / (high - low)
        share = min(max(share, 0), 1)
        x = LEFT + step / max(steps, 1) * (RIGHT - LEFT)
        return x, top + height * (1 - share)

    # Its ticks: round numbers, or the ends of a logarithmic one.
    out = word(label, LEFT, top - 6, "tick")
    marked = sorted({10 ** min(seen), 10 ** max(seen)}) if log else ticks(low, high)
    for value in marked:
        y = at(0, value)[1]
        text = f"{value:.2g}".replace("e-0", "e-") if log else f"{value:g}"
        out += line(LEFT, y, RIGHT, y)
        out += word(text, LEFT - 6, y + 3.5, "tick e")

    # The curves; more points than pixels would only make the file larger.
    for values, cls in lines:
        every = max(1, len(values) // 400)
        shown = [i for i in range(0, len(values), every) if usable(values[i])]
        points = [at(i, values[i]) for i in shown]
        out += el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), cls=cls)
    return out, at


# ------------------------------------------------------------------------------ bars and tables


def bar_chart(
    label: str,
    rows: list[tuple[str, str, list[float], float | None, float]],
    top: float,
    percent: bool = True,
    ranges: dict[str, tuple[float, float]] | None = None,
) -> str:
    """Horizontal bars. A row: name, text at the right, one or two values, chance or None, error.

    ranges: name -> (lowest, highest) of other runs, a bracket below the bar.
    """
    if not rows:
        return ""

    def at(value: float) -> float:
        return 92 + 344 * min(value, top) / top

    # The grid.
    foot = len(rows) * 26 + 4
    out = ""
    for tick in ticks(0, top):
        text = f"{100 * tick:.0f}%" if percent else f"{tick:g} s"
        out += line(at(tick), 0, at(tick), foot)
        out += word(text, at(tick), foot + 13, "tick m")

    for i, (name, text, values, chance, error) in enumerate(rows):
        y = 4 + 26 * i
        tip = f"{name}: {text}"

        # One bar for each value, sharing the row's height.
        thick = 18 / len(values)
        for j, value in enumerate(values):
            box = {"x": 92, "y": y + j * thick, "width": at(value) - 92, "height": thick}
            out += el("rect", **box, cls="blue" if j == 0 and percent else "pale", tip=tip)

        # Its error and its chance level; the pale line below each parts it from the bar.
        if error:
            low = at(values[0] - error)
            high = at(values[0] + error)
            out += line(low, y + 9, high, y + 9, "under", "chance")
        if chance is not None:
            out += line(at(chance), y - 2, at(chance), y + 20, "under", "chance")

        # where other runs lie
        if ranges and name in ranges:
            low, high = map(at, ranges[name])
            out += line(low, y + 20, high, y + 20, "between")
            out += line(low, y + 17, low, y + 20, "between")
            out += line(high, y + 17, high, y + 20, "between")

        out += word(name, 84, y + 13, "e")
        out += word(text, 520, y + 13, "tick e")
    return svg(520, foot + 28, label, out)


def heat(rows: dict[str, list[float | None]], columns: list[str], full: float = 1.0) -> str:
    """A table of percentages; a cell is coloured by its share of `full`."""
    if not rows:
        return ""

    heads = [el("th", safe(column)) for column in columns]
    table = el("tr", el("th"), *heads)
    for name, values in rows.items():
        row = el("th", safe(name))
        for column, value in zip(columns, values):
            title = f"{name}, {column}"
            if value is None:
                row += el("td", "", title=title)
                continue
            strength = min(100 * value / full, 100)
            row += el("td", f"{100 * value:.0f}", title=title, style=f"--v:{strength:.0f}%")
        table += el("tr", row)
    return el("div", el("table", table, cls="heat"), cls="scroll")


def drawn_rows(rows: list[list[tuple[int, bool | None]]]) -> str:
    """Every row of a packed batch as a bar, every document as a rectangle."""
    kinds = {
        True: ("blue", "with image"),
        False: ("pale", "text only"),
        None: ("padding", "padding"),
    }
    lengths = [sum(n for n, _ in row) for row in rows]
    longest = max(lengths, default=0) or 1

    def at(tokens: int) -> float:
        return 20 + 1040 * tokens / longest

    # Padding is hatched.
    pattern = el(
        "pattern",
        el("rect", width=2, height=5, cls="undone"),
        id="hatch",
        width=5,
        height=5,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    )
    out = el("defs", pattern)

    # A line a row, with a gap between two documents.
    for i, row in enumerate(rows):
        y = i * 18
        used = 0
        out += word(i, 12, y + 10.5, "tick e")
        for tokens, image in row:
            cls, kind = kinds[image]
            x = at(used) + 0.6
            width = max(at(used + tokens) - at(used) - 1.2, 0.6)
            tip = f"{tokens} tokens, {kind}"
            out += el("rect", x=x, width=width, y=y, height=13, cls=cls, tip=tip)
            used += tokens

    foot = len(rows) * 18
    for tick in ticks(0, longest):
        out += word(f"{tick:g}", at(tick), foot + 10, "tick m")
    key = legend(*(("", cls, kind) for cls, kind in kinds.values()))
    return key + svg(1060, foot + 14, "packed rows", out)


def image_tag(image: Image.Image) -> str:
    """A data URI. The page enlarges small pictures pixel by pixel; large ones are made smaller here."""
    image = image.convert("RGB")
    image.thumbnail((252, 252))
    file = io.BytesIO()
    image.save(file, "PNG")

    data = base64.b64encode(file.getvalue()).decode()
    cls = "pixel" if max(image.size) <= 84 else ""
    return f'<img alt="" class="{cls}" src="data:image/png;base64,{data}">'


def html_page(title: str, *parts: str, style: str = "") -> str:
    """A whole page around finished parts: character set, policy, style (and what a page adds to it)."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += el("title", safe(title))
    head += el("style", CSS + style)
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'
