"""The web side: who is let in, what is answered where, and how an answer streams.

What it teaches: one event loop for many slow clients, one thread for one fast model, and a mailbox
between them. The model never waits for a client: it drops what it has said into the mailbox of the
request and goes on. A client that falls behind finds more in it the next time; one that leaves takes
its rows along.

    client -- Door: host, key -- place? -- body -- thread: JSON, pictures, tokens -- Batcher.submit
       ^                          429       413                400                        |
       +---- server-sent events, or one JSON ---- Mailbox <------- Delta, Delta, ... -----+

    GET  /                      the page                       GET  /health    is it alive?
    POST /v1/chat/completions   an answer                      GET  /metrics   counts, for Prometheus
    GET  /v1/models             what is served

Whatever is limited says so in the API's own form: places (429), bytes (413), time (408), tokens and
pixels (400). A browser's page from elsewhere cannot use a server that listens on this machine only:
the Host header must be this machine's (no rebinding of names), a body must say that it is JSON
(which a foreign page may not send unasked), and no page is told that it may.

Why Starlette and uvicorn: HTTP is where strangers' bytes come in, so its parser should be one that many
have read and attacked. Both are pure Python, and so are the few small packages below them (h11, anyio).
"""

import asyncio
import hmac
import json
import re
import threading
import time
from base64 import b64encode
from collections import Counter, deque
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Coroutine, Iterator

import anyio
import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.encode import Encoder
from infra.text import printable
from serving import protocol
from serving.batching import Ask, Batcher, Delta
from serving.fetch import picture_bytes
from serving.protocol import ApiError, Chat, Limits
from serving.seen import inside_json
from talk.inside import CutPicture, Inside, picture_cuts

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
OPEN = ("/", "/health")  # no key is needed to see these
HERE = ("localhost", "127.0.0.1", "[::1]")
BODIES = 256 << 20  # bytes of all bodies that are being read
SLOWEST = 64 << 10  # bytes a second of a body, on average
PAUSE = 0.01  # seconds between two deliveries that are not urgent
AT_ONCE = 2  # requests whose pictures are decoded at a time


class Post:
    """Wakes those who have new mail, all that a turn has written to with one call.

    A small model makes tokens faster than events can be sent, and both threads share an interpreter: so
    what is not urgent (neither the first nor the last of an answer) goes along at most every PAUSE.
    """

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.full: deque[Mailbox] = deque()
        self.urgent = False
        self.last = 0.0  # seconds of the clock, when it was delivered

    def deliver(self) -> None:
        """After each turn, in the model's thread."""
        now = time.monotonic()
        waits = not self.urgent and now - self.last < PAUSE
        if not self.full or waits or self.loop.is_closed():
            return
        self.urgent = False
        self.last = now
        self.loop.call_soon_threadsafe(self.wake)

    def wake(self) -> None:
        """In the event loop."""
        while self.full:
            self.full.popleft().arrived.set()


class Mailbox:
    """From the model's thread to the event loop: `put` there, `take` here.

    patient: wake the reader at the end of a choice only, as a reply that is sent whole needs no more.
    """

    def __init__(self, post: Post, patient: bool):
        self.post = post
        self.patient = patient
        self.begun = False
        self.arrived = asyncio.Event()
        self.deltas: deque[tuple[int, Delta]] = deque()

    def put(self, index: int, delta: Delta) -> None:
        self.deltas.append((index, delta))
        if delta.finish or not self.patient:
            self.post.full.append(self)
            self.post.urgent |= not self.begun or delta.finish is not None
        self.begun = True

    async def take(self) -> dict[int, Delta]:
        """What came since the last time, as one Delta for each choice; waits for something."""
        await self.arrived.wait()
        self.arrived.clear()
        found: dict[int, Delta] = {}
        while self.deltas:
            index, new = self.deltas.popleft()
            found[index] = found[index].then(new) if index in found else new
        return found


@dataclass
class Desk:
    """What the routes share. key: "" for none. places: requests that may be here at a time."""

    batcher: Batcher
    encoder: Encoder
    name: str
    limits: Limits
    key: str = ""
    hosts: tuple[str, ...] = HERE  # (): any
    allow_remote: bool = False
    patience: float = 30.0
    places: int = 80
    began: float = field(default_factory=time.time)

    # what is going on, and what has been
    visits: int = 0
    bodies: int = 0  # bytes
    post: Post | None = None  # once it runs
    statuses: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)  # summed: to the first token, to the end
    answered: int = 0

    @contextmanager
    def visit(self) -> Iterator[None]:
        """A place for a request. Raises ApiError when all are taken."""
        if self.visits >= self.places:
            message = f"{self.visits} requests are here already; try again in a moment"
            raise ApiError(429, message, "rate_limit_exceeded")
        self.visits += 1
        try:
            yield
        finally:
            self.visits -= 1

    @contextmanager
    def room(self) -> Iterator[bytearray]:
        """Room for a body, counted in `bodies` by who fills it, until the body is understood."""
        body = bytearray()
        try:
            yield body
        finally:
            self.bodies -= len(body)

    def prepare(self, body: bytes) -> "Understood":
        """A body -> what it asks, as the model takes it. In a thread of its own. Raises ApiError."""
        # what is said, and the pictures that it names
        chat = protocol.read_chat(body, self.name, self.limits)

        def fetch(address: protocol.Address) -> bytes:
            return picture_bytes(address, self.allow_remote)

        think_prompt = self.encoder.tokenizer.think_prompt
        sample = protocol.with_pictures(chat, fetch, think_prompt, self.limits)

        # as the model takes it
        try:
            ids, images = self.encoder.prompt(sample, reply=True)
        except ValueError as fault:  # what only the model's own preprocessing can tell
            raise ApiError(400, printable(fault), "invalid_prompt", "messages") from None
        if len(ids) >= self.limits.context:
            raise protocol.too_long(self.limits, f"it has {len(ids):,} tokens")
        cuts = picture_cuts(self.encoder, sample) if chat.inside else []
        return Understood(chat, ids, images, cuts)


@dataclass(frozen=True)
class Understood:
    """A request that can be answered: its prompt as ids and tiles; cuts: where those come from, if that
    was asked."""

    chat: Chat
    ids: list[int]
    images: list[np.ndarray]
    cuts: list[CutPicture]


# ------------------------------------------------------------------------------------------- replies


def json_reply(value: Any, status: int = 200, **headers: str) -> Response:
    """ASCII alone, so that half a surrogate pair which a client sent can be quoted back."""
    body = json.dumps(value, allow_nan=False)
    return Response(body, status, headers, media_type="application/json")


def error_reply(error: ApiError) -> Response:
    headers = {}
    if error.status == 429:
        headers["Retry-After"] = "1"
    if error.status in (408, 413):  # the rest of the body is still on its way
        headers["Connection"] = "close"
    return json_reply(error.body(), error.status, **headers)


def event(value: dict) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n".encode()


async def on_api_error(request: Request, error: ApiError) -> Response:
    return error_reply(error)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    """No such place, or not with this method."""
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    return error_reply(ApiError(error.status_code, printable(message)))


async def on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours: it is logged, and not shown."""
    return error_reply(ApiError(500, "the server failed on this request"))


# --------------------------------------------------------------------------------------------- chat


class ChatRoute:
    """POST /v1/chat/completions."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.limiter = anyio.CapacityLimiter(AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        with self.desk.visit():
            try:
                asked = await self.understand(Request(scope, receive))
            except ClientDisconnect:
                return

            # in line; whoever leaves takes the rows along
            mail = Mailbox(self.desk.post, patient=not asked.chat.stream)
            asks = asks_of(asked, self.desk.limits, mail)
            answer = Answering(self.desk, asked, mail, began)
            if asked.chat.stream:
                reply = answer.stream(send)
            else:
                reply = answer.whole(scope, receive, send)
            try:
                self.desk.batcher.submit(asks)
                await unless_gone(receive, reply)
            finally:
                reply.close()  # where it was never begun
                for ask in asks:
                    ask.gone = True

    async def understand(self, request: Request) -> Understood:
        """Read and prepare a request. Raises ApiError, and ClientDisconnect."""
        with self.desk.room() as body:
            await read_body(request, self.desk, body)
            prepare = self.desk.prepare
            return await anyio.to_thread.run_sync(prepare, bytes(body), limiter=self.limiter)


async def read_body(request: Request, desk: Desk, body: bytearray) -> None:
    """The body of a request, into `body`. Raises ApiError when it is not JSON by its header, too large
    or too slow, and ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the header Content-Type must be application/json")

    # one that is too large is read on for a while, so that its sender comes to read why
    most = desk.limits.body
    received = 0
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout(desk.patience) as deadline:
            async for block in request.stream():
                received += len(block)
                if received <= most:
                    body += block
                    desk.bodies += len(block)
                if desk.bodies > BODIES:
                    raise ApiError(429, "too many bytes are on their way", "rate_limit_exceeded")
                if received > 4 * most:
                    break
                deadline.reschedule(began + desk.patience + received / SLOWEST)
    except TimeoutError:
        raise ApiError(408, "the body came too slowly") from None
    if received > most:
        raise ApiError(413, f"the body is larger than {most:,} bytes", "request_too_large")


def asks_of(asked: Understood, limits: Limits, mail: Mailbox) -> list[Ask]:
    """What the model is to do: one Ask for each choice, with seeds that follow one another."""

    def saying(index: int) -> Callable[[Delta], None]:
        return lambda delta: mail.put(index, delta)

    chat = asked.chat
    asks = []
    for index in range(chat.n):
        ask = Ask(
            asked.ids,
            asked.images,
            saying(index),
            max_new=min(chat.max_tokens, limits.context - len(asked.ids)),
            temperature=chat.temperature,
            top_k=chat.top_k,
            top_p=chat.top_p,
            seed=chat.seed + index,
            stop=chat.stop,
            likeliest=chat.top_logprobs,
            endless=chat.ignore_eos,
            inside=chat.inside,
        )
        asks.append(ask)
    return asks


async def unless_gone(receive: Receive, reply: Coroutine) -> None:
    """Run it to its end, or until the client has left. What it raises is raised."""

    async def until_gone() -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return

    work = asyncio.ensure_future(reply)
    gone = asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


@dataclass
class Answering:
    """One reply under way. began: when its request came."""

    desk: Desk
    asked: Understood
    mail: Mailbox
    began: float
    made: dict[int, int] = field(default_factory=dict)  # choice -> tokens so far
    first: float = 0.0  # seconds to the first token
    inside: Inside | None = None

    @property
    def chat(self) -> Chat:
        return self.asked.chat

    async def stream(self, send: Send) -> None:
        """Server-sent events: a chunk for whatever came, and [DONE]."""
        # the status comes before the answer is known: from now on, faults are events
        head = protocol.head_of(self.desk.name, int(time.time()))
        kind = (b"content-type", b"text/event-stream; charset=utf-8")
        headers = [kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        # who speaks, then what is said
        opening = {"role": "assistant", "content": ""}
        roles = [self.chunk(head, index, opening, None, None) for index in range(self.chat.n)]
        await send({"type": "http.response.body", "body": b"".join(roles), "more_body": True})

        async for found in self.deltas():
            events = [self.delta_event(head, *item) for item in found.items()]
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})

        # where it looked and what it took, for those who asked, and the end
        ending = b"data: [DONE]\n\n"
        if self.chat.include_usage:
            ending = event(protocol.chunk(head, [], self.usage())) + ending
        seen = await self.seen()
        if seen:
            ending = event(protocol.chunk(head, []) | seen) + ending
        await send({"type": "http.response.body", "body": ending})

    def delta_event(self, head: dict, index: int, delta: Delta) -> bytes:
        if delta.finish == "error":
            return event(ApiError(500, "the model failed on this request").body())
        logprobs = protocol.logprobs_json(delta.tokens) if self.chat.logprobs else None
        said = {"content": delta.text} if delta.text else {}
        return self.chunk(head, index, said, delta.finish, logprobs)

    def chunk(
        self, head: dict, index: int, said: dict, finish: str | None, logprobs: dict | None
    ) -> bytes:
        choice = protocol.choice_json(index, "delta", said, finish, logprobs)
        return event(protocol.chunk(head, [choice]))

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One JSON object when all choices have come to their ends."""
        # everything first
        whole: dict[int, Delta] = {}
        async for found in self.deltas():
            for index, new in found.items():
                whole[index] = whole[index].then(new) if index in whole else new
        if any(delta.finish == "error" for delta in whole.values()):
            raise ApiError(500, "the model failed on this request")

        # then the choices, in order
        choices = []
        for index, delta in sorted(whole.items()):
            logprobs = protocol.logprobs_json(delta.tokens) if self.chat.logprobs else None
            said = {"role": "assistant", "content": delta.text, "refusal": None}
            choices.append(protocol.choice_json(index, "message", said, delta.finish, logprobs))
        head = protocol.head_of(self.desk.name, int(time.time()))
        reply = json_reply(protocol.completion(head, choices, self.usage()) | await self.seen())
        await reply(scope, receive, send)

    async def deltas(self) -> AsyncIterator[dict[int, Delta]]:
        """What the model says, until all choices have ended."""
        ended = 0
        while ended < self.chat.n:
            found = await self.mail.take()
            if not self.made:
                self.first = time.perf_counter() - self.began
            for index, delta in found.items():
                self.made[index] = delta.made
                self.inside = delta.inside or self.inside
                ended += delta.finish is not None
            yield found

        # for the metrics
        desk = self.desk
        desk.answered += 1
        desk.seconds["first_token"] += self.first
        desk.seconds["answer"] += time.perf_counter() - self.began

    def usage(self) -> dict:
        return protocol.usage_of(len(self.asked.ids), sum(self.made.values()))

    async def seen(self) -> dict:
        """{"inside": ...} when it was asked and found, else {}."""
        if self.inside is None:
            return {}
        tokenizer = self.desk.encoder.tokenizer
        found = await anyio.to_thread.run_sync(inside_json, self.inside, self.asked.cuts, tokenizer)
        return {"inside": found}


# -------------------------------------------------------------------------------------- other routes


def policy_of(page: str) -> str:
    """A policy for the page: its own script and style by their hashes, this server, nothing else."""

    def hashes(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [b64encode(sha256(text.encode()).digest()).decode() for text in inside]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


PAGE_HEADERS = {
    "Content-Security-Policy": policy_of(PAGE),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def show_page(request: Request) -> Response:
    return Response(PAGE, headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")


async def list_models(request: Request) -> Response:
    desk = request.app.state.desk
    models = [protocol.model_json(desk.name, int(desk.began))]
    return json_reply({"object": "list", "data": models})


async def show_model(request: Request) -> Response:
    desk = request.app.state.desk
    wanted = request.path_params["name"]
    if wanted != desk.name:
        message = f"The model `{wanted[:100]}` does not exist here; this server has `{desk.name}`"
        raise ApiError(404, printable(message), "model_not_found", "model")
    return json_reply(protocol.model_json(desk.name, int(desk.began)))


async def show_health(request: Request) -> Response:
    desk = request.app.state.desk
    batcher = desk.batcher
    state = {"model": desk.name, "answering": len(batcher.rows), "waiting": len(batcher.waiting)}
    if batcher.closed:
        return json_reply({"status": "closed"} | state, 503)
    return json_reply({"status": "ok"} | state)


async def show_metrics(request: Request) -> Response:
    """Prometheus's text form."""
    desk = request.app.state.desk
    lines = []

    def put(name: str, kind: str, meaning: str, *values: tuple[str, float]) -> None:
        lines.append(f"# HELP nanosail_{name} {meaning}")
        lines.append(f"# TYPE nanosail_{name} {kind}")
        lines.extend(f"nanosail_{name}{label} {value}" for label, value in values)

    by_status = [(f'{{status="{status}"}}', n) for status, n in sorted(desk.statuses.items())]
    put("requests_total", "counter", "Replies by status.", *by_status)
    for name, value in vars(desk.batcher.counts).items():
        put(f"{name}_total", "counter", f"{name.replace('_', ' ')} of the batcher.", ("", value))
    put("rows", "gauge", "Answers that are being written.", ("", len(desk.batcher.rows)))
    put("waiting", "gauge", "Answers that wait for a row.", ("", len(desk.batcher.waiting)))
    put("visits", "gauge", "Requests that are here.", ("", desk.visits))
    for name in ("first_token", "answer"):
        sums = (("_sum", round(desk.seconds[name], 6)), ("_count", desk.answered))
        put(f"{name}_seconds", "summary", f"Seconds to the {name.replace('_', ' ')}.", *sums)
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


# --------------------------------------------------------------------------------------------- door


class Door:
    """Around all routes: the Host header, the key, and a count of every reply by its status."""

    def __init__(self, app: ASGIApp, desk: Desk):
        self.app = app
        self.desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.desk.statuses[message["status"]] += 1
            await send(message)

        fault = self.fault_of(scope)
        app = self.app if fault is None else error_reply(fault)
        await app(scope, receive, counting)

    def fault_of(self, scope: Scope) -> ApiError | None:
        """Why this request is not let in."""
        # a name that leads here from elsewhere
        headers = dict(scope["headers"])
        hosts = self.desk.hosts
        host = re.sub(r":[0-9]+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if hosts and host not in hosts:
            return ApiError(421, f"this server is {' or '.join(hosts)}, and no other host")

        # a stranger
        if not self.desk.key or scope["path"] in OPEN:
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + self.desk.key.encode()):
            return None
        return ApiError(
            401, "an API key is needed, as Authorization: Bearer KEY", "invalid_api_key"
        )


def build_app(desk: Desk) -> ASGIApp:
    """The routes around a desk; the model's thread runs from startup to shutdown."""

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        desk.post = Post()
        desk.batcher.told = desk.post.deliver
        thread = threading.Thread(target=desk.batcher.run, name="model", daemon=True)
        thread.start()
        try:
            yield
        finally:
            desk.batcher.close()
            await anyio.to_thread.run_sync(thread.join, desk.patience)

    routes = [
        Route("/", show_page),
        Route("/health", show_health),
        Route("/metrics", show_metrics),
        Route("/v1/models", list_models),
        Route("/v1/models/{name}", show_model),
        Route("/v1/chat/completions", ChatRoute(desk), methods=["POST"]),
    ]
    handlers = {ApiError: on_api_error, HTTPException: on_http_error, Exception: on_fault}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=running)
    app.state.desk = desk
    return Door(app, desk)
