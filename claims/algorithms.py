"""Does RL work here, and which part of it does the work? Every algorithm on the toy, over seeds: one table, one figure.

    python -m claims.algorithms --model runs/toy/long-cot --moe-model runs/toy-moe/long-cot      # everything
    python -m claims.algorithms --model runs/toy/long-cot --only learn hack --seeds 1            # some of it

Groups of runs, all from the same checkpoint; all but the ablations with the same number of updates:
    learn     five algorithms, dense and MoE: pass@1 on held-out questions before and after
    control   a reward that is a coin toss: whatever is gained here is not learned
    ablate    DAPO, eight updates in two passes over a rollout batch as in the paper, less each of its four parts: with the toy's two
              updates a ratio hardly leaves 1, and a clip has nothing to do. Twice as many updates, each half as large
    replay    GRPO on the MoE with the sampling policy's experts: what GSPO does without
    hack      DAPO paid by a weak extractor, judged by it and by ours

Without --moe-model the dense checkpoint is upcycled: its experts start equal, which makes the MoE rows too easy.
Finished runs stand in rows.jsonl and are not run again, so the command can be stopped, repeated, and shared out by --kinds; rows
of other options are refused. A run's seed changes its questions and its sampling, not the held-out set. Legend: pass@1 is the mean over 4 sampled chains a question at temperature
1, pass@4 how often one of them is right, greedy the accuracy of the likeliest chain; entropy is the mean of -log p over the
tokens of those samples, of held-out questions too: that of the training batch depends on which groups an algorithm keeps.
"""

import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import rl
from data.encode import Encoder
from data.sample import Sample
from data.world import REASONING, World
from evaluate import ask, evaluate, text_of
from generate import load_model
from graders import same_answer
from rewards import answer_reward
from tools import report
from vlm import PRESETS

LEARN = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
CHAINS = 4  # sampled for each held-out question
EPISODE = {"updates": 8, "passes": 2}  # of an ablation
WITHOUT = {
    "clip-higher": {"high": 0.2},
    "token mean": {"aggregation": "sequences"},
    "dynamic sampling": {"dynamic": False},
    "soft overlong": {"overlong": 0},
}


@dataclass
class Options:
    """Train the toy by RL in every way, over seeds."""

    model: Path = Path("runs/toy/long-cot")  # where every dense run starts
    moe_model: Path | None = None  # where every MoE run starts; none: the dense model, upcycled
    only: tuple[str, ...] = ("learn", "control", "ablate", "replay", "hack")
    names: tuple[str, ...] = ()  # of these groups only the runs with these names, e.g. dapo
    kinds: tuple[str, ...] = ("dense", "moe")  # and of those only these
    seeds: int = 5
    effort: float = 1.25  # multiplies the updates of rl.TOY, which `make toy` has few of
    samples: int = 100  # held-out questions per family
    out: Path = Path("runs/bench-rl")


def weak(text: str, sample: Sample, finished: bool) -> dict[str, float]:
    """What not to do: paid when the truth stands anywhere in the completion. Naming everything is then the best policy."""
    said, truth = re.findall(r"[\w.]+", text), sample.facts["answer"]
    return {
        "reward": float(any(same_answer(word, truth) for word in said)),
        "answer": answer_reward(text, truth, finished),
    }


def plan(o: Options) -> list[tuple[str, str, str, dict]]:
    """(group, name, dense or moe, what differs from rl.TOY) of every run, before seeds."""
    own = lambda name: {
        "algorithm": name,
        "dynamic": name in ("dapo", "cispo"),
    }  # who uses dynamic sampling in its own paper
    runs = [("learn", name, kind, own(name)) for kind in ("dense", "moe") for name in LEARN]
    runs += [("control", "dapo, random reward", "dense", own("dapo") | {"reward": "random"})]
    runs += [("ablate", "dapo, 8 updates", "dense", own("dapo") | EPISODE)]
    runs += [
        ("ablate", f"the same less {part}", "dense", own("dapo") | EPISODE | change)
        for part, change in WITHOUT.items()
    ]
    runs += [("replay", "grpo, routing replayed", "moe", own("grpo") | {"replay": True})]
    runs += [("hack", "dapo, weak extractor", "dense", own("dapo"))]
    unknown = set(o.only) - {group for group, *_ in runs}
    if unknown:
        raise ValueError(
            f"--only {sorted(unknown)[0]}: choose from {', '.join(dict.fromkeys(g for g, *_ in runs))}"
        )
    return [
        run
        for run in runs
        if run[0] in o.only and run[2] in o.kinds and (not o.names or run[1] in o.names)
    ]


def start(o: Options, kind: str):
    """The checkpoint of a kind, fresh."""
    if kind == "moe" and o.moe_model is None:
        model, tokenizer = load_model(o.model)
        return model.to_moe(
            replace(PRESETS["toy-moe"].text, vocab_size=model.config.text.vocab_size)
        ), tokenizer
    return load_model(o.moe_model if kind == "moe" else o.model)


def measure(model, encoder: Encoder, held: list[Sample]) -> dict:
    """pass@1 (all and by family), pass@4, greedy accuracy, the weak reward, mean length and entropy, on held-out questions."""
    right, wanted, answers = [], [], []
    for seed in range(CHAINS):
        drawn = ask(
            model, encoder, held, think=True, max_new=64, temperature=1.0, seed=1 + 1000 * seed
        )
        texts = [text_of(a, encoder.tokenizer) for a in drawn]
        right.append(
            [answer_reward(t, s.facts["answer"], a.finished) for t, s, a in zip(texts, held, drawn)]
        )
        wanted += [weak(t, s, a.finished)["reward"] for t, s, a in zip(texts, held, drawn)]
        answers += drawn
    mean = [statistics.mean(r) for r in zip(*right)]
    by = {
        f: statistics.mean(r for r, s in zip(mean, held) if s.facts["family"] == f)
        for f in REASONING
    }
    return {
        "pass@1": statistics.mean(by.values()),
        "families": by,
        f"pass@{CHAINS}": statistics.mean(max(r) for r in zip(*right)),
        "greedy": evaluate(model, encoder, held, think=True, max_new=64)[0]["overall"].accuracy,
        "weak": statistics.mean(wanted),
        "length": statistics.mean(len(a.ids) for a in answers),
        "entropy": -sum(sum(a.logprobs) for a in answers) / sum(len(a.ids) for a in answers),
    }


def settings(o: Options, kind: str) -> dict:
    """What runs of one table must share."""
    return {
        "model": str(o.moe_model if kind == "moe" and o.moe_model else o.model),
        "effort": o.effort,
        "samples": o.samples,
    }


def done(o: Options) -> list[dict]:
    """The rows so far. Raises ValueError for a row that other options made."""
    path = o.out / "rows.jsonl"
    rows = [json.loads(line) for line in open(path)] if path.is_file() else []
    for r in rows:
        if r.get("of") != (wanted := settings(o, r["kind"])):
            raise ValueError(
                f"{path}: {r['name']} ({r['kind']}), seed {r['seed']} was run with {r.get('of')}, not {wanted}; choose another --out"
            )
    return rows


def one(
    o: Options,
    group: str,
    name: str,
    kind: str,
    change: dict,
    seed: int,
    held: list[Sample],
    before: dict | None,
) -> dict:
    """One run: measure, train, measure. `before`: the first measurement, where another run from this checkpoint has it."""
    model, tokenizer = start(o, kind)
    encoder = Encoder(tokenizer, model.config, max_length=512)
    stage = replace(rl.TOY["verifiable"], **change)
    steps = round(stage.steps * o.effort * (2 if group == "ablate" else 1))
    stage = replace(stage, steps=max(2, steps), seed=stage.seed + 1000 * seed)
    before = before or measure(model, encoder, held)
    began = time.time()
    run = rl.run(model, stage, World(), encoder, reward=weak if "weak" in name else None)
    curves = {
        key: [row[key] for row in run.log]
        for key in ("reward", "entropy", "clipped", "spread", "spread_sequence", "rerouted")
        if key in run.log[0]
    }
    return {
        "group": group,
        "name": name,
        "kind": kind,
        "seed": seed,
        "steps": stage.steps,
        "of": settings(o, kind),
        "seconds": time.time() - began,
        "before": before,
        "after": measure(model, encoder, held),
        "curves": curves,
    }


# ------------------------------------------------------------------------------------------------------------------ report


def spread(values: list[float]) -> str:
    """mean +- standard error, in points."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):+5.1f} +- {100 * error:3.1f}"


def table(rows: list[dict]) -> str:
    """Markdown: one line per kind of run, means over its seeds."""
    heads = (
        "run",
        "model",
        "seeds",
        "pass@1 before",
        "after",
        "gain (points)",
        *REASONING,
        f"pass@{CHAINS} gain",
        "greedy gain",
        "weak gain",
        "length",
        "entropy",
        "clipped",
        "spread token / sequence",
        "seconds",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    grouped: dict[tuple, list[dict]] = {}
    order = ("learn", "control", "ablate", "replay", "hack")
    for r in sorted(rows, key=lambda r: (order.index(r["group"]), r["kind"], r["name"], r["seed"])):
        grouped.setdefault((r["name"], r["kind"]), []).append(r)
    mean = lambda group, get: statistics.mean(get(r) for r in group)
    gain = lambda group, get: spread([get(r["after"]) - get(r["before"]) for r in group])
    for (name, kind), g in grouped.items():
        last = lambda key: mean(g, lambda r: statistics.mean(r["curves"][key][-8:]))
        moved = f"; {100 * last('rerouted'):.1f} % rerouted" if "rerouted" in g[0]["curves"] else ""
        cells = (
            name,
            kind,
            str(len(g)),
            f"{100 * mean(g, lambda r: r['before']['pass@1']):.1f}",
            f"{100 * mean(g, lambda r: r['after']['pass@1']):.1f}",
            gain(g, lambda m: m["pass@1"]),
            *(gain(g, lambda m: m["families"][f]) for f in REASONING),
            gain(g, lambda m: m[f"pass@{CHAINS}"]),
            gain(g, lambda m: m["greedy"]),
            gain(g, lambda m: m["weak"]),
            f"{mean(g, lambda r: r['before']['length']):.1f} -> {mean(g, lambda r: r['after']['length']):.1f}",
            f"{mean(g, lambda r: r['before']['entropy']):.3f} -> {mean(g, lambda r: r['after']['entropy']):.3f}",
            f"{100 * mean(g, lambda r: statistics.mean(r['curves']['clipped'])):.2f} %",
            f"{last('spread'):.3f} / {last('spread_sequence'):.3f}{moved}",
            f"{mean(g, lambda r: r['seconds']):.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLORS = {
    "grpo": "#2b6693",
    "dr_grpo": "#b27318",
    "dapo": "#2c7a4b",
    "gspo": "#b23a31",
    "cispo": "#7a4d96",
    "grpo, routing replayed": "#6a6963",
    "dapo, 8 updates": "#2c7a4b",
    "the same less clip-higher": "#b23a31",
}  # every curve of the figure


def figure(rows: list[dict]) -> str:
    """SVG, means over seeds, smoothed: sampled reward over the updates by algorithm (dense, MoE), and the batch's entropy with
    and without clip-higher."""

    def curve(key: str, name: str, kind: str) -> list[float]:
        seeds = [r["curves"][key] for r in rows if (r["name"], r["kind"]) == (name, kind)]
        return (
            list(report.smooth([statistics.mean(values) for values in zip(*seeds)]))
            if seeds
            else []
        )

    clip = [name for name in COLORS if "8 updates" in name or "the same" in name]
    panels = [
        ("reward, dense", "reward", "dense", LEARN),
        ("reward, MoE", "reward", "moe", (*LEARN, "grpo, routing replayed")),
        ("entropy of DAPO with eight updates, nats a token", "entropy", "dense", clip),
    ]
    out, y = "", 24.0
    for title, key, kind, names in panels:
        lines = {name: c for name in names if (c := curve(key, name, kind))}
        if lines:
            classes = {name: f"c{list(COLORS).index(name)}" for name in lines}
            body, _ = report.axes(
                title,
                [(c, classes[name]) for name, c in lines.items()],
                len(next(iter(lines.values()))) - 1,
                y,
                130,
            )
            out += body + "".join(
                report.word(name, 345, y + 10 + 14 * i, classes[name])
                for i, name in enumerate(lines)
            )
            y += 175
    style = (
        "text { font: 10px sans-serif } .e { text-anchor: end } line { stroke: #ddd } polyline { fill: none; stroke-width: 1.5 }"
        + "".join(
            f" polyline.c{i} {{ stroke: {c} }} text.c{i} {{ fill: {c} }}"
            for i, c in enumerate(COLORS.values())
        )
    )
    picture = report.svg(480, y, "RL on the toy", report.el("style", style), out)
    return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def main(o: Options) -> int:
    o.out.mkdir(parents=True, exist_ok=True)
    world = World()
    held = [s for f in REASONING for s in world.held_out(f, o.samples)]
    for seed in range(o.seeds):
        for group, name, kind, change in plan(o):
            rows = done(o)
            if any((r["name"], r["kind"], r["seed"]) == (name, kind, seed) for r in rows):
                continue
            before = next((r["before"] for r in rows if r["kind"] == kind), None)
            r = one(o, group, name, kind, change, seed, held, before)
            with open(
                o.out / "rows.jsonl", "ab", buffering=0
            ) as f:  # a row is one write: another process may add its own
                f.write(json.dumps(r).encode() + b"\n")
            print(
                f"{name} ({kind}), seed {seed}: pass@1 {r['before']['pass@1']:.3f} -> {r['after']['pass@1']:.3f} in {r['seconds']:.0f} s",
                flush=True,
            )
    rows = done(o)
    (o.out / "table.md").write_text(table(rows) + "\n")
    (o.out / "figure.svg").write_text(figure(rows))
    print(table(rows) + f"\n\n{o.out / 'table.md'}, {o.out / 'figure.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
