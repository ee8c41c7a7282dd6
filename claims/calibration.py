"""Calibration, measured: does spreading the experts over pictures cost text anything?

What it teaches: two ways to even out a router without training the model, compared on three draws of
probes each, and on held-out data.

    by_bias      a bias for each expert on the choice alone, moved until text loads are even; it knows
                 text only ("calibration on language data", the paper's words), and cannot tell the
                 two kinds of tokens apart
    by_router    what calibrate.py does: the gates are turned where only visual tokens lie

A bias moves the choices of both kinds by the same amount, and has no place in the released layout;
a gate has. What is measured, before and after: entropy of the expert loads of visual and of text
tokens, text loss, the share of answer tokens about pictures that the model would say (given those
before), and exact answers to held-out questions.

    python -m claims.calibration --model runs/toy-moe/multitask    a trained toy, three draws of probes
    python -m claims.calibration                                   three small models from scratch:
                                                                   language first, then eyes

The table goes to runs/calibration.md; expert use before and after, to runs/calibration.html.

Legend: E experts; entropy in nats, mean over layers (log E is the most). Source: SAIL-VL2 section
2.2, which publishes no procedure.
"""

import math
import statistics
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

import calibrate
import moe
import pretrain
import recipe
from calibrate import Assessment, Change, assess, by_router, router_inputs
from data import world
from data.encode import Encoder
from evaluate import evaluate
from generate import load_model
from infra.cli import command
from packing import Batch, collate
from recipe import Setup, fit
from stage import ALL, Stage
from tools import drawing, report
from vlm import SailVL


def fit_stage(model: SailVL, stage: Stage, source: world.World, encoder: Encoder) -> None:
    """Train a model in place. The one call from here into the recipe."""
    fit(Setup(model, encoder, source), stage)


# ---------------------------------------------------------------------------------- the other design


def by_bias(
    model: SailVL, text: list[Batch], pictures: list[Batch], steps: int = 100, rate: float = 0.005
) -> Change:
    """Even out the loads on probed text by a bias on the choice; `pictures` are not looked at."""
    trial = deepcopy(model)
    layers = [block.mlp for block in trial.language_model.model.layers]
    seen = router_inputs(model, text, visual=False)
    for _ in range(steps):
        routing = []
        for layer, x in zip(layers, seen):
            logits = layer.gate(x)
            routing.append(moe.route(logits, layer.top_k, layer.normalise, bias=layer.bias))
        moe.update_expert_bias(layers, moe.tokens_per_expert(routing), rate)

    def apply(model: SailVL, share: float) -> None:
        for block, layer in zip(model.language_model.model.layers, layers):
            block.mlp.bias = share * layer.bias

    return apply


DESIGNS = {"as it was": None, "by_bias": by_bias, "by_router": by_router}


# ----------------------------------------------------------------------------------------- one draw


@dataclass
class Outcome:
    """Of one design on one draw of probes, measured on held-out data."""

    share: float  # of the change that the bound allowed
    experts: Assessment
    token_accuracy: float  # answer tokens about pictures
    answer_accuracy: float  # exact answers to questions


@dataclass
class CalibrationOptions:
    """Both designs of a calibration on several draws of probes: entropies, text loss, answers."""

    model: Path | None = None  # a trained MoE; none: small ones from scratch, one for each seed
    seeds: int = 3
    first: int = 0  # seed of the first
    steps: tuple[int, int] = (150, 60)  # from scratch: language alone; then vision and adapter
    after: int = 0  # multimodal steps after the calibration
    held: int = 100  # held-out questions per family
    bound: float = 0.01  # relative, on text loss and text entropy
    out: Path = Path("runs/calibration.html")


def compare_designs(options: CalibrationOptions, seed: int) -> dict[str, Outcome]:
    """Design -> what it comes to, all of them from one model and one draw of probes."""
    if options.model:
        start, tokenizer = load_model(options.model)
        encoder = Encoder(tokenizer, start.config, max_length=512)
        mixture = pretrain.TOY["multitask"].mixture
    else:
        start, encoder = language_first(options.steps, seed)
        mixture = world.CAPTION
    mixtures = ({"text": 1.0}, mixture)
    probes = [draw_batches(encoder, m, seed, test=False) for m in mixtures]
    held_out = [draw_batches(encoder, m, seed, test=True) for m in mixtures]
    source = world.World()
    questions = []
    for family in mixture:
        if family != "text":
            questions += source.held_out(family, options.held)

    outcomes = {}
    for name, design in DESIGNS.items():
        model = deepcopy(start)
        share = 0.0
        if design:
            share = calibrate.calibrate(model, *probes, design, options.bound)
        experts = assess(model, *held_out)

        # What the calibration is worth for training that follows it.
        if options.after:
            stage = Stage(
                name,
                ALL,
                mixture,
                steps=options.after,
                rows=2,
                lr=5e-3,
                schedule="wsd",
                seed=seed,
            )
            fit_stage(model, stage, source, encoder)
        scores, _ = evaluate(model, encoder, questions)
        answers = scores["overall"].accuracy
        outcomes[name] = Outcome(share, experts, token_accuracy(model, held_out[1]), answers)
    return outcomes


def draw_batches(
    encoder: Encoder,
    mixture: dict[str, float],
    seed: int,
    test: bool,
    count: int = 4,
    samples: int = 40,
) -> list[Batch]:
    """Batches of one row of the drawn world's samples, from its held-out side or the other."""
    batches = []
    for start in range(0, count * samples, samples):
        numbers = range(start, start + samples)
        documents = [encoder(world.sample(i, seed, mixture, test)) for i in numbers]
        batches.append(collate([documents], None, encoder.tokenizer.pad))
    return batches


def language_first(steps: tuple[int, int], seed: int) -> tuple[SailVL, Encoder]:
    """A small MoE whose router learned on text, then eyes trained to fit it.

    That is where SAIL-VL2's MoE starts.
    """
    source = world.World()
    model, tokenizer = recipe.new_model("toy-moe", source, seed)
    encoder = Encoder(tokenizer, model.config, max_length=512)
    language = Stage(
        "language",
        ("llm",),
        {"text": 1.0},
        steps=steps[0],
        rows=2,
        lr=1e-2,
        schedule="wsd",
        balance=0.02,
    )
    eyes = Stage("eyes", ("vision", "adapter"), world.CAPTION, steps=steps[1], rows=2, lr=5e-3)
    for stage in (language, eyes):
        fit_stage(model, stage, source, encoder)
    return model, encoder


@torch.no_grad()
def token_accuracy(model: SailVL, batches: list[Batch]) -> float:
    """Share of the labelled tokens that the model would say, given those before."""
    right = []
    for batch in batches:
        hidden = model.hidden(batch.ids, batch.images, batch.positions, batch.segments)
        labels = batch.labels.reshape(-1)
        logits = model.language_model.lm_head(hidden[labels >= 0])
        right.append(logits.argmax(-1) == labels[labels >= 0])
    return float(torch.cat(right).float().mean())


# ---------------------------------------------------------------------------------- table and page


def relative_change(now: float, before: float) -> float:
    """In percent."""
    return 100 * (now / max(before, 1e-9) - 1)


def table_rows(draws: list[dict[str, Outcome]]) -> list[str]:
    """A markdown table: means over the draws, and the mean change against the model as it was."""
    lines = [
        "| design | entropy of visual tokens | entropy of text | text loss | exact answers |",
        "|---|---:|---:|---:|---:|",
    ]
    most = math.log(draws[0]["as it was"].experts.use.shape[-1])
    for name in DESIGNS:
        cells = []
        for measure in ("visual_entropy", "text_entropy", "text_loss"):
            pairs = []
            for outcomes in draws:
                now = getattr(outcomes[name].experts, measure)
                before = getattr(outcomes["as it was"].experts, measure)
                pairs.append((now, relative_change(now, before)))
            value = statistics.mean(now for now, _ in pairs)
            change = statistics.mean(percent for _, percent in pairs)
            cell = f"{value:.3f}"
            if measure == "visual_entropy":
                cell += f" nats, {value / most:.0%} of log E"
            if DESIGNS[name]:
                cell += f" ({change:+.{1 if measure == 'visual_entropy' else 2}f} %)"
            cells.append(cell)
        exact = statistics.mean(outcomes[name].answer_accuracy for outcomes in draws)
        cells.append(f"{exact:.1%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def describe_outcome(name: str, seed: int, outcome: Outcome) -> str:
    experts = outcome.experts
    most = math.log(experts.use.shape[-1])
    return (
        f"{name:10} seed {seed}  share {outcome.share:<6.3g} "
        f"vision {experts.visual_entropy:.3f} ({experts.visual_entropy / most:.0%})  "
        f"text {experts.text_entropy:.3f} ({experts.text_entropy / most:.0%})  "
        f"text loss {experts.text_loss:.4f}  "
        f"answer tokens right {outcome.token_accuracy:.3f}  "
        f"exact answers {outcome.answer_accuracy:.3f}"
    )


def expert_page(before: Assessment, after: Assessment) -> str:
    """HTML: expert use per layer and kind of token, as two tables of percentages."""
    sections = []
    for title, experts in (("Before calibration", before), ("After", after)):
        rows = {}
        for kind, use in zip(("text", "vision"), experts.use):
            for layer, shares in enumerate(use):
                rows[f"{kind}, layer {layer}"] = shares.tolist()
        count = experts.use.shape[-1]
        columns = [str(e) for e in range(count)]
        note = "Percent of the routed slots; full colour: twice the even share."
        sections.append(report.section(title, note, report.heat(rows, columns, 2 / count)))
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Expert use</title>'
    return head + report.el("style", drawing.CSS) + "".join(sections) + "</html>\n"


# -------------------------------------------------------------------------------------- the command


def measure_calibration(options: CalibrationOptions) -> None:
    """All draws, the table, the page of the first draw."""
    seeds = range(options.first, options.first + options.seeds)
    draws = [compare_designs(options, seed) for seed in seeds]
    print("entropy in nats (fraction of log E), of visual and of text tokens; held-out data;")
    print(f"accuracies after {options.after} further steps")
    for name in DESIGNS:
        for seed, outcomes in zip(seeds, draws):
            print(describe_outcome(name, seed, outcomes[name]))
    lines = table_rows(draws)
    print("\n".join(["", *lines]))

    options.out.parent.mkdir(parents=True, exist_ok=True)
    first = draws[0]
    page = expert_page(first["as it was"].experts, first["by_router"].experts)
    options.out.write_text(page, encoding="utf-8")
    table = options.out.with_suffix(".md")
    table.write_text("\n".join(lines) + "\n")
    print(f"\nexpert use of seed {seeds[0]} before and after: {options.out}; the table: {table}")


if __name__ == "__main__":
    command(measure_calibration)
