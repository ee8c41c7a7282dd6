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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import answers, made_up
from safetensors.torch import load_file, save_file

from infra import checkpoint, weights
from infra.checkpoint import fault, latest, odd_state
from infra.keeper import Counted, Keeper, get_rng, set_rng, with_rests
from infra.run_directory import RunDirectory
from scale.parallel import Ranks
from stage import Stage
from train import train
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

    def objective(model, batch, stage):
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


@pytest.mark.parametrize(
    "round_, kills",
    [
        (0, 5),
        pytest.param(0, 10, marks=pytest.mark.slow),
        pytest.param(1, 10, marks=pytest.mark.slow),
        pytest.param(2, 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_many_times_is_the_run_that_was_not_to_the_last_bit(
    tmp_path, config, tokenizer, whole, round_, kills
):
    assert kill_until_done(tmp_path, config, tokenizer, random.Random(round_), kills) == 0
    log, found = results(tmp_path)
    assert log == whole[0]
    assert found.keys() == whole[1].keys()
    assert all(torch.equal(t, whole[1][k]) for k, t in found.items())
    assert not list((tmp_path / "checkpoints").glob("broken-*"))


@pytest.mark.parametrize("planted", ["rng", "optimizer", "search", "data"])
def test_what_is_not_restored_is_noticed(tmp_path, config, tokenizer, whole, planted, monkeypatch):
    """The test above is not blind: each omission changes the losses."""
    assert forked(lambda: run(tmp_path, config, tokenizer, bomb(9))) == signal.SIGKILL

    def nothing(*a, **k):
        return None

    if planted == "rng":
        monkeypatch.setattr("infra.keeper.set_rng", nothing)
    elif planted == "optimizer":
        monkeypatch.setattr("infra.keeper.load_optimizer_state", nothing)
    elif planted == "search":
        monkeypatch.setattr("infra.keeper.AdaLRS.load_state_dict", nothing)
    else:
        monkeypatch.setattr("data.steps.Batches.load_state_dict", nothing)
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


@pytest.mark.slow
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


# ------------------------------------------------------------------- any fault of a checkpoint


def rewritten(checkpoint_: Path, manifest) -> None:
    """Another manifest over the same files."""
    (checkpoint_ / "manifest.json").write_text(json.dumps(manifest))


def listed_without(checkpoint_: Path, name: str) -> None:
    """A file is missing and the manifest does not list it: the sums agree."""
    manifest = json.loads((checkpoint_ / "manifest.json").read_text())
    del manifest[name]
    (checkpoint_ / name).unlink()
    rewritten(checkpoint_, manifest)


def resealed(checkpoint_: Path, name: str, text: str) -> None:
    """Another content, and the sums that belong to it."""
    (checkpoint_ / name).write_text(text)
    manifest = json.loads((checkpoint_ / "manifest.json").read_text())
    manifest[name] = {"bytes": len(text), "sha256": checkpoint.digest(checkpoint_ / name)}
    rewritten(checkpoint_, manifest)


def changed_state(checkpoint_: Path, **values) -> None:
    state = json.loads((checkpoint_ / "state.json").read_text())
    resealed(checkpoint_, "state.json", json.dumps(state | values))


def emptied(checkpoint_: Path) -> None:
    for path in checkpoint_.iterdir():
        path.unlink()


def a_file(checkpoint_: Path) -> None:
    shutil.rmtree(checkpoint_)
    checkpoint_.write_text("no directory")


FAULTY = {
    "an empty directory": emptied,
    "a plain file": a_file,
    "a manifest of {}": lambda c: (emptied(c), rewritten(c, {})),
    "a manifest of []": lambda c: rewritten(c, []),
    "a manifest of null entries": lambda c: rewritten(c, {"config.json": None}),
    "a manifest of wrong types": lambda c: rewritten(
        c, {"config.json": {"bytes": [], "sha256": 3}}
    ),
    "a manifest that leads outside": lambda c: rewritten(
        c, {"../../run.json": {"bytes": 1, "sha256": "x"}}
    ),
    "a nested manifest": lambda c: (c / "manifest.json").write_text("[" * 100_000),
    "a manifest that is no text": lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "no state, and none listed": lambda c: listed_without(c, "state.json"),
    "no weights, and none listed": lambda c: listed_without(c, "model.safetensors"),
    "a state that is no object": lambda c: resealed(c, "state.json", "[]"),
    "a state without a configuration": lambda c: resealed(c, "state.json", "{}"),
    "a state of another kind": lambda c: resealed(c, "state.json", '{"config": 3}'),
    "a state of a wrong type": lambda c: changed_state(c, step="x"),
    "a state of no step": lambda c: changed_state(c, step=-1),
    "a state of a list of data": lambda c: changed_state(c, data=[]),
    "a state of another checkpoint": lambda c: changed_state(c, executed=10**12),
    "a state without generators": lambda c: changed_state(c, rng=[]),
    "a state past its steps": lambda c: changed_state(c, step=10**6),
    "a nested state": lambda c: resealed(c, "state.json", "[" * 100_000),
    "a foreign file": lambda c: (c / "extra\x1b[2J.bin").write_text("x"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_with_any_fault_the_checkpoint_before_is_used(two, name, capsys):
    folder, older, newer = two
    FAULTY[name](newer)
    assert latest(folder) == older
    said = capsys.readouterr().err
    assert "REFUSED" in said and newer.name in said and "\x1b" not in said


MISFITS = {
    "no generators": lambda tensors: {k: t for k, t in tensors.items() if not k.startswith("rng")},
    "another optimizer": lambda tensors: tensors | {"optimizer.99.0.x": torch.ones(1)},
}


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_fit_together_are_one_line_that_names_the_checkpoint(
    two, name, config, tokenizer
):
    """Their sums agree, so this is no damage that could be told before they are loaded."""
    folder, _, newer = two
    file = newer / "state.safetensors"
    save_file(MISFITS[name](load_file(file)), file)
    manifest = json.loads((newer / "manifest.json").read_text())
    manifest[file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint.digest(file)}
    rewritten(newer, manifest)
    says = rf"{newer.name} cannot be restored \(.*move it away"
    with pytest.raises(ValueError, match=says) as caught:
        run(folder.parent, config, tokenizer)
    assert "\n" not in str(caught.value)


def test_the_same_step_may_break_again_and_again(two):
    folder, older, newer = two
    for n in range(3):
        newer.mkdir(exist_ok=True)
        (newer / "manifest.json").write_text("{")
        assert latest(folder) == older
    assert [path.name for path in sorted(folder.glob("broken-*"))] == [
        f"broken-{newer.name}",
        f"broken-{newer.name}-2",
        f"broken-{newer.name}-3",
    ]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("stuck", [False, True])
def test_a_file_that_cannot_be_read_is_a_fault(two, error, stuck, monkeypatch, capsys):
    """stuck: it cannot be renamed either; it is then left alone, and never counted as newest."""
    folder, older, newer = two
    newer = newer.rename(folder / "step-00000099")
    real = checkpoint.digest

    def unreadable(path):
        if path.parent == newer and path.name == "model.safetensors":
            raise OSError(error, os.strerror(error))
        return real(path)

    def fixed(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "digest", unreadable)
    if stuck:
        monkeypatch.setattr(os, "rename", fixed)
    assert latest(folder) == older
    said = capsys.readouterr().err
    assert "model.safetensors cannot be read" in said
    assert newer.exists() == stuck and ("left where it is" in said) == stuck

    # training goes on from the older one: what it writes is kept, though a larger number is there
    monkeypatch.undo()
    home = RunDirectory(folder.parent, keep=1)
    number = int(older.name[5:]) + 1
    model = SailVL.from_pretrained(older)
    assert home.write(number, model, {"x": torch.ones(3)}, {})
    assert (folder / f"step-{number:08d}").is_dir() and not older.exists()


def test_a_broken_checkpoint_of_the_same_name_is_no_excuse_not_to_write(tmp_path, config):
    home = RunDirectory(tmp_path)
    model = SailVL(config).init_weights(0)
    home.folder.mkdir(parents=True)
    (home.folder / "step-00000003").mkdir()
    assert home.write(3, model, {"x": torch.ones(3)}, {"step": 3})
    assert fault(home.folder / "step-00000003") is None


def test_names_are_ordered_as_numbers(tmp_path):
    for name in ("step-100000000", "step-00000009", "step-x", "tmp-00000010", "broken-step-11"):
        (tmp_path / name).mkdir()
    assert list(checkpoint.checkpoints(tmp_path)) == [9, 100_000_000]


# -------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_what_is_not_finite_is_never_written(tmp_path, config, capsys, value, where):
    home = RunDirectory(tmp_path, keep=1)
    home.folder.mkdir(parents=True)
    model = SailVL(config).init_weights(0)
    good = {"optimizer.0.0.exp_avg": torch.ones(3), "step": torch.ones(2, dtype=torch.int64)}
    assert home.write(1, model, good, {})

    if where == "weights":
        with torch.no_grad():
            next(model.parameters()).view(-1)[5] = value
        assert not home.write(2, model, good, {})
    else:
        assert not home.write(2, model, good | {"optimizer.0.0.exp_avg": torch.tensor([value])}, {})
    assert "not finite" in capsys.readouterr().err
    assert latest(home.folder).name == "step-00000001" and home.failures == 1


def test_the_name_reaches_the_disk_after_the_rename(tmp_path, config, monkeypatch):
    """What was synced and renamed, in order: every file, its directory, the name, the parent."""
    events = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real_sync(handle)

    def rename(a, b):
        events.append(f"rename to {Path(b).name}")
        real_rename(a, b)

    home = RunDirectory(tmp_path)
    home.folder.mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    assert home.write(1, SailVL(config).init_weights(0), {"x": torch.ones(1)}, {})
    assert events[-2:] == ["rename to step-00000001", home.folder]

    temporary = home.folder / "tmp-00000001"
    written = {path.name for path in (home.folder / "step-00000001").iterdir()}
    assert {path.name for path in events[:-3]} == written
    assert events[-3] == temporary and events[-4] == temporary / "manifest.json"


def test_the_tokenizer_is_inside(tmp_path, config, tokenizer):
    home = RunDirectory(tmp_path, tokenizer=tokenizer)
    home.folder.mkdir()
    assert home.write(1, SailVL(config).init_weights(0), {"x": torch.ones(1)}, {})
    found = type(tokenizer).load(latest(home.folder))
    assert found.ranks == tokenizer.ranks


def test_a_best_that_could_not_be_written_does_not_push_out_the_one_before(
    tmp_path, config, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    home = RunDirectory(tmp_path, keep=1)
    home.folder.mkdir()
    model = SailVL(config).init_weights(0)
    state = {"x": torch.ones(1)}
    assert home.write(1, model, state, {"best": [0.5, 1]})
    with monkeypatch.context() as patch:
        patch.setattr("infra.run_directory.commit", full)
        assert not home.write(2, model, state, {"best": [0.1, 2]})
    assert home.best == [0.5, 1]
    assert home.write(3, model, state, {"best": home.best})
    assert list(checkpoint.checkpoints(home.folder)) == [1, 3]


# ------------------------------------------------------------------------ whose run it is


def test_a_planted_lock_file_is_neither_followed_nor_emptied(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run_ = tmp_path / "run"
    run_.mkdir()
    (run_ / ".lock").symlink_to(victim)
    with pytest.raises(ValueError, match="symbolic link"):
        RunDirectory(run_).open(Ranks())
    (run_ / ".lock").unlink()
    (run_ / ".lock").write_text("somebody's")
    home = RunDirectory(run_)
    home.open(Ranks())
    home.close()
    assert victim.read_text() == "precious" and (run_ / ".lock").read_text() == "somebody's"
    (run_ / ".lock").unlink()
    home.open(Ranks())
    home.close()
    assert (run_ / ".lock").stat().st_mode & 0o033 == 0, "others may write or run it"


@pytest.fixture
def finished(tmp_path, config):
    """A run of 40 steps over the data "a", which has ended."""
    home = RunDirectory(tmp_path, {"stage": {"steps": 40, "lr": 1.0}}, data_identity="a")
    home.open(Ranks())
    state = {"step": 40, "executed": 47}
    assert home.write(47, SailVL(config).init_weights(0), {"x": torch.ones(1)}, state)
    home.close()
    return tmp_path


def opened(path: Path, steps: int = 40, lr: float = 1.0, data: str = "a") -> str:
    """Name of the checkpoint that a run with these options goes on from."""
    home = RunDirectory(path, {"stage": {"steps": steps, "lr": lr}}, data_identity=data)
    try:
        return home.open(Ranks()).name
    finally:
        home.close()


def test_a_finished_run_may_be_given_more_steps(finished, capsys):
    assert opened(finished, 50) == "step-00000047"
    said = capsys.readouterr().err
    assert "stage.steps grows from 40 to 50" in said and "from step 40 on" in said
    assert json.loads((finished / "run.json").read_text())["stage"]["steps"] == 50


@pytest.mark.parametrize("change", [{"steps": 30}, {"lr": 2.0}, {"steps": 50, "lr": 2.0}])
def test_any_other_change_is_refused_with_what_changed(finished, change):
    name, value = list(change.items())[-1]
    with pytest.raises(ValueError, match=rf"stage.{name}: [\d.]+ -> {value}\n"):
        opened(finished, **change)


def test_more_steps_train_on_where_the_run_had_ended(tmp_path, config, tokenizer):
    run(tmp_path, config, tokenizer, stage=replace(STAGE, steps=2))
    result, _ = run(tmp_path, config, tokenizer, stage=replace(STAGE, steps=4))
    assert [row["step"] for row in result.log] == [0, 1, 2, 3]


def test_changed_data_is_refused_where_both_are_known(finished):
    with pytest.raises(ValueError, match="data is not what its checkpoint was trained on"):
        opened(finished, data="b")
    assert opened(finished, data="") == "step-00000047"


def test_settings_that_mean_nothing_are_refused(tmp_path):
    for odd in ({"keep": 0}, {"every": -1}, {"check_every": -2}):
        with pytest.raises(ValueError, match="must be at least"):
            RunDirectory(tmp_path, **odd)


def test_what_a_killed_run_left_goes_and_resume_false_begins_again(finished):
    (finished / "checkpoints" / "tmp-00000048").mkdir()
    (finished / "checkpoints" / "tmp-00000048" / "half").write_text("x")
    assert opened(finished) == "step-00000047"
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step-00000047"]
    home = RunDirectory(finished, resume=False)
    assert home.open(Ranks()) is None
    home.close()
    home.close()
    assert not list((finished / "checkpoints").iterdir())


def test_a_refused_resume_lets_go_of_directory_and_signals(finished):
    before = signal.getsignal(signal.SIGTERM)
    home = RunDirectory(finished, {"stage": {"steps": 41, "lr": 9.0}})
    with pytest.raises(ValueError, match="another configuration"):
        Keeper(home, torch.nn.Linear(1, 1), [], None, Counted([]), Ranks()).resume()
    assert signal.getsignal(signal.SIGTERM) == before
    assert opened(finished) == "step-00000047"


def test_the_lowest_score_is_the_best_and_steps_are_due_by_what_was_executed(tmp_path, config):
    home = RunDirectory(tmp_path, every=3, keep=1)
    model = SailVL(config).init_weights(0)
    keeper = Keeper(home, model, [], None, Counted(range(9)), Ranks())
    assert keeper.resume() == {}
    assert keeper.standing() == "there is no checkpoint yet"
    assert [keeper.due(n) for n in (2, 3, 4)] == [False, True, True]
    for executed, score in ((3, 0.5), (6, 0.2), (9, 0.4), (12, None)):
        keeper.save(step=1, executed=executed, score=score)
        assert keeper.finish()
        assert not keeper.due(executed + 2) and keeper.due(executed + 3)
    assert home.best == [0.2, 6]
    assert list(checkpoint.checkpoints(home.folder)) == [6, 12]
    assert "after 12 steps" in keeper.standing()
    keeper.close()

    again = RunDirectory(tmp_path, every=0, keep=1)
    data = Counted(iter(range(9)))
    keeper = Keeper(again, model, [], None, data, Ranks())
    values = keeper.resume()
    assert values["step"] == 1 and values["executed"] == 12 and again.best == [0.2, 6]
    assert not keeper.due(1000) and "after 12 steps" in keeper.standing()
    keeper.close()


def test_a_check_as_good_as_the_best_is_no_better(tmp_path):
    home = RunDirectory(tmp_path)
    assert home.improves(0.5) and not home.improves(None)
    home.best = [0.5, 3]
    assert home.improves(0.4) and not home.improves(0.5) and not home.improves(None)


def test_generators_saved_on_an_accelerator_are_restored_on_a_cpu():
    """Its own generator's state follows the CPU's; here nobody can take it."""
    state, values = get_rng()
    wanted = torch.rand(3)
    set_rng(torch.cat((state, torch.zeros(16, dtype=torch.uint8))), values)
    assert torch.equal(torch.rand(3), wanted)


def test_counted_data_goes_forward_only():
    data = Counted("abcdef")
    assert next(data) == "a" and data.state_dict() == {"drawn": 1}
    data.load_state_dict({"drawn": 3})
    assert next(data) == "d"
    with pytest.raises(AssertionError, match="cannot go back"):
        data.load_state_dict({"drawn": 2})


def test_snapshots_of_a_search_are_saved_with_optimizers_by_name():
    """Each snapshot that there is gets the other form; all else stays, and the search itself too."""
    older = {"step": 3, "rest": {"optimizers": [1, 2], "rng": 7}}
    search = {"rate": 0.1, "older": older, "newer": None}
    changed = with_rests(search, lambda rest: [f"name {number}" for number in rest])
    named = {"step": 3, "rest": {"optimizers": ["name 1", "name 2"], "rng": 7}}
    assert changed == {"rate": 0.1, "older": named, "newer": None}
    assert search["older"]["rest"]["optimizers"] == [1, 2]


def test_a_state_of_step_zero_is_none_the_worse_for_it():
    """A roll-back may begin again at step 0; a negative step is odd."""
    assert odd_state({"step": 0, "executed": 12}, "step-00000012") is None
    assert "step is -1" in odd_state({"step": -1}, "step-00000012")


@pytest.mark.parametrize("come", [True, False])
def test_ranks_that_share_the_weights_save_together_or_not_at_all(monkeypatch, come):
    """Told to stop inside their data: no rank has a whole checkpoint, so all of them must be there."""
    saved = []
    keeper = Keeper.__new__(Keeper)
    keeper.signals = SimpleNamespace(busy=nullcontext)
    keeper.marked = {"step": 3}
    keeper.writers = SimpleNamespace(size=2)
    keeper.ranks = SimpleNamespace(main=False)
    keeper.close = lambda: None
    keeper._save_marked = lambda: saved.append(True)
    monkeypatch.setattr("infra.keeper.parallel.all_come", lambda *_: come)
    with pytest.raises(SystemExit):
        keeper.leave()
    assert saved == [True] * come
