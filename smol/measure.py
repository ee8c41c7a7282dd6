"""What SmolLM2 sees, and what it still knows: held-out losses, answers and text perplexity, on a page.

What it teaches: a caption's loss alone says little, since most of a caption can be guessed. So the same
held-out captions are scored four times, in nats a token (end of the answer included):

    seen      with their own picture
    swapped   with the picture of another caption: worse than knowing nothing, as it misleads
    blind     the model's best guess without looking: its mean probability over eight other pictures
    bigram    counts of word pairs in the training answers, by question: no picture, no model

The margin is blind - seen: what the picture told, with all that the model knows of words on both sides.
Text ability is perplexity on the Python language reference (`pydoc_data.topics`, which comes with every
Python), before and after: of the language model as it came, and of the one that sees.

    python -m smol.measure --model runs/smol/answers --data real/train.jsonl --held-out real/held_out.jsonl
        -> results.json, report.html in the model's directory
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Iterable

import torch
from torch import Tensor

from attention import Segments, attend_inside
from data.encode import Encoder
from data.readers import Folder
from data.sample import BadSample, Document, Faults, Sample, Video
from evaluate import Score, evaluate, question_of, score_lines
from generate import load_model
from infra.cli import command
from infra.weights import write_json
from llm import LLM
from objective import supervised
from packing import collate
from smol.page import write_sight_page
from smol.stages import SMOL
from stage import Stage
from tokenizer import Tokenizer
from vlm import SailVL, token_logprobs

OTHERS = 8  # pictures over which the blind guess is averaged
ROW = 32  # documents that are scored together


@dataclass
class SightOptions:
    """Score a model on held-out captions, questions and plain text."""

    model: Path = Path("runs/smol/answers")
    before: Path = Path("runs/smol/language")  # the language model as it came
    data: Path = Path("real/train.jsonl")  # what it was trained on: for the bigram
    held_out: Path = Path("real/held_out.jsonl")
    captions: int = 200  # held-out captions to score
    answers: int = 300  # held-out questions to ask
    tokens: int = 8192  # of plain text


# -------------------------------------------------------------------------------------- losses


def is_caption(sample: Sample) -> bool:
    """Whether it is scored as a caption: of one still picture, with one question."""
    pictures = [p for m in sample.messages for p in m.parts if not isinstance(p, str)]
    still = len(pictures) == 1 and not isinstance(pictures[0], Video)
    return sample.task == "caption" and still and len(sample.messages) == 2


def encoded(encoder: Encoder, samples: Iterable[Sample], faults: Faults) -> list[Document]:
    """Documents of those that can be read."""
    documents = []
    for sample in samples:
        try:
            documents.append(encoder(sample))
        except BadSample as fault:
            faults.add(fault)
    return documents


@torch.no_grad()
def answer_losses(model: SailVL, documents: list[Document], pad: int) -> Tensor:
    """-log p of each document's whole answer -> (documents,) in nats."""
    losses = []
    for first in range(0, len(documents), ROW):
        part = documents[first : first + ROW]
        _, statistics = supervised(model, collate([part], None, pad), Stage())
        losses.append(statistics["tasks"][: len(part), 0])
    return torch.cat(losses)


def with_other_pictures(documents: list[Document], shift: int) -> list[Document]:
    """Each with the pictures of the document `shift` places on, among those of the same sizes."""
    groups = defaultdict(list)
    for place, document in enumerate(documents):
        groups[tuple(image.shape for image in document.images)].append(place)

    out = list(documents)
    for places in groups.values():
        for i, place in enumerate(places):
            other = documents[places[(i + shift) % len(places)]]
            out[place] = replace(documents[place], images=other.images)
    return out


def shown_and_not(model: SailVL, documents: list[Document], pad: int) -> dict[str, float]:
    """Nats a token of the answers: seen, swapped, blind."""
    tokens = sum(int((document.labels >= 0).sum()) for document in documents)
    seen = answer_losses(model, documents, pad)
    others = []
    for shift in range(1, OTHERS + 1):
        others.append(answer_losses(model, with_other_pictures(documents, shift), pad))
    others = torch.stack(others)  # (OTHERS, documents)

    # The mean of probabilities, not of their logarithms: the best that a mixture can promise
    blind = math.log(OTHERS) - torch.logsumexp(-others, 0)  # (documents,)
    totals = {"seen": seen, "swapped": others[0], "blind": blind}
    return {name: float(loss.sum()) / tokens for name, loss in totals.items()}


class Bigram:
    """p(token | the one before it), by question, from counts. A question stands before its answer.

    Three levels, each trusted as far as it was seen (Witten and Bell, 1991): pairs, then single
    tokens, then all ids alike.
    """

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary
        self.pairs: dict[object, Counter] = defaultdict(Counter)
        self.single: Counter = Counter()

    def learn(self, question: str, answer: list[int]) -> None:
        for before, token in zip([question, *answer], answer):
            self.pairs[before][token] += 1
            self.single[token] += 1

    def probability(self, before: object, token: int) -> float:
        """Of a token after a token, or after a question."""
        p = 1 / self.vocabulary
        for counts in (self.single, self.pairs.get(before, Counter())):
            kinds, total = len(counts), counts.total()
            if total:
                p = (counts[token] + kinds * p) / (total + kinds)
        return p

    def loss(self, question: str, answer: list[int]) -> float:
        """-log p of a whole answer."""
        pairs = zip([question, *answer], answer)
        return -sum(math.log(self.probability(before, token)) for before, token in pairs)


def question_and_answer(sample: Sample, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The last question's words, and the ids of its answer with their end."""
    said = "".join(part for part in sample.messages[-1].parts if isinstance(part, str))
    return question_of(sample), tokenizer.encode(said) + [tokenizer.end]


def bigram_loss(train: Iterable[Sample], held_out: list[Sample], tokenizer: Tokenizer) -> float:
    """Nats a token of the held-out answers under a bigram of the training answers."""
    bigram = Bigram(len(tokenizer))
    for sample in train:
        bigram.learn(*question_and_answer(sample, tokenizer))
    nats = 0.0
    tokens = 0
    for sample in held_out:
        question, answer = question_and_answer(sample, tokenizer)
        nats += bigram.loss(question, answer)
        tokens += len(answer)
    return nats / tokens


# ---------------------------------------------------------------------------------- plain text


def reference_text() -> str:
    """The Python language reference, its topics in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics))


@torch.no_grad()
def perplexity(model: LLM, tokenizer: Tokenizer, tokens: int, window: int = 512) -> float:
    """exp of the mean -log p of a token given those before it in its window."""
    ids = torch.tensor(tokenizer.encode(reference_text()[: 8 * tokens])[:tokens])
    nats = 0.0
    counted = 0
    for part in ids.split(window):
        segments = Segments.of([len(part)])
        attend = attend_inside(segments, causal=True)
        hidden = model(model.embed(part), segments.positions(), attend)
        nats -= float(token_logprobs(hidden[:-1], model.lm_head.weight, part[1:]).sum())
        counted += len(part) - 1
    return math.exp(nats / counted)


# --------------------------------------------------------------------------------- the command


def text_kept(options: SightOptions, model: SailVL, tokenizer: Tokenizer) -> dict[str, float]:
    """Perplexity before, after, and the change."""
    after = perplexity(model.language_model, tokenizer, options.tokens)
    untouched = LLM.from_pretrained(options.before).eval()
    before = perplexity(untouched, tokenizer, options.tokens)
    return {"before": before, "after": after, "change": after / before - 1}


def measure_sight(options: SightOptions) -> dict:
    """All numbers; the page is written beside the model."""
    # What is asked
    model, tokenizer = load_model(options.model)
    held_out = Folder(options.held_out)
    train = Folder(options.data)
    encoder = Encoder(tokenizer, model.config, held_out.root)
    samples = held_out.first()
    captions = [sample for sample in samples if is_caption(sample)][: options.captions]
    if len(captions) <= OTHERS:
        raise ValueError(f"--held-out {options.held_out}: {len(captions)} captions of one picture")

    # Captions: with the picture, without it, and without a model
    faults = Faults()
    documents = encoded(encoder, captions, faults)
    losses = shown_and_not(model, documents, tokenizer.pad)
    trained = (sample for sample in train.first() if is_caption(sample))
    losses["bigram"] = bigram_loss(trained, captions, tokenizer)
    losses["margin"] = losses["blind"] - losses["seen"]

    # Answers, by family, of what was trained; every n-th question, so that all families are there
    trained_tasks = [s for s in samples if s.task in SMOL["answers"].mixture]
    every = max(1, len(trained_tasks) // options.answers)
    asked = trained_tasks[::every]
    scores, graded = evaluate(model, encoder, asked, max_new=24, faults=faults)

    text = text_kept(options, model, tokenizer)
    results = {
        "captions": len(documents),
        "losses": losses,
        "scores": {name: [s.accuracy, s.chance, s.error, s.n] for name, s in scores.items()},
        "text": text,
    }
    write_json(options.model / "results.json", results)
    write_sight_page(options.model / "report.html", results, graded, encoder)
    print("\n".join(lines_of(results, scores, graded)))
    if faults.counts:
        print(faults.report())
    return results


def lines_of(results: dict, scores: dict[str, Score], graded: list) -> list[str]:
    """What the command prints."""
    losses = results["losses"]
    text = results["text"]
    named = ", ".join(
        f"{name} {losses[name]:.3f}" for name in ("seen", "swapped", "blind", "bigram")
    )
    return [
        f"{results['captions']} held-out captions, nats a token: {named}",
        f"margin of seeing over the blind guess {losses['margin']:.3f}, over the bigram "
        f"{losses['bigram'] - losses['seen']:.3f}",
        f"text perplexity {text['before']:.3f} -> {text['after']:.3f} ({text['change']:+.2%})",
        *score_lines("answers", scores, graded, lambda one: one.family),
    ]


def check_sight(options: SightOptions) -> int:
    """Exit code 1 when seeing does not help, or text is forgotten."""
    results = measure_sight(options)
    failed = results["losses"]["margin"] <= 0 or abs(results["text"]["change"]) > 0.02
    return int(failed)


if __name__ == "__main__":
    command(check_sight)
