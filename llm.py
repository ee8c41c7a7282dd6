"""The language model: a Qwen3 decoder, dense or mixture-of-experts; without QK-norm, a Llama.

What it teaches: the modern decoder block in its final form. RMSNorm before each half, grouped-query
attention (GQA) with an RMSNorm on every head's query and key before the rotation (QK-norm), rotary
positions (RoPE), a SwiGLU feed-forward, no bias anywhere. Parameter names are those of the published
Qwen3 checkpoints, so a released file loads by name. Llama is the same but for QK-norm: with
`qk_norm=False` its files load as well (smol/).

    embeddings (S, C) --+--> norm -> attention ----> + --+--> norm -> SwiGLU or experts ----> + --> ...
                        +----------------------------+   +--------------------------------+
                        a block; after the last one a norm, and `lm_head` makes logits (S, V)

The model is handed its attention (`attend`, see attention.py) and positions, and knows neither rows
nor caches: training, prefill and decoding call the same `LLM.forward`.

Legend: S tokens (all documents of all rows end to end), C model width, H query heads, G key/value
heads, D head size, I feed-forward width, V vocabulary. Sources: Qwen3 as released; SAIL-VL2 section
2.1, Table 1.

Left out on purpose: sliding windows, RoPE scaling, dropout, attention bias (no released SAIL-VL2
uses them).
"""

from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention import Attend
from infra import weights
from infra.config import read_config, read_llm, write_llm
from moe import HAS_TRITON, Decisions, MoE


@dataclass(frozen=True)
class LLMConfig:
    """Qwen3-1.7B by default. Field names as in the published config.json; `num_experts` 0: dense."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    num_experts: int = 0
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True
    qk_norm: bool = True  # False: a Llama (dense)

    @staticmethod
    def from_dict(values: dict, source: str = "config.json") -> "LLMConfig":
        """From a published configuration. Raises ValueError naming a key that is unsupported."""
        return read_llm(LLMConfig, values, source)

    def to_dict(self) -> dict:
        return write_llm(self)


# ------------------------------------------------------------------------------------------ norm


class FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight with its backward pass written out.

    On a CPU it takes a third of the passes over memory that autograd makes. With r = 1 / rms(x), C the
    width and g the gradient of the output, both sums of the backward pass are of one product, g x:

        dx = r (g w - r^2 x sum(g x w) / C)        dw = sum over rows of r g x
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = norm_and_inverse(x, weight, eps)
        ctx.save_for_backward(x, inverse, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, inverse, weight = ctx.saved_tensors
        width = weight.shape[0]

        # Both sums: over the rows for the weight, over each row for x.
        product = grad * x
        rows = product.reshape(-1, width)
        dw = rows.T @ inverse.view(-1) if ctx.needs_input_grad[1] else None
        share = (rows @ weight).view_as(inverse).mul_(inverse.square()).div_(-width)

        # In the memory of the product, which has served.
        dx = torch.mul(grad, weight, out=product).addcmul_(x, share).mul_(inverse)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition. Half precision: in fp32, rounded before the weight, as the released code."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * inverse_rms(wide, eps)).to(x.dtype) * weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last axis, (..., 1): from the length, in one pass."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(length.square() / x.shape[-1] + eps)


def norm_and_inverse(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` and `inverse_rms` in the memory of what came before: the same bits, where no gradient
    is recorded."""
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse).mul_(weight), inverse


def rms_norm_in_place(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm_and_inverse(x, weight, eps)[0]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return choose_elementwise(x).rms_norm(x, self.weight, self.eps)


# ------------------------------------------------------------------------------ rotary positions


def rotary_table(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (S, 1, dim), of the angles position * theta^(-2i / dim), i < dim / 2.

    positions (S,) int64. Angles are computed in fp32 (fp64 for fp64 models).
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    # From one radian a token down to one in theta tokens.
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=exact) / dim
    frequency = theta**-exponent  # (dim / 2,)

    # Both coordinates of a pair turn by the same angle, in every head.
    angle = positions[:, None].to(exact) * frequency  # (S, dim / 2)
    angle = angle.repeat(1, 2)
    angle = angle[:, None]  # (S, 1, dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (S, heads, D): coordinate i is paired with i + D/2 ("half rotation")."""
    first, second = x.chunk(2, dim=-1)
    cos_first, cos_second = cos.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    turned_first = torch.addcmul(first * cos_first, second, sin_first, value=-1.0)
    turned_second = torch.addcmul(second * cos_second, first, sin_second)
    return torch.cat((turned_first, turned_second), dim=-1)


class FusedRotation(torch.autograd.Function):
    """`rotate` in half of the passes over memory; the way back is the turn by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned_by(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return turned_by(grad, *ctx.saved_tensors, -1.0), None, None


def turned_by(x: Tensor, cos: Tensor, sin: Tensor, way: float) -> Tensor:
    """`rotate` with its sums made in place. way: 1.0, or -1.0 to turn back."""
    out = x * cos
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    out_first.addcmul_(second, sin_first, value=-way)
    out_second.addcmul_(first, sin_second, value=way)
    return out


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turned_by(x, cos, sin, 1.0)


# -------------------------------------------------------------------------- between the products


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (S, I)."""
    return F.silu(gate) * up


def swiglu_in_place(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class FusedSwiGLU(torch.autograd.Function):
    """`swiglu` that keeps its two inputs only, and makes silu(gate) again on the way back."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_in_place(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        d_gate = torch.ops.aten.silu_backward(grad, gate).mul_(up)
        return d_gate, d_up


class Elementwise(NamedTuple):
    """What a block does between its matrix products: three functions, in one implementation of each."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]


DEFINITIONS = Elementwise(rms_norm, swiglu, rotate)
WRITTEN_OUT = Elementwise(FusedRMSNorm.apply, FusedSwiGLU.apply, FusedRotation.apply)
IN_PLACE = Elementwise(rms_norm_in_place, swiglu_in_place, rotate_in_place)


def choose_elementwise(x: Tensor) -> Elementwise:
    """The functions to use where x is.

    On a GPU they are bound by memory: a kernel each (kernels/block_triton.py). Where a block is
    compiled, the compiler makes such kernels from the definitions. Elsewhere the definitions, and in full
    precision the same bits sooner: for training with the backward pass written out, else in place.
    """
    if torch.compiler.is_compiling() or x.numel() == 0:
        return DEFINITIONS
    if x.is_cuda and HAS_TRITON and x.dtype != torch.float64:
        from kernels.block_triton import rms_norm_triton, rotate_triton, swiglu_triton

        return Elementwise(rms_norm_triton, swiglu_triton, rotate_triton)

    if x.dtype not in (torch.float32, torch.float64):
        return DEFINITIONS
    return WRITTEN_OUT if torch.is_grad_enabled() else IN_PLACE


# ------------------------------------------------------------------------------------- the block


class SelfAttention(nn.Module):
    """Grouped-query attention with per-head QK-norm before RoPE, if the model has it."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.groups = c.num_key_value_heads
        self.dim = c.head_dim
        query_width = self.heads * self.dim
        key_width = self.groups * self.dim
        self.q_proj = nn.Linear(c.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        layer: int,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (S, C), rope: cos and sin of the positions -> (S, C), or (n, C) at the positions `at`."""
        # Every head by itself.
        S = x.shape[0]
        q = self.q_proj(x).view(S, self.heads, self.dim)  # (S, H, D)
        k = self.k_proj(x).view(S, self.groups, self.dim)  # (S, G, D)
        v = self.v_proj(x).view(S, self.groups, self.dim)

        # Queries and keys of one length, so that no head's logits can explode; then their positions.
        q = self.q_norm(q)
        k = self.k_norm(k)
        turn = choose_elementwise(q).rotate
        q = turn(q, *rope)
        k = turn(k, *rope)

        # What may be seen is not this file's business.
        out = attend(layer, q, k, v).reshape(S, -1)  # (S, H*D)
        return self.o_proj(rows_at(out, at))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Called as `moe.MoE` is, so a block does not know which it holds.
    """

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, routing: Decisions | None = None) -> Tensor:
        gate = self.gate_proj(x)  # (S, I)
        up = self.up_proj(x)
        return self.down_proj(choose_elementwise(gate).swiglu(gate, up))


class Block(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to what came in.

    `at` (n,): all positions are attended to, and these alone go on.
    """

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.self_attn = SelfAttention(c)
        self.mlp = MoE(c) if c.num_experts else FeedForward(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        layer: int,
        routing: Decisions | None,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (S, C) -> (S, C), or (n, C)."""
        attended = self.self_attn(self.input_layernorm(x), rope, attend, layer, at)
        x = rows_at(x, at) + attended
        return x + self.mlp(self.post_attention_layernorm(x), routing)


def rows_at(x: Tensor, at: Tensor | None) -> Tensor:
    """Rows of x (S, C): those at the positions `at` (n,), or all."""
    return x if at is None else x.index_select(0, at)


# ------------------------------------------------------------------------------------- the model


class Trunk(nn.Module):
    """Everything but the head; apart only because published names say `model.` and `lm_head.`."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class LLM(nn.Module):
    """A decoder over embeddings.

    `lm_head` is a module of its own also when tied, where it shares the embedding's tensor.
    recompute: keep no activations inside blocks, compute them again in the backward pass.
    """

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """(S,) int64 -> (S, C)."""
        return self.model.embed_tokens(ids)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        routing: Decisions | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (S, C) embeddings, positions (S,) int64 -> (S, C) after the last norm.

        Logits are `lm_head` of that. `routing`, when given, receives one `moe.Routing` from each
        MoE layer (for the balance loss and statistics). `at` (n,) int64: where hidden states are
        wanted; only those are returned, (n, C), and the last feed-forward is computed for no others.
        """
        # The same turns for all layers.
        rope = rotary_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)

        # Experts see all tokens in every layer: their balance is of all.
        early = None if self.config.num_experts else at
        last = len(self.model.layers) - 1

        recompute = self.recompute and torch.is_grad_enabled()
        for layer, block in enumerate(self.model.layers):
            wanted = early if layer == last else None
            if recompute:
                x = checkpoint(block, x, rope, attend, layer, routing, wanted, use_reentrant=False)
            else:
                x = block(x, rope, attend, layer, routing, wanted)
        if early is None:
            x = rows_at(x, at)
        return self.model.norm(x)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fan-in initialisation, residual outputs scaled down by depth.

        A free embedding starts at N(0, 1), larger than what the first blocks add to it: a token that
        is drowned by its context cannot be matched, and look-up is the first thing to learn. A tied
        one must stay small, as it is also the head.
        """
        free_embedding = not self.config.tie_word_embeddings
        residual_outputs = ("o_proj.weight", "down_proj", "down_proj.weight")
        depth = 2 * len(self.model.layers)
        for name, p in self.named_parameters():
            # Norms.
            if p.ndim == 1:
                p.fill_(1.0)
                continue

            # Matrices, and stacks of them: rows are outputs.
            std = p.shape[-1] ** -0.5
            if name == "model.embed_tokens.weight" and free_embedding:
                std = 1.0
            elif name.endswith(residual_outputs):
                std *= depth**-0.5
            p.normal_(0.0, std, generator=generator)

    # ------------------------------------------------------------------------------------- files

    @staticmethod
    def from_pretrained(directory, dtype: torch.dtype = torch.float32, device="cpu") -> "LLM":
        """A published Qwen3, Qwen3-MoE or Llama directory, or one of ours.

        Raises ValueError naming what does not fit.
        """
        config = LLMConfig.from_dict(read_config(directory), f"{directory}/config.json")

        # Where a config says tied and the file holds a head that differs, the file is believed.
        head = "lm_head.weight"
        embedding = "model.embed_tokens.weight"
        stored = weights.locate(directory)
        both = head in stored and embedding in stored
        if config.tie_word_embeddings and both:
            tied = weights.same_tensor(stored, head, embedding)
            config = replace(config, tie_word_embeddings=tied)

        with torch.device("meta"):
            model = LLM(config)
        return weights.load_weights(model, directory, dtype, device)

    def save_pretrained(self, directory) -> None:
        """The layout of Qwen3 or Llama, which `transformers.AutoModelForCausalLM` loads."""
        dtype = str(self.model.norm.weight.dtype).removeprefix("torch.")
        weights.save_weights(self, directory, self.config.to_dict() | {"torch_dtype": dtype})
