"""The log, the tracker, and what is printed: none of them may end a run, or mislead its reader."""

import errno
import json
import math
import os
import sys
import types
from dataclasses import dataclass

import pytest

from infra import journal, tracker
from infra.checkpoint import announce
from infra.journal import Journal, LogFile, kept, read_log
from infra.run_directory import RunDirectory
from infra.text import printable


@dataclass
class AStage:
    name: str = "x"
    steps: int = 10


def row(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "lr": 0.1, "skipped": not math.isfinite(loss)}


def strict(text: str):
    """JSON as others read it: NaN and Infinity are errors."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


# --------------------------------------------------------------------------------- the file


def test_a_loss_that_is_not_finite_is_null_and_comes_back_as_nan(tmp_path):
    log = Journal(AStage(), tmp_path, True)
    for loss in (1.5, math.nan, math.inf):
        log.write(row(0, loss) | {"tasks": {"vqa": loss}, "grad_norms": [loss]}, 1)
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [strict(line)["loss"] for line in lines] == [1.5, None, None]
    rows = read_log(tmp_path / "log.jsonl")
    assert math.isnan(rows[1]["loss"]) and math.isnan(rows[2]["tasks"]["vqa"])
    assert math.isnan(rows[1]["grad_norms"][0])

    # a resumed run leaves every byte as it is
    before = (tmp_path / "log.jsonl").read_bytes()
    Journal(AStage(), tmp_path, True, 3, 3).close()
    assert (tmp_path / "log.jsonl").read_bytes() == before


class Full:
    """A stream behind which the disk is full, or which is closed."""

    encoding = "utf-8"

    def __init__(self, error: Exception):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), ValueError("I/O operation on closed file")]
)
def test_a_terminal_that_fails_ends_no_run(tmp_path, monkeypatch, error):
    """`pretrain.py > out.txt` on a disk that is full: progress bar and warnings met the error."""
    monkeypatch.setattr(sys, "stderr", Full(error))
    log = Journal(AStage(), tmp_path, True)
    log.bar.mininterval = 0
    for step in range(3):
        log.write(row(step), step + 1)
    log.close()
    announce("said to nobody")
    monkeypatch.undo()
    assert len(read_log(tmp_path / "log.jsonl")) == 3


def test_a_fresh_run_has_nothing_to_say_about_an_earlier_log(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("an earlier run's\n")
    log = Journal(AStage(), tmp_path / "new", True)
    again = Journal(AStage(), tmp_path, True)
    said = capsys.readouterr().err
    assert "LOG" not in said and "cannot be read" not in said
    assert log.rows == again.rows == [] and (tmp_path / "log.jsonl").read_text() == ""
    assert json.loads((tmp_path / "stage.json").read_text()) == {"name": "x", "steps": 10}


def test_only_the_main_rank_writes_and_all_ranks_remember(tmp_path):
    log = Journal(AStage(), tmp_path, False)
    log.write(row(0), 1)
    log.sync()
    log.close()
    assert len(log.rows) == 1 and not list(tmp_path.iterdir())


def test_the_seconds_left_follow_the_pace_of_this_process(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    log = Journal(AStage(steps=10), tmp_path, True)
    for n in range(2):
        clock[0] += 3.0
        log.write(row(n), n + 1)
    assert [r["eta"] for r in log.rows] == [27.0, 24.0]
    log.close()


def test_a_resumed_log_is_cut_back_to_what_its_checkpoint_knew(tmp_path):
    log = Journal(AStage(), tmp_path, True)
    for n in range(5):
        log.write(row(n), n + 1)
    log.close()
    again = Journal(AStage(), tmp_path, True, 2, 2)
    again.write(row(2), 3)
    again.close()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("bad", [b"{gar\xffbled", b"[1, 2]", b"null", b"", b"[" * 50_000])
def test_a_garbled_line_costs_that_line(tmp_path, bad, capsys):
    file = tmp_path / "log.jsonl"
    lines = [json.dumps(row(n)).encode() for n in range(4)]
    lines[1] = bad
    file.write_bytes(b"\n".join(lines) + b"\n")
    rows = kept(file, 4)
    assert [r["step"] for r in rows] == [0, -1, 2, 3]
    assert "1 of the first 4 lines" in capsys.readouterr().err
    assert rows[1]["skipped"] is False and math.isnan(rows[1]["loss"])
    LogFile(file, rows).close()
    assert all(strict(line) for line in file.read_text().splitlines())


def test_a_log_that_is_gone_costs_its_lines_and_not_the_run(tmp_path, capsys):
    assert len(kept(tmp_path / "none.jsonl", 3)) == 3
    said = capsys.readouterr().err
    assert "cannot be read" in said and "3 of the first 3 lines" in said


def test_a_full_disk_is_said_once_and_the_log_is_complete_in_the_end(tmp_path, monkeypatch, capsys):
    log = Journal(AStage(), tmp_path, True)
    real = journal.write_all
    full = [True]

    def half(file, data):
        """Half of the bytes arrive before the disk is full."""
        if full[0]:
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    log.write(row(0), 1)
    monkeypatch.setattr(journal, "write_all", half)
    for n in range(1, 4):
        log.write(row(n), n + 1)
    log.sync()
    said = capsys.readouterr().err
    assert said.count("LOG NOT WRITTEN") == 1 and "(No space left on device)" in said
    full[0] = False
    log.write(row(4), 5)
    assert "complete" in capsys.readouterr().err
    log.close()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3, 4]
    assert len(log.rows) == 5


def test_a_log_that_cannot_be_opened_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "log.jsonl").mkdir()
    (tmp_path / "stage.json").mkdir()
    log = Journal(AStage(), tmp_path, True)
    log.write(row(0), 1)
    log.sync()
    log.close()
    assert capsys.readouterr().err.count("LOG NOT WRITTEN") == 1 and len(log.rows) == 1


def test_a_disk_that_cannot_sync_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    log = Journal(AStage(), tmp_path, True)
    monkeypatch.setattr(os, "fsync", broken)
    log.sync()
    assert "Input/output error" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- tracker


@pytest.mark.parametrize("name", ["tensorboard", "no_such_tracker", "no.such.tracker", ".x"])
def test_a_tracker_that_is_not_there_is_refused_with_the_line_that_installs_it(
    tmp_path, name, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="pip install"):
        RunDirectory(tmp_path, tracker=name)
    with pytest.raises(ValueError, match="pip install"):
        tracker.open_tracker(name, tmp_path, {})


def fake(monkeypatch, name: str, **members) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_module_with_init_and_log_learns_the_runs_name_from_out(tmp_path, monkeypatch):
    told = []
    fake(
        monkeypatch,
        "mytracker",
        init=lambda **words: told.append(words),
        log=lambda r, step: told.append((r["step"], step)),
        finish=lambda: told.append("end"),
    )
    home = RunDirectory(tmp_path / "mine", {"a": 1}, tracker="mytracker")
    log = Journal(AStage(), home, True)
    log.write(row(0), 1)
    log.close()
    assert told == [{"project": "nanosail", "name": "mine", "config": {"a": 1}}, (0, 1), "end"]


def test_a_module_without_init_is_refused(tmp_path, monkeypatch):
    fake(monkeypatch, "mytracker")
    with pytest.raises(ValueError, match="no functions init and log"):
        tracker.open_tracker("mytracker", tmp_path, {})


def test_tensorboard_gets_every_number_of_a_row(tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, log_dir):
            told.append(log_dir)

        def add_scalar(self, *words):
            told.append(words)

        def close(self):
            told.append("end")

    fake(monkeypatch, "tensorboard")
    fake(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    shown = tracker.open_tracker("tensorboard", tmp_path, {})
    shown.log({"loss": 2, "tasks": {"vqa": 0.5}, "said": ["no number"]}, 7)
    shown.close()
    assert told == [str(tmp_path / "tensorboard"), ("loss", 2.0, 7), ("tasks/vqa", 0.5, 7), "end"]


def test_a_tracker_that_fails_is_said_once_and_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no network\x1b[2J")

    fake(monkeypatch, "mytracker", init=lambda **_: None, log=broken, finish=broken)
    log = Journal(AStage(), RunDirectory(tmp_path, tracker="mytracker"), True)
    log.write(row(0), 1)
    log.write(row(1), 2)
    log.close()
    said = capsys.readouterr().err
    assert said.count("TRACKER FAILED") == 1 and "\x1b" not in said.replace("\x1b[A", "")
    assert len(read_log(tmp_path / "log.jsonl")) == 2


# ---------------------------------------------------------------------------------- printing


def test_nothing_that_a_terminal_obeys_is_printed():
    assert printable("red\x1b[2Jcar\x07\r\n") == "red\\x1b[2Jcar\\x07\\r\\n"
    assert printable("a\u202eb\u2028c\x9bd\udc80") == "a\\u202eb\\u2028c\\x9bd\\udc80"
    assert printable("two\nlines\tof text", lines=True) == "two\nlines\tof text"
    assert printable("中文, café, 👩\u200d🚀") == "中文, café, 👩\u200d🚀"
    assert printable(3) == "3"
