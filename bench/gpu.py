"""A training step of the real models on real devices: tokens and images a second, MFU, memory, kernels.

What it teaches: a plan is a claim, and this is its trial. The loop itself runs (train.train: forward,
backward, sums over ranks, clipping, AdamW) on packed rows of 8,192 tokens, 28 tiles in four documents,
a quarter of the positions labelled, with random weights; what it measures stands beside what
scale/plan.py computed for the same layout.

    python -m bench.gpu                                                   # SAIL-VL2-2B on one device
    torchrun --standalone --nproc-per-node 8 -m bench.gpu --preset 8b --layout.shard 8 --layout.half
    torchrun --standalone --nproc-per-node 1 -m bench.gpu --preset 30b-a3b --layers 4 --layout.half

    MFU = FLOP of one forward and one backward pass / (median step * devices * FLOP/s of a device)

(`--layers`: as many as fit. `--layout.half` and `.offload` want torchrun for one device, too.)
FLOP of recomputation are not counted: they are work, and not use. A device that the table of
scale/devices.py does not have (a CPU: `--preset toy --length 512`) gets no MFU. bench/h100.md has what
one H100 printed.
"""

import statistics
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attention import Segments
from infra.cli import command
from infra.memory import PATCHES, MicroBatch, meta_model
from infra.plan import size_text
from optim import freeze_all_but
from packing import Batch
from scale import parallel
from scale.devices import device_named
from scale.layout import Layout
from scale.needs import rank_memory, stage_model
from scale.pace import ROW, decoder_work, step_pace
from scale.plan import preset_named, refuse_model
from scale.shard import shard_model
from stage import ALL, Stage
from train import train
from vlm import SailVL


@dataclass
class GpuOptions:
    """Steps of training on packed rows with random weights, beside what was planned."""

    preset: str = "2b"
    layers: int = 0  # of the language model; 0: all
    length: int = 8192  # tokens of a row, in four documents
    rows: int = 4  # a step, on each rank that sees other rows; one at a time
    steps: int = 8
    warm: int = 3  # steps before those that count
    recompute: bool = True
    trains: tuple[str, ...] = ALL
    layout: Layout = field(default_factory=Layout)
    device: str = "h100"  # whose FLOP/s and memory (scale/devices.py)
    profile: bool = True  # one more step under the profiler: the ten kernels that take most


class SameRow:
    """The same packed row again and again; notes when each step began, once the device is done."""

    def __init__(self, model: SailVL, options: GpuOptions, device: str):
        self.batch = full_row(model, options.length, device)
        self.count = options.rows
        self.began: list[float] = []

    def __iter__(self):
        return self

    def __next__(self) -> list[Batch]:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.began.append(time.perf_counter())
        return [self.batch] * self.count


def full_row(model: SailVL, length: int, device: str) -> Batch:
    """Four documents, seven eighths of whose tokens are visual; a quarter of the positions labelled."""
    vision = model.config.vision
    document = length // 4
    per_image = vision.side**2 // PATCHES
    tiles = document * 7 // 8 // per_image
    ids = torch.randint(min(400, model.config.text.vocab_size - 1), (1, length))
    labels = torch.full((1, length), -100)
    for start in range(0, 4 * document, document):
        ids[0, start : start + tiles * per_image] = model.image_token_id
        labels[0, start + document * 3 // 4 : start + document] = 5
    segments = Segments.of([document] * 4)
    side = vision.image_size
    batch = Batch(
        ids=ids,
        labels=labels,
        weights=(labels >= 0).float(),
        positions=segments.positions()[None],
        segments=segments,
        images=torch.randn(4 * tiles, vision.num_channels, side, side),
        owners=["bench"] * 4,
    )
    return batch.to(device)


@torch.no_grad()
def random_model(options: GpuOptions, ranks: parallel.Ranks) -> SailVL:
    """The model on its ranks, never whole where it is sharded, with small random weights."""
    config = meta_model(preset_named(options.preset)).config
    layers = options.layers or config.text.num_hidden_layers
    vocabulary = config.text.vocab_size
    config = replace(
        config,
        text=replace(config.text, num_hidden_layers=layers),
        image_token_id=min(config.image_token_id, vocabulary - 1),
    )
    with torch.device("meta"):
        model = SailVL(config)
    freeze_all_but(model, options.trains)
    shard_model(model, ranks)
    model.to_empty(device=ranks.device)
    for p in model.parameters():
        own: Tensor = parallel.local(p)
        if p.ndim == 1:
            own.fill_(1.0)
        else:
            own.normal_(0.0, 0.02)
    return model


def measure_steps(options: GpuOptions) -> None:
    """Print rates, MFU, memory beside the plan's, and where the time goes."""
    device_named(options.device)  # a typo is told before any time is spent
    ranks = parallel.start(layout=options.layout)
    preset = preset_named(options.preset)
    refuse_model(preset, ranks.layout)
    model = random_model(options, ranks)
    stage = Stage(
        "bench",
        options.trains,
        steps=options.warm + options.steps,
        rows=options.rows * ranks.size,
        length=options.length,
        accumulate=0,
        optimizer="adamw",
        lr=1e-5,
        recompute=options.recompute,
    )

    # The loop, timed from one question for data to the next
    rows = SameRow(model, options, ranks.device)
    train(model, stage, rows, ranks=ranks)
    next(rows)
    times = [after - before for before, after in zip(rows.began, rows.began[1:])]
    step = statistics.median(times[options.warm :])
    if ranks.main:
        print(*report_lines(options, model, stage, ranks, step), sep="\n")

    # What takes most, in one step more
    if options.profile:
        again = replace(stage, steps=1)
        with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
            train(model, again, rows, ranks=ranks)
        if ranks.main:
            print(*busiest_kernels(profile), sep="\n")
    parallel.stop()


def report_lines(
    options: GpuOptions, model: SailVL, stage: Stage, ranks: parallel.Ranks, step: float
) -> list[str]:
    """Measured, and beside it what was planned."""
    preset = preset_named(options.preset)
    everyone = ranks.size * ranks.layout.pp
    layout = ranks.layout.fitted(everyone)
    images = full_row(model, options.length, "cpu").images
    tokens = options.rows * options.length * ranks.size
    lines = [
        f"{preset}, {model.config.text.num_hidden_layers} layers, {everyone} ranks, {options.rows} rows of "
        f"{options.length}: {step:.3f} s a step (median of {options.steps}); "
        f"{tokens / step / everyone:,.0f} tokens and "
        f"{options.rows * len(images) / step * ranks.size / everyone:,.1f} images a second and device"
    ]
    if torch.accelerator.is_available():
        device = device_named(options.device)
        pace = step_pace(preset, stage, layout, everyone, device)
        left_out = meta_model(preset).config.text.num_hidden_layers
        left_out -= model.config.text.num_hidden_layers
        forward, backward = decoder_work(preset, layout.half, "llm" in stage.trains)
        flops = pace.flops - left_out * (forward.flops + backward.flops) * tokens / ROW
        lines.append(
            f"MFU {flops / (step * everyone * device.flops):.1%} of {device.flops / 1e12:.0f} TFLOP/s "
            f"= {flops / 1e12:,.0f} TFLOP forward and backward / ({step:.3f} s x {everyone}); "
            f"the plan's step (all layers): {pace.seconds['step']:.3f} s"
        )

    # Memory: the most that was allocated, and the plan of these rows
    planned = stage_model(model.config, model.config.text.num_hidden_layers)
    patches = len(images) * model.config.vision.side**2
    batch = MicroBatch(options.length, options.length, patches, options.length // 4)
    kinds = rank_memory(planned, stage, layout, everyone, True, batch)
    lines.append(f"memory: planned {size_text(kinds['total'])}, measured {measured_peak()}")
    return lines


def measured_peak() -> str:
    """The most that the device's allocator has given out at once."""
    if not torch.accelerator.is_available():
        return "nothing (no accelerator here)"
    return size_text(torch.accelerator.max_memory_allocated())


def busiest_kernels(profile: torch.profiler.profile) -> list[str]:
    """The ten kernels (on a CPU: operations) that take most of a step, with their shares."""
    events = profile.key_averages()
    # An operation's row has the time of the kernels that it started, and so have their own rows
    host = torch.autograd.DeviceType.CPU
    kernels = [e for e in events if e.device_type != host and not e.is_user_annotation]
    on_device = bool(kernels)
    events = kernels or events

    def spent(event) -> float:
        return event.self_device_time_total if on_device else event.self_cpu_time_total

    total = sum(spent(event) for event in events)
    lines = ["the ten that take most:"]
    for event in sorted(events, key=spent, reverse=True)[:10]:
        share = spent(event) / total
        lines.append(f"  {share:6.1%} {event.count:6d} x {event.key[:90]}")
    return lines


if __name__ == "__main__":
    command(measure_steps)
