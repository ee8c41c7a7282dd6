"""One page about a run of a pipeline: its funnel, and fifty kept and fifty dropped samples to look at.

What it teaches: nobody should train on data that nobody looked at. A funnel says how many went; only the
samples say whether they should have. So the page shows both sides, drawn at random, each with its picture,
what it said before, what it says now, and what every step did.

    OUT.history.jsonl --counted--> funnel          OUT.jsonl (after) --+
         +--drawn: 50 kept, 50 dropped -----------> the data (before) -+--> OUT.report.html

    python -m curation.report --history runs/photos.history.jsonl

Dropped ones are drawn from all reasons in turn, so that a rare reason is seen as well. Everything from data
is escaped, and the page's policy forbids scripts and anything from a network.

Simplified: the numbers and reasons of all samples are in memory, not their texts.
"""

import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from curation.asking import Records
from curation.captioner import alt_text_of, shown_pictures
from curation.pipeline import Event, FunnelCounts, write_lines
from data.images import open_image
from data.readers import Folder
from data.sample import BadSample, Sample
from infra.cli import command
from tools.drawing import el, facts, html_page, image_tag, safe, section, svg, word

LONGEST_SHOWN = 1200  # characters of a text on the page
MOST_PICTURES = 4  # of a sample


@dataclass
class ReviewOptions:
    """A page about a pipeline's run."""

    history: Path  # OUT.history.jsonl of the run
    data: Path | None = None  # what it read; default: as OUT.work remembers
    images: Path | None = None  # folder of the images; default: likewise, else beside the data
    out: Path | None = None  # default: OUT.report.html
    kept: int = 50  # samples to show
    dropped: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Reviewed:
    """A sample on the page. before: as it was read, None if it could not be; after: its row, {} for none."""

    index: int
    history: list[Event]
    before: Sample | None
    after: dict


# ------------------------------------------------------------------------------------ what is shown


def histories(path: Path) -> Iterator[tuple[int, list[Event]]]:
    """(index, events) of every sample. Raises ValueError for a file that is no history."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                yield found["index"], [Event(**event) for event in found["history"]]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no line of a history ({error})") from error


def draw_for_review(options: ReviewOptions) -> tuple[FunnelCounts, list[int], list[int]]:
    """The funnel, and the indices of the kept and the dropped samples to show."""
    outcome = FunnelCounts()
    kept = []
    dropped: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, history in histories(options.history):
        outcome.add(history)
        last = history[-1] if history else Event("", "kept")
        if last.did == "dropped":
            dropped[last.step, last.why.split(": ")[0]].append(index)
        else:
            kept.append(index)
    outcome.written = len(kept)

    rng = random.Random(options.seed)
    rng.shuffle(kept)
    return outcome, sorted(kept[: options.kept]), in_turn(dropped, options.dropped, rng)


def in_turn(groups: dict, number: int, rng: random.Random) -> list[int]:
    """So many of all groups: one of each, then another one of each, until there are enough."""
    for group in groups.values():
        rng.shuffle(group)
    taken: Counter = Counter()
    left = number
    while left and any(taken[key] < len(group) for key, group in groups.items()):
        for key, group in groups.items():
            if left and taken[key] < len(group):
                taken[key] += 1
                left -= 1
    return [index for key, group in groups.items() for index in sorted(group[: taken[key]])]


def reviewed(options: ReviewOptions, kept: list[int], dropped: list[int]) -> dict[int, Reviewed]:
    """The chosen samples with what they were and what they became."""
    wanted = {*kept, *dropped}
    records = Records(Folder(*what_was_read(options)))

    # What they became; a run that kept nothing wrote no rows
    rows = {}
    if kept:
        with open(rows_beside(options.history), encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["facts"]["index"] in wanted:
                    rows[row["facts"]["index"]] = row

    found = {}
    for index, history in histories(options.history):
        if index in wanted:
            before = records[index] if index < len(records) else None
            if isinstance(before, BadSample):
                before = None
            found[index] = Reviewed(index, history, before, rows.get(index, {}))
    return found


def rows_beside(history: Path) -> Path:
    """OUT.jsonl of OUT.history.jsonl. Raises ValueError for another name."""
    if not history.name.endswith(".history.jsonl"):
        raise ValueError(f"--history {history}: it is called OUT.history.jsonl")
    return history.with_name(history.name.removesuffix(".history.jsonl") + ".jsonl")


def what_was_read(options: ReviewOptions) -> tuple[Path, Path | None]:
    """The data and the images' folder: as named, else as the run wrote down."""
    if options.data:
        return options.data, options.images
    settings = rows_beside(options.history).with_suffix(".work") / "settings.json"
    if not settings.exists():
        raise ValueError(f"{settings} is not there: name what the run read, --data")
    known = json.loads(settings.read_text(encoding="utf-8"))
    images = options.images or known.get("images")
    return Path(known["data"]), Path(images) if images else None


# ------------------------------------------------------------------------------------------- page


def funnel_drawing(outcome: FunnelCounts) -> str:
    """A bar for each step: what is left, and in red what it dropped."""
    bars = [("records", outcome.read, 0)]
    for step, did in outcome.steps.items():
        came = sum(did.values())
        bars.append((step, came - did["dropped"], did["dropped"]))

    out = ""
    widest = 640 / max(outcome.read, 1)
    for row, (name, left, gone) in enumerate(bars):
        y = 24 * row
        share = left / max(outcome.read, 1)
        out += word(name, 112, y + 12, "e")
        out += el("rect", x=120, y=y, width=left * widest, height=17, cls="blue")
        if gone:
            x = 120 + left * widest
            tip = f"{name}: {gone:,} dropped"
            out += el("rect", x=x, y=y, width=gone * widest, height=17, cls="bad", tip=tip)
        out += word(f"{left:,} ({share:.0%})", 860, y + 12, "tick e")
    return svg(860, 24 * len(bars), "what is left after each step", out)


def funnel_rows(outcome: FunnelCounts) -> str:
    """The numbers, with every reason."""
    heads = ("step", "came", "changed", "dropped", "left", "why they were dropped")
    cells = [el("th", head, cls="r" if 0 < i < 5 else "") for i, head in enumerate(heads)]
    table = el("tr", *cells)
    for step, did in outcome.steps.items():
        came = sum(did.values())
        numbers = (came, did["changed"], did["dropped"], came - did["dropped"])
        reasons = outcome.reasons.get(step, Counter()).most_common()
        why = ", ".join(f"{number:,} {reason}" for reason, number in reasons)
        columns = [el("td", f"{number:,}", cls="r") for number in numbers]
        table += el("tr", el("td", el("b", safe(step))), *columns, el("td", safe(why)))
    return el("div", el("table", table), cls="scroll")


def review_card(one: Reviewed) -> str:
    """Pictures; what was said before, what is said now; what each step did."""
    text = el("p", "was: ", safe(shortened(text_before(one))), cls="soft")
    for speaker, said in turns_after(one.after):
        text += el("p", el("b", safe(shortened(said))) if speaker == "assistant" else safe(said))

    # What the steps had to say, without what stands above already; of a dropped one the last is why
    shown = [said for _, said in turns_after(one.after)]
    notes = []
    for event in one.history:
        if event.did == "dropped":
            why = el("span", safe(shortened(f"✗ {event.why}")), cls="bad")
        else:
            why = el("span", safe(shortened(event.why)), cls="soft")
        if event.why and event.why not in shown:
            notes.append(el("span", safe(event.step), cls="soft") + " " + why)
    text += el("p", " · ".join(notes)) if notes else ""

    pictures = pictures_shown(one.before)
    drawn = el("div", *pictures, cls="pictures") if pictures else ""
    return el("div", drawn, el("div", text), cls="card many" if len(pictures) > 1 else "card")


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " ..."


def text_before(one: Reviewed) -> str:
    if one.before is None:
        return "(cannot be read)"
    return alt_text_of(one.before) or "(nothing)"


def turns_after(row: dict) -> list[tuple[str, str]]:
    """(role, text) of a row's conversation, and of the pairs that stand in its facts."""
    turns = []
    for message in row.get("messages", []):
        turns.append((message["role"], message["content"].replace("<image>", "").strip()))
    for question, answer in row.get("facts", {}).get("pairs", []):
        turns += [("user", question), ("assistant", answer)]
    return turns


def pictures_shown(sample: Sample | None) -> list[str]:
    """Its first pictures as markup; those that cannot be read are said to be."""
    tags = []
    for picture in shown_pictures(sample)[:MOST_PICTURES] if sample else ():
        try:
            tags.append(image_tag(open_image(picture, sample.root, sample.origin)))
        except BadSample as fault:
            tags.append(el("span", safe(fault.reason), cls="soft"))
    return tags


def grouped_by_reason(samples: list[Reviewed]) -> str:
    """Cards under the step and the reason that dropped them."""
    groups: dict[str, str] = defaultdict(str)
    for one in samples:
        last = one.history[-1]
        groups[f"{last.step}: {last.why.split(': ')[0]}"] += review_card(one)
    parts = []
    for reason, cards in groups.items():
        parts.append(el("div", el("h3", safe(reason)), el("div", cards, cls="cards"), cls="family"))
    return "".join(parts)


def write_review(options: ReviewOptions) -> Path:
    """Writes the page; returns its path. Raises ValueError for files that are not a run's."""
    rows = rows_beside(options.history)
    outcome, kept, dropped = draw_for_review(options)
    known = reviewed(options, kept, dropped)
    page = options.out or rows.with_suffix(".report.html")

    share = outcome.written / max(outcome.read, 1)
    numbers = facts(
        (f"{outcome.read:,}", "samples were read"),
        (f"{outcome.written:,}", f"were kept, {share:.1%}"),
        (str(len(outcome.steps)), "steps"),
    )
    stayed = "".join(review_card(known[index]) for index in kept)
    went = grouped_by_reason([known[index] for index in dropped])
    title = f"What became of {rows.stem}"
    markup = html_page(
        title,
        el("h1", safe(title)),
        numbers,
        section(
            "Funnel",
            "Blue: what is left after a step; red: what it dropped.",
            funnel_drawing(outcome),
            funnel_rows(outcome),
        ),
        section("Kept", "Drawn at random. Grey: what was said before.", stayed_cards(stayed)),
        section("Dropped", "Drawn from all reasons in turn.", went),
    )
    write_lines(page, [markup])
    return page


def stayed_cards(cards: str) -> str:
    return el("div", cards, cls="cards") if cards else ""


def review(options: ReviewOptions) -> None:
    """The command."""
    print(f"wrote {write_review(options)}")


if __name__ == "__main__":
    command(review)
