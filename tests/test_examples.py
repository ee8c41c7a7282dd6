"""Every example on the pages is run by a test, or says why it is not.

What it protects: a page's command that nobody runs is wrong one day. test_readme.py asks every script whether
it understands its options; here the commands run as they stand, in a folder that looks like the project, with
words behind them that make them small. A command without a rule fails, and so does a rule without a command.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_readme import commands
from test_scripts import TINY_TRAINING, ladder  # noqa: F401 (a fixture: a ladder of a few steps)

from claims.rates import PACKAGES

SMALL = "--steps 2 --rows 4 --length 256"
ASKED = "--max-new 4"

# (what a command begins with, the words behind it that make it small)
RUN = (
    (r"python -m data\.world", ""),
    (r"python generate\.py --model runs/toy/final", ASKED),
    (r"python -m talk\.samples", ""),
    (r"python -m harness\.world_files", "--samples 2"),
    (r"python evaluate\.py --data runs/outside/world_GQA\.tsv --model", ASKED),
    (r"torchrun --standalone --nproc-per-node 2 pretrain\.py", SMALL),
    (r"python -m data\.show", "--out shown"),
    (r"python -m scale\.plan", ""),
    (r"python pretrain\.py basic --out runs/mine", SMALL),
    (r"python -m claims\.rates", "--problems quadratic --seeds 1"),
    (r"python -m bench\.step", "--steps 3 --vocabulary 512"),
    (r"python -m claims\.calibration", "--seeds 1 --steps 2 2 --held 2"),
    (
        r"python rl\.py verifiable --model runs/toy/long-cot",
        "--steps 1 --prompts 4 --group 2 --updates 1 --max-new 8 --overlong 2",
    ),
    (
        r"python -m claims\.algorithms",
        f"--only learn --names grpo --kinds dense {TINY_TRAINING} --effort 0.02",
    ),
    (r"python -m claims\.posttraining --only curriculum", f"{TINY_TRAINING} --effort 0.01"),
    (r"python -m curation album draw", "--pictures 8"),
    (r"python -m curation charts", "--count 4 --questions 2 --sheet sheet.png"),
    (r"python -m curation chart-check", ""),
)

# what a command begins with -> the beginning of the one whose output it reads; another process of the
# suite may have run that
READS = {
    "python evaluate.py --data runs/outside/world_GQA.tsv": "python -m harness.world_files",
    "python -m curation chart-check": "python -m curation charts",
}

# (what a command begins with, why it is not run here)
NOT_RUN = (
    (r"make ", "a target is a command of this page or of another, and takes minutes"),
    (
        r"python (\w+\.py|-m curation\.chains) .* own/",
        "tests/test_own_data.py runs the whole block",
    ),
    (r"python generate\.py --model (SAIL|runs/mine)", "tests/test_page.py, on small weights"),
    (r"python sft\.py sft1 --model SAIL-VL2-2B", "tests/test_page.py, on small weights"),
    (r"(python|torchrun) .*(pretrain|sft)\.py paper:", "wants GPUs and the released weights"),
    (r"python -m kernels\.bench", "wants a GPU or minutes; test_scripts.py has --interpret"),
    (r"python -m bench\.rollouts", "wants requirements/trl.txt"),
    (r"python -m claims\.alignment", "minutes: trains from scratch; tests/test_align.py"),
    (
        r"python -m claims\.posttraining --only (modes|experts)",
        "minutes; the same loop as `curriculum`",
    ),
    (
        r"python -m claims\.(judges|curation_sets|titles)",
        "minutes; test_judges.py, test_curation_sets.py",
    ),
    (
        r"python -m curation recaption --data photos",
        "wants a server; tests/test_captions.py has one",
    ),
    (r"python -m tools\.clipart", "fetches a package"),
    (
        r"python -m curation (recaption --data runs/curation/album|album grade)",
        "an untrained captioner keeps nothing; tests/test_captions.py",
    ),
    (r"python -m harness\.(vlmevalkit|lmms)", "wants the kits; tests/test_outside.py"),
    (r"python serve\.py", "does not end; tests/test_serve.py"),
    (r"python evaluate\.py .*--endpoint", "wants a server; tests/test_outside.py has one"),
)


def rules_of(line: str) -> list[str]:
    """The patterns that a command meets."""
    return [pattern for pattern, _ in (*RUN, *NOT_RUN) if re.match(pattern, line)]


def test_every_command_of_the_pages_has_one_rule_and_every_rule_a_command():
    met = {line: rules_of(line) for line in commands()}
    assert {line: rules for line, rules in met.items() if len(rules) != 1} == {}
    used = {rules[0] for rules in met.values()}
    assert used == {pattern for pattern, _ in (*RUN, *NOT_RUN)}


@pytest.fixture(scope="module")
def folder(ladder, tmp_path_factory) -> Path:  # noqa: F811
    """The project by links, with runs of its own, and a user's pictures."""
    place = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.name not in ("runs", "own") and not path.name.startswith("."):
            (place / path.name).symlink_to(path)
    (place / "runs").mkdir()
    (place / "runs" / "toy").symlink_to(ladder)

    # three rows that a person would have
    (place / "photos").mkdir()
    lines = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "photos" / f"{i}.jpg")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
        lines.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}) + "\n")
    (place / "my.jsonl").write_text("".join(lines))
    return place


def small_commands() -> list[str]:
    """In the order of the pages: some read what others wrote."""
    found = []
    for line in commands():
        for pattern, words in RUN:
            if re.match(pattern, line):
                found.append(f"{line} {words}".strip())
    return found


def run_line(folder: Path, line: str) -> None:
    """A command of the pages, as it stands there."""
    words = shlex.split(line)
    launcher = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
    done = subprocess.run(
        [sys.executable, *launcher, *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("line", small_commands())
def test_an_example_runs(folder, line):
    if "claims.rates" in line:
        for package in PACKAGES:  # of requirements/bench.txt, which this suite does without
            pytest.importorskip(package)
    for reader, writer in READS.items():
        if line.startswith(reader):
            run_line(folder, next(other for other in small_commands() if other.startswith(writer)))
    run_line(folder, line)
