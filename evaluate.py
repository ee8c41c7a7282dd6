"""Grading: what a model answers on held-out scenes or a held-out file, family by family.

What it teaches: an accuracy means nothing without its chance level and its error. Chance here is the best blind strategy:
always give the commonest true answer to that very question. The image matters if swapping pictures between samples drops
the accuracy to that level.

    python evaluate.py --model runs/toy/final --data held_out.jsonl --images dir/
"""

import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from data.encode import Encoder, with_thinking
from data.readers import Folder
from data.sample import BadSample, Sample
from generate import Answer, generate, load_model
from graders import box_iou, phrase_f1, same_answer
from rewards import answer_reward
from scale import parallel
from tokenizer import Tokenizer
from vlm import SailVL


@dataclass(frozen=True)
class Score:
    """accuracy in [0, 1] over n samples; chance: the best blind strategy's."""

    accuracy: float
    chance: float
    n: int

    @property
    def error(self) -> float:
        """Standard error of the accuracy (binomial, at least one sample's worth)."""
        a = min(max(self.accuracy, 1 / (2 * self.n)), 1 - 1 / (2 * self.n))
        return math.sqrt(a * (1 - a) / self.n)


@dataclass(frozen=True)
class Graded:
    """One graded sample, for tables and for the report."""

    family: str
    question: str
    truth: str
    said: str
    score: float
    sample: Sample


def grade(family: str, said: str, truth: str) -> float:
    """Right or wrong; captions by F1 over their phrases, boxes by an overlap of at least one half."""
    if family == "caption":
        return phrase_f1(said, truth)
    if family == "grounding":
        return float(box_iou(said, truth) >= 0.5)
    return float(same_answer(said, truth))


def blind_chance(samples: list[Sample]) -> float:
    """Accuracy without looking: give the commonest answer that the *other* samples with this very question have (or, when
    there is none, that the whole family has)."""
    by_question, family = defaultdict(Counter), Counter()
    for s in samples:
        by_question[question_of(s)][s.facts["answer"]] += 1
        family[s.facts["answer"]] += 1
    hits = 0.0
    for s in samples:
        truth, seen = s.facts["answer"], by_question[question_of(s)]
        others = seen - Counter([truth]) or family - Counter([truth])
        hits += grade(family_of(s), others.most_common(1)[0][0], truth) if others else 0.0
    return hits / len(samples)


def question_of(sample: Sample) -> str:
    parts = sample.messages[-2].parts
    return parts[-1].strip().split("\n")[-1]


def family_of(sample: Sample) -> str:
    return sample.facts.get("family", sample.task)


def ask(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    think: bool = False,
    max_new: int = 48,
    batch: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    swap: bool = False,
) -> list[Answer]:
    """Answers to the last question of each sample, on every rank; each rank works out its share. `swap` gives each sample
    the images of another one (same count)."""
    rank, size = parallel.place()
    everything, samples = samples, samples[rank::size]
    prompts = [
        encoder.prompt(with_thinking(s, encoder.tokenizer.think_prompt) if think else s)
        for s in samples
    ]
    if swap:
        prompts = swapped(prompts)
    order = sorted(
        range(len(prompts)), key=lambda i: len(prompts[i][0])
    )  # rows of a batch alike in length
    answers: list[Answer | None] = [None] * len(prompts)
    was = model.training
    model.eval()
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        for i, a in zip(
            part,
            generate(
                model,
                [prompts[i] for i in part],
                encoder.tokenizer.end,
                max_new,
                temperature=temperature,
                seed=seed + at,
            ),
        ):
            answers[i] = a
    model.train(was)
    whole: list[Answer | None] = [None] * len(everything)
    for r, part in enumerate(parallel.gather([answers])):
        whole[r::size] = part
    return whole


def swapped(prompts: list) -> list:
    """Each prompt with the images of the next one that has as many of the same sizes."""
    groups = defaultdict(list)
    for i, (_, images) in enumerate(prompts):
        groups[tuple(a.shape for a in images)].append(i)
    out = list(prompts)
    for group in groups.values():
        for i, j in zip(group, group[1:] + group[:1]):
            out[i] = (prompts[i][0], prompts[j][1])
    return out


def text_of(answer: Answer, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids)


def evaluate(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    think: bool = False,
    swap: bool = False,
    max_new: int = 48,
) -> tuple[dict[str, Score], list[Graded]]:
    """Score per family (plus "overall", the mean over families) and every graded sample.

    With `think` the model is asked to think, and only a well-formed box counts.
    """
    tokenizer, graded = encoder.tokenizer, []
    for s, a in zip(samples, ask(model, encoder, samples, think, max_new, swap=swap)):
        said, truth, family = text_of(a, tokenizer), s.facts["answer"], family_of(s)
        score = (
            answer_reward(said, truth, a.finished)
            if think
            else grade(family, said, truth) * a.finished
        )
        graded.append(Graded(family, question_of(s), truth, said, score, s))
    return summary(graded), graded


def summary(graded: list[Graded]) -> dict[str, Score]:
    groups = defaultdict(list)
    for g in graded:
        groups["text" if g.sample.task == "text" else g.family].append(g)
    scores = {
        f: Score(
            sum(g.score for g in group) / len(group),
            blind_chance([g.sample for g in group]),
            len(group),
        )
        for f, group in groups.items()
    }
    mean = [
        sum(getattr(s, key) for s in scores.values()) / len(scores)
        for key in ("accuracy", "chance")
    ]
    return scores | {"overall": Score(*mean, sum(s.n for s in scores.values()))}


@dataclass
class Options:
    """Grade a model on a held-out LLaVA file (exact match of the last answer)."""

    data: Path
    model: Path = Path("runs/toy/final")
    images: Path | None = None
    think: bool = False
    limit: int = 0  # 0: all samples
    max_new: int = 48


def main(o: Options) -> int:
    model, tokenizer = load_model(o.model)
    folder = Folder(o.data, o.images)
    encoder, usable = Encoder(tokenizer, model.config, folder.root), []
    for s in folder.first(o.limit):
        try:
            encoder.prompt(s)
            usable.append(s)
        except BadSample as e:
            folder.faults.add(e)
    scores, _ = evaluate(model, encoder, usable, o.think, max_new=o.max_new)
    for family, s in scores.items():
        print(f"{family:14s} {s.accuracy:6.1%} +- {s.error:.1%}   chance {s.chance:6.1%}   n {s.n}")
    print(folder.faults.report())
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
