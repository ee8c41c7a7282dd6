"""Steps that ask an annotator: from a sample to a request, from a reply to a mark.

What it teaches: what a model replies is a text by a stranger. It may be a refusal, half of a JSON object, a
7 on a scale of five, or an essay. A pipeline over millions meets all of them, so each has a class to be
counted by, and costs the one sample that it is about.

    item --request--> Annotator --reply--> read --> kept or changed, with what was measured
             |            |                  `----> dropped: refused, no scores, off the scale, ...
             |            `--> dropped: no answer (no reply: the next run asks again)
             `--> dropped: a sample that cannot be asked about

    {"complexity": 3, "challenge": "2/5", "relevance": 4.0}  -> 3, 2, 4
    {"complexity": "7/10", ...}                               -> another scale
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Any, Mapping, Sequence

from curation.pipeline import Item, PipelineOptions, PipelineStep, run_pipeline
from curation.requests import Annotator, Request, Response, json_in, why_unanswered
from data.encode import last_answer, question_turns, text_of_message
from data.images import frames_of, open_image
from data.sample import MAX_FRAMES, BadSample, Sample, Video
from scale import parallel

QUOTED = 120  # characters of a reply that a history repeats

# How a model begins that will not answer; English and Chinese.
REFUSAL = re.compile(
    r"\W*(?:(?:i(?:'|’)?m|i am) (?:very |really |so )?(?:sorry|unable|not able)|sorry\b|i apologi[sz]e"
    r"|i (?:can(?:no|'|’)?t|cannot|can not|won(?:'|’)t|will not|must decline)|as an ai\b|unfortunately\b"
    r"|很?抱歉|很遗憾|对不起|我?无法|我?不能|作为(?:一个|一名)?(?:ai|人工智能))",
    re.I,
)


class AskStep:
    """A step that asks about every living item. A subclass says what is asked, and what a reply means."""

    name = "asked"

    def __init__(self, annotator: Annotator):
        self.annotator = annotator

    def request(self, item: Item) -> Request | None:
        """What is asked about it; None when the item is marked already. Raises BadSample for one that
        cannot be asked about."""
        raise NotImplementedError

    def read(self, item: Item, reply: str) -> None:
        """Marks the item. Raises BadSample for a reply that is none."""
        raise NotImplementedError

    def __call__(self, items: list[Item]) -> None:
        # What can be asked
        asked: list[Item] = []
        requests: list[Request] = []
        for item in items:
            try:
                request = self.request(item)
            except BadSample as fault:
                item.drop(self.name, str(fault))
                continue
            if request is not None:
                asked.append(item)
                requests.append(request)

        # All together; what comes of each
        responses = self.annotator.annotate(requests)
        for item, response in zip(asked, responses, strict=True):
            self.mark(item, response)

    def mark(self, item: Item, response: Response) -> None:
        if response.text is None:
            item.drop(self.name, why_unanswered(response))
            return
        try:
            self.read(item, response.text)
        except BadSample as fault:
            item.drop(self.name, str(fault))


class AtLeast:
    """Drops what has less than `least` of a measured fact."""

    def __init__(self, fact: str, least: float):
        self.name = f"{fact} >= {least:g}"
        self.fact = fact
        self.least = least

    def __call__(self, items: list[Item]) -> None:
        for item in items:
            measured = item.sample.facts[self.fact]
            if measured >= self.least:
                item.keep(self.name)
            else:
                item.drop(self.name, f"below {self.least:g}: {self.fact} {measured:g}")


# ---------------------------------------------------------------------------------- what is asked


def pictures_in(sample: Sample, frames: int = MAX_FRAMES) -> tuple:
    """The pictures in order, and of a video at most `frames` frames. Raises BadSample for a bad video."""
    pictures: list[Any] = []
    for message in sample.messages:
        for part in message.parts:
            if isinstance(part, Video):
                some = replace(part, max_frames=frames)
                pictures += frames_of(some, sample.root, sample.origin)
            elif not isinstance(part, str):
                pictures.append(part)
    return tuple(pictures)


def digest_of_pictures(sample: Sample) -> str:
    """What its pictures look like, in short. Raises BadSample for one that cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures_in(sample):
        image = open_image(picture, sample.root, sample.origin)
        digest.update(f"{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def last_question(sample: Sample) -> str:
    """The words of the user's turn that the last answer is for. Raises BadSample when there are none."""
    for message in reversed(question_turns(sample)):
        said = text_of_message(message)
        if message.role == "user" and said:
            return said
    raise BadSample("no question", f"{sample.origin}: no words of a user before the answer")


def given_answer(sample: Sample) -> str:
    """What the sample's last assistant turn says. Raises BadSample when there is none."""
    at = last_answer(sample)
    said = "" if at is None else text_of_message(sample.messages[at])
    if not said:
        raise BadSample("no answer to judge", f"{sample.origin}: no assistant turn with words")
    return said


def conversation_of(sample: Sample) -> str:
    """All turns but the system's, a line each: `user: how many?`, with chains as they are."""
    lines = []
    for message in sample.messages:
        said = text_of_message(message)
        if message.think:
            said = f"<think>{message.think}</think>{said}"
        if said and message.role != "system":
            lines.append(f"{message.role}: {said}")
    if not lines:
        raise BadSample("no conversation", f"{sample.origin}: nobody says anything")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- what is replied


@dataclass(frozen=True)
class Scale:
    """The whole numbers that a score can be."""

    low: int
    high: int


# A whole number, also as `4.0` and `4/5`
SCORE = re.compile(r"(-?\d{1,3})(?:\.0{1,9})?(?:\s*/\s*(\d{1,3}))?")


def scores_in(reply: str, scales: Mapping[str, Scale]) -> dict[str, int]:
    """The scores of a reply's JSON object, one for each scale.

    Raises BadSample: "refused", "no scores", "not a score", "another scale" or "off the scale".
    """
    found = json_in(reply)
    if not isinstance(found, dict):
        raise BadSample("refused" if refuses(reply) else "no scores", excerpt(reply))
    by_name = {str(name).strip().lower(): value for name, value in found.items()}
    return {name: score_from(by_name.get(name), name, scale) for name, scale in scales.items()}


def score_from(value: Any, name: str, scale: Scale) -> int:
    """A JSON value as a score. Raises BadSample when it is none of this scale."""
    # True is a number to Python
    is_plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    text = unicodedata.normalize("NFKC", str(value)).replace("−", "-").strip()
    match = SCORE.fullmatch(text) if is_plain else None
    if match is None:
        raise BadSample("not a score", f"{name} {excerpt(text)}")

    # 7/10 is no 7 on a scale to 5
    score, out_of = match.groups()
    if out_of is not None and int(out_of) != scale.high:
        raise BadSample("another scale", f"{name} {text}, not of {scale.high}")
    if not scale.low <= int(score) <= scale.high:
        raise BadSample("off the scale", f"{name} {text}, not from {scale.low} to {scale.high}")
    return int(score)


def words_in(reply: str, longest: int) -> str:
    """A reply that is words to keep, without quotes and spaces around it.

    longest: in characters. Raises BadSample: "refused", "empty reply" or "long reply".
    """
    said = reply.strip().strip("\"'`“”「」").strip()
    if not said:
        raise BadSample("empty reply", excerpt(reply))
    if refuses(said):
        raise BadSample("refused", excerpt(said))
    if len(said) > longest:
        raise BadSample("long reply", f"{len(said)} characters, the limit is {longest}")
    return said


def refuses(reply: str) -> bool:
    """Whether a reply begins as those do that will not answer."""
    return REFUSAL.match(reply) is not None


def excerpt(reply: str) -> str:
    """A reply for a history: its beginning, on one line."""
    short = " ".join(reply.split())[:QUOTED]
    return repr(short)


# ------------------------------------------------------------------------------------------- end


def walk_and_report(
    options: PipelineOptions,
    ranks: parallel.Ranks,
    steps: Sequence[PipelineStep],
    over_all: Sequence[PipelineStep] = (),
    annotator: Annotator | None = None,
) -> None:
    """What a command ends with: the pipeline, its funnel, and what the annotator did for it."""
    outcome = run_pipeline(options, steps, over_all)
    if ranks.main:
        print(outcome.report())
        if annotator is not None:
            print(annotator.report())
        print(f"wrote {options.out}")
    parallel.stop()
