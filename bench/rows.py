"""What full and balanced rows are worth: three measurements on the toy model, each within one run.

    python -m bench.rows packing      # training step: padded batches, the stream as it comes, ours; equal supervised tokens
    python -m bench.rows vision       # two ranks, any resolution: time of the slower rank's ViT
    python -m bench.rows decode       # JPEG to packed batch, samples a second and worker, against what the toy model takes

Lengths are those of `packing_rules.example_sizes`, a quarter as long. Times are CPU times of one thread, medians over rounds; the rules
take turns, so that a busy machine slows all of them.
"""

import io
import statistics
import sys
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
from data.sample import Document, Faults
from data.stream import Documents, Drawn
from data.world import World
from packing import Batches, Rows, collate
from recipe import new_model
from tokenizer import Tokenizer
from train import answers
from vlm import PRESETS, SailVL

CAPACITY, SHORTER = 2048, 4


@dataclass
class Options:
    """packing, vision or decode."""

    what: Positional[Literal["packing", "vision", "decode"]]
    samples: int = 320
    rounds: int = 3
    seed: int = 0


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # the first run of anything is slower
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(timed(work))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def packing(o: Options) -> None:
    model, _ = new_model("toy", World())
    config = model.config
    rng = np.random.default_rng(o.seed)
    side = config.vision.image_size
    per_tile = (side // (2 * config.vision.patch_size)) ** 2
    documents = []
    for tokens, tiles in example_sizes("tiles", o.samples, o.seed):
        n = max(tokens // SHORTER, per_tile * tiles + 4)
        ids = rng.integers(0, 200, n)
        ids[: per_tile * tiles] = config.image_token_id
        labels = np.append(ids[1:], -100)
        labels[: per_tile * tiles] = -100
        pictures = tuple(np.zeros((side, side, 3), np.uint8) for _ in range(tiles))
        documents.append(
            Document(
                ids, labels, (labels >= 0).astype(np.float32), pictures, "", "", {}, vision=tiles
            )
        )

    def pass_over(groups: list, capacity: int | None) -> Callable[[], object]:
        batches = [collate(group, capacity, 0) for group in groups]

        def step():
            weight = sum(b.weight for b in batches)
            for b in batches:
                (answers(model, b)[0] / weight).backward()
            model.zero_grad()

        return step

    rules = {
        "padded, 4 samples": (
            [[[d] for d in documents[i : i + 4]] for i in range(0, len(documents), 4)],
            None,
        ),
        "naive stream": ([[row] for row in naive(iter(documents), CAPACITY)], CAPACITY),
        "ours": ([[row] for row in Rows(iter(documents), CAPACITY)], CAPACITY),
    }
    seconds = turns({name: pass_over(*rule) for name, rule in rules.items()}, o.rounds)
    supervised = sum(int((d.labels >= 0).sum()) for d in documents)
    for name, (groups, capacity) in rules.items():
        cells = sum(len(g) * (capacity or max(sum(map(len, row)) for row in g)) for g in groups)
        print(
            f"{name:18s} fill {sum(map(len, documents)) / cells:6.1%}  {supervised / seconds[name]:7.0f} supervised tokens/s  "
            f"ours is {seconds[name] / seconds['ours']:.2f} times as fast"
        )


def vision(o: Options) -> None:
    """Rows of any-resolution images dealt to two ranks; every row's ViT is timed, a step costs the slower one."""
    c = PRESETS["toy"]
    vit = SailVL(replace(c, any_resolution=True)).init_weights(0).vision_model
    patch, rng = c.vision.patch_size, np.random.default_rng(o.seed)
    sizes = [
        Size(t // SHORTER + 4, v // SHORTER // 4 * 4)
        for t, v in example_sizes("any-resolution", o.samples, o.seed)
    ]

    def picture(patches: int) -> np.ndarray:  # as square as the number of 2 x 2 patches allows
        units = patches // 4
        high = max(h for h in range(1, int(units**0.5) + 1) if units % h == 0)
        return rng.integers(
            0, 255, (2 * patch * high, 2 * patch * (units // high), 3), dtype=np.uint8
        )

    measures = {
        "tokens only": lambda v: 0,
        "patches": lambda v: v,
        "work": lambda v: c.vision.work(v * patch**2),
    }  # v patches
    rules = {"naive stream": list(naive(iter(sizes), CAPACITY))}
    for name, measure in measures.items():
        twins = [Size(d.tokens, measure(d.vision), str(i)) for i, d in enumerate(sizes)]
        rules[name] = [[sizes[int(d.origin)] for d in row] for row in Rows(iter(twins), CAPACITY)]
    images = {id(d): normalise([picture(d.vision)]) for d in sizes if d.vision}
    patches = sum(d.vision for d in sizes)

    def row_seconds(row: list[Size]) -> float:
        pixels = [images[id(d)][0] for d in row if d.vision]
        return timed(lambda: vit(pixels)) if pixels else 0.0

    with torch.no_grad():
        for name, rows in rules.items():
            cost = [min(row_seconds(row) for _ in range(2)) for row in rows[: len(rows) // 2 * 2]]
            slower = sum(max(cost[i : i + 2]) for i in range(0, len(cost), 2))
            print(
                f"{name:14s} {len(rows):4d} rows, slower rank's ViT {1e6 * slower / patches:6.2f} us a patch, mean of both "
                f"{1e6 * sum(cost) / 2 / patches:6.2f}; max / mean {slower / (sum(cost) / 2):.3f}"
            )


def decode(o: Options) -> None:
    """448 x 448 tiles: a JPEG of 1344 x 896 is six and a thumbnail."""
    with tempfile.TemporaryDirectory() as place:
        rng = np.random.default_rng(o.seed)
        noise = Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8)).resize(
            (1344, 896), Image.BICUBIC
        )  # photograph-like
        buffer = io.BytesIO()
        noise.save(buffer, "JPEG", quality=85)
        Path(place, "a.jpg").write_bytes(buffer.getvalue())
        Path(place, "a.jsonl").write_text(
            '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat?"}, '
            '{"from": "gpt", "value": "a picture"}]}\n'
        )
        config = replace(PRESETS["SAIL-VL2-2B"], max_tiles=12, min_tiles=1)
        folder, tokenizer = (
            Folder(Path(place, "a.jsonl")),
            Tokenizer({bytes([b]): b for b in range(256)}, ""),
        )
        stream = Batches(
            Documents(folder.stream({}, 0), Encoder(tokenizer, config, folder.root), Faults()),
            8192,
            1,
            1,
            0,
            buffer=8,
        )
        next(stream)
        began, made, tiles = time.process_time(), 0, 0
        for _ in range(o.rounds * 2):
            (batch,) = next(stream)
            made, tiles = (
                made + sum(owner != "padding" for owner in batch.owners),
                tiles + len(batch.images),
            )
        seconds = time.process_time() - began
        print(
            f"{made / seconds:6.1f} samples/s, {tiles / seconds:6.1f} tiles of 448 x 448 a second and worker: "
            f"decode ({len(buffer.getvalue()) / 1024:.0f} KiB), cut, encode, pack, normalise"
        )
    model, tokenizer = new_model("toy", World())
    encoder = Encoder(tokenizer, model.config, max_length=512)
    world = World().stream({"caption": 1.0, "attributes": 1.0}, 0)
    files = []
    for i in range(200):
        buffer = io.BytesIO()
        first, *others = world[i].messages
        next(p for p in first.parts if isinstance(p, Image.Image)).save(buffer, "JPEG")
        parts = tuple(buffer.getvalue() if isinstance(p, Image.Image) else p for p in first.parts)
        files.append(replace(world[i], messages=(replace(first, parts=parts), *others)))
    stream = Batches(
        Documents(Drawn(lambda n: files[n % len(files)]), encoder, Faults()), 512, 4, 1, 0
    )
    steps = [next(stream) for _ in range(3)]
    samples = 0

    def fed():
        nonlocal samples
        for _ in range(10):
            samples += sum(owner != "padding" for b in next(stream) for owner in b.owners)

    def trained():
        for step in steps:
            loss, _ = answers(model, step[0])
            loss.backward()
            model.zero_grad()

    feeding = timed(fed)
    eaten = (
        sum(owner != "padding" for step in steps for owner in step[0].owners)
        / turns({"train": trained}, o.rounds)["train"]
    )
    print(
        f"{samples / feeding:6.1f} toy samples/s are decoded and packed by one process; the toy model takes {eaten:.1f} a second: "
        f"{samples / feeding / eaten:.1f} times as many"
    )


if __name__ == "__main__":
    import tyro

    o = tyro.cli(Options)
    torch.set_num_threads(1)
    {"packing": packing, "vision": vision, "decode": decode}[o.what](o)
    sys.exit(0)
