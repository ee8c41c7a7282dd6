"""Pipeline parallelism: on 2 and 4 ranks, by every schedule, a run is the run of one process.

Ranks are forked once for each number of them; every case is a whole `train()` there and here. A case has
rows with and without pictures, one micro-batch in three without any.
"""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import weakref
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from ranks_helpers import as_ranks, exact_logprobs
from safetensors.torch import load_file, save_file

import recipe
import rl
import vlm
from data.sample import Document
from data.world import World
from infra.checkpoint import checkpoints
from infra.plan import memory_line
from infra.run_directory import RunDirectory
from objective import supervised
from packing import collate
from recipe import Setup
from scale import parallel
from scale.layout import Layout
from scale.parallel import Ranks, whole
from scale.pipeline import check_count, check_cut, even_cuts, layers_of, waiting
from scale.shard import shard_model, whole_weights
from scale.shards import materialise, save_released
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


REFERENCES: dict[str, tuple] = {}


def reference(case: Case):
    """The run of one process, once for all layouts that must repeat it."""
    key = repr((case.experts, case.stage, case.micro_batches, case.rows_together, case.dtype))
    if key not in REFERENCES:
        REFERENCES[key] = run(case)
    return REFERENCES[key]


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


# ------------------------------------------------------------------------- as one process does

ADAPTER = replace(STAGE, trains=("adapter",))
LANGUAGE = replace(STAGE, trains=("llm",))
EYES = replace(STAGE, trains=("vision", "adapter"))
BIAS = replace(STAGE, expert_bias_rate=0.01)
MUON = replace(STAGE, optimizer="muon")
RECOMPUTE = replace(STAGE, recompute=True)
# (the z-loss is a mean over each rank's own tokens, with and without a pipeline)
BALANCE = replace(STAGE, router_z=0.0)
HALF = replace(STAGE, precision="bf16")
WIDE = torch.float64
TURNS = "interleaved"

TWO = {
    "1f1b": Case(Layout(pp=2)),
    "gpipe, adapter": Case(Layout(pp=2, schedule="gpipe"), stage=ADAPTER),
    "interleaved, experts": Case(Layout(pp=2, schedule=TURNS), True),
}
TWO_MORE = {
    "gpipe": Case(Layout(pp=2, schedule="gpipe")),
    "interleaved": Case(Layout(pp=2, schedule=TURNS)),
    "experts": Case(Layout(pp=2), True),
    "experts, bias": Case(Layout(pp=2), True, BIAS),
    "adapter, experts": Case(Layout(pp=2), True, ADAPTER),
    "language": Case(Layout(pp=2), stage=LANGUAGE),
    "language, experts": Case(Layout(pp=2), True, LANGUAGE),
    "eyes": Case(Layout(pp=2, schedule=TURNS), stage=EYES),
    "muon": Case(Layout(pp=2), stage=MUON),
    "recompute": Case(Layout(pp=2), True, RECOMPUTE),
    "autocast": Case(Layout(pp=2), True, HALF),
    "weights travel as bf16": Case(Layout(pp=2, half=True), True),
    "one micro-batch": Case(Layout(pp=2), micro_batches=1),
}
FOUR = {
    "four stages": Case(Layout(pp=4)),
    "copies, experts": Case(Layout(pp=2, copies=2), True, replace(BALANCE, steps=2), 2, WIDE),
}
FOUR_MORE = {
    "copies, experts, longer": Case(Layout(pp=2, copies=2), True, BALANCE, dtype=WIDE),
    "four stages, experts": Case(Layout(pp=4), True),
    "copies": Case(Layout(pp=2, copies=2), False, BALANCE, dtype=WIDE),
    "shards": Case(Layout(pp=2, shard=2), False, BALANCE, dtype=WIDE),
    "shards, experts": Case(Layout(pp=2, shard=2), True, BALANCE, dtype=WIDE),
    "shards, interleaved": Case(Layout(pp=2, shard=2, schedule=TURNS), True, BALANCE, dtype=WIDE),
    "shards, muon": Case(Layout(pp=2, shard=2), False, replace(MUON, router_z=0.0), dtype=WIDE),
    "spread experts": Case(Layout(pp=2, shard=2, ep=2), True, BALANCE, dtype=WIDE),
    "shards, language": Case(Layout(pp=2, shard=2), False, LANGUAGE, dtype=WIDE),
}


def started(cases: dict[str, Case], size: int):
    """A fixture: these cases on `size` ranks, which are started once for all of them."""

    @pytest.fixture(scope="module")
    def on_ranks(tmp_path_factory):
        return many(cases, tmp_path_factory.mktemp("ranks"), size)

    return on_ranks


two = started(TWO, 2)
two_more = started(TWO_MORE, 2)
four = started(FOUR, 4)
four_more = started(FOUR_MORE, 4)


def check(case: Case, parts: list) -> None:
    """Another order of sums, with more than one copy or shard, is seen in fp64 alone; without, nothing."""
    losses, others, weights = differences(parts, reference(case))
    if case.layout.half:
        assert 0 < losses < 1e-2
    elif case.rows_together > 1:
        assert losses < 1e-14 and others < 1e-14 and weights < 1e-11
    else:
        # balance and z-loss are added up by section
        assert losses == weights == 0 and others < 2e-7


@pytest.mark.parametrize("name", TWO)
def test_two_stages_train_as_one_process_does(two, name):
    check(TWO[name], two[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_MORE)
def test_two_stages_train_as_one_process_does_whatever_trains(two_more, name):
    check(TWO_MORE[name], two_more[name])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_as_one_process_does(four, name):
    check(FOUR[name], four[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_MORE)
def test_stages_are_copied_sharded_and_have_spread_experts(four_more, name):
    check(FOUR_MORE[name], four_more[name])


# ------------------------------------------------------------------------------- weights and files


def test_a_released_directory_is_read_into_stages_and_whole_again(tmp_path):
    """Each rank reads its own layers, from the meta device; the copy that answers is the whole model."""
    case = Case(Layout(pp=2), True)
    released = small(case)
    released.save_pretrained(tmp_path / "released")

    def work(ranks):
        ranks = parallel.start(ranks.timeout, case.layout)
        with torch.device("meta"):
            empty = SailVL(released.config)
        staged = shard_model(empty, ranks)
        read = materialise(staged, tmp_path / "released")
        save_released(staged, tmp_path / "written", ranks)
        with whole_weights(staged, ranks) as copy:
            pairs = zip(copy.parameters(), released.parameters(), strict=True)
            equal = all(torch.equal(a, b) for a, b in pairs)
            batch = next(rows(case))[0]
            answers = torch.equal(copy(batch.ids, batch.images), released(batch.ids, batch.images))
        return read, equal, answers

    said = as_ranks(work, tmp_path / "said")
    total = sum(p.nbytes for p in released.parameters())
    assert [part[1:] for part in said] == [[True, True]] * 2
    assert sum(part[0] for part in said) == total and max(part[0] for part in said) < total

    again = SailVL.from_pretrained(tmp_path / "written")
    for (name, p), q in zip(again.named_parameters(), released.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_signal_to_one_stage_stops_both_after_the_same_step(tmp_path):
    """Launchers tell one rank after the other: a stage that left alone would leave without a checkpoint."""
    case = Case(Layout(pp=2), stage=replace(STAGE, steps=6), micro_batches=2)

    def told(ranks):
        for step, batches in enumerate(rows(case)):
            if ranks.stage == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batches

    def work(ranks):
        ranks = parallel.start(ranks.timeout, case.layout)
        model = shard_model(small(case), ranks)
        train(model, case.stage, told(ranks), supervised, ranks, RunDirectory(tmp_path / "run"))

    assert as_ranks(work, tmp_path) == [143, 143]
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [2]


def test_the_plan_is_of_the_whole_model_and_other_stages_layers_are_let_go(tmp_path, encoder):
    """A new model is made whole on every rank; once it is cut, nobody may keep what other ranks hold."""
    case = Case(Layout(pp=2), stage=replace(STAGE, steps=1, length=256, mixture={"text": 1.0}))

    def work(ranks):
        ranks = parallel.start(ranks.timeout, case.layout)
        model = small(case)
        setup = Setup(model, replace(encoder, config=model.config), World(), ranks)
        layers = [weakref.ref(layer) for layer in model.language_model.model.layers]
        planned = memory_line(setup, case.stage)
        del model

        def check(step):
            gc.collect()
            kept.append([layer() is not None for layer in layers])
            return {}

        kept = []
        setup.directory = RunDirectory(tmp_path / "run", check=check, check_every=1)
        recipe.fit(setup, case.stage)
        return planned == memory_line(setup, case.stage), kept[0]

    first, last = as_ranks(work, tmp_path)
    assert first[0] is last[0] is True
    assert [a + b for a, b in zip(first[1], last[1])] == [1] * 4


def test_a_second_start_forgets_the_layout_of_the_first(tmp_path):
    def work(ranks):
        places = []
        for layout in (Layout(pp=2), Layout(shard=2), Layout()):
            ranks = parallel.start(ranks.timeout, layout)
            places.append([*parallel.place(), ranks.mesh is None, parallel.total(1.0)[0]])
        return places

    for rank, places in enumerate(as_ranks(work, tmp_path)):
        assert places == [[0, 1, False, 1], [rank, 2, False, 2], [rank, 2, True, 2]]


@pytest.mark.slow
def test_the_command_trains_stops_and_goes_on_in_a_pipeline(tmp_path):
    """By `torchrun`: the log and the weights of the same command in one process, which never stopped."""
    command = "pretrain.py multitask --rows 4 --length 256 --accumulate 4 --schedule constant"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    staged = [*launch, *command.split(), "--layout.pp", "2", "--out", str(tmp_path / "two")]
    alone = [sys.executable, *command.split(), "--out", str(tmp_path / "one")]
    for words in ([*alone, "--steps", "3"], [*staged, "--steps", "2"], [*staged, "--steps", "3"]):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from" in done.stdout and "pipeline: 2 stages (1f1b)" in done.stdout

    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["loss"] for row in two] == [row["loss"] for row in one]
    whole_run = SailVL.from_pretrained(tmp_path / "one")
    in_two = SailVL.from_pretrained(tmp_path / "two")
    assert all(torch.equal(p, q) for p, q in zip(in_two.parameters(), whole_run.parameters()))


# ------------------------------------------------------------------------------- cuts, and refusals


def test_layers_are_counted_out_by_what_they_cost():
    assert even_cuts([1, 1, 1, 1], 2) == (0, 2, 4)
    assert even_cuts([3, 1, 1, 1], 2) == (0, 1, 4)  # the first has a ViT
    assert even_cuts([9, 1, 1, 1], 3) == (0, 1, 2, 4)  # none is empty
    with torch.device("meta"):
        large = SailVL(PRESETS["SAIL-VL2-30B-A3B"])
    runs = layers_of(large, 8)
    assert [*itertools.chain(*runs)] == [*range(48)]
    assert len(runs[0]) == 1 and {len(run) for run in runs[1:-1]} == {7} and len(runs[-1]) == 5


@pytest.mark.parametrize(
    "layout, changes, message",
    [
        (Layout(pp=5), {}, "--layout.pp 5: the language model has 4 layers, 1f1b wants at least 5"),
        (Layout(pp=3, schedule=TURNS), {}, "interleaved wants at least 6"),
        (Layout(pp=2), {"tie_word_embeddings": True}, "embedding and head of this model are one"),
    ],
)
def test_what_cannot_be_cut_is_refused(layout, changes, message):
    config = small(Case(layout)).config
    with torch.device("meta"):
        model = SailVL(replace(config, text=replace(config.text, **changes)))
    with pytest.raises(ValueError, match=message):
        check_cut(model, layout)


def test_micro_batches_that_a_schedule_cannot_divide_are_refused():
    interleaved = Layout(pp=4, schedule=TURNS)
    for count in (1, 3, 4, 8, 10):
        check_count(count, interleaved)
    with pytest.raises(ValueError, match="--accumulate 8 or 12"):
        check_count(9, interleaved)
    check_count(9, Layout(pp=4))
    assert "ranks wait 50% of the time" in waiting(1, Layout(pp=2))
    assert "ranks wait 20% of the time" in waiting(4, Layout(pp=2))


def test_a_stage_that_fails_says_why_and_its_neighbour_does_not_wait(tmp_path, monkeypatch):
    """What an objective raises in the last stage ends its rank as it is; the other one names that rank."""
    monkeypatch.setattr(parallel, "ROLL_CALL", 0.3)
    case = Case(Layout(pp=2))

    def bad(model, batch, stage):
        raise ValueError("a label out of range")

    def work(ranks):
        ranks = parallel.start(ranks.timeout, case.layout)
        model = shard_model(small(case), ranks)
        train(model, case.stage, rows(case), bad, ranks)

    first, last = as_ranks(work, tmp_path)
    assert last == "ValueError: a label out of range"
    assert first.startswith("ConnectionError: rank 0: rank 1 did not take part in a collective")


def test_a_stage_alone_does_not_answer(tmp_path):
    case = Case(Layout(pp=2))

    def work(ranks):
        ranks = parallel.start(ranks.timeout, case.layout)
        model = shard_model(small(case), ranks)
        batch = next(rows(case))[0]
        model(batch.ids, batch.images)

    for said in as_ranks(work, tmp_path):
        assert said.startswith("ValueError: --layout.pp: one rank of a pipeline holds a part")


def test_rl_in_a_pipeline_is_refused_in_a_line():
    stage = rl.TOY["verifiable"]
    with pytest.raises(
        ValueError, match="--layout.pp 2: a pipeline wants micro-batches of one size"
    ):
        recipe.refuse_in_stages(stage, Layout(pp=2))
    recipe.refuse_in_stages(STAGE, Layout(pp=2))
