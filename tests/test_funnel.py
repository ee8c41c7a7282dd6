"""Pipelines of samples: every record has an outcome and a reason, whatever happens on the way."""

import json
import os
import signal
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from annotating import everything_in, in_child, numbers, outputs
from PIL import Image
from ranks_helpers import as_ranks

from curation import pipeline
from curation.annotators import AnnotatorOptions
from curation.pipeline import PipelineOptions, deciding, run_pipeline
from data.readers import Folder
from data.sample import Message
from infra.cli import parse_options
from scale import parallel


class Thirds:
    """Keeps, changes or drops by the number; pictures are drawn anew."""

    name = "thirds"

    def __init__(self, dies_at=None):
        self.dies_at = dies_at
        self.met = []

    def __call__(self, items):
        for item in items:
            number = item.sample.facts["number"]
            self.met.append(number)
            if number == self.dies_at:
                raise ZeroDivisionError("a step that fails")
            if number % 3 == 0:
                item.drop(self.name, f"a third: {number}")
            elif number % 3 == 1:
                item.keep(self.name, f"{number}", seen=np.float32(number))
            else:
                picture = Image.new("RGB", (4, 4), (number % 8, 0, 0))
                item.change(self.name, replace(item.sample, messages=turns(number, picture)))


def turns(number, *pictures):
    return (Message("user", (*pictures, f"{number}?")), Message("assistant", ("what?",)))


class Odd:
    """Over the whole set: no odd numbers."""

    name = "odd"

    def __call__(self, items):
        for item in items:
            if item.sample.facts["number"] % 2:
                item.drop(self.name, "odd")
            else:
                item.keep(self.name)


@pytest.fixture
def data(tmp_path):
    return numbers(tmp_path / "data", 30)


def options_of(data, out, **changes):
    return PipelineOptions(data, out, **({"chunk": 4} | changes))


def run(data, out, *steps, **changes):
    return run_pipeline(options_of(data, out, **changes), steps or [Thirds()], [Odd()])


def test_every_record_has_an_outcome_and_the_rest_is_read_as_any_file(data, tmp_path):
    outcome = run(data, tmp_path / "a" / "out.jsonl")
    assert (outcome.read, outcome.written) == (30, 10)
    assert outcome.steps["thirds"] == {"dropped": 10, "kept": 10, "changed": 10}
    assert outcome.reasons == {"thirds": {"a third": 10}, "odd": {"odd": 10}}
    folder = Folder(tmp_path / "a" / "out.jsonl")
    found = [folder[i].facts["number"] for i in range(len(folder))]
    assert found == [n for n in range(30) if n % 3 and n % 2 == 0] and not folder.faults.counts
    assert "1 odd" not in outcome.report() and "10 a third" in outcome.report()


@pytest.mark.parametrize("dies", range(1, 5))
def test_a_run_killed_while_it_writes_the_end_is_made_whole(data, tmp_path, monkeypatch, dies):
    """Each file appears by a replacement: a kill before any of them changes nothing of the end."""
    run(data, tmp_path / "undisturbed" / "out.jsonl")
    out = tmp_path / "killed" / "out.jsonl"
    replaced = []

    def replace_or_die(source, place, usual=os.replace):
        replaced.append(place)
        if len([p for p in replaced if ".images" not in str(p)]) == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(source, place)

    def work():
        monkeypatch.setattr(os, "replace", replace_or_die)
        run(data, out)

    _, status = os.waitpid(in_child(work), 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if dies < 4 else 0)
    assert out.exists() == (dies == 4)
    met = Thirds()
    run(data, out, met)
    assert met.met == [] and outputs(out) == outputs(tmp_path / "undisturbed" / "out.jsonl")


def test_a_step_that_raises_costs_its_chunk_alone(data, tmp_path):
    out = tmp_path / "a" / "out.jsonl"
    with pytest.raises(ZeroDivisionError):
        run(data, out, Thirds(dies_at=21))
    litter = out.with_suffix(".images") / "x.png.1.part"
    litter.write_bytes(b"half")
    assert not out.exists()
    again = Thirds()
    run(data, out, again)
    assert again.met == list(range(20, 30)) and not litter.exists()
    run(data, tmp_path / "b" / "out.jsonl")
    assert outputs(out) == outputs(tmp_path / "b" / "out.jsonl")


def test_two_ranks_write_what_one_does_also_when_one_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "ROLL_CALL", 0.3)
    run(data, tmp_path / "one" / "out.jsonl")
    two = tmp_path / "two" / "out.jsonl"
    assert as_ranks(lambda ranks: run(data, two).written, tmp_path / "said") == [10, 10]
    assert outputs(two) == outputs(tmp_path / "one" / "out.jsonl")

    # Two that die, and one process that goes on
    three = tmp_path / "three" / "out.jsonl"
    said = as_ranks(lambda ranks: run(data, three, Thirds(dies_at=8)).written, tmp_path / "said 2")
    assert "ZeroDivisionError: a step that fails" in said
    met = Thirds()
    run(data, three, met)
    assert 0 < len(met.met) < 30 and outputs(three) == outputs(two)


def test_who_had_no_reply_is_asked_once_more_by_whichever_rank(data, tmp_path):
    class Silent(Thirds):
        def __call__(self, items):
            for item in items:
                item.drop(self.name, "no reply: status 500")

    out = tmp_path / "a" / "out.jsonl"
    said = as_ranks(lambda ranks: run(data, out, Silent()), tmp_path / "said")
    for text in said:
        assert "nothing is left" in text and "30 had no reply: the same command" in text
    assert not out.exists() and out.with_suffix(".history.jsonl").exists()
    met = Thirds()
    run(data, out, met)
    assert met.met == list(range(30))
    run(data, tmp_path / "b" / "out.jsonl")
    assert outputs(out) == outputs(tmp_path / "b" / "out.jsonl")


def test_few_records_or_none(tmp_path):
    one = run_pipeline(options_of(numbers(tmp_path / "a", 3), tmp_path / "1.jsonl"), [Thirds()])
    assert one.written == 2
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl: 0 usable samples"):
        run(tmp_path / "empty.jsonl", tmp_path / "2.jsonl")
    with pytest.raises(ValueError, match="nothing is left"):
        run(numbers(tmp_path / "b", 1), tmp_path / "3.jsonl")
    assert not (tmp_path / "3.jsonl").exists()
    outcome = run(numbers(tmp_path / "c", 30), tmp_path / "4.jsonl", limit=5)
    assert (outcome.read, outcome.written) == (5, 2)


def test_what_no_reader_would_take_is_dropped_with_a_reason(data, tmp_path):
    """A step may leave anything in a sample, as halves of characters; a record may be none."""
    with open(data, "a") as file:
        file.write('{"messages": [{"role": "user", "content": "\\u2028 \\u0000?"},')
        file.write(' {"role": "assistant", "content": "30"}], "facts": {"number": 30}}\n')
        file.write("no record\n")

    class Spoil:
        name = "spoil"

        def __call__(self, items):
            spoiled = {1: float("nan"), 2: b"bytes", 3: {(1, 2): 3}}
            deep = []
            for _ in range(2000):
                deep = [deep]
            for item in items:
                number = item.sample.facts["number"]
                fact = deep if number == 4 else spoiled.get(number, number)
                if number == 5:
                    item.change(self.name, replace(item.sample, messages=()))
                elif number == 6:
                    item.change(self.name, replace(item.sample, messages=turns(6, b"no picture")))
                else:
                    item.keep(
                        self.name, "\ud800", fact=fact, half="\ud800", seen=np.float32(number)
                    )

    out = tmp_path / "out.jsonl"
    outcome = run_pipeline(options_of(data, out), [Spoil()])
    assert outcome.refused and sum(outcome.refused.values()) == 1
    why = {"unreadable row": 3, "no answer": 1, "unreadable image": 1}
    assert outcome.reasons == {"write": why}
    folder = Folder(out)
    assert len(folder) == outcome.written == 26 and not folder.faults.counts
    assert folder[25].messages[0].parts == ("\u2028 \x00?",)
    assert folder[25].facts["seen"] == 30
    assert "unreadable row" in out.with_suffix(".history.jsonl").read_text()


def test_another_process_and_other_options_are_one_line(data, tmp_path):
    out = tmp_path / "out.jsonl"

    class Meanwhile(Thirds):
        def __call__(self, items):
            with pytest.raises(ValueError, match="another process is writing here.*--out"):
                run(data, out)
            super().__call__(items)

    run(data, out, Meanwhile())
    for changes, word in [({"chunk": 5}, "chunk 4, now it is 5"), ({"seed": 1}, "seed 0, now")]:
        with pytest.raises(ValueError, match=f"{word}.*give another --out, or remove"):
            run(data, out, **changes)
    os.utime(data, (1, 1))
    with pytest.raises(ValueError, match="data files"):
        run(data, out)


def test_an_output_that_would_be_data_is_refused(data, tmp_path):
    content = everything_in(tmp_path)
    for where, out in [(data, data), (data.parent, data.parent / "a" / "out.jsonl")]:
        with pytest.raises(ValueError, match="would be part of --data"):
            run(where, out)
    with pytest.raises(ValueError, match="call it .jsonl"):
        run(data, tmp_path / "out.json")
    with pytest.raises(ValueError, match="--chunk"):
        run(data, tmp_path / "out.jsonl", chunk=0)
    with pytest.raises(ValueError, match="--limit"):
        run(data, tmp_path / "out.jsonl", limit=-1)
    assert everything_in(tmp_path) == content


@dataclass
class AskingSomebody(PipelineOptions):
    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)


def test_replies_are_kept_beside_the_output_and_how_fast_decides_nothing(data, tmp_path):
    words = f"--data {data} --out {tmp_path}/a.jsonl --annotator.url http://h/v1"
    options = parse_options(AskingSomebody, [*words.split(), "--annotator.prompts", str(tmp_path)])
    assert options.annotator.cache == tmp_path / "a.replies.jsonl"
    own = replace(options, annotator=replace(options.annotator, cache=tmp_path / "mine"))
    assert own.annotator.cache == tmp_path / "mine"

    def settings(options):
        records = pipeline.Records(Folder(data))
        return pipeline.settings_of_pipeline(options, records, [Thirds()])

    elsewhere = replace(options.annotator, url="http://other/v1", at_once=2, key_name="K")
    first = settings(options)
    assert settings(replace(own, annotator=elsewhere, out=tmp_path / "b.jsonl")) == first
    assert first["annotator.max-new"] == 256 and json.dumps(first)
    (tmp_path / "caption.txt").write_text("other words")
    assert settings(options).keys() - first.keys() == {"prompt caption"}


def test_a_model_that_was_trained_on_is_another_annotator_under_the_same_name(tmp_path):
    """Outcomes of the weights of before are not taken for those of now; nor are those of old templates."""
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    templates = tmp_path / "templates.tsv"
    seen = set()
    for content in b"before", b"after!":
        weights.write_bytes(content)
        templates.write_bytes(content)
        options = {"annotator": {"model": weights.parent}, "templates": templates}
        seen.add(tuple(deciding(options).values()))
    assert len(seen) == 2 and len({one for one, _ in seen}) == 2
