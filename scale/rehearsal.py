"""A step of the real code on ranks that do not exist: `python -m scale.plan --dry-run`.

What it teaches: a collective has a shape whether or not anyone answers. On PyTorch's fake process group
every collective returns at once, and on fake tensors every operation has shapes and no numbers; so one
process can be rank 0 of 4,096, with the model, the sharding and the autograd that a cluster runs, and
be asked what it holds and what it sends.

    meta model -> shard_model on a fake mesh -> fake tensors -> forward, backward -> bytes held, bytes sent

Numbers that only data has are answered here: how many placeholders a batch has, and how many rows come
to an expert (an even share). Memory is counted over live storages at every new one of a MiB or more.

Simplified: one micro-batch, no optimizer step (its parts are sums over parameters: weights, gradients,
moments), no pipeline. What stands in for a device is a CPU, so attention and experts take its paths.
"""

import time
import weakref
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention import Segments
from infra.memory import PATCHES, MicroBatch, meta_model
from moe import Decisions
from optim import freeze_all_but
from scale.layout import Layout, axes_of
from scale.needs import rank_memory, step_traffic
from scale.parallel import Ranks, local
from scale.shard import begin_micro_batch, shard_model
from stage import BaseStage, Stage
from train import prepare_blocks
from vlm import SailVL

LEAST = 2**20  # bytes of a new storage at which all are counted


class Watch(TorchDispatchMode):
    """Counts live bytes and what is handed to collectives; answers what only data knows.

    placeholders: of the batch. share: of an expert rank, in rows.
    """

    def __init__(self, placeholders: int, share: int):
        super().__init__()
        self.placeholders = placeholders
        self.share = share
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0
        self.handed: dict[str, int] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        library, _, name = operation._schema.name.partition("::")
        if name == "_local_scalar_dense":
            (asked,) = args
            alone = asked.untyped_storage().nbytes() == asked.element_size()
            return self.placeholders if alone else self.share
        if name == "bincount":
            count = args[2] if len(args) > 2 else kwargs["minlength"]
            return torch.zeros(count, dtype=torch.int64)
        if library == "c10d":
            self.note_collective(name, args)
        result = operation(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result

    def note(self, tensor: Tensor) -> None:
        """Remember a tensor's storage; count all of them when it is new and large."""
        storage = local(tensor).untyped_storage()
        known = self.storages.get(storage._cdata)
        if known is not None and known() is not None:
            return
        self.storages[storage._cdata] = weakref.ref(storage)
        if storage.nbytes() >= LEAST:
            self.peak = max(self.peak, self.live())

    def live(self) -> int:
        total = 0
        for key, reference in list(self.storages.items()):
            storage = reference()
            if storage is None:
                del self.storages[key]
            else:
                total += storage.nbytes()
        return total

    def note_collective(self, name: str, args: tuple) -> None:
        """The larger side of a gather or sum; of an exchange the rows that are sent."""
        sides = [sum(t.numel() * t.element_size() for t in tensors_among(part)) for part in args]
        amount = sides[1] if name.startswith("alltoall") else max(sides)
        floats = [t for t in tensors_among(args) if t.dtype == torch.float64]
        if not floats:  # small numbers travel in fp64
            self.handed[name] += amount


def tensors_among(part) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Rehearsal:
    """What rank 0 held and sent in one micro-batch: bytes; `peak` beside weights and gradients."""

    weights: int
    gradients: int
    peak: int
    handed: dict[str, int]


def rehearse_micro_batch(
    model: SailVL, stage: BaseStage, layout: Layout, ranks: int, tokens: int, labels: int
) -> Rehearsal:
    """Forward and backward pass of a row full of visual tokens, as rank 0 of `ranks` fake ranks.

    model: on the meta device; it is sharded in place.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = axes_of(layout, "cpu")
        team = Ranks(0, ranks, "cpu", layout=layout, mesh=mesh)
        freeze_all_but(model, stage.trains)
        prepare_blocks(model, stage)
        shard_model(model, team)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            return watched_pass(model, stage, layout, tokens, labels)
    finally:
        dist.destroy_process_group()


def watched_pass(
    model: SailVL, stage: BaseStage, layout: Layout, tokens: int, labels: int
) -> Rehearsal:
    """The pass itself, on a sharded model of fake tensors. Gradients are there, as in all but the first."""
    config = model.config
    side = config.vision.image_size
    images = tokens * PATCHES // config.vision.side**2
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    pixels = torch.zeros(images, config.vision.num_channels, side, side)
    at = torch.arange(labels)
    wanted = torch.zeros(labels, dtype=torch.int64)
    documents = (tokens // 4,) * 4
    segments = Segments(documents, torch.zeros(5, dtype=torch.int32))
    positions = torch.zeros(1, tokens, dtype=torch.int64)

    share = tokens * config.text.num_experts_per_tok // layout.ep
    watch = Watch(images * config.vision.side**2 // PATCHES, share)
    weights = gradients = 0
    for p in model.parameters():
        weights += local(p).nbytes
        watch.note(p)
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
            gradients += local(p.grad).nbytes
            watch.note(p.grad)
    begin_micro_batch(model, layout, last=True)
    with watch:
        with torch.autocast("cpu", torch.bfloat16):
            routing = Decisions() if config.text.num_experts else None
            logprobs = model.logprobs(ids, pixels, positions, segments, at, wanted, routing=routing)
        logprobs.sum().backward()
    beside = watch.peak + pixels.nbytes - weights - gradients
    return Rehearsal(weights, gradients, beside, dict(watch.handed))


# Which collective a kind of `needs.step_traffic` is, as PyTorch names it
COLLECTIVES = {
    "gather": "_allgather_base_",
    "gather of experts": "_allgather_base_",
    "reduce-scatter": "_reduce_scatter_base_",
    "reduce-scatter of experts": "_reduce_scatter_base_",
    "all-reduce": "allreduce_",
    "expert counts": "allreduce_",
    "all-to-all": "alltoall_base_",
}


def rehearse(preset: str, stage: BaseStage, layout: Layout, ranks: int) -> list[str]:
    """One micro-batch as rank 0, in words: what the plan says, and what the run held and sent.

    Raises ValueError for a layout that cannot be rehearsed.
    """
    if layout.pp > 1 or layout.offload or layout.plain:
        raise ValueError("--dry-run: give a layout with shards, without --layout.pp and .offload")
    if not isinstance(stage, Stage):
        raise ValueError("--dry-run: give a stage on packed rows, as --stage sft1")
    length = stage.length
    stage = replace(stage, rows=ranks, accumulate=1)
    batch = MicroBatch(length, length, PATCHES * length, length)
    kinds = rank_memory(meta_model(preset), stage, layout, ranks, True, batch)
    flows = step_traffic(meta_model(preset), stage, layout, ranks, True, batch)

    began = time.monotonic()
    with torch.device("meta"):
        model = SailVL(meta_model(preset).config)
    run = rehearse_micro_batch(model, stage, layout, ranks, length, length)
    seconds = time.monotonic() - began

    # Moments are there as well, though no step was made; snapshots of a search too
    standing = kinds["moments"] + kinds["snapshots"] + run.weights + run.gradients
    held = (kinds["total"] / 2**20, (standing + run.peak) / 2**20)
    lines = [
        f"rank 0 of {ranks} fake ranks, one row of {length} tokens, {seconds:.0f} s",
        f"  weights: plan {kinds['weights']:,}, run {run.weights:,} bytes",
        f"  held: plan {held[0]:.1f} MiB, run {held[1]:.1f} MiB",
    ]
    planned: dict[str, int] = Counter()
    flows.pop("expert counts", None)  # the objective sums them, and this pass has none
    for kind, flow in flows.items():
        planned[COLLECTIVES[kind]] += flow.handed
    for name in sorted(planned.keys() | run.handed.keys()):
        sent = run.handed.get(name, 0)
        lines.append(f"  sent by {name.strip('_')}: plan {planned[name]:,}, run {sent:,} bytes")
    return lines
