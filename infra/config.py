"""Configurations: the published config.json, read with suspicion and written as others expect it.

What it teaches: a released model is a JSON file of sizes beside a file of tensors. How Qwen3, AIMv2
and SAIL-VL2 spell their sizes stands here, so that the model files open with the model. A config is
text from a stranger, and memory is reserved by what it says: every value is checked, against the
dataclass that it fills, before anything is built.

    config.json --read_config--> dict --read_llm, read_vit, read_vlm--> a config dataclass
                 no key twice          keys of the release -> ours; types, sizes, what is not built
    config dataclass --write_llm, write_vit, write_vlm--> dict --infra/weights.py--> config.json

The reading functions are given the dataclass to fill, as this file lies below the model. Unknown
keys are left alone: they belong to other tools.

Links. A file of a model directory may be a link to another file of that directory or, in the cache
of the Hugging Face hub (which consists of links), to a blob of the same repository. A link that
leads elsewhere is an error: a directory that came from a stranger would choose which of your files
is read. NANOSAIL_FOLLOW_LINKS=1 allows it, for directories that you linked together yourself.
"""

import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

LARGEST = {"num_hidden_layers": 1024, "num_experts": 4096}  # of a config that we believe
LARGEST_OTHER = 2**20
MOST_PARAMETERS = 10**13  # of one part; more is a mistake, or means harm
MOST_EXPERTS = 2**16  # in all layers together; the largest published models have some 25,000
LARGEST_FILE = 2**28  # bytes; the index of a model of 10^12 parameters has some 2^23
FOLLOW_LINKS = "NANOSAIL_FOLLOW_LINKS"
OUR_KEYS = ("max_tiles", "msac", "any_resolution", "image_token_id")  # not in the released layout


# ----------------------------------------------------------------------------------------- files


def parse_json(text: bytes, source) -> dict:
    """A JSON object in which no key occurs twice: a second one would win without a word.

    Raises ValueError naming the source.
    """

    def without_repetition(pairs: list[tuple[str, Any]]) -> dict:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            raise ValueError("a key occurs twice")
        return keys

    try:
        value = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: not a JSON object")
    return value


def model_file(directory, name: str) -> Path:
    """The path of a file of a model directory, whether it exists or not.

    Raises ValueError for a link that leads out of the directory (the top of this file has the rule).
    """
    path = Path(directory, name)
    if not path.is_symlink() or os.environ.get(FOLLOW_LINKS) == "1":
        return path

    # Where files may lie: here, and beside `snapshots/REVISION/` in the hub's cache.
    here = Path(os.path.realpath(directory))
    allowed = [here]
    allowed += [folder.parent / "blobs" for folder in here.parents if folder.name == "snapshots"]

    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise ValueError(
            f"{path}: a link out of the model's directory, to {target}; copy the file, "
            f"or allow such links with {FOLLOW_LINKS}=1"
        )
    return path


def read_config(directory, name: str = "config.json") -> dict:
    """A JSON file of a model directory.

    Raises ValueError where it is missing, not an object, or too large to be one.
    """
    path = model_file(directory, name)
    if not path.is_file():
        raise ValueError(
            f"{directory}: no {name} here; give the directory of a saved or released model"
        )
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path}: {size:,} bytes, at most {LARGEST_FILE:,} are believed")
    return parse_json(path.read_bytes(), path)


# ---------------------------------------------------------------------------------------- values


def check_value(value, kind: type, key: str, source: str):
    """A value of the type that its field wants; numbers are positive and not absurd.

    Raises ValueError naming the key.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        smallest = 0 if key == "num_experts" else 1  # no experts: a dense model
        largest = LARGEST.get(key, LARGEST_OTHER)
        fits = is_number and isinstance(value, int) and smallest <= value <= largest
    elif kind is float:
        fits = is_number and 0 < value <= sys.float_info.max  # no int that no float holds
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ValueError(f"{source}: {key} is {value!r:.80}, not a sensible {kind.__name__}")
    return float(value) if kind is float else value


def pick(kind: type, values, source: str, optional: tuple[str, ...] = (), **supported):
    """An instance of a config dataclass from a larger dictionary; null is as good as missing.

    optional: fields that may be missing and keep their default. supported: for keys that have no
    field, the only value that is built, or a tuple of them. Raises ValueError naming a key that is
    missing, of a wrong type, or asks for what is not built.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: missing, or not an object")
    values = {key: value for key, value in values.items() if value is not None}

    for key, wanted in supported.items():
        choices = wanted if isinstance(wanted, tuple) else (wanted,)
        if key in values and values[key] not in choices:
            raise ValueError(
                f"{source}: {key} {values[key]!r:.80} is not supported, only {wanted!r}"
            )

    chosen = {}
    for field in fields(kind):
        if field.name in values:
            chosen[field.name] = check_value(values[field.name], field.type, field.name, source)
        elif field.name not in optional:
            raise ValueError(f"{source}: key {field.name} is missing")
    return kind(**chosen)


def check_size(parameters: int, source: str) -> None:
    """Raises ValueError for a part that nobody can mean: building it would take all of the memory."""
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"{source}: these sizes make {parameters:.1e} parameters, at most {MOST_PARAMETERS:.0e} "
            "are believed"
        )


# ------------------------------------------------------------------------------------- the model


def read_llm(kind: type, values, source: str):
    """A published Qwen3, Qwen3-MoE or Llama configuration -> `llm.LLMConfig` (the `kind`).

    Raises ValueError naming a key that is missing or unsupported.
    """
    # transformers 5 writes three of the keys elsewhere.
    if isinstance(values, dict):
        rope = values.get("rope_parameters")
        rope = rope if isinstance(rope, dict) else {}
        moved = {
            "rope_theta": rope.get("rope_theta"),
            "rope_type": rope.get("rope_type"),
            "num_experts": values.get("num_local_experts"),
        }
        values = moved | values

        # What sets a Llama apart is no key but a name.
        values["qk_norm"] = values.get("model_type") != "llama"

    # A dense model need not say what its experts would be.
    dense = isinstance(values, dict) and not values["num_experts"]
    experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    config = pick(
        kind,
        values,
        source,
        optional=experts if dense else (),
        model_type=("qwen3", "qwen3_moe", "llama"),
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        pretraining_tp=1,
        rope_scaling=None,
        rope_type="default",
        use_sliding_window=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )

    # Parts and sizes that do not go together.
    if config.num_experts and not config.qk_norm:
        raise ValueError(f"{source}: a llama of {config.num_experts} experts is not supported")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"{source}: {config.num_attention_heads} query heads of size {config.head_dim} do not "
            f"share {config.num_key_value_heads} key heads"
        )
    if config.num_experts and config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"{source}: {config.num_experts_per_tok} experts a token of {config.num_experts}"
        )
    if config.num_experts and config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise ValueError(
            f"{source}: num_experts_per_tok 1 with norm_topk_prob: the router would get no gradient"
        )

    # Sizes that are each possible and together absurd.
    if config.num_hidden_layers * config.num_experts > MOST_EXPERTS:
        raise ValueError(
            f"{source}: {config.num_hidden_layers} layers of {config.num_experts} experts; "
            f"at most {MOST_EXPERTS} experts in all are believed"
        )
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    widths = config.num_experts * config.moe_intermediate_size or config.intermediate_size
    layer = config.hidden_size * (heads * config.head_dim + 3 * widths)
    vocabulary = 2 * config.vocab_size * config.hidden_size  # embedding and head
    check_size(config.num_hidden_layers * layer + vocabulary, source)
    return config


def write_llm(config) -> dict:
    """`llm.LLMConfig` -> the published layout, which transformers reads."""
    if config.num_experts:
        names = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    elif config.qk_norm:
        names = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    else:
        names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    built = {
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": None,
        "max_position_embeddings": 40960 if config.qk_norm else 8192,  # Qwen3's, SmolLM2's
    }
    # The model's type says whether queries and keys have norms.
    sizes = asdict(config)
    del sizes["qk_norm"]
    return sizes | names | built


def read_vit(kind: type, values, source: str):
    """A SAIL-ViT or AIMv2 configuration -> `vit.ViTConfig` (the `kind`).

    Raises ValueError naming a key that is missing or unsupported.
    """
    # AIMv2 calls sines and cosines in place of a table "native".
    if isinstance(values, dict):
        values = {"position": "sincos" if values.get("is_native") else "table"} | values
    config = pick(
        kind,
        values,
        source,
        model_type=("sailvit", "aimv2", "aimv2_vision_model"),
        hidden_act="silu",
        qkv_bias=False,
        use_bias=False,
        mlp_bias=False,
        use_head=False,
    )

    # Sizes that do not go together: positions want the width to be a multiple of something.
    width = config.hidden_size
    heads = config.num_attention_heads
    unit = {"table": 1, "rope2d": 4 * heads, "sincos": 4}.get(config.position)
    fits = unit is not None and width % heads == 0 and width % unit == 0
    if not fits or config.image_size % config.patch_size:
        raise ValueError(
            f"{source}: width {width} of {heads} heads, {config.image_size} pixels in patches of "
            f"{config.patch_size} and positions {config.position!r} do not make a ViT"
        )

    # Sizes that are each possible and together absurd.
    patches = (config.image_size // config.patch_size) ** 2
    pixels = config.num_channels * config.patch_size**2
    layer = 4 * width + 3 * config.intermediate_size
    check_size(width * (config.num_hidden_layers * layer + patches + pixels), source)
    return config


def write_vit(config) -> dict:
    """`vit.ViTConfig` -> SAIL-ViT's layout."""
    built = {"model_type": "sailvit", "qkv_bias": False, "use_bias": False}
    return asdict(config) | built | {"is_native": config.position == "sincos"}


def read_vlm(kind: type, values, processor: dict | None, source: str):
    """A released SAIL-VL2 config.json, or one of ours -> `vlm.VLMConfig` (the `kind`).

    processor: preprocessor_config.json, when there is one; the released tiler obeys it rather than
    config.json. Raises ValueError naming a key that is missing or unsupported.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: not an object")
    processor = processor or {}
    ours = values.get("nanosail") or {}
    if not isinstance(ours, dict):
        raise ValueError(f"{source}: nanosail is {ours!r:.80}, not an object")

    # The keys of the release under our names; what it has no field for stands under "nanosail".
    merged = {
        "vision": values.get("vision_config"),
        "text": values.get("llm_config"),
        "min_tiles": values.get("min_dynamic_patch"),
        "max_tiles": processor.get("max_dynamic_patch", values.get("max_dynamic_patch", 12)),
        "msac": processor.get("use_msac"),
        "thumbnail": values.get("use_thumbnail"),
    }
    merged |= {key: ours[key] for key in OUR_KEYS if key in ours}

    # The two parts have readers of their own.
    kinds = {field.name: field.type for field in fields(kind)}
    merged["vision"] = read_vit(kinds["vision"], merged["vision"], f"{source}: vision_config")
    merged["text"] = read_llm(kinds["text"], merged["text"], f"{source}: llm_config")

    supported = {
        "model_type": "sailvl",
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
    }
    merged |= {key: values.get(key) for key in supported}
    config = pick(kind, merged, source, optional=tuple(kinds), **supported)
    if config.min_tiles > config.max_tiles:
        raise ValueError(
            f"{source}: at least {config.min_tiles} tiles and at most {config.max_tiles}"
        )
    return config


def write_vlm(config) -> dict:
    """`vlm.VLMConfig` -> the released layout; what it has no field for goes under "nanosail"."""
    return {
        "architectures": ["SAILVLModel"],
        "model_type": "sailvl",
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "univl-chat",
        "dynamic_image_size": True,
        "use_thumbnail": config.thumbnail,
        "force_image_size": config.vision.image_size,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "llm_config": write_llm(config.text),
        "vision_config": write_vit(config.vision),
        "nanosail": {key: getattr(config, key) for key in OUR_KEYS},
    }
