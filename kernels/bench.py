"""The MoE layer against its peers and against the machine. One command:

    python -m kernels.bench                  a CUDA machine: limits first, then the A3B layer, forward, backward, full
    python -m kernels.bench --cpu            one CPU core: a training step of a small layer, fp32 and bf16
    python -m kernels.bench --compile 90     no GPU: compile all kernels for sm_90; registers, spills, shared memory
    python -m kernels.bench --interpret      no GPU: run all kernels in Triton's interpreter against the reference

FLOP are counted as everyone counts them: 6 S K C I forward, 12 backward. "of limit" is of the large matmul measured in the
same run. Inputs are O(1), every time is the median of `--repeat` runs between CUDA events with the L2 cache flushed, and
10th to 90th percentile are shown. Peers run in the same process when they can be imported.
"""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import moe


@dataclass
class Options:
    tokens: tuple[int, ...] = (4096, 16384, 65536)
    experts: int = 128
    k: int = 8  # experts per token
    width: int = 2048
    expert_width: int = 768
    repeat: int = 50
    cpu: bool = False
    interpret: bool = False
    compile: int = 0  # compute capability: 80, 90 or 100
    out: Path = Path("runs/moe-cpu.md")  # --cpu leaves its table there


def layer(
    S: int, E: int, K: int, C: int, I: int, which: str, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """x, indices, weights, gate_up, down. "zipf": expert popularity falls as rank^-0.6 (busiest: about 4 times the mean)."""
    draw = lambda *shape: torch.randn(*shape, device=device)
    popular = 0.6 * torch.arange(1, E + 1, device=device).log() if which == "zipf" else 0
    gumbel = -torch.rand(S, E, device=device).clamp_(1e-9).log().neg().log()
    indices = (gumbel - popular).topk(K).indices
    weights = draw(S, K).softmax(-1)
    x, gate_up, down = draw(S, C), draw(E, 2 * I, C) / C**0.5, draw(E, C, I) / I**0.5
    return [x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype)]


def differentiable(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]


def grouped(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What one writes with PyTorch alone: sort, gather, two grouped products under autograd, weigh, index_add."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since 2.12
    order = indices.flatten().argsort(stable=True)
    token = order // indices.shape[1]
    offs = F.one_hot(indices.flatten(), gate_up.shape[0]).sum(0).cumsum(0).int()
    gate, up = product(x[token], gate_up.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    y = product(F.silu(gate) * up, down.transpose(1, 2), offs=offs)
    return torch.zeros_like(x).index_add_(0, token, y * weights.flatten()[order, None].to(y.dtype))


def saved_bytes(run: Callable, parameters: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, weights left out."""
    kept, theirs = {}, {t.untyped_storage().data_ptr() for t in parameters}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = run()
    del y
    return sum(n for at, n in kept.items() if at not in theirs)


def expected_bytes(S: int, E: int, K: int, C: int, I: int, size: int, rows: int) -> tuple[int, int]:
    """(x and z, indices): order, inverse and weights 4 bytes a slot each, the offsets, the table of tiles."""
    return S * (C + K * 2 * I) * size, 4 * (3 * S * K + E + 1 + 2 * (-(-S * K // rows) + E))


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(seconds, n=10)
    return statistics.median(seconds), tenths[0], tenths[-1]


def transformers_experts(C: int, I: int, E: int, K: int) -> dict[str, Callable]:
    """transformers' eager loop and grouped implementation of the same layer, behind our signature."""
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=C, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = "eager"
    holder = Qwen3MoeExperts(config)

    def behind(forward: Callable) -> Callable:
        def run(x, indices, weights, gate_up, down):
            holder._parameters.update(gate_up_proj=gate_up, down_proj=down)
            return forward(holder, x, indices, weights)

        return run

    return {
        "transformers eager": behind(Qwen3MoeExperts.forward),
        "transformers grouped": behind(grouped_mm_experts_forward),
    }


def cpu(o: Options, S: int = 4096, C: int = 256, I: int = 96, E: int = 64, K: int = 8) -> None:
    """Forward and backward of one layer; all implementations take turns, so that a busy machine slows them alike."""
    torch.set_num_threads(1)
    runs = {
        "ours": moe.expert_mixture_grouped,
        "autograd grouped": grouped,
        "plain loop": moe.expert_mixture,
    }
    try:
        runs |= transformers_experts(C, I, E, K)
    except ImportError:
        print("transformers is not installed: left out (pip install -r requirements/bench.txt)")
    print(
        f"training step of a MoE layer, one thread: S {S}, C {C}, I {I}, E {E}, K {K}; torch {torch.__version__}"
    )
    cells: dict[str, list[str]] = {name: [] for name in runs}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        inputs = differentiable(layer(S, E, K, C, I, "uniform", dtype, "cpu"))
        leaves, grad = [t for t in inputs if t.requires_grad], torch.randn(S, C).to(dtype)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(max(o.repeat // 4, 5) + 1):
            for name, run in runs.items():
                began = time.process_time()
                torch.autograd.grad(run(*inputs), leaves, grad)
                if turn:  # the first warms up
                    seconds[name].append(time.process_time() - began)
        ours = statistics.median(seconds["ours"])
        for name, values in seconds.items():
            middle, low, high = spread(values)
            print(
                f"{str(dtype)[6:]:>9}  {name:22} {1e3 * middle:6.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f})   "
                f"ours is {middle / ours:.2f} times as fast"
            )
            cells[name].append(f"{1e3 * middle:.0f} ms ({middle / ours:.2f})")
    lines = [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    if "transformers eager" not in runs:
        return  # a table without its peers would replace a whole one
    o.out.parent.mkdir(parents=True, exist_ok=True)
    o.out.write_text(
        "\n".join(["| implementation | fp32 | bf16 |", "|---|---:|---:|", *lines]) + "\n"
    )


def interpret() -> None:
    """All kernels on a tiny layer against the reference, in Triton's interpreter."""
    from kernels.moe_triton import expert_mixture_triton

    torch.manual_seed(0)
    given = differentiable(layer(9, 6, 2, 16, 24, "uniform", torch.float32, "cpu"))
    leaves, grad = [t for t in given if t.requires_grad], torch.randn(9, 16)
    both = [
        [y := run(*given), *torch.autograd.grad(y, leaves, grad)]
        for run in (moe.expert_mixture, expert_mixture_triton)
    ]
    for name, a, b in zip(("y", "dx", "ds", "dW13", "dW2"), *both):
        print(f"{name:>5}: relative error {float((a - b).norm() / a.norm()):.1e}")


def compile_all(
    capability: int, tokens: tuple[int, ...], E: int, K: int, C: int, I: int, dtype=torch.bfloat16
) -> list[dict]:
    """Forward and backward on uninitialised CPU memory under `Offline`: one row per compiled kernel."""
    import triton

    from kernels.moe_triton import expert_mixture_triton
    from kernels.offline import Offline

    driver = Offline(capability)
    triton.runtime.driver.set_active(driver)
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype).requires_grad_(
        dtype.is_floating_point
    )
    for S in tokens:
        y = expert_mixture_triton(
            empty(S, C),
            empty(S, K, dtype=torch.int64),
            empty(S, K, dtype=torch.float32),
            empty(E, 2 * I, C),
            empty(E, C, I),
        )
        y.backward(torch.empty_like(y))
    return driver.compiled


def limits() -> tuple[float, float]:
    """(copy in TB/s, matmul in TFLOP/s) of this machine: what every later number is a fraction of."""
    a = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").fill_(1)
    copy = 4 * a.numel() / spread(timed(a.clone, 20))[0] / 1e12
    b = torch.randn(8192, 8192, device="cuda").bfloat16()
    return copy, 2 * 8192**3 / spread(timed(lambda: b @ b, 20))[0] / 1e12


def timed(run: Callable, repeat: int) -> list[float]:
    """Seconds of each run between CUDA events, after five that warm up; the L2 cache is overwritten in between."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    seconds = []
    for i in range(repeat + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            seconds.append(start.elapsed_time(end) / 1e3)
    return seconds


def peers() -> dict[str, Callable]:
    from kernels.moe_triton import expert_mixture_triton

    runs = {
        "ours": expert_mixture_triton,
        "grouped matmul": grouped,
        "same, compiled": torch.compile(grouped),
    }
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        runs["Liger"] = lambda x, i, w, g, d: LigerFusedMoEFunction.apply(x, g, d, i.int(), w)
    except ImportError:
        print("liger-kernel is not installed: left out")
    try:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

        def scatter(x, indices, weights, gate_up, down):
            sizes = flatten_sort_count(indices, num_experts=gate_up.shape[0])
            z = parallel_linear(
                x, gate_up.transpose(1, 2), indices.shape[1], *sizes, grouped_out=True
            )
            gate, up = z.chunk(2, dim=-1)
            return parallel_linear(
                F.silu(gate) * up,
                down.transpose(1, 2),
                1,
                *sizes,
                gates=weights.to(x.dtype),
                grouped_in=True,
            )

        runs["scattermoe"] = scatter
    except ImportError:
        print("scattermoe is not installed: left out")
    return runs


def cuda(o: Options) -> None:
    import triton

    from kernels.moe_triton import blocks

    E, K, C, I = o.experts, o.k, o.width, o.expert_width
    copy, peak = limits()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: copy {copy:.2f} TB/s, matmul "
        f"{peak:.0f} TFLOP/s\nlayer: E {E}, K {K}, C {C}, I {I}, bf16; median of {o.repeat} (10th to 90th percentile)"
    )
    for S in o.tokens:
        for which in ("uniform", "zipf"):
            torch.manual_seed(0)
            inputs = differentiable(layer(S, E, K, C, I, which, torch.bfloat16, "cuda"))
            leaves, grad = (
                [t for t in inputs if t.requires_grad],
                torch.randn(S, C, device="cuda").bfloat16(),
            )
            busiest = E * float(moe.expert_load(inputs[1], E).max())
            print(f"\nS {S}, {which} (busiest expert {busiest:.1f} times the mean)")
            for name, run in peers().items():
                try:
                    kept = saved_bytes(lambda: run(*inputs), leaves[2:])
                    if name == "ours":
                        exact, indices = expected_bytes(
                            S, E, K, C, I, 2, blocks(torch.bfloat16, S * K / E)["up"][0]
                        )
                        assert kept == exact + indices, (
                            f"saved {kept} bytes, expected x, z {exact} and indices {indices}"
                        )
                    y = run(*inputs)
                    passes = {
                        "forward": (6, lambda: run(*inputs)),
                        "backward": (
                            12,
                            lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True),
                        ),
                        "full": (18, lambda: torch.autograd.grad(run(*inputs), leaves, grad)),
                    }
                    for what, (flop, step) in passes.items():
                        middle, low, high = (1e3 * s for s in spread(timed(step, o.repeat)))
                        rate = flop * S * K * C * I / middle / 1e9
                        print(
                            f"  {name:16} {what:9} {middle:8.3f} ms ({low:.3f} to {high:.3f})  {rate:5.0f} TFLOP/s  "
                            f"{rate / peak:4.0%} of the matmul"
                            + f"  saved {kept / 1e6:.0f} MB"
                            * (what == "forward")
                        )
                except (
                    RuntimeError,
                    TypeError,
                ) as e:  # a peer of another version, or out of memory: say so, go on
                    if name == "ours":
                        raise
                    print(f"  {name:16} failed: {str(e).splitlines()[0][:100]}")


def main(o: Options) -> None:
    if o.cpu:
        return cpu(o)
    if o.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        return interpret()
    if o.compile:
        for row in compile_all(o.compile, o.tokens, o.experts, o.k, o.width, o.expert_width):
            print(
                "  ".join(
                    f"{k} {v:<15}" if k == "kernel" else f"{k} {v:>4}" for k, v in row.items()
                )
            )
        return None
    if not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA GPU here. Without one: --cpu, --interpret, or --compile 90 (see the top of this file)"
        )
    return cuda(o)


if __name__ == "__main__":
    main(tyro.cli(Options))
