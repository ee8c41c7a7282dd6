"""The campaign of faults itself: what it must notice is planted, and it notices.

The campaign (`make faults`) is no part of the suites; that its parts work is.
"""

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tests.campaign import __main__ as campaign
from tests.campaign import determinism, fuzz, kills, life, mutants
from tests.campaign.ledger import Ledger, Row, row_of

# ------------------------------------------------------------------------------------- the ledger


def test_a_finished_case_is_remembered_for_its_code_and_a_torn_line_is_no_case(tmp_path):
    ledger = Ledger("part", "a", tmp_path)
    ledger.add("one", seen="equal")
    with open(ledger.file, "a") as file:
        file.write('{"case": "two", "code"')
    again = Ledger("part", "a", tmp_path)
    assert list(again.done) == ["one"] and again.done["one"]["seen"] == "equal"
    assert not Ledger("part", "b", tmp_path).done


def test_one_case_that_did_not_hold_fails_its_row():
    good = {"seen": "equal"}
    assert row_of("x", [good, good], "equal", ("equal",)).held
    row = row_of("x", [good, {"seen": "hung"}, good], "equal", ("equal",))
    assert not row.held and row.seen == "2 equal, 1 hung" and row.tried == 3
    assert not row_of("x", [], "equal", ("equal",)).held


def test_the_table_says_what_failed(monkeypatch):
    rows = {"kills": [Row("a | b", 2000, "e", "x | y", False)], "disks": [], "mutants": []}
    rows["fuzz"] = [Row("a", 1, "e", "e", True)]
    monkeypatch.setattr(campaign, "rows_of", rows.get)
    table, held = campaign.table_of(("kills", "disks"))
    assert (
        not held and "| 2,000 | e | **FAILED** x \\| y |" in table and "Disks\n\nNot run" in table
    )
    assert campaign.table_of(("fuzz", "mutants"))[1]
    assert not campaign.table_of(("fuzz", "disks"))[1], "a part that did not run held"


# -------------------------------------------------------------------------------- hostile input


def works(act):
    """A target that does something for each case."""
    return fuzz.Target(
        "planted", lambda folder: [None], lambda folder, seed, rng: act(folder) or "fine"
    )


def outside(folder: Path) -> None:
    (folder.parent.parent / "nanosail-outside").exists()
    with open("/etc/hostname", "rb"):
        time.sleep(0)


def connects(folder: Path) -> None:
    with socket.socket() as probe:
        probe.connect_ex(("127.0.0.1", 9))


def starts(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def undeclared(folder: Path) -> None:
    raise KeyError("planted")


def spins(folder: Path) -> None:
    while True:
        try:
            time.sleep(0)
            sum(range(10_000))
        except Exception:
            continue


def swells(folder: Path) -> None:
    bytearray(200 << 20)


def dies(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def inside(folder: Path) -> None:
    (folder / "own.txt").write_text("x")
    (folder / "own.txt").unlink()


@pytest.mark.parametrize(
    "act, word",
    [
        (inside, ""),
        (outside, "open '/etc/hostname'"),
        (connects, "socket.connect"),
        (starts, "subprocess.Popen"),
        (undeclared, "KeyError 'planted' (test_campaign.py"),
        (spins, "over 0.2 s"),
        (swells, "MiB"),
        (dies, "hung or died (-9)"),
    ],
)
def test_what_a_case_must_not_do_is_noticed(tmp_path, monkeypatch, act, word):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "WARM", 0)
    monkeypatch.setattr(fuzz, "MEMORY", 64 << 20)
    ledger = Ledger("fuzz", "x", tmp_path)
    fuzz.in_worker(works(act), [(0, 2)], ledger)
    (row,) = ledger.done.values()
    assert (row["seen"] == "problems") == bool(word)
    assert any(word in problem for problem in row["problems"] or [""]), row["problems"]


def test_a_worker_that_dies_before_its_first_case_costs_that_chunk(tmp_path):
    def prepare(folder: Path) -> list:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    ledger = Ledger("fuzz", "x", tmp_path)
    target = fuzz.Target("planted", prepare, lambda folder, seed, rng: "fine")
    fuzz.in_worker(target, [(500, 2), (1000, 2)], ledger)
    assert list(ledger.done) == ["planted 500", "planted 1000"]
    assert all("hung or died" in row["problems"][0] for row in ledger.done.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_target_runs_and_its_cases_are_the_same_again(tmp_path, name):
    target = fuzz.TARGETS[name]
    home = tmp_path / "home"
    home.mkdir()
    seeds = target.prepare(home)
    first = [fuzz.one_case(target, home, seeds, n) for n in range(6)]
    assert first == [fuzz.one_case(target, home, seeds, n) for n in range(6)]


# ------------------------------------------------------------------------------------------ mutants

SOURCE = '''"""A module: 1 < 2 and 3."""
LIMIT: float = 0.5


def f(x, n=3, *, on=True):
    """Doc 4 < 5."""
    assert x >= 0, "not 6"
    if not on and x < n:
        raise ValueError(f"{x + 1} is wrong")
    total = x * 2
    total -= 1
    print("said 7")
    x.append(total)
    x.y = 0
    return total if x else -n


if __name__ == "__main__":
    f(8)
'''


def test_mutants_change_what_is_computed_and_nothing_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "f.py").write_text(SOURCE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    found = mutants.sites("f.py")
    changes = {(mutant.before, mutant.after) for mutant in found}
    wanted = {
        ("0.5", "1.0"),
        ("3", "4"),
        ("True", "False"),
        ("not on", "bool(on)"),
        ("x < n", "(x <= n)"),
        ("x < n", "(x >= n)"),
        ("not on and x < n", "(not on or x < n)"),
        ("not on and x < n", "(not (not on and x < n))"),
        ("x * 2", "(x / 2)"),
        ("total -= 1", "total += 1"),
        ("total -= 1", "pass"),
        ("x.append(total)", "pass"),
        ("x.y = 0", "pass"),
        ("x", "(not (x))"),
        ("-n", "(+n)"),
    }
    assert wanted <= changes
    assert ('raise ValueError(f"{x + 1} is wrong")', "pass") in changes
    lines = {mutant.line for mutant in found}
    assert not lines & {1, 6, 7, 12, 17, 18, 19}

    # each of them is a program
    raw = SOURCE.encode()
    for mutant in found:
        assert raw[mutant.start : mutant.end].decode() == mutant.before
        ast.parse(raw[: mutant.start] + mutant.after.encode() + raw[mutant.end :])


def test_a_sample_of_mutants_is_the_same_again_and_has_each_place_once():
    first = mutants.sample("rewards.py", 22, 5)
    assert first == mutants.sample("rewards.py", 22, 5) != mutants.sample("rewards.py", 22, 6)
    assert len({(mutant.start, mutant.end) for mutant in first}) == 22


def test_only_tests_that_run_through_a_line_are_asked_fastest_first():
    def test(lines, seconds, forks=False):
        return {"lines": lines, "seconds": seconds, "forks": forks}

    known = {
        "import": [1],
        "tests": {"a": test([5, 6], 2.0), "b": test([6], 1.0), "c": test([9], 0.1, True)},
    }

    def asked(line: int) -> list[str]:
        return mutants.tests_for(mutants.Mutant("f", line, "", 0, 1, "x", "y"), known)

    assert asked(6) == ["b", "a", "c"]
    assert asked(5) == ["a", "c"]
    assert asked(1) == asked(7) == ["c", "b", "a"]


def test_listed_equivalents_still_exist():
    """A line that was rewritten leaves its excuse behind."""
    for file, line, _ in mutants.EQUIVALENT:
        assert line in {text.strip() for text in (ROOT / file).read_text().splitlines()}, (
            file,
            line,
        )


# --------------------------------------------------------------------------------------------- lives


def outcome(losses: list[float], weights: str = "a") -> dict:
    log = [{"step": n, "lr": 0.1, "loss": loss} for n, loss in enumerate(losses)]
    return {"log": log, "weights": weights}


def test_equal_close_and_another_run_are_told_apart():
    whole = outcome([2.0, 1.0])
    assert determinism.compared(outcome([2.0, 1.0]), whole) == "equal"
    assert determinism.compared(outcome([2.0, 1.0], "b"), whole) == "close"
    assert determinism.compared(outcome([2.0, 1.0001]), whole) == "close"
    assert determinism.compared(outcome([2.0, 1.1]), whole) == "another run"
    assert determinism.compared(outcome([2.0]), whole) == "another run"


def test_kills_are_shared_out_in_full():
    assert len(kills.cases(2)) == 2
    for count in (200, 20):
        shared = sum(kills_ for _, _, kills_, _ in kills.cases(count))
        assert abs(shared - count) <= len(kills.SHARES) + len(kills.REAL)
    names = [case for _, case, _, _ in kills.cases(200)]
    assert len(names) == len(set(names)) and any(real for *_, real in kills.cases(200))


def sleeper(tmp_path: Path, body: str) -> life.Life:
    script = tmp_path / "script.py"
    script.write_text(body)
    return life.begin([str(script)], tmp_path / "said")


def test_a_life_that_hangs_is_ended_and_who_is_left_behind_is_found(tmp_path):
    ended = sleeper(tmp_path, "import time; print('here', flush=True); time.sleep(60)").end(
        0.3, 0.1
    )
    assert ended.statuses == [None] and "here" in ended.said
    child = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nos._exit(3)\n"
    ended = sleeper(tmp_path, child).end(20, 0.2)
    assert ended.status == 3 and len(ended.left) == 1
    ended = sleeper(tmp_path, "raise SystemExit(4)").end(20)
    assert ended.status == 4 and not ended.left


@pytest.mark.slow
def test_the_parts_run_as_a_command_and_go_on_where_they_were(tmp_path):
    words = ["--only", "kills", "disks", "damage", "ranks", "determinism", "fuzz", "--count", "2"]
    environment = os.environ | {"FAULTS_FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "tests.campaign", *words]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
        )

    first = run()
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "everything held" in first.stdout
    lines = (tmp_path / "damage.jsonl").read_text().splitlines()
    assert len(lines) == 4 and {json.loads(line)["seen"] for line in lines} >= {"equal"}
    began = time.monotonic()
    assert run().returncode == 0 and time.monotonic() - began < 300
    assert (tmp_path / "damage.jsonl").read_text().splitlines() == lines
