"""Shared by all tests: one thread (the suite runs in two processes), one small model and its documents.

One thread also because tests fork: a child of a process whose kernels use several waits for them for
ever. The variable is what commands follow that a test calls (scale.parallel.use_own_processors).
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import world
from data.encode import Encoder
from data.sample import Document
from data.steps import Batches
from objective import supervised
from recipe import THINK, Setup, fit
from stage import Stage
from tokenizer import Tokenizer, train_bpe
from vlm import PRESETS, SailVL

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
SHARED = ROOT.parent / "shared"
EVERY = {f: 1.0 for f in world.FAMILIES} | {"text": 0.2}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(world.corpus(500), 400), "", THINK)


@pytest.fixture(scope="session")
def config(tokenizer):
    c = PRESETS["toy"]
    return replace(
        c,
        text=replace(c.text, vocab_size=448, num_hidden_layers=2),
        vision=replace(c.vision, num_hidden_layers=2),
        image_token_id=tokenizer.image,
    )


@pytest.fixture
def model(config) -> SailVL:
    return SailVL(config).init_weights(0)


@pytest.fixture(scope="session")
def encoder(tokenizer, config) -> Encoder:
    return Encoder(tokenizer, config, max_length=512)


@pytest.fixture(scope="session")
def documents(encoder):
    """Forty documents of every kind: pictures, videos, text only."""
    return [encoder(world.sample(i, 0, EVERY)) for i in range(40)]


def answers(model, batch, stage=None, **coefficients):
    """The supervised objective of a batch: (loss sum, statistics)."""
    return supervised(model, batch, stage or Stage(**coefficients))


def run_stage(model, stage, source, encoder):
    """One stage on a source, in place."""
    return fit(Setup(model, encoder, source), stage)


def made_up(tokenizer, seed: int = 0, rows: int = 2, length: int = 128):
    """Endless steps of one batch of invented documents, independent of the world: a coloured
    picture, its colour's token five
    times over, counting tokens. For tests of the loop and for the golden losses."""
    rng = np.random.default_rng(seed)

    def documents():
        while True:
            color, n = int(rng.integers(4)), int(rng.integers(8, 40))
            picture = np.zeros((32, 32, 3), np.uint8) + np.uint8(60 * color + 20)
            text = [10 + color] * 5 + [(20 + color + i) % 60 for i in range(n)]
            seen = rng.random() < 0.7
            ids = np.array([tokenizer.image] * 4 * seen + text)
            labels = np.append(ids[1:], tokenizer.end)
            labels[: 4 * seen] = -100
            yield Document(
                ids,
                labels,
                (labels >= 0).astype(np.float32),
                (picture,) * seen,
                "seen" if seen else "text",
                "made up",
                {},
                vision=int(seen),
            )

    return Batches(documents(), length, rows, 1, tokenizer.pad)
