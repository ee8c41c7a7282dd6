"""What a training run will take, before it is paid for: memory, communication, days, dollars.

What it teaches: all of it can be computed. Bytes on a device are sums over parameters and activations
(scale/needs.py); a step takes as long as its kernels need on the roofline or its collectives on the
links (scale/pace.py); the rest is division. Where no layout is given, all of them are tried, and those
that do not fit say why.

    preset, stage, layout --needs--> bytes held, bytes sent --+
    the real modules --roofline--> FLOP and bytes of kernels -+--> seconds a step -> days, dollars
    device --devices--> memory, FLOP/s, bytes/s --------------+

    python -m scale.plan --preset 2b --devices 8                           # every stage of the paper
    python -m scale.plan --preset 8b --devices 16 --stage multitask        # one stage, every layout
    python -m scale.plan --preset 30b-a3b --devices 64 --layout.shard 64 --layout.ep 8 --layout.half
    python -m scale.plan --preset 2b --devices 64 --stage sft1 --dry-run   # the real code, fake ranks

    MFU = FLOP of one forward and one backward pass / (step * devices * FLOP/s of a device)

Memory is the worst case (rows full of visual tokens, all of them labels; answers as long as they may
be), time is the mean one (`pace.Load`). Checked on small runs of 2 and 4 processes: weights exactly,
bytes sent exactly, memory within a tenth (tests/test_scale_plan.py). `python -m bench.gpu` sets times
beside the plan: on an H100 steps of the 2B took 80 and 91 % of what is planned (bench/h100.md).

Pipelines are planned more roughly, and were compared with nothing (scale/needs.py).

Simplified: a device's memory is what its maker states, less RESERVE for its context, the transport's
buffers and fragmentation; data arrives in time; nothing fails.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Iterator

import pretrain
import rl
import sft
from infra.cli import command
from infra.memory import meta_model
from infra.plan import size_text
from scale.devices import Device, device_named
from scale.layout import Layout
from scale.needs import rank_memory, step_traffic
from scale.pace import Pace, rollout_seconds, step_pace
from scale.pipeline import check_cut
from stage import BaseStage, RLStage, Stage
from vlm import PRESETS

STAGES: dict[str, BaseStage] = pretrain.PAPER | sft.PAPER | rl.PAPER
RESERVE = 0.08  # of a device's memory
DAY = 24 * 3600


@dataclass
class PlanOptions:
    """Memory, communication, time and cost of the paper's stages on some devices."""

    preset: str = "2b"  # 1b, 2b, 8b, 30b-a3b, or a preset's whole name
    devices: int = 8
    device: str = "h100"  # a100, h100, h200, h20, 910b
    stage: str = ""  # of Tables 3 and 4; none: every one
    layout: Layout = field(default_factory=Layout)  # none given: the fastest that fits
    price: float = 0.0  # dollars for an hour of one device; 0: the table's (scale/devices.py)
    dry_run: bool = False  # run a step of the real code as rank 0 of so many fake ranks


@dataclass(frozen=True)
class StagePlan:
    """One stage under one layout on some devices."""

    preset: str
    name: str
    stage: BaseStage
    layout: Layout
    devices: int
    device: Device
    memory: dict[str, int]  # bytes on the fullest rank, by kind

    @property
    def limit(self) -> float:
        """Bytes that a rank may hold."""
        return (1 - RESERVE) * self.device.memory

    @property
    def fits(self) -> bool:
        return self.memory["total"] <= self.limit

    @property
    def uneven(self) -> bool:
        """Whether the stage's rows do not divide over the ranks; some then have one more than others."""
        lanes = self.devices // self.layout.pp
        return not isinstance(self.stage, RLStage) and self.stage.rows % lanes > 0

    @cached_property
    def pace(self) -> Pace:
        return step_pace(self.preset, self.stage, self.layout, self.devices, self.device)

    @cached_property
    def rollouts(self) -> float:
        """Seconds of a rollout batch (RL)."""
        if not isinstance(self.stage, RLStage):
            return 0.0
        rows = self.stage.batch * self.stage.group
        lanes = self.devices // self.layout.pp
        return rollout_seconds(self.preset, self.stage, lanes, rows, self.device)

    @property
    def days(self) -> float:
        """The whole stage: as many steps as its tokens make."""
        seconds = self.stage.steps * self.pace.seconds["step"]
        if isinstance(self.stage, RLStage):
            seconds += self.stage.steps / self.stage.updates * self.rollouts
        return seconds / DAY

    def dollars(self, price: float = 0.0) -> float:
        """price: of a device, an hour; 0: the table's."""
        return self.days * 24 * self.devices * (price or self.device.price)

    def reason(self) -> str:
        """Why it does not fit: the total, and its largest kinds."""
        kinds = {kind: n for kind, n in self.memory.items() if kind not in ("total", "host")}
        largest = sorted(kinds, key=lambda kind: -kinds[kind])[:3]
        parts = ", ".join(f"{kind} {size_text(kinds[kind])}" for kind in largest)
        return f"{size_text(self.memory['total'])} of {size_text(int(self.limit))}: {parts}"


# ------------------------------------------------------------------------------------- one layout


def preset_named(name: str) -> str:
    """`2b` -> SAIL-VL2-2B. Raises ValueError for a preset that is not there."""
    for preset in PRESETS:
        if name.lower() in (preset.lower(), preset.lower().removeprefix("sail-vl2-")):
            return preset
    raise ValueError(f"--preset {name}: choose from {', '.join(PRESETS)}")


def plan_stage(
    preset: str,
    name: str,
    layout: Layout,
    devices: int,
    device: Device,
    stage: BaseStage | None = None,
) -> StagePlan:
    """The plan of a stage of the paper, or of another one. Raises ValueError for a layout that cannot be."""
    stage = stage or STAGES[name]
    layout = layout.fitted(devices)
    refuse_model(preset, layout)
    if isinstance(stage, RLStage):
        limit = (1 - RESERVE) * device.memory
        stage = with_largest_batch(preset, stage, layout, devices, limit)
    memory = rank_memory(meta_model(preset), stage, layout, devices)
    return StagePlan(preset, name, stage, layout, devices, device, memory)


def refuse_model(preset: str, layout: Layout) -> None:
    """Raises ValueError for a layout that this model does not have."""
    text = meta_model(preset).config.text
    if layout.ep > 1 and (not text.num_experts or text.num_experts % layout.ep):
        raise ValueError(f"--layout.ep {layout.ep}: {preset} has {text.num_experts} experts")
    if layout.pp > 1:
        check_cut(meta_model(preset), layout)


def with_largest_batch(
    preset: str, stage: RLStage, layout: Layout, devices: int, limit: float
) -> RLStage:
    """The stage with the largest `batch` (prompts in a call of `generate`) whose cache fits; at least 1."""
    chosen = replace(stage, batch=1)
    batch = 2
    while batch <= stage.prompts * layout.pp // devices:
        larger = replace(stage, batch=batch)
        if rank_memory(meta_model(preset), larger, layout, devices)["total"] > limit:
            break
        chosen = larger
        batch *= 2
    return chosen


# ------------------------------------------------------------------------------------- the search


def powers_of_two(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def layouts_for(
    preset: str, devices: int, device: Device, stage: BaseStage
) -> Iterator[list[Layout]]:
    """What is worth a try, in tiers; a tier counts when nothing before it fits.

    Whole copies or shards whose weights travel in bf16, experts spread inside a node; then pipelines
    over nodes, where stage and model can have one; then the host's memory.
    """
    text = meta_model(preset).config.text
    experts = text.num_experts
    in_stages = isinstance(stage, Stage) and not text.tie_word_embeddings
    nodes = max(1, devices // device.node) if in_stages else 1
    for offload, stages in ((False, [1]), (False, powers_of_two(nodes)[1:]), (True, [1])):
        tier = [] if offload or stages != [1] else [Layout()]
        for pp in stages:
            for shard in powers_of_two(devices // pp):
                if shard * pp == 1 or devices % (shard * pp):
                    continue
                for ep in powers_of_two(min(shard, device.node)) if experts else [1]:
                    for zero in (2, 3) if pp == 1 else (3,):
                        tier.append(Layout(pp, 0, shard, ep, zero, offload, half=True))
        yield tier


def search_layouts(
    preset: str, name: str, devices: int, device: Device, stage: BaseStage | None = None
) -> list[StagePlan]:
    """Plans for the layouts that were tried: the best, others that fit by their days, the rest by bytes.

    A layout that is less than 2 % faster than a simpler one is not worth it.
    """
    plans = []
    for tier in layouts_for(preset, devices, device, stage or STAGES[name]):
        plans += [plan_stage(preset, name, layout, devices, device, stage) for layout in tier]
        if any(plan.fits for plan in plans):
            break
    fitting = [plan for plan in plans if plan.fits]
    others = sorted((p for p in plans if not p.fits), key=lambda p: p.memory["total"])
    fastest = min((plan.days for plan in fitting), default=0.0)
    best = [plan for plan in fitting if plan.days <= 1.02 * fastest][:1]
    rest = sorted((plan for plan in fitting if plan not in best), key=lambda plan: plan.days)
    return best + rest + others


# ------------------------------------------------------------------------------------- in words


def layout_text(layout: Layout) -> str:
    """The layout as one types it."""
    if layout.plain:
        return "none: whole copies"
    default = Layout()
    words = []
    for option in ("pp", "shard", "ep", "zero"):
        value = getattr(layout, option)
        if value != getattr(default, option):
            words.append(f"--layout.{option} {value}")
    words += [f"--layout.{name}" for name in ("offload", "half") if getattr(layout, name)]
    return " ".join(words)


def plan_lines(plan: StagePlan, options: PlanOptions) -> list[str]:
    """A plan in full: memory by kind, what is sent by kind, the step by part, days and dollars."""
    price = options.price or plan.device.price
    held = {kind: n for kind, n in plan.memory.items() if kind != "total" and n}
    lines = [f"{plan.name}: {layout_text(plan.layout)} ({plan.layout.copies} copies)"]
    if isinstance(plan.stage, RLStage):
        lines[0] += f" --batch {plan.stage.batch}"
    parts = ", ".join(f"{kind} {size_text(n)}" for kind, n in held.items())
    state = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(
        f"  memory: at most {size_text(plan.memory['total'])} at once of {size_text(int(plan.limit))}: "
        f"{state} ({parts})"
    )

    model = meta_model(plan.preset)
    flows = step_traffic(model, plan.stage, plan.layout, plan.devices)
    sent = ", ".join(f"{kind} {flow.wired / 1e9:.2f} GB" for kind, flow in flows.items())
    lines.append(f"  sent by a device in a step: {sent or 'nothing'}")

    seconds = plan.pace.seconds
    shares = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items() if part != "step")
    lines.append(
        f"  step: {seconds['step']:.2f} s ({shares}); "
        f"{plan.pace.tokens / seconds['step'] / plan.devices:,.0f} tokens a second and device, "
        f"MFU {plan.pace.utilisation(plan.devices, plan.device):.0%}"
    )
    if plan.uneven:
        lines.append(
            f"  NOTE: {plan.stage.rows} rows do not divide over {plan.devices // plan.layout.pp} ranks: "
            "counted as if they were more"
        )
    if plan.rollouts:
        lines.append(f"  rollouts: {plan.rollouts:.0f} s for every {plan.stage.updates} updates")
    lines.append(
        f"  stage: {plan.stage.steps:,} steps, {plan.days:.2f} days, "
        f"${plan.dollars(price):,.0f} at ${price:.2f} an hour and device"
    )
    return lines


def print_plan(options: PlanOptions) -> None:
    """Print the plan of one stage or of all of them."""
    preset = preset_named(options.preset)
    device = device_named(options.device)
    if options.stage and options.stage not in STAGES:
        raise ValueError(f"--stage {options.stage}: choose from {', '.join(STAGES)}")
    if options.devices < 1:
        raise ValueError(f"--devices {options.devices}: at least 1")
    if options.dry_run:
        from scale.rehearsal import rehearse  # brings PyTorch's pretended process group

        name = options.stage or "sft1"
        layout = options.layout
        if layout == Layout():
            layout = search_layouts(preset, name, options.devices, device)[0].layout
        layout = layout.fitted(options.devices)
        refuse_model(preset, layout)
        print(*rehearse(preset, STAGES[name], layout, options.devices), sep="\n")
        return

    counts = meta_model(preset).parameter_counts()
    print(
        f"{preset}: {counts['total'] / 1e9:.3f} B parameters, {counts['active'] / 1e9:.3f} B for a token; "
        f"{options.devices} x {options.device} ({device.source})"
    )
    searched = options.layout == Layout()
    days = 0.0
    left_out = []
    for name in [options.stage] if options.stage else STAGES:
        if not searched:
            plans = [plan_stage(preset, name, options.layout, options.devices, device)]
        else:
            plans = search_layouts(preset, name, options.devices, device)
        print(*plan_lines(plans[0], options), sep="\n")
        if plans[0].fits:
            days += plans[0].days
        else:
            left_out.append(name)
        if options.stage and searched:
            print_others(plans[1:])
    if not options.stage:
        price = options.price or device.price
        dollars = days * 24 * options.devices * price
        without = f" without {', '.join(left_out)}, which do not fit" if left_out else ""
        print(f"all stages{without}: {days:.1f} days, ${dollars:,.0f}")


def print_others(plans: list[StagePlan]) -> None:
    """The layouts that were not chosen: slower ones, then those that do not fit, and why."""
    for plan in plans:
        note = f"{plan.days:.2f} days" if plan.fits else f"does not fit: {plan.reason()}"
        print(f"  {layout_text(plan.layout):64s} {note}")


if __name__ == "__main__":
    command(print_plan)
