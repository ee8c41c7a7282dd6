"""The scripts as their users run them: subprocesses on tiny settings, one process against two, bad
folders, wrong options."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from claims import rates

TINY = ["--steps", "3", "--rows", "4", "--length", "256"]


def run(*words, ok=True, limit=170, **environment):
    """Run a script from the project's root; returns its output."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, text[-3000:]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: thirty good samples, and one of each fault."""
    root = tmp_path_factory.mktemp("mine")
    (root / "images").mkdir()
    rng, records = np.random.default_rng(0), []
    for i in range(30):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            root / "images" / f"{i}.jpg"
        )
        records.append(
            {
                "image": f"{i}.jpg",
                "conversations": [
                    {"from": "human", "value": f"<image>\nwhat is number {i}?"},
                    {"from": "gpt", "value": f"it is {i}"},
                ],
            }
        )
    whole = (root / "images" / "0.jpg").read_bytes()
    (root / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])

    def ask(image, question="<image>\nwhat?", answer="that"):
        return {
            "image": image,
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
        }

    records += [
        ask("cut.jpg"),
        ask("gone.jpg"),
        ask("0.jpg", "<image><image>\nwhat?"),
        ask("0.jpg", answer=" "),
    ]
    (root / "my.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return root


def test_a_folder_with_every_fault_trains_and_each_fault_is_named(folder, tmp_path):
    text = run(
        "pretrain.py",
        "multitask",
        "--data",
        folder / "my.jsonl",
        "--images",
        folder / "images",
        "--out",
        tmp_path / "out",
        *TINY,
    )
    for reason in ("unreadable image", "missing image", "wrong placeholder count", "empty answer"):
        assert reason in text
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3


def test_strict_makes_the_first_fault_fatal(folder, tmp_path):
    text = run(
        "pretrain.py",
        "multitask",
        "--data",
        folder / "my.jsonl",
        "--images",
        folder / "images",
        "--out",
        tmp_path,
        "--strict",
        "True",
        *TINY,
        ok=False,
    )
    assert "wrong placeholder count" in text or "empty answer" in text


@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    # (where there is one GPU, two processes cannot have one each)
    common = ["multitask", *TINY, "--optimizer", "adamw", "--lr", "1e-3", "--device", "cpu"]
    run("pretrain.py", *common, "--out", tmp_path / "one")
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "pretrain.py",
        *common,
        "--out",
        tmp_path / "two",
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    gap = max(float((one[k] - two[k]).abs().max()) for k in one)
    assert gap < 5e-5, gap
    losses = [
        [json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")]
        for name in ("one", "two")
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_unknown_option_or_stage_is_an_error():
    assert "--not-an-option" in run("pretrain.py", "basic", "--not-an-option", "1", ok=False)
    assert "sft9" in run("sft.py", "sft9", ok=False)


SCRIPTS = [
    "pretrain.py",
    "sft.py",
    "rl.py",
    "soup.py",
    "generate.py",
    "evaluate.py",
    "calibrate.py",
    "toy.py",
    "vlm.py",
    "tokenizer.py",
]
MODULES = [
    "data.show",
    "data.world",
    "tools.real",
    "tools.readme",
    "curation.album",
    "curation.balance",
    "curation.caption2qa",
    "curation.caption_statistics",
    "curation.captioner",
    "curation.recaption",
    "curation.report",
    "curation.side_by_side",
    "talk.chat",
    "talk.samples",
    "curation.evaluating",
    "bench.step",
    "bench.packing_rules",
    "bench.rows",
    "bench.decoding",
    "bench.rollouts",
    "claims.rates",
    "claims.algorithms",
    "claims.posttraining",
    "claims.alignment",
    "claims.calibration",
    "claims.data_quality",
    "kernels.bench",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[s] for s in SCRIPTS] + [["-m", m] for m in MODULES], ids=" ".join
)
def test_help_works_on_every_script(words):
    assert "usage" in run(*words, "--help").lower()


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A ladder of a few steps."""
    place = tmp_path_factory.mktemp("ladder")
    run("toy.py", "--out", place, "--effort", "0.01", "--samples", "4", limit=600)
    return place


@pytest.mark.slow
def test_the_whole_ladder_runs_and_writes_its_results(ladder):
    results = json.loads((ladder / "results.json").read_text())
    keys = {"name", "seconds", "metric", "before", "after", "chance", "lower_is_better", "samples"}
    for row in results["stages"]:
        assert keys <= row.keys()
    assert results["total_seconds"] > 0 and results["cores"] and results["versions"]["torch"]
    assert results["packing"]["filled"] > 0.97
    assert "<svg" in (ladder / "report.html").read_text()


TINY_TRAINING = "--seeds 1 --samples 2"
COMMANDS = [
    "-m data.world --out {tmp}/world.png",
    "generate.py --model {ladder}/final --image {tmp}/a.png --prompt what? --max-new 4 --think",
    "generate.py --model {ladder}/moe-branch --image {tmp}/a.png --prompt what? --max-new 4"
    " --show {tmp}/inside.html",
    "-m talk.samples --out {tmp}/pictures --model {ladder}/final",
    "calibrate.py --model {ladder}/moe-branch --out {tmp}/calibrated",
    "evaluate.py --model {ladder}/final --data {tmp}/my.jsonl --max-new 4",
    "-m data.show --data {tmp}/my.jsonl --show 1 --out {tmp}/show",
    "-m data.show --data {tmp}/my.jsonl --check --out {tmp}/show",
    "-m curation.balance example --out {tmp}/captions.jsonl",
    "-m curation.album draw --pictures 8 --out {tmp}/album",
    "-m curation.caption_statistics --data {tmp}/my.jsonl",
    "-m claims.algorithms --model {ladder}/long-cot --only learn --names grpo --kinds dense "
    f"{TINY_TRAINING} --effort 0.02 --out {{tmp}}/a",
    f"-m claims.posttraining --runs {{ladder}} --only curriculum {TINY_TRAINING} --effort 0.01 "
    "--out {tmp}/c",
    f"-m claims.posttraining --runs {{ladder}} --only soup {TINY_TRAINING} --effort 0.1 --out {{tmp}}/s",
    "-m claims.calibration --seeds 1 --steps 2 2 --held 2 --out {tmp}/c.html",
    "-m claims.data_quality --only balance quick --runs {ladder} --seeds 1 --samples 12 --effort 0.02 "
    "--out {tmp}/q",
    "-m claims.rates --problems quadratic --seeds 1 --out {tmp}/rates",
    "-m bench.packing_rules --example {tmp}/lengths.txt --samples 200",
    "-m bench.decoding --prompts 2 --samples 2 --longest 16 --max-new 4 --width 64 --layers 1 --repeats 1",
    "-m kernels.bench --interpret",
]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words.split(" --")[0])
def test_the_commands_of_the_pages_run_with_tiny_settings(ladder, tmp_path, words):
    Image.new("RGB", (32, 32), "white").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "white"}]
    row = {"image": "a.png", "conversations": turns}
    (tmp_path / "my.jsonl").write_text((json.dumps(row) + "\n") * 4)
    if "claims.rates" in words:
        for package in rates.PACKAGES:  # of requirements/bench.txt, which this suite does without
            pytest.importorskip(package)
    run(*words.format(ladder=ladder, tmp=tmp_path).split(), limit=600)
