"""serve.py as its users meet it: a real process, OpenAI's own client, and people who behave badly.

The model is small and random; what it should say is what `generate` says in this process.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
import torch
from conftest import ROOT
from PIL import Image

from bench.serving import first_said
from data.encode import Encoder
from data.sample import Message, Sample, Video
from generate import generate, load_model
from tests.campaign import hostile
from tools import screenshots
from vlm import SailVL

pytestmark = pytest.mark.slow
NAME = "tiny"


class Process:
    """serve.py on a free port, and a client of it."""

    def __init__(self, directory, *words: str):
        command = [sys.executable, "serve.py", "--model", str(directory), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--context", "600", "--name", NAME, *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        line = first_said(self.process)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + self.process.stdout.read()
        self.port = int(found[1])
        self.url = found[0]
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def ask(self, content, **how):
        messages = [{"role": "user", "content": content}]
        how.setdefault("model", NAME)
        return self.client.chat.completions.create(messages=messages, **how)

    def stop(self) -> tuple[int, str]:
        """Told to stop: its exit status, and what it said."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        text, _ = self.process.communicate(timeout=60)
        return self.process.returncode, text


def test_nobody_waits_for_a_process_that_says_nothing():
    silent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, stdout=-1, text=True)
    assert first_said(silent, 0.1) == ""
    assert silent.wait(60) == -signal.SIGKILL


@pytest.fixture(scope="module")
def directory(config, tokenizer, tmp_path_factory):
    model = SailVL(config).init_weights(0)
    with torch.no_grad():
        model.language_model.lm_head.weight[tokenizer.image] = 0
    directory = tmp_path_factory.mktemp("served") / NAME
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def server(directory):
    process = Process(directory, "--patience", "3")
    yield process
    status, text = process.stop()
    assert status == -signal.SIGTERM and "Traceback" not in text, text


@pytest.fixture(scope="module")
def alone(directory):
    """What the model says to a list of parts, asked by `generate` in this process."""
    model, tokenizer = load_model(directory)
    encoder = Encoder(tokenizer, model.config)

    def answer(parts, max_new=24, **how) -> str:
        prompt = encoder.prompt(Sample((Message("user", tuple(parts)),)), reply=True)
        (only,) = generate(model, [prompt], tokenizer.ends, max_new, **how)
        return tokenizer.decode_answer(only.ids)

    return answer


def drawn(color: str, size=(50, 40)) -> Image.Image:
    return Image.new("RGB", size, color)


def part_of(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def read(server, path: str) -> str:
    with urlopen(server.url + path, timeout=30) as reply:
        return reply.read().decode()


def read_stream(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# ------------------------------------------------------------------------ what clients ask for


def test_text_an_image_two_images_and_frames(server, alone):
    red, blue = drawn("red"), drawn("blue", (30, 60))
    asked = {
        "text": ("what?", ["what?"]),
        "image": ([part_of(red), words("what?")], [red, "\nwhat?"]),
        "two": (
            [part_of(red), part_of(blue), words("which?")],
            [red, "\n", blue, "\nwhich?"],
        ),
    }
    for content, parts in asked.values():
        reply = server.ask(content, max_tokens=24)
        assert reply.choices[0].message.content == alone(parts)
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens

    frames = [drawn(color, (32, 32)) for color in ("red", "green", "blue")]
    labelled = []
    for i, frame in enumerate(frames, 1):
        labelled += [words(f"Frame-{i}: "), part_of(frame)]
    reply = server.ask([*labelled, words("where to?")], max_tokens=24)
    assert reply.choices[0].message.content == alone([Video(tuple(frames)), "where to?"])


def test_streaming_usage_stop_logprobs_and_seeds(server, alone):
    how = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 24}
    chunks = list(server.ask("how?", **how))
    text = read_stream(chunks)
    assert text == alone(["how?"])
    assert chunks[-1].usage.completion_tokens <= 24 and chunks[-1].choices == []

    stop = text[4:6]
    cut = server.ask("how?", max_tokens=24, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop")

    scored = server.ask("how?", max_tokens=5, logprobs=True, top_logprobs=3).choices[0]
    tokens = scored.logprobs.content
    assert "".join(token.token for token in tokens) == scored.message.content
    assert all(token.top_logprobs[0].token == token.token for token in tokens)  # greedy

    sampled = server.ask("how?", max_tokens=24, temperature=1.0, seed=7).choices[0]
    assert sampled.message.content == alone(["how?"], temperature=1.0, seed=7)


def test_what_is_wrong_comes_as_the_clients_own_errors(server):
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        server.ask("a", model="gpt-9")
    with pytest.raises(openai.BadRequestError) as long:
        server.ask("word " * 700)
    assert long.value.code == "context_length_exceeded" and long.value.param == "messages"
    broken = part_of(drawn("red"))
    broken["image_url"]["url"] = broken["image_url"]["url"][:70]
    with pytest.raises(openai.BadRequestError) as picture:
        server.ask([broken, words("what?")])
    assert picture.value.code == "image_parse_error"
    assert picture.value.param == "messages[0].content[0].image_url"
    assert server.client.models.list().data[0].id == NAME


def test_32_streams_at_once_say_what_each_says_alone(server, alone):
    questions = []
    for i in range(32):
        image = drawn(f"hsl({11 * i}, 80%, 50%)", (20 + i, 50))
        content = [part_of(image), words(f"what is number {i}?")] if i % 2 else f"and {i}?"
        parts = [image, f"\nwhat is number {i}?"] if i % 2 else [f"and {i}?"]
        questions.append((content, parts, 8 + i))
    wanted = [alone(parts, max_new) for _, parts, max_new in questions]

    def ask(question) -> str:
        content, _, max_new = question
        return read_stream(server.ask(content, stream=True, max_tokens=max_new))

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, questions)) == wanted
    found = re.findall(r"^nanosail_(\w+) (\d+)$", read(server, "/metrics"), re.MULTILINE)
    counts = dict(found)
    assert int(counts["row_steps_total"]) > 1.5 * int(counts["steps_total"])  # they did share


# -------------------------------------------------------------------------- how people behave


def rows_of(server) -> int:
    return json.loads(read(server, "/health"))["answering"]


def wait_until(true, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def test_who_leaves_in_the_middle_frees_the_row(server):
    endless = {"ignore_eos": True}
    stream = server.ask("go on", max_tokens=500, stream=True, extra_body=endless)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert rows_of(server) == 1
    stream.close()
    wait_until(lambda: rows_of(server) == 0, 3)

    # and who does not wait for a whole reply
    with pytest.raises(openai.APITimeoutError):
        impatient = server.client.with_options(timeout=0.2)
        message = [{"role": "user", "content": "go on"}]
        impatient.chat.completions.create(
            model=NAME, messages=message, max_tokens=550, n=8, extra_body=endless
        )
    wait_until(lambda: rows_of(server) == 0, 3)


def test_who_says_half_a_request_is_sent_away_while_others_are_answered(server):
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
    for i, connection in enumerate(slow):
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        more = "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        connection.sendall((head + (more if i % 2 else "X")).encode())
    assert server.ask("still there?", max_tokens=2).choices
    for connection in slow:
        connection.settimeout(20)
        said = b""
        try:
            while block := connection.recv(4096):
                said += block
        except ConnectionResetError:
            pass  # the head's deadline: nothing can be answered
        assert said == b"" or said.startswith(b"HTTP/1.1 408"), said
        connection.close()


def test_told_to_stop_it_finishes_what_is_under_way(directory):
    process = Process(directory)
    said = []

    def listen() -> None:
        stream = process.ask("go on", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        for chunk in stream:
            said.append(chunk)

    thread = threading.Thread(target=listen)
    thread.start()
    wait_until(lambda: len(said) > 2)
    assert len(said) < 300
    status, text = process.stop()
    thread.join(20)
    assert status == -signal.SIGTERM and text == ""
    assert said[-1].choices[0].finish_reason == "length"
    with pytest.raises(URLError, match="refused"):
        read(process, "/health")


def test_an_address_that_is_taken_is_one_line(directory, server):
    command = [sys.executable, "serve.py", "--model", str(directory), "--port", str(server.port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and f"--port {server.port}" in line and done.stdout == ""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium on this machine")
def test_in_a_browser_a_picture_is_dropped_asked_about_and_answered(server, alone, tmp_path):
    image = drawn("green", (64, 48))
    with screenshots.Browser() as browser:
        browser.open(server.url, 800, 600)
        browser.drop([image])
        shown = browser.ask("what is it?")
        wanted = alone([image, "\nwhat is it?"], max_new=500)
        assert re.sub(r"\s", "", wanted) in re.sub(r"\s", "", shown) and " tokens, " in shown
        sent = browser.run("JSON.stringify(messages.map((message) => message.role))")
        assert sent == '["user","assistant"]'

        # where it looked: a veil over the picture, another one for another token
        browser.run("$('reset').click(); $('inside').click()")
        browser.drop([image])
        browser.ask("where?")
        canvas = "document.querySelector('.sheet canvas')"
        alphas = f"[...{canvas}.getContext('2d').getImageData(0, 0, 2, 2).data].filter((_, i) => i % 4 == 3)"
        browser.run("document.querySelectorAll('.words button')[0].onclick()")
        first = browser.run(alphas)
        browser.run("document.querySelectorAll('.words button')[3].onclick()")
        assert min(first) == 0 < max(first) and browser.run(alphas) != first

        # what the page's policy keeps out
        away = browser.run("fetch('http://127.0.0.1:9').then(() => 'out', () => 'kept in')")
        assert away == "kept in"
        script = "Object.assign(document.createElement('script'), { text: 'hacked = 1' })"
        browser.run(f"document.body.append({script})")
        assert browser.run("typeof hacked") == "undefined"

        # a fault is told, and the question can be asked again
        browser.run("Object.assign($('temperature'), { max: 99, value: 9 })")
        assert "temperature" in browser.ask("and now?")
        assert browser.run("messages.length") == 2
        browser.run("$('reset').click()")
        assert browser.run("[messages.length, $('drop').hidden]") == [0, False]
        browser.photograph(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").size == (800, 600)


def test_a_hundred_kinds_of_hostile_requests_leave_it_as_it_was():
    """Two rounds of what `python -m tests.campaign.hostile` does for ten minutes."""
    victim = hostile.besiege(seconds=0, warm=1)
    assert victim.problems == []
    assert len(hostile.KINDS) >= 100 and victim.good > 10
    assert sum(victim.seen.values()) == 2 * len(hostile.KINDS)
