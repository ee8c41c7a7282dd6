"""The language model: a Qwen3 decoder, dense or mixture-of-experts.

What it teaches: the modern decoder block in its final form. RMSNorm before each half, grouped-query attention (GQA) with
an RMSNorm on every head's query and key before the rotation (QK-norm), rotary positions (RoPE), a SwiGLU feed-forward,
no bias anywhere. Parameter names are those of the published Qwen3 checkpoints, so a released file loads by name.

Legend: S tokens (all documents of all rows end to end), C model width, H query heads, G key/value heads, D head size,
I feed-forward width, V vocabulary. Sources: Qwen3 as released; SAIL-VL2 section 2.1, Table 1.

Left out on purpose: sliding windows, RoPE scaling, dropout, attention bias (no released SAIL-VL2 uses them).
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention import Attend
from infra import weights
from infra.config import pick, read_config
from moe import MoE


@dataclass(frozen=True)
class LLMConfig:
    """Field names as in the published config.json. `num_experts` 0 means dense."""

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

    @staticmethod
    def from_dict(c: dict, source: str = "config.json") -> "LLMConfig":
        """From a published Qwen3 or Qwen3-MoE configuration. Raises ValueError naming a key that is missing or unsupported."""
        if isinstance(c, dict):  # transformers 5 writes two of the keys elsewhere
            rope = c["rope_parameters"] if isinstance(c.get("rope_parameters"), dict) else {}
            c = {
                "rope_theta": rope.get("rope_theta"),
                "rope_type": rope.get("rope_type"),
                "num_experts": c.get("num_local_experts"),
            } | c
        dense = isinstance(c, dict) and not c["num_experts"]
        experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        config = pick(
            LLMConfig,
            c,
            source,
            experts if dense else (),
            model_type=("qwen3", "qwen3_moe"),
            hidden_act="silu",
            attention_bias=False,
            rope_scaling=None,
            rope_type="default",
            use_sliding_window=False,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(
                f"{source}: {config.num_attention_heads} query heads of size {config.head_dim} do not share "
                f"{config.num_key_value_heads} key heads"
            )
        if config.num_experts and config.num_experts_per_tok > config.num_experts:
            raise ValueError(
                f"{source}: {config.num_experts_per_tok} experts a token of {config.num_experts}"
            )
        return config

    def to_dict(self) -> dict:
        """The published layout, which transformers reads."""
        kind = (
            ("qwen3_moe", "Qwen3MoeForCausalLM")
            if self.num_experts
            else ("qwen3", "Qwen3ForCausalLM")
        )
        return asdict(self) | {
            "model_type": kind[0],
            "architectures": [kind[1]],
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_scaling": None,
            "max_position_embeddings": 40960,
        }


class FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight with its backward written out: a third of the passes over memory that autograd makes on a CPU.

    With n = x / rms(x) and g the gradient of the output:  dx = (g w - n mean(g w n)) / rms(x),  dw = sum over rows of g n.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        normal, inverse, weight = ctx.saved_tensors
        scaled = grad * weight
        mean = (scaled * normal).mean(-1, keepdim=True)
        dw = (grad * normal).reshape(-1, weight.shape[0]).sum(0)
        return torch.addcmul(scaled, normal, mean, value=-1).mul_(inverse), dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32 for half precision and rounded before the weight, as the released code does."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        by_hand = torch.is_grad_enabled() and x.dtype in (torch.float32, torch.float64)
        return (FusedRMSNorm.apply if by_hand else rms_norm)(x, self.weight, self.eps)


def rotary_table(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (S, 1, dim), for integer positions (S,). Angles are computed in fp32 (fp64 for fp64 models)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = theta ** -(
        torch.arange(0, dim, 2, device=positions.device, dtype=exact) / dim
    )  # (dim/2,)
    angle = (positions[:, None].to(exact) * frequency).repeat(1, 2)[:, None]  # (S, 1, dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (S, heads, D): coordinate i is paired with i + D/2 ("half rotation", not interleaved)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class SelfAttention(nn.Module):
    """Grouped-query attention with per-head QK-norm before RoPE."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.heads, self.groups, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.groups * self.dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.groups * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.dim, c.rms_norm_eps),
            RMSNorm(self.dim, c.rms_norm_eps),
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        S = x.shape[0]
        q = rotate(self.q_norm(self.q_proj(x).view(S, self.heads, self.dim)), *rope)  # (S, H, D)
        k = rotate(self.k_norm(self.k_proj(x).view(S, self.groups, self.dim)), *rope)  # (S, G, D)
        v = self.v_proj(x).view(S, self.groups, self.dim)
        return self.o_proj(attend(layer, q, k, v).reshape(S, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Shares its call with `moe.MoE`, so a block does not know which it holds."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, routing: list | None = None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: LLMConfig):
        super().__init__()
        self.self_attn = SelfAttention(c)
        self.mlp = MoE(c) if c.num_experts else FeedForward(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope, attend: Attend, layer: int, routing: list | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x), routing)


class Trunk(nn.Module):
    """Everything but the head; kept apart only because the published names say `model.` and `lm_head.`."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class LLM(nn.Module):
    """Decoder over embeddings. `lm_head` is a module of its own also when tied, where it shares the embedding's tensor."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config, self.recompute = config, False  # recompute: keep no activations inside blocks
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed_tokens(ids)

    def forward(
        self, x: Tensor, positions: Tensor, attend: Attend, routing: list | None = None
    ) -> Tensor:
        """x (S, C) embeddings, positions (S,) int64 -> (S, C) after the last norm; logits are `lm_head` of that.

        `routing`, when a list, receives one `moe.Routing` per MoE layer (for the balance loss and statistics).
        """
        rope = rotary_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for i, block in enumerate(self.model.layers):
            again = self.recompute and torch.is_grad_enabled()
            x = (
                checkpoint(block, x, rope, attend, i, routing, use_reentrant=False)
                if again
                else block(x, rope, attend, i, routing)
            )
        return self.model.norm(x)

    @staticmethod
    def from_pretrained(directory, dtype: torch.dtype = torch.float32, device="cpu") -> "LLM":
        """A published Qwen3 or Qwen3-MoE directory, or one of ours. Raises ValueError naming what does not fit."""
        config = LLMConfig.from_dict(read_config(directory), f"{directory}/config.json")
        where, (head, embedding) = (
            weights.locate(directory),
            ("lm_head.weight", "model.embed_tokens.weight"),
        )
        if (
            config.tie_word_embeddings
            and head in where
            and embedding in where
            and not weights.same_tensor(where, head, embedding)
        ):
            config = replace(
                config, tie_word_embeddings=False
            )  # the file is believed, not its config
        with torch.device("meta"):
            model = LLM(config)
        return weights.load_weights(model, directory, dtype, device)

    def save_pretrained(self, directory) -> None:
        """Qwen3's own layout, so that `transformers.AutoModelForCausalLM.from_pretrained(directory)` loads it."""
        kind = str(self.model.norm.weight.dtype).removeprefix("torch.")
        weights.save_weights(self, directory, self.config.to_dict() | {"torch_dtype": kind})

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fan-in initialisation, residual outputs scaled down by depth.

        A free embedding starts at N(0, 1), larger than what the first blocks add to it: a token that is drowned by its
        context cannot be matched, and look-up is the first thing to learn. A tied one must stay small, as it is also the head.
        """
        depth = 2 * len(self.model.layers)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0)
                continue
            if name == "model.embed_tokens.weight" and not self.config.tie_word_embeddings:
                p.normal_(0.0, 1.0, generator=generator)
                continue
            std = p.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                std *= depth**-0.5
            p.normal_(0.0, std, generator=generator)
