"""From a prompt to an answer: sampling with a static key/value cache.

What it teaches: decoding is the training forward, one token a row, with yesterday's keys and values
kept. Prompts of all lengths are prefilled packed (no padding is computed); the image and prompt of a
question are run once and shared by all samples of its group; rows that have ended are dropped, so
late steps are small. The log-probability returned with each token is that of the training forward at
the same temperature.

    prompts (ids, images) -> prefill: one packed forward fills the Cache -> next_token -> decode: one
    token a row -> next_token -> ... until a stop token      (`stream`; `generate` collects answers)

    python generate.py --model runs/toy/final --image some.png --prompt "how many things are there?"
    python generate.py --video clip.gif --prompt "which way does it move?"   # or a folder, or frames
    python generate.py --image some.png --prompt "what is it?" --show runs/inside.html  # where it looked

Legend: P prompts, n samples each, B = P * n rows, S tokens of all prompts, T cache length, H query
heads, G key/value heads, D head size, V words.
"""

import copy
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention import Attend, Segments, packed_attention
from data.encode import Encoder
from data.images import frames_of, open_image
from data.sample import MAX_FRAMES, Message, Sample, Video
from infra.checkpoint import fault
from infra.cli import command
from infra.config import read_config
from infra.device import pick_device, torch_type
from infra.text import printable
from talk.inside import pixels_on
from talk.page import check_page_path, view_of, write_view
from tokenizer import Tokenizer
from vlm import SailVL


@dataclass(frozen=True)
class Answer:
    """One sampled continuation: ids (with the end token when `finished`), log-probability of each,
    prompt's index."""

    prompt: int
    ids: list[int]
    logprobs: list[float]
    finished: bool


# --------------------------------------------------------------------------------------------- cache


class Cache:
    """Keys and values (layers, B, G, T, D) of all rows.

    Columns before `prompt` hold the prompts, left-aligned; every step fills the next column of all
    rows, so that writing is a slice. `lengths` (B,) counts a row's tokens: the next one's position.

        prompt 0   a b c d e | x y      prompt = 5: the longest
        prompt 1   f g h . . | x y      `bias` covers the dots
    """

    def __init__(self, llm: Any, lengths: list[int], room: int, like: Tensor):
        # a column for each token of the longest prompt, and for each that may come
        config = llm.config
        device = like.device
        self.prompt = max(lengths)
        self.steps = 0
        self.lengths = torch.tensor(lengths, device=device)

        # in the type in which training's attention has them
        dtype = like.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        T = self.prompt + room
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, len(lengths), heads, T, config.head_dim)
        self.k = like.new_zeros(shape, dtype=dtype)
        self.v = like.new_zeros(shape, dtype=dtype)

        # (B, T): -inf for what lies between a prompt and its answer
        hidden = torch.arange(T, device=device) >= self.lengths[:, None]
        hidden[:, self.prompt :] = False
        self.bias = self.k.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

        # where each of the packed prompts' tokens goes: its row and its column
        self.segments = Segments.of(lengths, device)
        prompts = torch.arange(len(lengths), device=device)
        self.rows = torch.repeat_interleave(prompts, self.lengths)  # (S,)
        self.at = self.segments.positions()  # (S,)

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` for packed prompts (S tokens): store, then attend inside each prompt."""
        dtype = self.k.dtype
        q = q.to(dtype)
        k = k.to(dtype)
        v = v.to(dtype)
        self.k[layer, self.rows, :, self.at] = k
        self.v[layer, self.rows, :, self.at] = v
        return packed_attention(q, k, v, self.segments, causal=True)

    def step(self) -> Tensor:
        """Make ready for one more token a row; returns their positions (B,)."""
        self.steps += 1
        self.lengths = self.lengths + 1
        return self.lengths - 1

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` for one new token a row: q (B, H, D)."""
        # this token's own keys and values go into the newest column
        T = self.prompt + self.steps
        self.k[layer, :, :, T - 1] = k
        self.v[layer, :, :, T - 1] = v
        keys = self.k[layer, :, :, :T]  # (B, G, T, D)
        values = self.v[layer, :, :, :T]
        return attend_cached(q, keys, values, self.bias[:, :T])

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows."""
        self.k = self.k.index_select(1, rows)
        self.v = self.v.index_select(1, rows)
        self.lengths = self.lengths[rows]
        self.bias = self.bias[rows]


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """One query a row over the keys that are kept: q (B, H, D), keys and values (B, G, T, D) -> (B, H, D).

    bias (B, T), in the keys' type: 0 for what a row sees, -inf for the rest. The H/G query heads of a
    group stand where a sequence has its positions, so they share their keys uncopied.
    """
    B, H, D = q.shape
    grouped = q.to(keys.dtype).view(B, keys.shape[1], -1, D)  # (B, G, H/G, D)
    mask = bias[:, None, None]  # (B, 1, 1, T)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(B, H, D)


# ------------------------------------------------------------------------------------------ sampling


def next_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Next ids (B,) and their log-probabilities (B,) from logits (B, V). Temperature 0 is greedy,
    scored at temperature 1.

    The log-probability is of the full distribution at this temperature: train with top_k = 0 and
    top_p = 1.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (B, V)
    if temperature == 0:
        picked = logprobs.argmax(-1)
    else:
        picked = draw_one(likeliest(logprobs, top_k, top_p), generator)
    return picked, logprobs.gather(-1, picked[:, None])[:, 0]


def likeliest(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """The log-probabilities (B, V) with -inf for what top_k and top_p leave out."""
    allowed = logprobs
    if top_k:
        least = allowed.topk(min(top_k, allowed.shape[-1])).values[:, -1:]
        allowed = allowed.masked_fill(allowed < least, -torch.inf)
    if top_p < 1:
        # a word goes when those before it have the wanted probability already
        ordered, order = allowed.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered > top_p
        allowed = allowed.masked_fill(drop.gather(-1, order.argsort(-1)), -torch.inf)
    return allowed


def draw_one(allowed: Tensor, generator: torch.Generator | None) -> Tensor:
    """A word (B,) for each row of log-probabilities (B, V).

    It is the word where a uniform number of (0, 1] falls among the summed probabilities: one draw a
    row (`multinomial` makes one a word). A word of probability 0 adds nothing to the sum, so it is
    never the first to reach the number.
    """
    # not every accelerator has fp64
    exact = torch.float64 if allowed.device.type in ("cpu", "cuda") else torch.float32
    summed = allowed.softmax(-1).cumsum(-1, dtype=exact)
    uniform = torch.rand(len(summed), 1, dtype=exact, device=summed.device, generator=generator)
    return torch.searchsorted(summed, (1 - uniform) * summed[:, -1:])[:, 0]


@torch.no_grad()
def stream(
    model: SailVL,
    prompts: list[tuple[list[int], list[np.ndarray]]],
    end: int | tuple[int, ...],
    max_new: int = 64,
    samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    start: list[int] = (),
    at_once: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens as they are chosen: each step yields (rows, ids, log-probabilities), (n,) each, of the
    rows that are still going.

    prompts: (ids, image arrays) each, as from `Encoder.prompt`. Rows `p * samples` and on answer
    prompt p. `end`: one stop token or several (`Tokenizer.ends`). `start` is appended to every prompt
    (e.g. `<think>`) and not part of the answer. at_once: rows that the cache has room for; the others
    wait for their turn (0: all at once). Raises ValueError for no prompts.
    """
    if not prompts:
        raise ValueError("nothing to generate: no prompts")
    device = model.language_model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)

    # an image token cannot be answered with: no pixels belong to it, so it ends the row, unfinished
    stops = torch.tensor([*stop_tokens(end), model.image_token_id], device=device)
    ids = [list(prompt) + list(start) for prompt, _ in prompts]
    images = [array for _, arrays in prompts for array in arrays]
    shared, logits = prefill_prompts(model, ids, images, max_new)

    # a row of the cache for every sample of a group, each of which draws its own first token; the
    # prompts' own rows stay until the last turn has taken what it needs
    prompt_of_row = torch.arange(len(ids), device=device).repeat_interleave(samples)  # (B,)
    rows = torch.arange(len(prompt_of_row), device=device)
    turns = rows.split(at_once or len(rows))
    choose = partial(
        next_token, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
    )
    for number, turn in enumerate(turns, start=1):
        cache = shared if number == len(turns) else copy.copy(shared)
        mine = prompt_of_row[turn]
        cache.select(mine)
        first = logits.index_select(0, mine)
        yield from decode_rows(model, cache, turn, first, choose, stops, max_new)


def prefill_prompts(
    model: SailVL, ids: list[list[int]], images: list[np.ndarray], max_new: int
) -> tuple[Cache, Tensor]:
    """One forward for all P prompts: their cache, with room for answers, and logits (P, V)."""
    llm = model.language_model
    cache = Cache(llm, [len(row) for row in ids], max_new, llm.lm_head.weight)
    return cache, prompt_logits(model, ids, images, cache.segments, cache.prefill)


def prompt_logits(
    model: SailVL,
    ids: list[list[int]],
    images: list[np.ndarray],
    segments: Segments,
    attend: Attend,
) -> Tensor:
    """One packed forward over P prompts, whose keys `attend` keeps -> logits (P, V) of what follows each."""
    # all prompts, one after another, and their pixels
    llm = model.language_model
    device = llm.lm_head.weight.device
    packed = torch.tensor([i for row in ids for i in row], device=device)[None]  # (1, S)
    pixels = pixels_on(device, images)

    # through the model; only the last token of each is asked for the next
    hidden = llm(model.embed(packed, pixels), segments.positions(), attend)  # (S, C)
    last = hidden.index_select(0, (segments.cu[1:] - 1).long())  # (P, C)
    return llm.lm_head(last)


def decode_rows(
    model: SailVL,
    cache: Cache,
    alive: Tensor,
    logits: Tensor,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    stops: Tensor,
    max_new: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`stream` for the rows of a cache: alive (B,) is the answer of each, logits (B, V) its first.

    choose: logits -> ids and log-probabilities of the next tokens.
    """
    llm = model.language_model
    ended = torch.zeros(len(alive), dtype=torch.bool, device=alive.device)
    for t in range(max_new):
        picked, scores = choose(logits)
        going = ~ended
        yield alive[going], picked[going], scores[going]

        ended = ended | torch.isin(picked, stops)
        if t + 1 == max_new or bool(ended.all()):
            return

        # drop ended rows, but not at every step: each drop copies the cache
        if ended.float().mean() > 0.25:
            keep = (~ended).nonzero()[:, 0]
            cache.select(keep)
            alive = alive[keep]
            picked = picked[keep]
            ended = ended[keep]
        logits = llm.lm_head(llm(llm.embed(picked), cache.step(), cache.decode))  # (B, V)


def stop_tokens(end: int | tuple[int, ...]) -> tuple[int, ...]:
    return (end,) if isinstance(end, int) else tuple(end)


def generate(
    model: SailVL,
    prompts: list[tuple[list[int], list[np.ndarray]]],
    end: int | tuple[int, ...],
    max_new: int = 64,
    samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    start: list[int] = (),
    at_once: int = 0,
    each_step: Callable[[], None] | None = None,
) -> list[Answer]:
    """Whole answers, `samples` per prompt, in prompt order. Arguments and errors are those of
    `stream`; `each_step` is called after every token, and may raise to end a long work."""
    # write each step into a table of all answers
    B = len(prompts) * samples
    device = model.language_model.lm_head.weight.device
    table = torch.full((B, max_new), -1, dtype=torch.long, device=device)
    scores = torch.zeros(B, max_new, device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    sampling = (samples, temperature, top_k, top_p, seed, start, at_once)
    for rows, picked, score in stream(model, prompts, end, max_new, *sampling):
        place = lengths[rows]
        table[rows, place] = picked
        scores[rows, place] = score
        lengths[rows] = place + 1
        if each_step is not None:
            each_step()

    # and cut each row where its answer ends
    stops = stop_tokens(end)
    answers = []
    for i, (row, score, n) in enumerate(zip(table.tolist(), scores.tolist(), lengths.tolist())):
        answers.append(Answer(i // samples, row[:n], score[:n], row[n - 1] in stops))
    return answers


# ------------------------------------------------------------------------------------------- loading


def load_model(
    directory, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[SailVL, Tokenizer]:
    """A model directory, or that of a run which has not ended -> model and tokenizer that agree.

    Raises ValueError when there is none, when the device is not there, or when the tokenizer has more
    tokens than the model.
    """
    pick_device(device)
    directory = Path(directory)
    place = weights_place(directory)
    read_config(place)  # its absence is named first
    tokenizer = Tokenizer.load(tokenizer_place(directory, place))
    model = SailVL.from_pretrained(place, dtype, device)

    # every id has its row in the model
    words = model.config.text.vocab_size
    if len(tokenizer) > words:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {words}: "
            "it is another model's tokenizer"
        )
    model.image_token_id = tokenizer.image
    model.config = replace(model.config, image_token_id=tokenizer.image)
    return model.eval(), tokenizer


def weights_place(directory: Path) -> Path:
    """Where the weights of a model directory are.

    Of a run without a model of its own the newest whole checkpoint is taken, and named on stderr.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give that of a saved or released model")
    if (directory / "config.json").is_file() or not (directory / "checkpoints").is_dir():
        return directory
    place = newest_checkpoint(directory)
    print(f"{directory} holds no finished model: using {place}", file=sys.stderr)
    return place


def newest_checkpoint(directory: Path) -> Path:
    """The newest whole checkpoint of a run. Nothing is moved: the run may still be writing."""
    found = sorted((directory / "checkpoints").glob("step-*"), reverse=True)
    faults = []
    for path in found:
        problem = fault(path)
        if problem is None:
            return path
        faults.append(f"{path.name}: {problem}")
    reason = "; ".join(faults) or "none was written yet"
    raise ValueError(f"{directory}: no config.json here, and no whole checkpoint ({reason})")


def tokenizer_place(run: Path, place: Path) -> Path:
    """Where the tokenizer of a checkpoint is: beside it, in the run's directory, or in the model
    that the run started from."""

    def has_one(path: Path) -> bool:
        names = ("tokenizer.json", "vocab.json")
        return any(path.glob("*.tiktoken")) or any((path / name).is_file() for name in names)

    if has_one(place) or place == run:
        return place
    if has_one(run):
        return run
    try:
        start = json.loads((run / "run.json").read_text()).get("model")
    except (OSError, ValueError, AttributeError, RecursionError):
        start = None
    if start and has_one(Path(start)):
        return Path(start)
    raise ValueError(
        f"{run}: the checkpoint {place.name} has no tokenizer, nor has the run's directory: copy "
        "tokenizer.tiktoken and template.json of the model that it started from there"
    )


# ------------------------------------------------------------------------------------------- command


@dataclass
class GenerateOptions:
    """Ask a model about images or a video."""

    prompt: str
    # a model, or the directory of a run: its newest checkpoint
    model: Path = Path("runs/toy/final")
    image: tuple[Path, ...] = ()  # none, one or several
    video: tuple[Path, ...] = ()  # a GIF or WebP, a folder of frames, or several frames in order
    frames: int = MAX_FRAMES  # of a video at most, evenly spaced
    think: bool = False  # ask for a chain of thought
    max_new: int = 256  # tokens
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    show: Path | None = None  # write where each token looked: a page (.html) or a picture (.png)
    device: str = "cpu"  # cuda, npu, mps
    dtype: Literal["float32", "bfloat16"] = "float32"


def build_question(options: GenerateOptions, think_prompt: str) -> Sample:
    """Images, a video and the text, in the form that training has them in.

    Raises ValueError for an empty prompt, BadSample for a picture that cannot be read.
    """
    text = options.prompt.strip()
    if not text:
        raise ValueError("--prompt is empty: what is to be answered?")
    if options.think:
        text = f"{text} {think_prompt}"

    seen: list[Any] = []
    for path in options.image:
        if len(frames_of(Video(path, 2, "even"), None, "--image")) > 1:
            print(f"{path} moves: its first frame is shown, --video shows all", file=sys.stderr)
        seen.append(open_image(path, origin="--image"))
    if options.video:
        several = len(options.video) > 1
        video = Video(tuple(options.video) if several else options.video[0], options.frames, "even")
        frames_of(video, None, "--video")  # a missing one is named before the model is read
        seen.append(video)
    return Sample((user_turn(seen, text),), origin="--prompt")


def user_turn(seen: list[Any], text: str) -> Message:
    """Pictures, videos and a question as training has them: a line for each picture."""
    parts: list[Any] = []
    for picture in seen:
        parts.append(picture)
        # frames announce themselves and end their lines (`Encoder.unrolled`)
        if not isinstance(picture, Video):
            parts.append("\n")

    # the text goes on the line that an image has opened
    if parts and isinstance(parts[-1], str):
        text = parts.pop() + text
    return Message("user", (*parts, text))


def answer_prompt(options: GenerateOptions) -> None:
    """Print the answer as it is written, or several when all are there.

    Raises ValueError and OSError for what a user did wrong.
    """
    for name in ("max_new", "samples"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")

    # mistakes first: a large model takes minutes to read
    pick_device(options.device)
    build_question(options, "")
    if options.show:
        check_page_path(options.show)
        if options.samples > 1:
            raise ValueError("--show looks into one answer: leave out --samples")
    model, tokenizer = load_model(options.model, options.device, torch_type(options.dtype))
    sample = build_question(options, tokenizer.think_prompt)
    encoder = Encoder(tokenizer, model.config)
    prompt = encoder.prompt(sample)

    sampling = {
        "max_new": options.max_new,
        "samples": options.samples,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    # several answers are printed when all are there
    if options.samples > 1:
        for answer in generate(model, [prompt], tokenizer.ends, **sampling):
            print(printable(tokenizer.decode_answer(answer.ids), lines=True))
        return

    # one answer is printed as it is written
    said: list[int] = []
    steps = stream(model, [prompt], tokenizer.ends, **sampling)
    ids = noted((int(picked) for _, picked, _ in steps), said)
    for piece in tokenizer.stream(i for i in ids if i not in tokenizer.ends):
        print(printable(piece, lines=True), end="", flush=True)
    print()

    if options.show:
        write_view(options.show, view_of(model, encoder, sample, said), options.prompt)
        print(f"where it looked: {options.show}", file=sys.stderr)


def noted(ids: Iterator[int], said: list[int]) -> Iterator[int]:
    """The same tokens; each is also written down."""
    for token in ids:
        said.append(token)
        yield token


if __name__ == "__main__":
    command(answer_prompt)
