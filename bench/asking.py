"""What is gained by asking many at once? A server with latency, one request after the other and together.

What it teaches: a model behind an address answers one request in seconds, whatever it could do beside it.
Who waits for each reply before the next request pays the latency a million times. The server here computes
nothing: what is measured is how well the client keeps its requests on their way.

    requests -> curation.annotators.Endpoint -> chunks as a pipeline has them, N on their way
                                                    |
                            a process that answers after --latency seconds, half as long to half as long again

    python -m bench.asking                              # 1, 8, 32 and 128 on their way
    python -m bench.asking --latency 1 --requests 4000 --at-once 32

A chunk ends when its last reply is there, so the last ones wait: small chunks cost more of the gain.
"""

import asyncio
import json
import multiprocessing
import random
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from curation.annotators import AnnotatorOptions, open_annotator
from curation.pipeline import PipelineOptions
from curation.requests import Request
from infra.cli import command

SEQUENTIAL = 40  # requests, one after the other: enough to know their mean


@dataclass
class AskingOptions:
    """Race many requests at once against one after the other."""

    latency: float = 0.25  # seconds of a reply, on average
    requests: int = 2048
    at_once: tuple[int, ...] = (8, 32, 128)
    chunk: int = PipelineOptions.chunk
    seed: int = 0


async def answer(options: AskingOptions, reader, writer) -> None:
    """One request: read to its end, kept waiting, answered."""
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    await reader.readexactly(int(fields[b"content-length"]))
    await asyncio.sleep(options.latency * random.uniform(0.5, 1.5))
    choice = {"message": {"content": "a red square"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
    writer.close()


async def answer_all(options: AskingOptions, port: Connection) -> None:
    """The server; says where it listens."""
    random.seed(options.seed)
    server = await asyncio.start_server(
        lambda reader, writer: answer(options, reader, writer), "127.0.0.1", 0, backlog=512
    )
    port.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def serve_requests(options: AskingOptions, port: Connection) -> None:
    asyncio.run(answer_all(options, port))


def seconds_for(options: AskingOptions, port: int, count: int, at_once: int, folder: Path) -> float:
    """Seconds for `count` different requests, chunk by chunk, with a new cache on disk."""
    # Each asks something of its own
    (folder / "count.txt").write_text("number $number")
    annotator = open_annotator(
        AnnotatorOptions(
            url=f"http://127.0.0.1:{port}/v1",
            name="nobody",
            prompts=folder,
            at_once=at_once,
            key_name="",
            cache=folder / f"{at_once}.jsonl",
        )
    )
    requests = [Request("count", {"number": str(number)}) for number in range(count)]

    # As a pipeline feeds them
    began = time.perf_counter()
    for first in range(0, count, options.chunk):
        responses = annotator.annotate(requests[first : first + options.chunk])
        unanswered = [response.fault for response in responses if response.text is None]
        assert not unanswered, f"the server did not answer: {unanswered[0]}"
    return time.perf_counter() - began


def race_requests(options: AskingOptions) -> None:
    # The server is a process of its own, that ends with this one
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve_requests, args=(options, theirs), daemon=True)
    server.start()
    assert ours.poll(60), "the server did not start"
    port = ours.recv()

    # One after the other, then together
    print("| at once | requests | seconds | a second | times one by one |\n|--:|--:|--:|--:|--:|")
    alone = 0.0
    for at_once in (1, *options.at_once):
        count = SEQUENTIAL if at_once == 1 else options.requests
        with TemporaryDirectory() as folder:
            seconds = seconds_for(options, port, count, at_once, Path(folder))
        pace = count / seconds
        alone = alone or pace
        print(f"| {at_once} | {count:,} | {seconds:.1f} | {pace:.1f} | {pace / alone:.1f} |")


if __name__ == "__main__":
    command(race_requests)
