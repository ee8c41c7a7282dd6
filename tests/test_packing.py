"""Packing: no document is lost, split or late, rows are full, and how the global batch is cut up
changes nothing."""

import hashlib
import itertools
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERY, answers
from PIL import Image
from test_data import record

import packing
from bench.packing_rules import (
    PackingOptions,
    Size,
    compare_rules,
    example_sizes,
    first_fit,
    measure_rule,
    naive,
)
from data import world
from data.encode import Encoder
from data.images import stacked
from data.readers import Folder
from data.sample import Document, Faults
from data.steps import Batches
from data.stream import Documents, Drawn
from packing import Rows, choose_subset, collate
from scale import parallel
from stage import Stage
from train import one_step
from vit import normalised

CAPACITY = 256
DRAWS = {
    "short": lambda r: r.randint(1, 12),
    "long": lambda r: r.randint(200, CAPACITY),
    "full": lambda r: CAPACITY,
    "two-valued": lambda r: r.choice((85, 129)),
    "mixed": lambda r: r.choice((r.randint(4, 40), r.randint(60, 220))),
    "zipf": lambda r: min(CAPACITY, int(3 * r.paretovariate(0.9))),
}


def made_of(lengths) -> list[Document]:
    """Documents whose every token tells which document and which place it is from."""

    def one(i: int, n: int) -> Document:
        ids = 1000 * (i + 1) + np.arange(n)
        labels = np.where(np.arange(n) % 3 == 1, ids + 1, -100)
        return Document(
            ids, labels, (labels >= 0) * np.float32(1 / (i + 1)), (), f"task{i}", str(i), {}
        )

    return [one(i, n) for i, n in enumerate(lengths)]


def stream(draw: str, seed: int, n: int) -> list[Document]:
    rng = random.Random(seed)
    return made_of([DRAWS[draw](rng) for _ in range(n)])


# ----------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("buffer", [1, 7, 64])
def test_every_document_is_packed_once_whole_in_a_row_that_holds_it(draw, buffer):
    for seed in range(3):
        given = stream(draw, seed, 150)
        made = list(Rows(iter(given), CAPACITY, buffer))
        assert sorted(id(d) for row in made for d in row) == sorted(
            id(d) for d in given
        )  # the very objects, once each
        assert all(0 < sum(map(len, row)) <= CAPACITY for row in made)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("buffer", [1, 5, 64])
def test_the_oldest_document_goes_first_so_none_waits_longer_than_the_buffer(draw, buffer):
    for seed in range(3):
        entered, made = {}, []

        def source():
            for i, d in enumerate(stream(draw, seed, 200)):
                entered[i] = len(made)  # how many rows had been handed out when it was read
                yield d

        for row in Rows(source(), CAPACITY, buffer):
            waiting = set(entered) - {int(d.origin) for r in made for d in r}
            assert (
                int(row[0].origin) == min(waiting)
                and len(waiting - {int(d.origin) for d in row}) <= buffer
            )
            made.append(row)
            assert all(len(made) - entered[int(d.origin)] <= buffer for d in row)


def test_a_stream_without_end_is_packed_while_it_is_read():
    endless = (d for i in itertools.count() for d in stream("mixed", i, 5))
    assert len(list(itertools.islice(Rows(endless, CAPACITY), 20))) == 20
    assert list(Rows(iter([]), CAPACITY)) == []


def test_a_document_longer_than_a_row_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"^2: 257 tokens do not fit in a row of 256"):
        list(Rows(iter(made_of([5, 256, 257])), CAPACITY))


@pytest.mark.parametrize("largest", [1, 3, 20, 60])
def test_fill_is_as_good_as_trying_every_subset(largest):
    rng = random.Random(largest)
    for _ in range(60):
        lengths = [rng.randint(1, largest) for _ in range(rng.randint(0, 9))]
        room = rng.randint(0, 4 * largest)
        sums = (sum(c) for k in range(len(lengths) + 1) for c in itertools.combinations(lengths, k))
        chosen = choose_subset([(n, 0) for n in lengths], room)
        assert len(set(chosen)) == len(chosen)
        assert sum(lengths[i] for i in chosen) == max(s for s in sums if s <= room)


def test_mixed_lengths_fill_the_rows_to_99_percent():
    for seed in range(3):
        made = list(Rows(iter(stream("mixed", seed, 1500)), CAPACITY))[
            :-2
        ]  # the stream's end has nothing to fill with
        assert sum(len(d) for row in made for d in row) / (CAPACITY * len(made)) >= 0.99
    first_fit = list(Rows(iter(stream("mixed", 0, 1500)), CAPACITY, buffer=1))
    assert (
        sum(len(d) for row in first_fit for d in row) / (CAPACITY * len(first_fit)) < 0.8
    )  # the buffer is what does it


def test_the_worlds_own_documents_fill_the_rows_to_99_percent(documents):
    made = list(Rows((documents[i % 40] for i in range(1200)), 512))[:-2]
    assert sum(len(d) for row in made for d in row) / (512 * len(made)) >= 0.99


# ------------------------------------------------------------------------------------------ collate


@pytest.mark.parametrize("capacity", [30, None])
def test_a_batch_holds_each_document_at_its_place_and_padding_elsewhere(capacity):
    given = made_of([7, 11, 5, 30, 1])
    group, T = [given[:3], given[3:4], given[4:]], capacity or 30
    batch = collate(group, capacity, pad=7)
    assert (
        batch.ids.shape
        == batch.labels.shape
        == batch.weights.shape
        == batch.positions.shape
        == (3, T)
    )
    assert (batch.ids.dtype, batch.labels.dtype, batch.weights.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    lengths, owners, free = [], [], torch.ones(3, T, dtype=torch.bool)
    for b, row in enumerate(group):
        at = 0
        for d in row:
            part = slice(at, at + len(d))
            assert (
                batch.ids[b, part].tolist() == d.ids.tolist()
                and batch.labels[b, part].tolist() == d.labels.tolist()
            )
            assert batch.weights[b, part].tolist() == d.weights.tolist()
            assert batch.positions[b, part].tolist() == list(range(len(d)))
            free[b, part] = False
            lengths.append(len(d))
            owners.append(d.task)
            at += len(d)
        if at < T:
            assert batch.positions[b, at:].tolist() == list(
                range(T - at)
            )  # padding is a document of its own
            lengths.append(T - at)
            owners.append("padding")
    assert (
        (batch.ids[free] == 7).all()
        and (batch.labels[free] == -100).all()
        and (batch.weights[free] == 0).all()
    )
    assert batch.segments.lengths == tuple(lengths) and batch.segments.cu.tolist() == [
        0,
        *itertools.accumulate(lengths),
    ]
    assert batch.segments.positions().tolist() == batch.positions.reshape(-1).tolist()
    assert batch.owners == owners and batch.real().tolist() == (~free).reshape(-1).tolist()
    assert batch.filled == pytest.approx(54 / (3 * T)) and batch.images is None
    assert batch.weight == pytest.approx(sum(float(d.weights.sum()) for d in given))


def test_pictures_of_a_batch_come_in_the_order_of_their_placeholders(documents, tokenizer):
    group = [documents[:3], documents[3:5]]
    batch = collate(group, 512, tokenizer.pad)
    arrays = [a for row in group for d in row for a in d.images]
    assert len(arrays) > 2 and torch.equal(batch.images, stacked(arrays))
    per_image = int((batch.ids == tokenizer.image).sum()) / len(arrays)
    counts = [int((d.ids == tokenizer.image).sum()) for row in group for d in row]
    assert counts == [per_image * len(d.images) for row in group for d in row]


# ------------------------------------------------------------------------------------------ batches


def dealt(given, size: int, accumulate: int, steps: int = 3) -> list[list[tuple]]:
    """For each step, the rows of all ranks' micro-batches, as tuples of ids."""
    ranks = [
        Batches(iter(given), CAPACITY, 4, accumulate, 0, rank, size, 8) for rank in range(size)
    ]
    out = []
    for _ in range(steps):
        step = [next(r) for r in ranks]
        assert all(
            len(mine) == accumulate and len(b.ids) == 4 // (size * accumulate)
            for mine in step
            for b in mine
        )
        out.append([tuple(row.tolist()) for mine in step for b in mine for row in b.ids])
    return out


@pytest.mark.parametrize("size, accumulate", [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_ranks_and_accumulation_deal_out_the_same_rows_each_step(size, accumulate):
    given = stream("mixed", 0, 300)
    whole, cut = dealt(given, 1, 1), dealt(given, size, accumulate)
    assert [sorted(step) for step in cut] == [sorted(step) for step in whole]
    assert (
        all(len(set(step)) == 4 for step in cut)
        and len({row for step in cut for row in step}) == 12
    )


@pytest.mark.parametrize("count, size, accumulate", [(4, 1, 3), (4, 3, 1), (6, 2, 2), (3, 4, 1)])
def test_rows_that_do_not_divide_are_an_error(count, size, accumulate):
    with pytest.raises(ValueError, match="do not divide"):
        next(Batches(iter(stream("mixed", 0, 50)), CAPACITY, count, accumulate, 0, 0, size))


def test_a_last_step_without_all_its_rows_is_filled_up_with_padding_of_no_weight():
    steps = list(Batches(iter(made_of([CAPACITY] * 5)), CAPACITY, 4, 2, 7))
    assert (
        [len(step) for step in steps] == [2, 2]
        and steps[1][1].weight == 0
        and (steps[1][1].ids == 7).all()
    )
    assert sum(b.weight for step in steps for b in step) == pytest.approx(
        sum(float(d.weights.sum()) for d in made_of([CAPACITY] * 5))
    )


# ------------------------------------------------------------------------------------- stop, resume


def told(step) -> list[list]:
    """A step's rows as lists, to compare."""
    return [row.tolist() for b in step for row in b.ids]


def numbered(seed: int = 0):
    """Encoded documents under their numbers, without end: a pure function of the number."""

    def draw(n: int) -> Document:
        length = DRAWS["mixed"](random.Random(f"{seed}/{n}"))
        return Document(
            np.full(length, n), np.full(length, n), np.ones(length, np.float32), (), "", str(n), {}
        )

    return Documents(Drawn(draw), None, None)


def test_after_a_stop_anywhere_the_steps_are_those_of_a_run_without_it():
    def run():
        return Batches(numbered(), CAPACITY, 4, 2, 0)

    whole = [told(step) for _, step in zip(range(30), run())]
    rng, made, data = random.Random(0), [], run()
    for _ in range(20):  # each life ends after a few steps; what it leaves is a line of JSON
        for _ in range(rng.randrange(3)):
            made.append(told(next(data)))
        left = json.dumps(data.state_dict())
        assert len(left) < 3000
        data = run()
        data.load_state_dict(json.loads(left))
    assert len(made) > 10 and made == whole[: len(made)]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_another_number_of_ranks_goes_on_with_the_rows_that_would_have_followed(before, after):
    def run(size: int, steps: int, state: dict | None) -> tuple[list, dict]:
        ranks = [Batches(numbered(), CAPACITY, 4, 1, 0, rank, size) for rank in range(size)]
        for r in ranks:
            if state:
                r.load_state_dict(state)
        made = [[told(next(r)) for r in ranks] for _ in range(steps)]
        parts = [r.state_dict() for r in ranks]
        return made, parts[0] | {"buffers": {k: v for p in parts for k, v in p["buffers"].items()}}

    whole, _ = run(1, 9, None)
    first, state = run(before, 4, None)
    second, _ = run(after, 5, json.loads(json.dumps(state)))
    for a, b in zip(whole, first + second, strict=True):
        assert sorted(a[0]) == sorted(row for rank in b for row in rank)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_over_a_change_of_ranks_an_epoch_has_every_document_once(before, after):
    lengths = [DRAWS["mixed"](random.Random(i)) for i in range(200)]

    def run(size: int, steps: int, state: dict | None) -> tuple[list, dict]:
        ranks = [
            Batches(Documents(made_of(lengths), None, None), CAPACITY, 4, 1, 0, rank, size, lanes=4)
            for rank in range(size)
        ]
        for r in ranks:
            if state:
                r.load_state_dict(state)
        seen = [
            int(i) // 1000
            for r in ranks
            for _ in range(steps)
            for b in next(r, [])
            for i in b.ids[b.positions == 0]
            if i
        ]
        parts = [r.state_dict() for r in ranks]
        return seen, parts[0] | {"buffers": {k: v for p in parts for k, v in p["buffers"].items()}}

    first, state = run(before, 6, None)
    second, _ = run(after, 100, state)
    assert sorted(first + second) == list(range(1, 201)) and len(first) > 40


@pytest.mark.parametrize("count", [3, 5, 6, 7, 10, 12, 16, 48])
def test_rows_are_the_same_for_every_number_of_ranks_that_divides_them(count):
    """From the first step on: what a rank holds changes, the rows of a step do not."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    want = None
    for size in divisors:
        ranks = [Batches(numbered(), CAPACITY, count, 1, 0, rank, size) for rank in range(size)]
        steps = [sorted(row for r in ranks for row in told(next(r))) for _ in range(3)]
        want = want or steps
        assert steps == want, size
        # a rank reads its own lanes only
        shared = size // np.gcd(size, ranks[0].lanes)
        assert all(len(r.mine) * size == r.lanes * shared for r in ranks)


def with_vision(seed: int, n: int = 120) -> list[Document]:
    """Documents of mixed lengths, some of them with tiles of two sizes."""
    rng = random.Random(seed)
    made = stream("mixed", seed, n)
    return [replace(d, vision=rng.choice((0, 0, 16, 16, 48, 7 * (seed % 2)))) for d in made]


def test_what_shares_a_row_is_for_ever():
    """A run that goes on with newer code packs what is to come as it would have been packed: these
    digests change when any rule of packing does, which ends the promise for runs in progress."""
    rng = random.Random(0)
    chosen = []
    for _ in range(60):
        sizes = [(rng.randint(1, 120), rng.choice((0, 0, 16, 48, 5))) for _ in range(20)]
        want = rng.choice((0.0, 30.0, 90.0, 250.0))
        unit, slack = rng.choice(((16, 0), (1, 3), (4, 0)))
        chosen.append(choose_subset(sizes, rng.choice((60, 256, 700)), want, unit, slack))
    rows = []
    for seed in range(4):
        for buffer in (4, 16, 64):
            packed = Rows(with_vision(seed), CAPACITY, buffer)
            rows.append([[d.origin for d in row] for row in packed])
    digests = [hashlib.sha256(repr(what).encode()).hexdigest()[:16] for what in (chosen, rows)]
    assert digests == ["e27ab69d658c15af", "4b9be9792ea2e6ad"]


@pytest.mark.parametrize("rows, lanes", [(64, 32), (66, 2), (8, 8), (33, 1)])
def test_a_fresh_run_has_as_many_lanes_as_powers_of_two_share(rows, lanes):
    assert Batches(numbered(), CAPACITY, rows, 1, 0).lanes == lanes


def test_a_state_with_another_number_of_lanes_goes_on_with_those():
    whole = Batches(numbered(), CAPACITY, 10, 1, 0, lanes=5)
    steps = [told(next(whole)) for _ in range(6)]
    first = Batches(numbered(), CAPACITY, 10, 1, 0, lanes=5)
    assert [told(next(first)) for _ in range(2)] == steps[:2]
    state = json.loads(json.dumps(first.state_dict()))
    second = Batches(numbered(), CAPACITY, 10, 1, 0)
    assert second.lanes == 2
    second.load_state_dict(state)
    assert second.lanes == 5 and [told(next(second)) for _ in range(4)] == steps[2:]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (4, 1), (1, 4), (2, 4)])
def test_a_weight_by_documents_resumes_on_any_number_of_ranks(before, after):
    """Eq. 2's division: 160 documents, a stop after ten steps, each seen once, and a step's weight
    is its documents."""
    lengths = [DRAWS["mixed"](random.Random(i)) for i in range(160)]

    def run(size: int, steps: int, state: dict | None) -> tuple[list, dict]:
        ranks = [
            Batches(
                Documents(made_of(lengths), None), CAPACITY, 4, 1, 0, rank, size, per_sample=True
            )
            for rank in range(size)
        ]
        seen = []
        for r in ranks:
            if state:
                r.load_state_dict(state)
            for _ in range(steps):
                for b in next(r, []):
                    inside = [o for o in b.owners if o != "padding"]
                    assert b.weight == b.count <= len(inside)
                    seen += inside
        parts = [r.state_dict() for r in ranks]
        buffers = {k: v for p in parts for k, v in p["buffers"].items()}
        return seen, json.loads(json.dumps(parts[0] | {"buffers": buffers}))

    first, state = run(before, 4, None)
    second, _ = run(after, 100, state)
    assert 40 < len(first) < 160
    assert sorted(first + second) == sorted(f"task{i}" for i in range(160))


def test_a_batch_counts_the_documents_that_have_something_to_learn():
    given = made_of([1, 2, 7, 30])  # the first two have no label, or one
    batch = collate([given[:2], given[2:]], 64, 0, per_sample=True)
    labelled = [d for d in given if (d.labels >= 0).any()]
    assert batch.count == len(labelled) == 3 and batch.weight == 3.0
    moved = batch.to("meta")
    assert moved.ids.device.type == "meta" and moved.weight == 3.0 and moved.per_sample
    by_weights = collate([given[:2], given[2:]], 64, 0)
    assert by_weights.weight == pytest.approx(sum(float(d.weights.sum()) for d in given))
    assert by_weights.count == 3


def test_a_document_that_waited_and_cannot_be_read_again_is_counted():
    gone = [False]

    def draw(n: int) -> Document:
        if gone[0] and n % 5 == 0:
            raise OSError("the disk is gone")
        length = DRAWS["mixed"](random.Random(n))
        labels = np.full(length, n)
        return Document(labels, labels, np.ones(length, np.float32), (), "", str(n), {})

    def run() -> Batches:
        return Batches(Documents(Drawn(draw), None), CAPACITY, 4, 1, 0)

    data = run()
    next(data)
    state = data.state_dict()
    gone[0] = True
    data = run()
    data.load_state_dict(state)
    waited = sum(n % 5 == 0 for s in state["buffers"].values() for n in s["waiting"])
    assert waited and data.documents.faults.counts == {"unexpected OSError": waited}


def test_a_plain_iterator_is_walked_again_to_where_it_was():
    def run():
        return Batches((d for d in stream("mixed", 0, 300)), CAPACITY, 4, 1, 0)

    whole = [told(step) for step in run()]
    data = run()
    first = [told(next(data)) for _ in range(5)]
    again = run()
    again.load_state_dict(data.state_dict())
    assert first + [told(step) for step in again] == whole


@pytest.mark.parametrize("kind", ["numbers", "files"])
def test_a_run_that_is_killed_continues_with_the_same_rows(tmp_path, tokenizer, config, kind):
    """SIGKILL between any two file operations, twenty times: each life logs rows and commits a
    state after each step."""

    def run() -> Batches:
        return Batches(
            numbered() if kind == "numbers" else on_disk(tmp_path, tokenizer, config),
            CAPACITY,
            4,
            1,
            0,
        )

    whole = [told(step) for _, step in zip(range(60), run())]
    rng, kills = random.Random(0), 0
    log, state = tmp_path / "log", tmp_path / "state"
    while not log.is_file() or len(log.read_text().splitlines()) < 60:
        # the file operation after which this life ends
        last = rng.randint(1, 6) if kills < 20 else None
        child = os.fork()
        if child == 0:
            operations = itertools.count(1)

            def put(path, text):
                (tmp_path / "new").write_text(text)
                (tmp_path / "new").rename(path)
                if next(operations) == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            data, done = run(), 0
            if state.is_file():
                done, saved = json.loads(state.read_text())
                data.load_state_dict(saved)
            lines = log.read_text().splitlines(True)[:done] if log.is_file() else []
            while done < 60:
                lines, done = lines + [json.dumps(told(next(data))) + "\n"], done + 1
                put(log, "".join(lines))
                put(state, json.dumps([done, data.state_dict()]))
            os._exit(0)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert kills == 20 and [json.loads(line) for line in log.read_text().splitlines()] == whole


def on_disk(place, tokenizer, config, epochs: float = 0) -> Documents:
    """200 samples in two files, a tenth of them without their picture, read through a mixture; the
    answers count them."""
    if not (place / "mix.json").is_file():
        Image.new("RGB", (32, 32), "red").save(place / "red.png")
        for name in ("a", "b"):
            rows = [
                record(
                    "<image>?" + "x" * (i * 7 % 50),
                    f"{name}{i}",
                    "gone.png" if i % 10 == 3 else "red.png",
                )
                for i in range(100)
            ]
            (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (place / "mix.json").write_text(
            json.dumps(
                {
                    "datasets": {
                        name: {"data": f"{name}.jsonl", "weight": weight, "epochs": epochs}
                        for name, weight in (("a", 3.0), ("b", 1.0))
                    }
                }
            )
        )
    return Documents(Folder(place / "mix.json").stream({}, 0), Encoder(tokenizer, config), Faults())


def said(steps, tokenizer) -> list[str]:
    """The answers in these steps: which samples they hold."""
    found = []
    for b in (b for step in steps for b in step):
        at = b.labels.flatten()
        for part in at.split(b.segments.lengths):
            answer = tokenizer.decode([y for y in part.tolist() if y >= 0][:-1])
            found += [answer] if answer else []
    return found


def rank_of_two(rank: int, place: str, tokenizer, config) -> None:
    """First a run of its own, killed after three steps; or, when there is a state, on from there to
    the end."""
    place = Path(place)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2
    )
    data, begun = (
        Batches(on_disk(place, tokenizer, config, epochs=1), CAPACITY, 4, 1, 0, rank, 2, lanes=4),
        place / "state",
    )
    if begun.is_file():
        data.load_state_dict(json.loads(begun.read_text()))
        (place / f"second-{rank}").write_text(
            json.dumps([said([step], tokenizer) for step in data])
        )
    else:
        (place / f"first-{rank}").write_text(
            json.dumps([said([next(data)], tokenizer) for _ in range(3)])
        )
        state = data.state_dict()
        if rank == 0:
            begun.write_text(json.dumps(state))
    uneven = Batches(
        Documents(made_of([CAPACITY, 4] * 40), None, None), CAPACITY, 4, 1, 0, rank, 2, lanes=4
    )
    (place / f"uneven-{rank}").write_text(
        json.dumps([sum(b.weight for b in step) for step in uneven])
    )
    torch.distributed.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def two_ranks(place: Path, tokenizer, config) -> None:
    (place / "meet").unlink(missing_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    both = [
        context.Process(target=rank_of_two, args=(rank, str(place), tokenizer, config))
        for rank in range(2)
    ]
    for p in both:
        p.start()
    for p in both:
        p.join(240)
    assert [p.exitcode for p in both] == [-signal.SIGKILL] * 2


@pytest.mark.slow
def test_two_killed_processes_become_one_and_one_becomes_two_within_an_epoch(
    tmp_path, tokenizer, config
):
    """Nothing is lost or seen twice, and the rank whose samples end first does not stop the other:
    it gets padding till the end."""
    everything = sorted(f"{name}{i}" for name in "ab" for i in range(100) if i % 10 != 3)

    def alone() -> Batches:
        return Batches(on_disk(tmp_path, tokenizer, config, epochs=1), CAPACITY, 4, 1, 0, lanes=4)

    data = alone()  # writes the files, before two processes look for them
    two_ranks(tmp_path, tokenizer, config)
    first = [
        a
        for rank in range(2)
        for step in json.loads((tmp_path / f"first-{rank}").read_text())
        for a in step
    ]
    data.load_state_dict(json.loads((tmp_path / "state").read_text()))
    assert len(first) > 30 and sorted(first + said(data, tokenizer)) == everything
    long, short = [json.loads((tmp_path / f"uneven-{rank}").read_text()) for rank in range(2)]
    assert len(long) == len(short) == 20 and min(long) > 0 and not any(short[1:])

    data = alone()
    first = said([next(data) for _ in range(3)], tokenizer)
    (tmp_path / "state").write_text(json.dumps(data.state_dict()))
    two_ranks(tmp_path, tokenizer, config)
    second = [json.loads((tmp_path / f"second-{rank}").read_text()) for rank in range(2)]
    assert (
        len(second[0]) == len(second[1])
        and sorted(first + [a for rank in second for step in rank for a in step]) == everything
    )


def test_data_that_changed_or_that_ranks_see_differently_is_refused(
    tmp_path, tokenizer, config, monkeypatch
):
    """A record more or less, and every number means another record."""
    data = Batches(on_disk(tmp_path, tokenizer, config, epochs=1), CAPACITY, 4, 1, 0)
    state = data.state_dict()
    data.load_state_dict(json.loads(json.dumps(state)))
    with open(tmp_path / "a.jsonl", "a") as f:
        f.write(json.dumps(record("<image>?", "new", "red.png")) + "\n")
    more = on_disk(tmp_path, tokenizer, config, epochs=1)
    with pytest.raises(ValueError, match=r"read \[100, 100\] records, now there are \[101, 100\]"):
        Batches(more, CAPACITY, 4, 1, 0).load_state_dict(state)
    monkeypatch.setattr(parallel, "gather", lambda values: [[100, 100], *values])
    with pytest.raises(ValueError, match="wait until every node has all files"):
        Batches(more, CAPACITY, 4, 1, 0)


# -------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("mix", ["tiles", "any-resolution", "short", "long", "two-valued", "zipf"])
def test_rows_are_full_and_the_vision_balanced_whatever_the_lengths(mix):
    count = 12000 if mix in ("short", "zipf") else 3000
    sizes = [Size(t, v) for t, v in example_sizes(mix, count, seed=1)]
    for ranks, most in ((8, 1.03), (32, 1.05)):
        figures, made = measure_rule(Rows, sizes, 8192, ranks)
        assert sorted(map(id, (d for row in made for d in row))) == sorted(map(id, sizes))
        least = 0.999 if mix in ("tiles", "any-resolution") else 0.99
        assert figures["fill"] >= least and figures["max_wait_rows"] <= 64
        assert figures["vision_max_over_mean"] <= most or mix in ("long", "zipf")


def test_the_simpler_rules_keep_every_document_once_and_within_the_row():
    sizes = [Size(t, v) for t, v in example_sizes("tiles", 500, seed=2)]
    for rule in (naive, first_fit):
        made = list(rule(iter(sizes), 8192))
        assert sorted(map(id, (d for row in made for d in row))) == sorted(map(id, sizes))
        assert all(sum(map(len, row)) <= 8192 for row in made)


def test_the_command_prints_the_three_rules_and_draws_the_rows(tmp_path, capsys):
    compare_rules(PackingOptions(example=tmp_path / "lengths.txt", samples=600))
    with open(tmp_path / "lengths.txt", "a") as f:
        f.write("9000 3\n")
    capsys.readouterr()
    compare_rules(PackingOptions(tmp_path / "lengths.txt", json=True, out=tmp_path / "rows.png"))
    found = json.loads(capsys.readouterr().out)
    assert found["naive"]["fill"] < 0.95 < found["ours"]["fill"]
    assert found["first_fit"]["fill"] < found["ours"]["fill"]
    assert found["ours"]["padding"] == pytest.approx(1 - found["ours"]["fill"])
    assert set(found["ours"]) == {
        "fill",
        "padding",
        "vision_max_over_mean",
        "attention_max_over_mean",
        "max_wait_rows",
        "us_per_sample",
    }
    assert Image.open(tmp_path / "rows.png").size[0] > 100
    compare_rules(PackingOptions(tmp_path / "lengths.txt", out=tmp_path / "rows.png"))
    assert "1 left out" in capsys.readouterr().out


def test_a_list_that_is_none_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "lengths.txt").write_text("100 2\n\nhello\n")
    with pytest.raises(ValueError, match="lengths.txt:3: not two whole numbers: 'hello'"):
        compare_rules(PackingOptions(tmp_path / "lengths.txt"))
    (tmp_path / "lengths.txt").write_text("9000 2\n")
    with pytest.raises(ValueError, match="none of 1 lengths fits in a row of 8192"):
        compare_rules(PackingOptions(tmp_path / "lengths.txt"))
    with pytest.raises(ValueError, match="give --lengths FILE"):
        compare_rules(PackingOptions())


# ------------------------------------------------------------------------------------- loss weights


@pytest.mark.parametrize(
    "weighting, total",
    [
        ("token", lambda n: n),
        ("sequence", lambda n: n),
        ("sample", lambda n: 1),
        ("sqrt", lambda n: n**0.5),
    ],
)
def test_a_sample_weighs_as_much_as_its_weighting_says(encoder, weighting, total):
    seen = set()
    for i in range(20):
        d = replace(encoder, weighting=weighting)(world.sample(i, 1, EVERY))
        n = int((d.labels >= 0).sum())
        seen.add(n)
        assert ((d.weights > 0) == (d.labels >= 0)).all() and len(
            set(d.weights[d.labels >= 0].tolist())
        ) == 1
        assert float(d.weights.sum()) == pytest.approx(total(n), rel=1e-5)
    assert len(seen) > 5


def test_the_objective_is_the_weighted_sum_of_the_labels_log_probabilities(
    model, encoder, tokenizer
):
    found = [replace(encoder, weighting="sqrt")(world.sample(i, 1, EVERY)) for i in range(5)]
    batch = collate([found[:3], found[3:]], 512, tokenizer.pad)
    loss, stats = answers(model, batch)
    with torch.no_grad():
        logits = model(batch.ids, batch.images, batch.positions, batch.segments)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    assert float(loss.detach()) == pytest.approx(
        float((each * batch.weights).sum()), rel=1e-5
    ) and stats["loss"] == float(loss)


class Caught:
    """In the optimizer's place: keeps the gradient that a step would have used."""

    def __init__(self, parameters):
        self.parameters, self.param_groups = parameters, [{"lr": 0.0, "scale": 1.0}]

    def step(self):
        self.gradient = torch.cat([p.grad.flatten() for p in self.parameters])

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_one_batch_of_four_rows_and_four_batches_of_one_have_the_same_loss_and_gradient(
    model, encoder, tokenizer, weighting
):
    model.double()
    found = [replace(encoder, weighting=weighting)(world.sample(i, 1, EVERY)) for i in range(8)]
    group = [found[:4], found[4:5], found[5:7], found[7:]]  # rows of very different weight

    def objective(m, b, stage):
        return answers(
            m, replace(b, images=None if b.images is None else normalised(b.images).double())
        )

    def step(micro):
        parameters = list(model.parameters())
        caught = Caught(parameters)
        row = one_step(model, [caught], micro, objective, 1.0, Stage(clip=1e9), parallel.Ranks())
        return row["loss"], row["grad_norm"], caught.gradient

    whole = step([collate(group, 512, tokenizer.pad)])
    parts = [collate([row], 512, tokenizer.pad) for row in group]
    assert max(b.weight for b in parts) > 1.5 * min(b.weight for b in parts)
    split = step(parts)
    assert split[:2] == pytest.approx(whole[:2], rel=1e-6) and whole[1] > 0
    assert (split[2] - whole[2]).norm() <= 1e-6 * whole[2].norm()


@pytest.mark.parametrize("weighting", ["token", "sample", "sqrt"])
def test_packed_gradients_are_those_of_single_documents_for_any_ranks_and_accumulation(
    model, encoder, weighting
):
    """In fp32. Ranks are played one after another: their gradients are summed, as
    parallel.sum_gradients does."""
    given = [
        replace(replace(encoder, weighting=weighting)(world.sample(i, 1, EVERY)), task=str(i))
        for i in range(60)
    ]
    steps = {
        (size, accumulate): [
            b
            for rank in range(size)
            for b in next(Batches(given, 512, 4, accumulate, 0, rank, size, 16, lanes=4))
        ]
        for size, accumulate in ((1, 1), (1, 4), (2, 2), (4, 1))
    }
    inside = [given[int(name)] for b in steps[1, 1] for name in b.owners if name != "padding"]

    def gradient(parts: list) -> torch.Tensor:
        weight = sum(b.weight for b in parts)
        for b in parts:
            (answers(model, b)[0] / weight).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return found

    alone = gradient([collate([[d]], None, 0) for d in inside])
    assert sum(b.weight for b in steps[1, 1]) == pytest.approx(
        sum(float(d.weights.sum()) for d in inside), rel=1e-5
    )
    for how, parts in steps.items():
        assert (gradient(parts) - alone).norm() <= 1e-5 * alone.norm(), how


def test_memory_is_pinned_where_the_accelerator_can(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    packing.can_pin.cache_clear()
    assert packing.can_pin()
    packing.can_pin.cache_clear()
