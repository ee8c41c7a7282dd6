"""How much is gained when everyone shares the steps? serve.py over HTTP, and transformers in a batch.

What it teaches: what continuous batching is for. The same requests are sent one after another, then
sixteen at a time, whole and streamed; and transformers' `generate` answers the same prompts as one padded
batch, the way people do it who have all questions at hand. The four take turns, and the best time of each
counts.

    serve.py, a process <-- HTTP --> 1 client, 16 clients, 16 streaming clients   -> tokens a second
    transformers, the same weights: one batch of 16, left-padded                  -> the same greedy text?

    python -m bench.serving                       # the toy's language model, random weights
    python -m bench.serving --layers 8 --width 256

Every answer has exactly `--max-new` tokens (`ignore_eos`), so that all do the same work. Questions are
text of different lengths. The server's numbers hold everything: HTTP, JSON, tokenizing, detokenizing.
"""

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch

from bench.decoding import DecodingOptions, two_decoders
from data.sample import Message
from infra.cli import command
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
NAME = "random"
PATIENCE = 120.0  # seconds in which serve.py must say where it listens


@dataclass
class ServingOptions:
    """Race a server against itself, one request at a time, and against transformers."""

    clients: int = 16
    max_new: int = 64
    longest: int = 120  # characters of the longest question; the others have 1/n, 2/n, ... of it
    width: int = 128
    layers: int = 4
    repeats: int = 5
    threads: int = 1  # of both


def first_said(process: subprocess.Popen, seconds: float = PATIENCE) -> str:
    """The first line of a process; it is killed when none comes for so long, and "" is the line then."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    return line


@contextmanager
def serving(directory: Path, options: ServingOptions) -> Iterator[int]:
    """serve.py as a process of its own: its port."""
    words = ["--model", str(directory), "--name", NAME, "--port", "0", "--context", "1024"]
    process = subprocess.Popen(
        [sys.executable, "serve.py", *words, "--rows", str(options.clients)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = first_said(process)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, f"serve.py did not start: {line}"
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(30)


def ask_server(port: int, question: str, max_new: int, streaming: bool = False) -> str:
    """One request; the text of the answer."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_new,
        "ignore_eos": True,
        "stream": streaming,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), kind)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    assert response.status == 200, f"the server refused: {raw[:300]!r}"
    if not streaming:
        return json.loads(raw)["choices"][0]["message"]["content"]

    pieces = []
    for block in raw.decode().split("\n\n")[:-2]:  # the last is [DONE]
        delta = json.loads(block.removeprefix("data: "))["choices"][0]["delta"]
        pieces.append(delta.get("content", ""))
    return "".join(pieces)


def questions_by_length(options: ServingOptions) -> list[str]:
    """Texts from 1/n of the longest to the longest, no two alike."""
    text = "how many of the red things that are left of the blue one are larger than it, and why? "
    text *= (options.longest + options.clients) // len(text) + 1
    lengths = [options.longest * (i + 1) // options.clients for i in range(options.clients)]
    return [text[i : i + length] for i, length in enumerate(lengths)]


def their_batch(
    theirs, tokenizer: Tokenizer, questions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same prompts for transformers: ids and mask (N, T), padded at the left."""
    prompts = []
    for question in questions:
        message = Message("user", (question,))
        prompts.append(tokenizer.render((message,), [], prompt_only=True)[0])
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def race_serving(options: ServingOptions) -> None:
    """Print tokens a second of all four. Raises ValueError for more clients than characters."""
    if not 1 <= options.clients <= options.longest:
        raise ValueError("--clients: at least 1, and at most --longest (no question is empty)")
    torch.set_num_threads(options.threads)
    sizes = DecodingOptions(width=options.width, layers=options.layers)
    model, theirs = two_decoders(sizes)
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, "")
    model.image_token_id = tokenizer.image
    model.config = replace(model.config, image_token_id=tokenizer.image)

    # neither says the place of an image, which ends an answer here
    with torch.no_grad():
        model.language_model.lm_head.weight[tokenizer.image] = 0
        theirs.lm_head.weight[tokenizer.image] = 0

    questions = questions_by_length(options)
    ids, mask = their_batch(theirs, tokenizer, questions)
    how = {"max_new_tokens": options.max_new, "min_new_tokens": options.max_new}

    def transformers_batch() -> list[str]:
        out = theirs.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **how)
        return [tokenizer.decode(row) for row in out[:, ids.shape[1] :].tolist()]

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.clients) as pool:
        model.save_pretrained(place)
        tokenizer.save(place)
        with serving(Path(place), options) as port:

            def one_by_one() -> list[str]:
                return [ask_server(port, question, options.max_new) for question in questions]

            def together(streaming: bool = False) -> list[str]:
                ask = partial(ask_server, port, max_new=options.max_new, streaming=streaming)
                return list(pool.map(ask, questions))

            def streams() -> list[str]:
                return together(streaming=True)

            report_race([one_by_one, together, streams, transformers_batch], options)


def report_race(contestants: list[Callable[[], list[str]]], options: ServingOptions) -> None:
    """In turn, so that other load meets all alike; the best of each is printed."""
    texts = [contestant() for contestant in contestants]  # warm, and one model
    same = sum(a == b for a, b in zip(texts[1], texts[3]))
    assert texts[0] == texts[1] == texts[2], "an answer depends on who else is there"
    assert same > len(texts[0]) // 2, f"transformers says the same to {same} only: another model?"

    seconds: dict[str, list[float]] = {contestant.__name__: [] for contestant in contestants}
    for _ in range(options.repeats):
        for contestant in contestants:
            began = time.perf_counter()
            contestant()
            seconds[contestant.__name__].append(time.perf_counter() - began)

    tokens = options.clients * options.max_new
    rates = {name: tokens / min(times) for name, times in seconds.items()}
    print(
        f"{options.clients} requests x {options.max_new} tokens, {options.layers} layers of "
        f"{options.width}, {options.threads} thread(s); {same} of {options.clients} texts as transformers"
    )
    for name, rate in rates.items():
        print(f"  {name.replace('_', ' '):20} {rate:8,.0f} tokens a second")
    for name in ("together", "streams"):
        print(
            f"  {name}: {rates[name] / rates['one_by_one']:.1f} times one by one, "
            f"{rates[name] / rates['transformers_batch']:.1f} times transformers"
        )


if __name__ == "__main__":
    command(race_serving)
