"""From a prompt to an answer: sampling with a static key/value cache.

What it teaches: decoding is the training forward, one token a row, with yesterday's keys and values kept. Prompts of all
lengths are prefilled packed (no padding is computed); the image and prompt of a question are run once and shared by all
samples of its group; rows that have ended are dropped, so late steps are small. The log-probability returned with each token
is that of the training forward at the same temperature.

    python generate.py --model runs/toy/final --image some.png --prompt "how many circles are there?"

Legend: P prompts, n samples each, B = P * n rows, T cache length, H query heads, G key/value heads, D head size.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal

import numpy as np
import torch
from torch import Tensor

from attention import Segments, packed_attention
from data.encode import Encoder
from data.images import normalise, open_image
from data.sample import Message, Sample
from tokenizer import Tokenizer
from vlm import SailVL


@dataclass(frozen=True)
class Answer:
    """One sampled continuation: ids (with the end token when `finished`), log-probability of each, prompt's index."""

    prompt: int
    ids: list[int]
    logprobs: list[float]
    finished: bool


class Cache:
    """Keys and values (layers, B, G, T, D). Columns before `prompt` hold the prompts, left-aligned; every step fills the next
    column of all rows, so that writing is a slice. `lengths` (B,) counts a row's tokens: the next one's position."""

    def __init__(self, llm, lengths: list[int], room: int, like: Tensor):
        c = llm.config
        self.prompt, self.steps = max(lengths), 0
        self.lengths = torch.tensor(lengths, device=like.device)
        shape = (
            c.num_hidden_layers,
            len(lengths),
            c.num_key_value_heads,
            self.prompt + room,
            c.head_dim,
        )
        kind = like.device.type
        dtype = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        )  # as training's attention has them
        self.k, self.v = like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)
        self.hidden = (
            torch.arange(shape[3], device=like.device) >= self.lengths[:, None]
        )  # (B, T): between prompt and answer
        self.hidden[:, self.prompt :] = False
        self.segments = Segments.of(lengths, like.device)
        self.rows, self.at = (
            torch.repeat_interleave(torch.arange(len(lengths), device=like.device), self.lengths),
            self.segments.positions(),
        )

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` for packed prompts (S tokens): store, then attend inside each prompt."""
        q, k, v = (t.to(self.k.dtype) for t in (q, k, v))
        self.k[layer, self.rows, :, self.at], self.v[layer, self.rows, :, self.at] = k, v
        return packed_attention(q, k, v, self.segments, causal=True)

    def step(self) -> Tensor:
        """Make ready for one more token a row; returns their positions (B,)."""
        self.steps, self.lengths = self.steps + 1, self.lengths + 1
        return self.lengths - 1

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` for one new token a row: q (B, H, D). The H/G query heads of a group share its keys uncopied. Two products
        and a softmax: for one query a row on a CPU half the time of the fused kernel under a mask."""
        T, q = self.prompt + self.steps, q.to(self.k.dtype)
        self.k[layer, :, :, T - 1], self.v[layer, :, :, T - 1] = k, v
        grouped = q.view(len(q), self.k.shape[2], -1, q.shape[-1])  # (B, G, H/G, D)
        scores = (grouped @ self.k[layer, :, :, :T].mT).float() * q.shape[
            -1
        ] ** -0.5  # (B, G, H/G, T)
        chances = scores.masked_fill_(self.hidden[:, None, None, :T], -torch.inf).softmax(-1)
        return (chances.to(q.dtype) @ self.v[layer, :, :, :T]).reshape(q.shape)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows."""
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)
        self.lengths, self.hidden = self.lengths[rows], self.hidden[rows]


def next_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator
) -> tuple[Tensor, Tensor]:
    """Next ids (B,) and their log-probabilities (B,). Temperature 0 is greedy, scored at temperature 1.

    The log-probability is of the full distribution at this temperature: train with top_k = 0 and top_p = 1.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        picked = logprobs.argmax(-1)
    else:
        allowed = logprobs
        if top_k:
            allowed = allowed.masked_fill(
                allowed < allowed.topk(min(top_k, allowed.shape[-1])).values[:, -1:], -torch.inf
            )
        if top_p < 1:
            ordered, where = allowed.softmax(-1).sort(descending=True)
            drop = ordered.cumsum(-1) - ordered > top_p
            allowed = allowed.masked_fill(drop.gather(-1, where.argsort(-1)), -torch.inf)
        # where a uniform number of (0, 1] falls among the summed probabilities: one draw a row (`multinomial` makes one a word).
        # A word of probability 0 adds nothing to the sum, so it is never the first to reach the number.
        exact = (
            torch.float64 if logits.device.type in ("cpu", "cuda") else torch.float32
        )  # others may lack fp64
        summed = allowed.softmax(-1).cumsum(-1, dtype=exact)
        drawn = 1 - torch.rand(
            len(summed), 1, dtype=exact, device=summed.device, generator=generator
        )
        picked = torch.searchsorted(summed, drawn * summed[:, -1:])[:, 0]
    return picked, logprobs.gather(-1, picked[:, None])[:, 0]


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
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens as they are chosen: each step yields (rows, ids, log-probabilities), (n,) each, of the rows that are still going.

    prompts: (ids, image arrays) each, as from `Encoder.prompt`. Rows `p * samples` and on answer prompt p. `end`: one stop token
    or several. `start` is appended to every prompt (e.g. `<think>`) and not part of the answer. Raises ValueError for no prompts.
    """
    if not prompts:
        raise ValueError("nothing to generate: no prompts")
    llm, device = model.language_model, model.language_model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = [list(p[0]) + list(start) for p in prompts]
    images = [array for p in prompts for array in p[1]]
    flat = torch.tensor([i for row in ids for i in row], device=device)
    pixels = normalise(images) if images else None
    pixels = (
        [i.to(device) for i in pixels]
        if isinstance(pixels, list)
        else None
        if pixels is None
        else pixels.to(device)
    )
    cache = Cache(llm, [len(row) for row in ids], max_new, llm.lm_head.weight)
    hidden = llm(
        model.embed(flat[None], pixels), cache.segments.positions(), cache.prefill
    )  # (S, C)
    last = hidden.index_select(0, (cache.segments.cu[1:] - 1).long())  # (P, C)
    rows = torch.arange(len(ids), device=device).repeat_interleave(samples)
    cache.select(rows)
    logits = llm.lm_head(last).index_select(
        0, rows
    )  # every sample of a group draws its own first token
    # an image token cannot be answered with: no pixels belong to it, so it ends the row, unfinished
    stops = torch.tensor([*ends(end), model.image_token_id], device=device)
    alive, ended = (
        torch.arange(len(rows), device=device),
        torch.zeros(len(rows), dtype=torch.bool, device=device),
    )  # of the cache's rows
    for t in range(max_new):
        picked, scores = next_token(logits, temperature, top_k, top_p, generator)
        going = ~ended
        yield alive[going], picked[going], scores[going]
        ended = ended | torch.isin(picked, stops)
        if t + 1 == max_new or bool(ended.all()):
            return
        if (
            ended.float().mean() > 0.25
        ):  # drop ended rows, but not at every step: each drop copies the cache
            keep = (~ended).nonzero()[:, 0]
            cache.select(keep)
            alive, picked, ended = alive[keep], picked[keep], ended[keep]
        logits = llm.lm_head(llm(llm.embed(picked), cache.step(), cache.decode))  # (B, V)


def ends(end: int | tuple[int, ...]) -> tuple[int, ...]:
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
) -> list[Answer]:
    """Whole answers, `samples` per prompt, in prompt order. Arguments and errors are those of `stream`."""
    B = len(prompts) * samples
    device = model.language_model.lm_head.weight.device
    out = torch.full((B, max_new), -1, dtype=torch.long, device=device)
    scores = torch.zeros(B, max_new, device=device)
    steps = stream(model, prompts, end, max_new, samples, temperature, top_k, top_p, seed, start)
    for t, (rows, picked, score) in enumerate(steps):
        out[rows, t], scores[rows, t] = picked, score
    counts = (out >= 0).sum(1).tolist()
    return [
        Answer(i // samples, row[:n], score[:n], row[n - 1] in ends(end))
        for i, (row, score, n) in enumerate(zip(out.tolist(), scores.tolist(), counts))
    ]


def load_model(
    directory, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[SailVL, Tokenizer]:
    """A model directory -> model and tokenizer that agree about the image token."""
    model, tokenizer = SailVL.from_pretrained(directory, dtype, device), Tokenizer.load(directory)
    model.image_token_id = tokenizer.image
    return model.eval(), tokenizer


@dataclass
class Ask:
    """Ask a model about images."""

    prompt: str
    model: Path = Path("runs/toy/final")
    image: tuple[Path, ...] = ()  # none, one or several
    think: bool = False  # ask for a chain of thought
    max_new: int = 256  # tokens
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    device: str = "cpu"  # cuda, npu, mps
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(o: Ask) -> int:
    model, tokenizer = load_model(o.model, o.device, getattr(torch, o.dtype))
    question = f"{o.prompt} {tokenizer.think_prompt}" if o.think else o.prompt
    parts = [p for path in o.image for p in (open_image(path), "\n")]
    encoder = Encoder(tokenizer, model.config)
    prompt = encoder.prompt(Sample((Message("user", (*parts, question)),)))
    how = (tokenizer.end, o.max_new, o.samples, o.temperature, o.top_k, o.top_p, o.seed)
    if o.samples == 1:  # print as it is written
        ids = (int(picked) for _, picked, _ in stream(model, [prompt], *how))
        for piece in tokenizer.stream(i for i in ids if i != tokenizer.end):
            print(piece, end="", flush=True)
        print()
    else:
        for answer in generate(model, [prompt], *how):
            print(tokenizer.decode(answer.ids[:-1] if answer.finished else answer.ids))
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Ask, config=(tyro.conf.FlagConversionOff,))))
