"""Sharded weights: FSDP2 over an unmodified model.

What it teaches: a rank needs a layer's weights only while it computes that layer. So each rank keeps a
part of every tensor, the parts are gathered before a block runs and freed after it, and gradients are
summed straight into parts. The optimizer sees parts only (DTensors), so its state is sharded without
a line of its own.

    block i      gather ─ forward ─ free      ..      gather ─ backward ─ free ─ sum into parts
    block i + 1        (gathered meanwhile)

    --layout.zero       3                 2                        1
    weights             freed after use   kept to the step's end   kept to the step's end
    gradients           summed into parts after each micro-batch   kept whole, summed once a step

(In a pipeline the backward pass does as with 1, whatever is asked: scale/pipeline.py.)

With several copies, parts are summed over them once a step. Losses are divided by the weight of the
whole batch, so gradients are sums and never means (train.py).

A unit is what is gathered at once: a ViT block, a decoder block, the experts of a block where they are
spread (scale/experts.py), and all the rest, which stays whole through the step. Collectives are met in
the order of the modules, so every rank must run the same modules in every micro-batch: `always_sees`
runs the ViT on a rank whose rows hold no image, frozen or not. What ranks do at their own pace, sampling
and evaluation, runs on a plain copy (`whole_weights`).

`--layout.half`: weights are gathered as bf16, while parts, gradients and moments stay fp32; routers
are units of their own, in fp32. `--layout.offload`: parts rest in host memory, where the optimizer
steps.
"""

import copy
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from infra.stopping import StopRequested
from llm import Block
from moe import Experts, MoE
from scale.experts import Rounds, catch_up, spread_experts
from scale.layout import Layout
from scale.parallel import Ranks, local, whole
from scale.pipeline import Staged
from vit import VisionBlock
from vlm import SailVL

# What is called on a model beside itself; none of them calls another.
ENTRANCES = ("logprobs", "loss")


def shard_model(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Lay a model out over the ranks, before optimizers are made; a second time does nothing.

    In place, but for a pipeline, where `Staged` holds what this rank keeps. On meta tensors as well:
    `model.to_empty(device=..)` then makes the parts alone. Raises ValueError for a layout that this
    model does not have.
    """
    layout = ranks.layout
    if ranks.mesh is None or isinstance(model, (FSDPModule, Staged)):
        return model
    if layout.ep > 1 and not any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError(f"--layout.ep {layout.ep}: the model has no experts")
    if layout.pp == 1:
        shard_units(model, ranks)
        return model

    staged = Staged(model, ranks)
    for section in staged.sections.values():
        shard_units(section, ranks)
    return staged


def shard_units(model: nn.Module, ranks: Ranks) -> None:
    """FSDP2 over a model, or over one section of a pipeline, block by block."""
    layout = ranks.layout

    # Where a unit's parts lie, how they travel, and where they rest
    mesh = ranks.mesh
    dense = mesh["dense"] if layout.copies > 1 else mesh["shard"]
    sparse = mesh["sparse"] if layout.copies > 1 else mesh["efsdp"]
    precise = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = precise
    if layout.half:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    unit = partial(
        fully_shard, offload_policy=rest_of(ranks), reshard_after_forward=layout.zero == 3
    )

    # Smallest units first: what is left is their parents'
    for module in list(model.modules()):
        if isinstance(module, Experts) and layout.ep > 1:
            spread_experts(module, mesh["ep"])
            cut = cut_of(layout.shard // layout.ep)
            unit(module, mesh=sparse, mp_policy=policy, shard_placement_fn=cut)
        if isinstance(module, MoE) and layout.half:
            unit(module.gate, mesh=dense, mp_policy=precise)
    for module in list(model.modules()):
        if isinstance(module, (Block, VisionBlock)):
            unit(module, mesh=dense, mp_policy=policy, shard_placement_fn=cut_of(layout.shard))
    trains = any(p.requires_grad for p in model.parameters())
    unit(model, mesh=dense, mp_policy=policy, reshard_after_forward=not trains)
    open_entrances(model)


def rest_of(ranks: Ranks) -> OffloadPolicy:
    """Where parts rest: on the device, or in host memory."""
    if not ranks.layout.offload:
        return OffloadPolicy()
    # pinned memory is what an accelerator copies from by itself; a CPU, where nothing moves, has none
    return CPUOffloadPolicy(pin_memory=ranks.device != "cpu")


def open_entrances(model: nn.Module) -> None:
    """What may be called on a sharded model, and how its gradients are summed."""
    for name in ENTRANCES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if isinstance(model, SailVL):
        model.always_sees = True


def cut_of(ranks: int):
    """How a unit's parameters are cut: by rows, or stacked experts by their rows where ranks are more."""

    def cut(p: nn.Parameter) -> Shard | None:
        here = local(p).shape  # experts that are spread: those of this rank
        few_experts = p.ndim == 3 and here[0] < ranks and here[1] % ranks == 0
        return Shard(1) if few_experts else None

    return cut


def begin_micro_batch(model: nn.Module, layout: Layout, last: bool) -> None:
    """What the next backward pass sends and frees; `last`: of the step."""
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_all_reduce(last)  # over the copies
    if layout.zero < 3:
        model.set_reshard_after_backward(last)
    if layout.zero == 1:
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


# --------------------------------------------------------------------------------------- copies


def frozen_copy(model: SailVL, ranks: Ranks) -> SailVL:
    """The same weights a second time, laid out alike, not to be trained: what a KL penalty refers to."""
    if not isinstance(model, FSDPModule):
        twin = copy.deepcopy(model)
    else:
        with torch.device("meta"):
            twin = SailVL(model.config)
        twin.image_token_id = model.image_token_id
    twin.requires_grad_(False)
    shard_model(twin, replace(ranks, layout=replace(ranks.layout, zero=3)))
    if isinstance(model, FSDPModule):
        twin.to_empty(device="cpu" if ranks.layout.offload else ranks.device)
        copy_parameters(model, twin)
    return twin.train(model.training)


@contextmanager
def whole_weights(model: SailVL, ranks: Ranks) -> Iterator[SailVL]:
    """The model itself, or of one in parts a plain copy on every rank, for as long as it is needed.

    All ranks enter and leave together; inside, each may run what it likes, as often as it likes. The
    copy's weights are those that travel: bf16 with --layout.half, routers excepted. Experts that are
    spread stay spread (a pipeline's do not), each whole on its rank: ranks that share them run in step
    (`experts.Rounds`), and one that is to meet the others calls `experts.catch_up` before it does.
    """
    # (the image stage shards the ViT of a model that is whole otherwise)
    if not any(isinstance(module, (FSDPModule, Staged)) for module in model.modules()):
        yield model
        return
    with torch.device("meta"):
        plain = SailVL(model.config)
    dtype = next(model.parameters()).dtype
    plain.to(torch.bfloat16 if ranks.layout.half else dtype)
    for router in routers_of(plain):
        router.gate.to(dtype)  # as in training: what decides a token's way keeps its precision
    together = ranks.layout.ep > 1 and not isinstance(model, Staged)
    spread = [m for m in plain.modules() if isinstance(m, Experts) and together]
    for module in spread:
        spread_experts(module, ranks.mesh["ep"])
    plain.to_empty(device=ranks.device)
    plain.image_token_id = model.image_token_id
    if isinstance(model, Staged):
        model.copy_whole(plain)
    else:
        copy_parameters(model, plain)

    # Ranks that share experts go on together, also when one of them was told to stop
    if spread:
        rounds = Rounds(plain, ranks.mesh["ep"].get_group())
        for module in spread:
            module.mixture.rounds = rounds
    try:
        yield plain.train(model.training).requires_grad_(False)
    except StopRequested:
        catch_up(plain)
        raise
    catch_up(plain)


@torch.no_grad()
def copy_parameters(model: nn.Module, twin: nn.Module) -> None:
    """Of a sharded model into another one that is sharded alike, or not at all. On all ranks together."""
    parameters = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    for (name, p), (other, q) in parameters:
        assert name == other, f"a copy of another model: {name}, {other}"
        alike = isinstance(q, DTensor) and q.device_mesh == p.device_mesh
        if alike:
            q.copy_(p)
        elif isinstance(q, DTensor):  # experts, spread alike and sharded no further
            mesh = q.device_mesh
            local(q).copy_(whole(p).chunk(mesh.size())[mesh.get_local_rank()])
        else:
            q.copy_(whole(p))
    for here, there in zip(routers_of(model), routers_of(twin), strict=True):
        there.bias = here.bias


def routers_of(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]
