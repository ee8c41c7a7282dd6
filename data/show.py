"""See what the model will see, and count what it cannot use.

    python -m data.show --data my.jsonl --images dir/

What it teaches: most of what goes wrong in training has gone wrong in the data, and can be seen
before it costs a GPU an hour. The text is printed with its special tokens, what is supervised in
green; the tiles are written as pictures; and `--check` walks through everything that a run would
read.

    --data --> Folder --> Sample --Encoder--> Document --> text in colour, tiles, lengths, tasks, faults

Whatever comes from the data is printed without control characters: a caption cannot steer the terminal.
"""

import itertools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.encode import Encoder
from data.readers import Folder
from data.sample import BadSample, Document
from infra.cli import command
from infra.config import read_config
from infra.text import printable
from tokenizer import Tokenizer
from vlm import PRESETS, VLMConfig

GREEN = "\033[32m"
PLAIN = "\033[0m"


@dataclass
class ShowOptions:
    """Show samples as the model will see them (supervised tokens in green), and count what cannot
    be used."""

    data: Path  # JSON, JSONL, TSV, tar, parquet, a folder of them, or a mixture file: see data/readers.py
    images: Path | None = None  # folder of the images; default: beside the file
    # a model directory, for its tokenizer and sizes; default: the toy's, bytes as tokens
    model: Path | None = None
    show: int = 3  # samples to print; their tiles are written to `out`
    check: bool = False  # walk through everything and report counts, lengths and faults
    max_length: int = 8192  # tokens of a sample
    strict: bool = False  # make the first fault an error
    allow_outside: bool = False  # image paths, and a mixture file's, may lead out of their folder
    out: Path = Path("runs/show")


def coloured(document: Document, tokenizer: Tokenizer) -> str:
    """The document's text; supervised tokens in green."""
    learned = np.append(False, document.labels[:-1] >= 0)  # (T,)
    visual = document.ids == tokenizer.image  # (T,)

    def kind(place: int) -> tuple[bool, bool]:
        return bool(learned[place]), bool(visual[place])

    # runs of tokens of one kind
    pieces = []
    for (green, image), places in itertools.groupby(range(len(document)), kind):
        text = "<IMG_CONTEXT>..."
        if not image:
            text = printable(tokenizer.decode([int(document.ids[i]) for i in places]), lines=True)
        pieces.append(GREEN + text + PLAIN if green else text)
    return "".join(pieces)


def encode_or_count(folder: Folder, encoder: Encoder, i: int) -> Document | None:
    """Record i as a document; None when it cannot be used, which is counted."""
    sample = folder[i]
    fault = sample
    if not isinstance(sample, BadSample):
        try:
            return encoder(sample)
        except BadSample as error:
            fault = error
        except Exception as error:
            fault = BadSample.because(error, "cannot be encoded", sample.origin)
    folder.faults.add(fault)
    return None


def show_document(document: Document, tokenizer: Tokenizer, number: int, out: Path) -> None:
    """Print it, and write its tiles as pictures."""
    size = f"{len(document)} tokens, {len(document.images)} tiles"
    print(f"--- {printable(document.origin)}: {size}\n{coloured(document, tokenizer)}\n")
    for k, tile in enumerate(document.images):
        Image.fromarray(tile).save(out / f"{number}-{k}.png")


def show_samples(options: ShowOptions) -> int:
    folder = Folder(options.data, options.images, options.strict, options.allow_outside)

    # the model whose eyes we look through
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, "")
    config = PRESETS["toy"]
    if options.model:
        tokenizer = Tokenizer.load(options.model)
        config = VLMConfig.from_dict(read_config(options.model))
    encoder = Encoder(tokenizer, config, folder.root, options.max_length)
    options.out.mkdir(parents=True, exist_ok=True)

    # record by record; without --check, until enough are shown
    lengths = []
    tasks = Counter()
    for i in range(len(folder)):
        if not options.check and len(lengths) >= options.show:
            break
        document = encode_or_count(folder, encoder, i)
        if document is None:
            continue
        if len(lengths) < options.show:
            show_document(document, tokenizer, len(lengths), options.out)
        lengths.append(len(document))
        tasks[printable(document.task) or "(none)"] += 1

    # what a run would read, and what it would leave out
    if options.check:
        print_summary(lengths, tasks)
    print(f"{folder.faults.counts.total()} faults\n{folder.faults.report()}")
    return os.EX_OK if lengths else os.EX_DATAERR


def print_summary(lengths: list[int], tasks: Counter) -> None:
    """How many samples there are, how long, of which tasks."""
    known = lengths or [0]
    tenth, half, nine_tenths = np.quantile(known, (0.1, 0.5, 0.9)).astype(int).tolist()
    print(
        f"{len(lengths)} samples usable; tokens mean {np.mean(known):.0f}, longest {max(known)}, "
        f"a tenth are up to {tenth}, half up to {half}, nine tenths up to {nine_tenths}"
    )
    print("tasks: " + ", ".join(f"{task} {n}" for task, n in tasks.most_common()))


if __name__ == "__main__":
    command(show_samples)
