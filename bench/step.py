"""The training step against transformers: one process, one machine, the same tokens, the same optimizer.

What it teaches: where a step's time goes, and what not computing costs: logits only where there is a label, attention per
document instead of a masked square, an RMSNorm with its backward written out. transformers is used as its documentation
says for packed rows: SDPA attention, position ids that restart, and a block-diagonal mask; its fast paths for packing need a GPU.

    python -m bench.step                  # tokens per second of both, ratio; the ten most expensive operations
    python -m bench.step --memory True    # peak memory of the loss at a vocabulary of 151,936
"""

import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from attention import Segments, attend_inside
from llm import LLM, LLMConfig
from vlm import token_logprobs

DOCUMENTS = (
    24,
    96,
    40,
    64,
    128,
    32,
    80,
    48,
) * 4  # tokens of each document: two packed rows of 1024; its last 3/8 are the answer
ROW = 1024


@dataclass
class Options:
    """Tokens per second of one training step of a small Qwen3 (4 layers of width 256), ours and transformers'."""

    vocabulary: int = 4096
    steps: int = 15  # of each, alternating; the median counts
    threads: int = 1
    memory: bool = False  # only the loss's peak memory


def ours(config: LLMConfig, ids, labels):
    model = LLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    segments = Segments.of(DOCUMENTS)
    attend, positions, at = (
        attend_inside(segments, causal=True),
        segments.positions(),
        (labels.reshape(-1) >= 0).nonzero()[:, 0],
    )

    def loss():
        hidden = model(model.embed(ids.reshape(-1)), positions, attend).index_select(0, at)
        return -token_logprobs(hidden, model.lm_head.weight, labels.reshape(-1)[at]).mean()

    return model, loss


def theirs(config: LLMConfig, ids, labels, like: LLM):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = Qwen3Config(
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
    model = Qwen3ForCausalLM(c)
    model.load_state_dict(like.state_dict())
    document = (
        torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS)).view(ids.shape)
    )
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS]).view(ids.shape)
    mask = (document[:, None, :, None] == document[:, None, None]) & torch.ones(
        ROW, ROW
    ).tril().bool()  # (2, 1, ROW, ROW)

    def loss():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        return F.cross_entropy(logits.float().view(-1, config.vocab_size), labels.reshape(-1))

    return model, loss


def step(model, loss, optimizer) -> float:
    optimizer.zero_grad()
    value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(value.detach())


def speed(o: Options) -> None:
    torch.set_num_threads(o.threads)
    config = LLMConfig(
        o.vocabulary, 256, 512, 4, 8, 4, 32, rope_theta=1e4, tie_word_embeddings=False
    )
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(o.vocabulary, (2, ROW), generator=g)
    answer = torch.cat([torch.arange(n) >= n - 3 * n // 8 for n in DOCUMENTS]).view(ids.shape)
    labels = torch.where(answer, ids.roll(-1, 1), -100)
    model, loss = ours(config, ids, labels)
    other, other_loss = theirs(config, ids, labels, model)
    runs = {"ours": (model, loss), "transformers": (other, other_loss)}
    optimizers = {
        name: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)
        for name, (m, _) in runs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(o.steps):
        for name, (m, l) in runs.items():
            began = time.process_time()
            losses[name].append(step(m, l, optimizers[name]))
            seconds[name].append(time.process_time() - began)
    gap = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["transformers"]))
    print(
        f"{o.steps} steps each of {ids.numel()} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"losses {losses['ours'][0]:.4f} -> {losses['ours'][-1]:.4f}, largest relative difference {gap:.1e}"
    )
    median = {name: statistics.median(s[2:]) for name, s in seconds.items()}
    for name, s in median.items():
        print(f"{name:14s} {ids.numel() / s:8.0f} tokens per CPU second")
    print(f"ratio {median['transformers'] / median['ours']:.2f}\n")
    for name, (m, l) in runs.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(3):
                step(m, l, optimizers[name])
        events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in events)
        print(
            f"{name}: "
            + ", ".join(
                f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}"
                for e in events[:10]
            )
        )


def peak(chunked: bool, n: int, vocabulary: int, width: int, out) -> None:
    """In a process of its own: MiB that the loss and its backward pass take beyond inputs and gradients."""
    torch.set_num_threads(1)
    hidden, head = (
        torch.randn(n, width, requires_grad=True),
        torch.randn(vocabulary, width, requires_grad=True),
    )
    labels = torch.randint(vocabulary, (n,))
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    spare = torch.zeros_like(head)  # the head's gradient before it is added: both ways need it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del spare
    if chunked:
        (-token_logprobs(hidden, head, labels).mean()).backward()
    else:
        F.cross_entropy((hidden @ head.T).float(), labels).backward()
    out.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory(n: int = 2048, vocabulary: int = 151936, width: int = 256) -> None:
    found, context = {}, multiprocessing.get_context("spawn")
    for chunked in (False, True):
        out = context.Queue()
        child = context.Process(target=peak, args=(chunked, n, vocabulary, width, out))
        child.start()
        found[chunked] = out.get()
        child.join()
    logits = n * vocabulary * 4 / 2**20
    print(
        f"{n} positions, vocabulary {vocabulary}: whole logits are {logits:.0f} MiB\npeak of loss and backward: whole "
        f"{found[False]:.0f} MiB, chunked {found[True]:.0f} MiB = {found[True] / logits:.3f} of whole logits"
    )


def main(o: Options) -> int:
    memory() if o.memory else speed(o)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
