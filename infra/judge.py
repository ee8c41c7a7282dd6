"""math-verify behind a wall: whether two LaTeX expressions are equal, asked of another process.

What it teaches: an answer that a model wrote is hostile input. `9^{9^{9}}` or `99999999!!` is a
few characters long and takes minutes and gigabytes, and a thread cannot be stopped from outside,
nor can its memory be taken back. A process can, if three things are arranged:

    a limit      each question runs in a child of its own that the system ends at its limits of
                 processor time and memory, wherever it is, even inside one big-integer product
    no waiting   the limits count processor time, so a busy machine does not change verdicts; and
                 questions run beside each other, so a slow one delays nobody
    no trust     the server may be killed or may fail to start; the caller goes on

    Judge.ask(said, truth) --- a line ---> server: this file run as a script, imports math-verify
       True, False or None <-- a line ---    `-- fork --> one child for each question

A question without a verdict (its child died) is wrong, and counted in `Judge.lost`. After a loss the
next questions get half the time, down to a tenth of a second, and with each verdict twice as much
again: a batch full of hostile answers costs a tenth of a second each.

Needs `fork`, so Linux or macOS (which has no limit on memory); elsewhere a judge cannot start.
"""

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, TimeoutError

SECONDS = 0.5  # of processor time for one question, at most
LEAST_SECONDS = 0.1  # what is left of it after many losses
MEMORY = 1 << 30  # bytes of address space for the server and each child
AT_ONCE = 4  # children beside each other
PATIENCE = 60  # seconds that the server may take to import math-verify
HUNG = 20  # seconds after which a silent server counts as dead (a stopped process, say)


# ------------------------------------------------------------------------------- the caller's side


class Judge:
    """Asks a server that it starts when it is needed, and again when it was killed. Thread-safe.

    program: the server's command line. lost: questions without a verdict so far. broken: why no
    server can be started, empty while there is hope.
    """

    def __init__(self, program: tuple[str, ...] = (sys.executable, "-P", __file__)):
        self.program = program
        self.lost = 0
        self.broken = ""
        self.seconds = SECONDS
        self.lock = threading.Lock()
        self.server: Server | None = None

    def ask(self, said: str, truth: str) -> bool | None:
        """Whether the two are equal; False without a verdict in time; None: there is no judge."""
        question = json.dumps([self.seconds, said, truth])

        # a server that was killed is noticed when it is written to or read from: once more, then
        for _ in range(2):
            with self.lock:
                server = self._running()
                answer = server.send(question) if server else None
            if server is None:
                return None
            verdict = server.wait(answer)
            if verdict is not None:
                break

        if not verdict:
            self.lost += 1
            self.seconds = max(LEAST_SECONDS, self.seconds / 2)
        else:
            self.seconds = min(SECONDS, self.seconds * 2)
        return verdict == "equal"

    def stop(self) -> None:
        """End the server. The next question starts another one."""
        with self.lock:
            if self.server is not None and self.server.owner == os.getpid():
                self.server.end()
            self.server = None

    def _running(self) -> "Server | None":
        """The server, started if there is none; None when that fails, which is reported once."""
        mine = self.server is not None and self.server.owner == os.getpid()
        if mine and self.server.alive:
            return self.server
        if self.broken:
            return None

        if mine:
            self.server.end()
        try:
            self.server = Server(self.program)
        except (OSError, ValueError) as error:
            self.server = None
            self.broken = str(error)
            logging.getLogger(__name__).warning(
                "math-verify cannot be started (%s): symbolic answers are graded by exact "
                "arithmetic and by their text",
                error,
            )
        return self.server


class Server:
    """One process that answers, and the thread that reads its answers.

    Raises OSError or ValueError when it does not come up.
    """

    def __init__(self, program: tuple[str, ...]):
        self.owner = os.getpid()  # after a fork the copy must not talk to its parent's server
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # a Ctrl-C is meant for the run, which may still ask
        )
        self.alive = True
        self.asked = 0
        self.open: dict[int, Future] = {}
        self.ready: Future = Future()
        threading.Thread(target=self._read, daemon=True).start()

        try:
            came_up = self.ready.result(PATIENCE)
        except TimeoutError:
            came_up = False
        if not came_up:
            self.end()
            raise ValueError(self._last_words() or f"silent for {PATIENCE} s")

    def send(self, question: str) -> Future:
        """Hand over a question. The future becomes "equal", "different", "" or None (server died)."""
        answer: Future = Future()
        self.asked += 1
        self.open[self.asked] = answer
        if not self.alive:  # the reading thread may be through with `open` already
            self._give_up()
            return answer

        try:
            self.process.stdin.write(f"{self.asked} {question}\n".encode())
            self.process.stdin.flush()
        except OSError:
            self._give_up()
        return answer

    def wait(self, answer: Future) -> str | None:
        """The verdict; None when the server died or hangs, which ends it."""
        try:
            return answer.result(HUNG)
        except TimeoutError:
            self.end()
            return ""

    def end(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.wait()
        try:
            self.process.stdin.close()
        except OSError:  # what was not delivered cannot be
            pass

    def _read(self) -> None:
        """In a thread: "ready" first, then `number verdict` lines, until the server's end."""
        for line in self.process.stdout:
            number, _, verdict = line.decode().strip().partition(" ")
            if number == "ready":
                self.ready.set_result(True)
            elif number.isdigit() and int(number) in self.open:
                self.open.pop(int(number)).set_result(verdict)
        self._give_up()

    def _give_up(self) -> None:
        """The server is gone: nobody may go on waiting for it."""
        self.alive = False
        if not self.ready.done():
            self.ready.set_result(False)
        for number in list(self.open):
            answer = self.open.pop(number, None)
            if answer is not None and not answer.done():
                answer.set_result(None)

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


JUDGE = Judge()
atexit.register(JUDGE.stop)


# ------------------------------------------------------------------------------- the server's side


def serve() -> None:
    """Questions on stdin, verdicts on stdout, one child each, until stdin is closed."""
    if not hasattr(os, "fork"):
        sys.exit("no fork on this system")
    _limit("RLIMIT_AS", MEMORY)
    equal = _load_math_verify()
    print("ready", flush=True)

    waiting: list[bytes] = []
    children: dict[int, tuple[int, str]] = {}  # pipe -> process, number of its question
    unfinished = b""
    while True:
        readable, _, _ = select.select([0, *children], [], [])
        for pipe in readable:
            # new questions, or the end of whoever asked
            if pipe == 0:
                received = os.read(0, 1 << 16)
                if not received:
                    return
                *lines, unfinished = (unfinished + received).split(b"\n")
                waiting += lines
                continue

            # a child's verdict; nothing when it died
            verdict = os.read(pipe, 16).decode()
            process, number = children.pop(pipe)
            os.close(pipe)
            os.waitpid(process, 0)
            print(number, verdict, flush=True)

        while waiting and len(children) < AT_ONCE:
            number, _, question = waiting.pop(0).decode().partition(" ")
            pipe, process = _start_child(equal, *json.loads(question))
            children[pipe] = process, number


def _start_child(equal, seconds: float, said: str, truth: str) -> tuple[int, int]:
    """(pipe, process) of a child that writes "equal" or "different" into its pipe, or dies."""
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return reader, process

    # From here on this is the child. SIGPROF is not handled, so it ends the process.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(HUNG)
    try:
        verdict = b"equal" if equal(said, truth) else b"different"
    except Exception:  # whatever a parser of model output raises: no verdict
        verdict = b""
    os.write(writer, verdict)
    os._exit(0)


def _load_math_verify():
    """A function (said, truth) -> bool. Imported and used once, so that children start warm.

    LaTeX only: math-verify's other extraction goes through sympy's `parse_expr`, which evaluates
    its text as Python. Floats are compared to 12 digits: its default of 6 takes .333333 for 1/3.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # It warns that its own time limits, which are signals, are off: ours are on.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(latex: str) -> list:
        config = [LatexExtractionConfig()]
        return parse(f"${latex}$", extraction_config=config, parsing_timeout=None)

    def equal(said: str, truth: str) -> bool:
        gold = read(truth)
        answer = read(said)
        if not gold or not answer:
            return False
        return bool(verify(gold, answer, float_rounding=12, timeout_seconds=None))

    equal("(x+1)^2", "x^2+2x+1")
    return equal


def _limit(name: str, value: int) -> None:
    """Set a limit of the system, where it has one."""
    import resource

    try:
        resource.setrlimit(getattr(resource, name), (value, value))
    except (OSError, ValueError, AttributeError):
        pass


if __name__ == "__main__":
    serve()
