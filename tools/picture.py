"""The README's pictures: what every stage of a ladder moved, and answers beside their pictures.

What it teaches: a score is a distance between two points, before and after, with chance beside it.

    runs/toy/results.json -> figures/ladder.json -> figures/ladder.svg     the numbers, then the drawing
    runs/toy-seeds        -> the same, means and ranges; figures/seeds.json, with which reports compare
    runs/toy/final        -> figures/answers.png, and the README's block   held-out pictures, both modes
                            figures/bars.png     the first of them, to ask oneself

    python -m tools.picture --run runs/toy

Where a run has no results or no model, the numbers, pictures and answers that are there stay, and
only the drawing is made anew. Losses are left out of the drawing (image, vit1): they have no common
scale with scores.
"""

import datetime
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from infra.cli import command
from infra.text import printable
from tools.drawing import el, line, svg, word
from tools.readme import ROOT, replace_block

LADDER = ROOT / "figures" / "ladder.json"
ASKED = ("charts", "spatial", "counting", "arithmetic")  # families of the answers
STYLE = """
text { font: 11px sans-serif; fill: #1e2022 }
.soft { fill: #6a6963 }
.e { text-anchor: end }
.m { text-anchor: middle }
line { stroke: #d5d2c8 }
.chance { stroke: #6a6963; stroke-width: 1.5 }
.moved { fill: #a8c6dc }
.before, .band { fill: #a8c6dc }
.band { opacity: .45 }
.after { fill: #2b6693 }
@media (prefers-color-scheme: dark) {
  text { fill: #e3e1da }
  .soft { fill: #a09e97 }
  line { stroke: #44474b }
  .chance { stroke: #a09e97 }
  .moved, .before, .band { fill: #3a5b75 }
  .after { fill: #82b6de }
}
"""


@dataclass
class PictureOptions:
    """Draw the README's pictures from a finished ladder."""

    run: Path = Path("runs/toy")


# ----------------------------------------------------------------------------------- the ladder


def ladder_numbers(results: dict, day: str) -> dict:
    """What the drawing and the README's table of machines need of a run's results."""
    kept = ("name", "metric", "before", "after", "chance", "lower_is_better", "seconds")
    overall = results["final"]["overall"]
    return {
        "date": day,
        "cores": results["cores"],
        "torch": results["versions"]["torch"],
        "seed": results["seed"],
        "total_seconds": results["total_seconds"],
        "peak_memory_gib": results["peak_memory_gib"],
        "overall": overall["accuracy"],
        "overall_chance": overall["chance"],
        "stages": [{key: stage[key] for key in kept} for stage in results["stages"]],
    }


def seed_numbers(part: dict) -> dict:
    """The same of several seeds of a ladder (a model's part of tools/seeds.py's summary): means, ranges."""
    stages = []
    for stage in part["stages"]:
        after = stage["after"]
        stages.append(
            {
                "name": stage["name"],
                "metric": stage["metric"],
                "before": stage["before"]["mean"],
                "after": after["mean"],
                "range": [after["low"], after["high"]],
                "chance": stage["chance"],
                "lower_is_better": stage["lower_is_better"],
                "seconds": stage["seconds"]["mean"],
            }
        )
    overall = part["final"]["overall"]
    return {
        "date": part["days"][-1],
        "cores": part["cores"],
        "torch": part["torch"],
        "seeds": part["seeds"],
        "total_seconds": part["seconds"]["mean"],
        "peak_memory_gib": part["peak_memory_gib"],
        "overall": overall["accuracy"]["mean"],
        "overall_range": [overall["accuracy"]["low"], overall["accuracy"]["high"]],
        "overall_chance": overall["chance"],
        "stages": stages,
    }


def draw_ladder(ladder: dict) -> str:
    """SVG: a line a stage, from its score before to its score after, with a tick at chance."""
    left, right, top, row = 330, 640, 34, 21
    stages = [stage for stage in ladder["stages"] if not stage["lower_is_better"]]
    foot = top + row * len(stages)

    def at(score: float) -> float:
        return left + (right - left) * score

    # The grid, in percent.
    of_seeds = f", mean of {len(ladder['seeds'])} seeds" if "seeds" in ladder else ""
    title = (
        f"make toy{of_seeds}: {ladder['total_seconds']:.0f} s on {ladder['cores']} cores, "
        f"overall accuracy {ladder['overall']:.1%} (chance {ladder['overall_chance']:.1%})"
    )
    out = word(title, 8, 16)
    for percent in (0, 25, 50, 75, 100):
        x = at(percent / 100)
        out += line(x, top - 6, x, foot - 4)
        out += word(f"{percent} %", x, foot + 10, "soft m")

    # A stage a line.
    for i, stage in enumerate(stages):
        y = top + row * i + 6
        before = at(stage["before"])
        after = at(stage["after"])
        chance = at(stage["chance"])
        low = min(before, after)
        tip = f"{stage['before']:.3f} to {stage['after']:.3f}, chance {stage['chance']:.3f}"

        out += word(stage["name"], 8, y + 4)
        out += word(stage["metric"], left - 14, y + 4, "soft e")
        out += el("rect", x=low, y=y - 1.5, width=abs(after - before), height=3, cls="moved")
        if "range" in stage:
            first, last = map(at, stage["range"])
            out += el("rect", x=first, y=y - 6, width=max(last - first, 1.5), height=12, cls="band")
        out += line(chance, y - 7, chance, y + 7, "chance")
        out += el("circle", cx=before, cy=y, r=4, cls="before")
        out += el("circle", cx=after, cy=y, r=5, cls="after", tip=tip)
        out += word(f"{stage['after']:.2f}", right + 38, y + 4, "e")

    legend = "pale dot: before the stage; full dot: after it; tick: chance (the best blind answer)"
    if of_seeds:
        legend = legend.replace("after it;", "after it; band: range over seeds;")
    out += word(legend, 8, foot + 30, "soft")
    drawing = svg(690, foot + 38, title, el("style", STYLE), out)
    namespaced = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return namespaced + "\n"


# ---------------------------------------------------------------------------------- the answers


def picture_row(pictures: list[Image.Image], side: int = 128, gap: int = 16) -> Image.Image:
    """Square pictures in a row, enlarged pixel by pixel."""
    sheet = Image.new("RGB", (len(pictures) * (side + gap) - gap, side), "white")
    for i, picture in enumerate(pictures):
        large = picture.convert("RGB").resize((side, side), Image.NEAREST)
        sheet.paste(large, (i * (side + gap), 0))
    return sheet


def ask_final(run: Path) -> tuple[list[Image.Image], str]:
    """The first held-out question of some families, asked in both modes: pictures, transcript."""
    from data.encode import Encoder
    from data.world import World
    from evaluate import ask, question_of, text_of
    from generate import load_model

    model, tokenizer = load_model(run / "final")
    encoder = Encoder(tokenizer, model.config, max_length=512)
    world = World()
    samples = [world.held_out(family, 1)[0] for family in ASKED]

    pictures = []
    for sample in samples:
        parts = [part for message in sample.messages for part in message.parts]
        pictures.append(next(part for part in parts if isinstance(part, Image.Image)))

    direct = ask(model, encoder, samples, think=False, max_new=48)
    thinking = ask(model, encoder, samples, think=True, max_new=64)
    lines = []
    for i, sample in enumerate(samples):
        question = printable(question_of(sample))
        lines.append(f"{i + 1}  {question}   (truth: {printable(sample.facts['answer'])})")
        lines.append(f"   directly:  {printable(text_of(direct[i], tokenizer))}")
        lines.append(f"   thinking:  {printable(text_of(thinking[i], tokenizer))}")
    return pictures, "\n".join(lines)


def write_answers(run: Path) -> None:
    """figures/answers.png, its first picture as the model sees it, and the README's block of answers."""
    pictures, transcript = ask_final(run)
    picture_row(pictures).save(ROOT / "figures" / "answers.png")
    pictures[0].save(ROOT / "figures" / "bars.png")

    block = (
        "![Four held-out pictures](figures/answers.png)\n\n"
        f"```\n{transcript}\n```\n"
        "The first held-out question of four families, as the last model answers it."
    )
    page = ROOT / "README.md"
    text = replace_block(page.read_text(encoding="utf-8"), "answers", block, "README.md")
    page.write_text(text, encoding="utf-8")


def draw_pictures(options: PictureOptions) -> None:
    """Take numbers and answers from the run where they are, then draw."""
    results = options.run / "results.json"
    seeds = options.run.parent / "toy-seeds" / "summary.json"
    summary = json.loads(seeds.read_text(encoding="utf-8")) if seeds.is_file() else {}
    if summary:
        shutil.copyfile(seeds, LADDER.parent / "seeds.json")

    # several seeds say more than one run
    numbers = {}
    if "dense" in summary:
        numbers = seed_numbers(summary["dense"])
    elif results.is_file():
        day = datetime.date.fromtimestamp(results.stat().st_mtime).isoformat()
        numbers = ladder_numbers(json.loads(results.read_text()), day)
    else:
        print(f"no {results}: figures/ladder.json stays as it is")
    if numbers:
        LADDER.write_text(json.dumps(numbers, indent=1) + "\n")

    ladder = json.loads(LADDER.read_text())
    (LADDER.parent / "ladder.svg").write_text(draw_ladder(ladder), encoding="utf-8")

    if (options.run / "final").is_dir():
        write_answers(options.run)
    else:
        print(f"no {options.run / 'final'}: the answers stay as they are")


if __name__ == "__main__":
    command(draw_pictures)
