"""What a run is told before its first step: data, tokens, epochs, memory, and options that do nothing.

What it teaches: most wasted days of training could have been seen in the first ten lines of output. So
the plan says what the stage will read and how often, what trains and what that takes, and which tasks
of the data it leaves out; an option that the stage does not use is an error.
"""

import math
from collections import Counter
from dataclasses import asdict, fields, replace

import torch

from data.sample import Document
from data.stream import EndOfStream, read_document
from infra.device import half_by_default
from scale.needs import rank_memory
from stage import EXPERT_OPTIONS, PARTS, BaseStage, RLStage
from vlm import SailVL

PROBED = 64  # samples that are encoded to estimate the mean length


def describe_stage(stage: BaseStage) -> str:
    """One line: what the stage trains, on what."""
    tasks = ", ".join(f"{task} {weight:g}" for task, weight in stage.mixture.items()) or "all tasks"
    return f"{stage.objective} on {stage.samples} ({tasks}); trains {', '.join(stage.trains)}"


# ------------------------------------------------------------------------------------ unused options


def refuse_unused(options, defaults, model) -> None:
    """Raises ValueError for an option that was given and that this stage would not read."""
    stage = options.stage
    experts = bool(model.config.text.num_experts)
    supervised = stage.objective == "supervised"
    rewarded = stage.objective == "policy" and getattr(stage, "reward", "random") != "random"
    judged = rewarded and bool(options.judge_url)
    used = {
        # of the run
        "images": bool(options.data),
        "strict": bool(options.data),
        "cache": bool(options.data),
        "cache_gib": bool(options.data),
        "allow_outside": bool(options.data),
        "preset": not options.model,
        "llm": bool(options.model),
        "fresh_adapter": bool(options.model),
        "harvest": stage.samples == "fusion",
        "workers": supervised,
        "held_out": options.check_every > 0,
        "judge_url": rewarded,
        "judge_model": judged,
        "judge_key": judged,
        "judge_timeout": judged,
        # of every stage
        "epochs": bool(options.data),
        "turns": not options.data,
        "accumulate": stage.objective != "next_patch",
        "trains": stage.objective != "next_patch",
        # of stages on packed rows
        "weighting": supervised,
        "everything": supervised,
        "think": stage.samples == "fusion",
        "adalrs_k": stage.searches_rate,
        "adalrs_window": stage.searches_rate,
        "adalrs_rule": stage.searches_rate,
        "adalrs_up": stage.searches_rate,
        "adalrs_down": stage.searches_rate,
        "adalrs_decay": stage.searches_rate,
        "adalrs_offload": stage.searches_rate,
        # of reinforcement learning
        "tries": getattr(stage, "dynamic", True),
        "estimator": bool(getattr(stage, "kl", 0.0)),
        "low": getattr(stage, "algorithm", "") != "reinforce",
        "high": getattr(stage, "algorithm", "") != "reinforce",
    }
    used |= dict.fromkeys(EXPERT_OPTIONS, experts)
    pairs = [(options, defaults), (stage, defaults.stage)]
    for given, default in pairs:
        for option in fields(given):
            changed = getattr(given, option.name) != getattr(default, option.name)
            if changed and not used.get(option.name, True):
                name = option.name.replace("_", "-")
                raise ValueError(
                    f"--{name}: stage {stage.name} does not use it here ({why_unused(option.name)})"
                )


def why_unused(option: str) -> str:
    """What the option would need."""
    if option in ("images", "strict", "allow_outside", "epochs", "cache", "cache_gib"):
        return "it is about --data"
    if option == "turns":
        return "it is about the drawn world; files have the turns that they have"
    if option in ("llm", "fresh_adapter"):
        return "it is about --model"
    if option == "preset":
        return "--model says the sizes"
    if option in ("harvest", "think"):
        return "it is about think-fusion"
    if option == "held_out":
        return "it needs --check-every"
    if option.startswith("judge"):
        return "it is about rewards of reinforcement learning, and begins with --judge-url"
    if option in EXPERT_OPTIONS:
        return "the model has no experts"
    if option.startswith("adalrs"):
        return "it needs --adalrs"
    if option == "tries":
        return "it needs --dynamic"
    if option in ("trains", "accumulate"):
        return "images alone train the ViT and its head, in one batch a step"
    if option in ("low", "high"):
        return "reinforce clips nothing"
    if option == "estimator":
        return "it needs --kl"
    return "it is about supervised stages"


# --------------------------------------------------------------------------------------- the plan


def plan_of(setup, options) -> list[str]:
    """The lines printed before the first step: options, data, work, memory."""
    stage = options.stage
    lines = ["options", *option_table(options), f"stage {stage.name}: {describe_stage(stage)}"]
    lines += data_lines(setup, options)
    lines += work_lines(setup, stage)
    random_parts = sorted(set(PARTS) - set(stage.trains))
    if not options.model and random_parts and stage.name not in ("language", "image"):
        lines.append(
            f"  NOTE: without --model, {' and '.join(random_parts)} stay random in this stage: start "
            "from an earlier stage's --out"
        )
    return lines


def option_table(options) -> list[str]:
    """Every option and its value, three to a line; long values have a line of their own."""
    values = {key: value for key, value in asdict(options).items() if key not in ("stage", "row")}
    values |= asdict(options.stage)
    values |= {f"layout.{key}": value for key, value in values.pop("layout").items()}

    # Cells of one width, and those that do not fit
    short = []
    long = []
    for key, value in values.items():
        cell = f"{key.replace('_', '-'):17s} {written(value)}"
        (short if len(cell) <= 34 else long).append(cell)

    lines = []
    for start in range(0, len(short), 3):
        lines.append("  " + "".join(f"{cell:36s}" for cell in short[start : start + 3]).rstrip())
    return [*lines, *(f"  {cell}" for cell in long)]


def written(value) -> str:
    """A value as one would type it."""
    if value is None or value == "" or value == {}:
        return "-"
    if isinstance(value, dict):
        return " ".join(f"{name}={share:g}" for name, share in value.items())
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def data_lines(setup, options) -> list[str]:
    """What there is to read, by task, and what of it the mixture leaves out."""
    stage = options.stage
    if not options.data:
        return ["  data: the drawn world, without end"]
    tasks = Counter(setup.source.tasks())
    named = set(stage.mixture) & set(tasks)
    counts = ", ".join(f"{task or '(no task)'} {n:,}" for task, n in tasks.most_common())
    lines = [f"  data: {options.data}: {tasks.total():,} records; tasks: {counts}"]
    if not stage.mixture or not named:
        return [*lines, "  the mixture names none of these tasks: all are used, by size"]

    left = [f"{task or '(no task)'} {n:,}" for task, n in tasks.most_common() if task not in named]
    if left:
        lines.append(
            f"  LEFT OUT, as the mixture does not name them: {', '.join(left)} (see --mixture)"
        )
    absent = sorted(set(stage.mixture) - set(tasks))
    if absent:
        lines.append(f"  named by the mixture, and not in the data: {', '.join(absent)}")
    return lines


def usable_records(setup, stage: BaseStage) -> int:
    """Records of --data that the stage's mixture can draw."""
    tasks = setup.source.tasks()
    named = set(stage.mixture) & set(tasks)
    return sum(n for task, n in tasks.items() if task in named or not named)


def probed_lengths(setup, stage: BaseStage) -> list[int]:
    """Tokens (of images alone: patches) of the first samples that can be encoded."""
    lengths = []
    stream = setup.source.stream(stage.mixture, stage.seed, stage.turns)
    for number in range(PROBED):
        try:
            document = read_document(stream, setup.encoder, number)
        except EndOfStream:
            break
        if isinstance(document, Document):  # faults are counted when their turn comes
            lengths.append(work_of(document, setup, stage))
    return lengths


def work_of(document: Document, setup, stage: BaseStage) -> int:
    """What a sample fills of a step's rows: its tokens, or the patches of its images alone."""
    if stage.objective != "next_patch":
        return len(document)
    vision = setup.model.config.vision
    return len(document.images) * (vision.image_size // vision.patch_size) ** 2


def mean_length(setup, stage: BaseStage) -> float:
    """Mean tokens of a sample, from the first ones that can be encoded."""
    lengths = probed_lengths(setup, stage)
    return sum(lengths) / max(len(lengths), 1)


def steps_of(setup, stage: BaseStage) -> int:
    """Steps that the stage's epochs mean, or its steps."""
    if not stage.epochs:
        return stage.steps
    records = usable_records(setup, stage)
    if isinstance(stage, RLStage):
        batches = math.ceil(stage.epochs * records / stage.prompts)
        return max(1, batches * stage.updates)
    mean = mean_length(setup, stage)
    if not mean:
        raise ValueError(
            f"--epochs {stage.epochs:g}: none of the first {PROBED} samples can be used; "
            "look at the data (python -m data.show --check), or give --steps"
        )
    tokens = stage.epochs * records * mean
    return max(1, round(tokens / (stage.rows * stage.length)))


def work_lines(setup, stage: BaseStage) -> list[str]:
    """Steps, tokens, epochs, and the memory that training state takes."""
    on_files = hasattr(setup.source, "tasks")
    records = usable_records(setup, stage) if on_files else 0
    if isinstance(stage, RLStage):
        batches = math.ceil(stage.steps / stage.updates)
        samples = batches * stage.prompts
        lines = [
            f"  work: {stage.steps:,} updates from {batches:,} rollout batches of {stage.prompts} prompts x "
            f"{stage.group} completions"
        ]
    else:
        tokens = stage.steps * stage.rows * stage.length
        mean = mean_length(setup, stage)
        samples = tokens / max(mean, 1)
        lines = [
            f"  work: {stage.steps:,} steps x {stage.rows} rows x {stage.length} tokens = {tokens:,} tokens; "
            f"a sample has about {mean:.0f}: {samples:,.0f} samples"
        ]
    if records:
        epochs = samples / records
        lines.append(f"  epochs: {epochs:.2f}")
        if epochs > 10:
            lines.append(f"  WARNING: every record is read about {epochs:.0f} times")

    lines.append(memory_line(setup, stage))
    return lines


def memory_line(setup, stage: BaseStage) -> str:
    """What trains, and the most that a rank will hold, by kind (scale/needs.py).

    Rows full of images, as long as they may be; in RL, prompts as long as the longest of the first
    samples (question and answer).
    """
    if isinstance(stage, RLStage):
        lengths = probed_lengths(setup, stage)
        longest = max(lengths, default=stage.max_prompt)
        stage = replace(stage, max_prompt=min(stage.max_prompt, longest))

    # The whole model, of which a rank may hold a part by now
    with torch.device("meta"):
        model = SailVL(setup.model.config)

    # As `train.autocast` decides
    auto = stage.precision == "auto" and half_by_default(str(setup.ranks.device))
    half = stage.precision == "bf16" or auto
    layout = setup.ranks.layout
    everyone = setup.ranks.size * layout.pp
    kinds = rank_memory(model, stage, layout.fitted(everyone), everyone, half)

    # The large ones, which do not all exist at once
    total = kinds.pop("total")
    kinds.pop("host")
    parts = [
        f"{kind} {size_text(amount)}" for kind, amount in kinds.items() if amount >= total / 100
    ]
    trained = sum(
        p.numel() for part in stage.trains for p in getattr(model, PARTS[part]).parameters()
    )
    every = sum(p.numel() for p in model.parameters())
    return (
        f"  memory: {trained / 1e6:.2f} of {every / 1e6:.2f} M parameters "
        f"train; at most {size_text(total)} at once on each rank, of {', '.join(parts)}"
    )


def size_text(amount: int) -> str:
    """Bytes in MiB, or GiB from ten on."""
    if amount < 10 * 2**30:
        return f"{amount / 2**20:,.0f} MiB"
    return f"{amount / 2**30:,.1f} GiB"
