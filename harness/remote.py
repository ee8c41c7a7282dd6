"""A model behind an address, as evaluate.py asks it: samples become OpenAI's messages, pictures data URLs.

What it teaches: a benchmark should not care where a model runs. So what is asked is written down once, as
a `Sample`; here it becomes the words of a protocol, and the reply is graded by the same rules as a local
answer.

    Sample -- prompt --> turns with places for pictures, arrays (H, W, 3)
                             |  messages_of
                             v
    {"role": "user", "content": [{"type": "image_url", ...}, {"type": "text", ...}]} --> endpoint --> text

A server puts each picture on a line of its own, as serve.py does; so the line end that follows a picture
here is left to it. Pictures travel as PNG, which loses nothing: what a server of ours then encodes is
what `Encoder.prompt` encodes, token by token, with these exceptions: a picture behind the only text of a
message moves before it, and two pictures without a text between them get a line end there.

`think`: the request to think belongs to the weights, and serve.py appends it when the parameter `think`
is true. Other servers do not know that parameter: with `think_prompt` those words are appended here.

Our choice: a seed is sent only where answers are sampled.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.encode import question_turns, with_numbered_frames, with_thinking
from data.images import open_image
from data.sample import Message, Sample
from infra.endpoint import ChatEndpoint, NoReply, in_threads

PICTURE = None  # stands in a turn for the next picture

# (role, text and PICTUREs) of each message
Turns = tuple[tuple[str, tuple], ...]


@dataclass(frozen=True)
class RemoteModel:
    """What `prompt` makes of a sample, `replies` asks. root: where relative image paths start.

    think: ask for a chain of thought; think_prompt: in these words, instead of leaving it to the server.
    """

    endpoint: ChatEndpoint
    root: Path | None = None
    think: bool = False
    think_prompt: str = ""

    def prompt(self, sample: Sample) -> tuple[Turns, list[np.ndarray]]:
        """The turns before the last answer, and their pictures. Raises BadSample."""
        if self.think:
            # grading reads the truth from the facts either way; the words are what differs
            thinking = with_thinking(sample, self.think_prompt)
            sample = thinking if self.think_prompt else sample
        sample = with_numbered_frames(sample, self.root)

        turns = []
        images = []
        for message in question_turns(sample):
            for part in message.parts:
                if not isinstance(part, str):
                    image = open_image(part, sample.root or self.root, sample.origin)
                    images.append(np.asarray(image))
            turns.append((message.role, protocol_parts(message)))
        return tuple(turns), images

    def replies(
        self, prompts: list, tries: int = 1, seed: int | None = None
    ) -> list[list[tuple[str, bool]] | NoReply]:
        """For each prompt [(text, whether it ended by itself), ...], or why there is none.

        seed: of the first try; None: none is sent.
        """

        def ask(question: tuple[list[dict], dict]) -> tuple[str, bool] | NoReply:
            messages, more = question
            try:
                reply = self.endpoint.converse(messages, **more)
            except NoReply as failure:
                return failure
            return reply.text, reply.ended

        # every try of every prompt is a request of its own
        questions = []
        for turns, images in prompts:
            messages = messages_of(turns, images)
            questions += [(messages, self._parameters(seed, number)) for number in range(tries)]
        answers = in_threads(ask, questions, self.endpoint.at_once)

        # a prompt with a try that failed has failed
        found = []
        for first in range(0, len(answers), tries):
            tried = answers[first : first + tries]
            failures = [answer for answer in tried if isinstance(answer, NoReply)]
            found.append(failures[0] if failures else tried)
        return found

    def _parameters(self, seed: int | None, number: int) -> dict:
        """Of one request, beside those of all."""
        parameters = {} if seed is None else {"seed": seed + number}
        if self.think and not self.think_prompt:
            parameters["think"] = True
        return parameters


def protocol_parts(message: Message) -> tuple:
    """Text and PICTUREs as the protocol wants them. An earlier answer's chain stands before it in tags."""
    parts: list = []
    for part in message.parts:
        if not isinstance(part, str):
            parts.append(PICTURE)
            continue

        # the server ends the line behind a picture
        if parts and parts[-1] is PICTURE:
            part = part.removeprefix("\n")
        if part:
            parts.append(part)

    if message.think is not None:
        parts.insert(0, f"<think>{message.think}</think>")
    return tuple(parts)


def messages_of(turns: Turns, images: list[np.ndarray]) -> list[dict]:
    """Turns in the API's form, the pictures in their order as data URLs."""
    left = iter(images)
    messages = []
    for role, parts in turns:
        if all(isinstance(part, str) for part in parts):
            messages.append({"role": role, "content": "".join(parts)})
            continue

        content = []
        for part in parts:
            if part is PICTURE:
                url = {"url": data_url_of(next(left))}
                content.append({"type": "image_url", "image_url": url})
            else:
                content.append({"type": "text", "text": part})
        messages.append({"role": role, "content": content})
    return messages


def data_url_of(image: np.ndarray) -> str:
    """Pixels (H, W, 3), uint8, as a PNG in a URL."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def written_out(turns: Turns, images: list[np.ndarray]) -> str:
    """A prompt in one text, to be shown: pictures by their sizes."""
    left = iter(images)
    lines = []
    for role, parts in turns:
        words = []
        for part in parts:
            if part is PICTURE:
                height, width = next(left).shape[:2]
                words.append(f"[picture of {width} x {height}]")
            else:
                words.append(part)
        lines.append(f"{role}: " + " ".join(words))
    return "\n".join(lines)
