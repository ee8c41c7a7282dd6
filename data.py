"""From a file on disk to a `Document`: the only shapes in which data travels.

What it teaches: every dataset format is a different spelling of one thing, messages with text and image parts. A reader
turns a file into `Sample`s; `Encoder` turns a Sample into a `Document` of ids, labels and pixels. Whatever is wrong with a
sample ends here, counted by reason (`Faults`), and costs that sample alone.

    readers.py: files on disk --+
         world.py: a drawn one --+--> Sample --Encoder--> Document --stream.py--> packing.py

Labels are shifted here, per document and before packing: position t is asked for token t + 1, so no document is ever asked
for the first token of its neighbour. `python data.py --data my.jsonl --images dir/` shows what the model will see.

Legend: T tokens of a document, n tiles, H x W pixels, p patch size.
"""
import io
import itertools
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps

from tiling import prepare
from tokenizer import Tokenizer
from vlm import VLMConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no other parser ever sees a user's file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
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

    def add(self, e: BadSample) -> None:
        if self.strict:
            raise e
        self.counts[e.reason] += 1
        self.examples.setdefault(e.reason, str(e))

    def report(self) -> str:
        return "\n".join(f"  skipped {n} x {reason}; first: {self.examples[reason]}" for reason, n in self.counts.most_common())


# ---------------------------------------------------------------------------------------------------------------- images

def inside(source, root: Path | None, origin: str) -> Path:
    """The path of an image. Raises BadSample when it leads out of `root`: by `..`, by being absolute, or through a link."""
    path = Path(root, source) if root is not None else Path(source)
    if root is not None and not path.resolve().is_relative_to(Path(root).resolve()):
        raise BadSample("path outside the image folder", f"{origin}: {source}")
    return path


def decoded(source, root: Path | None, origin: str, most: int = 1) -> list[Image.Image]:
    """Up to `most` evenly spaced frames of an image file (a path, or the file's bytes), as RGB.

    Raises BadSample for a missing, foreign, truncated or oversized file, or a path that leads out of `root`.
    """
    try:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else inside(source, root, origin)
        if not isinstance(source, bytes) and not name.is_file():
            raise BadSample("missing image", f"{origin}: no file {name}")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else name, formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or max(w, h) > MAX_ASPECT * min(w, h):
                raise BadSample("oversized image", f"{origin}: {name} is {w}x{h}")
            frames = []
            for i in spread(getattr(image, "n_frames", 1), most):
                if i:
                    image.seek(i)
                image.load()
                frames.append(to_rgb(ImageOps.exif_transpose(image)))
            return frames
    except BadSample:
        raise
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as e:  # RuntimeError: a link to itself
        raise BadSample("unreadable image", f"{origin}: {source!r:.200}: {e}") from e


def open_image(source, root: Path | None = None, origin: str = "") -> Image.Image:
    """An RGB image (the first frame of an animation). Transparency goes on white, EXIF rotation is applied, 16-bit greys are
    scaled, not clipped. Raises BadSample as `decoded` does."""
    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" else to_rgb(source)
    return decoded(source, root, origin)[0]


def frames_of(video: Video, root: Path | None, origin: str) -> list[Image.Image]:
    """Raises BadSample when there is no frame, or a bad one."""
    source = video.source
    try:
        if isinstance(source, Path) and (folder := inside(source, root, origin)).is_dir():
            source = tuple(Path(source, p.name) for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES)
    except (OSError, ValueError, RuntimeError) as e:
        raise BadSample("unreadable image", f"{origin}: {source!r:.200}: {e}") from e
    if not isinstance(source, tuple):
        return decoded(source, root, origin, video.most)
    if not source:
        raise BadSample("missing image", f"{origin}: a video without frames")
    return [open_image(source[i], root, origin) for i in spread(len(source), video.most)]


def spread(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0..n-1, evenly spaced, the first and the last among them."""
    return list(range(n)) if n <= most else [round(i * (n - 1) / max(1, most - 1)) for i in range(most)]


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
        video = any(isinstance(p, str) and p.endswith("Frame-1: ") for p in parts)  # as the released prompt announces frames
        config = self.config
        if sample.max_tiles and pictures:  # InternVL's rule: the dataset's tiles are shared by the images of a sample
            config = replace(config, max_tiles=max(1, sample.max_tiles // len(pictures)))
        for picture in pictures:
            pieces = prepare(open_image(picture, sample.root or self.root, sample.origin), config, len(pictures), video)
            pieces = [np.asarray(p) for p in pieces]
            arrays += pieces
            counts.append(sum(a.shape[0] * a.shape[1] for a in pieces) // (2 * self.config.vision.patch_size) ** 2)
        return arrays, counts

    def unrolled(self, sample: Sample) -> Sample:
        """Videos become numbered frames."""
        def parts(message: Message) -> Iterator:
            for part in message.parts:
                if not isinstance(part, Video):
                    yield part
                    continue
                for i, frame in enumerate(frames_of(part, sample.root or self.root, sample.origin), 1):
                    yield from (f"Frame-{i}: ", frame, "\n")
        if not any(isinstance(p, Video) for m in sample.messages for p in m.parts):
            return sample
        return replace(sample, messages=tuple(replace(m, parts=tuple(parts(m))) for m in sample.messages))

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
            if self.long == "drop" or t.special["</img>"] in ids[self.max_length - 1:]:
                raise BadSample("too long", f"{sample.origin}: {len(ids)} tokens, the limit is {self.max_length}")
            ids, supervised = ids[:self.max_length], supervised[:self.max_length]
        ids = np.array(ids, dtype=np.int64)
        learn = np.array(supervised) if not self.everything else ~np.isin(ids, (t.image, t.special["<img>"], t.special["</img>"]))
        labels = np.full(len(ids), -100, dtype=np.int64)
        labels[:-1][learn[1:]] = ids[1:][learn[1:]]
        n = int((labels >= 0).sum())
        if n == 0:
            raise BadSample("nothing to learn", f"{sample.origin}: no supervised token (no assistant turn?)")
        weight = {"token": 1.0, "sample": 1.0 / n, "sqrt": n ** -0.5}[self.weighting]
        weights = np.where(labels >= 0, weight, 0.0).astype(np.float32)
        vision = sum(self.config.vision.work(a.shape[0] * a.shape[1]) for a in arrays)
        return Document(ids, labels, weights, tuple(arrays), sample.task, sample.origin, sample.facts, vision=vision)


def with_thinking(sample: Sample, think_prompt: str) -> Sample:
    """The last question with the request to think; its answer becomes chain and box (`facts["chain"]` holds the chain)."""
    *history, user, _ = sample.messages
    *before, last = user.parts
    parts = (*before, f"{last} {think_prompt}") if isinstance(last, str) else (*user.parts, think_prompt)
    asked = Message("user", parts)
    answer = Message("assistant", (f"\\boxed{{{sample.facts['answer']}}}",), think=sample.facts.get("chain", ""))
    return replace(sample, messages=(*history, asked, answer))


# ------------------------------------------------------------------------------------------------------------------ show

def coloured(document: Document, tokenizer: Tokenizer) -> str:
    """The document's text; supervised tokens in green."""
    learn, out = np.append(False, document.labels[:-1] >= 0), []
    for (green, image), run in itertools.groupby(range(len(document)), lambda i: (learn[i], document.ids[i] == tokenizer.image)):
        text = "<IMG_CONTEXT>..." if image else tokenizer.decode([int(document.ids[i]) for i in run])
        out.append(f"\033[32m{text}\033[0m" if green else text)
    return "".join(out)


@dataclass
class Show:
    """Show samples as the model will see them (supervised tokens in green), and count what cannot be used."""
    data: Path  # JSON, JSONL, TSV, tar, parquet, a folder of them, or a mixture file: see readers.py
    images: Path | None = None  # folder of the images; default: beside the file
    model: Path | None = None  # a model directory, for its tokenizer and sizes; default: the toy's sizes, bytes as tokens
    show: int = 3  # samples to print; their tiles are written to `out`
    check: bool = False  # walk through everything and report counts, lengths and faults
    max_length: int = 8192  # tokens of a sample
    strict: bool = False  # make the first fault an error
    out: Path = Path("runs/show")


def main(o: Show) -> int:
    import weights
    from readers import Folder
    from vlm import PRESETS
    folder = Folder(o.data, o.images, o.strict)
    tokenizer = Tokenizer.load(o.model) if o.model else Tokenizer({bytes([b]): b for b in range(256)}, "")
    config = VLMConfig.from_dict(weights.read_config(o.model)) if o.model else PRESETS["toy"]
    encoder = Encoder(tokenizer, config, folder.root, o.max_length)
    o.out.mkdir(parents=True, exist_ok=True)
    lengths, tasks = [], Counter()
    for i in range(len(folder)):
        if not o.check and len(lengths) >= o.show:
            break
        sample = folder[i]
        try:
            if isinstance(sample, BadSample):
                raise sample
            document = encoder(sample)
        except BadSample as e:
            folder.faults.add(e)
            continue
        if len(lengths) < o.show:
            print(f"--- {document.origin}: {len(document)} tokens, {len(document.images)} tiles\n{coloured(document, tokenizer)}\n")
            for k, array in enumerate(document.images):
                Image.fromarray(array).save(o.out / f"{len(lengths)}-{k}.png")
        lengths.append(len(document))
        tasks[document.task or "(none)"] += 1
    if o.check:
        parts = np.quantile(lengths or [0], (0.1, 0.5, 0.9)).astype(int).tolist()
        print(f"{len(lengths)} samples usable; tokens mean {np.mean(lengths or [0]):.0f}, longest {max(lengths, default=0)}, "
              f"a tenth are up to {parts[0]}, half up to {parts[1]}, nine tenths up to {parts[2]}")
        print("tasks: " + ", ".join(f"{task} {n}" for task, n in tasks.most_common()))
    print(f"{folder.faults.counts.total()} faults\n{folder.faults.report()}")
    return os.EX_OK if lengths else os.EX_DATAERR


if __name__ == "__main__":
    import tyro
    import data  # as a module, so that this file's classes are the ones that readers.py uses
    sys.exit(data.main(tyro.cli(data.Show)))
