"""Eyes that learned beside a small language model, and a large one that never saw: joined by a new adapter.

What it teaches: the ViT is the part that is carried over. Its adapter spoke the small model's language
and stays behind; the new one starts from noise, at the size of the text embeddings, so that the first
visual tokens are as loud as words.

    runs/smol/eyes      ViT ------------------+
                        (adapter, LLM stay)   +--> runs/smol/start
    runs/smol/language  LLM, tokenizer -------+
                        a new adapter --------+

`python vlm.py` joins two parts of released size in bf16; here all stays fp32, so that the language model
is bit for bit the one whose text was measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from generate import load_model
from infra.cli import command
from llm import LLM
from tokenizer import Tokenizer
from vlm import SailVL, check_vocabulary


@dataclass
class StartOptions:
    """Write a model that has a trained ViT, a trained language model and a new adapter."""

    eyes: Path = Path("runs/smol/eyes")  # a model directory: its ViT is taken
    language: Path = Path("runs/smol/language")
    out: Path = Path("runs/smol/start")
    seed: int = 0  # of the adapter


def seeing(eyes: SailVL, language: LLM, tokenizer: Tokenizer, seed: int = 0) -> SailVL:
    """The two joined. Pictures are cut as the eyes are used to."""
    # A shell of the right sizes, which owns no memory, filled with what exists
    config = replace(eyes.config, text=language.config, image_token_id=tokenizer.image)
    with torch.device("meta"):
        model = SailVL(config)
    model.vision_model = eyes.vision_model
    model.language_model = language

    # A new adapter, as loud as the words
    model.mlp1.to_empty(device="cpu")
    loudness = float(language.model.embed_tokens.weight.detach().square().mean().sqrt())
    model.mlp1.init_weights(torch.Generator().manual_seed(seed), loudness)
    return model


def write_start(options: StartOptions) -> None:
    """From directories to a directory."""
    if (options.out / "tokenizer.tiktoken").is_file():
        print(f"{options.out} is complete")
        return
    eyes, _ = load_model(options.eyes)
    language = LLM.from_pretrained(options.language)
    tokenizer = Tokenizer.load(options.language)
    model = seeing(eyes, language, tokenizer, options.seed)
    check_vocabulary(model.config, len(tokenizer), options.language)
    model.save_pretrained(options.out)
    tokenizer.save(options.out)

    # What sees, and what speaks
    parts = (model.vision_model, model.mlp1, model.language_model)
    vision, adapter, text = (sum(p.numel() for p in part.parameters()) for part in parts)
    print(f"{options.out}: ViT {vision:,}, adapter {adapter:,}, language model {text:,} parameters")


if __name__ == "__main__":
    command(write_start)
