"""The vision encoder: an AIMv2-style ViT, which is what SAIL-ViT is.

What it teaches: a ViT at the size of one file, and what "any resolution" takes. Patches become tokens
by one strided convolution, get an RMSNorm and a learned position, then pass pre-norm blocks with full
attention and SwiGLU. There is no class token: all patch features go on to the language model. Images
of different sizes are packed end to end and attend inside themselves only.

    pixels (N, 3, H, W) --patchify, one matmul, norm--> (S, C) --+ position of each patch--> blocks
                                                        --post_trunk_norm--> features (S, C), grids

Positions. The paper's text (section 2.1.2) says that the learned table "is resized to match the input
resolution"; the label in its Figure 2 says "Interpolate 2D RoPE". No any-resolution code or weights
are public, so the two cannot be reconciled:

    position="table"     the text, and the default
    position="rope2d"    the label, on top of the resized table
    position="sincos"    AIMv2's own answer (its "native" weights): no table at all but sines and
                         cosines of row and column

The resize is bicubic with anti-aliasing off and half-pixel centres (our choice, the usual one for ViT
tables), and the identity at the base size, so a full square image gives the fixed-resolution output
bit for bit.

Legend: N images, h x w patch grid of an image, S patches of all images end to end, C width, H heads,
D head size. Parameter names are those of the released checkpoints (`preprocessor.patchifier...`,
`trunk.blocks...`).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention import Attend, Segments, attend_inside
from infra import weights
from infra.config import read_config, read_vit, write_vit
from llm import RMSNorm, choose_elementwise, rotary_table


@dataclass(frozen=True)
class ViTConfig:
    """SAIL-ViT-Huge at 448 pixels by default, as inside SAIL-VL2-2B and 8B."""

    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 12
    patch_size: int = 14
    image_size: int = 448
    num_channels: int = 3
    rms_norm_eps: float = 1e-5
    position: str = "table"  # or "rope2d", "sincos"

    @property
    def side(self) -> int:
        """Patches along a side of the image that the position table is made for."""
        return self.image_size // self.patch_size

    def work(self, pixels: int) -> int:
        """The cost of an image, in patches; packing shares it out evenly.

        The unit is what the matrices of one layer cost for one patch, 4 C^2 + 3 C I multiplications.
        Attention over n patches costs 2 n^2 C more.
        """
        n = pixels // self.patch_size**2
        attention = n * n / (2 * self.hidden_size + 1.5 * self.intermediate_size)
        return round(n + attention)

    @staticmethod
    def from_dict(values: dict, source: str = "config.json") -> "ViTConfig":
        """From a SAIL-ViT or AIMv2 configuration. Raises ValueError naming an unsupported key."""
        return read_vit(ViTConfig, values, source)

    def to_dict(self) -> dict:
        return write_vit(self)


# ------------------------------------------------------------------------------------- the block


class VisionAttention(nn.Module):
    """Full attention among the patches of an image."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=False)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope, attend: Attend, layer: int) -> Tensor:
        """x (S, C) -> (S, C). rope: cos and sin (S, 1, D), or None."""
        qkv = self.qkv(x).view(x.shape[0], 3, self.heads, -1)  # (S, 3, H, D)
        q, k, v = qkv.unbind(1)
        if rope is not None:
            turn = choose_elementwise(q).rotate
            q = turn(q, *rope)
            k = turn(k, *rope)
        out = attend(layer, q, k, v)  # (S, H, D)
        return self.proj(out.reshape(x.shape))


class VisionMLP(nn.Module):
    """SwiGLU under AIMv2's names: fc1 is the gate, fc3 the up and fc2 the down projection."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.fc3 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc1(x)  # (S, I)
        up = self.fc3(x)
        return self.fc2(choose_elementwise(gate).swiglu(gate, up))


class VisionBlock(nn.Module):
    """Attention, then SwiGLU, each behind a norm and added to what came in."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.attn = VisionAttention(c)
        self.mlp = VisionMLP(c)
        self.norm_1 = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.norm_2 = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope, attend: Attend, layer: int) -> Tensor:
        x = x + self.attn(self.norm_1(x), rope, attend, layer)
        return x + self.mlp(self.norm_2(x))


# --------------------------------------------------------------------------------------- patches
# The next three modules hold parameters under their released names; `ViT.forward` computes.


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
            self.pos_embed = nn.Parameter(torch.empty(1, c.side**2, c.hidden_size))


class VisionTrunk(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.num_hidden_layers))
        self.post_trunk_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


def patchify(images: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) -> (N, h*w, 3 * size * size).

    A patch's pixels come in the order of the convolution's weights. Raises ValueError when a side is
    not a whole number of patches.
    """
    N, channels, H, W = images.shape
    if H % size or W % size:
        raise ValueError(
            f"image of {H}x{W} pixels is not a whole number of {size}-pixel patches; resize it "
            "first (data/tiling.py)"
        )
    # Cut along both sides, then bring the two cuts together.
    patches = images.view(N, channels, H // size, size, W // size, size)
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # (N, h, w, 3, size, size)
    return patches.reshape(N, -1, channels * size * size)


def sincos(h: int, w: int, width: int) -> Tensor:
    """(h*w, width) fp64: sines and cosines of the column, then of the row.

    Each at width / 4 frequencies from 1 down to 1/10,000.
    """
    # A quarter of the width for each of sine and cosine, of row and of column.
    quarter = width // 4
    exponent = torch.arange(quarter, dtype=torch.float64) / quarter
    frequency = 1e4**-exponent
    row = torch.arange(h, dtype=torch.float64)[:, None] * frequency  # (h, width / 4)
    column = torch.arange(w, dtype=torch.float64)[:, None] * frequency  # (w, width / 4)

    # Every patch has those of its row and of its column.
    row = row.repeat_interleave(w, 0)  # (h*w, width / 4)
    column = column.repeat(h, 1)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)


# ------------------------------------------------------------------------------------- the model


class ViT(nn.Module):
    """Images of any sizes -> features of all their patches.

    recompute: keep no activations inside blocks, compute them again in the backward pass.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = VisionTrunk(config)
        self.recompute = False

    def forward(
        self, images: Tensor | list[Tensor], attend: Attend | None = None
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised pixels -> features (S, C) and the (h, w) grid of each image.

        images: (N, 3, H, W), or a list of (3, H_i, W_i). `attend` replaces full attention inside each
        image (the autoregressive stand-in for AIMv2 passes a prefix-causal one). Raises ValueError
        when a side is not a whole number of patches.
        """
        # Patches of all images end to end, with their positions.
        stacks = [images] if torch.is_tensor(images) else [image[None] for image in images]
        size = self.config.patch_size
        grids = []
        tokens = []
        for stack in stacks:
            count, _, height, width = stack.shape
            h = height // size
            w = width // size
            grids += [(h, w)] * count
            x = self.embed_patches(stack) + self.position_table(h, w)  # (N, h*w, C)
            tokens.append(x.flatten(0, 1))
        x = torch.cat(tokens) if len(tokens) > 1 else tokens[0]  # (S, C)

        # An image is a document that sees all of itself.
        rope = self.rope(grids, x)
        if attend is None:
            segments = Segments.of([h * w for h, w in grids], x.device)
            attend = attend_inside(segments, causal=False)

        # The blocks do not know what an image is.
        recompute = self.recompute and torch.is_grad_enabled()
        for layer, block in enumerate(self.trunk.blocks):
            if recompute:
                x = checkpoint(block, x, rope, attend, layer, use_reentrant=False)
            else:
                x = block(x, rope, attend, layer)
        return self.trunk.post_trunk_norm(x), grids

    def embed_patches(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, h*w, C): the strided convolution and its norm."""
        # Patches do not overlap, so the convolution is a matrix product.
        patchifier = self.preprocessor.patchifier
        weight = patchifier.proj.weight  # (C, 3, size, size)
        patches = patchify(images, self.config.patch_size).to(weight.dtype)
        x = F.linear(patches, weight.flatten(1), patchifier.proj.bias)
        return patchifier.norm(x)

    def position_table(self, h: int, w: int) -> Tensor:
        """(h*w, C): the position of each patch of an h x w grid."""
        # Computed.
        if self.config.position == "sincos":
            weight = self.preprocessor.patchifier.norm.weight
            return sincos(h, w, self.config.hidden_size).to(weight)

        # Learned, and at its own size.
        table = self.preprocessor.pos_embed[0]  # (side * side, C)
        side = self.config.side
        if (h, w) == (side, side):
            return table

        # Resized like a picture of C channels.
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, side, side)
        resized = F.interpolate(square.float(), (h, w), mode="bicubic", align_corners=False)
        return resized.to(table.dtype)[0].flatten(1).T

    def rope(self, grids: list[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor] | None:
        """2-D RoPE, cos and sin (S, 1, D): half of each head turns with the row, half with the column.

        Rows and columns are counted in patches of the base grid, so that sizes interpolate.
        """
        if self.config.position != "rope2d":
            return None

        # Row and column of every patch.
        side = self.config.side
        rows = []
        columns = []
        for h, w in grids:
            row = torch.arange(h, device=like.device) * (side / h)
            column = torch.arange(w, device=like.device) * (side / w)
            rows.append(row.repeat_interleave(w))
            columns.append(column.repeat(h))

        # A table of D/4 angles for each axis: the other half of `rotary_table` repeats them.
        dim = like.shape[1] // self.config.num_attention_heads
        by_row = rotary_table(torch.cat(rows), dim // 2, 1e4, like.dtype)
        by_column = rotary_table(torch.cat(columns), dim // 2, 1e4, like.dtype)

        # Coordinates alternate between row and column; the second half pairs with the first.
        tables = []
        for row, column in zip(by_row, by_column):  # cosines, then sines: (S, 1, D/2) each
            both = torch.stack([row[..., : dim // 4], column[..., : dim // 4]], -1)
            tables.append(both.flatten(-2).repeat(1, 1, 2))
        cos, sin = tables
        return cos, sin

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fan-in, residual outputs scaled down by depth, and a wide position table (std 0.5).

        On tiny images a table at 0.02 is learned last (our measurement).
        """
        depth = 2 * len(self.trunk.blocks)
        for name, p in self.named_parameters():
            # Norms and biases.
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue

            # Matrices and the convolution: rows are outputs.
            std = p[0].numel() ** -0.5
            if name.endswith("pos_embed"):
                std = 0.5
            elif name.endswith(("attn.proj.weight", "fc2.weight")):
                std *= depth**-0.5
            p.normal_(0.0, std, generator=generator)

    # ------------------------------------------------------------------------------------- files

    @staticmethod
    def from_pretrained(directory, dtype: torch.dtype = torch.float32, device="cpu") -> "ViT":
        """A SAIL-ViT or AIMv2 directory, under AIMv2's original names or transformers'.

        Either may open with `vision_model.`. Raises ValueError naming what does not fit.
        """
        config = ViTConfig.from_dict(read_config(directory), f"{directory}/config.json")

        # Which of the spellings it is, the names say.
        names = weights.locate(directory).keys()
        prefix = ""
        if all(name.startswith("vision_model.") for name in names):
            prefix = "vision_model."
        by_transformers = any(name.startswith(prefix + "encoder.") for name in names)

        def layout(name: str, value: Tensor) -> dict[str, Tensor]:
            views = transformers_names(name, value) if by_transformers else {name: value}
            return {prefix + stored: view for stored, view in views.items()}

        with torch.device("meta"):
            model = ViT(config)
        return weights.load_weights(model, directory, dtype, device, layout)

    def save_pretrained(self, directory) -> None:
        """SAIL-ViT's own layout."""
        weights.save_weights(self, directory, self.config.to_dict())


# ------------------------------------------------------------------------------- names on disk

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
    """The layout of transformers' Aimv2VisionModel (what a layout is, infra/weights.py says).

    Other names, and query, key and value apart.
    """
    if name == "preprocessor.pos_embed":
        return {"embeddings.position_embedding.weight": value[0]}
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    if "attn.qkv" not in name:
        return {name: value}
    parts = zip("qkv", value.chunk(3))
    return {name.replace("attn.qkv", f"attention.{part}_proj"): view for part, view in parts}
