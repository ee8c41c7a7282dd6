"""The loop: golden losses, frozen parts in every stage, what the log holds, memory against speed,
rates per part.

`PYTHONPATH=. python tests/test_train.py` writes the golden losses again: do it when numbers are
meant to change, and say why in the commit.
"""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import EVERY, SHARED, answers, made_up

import pretrain
import recipe
import rl
import sft
import train as loop
from data.world import corpus, sample
from infra.keeper import get_rng, set_rng
from infra.run_directory import RunDirectory
from objective import loss_by_task, mean_by_task
from packing import collate
from recipe import THINK
from scale import parallel
from stage import PARTS, Stage
from tokenizer import Tokenizer, train_bpe
from train import train
from vlm import PRESETS, SailVL

GOLDEN = Path(__file__).with_name("golden.json")
STAGES = {
    s.name + " " + "+".join(s.trains): s
    for script in (pretrain, sft, rl)
    for table in script.RECIPES.values()
    for s in table.values()
}
TINY = Stage("x", steps=3, rows=2, length=128, lr=3e-3)


def golden(config, tokenizer) -> dict[str, list[float]]:
    """Fifty steps under each optimizer: dense under Muon, experts under AdamW. Independent of the
    toy world."""
    text = replace(PRESETS["toy-moe"].text, vocab_size=config.text.vocab_size, num_hidden_layers=2)
    losses = {}
    for name, c, stage in (
        ("dense, muon", config, Stage(steps=50, rows=2, length=128, lr=3e-3, schedule="wsd")),
        (
            "moe, adamw",
            replace(config, text=text),
            Stage(steps=50, rows=2, length=128, lr=1e-3, optimizer="adamw"),
        ),
    ):
        run = train(SailVL(c).init_weights(0), stage, made_up(tokenizer), answers)
        losses[name] = [round(row["loss"], 6) for row in run.log]
    return losses


def test_the_losses_are_the_golden_ones(config, tokenizer):
    """At every step within 1e-4. Other processors round differently: with AVX2 or none instead of
    AVX-512 the losses differ by 4e-6. (With Newton-Schulz in bf16 it was 4e-4.)"""
    want, found = json.loads(GOLDEN.read_text()), golden(config, tokenizer)
    for name in want:
        assert found[name] == pytest.approx(want[name], rel=1e-4), name
        assert want[name][-1] < 0.5 * want[name][0]


@pytest.mark.parametrize("name", STAGES)
def test_in_every_stage_what_is_frozen_stays_and_holds_no_optimizer_state(
    config, tokenizer, name, monkeypatch
):
    made, make = [], loop.make_optimizers
    monkeypatch.setattr(loop, "make_optimizers", lambda *a: made.append(make(*a)) or made[-1])
    recipe, model = STAGES[name], SailVL(config).init_weights(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage = replace(TINY, trains=recipe.trains, optimizer=recipe.optimizer, steps=1)
    train(model, stage, made_up(tokenizer), answers)
    parts = {PARTS[p] for p in recipe.trains}
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[0] for k in changed} == parts
    held = sum(
        t.nbytes
        for o in made[0]
        for s in o.state.values()
        for t in s.values()
        if torch.is_tensor(t)
    )
    trained = [p for n, p in model.named_parameters() if n.split(".")[0] in parts]
    assert {id(p) for o in made[0] for p in o.state} == {id(p) for p in trained}
    assert held <= 2 * sum(p.nbytes for p in trained) + 8 * len(trained)
    assert all(p.grad is None for p in model.parameters())


def test_paper_scale_stages_see_the_published_tokens():
    tokens = {name: s.steps * s.rows * s.length for name, s in pretrain.PAPER.items()}
    assert tokens["basic"] == pytest.approx(128e9, rel=1e-3) and tokens[
        "multitask"
    ] == pytest.approx(360e9, rel=1e-3)
    assert sum(n for name, n in tokens.items() if name.startswith("vit")) == pytest.approx(
        121e9, rel=0.03
    )
    assert [s.name for s in pretrain.PAPER.values() if s.adalrs] == ["basic"]


@pytest.mark.skipif(not (SHARED / "released").is_dir(), reason="the released files are not here")
def test_every_paper_scale_stage_trains_from_a_checkpoint_in_the_released_layout(
    tmp_path, monkeypatch, capsys
):
    shutil.copytree(SHARED / "released" / "tiny", start := tmp_path / "start")
    Tokenizer(train_bpe(corpus(200), 280), "", THINK).save(start)
    data = [
        {
            "task": task,
            "conversations": [
                {"from": "human", "value": "what is one?"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for task in ("caption", "caption", "math")
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    for name, stage in pretrain.PAPER.items():
        words = (
            f"paper:{name} --model {start} --data {tmp_path}/my.jsonl --out {tmp_path}/{name} "
            "--steps 2 --rows 2 --length 64"
        )
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words.split()])
        recipe.run_command(pretrain.PretrainOptions, pretrain.RECIPES)
        assert "saved by what is frozen" in capsys.readouterr().out
        used = json.loads((tmp_path / name / "stage.json").read_text())
        assert used == json.loads(json.dumps(asdict(replace(stage, steps=2, rows=2, length=64))))
        old, new = (
            SailVL.from_pretrained(start).state_dict(),
            SailVL.from_pretrained(tmp_path / name).state_dict(),
        )
        for k, v in new.items():
            assert k.split(".")[0] in {PARTS[p] for p in stage.trains} or torch.equal(v, old[k])
        start = tmp_path / name


def test_recomputing_activations_changes_no_loss(config, tokenizer):
    text = replace(PRESETS["toy-moe"].text, vocab_size=config.text.vocab_size, num_hidden_layers=2)
    for c in (config, replace(config, text=text)):
        losses = [
            [
                r["loss"]
                for r in train(
                    SailVL(c).init_weights(0),
                    replace(TINY, recompute=again),
                    made_up(tokenizer),
                    answers,
                ).log
            ]
            for again in (False, True)
        ]
        assert losses[0] == losses[1]


def test_recomputing_activations_keeps_fewer_of_them(config, tokenizer):
    def kept(again: bool) -> int:
        model, total = SailVL(config).init_weights(0), 0
        loop.prepare_blocks(model, replace(TINY, recompute=again))

        def pack(t):
            nonlocal total
            total += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            answers(model, next(made_up(tokenizer))[0])
        return total

    assert kept(True) < 0.6 * kept(False)


def test_bf16_trains_fp32_weights_to_about_the_same_loss(config, tokenizer):
    runs = {}
    for precision in ("fp32", "bf16"):
        model = SailVL(config).init_weights(0)
        runs[precision] = train(
            model, replace(TINY, steps=6, precision=precision), made_up(tokenizer), answers
        ).tail(share=0.3)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert runs["bf16"] == pytest.approx(runs["fp32"], rel=0.02) and runs["bf16"] != runs["fp32"]


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_losses(config, tokenizer):
    """Traced, not translated to C++: whatever breaks the graphs' arguments (names, attention,
    recomputation) shows."""
    torch.compiler.set_default_backend("aot_eager")
    try:
        runs = [
            train(
                SailVL(config).init_weights(0),
                replace(TINY, steps=2, compile=c),
                made_up(tokenizer),
                answers,
            ).log
            for c in (False, True)
        ]
    finally:
        torch.compiler.set_default_backend("inductor")
        torch.compiler.reset()
    assert [r["loss"] for r in runs[1]] == pytest.approx([r["loss"] for r in runs[0]], rel=1e-4)


@pytest.mark.parametrize("bad, ends", [({1}, 0), ({2}, 0), ({1, 3}, 0), ({1, 2}, 2), ({3, 4}, 4)])
def test_bad_steps_are_skipped_and_so_many_in_a_row_end_the_run(config, tokenizer, bad, ends):
    seen = []

    def objective(model, batch, stage):
        loss, stats = answers(model, batch)
        seen.append(1)
        return (loss * float("nan") if len(seen) in bad else loss), stats

    def run():
        model = SailVL(config).init_weights(0)
        return train(model, replace(TINY, steps=4), made_up(tokenizer), objective, patience=2)

    if ends:
        with pytest.raises(ValueError, match="2 steps in a row with a non-finite"):
            run()
        assert len(seen) == ends
    else:
        found = run()
        assert {n for n, row in enumerate(found.log, 1) if row["skipped"]} == bad
        assert found.skipped == len(bad)


def test_data_that_ends_early_ends_the_stage_well_but_not_before_its_first_step(
    config, tokenizer, capsys
):
    def run(steps: int):
        source = made_up(tokenizer)
        data = (next(source) for _ in range(steps))
        return train(SailVL(config).init_weights(0), replace(TINY, steps=4), data, answers)

    found = run(2)
    assert found.ended_early and len(found.log) == 2
    assert "the data ended at step 2 of 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the data ended before the first step"):
        run(0)


def test_a_precision_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="--precision fp8: choose auto, fp32 or bf16"):
        loop.autocast(replace(TINY, precision="fp8"), "cpu")


def test_a_run_that_has_not_begun_is_empty_and_its_tail_is_its_last_tenth():
    empty = loop.Run()
    assert (empty.log, empty.decisions, empty.skipped, empty.seconds) == ([], [], 0, 0.0)
    assert not empty.ended_early
    run = loop.Run([{"loss": float(n)} for n in range(30)])
    assert run.tail() == 28.0 and run.tail(share=0.5) == 22.0 and run.tail(share=0.0) == 29.0


def test_a_part_trains_at_its_own_rate(config, tokenizer):
    moved = {}
    for scale in (1.0, 0.1, 0.0):
        model = SailVL(config).init_weights(0)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        train(
            model,
            replace(TINY, steps=1, warmup=0.0, optimizer="adamw", lr_scale={"vision": scale}),
            made_up(tokenizer),
            answers,
        )
        moved[scale] = {
            part: max(
                float((v - before[k]).abs().max())
                for k, v in model.state_dict().items()
                if k.startswith(module)
            )
            for part, module in PARTS.items()
        }
    assert moved[0.0]["vision"] == 0 and moved[0.1]["vision"] == pytest.approx(
        0.1 * moved[1.0]["vision"], rel=1e-2
    )
    assert moved[0.0]["llm"] == moved[1.0]["llm"] > 0
    with pytest.raises(ValueError, match="unknown part 'tail'"):
        loop.make_optimizers(model, replace(TINY, lr_scale={"tail": 2.0}))


def test_only_matrices_decay(config):
    model = SailVL(config)
    for optimizer in ("muon", "adamw"):
        for o in loop.make_optimizers(model, replace(TINY, optimizer=optimizer, weight_decay=0.1)):
            for g in o.param_groups:
                assert {p.ndim >= 2 for p in g["params"]} == {g["weight_decay"] == 0.1}


def test_a_log_line_says_what_each_part_and_task_did(model, tokenizer, tmp_path):
    run = train(model, TINY, made_up(tokenizer), answers, directory=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == run.log and len(rows) == 3
    for row in rows:
        assert row["grad_norm"] == pytest.approx(
            sum(n * n for n in row["grad_norms"].values()) ** 0.5, rel=1e-5
        )
        assert set(row["grad_norms"]) == {"vision", "adapter", "llm"} and set(row["tasks"]) == {
            "seen",
            "text",
        }
        assert min(row["tasks"].values()) < row["loss"] < max(row["tasks"].values())
        assert row["tokens_per_second"] > row["images_per_second"] > 0 <= row["eta"]
        assert row["data_seconds"] == round(row["data_seconds"], 3) >= 0


def test_the_loss_of_a_task_is_that_of_its_documents_alone(model, tokenizer):
    (batch,) = next(made_up(tokenizer))
    with torch.no_grad():
        sums = answers(model, batch)[1]["tasks"]
        whole = mean_by_task([loss_by_task(batch.owners, sums.tolist())])
        task = torch.tensor([o == "seen" for o in batch.owners]).repeat_interleave(
            torch.tensor(batch.segments.lengths)
        )
        batch.weights = batch.weights * task.view_as(batch.weights)
        alone = answers(model, batch)[1]
    assert float(alone["loss"]) / batch.weight == pytest.approx(whole["seen"], rel=1e-5)
    assert set(loss_by_task(batch.owners, alone["tasks"].tolist())) == {"seen"}


def test_checks_and_a_tracker_follow_the_run_and_the_best_checkpoint_stays(
    config, tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "mytracker.py").write_text(
        "rows = []\ndef init(project, name, config):\n    rows.append((project, name, config))\n"
        "def log(row, step):\n    rows.append((step, row['loss']))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scores = {2: 0.9, 4: 0.1, 6: 0.5, 8: 0.6}
    home = RunDirectory(
        tmp_path / "run",
        {"a": 1},
        every=2,
        keep=1,
        check=lambda step: {"score": scores[step]},
        check_every=2,
        tracker="mytracker",
    )
    run = train(
        SailVL(config).init_weights(0),
        replace(TINY, steps=8),
        made_up(tokenizer),
        answers,
        directory=home,
    )
    assert [r["check"]["score"] for r in run.log if "check" in r] == list(scores.values())
    assert [p.name for p in sorted(home.folder.glob("step-*"))] == [
        "step-00000004",
        "step-00000008",
    ]
    told = sys.modules["mytracker"].rows
    assert told[0] == ("nanosail", "run", {"a": 1}) and [step for step, _ in told[1:]] == list(
        range(1, 9)
    )


def test_a_cut_log_is_noticed_at_resume_and_keeps_its_count(config, tokenizer, tmp_path, capsys):
    def go(steps):
        return train(
            SailVL(config).init_weights(0),
            replace(TINY, steps=steps),
            made_up(tokenizer),
            answers,
            directory=RunDirectory(tmp_path),
        )

    go(3)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    run = go(5)
    assert "2 of the first 3 lines" in capsys.readouterr().err
    assert [row["step"] for row in run.log] == [0, -1, -1, 3, 4]
    assert len(log.read_text().splitlines()) == 5


def test_the_generators_state_survives_json():
    import random

    import numpy as np

    def draw():
        return (torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand())

    draw()
    state, values = get_rng()
    first = draw()
    set_rng(state, json.loads(json.dumps(values)))
    assert draw() == first


if __name__ == "__main__":
    tokenizer = Tokenizer(train_bpe(corpus(500), 400), "", THINK)
    c = PRESETS["toy"]
    config = replace(
        c,
        text=replace(c.text, vocab_size=448, num_hidden_layers=2),
        vision=replace(c.vision, num_hidden_layers=2),
        image_token_id=tokenizer.image,
    )
    GOLDEN.write_text(json.dumps(golden(config, tokenizer), indent=1) + "\n")


class NoStep:
    """In an optimizer's place: it changes nothing."""

    param_groups = [{"lr": 0.0, "scale": 1.0}]

    def step(self):
        return None

    def zero_grad(self):
        return None


def test_the_last_micro_batch_of_a_step_is_named_as_such(model, encoder, tokenizer, monkeypatch):
    """Sharded gradients are added up across ranks with the last one: it must be that, and no other."""
    told = []
    monkeypatch.setattr(loop, "begin_micro_batch", lambda *_, last: told.append(last))
    documents = [encoder(sample(i, 1, EVERY)) for i in range(3)]
    parts = [collate([[document]], 512, tokenizer.pad) for document in documents]

    def objective(model, batch, stage):
        return answers(model, batch)

    loop.one_step(model, [NoStep()], parts, objective, 1.0, Stage(), parallel.Ranks())
    assert told == [False, False, True]
