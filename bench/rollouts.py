"""How fast are rollouts, and a whole GRPO step? Against transformers' generate and TRL's trainer.

What it teaches: where an RL step's time goes, and what a prompt that runs once for its whole group
is worth. Both sides have the same tiny weights: the language model is Qwen3 under its published
names, so transformers loads the very file.

    rollout   prompts -> sampled ids            ours: generate.generate    theirs: Qwen3ForCausalLM.generate
    step      rollout, reward, loss, AdamW      ours: Rollouts, train      theirs: trl.GRPOTrainer.train

    pip install --no-deps -r requirements/trl.txt
    python -m bench.rollouts --model runs/toy/long-cot

Prompts are the world's described pictures (text only: TRL has no class for our vision side),
`--prompts` of them, `--group` samples each at temperature 1, at most `--max-new` tokens. One process,
the same threads for all; each pair is measured in turn, `--repeats` times, and the best counts.
"""

import cProfile
import itertools
import pstats
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from data.encode import Encoder, with_thinking
from data.sample import Sample
from data.stream import Drawn
from data.world import REASONING, World
from generate import generate, load_model
from infra.cli import command
from infra.system import require_packages
from rollout import Rollouts, reward_of
from stage import RLStage
from train import train
from vlm import SailVL


@dataclass
class RolloutOptions:
    """Race our rollouts and GRPO steps against transformers and TRL on the same weights."""

    model: Path = Path("runs/toy/long-cot")
    prompts: int = 16
    group: int = 8
    max_new: int = 64
    repeats: int = 3
    steps: int = 3  # GRPO steps of each trainer
    profile: bool = False  # print where our step spends its time


def described_questions(n: int) -> list[Sample]:
    """n reasoning questions about pictures in words, none in pixels."""
    mixture = dict.fromkeys(REASONING, 1.0) | {"text": 1.0}
    stream = World().stream(mixture, 0, 1)
    with_chain = (sample for sample in stream if sample.facts["chain"])
    return list(itertools.islice(with_chain, n))


def qwen3_of(model: SailVL):
    """transformers' Qwen3 with our weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    text = model.config.text
    published = Qwen3Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        head_dim=text.head_dim,
        num_key_value_heads=text.num_key_value_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_theta,
        tie_word_embeddings=text.tie_word_embeddings,
        max_position_embeddings=4096,
        attention_bias=False,
    )
    theirs = Qwen3ForCausalLM(published)
    theirs.load_state_dict(model.language_model.state_dict(), strict=True)
    return theirs.eval()


def best_in_turn(repeats: int, *calls: Callable[[], float | None]) -> list[float]:
    """Best seconds of each call, in turn, so that other load meets all alike.

    A call may return the seconds that count.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for times, call in zip(seconds, calls):
            began = time.perf_counter()
            counted = call()
            times.append(counted or time.perf_counter() - began)
    return [min(times) for times in seconds]


def thinking_prompts(encoder: Encoder, samples: list[Sample]) -> list[tuple]:
    """The questions as prompts that ask for thinking."""
    request = encoder.tokenizer.think_prompt
    return [encoder.prompt(with_thinking(sample, request)) for sample in samples]


# -------------------------------------------------------------------------------------- rollout


def race_rollouts(
    options: RolloutOptions, model: SailVL, theirs, encoder: Encoder, samples: list[Sample]
) -> None:
    """Sample groups with both; print seconds and tokens a second."""
    tokenizer = encoder.tokenizer
    prompts = thinking_prompts(encoder, samples)

    # transformers pads at the left.
    longest = max(len(ids) for ids, _ in prompts)
    ids = torch.tensor([[tokenizer.pad] * (longest - len(p)) + p for p, _ in prompts])  # (N, T)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in prompts])

    # The same function before it is raced.
    first = torch.tensor([prompts[0][0]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(first).logits, model(first), rtol=1e-3, atol=1e-3)

    tokens = {}
    seeds = itertools.count()

    def sample_ours() -> None:
        answers = generate(
            model,
            prompts,
            tokenizer.end,
            options.max_new,
            options.group,
            temperature=1.0,
            seed=next(seeds),
        )
        tokens["ours"] = sum(len(answer.ids) for answer in answers)

    def sample_theirs() -> None:
        out = theirs.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=options.max_new,
            num_return_sequences=options.group,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.pad,
        )
        tokens["theirs"] = int((out[:, longest:] != tokenizer.pad).sum())

    ours, other = best_in_turn(options.repeats, sample_ours, sample_theirs)
    print(
        f"rollout, {options.prompts} x {options.group}: "
        f"ours {ours:.2f} s ({tokens['ours'] / ours:.0f} tokens a second), "
        f"transformers {other:.2f} s ({tokens['theirs'] / other:.0f}): {other / ours:.1f} times",
        flush=True,
    )


# ----------------------------------------------------------------------------------------- step


def spelled(ids: list[int]) -> str:
    """A word per id, so that TRL's round trip through text changes no id."""
    return " ".join(f"t{i}" for i in ids)


def word_tokenizer(encoder: Encoder, vocabulary: int):
    """transformers' tokenizer of the words that `spelled` writes."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Words(WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = encoder.tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"t{tokenizer.end}", pad_token=f"t{tokenizer.pad}"
    )


def train_with_trl(
    options: RolloutOptions, theirs, encoder: Encoder, samples: list[Sample], vocabulary: int
) -> float:
    """GRPO steps of TRL's trainer; returns its seconds, without making it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = encoder.tokenizer
    prompts = thinking_prompts(encoder, samples)
    rows = [{"prompt": spelled(ids), "row": i} for i, (ids, _) in enumerate(prompts)]

    def reward(completions, row, completion_ids, **_) -> list[float]:
        rewards = []
        for ids, i in zip(completion_ids, row):
            text = tokenizer.decode([token for token in ids if token != tokenizer.end])
            rewards.append(reward_of(text, samples[i], True, "verifiable"))
        return rewards

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=options.prompts * options.group,
            num_generations=options.group,
            max_completion_length=options.max_new,
            max_steps=options.steps,
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
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(encoder, vocabulary),
        )
        return trainer.train().metrics["train_runtime"]


def train_with_ours(
    options: RolloutOptions, model: SailVL, encoder: Encoder, samples: list[Sample]
) -> None:
    """The same GRPO steps here."""
    stage = RLStage(
        "step",
        ("llm",),
        algorithm="dapo",
        steps=options.steps,
        lr=1e-5,
        optimizer="adamw",
        schedule="constant",
        prompts=options.prompts,
        group=options.group,
        updates=1,
        max_new=options.max_new,
        overlong=0,
        dynamic=False,
    )
    questions = Drawn(lambda n: samples[n % len(samples)])
    train(model, stage, Rollouts(model, encoder, questions, stage))


def race_grpo(
    options: RolloutOptions, model: SailVL, theirs, encoder: Encoder, samples: list[Sample]
) -> None:
    """GRPO steps with both; print seconds a step."""
    vocabulary = model.config.text.vocab_size

    def ours() -> None:
        train_with_ours(options, model, encoder, samples)

    def trl() -> float:
        return train_with_trl(options, theirs, encoder, samples, vocabulary)

    if options.profile:
        with cProfile.Profile() as profile:
            ours()
        pstats.Stats(profile).sort_stats("cumulative").print_stats(30)

    our_time, their_time = best_in_turn(options.repeats, ours, trl)
    print(
        f"GRPO step, {options.prompts} x {options.group}: ours {our_time / options.steps:.2f} s, "
        f"TRL {their_time / options.steps:.2f} s: {their_time / our_time:.1f} times",
        flush=True,
    )


def bench_rollouts(options: RolloutOptions) -> None:
    """Rollouts, then whole steps. Raises ValueError without the packages that they are raced against."""
    require_packages(
        "--no-deps -r requirements/trl.txt", "transformers", "tokenizers", "datasets", "trl"
    )
    model, tokenizer = load_model(options.model)
    encoder = Encoder(tokenizer, model.config, max_length=512)
    samples = described_questions(options.prompts)
    theirs = qwen3_of(model)

    race_rollouts(options, model, theirs, encoder, samples)
    race_grpo(options, model, theirs, encoder, samples)


if __name__ == "__main__":
    command(bench_rollouts)
