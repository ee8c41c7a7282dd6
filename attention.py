"""Attention over packed documents: many sequences end to end in one row, none of which may see another.

What it teaches: block-diagonal attention needs no mask matrix. A row of documents with lengths 5, 3, 8 is described by
where each begins, `cu = [0, 5, 8, 16]`, and attention runs inside those borders only. Every attention in this project
(ViT, decoder, prefix-causal image pre-training, cached decoding) is handed to the model as a small function
`attend(layer, q, k, v)`, so that model files contain no masks, no caches and no devices.

A document may continue an earlier one: eight answers to one question see the question's keys, which are computed once.

Legend: S tokens of all documents laid end to end, H query heads, G key/value heads (H a multiple of G), D head size.

The choice, made in `packed_attention` alone:
  all equally long, none continues another
                               one batched SDPA call (the ViT on tiles), any device
  CUDA, half precision         `torch.nn.attention.varlen` (flash attention over `cu`)
  otherwise (CPU, NPU, MPS)    a Python loop of SDPA calls, one per document: exact everywhere, and on CPU several
                               times faster than a dense block-diagonal mask, because no score outside it is computed
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[
    [int, Tensor, Tensor, Tensor], Tensor
]  # (layer, q (S,H,D), k (S,G,D), v (S,G,D)) -> (S,H,D)


@dataclass(frozen=True)
class Segments:
    """Where documents begin in a packed sequence. `lengths` sum to S; `cu` (n+1,) int32 is their running sum.

    after: for each document the earlier one that it continues, itself where it begins afresh; empty when all do.
    """

    lengths: tuple[int, ...]
    cu: Tensor
    after: tuple[int, ...] = ()

    @staticmethod
    def of(lengths, device="cpu", after=()) -> "Segments":
        lengths, after = tuple(int(n) for n in lengths), tuple(after)
        assert all(n > 0 for n in lengths), f"empty document in a packed row: {lengths}"
        assert not after or len(after) == len(lengths), (
            f"{len(after)} documents continue one of {len(lengths)}"
        )
        assert all(0 <= p <= i and after[p] == p for i, p in enumerate(after)), (
            f"only a document that begins afresh can be continued: {after}"
        )
        return Segments(
            lengths, running(lengths).to(device), after if after != tuple(range(len(after))) else ()
        )

    def to(self, device) -> "Segments":
        return Segments(self.lengths, self.cu.to(device), self.after)

    def positions(self) -> Tensor:
        """(S,) int64, restarting at 0 in every document, going on where the continued one ends."""
        starts = [
            self.lengths[p] if p != i else 0
            for i, p in enumerate(self.after or range(len(self.lengths)))
        ]
        return torch.cat([torch.arange(at, at + n) for at, n in zip(starts, self.lengths)]).to(
            self.cu.device
        )

    @cached_property
    def keys(self) -> tuple[Tensor, "Segments"]:
        """What each document may see, those of the continued one first: flat places (K,), and how many for each."""
        spans = [range(end - n, end) for n, end in zip(self.lengths, accumulate(self.lengths))]
        seen = [
            [*spans[p], *own] if p != i else [*own]
            for i, (p, own) in enumerate(zip(self.after, spans))
        ]
        return torch.tensor(
            [at for part in seen for at in part], device=self.cu.device
        ), Segments.of(map(len, seen), self.cu.device)


def running(lengths: tuple[int, ...]) -> Tensor:
    """(n+1,) int32: 0 and the running sum."""
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    """SDPA on (B, L, H, D) inputs; key/value heads are shared by H / G query heads (GQA). Returns (B, L, H, D)."""
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **how
    ).transpose(1, 2)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Attention inside each document and the one that it continues. q (S, H, D), k and v (S, G, D) -> (S, H, D)."""
    lengths, seen, kind = segments.lengths, segments, q.device.type
    if torch.is_autocast_enabled(
        kind
    ):  # the norms of q and k leave them in the precision of their weights
        q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
    if segments.after:
        assert causal, "a document continues another only when attention is causal"
        places, seen = segments.keys
        k, v = k.index_select(0, places), v.index_select(0, places)
    elif len(set(lengths)) == 1:
        n, L = len(lengths), lengths[0]
        out = sdpa(
            *(t.reshape(n, L, *t.shape[1:]) for t in (q, k, v)), is_causal=causal
        )  # (n, L, H, D)
        return out.reshape(q.shape)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        repeat = q.shape[1] // k.shape[1]
        k, v = (
            (k, v)
            if repeat == 1
            else (k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
        )
        return varlen_attn(
            q,
            k,
            v,
            segments.cu,
            seen.cu,
            max(lengths),
            max(seen.lengths),
            window_size=(-1, 0 if causal else -1),
        )
    out = []
    for a, b, c in zip(q.split(lengths), k.split(seen.lengths), v.split(seen.lengths)):
        n, m = len(a), len(b)  # the last query sees all keys, the one before it all but one
        how = (
            {"is_causal": causal}
            if n == m
            else {"attn_mask": torch.ones(n, m, dtype=torch.bool, device=a.device).tril(m - n)}
        )
        out.append(sdpa(a[None], b[None], c[None], **how)[0])
    return torch.cat(out)


def attend_inside(segments: Segments, causal: bool) -> Attend:
    """The `attend` of training: every layer attends inside its own document."""
    return lambda layer, q, k, v: packed_attention(q, k, v, segments, causal)
