"""Recomputed activations: what the backward pass holds grows with depth by little more than its inputs."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe
from attention import Segments, attend_inside
from stage import Stage
from train import prepare_blocks
from vlm import PRESETS, SailVL

TOKENS = 4096
MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive, and the most there were.

    known: tensors that were there before and do not count.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.count(value.untyped_storage())
        return out

    def count(self, storage):
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key, 0)


def peak_of_backward(preset: str, layers: int) -> float:
    """MiB beside weights and gradients in a backward pass through a language model of this depth."""
    config = PRESETS[preset]
    config = replace(config, text=replace(config.text, num_hidden_layers=layers, vocab_size=64))
    model = SailVL(config).init_weights(0)
    prepare_blocks(model, Stage(recompute=True))
    llm = model.language_model
    for p in llm.parameters():
        p.grad = torch.zeros_like(p)

    segments = Segments.of([512] * (TOKENS // 512))
    x = torch.randn(TOKENS, config.text.hidden_size)
    gc.collect()
    known = [*llm.parameters(), *(p.grad for p in llm.parameters())]
    with LiveBytes(known) as live:
        routing = moe.Decisions() if config.text.num_experts else None
        hidden = llm(x, segments.positions(), attend_inside(segments, causal=True), routing)
        loss = hidden.square().mean()
        if routing:
            loss = loss + 0.01 * moe.balance_loss(routing)
        del hidden, routing
        live.peak = live.now
        loss.backward()
    return live.peak / MIB


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["toy", "toy-moe"])
def test_a_layer_more_costs_the_backward_pass_less_than_five_mib(preset):
    """A layer's own graph is 20 MiB here; what kept its recomputed routing alive kept all of it."""
    four, eight, sixteen = (peak_of_backward(preset, layers) for layers in (4, 8, 16))
    assert (eight - four) / 4 < 5
    assert (sixteen - eight) / 8 < 5


def test_of_recomputed_experts_the_first_decision_is_kept():
    config = PRESETS["toy-moe"].text
    layer = moe.MoE(config)
    torch.nn.init.normal_(layer.gate.weight)
    routing = moe.Decisions()
    layer(torch.randn(5, config.hidden_size), routing)
    (first,) = routing
    layer(torch.randn(7, config.hidden_size), routing)
    assert len(routing) == 1 and next(iter(routing)) is first
