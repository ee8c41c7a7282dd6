"""What a finished ladder leaves: results.json, report.html, the last model, and two tables on the screen."""

import datetime
import hashlib
import json
import os
import platform
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL
import torch

import pretrain
from data.images import stills_of
from evaluate import Graded, group_of, summary
from generate import generate
from graders import boxed
from infra.system import peak_memory
from infra.text import printable
from infra.weights import write_json
from moe import Decisions
from objective import expert_counts
from recipe import Setup, answers, packed_rows
from rewards import split_think
from scale import parallel
from talk.page import STYLE, token_cards, view_of, view_style
from tools import report
from tools.evidence import paired
from tools.seeds import known_seeds, machine_name
from tools.story import ENDS, story_lines

Row = list[
    tuple[int, bool | None]
]  # documents of a packed row: length, and whether it has an image


def packed_row(setup: Setup) -> tuple[list[Row], dict[str, list[float]]]:
    """One packed batch as (length, has image; None for padding) per row, and the experts' load on it."""
    stage = pretrain.TOY["multitask"]
    _, batches = packed_rows(setup, stage, answers(setup, stage))
    batch = next(batches)[0].to(setup.ranks.device)

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


def both_ways(direct: list[Graded], thinking: list[Graded]) -> list[tuple[Graded, Graded]]:
    """(direct, thinking) of every sample that was asked both ways."""
    directly = {id(g.sample): g for g in direct}
    return [(directly[id(g.sample)], g) for g in thinking if id(g.sample) in directly]


def chain_end(graded: Graded) -> str:
    """How a thinking answer went: a key of story.ENDS."""
    chain, answer = split_think(graded.said)
    if chain is None or boxed(answer) is None:
        return "no box"
    same = chain.split() == str(graded.sample.facts.get("chain", "")).split()
    return "as the reference" if same else "another chain"


def modes_by_family(pairs: list[tuple[Graded, Graded]]) -> dict[str, dict]:
    """What thinking is worth: accuracies, the paired error, who alone is right, right chains by their end."""
    families: dict[str, list[tuple[Graded, Graded]]] = {}
    for direct, think in pairs:
        families.setdefault(direct.family, []).append((direct, think))

    rows = {}
    for family, group in families.items():
        d = [direct.score for direct, _ in group]
        t = [think.score for _, think in group]
        ends = {end: [0, 0] for end in ENDS}
        for _, think in group:
            right_and_all = ends[chain_end(think)]
            right_and_all[0] += think.score >= 1
            right_and_all[1] += 1
        rows[family] = {
            "n": len(group),
            "direct": sum(d) / len(d),
            "think": sum(t) / len(t),
            "error": paired(d, t).error,
            "only_direct": sum(a > b for a, b in zip(d, t)),
            "only_think": sum(b > a for a, b in zip(d, t)),
            "ends": ends,
        }
    return rows


def thinking_error(pairs: list[tuple[Graded, Graded]]) -> float | None:
    """Standard error of what thinking changes, in all families together."""
    if not pairs:
        return None
    return paired([direct.score for direct, _ in pairs], [think.score for _, think in pairs]).error


def shown_pairs(pairs: list[tuple[Graded, Graded]], root: Path | None) -> list[dict]:
    """The first question of three families as it comes, and the first that thinking wins and loses."""
    chosen: list[tuple[str, Graded, Graded]] = []
    firsts: set[str] = set()
    for direct, think in pairs:
        if direct.family not in firsts and len(firsts) < 3:
            firsts.add(direct.family)
            chosen.append(("first", direct, think))
    for shown, sign in (("won", 1), ("lost", -1)):
        differ = [pair for pair in pairs if sign * (pair[1].score - pair[0].score) > 0]
        chosen += [(shown, *pair) for pair in differ[:1]]

    return [
        {
            "shown": shown,
            "family": direct.family,
            "question": direct.question,
            "truth": direct.truth,
            "direct": direct.said,
            "think": think.said,
            "direct_score": direct.score,
            "think_score": think.score,
            "images": graded_pictures(direct, root),
        }
        for shown, direct, think in chosen
    ]


def graded_pictures(graded: Graded, root: Path | None) -> list:
    """The pictures of a graded sample, opened."""
    origin = graded.sample.origin
    parts = [part for message in graded.sample.messages for part in message.parts]
    shown = [part for part in parts if not isinstance(part, str)]
    return [still for part in shown for still in stills_of(part, root, origin)]


def scores_by_family(graded: list[Graded]) -> dict[str, list[float]]:
    """family -> score of each sample, in their order: what paired comparisons need."""
    scores: dict[str, list[float]] = {}
    for g in graded:
        scores.setdefault(group_of(g), []).append(round(g.score, 4))
    return scores


def question_digests(graded: list[Graded]) -> dict[str, str]:
    """family -> digest of its questions and truths: the same in two runs, and their scores are pairs."""
    digests: dict = {}
    for g in graded:
        digest = digests.setdefault(group_of(g), hashlib.sha256())
        digest.update(f"{g.question}\0{g.truth}\0".encode())
    return {family: digest.hexdigest()[:16] for family, digest in digests.items()}


def finish(ladder, seconds: float, after: dict[str, dict[str, list[float]]] | None = None) -> None:
    """Last gradings, then everything that is written and printed. `ladder`: toy.Ladder.

    after: stage -> family -> score of each held-out sample (`scores_by_family`), as far as it was kept;
    with the last scores it becomes samples.json, by which two runs are compared sample by sample.
    """
    # Direct answers and thinking, side by side; and what the picture is worth
    thinking_scores, thinking = ladder.grade(ladder.reasoning, think=True)
    direct = [g for g in ladder.graded if g.family in ladder.reasoning and g.sample.task != "text"]
    pairs = both_ways(direct, thinking)
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
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(),
        "device": ladder.setup.ranks.device,
        "options": {name: str(value) for name, value in asdict(options).items()},
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
            "error": thinking_error(pairs),
            "families": modes_by_family(pairs),
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
    scores = (after or {}) | {
        "final": scores_by_family(ladder.graded),
        "thinking": scores_by_family(thinking),
    }
    samples = {"questions": question_digests(ladder.graded), "scores": scores}
    (options.out / "samples.json").write_text(json.dumps(samples) + "\n", encoding="utf-8")

    write_page(ladder, results, thinking, rows)
    print_tables(ladder, results)


def write_page(ladder, results: dict, thinking: list[Graded], rows: list[Row]) -> None:
    """report.html, from the results and what is too large for them: curves, answers, where it looked."""
    direct = [g for g in ladder.graded if g.family in ladder.reasoning and g.sample.task != "text"]
    root = ladder.setup.source.root
    looked, style = looked_into(ladder.setup, ladder.graded)
    report.write_report(
        ladder.options.out / "report.html",
        results,
        ladder.runs,
        answer_cards(ladder, thinking),
        rows,
        results["expert_load"],
        results["swap"],
        looked=looked,
        style=style,
        pairs=shown_pairs(both_ways(direct, thinking), root),
        seeds=known_seeds(results, ladder.options.out.parent),
    )


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
            cards.append(
                {
                    "family": g.family,
                    "question": g.question,
                    "truth": g.truth,
                    "said": g.said,
                    "score": g.score,
                    "mode": mode,
                    "images": graded_pictures(g, root),
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

    print()
    for text in story_lines(results):
        print(printable(text))

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
