"""Is the curriculum worth its order, a soup its pot, an expert its time, think-fusion its data? Each against its plain alternative.

    python -m claims.posttraining --only curriculum --runs runs/toy
    python -m claims.posttraining --only soup --runs runs/toy --stranger runs/toy-1/soup       # a model of another seed's ladder
    python -m claims.posttraining --only modes --runs runs/toy --effort 2

    curriculum   the four SFT phases in order, each with its own schedule or all under one, against their mixtures stirred together,
                 at equal tokens (SAIL-VL Fig. 5)
    soup         runs from one checkpoint that differ in data order, uniform and greedy, and a stranger (SAIL-VL2 Table 5)
    experts      the soup, dense and as a mixture of experts, trained on for the same time
    modes        direct answers and thinking, by default and when asked, from SFT to mixed RL, with transcripts

Every part starts from checkpoints that `make toy` leaves in --runs. Accuracy is on held-out questions; the greedy soup chooses
on other held-out ones. Prints one markdown table a part and keeps it as PART.md; all
numbers go to results.json.
"""

import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

import tyro

import rl
import sft
from curation.chains import rejection_sample
from data.encode import Encoder
from data.sample import Sample
from data.world import REASONING, World
from evaluate import ask, evaluate, question_of, text_of
from generate import load_model
from graders import same_answer, split_think
from infra.weights import write_json
from rewards import answer_reward
from soup import average, distance, greedy
from toy import GRADED
from train import Stage
from vlm import PRESETS


@dataclass
class Options:
    """Compare the parts of supervised post-training with their plain alternatives."""

    runs: Path = Path("runs/toy")  # a finished ladder
    stranger: Path | None = (
        None  # a model of the same sizes with another history, for the heterologous soup
    )
    only: tuple[str, ...] = ("curriculum", "soup", "experts", "modes")
    seeds: int = 3
    effort: float = 1.0  # multiplies the steps of every stage
    chains: float = 2.0  # and those of long CoT in `modes` once more: the toy's own leave chains worse than direct answers
    samples: int = 100  # held-out questions per family
    out: Path = Path("runs/bench-sft")


@dataclass(frozen=True)
class Part(Stage):
    """A stage that is some of the steps of a longer one: its rate goes on where the part before it ended."""

    first: int = 0
    whole: int = 0

    def rate(self, step: int) -> float:
        return Stage.rate(replace(self, steps=self.whole), self.first + step)


class Bench:
    """The world, the held-out questions, and how a checkpoint is loaded, trained on and graded."""

    def __init__(self, o: Options):
        self.o, self.world = o, World()
        self.held = {f: self.world.held_out(f, o.samples) for f in GRADED}
        self.results: dict[str, list[dict]] = defaultdict(list)

    def load_model(self, name: str):
        model, tokenizer = load_model(self.o.runs / name)
        return model, Encoder(tokenizer, model.config, max_length=512)

    def stage(self, recipe: dict, name: str, seed: int):
        s = recipe[name]
        return replace(s, steps=max(2, round(s.steps * self.o.effort)), seed=s.seed + 1000 * seed)

    def overall(self, model, encoder: Encoder) -> dict[str, float]:
        scores, _ = evaluate(model, encoder, [s for f in GRADED for s in self.held[f]])
        return {f: s.accuracy for f, s in scores.items()}

    # --------------------------------------------------------------------------------------------------- curriculum

    def curriculum(self, seed: int) -> None:
        """The phases in order, each with its own schedule as in the recipe; in order under one schedule; and one stage of as many
        steps, with that schedule, whose mixture is the sum of theirs, weighed by their steps. The last two differ in
        order only (and in momentum, which begins anew with each phase)."""
        phases = [self.stage(sft.TOY, name, seed) for name in sft.PHASES]
        ends = list(accumulate(s.steps for s in phases))
        parts = [
            Part(**vars(s) | {"first": end - s.steps, "whole": ends[-1]})
            for s, end in zip(phases, ends)
        ]
        stirred: dict[str, float] = defaultdict(float)
        for s in phases:
            total = sum(w for f, w in s.mixture.items() if f != "text")
            for family, w in s.mixture.items():
                stirred[family] += s.steps / ends[-1] * (w if family == "text" else w / total)
        together = replace(phases[0], name="all in one", mixture=dict(stirred), steps=ends[-1])
        for name, stages in (
            ("curriculum", phases),
            ("curriculum, one schedule", parts),
            ("all in one", [together]),
        ):
            model, encoder = self.load("multitask")
            for stage in stages:
                sft.run_stage(model, stage, self.world, encoder)
            tokens = sum(stage.steps * stage.rows * stage.length for stage in stages)
            self.results["curriculum"].append(
                {"run": name, "seed": seed, "tokens": tokens} | self.overall(model, encoder)
            )

    # --------------------------------------------------------------------------------------------------------- soup

    def soup(self, seed: int) -> None:
        """Three runs from sft4, their uniform mean, the greedy one, and one of them with a stranger."""
        model, encoder = self.load("sft4")
        begin = {k: v.clone() for k, v in model.state_dict().items()}
        copy = lambda: {k: v.clone() for k, v in model.state_dict().items()}
        states, row = (
            [],
            lambda name, **more: self.results["soup"].append(
                {"run": name, "seed": seed} | more | self.overall(model, encoder)
            ),
        )
        for i in range(3):
            model.load_state_dict(begin)
            stage = self.stage(sft.TOY, "soup-a", seed)
            sft.run_stage(model, replace(stage, seed=stage.seed + 10 * i), self.world, encoder)
            states.append(copy())
            row("ingredient")
        choosing = [
            s for f in GRADED for s in self.world.held_out(f, max(1, self.o.samples // 2), seed=2)
        ]

        def score(state) -> float:
            model.load_state_dict(state)
            return evaluate(model, encoder, choosing)[0]["overall"].accuracy

        best, chosen = greedy(states, score)
        pots = {"uniform": average(states), "greedy": best}
        more = {
            "uniform": {"distance": distance(states[0], states[1])},
            "greedy": {"chosen": len(chosen)},
            "stranger": {},
        }
        if self.o.stranger:
            other = load_model(self.o.stranger)[0]
            model.load_state_dict(other.state_dict())
            row("stranger alone")
            pots["stranger"] = average([states[0], other.state_dict()])
            more["stranger"] = {"distance": distance(states[0], other.state_dict())}
        for name, state in pots.items():
            model.load_state_dict(state)
            row(f"soup, {name}" if name != "stranger" else "soup with the stranger", **more[name])

    # ------------------------------------------------------------------------------------------------------ experts

    def experts(self, seed: int) -> None:
        """The soup, dense and upcycled, trains on for the same processor time: that of three of the toy's MoE branches."""

        def upcycled(name: str):
            model, encoder = self.load("soup")
            moe = replace(PRESETS["toy-moe"].text, vocab_size=model.config.text.vocab_size)
            return (model.to_moe(moe) if name == "MoE" else model), encoder

        def seconds(name: str, steps: int):
            (model, encoder), began = upcycled(name), time.process_time()
            sft.run_stage(model, replace(stage, name=name, steps=steps), self.world, encoder)
            return time.process_time() - began, model, encoder

        stage = self.stage(sft.TOY, "moe-branch", seed)
        a_step = {name: seconds(name, 10)[0] / 10 for name in ("dense", "MoE")}
        self.results["experts"].append(
            {"run": "before", "seed": seed} | self.overall(*self.load("soup"))
        )
        for name in a_step:
            steps = round(3 * stage.steps * a_step["MoE"] / a_step[name])
            spent, model, encoder = seconds(name, steps)
            self.results["experts"].append(
                {"run": name, "seed": seed}
                | model.parameter_counts()
                | {"steps": steps, "seconds": spent}
                | self.overall(model, encoder)
            )

    # -------------------------------------------------------------------------------------------------------- modes

    def both(self, model, encoder: Encoder, name: str, seed: int) -> list[str]:
        """Grade a model in both modes on the reasoning questions; returns a few transcripts."""
        held, transcripts = [s for f in REASONING for s in self.held[f]], []
        out: dict[str, float] = {}
        for mode, think in (("direct", False), ("thinking", True)):
            answers = ask(model, encoder, held, think=think, max_new=64)
            texts = [text_of(a, encoder.tokenizer) for a in answers]
            right = [
                answer_reward(t, s.facts["answer"], a.finished)
                if think
                else float(a.finished and same_answer(t, s.facts["answer"]))
                for t, s, a in zip(texts, held, answers)
            ]
            out |= {
                f"{mode} accuracy": statistics.mean(right),
                f"{mode} length": statistics.mean(len(a.ids) for a in answers),
                f"{mode} that think": statistics.mean(split_think(t)[0] is not None for t in texts),
            }
            transcripts += [
                f"[{name}, {mode}] {question_of(s)}  ->  {t}   (truth {s.facts['answer']})"
                for s, t in list(zip(held, texts))[:: max(1, self.o.samples)]
            ]
        self.results["modes"].append({"run": name, "seed": seed} | out)
        return transcripts

    def modes(self, seed: int) -> None:
        """From the soup: long chains, RL, fusion with the RL policy's own chains, mixed RL; both modes after each."""
        model, encoder = self.load("soup")
        lines = self.both(model, encoder, "SFT", seed)
        stage = self.stage(sft.TOY, "long-cot", seed)
        sft.long_cot(
            model, replace(stage, steps=round(stage.steps * self.o.chains)), self.world, encoder
        )
        lines += self.both(model, encoder, "long CoT", seed)
        rl.run(model, self.stage(rl.TOY, "verifiable", seed), self.world, encoder)
        lines += self.both(model, encoder, "verifiable RL", seed)
        stage = self.stage(sft.TOY, "fusion", seed)
        stream: list[Sample] = [
            s
            for s in islice(
                self.world.stream(dict.fromkeys(REASONING, 1.0), stage.seed + 5, 1), 400
            )
            if s.facts["chain"]
        ]
        sft.fusion(
            model, stage, self.world, rejection_sample(model, encoder, stream, seed=seed), encoder
        )
        lines += self.both(model, encoder, "think-fusion", seed)
        rl.run(model, self.stage(rl.TOY, "mixed", seed), self.world, encoder)
        lines += self.both(model, encoder, "mixed RL", seed)
        (self.o.out / f"transcripts-{seed}.txt").write_text("\n".join(lines) + "\n")

    def table(self, part: str) -> str:
        """Markdown: a line per kind of run, mean +- standard error over its rows."""
        grouped: dict[str, list[dict]] = defaultdict(list)
        for r in self.results[part]:
            grouped[r["run"]].append(r)
        keys = list(
            dict.fromkeys(k for r in self.results[part] for k in r if k not in ("run", "seed"))
        )
        heads = ["run", "rows", *keys]
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name, rows in grouped.items():
            cells = [name, str(len(rows))]
            for k in keys:
                values = [r[k] for r in rows if k in r]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.4g} +- {error:.2g}" if values else "")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def main(o: Options) -> int:
    bench = Bench(o)
    parts = {
        "curriculum": bench.curriculum,
        "soup": bench.soup,
        "experts": bench.experts,
        "modes": bench.modes,
    }
    if unknown := set(o.only) - set(parts):
        raise ValueError(f"--only {sorted(unknown)[0]}: choose from {', '.join(parts)}")
    o.out.mkdir(parents=True, exist_ok=True)
    for part in o.only:
        for seed in range(o.seeds):
            parts[part](seed)
            write_json(o.out / "results.json", bench.results)
        (o.out / f"{part}.md").write_text(bench.table(part) + "\n")
        print(f"\n{bench.table(part)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
