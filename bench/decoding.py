"""How fast is decoding? Against transformers' `generate`, with the same random weights.

What it teaches: what is gained by running a prompt once for all its samples and computing no
padding. The two are measured in turn, in one process, and the best time of each counts.

    random ids of different lengths -> ours, theirs -> the same greedy ids? -> seconds, sampled

    python -m bench.decoding                         # 4 prompts x 8 samples, the toy's language model
    python -m bench.decoding --layers 8 --width 256
    python -m bench.decoding --longest 64            # short prompts: nothing to share

The language model is written in Qwen3's layout and read by transformers. Prompts are text only,
sampled at temperature 1 to exactly `--max-new` tokens (no end token), so that both do the same work.
"""

import tempfile
import time
from dataclasses import dataclass, replace

import torch

from generate import generate
from infra.cli import command
from infra.system import require_packages
from vlm import PRESETS, SailVL

NO_TOKEN = -1  # an id that no vocabulary has: no image in the prompts, no end of an answer


@dataclass
class DecodingOptions:
    """Race our decoding against transformers' on the same weights."""

    prompts: int = 4
    samples: int = 8
    # tokens of the longest prompt (one tile's); the others have 1/n, 2/n, ... of it
    longest: int = 256
    max_new: int = 64
    width: int = 128
    layers: int = 4
    repeats: int = 5


def two_decoders(options: DecodingOptions):
    """Our model, and transformers' with the same weights. Raises ValueError where it is not installed."""
    require_packages("--no-deps -r requirements/oracle.txt", "transformers")
    from transformers import AutoModelForCausalLM

    text = replace(
        PRESETS["toy"].text,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=options.layers,
    )
    model = SailVL(replace(PRESETS["toy"], text=text)).init_weights(0).eval()
    model.image_token_id = NO_TOKEN  # random ids hold no image

    with tempfile.TemporaryDirectory() as directory:
        model.language_model.save_pretrained(directory)
        theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    return model, theirs


def random_prompts(options: DecodingOptions, vocabulary: int) -> list[list[int]]:
    """Prompts of random ids, from 1/n of the longest to the longest."""
    prompts = []
    for i in range(options.prompts):
        length = options.longest * (i + 1) // options.prompts
        generator = torch.Generator().manual_seed(length)
        prompts.append(torch.randint(vocabulary, (length,), generator=generator).tolist())
    return prompts


def race_decoding(options: DecodingOptions) -> None:
    """Print tokens a second of both."""
    model, theirs = two_decoders(options)
    prompts = random_prompts(options, model.config.text.vocab_size)
    questions = [(prompt, []) for prompt in prompts]

    # transformers pads at the left.
    longest = options.longest
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])  # (N, T)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    # The two are one model when their greedy answers agree.
    ours = [answer.ids for answer in generate(model, questions, NO_TOKEN, 8)]
    greedy = theirs.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    assert ours == greedy[:, longest:].tolist(), "greedy answers differ: two different models"

    def sample_ours(seed: int) -> None:
        generate(
            model, questions, NO_TOKEN, options.max_new, options.samples, temperature=1.0, seed=seed
        )

    def sample_theirs(seed: int) -> None:
        theirs.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=options.max_new,
            min_new_tokens=options.max_new,
            num_return_sequences=options.samples,
            pad_token_id=0,
        )

    # In turn, so that other load meets both alike.
    seconds = {sample_ours: [], sample_theirs: []}
    for seed in range(options.repeats):
        for sample, times in seconds.items():
            began = time.perf_counter()
            sample(seed)
            times.append(time.perf_counter() - began)

    our_time = min(seconds[sample_ours])
    their_time = min(seconds[sample_theirs])
    tokens = options.prompts * options.samples * options.max_new
    print(
        f"{options.prompts} prompts of {len(prompts[0])} to {longest} tokens x {options.samples} "
        f"samples x {options.max_new} tokens, {options.layers} layers of {options.width}: "
        f"ours {tokens / our_time:.0f} tokens a second, transformers {tokens / their_time:.0f}: "
        f"{their_time / our_time:.1f} times"
    )


if __name__ == "__main__":
    command(race_decoding)
