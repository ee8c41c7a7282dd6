"""Determinism: what is promised to be the same is the same, to the last bit; what is not, is close.

What it teaches: "the same run" has several meanings. On one machine with one number of threads the same
command gives the same bits, whatever the number of data workers, the directory, or the order in which
Python hashes strings. Another number of threads sums in another order; another number of ranks splits
the batch: the same samples at every step, and losses that agree to about single precision. And another
seed must give another run: a comparison that cannot fail shows nothing.
"""

from pathlib import Path

from tests.campaign import life, small
from tests.campaign.ledger import FOLDER, Ledger, Row, row_of
from tests.campaign.small import Job

CLOSE = 2e-3  # relative, of a loss after some steps on other threads or ranks

# (job, more words, environment, ranks, what must be seen, against the job's own undisturbed run)
Case = tuple[Job, tuple[str, ...], dict[str, str], int, str]
ADAMW = ("--optimizer", "adamw", "--lr", "1e-3")
CASES: dict[str, Case] = {
    "the same command again: pre-training with AdaLRS": (small.PRETRAIN, (), {}, 1, "equal"),
    "the same command again: SFT": (small.SFT, (), {}, 1, "equal"),
    "the same command again: RL": (small.RL, (), {}, 1, "equal"),
    "the same command again: the image stage": (small.IMAGE, (), {}, 1, "equal"),
    "the same command again: two ranks": (small.TWO, (), {}, 2, "equal"),
    "two data workers": (small.SFT, ("--workers", "2"), {}, 1, "equal"),
    "checkpoints at other steps": (small.PRETRAIN, ("--save-every", "7"), {}, 1, "equal"),
    "two ranks for one": (small.SFT, (), {}, 2, "close"),
    "two ranks for one, RL with --batch 1": (small.RL, ("--batch", "1"), {}, 2, "close"),
    "another seed": (small.SFT, ("--seed", "7"), {}, 1, "another run"),
}
REAL: dict[str, Case] = {
    "another order of Python's hashes, real processes": (
        small.SFT, (), {"PYTHONHASHSEED": "12345"}, 1, "equal",
    ),
    "two threads, real processes": (
        small.SFT, (), {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"}, 1, "close",
    ),
}  # fmt: skip


def whole(job: Job, known: dict, real: bool, more: tuple[str, ...] = ()) -> dict:
    """The outcome of the job as it is."""
    key = (job.name, real, more)
    if key not in known:
        folder = life.fresh(FOLDER / "work" / "determinism" / "whole")
        begin = life.begin_real if real else life.begin
        words = [*job.words, *more, "--out", str(folder / "run")]
        if begin(words, folder / "said", job.ranks).end().status != 0:
            raise ValueError(f"{job.name} does not even run, see {folder / 'said'}")
        known[key] = life.outcome(folder / "run")
    return known[key]


def compared(found: dict, wanted: dict) -> str:
    """equal, close (every loss, every step), or another run."""
    if not life.difference(found, wanted):
        return "equal"
    if len(found["log"]) != len(wanted["log"]):
        return "another run"
    worst = 0.0
    for a, b in zip(found["log"], wanted["log"]):
        if a["step"] != b["step"] or a["lr"] != b["lr"]:
            return "another run"
        worst = max(worst, abs(a["loss"] - b["loss"]) / max(abs(b["loss"]), 0.1))
    return "close" if worst < CLOSE else "another run"


def one(case: Case, known: dict, real: bool, folder: Path) -> str:
    job, more, environment, ranks, _ = case
    place = life.fresh(folder)
    words = [*job.words, *more, "--out", str(place / "run")]
    if real:
        ended = life.begin_real(words, place / "said", ranks, **environment).end()
    else:
        ended = life.begin(words, place / "said", ranks, environment=environment).end()
    if ended.status != 0:
        return f"ended with {ended.status}"
    # (RL with another size of batch is another run: both sides have it)
    same = more if "--batch" in more else ()
    return compared(life.outcome(place / "run"), whole(job, known, real, same))


def run(count: int = 10**9) -> None:
    """All cases that the ledger does not have yet."""
    small.prepare()
    ledger = Ledger("determinism")
    known: dict = {}
    todo = [(name, case, False) for name, case in CASES.items()]
    todo += [(name, case, True) for name, case in REAL.items()]
    for name, case, real in todo[:count]:
        if name not in ledger.done:
            seen = one(case, known, real, FOLDER / "work" / "determinism" / "case")
            row = ledger.add(name, seen=seen)
            print(row["case"], row["seen"], sep="  ", flush=True)


def rows() -> list[Row]:
    """A line for each comparison."""
    ledger = Ledger("determinism")
    table = []
    for name, (*_, expected) in (CASES | REAL).items():
        if name in ledger.done:
            good = {"close": ("close", "equal")}.get(expected, (expected,))
            table.append(row_of(name, [ledger.done[name]], expected, good))
    return table
