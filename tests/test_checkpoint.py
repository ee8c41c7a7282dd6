"""Checkpoints: killed anywhere and resumed bit for bit, faults at every file operation, altered files.

Runs are forked: the kills are real (SIGKILL), and nothing that a dying process might still do is done.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import made_up
from safetensors.torch import load_file

import packing
from infra import checkpoint, weights
from infra.checkpoint import RunDirectory, fault, latest
from scale.parallel import Ranks
from train import Stage, answers, train
from vlm import SailVL

STEPS = 14
STAGE = Stage(
    "x",
    ("adapter", "llm"),
    steps=STEPS,
    rows=2,
    length=128,
    lr=2e-3,
    adalrs=True,
    adalrs_k=3,
    adalrs_window=(0.0, 0.9),
)


def noisy(counter=lambda: None):
    """The supervised objective under sampling by torch, Python and numpy: each generator must resume."""

    def objective(model, batch):
        counter()
        batch.weights = (
            batch.weights
            * (torch.rand_like(batch.weights) < 0.7)
            * (0.5 + random.random())
            * (0.5 + np.random.rand())
        )
        return answers(model, batch)

    return objective


def run(path, config, tokenizer, counter=lambda: None, every: int = 2, stage: Stage = STAGE):
    """One process's life: a fresh model and fresh data, then whatever the directory says."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model = SailVL(config).init_weights(0)
    result = train(
        model,
        stage,
        made_up(tokenizer),
        noisy(counter),
        directory=RunDirectory(path, {"stage": vars(stage)}, every),
    )
    return result, model


def forked(work) -> int:
    """Run `work` in a child process; returns the signal that ended it, or minus its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bomb(n: int, act=die):
    """A function to call at every event, which acts at the n-th."""
    seen = [0]

    def tick():
        seen[0] += 1
        if seen[0] == n:
            act()

    return tick


def hook(patch, tick) -> None:
    """Call `tick` before and after every file operation of a checkpoint."""

    def around(real):
        def wrapped(*a, **k):
            tick()
            value = real(*a, **k)
            tick()
            return value

        return wrapped

    for place, name in (
        (os, "fsync"),
        (os, "rename"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (checkpoint, "save_file"),
        (weights, "save_file"),
        (checkpoint, "digest"),
        (shutil, "rmtree"),
    ):
        patch.setattr(place, name, around(getattr(place, name)))


def results(path: Path) -> tuple[list[str], dict]:
    """What must be the same to the last bit: losses, gradient norms, rates, steps; and the weights."""
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [
        repr([r[k] for k in ("step", "lr", "loss", "grad_norm", "tasks")]) for r in rows
    ], load_file(latest(path / "checkpoints") / "model.safetensors")


@pytest.fixture(scope="module")
def config(config):
    return replace(
        config,
        text=replace(config.text, num_hidden_layers=1),
        vision=replace(config.vision, num_hidden_layers=1),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config, tokenizer):
    """The run that nothing happened to."""
    run(
        tmp_path_factory.mktemp("warm"), config, tokenizer, stage=replace(STAGE, steps=2)
    )  # imports once, not in every child
    path = tmp_path_factory.mktemp("whole")
    assert forked(lambda: run(path, config, tokenizer)) == 0
    log, weights_ = results(path)
    assert (
        len(log) > STEPS
    )  # the search took steps back: trials are in progress at some checkpoints
    return log, weights_, path


def kill_until_done(path, config, tokenizer, rng, kills: int) -> int:
    """Start the run again and again, killing it at a random step or file operation, then let it end."""
    for _ in range(kills):
        at = rng.randrange(1, 30)
        with pytest.MonkeyPatch.context() as patch:
            if rng.random() < 0.5:
                assert forked(lambda: run(path, config, tokenizer, bomb(1 + at % 6))) in (
                    signal.SIGKILL,
                    0,
                )
            else:

                def work():
                    hook(patch, bomb(at))
                    run(path, config, tokenizer)

                assert forked(work) in (signal.SIGKILL, 0)
    return forked(lambda: run(path, config, tokenizer))


def test_a_run_killed_twenty_times_is_the_run_that_was_not_to_the_last_bit(
    tmp_path, config, tokenizer, whole
):
    for round_ in range(2):
        path = tmp_path / str(round_)
        assert kill_until_done(path, config, tokenizer, random.Random(round_), 10) == 0
        log, found = results(path)
        assert log == whole[0]
        assert found.keys() == whole[1].keys() and all(
            torch.equal(t, whole[1][k]) for k, t in found.items()
        )
        assert not list((path / "checkpoints").glob("broken-*"))


@pytest.mark.parametrize("planted", ["rng", "optimizer", "search", "data"])
def test_what_is_not_restored_is_noticed(tmp_path, config, tokenizer, whole, planted, monkeypatch):
    """The test above is not blind: each omission changes the losses."""
    assert forked(lambda: run(tmp_path, config, tokenizer, bomb(9))) == signal.SIGKILL

    def nothing(*a, **k):
        return None

    if planted == "rng":
        monkeypatch.setattr(checkpoint, "set_rng", nothing)
    elif planted == "optimizer":
        monkeypatch.setattr(checkpoint, "load_optimizer_state", nothing)
    elif planted == "search":
        monkeypatch.setattr(checkpoint.AdaLRS, "load_state_dict", nothing)
    else:
        monkeypatch.setattr(packing.Batches, "load_state_dict", nothing)
    assert forked(lambda: run(tmp_path, config, tokenizer)) == 0
    assert results(tmp_path)[0] != whole[0]


@pytest.fixture
def two(tmp_path, whole):
    """A copy of the finished run, with its two checkpoints; returns (folder, older, newer)."""
    shutil.copytree(whole[2], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    older, newer = sorted(folder.glob("step-*"))
    return folder, older, newer


def write_again(path, config) -> bool:
    home = RunDirectory(path)
    return home.write(999, SailVL(config).init_weights(1), {"x": torch.ones(3)}, {"step": 999})


def test_killed_at_every_file_operation_of_a_checkpoint_there_is_always_a_whole_one(two, config):
    folder, _, newer = two
    n, status = 0, signal.SIGKILL
    while status == signal.SIGKILL:
        n += 1
        with pytest.MonkeyPatch.context() as patch:

            def work():
                hook(patch, bomb(n))
                write_again(folder.parent, config)

            status = forked(work)
        found = latest(folder)
        assert (
            found is not None
            and fault(found) is None
            and found.name in (newer.name, "step-00000999")
        )
        if found.name == "step-00000999":
            shutil.rmtree(found)
    assert (
        status == 0 and n > 20 and not list(folder.glob("broken-*"))
    )  # every operation had its turn


def test_an_error_at_every_file_operation_costs_only_that_checkpoint(two, config, capsys):
    folder, _, newer = two

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    n, written = 0, False
    while not written:
        n += 1
        with pytest.MonkeyPatch.context() as patch:
            hook(patch, bomb(n, fail))
            written = write_again(folder.parent, config)
            said = capsys.readouterr().err
            assert written or "NOT WRITTEN" in said
            assert written or not list(folder.glob("tmp-00000999"))
            # after the rename the new one is whole: only the removal of an old one can fail
            written = written and "could not be removed" not in said
        found = latest(folder)
        assert fault(found) is None and found.name in (newer.name, "step-00000999")
        if found.name == "step-00000999":
            shutil.rmtree(found)
    assert n > 20


def test_a_full_disk_costs_only_that_checkpoint_and_training_goes_on(
    tmp_path, config, tokenizer, whole
):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def full():
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)
            )  # less than the weights take

        def empty():
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )

        full_at, empty_at = bomb(4, full), bomb(9, empty)
        run(tmp_path, config, tokenizer, lambda: (full_at(), empty_at()))

    assert forked(work) == 0
    assert results(tmp_path)[0] == whole[0]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.safetensors", "state.json", "config.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
def test_an_altered_file_is_refused_by_name_and_the_checkpoint_before_is_used(
    two, name, how, capsys
):
    folder, older, newer = two
    data = bytearray((newer / name).read_bytes())
    data[len(data) // 2] ^= 4
    if how == "gone":
        (newer / name).unlink()
    else:
        (newer / name).write_bytes(
            data if how == "bit" else data[:-1] if name != "manifest.json" else data[:-3]
        )
    assert latest(folder) == older
    said = capsys.readouterr().err
    assert "REFUSED" in said and newer.name in said and (name in said or name == "manifest.json")
    assert (folder / f"broken-{newer.name}").is_dir()


def test_a_flipped_bit_costs_only_the_steps_since_the_checkpoint_before(
    tmp_path, config, tokenizer, whole
):
    assert forked(lambda: run(tmp_path, config, tokenizer, bomb(12))) == signal.SIGKILL
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    assert forked(lambda: run(tmp_path, config, tokenizer)) == 0
    log, found = results(tmp_path)
    assert log == whole[0] and all(torch.equal(t, whole[1][k]) for k, t in found.items())


def test_sigterm_writes_a_checkpoint_and_leaves(tmp_path, config, tokenizer, whole):
    told = bomb(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert forked(lambda: run(tmp_path, config, tokenizer, told, every=0)) == -143
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1
    assert forked(lambda: run(tmp_path, config, tokenizer, every=0)) == 0
    assert results(tmp_path)[0] == whole[0]


def test_a_second_writer_and_a_changed_configuration_are_refused(tmp_path, config, tokenizer):
    run(tmp_path, config, tokenizer, stage=(short := replace(STAGE, steps=2)))
    with pytest.raises(ValueError, match=r"another configuration:\n  stage.lr: 0.002 -> 0.1\n"):
        run(tmp_path, config, tokenizer, stage=replace(short, lr=0.1))
    home, other = (
        RunDirectory(tmp_path, {"stage": vars(short)}),
        RunDirectory(tmp_path, {"stage": vars(short)}),
    )
    assert home.open(Ranks()).name == "step-00000002"
    with pytest.raises(ValueError, match="another process"):
        other.open(Ranks())
    home.close()


def test_the_newest_and_the_best_are_kept(tmp_path, config):
    home = RunDirectory(tmp_path, keep=2, best=[0.1, 2])
    home.folder.mkdir(parents=True)
    model = SailVL(config).init_weights(0)
    for step in range(1, 7):
        assert home.write(step, model, {"x": torch.zeros(1)}, {"step": step})
    assert [p.name[-1] for p in sorted(home.folder.glob("step-*"))] == ["2", "5", "6"]


def test_a_checkpoint_is_a_model_in_the_released_layout_and_holds_no_pickle(two):
    _, _, newer = two
    model = SailVL.from_pretrained(newer)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert sorted(p.suffix for p in newer.iterdir()) == [".json"] * 3 + [".safetensors"] * 2
    state = json.loads((newer / "state.json").read_text())
    assert state["config"]["stage"]["lr"] == STAGE.lr and state["revision"]
    source = "".join(p.read_text() for p in Path(checkpoint.__file__).parent.glob("*.py"))
    assert (
        "import pickle" not in source
        and "torch.load(" not in source
        and "torch.save(" not in source
    )
