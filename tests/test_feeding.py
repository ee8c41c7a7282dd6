"""Feeding: bytes that become the same pixels, steps made ahead by other processes, one index a node.

What is protected: whatever makes a step, and wherever, it is the step that this process would have made.
"""

import json
import os
import pickle
import random
import signal
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from conftest import EVERY
from test_packing import told

import packing
from data import world
from data.encode import Encoder
from data.images import normalise, stacked
from data.sample import BadSample, Faults, Sample
from data.stream import Documents, Drawn
from data.world import World
from packing import Batches, Step, collate, weight_of
from vit import MEAN, STD, normalised

# ------------------------------------------------------------------------------------------ pixels


def test_bytes_normalised_by_the_vit_are_the_floats_of_before():
    """The formula of the released preprocessor, to the last bit: every byte in every colour."""
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    mean = torch.tensor(MEAN)[:, None, None] * 255
    std = torch.tensor(STD)[:, None, None] * 255
    want = (torch.from_numpy(ramp).permute(2, 0, 1).float() - mean) / std
    for images in ([ramp], [ramp, ramp]):
        pixels = stacked(images)
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(images), 3, 16, 16)
        assert all(torch.equal(one, want) for one in normalised(pixels))
    of_two_sizes = normalise([ramp, ramp[:8]])
    assert torch.equal(of_two_sizes[0], want) and torch.equal(of_two_sizes[1], want[:, :8])
    assert normalised(want) is want


def test_the_model_says_the_same_of_bytes_and_of_floats(model, documents, tokenizer):
    batch = collate([documents[:6]], None, tokenizer.pad)
    assert batch.images.dtype == torch.uint8
    said = [
        model(batch.ids, images, batch.positions, batch.segments)
        for images in (batch.images, normalised(batch.images))
    ]
    assert torch.equal(*said)


def test_a_step_weighs_and_is_made_a_micro_batch_at_a_time(encoder, tokenizer, monkeypatch):
    """The weight is there before any pixel is stacked, and one micro-batch is stacked at a time."""
    made = []
    monkeypatch.setattr(packing, "stacked", lambda images: made.append(len(images)) or None)
    documents = Documents(World().stream(EVERY, 0, 1), encoder)
    step = next(Batches(documents, 512, 8, 4, tokenizer.pad))
    assert isinstance(step, Step) and len(step) == 4 and not made
    assert weight_of(step) == step.weight > 0
    for count, batch in enumerate(step, 1):
        assert batch.ids.shape == (2, 512) and len(made) <= count
    assert made and weight_of(list(step)) == step.weight


@pytest.mark.parametrize(
    "rows, ranks, accumulate, words",
    [
        (
            480,
            64,
            0,
            "480 rows a step do not divide over 64 ranks; .*--rows 448 or 512, or 60 or 80",
        ),
        (128, 512, 0, "--rows 512, or 128 ranks"),
        (4, 1, 3, "1 ranks x 3 accumulation steps; the nearest that do: --rows 3 or 6"),
        (16, 3, 4, "--rows 12 or 24, or 2 or 4 ranks"),
    ],
)
def test_rows_that_do_not_divide_name_the_nearest_numbers_that_do(rows, ranks, accumulate, words):
    with pytest.raises(ValueError, match=words) as error:
        Batches(iter([]), 64, rows, accumulate, 0, 0, ranks)
    # and those do
    lower = [int(n) for n in str(error.value).split("--rows ")[1].split(",")[0].split(" or ")]
    for fitting in lower:
        Batches(iter([]), 64, fitting, accumulate, 0, 0, ranks)


# ------------------------------------------------------------------------------------------- ahead


def question(n: int) -> Sample:
    """A drawn one; every ninth is bad."""
    if n % 9 == 4:
        raise BadSample("ninth", str(n))
    return world.sample(n, 0, EVERY)


def fed(encoder: Encoder, workers: int, faults: Faults | None = None) -> Batches:
    documents = Documents(Drawn(question), encoder, Faults() if faults is None else faults)
    return Batches(documents, 256, 4, 2, encoder.tokenizer.pad, workers=workers)


def whole_step(step: Step) -> tuple:
    """Everything in a step, to compare."""
    parts = []
    for batch in step:
        images = [] if batch.images is None else batch.images.tolist()
        parts.append((told([batch]), batch.labels.tolist(), batch.weights.tolist(), images))
        parts.append((batch.positions.tolist(), batch.segments.lengths, batch.owners, batch.count))
    return parts, step.weight, step.made, step.after


class AheadHere:
    """`Ahead` in this process, which "dies" now and then; everything is pickled on its way."""

    deaths = random.Random(3)
    died = 0

    def __init__(self, make, most: int):
        samples, encoder, faults, _, *rest = pickle.loads(pickle.dumps(make)).args
        self.items = packing.pieces(samples, encoder, faults, 0, *rest)

    def __next__(self):
        if self.deaths.random() < 0.3:
            AheadHere.died += 1
            raise BrokenProcessPool("killed")
        return pickle.loads(pickle.dumps(next(self.items)))

    def close(self) -> None:
        self.items = None


def test_steps_made_elsewhere_are_those_made_here_over_deaths_and_resumes(encoder, monkeypatch):
    """Rows, weights, pixels, states and faults; also when steps are not used up, and after a death
    in the middle of a step."""
    monkeypatch.setattr(packing, "Ahead", AheadHere)
    plain_faults, faults = Faults(), Faults()
    plain = fed(encoder, 0, plain_faults)
    ahead = fed(encoder, 2, faults)
    for number in range(6):
        want = next(plain)
        got = next(ahead)
        if number % 3 == 2:
            # left after its first micro-batch
            assert told([got[0]]) == told([want[0]])
        else:
            assert whole_step(got) == whole_step(want)
        assert faults.counts == plain_faults.counts and faults.examples == plain_faults.examples
        if number == 3:
            state = json.loads(json.dumps(ahead.state_dict()))
            assert state == plain.state_dict()
            ahead = fed(encoder, 2, faults)
            ahead.load_state_dict(state)
    assert AheadHere.died > 2 and faults.counts["ninth"] > 2


def test_a_packing_process_that_dies_again_and_again_is_an_error(encoder, monkeypatch):
    class Dead(AheadHere):
        def __next__(self):
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(packing, "Ahead", Dead)
    with pytest.raises(ValueError, match="--workers 1: the packing process died 10 times in a row"):
        next(fed(encoder, 1))


def test_what_the_other_process_raises_is_raised_here(encoder, monkeypatch):
    monkeypatch.setattr(AheadHere, "deaths", random.Random(1))
    monkeypatch.setattr(packing, "Ahead", AheadHere)
    with pytest.raises(BadSample, match="ninth: 4"):
        for _ in fed(encoder, 1, Faults(strict=True)):
            continue


@pytest.mark.slow
def test_real_processes_make_the_steps_of_this_one_and_may_be_killed(encoder, capsys):
    plain = fed(encoder, 0)
    ahead = fed(encoder, 1)
    for number in range(8):
        assert whole_step(next(ahead)) == whole_step(next(plain))
        if number == 1:
            os.kill(next(iter(ahead.reader.ahead.pool._processes)), signal.SIGKILL)
    ahead.close()
    assert ahead.documents.faults.counts == plain.documents.faults.counts
    assert "the packing process died and is replaced" in capsys.readouterr().err
