"""Weights and training state of sharded models, to disk and back: any layout saves, any other loads.

Protects: what is read is what was written, to the last bit, however it was cut; every rank reads its part
and no more; checkpoints of earlier versions load; a rank that dies or a disk that is full on one rank costs
one checkpoint.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ranks_helpers import STAGE, SameRows, as_ranks, exact_logprobs, far
from safetensors.torch import load_file, save_file

import vit
import vlm
from infra import checkpoint, weights
from infra.checkpoint import Draft, checkpoints, fault, lacks, latest, seal
from infra.keeper import Keeper, with_rests
from infra.run_directory import RunDirectory
from infra.stopping import check_stop
from optim import make_optimizers
from scale import parallel, shards
from scale.layout import Layout
from scale.parallel import Ranks
from scale.shard import shard_model
from scale.shards import Box, Names, Writers
from train import rate_search, train
from vlm import TOY_MOE, SailVL

# AdaLRS goes back after three steps: a trial is in progress at the checkpoint that is loaded
SEARCHED = replace(STAGE, steps=12, adalrs=True, adalrs_k=3, adalrs_window=(0.0, 0.9))
AT = 4
LAYOUTS = {
    "plain": Layout(),
    "zero 3": Layout(shard=4),
    "zero 2": Layout(shard=4, zero=2),
    "copies": Layout(copies=2, shard=2),
    "ep 2": Layout(shard=4, ep=2),
    "ep 2, copies": Layout(copies=2, shard=2, ep=2),
    "pp 2": Layout(pp=2, shard=2),
}


@pytest.fixture(scope="module")
def small(config):
    """A mixture of experts of two layers."""
    text = replace(
        TOY_MOE,
        vocab_size=448,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=32,
    )
    vision = replace(config.vision, hidden_size=48, intermediate_size=64, num_hidden_layers=1)
    return replace(config, text=text, vision=vision)


class Enough(Exception):
    """Nothing more is to be seen: no further checkpoint is needed."""


class FewRows(SameRows):
    """The data ends two steps after the checkpoint, or breaks off."""

    ends: type[Exception] = StopIteration

    def __next__(self):
        if self.step == AT + 2:
            raise self.ends
        return super().__next__()


def life(ranks, config, tokenizer, path: Path, model=None, ends: type[Exception] = StopIteration):
    """A run in doubles in this directory, from the checkpoint that is there; its model and its losses."""
    vlm.token_logprobs = exact_logprobs
    if model is None:
        model = SailVL(config).init_weights(0).double()
    model = shard_model(model, ranks)
    data = FewRows(tokenizer, ranks, dtype=torch.float64)
    data.ends = ends
    try:
        train(model, SEARCHED, data, ranks=ranks, directory=RunDirectory(path, every=AT, keep=9))
    except Enough:
        parallel.total(0.0, everyone=True)
    rows = (path / "log.jsonl").read_text().splitlines()
    return model, [json.loads(row)["loss"] for row in rows]


def forget(path: Path) -> None:
    """As if the run had been killed after the checkpoint at AT."""
    for number, directory in checkpoints(path / "checkpoints").items():
        if number > AT:
            shutil.rmtree(directory)


# ------------------------------------------------------------------------------------- the matrix


@pytest.mark.slow
def test_every_layout_goes_on_from_every_layouts_checkpoint(tmp_path, small, tokenizer, capfd):
    """The losses that follow are those of the run that was not interrupted, in doubles to the last bits."""
    _, expected = life(Ranks(), small, tokenizer, tmp_path / "one process")
    forget(tmp_path / "one process")
    saved = ["one process", *LAYOUTS]

    def on(layout: Layout):
        parallel._meeting.rows = None
        return parallel.start(60.0, layout)

    def save(ranks):
        logs = {}
        for name, layout in LAYOUTS.items():
            _, logs[name] = life(on(layout), small, tokenizer, tmp_path / name)
            if ranks.main:
                forget(tmp_path / name)
        return logs

    for logs in as_ranks(save, tmp_path / "said", 4, 60.0):
        assert isinstance(logs, dict), logs
        for name, losses in logs.items():
            assert len(losses) == len(expected) == AT + 2
            assert far({"loss": losses}, {"loss": expected}, "loss") < 1e-12, name

    def load(ranks):
        found = {}
        for name, layout in LAYOUTS.items():
            model = None
            for source in saved:
                path = tmp_path / f"{source} as {name}"
                if ranks.main:
                    shutil.copytree(tmp_path / source, path)
                parallel.total(0.0, everyone=True)
                model, found[path.name] = life(on(layout), small, tokenizer, path, model, Enough)
        return found

    resumed = {}
    for found in as_ranks(load, tmp_path / "said again", 4, 60.0):
        assert isinstance(found, dict), found
        resumed |= found
    for source in saved:
        path = tmp_path / f"{source} as one process"
        shutil.copytree(tmp_path / source, path)
        _, resumed[path.name] = life(Ranks(), small, tokenizer, path, ends=Enough)

    # Nothing was begun again, and nothing refused
    assert len(resumed) == len(saved) ** 2
    said = capfd.readouterr().out
    assert [name for name in resumed if f"{name}/checkpoints/step-{AT:08d} (code" not in said] == []
    assert not list(tmp_path.glob("*/checkpoints/broken-*"))
    rest = {"loss": expected[AT:]}
    distances = {name: far({"loss": losses[AT:]}, rest, "loss") for name, losses in resumed.items()}
    worst = max(distances, key=distances.get)
    assert distances[worst] < 1e-14, (worst, distances[worst])


def test_what_another_rank_wrote_counts_also_when_it_is_read_late(tmp_path, monkeypatch):
    draft = Draft(tmp_path, 4, Writers.among(Ranks()), {}, patience=0.0)
    monkeypatch.setattr(parallel, "read_note", lambda name: '[{"a": 1}, ""]')
    assert draft.word_of(1) == [{"a": 1}, ""]
    monkeypatch.setattr(parallel, "read_note", lambda name: None)
    draft.parts = [({}, ""), ({"b": 2}, "")]
    assert draft.word_of(1) == ({"b": 2}, "")
    draft.parts = None
    assert "not written after 0 s" in draft.word_of(1)[1]


# ------------------------------------------------------------------------------------ two ranks


def poisoned(released: Path, copy: Path) -> None:
    """One value of the last file, which rank 1 alone holds, is no number."""
    shutil.copytree(released, copy)
    last = sorted(copy.glob("model-*"))[-1]
    tensors = load_file(last)
    max(tensors.values(), key=len)[-1] = float("nan")
    save_file(tensors, last, {"format": "pt"})


@pytest.mark.parametrize("layout", [Layout(shard=2, ep=2), Layout(pp=2)], ids=["shards", "stages"])
def test_released_files_from_two_ranks_and_straight_into_their_shards(tmp_path, small, layout):
    """The tensors that one process writes, bit for bit; each rank reads what it keeps; a fault is both's."""
    released = tmp_path / "released"

    def work(ranks):
        model = shard_model(SailVL(small).init_weights(3), ranks)
        shards.save_released(model, released, ranks, file_bytes=1 << 17)
        with torch.device("meta"):
            twin = shard_model(SailVL(small), ranks)
        read = shards.materialise(twin, released)
        same = [
            torch.equal(parallel.local(a), parallel.local(b))
            for a, b in zip(twin.parameters(), model.parameters(), strict=True)
        ]

        # What one refuses
        if ranks.main:
            poisoned(released, tmp_path / "poisoned")
        parallel.total(0.0)
        with pytest.raises(ValueError) as refused:
            shards.read_weights(twin, tmp_path / "poisoned")
        parallel.stop()
        return [read, len(same), all(same), str(refused.value)]

    first, second = as_ranks(work, tmp_path, layout=layout)
    one = SailVL(small).init_weights(3)
    size = sum(p.numel() * 4 for p in one.parameters())
    assert first[2] and second[2] and first[0] + second[0] == size
    assert first[3] == second[3] and "holds values that are not finite numbers" in first[3]
    assert layout.pp > 1 or abs(first[0] - second[0]) < 0.1 * size

    whole = SailVL.from_pretrained(released)
    assert len(list(released.glob("model-*"))) > 4
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), one.state_dict().values())
    )


@pytest.mark.slow
def test_a_full_disk_of_one_rank_costs_one_checkpoint_and_no_rendezvous_costs_none(
    tmp_path, small, tokenizer, capfd
):
    def work(ranks):
        # The first checkpoint does not fit on rank 1's disk
        real = checkpoint.save_file

        def full(*_):
            checkpoint.save_file = real
            raise OSError(28, "No space left on device")

        if ranks.rank == 1:
            checkpoint.save_file = full
        life(ranks, small, tokenizer, tmp_path / "full")

        # Ranks tell each other at the next meeting that they have written when they can leave no notes
        parallel._meeting.store = None
        life(ranks, small, tokenizer, tmp_path / "alone")

    assert as_ranks(work, tmp_path, layout=Layout(shard=2)) == [None, None]
    said = capfd.readouterr().err
    assert said.count("NOT WRITTEN") == 1
    assert f"NOT WRITTEN after {AT} steps (rank 1: [Errno 28] No space left on device)" in said
    assert list(checkpoints(tmp_path / "full" / "checkpoints")) == [AT + 2]
    assert list(checkpoints(tmp_path / "alone" / "checkpoints")) == [AT, AT + 2]
    for number in (AT, AT + 2):
        written = tmp_path / "alone" / "checkpoints" / f"step-{number:08d}"
        assert fault(written) is None and fault(written, 1, 2) is None
        names = {path.name for path in written.iterdir()}
        assert lacks("state", names) is None and lacks("model", names) is None
        (written / "state-00002-of-00002.safetensors").unlink()
        assert "state-00002-of-00002.safetensors is missing" == fault(written)


@pytest.mark.slow
def test_a_rank_that_dies_while_all_copy_is_named_and_nobody_waits_for_its_part(
    tmp_path, small, tokenizer, monkeypatch
):
    monkeypatch.setattr(parallel, "ROLL_CALL", 0.3)
    monkeypatch.setattr("infra.run_directory.LAST_WORDS", 0.3)

    def work(ranks):
        signal.alarm(60)
        if ranks.rank == 1:
            shards.own_state = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        life(ranks, small, tokenizer, tmp_path / "run")

    first, second = as_ranks(work, tmp_path, layout=Layout(shard=2))
    assert second == -signal.SIGKILL
    assert "rank 1 did not take part in a collective" in first
    assert not checkpoints(tmp_path / "run" / "checkpoints")


class Told(SameRows):
    """Data that is told to stop inside its third `next`, one rank later than the other."""

    interruptible = True

    def __next__(self):
        if self.step == 2:
            time.sleep(0.3 * self.ranks.rank)
            os.kill(os.getpid(), signal.SIGTERM)
            check_stop()
        return super().__next__()


def test_told_to_stop_inside_their_data_the_ranks_of_a_sharded_model_save_together(
    tmp_path, small, tokenizer
):
    def work(ranks):
        model = shard_model(SailVL(small).init_weights(0), ranks)
        home = RunDirectory(tmp_path / "run", every=1)
        train(model, STAGE, Told(tokenizer, ranks), ranks=ranks, directory=home)

    assert as_ranks(work, tmp_path, layout=Layout(shard=2)) == [143, 143]
    assert list(checkpoints(tmp_path / "run" / "checkpoints")) == [1, 2]
    assert latest(tmp_path / "run" / "checkpoints").name == "step-00000002"


# --------------------------------------------------------------------------- while training goes on


def test_training_goes_on_while_a_thread_writes_what_was_copied(
    tmp_path, small, tokenizer, monkeypatch
):
    """The disk answers only after the next step: a loop that waits for it would never make that step."""
    _, expected = life(Ranks(), small, tokenizer, tmp_path / "quick")
    gone_on = threading.Event()
    real_save = checkpoint.save_file
    real_next = FewRows.__next__

    def slow(*arguments):
        assert gone_on.wait(30), "the loop waits for the disk"
        real_save(*arguments)

    def rows(self):
        if self.step == AT + 1:
            gone_on.set()
        return real_next(self)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(FewRows, "__next__", rows)
    _, losses = life(Ranks(), small, tokenizer, tmp_path / "slow")
    assert losses == expected
    for name in ("model.safetensors", "state.safetensors"):
        one, other = (
            load_file(tmp_path / run / "checkpoints" / f"step-{AT:08d}" / name)
            for run in ("quick", "slow")
        )
        assert all(torch.equal(t, other[key]) for key, t in one.items() if "rng" not in key)


def test_a_run_that_fails_leaves_the_checkpoint_that_was_being_written(
    tmp_path, small, tokenizer, monkeypatch
):
    def fails(self):
        if self.step == AT:
            raise ValueError("no more")
        return SameRows.__next__(self)

    monkeypatch.setattr(FewRows, "__next__", fails)
    with pytest.raises(ValueError, match="no more"):
        life(Ranks(), small, tokenizer, tmp_path)
    assert list(checkpoints(tmp_path / "checkpoints")) == [AT]


def test_a_fault_of_the_program_in_the_thread_is_raised(tmp_path, small, monkeypatch):
    def wrong(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(checkpoint, "save_file", wrong)
    home = RunDirectory(tmp_path)
    with pytest.raises(TypeError, match="a mistake"):
        home.write(1, SailVL(small).init_weights(0), {"x": torch.ones(1)}, {})


# ---------------------------------------------------------------------------------------- boxes


def test_what_two_boxes_share():
    one = Box((2, 0), (3, 4))
    assert one.overlap(Box((4, 3), (9, 9))) == Box((4, 3), (1, 1))
    assert one.overlap(Box((5, 0), (1, 4))) is None
    assert Box((), ()).overlap(Box((), ())) == Box((), ())
    values = torch.arange(12).view(3, 4)  # rows 2 to 4 of a whole
    assert values[Box((4, 3), (1, 1)).inside(one)].tolist() == [[11]]


@pytest.mark.parametrize("layout", [weights.published, vit.transformers_names])
def test_a_stored_tensor_is_the_box_that_the_layout_shows(layout):
    """Experts apart, gate and up apart; query, key and value apart; a table without its first axis."""
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 4, 5),
        "model.layers.0.mlp.experts.down_proj": (3, 5, 2),
        "trunk.blocks.0.attn.qkv.weight": (6, 2),
        "preprocessor.pos_embed": (1, 4, 3),
        "norm.weight": (7,),
    }
    for name, shape in shapes.items():
        value = torch.randn(shape)
        boxes = shards.boxes_on_disk(name, value.shape, layout)
        views = layout(name, value)
        assert boxes.keys() == views.keys()
        for stored, view in views.items():
            box = boxes[stored]
            taken = value[box.inside(Box((0,) * value.ndim, tuple(value.shape)))]
            assert torch.equal(taken.reshape(view.shape), view)


def test_parts_make_a_whole_and_what_is_missing_is_said(tmp_path):
    """Two files of five rows, three and two: a whole, in any order; without one of them, an error."""
    whole = torch.randn(5, 2)
    for i, (begin, end) in enumerate(((0, 3), (3, 5))):
        metadata = {"boxes": json.dumps({"x": [[5, 2], [begin, 0]]})}
        save_file({"x": whole[begin:end].contiguous()}, tmp_path / f"{i}.safetensors", metadata)
    paths = [tmp_path / "1.safetensors", tmp_path / "0.safetensors"]
    with shards.SavedState(paths) as state:
        assert torch.equal(state.tensor("x"), whole)
    with shards.SavedState(paths[:1]) as state:
        with pytest.raises(ValueError, match="x: its files hold 4 of the 10 values"):
            state.tensor("x")


def test_every_byte_has_one_owner_and_all_own_about_as_much(small):
    model = SailVL(small)
    owner_of = shards.owners(model, 3)
    owned = [0, 0, 0]
    for name, p in model.named_parameters():
        owned[owner_of[name]] += p.numel()
    largest = max(p.numel() for p in model.parameters())
    assert max(owned) - min(owned) <= 2 * largest and set(owner_of.values()) == {0, 1, 2}


# ---------------------------------------------------------------------------- earlier checkpoints


def as_before(saved: Path, model, optimizers, search) -> None:
    """Turn a checkpoint into one of the former version: optimizers' state by number, one file."""
    names = Names(model, optimizers, search.tensors)
    state = json.loads((saved / "state.json").read_text())
    state["optimizer"] = names.numbered_rest(state["optimizer"])
    state["adalrs"] = with_rests(state["adalrs"], names.numbered_rest)
    (saved / "state.json").write_text(json.dumps(state))

    stored = load_file(saved / "state.safetensors")
    numbered = {}
    for name, tensor in stored.items():
        of_a_parameter = name.startswith(("optimizer.", "adalrs."))
        numbered[names.numbered(name)[0] if of_a_parameter else name] = tensor
    assert "optimizer.0.0.exp_avg" in numbered and "adalrs.older.t.0" in numbered
    save_file(numbered, saved / "state.safetensors")
    (saved / "manifest.json").unlink()
    entries = json.dumps(seal(saved.iterdir()))
    (saved / "manifest.json").write_text(entries)


def test_a_checkpoint_of_before_goes_on_alike(tmp_path, small, tokenizer):
    model, expected = life(Ranks(), small, tokenizer, tmp_path)
    forget(tmp_path)
    optimizers = make_optimizers(model, SEARCHED)
    search = rate_search(list(model.parameters()), optimizers, SEARCHED)
    as_before(latest(tmp_path / "checkpoints"), model, optimizers, search)
    assert life(Ranks(), small, tokenizer, tmp_path)[1] == expected

    # Its numbers mean nothing in a pipeline
    forget(tmp_path)
    as_before(latest(tmp_path / "checkpoints"), model, optimizers, search)
    home = RunDirectory(tmp_path)
    keeper = Keeper(home, model, optimizers, search, FewRows(tokenizer, Ranks()), Ranks())
    keeper.ranks = Ranks(layout=Layout(pp=2))
    with pytest.raises(ValueError, match="go on from it for one checkpoint without --layout.pp"):
        keeper.resume()


def test_optimizers_that_are_grouped_otherwise_find_their_state():
    """A pipeline's stage has some of the parameters, in other places; numbers of no tensor come along."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    one, two = model
    groups = [
        {"params": [one.weight, two.weight], "a": 1},
        {"params": [one.bias, two.bias], "a": 2},
    ]
    saved = Names(model, [torch.optim.SGD(groups, lr=1.0)], list(model.parameters()))
    entries = saved.named_rest(
        [{"numbers": {"1.count": 7, "2.count": 8}, "options": [{"a": 1}, {"a": 2}]}]
    )
    assert saved.named("optimizer.0.3.step") == "optimizer.1.bias.step"
    assert saved.named("adalrs.older.t.2") == "adalrs.older.t.1.weight"

    stage = torch.nn.ModuleDict({"1": two})
    other = Names(stage, [torch.optim.SGD([two.bias, two.weight])], [two.weight])
    assert other.numbered("optimizer.1.bias.step")[0] == "optimizer.0.0.step"
    assert other.numbered("adalrs.newer.o.1.weight.step")[0] == "adalrs.newer.o.0.1.step"
    assert other.numbered("adalrs.older.t.1.weight") == ("adalrs.older.t.0", two.weight)
    assert other.numbered("optimizer.0.bias.step") is None
    assert other.numbered("adalrs.older.t.0.bias") is None
    assert other.numbered_rest(entries) == [{"numbers": {"1.count": 7}, "options": [{"a": 2}]}]
    with pytest.raises(ValueError, match="no optimizer state for 1.bias"):
        other.numbered_rest(entries[:1])


def test_what_another_rank_is_writing_is_not_in_rank_0s_list(tmp_path):
    """Files come to be under other names: a list made by looking would have them in it, or miss them."""
    draft = Draft(tmp_path, 1, Writers(0, 2, 0, 2), {}, patience=1.0, state="{}")
    file = "state-00001-of-00002.safetensors"
    draft.tensors[file] = {"x": torch.ones(1)}
    draft.metadata[file] = {}
    draft.temporary.mkdir()
    (draft.temporary / ".tmpOther").write_text("half")
    entries, problem = draft.write(None)
    assert problem == "" and entries.keys() == {file, "config.json", "state.json"}


# ------------------------------------------------------------------------------------------ kills

COMMAND = (
    "pretrain.py multitask --layout.shard 4 --layout.ep 2 --rows 4 --length 256 --save-every 2 "
    "--keep 2 --timeout 60"
).split()
ENDS_WITHIN = (
    45.0  # seconds from a kill to the end of all ranks: torchrun gives 30 after its SIGTERM
)


class Launched:
    """The command under torchrun on four ranks, and what it says."""

    def __init__(self, said: Path, restarts: int, *options):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", "4", "--max-restarts", str(restarts)]
        # without the variable a restarted group may find the addresses of the one before
        more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with open(said, "w") as file:
            self.process = subprocess.Popen(
                [*launcher, *COMMAND, *map(str, options)],
                cwd=ROOT,
                env=os.environ | more,
                stdout=file,
                stderr=file,
            )

    def ranks(self) -> dict[int, int]:
        """Rank -> process, of the present life."""
        found = {}
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        for child in Path(children).read_text().split():
            try:
                words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
            found |= {rank: int(child) for rank in ranks}
        return found

    def kill(self, rank: int) -> dict[int, int]:
        """kill -9 one rank; the processes that there were."""
        processes = self.ranks()
        os.kill(processes[rank], signal.SIGKILL)
        return processes


def lines(out: Path) -> int:
    log = out / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(condition, seconds: float) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it does not come"
        time.sleep(0.05)
    return time.monotonic() - began


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True


def kill_on_the_way(launched: Launched, out: Path, rng: random.Random) -> int:
    """Kill a rank after a step or three, a random moment later; which, once all others have ended."""
    target = lines(out) + rng.randrange(1, 4)
    wait_for(lambda: lines(out) >= target and len(launched.ranks()) == 4, 300)
    time.sleep(rng.random())
    rank = rng.randrange(4)
    processes = launched.kill(rank)
    seconds = wait_for(lambda: all(map(gone, processes.values())), ENDS_WITHIN)
    print(f"rank {rank} killed after {lines(out)} steps: all ended in {seconds:.1f} s", flush=True)
    return rank


def check_named(rank: int, said: str) -> None:
    """The launcher says who was killed; of the others, who is asked in time says so too."""
    cause = said[said.index("Root Cause") :]
    assert f"rank      : {rank} (local_rank: {rank})\n  exitcode  : -9" in cause
    for missing in re.findall(r"rank ([\d, ]+) did not take part", said):
        assert str(rank) in missing.split(", ")


@pytest.mark.slow
def test_one_of_four_ranks_killed_again_and_again_loses_nothing(tmp_path, small, tokenizer):
    """Restarted by torchrun and by hand in turn, a sharded run is the run that nothing happened to.

    KILLS=20 pytest -m slow tests/test_shards.py -k killed_again for more than the two of every day.
    """
    kills = int(os.environ.get("KILLS", 2))
    SailVL(small).init_weights(0).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--steps", 4 + 3 * kills, "--out"]
    whole = Launched(tmp_path / "whole.txt", 0, *options, tmp_path / "whole")
    assert whole.process.wait(600) == 0, (tmp_path / "whole.txt").read_text()[-2000:]

    # Half of the kills under one torchrun that starts its ranks again
    out = tmp_path / "killed"
    rng = random.Random(0)
    said = tmp_path / "restarted.txt"
    launched = Launched(said, kills, *options, out)
    for _ in range(kills - kills // 2):
        kill_on_the_way(launched, out, rng)
    launched.process.terminate()
    launched.process.wait(90)

    # The rest with a command that is given again
    for number in range(kills // 2):
        said = tmp_path / f"{number}.txt"
        launched = Launched(said, 0, *options, out)
        rank = kill_on_the_way(launched, out, rng)
        assert launched.process.wait(ENDS_WITHIN) != 0
        check_named(rank, said.read_text())
    last = Launched(tmp_path / "last.txt", 0, *options, out)
    assert last.process.wait(600) == 0, (tmp_path / "last.txt").read_text()[-2000:]

    # Nothing lost, nothing put aside
    rows = [
        [
            [json.loads(line)[key] for key in ("step", "lr", "loss", "grad_norm")]
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (tmp_path / "whole", out)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4 + 3 * kills
    assert not list((out / "checkpoints").glob("broken-*"))
    for file in (tmp_path / "whole").glob("model*"):
        assert file.read_bytes() == (out / file.name).read_bytes()
