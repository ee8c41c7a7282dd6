"""A server that does everything wrong that servers do, and a pipeline that asks it something.

What it does to a prompt depends on the number in the prompt and on how often it was sent, so that every
run meets the same: `PLANS[number % len(PLANS)]`, its attempts in turn, the last one for ever.
"""

import json
import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from curation.annotators import AnnotatorOptions, open_annotator
from curation.pipeline import PipelineOptions, run_pipeline
from curation.requests import Request
from data.sample import Message

KEY = "sk-a-secret-of-thirty-characters"

# ------------------------------------------------------------------------------- what it answers


def said(text, **more):
    """A well-formed completion."""
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    choices = [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
    return json.dumps({"choices": choices, "usage": usage} | more).encode()


def usage(sent, written=1):
    return {"usage": {"prompt_tokens": sent, "completion_tokens": written}}


HOSTILE = [
    b"",
    b"<html>busy</html>",
    b"null",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"choices": ' + b"9" * 5000 + b"}",
    b'{"choices": NaN}',
    b'{"choices": {"0": 1}}',
    b'{"choices": [{"message": {"content": ["x"]}}]}',
    b'{"choices": [{"message": "content"}]}',
    b'{"choices": [7]}',
    b'\xff\xfe{"choices": []}',
    b'{"choices": [{"message": {"content": 1e999}}]}',
    b" " * (2 << 20),
    b'{"error": "bad key ' + KEY.encode() + b'"}',
]
# Replies that are used, whatever else is in them
ODD = [
    lambda text: said(f"{text} {KEY}"),
    lambda text: said(f"{text} \x00\x1b[2J\u2028\r\n"),
    lambda text: said(text).replace(b'"content": "', b'"content": "\\ud800'),
    lambda text: said(text, **usage(-5)),
    lambda text: said(text, **usage(10**400)),
    lambda text: said(text, **usage("many", [1])),
    lambda text: said(text, usage=[1, 2]),
    lambda text: said(text).replace(b"10", b"NaN"),
    lambda text: said(text, padding="x" * (1 << 19)),
]
PLANS = [
    ["good"],
    ["500", "good"],
    ["429", "good"],
    ["hang up", "good"],
    ["half", "good"],
    ["chunks", "good"],
    ["503", "429", "500", "good"],
    ["odd"],
    ["hostile"],
    ["400"],
    ["good"],
    ["good"],
]
STALLS = 101  # prompts of such multiples are not answered the first time


class RoughServer:
    """latency: seconds of every good reply; stall: seconds of one that comes too late, 0: there is none.
    rough: whether it follows the plans; otherwise all it says is good."""

    def __init__(self, latency=0.0, stall=0.0, rough=True):
        self.latency = latency
        self.stall = stall
        self.rough = rough
        self.lock = threading.Lock()
        self.sent: list[int] = []  # numbers in the order of their requests
        self.answered = Counter()  # number -> replies that it could use
        self.open = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    outer.serve(self, body)
                except OSError:
                    return  # the caller is gone

            def log_message(self, *_):
                return

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def serve(self, handler, body):
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        found = re.search(r"number (\d+)", prompt)
        if not found:
            self.write(handler, 200, said("ready"))
            return

        number = int(found[1])
        with self.lock:
            seen = self.sent.count(number)
            self.sent.append(number)
        plan = PLANS[number % len(PLANS)] if self.rough else ["good"]
        if self.stall and number % STALLS == 1:
            plan = ["stall", "good"]
        self.act(handler, number, plan[min(seen, len(plan) - 1)])

    def act(self, handler, number, what):
        text = f"it is {number}"
        if what == "good":
            time.sleep(self.latency)
            self.answer(handler, number, said(text))
        elif what == "odd":
            self.answer(handler, number, ODD[number // len(PLANS) % len(ODD)](text))
        elif what == "hostile":
            self.write(handler, 200, HOSTILE[number // len(PLANS) % len(HOSTILE)])
        elif what == "stall":
            time.sleep(self.stall)
        elif what == "half":
            self.write(handler, 200, said(text)[:20], {"Content-Length": "500"})
        elif what == "chunks":
            self.write(handler, 200, b"-5\r\nabc", {"Transfer-Encoding": "chunked"})
        elif what != "hang up":
            more = {"Retry-After": "0"} if what == "429" else {}
            self.write(handler, int(what), f"no: {KEY}".encode(), more)

    def answer(self, handler, number, content):
        with self.lock:
            self.answered[number] += 1
        self.write(handler, 200, content)

    def write(self, handler, status, content, headers=()):
        handler.send_response(status)
        headers = dict(headers)
        if "Transfer-Encoding" not in headers:
            headers = {"Content-Length": str(len(content))} | headers
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


def usable(number: int) -> bool:
    """Whether the server has, in the end, a good reply to this prompt."""
    return number % STALLS == 1 or PLANS[number % len(PLANS)][-1] in ("good", "odd")


# ------------------------------------------------------------------------------------ the pipeline


@dataclass
class AskingOptions(PipelineOptions):
    """Ask about each of some numbers."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)


class Ask:
    """A step: the reply in place of what the assistant said."""

    name = "ask"

    def __init__(self, annotator):
        self.annotator = annotator

    def __call__(self, items):
        requests = []
        for item in items:
            pictures = tuple(p for p in item.sample.messages[0].parts if not isinstance(p, str))
            number = str(item.sample.facts["number"])
            requests.append(Request("number", {"number": number}, pictures, item.sample))
        for item, response in zip(items, self.annotator.annotate(requests), strict=True):
            if response.text is None:
                item.drop(self.name, response.fault)
                continue
            turns = (item.sample.messages[0], Message("assistant", (response.text,)))
            item.change(self.name, replace(item.sample, messages=turns), said=response.text)


def numbers(folder: Path, count: int, pictures: bool = True) -> Path:
    """Records with a number each, and the prompt that asks for it."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts").mkdir(exist_ok=True)
    (folder / "prompts" / "number.txt").write_text("Which is this, number $number?\n")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    mark = "<image>" if pictures else ""
    lines = []
    for number in range(count):
        turns = [{"role": "user", "content": f"{mark}{number}?"}]
        turns.append({"role": "assistant", "content": "what?"})
        row = {"messages": turns, "facts": {"number": number}}
        lines.append(row | ({"images": ["red.png"]} if pictures else {}))
    path = folder / "numbers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asking(data: Path, out: Path, server: RoughServer, **changes) -> AskingOptions:
    """Options that ask this server, as a command line would have them."""
    given = {"timeout": 8.0, "at_once": 16, "key_name": "MY_KEY"} | changes
    chunk = given.pop("chunk", 64)
    prompts = data.parent / "prompts"
    annotator = AnnotatorOptions(url=server.url, name="m", prompts=prompts, **given)
    return AskingOptions(data, out, chunk=chunk, annotator=annotator)


def run_asking(options: AskingOptions):
    """The pipeline with its annotator: (outcome, annotator)."""
    annotator = open_annotator(options.annotator, options.seed)
    return run_pipeline(options, [Ask(annotator)]), annotator


def in_child(work) -> int:
    """Starts work() in a forked process; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def kill(child: int) -> int:
    """-9; how it ended, which may have been before."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outputs(out: Path) -> dict[str, bytes]:
    """What a run leaves to its user, by the ends of the files' names."""
    ends = (".jsonl", ".history.jsonl", ".funnel.json")
    return {end: out.with_suffix(end).read_bytes() for end in ends}


def everything_in(folder: Path) -> bytes:
    """All bytes of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return b"".join(path.read_bytes() for path in files)


def kept_numbers(out: Path) -> list[int]:
    rows = map(json.loads, out.read_text().splitlines())
    return [row["facts"]["number"] for row in rows]


def reasons_of(out: Path) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for line in out.with_suffix(".history.jsonl").read_text().splitlines():
        record = json.loads(line)
        if not record["kept"]:
            counts[record["history"][-1]["why"].split(": ")[0]] += 1
    return dict(counts)
