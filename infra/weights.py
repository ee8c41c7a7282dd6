"""Weights on disk: safetensors by name, strictly.

What it teaches: a checkpoint is a dictionary of names and shapes plus a config.json, nothing more,
and loading it needs no framework. Files are read tensor by tensor, straight into the target dtype and
device, so the peak is the model plus its largest tensor. Anything that does not match exactly is an
error that names it: a loader that shrugs is how models end up half random. So is a value that is no
finite number. Pickles are never opened: reading one runs the code in it.

    directory --locate--> name -> file --names, shapes, types against the model--> memory --> values
    model --tensors--> name -> view --> shards, index, config.json, each written whole or not at all

Names in memory are the published ones. Where a file stores a parameter otherwise, a *layout* says
how: a function from one parameter (name, value) to the {name: tensor} that the file holds, the
tensors being views of the value. Reading copies into the views, writing copies out of them, so one
function serves both. `published` is the layout of Qwen3 and SAIL-VL2: in memory a MoE layer holds its
experts stacked (`experts.gate_up_proj` (E, 2I, C)), in files one by one
(`experts.3.gate_proj.weight`). `vit.transformers_names` is another.
"""

import json
import math
import os
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.config import model_file, parse_json, read_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD = "lm_head.weight"
FLOATING = ("F64", "F32", "F16", "BF16")
PICKLES = ("bin", "pt", "pth", "ckpt")
Layout = Callable[[str, Tensor], dict[str, Tensor]]


def published(name: str, value: Tensor) -> dict[str, Tensor]:
    """One parameter in memory -> the tensors that the published layout stores for it."""
    module, _, leaf = name.rpartition(".")
    if not module.endswith(".experts"):
        return {name: value}

    views = {}
    for e, expert in enumerate(value):
        if leaf == "gate_up_proj":
            gate, up = expert.chunk(2)  # (I, C) each
            views[f"{module}.{e}.gate_proj.weight"] = gate
            views[f"{module}.{e}.up_proj.weight"] = up
        else:
            views[f"{module}.{e}.{leaf}.weight"] = expert
    return views


def tensors(model: nn.Module, layout: Layout = published) -> dict[str, Tensor]:
    """Every tensor of a model under its name on disk: views, nothing is copied.

    A tied head appears under both of its names.
    """
    views = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        views |= layout(name, p.data)
    return views


# ------------------------------------------------------------------------------------------ save


def save_weights(
    model: nn.Module,
    directory,
    config: dict,
    shard_bytes: int = 5 << 30,
    layout: Layout = published,
) -> None:
    """config.json and one or more safetensors files, in place of an earlier checkpoint's.

    More than one file comes with an index. A tied head is not stored: a file that holds one is read
    as having a head of its own. One shard is in memory at a time.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored = tensors(model, layout)
    if is_tied(model):
        stored = {name: t for name, t in stored.items() if not name.endswith(HEAD)}

    # The files; copies: views of stacked experts must not share storage in a file.
    shards = split_into_shards(stored, shard_bytes)
    for file, names in shards.items():
        copies = {name: stored[name].cpu().contiguous().clone() for name in names}
        replace_file(copies, directory / file)
        del copies  # before the next shard's

    total = sum(t.nbytes for t in stored.values())
    write_index(directory, config, shards, total)


def replace_file(copies: dict[str, Tensor], path: Path) -> None:
    """A file of weights, under its name only once it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(copies, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def write_index(directory: Path, config: dict, shards: dict[str, list[str]], total: int) -> None:
    """What says how to read the files; what is left of an earlier checkpoint goes.

    shards: file -> the tensors in it, `total` bytes of them.
    """
    # An earlier checkpoint's index would be believed.
    write_json(directory / "config.json", config)
    if len(shards) > 1:
        write_json(directory / INDEX, index_of(shards, total))
    else:
        (directory / INDEX).unlink(missing_ok=True)

    for old in (*directory.glob(SINGLE), *directory.glob("model-*-of-*.safetensors")):
        if old.name not in shards:
            old.unlink()


def index_of(shards: dict[str, list[str]], total: int) -> dict:
    """The index of several files."""
    file_of = {name: file for file, names in shards.items() for name in names}
    return {"metadata": {"total_size": total}, "weight_map": file_of}


def split_into_shards(stored: dict[str, Tensor], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors it will hold, in order of their names, at most `shard_bytes` each.

    A tensor that is larger has a file of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in sorted(stored.items()):
        if size and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return dict(zip(file_names(len(groups)), groups))


def file_names(count: int, stem: str = "model") -> list[str]:
    """Of so many files of weights (or of something else)."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_json(path, value) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------ load


def load_weights(
    model: nn.Module,
    directory,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    layout: Layout = published,
) -> nn.Module:
    """Fill a model, best built on the meta device, which owns no memory yet.

    Names, shapes and types of the whole directory are checked before memory is taken and the first
    value read. Raises ValueError naming the first tensor that is missing, unused, of a wrong shape or
    type, or that holds a value which is not a finite number in `dtype` (found while copying: the
    model is then half filled, and of no use).
    """
    stored = locate(directory)
    wanted = tensors(model, layout)
    if is_tied(model):  # such a checkpoint may leave the head out
        wanted = {n: t for n, t in wanted.items() if n in stored or not n.endswith(HEAD)}
    check_names(stored, wanted, directory)
    check_shapes(stored, wanted)

    # Memory. Two names of one tensor would get a storage each: the head is tied again afterwards.
    llm = getattr(model, "language_model", model)
    if is_tied(model):
        llm.lm_head.weight = None
    model.to(dtype).to_empty(device=device)
    if is_tied(model):
        llm.lm_head.weight = llm.model.embed_tokens.weight

    # Values.
    target = tensors(model, layout)
    sizes = {name: target[name].numel() for name in wanted}
    for path, names in small_reads(stored, sizes):
        with safe_open(path, "pt", device=str(device)) as file, torch.no_grad():
            for name in names:
                target[name].copy_(file.get_tensor(name))
                if not is_finite(target[name]):
                    raise ValueError(
                        f"{path}: {name} holds values that are not finite numbers in {dtype}; "
                        "the run that wrote it went wrong, take an earlier checkpoint"
                    )
    return model


def check_names(stored: dict[str, Path], wanted: dict, directory) -> None:
    """Raises ValueError unless file and model have the same names."""
    missing = wanted.keys() - stored.keys()
    unused = stored.keys() - wanted.keys()
    for kind, names in (("missing", missing), ("not used by this model", unused)):
        if names:
            raise ValueError(f"{directory}: {len(names)} tensor(s) {kind}, first {min(names)}")


def check_shapes(stored: dict[str, Path], wanted: dict[str, Tensor]) -> None:
    """Raises ValueError for a tensor of another shape, or of a type that is not floating."""
    for path in sorted(set(stored.values())):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                header = file.get_slice(name)
                shape = header.get_shape()
                dtype = header.get_dtype()
                expected = list(wanted[name].shape)
                if list(shape) != expected:
                    raise ValueError(
                        f"{path}: {name} has shape {list(shape)}, the model wants {expected}"
                    )
                if dtype not in FLOATING:
                    raise ValueError(f"{path}: {name} has type {dtype}, a floating type is wanted")


def is_finite(value: Tensor) -> bool:
    """Whether it holds no NaN and no infinity. In one pass, without a copy: extremes pass NaN on."""
    if value.numel() == 0:
        return True
    low, high = value.aminmax()
    return math.isfinite(low) and math.isfinite(high)


def small_reads(stored: dict[str, Path], sizes: dict[str, int]) -> Iterator[tuple[Path, list[str]]]:
    """(file, names) in turn: names of one file, together no larger than the largest tensor.

    What was read of a mapped file counts as memory in use until the file is closed, so a file is
    opened again for each of them.
    """
    largest = max(sizes.values())
    names: list[str] = []
    size = 0
    for name in sorted(sizes, key=lambda name: (stored[name], name)):
        same_file = bool(names) and stored[name] == stored[names[0]]
        if names and (not same_file or size + sizes[name] > largest):
            yield stored[names[0]], names
            names = []
            size = 0
        names.append(name)
        size += sizes[name]
    yield stored[names[0]], names


# --------------------------------------------------------------------------------- what is there


def locate(directory) -> dict[str, Path]:
    """Tensor name -> the file that holds it.

    Raises ValueError for missing, foreign or inconsistent files.
    """
    directory = Path(directory)
    if not model_file(directory, "config.json").is_file():
        raise ValueError(
            f"{directory}: no config.json here; give the directory of a saved or released model"
        )

    listed = None
    files = [SINGLE]
    if model_file(directory, INDEX).is_file():
        listed = read_index(directory)
        files = sorted(set(listed.values()))

    # Each file's own header is what counts.
    file_of: dict[str, Path] = {}
    for file in files:
        path = model_file(directory, file)
        for name in names_in(path):
            if name in file_of:
                raise ValueError(f"{path}: tensor {name} is already in {file_of[name].name}")
            file_of[name] = path

    # The index must say the same.
    if listed is not None:
        seen = {name: path.name for name, path in file_of.items()}
        differing = set(listed.items()) ^ set(seen.items())
        if differing:
            name, file = min(differing)
            raise ValueError(f"{directory / INDEX}: index and files disagree about {name} ({file})")
    return file_of


def read_index(directory: Path) -> dict[str, str]:
    """The index of several shards: tensor name -> file name. Raises ValueError."""
    listed = read_config(directory, INDEX).get("weight_map")
    maps_names = isinstance(listed, dict) and listed
    if not maps_names or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(
            f"{directory / INDEX}: not a safetensors index (weight_map must map names to file names)"
        )
    for file in listed.values():
        if Path(file).name != file:
            raise ValueError(f"{directory / INDEX}: names a file outside its directory")
        if not file.isprintable() or len(file) > 255:
            raise ValueError(f"{directory / INDEX}: {file!r:.80} is no file name")
    return listed


def names_in(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raises ValueError where it is not one."""
    if not path.is_file():
        pickles = [p.name for end in PICKLES for p in path.parent.glob(f"*.{end}")]
        hint = ""
        if pickles:
            hint = (
                f"; {min(pickles)} is a pickle, which is never opened, as that would run the code "
                "in it: convert it to safetensors"
            )
        raise ValueError(f"{path}: missing{hint}")

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error

    # The library takes the last of two entries with one name: the header must have no such thing.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(file.read(length), path)
    return names


def same_tensor(stored: dict[str, Path], a: str, b: str) -> bool:
    """Whether two stored tensors are equal."""
    with safe_open(stored[a], "pt") as file_a, safe_open(stored[b], "pt") as file_b:
        return torch.equal(file_a.get_tensor(a), file_b.get_tensor(b))


def is_tied(model: nn.Module) -> bool:
    """Whether one tensor is both the embedding and the head."""
    llm = getattr(model, "language_model", model)
    return getattr(llm.config, "tie_word_embeddings", False)
