"""How fast are rollouts, and a whole GRPO step? Against transformers' generate and TRL's trainer, with the same tiny weights.

    pip install --no-deps -r requirements/trl.txt
    python -m bench.rollouts --model runs/toy/long-cot

The language model is Qwen3 under its published names, so transformers loads the very weights. Prompts are the world's
described pictures (text only: TRL has no class for our vision side), `--prompts` of them, `--group` samples each at
temperature 1, at most `--max-new` tokens. One process, the same threads for all; each pair is measured in turn, `--repeats`
times, and the best time of each counts.

    rollout   prompts -> sampled ids                        ours: generate.generate      theirs: Qwen3ForCausalLM.generate
    step      rollout, reward, loss, backward, AdamW        ours: rl.Rollouts, train     theirs: trl.GRPOTrainer.train
"""

import cProfile
import itertools
import pstats
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rl
from data.encode import Encoder
from data.world import REASONING, World
from generate import generate, load_model
from train import train


@dataclass
class Options:
    """Race our rollouts and GRPO steps against transformers and TRL on the same weights."""

    model: Path = Path("runs/toy/long-cot")
    prompts: int = 16
    group: int = 8
    max_new: int = 64
    repeats: int = 3
    steps: int = 3  # GRPO steps of each trainer
    profile: bool = False  # print where our step spends its time


def described(n: int):
    """n reasoning questions about pictures in words, none in pixels."""
    stream = World().stream(dict.fromkeys(REASONING, 1.0) | {"text": 1.0}, 0, 1)
    return [s for s in itertools.islice((s for s in stream if s.facts["chain"]), n)]


def qwen3(model):
    """transformers' Qwen3 with our weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config.text
    config = Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        head_dim=c.head_dim,
        num_key_value_heads=c.num_key_value_heads,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=c.tie_word_embeddings,
        max_position_embeddings=4096,
        attention_bias=False,
    )
    theirs = Qwen3ForCausalLM(config)
    theirs.load_state_dict(model.language_model.state_dict(), strict=True)
    return theirs.eval()


def best(repeats: int, *calls) -> list[float]:
    """Best seconds of each call, in turn, so that other load meets all alike. A call may return the seconds that count."""
    seconds = [[] for _ in calls]
    for _ in range(repeats):
        for times, call in zip(seconds, calls):
            began = time.perf_counter()
            own = call()
            times.append(own or time.perf_counter() - began)
    return [min(times) for times in seconds]


def rollout(o: Options, model, theirs, encoder: Encoder, samples) -> None:
    tokenizer = encoder.tokenizer
    prompts = [encoder.prompt(rl.with_thinking(s, tokenizer.think_prompt)) for s in samples]
    longest = max(len(ids) for ids, _ in prompts)
    ids = torch.tensor([[tokenizer.pad] * (longest - len(p)) + p for p, _ in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in prompts])
    with torch.no_grad():  # the same function before it is raced
        ours = model(torch.tensor([prompts[0][0]]))
        torch.testing.assert_close(
            theirs(torch.tensor([prompts[0][0]])).logits, ours, rtol=1e-3, atol=1e-3
        )
    counts = {}

    def we(seed=itertools.count()):
        answers = generate(model, prompts, tokenizer.end, o.max_new, o.group, 1.0, seed=next(seed))
        counts["ours"] = sum(len(a.ids) for a in answers)

    def they():
        out = theirs.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=o.max_new,
            num_return_sequences=o.group,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.pad,
        )
        counts["transformers"] = int((out[:, longest:] != tokenizer.pad).sum())

    a, b = best(o.repeats, we, they)
    print(
        f"rollout, {o.prompts} x {o.group}: ours {a:.2f} s ({counts['ours'] / a:.0f} tokens a second), transformers {b:.2f} s "
        f"({counts['transformers'] / b:.0f}): {b / a:.1f} times",
        flush=True,
    )


def step(o: Options, model, theirs, encoder: Encoder, samples) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = encoder.tokenizer
    spelled = lambda ids: " ".join(
        f"t{i}" for i in ids
    )  # a word per id, so that TRL's text round trip changes no id
    words = Words(
        WordLevel({f"t{i}": i for i in range(model.config.text.vocab_size)}, unk_token="t0")
    )
    words.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"t{tokenizer.end}", pad_token=f"t{tokenizer.pad}"
    )
    data = [
        {
            "prompt": spelled(encoder.prompt(rl.with_thinking(s, tokenizer.think_prompt))[0]),
            "row": i,
        }
        for i, s in enumerate(samples)
    ]

    def reward(completions, row, completion_ids, **_):
        texts = [tokenizer.decode([i for i in ids if i != tokenizer.end]) for ids in completion_ids]
        return [rl.reward_of(t, samples[r], True, "verifiable") for t, r in zip(texts, row)]

    def they() -> float:
        with tempfile.TemporaryDirectory() as out:
            config = GRPOConfig(
                output_dir=out,
                per_device_train_batch_size=o.prompts * o.group,
                num_generations=o.group,
                max_completion_length=o.max_new,
                max_steps=o.steps,
                temperature=1.0,
                beta=0.0,
                learning_rate=1e-5,
                loss_type="dapo",
                logging_steps=1000,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
            )
            trainer = GRPOTrainer(
                model=theirs,
                reward_funcs=reward,
                args=config,
                train_dataset=Dataset.from_list(data),
                processing_class=wrapped,
            )
            return trainer.train().metrics["train_runtime"]  # without making the trainer

    def we():
        stage = rl.RLStage(
            "step",
            ("llm",),
            steps=o.steps,
            lr=1e-5,
            optimizer="adamw",
            schedule="constant",
            prompts=o.prompts,
            group=o.group,
            updates=1,
            max_new=o.max_new,
            overlong=0,
            dynamic=False,
        )
        train(
            model,
            stage,
            rl.Rollouts(model, encoder, itertools.cycle(samples), stage),
            rl.policy(stage),
        )

    if o.profile:
        with cProfile.Profile() as p:
            we()
        pstats.Stats(p).sort_stats("cumulative").print_stats(30)
    a, b = best(o.repeats, we, they)
    print(
        f"GRPO step, {o.prompts} x {o.group}: ours {a / o.steps:.2f} s, TRL {b / o.steps:.2f} s: {b / a:.1f} times",
        flush=True,
    )


def main(o: Options) -> int:
    model, tokenizer = load_model(o.model)
    encoder, samples = Encoder(tokenizer, model.config, max_length=512), described(o.prompts)
    theirs = qwen3(model)
    rollout(o, model, theirs, encoder, samples)
    step(o, model, theirs, encoder, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
