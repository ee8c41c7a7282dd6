"""A Triton driver that compiles for a GPU and launches nothing: what can be known without one.

What it teaches: the host code of a kernel never needs to look at the device. With this driver a whole forward and backward
pass runs on a machine without a GPU, on uninitialised CPU memory; every kernel is compiled by the real compiler (ptxas and
cuobjdump come with Triton's package) and must fit its target. A host synchronisation would read garbage, so getting through
also shows that there is none. It plugs into Triton's own `driver.set_active`; speed and results are not to be had this way.

    python -m kernels.bench --compile 90
"""

import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = {
    80: 166912,
    90: 232448,
    100: 232448,
}  # bytes that a block may ask for, by compute capability
INSTRUCTIONS = {
    "tensor core": ("HGMMA", "HMMA", "UTCHMMA"),
    "TMA load": ("UTMALDG",),
    "async copy": ("LDGSTS",),
}


class Offline:
    """The part of a driver that a launch touches. `compiled`: one row per kernel, in order of first use."""

    def __init__(self, capability: int):
        if capability not in SHARED_MEMORY:
            raise ValueError(
                f"--compile {capability}: choose one of {', '.join(map(str, SHARED_MEMORY))}"
            )
        self.capability, self.compiled, self.utils = capability, [], self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict:
        return {
            "max_shared_mem": SHARED_MEMORY[self.capability]
        }  # Triton raises OutOfResources above it

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        tool = Path(triton.backends.__file__).parent / "nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            read = lambda what: (
                subprocess.run(
                    [tool, what, file.name], capture_output=True, text=True, check=True
                ).stdout
            )
            usage = dict(
                field.split(":")
                for field in read("--dump-resource-usage").split()
                if field.count(":") == 1
            )
            code = read("-sass")
        row = {
            "kernel": name,
            "registers": int(usage["REG"]),
            "spilled": int(usage["STACK"]),
            "shared": shared,
        }
        self.compiled.append(
            row
            | {
                what: sum(code.count(f" {i}") for i in names)
                for what, names in INSTRUCTIONS.items()
            }
        )
        return (
            object(),
            object(),
            row["registers"],
            row["spilled"],
            1024,
        )  # module, function, ..., threads at most
