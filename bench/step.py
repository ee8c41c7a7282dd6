"""The training step against transformers: one process, the same tokens, the same optimizer.

What it teaches: where a step's time goes, and what not computing saves: logits and the last feed-forward
only where there is a label, attention per document instead of a masked square, passes over memory that a
backward written out does without (norm, rotation, SwiGLU, log-probabilities).
transformers is used as its documentation says for packed rows: SDPA attention, position ids that
restart, and a block-diagonal mask; its fast paths for packing need a GPU.

    two packed rows -> loss, backward, clip, AdamW (ours, theirs, in turn) -> tokens a CPU second

    python -m bench.step             # tokens per second of both, ratio; the ten most expensive operations
    python -m bench.step --memory    # peak memory of the loss at a vocabulary of 151,936

Legend: R rows, T tokens a row, P labelled positions.
"""

import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import Segments, attend_inside
from infra.cli import command
from llm import LLM, LLMConfig
from vlm import token_logprobs

ROW = 1024
DOCUMENTS = (24, 96, 40, 64, 128, 32, 80, 48) * 4  # tokens of each: two packed rows of 1024
Loss = Callable[[], Tensor]


@dataclass
class StepOptions:
    """Tokens per second of one training step of a small Qwen3 (4 layers of width 256), ours and theirs."""

    vocabulary: int = 4096
    steps: int = 15  # of each, alternating; the median counts
    threads: int = 1
    memory: bool = False  # only the loss's peak memory


# ----------------------------------------------------------------------------------- two models


def packed_tokens(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random ids (R, T) and labels (R, T): the last three eighths of each document are its answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, ROW), generator=generator)
    in_answer = torch.cat([torch.arange(n) >= n - 3 * n // 8 for n in DOCUMENTS]).view(ids.shape)
    labels = torch.where(in_answer, ids.roll(-1, 1), -100)
    return ids, labels


def our_model(config: LLMConfig, ids: Tensor, labels: Tensor) -> tuple[LLM, Loss]:
    """Our language model and its loss on these rows."""
    model = LLM(config)
    model.init_weights(torch.Generator().manual_seed(0))

    segments = Segments.of(DOCUMENTS)
    attend = attend_inside(segments, causal=True)
    positions = segments.positions()
    at = (labels.reshape(-1) >= 0).nonzero()[:, 0]  # (P,)
    targets = labels.reshape(-1)[at]

    def loss() -> Tensor:
        hidden = model(model.embed(ids.reshape(-1)), positions, attend, at=at)  # (P, C)
        return -token_logprobs(hidden, model.lm_head.weight, targets).mean()

    return model, loss


def their_model(
    config: LLMConfig, ids: Tensor, labels: Tensor, ours: LLM
) -> tuple[torch.nn.Module, Loss]:
    """transformers' Qwen3 with the same weights, and its loss on the same rows."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    published = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = Qwen3ForCausalLM(published)
    model.load_state_dict(ours.state_dict())

    # A token may look at earlier ones of its own document.
    lengths = torch.tensor(DOCUMENTS)
    document = torch.arange(len(DOCUMENTS)).repeat_interleave(lengths).view(ids.shape)  # (R, T)
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).view(ids.shape)
    same = document[:, None, :, None] == document[:, None, None]
    mask = same & torch.ones(ROW, ROW).tril().bool()  # (R, 1, T, T)

    def loss() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        logits = logits.float().view(-1, config.vocab_size)  # (R*T, V)
        return F.cross_entropy(logits, labels.reshape(-1))

    return model, loss


# ---------------------------------------------------------------------------------------- speed


def training_step(model: torch.nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> float:
    """One step; returns its loss."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(value.detach())


def race_steps(options: StepOptions) -> None:
    """Both models step in turn: print losses, tokens a second, and where the time goes."""
    torch.set_num_threads(options.threads)
    config = LLMConfig(
        options.vocabulary, 256, 512, 4, 8, 4, 32, rope_theta=1e4, tie_word_embeddings=False
    )
    ids, labels = packed_tokens(options.vocabulary)
    ours, our_loss = our_model(config, ids, labels)
    theirs, their_loss = their_model(config, ids, labels, ours)

    runs = {}
    for name, model, loss in (("ours", ours, our_loss), ("transformers", theirs, their_loss)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        runs[name] = (model, loss, optimizer)

    # In turn, so that other load meets both alike.
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.steps):
        for name, run in runs.items():
            began = time.process_time()
            losses[name].append(training_step(*run))
            seconds[name].append(time.process_time() - began)

    # The same model, to rounding, all along.
    gaps = [abs(a - b) / b for a, b in zip(losses["ours"], losses["transformers"])]
    parameters = sum(p.numel() for p in ours.parameters())
    print(
        f"{options.steps} steps each of {ids.numel()} tokens, {parameters / 1e6:.1f} M parameters; "
        f"losses {losses['ours'][0]:.4f} -> {losses['ours'][-1]:.4f}, "
        f"largest relative difference {max(gaps):.1e}"
    )

    # The first two steps of each warm up.
    median = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    for name, time_a_step in median.items():
        print(f"{name:14s} {ids.numel() / time_a_step:8.0f} tokens per CPU second")
    print(f"ratio {median['transformers'] / median['ours']:.2f}\n")
    for name, run in runs.items():
        print(f"{name}: {dearest_operations(run)}")


def dearest_operations(run: tuple) -> str:
    """The ten operations that take most of three steps, with their shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            training_step(*run)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)

    shares = []
    for event in events[:10]:
        share = event.self_cpu_time_total / total
        shares.append(f"{event.key.removeprefix('aten::')} {share:.0%}")
    return ", ".join(shares)


# --------------------------------------------------------------------------------------- memory


def loss_memory(
    chunked: bool, positions: int, vocabulary: int, width: int, answer: multiprocessing.Queue
) -> None:
    """In a process of its own: MiB that the loss and its backward pass take beyond inputs and gradients."""
    torch.set_num_threads(1)
    hidden = torch.randn(positions, width, requires_grad=True)  # (P, C)
    head = torch.randn(vocabulary, width, requires_grad=True)  # (V, C)
    labels = torch.randint(vocabulary, (positions,))
    hidden.grad = torch.zeros_like(hidden)
    head.grad = torch.zeros_like(head)

    # Both ways need the head's gradient once more before it is added: it does not count.
    spare = torch.zeros_like(head)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del spare

    if chunked:
        loss = -token_logprobs(hidden, head, labels).mean()
    else:
        loss = F.cross_entropy((hidden @ head.T).float(), labels)
    loss.backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.put((after - before) / 1024)


def compare_loss_memory(positions: int = 2048, vocabulary: int = 151936, width: int = 256) -> None:
    """Print what whole logits take, and what ours does."""
    context = multiprocessing.get_context("spawn")
    peak = {}
    for chunked in (False, True):
        answer = context.Queue()
        child = context.Process(
            target=loss_memory, args=(chunked, positions, vocabulary, width, answer)
        )
        child.start()
        peak[chunked] = answer.get()
        child.join()

    logits = positions * vocabulary * 4 / 2**20
    print(
        f"{positions} positions, vocabulary {vocabulary}: whole logits are {logits:.0f} MiB\n"
        f"peak of loss and backward: whole {peak[False]:.0f} MiB, chunked {peak[True]:.0f} MiB "
        f"= {peak[True] / logits:.3f} of whole logits"
    )


def bench_step(options: StepOptions) -> None:
    """Speed, or the loss's memory."""
    if options.memory:
        compare_loss_memory()
    else:
        race_steps(options)


if __name__ == "__main__":
    command(bench_step)
