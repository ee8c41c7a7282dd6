"""Two ladders side by side: what differs in their options, and what differs in what came out.

What it teaches: "it got better" wants a second number, how sure that is. Two runs answered the same
held-out questions; compared question by question, a difference of a point shows that two shares
alone would leave open. Only what lies above two standard errors is coloured.

    a/results.json, samples.json, STAGE/log.jsonl, STAGE/stage.json ─┐
    b/...                                                           ─┴─> tables here, and a page

    python -m tools.report runs/toy-seed0 runs/toy-seed1      # the page: runs/toy-seed1/compare.html

B minus A throughout. Runs without samples.json are compared by their shares, whose binomial error is
larger. One seed each: what is sure of these two models need not hold for other seeds (tools/seeds.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from infra.journal import read_log
from infra.text import printable
from tools.drawing import (
    SMALL,
    axes,
    duration,
    el,
    facts,
    html_page,
    legend,
    line,
    safe,
    section,
    smooth,
    svg,
    ticks,
    word,
)
from tools.evidence import (
    Difference,
    graded_families,
    lookups,
    main_road,
    paired,
    read_results,
    read_samples,
    stage_seconds,
    unpaired,
)
from tools.story import WIDE, X0, X1, Y1, skill_frame, skill_point

SURELY = "Coloured: above two standard errors; where nothing differs, one in twenty still is."
ABSENT = "–"  # a stage, an option or a family that only the other run has


@dataclass
class LadderPairOptions:
    """Compare two finished ladders: B minus A, on the terminal and as a page."""

    runs: Positional[tuple[Path, Path]]  # A and B, directories with a results.json
    out: Path | None = None  # the page; none: compare.html in B's directory


@dataclass
class LadderRun:
    """A finished ladder as its directory shows it."""

    path: Path
    results: dict
    samples: dict  # questions: family -> digest; scores: stage -> family -> score of each sample
    logs: dict[str, list[dict]]  # stage -> rows of log.jsonl
    settings: dict[str, dict]  # stage -> stage.json

    @property
    def stages(self) -> dict[str, dict]:
        return {stage["name"]: stage for stage in self.results["stages"]}


def read_ladder(path: Path) -> LadderRun:
    """Raises ValueError for a directory without results."""
    results = read_results(path)
    logs = {log.parent.name: read_log(log) for log in sorted(path.glob("*/log.jsonl"))}
    settings = {}
    for file in sorted(path.glob("*/stage.json")):
        settings[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))
    return LadderRun(path, results, read_samples(path), logs, settings)


def in_either(a: dict, b: dict) -> list:
    """The keys of both, each once: a's order, and b's own where they stand in b."""
    names = list(a)
    for place, name in enumerate(b):
        if name not in a:
            names.insert(min(place, len(names)), name)
    return names


# ---------------------------------------------------------------------------------- differences


def options_that_differ(a: LadderRun, b: LadderRun) -> list[tuple[str, str, str]]:
    """(what, in A, in B): of the whole runs, then of their stages."""

    def whole(run: LadderRun) -> dict:
        kept = ("model", "seed", "cores", "processes", "machine", "date")
        shown = run.results.get("options", {}) | run.results.get("versions", {})
        return {key: run.results[key] for key in kept if key in run.results} | {
            key: value for key, value in shown.items() if key not in kept
        }

    # where a run put its files is no difference
    rows = []
    first, second = whole(a), whole(b)
    for key in in_either(first, second):
        left, right = first.get(key, ABSENT), second.get(key, ABSENT)
        if key != "out" and left != right:
            rows.append((key, str(left), str(right)))

    # a stage's seed follows the run's
    for stage in in_either(a.settings, b.settings):
        first, second = a.settings.get(stage, {}), b.settings.get(stage, {})
        if not first or not second:
            rows.append((stage, *("run" if settings else ABSENT for settings in (first, second))))
            continue
        for key in in_either(first, second):
            left, right = first.get(key, ABSENT), second.get(key, ABSENT)
            if key != "seed" and left != right:
                rows.append((f"{stage}: {key}", str(left), str(right)))
    return rows


def same_questions(a: LadderRun, b: LadderRun, families: list[str]) -> bool:
    """Whether both were graded on the same samples of these families."""
    first = a.samples["questions"]
    second = b.samples["questions"]
    if not families or any(family not in first for family in families):
        return False
    return all(first[family] == second.get(family) for family in families)


def sample_pairs(
    a: LadderRun, b: LadderRun, stage: str, families: list[str]
) -> tuple[list[float], list[float]] | None:
    """Scores of the same samples after a stage of both runs; None where they are not known."""
    first = a.samples["scores"].get(stage, {})
    second = b.samples["scores"].get(stage, {})
    known = all(f in first and f in second for f in families)
    if not known or not same_questions(a, b, families):
        return None
    scores_a = [score for family in families for score in first[family]]
    scores_b = [score for family in families for score in second[family]]
    return (scores_a, scores_b) if len(scores_a) == len(scores_b) else None


def stage_difference(a: LadderRun, b: LadderRun, name: str) -> Difference | None:
    """What B's stage ends above A's (below, for a loss); None unless both graded the same."""
    first, second = a.stages.get(name), b.stages.get(name)
    if not first or not second or first["metric"] != second["metric"]:
        return None
    if first["lower_is_better"]:
        return Difference(first["after"] - second["after"])

    pairs = sample_pairs(a, b, name, first.get("families") or [])
    if pairs:
        return paired(*pairs)
    return unpaired(first["after"], second["after"], first["samples"], second["samples"])


def family_difference(a: LadderRun, b: LadderRun, family: str) -> Difference | None:
    """B's last score above A's, question by question where that is known."""
    first, second = a.results["final"].get(family), b.results["final"].get(family)
    if not first or not second:
        return None
    families = [family]
    if family == "overall":
        families = [f for f in graded_families(a.results) if f != "overall"]
    pairs = sample_pairs(a, b, "final", families)
    if pairs:
        return paired(*pairs)
    return unpaired(first["accuracy"], second["accuracy"], first["n"], second["n"])


# ------------------------------------------------------------------------------- on the terminal


def marked(difference: Difference | None, points: bool = True) -> str:
    """`+2.0 ± 0.9 *`: a star where it is sure."""
    if difference is None:
        return ""
    text = difference.points() if points else f"{difference.value:+.3f}"
    return f"{text} *" if difference.sure else text


def print_comparison(a: LadderRun, b: LadderRun) -> None:
    """Options, stages and families; B minus A."""
    print(f"A {printable(a.path)}\nB {printable(b.path)}\n")
    for what, left, right in options_that_differ(a, b):
        print(printable(f"{what:24s} {left:>24s} -> {right}"))

    print(
        f"\n{'stage':12s} {'A':>7s} {'B':>7s}  {'B - A, points':16s} {'A, s':>6s} {'B, s':>6s}  graded by"
    )
    for name in in_either(a.stages, b.stages):
        stages = [run.stages.get(name) for run in (a, b)]
        after = [f"{stage['after']:7.3f}" if stage else f"{ABSENT:>7s}" for stage in stages]
        spent = [f"{stage['seconds']:6.0f}" if stage else f"{ABSENT:>6s}" for stage in stages]
        stage = stages[0] or stages[1]
        difference = marked(stage_difference(a, b, name), not stage["lower_is_better"])
        cells = (f"{name:12s}", *after, f" {difference:16s}", *spent, f" {stage['metric']}")
        print(printable(" ".join(cells)))

    print(f"\n{'family':12s} {'A':>7s} {'B':>7s}  B - A, points")
    for family in in_either(a.results["final"], b.results["final"]):
        scores = [run.results["final"].get(family) for run in (a, b)]
        shown = [f"{score['accuracy']:7.1%}" if score else f"{ABSENT:>7s}" for score in scores]
        print(
            printable(f"{family:12s} {' '.join(shown)}  {marked(family_difference(a, b, family))}")
        )
    print("\n* above two standard errors, of these two models; a loss has no error")


# -------------------------------------------------------------------------------------- the page


def difference_cell(difference: Difference | None, points: bool = True) -> str:
    """Green or red where it is sure."""
    cls = "r soft"
    if difference is not None and difference.sure:
        cls = "r good" if difference.value > 0 else "r bad"
    text = ""
    if difference is not None:
        text = difference.points() if points else f"{difference.value:+.3f}"
    return el("td", text, cls=cls)


def options_part(a: LadderRun, b: LadderRun) -> str:
    rows = options_that_differ(a, b)
    if not rows:
        return el("p", "None: the same command, twice.")
    table = el("tr", el("th", "option"), el("th", "A"), el("th", "B"))
    for what, left, right in rows:
        cells = (el("td", safe(left)), el("td", safe(right)))
        table += el("tr", el("td", el("b", safe(what))), *cells)
    return el("div", el("table", table), cls="scroll")


def two_moves(stages: list[dict | None], longest: float) -> str:
    """A above B: each a pale dot before, a full one after."""

    def at(value: float) -> float:
        return 6 + 168 * max(value, 0) / longest

    out = ""
    for stage, y, cls in zip(stages, (6, 16), ("blue", "rising")):
        out += line(6, y, 174, y)
        if stage is None:
            continue
        before, after = at(stage["before"]), at(stage["after"])
        width = abs(after - before)
        out += el("rect", x=min(before, after), y=y - 1, width=width, height=2, cls="pale")
        out += el("circle", cx=before, cy=y, r=3, cls="pale")
        out += el("circle", cx=after, cy=y, r=4, cls=cls)
    return svg(180, 22, "A above B, before and after", out)


def stages_part(a: LadderRun, b: LadderRun) -> str:
    heads = ("A before", "after", "B before", "after", "B − A", "", "A", "B")
    cells = [el("th", head, cls="r") for head in heads]
    table = el("tr", el("th", "stage"), el("th", "metric"), *cells)
    for name in in_either(a.stages, b.stages):
        stages = [run.stages.get(name) for run in (a, b)]
        stage = stages[0] or stages[1]
        lower = stage["lower_is_better"]
        values = [s[key] for s in stages if s for key in ("before", "after")]

        # scores of both, their difference, their drawing, their seconds
        row = el("td", el("b", safe(name)))
        row += el(
            "td",
            safe(stage["metric"]) + el("span", ", lower is better" if lower else "", cls="soft"),
        )
        for s in stages:
            row += el("td", f"{s['before']:.3f}" if s else ABSENT, cls="r soft")
            row += el("td", f"{s['after']:.3f}" if s else ABSENT, cls="r")
        row += difference_cell(stage_difference(a, b, name), not lower)
        row += el("td", two_moves(stages, max(1.0, *values)))
        for s in stages:
            row += el("td", duration(s["seconds"]) if s else ABSENT, cls="r soft")
        table += el("tr", row)
    return el("div", el("table", table), cls="scroll")


def families_part(a: LadderRun, b: LadderRun) -> str:
    heads = ("A", "B", "B − A", "chance")
    cells = [el("th", head, cls="r") for head in heads]
    came = (el("th", "came in A with"), el("th", "in B with"))
    table = el("tr", el("th", "family"), *cells, *came)
    brought = [lookups(run.results) for run in (a, b)]
    for family in in_either(a.results["final"], b.results["final"]):
        scores = [run.results["final"].get(family) for run in (a, b)]
        known = scores[0] or scores[1]
        row = el("td", el("b", safe(family)))
        for score in scores:
            row += el("td", f"{score['accuracy']:.1%}" if score else ABSENT, cls="r")
        row += difference_cell(family_difference(a, b, family))
        row += el("td", f"{known['chance']:.1%}", cls="r soft")
        for came_with in brought:
            row += el("td", safe(came_with.get(family) or "not yet"), cls="soft")
        table += el("tr", row)
    return el("div", el("table", table), cls="scroll")


def two_skills(family: str, a: LadderRun, b: LadderRun) -> str:
    """One family's score over both ladders, on the stages of both."""
    roads = [main_road(run.results) for run in (a, b)]
    stages = in_either(*roads)
    body = skill_frame(stages)
    for road, cls in zip(roads, ("loss", "rate")):
        points = []
        for place, stage in enumerate(stages):
            if family in road.get(stage, {}):
                points.append(skill_point(place, road[stage][family], len(stages)))
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body += el("polyline", points=text, cls=cls)

    for run in (a, b):
        score = run.results["final"].get(family)
        if score:
            y = skill_point(0, score["chance"], len(stages))[1]
            body += line(X0, y, X1, y, "dashed")
    caption = el("figcaption", el("h3", safe(family)))
    return el("figure", caption, svg(WIDE, Y1 + 18, f"{family} in both ladders", body))


def two_losses(name: str, first: list[dict], second: list[dict]) -> str:
    """The loss of a stage in both runs, smoothed; below it the reward, or the rate."""
    logs = (first, second)
    steps = max(map(len, logs))

    def curves_of(key: str, smoothed: bool) -> list:
        drawn = []
        for log, cls in zip(logs, ("loss", "rate")):
            values = [row[key] for row in log if row.get(key) is not None]
            if values:
                drawn.append((smooth(values) if smoothed else values, cls))
        return drawn

    body, at = axes("loss", curves_of("loss", True), steps, 18, 104)
    bottom = 122
    if any("reward" in row for log in logs for row in log[:1]):
        body += axes("reward", curves_of("reward", True), steps, bottom + 26, 64)[0]
        bottom += 90
    body += axes("learning rate", curves_of("lr", False), steps, bottom + 26, 34, log=True)[0]
    bottom += 60
    for step in ticks(0, steps):
        body += word(f"{step:g}", at(step, 1)[0], bottom + 15, "tick m")
    size = el("span", f"{len(first)} and {len(second)} steps", cls="soft")
    caption = el("figcaption", el("h3", safe(name)), size)
    return el("figure", caption, svg(SMALL, bottom + 18, f"loss of {name} in both runs", body))


def search_words(results: dict) -> str:
    """What AdaLRS did: from where to where, in which decisions."""
    search = results.get("adalrs")
    if not search:
        return "no search"
    steps = [f"step {d['made']}: {d['action']} to x {d['scale']:.3g}" for d in search["decisions"]]
    return (
        f"{search['start_lr']:.1e} to {search['final_lr']:.1e}, {search['extra_steps']} extra steps, last "
        f"loss {search['loss']:.3f}. " + "; ".join(steps)
    )


def thinking_words_of(results: dict) -> str:
    modes = results.get("modes")
    if not modes:
        return "not asked"
    return (
        f"directly {modes['direct_accuracy']:.1%}, asked to think {modes['think_accuracy']:.1%}; "
        f"{modes['think_thinks']:.0%} think when asked, {modes['direct_thinks']:.0%} unasked"
    )


def two_lines(a: str, b: str) -> str:
    """What A and B say, in a line each."""
    first = el("p", el("b", "A", cls="blue"), " ", safe(a))
    second = el("p", el("b", "B", cls="rising"), " ", safe(b))
    return first + second


def two_curves(a: LadderRun, b: LadderRun) -> tuple[str, str]:
    """Two parts of the page: every family's score over both ladders, and the losses of common stages."""
    key = legend(("━", "blue", "A"), ("━", "rising", "B"))
    families = in_either(a.results["final"], b.results["final"])
    skills = [two_skills(family, a, b) for family in families]
    over_both = section(
        "Every skill over both ladders",
        "Accuracy after every stage, in percent; dashed: chance.",
        key,
        el("div", *skills, cls="skills"),
    )

    # the losses in the order of A's ladder
    common = [name for name in a.logs if name in b.logs]
    common.sort(key=lambda name: stage_seconds(a.results, name) or 0.0)
    losses = [two_losses(name, a.logs[name], b.logs[name]) for name in common]
    if not losses:
        return over_both, ""
    charts = el("div", *losses, cls="charts")
    return over_both, section("Losses", "Smoothed, over all executed steps.", key, charts)


def comparison_page(a: LadderRun, b: LadderRun) -> str:
    """The whole page."""
    overall = family_difference(a, b, "overall")
    numbers = []
    for name, run in (("A", a), ("B", b)):
        accuracy = run.results["final"]["overall"]["accuracy"]
        spent = duration(run.results["total_seconds"])
        numbers.append((f"{accuracy:.1%}", f"overall, {name}, in {spent}"))
    if overall:
        numbers.append((overall.points(), "points, B − A"))

    thinking = two_lines(thinking_words_of(a.results), thinking_words_of(b.results))
    search = two_lines(search_words(a.results), search_words(b.results))
    skills, losses = two_curves(a, b)
    dots = "Dots: A above B, pale before, full after. Differences in points; of losses as they are."
    title = f"{a.path.name} and {b.path.name}"
    return html_page(
        title,
        el("h1", safe(title)),
        el("p", safe(f"A is {a.path}, B is {b.path}."), cls="note"),
        facts(*numbers),
        section("Options that differ", "Of the runs, then of their stages.", options_part(a, b)),
        section("Stages", f"{dots} {SURELY}", stages_part(a, b)),
        section("Families at the end", "On held-out samples.", families_part(a, b)),
        section("Thinking", "Reasoning questions.", thinking),
        skills,
        section("AdaLRS", "The search in basic.", search),
        losses,
    )


def compare_ladders(options: LadderPairOptions) -> None:
    """Print the tables, write the page. Raises ValueError for a directory without results."""
    a, b = map(read_ladder, options.runs)
    print_comparison(a, b)
    page = options.out or b.path / "compare.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(comparison_page(a, b), encoding="utf-8")
    print(page)
