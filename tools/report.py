"""One HTML page that shows what a ladder of stages did: `toy.py` ends by calling `write_report`.

What it teaches: a number is believed when it can be seen. So the page opens with what happened and
with answers to read; every score stands beside its chance level and, where other seeds are known,
inside their range; every loss curve shows the steps that AdaLRS took back.

    results, runs, answers, ... -> a string per section -> report.html   (inline SVG and PNG)

    python -m tools.report runs/a runs/b     # two ladders side by side: tools/compare.py

`tools/drawing.py` makes elements and figures, `tools/story.py` the parts that tell what happened.
A section without data is left out. Same data, same bytes.
"""

import math
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

from infra.cli import command
from tools.compare import compare_ladders
from tools.drawing import (
    RIGHT,
    SMALL,
    axes,
    bar_chart,
    drawn_rows,
    duration,
    el,
    facts,
    heat,
    html_page,
    image_tag,
    legend,
    line,
    safe,
    section,
    smooth,
    svg,
    ticks,
    word,
)
from tools.evidence import graded_families
from tools.story import first_screen, said_line, skill_charts, thinking_part

SIGNS = {
    "up": ("▲", "faster, higher rate kept"),
    "stay": ("●", "no clear gain, taken back"),
    "down": ("▼", "slower, taken back, rate lowered"),
    "abort": ("✕", "loss too high, taken back, rate lowered"),
    "rising": ("◆", "loss rose for two windows, rate lowered"),
    "rescue": ("✚", "loss not finite or above its start, taken back, rate lowered"),
    "data": ("◇", "an alarm that was the data's: nothing changed"),
}


# --------------------------------------------------------------------------------- loss charts


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


def dot_line(
    before: float, after: float, chance: float, worse: bool, seeds: dict | None = None
) -> str:
    """A stage's move as a drawing: a pale dot before, a full one after, a tick at chance.

    seeds: the range of `after` over other seeds ("low", "high"), a broad band behind.
    """
    ends = (seeds["low"], seeds["high"]) if seeds else ()
    longest = max(1.0, before, after, chance, *ends)

    def at(value: float) -> float:
        return 6 + 168 * max(value, 0) / longest

    a = at(before)
    b = at(after)
    dots = line(6, 8, 174, 8)
    if seeds:
        low = at(seeds["low"])
        tip = f"seeds: {seeds['low']:.3f} to {seeds['high']:.3f}"
        width = max(at(seeds["high"]) - low, 1.5)
        dots += el("rect", x=low, y=2, width=width, height=12, cls="band", tip=tip)
    dots += line(at(chance), 1, at(chance), 15, "chance")
    dots += el("rect", x=min(a, b), y=7, width=abs(b - a), height=2, cls="pale")
    dots += el("circle", cx=a, cy=8, r=3.5, cls="pale")
    dots += el("circle", cx=b, cy=8, r=4, cls="bad" if worse else "blue")
    return svg(180, 16, f"{before:.3f} to {after:.3f}, chance {chance:.3f}", dots)


def stage_rows(stages: list[dict], seeds: dict) -> str:
    """What each stage was to move, before and after; red where it moved the wrong way."""
    if not stages:
        return ""
    known = {stage["name"]: stage for stage in seeds.get("stages", [])}

    heads = ["stage", "metric", "before", "after", "", "chance", "n", "time"]
    if known:
        heads.insert(5, "range of seeds")
    cells = [el("th", h, cls="" if h in ("stage", "metric") else "r") for h in heads]
    table = el("tr", *cells)
    for stage in stages:
        before, after, chance = (stage[key] for key in ("before", "after", "chance"))
        lower = stage["lower_is_better"]
        worse = after >= before if lower else after <= before

        # the same stage of other seeds, if it was graded by the same
        other = known.get(stage["name"])
        same = other and other["metric"] == stage["metric"]
        ends = other["after"] if same else None
        beside = f"{ends['low']:.3f} – {ends['high']:.3f}" if ends else ""

        direction = el("span", ", lower is better" if lower else "", cls="soft")
        sign = "✗ " if worse else ""
        table += el(
            "tr",
            el("td", el("b", safe(stage["name"]))),
            el("td", safe(stage["metric"]) + direction),
            el("td", f"{before:.3f}", cls="r"),
            el("td", f"{sign}{after:.3f}", cls="r bad" if worse else "r"),
            el("td", dot_line(before, after, chance, worse, ends)),
            el("td", beside, cls="r soft") if known else "",
            el("td", f"{chance:.3f}", cls="r soft"),
            el("td", str(stage["samples"]), cls="r soft"),
            el("td", duration(stage["seconds"]), cls="r soft"),
        )
    return el("div", el("table", table), cls="scroll")


# -------------------------------------------------------------------------- what is in the page


def answer_card(graded: dict) -> str:
    """One answer: pictures, question, what was said (its chain in grey), the truth, right or wrong."""
    asked = ", asked to think" if graded["mode"] == "think" else ""
    text = el("p", safe(graded["question"]))
    text += said_line("", graded["said"], graded["score"])
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
    """Title, and what it ran on."""
    about = {key: results[key] for key in ("model", "seed", "date", "machine") if results.get(key)}
    about |= results.get("versions", {})
    if "seed" in results:
        about["seed"] = results["seed"]
    ran_on = " · ".join(f"{key} {value}" for key, value in about.items())
    return el("h1", safe(results["title"])) + el("p", safe(ran_on), cls="note")


def sums(results: dict, seeds: dict) -> str:
    """The numbers that sum a run up, and the range of other seeds."""
    numbers = []
    overall = results["final"].get("overall")
    if overall:
        meaning = f"overall accuracy, chance {overall['chance']:.1%}"
        numbers.append((f"{overall['accuracy']:.1%}", meaning))
    if seeds:
        ends = seeds["final"]["overall"]["accuracy"]
        meaning = f"overall of {len(seeds['seeds'])} seeds, mean {ends['mean']:.1%}"
        numbers.append((f"{100 * ends['low']:.1f} – {ends['high']:.1%}", meaning))
    numbers.append((str(len(results["stages"])), "stages"))
    if "total_seconds" in results:
        cores = results.get("cores", "?")
        numbers.append((duration(results["total_seconds"]), f"on {cores} cores"))
    if "packing" in results:
        filled = results["packing"]["filled"]
        numbers.append((f"{filled:.1%}", "of the packed positions hold tokens"))
    return facts(*numbers)


def two_choices(results: dict) -> str:
    """What AdaLRS gained, and whether the model thinks when (and only when) it is asked to."""
    numbers = []

    search = results.get("adalrs")
    if search:
        rates = f"{search['start_lr']:.1e} → {search['final_lr']:.1e}"
        numbers.append((rates, f"rate, AdaLRS, {search['extra_steps']} extra steps"))

    modes = results.get("modes")
    if modes:
        for key, text in (("direct", "think unasked"), ("think", "think when asked")):
            share = modes.get(f"{key}_thinks", modes.get(f"{key}_share"))
            accuracy = modes[f"{key}_accuracy"]
            numbers.append((f"{share:.0%}", f"{text}, accuracy {accuracy:.1%}"))
    return facts(*numbers)


def score_bars(final: dict, families: list[str], seeds: dict) -> str:
    """Accuracy per family with its error, and the range of other seeds."""
    rows = []
    for family in families:
        s = final[family]
        text = f"{s['accuracy']:.1%} ± {100 * s['error']:.1f}"
        rows.append((family, text, [s["accuracy"]], s["chance"], s["error"]))
    ranges = {}
    for family, s in seeds.get("final", {}).items():
        ranges[family] = (s["accuracy"]["low"], s["accuracy"]["high"])
    return bar_chart("scores", rows, 1, ranges=ranges)


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
    pairs: Sequence[dict] = (),
    seeds: dict | None = None,
) -> None:
    """Write the page.

    results: results.json. runs: stage -> what its Run logged. graded: the answers to show.
    packed: rows of one batch as (document length, has image; None for padding).
    router: shares of the experts, per layer and kind of token.
    swap: family -> accuracy with its own and with another picture.
    looked: finished markup of where a few answers looked (talk/page.py), and its style.
    pairs: questions that were asked both ways (tools/story.py).
    seeds: what other seeds of this ladder gave (a model's part of tools/seeds.py's summary).
    """
    final = results["final"]
    stages = results["stages"]
    seeds = seeds or {}
    families = graded_families(results)
    experts = max(map(len, router.values()), default=1)
    even_share = 1 / experts

    moves = section(
        "Stages",
        "What each stage is meant to move, on held-out samples: pale dot before, full dot after; "
        "the tick is chance" + ("; the band is the range of seeds." if seeds else "."),
        stage_rows(stages, seeds),
    )
    own = section(
        "Final scores",
        "With standard error; the tick is the best blind strategy"
        + ("; the bracket is the range of seeds." if seeds else "."),
        score_bars(final, families, seeds),
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
        first_screen(results, pairs),
        sums(results, seeds),
        skill_charts(results, seeds),
        thinking_part(results, pairs),
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


if __name__ == "__main__":
    command(compare_ladders)
