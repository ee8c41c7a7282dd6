"""The lock: one version and its hashes for every package that the tests run with.

What it teaches: "it worked here" is a list of versions. The open lists in requirements/ say what is
needed and why; the lock says what was tested, for Python 3.11 and later on any platform.

    core + check + test + oracle, less torch, and what torch itself needs -> uv -> requirements/lock.txt

    python -m tools.lock              # write requirements/lock.txt
    python -m tools.lock --licences   # requirements/licences.md, once the lock is installed

PyTorch is not in it: the wheels for CPUs and for each kind of GPU have one version and different
hashes, so it is pinned by version (the Makefile's TORCH) and installed first and alone. `make lock`
installs uv, which solves for every platform at once; nothing else here needs it.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

from infra.cli import command
from tools.readme import ROOT, markdown_table

SETS = ("core", "check", "test", "oracle")
HEADER = """\
# Versions and hashes that were tested: core, check, test and oracle, without PyTorch. Written by `make lock`.
#   pip install torch==2.13.0      first and alone; the wheel for your device (its hashes differ by device)
#   pip install --no-deps --require-hashes -r requirements/lock.txt
"""


@dataclass
class LockOptions:
    """Solve the requirements anew and write the lock."""

    python: str = "3.11"  # the oldest version that the lock is for
    licences: bool = False  # do not solve; list the licences of what is locked and installed


def needs_of_torch() -> list[str]:
    """What PyTorch asks for on every platform: the libraries of a GPU come with its wheel."""
    needs = []
    for requirement in metadata.requires("torch") or []:
        name, _, marker = requirement.partition(";")
        if "extra" not in marker and "platform" not in marker:
            needs.append(name.strip())
    return needs


def wanted() -> str:
    """The open requirements of all sets, one a line, without PyTorch and comments."""
    lines = []
    for name in SETS:
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            if requirement and not requirement.startswith("torch>"):
                lines.append(requirement)
    return "\n".join(lines + needs_of_torch()) + "\n"


def solve(python: str) -> str:
    """The lock's text. Raises ValueError with uv's message when there is no solution."""
    words = "uv pip compile - --universal --generate-hashes --no-header --no-annotate --quiet"
    done = subprocess.run(
        [sys.executable, "-m", *words.split(), "--python-version", python],
        input=wanted(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"uv found no lock: {done.stderr.strip()}")
    return HEADER + done.stdout


def locked_names(lock: str) -> list[str]:
    """The packages that a lock pins, each once."""
    return list(dict.fromkeys(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)))


def licence_of(name: str) -> str:
    """The licence that an installed package states, in a few words."""
    about = metadata.metadata(name)
    for field in ("License-Expression", "License"):
        stated = (about.get(field) or "").strip()
        if stated and "\n" not in stated and len(stated) < 60:
            return stated
    classes = about.get_all("Classifier") or []
    stated = [c.rpartition(" :: ")[2] for c in classes if c.startswith("License ::")]
    return ", ".join(stated) or "see its files"


def licence_table(lock: str) -> str:
    """Markdown: every locked package that is installed here, its version and licence; and PyTorch."""
    rows = []
    for name in ["torch", *locked_names(lock)]:
        try:
            rows.append((name, metadata.version(name).partition("+")[0], licence_of(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "", "only on other platforms"))
    return markdown_table("package | version | licence as it states it", "lll", rows)


def write_lock(options: LockOptions) -> None:
    """requirements/lock.txt, or licences.md beside it."""
    lock = ROOT / "requirements" / "lock.txt"
    if options.licences:
        title = "# Licences of what the tests run with\n\nWritten by `make lock`.\n\n"
        table = licence_table(lock.read_text())
        lock.with_name("licences.md").write_text(title + table + "\n")
        return

    lock.write_text(solve(options.python))
    print(f"requirements/lock.txt: {len(locked_names(lock.read_text()))} packages")


if __name__ == "__main__":
    command(write_lock)
