"""Weights and training state of sharded models, to disk and back: any layout saves, any other loads.

Protects: what is read is what was written, to the last bit, however it was cut; every rank reads its part
and no more; checkpoints of earlier versions load; a rank that dies or a disk that is full on one rank costs
one checkpoint.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import vit
import vlm
from conftest import made_up
from ranks_helpers import STAGE, SameRows, as_ranks, exact_logprobs, far
from safetensors.torch import load_file, save_file

from infra import weights
from infra.checkpoint import Keeper, RunDirectory, checkpoints, fault, lacks, latest
from scale import parallel, shards
from scale.layout import Layout
from scale.parallel import Ranks
from scale.shard import shard_model
from scale.shards import Box, Names, Part, Writers
from train import train
from vlm import TOY_MOE, SailVL

# AdaLRS goes back after three steps: a trial is in progress at the checkpoint that is loaded
SEARCHED = replace(STAGE, steps=12, adalrs=True, adalrs_k=3, adalrs_window=(0.0, 0.9))
AT = 4
LAYOUTS = {
    "plain": Layout(),
    "zero 3": Layout(shard=4),
    "zero 2": Layout(shard=4, zero=2),
    "copies": Layout(copies=2, shard=2),
    "ep 2": Layout(shard=4, ep=2),
    "ep 2, copies": Layout(copies=2, shard=2, ep=2),
}


@pytest.fixture(scope="module")
def small(config):
    """A mixture of experts of two layers."""
    text = replace(
        TOY_MOE,
        vocab_size=448,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=32,
    )
    vision = replace(config.vision, hidden_size=48, intermediate_size=64, num_hidden_layers=1)
    return replace(config, text=text, vision=vision)


class FewRows(SameRows):
    """The data ends two steps after the checkpoint."""

    def __next__(self):
        if self.step == AT + 2:
            raise StopIteration
        return super().__next__()


def life(ranks, config, tokenizer, path: Path, model=None):
    """A run in doubles in this directory, from the checkpoint that is there; its model and its losses."""
    vlm.token_logprobs = exact_logprobs
    if model is None:
        model = SailVL(config).init_weights(0).double()
    shard_model(model, ranks)
    data = FewRows(tokenizer, ranks, dtype=torch.float64)
    run = train(model, SEARCHED, data, ranks=ranks, directory=RunDirectory(path, every=AT, keep=9))
    return model, [row["loss"] for row in run.log]


def forget(path: Path) -> None:
    """As if the run had been killed after the checkpoint at AT."""
    for number, directory in checkpoints(path / "checkpoints").items():
        if number > AT:
            shutil.rmtree(directory)


# ------------------------------------------------------------------------------------- the matrix


@pytest.mark.slow
def test_every_layout_goes_on_from_every_layouts_checkpoint(tmp_path, small, tokenizer, capfd):
    """The losses that follow are those of the run that was not interrupted, in doubles to the last bits."""
    _, expected = life(Ranks(), small, tokenizer, tmp_path / "one process")
    forget(tmp_path / "one process")
    saved = ["one process", *LAYOUTS]

    def on(layout: Layout):
        parallel._meeting.rows = None
        return parallel.start(60.0, layout)

    def save(ranks):
        logs = {}
        for name, layout in LAYOUTS.items():
            _, logs[name] = life(on(layout), small, tokenizer, tmp_path / name)
            if ranks.main:
                forget(tmp_path / name)
        return logs

    for logs in as_ranks(save, tmp_path / "said", 4, 60.0):
        assert isinstance(logs, dict), logs
        for name, losses in logs.items():
            assert len(losses) == len(expected) == AT + 2
            assert far({"losses": losses}, {"losses": expected}) < 1e-12, name

    def load(ranks):
        found = {}
        for name, layout in LAYOUTS.items():
            model = None
            for source in saved:
                path = tmp_path / f"{source} as {name}"
                if ranks.main:
                    shutil.copytree(tmp_path / source, path)
                parallel.total(0.0, everyone=True)
                model, found[path.name] = life(on(layout), small, tokenizer, path, model)
        return found

    resumed = {}
    for found in as_ranks(load, tmp_path / "said again", 4, 60.0):
        assert isinstance(found, dict), found
        resumed |= found
    for source in saved:
        path = tmp_path / f"{source} as one process"
        shutil.copytree(tmp_path / source, path)
        _, resumed[path.name] = life(Ranks(), small, tokenizer, path)

    # Nothing was begun again, and nothing refused
    assert len(resumed) == len(saved) ** 2
    said = capfd.readouterr().out
    assert [name for name in resumed if f"{name}/checkpoints/step-{AT:08d} (code" not in said] == []
    assert not list(tmp_path.glob("*/checkpoints/broken-*"))
    after = {name: {"losses": losses[AT:]} for name, losses in resumed.items()}
    worst = max(after, key=lambda name: far(after[name], {"losses": expected[AT:]}))
    assert far(after[worst], {"losses": expected[AT:]}) < 1e-14, worst
