"""A judge behind an address: questions to any server that speaks OpenAI's chat protocol.

What it teaches: a model that grades stands on another machine, and a network fails in every way that
there is. A run of days must neither stop for that nor learn from it. So a question has a time limit,
failures that pass are asked again (later and later, each at a random moment, so that a thousand
questions do not come back together), and what stays unanswered is None, counted, and said once.

    prompt, images -> key -> in flight? wait for it -> in the cache? its reply
                               |  no                     |  no
                               v                         v
                             POST {url}/chat/completions -> reply -> cache -> text, or None

    what happened                                         what is done
    429, 408, 5xx, no connection, no answer in time       asked again, as often as `retries` and in
                                                          all for `timeout` seconds
    another status, a redirect, no chat completion        None at once: the same would come again

The API key is read from the environment with every request and stands in no attribute, message or file.
The standard library is enough for one POST, and it follows no redirect, so a key goes to the named host
alone; a client package would bring thirty others for the same request.

Our choice: all limits; temperature 0; pictures as PNG, 1024 pixels at their longer side.
Simplified: no streaming, no proxies, a new connection for each request. Two ranks that ask the same at
the same moment both ask; of one process, and of runs after one another, nothing is asked twice.
"""

import base64
import fcntl
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
from typing import Callable, Sequence
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from infra.stopping import check_stop
from infra.text import printable

LARGEST_REPLY = 1 << 20  # bytes
LONGEST_SIDE = 1024  # pixels of a picture that is sent
FIRST_PAUSE = 0.5  # seconds before the second attempt; twice as long before each one after it
LONGEST_PAUSE = 30.0  # seconds
SERVER_IS_DOWN = 20  # questions in a row without a reply: from then on each is asked once
TICK = 0.1  # seconds between two looks at whether the run was told to stop
PASSING = (408, 425, 429)  # statuses that may be another the next time, beside 5xx


class NoReply(Exception):
    """An attempt that failed. passing: another may succeed; wait: seconds that the server asks for.

    The text is safe to print: it quotes the server without the key.
    """

    def __init__(self, kind: str, detail: str = "", passing: bool = False, wait: float = 0.0):
        super().__init__(f"{kind}: {printable(detail)}" if detail else kind)
        self.kind = kind
        self.passing = passing
        self.wait = wait


@dataclass
class Counts:
    """Questions by what became of them; seconds: of waiting, summed over threads."""

    asked: int = 0
    cached: int = 0
    failed: int = 0
    seconds: float = 0.0


class ChatEndpoint:
    """`endpoint(prompt, images) -> text or None`; thread-safe.

    url: as in http://localhost:8000/v1. timeout: seconds of a question with all its attempts; one
    attempt gets half. cache: a file for replies, shared by ranks and by later runs; none: memory
    alone. key_name: the environment variable that holds the API key; unset: no key is sent.

    Raises ValueError for a URL that is not plain http or https, and for a key that no header can hold.
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
    ):
        # Where to: nothing of the address may be a secret, as it is printed
        self.secure, self.host, self.port, self.path = address_of(url)
        self.model = model
        self.key_name = key_name
        api_key(key_name)

        # How long, how often, how many
        self.timeout = timeout
        self.retries = retries
        self.at_once = at_once
        self.cache = ReplyCache(cache)

        # What was so far
        self.counts = Counts()
        self.failures_in_a_row = 0
        self.reported: set[str] = set()
        self.in_flight: dict[str, Future] = {}
        self.lock = threading.Lock()
        self.jitter = random.Random()  # of its own: the run's generators must not move

    def __call__(self, prompt: str, images: Sequence = ()) -> str | None:
        """The reply; None when there is none after all attempts.

        images: PIL images or uint8 arrays (H, W, 3), shown before the prompt.
        """
        pictures = [png_of(image) for image in images]
        key = question_key(self.model, prompt, pictures)

        # The same question is on its way already: share what comes of it
        with self.lock:
            flight = self.in_flight.get(key)
            shared = flight is not None
            if flight is None:
                flight = Future()
                self.in_flight[key] = flight
        if shared:
            reply = flight.result()
            self._count(cached=reply is not None, failed=reply is None)
            return reply

        # Ask, unless it was asked before
        reply = None
        try:
            reply = self.cache.get(key)
            if reply is not None:
                self._count(cached=True)
            else:
                reply = self._ask(request_body(self.model, prompt, pictures))
                if reply is not None:
                    self.cache.put(key, reply)
        finally:
            with self.lock:
                del self.in_flight[key]
            flight.set_result(reply)
        return reply

    def ask_all(self, prompts: Sequence[str]) -> list[str | None]:
        """The replies to many prompts, `at_once` of them on their way at a time."""
        return in_threads(self, prompts, self.at_once)

    def check(self) -> None:
        """Ask something, once and uncached. Raises ValueError saying why there is no reply."""
        body = request_body(self.model, "Reply with the word ready.", [])
        try:
            self._attempt(body, self.timeout / 2)
        except NoReply as failure:
            raise ValueError(f"the judge at {self.host} does not answer: {failure}") from None

    def report(self) -> str:
        """One line for the end of a run."""
        counts = self.counts
        return (
            f"judge {self.model} at {self.host}: {counts.asked:,} asked, {counts.cached:,} from the "
            f"cache, {counts.failed:,} without a reply, {counts.seconds:,.0f} s of waiting (this rank)"
        )

    # ------------------------------------------------------------------------------- one question

    def _ask(self, body: bytes) -> str | None:
        """Attempts until one succeeds, none is left, or the time is over."""
        began = time.monotonic()
        down = self.failures_in_a_row >= SERVER_IS_DOWN
        attempts = 1 if down else self.retries + 1

        reply = None
        for attempt in range(attempts):
            # Half of the time for each, so that one which hangs can be followed by another
            left = self.timeout - (time.monotonic() - began)
            try:
                reply = self._attempt(body, min(left, self.timeout / 2))
                break
            except NoReply as failure:
                self._report_once(failure)
                last = not failure.passing or attempt == attempts - 1

                # Later and later, and not all at once
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
                pause = max(failure.wait, pause * self.jitter.uniform(0.5, 1.5))
                if last or time.monotonic() - began + pause >= self.timeout:
                    break
                wait_for(pause)

        self._count(asked=True, failed=reply is None, seconds=time.monotonic() - began)
        return reply

    def _attempt(self, body: bytes, seconds: float) -> str:
        """One request. Raises NoReply, at the latest after about so many seconds."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=max(seconds, TICK))
        alarm = None
        expired = threading.Event()
        headers = {"Content-Type": "application/json"}
        key = api_key(self.key_name)
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
        except (OSError, http.client.HTTPException) as error:
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
        return reply_in(response, raw, key)

    # ------------------------------------------------------------------------------------- counts

    def _count(
        self,
        asked: bool = False,
        cached: bool = False,
        failed: bool = False,
        seconds: float = 0.0,
    ) -> None:
        with self.lock:
            self.counts.asked += asked
            self.counts.cached += cached
            self.counts.failed += failed
            self.counts.seconds += seconds
            if asked:
                self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0

    def _report_once(self, failure: NoReply) -> None:
        """The first of each kind; the rest is in the counts."""
        with self.lock:
            known = failure.kind in self.reported
            self.reported.add(failure.kind)
        if not known:
            logging.getLogger(__name__).warning(
                "judge at %s: %s (more of these are counted, not printed)", self.host, failure
            )


def address_of(url: str) -> tuple[bool, str, int, str]:
    """Whether it is https, host, port, and the path to post to.

    Raises ValueError, without quoting what may be a password.
    """
    try:
        address = urlsplit(url)
        port = address.port
    except ValueError:
        raise ValueError("the judge's URL cannot be read; write http://HOST:PORT/v1") from None
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError("the judge's URL must begin with http:// or https:// and name a host")
    if address.username is not None or address.query or address.fragment:
        raise ValueError(
            "the judge's URL may hold no user, password or query: it is printed and saved; put the "
            "key into an environment variable"
        )
    path = address.path.rstrip("/") + "/chat/completions"
    if not path.isascii() or not path.isprintable() or " " in path:
        raise ValueError("the judge's URL has characters in its path that must be encoded (%20)")
    secure = address.scheme == "https"
    return secure, address.hostname, port or (443 if secure else 80), path


def api_key(name: str) -> str:
    """The key in an environment variable, "" for none. Raises ValueError naming the variable alone:
    the library's own error would quote the key."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name or "_"):
        # Perhaps the key itself: not quoted
        raise ValueError(
            "the judge's key is given by the name of an environment variable, as MY_KEY"
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


def wait_for(seconds: float) -> None:
    """A pause that a stop ends."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        check_stop()
        time.sleep(max(0.0, min(TICK, until - time.monotonic())))


# ---------------------------------------------------------------------------------- the protocol


def request_body(model: str, prompt: str, pictures: list[bytes]) -> bytes:
    """The JSON of a request: pictures first, as data URLs, then the prompt."""
    content: list[dict] | str = prompt
    if pictures:
        content = []
        for picture in pictures:
            url = "data:image/png;base64," + base64.b64encode(picture).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": prompt})
    message = {"role": "user", "content": content}
    return json.dumps({"model": model, "messages": [message], "temperature": 0}).encode()


def reply_in(response: http.client.HTTPResponse, raw: bytes, key: str) -> str:
    """The text of a chat completion. Raises NoReply."""
    status = response.status
    if status in (401, 403):
        raise NoReply(f"status {status}", "the server refuses the API key, or wants one")
    if 300 <= status < 400:
        raise NoReply(f"status {status}", "a redirect, which is not followed")
    if status != 200:
        said = raw[:300].decode("utf-8", "replace")
        passing = status in PASSING or status >= 500
        wait = seconds_in(response.getheader("Retry-After", ""))
        raise NoReply(f"status {status}", said.replace(key, "***") if key else said, passing, wait)

    if len(raw) > LARGEST_REPLY:
        raise NoReply("a reply that is too large", f"over {LARGEST_REPLY:,} bytes")
    try:
        text = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise NoReply("a reply that is no chat completion")
    return text


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


def question_key(model: str, prompt: str, pictures: list[bytes]) -> str:
    """sha256 of model, prompt and pictures, each by its own digest: no two ways to read their joint."""
    digest = hashlib.sha256()
    for part in (model.encode(), prompt.encode("utf-8", "surrogatepass"), *pictures):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- the cache


class ReplyCache:
    """Replies in a file of JSON lines, [key, reply], that several processes append to.

    A line is written whole under a lock; half a line of a process that was killed is passed over,
    and the next line begins on its own. A disk that fails costs the cache, not the run.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.replies: dict[str, str] = {}
        self.read_to = 0  # bytes of the file that are known
        self.lock = threading.Lock()
        self.failed = False

    def get(self, key: str) -> str | None:
        """The reply, also one that another process has written by now."""
        with self.lock:
            if key not in self.replies and self.path is not None:
                self._on_disk(self._read)
            return self.replies.get(key)

    def put(self, key: str, reply: str) -> None:
        with self.lock:
            self.replies[key] = reply
            if self.path is not None:
                self._on_disk(lambda: self._write(json.dumps([key, reply]).encode() + b"\n"))

    def _read(self) -> None:
        """The lines since the last look; the end of the file may be a line in the making."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read_to += len(line)
                try:
                    key, reply = json.loads(line)
                except (ValueError, TypeError):
                    continue  # half a line
                if isinstance(key, str) and isinstance(reply, str):
                    self.replies[key] = reply

    def _write(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)

            # Somebody was killed in the middle of a line
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)

    def _on_disk(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if not self.failed:
                logging.getLogger(__name__).warning(
                    "judge's cache: %s; replies are kept in memory alone", error
                )
            self.failed = True


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
