"""Mixture of experts: each token is sent to K of E feed-forwards.

What it teaches: routing (softmax over all experts in fp32, keep the best K, optionally re-normalise), the losses that keep
experts alive, and why the fast path is a sort: once slots are ordered by expert, E small matrix products over ragged groups
become one grouped matrix product, and its backward pass needs nothing but x, z and the order.

    x -> gate -> logits -> softmax -> top K: indices, weights
    slots (S*K) sorted by expert -> z = x W13^T -> a = silu(gate) up -> y = a W2^T -> weighted sum of a token's K rows

Legend: S tokens, C model width, E experts, K experts per token, I expert width; a slot is (token, k), a row its place after
sorting. gate_up W13 (E, 2I, C), gates first; down W2 (E, C, I); z (S*K, 2I).
Sources: Qwen3-MoE as released; SAIL-VL2 section 2.2 (which names "auxiliary load-balancing loss and average activation
across ranks" and gives no formula: the loss below is the standard one of Switch / Qwen3-MoE).

Three ways to compute the same, one signature, and `choose` is the one place that picks: `expert_mixture` is the definition
(float64-able; it also decodes, as it reads only the experts that were hit), `expert_mixture_grouped` is one autograd function
around grouped products, `kernels.moe_triton` the same on a GPU. Tests compare outputs and all gradients.
`python -m kernels.bench --cpu` measures them against transformers' implementations.
"""

import importlib.util
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
        self.choices, self.places = choices, {}

    def given(self, layer: object) -> Tensor:
        """A layer's choices: the next ones when it first asks, the same ones when its activations are recomputed."""
        return self.choices[self.places.setdefault(id(layer), len(self.places))]

    def rerouted_share(self) -> float:
        """Share of the replayed choices that the present router would not make."""
        own = [
            r.logits.topk(c.shape[1], dim=-1).indices
            for r, c in zip(self, self.choices, strict=True)
        ]
        same = [
            (c[:, :, None] == o[:, None]).any(2).float().mean() for c, o in zip(self.choices, own)
        ]
        return 1 - float(sum(same)) / len(same)


def route(
    logits: Tensor, k: int, normalise: bool, given: Tensor | None = None, bias: Tensor | None = None
) -> Routing:
    """Qwen3 semantics: softmax over all E in fp32, top K (or the `given` (S, K)), optionally re-normalised to sum 1.

    A `bias` (E,) moves the choice only, never the weights (balancing without a loss, see `update_expert_bias`).
    Raises ValueError for K = 1 with re-normalisation: the single weight is then always 1, and the router would get no
    gradient from the task (seen in the wild as a router that never learns).
    """
    if k == 1 and normalise:
        raise ValueError(
            "num_experts_per_tok=1 with norm_topk_prob=True: the kept weight is always 1, so the router gets "
            "no task gradient; set norm_topk_prob=False or use at least 2 experts per token"
        )
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    shares = wide.softmax(-1)
    if given is None:
        given = (shares if bias is None else shares + bias).topk(k, dim=-1).indices
    weights = shares.gather(-1, given)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(wide, given, weights)


def expert_mixture(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The definition. x (S, C), gate_up (E, 2I, C), down (E, C, I) -> (S, C): sum over k of w_k * expert_k(x)."""
    out = torch.zeros_like(x)
    for e in indices.unique().tolist():  # an expert without tokens is not even read
        token, slot = (indices == e).nonzero(as_tuple=True)
        gate, up = (x.index_select(0, token) @ gate_up[e].T).chunk(2, dim=-1)  # (n_e, I) each
        y = (F.silu(gate) * up) @ down[e].T  # (n_e, C)
        out = out.index_add(0, token, y * weights[token, slot, None].to(y.dtype))
    return out


class GroupedExperts(torch.autograd.Function):
    """Sort, two grouped products, weighted sum. Expert e owns the sorted rows offs[e-1]:offs[e].

    Autograd would keep the sorted copy of x, silu(gate), a and y as well; this keeps x and z and computes the rest again.
    The gradient of a routing weight is <dO, y> = <dO W2, a>: the second form needs no y.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        flat = indices.reshape(-1)
        order = flat.argsort(stable=True)  # (S*K,) row -> slot
        inverse = (
            torch.empty_like(order)
            .scatter_(0, order, torch.arange(len(order), device=order.device))
            .view_as(indices)
        )
        offs = torch.bincount(flat, minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
        z = F.grouped_mm(
            x.index_select(0, order // indices.shape[1]), gate_up.transpose(1, 2), offs=offs
        )  # (S*K, 2I)
        gate, up = z.chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate).mul_(up), down.transpose(1, 2), offs=offs)  # (S*K, C)
        ctx.save_for_backward(x, z, weights, order, inverse, offs, gate_up, down)
        return combine_slots(y, inverse, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, z, weights, order, inverse, offs, gate_up, down = ctx.saved_tensors
        token, s = order // weights.shape[1], weights.reshape(-1)[order, None].to(x.dtype)
        gate, up = z.chunk(2, dim=-1)
        silu = F.silu(gate)
        a = silu * up
        rows = grad.contiguous().index_select(0, token)  # (S*K, C)
        da = F.grouped_mm(rows, down, offs=offs)
        ds = (da * a).sum(-1)[inverse].to(weights.dtype)
        da.mul_(s)
        d_down = F.grouped_mm(rows.T, a.mul_(s), offs=offs)  # (E, C, I)
        dz = torch.cat([torch.ops.aten.silu_backward(da * up, gate), da.mul_(silu)], dim=-1)
        dx = combine_slots(F.grouped_mm(dz, gate_up, offs=offs), inverse)
        return dx, None, ds, F.grouped_mm(dz.T, x.index_select(0, token), offs=offs), d_down


def combine_slots(rows: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows (S*K, C) -> (S, C): every token fetches its K rows and adds them up, in order, in one pass over memory."""
    weights = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(inverse, rows, per_sample_weights=weights, mode="sum")


def expert_mixture_grouped(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The same by one sort and grouped products: every expert's tokens at once, no zeroed full-size gradients."""
    return GroupedExperts.apply(x, indices, weights, gate_up, down)


HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_path(x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor):
    """Fast paths want rows of a multiple of 16 bytes, one dtype and no float64, and more slots than experts to pay off on a
    CPU (fewer: decoding, where only the hit experts should be read). Everything else takes the reference."""
    aligned = all(n * x.element_size() % 16 == 0 for n in (x.shape[1], down.shape[2]))
    if not aligned or x.dtype == torch.float64 or x.dtype != gate_up.dtype or x.shape[0] == 0:
        return expert_mixture
    if x.is_cuda and HAS_TRITON:
        from kernels.moe_triton import (
            expert_mixture_triton,  # imported here: a CPU has no use for Triton
        )

        return expert_mixture_triton
    return expert_mixture_grouped if indices.numel() >= gate_up.shape[0] else expert_mixture


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
        self.bias: Tensor | None = (
            None  # (E,) moves the choice only; no place in the released layout, so it is not saved
        )

    def forward(self, x: Tensor, routing: list | None = None) -> Tensor:
        given = routing.given(self) if isinstance(routing, Replay) else None
        kind, gate_up, down = x.device.type, self.experts.gate_up_proj, self.experts.down_proj
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(
            kind, enabled=False
        ):  # the router stays in full precision, the experts take what autocast wants
            r = route(
                self.gate(x.to(self.gate.weight.dtype)),
                self.top_k,
                self.normalise,
                given,
                self.bias,
            )
            if routing is not None:
                routing.append(r)
            x, gate_up, down = x.to(half), gate_up.to(half), down.to(half)
            return choose_path(x, r.indices, gate_up, down)(x, r.indices, r.weights, gate_up, down)


# ------------------------------------------------------------------------------------------------ keeping experts alive


def tokens_per_expert(routing: list[Routing], keep: Tensor | None = None) -> Tensor:
    """(layers, E) how many slots each expert received, over the tokens that `keep` (S,) bool leaves (padding out)."""
    counts = []
    for r in routing:
        chosen = (r.indices if keep is None else r.indices[keep]).reshape(-1)
        counts.append(torch.bincount(chosen, minlength=r.logits.shape[-1]).float())
    return torch.stack(counts)


def expert_load(indices: Tensor, experts: int) -> Tensor:
    """(E,) share of the routed slots that each expert received; sums to 1."""
    return torch.bincount(indices.reshape(-1), minlength=experts).float() / max(indices.numel(), 1)


def entropy(load: Tensor) -> Tensor:
    """-sum f log f of each row of loads or counts (..., E), in nats: log E when all experts are used alike."""
    share = load / load.sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.special.entr(share).sum(-1)


def balance_loss(
    routing: list[Routing], keep: Tensor | None = None, everyone: tuple[Tensor, float] | None = None
) -> Tensor:
    """E * sum_e f_e P_e over the tokens of all layers together, as in Qwen3-MoE: K at perfect balance, more when skewed.

    f_e counts how often expert e was chosen per token (it sums to K), P_e is its mean probability. `keep` (S,) bool leaves
    padding out.

    Balance is wanted over the global batch: a rank whose few documents are all of one kind should be free to use few experts.
    `everyone`, the choices (E,) and the number of token decisions of all ranks, makes f global ("average activation across
    ranks") and the result this rank's part: parts add up to the loss of the whole batch, and so do their gradients.
    """
    shares = torch.cat([r.logits if keep is None else r.logits[keep] for r in routing]).softmax(
        -1
    )  # (layers * S, E)
    counts, tokens = everyone or (tokens_per_expert(routing, keep).sum(0), shares.shape[0])
    return shares.shape[-1] * (counts.to(shares) / tokens * shares.sum(0) / tokens).sum()


def z_loss(routing: list[Routing], keep: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906): keeps them where fp32 softmax is sharp."""
    logits = torch.cat([r.logits if keep is None else r.logits[keep] for r in routing])
    return logits.logsumexp(-1).square().mean()


@torch.no_grad()
def update_expert_bias(layers: list["MoE"], counts: Tensor, rate: float) -> None:
    """Balancing without a loss (arXiv 2408.15664), for comparison: after a step, the choice of busy experts becomes a little
    less likely and that of idle ones more. counts (layers, E) of the global batch; rate: 1e-3 there."""
    for layer, n in zip(layers, counts, strict=True):
        step = rate * torch.sign(n.mean() - n)
        layer.bias = step if layer.bias is None else layer.bias + step


@torch.no_grad()
def upcycle(dense: nn.Module, moe: MoE) -> None:
    """Start a MoE layer from a dense one without changing what it computes (our choice; the paper starts from released MoEs).

    Every expert is a whole copy of the dense layer. The kept weights sum to 1, so any top-K of equal experts gives the dense
    output, whatever the router says; training then drives the copies apart.
    """
    assert moe.normalise, "exact upcycling needs weights that sum to 1 (norm_topk_prob)"
    gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])  # (2I, C)
    assert moe.experts.gate_up_proj.shape[1:] == gate_up.shape, (
        "upcycling copies whole experts: equal widths wanted"
    )
    moe.experts.gate_up_proj.copy_(gate_up.expand_as(moe.experts.gate_up_proj))
    moe.experts.down_proj.copy_(dense.down_proj.weight.expand_as(moe.experts.down_proj))
