"""Annotators: whoever writes captions, scores and questions for us, behind one interface.

What it teaches: a data pipeline asks a stronger model the same few things about millions of samples.
Which model that is changes with budget and year, so it stands behind one method:

    requests --+--> OwnModel          a directory of weights, in batches, through generate.py
               +--> Endpoint          any server that speaks OpenAI's chat protocol, many at once
               +--> curation.oracle   the drawn world, which knows the truth, with noise as wanted
                          |
                          v
    responses, one for each request, in their order; what has no answer says why

What is asked stands in files, curation/prompts/NAME.txt: words of ours, with `$caption` and the like
where a sample's own words go. `--annotator.prompts DIR` takes another folder first, so that a prompt is
changed without changing code.

    --annotator.model runs/toy/final
    --annotator.url http://localhost:8000/v1 --annotator.name qwen2.5-vl --annotator.at-once 32
      --annotator.per-minute 600 --annotator.price-in 0.4 --annotator.price-out 1.6
    --annotator.oracle --annotator.noise 0.1

Not published: the paper's prompts and models ("LVM API"). All prompts are ours, but for the three
ratings of prompts/ratings.txt, whose scales follow SAIL-VL (arXiv 2501.05952, appendix F).
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Sequence

import torch
from PIL import Image

from curation.oracle import Oracle
from curation.requests import NO_REPLY, Annotator, Prompts, Request, Response
from data.encode import Encoder
from data.images import stills_of
from data.sample import BadSample, Message, Sample
from generate import generate, load_model
from infra.device import Precision, pick_device, torch_type
from infra.endpoint import ChatEndpoint, NoReply, in_threads
from scale import parallel

# ---------------------------------------------------------------------------------------- our own


class OwnModel:
    """Our own model: greedy answers, `batch` requests together."""

    def __init__(
        self,
        directory: Path,
        prompts: Prompts,
        batch: int = 32,
        max_new: int = 256,
        device: str = "",
        dtype: Precision = "float32",
    ):
        self.name = str(directory)
        self.prompts = prompts
        self.batch = batch
        self.max_new = max_new
        self.model, self.tokenizer = load_model(directory, pick_device(device), torch_type(dtype))
        self.encoder = Encoder(self.tokenizer, self.model.config, None)
        self.asked = 0

    def annotate(self, requests: Sequence[Request]) -> list[Response]:
        responses = []
        for first in range(0, len(requests), self.batch):
            responses += self.answer(requests[first : first + self.batch])
        return responses

    def answer(self, requests: Sequence[Request]) -> list[Response]:
        """A batch; a request whose pictures cannot be read is left out of it."""
        # What can be asked
        responses: list[Response | None] = []
        prompts = []
        for request in requests:
            try:
                prompts.append(self.encoder.prompt(as_question(request, self.prompts)))
                responses.append(None)
            except BadSample as fault:
                responses.append(Response(None, str(fault)))

        # Greedy: the same answers every time
        answers = iter(())
        if prompts:
            with torch.inference_mode():
                found = generate(self.model, prompts, self.tokenizer.ends, self.max_new, 1, 0.0)
            answers = iter(found)
        self.asked += len(prompts)
        return [response or self.response(next(answers)) for response in responses]

    def response(self, answer) -> Response:
        # An answer that did not end in time is half of one
        if not answer.finished:
            return Response(None, f"no end within {self.max_new} tokens")
        return Response(self.tokenizer.decode(answer.ids[:-1]).strip())

    def report(self) -> str:
        return f"{self.name}: {self.asked:,} asked"


def as_question(request: Request, prompts: Prompts) -> Sample:
    """A request as a sample that our own model is asked: pictures first, then the words."""
    # As in training: the picture, a line break, the question
    words = prompts.text(request)
    parts = (*request.pictures, "\n" + words if request.pictures else words)
    about = request.about
    return Sample(
        (Message("user", parts),),
        origin=about.origin if about else request.task,
        root=about.root if about else None,
    )


# ------------------------------------------------------------------------------------- a server's


class Endpoint:
    """A model behind an address: `ChatEndpoint` of infra, asked `chat.at_once` things at a time."""

    def __init__(self, chat: ChatEndpoint, prompts: Prompts):
        self.chat = chat
        self.name = chat.model
        self.prompts = prompts

    def annotate(self, requests: Sequence[Request]) -> list[Response]:
        return in_threads(self.answer, requests, self.chat.at_once)

    def answer(self, request: Request) -> Response:
        """One request, in a thread of its own. Pictures are opened here: no more of them are in memory
        than requests on their way."""
        # What is asked
        words = self.prompts.text(request)
        try:
            pictures = opened_pictures(request)
        except BadSample as fault:
            return Response(None, str(fault))

        # What is answered; an answer that did not end in time is half of one
        try:
            reply = self.chat.ask(words, pictures)
        except NoReply as failure:
            return Response(None, f"{NO_REPLY}: {failure.kind}")
        if not reply.ended:
            return Response(None, f"no end within {self.chat.max_new or 'its'} tokens")
        return Response(reply.text.strip())

    def report(self) -> str:
        return self.chat.report()


def opened_pictures(request: Request) -> list[Image.Image]:
    """The pictures of a request, opened, a video as its frames. Raises BadSample for one that cannot be
    read."""
    about = request.about
    root = about.root if about else None
    origin = about.origin if about else request.task
    stills = [stills_of(picture, root, origin) for picture in request.pictures]
    return list(chain.from_iterable(stills))


# ---------------------------------------------------------------------------------------- options


@dataclass
class AnnotatorOptions:
    """Who annotates: a directory of our own, a server, or the drawn world's oracle. Exactly one."""

    model: Path | None = None  # a directory of weights
    url: str = ""  # of a server, as in http://localhost:8000/v1
    name: str = ""  # of the model that the server is asked for
    oracle: bool = False  # the drawn world knows the truth
    noise: float = 0.0  # of the oracle: the share of its answers that are wrong
    prompts: Path | None = None  # a folder of prompts that come before ours
    max_new: int = 256  # tokens of an answer
    batch: int = 32  # requests together, of a model of our own
    device: str = ""  # cuda, npu, mps, cpu; default: the accelerator, if there is one
    dtype: Precision = "float32"
    at_once: int = 16  # requests on their way, of a server; each rank has so many
    per_minute: float = 0.0  # requests of all ranks, at most; 0: no limit
    timeout: float = 120.0  # seconds of a request with all its attempts
    retries: int = 4
    key_name: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    # a file of replies, so that nothing is asked twice; default of a pipeline: OUT.replies.jsonl
    cache: Path | None = None
    price_in: float = 0.0  # dollars for a million tokens that are sent
    price_out: float = 0.0  # and that are written


def open_annotator(options: AnnotatorOptions, seed: int = 0) -> Annotator:
    """The annotator that the options name, on the device of this rank.

    Raises ValueError unless they name exactly one, and for a server that does not answer.
    """
    named = [bool(options.model), bool(options.url), options.oracle]
    if sum(named) != 1:
        raise ValueError(
            "name one annotator: --annotator.model DIR, --annotator.url URL or --annotator.oracle"
        )

    ranks = parallel.start()
    prompts = Prompts(options.prompts)
    if options.model:
        device = pick_device(options.device, ranks.device)
        return OwnModel(
            options.model, prompts, options.batch, options.max_new, device, options.dtype
        )
    if options.url:
        chat = chat_of(options, ranks.size)
        if ranks.main:
            chat.check()
        return Endpoint(chat, prompts)
    return Oracle(options.noise, seed)


def chat_of(options: AnnotatorOptions, size: int = 1) -> ChatEndpoint:
    """The server, for one of `size` ranks. Raises ValueError for what cannot be meant."""
    if not options.name:
        raise ValueError("--annotator.name: which model shall the server be asked for?")
    if options.max_new < 1:
        raise ValueError("--annotator.max-new must be positive")
    return ChatEndpoint(
        options.url,
        options.name,
        options.timeout,
        options.retries,
        options.cache,
        options.key_name,
        options.at_once,
        role="annotator",
        max_new=options.max_new,
        per_minute=options.per_minute / size,
        prices=(options.price_in, options.price_out),
    )
