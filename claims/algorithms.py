"""Does RL work here, and which part of it does the work? Every algorithm on the toy, over seeds.

What it teaches: a gain is believed when a control does not have it. So beside five algorithms there
is a reward that is a coin toss, one that pays for the wrong thing, and DAPO less each of its parts.

    checkpoint -> measure, train, measure (a row of rows.jsonl) -> table.md, figure.svg

    python -m claims.algorithms --model runs/toy/long-cot --moe-model runs/toy-moe/long-cot   # everything
    python -m claims.algorithms --model runs/toy/long-cot --only learn hack --seeds 1         # some of it

Groups of runs, all from the same checkpoint; all but the ablations with the same number of updates:
    learn     five algorithms, dense and MoE: pass@1 on held-out questions before and after
    control   a reward that is a coin toss: whatever is gained here is not learned
    ablate    DAPO, eight updates in two passes over a rollout batch as in the paper, less each of its
              four parts: with the toy's two updates a ratio hardly leaves 1, and a clip has nothing to
              do. Twice as many updates, each half as large
    replay    GRPO on the MoE with the sampling policy's experts: what GSPO does without
    hack      DAPO paid by a weak extractor, judged by it and by ours

Without --moe-model the dense checkpoint is upcycled: its experts start equal, which makes the MoE rows
too easy. Finished runs stand in rows.jsonl and are not run again, so the command can be stopped,
repeated, and shared out by --kinds; rows of other options are refused. A run's seed changes its
questions and its sampling, not the held-out set.

Legend: pass@1 is the mean over 4 sampled chains a question at temperature 1, pass@4 how often one of
them is right, greedy the accuracy of the likeliest chain; entropy is the mean of -log p over the tokens
of those samples, of held-out questions too: that of the training batch depends on which groups an
algorithm keeps.
"""

import json
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import rl
from data.encode import Encoder
from data.sample import Sample
from data.world import REASONING, World
from evaluate import ask, evaluate, text_of
from generate import load_model
from graders import same_answer
from infra.cli import command
from recipe import Setup, fit
from rewards import answer_reward
from tools import report
from vlm import PRESETS

GROUPS = ("learn", "control", "ablate", "replay", "hack")
LEARN = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
DYNAMIC = ("dapo", "cispo")  # who samples dynamically in its own paper
CHAINS = 4  # sampled for each held-out question
EPISODE = {"updates": 8, "passes": 2}  # of an ablation
WITHOUT = {
    "clip-higher": {"high": 0.2},
    "token mean": {"aggregation": "sequences"},
    "dynamic sampling": {"dynamic": False},
    "soft overlong": {"overlong": 0},
}
CURVES = ("reward", "entropy", "clip_fraction", "spread", "spread_sequence", "rerouted")


@dataclass
class AlgorithmsOptions:
    """Train the toy by RL in every way, over seeds."""

    model: Path = Path("runs/toy/long-cot")  # where every dense run starts
    moe_model: Path | None = None  # where every MoE run starts; none: the dense model, upcycled
    only: tuple[str, ...] = GROUPS
    names: tuple[str, ...] = ()  # of these groups only the runs with these names, e.g. dapo
    kinds: tuple[str, ...] = ("dense", "moe")  # and of those only these
    seeds: int = 5
    effort: float = 1.25  # multiplies the updates of rl.TOY, which `make toy` has few of
    samples: int = 100  # held-out questions per family
    out: Path = Path("runs/bench-rl")


@dataclass(frozen=True)
class Trial:
    """One kind of run, before seeds: `change` is what differs from rl.TOY's stage."""

    group: str
    name: str
    kind: str  # dense or moe
    change: dict

    def is_row(self, row: dict, seed: int) -> bool:
        """Whether a finished row is this trial with this seed."""
        return (row["name"], row["kind"], row["seed"]) == (self.name, self.kind, seed)


# --------------------------------------------------------------------------------- what is run


def own_settings(algorithm: str) -> dict:
    """An algorithm as its paper has it."""
    return {"algorithm": algorithm, "dynamic": algorithm in DYNAMIC}


def planned_trials(options: AlgorithmsOptions) -> list[Trial]:
    """Every trial that the options ask for. Raises ValueError for an unknown group."""
    unknown = set(options.only) - set(GROUPS)
    if unknown:
        raise ValueError(f"--only {sorted(unknown)[0]}: choose from {', '.join(GROUPS)}")

    dapo = own_settings("dapo")
    trials = []
    for kind in ("dense", "moe"):
        for name in LEARN:
            trials.append(Trial("learn", name, kind, own_settings(name)))
    trials.append(Trial("control", "dapo, random reward", "dense", dapo | {"reward": "random"}))
    trials.append(Trial("ablate", "dapo, 8 updates", "dense", dapo | EPISODE))
    for part, change in WITHOUT.items():
        trials.append(Trial("ablate", f"the same less {part}", "dense", dapo | EPISODE | change))
    replayed = own_settings("grpo") | {"replay": True}
    trials.append(Trial("replay", "grpo, routing replayed", "moe", replayed))
    trials.append(Trial("hack", "dapo, weak extractor", "dense", dapo))

    return [
        trial
        for trial in trials
        if trial.group in options.only
        and trial.kind in options.kinds
        and (not options.names or trial.name in options.names)
    ]


def weak_reward(text: str, sample: Sample, finished: bool) -> dict[str, float]:
    """What not to do: paid when the truth stands anywhere in the completion.

    Naming everything is then the best policy.
    """
    truth = sample.facts["answer"]
    words = re.findall(r"[\w.]+", text)
    return {
        "reward": float(any(same_answer(word, truth) for word in words)),
        "answer": answer_reward(text, truth, finished),
    }


def load_start(options: AlgorithmsOptions, kind: str):
    """The checkpoint of a kind, fresh: a model and its tokenizer."""
    if kind == "dense":
        return load_model(options.model)
    if options.moe_model:
        return load_model(options.moe_model)

    model, tokenizer = load_model(options.model)
    experts = replace(PRESETS["toy-moe"].text, vocab_size=model.config.text.vocab_size)
    return model.to_moe(experts), tokenizer


# ------------------------------------------------------------------------------------ one run


def policy_scores(model, encoder: Encoder, held_out: list[Sample]) -> dict:
    """On held-out questions: pass@1 (all, by family), pass@4, greedy, weak reward, length, entropy."""
    right = []  # a list a chain: the reward of every question
    weak = []
    answers = []
    for chain in range(CHAINS):
        drawn = ask(
            model,
            encoder,
            held_out,
            think=True,
            max_new=64,
            temperature=1.0,
            seed=1 + 1000 * chain,
        )
        rewards = []
        for answer, sample in zip(drawn, held_out):
            text = text_of(answer, encoder.tokenizer)
            rewards.append(answer_reward(text, sample.facts["answer"], answer.finished))
            weak.append(weak_reward(text, sample, answer.finished)["reward"])
        right.append(rewards)
        answers += drawn

    # Over the chains of each question.
    means = [statistics.mean(of_question) for of_question in zip(*right)]
    best = [max(of_question) for of_question in zip(*right)]
    families = {}
    for family in REASONING:
        own = [m for m, sample in zip(means, held_out) if sample.facts["family"] == family]
        families[family] = statistics.mean(own)

    greedy, _ = evaluate(model, encoder, held_out, think=True, max_new=64)
    tokens = sum(len(answer.ids) for answer in answers)
    logprobs = sum(sum(answer.logprobs) for answer in answers)
    return {
        "pass@1": statistics.mean(families.values()),
        "families": families,
        f"pass@{CHAINS}": statistics.mean(best),
        "greedy": greedy["overall"].accuracy,
        "weak": statistics.mean(weak),
        "length": tokens / len(answers),
        "entropy": -logprobs / tokens,
    }


def shared_settings(options: AlgorithmsOptions, kind: str) -> dict:
    """What runs of one table must share."""
    moe_start = kind == "moe" and options.moe_model
    return {
        "model": str(options.moe_model if moe_start else options.model),
        "effort": options.effort,
        "samples": options.samples,
    }


def finished_rows(options: AlgorithmsOptions) -> list[dict]:
    """The rows so far. Raises ValueError for a row that other options made."""
    path = options.out / "rows.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        wanted = shared_settings(options, row["kind"])
        if row.get("of") != wanted:
            raise ValueError(
                f"{path}: {row['name']} ({row['kind']}), seed {row['seed']} was run with "
                f"{row.get('of')}, not {wanted}; choose another --out"
            )
    return rows


def run_trial(
    options: AlgorithmsOptions,
    trial: Trial,
    seed: int,
    held_out: list[Sample],
    before: dict | None,
) -> dict:
    """One run: measure, train, measure.

    `before`: the first measurement, where another run from this checkpoint has it.
    """
    model, tokenizer = load_start(options, trial.kind)
    encoder = Encoder(tokenizer, model.config, max_length=512)

    # The toy's stage, with what this trial changes.
    stage = replace(rl.TOY["verifiable"], **trial.change)
    twice = 2 if trial.group == "ablate" else 1
    steps = max(2, round(stage.steps * options.effort * twice))
    stage = replace(stage, steps=steps, seed=stage.seed + 1000 * seed)

    before = before or policy_scores(model, encoder, held_out)
    began = time.time()
    reward = weak_reward if trial.group == "hack" else None
    run = fit(Setup(model, encoder, World(), reward=reward), stage)

    logged = [key for key in CURVES if key in run.log[0]]
    return {
        "group": trial.group,
        "name": trial.name,
        "kind": trial.kind,
        "seed": seed,
        "steps": stage.steps,
        "of": shared_settings(options, trial.kind),
        "seconds": time.time() - began,
        "before": before,
        "after": policy_scores(model, encoder, held_out),
        "curves": {key: [step[key] for step in run.log] for key in logged},
    }


# ----------------------------------------------------------------------------------- the table


def in_points(values: list[float]) -> str:
    """mean +- standard error, in points."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):+5.1f} +- {100 * error:3.1f}"


def grouped_rows(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows of one trial together, in the order of the groups."""

    def place(row: dict) -> tuple:
        return GROUPS.index(row["group"]), row["kind"], row["name"], row["seed"]

    grouped: dict[tuple[str, str], list[dict]] = {}
    for row in sorted(rows, key=place):
        grouped.setdefault((row["name"], row["kind"]), []).append(row)
    return grouped


class TrialRows:
    """The rows of one trial, over seeds, as the cells of a table."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def mean(self, get: Callable[[dict], float]) -> float:
        """Mean over seeds of a number of each row."""
        return statistics.mean(get(row) for row in self.rows)

    def gain(self, get: Callable[[dict], float]) -> str:
        """What a measurement gained, in points."""
        return in_points([get(row["after"]) - get(row["before"]) for row in self.rows])

    def moved(self, key: str, digits: int) -> str:
        """A measurement before and after."""
        before = self.mean(lambda row: row["before"][key])
        after = self.mean(lambda row: row["after"][key])
        return f"{before:.{digits}f} -> {after:.{digits}f}"

    def last(self, key: str) -> float:
        """Mean of a curve over its last eight updates."""
        return self.mean(lambda row: statistics.mean(row["curves"][key][-8:]))

    def cells(self, name: str, kind: str) -> list[str]:
        """One line of the table."""
        by_family = [self.gain(lambda m, f=family: m["families"][f]) for family in REASONING]
        clipped = self.mean(lambda row: statistics.mean(row["curves"]["clip_fraction"]))
        spread = f"{self.last('spread'):.3f} / {self.last('spread_sequence'):.3f}"
        if "rerouted" in self.rows[0]["curves"]:
            spread += f"; {100 * self.last('rerouted'):.1f} % rerouted"
        return [
            name,
            kind,
            str(len(self.rows)),
            f"{100 * self.mean(lambda row: row['before']['pass@1']):.1f}",
            f"{100 * self.mean(lambda row: row['after']['pass@1']):.1f}",
            self.gain(lambda m: m["pass@1"]),
            *by_family,
            self.gain(lambda m: m[f"pass@{CHAINS}"]),
            self.gain(lambda m: m["greedy"]),
            self.gain(lambda m: m["weak"]),
            self.moved("length", 1),
            self.moved("entropy", 3),
            f"{100 * clipped:.2f} %",
            spread,
            f"{self.mean(lambda row: row['seconds']):.0f}",
        ]


def algorithm_table(rows: list[dict]) -> str:
    """Markdown: one line per kind of run, means over its seeds."""
    heads = [
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
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (name, kind), group in grouped_rows(rows).items():
        lines.append("| " + " | ".join(TrialRows(group).cells(name, kind)) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- the figure

# Every curve of the figure.
COLORS = {
    "grpo": "#2b6693",
    "dr_grpo": "#b27318",
    "dapo": "#2c7a4b",
    "gspo": "#b23a31",
    "cispo": "#7a4d96",
    "grpo, routing replayed": "#6a6963",
    "dapo, 8 updates": "#2c7a4b",
    "the same less clip-higher": "#b23a31",
}
FIGURE_STYLE = (
    "text { font: 10px sans-serif } .e { text-anchor: end } line { stroke: #ddd } "
    "polyline { fill: none; stroke-width: 1.5 }"
)


def mean_curve(rows: list[dict], key: str, name: str, kind: str) -> list[float]:
    """A curve of one trial, mean over its seeds, smoothed; empty without rows."""
    seeds = [row["curves"][key] for row in rows if (row["name"], row["kind"]) == (name, kind)]
    if not seeds:
        return []
    means = [statistics.mean(values) for values in zip(*seeds)]
    return list(report.smooth(means))


def algorithm_figure(rows: list[dict]) -> str:
    """SVG: sampled reward over the updates by algorithm; entropy with and without clip-higher."""
    clip_higher = [name for name in COLORS if "8 updates" in name or "the same" in name]
    entropy = "entropy of DAPO with eight updates, nats a token"
    panels = [
        ("reward, dense", "reward", "dense", LEARN),
        ("reward, MoE", "reward", "moe", (*LEARN, "grpo, routing replayed")),
        (entropy, "entropy", "dense", clip_higher),
    ]
    classes = {name: f"c{i}" for i, name in enumerate(COLORS)}

    out = ""
    top = 24.0
    for title, key, kind, names in panels:
        curves = {name: mean_curve(rows, key, name, kind) for name in names}
        curves = {name: curve for name, curve in curves.items() if curve}
        if not curves:
            continue
        lines = [(curve, classes[name]) for name, curve in curves.items()]
        steps = len(lines[0][0]) - 1
        out += report.axes(title, lines, steps, top, 130)[0]
        for i, name in enumerate(curves):
            out += report.word(name, 345, top + 10 + 14 * i, classes[name])
        top += 175

    style = FIGURE_STYLE
    for i, color in enumerate(COLORS.values()):
        style += f" polyline.c{i} {{ stroke: {color} }} text.c{i} {{ fill: {color} }}"
    drawing = report.svg(480, top, "RL on the toy", report.el("style", style), out)
    return drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


# ----------------------------------------------------------------------------------------- all


def append_row(path: Path, row: dict) -> None:
    """A row is one write: another process may add its own."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def compare_algorithms(options: AlgorithmsOptions) -> None:
    """Every trial that is not done yet, seeds outermost; then the table and the figure."""
    options.out.mkdir(parents=True, exist_ok=True)
    world = World()
    held_out = [s for family in REASONING for s in world.held_out(family, options.samples)]

    for seed in range(options.seeds):
        for trial in planned_trials(options):
            rows = finished_rows(options)
            if any(trial.is_row(row, seed) for row in rows):
                continue
            before = next((row["before"] for row in rows if row["kind"] == trial.kind), None)
            row = run_trial(options, trial, seed, held_out, before)
            append_row(options.out / "rows.jsonl", row)
            print(
                f"{trial.name} ({trial.kind}), seed {seed}: pass@1 {row['before']['pass@1']:.3f} "
                f"-> {row['after']['pass@1']:.3f} in {row['seconds']:.0f} s",
                flush=True,
            )

    rows = finished_rows(options)
    table = algorithm_table(rows)
    (options.out / "table.md").write_text(table + "\n")
    (options.out / "figure.svg").write_text(algorithm_figure(rows))
    print(f"{table}\n\n{options.out / 'table.md'}, {options.out / 'figure.svg'}")


if __name__ == "__main__":
    command(compare_algorithms)
