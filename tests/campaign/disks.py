"""Disks: full, read-only, closed, failing, taken away for a while.

What it teaches: what cannot be written costs what could not be written, and is said; the run goes on,
and with room again it ends as if nothing had happened. What cannot be read costs its records. Nothing
is pretended: limits are the system's own (RLIMIT_FSIZE set from outside, a small tmpfs, a mount made
read-only, permissions as another user, /dev/full), so that every call of the real program meets the
real error.
"""

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Callable

from tests.campaign import life, small
from tests.campaign.ledger import FOLDER, Ledger, Row, row_of
from tests.campaign.life import Ended, Life

JOB = small.SFT
NOBODY = 65534
EQUAL = "equal"
LOUD = ("NOT WRITTEN", "LOG", "No space", "Read-only", "Permission", "File too large", "error: ")


# --------------------------------------------------------------------------------------- the faults


def limit(run: Life, size: int) -> None:
    """Every file of a living process may have so many bytes from now on."""
    for process in run.processes:
        if not process.poll():
            hard = resource.RLIM_INFINITY
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def after_steps(run: Life, steps: int) -> None:
    """Until the log of a life has so many lines."""
    log = run.said.parent / "run" / "log.jsonl"
    life.wait_until(run, lambda: life.lines_in(log) >= steps)


def words(place: Path, *more: str) -> list[str]:
    return [*JOB.words, "--out", str(place / "run"), *more]


def start(place: Path, *more: str, **how) -> Life:
    return life.begin(words(place, *more), place / "said", **how)


def full_for_a_while(place: Path, size: int) -> Ended:
    """No file may grow beyond `size` bytes, from the fifth step on, until a failure was said.

    With 900 bytes that is true of what is printed as well.
    """
    run = start(place)
    after_steps(run, 5)
    limit(run, size)
    deadline = time.monotonic() + 2.0
    while (
        time.monotonic() < deadline and not run.over and b"NOT WRITTEN" not in run.said.read_bytes()
    ):
        time.sleep(0.01)
    limit(run, resource.RLIM_INFINITY)
    ended = run.end()
    again = start(place).end() if ended.status else ended
    again.said = ended.said + again.said
    return again


def full_until_the_end(place: Path) -> Ended:
    """Full from the start; then the same command with room."""
    run = start(place, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, -1)))
    ended = run.end()
    if ended.status in (0, None):
        return ended
    again = start(place).end()
    again.said = ended.said + again.said
    return again


def mount(place: Path, size: str) -> bool:
    """A small disk of its own for a run, if this user may make one."""
    (place / "run").mkdir()
    made = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place / "run")]
    return (
        shutil.which("mount") is not None
        and subprocess.run(made, capture_output=True).returncode == 0
    )


def remount(place: Path, options: str) -> None:
    again = ["mount", "-o", f"remount,{options}", str(place / "run")]
    subprocess.run(again, check=True, capture_output=True)


def again_after(first: Ended, place: Path) -> Ended:
    """A second life, which has said what the first one said too; what its disk holds is kept."""
    again = start(place).end()
    again.said = first.said + again.said
    if again.status == 0:
        keep(place)
    return again


def small_disk(place: Path) -> Ended | None:
    """A disk on which two checkpoints do not fit, later a larger one."""
    if not mount(place, "2m"):
        return None
    try:
        first = start(place).end()
        remount(place, "size=64m")
        return again_after(first, place)
    finally:
        subprocess.run(["umount", "-l", str(place / "run")], check=False)


def read_only_for_a_while(place: Path) -> Ended | None:
    """A run that was killed is started on its disk, which is read-only now, and again once it is not."""
    if not mount(place, "64m"):
        return None
    try:
        run = start(place)
        after_steps(run, 8)
        run.kill()
        run.end()
        remount(place, "ro")
        refused = start(place).end()
        remount(place, "rw")
        if refused.status != 1:
            return refused
        return again_after(refused, place)
    finally:
        subprocess.run(["umount", "-l", str(place / "run")], check=False)


def keep(place: Path) -> None:
    """What a mounted disk holds, before it is taken away."""
    shutil.copytree(place / "run", place / "kept")


def closed_folder(place: Path) -> Ended | None:
    """Another user's folder of checkpoints, which may not be written, later one that may."""
    if os.getuid() != 0:
        return None
    folder = place / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for path in (place, place / "run"):
        os.chown(path, NOBODY, NOBODY)
    first = start(place, before=as_nobody).end()
    os.chown(folder, NOBODY, NOBODY)
    again = start(place, before=as_nobody).end()
    again.said = first.said + again.said
    return again


def as_nobody() -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ["HOME"] = "/tmp"


def log_is_full(place: Path) -> Ended:
    """The log alone lies on a full disk; weights and state are as ever."""
    (place / "run").mkdir()
    (place / "run" / "log.jsonl").symlink_to("/dev/full")
    return start(place).end()


def deaf_terminal(place: Path) -> Ended:
    """Nothing can be printed: a full disk behind stdout and stderr. Then once more, with a terminal."""

    def before() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)

    first = start(place, before=before).end()
    return first if first.status == 0 else start(place).end()


def taken_pictures(place: Path) -> Ended:
    """The pictures are gone for a second: each that is asked for meanwhile is a counted fault."""
    data = place / "data"
    shutil.copytree(small.HOME / "data", data)
    run = start(place, "--data", str(data / "samples.jsonl"))
    after_steps(run, 4)
    os.rename(data, place / "away")
    time.sleep(0.5)
    os.rename(place / "away", data)
    return run.end()


def cut_data(place: Path) -> Ended:
    """The file of records loses its second half while the run reads it."""
    data = place / "data"
    shutil.copytree(small.HOME / "data", data)
    run = start(place, "--data", str(data / "samples.jsonl"))
    after_steps(run, 4)
    os.truncate(data / "samples.jsonl", (data / "samples.jsonl").stat().st_size // 2)
    return run.end()


def out_of_a_file(place: Path) -> Ended:
    """--out is a file."""
    (place / "run").write_text("precious")
    return start(place).end()


def out_below_a_file(place: Path) -> Ended:
    (place / "file").write_text("precious")
    return life.begin([*JOB.words, "--out", str(place / "file" / "run")], place / "said").end()


def checkpoints_is_a_file(place: Path) -> Ended:
    (place / "run").mkdir()
    (place / "run" / "checkpoints").write_text("precious")
    return start(place).end()


# (work, what counts as good, whether it must have been said)
Fault = tuple[Callable[[Path], Ended | None], tuple[str, ...], bool]
FAULTS: dict[str, Fault] = {
    "full for a while: checkpoints": (lambda p: full_for_a_while(p, 60_000), (EQUAL,), True),
    "full for a while: checkpoints, log and what is printed": (
        lambda p: full_for_a_while(p, 900),
        (EQUAL,),
        False,
    ),
    "full from the start, then not": (full_until_the_end, (EQUAL,), True),
    "a disk too small, later a larger one": (small_disk, (EQUAL,), True),
    "read-only for a while": (read_only_for_a_while, (EQUAL,), True),
    "checkpoints in another user's folder, later one's own": (closed_folder, (EQUAL,), True),
    "a log on a full disk": (log_is_full, ("equal but for the log",), True),
    "a terminal that fails": (deaf_terminal, (EQUAL,), False),
    "pictures gone for a second": (taken_pictures, ("ended, faults counted",), True),
    "records cut while they are read": (cut_data, ("ended, faults counted", "one line"), True),
    "--out is a file": (out_of_a_file, ("one line",), True),
    "--out below a file": (out_below_a_file, ("one line",), True),
    "checkpoints is a file": (checkpoints_is_a_file, ("one line",), True),
}


# --------------------------------------------------------------------------------------------- cases


def seen_in(ended: Ended | None, place: Path, whole: dict, must_say: bool) -> str:
    """What became of a run, in words."""
    if ended is None:
        return "not tried: this user may not"
    if ended.status is None:
        return "hung"
    if ended.left:
        return "left processes behind"
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if ended.status != 0:
        return (
            "one line" if ended.status == 1 and len(errors) == 1 else f"ended with {ended.status}"
        )
    if "skipped" in ended.said and (place / "data").exists():
        return "ended, faults counted"
    run = place / "kept" if (place / "kept").exists() else place / "run"
    log = run / "log.jsonl"
    if log.is_symlink():
        log.unlink()
        log.write_text("")
    other = life.difference(life.outcome(run), whole)
    if other and other != "log":
        return f"another {other}"
    if must_say and not any(word in ended.said for word in LOUD):
        return "nothing was said"
    return "equal but for the log" if other else EQUAL


def run(count: int = 10**9) -> None:
    """All faults that the ledger does not have yet."""
    small.prepare()
    ledger = Ledger("disks")
    todo = [name for name in list(FAULTS)[:count] if name not in ledger.done]
    if not todo:
        return
    folder = FOLDER / "work" / "disks"
    place = life.fresh(folder / "whole")
    if start(place).end().status != 0:
        raise ValueError(f"{JOB.name} does not even run, see {place / 'said'}")
    whole = life.outcome(place / "run")
    for name in todo:
        work, _, must_say = FAULTS[name]
        place = life.fresh(folder / "case")
        place.chmod(0o755)
        ended = work(place)
        seen = seen_in(ended, place, whole, must_say)
        row = ledger.add(name, seen=seen, said=ended.said[-2500:] if ended else "")
        print(row["case"], row["seen"], sep="  ", flush=True)


def rows() -> list[Row]:
    """A line for each fault."""
    ledger = Ledger("disks")
    table = []
    for name, (_, good, _) in FAULTS.items():
        if name in ledger.done:
            row = row_of(
                name, [ledger.done[name]], good[0], (*good, "not tried: this user may not")
            )
            table.append(row)
    return table
