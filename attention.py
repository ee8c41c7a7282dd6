"""Attention over packed documents: many sequences end to end in one row, none of which may see another.

What it teaches: block-diagonal attention needs no mask matrix. A row of documents with lengths 5, 3, 8 is described by
where each begins, `cu = [0, 5, 8, 16]`, and attention runs inside those borders only. Every attention in this project
(ViT, decoder, prefix-causal image pre-training, cached decoding) is handed to the model as a small function
`attend(layer, q, k, v)`, so that model files contain no masks, no caches and no devices.

Legend: S tokens of all documents laid end to end, H query heads, G key/value heads (H a multiple of G), D head size.

The choice, made in `packed_attention` alone:
  all documents equally long   one batched SDPA call (the ViT on tiles), any device
  CUDA, half precision         `torch.nn.attention.varlen` (flash attention over `cu`)
  otherwise (CPU, NPU, MPS)    a Python loop of SDPA calls, one per document: exact everywhere, and on CPU several
                               times faster than a dense block-diagonal mask, because no score outside it is computed
"""
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q (S,H,D), k (S,G,D), v (S,G,D)) -> (S,H,D)


@dataclass(frozen=True)
class Segments:
    """Where documents begin in a packed sequence. `lengths` sum to S; `cu` (n+1,) int32 is their running sum."""
    lengths: tuple[int, ...]
    cu: Tensor

    @staticmethod
    def of(lengths, device="cpu") -> "Segments":
        lengths = tuple(int(n) for n in lengths)
        assert all(n > 0 for n in lengths), f"empty document in a packed row: {lengths}"
        cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu[1:] = torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0)
        return Segments(lengths, cu.to(device))

    def positions(self) -> Tensor:
        """(S,) int64, restarting at 0 in every document."""
        return torch.cat([torch.arange(n) for n in self.lengths]).to(self.cu.device)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    """SDPA on (B, L, H, D) inputs; key/value heads are shared by H / G query heads (GQA). Returns (B, L, H, D)."""
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **how).transpose(1, 2)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Attention inside each document only. q (S, H, D), k and v (S, G, D) -> (S, H, D)."""
    lengths = segments.lengths
    if len(set(lengths)) == 1:
        n, L = len(lengths), lengths[0]
        out = sdpa(*(t.reshape(n, L, *t.shape[1:]) for t in (q, k, v)), is_causal=causal)  # (n, L, H, D)
        return out.reshape(q.shape)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn
        repeat, longest = q.shape[1] // k.shape[1], max(lengths)
        k, v = (k, v) if repeat == 1 else (k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
        return varlen_attn(q, k, v, segments.cu, segments.cu, longest, longest, window_size=(-1, 0 if causal else -1))
    documents = zip(*(t.split(lengths) for t in (q, k, v)))
    return torch.cat([sdpa(a[None], b[None], c[None], is_causal=causal)[0] for a, b, c in documents])


def inside(segments: Segments, causal: bool) -> Attend:
    """The `attend` of training: every layer attends inside its own document."""
    return lambda layer, q, k, v: packed_attention(q, k, v, segments, causal)
