"""What machines can do: memory, arithmetic, and how fast bytes travel, as their makers state it.

What it teaches: seven numbers are enough to plan a training run. A kernel takes the longer of two times,
that of its arithmetic and that of its bytes (the roofline); a collective takes its bytes over the
slowest link that it crosses; and what does not fit does not run.

    memory   bytes of a device          inside    bytes a second each way between devices of a node
    flops    bf16 matrices, dense       outside   the same between nodes, for each device
    memory bandwidth                    host      the same between a device and its host

Makers state links both ways together; here stands one way. Nobody reaches the stated numbers: ATTAINED
is what well-made kernels reach of them (large matrix products and streaming kernels as published for
H100; the same for others, our estimate). Prices are rents of a device as seen on public lists in 2025:
they change, `--price` says another.
"""

from dataclasses import dataclass

GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One kind of accelerator in its usual node. Rates are a second, links one way."""

    memory: float  # bytes
    flops: float  # bf16, dense
    bandwidth: float  # bytes, of its memory
    inside: float  # bytes, to the other devices of its node together
    outside: float  # bytes, to other nodes
    host: float  # bytes, to its host's memory
    node: int  # devices in a node
    price: float  # dollars an hour
    source: str


DEVICES = {
    "a100": Device(
        80 * GB, 312 * TERA, 2039 * GB, 300 * GB, 25 * GB, 32 * GB, 8, 1.8,
        "NVIDIA A100 80GB SXM data sheet; HDR InfiniBand, 200 Gb/s a device",
    ),
    "h100": Device(
        80 * GB, 989 * TERA, 3350 * GB, 450 * GB, 50 * GB, 64 * GB, 8, 2.5,
        "NVIDIA H100 SXM data sheet (1,979 TFLOP/s is with sparsity); NDR, 400 Gb/s a device",
    ),
    "h200": Device(
        141 * GB, 989 * TERA, 4800 * GB, 450 * GB, 50 * GB, 64 * GB, 8, 3.2,
        "NVIDIA H200 SXM data sheet; NDR, 400 Gb/s a device",
    ),
    "h20": Device(
        96 * GB, 148 * TERA, 4000 * GB, 450 * GB, 50 * GB, 64 * GB, 8, 1.2,
        "NVIDIA H20 as reported; one of the paper's machines (section 5.2)",
    ),
    "910b": Device(
        64 * GB, 313 * TERA, 1600 * GB, 196 * GB, 25 * GB, 32 * GB, 8, 1.2,
        "Ascend 910B as reported, sources differ; RoCE, 200 Gb/s a device (paper: NPU, section 5.2)",
    ),
}  # fmt: skip

# What is reached of the stated numbers.
ATTAINED_FLOPS = 0.65
ATTAINED_BYTES = 0.85
ATTAINED_LINKS = 0.75
LAUNCH = 5e-6  # seconds that a host needs for a kernel


def device_named(name: str) -> Device:
    """Raises ValueError for a device that the table does not have."""
    if name not in DEVICES:
        raise ValueError(f"--device {name}: choose from {', '.join(DEVICES)}")
    return DEVICES[name]
