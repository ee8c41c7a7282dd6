"""Held-out scenes of the drawn world as files: what VLMEvalKit and lmms-eval read, and evaluate.py too.

What it teaches: a benchmark is a table. A row has a picture, a question and its answer; whatever else a
harness wants to know is one more column.

    python -m harness.world_files --out runs/outside --samples 15     # of each family

    world_GQA.tsv   index, image (base64), question, answer, category          VLMEvalKit
    world_MCQ.tsv   the same with options A to D, the answer a letter          VLMEvalKit
    world.jsonl     id, image (a path), question, answer, category             lmms-eval
    images/         the pictures of world.jsonl

All three hold the same scenes. Their families are those whose answers are compared as texts: a caption
or a box is graded by rules that are ours alone, a video has several pictures, a description none.

VLMEvalKit chooses how it compares by the name of the file: GQA in it means equal texts, whatever their
case. Our choice: the three wrong options are right answers to the same question about other scenes, and
where there are too few, to other questions of the family.
"""

import base64
import csv
import io
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.sample import Sample
from data.world import GRADED, TABLE, World
from infra.cli import command

TEXT_FAMILIES = tuple(
    name for name in GRADED if TABLE[name].grader == "auto" and name not in ("video", "text")
)
LETTERS = "ABCD"


@dataclass
class WorldFileOptions:
    """Write held-out scenes as tables for other harnesses."""

    out: Path = Path("runs/outside")
    samples: int = 15  # of each family
    seed: int = 1  # that of evaluation during `make toy`
    data: str = "world"  # what the files are called


@dataclass(frozen=True)
class WorldRow:
    """One question about one picture. options: letter -> text, where there are any."""

    image: Image.Image
    question: str
    answer: str
    family: str


def write_world(options: WorldFileOptions) -> None:
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: at least 1 of each family")
    rows = rows_of_the_world(options.samples, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    # one table as it is, one with options
    exact = [table_row(number, row) for number, row in enumerate(rows)]
    chosen = []
    for number, (row, letters) in enumerate(zip(rows, options_of_rows(rows, options.seed))):
        right = next(letter for letter, text in letters.items() if text == row.answer)
        chosen.append(table_row(number, row) | letters | {"answer": right})
    write_table(options.out / f"{options.data}_GQA.tsv", exact)
    write_table(options.out / f"{options.data}_MCQ.tsv", chosen)

    # the same as lines, pictures beside them
    write_json_lines(options.out / f"{options.data}.jsonl", rows)
    print(
        f"{len(rows)} questions of {len(TEXT_FAMILIES)} families in {options.out}: "
        f"{options.data}_GQA.tsv, {options.data}_MCQ.tsv, {options.data}.jsonl"
    )


def rows_of_the_world(samples: int, seed: int) -> list[WorldRow]:
    """So many of each family, those that `make toy` is graded by."""
    rows = []
    for family in TEXT_FAMILIES:
        rows += [world_row(sample) for sample in World().held_out(family, samples, seed)]
    return rows


def world_row(sample: Sample) -> WorldRow:
    image, question = sample.messages[0].parts
    return WorldRow(image, question.strip(), sample.facts["answer"], sample.facts["family"])


def options_of_rows(rows: list[WorldRow], seed: int) -> list[dict[str, str]]:
    """For each row its options by letter, the right answer among them."""
    by_question = defaultdict(set)
    by_family = defaultdict(set)
    for row in rows:
        by_question[row.question].add(row.answer)
        by_family[row.family].add(row.answer)

    found = []
    for number, row in enumerate(rows):
        rng = random.Random(f"{seed}/{number}/options")
        near = sorted(by_question[row.question] - {row.answer})
        far = sorted(by_family[row.family] - {row.answer} - set(near))
        wrong = [*rng.sample(near, len(near)), *rng.sample(far, len(far))][: len(LETTERS) - 1]
        texts = rng.sample([row.answer, *wrong], len(wrong) + 1)
        found.append(dict(zip(LETTERS, texts)))
    return found


def table_row(number: int, row: WorldRow) -> dict[str, str]:
    return {
        "index": str(number),
        "image": base64.b64encode(png_file(row.image)).decode(),
        "question": row.question,
        "answer": row.answer,
        "category": row.family,
    }


def png_file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """Tab-separated, as VLMEvalKit reads it; an option that a row lacks is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_json_lines(path: Path, rows: list[WorldRow]) -> None:
    """JSON lines, and the pictures in images/ beside them."""
    folder = path.parent / "images"
    folder.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            picture = folder / f"{path.stem}-{number}.png"
            picture.write_bytes(png_file(row.image))
            record = {
                "id": number,
                "image": picture.relative_to(path.parent).as_posix(),
                "question": row.question,
                "answer": row.answer,
                "category": row.family,
            }
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    command(write_world)
