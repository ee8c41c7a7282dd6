"""The Triton kernels against the reference: in Triton's interpreter on a CPU, and compiled for a GPU.

Triton must know that it interprets before it is imported, so that every test here runs this file as a
program of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("triton", reason="pip install --no-deps triton (Linux)")


def alone(*names: str, interpret: bool) -> None:
    done = subprocess.run(
        [sys.executable, __file__, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {
            "TRITON_INTERPRET": str(int(interpret)),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0 and done.stdout.split() == list(names), (
        done.stdout[-2000:] + done.stderr[-3000:]
    )


@pytest.mark.slow
def test_interpreted_kernels_are_the_reference():
    alone("equal", "poison", "saved", "refused", interpret=True)


@pytest.mark.slow
def test_interpreted_norm_swiglu_and_rotation_are_their_definitions():
    alone("between", "between_poisoned", interpret=True)


def test_each_device_gets_its_own_functions_between_products():
    """Where a tensor says that it lies is enough: a GPU is not needed to choose."""
    from kernels import block_triton
    from llm import DEFINITIONS, IN_PLACE, WRITTEN_OUT, choose_elementwise

    names = ("rms_norm_triton", "swiglu_triton", "rotate_triton")
    on_a_gpu = tuple(getattr(block_triton, name) for name in names)
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float32):
            assert (
                tuple(choose_elementwise(torch.empty(2, 8, dtype=dtype, device="cuda"))) == on_a_gpu
            )
        doubles = torch.empty(2, 8, dtype=torch.float64, device="cuda")
        assert choose_elementwise(doubles) is WRITTEN_OUT
        assert choose_elementwise(torch.empty(0, 8, device="cuda")) is DEFINITIONS
    assert choose_elementwise(torch.empty(2, 8)) is WRITTEN_OUT
    assert choose_elementwise(torch.empty(2, 8, dtype=torch.bfloat16)) is DEFINITIONS
    with torch.no_grad():
        assert choose_elementwise(torch.empty(2, 8)) is IN_PLACE
        assert choose_elementwise(torch.empty(2, 8, dtype=torch.bfloat16)) is DEFINITIONS


@pytest.mark.slow
def test_rows_beyond_two_to_the_31_elements():
    alone("far", interpret=True)


@pytest.mark.slow
def test_everything_compiles_for_a_gpu_without_spills_and_without_looking_at_the_device():
    alone("compiled", interpret=False)


def inputs(S, E, K, C, I, which="random", dtype=torch.float32) -> list:
    """O(1) inputs; "same": all tokens choose the first K experts."""
    g = torch.Generator().manual_seed(S + E)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    logits = draw(S, E)
    if which == "same":
        logits[:, :K] += 50
    weights, indices = logits.softmax(-1).topk(K)
    floats = draw(S, C), draw(E, 2 * I, C) / C**0.5, draw(E, C, I) / I**0.5
    x, gate_up, down = (t.to(dtype).requires_grad_() for t in floats)
    return [x, indices, weights.float().requires_grad_(), gate_up, down]


def gradients(mixture, given) -> list:
    y = mixture(*given)
    direction = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in given if t.requires_grad], direction)]


def exact(given) -> list:
    return gradients(
        expert_mixture,
        [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given],
    )


def equal() -> None:
    """Outputs and every gradient: fp32 within 1e-5, half within its rounding; twice the same bits."""
    one, odd, wide, crowd = (
        (1, 4, 2, 16, 16),
        (7, 3, 1, 16, 40),
        (11, 5, 3, 72, 16),
        (40, 2, 2, 16, 24),
    )
    cases = [
        (s, w, torch.float32, 1e-5)
        for s, w in (
            (one, "same"),
            (odd, "random"),
            (wide, "random"),
            (wide, "same"),
            (crowd, "same"),
        )
    ]
    cases += [
        (odd, "random", torch.float16, 2e-3),
        (odd, "random", torch.bfloat16, 3e-2),
    ]  # no rounding there
    for shape, which, dtype, tolerance in cases:
        given = inputs(*shape, which, dtype)
        first = gradients(expert_mixture_triton, given)
        for a, truth in zip(first, exact(given), strict=True):
            assert (a.double() - truth).norm() <= tolerance * truth.norm(), (shape, which, dtype)
    for a, b in zip(first, gradients(expert_mixture_triton, given), strict=True):
        assert torch.equal(a, b)


def between() -> None:
    """Norm, SwiGLU and rotation: outputs and gradients, of the definitions' types and rounded like them.

    Sizes that fill no tile, rows of several programs, more rows than a stripe has in one go, heads that
    are no power of two, a view out of a wider tensor. Half precision: the interpreter cuts bf16 off.
    """
    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    for x_type, weight_type, tolerance in (
        (float32, float32, 1e-6),
        (float16, float16, 2e-3),
        (bfloat16, float32, 1e-2),
        (bfloat16, bfloat16, 2e-2),
    ):
        g = torch.Generator().manual_seed(0)

        def draw(*shape, dtype=x_type):
            return torch.randn(shape, generator=g).to(dtype).requires_grad_()

        cases = []
        for shape in ((1, 5000), (7, 96), (5, 3, 32), (1100, 16)):
            leaves = [draw(*shape), draw(shape[-1], dtype=weight_type)]
            cases.append(Pointwise("rms_norm", leaves, (1e-6,), 0))
        cases.append(Pointwise("swiglu", [draw(9, 500), draw(9, 500)], (), 0))
        tables = rotary_table(torch.arange(11), 12, 1e4, weight_type)
        qkv = torch.randn(11, 3, 3, 12, generator=g).to(x_type)
        for x in (draw(11, 3, 12), qkv[:, 1].requires_grad_()):
            cases.append(Pointwise("rotate", [x], tables, 0))

        for case in cases:
            wanted = both_passes(getattr(DEFINITIONS, case.name), case)
            found = both_passes(getattr(block_kernels(), case.name), case)
            for a, b in zip(wanted, found, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape, case
                assert (a - b).double().norm() <= tolerance * a.double().norm(), case


def between_poisoned() -> None:
    """What is not overwritten would show: memory comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for case in block_inputs(9, torch.float32, "cpu", wide=False):
        assert all(
            t.isfinite().all() for t in both_passes(getattr(block_kernels(), case.name), case)
        )


def poison() -> None:
    """Memory that PyTorch hands out uninitialised is filled with NaN: whatever is not overwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    given = inputs(9, 6, 2, 16, 24, "same")
    found = gradients(expert_mixture_triton, given)
    for a, truth in zip(found, exact(given), strict=True):
        assert (a - truth).norm() <= 1e-5 * truth.norm()
    idle = [e for e in range(6) if e not in given[1]]
    assert idle and not found[3][idle].any() and not found[4][idle].any()


def saved() -> None:
    """x and z to the byte, indices to the byte, no y, no a; nothing at all and no z without gradients."""
    S, E, K, C, I = 9, 6, 2, 16, 24
    given = inputs(S, E, K, C, I)
    tensors, plan = expected_bytes(S, E, K, C, I, 4, rows=16)
    assert saved_bytes(lambda: expert_mixture_triton(*given), given[3:]) == tensors + plan
    y = expert_mixture_triton(*given)
    with torch.no_grad():
        assert torch.equal(expert_mixture_triton(*given), y)


def far() -> None:
    """Rows beyond 2^31 elements, in buffers of which only a few pages are ever touched."""
    C, I = 2048, 32
    last = 2**31 // C + 5  # row last * C does not fit 32 bits

    def int32(*v):
        return torch.tensor(v, dtype=torch.int32)

    y = torch.empty(last + 2, C, dtype=torch.float16)
    y[last], y[last + 1] = 1.0, 2.0
    plan = kernel.Plan(
        order=None, inverse=int32(last, last + 1), offs=None, tile_expert=None, tile_row=None
    )
    assert (kernel.sum_slots(plan, y, torch.tensor([[1.0, 10.0]]), weighted=True) == 21).all()

    x = torch.empty(last + 1, C, dtype=torch.float16)
    x[last] = torch.linspace(-1, 1, C).half()
    w13 = torch.randn(1, 2 * I, C, generator=torch.Generator().manual_seed(0)).half()
    plan = kernel.Plan(
        order=int32(last),
        inverse=int32(0),
        offs=int32(0, 1),
        tile_expert=int32(0),
        tile_row=int32(0),
    )
    z, a = torch.empty(1, 2 * I, dtype=torch.float16), torch.empty(1, I, dtype=torch.float16)
    block = kernel.blocks(x.dtype, 1)["up"]
    kernel.run_products(
        kernel.up_swiglu,
        block,
        plan,
        I,
        x,
        kernel.tiled(w13, 1, *block[1:3]),
        z,
        a,
        plan.order,
        K=1,
        C=C,
        I=I,
        KEEP_Z=True,
    )
    torch.testing.assert_close(z[0].float(), w13[0].float() @ x[last].float(), rtol=2e-3, atol=2e-2)

    dw = kernel.weight_gradient(
        kernel.blocks(x.dtype, 1)["weight"],
        plan,
        torch.ones(1, 16).half(),
        x,
        1,
        torch.empty(1, 16, C).half(),
        False,
    )
    assert torch.equal(dw[0], x[last].expand(16, C))


def refused() -> None:
    for given in (
        inputs(3, 4, 2, 18, 16),
        inputs(3, 4, 2, 16, 6),
        inputs(3, 4, 2, 16, 16, dtype=torch.float64),
    ):
        with pytest.raises(ValueError, match="16 bytes|must share"):
            expert_mixture_triton(*given)
    none = inputs(0, 4, 2, 16, 16)
    assert all(not g.any() for g in gradients(expert_mixture_triton, none))


def compiled() -> None:
    rows = compile_all(90, tokens=(16384,), E=128, K=8, C=2048, I=768)
    products = [
        r
        for r in rows
        if r["kernel"] in ("up_swiglu", "grouped_matmul", "down_grad", "weight_grad")
    ]
    between_products = {
        "norm_forward",
        "norm_backward",
        "swiglu_forward",
        "swiglu_backward",
        "turn",
    }
    assert len({r["kernel"] for r in rows} - between_products) == 8 and len(products) == 6
    others = [r for r in rows if r["kernel"] in between_products]
    assert len({r["kernel"] for r in others}) == 5 and not any(r["spilled"] for r in others), others
    assert all(r["tensor core"] and r["TMA load"] and r["spilled"] <= 128 for r in products), (
        products
    )


if __name__ == "__main__":
    import kernels.moe_triton as kernel
    from kernels.bench import (
        Pointwise,
        block_inputs,
        block_kernels,
        both_passes,
        compile_all,
        expected_bytes,
        saved_bytes,
    )
    from kernels.moe_triton import expert_mixture_triton
    from llm import DEFINITIONS, rotary_table
    from moe import expert_mixture

    for check in sys.argv[1:]:
        globals()[check]()
        print(check)
