"""Several real processes for a test, and one small run that every layout must repeat.

Ranks are forked, as `torchrun` would start them: a rendezvous on this machine, gloo between them.
"""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import vlm
from data.sample import Document
from packing import collate
from scale import parallel
from scale.layout import Layout
from scale.shard import shard_model
from stage import Stage
from train import train


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_ranks(
    work, folder: Path, size: int = 2, timeout: float = 30.0, layout: Layout = Layout()
) -> list:
    """work(ranks) in `size` processes; what each returned, or the error that it ended with, or its status."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os._exit(one_rank(work, folder, rank, size, port, timeout, layout))
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    files = [folder / f"said-{rank}.json" for rank in range(size)]
    return [json.loads(f.read_text()) if f.exists() else s for f, s in zip(files, statuses)]


def one_rank(
    work, folder: Path, rank: int, size: int, port: int, timeout: float, layout: Layout
) -> int:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        said = work(parallel.start(timeout, layout))
    except SystemExit as end:
        return end.code
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    return 0


# ------------------------------------------------------------------------- one run, any layout

ROWS = 4
LENGTH = 96
STAGE = Stage(
    "parity",
    steps=4,
    rows=ROWS,
    length=LENGTH,
    lr=2e-3,
    optimizer="adamw",
    weight_decay=0.05,
    schedule="constant",
    balance=0.01,
    precision="fp32",
)


class SameRows:
    """Steps of this rank's micro-batches. However many ranks, all of them see the same four rows a
    step, one in three of them without a picture."""

    def __init__(self, tokenizer, ranks, accumulate=1, dtype=torch.float32):
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.accumulate = accumulate
        self.dtype = dtype
        self.step = 0

    def __iter__(self):
        return self

    def __next__(self):
        own = range(self.ranks.rank, ROWS, self.ranks.size)
        rows = [[self.document(number)] for number in own]
        self.step += 1
        each = len(rows) // self.accumulate
        batches = []
        for start in range(0, len(rows), each):
            batch = collate(rows[start : start + each], LENGTH, self.tokenizer.pad)
            batch.weights = batch.weights.to(self.dtype)
            batches.append(batch)
        return batches

    def document(self, row):
        rng = np.random.default_rng([self.step, row])
        pictures = int((self.step + row) % 3 != 1)
        picture = rng.integers(0, 255, (32, 32, 3), np.uint8)
        text = rng.integers(0, 100, int(rng.integers(40, 80)))
        ids = np.append([self.tokenizer.image] * 4 * pictures, text).astype(np.int64)
        labels = np.append(ids[1:], self.tokenizer.end)
        labels[: 4 * pictures] = -100
        weights = (labels >= 0).astype(np.float32)
        return Document(
            ids,
            labels,
            weights,
            (picture,) * pictures,
            "seen" if pictures else "text",
            "made up",
            {},
            vision=pictures,
        )

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def exact_logprobs(hidden, head, labels, temperature=1.0, chunk=0):
    """`vlm.token_logprobs` without its fp32: the one place where a model of doubles is narrowed."""
    return -F.cross_entropy(hidden @ head.T / temperature, labels, reduction="none")


def small_run(ranks, config, tokenizer, layout=None, dtype=torch.float32, model=None, **changes):
    """Losses, gradient norms and AdaLRS's decisions of a few steps, the model laid out as `ranks` says."""
    stage = replace(STAGE, **changes)
    if layout:
        ranks = replace(ranks, layout=layout)
    model = model or vlm.SailVL(config).init_weights(0).to(dtype)
    shard_model(model, ranks)
    if dtype == torch.float64:
        vlm.token_logprobs = exact_logprobs
    run = train(model, stage, SameRows(tokenizer, ranks, stage.accumulate, dtype), ranks=ranks)
    return {
        "losses": [row["loss"] for row in run.log],
        "norms": [row["grad_norm"] for row in run.log],
        "balance": [row.get("balance", 0.0) for row in run.log],
        "actions": [decision["action"] for decision in run.decisions],
    }


def far(one: dict, other: dict, key: str = "losses") -> float:
    """The largest relative difference between two runs."""
    assert len(one[key]) == len(other[key])
    return max(abs(a - b) / abs(b) for a, b in zip(one[key], other[key]))
