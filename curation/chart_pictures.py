"""Pictures of charts: drawn with matplotlib, and read back from what was drawn.

What it teaches: a chart that was drawn is not yet a chart that can be read. Letters may be missing in the
font (white boxes, for Chinese in particular), labels may lie on each other or outside; so the picture's
own objects are asked, after it is laid out. From the same objects the numbers are read back: the height of
a bar, the angle of a slice. Answers are checked against those, not against what was meant to be drawn.

    ChartSpec --check_letters--> BadSample: "no glyph"
    ChartSpec --figure_of--> figure --pixels_of--> picture
                               |----check_places--> BadSample: "texts overlap", "text cut off"
                               '----read_back--> Shown: title, labels, names, numbers, colours

matplotlib, because it is what most charts on paper and screen were drawn with, draws all eight kinds
without a browser, and has every drawn thing as an object. Chinese comes from Noto Sans SC and Noto
Serif SC, which a package brings (requirements/charts.txt), or from a font of your own (--font).

Simplified: numbers printed into a chart may touch its lines.
"""

import itertools
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
from PIL import Image

from curation.chart_specs import ChartSpec, interval_name, said_number
from data.sample import BadSample

PACKAGES = ("matplotlib", "pylopdf_fonts_zh_cn")

# Palette -> name -> colour; the same name is told apart from the others in each
COLORS = {
    "bold": {
        "red": "#d62728",
        "blue": "#1f5fb4",
        "green": "#2ca02c",
        "orange": "#ff8c1a",
        "purple": "#7e3fb0",
        "grey": "#8a8a8a",
        "pink": "#f277b8",
        "brown": "#7b4a26",
    },
    "soft": {
        "red": "#e2716f",
        "blue": "#7aa6d9",
        "green": "#86c58a",
        "orange": "#f7b36d",
        "purple": "#b295cf",
        "grey": "#b3b3b3",
        "pink": "#f6b6d3",
        "brown": "#b08968",
    },
    "deep": {
        "red": "#a01c1c",
        "blue": "#143f7a",
        "green": "#1d6b2b",
        "orange": "#c7640a",
        "purple": "#54247d",
        "grey": "#666666",
        "pink": "#c9357f",
        "brown": "#57351a",
    },
}
MARKERS = "osD^v"  # of lines, one for each that a chart may have
# Of plain pictures: what is a pixel wide cannot be seen
THICK = {
    "lines.linewidth": 7.0,
    "lines.markersize": 14.0,
    "boxplot.boxprops.linewidth": 4.0,
    "boxplot.whiskerprops.linewidth": 4.0,
    "boxplot.capprops.linewidth": 4.0,
    "boxplot.medianprops.linewidth": 4.0,
}
ON_DARK = "soft"  # the palette of dark pictures


@dataclass(frozen=True)
class Canvas:
    """How large, with which letters. pixels: of the width. plain: shapes alone, no letter at all."""

    pixels: int = 480
    plain: bool = False
    font: Path | None = None  # for Chinese, in place of the package's


@dataclass
class Shown:
    """What a figure shows, as read from its objects.

    table: series -> name -> number; a histogram's names are intervals, a box's number is its median.
    points: series -> [x, y] of a scatter plot. colors: series, or name where each has one -> its word.
    spans: of boxes, name -> lowest and highest.
    """

    kind: str
    title: str = ""
    x: str = ""
    y: str = ""
    table: dict[str, dict[str, float]] = field(default_factory=dict)
    points: dict[str, list[list[float]]] = field(default_factory=dict)
    colors: dict[str, str] = field(default_factory=dict)
    spans: dict[str, list[float]] = field(default_factory=dict)
    horizontal: bool = False

    def record(self) -> dict:
        return asdict(self)


# ------------------------------------------------------------------------------------------ fonts


def font_of(spec: ChartSpec, canvas: Canvas) -> Path:
    """The file whose letters a chart is written in."""
    if spec.language == "zh":
        if canvas.font:
            return canvas.font
        import pylopdf_fonts_zh_cn as chinese

        return chinese.serif_path() if spec.style.serif else chinese.sans_path()
    from matplotlib import get_data_path

    name = "DejaVuSerif" if spec.style.serif else "DejaVuSans"
    return Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")


FAMILIES: dict[Path, tuple[str, set[int]]] = {}


def family_in(path: Path) -> tuple[str, set[int]]:
    """A font file's name, as matplotlib has it, and the characters that it can write."""
    if path not in FAMILIES:
        from matplotlib import font_manager, ft2font

        if not path.is_file():
            raise ValueError(f"--font {path}: no such file")

        # matplotlib finds it by its name; which characters it has is the file's own table
        font_manager.fontManager.addfont(path)
        face = ft2font.FT2Font(path)
        FAMILIES[path] = (face.family_name, {*face.get_charmap()})
    return FAMILIES[path]


@contextmanager
def styled(spec: ChartSpec, canvas: Canvas) -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, and this chart's letters and paper."""
    from matplotlib import style

    # Letters and paper
    family, _ = family_in(font_of(spec, canvas))
    paper = "#22252b" if spec.style.dark else "white"
    ink = "#e8e8e8" if spec.style.dark else "#222222"
    size = 9.0 if name_columns(spec) < 60 else 8.0

    # What a chart's style decides
    ours = {
        "font.family": [family],
        "font.size": size,
        "axes.titlesize": size + 2,
        "axes.unicode_minus": False,
        "text.parse_math": False,  # a price is no formula
        "axes.grid": spec.style.grid and spec.kind not in ("pie", "heatmap"),
        "axes.axisbelow": True,
        "axes.spines.top": spec.style.grid,
        "axes.spines.right": spec.style.grid,
        "grid.alpha": 0.35,
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
        "lines.markersize": 5.0,
    }
    if canvas.plain:
        ours |= THICK

    # All that is written or ruled, in one ink
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        ours[name] = ink
    with style.context(["default", ours]):
        yield


def name_columns(spec: ChartSpec) -> int:
    return sum(len(name) for name in spec.categories)


# ---------------------------------------------------------------------------------------- drawing


def figure_of(spec: ChartSpec, canvas: Canvas) -> Any:
    """A matplotlib figure, laid out. The same for the same spec and versions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with styled(spec, canvas):
        # 480 pixels are 4.8 inches, whatever the picture's size: letters shrink with it
        height = 3.4 if spec.style.wide else 4.8
        figure = Figure((4.8, height), dpi=canvas.pixels / 4.8)
        FigureCanvasAgg(figure)
        if canvas.plain:
            axes = figure.add_axes((0.04, 0.04, 0.92, 0.92))
            axes.set_axis_off()
        else:
            figure.set_layout_engine("constrained")
            axes = figure.add_subplot()

        # Shapes, then letters
        DRAW[spec.kind](axes, spec)
        if canvas.plain:
            for text in axes.texts:
                text.set_visible(False)
        else:
            label_axes(figure, axes, spec)
        figure.canvas.draw()
    return figure


def is_text(artist: Any) -> bool:
    from matplotlib.text import Text

    return isinstance(artist, Text)


def label_axes(figure: Any, axes: Any, spec: ChartSpec) -> None:
    """Title, names of the axes, legend."""
    axes.set_title(spec.title)
    if spec.kind == "pie":
        return
    if spec.lies:
        axes.set_xlabel(spec.y_label)
        axes.set_ylabel(spec.x)
    else:
        axes.set_xlabel(spec.x)
        axes.set_ylabel("" if spec.kind == "heatmap" else spec.y_label)

    # Names of series, outside of the shapes
    if len(spec.series) > 1 and spec.kind != "heatmap":
        beside = "outside right upper" if spec.style.wide else "outside lower center"
        figure.legend(loc=beside, ncols=1 if spec.style.wide else len(spec.series))


def colors_of(spec: ChartSpec) -> list[str]:
    """The chart's colours in their order, as matplotlib takes them."""
    palette = COLORS[ON_DARK if spec.style.dark else spec.style.palette]
    return [palette[name] for name in spec.style.colors]


def each_own_color(spec: ChartSpec) -> bool:
    """Whether names, and not series, have colours: bars of one series, slices, boxes."""
    return spec.kind in ("pie", "box") or (spec.kind == "bar" and len(spec.series) == 1)


def color_at(spec: ChartSpec, place: int) -> str:
    colors = colors_of(spec)
    return colors[place % len(colors)]


def put_names(axes: Any, spec: ChartSpec) -> None:
    """Categories along their axis; long ones slanted."""
    places = range(len(spec.categories))
    if spec.lies:
        axes.set_yticks(places, spec.categories)
        axes.invert_yaxis()
        return
    slanted = sum(len(name) for name in spec.categories) > 40
    turn = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(places, spec.categories, **turn)


def draw_bars(axes: Any, spec: ChartSpec) -> None:
    """Beside each other, or one on the other; upright or lying."""
    # Bars of one place share it, or stand on each other
    places = np.arange(len(spec.categories))
    stacked = spec.style.stacked and len(spec.series) > 1
    thick = 0.75 if stacked or len(spec.series) == 1 else 0.8 / len(spec.series)
    below = np.zeros(len(places))
    for number, (name, values) in enumerate(spec.series.items()):
        # One colour for a series, or one for each bar of a single one
        color = color_at(spec, number)
        if each_own_color(spec):
            color = [color_at(spec, place) for place in range(len(places))]
        shift = 0.0 if stacked else (number - (len(spec.series) - 1) / 2) * thick
        look = {"color": color, "label": name or "_"}
        base = below if stacked else 0.0
        if spec.lies:
            shapes = axes.barh(places + shift, values, thick, left=base, **look)
        else:
            shapes = axes.bar(places + shift, values, thick, bottom=base, **look)
        below = below + values

        # Numbers inside of stacked bars, and at the ends of others
        if spec.style.printed:
            kind = "center" if stacked else "edge"
            texts = [said_number(value) for value in values]
            axes.bar_label(shapes, texts, label_type=kind, fontsize=7, padding=0 if stacked else 2)
    put_names(axes, spec)
    axes.margins(x=0.02, y=0.1)


def draw_lines(axes: Any, spec: ChartSpec) -> None:
    places = np.arange(len(spec.categories))
    for number, (name, values) in enumerate(spec.series.items()):
        color = color_at(spec, number)
        marker = MARKERS[number] if spec.style.markers else ""
        axes.plot(places, values, marker=marker, color=color, label=name or "_")
        if spec.style.printed:
            for place, value in zip(places, values):
                where = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
                axes.annotate(said_number(value), (place, value), fontsize=7, **where)
    put_names(axes, spec)
    axes.margins(y=0.15)


def draw_areas(axes: Any, spec: ChartSpec) -> None:
    """One on the other: each area is as high as its value."""
    places = np.arange(len(spec.categories))
    below = np.zeros(len(places))
    for number, (name, values) in enumerate(spec.series.items()):
        color = color_at(spec, number)
        axes.fill_between(places, below, below + values, color=color, label=name or "_", alpha=0.85)
        below = below + values
    put_names(axes, spec)
    axes.margins(x=0)
    axes.set_ylim(bottom=0)


def draw_pie(axes: Any, spec: ChartSpec) -> None:
    """Clockwise from the top, each slice with its name and, as it cannot be measured, its number."""
    (values,) = spec.series.values()
    colors = [color_at(spec, place) for place in range(len(values))]
    labels = [f"{name}\n{said_number(value)}" for name, value in zip(spec.categories, values)]
    edge = {"linewidth": 1, "edgecolor": axes.get_facecolor()}
    axes.pie(
        values, labels=labels, colors=colors, startangle=90, counterclock=False, wedgeprops=edge
    )


def draw_points(axes: Any, spec: ChartSpec) -> None:
    for number, (name, points) in enumerate(spec.series.items()):
        xs, ys = zip(*points)
        axes.scatter(xs, ys, color=color_at(spec, number), label=name or "_")
    axes.margins(0.08)


def draw_histogram(axes: Any, spec: ChartSpec) -> None:
    (values,) = spec.series.values()
    paper = axes.get_facecolor()
    axes.hist(values, bins=spec.edges, color=color_at(spec, 0), edgecolor=paper, linewidth=1)
    axes.set_xticks(spec.edges, [said_number(edge) for edge in spec.edges])
    axes.yaxis.get_major_locator().set_params(integer=True)
    if spec.style.printed:
        texts = [said_number(shape.get_height()) for shape in axes.patches]
        axes.bar_label(axes.containers[0], texts, fontsize=7, padding=2)
    axes.margins(x=0.02, y=0.1)


def draw_heatmap(axes: Any, spec: ChartSpec) -> None:
    """Cells with their numbers, light to dark."""
    # Colours by value
    cells = np.array([*spec.series.values()])  # (rows, columns)
    scale = {"bold": "Blues", "soft": "Greens", "deep": "Oranges"}[spec.style.palette]
    image = axes.imshow(cells, cmap=scale, aspect="auto")

    # Numbers that can be read on light and dark
    middle = (cells.min() + cells.max()) / 2
    for (row, column), value in np.ndenumerate(cells):
        ink = "white" if value > middle else "#222222"
        axes.text(column, row, said_number(value), ha="center", va="center", color=ink, fontsize=8)

    # Names of both sides, and the scale
    put_names(axes, spec)
    axes.set_yticks(range(len(spec.series)), [*spec.series])
    axes.spines[:].set_visible(False)
    if axes.axison:
        bar = axes.figure.colorbar(image, ax=axes)
        bar.set_label(spec.y_label)
        bar.outline.set_visible(False)


def draw_boxes(axes: Any, spec: ChartSpec) -> None:
    """Whiskers from the lowest to the highest value, boxes from quartile to quartile."""
    # matplotlib draws lines without names, so they are given some to be read back by
    (samples,) = spec.series.values()
    parts = axes.boxplot(
        [list(sample) for sample in samples],
        positions=range(len(samples)),
        whis=(0, 100),
        widths=0.55,
        patch_artist=True,
        orientation="horizontal" if spec.lies else "vertical",
        medianprops={"color": "black"},
    )
    for place, box in enumerate(parts["boxes"]):
        box.set_facecolor(color_at(spec, place))
    for part in ("medians", "caps", "whiskers"):
        for line in parts[part]:
            line.set_gid(part)
            if part != "medians":
                line.set_color(axes.xaxis.label.get_color())
    put_names(axes, spec)


DRAW: dict[str, Callable[[Any, ChartSpec], None]] = {
    "bar": draw_bars,
    "line": draw_lines,
    "area": draw_areas,
    "pie": draw_pie,
    "scatter": draw_points,
    "histogram": draw_histogram,
    "heatmap": draw_heatmap,
    "box": draw_boxes,
}


def pixels_of(figure: Any) -> Image.Image:
    """The picture, RGB."""
    rgba = np.asarray(figure.canvas.buffer_rgba())  # (H, W, 4)
    return Image.fromarray(rgba[..., :3].copy())


# ------------------------------------------------------------------------------ can it be read?


def check_letters(spec: ChartSpec, canvas: Canvas) -> None:
    """Raises BadSample when the font cannot write a letter: a white box would stand for it."""
    _, letters = family_in(font_of(spec, canvas))
    names = [spec.title, spec.x, spec.y_label, *spec.categories, *spec.series, "-.0123456789"]
    for text in names:
        for character in text:
            if ord(character) not in letters:
                raise BadSample("no glyph", f"{character!r} in {text!r}")


def check_places(figure: Any) -> None:
    """Raises BadSample when texts lie on each other or leave the picture."""
    texts = visible_texts(figure)
    width, height = figure.canvas.get_width_height()
    boxes = [(text, text.get_window_extent()) for text in texts]
    for text, box in boxes:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            raise BadSample("text cut off", repr(text.get_text()))

    # Every two of them
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        # Slanted ones lie beside each other although their boxes do not
        if one.get_rotation() % 90 and other.get_rotation() % 90:
            continue
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
            raise BadSample("texts overlap", f"{one.get_text()!r} and {other.get_text()!r}")


def visible_texts(figure: Any) -> list[Any]:
    """All texts that are drawn: of ticks only those within their axis."""
    outside = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                inside = low - 1e-9 <= tick.get_loc() <= high + 1e-9 and axes.axison
                if not inside:
                    outside |= {tick.label1, tick.label2}
    found = figure.findobj(match=is_text)
    return [t for t in found if t.get_visible() and t.get_text().strip() and t not in outside]


# -------------------------------------------------------------------------------------- read back


def read_back(figure: Any, spec: ChartSpec) -> Shown:
    """What the figure's objects show. Of the spec only its kind and what no object has: in which
    language an interval is named, which way a chart lies, and which palette names its colours."""
    axes = figure.axes[0]
    shown = Shown(spec.kind, axes.get_title(), axes.get_xlabel(), axes.get_ylabel())
    shown.horizontal = spec.lies
    if spec.kind == "heatmap" and len(figure.axes) > 1:
        shown.y = figure.axes[1].get_ylabel()
    if shown.horizontal:
        shown.x, shown.y = shown.y, shown.x
    READ[spec.kind](axes, shown, spec)
    return shown


def tick_names(axis: Any) -> list[str]:
    """Also of a plain picture, whose labels are there and not drawn."""
    return [tick.label1.get_text() for tick in axis.get_major_ticks()]


def series_name(artist: Any) -> str:
    """The name in the legend; matplotlib keeps nameless ones out by an underscore."""
    label = artist.get_label()
    return "" if label.startswith("_") else label


def color_name(color: Any, spec: ChartSpec) -> str:
    """The word for a colour: the nearest of the palette."""
    from matplotlib.colors import to_rgb

    # Shapes that are seen through, as areas are, differ a little from their palette
    palette = COLORS[ON_DARK if spec.style.dark else spec.style.palette]
    away = {
        name: np.abs(np.subtract(to_rgb(color), to_rgb(c))).sum() for name, c in palette.items()
    }
    return min(away, key=away.get)


def number_of(value: Any) -> float:
    """As it is said: heights of stacked shapes are differences, with their rounding."""
    return round(float(value), 6)


def read_bars(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    names = tick_names(axes.yaxis if shown.horizontal else axes.xaxis)
    for shapes in axes.containers:
        length = "get_width" if shown.horizontal else "get_height"
        values = [number_of(getattr(shape, length)()) for shape in shapes]
        shown.table[series_name(shapes)] = dict(zip(names, values, strict=True))

    # Colours tell bars apart, or series
    if len(axes.containers) == 1:
        shapes = axes.containers[0]
        words = [color_name(shape.get_facecolor(), spec) for shape in shapes]
        shown.colors = dict(zip(names, words))
    else:
        for shapes in axes.containers:
            shown.colors[series_name(shapes)] = color_name(shapes[0].get_facecolor(), spec)


def read_lines(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    names = tick_names(axes.xaxis)
    for line in axes.lines:
        values = map(number_of, line.get_ydata())
        shown.table[series_name(line)] = dict(zip(names, values, strict=True))
        shown.colors[series_name(line)] = color_name(line.get_color(), spec)


def read_areas(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    """From the outline of each area: between its lowest and its highest point at each place."""
    names = tick_names(axes.xaxis)
    for area in axes.collections:
        outline = area.get_paths()[0].vertices  # (points, 2)
        values = []
        for place in range(len(names)):
            across = outline[np.isclose(outline[:, 0], place), 1]
            values.append(number_of(across.max() - across.min()))
        shown.table[series_name(area)] = dict(zip(names, values, strict=True))
        shown.colors[series_name(area)] = color_name(area.get_facecolor()[0][:3], spec)


def read_pie(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    """The printed numbers, if the angles agree with them."""
    # Names and numbers as they are printed
    slices = axes.patches
    texts = [shape.get_label().split("\n") for shape in slices]
    numbers = {name: float(number) for name, number in texts}
    total = sum(numbers.values())

    # And as they are drawn
    for shape, (name, number) in zip(slices, texts):
        share = (shape.theta2 - shape.theta1) / 360
        if abs(share - numbers[name] / total) > 1e-4:
            raise BadSample(
                "slice and number differ", f"{name}: {share:.4f} of {total:g}, {number}"
            )
        shown.colors[name] = color_name(shape.get_facecolor(), spec)
    shown.table[""] = numbers


def read_points(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    for cloud in axes.collections:
        offsets = np.asarray(cloud.get_offsets())  # (points, 2)
        shown.points[series_name(cloud)] = [[number_of(x), number_of(y)] for x, y in offsets]
        shown.colors[series_name(cloud)] = color_name(cloud.get_facecolor()[0][:3], spec)


def read_histogram(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    counts = {}
    for shape in axes.patches:
        left = shape.get_x()
        name = interval_name(left, left + shape.get_width(), spec.language)
        counts[name] = number_of(shape.get_height())
    shown.table[""] = counts


def read_heatmap(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    cells = np.asarray(axes.images[0].get_array())  # (rows, columns)
    columns = tick_names(axes.xaxis)
    for name, row in zip(tick_names(axes.yaxis), cells, strict=True):
        shown.table[name] = dict(zip(columns, map(number_of, row), strict=True))


def read_boxes(axes: Any, shown: Shown, spec: ChartSpec) -> None:
    """Medians, and how far the whiskers reach; caps come in pairs, lowest first."""
    # Lines by the names that they were given
    across = "get_xdata" if shown.horizontal else "get_ydata"
    names = tick_names(axes.yaxis if shown.horizontal else axes.xaxis)
    found: dict[str, list[float]] = {}
    for line in axes.lines:
        if line.get_gid() in ("medians", "caps"):
            found.setdefault(line.get_gid(), []).append(number_of(getattr(line, across)()[0]))

    # One median and two caps for each box
    shown.table[""] = dict(zip(names, found["medians"], strict=True))
    ends = zip(found["caps"][::2], found["caps"][1::2])
    shown.spans = {name: list(pair) for name, pair in zip(names, ends, strict=True)}
    words = [color_name(box.get_facecolor(), spec) for box in axes.patches]
    shown.colors = dict(zip(names, words))


READ: dict[str, Callable[[Any, Shown, ChartSpec], None]] = {
    "bar": read_bars,
    "line": read_lines,
    "area": read_areas,
    "pie": read_pie,
    "scatter": read_points,
    "histogram": read_histogram,
    "heatmap": read_heatmap,
    "box": read_boxes,
}
