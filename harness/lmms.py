"""lmms-eval asks a model of ours, or a server, and scores it: its own task, loop and metrics.

What it teaches: lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval) knows a task as a file and a model as a
class with `generate_until`. The task here is lmms_tasks/nanosail_world.yaml; the class, below, turns the
kit's messages into ours.

    pip install -r requirements/harness.txt              # what it needs beside core.txt, and how
    python -m harness.world_files                        # runs/outside/world.jsonl
    python -m harness.lmms --model runs/toy/final
    python -m harness.lmms --model final --endpoint http://127.0.0.1:8000/v1

Any other task of the kit's: `--task NAME` (its data come from a hub). Or the kit's own command and a
server, which needs nothing from here:

    python -m lmms_eval --model openai --model_args model=final,base_url=http://127.0.0.1:8000/v1,api_key=none
        --tasks nanosail_world --include_path harness/lmms_tasks --batch_size 1
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from harness.adapter import HarnessModel
from infra.cli import command
from infra.endpoint import api_key

TASKS = Path(__file__).parent / "lmms_tasks"


@dataclass
class LmmsOptions:
    """Score a model with lmms-eval's own code."""

    # a model's directory; with --endpoint: the name that the server knows it by
    model: Path = Path("runs/toy/final")
    endpoint: str = ""  # ask a server, as in http://127.0.0.1:8000/v1, through the kit's client
    key_name: str = "OPENAI_API_KEY"  # with --endpoint: the environment variable that holds the key
    task: str = "nanosail_world"  # of lmms_tasks/, or one of the kit's
    limit: int = 0  # 0: all rows
    max_new: int = 48  # tokens of an answer
    think: bool = False  # ask for a chain of thought; the kit sees the answer alone
    device: str = "cpu"  # cuda, npu, mps


class LmmsModel(lmms):
    """What lmms-eval's loop asks of a model that lies on this machine."""

    is_simple = False  # it takes messages, not a text with pictures beside it

    def __init__(self, model: HarnessModel):
        super().__init__()
        self.model = model

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each request: (context, messages of a row, how, row, task, split)."""
        questions = []
        for request in requests:
            _, messages_of_row, _, row, task, split = request.args
            messages = messages_of_row(self.task_dict[task][split][row])
            questions.append(parts_of_turn(messages))
        return self.model.answers(questions)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise ValueError("tasks of several rounds are not asked: one question, one answer")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise ValueError("tasks that compare likelihoods are not asked: answers are generated")


def parts_of_turn(messages: list[dict]) -> list:
    """The kit's messages as text and pictures, in order. Raises ValueError for what is not understood."""
    if len(messages) != 1:
        raise ValueError(f"a conversation of {len(messages)} messages; one question is understood")
    parts = []
    for item in messages[0]["content"]:
        if item["type"] not in ("text", "image"):
            raise ValueError(f"lmms-eval sends {item['type']}; text and images are understood")
        parts.append(item["text"] if item["type"] == "text" else item["url"])
    return parts


def score_with_lmms(options: LmmsOptions) -> None:
    print(f"lmms-eval, {options.task}")
    for name, score in lmms_scores(options).items():
        print(f"{name:14s}  {score:6.1%}")


def lmms_scores(options: LmmsOptions) -> dict[str, float]:
    """The kit's metrics by name, in [0, 1] where the task's are."""
    own = (TASKS / f"{options.task}.yaml").is_file()
    manager = TaskManager(include_path=str(TASKS), include_defaults=not own)
    model, arguments = model_and_arguments(options)
    found = simple_evaluate(
        model,
        arguments,
        tasks=[options.task],
        batch_size=1,
        limit=options.limit or None,
        task_manager=manager,
        bootstrap_iters=0,
    )
    scores = found["results"][options.task]
    kept = {}
    for name, value in scores.items():
        if isinstance(value, (int, float)) and "stderr" not in name:
            kept[name.partition(",")[0]] = float(value)
    return kept


def model_and_arguments(options: LmmsOptions) -> tuple[Any, str | None]:
    """The adapter above, or the name of the kit's own client and what it wants to know."""
    if not options.endpoint:
        harness = HarnessModel(options.model, options.max_new, options.think, options.device)
        return LmmsModel(harness), None
    key = api_key(options.key_name, "endpoint") or "none"
    arguments = f"model={options.model.as_posix()},base_url={options.endpoint},api_key={key}"
    return "openai", arguments


if __name__ == "__main__":
    command(score_with_lmms)
