"""Feeding: bytes that become the same pixels, steps made ahead by other processes, one index a node.

What is protected: whatever makes a step, and wherever, it is the step that this process would have made.
"""

import errno
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERY, ROOT
from test_packing import record, told

import packing
from data import index, readers, steps, world
from data.encode import Encoder
from data.images import normalise, stacked
from data.readers import Folder
from data.sample import BadSample, Faults, Sample
from data.steps import Batches, Step, weight_of
from data.stream import Documents, Drawn
from data.world import World
from packing import collate
from scale import parallel
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


def test_pictures_of_many_sizes_travel_between_processes_as_they_are(documents, tokenizer):
    """A list of pictures, each of a size of its own, is the same list at the other end."""
    batch = collate([documents[:4]], None, tokenizer.pad)
    ragged = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((8, 24), (32, 16))]
    there = steps.as_arrays(replace(batch, images=ragged))
    assert [image.shape for image in there["images"]] == [(8, 24, 3), (32, 16, 3)]
    back = steps.from_arrays(there).images
    assert all(torch.equal(one, other) for one, other in zip(back, ragged, strict=True))


def test_whoever_stops_taking_steps_leaves_no_reader_behind(encoder, monkeypatch):
    """The packing process closes its readers, and waits for them, when its own work is given up."""
    closed = []

    class Watched(Documents):
        def close(self, wait: bool = False) -> None:
            closed.append(wait)
            super().close(wait)

    monkeypatch.setattr(steps, "Documents", Watched)
    cut = steps.Cut(512, 1, 1, encoder.tokenizer.pad, 0, 1, 16, False, 1)
    made = steps.pieces(World().stream(EVERY, 0, 1), encoder, Faults(), 0, cut, 0, {})
    assert isinstance(next(made), steps.Opening)
    made.close()
    assert closed == [True]


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
        self.items = steps.pieces(samples, encoder, faults, 0, *rest)

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
    monkeypatch.setattr(steps, "Ahead", AheadHere)
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

    monkeypatch.setattr(steps, "Ahead", Dead)
    with pytest.raises(ValueError, match="--workers 1: the packing process died 10 times in a row"):
        next(fed(encoder, 1))


def test_what_the_other_process_raises_is_raised_here(encoder, monkeypatch):
    monkeypatch.setattr(AheadHere, "deaths", random.Random(1))
    monkeypatch.setattr(steps, "Ahead", AheadHere)
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


# ----------------------------------------------------------------------------------- one index a node


def as_neighbours(work, folder: Path, size: int = 3) -> list:
    """work(rank) in processes that torchrun would have started on one machine; what each returned, or
    the error that it ended with."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            try:
                said = work(rank)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            (folder / f"said-{rank}").write_text(json.dumps(said))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads((folder / f"said-{rank}").read_text()) for rank in range(size)]


def contents(folder: Folder) -> list:
    """All that a source knows after its first look."""
    groups = [[k, task, found.tolist()] for (k, task), found in folder.groups.items()]
    files = [[str(path), k] for path, k in folder.files]
    return [folder.spans.tolist(), groups, files, *map(dict, folder.faults.held())]


def two_files(place: Path) -> Path:
    """Sixty records of two tasks, three of them bad."""
    for name in "ab":
        rows = [record("?", f"{name}{i}", "x.png") | {"task": f"t{i % 2}"} for i in range(30)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text + "{broken\n" * (1 + (name == "b")))
    return place


def test_one_rank_of_a_machine_parses_and_all_know_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "data").mkdir()
    place = two_files(tmp_path / "data")
    want = json.loads(json.dumps(contents(Folder(place))))

    def work(rank: int) -> list:
        parsed = []
        plain = readers.read
        monkeypatch.setattr(readers, "read", lambda *a: parsed.append(1) or plain(*a))
        if rank == 0:
            time.sleep(0.3)  # the others must wait, however late it comes
        folder = Folder(place)
        again = Folder(place)
        return [contents(folder), contents(again) == contents(folder), len(parsed)]

    said = as_neighbours(work, tmp_path)
    assert all(found == want and alike for found, alike, _ in said)
    assert [count for *_, count in said] == [63, 0, 0]

    # a file that changed is another index
    with open(place / "a.jsonl", "a") as file:
        file.write(json.dumps(record("?", "new", "x.png")) + "\n")
    said = as_neighbours(lambda rank: len(Folder(place)), tmp_path)
    assert said == [61] * 3


def test_what_the_first_rank_refuses_all_refuse_and_nobody_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "data").mkdir()
    place = two_files(tmp_path / "data")
    said = as_neighbours(lambda rank: contents(Folder(place, strict=True)), tmp_path)
    assert said[0].startswith("BadSample: malformed record: a.jsonl:31") and len(set(said)) == 1

    def work(rank: int) -> int:
        if rank == 0:
            return 0  # gone, or stuck
        return len(Folder(place, timeout=0.2))

    _, *others = as_neighbours(work, tmp_path)
    assert all(text.startswith("TimeoutError: waited 0.2 s for the first rank") for text in others)


def test_old_indexes_are_forgotten_and_a_process_alone_writes_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "data").mkdir()
    place = two_files(tmp_path / "data")
    Folder(place)
    assert not list(tmp_path.glob("nanosail-index-*"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(index, "KEPT", 2)
    for i in range(4):
        os.utime(place / "a.jsonl", (i, i))
        Folder(place)
    (folder,) = tmp_path.glob("nanosail-index-*")
    assert len(list(folder.iterdir())) == 2 and folder.stat().st_mode & 0o77 == 0

    # One that is used again is new again
    os.utime(place / "a.jsonl", (2, 2))
    Folder(place)
    os.utime(place / "a.jsonl", (9, 9))
    Folder(place)
    kept = set(folder.iterdir())
    os.utime(place / "a.jsonl", (2, 2))
    Folder(place)
    assert set(folder.iterdir()) == kept


def test_a_damaged_index_is_made_again_and_one_without_room_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (tmp_path / "data").mkdir()
    place = two_files(tmp_path / "data")
    expected = Folder(place).spans.clone()  # a copy: the file is about to be damaged
    (folder,) = tmp_path.glob("nanosail-index-*")
    (found,) = folder.iterdir()

    # half of it: the second rank walks by itself, the first one makes it anew
    (found / "spans.npy").unlink()
    (found / "spans.npy").write_bytes(b"")
    for rank in "1", "0":
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert torch.equal(Folder(place).spans, expected)
    assert (found / "spans.npy").stat().st_size

    # no room: a mark for the others, and nothing half-written
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    shutil.rmtree(found)
    monkeypatch.setattr(np, "save", full)
    assert torch.equal(Folder(place).spans, expected)
    assert [path.suffix for path in folder.iterdir()] == [".failed"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torch.equal(Folder(place).spans, expected)


def test_a_rank_that_was_started_with_other_data_waits_for_no_index_of_it(tmp_path, monkeypatch):
    """It finds its own; which rank differs in what is said by the comparison of all ranks."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(parallel._meeting, "store", torch.distributed.HashStore())
    places = []
    for name in "here", "there":
        (tmp_path / name).mkdir()
        places.append(two_files(tmp_path / name))
    expected = Folder(places[1]).spans.clone()

    # the first rank of the machine reads `here`, the second one `there`, as their first index
    shutil.rmtree(next(tmp_path.glob("nanosail-index-*")))
    for rank, place in enumerate(places):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(index, "_asked", itertools.count())
        found = Folder(place, timeout=5).spans
    assert torch.equal(found, expected)


SCRIPT = """
import sys
import test_feeding
from data import index, readers, world
from data.encode import Encoder
from recipe import THINK
from tokenizer import Tokenizer, train_bpe
from vlm import PRESETS
if __name__ == "__main__":
    tokenizer = Tokenizer(train_bpe(world.corpus(100), 300), "", THINK)
    batches = test_feeding.fed(Encoder(tokenizer, PRESETS["toy"], max_length=256), 1)
    next(batches)
    if sys.argv[1] == "closed":
        batches.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "left"])
def test_a_script_that_reads_ahead_ends(tmp_path, how):
    """Its packing process has processes of its own: each must be told before it is waited for."""
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(tmp_path / "script.py"), how]
    assert subprocess.run(words, env=environment, timeout=240).returncode == 0
