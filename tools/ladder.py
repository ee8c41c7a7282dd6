"""What a finished ladder leaves: results.json, report.html, the last model, and two tables on the screen."""

import os
import platform
from collections import Counter
from dataclasses import asdict

import numpy as np
import PIL
import torch

import pretrain
from data.images import open_image
from evaluate import Graded, summary
from generate import generate
from infra.system import peak_memory
from infra.weights import write_json
from moe import Decisions
from objective import expert_counts
from recipe import Setup, answers, packed_rows
from rewards import split_think
from scale import parallel
from talk.page import STYLE, token_cards, view_of, view_style
from tools import report

Row = list[
    tuple[int, bool | None]
]  # documents of a packed row: length, and whether it has an image


def packed_row(setup: Setup) -> tuple[list[Row], dict[str, list[float]]]:
    """One packed batch as (length, has image; None for padding) per row, and the experts' load on it."""
    stage = pretrain.TOY["multitask"]
    _, batches = packed_rows(setup, stage, answers(setup, stage))
    batch = next(batches)[0]

    # The rows
    rows: list[Row] = []
    row: Row = []
    image = batch.ids.reshape(-1) == setup.encoder.tokenizer.image
    start = 0
    for length, owner in zip(batch.segments.lengths, batch.owners):
        has_image = bool(image[start : start + length].any())
        row.append((length, None if owner == "padding" else has_image))
        start += length
        if start % stage.length == 0:
            rows.append(row)
            row = []

    # The experts
    routing = Decisions()
    with torch.no_grad():
        setup.model.hidden(
            batch.ids, batch.images, batch.positions, batch.segments, routing=routing
        )
        counts = expert_counts(routing, batch, setup.encoder.tokenizer.image)[0] if routing else []
    load = {}
    for kind, by_layer in zip(("text", "vision"), counts):
        for layer, tokens in enumerate(by_layer):
            load[f"{kind}, layer {layer}"] = (tokens / tokens.sum()).tolist()
    return rows, load


def share_that_think(graded: list[Graded]) -> float:
    thinking = [split_think(g.said)[0] is not None for g in graded]
    return sum(thinking) / len(thinking)


def finish(ladder, seconds: float) -> None:
    """Last gradings, then everything that is written and printed. `ladder`: toy.Ladder."""
    # Direct answers and thinking, side by side; and what the picture is worth
    thinking_scores, thinking = ladder.grade(ladder.reasoning, think=True)
    direct = [g for g in ladder.graded if g.family in ladder.reasoning and g.sample.task != "text"]
    with_pictures = [family for family in ladder.held_out if family != "text"]
    swapped, _ = ladder.grade(with_pictures, swap=True)
    rows, load = packed_row(ladder.setup)
    load = load or ladder.expert_load
    ladder.save("final")

    options = ladder.options
    memory = parallel.total(peak_memory())[0]
    results = {
        "title": f"nanosail ladder on {options.data}" if options.data else "nanosail toy ladder",
        "model": options.model,
        "seed": options.seed,
        "total_seconds": round(seconds, 1),
        "cores": os.cpu_count(),
        "processes": ladder.setup.ranks.size,
        "parameters": ladder.model.parameter_counts(),
        "peak_memory_gib": round(memory / 2**30, 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "stages": [asdict(stage) for stage in ladder.stages],
        "final": {
            family: {"accuracy": s.accuracy, "chance": s.chance, "error": s.error, "n": s.n}
            for family, s in ladder.scores.items()
        },
        "families_after": ladder.families_after,
        "packing": {"filled": min(ladder.row_fill)},
        "adalrs": ladder.adalrs,
        "modes": {
            "direct_thinks": share_that_think(direct),
            "direct_accuracy": summary(direct)["overall"].accuracy,
            "think_thinks": share_that_think(thinking),
            "think_accuracy": thinking_scores["overall"].accuracy,
        },
        "format": ladder.format,
        "swap": {
            family: {
                "own": ladder.scores[family].accuracy,
                "swapped": s.accuracy,
                "chance": s.chance,
            }
            for family, s in swapped.items()
            if family != "overall"
        },
        "expert_load": load,
    }
    if not ladder.setup.ranks.main:
        return

    write_json(options.out / "results.json", results)
    cards = answer_cards(ladder, thinking)
    looked, style = looked_into(ladder.setup, ladder.graded)
    page = options.out / "report.html"
    parts = (results, ladder.runs, cards, rows, load, results["swap"])
    report.write_report(page, *parts, looked=looked, style=style)
    print_tables(ladder, results)


def looked_into(setup: Setup, graded: list[Graded], families: int = 3) -> tuple[str, str]:
    """Where the first answer about a picture of each of a few families looked: markup, and its style."""
    firsts: dict[str, Graded] = {}
    for g in graded:
        if g.sample.task != "text":
            firsts.setdefault(g.family, g)

    markup = ""
    style = STYLE
    for number, g in enumerate(list(firsts.values())[:families]):
        # asked once more, for the tokens
        ends = setup.encoder.tokenizer.ends
        answer = generate(setup.model, [setup.encoder.prompt(g.sample)], ends)[0]
        view = view_of(setup.model, setup.encoder, g.sample, answer.ids, name=f"looked{number}-")
        title = report.el("h3", report.safe(f"{g.family}: {g.question}"))
        markup += report.el("div", title, token_cards(view), cls="looked")
        style += view_style(view)
    return markup, style


def answer_cards(ladder, thinking: list[Graded], each: int = 3) -> list[dict]:
    """A few graded answers of every family, direct and thinking, with their pictures."""
    cards = []
    seen: Counter = Counter()
    root = ladder.setup.source.root
    for mode, graded in (("direct", ladder.graded), ("think", thinking)):
        for g in graded:
            seen[g.family, mode] += 1
            if seen[g.family, mode] > each:
                continue
            parts = [part for message in g.sample.messages for part in message.parts]
            pictures = [open_image(part, root) for part in parts if not isinstance(part, str)]
            cards.append(
                {
                    "family": g.family,
                    "question": g.question,
                    "truth": g.truth,
                    "said": g.said,
                    "score": g.score,
                    "mode": mode,
                    "images": pictures,
                }
            )
    return cards


def print_tables(ladder, results: dict) -> None:
    """Stages and families, as the terminal shows them at the end."""
    heads = f"{'before':>7s}    {'after':>7s} {'chance':>7s} {'n':>5s}"
    print(f"\n{'stage':18s} {'seconds':>7s}  {'metric':44s} {heads}")
    for s in ladder.stages:
        print(
            f"{s.name:18s} {s.seconds:7.1f}  {s.metric:44s} {s.before:7.3f} -> {s.after:7.3f} "
            f"{s.chance:7.3f} {s.samples:5d}"
        )

    print(f"\n{'family':14s} accuracy           chance  standard errors above it   swapped images")
    for family, s in ladder.scores.items():
        swapped = results["swap"].get(family, {}).get("swapped")
        shown = "" if swapped is None else f"{swapped:6.1%}"
        above = (s.accuracy - s.chance) / s.error
        print(
            f"{family:14s} {s.accuracy:6.1%} +- {s.error:4.1%}   {s.chance:6.1%}  {above:8.0f}"
            f"                   {shown}"
        )

    modes = results["modes"]
    out = ladder.options.out
    print(
        f"\nby default {modes['direct_thinks']:.0%} of the reasoning answers think (accuracy "
        f"{modes['direct_accuracy']:.1%}); asked to think, {modes['think_thinks']:.0%} do "
        f"({modes['think_accuracy']:.1%})"
    )
    memory = results["peak_memory_gib"] or "an unknown number of"  # Windows does not say
    print(
        f"{results['total_seconds']:.0f} seconds on {results['cores']} cores, peak memory "
        f"{memory} GiB; rows at least {results['packing']['filled']:.1%} full; "
        f"{out / 'results.json'}, {out / 'report.html'}, {out / 'final'}"
    )
