"""The table of contents: `python -m curation`, and `python -m curation NAME ...` for one of them.

What it teaches: the paper's data half in the order in which data goes through it. Every entry is a
command from files to files, runs by itself (`python -m curation.NAME`), and its module says what the
paper publishes of it and what is ours.
"""

import importlib
import sys
from typing import NamedTuple


class Entry(NamedTuple):
    """A command: its name, where its function stands, what it makes of what."""

    name: str
    place: str
    line: str


# Chapter -> its commands, in the order of SAIL-VL2's Figure 3.
CONTENTS: dict[str, tuple[Entry, ...]] = {
    "How often what is seen": (
        Entry("balance", "curation.balance:balance", "weights of data sets; texts that repeat go"),
    ),
    "Chains and questions for RL": (
        Entry(
            "difficulty",
            "curation.difficulty:measure_difficulty",
            "pass@k of a model: what RL can learn from, and a hard set",
        ),
        Entry(
            "free-response",
            "curation.free_response:convert_choices",
            "multiple choice becomes free response",
        ),
        Entry("chains", "curation.chains:harvest_chains", "a model's own right chains"),
    ),
}


def contents() -> str:
    """The table as text."""
    entries = [entry for chapter in CONTENTS.values() for entry in chapter]
    widest = max(len(entry.name) for entry in entries)
    lines = ["python -m curation NAME --help", ""]
    for chapter, commands in CONTENTS.items():
        lines.append(chapter)
        lines += [f"    {entry.name:{widest}s}  {entry.line}" for entry in commands]
    return "\n".join(lines)


def run(words: list[str]) -> None:
    """The first word names a command, the others are its options."""
    if not words or words[0] in ("-h", "--help"):
        print(contents())
        return

    # Looked up only now: a table of contents should not load PyTorch
    known = {entry.name: entry for chapter in CONTENTS.values() for entry in chapter}
    name, *options = words
    if name not in known:
        sys.exit(f"error: no command {name!r}\n\n{contents()}")
    module, function = known[name].place.split(":")
    sys.argv[0] = f"python -m curation {name}"
    from infra.cli import command

    command(getattr(importlib.import_module(module), function), options)


if __name__ == "__main__":
    run(sys.argv[1:])
