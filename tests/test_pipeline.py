"""Pipeline parallelism: on 2 and 4 ranks, by every schedule, a run is the run of one process.

Ranks are forked once for each number of them; every case is a whole `train()` there and here. A case has
rows with and without pictures, one micro-batch in three without any.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_ranks import as_ranks

from data.sample import Document
from objective import supervised
from packing import collate
from scale import parallel
from scale.layout import Layout
from scale.pipeline import Staged, layers_of, waiting
from stage import ALL, Stage
from train import train
from vlm import PRESETS, SailVL

IMAGE, END, PAD, VOCABULARY, LENGTH = 440, 441, 442, 448, 64
STAGE = Stage(
    "x",
    steps=3,
    rows=4,
    length=LENGTH,
    lr=2e-3,
    optimizer="adamw",
    weight_decay=0.05,
    balance=0.01,
    router_z=0.001,
)


@dataclass(frozen=True)
class Case:
    """A layout, what it trains, and how often it agrees with one process to the last digit."""

    layout: Layout
    experts: bool = False
    stage: Stage = STAGE
    micro_batches: int = 4

    @property
    def rows_together(self) -> int:
        """Rows of one micro-batch over all ranks: experts are balanced over those."""
        return max(1, self.layout.copies) * self.layout.shard


def small(experts: bool) -> SailVL:
    """Four layers: one for each of four ranks."""
    config = PRESETS["toy-moe" if experts else "toy"]
    text = replace(config.text, vocab_size=VOCABULARY, num_hidden_layers=4)
    vision = replace(config.vision, num_hidden_layers=2)
    config = replace(config, text=text, vision=vision, image_token_id=IMAGE)
    return SailVL(config).init_weights(0)


def row(step: int, number: int) -> list[Document]:
    """The documents of one row of a step; every third row is text alone."""
    rng = np.random.default_rng([step, number])
    room = LENGTH
    documents = []
    while room > 12:
        n = min(int(rng.integers(8, 30)), room)
        color = int(rng.integers(4))
        seen = (step + number) % 3 != 1 and bool(rng.random() < 0.7)
        text = [10 + color] * 2 + [(20 + color + i) % 60 for i in range(n - 2 - 4 * seen)]
        ids = np.array([IMAGE] * 4 * seen + text)
        labels = np.append(ids[1:], END)
        labels[: 4 * seen] = -100
        picture = np.zeros((32, 32, 3), np.uint8) + np.uint8(60 * color + 20)
        task = "seen" if seen else "text"
        weights = (labels >= 0).astype(np.float32)
        pictures = (picture,) * seen
        documents.append(Document(ids, labels, weights, pictures, task, "", {}, vision=int(seen)))
        room -= n
    return documents


def rows(case: Case, rank: int = 0, size: int = 1):
    """Steps of one rank's micro-batches, the same rows in the same micro-batches for any number of ranks."""
    together = case.rows_together
    for step in range(case.stage.steps):
        batches = []
        for i in range(case.micro_batches):
            numbers = range(i * together, (i + 1) * together)[rank::size]
            batches.append(collate([row(step, n) for n in numbers], LENGTH, PAD))
        yield batches


def outcome(run, model) -> dict:
    """What must be the same: the log without times, and the weights."""
    times = ("data_seconds", "tokens_per_second", "images_per_second")
    log = [{key: value for key, value in row.items() if key not in times} for row in run.log]
    return {"log": log, "weights": {n: whole(p).tolist() for n, p in model.named_parameters()}}


def whole(p):
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def one_process(case: Case) -> dict:
    model = small(case.experts)
    return outcome(train(model, case.stage, rows(case), supervised), model)


def in_a_pipeline(case: Case, timeout: float) -> dict:
    ranks = parallel.start(timeout, case.layout)
    model = shard_model(small(case.experts), ranks)
    data = rows(case, ranks.rank, ranks.size)
    return outcome(train(model, case.stage, data, supervised, ranks), model)


def many(cases: dict[str, Case], folder, size: int) -> dict[str, list[dict]]:
    """Every case on `size` ranks that are started once: what each rank has of it, or how it failed."""

    def work(ranks):
        return {name: in_a_pipeline(case, ranks.timeout) for name, case in cases.items()}

    said = as_ranks(work, folder, size)
    assert all(isinstance(part, dict) for part in said), said
    return {name: [part[name] for part in said] for name in cases}


def worst(numbers, expected) -> float:
    """The largest difference, as a share of the largest expected number."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    expected = torch.tensor(expected, dtype=torch.float64)
    return float((numbers - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def same(parts: list[dict], expected: dict, tolerance: float) -> None:
    """The log on every rank, and the weights of all stages together, are those of one process."""
    weights = {}
    for part in parts:
        for own, one in zip(part["log"], expected["log"], strict=True):
            assert own.keys() == one.keys()
            for key, value in one.items():
                if isinstance(value, dict):
                    assert own[key].keys() == value.keys(), key
                    own_values, values = list(own[key].values()), list(value.values())
                    assert worst(own_values, values) < tolerance, (key, own[key], value)
                else:
                    assert worst(own[key], value) < tolerance, (key, own[key], value)
        weights |= part["weights"]
    assert weights.keys() == expected["weights"].keys()
    for name, values in expected["weights"].items():
        assert worst(weights[name], values) < tolerance, name
