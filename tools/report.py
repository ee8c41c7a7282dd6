"""One HTML page that shows what a ladder of stages did: `toy.py` ends by calling `write`.

What it teaches: a number is believed when it can be seen. So every score stands beside its chance level, every loss
curve shows the steps that AdaLRS took back, and under every accuracy there are pictures and answers to read.

    results, runs, answers, ... -> a string per section -> report.html   (no network, no script: inline SVG and PNG)

Plain string building: `el` makes one element; `chart`, `bars` and `heat` make the three kinds of figure; CSS names
every colour once, light and dark side by side. A section without data is left out. Same data, same bytes.
"""

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

SMALL, LEFT, RIGHT = 340, 42, 330  # width of a loss chart and the ends of its axis, in px
SIGNS = {
    "up": ("▲", "faster, higher rate kept"),
    "stay": ("●", "no clear gain, taken back"),
    "down": ("▼", "slower, taken back, rate lowered"),
    "abort": ("✕", "loss too high, taken back, rate lowered"),
    "rising": ("◆", "loss rose for two windows, rate lowered"),
    "rescue": ("✚", "loss not finite or above its start, taken back, rate lowered"),
    "data": ("◇", "an alarm that was the data's: nothing changed"),
}
CSS = """
:root { color-scheme: light dark; --paper: light-dark(#fdfcf9, #15171a); --ink: light-dark(#1e2022, #e3e1da);
  --soft: light-dark(#6a6963, #a09e97); --line: light-dark(#e0ddd4, #33363a); --blue: light-dark(#2b6693, #82b6de);
  --pale: light-dark(#a8c6dc, #3a5b75); --heat: light-dark(#8ebadb, #2a618a); --ochre: light-dark(#b27318, #dba750);
  --good: light-dark(#2c7a4b, #72c391); --bad: light-dark(#b23a31, #ec8d82); --violet: light-dark(#7a4d96, #c09bd8) }
* { box-sizing: border-box; margin: 0; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body { margin: 0 auto; max-width: 1108px; padding: 56px 24px 80px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums }
h1, h2, .facts b { font: 500 38px/1.15 "Iowan Old Style", Palatino, "Palatino Linotype", Georgia, serif }
h2 { font-size: 22px } h3 { font-size: 13px } .facts b { display: block; font-size: 25px; color: var(--ink) }
section { margin-top: 52px; border-top: 1px solid var(--line); padding-top: 14px; min-width: 0 }
.note { margin: 2px 0 16px } .scroll { overflow-x: auto } figcaption .soft { font-size: 12px }
.scroll table { min-width: 720px } .facts { display: flex; flex-wrap: wrap; gap: 16px 44px }
.two, .family { display: grid; gap: 6px 36px } table { border-collapse: collapse; width: 100% }
td, th { padding: 4px 10px 4px 0; text-align: left } th { font-weight: 500; font-size: 12px }
tr + tr td { border-top: 1px solid var(--line) } .r, td b { white-space: nowrap } .r { text-align: right }
.heat th, .heat td { padding: 3px; text-align: center; font-size: 12px }
.heat td { border: 1px solid var(--paper); background: color-mix(in srgb, var(--heat) var(--v, 0%), var(--paper)) }
.heat th:first-child { text-align: left; white-space: nowrap; width: 130px; color: var(--ink) }
svg { display: block; width: 100%; overflow: visible; font-size: 11px; fill: currentColor } td svg { min-width: 110px }
line, polyline { color: var(--line); stroke: currentColor; fill: none } polyline { stroke-width: 1.6 }
.note, .soft, .facts, .legend, th, .tick, .stay, .undone, .fixed { color: var(--soft) } .abort { color: var(--violet) }
.good, .up, .reward { color: var(--good) } .bad, .down, .rescue { color: var(--bad) } .blue, .loss { color: var(--blue) }
.rising, .rate { color: var(--ochre) } .pale { color: var(--pale) } .padding { fill: url(#hatch); stroke: var(--line) }
.undone { opacity: .2 } .chance { color: var(--ink); stroke-width: 1.3 } .under { color: var(--paper); stroke-width: 4 }
.raw { stroke-width: .7; opacity: .35 } .halo { stroke: var(--paper); stroke-width: 3px; paint-order: stroke }
.tick { font-size: 10px } .e { text-anchor: end } .m { text-anchor: middle }
.legend { display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 12px; margin-bottom: 14px }
.legend svg { display: inline-block; width: 14px; margin-right: 6px } .pixel { image-rendering: pixelated }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 26px 30px }
figure, .card { break-inside: avoid } figcaption { display: flex; justify-content: space-between; margin-bottom: 4px }
.family { padding: 16px 0 } .family + .family { border-top: 1px solid var(--line) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(272px, 1fr)); gap: 18px 24px }
.card { display: flex; gap: 10px 12px; font-size: 13px; line-height: 1.4; overflow-wrap: anywhere }
.card > div { min-width: 0 } .card .pictures { display: flex; gap: 4px; flex: none } .many { flex-direction: column }
.card img { width: 84px; border-radius: 2px; outline: 1px solid var(--line); align-self: start }
@media (min-width: 860px) { .two { grid-template-columns: 1fr 1fr } .family { grid-template-columns: 90px 1fr } }
@media print { :root { color-scheme: light } body { padding: 0 } section { margin-top: 34px } }
"""


def el(name: str, *inside: str, tip: str = "", **attributes: object) -> str:
    """One element around finished markup. `cls` is class, floats are rounded, `tip` becomes <title>, SVG's tooltip."""
    text = name
    for key, value in attributes.items():
        value = f"{value:.1f}" if isinstance(value, float) else str(value)
        text += f' {"class" if key == "cls" else key}="{escape(value)}"'
    return f"<{text}>{el('title', escape(tip)) if tip else ''}{''.join(inside)}</{name}>"


def svg(width: int, height: float, label: str, *inside: str) -> str:
    return el(
        "svg", *inside, viewBox=f"0 0 {width} {height:g}", role="img", **{"aria-label": label}
    )


def word(text: object, x: float, y: float, cls: str = "", tip: str = "") -> str:
    return el("text", escape(str(text)), x=x, y=y, cls=cls, tip=tip)


def line(x0: float, y0: float, x1: float, y1: float, *classes: str) -> str:
    return "".join(el("line", x1=x0, y1=y0, x2=x1, y2=y1, cls=c) for c in classes or [""])


def section(title: str, note: str, *body: str) -> str:
    """A headed part of the page; nothing at all when its body is empty."""
    return el("section", el("h2", title), el("p", note, cls="note"), *body) if any(body) else ""


def facts(*items: tuple[str, str]) -> str:
    return (
        el("div", *(el("div", el("b", escape(n)), escape(text)) for n, text in items), cls="facts")
        if items
        else ""
    )


def legend(*items: tuple[str, str, str]) -> str:
    """(sign, class, meaning) in a row; without a sign, a patch of the class's colour."""
    patch = lambda cls: svg(14, 10, "", el("rect", width=14, height=10, cls=cls))
    spans = (
        el("span", el("span", s, cls=cls) + " " if s else patch(cls), escape(text))
        for s, cls, text in items
    )
    return el("div", *spans, cls="legend")


def duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 100
        else f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    )


def ticks(low: float, high: float) -> list[float]:
    """At most six round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    least = max(high - low, 1e-9) / 5
    step = next(
        m * 10.0**e for e in range(-12, 12) for m in (1, 2, 5) if m * 10.0**e >= least * 0.999
    )
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(values: list[float]) -> np.ndarray:
    """Centred mean over a thirtieth of the run, or 5 steps. Leaves out non-finite losses, which the loop skipped."""
    v, kernel = (
        np.asarray(values, float),
        np.ones(2 * max(len(values) // 60, min(len(values) // 8, 2)) + 1),
    )
    total, count = (
        np.convolve(a, kernel, "same")
        for a in (np.nan_to_num(v, posinf=0, neginf=0), np.isfinite(v))
    )
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def axes(
    label: str,
    lines: list[tuple[list[float], str]],
    steps: int,
    top: float,
    height: float,
    log: bool = False,
) -> tuple[str, Callable]:
    """Lines (values, class) on y ticks; also the map from (step, value) to a point, for what is drawn over them.

    The axis leaves out the highest hundredth of the values: the first steps of a run would flatten all others.
    """
    scale, usable = math.log10 if log else float, lambda v: math.isfinite(v) and (v > 0 or not log)
    seen = [scale(v) for values, _ in lines for v in values if usable(v)] or [0.0]
    low, high = np.percentile(seen, (0, 100 if log else 99))
    low, high = (low, high) if high - low > 1e-9 else (low - 1, high + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        share = (scale(value) - low) / (high - low)
        return LEFT + step / max(steps, 1) * (RIGHT - LEFT), top + height * (
            1 - min(max(share, 0), 1)
        )

    out = word(label, LEFT, top - 6, "tick")
    for value in sorted({10 ** min(seen), 10 ** max(seen)}) if log else ticks(low, high):
        y, text = at(0, value)[1], f"{value:.2g}".replace("e-0", "e-") if log else f"{value:g}"
        out += line(LEFT, y, RIGHT, y) + word(text, LEFT - 6, y + 3.5, "tick e")
    for values, cls in lines:
        every = max(
            1, len(values) // 400
        )  # more points than pixels would only make the file larger
        points = (at(i, values[i]) for i in range(0, len(values), every) if usable(values[i]))
        out += el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), cls=cls)
    return out, at


def marks(decisions: list[dict], curve: np.ndarray, at: Callable, bottom: float) -> str:
    """AdaLRS over a loss chart: a sign where each decision fell, a grey band over the steps that it took back."""
    out = ""
    for d in decisions:
        first, last = d["lost"]
        x0, (x1, y) = at(first, 1)[0], at(d["made"], curve[min(d["made"], len(curve) - 1)])
        out += (
            el("rect", x=x0, y=18, width=x1 - x0, height=bottom - 18, cls="undone")
            if last > first
            else ""
        )
        tip = f"step {d['step']}: {d['action']}, rate x {d['scale']:.3g}"
        tip += (
            f"; velocity {d['before']:.2g} ± {d['error']:.2g}" if math.isfinite(d["before"]) else ""
        )
        tip += f", tried {d['trial']:.2g}" if math.isfinite(d["trial"]) else ""
        out += word(SIGNS[d["action"]][0], x1, y - 7, f"m halo {d['action']}", tip)
    return out


def chart(name: str, run: dict) -> str:
    """One stage: loss (raw and smoothed), the reward of RL stages and the rate (log scale) over one axis of steps."""
    losses, lrs, fixed = run["losses"], run.get("lrs") or [], run.get("compare") or []
    steps, lines = max(len(losses), len(fixed)), [(losses, "loss raw"), (smooth(losses), "loss")]
    (body, at), bottom = (
        axes("loss", ([(smooth(fixed), "fixed")] if fixed else []) + lines, steps, 18, 104),
        122,
    )
    if fixed:
        body += word(
            "— the same at a fixed rate", RIGHT, 12, "tick e"
        )  # the dash has its line's colour
    if run.get("reward"):
        lines = [(run["reward"], "reward raw"), (smooth(run["reward"]), "reward")]
        body, bottom = body + axes("reward", lines, steps, bottom + 26, 64)[0], bottom + 90
    if lrs:
        rate, _ = axes("learning rate", [(lrs, "rate")], steps, bottom + 26, 34, log=True)
        body, bottom = body + rate, bottom + 60
    body += marks(run.get("decisions") or [], smooth(losses), at, bottom)
    body += "".join(word(f"{t:g}", at(t, 1)[0], bottom + 15, "tick m") for t in ticks(0, steps))
    size = el("span", f"{len(losses)} steps, {duration(run.get('seconds', 0))}", cls="soft")
    caption = el("figcaption", el("h3", escape(name)), size)
    return el("figure", caption, svg(SMALL, bottom + 18, f"loss of {name}", body))


def bars(
    label: str,
    rows: list[tuple[str, str, list[float], float | None, float]],
    top: float,
    percent=True,
) -> str:
    """Horizontal bars. A row: name, text at the right, one or two values, chance level or None, standard error."""
    at = lambda v: 92 + 344 * min(v, top) / top
    foot, out = len(rows) * 26 + 4, ""
    for t in ticks(0, top):
        text = f"{100 * t:.0f}%" if percent else f"{t:g} s"
        out += line(at(t), 0, at(t), foot) + word(text, at(t), foot + 13, "tick m")
    for y, (name, text, values, chance, error) in zip(range(4, foot, 26), rows):
        h = 18 / len(values)
        for j, v in enumerate(values):
            cls = "blue" if j == 0 and percent else "pale"
            out += el(
                "rect",
                x=92,
                y=y + j * h,
                width=at(v) - 92,
                height=h,
                cls=cls,
                tip=f"{name}: {text}",
            )
        if error:
            a, b = at(values[0] - error), at(values[0] + error)
            out += line(
                a, y + 9, b, y + 9, "under", "chance"
            )  # the line below it parts it from the bar
        out += (
            line(at(chance), y - 2, at(chance), y + 20, "under", "chance")
            if chance is not None
            else ""
        )
        out += word(name, 84, y + 13, "e") + word(text, 520, y + 13, "tick e")
    return svg(520, foot + 28, label, out) if rows else ""


def heat(rows: dict[str, list[float | None]], columns: list[str], full: float = 1.0) -> str:
    """A table of percentages; a cell is coloured by its share of `full`."""
    table = el("tr", el("th"), *(el("th", escape(c)) for c in columns))
    for name, values in rows.items():
        row = el("th", escape(name))
        for c, v in zip(columns, values):
            strength = {} if v is None else {"style": f"--v:{min(100 * v / full, 100):.0f}%"}
            row += el("td", "" if v is None else f"{100 * v:.0f}", title=f"{name}, {c}", **strength)
        table += el("tr", row)
    return el("div", el("table", table, cls="heat"), cls="scroll") if rows else ""


def stage_table(stages: list[dict]) -> str:
    """What each stage was to move, before and after; red where it moved the wrong way."""
    columns = ("stage", "metric", "before", "after", "", "chance", "n", "time")
    table = el("tr", *(el("th", c, cls="" if c in ("stage", "metric") else "r") for c in columns))
    for s in stages:
        before, after, chance = s["before"], s["after"], s["chance"]
        worse = after >= before if s["lower_is_better"] else after <= before
        at = lambda v: 6 + 168 * max(v, 0) / max(1.0, before, after, chance)
        a, b = at(before), at(after)
        dots = line(6, 8, 174, 8) + line(at(chance), 1, at(chance), 15, "chance")
        dots += el("rect", x=min(a, b), y=7, width=abs(b - a), height=2, cls="pale")
        dots += el("circle", cx=a, cy=8, r=3.5, cls="pale")
        dots += el("circle", cx=b, cy=8, r=4, cls="bad" if worse else "blue")
        metric = escape(s["metric"]) + el(
            "span", ", lower is better" * s["lower_is_better"], cls="soft"
        )
        cells = [
            el("td", f"{'✗ ' * worse}{after:.3f}", cls="r bad" if worse else "r"),
            el("td", svg(180, 16, f"{before:.3f} to {after:.3f}, chance {chance:.3f}", dots)),
        ]
        cells += [
            el("td", v, cls="r soft")
            for v in (f"{chance:.3f}", str(s["samples"]), duration(s["seconds"]))
        ]
        cells[:0] = [
            el("td", el("b", escape(s["name"]))),
            el("td", metric),
            el("td", f"{before:.3f}", cls="r"),
        ]
        table += el("tr", *cells)
    return el("div", el("table", table), cls="scroll") if stages else ""


def packing(rows: list[list[tuple[int, bool | None]]]) -> str:
    """Every row of a packed batch as a bar, every document as a rectangle."""
    kinds = {
        True: ("blue", "with image"),
        False: ("pale", "text only"),
        None: ("padding", "padding"),
    }
    length = max((sum(n for n, _ in row) for row in rows), default=0) or 1
    at = lambda n: 20 + 1040 * n / length
    out = el(
        "defs",
        el(
            "pattern",
            el("rect", width=2, height=5, cls="undone"),
            id="hatch",
            width=5,
            height=5,
            patternUnits="userSpaceOnUse",
            patternTransform="rotate(45)",
        ),
    )
    for i, row in enumerate(rows):
        used = 0
        out += word(i, 12, i * 18 + 10.5, "tick e")
        for n, image in row:
            cls, kind = kinds[image]
            box = {
                "x": at(used) + 0.6,
                "width": max(at(used + n) - at(used) - 1.2, 0.6),
                "y": i * 18,
                "height": 13,
            }
            out += el("rect", **box, cls=cls, tip=f"{n} tokens, {kind}")
            used += n
    out += "".join(word(f"{t:g}", at(t), len(rows) * 18 + 10, "tick m") for t in ticks(0, length))
    key = legend(*(("", cls, kind) for cls, kind in kinds.values()))
    return key + svg(1060, len(rows) * 18 + 14, "packed rows", out)


def picture(image: Image.Image) -> str:
    """A data URI. The page enlarges small pictures pixel by pixel; large ones (real data) are made smaller here."""
    image, file = image.convert("RGB"), io.BytesIO()
    image.thumbnail((252, 252))
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" class="{"pixel" if max(image.size) <= 84 else ""}" src="data:image/png;base64,{data}">'


def card(g: dict) -> str:
    """One answer: pictures, question, what was said (its chain of thought in grey), the truth, right or wrong."""
    sign, cls = {0: ("✗", "bad"), 1: ("✓", "good")}.get(g["score"], (f"{g['score']:.2f}", "rising"))
    chain, closed, answer = g["said"].rpartition("</think>")
    said = (
        el("span", escape(chain + closed), cls="soft")
        + " "
        + el("b", escape(answer.strip() or "(nothing)"))
    )
    truth = f"truth: {g['truth']}" + ", asked to think" * (g["mode"] == "think")
    text = el("p", escape(g["question"])) + el("p", el("b", sign, cls=cls), " ", said)
    text += el("p", escape(truth), cls="soft")
    pictures = el("div", *map(picture, g["images"]), cls="pictures") if g["images"] else ""
    return el("div", pictures, el("div", text), cls="card many" if len(g["images"]) > 1 else "card")


def answers(graded: list[dict]) -> str:
    groups: dict[str, str] = {}
    for g in graded:
        groups[g["family"]] = groups.get(g["family"], "") + card(g)
    return "".join(
        el("div", el("h3", escape(f)), el("div", c, cls="cards"), cls="family")
        for f, c in groups.items()
    )


def header(r: dict) -> str:
    """Title, what it ran on, and the numbers that sum it up."""
    about = {k: r[k] for k in ("model", "seed") if k in r} | r.get("versions", {})
    numbers, overall = [(str(len(r["stages"])), "stages")], r["final"].get("overall")
    if overall:
        numbers.insert(
            0, (f"{overall['accuracy']:.1%}", f"overall accuracy, chance {overall['chance']:.1%}")
        )
    if "total_seconds" in r:
        numbers.append((duration(r["total_seconds"]), f"on {r.get('cores', '?')} cores"))
    if "packing" in r:
        numbers.append((f"{r['packing']['filled']:.1%}", "of the packed positions hold tokens"))
    line = " · ".join(f"{k} {v}" for k, v in about.items())
    return el("h1", escape(r["title"])) + el("p", escape(line), cls="note") + facts(*numbers)


def choices(r: dict) -> str:
    """What AdaLRS gained, and whether the model thinks when (and only when) it is asked to."""
    numbers, a, m = [], r.get("adalrs"), r.get("modes")
    if a:
        numbers += [
            (
                f"{a['start_lr']:.1e} → {a['final_lr']:.1e}",
                f"rate, AdaLRS, {a['extra_steps']} extra steps",
            ),
            (
                f"{a['loss']:.3f} / {a['fixed_rate_loss']:.3f}",
                "last loss, with AdaLRS / at the fixed rate",
            ),
        ]
    for key, text in (("direct", "think unasked"), ("think", "think when asked")) if m else ():
        share = m.get(f"{key}_thinks", m.get(f"{key}_share"))
        numbers.append((f"{share:.0%}", f"{text}, accuracy {m[f'{key}_accuracy']:.1%}"))
    return facts(*numbers)


def scores(final: dict, families: list[str], swap: dict) -> tuple[str, str]:
    """Accuracy per family with its error; what is left of it when the pictures are another sample's."""
    rows = [
        (
            f,
            f"{s['accuracy']:.1%} ± {100 * s['error']:.1f}",
            [s["accuracy"]],
            s["chance"],
            s["error"],
        )
        for f in families
        for s in [final[f]]
    ]
    eyes = [
        (f, f"{s['own']:.0%} / {s['swapped']:.0%}", [s["own"], s["swapped"]], s["chance"], 0)
        for f, s in swap.items()
    ]
    return bars("scores", rows, 1), bars("own and swapped pictures", eyes, 1)


def curves(runs: dict[str, dict]) -> str:
    signs = legend(
        *((s, a, f"{a}: {t}") for a, (s, t) in SIGNS.items()), ("", "undone", "steps taken back")
    )
    searched = any(r.get("decisions") for r in runs.values())
    charts = el("div", *(chart(n, r) for n, r in runs.items()), cls="charts") if runs else ""
    return section(
        "Losses",
        "Smoothed, with the raw values behind, over all executed steps.",
        signs * searched,
        charts,
    )


def write(
    path: Path,
    results: dict,
    runs: dict[str, dict],
    graded: list[dict],
    packed: list[list[tuple[int, bool | None]]],
    router: dict[str, list[float]],
    swap: dict,
) -> None:
    """The page. `results` is results.json; `runs`: stage -> what its Run logged; `graded`: the answers to show.

    `packed`: rows of one batch as (document length, has image; None for padding); `router`: shares of the experts, per layer
    and kind of token; `swap`: family -> accuracy with its own and with another picture.
    """
    final, stages = results["final"], results["stages"]
    families = sorted(final, key=lambda f: f == "overall")  # the mean comes last
    times = [(s["name"], duration(s["seconds"]), [s["seconds"]], None, 0) for s in stages]
    after = {
        name: [row.get(f) for f in families]
        for name, row in results.get("families_after", {}).items()
    }
    after = {"blind chance": [final[f]["chance"] for f in families]} | after if after else {}
    experts = max(map(len, router.values()), default=1)
    own, swapped = scores(final, families, swap)
    spent = bars(
        "seconds per stage", times, max((s["seconds"] for s in stages), default=1), percent=False
    )
    two = lambda *sections: el("div", *sections, cls="two")
    parts = [
        header(results),
        section(
            "Stages",
            "What each stage is meant to move, on held-out samples: pale dot before, full dot after; the "
            "tick is chance.",
            stage_table(stages),
        ),
        two(
            section(
                "Final scores", "With standard error; the tick is the best blind strategy.", own
            ),
            section(
                "The image matters",
                "Pale: with another sample's picture. It should fall to the tick.",
                swapped,
            ),
        ),
        section(
            "Score per task after every stage",
            "In percent. Read down: what a stage taught, what another forgot.",
            heat(after, families),
        ),
        curves(runs),
        two(
            section("Time per stage", "As measured on this machine.", spent),
            section(
                "Two choices, measured",
                "A rate found while training; thinking on demand.",
                choices(results),
            ),
        ),
        section(
            "A packed batch",
            "One row a line, one rectangle a document, in tokens. No document sees another.",
            packing(packed) if packed else "",
        ),
        section(
            "Expert load",
            "Percent of the routed tokens of a kind, per layer and expert; full colour: twice the even "
            "share. No token is dropped.",
            heat(router, [str(e) for e in range(experts)], 2 / experts),
        ),
        section(
            "Answers",
            "Held-out samples as they come, not chosen. A number instead of a sign is a partial score.",
            answers(graded),
        ),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += el("title", escape(results["title"])) + el("style", CSS)
    path.write_text(
        f'<!doctype html>\n<html lang="en">{head}\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n",
        encoding="utf-8",
    )
