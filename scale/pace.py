"""How long a step takes: kernels on the roofline, collectives behind them, and what nothing hides.

What it teaches: a step is as long as its slowest resource. Gathers and sums of weights travel while a
block computes, so only the longer of the two counts; an expert exchange stands between two kernels
that wait for it; a pipeline idles while it fills and empties.

    device   |####|####|####|####|  kernels            step = max(kernels, transfers)
    links    |==|  |==|  |==|  |==| gathers, sums             + exchanges + optimizer
             idle (stages - 1) of (micro-batches + stages - 1) parts of a pipeline

Everything computed comes from the real modules, run once on fake tensors (scale/roofline.py). Decoding
(RL) reads the weights and the cache for every token, and eager kernels need launching.

Assumed, as the paper publishes none of it: documents of 2,048 tokens (128B tokens / 64M samples are
2,000), and `Load`. Blocks are counted over 8,192 tokens and scaled: the FLOP of a product are right for
any number of them, its weights' bytes are not, which large products do not feel.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import functional_call

from attention import Segments, attend_inside
from infra.memory import FP32, PATCHES, MicroBatch, meta_model
from scale.devices import ATTAINED_BYTES, ATTAINED_LINKS, LAUNCH, Device
from scale.layout import Layout
from scale.needs import HALF, Flow, bundles_of, micro_batches, step_traffic
from scale.roofline import KernelWork, kernel_work
from stage import BaseStage, RLStage
from vlm import token_logprobs

ROW = 8192  # tokens over which bundles are counted, in documents of a quarter of it
HOST_MEMORY = 50e9  # bytes a second of a host's memory, for each of its devices
DECODING_KERNELS = 40  # of a block, for one token: launches rule when few rows are decoded


@dataclass(frozen=True)
class Load:
    """What rows hold on average."""

    visual: float = 0.875  # share of tokens that are visual (28 tiles in 8,192)
    labelled: float = 0.25  # share of tokens with a label
    prompt: int = 1000  # tokens of a prompt in RL
    answer: int = 1000  # tokens of an answer in RL


# ------------------------------------------------------------------------------------- computing


def blank_weights(module: torch.nn.Module, half: bool, trains: bool) -> dict[str, Tensor]:
    """Fake tensors in place of a module's parameters: bf16 but for routers, or fp32."""
    weights = {}
    for name, p in module.named_parameters():
        dtype = torch.bfloat16 if half and not name.endswith("mlp.gate.weight") else torch.float32
        weights[name] = torch.zeros(p.shape, dtype=dtype, requires_grad=trains)
    return weights


@lru_cache(maxsize=64)
def decoder_work(preset: str, half: bool, trains: bool) -> tuple[KernelWork, KernelWork]:
    """Forward and backward pass of one decoder block over a ROW of four documents.

    half: its weights, and so the residual stream, are bf16. A frozen one passes gradients on.
    """
    model = meta_model(preset)
    block = model.language_model.model.layers[0]
    text = model.config.text
    lengths = (ROW // 4,) * 4

    def build():
        weights = blank_weights(block, half, trains)
        dtype = torch.bfloat16 if half else torch.float32
        x = torch.zeros(sum(lengths), text.hidden_size, dtype=dtype, requires_grad=True)
        table = torch.zeros(sum(lengths), 1, text.head_dim, dtype=dtype)
        attend = attend_inside(fake_segments(lengths), causal=True)
        arguments = (x, (table, table), attend, 0, None)
        return lambda: functional_call(block, weights, arguments)

    return kernel_work(build, half=True)


@lru_cache(maxsize=64)
def vision_work(preset: str, half: bool, trains: bool) -> tuple[KernelWork, KernelWork]:
    """The same of one ViT block over a ROW of patches, in whole tiles."""
    model = meta_model(preset)
    block = model.vision_model.trunk.blocks[0]
    vision = model.config.vision

    def build():
        weights = blank_weights(block, half, trains)
        dtype = torch.bfloat16 if half else torch.float32
        patches = vision.side**2
        images = ROW // patches
        x = torch.zeros(images * patches, vision.hidden_size, dtype=dtype, requires_grad=trains)
        attend = attend_inside(fake_segments((patches,) * images), causal=False)
        return lambda: functional_call(block, weights, (x, None, attend, 0))

    return kernel_work(build, half=True)


@lru_cache(maxsize=64)
def adapter_work(preset: str, half: bool) -> tuple[KernelWork, KernelWork]:
    """The same of the adapter over a ROW of visual tokens."""
    model = meta_model(preset)

    def build():
        weights = blank_weights(model.mlp1, half, True)
        dtype = torch.bfloat16 if half else torch.float32
        x = torch.zeros(ROW, PATCHES * model.config.vision.hidden_size, dtype=dtype)
        plain = torch.nn.Sequential(*model.mlp1)  # behind the pixel shuffle, which only moves
        return lambda: functional_call(plain, weights, (x,))

    return kernel_work(build, half=True)


@lru_cache(maxsize=64)
def loss_work(preset: str, half: bool, trains: bool) -> tuple[KernelWork, KernelWork]:
    """The same of the loss over a quarter ROW of labels."""
    text = meta_model(preset).config.text
    dtype = torch.bfloat16 if half else torch.float32

    def build():
        labels = ROW // 4
        hidden = torch.zeros(labels, text.hidden_size, dtype=dtype, requires_grad=True)
        head = torch.zeros(text.vocab_size, text.hidden_size, dtype=dtype, requires_grad=trains)
        ids = torch.zeros(labels, dtype=torch.int64)
        return lambda: token_logprobs(hidden, head, ids)

    return kernel_work(build, half=True)


def fake_segments(lengths: tuple[int, ...]) -> Segments:
    """Segments of fake tensors: lengths are all that a CPU's attention looks at."""
    return Segments(lengths, torch.zeros(len(lengths) + 1, dtype=torch.int32))


# ------------------------------------------------------------------------------------------ a step


@dataclass(frozen=True)
class Pace:
    """A step on one rank, in seconds: what it is made of, "step" in all; FLOP of all ranks; tokens."""

    seconds: dict[str, float]
    flops: float
    tokens: int

    def utilisation(self, devices: int, device: Device) -> float:
        """MFU: one forward and one backward pass, over what the devices could have done meanwhile."""
        return self.flops / (self.seconds["step"] * devices * device.flops)


def micro_batch_work(
    preset: str, stage: BaseStage, layout: Layout, tokens: int, load: Load
) -> tuple[dict[str, KernelWork], float]:
    """What a micro-batch computes, by part of the model, and its FLOP without recomputation."""
    config = meta_model(preset).config
    learns = "llm" in stage.trains
    sees = "vision" in stage.trains
    half = layout.half
    rows = tokens / ROW
    visual = load.visual * rows
    again = 2 if stage.recompute else 1  # forward passes, where a gradient comes through
    layers = config.text.num_hidden_layers
    blocks = config.vision.num_hidden_layers

    # part, one forward and backward pass over a ROW, rows, how many of it, forward passes
    parts = (
        ("decoder", decoder_work(preset, half, learns), rows, layers, again),
        ("vision", vision_work(preset, half, sees), PATCHES * visual, blocks, again if sees else 1),
        ("ends", adapter_work(preset, half), visual, 1, 1),
        ("ends", loss_work(preset, half, learns), 4 * load.labelled * rows, 1, 1),
    )
    works: dict[str, KernelWork] = {}
    useful = 0.0
    for part, (forward, backward), factor, times, passes in parts:
        one = forward * passes + backward
        works[part] = works.get(part, KernelWork()) + one.scaled(factor) * times
        useful += factor * times * (forward.flops + backward.flops)
    return works, useful


def step_pace(
    preset: str, stage: BaseStage, layout: Layout, ranks: int, device: Device, load: Load = Load()
) -> Pace:
    """How long a step takes; an update, in RL (`rollout_seconds` comes beside it)."""
    lanes = ranks // layout.pp
    count = micro_batches(stage, lanes)
    load = load_of(stage, lanes, load)
    tokens = mean_tokens(stage, lanes, load)
    works, useful = micro_batch_work(preset, stage, layout, tokens, load)

    # Kernels: decoder layers over the pipeline, which idles while it fills and empties
    parts = {part: work.seconds(device) for part, work in works.items()}
    slowest = parts["decoder"] / layout.pp + parts["vision"] + parts["ends"] * (layout.pp == 1)
    kernels = slowest * (count + layout.pp - 1)

    # Transfers: those that hide behind kernels, and those that do not
    batch = MicroBatch(
        tokens, tokens, int(load.visual * tokens) * PATCHES, int(load.labelled * tokens)
    )
    flows = step_traffic(meta_model(preset), stage, layout, ranks, True, batch)
    hidden = sum(link_seconds(flow, device) for flow in flows.values() if flow.hidden)
    waited = sum(link_seconds(flow, device) for flow in flows.values() if not flow.hidden)
    update, to_host = update_seconds(preset, stage, layout, device, count)
    hidden += to_host
    seconds = {
        "kernels": kernels,
        "idle": slowest * (layout.pp - 1),
        "hidden transfers": hidden,
        "waited transfers": waited,
        "update": update,
        "step": max(kernels, hidden) + waited + update,
    }
    return Pace(seconds, useful * count * lanes, tokens * count * lanes)


def mean_tokens(stage: BaseStage, lanes: int, load: Load) -> int:
    """Tokens of a micro-batch as it is on average."""
    if not isinstance(stage, RLStage):
        rows = max(1, stage.rows // lanes) // max(1, micro_batches(stage, lanes))
        return stage.length * max(1, rows)
    prompts, completions = mean_groups(stage, lanes)
    return prompts * load.prompt + completions * load.answer


def mean_groups(stage: RLStage, lanes: int) -> tuple[int, int]:
    """Prompts, which are computed once a group, and completions of a micro-batch in RL."""
    minibatch = stage.prompts * stage.passes * stage.group / stage.updates
    completions = math.ceil(math.ceil(minibatch / lanes) / max(1, stage.accumulate))
    return math.ceil(completions / stage.group), completions


def load_of(stage: BaseStage, lanes: int, load: Load) -> Load:
    """The shares of all tokens: in RL pictures are in prompts alone, and the labels are the answers."""
    if not isinstance(stage, RLStage):
        return load
    prompts, completions = mean_groups(stage, lanes)
    asked = prompts * load.prompt
    answered = completions * load.answer
    both = asked + answered
    return replace(load, visual=load.visual * asked / both, labelled=answered / both)


def link_seconds(flow: Flow, device: Device) -> float:
    """Over the slowest link that a collective crosses.

    Inside a node, its own link. Between nodes a ring crosses with each of its channels, so a gather or
    sum uses all of the node's links together; rows that go to experts elsewhere, and hidden states,
    have one device's.
    """
    span = flow.ranks * flow.apart
    speed = device.inside
    if span > device.node:
        shared = device.node if flow.hidden and flow.ranks > 2 else 1
        speed = min(device.inside, device.outside * max(1, shared // flow.apart))
    return flow.wired / (speed * ATTAINED_LINKS)


def update_seconds(
    preset: str, stage: BaseStage, layout: Layout, device: Device, count: int
) -> tuple[float, float]:
    """(Clipping and AdamW on a rank's parts, copies to and from the host meanwhile)."""
    bundles = bundles_of(meta_model(preset), stage, layout)
    trained = sum(bundle.trained for bundle in bundles)
    own = sum(bundle.own() for bundle in bundles)
    # read: gradient twice, weight, two moments; written: gradient, weight, two moments
    moved = 9 * FP32 * trained
    if not layout.offload:
        return moved / (device.bandwidth * ATTAINED_BYTES), 0.0
    copied = count * FP32 * (2 * own + trained)
    return moved / HOST_MEMORY, copied / (device.host * ATTAINED_LINKS)


# -------------------------------------------------------------------------------------- decoding


def rollout_seconds(
    preset: str, stage: RLStage, ranks: int, rows: int, device: Device, load: Load = Load()
) -> float:
    """Sampling a batch of rollouts on whole copies: every rank decodes `rows` answers at once.

    A token reads the weights of all experts that some row wants, and each row's cache; kernels of a
    few rows are short, so the host that launches them may be what takes longest.
    """
    model = meta_model(preset)
    text = model.config.text
    counts = model.parameter_counts()
    vision = sum(p.numel() for p in model.vision_model.parameters())
    read = (
        counts["total"] - vision - text.vocab_size * text.hidden_size
    )  # an embedding is looked up
    if text.num_experts:
        idle = (1 - text.num_experts_per_tok / text.num_experts) ** rows
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        read -= int(experts * idle)

    # One token for all rows
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * HALF
    moved = HALF * read + rows * cached * (load.prompt + load.answer / 2)
    memory = moved / (device.bandwidth * ATTAINED_BYTES)
    launches = LAUNCH * DECODING_KERNELS * text.num_hidden_layers
    token = max(memory, launches)

    # Prompts first, then token by token, as often as a rank has rows
    answers = math.ceil(stage.prompts * stage.group / ranks)
    prefill, _ = decoder_work(preset, True, False)
    prompts = math.ceil(stage.prompts / ranks)
    one = prefill.scaled(load.prompt / ROW).seconds(device)
    prefilled = prompts * text.num_hidden_layers * one
    return prefilled + math.ceil(answers / rows) * load.answer * token
