"""From a `Sample` to a `Document`: ids, labels, weights and pixels for one model.

What it teaches: every dataset format is a different spelling of one thing, messages with text and
image parts. A reader turns a file into `Sample`s; `Encoder` turns a Sample into a `Document` of
ids, labels and pixels. Whatever is wrong with a sample ends here, counted by reason (`Faults`), and
costs that sample alone.

    data/readers.py: files on disk --+
         data/world.py: a drawn one --+--> Sample --Encoder--> Document --stream.py--> packing.py

Labels are shifted here, per document and before packing: position t is asked for token t + 1, so no
document is ever asked for the first token of its neighbour. `python -m data.show --data my.jsonl
--images dir/` shows what the model will see.

What is asked, and what is the truth? One rule for all formats, for fine-tuning, RL and curation alike:
the truth is `facts["answer"]`, else the last assistant turn; the question is what stands before that
turn, what follows it is not asked. (Evaluation takes only rows that end with an answer and have the
truth among their facts.)

    user: how many?   assistant: <think>one, two.</think>\\boxed{2}   user: thanks!
    `with_thinking`:  user: how many? {think prompt}   assistant: <think>one, two.</think>\\boxed{2}
    `truth_of`: 2     `chain_of`: one, two.

Legend: T tokens of a document, n tiles, H x W pixels, p patch size.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

import numpy as np

from data.images import frames_of, open_image
from data.sample import BadSample, Document, Message, Sample, Video
from data.tiling import tiles_of
from graders import BOX, accepted_truths, grader_of
from tokenizer import Tokenizer
from vlm import VLMConfig

# What a supervised token counts: see `Encoder`.
WEIGHTINGS = ("token", "sequence", "sample", "sqrt")


@dataclass(frozen=True)
class Encoder:
    """Sample -> Document, for one model. `root` is where relative image paths start; `max_length`
    in tokens (no limit unless given: a stage gives its rows' length).

    everything: supervise every text token, not only answers (language-model pre-training). long:
    what becomes of a sample over `max_length`: "drop", or "truncate" when all that goes is text
    after the last image. weighting: each token counts 1 ("token", "sequence"), 1/n ("sample") or
    1/sqrt(n) ("sqrt"), n the supervised tokens of its sample. ("sequence" differs in what the sum
    is divided by: see `steps.Batches`.) Raises ValueError for other words.
    """

    tokenizer: Tokenizer
    config: VLMConfig
    root: Path | None = None
    max_length: int = sys.maxsize
    everything: bool = False
    weighting: str = "token"
    long: str = "drop"

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"--weighting {self.weighting!r}: choose from {', '.join(WEIGHTINGS)}")
        if self.long not in ("drop", "truncate"):
            raise ValueError(f"--long {self.long!r}: choose drop or truncate")

    def images(self, sample: Sample) -> tuple[list[np.ndarray], list[int]]:
        """Arrays of all tiles of all images, and the number of visual tokens of each image part."""
        # pictures, and whether they are frames: the released prompt announces those
        parts = [part for message in sample.messages for part in message.parts]
        pictures = [part for part in parts if not isinstance(part, str)]
        texts = [part for part in parts if isinstance(part, str)]
        video = any(text.endswith("Frame-1: ") for text in texts)

        # InternVL's rule: the dataset's tiles are shared by the images of a sample
        config = self.config
        if sample.max_tiles and pictures:
            share = max(1, sample.max_tiles // len(pictures))
            config = replace(config, max_tiles=share)

        # one visual token for each 2 x 2 patches of a tile
        per_token = (2 * config.vision.patch_size) ** 2
        arrays, counts = [], []
        for picture in pictures:
            image = open_image(picture, sample.root or self.root, sample.origin)
            tiles = [np.asarray(t) for t in tiles_of(image, config, len(pictures), video)]
            arrays += tiles
            counts.append(sum(t.shape[0] * t.shape[1] for t in tiles) // per_token)
        return arrays, counts

    def unrolled(self, sample: Sample) -> Sample:
        """Videos become numbered frames."""
        return with_numbered_frames(sample, self.root)

    def prompt(self, sample: Sample, reply: bool = False) -> tuple[list[int], list[np.ndarray]]:
        """Ids up to the assistant's opening, and the images: everything before the last assistant
        turn. reply: everything, to answer the end of a conversation.

        Raises BadSample when there is nothing before it, or a picture cannot be read.
        """
        asked = sample.messages if reply else question_turns(sample)
        sample = self.unrolled(replace(sample, messages=asked))
        arrays, counts = self.images(sample)
        ids, _ = self.tokenizer.render(sample.messages, counts, prompt_only=True)
        return ids, arrays

    def __call__(self, sample: Sample) -> Document:
        """Raises BadSample when the sample is too long or has nothing to learn from."""
        # ids, and which of them an answer consists of
        tokenizer = self.tokenizer
        sample = self.unrolled(sample)
        arrays, counts = self.images(sample)
        ids, supervised = tokenizer.render(sample.messages, counts)

        # a sample over the limit is dropped, or loses text of its end, but never half of an image
        if len(ids) > self.max_length:
            cuts_image = tokenizer.special["</img>"] in ids[self.max_length - 1 :]
            if self.long == "drop" or cuts_image:
                raise BadSample(
                    "too long",
                    f"{sample.origin}: {len(ids)} tokens, the limit is {self.max_length}",
                )
            ids = ids[: self.max_length]
            supervised = supervised[: self.max_length]
        ids = np.array(ids, dtype=np.int64)  # (T,)

        # labels: each position is asked for the next token, if that one is to be learned
        learn = np.array(supervised)
        if self.everything:
            visual = (tokenizer.image, tokenizer.special["<img>"], tokenizer.special["</img>"])
            learn = ~np.isin(ids, visual)
        labels = np.full(len(ids), -100, dtype=np.int64)  # (T,)
        labels[:-1][learn[1:]] = ids[1:][learn[1:]]
        n = int((labels >= 0).sum())
        if n == 0:
            raise BadSample(
                "nothing to learn", f"{sample.origin}: no supervised token (no assistant turn?)"
            )

        # what each of them counts, and what the ViT has to do for this sample
        weight = {"sample": 1.0 / n, "sqrt": n**-0.5}.get(self.weighting, 1.0)
        weights = np.where(labels >= 0, weight, 0.0).astype(np.float32)
        vision = sum(self.config.vision.work(a.shape[0] * a.shape[1]) for a in arrays)
        return Document(
            ids,
            labels,
            weights,
            tuple(arrays),
            sample.task,
            sample.origin,
            sample.facts,
            vision=vision,
        )


def with_numbered_frames(sample: Sample, root: Path | None = None) -> Sample:
    """The sample, its videos as frames, each announced by its number. Raises BadSample."""

    def parts(message: Message) -> Iterator:
        for part in message.parts:
            if not isinstance(part, Video):
                yield part
                continue
            frames = frames_of(part, sample.root or root, sample.origin)
            for i, frame in enumerate(frames, 1):
                yield from (f"Frame-{i}: ", frame, "\n")

    # a sample without any stays what it is
    if not any(isinstance(part, Video) for m in sample.messages for part in m.parts):
        return sample
    messages = (replace(m, parts=tuple(parts(m))) for m in sample.messages)
    return replace(sample, messages=tuple(messages))


# ------------------------------------------------------------------------------- question and truth


def last_answer(sample: Sample) -> int | None:
    """The place of the last assistant turn, None when there is none."""
    places = [i for i, m in enumerate(sample.messages) if m.role == "assistant"]
    return places[-1] if places else None


def question_turns(sample: Sample) -> tuple[Message, ...]:
    """The turns before the last assistant turn; all of them when nobody has answered. Raises
    BadSample when there are none."""
    asked = sample.messages[: last_answer(sample)]
    if not asked:
        raise BadSample("no question", f"{sample.origin}: nothing stands before the answer")
    return asked


def truth_of(sample: Sample) -> str | list[str]:
    """The right answer: `facts["answer"]`, else the text of the last assistant turn; of a box its
    content. A list, when several answers are accepted. Raises BadSample when there is none."""
    # what is known, else what was said
    truth = sample.facts.get("answer")
    if truth is None:
        at = last_answer(sample)
        truth = "" if at is None else text_of_message(sample.messages[at])

    # as text, without boxes; files hold numbers and true or false as well
    accepted = accepted_truths(truth)
    if not accepted:
        raise BadSample(
            "no truth", f'{sample.origin}: neither facts["answer"] nor an assistant turn with text'
        )
    return accepted if isinstance(truth, (list, tuple)) else accepted[0]


def known_grader(sample: Sample) -> str:
    """The name of the sample's grader (graders.grader_of). Raises BadSample for one that there is not."""
    try:
        return grader_of(sample.facts)
    except ValueError as error:
        raise BadSample("unknown grader", f"{sample.origin}: {error}") from None


def chain_of(sample: Sample) -> str:
    """The reference chain of thought: that of the last assistant turn, else `facts["chain"]`, ""
    for none."""
    at = last_answer(sample)
    own = None if at is None else sample.messages[at].think
    return str(own or sample.facts.get("chain") or "")


def text_of_message(message: Message) -> str:
    return "".join(part for part in message.parts if isinstance(part, str)).strip()


def with_thinking(sample: Sample, think_prompt: str) -> Sample:
    """The last question with the request to think, answered by chain and box: what RL, long-CoT and
    evaluation ask for.

    An answer that has its box already keeps its words; any other becomes a box around the truth.
    The truth and the chain are also in the facts. Raises BadSample when there is no question by a
    user, or no truth.
    """
    truth = truth_of(sample)
    chain = chain_of(sample)
    facts = sample.facts | {"answer": truth}
    if chain:
        facts["chain"] = chain

    # the request stands at the end of the last question
    asked = list(question_turns(sample))
    users = [i for i, m in enumerate(asked) if m.role == "user"]
    if not users:
        raise BadSample("no question", f"{sample.origin}: no user's turn before the answer")
    question = asked[users[-1]]
    *before, last = question.parts or ("",)
    if isinstance(last, str):
        parts = (*before, f"{last} {think_prompt}")
    else:
        parts = (*before, last, think_prompt)
    asked[users[-1]] = replace(question, parts=parts)

    # the answer: one box
    at = last_answer(sample)
    said = "" if at is None else text_of_message(sample.messages[at])
    if BOX not in said:
        said = f"\\boxed{{{truth if isinstance(truth, str) else truth[0]}}}"
    answer = Message("assistant", (said,), think=chain)
    return replace(sample, messages=(*asked, answer), facts=facts)
