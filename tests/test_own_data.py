"""The whole ladder on own data: README's commands, in order, on 300 rows that a person would have."""

import json
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

COLORS = {"red": (220, 40, 40), "blue": (50, 80, 220)}
STEPS = {"language": 20, "multitask": 20, "long-cot": 60, "fusion": 10}  # the others: 3
SMALL = "--rows 2 --length 256"
RL = "--steps 2 --prompts 6 --group 4 --updates 2 --max-new 24 --overlong 4"


def picture(place, i: int) -> str:
    """A coloured square on noise; its name."""
    rng = np.random.default_rng(i)
    pixels = rng.integers(200, 255, (32, 32, 3), dtype=np.uint8)
    pixels[8:24, 8:24] = list(COLORS.values())[i % 2]
    Image.fromarray(pixels).save(place / f"{i}.png")
    return f"{i}.png"


@pytest.fixture
def home(tmp_path):
    """my.jsonl (LLaVA, <think> chains in a tenth, two bad pictures), rl.jsonl (verl), bench.tsv (MCQ)."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for i in range(200):
        color = list(COLORS)[i % 2]
        answer = color
        if i % 10 == 0:
            answer = f"<think>the square is {color}.</think>\\boxed{{{color}}}"
        turns = [
            {"from": "human", "value": "<image>\nwhat color is it?"},
            {"from": "gpt", "value": answer},
        ]
        rows.append({"image": picture(photos, i), "conversations": turns})
    (photos / "7.png").write_bytes((photos / "7.png").read_bytes()[:60])
    (photos / "8.png").unlink()
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    questions = []
    for i in range(80):
        prompt = [{"role": "user", "content": "<image>\nwhat color is it?"}]
        truth = {"ground_truth": list(COLORS)[i % 2]}
        row = {"prompt": prompt, "reward_model": truth, "images": [f"{i + 10}.png"]}
        questions.append(row)
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    lines = ["index\tquestion\tA\tB\tanswer"]
    lines += [f"{i}\tis {i} even?\tyes\tno\t{'AB'[i % 2]}" for i in range(20)]
    (tmp_path / "bench.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def commands() -> list[list[str]]:
    """The block of README's "Your own data" that walks the ladder."""
    section = (ROOT / "README.md").read_text().split("### Your own data")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    return [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]


def run(words: list[str], monkeypatch) -> None:
    """`python SCRIPT ...` or `python -m MODULE ...` in this process."""
    assert words[0] == "python"
    module = words[1] == "-m"
    name = words[2] if module else words[1]
    monkeypatch.setattr(sys, "argv", [name, *words[3 if module else 2 :]])
    try:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as left:
        assert not left.code, f"{' '.join(words)}: exit status {left.code}"


@pytest.mark.slow
def test_the_whole_ladder_runs_on_own_data_by_the_readmes_commands(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    scored = []
    for words in commands():
        script = words[2] if words[1] == "-m" else words[1]
        if script in ("pretrain.py", "sft.py"):
            words += ["--steps", str(STEPS.get(words[2], 3)), *SMALL.split()]
        elif script == "rl.py":
            words += RL.split()
        elif script == "evaluate.py":
            words += ["--max-new", "8"]
        elif script == "curation.chains":
            words += ["--max-new", "24", "--tries", "8"]
        run(words, monkeypatch)

        said = capsys.readouterr().out
        if script == "evaluate.py":
            scored.append(said)
        elif "--out" in words and script != "curation.chains":
            out = home / words[words.index("--out") + 1]
            assert (out / "model.safetensors").is_file(), words
        if script in ("pretrain.py", "sft.py") and "skipped" in said and words[2] != "language":
            assert "image" in said  # the two bad pictures are named

    assert len(scored) == 2 and all("overall" in said for said in scored)
    harvest = (home / "own" / "chains.jsonl").read_text().splitlines()
    assert harvest and all("\\boxed" in row for row in harvest)
