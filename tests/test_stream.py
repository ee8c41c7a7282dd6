"""Streams: one bad record costs one record, nothing waits for ever, and a mapped stream reads like
any other."""

import functools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import data.encode
from data.encode import Encoder
from data.readers import Folder
from data.remote import StoreError
from data.sample import BadSample, Faults, Message, Sample
from data.steps import Batches
from data.stream import (
    SILENCE,
    Documents,
    Drawn,
    EndOfStream,
    Listed,
    Mapped,
    Order,
    Share,
    Stream,
    Walk,
    Workers,
    fault_of,
    read_sample,
)


def sample(n: int) -> Sample:
    """Question and answer that tell the number."""
    question, answer = Message("user", (f"q{n}",)), Message("assistant", (f"a{n}",))
    return Sample((question, answer), "task", f"here:{n}", {"answer": f"a{n}"})


class Ordered(Stream):
    """Numbered samples in an order over two groups, the first of them read once."""

    def __init__(self, sizes=(300, 100), epochs=(1, 1), weights=(3.0, 1.0), seed=0):
        super().__init__()
        ends = torch.tensor(sizes).cumsum(0).tolist()
        groups = [torch.arange(end - n, end) for n, end in zip(sizes, ends)]
        self.order = Order(groups, list(weights), list(epochs), seed)
        self.endless = self.order.endless

    def __getitem__(self, n: int):
        found = self.order[n]
        return None if found is None else sample(found[1])


def answers(documents, tokenizer) -> list[str]:
    return [tokenizer.decode(d.labels[d.labels >= 0][:-1]) for d in documents]


def asked_again(s: Sample, mark: str) -> Sample:
    """For `Mapped`: another answer."""
    return Sample(
        (s.messages[0], Message("assistant", (mark + s.facts["answer"],))), origin=s.origin
    )


def even_only(s: Sample) -> Sample | None:
    return s if int(s.facts["answer"][1:]) % 2 == 0 else None


# ---------------------------------------------------------------------- one record costs one record


@pytest.mark.parametrize(
    "error", [IndexError, KeyError, struct.error, TypeError, AssertionError, RecursionError]
)
def test_an_exception_while_a_record_is_read_is_a_fault_of_that_record(encoder, error):
    def draw(n: int) -> Sample:
        if n == 40:
            raise error("a damaged header")
        if n == 400:
            raise EndOfStream(n)
        return sample(n)

    documents = Documents(Drawn(draw), encoder)
    assert len(list(documents)) == 399
    reason = f"unexpected {error.__name__}"
    assert documents.faults.counts == {reason: 1}
    assert "sample 40 of the stream" in documents.faults.examples[reason]
    assert "in draw" in documents.faults.tracebacks[reason]


@pytest.mark.parametrize("error", [IndexError, struct.error, ZeroDivisionError])
def test_an_exception_while_a_picture_is_decoded_is_a_fault_and_not_the_end(
    tmp_path, tokenizer, config, monkeypatch, error
):
    """As Pillow raises IndexError for a damaged GIF: the records after it are read all the same."""
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    rows = [
        {
            "image": "bad.png" if i == 7 else "good.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nq{i}"},
                {"from": "gpt", "value": f"a{i}"},
            ],
        }
        for i in range(30)
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    whole = data.encode.open_image

    def damaged(picture, root, origin):
        if "bad" in str(picture):
            raise error("n_frames")
        return whole(picture, root, origin)

    monkeypatch.setattr(data.encode, "open_image", damaged)
    folder = Folder(tmp_path / "my.jsonl")
    documents = Documents(folder.first(), Encoder(tokenizer, config, folder.root), folder.faults)
    assert answers(documents, tokenizer) == [f"a{i}" for i in range(30) if i != 7]
    ((reason, count),) = folder.faults.counts.items()
    assert (
        count == 1 and error.__name__ in reason and "my.jsonl:8" in folder.faults.examples[reason]
    )
    assert "damaged" in folder.faults.tracebacks[reason]


def test_strict_makes_an_unforeseen_exception_an_error_that_names_the_record(encoder):
    def draw(n: int) -> Sample:
        raise IndexError("no such frame")

    with pytest.raises(BadSample, match="unexpected IndexError: sample 0 of the stream: no such"):
        next(iter(Documents(Drawn(draw), encoder, Faults(strict=True))))


def test_an_iterator_that_raises_is_over_and_says_so(encoder):
    """It cannot be asked again: counting its exception as a fault would end the data in silence."""

    def some():
        yield sample(0)
        raise KeyError("lost")

    documents = iter(Documents(some(), encoder))
    next(documents)
    with pytest.raises(KeyError, match="lost"):
        next(documents)


def test_a_list_ends_where_it_ends(encoder, tokenizer):
    documents = Documents([sample(i) for i in range(3)], encoder)
    assert answers(documents, tokenizer) == ["a0", "a1", "a2"] and not documents.endless
    for stream in (Listed([1, 2]), Walk([1, 2]), Ordered((1, 1))):
        with pytest.raises(EndOfStream):
            [stream[n] for n in range(100_000)]


# --------------------------------------------------------------------------- nothing waits for ever


def test_a_stream_with_nothing_for_the_stage_is_an_error_that_shows_the_first(encoder):
    chains = Mapped(
        Ordered(epochs=(0, 0)), lambda s: None, "a chain (<think> or facts.chain)", faults=Faults()
    )
    want = (
        r"\d+ samples in a row do not have a chain \(<think> or facts.chain\); the first: here:\d+"
    )
    with pytest.raises(ValueError, match=want + r" \(turns: user, assistant; facts: answer\)") as e:
        next(iter(Documents(chains, encoder)))
    # all 400 records were tried, and hardly any four times
    assert 400 <= int(str(e.value).split()[0]) < 2000
    with pytest.raises(ValueError, match=want):
        next(chains)  # RL and the image stage iterate over samples
    with pytest.raises(ValueError, match=want):
        next(Batches(Documents(chains, encoder), 512, 8, 1, 0))
    without_order = Mapped(Drawn(sample), lambda s: None, "a chain")
    for stream in (
        Drawn(lambda n: None),
        without_order,
        Mapped(Walk(map(sample, range(10**6))), lambda s: None),
    ):
        with pytest.raises(ValueError, match=f"{SILENCE} samples in a row do not have"):
            next(iter(Documents(stream, encoder)))


def test_records_that_are_bad_or_empty_are_tried_once_around_and_not_for_ever(encoder):
    """Where every record is either: the error names both, long before either limit alone."""

    def even_is_bad(s: Sample) -> None:
        if int(s.facts["answer"][1:]) % 2 == 0:
            raise BadSample("even", s.origin)

    stream = Mapped(Ordered((20, 30), (0, 0)), even_is_bad)
    with pytest.raises(ValueError, match=r"samples in a row do not have(.|\n)*x even; first: even"):
        next(iter(Documents(stream, encoder)))
    # one good record among 300 is found, however long it takes
    one = Mapped(Ordered(epochs=(0, 0)), lambda s: s if s.facts["answer"] == "a17" else None)
    assert answers([next(iter(Documents(one, encoder)))], encoder.tokenizer) == ["a17"]


def test_faults_without_end_are_an_error_that_names_the_first(encoder):
    def broken(s: Sample) -> Sample:
        raise BadSample("no chain", f"{s.origin}: nothing there")

    stream = Mapped(Ordered(epochs=(0, 0)), broken)
    with pytest.raises(
        ValueError, match=r"1000 samples in a row(.|\n)*1000 x no chain; first: .*here"
    ):
        next(iter(Documents(stream, encoder)))
    with pytest.raises(ValueError, match="1000 samples in a row"):
        next(stream)


def test_no_document_at_all_is_an_error_and_not_a_short_run(encoder):
    documents = Documents([Sample((Message("user", ("alone",)),), origin="here:1")], encoder)
    with pytest.raises(
        ValueError, match="no usable document\n.*1 x nothing to learn; first: .*here:1"
    ):
        next(Batches(documents, 512, 4, 1, 0))


def test_a_used_up_group_is_no_silence(encoder):
    """Its numbers go on and hold nothing, in runs far over the limit of silence here; the rest is
    all read."""
    stream = Ordered((50, 3), (1, 1), (20000.0, 1.0))
    found = list(Documents(stream, encoder))
    assert len(found) == 53 and found[-1].number > 10_000


def test_too_many_draws_on_what_is_used_up_are_an_error(encoder, monkeypatch):
    monkeypatch.setattr("data.stream.USED_UP", 20)
    stream = Ordered((50, 3), (1, 1), (20000.0, 1.0))
    with pytest.raises(ValueError, match="^20 draws in a row fell on data whose epochs are over"):
        list(Documents(stream, encoder))


def test_the_order_of_a_seed_is_for_ever():
    """A run that goes on with newer code reads on in the same order: these numbers must never change."""
    order = Order([torch.arange(6), torch.arange(6, 9)], [2.0, 1.0], [0, 0], 7)
    drawn = [(0, 5), (1, 7), (1, 6), (0, 1), (0, 2), (1, 8), (0, 4), (1, 8), (1, 7), (0, 0), (0, 3)]
    assert [order[n] for n in range(11)] == drawn
    long = Order([torch.arange(3 * 8192 + 100)], [1.0], [0], 7)
    places = (0, 1, 2, 8191, 8192, 2 * 8192, 3 * 8192 + 99, 3 * 8192 + 100)
    drawn = [23143, 892, 19505, 14363, 6233, 4370, 24657, 11521]
    assert [long[n][1] for n in places] == drawn


def test_a_sequence_of_ones_own_is_numbered_unless_it_says_otherwise():
    class Own:
        def __getitem__(self, n):
            raise KeyError(n)

    assert read_sample(Own(), 3).reason == "unexpected KeyError"


def test_a_group_of_no_weight_does_not_keep_a_stream_from_ending(encoder):
    stream = Ordered((5, 7), (1, 0), (1.0, 0.0))
    assert not stream.endless
    assert len(list(Documents(stream, encoder))) == 5


def test_iterating_counts_faults_passes_over_nothing_and_ends():
    stream = Mapped([sample(i) for i in range(6)], even_only)
    assert [s.origin for s in stream] == ["here:0", "here:2", "here:4"] and list(stream) == []

    def odd_is_bad(s: Sample) -> Sample:
        if int(s.facts["answer"][1:]) % 2:
            raise BadSample("odd", s.origin)
        return s

    stream = Mapped([sample(i) for i in range(5)], odd_is_bad)
    assert len(list(stream)) == 3 and stream.faults.counts == {"odd": 2}


# ----------------------------------------------------------------------------------- mapped streams


def test_iterating_goes_on_from_a_number():
    """What RL saves of its questions: where it was, and under which number each was drawn."""
    stream = Mapped(Ordered(), even_only)
    drawn = []
    for _ in range(20):
        found = next(stream)
        drawn.append((stream.at - 1, found.origin))
    again = Mapped(Ordered(), even_only)
    again.go_to(drawn[7][0])
    assert [next(again).origin for _ in range(13)] == [origin for _, origin in drawn[7:]]
    assert [again[n].origin for n, _ in drawn] == [origin for _, origin in drawn]


def test_a_mapped_stream_has_the_numbers_and_records_of_the_one_below(encoder, tokenizer):
    below = Ordered()
    mapped = Mapped(Mapped(below, even_only), functools.partial(asked_again, mark="!"))
    documents, plain = Documents(mapped, encoder), Documents(below, encoder)
    assert documents.records == plain.records == [300, 100] and documents.numbered
    assert documents.endless == below.endless is False
    assert Mapped(Ordered(epochs=(0, 0)), even_only).endless
    below_it, found = list(plain), list(documents)
    by_number = {d.number: a for d, a in zip(below_it, answers(below_it, tokenizer))}
    for d, answer in zip(found, answers(found, tokenizer), strict=True):
        assert answer == "!" + by_number[d.number]
    assert sum(int(a[1:]) % 2 == 0 for a in by_number.values()) == len(found)


def test_a_mapped_iterator_has_one_lane_and_is_walked_again(encoder):
    def run() -> Batches:
        return Batches(
            Documents(Mapped((sample(i) for i in range(900)), even_only), encoder), 128, 4, 1, 0
        )

    data = run()
    assert data.lanes == 1
    whole = [[b.ids.tolist() for b in step] for step in data]
    data = run()
    first = [[b.ids.tolist() for b in next(data)] for _ in range(3)]
    again = run()
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert first + [[b.ids.tolist() for b in step] for step in again] == whole


@pytest.mark.parametrize("before, after", [(1, 3), (4, 1), (2, 4)])
def test_chains_and_questions_resume_on_any_number_of_ranks(encoder, tokenizer, before, after):
    """Rows of a mapped stream, some of it nothing, some of it bad: after a stop elsewhere each
    sample is seen once."""

    def third_is_bad(s: Sample) -> Sample:
        if int(s.facts["answer"][1:]) % 30 == 0:
            raise BadSample("thirty", s.origin)
        return s

    def run(ranks: int, steps: int, state: dict | None):
        stream = Mapped(Mapped(Ordered(), even_only), third_is_bad)
        batches = [
            Batches(Documents(stream, encoder), 128, 12, 1, 0, rank, ranks) for rank in range(ranks)
        ]
        seen = []
        for b in batches:
            if state:
                b.load_state_dict(state)
            for _ in range(steps):
                for part in next(b, []):
                    for labels in part.labels.flatten().split(part.segments.lengths):
                        text = tokenizer.decode(labels[labels >= 0][:-1])
                        seen += [text] if text else []
        states = [b.state_dict() for b in batches]
        buffers = {k: v for s in states for k, v in s["buffers"].items()}
        return seen, json.loads(json.dumps(states[0] | {"buffers": buffers}))

    first, state = run(before, 1, None)
    second, _ = run(after, 100, state)
    want = [f"a{i}" for i in range(0, 400, 2) if i % 30]
    assert len(first) > 50 and sorted(first + second) == sorted(want)


# --------------------------------------------------------------------------------- worker processes


class Deadly(Stream):
    """A stream one of whose records ends the process that reads it, as a fault in a decoder's C
    code does."""

    def __getitem__(self, n: int) -> Sample:
        if n == 30:
            raise EndOfStream(n)
        if n == 11:
            os.kill(os.getpid(), signal.SIGSEGV)
        return sample(n)


class Harmless(Stream):
    def __getitem__(self, n: int) -> Sample:
        if n == 60:
            raise EndOfStream(n)
        time.sleep(0.01)
        return sample(n)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(encoder, tokenizer, capsys):
    documents = Documents(Harmless(), encoder, workers=2)
    lanes = [documents.share(lane, 2) for lane in range(2)]
    seen = []
    for i in range(30):
        seen += [next(lane) for lane in lanes]
        if i in (5, 20):
            os.kill(next(iter(documents.workers.pool._processes)), signal.SIGKILL)
    documents.close()
    assert answers(seen, tokenizer) == [f"a{i}" for i in range(60)]
    assert "a data worker died and is replaced" in capsys.readouterr().err


@pytest.mark.slow
class Mortal:
    """Workers without processes: a number in `deadly` kills whoever reads it, so many times."""

    def __init__(self, deadly: dict[int, int]):
        self.deadly = deadly
        self.generation = 0
        self.deaths = 0
        self.asked: list[int] = []

    def submit(self, n: int) -> Future:
        self.asked.append(n)
        future = Future()
        if self.deadly.get(n):
            future.set_exception(BrokenProcessPool("dead"))
        else:
            future.set_result(sample(n))
        return future

    def replace(self) -> None:
        self.generation += 1
        self.deaths += 1
        first = next(n for n in self.asked[-4:] if self.deadly.get(n))
        self.deadly[first] -= 1


def test_after_a_death_as_many_as_were_in_the_works_are_asked_one_at_a_time():
    documents = Documents([], None)
    documents.workers = Mortal({2: 1})
    share = Share(documents, 0, 1, ahead=4)
    asked = documents.workers.asked
    heights = []
    for n in range(9):
        before = len(asked)
        assert share.from_workers() == sample(n)
        share.next += 1
        heights.append(len(asked) - before)
    # four ahead; the death, then 2 alone, and alone until four were read; then four ahead again
    assert heights == [4, 1, 2, 1, 1, 1, 4, 1, 1]
    assert documents.workers.deaths == 0


def test_a_record_that_kills_its_reader_costs_only_itself(encoder, tokenizer):
    documents = Documents(Deadly(), encoder, workers=1)
    found = answers(list(documents), tokenizer)
    documents.close()
    assert found == [f"a{i}" for i in range(30) if i != 11]
    assert documents.faults.counts == {"killed its reader": 1}
    assert "sample 11 of the stream" in documents.faults.report()


PARENT = """
import os, sys, time
from test_stream import Harmless
from data.stream import Documents
if __name__ == "__main__":
    documents = Documents(Harmless(), None, workers=2)
    next(iter(documents))
    print(*documents.workers.pool._processes, flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert workers and all(map(alive, workers))
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_a_store_that_is_away_is_nobodys_fault():
    """It ends the reading, and is counted against no record."""
    with pytest.raises(StoreError):
        fault_of(StoreError("s3://b: no answer"), "sample 3")
    assert fault_of(KeyError("x"), "sample 3").reason == "unexpected KeyError"


def test_workers_that_die_again_and_again_are_not_replaced_for_ever(monkeypatch):
    """Each death counts: a machine without memory kills them as fast as they are made."""
    opened = []
    workers = Workers.__new__(Workers)
    workers.count = 2
    workers.deaths = 0
    workers.generation = 0
    workers.close = lambda: None
    workers.open = lambda: opened.append(True)
    with pytest.raises(ValueError, match="died .* times in a row"):
        for _ in range(100):
            workers.replace()
    assert 0 < len(opened) < 20
