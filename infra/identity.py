"""What makes a run this run: code, options, data, first weights, each as something short to compare.

What it teaches: a run that goes on with other data, or next to a rank that began with other weights,
raises no error and shows no sign of it. So all that must be equal is boiled down to a few bytes, kept in
every checkpoint, and compared: by a resumed run with its checkpoint, by ranks among each other.

    revision()            the commit of this code
    data_identity(files)  sizes, heads and tails of the shards
    fingerprint(model)    sums over the bits of all parameters
    differences(a, b)     which options are not the same, for people
"""

import functools
import hashlib
import subprocess
from pathlib import Path
from typing import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

ENDS = 64 << 10  # bytes at the head and at the tail of a shard that are looked at


@functools.cache
def revision() -> str:
    """Commit of this code; where files differ from it, a digest of how; "unknown" outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        changed = git("status", "--porcelain")
        changes = git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    if not changed:
        return commit
    return f"{commit} with changes {hashlib.sha256(changed + changes).hexdigest()[:12]}"


def data_identity(files: Iterable[Path]) -> str:
    """Digest of name, size, head and tail of every file, in the order given.

    Reads 128 KiB a file at the most. It sees rows that were added, removed or reordered, and edits near
    the ends; an edit of equal length in the middle of a shard is not seen. Raises OSError for a file
    that cannot be read.
    """
    found = hashlib.sha256()
    for file in map(Path, files):
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with open(file, "rb") as shard:
            found.update(shard.read(ENDS))
            shard.seek(max(0, size - ENDS))
            found.update(shard.read(ENDS))
    return found.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Digest of all parameters and buffers that this rank holds: for each, the sum of its values read
    as whole numbers.

    Whole numbers, because their sum does not depend on its order: any number of threads, and any
    device, gives the same one. A flipped bit changes it.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        bits = values.detach().contiguous().view(whole[values.element_size()])
        total = int(bits.sum(dtype=torch.int64)) if bits.numel() else 0
        found.update(f"{name} {tuple(tensor.shape)} {total}\n".encode())
    return found.hexdigest()


def flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, for a comparison that names what differs."""
    out = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def differences(old: dict, new: dict) -> dict[str, tuple]:
    """Dotted name -> (old value, new value) of every option that is not the same in both."""
    before = flat(old)
    after = flat(new)
    names = sorted(before.keys() | after.keys())
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}
