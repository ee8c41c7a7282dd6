"""See what the model will see, and count what it cannot use: `python -m data.show --data my.jsonl --images dir/`."""

import itertools
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from data.encode import Encoder
from data.readers import Folder
from data.sample import BadSample, Document
from infra.config import read_config
from tokenizer import Tokenizer
from vlm import PRESETS, VLMConfig


def coloured(document: Document, tokenizer: Tokenizer) -> str:
    """The document's text; supervised tokens in green."""
    learn, out = np.append(False, document.labels[:-1] >= 0), []
    for (green, image), run in itertools.groupby(
        range(len(document)), lambda i: (learn[i], document.ids[i] == tokenizer.image)
    ):
        text = (
            "<IMG_CONTEXT>..." if image else tokenizer.decode([int(document.ids[i]) for i in run])
        )
        out.append(f"\033[32m{text}\033[0m" if green else text)
    return "".join(out)


@dataclass
class Show:
    """Show samples as the model will see them (supervised tokens in green), and count what cannot be used."""

    data: Path  # JSON, JSONL, TSV, tar, parquet, a folder of them, or a mixture file: see data/readers.py
    images: Path | None = None  # folder of the images; default: beside the file
    model: Path | None = (
        None  # a model directory, for its tokenizer and sizes; default: the toy's sizes, bytes as tokens
    )
    show: int = 3  # samples to print; their tiles are written to `out`
    check: bool = False  # walk through everything and report counts, lengths and faults
    max_length: int = 8192  # tokens of a sample
    strict: bool = False  # make the first fault an error
    out: Path = Path("runs/show")


def show_samples(o: Show) -> int:
    folder = Folder(o.data, o.images, o.strict)
    tokenizer = (
        Tokenizer.load(o.model) if o.model else Tokenizer({bytes([b]): b for b in range(256)}, "")
    )
    config = VLMConfig.from_dict(read_config(o.model)) if o.model else PRESETS["toy"]
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
            print(
                f"--- {document.origin}: {len(document)} tokens, {len(document.images)} tiles\n{coloured(document, tokenizer)}\n"
            )
            for k, array in enumerate(document.images):
                Image.fromarray(array).save(o.out / f"{len(lengths)}-{k}.png")
        lengths.append(len(document))
        tasks[document.task or "(none)"] += 1
    if o.check:
        parts = np.quantile(lengths or [0], (0.1, 0.5, 0.9)).astype(int).tolist()
        print(
            f"{len(lengths)} samples usable; tokens mean {np.mean(lengths or [0]):.0f}, longest {max(lengths, default=0)}, "
            f"a tenth are up to {parts[0]}, half up to {parts[1]}, nine tenths up to {parts[2]}"
        )
        print("tasks: " + ", ".join(f"{task} {n}" for task, n in tasks.most_common()))
    print(f"{folder.faults.counts.total()} faults\n{folder.faults.report()}")
    return os.EX_OK if lengths else os.EX_DATAERR


if __name__ == "__main__":
    sys.exit(show_samples(tyro.cli(Show)))
