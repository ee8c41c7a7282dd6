"""What is asked of an annotator, and what comes back: requests, prompts, responses.

What it teaches: a pipeline knows what it wants to ask, and nothing of who answers. So a question is a
value (which prompt, which words of the sample, which pictures), its wording stands in a file that a user
can read and change, and an answer that is none says why.

    Request(task="ita", fields={"caption": ...}, pictures=(...)) + prompts/ita.txt -> words
    somebody's text, or a fault -> Response -> `json_in`, for tasks that ask for JSON

Simplified: a prompt is one text; a server's system prompt is not used.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Mapping, Protocol, Sequence

from data.container_base import finite, refuse_number
from data.sample import Sample

PROMPTS = Path(__file__).parent / "prompts"
NO_REPLY = "no reply"  # how a fault begins that may not come again: the next run asks once more
DEEPEST = 50  # brackets inside one another in a reply: more is hostile


@dataclass(frozen=True)
class Request:
    """A question about one sample.

    task: what is asked, the name of its prompt file. fields: the sample's own words for the prompt.
    pictures: PIL images, paths, bytes or Videos, in order, as `Message.parts` has them. about: the sample,
    for its root and origin, and for an oracle, which reads its facts; no model is shown them.
    """

    task: str
    fields: Mapping[str, str] = field(default_factory=dict)
    pictures: tuple = ()
    about: Sample | None = None


@dataclass(frozen=True)
class Response:
    """What was answered. text: None when nobody answered, and then `fault` says why."""

    text: str | None
    fault: str = ""

    @property
    def lost(self) -> bool:
        """Whether asking another time may bring an answer. A sample that needs it is dropped with its
        `fault` as it stands, for the next run to try again (`Passed.unanswered`)."""
        return self.text is None and self.fault.startswith(NO_REPLY)


def why_unanswered(response: Response) -> str:
    """Why a sample goes that has no answer; the next run asks again where that may help."""
    return response.fault if response.lost else f"no answer: {response.fault}"


class Annotator(Protocol):
    """name: what a file of annotations says about who made them."""

    name: str

    def annotate(self, requests: Sequence[Request]) -> list[Response]:
        """One response for each request, in their order. Never raises for what a model or server said."""

    def report(self) -> str:
        """One line for the end of a run: how much was asked, and what it cost."""


# ---------------------------------------------------------------------------------------- prompts


class Prompts:
    """The prompt files, those of `folder` first."""

    def __init__(self, folder: Path | None = None):
        self.folders = [folder, PROMPTS] if folder else [PROMPTS]
        self.templates: dict[str, Template] = {}

    def text(self, request: Request) -> str:
        """The words of a request. Raises ValueError for a task without a prompt, and a `$name`
        that the request has no field for."""
        template = self.template(request.task)
        try:
            return template.substitute(request.fields)
        except KeyError as error:
            raise ValueError(f"prompt {request.task}.txt: no field {error} is known here") from None
        except ValueError:
            raise ValueError(f"prompt {request.task}.txt: write $$ for a dollar sign") from None

    def template(self, task: str) -> Template:
        if task not in self.templates:
            found = [folder / f"{task}.txt" for folder in self.folders]
            present = [path for path in found if path.is_file()]
            if not present:
                raise ValueError(f"no prompt for {task!r}: {found[0]} is not there")
            self.templates[task] = Template(present[0].read_text(encoding="utf-8").strip())
        return self.templates[task]


# ---------------------------------------------------------------------------------- reading replies


def json_in(text: str) -> Any:
    """The first JSON object or array in a reply, whatever stands around it; None for none.

    Models wrap it in fences and friendly words. Brackets nested deeper than any answer has are
    refused before they are parsed; NaN and infinities are no JSON.
    """
    decoder = json.JSONDecoder(parse_constant=refuse_number, parse_float=finite)
    for at, character in enumerate(text):
        if character not in "[{":
            continue
        opened = text.count("[", at) + text.count("{", at)
        if opened > DEEPEST * DEEPEST:
            return None
        try:
            found, _ = decoder.raw_decode(text, at)
            return found
        except (ValueError, RecursionError):
            continue
    return None


def generator_of(seed: int, index: int, step: str) -> random.Random:
    """Random numbers of one sample in one step: the same whoever works on it, and when."""
    return random.Random(f"{seed}/{index}/{step}")
