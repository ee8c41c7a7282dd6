"""Mixture of experts: each token is sent to K of E feed-forwards.

What it teaches: routing (softmax over all experts in fp32, keep the best K, optionally re-normalise), the balance loss
that keeps experts alive, and why the fast path is a sort: once tokens are ordered by expert, E small matrix products over
ragged groups become one grouped matrix product.

Legend: S tokens, C model width, E experts, K experts per token, I expert width.
Sources: Qwen3-MoE as released; SAIL-VL2 section 2.2 (which names "auxiliary load-balancing loss and average activation
across ranks" and gives no formula: the loss below is the standard one of Switch / Qwen3-MoE).

`expert_mixture` is the plain reference, readable and float64-able; `expert_mixture_grouped` is the fast path with the same
signature; `choose` is the one place that picks. A test compares outputs and gradients.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Routing:
    """One layer's decision: logits (S, E) fp32, indices (S, K) int64, weights (S, K)."""
    logits: Tensor
    indices: Tensor
    weights: Tensor


class Replay(list):
    """A routing list that also says which experts to use: `choices`, per layer (S, K) as an earlier forward chose them. Only
    the selection is replayed; the weights come from the present router, which would get no gradient otherwise."""

    def __init__(self, choices: list[Tensor]):
        super().__init__()
        self.choices = choices

    def moved(self) -> float:
        """Share of the replayed choices that the present router would not make."""
        own = [r.logits.topk(c.shape[1], dim=-1).indices for r, c in zip(self, self.choices, strict=True)]
        same = [(c[:, :, None] == o[:, None]).any(2).float().mean() for c, o in zip(self.choices, own)]
        return 1 - float(sum(same)) / len(same)


def route(logits: Tensor, k: int, normalise: bool, given: Tensor | None = None) -> Routing:
    """Qwen3 semantics: softmax over all E in fp32, top K (or the `given` (S, K)), optionally re-normalised to sum 1.

    Raises ValueError for K = 1 with re-normalisation: the single weight is then always 1, and the router would get no
    gradient from the task (seen in the wild as a router that never learns).
    """
    if k == 1 and normalise:
        raise ValueError("num_experts_per_tok=1 with norm_topk_prob=True: the kept weight is always 1, so the router gets "
                         "no task gradient; set norm_topk_prob=False or use at least 2 experts per token")
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    shares = wide.softmax(-1)
    weights, indices = shares.topk(k, dim=-1) if given is None else (shares.gather(-1, given), given)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(wide, indices, weights)


def expert_mixture(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition. x (S, C), gate_up (E, 2I, C), down (E, C, I) -> (S, C): sum over k of w_k * expert_k(x)."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = (indices == e).nonzero(as_tuple=True)
        gate, up = (x.index_select(0, token) @ gate_up[e].T).chunk(2, dim=-1)  # (n_e, I) each
        y = (F.silu(gate) * up) @ down[e].T  # (n_e, C)
        out = out.index_add(0, token, y * weights[token, slot, None].to(y.dtype))
    return out


def expert_mixture_grouped(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same by one sort and two grouped matrix products; expert e owns the sorted rows offs[e-1]:offs[e]."""
    S, K = indices.shape
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)  # (S*K,) slots sorted by expert
    offs = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    rows = x.index_select(0, order // K)  # (S*K, C)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offs)  # (S*K, C)
    back = y.index_select(0, order.argsort())  # inverse permutation: slot order again, no scatter, deterministic
    return (back.view(S, K, -1) * weights[..., None].to(y.dtype)).sum(1)


def choose(x: Tensor, gate_up: Tensor, down: Tensor):
    """Grouped products want 16-byte strides and no float64; everything else takes the reference."""
    aligned = all(n * x.element_size() % 16 == 0 for n in (x.shape[1], down.shape[2]))
    return expert_mixture_grouped if aligned and x.dtype != torch.float64 and x.shape[0] else expert_mixture


class Experts(nn.Module):
    """Stacked weights: one tensor for all gates and ups, one for all downs."""

    def __init__(self, E: int, C: int, I: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, I))


class MoE(nn.Module):
    """Drop-in for `llm.FeedForward`. Parameter names follow Qwen3-MoE: `gate` is the router."""

    def __init__(self, c):
        super().__init__()
        self.top_k, self.normalise = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = Experts(c.num_experts, c.hidden_size, c.moe_intermediate_size)

    def forward(self, x: Tensor, routing: list | None = None) -> Tensor:
        given = routing.choices[len(routing)] if isinstance(routing, Replay) else None
        r = route(self.gate(x), self.top_k, self.normalise, given)
        if routing is not None:
            routing.append(r)
        w = self.experts
        return choose(x, w.gate_up_proj, w.down_proj)(x, r.indices, r.weights, w.gate_up_proj, w.down_proj)


def expert_load(indices: Tensor, experts: int) -> Tensor:
    """(E,) share of the routed slots that each expert received; sums to 1."""
    return torch.bincount(indices.reshape(-1), minlength=experts).float() / max(indices.numel(), 1)


def balance_loss(routing: list[Routing], keep: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e over the tokens of all layers together, as in Qwen3-MoE: K at perfect balance, more when skewed.

    f_e counts how often expert e was chosen per token (it sums to K), P_e is its mean probability. `keep` (S,) bool leaves
    padding out.
    """
    logits = torch.cat([r.logits if keep is None else r.logits[keep] for r in routing])
    chosen = torch.cat([r.indices if keep is None else r.indices[keep] for r in routing])
    E, tokens = logits.shape[-1], logits.shape[0]
    f = torch.bincount(chosen.reshape(-1), minlength=E).to(logits.dtype) / tokens
    return E * (f * logits.softmax(-1).mean(0)).sum()


@torch.no_grad()
def upcycle(dense: nn.Module, moe: MoE) -> None:
    """Start a MoE layer from a dense one without changing what it computes (our choice; the paper starts from released MoEs).

    Every expert is a whole copy of the dense layer. The kept weights sum to 1, so any top-K of equal experts gives the dense
    output, whatever the router says; training then drives the copies apart.
    """
    assert moe.normalise, "exact upcycling needs weights that sum to 1 (norm_topk_prob)"
    gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])  # (2I, C)
    assert moe.experts.gate_up_proj.shape[1:] == gate_up.shape, "upcycling copies whole experts: equal widths wanted"
    moe.experts.gate_up_proj.copy_(gate_up.expand_as(moe.experts.gate_up_proj))
    moe.experts.down_proj.copy_(dense.down_proj.weight.expand_as(moe.experts.down_proj))
