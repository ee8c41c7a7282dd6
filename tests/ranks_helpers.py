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
from optim import freeze_all_but
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
    steps=3,
    rows=ROWS,
    length=LENGTH,
    lr=2e-3,
    optimizer="adamw",
    weight_decay=0.05,
    schedule="constant",
    balance=0.01,
    precision="fp32",
)


def made_up_document(tokenizer, step: int, row: int) -> Document:
    """Row `row` of a step: one document, for one row in three without a picture."""
    rng = np.random.default_rng([step, row])
    pictures = int((step + row) % 3 != 1)
    picture = rng.integers(0, 255, (32, 32, 3), np.uint8)
    text = rng.integers(0, 100, int(rng.integers(50, 90)))
    ids = np.append([tokenizer.image] * 4 * pictures, text).astype(np.int64)
    labels = np.append(ids[1:], tokenizer.end)
    labels[: 4 * pictures] = -100
    return Document(
        ids,
        labels,
        (labels >= 0).astype(np.float32),
        (picture,) * pictures,
        "seen" if pictures else "text",
        "made up",
        {},
        vision=pictures,
    )


class SameRows:
    """Steps of this rank's micro-batches: however many ranks, all of them see the same four rows."""

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
        rows = [[made_up_document(self.tokenizer, self.step, number)] for number in own]
        self.step += 1
        each = len(rows) // self.accumulate
        batches = []
        for start in range(0, len(rows), each):
            batch = collate(rows[start : start + each], LENGTH, self.tokenizer.pad)
            batch.weights = batch.weights.to(self.dtype)
            batches.append(batch)
        return batches

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def exact_logprobs(hidden, head, labels, temperature=1.0, chunk=0):
    """`vlm.token_logprobs` without its fp32: the one place where a model of doubles is narrowed."""
    return -F.cross_entropy(hidden @ head.T / temperature, labels, reduction="none")


def small_run(
    ranks, config, tokenizer, dtype=torch.float32, model=None, data=None, objective=None, **changes
):
    """A few steps, the model laid out as `ranks` says: losses, gradient norms, AdaLRS's decisions."""
    stage = replace(STAGE, **changes)
    model = model or vlm.SailVL(config).init_weights(0).to(dtype)
    freeze_all_but(model, stage.trains)
    shard_model(model, ranks)
    data = data or SameRows(tokenizer, ranks, stage.accumulate, dtype)
    usual = vlm.token_logprobs
    if dtype == torch.float64:
        vlm.token_logprobs = exact_logprobs
    try:
        run = train(model, stage, data, objective, ranks)
    finally:
        vlm.token_logprobs = usual
    return {
        "loss": [row["loss"] for row in run.log],
        "norm": [row["grad_norm"] for row in run.log],
        "balance": [row["balance"] for row in run.log if "balance" in row],
        "skipped": [row["skipped"] for row in run.log],
        "actions": [decision["action"] for decision in run.decisions],
    }


def far(one: dict, other: dict, key: str) -> float:
    """The largest difference of a number of two runs, relative above 1; 0 where both skipped a step."""
    assert len(one[key]) == len(other[key])
    pairs = [(a, b) for a, b in zip(one[key], other[key]) if a == a or b == b]
    return max((abs(a - b) / max(abs(b), 1.0) for a, b in pairs), default=0.0)
