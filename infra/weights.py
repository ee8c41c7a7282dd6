"""Weights on disk: safetensors by name, strictly.

What it teaches: a checkpoint is a dictionary of names and shapes plus a config.json, nothing more, and loading it needs no
framework. Files are read tensor by tensor, straight into the target dtype and device, so the peak is the model plus its
largest tensor. Anything that does not match exactly is an error that names it: a loader that shrugs is how models end up
half random. Pickles are never opened: reading one runs the code in it.

Names in memory are the published ones. Where a file stores a parameter otherwise, a *layout* says how: a function from one
parameter (name, value) to the {name: tensor} that the file holds, the tensors being views of the value. Reading copies into
the views, writing copies out of them, so one function serves both. `published` is the layout of Qwen3 and SAIL-VL2: in
memory a MoE layer holds its experts stacked (`experts.gate_up_proj` (E, 2I, C)), in files one by one
(`experts.3.gate_proj.weight`). `vit.transformers_names` is another.
"""

import json
import os
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.config import parse_json, read_config

INDEX = "model.safetensors.index.json"
LIMITS = {
    "num_hidden_layers": 1024,
    "num_experts": 4096,
}  # of a config that we believe; any other count: 2**20
Layout = Callable[[str, Tensor], dict[str, Tensor]]


def published(name: str, value: Tensor) -> dict[str, Tensor]:
    """One parameter in memory -> the tensors that the published layout stores for it."""
    head, _, leaf = name.rpartition(".")
    if head.endswith(".experts") and leaf == "gate_up_proj":
        pairs = [(e, *w.chunk(2)) for e, w in enumerate(value)]
        return {
            f"{head}.{e}.{part}.weight": w
            for e, gate, up in pairs
            for part, w in (("gate_proj", gate), ("up_proj", up))
        }
    if head.endswith(".experts") and leaf == "down_proj":
        return {f"{head}.{e}.down_proj.weight": w for e, w in enumerate(value)}
    return {name: value}


def tensors(model: nn.Module, layout: Layout = published) -> dict[str, Tensor]:
    """Every tensor of a model under its name on disk (views, nothing copied). A tied head appears under both names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        disk: view for name, p in parameters.items() for disk, view in layout(name, p.data).items()
    }


# ------------------------------------------------------------------------------------------------------------------ save


def save_weights(
    model: nn.Module,
    directory,
    config: dict,
    shard_bytes: int = 5 << 30,
    layout: Layout = published,
) -> None:
    """config.json and one or more safetensors files (with an index when more than one), in place of an earlier checkpoint's.
    A tied head is not stored: a file that holds one is read as having a head of its own. One shard is in memory at a time."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored = {
        name: t
        for name, t in tensors(model, layout).items()
        if not (_is_tied(model) and name.endswith("lm_head.weight"))
    }
    shards, size = [[]], 0
    for name, t in sorted(stored.items()):
        if size and size + t.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += t.nbytes
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, names in zip(files, shards):
        views = {
            n: stored[n].cpu().contiguous().clone() for n in names
        }  # views of stacked experts must not share storage
        save_file(views, directory / (file + ".tmp"), metadata={"format": "pt"})
        os.replace(directory / (file + ".tmp"), directory / file)
    write_json(directory / "config.json", config)
    if len(shards) > 1:
        where = {n: file for file, names in zip(files, shards) for n in names}
        write_json(
            directory / INDEX,
            {
                "metadata": {"total_size": sum(t.nbytes for t in stored.values())},
                "weight_map": where,
            },
        )
    else:
        (directory / INDEX).unlink(missing_ok=True)  # an earlier checkpoint's would be believed
    for old in {
        *directory.glob("model.safetensors"),
        *directory.glob("model-*-of-*.safetensors"),
    } - {directory / f for f in files}:
        old.unlink()


def write_json(path, value) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------------------- configs


# ------------------------------------------------------------------------------------------------------------------ load


def locate(directory) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Raises ValueError for missing, foreign or inconsistent files."""
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory}: no config.json here; give the directory of a saved or released model"
        )
    if (directory / INDEX).is_file():
        listed = read_config(directory, INDEX).get("weight_map")
        if (
            not isinstance(listed, dict)
            or not listed
            or not all(isinstance(f, str) for f in listed.values())
        ):
            raise ValueError(
                f"{directory / INDEX}: not a safetensors index (weight_map must map names to file names)"
            )
        files = sorted(set(listed.values()))
        if any(Path(f).name != f for f in files):
            raise ValueError(f"{directory / INDEX}: names a file outside its directory")
    else:
        listed, files = None, ["model.safetensors"]
    found: dict[str, Path] = {}
    for file in files:
        path = directory / file
        if not path.is_file():
            pickles = sorted(
                p.name for end in ("bin", "pt", "pth", "ckpt") for p in directory.glob(f"*.{end}")
            )
            raise ValueError(
                f"{path}: missing"
                + (
                    f"; {pickles[0]} is a pickle, which is never opened, as that would run "
                    "the code in it: convert it to safetensors"
                    if pickles
                    else ""
                )
            )
        try:
            with safe_open(path, "pt") as f:
                names = list(f.keys())
        except SafetensorError as e:
            raise ValueError(f"{path}: truncated, or not a safetensors file ({e})") from e
        with open(path, "rb") as f:
            parse_json(f.read(int.from_bytes(f.read(8), "little")), path)
        twice = [n for n in names if n in found]
        if twice:
            raise ValueError(f"{path}: tensor {twice[0]} is already in {found[twice[0]].name}")
        found |= dict.fromkeys(names, path)
    if listed is not None and {n: p.name for n, p in found.items()} != listed:
        odd = sorted(set(listed.items()) ^ {(n, p.name) for n, p in found.items()})[0]
        raise ValueError(f"{directory / INDEX}: index and files disagree about {odd[0]} ({odd[1]})")
    return found


def same_tensor(where: dict[str, Path], a: str, b: str) -> bool:
    """Whether two stored tensors are equal."""
    with safe_open(where[a], "pt") as f, safe_open(where[b], "pt") as g:
        return torch.equal(f.get_tensor(a), g.get_tensor(b))


def load_weights(
    model: nn.Module,
    directory,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    layout: Layout = published,
) -> nn.Module:
    """Fill a model, best built on the meta device, which owns no memory yet.

    Raises ValueError naming the first tensor that is missing, unused, or has a wrong shape or type. Nothing is half loaded:
    names, shapes and types of the whole directory are checked before the first value is read.
    """
    where, wanted = locate(directory), tensors(model, layout)
    if _is_tied(model):  # such a checkpoint may leave the head out
        wanted = {
            name: view
            for name, view in wanted.items()
            if name in where or not name.endswith("lm_head.weight")
        }
    for kind, odd in (
        ("missing", wanted.keys() - where.keys()),
        ("not used by this model", where.keys() - wanted.keys()),
    ):
        if odd:
            raise ValueError(f"{directory}: {len(odd)} tensor(s) {kind}, first {sorted(odd)[0]}")
    for path in sorted(set(where.values())):
        with safe_open(path, "pt") as f:
            for name in f.keys():
                s, shape = f.get_slice(name), list(wanted[name].shape)
                if list(s.get_shape()) != shape:
                    raise ValueError(
                        f"{path}: {name} has shape {list(s.get_shape())}, the model wants {shape}"
                    )
                if s.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"{path}: {name} has type {s.get_dtype()}, a floating type is wanted"
                    )
    llm = getattr(model, "language_model", model)
    if _is_tied(model):
        llm.lm_head.weight = None  # to_empty would give each of the two names storage of its own
    model.to(dtype).to_empty(device=device)
    if _is_tied(model):
        llm.lm_head.weight = llm.model.embed_tokens.weight
    target = tensors(model, layout)
    with torch.no_grad():
        for path, names in _bites(
            {name: where[name] for name in wanted}, {name: target[name].numel() for name in wanted}
        ):
            with safe_open(path, "pt", device=str(device)) as f:
                for name in names:
                    target[name].copy_(f.get_tensor(name))
    return model


def _bites(where: dict[str, Path], sizes: dict[str, int]):
    """(file, names) in turn, no bite larger than the largest tensor: what was read of a mapped file counts as memory in use
    until the file is closed."""
    bite, most = [], max(sizes.values())
    for name in sorted(where, key=lambda n: (where[n], n)):
        if bite and (
            where[name] != where[bite[0]] or sum(sizes[n] for n in bite) + sizes[name] > most
        ):
            yield where[bite[0]], bite
            bite = []
        bite.append(name)
    yield where[bite[0]], bite


def _is_tied(model: nn.Module) -> bool:
    llm = getattr(model, "language_model", model)
    return getattr(llm.config, "tie_word_embeddings", False)
