"""What full, balanced and early rows are worth: five measurements, each within one run.

What it teaches: a row that is half padding costs a whole row, and two ranks wait for the slower one.

    documents -> rows by three rules (padded, as they come, ours) -> seconds of a step, in turn

    python -m bench.rows packing   # training step: padded, as they come, ours; equal supervised tokens
    python -m bench.rows vision    # two ranks, any resolution: time of the slower rank's ViT
    python -m bench.rows decode    # JPEG to packed batch, samples a second, against what the model takes
    python -m bench.rows feed      # seconds that a step waits for its rows, without and with --workers
    python -m bench.rows memory    # bytes of a step of 64 rows on the host: floats at once, bytes in turn

Lengths are those of bench/packing_rules.py, a quarter as long. Times are CPU times of one thread, medians
over rounds; the rules take turns, so that a busy machine slows all of them.
"""

import io
import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
from PIL import Image
from tyro.conf import Positional

from bench.packing_rules import Size, example_sizes, naive
from data.encode import Encoder
from data.images import normalise
from data.readers import Folder
from data.sample import Document, Faults, Message, Sample
from data.steps import Batches, Step
from data.stream import Documents, Drawn
from data.world import World
from infra.cli import command
from infra.system import peak_memory
from objective import supervised
from packing import Batch, Rows, collate
from recipe import new_model
from stage import Stage
from tokenizer import Tokenizer
from vit import normalised
from vlm import PRESETS, SailVL

CAPACITY = 2048  # tokens of a row
SHORTER = 4  # how much shorter documents are than those of `packing_rules.example_sizes`


@dataclass
class RowsOptions:
    """packing, vision, decode, feed or memory."""

    what: Positional[Literal["packing", "vision", "decode", "feed", "memory"]]
    samples: int = 320
    rounds: int = 3
    seed: int = 0


# ----------------------------------------------------------------------------------------- time


def processor_seconds(work: Callable[[], object]) -> float:
    """CPU seconds that a call takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def medians_in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    for work in works.values():
        work()  # the first run of anything is slower

    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(processor_seconds(work))
    return {name: statistics.median(times) for name, times in seconds.items()}


def train_once(model: SailVL, batches: list[Batch]) -> None:
    """Forward and backward over some batches, divided by their weight."""
    weight = sum(batch.weight for batch in batches)
    for batch in batches:
        loss, _ = supervised(model, batch, Stage())
        (loss / weight).backward()
    model.zero_grad()


# -------------------------------------------------------------------------------------- packing


def tile_documents(model: SailVL, samples: int, seed: int) -> list[Document]:
    """Documents of black tiles and random text, a quarter as long as `packing_rules.example_sizes`'s."""
    config = model.config
    side = config.vision.image_size
    per_tile = (side // (2 * config.vision.patch_size)) ** 2
    rng = np.random.default_rng(seed)

    documents = []
    for tokens, tiles in example_sizes("tiles", samples, seed):
        visual = per_tile * tiles
        n = max(tokens // SHORTER, visual + 4)

        # Tiles first, then text; only the text is learned.
        ids = rng.integers(0, 200, n)
        ids[:visual] = config.image_token_id
        labels = np.append(ids[1:], -100)
        labels[:visual] = -100
        weights = (labels >= 0).astype(np.float32)

        pictures = tuple(np.zeros((side, side, 3), np.uint8) for _ in range(tiles))
        documents.append(Document(ids, labels, weights, pictures, "", "", {}, vision=tiles))
    return documents


def compare_packing(options: RowsOptions) -> None:
    """A pass over the same documents, padded four by four, as they come, and in our rows."""
    model, _ = new_model("toy", World())
    documents = tile_documents(model, options.samples, options.seed)

    # A group is the rows of one batch.
    padded = []
    for i in range(0, len(documents), 4):
        padded.append([[document] for document in documents[i : i + 4]])
    rules: dict[str, tuple[list, int | None]] = {
        "padded, 4 samples": (padded, None),
        "naive stream": ([[row] for row in naive(iter(documents), CAPACITY)], CAPACITY),
        "ours": ([[row] for row in Rows(iter(documents), CAPACITY)], CAPACITY),
    }

    def pass_over(groups: list, capacity: int | None) -> Callable[[], object]:
        batches = [collate(group, capacity, 0) for group in groups]
        return lambda: train_once(model, batches)

    works = {name: pass_over(*rule) for name, rule in rules.items()}
    seconds = medians_in_turn(works, options.rounds)

    tokens = sum(map(len, documents))
    supervised = sum(int((document.labels >= 0).sum()) for document in documents)
    for name, (groups, capacity) in rules.items():
        cells = 0
        for group in groups:
            longest = max(sum(map(len, row)) for row in group)
            cells += len(group) * (capacity or longest)
        print(
            f"{name:18s} fill {tokens / cells:6.1%}  "
            f"{supervised / seconds[name]:7.0f} supervised tokens/s  "
            f"ours is {seconds[name] / seconds['ours']:.2f} times as fast"
        )


# --------------------------------------------------------------------------------------- vision


def noise_picture(patches: int, patch: int, rng: np.random.Generator) -> np.ndarray:
    """Noise (H, W, 3) of that many patches, as square as the number of 2 x 2 groups allows."""
    units = patches // 4
    high = max(h for h in range(1, int(units**0.5) + 1) if units % h == 0)
    wide = units // high
    return rng.integers(0, 255, (2 * patch * high, 2 * patch * wide, 3), dtype=np.uint8)


def compare_vision(options: RowsOptions) -> None:
    """Rows of any-resolution images dealt to two ranks; every row is timed, a step costs the slower."""
    toy = PRESETS["toy"]
    vit = SailVL(replace(toy, any_resolution=True)).init_weights(0).vision_model
    patch = toy.vision.patch_size
    rng = np.random.default_rng(options.seed)

    sizes = []
    for tokens, patches in example_sizes("any-resolution", options.samples, options.seed):
        sizes.append(Size(tokens // SHORTER + 4, patches // SHORTER // 4 * 4))

    # Rows by what is balanced: nothing, tokens only, patches, or the ViT's work (v patches each).
    measures = {
        "tokens only": lambda v: 0,
        "patches": lambda v: v,
        "work": lambda v: toy.vision.work(v * patch**2),
    }
    rules = {"naive stream": list(naive(iter(sizes), CAPACITY))}
    for name, measure in measures.items():
        twins = [Size(d.tokens, measure(d.vision), str(i)) for i, d in enumerate(sizes)]
        rules[name] = [[sizes[int(d.origin)] for d in row] for row in Rows(iter(twins), CAPACITY)]

    images = {}
    for size in sizes:
        if size.vision:
            images[id(size)] = normalise([noise_picture(size.vision, patch, rng)])
    patches = sum(size.vision for size in sizes)

    def row_seconds(row: list[Size]) -> float:
        pixels = [images[id(size)][0] for size in row if size.vision]
        return processor_seconds(lambda: vit(pixels)) if pixels else 0.0

    with torch.no_grad():
        for name, rows in rules.items():
            # The better of two times of each row; rows in pairs, one a rank.
            pairs = len(rows) // 2
            cost = [min(row_seconds(row) for _ in range(2)) for row in rows[: 2 * pairs]]
            slower = sum(max(cost[2 * i : 2 * i + 2]) for i in range(pairs))
            mean = sum(cost) / 2
            print(
                f"{name:14s} {len(rows):4d} rows, "
                f"slower rank's ViT {1e6 * slower / patches:6.2f} us a patch, "
                f"mean of both {1e6 * mean / patches:6.2f}; max / mean {slower / mean:.3f}"
            )


# --------------------------------------------------------------------------------------- decode


def samples_in(batches: list[Batch]) -> int:
    """Documents that are not padding."""
    return sum(owner != "padding" for batch in batches for owner in batch.owners)


def decode_tiles(options: RowsOptions) -> None:
    """From a JPEG of 1344 x 896, which is six tiles of 448 x 448 and a thumbnail, to packed batches."""
    rng = np.random.default_rng(options.seed)
    noise = Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8))
    photograph = noise.resize((1344, 896), Image.BICUBIC)  # as smooth as one
    file = io.BytesIO()
    photograph.save(file, "JPEG", quality=85)
    turns = [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "a picture"},
    ]

    with tempfile.TemporaryDirectory() as place:
        Path(place, "a.jpg").write_bytes(file.getvalue())
        line = json.dumps({"image": "a.jpg", "conversations": turns})
        Path(place, "a.jsonl").write_text(line + "\n")

        config = replace(PRESETS["SAIL-VL2-2B"], max_tiles=12, min_tiles=1)
        folder = Folder(Path(place, "a.jsonl"))
        tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, "")
        encoder = Encoder(tokenizer, config, folder.root)
        documents = Documents(folder.stream({}, 0), encoder, Faults())
        steps = Batches(documents, 8192, 1, 1, 0, buffer=8)
        next(steps)  # warms up

        began = time.process_time()
        samples = 0
        tiles = 0
        for _ in range(2 * options.rounds):
            batches = next(steps)
            samples += samples_in(batches)
            tiles += sum(len(batch.images) for batch in batches)
        seconds = time.process_time() - began

    print(
        f"{samples / seconds:6.1f} samples/s, "
        f"{tiles / seconds:6.1f} tiles of 448 x 448 a second and worker: "
        f"decode ({len(file.getvalue()) / 1024:.0f} KiB), cut, encode, pack, normalise"
    )


def with_files(sample: Sample) -> Sample:
    """The sample with its pictures as the bytes of JPEG files."""
    first, *others = sample.messages
    parts = []
    for part in first.parts:
        if isinstance(part, Image.Image):
            file = io.BytesIO()
            part.save(file, "JPEG")
            part = file.getvalue()
        parts.append(part)
    return replace(sample, messages=(replace(first, parts=tuple(parts)), *others))


def compare_decode(options: RowsOptions) -> None:
    """How many samples a second one process decodes and packs, and how many the toy model takes."""
    decode_tiles(options)

    model, tokenizer = new_model("toy", World())
    encoder = Encoder(tokenizer, model.config, max_length=512)
    scenes = World().stream({"caption": 1.0, "attributes": 1.0}, 0)
    files = [with_files(scenes[i]) for i in range(200)]
    documents = Documents(Drawn(lambda n: files[n % len(files)]), encoder, Faults())
    steps = Batches(documents, 512, 4, 1, 0)
    kept = [next(steps) for _ in range(3)]

    # Ten steps fed.
    began = time.process_time()
    fed = sum(samples_in(next(steps)) for _ in range(10))
    fed_a_second = fed / (time.process_time() - began)

    # Three steps trained on, one after the other.
    def train_kept() -> None:
        for batches in kept:
            for batch in batches:
                loss, _ = supervised(model, batch, Stage())
                loss.backward()
                model.zero_grad()

    seconds = medians_in_turn({"train": train_kept}, options.rounds)["train"]
    taken_a_second = sum(samples_in(batches) for batches in kept) / seconds
    print(
        f"{fed_a_second:6.1f} toy samples/s are decoded and packed by one process; "
        f"the toy model takes {taken_a_second:.1f} a second: "
        f"{fed_a_second / taken_a_second:.1f} times as many"
    )


# ----------------------------------------------------------------------------------------- feed

STEP = 2.0  # seconds for which an accelerator would be busy with a step
WORKERS = 1  # processes that decode, beside the one that packs


def photographs(n: int) -> Sample:
    """Sample n of an endless stream: a JPEG of 1344 x 896 and a question about it."""
    rng = np.random.default_rng(n % 16)
    noise = Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.resize((1344, 896), Image.BICUBIC).save(file, "JPEG", quality=85)
    messages = (Message("user", (file.getvalue(), "what?")), Message("assistant", ("a picture",)))
    return Sample(messages, "photograph", f"photograph {n}")


def waits_of(steps: Batches, count: int) -> list[float]:
    """Seconds that each step waits for its rows and micro-batches, while an accelerator would compute
    in between and leave this machine alone."""
    waits = []
    for _ in range(count):
        began = time.perf_counter()
        step = next(steps)
        waited = time.perf_counter() - began
        micro_batches = iter(step)
        for _ in range(len(step)):
            began = time.perf_counter()
            next(micro_batches)
            waited += time.perf_counter() - began
            time.sleep(STEP / len(step))
        waits.append(waited)
    return waits


def compare_feeding(options: RowsOptions) -> None:
    """Rows of 2,048 tokens with seven tiles a photograph: made when asked for, and made ahead."""
    config = replace(PRESETS["SAIL-VL2-2B"], max_tiles=12, min_tiles=1)
    encoder = Encoder(Tokenizer({bytes([b]): b for b in range(256)}, ""), config)
    medians = {}
    for workers in (0, WORKERS):
        documents = Documents(Drawn(photographs), encoder, Faults())
        steps = Batches(documents, CAPACITY, 4, 2, 0, buffer=8, workers=workers)
        waits = waits_of(steps, 1 + 2 * options.rounds)
        steps.close()
        medians[workers] = statistics.median(waits[1:])
        print(
            f"--workers {workers}: a step waits {medians[workers]:6.3f} s for its rows "
            f"({medians[workers] / STEP:.0%} of its {STEP:g} s); the first {waits[0]:.1f} s"
        )
    print(f"ahead it waits {medians[0] / medians[WORKERS]:.0f} times less")


# --------------------------------------------------------------------------------------- memory

ROWS = 64  # of a step
TILES = 28  # of 448 x 448 in each


def step_bytes(step: Step, floats: bool) -> int:
    """Most bytes of pixels that a step holds at once: as floats in all micro-batches, or one at a
    time as it is."""
    if floats:
        kept = [normalised(batch.images) for batch in step]
        return sum(images.numel() * images.element_size() for images in kept)
    return max(batch.images.numel() * batch.images.element_size() for batch in step)


def resident(work: Callable[[], int]) -> tuple[int, int]:
    """(what a call returns, bytes by which it raises this process's peak), in a child process."""
    receiver, sender = multiprocessing.Pipe(False)

    def measure() -> None:
        before = peak_memory()
        found = work()
        after = peak_memory()
        sender.send((found, after - before))

    child = multiprocessing.get_context("fork").Process(target=measure)
    child.start()
    sender.close()  # so that a child that dies is an EOFError here
    found = receiver.recv()
    child.join()
    return found


def compare_memory(options: RowsOptions) -> None:
    """Rows that share one tile, so that only what the step makes of it is counted.

    Raises ValueError on a system that does not say what a process held.
    """
    if not peak_memory():
        raise ValueError("this system does not say what memory a process held: Linux and macOS do")
    tile = np.full((448, 448, 3), 7, np.uint8)
    row = np.zeros(256 * TILES, np.int64)
    weights = np.ones(len(row), np.float32)
    document = Document(row, row, weights, (tile,) * TILES, "", "", {}, vision=TILES)
    documents = Documents([document] * ROWS, None)
    for name, floats in (("floats, all at once", True), ("bytes, one at a time", False)):

        def take() -> int:
            return step_bytes(next(Batches(documents, len(row), ROWS, 0, 0, buffer=1)), floats)

        pixels, peak = resident(take)
        print(
            f"{name:22s} {pixels / 2**30:6.3f} GiB of pixels, peak of the process +{peak / 2**30:6.3f}"
        )


def bench_rows(options: RowsOptions) -> None:
    """One of the measurements, on one thread."""
    torch.set_num_threads(1)
    measurements = {
        "packing": compare_packing,
        "vision": compare_vision,
        "decode": compare_decode,
        "feed": compare_feeding,
        "memory": compare_memory,
    }
    measurements[options.what](options)


if __name__ == "__main__":
    command(bench_rows)
