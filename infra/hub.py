"""A tokenizer as other people's programs read it: the files that transformers, tokenizers and vLLM
look for.

What it teaches: a byte-level BPE is published as merges over printable characters. The ranks hold
all that is needed: a token was made of the two parts into which the merges before it cut its bytes.

    ranks {bytes: id} -> `merges_of` -> tokenizer.json         bytes shown as characters, split, merges
                                        tokenizer_config.json  end, padding, chat template
                                        special_tokens_map.json, generation_config.json

Source: the files beside Qwen3 and SAIL-VL2's released weights. The chat template is ours: it writes
what `Tokenizer.render` writes; where an image stands it puts one <IMG_CONTEXT>, which a processor
repeats as often as the image has visual tokens.
"""

from typing import Any

# Added tokens that are text to a reader: `skip_special_tokens` keeps them, as in Qwen3.
READABLE = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
    "<|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()

CHAT_TEMPLATE = r"""
{%- if system and messages[0].role != 'system' -%}
{{ '<|im_start|>system\n' + system + '<|im_end|>' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ part.text if part.type == 'text' else '<img><IMG_CONTEXT></img>' }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""


def printable_bytes() -> dict[int, str]:
    """GPT-2's byte -> printable character map, in which published BPE vocabularies are written."""
    kept = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = [b for b in range(256) if b not in set(kept)]
    shown = {b: chr(b) for b in kept}
    for i, b in enumerate(moved):
        shown[b] = chr(256 + i)
    return shown


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that made each token, in the order of the ranks: its two last parts, when the
    merges of lower rank are applied to its bytes. Tokens that no merge makes are left out."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            lowest = min(pair_ranks)
            if lowest >= rank:
                break
            at = pair_ranks.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer_files(
    ranks: dict[bytes, int], added: dict[str, int], split: str, nfc: bool, system: str
) -> dict[str, Any]:
    """File name -> its JSON value. added: name -> id of the tokens after the ranks; split: the
    regular expression that cuts a text into words; system: the default system prompt, "" for
    none."""
    shown = printable_bytes()

    def word(token: bytes) -> str:
        return "".join(shown[b] for b in token)

    # the tokens that text never becomes, and what stands beside them
    entries = [
        {
            "id": number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": name not in READABLE,
        }
        for name, number in added.items()
    ]
    names = list(added)
    end, padding = "<|im_end|>", "<|endoftext|>"

    # bytes -> words -> merges, and back
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    cut = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word(token): rank for token, rank in ranks.items()},
            "merges": [f"{word(a)} {word(b)}" for a, b in merges_of(ranks)],
        },
    }

    # Python programs find the tokens by their roles, and the way to ask
    special = [name for name in names[1:] if name not in READABLE]
    roles = {
        "eos_token": end,
        "pad_token": padding,
        "additional_special_tokens": special,
    }
    template = CHAT_TEMPLATE.strip()
    if system:
        template = "{%- set system = " + quoted(system) + " -%}\n" + template
    config = roles | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 40960,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    generation = {
        "eos_token_id": [added[end], added[padding]],
        "pad_token_id": added[padding],
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "special_tokens_map.json": roles,
        "generation_config.json": generation,
    }


def quoted(text: str) -> str:
    """A text as a Jinja string."""
    escaped = (
        text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    )
    return f"'{escaped}'"
