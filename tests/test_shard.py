"""Sharded weights, copies, spread experts: on 2 and 4 processes, the losses of one process.

Ranks see the rows of a step that one process sees, one in three without a picture, so that in some
micro-batches one rank has pictures and another has none. All runs of one mesh share one start.
"""

import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import pytest
import torch
from conftest import ROOT, answers
from ranks_helpers import LENGTH, ROWS, SameRows, as_ranks, far, made_up_document, small_run

from data.steps import Batches
from data.world import GRADED, World
from evaluate import evaluate
from infra.run_directory import RunDirectory
from recipe import Setup, fit
from scale import parallel
from scale.layout import AXES, Layout
from scale.parallel import Ranks
from scale.shard import shard_model, whole_weights
from stage import RLStage, Stage
from vlm import PRESETS, SailVL


@dataclass
class Case:
    """One run, how it is laid out (within the mesh of its start), and how near it must be."""

    run: Callable
    layout: dict
    loss: float = 5e-7
    norm: float = 4e-6


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


def doubled(ranks, config, tokenizer, **changes):
    """Two micro-batches a step, of which the first one's gradients wait for the second's."""

    def steps():
        rows = SameRows(tokenizer, ranks)
        while True:
            first = next(rows)
            yield first + next(rows)

    return small_run(ranks, config, tokenizer, data=steps(), **changes)


def pictures_alone(ranks, config, encoder):
    """The ViT's own stage, whose model is the ViT with a head."""
    stage = Stage(
        "image",
        steps=2,
        rows=4,
        length=64,
        objective="next_patch",
        optimizer="adamw",
        precision="fp32",
        mixture={"counting": 1.0},
    )
    model = SailVL(config).init_weights(0)
    torch.manual_seed(0)
    run = fit(Setup(model, encoder, World(), ranks), stage)
    return {
        "loss": [row["loss"] for row in run.log],
        "norm": [row["grad_norm"] for row in run.log],
    }


def stumbling(ranks, config, tokenizer):
    """A loss that is not finite, on one rank in its second step."""
    calls = []

    def objective(model, batch, stage):
        calls.append(batch)
        loss, statistics = answers(model, batch, stage)
        bad = math.nan if len(calls) == 2 and ranks.rank == 0 else 1.0
        return loss * bad, statistics | {"loss": statistics["loss"] * bad}

    return small_run(ranks, config, tokenizer, objective=objective)


def reinforced(ranks, config, encoder, prompts=3, accumulate=4):
    """RL whose completions divide unevenly over ranks and micro-batches: of two ranks one has four
    micro-batches and one has three. With a reference for its KL penalty, replayed experts, and
    answers to some questions at the end."""
    model = SailVL(config).init_weights(0)
    stage = RLStage(
        "rl",
        steps=2,
        prompts=prompts,
        group=3,
        updates=1,
        batch=1,
        accumulate=accumulate,
        dynamic=False,
        optimizer="adamw",
        lr=1e-3,
        schedule="constant",
        max_new=6,
        overlong=2,
        reward="random",
        algorithm="dapo",
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
        "the language model alone": Case(partial(moe, accumulate=2, trains=("llm",)), spread),
        "a crowd": Case(partial(crowded, config=moe_config, tokenizer=tokenizer), spread),
    }


def cases_on_four(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    moe = partial(small_run, config=moe_config, tokenizer=tokenizer)
    two = partial(doubled, config=moe_config, tokenizer=tokenizer)
    return {
        "copies of spread experts": Case(partial(moe, recompute=True), {"ep": 2}),
        "two micro-batches": Case(two, {"ep": 2}),
        "two micro-batches, summed at the end": Case(two, {"ep": 2, "zero": 1}),
    }


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
        "pictures alone": Case(partial(pictures_alone, config=config, encoder=encoder), {}),
        "tied": Case(partial(small_run, config=tied, tokenizer=tokenizer), {}),
        "matrices by Muon": Case(partial(moe, optimizer="muon"), spread, 1e-5, 2e-5),
        "experts, offload": Case(moe, spread | {"offload": True}),
        "rl of experts": Case(
            partial(reinforced, config=moe_config, encoder=encoder), spread, norm=2e-5
        ),
    }
    for parts in (("adapter",), ("vision", "adapter")):
        some[f"{parts} alone"] = Case(partial(moe, accumulate=2, trains=parts), spread)
    return some


def more_on_four(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    dense = partial(small_run, config=config, tokenizer=tokenizer)
    moe = partial(small_run, config=moe_config, tokenizer=tokenizer)
    some = {
        "zero 3 on four": Case(dense, {}),
        "ep 2 x shard 2": Case(moe, {"ep": 2}),
        "fewer experts than ranks": Case(
            partial(small_run, config=few(moe_config, 2), tokenizer=tokenizer), {"ep": 2}
        ),
        "rl": Case(
            partial(reinforced, config=config, encoder=encoder, prompts=5, accumulate=3),
            {},
            norm=2e-5,
        ),
    }
    for parts in (("adapter",), ("llm",), ("vision", "adapter")):
        some[f"{parts} alone"] = Case(partial(moe, trains=parts), {"ep": 2})
    return some


def exact_on_two(config, moe_config, tokenizer, encoder) -> dict[str, Case]:
    exact = partial(small_run, tokenizer=tokenizer, dtype=torch.float64)
    back = {"adalrs": True, "adalrs_k": 3, "adalrs_window": (0.0, 0.9), "steps": 12, "lr": 0.02}
    return {
        "doubles": Case(partial(exact, config=config), {}, 1e-12, 1e-12),
        "doubles, spread": Case(partial(exact, config=moe_config), {"ep": 2}, 1e-12, 1e-12),
        "steps taken back": Case(partial(exact, config=config, **back), {}, 1e-12, 1e-12),
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
                assert far(found[name], expected, "loss") < case.loss, (rank, name)
                assert far(found[name], expected, "norm") < case.norm, (rank, name)
                for same in ("skipped", "actions", "said"):
                    assert found[name].get(same) == expected.get(same), (rank, name)
                if expected.get("balance"):
                    assert far(found[name], expected, "balance") < case.loss, (rank, name)

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


# ---------------------------------------------------------------- what a user meets, and what is cut


def test_a_layout_that_does_not_fit_is_one_sentence():
    for wrong, words in (
        (
            Layout(shard=3),
            "1 stages x 1 copies x 3 shards are 3 ranks, but there are 4: start 3 or 6",
        ),
        (Layout(copies=2, shard=4), "are 8 ranks, but there are 4: start 8, or change"),
        (Layout(ep=2), "--layout.ep 2 does not divide --layout.shard 1"),
        (Layout(pp=0), "--layout.pp 0: at least 1"),
        (Layout(copies=-1), "--layout.copies -1"),
        (Layout(zero=4), "--layout.zero 4: choose 1, 2 or 3"),
        (Layout(schedule="x"), "--layout.schedule x: choose from gpipe"),
        (Layout(schedule="gpipe"), "--layout.schedule gpipe: it needs --layout.pp"),
        (Layout(zero=2), "--layout.zero 2: it needs --layout.shard"),
        (
            Layout(pp=2, shard=2, zero=1),
            "--layout.zero 1: it needs --layout.shard, and no --layout.pp",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            wrong.fitted(4)
    assert Layout().fitted(4).copies == 4
    assert Layout(shard=2).fitted(8).copies == 4


def test_one_process_without_a_launcher_has_no_shards(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="3 ranks, but there are 1"):
        parallel.start(5.0, Layout(shard=3))
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 1"):
        parallel.start(5.0, Layout(half=True))


def test_what_a_layout_of_two_ranks_does(tmp_path, config, moe_config, tokenizer):
    """Parts are parts, groups keep the timeout, bf16 weights leave routers and masters in fp32."""

    def work(ranks):
        said = {}
        groups = [ranks.mesh[axis].get_group() for axis in AXES]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        said["patience"] = [backend.options._timeout.total_seconds() for backend in backends]

        model = shard_model(SailVL(moe_config).init_weights(0), ranks)
        said["again"] = shard_model(model, ranks) is model
        held = sum(parallel.local(p).numel() for p in model.parameters())
        said["held"] = held / sum(p.numel() for p in model.parameters())

        # bf16 on the way: close to autocast's own result, routers and masters in full precision
        half = replace(ranks, layout=replace(ranks.layout, half=True))
        model = SailVL(moe_config).init_weights(0)
        seen = []
        gate = model.language_model.model.layers[0].mlp.gate
        gate.register_forward_hook(lambda module, x, y: seen.append(str(module.weight.dtype)))
        said["half"] = small_run(half, moe_config, tokenizer, model=model, precision="bf16")["loss"]
        said["router"] = sorted(set(seen))
        said["masters"] = sorted({str(p.dtype) for p in model.parameters()})

        # what cannot be
        said["dense"] = refusal(lambda: shard_model(SailVL(config), ranks))
        said["odd"] = refusal(lambda: shard_model(SailVL(few(moe_config, 3)), ranks))
        uneven = iter([next(SameRows(tokenizer, ranks)) * (1 + ranks.rank)])
        said["uneven"] = refusal(lambda: small_run(ranks, moe_config, tokenizer, data=uneven))
        return said

    autocast = small_run(Ranks(), moe_config, tokenizer, precision="bf16")["loss"]
    for said in as_ranks(work, tmp_path, 2, 50.0, Layout(shard=2, ep=2)):
        assert isinstance(said, dict), said
        assert said["patience"] == [50.0] * len(AXES)
        assert said["again"] and 0.45 < said["held"] < 0.55
        assert max(abs(a - b) / b for a, b in zip(said["half"], autocast)) < 2e-3
        assert said["router"] == said["masters"] == ["torch.float32"]
        assert said["dense"] == "--layout.ep 2: the model has no experts"
        assert said["odd"] == "--layout.ep 2 does not divide the model's 3 experts"
        assert said["uneven"].startswith("the ranks have 1, 2 micro-batches in this step")


@pytest.mark.slow
def test_a_check_of_the_image_stage_runs_on_a_whole_copy(tmp_path, config, encoder):
    """Its ViT is sharded inside the predictor, and the model around it is not."""
    own = replace(encoder, config=config)
    samples = World().held_out("counting", 3)
    stage = Stage(
        "image", ("vision",), {"caption": 1.0}, steps=1, rows=2, objective="next_patch", turns=1
    )

    def work(ranks):
        setup = Setup(SailVL(config).init_weights(0), own, World(), ranks)
        said = []

        def check(step):
            with whole_weights(setup.model, ranks) as plain:
                said.extend(answer.said for answer in evaluate(plain, own, samples, max_new=3)[1])
            return {}

        setup.directory = RunDirectory(tmp_path / "run", check=check, check_every=1)
        fit(setup, stage)
        return said

    first, second = as_ranks(work, tmp_path, layout=Layout(shard=2))
    assert first == second and len(first) == 3


def refusal(work) -> str:
    with pytest.raises(ValueError) as caught:
        work()
    return str(caught.value)


def few(config, experts: int):
    return replace(config, text=replace(config.text, num_experts=experts))


def test_of_sharded_weights_a_rank_that_dies_is_named_and_other_errors_are_their_own(
    tmp_path, config, tokenizer, monkeypatch
):
    monkeypatch.setattr(parallel, "ROLL_CALL", 0.3)

    def work(ranks):
        def stumble(model, batch, stage):
            raise RuntimeError("my own reason")

        with pytest.raises(RuntimeError, match="my own reason"):
            small_run(ranks, config, tokenizer, objective=stumble)

        def die(model, batch, stage):
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return answers(model, batch, stage)

        small_run(ranks, config, tokenizer, objective=die)

    first, second = as_ranks(work, tmp_path, 2, 20.0, Layout(shard=2))
    assert second == -signal.SIGKILL
    assert first.startswith("ConnectionError: rank 0: rank 1 did not take part in a collective")


INTERPRETED = """
import sys
sys.path[:0] = ["tests"]
from dataclasses import replace
from pathlib import Path
import moe
from conftest import THINK, world
from kernels.moe_triton import expert_mixture_triton
from ranks_helpers import as_ranks, far, small_run
from scale.layout import AXES, Layout
from scale.parallel import Ranks
from tokenizer import Tokenizer, train_bpe
from vlm import PRESETS

tokenizer = Tokenizer(train_bpe(world.corpus(300), 300), "", THINK)
c = PRESETS["toy-moe"]
text = replace(c.text, vocab_size=640, num_hidden_layers=1, hidden_size=64, num_attention_heads=2,
               num_key_value_heads=1, moe_intermediate_size=32, intermediate_size=32, num_experts=4)
vision = replace(c.vision, num_hidden_layers=1)
c = replace(c, text=text, vision=vision, image_token_id=tokenizer.image)
plain = small_run(Ranks(), c, tokenizer, steps=1)
calls = []

def kernels(x, indices, gate_up, down):
    calls.append(len(x))
    return expert_mixture_triton if len(x) else moe.expert_mixture

moe.choose_path = kernels

def work(ranks):
    found = small_run(ranks, c, tokenizer, steps=1)
    assert calls
    return found

for said in as_ranks(work, Path(sys.argv[1]), 2, 400.0, Layout(shard=2, ep=2)):
    assert isinstance(said, dict), said
    print(far(said, plain, "loss"), far(said, plain, "norm"))
"""


@pytest.mark.slow
def test_the_kernels_compute_for_spread_and_sharded_experts(tmp_path):
    """Triton's interpreter in the place of a GPU: on both ranks, the plain definition's losses."""
    pytest.importorskip("triton", reason="pip install --no-deps triton (Linux)")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = [float(word) for word in done.stdout.split()]
    assert len(differences) == 4 and max(differences) < 4e-6
