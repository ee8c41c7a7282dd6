"""Ctrl-C, heard each time that it is pressed, and once.

What it teaches: a key that interrupts is a signal. C notes it at once; Python hears of it between two of its
own instructions, wherever it happens to be, and raises KeyboardInterrupt there. Two things go wrong:

    too early   `input` has written its prompt and does not wait for keys yet. The signal is noted, then C
                waits: nothing happens until another key comes
    twice       a second press raises inside the lines that deal with the first, and ends the program

So C also writes the signal's number to a socket (`signal.set_wakeup_fd`), from which the handler takes it.
A thread watches: a number that still lies there after a moment was not heard, and the signal is sent again,
to the main thread, which it wakes. And the handler raises only where somebody said `expected`, and there not
twice within PAUSE; what comes elsewhere is raised when the next such place is entered.

    key -> C: notes the signal, writes its number -> the handler: takes the number, KeyboardInterrupt
                                                \\-> the thread: still there? the signal again

Simplified: a system without `pthread_kill` (Windows) has the handler alone. Both times are our choice.
"""

import math
import select
import signal
import socket
import threading
import time
from contextlib import contextmanager
from typing import Any, Iterator

GRACE = 0.05  # seconds in which the main thread hears a signal by itself
PAUSE = 0.5  # seconds in which a second press is the same one


class Interrupts:
    """Listens to Ctrl-C inside a `with`. To be entered in the main thread."""

    def __init__(self) -> None:
        self.wanted = False  # whether a press may raise now
        self.owed = False  # whether one came when it could not
        self.raised_at = -math.inf
        self.ended = False
        self.watcher: threading.Thread | None = None

    def __enter__(self) -> "Interrupts":
        # the socket that C writes to
        self.ear, self.mouth = socket.socketpair()
        self.ear.setblocking(False)
        self.mouth.setblocking(False)
        self.handler_before = signal.signal(signal.SIGINT, self.hear)
        self.wakeup_before = signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)

        # the thread that watches it
        if hasattr(signal, "pthread_kill"):
            main = threading.get_ident()
            self.watcher = threading.Thread(target=self.watch, args=(main,), daemon=True)
            self.watcher.start()
        return self

    def __exit__(self, *error: Any) -> None:
        """Ctrl-C means again what it meant before."""
        self.ended = True
        signal.set_wakeup_fd(self.wakeup_before)
        self.mouth.close()  # which the thread sees
        if self.watcher is not None:
            self.watcher.join()
        self.ear.close()
        signal.signal(signal.SIGINT, self.handler_before)

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Inside, a press raises KeyboardInterrupt; what is done when one was raised stays outside."""
        self.raised_at = -math.inf
        self.wanted = True
        try:
            if self.owed:
                self.owed = False
                raise KeyboardInterrupt
            yield
        finally:
            self.wanted = False

    def hear(self, number: int, _frame: Any) -> None:
        """The handler."""
        if self.waiting(0):
            self.ear.recv(64)
        now = time.monotonic()
        again = now - self.raised_at < PAUSE
        if self.wanted and not again:
            self.raised_at = now
            raise KeyboardInterrupt
        self.owed = not self.wanted

    def waiting(self, seconds: float | None) -> bool:
        """Whether a number lies in the socket, by then; None: whenever one does."""
        return bool(select.select([self.ear], [], [], seconds)[0])

    def watch(self, main: int) -> None:
        """The thread: what is not heard is said again."""
        while self.waiting(None) and not self.ended:
            time.sleep(GRACE)
            if self.waiting(0) and not self.ended:
                signal.pthread_kill(main, signal.SIGINT)
