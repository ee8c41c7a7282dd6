"""On a CUDA GPU: the kernels, the model and the loop against what a CPU computes. Skipped without one.

What the interpreter of tests/test_kernels.py cannot show: real sizes, real tiles, real rounding.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import moe
from kernels.bench import block_inputs, block_kernels, both_passes, layer_inputs, leaves_of
from llm import DEFINITIONS
from objective import supervised
from packing import collate
from stage import ALL, Stage
from vlm import PRESETS, SailVL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA GPU")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, in doubles."""
    a = a.detach().double()
    b = b.detach().double()
    return float((a - b).norm() / b.norm())


def passes(mixture, inputs, direction) -> list[torch.Tensor]:
    y = mixture(*inputs)
    return [y, *torch.autograd.grad(y, leaves_of(inputs), direction.to(y.dtype))]


def drawn(documents: list) -> set[str]:
    """Which of picture, video and text are among them."""
    kinds = {0: "text", 1: "picture"}
    return {kinds.get(len(document.images), "video") for document in documents}


@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
@pytest.mark.parametrize(
    "S, E, K, C, I, dtype, tolerance",
    [
        (1, 128, 8, 2048, 768, torch.bfloat16, 1e-2),  # decoding
        (77, 128, 8, 2048, 768, torch.bfloat16, 1e-2),
        (1000, 128, 8, 2048, 768, torch.bfloat16, 1e-2),  # of each of the tables of tiles one
        (4096, 128, 8, 2048, 768, torch.bfloat16, 1e-2),  # SAIL-VL2-A3B's layer
        (16384, 16, 4, 520, 200, torch.bfloat16, 1e-2),  # what fills no tile
        (4096, 16, 4, 512, 192, torch.float16, 2e-3),
        (3000, 64, 8, 256, 96, torch.float32, 2e-6),
        (5, 4, 2, 16, 16, torch.float32, 2e-6),
    ],
)
def test_the_kernels_are_the_definition_in_doubles(S, E, K, C, I, dtype, tolerance, popularity):
    from kernels.moe_triton import expert_mixture_triton

    torch.manual_seed(0)
    inputs = layer_inputs(S, E, K, C, I, popularity, dtype, "cuda")
    direction = torch.randn(S, C, device="cuda").to(dtype)
    exact = []
    for t in inputs:
        wide = t.detach().double() if t.is_floating_point() else t
        exact.append(wide.requires_grad_(t.requires_grad))
    found = passes(expert_mixture_triton, inputs, direction)
    wanted = passes(moe.expert_mixture, exact, direction)
    for name, a, b in zip(("y", "dx", "ds", "dW13", "dW2"), found, wanted, strict=True):
        assert distance(a, b) <= tolerance, name

    # In a fixed order: the same bits again
    for a, b in zip(found, passes(expert_mixture_triton, inputs, direction), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
@pytest.mark.parametrize("S", [1, 1000, 8192])
def test_norm_swiglu_and_rotation_are_their_definitions(S, dtype, tolerance):
    torch.manual_seed(0)
    for case in block_inputs(S, dtype, "cuda", wide=True):
        wanted = both_passes(getattr(DEFINITIONS, case.name), case)
        found = both_passes(getattr(block_kernels(), case.name), case)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            assert distance(a, b) <= tolerance, case.name


@pytest.mark.parametrize("preset", ["toy", "toy-moe"])
def test_losses_and_gradients_are_those_of_a_cpu(preset, tokenizer, encoder, documents):
    """One packed batch of pictures, videos and text, in full precision, against doubles."""
    config = replace(PRESETS[preset], image_token_id=tokenizer.image)
    config = replace(config, text=replace(config.text, vocab_size=448))
    stage = Stage("gpu", ALL, steps=1, rows=2, length=512, accumulate=0, optimizer="adamw", lr=1e-3)
    assert drawn(documents) == {"text", "picture", "video"}
    batch = collate([documents[:20], documents[20:]], None, tokenizer.pad)
    losses = {}
    gradients = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = SailVL(config).init_weights(0).to(device, dtype)
        loss, _ = supervised(model, batch.to(device), stage)
        loss.backward()
        losses[device] = float(loss.detach())
        gradients[device] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert abs(losses["cuda"] - losses["cpu"]) <= 1e-5 * losses["cpu"]
    assert gradients["cpu"].keys() == gradients["cuda"].keys()
    for name, wanted in gradients["cpu"].items():
        if wanted.norm() > 1e-6:
            assert distance(gradients["cuda"][name].cpu(), wanted) <= 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_the_whole_ladder_starts_and_ends(model, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "toy.py"]
    options = ["--effort", "0.01", "--samples", "4", "--model", model, "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, *options], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "final/model.safetensors").exists()
    assert json.loads((tmp_path / "results.json").read_text())["device"].startswith("cuda")
