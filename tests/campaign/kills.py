"""Kills: runs that die at random moments, again and again, and end as if nothing had happened.

What it teaches: what a checkpoint promises is one sentence, and this is its test: *the finished run has
the undisturbed run's log, weights, optimizer state and generators, bit for bit*. Each case is a run
that is killed a few times and then left alone; half of the kills come at a random moment, the others
wait for a phase that a random moment seldom meets (a trial of AdaLRS, the rewards, a checkpoint that is
being written).

A tenth of the kills hit real processes, `python script.py` and torchrun, the others forks of this one.
Every death is also looked at: nobody may be left behind.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.campaign import life, small
from tests.campaign.ledger import FOLDER, Ledger, Row, row_of
from tests.campaign.small import Job

TOLD = 143

# Of 200 kills: so many of each job, and kills a case. Workers start slowly.
SHARES = {
    small.PRETRAIN: 45,
    small.SFT: 20,
    small.RL: 45,
    small.WORKERS: 15,
    small.TWO: 25,
    small.TWO_RL: 15,
    small.IMAGE: 15,
}
REAL = {small.PRETRAIN: 8, small.RL: 6, small.TWO: 6}
A_CASE = 5


@dataclass
class Whole:
    """The run that nothing happened to, and how long it took."""

    outcome: dict
    seconds: float


def place_of(job: Job, case: str) -> Path:
    return FOLDER / "work" / f"{case} {job.name}".replace(" ", "-")


def undisturbed(job: Job, known: dict[str, Whole], real: bool = False) -> Whole:
    """Run a job once, from start to end."""
    key = f"{job.name} {real}"
    if key not in known:
        folder = life.fresh(place_of(job, "whole"))
        begin = life.begin_real if real else life.begin
        ended = begin([*job.words, "--out", str(folder / "run")], folder / "said", job.ranks).end()
        if ended.status != 0:
            raise ValueError(f"{job.name} does not even run:\n{ended.said[-2000:]}")
        known[key] = Whole(life.outcome(folder / "run"), ended.seconds)
    return known[key]


def killed_and_finished(job: Job, case: str, kills: int, whole: Whole, real: bool) -> dict:
    """One case: a run killed up to so many times, then finished; what was seen."""
    folder = life.fresh(place_of(job, "case"))
    words = [*job.words, "--out", str(folder / "run")]
    begin = life.begin_real if real else life.begin
    rng = life.moments(f"{job.name} {case} {real}")
    phases = []
    for n in range(kills):
        # a random moment of what is left, or a phase to wait for
        delay = rng.uniform(0.1, 0.9) * whole.seconds / (1 if n == 0 else 2)
        aim = rng.choice(job.aims) if rng.random() < 0.5 and not real else ""
        which = rng.randrange(job.ranks) if job.ranks > 1 and rng.random() < 0.5 else None
        if aim:
            run = begin(words, folder / "said", job.ranks, aim=aim, delay=delay / 2)
        else:
            run = begin(words, folder / "said", job.ranks)
            run.kill_at(delay, None if real else which)
        ended = run.end()
        if ended.left:
            return {"seen": "left processes behind", "kills": n + 1, "said": ended.said[-2000:]}
        if None in ended.statuses:
            return {"seen": "hung", "kills": n + 1, "said": ended.said[-2000:]}
        if -9 not in ended.statuses and ended.status == 0:
            break  # it was done before the kill came
        phases.append(aim or ended.phase)

    # left alone, it ends
    ended = begin(words, folder / "said", job.ranks).end()
    if ended.status != 0:
        return {
            "seen": f"ended with {ended.status}",
            "kills": len(phases),
            "said": ended.said[-2000:],
        }
    other = life.difference(life.outcome(folder / "run"), whole.outcome)
    return {
        "seen": f"another {other}" if other else "equal",
        "kills": len(phases),
        "phases": phases,
        "refused": (folder / "said").read_text(errors="replace").count("REFUSED"),
    }


def told_in_trial(job: Job, case: str, whole: Whole) -> dict:
    """SIGTERM in a trial of AdaLRS, lives shorter than a trial: every life saves what it made."""
    folder = life.fresh(place_of(job, "told"))
    words = [*job.words, "--out", str(folder / "run"), "--save-every", "0"]
    rng = life.moments(f"told {case}")
    steps = []
    lives = 0
    while lives < 40:
        lives += 1
        run = life.begin(words, folder / "said", job.ranks)
        wait_for(run, "trial" if rng.random() < 0.7 else "no trial", rng.uniform(0, 0.1))
        run.kill(number=15)
        ended = run.end()
        if ended.status == 0:
            break
        newest = max([0, *checkpoint_numbers(folder / "run")])
        if ended.status != TOLD or newest < max([0, *steps]):
            return {
                "seen": f"ended with {ended.status}",
                "kills": lives,
                "said": ended.said[-2000:],
            }
        if (
            f"({newest} executed) written" not in ended.said
            and "no checkpoint yet" not in ended.said
        ):
            return {"seen": "said nothing of what it saved", "said": ended.said[-2000:]}
        steps.append(newest)
        if lives >= 6:
            run = life.begin(words, folder / "said", job.ranks).end()
            break
    other = life.difference(life.outcome(folder / "run"), whole.outcome)
    return {"seen": f"another {other}" if other else "equal", "kills": lives, "steps": steps}


def checkpoint_numbers(run: Path) -> list[int]:
    folder = run / "checkpoints"
    return [int(p.name[5:]) for p in folder.glob("step-*")] if folder.is_dir() else []


def wait_for(run: life.Life, phase: str, more: float) -> None:
    """Until a life has been in a phase, and a little more."""
    life.wait_until(run, lambda: run.processes[0].phase == phase)
    life.time.sleep(more)


# -------------------------------------------------------------------------------------------- cases


def cases(count: int) -> list[tuple[Job, str, int, bool]]:
    """(job, case, kills, real) for so many kills altogether; of fewer than jobs, the first have one each."""
    shares = [(job, share, False) for job, share in SHARES.items()]
    shares += [(job, share, True) for job, share in REAL.items()]
    total = sum(share for _, share, _ in shares)
    found = []
    for job, share, real in shares[:count]:
        kills = max(1, round(share * count / total))
        for n, start in enumerate(range(0, kills, A_CASE)):
            name = f"{'real' if real else 'kill'} {job.name} {n}"
            found.append((job, name, min(A_CASE, kills - start), real))
    return found


def run(count: int = 200) -> None:
    """All cases that the ledger lacks. A case is done once it has been killed as often as asked."""
    small.prepare()
    ledger = Ledger("kills")
    known: dict[str, Whole] = {}
    for job, case, kills, real in cases(count):
        tried = 0
        while tried < 4 and sum(row["kills"] for row in ledger.of(f"{case}.")) < kills:
            missing = kills - sum(row["kills"] for row in ledger.of(f"{case}."))
            name = f"{case}.{len(ledger.of(f'{case}.'))}"
            whole = undisturbed(job, known, real)
            found = killed_and_finished(job, name, missing, whole, real)
            report(ledger.add(name, job=job.name, real=real, **found))
            tried += 1

    # told in a trial
    for n in range(count // 40):
        case = f"told {n}"
        if case not in ledger.done:
            whole = undisturbed(small.PRETRAIN, known)
            report(ledger.add(case, **told_in_trial(small.PRETRAIN, case, whole)))


def report(row: dict) -> None:
    print(row["case"], row["seen"], row.get("kills", ""), *row.get("phases", ()), flush=True)


def rows() -> list[Row]:
    """A line for each job, one for the moments, one for SIGTERM."""
    ledger = Ledger("kills")
    table = []
    equal = "equal to the undisturbed run, bit for bit"
    for shares, real, words in ((SHARES, False, ""), (REAL, True, ", real processes")):
        for job in shares:
            mine = (job.name, real)
            found = [
                row for row in ledger.done.values() if (row.get("job"), row.get("real")) == mine
            ]
            if not found:
                continue
            kills = sum(row["kills"] for row in found)
            row = row_of(f"kill -9: {job.name}{words}", found, equal, ("equal",))
            row.seen = f"{row.seen} of {len(found)} runs"
            row.tried = kills
            table.append(row)
    told = ledger.of("told ")
    if told:
        table.append(row_of("SIGTERM in a trial of AdaLRS", told, f"saved; {equal}", ("equal",)))
    return table


def moments_met() -> dict[str, int]:
    """How many kills came in which phase."""
    met: dict[str, int] = {}
    for row in Ledger("kills").done.values():
        for phase in row.get("phases", ()):
            met[phase] = met.get(phase, 0) + 1
    return met
