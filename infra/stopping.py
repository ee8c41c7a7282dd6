"""Told to stop: SIGTERM and Ctrl-C become a flag, and a process that cannot answer still ends.

What it teaches: a scheduler that takes a machine back sends SIGTERM, waits some seconds, and kills.
The good answer is to end the step, write a checkpoint and leave. But the signal may come while the
process samples for minutes, reads from a disk that hangs, or waits for a rank that is gone. So there
are three ways out, each for when the one before it does not come:

    told ── the step ends ──────────── checkpoint of this step, exit 143     (train.py, every step)
      ├──── long work asks ─────────── StopRequested                         (`check_stop()`)
      └──── neither within `grace` s ─ exit 143, the last checkpoint stands  (a thread)

Ctrl-C is the same as SIGTERM; a second Ctrl-C ends the process at once. A further SIGTERM changes
nothing: launchers send their own when a rank leaves, and a checkpoint that is being written must not
die of it.

Python runs a signal's handler between two of its own instructions only, never while the main thread
waits inside a collective. So the number of a signal that arrives is also written to a socket, by C
(`signal.set_wakeup_fd`), and a thread reads it there and starts the clock.

Our choice: 143 = 128 + SIGTERM for both signals; 8 seconds of grace, as most schedulers leave 30.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterator

STOPPED = 143  # exit status of a run that was told to stop
SIGNALS = (signal.SIGTERM, signal.SIGINT)
TICK = 0.1  # seconds between two looks of who waits for something else


class StopRequested(SystemExit):
    """Raised by `check_stop`. No Exception: nothing that collects the faults of a record may swallow it."""

    def __init__(self):
        super().__init__(STOPPED)


class StopSignals:
    """Listens from now on, until `close`. To be made in the main thread.

    grace: seconds from the first signal until the process ends by itself; `last_words` says what
    is lost then.
    """

    def __init__(self, grace: float, last_words: Callable[[], str]):
        self.requested = False
        self.grace = grace
        self.last_words = last_words
        self._timer: threading.Timer | None = None
        self._closed = False
        self._busy = False

        # the socket that C writes a signal's number to, and the thread that reads it
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()

        # Python's handlers
        self._handlers_before = {number: signal.signal(number, self._tell) for number in SIGNALS}
        _listening.append(self)

    def _tell(self, number: int, _frame) -> None:
        """The handler: a flag; a second Ctrl-C is obeyed at once."""
        again = self.requested
        self.requested = True
        if again and number == signal.SIGINT:
            _say("Ctrl-C again: ending at once; the last checkpoint stands")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _listen(self) -> None:
        """The thread: starts the clock at the first signal, whatever the main thread is doing."""
        while True:
            numbers = self._ear.recv(64)
            if not numbers:
                return
            heard = any(number in SIGNALS for number in numbers)
            if heard and self._timer is None:
                self._start_clock()

    def _start_clock(self) -> None:
        self._timer = threading.Timer(self.grace, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        if self._closed:
            return
        if self._busy:
            self._start_clock()
            return
        _say(
            f"told to stop, and not done with the step after {self.grace:g} s: {self.last_words()}"
        )
        os._exit(STOPPED)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A checkpoint is written, or a check runs: it takes the time that it needs."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def close(self) -> None:
        """Signals mean again what they meant before."""
        if self not in _listening:
            return
        _listening.remove(self)
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._mouth.shutdown(socket.SHUT_RDWR)
        self._mouth.close()


def check_stop() -> None:
    """For long work inside `next(data)`: raises StopRequested once told.

    Only there: what other ranks wait for (an evaluation that gathers, a step) must be gone through.
    """
    if any(listener.requested for listener in _listening):
        raise StopRequested


def wait_for(seconds: float) -> None:
    """A pause that a stop ends."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        check_stop()
        time.sleep(max(0.0, min(TICK, until - time.monotonic())))


def _say(text: str) -> None:
    """To stderr, which may be gone with the launcher."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def _hold() -> None:
    """Before a fork: a signal waits until it is clear whose it is."""
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _forget() -> None:
    """In a forked child: the parent's ear is not its own, and it dies of SIGTERM like anybody."""
    if not _listening:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _release()
    _listening.clear()


_listening: list[StopSignals] = []
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)
