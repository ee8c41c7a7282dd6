"""From a file on disk to a `Document`: the only shapes in which data travels.

What it teaches: every dataset format is a different spelling of one thing, messages with text and image parts. A reader
turns a file into `Sample`s; `Encoder` turns a Sample into a `Document` of ids, labels and pixels. Whatever is wrong with a
sample ends here, counted by reason (`Faults`), and costs that sample alone.

    LLaVA JSON/JSONL + image folder --+
                       world.sample --+--> Sample --Encoder--> Document --> packing.py

Labels are shifted here, per document and before packing: position t is asked for token t + 1, so no document is ever asked
for the first token of its neighbour. `python data.py --data my.jsonl --images dir/` shows what the model will see.

Legend: T tokens of a document, n tiles, H x W pixels, p patch size.
"""
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps

from tiling import prepare
from tokenizer import Tokenizer
from vlm import VLMConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS, MAX_ASPECT = 64_000_000, 200
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the released preprocessor
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


class BadSample(ValueError):
    """A sample that cannot be used: `reason` is a short class to count by, the message says where and what to do."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both, so that it can travel between processes
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@dataclass(frozen=True)
class Message:
    """role: system, user or assistant. parts: text (str) or images (PIL image, or a path). think: the chain before the
    answer, None for none. learn: whether an assistant turn's answer is supervised."""
    role: str
    parts: tuple
    think: str | None = None
    learn: bool = True


@dataclass(frozen=True)
class Sample:
    """What every reader yields. task: a label to count and mix by; origin: file and line, for messages; facts: truth for
    grading (never shown to the model)."""
    messages: tuple[Message, ...]
    task: str = ""
    origin: str = ""
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A Sample as the model takes it. ids (T,), labels (T,) already shifted and -100 where unsupervised, weights (T,),
    images: uint8 arrays (H, W, 3) in order; every tile is an image of its own. number: its place in the stream."""
    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    images: tuple[np.ndarray, ...]
    task: str
    origin: str
    facts: dict
    number: int = -1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def vision(self) -> int:
        """Pixels: what the ViT's work is proportional to."""
        return sum(a.shape[0] * a.shape[1] for a in self.images)


@dataclass
class Faults:
    """Counts what was left out, with one example of each reason. `strict` makes the first fault an error."""
    strict: bool = False
    counts: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)

    def add(self, e: BadSample) -> None:
        if self.strict:
            raise e
        self.counts[e.reason] += 1
        self.examples.setdefault(e.reason, str(e))

    def report(self) -> str:
        return "\n".join(f"  skipped {n} x {reason}; first: {self.examples[reason]}" for reason, n in self.counts.most_common())


# ---------------------------------------------------------------------------------------------------------------- images

def open_image(source, root: Path | None = None, origin: str = "") -> Image.Image:
    """A decoded RGB image. Transparency goes on white, EXIF rotation is applied, 16-bit greys are scaled, not clipped.

    Raises BadSample for a missing, foreign, truncated or oversized file, or a path that leads out of `root`.
    """
    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" else to_rgb(source)
    try:
        path = Path(root, source) if root is not None else Path(source)
        if root is not None and not path.resolve().is_relative_to(Path(root).resolve()):
            raise BadSample("path outside the image folder", f"{origin}: {source}")
        if not path.is_file():
            raise BadSample("missing image", f"{origin}: no file {path}")
        with Image.open(path, formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or max(w, h) > MAX_ASPECT * min(w, h):
                raise BadSample("oversized image", f"{origin}: {path} is {w}x{h}")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as e:  # RuntimeError: a link to itself
        raise BadSample("unreadable image", f"{origin}: {source!r:.200}: {e}") from e


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel: convert("RGB") would clip nearly all of them to white
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def normalise(images: list[np.ndarray]) -> torch.Tensor | list[torch.Tensor]:
    """uint8 (H, W, 3) each -> (N, 3, H, W) float when all are equal in size, else a list of (3, H_i, W_i)."""
    mean, std = torch.tensor(MEAN)[:, None, None] * 255, torch.tensor(STD)[:, None, None] * 255
    if len({i.shape for i in images}) == 1:
        return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() - mean) / std
    return [(torch.from_numpy(i.copy()).permute(2, 0, 1).float() - mean) / std for i in images]


# --------------------------------------------------------------------------------------------------------------- encoder

@dataclass(frozen=True)
class Encoder:
    """Sample -> Document, for one model. `root` is where relative image paths start; `max_length` in tokens.

    everything: supervise every text token, not only answers (language-model pre-training).
    weighting: each token counts 1 ("token"), 1/n ("sample") or 1/sqrt(n) ("sqrt"), n the supervised tokens of its sample.
    """
    tokenizer: Tokenizer
    config: VLMConfig
    root: Path | None = None
    max_length: int = 8192
    everything: bool = False
    weighting: str = "token"

    def images(self, sample: Sample) -> tuple[list[np.ndarray], list[int]]:
        """Arrays of all tiles of all images, and the number of visual tokens of each image part."""
        arrays, counts = [], []
        parts = [p for m in sample.messages for p in m.parts]
        pictures = [p for p in parts if not isinstance(p, str)]
        video = any(isinstance(p, str) and p.endswith("Frame-1: ") for p in parts)  # as the released prompt announces frames
        for picture in pictures:
            pieces = prepare(open_image(picture, self.root, sample.origin), self.config, len(pictures), video)
            pieces = [np.asarray(p) for p in pieces]
            arrays += pieces
            counts.append(sum(a.shape[0] * a.shape[1] for a in pieces) // (2 * self.config.vision.patch_size) ** 2)
        return arrays, counts

    def prompt(self, sample: Sample) -> tuple[list[int], list[np.ndarray]]:
        """Ids up to the assistant's opening, and the images: everything before the last assistant turn."""
        asked = sample.messages[:-1] if sample.messages[-1].role == "assistant" else sample.messages
        arrays, counts = self.images(Sample(asked, origin=sample.origin))
        return self.tokenizer.render(asked, counts, prompt_only=True)[0], arrays

    def __call__(self, sample: Sample) -> Document:
        """Raises BadSample when the sample is too long or has nothing to learn from."""
        arrays, counts = self.images(sample)
        ids, supervised = self.tokenizer.render(sample.messages, counts)
        if len(ids) > self.max_length:
            raise BadSample("too long", f"{sample.origin}: {len(ids)} tokens, the limit is {self.max_length}")
        t = self.tokenizer
        ids = np.array(ids, dtype=np.int64)
        learn = np.array(supervised) if not self.everything else ~np.isin(ids, (t.image, t.special["<img>"], t.special["</img>"]))
        labels = np.full(len(ids), -100, dtype=np.int64)
        labels[:-1][learn[1:]] = ids[1:][learn[1:]]
        n = int((labels >= 0).sum())
        if n == 0:
            raise BadSample("nothing to learn", f"{sample.origin}: no supervised token (no assistant turn?)")
        weight = {"token": 1.0, "sample": 1.0 / n, "sqrt": n ** -0.5}[self.weighting]
        weights = np.where(labels >= 0, weight, 0.0).astype(np.float32)
        return Document(ids, labels, weights, tuple(arrays), sample.task, sample.origin, sample.facts)


# --------------------------------------------------------------------------------------------------------------- readers

def read_llava(path) -> Iterator[Sample | BadSample]:
    """LLaVA / ShareGPT conversations, as one JSON list or as JSONL: `image` (str, list or absent) and
    `conversations: [{from: human|gpt, value}]`. Optional `task`, and `facts` for grading. Faults are yielded, not raised."""
    path = Path(path)
    with open(path, "rb") as f:
        first = f.read(1)
        while first.isspace():
            first = f.read(1)
        if first == b"\xef":  # a byte order mark
            first = f.read(3)[2:]
    if first == b"[":
        try:
            rows = enumerate(json.loads(path.read_text("utf-8-sig")), 1)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not a JSON list ({e})") from e
    else:
        rows = ((n, line) for n, line in enumerate(open(path, "rb"), 1) if line.strip())
    for n, row in rows:
        origin = f"{path.name}:{n}"
        try:
            yield llava_sample(json.loads(row) if isinstance(row, bytes) else row, origin)
        except BadSample as e:
            yield e
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
            yield BadSample("malformed record", f"{origin}: {type(e).__name__} {e}")


def llava_sample(row: dict, origin: str) -> Sample:
    """One record. `<image>` marks where an image goes; a lone image without a mark goes first."""
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else list(images)
    turns = [({"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}[t["from"]],
              t["value"]) for t in row["conversations"]]
    marks = sum(text.count("<image>") for role, text in turns if role == "user")
    asked = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if marks == 0 and len(images) == 1 and asked:
        at = asked[0]
        turns[at], marks = ("user", "<image>\n" + turns[at][1]), 1
    if marks != len(images):
        raise BadSample("wrong placeholder count", f"{origin}: {marks} <image> marks for {len(images)} images")
    if not any(role == "assistant" for role, _ in turns):
        raise BadSample("no answer", f"{origin}: no assistant turn")
    if any(role == "assistant" and not text.strip() for role, text in turns):
        raise BadSample("empty answer", f"{origin}: an assistant turn is empty")
    queue, messages = iter(images), []
    for role, text in turns:
        text.encode()  # refuses lone surrogates
        think, parts = None, []
        if role == "assistant" and (m := THINKING.fullmatch(text)):
            think, text = m.groups()
        for piece in re.split("(<image>)", text) if role == "user" else [text]:
            if piece:
                parts.append(Path(next(queue)) if piece == "<image>" and role == "user" else piece)
        messages.append(Message(role, tuple(parts), think))
    answer = "".join(p for p in messages[-1].parts if isinstance(p, str))
    task, facts = row.get("task", ""), row.get("facts", {"answer": answer})
    if not isinstance(task, str) or not isinstance(facts, dict):
        raise TypeError("`task` must be a string and `facts` an object")
    return Sample(tuple(messages), task, origin, facts)


def with_thinking(sample: Sample, think_prompt: str) -> Sample:
    """The last question with the request to think; its answer becomes chain and box (`facts["chain"]` holds the chain)."""
    *history, user, _ = sample.messages
    *before, last = user.parts
    parts = (*before, f"{last} {think_prompt}") if isinstance(last, str) else (*user.parts, think_prompt)
    asked = Message("user", parts)
    answer = Message("assistant", (f"\\boxed{{{sample.facts['answer']}}}",), think=sample.facts.get("chain", ""))
    return Sample((*history, asked, answer), sample.task, sample.origin, sample.facts)


class Folder:
    """Samples of a JSON/JSONL file, each once an epoch, in a new order each time; the order is a function of the seed.

    Simplified: the records are held in memory (pixels are not); images are decoded when a sample is used.
    """

    def __init__(self, path, images=None, strict: bool = False):
        self.path, self.root = Path(path), Path(images) if images else Path(path).parent
        if not self.path.is_file():
            raise ValueError(f"--data {path}: no such file")
        self.faults, self.samples = Faults(strict), []
        for s in read_llava(self.path):
            self.faults.add(s) if isinstance(s, BadSample) else self.samples.append(s)
        if not self.samples:
            raise ValueError(f"{self.path}: 0 usable samples\n{self.faults.report()}")

    def stream(self, mixture: dict[str, float], seed: int, turns: int = 0) -> Iterator[Sample]:
        """Endless. Tasks named in the mixture are drawn by weight; a file without any of those tasks is used whole.
        `turns` is for sources that make their questions: a file has those that it has."""
        groups: dict[str, list[Sample]] = {}
        for s in self.samples:
            groups.setdefault(s.task, []).append(s)
        wanted = {t: w for t, w in mixture.items() if t in groups} or {t: len(g) for t, g in groups.items()}
        rng = random.Random(f"{seed}")
        queues: dict[str, list[Sample]] = {t: [] for t in wanted}
        while True:
            task = rng.choices(list(wanted), list(wanted.values()))[0]
            if not queues[task]:
                queues[task] = rng.sample(groups[task], len(groups[task]))
            yield queues[task].pop()


# ------------------------------------------------------------------------------------------------------------------ show

def coloured(document: Document, tokenizer: Tokenizer) -> str:
    """The document's text; supervised tokens in green."""
    out = []
    for i, token in enumerate(document.ids):
        learn = i > 0 and document.labels[i - 1] == token
        text = tokenizer.decode([token])
        if token == tokenizer.image:
            if document.ids[i - 1] == token:
                continue
            text = "<IMG_CONTEXT>..."
        out.append(f"\033[32m{text}\033[0m" if learn else text)
    return "".join(out)


@dataclass
class Show:
    """Show samples as the model will see them, and count what cannot be used."""
    data: Path  # LLaVA JSON or JSONL
    images: Path | None = None  # folder of the images; default: beside the file
    model: Path | None = None  # a model directory, for its tokenizer and sizes; default: the toy's sizes, bytes as tokens
    show: int = 3  # samples to print; their tiles are written to `out`
    check: bool = False  # walk the whole file and report counts, lengths and faults
    strict: bool = False  # make the first fault an error
    out: Path = Path("runs/show")


def main(o: Show) -> int:
    from vlm import PRESETS
    import weights
    folder = Folder(o.data, o.images, o.strict)
    tokenizer = Tokenizer.load(o.model) if o.model else Tokenizer({bytes([b]): b for b in range(256)}, "")
    config = VLMConfig.from_dict(weights.read_config(o.model)) if o.model else PRESETS["toy"]
    encoder = Encoder(tokenizer, config, folder.root)
    o.out.mkdir(parents=True, exist_ok=True)
    lengths = []
    for n, sample in enumerate(folder.samples if o.check else folder.samples[: o.show]):
        try:
            document = encoder(sample)
        except BadSample as e:
            folder.faults.add(e)
            continue
        lengths.append(len(document))
        if n < o.show:
            print(f"--- {document.origin}: {len(document)} tokens, {len(document.images)} tiles\n{coloured(document, tokenizer)}\n")
            for i, array in enumerate(document.images):
                Image.fromarray(array).save(o.out / f"{n}-{i}.png")
    print(f"{len(lengths)} of {len(lengths) + folder.faults.counts.total()} samples usable; "
          f"tokens mean {np.mean(lengths or [0]):.0f}, longest {max(lengths, default=0)}")
    print(folder.faults.report())
    return os.EX_OK if lengths else os.EX_DATAERR


if __name__ == "__main__":
    import tyro
    sys.exit(main(tyro.cli(Show)))
