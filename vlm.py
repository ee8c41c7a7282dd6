"""SAIL-VL2: a ViT, an adapter and a language model, joined by overwriting embeddings.

What it teaches: how little a vision-language model adds. Image placeholders in the prompt are embedded like any token and
then overwritten, in order, by the adapter's visual tokens; the decoder sees one sequence with ordinary positions.

    image -> vit (S, Cv) -> adapter (S/4, C) ----+
    ids (B, T) -> embed (B*T, C) -> overwrite at image_token_id -> llm -> hidden -> lm_head -> logits (B, T, V)

Legend: B rows, T tokens a row, C text width, V vocabulary, N images, S patches of all images.
Source: SAIL-VL2 section 2.1 and the released configuration; names as in the released safetensors.
"""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from adapter import Adapter
from attention import Attend, Segments, attend_inside
from infra import weights
from infra.config import pick, read_config
from llm import LLM, LLMConfig
from moe import upcycle
from vit import ViT, ViTConfig


@dataclass(frozen=True)
class VLMConfig:
    """Architecture plus the preprocessing that the weights were trained with."""

    vision: ViTConfig = ViTConfig()
    text: LLMConfig = LLMConfig()
    min_tiles: int = 1
    max_tiles: int = 10  # the released processor; its config.json says 12
    thumbnail: bool = True
    msac: bool = False  # a second pass over grids (data/tiling.py)
    any_resolution: bool = False
    image_token_id: int = 151671

    @staticmethod
    def from_dict(
        c: dict, processor: dict | None = None, source: str = "config.json"
    ) -> "VLMConfig":
        """From a released config.json and, when there is one, preprocessor_config.json: the released tiler obeys the latter.
        Raises ValueError naming a missing key or an unsupported choice."""
        own, processor = c.get("nanosail", {}), processor or {}
        values = {
            "vision": c.get("vision_config"),
            "text": c.get("llm_config"),
            "min_tiles": c.get("min_dynamic_patch"),
            "max_tiles": processor.get("max_dynamic_patch", c.get("max_dynamic_patch", 12)),
            "msac": processor.get("use_msac"),
            "thumbnail": c.get("use_thumbnail"),
        }
        values |= own if isinstance(own, dict) else {}
        values["vision"] = ViTConfig.from_dict(values["vision"], f"{source}: vision_config")
        values["text"] = LLMConfig.from_dict(values["text"], f"{source}: llm_config")
        optional = tuple(f.name for f in fields(VLMConfig))
        only = {
            "model_type": "sailvl",
            "select_layer": -1,
            "downsample_ratio": 0.5,
            "ps_version": "v2",
        }
        return pick(VLMConfig, values | {key: c.get(key) for key in only}, source, optional, **only)

    def to_dict(self) -> dict:
        """The released layout; what it has no field for goes under "nanosail"."""
        return {
            "architectures": ["SAILVLModel"],
            "model_type": "sailvl",
            "downsample_ratio": 0.5,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "univl-chat",
            "dynamic_image_size": True,
            "use_thumbnail": self.thumbnail,
            "force_image_size": self.vision.image_size,
            "min_dynamic_patch": self.min_tiles,
            "max_dynamic_patch": self.max_tiles,
            "llm_config": self.text.to_dict(),
            "vision_config": self.vision.to_dict(),
            "nanosail": {
                key: getattr(self, key)
                for key in ("max_tiles", "msac", "any_resolution", "image_token_id")
            },
        }


QWEN3 = {
    "0.6B": LLMConfig(hidden_size=1024, intermediate_size=3072),
    "1.7B": LLMConfig(
        tie_word_embeddings=False
    ),  # Qwen3 ties it; SAIL-VL2-2B stores a head of its own
    "8B": LLMConfig(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "30B-A3B": LLMConfig(
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        tie_word_embeddings=False,
    ),
}
SAIL_VIT = {"large": ViTConfig(1024, 2816, 24, 8), "huge": ViTConfig()}
TOY_VIT = ViTConfig(96, 256, 3, 3, patch_size=8, image_size=32)
TOY_LLM = LLMConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
PRESETS = {
    "toy": VLMConfig(TOY_VIT, TOY_LLM, max_tiles=1),
    "toy-moe": VLMConfig(
        TOY_VIT,
        replace(TOY_LLM, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256),
        max_tiles=1,
    ),
} | {
    f"SAIL-VL2-{name}": VLMConfig(SAIL_VIT["huge"], QWEN3[llm])
    for name, llm in (("1B", "0.6B"), ("2B", "1.7B"), ("8B", "8B"), ("30B-A3B", "30B-A3B"))
}


class SailVL(nn.Module):
    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.vision_model = ViT(config.vision)
        self.mlp1 = Adapter(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = LLM(config.text)
        self.image_token_id = config.image_token_id

    def embed(self, input_ids: Tensor, images: Tensor | list[Tensor] | None) -> Tensor:
        """ids (B, T) and normalised pixels -> embeddings (B*T, C), visual tokens in their places.

        Raises ValueError when placeholders and visual tokens differ in number: both numbers and the first row concerned.
        """
        x = self.language_model.embed(input_ids.reshape(-1))  # (B*T, C)
        holes = input_ids.reshape(-1) == self.image_token_id
        count = int(holes.sum())
        if images is None or len(images) == 0:
            if count:
                raise ValueError(self._mismatch(input_ids, 0))
            return x + self.touch_vision()  # every rank runs the same modules
        visual = self.mlp1(*self.vision_model(images)).to(x.dtype)  # (S/4, C)
        if visual.shape[0] != count:
            raise ValueError(self._mismatch(input_ids, visual.shape[0]))
        return x.masked_scatter(holes[:, None], visual)

    def touch_vision(self) -> Tensor:
        """A zero that depends on ViT and adapter, so that a text-only batch gives them (zero) gradients like any other.

        Without it a rank with no image would skip collectives that its peers wait for. Costs one minimal image.
        """
        weight = self.vision_model.preprocessor.patchifier.proj.weight
        if not (
            torch.is_grad_enabled()
            and any(p.requires_grad for m in (self.vision_model, self.mlp1) for p in m.parameters())
        ):
            return torch.zeros((), device=weight.device)
        c = self.config.vision
        blank = weight.new_zeros(1, c.num_channels, 2 * c.patch_size, 2 * c.patch_size)
        return self.mlp1(*self.vision_model(blank)).sum() * 0.0

    def _mismatch(self, input_ids: Tensor, visual: int) -> str:
        rows = (input_ids == self.image_token_id).sum(1).tolist()
        return (
            f"{sum(rows)} image placeholders (id {self.image_token_id}) in the batch but {visual} visual tokens from the "
            f"images; placeholders per sample: {dict(enumerate(rows))}. Each image needs one placeholder per visual token."
        )

    def hidden(
        self,
        input_ids: Tensor,
        images=None,
        positions: Tensor | None = None,
        segments: Segments | None = None,
        attend: Attend | None = None,
        routing: list | None = None,
    ) -> Tensor:
        """Everything up to the last norm: (B*T, C). Without `segments` each row is one document."""
        B, T = input_ids.shape
        segments = segments or Segments.of([T] * B, input_ids.device)
        positions = segments.positions() if positions is None else positions.reshape(-1)
        return self.language_model(
            self.embed(input_ids, images),
            positions,
            attend or attend_inside(segments, causal=True),
            routing,
        )

    def forward(
        self, input_ids: Tensor, pixel_values=None, positions=None, segments=None, attend=None
    ) -> Tensor:
        """ids (B, T) int64, pixels (N, 3, H, W) or a list of images -> logits (B, T, V)."""
        hidden = self.hidden(input_ids, pixel_values, positions, segments, attend)
        return self.language_model.lm_head(hidden).view(*input_ids.shape, -1)

    def logprobs(
        self,
        input_ids: Tensor,
        images,
        positions,
        segments,
        at: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        routing: list | None = None,
    ) -> Tensor:
        """log p(labels) at the flat positions `at` (n,) of a packed batch -> (n,) fp32. What every objective starts from:
        logits exist for supervised positions only."""
        hidden = self.hidden(input_ids, images, positions, segments, routing=routing).index_select(
            0, at
        )
        return token_logprobs(hidden, self.language_model.lm_head.weight, labels, temperature)

    def init_weights(self, seed: int = 0) -> "SailVL":
        generator = torch.Generator().manual_seed(seed)
        self.vision_model.init_weights(generator)
        self.language_model.init_weights(generator)
        tied = (
            self.config.text.tie_word_embeddings
        )  # visual tokens start at the size of the text embeddings
        self.mlp1.init_weights(generator, scale=self.config.text.hidden_size**-0.5 if tied else 1.0)
        return self

    def save_pretrained(self, directory) -> None:
        weights.save_weights(self, directory, self.config.to_dict())

    @staticmethod
    def from_pretrained(directory, dtype: torch.dtype = torch.float32, device="cpu") -> "SailVL":
        """A released SAIL-VL2 directory or one of ours. Raises ValueError naming what does not fit."""
        processor = Path(directory, "preprocessor_config.json")
        processor = read_config(directory, processor.name) if processor.is_file() else None
        config = VLMConfig.from_dict(read_config(directory), processor, f"{directory}/config.json")
        where = weights.locate(directory)
        if (
            "language_model.lm_head.weight" in where
        ):  # the 2B stores a head although its config says tied: believe the file
            config = replace(config, text=replace(config.text, tie_word_embeddings=False))
        with torch.device("meta"):
            model = SailVL(config)
        return weights.load_weights(model, directory, dtype, device)

    @staticmethod
    def from_parts(
        vision,
        text,
        dtype: torch.dtype = torch.float32,
        device="cpu",
        seed: int = 0,
        **preprocessing,
    ) -> "SailVL":
        """How the paper starts: a trained ViT (a SAIL-ViT or AIMv2 directory), a trained language model (a Qwen3 directory), and
        between them a fresh adapter. `preprocessing`: fields of VLMConfig, e.g. any_resolution=True."""
        vision, text = (
            ViT.from_pretrained(vision, dtype, device),
            LLM.from_pretrained(text, dtype, device),
        )
        with torch.device("meta"):
            model = SailVL(VLMConfig(vision.config, text.config, **preprocessing))
        model.vision_model, model.language_model = vision, text
        model.mlp1 = Adapter(vision.config.hidden_size, text.config.hidden_size)
        embeddings = (
            text.model.embed_tokens.weight.detach()
        )  # visual tokens start at their size (our choice)
        size = torch.linalg.vector_norm(embeddings, dtype=torch.float32) / embeddings.numel() ** 0.5
        model.mlp1.init_weights(torch.Generator().manual_seed(seed), float(size))
        model.mlp1.to(device, dtype)
        return model

    def parameter_counts(self) -> dict[str, int]:
        """All parameters ("total"), and those that one token passes through ("active": K of E experts)."""
        t, total = self.config.text, sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        return {
            "total": total,
            "active": total
            - experts * (t.num_experts - t.num_experts_per_tok) // max(t.num_experts, 1),
        }

    def to_moe(self, text: LLMConfig) -> "SailVL":
        """A copy with mixture-of-experts layers that computes the same function (see moe.upcycle)."""
        other = SailVL(replace(self.config, text=text)).init_weights()
        ours = dict(self.named_parameters())
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name in ours:
                    p.copy_(ours[name])
        for a, b in zip(self.language_model.model.layers, other.language_model.model.layers):
            upcycle(a.mlp, b.mlp)
        other.image_token_id = self.image_token_id
        return other


def token_logprobs(
    hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0, chunk: int = 0
) -> Tensor:
    """log p(label) of each position: hidden (n, C), head (V, C), labels (n,) -> (n,) fp32.

    More positions than `chunk` go through `ChunkedLogprobs`: (n, V) never exists whole. 0: as many as make 8 Mi logits, but no
    more than 24 chunks, since their gradients of the head are added up in its dtype and bf16 rounds every sum.
    """
    chunk = chunk or max(1, 2**23 // head.shape[0], -(-hidden.shape[0] // 24))
    if hidden.shape[0] <= chunk:
        return -F.cross_entropy((hidden @ head.T).float() / temperature, labels, reduction="none")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return ChunkedLogprobs.apply(hidden.to(dtype), head.to(dtype), labels, temperature, chunk)


class ChunkedLogprobs(torch.autograd.Function):
    """The same, one chunk of logits at a time. Keeps only log-normalisers; the backward pass makes each chunk's logits again and
    turns them in place into their gradient, (onehot - p) g / temperature. One buffer, and the head's gradient is summed in place."""

    @staticmethod
    def forward(ctx, hidden, head, labels, temperature, chunk):
        picked, normalisers = [], []
        for h, y in zip(hidden.split(chunk), labels.split(chunk)):
            logits = (h @ head.T).float().div_(temperature)
            picked.append(logits.gather(1, y[:, None])[:, 0])
            top = logits.amax(1, keepdim=True)
            normalisers.append(logits.sub_(top).exp_().sum(1).log_().add_(top[:, 0]))
            del logits  # before the next chunk's exist
        normaliser = torch.cat(normalisers)
        ctx.save_for_backward(hidden, head, labels, normaliser)
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat(picked) - normaliser

    @staticmethod
    def backward(ctx, grad):
        hidden, head, labels, normaliser = ctx.saved_tensors
        to_hidden, to_head = (
            torch.zeros_like(t) if need else None
            for t, need in zip((hidden, head), ctx.needs_input_grad)
        )
        for at in range(0, len(labels), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            d = (
                (hidden[part] @ head.T)
                .float()
                .div_(ctx.temperature)
                .sub_(normaliser[part, None])
                .exp_()
                .neg_()
            )
            d.scatter_add_(1, labels[part, None], torch.ones_like(d[:, :1]))
            d = d.mul_(grad[part, None] / ctx.temperature).to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[part] = d @ head
            if to_head is not None:
                to_head.addmm_(d.T, hidden[part])
            del d
        return to_hidden, to_head, None, None, None


@dataclass
class Join:
    """Make a VLM of a vision encoder, a language model and a fresh adapter: what the first stage starts from."""

    vision: Path  # a SAIL-ViT or AIMv2 directory
    text: Path  # a Qwen3 directory, with its tokenizer
    out: Path
    any_resolution: bool = False
    seed: int = 0  # of the adapter


def main(o: Join) -> int:
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.load(o.text)
    model = SailVL.from_parts(
        o.vision,
        o.text,
        torch.bfloat16,
        seed=o.seed,
        any_resolution=o.any_resolution,
        image_token_id=tokenizer.image,
    )
    model.save_pretrained(o.out)
    tokenizer.save(o.out)
    print(f"{o.out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Join, config=(tyro.conf.FlagConversionOff,))))
