"""Measured from outside: the same answers and scores through an address and through others' harnesses.

The kits themselves are asked where they are installed (requirements/harness.txt), and skipped elsewhere;
what we write for them, and what we make of what they send, is tested without them.
"""

import base64
import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import evaluate as evaluation
from data.readers import Folder
from data.sample import Message, Sample
from data.world import World
from evaluate import EvaluateOptions, evaluate_files
from harness.adapter import question_sample, question_text
from harness.lmms_tasks import utils as lmms_utils
from harness.remote import RemoteModel, messages_of, written_out
from harness.vlmevalkit import KitModel, parts_of_message
from harness.world_files import LETTERS, TEXT_FAMILIES, WorldFileOptions, write_world
from infra.endpoint import ChatEndpoint
from scale import parallel
from serving.protocol import Limits, read_chat, with_pictures
from vlm import SailVL

NAME = "tiny"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """`parallel.start` would give this process other threads."""
    monkeypatch.setattr(parallel, "start", parallel.Ranks)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory, config, tokenizer):
    """A model of one's own, untrained, and the world as files."""
    root = tmp_path_factory.mktemp("outside")
    model = SailVL(config).init_weights(0)
    with torch.no_grad():
        model.language_model.lm_head.weight[tokenizer.image] = 0  # it would end an answer
    model.save_pretrained(root / NAME)
    tokenizer.save(root / NAME)
    write_world(WorldFileOptions(root / "runs" / "outside", samples=2))
    return root


def table(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# ------------------------------------------------------------------------------- the world as files


def test_the_files_hold_the_held_out_scenes_and_evaluation_reads_them_as_the_ladder_asks(home):
    folder = home / "runs" / "outside"
    scenes = [s for family in TEXT_FAMILIES for s in World().held_out(family, 2)]
    for name in ("world_GQA.tsv", "world.jsonl"):
        source = Folder(folder / name)
        read = source.first()
        assert not source.faults.counts and len(read) == len(scenes) > 10
        for ours, scene in zip(sorted(read, key=place_of), scenes):
            picture, asked = ours.messages[0].parts
            drawn, question = scene.messages[0].parts
            assert asked == question and ours.facts["answer"] == scene.facts["answer"]
            assert ours.facts["category"] == scene.facts["family"]
            assert evaluation.evaluation_grader(ours) == "auto"


def place_of(sample: Sample) -> int:
    return int(re.search(r":(\d+)$", sample.origin)[1])


def test_pictures_survive_the_table_and_no_cell_is_taken_for_an_index(home):
    rows = table(home / "runs" / "outside" / "world_GQA.tsv")
    scenes = [s for family in TEXT_FAMILIES for s in World().held_out(family, 2)]
    for row, scene in zip(rows, scenes):
        assert len(row["image"]) > 64  # what is shorter is an index to VLMEvalKit
        picture = Image.open(io.BytesIO(base64.b64decode(row["image"])))
        assert np.array_equal(np.asarray(picture), np.asarray(scene.messages[0].parts[0]))


def test_a_choice_has_its_truth_once_and_letters_are_spread(home):
    exact = table(home / "runs" / "outside" / "world_GQA.tsv")
    chosen = table(home / "runs" / "outside" / "world_MCQ.tsv")
    for plain, row in zip(exact, chosen, strict=True):
        options = [row[letter] for letter in LETTERS if row.get(letter)]
        assert len(options) == len(set(options)) >= 2
        assert row[row["answer"]] == plain["answer"]
    assert len({row["answer"] for row in chosen}) > 1
    with pytest.raises(ValueError, match="--samples 0"):
        write_world(WorldFileOptions(home, samples=0))


# -------------------------------------------------------------------------- samples as the protocol


def remote(**how) -> RemoteModel:
    return RemoteModel(ChatEndpoint("http://127.0.0.1:9/v1", NAME), **how)


@pytest.mark.parametrize("think", [False, True])
def test_a_server_of_ours_reads_the_prompt_that_a_local_model_gets(encoder, think):
    tokenizer = encoder.tokenizer
    families = ("attributes", "text", "video", "caption")
    for scene in [s for family in families for s in World().held_out(family, 2)]:
        sampling = remote(think=think)._parameters(None, 0)
        messages = messages_of(*remote(think=think).prompt(scene))
        body = json.dumps({"model": NAME, "messages": messages, **sampling}).encode()
        chat = read_chat(body, NAME, Limits())
        served = with_pictures(chat, file_in_url, tokenizer.think_prompt, Limits())
        ids, images = encoder.prompt(served, reply=True)
        here, arrays = evaluation.asked_prompt(encoder, think, scene)
        assert ids == here
        assert all(np.array_equal(a, b) for a, b in zip(images, arrays, strict=True))

        # the same words for a server that does not know the parameter
        words = remote(think=think, think_prompt=tokenizer.think_prompt)
        assert "think" not in words._parameters(None, 0)
        if think:
            assert tokenizer.think_prompt in written_out(*words.prompt(scene))


def file_in_url(address) -> bytes:
    return base64.b64decode(address.url.partition(",")[2])


def test_earlier_turns_keep_their_roles_and_chains(encoder):
    picture = Image.new("RGB", (8, 4), "red")
    turns = (
        Message("system", ("be short",)),
        Message("user", (picture, "\nwhat?")),
        Message("assistant", ("red",), think="it is"),
        Message("user", ("sure?",)),
        Message("assistant", ("yes",)),
    )
    prompt = remote().prompt(Sample(turns))
    system, first, answer, last = messages_of(*prompt)
    assert system == {"role": "system", "content": "be short"}
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert first["content"][1]["text"] == "what?"
    assert answer["content"] == "<think>it is</think>red" and last["content"] == "sure?"
    assert "[picture of 8 x 4] what?" in written_out(*prompt)


# ------------------------------------------------------------------------------------ the command


class Echo(BaseHTTPRequestHandler):
    """Says the words of `answers` that the question's end names; keeps what it was sent."""

    answers: dict[str, str] = {}
    bodies: list[dict] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        content = body["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1]["text"]
        said = self.answers.get(question, "nothing")
        refused = said == "refuse"
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        reply = json.dumps({"choices": [choice]}).encode()
        self.send_response(400 if refused else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        return None


@pytest.fixture
def server():
    Echo.answers = {"first?": "yes", "second?": "refuse", "third?": "no"}
    Echo.bodies = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    http.shutdown()
    http.server_close()


@pytest.fixture
def questions(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": question, "answer": "yes"}
        for question in ("first?", "second?", "third?")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(data, server, **options) -> None:
    evaluate_files(EvaluateOptions(data, Path("org/a-model"), endpoint=server, **options))


def test_any_server_is_graded_and_one_without_a_reply_is_counted(server, questions, capsys):
    file = questions.with_name("said.jsonl")
    run(questions, server, answers=file, max_new=7)
    text = capsys.readouterr().out
    assert "prompt: user: [picture of 4 x 4] first?" in text
    assert re.search(r"overall +50\.0% .* 2 ", text) and "1 x no reply" in text
    body = Echo.bodies[1]
    assert body["model"] == "org/a-model" and body["max_tokens"] == 7 and body["temperature"] == 0
    assert "think" not in body and "seed" not in body

    # the next run asks only for what is missing
    before = len(Echo.bodies)
    run(questions, server, answers=file, max_new=7)
    assert "2 of 3 answers" in capsys.readouterr().out
    assert len(Echo.bodies) == before + 2  # whether anybody is there, and the one
    with pytest.raises(ValueError, match="another model"):
        run(questions, server + "/", answers=file, max_new=7)


def test_tries_have_seeds_of_their_own_and_thinking_is_a_parameter_or_words(server, questions):
    run(questions, server, tries=2, temperature=1.0, seed=5, limit=1, think=True)
    assert sorted(body["seed"] for body in Echo.bodies[1:]) == [5, 6]
    assert all(body["think"] is True for body in Echo.bodies[1:])
    Echo.bodies.clear()
    run(questions, server, limit=1, think=True, think_prompt="Think aloud.")
    assert Echo.bodies[-1]["messages"][-1]["content"][-1]["text"] == "first? Think aloud."
    assert "think" not in Echo.bodies[-1]


def test_kept_replies_are_not_asked_for_again(server, questions, tmp_path):
    cache = tmp_path / "replies.jsonl"
    run(questions, server, cache=cache)
    before = len(Echo.bodies)
    run(questions, server, cache=cache)
    assert len(Echo.bodies) == before + 2  # the check, and the one that was refused


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(dtype="bfloat16"), "--dtype would do nothing: nothing is computed here"),
        (dict(endpoint="", at_once=3), "--at-once would do nothing: it needs --endpoint"),
        (dict(think_prompt="think"), "--think-prompt would do nothing: it needs --think"),
        (dict(endpoint="ftp://there"), "must begin with http"),
        (dict(endpoint="http://127.0.0.1:9/v1", timeout=1.0), "does not answer"),
    ],
)
def test_what_a_user_did_is_one_line(questions, server, options, message):
    with pytest.raises(ValueError, match=message):
        run(questions, **({"server": options.pop("endpoint", server)} | options))


# ------------------------------------------------------------------------------------- the adapters


def test_a_harness_question_is_laid_out_as_evaluation_lays_it_out(encoder):
    picture = Image.new("RGB", (32, 32), "red")
    for parts, laid in (
        ([picture, "what?"], (picture, "\nwhat?")),
        (["what?"], ("what?",)),
        ([picture, picture, "same?"], (picture, picture, "\nsame?")),
        (["first: ", picture, "then?"], ("first: ", picture, "\nthen?")),
    ):
        assert question_sample(parts).messages[0].parts == laid


def test_a_row_of_the_kits_table_is_asked_as_evaluation_asks_it(home):
    folder = home / "runs" / "outside"
    rows = table(folder / "world_MCQ.tsv")
    read = sorted(Folder(folder / "world_MCQ.tsv").first(), key=place_of)
    for row, ours in zip(rows, read, strict=True):
        cells = {name: cell or float("nan") for name, cell in row.items()}  # pandas' empty cell
        _, asked = ours.messages[0].parts
        assert "\n" + question_text(cells) == asked


class Saying:
    """In a model's place: the layout of a question is its answer."""

    def answers(self, questions):
        return [" ".join(p if isinstance(p, str) else "<picture>" for p in q) for q in questions]


def test_what_vlmevalkit_sends_is_answered(tmp_path):
    path = tmp_path / "0.png"
    Image.new("RGB", (4, 4)).save(path)
    model = KitModel(Saying())
    model.set_dump_image(lambda line: [str(path)])
    assert model.use_custom_prompt("any table")
    message = model.build_prompt({"index": 0, "question": "what?", "answer": "red"}, "any table")
    assert message[0] == {"type": "image", "value": str(path)}
    assert model.generate(message, dataset="any table") == "<picture> what?"
    with pytest.raises(ValueError, match="VLMEvalKit sends video"):
        parts_of_message([{"type": "video", "value": "a.mp4"}])


def test_the_task_of_lmms_eval_finds_its_pictures(home, monkeypatch):
    monkeypatch.chdir(home)
    lines = (home / lmms_utils.FOLDER / "world.jsonl").read_text().splitlines()
    doc = json.loads(lines[0])
    (picture,) = lmms_utils.pictures_of(doc)
    assert picture.size == (32, 32) and picture.mode == "RGB"
    task = (ROOT / "harness" / "lmms_tasks" / "nanosail_world.yaml").read_text()
    named = re.findall(r"!function utils\.(\w+)", task)
    assert named and all(callable(getattr(lmms_utils, name)) for name in named)
    assert f"{lmms_utils.FOLDER}/world.jsonl" in task


# --------------------------------------------------------------------- with a server, with the kits


def overall(text: str) -> float:
    return float(re.search(r"overall +([\d.]+)%", text)[1])


@pytest.fixture
def trained():
    """What `make toy` made, where it was run: an untrained model has no score to compare."""
    directory = ROOT / "runs" / "toy" / "final"
    if not directory.is_dir():
        pytest.skip("no runs/toy/final here: make toy")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("think", [False, True])
def test_through_serve_py_answers_and_scores_are_those_of_a_local_model(home, think, capsys):
    pytest.importorskip("uvicorn")
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--model", str(home / NAME), "--port", "0"]
        + ["--context", "512"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        said = {}
        for place, options in (
            ("here", {"model": home / NAME, "device": "cpu"}),
            ("there", {"model": home / NAME, "endpoint": found[0] + "/v1"}),
        ):
            if "endpoint" in options:
                options["model"] = Path(NAME)
            file = home / f"{place}-{think}.jsonl"
            data = home / "runs" / "outside" / "world_GQA.tsv"
            evaluate_files(EvaluateOptions(data, answers=file, think=think, max_new=16, **options))
            rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
            table_of_scores = capsys.readouterr().out.split("family")[1]
            said[place] = ({row["name"]: row["said"] for row in rows}, table_of_scores)
        assert said["here"] == said["there"] and len(said["here"][0]) == 2 * len(TEXT_FAMILIES)
    finally:
        process.terminate()
        process.wait(60)


def kit_output(module: str, trained, folder, *words: str) -> str:
    """What an adapter's command prints, in `folder`, where the world's files are."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--model", str(trained), *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("vlmeval"), reason="no VLMEvalKit here")
def test_vlmevalkits_own_code_scores_the_toy_as_we_do(home, trained, capsys):
    data = home / "runs" / "outside" / "world_GQA.tsv"
    evaluate_files(EvaluateOptions(data, trained, device="cpu"))
    ours = overall(capsys.readouterr().out)
    words = ("--data", str(data), "--out", str(home / "kit"))
    text = kit_output("harness.vlmevalkit", trained, home, *words)
    assert ours > 50
    assert float(re.search(r"Overall +([\d.]+)%", text)[1]) == ours


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="no lmms-eval here")
def test_lmms_evals_own_code_scores_the_toy_as_we_do(home, trained, capsys):
    evaluate_files(EvaluateOptions(home / "runs/outside/world.jsonl", trained, device="cpu"))
    ours = overall(capsys.readouterr().out)
    text = kit_output("harness.lmms", trained, home)
    assert ours > 50
    assert float(re.search(r"exact_match +([\d.]+)%", text)[1]) == ours
