"""What a block does between its matrix products, on a GPU: norm, SwiGLU and rotation, a kernel each.

What it teaches: these three need a handful of operations for each number, so their time is the bytes
that they read and write. Written with PyTorch, each is several kernels, and every one of them takes its
input from memory and puts its output back; here each is one pass forward and one pass backward, and
what the backward pass needs is the input (and 1 / rms), nothing in between.

    rms_norm   read x          write x / rms(x) * w      again: read x, grad       write dx, parts of dw
    swiglu     read gate, up   write silu(gate) * up     again: read both, grad    write both
    rotate     read x          write x turned            again: read grad          write grad turned back

Numbers are computed in fp32 whatever they are stored as, and rounded where the definitions in llm.py
round: a norm in half precision before its weight, results as `torch.promote_types` says. Sums have a
fixed order: dw is summed in `STRIPES` parts, and these by PyTorch.

Why kernels of our own, when `torch.nn.functional.rms_norm` exists and `torch.compile` writes such kernels
by itself: the former is one kernel only when input and weight share a type, which bf16 heads under fp32
weights do not; the latter compiles again when documents change their number. Both stand beside these in
the bench, and what an H100 printed in bench/h100.md. Inside a compiled block llm.py takes the
definitions.

    python -m kernels.bench --block        speed and bytes a second, where there is a CUDA GPU
    python -m kernels.bench --compile 90   compiled for sm_90 without one
    TRITON_INTERPRET=1                     on a CPU: how tests/test_kernels.py runs them

Legend: S rows (tokens, or heads of tokens), C width of a row, H heads, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers of a program's tile
STRIPES = 256  # programs that share the rows of a norm's backward pass


# ------------------------------------------------------------------------------------------- the norm


@triton.jit
def norm_forward(x, weight, out, inverse, S, C, eps, ROWS: tl.constexpr, WIDE: tl.constexpr):
    # a tile: some rows, all of their columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    col = tl.arange(0, WIDE)  # (WIDE,)
    keep = (row < S)[:, None] & (col < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + col[None, :]

    # each row over its root mean square
    value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / C + eps)  # (ROWS,)
    # Half precision is rounded before the weight, as in the released code
    normal = (value * scale[:, None]).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    tl.store(out + at, (normal * w[None, :]).to(out.dtype.element_ty), mask=keep)
    tl.store(inverse + row, scale, mask=row < S)


@triton.jit
def norm_backward(
    x,
    weight,
    inverse,
    grad,
    dx,
    parts,
    S,
    C,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dx = (g w - n mean(g w n)) / rms(x); g n summed over this program's rows goes to `parts`."""
    stripe = tl.program_id(0)
    col = tl.arange(0, WIDE)  # (WIDE,)
    w = tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((WIDE,), tl.float32)
    for first in range(stripe * ROWS, S, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        keep = (row < S)[:, None] & (col < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + col[None, :]
        scale = tl.load(inverse + row, mask=row < S, other=0.0)[:, None]
        normal = tl.load(x + at, mask=keep, other=0.0).to(tl.float32) * scale
        g = tl.load(grad + at, mask=keep, other=0.0).to(tl.float32)
        rounded = normal.to(x.dtype.element_ty).to(tl.float32)
        dw += tl.sum(g * rounded, 0)
        mean = tl.sum(g * w * normal, 1)[:, None] / C
        tl.store(dx + at, ((g * w - normal * mean) * scale).to(dx.dtype.element_ty), mask=keep)
    tl.store(parts + stripe.to(tl.int64) * C + col, dw, mask=col < C)


def norm_tile(C: int) -> dict[str, int]:
    """Rows of a program and the width of its tile, for rows of C numbers."""
    wide = triton.next_power_of_2(C)
    rows = max(1, TILE // wide)
    return {"ROWS": rows, "WIDE": wide, "num_warps": 8 if wide > 1024 else 4}


class TritonRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        C = weight.shape[0]
        S = x.numel() // C
        x = x.contiguous()
        tile = norm_tile(C)
        out = torch.empty(
            x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device
        )
        inverse = torch.empty(S, dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(S, tile["ROWS"]),)
        norm_forward[grid](x, weight, out, inverse, S, C, eps, **tile)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        C = weight.shape[0]
        S = inverse.shape[0]
        tile = norm_tile(C)
        stripes = min(STRIPES, triton.cdiv(S, tile["ROWS"]))
        dx = torch.empty_like(x)
        parts = torch.empty(stripes, C, dtype=torch.float32, device=x.device)
        norm_backward[(stripes,)](x, weight, inverse, grad.contiguous(), dx, parts, S, C, **tile)
        return dx, parts.sum(0).to(weight.dtype), None


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`llm.rms_norm`: x (..., C) of at least one row, weight (C,) -> (..., C)."""
    return TritonRMSNorm.apply(x, weight, eps)


# --------------------------------------------------------------------------------------------- SwiGLU


@triton.jit
def swiglu_forward(gate, up, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def swiglu_backward(gate, up, grad, d_gate, d_up, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(d_up + at, (d * silu).to(d_up.dtype.element_ty), mask=at < n)
    slope = sigmoid + silu * (1 - sigmoid)
    tl.store(d_gate + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=at < n)


class TritonSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.contiguous()
        up = up.contiguous()
        out = torch.empty_like(gate)
        n = gate.numel()
        swiglu_forward[(triton.cdiv(n, TILE),)](gate, up, out, n, BLOCK=TILE, num_warps=8)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        n = gate.numel()
        swiglu_backward[(triton.cdiv(n, TILE),)](
            gate, up, grad.contiguous(), d_gate, d_up, n, BLOCK=TILE, num_warps=8
        )
        return d_gate, d_up


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """`llm.swiglu`: gate and up of one shape and type -> the same."""
    return TritonSwiGLU.apply(gate, up)


# ------------------------------------------------------------------------------------------- rotation


@triton.jit
def turn(
    x,
    cos,
    sin,
    out,
    stride_s,
    stride_h,
    H,
    HALF,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All heads of one token. Coordinate i turns with i + D/2; BACK: the transposed turn."""
    s = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    i = tl.arange(0, WIDE)
    some = i < HALF
    keep = (head < H)[:, None] & some[None, :]

    # cos and sin of this position, the same for all heads
    table = s * 2 * HALF + i
    c1 = tl.load(cos + table, mask=some, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + table + HALF, mask=some, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + table, mask=some, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + table + HALF, mask=some, other=0.0).to(tl.float32)[None, :]

    # Pairs of coordinates, turned
    x += s * stride_s + head[:, None] * stride_h + i[None, :]
    first = tl.load(x, mask=keep, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=keep, other=0.0).to(tl.float32)
    if BACK:
        left = first * c1 + second * s2
        right = second * c2 - first * s1
    else:
        left = first * c1 - second * s1
        right = second * c2 + first * s2
    out += (s * H + head[:, None]) * 2 * HALF + i[None, :]
    tl.store(out, left.to(out.dtype.element_ty), mask=keep)
    tl.store(out + HALF, right.to(out.dtype.element_ty), mask=keep)


def turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> Tensor:
    """x (S, H, D) with any strides of tokens and heads, turned or turned back, in `dtype`."""
    if x.stride(2) != 1:
        x = x.contiguous()
    S, H, D = x.shape
    out = torch.empty(S, H, D, dtype=dtype, device=x.device)
    sizes = {"HEADS": triton.next_power_of_2(H), "WIDE": triton.next_power_of_2(D // 2)}
    turn[(S,)](x, cos, sin, out, *x.stride()[:2], H, D // 2, BACK=back, **sizes, num_warps=4)
    return out


class TritonRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos = cos.contiguous()
        sin = sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return turned(x, cos, sin, torch.promote_types(x.dtype, cos.dtype), back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, sin, ctx.dtype, back=True), None, None


def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`llm.rotate`: x (S, H, D), cos and sin (S, 1, D), which get no gradient -> (S, H, D)."""
    return TritonRotation.apply(x, cos, sin)
