"""What the campaign trains: a model of one layer, forty drawn samples on disk, and commands of seconds.

Every command is a real one (`pretrain.py basic --data ...`), with sizes that make a run a few seconds
long.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from data import world
from recipe import THINK
from tests.campaign.ledger import FOLDER
from tokenizer import Tokenizer, train_bpe
from vlm import PRESETS, SailVL

HOME = FOLDER / "small"


@dataclass(frozen=True)
class Job:
    """A command that the campaign interrupts. `aims`: what a kill can wait for, beside random moments."""

    name: str
    words: tuple[str, ...]
    aims: tuple[str, ...] = ("checkpoint", "update")
    ranks: int = 1


def prepare() -> Path:
    """Model and data, written once. Returns their folder."""
    if (HOME / "ready").is_file():
        return HOME
    HOME.mkdir(parents=True, exist_ok=True)
    write_model(HOME / "model")
    write_samples(HOME / "data")
    for path in (HOME, *HOME.rglob("*")):  # another user reads them, too
        path.chmod(0o755 if path.is_dir() else 0o644)
    (HOME / "ready").write_text("")
    return HOME


def write_model(folder: Path, seed: int = 0) -> None:
    """One layer of everything, with a tokenizer of its own."""
    tokenizer = Tokenizer(train_bpe(world.corpus(200), 300), "", THINK)
    toy = PRESETS["toy"]
    config = replace(
        toy,
        text=replace(toy.text, vocab_size=352, num_hidden_layers=1, hidden_size=64),
        vision=replace(toy.vision, num_hidden_layers=1, hidden_size=48),
        image_token_id=tokenizer.image,
    )
    SailVL(config).init_weights(seed).save_pretrained(folder)
    tokenizer.save(folder)


def write_samples(folder: Path, count: int = 40) -> None:
    """Questions about pictures with their answers, and among them what no file is free of."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    colors = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
    rows = []
    for n in range(count):
        color = rng.choice(list(colors))
        Image.new("RGB", (32, 32), colors[color]).save(folder / f"{n}.png")
        rows.append({"question": f"color {n % 7}?", "image": f"{n}.png", "answer": color})
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    rows[7] = {"question": "what?", "image": "gone.png", "answer": "red"}
    rows[13] = {"question": "what?", "image": "cut.png", "answer": "red"}
    lines = [json.dumps(row) for row in rows]
    lines[21] = lines[21][:30]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")


COMMON = ("--model", str(HOME / "model"), "--data", str(HOME / "data" / "samples.jsonl"))
ROWS = ("--rows", "2", "--length", "128", "--lr", "3e-3", "--save-every", "3")
TRIALS = ("--adalrs", "--adalrs-k", "3", "--adalrs-window", "0", "0.9", "--adalrs-rule", "paper")
ROLLOUTS = ("--prompts", "4", "--group", "4", "--max-new", "24", "--reward", "random")

PRETRAIN = Job(
    "pre-training with AdaLRS",
    ("pretrain.py", "multitask", *COMMON, *ROWS, *TRIALS, "--steps", "30"),
    ("trial", "no trial", "checkpoint"),
)
SFT = Job("SFT", ("sft.py", "sft1", *COMMON, *ROWS, "--steps", "30"))
RL = Job(
    "RL",
    ("rl.py", "verifiable", *COMMON, *ROLLOUTS, "--steps", "16", "--save-every", "3"),
    ("rollout", "reward", "update", "checkpoint"),
)
WORKERS = replace(SFT, name="SFT with --workers 2", words=(*SFT.words, "--workers", "2"))
TWO = replace(PRETRAIN, name="pre-training with AdaLRS on two ranks", ranks=2)
TWO_RL = replace(RL, name="RL on two ranks", ranks=2)
IMAGE = Job(
    "the image stage",
    ("pretrain.py", "image", *COMMON, "--rows", "2", "--length", "64", "--steps", "16")
    + ("--save-every", "3"),
)
JOBS = (PRETRAIN, SFT, RL, WORKERS, TWO, TWO_RL, IMAGE)
