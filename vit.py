"""The vision encoder: an AIMv2-style ViT, which is what SAIL-ViT is.

What it teaches: a ViT at the size of one file, and what "any resolution" takes. Patches become tokens by one strided
convolution, get an RMSNorm and a learned position, then pass pre-norm blocks with full attention and SwiGLU. There is no
class token: all patch features go on to the language model. Images of different sizes are packed end to end and attend
inside themselves only.

Positions. The paper's text (section 2.1.2) says that the learned table "is resized to match the input resolution"; the
label in its Figure 2 says "Interpolate 2D RoPE". No any-resolution code or weights are public, so the two cannot be
reconciled: `position="table"`, the text, is the default; `position="rope2d"` is the label, on top of the resized table.
The resize is bicubic with anti-aliasing off and half-pixel centres (our choice, the usual one for ViT tables), and the
identity at the base size, so a full square image gives the fixed-resolution output bit for bit. AIMv2's own answer to any
resolution is a third way: no table at all but sines and cosines of row and column (`position="sincos"`, its "native" weights).

Legend: N images, h x w patch grid of an image, S patches of all images end to end, C width, H heads, D head size.
Parameter names are those of the released checkpoints (`preprocessor.patchifier...`, `trunk.blocks...`).
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention import Attend, Segments, attend_inside
from infra import weights
from infra.config import pick, read_config
from llm import RMSNorm, rotary_table, rotate


@dataclass(frozen=True)
class ViTConfig:
    """Defaults: SAIL-ViT-Huge at 448 pixels, as inside SAIL-VL2-2B and 8B."""

    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 12
    patch_size: int = 14
    image_size: int = 448
    num_channels: int = 3
    rms_norm_eps: float = 1e-5
    position: str = "table"  # or "rope2d", "sincos"

    @staticmethod
    def from_dict(c: dict, source: str = "config.json") -> "ViTConfig":
        """From a SAIL-ViT or AIMv2 configuration. Raises ValueError naming a key that is missing or unsupported."""
        c = (
            {"position": "sincos" if c.get("is_native") else "table"} | c
            if isinstance(c, dict)
            else c
        )
        config = pick(
            ViTConfig,
            c,
            source,
            model_type=("sailvit", "aimv2", "aimv2_vision_model"),
            hidden_act="silu",
            qkv_bias=False,
            use_bias=False,
            mlp_bias=False,
            use_head=False,
        )
        width, heads = config.hidden_size, config.num_attention_heads
        unit = {"table": 1, "rope2d": 4 * heads, "sincos": 4}.get(
            config.position
        )  # what positions want the width to be a multiple of
        if unit is None or width % heads or width % unit or config.image_size % config.patch_size:
            raise ValueError(
                f"{source}: width {width} of {heads} heads, {config.image_size} pixels in patches of "
                f"{config.patch_size} and positions {config.position!r} do not make a ViT"
            )
        return config

    def work(self, pixels: int) -> int:
        """Multiplications for an image of so many pixels, in those of one patch's own matrices: attention adds its square."""
        n = pixels // self.patch_size**2
        return round(
            n + n * n / (2 * self.hidden_size + 1.5 * self.intermediate_size)
        )  # 2nC beside 4CC + 3CF a patch and layer

    def to_dict(self) -> dict:
        return asdict(self) | {
            "model_type": "sailvit",
            "qkv_bias": False,
            "use_bias": False,
            "is_native": self.position == "sincos",
        }


class VisionAttention(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope, attend: Attend, layer: int) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.heads, -1).unbind(1)  # (S, H, D) each
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(attend(layer, q, k, v).reshape(x.shape))


class VisionMLP(nn.Module):
    """SwiGLU under AIMv2's names: fc1 is the gate, fc3 the up and fc2 the down projection."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.fc3 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class VisionBlock(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.attn, self.mlp = VisionAttention(c), VisionMLP(c)
        self.norm_1, self.norm_2 = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, rope, attend: Attend, layer: int) -> Tensor:
        x = x + self.attn(self.norm_1(x), rope, attend, layer)
        return x + self.mlp(self.norm_2(x))


class Patchifier(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Preprocessor(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.patchifier = Patchifier(c)
        if c.position != "sincos":
            self.pos_embed = nn.Parameter(
                torch.empty(1, (c.image_size // c.patch_size) ** 2, c.hidden_size)
            )


class VisionTrunk(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.num_hidden_layers))
        self.post_trunk_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


def patchify(images: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) -> (N, h*w, 3*size*size): each patch's pixels in the order of the convolution's weights."""
    N, channels, H, W = images.shape
    if H % size or W % size:
        raise ValueError(
            f"image of {H}x{W} pixels is not a whole number of {size}-pixel patches; resize it first (data.py)"
        )
    cut = images.view(N, channels, H // size, size, W // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(N, -1, channels * size * size)


def sincos(h: int, w: int, width: int) -> Tensor:
    """(h*w, width) fp64: sines and cosines of the column, then of the row, at width/4 frequencies from 1 down to 1/10,000."""
    frequency = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (torch.arange(n, dtype=torch.float64)[:, None] * frequency for n in (h, w))
    row, column = row.repeat_interleave(w, 0), column.repeat(h, 1)  # (h*w, width/4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)


RENAMED = (
    ("preprocessor.patchifier.proj", "embeddings.patch_embed"),
    ("preprocessor.patchifier.norm", "embeddings.rms_norm"),
    ("trunk.blocks", "encoder.layers"),
    ("trunk.post_trunk_norm", "rms_norm"),
    ("attn.proj", "attention.out_proj"),
    ("norm_", "rms_norm"),
    ("mlp.fc1", "ffn.gate_proj"),
    ("mlp.fc3", "ffn.up_proj"),
    ("mlp.fc2", "ffn.down_proj"),
)


def transformers_names(name: str, value: Tensor) -> dict[str, Tensor]:
    """The layout (see infra/weights.py) of transformers' Aimv2VisionModel: other names, query, key and value apart."""
    if name == "preprocessor.pos_embed":
        return {"embeddings.position_embedding.weight": value[0]}
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    if "attn.qkv" in name:
        return {
            name.replace("attn.qkv", f"attention.{part}_proj"): w
            for part, w in zip("qkv", value.chunk(3))
        }
    return {name: value}


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = VisionTrunk(config)
        self.recompute = False  # keep no activations inside blocks

    def position_table(self, h: int, w: int) -> Tensor:
        """(h*w, C): the learned table resized to an h x w grid."""
        if self.config.position == "sincos":
            return sincos(h, w, self.config.hidden_size).to(
                self.preprocessor.patchifier.norm.weight
            )
        table = self.preprocessor.pos_embed[0]
        side = self.config.image_size // self.config.patch_size
        if (h, w) == (side, side):
            return table
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square.float(), (h, w), mode="bicubic", align_corners=False).to(
            table.dtype
        )
        return resized[0].flatten(1).T

    def rope(self, grids: list[tuple[int, int]], like: Tensor):
        """2-D RoPE: half of each head turns with the row, half with the column. Base-grid units, so sizes interpolate."""
        if self.config.position != "rope2d":
            return None
        side, dim = (
            self.config.image_size // self.config.patch_size,
            like.shape[1] // self.config.num_attention_heads,
        )
        turns = []
        for h, w in grids:
            row = (torch.arange(h, device=like.device) * (side / h)).repeat_interleave(w)
            column = (torch.arange(w, device=like.device) * (side / w)).repeat(h)
            turns.append(torch.stack([row, column]))
        axes = [
            rotary_table(axis, dim // 2, 1e4, like.dtype) for axis in torch.cat(turns, 1)
        ]  # row and column tables
        halves = [
            torch.stack([a[..., : dim // 4] for a in pair], -1).flatten(-2) for pair in zip(*axes)
        ]
        return tuple(half.repeat(1, 1, 2) for half in halves)  # cos, sin: (S, 1, D)

    def forward(
        self, images: Tensor | list[Tensor], attend: Attend | None = None
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """images (N, 3, H, W), or a list of (3, H_i, W_i), normalised pixels -> features (S, C) and each image's grid.

        `attend` replaces full attention inside each image (the autoregressive stand-in passes a prefix-causal one).
        Raises ValueError when a side is not a whole number of patches.
        """
        stacks = [images] if torch.is_tensor(images) else [image[None] for image in images]
        p, grids, tokens = self.config.patch_size, [], []
        conv, weight = self.preprocessor.patchifier.proj, self.preprocessor.patchifier.proj.weight
        for stack in stacks:
            h, w = stack.shape[-2] // p, stack.shape[-1] // p
            x = F.linear(
                patchify(stack, p).to(weight.dtype), weight.flatten(1), conv.bias
            )  # the convolution, as one matmul
            tokens.append(
                (self.preprocessor.patchifier.norm(x) + self.position_table(h, w)).flatten(0, 1)
            )
            grids += [(h, w)] * stack.shape[0]
        x = torch.cat(tokens) if len(tokens) > 1 else tokens[0]  # (S, C)
        rope = self.rope(grids, x)
        attend = attend or attend_inside(
            Segments.of([h * w for h, w in grids], x.device), causal=False
        )
        for i, block in enumerate(self.trunk.blocks):
            again = self.recompute and torch.is_grad_enabled()
            x = (
                checkpoint(block, x, rope, attend, i, use_reentrant=False)
                if again
                else block(x, rope, attend, i)
            )
        return self.trunk.post_trunk_norm(x), grids

    @staticmethod
    def from_pretrained(directory, dtype: torch.dtype = torch.float32, device="cpu") -> "ViT":
        """A SAIL-ViT or AIMv2 directory, under AIMv2's original names or transformers' (either may open with `vision_model.`).
        Raises ValueError naming what does not fit."""
        config = ViTConfig.from_dict(read_config(directory), f"{directory}/config.json")
        names = weights.locate(directory).keys()
        prefix = "vision_model." if all(n.startswith("vision_model.") for n in names) else ""
        original = lambda name, value: {name: value}
        layout = (
            transformers_names
            if any(n.startswith(prefix + "encoder.") for n in names)
            else original
        )
        with torch.device("meta"):
            model = ViT(config)
        return weights.load_weights(
            model,
            directory,
            dtype,
            device,
            lambda name, value: {prefix + disk: view for disk, view in layout(name, value).items()},
        )

    def save_pretrained(self, directory) -> None:
        """SAIL-ViT's own layout."""
        weights.save_weights(self, directory, self.config.to_dict())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fan-in; a wide position table (std 0.5): on tiny images a table at 0.02 is learned last (our measurement)."""
        depth = 2 * len(self.trunk.blocks)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("pos_embed"):
                p.normal_(0.0, 0.5, generator=generator)
            else:
                residual = name.endswith(("attn.proj.weight", "fc2.weight"))
                p.normal_(
                    0.0,
                    p[0].numel() ** -0.5 * (depth**-0.5 if residual else 1.0),
                    generator=generator,
                )
