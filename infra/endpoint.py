"""A model behind an address: questions to any server that speaks OpenAI's chat protocol.

What it teaches: a model that judges or annotates stands on another machine, and a network fails in every
way that there is. A run of days must neither stop for that nor learn from it. So a question has a time
limit, failures that pass are asked again (later and later, each at a random moment, so that a thousand
questions do not come back together), and what stays unanswered is None, counted, and said once.

    prompt, images -> key -> in flight? wait for it -> in the cache? its reply          (replies.py)
                               |  no                     |  no
                               v                         v
               at its pace:  POST {url}/chat/completions -> reply -> cache -> text, or None

    what happened                                         what is done
    429                                                   nobody asks for as long as it says; then
                                                          again, in all for `timeout` seconds
    408, 5xx, no connection, no answer in time            asked again, as often as `retries` and in
                                                          all for `timeout` seconds
    another status, a redirect, no chat completion        None at once: the same would come again

The API key is read from the environment with every request and stands in no attribute, message or file;
a reply that quotes it is kept without it. The standard library is enough for one POST, and it follows no
redirect, so a key goes to the named host alone; a client package would bring thirty others for the same
request.

Our choice: all limits; temperature 0; pictures as PNG, 1024 pixels at their longer side.
Simplified: no streaming, no proxies, a new connection for each request. Tokens are those that the server
counts; what a reply that never arrived has cost is not known here.
"""

import base64
import hashlib
import http.client
import io
import json
import logging
import os
import queue
import random
import re
import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from infra.replies import ChatReply, ReplyCache
from infra.stopping import TICK, check_stop, wait_for
from infra.text import printable

LARGEST_REPLY = 1 << 20  # bytes
LONGEST_SIDE = 1024  # pixels of a picture that is sent
FIRST_PAUSE = 0.5  # seconds before the second attempt; twice as long before each one after it
LONGEST_PAUSE = 30.0  # seconds
SERVER_IS_DOWN = 20  # questions in a row that reached no server: from then on each is asked once
FULL = 429  # the status of a server that wants to be asked less often
PASSING = (408, 425, FULL)  # statuses that may be another the next time, beside 5xx
MOST_TOKENS = 10**7  # of one reply: a server that says more is not believed
SHORTEST_KEY = (
    12  # characters: a shorter one ("EMPTY", "none") is no secret, and may be a word of a reply
)


class NoReply(Exception):
    """An attempt that failed. passing: another may succeed; wait: seconds that the server asks for;
    full: it does nothing but ask to wait.

    The text is safe to print: it quotes the server without the key.
    """

    def __init__(
        self,
        kind: str,
        detail: str = "",
        passing: bool = False,
        wait: float = 0.0,
        full: bool = False,
    ):
        super().__init__(f"{kind}: {printable(detail)}" if detail else kind)
        self.kind = kind
        self.passing = passing
        self.wait = wait
        self.full = full


@dataclass
class Counts:
    """Questions by what became of them. seconds: of waiting, summed over threads. sent, written: tokens
    of prompts and of replies, as the server counts them; a reply from the cache has none."""

    asked: int = 0
    cached: int = 0
    failed: int = 0
    seconds: float = 0.0
    sent: int = 0
    written: int = 0


class Spacing:
    """When requests leave: `per_minute` of them, evenly spaced (0: whenever they like), and none while
    a server wants to be left alone."""

    def __init__(self, per_minute: float = 0.0):
        self.gap = 60 / per_minute if per_minute else 0.0
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self) -> None:
        """Until it is this request's turn. A stop ends it."""
        with self.lock:
            turn = max(time.monotonic(), self.next)
            self.next = turn + self.gap
        wait_for(turn - time.monotonic())

    def hold(self, seconds: float) -> None:
        """Nobody's turn comes before that."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class ChatEndpoint:
    """`endpoint(prompt, images) -> text or None`; thread-safe.

    url: as in http://localhost:8000/v1. timeout: seconds of a question with all its attempts; one
    attempt gets half. cache: a file for replies, shared by ranks and by later runs; none: memory
    alone. key_name: the environment variable that holds the API key; unset: no key is sent. role: what
    messages call it. max_new: tokens of a reply, 0: as many as the server likes. per_minute: requests
    at most, 0: no limit. prices: dollars for a million tokens that are sent, and that are written.

    Raises ValueError for a URL that is not plain http or https, for a key that no header can hold, and
    for limits below zero.
    """

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float = 120.0,
        retries: int = 4,
        cache: Path | None = None,
        key_name: str = "OPENAI_API_KEY",
        at_once: int = 16,
        role: str = "judge",
        max_new: int = 0,
        temperature: float = 0.0,
        per_minute: float = 0.0,
        prices: tuple[float, float] = (0.0, 0.0),
    ):
        # Where to: nothing of the address may be a secret, as it is printed
        self.role = role
        self.secure, self.host, self.port, self.path = address_of(url, role)
        self.model = model
        self.key_name = key_name
        api_key(key_name, role)

        # How long, how often, how many
        if (
            min(timeout, at_once) <= 0
            or min(retries, max_new, temperature, per_minute, *prices) < 0
        ):
            raise ValueError(f"the {role}'s limits and prices must not be negative")
        self.timeout = timeout
        self.retries = retries
        self.at_once = at_once
        self.spacing = Spacing(per_minute)
        self.cache = ReplyCache(cache)

        # What is asked for beside the words, and what it costs
        self.max_new = max_new
        self.sampling: dict[str, Any] = {"temperature": temperature}
        if max_new:
            self.sampling["max_tokens"] = max_new
        self.prices = prices

        # What was so far
        self.counts = Counts()
        self.failures_in_a_row = 0
        self.reported: set[str] = set()
        self.in_flight: dict[str, Future] = {}
        self.lock = threading.Lock()
        self.jitter = random.Random()  # of its own: the run's generators must not move

    def __call__(self, prompt: str, images: Sequence = ()) -> str | None:
        """The reply's text; None when there is none after all attempts.

        images: PIL images or uint8 arrays (H, W, 3), shown before the prompt.
        """
        try:
            return self.ask(prompt, images).text
        except NoReply:
            return None

    def ask(self, prompt: str, images: Sequence = ()) -> ChatReply:
        """The reply, as `__call__`. Raises NoReply when there is none."""
        pictures = [png_of(image) for image in images]
        key = question_key(self.model, prompt, pictures, self.sampling)
        return self._shared(key, request_body(self.model, prompt, pictures, self.sampling))

    def converse(self, messages: list[dict], **more: Any) -> ChatReply:
        """The reply to messages in the API's own form. more: parameters of this request, beside those
        of all. Raises NoReply when there is none."""
        sampling = self.sampling | more
        key = question_key(self.model, json.dumps(messages, sort_keys=True), [], sampling)
        body = json.dumps({"model": self.model, "messages": messages, **sampling}).encode()
        return self._shared(key, body)

    def _shared(self, key: str, body: bytes) -> ChatReply:
        """The reply to a request; what is asked twice at the same time is sent once. Raises NoReply."""
        # The same question is on its way already: share what comes of it
        with self.lock:
            flight = self.in_flight.get(key)
            shared = flight is not None
            if flight is None:
                flight = Future()
                self.in_flight[key] = flight
        if shared:
            failed = flight.exception() is not None
            self._count(cached=not failed, failed=failed)
            return flight.result()

        # Ask, unless it was asked before; whoever waits hears the same
        try:
            reply = self._reply(key, body)
        except BaseException as error:
            flight.set_exception(error)
            raise
        else:
            flight.set_result(reply)
        finally:
            with self.lock:
                del self.in_flight[key]
        return reply

    def _reply(self, key: str, body: bytes) -> ChatReply:
        """From the cache, or from the server. Raises NoReply."""
        with self.cache.claimed(key, self.timeout):
            reply = self.cache.get(key)
            if reply is not None:
                self._count(cached=True)
                return reply
            reply = self._ask(body)
            self.cache.put(key, reply.text, reply.ended)
        return reply

    def ask_all(self, prompts: Sequence[str]) -> list[str | None]:
        """The replies to many prompts, `at_once` of them on their way at a time."""
        return in_threads(self, prompts, self.at_once)

    def check(self) -> None:
        """Ask something, uncached. Raises ValueError saying why there is no reply."""
        body = request_body(self.model, "Reply with the word ready.", [], self.sampling)
        try:
            self._insist(body, self.retries + 1)
        except NoReply as failure:
            message = f"the {self.role} at {self.host} does not answer: {failure}"
            raise ValueError(message) from None

    def report(self) -> str:
        """One line for the end of a run."""
        counts = self.counts
        line = (
            f"{self.role} {self.model} at {self.host}: {counts.asked:,} asked, {counts.cached:,} from "
            f"the cache, {counts.failed:,} without a reply, {counts.seconds:,.0f} s of waiting"
        )
        if counts.sent or counts.written:
            line += f", {counts.sent:,} tokens sent, {counts.written:,} written"
        if any(self.prices):
            line += f", ${self.dollars():,.2f}"
        return f"{line} (this rank)"

    def dollars(self) -> float:
        """What the tokens so far have cost, by `prices`."""
        sent, written = self.prices
        return (self.counts.sent * sent + self.counts.written * written) / 1e6

    # ------------------------------------------------------------------------------- one question

    def _ask(self, body: bytes) -> ChatReply:
        """A question, counted. Raises NoReply."""
        began = time.monotonic()
        down = self.failures_in_a_row >= SERVER_IS_DOWN
        try:
            reply = self._insist(body, 1 if down else self.retries + 1)
        except NoReply as failure:
            self._count(asked=True, failed=True, seconds=time.monotonic() - began)
            self._reached(not failure.passing)
            raise
        self._count(asked=True, seconds=time.monotonic() - began)
        self._reached(True)
        return reply

    def _reached(self, server: bool) -> None:
        """Whether a server was there: one that refuses a question is not down."""
        with self.lock:
            self.failures_in_a_row = 0 if server else self.failures_in_a_row + 1

    def _insist(self, body: bytes, attempts: int) -> ChatReply:
        """Attempts until one succeeds, none is left, or the time is over. Raises the last NoReply."""
        spent = 0.0  # seconds; waiting for one's turn is not among them
        failures = 0
        counted = 0
        while True:
            # Half of the time for each, so that one which hangs can be followed by another
            self.spacing.wait()
            began = time.monotonic()
            try:
                return self._attempt(body, min(self.timeout - spent, self.timeout / 2))
            except NoReply as failure:
                self._report_once(failure)
                spent += time.monotonic() - began

                # A server that is full has not failed: that costs time alone
                counted += not failure.full or attempts == 1
                pause = self._pause(failures, failure.wait)
                failures += 1
                if not failure.passing or counted >= attempts or spent + pause >= self.timeout:
                    raise
                if failure.full:
                    self.spacing.hold(failure.wait)
            wait_for(pause)
            spent += pause

    def _pause(self, failures: int, wanted: float) -> float:
        """Seconds before the next attempt: later and later, not all at once, not before it is wanted."""
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 30))
        return max(wanted, pause * self.jitter.uniform(0.5, 1.5))

    def _attempt(self, body: bytes, seconds: float) -> ChatReply:
        """One request. Raises NoReply, at the latest after about so many seconds."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=max(seconds, TICK))
        alarm = None
        expired = threading.Event()
        headers = {"Content-Type": "application/json"}
        key = api_key(self.key_name, self.role)
        if key:
            headers["Authorization"] = f"Bearer {key}"

        try:
            # A socket's own limit is for each read, and a reply may come byte by byte
            connection.connect()
            alarm = threading.Timer(seconds, expire, (connection.sock, expired))
            alarm.daemon = True
            alarm.start()

            connection.request("POST", self.path, body, headers)
            response = connection.getresponse()
            raw = response.read(LARGEST_REPLY + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # (a ValueError: chunks of negative length, and what else is no HTTP)
            if expired.is_set() or isinstance(error, TimeoutError):
                raise NoReply("no answer in time", passing=True) from None
            raise NoReply("no connection", type(error).__name__, passing=True) from None
        finally:
            if alarm is not None:
                alarm.cancel()
            connection.close()

        # A reply that was cut short by the alarm looks like its end
        if expired.is_set():
            raise NoReply("no answer in time", passing=True)
        if response.length and len(raw) <= LARGEST_REPLY:
            raise NoReply("no connection", "the reply ends before its end", passing=True)
        found = completion_in(response, raw, key)
        sent, written = usage_in(found)
        self._count(sent=sent, written=written)
        return reply_in(found, key)

    # ------------------------------------------------------------------------------------- counts

    def _count(
        self,
        asked: bool = False,
        cached: bool = False,
        failed: bool = False,
        seconds: float = 0.0,
        sent: int = 0,
        written: int = 0,
    ) -> None:
        with self.lock:
            self.counts.asked += asked
            self.counts.cached += cached
            self.counts.failed += failed
            self.counts.seconds += seconds
            self.counts.sent += sent
            self.counts.written += written

    def _report_once(self, failure: NoReply) -> None:
        """The first of each kind; the rest is in the counts."""
        with self.lock:
            known = failure.kind in self.reported
            self.reported.add(failure.kind)
        if not known:
            logging.getLogger(__name__).warning(
                "%s at %s: %s (more of these are counted, not printed)",
                self.role,
                self.host,
                failure,
            )


def address_of(url: str, role: str) -> tuple[bool, str, int, str]:
    """Whether it is https, host, port, and the path to post to.

    Raises ValueError, without quoting what may be a password.
    """
    try:
        address = urlsplit(url)
        port = address.port
    except ValueError:
        raise ValueError(f"the {role}'s URL cannot be read; write http://HOST:PORT/v1") from None
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"the {role}'s URL must begin with http:// or https:// and name a host")
    if address.username is not None or address.query or address.fragment:
        raise ValueError(
            f"the {role}'s URL may hold no user, password or query: it is printed and saved; put the "
            "key into an environment variable"
        )
    path = address.path.rstrip("/") + "/chat/completions"
    if not path.isascii() or not path.isprintable() or " " in path:
        message = f"the {role}'s URL has characters in its path that must be encoded (%20)"
        raise ValueError(message)
    secure = address.scheme == "https"
    return secure, address.hostname, port or (443 if secure else 80), path


def api_key(name: str, role: str) -> str:
    """The key in an environment variable, "" for none. Raises ValueError naming the variable alone:
    the library's own error would quote the key."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name or "_"):
        # Perhaps the key itself: not quoted
        raise ValueError(
            f"the {role}'s key is given by the name of an environment variable, as MY_KEY"
        )
    key = os.environ.get(name, "").strip() if name else ""
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {name} holds characters that no API key has")
    return key


def expire(connected: socket.socket, expired: threading.Event) -> None:
    """End whatever waits for this socket, from another thread."""
    expired.set()
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS's own would wait for the peer
    except OSError:
        pass  # it has ended by itself


# ---------------------------------------------------------------------------------- the protocol


def request_body(model: str, prompt: str, pictures: list[bytes], sampling: dict) -> bytes:
    """The JSON of a request: pictures first, as data URLs, then the prompt."""
    content: list[dict] | str = prompt
    if pictures:
        content = []
        for picture in pictures:
            url = "data:image/png;base64," + base64.b64encode(picture).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": prompt})
    message = {"role": "user", "content": content}
    return json.dumps({"model": model, "messages": [message], **sampling}).encode()


def completion_in(response: http.client.HTTPResponse, raw: bytes, key: str) -> Any:
    """The JSON of a reply, whatever it holds; None for what is no JSON. Raises NoReply for a status
    other than 200, and for a reply that is too large."""
    status = response.status
    if status in (401, 403):
        raise NoReply(f"status {status}", "the server refuses the API key, or wants one")
    if 300 <= status < 400:
        raise NoReply(f"status {status}", "a redirect, which is not followed")
    if status != 200:
        # (without the key before it is cut: half of a key is one, too)
        said = without_key(raw.decode("utf-8", "replace"), key)[:300]
        passing = status in PASSING or status >= 500
        wait = seconds_in(response.getheader("Retry-After", ""))
        raise NoReply(f"status {status}", said, passing, wait, status == FULL)

    if len(raw) > LARGEST_REPLY:
        raise NoReply("a reply that is too large", f"over {LARGEST_REPLY:,} bytes")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def reply_in(found: Any, key: str) -> ChatReply:
    """The text of a chat completion, without the key and without halves of characters. Raises NoReply."""
    try:
        choice = found["choices"][0]
        text = choice["message"]["content"]
        ended = choice.get("finish_reason") != "length"
    except (LookupError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str):
        raise NoReply("a reply that is no chat completion")
    if len(key) >= SHORTEST_KEY:
        text = without_key(text, key)
    return ChatReply(text.encode("utf-8", "replace").decode(), ended)


def usage_in(found: Any) -> tuple[int, int]:
    """Tokens of the prompt and of the reply, as the server counts them; 0 for what it does not say, and
    for what cannot be."""
    usage = found.get("usage") if isinstance(found, dict) else None
    tokens = []
    for name in ("prompt_tokens", "completion_tokens"):
        number = usage.get(name) if isinstance(usage, dict) else 0
        believed = type(number) is int and 0 <= number <= MOST_TOKENS
        tokens.append(number if believed else 0)
    return tokens[0], tokens[1]


def without_key(text: str, key: str) -> str:
    """What a server said, its mentions of the key blotted out."""
    return text.replace(key, "***") if key else text


def seconds_in(header: str) -> float:
    """Retry-After in seconds; 0 for none, and for a date."""
    return float(header) if header.isascii() and header.isdigit() else 0.0


def png_of(image) -> bytes:
    """A PIL image or a uint8 array (H, W, 3) as a PNG file, at most LONGEST_SIDE pixels long."""
    if isinstance(image, bytes):
        return image
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def question_key(
    model: str, prompt: str, pictures: list[bytes], sampling: dict | None = None
) -> str:
    """sha256 of model, prompt and pictures, each by its own digest: no two ways to read their joint.

    sampling counts where it is another than greedy without a limit, so that older caches stay true.
    """
    parts = [model.encode(), prompt.encode("utf-8", "surrogatepass"), *pictures]
    if sampling and sampling != {"temperature": 0}:
        parts.append(json.dumps(sampling, sort_keys=True).encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------- several at once


def in_threads(function: Callable, items: Sequence, at_once: int) -> list:
    """[function(item), ...] with so many threads. What one raises is raised here.

    Told to stop, it leaves without waiting for what is on its way: the threads are daemons, which the
    end of a process does not wait for either (a `ThreadPoolExecutor` would).
    """
    to_do: queue.SimpleQueue = queue.SimpleQueue()
    for number in range(len(items)):
        to_do.put(number)
    done: queue.SimpleQueue = queue.SimpleQueue()
    left = threading.Event()

    def work() -> None:
        while not left.is_set():
            try:
                number = to_do.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, function(items[number]), None))
            except BaseException as error:  # whatever it is, the caller must hear of it
                done.put((number, None, error))

    for _ in range(min(at_once, len(items))):
        threading.Thread(target=work, daemon=True).start()

    results: list = [None] * len(items)
    missing = len(items)
    try:
        while missing:
            check_stop()
            try:
                number, result, error = done.get(timeout=TICK)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            results[number] = result
            missing -= 1
    finally:
        left.set()
    return results
