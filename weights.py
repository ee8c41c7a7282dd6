"""Weights on disk: safetensors by name, strictly.

What it teaches: a checkpoint is a dictionary of names and shapes plus a config.json, nothing more, and loading it needs no
framework. Files are read tensor by tensor, straight into the target dtype and device, so the peak is the model plus one
tensor. Anything that does not match exactly is an error that names the tensor: a loader that shrugs is how models end up
half random.

Names in memory are the released ones but for one case: a MoE layer holds its experts stacked (`experts.gate_up_proj`
(E, 2I, C)), while files hold them one by one (`experts.3.gate_proj.weight`). `on_disk` is that map.
"""
import json
import os
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def on_disk(name: str, value: Tensor) -> dict[str, Tensor]:
    """One parameter in memory -> the tensors that the published layout stores for it."""
    head, _, leaf = name.rpartition(".")
    if head.endswith(".experts") and leaf == "gate_up_proj":
        pairs = [(e, *w.chunk(2)) for e, w in enumerate(value)]
        return {f"{head}.{e}.{part}.weight": w for e, gate, up in pairs for part, w in (("gate_proj", gate), ("up_proj", up))}
    if head.endswith(".experts") and leaf == "down_proj":
        return {f"{head}.{e}.down_proj.weight": w for e, w in enumerate(value)}
    return {name: value}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model under its published name (views, nothing copied). A tied head appears under both names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {disk: view for name, p in parameters.items() for disk, view in on_disk(name, p.data).items()}


def save(model: nn.Module, directory, config: dict, shard_bytes: int = 5 << 30) -> None:
    """config.json and one or more safetensors files (with an index when more than one). A tied head is not stored: a file
    that holds one is read as having a head of its own."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)  # an earlier checkpoint's would be believed
    stored = {name: t for name, t in tensors(model).items() if not (_is_tied(model) and name.endswith("lm_head.weight"))}
    (directory / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    shards, size = [{}], 0
    for name, t in sorted(stored.items()):
        if size and size + t.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t.detach().cpu().contiguous().clone()  # views of stacked experts must not share storage
        size += t.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_file(shard, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {t: name for name, shard in zip(names, shards) for t in shard}
        total = sum(t.nbytes for shard in shards for t in shard.values())
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def locate(directory) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Raises ValueError for missing, foreign or inconsistent files."""
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: no config.json here; give the directory of a saved or released model")
    found: dict[str, Path] = {}
    if (directory / INDEX).is_file():
        try:
            listed = json.loads((directory / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{directory / INDEX}: not a safetensors index ({e})") from e
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise ValueError(f"{directory / INDEX}: not a safetensors index (weight_map must map names to file names)")
        files = sorted(set(listed.values()))
        if any(Path(f).name != f for f in files):
            raise ValueError(f"{directory / INDEX}: names a file outside its directory")
    else:
        listed, files = None, ["model.safetensors"]
    for file in files:
        path = directory / file
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        try:
            with safe_open(path, "pt") as f:
                names = list(f.keys())
        except SafetensorError as e:
            raise ValueError(f"{path}: truncated, or not a safetensors file ({e})") from e
        twice = [n for n in names if n in found]
        if twice:
            raise ValueError(f"{path}: tensor {twice[0]} is already in {found[twice[0]].name}")
        found |= dict.fromkeys(names, path)
    if listed is not None and {n: p.name for n, p in found.items()} != listed:
        odd = sorted(set(listed.items()) ^ {(n, p.name) for n, p in found.items()})[0]
        raise ValueError(f"{directory / INDEX}: index and files disagree about {odd[0]} ({odd[1]})")
    return found


def read_config(directory) -> dict:
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: no readable config.json ({e})") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return config


def load(model: nn.Module, directory, dtype: torch.dtype = torch.float32, device="cpu", rename=lambda name: name) -> nn.Module:
    """Fill a model built on the meta device. `rename` maps our published name to the file's.

    Raises ValueError naming the first tensor that is missing, unused, or has a wrong shape or type. Nothing is half loaded:
    names and shapes of the whole directory are checked before the first value is read.
    """
    where, wanted = locate(directory), tensors(model)
    names = {ours: rename(ours) for ours in wanted}
    tied = "lm_head.weight"  # a tied checkpoint may leave the head out
    names = {ours: disk for ours, disk in names.items() if disk in where or not (ours.endswith(tied) and _is_tied(model))}
    for kind, odd in (("missing", set(names.values()) - set(where)), ("not used by this model", set(where) - set(names.values()))):
        if odd:
            raise ValueError(f"{directory}: {len(odd)} tensor(s) {kind}, first {sorted(odd)[0]}")
    files: dict[Path, list[str]] = {}
    for ours, disk in names.items():
        files.setdefault(where[disk], []).append(ours)
    for path, group in files.items():
        with safe_open(path, "pt") as f:
            for ours in group:
                s = f.get_slice(names[ours])
                if list(s.get_shape()) != list(wanted[ours].shape):
                    raise ValueError(f"{path}: {names[ours]} has shape {list(s.get_shape())}, the model wants {list(wanted[ours].shape)}")
                if s.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{path}: {names[ours]} has type {s.get_dtype()}, a floating type is wanted")
    model.to_empty(device=device)
    model.to(dtype)
    _retie(model)
    target = tensors(model)
    with torch.no_grad():
        for path, group in files.items():
            with safe_open(path, "pt", device=str(device)) as f:
                for ours in group:
                    target[ours].copy_(f.get_tensor(names[ours]))
    return model


def _is_tied(model: nn.Module) -> bool:
    llm = getattr(model, "language_model", model)
    return llm.config.tie_word_embeddings


def _retie(model: nn.Module) -> None:
    """`to_empty` gives each module storage of its own: tie the head to the embedding again where the config says so."""
    llm = getattr(model, "language_model", model)
    if hasattr(llm, "lm_head") and llm.config.tie_word_embeddings:
        llm.lm_head.weight = llm.model.embed_tokens.weight


def write_json(path, value) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
