"""What a layout takes on each rank: bytes that it holds, and bytes that it sends.

What it teaches: sharding divides what is always there (weights, gradients, moments) and leaves what a
micro-batch brings (activations, logits). In exchange the weights of each block are gathered before they
are used, and its gradients are summed and cut again, once a micro-batch: memory is paid in
communication. Experts stay where they are; tokens travel to them.

    one block, one rank of four      held always          while it is used
                                     [w0][g0][m0]    +    [w0 w1 w2 w3] and its gradients, for a moment
    sent a micro-batch               gather forward, gather backward (ZeRO-3), sum of gradients

FSDP2 cuts every tensor along its first axis into equal rows, the last ones padded, so a rank's bytes are
exact: `Bundle.own`. The peak is the largest of a step's moments, as in infra/memory.py, whose formulas
count what a micro-batch brings.

Counted is what is handed to a collective: the whole tensor that is gathered or summed, the rows that an
expert exchange sends. Over the wire goes (n - 1) / n of it, of an all-reduce twice that.

Legend: n ranks that share a tensor, M micro-batches a step on each rank, S tokens, C width, K experts a
token. Simplified: experts are used evenly; numbers of a few bytes (`parallel.total`) are left out. What a
pipeline holds and sends was not compared with a run.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from infra import memory
from infra.memory import FP32, MicroBatch
from optim import OUTSIDE, part_of
from scale.layout import Layout
from scale.pipeline import SECTIONS, layers_of
from stage import BaseStage, RLStage
from vlm import SailVL, VLMConfig

HALF = 2  # bytes of bf16


# -------------------------------------------------------------------------------------- the bundles


@dataclass(frozen=True)
class Bundle:
    """Weights that are gathered at once: a block, its experts or router, or all that is in no block.

    number: of its block. shapes: of its tensors, on one rank of those that share the experts. ranks:
    that share each tensor. width: bytes of a number when it is sent. by_muon: which shapes Muon steps.
    """

    kind: str  # vision, decoder, experts, router, rest
    number: str
    shapes: tuple[tuple[int, ...], ...]
    by_muon: tuple[bool, ...]
    trains: tuple[bool, ...]
    ranks: int
    width: int

    def own(self, only: tuple[bool, ...] = ()) -> int:
        """Numbers on a rank: rows of the first axis, divided and rounded up; `only` of some shapes."""
        chosen = only or (True,) * len(self.shapes)
        total = 0
        for (rows, *rest), counts in zip(self.shapes, chosen):
            total += counts * math.ceil(rows / self.ranks) * math.prod(rest)
        return total

    @property
    def sent(self) -> int:
        """Bytes of the whole bundle as it is gathered, padding included."""
        return self.width * self.ranks * self.own()

    @property
    def trained(self) -> int:
        """Numbers on a rank that train."""
        return self.own(self.trains) if any(self.trains) else 0

    @property
    def moved_by_muon(self) -> int:
        """Numbers on a rank that train and that Muon steps."""
        both = tuple(a and b for a, b in zip(self.by_muon, self.trains))
        return self.own(both) if any(both) else 0


def bundle_of(name: str, layout: Layout) -> tuple[str, str]:
    """The kind of a parameter's bundle, and the number of its block."""
    words = name.split(".")
    if "layers" in words:
        number = words[words.index("layers") + 1]
        if ".experts." in name and layout.ep > 1:
            return "experts", number
        if ".mlp.gate." in name and layout.half:
            return "router", number
        return "decoder", number
    if "blocks" in words:
        return "vision", words[words.index("blocks") + 1]
    return "rest", ""


@lru_cache(maxsize=64)
def layers_on(model: SailVL, layout: Layout, place: int) -> frozenset[int]:
    """The decoder layers on a pipeline stage, as `pipeline.Staged` deals them out."""
    layers = model.config.text.num_hidden_layers
    if layout.pp == 1:
        return frozenset(range(layers))
    runs = layers_of(model, layout.pp * SECTIONS[layout.schedule])[place :: layout.pp]
    return frozenset(layer for run in runs for layer in run)


def on_stage(name: str, mine: frozenset[int], layout: Layout, place: int) -> bool:
    """Whether a parameter lives on a pipeline stage with the layers `mine`: ViT first, head last."""
    kind, number = bundle_of(name, layout)
    if kind in ("decoder", "experts", "router"):
        return int(number) in mine
    if name.startswith(("language_model.lm_head", "language_model.model.norm")):
        return place == layout.pp - 1
    return place == 0


def as_run(layout: Layout) -> Layout:
    """A pipeline's schedules sum a stage's gradients once a step, whatever --layout.zero says."""
    return replace(layout, zero=1) if layout.pp > 1 else layout


def bundles_of(model: SailVL, stage: BaseStage, layout: Layout, place: int = 0) -> list[Bundle]:
    """The bundles on one pipeline stage, cut as `shard.shard_model` cuts them."""
    return cut_bundles(model, stage.trains, stage.optimizer, layout, place)


@lru_cache(maxsize=512)
def cut_bundles(
    model: SailVL, trained: tuple[str, ...], optimizer: str, layout: Layout, place: int
) -> list[Bundle]:
    """`bundles_of`, remembered: a search asks for the same ones again and again."""
    mine = layers_on(model, layout, place)
    groups: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if on_stage(name, mine, layout, place):
            groups.setdefault(bundle_of(name, layout), {})[name] = tuple(parameter.shape)

    bundles = []
    for (kind, number), shapes in groups.items():
        # Experts are spread first; where ranks are more than they, their rows are cut instead
        ranks = layout.shard // layout.ep if kind == "experts" else layout.shard
        cut = []
        for name, shape in shapes.items():
            first, *rest = shape
            if kind == "experts":
                first //= layout.ep
            if ".experts." in name and first < ranks and rest[0] % ranks == 0:
                first, rest[0] = rest[0], first
            cut.append((first, *rest))

        width = HALF if layout.half and kind != "router" else FP32
        trains = tuple(part_of(name) in trained for name in shapes)
        by_muon = tuple(
            optimizer == "muon" and len(shape) == 2 and not any(word in name for word in OUTSIDE)
            for name, shape in shapes.items()
        )
        bundles.append(Bundle(kind, number, tuple(cut), by_muon, trains, ranks, width))
    return bundles


# ------------------------------------------------------------------------------------------ memory


def micro_batches(stage: BaseStage, lanes: int) -> int:
    """Micro-batches a step on each of the `lanes` ranks that see other rows."""
    if isinstance(stage, RLStage) or stage.accumulate:
        return max(1, stage.accumulate)
    return max(1, math.ceil(stage.rows / lanes))


def in_flight(layout: Layout, place: int, batches: int) -> int:
    """Micro-batches whose activations a pipeline stage holds at once."""
    if layout.schedule == "gpipe":
        return batches
    return min(batches, layout.pp - place)


@lru_cache(maxsize=64)
def stage_model(config: VLMConfig, layers: int) -> SailVL:
    """The model with as many layers as a pipeline stage has, without memory."""
    text = replace(config.text, num_hidden_layers=layers)
    with torch.device("meta"):
        return SailVL(replace(config, text=text))


def rank_memory(
    model: SailVL,
    stage: BaseStage,
    layout: Layout,
    ranks: int,
    half: bool = True,
    batch: MicroBatch | None = None,
) -> dict[str, int]:
    """Bytes on the fullest rank by kind, and "total", the most that exists at once.

    model: on the meta device or real. layout: fitted to `ranks`. half: blocks compute in bf16. batch:
    the largest micro-batch, when it is not the stage's worst case. Beside the kinds of
    `memory.model_memory`: "gathered", whole weights of the bundles in use; "sums", their gradients
    before they are summed and cut; "copy", that samples; "host", what rests there, no part of the total.
    """
    none = {"gathered": 0, "sums": 0, "host": 0, "copy": 0}
    layout = as_run(layout)
    lanes = ranks // layout.pp
    if layout.plain and batch is None:
        return none | memory.model_memory(model, stage, ranks, half)
    batch = batch or memory.largest_micro_batch(stage, lanes)
    stages = []
    for place in range(layout.pp):
        held = in_flight(layout, place, micro_batches(stage, lanes))
        bundles = bundles_of(model, stage, layout, place)
        standing = none | standing_bytes(bundles, stage, layout)
        layers = len(layers_on(model, layout, place))
        passing = passing_bytes(model.config, stage, layout, place, layers, batch, held, half)
        passing |= sampling_bytes(model.config, stage, layout, lanes, half)
        partial = micro_batches(stage, lanes) > 1 and layout.copies > 1
        stages.append(with_peak(standing | passing, bundles, stage, layout, partial))
    return max(stages, key=lambda kinds: kinds["total"])


def standing_bytes(bundles: list[Bundle], stage: BaseStage, layout: Layout) -> dict[str, int]:
    """What is there at all times: this rank's rows of everything."""
    weights = FP32 * sum(bundle.own() for bundle in bundles)
    trained = FP32 * sum(bundle.trained for bundle in bundles)
    whole = FP32 * sum(bundle.ranks * bundle.trained for bundle in bundles)
    moments = 2 * trained - FP32 * sum(bundle.moved_by_muon for bundle in bundles)
    snapshots = 2 * (trained + moments) if stage.searches_rate else 0
    kinds = {
        "weights": weights,
        "gradients": whole if layout.zero == 1 else trained,
        "moments": moments,
        "snapshots": snapshots,
        "reference": weights if getattr(stage, "kl", 0.0) else 0,
    }

    # What rests on the host instead
    if layout.offload:
        return dict.fromkeys(kinds, 0) | {"host": sum(kinds.values())}
    if snapshots and stage.adalrs_offload:
        return kinds | {"snapshots": 0, "host": snapshots}
    return kinds


def passing_bytes(
    config: VLMConfig,
    stage: BaseStage,
    layout: Layout,
    place: int,
    layers: int,
    batch: MicroBatch,
    held: int,
    half: bool,
) -> dict[str, int]:
    """What micro-batches bring to a pipeline stage of so many layers that holds `held` of them:
    infra/memory.py's kinds."""
    # Only what this stage computes: images on the first, logits on the last
    local = stage_model(config, layers)
    if place:
        stage = replace(stage, trains=tuple(part for part in stage.trains if part == "llm"))
    last = place == layout.pp - 1
    if not last:
        batch = replace(batch, labels=batch.tokens)  # all go on to the next stage
    stream = HALF if layout.half else FP32

    # What is kept, all of it and for the images alone; a block of the decoder, and one of the ViT, whose
    # turn comes when all that the decoder kept is gone
    pixels = 0
    if not place:
        pixels = batch.patches * FP32 * config.vision.num_channels * config.vision.patch_size**2
    blind = replace(stage, trains=tuple(part for part in stage.trains if part == "llm"))
    kept = memory.activation_bytes(local, stage, batch, half, stream)
    seen = kept - memory.activation_bytes(local, blind, batch, half, stream)
    block = memory.block_bytes(local, blind, batch, half, stream)
    image = memory.block_bytes(local, stage, batch, half, stream)
    if layout.ep > 1:
        # rows that came from other ranks (S*K, C): as input, as result, and one gradient
        text = config.text
        rows = batch.tokens * text.num_experts_per_tok * text.hidden_size * (HALF if half else FP32)
        block += 3 * rows
        kept += 0 if stage.recompute else layers * rows
    kept += pixels
    seen += pixels
    early = (held - 1) * kept  # of micro-batches whose turn has not come
    copies = 0
    if half and not layout.half:
        copies = memory.half_weight_bytes(local, stage)
        if layout.ep > 1 and not stage.recompute:  # of the experts that are here
            experts = (p for name, p in local.named_parameters() if ".experts." in name)
            copies -= HALF * sum(p.numel() for p in experts) * (layout.ep - 1) // layout.ep
    return {
        "activations": held * kept,
        "block": max(block, image),
        "backward": early + max(kept + block, seen + image),
        "logits": memory.logits_bytes(local, stage, batch.labels, half) if last else 0,
        "bf16": copies,
    }


def sampling_bytes(
    config: VLMConfig, stage: BaseStage, layout: Layout, lanes: int, half: bool
) -> dict[str, int]:
    """RL: a plain copy of the weights on every rank (`shard.whole_weights`), its cache, a prefill."""
    if not isinstance(stage, RLStage):
        return {"copy": 0, "kv": 0, "prefill": 0}
    whole = stage_model(config, config.text.num_hidden_layers)
    numbers = sum(p.numel() for p in whole.parameters())
    if layout.ep > 1:  # experts stay where they are
        experts = sum(p.numel() for name, p in whole.named_parameters() if ".experts." in name)
        numbers -= experts * (layout.ep - 1) // layout.ep
    width = HALF if layout.half else FP32
    return {
        "copy": 0 if layout.plain else width * numbers,
        "kv": memory.cache_bytes(config.text, stage, lanes, half),
        "prefill": memory.prefill_bytes(whole, stage, lanes, half),
    }


def with_peak(
    kinds: dict[str, int], bundles: list[Bundle], stage: BaseStage, layout: Layout, partial: bool
) -> dict[str, int]:
    """The kinds with "gathered", "sums", "step" and "total": the largest moment of a step.

    A block is in use while the next one arrives and the last one's gradients leave. All that is in no
    block (embedding, head, norms) stays whole from the first use to the last. partial: sums of earlier
    micro-batches wait to be summed over the copies.
    """
    by_muon = FP32 * sum(bundle.moved_by_muon for bundle in bundles)
    bucket = 0
    if layout.plain:
        bucket = kinds["gradients"] if layout.copies > 1 else 0
        bundles = []
    trained = FP32 * sum(bundle.trained for bundle in bundles)
    waiting = trained if partial else 0
    whole = sum(bundle.sent for bundle in bundles if bundle.kind == "rest")
    blocks: dict[tuple[bool, str], int] = Counter()
    learned: dict[tuple[bool, str], int] = Counter()
    for bundle in bundles:
        if bundle.kind != "rest":
            block = (bundle.kind == "vision", bundle.number)
            blocks[block] += bundle.sent
            learned[block] += bundle.ranks * bundle.trained
    every = sum(blocks.values())
    largest = max(blocks.values(), default=0)
    arriving = 2 * largest if layout.zero == 3 else every + largest

    # Gradients: whole, as they are computed, and in fp32, as they are summed
    block_sum = max(learned.values(), default=0)
    rest_sum = sum(bundle.ranks * bundle.trained for bundle in bundles if bundle.kind == "rest")
    head = rest_sum // 2  # an embedding as large as the head has its gradient last of all
    width = HALF if layout.half else FP32
    sums = (width + FP32) * block_sum

    always = sum(kinds[kind] for kind in ("weights", "moments", "snapshots", "reference"))
    always += kinds["gradients"] + whole + waiting
    forward = kinds["activations"] + kinds["bf16"] + kinds["logits"]
    forward += largest if layout.zero == 3 else every
    backward = kinds["backward"] + arriving + sums + width * head
    if not stage.recompute:
        backward += kinds["bf16"]
    end = (width + FP32) * rest_sum + (0 if layout.zero == 3 else every)
    step = max(bucket, by_muon)

    sampling = kinds["copy"] + kinds["kv"] + kinds["prefill"] - whole
    del kinds["backward"]
    peak = max(forward, backward, end, step, sampling)
    return kinds | {
        "gathered": whole + arriving,
        "sums": waiting + max(sums + width * head, end),
        "step": step,
        "total": always + peak,
    }


# ------------------------------------------------------------------------------------------ traffic


@dataclass(frozen=True)
class Flow:
    """Bytes that a rank hands to one kind of collective in a step, among how many ranks.

    apart: ranks between neighbours of the group. hidden: whether the device computes meanwhile.
    summed: whether every rank gets all of the sum (an all-reduce), which travels twice.
    """

    handed: int
    ranks: int
    apart: int = 1
    hidden: bool = True
    summed: bool = False

    @property
    def wired(self) -> float:
        """Bytes that leave the rank: its own part of the result stays."""
        return (1 + self.summed) * self.handed * (self.ranks - 1) / self.ranks


def step_traffic(
    model: SailVL,
    stage: BaseStage,
    layout: Layout,
    ranks: int,
    half: bool = True,
    batch: MicroBatch | None = None,
    place: int = 0,
) -> dict[str, Flow]:
    """What a rank of a pipeline stage sends in a step, by kind; nothing where nobody is to be sent to."""
    layout = as_run(layout)
    lanes = ranks // layout.pp
    count = micro_batches(stage, lanes)
    batch = batch or memory.largest_micro_batch(stage, lanes)
    bundles = bundles_of(model, stage, layout, place)
    flows: dict[str, Flow] = {}

    # Weights whenever they are used, gradients once a micro-batch; over the copies once a step
    last = str(model.config.vision.num_hidden_layers - 1)
    gathered: dict[int, int] = Counter()
    summed: dict[int, int] = Counter()
    for bundle in bundles:
        times = times_gathered(bundle, stage, layout, count, last)
        gathered[bundle.ranks] += times * bundle.sent
        sums = 1 if layout.zero == 1 else count
        summed[bundle.ranks] += sums * FP32 * bundle.ranks * bundle.trained
    for size in gathered:
        if size > 1:
            apart = layout.shard // size
            among = "" if size == layout.shard else " of experts"
            flows[f"gather{among}"] = Flow(gathered[size], size, apart)
            flows[f"reduce-scatter{among}"] = Flow(summed[size], size, apart)
    own = FP32 * sum(bundle.trained for bundle in bundles)
    if layout.copies > 1:
        flows["all-reduce"] = Flow(
            own, layout.copies, layout.shard, hidden=layout.shard > 1, summed=True
        )

    # Tokens to their experts and back: forward, again when recomputed, and backward. Weights of the
    # choices (fp32) go there with them and their gradients back; before it, how many will come (int64)
    text = model.config.text
    layers = sum(1 for bundle in bundles if bundle.kind == "experts")
    if layers:
        again = 1 + stage.recompute
        slots = batch.tokens * text.num_experts_per_tok
        # recomputing stops before the way back, whose result nothing needs
        rows = (3 + again) * slots * text.hidden_size * (HALF if half else FP32)
        shares = (1 + again) * slots * FP32
        counts = again * text.num_experts * 8
        sent = count * layers * (rows + shares + counts)
        flows["all-to-all"] = Flow(sent, layout.ep, hidden=False)

    # For balance over all ranks, how many slots went to each expert, text and vision (int64); the last
    # stage of a pipeline knows of all layers
    if text.num_experts and lanes > 1 and place == layout.pp - 1:
        slots = 2 * text.num_hidden_layers * text.num_experts * 8
        flows["expert counts"] = Flow(count * slots, lanes, hidden=False, summed=True)

    # Hidden states to the next stage, and their gradients back
    if layout.pp > 1:
        hidden = batch.tokens * text.hidden_size * (HALF if layout.half else FP32)
        both = (place > 0) + (place < layout.pp - 1)
        flows["stages"] = Flow(count * both * hidden * 2, 2, lanes)
    return flows


def times_gathered(bundle: Bundle, stage: BaseStage, layout: Layout, count: int, last: str) -> int:
    """How often a step of `count` micro-batches gathers a bundle; `last`: number of the last ViT block.

    ZeRO-3: forward, and again backward where it was freed; else once a step. All that is in no block
    stays whole from forward to backward. Of a frozen ViT the last block is gathered backward all the
    same, since the block behind it fetches what stands before it.
    """
    if layout.zero < 3:
        return 1
    if bundle.kind == "rest":
        return count
    frozen = bundle.kind == "vision" and "vision" not in stage.trains and bundle.number != last
    return count if frozen else 2 * count
