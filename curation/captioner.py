"""SAIL-Captioner: a few captions by a strong annotator train a small model that captions everything else.

What it teaches: nobody can pay a strong model for 300 million captions, and nobody has to. It writes a
small set, a compact model learns from that set, and the compact model does the rest. What a web page says
about its picture (the alt-text) knows names that no pixel shows, and is often wrong: so half of the small
set is asked for with it and half without, and the captioner can be asked either way afterwards.

    pictures --reference (a strong annotator)--> rows --sft.py--> captioner
                                                                     |
    millions of pictures --caption (--annotator.model captioner)-----+--> OUT.jsonl

    python -m curation.captioner reference --data few.jsonl --out reference.jsonl --annotator.url URL
    python sft.py sft1 --data reference.jsonl --model ... --out runs/captioner
    python -m curation.captioner caption --data all.jsonl --out new.jsonl --annotator.model runs/captioner

A row of `reference` asks in the very words in which the captioner will be asked (the prompt file, with the
alt-text where it was shown); a row of `caption` asks what `--request` says. The old text stays in the facts.

Source: SAIL-VL (arXiv 2501.05952) section 3.1: GPT-4o wrote the reference set, on pictures drawn evenly;
an InternVL2-8B learned it; alt-texts where there are any, in both. Not published: prompts, the size of the
reference set, what is thrown away. Drawing evenly is `python -m curation.balance`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from curation.annotators import AnnotatorOptions, open_annotator
from curation.balance import answers_as_text, ngrams
from curation.pipeline import Item, PipelineOptions
from curation.questions import AskStep, refuses, walk_and_report
from curation.requests import Annotator, Prompts, Request, generator_of
from data.formats import DESCRIBE
from data.sample import Message, Sample
from infra.cli import command
from scale import parallel

# What grading knows of an old answer is not true of a new one.
OF_THE_ANSWER = ("answer", "chain", "question", "family", "grader", "category")

# Of conversations and chains: no part of a caption, or of a question about it.
MARKED = re.compile(r"</?think>|\\boxed|<image>|<video>")
LONGEST = 6000  # characters of a caption
ALIKE = 4  # times that the same four words may stand in one


# ------------------------------------------------------------------------------ what a sample has


def shown_pictures(sample: Sample) -> tuple:
    """The pictures and videos of a sample's turns, in order."""
    parts = [part for message in sample.messages for part in message.parts]
    return tuple(part for part in parts if not isinstance(part, str))


def alt_text_of(sample: Sample) -> str:
    """What was said of the picture before: `facts.alt_text`, else all that the sample answers."""
    known = sample.facts.get("alt_text")
    return known if isinstance(known, str) else answers_as_text(sample)


def caption_in(sample: Sample) -> str:
    """`facts.caption`, else all that the sample answers."""
    known = sample.facts.get("caption")
    return known if isinstance(known, str) else answers_as_text(sample)


def newly_said(sample: Sample, question: str, answer: str, **facts) -> Sample:
    """The pictures of a sample with one question and one answer in place of its own."""
    asked = Message("user", (*shown_pictures(sample), "\n" + question))
    kept = {key: value for key, value in sample.facts.items() if key not in OF_THE_ANSWER}
    return replace(
        sample,
        messages=(asked, Message("assistant", (answer,))),
        facts=kept | {"answer": answer} | facts,
    )


# ------------------------------------------------------------------------------------------- step


class WriteCaption(AskStep):
    """Every sample gets a caption; its old text becomes `facts.alt_text`.

    with_alt: the share of samples whose alt-text the annotator is shown. request: what the new row
    asks; "" for the words that the annotator was asked in.
    """

    name = "caption"

    def __init__(
        self,
        annotator: Annotator,
        prompts: Prompts,
        with_alt: float = 0.0,
        request: str = "",
        seed: int = 0,
    ):
        if not 0 <= with_alt <= 1:
            raise ValueError("--with-alt is a share, between 0 and 1")
        super().__init__(annotator)
        self.prompts = prompts
        self.with_alt = with_alt
        self.asks = request
        self.seed = seed

    def request(self, item: Item) -> Request:
        """With the alt-text or without, by the sample's own random number."""
        sample = item.sample
        alt_text = alt_text_of(sample)
        drawn = generator_of(self.seed, item.index, self.name).random() < self.with_alt
        if drawn and alt_text.strip():
            fields = {"alt_text": alt_text}
            return Request("caption_with_alt", fields, shown_pictures(sample), sample)
        return Request("caption", {}, shown_pictures(sample), sample)

    def read(self, item: Item, reply: str) -> None:
        # A caption that is none
        caption = reply.strip()
        fault = fault_of_caption(caption)
        if fault:
            item.drop(self.name, fault)
            return

        # A new row, which remembers what stood there
        request = self.request(item)
        asked = self.asks or self.prompts.text(request)
        written = newly_said(item.sample, asked, caption)
        shown = request.task == "caption_with_alt"
        alt_text = alt_text_of(item.sample)
        by = self.annotator.name
        why = f"with its alt-text: {caption}" if shown else caption
        item.change(self.name, written, why, alt_text=alt_text, caption=caption, captioner=by)


def fault_of_caption(caption: str) -> str:
    """Why a reply is no caption, "" when it is one: empty, refused, endless or going round."""
    if not caption:
        return "empty caption"
    if refuses(caption):
        return f"refused: {caption[:100]}"
    if MARKED.search(caption):
        return f"holds markup: {caption[:100]}"
    if len(caption) > LONGEST:
        return f"too long: {len(caption)} characters"
    grams = Counter(ngrams(caption, 4))
    (gram, times), *_ = grams.most_common(1)
    if times > ALIKE:
        return f"goes round: {' '.join(gram)} {times} times"
    return ""


# --------------------------------------------------------------------------------------- commands


@dataclass
class CaptionOptions(PipelineOptions):
    """Caption every picture of some data anew, by any annotator."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    with_alt: float = 0.0  # share of the samples whose old text the annotator is shown
    request: str = DESCRIBE  # what the written rows ask; "": the annotator's prompt itself


@dataclass
class ReferenceOptions(CaptionOptions):
    """The small set that a captioner learns from: a strong annotator's captions, its prompts as questions."""

    with_alt: float = 0.5
    request: str = ""


def caption_files(options: CaptionOptions) -> None:
    """From files to files."""
    ranks = parallel.start()
    annotator = open_annotator(options.annotator, options.seed)
    prompts = Prompts(options.annotator.prompts)
    step = WriteCaption(annotator, prompts, options.with_alt, options.request, options.seed)
    walk_and_report(options, ranks, [step], annotator=annotator)


def captioner(
    options: Annotated[CaptionOptions, tyro.conf.subcommand("caption")]
    | Annotated[ReferenceOptions, tyro.conf.subcommand("reference")],
) -> None:
    """Either command: they differ in their defaults."""
    caption_files(options)


if __name__ == "__main__":
    command(captioner)
