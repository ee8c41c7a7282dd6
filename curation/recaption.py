"""One command from a folder of own pictures to data to train on: captions, questions, books, a page.

What it teaches: the data half of a paper is a chain of small commands; a user with a folder of pictures
wants one. It looks at the pictures, writes captions, lets judges read them, makes questions of what
remains, and leaves a page on which fifty kept and fifty dropped samples can be looked at.

    folder/17.jpg, 17.txt                                     (or any data file)
      picture                   readable, large enough, not blank
      caption                   written anew
      second                    written once more by another model; the two must agree (--second)
      vir, ita                  dropped "if the score is below 3 or the answer is No"
      questions, check, look    of the caption, answered from it, and by the picture
      same, alike               no picture twice, no question too often
        --> OUT.jsonl  OUT.llava.jsonl  OUT.history.jsonl  OUT.funnel.json  OUT.report.html

    python -m curation.recaption --data photos --out runs/photos.jsonl \\
        --annotator.url http://localhost:8000/v1 --annotator.name qwen2.5-vl \\
        --judge.url http://localhost:8000/v1 --judge.name qwen2.5-vl

A drawn folder with bad texts, and the toy's own model, which writes no JSON:

    python -m curation.album draw --out runs/album
    python -m curation.recaption --data runs/album --out runs/recaptioned.jsonl \\
        --annotator.model runs/toy/final --annotator.prompts curation/prompts/toy \\
        --questions.templates curation/prompts/toy/templates.tsv \\
        --questions.look --second.model runs/toy/soup --least-common 1
    python -m curation.album grade --rows runs/recaptioned.jsonl --truth runs/album.truth.jsonl

OUT.llava.jsonl is LLaVA's format (id, image, conversations): one row with the caption and one with the
questions, so that no answer stands above its question; paths of pictures start at the file's folder.
OUT.jsonl is our own, with all facts.

Sources: SAIL-VL2 (arXiv 2509.14033) section 3.1 for the judges and what is dropped; SAIL-VL (2501.05952)
section 3.1 for captions with alt-texts. The rest of the chain, and its order, is ours; so are two filters for
whoever has no judge: a second captioner, which errs elsewhere than the first, and `--questions.look`, which
asks the picture what the caption answered.
"""

import json
import re
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Iterator

from curation.annotators import AnnotatorOptions, open_annotator
from curation.balance import ngrams
from curation.caption2qa import AlikePairs, QuestionOptions, question_steps
from curation.captioner import WriteCaption, caption_in, shown_pictures
from curation.judges import QUESTIONS, Judging, drop_low
from curation.pipeline import Item, PipelineOptions, run_pipeline, write_lines
from curation.report import ReviewOptions, write_review
from curation.requests import Annotator, Prompts, Request, Response, why_unanswered
from curation.side_by_side import pixel_hash
from data.containers import SPANS
from data.formats import DESCRIBE
from data.images import SUFFIXES, natural_key, stills_of
from data.sample import BadSample
from infra.cli import command
from scale import parallel

UNSAID = "(nothing)"  # the answer of a row whose picture nobody described yet
STOPS = re.compile(r"[,.;:!?，。；：！？、]")
LONGEST_ALT = 10_000  # characters that are read of a text beside a picture


# ---------------------------------------------------------------------------------- a folder's rows


def is_album(path: Path) -> bool:
    """Whether a path is a folder of pictures, and not of data files."""
    if not path.is_dir():
        return False
    suffixes = {file.suffix.lower() for file in path.iterdir()}
    return bool(suffixes & set(SUFFIXES)) and not suffixes & set(SPANS)


def album_rows(folder: Path) -> Iterator[str]:
    """A line for each picture below a folder; the text beside it (17.txt of 17.jpg) is `facts.alt_text`."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    for path in sorted(found, key=lambda path: natural_key(str(path))):
        beside = path.with_suffix(".txt")
        alt_text = ""
        if beside.is_file():
            with open(beside, encoding="utf-8", errors="replace") as file:
                alt_text = file.read(LONGEST_ALT).strip()
        row = {
            "messages": [
                {"role": "user", "content": "<image>"},
                {"role": "assistant", "content": UNSAID},
            ],
            "images": [path.relative_to(folder).as_posix()],
            "facts": {"alt_text": alt_text, "file": path.name},
        }
        yield json.dumps(row)


def write_album_rows(options: "RecaptionOptions") -> "RecaptionOptions":
    """The options with a data file in the folder's place. The file stays as it is while the folder does."""
    if options.out.resolve().is_relative_to(options.data.resolve()):
        raise ValueError(f"--out {options.out} would lie among the pictures: move it out")
    found = options.out.with_suffix(".found.jsonl")
    if parallel.place()[0] == 0:
        lines = list(album_rows(options.data))
        known = found.read_text(encoding="utf-8").splitlines() if found.exists() else None
        if lines != known:
            found.parent.mkdir(parents=True, exist_ok=True)
            write_lines(found, lines)
    parallel.gather([])
    return replace(options, data=found, images=options.images or options.data)


# ------------------------------------------------------------------------------------------ steps


class LookAtPicture:
    """Drops what is no picture to describe: unreadable, tiny, all of one colour."""

    name = "picture"

    def __init__(self, least_side: int):
        self.least_side = least_side

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            try:
                self.refuse_useless(item)
                item.keep(self.name, fingerprint=pixel_hash(item.sample))
            except BadSample as fault:
                item.drop(self.name, str(fault))

    def refuse_useless(self, item: Item) -> None:
        """Raises BadSample for a sample with a picture that cannot be used."""
        sample = item.sample
        parts = shown_pictures(sample)
        stills = [stills_of(part, sample.root, sample.origin) for part in parts]
        for image in chain.from_iterable(stills):
            if min(image.size) < self.least_side:
                raise BadSample("too small", f"{sample.origin}: {image.width}x{image.height}")
            if all(low == high for low, high in image.getextrema()):
                raise BadSample("one colour", f"{sample.origin}: nothing is to be seen")


class SecondOpinion:
    """Asks another annotator for a caption, and drops a sample where the two say different things.

    least: share of the pairs of neighbouring words, of all that either has, that both must have. Two
    models that describe freely share a fifth, two that were taught one style nearly all.
    """

    name = "second"

    def __init__(self, annotator: Annotator, least: float):
        if not 0 <= least <= 1:
            raise ValueError("--least-common is a share, between 0 and 1")
        self.annotator = annotator
        self.least = least

    def __call__(self, items: list[Item]) -> None:
        requests = []
        for item in items:
            requests.append(Request("caption", {}, shown_pictures(item.sample), item.sample))
        responses = self.annotator.annotate(requests)
        for item, response in zip(items, responses, strict=True):
            self.mark(item, response)

    def mark(self, item: Item, response: Response) -> None:
        if response.text is None:
            item.drop(self.name, why_unanswered(response))
            return
        other = response.text.strip()
        common = in_common(caption_in(item.sample), other)
        if common < self.least:
            item.drop(self.name, f"two captioners disagree: {common:.2f} in common with: {other}")
        else:
            item.keep(self.name, f"{common:.2f} in common", common=round(common, 3))


def in_common(one: str, other: str) -> float:
    """The share of their pairs of words that two texts have in common, whatever stops stand between them."""
    pairs = set(ngrams(STOPS.sub(" ", one), 2))
    others = set(ngrams(STOPS.sub(" ", other), 2))
    return len(pairs & others) / max(1, len(pairs | others))


class SamePictures:
    """Over the whole set: of pictures with equal pixels the first one stays."""

    name = "same"

    def __call__(self, items: list[Item]) -> None:
        first: dict[str, int] = {}
        for item in items:
            earlier = first.setdefault(item.sample.facts["fingerprint"], item.index)
            if earlier == item.index:
                item.keep(self.name)
            else:
                item.drop(self.name, f"same picture: as record {earlier}")


# ------------------------------------------------------------------------------------ LLaVA's format


def llava_lines(rows: Path) -> Iterator[str]:
    """Our rows as LLaVA's: for each a line with its caption, and one with its questions if it has any."""
    with open(rows, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            caption = [(message["role"], message["content"]) for message in row["messages"]]
            yield llava_line(row, "caption", caption)
            turns = []
            for question, answer in row["facts"].get("pairs", []):
                turns += [("user", question), ("assistant", answer)]
            if turns:
                marks = "<image>" * len(row["images"])
                turns[0] = ("user", f"{marks}\n{turns[0][1]}")
                yield llava_line(row, "questions", turns)


def llava_line(row: dict, part: str, turns: list[tuple[str, str]]) -> str:
    """turns: (role, text), the first with a mark for each picture."""
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    conversations = [{"from": speakers[role], "value": text} for role, text in turns]
    images = row["images"]
    return json.dumps(
        {
            "id": f"{row['facts']['index']}-{part}",
            "image": images[0] if len(images) == 1 else images,
            "conversations": conversations,
        },
        ensure_ascii=False,
    )


# --------------------------------------------------------------------------------------- command


@dataclass
class RecaptionOptions(PipelineOptions):
    """From a folder of pictures, or any data, to captions and questions that were checked."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    # Another captioner, which must agree; nobody named: the first is believed
    second: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    # Who scores captions; nobody named: they are not scored
    judge: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    # How questions are made of captions
    questions: QuestionOptions = field(default_factory=QuestionOptions)
    with_alt: float = 0.0  # share of the samples whose old text the annotator is shown
    request: str = DESCRIBE  # what the rows with captions ask
    least_side: int = 16  # pixels of a picture
    least_common: float = 0.1  # share of word pairs in which the second's caption must agree

    def __post_init__(self):
        # All that servers said lies in one file, and what is asked stands in one folder
        super().__post_init__()
        self.second = as_the_first(self.second, self.annotator)
        self.judge = as_the_first(self.judge, self.annotator)


def as_the_first(other: AnnotatorOptions, first: AnnotatorOptions) -> AnnotatorOptions:
    """Another one's options, its prompts and cache the first one's unless it has its own."""
    return replace(other, prompts=other.prompts or first.prompts, cache=other.cache or first.cache)


def recaption(options: RecaptionOptions) -> None:
    """The whole chain; all ranks work, the first writes."""
    parallel.start()
    if is_album(options.data):
        options = write_album_rows(options)
    annotator = open_annotator(options.annotator, options.seed)
    steps = recaption_steps(options, annotator)
    over_all = [SamePictures(), AlikePairs(options.questions.alike, needed=False)]
    outcome = run_pipeline(options, steps, over_all)

    # What a person trains on, and what a person looks at
    if parallel.place()[0] == 0:
        llava = options.out.with_suffix(".llava.jsonl")
        write_lines(llava, llava_lines(options.out))
        history = options.out.with_suffix(".history.jsonl")
        page = write_review(ReviewOptions(history, options.data, options.images))
        print(outcome.report())
        print(annotator.report())
        print(f"wrote {options.out}, {llava}, {page}")
    parallel.stop()


def anybody(named: AnnotatorOptions, seed: int) -> Annotator | None:
    """None when nobody is named."""
    if not (named.model or named.url or named.oracle):
        return None
    return open_annotator(named, seed)


def recaption_steps(options: RecaptionOptions, annotator: Annotator) -> list:
    """The steps over chunks, in their order."""
    prompts = Prompts(options.annotator.prompts)
    steps: list = [
        LookAtPicture(options.least_side),
        WriteCaption(annotator, prompts, options.with_alt, options.request, options.seed),
    ]
    second = anybody(options.second, options.seed)
    if second is not None:
        steps.append(SecondOpinion(second, options.least_common))
    judge = anybody(options.judge, options.seed)
    if judge is not None:
        steps += [Judging(question, judge, drop_low) for question in QUESTIONS]
    return steps + question_steps(options.questions, annotator, options.seed, needed=False)


if __name__ == "__main__":
    command(recaption)
