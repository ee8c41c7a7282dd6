"""Is the curriculum worth its order, a soup its pot, an expert its time, think-fusion its data?

What it teaches: every part of supervised post-training has a plain alternative that costs the same;
it earns its place by beating that one, at equal tokens or equal time.

    a checkpoint of `make toy` -> the part, and its alternative -> held-out accuracy -> PART.md

    python -m claims.posttraining --only curriculum --runs runs/toy
    python -m claims.posttraining --only soup --runs runs/toy --stranger runs/toy-1/soup
    python -m claims.posttraining --only modes --runs runs/toy --effort 2

    curriculum   the four SFT phases in order, each with its own schedule or all under one, against
                 their mixtures stirred together, at equal tokens (SAIL-VL Fig. 5)
    soup         runs from one checkpoint that differ in data order, uniform and greedy, and one with
                 a stranger, a model of another seed's ladder (SAIL-VL2 Table 5)
    experts      the soup, dense and as a mixture of experts, trained on for the same time
    modes        direct answers and thinking, by default and when asked, from SFT to mixed RL

Accuracy is on held-out questions; the greedy soup chooses on other held-out ones. Prints one markdown
table a part and keeps it as PART.md; all numbers go to results.json, transcripts of `modes` to
transcripts-SEED.txt.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

import rl
import sft
from curation.chains import rejection_sample
from data.encode import Encoder
from data.sample import Sample
from data.world import GRADED, PHASES, REASONING, World
from evaluate import ask, evaluate, question_of, text_of
from generate import load_model
from graders import same_answer, split_think
from infra.cli import command
from infra.weights import write_json
from recipe import Setup, fit
from rewards import answer_reward
from soup import average, distance, greedy
from stage import BaseStage, Stage
from vlm import PRESETS, SailVL

PARTS = ("curriculum", "soup", "experts", "modes")


@dataclass
class PosttrainingOptions:
    """Compare the parts of supervised post-training with their plain alternatives."""

    runs: Path = Path("runs/toy")  # a finished ladder
    stranger: Path | None = None  # a model of the same sizes with another history, for the soup
    only: tuple[str, ...] = PARTS
    seeds: int = 3
    effort: float = 1.0  # multiplies the steps of every stage
    # and those of long CoT in `modes` once more: the toy's own leave chains weak
    chains: float = 2.0
    samples: int = 100  # held-out questions per family
    out: Path = Path("runs/bench-sft")


@dataclass(frozen=True)
class PhaseOfMany(Stage):
    """A stage that is some of the steps of a longer one: its rate goes on where the last one ended."""

    first: int = 0
    whole: int = 0

    def rate(self, step: int) -> float:
        whole_stage = replace(self, steps=self.whole)
        return Stage.rate(whole_stage, self.first + step)


@dataclass
class Subject:
    """A model under comparison, and what reads for it."""

    model: SailVL
    encoder: Encoder


def copied(model: SailVL) -> dict:
    """The model's tensors as they are now."""
    return {name: value.clone() for name, value in model.state_dict().items()}


class Comparisons:
    """The world, the held-out questions, and how a checkpoint is loaded, trained on and graded."""

    def __init__(self, options: PosttrainingOptions):
        self.options = options
        self.world = World()
        self.held_out = {f: self.world.held_out(f, options.samples) for f in GRADED}
        self.results: dict[str, list[dict]] = defaultdict(list)

    def load(self, name: str) -> Subject:
        """A rung of the ladder, fresh."""
        model, tokenizer = load_model(self.options.runs / name)
        return Subject(model, Encoder(tokenizer, model.config, max_length=512))

    def stage(self, recipe: dict, name: str, seed: int):
        """A stage of the toy's recipe, as long as the options say, with a seed of its own."""
        stage = recipe[name]
        steps = max(2, round(stage.steps * self.options.effort))
        return replace(stage, steps=steps, seed=stage.seed + 1000 * seed)

    def train(self, subject: Subject, stage: BaseStage, **more) -> None:
        """A stage on the drawn world, in place."""
        fit(Setup(subject.model, subject.encoder, self.world, **more), stage)

    def scores(self, subject: Subject) -> dict[str, float]:
        """Accuracy by family and overall, direct answers."""
        questions = [s for family in GRADED for s in self.held_out[family]]
        scores, _ = evaluate(subject.model, subject.encoder, questions)
        return {family: score.accuracy for family, score in scores.items()}

    def note(self, part: str, run: str, seed: int, numbers: dict) -> None:
        """Keep a row of a part's table."""
        self.results[part].append({"run": run, "seed": seed} | numbers)

    # ------------------------------------------------------------------------------ curriculum

    def curriculum(self, seed: int) -> None:
        """The phases in order, with a schedule each; in order under one; and all mixtures at once.

        The last has as many steps and the second's schedule, and its mixture is the sum of theirs,
        weighed by their steps: those two differ in order only (and in momentum, which begins anew
        with each phase).
        """
        phases = [self.stage(sft.TOY, name, seed) for name in PHASES]
        ends = list(accumulate(phase.steps for phase in phases))
        whole = ends[-1]
        under_one_schedule = []
        for phase, end in zip(phases, ends):
            place = {"first": end - phase.steps, "whole": whole}
            under_one_schedule.append(PhaseOfMany(**vars(phase) | place))

        stirred = replace(
            phases[0], name="all in one", mixture=self.stirred_mixture(phases), steps=whole
        )
        runs = {
            "curriculum": phases,
            "curriculum, one schedule": under_one_schedule,
            "all in one": [stirred],
        }
        for name, stages in runs.items():
            subject = self.load("multitask")
            for stage in stages:
                self.train(subject, stage)
            tokens = sum(stage.steps * stage.rows * stage.length for stage in stages)
            self.note("curriculum", name, seed, {"tokens": tokens} | self.scores(subject))

    @staticmethod
    def stirred_mixture(phases: list) -> dict[str, float]:
        """The phases' mixtures as one, each weighed by its steps; the share of text is a share."""
        steps = sum(phase.steps for phase in phases)
        stirred: dict[str, float] = defaultdict(float)
        for phase in phases:
            total = sum(w for family, w in phase.mixture.items() if family != "text")
            for family, weight in phase.mixture.items():
                share = weight if family == "text" else weight / total
                stirred[family] += phase.steps / steps * share
        return dict(stirred)

    # ------------------------------------------------------------------------------------ soup

    def soup(self, seed: int) -> None:
        """Three runs from sft4, their uniform mean, the greedy one, and one of them with a stranger."""
        subject = self.load("sft4")
        model = subject.model
        begin = copied(model)

        # The ingredients differ in the order of their data.
        states = []
        for i in range(3):
            model.load_state_dict(begin)
            stage = self.stage(sft.TOY, "soup-a", seed)
            self.train(subject, replace(stage, seed=stage.seed + 10 * i))
            states.append(copied(model))
            self.note("soup", "ingredient", seed, self.scores(subject))

        # The greedy soup chooses on held-out questions of its own.
        half = max(1, self.options.samples // 2)
        choosing = [s for family in GRADED for s in self.world.held_out(family, half, seed=2)]

        def accuracy(state: dict) -> float:
            model.load_state_dict(state)
            return evaluate(model, subject.encoder, choosing)[0]["overall"].accuracy

        chosen_state, chosen = greedy(states, accuracy)
        pots = [
            ("soup, uniform", average(states), {"distance": distance(states[0], states[1])}),
            ("soup, greedy", chosen_state, {"chosen": len(chosen)}),
        ]

        # A stranger has the same sizes and another history.
        if self.options.stranger:
            stranger = load_model(self.options.stranger)[0].state_dict()
            model.load_state_dict(stranger)
            self.note("soup", "stranger alone", seed, self.scores(subject))
            apart = {"distance": distance(states[0], stranger)}
            pots.append(("soup with the stranger", average([states[0], stranger]), apart))

        for name, state, numbers in pots:
            model.load_state_dict(state)
            self.note("soup", name, seed, numbers | self.scores(subject))

    # --------------------------------------------------------------------------------- experts

    def experts(self, seed: int) -> None:
        """The soup, dense and upcycled, trains on for the processor time of three MoE branches."""
        stage = self.stage(sft.TOY, "moe-branch", seed)

        def trained(kind: str, steps: int) -> tuple[float, Subject]:
            subject = self.load("soup")
            if kind == "MoE":
                vocabulary = subject.model.config.text.vocab_size
                experts = replace(PRESETS["toy-moe"].text, vocab_size=vocabulary)
                subject.model = subject.model.to_moe(experts)
            began = time.process_time()
            self.train(subject, replace(stage, name=kind, steps=steps))
            return time.process_time() - began, subject

        # Seconds a step, from ten of each.
        seconds = {kind: trained(kind, 10)[0] / 10 for kind in ("dense", "MoE")}
        self.note("experts", "before", seed, self.scores(self.load("soup")))

        for kind, a_step in seconds.items():
            steps = round(3 * stage.steps * seconds["MoE"] / a_step)
            spent, subject = trained(kind, steps)
            numbers = subject.model.parameter_counts() | {"steps": steps, "seconds": spent}
            self.note("experts", kind, seed, numbers | self.scores(subject))

    # ----------------------------------------------------------------------------------- modes

    def modes(self, seed: int) -> None:
        """From the soup: long chains, RL, fusion with the policy's own chains, mixed RL.

        Both modes are graded after each.
        """
        subject = self.load("soup")
        lines = self.both_modes(subject, "SFT", seed)

        stage = self.stage(sft.TOY, "long-cot", seed)
        longer = replace(stage, steps=round(stage.steps * self.options.chains))
        self.train(subject, longer)
        lines += self.both_modes(subject, "long CoT", seed)

        self.train(subject, self.stage(rl.TOY, "verifiable", seed))
        lines += self.both_modes(subject, "verifiable RL", seed)

        # Fusion learns from the policy's own right chains.
        stage = self.stage(sft.TOY, "fusion", seed)
        questions = self.reasoning_questions(400, stage.seed + 5)
        harvest = rejection_sample(subject.model, subject.encoder, questions, seed=seed)
        self.train(subject, stage, harvest=harvest)
        lines += self.both_modes(subject, "think-fusion", seed)

        self.train(subject, self.stage(rl.TOY, "mixed", seed))
        lines += self.both_modes(subject, "mixed RL", seed)
        (self.options.out / f"transcripts-{seed}.txt").write_text("\n".join(lines) + "\n")

    def reasoning_questions(self, drawn: int, seed: int) -> list[Sample]:
        """Those of so many drawn reasoning samples that have a chain."""
        stream = self.world.stream(dict.fromkeys(REASONING, 1.0), seed, 1)
        return [sample for sample in islice(stream, drawn) if sample.facts["chain"]]

    def both_modes(self, subject: Subject, name: str, seed: int) -> list[str]:
        """Grade a model in both modes on the reasoning questions; returns a few transcripts."""
        questions = [s for family in REASONING for s in self.held_out[family]]
        numbers: dict[str, float] = {}
        transcripts = []
        for mode, think in (("direct", False), ("thinking", True)):
            answers = ask(subject.model, subject.encoder, questions, think=think, max_new=64)
            texts = [text_of(answer, subject.encoder.tokenizer) for answer in answers]

            # Asked to think, only a box counts.
            right = []
            for text, sample, answer in zip(texts, questions, answers):
                truth = sample.facts["answer"]
                if think:
                    right.append(answer_reward(text, truth, answer.finished))
                else:
                    right.append(float(answer.finished and same_answer(text, truth)))

            thinking = [split_think(text)[0] is not None for text in texts]
            numbers[f"{mode} accuracy"] = statistics.mean(right)
            numbers[f"{mode} length"] = statistics.mean(len(answer.ids) for answer in answers)
            numbers[f"{mode} that think"] = statistics.mean(thinking)

            # One question of each family.
            for i in range(0, len(questions), max(1, self.options.samples)):
                question = question_of(questions[i])
                truth = questions[i].facts["answer"]
                transcripts.append(f"[{name}, {mode}] {question}  ->  {texts[i]}   (truth {truth})")
        self.note("modes", name, seed, numbers)
        return transcripts

    # ----------------------------------------------------------------------------------- table

    def table(self, part: str) -> str:
        """Markdown: a line per kind of run, mean +- standard error over its rows."""
        grouped: dict[str, list[dict]] = defaultdict(list)
        keys: dict[str, None] = {}  # in order of appearance
        for row in self.results[part]:
            grouped[row["run"]].append(row)
            keys |= dict.fromkeys(key for key in row if key not in ("run", "seed"))

        heads = ["run", "rows", *keys]
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name, rows in grouped.items():
            cells = [name, str(len(rows))]
            for key in keys:
                cells.append(mean_and_error([row[key] for row in rows if key in row]))
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def mean_and_error(values: list[float]) -> str:
    """mean +- standard error; nothing for no value."""
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4g} +- {error:.2g}"


def compare_posttraining(options: PosttrainingOptions) -> None:
    """Every part over its seeds; its table as soon as it is done."""
    unknown = set(options.only) - set(PARTS)
    if unknown:
        raise ValueError(f"--only {sorted(unknown)[0]}: choose from {', '.join(PARTS)}")

    comparisons = Comparisons(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.only:
        for seed in range(options.seeds):
            getattr(comparisons, part)(seed)
            write_json(options.out / "results.json", comparisons.results)
        table = comparisons.table(part)
        (options.out / f"{part}.md").write_text(table + "\n")
        print(f"\n{table}\n", flush=True)


if __name__ == "__main__":
    command(compare_posttraining)
