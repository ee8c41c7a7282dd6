"""RL and evaluation on a sharded policy: what one process learns, two learn, however the model lies on them.

Three questions for two ranks, one call of `generate` each: one rank makes two calls and the other one, so
that ranks which share experts need each other at different times.
"""

import os
import signal
from dataclasses import replace

import pytest
import torch
from ranks_helpers import as_ranks

from attention import Segments, attend_inside
from data import world
from evaluate import evaluate
from infra.checkpoint import checkpoints
from infra.run_directory import RunDirectory
from infra.stopping import StopRequested
from recipe import Setup, fit
from scale.experts import Rounds, catch_up
from scale.layout import Layout
from scale.parallel import Ranks, local
from scale.shard import shard_model, whole_weights
from stage import RLStage, Stage
from vlm import PRESETS, SailVL

STAGE = RLStage(
    "rl",
    mixture={"counting": 1.0},
    algorithm="grpo",
    reward="random",
    steps=4,
    prompts=3,
    group=3,
    updates=3,
    passes=2,
    batch=1,
    at_once=2,
    dynamic=False,
    turns=1,
    max_new=6,
    overlong=0,
    kl=0.1,
    balance=0.0,
    optimizer="adamw",
    schedule="constant",
    lr=1e-3,
    precision="fp32",
)


@pytest.fixture
def sparse(config):
    text = replace(PRESETS["toy-moe"].text, vocab_size=448, num_hidden_layers=2, num_experts=4)
    return replace(config, text=text)


def learned(config, encoder, ranks: Ranks, stage: RLStage = STAGE) -> dict:
    """Losses of a few updates, and what the policy then says to three questions."""
    encoder = replace(encoder, config=config)
    model = SailVL(config).init_weights(0)
    run = fit(Setup(model, encoder, world.World(), ranks), stage)
    samples = world.World().held_out("counting", 3)
    with whole_weights(model, ranks) as plain:
        _, graded = evaluate(plain, encoder, samples, max_new=3)
        stacked = [p for name, p in plain.named_parameters() if name.endswith("gate_up_proj")]
        experts = len(local(stacked[0])) if stacked else 0
    return {
        "losses": [row["loss"] for row in run.log],
        "norms": [row["grad_norm"] for row in run.log],
        "said": [g.said for g in graded],
        "experts": experts,
    }


def alike(one: dict, other: dict) -> None:
    assert one["losses"] == pytest.approx(other["losses"], abs=2e-6)
    assert one["norms"] == pytest.approx(other["norms"], rel=2e-4)
    assert one["said"] == other["said"]


def test_rl_with_experts_on_two_ranks_learns_what_one_process_learns(tmp_path, sparse, encoder):
    """The copy that samples has half of the experts on each rank, and the ranks keep each other company."""
    alone = learned(sparse, encoder, Ranks())

    def work(ranks):
        return learned(sparse, encoder, ranks)

    for said in as_ranks(work, tmp_path, 2, 60.0, Layout(shard=2, ep=2)):
        assert isinstance(said, dict), said
        alike(said, alone)
        assert said["experts"] == 2 and alone["experts"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_rl_on_sharded_weights_learns_what_one_process_learns(tmp_path, config, encoder, zero):
    alone = learned(config, encoder, Ranks())

    def work(ranks):
        return learned(config, encoder, ranks)

    for said in as_ranks(work, tmp_path, 2, 60.0, Layout(shard=2, zero=zero)):
        assert isinstance(said, dict), said
        alike(said, alone)


@pytest.mark.slow
def test_replayed_routing_survives_experts_elsewhere(tmp_path, sparse, encoder):
    stage = replace(STAGE, replay=True)
    alone = learned(sparse, encoder, Ranks(), stage)

    def work(ranks):
        return learned(sparse, encoder, ranks, stage)

    for said in as_ranks(work, tmp_path, 2, 60.0, Layout(shard=2, ep=2)):
        assert isinstance(said, dict), said
        alike(said, alone)


@pytest.mark.slow
def test_samples_are_scored_again_in_parts_that_ranks_have_unequal_numbers_of(
    tmp_path, config, encoder
):
    """In bf16, nine completions: four in two parts, five in three. The reference is sharded too."""
    stage = replace(STAGE, precision="bf16", updates=2, accumulate=3)

    def work(ranks):
        return learned(config, encoder, ranks, stage)

    one, other = as_ranks(work, tmp_path, 2, 30.0, Layout(shard=2))
    assert isinstance(one, dict) and one["losses"] == other["losses"], (one, other)


@pytest.mark.slow
def test_told_to_stop_in_a_check_ranks_that_share_experts_end_it_and_save(
    tmp_path, sparse, encoder
):
    """Rank 0 has the one sample; rank 1, which is told, keeps it company all the same."""
    own = replace(encoder, config=sparse)
    samples = world.World().held_out("counting", 1)
    stage = Stage("s", mixture={"counting": 1.0}, steps=4, rows=2, length=256, turns=1)

    def work(ranks):
        setup = Setup(SailVL(sparse).init_weights(0), own, world.World(), ranks)

        def check(step):
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            with whole_weights(setup.model, ranks) as plain:
                scores, _ = evaluate(plain, own, samples, max_new=3)
            return {"score": 1 - scores["overall"].accuracy}

        setup.directory = RunDirectory(tmp_path / "run", check=check, check_every=2)
        fit(setup, stage)

    assert as_ranks(work, tmp_path, 2, 30.0, Layout(shard=2, ep=2)) == [143, 143]
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [2]


@pytest.mark.slow
def test_without_company_the_rank_that_goes_on_waits_in_vain(
    tmp_path, sparse, encoder, monkeypatch
):
    """The defect that `catch_up` mends: no answer within the timeout, on either rank."""
    monkeypatch.setattr("scale.parallel.ROLL_CALL", 0.3)
    monkeypatch.setattr(Rounds, "catch_up", lambda self, each: None)

    def work(ranks):
        return learned(sparse, encoder, ranks)

    said = as_ranks(work, tmp_path, 2, 5.0, Layout(shard=2, ep=2))
    assert all("Error: " in text for text in said), said


def test_the_company_is_kept_until_the_last_rank_has_ended(tmp_path, sparse):
    """Passes of different numbers and lengths; then one rank is told to stop, and the other goes on."""

    def passes(llm, lengths: list[int]) -> list[float]:
        met = []
        for length in lengths:
            tokens = torch.arange(length)
            alone = attend_inside(Segments.of([length]), causal=True)
            hidden = llm(llm.embed(tokens), tokens, alone)
            met.append(float(hidden.square().mean()))
        return met

    def work(ranks):
        model = shard_model(SailVL(sparse).init_weights(0), ranks)
        with whole_weights(model, ranks) as plain, torch.no_grad():
            met = passes(plain.language_model, [3, 1, 5, 2, 2][: 5 if ranks.rank else 2])
            catch_up(plain, lambda: met.append(-1.0))
        try:
            with whole_weights(model, ranks) as plain, torch.no_grad():
                if ranks.rank == 0:
                    raise StopRequested()
                met += passes(plain.language_model, [4, 4])
        except StopRequested:
            met.append(-2.0)
        return met

    first, second = as_ranks(work, tmp_path, 2, 30.0, Layout(shard=2, ep=2))
    assert first[:2] == pytest.approx(second[:2]) and first[2:] == [-1.0, -1.0, -1.0, -2.0]
    assert len(second) == 7 and min(second) > 0
