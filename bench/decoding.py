"""How fast is decoding? Against transformers' `generate`, with the same random weights, in the same process.

    python -m bench.decoding                         # 4 prompts x 8 samples, the toy's language model
    python -m bench.decoding --layers 8 --width 256
    python -m bench.decoding --longest 64            # short prompts: nothing to share

The language model is written in Qwen3's layout and read by transformers. Prompts are random ids of different lengths, text
only, sampled at temperature 1 to exactly `--max-new` tokens (no end token), so that both do the same work. Ours runs a prompt
once for all its samples and computes no padding. The two are measured in turn and the best time of each counts.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace

import torch
import tyro

from generate import generate
from vlm import PRESETS, SailVL


@dataclass
class Options:
    """Race our decoding against transformers' on the same weights."""

    prompts: int = 4
    samples: int = 8
    longest: int = (
        256  # tokens of the longest prompt (one tile has 256); the others have 1/n, 2/n, ... of it
    )
    max_new: int = 64
    width: int = 128
    layers: int = 4
    repeats: int = 5


def main(o: Options) -> int:
    from transformers import AutoModelForCausalLM

    text = replace(
        PRESETS["toy"].text,
        hidden_size=o.width,
        intermediate_size=2 * o.width,
        num_hidden_layers=o.layers,
    )
    model = SailVL(replace(PRESETS["toy"], text=text)).init_weights(0).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.language_model.save_pretrained(directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    model.image_token_id = -1  # random ids hold no image
    lengths = [o.longest * (i + 1) // o.prompts for i in range(o.prompts)]
    prompts = [
        torch.randint(text.vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in lengths
    ]
    ids = torch.tensor([[0] * (o.longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (o.longest - len(p)) + [1] * len(p) for p in prompts])
    sampling = dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=o.max_new,
        min_new_tokens=o.max_new,
        num_return_sequences=o.samples,
        pad_token_id=0,
    )
    ours = [a.ids for a in generate(model, [(p, []) for p in prompts], -1, 8)]
    same = theirs.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0
    )[:, o.longest :].tolist()
    assert ours == same, "greedy answers differ: the two are not the same model"
    seconds = [[], []]
    for seed in range(o.repeats):
        for times, call in zip(
            seconds,
            (
                lambda: generate(
                    model, [(p, []) for p in prompts], -1, o.max_new, o.samples, 1.0, seed=seed
                ),
                lambda: theirs.generate(ids, attention_mask=mask, **sampling),
            ),
        ):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    a, b = map(min, seconds)
    tokens = o.prompts * o.samples * o.max_new
    print(
        f"{o.prompts} prompts of {lengths[0]} to {o.longest} tokens x {o.samples} samples x {o.max_new} tokens, {o.layers} layers of {o.width}: "
        f"ours {tokens / a:.0f} tokens a second, transformers {tokens / b:.0f}: {b / a:.1f} times"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
