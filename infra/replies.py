"""Replies that are kept, so that no question is paid for twice: not by a later run, not by two processes.

What it teaches: a file of lines is a cache that many processes can share, if each line is written whole
and each is read as it comes. What it cannot say is that somebody is asking just now. For that a process
claims the question: it locks one byte of an empty file, at a place that the question's hash names. No
byte is written, and the system gives the place back when the process dies, however it dies.

    key -> claimed by another? wait for it -> in memory, or on disk by now? its reply
                                                |  no
                                                v
                                              asked -> one more line -> the claim is let go

    replies.jsonl    [key, text], or [key, text, "cut off"] where the model had no room to end
    replies.claims   empty; only its locks matter

Simplified: all replies are in memory. A reply that a killed process had received and not yet written
is asked for again. On a file system without locks two machines may ask the same at the same moment.
"""

import json
import logging
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

from infra.stopping import TICK, wait_for
from infra.system import lock_byte, lock_file, unlock_byte

CUT_OFF = "cut off"
PLACES = 15  # hexadecimal digits of a key that are its place: what a file's offset can hold


@dataclass(frozen=True)
class ChatReply:
    """What a model said. ended: False when it ran out of the tokens that it had."""

    text: str
    ended: bool = True


class ReplyCache:
    """Replies in a file of JSON lines that several processes append to. path: None for memory alone.

    A line is written whole under a lock; half a line of a process that was killed is passed over,
    and the next line begins on its own. A disk that fails costs the cache, not the run.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.replies: dict[str, ChatReply] = {}
        self.read_to = 0  # bytes of the file that are known
        self.lock = threading.Lock()
        self.failed = False
        self.claims: BinaryIO | None = None

    def get(self, key: str) -> ChatReply | None:
        """The reply, also one that another process has written by now."""
        with self.lock:
            if key not in self.replies and self.path is not None:
                self._on_disk(self._read)
            return self.replies.get(key)

    def put(self, key: str, text: str, ended: bool = True) -> None:
        """One more reply."""
        line = [key, text] if ended else [key, text, CUT_OFF]
        with self.lock:
            self.replies[key] = ChatReply(text, ended)
            if self.path is not None:
                self._on_disk(lambda: self._write(json.dumps(line).encode() + b"\n"))

    @contextmanager
    def claimed(self, key: str, patience: float) -> Iterator[None]:
        """Inside, no other process asks this. After `patience` seconds of waiting for one that does,
        two may. (Threads of one process are no strangers to each other: `ChatEndpoint.in_flight`.)"""
        until = time.monotonic() + patience
        held = self._claim(key)
        while not held and time.monotonic() < until:
            wait_for(TICK)
            held = self._claim(key)
        try:
            yield
        finally:
            if held:
                self._let_go(key)

    # -------------------------------------------------------------------------------------- on disk

    def _claim(self, key: str) -> bool:
        """Lock the byte of a key. False when it is another process's."""
        file = self._claims_file()
        return file is None or lock_byte(file, int(key[:PLACES], 16))

    def _let_go(self, key: str) -> None:
        file = self._claims_file()
        if file is not None:
            unlock_byte(file, int(key[:PLACES], 16))

    def _claims_file(self) -> BinaryIO | None:
        """Opened once, as closing it would let go of all claims; None where there can be none."""
        if self.path is None:
            return None
        with self.lock:
            if self.claims is None and not self.failed:
                self._on_disk(self._open_claims)
            return self.claims

    def _open_claims(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.claims = open(self.path.with_suffix(".claims"), "ab")

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
                    key, text, *rest = json.loads(line)
                except (ValueError, TypeError):
                    continue  # half a line
                if isinstance(key, str) and isinstance(text, str):
                    self.replies[key] = ChatReply(text, CUT_OFF not in rest)

    def _write(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:
            lock_file(file, wait=True)

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
                    "cache of replies: %s; they are kept in memory alone", error
                )
            self.failed = True
