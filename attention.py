"""Attention over packed documents: many sequences end to end in one row, none of which may see another.

What it teaches: block-diagonal attention needs no mask matrix. A row of documents with lengths 5, 3
and 8 is described by where each begins, and attention runs inside those borders only. Every
attention in this project (ViT, decoder, prefix-causal image pre-training, cached decoding) is handed
to the model as a small function `attend(layer, q, k, v)`, so that model files contain no masks, no
caches and no devices.

    lengths    5          3      8                      three documents in one row
    cu      0          5      8                16       where each begins, and the end
            |A A A A A | B B B| C C C C C C C C|        A sees A, B sees B, C sees C

A document may continue an earlier one: eight answers to one question see the question's keys, which
are computed once.

    lengths  question 6, answer 4, answer 3      after = (0, 0, 0)
    keys     6           6 + 4     6 + 3         the second answer does not see the first

Legend: S tokens of all documents laid end to end, K keys that they see, H query heads, G key/value
heads (H a multiple of G), D head size.

The choice of an implementation, made in `packed_attention` alone:

    all equally long, none continues another    one batched SDPA call (the ViT on tiles), any device
    CUDA, half precision                        `torch.nn.attention.varlen` (flash attention over `cu`)
    an Ascend NPU, half precision               torch_npu's fused attention (kernels/npu.py; not run here)
    otherwise (CPU, MPS)                        SDPA, one call for each document: exact everywhere, and
                                                on a CPU several times faster than a dense
                                                block-diagonal mask, as no score outside it is computed
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (layer, q (S, H, D), k (S, G, D), v (S, G, D)) -> (S, H, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------- where documents begin


@dataclass(frozen=True)
class Segments:
    """Where documents begin in a packed sequence: build it with `Segments.of`.

    lengths: tokens of each of the n documents; they sum to S.
    cu: (n + 1,) int32, the running sum of the lengths from 0.
    after: for each document the earlier one that it continues, itself where it begins afresh;
        empty when all begin afresh.
    """

    lengths: tuple[int, ...]
    cu: Tensor
    after: tuple[int, ...] = ()

    @staticmethod
    def of(lengths, device="cpu", after=()) -> "Segments":
        lengths = tuple(int(n) for n in lengths)
        after = tuple(after)

        # What would be nonsense further down.
        assert all(n > 0 for n in lengths), f"empty document in a packed row: {lengths}"
        assert not after or len(after) == len(lengths), (
            f"{len(after)} documents continue one of {len(lengths)}"
        )
        for document, parent in enumerate(after):
            assert 0 <= parent <= document and after[parent] == parent, (
                f"only a document that begins afresh can be continued: {after}"
            )

        # Nothing continues anything: the same as saying nothing.
        if after == tuple(range(len(after))):
            after = ()
        return Segments(lengths, running_sum(lengths).to(device, non_blocking=True), after)

    def to(self, device) -> "Segments":
        return Segments(self.lengths, self.cu.to(device, non_blocking=True), self.after)

    def positions(self) -> Tensor:
        """(S,) int64: from 0 in every document, or from where the continued one ends."""
        parts = []
        for document, length in enumerate(self.lengths):
            # The continued document has 0 to its length - 1 already.
            parent = self.after[document] if self.after else document
            start = self.lengths[parent] if parent != document else 0
            parts.append(torch.arange(start, start + length))
        return torch.cat(parts).to(self.cu.device, non_blocking=True)

    @cached_property
    def keys(self) -> tuple[Tensor, "Segments"]:
        """What each document may see: the keys of the one that it continues, then its own.

        Returns their places in the packed sequence, (K,) int64, and how many each document sees.
        """
        # Where each document's own keys lie.
        ends = accumulate(self.lengths)
        spans = [range(end - length, end) for end, length in zip(ends, self.lengths)]

        # One after the other, with those of a continued document once for each that continues it.
        places = []
        counts = []
        for document, parent in enumerate(self.after):
            visible = [*spans[document]]
            if parent != document:
                visible = [*spans[parent], *visible]
            places += visible
            counts.append(len(visible))
        device = self.cu.device
        return torch.tensor(places).to(device, non_blocking=True), Segments.of(counts, device)


def running_sum(lengths: tuple[int, ...]) -> Tensor:
    """(n,) numbers -> (n + 1,) int32: 0, then their running sum."""
    total = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return F.pad(total, (1, 0))


# ------------------------------------------------------------------------------------- attention


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Attention inside each document and the one that it continues.

    q (S, H, D), k and v (S, G, D) -> (S, H, D).
    """
    # One precision for all three: the norms of q and k leave them in that of their own weights.
    device = q.device.type
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        q = q.to(half)
        k = k.to(half)
        v = v.to(half)

    # The keys that each document sees: its own, or those of the document that it continues as well.
    visible = segments
    if segments.after:
        assert causal, "a document continues another only when attention is causal"
        places, visible = segments.keys
        k = k.index_select(0, places)  # (K, G, D)
        v = v.index_select(0, places)

    # The fastest way that this device and these documents allow.
    if len(set(segments.lengths)) == 1 and not segments.after:
        return attend_as_batch(q, k, v, len(segments.lengths), causal)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.is_cuda and half:
        return attend_by_flash(q, k, v, segments, visible, causal)
    if q.device.type == "npu" and half:
        from kernels.npu import attend_by_npu  # other devices have no use for it

        return attend_by_npu(q, k, v, segments, visible, causal)
    return attend_one_by_one(q, k, v, segments, visible, causal)


def attend_as_batch(q: Tensor, k: Tensor, v: Tensor, documents: int, causal: bool) -> Tensor:
    """Documents of one length L are a batch: (documents * L, heads, D) -> the same."""
    q_batch, k_batch, v_batch = (t.unflatten(0, (documents, -1)) for t in (q, k, v))
    return sdpa(q_batch, k_batch, v_batch, is_causal=causal).reshape(q.shape)


def attend_by_flash(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, visible: Segments, causal: bool
) -> Tensor:
    """One flash-attention call over the borders. CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn  # other devices need not have it

    k, v = share_heads(k, v, q.shape[1], dim=1)
    window = (-1, 0) if causal else (-1, -1)  # how far to look back and ahead; -1: no limit
    return varlen_attn(
        q,
        k,
        v,
        segments.cu,
        visible.cu,
        max(segments.lengths),
        max(visible.lengths),
        window_size=window,
    )


def attend_one_by_one(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, visible: Segments, causal: bool
) -> Tensor:
    """One SDPA call for each document. Any device and precision."""
    # Cut once, and nothing else done for each document: on a CPU the call itself is half of the cost.
    queries = q[None].split(segments.lengths, dim=1)  # (1, L, H, D) of each document
    keys = k[None].split(visible.lengths, dim=1)
    values = v[None].split(visible.lengths, dim=1)
    out = []
    for query, key, value in zip(queries, keys, values):
        length = query.shape[1]
        seen = key.shape[1]
        if length == seen:
            mask = {"is_causal": causal}
        else:
            # The last query sees all keys, the one before it all but the last, and so on.
            square = torch.ones(length, seen, dtype=torch.bool, device=q.device)
            mask = {"attn_mask": square.tril(seen - length)}
        out.append(sdpa(query, key, value, **mask))
    return torch.cat(out, dim=1)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    """PyTorch's attention on q (B, L, H, D), k and v (B, M, G, D) -> (B, L, H, D).

    mask: `is_causal` or `attn_mask` of `scaled_dot_product_attention`.
    """
    # A CPU's kernel reads a shared head where it lies; some of the others would leave their fast path.
    shared = q.is_cpu
    if not shared:
        k, v = share_heads(k, v, q.shape[2], dim=2)

    # It wants heads before positions.
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=shared, **mask
    )
    return out.transpose(1, 2)


def share_heads(k: Tensor, v: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Grouped queries: each key/value head in `dim` serves heads / G neighbouring query heads."""
    repeat = heads // k.shape[dim]
    if repeat == 1:
        return k, v
    return k.repeat_interleave(repeat, dim), v.repeat_interleave(repeat, dim)


def attend_inside(segments: Segments, causal: bool) -> Attend:
    """The `attend` of training: every layer attends inside its own documents."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, segments, causal)

    return attend
