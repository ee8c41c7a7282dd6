"""OpenAI's chat protocol: what a request may say, and what comes back.

What it teaches: an interface that thousands of programs speak is worth more than a better one of
one's own. This file is its words: JSON becomes a `Chat`, and whatever is wrong with it an `ApiError`
in the form that clients know. No network here, and no model.

    {"messages": [...], "stream": true, ...}  --read_chat-->  Chat  or  ApiError(400, ...)
    Chat  --with_pictures-->  Sample, its pictures decoded  --Encoder-->  ids, tiles
    Delta, Delta, ...  --chunk, completion-->  {"choices": [{"delta": ...}], "usage": ...}

A message's content is text, or parts: `text`, `image_url` and `video_url` (an animated GIF or WebP, as
numbered frames). Parts stand in the order in which they are sent; but where a message has pictures
and one text, the pictures come first, each on its own line, as the model was trained.

A parameter that is not served is an error, unless it asks for what happens anyway (`"tools": []`).
Beside the API's own there are `top_k`, `think` (append the request to think), `inside` (where the answer
looked, seen.py) and `ignore_eos` (go on past the end, to measure; as in vLLM).

Our choice: a request that does not say has the server's temperature, 0; log-probabilities are those
at the request's temperature; `max_tokens` is cut to what the context leaves.
Simplified: no tools, audio, files, or JSON mode. Source: OpenAI's API reference, as its official Python
client reads it.
"""

import io
import json
import math
import secrets
from dataclasses import dataclass, replace
from typing import Any, Callable

from PIL import Image

from data.images import count_gif_frames, decode_image, faults_only, frames_of, opened
from data.sample import MAX_FRAMES, THINKING, BadSample, Message, Sample, Video
from serving.transcript import TokenScore

LEAST = -9999.0  # the API's word for the logarithm of nothing
COLD = 1e-4  # a temperature below is 0
MOST_PARTS = 1000  # of one message
MOST_INSIDE = 256  # tokens of an answer that is looked into
LONGEST_STOP = 200  # characters
CAN_READ = "the picture cannot be read: JPEG, PNG, WebP, GIF and BMP files can, when they are whole"
LONGEST_TOKEN = 128  # bytes: a text of more than so many a token of the context cannot fit

# Parameters of the API that change nothing here as long as they have one of these values.
HARMLESS = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
# Labels, which change no answer.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class ApiError(Exception):
    """What a client is told: a status, one sentence, a code for programs, the parameter that it is about."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict:
        """The API's own form of an error."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": str(self),
            "type": kinds.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def refused(param: str, what: str, code: str | None = None) -> ApiError:
    """A parameter's fault."""
    return ApiError(400, f"{param}: {what}", code, param)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    context: int = 4096  # tokens of a prompt and its answer
    max_tokens: int = 1024  # of an answer
    temperature: float = 0.0  # of a request that does not say
    choices: int = 16
    images: int = 16
    pixels: int = 32_000_000  # of all pictures together
    body: int = 32 << 20  # bytes


@dataclass(frozen=True)
class Address:
    """Where a picture of a request is; param: where in the request that is said."""

    url: str
    moves: bool
    param: str


@dataclass(frozen=True)
class Chat:
    """A request that was understood. parts of its messages are text and `Address`es."""

    messages: tuple[Message, ...]
    stream: bool
    include_usage: bool
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]
    logprobs: bool
    top_logprobs: int
    think: bool
    ignore_eos: bool
    inside: bool


# ------------------------------------------------------------------------------------ single values


def integer(value: Any, param: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise refused(param, f"a whole number from {low} to {high} is wanted")
    return value


def real(value: Any, param: str, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        raise refused(param, f"a number from {low:g} to {high:g} is wanted")
    return float(value)


def warmth(value: Any, param: str) -> float:
    """A temperature; what is nearly 0 is 0, since logits are divided by it."""
    temperature = real(value, param, 0, 2)
    return temperature if temperature >= COLD else 0.0


def boolean(value: Any, param: str) -> bool:
    if type(value) is not bool:
        raise refused(param, "true or false is wanted")
    return value


def plain_text(value: Any, param: str) -> str:
    """Text as it can be encoded: half of a surrogate pair is no character."""
    if type(value) is not str:
        raise refused(param, "a string is wanted")
    return value.encode("utf-8", "replace").decode()


def stop_strings(value: Any, param: str) -> tuple[str, ...]:
    strings = [value] if type(value) is str else value
    if type(strings) is not list or len(strings) > 4:
        raise refused(param, "a string, or a list of up to four, is wanted")
    for string in strings:
        if type(string) is not str or not 0 < len(string) <= LONGEST_STOP:
            raise refused(param, f"strings of 1 to {LONGEST_STOP} characters are wanted")
    return tuple(strings)


def usage_wanted(value: Any, param: str) -> bool:
    """Of `stream_options`; the API's other one is padding against eavesdroppers, which is not served."""
    known = ("include_usage", "include_obfuscation")
    if type(value) is not dict or any(key not in known for key in value):
        raise refused(param, "an object with include_usage is wanted")
    if value.get("include_obfuscation"):
        raise refused(param, "include_obfuscation is not served", "unsupported_parameter")
    return boolean(value.get("include_usage", False), f"{param}.include_usage")


# -------------------------------------------------------------------------------------- the request


def parse_body(body: bytes) -> dict:
    """A JSON object. Raises ApiError for anything else, however deep or large."""

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        request = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body cannot be read as JSON: {reason}", "invalid_json") from None
    if type(request) is not dict:
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return request


def read_chat(body: bytes, name: str, limits: Limits) -> Chat:
    """A request's body -> what it asks for. Raises ApiError; name: of the model that is served."""
    request = {key: value for key, value in parse_body(body).items() if value is not None}

    # the model first: whoever asks another one has the wrong address
    wanted = plain_text(request.pop("model", None), "model")
    if wanted != name:
        message = f"The model `{wanted[:100]}` does not exist here; this server has `{name}`"
        raise ApiError(404, message, "model_not_found", "model")
    messages = read_messages_of(request.pop("messages", None), limits)

    # what is said, each checked by its reader
    said: dict[str, Any] = {}
    readers = readers_of(limits)
    for param, value in request.items():
        if param in readers:
            said[param] = readers[param](value, param)
        elif param not in LABELS:
            check_harmless(param, value)

    # two names of one thing, and what needs another
    max_tokens = said.pop("max_completion_tokens", said.pop("max_tokens", limits.max_tokens))
    top_logprobs = said.get("top_logprobs", 0)
    if top_logprobs and not said.get("logprobs"):
        raise refused("top_logprobs", "it needs logprobs to be true")
    if said.get("inside"):
        max_tokens = min(max_tokens, MOST_INSIDE)
        if said.get("n", 1) > 1:
            raise refused("inside", "it needs n to be 1")

    # and what is not
    otherwise = {
        "stream": False,
        "n": 1,
        "temperature": limits.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "seed": secrets.randbits(31),
        "stop": (),
        "logprobs": False,
        "top_logprobs": 0,
        "think": False,
        "ignore_eos": False,
        "inside": False,
    }
    include_usage = said.pop("stream_options", False)
    values = otherwise | said
    return Chat(messages, include_usage=include_usage, max_tokens=max_tokens, **values)


def readers_of(limits: Limits) -> dict[str, Callable[[Any, str], Any]]:
    """Parameter -> what reads its value, or raises ApiError."""

    def tokens(value: Any, param: str) -> int:
        return min(integer(value, param, 1, 1 << 40), limits.max_tokens)

    return {
        "stream": boolean,
        "stream_options": usage_wanted,
        "n": lambda value, param: integer(value, param, 1, limits.choices),
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "temperature": warmth,
        "top_p": lambda value, param: real(value, param, 1e-6, 1),
        "top_k": lambda value, param: max(0, integer(value, param, -1, 1 << 40)),
        "seed": lambda value, param: integer(value, param, -(1 << 63), (1 << 63) - 1),
        "stop": stop_strings,
        "logprobs": boolean,
        "top_logprobs": lambda value, param: integer(value, param, 0, 20),
        "think": boolean,
        "ignore_eos": boolean,
        "inside": boolean,
    }


def check_harmless(param: str, value: Any) -> None:
    """Raises ApiError for a parameter that is unknown, or asks for what is not served."""
    if param not in HARMLESS:
        raise ApiError(400, f"unknown parameter: {param[:100]}", "unknown_parameter", param[:100])
    if value not in HARMLESS[param]:
        raise refused(param, "this is not served", "unsupported_parameter")


# ------------------------------------------------------------------------------------- the messages


def read_messages_of(value: Any, limits: Limits) -> tuple[Message, ...]:
    """Messages with text and `Address`es. Raises ApiError."""
    if type(value) is not list or not value:
        raise refused("messages", "a list of at least one message is wanted")
    if len(value) > limits.context:
        raise too_long(limits, f"it has {len(value):,} messages")
    messages = tuple(read_message(m, f"messages[{i}]") for i, m in enumerate(value))

    # more than could fit, seen before it is encoded
    parts = [part for message in messages for part in message.parts]
    size = sum(len(part) for part in parts if isinstance(part, str))
    if size > LONGEST_TOKEN * limits.context:
        raise too_long(limits, f"it has {size:,} characters")
    pictures = sum(isinstance(part, Address) for part in parts)
    if pictures > limits.images:
        raise refused("messages", f"{pictures} pictures; at most {limits.images} are taken")
    return messages


def too_long(limits: Limits, what: str) -> ApiError:
    message = (
        f"The prompt is too long: {what}; the context is {limits.context:,} tokens, with the answer"
    )
    return ApiError(400, message, "context_length_exceeded", "messages")


def read_message(value: Any, param: str) -> Message:
    if type(value) is not dict:
        raise refused(param, "an object with role and content is wanted")
    role = value.get("role")
    if role == "developer":  # the API's newer word
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise refused(f"{param}.role", "system, user or assistant is wanted")
    for key in value:
        if key not in ("role", "content", "name") and value[key] is not None:
            raise refused(f"{param}.{key[:100]}", "this is not served", "unsupported_parameter")

    content = value.get("content")
    if type(content) is str:
        content = [{"type": "text", "text": content}]
    if type(content) is not list or not 0 < len(content) <= MOST_PARTS:
        raise refused(
            f"{param}.content", f"a string, or a list of 1 to {MOST_PARTS} parts is wanted"
        )
    parts = [read_part(part, f"{param}.content[{i}]") for i, part in enumerate(content)]
    if role != "user" and any(isinstance(part, Address) for part in parts):
        raise refused(f"{param}.content", "only a user's message may have pictures")

    # an earlier answer's thoughts were tokens of their own
    thinking = THINKING.fullmatch("".join(parts)) if role == "assistant" else None
    if thinking:
        return Message(role, (thinking[2],), think=thinking[1])
    return Message(role, laid_out_parts(parts))


def read_part(value: Any, param: str) -> str | Address:
    kind = value.get("type") if type(value) is dict else None
    if kind == "text":
        return plain_text(value.get("text"), f"{param}.text")
    if kind not in ("image_url", "video_url"):
        raise refused(f"{param}.type", "text, image_url or video_url is wanted")
    place = value.get(kind)
    url = place.get("url") if type(place) is dict else place
    return Address(plain_text(url, f"{param}.{kind}"), kind == "video_url", f"{param}.{kind}")


def laid_out_parts(parts: list) -> tuple:
    """Pictures on lines of their own; before the text, where there is one text only."""
    texts = [part for part in parts if isinstance(part, str)]
    pictures = [part for part in parts if not isinstance(part, str)]
    if len(texts) == 1:
        parts = [*pictures, *texts]

    # frames of a video end their lines themselves (`Encoder.unrolled`)
    lines: list = []
    for part in parts:
        if isinstance(part, str) and lines and isinstance(lines[-1], str):
            lines[-1] += part
        else:
            lines.append(part)
        if isinstance(part, Address) and not part.moves:
            lines.append("\n")
    return tuple(lines)


# ------------------------------------------------------------------------------------- the pictures


def with_pictures(
    chat: Chat, fetch: Callable[[Address], bytes], think_prompt: str, limits: Limits
) -> Sample:
    """The chat with its pictures decoded, as `Encoder.prompt` takes it. Raises ApiError.

    fetch: from an address to the bytes of the file.
    """
    left = limits.pixels
    messages = []
    for message in chat.messages:
        parts = []
        for part in message.parts:
            if isinstance(part, Address):
                part, pixels = decoded(fetch(part), part, left)
                left -= pixels
            parts.append(part)
        messages.append(Message(message.role, tuple(parts), think=message.think))

    # the request to think ends the last message
    if chat.think:
        last = messages[-1]
        *before, end = last.parts
        end = (f"{end} {think_prompt}",) if isinstance(end, str) else (end, think_prompt)
        messages[-1] = Message(last.role, (*before, *end))
    return Sample(tuple(messages), origin="messages")


def decoded(raw: bytes, address: Address, left: int) -> tuple[Image.Image | Video, int]:
    """The picture or the frames in a file, and how many pixels those are; `left`: how many may be."""
    try:
        with faults_only(raw, address.param), opened(raw, None, address.param) as image:
            # known from the header, before any pixel
            frames = 1
            if address.moves:
                frames = count_gif_frames(io.BytesIO(raw)) or getattr(image, "n_frames", 1)
            pixels = image.width * image.height
            taken = pixels * min(frames, MAX_FRAMES)
            if taken > left or pixels * frames > 8 * left:
                size = f"{image.width}x{image.height} pixels, {frames} frames"
                raise BadSample("oversized image", f"{size}: more than the server takes")
            if not address.moves:
                return decode_image(image), taken
        video = Video(raw, MAX_FRAMES, "even")
        return replace(video, source=tuple(frames_of(video, None, address.param))), taken
    except BadSample as fault:
        why = str(fault) if fault.reason == "oversized image" else CAN_READ
        raise refused(address.param, why, "image_parse_error") from None


# --------------------------------------------------------------------------------------- the answer


def head_of(name: str, created: int) -> dict:
    """What all parts of one reply have in common."""
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": created, "model": name}


def usage_of(prompt: int, made: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def token_json(raw: bytes, logprob: float) -> dict:
    """A token as the API spells it."""
    known = max(logprob, LEAST) if math.isfinite(logprob) else LEAST
    return {"token": raw.decode("utf-8", "replace"), "logprob": known, "bytes": list(raw)}


def logprobs_json(tokens: tuple[TokenScore, ...]) -> dict:
    content = []
    for token in tokens:
        best = [token_json(raw, logprob) for raw, logprob in token.likeliest]
        content.append(token_json(token.text, token.logprob) | {"top_logprobs": best})
    return {"content": content}


def choice_json(
    index: int, key: str, said: dict, finish: str | None, logprobs: dict | None
) -> dict:
    return {"index": index, key: said, "logprobs": logprobs, "finish_reason": finish}


def chunk(head: dict, choices: list[dict], usage: dict | None = None) -> dict:
    """One event of a stream."""
    return head | {"object": "chat.completion.chunk", "choices": choices, "usage": usage}


def completion(head: dict, choices: list[dict], usage: dict) -> dict:
    """A whole reply."""
    return head | {"object": "chat.completion", "choices": choices, "usage": usage}


def model_json(name: str, created: int) -> dict:
    return {"id": name, "object": "model", "created": created, "owned_by": "nanosail"}
