"""One HTML page that shows what a ladder of stages did: `toy.py` ends by calling `write_report`.

What it teaches: a number is believed when it can be seen. So every score stands beside its chance
level, every loss curve shows the steps that AdaLRS took back, and under every accuracy there are
pictures and answers to read.

    results, runs, answers, ... -> a string per section -> report.html   (inline SVG and PNG)

Plain string building: `el` makes one element; `loss_chart`, `bar_chart` and `heat` make the three
kinds of figure; `report.css` names every colour once, light and dark. A section without data is
left out. Same data, same bytes. In text from data or a model control characters are spelled
out and markup is escaped; the page's own policy forbids scripts and anything from a network.
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

# A loss chart: its width and the ends of its axis, in px.
SMALL = 340
LEFT = 42
RIGHT = 330

SIGNS = {
    "up": ("▲", "faster, higher rate kept"),
    "stay": ("●", "no clear gain, taken back"),
    "down": ("▼", "slower, taken back, rate lowered"),
    "abort": ("✕", "loss too high, taken back, rate lowered"),
    "rising": ("◆", "loss rose for two windows, rate lowered"),
    "rescue": ("✚", "loss not finite or above its start, taken back, rate lowered"),
    "data": ("◇", "an alarm that was the data's: nothing changed"),
}
# What the page may load: pictures that stand in it, its own style, nothing else.
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


# --------------------------------------------------------------------------------- loss charts


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


def decision_marks(decisions: list[dict], curve: np.ndarray, at: Callable, bottom: float) -> str:
    """AdaLRS over a loss chart: a sign where each decision fell, a grey band over what it took back."""
    out = ""
    for decision in decisions:
        made = decision["made"]
        x1, y = at(made, curve[min(made, len(curve) - 1)])

        # The steps that were undone.
        first, last = decision["lost"]
        if last > first:
            x0 = at(first, 1)[0]
            out += el("rect", x=x0, y=18, width=x1 - x0, height=bottom - 18, cls="undone")

        # The sign, and what was measured in its tooltip.
        action = decision["action"]
        tip = f"step {decision['step']}: {action}, rate x {decision['scale']:.3g}"
        if math.isfinite(decision["before"]):
            tip += f"; velocity {decision['before']:.2g} ± {decision['error']:.2g}"
        if math.isfinite(decision["trial"]):
            tip += f", tried {decision['trial']:.2g}"
        sign, _ = SIGNS.get(action, ("●", ""))
        out += word(sign, x1, y - 7, f"m halo {action}", tip)
    return out


def loss_chart(name: str, run: dict) -> str:
    """One stage over one axis of steps: loss (raw and smoothed), the reward of RL, the rate (log)."""
    losses = run["losses"]
    lrs = run.get("lrs") or []
    fixed = run.get("compare") or []
    reward = run.get("reward")
    steps = max(len(losses), len(fixed))

    # The loss, over that of a run at a fixed rate where there is one.
    lines = [(smooth(fixed), "fixed")] if fixed else []
    lines += [(losses, "loss raw"), (smooth(losses), "loss")]
    body, at = axes("loss", lines, steps, 18, 104)
    bottom = 122
    if fixed:  # the dash has its line's colour
        body += word("— the same at a fixed rate", RIGHT, 12, "tick e")

    # Below it the reward, and the learning rate.
    if reward:
        lines = [(reward, "reward raw"), (smooth(reward), "reward")]
        body += axes("reward", lines, steps, bottom + 26, 64)[0]
        bottom += 90
    if lrs:
        body += axes("learning rate", [(lrs, "rate")], steps, bottom + 26, 34, log=True)[0]
        bottom += 60

    body += decision_marks(run.get("decisions") or [], smooth(losses), at, bottom)
    for step in ticks(0, steps):
        body += word(f"{step:g}", at(step, 1)[0], bottom + 15, "tick m")

    size = el("span", f"{len(losses)} steps, {duration(run.get('seconds', 0))}", cls="soft")
    caption = el("figcaption", el("h3", safe(name)), size)
    return el("figure", caption, svg(SMALL, bottom + 18, f"loss of {name}", body))


def curves(runs: dict[str, dict]) -> str:
    """A chart for every stage, and what AdaLRS's signs mean where it searched."""
    signs = [(sign, action, f"{action}: {text}") for action, (sign, text) in SIGNS.items()]
    meaning = legend(*signs, ("", "undone", "steps taken back"))
    searched = any(run.get("decisions") for run in runs.values())

    charts = [loss_chart(name, run) for name, run in runs.items()]
    return section(
        "Losses",
        "Smoothed, with the raw values behind, over all executed steps.",
        meaning if searched else "",
        el("div", *charts, cls="charts") if charts else "",
    )


# ------------------------------------------------------------------------------ bars and tables


def bar_chart(
    label: str,
    rows: list[tuple[str, str, list[float], float | None, float]],
    top: float,
    percent: bool = True,
) -> str:
    """Horizontal bars. A row: name, text at the right, one or two values, chance or None, error."""
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


def dot_line(before: float, after: float, chance: float, worse: bool) -> str:
    """A stage's move as a drawing: a pale dot before, a full one after, a tick at chance."""
    longest = max(1.0, before, after, chance)

    def at(value: float) -> float:
        return 6 + 168 * max(value, 0) / longest

    a = at(before)
    b = at(after)
    dots = line(6, 8, 174, 8)
    dots += line(at(chance), 1, at(chance), 15, "chance")
    dots += el("rect", x=min(a, b), y=7, width=abs(b - a), height=2, cls="pale")
    dots += el("circle", cx=a, cy=8, r=3.5, cls="pale")
    dots += el("circle", cx=b, cy=8, r=4, cls="bad" if worse else "blue")
    return svg(180, 16, f"{before:.3f} to {after:.3f}, chance {chance:.3f}", dots)


def stage_rows(stages: list[dict]) -> str:
    """What each stage was to move, before and after; red where it moved the wrong way."""
    if not stages:
        return ""

    heads = ("stage", "metric", "before", "after", "", "chance", "n", "time")
    cells = [el("th", h, cls="" if h in ("stage", "metric") else "r") for h in heads]
    table = el("tr", *cells)
    for stage in stages:
        before, after, chance = (stage[key] for key in ("before", "after", "chance"))
        lower = stage["lower_is_better"]
        worse = after >= before if lower else after <= before

        direction = el("span", ", lower is better" if lower else "", cls="soft")
        sign = "✗ " if worse else ""
        table += el(
            "tr",
            el("td", el("b", safe(stage["name"]))),
            el("td", safe(stage["metric"]) + direction),
            el("td", f"{before:.3f}", cls="r"),
            el("td", f"{sign}{after:.3f}", cls="r bad" if worse else "r"),
            el("td", dot_line(before, after, chance, worse)),
            el("td", f"{chance:.3f}", cls="r soft"),
            el("td", str(stage["samples"]), cls="r soft"),
            el("td", duration(stage["seconds"]), cls="r soft"),
        )
    return el("div", el("table", table), cls="scroll")


# -------------------------------------------------------------------------- what is in the page


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


def answer_card(graded: dict) -> str:
    """One answer: pictures, question, what was said (its chain in grey), the truth, right or wrong."""
    score = graded["score"]
    partial = (f"{score:.2f}", "rising")
    sign, cls = {0: ("✗", "bad"), 1: ("✓", "good")}.get(score, partial)

    # The chain of thought is everything up to the end of thinking.
    chain, closed, answer = graded["said"].rpartition("</think>")
    thought = el("span", safe(chain + closed), cls="soft")
    said = el("b", safe(answer.strip() or "(nothing)"))

    asked = ", asked to think" if graded["mode"] == "think" else ""
    text = el("p", safe(graded["question"]))
    text += el("p", el("b", sign, cls=cls), " ", f"{thought} {said}")
    text += el("p", safe(f"truth: {graded['truth']}{asked}"), cls="soft")

    images = [image_tag(image) for image in graded["images"]]
    pictures = el("div", *images, cls="pictures") if images else ""
    return el("div", pictures, el("div", text), cls="card many" if len(images) > 1 else "card")


def answers_by_family(graded: list[dict]) -> str:
    """The cards, family by family."""
    families: dict[str, str] = {}
    for one in graded:
        families[one["family"]] = families.get(one["family"], "") + answer_card(one)

    groups = []
    for family, cards in families.items():
        groups.append(
            el("div", el("h3", safe(family)), el("div", cards, cls="cards"), cls="family")
        )
    return "".join(groups)


def headline(results: dict) -> str:
    """Title, what it ran on, and the numbers that sum it up."""
    about = {key: results[key] for key in ("model", "seed") if key in results}
    about |= results.get("versions", {})
    ran_on = " · ".join(f"{key} {value}" for key, value in about.items())

    numbers = []
    overall = results["final"].get("overall")
    if overall:
        meaning = f"overall accuracy, chance {overall['chance']:.1%}"
        numbers.append((f"{overall['accuracy']:.1%}", meaning))
    numbers.append((str(len(results["stages"])), "stages"))
    if "total_seconds" in results:
        cores = results.get("cores", "?")
        numbers.append((duration(results["total_seconds"]), f"on {cores} cores"))
    if "packing" in results:
        filled = results["packing"]["filled"]
        numbers.append((f"{filled:.1%}", "of the packed positions hold tokens"))

    title = el("h1", safe(results["title"]))
    return title + el("p", safe(ran_on), cls="note") + facts(*numbers)


def two_choices(results: dict) -> str:
    """What AdaLRS gained, and whether the model thinks when (and only when) it is asked to."""
    numbers = []

    search = results.get("adalrs")
    if search:
        rates = f"{search['start_lr']:.1e} → {search['final_lr']:.1e}"
        numbers.append((rates, f"rate, AdaLRS, {search['extra_steps']} extra steps"))
        losses = f"{search['loss']:.3f} / {search['fixed_rate_loss']:.3f}"
        numbers.append((losses, "last loss, with AdaLRS / at the fixed rate"))

    modes = results.get("modes")
    if modes:
        for key, text in (("direct", "think unasked"), ("think", "think when asked")):
            share = modes.get(f"{key}_thinks", modes.get(f"{key}_share"))
            accuracy = modes[f"{key}_accuracy"]
            numbers.append((f"{share:.0%}", f"{text}, accuracy {accuracy:.1%}"))
    return facts(*numbers)


def score_bars(final: dict, families: list[str]) -> str:
    """Accuracy per family with its error."""
    rows = []
    for family in families:
        s = final[family]
        text = f"{s['accuracy']:.1%} ± {100 * s['error']:.1f}"
        rows.append((family, text, [s["accuracy"]], s["chance"], s["error"]))
    return bar_chart("scores", rows, 1)


def swap_bars(swap: dict) -> str:
    """What is left of each family's accuracy when the pictures are another sample's."""
    rows = []
    for family, s in swap.items():
        text = f"{s['own']:.0%} / {s['swapped']:.0%}"
        rows.append((family, text, [s["own"], s["swapped"]], s["chance"], 0))
    return bar_chart("own and swapped pictures", rows, 1)


def time_bars(stages: list[dict]) -> str:
    """Seconds of each stage."""
    rows = [(s["name"], duration(s["seconds"]), [s["seconds"]], None, 0) for s in stages]
    longest = max((s["seconds"] for s in stages), default=1)
    return bar_chart("seconds per stage", rows, longest, percent=False)


def family_heat(results: dict, families: list[str]) -> str:
    """Every family's score after every stage, below its chance."""
    after = results.get("families_after", {})
    if not after:
        return ""
    rows = {"blind chance": [results["final"][family]["chance"] for family in families]}
    for name, scores in after.items():
        rows[name] = [scores.get(family) for family in families]
    return heat(rows, families)


def html_page(title: str, *parts: str, style: str = "") -> str:
    """A whole page around finished parts: character set, policy, style (and what a page adds to it)."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += el("title", safe(title))
    head += el("style", CSS + style)
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{body}\n</body></html>\n'


def write_report(
    path: Path,
    results: dict,
    runs: dict[str, dict],
    graded: list[dict],
    packed: list[list[tuple[int, bool | None]]],
    router: dict[str, list[float]],
    swap: dict,
    looked: str = "",
    style: str = "",
) -> None:
    """Write the page.

    results: results.json. runs: stage -> what its Run logged. graded: the answers to show.
    packed: rows of one batch as (document length, has image; None for padding).
    router: shares of the experts, per layer and kind of token.
    swap: family -> accuracy with its own and with another picture.
    looked: finished markup of where a few answers looked (talk/page.py), and its style.
    """
    final = results["final"]
    stages = results["stages"]
    families = sorted(final, key=lambda family: family == "overall")  # the mean comes last
    experts = max(map(len, router.values()), default=1)
    even_share = 1 / experts

    moves = section(
        "Stages",
        "What each stage is meant to move, on held-out samples: pale dot before, full dot after; "
        "the tick is chance.",
        stage_rows(stages),
    )
    own = section(
        "Final scores",
        "With standard error; the tick is the best blind strategy.",
        score_bars(final, families),
    )
    swapped = section(
        "The image matters",
        "Pale: with another sample's picture. It should fall to the tick.",
        swap_bars(swap),
    )
    history = section(
        "Score per task after every stage",
        "In percent. Read down: what a stage taught, what another forgot.",
        family_heat(results, families),
    )
    spent = section("Time per stage", "As measured on this machine.", time_bars(stages))
    measured = section(
        "Two choices, measured",
        "A rate found while training; thinking on demand.",
        two_choices(results),
    )
    batch = section(
        "A packed batch",
        "One row a line, one rectangle a document, in tokens. No document sees another.",
        drawn_rows(packed) if packed else "",
    )
    load = section(
        "Expert load",
        "Percent of the routed tokens of a kind, per layer and expert; full colour: twice the even "
        "share. No token is dropped.",
        heat(router, [str(e) for e in range(experts)], 2 * even_share),
    )
    attention = section(
        "Where it looked",
        "The first answer of a few families, token by token: bright is what a token looked at most when it "
        "was chosen; the numbers are percent of its attention to the picture.",
        looked,
    )
    answers = section(
        "Answers",
        "Held-out samples as they come, not chosen. A number instead of a sign is a partial score.",
        answers_by_family(graded),
    )

    page = html_page(
        results["title"],
        headline(results),
        moves,
        el("div", own, swapped, cls="two"),
        history,
        curves(runs),
        el("div", spent, measured, cls="two"),
        batch,
        load,
        attention,
        answers,
        style=style,
    )
    path.write_text(page, encoding="utf-8")
