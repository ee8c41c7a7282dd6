"""From a file on disk to a `Document`: the only shapes in which data travels.

What it teaches: every dataset format is a different spelling of one thing, messages with text and image parts. A reader
turns a file into `Sample`s; `Encoder` turns a Sample into a `Document` of ids, labels and pixels. Whatever is wrong with a
sample ends here, counted by reason (`Faults`), and costs that sample alone.

    data/readers.py: files on disk --+
         data/world.py: a drawn one --+--> Sample --Encoder--> Document --stream.py--> packing.py

Labels are shifted here, per document and before packing: position t is asked for token t + 1, so no document is ever asked
for the first token of its neighbour. `python encode.py --data my.jsonl --images dir/` shows what the model will see.

Legend: T tokens of a document, n tiles, H x W pixels, p patch size.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator

import numpy as np

from data.images import frames_of, open_image
from data.sample import BadSample, Document, Message, Sample, Video
from data.tiling import tiles_of
from tokenizer import Tokenizer
from vlm import VLMConfig

# ---------------------------------------------------------------------------------------------------------------- images


# --------------------------------------------------------------------------------------------------------------- encoder


@dataclass(frozen=True)
class Encoder:
    """Sample -> Document, for one model. `root` is where relative image paths start; `max_length` in tokens.

    everything: supervise every text token, not only answers (language-model pre-training).
    long: what becomes of a sample over `max_length`: "drop", or "truncate" when all that goes is text after the last image.
    weighting: each token counts 1 ("token"), 1/n ("sample") or 1/sqrt(n) ("sqrt"), n the supervised tokens of its sample.
    """

    tokenizer: Tokenizer
    config: VLMConfig
    root: Path | None = None
    max_length: int = 8192
    everything: bool = False
    weighting: str = "token"
    long: str = "drop"

    def images(self, sample: Sample) -> tuple[list[np.ndarray], list[int]]:
        """Arrays of all tiles of all images, and the number of visual tokens of each image part."""
        arrays, counts = [], []
        parts = [p for m in sample.messages for p in m.parts]
        pictures = [p for p in parts if not isinstance(p, str)]
        video = any(
            isinstance(p, str) and p.endswith("Frame-1: ") for p in parts
        )  # as the released prompt announces frames
        config = self.config
        if (
            sample.max_tiles and pictures
        ):  # InternVL's rule: the dataset's tiles are shared by the images of a sample
            config = replace(config, max_tiles=max(1, sample.max_tiles // len(pictures)))
        for picture in pictures:
            pieces = tiles_of(
                open_image(picture, sample.root or self.root, sample.origin),
                config,
                len(pictures),
                video,
            )
            pieces = [np.asarray(p) for p in pieces]
            arrays += pieces
            counts.append(
                sum(a.shape[0] * a.shape[1] for a in pieces)
                // (2 * self.config.vision.patch_size) ** 2
            )
        return arrays, counts

    def unrolled(self, sample: Sample) -> Sample:
        """Videos become numbered frames."""

        def parts(message: Message) -> Iterator:
            for part in message.parts:
                if not isinstance(part, Video):
                    yield part
                    continue
                for i, frame in enumerate(
                    frames_of(part, sample.root or self.root, sample.origin), 1
                ):
                    yield from (f"Frame-{i}: ", frame, "\n")

        if not any(isinstance(p, Video) for m in sample.messages for p in m.parts):
            return sample
        return replace(
            sample, messages=tuple(replace(m, parts=tuple(parts(m))) for m in sample.messages)
        )

    def prompt(self, sample: Sample) -> tuple[list[int], list[np.ndarray]]:
        """Ids up to the assistant's opening, and the images: everything before the last assistant turn."""
        sample = self.unrolled(sample)
        asked = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
        arrays, counts = self.images(replace(sample, messages=asked))
        return self.tokenizer.render(asked, counts, prompt_only=True)[0], arrays

    def __call__(self, sample: Sample) -> Document:
        """Raises BadSample when the sample is too long or has nothing to learn from."""
        t, sample = self.tokenizer, self.unrolled(sample)
        arrays, counts = self.images(sample)
        ids, supervised = t.render(sample.messages, counts)
        if len(ids) > self.max_length:
            if self.long == "drop" or t.special["</img>"] in ids[self.max_length - 1 :]:
                raise BadSample(
                    "too long",
                    f"{sample.origin}: {len(ids)} tokens, the limit is {self.max_length}",
                )
            ids, supervised = ids[: self.max_length], supervised[: self.max_length]
        ids = np.array(ids, dtype=np.int64)
        learn = (
            np.array(supervised)
            if not self.everything
            else ~np.isin(ids, (t.image, t.special["<img>"], t.special["</img>"]))
        )
        labels = np.full(len(ids), -100, dtype=np.int64)
        labels[:-1][learn[1:]] = ids[1:][learn[1:]]
        n = int((labels >= 0).sum())
        if n == 0:
            raise BadSample(
                "nothing to learn", f"{sample.origin}: no supervised token (no assistant turn?)"
            )
        weight = {"token": 1.0, "sample": 1.0 / n, "sqrt": n**-0.5}[self.weighting]
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


def with_thinking(sample: Sample, think_prompt: str) -> Sample:
    """The last question with the request to think; its answer becomes chain and box (`facts["chain"]` holds the chain)."""
    *history, user, _ = sample.messages
    *before, last = user.parts
    parts = (
        (*before, f"{last} {think_prompt}")
        if isinstance(last, str)
        else (*user.parts, think_prompt)
    )
    asked = Message("user", parts)
    answer = Message(
        "assistant", (f"\\boxed{{{sample.facts['answer']}}}",), think=sample.facts.get("chain", "")
    )
    return replace(sample, messages=(*history, asked, answer))
