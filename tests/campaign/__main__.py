"""The campaign as one command: `make faults`, or parts of it.

    python -m tests.campaign                                  everything: 68 minutes on two busy cores
    python -m tests.campaign --only kills --count 20          a part, with fewer cases
    python -m tests.campaign --only fuzz --targets tar tsv --count 2000
    python -m tests.campaign --only hostile                   requests to the server; `--only mutants`
    python -m tests.campaign --page                           write the page of what is known, run nothing
    python -m tests.campaign --page --any-code                each case on the code that it ran on last, named

Finished cases are remembered in runs/faults/*.jsonl for the code that they ran on, so that a campaign
which was interrupted goes on. Two lanes run beside each other: the soak, then hostile input; and
everything else.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from tests.campaign import mutants
from tests.campaign.ledger import FOLDER, ROOT, Ledger, Row, commit

PAGE = Path(__file__).parent / "README.md"
LANES = (("soak", "fuzz"), ("kills", "disks", "damage", "ranks", "determinism"))
ALONE = ("hostile", "mutants")  # each by a command of its own
PARTS = ("kills", "disks", "damage", "ranks", "fuzz", "determinism", "soak", "hostile", "mutants")
TITLES = {
    "kills": "Kills and stops",
    "disks": "Disks",
    "damage": "Checkpoints",
    "ranks": "Ranks",
    "fuzz": "Hostile input",
    "determinism": "Determinism",
    "soak": "Soak",
    "hostile": "Hostile requests",
    "mutants": "Mutants",
}


@dataclass
class CampaignOptions:
    """Kills, faults and hostile input, and what became of them."""

    only: tuple[
        str, ...
    ] = ()  # parts: kills disks damage ranks fuzz determinism soak hostile mutants
    count: int = 0  # cases of each part (of each target or file); 0: as many as the campaign has
    targets: tuple[str, ...] = ()  # of fuzz; none: all
    seconds: float = 1200.0  # of the soak; half as many of hostile requests
    page: bool = False  # only write the page
    any_code: bool = False  # on it, also cases of other commits, which it names


def run_part(part: str, options: CampaignOptions) -> None:
    """One part in this process."""
    from tests.campaign import (
        damage,
        determinism,
        disks,
        fuzz,
        hostile,
        kills,
        life,
        ranks,
        small,
        soak,
    )

    numbers = {"count": options.count} if options.count else {}
    if part == "fuzz":
        fuzz.run(**numbers, targets=options.targets or tuple(fuzz.TARGETS))
    elif part == "soak":
        soak.run(options.seconds)
    elif part == "hostile":
        hostile.run(options.seconds / 2)
    elif part == "mutants":
        mutants.run(mutants.MutantOptions(**numbers))
    else:
        folder = life.fresh(FOLDER / "work" / f"warm-{part}")
        small.prepare()
        life.warm([*small.PRETRAIN.words, "--out", str(folder / "run")], folder)
        module = {
            "kills": kills,
            "disks": disks,
            "damage": damage,
            "ranks": ranks,
            "determinism": determinism,
        }[part]
        module.run(**numbers)


def run_lanes(options: CampaignOptions) -> bool:
    """Each lane's parts one after the other; whether all were run to their end."""
    import tests.campaign.small as small

    small.prepare()
    lanes = []
    for parts in LANES:
        words = [sys.executable, "-m", "tests.campaign", "--only", *parts]
        words += ["--count", str(options.count), "--seconds", str(options.seconds)]
        words += ["--targets", *options.targets] if options.targets else []
        lanes.append(subprocess.Popen(words, cwd=ROOT))
    try:
        statuses = [lane.wait() for lane in lanes]
    except KeyboardInterrupt:
        for lane in lanes:
            lane.terminate()
        raise
    return not any(statuses)


def rows_of(part: str) -> list[Row]:
    """What the ledger knows of a part, on today's code."""
    from tests.campaign import damage, determinism, disks, fuzz, hostile, kills, ranks, soak

    modules = (kills, disks, damage, ranks, fuzz, determinism, soak, hostile, mutants)
    return dict(zip(PARTS, modules))[part].rows()


def table_of(parts: tuple[str, ...]) -> tuple[str, bool]:
    """Markdown: fault, tried, expected, seen; and whether everything held."""
    lines = []
    held = True
    for part in parts:
        found = rows_of(part)
        if not found:
            held = held and part in ALONE
            lines += ["", f"## {TITLES[part]}", "", "Not run on this code."]
            continue
        lines += [
            "",
            f"## {TITLES[part]}",
            "",
            "| fault | tried | expected | seen |",
            "|---|---:|---|---|",
        ]
        for row in found:
            seen = row.seen.replace("|", "\\|")
            mark = "" if row.held else "**FAILED** "
            lines.append(f"| {row.fault} | {row.tried:,} | {row.expected} | {mark}{seen} |")
            held = held and row.held
    return "\n".join(lines) + "\n", held


def commits_met() -> str:
    """How many cases ran on which commit, those of mutants apart: they belong to their file's code."""
    met: Counter = Counter()
    for part in PARTS:
        if part != "mutants":
            met.update(row["commit"] for row in Ledger(part).done.values())
    return ", ".join(f"{name} ({number:,})" for name, number in met.most_common())


def write_page() -> bool:
    """tests/campaign/README.md, from the ledger."""
    from tests.campaign import kills

    table, held = table_of(PARTS)
    met = ", ".join(f"{n} in {phase}" for phase, n in sorted(kills.moments_met().items()))
    met = met.replace(" in real", " of real processes, whose moment nobody sees")
    date = time.strftime("%Y-%m-%d")
    command = "python -m tests.campaign --page --any-code" if Ledger.ANY_CODE else "make faults"
    head = [
        "# The campaign of faults",
        "",
        f"Written by `{command}` on {date}, commit {commit()}, {os.cpu_count()} cores. Parts, alone and "
        "smaller: `python -m tests.campaign --only kills --count 20`.",
        "",
        f"Moments of the kills: {met}." if met else "",
    ]
    if Ledger.ANY_CODE:
        head += ["", f"Each case as it was seen last; they ran on {commits_met()}."]
    PAGE.write_text("\n".join(head) + "\n" + table)
    return held


def main(options: CampaignOptions) -> int:
    unknown = set(options.only) - set(PARTS)
    if unknown:
        print(f"error: --only {min(unknown)}: choose from {', '.join(PARTS)}", file=sys.stderr)
        return 1
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.any_code and not options.page:
        print("error: --any-code is for --page: what runs counts for today's code", file=sys.stderr)
        return 1
    if options.page:
        Ledger.ANY_CODE = options.any_code
        return 0 if write_page() else 1
    began = time.monotonic()
    if options.only:
        if set(options.only) != {"mutants"}:
            import torch

            torch.set_num_threads(1)
        for part in options.only:
            run_part(part, options)
        table, held = table_of(options.only)
    else:
        whole = run_lanes(options)
        held = write_page() and whole
        table, _ = table_of(PARTS)
    print(table)
    print(
        f"{(time.monotonic() - began) / 60:.0f} minutes; {'everything held' if held else 'SOMETHING FAILED'}"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(CampaignOptions)))
