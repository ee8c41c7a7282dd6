"""The shapes in which data travels: `Sample` as readers yield it, `Document` as the model takes it, and `Faults`.

Legend: T tokens of a document, H x W pixels.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

THINKING = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


class BadSample(ValueError):
    """A sample that cannot be used: `reason` is a short class to count by, the message says where and what to do."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both, so that it can travel between processes
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@dataclass(frozen=True)
class Video:
    """Frames: a tuple of images, a folder of them (by name), or an animated GIF or WebP. At most `most`, evenly spaced (our choice)."""

    source: object
    most: int = 8


@dataclass(frozen=True)
class Message:
    """role: system, user or assistant. parts: text (str), images (PIL image, path, or a file's bytes) and Videos. think: the chain before the
    answer, None for none. learn: whether an assistant turn's answer is supervised."""

    role: str
    parts: tuple
    think: str | None = None
    learn: bool = True


@dataclass(frozen=True)
class Sample:
    """What every reader yields. task: a label to count and mix by; origin: file and record, for messages; facts: truth for
    grading (never shown to the model). root: where its image paths start (None: the encoder's); max_tiles: for all of its images
    together (0: as many as the model takes for each)."""

    messages: tuple[Message, ...]
    task: str = ""
    origin: str = ""
    facts: dict = field(default_factory=dict)
    root: Path | None = None
    max_tiles: int = 0


@dataclass(frozen=True)
class Document:
    """A Sample as the model takes it. ids (T,), labels (T,) already shifted and -100 where unsupervised, weights (T,),
    images: uint8 arrays (H, W, 3) in order; every tile is an image of its own. number: its place in the stream; vision: the
    ViT's work for its images, which packing shares out evenly (`ViTConfig.work`)."""

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    images: tuple[np.ndarray, ...]
    task: str
    origin: str
    facts: dict
    number: int = -1
    vision: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Faults:
    """Counts what was left out, with one example of each reason. `strict` makes the first fault an error."""

    strict: bool = False
    counts: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)
    tracebacks: dict = field(
        default_factory=dict
    )  # reason -> of its first, where nobody foresaw it

    def add(self, e: BadSample) -> None:
        if self.strict:
            raise e
        self.counts[e.reason] += 1
        self.examples.setdefault(e.reason, str(e))
        if hasattr(e, "traceback"):
            self.tracebacks.setdefault(e.reason, e.traceback)

    def report(self) -> str:
        return "\n".join(
            f"  skipped {n} x {reason}; first: {self.examples[reason]}"
            for reason, n in self.counts.most_common()
        )
