"""What lmms-eval calls for each row of the drawn world: its picture, and what an answer is worth."""

from pathlib import Path

from PIL import Image

FOLDER = Path("runs/outside")  # where `python -m harness.world_files` wrote the rows


def pictures_of(doc: dict) -> list[Image.Image]:
    with Image.open(FOLDER / doc["image"]) as image:
        return [image.convert("RGB")]


def equal_texts(doc: dict, results: list[str]) -> dict[str, float]:
    """lmms-eval's exact match: equal texts, whatever their case."""
    from lmms_eval.api.metrics import exact_match_hf_evaluate

    found = exact_match_hf_evaluate(
        predictions=[results[0].strip()], references=[doc["answer"]], ignore_case=True
    )
    return {"exact_match": float(found["exact_match"])}
