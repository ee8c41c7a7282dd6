"""scale/plan.py against reality: weights, memory and bytes sent of small runs of 2 and 4 processes; fake
ranks; what the page scale/README.md says; launch scripts that a shell understands.

Memory is what the profiler sees the process allocate, the least of three steps: a slow transport's
threads hold buffers a little longer, now and then. Bytes are counted where collectives are dispatched.
"""

import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from ranks_helpers import as_ranks
from test_memory import S, packed_batch, peak_bytes
from test_readme import understood
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import gpu
from infra.memory import MicroBatch, meta_model
from objective import supervised
from optim import freeze_all_but, make_optimizers
from scale import needs, pace, parallel, plan
from scale.devices import DEVICES, Device
from scale.layout import Layout
from scale.rehearsal import COLLECTIVES
from scale.roofline import KernelWork, kernel_work
from scale.shard import begin_micro_batch, shard_model
from stage import Stage
from tools import readme
from train import prepare_blocks
from vlm import PRESETS, SailVL

H100 = DEVICES["h100"]
SIZES = MicroBatch(tokens=S, keys=S, patches=160, labels=S // 2)
MICRO_BATCHES = 2


def middling(preset: str):
    """A toy whose blocks are large beside its ends, as those of the real models are."""
    toy = PRESETS[preset]
    text = replace(toy.text, hidden_size=256, intermediate_size=768, num_hidden_layers=8)
    return replace(toy, text=text)


def stage_of(size: int, **more) -> Stage:
    return Stage(
        "x", rows=MICRO_BATCHES * size, accumulate=MICRO_BATCHES, **({"optimizer": "adamw"} | more)
    )


class Counted(TorchDispatchMode):
    """Bytes that are handed to collectives, by kind; small numbers, which travel in fp64, left out."""

    def __init__(self):
        super().__init__()
        self.handed = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        library, _, name = operation._schema.name.partition("::")
        if library == "c10d":
            sides = [tensors for part in args if (tensors := tensors_of(part))]
            sizes = [sum(t.nbytes for t in tensors) for tensors in sides]
            if sides[0][0].dtype != torch.float64:
                self.handed[name] += sizes[1] if name.startswith("alltoall") else max(sizes)
        return operation(*args, **(kwargs or {}))


def tensors_of(part) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)]


def measured(
    preset: str, layout: Layout, stage: Stage, size: int, folder, peaks: int = 0
) -> list[dict]:
    """Of every rank: bytes of its weights and gradients, what it sent in a step, and the least of so many
    peaks beside them."""

    def work(ranks):
        model = SailVL(middling(preset)).init_weights()
        freeze_all_but(model, stage.trains)
        prepare_blocks(model, stage)
        shard_model(model, ranks)
        batch = packed_batch(model, images=10)

        def step() -> None:
            for number in range(MICRO_BATCHES):
                begin_micro_batch(model, ranks.layout, number == MICRO_BATCHES - 1)
                with torch.autocast("cpu", torch.bfloat16):
                    loss, _ = supervised(model, batch, stage)
                loss.backward()
            parallel.sum_gradients([p for p in model.parameters() if p.requires_grad])

        # Gradients are there from the first step on; so are moments, which are counted elsewhere
        with Counted() as counted:
            step()
        peak = min((peak_bytes(step) for _ in range(peaks)), default=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = 0
        for optimizer in make_optimizers(model, stage):
            optimizer.step()
            for state in optimizer.state.values():
                moments += sum(parallel.local(t).nbytes for t in state.values() if t.ndim)
        return {
            "weights": sum(parallel.local(p).nbytes for p in model.parameters()),
            "gradients": sum(parallel.local(p.grad).nbytes for p in trained),
            "moments": moments,
            "peak": peak,
            "handed": dict(counted.handed),
        }

    return as_ranks(work, folder, size=size, layout=layout)


EYES = ("vision", "adapter")
RECOMPUTED = {"recompute": True}
QUICK = [("toy-moe", 2, Layout(shard=2, ep=2, half=True), RECOMPUTED)]
CASES = [
    *QUICK,
    ("toy", 2, Layout(shard=2, half=True), RECOMPUTED),
    ("toy", 2, Layout(), RECOMPUTED),
    ("toy", 2, Layout(shard=2), RECOMPUTED),
    ("toy", 2, Layout(shard=2, zero=2, half=True), RECOMPUTED),
    ("toy", 2, Layout(shard=2, half=True), {}),
    ("toy", 2, Layout(shard=2, half=True), RECOMPUTED | {"trains": ("adapter",)}),
    ("toy", 2, Layout(shard=2, half=True), RECOMPUTED | {"trains": EYES}),
    ("toy", 4, Layout(shard=2, half=True), RECOMPUTED),
    ("toy-moe", 2, Layout(shard=2, half=True), RECOMPUTED),
    ("toy-moe", 2, Layout(shard=2, ep=2), {}),
    ("toy-moe", 4, Layout(shard=4, ep=2, half=True), RECOMPUTED),
]


def agreed(preset: str, size: int, layout: Layout, choices: dict, folder, peaks: int = 0):
    """(Planned kinds, what the ranks measured), after weights and bytes sent were compared."""
    stage = stage_of(size, **choices)
    ranks = measured(preset, layout, stage, size, folder, peaks)
    assert all(isinstance(rank, dict) for rank in ranks), ranks
    with torch.device("meta"):
        model = SailVL(middling(preset))
    fitted = layout.fitted(size)
    kinds = needs.rank_memory(model, stage, fitted, size, True, SIZES)
    flows = needs.step_traffic(model, stage, fitted, size, True, SIZES)

    # Weights, gradients and moments of the fullest rank
    for kind in ("weights", "gradients", "moments"):
        assert kinds[kind] == max(rank[kind] for rank in ranks), kind

    # Bytes handed to collectives, over all ranks: the shares of an exchange differ
    handed: Counter = Counter()
    for kind, flow in flows.items():
        handed[COLLECTIVES[kind]] += size * flow.handed
    assert sum((Counter(rank["handed"]) for rank in ranks), Counter()) == handed
    return kinds, ranks


@pytest.mark.parametrize(("preset", "size", "layout", "choices"), QUICK)
def test_a_small_run_sends_exactly_what_the_plan_says(tmp_path, preset, size, layout, choices):
    agreed(preset, size, layout, choices, tmp_path / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "size", "layout", "choices"), CASES)
def test_a_small_run_holds_what_the_plan_says(tmp_path, preset, size, layout, choices):
    kinds, ranks = agreed(preset, size, layout, choices, tmp_path / "ranks", peaks=3)
    standing = kinds["weights"] + kinds["gradients"] + kinds["moments"]
    peak = min(rank["peak"] for rank in ranks)
    assert kinds["total"] == pytest.approx(standing + peak, rel=0.1)


# ------------------------------------------------------------------------------------ fake ranks


def rehearsal(words: str) -> str:
    """What a dry run prints. A process of its own: it has one process group, and a fake one."""
    command = [sys.executable, "-m", "scale.plan", "--dry-run", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def as_planned(printed: str) -> None:
    """Memory within a tenth of the plan, bytes sent exactly, as the dry run's lines compare them."""
    held = [
        float(n) for n in re.search(r"held: plan ([\d.]+) MiB, run ([\d.]+) MiB", printed).groups()
    ]
    planned, run = held
    assert run == pytest.approx(planned, rel=0.1)
    sent = re.findall(r"sent by (\w+): plan ([\d,]+), run ([\d,]+)", printed)
    assert sent
    for collective, planned_bytes, run_bytes in sent:
        assert planned_bytes == run_bytes, collective


@pytest.mark.slow
@pytest.mark.parametrize("devices", [64, 512, 4096])
def test_the_real_code_runs_on_so_many_fake_ranks_as_planned(devices):
    as_planned(
        rehearsal(
            f"--preset toy-moe --devices {devices} --stage sft1 "
            "--layout.shard 64 --layout.ep 8 --layout.half"
        )
    )


# ------------------------------------------------------------------------------------- the pieces


def test_rows_are_divided_and_rounded_up_as_fsdp_cuts_them():
    piece = needs.Bundle("rest", "", ((5, 3), (1, 7)), (False, False), (True, False), 4, 2)
    assert piece.own() == 2 * 3 + 1 * 7
    assert piece.trained == 2 * 3
    assert piece.sent == 2 * 4 * piece.own()


def test_stages_of_a_pipeline_share_out_all_parameters():
    model = meta_model("toy-moe")
    layout = Layout(pp=2, copies=1, shard=1)
    parts = [needs.bundles_of(model, Stage(), layout, place) for place in range(2)]
    total = sum(piece.own() for pieces in parts for piece in pieces)
    assert total == sum(p.numel() for p in model.parameters())
    assert {piece.kind for piece in parts[1]} == {"decoder", "rest"}


def test_what_rests_on_the_host_is_not_on_the_device():
    model = meta_model("SAIL-VL2-8B")
    stage = plan.STAGES["multitask"]
    here = needs.rank_memory(model, stage, Layout(copies=1, shard=8, half=True), 8)
    there = needs.rank_memory(model, stage, Layout(copies=1, shard=8, half=True, offload=True), 8)
    moved = sum(here[kind] for kind in ("weights", "gradients", "moments"))
    assert there["host"] == moved
    assert there["total"] == here["total"] - moved


# ------------------------------------------------------------------------------------ the roofline


def test_a_product_is_counted_as_its_flop_and_its_bytes():
    def build():
        a = torch.zeros(8, 16, requires_grad=True)
        b = torch.zeros(16, 4, requires_grad=True)
        return lambda: a @ b

    forward, backward = kernel_work(build, half=False)
    assert forward.operations == {(2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4)): 1}
    assert backward.flops == 2 * forward.flops


def test_the_longer_of_two_times_counts():
    device = replace(H100, flops=1e12 / 0.65, bandwidth=1e12 / 0.85)
    slow_arithmetic = KernelWork(Counter({(3e12, 1e12): 1}))
    slow_memory = KernelWork(Counter({(1e12, 3e12): 2}))
    assert slow_arithmetic.seconds(device) == pytest.approx(3)
    assert slow_memory.seconds(device) == pytest.approx(6)
    assert (slow_arithmetic + slow_memory).seconds(device) == pytest.approx(9)
    assert slow_memory.scaled(0.5).seconds(device) == pytest.approx(3)


def test_a_blocks_flop_are_two_a_parameter_and_token_forward():
    forward, backward = pace.decoder_work("toy", True, True)
    block = meta_model("toy").language_model.model.layers[0]
    parameters = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    text = PRESETS["toy"].text
    length = pace.ROW / 4
    attention = (
        2 * length * text.num_attention_heads * text.head_dim
    )  # two products, half of the pairs
    assert forward.flops == pace.ROW * (2 * parameters + attention)
    assert backward.flops == pace.ROW * (4 * parameters + 2.5 * attention)


# ------------------------------------------------------------------------------------ links, search


def test_a_collective_takes_the_slowest_link_that_it_crosses():
    def seconds(ranks: int, device: Device = H100, **how) -> float:
        flow = needs.Flow(int(9e11), ranks, **how)
        return pace.link_seconds(flow, device) * 0.75 * ranks / (ranks - 1)

    assert seconds(8) == pytest.approx(9e11 / H100.inside)
    assert seconds(16) == pytest.approx(9e11 / (8 * H100.outside))
    assert seconds(16, hidden=False) == pytest.approx(9e11 / H100.outside)
    assert seconds(8, summed=True) == pytest.approx(2 * seconds(8))


def test_a_layout_is_found_and_the_others_say_why_not():
    plans = plan.search_layouts("SAIL-VL2-8B", "multitask", 8, H100)
    best = plans[0]
    assert best.fits and best.layout.shard > 1
    assert all(best.days <= 1.02 * other.days for other in plans[1:] if other.fits)
    whole = next(p for p in plans if p.layout.plain)
    assert not whole.fits
    assert re.match(r"1\d\d\.\d GiB of 68\.5 GiB: moments 66\.", whole.reason())


def test_rl_of_the_papers_size_fits_eight_gpus_of_80_gb_with_a_bounded_cache():
    layout = Layout(shard=8, half=True)
    for name in ("verifiable", "mixed"):
        found = plan.plan_stage("SAIL-VL2-2B", name, layout, 8, H100)
        assert found.fits and found.stage.batch >= 1
        assert found.memory["copy"] and found.memory["kv"]
        twice = replace(found.stage, batch=2 * found.stage.batch)
        kinds = needs.rank_memory(meta_model("SAIL-VL2-2B"), twice, found.layout, 8)
        assert kinds["total"] > found.limit  # no call of `generate` could be larger


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "3b"}, "--preset 3b: choose from toy"),
        ({"device": "abacus"}, "--device abacus: choose from a100"),
        ({"stage": "sft9"}, "--stage sft9: choose from vit1"),
        ({"devices": 0}, "--devices 0: at least 1"),
        ({"stage": "sft1", "layout": Layout(shard=4, copies=1)}, "are 4 ranks, but there are 8"),
        ({"stage": "sft1", "layout": Layout(shard=8, ep=2)}, "--layout.ep 2: SAIL-VL2-2B has 0 experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.print_plan(plan.PlanOptions(**options))


# ---------------------------------------------------------------------------------------- the page

PAGE = (ROOT / "scale" / "README.md").read_text(encoding="utf-8")


def test_the_page_says_what_the_plan_says():
    fresh = readme.plan_table("2b", 8, ("multitask",)).splitlines()[-1]
    section = PAGE.split("### 2B on 8\n")[1].split("###")[0]
    assert fresh in section, "run `make readme`"


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "devices"), readme.CLUSTERS)
def test_every_table_of_the_page_is_up_to_date(preset, devices):
    table = readme.plan_table(preset, devices)
    assert f"### {preset.upper()} on {devices}\n\n{table}\n" in PAGE, "run `make readme`"


def commands_of_the_page() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("words", commands_of_the_page(), ids=" ".join)
def test_every_command_of_the_page_is_understood(words, monkeypatch):
    if words[0] == "python":
        understood(words[1:], monkeypatch)
        return
    launcher = next(word for word in words if word.endswith(".sh"))
    assert (ROOT / launcher).is_file()
    understood(words[words.index(launcher) + 1 :], monkeypatch)


def test_the_pages_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "scale" / target).exists(), target


# ------------------------------------------------------------------------------- launch scripts

LAUNCHERS = sorted((ROOT / "scale" / "launch").glob("*.sh"))


def launched(script: str, folder, tools: dict[str, str], *words: str, **environment: str):
    """Run a launch script with pretended tools: name -> the lines of a shell script."""
    for name, lines in tools.items():
        tool = folder / name
        tool.write_text(f"#!/bin/bash\n{lines}\n")
        tool.chmod(0o755)
    command = ["bash", str(ROOT / "scale" / "launch" / script), *words]
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    return subprocess.run(
        command, env=path | environment, capture_output=True, text=True, timeout=60
    )


def test_launch_scripts_are_shell_and_say_how_they_are_used(tmp_path):
    assert {script.name for script in LAUNCHERS} == {"one_node.sh", "slurm.sh", "npu.sh"}
    for script in LAUNCHERS:
        parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert parsed.returncode == 0, parsed.stderr
        assert "set -euo pipefail" in script.read_text()
        bare = launched(script.name, tmp_path, {})
        assert bare.returncode == 2 and bare.stderr.startswith("usage: ")


ECHO = 'echo torchrun "$@"; echo shared store off: $TORCH_DISABLE_SHARE_RDZV_TCP_STORE'


def test_one_node_starts_a_process_for_each_device(tmp_path):
    tools = {"torchrun": ECHO, "python": "echo 4"}
    done = launched("one_node.sh", tmp_path, tools, "sft.py", "paper:sft1", "--out", "a b")
    assert done.stdout.splitlines() == [
        "torchrun --standalone --nproc-per-node 4 --max-restarts 3 sft.py paper:sft1 --out a b",
        "shared store off: 1",
    ]


def test_slurm_starts_one_launcher_on_each_machine(tmp_path):
    tools = {"srun": 'echo srun "$@"', "scontrol": "printf 'n07\\nn08\\n'"}
    job = {"SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "n[07-08]", "SLURM_JOB_NUM_NODES": "2"}
    done = launched("slurm.sh", tmp_path, tools, "sft.py", "paper:sft1", **job)
    assert done.stdout.strip() == (
        "srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id 20123 "
        "--rdzv-backend c10d --rdzv-endpoint n07:20123 --max-restarts 3 sft.py paper:sft1"
    )
    outside = launched("slurm.sh", tmp_path, tools, "sft.py")
    assert outside.returncode == 2 and "not inside a SLURM job" in outside.stderr


def test_npus_meet_on_one_machine_or_on_several(tmp_path):
    tools = {"torchrun": ECHO, "python": "exit 0"}
    alone = launched("npu.sh", tmp_path, tools, "rl.py", DEVICES="16")
    assert alone.stdout.startswith(
        "torchrun --standalone --nproc-per-node 16 --max-restarts 3 rl.py"
    )
    many = launched("npu.sh", tmp_path, tools, "rl.py", NODES="2", NODE="1", FIRST="10.0.0.1")
    assert "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500" in many.stdout
    without = launched("npu.sh", tmp_path, {"python": "exit 1"}, "rl.py")
    assert without.returncode == 1 and "no torch_npu here" in without.stderr


# --------------------------------------------------------------------------------- the bench


def test_the_bench_runs_the_loop_and_sets_the_plan_beside_it(capsys):
    options = gpu.GpuOptions("toy", length=256, rows=2, steps=2, warm=1)
    gpu.measure_steps(options)
    printed = capsys.readouterr().out
    assert re.search(r"toy, 4 layers, 1 ranks, 2 rows of 256: [\d.]+ s a step", printed)
    assert re.search(
        r"memory: planned [\d,]+ MiB, measured nothing \(no accelerator here\)", printed
    )
    assert printed.count("%") >= 10  # the ten that take most
