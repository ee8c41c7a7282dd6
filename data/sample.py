"""The shapes in which data travels: messages, samples, documents, and the faults among them.

What it teaches: every dataset is a different spelling of one thing, messages with text and image
parts. Agree on that thing once, and formats, pictures, tokens and packing know nothing of each
other. What cannot be used is a value as well: a `BadSample` takes the place of the sample, says
why, and is counted; it never ends a run, and is never lost without a word.

    readers.py  one record of a file ----+                     +--> Document --> packing.py
    world.py    one drawn scene     -----+--> Sample --encode--+
                                         +--> BadSample -------+--> Faults: counts, examples

Legend: T tokens of a document, H x W pixels.
"""

import re
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from infra.text import printable

THINKING = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)

MAX_FRAMES = 16  # of a video, unless its dataset says otherwise (paper, Table 9)

LONGEST_DETAIL = 1000  # characters of a fault's message


class BadSample(ValueError):
    """A sample that cannot be used: `reason` is a short class to count by, `detail` says where and
    what to do.

    traceback: where the error behind it came from, "" when there is none. The detail is printable,
    whatever data it quotes.
    """

    def __init__(self, reason: str, detail: str):
        detail = printable(detail[:LONGEST_DETAIL])
        super().__init__(reason, detail)  # both, so that it can travel between processes
        self.reason = reason
        self.traceback = ""

    @classmethod
    def because(cls, error: Exception, reason: str, origin: str) -> "BadSample":
        """Any error as a fault of the record at `origin`; it keeps the error's traceback, for
        `Faults` to keep the first of each reason."""
        kind = type(error).__name__
        fault = cls(reason, f"{origin}: {kind} {str(error)[:300]}")
        fault.traceback = "".join(traceback.format_exception(error, limit=-8))
        return fault

    def at(self, origin: str) -> "BadSample":
        """The same fault with the place of its record."""
        fault = BadSample(self.reason, f"{origin}: {self.args[1]}")
        fault.traceback = self.traceback
        return fault

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@dataclass(frozen=True)
class Video:
    """source: a tuple of images, a folder of them (in natural order), or an animated GIF, WebP or PNG.

    At most `max_frames` of its frames are taken. sampling: "random" draws them (paper, section 6:
    "randomly sampled"), in order of time, the same ones for the same record (our choice); "even"
    spaces them evenly, the first and the last included.
    """

    source: object
    max_frames: int = MAX_FRAMES
    sampling: str = "random"


@dataclass(frozen=True)
class Message:
    """role: system, user or assistant. parts: text (str), images (PIL image, path, or a file's
    bytes) and Videos.

    think: the chain before the answer, None for none. learn: whether an assistant turn's answer is
    supervised.
    """

    role: str
    parts: tuple
    think: str | None = None
    learn: bool = True


@dataclass(frozen=True)
class Sample:
    """What every reader yields.

    task: a label to count and mix by. origin: file and record, for messages. root: the folder where
    its image paths start, and which they may not leave (None: the encoder's). max_tiles: for all of
    its images together (0: as many as the model takes for each). facts: what grading needs to know
    and the model is never shown:

        answer             the truth: a text, or a list of accepted texts
        chain              a reference chain of thought
        family, category   what a score is reported by
        question           the question without its options
        grader             a key of graders.GRADERS, or "judge" (RL, --judge-url); absent: "auto"
        index              a table's, by which rows of circular evaluation belong together
    """

    messages: tuple[Message, ...]
    task: str = ""
    origin: str = ""
    facts: dict = field(default_factory=dict)
    root: Path | None = None
    max_tiles: int = 0


@dataclass(frozen=True)
class Document:
    """A Sample as the model takes it.

    ids (T,); labels (T,), already shifted, -100 where unsupervised; weights (T,); images: uint8
    arrays (H, W, 3) in order, every tile is an image of its own. number: its place in the stream;
    vision: the ViT's work for its images, which packing shares out evenly (`ViTConfig.work`).
    """

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
    """Counts what was left out by reason, with the first example and the first traceback of each.

    `strict` makes the first fault an error.
    """

    strict: bool = False
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)

    def add(self, fault: BadSample) -> None:
        if self.strict:
            raise fault
        self.counts[fault.reason] += 1
        self.examples.setdefault(fault.reason, str(fault))
        if fault.traceback:
            self.tracebacks.setdefault(fault.reason, fault.traceback)

    def merge(self, other: "Faults") -> None:
        """Count what another has counted; the first examples stay."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples
        self.tracebacks = other.tracebacks | self.tracebacks

    def copy(self) -> "Faults":
        """The same, which stays as it is when more are counted."""
        twin = Faults(self.strict)
        twin.merge(self)
        return twin

    def become(self, other: "Faults") -> None:
        """Hold what another holds."""
        for own, new in zip(self.held(), other.held()):
            own.clear()
            own.update(new)

    def held(self) -> tuple[dict, dict, dict]:
        return self.counts, self.examples, self.tracebacks

    def report(self) -> str:
        """One line for each reason, the commonest first; nothing in it can steer a terminal."""
        lines = []
        for reason, n in self.counts.most_common():
            lines.append(f"  skipped {n} x {reason}; first: {printable(self.examples[reason])}")
        return "\n".join(lines)
