"""One life of a script, from its start to its end or its death.

What it teaches: importing PyTorch takes seconds, a run of the small model one. So most lives are forks
of a process that has imported everything (the real script's main, `sys.argv` as on the command line),
and some are real processes. What happens to them is real in both: SIGKILL, SIGTERM, limits of the
system.

    begin(words) -> Life ── .kill_at(seconds) | .kill_in("checkpoint") | .tell() ── .end() -> Ended

Two ranks are two such processes with the environment that torchrun gives them, or torchrun itself.

A forked life carries a thread that notes what its main thread is doing, for the table, and for kills
that wait for a moment which a random one would seldom meet.
"""

import atexit
import ctypes
import hashlib
import importlib
import json
import mmap
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch.distributed as dist

from tests.campaign.ledger import ROOT

PHASES = ("begin", "data", "rollout", "reward", "update", "trial", "no trial", "checkpoint", "end")
LONGEST = 240.0  # seconds of a life: one that lasts longer hangs
PACE = ("data_seconds", "eta", "tokens_per_second", "images_per_second")  # of a log: not of the run


@dataclass
class Ended:
    """How a life ended: statuses of its ranks (minus the signal), what they said, whom they left behind."""

    statuses: list[int | None]
    said: str
    seconds: float
    phase: str = ""
    left: list[int] = field(default_factory=list)

    @property
    def status(self) -> int | None:
        """The first that is not zero. None: it hung, and was ended."""
        return next((status for status in self.statuses if status != 0), 0)


# ----------------------------------------------------------------------------------- what it is doing


def phase_of(frame) -> str:
    """What a process is doing, by the functions that its main thread is in."""
    found = ""
    search = None
    while frame is not None:
        name = frame.f_code.co_name
        file = Path(frame.f_code.co_filename).name
        if file == "keeper.py" and name in ("save", "finish"):
            return "checkpoint"
        if file == "generate.py" and name == "generate":
            found = found or "rollout"
        if file == "rollout.py" and name == "earned":
            found = found or "reward"
        if file == "train.py" and name == "one_step":
            found = found or "update"
        if file == "train.py" and name == "train":
            search = frame.f_locals.get("search")
            found = found or "data"
        frame = frame.f_back
    if search is not None and found == "update":
        return "trial" if search.trying else "no trial"
    return found or "begin"


def watch(board: mmap.mmap, aim: str, delay: float) -> None:
    """In a life: note the main thread's phase on a board; once `delay` is over, die in the phase aimed at."""
    main = threading.main_thread().ident
    began = time.monotonic()
    while True:
        phase = phase_of(sys._current_frames().get(main))
        board[0] = PHASES.index(phase)
        if phase == aim and time.monotonic() - began >= delay:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0003)


# ------------------------------------------------------------------------------------------ a process


def rendezvous() -> dist.TCPStore:
    """Where ranks meet, and leave notes; as under torchrun it is not in one of them."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rank_environment(rank: int, size: int, store: dist.TCPStore) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "campaign",
    }


def die_with_parent() -> None:
    """In a child: when the campaign ends, however it does, so does the child, even a stopped one."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


class Forked:
    """The real script's main in a fork of this process, in a session of its own."""

    def __init__(
        self,
        words: list[str],
        said: Path,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        aim: str = "",
        delay: float = 0.0,
    ):
        self.board = mmap.mmap(-1, 1)
        self.said = said
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            die_with_parent()
            status = 1
            try:
                status = self._work(words, environment or {}, before, aim, delay)
            finally:
                os._exit(status)

    def _work(self, words, environment, before, aim, delay) -> int:
        output = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= {"OMP_NUM_THREADS": "1"} | environment
        os.chdir(ROOT)
        sys.argv = list(words)
        sys.setswitchinterval(1e-3)
        threading.Thread(target=watch, args=(self.board, aim, delay), daemon=True).start()
        status = 1
        try:
            if before:
                before()
            runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        # what an interpreter would do at its end
        atexit._run_exitfuncs()
        if "LEARN" in os.environ:
            Path(os.environ["LEARN"]).write_text(json.dumps(sorted(sys.modules)))
        return status

    @property
    def phase(self) -> str:
        return PHASES[self.board[0]]

    def signal(self, number: int) -> None:
        send(self.pid, number)

    def alive(self) -> list[int]:
        return session(self.pid)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, raw = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(raw)
        return self.status is not None


class Real:
    """`python script.py ...`, or torchrun, as a user would type it."""

    phase = "real"

    def __init__(self, words: list[str], said: Path, environment: dict[str, str] | None = None):
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
        with open(said, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=os.environ | own,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.said = said
        self.pid = self.process.pid
        self.family: set[int] = set()

    @property
    def status(self) -> int | None:
        return self.process.returncode

    def poll(self) -> bool:
        return self.process.poll() is not None

    def signal(self, number: int) -> None:
        """To the script and, as it may be torchrun, to all that it started."""
        self.family |= descendants(self.pid)
        for pid in (self.pid, *self.family):
            send(pid, number)

    def alive(self) -> list[int]:
        self.family |= descendants(self.pid)
        return [pid for pid in self.family | set(session(self.pid)) if pid in processes()]


def processes() -> dict[int, tuple[int, int]]:
    """(parent, session) of every process that lives."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if words[0] != "Z":
            found[int(entry.name)] = (int(words[1]), int(words[3]))
    return found


def session(leader: int) -> list[int]:
    """The living processes of a session, its leader included."""
    return [pid for pid, (_, own) in processes().items() if own == leader]


def descendants(root: int) -> set[int]:
    """What a process started, and what that started."""
    parents = {pid: parent for pid, (parent, _) in processes().items()}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def send(pid: int, number: int) -> None:
    """A signal, to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


# -------------------------------------------------------------------------------------------- a life


class Life:
    """A script's processes: one, or one for each rank."""

    def __init__(self, processes: list, said: Path, store: dist.TCPStore | None = None):
        self.processes = processes
        self.store = store  # where its ranks meet: it lives as long as they do
        self.said = said
        self.began = time.monotonic()
        self.start = said.stat().st_size if said.exists() else 0
        self.phase = ""

    @property
    def over(self) -> bool:
        return all([process.poll() for process in self.processes])

    def kill(self, which: int | None = None, number: int = signal.SIGKILL) -> bool:
        """Send a signal to all its processes, or to one; whether one of them was still alive to get it."""
        chosen = self.processes if which is None else [self.processes[which]]
        self.phase = chosen[0].phase
        hit = False
        for process in chosen:
            if not process.poll():
                process.signal(number)
                hit = True
        return hit

    def kill_at(
        self, seconds: float, which: int | None = None, number: int = signal.SIGKILL
    ) -> bool:
        """The same, so many seconds after its start."""
        while time.monotonic() - self.began < seconds and not self.over:
            time.sleep(0.002)
        return self.kill(which, number)

    def end(self, longest: float = LONGEST, patience: float = 45.0) -> Ended:
        """Wait until it is over. What is still there `patience` seconds later was left behind."""
        while not self.over and time.monotonic() - self.began < longest:
            time.sleep(0.005)
        seconds = time.monotonic() - self.began
        statuses = [process.status if process.poll() else None for process in self.processes]

        deadline = time.monotonic() + (patience if None not in statuses else 0)
        left = self.alive()
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = self.alive()
        for pid in left:
            send(pid, signal.SIGKILL)
        while not self.over:
            time.sleep(0.01)
        text = self.said.read_bytes()[self.start :].decode(errors="replace")
        return Ended(statuses, text, seconds, self.phase, left if None not in statuses else [])

    def alive(self) -> list[int]:
        return [pid for process in self.processes for pid in process.alive()]


def wait_until(run: Life, seen: Callable[[], bool]) -> None:
    """Until something is seen of a life, it is over, or it lasts so long that `end` will call it hung."""
    while not seen() and not run.over and time.monotonic() - run.began < LONGEST:
        time.sleep(0.002)


def lines_in(log: Path) -> int:
    """Lines of a log that may not be there yet."""
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def warm(words: list[str], folder: Path) -> None:
    """Import here what a life of this command imports, so that no fork has to."""
    notes = folder / "modules.json"
    begin(words, folder / "warm.txt", environment={"LEARN": str(notes)}).end()
    for name in json.loads(notes.read_text()) if notes.is_file() else ():
        known = name.startswith(("torch.", "numpy.", "PIL.", "safetensors", "tyro", "rich"))
        if known and name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # a name that its package made up


def begin(words: list[str], said: Path, ranks: int = 1, **how) -> Life:
    """Start a script as forks, one for each rank. how: before, aim, delay, environment."""
    own = how.pop("environment", {})
    start = said.stat().st_size if said.exists() else 0
    if ranks == 1:
        life = Life([Forked(words, said, own, **how)], said)
    else:
        store = rendezvous()
        places = [rank_environment(rank, ranks, store) | own for rank in range(ranks)]
        life = Life([Forked(words, said, place, **how) for place in places], said, store)
    life.start = start
    return life


def begin_real(words: list[str], said: Path, ranks: int = 1, **environment: str) -> Life:
    """Start a script as its user would."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = said.stat().st_size if said.exists() else 0
    life = Life([Real([*(launcher if ranks > 1 else []), *words], said, environment)], said)
    life.start = start
    return life


# --------------------------------------------------------------------------------- what came of it


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def outcome(out: Path) -> dict:
    """What must be the same to the last bit: log, weights, and the last checkpoint's state."""
    log = []
    for line in (out / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        log.append({key: value for key, value in row.items() if key not in PACE})
    last = max((out / "checkpoints").glob("step-*"), default=out / "no checkpoint")
    text = (last / "state.json").read_text() if last.is_dir() else "{}"
    state = json.loads(text)
    state.pop("revision", "")  # whoever writes code while the campaign runs changes it
    return {
        "log": log,
        "weights": digest(out / "model.safetensors"),
        "checkpoint": last.name,
        "its weights": digest(last / "model.safetensors"),
        "optimizer and generators": digest(last / "state.safetensors"),
        "state": state,
    }


def difference(found: dict, wanted: dict) -> str:
    """Which of them is not; "" when all are."""
    return ", ".join(name for name in wanted if found[name] != wanted[name])


def fresh(path: Path) -> Path:
    """An empty folder's path."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def moments(seed: str) -> random.Random:
    """Random moments that a rerun meets again."""
    return random.Random(seed)
