"""One way from the command line to the gradient: what is refused and said first, and no wait for ever."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

import pretrain
import recipe
import rl
import sft
from data.encode import Encoder
from data.readers import Folder
from data.sample import BadSample, Faults, Message, Sample
from data.world import World
from evaluate import gradable
from infra.plan import data_lines, refuse_unused, steps_of, work_lines
from recipe import Setup, checker, fit, refuse_impossible, resolved
from scale.parallel import Ranks
from stage import RLStage, Stage
from vlm import PRESETS, SailVL

OPTIONS = {"pretrain": pretrain.PretrainOptions, "sft": sft.SFTOptions, "rl": rl.RLOptions}
RECIPES = {"pretrain": pretrain.RECIPES, "sft": sft.RECIPES, "rl": rl.RECIPES}
EVERY_STAGE = [
    (script, scale, name)
    for script, scales in RECIPES.items()
    for scale, stages in scales.items()
    for name in stages
]


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turn(question, answer, **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | more


# ------------------------------------------------------------------------------------- the path


def test_from_the_command_to_the_gradient_there_are_four_calls_in_three_files(
    tmp_path, monkeypatch
):
    """sft.py -> recipe.run_command -> recipe.fit -> train.train -> train.one_step -> .backward()"""
    seen = []
    backward = torch.Tensor.backward

    def recorded(self, *args, **more):
        if not seen:
            ours = [f for f in inspect.stack() if f.filename.startswith(str(recipe.__file__)[:-9])]
            seen.extend((f.filename.rsplit("/", 1)[-1], f.function) for f in ours)
        return backward(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "backward", recorded)
    words = ["sft.py", "sft1", "--steps", "1", "--rows", "1", "--length", "128"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path)])
    recipe.run_command(sft.SFTOptions, sft.RECIPES)
    path = [step for step in reversed(seen) if step[0] in ("recipe.py", "train.py", "sft.py")]
    assert path == [
        ("recipe.py", "run_command"),
        ("recipe.py", "fit"),
        ("train.py", "train"),
        ("train.py", "one_step"),
    ]


# -------------------------------------------------------------------------------- unused options


@pytest.mark.parametrize(
    "script,changes,stage_changes,word",
    [
        ("sft", {}, {"think": 0.3}, "--think"),
        ("sft", {"images": "somewhere"}, {}, "--images"),
        ("sft", {"held_out": "x.jsonl"}, {}, "--held-out"),
        ("sft", {}, {"router_z": 0.1}, "--router-z"),
        ("sft", {}, {"adalrs_k": 7}, "--adalrs-k"),
        ("sft", {}, {"epochs": 2.0}, "--epochs"),
        ("rl", {"workers": 2}, {}, "--workers"),
        ("rl", {}, {"estimator": "k2"}, "--estimator"),
        ("rl", {}, {"replay": True}, "--replay"),
    ],
)
def test_an_option_that_the_stage_does_not_use_is_refused(
    model, script, changes, stage_changes, word
):
    name = "verifiable" if script == "rl" else "sft1"
    stage = RECIPES[script]["toy"][name]
    defaults = OPTIONS[script](stage=stage)
    options = replace(defaults, stage=replace(stage, **stage_changes), **changes)
    with pytest.raises(ValueError, match=word):
        refuse_unused(options, defaults, model)
    refuse_unused(defaults, defaults, model)


@pytest.mark.parametrize(
    "stage, word",
    [
        (Stage("x", trains=("visoin",)), "visoin"),
        (Stage("x", objective="policy"), "--objective"),
        (RLStage(objective="supervised"), "--objective"),
        (RLStage(updates=0), "--updates"),
        (RLStage(prompts=0), "--prompts"),
        (Stage("x", rows=0), "--rows"),
        (Stage("x", steps=0), "--steps"),
        (Stage("x", length=0), "--length"),
        (RLStage(passes=0), "--passes"),
        (RLStage(group=0), "--group"),
        (RLStage(max_new=0), "--max-new"),
    ],
)
def test_what_no_stage_can_have_is_refused_in_one_line(stage, word):
    with pytest.raises(ValueError, match=word):
        refuse_impossible(stage)


def test_a_command_refuses_what_no_stage_can_have(model, encoder):
    options = sft.SFTOptions(stage=Stage("x", rows=0))
    with pytest.raises(ValueError, match="--rows 0"):
        recipe.settled(options, options, Setup(model, encoder, World()))


def test_a_grader_that_the_run_does_not_have_costs_its_row():
    def row(**facts):
        turns = (Message("user", ("?",)), Message("assistant", ("yes",)))
        return Sample(turns, facts=facts)

    assert recipe.with_truth(row(answer=True)).facts["answer"] == "yes"
    assert recipe.with_truth(row(answer=3.0)).facts["answer"] == "3"
    with pytest.raises(BadSample, match="unknown grader"):
        recipe.with_truth(row(grader="nobody"))
    with pytest.raises(BadSample, match="wants a judge"):
        recipe.with_truth(row(grader="judge"), judged=False)
    assert recipe.with_truth(row(grader="judge"), judged=True)
    faults = Faults()
    kept = gradable([row(answer="a"), row(answer="a", grader="judge"), row()], faults)
    assert len(kept) == 1 and faults.counts == {"wants a judge": 1, "no truth": 1}


def test_a_direct_answer_loses_its_chain_also_before_thanks():
    turns = (
        Message("user", ("?",)),
        Message("assistant", ("\\boxed{2}",), think="one, two."),
        Message("user", ("thanks!",)),
    )
    direct = recipe.without_thinking(Sample(turns))
    assert direct.messages[1] == Message("assistant", ("2",))
    assert len(direct.messages) == 3


def test_the_work_of_images_alone_is_counted_in_patches(model, encoder, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    records = [turn(f"<image>{i}?", "b", image="a.png") for i in range(64)]
    setup = Setup(model, encoder, Folder(written(tmp_path / "my.jsonl", records)))
    size = model.config.vision
    patches = (size.image_size // size.patch_size) ** 2
    stage = Stage("image", ("vision",), objective="next_patch", epochs=2.0, rows=1, length=128)
    assert steps_of(setup, stage) == round(2 * 64 * patches / 128)


def test_epochs_of_nothing_that_can_be_read_are_refused(model, encoder, tmp_path):
    records = [turn("<image>?", "b", image="absent.png")] * 3
    setup = Setup(model, encoder, Folder(written(tmp_path / "my.jsonl", records)))
    with pytest.raises(ValueError, match="none of the first"):
        steps_of(setup, Stage("x", epochs=2.0))


def test_held_out_data_that_cannot_be_graded_is_refused_at_the_start(model, encoder, tmp_path):
    records = [turn("a?", "b", image="absent.png")]
    held_out = written(tmp_path / "held.jsonl", records)
    options = sft.SFTOptions(stage=Stage("x"), data=held_out, held_out=held_out)
    with pytest.raises(ValueError, match="no sample can be graded"):
        checker(options, Setup(model, encoder, Folder(held_out)))


def test_a_mixture_of_experts_gets_the_papers_algorithm(config):
    text = replace(PRESETS["toy-moe"].text, vocab_size=config.text.vocab_size, num_hidden_layers=1)
    dense = SailVL(config)
    experts = SailVL(replace(config, text=text))
    assert resolved(RLStage(), dense).algorithm == "dapo"
    assert resolved(RLStage(), experts).algorithm == "gspo"
    assert resolved(RLStage(algorithm="grpo"), experts).algorithm == "grpo"


# ----------------------------------------------------------------------------------- the plan


def test_tasks_that_the_mixture_leaves_out_are_named_with_their_counts(model, encoder, tmp_path):
    records = [turn("a?", "b", task=task) for task in ("caption", "caption", "chart", "math")]
    folder = Folder(written(tmp_path / "my.jsonl", records))
    stage = Stage("x", mixture={"caption": 1.0, "vqa": 1.0})
    options = pretrain.PretrainOptions(stage=stage, data=tmp_path / "my.jsonl")
    text = "\n".join(data_lines(Setup(model, encoder, folder), options))
    assert "caption 2" in text and "LEFT OUT" in text
    left = next(line for line in text.splitlines() if "LEFT OUT" in line)
    assert "chart 1" in left and "math 1" in left and "caption" not in left
    assert "vqa" in text


def test_epochs_become_steps_and_many_of_them_are_warned_about(model, encoder, tmp_path):
    folder = Folder(written(tmp_path / "my.jsonl", [turn(f"{i}?", "yes") for i in range(40)]))
    setup = Setup(model, encoder, folder)
    length = sum(len(encoder(s)) for s in folder.first()) / 40
    stage = Stage("x", epochs=3.0, rows=1, length=128)
    assert steps_of(setup, stage) == pytest.approx(3 * 40 * length / 128, abs=1)
    many = replace(stage, epochs=0.0, steps=1000)
    assert any("WARNING" in line for line in work_lines(setup, many))
    assert steps_of(setup, RLStage("x", epochs=1.0, prompts=20, updates=2)) == 4


# ----------------------------------------------------------------- nothing to learn is an error


def nothing_for(stage, folder):
    """Records that this stage has no use for: no chain, no truth, no picture, or too long."""
    if stage.objective == "next_patch":
        return [turn(f"{i}?", "yes") for i in range(30)]
    if stage.samples in ("chains", "fusion"):
        return [turn(f"{i}?", "yes") for i in range(30)]
    if stage.objective == "policy":
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:40])
        return [turn("<image>\nwhat?", "yes", image="a.png") for _ in range(30)]
    return [turn("word " * 400, "yes") for _ in range(30)]


@pytest.mark.parametrize("script,scale,name", EVERY_STAGE, ids="-".join)
def test_every_stage_on_data_that_has_nothing_for_it_is_an_error_within_seconds(
    model, tokenizer, config, tmp_path, script, scale, name
):
    stage = RECIPES[script][scale][name]
    changes = {"steps": 4, "accumulate": 1}
    if isinstance(stage, RLStage):
        changes |= {"prompts": 8, "updates": 2, "max_new": 20, "overlong": 4, "batch": 0}
    else:
        changes |= {"rows": 2, "length": 128}
    stage = replace(stage, **changes)
    folder = Folder(written(tmp_path / "my.jsonl", nothing_for(stage, tmp_path)))
    setup = Setup(model, Encoder(tokenizer, config, folder.root, 512), folder)
    began = time.time()
    with pytest.raises(ValueError) as error:
        fit(setup, replace(stage, mixture={}))
    assert time.time() - began < 60  # a bound against hanging, generous for a busy machine
    assert str(error.value).strip()


def test_a_broken_picture_in_rl_costs_its_sample_alone(model, encoder, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    records = [turn("<image>\nwhat?", "red", image=f"{'ab'[i % 2]}.png") for i in range(16)]
    folder = Folder(written(tmp_path / "my.jsonl", records))
    setup = Setup(model, encoder, folder, reward=lambda text, *_: {"reward": len(text) % 2})
    stage = RLStage(
        "x", algorithm="grpo", steps=8, prompts=4, group=2, updates=2, max_new=4, overlong=0
    )
    run = fit(setup, stage)
    assert len(run.log) == 8 and setup.faults.counts["unreadable image"] >= 1


def test_data_that_ends_early_ends_the_stage_well(model, encoder, tmp_path):
    records = [turn(f"{i}?", "yes") for i in range(30)]
    written(tmp_path / "my.jsonl", records)
    mixture = {"datasets": {"mine": {"data": "my.jsonl", "epochs": 1}}}
    (tmp_path / "mix.json").write_text(json.dumps(mixture))
    setup = Setup(model, encoder, Folder(tmp_path / "mix.json"))
    run = fit(setup, Stage("x", steps=500, rows=1, length=128))
    assert run.ended_early and 0 < len(run.log) < 500


def test_the_world_has_something_for_every_stage_of_the_toy(model, encoder):
    for table in (pretrain.TOY, sft.TOY):
        for stage in table.values():
            setup = Setup(model, encoder, World())
            small = replace(stage, steps=1, rows=1, length=256, adalrs=False)
            assert len(fit(setup, small).log) == 1, stage.name


# ------------------------------------------------------------------------------ the paper's numbers

PAPER_TOKENS = {  # Tables 3 and 4, in billions
    "basic": 128,
    "multitask": 360,
    "sft1": 42,
    "sft2": 40,
    "sft3": 16,
    "sft4": 70,
    "long-cot": 0.4,
    "fusion": 1.0,
}


@pytest.mark.parametrize("name", PAPER_TOKENS)
def test_a_paper_stage_sees_the_papers_tokens_and_fits_a_row_at_a_time(name):
    stage = (pretrain.PAPER | sft.PAPER)[name]
    tokens = stage.steps * stage.rows * stage.length / 1e9
    assert tokens == pytest.approx(PAPER_TOKENS[name], rel=0.03)
    assert stage.accumulate == 0 and stage.recompute  # one row a micro-batch, no kept activations
    assert stage.rows % 8 == 0


def test_paper_rl_is_2048_rollouts_in_eight_updates_of_512_and_an_epoch_of_its_questions():
    for name, questions in (("verifiable", 50_000), ("mixed", 100_000)):
        stage = rl.PAPER[name]
        assert stage.prompts * stage.group == 2048 and stage.updates == 8
        assert stage.prompts * stage.group * stage.passes // stage.updates == 512
        seen = stage.steps // stage.updates * stage.prompts
        assert seen == pytest.approx(questions, rel=0.01)
        assert stage.batch == 1  # one prompt's rows in the cache at a time


# --------------------------------------------------------------------------------- told to stop

LIFE = """
import sys, time
from pathlib import Path
import torch
from data.encode import Encoder
from data.sample import BadSample, Faults, Message, Sample
from data.world import World
from evaluate import gradable
from infra.run_directory import RunDirectory
from recipe import Setup, fit, new_model
from stage import RLStage

phase, out = sys.argv[1:]
source = World()
model, tokenizer = new_model("toy", source)
encoder = Encoder(tokenizer, model.config)
home = RunDirectory(Path(out), {}, every=1)


def reward(text, sample, finished):
    print("rewarding", flush=True)
    time.sleep(1000 if phase == "rewards" else 0)
    return {"reward": len(text) % 2}


# in every phase but the sampling, answers are short
max_new = 4000 if phase == "sampling" else 4
stage = RLStage(
    "x", ("llm",), {"counting": 1.0}, algorithm="grpo", steps=10**6, prompts=2, group=2, updates=1,
    max_new=max_new, overlong=0, turns=1,
)
print("started", flush=True)
fit(Setup(model, encoder, source, directory=home, reward=reward), stage)
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sampling", "rewards", "steps"])
def test_a_signal_ends_rl_within_seconds_wherever_it_is(tmp_path, phase):
    """Asked between tokens and rewards; a reward that never returns is ended by the grace of 8 seconds."""
    words = [sys.executable, "-c", LIFE, phase, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    life = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    awaited = "trains" if phase == "sampling" else "rewarding"
    while awaited not in life.stdout.readline():
        assert life.poll() is None
    time.sleep(1)
    life.send_signal(signal.SIGTERM)
    began = time.time()
    assert life.wait(timeout=60) == 143
    assert time.time() - began < 30  # 8 seconds on an idle machine; a bound against hanging


def test_what_all_ranks_have_read_is_counted_by_one(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    data = written(tmp_path / "my.jsonl", [turn("a?", "b"), {"conversations": 3}])
    chain = turn("a?", "<think>so</think>\\boxed{b}")
    harvest = written(tmp_path / "chains.jsonl", [chain, turn("c?", "d")])
    options = sft.SFTOptions(stage=Stage("x"), data=data, model=tmp_path / "model", harvest=harvest)
    first, second = (recipe.set_up(options, Ranks(rank, 2)).faults for rank in (0, 1))
    assert first.counts["no chain"] == 1 and first.examples
    assert not second.counts and not second.examples and not second.tracebacks


def test_a_check_looks_beside_its_own_file_and_scores_what_was_wrong(
    model, encoder, tmp_path, monkeypatch
):
    (tmp_path / "held").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "held" / "a.png")
    records = [turn("<image>\nwhat?", "red", image="a.png"), turn("?", "b", image="absent.png")]
    held_out = written(tmp_path / "held" / "my.jsonl", records)
    data = Folder(written(tmp_path / "my.jsonl", [turn("a?", "b")]))
    options = sft.SFTOptions(stage=Stage("x"), data=tmp_path / "my.jsonl", held_out=held_out)
    asked = []

    def graded(_, encoder, samples, *rest, **more):
        asked.append((encoder.root, len(samples)))
        return {"overall": SimpleNamespace(accuracy=0.75)}, []

    monkeypatch.setattr(recipe, "evaluate", graded)
    check = checker(options, Setup(model, replace(encoder, root=data.root), data))
    assert check(1) == {"accuracy": 0.75, "score": 0.25, "said": []}
    assert asked == [(Folder(held_out).root, 1)]


def test_the_chains_of_the_data_itself_are_all_of_them(model, encoder, tmp_path):
    records = [turn("?", "<think>so</think>")]  # a chain without a truth
    for i in range(9):
        records += [turn(f"{i}?", f"<think>so {i}</think>\\boxed{{{i}}}"), turn(f"{i}?", "no")]
    folder = Folder(written(tmp_path / "my.jsonl", records))
    found = recipe.reference_chains(Setup(model, encoder, folder), Stage("x"))
    assert [sample.messages[-1].think for sample in found] == [f"so {i}" for i in range(9)]
    think_prompt = encoder.tokenizer.think_prompt
    assert all(sample.messages[-2].parts[-1].endswith(think_prompt) for sample in found)


def test_the_papers_rl_has_its_numbers():
    """4.2.3: 2,048 rollouts an episode, 8 updates of 512, rate 1e-6, 16,384 + 4,096 tokens; ours: the group
    of 8, two passes, the last 512 tokens punished."""
    for name, questions in (("verifiable", 50_000), ("mixed", 100_000)):
        stage = rl.PAPER[name]
        assert stage.prompts * stage.group == 2048 and stage.updates == 8 and stage.lr == 1e-6
        assert stage.prompts * stage.group * stage.passes / stage.updates == 512
        assert (stage.max_prompt, stage.max_new, stage.overlong) == (16384, 4096, 512)
        assert stage.steps * stage.prompts / stage.updates == pytest.approx(questions, rel=0.01)
    for stage in rl.TOY.values():
        assert (stage.prompts, stage.group, stage.updates, stage.tries) == (48, 8, 2, 1)
