"""README.md, "The released weights", as a reader would follow it: its own commands and lines, on
the tiny released checkpoint."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from PIL import Image

from llm import LLM
from tokenizer import Tokenizer
from vit import ViT
from vlm import SailVL

TINY = SHARED / "released" / "tiny"
pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="the released files are not here")


@pytest.fixture
def page(tmp_path):
    """The section, its directories and files replaced by small ones."""
    model = tmp_path / "SAIL-VL2-2B"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, model)
    Tokenizer({bytes([b]): b for b in range(256)}).save(model)
    (tmp_path / "photos").mkdir()
    rng, lines = np.random.default_rng(0), []
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{i}.jpg"
        )
        turns = [
            {"from": "human", "value": f"<image>\nWhat is number {i}?"},
            {"from": "gpt", "value": f"It is {i}."},
        ]
        lines.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}) + "\n")
    (tmp_path / "ten.jsonl").write_text("".join(lines))
    shutil.copy(tmp_path / "photos" / "0.jpg", tmp_path / "photo.jpg")
    whole = SailVL.from_pretrained(model)
    whole.vision_model.save_pretrained(tmp_path / "SAILViT-Huge")
    whole.language_model.save_pretrained(tmp_path / "Qwen3-1.7B")
    shutil.copy(model / "tokenizer.tiktoken", tmp_path / "Qwen3-1.7B")
    section = re.search(
        r"\n## The released weights\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    for name in (
        "SAIL-VL2-2B",
        "photo.jpg",
        "ten.jsonl",
        "photos",
        "runs",
        "SAILViT-Huge",
        "Qwen3-1.7B",
    ):
        section = re.sub(rf"(?<=[ \"]){re.escape(name)}(?=[ /\"\n])", str(tmp_path / name), section)
    return section.replace("--device cuda --dtype bfloat16", "--dtype bfloat16")


@pytest.mark.slow
def test_every_command_and_line_of_the_page_runs_and_other_tools_read_the_result(page, tmp_path):
    shell, python, parts = re.findall(r"```(?:python)?\n(.*?)```", page, re.DOTALL)
    printed = []
    for command in (shell + parts).replace("\\\n", " ").strip().splitlines():
        assert command.startswith("python "), command
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "runs" / "mine" / "log.jsonl")]
    assert len(losses) == 20 and losses[-1] < losses[0] and printed[0] != printed[2]
    names = {}
    exec(python, names)
    ids = torch.tensor([names["tokenizer"].encode("What is in the picture?")])
    with torch.no_grad():
        torch.testing.assert_close(names["llm"](ids).logits, names["model"](ids), rtol=0, atol=1e-5)
    start = SailVL.from_pretrained(tmp_path / "runs" / "start", torch.bfloat16)
    for part, kind, name in (
        (start.vision_model, ViT, "SAILViT-Huge"),
        (start.language_model, LLM, "Qwen3-1.7B"),
    ):
        whole = dict(kind.from_pretrained(tmp_path / name, torch.bfloat16).named_parameters())
        assert all(torch.equal(p, whole[n]) for n, p in part.named_parameters())
