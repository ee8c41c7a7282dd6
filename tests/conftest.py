"""Shared by all tests: two threads, the project root on the path, one small model, encoder and set of documents."""
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch

import world
from cli import THINK
from data import Encoder
from tokenizer import Tokenizer, train_bpe
from vlm import PRESETS, SailVL

torch.set_num_threads(2)
SHARED = ROOT.parent / "shared"
EVERY = {f: 1.0 for f in world.FAMILIES} | {"text": 0.2}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(world.corpus(500), 400), "", THINK)


@pytest.fixture(scope="session")
def config(tokenizer):
    c = PRESETS["toy"]
    return replace(c, text=replace(c.text, vocab_size=448, num_hidden_layers=2), vision=replace(c.vision, num_hidden_layers=2),
                   image_token_id=tokenizer.image)


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
