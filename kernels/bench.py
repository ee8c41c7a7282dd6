"""The MoE layer, and what stands between a block's products, against peers and against the machine.

What it teaches: a speed means nothing by itself. Here it stands beside what the machine can do (a
large matmul, measured in the same run), beside what one writes with PyTorch alone, and beside peers
that run in the same process.

    python -m kernels.bench                  a CUDA machine: limits first, then the A3B layer,
                                             forward, backward, full
    python -m kernels.bench --block          a CUDA machine: norm, SwiGLU and rotation of a decoder block
    python -m kernels.bench --cpu            one CPU core: a training step of a small layer
    python -m kernels.bench --compile 90     no GPU: compile all kernels for sm_90; registers, spills,
                                             shared memory
    python -m kernels.bench --interpret      no GPU: all kernels in Triton's interpreter against the
                                             reference

FLOP are counted as everyone counts them: 6 S K C I forward, 12 backward. "of the matmul" is of the
large matmul. Inputs are O(1); every time is the median of `--repeat` runs between CUDA events with the
L2 cache flushed, and 10th to 90th percentile are shown. What stands between the products (--block) is
counted in bytes that must be read and written at least, beside a copy. What an H100 printed:
bench/h100.md.

Legend, as in moe.py: S tokens, E experts, K of them for a token, C model width, I expert width.
"""

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import moe
from infra.cli import command
from infra.system import require_packages
from llm import DEFINITIONS, Elementwise, rotary_table

Mixture = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # as `moe.expert_mixture`


@dataclass
class KernelOptions:
    """Measure, compile or check the kernels of a MoE layer and of a block."""

    tokens: tuple[int, ...] = (4096, 16384, 65536)
    experts: int = 128
    k: int = 8  # experts per token
    width: int = 2048
    expert_width: int = 768
    repeat: int = 50
    compiled: bool = True  # the compiler's as well, which needs a minute for each size
    block: bool = False  # (sizes of Qwen3-1.7B: of the options only --tokens and --repeat count)
    cpu: bool = False
    interpret: bool = False
    compile: int = 0  # compute capability: 80, 90 or 100
    out: Path = Path("runs/moe-cpu.md")  # --cpu leaves its table there


# ------------------------------------------------------------------------------------------- inputs


def layer_inputs(
    S: int, E: int, K: int, C: int, I: int, popularity: str, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """x, indices, weights, gate_up, down, all that is floating with a gradient.

    popularity: of the experts, "uniform" or "zipf", which falls as rank^-0.6 (the busiest expert has
    about 4 times the mean).
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    # K different experts by the Gumbel trick: the largest of log popularity + noise.
    noise = -torch.rand(S, E, device=device).clamp_(1e-9).log().neg().log()
    if popularity == "zipf":
        noise -= 0.6 * torch.arange(1, E + 1, device=device).log()
    indices = noise.topk(K).indices

    weights = draw(S, K).softmax(-1)
    x = draw(S, C).to(dtype)
    gate_up = (draw(E, 2 * I, C) / C**0.5).to(dtype)
    down = (draw(E, C, I) / I**0.5).to(dtype)
    for t in (x, weights, gate_up, down):
        t.requires_grad_()
    return [x, indices, weights, gate_up, down]


def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


# -------------------------------------------------------------------------------------------- peers


def autograd_grouped(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """What one writes with PyTorch alone.

    Sort, gather, two grouped products under autograd, weigh, index_add.
    """
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since 2.12
    slots = indices.flatten()
    order = slots.argsort(stable=True)
    token = order // indices.shape[1]
    counts = F.one_hot(slots, gate_up.shape[0]).sum(0)
    ends = counts.cumsum(0).int()

    z = product(x[token], gate_up.transpose(1, 2), offs=ends)
    gate, up = z.chunk(2, dim=-1)
    y = product(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    share = weights.flatten()[order, None].to(y.dtype)
    return torch.zeros_like(x).index_add_(0, token, y * share)


def transformers_experts(C: int, I: int, E: int, K: int) -> dict[str, Mixture]:
    """transformers' eager loop and grouped implementation of the same layer, behind our signature."""
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=C, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K
    )
    config._experts_implementation = "eager"
    holder = Qwen3MoeExperts(config)

    def behind(forward: Callable) -> Mixture:
        def run(x, indices, weights, gate_up, down):
            holder._parameters.update(gate_up_proj=gate_up, down_proj=down)
            return forward(holder, x, indices, weights)

        return run

    return {
        "transformers eager": behind(Qwen3MoeExperts.forward),
        "transformers grouped": behind(grouped_mm_experts_forward),
    }


def liger_experts() -> Mixture:
    """Raises ImportError where liger-kernel is not installed."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(x, indices, weights, gate_up, down):
        return LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), weights)

    return run


def scattermoe_experts() -> Mixture:
    """Raises ImportError where scattermoe is not installed."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def run(x, indices, weights, gate_up, down):
        k = indices.shape[1]
        order = flatten_sort_count(indices, num_experts=gate_up.shape[0])
        z = parallel_linear(x, gate_up.transpose(1, 2), k, *order, grouped_out=True)
        gate, up = z.chunk(2, dim=-1)
        a = F.silu(gate) * up
        gates = weights.to(x.dtype)
        return parallel_linear(a, down.transpose(1, 2), 1, *order, gates=gates, grouped_in=True)

    return run


def gpu_peers(compiled: bool) -> dict[str, Mixture]:
    """Ours first, then what can be imported here."""
    from kernels.moe_triton import expert_mixture_triton

    runs = {
        "ours": expert_mixture_triton,
        "grouped matmul": autograd_grouped,
    }
    if compiled:
        runs["same, compiled"] = torch.compile(autograd_grouped)
    for name, make in (("Liger", liger_experts), ("scattermoe", scattermoe_experts)):
        try:
            runs[name] = make()
        except ImportError:
            print(f"{name} is not installed: left out")
    return runs


# ------------------------------------------------------------------------- what a forward pass keeps


def saved_bytes(run: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, weights left out."""
    kept: dict[int, int] = {}
    not_counted = {t.untyped_storage().data_ptr() for t in parameters}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    def give(t: Tensor) -> Tensor:
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        y = run()
    del y
    return sum(kept.values())


def expected_bytes(S: int, E: int, K: int, C: int, I: int, size: int, rows: int) -> tuple[int, int]:
    """What our kernels keep: (x and z of elements of `size` bytes, int32 indices).

    Indices: order, inverse and weights of each slot, the offsets, a table of tiles of `rows` rows.
    """
    x_and_z = S * (C + K * 2 * I)
    tiles = -(-S * K // rows) + E
    indices = 3 * S * K + E + 1 + 2 * tiles
    return x_and_z * size, indices * 4


# -------------------------------------------------------------------------------------- on one core


def middle_and_tails(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(seconds, n=10)
    return statistics.median(seconds), tenths[0], tenths[-1]


def compare_on_cpu(
    options: KernelOptions, S: int = 4096, C: int = 256, I: int = 96, E: int = 64, K: int = 8
) -> None:
    """Forward and backward of one small layer, all implementations, fp32 and bf16, one thread."""
    torch.set_num_threads(1)
    runs = {
        "ours": moe.expert_mixture_grouped,
        "autograd grouped": autograd_grouped,
        "plain loop": moe.expert_mixture,
    }
    try:
        runs |= transformers_experts(C, I, E, K)
    except ImportError:
        print("transformers is not installed: left out (pip install -r requirements/bench.txt)")
    print(
        f"training step of a MoE layer, one thread: S {S}, C {C}, I {I}, E {E}, K {K}; "
        f"torch {torch.__version__}"
    )

    cells: dict[str, list[str]] = {name: [] for name in runs}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        inputs = layer_inputs(S, E, K, C, I, "uniform", dtype, "cpu")
        direction = torch.randn(S, C).to(dtype)
        seconds = cpu_seconds(runs, inputs, direction, turns=max(options.repeat // 4, 5))
        ours = statistics.median(seconds["ours"])
        for name, values in seconds.items():
            middle, low, high = (1e3 * value for value in middle_and_tails(values))
            ratio = middle / (1e3 * ours)
            print(
                f"{str(dtype)[6:]:>9}  {name:22} {middle:6.0f} ms ({low:.0f} to {high:.0f})   "
                f"ours is {ratio:.2f} times as fast"
            )
            cells[name].append(f"{middle:.0f} ms ({ratio:.2f})")

    # A table without its peers would replace a whole one.
    if "transformers eager" not in runs:
        return
    lines = ["| implementation | fp32 | bf16 |", "|---|---:|---:|"]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")


def cpu_seconds(
    runs: dict[str, Mixture], inputs: list[Tensor], direction: Tensor, turns: int
) -> dict[str, list[float]]:
    """Processor seconds of a training step by implementation.

    All take turns, so that a busy machine slows them alike; the first turn warms up.
    """
    leaves = leaves_of(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            began = time.process_time()
            torch.autograd.grad(run(*inputs), leaves, direction)
            if turn > 0:
                seconds[name].append(time.process_time() - began)
    return seconds


# --------------------------------------------------------------------- between a block's products


def block_kernels() -> Elementwise:
    from kernels.block_triton import rms_norm_triton, rotate_triton, swiglu_triton

    return Elementwise(rms_norm_triton, swiglu_triton, rotate_triton)


@dataclass
class Pointwise:
    """One function of a block with its inputs: `leaves` get gradients, `rest` comes after them.

    moved: numbers read and written at least, forward and backward, times their size.
    """

    name: str  # of the function in `llm.Elementwise`
    leaves: list[Tensor]
    rest: tuple
    moved: int


def block_inputs(S: int, dtype: torch.dtype, device: str, wide: bool) -> list[Pointwise]:
    """What a decoder block of Qwen3-1.7B computes for S tokens; a small one unless `wide`."""
    C, I, H, D = (2048, 6144, 16, 128) if wide else (48, 40, 3, 16)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    # Weights are fp32, and so is what flows from block to block
    stream = torch.randn(S, C, device=device).requires_grad_()
    widths = [torch.randn(n, device=device).requires_grad_() for n in (C, D)]
    cos, sin = rotary_table(torch.arange(S, device=device), D, 1e6, dtype)

    # Forward: in and out. Backward: in, its gradient, that of the output
    stream_bytes = 4 * S * C
    inner_bytes = S * I * dtype.itemsize
    head_bytes = S * H * D * dtype.itemsize
    head_bytes_out = 4 * S * H * D  # under fp32 weights
    return [
        Pointwise("rms_norm", [stream, widths[0]], (1e-6,), 5 * stream_bytes),
        Pointwise(
            "rms_norm", [draw(S, H, D), widths[1]], (1e-6,), 3 * head_bytes + 2 * head_bytes_out
        ),
        Pointwise("swiglu", [draw(S, I), draw(S, I)], (), 8 * inner_bytes),
        Pointwise("rotate", [draw(S, H, D)], (cos, sin), 4 * head_bytes),
    ]


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's own, which wants input and weight of one type."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def compare_block(options: KernelOptions) -> None:
    """Forward and backward together of each function: ours, the definition, PyTorch's, the compiler's."""
    copy, _ = machine_limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy:.2f} TB/s")
    peers = {"ours": block_kernels(), "definition": DEFINITIONS}
    for S in options.tokens:
        for case in block_inputs(S, torch.bfloat16, "cuda", wide=True):
            shape = tuple(case.leaves[0].shape)
            print(f"\n{case.name} of {shape}, {str(case.leaves[0].dtype)[6:]}")
            runs = {name: getattr(functions, case.name) for name, functions in peers.items()}
            if options.compiled:
                runs["compiled"] = torch.compile(getattr(DEFINITIONS, case.name), dynamic=True)
            if case.name == "rms_norm":
                runs["F.rms_norm"] = torch_norm
            for name, run in runs.items():
                seconds = gpu_seconds(lambda: both_passes(run, case), options.repeat)
                middle, low, high = (1e6 * value for value in middle_and_tails(seconds))
                rate = case.moved / middle / 1e6
                print(
                    f"  {name:12} {middle:7.0f} us ({low:.0f} to {high:.0f})  {rate:5.2f} TB/s  "
                    f"{rate / copy:4.0%} of the copy"
                )


def both_passes(run: Callable, case: Pointwise) -> list[Tensor]:
    """Output and gradients."""
    y = run(*case.leaves, *case.rest)
    direction = torch.ones_like(y)
    return [y, *torch.autograd.grad(y, case.leaves, direction)]


# ------------------------------------------------------------------------------------ without a GPU


def check_in_interpreter() -> None:
    """All kernels on a tiny layer against the reference, in Triton's interpreter."""
    from kernels.moe_triton import expert_mixture_triton

    torch.manual_seed(0)
    inputs = layer_inputs(9, 6, 2, 16, 24, "uniform", torch.float32, "cpu")
    direction = torch.randn(9, 16)
    results = []
    for run in (moe.expert_mixture, expert_mixture_triton):
        y = run(*inputs)
        results.append([y, *torch.autograd.grad(y, leaves_of(inputs), direction)])
    for name, a, b in zip(("y", "dx", "ds", "dW13", "dW2"), *results):
        error = ((a - b).norm() / a.norm()).detach()
        print(f"{name:>5}: relative error {float(error):.1e}")

    ours = block_kernels()
    for case in block_inputs(9, torch.float32, "cpu", wide=False):
        wanted = both_passes(getattr(DEFINITIONS, case.name), case)
        found = both_passes(getattr(ours, case.name), case)
        worst = max(float(((a - b).norm() / a.norm()).detach()) for a, b in zip(wanted, found))
        print(f"{case.name}: relative error at most {worst:.1e}")


def compile_all(
    capability: int, tokens: tuple[int, ...], E: int, K: int, C: int, I: int, dtype=torch.bfloat16
) -> list[dict]:
    """Forward and backward on uninitialised CPU memory under `Offline`: one row per kernel."""
    import triton

    from kernels.moe_triton import expert_mixture_triton
    from kernels.offline import Offline

    driver = Offline(capability)
    triton.runtime.driver.set_active(driver)
    for S in tokens:
        x = torch.empty(S, C, dtype=dtype, requires_grad=True)
        indices = torch.empty(S, K, dtype=torch.int64)
        weights = torch.empty(S, K, requires_grad=True)
        gate_up = torch.empty(E, 2 * I, C, dtype=dtype, requires_grad=True)
        down = torch.empty(E, C, I, dtype=dtype, requires_grad=True)
        y = expert_mixture_triton(x, indices, weights, gate_up, down)
        y.backward(torch.empty_like(y))
    for case in block_inputs(64, dtype, "cpu", wide=True):
        both_passes(getattr(block_kernels(), case.name), case)
    return driver.compiled


def print_compiled(options: KernelOptions) -> None:
    sizes = (options.experts, options.k, options.width, options.expert_width)
    for row in compile_all(options.compile, options.tokens, *sizes):
        kernel = row.pop("kernel")
        counts = "  ".join(f"{name} {value:>4}" for name, value in row.items())
        print(f"kernel {kernel:<15}  {counts}")


# ----------------------------------------------------------------------------------------- on a GPU


def machine_limits() -> tuple[float, float]:
    """(copy in TB/s, matmul in TFLOP/s) of this machine: what later numbers are fractions of."""
    a = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").fill_(1)
    copy_seconds, _, _ = middle_and_tails(gpu_seconds(a.clone, 20))
    moved = 2 * a.nbytes  # read and written

    b = torch.randn(8192, 8192, device="cuda").bfloat16()
    matmul_seconds, _, _ = middle_and_tails(gpu_seconds(lambda: b @ b, 20))
    return moved / copy_seconds / 1e12, 2 * 8192**3 / matmul_seconds / 1e12


def gpu_seconds(run: Callable, repeat: int, warm_up: int = 5) -> list[float]:
    """Seconds of each run between CUDA events; the L2 cache is overwritten in between."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    seconds = []
    for turn in range(warm_up + repeat):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn >= warm_up:
            seconds.append(start.elapsed_time(end) / 1e3)
    return seconds


def compare_on_gpu(options: KernelOptions) -> None:
    """Ours and its peers at all sizes, uniform and skewed."""
    import triton

    E, K, C, I = options.experts, options.k, options.width, options.expert_width
    copy, peak = machine_limits()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: "
        f"copy {copy:.2f} TB/s, matmul {peak:.0f} TFLOP/s\n"
        f"layer: E {E}, K {K}, C {C}, I {I}, bf16; median of {options.repeat} (10th to 90th "
        "percentile)"
    )
    runs = gpu_peers(options.compiled)
    for S in options.tokens:
        for popularity in ("uniform", "zipf"):
            torch.manual_seed(0)
            inputs = layer_inputs(S, E, K, C, I, popularity, torch.bfloat16, "cuda")
            busiest = E * float(moe.expert_load(inputs[1], E).max())
            print(f"\nS {S}, {popularity} (busiest expert {busiest:.1f} times the mean)")
            for name, run in runs.items():
                # A peer of another version, or out of memory: said, and on.
                try:
                    measure_passes(name, run, inputs, peak, options.repeat)
                except (RuntimeError, TypeError) as error:
                    if name == "ours":
                        raise
                    print(f"  {name:16} failed: {str(error).splitlines()[0][:100]}")


def measure_passes(name: str, run: Mixture, inputs: list[Tensor], peak: float, repeat: int) -> None:
    """Forward, backward and both of one implementation, printed; ours must keep what it says."""
    from kernels.moe_triton import blocks

    x, indices, _, gate_up, down = inputs
    (S, K), (E, C, I) = indices.shape, down.shape
    leaves = leaves_of(inputs)
    direction = torch.randn_like(x)

    kept = saved_bytes(lambda: run(*inputs), leaves[2:])
    if name == "ours":
        rows = blocks(x.dtype, S * K / E)["up"][0]
        tensors, table = expected_bytes(S, E, K, C, I, x.element_size(), rows)
        assert kept == tensors + table, (
            f"saved {kept} bytes, expected x, z {tensors} and indices {table}"
        )

    y = run(*inputs)

    def forward() -> None:
        run(*inputs)

    def backward() -> None:
        torch.autograd.grad(y, leaves, direction, retain_graph=True)

    def full() -> None:
        torch.autograd.grad(run(*inputs), leaves, direction)

    for step, flop in ((forward, 6), (backward, 12), (full, 18)):
        timing = middle_and_tails(gpu_seconds(step, repeat))
        middle, low, high = (1e3 * seconds for seconds in timing)
        rate = flop * S * K * C * I / middle / 1e9
        saved = f"  saved {kept / 1e6:.0f} MB" if step is forward else ""
        print(
            f"  {name:16} {step.__name__:9} {middle:8.3f} ms ({low:.3f} to {high:.3f})  "
            f"{rate:5.0f} TFLOP/s  {rate / peak:4.0%} of the matmul{saved}"
        )


def bench_kernels(options: KernelOptions) -> None:
    """What the options ask for; without any, the comparison on a GPU. Raises ValueError without Triton."""
    if not options.cpu:
        require_packages("-r requirements/test.txt", "triton")
    if options.cpu:
        compare_on_cpu(options)
    elif options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        check_in_interpreter()
    elif options.compile:
        print_compiled(options)
    elif torch.cuda.is_available() and options.block:
        compare_block(options)
    elif torch.cuda.is_available():
        compare_on_gpu(options)
    else:
        raise ValueError(
            "no CUDA GPU here; without one: --cpu, --interpret, or --compile 90 (see the top of "
            "kernels/bench.py)"
        )


if __name__ == "__main__":
    command(bench_kernels)
