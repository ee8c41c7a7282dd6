"""Curation: pass rates and chains from files to files, free response, blending; kills change nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

from curation import asking, chains, difficulty
from curation import free_response as free
from curation.asking import AnswerFiles, Record, Remembered, Reply, Sampling
from curation.chains import Blend
from curation.rows import RowWriter, write_rows
from data import world
from data.readers import Folder
from data.sample import BadSample, Faults, Message, Sample, Video
from data.stream import Documents, EndOfStream, Order, Patience, Stream
from generate import Answer

RIGHT = "<think>b</think>\\boxed{3}"
WRONG = "<think>b</think>\\boxed{5}"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Commands choose their threads; in the suite, which runs beside others, they keep to one."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def ask(said, text="what?", family="f", **facts):
    return Sample(
        (Message("user", (text,)), Message("assistant", (said,))),
        family,
        "",
        {"answer": said, "family": family, "chain": "a."} | facts,
    )


# ------------------------------------------------------------------------------------- difficulty


def test_difficulty_filters_follow_the_paper():
    families = ("think", "think", "think", "look", "look", "look")
    samples = [ask(str(i), family=family) for i, family in enumerate(families)]
    kept = difficulty.by_difficulty(samples, [0.0, 0.5, 1.0, 0.0, 0.5, 1.0], {"think"})
    assert [s.facts["answer"] for s in kept] == ["1", "3", "4"]
    found = difficulty.hard(samples, [0.5, 0.25, 0.0, 0.75, 1.0, 0.5])
    assert [s.facts["answer"] for s in found] == ["1", "0", "5"]
    assert len(difficulty.hard(samples, [0.5, 0.25, 0.0, 0.75, 1.0, 0.5], 0.3)) == 1


class Script:
    """Stands for generate(): what is said to a question is looked up by a part of its text."""

    def __init__(self, tokenizer, said):
        self.tokenizer = tokenizer
        self.said = said
        self.calls = []
        self.dies_after = None

    def __call__(self, model, prompts, end, max_new, tries, temperature, seed):
        if self.dies_after is not None and len(self.calls) >= self.dies_after:
            raise KeyboardInterrupt
        self.calls.append((len(prompts), seed))
        answers = []
        for i, (ids, _) in enumerate(prompts):
            asked = self.tokenizer.decode(ids)
            texts = next(texts for key, texts in self.said.items() if key in asked)
            for text in texts[:tries]:
                answers.append(Answer(i, self.tokenizer.encode(text) + [end], [], True))
        return answers


@pytest.fixture
def script(monkeypatch, encoder):
    def speak(**said):
        found = Script(encoder.tokenizer, said)
        monkeypatch.setattr(asking, "generate", found)
        return found

    return speak


def test_pass_rates_and_rejection_sampling_count_only_right_whole_answers(script, encoder, model):
    bare = "\\boxed{3}"
    script(one=[WRONG, bare, RIGHT, "<think>c</think>\\boxed{3}"], two=[WRONG] * 4)
    samples = [ask("3", "one"), ask("4", "two")]
    assert difficulty.pass_rates(model, encoder, samples) == [0.75, 0.0]

    harvest = chains.rejection_sample(model, encoder, samples)
    assert len(harvest) == 1
    assert harvest[0].messages[-1].think == "b"
    assert harvest[0].messages[-1].parts == ("\\boxed{3}",)
    assert harvest[0].messages[0].parts[-1].endswith(encoder.tokenizer.think_prompt)
    assert harvest[0].task == "chain" and harvest[0].facts["chain"] == "b"


def test_any_of_several_accepted_answers_is_right(script, encoder, model):
    script(one=[RIGHT, WRONG, "<think>b</think>\\boxed{7}", RIGHT])
    sample = ask("3", "one", answer=["3", "5"])
    assert difficulty.pass_rates(model, encoder, [sample]) == [0.75]


def test_without_facts_the_truth_is_the_last_answer(script, encoder, model):
    script(one=[RIGHT] * 4)
    for said in ("3", " \\boxed{3}", "so it is \\boxed{3}."):
        sample = replace(ask(said, "one"), facts={})
        assert difficulty.pass_rates(model, encoder, [sample]) == [1.0]
    assert difficulty.pass_rates(model, encoder, [replace(ask("4", "one"), facts={})]) == [0.0]


def test_what_cannot_be_asked_costs_itself_and_says_why(script, encoder, model):
    script(one=[RIGHT] * 4)
    samples = [
        BadSample("malformed record", "x.jsonl:1: no"),
        replace(ask("", "one"), facts={}),
        ask("3", "one", grader="taste"),
        Sample((Message("assistant", ("3",)),), facts={"answer": "3"}),
        replace(
            ask("3"), messages=(Message("user", (b"no picture",)), Message("assistant", ("3",)))
        ),
        ask("3", "one"),
        ask("3", "one " * 200),
    ]
    answers = Remembered()
    asking.ask_all(model, encoder, samples, Sampling(max_length=200), answers)
    records = list(answers.records())
    reasons = [r.fault and r.fault[0] for r in records]
    assert reasons.pop(3) in ("cannot be asked", "no question")
    assert reasons == [
        "malformed record",
        "no truth",
        "unknown grader",
        "unreadable image",
        None,
        "too long",
    ]
    assert records[5].pass_rate == 1
    rates = difficulty.pass_rates(model, encoder, samples, Sampling(max_length=200))
    assert rates == [0, 0, 0, 0, 0, 1, 0]


def test_a_real_model_is_asked_and_graded(model, encoder):
    samples = [world.sample(i, 0, {"counting": 1.0}, turns=1) for i in range(2)]
    sampling = Sampling(tries=2, max_new=4)
    assert difficulty.pass_rates(model, encoder, samples, sampling) == [0.0, 0.0]
    assert model.training


def test_parts_are_as_large_as_the_cache_allows(model, encoder):
    samples = [ask("3", "one " * n) for n in (1, 1, 1, 60, 1, 1)]
    prompts = [asking.prompt_of(i, s, encoder, 1000) for i, s in enumerate(samples)]
    text = model.config.text
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    short = len(prompts[0].encoded[0]) + 10

    def sizes(questions):
        limit = questions * 5 * short * token / 2**30
        parts = asking.parts_of(prompts, model, Sampling(max_new=10, cache_gib=limit))
        assert [p.index for part in parts for p in part] == list(range(6))
        return [len(part) for part in parts]

    assert sizes(0.5) == [1] * 6  # at least one question a part
    assert sizes(2.5) == [2, 1, 1, 2]  # the long one stands alone
    assert sizes(1000) == [6]


@pytest.mark.parametrize(
    "wrong", [{"tries": 0}, {"batch": 0}, {"cache_gib": 0.0}, {"temperature": 0.0}]
)
def test_sampling_that_cannot_work_is_refused(wrong):
    with pytest.raises(ValueError, match="--"):
        Sampling(**wrong)


# --------------------------------------------------------------------------------- answers on disk


def settings(**changed):
    return {"model": "m", "tries": 2} | changed


def test_answers_survive_and_a_torn_line_is_dropped(tmp_path):
    files = AnswerFiles(tmp_path / "a", settings())
    first = Record(0, "x:1", (Reply("é\n", True, 1.0, 1.0), Reply("", False, 0.0, 0.0)))
    second = Record(1, "x:2", fault=("no truth", "x:2: none"))
    files.add([first, second])
    files.file.close()
    with open(tmp_path / "a" / "0.jsonl", "ab") as f:
        f.write(b'{"index": 2, "origin": "x:3", "repl')

    again = AnswerFiles(tmp_path / "a", settings())
    assert again.known() == {0, 1} and list(again.records()) == [first, second]
    again.add([Record(2, "x:3")])
    assert again.known() == {0, 1, 2}


def test_answers_of_something_else_and_of_another_process_are_refused(tmp_path):
    files = AnswerFiles(tmp_path / "a", settings())
    with pytest.raises(ValueError, match="another process"):
        AnswerFiles(tmp_path / "a", settings())
    files.file.close()
    nothing_yet = AnswerFiles(tmp_path / "a", settings(tries=4))
    nothing_yet.add([Record(0, "x:1")])
    nothing_yet.file.close()
    with pytest.raises(ValueError, match="tries 4, now it is 2.*--answers"):
        AnswerFiles(tmp_path / "a", settings())


@pytest.mark.parametrize("dies_after", [0, 1, 3])
def test_interrupted_anywhere_the_answers_are_those_of_an_undisturbed_run(
    tmp_path, model, encoder, dies_after, monkeypatch
):
    samples = [world.sample(i, 0, {"counting": 1.0}, turns=1) for i in range(10)]
    sampling = Sampling(tries=2, max_new=3, batch=3)
    undisturbed = AnswerFiles(tmp_path / "a", settings())
    asking.ask_all(model, encoder, samples, sampling, undisturbed)

    # Killed within a batch: nothing of it was written.
    real, calls = asking.generate, []

    def dying(*arguments, **options):
        if len(calls) == dies_after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(asking, "generate", dying)
    disturbed = AnswerFiles(tmp_path / "b", settings())
    with pytest.raises(KeyboardInterrupt):
        asking.ask_all(model, encoder, samples, sampling, disturbed)
    assert len(disturbed.known()) == 3 * dies_after
    disturbed.file.close()

    monkeypatch.setattr(asking, "generate", real)
    resumed = AnswerFiles(tmp_path / "b", settings())
    asking.ask_all(model, encoder, samples, sampling, resumed)
    assert list(resumed.records()) == list(undisturbed.records())


# ------------------------------------------------------------------------------------------- rows


def read_back(path):
    folder = Folder(path)
    found = folder.first()
    assert not folder.faults.counts, folder.faults.report()
    return found


def test_rows_are_read_back_as_they_were(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    red = Image.new("RGB", (9, 7), "red")
    red.save(tmp_path / "data" / "sub" / "red.png")
    red.save(tmp_path / "elsewhere" / "red.jpg")
    png = (tmp_path / "data" / "sub" / "red.png").read_bytes()
    jpg = tmp_path / "elsewhere" / "red.jpg"

    samples = [
        Sample(
            (
                Message("system", ("be brief",)),
                Message("user", ("first ", sub := tmp_path / "data/sub/red.png", "\nwhat?")),
                Message("assistant", ("red <image>",), think=" a\nchain "),
                Message("user", ("and?",)),
                Message("assistant", ("\\boxed{é}",)),
            ),
            "t",
            "x:1",
            {"answer": ["a", "b"], "grader": "text"},
        ),
        Sample((Message("user", (png, jpg, "two")), Message("assistant", ("2",))), facts={"n": 1}),
        Sample((Message("user", (Video((png, jpg)), "?")), Message("assistant", ("v",)))),
        Sample((Message("user", (red, "?")), Message("assistant", ("w",)))),
        Sample((Message("user", ("<image> is a word",)), Message("assistant", ("yes",)))),
    ]
    out = tmp_path / "data" / "out.jsonl"
    rows = [(s, {"pass_rate": 0.5}) for s in samples]
    assert write_rows(out, rows, Faults(strict=True)) == 5
    back = read_back(out)

    assert [m.role for m in back[0].messages] == [m.role for m in samples[0].messages]
    assert [m.think for m in back[0].messages] == [m.think for m in samples[0].messages]
    assert back[0].messages[1].parts[0] == "first " and back[0].messages[2].parts == (
        "red <image>",
    )
    assert (back[0].root / back[0].messages[1].parts[1]).samefile(sub)
    assert back[0].task == "t" and back[0].facts == samples[0].facts | {"pass_rate": 0.5}

    for part, content in zip(back[1].messages[0].parts, (png, jpg.read_bytes())):
        assert (back[1].root / part).read_bytes() == content
        assert not part.is_absolute() and ".." not in part.parts
    frames = back[2].messages[0].parts[0].source
    assert [(back[2].root / f).read_bytes() for f in frames] == [png, jpg.read_bytes()]
    with Image.open(back[3].root / back[3].messages[0].parts[0]) as found:
        assert found.tobytes() == red.tobytes()
    assert back[4].messages[0].parts == ("< image> is a word",)
    assert len(list((tmp_path / "data" / "out.images").iterdir())) == 2  # none twice


def test_every_sample_of_the_world_is_read_back(tmp_path, encoder):
    mixture = dict.fromkeys(world.FAMILIES, 1.0) | {"text": 0.3}
    samples = [world.sample(i, 0, mixture) for i in range(40)]
    write_rows(tmp_path / "w.jsonl", [(s, {}) for s in samples], Faults(strict=True))
    for sample, back in zip(samples, read_back(tmp_path / "w.jsonl"), strict=True):
        a, b = encoder(sample), encoder(back)
        assert a.ids.tolist() == b.ids.tolist() and a.labels.tolist() == b.labels.tolist()
        assert all((x == y).all() for x, y in zip(a.images, b.images, strict=True))
        assert back.facts == sample.facts and back.task == sample.task


def test_no_file_outside_the_images_folder_is_put_beside_the_rows(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    faults = Faults()
    for source in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        user = Message("user", (Path(source), "?"))
        sample = Sample((user, Message("assistant", ("a",))), root=tmp_path / "data")
        assert write_rows(tmp_path / "out" / "a.jsonl", [(sample, {})], faults) == 0
    assert faults.counts == {"path outside the image folder": 3}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jsonl"]


def test_a_file_of_rows_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with RowWriter(tmp_path / "a.jsonl") as rows:
            rows.write(ask("3"))
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []

    faults = Faults()
    lost = Sample((Message("user", (tmp_path / "no.png",)), Message("assistant", ("3",))))
    assert write_rows(tmp_path / "a.jsonl", [(lost, {}), (ask("3"), {})], faults) == 1
    assert faults.counts == {"missing image": 1} and len(read_back(tmp_path / "a.jsonl")) == 1


def test_what_must_not_be_learned_is_marked(tmp_path):
    quiet = Message("assistant", ("3",), learn=False)
    with RowWriter(tmp_path / "a.jsonl") as rows:
        row = rows.row(Sample((Message("user", ("?",)), quiet)))
    assert row["messages"][1] == {"role": "assistant", "content": "3", "loss": False}


# -------------------------------------------------------------------------------- whole commands


def people(folder: Path, n: int = 12) -> Path:
    """Rows as people have them: LLaVA's form, two of them useless."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    rows = []
    for i in range(n):
        word = ("easy", "fair", "rare", "never")[i % 4]
        turns = [
            {"from": "human", "value": f"<image>\n{word} {i}?"},
            {"from": "gpt", "value": "3"},
        ]
        image = "gone.png" if i == n - 1 else "red.png"
        rows.append({"image": image, "conversations": turns, "task": word})
    lines = [json.dumps(row) for row in rows] + ['{"conversations": 3}']
    (folder / "q.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "q.jsonl"


SAID = {
    "easy": [RIGHT] * 4,
    "fair": [RIGHT, WRONG, RIGHT, WRONG],
    "rare": [WRONG, WRONG, WRONG, "<think>d</think>\\boxed{3}"],
    "never": [WRONG] * 4,
}


@pytest.fixture
def directory(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def options(kind, directory, data, out, **more):
    return kind(directory, data, out, sampling=Sampling(batch=4, max_new=8), device="cpu", **more)


def test_difficulty_goes_from_files_to_files(tmp_path, directory, script, capsys):
    data, spoken = people(tmp_path / "data"), script(**SAID)
    chosen = options(
        difficulty.DifficultyOptions,
        directory,
        data,
        tmp_path / "kept.jsonl",
        hard=tmp_path / "hard.jsonl",
        hard_ceiling=0.25,
    )
    difficulty.measure_difficulty(chosen)
    printed = " ".join(capsys.readouterr().out.split())
    for line in (
        "read 13",
        "readable 12",
        "asked 11",
        "solved at least once 9",
        "kept 6",
        "written 6",
        "hard, written 3",
        "skipped 1 x malformed record",
        "skipped 1 x missing image",
        "0.000 2 0.250 3 0.500 3 1.000 3",
    ):
        assert line in printed, line

    kept = read_back(tmp_path / "kept.jsonl")
    assert Counter(s.task for s in kept) == {"fair": 3, "rare": 3}
    assert {s.task: s.facts["pass_rate"] for s in kept} == {"fair": 0.5, "rare": 0.25}
    assert {s.facts["tries"] for s in kept} == {4}
    assert [s.task for s in read_back(tmp_path / "hard.jsonl")] == ["rare"] * 3
    assert len(spoken.calls) == 3 and max(size for size, _ in spoken.calls) <= 4

    # With other bounds nothing is asked again.
    unsolved = replace(chosen, low=0.3, keep_unsolved=("never",))
    difficulty.measure_difficulty(unsolved)
    kept = read_back(tmp_path / "kept.jsonl")
    assert Counter(s.task for s in kept) == {"fair": 3, "never": 2} and len(spoken.calls) == 3


def test_chains_are_harvested_from_files_to_files(tmp_path, directory, script, encoder, capsys):
    data, _ = people(tmp_path / "data"), script(**SAID)
    chosen = options(chains.HarvestOptions, directory, data, tmp_path / "chains.jsonl")
    chains.harvest_chains(chosen)
    printed = " ".join(capsys.readouterr().out.split())
    assert "asked 11" in printed and "kept 9" in printed and "written 9" in printed

    found = read_back(tmp_path / "chains.jsonl")
    assert {s.task for s in found} == {"chain"}
    assert {s.messages[-1].think for s in found} == {"b", "d"}
    assert {s.messages[-1].parts for s in found} == {("\\boxed{3}",)}
    think_prompt = encoder.tokenizer.think_prompt
    assert not any(think_prompt in str(s.messages) for s in found)

    # Ready to train on, they ask for thinking and hold the model's own chains.
    faults = Faults()
    with open(tmp_path / "chains.jsonl", "a") as f:
        f.write(
            '{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "3"}]}\n'
        )
        f.write('{"conversations": [\n{}\n')
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<think>a</think>"}]
        f.write(json.dumps({"conversations": turns}) + "\n")
    ready = chains.read_chains(tmp_path / "chains.jsonl", encoder, faults)
    assert faults.counts["no chain"] == 1 and faults.counts.total() == 4
    assert all(s.messages[0].parts[-1].endswith(think_prompt) for s in ready)
    assert [s.messages[-1] for s in ready] == [s.messages[-1] for s in found]


def test_nothing_to_write_is_an_error_after_the_funnel(tmp_path, directory, script, capsys):
    script(**dict.fromkeys(SAID, [WRONG] * 4))
    data = people(tmp_path / "data")
    for kind, command, words in (
        (difficulty.DifficultyOptions, difficulty.measure_difficulty, "no pass rate"),
        (chains.HarvestOptions, chains.harvest_chains, "no question was solved"),
    ):
        with pytest.raises(ValueError, match=words):
            command(options(kind, directory, data, tmp_path / "out.jsonl"))
        assert "asked" in capsys.readouterr().out and not (tmp_path / "out.jsonl").exists()


def test_a_blend_over_data_with_epochs_ends_with_it(encoder):
    order = Order([torch.arange(100), torch.arange(50)], [1.0, 1.0], [1, 1], seed=0)

    class Once(Stream):
        def __getitem__(self, n):
            record = order[n]
            return None if record is None else ask("1", f"{record}")

    direct = Once()
    direct.order = order
    blend = Blend(direct, [ask("1", "chain")], 0.1)
    patience = Patience(Faults())
    direct_ones = 0
    number = 0
    while True:
        try:
            found = blend[number]
        except EndOfStream:
            break
        if patience.accepts(found, number, blend):
            direct_ones += found.messages[0].parts != ("chain",)
        number += 1
    assert direct_ones == 150

    # what `Patience` and `Batches` ask a stream about
    assert blend.order.drawable == 150
    assert Documents(blend, encoder, Faults()).records == [100, 50]
    direct.wanted = "a truth"
    assert Blend(direct, [], 0.0).wanted == "a truth"


def test_a_harvest_without_a_chain_is_refused(tmp_path, encoder):
    with pytest.raises(ValueError, match="no chain in it"):
        chains.read_chains(people(tmp_path / "data"), encoder, Faults())


def test_user_mistakes_are_one_line(tmp_path, directory, script):
    data = people(tmp_path / "data")
    for wrong, words in (
        ({"low": 0.5, "high": 0.5}, "low < high"),
        ({"out": tmp_path / "x.txt"}, "jsonl"),
        ({"device": "quantum"}, "--device quantum"),
        ({"device": "cuda:63"}, "no such device"),
        ({"data": tmp_path / "none.jsonl"}, "none.jsonl"),
    ):
        chosen = options(difficulty.DifficultyOptions, directory, data, tmp_path / "k.jsonl")
        with pytest.raises(ValueError, match=words):
            difficulty.measure_difficulty(replace(chosen, **wrong))


COMMAND = [sys.executable, "-m", "curation.difficulty"]
SMALL = ["--tries", "2", "--max-new", "40", "--batch", "2", "--device", "cpu"]


def launch(*words, before=(), **how):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*before, *words], cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, **how
    )


def ends_well(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]


@pytest.mark.slow
def test_a_killed_command_ends_at_once_and_goes_on_where_it_was(tmp_path, directory):
    data = people(tmp_path / "data", 24)
    arguments = ["--model", str(directory), "--data", str(data), *SMALL]
    arguments += ["--keep-unsolved", *SAID]  # an untrained model solves nothing

    # Undisturbed; and the same on two ranks.
    alone = launch(*COMMAND, *arguments, "--out", str(tmp_path / "a.jsonl"))
    ends_well(alone)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pair = launch(*ranks, *COMMAND[1:], *arguments, "--out", str(tmp_path / "c.jsonl"))
    ends_well(pair)

    # Told to stop when some answers are there.
    answers = tmp_path / "b.answers" / "0.jsonl"
    stopped = launch(*COMMAND, *arguments, "--out", str(tmp_path / "b.jsonl"))
    until = time.time() + 200
    while time.time() < until and not (answers.exists() and answers.stat().st_size):
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=30)
    assert stopped.returncode != 0
    assert 0 < len(answers.read_bytes().splitlines()) < 24
    again = launch(*COMMAND, *arguments, "--out", str(tmp_path / "b.jsonl"))
    ends_well(again)

    def said(name):
        lines = []
        for path in (tmp_path / f"{name}.answers").glob("*.jsonl"):
            lines += path.read_text().splitlines()
        return sorted(lines)

    assert len(said("a")) == 24 and said("a") == said("b") == said("c")
    rows = [(tmp_path / f"{name}.jsonl").read_text() for name in "abc"]
    assert rows[0] == rows[1] == rows[2]


# ---------------------------------------------------------------------------------- free response

CHOICES = "\n(A) 12\n(B) 15\nC. 18\n"


def test_multiple_choice_becomes_free_response_where_that_makes_sense():
    good = ask("B", "how long is the side?" + CHOICES)
    lone = ask("7", "how many dots are there?")
    bad = [
        ask("B", "which of the following is right?" + CHOICES),
        ask("E", "how long?" + CHOICES),
        ask("15", "how long?" + CHOICES),
        ask("B. 12", "how long?" + CHOICES),
        ask("AB", "how long?" + CHOICES),
        ask("A", "how long?", answer=["A", "B"]),
        ask("B", "what shows a cat?\nA. \nB. \n"),
        ask("B", "Answer with the letter." + CHOICES),
    ]
    done, left = free.free_response([good, lone, *bad])
    assert left == bad[:5] + bad[6:] and done[1] is lone
    assert done[0].facts["answer"] == "15" == done[0].messages[-1].parts[0]
    assert done[0].messages[0].parts == ("how long is the side?",)


@pytest.mark.parametrize(
    "request_",
    [
        "Answer with the letter.",
        "Answer with the option's letter from the given choices directly.",
        "Please select the correct answer from the options above.",
        "Choose the best option",
        "Options:\nPlease respond with only the letter of the correct choice.",
        "Give the letter of the right option.",
        "请直接回答选项字母。",
        "请从以上选项中选择正确答案",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_request_for_a_letter_goes_with_the_options(request_, first):
    text = f"How long is it, in cm? It is 2.5 wide.{CHOICES}{request_}"
    if first:
        text = f"{request_}\nHow long is it, in cm? It is 2.5 wide.{CHOICES}"
    (found,), left = free.free_response([ask("(B)", text)])
    assert not left and found.facts["answer"] == "15"
    assert found.messages[0].parts[0].strip() == "How long is it, in cm? It is 2.5 wide."


@pytest.mark.parametrize(
    "chain,stays",
    [
        ("3 times 5 is 15.", True),
        ("A square has 4 sides, so each is 15.", True),
        ("It's 15, which is B.", False),
        ("so the answer is (B)", False),
        ("Option A is too short.", False),
        ("A, no. It is 15.", False),
        ("故选B", False),
    ],
)
def test_a_chain_that_speaks_of_letters_goes_too(chain, stays):
    sample = ask("B", "how long?" + CHOICES, chain=chain, question="old", grader="auto")
    *before, answer = sample.messages
    sample = replace(sample, messages=(*before, replace(answer, think=chain)))
    (found,), _ = free.free_response([sample])
    assert found.messages[-1].think == (chain if stays else None)
    assert found.facts.get("chain") == (chain if stays else None)
    assert found.facts["question"] == "how long?" and found.facts["grader"] == "auto"


def test_options_in_one_line_and_after_a_picture(tmp_path):
    user = Message("user", (tmp_path / "p.png", "\nHow many? (A) 12 (B) 15 (C) 18"))
    sample = Sample((user, Message("assistant", ("C",))), facts={"answer": "C"})
    (found,), _ = free.free_response([sample])
    assert found.messages[0].parts == (tmp_path / "p.png", "\nHow many?")
    assert found.facts["answer"] == "18"


def test_no_text_takes_long():
    began = time.process_time()
    for text in (
        "(A) " + " " * 50_000 + "x",
        "answer " * 20_000,
        "A. x" + "\t" * 50_000 + "y\nB. z",
    ):
        free.free_response([ask("A", text + CHOICES)])
    assert time.process_time() - began < 5


def test_free_response_goes_from_file_to_file(tmp_path, capsys):
    def verl(text, truth):
        asked = [{"role": "user", "content": text}]
        return {"prompt": asked, "reward_model": {"ground_truth": truth}}

    rows = [
        verl("how long?" + CHOICES, "C"),
        verl("how many?", "2"),
        verl("which?" + CHOICES, "A"),
        {"prompt": 3},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    chosen = free.FreeResponseOptions(tmp_path / "q.jsonl", tmp_path / "f.jsonl")
    free.convert_choices(chosen)
    printed = " ".join(capsys.readouterr().out.split())
    assert "already free 1 converted 1 left as they are 1 written 2" in printed
    assert "1 x malformed record" in printed
    assert [s.facts["answer"] for s in read_back(tmp_path / "f.jsonl")] == ["18", "2"]
    free.convert_choices(replace(chosen, keep_choices=True))
    assert [s.facts["answer"] for s in read_back(tmp_path / "f.jsonl")] == ["18", "2", "A"]


# ------------------------------------------------------------------------------------------ blend


class Numbers:
    """A stream of `size` direct samples (0: endless)."""

    def __init__(self, size=0):
        self.size = size
        self.endless = size == 0
        self.faults = Faults()

    def __getitem__(self, n):
        if self.size and n >= self.size:
            raise IndexError(n)
        return ask(f"d{n}")


POOL = [ask(f"c{i}") for i in range(7)]


def names(stream, numbers):
    return [stream[n].facts["answer"] for n in numbers]


def test_a_blend_holds_its_share_and_uses_everything_in_turn():
    blend = Blend(Numbers(), POOL, 0.1, seed=3)
    drawn = names(blend, range(7000))
    counts = Counter(name for name in drawn if name[0] == "c")
    assert sum(counts.values()) == 700 and set(counts.values()) == {100}
    direct = [name for name in drawn if name[0] == "d"]
    assert direct == [f"d{n}" for n in range(6300)]
    assert blend.endless and drawn != names(Blend(Numbers(), POOL, 0.1, seed=4), range(7000))


def test_a_blend_gives_every_lane_its_share():
    drawn = names(Blend(Numbers(), POOL, 0.1), range(20_000))
    chains_at = [n for n, name in enumerate(drawn) if name[0] == "c"]
    for lanes in (2, 4, 8, 10):
        per_lane = Counter(n % lanes for n in chains_at)
        usual = len(chains_at) / lanes
        assert all(abs(per_lane[lane] - usual) < 5 * usual**0.5 for lane in range(lanes))


def test_a_blend_is_random_access_and_travels_between_processes():
    import pickle

    blend = Blend(Numbers(), POOL, 0.3, seed=1)
    numbers = list(range(5000))
    wanted = names(blend, numbers)
    random.Random(0).shuffle(numbers)
    again = pickle.loads(pickle.dumps(Blend(Numbers(), POOL, 0.3, seed=1)))
    assert names(again, numbers) == [wanted[n] for n in numbers]


@pytest.mark.parametrize("share", [0.0, 0.0004, 1 / 3, 0.57, 0.9, 0.999])
def test_the_share_is_exact_in_the_long_run(share):
    blend = Blend(Numbers(), POOL, share)
    for block in (1, 7, 1000, 123_456):
        assert abs(blend.chains_before(block) - block * 1000 * share) < 1.001
    n = 3_000_017  # far in, without having walked there
    assert blend[n].facts["answer"] and blend[n] == Blend(Numbers(), POOL, share)[n]


def test_a_blend_ends_where_its_direct_answers_end():
    blend = Blend(Numbers(1000), POOL, 0.1)
    assert not blend.endless
    drawn = [s.facts["answer"] for s in blend]
    direct = [name for name in drawn if name[0] == "d"]
    assert direct == [f"d{n}" for n in range(1000)]
    assert abs(len(drawn) - 1000 / 0.9) < 20
    with pytest.raises(IndexError):
        blend[5000]
    places = [n for n in range(3000, 4000) if n % 1000 in set(blend.places(3).tolist())]
    for n in places[:5]:  # a chain's number, too
        with pytest.raises(IndexError):
            blend[n]


def test_a_blend_passes_on_what_is_nothing_and_counts_faults():
    class Holes(Numbers):
        def __getitem__(self, n):
            super().__getitem__(n)
            if n % 3 == 1:
                return None
            return BadSample("broken", str(n)) if n % 3 == 2 else ask(f"d{n}")

    blend = Blend(Holes(300), POOL, 0.1)
    found = [s.facts["answer"] for s in blend]
    assert [name for name in found if name[0] == "d"] == [f"d{n}" for n in range(0, 300, 3)]
    assert blend.faults.counts == {"broken": 100}


def test_a_blend_without_chains_is_refused_unless_none_are_wanted():
    for share in (0.1, 0.9):
        with pytest.raises(ValueError, match="no chain survived"):
            Blend(Numbers(), [], share)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            Blend(Numbers(), POOL, share)
    assert names(Blend(Numbers(), [], 0.0), range(3)) == ["d0", "d1", "d2"]


def test_a_blend_is_a_stream_for_documents(encoder):
    source = world.World().stream({"counting": 1.0}, 0, 1)
    harvest = [world.sample(i, 9, {"odd": 1.0}, turns=1) for i in range(3)]
    documents = Documents(Blend(source, harvest, 0.5, 2), encoder, Faults())
    tasks = Counter(document.task for document in islice(iter(documents), 60))
    assert set(tasks) == {"counting", "odd"} and min(tasks.values()) > 15
