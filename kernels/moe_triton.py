"""The experts of `moe.py` on a GPU: eight small Triton kernels, forward and full backward.

What it teaches: a MoE layer is memory traffic around five matrix products. Three ideas remove most of
that traffic: rows are gathered *inside* the products (no sorted copy of x or of the gradient), SwiGLU
and its backward run in a product's epilogue, while the numbers are still in registers, and the gradient
of a routing weight is <dO W2, a> instead of <dO, y>, so that the largest tensor, y (S*K, C), is never
kept. What is kept for the backward pass: x, z and indices.

    routing    count_slots, place_slots, tile_table: the S*K slots in order and a table of tiles, without
               a host sync
    forward    up_swiglu        z = gather(x) W13^T, a = silu(gate) up
               grouped_matmul   y = a W2^T
               gather_sum       out[t] = sum_k s[t,k] y[inverse[t,k]]
    backward   down_grad        da = gather(dO) W2; epilogue: ds = <da, a>, dz, a s
               weight_grad      dW2 = gather(dO)^T (a s)
               grouped_matmul   dx_slots = dz W13
               weight_grad      dW13 = dz^T gather(x)
               gather_sum       dx[t] = sum_k dx_slots[...]

Legend: S tokens, K experts per token, E experts, C model width, I expert width; a *slot* is t * K + k, a
*row* its place after sorting by expert. gate_up W13 (E, 2I, C), down W2 (E, C, I), z (S*K, 2I), gate
first. No atomics and a fixed order of every sum: two runs are bit-identical. Products accumulate in fp32
(fp32 inputs: IEEE, no TF32).

Any S, K, E (an expert may have no token, or all of them), more than 2^31 elements; rows of C and of I
must be multiples of 16 bytes, which tensor descriptors (TMA on Hopper and later, plain loads before) ask
for. Gathered rows go through pointers: Hopper has no TMA gather. No autotuning: `BLOCKS` is a table, so
that the first step is not minutes of compiling.

    python -m kernels.bench                speed, where there is a CUDA GPU
    python -m kernels.bench --compile 90   everything compiled for sm_90, registers and shared memory
                                           shown; needs no GPU
    TRITON_INTERPRET=1                     the same kernels on a CPU: how tests/test_kernels.py runs them

Sources: the set of saved tensors and the ds identity are those of SonicMoE (arXiv 2512.14080); the code
is ours. Written for Triton 3.6 to 3.9. Traps: the interpreter multiplies bf16 as integers, hence `dot`.
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
SORT = 128  # slots per program while sorting

# Of a product's tile: rows, columns, depth, warps, pipeline stages. `up` has two accumulators, so its
# columns count twice. Chosen for sm_90: stages within 227 KB, nothing spilled (`--compile` shows both);
# "half" and "middle" were tried on an H100 at 1024 and at 256 rows an expert, beside 8 to 13 others of
# each product, and are the best or within 6 % of it (bench/h100.md).
WIDE = (128, 256, 64, 8, 4)
SHORT = (64, 256, 64, 4, 4)
FEW = (16, 128, 64, 4, 4)
DEEP = (128, 256, 64, 8, 7)  # rows come through `order`: half of the stages go to the indices
EXACT = (64, 64, 32, 8, 2)
TINY = (16, 32, 32, 1, 1)
BLOCKS = {
    "half": {"up": (128, 128, 64, 8, 4), "grouped": WIDE, "grad": WIDE, "weight": DEEP},
    # Fewer than 512 rows an expert: more and narrower tiles, so that no processor stands idle.
    "middle": {
        "up": (128, 128, 64, 8, 4),
        "grouped": (128, 128, 64, 4, 3),
        "grad": WIDE,
        "weight": (128, 128, 64, 4, 3),
    },
    # Fewer than 128: half-empty tiles would cost more than short ones (not tried on a GPU).
    "short": {"up": (64, 128, 64, 4, 4), "grouped": SHORT, "grad": SHORT, "weight": DEEP},
    # Decoding: read the weights once.
    "few": {"up": FEW, "grouped": FEW, "grad": FEW, "weight": DEEP},
    # fp32: correct, not fast.
    "full": {"up": EXACT, "grouped": EXACT, "grad": EXACT, "weight": EXACT},
    "interpret": {"up": TINY, "grouped": TINY, "grad": TINY, "weight": TINY},
}


def blocks(dtype: torch.dtype, rows_per_expert: float) -> dict[str, tuple]:
    """The tiles of each product for inputs of this type and expected size."""
    if INTERPRET:
        return BLOCKS["interpret"]
    if dtype == torch.float32:
        return BLOCKS["full"]
    if rows_per_expert < 16:
        return BLOCKS["few"]
    if rows_per_expert < 128:
        return BLOCKS["short"]
    if rows_per_expert < 512:
        return BLOCKS["middle"]
    return BLOCKS["half"]


@triton.jit
def dot(a, b, acc):
    if INTERPRET:  # bf16 is a numpy uint16 there
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# ------------------------------------------------------------------------------------------ routing
# A stable counting sort in two passes. `counts` is (experts, blocks), so that one running sum over all
# of it says where the slots of each expert from each block begin.


@triton.jit
def count_slots(indices, counts, slots, n_blocks, E, BE: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    at = b * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(indices + at, mask=at < slots, other=0).to(tl.int32)
    n = tl.histogram(expert, BE, mask=at < slots)  # (BE,)
    experts = tl.arange(0, BE)
    # Row E stays 0: its running sum is the end
    tl.store(counts + experts * n_blocks + b, n, mask=experts <= E)


@triton.jit
def place_slots(indices, base, order, inverse, slots, n_blocks, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    at = b * BLOCK + i
    expert = tl.load(indices + at, mask=at < slots, other=0).to(tl.int32)

    # Behind those of the same expert in earlier blocks, and before me in mine
    earlier = (expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])
    row = tl.load(base + expert * n_blocks + b) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + row, at, mask=at < slots)
    tl.store(inverse + at, row, mask=at < slots)


@triton.jit
def tile_table(offs, tile_expert, tile_row, E, most, BM: tl.constexpr, BE: tl.constexpr):
    """Program e writes the tiles of expert e; program E marks the unused rest with -1."""
    # Tiles of every expert
    e = tl.program_id(0)
    experts = tl.arange(0, BE)
    start = tl.load(offs + experts, mask=experts < E, other=0)
    end = tl.load(offs + experts + 1, mask=experts < E, other=0)
    n = tl.cdiv(end - start, BM)  # (BE,)

    # Where mine begin in the table, how many they are, and the row of the first
    first = tl.sum(tl.where(experts < e, n, 0))
    mine = tl.where(e == E, most - first, tl.sum(tl.where(experts == e, n, 0)))
    row = tl.sum(tl.where(experts == e, start, 0))

    for i in range(0, mine, BE):
        at = i + experts
        tl.store(tile_expert + first + at, tl.where(e == E, -1, e) + 0 * at, mask=at < mine)
        tl.store(tile_row + first + at, row + at * BM, mask=at < mine)


@dataclass
class Plan:
    """Where every slot goes. All int32, all made on the device.

    order: (S*K,) row -> slot. inverse: (S*K,) slot -> row. offs: (E + 1,), expert e owns the rows
    offs[e] : offs[e + 1]. Tile i of the products is of expert tile_expert[i] (-1: none) and begins at
    row tile_row[i].
    """

    order: Tensor
    inverse: Tensor
    offs: Tensor
    tile_expert: Tensor
    tile_row: Tensor

    @staticmethod
    def of(indices: Tensor, E: int, rows: int) -> "Plan":
        """From the router's choice (S, K); `rows` of a tile."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=indices.device)

        # How many slots of each block go to each expert, and so where each of them begins.
        slots = indices.numel()
        indices = indices.contiguous()
        n_blocks = triton.cdiv(slots, SORT)
        wide = triton.next_power_of_2(E + 1)
        counts = empty(E + 1, n_blocks)
        count_slots[(n_blocks,)](indices, counts, slots, n_blocks, E, wide, SORT)
        flat = counts.view(-1)
        base = flat.cumsum(0, dtype=torch.int32).sub_(flat)

        # Every slot to its row, and back.
        order = empty(slots)
        inverse = empty(slots)
        place_slots[(n_blocks,)](indices, base, order, inverse, slots, n_blocks, SORT)

        # Tiles: at most `most`, a bound that needs no look at the counts.
        offs = base.view(E + 1, n_blocks)[:, 0].contiguous()
        most = triton.cdiv(slots, rows) + E
        tile_expert = empty(most)
        tile_row = empty(most)
        tile_table[(E + 1,)](offs, tile_expert, tile_row, E, most, rows, wide)
        return Plan(order, inverse, offs, tile_expert, tile_row)


# ----------------------------------------------------------------------------------------- products
# A tile's last rows may belong to the next expert: they are computed and not stored. Programs run
# columns first, so that those at work at one time share an expert's weights and a few blocks of rows,
# which the L2 cache holds.


@triton.jit
def up_swiglu(
    x,
    w13,
    z,
    a,
    order,
    offs,
    tile_expert,
    tile_row,
    K: tl.constexpr,
    C: tl.constexpr,
    I: tl.constexpr,
    KEEP_Z: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # This program's tile: rows of one expert, and columns from n
    across = tl.cdiv(I, BN)
    tile = tl.program_id(0) // across
    n = tl.program_id(0) % across * BN
    e = tl.load(tile_expert + tile)
    if e < 0:
        return
    end = tl.load(offs + e + 1)
    first = tl.load(tile_row + tile)
    i = tl.arange(0, BM)
    cols = n + tl.arange(0, BN)
    ks = tl.arange(0, BK)

    # Both products at once, over rows of x that are gathered where they lie
    token = tl.load(order + tl.minimum(first + i, end - 1)) // K
    x += token.to(tl.int64)[:, None] * C + ks[None, :]
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, C, BK):
        if C % BK == 0:
            some = tl.load(x)
        else:
            some = tl.load(x, mask=(k + ks)[None, :] < C, other=0.0)
        gate = dot(some, w13.load([e, n, k]).reshape(BN, BK).T, gate)
        up = dot(some, w13.load([e, I + n, k]).reshape(BN, BK).T, up)
        x += BK

    # z for the backward pass, and a, while both are in registers; 64 bits once a tile, 32 within it
    keep = (first + i < end)[:, None] & (cols < I)[None, :]
    at = i[:, None] * I + cols[None, :]
    if KEEP_Z:
        z += first.to(tl.int64) * (2 * I)
        tl.store(z + at + i[:, None] * I, gate.to(z.dtype.element_ty), mask=keep)
        tl.store(z + at + i[:, None] * I + I, up.to(z.dtype.element_ty), mask=keep)
    activated = gate * tl.sigmoid(gate) * up
    tl.store(a + first.to(tl.int64) * I + at, activated.to(a.dtype.element_ty), mask=keep)


@triton.jit
def grouped_matmul(
    a,
    w,
    out,
    offs,
    tile_expert,
    tile_row,
    D: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out (rows, N) = a (rows, D) times w[e], stored (N, D) if TRANSPOSED, else (D, N)."""
    # This program's tile
    across = tl.cdiv(N, BN)
    tile = tl.program_id(0) // across
    n = tl.program_id(0) % across * BN
    e = tl.load(tile_expert + tile)
    if e < 0:
        return
    first = tl.load(tile_row + tile)

    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        if TRANSPOSED:
            acc = dot(a.load([first, k]), w.load([e, n, k]).reshape(BN, BK).T, acc)
        else:
            acc = dot(a.load([first, k]), w.load([e, k, n]).reshape(BK, BN), acc)

    # Rows of this expert only
    i = tl.arange(0, BM)
    cols = n + tl.arange(0, BN)
    keep = (first + i < tl.load(offs + e + 1))[:, None] & (cols < N)[None, :]
    tl.store(
        out + first.to(tl.int64) * N + (i[:, None] * N + cols[None, :]),
        acc.to(out.dtype.element_ty),
        mask=keep,
    )


@triton.jit
def halves(t):
    """(M, N) -> left and right, (M, N/2) each."""
    return t.reshape(t.shape[0], 2, t.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def swiglu_grad(da, z, dz, scaled, s, first, n, i, keep, I: tl.constexpr):
    """The epilogue of `down_grad` for the columns from n: stores dz and a * s.

    Returns <da, a> of every row.
    """
    gate = z.load([first, n]).to(tl.float32)
    up = z.load([first, I + n]).to(tl.float32)
    cols = n + tl.arange(0, da.shape[1])
    keep = keep[:, None] & (cols < I)[None, :]
    at = i[:, None] * I + cols[None, :]

    # What the forward pass had: a; times the routing weight it is a factor of dW2
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(scaled + at, (silu * up * s[:, None]).to(scaled.dtype.element_ty), mask=keep)
    partial = tl.sum(da * silu * up, 1)

    # Through SwiGLU
    da *= s[:, None]
    d_up = da * silu
    d_gate = da * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(dz + at + i[:, None] * I + I, d_up.to(dz.dtype.element_ty), mask=keep)
    tl.store(dz + at + i[:, None] * I, d_gate.to(dz.dtype.element_ty), mask=keep)
    return partial


@triton.jit
def down_grad(
    grad,
    w2,
    z,
    weights,
    dz,
    scaled,
    ds,
    order,
    offs,
    tile_expert,
    tile_row,
    K: tl.constexpr,
    C: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """da = gather(grad) w2, and all that follows from it and z.

    dz, a * s (`scaled`), and ds as one partial sum for each column tile.
    """
    # This program's tile
    across = tl.cdiv(I, BN)
    tile = tl.program_id(0) // across
    n = tl.program_id(0) % across * BN
    e = tl.load(tile_expert + tile)
    if e < 0:
        return
    end = tl.load(offs + e + 1)
    first = tl.load(tile_row + tile)
    i = tl.arange(0, BM)
    ks = tl.arange(0, BK)

    # da, over rows of the gradient that are gathered where they lie
    slot = tl.load(order + tl.minimum(first + i, end - 1))
    grad += (slot // K).to(tl.int64)[:, None] * C + ks[None, :]
    da = tl.zeros((BM, BN), tl.float32)
    for k in range(0, C, BK):
        if C % BK == 0:
            some = tl.load(grad)
        else:
            some = tl.load(grad, mask=(k + ks)[None, :] < C, other=0.0)
        da = dot(some, w2.load([e, k, n]).reshape(BK, BN), da)
        grad += BK

    s = tl.load(weights + slot).to(tl.float32)
    keep = first + i < end
    dz += first.to(tl.int64) * (2 * I)  # 64 bits once a tile, 32 within it
    scaled += first.to(tl.int64) * I

    # Four parts one after the other: registers are what this epilogue is short of
    left, right = halves(da)
    a, b = halves(left)
    c, d = halves(right)
    partial = swiglu_grad(a, z, dz, scaled, s, first, n, i, keep, I)
    partial += swiglu_grad(b, z, dz, scaled, s, first, n + BN // 4, i, keep, I)
    partial += swiglu_grad(c, z, dz, scaled, s, first, n + BN // 2, i, keep, I)
    partial += swiglu_grad(d, z, dz, scaled, s, first, n + 3 * BN // 4, i, keep, I)
    tl.store(ds + slot.to(tl.int64) * tl.cdiv(I, BN) + n // BN, partial, mask=keep)


@triton.jit
def weight_grad(
    d,
    x,
    dw,
    order,
    offs,
    stride_m,
    stride_n,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """dw[e] (M, N) = sum over the rows of expert e of d[row] (M,) outer x[token of row] (N,).

    No rows: zeros. Rows of `d` past the expert's end meet zeros of x, so that only x needs a mask.
    """
    # This program's expert, and its tile of dw[e]
    across = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * across
    e = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = tile // across * BM
    n = tile % across * BN
    first = tl.load(offs + e)
    end = tl.load(offs + e + 1)
    i = m + tl.arange(0, BM)
    j = n + tl.arange(0, BN)
    ks = tl.arange(0, BK)

    # Over its rows
    acc = tl.zeros((BM, BN), tl.float32)
    for r in range(first, end, BK):
        token = tl.load(order + r + ks, mask=r + ks < end, other=0) // K
        some = tl.load(
            x + token.to(tl.int64)[:, None] * N + j[None, :],
            mask=(r + ks < end)[:, None] & (j < N)[None, :],
            other=0.0,
        )
        acc = dot(d.load([r, m]).T, some, acc)
    dw += e.to(tl.int64) * M * N + i[:, None] * stride_m + j[None, :] * stride_n
    tl.store(dw, acc.to(dw.dtype.element_ty), mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def gather_sum(
    y,
    inverse,
    weights,
    out,
    K: tl.constexpr,
    C: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over k, in order and in fp32, of (s[t,k]) y[inverse[t,k]].

    Every token pulls, nobody scatters.
    """
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + t * K + k).to(tl.int64)
        part = tl.load(y + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + t * K + k).to(tl.float32)
        total += part
    tl.store(out + t * C + cols, total.to(out.dtype.element_ty), mask=cols < C)


# ---------------------------------------------------------------------------------------- host side


def tiled(t: Tensor, *block: int) -> TensorDescriptor:
    """A contiguous tensor to be read in blocks; what lies outside reads as zero."""
    return TensorDescriptor.from_tensor(t, list(block))


def run_products(kernel, block: tuple, plan: Plan, columns: int, *arguments, **shape) -> None:
    """Launch a kernel over (tiles of the plan) x (column tiles)."""
    BM, BN, BK, warps, stages = block
    tiles = plan.tile_row.numel() * triton.cdiv(columns, BN)
    kernel[(tiles,)](
        *arguments,
        plan.offs,
        plan.tile_expert,
        plan.tile_row,
        **shape,
        BM=BM,
        BN=BN,
        BK=BK,
        num_warps=warps,
        num_stages=stages,
    )


def grouped_product(block: tuple, plan: Plan, a: Tensor, w: Tensor, transposed: bool) -> Tensor:
    """a (rows, D) times its expert's w, (E, N, D) if transposed, else (E, D, N) -> (rows, N)."""
    BM, BN, BK, *_ = block
    N = w.shape[1 if transposed else 2]
    w_tile = (BN, BK) if transposed else (BK, BN)
    out = a.new_empty(a.shape[0], N)
    run_products(
        grouped_matmul,
        block,
        plan,
        N,
        tiled(a, BM, BK),
        tiled(w, 1, *w_tile),
        out,
        D=a.shape[1],
        N=N,
        TRANSPOSED=transposed,
    )
    return out


def weight_gradient(
    block: tuple, plan: Plan, d: Tensor, x: Tensor, K: int, dw: Tensor, transposed: bool
) -> Tensor:
    """Fill dw (E, M, N), or (E, N, M) if transposed, from d (rows, M) and gathered x (S, N)."""
    BM, BN, BK, warps, stages = block
    M = d.shape[1]
    N = x.shape[1]
    strides = (1, M) if transposed else (N, 1)
    tiles = dw.shape[0] * triton.cdiv(M, BM) * triton.cdiv(N, BN)
    weight_grad[(tiles,)](
        tiled(d, BK, BM),
        x,
        dw,
        plan.order,
        plan.offs,
        *strides,
        K=K,
        M=M,
        N=N,
        BM=BM,
        BN=BN,
        BK=BK,
        num_warps=warps,
        num_stages=stages,
    )
    return dw


def sum_slots(plan: Plan, y: Tensor, weights: Tensor, weighted: bool) -> Tensor:
    """y (rows, C) -> (S, C): the sum of each token's rows, by its weights (S, K) or plain."""
    S, K = weights.shape
    C = y.shape[1]
    out = y.new_empty(S, C)
    block = min(triton.next_power_of_2(C), 2048)
    grid = (S, triton.cdiv(C, block))
    gather_sum[grid](y, plan.inverse, weights, out, K=K, C=C, WEIGHTED=weighted, BLOCK=block)
    return out


class TritonExperts(torch.autograd.Function):
    """`moe.GroupedExperts` by the kernels above. differentiable: keep z for a backward pass."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        differentiable: bool,
    ) -> Tensor:
        S, K = indices.shape
        E, C, I = down.shape
        size = blocks(x.dtype, S * K / E)
        x = x.contiguous()
        weights = weights.contiguous()
        plan = Plan.of(indices, E, size["up"][0])

        # z = gather(x) W13^T and a = silu(gate) * up, in one kernel.
        z = x.new_empty(S * K if differentiable else 0, 2 * I)
        a = x.new_empty(S * K, I)
        _, columns, depth, *_ = size["up"]
        run_products(
            up_swiglu,
            size["up"],
            plan,
            I,
            x,
            tiled(gate_up, 1, columns, depth),
            z,
            a,
            plan.order,
            K=K,
            C=C,
            I=I,
            KEEP_Z=differentiable,
        )

        # y = a W2^T, and every token the sum of its rows.
        y = grouped_product(size["grouped"], plan, a, down, transposed=True)
        ctx.save_for_backward(x, z, weights, gate_up, down, *vars(plan).values())
        return sum_slots(plan, y, weights, weighted=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, z, weights, gate_up, down, *fields = ctx.saved_tensors
        needs_x, _, _, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        plan = Plan(*fields)
        E, C, I = down.shape
        K = weights.shape[1]
        size = blocks(x.dtype, weights.numel() / E)
        grad = grad.contiguous()

        # da = gather(dO) W2 and all that needs it: dz, a * s, and ds in parts.
        rows, columns, depth, *_ = size["grad"]
        slots = z.shape[0]
        dz = torch.empty_like(z)
        scaled = x.new_empty(slots, I)
        ds = weights.new_empty(slots, triton.cdiv(I, columns), dtype=torch.float32)
        run_products(
            down_grad,
            size["grad"],
            plan,
            I,
            grad,
            tiled(down, 1, depth, columns),
            tiled(z, rows, columns // 4),
            weights,
            dz,
            scaled,
            ds,
            plan.order,
            K=K,
            C=C,
            I=I,
        )
        d_weights = ds.sum(1).view_as(weights).to(weights.dtype)

        # To what trains.
        d_x = d_gate_up = d_down = None
        if needs_x:
            dx_slots = grouped_product(size["grouped"], plan, dz, gate_up, transposed=False)
            d_x = sum_slots(plan, dx_slots, weights, weighted=False)
        if needs_gate_up:
            d_gate_up = torch.empty_like(gate_up)
            weight_gradient(size["weight"], plan, dz, x, K, d_gate_up, transposed=False)
        if needs_down:
            d_down = torch.empty_like(down)
            weight_gradient(size["weight"], plan, scaled, grad, K, d_down, transposed=True)
        return d_x, None, d_weights, d_gate_up, d_down, None


def expert_mixture_triton(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Same signature as `moe.expert_mixture`. One dtype for x and both weights: bf16, fp16 or fp32.

    Raises ValueError for rows that are not a multiple of 16 bytes or for mixed dtypes.
    """
    dtypes = {x.dtype, gate_up.dtype, down.dtype}
    if len(dtypes) > 1 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            "x, gate_up and down must share bf16, fp16 or fp32; "
            f"got {x.dtype}, {gate_up.dtype}, {down.dtype}"
        )
    C, I = down.shape[1:]
    if C * x.element_size() % 16 or I * x.element_size() % 16:
        raise ValueError(f"widths {C} and {I} in {x.dtype}: rows must be multiples of 16 bytes")

    # No token: zeros, with zero gradients for everything.
    if x.shape[0] == 0:
        nothing = gate_up.sum() + down.sum() + weights.sum()
        return x * 0 + nothing.to(x.dtype) * 0

    differentiable = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, weights, gate_up, down)
    )
    return TritonExperts.apply(
        x, indices, weights, gate_up.contiguous(), down.contiguous(), differentiable
    )
