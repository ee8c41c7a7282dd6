"""Eq. 2 and 3: what the loss of a chain and of a direct answer is divided by, under each weighting."""

from types import SimpleNamespace

import pytest
import torch
from conftest import answers

import sft
from data import world
from data.encode import with_thinking
from packing import collate
from recipe import Setup, fit
from stage import Stage


def samples(encoder, n=6):
    """Direct answers and chains in turn: conditional targets of Eq. 3."""
    drawn = [world.sample(i, 0, {"counting": 1.0}, turns=1) for i in range(n)]
    return [
        with_thinking(s, encoder.tokenizer.think_prompt) if i % 2 else s
        for i, s in enumerate(drawn)
    ]


def log_p(model, document):
    """log P of one sample's supervised tokens, from a batch of its own: (sum, tokens)."""
    batch = collate([[document]], None, 0)
    with torch.no_grad():
        return -float(answers(model, batch)[0]), int((document.labels >= 0).sum())


@pytest.mark.parametrize("weighting", ["sequence", "token", "sample"])
def test_the_loss_is_the_equation_that_its_weighting_names(model, encoder, weighting):
    each = [log_p(model, encoder(s)) for s in samples(encoder)]
    assert (
        each[1][1] > 3 * each[0][1]
    )  # chain and box are supervised, of a direct answer only the answer
    want = {
        "sequence": -sum(p for p, _ in each) / len(each),
        "token": -sum(p for p, _ in each) / sum(n for _, n in each),
        "sample": -sum(p / n for p, n in each) / len(each),
    }[weighting]
    stage = Stage("x", steps=1, rows=1, length=2048, lr=0.0, weighting=weighting)
    source = SimpleNamespace(stream=lambda *_: samples(encoder), root=None)
    run = fit(Setup(model, encoder, source), stage)
    assert run.log[0]["loss"] == pytest.approx(want, rel=1e-4)


def test_the_paper_recipes_name_the_papers_equation():
    assert sft.PAPER["long-cot"].weighting == sft.PAPER["fusion"].weighting == "sequence"
    assert sft.PAPER["fusion"].samples == "fusion" and sft.PAPER["fusion"].think == 0.1
