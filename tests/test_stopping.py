"""Told to stop: in a trial, in the middle of a step, while nothing answers, twice, and on a full disk.

The signals are real, and so are the processes that they are sent to.
"""

import os
import signal
import time

import pytest
import torch
from conftest import answers, made_up
from test_checkpoint import STAGE, STEPS, bomb, config, forked, results, run, whole

from infra.checkpoint import checkpoints
from infra.keeper import Keeper
from infra.run_directory import RunDirectory
from infra.stopping import StopRequested, StopSignals, check_stop
from scale.parallel import Ranks
from stage import Stage
from train import train
from vlm import SailVL

__all__ = ["config", "whole"]  # fixtures of test_checkpoint


def tell(number: int = signal.SIGTERM):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


class Slow:
    """Data that works for long inside `next`, as rollouts do, and asks now and then whether to stop.

    at: the call in which the signal comes. Draws at random, so that generators must go back as well.
    """

    def __init__(self, data, at: int = 0, interruptible: bool = True):
        self.data = data
        self.at = at
        self.interruptible = interruptible
        self.calls = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.calls += 1
        batches = next(self.data)
        for _ in range(3):
            torch.rand(7)
            if self.calls == self.at:
                tell()()
            check_stop()
        return batches

    def state_dict(self) -> dict:
        return self.data.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.data.load_state_dict(state)


def slow_run(path, config, tokenizer, at: int = 0, interruptible: bool = True) -> None:
    torch.manual_seed(0)
    train(
        SailVL(config).init_weights(0),
        STAGE,
        Slow(made_up(tokenizer), at, interruptible),
        noisy_torch(),
        directory=RunDirectory(path, {"a": 1}),
    )


def noisy_torch():
    """Only torch's generator: Python's and numpy's are not seeded here."""

    def objective(model, batch, stage):
        batch.weights = batch.weights * (torch.rand_like(batch.weights) < 0.7)
        return answers(model, batch, stage)

    return objective


# -------------------------------------------------------------------------- after a step


@pytest.mark.slow
def test_a_preemption_period_shorter_than_a_trial_makes_progress(
    tmp_path, config, tokenizer, whole
):
    """Two steps a life; trials take three."""
    lives = 0
    status = -143
    while status == -143:
        lives += 1
        status = forked(lambda: run(tmp_path, config, tokenizer, bomb(2, tell()), every=0))
        assert len(checkpoints(tmp_path / "checkpoints")) <= 2
    assert status == 0
    assert lives <= len(whole[0]) // 2 + 1
    log, found = results(tmp_path)
    assert log == whole[0]
    assert all(torch.equal(t, whole[1][name]) for name, t in found.items())


def test_told_to_stop_in_a_trial_the_state_of_the_trial_is_saved(
    tmp_path, config, tokenizer, whole
):
    """At every executed step of the first trial."""
    steps = [eval(row)[0] for row in whole[0]]
    back = next(n for n in range(1, len(steps)) if steps[n] <= steps[n - 1])
    told = bomb(back + 2, tell())
    assert forked(lambda: run(tmp_path, config, tokenizer, told, every=4)) == -143
    newest = list(checkpoints(tmp_path / "checkpoints"))[-1]
    assert newest == back + 2
    assert forked(lambda: run(tmp_path, config, tokenizer, every=4)) == 0
    assert results(tmp_path)[0] == whole[0]


def test_a_checkpoint_of_the_last_executed_steps_always_exists(
    tmp_path, config, tokenizer, monkeypatch
):
    seen = []
    real = RunDirectory.begin

    def begin(self, executed, *rest):
        seen.append(executed)
        return real(self, executed, *rest)

    monkeypatch.setattr(RunDirectory, "begin", begin)
    result, _ = run(tmp_path, config, tokenizer, every=3)
    assert len(result.log) > STEPS
    assert seen == [*range(3, len(result.log), 3), len(result.log)]
    assert list(checkpoints(tmp_path / "checkpoints")) == seen[-2:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_write_a_checkpoint_and_say_so(tmp_path, config, tokenizer, number, capfd):
    told = bomb(3, tell(number))
    assert forked(lambda: run(tmp_path, config, tokenizer, told, every=0)) == -143
    assert list(checkpoints(tmp_path / "checkpoints")) == [3]
    said = capfd.readouterr().err
    assert "(3 executed) written in" in said and "NO CHECKPOINT" not in said


def test_written_is_said_only_of_what_was_written(tmp_path, config, tokenizer, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infra.run_directory.commit", full)
    told = bomb(3, tell())
    assert forked(lambda: run(tmp_path, config, tokenizer, told, every=0)) == -143
    said = capfd.readouterr().err
    assert "NO CHECKPOINT of step" in said
    assert "there is no checkpoint yet" in said


# ------------------------------------------------------------------------ inside a step


def test_stopped_inside_its_data_a_run_goes_back_to_the_step_before(tmp_path, config, tokenizer):
    whole_path = tmp_path / "whole"
    path = tmp_path / "stopped"
    assert forked(lambda: slow_run(whole_path, config, tokenizer)) == 0
    assert forked(lambda: slow_run(path, config, tokenizer, at=1)) == -143
    assert forked(lambda: slow_run(path, config, tokenizer, at=6)) == -143
    assert list(checkpoints(path / "checkpoints"))[-1] == 5
    assert forked(lambda: slow_run(path, config, tokenizer)) == 0
    assert results(path)[0] == results(whole_path)[0]


def test_data_that_cannot_go_back_leaves_the_last_checkpoint(tmp_path, config, tokenizer, capfd):
    status = forked(lambda: slow_run(tmp_path, config, tokenizer, at=4, interruptible=False))
    assert status == -143
    assert "there is no checkpoint yet" in capfd.readouterr().err
    assert not checkpoints(tmp_path / "checkpoints")


def stuck(path, config, tokenizer, work) -> None:
    """A run whose third step never comes; a signal is sent before it."""

    def data():
        source = made_up(tokenizer)
        yield next(source)
        yield next(source)
        tell()()
        work()

    train(
        SailVL(config).init_weights(0),
        STAGE,
        data(),
        noisy_torch(),
        directory=RunDirectory(path, every=1, grace=0.3),
    )


def spin() -> None:
    while True:
        pass


def wait_in_c() -> None:
    """The main thread never comes back to Python: no handler written in Python can run."""
    import ctypes

    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(1000)


@pytest.mark.parametrize("work", [spin, lambda: time.sleep(1000), wait_in_c])
def test_a_run_that_cannot_answer_ends_within_its_grace(tmp_path, config, tokenizer, work, capfd):
    assert forked(lambda: stuck(tmp_path, config, tokenizer, work)) == -143
    assert "the checkpoint after 2 steps" in capfd.readouterr().err


def test_a_step_that_takes_long_is_given_twice_its_time_but_not_more_than_launchers_give(
    tmp_path, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    keeper = Keeper(RunDirectory(tmp_path), None, [], None, None, Ranks())
    graces = []
    for seconds in (1, 10, 100, 1):
        clock[0] += seconds
        assert not keeper.told_to_stop()
        graces.append(keeper.signals.grace)
    keeper.close()
    assert graces == [8.0, 20.0, 25.0, 8.0]


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_changes_nothing():
    def work():
        listener = StopSignals(100.0, str)
        for number in (signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert listener.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(100)

    assert forked(work) == signal.SIGINT


def test_a_stop_is_no_fault_of_a_record_and_signals_mean_again_what_they_did():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    check_stop()
    listener = StopSignals(100.0, str)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StopRequested):
        try:
            check_stop()
        except Exception:
            raise AssertionError("swallowed")
    listener.close()
    listener.close()
    check_stop()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_forked_child_dies_of_sigterm_and_its_parent_hears_nothing():
    def work():
        listener = StopSignals(100.0, str)
        child = os.fork()
        if child == 0:
            time.sleep(100)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.1)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert listener._timer is None and not listener.requested

    assert forked(work) == 0


@pytest.mark.parametrize("told_in, checked", [("step", 1), ("check", 2)])
def test_told_to_stop_around_a_check_it_leaves_after_that_step(
    tmp_path, config, tokenizer, whole, told_in, checked
):
    """Told in a step, it begins no check; told in a check, it trains no further step."""

    def tell(place, number):
        if place == told_in and number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def work():
        steps = []

        def objective(model, batch, stage):
            steps.append(1)
            tell("step", len(steps))
            return answers(model, batch, stage)

        def check(step):
            with open(tmp_path / "checks", "a") as file:
                file.write(f"{step}\n")
            tell("check", step)
            return {"score": 1.0}

        home = RunDirectory(tmp_path / "run", every=0, check=check, check_every=1)
        stage = Stage("x", ("adapter", "llm"), steps=4, rows=2, length=128)
        train(SailVL(config).init_weights(0), stage, made_up(tokenizer), objective, directory=home)

    assert forked(work) == -143
    assert (tmp_path / "checks").read_text().split() == ["1", "2"][:checked]
    assert max(checkpoints(tmp_path / "run" / "checkpoints")) == 2
