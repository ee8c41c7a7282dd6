"""A model for many people: `python serve.py`, then open the page, or speak OpenAI's protocol to it.

What it teaches: what stands between `generate` and people who ask at the same time. The steps of all
answers are shared (serving/batching.py), the protocol is the one that everyone's programs speak
(serving/protocol.py), and whatever a stranger may send has a limit (serving/api.py, connections.py).

    python serve.py --model runs/toy/final                    # http://127.0.0.1:8000, this machine only
    NAME=secret python serve.py --host 0.0.0.0 --key-name NAME        # for others, with a key

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="final", messages=[{"role": "user", "content": "2 + 3"}])

Told to stop (SIGTERM, Ctrl-C), it takes no more requests, and finishes those that it has
within `--grace` seconds.
"""

import os
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from generate import load_model
from infra.cli import command
from infra.device import pick_device, torch_type


@dataclass
class ServeOptions:
    """Serve a model over HTTP, as OpenAI's API does."""

    # a model, or the directory of a run: its newest checkpoint
    model: Path = Path("runs/toy/final")
    name: str = ""  # by which clients ask for it; none: the directory's
    host: str = "127.0.0.1"  # this machine only
    port: int = 8000  # 0: any that is free
    key_name: str = ""  # the environment variable that holds the API key; none: everyone may ask
    rows: int = 16  # answers that are written at a time
    context: int = 4096  # tokens of a prompt and its answer
    queue: int = 64  # requests that may wait for a row
    max_tokens: int = 1024  # of an answer
    temperature: float = 0.0  # of requests that do not say
    images: int = 16  # of a request
    megapixels: float = 32.0  # of its images together
    megabytes: float = 32.0  # of its body
    allow_remote: bool = False  # follow https addresses of images (public hosts only)
    patience: float = 30.0  # seconds for a client that is slow
    grace: float = 30.0  # seconds for answers that are under way when told to stop
    device: str = "cpu"  # cuda, npu, mps
    dtype: Literal["float32", "bfloat16"] = "float32"


def check_options(options: ServeOptions) -> None:
    """Raises ValueError for what cannot be served."""
    for name in ("rows", "context", "queue", "max_tokens", "images", "megapixels", "megabytes"):
        least = 0 if name in ("queue", "images") else 1
        if getattr(options, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least}"
            )
    for name, most in (("port", 65535), ("temperature", 2), ("patience", 3600), ("grace", 3600)):
        if not 0 <= getattr(options, name) <= most:
            raise ValueError(f"--{name} {getattr(options, name)}: from 0 to {most}")
    if options.patience < 1:
        raise ValueError(f"--patience {options.patience}: at least 1, or nobody is quick enough")
    read_key(options.key_name)
    if not options.model.is_dir():
        raise ValueError(
            f"--model {options.model}: no such directory; `make toy` makes runs/toy/final"
        )


def read_key(name: str) -> str:
    """The key in an environment variable, "" where none is asked for. Raises ValueError, without
    quoting what may be the key itself."""
    key = os.environ.get(name, "") if name else ""
    if name and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError("--key-name wants the name of an environment variable that holds the key")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from error


def build_desk(options: ServeOptions, local: bool):
    """The model, and everything that may be asked of it. local: only this machine can reach it.

    Raises ValueError for what is no model, or when the cache finds no memory."""
    # other commands have no use for a web server
    from data.encode import Encoder
    from serving.api import HERE, Desk
    from serving.batching import Batcher
    from serving.protocol import Limits

    model, tokenizer = load_model(options.model, options.device, torch_type(options.dtype))
    try:
        batcher = Batcher(model, tokenizer, options.rows, options.context)
    except RuntimeError as error:  # the allocator's
        reason = str(error).partition("\n")[0]
        what = f"--rows {options.rows} --context {options.context}: no memory for the cache"
        raise ValueError(f"{what} ({reason})") from error
    limits = Limits(
        context=options.context,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        choices=options.rows,
        images=options.images,
        pixels=int(options.megapixels * 1e6),
        body=int(options.megabytes * 2**20),
    )
    return Desk(
        batcher,
        Encoder(tokenizer, model.config),
        options.name or options.model.resolve().name,
        limits,
        key=read_key(options.key_name),
        hosts=HERE if local else (),
        allow_remote=options.allow_remote,
        patience=options.patience,
        places=options.rows + options.queue,
    )


def serve_model(options: ServeOptions) -> None:
    """Listen until told to stop. Raises ValueError or OSError for what a user did wrong."""
    # mistakes first: a large model takes minutes to read
    check_options(options)
    pick_device(options.device)
    try:
        import uvicorn

        from serving.api import build_app
        from serving.connections import PatientProtocol
    except ModuleNotFoundError as error:
        wanted = "pip install -r requirements/serve.txt"
        raise ValueError(f"{error.name} is not installed, which serving needs: {wanted}") from error

    # the door before the model: a port that is taken is known at once
    listener = listen(options.host, options.port)
    address, port = listener.getsockname()[:2]
    local = address in ("127.0.0.1", "::1")
    desk = build_desk(options, local)

    if not local and not desk.key:
        print(
            "anyone who can reach this machine may ask: --key-name asks for a key", file=sys.stderr
        )
    host = f"[{address}]" if ":" in address else address
    cache = desk.batcher.cache.nbytes() / 2**30
    print(
        f"{options.model} as `{desk.name}` at http://{host}:{port} (Ctrl-C ends); "
        f"{options.rows} rows of {options.context:,} tokens, {cache:.2f} GiB",
        flush=True,
    )

    protocol = partial(PatientProtocol, patience=options.patience, most=2 * desk.places + 40)
    config = uvicorn.Config(
        build_app(desk),
        http=protocol,
        ws="none",
        log_level="error",
        timeout_graceful_shutdown=max(1, round(options.grace)),
        server_header=False,
        proxy_headers=False,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    command(serve_model)
