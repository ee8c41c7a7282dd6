"""What a layout takes on each rank: bytes that it holds, and bytes that it sends.

What it teaches: sharding divides what is always there (weights, gradients, moments) and leaves what a
micro-batch brings (activations, logits). In exchange the weights of each block are gathered before they
are used, and its gradients are summed and cut again, once a micro-batch: memory is paid in
communication. Experts stay where they are; tokens travel to them.

    one block, one rank of four      held always          while it is used
                                     [w0][g0][m0]    +    [w0 w1 w2 w3] and its gradients, for a moment
    sent a micro-batch               gather forward, gather backward (ZeRO-3), sum of gradients

FSDP2 cuts every tensor along its first axis into equal rows, the last ones padded, so a rank's bytes are
exact: `Piece.own`. The peak is the largest of a step's moments, as in infra/memory.py, whose formulas
count what a micro-batch brings.

Counted is what is handed to a collective: the whole tensor that is gathered or summed, the rows that an
expert exchange sends. Over the wire goes (n - 1) / n of it, of an all-reduce twice that.

Legend: n ranks that share a tensor, M micro-batches a step on each rank, S tokens, C width, K experts a
token. Simplified: experts are used evenly; numbers of a few bytes (`parallel.total`) are left out.
"""

import math
from dataclasses import dataclass, replace

from infra import memory
from infra.memory import FP32, MicroBatch
from optim import OUTSIDE, part_of
from scale.layout import Layout
from stage import BaseStage, RLStage
from vlm import SailVL

HALF = 2  # bytes of bf16


# -------------------------------------------------------------------------------------- the pieces


@dataclass(frozen=True)
class Piece:
    """Weights that are gathered and used together: a block, its experts, or all that is in no block.

    shapes: of its tensors, on one rank of those that share the experts. ranks: that share each tensor.
    width: bytes of a number when it is sent. by_muon: which of the shapes Muon steps.
    """

    kind: str  # vision, decoder, experts, rest
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
    def trained(self) -> int:
        """Numbers on a rank that train."""
        return self.own(self.trains) if any(self.trains) else 0

    @property
    def moved_by_muon(self) -> int:
        """Numbers on a rank that train and that Muon steps."""
        both = tuple(a and b for a, b in zip(self.by_muon, self.trains))
        return self.own(both) if any(both) else 0


def piece_of(name: str) -> tuple[str, str]:
    """The kind of a parameter's piece, and which one of that kind."""
    words = name.split(".")
    if ".experts." in name:
        return "experts", words[words.index("layers") + 1]
    if "layers" in words:
        return "decoder", words[words.index("layers") + 1]
    if "blocks" in words:
        return "vision", words[words.index("blocks") + 1]
    return "rest", ""


def on_stage(name: str, layers: int, pp: int, place: int) -> bool:
    """Whether a parameter lives on a pipeline stage: layers in equal runs, ViT first, head last."""
    kind, number = piece_of(name)
    if kind in ("decoder", "experts"):
        return place * layers // pp <= int(number) < (place + 1) * layers // pp
    if name.startswith(("language_model.lm_head", "language_model.model.norm")):
        return place == pp - 1
    return place == 0


def pieces_of(model: SailVL, stage: BaseStage, layout: Layout, place: int = 0) -> list[Piece]:
    """The pieces on one pipeline stage, cut as `shard.shard_model` cuts them."""
    layers = model.config.text.num_hidden_layers
    groups: dict[tuple[str, str], list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in model.named_parameters():
        if on_stage(name, layers, layout.pp, place):
            key = piece_of(name)
            if layout.ep == 1 and key[0] == "experts":
                key = ("decoder", key[1])
            groups.setdefault(key, []).append((name, tuple(parameter.shape)))

    pieces = []
    for (kind, _), members in groups.items():
        ranks = layout.shard
        shapes = [shape for _, shape in members]
        if kind == "experts":
            ranks = layout.shard // layout.ep
            shapes = [(shape[0] // layout.ep, *shape[1:]) for shape in shapes]
            if ranks > shapes[0][0]:  # fewer experts than ranks: cut along the next axis
                shapes = [(shape[1], shape[0], *shape[2:]) for shape in shapes]
        names = [name for name, _ in members]
        trains = tuple(part_of(name) in stage.trains for name in names)
        muon = stage.optimizer == "muon"
        by_muon = tuple(
            muon and len(shape) == 2 and not any(word in name for word in OUTSIDE)
            for name, shape in members
        )
        width = HALF if layout.half else FP32
        pieces.append(Piece(kind, tuple(shapes), by_muon, trains, ranks, width))
    return pieces


# ------------------------------------------------------------------------------------------ memory


def micro_batches(stage: BaseStage, ranks: int) -> int:
    """Micro-batches a step on each of `ranks` ranks that see other rows."""
    if isinstance(stage, RLStage) or stage.accumulate:
        return max(1, stage.accumulate)
    return max(1, math.ceil(stage.rows / ranks))


def in_flight(layout: Layout, place: int, batches: int) -> int:
    """Micro-batches whose activations a pipeline stage holds at once."""
    if layout.schedule == "gpipe":
        return batches
    return min(batches, layout.pp - place)


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
    `memory.model_memory`: "gathered", whole weights of the pieces in use, and "sums", their gradients
    before they are summed and cut; "host" is what rests in host memory, and no part of the total.
    """
    if layout.plain and batch is None:
        return memory.model_memory(model, stage, ranks, half) | {
            "gathered": 0,
            "sums": 0,
            "host": 0,
        }
    stages = [stage_kinds(model, stage, layout, ranks, half, batch, p) for p in range(layout.pp)]
    return max(stages, key=lambda kinds: kinds["total"])


def stage_kinds(
    model: SailVL,
    stage: BaseStage,
    layout: Layout,
    ranks: int,
    half: bool,
    batch: MicroBatch | None,
    place: int,
) -> dict[str, int]:
    """`rank_memory` of one pipeline stage."""
    lanes = ranks // layout.pp
    batch = batch or memory.largest_micro_batch(stage, lanes)
    pieces = pieces_of(model, stage, layout, place)
    stream = HALF if layout.half else FP32

    # Always there: this rank's rows
    weights = FP32 * sum(piece.own() for piece in pieces)
    trained = FP32 * sum(piece.trained for piece in pieces)
    by_muon = FP32 * sum(piece.moved_by_muon for piece in pieces)
    moments = 2 * trained - by_muon
    snapshots = 2 * (trained + moments) if stage.searches_rate else 0
    reference = weights if getattr(stage, "kl", 0.0) else 0
    kinds = {
        "weights": weights,
        "gradients": trained,
        "moments": moments,
        "snapshots": snapshots,
        "reference": reference,
        "host": 0,
    }
    if layout.offload:
        kinds["host"] = sum(kinds.values())
        kinds |= dict.fromkeys(("weights", "gradients", "moments", "snapshots", "reference"), 0)
    elif snapshots and stage.adalrs_offload:
        kinds |= {"snapshots": 0, "host": snapshots}

    # For a moment: whole pieces, and what a micro-batch brings
    kinds |= gathered_kinds(pieces, layout)
    local = stage_model(model, layout, place)
    share = 1 / layout.pp  # of a decoder's layers
    ...
    return kinds
