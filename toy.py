"""The whole recipe, in the paper's order, at a size that a laptop trains: `make toy`, or `torchrun --nproc-per-node 2 toy.py`.

What it teaches: what every stage is *for*. Each is graded on held-out pictures before and after, on the metric that it is
meant to move, beside the chance level of not looking at all.

    language, image -> SAIL-ViT I, II, III -> basic (AdaLRS) -> multi-task -> SFT 1-4 -> soup -> long CoT -> RL -> fusion -> RL

Writes, into `out`: one directory per stage (log.jsonl), final/ (the model in the released layout), results.json and
report.html. The recipes themselves stand in pretrain.py, sft.py and rl.py; here is only their order and their grading.
`--data` replaces the drawn world by files (see tools/real.py): the same ladder on data that people made.
"""

import os
import platform
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
import torch
import tyro

import pretrain
import recipe
import rl
import sft
from curation.chains import rejection_sample
from data import world
from data.encode import Encoder, with_thinking
from data.images import normalise, open_image
from data.readers import Folder
from data.sample import Faults, Sample
from evaluate import Graded, Score, ask, evaluate, family_of, summary, text_of
from graders import split_think
from infra.weights import write_json
from packing import Batch, collate
from rewards import format_reward
from scale import parallel
from soup import average, distance
from tools import report
from train import Run, answers, expert_use
from vlm import PRESETS

GRADED = (
    "caption",
    "attributes",
    "spatial",
    "counting",
    "grounding",
    "reading",
    "charts",
    "arithmetic",
    "odd",
    "video",
    "text",
)


@dataclass
class Options:
    """Run every stage of the recipe on the toy world (or on files) and grade each."""

    out: Path = Path("runs/toy")
    model: str = "dense"  # dense or moe
    seed: int = 0
    samples: int = 200  # held-out samples per family
    effort: float = 1.0  # multiplies the steps of every stage
    data: Path | None = (
        None  # a directory with train.jsonl, held_out.jsonl and images/; none: the drawn world
    )


@dataclass
class Row:
    """One line of results.json. `metric` says what was measured on `samples` held-out samples."""

    name: str
    seconds: float
    metric: str
    before: float
    after: float
    chance: float
    lower_is_better: bool
    samples: int


class Ladder:
    """The state that walks from stage to stage: model, encoder, source, and everything that was measured."""

    def __init__(self, o: Options):
        self.o, self.world = o, parallel.start()
        torch.manual_seed(o.seed)
        if o.data:
            self.source, held = Folder(o.data / "train.jsonl"), Folder(o.data / "held_out.jsonl")
            self.groups: dict[str, list[Sample]] = {}
            for s in held.first():
                self.groups.setdefault(family_of(s), []).append(s)
        else:
            self.source = world.World()
            self.groups = {f: self.source.held_out(f, o.samples) for f in GRADED}
        if o.model not in ("dense", "moe"):
            raise ValueError(f"--model {o.model!r}: choose dense or moe")
        self.model, tokenizer = recipe.new_model("toy", self.source, o.seed)
        if o.data:  # other people's pictures are larger than a tile
            self.model.config = replace(self.model.config, max_tiles=4)
        self.encoder = Encoder(tokenizer, self.model.config, self.source.root, max_length=512)
        self.rows: list[Row] = []
        self.runs: dict[str, dict] = {}
        self.after: dict[str, dict[str, float]] = {}
        self.filled: list[float] = []
        self.load: dict[str, list[float]] = {}
        self.scores: dict[str, Score] = {}
        self.graded: list[Graded] = []
        self.reasoning = [f for f in world.REASONING if f in self.groups] or [
            f for f, group in self.groups.items() if any(s.facts.get("chain") for s in group)
        ]

    # ------------------------------------------------------------------------------------------------------- grading

    def grade(
        self, families=None, think: bool = False, swap: bool = False
    ) -> tuple[dict[str, Score], list[Graded]]:
        chosen = [s for f in families or self.groups for s in self.groups[f]]
        return evaluate(self.model, self.encoder, chosen, think, swap, max_new=64 if think else 40)

    def say(self, text: str, name: str = "") -> None:
        if self.world.main:
            print(f"{name:>18s}  {text}", flush=True)

    def score_all(self, name: str) -> None:
        self.scores, self.graded = self.grade()
        self.after[name] = {f: s.accuracy for f, s in self.scores.items()}
        self.say(" ".join(f"{f} {100 * a:.0f}" for f, a in self.after[name].items()))

    def note(
        self,
        name: str,
        seconds: float,
        metric: str,
        before: float,
        after: float,
        chance: float,
        samples: int,
        lower: bool = False,
    ) -> None:
        self.rows.append(
            Row(name, round(seconds, 1), metric, before, after, chance, lower, samples)
        )
        better = (after < before) if lower else (after > before)
        self.say(
            f"{seconds:5.1f} s  {metric:44s} {before:7.3f} -> {after:7.3f}  (chance {chance:.3f}, n {samples})"
            f"{'' if better else '   NOT BETTER'}",
            name,
        )

    def record(self, name: str, run: Run) -> None:
        self.save(name)
        self.runs[name] = {
            "losses": [r["loss"] for r in run.log],
            "lrs": [r["lr"] for r in run.log],
            "decisions": run.decisions,
            "seconds": run.seconds,
        }
        if "reward" in run.log[0]:
            self.runs[name]["reward"] = [r["reward"] for r in run.log]
        elif "filled" in run.log[0] and name != "image":
            self.filled += [r["filled"] for r in run.log]

    def save(self, name: str) -> None:
        if self.world.main:
            self.model.save_pretrained(self.o.out / name)
            self.encoder.tokenizer.save(self.o.out / name)

    # ---------------------------------------------------------------------------------------------------- supervised

    def stage(self, recipe: dict, name: str):
        s = recipe[name]
        return replace(
            s, steps=max(4, round(s.steps * self.o.effort)), seed=s.seed + 1000 * self.o.seed
        )

    def supervised(self, recipe: dict, name: str, metric: str, families: list[str]) -> Run:
        """A stage graded by the mean accuracy over `families`, which the previous grading already knows."""
        families = [f for f in self.groups if f in families or self.groups[f][0].task in families]
        if not families:  # files need not have every family of the world
            families, metric = list(self.groups), "overall accuracy"
        if not self.scores:
            self.scores, _ = self.grade(families)
        before, began = self.mean(families), time.time()
        run = sft.stage_runner(
            self.model,
            self.stage(recipe, name),
            self.source,
            self.encoder,
            self.world,
            self.o.out / name,
            Faults(),
        )
        self.record(name, run)
        seconds = time.time() - began
        self.score_all(name)
        chance = sum(self.scores[f].chance for f in families) / len(families)
        self.note(
            name,
            seconds,
            metric,
            before,
            self.mean(families),
            chance,
            sum(self.scores[f].n for f in families),
        )
        return run

    def mean(self, families) -> float:
        return sum(self.scores[f].accuracy for f in families) / len(families)

    # ------------------------------------------------------------------------------------------------------- stages

    def image(self) -> None:
        """Patch prediction, graded on held-out pictures against predicting each patch's mean (1.0 by construction)."""
        stage, began = self.stage(pretrain.TOY, "image"), time.time()
        held = [
            a
            for f in self.groups
            if f != "text"
            for s in self.groups[f]
            for a in self.encoder.images(s)[0]
        ][:400]
        pictures = normalise(held)
        predictor = pretrain.PatchPredictor(self.model.vision_model)
        with torch.no_grad():
            before = float(predictor.loss(pictures, 4))
        run, predictor = pretrain.pretrain_vit(
            self.model, stage, self.source, self.encoder, self.world, self.o.out / "image"
        )
        with torch.no_grad():
            after = float(predictor.loss(pictures, 4))
        self.record("image", run)
        self.note(
            "image",
            time.time() - began,
            "next-patch squared error",
            before,
            after,
            1.0,
            len(held),
            lower=True,
        )

    def caption_loss(self, swap: bool = False) -> float:
        """Nats a token on held-out captions; `swap` shows each the next one's picture."""
        found = [self.encoder(s) for s in self.groups.get("caption") or self.mixed()]
        if swap:
            alike: dict[int, list] = {}
            for d in found:
                alike.setdefault(len(d.images), []).append(d)
            found = [
                replace(d, images=e.images)
                for g in alike.values()
                for d, e in zip(g, g[1:] + g[:1])
            ]
        batch = collate([found], None, self.encoder.tokenizer.pad)
        with torch.no_grad():
            return answers(self.model, batch)[1]["loss"] / batch.weight

    def mixed(self) -> list[Sample]:
        return [s for group in self.groups.values() for s in group]

    def warm_up(self) -> None:
        """SAIL-ViT I moves the adapter alone: too little to write captions, enough to make true ones likelier."""
        before, began = self.caption_loss(), time.time()
        run = sft.stage_runner(
            self.model,
            self.stage(pretrain.TOY, "vit1"),
            self.source,
            self.encoder,
            self.world,
            self.o.out / "vit1",
            Faults(),
        )
        self.record("vit1", run)
        seconds = time.time() - began
        self.score_all("vit1")
        self.note(
            "vit1",
            seconds,
            "held-out loss (chance: another's picture)",
            before,
            self.caption_loss(),
            self.caption_loss(swap=True),
            len(self.groups.get("caption") or self.mixed()),
            lower=True,
        )

    def basic(self, language: dict) -> None:
        """The language model and the adapter start again; AdaLRS against the same run at the fixed starting rate."""
        self.model.language_model.load_state_dict(language)
        self.model.mlp1.init_weights(torch.Generator().manual_seed(self.o.seed + 1))
        start = {k: v.clone() for k, v in self.model.state_dict().items()}
        stage = self.stage(pretrain.TOY, "basic")
        plain = pretrain.run_stage(
            self.model, replace(stage, adalrs=False), self.source, self.encoder, self.world
        )
        self.model.load_state_dict(start)
        self.scores = {}  # of another model
        run = self.supervised(
            pretrain.TOY, "basic", "caption F1 (new adapter, old LLM)", ["caption"]
        )
        self.runs["basic"]["compare"] = [r["loss"] for r in plain.log]
        self.adalrs = {
            "start_lr": stage.lr,
            "final_lr": run.log[-1]["lr"],
            "loss": run.tail(),
            "fixed_rate_loss": plain.tail(),
            "extra_steps": len(run.log) - stage.steps,
            "decisions": run.decisions,
        }
        self.say(
            f"AdaLRS: rate {stage.lr:.1e} -> {run.log[-1]['lr']:.1e}, loss {run.tail():.3f}; fixed rate "
            f"{plain.tail():.3f}; {len(run.decisions)} decisions, {len(run.log) - stage.steps} extra steps"
        )

    def soup(self) -> None:
        """Two runs from one checkpoint that differ in data order, and their mean."""
        began, start, states, means = (
            time.time(),
            {k: v.clone() for k, v in self.model.state_dict().items()},
            [],
            [],
        )
        for name in ("soup-a", "soup-b"):
            self.model.load_state_dict(start)
            run = sft.stage_runner(
                self.model,
                self.stage(sft.TOY, name),
                self.source,
                self.encoder,
                self.world,
                self.o.out / name,
                Faults(),
            )
            self.record(name, run)
            self.score_all(name)
            means.append(self.scores["overall"].accuracy)
            states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        self.say(f"ingredients {means[0]:.3f} and {means[1]:.3f}, distance {distance(*states):.3f}")
        self.model.load_state_dict(average(states))
        self.save("soup")
        self.score_all("soup")
        s = self.scores["overall"]
        self.note(
            "soup",
            time.time() - began,
            "overall accuracy (before: mean of the two)",
            sum(means) / 2,
            s.accuracy,
            s.chance,
            s.n,
        )

    def long_cot(self) -> None:
        """Graded by thinking: only a well-formed box counts."""
        before, _ = self.grade(self.reasoning, think=True)
        stage, began = self.stage(sft.TOY, "long-cot"), time.time()
        run = sft.long_cot(
            self.model, stage, self.source, self.encoder, self.world, self.o.out / "long-cot"
        )
        self.record("long-cot", run)
        seconds, (after, _) = time.time() - began, self.grade(self.reasoning, think=True)
        self.note(
            "long-cot",
            seconds,
            "accuracy when thinking (reasoning)",
            before["overall"].accuracy,
            after["overall"].accuracy,
            after["overall"].chance,
            after["overall"].n,
        )

    def reward(self, stage: rl.RLStage) -> tuple[float, float]:
        """Mean reward and share of whole formats of sampled completions on held-out questions."""
        held = [s for f in self.reasoning for s in self.groups[f]]
        answers = ask(
            self.model,
            self.encoder,
            held,
            think=True,
            max_new=stage.max_new,
            temperature=stage.temperature,
            seed=1,
        )
        texts = [text_of(a, self.encoder.tokenizer) for a in answers]
        rewards = [
            rl.reward_of(t, s, a.finished, stage.reward) for t, s, a in zip(texts, held, answers)
        ]
        form = [format_reward(t, a.finished) for t, a in zip(texts, answers)]
        return sum(rewards) / len(held), sum(form) / len(held)

    def reinforce(self, name: str) -> None:
        stage = self.stage(rl.TOY, name)
        if self.model.config.text.num_experts:
            stage = replace(stage, algorithm="gspo", low=3e-4, high=4e-4)
        before, began = self.reward(stage)[0], time.time()
        run = rl.run(self.model, stage, self.source, self.encoder, self.world, self.o.out / name)
        self.record(name, run)
        seconds, (after, form) = time.time() - began, self.reward(stage)
        n = sum(len(self.groups[f]) for f in self.reasoning)
        self.note(name, seconds, f"mean {stage.reward} reward (sampled)", before, after, 0.0, n)
        self.say(f"format {form:.1%}")
        self.formats = form

    def fusion(self) -> None:
        """Direct answers by default again, thinking when asked; chains come from the RL policy."""
        began, stage = time.time(), self.stage(sft.TOY, "fusion")
        before, _ = self.grade(self.reasoning)
        stream = self.source.stream({f: 1.0 for f in self.reasoning}, stage.seed + 5, 1)
        usable = [s for s in islice(stream, 400) if s.facts.get("chain")]
        harvest = rejection_sample(self.model, self.encoder, usable, seed=self.o.seed)
        if not harvest:  # a policy that solves nothing (a few steps of a smoke test): fuse the reference chains, and say so
            self.say("no chain of the policy was right: the reference chains stand in")
            harvest = [with_thinking(s, self.encoder.tokenizer.think_prompt) for s in usable]
        run = sft.fusion(
            self.model, stage, self.source, harvest, self.encoder, self.world, self.o.out / "fusion"
        )
        self.record("fusion", run)
        seconds = time.time() - began
        self.score_all("fusion")
        chance = sum(self.scores[f].chance for f in self.reasoning) / len(self.reasoning)
        self.note(
            "fusion",
            seconds,
            "direct accuracy by default (reasoning)",
            before["overall"].accuracy,
            self.mean(self.reasoning),
            chance,
            sum(self.scores[f].n for f in self.reasoning),
        )
        self.say(f"{len(harvest)} chains harvested from {len(usable)} questions")

    def to_moe(self) -> None:
        """Upcycle: the dense language model becomes a mixture of experts that computes the same function."""
        text = replace(PRESETS["toy-moe"].text, vocab_size=self.model.config.text.vocab_size)
        self.model = self.model.to_moe(text)
        self.encoder = replace(self.encoder, config=self.model.config)

    def moe_branch(self) -> None:
        """A side road of the dense ladder: the same model with experts, trained on for a little, to show their load. The
        ladder goes on from the dense model."""
        dense, encoder, scores, graded = self.model, self.encoder, self.scores, self.graded
        self.to_moe()
        self.supervised(
            sft.TOY, "moe-branch", "overall accuracy, upcycled (a branch)", list(self.groups)
        )
        self.load = self.packed()[1]
        self.model, self.encoder, self.scores, self.graded = dense, encoder, scores, graded

    # -------------------------------------------------------------------------------------------------------- report

    def packed(self) -> tuple[list[list[tuple[int, bool | None]]], dict[str, list[float]]]:
        """One packed batch drawn as (length, has image) per row, and the experts' load on it per layer and kind of token."""
        stage = pretrain.TOY["multitask"]
        batch: Batch = next(pretrain.supervised(self.source, stage, self.encoder, Faults()))[0]
        drawn, row, used, at = [], [], 0, 0
        image = batch.ids.reshape(-1) == self.encoder.tokenizer.image
        for n, owner in zip(batch.segments.lengths, batch.owners):
            row.append((n, None if owner == "padding" else bool(image[at : at + n].any())))
            at, used = at + n, used + n
            if used == stage.length:
                drawn.append(row)
                row, used = [], 0
        routing: list = []
        with torch.no_grad():
            self.model.hidden(
                batch.ids, batch.images, batch.positions, batch.segments, routing=routing
            )
            used = expert_use(routing, batch, self.encoder.tokenizer.image)[0] if routing else []
        return drawn, {
            f"{kind}, layer {i}": (n / n.sum()).tolist()
            for kind, counts in zip(("text", "vision"), used)
            for i, n in enumerate(counts)
        }

    def finish(self, began: float) -> None:
        o = self.o
        thought, thoughts = self.grade(self.reasoning, think=True)
        direct = [g for g in self.graded if g.family in self.reasoning and g.sample.task != "text"]
        share = lambda graded: sum(split_think(g.said)[0] is not None for g in graded) / len(graded)
        swap, _ = self.grade([f for f in self.groups if f != "text"], swap=True)
        modes = {
            "direct_thinks": share(direct),
            "direct_accuracy": summary(direct)["overall"].accuracy,
            "think_thinks": share(thoughts),
            "think_accuracy": thought["overall"].accuracy,
        }
        results = {
            "title": "nanosail toy ladder" if not o.data else f"nanosail ladder on {o.data}",
            "model": o.model,
            "seed": o.seed,
            "total_seconds": round(time.time() - began, 1),
            "cores": os.cpu_count(),
            "processes": self.world.size,
            "parameters": self.model.parameter_counts(),
            "peak_memory_gib": round(
                parallel.total(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)[0] / 2**20, 2
            ),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
            },
            "stages": [asdict(r) for r in self.rows],
            "final": {
                f: {"accuracy": s.accuracy, "chance": s.chance, "error": s.error, "n": s.n}
                for f, s in self.scores.items()
            },
            "families_after": self.after,
            "packing": {"filled": min(self.filled)},
            "adalrs": self.adalrs,
            "modes": modes,
            "format": self.formats,
            "swap": {
                f: {"own": self.scores[f].accuracy, "swapped": s.accuracy, "chance": s.chance}
                for f, s in swap.items()
                if f != "overall"
            },
        }
        drawn, load = self.packed()
        load = load or self.load
        results["expert_load"] = load
        self.save("final")
        if not self.world.main:
            return
        write_json(o.out / "results.json", results)
        cards, seen = [], Counter()
        for mode, graded in (("direct", self.graded), ("think", thoughts)):
            for g in graded:
                if seen[g.family, mode] < 3:
                    seen[g.family, mode] += 1
                    pictures = [
                        p for m in g.sample.messages for p in m.parts if not isinstance(p, str)
                    ]
                    cards.append(
                        {
                            "family": g.family,
                            "question": g.question,
                            "truth": g.truth,
                            "said": g.said,
                            "score": g.score,
                            "mode": mode,
                            "images": [self.picture(p) for p in pictures],
                        }
                    )
        report.write(o.out / "report.html", results, self.runs, cards, drawn, load, results["swap"])
        self.table(results)

    def picture(self, part):
        return open_image(part, self.source.root)

    def table(self, results: dict) -> None:
        print(
            f"\n{'stage':18s} {'seconds':>7s}  {'metric':44s} {'before':>7s}    {'after':>7s} {'chance':>7s} {'n':>5s}"
        )
        for r in self.rows:
            print(
                f"{r.name:18s} {r.seconds:7.1f}  {r.metric:44s} {r.before:7.3f} -> {r.after:7.3f} {r.chance:7.3f} {r.samples:5d}"
            )
        print(
            f"\n{'family':14s} accuracy           chance  standard errors above it   swapped images"
        )
        for f, s in self.scores.items():
            swapped = results["swap"].get(f, {}).get("swapped")
            print(
                f"{f:14s} {s.accuracy:6.1%} +- {s.error:4.1%}   {s.chance:6.1%}  {(s.accuracy - s.chance) / s.error:8.0f}"
                f"                   {'' if swapped is None else f'{swapped:6.1%}'}"
            )
        m = results["modes"]
        print(
            f"\nby default {m['direct_thinks']:.0%} of the reasoning answers think (accuracy {m['direct_accuracy']:.1%}); asked to "
            f"think, {m['think_thinks']:.0%} do ({m['think_accuracy']:.1%})"
        )
        print(
            f"{results['total_seconds']:.0f} seconds on {results['cores']} cores, peak memory {results['peak_memory_gib']:.1f} GiB; rows at least {results['packing']['filled']:.1%} full; "
            f"{self.o.out / 'results.json'}, {self.o.out / 'report.html'}, {self.o.out / 'final'}"
        )


def main(o: Options) -> int:
    began, ladder = time.time(), Ladder(o)
    ladder.supervised(pretrain.TOY, "language", "accuracy on described pictures (text)", ["text"])
    language = pretrain.stand_in_parts(ladder.model)
    ladder.image()
    ladder.warm_up()
    ladder.supervised(pretrain.TOY, "vit2", "caption F1", ["caption"])
    ladder.supervised(pretrain.TOY, "vit3", "overall accuracy", list(ladder.groups))
    ladder.basic(language)
    if o.model == "moe":
        ladder.to_moe()
    ladder.supervised(pretrain.TOY, "multitask", "overall accuracy", list(ladder.groups))
    for name, families in sft.PHASES.items():
        ladder.supervised(sft.TOY, name, f"accuracy on {', '.join(families)}", list(families))
    ladder.soup()
    if o.model == "dense":
        ladder.moe_branch()
    ladder.long_cot()
    ladder.reinforce("verifiable")
    ladder.fusion()
    ladder.reinforce("mixed")
    ladder.score_all("mixed")
    ladder.finish(began)
    parallel.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
