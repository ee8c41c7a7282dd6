"""Several seeds of one ladder: means, ranges, how often each stage helped.

What it teaches: one seed is one draw. When a skill comes, and how far it gets, differs from seed to
seed by more than most changes are worth; so a claim is a mean, a worst case and a count.

    runs/toy-seed0/results.json  ─┐
    runs/toy-seed1/results.json  ─┼─> runs/toy-seeds/summary.json   README.md, RESULTS.md, later reports
    ...                          ─┘   runs/toy-seeds/report.html    the same as a page

    make toy SEEDS=5                                   # the runs, one after another, then this
    python -m tools.seeds runs/toy-seed0 runs/toy-seed1 ...

Dense and MoE runs may be named together; a model that is not among them keeps what an earlier
summary said of it. Better "by two standard errors" uses the error that the run measured on pairs of
answers, or else the binomial one, which is larger; a loss has none.
"""

import datetime
import json
import os
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from infra.cli import command
from infra.weights import write_json
from tools.drawing import duration, el, facts, html_page, legend, line, safe, section, svg, word
from tools.evidence import (
    graded_families,
    improvement,
    lookups,
    main_road,
    read_results,
)
from tools.story import WIDE, X0, X1, Y1, skill_band, skill_frame, skill_point

# What the last `make readme` found: what a report compares with where no seeds were run here.
PUBLISHED = Path(__file__).parents[1] / "figures" / "seeds.json"
NEVER = "never"  # for a skill that no stage brought


@dataclass
class SeedsOptions:
    """Read several finished ladders that differ in their seed; write summary.json and a page."""

    runs: Positional[tuple[Path, ...]]  # directories with a results.json
    out: Path = Path("runs/toy-seeds")


# ----------------------------------------------------------------------------------- the summary


def machine_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for text in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run_date(directory: Path, results: dict) -> str:
    """The day on which a run ended: as it says, or as its file does."""
    written = datetime.date.fromtimestamp((directory / "results.json").stat().st_mtime)
    return results.get("date") or written.isoformat()


def range_of(values: list[float]) -> dict:
    """Mean, lowest, highest, and each."""
    each = [round(value, 5) for value in values]
    mean = round(sum(values) / len(values), 5)
    return {"mean": mean, "low": min(each), "high": max(each), "each": each}


def stage_over_seeds(rows: list[dict]) -> dict:
    """One stage of every seed: ranges, and in how many it helped."""
    changes = [improvement(row) for row in rows]
    known = all(change.error is not None for change in changes)
    return {
        "name": rows[0]["name"],
        "metric": rows[0]["metric"],
        "lower_is_better": rows[0]["lower_is_better"],
        "samples": rows[0]["samples"],
        "chance": rows[0]["chance"],
        "before": range_of([row["before"] for row in rows]),
        "after": range_of([row["after"] for row in rows]),
        "gain": range_of([change.value for change in changes]),
        "better": sum(change.value > 0 for change in changes),
        "surely_better": sum(c.sure and c.value > 0 for c in changes) if known else None,
        "surely_worse": sum(c.sure and c.value < 0 for c in changes) if known else None,
        "seconds": range_of([row["seconds"] for row in rows]),
    }


def thinking_over_seeds(runs: list[dict]) -> dict:
    """Direct answers and thinking: ranges, and by family where the runs say so."""
    modes = [run["modes"] for run in runs]
    changes = [m["think_accuracy"] - m["direct_accuracy"] for m in modes]
    families = {}
    for family in modes[0].get("families", {}):
        rows = [m["families"][family] for m in modes if family in m.get("families", {})]
        families[family] = {
            "direct": range_of([row["direct"] for row in rows]),
            "think": range_of([row["think"] for row in rows]),
            "gain": range_of([row["think"] - row["direct"] for row in rows]),
        }
    return {
        "direct": range_of([m["direct_accuracy"] for m in modes]),
        "think": range_of([m["think_accuracy"] for m in modes]),
        "gain": range_of(changes),
        "families": families,
    }


def skills_over_seeds(runs: list[dict]) -> dict[str, dict[str, int]]:
    """family -> stage -> in how many seeds it was that stage that brought it."""
    counts: dict[str, Counter] = {}
    for run in runs:
        for family, stage in lookups(run).items():
            counts.setdefault(family, Counter())[stage or NEVER] += 1
    return {family: dict(stages) for family, stages in counts.items()}


def own_options(results: dict) -> dict | None:
    """The options of a run, but for those that seeds may differ in."""
    options = results.get("options")
    if options is None:
        return None
    return {name: value for name, value in options.items() if name not in ("out", "seed")}


def refuse_strangers(runs: dict[Path, dict]) -> None:
    """Raises ValueError unless these are seeds of one ladder: its stages, its options, each seed once."""
    (first, model), *others = runs.items()
    seen = {model["seed"]: first}
    for path, results in others:
        for what, get in (
            ("stages", lambda r: [(s["name"], s["metric"]) for s in r["stages"]]),
            ("families", graded_families),
            ("options", own_options),
        ):
            if get(results) != get(model):
                raise ValueError(f"{path} has other {what} than {first}: name seeds of one ladder")
        if results["seed"] in seen:
            seed = results["seed"]
            raise ValueError(f"{path} and {seen[seed]} are both of seed {seed}: name one of them")
        seen[results["seed"]] = path


def summary_of(runs: dict[Path, dict]) -> dict:
    """What seeds of one model say together: a part of summary.json."""
    refuse_strangers(runs)
    all_results = list(runs.values())
    first = all_results[0]
    stages = [stage_over_seeds(list(rows)) for rows in zip(*(r["stages"] for r in all_results))]

    final = {}
    for family in graded_families(first):
        scores = [r["final"][family] for r in all_results]
        final[family] = {
            "accuracy": range_of([score["accuracy"] for score in scores]),
            "chance": scores[0]["chance"],
            "over_chance": range_of([errors_over_chance(score) for score in scores]),
            "n": scores[0]["n"],
            "swapped": swapped_mean(all_results, family),
        }
    after = {}
    for stage, scores in main_road(first).items():
        after[stage] = {
            family: range_of([main_road(r)[stage][family] for r in all_results])
            for family in scores
        }
    days = sorted({run_date(path, results) for path, results in runs.items()})
    return {
        "seeds": [r["seed"] for r in all_results],
        "runs": [path.name for path in runs],
        "days": days,
        "machine": first.get("machine", ""),
        "cores": first.get("cores"),
        "torch": first.get("versions", {}).get("torch", ""),
        "options": own_options(first),
        "seconds": range_of([r["total_seconds"] for r in all_results]),
        "peak_memory_gib": max(r.get("peak_memory_gib", 0.0) for r in all_results),
        "stages": stages,
        "final": final,
        "families_after": after,
        "skills": skills_over_seeds(all_results),
        "thinking": thinking_over_seeds(all_results),
    }


def errors_over_chance(score: dict) -> float:
    """How many standard errors an accuracy lies above the best blind strategy."""
    return (score["accuracy"] - score["chance"]) / score["error"]


def swapped_mean(runs: list[dict], family: str) -> float | None:
    """Mean accuracy with another sample's pictures; None for families without any."""
    rows = [run["swap"][family]["swapped"] for run in runs if family in run.get("swap", {})]
    return sum(rows) / len(rows) if rows else None


def known_seeds(results: dict, folder: Path) -> dict | None:
    """What is known of other seeds of this very ladder: from a summary in `folder`, or the published one."""
    for path in (folder / "toy-seeds" / "summary.json", PUBLISHED):
        if not path.is_file():
            continue
        part = json.loads(path.read_text(encoding="utf-8")).get(results["model"])
        if part and part["options"] == own_options(results):
            return part
    return None


# -------------------------------------------------------------------------------------- in words


def percent_range(r: dict) -> str:
    """`92.1 % (90.4 to 94.0)`."""
    return f"{100 * r['mean']:.1f} % ({100 * r['low']:.1f} to {100 * r['high']:.1f})"


def how_often(stage: dict, n: int) -> str:
    """`5 of 5, surely 4`, and a stage that surely harmed says so."""
    text = f"{stage['better']} of {n}"
    if stage["surely_better"] is not None:
        text += f", surely {stage['surely_better']}"
    if stage["surely_worse"]:
        text += f"; surely worse {stage['surely_worse']}"
    return text


def worst_family(part: dict) -> tuple[str, float, int]:
    """The lowest final score of any family in any seed: family, score, seed."""
    scores = []
    for family, row in part["final"].items():
        for seed, score in zip(part["seeds"], row["accuracy"]["each"]):
            if family != "overall":
                scores.append((score, family, seed))
    score, family, seed = min(scores)
    return family, score, seed


def thinking_words(part: dict) -> str:
    """`thinking 85.0 %, direct 91.2 %: +2.1 points in the mean (-1.0 to 4.0)`."""
    thinking = part["thinking"]
    gain = thinking["gain"]
    return (
        f"thinking {thinking['think']['mean']:.1%}, direct {thinking['direct']['mean']:.1%}: "
        f"{100 * gain['mean']:+.1f} points in the mean ({100 * gain['low']:+.1f} to "
        f"{100 * gain['high']:+.1f})"
    )


def where_and_when(part: dict) -> str:
    """Seeds, days and the machine that they ran on."""
    seeds = ", ".join(map(str, part["seeds"]))
    days = " to ".join(dict.fromkeys((part["days"][0], part["days"][-1])))
    machine = f", {part['machine']}" if part["machine"] else ""
    return f"seeds {seeds}; {days}; {part['cores']} cores{machine}; torch {part['torch']}"


def print_seeds(model: str, part: dict) -> None:
    """The tables of one model on the terminal."""
    n = len(part["seeds"])
    print(f"\n{model}: {where_and_when(part)}")
    print(
        f"{'stage':12s} {'before':>7s}    {'after':>7s}  {'lowest':>7s} {'highest':>7s}  better in"
    )
    for stage in part["stages"]:
        after = stage["after"]
        print(
            f"{stage['name']:12s} {stage['before']['mean']:7.3f} -> {after['mean']:7.3f}  "
            f"{after['low']:7.3f} {after['high']:7.3f}  {how_often(stage, n)}"
        )

    heads = " ".join(f"{head:>7s}" for head in ("mean", "lowest", "highest", "chance", "errors"))
    print(f"\n{'family':12s} {heads}  came with")
    for family, row in part["final"].items():
        r = row["accuracy"]
        print(
            f"{family:12s} {r['mean']:7.1%} {r['low']:7.1%} {r['high']:7.1%} {row['chance']:7.1%} "
            f"{row['over_chance']['low']:7.1f}  {skill_words(part['skills'][family])}"
        )
    print("errors: standard errors above chance, in the worst seed")
    seconds = part["seconds"]
    print(
        f"\n{thinking_words(part)}; {seconds['mean']:.0f} seconds ({seconds['low']:.0f} to "
        f"{seconds['high']:.0f})"
    )


def skill_words(stages: dict[str, int]) -> str:
    """`sft2 4, sft3 1`, the most frequent first."""
    ordered = sorted(stages.items(), key=lambda item: -item[1])
    return ", ".join(f"{stage} {count}" for stage, count in ordered)


# -------------------------------------------------------------------------------------- the page


def range_line(r: dict, chance: float, longest: float, before: float | None = None) -> str:
    """A band from lowest to highest, a dot at each seed, a tick at chance, a pale dot before."""

    def at(value: float) -> float:
        return 6 + 168 * min(max(value, 0), longest) / longest

    low = at(r["low"])
    body = line(6, 8, 174, 8)
    body += el("rect", x=low, y=2, width=max(at(r["high"]) - low, 1.5), height=12, cls="band")
    body += line(at(chance), 1, at(chance), 15, "chance")
    if before is not None:
        body += el("circle", cx=at(before), cy=8, r=3.5, cls="pale")
    for value in r["each"]:
        body += el("circle", cx=at(value), cy=8, r=2.6, cls="blue", tip=f"{value:.3f}")
    return svg(180, 16, f"{r['low']:.3f} to {r['high']:.3f}, chance {chance:.3f}", body)


def stages_over_seeds(part: dict) -> str:
    """The table of stages: means, ranges, how often better, seconds."""
    n = len(part["seeds"])
    heads = ("before", "after", "range", "", "better in", "seconds")
    table = el("tr", el("th", "stage"), el("th", "metric"), *(el("th", h, cls="r") for h in heads))
    for stage in part["stages"]:
        after = stage["after"]
        longest = max(1.0, after["high"], stage["before"]["high"], stage["chance"])
        lower = ", lower is better" if stage["lower_is_better"] else ""
        harmed = stage["better"] < n
        seconds = stage["seconds"]
        table += el(
            "tr",
            el("td", el("b", safe(stage["name"]))),
            el("td", safe(stage["metric"]) + el("span", lower, cls="soft")),
            el("td", f"{stage['before']['mean']:.3f}", cls="r"),
            el("td", f"{after['mean']:.3f}", cls="r"),
            el("td", f"{after['low']:.3f} – {after['high']:.3f}", cls="r soft"),
            el("td", range_line(after, stage["chance"], longest, stage["before"]["mean"])),
            el("td", safe(how_often(stage, n)), cls="r bad" if harmed else "r"),
            el("td", f"{seconds['low']:.0f} – {seconds['high']:.0f}", cls="r soft"),
        )
    return el("div", el("table", table), cls="scroll")


def families_over_seeds(part: dict) -> str:
    """The table of families: mean, range, every seed, chance, and which stage brought it how often."""
    heads = [el("th", head, cls="r") for head in ("mean", "range", "", "chance")]
    table = el("tr", el("th", "family"), *heads, el("th", "came with (seeds)"))
    for family, row in part["final"].items():
        r = row["accuracy"]
        table += el(
            "tr",
            el("td", el("b", safe(family))),
            el("td", f"{r['mean']:.1%}", cls="r"),
            el("td", f"{r['low']:.1%} – {r['high']:.1%}", cls="r soft"),
            el("td", range_line(r, row["chance"], 1.0)),
            el("td", f"{row['chance']:.1%}", cls="r soft"),
            el("td", safe(skill_words(part["skills"][family])), cls="soft"),
        )
    return el("div", el("table", table), cls="scroll")


def thinking_over_seeds_table(part: dict) -> str:
    """Direct answers and thinking, seed by seed, and by family where the runs say so."""
    thinking = part["thinking"]
    heads = [f"seed {seed}" for seed in part["seeds"]]
    table = el("tr", el("th", ""), *(el("th", h, cls="r") for h in ["mean", *heads]))

    def row(name: str, r: dict, points: bool) -> str:
        show = (lambda v: f"{100 * v:+.1f}") if points else (lambda v: f"{v:.1%}")
        cells = [el("td", show(value), cls="r soft") for value in r["each"]]
        return el("tr", el("td", safe(name)), el("td", el("b", show(r["mean"])), cls="r"), *cells)

    table += row("direct", thinking["direct"], False)
    table += row("asked to think", thinking["think"], False)
    table += row("difference, points", thinking["gain"], True)
    for family, r in thinking["families"].items():
        table += row(f"of it {family}", r["gain"], True)
    return el("div", el("table", table), cls="scroll")


def seed_chart(family: str, part: dict) -> str:
    """One family over the ladder: a thin line a seed inside the band of all."""
    after = {stage: scores[family] for stage, scores in part["families_after"].items()}
    stages = list(after)
    body = skill_frame(stages) + skill_band(family, stages, part)
    chance = skill_point(0, part["final"][family]["chance"], len(stages))[1]
    body += line(X0, chance, X1, chance, "dashed")
    for i, seed in enumerate(part["seeds"]):
        scores = [after[stage]["each"][i] for stage in stages]
        points = [skill_point(place, score, len(stages)) for place, score in enumerate(scores)]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body += el("polyline", points=text, cls="loss thin", tip=f"seed {seed}")

    last = after[stages[-1]]["mean"]
    body += word(f"{100 * last:.0f}", X1 + 8, skill_point(0, last, 1)[1] + 3.5, "tick")
    caption = el("figcaption", el("h3", safe(family)))
    return el("figure", caption, svg(WIDE, Y1 + 18, f"{family} over the ladder", body))


def model_part(model: str, part: dict) -> str:
    """Everything about one model."""
    n = len(part["seeds"])
    overall = part["final"]["overall"]["accuracy"]
    family, score, seed = worst_family(part)
    gain = part["thinking"]["gain"]
    numbers = facts(
        (f"{overall['mean']:.1%}", f"overall in the mean, {overall['low']:.1%} in the worst seed"),
        (f"{score:.1%}", f"the lowest family of any seed: {family}, seed {seed}"),
        (f"{100 * gain['mean']:+.1f}", "points, thinking over direct answers"),
        (
            duration(part["seconds"]["mean"]),
            f"in the mean, at most {duration(part['seconds']['high'])}",
        ),
    )
    charts = []
    if part["families_after"]:
        charts = [seed_chart(name, part) for name in part["final"]]
    return "\n".join(
        (
            section(f"{safe(model)}, {n} seeds", safe(where_and_when(part)), numbers),
            section(
                "Stages",
                "Means over seeds. Pale dot: before; a dot a seed: after; tick: chance. “Surely”: by two "
                "standard errors.",
                stages_over_seeds(part),
            ),
            section("Families at the end", "On held-out samples.", families_over_seeds(part)),
            section(
                "Thinking", "Reasoning families, in each seed.", thinking_over_seeds_table(part)
            ),
            section(
                "Every skill over the ladder",
                "Accuracy after every stage, in percent; at the right the mean at the end.",
                legend(("", "band", "lowest to highest"), ("╌", "soft", "chance")),
                el("div", *charts, cls="skills") if charts else "",
            ),
        )
    )


def summarise_seeds(options: SeedsOptions) -> None:
    """Read, write and print. Raises ValueError for runs that are missing or do not belong together."""
    by_model: dict[str, dict[Path, dict]] = {}
    for path in options.runs:
        results = read_results(path)
        by_model.setdefault(results["model"], {})[path] = results
    if not by_model:
        raise ValueError("no runs: name directories with a results.json, one a seed")

    # what an earlier summary said of other models stays
    file = options.out / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for model, runs in by_model.items():
        summary[model] = summary_of(runs)

    os.makedirs(options.out, exist_ok=True)
    write_json(file, summary)
    parts = [model_part(model, part) for model, part in summary.items()]
    title = "nanosail ladder over seeds"
    page = options.out / "report.html"
    page.write_text(html_page(title, el("h1", title), *parts), encoding="utf-8")

    for model, part in summary.items():
        print_seeds(model, part)
    print(f"\n{file}, {page}")


if __name__ == "__main__":
    command(summarise_seeds)
