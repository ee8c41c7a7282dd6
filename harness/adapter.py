"""A model of ours as a harness sees it: content parts in, text out. Both adapters are this and a page.

What it teaches: a harness and a model must agree on one thing only, how a question is laid out; whoever
gets that wrong by a line end measures another model. So the layout here is the one of evaluate.py
(data/formats.py): pictures first, each question on the line behind them. Where texts and pictures take
turns, as frames of a video do, their order stays, and each picture ends its line, as in serve.py.

    [image, "where is the circle?"]  ->  Sample(user: image, "\\nwhere is the circle?")  ->  "circle east"
"""

from pathlib import Path
from typing import Sequence

from data.encode import Encoder
from data.formats import read_messages
from data.images import open_image
from data.sample import Message, Sample
from evaluate import ask
from generate import load_model
from graders import final_answer
from infra.device import pick_device


class HarnessModel:
    """A model from a directory that answers lists of content parts: text, and pictures (PIL, or a path).

    think: it is asked to think, and what a harness sees is its answer without the chain.
    """

    def __init__(
        self, directory: Path, max_new: int = 48, think: bool = False, device: str = "cpu"
    ):
        self.model, tokenizer = load_model(Path(directory), pick_device(device))
        self.encoder = Encoder(tokenizer, self.model.config)
        self.max_new = max_new
        self.think = think

    def answers(self, questions: Sequence[list]) -> list[str]:
        """A text for each question, in order. One that was cut off is empty, as it is worth nothing in
        evaluate.py. Raises BadSample for a picture that cannot be read."""
        samples = []
        for number, parts in enumerate(questions):
            if self.think:
                parts = [*parts[:-1], f"{parts[-1]} {self.encoder.tokenizer.think_prompt}"]
            samples.append(question_sample(parts, f"question {number}"))

        texts = []
        for answer in ask(self.model, self.encoder, samples, max_new=self.max_new):
            text = self.encoder.tokenizer.decode_answer(answer.ids)
            texts.append(final_answer(text) if answer.finished else "")
        return texts


def question_sample(parts: list, origin: str = "") -> Sample:
    """One question of text and pictures (PIL images, or paths) as evaluate.py would have read it."""
    pictures = [open_image(p, None, origin) for p in parts if is_a_picture(p)]
    texts = [part for part in parts if not is_a_picture(part)]
    if len(texts) < 2:
        asked = "".join(texts)
        laid_out = (*pictures, "\n" + asked) if pictures else (asked,)
        return Sample((Message("user", laid_out),), origin=origin)

    # texts and pictures take turns
    left = iter(pictures)
    lines: list = []
    for part in parts:
        if is_a_picture(part):
            lines += [next(left), "\n"]
        elif lines and isinstance(lines[-1], str):
            lines[-1] += part
        else:
            lines.append(part)
    return Sample((Message("user", tuple(lines)),), origin=origin)


def is_a_picture(part) -> bool:
    return not isinstance(part, str)


def question_text(row: dict) -> str:
    """The words of a table's row as evaluate.py asks them: hint, question, options, request.

    Cells that are no text (pandas has NaN for an empty one) are left out.
    """
    cells = {name: cell for name, cell in row.items() if isinstance(cell, str)}
    cells |= {"image": None, "answer": cells.get("answer", "-")}
    question, *_ = read_messages(cells)
    return "".join(part for part in question.parts if isinstance(part, str))
