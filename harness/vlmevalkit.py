"""VLMEvalKit asks a model of ours, or a server, and scores it: its own tables, loop and rules.

What it teaches: a harness calls few methods of a model. VLMEvalKit (arXiv 2407.11691, with which SAIL-VL2
section 6.1 evaluates) wants `generate`, and lets a model write its own prompts; then the loop over the
rows, the resuming and the scoring are the kit's.

    TSV -> the kit's dataset -> build_prompt -> generate -> predictions -> the kit's evaluate
                                     KitModel (here), or the kit's client of a server

    pip install -r requirements/harness.txt              # what it needs beside core.txt, and how
    python -m harness.world_files                        # runs/outside/world_GQA.tsv, world_MCQ.tsv
    python -m harness.vlmevalkit --model runs/toy/final --data runs/outside/world_GQA.tsv
    python -m harness.vlmevalkit --model final --endpoint http://127.0.0.1:8000/v1 --data ...

Options make a table multiple choice; without a judge, the kit compares letters and words exactly. Other
tables are compared as the kit does by the name of the file (harness/world_files.py).

The kit's client of servers sends JPEG, whatever the picture was, and enlarges small ones: the scores of
a picture of 32 pixels are not those of the same picture as it is. (VLMEVAL_MIN_IMAGE_EDGE=1, which this
command sets unless it is set, leaves small ones alone.) A registered benchmark, with that model:

    LMUData=DIR python -m vlmeval.run --data MMBench_DEV_EN --model final --base-url http://127.0.0.1:8000/v1
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from PIL import Image

from harness.adapter import HarnessModel, question_text
from infra.cli import command
from infra.endpoint import api_key


@dataclass
class KitOptions:
    """Score a model with VLMEvalKit's own code on a table in its form."""

    data: Path
    # a model's directory; with --endpoint: the name that the server knows it by
    model: Path = Path("runs/toy/final")
    endpoint: str = ""  # ask a server, as in http://127.0.0.1:8000/v1, through the kit's client
    key_name: str = "OPENAI_API_KEY"  # with --endpoint: the environment variable that holds the key
    out: Path = Path("runs/outside/vlmevalkit")  # predictions and scores
    max_new: int = 48  # tokens of an answer
    think: bool = False  # ask for a chain of thought; the kit sees the answer alone
    device: str = "cpu"  # cuda, npu, mps


class KitModel:
    """What VLMEvalKit's loop asks of a model that lies on this machine."""

    is_api = False

    def __init__(self, model: HarnessModel):
        self.model = model
        self.dump_image: Callable = lambda line: []

    def set_dump_image(self, dump_image: Callable) -> None:
        """The kit's function from a row to the files of its pictures."""
        self.dump_image = dump_image

    def use_custom_prompt(self, dataset: str) -> bool:
        """A question is laid out as evaluate.py lays it out, whichever table it is from."""
        return True

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """A row (a pandas Series) as the kit's message: pictures, then the words."""
        message = [{"type": "image", "value": path} for path in self.dump_image(line)]
        return [*message, {"type": "text", "value": question_text(dict(line))}]

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        (answer,) = self.model.answers([parts_of_message(message)])
        return answer


def parts_of_message(message: list[dict[str, str]]) -> list:
    """The kit's message as text and pictures, in order. Raises ValueError for another kind of part."""
    parts = []
    for item in message:
        if item["type"] == "text":
            parts.append(item["value"])
        elif item["type"] == "image":
            with Image.open(item["value"]) as image:
                parts.append(image.convert("RGB"))
        else:
            raise ValueError(f"VLMEvalKit sends {item['type']}; text and images are understood")
    return parts


def score_with_kit(options: KitOptions) -> None:
    if options.data.suffix != ".tsv" or not options.data.is_file():
        raise ValueError(f"--data {options.data}: no table (.tsv) there")
    scores = kit_scores(options)
    print(f"VLMEvalKit, {options.data.name}: share that is right")
    for name, score in scores.items():
        print(f"{name:14s}  {score:6.1%}")


def kit_scores(options: KitOptions) -> dict[str, float]:
    """Overall, and by category: shares in [0, 1], as the kit has them."""
    os.environ["LMUData"] = str(options.data.parent.resolve())
    os.environ.setdefault("VLMEVAL_MIN_IMAGE_EDGE", "1")
    os.environ.setdefault("PRED_FORMAT", "tsv")
    try:
        from vlmeval.dataset import ImageVQADataset, build_dataset
        from vlmeval.inference import infer_data_job
        from vlmeval.smp import get_pred_file_path
    except ModuleNotFoundError as error:
        wanted = "see requirements/harness.txt"
        raise ValueError(
            f"{error.name} is not installed, which VLMEvalKit needs: {wanted}"
        ) from error

    # ask: the kit's class for tables of one's own, and its loop
    name = options.data.stem
    dataset = build_dataset(name)
    options.out.mkdir(parents=True, exist_ok=True)
    model_name = options.model.name
    infer_data_job(kit_model(options), str(options.out), model_name, dataset)

    # score: its rules for multiple choice, or for short answers
    predictions = get_pred_file_path(str(options.out), model_name, name, use_env_format=True)
    multiple_choice = dataset.TYPE == "MCQ"
    scorer = dataset if multiple_choice else ImageVQADataset(name)
    table = scorer.evaluate(predictions, model="exact_matching")
    percent = 1 if multiple_choice else 100
    shares = {
        column: float(table[column].iloc[0]) / percent for column in table if column != "split"
    }
    return shares


def kit_model(options: KitOptions) -> Any:
    """The adapter above, or the kit's own client."""
    if not options.endpoint:
        return KitModel(HarnessModel(options.model, options.max_new, options.think, options.device))
    from vlmeval.api import LMDeployAPI

    return LMDeployAPI(
        model=options.model.as_posix(),
        api_base=f"{options.endpoint.rstrip('/')}/chat/completions",
        key=api_key(options.key_name, "endpoint") or "none",
        max_tokens=options.max_new,
        temperature=0,
        retry=3,
        verbose=False,
    )


if __name__ == "__main__":
    command(score_with_kit)
