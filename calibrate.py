"""Entropy calibration: spread a language model's experts over pictures before it is trained on any.

What it teaches: a router learned on text sends whatever looks unlike text to a few experts. SAIL-VL2 (section 2.2) reports
"data probing and automatic calibration on language data, which maximizes expert activation entropy", that text behaviour is
kept and that entropy on multimodal data rises; it publishes no procedure. Everything below is therefore ours: two designs, a
bound that keeps text behaviour, and a measurement of both.

    probe: run the model, remember what every router saw      text (S1, C) and visual tokens (S2, C), no labels
    by_bias    a bias per expert on the choice, nudged until text loads are even; knows text only, cannot tell kinds apart
    by_router  (default) gradient steps on the gates alone: more entropy of the mean choice on visual tokens, while a KL term
               holds every text token's choice
    bounded    take the largest step of either that leaves text loss and text entropy within 1 %

Why the gates: visual tokens lie in directions that text hardly uses, so that a gate can be turned there and leave text as it
is; a bias moves both kinds by the same amount. And a gate is in the released layout, a bias is not.

Legend: S tokens, C width, E experts. Entropy is that of the load: -sum f log f of the shares f of routed slots, in nats,
mean over layers; log E is the most.

    python calibrate.py --model runs/toy-moe/multitask      a trained toy: three draws of probes, both designs, a table, and
                                                            expert use before and after in runs/calibration.html
    python calibrate.py                                     three small ones from scratch: language first, then eyes
"""

import math
import statistics
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import moe
import pretrain
import recipe
from data import world
from data.encode import Encoder
from evaluate import evaluate
from generate import load_model
from packing import Batch, collate
from tools import report
from train import Stage, expert_use
from vlm import SailVL

Change = Callable[[SailVL, float], None]  # apply a fraction of a calibration to a model, in place


@dataclass
class Measured:
    """Of one model on held-out batches. use (2: text and vision, layers, E): share of the routed slots."""

    text_loss: float
    right: float  # share of the answer tokens about pictures that it would say, given those before
    use: Tensor

    def entropy(self, kind: int) -> float:
        """Nats, mean over layers; kind 0 text, 1 vision."""
        return float(moe.entropy(self.use[kind]).mean())


@torch.no_grad()
def measure(model: SailVL, text: list[Batch], pictures: list[Batch]) -> Measured:
    """Loss and loads of text from text-only batches, accuracy and loads of visual tokens from pictures."""
    use, loss, right = (
        torch.zeros(2, len(model.language_model.model.layers), model.config.text.num_experts),
        [],
        [],
    )
    for kind, batches in enumerate((text, pictures)):
        for batch in batches:
            routing: list = []
            hidden = model.hidden(
                batch.ids, batch.images, batch.positions, batch.segments, routing=routing
            )
            use[kind] += expert_use(routing, batch, model.image_token_id)[0][kind]
            labels = batch.labels.reshape(-1)
            logits = model.language_model.lm_head(hidden[labels >= 0])
            loss.append(
                F.cross_entropy(logits, labels[labels >= 0], reduction="none")
            ) if kind == 0 else right.append(logits.argmax(-1) == labels[labels >= 0])
    return Measured(
        float(torch.cat(loss).mean()),
        float(torch.cat(right).float().mean()),
        use / use.sum(-1, keepdim=True),
    )


@torch.no_grad()
def probe(model: SailVL, batches: list[Batch], visual: bool) -> list[Tensor]:
    """What the gate of every layer sees, (tokens, C) each: visual tokens or real text tokens."""
    seen: list[list[Tensor]] = [[] for _ in model.language_model.model.layers]
    for batch in batches:
        image = batch.ids.reshape(-1) == model.image_token_id
        keep = image if visual else batch.real() & ~image
        hooks = [
            block.mlp.gate.register_forward_pre_hook(
                lambda m, inputs, into=into: into.append(inputs[0][keep])
            )
            for block, into in zip(model.language_model.model.layers, seen)
        ]
        model.hidden(batch.ids, batch.images, batch.positions, batch.segments)
        for hook in hooks:
            hook.remove()
    return [torch.cat(s) for s in seen]


def by_bias(
    model: SailVL, text: list[Batch], pictures: list[Batch], steps: int = 100, rate: float = 0.005
) -> Change:
    """Design A: text alone. Even out the loads on probed text by a bias on the choice; `pictures` are not looked at."""
    trial = deepcopy(model)
    layers = [block.mlp for block in trial.language_model.model.layers]
    seen = probe(model, text, visual=False)
    for _ in range(steps):
        routing = [
            moe.route(layer.gate(x), layer.top_k, layer.normalise, bias=layer.bias)
            for layer, x in zip(layers, seen)
        ]
        moe.update_expert_bias(layers, moe.tokens_per_expert(routing), rate)

    def apply(to: SailVL, share: float) -> None:
        for block, layer in zip(to.language_model.model.layers, layers):
            block.mlp.bias = share * layer.bias

    return apply


def by_router(
    model: SailVL,
    text: list[Batch],
    pictures: list[Batch],
    steps: int = 150,
    lr: float = 3e-3,
    hold: float = 100.0,
) -> Change:
    """Design B: for each gate W, on cached inputs, minimise  -H(mean softmax(x_v W^T)) + hold * KL(old || new on text).

    A layer is fitted to what it saw before the layers below it changed: one pass, no gradient through the model.
    """
    gates = []
    seen = zip(
        model.language_model.model.layers,
        probe(model, text, visual=False),
        probe(model, pictures, visual=True),
    )
    for block, x_text, x_image in seen:
        old = block.mlp.gate.weight.detach().clone()  # `apply` writes into the original
        w, target = old.clone().requires_grad_(), F.log_softmax(x_text @ old.T, -1)
        optimizer = torch.optim.Adam([w], lr=lr)
        for _ in range(steps):
            spread = moe.entropy(F.softmax(x_image @ w.T, -1).mean(0))
            drift = F.kl_div(
                F.log_softmax(x_text @ w.T, -1), target, log_target=True, reduction="batchmean"
            )
            optimizer.zero_grad()
            (hold * drift - spread).backward()
            optimizer.step()
        gates.append((old, w.detach()))

    def apply(to: SailVL, share: float) -> None:
        with torch.no_grad():
            for block, (old, new) in zip(to.language_model.model.layers, gates):
                block.mlp.gate.weight.copy_(torch.lerp(old, new, share))

    return apply


def bounded(
    model: SailVL, change: Change, text: list[Batch], pictures: list[Batch], bound: float
) -> float:
    """Apply the largest of 1, 1/2, 1/4, ... of a change that moves neither text loss nor text entropy by more than `bound`
    (relative) on calibration batches. In place; returns the share, 0 when none of eight passes."""
    before = measure(model, text, pictures)
    for share in [0.5**i for i in range(8)] + [0.0]:
        change(model, share)
        now = measure(model, text, pictures)
        if now.text_loss <= (1 + bound) * before.text_loss and abs(
            now.entropy(0) - before.entropy(0)
        ) <= bound * before.entropy(0):
            break
    return share


def calibrate(
    model: SailVL,
    text: list[Batch],
    pictures: list[Batch],
    design: Callable = by_router,
    bound: float = 0.01,
) -> float:
    """The whole procedure, in place; returns the share of the change that the bound allowed.

    Raises ValueError for a dense model, or when a list has no token of its kind.
    """
    if not model.config.text.num_experts:
        raise ValueError(
            "calibration is for mixture-of-experts models; this one is dense (num_experts 0)"
        )
    for name, batches, wanted in (("text", text, False), ("pictures", pictures, True)):
        if not any(((b.ids == model.image_token_id).any() == wanted) for b in batches):
            raise ValueError(
                f"no {'visual' if wanted else 'text-only'} batch among the {name} batches given to calibrate"
            )
    return bounded(model, design(model, text, pictures), text, pictures, bound)


# ----------------------------------------------------------------------------------------------- the measurement


@dataclass
class Options:
    model: Path | None = None  # a trained MoE; none: small ones from scratch, one for each seed
    seeds: int = 3
    first: int = 0  # seed of the first
    steps: tuple[int, int] = (150, 60)  # from scratch: language alone; then vision and adapter
    after: int = 0  # multimodal steps after the calibration
    held: int = 100  # held-out questions per family
    bound: float = 0.01  # relative, on text loss and text entropy
    out: Path = Path("runs/calibration.html")


DESIGNS: dict[str, Callable | None] = {
    "as it was": None,
    "by_bias": by_bias,
    "by_router": by_router,
}


def batches(
    encoder: Encoder, mixture: dict[str, float], seed: int, test: bool, n: int = 4, each: int = 40
) -> list[Batch]:
    documents = [encoder(world.sample(i, seed, mixture, test)) for i in range(n * each)]
    return [
        collate([documents[i * each : (i + 1) * each]], None, encoder.tokenizer.pad)
        for i in range(n)
    ]


def language_first(o: Options, seed: int) -> tuple[SailVL, Encoder]:
    """A small MoE whose router learned on text, then eyes trained to fit it: where SAIL-VL2's MoE starts."""
    source = world.World()
    model, tokenizer = recipe.new_model("toy-moe", source, seed)
    encoder = Encoder(tokenizer, model.config, max_length=512)
    text, eyes = o.steps
    for stage in (
        Stage(
            "language",
            ("llm",),
            {"text": 1.0},
            steps=text,
            rows=2,
            lr=1e-2,
            schedule="wsd",
            balance=0.02,
        ),
        Stage("eyes", ("vision", "adapter"), pretrain.CAPTION, steps=eyes, rows=2, lr=5e-3),
    ):
        pretrain.run_stage(model, stage, source, encoder)
    return model, encoder


def compare(o: Options, seed: int) -> dict[str, tuple[float, Measured, float]]:
    """Design -> (share applied, held-out measures, exact answers to held-out questions)."""
    if o.model:
        start, tokenizer = load_model(o.model)
        encoder, mixture = (
            Encoder(tokenizer, start.config, max_length=512),
            pretrain.TOY["multitask"].mixture,
        )
    else:
        (start, encoder), mixture = language_first(o, seed), pretrain.CAPTION
    draws = lambda test: [batches(encoder, m, seed, test) for m in ({"text": 1.0}, mixture)]
    probes, held, source, found = draws(False), draws(True), world.World(), {}
    questions = [
        s for family in mixture if family != "text" for s in source.held_out(family, o.held)
    ]
    for name, design in DESIGNS.items():
        model = deepcopy(start)
        share = calibrate(model, *probes, design, o.bound) if design else 0.0
        now = measure(model, *held)
        if o.after:
            stage = Stage(
                name,
                pretrain.ALL,
                mixture,
                steps=o.after,
                rows=2,
                lr=5e-3,
                schedule="wsd",
                seed=seed,
            )
            pretrain.run_stage(model, stage, source, encoder)
            now.right = measure(model, *held).right
        found[name] = share, now, evaluate(model, encoder, questions)[0]["overall"].accuracy
    return found


def picture(path: Path, before: Measured, after: Measured) -> None:
    """Expert use per layer and kind of token, before and after, as two tables of percentages."""

    def table(title: str, m: Measured) -> str:
        rows = {
            f"{kind}, layer {i}": row.tolist()
            for kind, use in zip(("text", "vision"), m.use)
            for i, row in enumerate(use)
        }
        return report.section(
            title,
            "Percent of the routed slots; full colour: twice the even share.",
            report.heat(rows, [str(e) for e in range(m.use.shape[-1])], 2 / m.use.shape[-1]),
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Expert use</title>'
        + report.el("style", report.CSS)
    )
    path.write_text(
        head + table("Before calibration", before) + table("After", after) + "</html>\n",
        encoding="utf-8",
    )


def main(o: Options) -> None:
    rows = {seed: compare(o, seed) for seed in range(o.first, o.first + o.seeds)}
    print(
        f"entropy in nats (fraction of log E), of visual and of text tokens; accuracies after {o.after} further steps"
    )
    lines = [
        "| design | entropy of visual tokens | entropy of text | text loss | exact answers |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in DESIGNS:
        moved = []  # relative changes against the model as it was, by seed
        for seed, found in rows.items():
            (share, m, exact), was = found[name], found["as it was"]
            most, change = math.log(m.use.shape[-1]), lambda now, before: 100 * (now / before - 1)
            moved.append(
                (
                    change(m.entropy(1), was[1].entropy(1)),
                    change(m.entropy(0), was[1].entropy(0)),
                    change(m.text_loss, was[1].text_loss),
                    m.right - was[1].right,
                    exact - was[2],
                )
            )
            print(
                f"{name:10} seed {seed}  share {share:<6.3g} vision {m.entropy(1):.3f} ({m.entropy(1) / most:.0%})  "
                f"text {m.entropy(0):.3f} ({m.entropy(0) / most:.0%})  text loss {m.text_loss:.4f}  "
                f"answer tokens right {m.right:.3f}  exact answers {exact:.3f}"
            )
        vision, text, loss, right, exact = map(statistics.mean, zip(*moved))
        print(
            f"{name:10} mean change: vision entropy {vision:+.1f} %, text entropy {text:+.2f} %, text loss {loss:+.2f} %, "
            f"answer tokens {right:+.3f}, exact answers {exact:+.3f}\n"
        )
        mean = lambda get: statistics.mean(get(*found[name][1:]) for found in rows.values())
        changes = (
            ("", "", "")
            if DESIGNS[name] is None
            else (f" ({vision:+.1f} %)", f" ({text:+.2f} %)", f" ({loss:+.2f} %)")
        )
        lines.append(
            f"| {name} | {mean(lambda m, _: m.entropy(1)):.3f} nats, {mean(lambda m, _: m.entropy(1)) / most:.0%} of log E{changes[0]} | "
            f"{mean(lambda m, _: m.entropy(0)):.3f}{changes[1]} | {mean(lambda m, _: m.text_loss):.3f}{changes[2]} | {mean(lambda _, e: e):.1%} |"
        )
    first = rows[o.first]
    picture(o.out, first["as it was"][1], first["by_router"][1])
    o.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(
        f"expert use of seed {o.first} before and after: {o.out}; the means: {o.out.with_suffix('.md')}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
