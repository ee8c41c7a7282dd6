"""Several real processes: ranks that differ, that are gone, that outlive their launcher; backends, threads.

Ranks are forked, as `torchrun` would start them: a rendezvous on this machine, gloo between them.
"""

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, answers, made_up
from ranks_helpers import as_ranks, free_port
from test_checkpoint import STAGE, bomb, config, forked, noisy, results, run
from test_house import ROOMS

from infra.checkpoint import checkpoints
from infra.keeper import Keeper
from infra.run_directory import RunDirectory
from infra.stopping import check_stop
from scale import parallel
from train import train
from vlm import SailVL

__all__ = ["config"]  # a fixture of test_checkpoint


@pytest.fixture(scope="module")
def warm(tmp_path_factory, config, tokenizer):
    """What a first step imports is imported here, once, and not in every child."""
    run(tmp_path_factory.mktemp("warm"), config, tokenizer, stage=replace(STAGE, steps=1))


# ----------------------------------------------------------------------------- ranks that differ


def test_every_rank_learns_which_rank_differs_in_what(tmp_path):
    def work(ranks):
        wrong = ranks.rank == 1
        parallel.agree({"options": {"lr": 1.0}, "code": "abc"})
        parallel.agree(
            {
                "options": {"stage": {"lr": 2.0 if wrong else 1.0, "steps": 9}},
                "code": "abc",
                "data": "the same commit with changes " + ("5eed" if wrong else "f00d"),
                "weights": "\x1b[2J" if wrong else "0a",
            }
        )

    said = as_ranks(work, tmp_path, size=3)
    assert said[0] == said[1] == said[2]
    assert said[0].startswith(
        "ValueError: the ranks were not started alike: rank 1 has other options"
    )
    assert "stage.lr 2.0 for 1.0" in said[0] and "steps" not in said[0]
    assert "rank 1 has other weights than rank 0" in said[0] and "\x1b" not in said[0]
    assert "changes 5eed for" in said[0] and "changes f00d)" in said[0]
    assert "code" not in said[0].split("Start all")[0] and "rank 2" not in said[0]


@pytest.mark.parametrize("item", ["options", "data", "weights"])
def test_a_run_whose_ranks_differ_ends_before_its_first_step(tmp_path, config, tokenizer, item):
    def work(ranks):
        other = ranks.rank == 1
        run_config = {"stage": {"lr": 2.0 if other and item == "options" else 1.0}}
        data = "b" if other and item == "data" else "a"
        model = SailVL(config).init_weights(int(other and item == "weights"))
        home = RunDirectory(tmp_path / "run", run_config, data_identity=data)
        Keeper(home, model, [], None, made_up(tokenizer), ranks).resume()

    said = as_ranks(work, tmp_path)
    assert all(f"rank 1 has other {item} than rank 0" in text for text in said)


def test_what_rank_0_refuses_all_ranks_refuse_for_its_reason(tmp_path, config, tokenizer):
    holder = RunDirectory(tmp_path / "run")
    holder.open(parallel.Ranks())

    def work(ranks):
        home = RunDirectory(tmp_path / "run")
        model = SailVL(config).init_weights(0)
        Keeper(home, model, [], None, made_up(tokenizer), ranks).resume()

    assert all("another process is writing here" in text for text in as_ranks(work, tmp_path))
    holder.close()


# ------------------------------------------------------------------------- ranks that are gone


def test_a_rank_that_hangs_is_named_within_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "ROLL_CALL", 0.3)

    def work(ranks):
        parallel.total(1.0)
        if ranks.rank == 1:
            time.sleep(2.5)
            return "slept"
        parallel.total(1.0)

    first, second = as_ranks(work, tmp_path, timeout=1.0)
    assert first.startswith("ConnectionError: rank 0: rank 1 did not take part in a collective")
    assert "waited 1 s" in first and second == "slept"


def test_a_rank_that_ended_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "ROLL_CALL", 0.3)

    def work(ranks):
        if ranks.rank == 1:
            raise ValueError("my own reason")
        parallel.gather([1])

    first, second = as_ranks(work, tmp_path)
    assert "rank 1 did not take part" in first and second == "ValueError: my own reason"


def test_a_rank_that_never_comes_ends_the_others(tmp_path, monkeypatch):
    def work():
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(ConnectionError, match="not all 2 ranks met within 1 s"):
            parallel.start(1.0)

    assert forked(work) == 0


def test_when_its_launcher_is_killed_a_rank_ends(tmp_path):
    """The launcher is a process between this one and the rank, killed without a chance to tell it."""
    note = tmp_path / "rank"

    def launcher():
        if os.fork() == 0:
            parallel.Watcher(every=0.05)
            note.write_text(str(os.getpid()))
            time.sleep(100)
            os._exit(0)
        while not note.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(launcher) == signal.SIGKILL
    rank = int(note.read_text() or 0)
    deadline = time.time() + 20
    while time.time() < deadline and running(rank):
        time.sleep(0.05)
    assert not running(rank)


def running(process: int) -> bool:
    """Whether a process lives; one that nobody has buried yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_rank_that_ignores_its_launchers_death_ends_all_the_same():
    def work():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        real = os.getppid()
        os.getppid = lambda: real
        parallel.Watcher(every=0.01, patience=0.05)
        os.getppid = lambda: 1
        time.sleep(100)

    assert forked(work) == -143


# ------------------------------------------------------------------------ a stop on two ranks


def test_a_signal_to_one_rank_stops_both_after_the_same_step(
    tmp_path, config, tokenizer, warm, capfd
):
    path = tmp_path / "run"

    def work(ranks):
        calls = [0]

        def objective(model, batch, stage):
            calls[0] += 1
            if ranks.rank == 1 and calls[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return answers(model, batch, stage)

        torch.manual_seed(0)
        train(
            SailVL(config).init_weights(0),
            STAGE,
            made_up(tokenizer),
            objective,
            ranks,
            RunDirectory(path),
        )

    assert as_ranks(work, tmp_path) == [143, 143]
    assert list(checkpoints(path / "checkpoints")) == [3]
    assert capfd.readouterr().err.count("told to stop") == 1


class Waits:
    """Data that waits inside its third `next` until it is told to stop."""

    interruptible = True

    def __init__(self, data):
        self.data = data
        self.calls = 0

    def __next__(self):
        self.calls += 1
        torch.rand(3)
        while self.calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            check_stop()
        return next(self.data)

    def state_dict(self):
        return self.data.state_dict()

    def load_state_dict(self, state):
        self.data.load_state_dict(state)


def test_stopped_inside_their_data_ranks_leave_with_the_step_before(
    tmp_path, config, tokenizer, warm
):
    path = tmp_path / "run"

    def work(ranks):
        train(
            SailVL(config).init_weights(0),
            STAGE,
            Waits(made_up(tokenizer)),
            noisy(),
            ranks,
            RunDirectory(path),
        )

    assert as_ranks(work, tmp_path) == [143, 143]
    assert list(checkpoints(path / "checkpoints")) == [2]
    state = json.loads((path / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert len(state["rng"]) == 2


class WaitsForTheOther(Waits):
    """Rank 0 has sampled and waits for rank 1, which still works, when both are told to stop."""

    def __init__(self, data, rank):
        super().__init__(data)
        self.rank = rank

    def __next__(self):
        self.calls += 1
        if self.calls == 3 and self.rank == 0:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            parallel.meet("third", check_stop)
        while self.calls == 3:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)
            check_stop()
        return next(self.data)


def test_stopped_while_it_waits_for_a_slower_rank_rank_0_saves(tmp_path, config, tokenizer, warm):
    path = tmp_path / "run"

    def work(ranks):
        data = WaitsForTheOther(made_up(tokenizer), ranks.rank)
        model = SailVL(config).init_weights(0)
        train(model, STAGE, data, noisy(), ranks, RunDirectory(path))

    assert as_ranks(work, tmp_path) == [143, 143]
    assert list(checkpoints(path / "checkpoints")) == [2]


def test_ranks_agree_on_which_check_was_the_best(tmp_path, config, tokenizer, warm):
    path = tmp_path / "run"
    scores = [0.5, 0.7, 0.4, 0.6]

    def work(ranks):
        saves = []
        write = Keeper.save
        Keeper.save = lambda self, step, *rest: (saves.append(step), write(self, step, *rest))[1]
        home = RunDirectory(
            path, every=0, check=lambda step: {"score": scores[step - 1]}, check_every=1
        )
        model = SailVL(config).init_weights(0)
        train(model, replace(STAGE, steps=4), made_up(tokenizer), noisy(), ranks, home)
        return saves

    assert as_ranks(work, tmp_path, timeout=5.0) == [[1, 3, 4], [1, 3, 4]]


@pytest.mark.slow
def test_two_ranks_killed_in_and_out_of_trials_are_the_two_that_were_not(
    tmp_path, config, tokenizer, warm, monkeypatch
):
    """AdaLRS takes steps back (three steps a trial); both ranks die at once, or one dies and one waits."""

    def life(path: Path, killed: int = 0, only: int | None = None):
        def work(ranks):
            def die():
                if only in (None, ranks.rank):
                    os.kill(os.getpid(), signal.SIGKILL)

            for seed in (torch.manual_seed, random.seed, np.random.seed):
                seed(ranks.rank)
            train(
                SailVL(config).init_weights(0),
                STAGE,
                made_up(tokenizer),
                noisy(bomb(killed, die)),
                ranks,
                RunDirectory(path, every=2),
            )

        return as_ranks(work, tmp_path / "said", timeout=20.0)

    monkeypatch.setattr(parallel, "ROLL_CALL", 0.1)
    assert life(tmp_path / "whole") == [None, None]
    rng = random.Random(0)
    for n in range(8):
        life(tmp_path / "killed", rng.randrange(1, 7), None if n % 2 else n % 4 // 2)
        shutil.rmtree(tmp_path / "said")
    assert life(tmp_path / "killed") == [None, None]
    log, found = results(tmp_path / "killed")
    expected, weights = results(tmp_path / "whole")
    assert len(expected) > STAGE.steps and log == expected
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


# ------------------------------------------------------------------- what ranks do for each other


def test_numbers_objects_gradients_and_divided_work(tmp_path):
    def work(ranks):
        parameter = torch.nn.Parameter(torch.zeros(2))
        if ranks.rank == 0:
            parameter.grad = torch.tensor([1.0, 2.0])
        parallel.sum_gradients([parameter])
        values = [torch.full((n,), float(n)) for n in (1, 2, 3)]
        divided = parallel.divide(values, [1.0, 1.0, 4.0], lambda mine: [v * 10 for v in mine])
        found = [
            parallel.total(0.1, float(ranks.rank)),
            parallel.gather([ranks.rank, "x"]),
            parameter.grad.tolist(),
            [v.tolist() for v in divided],
            parallel.place(),
        ]
        parallel.stop()
        return found

    for rank, said in enumerate(as_ranks(work, tmp_path)):
        assert said[0] == [0.2, 1.0] and said[1] == [0, "x", 1, "x"] and said[2] == [1.0, 2.0]
        assert said[3] == [[10.0], [20.0] * 2, [30.0] * 3] and said[4] == [rank, 2]


def test_ranks_leave_together_and_leave_no_thread_behind(tmp_path):
    def work(ranks):
        if ranks.rank == 0:
            time.sleep(0.3)
            (tmp_path / "done").write_text("late")
        parallel.stop()
        return [(tmp_path / "done").exists(), threading.active_count()]

    assert as_ranks(work, tmp_path) == [[True, 1], [True, 1]]


def test_on_one_node_gloo_listens_on_the_loopback_interface_only(tmp_path):
    def listening() -> list[str]:
        """Local addresses (in hexadecimal) of this process's listening sockets."""
        files = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        links = [os.readlink(file) for file in files if file.is_symlink()]
        own = {link[8:-1] for link in links if link.startswith("socket:[")}
        rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in own]

    def work(ranks):
        parallel.total(1.0)
        found = listening()
        parallel.stop()
        return found, os.environ["GLOO_SOCKET_IFNAME"]

    # rank 0 holds the rendezvous as well, which under torchrun is torchrun's own
    addresses, interface = as_ranks(work, tmp_path)[1]
    assert addresses and set(addresses) == {"0100007F"} and interface.startswith("lo")


def test_one_process_needs_none_of_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = parallel.start(7.0)
    assert (ranks.rank, ranks.size, ranks.main, ranks.timeout) == (0, 1, True, 7.0)
    assert parallel.total(1.0, 2.0) == [1.0, 2.0] and parallel.gather([3]) == [3]
    parallel.agree({"options": {"a": object()}})
    parallel.stop()
    assert not dist.is_initialized()


def test_without_a_rendezvous_of_ours_there_are_no_notes(monkeypatch):
    monkeypatch.setattr(parallel, "_meeting", parallel.Meeting())
    assert "another rank did not take part" in parallel.missing_ranks()
    parallel.leave_note("x")
    assert not parallel.wait_for_note("x", 0.1)


def test_a_rendezvous_that_is_gone_is_said(monkeypatch):
    class Gone:
        def set(self, *_):
            raise RuntimeError("connection refused")

        def wait(self, *_):
            raise RuntimeError("connection refused")

    monkeypatch.setattr(parallel, "_meeting", parallel.Meeting(Gone(), 5.0))
    assert "the launcher is gone" in parallel.missing_ranks()
    assert not parallel.wait_for_note("x", 0.1)
    with pytest.raises(ConnectionError, match=r"waited 5 s at the most; first\)$"):
        with parallel.named_failure():
            raise RuntimeError("first\nsecond")


def test_torchrun_finds_the_reason_in_its_file(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    parallel.report_failure(ValueError("nobody asks"))
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "3")
    parallel.report_failure(ValueError("bad\x1b[2J"))
    message = json.loads(file.read_text())["message"]
    assert message["message"] == "rank 3: bad\\x1b[2J"
    assert int(message["extraInfo"]["timestamp"]) > 0
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    parallel.report_failure(ValueError("no room"))


# ------------------------------------------------------------------------ threads and backends


@pytest.mark.parametrize(
    "environment, processors, threads",
    [
        ({}, 6, 6),
        ({"LOCAL_WORLD_SIZE": "2"}, 6, 3),
        ({"LOCAL_WORLD_SIZE": "8"}, 6, 1),
        ({"OMP_NUM_THREADS": "5"}, 6, None),
    ],
)
def test_threads_follow_the_affinity_and_the_users_own_number(
    monkeypatch, environment, processors, threads
):
    asked = []
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    parallel.use_own_processors()
    assert asked == ([] if threads is None else [threads])


PRETENDED = """
import os, sys, types, warnings
from pathlib import Path
import torch, torch.distributed as dist
warnings.filterwarnings("ignore")

# an accelerator named npu, whose transport hccl refuses everything that lies on the CPU
torch.utils.rename_privateuse1_backend("npu")
module = types.ModuleType("npu")
module.is_available = lambda: True
module.device_count = lambda: 8
module.current_device = lambda: 0
module.is_initialized = lambda: True
module._is_in_bad_fork = lambda: False
module.get_amp_supported_dtype = lambda: [torch.bfloat16]
seeds = []
module.manual_seed_all = seeds.append
module.get_rng_state = lambda: torch.tensor([seeds[-1]], dtype=torch.uint8)
module.set_rng_state = lambda state: seeds.append(int(state))
torch._register_device_module("npu", module)
make = lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout)
dist.Backend.register_backend("hccl", make, devices=["npu"])
torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda *a, **k: torch.device("npu")
torch.accelerator.set_device_index = lambda index: print("index", index)
torch._C._get_accelerator = lambda *a: torch.device("npu")

# through start with a mesh, sums, gather, seeding, a step's precision, and a checkpoint
from infra.keeper import Keeper, get_rng, set_rng
from infra.run_directory import RunDirectory
from scale import parallel
from scale.layout import Layout
from stage import Stage
from train import autocast
from vlm import PRESETS, SailVL
ranks = parallel.start(30, Layout(half=True))
print(ranks.device, dist.get_backend_config(), parallel.total(1.5, 2.0), parallel.gather(["a"]))
print(ranks.mesh["dense"].device_type, [ranks.mesh[axis].size() for axis in ("pp", "copy", "shard")])
torch.manual_seed(7)
saved = get_rng()
torch.manual_seed(8)
set_rng(*saved)
print("seeds", seeds, autocast(Stage(), ranks.device).fast_dtype)
class Data(list):
    state_dict = load_state_dict = lambda self, *_: {}
def keeper():
    home = RunDirectory(Path(sys.argv[1]))
    return Keeper(home, SailVL(PRESETS["toy"]).init_weights(0), [], None, Data(), ranks)
first = keeper()
first.resume()
first.save(3, 3)
first.close()
print("resumed at", keeper().resume()["step"])
parallel.stop()
"""


def test_the_backend_of_a_device_has_gloo_for_what_lies_on_the_cpu():
    assert parallel.backend_for("cpu") == "gloo"
    assert parallel.backend_for("cuda") == "cpu:gloo,cuda:nccl"


@pytest.mark.slow
def test_beside_an_accelerators_own_transport_the_cpu_has_gloo(tmp_path):
    """Every accelerator run under torchrun ended at its first sum: no backend for device type cpu."""
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PRETENDED, str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "index 3" in done.stdout
    assert "npu:3 cpu:gloo,npu:hccl [1.5, 2.0] ['a']\nnpu [1, 1, 1]" in done.stdout
    assert "seeds [7, 8, 7] torch.bfloat16" in done.stdout
    assert "resumed at 3" in done.stdout


def test_no_kind_of_device_and_no_transport_is_named_where_it_is_not_the_subject():
    """`.cuda()` is for one kind, and a backend by name ("nccl") is another kind's crash."""
    about_it = {"kernels/bench.py", "kernels/offline.py"}
    for file in (*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).glob("*.py"))):
        if str(file.relative_to(ROOT)) not in about_it:
            code = ast.unparse(ast.parse(file.read_text()))
            assert ".cuda(" not in code and "torch.cuda." not in code, file
            assert "'nccl'" not in code and "get_backend()" not in code, file


# ------------------------------------------------------------------------------------ torchrun

FAILS = """
from infra.cli import one_line_errors
from scale import parallel

def work():
    ranks = parallel.start(30)
    if ranks.rank == 1:
        raise ValueError("samples.jsonl: no such file\\x1b[2J")
    parallel.total(1.0)

with one_line_errors():
    work()
"""


@pytest.mark.slow
def test_behind_torchrun_the_failing_ranks_own_message_comes_last(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    last = done.stderr[-1000:]
    assert "rank 1: samples.jsonl: no such file" in last and "\x1b" not in last


def test_ranks_that_meet_wait_for_all_of_this_life_and_not_for_ever(monkeypatch):
    notes = {"sampled 0 0": "yes", "sampled 0 1": "yes"}  # of the life before

    class Store:
        set = staticmethod(notes.__setitem__)
        check = staticmethod(lambda names: all(name in notes for name in names))

    asked = []

    def each():
        asked.append(len(asked))
        assert len(asked) < 500, "it waits for ever"
        if len(asked) == 3:
            notes["sampled 1 1"] = "yes"  # the other one comes

    monkeypatch.setattr(parallel, "place_of_all", lambda: (0, 2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(parallel, "_meeting", parallel.Meeting(Store(), 30.0))
    parallel.meet("sampled", each, every=0.01)
    assert len(asked) == 3

    # who does not come is named by the next collective
    monkeypatch.setattr(parallel, "_meeting", parallel.Meeting(Store(), 0.1))
    parallel.meet("trained", each, every=0.01)
    assert 3 < len(asked) < 20


def test_more_ranks_than_devices_is_an_error_that_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.own_device("cpu") == "cpu"
    with pytest.raises(
        ValueError, match="rank 1 .* no cuda device of its own, there are 1: torchrun"
    ):
        parallel.own_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert parallel.own_device("cuda") == "cuda:0"
