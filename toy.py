"""The whole recipe, in the paper's order, at a size that a laptop trains: `make toy`.

What it teaches: what every stage is *for*. Each is graded on held-out pictures before and after, on the
metric that it is meant to move, beside the chance level of not looking at all.

    language, image -> SAIL-ViT I, II, III -> basic (AdaLRS) -> multi-task -> SFT 1-4 -> soup
      -> long CoT -> verifiable RL -> harvest -> fusion -> mixed RL

    torchrun --nproc-per-node 2 toy.py --out runs/toy

The recipes themselves stand in pretrain.py, sft.py and rl.py, and each stage has a command that does the
same (`python sft.py sft1 --model ...`; `basic` with `--llm DIR --fresh-adapter`, `moe-branch` with
`--experts 8`, in the MoE ladder, which has experts from there on, `--experts 16 --expert-pieces 2`); here
is only their order and their grading. Writes, into `out`: one directory per stage (log.jsonl and the
model), final/ (the last model), results.json and report.html.
`--data` replaces the drawn world by files (see tools/real.py): the same ladder on data that people made.
"""

import json
import math
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch

import pretrain
import recipe
import rl
import sft
from curation.chains import rejection_sample
from data.encode import Encoder
from data.images import normalise
from data.readers import Folder
from data.sample import Faults, Sample
from data.world import GRADED, PHASES, REASONING, World
from evaluate import Graded, Score, ask, evaluate, family_of, text_of
from infra.cli import command
from infra.device import pick_device
from objective import PatchPredictor, supervised
from packing import collate
from recipe import Setup, fit
from rewards import format_reward
from rollout import reward_of
from scale import parallel
from soup import average, distance
from stage import BaseStage, RLStage, Stage
from tools.evidence import paired
from tools.ladder import finish, packed_row, scores_by_family
from train import Run
from vlm import PRESETS

GLANCE = 50  # held-out samples of a family that a stage is not about
# Stages whose families a plan may name; the others are graded by all, by a loss, or as long-cot is
GRADED_BY_FAMILIES = (
    "language",
    "vit2",
    "vit3",
    "basic",
    "multitask",
    *PHASES,
    "moe-branch",
    "long-cot",
)


@dataclass
class ToyOptions:
    """Run every stage of the recipe on the toy world (or on files) and grade each."""

    out: Path = Path("runs/toy")
    model: str = "dense"  # dense or moe
    seed: int = 0
    samples: int = 200  # held-out samples per family
    effort: float = 1.0  # multiplies the steps of every stage
    device: str = ""  # cpu, cuda, npu, mps; none: what there is
    # a directory with train.jsonl, held_out.jsonl and images/ (and stages.json: each stage's mixture,
    # steps and grading, where they differ); none: the drawn world
    data: Path | None = None


@dataclass
class StageResult:
    """One line of results.json. `metric` says what was measured on `samples` held-out samples."""

    name: str
    seconds: float
    metric: str
    before: float
    after: float
    chance: float
    lower_is_better: bool
    samples: int
    families: list[str] = field(default_factory=list)  # that grade it
    error: float | None = None  # of after - before, over the same samples; None: of a loss


class Ladder:
    """What walks from stage to stage: the setup, the held-out samples, and everything that was measured."""

    def __init__(self, options: ToyOptions):
        if options.model not in ("dense", "moe"):
            raise ValueError(f"--model {options.model}: choose dense or moe")
        self.options = options
        kind = pick_device(options.device, default="").partition(":")[0]
        ranks = parallel.start(kind=kind)
        torch.manual_seed(options.seed)

        # What it learns from, and the samples that it never sees. Files may have a plan: stage -> its
        # mixture, its steps and the families that grade it
        self.plan: dict[str, dict] = {}
        if options.data:
            source = Folder(options.data / "train.jsonl")
            self.held_out: dict[str, list[Sample]] = {}
            for sample in Folder(options.data / "held_out.jsonl").first():
                group = self.held_out.setdefault(family_of(sample), [])
                if len(group) < options.samples:
                    group.append(sample)
            names = set(self.held_out) | {group[0].task for group in self.held_out.values()}
            self.plan = read_plan(options.data / "stages.json", set(source.tasks()), names)
        else:
            source = World()
            self.held_out = {f: source.held_out(f, options.samples) for f in GRADED}
        asked_to_think = self.plan.get("long-cot", {}).get("graded", REASONING)
        self.reasoning = [f for f in asked_to_think if f in self.held_out]
        if not self.reasoning:
            self.reasoning = [
                f for f, group in self.held_out.items() if any(s.facts.get("chain") for s in group)
            ]

        # A model from noise
        model, tokenizer = recipe.new_model("toy", source, options.seed)
        model.to(ranks.device)
        encoder = Encoder(tokenizer, model.config, source.root, max_length=512)
        self.setup = Setup(model, encoder, source, ranks)

        # What is measured on the way
        self.stages: list[StageResult] = []
        self.runs: dict[str, dict] = {}  # curves for the report
        self.families_after: dict[str, dict[str, float]] = {}  # stage -> family -> accuracy
        self.samples_after: dict[str, dict[str, list[float]]] = {}  # and each sample's score
        self.row_fill: list[float] = []
        self.expert_load: dict[str, list[float]] = {}
        self.adalrs: dict = {}
        self.format = 0.0  # share of whole formats after RL
        self.scores: dict[str, Score] = {}  # of the present model
        self.graded: list[Graded] = []

    @property
    def model(self):
        return self.setup.model

    @property
    def encoder(self) -> Encoder:
        return self.setup.encoder

    # --------------------------------------------------------------------------------------- grading

    def grade(
        self, families: list[str] | None = None, think: bool = False, swap: bool = False
    ) -> tuple[dict[str, Score], list[Graded]]:
        """Scores on these families (all), and every graded sample."""
        # Thinking takes more words
        chosen = [s for family in families or self.held_out for s in self.held_out[family]]
        max_new = 64 if think else 40
        return evaluate(self.model, self.encoder, chosen, think, swap, max_new=max_new)

    def grade_after(self, name: str, closely: list[str]) -> None:
        """Every family after a stage, for its curve: `closely` on all samples, the others on a few."""
        chosen = []
        for family, samples in self.held_out.items():
            chosen += samples if family in closely else samples[:GLANCE]
        self.scores, self.graded = evaluate(self.model, self.encoder, chosen, max_new=40)
        self.families_after[name] = {f: s.accuracy for f, s in self.scores.items()}
        self.samples_after[name] = scores_by_family(self.graded)
        self.say(" ".join(f"{f} {100 * a:.0f}" for f, a in self.families_after[name].items()))

    def grade_before(self, families: list[str]) -> None:
        """These families on all samples, unless the last grading looked as closely."""
        for family in families:
            known = self.scores.get(family)
            if known is None or known.n < len(self.held_out[family]):
                self.scores, self.graded = self.grade(families)
                return

    def sample_scores(self, families: list[str]) -> list[float]:
        """Each sample's score in the last grading, family after family."""
        scores = scores_by_family(self.graded)
        return [score for family in families for score in scores[family]]

    def mean_accuracy(self, families: list[str]) -> float:
        return sum(self.scores[f].accuracy for f in families) / len(families)

    def mean_chance(self, families: list[str]) -> float:
        return sum(self.scores[f].chance for f in families) / len(families)

    def count(self, families: list[str]) -> int:
        return sum(self.scores[f].n for f in families)

    def all_held_out(self) -> list[Sample]:
        return [sample for group in self.held_out.values() for sample in group]

    # -------------------------------------------------------------------------------------- recording

    def say(self, text: str, name: str = "") -> None:
        if self.setup.ranks.main:
            print(f"{name:>18s}  {text}", flush=True)

    def note(self, result: StageResult) -> None:
        self.stages.append(result)
        better = result.after > result.before
        if result.lower_is_better:
            better = result.after < result.before
        self.say(
            f"{result.seconds:5.1f} s  {result.metric:44s} {result.before:7.3f} -> {result.after:7.3f}  "
            f"(chance {result.chance:.3f}, n {result.samples}){'' if better else '   NOT BETTER'}",
            result.name,
        )

    def save(self, name: str) -> None:
        if self.setup.ranks.main:
            self.model.save_pretrained(self.options.out / name)
            self.encoder.tokenizer.save(self.options.out / name)

    def row_of(self, table: dict[str, BaseStage], name: str) -> BaseStage:
        """A stage of the recipe, with this ladder's effort and seed."""
        stage = table[name]
        told = self.plan.get(name, {})
        steps = max(4, round(told.get("steps", stage.steps) * self.options.effort))
        mixture = told.get("mixture", stage.mixture)
        seed = stage.seed + 1000 * self.options.seed
        return replace(stage, steps=steps, seed=seed, mixture=mixture)

    def train(self, stage: BaseStage, **more) -> tuple[Run, float]:
        """Fit a stage in its own directory; returns its run and the seconds."""
        # The same call as that of the stage's own command
        began = time.time()
        run = fit(
            replace(self.setup, directory=self.options.out / stage.name, faults=Faults(), **more),
            stage,
        )
        self.save(stage.name)

        # Curves for the report
        self.runs[stage.name] = {
            "losses": [row["loss"] for row in run.log],
            "lrs": [row["lr"] for row in run.log],
            "decisions": run.decisions,
            "seconds": run.seconds,
        }
        if isinstance(stage, RLStage):
            self.runs[stage.name]["reward"] = [row["reward"] for row in run.log]
        elif stage.objective == "supervised":
            self.row_fill += [row["filled"] for row in run.log]
        return run, time.time() - began

    # --------------------------------------------------------------------- stages graded by accuracy

    def graded_stage(
        self, table: dict[str, BaseStage], name: str, metric: str, families: list[str]
    ) -> Run:
        """A stage graded by the mean accuracy over `families`, which the previous grading already knows."""
        present = self.graded_by(name, families)
        if not present:
            present = list(self.held_out)
            metric = "overall accuracy"

        # Before, from the last grading if it looked at all of them; the stage; after
        self.grade_before(present)
        before = self.mean_accuracy(present)
        scores_before = self.sample_scores(present)
        run, seconds = self.train(self.row_of(table, name))
        self.grade_after(name, present)

        # One line of the table
        after = self.mean_accuracy(present)
        chance = self.mean_chance(present)
        count = self.count(present)
        error = paired(scores_before, self.sample_scores(present)).error
        self.note(
            StageResult(
                name, round(seconds, 1), metric, before, after, chance, False, count, present, error
            )
        )
        return run

    def graded_by(self, name: str, families: list[str]) -> list[str]:
        """The families that grade a stage. Files need not have every one of the world's, and may say which
        of theirs it is."""
        wanted = self.plan.get(name, {}).get("graded", families)
        return [f for f, group in self.held_out.items() if f in wanted or group[0].task in wanted]

    def language(self) -> dict:
        """The stand-in for Qwen3; returns its weights, from which basic pre-training starts again."""
        self.graded_stage(
            pretrain.TOY, "language", "accuracy on described pictures (text)", ["text"]
        )
        return {
            name: value.clone() for name, value in self.model.language_model.state_dict().items()
        }

    def pictures_of(self, sample: Sample) -> list:
        """A sample's pictures and frames, as arrays."""
        arrays, _ = self.encoder.images(self.encoder.unrolled(sample))
        return arrays

    def image(self) -> None:
        """Patch prediction, graded against predicting each patch's mean (1.0 by construction)."""
        # Held-out pictures
        pictures = [s for family, group in self.held_out.items() if family != "text" for s in group]
        arrays = [array for sample in pictures for array in self.pictures_of(sample)][:400]
        held_out = normalise(arrays).to(self.setup.ranks.device)

        # The ViT with a head of its own, before and after
        predictor = PatchPredictor(self.model.vision_model).to(self.setup.ranks.device)
        with torch.no_grad():
            before = float(predictor.loss(held_out, 4))
        _, seconds = self.train(self.row_of(pretrain.TOY, "image"), predictor=predictor)
        with torch.no_grad():
            after = float(predictor.loss(held_out, 4))

        metric = "next-patch squared error"
        self.note(
            StageResult("image", round(seconds, 1), metric, before, after, 1.0, True, len(arrays))
        )

    def caption_loss(self, swap: bool = False) -> float:
        """Nats a token on held-out captions; `swap` shows each the next one's picture."""
        # Captions, or all there is
        samples = self.held_out.get("caption") or self.all_held_out()
        documents = [self.encoder(sample) for sample in samples]
        if swap:
            documents = with_swapped_images(documents)

        # All in one row
        batch = collate([documents], None, self.encoder.tokenizer.pad).to(self.setup.ranks.device)
        with torch.no_grad():
            _, statistics = supervised(self.model, batch, Stage())
        return float(statistics["loss"]) / batch.weight

    def warm_up(self) -> None:
        """SAIL-ViT I moves the adapter alone: too little to write captions, enough to make them likelier."""
        before = self.caption_loss()
        _, seconds = self.train(self.row_of(pretrain.TOY, "vit1"))
        self.grade_after("vit1", ["caption"])

        count = len(self.held_out.get("caption") or self.all_held_out())
        metric = "held-out loss (chance: another's picture)"
        after = self.caption_loss()
        chance = self.caption_loss(swap=True)
        self.note(
            StageResult("vit1", round(seconds, 1), metric, before, after, chance, True, count)
        )

    def basic(self, language: dict) -> None:
        """The language model and the adapter start again, and AdaLRS searches the rate."""
        # As the paper begins: a language model that has seen no picture, and an adapter of noise
        recipe.restart(self.model, language, adapter_seed=self.options.seed + 1)
        self.scores = {}  # they were another model's
        stage = self.row_of(pretrain.TOY, "basic")
        run = self.graded_stage(
            pretrain.TOY, "basic", "caption F1 (new adapter, old LLM)", ["caption"]
        )

        # What the search did
        final_rate = run.log[-1]["lr"]
        extra_steps = len(run.log) - stage.steps
        self.adalrs = {
            "start_lr": stage.lr,
            "final_lr": final_rate,
            "loss": run.tail(),
            "extra_steps": extra_steps,
            "decisions": run.decisions,
        }
        self.say(
            f"AdaLRS: rate {stage.lr:.1e} -> {final_rate:.1e}, loss {run.tail():.3f}; "
            f"{len(run.decisions)} decisions, {extra_steps} extra steps"
        )

    # ----------------------------------------------------------------------------------- soup, experts

    def soup(self) -> None:
        """Two runs from one checkpoint that differ in data order, and their mean."""
        began = time.time()
        start = {name: value.clone() for name, value in self.model.state_dict().items()}
        everything = list(self.held_out)

        # The ingredients
        states = []
        accuracies = []
        scores = []
        for name in ("soup-a", "soup-b"):
            self.model.load_state_dict(start)
            self.train(self.row_of(sft.TOY, name))
            self.grade_after(name, everything)
            accuracies.append(self.scores["overall"].accuracy)
            scores.append(self.sample_scores(everything))
            states.append({key: value.clone() for key, value in self.model.state_dict().items()})
        a, b = accuracies
        self.say(f"ingredients {a:.3f} and {b:.3f}, distance {distance(*states):.3f}")

        # The pot
        self.model.load_state_dict(average(states))
        self.save("soup")
        self.grade_after("soup", everything)
        overall = self.scores["overall"]
        means = [(one + other) / 2 for one, other in zip(*scores)]
        seconds = round(time.time() - began, 1)
        metric = "overall accuracy (before: mean of the two)"
        self.note(
            StageResult(
                "soup",
                seconds,
                metric,
                (a + b) / 2,
                overall.accuracy,
                overall.chance,
                False,
                overall.n,
                everything,
                paired(means, self.sample_scores(everything)).error,
            )
        )

    def to_moe(self, pieces: int = 1) -> None:
        """Upcycle: the dense language model becomes a mixture of experts that computes the same function.

        pieces: of each of the eight copies; with two, a token's two experts cost what the dense layer did.
        """
        copies = PRESETS["toy-moe"].text.num_experts
        model = recipe.upcycled(self.model, copies * pieces, pieces=pieces)
        encoder = replace(self.encoder, config=model.config)
        self.setup = replace(self.setup, model=model, encoder=encoder)

    def become_moe(self) -> None:
        """The soup with experts, from here to the end. Two experts a token, halves of copies, take as many
        operations as the dense layer; the paper's MoE begins as one (LOG.md says what that cost here)."""
        self.to_moe(pieces=2)
        self.graded_stage(sft.TOY, "moe-branch", "overall accuracy, upcycled", list(self.held_out))

    def moe_branch(self) -> None:
        """A side road of the dense ladder: the same model with experts, trained on for a little, to show
        their load. The ladder goes on from the dense model."""
        # Remember where the ladder stands
        dense = self.setup
        scores = self.scores
        graded = self.graded

        # The branch, and how evenly its experts are used
        self.to_moe()
        self.graded_stage(
            sft.TOY, "moe-branch", "overall accuracy, upcycled (a branch)", list(self.held_out)
        )
        _, self.expert_load = packed_row(self.setup)

        # Back to the ladder
        self.setup = dense
        self.scores = scores
        self.graded = graded

    # -------------------------------------------------------------------------------- thinking and RL

    def long_cot(self) -> None:
        """Graded by thinking: only a well-formed box counts."""
        before, graded_before = self.grade(self.reasoning, think=True)
        _, seconds = self.train(self.row_of(sft.TOY, "long-cot"))
        after, graded_after = self.grade(self.reasoning, think=True)

        overall = after["overall"]
        metric = "accuracy when thinking (reasoning)"
        start = before["overall"].accuracy
        self.note(
            StageResult(
                "long-cot",
                round(seconds, 1),
                metric,
                start,
                overall.accuracy,
                overall.chance,
                False,
                overall.n,
                self.reasoning,
                paired([g.score for g in graded_before], [g.score for g in graded_after]).error,
            )
        )

    def sampled_rewards(self, stage: RLStage) -> tuple[list[float], float]:
        """Rewards, and share of whole formats, of completions sampled for held-out questions."""
        # One completion of each question, sampled as in training
        samples = [s for family in self.reasoning for s in self.held_out[family]]
        completions = ask(
            self.model,
            self.encoder,
            samples,
            think=True,
            max_new=stage.max_new,
            temperature=stage.temperature,
            seed=1,
        )

        # What they earn
        rewards = []
        formats = 0.0
        for sample, completion in zip(samples, completions):
            text = text_of(completion, self.encoder.tokenizer)
            rewards.append(reward_of(text, sample, completion.finished, stage.reward))
            formats += format_reward(text, completion.finished)
        return rewards, formats / len(samples)

    def reinforce(self, name: str) -> None:
        """A stage of RL, graded by the reward that it is about."""
        stage = self.row_of(rl.TOY, name)
        before, _ = self.sampled_rewards(stage)
        _, seconds = self.train(stage)
        after, self.format = self.sampled_rewards(stage)

        count = len(after)
        metric = f"mean {stage.reward} reward (sampled)"
        error = paired(before, after).error
        self.note(
            StageResult(
                name,
                round(seconds, 1),
                metric,
                sum(before) / count,
                sum(after) / count,
                0.0,
                False,
                count,
                self.reasoning,
                error,
            )
        )
        self.say(f"format {self.format:.1%}")

    def fusion(self) -> None:
        """Direct answers by default again, thinking when asked; chains come from the RL policy."""
        began = time.time()
        stage = self.row_of(sft.TOY, "fusion")
        before, graded_before = self.grade(self.reasoning)

        # The policy's own right chains
        mixture = {self.held_out[family][0].task: 1.0 for family in self.reasoning}
        questions = self.setup.source.stream(mixture, stage.seed + 5, 1)
        usable = [sample for sample in islice(questions, 400) if sample.facts.get("chain")]
        harvest = rejection_sample(self.model, self.encoder, usable, seed=self.options.seed)
        if not harvest:  # a few steps of a smoke test: a policy that solves nothing
            self.say("no chain of the policy was right: the reference chains stand in")
        self.train(stage, harvest=harvest or None)

        # Direct answers are what this stage brings back
        seconds = time.time() - began
        self.grade_after("fusion", self.reasoning)
        self.note(
            StageResult(
                "fusion",
                round(seconds, 1),
                "direct accuracy by default (reasoning)",
                before["overall"].accuracy,
                self.mean_accuracy(self.reasoning),
                self.mean_chance(self.reasoning),
                False,
                self.count(self.reasoning),
                self.reasoning,
                paired([g.score for g in graded_before], self.sample_scores(self.reasoning)).error,
            )
        )
        self.say(f"{len(harvest)} chains harvested from {len(usable)} questions")


def read_plan(path: Path, tasks: set[str], families: set[str]) -> dict[str, dict]:
    """stages.json: stage -> {"mixture": task -> weight, "steps": n, "graded": families}, each optional; {}
    without it.

    tasks: of the rows. families: of the held-out ones, and their tasks. "graded" of long-cot is asked in
    all stages of thinking. Raises ValueError for what no stage reads or could do.
    """
    if not path.exists():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not an object of stages ({error})") from error
    if not isinstance(plan, dict):
        raise ValueError(f"{path}: not an object of stages ({plan!r:.40})")

    known = {**pretrain.TOY, **sft.TOY, **rl.TOY}
    for stage, told in plan.items():
        if stage not in known:
            raise ValueError(f"{path}: no stage {stage!r}; choose from {', '.join(known)}")
        check_told(f"{path}: {stage}", stage, told, tasks, families)
    return plan


def check_told(where: str, stage: str, told: dict, tasks: set[str], families: set[str]) -> None:
    """Raises ValueError unless a plan's words on one stage can be followed."""
    if not isinstance(told, dict) or not told.keys() <= {"mixture", "steps", "graded"}:
        raise ValueError(f'{where} may have "mixture", "steps" and "graded", not {told!r}')

    # What it reads
    if "mixture" in told:
        mixture = told["mixture"]
        weights = list(mixture.values()) if isinstance(mixture, dict) else []
        sound = [type(weight) in (int, float) and 0 < weight < math.inf for weight in weights]
        if not weights or not all(sound):
            raise ValueError(f"{where} mixes {mixture!r}; give tasks with positive weights")
        missing = sorted(set(mixture) - tasks)
        if missing:
            raise ValueError(f"{where} mixes {missing[0]!r}, which no row is; {sorted(tasks)}")

    # How long
    steps = told.get("steps", 1)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"{where} has {steps!r} steps; give a positive integer")

    # What grades it
    graded = told.get("graded", [])
    if "graded" in told and stage not in GRADED_BY_FAMILIES:
        raise ValueError(f'{where} is not graded by families of its own; leave "graded" out')
    if not isinstance(graded, list) or not all(isinstance(name, str) for name in graded):
        raise ValueError(f"{where} is graded by {graded!r}; give a list of families")
    unknown = [family for family in graded if family not in families]
    if unknown:
        raise ValueError(f"{where} is graded by {unknown[0]!r}, which is not held out")


def with_swapped_images(documents: list) -> list:
    """Each document with the images of the next one that has as many."""
    # Documents with as many images
    alike: dict[int, list] = {}
    for document in documents:
        alike.setdefault(len(document.images), []).append(document)

    # Each takes those of its neighbour
    swapped = []
    for group in alike.values():
        for document, other in zip(group, group[1:] + group[:1]):
            swapped.append(replace(document, images=other.images))
    return swapped


def climb(options: ToyOptions) -> int:
    """The ladder, stage by stage."""
    began = time.time()
    ladder = Ladder(options)
    everything = list(ladder.held_out)

    # Pre-training
    language = ladder.language()
    ladder.image()
    ladder.warm_up()
    ladder.graded_stage(pretrain.TOY, "vit2", "caption F1", ["caption"])
    ladder.graded_stage(pretrain.TOY, "vit3", "overall accuracy", everything)
    ladder.basic(language)
    ladder.graded_stage(pretrain.TOY, "multitask", "overall accuracy", everything)

    # Fine-tuning
    for name, families in PHASES.items():
        about = ", ".join(ladder.graded_by(name, list(families)))
        ladder.graded_stage(sft.TOY, name, f"accuracy on {about}", list(families))
    ladder.soup()
    if options.model == "moe":
        ladder.become_moe()
    else:
        ladder.moe_branch()

    # Thinking
    ladder.long_cot()
    ladder.reinforce("verifiable")
    ladder.fusion()
    ladder.reinforce("mixed")
    ladder.grade_after("mixed", everything)

    finish(ladder, time.time() - began, ladder.samples_after)
    parallel.stop()
    return 0


if __name__ == "__main__":
    command(climb)
