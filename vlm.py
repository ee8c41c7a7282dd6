"""SAIL-VL2: a ViT, an adapter and a language model, joined by overwriting embeddings.

What it teaches: how little a vision-language model adds. Image placeholders in the prompt are
embedded like any token and then overwritten, in order, by the adapter's visual tokens; the decoder
sees one sequence with ordinary positions.

    images -> vit (S, Cv) -> adapter (S/4, C) --+
    ids (B, T) -> embed (B*T, C) -> overwrite at image_token_id -> llm -> hidden (B*T, C)
    hidden -> lm_head -> logits (B, T, V), or, where only some are wanted, log-probabilities (n,)

A batch without an image runs the vision modules all the same (`SailVL.touch_vision`), so that every
parameter that trains has a gradient in every step.

Legend: B rows, T tokens a row, C text width, V vocabulary, N images, S patches of all images, n
supervised positions. Source: SAIL-VL2 section 2.1 and the released configuration; names as in the
released safetensors.

    python vlm.py --vision SAILViT-Huge --text Qwen3-1.7B --out start    # a start for pre-training
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from adapter import Adapter
from attention import Attend, Segments, attend_inside
from infra import weights
from infra.cli import command
from infra.config import read_config, read_vlm, write_vlm
from llm import LLM, LLMConfig
from moe import Decisions, upcycle
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
        values: dict, processor: dict | None = None, source: str = "config.json"
    ) -> "VLMConfig":
        """From a released config.json and, when there is one, preprocessor_config.json.

        Raises ValueError naming a missing key or an unsupported choice.
        """
        return read_vlm(VLMConfig, values, processor, source)

    def to_dict(self) -> dict:
        return write_vlm(self)


# --------------------------------------------------------------------------------------- presets

# The language models that SAIL-VL2 starts from.
QWEN3 = {
    "0.6B": LLMConfig(hidden_size=1024, intermediate_size=3072),
    "1.7B": LLMConfig(
        tie_word_embeddings=False
    ),  # Qwen3 ties it; SAIL-VL2-2B has a head of its own
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
# The vision encoders: SAIL-ViT in two sizes.
SAIL_VIT = {
    "large": ViTConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=8,
    ),
    "huge": ViTConfig(),
}
# What a laptop trains in minutes.
TOY_VIT = ViTConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=3,
    patch_size=8,
    image_size=32,
)
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
TOY_MOE = replace(TOY_LLM, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256)
# Whole models.
PRESETS = {
    "toy": VLMConfig(TOY_VIT, TOY_LLM, max_tiles=1),
    "toy-moe": VLMConfig(TOY_VIT, TOY_MOE, max_tiles=1),
    "SAIL-VL2-1B": VLMConfig(SAIL_VIT["huge"], QWEN3["0.6B"]),
    "SAIL-VL2-2B": VLMConfig(SAIL_VIT["huge"], QWEN3["1.7B"]),
    "SAIL-VL2-8B": VLMConfig(SAIL_VIT["huge"], QWEN3["8B"]),
    "SAIL-VL2-30B-A3B": VLMConfig(SAIL_VIT["huge"], QWEN3["30B-A3B"]),
}


# ------------------------------------------------------------------------------------- the model


class SailVL(nn.Module):
    """Pixels and tokens in, hidden states, logits or log-probabilities out.

    always_sees: run the vision modules on a batch without an image also where they are frozen, as
    sharded weights want (see `touch_vision`).
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.image_token_id = config.image_token_id
        self.vision_model = ViT(config.vision)
        self.mlp1 = Adapter(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = LLM(config.text)
        self.always_sees = False

    def embed(self, input_ids: Tensor, images: Tensor | list[Tensor] | None) -> Tensor:
        """ids (B, T) and normalised pixels -> embeddings (B*T, C), visual tokens in their places.

        Raises ValueError when placeholders and visual tokens differ in number.
        """
        ids = input_ids.reshape(-1)
        x = self.language_model.embed(ids)  # (B*T, C)
        placeholders = ids == self.image_token_id

        # No image: every rank runs the same modules all the same.
        if images is None or len(images) == 0:
            self.check_placeholders(input_ids, 0)
            return x + self.touch_vision()

        # Visual tokens of all images, four patches each.
        features, grids = self.vision_model(images)  # (S, Cv)
        visual = self.mlp1(features, grids).to(x.dtype)  # (S/4, C)
        self.check_placeholders(input_ids, visual.shape[0])

        # In order, into the places of the placeholders: the only joint of the two halves.
        return x.masked_scatter(placeholders[:, None], visual)

    def touch_vision(self) -> Tensor:
        """A zero that depends on ViT and adapter, which gives them (zero) gradients.

        So a text-only batch is like any other. Without it, these parameters would have no gradient
        when no rank has an image, and the optimizer would leave out their momentum and decay; with
        a gradient of zero a step is the same on one rank and on many, and modules that are sharded
        are gathered by all ranks together (those of frozen modules too: `always_sees`). Costs one
        minimal image, where vision trains at all or all ranks must see.
        """
        weight = self.vision_model.preprocessor.patchifier.proj.weight
        vision = (*self.vision_model.parameters(), *self.mlp1.parameters())
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in vision)
        if not trains and not self.always_sees:
            return torch.zeros((), device=weight.device)

        # The smallest image.
        c = self.config.vision
        side = 2 * c.patch_size  # one visual token
        blank = weight.new_zeros(1, c.num_channels, side, side)
        features, grids = self.vision_model(blank)
        return self.mlp1(features, grids).sum() * 0.0

    def check_placeholders(self, input_ids: Tensor, visual: int) -> None:
        """Raises ValueError when the batch has another number of placeholders than of visual tokens.

        While it trains on an accelerator the device compares them, and fails by itself (RuntimeError,
        in a later call): the host would wait for it in every micro-batch.
        """
        placeholders = input_ids == self.image_token_id  # (B, T)
        if torch.is_grad_enabled() and not input_ids.is_cpu:
            torch._assert_async(
                placeholders.sum() == visual, "image placeholders are not as many as visual tokens"
            )
            return
        by_row = placeholders.sum(1).tolist()
        if sum(by_row) == visual:
            return
        raise ValueError(
            f"{sum(by_row)} image placeholders (id {self.image_token_id}) in the batch but {visual} "
            f"visual tokens from the images; placeholders per sample: {dict(enumerate(by_row))}. "
            "Each image needs one placeholder per visual token."
        )

    def hidden(
        self,
        input_ids: Tensor,
        images: Tensor | list[Tensor] | None = None,
        positions: Tensor | None = None,
        segments: Segments | None = None,
        attend: Attend | None = None,
        routing: Decisions | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Everything up to the last norm: ids (B, T) -> (B*T, C), or (n, C) at flat positions `at`.

        Without `segments` each row is one document. `attend`, `routing`, `at` as in `LLM.forward`.
        """
        # What is not said: each row is one document, and every token sees those before it.
        if segments is None:
            rows, length = input_ids.shape
            segments = Segments.of([length] * rows, input_ids.device)
        if positions is None:
            positions = segments.positions()
        if attend is None:
            attend = attend_inside(segments, causal=True)

        x = self.embed(input_ids, images)
        return self.language_model(x, positions.reshape(-1), attend, routing, at)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | list[Tensor] | None = None,
        positions: Tensor | None = None,
        segments: Segments | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """ids (B, T) int64, pixels (N, 3, H, W) or a list of images -> logits (B, T, V)."""
        hidden = self.hidden(input_ids, pixel_values, positions, segments, attend)
        logits = self.language_model.lm_head(hidden)
        return logits.view(*input_ids.shape, -1)

    def logprobs(
        self,
        input_ids: Tensor,
        images: Tensor | list[Tensor] | None,
        positions: Tensor,
        segments: Segments,
        at: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        routing: Decisions | None = None,
    ) -> Tensor:
        """log p(labels) at the flat positions `at` (n,) of a packed batch -> (n,) fp32.

        What every objective starts from: logits exist for supervised positions only.
        """
        hidden = self.hidden(
            input_ids, images, positions, segments, routing=routing, at=at
        )  # (n, C)
        head = self.language_model.lm_head.weight
        return token_logprobs(hidden, head, labels, temperature)

    # ------------------------------------------------------------------------------- beginnings

    def init_weights(self, seed: int = 0) -> "SailVL":
        """Random weights of all parts; visual tokens start at the size of the text embeddings."""
        generator = torch.Generator().manual_seed(seed)
        self.vision_model.init_weights(generator)
        self.language_model.init_weights(generator)
        text = self.config.text
        scale = text.hidden_size**-0.5 if text.tie_word_embeddings else 1.0
        self.mlp1.init_weights(generator, scale)
        return self

    @staticmethod
    def from_parts(
        vision,
        text,
        dtype: torch.dtype = torch.float32,
        device="cpu",
        seed: int = 0,
        **preprocessing,
    ) -> "SailVL":
        """How the paper starts: a trained ViT, a trained language model, and a fresh adapter.

        vision: a SAIL-ViT or AIMv2 directory. text: a Qwen3 directory. seed: of the adapter.
        preprocessing: fields of VLMConfig, e.g. any_resolution=True.
        """
        # The two that are trained already.
        vision_model = ViT.from_pretrained(vision, dtype, device)
        language_model = LLM.from_pretrained(text, dtype, device)
        config = VLMConfig(vision_model.config, language_model.config, **preprocessing)
        with torch.device("meta"):
            model = SailVL(config)
        model.vision_model = vision_model
        model.language_model = language_model

        # Visual tokens start at the size of the text embeddings, their root mean square (our choice).
        embeddings = language_model.model.embed_tokens.weight.detach()
        norm = torch.linalg.vector_norm(embeddings, dtype=torch.float32)
        size = norm / embeddings.numel() ** 0.5
        adapter = Adapter(config.vision.hidden_size, config.text.hidden_size)
        adapter.init_weights(torch.Generator().manual_seed(seed), float(size))
        model.mlp1 = adapter.to(device, dtype)
        return model

    def to_moe(self, text: LLMConfig) -> "SailVL":
        """A copy with mixture-of-experts layers that computes the same (see `moe.upcycle`)."""
        sparse = SailVL(replace(self.config, text=text)).init_weights()
        sparse.image_token_id = self.image_token_id

        # All that both have, then the feed-forwards.
        dense_parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, p in sparse.named_parameters():
                if name in dense_parameters:
                    p.copy_(dense_parameters[name])
        dense_layers = self.language_model.model.layers
        sparse_layers = sparse.language_model.model.layers
        for dense, copy in zip(dense_layers, sparse_layers):
            upcycle(dense.mlp, copy.mlp)
        return sparse.to(self.language_model.lm_head.weight.device)

    def parameter_counts(self) -> dict[str, int]:
        """All parameters ("total"), and those a token passes through ("active": K of E experts)."""
        # Of a layer's E experts a token passes through K; the others are idle.
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        text = self.config.text
        idle = 0
        if text.num_experts:
            idle = experts * (text.num_experts - text.num_experts_per_tok) // text.num_experts
        return {"total": total, "active": total - idle}

    # ------------------------------------------------------------------------------------- files

    @staticmethod
    def from_pretrained(directory, dtype: torch.dtype = torch.float32, device="cpu") -> "SailVL":
        """A released SAIL-VL2 directory or one of ours. Raises ValueError naming what does not fit.

        device "meta": the model alone, without memory; scale/shards.py fills it in parts.
        """
        # Sizes, and how pictures were cut when the weights were trained.
        processor = None
        if Path(directory, "preprocessor_config.json").is_file():
            processor = read_config(directory, "preprocessor_config.json")
        values = read_config(directory)
        config = VLMConfig.from_dict(values, processor, f"{directory}/config.json")

        # The 2B stores a head although its config says tied: the file is believed.
        if "language_model.lm_head.weight" in weights.locate(directory):
            config = replace(config, text=replace(config.text, tie_word_embeddings=False))

        with torch.device("meta"):
            model = SailVL(config)
        if torch.device(device).type == "meta":
            return model
        return weights.load_weights(model, directory, dtype, device)

    def save_pretrained(self, directory) -> None:
        """The released layout."""
        weights.save_weights(self, directory, self.config.to_dict())


def check_vocabulary(config: VLMConfig, tokens: int, source) -> None:
    """Raises ValueError for a tokenizer of `tokens` ids that the model has no embedding for.

    The other way round is fine: vocabularies are rounded up.
    """
    vocabulary = config.text.vocab_size
    if tokens > vocabulary:
        raise ValueError(
            f"{source}: the tokenizer has {tokens} tokens, the model embeds {vocabulary}: they do "
            "not belong together"
        )


# ----------------------------------------------------------------------------- log-probabilities


def token_logprobs(
    hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0, chunk: int = 0
) -> Tensor:
    """log p(label) of each position: hidden (n, C), head (V, C), labels (n,) -> (n,) fp32.

    More positions than `chunk` go through `ChunkedLogprobs`, so that (n, V) never exists whole.
    chunk 0: as many as make 8 Mi logits, but no more than 24 chunks, since their gradients of the
    head are added up in its dtype and bf16 rounds every sum.
    """
    # How many logits may exist at once.
    if not chunk:
        few_logits = 2**23 // head.shape[0]
        few_chunks = -(-hidden.shape[0] // 24)
        chunk = max(1, few_logits, few_chunks)

    # Autocast does not reach into an autograd function.
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    hidden = hidden.to(dtype)
    head = head.to(dtype)
    if hidden.shape[0] <= chunk:
        return WholeLogprobs.apply(hidden, head, labels, temperature)
    return ChunkedLogprobs.apply(hidden, head, labels, temperature, chunk)


class WholeLogprobs(torch.autograd.Function):
    """`token_logprobs` by its definition, log softmax(h W^T / t) at y; what is kept turns in place
    into the gradient of the logits, so there is one backward pass only.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, temperature: float) -> Tensor:
        logits = (hidden @ head.T).float()  # (n, V)
        if temperature != 1:
            logits.div_(temperature)
        logp = logits.log_softmax(1)
        ctx.save_for_backward(hidden, head, labels, logp)
        ctx.temperature = temperature
        return logp.gather(1, labels[:, None])[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, head, labels, logp = ctx.saved_tensors
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        d = into_gradient(logp, labels, grad / ctx.temperature).to(hidden.dtype)  # (n, V)
        d_hidden = d @ head if needs_hidden else None
        d_head = d.T @ hidden if needs_head else None
        return d_hidden, d_head, None, None


class ChunkedLogprobs(torch.autograd.Function):
    """`token_logprobs`, one chunk of logits at a time.

    log p(y) = z_y / t - log sum_v exp(z_v / t), with z = h W^T, t the temperature. Only the second
    term is kept, the *normaliser* of each position. The backward pass makes each chunk's logits again
    and turns them in place into their gradient: one buffer of (chunk, V), and the head's gradient
    summed in place.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, temperature: float, chunk: int):
        label_logits = []
        normalisers = []
        for h, y in zip(hidden.split(chunk), labels.split(chunk)):
            # Of the labels.
            logits = (h @ head.T).float().div_(temperature)  # (chunk, V)
            label_logits.append(logits.gather(1, y[:, None])[:, 0])

            # log sum exp in place, its largest term taken out.
            largest = logits.amax(1, keepdim=True)  # (chunk, 1)
            sums = logits.sub_(largest).exp_().sum(1)
            normalisers.append(sums.log_().add_(largest[:, 0]))
            del logits  # before those of the next chunk exist

        normaliser = torch.cat(normalisers)  # (n,)
        ctx.save_for_backward(hidden, head, labels, normaliser)
        ctx.temperature = temperature
        ctx.chunk = chunk
        return torch.cat(label_logits) - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, head, labels, normaliser = ctx.saved_tensors

        # Sums over the chunks, of what trains.
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head) if needs_head else None

        for start in range(0, len(labels), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h = hidden[part]

            # The log-probabilities again, from the logits and what was kept.
            logp = (h @ head.T).float().div_(ctx.temperature)  # (chunk, V)
            logp.sub_(normaliser[part, None])
            d = into_gradient(logp, labels[part], grad[part] / ctx.temperature).to(hidden.dtype)

            # To what made the logits.
            if needs_hidden:
                d_hidden[part] = d @ head
            if needs_head:
                d_head.addmm_(d.T, h)
            del d, logp  # before those of the next chunk exist
        return d_hidden, d_head, None, None, None


def into_gradient(logp: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """log p (n, V), in place, into (onehot(y) - p) g: labels y (n,), gradients g (n,) of log p(y)."""
    grad = grad[:, None]
    return logp.exp_().mul_(-grad).scatter_add_(1, labels[:, None], grad)


# --------------------------------------------------------------------------- the command: joining


@dataclass
class JoinOptions:
    """Make a VLM of a vision encoder, a language model and a fresh adapter: a start for training."""

    vision: Path  # a SAIL-ViT or AIMv2 directory
    text: Path  # a Qwen3 directory, with its tokenizer
    out: Path
    any_resolution: bool = False
    seed: int = 0  # of the adapter


def join_parts(options: JoinOptions) -> None:
    """Read both parts, join them in bf16, save the model with the tokenizer."""
    from tokenizer import Tokenizer  # the model itself knows no text

    # The tokenizer knows the image token.
    tokenizer = Tokenizer.load(options.text)
    model = SailVL.from_parts(
        options.vision,
        options.text,
        torch.bfloat16,
        seed=options.seed,
        any_resolution=options.any_resolution,
        image_token_id=tokenizer.image,
    )
    check_vocabulary(model.config, len(tokenizer), options.text)
    model.save_pretrained(options.out)
    tokenizer.save(options.out)
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    command(join_parts)
