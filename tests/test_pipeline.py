"""Pipeline parallelism: on 2 and 4 ranks, by every schedule, a run is the run of one process.

Ranks are forked once for each number of them; every case is a whole `train()` there and here. A case has
rows with and without pictures, one micro-batch in three without any.
"""

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from ranks_helpers import as_ranks, exact_logprobs
from safetensors.torch import load_file, save_file

import vlm
from data.sample import Document
from objective import supervised
from packing import collate
from scale import parallel
from scale.layout import Layout
from scale.parallel import Ranks, whole
from scale.shard import shard_model
from stage import Stage
from train import train
from vlm import PRESETS, SailVL

IMAGE, END, PAD, VOCABULARY, LENGTH = 440, 441, 442, 448, 64
STAGE = Stage(
    "x",
    steps=3,
    rows=4,
    length=LENGTH,
    lr=2e-3,
    optimizer="adamw",
    weight_decay=0.05,
    balance=0.01,
    router_z=0.001,
)


@dataclass(frozen=True)
class Case:
    """A layout, what it trains, and how often it agrees with one process to the last digit."""

    layout: Layout
    experts: bool = False
    stage: Stage = STAGE
    micro_batches: int = 4
    dtype: torch.dtype = torch.float32

    @property
    def rows_together(self) -> int:
        """Rows of one micro-batch over all ranks: experts are balanced over those."""
        return max(1, self.layout.copies) * self.layout.shard


def small(case: Case) -> SailVL:
    """Four layers: one for each of four ranks."""
    config = PRESETS["toy-moe" if case.experts else "toy"]
    text = replace(config.text, vocab_size=VOCABULARY, num_hidden_layers=4)
    vision = replace(config.vision, num_hidden_layers=2)
    config = replace(config, text=text, vision=vision, image_token_id=IMAGE)
    return SailVL(config).init_weights(0).to(case.dtype)


def row(step: int, number: int) -> list[Document]:
    """The documents of one row of a step; every third row is text alone."""
    rng = np.random.default_rng([step, number])
    room = LENGTH
    documents = []
    while room > 12:
        n = min(int(rng.integers(8, 30)), room)
        color = int(rng.integers(4))
        seen = (step + number) % 3 != 1 and bool(rng.random() < 0.7)
        text = [10 + color] * 2 + [(20 + color + i) % 60 for i in range(n - 2 - 4 * seen)]
        ids = np.array([IMAGE] * 4 * seen + text)
        labels = np.append(ids[1:], END)
        labels[: 4 * seen] = -100
        picture = np.zeros((32, 32, 3), np.uint8) + np.uint8(60 * color + 20)
        task = "seen" if seen else "text"
        weights = (labels >= 0).astype(np.float32)
        pictures = (picture,) * seen
        documents.append(Document(ids, labels, weights, pictures, task, "", {}, vision=int(seen)))
        room -= n
    return documents


def rows(case: Case, rank: int = 0, size: int = 1):
    """Steps of one rank's micro-batches, the same rows in the same micro-batches for any number of ranks."""
    together = case.rows_together
    for step in range(case.stage.steps):
        batches = []
        for i in range(case.micro_batches):
            numbers = range(i * together, (i + 1) * together)[rank::size]
            batch = collate([row(step, n) for n in numbers], LENGTH, PAD)
            batch.weights = batch.weights.to(case.dtype)
            batches.append(batch)
        yield batches


def outcome(run, model) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What must be the same: the log without times and what each rank says of its own rows; the weights."""
    own = ("data_seconds", "tokens_per_second", "images_per_second", "eta", "filled")
    log = [{key: value for key, value in row.items() if key not in own} for row in run.log]
    return log, {name: whole(p.detach()) for name, p in model.named_parameters()}


def run(case: Case, ranks: Ranks = Ranks()):
    model = shard_model(small(case), ranks)
    with pytest.MonkeyPatch.context() as patch:
        if case.dtype == torch.float64:
            patch.setattr(vlm, "token_logprobs", exact_logprobs)
        done = train(model, case.stage, rows(case, ranks.rank, ranks.size), supervised, ranks)
    return outcome(done, model)


def many(cases: dict[str, Case], folder, size: int) -> dict[str, list]:
    """Every case on `size` ranks that are started once: what each rank has of it."""

    def work(ranks):
        rank, _ = parallel.place_of_all()
        for name, case in cases.items():
            log, weights = run(case, parallel.start(ranks.timeout, case.layout))
            save_file(weights, folder / f"{name} {rank}.safetensors")
            (folder / f"{name} {rank}.json").write_text(json.dumps(log))
        return "done"

    assert as_ranks(work, folder, size) == ["done"] * size
    said: dict[str, list] = defaultdict(list)
    for name, rank in itertools.product(cases, range(size)):
        log = json.loads((folder / f"{name} {rank}.json").read_text())
        said[name].append((log, load_file(folder / f"{name} {rank}.safetensors")))
    return said


def worst(numbers, expected) -> float:
    """The largest difference, as a share of the largest expected number."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float((numbers - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def differences(parts: list, expected) -> tuple[float, float, float]:
    """Of every rank's log, and of the weights of all stages together, from those of one process.

    The largest, each as a share of what it is compared with: of losses, of other numbers, of weights.
    """
    expected_log, expected_weights = expected
    of_losses = [0.0]
    of_others = [0.0]
    weights = {}
    for log, own_weights in parts:
        weights |= own_weights
        for own, one in zip(log, expected_log, strict=True):
            assert own.keys() == one.keys()
            for key, value in one.items():
                found = own[key]
                if isinstance(value, dict):
                    assert found.keys() == value.keys(), key
                    found, value = list(found.values()), list(value.values())
                kind = of_losses if key in ("loss", "tasks") else of_others
                kind.append(worst(found, value))

    assert weights.keys() == expected_weights.keys()
    of_weights = [worst(weights[name], values) for name, values in expected_weights.items()]
    return max(of_losses), max(of_others), max(of_weights)


ADAPTER = replace(STAGE, trains=("adapter",))
LANGUAGE = replace(STAGE, trains=("llm",))
EYES = replace(STAGE, trains=("vision", "adapter"))
TWO = {
    "1f1b": Case(Layout(pp=2)),
    "gpipe": Case(Layout(pp=2, schedule="gpipe")),
    "interleaved": Case(Layout(pp=2, schedule="interleaved")),
    "experts": Case(Layout(pp=2), experts=True),
    "experts, interleaved": Case(Layout(pp=2, schedule="interleaved"), experts=True),
    "experts, bias": Case(Layout(pp=2), experts=True, stage=replace(STAGE, expert_bias_rate=0.01)),
    "adapter": Case(Layout(pp=2), stage=ADAPTER),
    "language": Case(Layout(pp=2), stage=LANGUAGE),
    "language, experts": Case(Layout(pp=2), experts=True, stage=LANGUAGE),
    "eyes": Case(Layout(pp=2), stage=EYES),
    "muon": Case(Layout(pp=2), stage=replace(STAGE, optimizer="muon")),
    "recompute": Case(Layout(pp=2), experts=True, stage=replace(STAGE, recompute=True)),
    "one micro-batch": Case(Layout(pp=2), micro_batches=1),
}
WIDE = torch.float64
FOUR = {
    "four stages": Case(Layout(pp=4)),
    "four stages, experts": Case(Layout(pp=4), experts=True),
}
# With more than one copy or shard gradients are added up in another order: compared in fp64, where an
# optimizer makes nothing of it. (The z-loss is a mean over each rank's own tokens, also without a pipeline.)
BALANCE = replace(STAGE, router_z=0.0)
FOUR_WIDE = {
    "copies": Case(Layout(pp=2, copies=2), False, BALANCE, dtype=WIDE),
    "copies, experts": Case(Layout(pp=2, copies=2), True, BALANCE, dtype=WIDE),
    "shards": Case(Layout(pp=2, shard=2), False, BALANCE, dtype=WIDE),
    "shards, experts": Case(Layout(pp=2, shard=2), True, BALANCE, dtype=WIDE),
    "shards, interleaved": Case(
        Layout(pp=2, shard=2, schedule="interleaved"), True, BALANCE, dtype=WIDE
    ),
    "spread experts": Case(Layout(pp=2, shard=2, ep=2), True, BALANCE, dtype=WIDE),
    "shards, language": Case(Layout(pp=2, shard=2), False, LANGUAGE, dtype=WIDE),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return many(TWO, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return many(FOUR, tmp_path_factory.mktemp("four"), 4)


@pytest.mark.parametrize("name", TWO)
def test_two_stages_train_as_one_process_does(two, name):
    assert differences(two[name], run(TWO[name])) == (0, 0, 0)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_as_one_process_does(four, name):
    losses, others, weights = differences(four[name], run(FOUR[name]))
    assert losses < 5e-7 and others < 1e-5 and weights < 1e-5
