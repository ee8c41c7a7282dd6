"""Sharded weights, copies, spread experts: on 2 and 4 processes, the losses of one process.

Ranks see the rows of a step that one process sees, one in three without a picture, so that in some
micro-batches one rank has pictures and another has none. All runs of one mesh share one start.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import pytest
import torch
from conftest import answers
from ranks_helpers import LENGTH, ROWS, as_ranks, far, made_up_document, small_run

from data.world import GRADED, World
from evaluate import evaluate
from packing import Batches
from recipe import Setup, fit
from scale import parallel
from scale.layout import Layout
from scale.parallel import Ranks
from scale.shard import whole_weights
from stage import RLStage
from vlm import PRESETS, SailVL


@dataclass
class Case:
    """One run, and how it is laid out (within the mesh of its start)."""

    run: Callable
    layout: dict
    norm: float = 4e-6  # tolerance; of the loss: 5e-7


@pytest.fixture(scope="module")
def moe_config(config):
    text = PRESETS["toy-moe"].text
    return replace(config, text=replace(text, vocab_size=448, num_hidden_layers=2))


# ------------------------------------------------------------------------ runs beside the usual one


def crowded(ranks, config, tokenizer):
    """All tokens of all ranks want the first two experts: the other ranks' get none."""
    model = SailVL(config).init_weights(0)
    for block in model.language_model.model.layers:
        block.mlp.bias = torch.zeros(config.text.num_experts)
        block.mlp.bias[:2] = 100.0
    return small_run(ranks, config, tokenizer, model=model)


def ending(ranks, config, tokenizer):
    """Nine rows of data for steps of four: at the end some ranks have no row."""
    documents = [made_up_document(tokenizer, 0, number) for number in range(9)]
    data = Batches(iter(documents), LENGTH, ROWS, 1, tokenizer.pad, ranks.rank, ranks.size)
    return small_run(ranks, config, tokenizer, data=data, steps=10)


def stumbling(ranks, config, tokenizer):
    """A loss that is not finite, on one rank in its second step."""
    calls = []

    def objective(model, batch, stage):
        calls.append(batch)
        loss, statistics = answers(model, batch, stage)
        bad = math.nan if len(calls) == 2 and ranks.rank == 0 else 1.0
        return loss * bad, statistics | {"loss": statistics["loss"] * bad}

    return small_run(ranks, config, tokenizer, objective=objective)


def reinforced(ranks, config, encoder):
    """RL: nine completions a step in micro-batches of one or two, so that ranks have three or four;
    with a reference for its KL penalty, and answers to some questions at the end."""
    model = SailVL(config).init_weights(0)
    stage = RLStage(
        "rl",
        steps=2,
        prompts=3,
        group=3,
        updates=1,
        batch=1,
        accumulate=4,
        dynamic=False,
        optimizer="adamw",
        lr=1e-3,
        schedule="constant",
        max_new=6,
        overlong=2,
        reward="random",
        precision="fp32",
        kl=0.1,
        balance=0.0,
        replay=bool(config.text.num_experts),
        mixture={"counting": 1.0, "text": 1.0},
    )
    encoder = replace(encoder, config=config)
    run = fit(Setup(model, encoder, World(), ranks), stage)

    questions = World().held_out(GRADED[0], 3)
    with whole_weights(model, ranks) as plain:
        _, graded = evaluate(plain, encoder, questions, max_new=4)
    return {
        "loss": [row["loss"] for row in run.log],
        "norm": [row["grad_norm"] for row in run.log],
        "said": [one.said for one in graded],
    }


# ----------------------------------------------------------------------------------- the cases


def cases_on_two(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    dense = partial(small_run, config=config, tokenizer=tokenizer)
    moe = partial(small_run, config=moe_config, tokenizer=tokenizer)
    spread = {"ep": 2}
    return {
        "zero 2, rows one by one, recomputed": Case(
            partial(dense, accumulate=2, recompute=True), {"zero": 2}
        ),
        "data that ends": Case(partial(ending, config=config, tokenizer=tokenizer), {}),
        "a skipped step": Case(partial(stumbling, config=config, tokenizer=tokenizer), {}),
        "rl": Case(partial(reinforced, config=config, encoder=encoder), {}, norm=2e-5),
        "experts whole, recomputed": Case(partial(moe, recompute=True), {}),
        "experts spread": Case(moe, spread),
        "the adapter alone": Case(partial(moe, accumulate=2, trains=("adapter",)), spread),
        "a crowd": Case(partial(crowded, config=moe_config, tokenizer=tokenizer), spread),
    }


def cases_on_four(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    moe = partial(small_run, config=moe_config, tokenizer=tokenizer)
    return {"copies of spread experts": Case(partial(moe, recompute=True), {"ep": 2})}


def more_on_two(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    dense = partial(small_run, config=config, tokenizer=tokenizer)
    moe = partial(small_run, config=moe_config, tokenizer=tokenizer)
    tied = replace(config, text=replace(config.text, tie_word_embeddings=True))
    spread = {"ep": 2}
    some = {
        "zero 3": Case(dense, {}),
        "zero 2": Case(dense, {"zero": 2}),
        "zero 3, rows one by one": Case(partial(dense, accumulate=2), {}),
        "zero 1, rows one by one": Case(partial(dense, accumulate=2), {"zero": 1}),
        "offload": Case(dense, {"offload": True}),
        "tied": Case(partial(small_run, config=tied, tokenizer=tokenizer), {}),
        "matrices by Muon": Case(partial(moe, optimizer="muon"), spread, norm=2e-5),
        "experts, offload": Case(moe, spread | {"offload": True}),
        "rl of experts": Case(
            partial(reinforced, config=moe_config, encoder=encoder), spread, norm=2e-5
        ),
    }
    for parts in (("llm",), ("vision", "adapter")):
        some[f"{parts} alone"] = Case(partial(moe, accumulate=2, trains=parts), spread)
    return some


def more_on_four(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    dense = partial(small_run, config=config, tokenizer=tokenizer)
    moe = partial(small_run, config=moe_config, tokenizer=tokenizer)
    few = replace(moe_config, text=replace(moe_config.text, num_experts=2))
    some = {
        "zero 3 on four": Case(dense, {}),
        "ep 2 x shard 2": Case(moe, {"ep": 2}),
        "fewer experts than ranks": Case(
            partial(small_run, config=few, tokenizer=tokenizer), {"ep": 2}
        ),
        "rl": Case(partial(reinforced, config=config, encoder=encoder), {}, norm=2e-5),
    }
    for parts in (("adapter",), ("llm",), ("vision", "adapter")):
        some[f"{parts} alone"] = Case(partial(moe, trains=parts), {"ep": 2})
    return some


def exact_on_two(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    exact = partial(small_run, tokenizer=tokenizer, dtype=torch.float64)
    back = {"adalrs": True, "adalrs_k": 3, "adalrs_window": (0.0, 0.9), "steps": 12, "lr": 0.02}
    return {
        "doubles": Case(partial(exact, config=config), {}, 1e-12),
        "doubles, spread": Case(partial(exact, config=moe_config), {"ep": 2}, 1e-12),
        "steps taken back": Case(partial(exact, config=config, **back), {}, 1e-12),
    }


def run_all(cases: dict[str, Case], ranks: Ranks) -> dict[str, dict]:
    return {
        name: case.run(replace(ranks, layout=replace(ranks.layout, **case.layout)))
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def compare(config, moe_config, tokenizer, encoder, tmp_path_factory):
    """compare(cases, size, layout): all of them on ranks and in one process, and their differences."""

    def compare(make, size: int, layout: Layout) -> None:
        cases = make(config, moe_config, tokenizer, encoder)

        def work(ranks):
            found = run_all(
                {n: replace(c, layout={"ep": 1} | c.layout) for n, c in cases.items()}, ranks
            )
            parallel.stop()
            return found

        said = as_ranks(work, tmp_path_factory.mktemp("said"), size, 60.0, layout)
        alone = run_all({n: replace(c, layout={}) for n, c in cases.items()}, Ranks())
        for rank, found in enumerate(said):
            assert isinstance(found, dict), found
            for name, case in cases.items():
                expected = alone[name]
                loss = 5e-7 if case.norm > 1e-9 else case.norm
                assert far(found[name], expected, "loss") < loss, (rank, name)
                assert far(found[name], expected, "norm") < case.norm, (rank, name)
                for same in ("skipped", "actions", "said"):
                    assert found[name].get(same) == expected.get(same), (rank, name)
                if expected.get("balance"):
                    assert far(found[name], expected, "balance") < loss, (rank, name)

    return compare


def test_two_ranks_are_one_process(compare):
    compare(cases_on_two, 2, Layout(shard=2, ep=2))


def test_copies_of_spread_experts_are_one_process(compare):
    compare(cases_on_four, 4, Layout(copies=2, shard=2, ep=2))


@pytest.mark.slow
def test_more_layouts_of_two_ranks(compare):
    compare(more_on_two, 2, Layout(shard=2, ep=2))


@pytest.mark.slow
def test_layouts_of_four_ranks(compare):
    compare(more_on_four, 4, Layout(shard=4, ep=2))


@pytest.mark.slow
def test_experts_on_every_rank_of_four(compare):
    def make(config, moe_config, tokenizer, encoder):
        crowd = partial(crowded, config=moe_config, tokenizer=tokenizer)
        moe = partial(small_run, config=moe_config, tokenizer=tokenizer)
        return {"ep 4": Case(moe, {"ep": 4}), "a crowd": Case(crowd, {"ep": 4})}

    compare(make, 4, Layout(shard=4, ep=4))


@pytest.mark.slow
def test_in_doubles_two_ranks_are_one_process_to_the_last_digits(compare):
    compare(exact_on_two, 2, Layout(shard=2, ep=2))
