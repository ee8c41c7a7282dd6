"""What a stage takes on each rank: bytes by kind, counted from the modules before anything runs.

What it teaches: where the memory of a training step goes. Weights, gradients and moments are a sum
over parameters; activations are a sum over *what autograd keeps*, which is a list that one can read
off the modules; and not all of it exists at once, so a step needs the largest of its moments.

    weights, moments, snapshots, reference    always there
    + gradients, activations, and             the end of the forward pass, with the loss;
      bf16 copies + logits, or one block      the backward pass of a block
    + gradients, step                         the sum over ranks, and the optimizer
    + bf16 copies, KV, prefill                sampling (RL)

    total = always + the largest of the three below it

The worst case is counted: every token of a row is a visual token (four patches each) and every token
is a label; in RL every prompt and every completion is as long as it may be. A rank holds the whole model
here, so only the micro-batch depends on the number of ranks; scale/needs.py counts every other layout.

What a block keeps, in bytes a token, with x fp32 and products in bf16 (`tests/test_memory.py` counts
what autograd really saves; an RMSNorm keeps its normal and 1 / rms; each linear layer its own bf16
copy of an fp32 input):

    decoder  norms 2 (4C + 4) | inputs of q, k, v, gate, up 5 * 2C | norm of q 6HD + 4H, of k 6GD + 4G
             attention: q, out 2 * 2HD, sums 4H, and k, v 2 * 2HD a *key* | input of o is `out`
             SwiGLU: gate, silu, up, product 4 * 2I
    ViT      norms 2 (4C + 4) | inputs of qkv, fc1, fc3 3 * 2C | qkv 6C, out 2C, sums 4H | SwiGLU 4 * 2I

In full precision, as on a CPU, norms keep their inputs, SwiGLU gate, up and product, attention k and v
of G heads (`llm.WRITTEN_OUT`, `attention.sdpa`).

Legend: C width, H query heads, G key/value heads, D head size, I feed-forward width, V vocabulary, E
experts, K of them a token, p patch side, w bytes of a number inside a block (bf16 2, fp32 4).
Counted as if by PyTorch alone: with the kernels of a GPU (kernels/block_triton.py) a norm keeps its
input and 1 / rms, SwiGLU gate and up, a turn nothing. Not counted: fragmentation, the CUDA context,
NCCL's buffers, kernels' workspaces. An estimate: gradients that exist beside what one block keeps
(`flow_bytes`). The total is meant as an upper bound: on a CPU (profiler) it was above the peaks of
sixteen small steps by 4 to 60 %, most where logits or ViT blocks are large, since some of the rest is
gone when their turn comes. On an H100 four steps of large models had 97, 98, 99 and 106 % of it
(bench/h100.md).

    python -c "from infra.memory import *; import sft; print(stage_memory('SAIL-VL2-2B', sft.PAPER['sft1']))"
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from llm import LLMConfig
from optim import OUTSIDE
from stage import PARTS, BaseStage, RLStage
from vit import ViTConfig
from vlm import PRESETS, SailVL

FP32 = 4
PATCHES = 4  # of a visual token


# ----------------------------------------------------------------------------- the micro-batch


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of the largest micro-batch of a rank.

    keys: what attention sees, S where no document continues another. labels: supervised positions.
    """

    tokens: int
    keys: int
    patches: int
    labels: int


def largest_micro_batch(stage: BaseStage, ranks: int) -> MicroBatch:
    """The worst case of a stage: its longest rows, full of visual tokens, all of them labels."""
    # Groups of completions, each behind its prompt, which stands there once
    if isinstance(stage, RLStage):
        minibatch = stage.prompts * stage.passes * stage.group / stage.updates
        completions = math.ceil(math.ceil(minibatch / ranks) / max(stage.accumulate, 1))
        prompts = math.ceil(completions / stage.group)
        prompt_tokens = prompts * stage.max_prompt
        sampled = completions * stage.max_new
        return MicroBatch(
            tokens=prompt_tokens + sampled,
            keys=prompt_tokens + completions * stage.max_prompt + sampled,
            patches=PATCHES * prompt_tokens,
            labels=sampled,
        )

    # Images alone
    if stage.objective == "next_patch":
        patches = stage.rows * stage.length // ranks
        return MicroBatch(tokens=0, keys=0, patches=patches, labels=0)

    # Packed rows; accumulate 0: one at a time
    rows = max(1, stage.rows // ranks)
    if stage.accumulate:
        rows = max(1, rows // stage.accumulate)
    else:
        rows = 1
    tokens = rows * stage.length
    return MicroBatch(tokens, tokens, PATCHES * tokens, tokens)


# ------------------------------------------------------------------------ what autograd keeps


def decoder_block_bytes(
    c: LLMConfig,
    tokens: int,
    keys: int,
    half: bool = True,
    trains: bool = True,
    stream: int = FP32,
) -> int:
    """Kept inside one decoder block, without weights; the formula is at the head of this file.

    trains: whether its weights do. A frozen matrix does not keep its input, nor a frozen norm of a
    head its rounded normal. stream: bytes of a number of the residual stream, 2 where the weights
    themselves are bf16 (`--layout.half`).
    """
    queries = c.num_attention_heads * c.head_dim
    shared = c.num_key_value_heads * c.head_dim
    heads = c.num_attention_heads + c.num_key_value_heads
    width = 2 if half else FP32

    # Norms: (S, C) and (S, 1) of both; those of q and k are not fused in bf16: fp32 and rounded
    rounded = 2 if half and trains else 0
    norms = 2 * norm_bytes(c.hidden_size, stream, trains)
    head_norms = (FP32 + rounded) * (queries + shared) + FP32 * heads

    # Inputs of q, k, v: a bf16 copy for each, or the fp32 norm itself for all three
    copies = 3 if half and stream == FP32 else 1
    inputs = copies * width * c.hidden_size if trains else 0

    # Attention: q and out (S, H, D), sums (S, H); keys and values (K, H, D)
    attention = 2 * width * queries + FP32 * c.num_attention_heads
    attention_keys = 2 * width * (queries if half else shared)  # a GPU's kernel wants them repeated

    per_token = norms + head_norms + inputs + attention
    per_token += feed_forward_bytes(c, half, trains, stream)
    return tokens * per_token + keys * attention_keys


def norm_bytes(width: int, stream: int, trains: bool = True) -> int:
    """Kept by an RMSNorm over (S, width), a token: its normal and 1 / rms.

    In bf16 it is not fused: the normal stays in fp32, and for the weight's gradient rounded as well.
    """
    rounded = stream if stream < FP32 and trains else 0
    return (FP32 + rounded) * width + FP32


def feed_forward_bytes(c: LLMConfig, half: bool, trains: bool, stream: int = FP32) -> int:
    """Kept by a decoder's feed-forward, a token."""
    width = 2 if half else FP32
    if not c.num_experts:
        # Gate, in half precision silu, and up (S, I); inputs (S, C) of both, and that of down (S, I)
        inner = (3 if half else 2) * width * c.intermediate_size
        copies = 2 if half and stream == FP32 else 1
        inputs = copies * width * c.hidden_size + width * c.intermediate_size
        return inner + inputs if trains else inner

    # The router's input, its logits and probabilities (S, E), choice and weights (S, K) with their
    # order there and back; the experts' input (S, C), and gate and up of every slot (S * K, 2I)
    router = 2 * FP32 * c.num_experts + 36 * c.num_experts_per_tok
    inputs = width * c.hidden_size
    if half and trains:
        inputs += FP32 * c.hidden_size  # of the router, which computes in fp32
    return router + inputs + 2 * width * c.num_experts_per_tok * c.moe_intermediate_size


def vision_block_bytes(c: ViTConfig, patches: int, half: bool = True, stream: int = FP32) -> int:
    """Kept inside one ViT block, without weights; the formula is at the head of this file."""
    width = 2 if half else FP32
    copies = 3 if half and stream == FP32 else 2  # inputs of qkv, fc1, fc3: the last two share one
    per_patch = 2 * norm_bytes(c.hidden_size, stream) + copies * width * c.hidden_size
    per_patch += 4 * width * c.hidden_size + FP32 * c.num_attention_heads
    if c.position == "rope2d":
        per_patch += 2 * width * c.hidden_size  # q and k that were turned, beside qkv
    inner = 4 if half else 3  # gate, silu, up, product; silu is made again in full precision
    return patches * (per_patch + inner * width * c.intermediate_size)


def activation_bytes(
    model: SailVL, stage: BaseStage, batch: MicroBatch, half: bool = True, stream: int = FP32
) -> int:
    """All activations that exist when the forward pass ends, without weights and logits.

    With recompute a block keeps its input alone, (S, C) in the stream's precision. What nothing
    behind trains keeps nothing: a frozen ViT has no activations.
    """
    vision = model.config.vision
    text = model.config.text
    width = 2 if half else FP32
    total = 0

    # ViT: patches (S, 3pp), their norm, the blocks, the last norm
    if "vision" in stage.trains:
        block = stream * vision.hidden_size * batch.patches
        if not stage.recompute:
            block = vision_block_bytes(vision, batch.patches, half, stream)
        pixels = width * vision.num_channels * vision.patch_size**2
        norms = 2 * norm_bytes(vision.hidden_size, stream)
        rounded = 2 * vision.hidden_size if half else 0
        total += vision.num_hidden_layers * block + batch.patches * (pixels + norms + rounded)

    # Adapter: the merged patches (S/4, 4C) in fp32 and as a linear layer's input, GELU's two sides
    if "vision" in stage.trains or "adapter" in stage.trains:
        merged = PATCHES * vision.hidden_size
        copy = width if stream == FP32 else 0
        visual = (stream + copy) * merged + 2 * FP32 + 2 * width * text.hidden_size
        total += batch.patches // PATCHES * visual

    # Decoder: ids, places of images, cos and sin (S, D), the blocks, the last norm
    block = stream * text.hidden_size * batch.tokens
    learns = "llm" in stage.trains
    if not stage.recompute:
        block = decoder_block_bytes(text, batch.tokens, batch.keys, half, learns, stream)
    around = 8 + 1 + 2 * stream * text.head_dim
    total += text.num_hidden_layers * block + batch.tokens * around

    # After the last attention only labels go on, unless experts want all tokens; the last norm
    unlabelled = batch.tokens - batch.labels
    if not text.num_experts and not stage.recompute:
        after = feed_forward_bytes(text, half, learns, stream)
        after += norm_bytes(text.hidden_size, stream)
        total -= unlabelled * after
    total += batch.labels * norm_bytes(text.hidden_size, stream)

    # The head's input (n, C), labels, places and normalisers
    total += batch.labels * (width * text.hidden_size + 8 + 8 + FP32)
    return total


def flow_bytes(width: int, inner: int, tokens: int, half: bool, stream: int = FP32) -> int:
    """Gradients that flow through a block beside what it keeps (an estimate).

    Two of the residual stream (S, C), three of the feed-forward (S, I).
    """
    return tokens * (2 * stream * width + 3 * (2 if half else FP32) * inner)


def block_bytes(
    model: SailVL, stage: BaseStage, batch: MicroBatch, half: bool = True, stream: int = FP32
) -> int:
    """The backward pass of one block: gradients and, with recompute, what is made again."""
    vision = model.config.vision
    text = model.config.text
    inner = text.intermediate_size
    if text.num_experts:
        inner = text.num_experts_per_tok * text.moe_intermediate_size

    decoder = flow_bytes(text.hidden_size, inner, batch.tokens, half, stream)
    image = 0
    if "vision" in stage.trains:
        inner = vision.intermediate_size
        image = flow_bytes(vision.hidden_size, inner, batch.patches, half, stream)
    if stage.recompute:
        learns = "llm" in stage.trains
        decoder += decoder_block_bytes(text, batch.tokens, batch.keys, half, learns, stream)
        layer = model.language_model.model.layers[0]
        copied = half and stream == FP32
        decoder += sum(2 * p.numel() for p in layer.parameters()) if copied else 0
    if stage.recompute and image:
        image += vision_block_bytes(vision, batch.patches, half, stream)
    return max(decoder, image)


def logits_bytes(model: SailVL, stage: BaseStage, labels: int, half: bool = True) -> int:
    """`vlm.token_logprobs`: logits of one chunk in bf16 and fp32, and the gradients of the head.

    A chunk (c, V) is 8 Mi logits or a 24th of all; few labels are one chunk, of which softmax and
    division keep a copy each. The head's gradient (V, C) is bf16, then fp32; that of its input (n, C).
    """
    text = model.config.text
    chunk = max(1, 2**23 // text.vocab_size, math.ceil(labels / 24))
    width = 2 if half else FP32
    total = labels * (FP32 + width) * text.hidden_size
    if labels <= chunk:
        total += labels * text.vocab_size * (width + 3 * FP32)
    else:
        total += chunk * text.vocab_size * (width + FP32)
    if "llm" in stage.trains:
        total += text.vocab_size * text.hidden_size * (width + FP32)
    return total


# -------------------------------------------------------------------------- sums over parameters


def half_weight_bytes(model: SailVL, stage: BaseStage) -> int:
    """bf16 copies of matrices: autocast keeps those of what trains until the forward pass ends.

    Without recompute autograd keeps them through the backward pass, a frozen decoder's as well.
    Embeddings and the position table are no factors; the head always has its copy. Experts are
    copied layer by layer.
    """
    text = model.config.text
    total = text.vocab_size * text.hidden_size
    for part, module in PARTS.items():
        kept = part in stage.trains or (part == "llm" and not stage.recompute)
        if not kept:
            continue
        for name, p in getattr(model, module).named_parameters():
            outside = any(word in name for word in ("embed_tokens", "lm_head", "pos_embed"))
            made_again = ".experts." in name and stage.recompute
            if p.ndim >= 2 and not outside and not made_again:
                total += p.numel()
    return 2 * total


def moment_bytes(model: SailVL, stage: BaseStage) -> tuple[int, int]:
    """Two fp32 moments of what trains, one where Muon steps; and parameters that Muon steps."""
    moments = 0
    by_muon = 0
    for part in stage.trains:
        module = PARTS[part]
        for name, p in getattr(model, module).named_parameters():
            hidden_matrix = p.ndim == 2 and not any(word in name for word in OUTSIDE)
            if stage.optimizer == "muon" and hidden_matrix:
                by_muon += p.numel()
                moments += FP32 * p.numel()
            else:
                moments += 2 * FP32 * p.numel()
    return moments, by_muon


def cache_bytes(text: LLMConfig, stage: BaseStage, ranks: int, half: bool = True) -> int:
    """The KV cache of one call of `generate`, at its largest.

    Keys and values (layers, rows, G, T, D), rows = prompts of a call * group, but `at_once` at most,
    T = max_prompt + max_new. Beside it the prompts' own rows (when the group is made of them, and
    while others wait for their turn), or a copy of one half for the rows that go on (when more than a
    quarter has ended).
    """
    if not isinstance(stage, RLStage):
        return 0
    prompts = stage.batch or math.ceil(stage.prompts / ranks)
    rows = sampled_at_once(stage, prompts)
    waiting = prompts if rows < prompts * stage.group else 0
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    row = numbers * (stage.max_prompt + stage.max_new) * (2 if half else FP32)
    going_on = rows - rows // 4 - 1
    return rows * row + max(prompts * row, waiting * row + going_on * row // 2)


def sampled_at_once(stage: RLStage, prompts: int) -> int:
    """Rows of the cache in a call with so many prompts."""
    rows = prompts * stage.group
    return min(rows, stage.at_once) if stage.at_once else rows


def prefill_bytes(model: SailVL, stage: BaseStage, ranks: int, half: bool = True) -> int:
    """Sampling, beside the cache: one block over all prompts of a call, or the logits of a step.

    Nothing is kept, so what a block would keep is a bound. A step has (rows, V) in bf16, four
    times in fp32 and once in fp64.
    """
    if not isinstance(stage, RLStage):
        return 0
    prompts = stage.batch or math.ceil(stage.prompts / ranks)
    tokens = prompts * stage.max_prompt
    text = model.config.text
    decoder = decoder_block_bytes(text, tokens, tokens, half)
    image = vision_block_bytes(model.config.vision, PATCHES * tokens, half)
    step = sampled_at_once(stage, prompts) * text.vocab_size * (2 + 4 * FP32 + 8)
    return max(decoder, image, step)


# ------------------------------------------------------------------------------------- the sum


def model_memory(
    model: SailVL, stage: BaseStage, ranks: int = 8, half: bool = True
) -> dict[str, int]:
    """Bytes on each rank by kind, and "total", the most that exists at once.

    model: a real one, or one on the meta device. half: bf16 in blocks (accelerators), else fp32.

        weights      4 a parameter                     gradients   4 a parameter that trains
        moments      8 (AdamW) or 4 (Muon) of those    snapshots   AdaLRS: twice weights and moments
        reference    4 a parameter, with --kl          bf16        `half_weight_bytes`
        activations  pixels (12pp a patch) and `activation_bytes`
        block, logits, kv, prefill    the functions of that name
        step         one copy of all gradients (more than one rank), or Muon's updates (2 * bf16)
    """
    # What is there at all times
    parameters = sum(p.numel() for p in model.parameters())
    trained = 0
    for part in stage.trains:
        trained += sum(p.numel() for p in getattr(model, PARTS[part]).parameters())
    moments, by_muon = moment_bytes(model, stage)
    snapshots = 0
    if stage.searches_rate and not stage.adalrs_offload:
        snapshots = 2 * (FP32 * trained + moments)
    reference = FP32 * parameters if getattr(stage, "kl", 0.0) else 0

    # What a micro-batch brings
    batch = largest_micro_batch(stage, ranks)
    vision = model.config.vision
    pixels = batch.patches * FP32 * vision.num_channels * vision.patch_size**2
    bucket = FP32 * trained if ranks > 1 else 0

    kinds = {
        "weights": FP32 * parameters,
        "gradients": FP32 * trained,
        "moments": moments,
        "snapshots": snapshots,
        "reference": reference,
        "bf16": half_weight_bytes(model, stage) if half else 0,
        "activations": pixels + activation_bytes(model, stage, batch, half),
        "block": block_bytes(model, stage, batch, half),
        "logits": logits_bytes(model, stage, batch.labels, half),
        "step": max(bucket, 2 * 2 * by_muon),
        "kv": cache_bytes(model.config.text, stage, ranks, half),
        "prefill": prefill_bytes(model, stage, ranks, half),
    }

    # The largest moment of a step
    always = kinds["weights"] + moments + snapshots + reference
    forward = kinds["bf16"] + kinds["logits"]
    backward = kinds["block"]
    if not stage.recompute:
        backward += kinds["bf16"]
    passes = kinds["gradients"] + kinds["activations"] + max(forward, backward)
    update = kinds["gradients"] + kinds["step"]
    sampling = 0
    if kinds["kv"]:
        sampling = kinds["bf16"] + kinds["kv"] + kinds["prefill"]
    return kinds | {"total": always + max(passes, update, sampling)}


@lru_cache(maxsize=4)
def meta_model(preset: str) -> SailVL:
    """A model of a preset without memory. Raises ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    with torch.device("meta"):
        return SailVL(PRESETS[preset])


def stage_memory(preset: str, stage: BaseStage, ranks: int = 8) -> dict[str, int]:
    """`model_memory` of a preset in bf16. Raises ValueError for an unknown preset."""
    return model_memory(meta_model(preset), stage, ranks)
