"""Continuous batching: rows join and leave between any two steps, and nobody waits for another's end.

What it teaches: a step of decoding takes nearly as long for one row as for sixteen, since what takes
the time is to read the weights (of a small model on a CPU: to call the operators). So everyone who
asks should share every step. But people come and go at different moments: a batch that is filled once
and run to its end keeps newcomers waiting, and computes rows that have ended. Here a *turn* lets go
of who has left, lets in who waits, and makes one token for each row.

    turn     1   2   3   4   5   6   7
    Ann      P   a   a   a   a                 P: the prompt, packed with those of the same turn,
    Bob          P   b   b   b   b                and the first token of the answer
    Cy                   =   c   c   c         =: Bob's question again: his prompt's keys are copied
    rows     1   2   2   3   3   2   1

The cache is claimed whole at the start, so a full house cannot run out of memory. A row is a slot of
it with a length of its own; the rows that live are the first ones, so a step reads a plain slice.

    slot 0   a b c d e x y . . . .     Ann: prompt, answer          Ann leaves:
    slot 1   f g h x . . . . . . .     Bob                          the last row moves into her
    slot 2   i j k l m n o x y z .     Dee                          slot, and its own is free

Every row is sampled by its own rule and from its own seed. A row's arithmetic does not depend on who
else is there but for the order in which floating-point sums are added up, so at temperature 0 it says
what it would say alone, as long as no two words are likelier than all others by the same last bit.

The model belongs to one thread, `Batcher.run`; everyone else speaks to it through `submit`, `Ask.gone`
and the function that the ask brings.

Simplified: keys lie in one piece for each row (vLLM pages them, so that a short answer does not hold
a long row); prompts are shared when equal, not when they begin alike; a long prompt is one forward,
while which the others wait (`prefill` limits how many are taken together).

Legend: R slots, n rows that live, T columns, S tokens of the prompts of a turn, H query heads, G
key/value heads, D head size, V words.
"""

import hashlib
import logging
import math
import threading
from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from attention import Attend, Segments, packed_attention
from generate import attend_cached, next_token, prompt_logits
from serving.transcript import TokenScore, Transcript
from talk.inside import Inside, look_inside
from tokenizer import Tokenizer
from vlm import SailVL


@dataclass(frozen=True)
class Delta:
    """What one turn adds to an answer. made: tokens so far, with the one that ended it.

    finish: None while it goes on; "stop" at its end or a stop string, "length" at its limit, "error"
    when the model failed. inside: with the last one, where the answer looked, if that was asked.
    """

    text: str
    tokens: tuple[TokenScore, ...]
    made: int
    finish: str | None = None
    inside: Inside | None = None

    def then(self, new: "Delta") -> "Delta":
        """Both as one."""
        return replace(new, text=self.text + new.text, tokens=self.tokens + new.tokens)


@dataclass(eq=False)
class Ask:
    """One answer that somebody wants.

    ids and images: a prompt, as from `Encoder.prompt`. say: called with every Delta, in the model's
    thread, and must return at once. likeliest: how many alternatives are told with each token.
    endless: go on past the end, for measuring. inside: look at the whole answer once more when it has
    ended (a forward of its own, for which all wait as for a prompt). gone: set it from any thread when
    nobody listens any more; the row leaves before the next step.
    """

    ids: list[int]
    images: list[np.ndarray]
    say: Callable[[Delta], None]
    max_new: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    likeliest: int = 0
    endless: bool = False
    inside: bool = False
    gone: bool = False

    @cached_property
    def prompt(self) -> bytes:
        """Equal for equal prompts: a digest of ids and pixels."""
        digest = hashlib.sha256(np.array(self.ids, dtype=np.int64).tobytes())
        for image in self.images:
            digest.update(repr(image.shape).encode())
            digest.update(np.ascontiguousarray(image))
        return digest.digest()


@dataclass
class BatchCounts:
    """What a batcher has done since it was made."""

    steps: int = 0
    row_steps: int = 0  # rows of all steps
    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # copied from an equal prompt
    answer_tokens: int = 0
    answers: int = 0  # that came to their end
    left: int = 0  # that nobody waited for
    failed: int = 0


# --------------------------------------------------------------------------------------------- cache


class SlotCache:
    """Keys and values (layers, R, G, T, D) of R slots; `lengths`: columns in use of each."""

    def __init__(self, llm, slots: int, columns: int):
        config = llm.config
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, slots, heads, columns, config.head_dim)
        self.k = llm.lm_head.weight.new_zeros(shape, requires_grad=False)
        self.v = torch.zeros_like(self.k)
        self.slots = slots
        self.columns = columns
        self.lengths = [0] * slots

    def nbytes(self) -> int:
        """Of memory."""
        return self.k.nbytes + self.v.nbytes

    def prefilling(self, slots: list[int], segments: Segments) -> Attend:
        """An `attend` for packed prompts (S tokens), one for each of these slots."""
        device = self.k.device
        lengths = torch.tensor(segments.lengths, device=device)
        rows = torch.tensor(slots, device=device).repeat_interleave(lengths)  # (S,)
        at = segments.positions()  # (S,)
        for slot, length in zip(slots, segments.lengths, strict=True):
            self.lengths[slot] = length

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k = k.to(self.k.dtype)
            v = v.to(self.v.dtype)
            self.k[layer, rows, :, at] = k
            self.v[layer, rows, :, at] = v
            return packed_attention(q.to(k.dtype), k, v, segments, causal=True)

        return attend

    def stepping(self, n: int) -> tuple[Tensor, Attend]:
        """Positions (n,) of one more token in each of the first n slots, and the `attend` for them."""
        # the new token's column is its position
        device = self.k.device
        at = torch.tensor(self.lengths[:n], device=device)
        T = max(self.lengths[:n]) + 1
        hidden = torch.arange(T, device=device) > at[:, None]  # (n, T)
        bias = self.k.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        for slot in range(n):
            self.lengths[slot] += 1

        # a layer's slots, heads and columns as one long list: where in it the new ones go, (n * G,)
        G, columns, D = self.k.shape[2:]
        heads = torch.arange(n * G, device=device).view(n, G)
        places = (heads * columns + at[:, None]).flatten()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer].view(-1, D).index_copy_(0, places, k.reshape(-1, D).to(self.k.dtype))
            self.v[layer].view(-1, D).index_copy_(0, places, v.reshape(-1, D).to(self.v.dtype))
            keys = self.k[layer, :n, :, :T]  # (n, G, T, D)
            values = self.v[layer, :n, :, :T]
            return attend_cached(q, keys, values, bias)

        return at, attend

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one slot into another, which is free."""
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]
        self.lengths[target] = length

    def clear(self, slot: int) -> None:
        """Free a slot. Zeros, since a column that is not seen still takes part: as its key less
        infinity, and as 0 times its value."""
        length = self.lengths[slot]
        self.k[:, slot, :, :length] = 0
        self.v[:, slot, :, :length] = 0
        self.lengths[slot] = 0


# ---------------------------------------------------------------------------------------------- rows


class Row:
    """An answer that is being written. first (V,): the logits after its prompt, for whoever asks the
    same while it lives."""

    def __init__(self, ask: Ask, first: Tensor, tokenizer: Tokenizer, stops: tuple[int, ...]):
        self.ask = ask
        self.first = first
        self.stops = stops
        self.transcript = Transcript(tokenizer, ask.stop)
        self.generator = torch.Generator(first.device).manual_seed(ask.seed)
        self.ids: list[int] = []  # the answer; the cache does not have its newest token yet
        self.finish: str | None = None

    def take(self, token: int, logprob: float, likeliest: list[tuple[int, float]]) -> Delta:
        """Write down one more token: what can be said now. One whose log-probability is nan (its
        logits were not finite) ends the row with an error."""
        self.ids.append(token)
        if math.isnan(logprob):
            self.finish = "error"
        elif token in self.stops:
            self.finish = "stop"
        else:
            self.transcript.add(token, logprob, likeliest)
            if self.transcript.stopped:
                self.finish = "stop"
            elif len(self.ids) == self.ask.max_new:
                self.finish = "length"

        text, tokens = self.transcript.take(last=self.finish is not None)
        return Delta(text, tokens, len(self.ids), self.finish)


def pick_tokens(rows: list[Row], logits: Tensor) -> tuple[list[int], list[float]]:
    """Every row's next token and its log-probability, from logits (n, V): what `next_token` picks
    for that row alone. The greedy ones in one call, the others each by its own rule and seed.

    A row whose logits are not finite has nan for its log-probability, and costs itself alone.
    """
    ids, scores = next_token(logits, 0.0, 0, 1.0, None)
    for i, row in enumerate(rows):
        ask = row.ask
        if ask.temperature == 0:
            continue

        # what is drawn from must be a distribution
        own = logits[i : i + 1]
        broken = ~own.isfinite().all()
        rule = (ask.temperature, ask.top_k, ask.top_p, row.generator)
        token, score = next_token(own.masked_fill(broken, 0), *rule)
        ids[i : i + 1] = token
        scores[i : i + 1] = score.masked_fill(broken, torch.nan)
    return ids.tolist(), scores.tolist()


def likeliest_of(ask: Ask, logits: Tensor) -> list[tuple[int, float]]:
    """The likeliest words of logits (V,) with their log-probabilities, as many as are asked for."""
    logprobs = (logits.float() / (ask.temperature or 1.0)).log_softmax(-1)
    best = logprobs.topk(min(ask.likeliest, len(logprobs)))
    return list(zip(best.indices.tolist(), best.values.tolist()))


# ------------------------------------------------------------------------------------------- batcher


class Batcher:
    """Answers whoever asks, `slots` at a time: `submit` from any thread, `run` in one of its own.

    columns: tokens that a prompt and its answer may have together. prefill: tokens of prompts that
    one turn computes (a longer one is computed alone). told: called when a turn has said all that it
    has to say, so that whoever listens can be woken once.
    """

    def __init__(
        self,
        model: SailVL,
        tokenizer: Tokenizer,
        slots: int = 16,
        columns: int = 4096,
        prefill: int = 4096,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.prefill = prefill
        self.cache = SlotCache(model.language_model, slots, columns)
        self.rows: list[Row] = []  # row i lives in slot i
        self.counts = BatchCounts()
        self.told: Callable[[], None] = lambda: None

        # what other threads touch, under this lock
        self.lock = threading.Condition()
        self.waiting: deque[Ask] = deque()
        self.closed = False

    # ---------------------------------------------------------------------------- from any thread

    def submit(self, asks: list[Ask]) -> None:
        """Get in line. When the batcher is closed, they are told at once that there is no answer."""
        for ask in asks:
            room = self.cache.columns - len(ask.ids)
            assert 0 < ask.max_new <= room, f"{ask.max_new} tokens for a prompt that leaves {room}"
        with self.lock:
            welcome = not self.closed
            if welcome:
                self.waiting.extend(asks)
                self.lock.notify()
        if not welcome:
            self.fail(asks, None)

    def close(self) -> None:
        """End `run` after its turn; what is unfinished ends with an error."""
        with self.lock:
            self.closed = True
            self.lock.notify()

    # -------------------------------------------------------------------------- the model's thread

    def run(self) -> None:
        """Turn after turn while there is something to do, until `close`."""
        try:
            while self.has_work():
                try:
                    self.turn()
                except Exception as error:  # whatever it is, the next ones are to be answered
                    self.fail([row.ask for row in self.rows], error)
                    self.forget(range(len(self.rows)))
        finally:
            # nobody is left waiting
            self.close()
            self.fail([*(row.ask for row in self.rows), *self.waiting], None)
            self.forget(range(len(self.rows)))

    def has_work(self) -> bool:
        """Waits until somebody asks; False when closed."""
        with self.lock:
            self.lock.wait_for(lambda: self.closed or self.waiting or self.rows)
            return not self.closed

    @torch.inference_mode()
    def turn(self) -> None:
        """Let go, let in, and one token for each row."""
        gone = [slot for slot, row in enumerate(self.rows) if row.ask.gone]
        self.counts.left += len(gone)
        self.forget(gone)

        asks = self.next_in_line()
        if asks:
            self.let_in(asks)
        if self.rows:
            self.step()
        self.told()

    def next_in_line(self) -> list[Ask]:
        """Those who can join now: as many as slots are free, and as a turn may prefill."""
        free = self.cache.slots - len(self.rows)
        known = {row.ask.prompt for row in self.rows}
        tokens = 0
        asks: list[Ask] = []
        with self.lock:
            while self.waiting and len(asks) < free:
                ask = self.waiting[0]
                cost = 0 if ask.prompt in known else len(ask.ids)
                if asks and tokens + cost > self.prefill:
                    break
                self.waiting.popleft()
                if ask.gone:
                    self.counts.left += 1
                    continue
                tokens += cost
                known.add(ask.prompt)
                asks.append(ask)
        return asks

    def let_in(self, asks: list[Ask]) -> None:
        """A slot for each, prompts computed where they are new; everyone's first token."""
        # where each prompt's keys are, or will be
        start = len(self.rows)
        home = {row.ask.prompt: slot for slot, row in enumerate(self.rows)}
        fresh: dict[int, Ask] = {}
        for slot, ask in enumerate(asks, start):
            if ask.prompt not in home:
                home[ask.prompt] = slot
                fresh[slot] = ask

        # the others copy; these asks stand in no line any more, so here a fault must be told to them
        first = {slot: row.first for slot, row in enumerate(self.rows)}
        joined: list[Row] = []
        try:
            if fresh:
                first |= self.prefill_slots(fresh)
            for slot, ask in enumerate(asks, start):
                source = home[ask.prompt]
                if source != slot:
                    self.cache.copy(source, slot, len(ask.ids))
                    self.counts.shared_tokens += len(ask.ids)
                joined.append(Row(ask, first[source], self.tokenizer, self.stops_of(ask)))
        except Exception as error:  # whatever a prompt does to the model, those who live go on
            self.fail(asks, error)
            for slot in range(start, start + len(asks)):
                self.cache.clear(slot)
            return
        self.rows += joined
        self.take_tokens(joined, torch.stack([row.first for row in joined]))

    def stops_of(self, ask: Ask) -> tuple[int, ...]:
        """Tokens that end an answer; an image's place is one, since no pixels belong to it."""
        ends = () if ask.endless else self.tokenizer.ends
        return (*ends, self.model.image_token_id)

    def prefill_slots(self, fresh: dict[int, Ask]) -> dict[int, Tensor]:
        """One packed forward over the prompts: slot -> logits (V,) of what follows."""
        asks = list(fresh.values())
        segments = Segments.of([len(ask.ids) for ask in asks], self.cache.k.device)
        attend = self.cache.prefilling(list(fresh), segments)
        images = [image for ask in asks for image in ask.images]
        ids = [ask.ids for ask in asks]
        logits = prompt_logits(self.model, ids, images, segments, attend)  # (P, V)
        self.counts.prompt_tokens += sum(segments.lengths)
        return dict(zip(fresh, logits))

    def step(self) -> None:
        """One token for each row."""
        llm = self.model.language_model
        last = torch.tensor([row.ids[-1] for row in self.rows], device=self.cache.k.device)  # (n,)
        positions, attend = self.cache.stepping(len(self.rows))
        logits = llm.lm_head(llm(llm.embed(last), positions, attend))  # (n, V)
        self.counts.steps += 1
        self.counts.row_steps += len(self.rows)
        self.take_tokens(self.rows, logits)

    def take_tokens(self, rows: list[Row], logits: Tensor) -> None:
        """Each row's next token from logits (n, V); rows that end leave."""
        ids, scores = pick_tokens(rows, logits)
        for i, row in enumerate(rows):
            likeliest = likeliest_of(row.ask, logits[i]) if row.ask.likeliest else []
            delta = row.take(ids[i], scores[i], likeliest)
            if row.ask.inside and delta.finish in ("stop", "length"):
                delta = replace(delta, inside=self.look_back(row))
            if delta.text or delta.tokens or delta.finish:
                row.ask.say(delta)
        self.counts.answer_tokens += len(rows)
        ended = [slot for slot, row in enumerate(self.rows) if row.finish]
        failed = sum(self.rows[slot].finish == "error" for slot in ended)
        self.counts.failed += failed
        self.counts.answers += len(ended) - failed
        self.forget(ended)

    def look_back(self, row: Row) -> Inside | None:
        """An answer seen from inside; None when that fails, which costs neither it nor the others."""
        try:
            return look_inside(self.model, (row.ask.ids, row.ask.images), row.ids)
        except Exception as error:  # the forward of a long answer may find no memory
            logging.getLogger(__name__).error("an answer could not be looked into", exc_info=error)
            return None

    def forget(self, slots: Iterable[int]) -> None:
        """Rows leave: from the highest slot down, the last row takes the place of each."""
        for slot in sorted(slots, reverse=True):
            last = len(self.rows) - 1
            self.cache.clear(slot)
            if slot != last:
                self.cache.copy(last, slot, self.cache.lengths[last])
                self.cache.clear(last)
            self.rows[slot] = self.rows[last]
            self.rows.pop()

    def fail(self, asks: list[Ask], error: Exception | None) -> None:
        """Tell these that there is no answer; None: because it is closed."""
        if error is not None:
            logging.getLogger(__name__).error("the model failed on a request", exc_info=error)
        self.counts.failed += len(asks)
        for ask in asks:
            ask.say(Delta("", (), 0, "error"))
        self.told()
