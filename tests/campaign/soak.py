"""Soak: twenty minutes with workers, faults and checkpoints, in which memory stays flat.

What it teaches: a leak of ten kilobytes a step is invisible in a test and ends a week's run. Real
processes train on data with faults in it, write a checkpoint every fifty steps, and are told to stop
when their time is over. Their memory, workers included, is looked at every two seconds; after the first
quarter it may rise by LEAK for a step, which is what a line of the log takes (the log is kept whole in
memory).
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from tests.campaign import life, small
from tests.campaign.ledger import FOLDER, Ledger, Row

SECONDS = 1200.0  # of all soaks together
EVERY = 2.0  # seconds between two looks
LEAK = 6 << 10  # bytes a step
SLACK = 8 << 20  # bytes: an allocator's own ups and downs
LONG = ("--steps", "10000000", "--save-every", "50")
SOAKS = {
    "SFT with a worker": (
        *small.SFT.words,
        *LONG,
        "--workers",
        "1",
        "--rows",
        "8",
        "--length",
        "256",
    ),
    "RL": (*small.RL.words, *LONG, "--prompts", "8"),
}


@dataclass
class Trace:
    """Resident bytes over time."""

    times: list[float]
    bytes: list[int]

    def rise(self) -> int:
        """From the second quarter's largest to the last quarter's largest."""
        n = len(self.bytes)
        return max(self.bytes[3 * n // 4 :]) - max(self.bytes[n // 4 : n // 2])


def resident(pids: set[int]) -> int:
    """Bytes that some processes hold in memory."""
    total = 0
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/statm").read_text().split()
        except OSError:
            continue
        total += int(words[1]) * 4096
    return total


def soak(words: tuple[str, ...], place: Path, seconds: float) -> dict:
    """One long run: its memory, and how it left."""
    run = life.begin_real([*words, "--out", str(place / "run")], place / "said")
    root = run.processes[0].pid
    log = place / "run" / "log.jsonl"
    trace = Trace([], [])
    began = None
    while not run.over and (began is None or time.monotonic() - began < seconds):
        time.sleep(EVERY)
        if began is None and log.is_file() and log.stat().st_size:
            began = time.monotonic()
        elif began is not None:
            trace.times.append(time.monotonic() - began)
            trace.bytes.append(resident({root} | life.descendants(root)))
    run.kill(number=15)
    ended = run.end(longest=time.monotonic() - run.began + 60)

    steps = log.read_bytes().count(b"\n")
    rise = trace.rise() if len(trace.bytes) >= 8 else 0
    allowed = SLACK + LEAK * steps // 2
    problems = []
    if ended.status != 143:
        problems.append(f"ended with {ended.status}")
    if ended.left:
        problems.append("left processes behind")
    if rise > allowed:
        problems.append(f"memory rose by {rise >> 20} MiB")
    if any(json.loads(line)["loss"] is None for line in log.read_text().splitlines()):
        problems.append("a loss is not finite")
    return {
        "seen": ", ".join(problems) or "flat",
        "steps": steps,
        "rise": rise >> 10,
        "peak": max(trace.bytes, default=0) >> 20,
        "said": ended.said[-1500:],
    }


def run(seconds: float = SECONDS) -> None:
    """The soaks that the ledger does not have, each for its share of the time."""
    small.prepare()
    ledger = Ledger("soak")
    for name, words in SOAKS.items():
        share = seconds / len(SOAKS)
        if ledger.done.get(name, {"seconds": 0})["seconds"] < share:
            place = life.fresh(FOLDER / "work" / "soak")
            row = ledger.add(name, seconds=share, **soak(words, place, share))
            print(
                "soak", name, row["seen"], f"{row['rise']} KiB in {row['steps']} steps", flush=True
            )


def rows() -> list[Row]:
    """A line for each soak."""
    table = []
    for name, row in Ledger("soak").done.items():
        seen = f"{row['seen']}: {row['rise']} KiB in the last half of {row['steps']:,} steps"
        seen += f", peak {row['peak']} MiB"
        fault = f"{row['seconds'] / 60:.0f} minutes of {name}"
        table.append(Row(fault, 1, "flat memory, leaves when told", seen, row["seen"] == "flat"))
    return table
