"""A Triton driver that compiles for a GPU and launches nothing: what can be known without one.

What it teaches: the host code of a kernel never needs to look at the device. With this driver a whole
forward and backward pass runs on a machine without a GPU, on uninitialised CPU memory; every kernel is
compiled by the real compiler (ptxas and cuobjdump come with Triton's package) and must fit its target.
A host synchronisation would read garbage, so getting through also shows that there is none. It plugs
into Triton's own `driver.set_active`; speed and results are not to be had this way.

    kernel[grid](...) -> Triton compiles -> load_binary: counted by cuobjdump -> a launcher that returns

    python -m kernels.bench --compile 90
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Callable

import triton
from triton.backends.compiler import GPUTarget

# Bytes that a block may ask for, by compute capability.
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
# What is counted in the machine code.
INSTRUCTIONS = {
    "tensor core": ("HGMMA", "HMMA", "UTCHMMA"),
    "TMA load": ("UTMALDG",),
    "async copy": ("LDGSTS",),
}
THREADS = 1024  # at most, of a block


class Offline:
    """The part of a driver that a launch touches.

    compiled: one row per kernel, in order of first use, with its registers, spilled and shared bytes
    and instructions.
    """

    def __init__(self, capability: int):
        if capability not in SHARED_MEMORY:
            choices = ", ".join(map(str, SHARED_MEMORY))
            raise ValueError(f"--compile {capability}: choose one of {choices}")
        self.capability = capability
        self.compiled: list[dict] = []
        self.utils = self  # where Triton looks for `load_binary` and the properties

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict:
        """Triton raises OutOfResources for a kernel that wants more."""
        return {"max_shared_mem": SHARED_MEMORY[self.capability]}

    def launcher_cls(self, source, metadata) -> Callable:
        def launch_nothing(*arguments) -> None:
            return None

        return launch_nothing

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Looks into a kernel in place of loading it.

        Returns module, function, registers, spilled bytes and threads at most, as a driver does.
        """
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = inspect_binary(file.name, "--dump-resource-usage")
            code = inspect_binary(file.name, "-sass")

        # "... REG:168 STACK:0 SHARED:0 ..."
        counts = dict(field.split(":") for field in usage.split() if field.count(":") == 1)
        registers = int(counts["REG"])
        spilled = int(counts["STACK"])
        row = {"kernel": name, "registers": registers, "spilled": spilled, "shared": shared}
        for kind, names in INSTRUCTIONS.items():
            row[kind] = sum(code.count(f" {instruction}") for instruction in names)
        self.compiled.append(row)
        return object(), object(), registers, spilled, THREADS


def inspect_binary(file: str, question: str) -> str:
    """What cuobjdump, which Triton brings along, says about a compiled kernel."""
    tool = Path(triton.backends.__file__).parent / "nvidia/bin/cuobjdump"
    answer = subprocess.run([tool, question, file], capture_output=True, text=True, check=True)
    return answer.stdout
