"""How long a piece of the model takes, from what it multiplies, reads and writes.

What it teaches: a kernel takes the longer of two times, FLOP over the device's FLOP a second and bytes
over its memory's. The real modules run here once on fake tensors, which have shapes and no numbers;
every operation that PyTorch dispatches is written down with its FLOP and bytes, and any device's time
is a sum over that list. So a kernel that is fused shows in the plan without a word changed here.

    module, shapes --fake tensors--> [(FLOP, bytes), ...] --device--> sum of max(FLOP / F, bytes / B)

    time ^      ______ bytes rule: norms, SwiGLU, rotary, casts
         |     /
         | ___/________ FLOP rule: matrix products
         +-----------> FLOP a byte

Simplified: eager kernels read all inputs and write all outputs, no cache helps; a convolution of the
chunked loss counts as the matrix products that it is made of. What the device runs in place of a CPU's
operation (flash attention, the Triton experts) is taken for the same work.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scale.devices import ATTAINED_BYTES, ATTAINED_FLOPS, LAUNCH, Device

# Operations that move no bytes: views, and memory that is only reserved.
FREE = set(
    "view _unsafe_view _reshape_alias reshape t transpose permute expand detach alias slice select "
    "split split_with_sizes unbind unsqueeze squeeze as_strided lift_fresh empty empty_like "
    "empty_strided new_empty new_empty_strided chunk".split()
)


@dataclass
class KernelWork:
    """What was done: (FLOP, bytes) of every operation."""

    operations: Counter = field(default_factory=Counter)  # (FLOP, bytes) -> how often

    @property
    def flops(self) -> float:
        return sum(flops * times for (flops, _), times in self.operations.items())

    def seconds(self, device: Device) -> float:
        """On a device: the longer of the device's own time and its host's for the launches."""
        total = 0.0
        for (flops, moved), times in self.operations.items():
            arithmetic = flops / (device.flops * ATTAINED_FLOPS)
            memory = moved / (device.bandwidth * ATTAINED_BYTES)
            total += times * max(arithmetic, memory)
        return max(total, LAUNCH * self.operations.total())

    def __add__(self, other: "KernelWork") -> "KernelWork":
        return KernelWork(self.operations + other.operations)

    def scaled(self, factor: float) -> "KernelWork":
        """The same operations on so many times the tokens."""
        sizes = Counter()
        for (flops, moved), times in self.operations.items():
            sizes[flops * factor, moved * factor] += times
        return KernelWork(sizes)

    def __mul__(self, times: int) -> "KernelWork":
        return KernelWork(Counter({one: often * times for one, often in self.operations.items()}))


class OperationLedger(TorchDispatchMode):
    """Writes down every operation that is dispatched while it is active."""

    def __init__(self):
        super().__init__()
        self.work = KernelWork()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        library, _, name = operation._schema.name.partition("::")
        if name == "bincount":  # as many counts as the data says: here as many as are asked for
            count = args[2] if len(args) > 2 else kwargs["minlength"]
            return torch.zeros(count, dtype=torch.int64)
        result = operation(*args, **kwargs)
        if library == "aten" and name not in FREE:
            leaves = tree_leaves((args, kwargs, result))
            moved = sum(t.numel() * t.element_size() for t in leaves if isinstance(t, Tensor))
            self.work.operations[flops_of(operation, name, args, kwargs, result), moved] += 1
        return result


def flops_of(operation, name: str, args: tuple, kwargs: dict, result) -> float:
    """Of a matrix product or an attention, by PyTorch's own formulas where it has them; else 0."""
    if "grouped_mm" in name:
        left, right = args[:2]
        inner = left.shape[-1]
        # of a gradient of stacked weights too, whose groups lie along the inner side
        return 2.0 * left.shape[0] * inner * right.shape[-1]
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        return attention_flops(name, args, kwargs)
    packet = operation.overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0.0


def attention_flops(name: str, args: tuple, kwargs: dict) -> float:
    """Two products forward, five backward; a causal one looks at half of the pairs."""
    backward = name.endswith("backward")
    query, key = args[1:3] if backward else args[:2]
    flags = [value for value in (*args, *kwargs.values()) if isinstance(value, bool)]
    batch, heads, length, width = query.shape
    products = 5 if backward else 2
    pairs = length * key.shape[2] * (0.5 if any(flags) else 1.0)
    return 2.0 * products * batch * heads * width * pairs


def kernel_work(
    build: Callable[[], Callable[[], Tensor]], half: bool
) -> tuple[KernelWork, KernelWork]:
    """Forward and backward pass of a piece.

    build: makes the piece of fake tensors; returns its forward function, whose result's sum is the
    loss. half: under autocast, as on accelerators.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        forward = build()
        before = OperationLedger()
        with before, torch.autocast("cpu", torch.bfloat16, enabled=half):
            result = forward()
        after = OperationLedger()
        if result.requires_grad:
            gradient = torch.ones_like(result)
            with after:
                result.backward(gradient)
    return before.work, after.work
