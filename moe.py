"""Mixture of experts: each token is sent to K of E feed-forwards.

What it teaches: routing (softmax over all experts in fp32, keep the best K, optionally re-normalise),
the losses that keep experts alive, and why the fast path is a sort: once slots are ordered by expert,
E small matrix products over ragged groups become one grouped matrix product, and its backward pass
needs nothing but x, z and the order.

    x (S, C) --gate--> logits (S, E) --softmax, top K--> indices, weights (S, K)
    S*K slots, sorted by expert --W13--> z --silu(gate) * up--> a --W2--> y (S*K, C)
    each token: the sum of its K rows of y, by its weights --> (S, C)

Legend: S tokens, C model width, E experts, K experts per token, I expert width; a *slot* is
(token, k), a *row* its place after sorting. gate_up W13 (E, 2I, C), gates first; down W2 (E, C, I);
z (S*K, 2I). Sources: Qwen3-MoE as released; SAIL-VL2 section 2.2, which names "auxiliary
load-balancing loss and average activation across ranks" and gives no formula: the loss below is the
standard one of Switch and Qwen3-MoE.

Four ways to compute the same, with one signature:

    expert_mixture              the definition; any dtype; reads only the experts that were hit,
                                which is what decoding wants
    expert_mixture_grouped      one autograd function around grouped products; the CPU's fast path
    expert_mixture_npu          the same with an Ascend NPU's grouped product (kernels/npu.py; not run here)
    expert_mixture_triton       the same on a GPU (kernels/moe_triton.py)

`choose_path` is the one place that picks; tests compare outputs and all gradients.
`python -m kernels.bench --cpu` measures them beside transformers' implementations.
"""

import importlib.util
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


# --------------------------------------------------------------------------------------- routing


@dataclass
class Routing:
    """One layer's decision: logits (S, E) fp32, indices (S, K) int64, weights (S, K)."""

    logits: Tensor
    indices: Tensor
    weights: Tensor


class RouterSums(NamedTuple):
    """What the router's losses and statistics are made of: sums over the decisions of some layers.

    counts (2, layers, E): slots of each expert, by text and by visual tokens. probabilities (E,).
    squares (): of each decision's log-sum-exp. decisions (): how many there are, tokens times layers.
    """

    counts: Tensor
    probabilities: Tensor
    squares: Tensor
    decisions: Tensor


class Decisions:
    """Where each MoE layer leaves its `Routing` in a forward pass, in the order of the layers.

    A layer's first decision counts. When its activations are recomputed it decides again; to keep
    that one would keep alive all that was recomputed. No list, since FSDP2 rebuilds the lists among a block's
    arguments, and what a layer appends to such a copy is lost without a word.
    """

    def __init__(self):
        self.by_layer: dict[int, Routing] = {}
        # of layers that ran before these, elsewhere (scale/pipeline.py)
        self.earlier: RouterSums | None = None

    def note(self, layer: object, decision: Routing) -> None:
        self.by_layer.setdefault(id(layer), decision)

    def __iter__(self) -> Iterator[Routing]:
        return iter(self.by_layer.values())

    def __len__(self) -> int:
        return len(self.by_layer)


class Replay(Decisions):
    """Decisions that also say which experts to use, as an earlier forward pass chose them.

    choices: (S, K) for each layer. Only the selection is replayed; the weights come from the present
    router, which would get no gradient otherwise.
    """

    def __init__(self, choices: list[Tensor]):
        super().__init__()
        self.choices = choices
        self.places: dict[int, int] = {}

    def chosen(self, layer: object) -> Tensor:
        """A layer's choices: the next ones when it first asks.

        The same ones when it asks again, which it does when its activations are recomputed.
        """
        place = self.places.setdefault(id(layer), len(self.places))
        return self.choices[place]

    def rerouted_share(self) -> Tensor:
        """Share of the replayed choices that the present router would not make: a scalar."""
        kept = []
        for routing, choices in zip(self, self.choices, strict=True):
            k = choices.shape[1]
            own = routing.logits.topk(k, dim=-1).indices
            same = choices[:, :, None] == own[:, None]  # (S, K, K)
            kept.append(same.any(2).float().mean())
        return 1 - torch.stack(kept).mean()


def route(
    logits: Tensor,
    k: int,
    normalise: bool,
    chosen: Tensor | None = None,
    bias: Tensor | None = None,
) -> Routing:
    """Qwen3's rule on logits (S, E): softmax over all E in fp32, the top K, re-normalised or not.

    chosen: (S, K) experts to take in place of the top K. bias: (E,), moves the choice only, never
    the weights (balancing without a loss, see `update_expert_bias`).

    Raises ValueError for K = 1 with re-normalisation: the single weight is then always 1, and the
    router would get no gradient from the task (seen in the wild as a router that never learns).
    """
    if k == 1 and normalise:
        raise ValueError(
            "num_experts_per_tok=1 with norm_topk_prob=True: the kept weight is always 1, so the "
            "router gets no task gradient; set norm_topk_prob=False or use at least 2 experts per "
            "token"
        )
    # In full precision, whatever the model's: experts close to each other must not tie.
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    probabilities = wide.softmax(-1)  # (S, E)

    if chosen is None:
        scores = probabilities if bias is None else probabilities + bias
        chosen = scores.topk(k, dim=-1).indices

    weights = probabilities.gather(-1, chosen)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(wide, chosen, weights)


# --------------------------------------------------------------------------- three ways, one sum


def expert_mixture(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The definition: x (S, C) -> (S, C), the sum over k of weight_k * expert_k(x).

    indices and weights (S, K), gate_up (E, 2I, C), down (E, C, I).
    """
    out = torch.zeros_like(x)
    # An expert without tokens is not even read.
    for e in indices.unique().tolist():
        token, slot = (indices == e).nonzero(as_tuple=True)
        z = x.index_select(0, token) @ gate_up[e].T  # (n_e, 2I)
        gate, up = z.chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down[e].T  # (n_e, C)
        share = weights[token, slot, None].to(y.dtype)
        out = out.index_add(0, token, y * share)
    return out


def expert_mixture_grouped(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The same by one sort and grouped products: no loop, and no zeroed full-size gradients."""
    return GroupedExperts.apply(x, indices, weights, gate_up, down, F.grouped_mm)


def expert_mixture_npu(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`expert_mixture_grouped` by the grouped product of an Ascend NPU."""
    from kernels.npu import grouped_product_npu  # other devices have no use for it

    return GroupedExperts.apply(x, indices, weights, gate_up, down, grouped_product_npu)


class GroupedExperts(torch.autograd.Function):
    """Sort, two grouped products, weighted sum; expert e owns the rows ends[e - 1] : ends[e].

    Autograd would keep the sorted copy of x, silu(gate), a and y as well; this keeps x and z and
    computes the rest again. Gradients of frozen inputs are not computed. product: as `F.grouped_mm`.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        product: Callable[..., Tensor],
    ) -> Tensor:
        gate_up = gate_up.contiguous()  # grouped products want rows of whole 16 bytes
        down = down.contiguous()

        # Slots sorted by expert, there and back: order[row] is a slot, inverse[slot] its row.
        expert = indices.reshape(-1)  # (S*K,)
        order = expert.argsort(stable=True)
        rows = torch.arange(len(order), device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, rows).view_as(indices)  # (S, K)
        ends = slots_of(expert, gate_up.shape[0]).cumsum(0).to(torch.int32)  # (E,)

        # Every expert on its own rows.
        token = order // indices.shape[1]
        x_rows = x.index_select(0, token)  # (S*K, C)
        z = product(x_rows, gate_up.transpose(1, 2), offs=ends)  # (S*K, 2I)
        del x_rows  # before y exists, which is as large
        gate, up = z.chunk(2, dim=-1)
        a = F.silu(gate).mul_(up)  # (S*K, I)
        y = product(a, down.transpose(1, 2), offs=ends)  # (S*K, C)

        ctx.product = product
        ctx.save_for_backward(x, z, weights, order, inverse, ends, gate_up, down)
        return combine_slots(y, inverse, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, z, weights, order, inverse, ends, gate_up, down = ctx.saved_tensors
        needs_x, _, needs_weights, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        product = ctx.product
        d_x = d_weights = d_gate_up = d_down = None

        # What the forward pass had and did not keep.
        token = order // weights.shape[1]
        share = weights.reshape(-1)[order, None].to(x.dtype)  # (S*K, 1)
        gate, up = z.chunk(2, dim=-1)
        silu = F.silu(gate)
        a = silu * up  # (S*K, I)

        # Through the sum over slots and W2: to a, as if every routing weight were 1.
        grad_rows = grad.contiguous().index_select(0, token)  # (S*K, C)
        if needs_x or needs_weights or needs_gate_up:
            d_a = product(grad_rows, down, offs=ends)  # (S*K, I)

        # To the routing weights: <dO, y> = <dO W2, a>, and the second form needs no y.
        if needs_weights:
            d_weights = (d_a * a).sum(-1)[inverse].to(weights.dtype)  # (S, K)

        # To W2, with the routing weight on the smaller of the two factors.
        if needs_down:
            d_down = product(grad_rows.T, a.mul_(share), offs=ends)  # (E, C, I)

        # Through SwiGLU to z, and from there to x and W13.
        if needs_x or needs_gate_up:
            d_a.mul_(share)
            d_gate = torch.ops.aten.silu_backward(d_a * up, gate)
            d_up = d_a.mul_(silu)
            d_z = torch.cat([d_gate, d_up], dim=-1)  # (S*K, 2I)
            del d_gate
        if needs_x:
            d_x = combine_slots(product(d_z, gate_up, offs=ends), inverse)  # (S, C)
        if needs_gate_up:
            x_rows = x.index_select(0, token)
            d_gate_up = product(d_z.T, x_rows, offs=ends)  # (E, 2I, C)
        return d_x, None, d_weights, d_gate_up, d_down, None


def slots_of(experts: Tensor, E: int, counted: Tensor | None = None) -> Tensor:
    """(E,) int64: how often each expert stands in `experts` (n,), where `counted` (n,) bool says so.

    `bincount` would do, but on an accelerator it makes the host wait, to look at the largest number.
    """
    ones = torch.ones_like(experts) if counted is None else counted.to(experts.dtype)
    return experts.new_zeros(E).scatter_add_(0, experts, ones)


def combine_slots(rows: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows (S*K, C) -> (S, C): every token fetches its K rows and adds them up, in order.

    inverse (S, K): the row of each slot. One pass over memory, and nobody scatters.
    """
    if weights is not None:
        weights = weights.to(rows.dtype)
    return F.embedding_bag(inverse, rows, per_sample_weights=weights, mode="sum")


def choose_path(x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> Callable:
    """The mixture to use for these inputs.

    Fast paths know SwiGLU only (another activation would go to the definition). They want rows of a
    multiple of 16 bytes and one dtype, no float64; on a CPU they pay off from as many slots as
    experts (below: decoding, where only the hit experts should be read).
    """
    C, I = down.shape[1:]
    aligned = C * x.element_size() % 16 == 0 and I * x.element_size() % 16 == 0
    one_dtype = x.dtype == gate_up.dtype and x.dtype != torch.float64
    if not aligned or not one_dtype or x.shape[0] == 0:
        return expert_mixture

    if x.is_cuda and HAS_TRITON:
        from kernels.moe_triton import expert_mixture_triton  # a CPU has no use for Triton

        return expert_mixture_triton

    if x.device.type == "npu":
        return expert_mixture_npu

    many_slots = indices.numel() >= gate_up.shape[0]
    return expert_mixture_grouped if many_slots else expert_mixture


# ------------------------------------------------------------------------------------- the layer


def mixture_here(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """`expert_mixture` by the fastest path, all experts being on this process."""
    mixture = choose_path(x, indices, gate_up, down)
    return mixture(x, indices, weights, gate_up, down)


class Experts(nn.Module):
    """Stacked weights: one tensor for all gates and ups, one for all downs.

    mixture: how they are used. scale/experts.py puts another in its place, with one signature, that
    sends tokens to the ranks where their experts are.
    """

    def __init__(self, E: int, C: int, I: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, I))
        self.mixture = mixture_here

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x (S, C), indices and weights (S, K) -> (S, C)."""
        gate_up = self.gate_up_proj.to(x.dtype)
        down = self.down_proj.to(x.dtype)
        return self.mixture(x, indices, weights, gate_up, down)


class MoE(nn.Module):
    """Drop-in for `llm.FeedForward`. Parameter names follow Qwen3-MoE: `gate` is the router.

    bias: (E,) or None, moves the choice only; it has no place in the released layout and is not
    saved.
    """

    def __init__(self, c):
        super().__init__()
        self.top_k = c.num_experts_per_tok
        self.normalise = c.norm_topk_prob
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = Experts(c.num_experts, c.hidden_size, c.moe_intermediate_size)
        self.bias: Tensor | None = None

    def forward(self, x: Tensor, routing: Decisions | None = None) -> Tensor:
        """x (S, C) -> (S, C). `routing` receives the decision; a `Replay` makes it."""
        chosen = routing.chosen(self) if isinstance(routing, Replay) else None
        device = x.device.type
        dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

        # The router stays in its own, full precision; the experts take what autocast wants.
        with torch.autocast(device, enabled=False):
            logits = self.gate(x.to(self.gate.weight.dtype))  # (S, E)
            decision = route(logits, self.top_k, self.normalise, chosen, self.bias)
            if routing is not None:
                routing.note(self, decision)
            return self.experts(x.to(dtype), decision.indices, decision.weights)


@torch.no_grad()
def upcycle(dense: nn.Module, moe: MoE) -> None:
    """Start a MoE layer from a dense one without changing what it computes.

    Our choice; the paper starts from released MoEs. Where experts are as wide as the dense layer, each is a
    copy of it: the kept weights sum to 1, so any top K of equal experts gives the dense output. Narrower
    ones are pieces of a copy (Qwen3's 128 experts are narrow): the router's rows are equal for all pieces
    of one copy, so they are chosen together, with equal weights, and their sum, `pieces` times as large, is
    the dense output. Training drives copies and pieces apart.

        pieces 2, K 2, 16 experts    copy 0: [left, right]  copy 1: [left, right]  ...  copy 7
        a token takes                                       left + right of the copy that it likes most
    """
    # Whole columns of the dense layer for each piece
    experts = moe.experts
    E, C, I = experts.down_proj.shape
    width = dense.down_proj.weight.shape[1]
    pieces = width // I
    assert moe.normalise, "exact upcycling needs weights that sum to 1 (norm_topk_prob)"
    assert width == pieces * I and E % pieces == 0 and moe.top_k % pieces == 0, (
        f"{width} columns, {E} experts of {I}, {moe.top_k} a token: whole copies wanted"
    )

    # One copy, cut
    gate = dense.gate_proj.weight.view(pieces, I, C)
    up = dense.up_proj.weight.view(pieces, I, C)
    gate_up = torch.cat([gate, up], dim=1)  # (pieces, 2I, C)
    down = dense.down_proj.weight.view(C, pieces, I).transpose(0, 1) * pieces  # (pieces, C, I)

    # All copies, and a router that tells copies apart but not their pieces
    copies = E // pieces
    experts.gate_up_proj.copy_(gate_up.repeat(copies, 1, 1))
    experts.down_proj.copy_(down.repeat(copies, 1, 1))
    router = moe.gate.weight.view(copies, pieces, C)
    router.copy_(router[:, :1].clone().expand_as(router))


# ------------------------------------------------------------------------- keeping experts alive
# Four ways: the balance loss over the global batch, the router z-loss, the expert bias (no loss at
# all), and entropy calibration before training (calibrate.py). A further one is a function here, its
# coefficient in stage.py and one line of objective.py.


def tokens_per_expert(routing: Iterable[Routing], keep: Tensor | None = None) -> Tensor:
    """(layers, E) how many slots each expert received; `keep` (S,) bool leaves tokens out."""
    counts = []
    for r in routing:
        counted = None if keep is None else keep[:, None].expand_as(r.indices).reshape(-1)
        count = slots_of(r.indices.reshape(-1), r.logits.shape[-1], counted)
        counts.append(count.float())
    return torch.stack(counts)


def expert_load(indices: Tensor, experts: int) -> Tensor:
    """(E,) share of the routed slots that each expert received; sums to 1."""
    counts = slots_of(indices.reshape(-1), experts)
    return counts.float() / max(indices.numel(), 1)


def entropy(load: Tensor) -> Tensor:
    """-sum f log f of each row of loads or counts (..., E), in nats: log E when all are used alike."""
    share = load / load.sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.special.entr(share).sum(-1)


def all_logits(routing: Iterable[Routing], keep: Tensor | None) -> Tensor:
    """(layers * S, E), less the tokens that `keep` leaves out.

    keep: (S,) bool, or the positions (n,) int64, whose number nobody has to wait for.
    """
    return torch.cat([r.logits if keep is None else r.logits[keep] for r in routing])


def router_sums(routing: Decisions, counts: Tensor, keep: Tensor | None = None) -> RouterSums:
    """Of these layers, with those before them. counts: (2, layers, E) of these layers alone."""
    logits = all_logits(routing, keep)  # (layers * S, E)
    own = RouterSums(
        counts,
        logits.softmax(-1).sum(0),
        logits.logsumexp(-1).square().sum(),
        torch.full((), len(logits), device=logits.device, dtype=logits.dtype),
    )
    earlier = routing.earlier
    if earlier is None:
        return own
    sums = [before + here for before, here in zip(earlier[1:], own[1:])]
    return RouterSums(torch.cat([earlier.counts, counts], 1), *sums)


def earlier_sums(routing: Iterable[Routing]) -> RouterSums | None:
    """Those of the layers that another rank ran before these."""
    return routing.earlier if isinstance(routing, Decisions) else None


def balance_loss(
    routing: Iterable[Routing],
    keep: Tensor | None = None,
    everyone: tuple[Tensor, Tensor | float] | None = None,
) -> Tensor:
    """E * sum_e f_e P_e over the tokens of all layers together, as in Qwen3-MoE.

    f_e: how often expert e was chosen per token (over e it sums to K). P_e: its mean probability. The
    loss is K at perfect balance and more when skewed. `keep` (as in `all_logits`) leaves padding out.

    Balance is wanted over the global batch: a rank whose few documents are all of one kind should be
    free to use few experts. everyone: the choices (E,) and the number of token decisions of all
    ranks. It makes f global ("average activation across ranks") and the result this rank's part:
    parts add up to the loss of the whole batch, and so do their gradients.
    """
    probabilities = all_logits(routing, keep).softmax(-1)  # (layers * S, E)
    decisions, experts = probabilities.shape
    sums = probabilities.sum(0)  # (E,)
    earlier = earlier_sums(routing)
    if earlier is not None:
        assert everyone is not None, "layers elsewhere are counted over all ranks"
        sums = earlier.probabilities + sums
    if everyone is None:
        counts = tokens_per_expert(routing, keep).sum(0)
    else:
        counts, decisions = everyone
    f = counts.to(probabilities) / decisions  # (E,)
    f_times_p = f * sums / decisions  # (E,)
    return experts * f_times_p.sum()


def z_loss(routing: Iterable[Routing], keep: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906).

    Keeps them where a softmax in fp32 is sharp.
    """
    squares = all_logits(routing, keep).logsumexp(-1).square()  # (layers * S,)
    earlier = earlier_sums(routing)
    if earlier is None:
        return squares.mean()
    return (earlier.squares + squares.sum()) / (earlier.decisions + len(squares))


@torch.no_grad()
def update_expert_bias(layers: list[MoE], counts: Tensor, rate: float) -> None:
    """Balancing without a loss (arXiv 2408.15664), for comparison.

    After a step the choice of busy experts becomes a little less likely, that of idle ones more.
    counts: (layers, E) of the global batch. rate: 1e-3 there.
    """
    for layer, count in zip(layers, counts, strict=True):
        step = rate * torch.sign(count.mean() - count)
        layer.bias = step if layer.bias is None else layer.bias + step
