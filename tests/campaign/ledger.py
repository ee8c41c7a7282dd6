"""What the campaign remembers: one JSON line for each finished case, by the code that it was run on.

What it teaches: a campaign of half an hour is interrupted, so a case that is done is written down at
once, and a rerun goes on with what is missing. A case counts for the code that it ran, not for the next:

    runs/faults/kills.jsonl     {"code": "3f0c...", "case": "sft 7", "seen": "equal", ...}

A part of the campaign is a function that goes through its cases, and one that makes `Row`s of the ledger.
"""

import hashlib
import json
import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("FAULTS_FOLDER") or ROOT / "runs" / "faults")


@dataclass
class Row:
    """A line of the table: a fault, how often it was tried, what should become of it, what did."""

    fault: str
    tried: int
    expected: str
    seen: str
    held: bool


def sources() -> list[Path]:
    """Every Python file of the project, tests included, whether git knows it yet or not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [ROOT / name for name in sorted(listed.stdout.split()) if (ROOT / name).is_file()]


def code_of(files: Iterable[Path]) -> str:
    """A digest of some files: a case that ran on other code counts for nothing."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def project_code() -> str:
    """Of what is tested, and of the campaign itself; other tests change nothing of its outcome."""
    here = Path(__file__).parent
    tests = ROOT / "tests"
    return code_of(p for p in sources() if tests not in p.parents or here in p.parents)


def commit() -> str:
    """The commit that is checked out, for people; "+" marks changes since."""
    words = ["git", "describe", "--always", "--abbrev=9", "--exclude=*", "--dirty=+"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or "unknown"


class Ledger:
    """Finished cases of one part. `code`: which code they must have run on.

    With ANY_CODE (to write a page, never to run) a case counts on whatever code it ran last.
    """

    ANY_CODE = False

    def __init__(self, part: str, code: str = "", folder: Path = FOLDER):
        self.file = folder / f"{part}.jsonl"
        self.code = code or project_code()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        any_code = self.ANY_CODE and not code
        self.done = {
            row["case"]: row for row in self.rows() if any_code or row["code"] == self.code
        }

    def rows(self) -> list[dict]:
        """All lines, of any code. A line that a kill tore is passed over."""
        rows = []
        for line in self.file.read_text().splitlines() if self.file.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"case", "code"} <= row.keys():
                rows.append(row)
        return rows

    def add(self, case: str, **what) -> dict:
        """Write a finished case down, at once."""
        row = {"case": case, "code": self.code, "commit": commit(), "time": round(time.time())}
        row |= what
        self.done[case] = row
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def of(self, prefix: str) -> list[dict]:
        """Finished cases whose name begins so."""
        return [row for case, row in self.done.items() if case.startswith(prefix)]


def tally(rows: list[dict], good: Iterable[str]) -> tuple[str, bool]:
    """What was seen, in words, commonest first; and whether it is all good."""
    seen = Counter(row["seen"] for row in rows)
    words = ", ".join(f"{n} {what}" for what, n in seen.most_common())
    return words, bool(rows) and set(seen) <= set(good)


def row_of(fault: str, rows: list[dict], expected: str, good: Iterable[str]) -> Row:
    """The table's line about cases that are all to end as `good` says."""
    words, held = tally(rows, good)
    return Row(fault, len(rows), expected, words, held)
