"""What a ladder's report says first: three lines, a few questions answered both ways, every skill's curve.

What it teaches: results are read in one order. First what happened and why, in words that the
numbers write; then a picture with what was asked and answered; then when each skill came; then why
thinking won or lost.

    results.json ----> story_lines       what came when, what was lost and repaired, what thinking is worth
    pairs of answers -> transcripts      the same question, directly and thinking
                     -> thinking_part    by family: who wins, and what a wrong chain got wrong
    families_after  --> skill_charts     a small curve each, with chance and the range of other seeds

A pair is one question asked both ways: family, question, truth, images, direct and think (what was
said), direct_score and think_score, and `shown`: "first" (not chosen), "won" or "lost" by thinking.
Every sentence needs its numbers; without them it is left out.
"""

import re

from tools.drawing import el, image_tag, legend, line, safe, section, svg, word
from tools.evidence import (
    Difference,
    graded_families,
    improvement,
    in_words,
    lookups,
    main_road,
    stage_seconds,
)

# Where a chain ended: what was boxed is compared with the truth, what was thought with the reference.
ENDS = ("as the reference", "another chain", "no box")
# A small curve: width, and the ends of both of its axes, in px.
WIDE = 250
X0, X1 = 26, 218
Y0, Y1 = 8, 92


# --------------------------------------------------------------------------------- three lines


def skills_line(results: dict) -> str:
    """Which skill came with which stage, and which ones waited for a phase of their own."""
    metrics = {stage["name"]: stage["metric"] for stage in results["stages"]}
    together: dict[str, list[str]] = {}
    own: dict[str, list[str]] = {}
    never = []
    for family, stage in lookups(results).items():
        if family == "overall":
            continue
        if stage is None:
            never.append(family)
            continue
        named = family in re.findall(r"[\w-]+", metrics.get(stage, ""))
        group = own if named else together
        group.setdefault(stage, []).append(family)

    # a sentence each, in the order of the ladder
    road = list(main_road(results))
    sentences = []
    came = [
        f"{in_words(together[stage])} with {stage}" for stage in sorted(together, key=road.index)
    ]
    if came:
        sentences.append(f"What came when: {'; '.join(came)}.")
    waited = [f"{in_words(own[stage])} ({stage})" for stage in sorted(own, key=road.index)]
    if waited:
        sentences.append(f"Learned in the phase made for it: {in_words(waited)}.")
    if never:
        sentences.append(f"Not yet halfway from chance to certainty: {in_words(never)}.")
    return " ".join(sentences)


def repair_line(results: dict) -> str:
    """What the last phase had cost before the soup, and what the soup brought back."""
    road = main_road(results)
    soup = next((stage for stage in results["stages"] if stage["name"] == "soup"), None)
    names = list(road)
    if soup is None or "soup-a" not in names or "soup" not in names:
        return ""
    earlier = names[: names.index("soup-a")]
    if not earlier:
        return ""

    # the families that had fallen furthest from their best
    last = earlier[-1]
    falls = {}
    for family, score in road[last].items():
        best = max(road[name].get(family, 0) for name in earlier)
        if family != "overall":
            falls[family] = best - score
    worst = sorted(falls, key=falls.get, reverse=True)[:2]
    lost = [f"{family} {100 * falls[family]:.0f}" for family in worst if falls[family] >= 0.05]

    # and what two short runs on everything and their mean did
    change = improvement(soup)
    doubt = "" if change.sure else ", not above two standard errors"
    kept = f"At the end of {last} no skill is far below its best."
    if lost:
        kept = f"A phase forgets. Points below their best after {last}: {in_words(lost)}."
    overall = f"{100 * road[last]['overall']:.1f} to {100 * road['soup']['overall']:.1f} %"
    return (
        f"{kept} Two short runs on everything and the mean of their weights (the soup) move overall "
        f"from {overall}; the mean alone is worth {change.points()} points{doubt}."
    )


def thinking_line(results: dict) -> str:
    """What asking to think is worth, where most and least, and why."""
    modes = results.get("modes")
    if not modes:
        return ""
    families = modes.get("families", {})
    value = modes["think_accuracy"] - modes["direct_accuracy"]
    change = Difference(value, modes.get("error"))
    verb = "pays" if value > 0 else "costs"
    if change.error is not None and not change.sure:
        verb = "changes little"
    sentence = (
        f"Thinking {verb}: asked to think, {modes['think_accuracy']:.1%} of the reasoning questions are "
        f"right, directly {modes['direct_accuracy']:.1%} ({change.points()} points)"
    )

    # the families between which it differs most
    gains = {family: row["think"] - row["direct"] for family, row in families.items()}
    if len(set(gains.values())) > 1:
        best = max(gains, key=gains.get)
        worst = min(gains, key=gains.get)
        sentence += f"; best in {best} ({100 * gains[best]:+.1f})"
        sentence += f", worst in {worst} ({100 * gains[worst]:+.1f})"
    return f"{sentence}. {chains_sentence(families)}".strip()


def chains_sentence(families: dict[str, dict]) -> str:
    """After which chains the wrong boxes stand."""
    wrong = {}
    for end in ENDS:
        counts = [row["ends"][end] for row in families.values()]
        wrong[end] = sum(count - right for right, count in counts)
    total = sum(wrong.values())
    if not total:
        return ""
    return (
        f"Of its {total} wrong answers {wrong['another chain']} stand after a chain that differs from the "
        f"reference's, {wrong['as the reference']} after the reference's own, {wrong['no box']} without a "
        "whole chain and box."
    )


def story_lines(results: dict) -> list[str]:
    """At most three: what came when, what was lost and repaired, what thinking is worth."""
    if not results["stages"] or not results["final"]:
        return []
    lines = [skills_line(results), repair_line(results), thinking_line(results)]
    return [text for text in lines if text]


# ------------------------------------------------------------------------- questions, both ways


def said_line(how: str, said: str, score: float) -> str:
    """`directly ✓ black 3`: how it was asked, right or wrong, its chain in grey, its answer."""
    partial = (f"{score:.2f}", "rising")
    sign, cls = {0: ("✗", "bad"), 1: ("✓", "good")}.get(score, partial)
    chain, closed, answer = said.rpartition("</think>")
    thought = el("span", safe(chain + closed), cls="soft")
    answered = el("b", safe(answer.strip() or "(nothing)"))
    asked = el("span", safe(how), cls="how") if how else ""
    return el("p", asked, el("b", sign, cls=cls), f" {thought} {answered}")


def transcripts(pairs: list[dict]) -> str:
    """A large picture each, what was asked, and what was said directly and thinking."""
    cards = []
    for pair in pairs:
        pictures = "".join(image_tag(image) for image in pair["images"])
        words = el("h3", safe(pair["question"]))
        words += said_line("directly", pair["direct"], pair["direct_score"])
        words += said_line("thinking", pair["think"], pair["think_score"])
        words += el("p", safe(f"{pair['family']}; truth: {pair['truth']}"), cls="soft")
        cards.append(el("div", el("div", pictures, cls="pictures"), words, cls="transcript"))
    return el("div", *cards, cls="transcripts") if cards else ""


def first_screen(results: dict, pairs: list[dict]) -> str:
    """The first screen: three lines, then the first questions as they come."""
    lines = [el("p", safe(text)) for text in story_lines(results)]
    first = [pair for pair in pairs if pair["shown"] == "first"]
    return (el("div", *lines, cls="story") if lines else "") + transcripts(first)


# ---------------------------------------------------------------------------- a curve for a skill


def skill_point(place: int, score: float, places: int) -> tuple[float, float]:
    x = X0 + (X1 - X0) * place / max(places - 1, 1)
    return x, Y1 - (Y1 - Y0) * score


def skill_frame(stages: list[str]) -> str:
    """The grid of a small curve: percent, and where fine-tuning and thinking begin."""
    out = ""
    for share in (0, 0.5, 1):
        y = skill_point(0, share, len(stages))[1]
        out += line(X0, y, X1, y)
        out += word(f"{100 * share:.0f}", X0 - 5, y + 3.5, "tick e")

    # each part of the recipe, from its first stage on
    begins = {"pre-training": 0}
    if "sft1" in stages:
        begins["fine-tuning"] = stages.index("sft1")
    if "soup" in stages and stages[-1] != "soup":
        begins["thinking"] = stages.index("soup") + 1
    ends = [*list(begins.values())[1:], len(stages) - 1]
    for (part, first), end in zip(begins.items(), ends):
        x0 = skill_point(first, 0, len(stages))[0]
        x1 = skill_point(end, 0, len(stages))[0]
        if first:
            out += line(x0, Y0, x0, Y1 + 4)
        out += word(part, (x0 + x1) / 2, Y1 + 14, "tick m")
    return out


def skill_band(family: str, stages: list[str], seeds: dict) -> str:
    """From the lowest to the highest of the seeds after each stage; nothing if a stage is new."""
    after = seeds.get("families_after", {})
    if not stages or any(family not in after.get(stage, {}) for stage in stages):
        return ""
    ranges = [after[stage][family] for stage in stages]
    top = [skill_point(i, r["high"], len(stages)) for i, r in enumerate(ranges)]
    foot = [skill_point(i, r["low"], len(stages)) for i, r in enumerate(ranges)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in top + foot[::-1])
    return el("polygon", points=points, cls="band")


def skill_chart(family: str, results: dict, came: str | None, seeds: dict) -> str:
    """One family's score after every stage, over its chance, with the stage that brought it."""
    road = {stage: s[family] for stage, s in main_road(results).items() if family in s}
    stages = list(road)
    points = [skill_point(i, score, len(stages)) for i, score in enumerate(road.values())]
    chance = skill_point(0, results["final"][family]["chance"], len(stages))[1]

    # from the back: grid, other seeds, chance, the curve
    body = skill_frame(stages) + skill_band(family, stages, seeds)
    body += line(X0, chance, X1, chance, "dashed")
    body += el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), cls="loss")
    for stage, (x, y) in zip(stages, points):
        cls = "blue" if stage == came else "pale"
        tip = f"{family} after {stage}: {road[stage]:.1%}"
        body += el("circle", cx=x, cy=y, r=4 if stage == came else 2.2, cls=cls, tip=tip)

    # its last score beside it, and what thinking makes of it
    last = points[-1][1]
    body += word(f"{100 * road[stages[-1]]:.0f}", X1 + 8, last + 3.5, "tick")
    thinking = results.get("modes", {}).get("families", {}).get(family)
    if thinking:
        y = skill_point(0, thinking["think"], 1)[1]
        tip = f"{family}, asked to think: {thinking['think']:.1%}"
        body += el("circle", cx=X1, cy=y, r=3.5, cls="hollow", tip=tip)

    when = f"with {came}" if came else "not yet"
    seconds = stage_seconds(results, came) if came else None
    if seconds is not None:
        when += f", {seconds:.0f} s"
    caption = el("figcaption", el("h3", safe(family)), el("span", safe(when), cls="soft"))
    return el("figure", caption, svg(WIDE, Y1 + 18, f"{family} over the ladder", body))


def skill_charts(results: dict, seeds: dict) -> str:
    """A curve for every family over the whole ladder."""
    if not main_road(results):
        return ""
    came = lookups(results)
    charts = [
        skill_chart(family, results, came[family], seeds)
        for family in graded_families(results)
        if any(family in scores for scores in main_road(results).values())
    ]

    # what the marks mean
    marks = [("●", "blue", "the stage that brought it: first above halfway from chance to 100")]
    marks.append(("╌", "soft", "chance"))
    if results.get("modes", {}).get("families"):
        marks.append(("○", "rate", "asked to think"))
    if seeds.get("families_after"):
        marks.append(("", "band", f"range of {len(seeds['seeds'])} seeds"))
    return section(
        "When each skill came",
        "Accuracy on held-out samples after every stage, in percent. Beside each name: the stage, and the "
        "seconds of training until its end.",
        legend(*marks),
        el("div", *charts, cls="skills"),
    )


# ------------------------------------------------------------------------------------- thinking


def thinking_table(families: dict[str, dict]) -> str:
    """By family: direct, thinking, their difference, who alone is right, and what chains say."""
    ends = ("the reference's chain", "another chain", "no box")
    heads = ("direct", "thinking", "difference", "only direct", "only thinking", *ends)
    table = el("tr", el("th", "family"), *(el("th", safe(head), cls="r") for head in heads))
    for family, row in families.items():
        change = Difference(row["think"] - row["direct"], row["error"])
        cls = ("good" if change.value > 0 else "bad") if change.sure else ""
        cells = [
            el("td", f"{row['direct']:.1%}", cls="r"),
            el("td", f"{row['think']:.1%}", cls="r"),
            el("td", change.points(), cls=f"r {cls}".strip()),
            el("td", str(row["only_direct"]), cls="r"),
            el("td", str(row["only_think"]), cls="r"),
        ]
        for end in ENDS:
            right, count = row["ends"][end]
            cells.append(el("td", f"{right} of {count}" if count else "", cls="r soft"))
        table += el("tr", el("td", el("b", safe(family))), *cells)
    return el("div", el("table", table), cls="scroll")


def thinking_part(results: dict, pairs: list[dict]) -> str:
    """Direct answers against thinking: the table, and one question each that it won and lost."""
    families = results.get("modes", {}).get("families", {})
    if not families:
        return ""
    won = [pair for pair in pairs if pair["shown"] == "won"]
    lost = [pair for pair in pairs if pair["shown"] == "lost"]
    examples = ""
    for title, some in (("Thinking wins", won), ("Thinking loses", lost)):
        if some:
            examples += el("div", el("h3", title, cls="over"), transcripts(some))
    net = sum(row["only_think"] - row["only_direct"] for row in families.values())
    title = "Why thinking wins" if net > 0 else "Why thinking loses"
    return section(
        title if net else "Thinking and direct answers",
        "The same questions, asked both ways; a difference is coloured above two standard errors of the "
        "pairs. Then: how many only one way got right; and how many ended right of the chains that say what "
        "the reference says, of others, and of answers without a whole chain and box.",
        thinking_table(families),
        el("div", examples, cls="two") if examples else "",
    )
