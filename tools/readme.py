"""Regenerate what README.md and RESULTS.md claim: the tree, the recipe, memory, tables of runs.

What it teaches: a number in prose goes stale unless a command writes it. Text between
`<!-- name -->` and `<!-- /name -->` is a block: it is written anew from the tree, the code or the
newest run. A block whose run is not here keeps what it says; everything else is left alone.

    files, recipes, presets -> files, stages, rungs               -> README.md
    figures/ladder.json     -> rungs (what was measured)          -> README.md
    recipes, presets        -> memory                             -> RESULTS.md
    scale/plan.py           -> plan                               -> scale/README.md
    runs/toy-seeds          -> toy: means and ranges over seeds   -> RESULTS.md
    tools/paper.py          -> equations, sections, tables, ...   -> PAPER.md
    figures, runs/toy       -> minutes, thinking                  -> FAQ.md
    runs/.../results.json   -> toy (one run), real                -> RESULTS.md
    runs/.../table.md       -> adalrs, rl, modes, soup, ...       -> RESULTS.md

    python -m tools.readme           # write both pages
    python -m tools.readme --check   # change nothing; fail when the table of files is out of date
"""

import ast
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from curation.__main__ import CONTENTS
from infra.cli import command
from infra.table import markdown
from tools.paper import paper_blocks

ROOT = Path(__file__).parents[1]
FIGURES = {"figures/rl.svg": "runs/bench-rl/figure.svg"}  # in the repository: where a run drew it

# The order in which a reader of the paper opens the files at the top level.
READING = {
    "The model": ("attention", "llm", "moe", "vit", "adapter", "vlm"),
    "From samples to rows": ("tokenizer", "packing"),
    "The loop": ("stage", "objective", "optim", "adalrs", "train"),
    "The recipe": (
        "recipe",
        "pretrain",
        "sft",
        "soup",
        "policy_losses",
        "graders",
        "rewards",
        "rollout",
        "rl",
        "calibrate",
    ),
    "Use": ("generate", "serve", "evaluate", "toy"),
}

# The rooms: what each is for (where it has no `__init__.py` to say so), and its files in order.
ROOMS = {
    "data": "sample images tiling containers mixture stream readers encode ahead steps show world",
    "infra": "cli plan memory config weights checkpoint run_directory keeper stopping identity journal "
    "tracker judge endpoint replies text table device system",
    "scale": "layout parallel shard experts pipeline shards plan needs pace roofline devices rehearsal",
    "kernels": "moe_triton bench offline",
    "bench": "step rows packing_rules decoding serving rollouts asking",
    "claims": "rates rate_problems alignment calibration posttraining algorithms data_quality judges titles "
    "curation_sets planted_faults",
    "curation": "requests annotators oracle pipeline questions captioner recaption judges "
    "caption_statistics side_by_side charts chart_specs chart_pictures chart_questions chart_check "
    "caption2qa told classes video_scores ratings balance evaluating long_cot difficulty free_response "
    "chains asking rows report noise album",
    "realdata": "example digits shapes emoji typefaces tables stamps gcompris",
    "talk": "chat typed interrupts samples inside page",
    "serving": "batching transcript protocol fetch api connections seen",
    "smol": "language stages join measure page",
    "lessons": "page rows mask routing trial group",
    "harness": "remote world_files adapter vlmevalkit lmms",
    "tools": "report story drawing evidence compare seeds ladder paper picture screenshots readme real "
    "clipart lock",
    "tests": "",
    "requirements": "",
}
ROOM_NOTES = {
    "kernels": "The MoE layer on a GPU, in Triton: routing, grouped products, a backward without y.",
    "requirements": "What to install: open lists with a reason a line, and one lock with hashes.",
}

# Tokens that the paper prints (Table 3, sections 4.2.2 to 4.2.5).
PRINTED_TOKENS = {
    "vit3": "121B with vit1 and vit2",
    "basic": "128B",
    "multitask": "360B",
    "sft1": "42B",
    "sft2": "40B",
    "sft3": "16B",
    "sft4": "70B",
    "long-cot": "0.4B",
    "fusion": "1B",
    "verifiable": "0.1B",
    "mixed": "0.2B",
}

# What AdaLRS promises, in columns: by rule, how many runs break it and how far.
PROMISE = (
    "rule | problems | runs | above 1.05 of fixed | worst | below .95 | recovered from .1 | steps"
)

# Block of RESULTS.md: the table that a run wrote, and which of its columns are shown.
TABLES = {
    "adalrs": ("runs/adalrs/table.md", "problem | rule | 0.1 | 0.32 | 1 | 3.2 | 10 | most steps"),
    "adalrs-summary": ("runs/adalrs/summary.md", f"{PROMISE} | raised"),
    "adalrs-fresh": ("runs/adalrs-fresh/summary.md", f"{PROMISE} | raised"),
    "moe-cpu": ("runs/moe-cpu.md", "implementation | fp32 | bf16"),
    "calibration": (
        "runs/calibration.md",
        "design | entropy of visual tokens | entropy of text | text loss | exact answers",
    ),
    "rl": (
        "runs/bench-rl/table.md",
        "run | model | seeds | pass@1 before | gain (points) | counting | charts | arithmetic | odd"
        " | pass@4 gain | length | entropy | clipped",
    ),
    "modes": (
        "runs/bench-sft/modes/modes.md",
        "run | direct accuracy | direct length | direct that think"
        " | thinking accuracy | thinking length | thinking that think",
    ),
    "soup": ("runs/bench-sft/soup/soup.md", "run | rows | overall | distance"),
    "curriculum": (
        "runs/bench-sft/curriculum/curriculum.md",
        "run | rows | tokens | overall | charts | arithmetic | odd | video | text",
    ),
    "twins": (
        "runs/bench-sft/experts/experts.md",
        "run | total | active | steps | seconds | overall",
    ),
}


def markdown_table(heads: str, align: str, rows: list[tuple]) -> str:
    """Heads as "a | b", alignment as one letter a column (l or r), then the rows."""
    return "\n".join(markdown(heads.split(" | "), *rows, align=align))


# ---------------------------------------------------------------------------------- the files


def first_sentence(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")


def file_row(name: str) -> tuple[str, str]:
    """A file at the top level: its link, and what it is."""
    return f"[`{name}.py`]({name}.py)", first_sentence(ROOT / f"{name}.py")


def room_row(room: str) -> tuple[str, str]:
    """A folder: its link, what it is for, and its files in reading order."""
    home = ROOT / room
    init = home / "__init__.py"
    note = first_sentence(init) if init.is_file() else ROOM_NOTES[room]

    # Files that the order does not name come last.
    present = [path.stem for path in home.glob("*.py") if path.stem != "__init__"]
    order = ROOMS[room].split()
    named = [stem for stem in order if stem in present]
    others = sorted(set(present) - set(order)) if order else []
    links = [f"[`{stem}`]({room}/{stem}.py)" for stem in named + others]
    return f"[`{room}/`]({room})", " ".join([note, *links])


def file_table() -> str:
    """Every file at the top level in reading order, then the rooms.

    Raises ValueError for a file without a place.
    """
    placed = {name for names in READING.values() for name in names}
    missing = sorted({path.stem for path in ROOT.glob("*.py")} - placed)
    if missing:
        raise ValueError(f"{missing[0]}.py has no place in READING (tools/readme.py)")

    rows = []
    for title, names in READING.items():
        rows.append((f"**{title}**", ""))
        rows += [file_row(name) for name in names if (ROOT / f"{name}.py").is_file()]
    rows.append(("**Rooms**", ""))
    rows += [room_row(room) for room in ROOMS if (ROOT / room).is_dir()]
    return markdown_table("file | what it is", "ll", rows)


# --------------------------------------------------------------------------------- the recipe


def stage_size(stage) -> str:
    """Steps x what a step holds: packed rows of tokens, or groups of completions."""
    if stage is None:
        return ""
    if hasattr(stage, "prompts"):
        return f"{stage.steps:,} x ({stage.prompts} prompts x {stage.group}) / {stage.updates}"
    return f"{stage.steps:,} x {stage.rows} x {stage.length}"


def stage_rate(stage) -> str:
    """The peak rate, and whether AdaLRS searches from it."""
    if stage is None:
        return ""
    return f"{stage.lr:.0e}" + (", AdaLRS" if getattr(stage, "adalrs", False) else "")


def stage_tokens(name: str, stage) -> str:
    """Tokens of a stage on packed rows, and in brackets what the paper prints for it."""
    printed = PRINTED_TOKENS.get(name, "")
    if stage is None or not hasattr(stage, "rows"):
        return f"({printed})" if printed and stage else ""
    billions = stage.steps * stage.rows * stage.length / 1e9
    return f"{billions:.1f}B" + (f" ({printed})" if printed else "")


def mixture_text(paper, toy) -> str:
    """What a stage trains on: the paper's shares where it prints them, else the toy's tasks."""
    if paper and paper.mixture:
        total = sum(paper.mixture.values())
        return ", ".join(f"{task} {w / total:.2f}" for task, w in paper.mixture.items())

    tasks = ", ".join(toy.mixture)
    if len(toy.mixture) > 4:
        tasks = f"{len(toy.mixture)} tasks"
    if paper:
        return f"all of `--data`; toy: {tasks}"
    return f"toy: {tasks}"


def stage_table() -> str:
    """Every stage at both scales, from the recipes that run."""
    import pretrain
    import rl
    import sft

    rows = []
    for recipe in (pretrain, sft, rl):
        for name, toy in recipe.TOY.items():
            paper = recipe.PAPER.get(name)
            rows.append(
                (
                    f"`{recipe.__name__}.py` {name}",
                    " + ".join(toy.trains),
                    mixture_text(paper, toy),
                    stage_size(paper),
                    stage_tokens(name, paper),
                    stage_rate(paper),
                    stage_size(toy),
                    stage_rate(toy),
                )
            )
    return markdown_table(
        "stage | trains | on | paper scale: steps x rows x length | tokens (printed) | rate"
        " | toy: steps x rows x length | rate",
        "lllrrrrr",
        rows,
    )


# ----------------------------------------------------------------------------------- the rungs


def parameters_by_module(preset: str) -> dict[str, int]:
    """Parameters of the real modules, built without memory on the meta device."""
    import torch

    from vlm import PRESETS, SailVL

    with torch.device("meta"):
        model = SailVL(PRESETS[preset])
    counts = {}
    for name, module in model.named_children():
        counts[name] = sum(p.numel() for p in module.parameters())
    return counts


def training_gib(preset: str, adapter_only: bool = False) -> float:
    """GiB of one copy in training.

    fp32 weights are 4 bytes a parameter; what trains has a gradient (4) and AdamW's moments (8) too.
    """
    total = 0
    for module, count in parameters_by_module(preset).items():
        trains = module == "mlp1" or not adapter_only
        total += count * (16 if trains else 4)
    return total / 2**30


def inference_gib(preset: str) -> float:
    """GiB of the weights in bf16."""
    return 2 * sum(parameters_by_module(preset).values()) / 2**30


# Columns of the table of memory, and the kinds of infra/memory.py that each one sums.
MEMORY_COLUMNS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "moments": ("moments", "snapshots"),
    "bf16 copies": ("bf16",),
    "activations": ("activations",),
    "one block": ("block",),
    "logits": ("logits",),
    "sum over ranks": ("step",),
    "KV cache": ("kv",),
    "at once": ("total",),
}
GPU_GIB = 80


def paper_stages() -> dict[str, object]:
    """Every stage at the paper's scale, under its command's name."""
    import pretrain
    import rl
    import sft

    stages = {}
    for recipe in (pretrain, sft, rl):
        for name, stage in recipe.PAPER.items():
            stages[f"`{recipe.__name__}.py` {name}"] = stage
    return stages


def memory_table() -> str:
    """GiB on each of eight ranks by stage and kind for the 2B, and which stages hold the 8B."""
    from infra.memory import stage_memory

    rows = []
    for name, stage in paper_stages().items():
        kinds = stage_memory("SAIL-VL2-2B", stage)
        cells = []
        for parts in MEMORY_COLUMNS.values():
            amount = sum(kinds[part] for part in parts) / 2**30
            cells.append(f"{amount:.1f}" if amount else "")
        fits = "yes" if kinds["total"] < GPU_GIB * 2**30 else "no"
        rows.append((name, *cells, fits))
    heads = " | ".join(MEMORY_COLUMNS)
    align = "l" + "r" * len(MEMORY_COLUMNS) + "l"
    table = markdown_table(f"stage | {heads} | fits {GPU_GIB} GiB", align, rows)
    return f"{table}\n\n{larger_model_sentence()}"


def larger_model_sentence() -> str:
    """Which stages of the 8B fit where every rank holds all of it."""
    from infra.memory import stage_memory

    fitting = []
    others = []
    for name, stage in paper_stages().items():
        total = stage_memory("SAIL-VL2-8B", stage)["total"] / 2**30
        if total < GPU_GIB:
            fitting.append(f"{name} ({total:.0f} GiB)")
        else:
            others.append(total)
    return (
        f"SAIL-VL2-8B whole on every rank does not fit: {len(others)} of its stages need "
        f"{min(others):.0f} to {max(others):.0f} GiB. Those that leave the language model frozen do: "
        f"{', '.join(fitting)}. Sharded: scale/README.md."
    )


def rung_table() -> str:
    """From a laptop to a cluster: command, memory, what to expect, and how it is known."""
    ladder = json.loads((ROOT / "figures" / "ladder.json").read_text())
    peak = f"{ladder['peak_memory_gib']:.1f} GiB, the whole of both processes at their peak"
    toy_time = f"{ladder['total_seconds']:.0f} s on {ladder['cores']} cores"
    toy_score = f"overall {ladder['overall']:.1%}"
    if "seeds" in ladder:
        low, high = ladder["overall_range"]
        toy_time = f"mean of {len(ladder['seeds'])} seeds: {toy_time}"
        toy_score += f" ({100 * low:.1f} to {100 * high:.1f})"
    ask = "`python generate.py --model SAIL-VL2-2B --dtype bfloat16 --image a.jpg --prompt ...`"
    basic = "`python pretrain.py paper:basic --model start --data my.jsonl`"
    full = "`torchrun --nproc-per-node 8 sft.py paper:sft1 --model SAIL-VL2-2B --data my.jsonl`"

    def gib(amount: float) -> str:
        return f"{amount:.1f} GiB" if amount < 10 else f"{amount:.0f} GiB"

    rows = [
        (
            "laptop, two cores",
            "`make toy`",
            peak,
            f"{toy_time}; {toy_score}",
            f"measured {ladder['date']}",
        ),
        (
            "Mac",
            "`make toy`",
            "as the laptop",
            "runs on the CPU cores; `--device mps` trains a stage on its GPU, in fp32",
            "not tried",
        ),
        (
            "one GPU",
            "`torchrun --standalone --nproc-per-node 1 toy.py`",
            "3.3 GiB of the host's memory; the card's was not read",
            "the same ladder in bf16, with earlier steps: 282 s on an H100, overall 90.4%",
            "measured 2026-11-26: [bench/h100.md](bench/h100.md)",
        ),
        (
            "one GPU of 8 GB",
            ask,
            f"{gib(inference_gib('SAIL-VL2-2B'))}, cache and activations beside it",
            "ask the released 2B model",
            "computed",
        ),
        (
            "one GPU of 24 GB",
            basic,
            f"{gib(training_gib('SAIL-VL2-2B', adapter_only=True))} + activations",
            "train the 2B model's adapter",
            "computed",
        ),
        (
            "one GPU of 80 GB",
            "`python sft.py paper:sft1 --model SAIL-VL2-2B --data my.jsonl`",
            f"{gib(training_gib('SAIL-VL2-2B'))} + activations",
            "train all of the 2B model: 11,165 tokens a second on an H100, 51.8 GiB at the peak",
            "the same steps by `bench.gpu`, 2026-11-26: [bench/h100.md](bench/h100.md)",
        ),
        (
            "one node, 8 x 80 GB",
            full,
            f"{gib(training_gib('SAIL-VL2-2B'))} a GPU + activations",
            "the same, eight rows at once: every rank holds a whole copy",
            "computed",
        ),
        (
            "cluster",
            "`sbatch --nodes 8 scale/launch/slurm.sh sft.py paper:sft1 ... --layout.shard 16`",
            f"8B: {gib(training_gib('SAIL-VL2-8B'))} a copy, "
            f"30B-A3B: {gib(training_gib('SAIL-VL2-30B-A3B'))}, over the GPUs that share it",
            "stage by stage: [scale/README.md](scale/README.md)",
            "computed",
        ),
        (
            "NPU",
            "the GPU's commands",
            "as the GPU's",
            "devices are chosen through `torch.accelerator`; the Triton kernels are for CUDA",
            "not tried",
        ),
    ]
    return markdown_table(
        "where | command | memory of weights and optimizer | what to expect | known how",
        "lllll",
        rows,
    )


# ---------------------------------------------------------------------------------- the plans

# Models and numbers of H100 that scale/README.md plans.
CLUSTERS = (("2b", 8), ("8b", 8), ("8b", 16), ("30b-a3b", 8), ("30b-a3b", 64))


def plan_row(plan) -> tuple:
    """A stage's plan, in cells."""
    from scale.needs import step_traffic
    from scale.plan import layout_text, meta_model

    held = plan.memory
    standing = ("weights", "gradients", "moments", "snapshots", "reference")
    flows = step_traffic(meta_model(plan.preset), plan.stage, plan.layout, plan.devices)
    layout = f"`{layout_text(plan.layout)}`" if not plan.layout.plain else "whole copies"
    if hasattr(plan.stage, "prompts"):
        layout += f" `--batch {plan.stage.batch}`"
    head = (
        plan.name + ("*" if plan.uneven else ""),
        layout if plan.fits else f"none fits; nearest {layout}",
        f"{sum(held[kind] for kind in standing) / 2**30:.1f}",
        f"{held['total'] / 2**30:.1f}",
        f"{sum(flow.wired for flow in flows.values()) / 1e9:.0f}",
    )
    if not plan.fits:
        return (*head, "", "", "", "")
    return (
        *head,
        f"{plan.pace.seconds['step']:.1f}",
        f"{plan.pace.utilisation(plan.devices, plan.device):.0%}",
        f"{plan.days:.2f}",
        f"{plan.dollars():,.0f}",
    )


def plan_table(preset: str, devices: int, names: tuple[str, ...] = ()) -> str:
    """The plans of all stages, or of some, on so many H100."""
    from scale.devices import device_named
    from scale.plan import STAGES, preset_named, search_layouts

    device = device_named("h100")
    rows = []
    for name in names or STAGES:
        plans = search_layouts(preset_named(preset), name, devices, device)
        rows.append(plan_row(plans[0]))
    return markdown_table(
        "stage | layout | standing, GiB | at once, GiB | sent, GB | step, s | MFU | days | $",
        "llrrrrrrr",
        rows,
    )


def plan_tables() -> str:
    """scale/README.md: every stage of every model on its devices."""
    parts = []
    for preset, devices in CLUSTERS:
        parts.append(f"### {preset.upper()} on {devices}\n\n{plan_table(preset, devices)}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------- the runs


def ladder_tables(run: str) -> str | None:
    """The stages and final scores of a finished run; None when it is not here."""
    path = ROOT / "runs" / run / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text())

    stages = []
    for s in results["stages"]:
        stages.append(
            (
                s["name"],
                f"{s['seconds']:.0f}",
                s["metric"],
                f"{s['before']:.3f}",
                f"**{s['after']:.3f}**",
                f"{s['chance']:.3f}",
                s["samples"],
            )
        )

    families = []
    for family, s in results["final"].items():
        swapped = results["swap"].get(family, {}).get("swapped")
        families.append(
            (
                family,
                f"**{s['accuracy']:.1%}**",
                f"{s['error']:.1%}",
                f"{s['chance']:.1%}",
                "" if swapped is None else f"{swapped:.1%}",
                s["n"],
            )
        )

    parts = [
        markdown_table(
            "stage | seconds | graded by | before | after | chance | n", "lrlrrrr", stages
        ),
        markdown_table(
            "family | final accuracy | standard error | chance (best blind answer)"
            " | images swapped | n",
            "lrrrrr",
            families,
        ),
        ladder_sentences(results),
    ]
    return "\n\n".join(parts)


def ladder_sentences(results: dict) -> str:
    """What a run took, what AdaLRS did, and when the model thinks."""
    search = results["adalrs"]
    modes = results["modes"]
    return (
        f"{results['total_seconds']:.0f} seconds on {results['cores']} cores, peak memory "
        f"{results['peak_memory_gib']:.1f} GiB, torch {results['versions']['torch']}, "
        f"seed {results['seed']}. AdaLRS moved the rate from {search['start_lr']:.1e} to "
        f"{search['final_lr']:.1e} in {len(search['decisions'])} decisions "
        f"({search['extra_steps']} extra steps). Rows at least "
        f"{results['packing']['filled']:.1%} full. By default {modes['direct_thinks']:.0%} of "
        f"reasoning answers think (accuracy {modes['direct_accuracy']:.1%}); asked to, "
        f"{modes['think_thinks']:.0%} do ({modes['think_accuracy']:.1%})."
    )


def tables_over_seeds(name: str) -> str | None:
    """A ladder over seeds, of every model that was run; one run where there are no seeds."""
    path = ROOT / "runs" / f"{name}-seeds" / "summary.json"
    if not path.is_file():
        return ladder_tables(name)
    summary = json.loads(path.read_text(encoding="utf-8"))
    parts = [seed_tables(model, part) for model, part in summary.items()]
    return "\n\n".join(parts)


def seed_tables(model: str, part: dict) -> str:
    """The stages and final scores of several seeds of one model."""
    from tools.seeds import how_often, skill_words, thinking_words, where_and_when

    stages = []
    for s in part["stages"]:
        stages.append(
            (
                s["name"],
                f"{s['seconds']['mean']:.0f}",
                s["metric"],
                f"{s['before']['mean']:.3f}",
                f"**{s['after']['mean']:.3f}**",
                f"{s['after']['low']:.3f} to {s['after']['high']:.3f}",
                how_often(s, len(part["seeds"])),
                f"{s['chance']:.3f}",
                s["samples"],
            )
        )

    families = []
    for family, s in part["final"].items():
        r = s["accuracy"]
        families.append(
            (
                family,
                f"**{r['mean']:.1%}**",
                f"{100 * r['low']:.1f} to {100 * r['high']:.1f}",
                f"{s['chance']:.1%}",
                math.floor(s["over_chance"]["low"]),
                "" if s["swapped"] is None else f"{s['swapped']:.1%}",
                skill_words(part["skills"][family]),
            )
        )

    stage_heads = "stage | seconds | graded by | before | after | range | better in | chance | n"
    family_heads = (
        "family | final accuracy | range | chance (best blind answer) | errors above it, at least | "
        "images swapped | came with"
    )
    seconds = part["seconds"]
    parts = [
        f"**{model}**, {where_and_when(part)}. Means over seeds; surely: by two standard errors.",
        markdown_table(stage_heads, "lrlrrrlrr", stages),
        markdown_table(family_heads, "lrrrrrl", families),
        f"{seconds['mean']:.0f} seconds in the mean ({seconds['low']:.0f} to {seconds['high']:.0f}), "
        f"{thinking_words(part)}.",
    ]
    return "\n\n".join(parts)


def smol_tables() -> str | None:
    """What SmolLM2 sees and what it still knows, after `make smol`; None when it was not run here."""
    path = ROOT / "runs" / "smol" / "answers" / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text())

    # Captions, in nats a token
    heads = (
        "its own picture | another's | blind guess | bigram | margin of seeing over the blind guess"
    )
    names = ("seen", "swapped", "blind", "bigram", "margin")
    losses = [tuple(f"{results['losses'][name]:.3f}" for name in names)]

    # Answers
    answers = []
    for family, (accuracy, chance, error, n) in results["scores"].items():
        answers.append((family, f"**{accuracy:.1%}**", f"{error:.1%}", f"{chance:.1%}", n))

    # What it cost, and whether text was kept
    minutes = {name: stage_minutes(path.parents[1] / name) for name in ("eyes", "align", "answers")}
    cost = ", ".join(f"{name} {m:.0f}" for name, m in minutes.items())
    text = results["text"]
    parts = [
        f"Loss of {results['captions']} held-out captions, in nats a token:",
        markdown_table(heads, "rrrrr", losses),
        markdown_table(
            "family | accuracy | standard error | chance (best blind answer) | n", "lrrrr", answers
        ),
        f"Perplexity of plain text {text['before']:.3f} before, {text['after']:.3f} after "
        f"({text['change']:+.2%}). Minutes of training: {cost}.",
    ]
    return "\n\n".join(parts)


def stage_minutes(run: Path) -> float:
    """How long a run's steps took, by its log."""
    stage = json.loads((run / "stage.json").read_text())
    lines = (run / "log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["tokens_per_second"] for line in lines]
    return sum(stage["rows"] * stage["length"] / rate for rate in rates) / 60


def run_table(path: str, columns: str) -> str | None:
    """These columns of a markdown table that a run left; None when it is not here."""
    if not (ROOT / path).is_file():
        return None
    rows = []
    for line in (ROOT / path).read_text().splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])

    at = [rows[0].index(column) for column in columns.split(" | ")]
    return "\n".join("| " + " | ".join(row[i] for i in at) + " |" for row in rows)


def tables_in(path: str) -> str | None:
    """What a run wrote; None when it is not here."""
    if not (ROOT / path).is_file():
        return None
    return (ROOT / path).read_text(encoding="utf-8").strip()


def contents_table() -> str:
    """What `python -m curation` lists, with the file of each."""
    rows = []
    for chapter, entries in CONTENTS.items():
        rows.append((f"**{chapter}**", ""))
        for entry in entries:
            module = entry.place.partition(":")[0].removeprefix("curation.")
            rows.append((f"[`{entry.name}`]({module}.py)", entry.line))
    return markdown_table("command | what it does", "ll", rows)


def curation_blocks() -> dict[str, str | None]:
    """Every block of curation/README.md; None where the run is not here."""
    runs = {
        "judges": "judges3/table.md",
        "data-quality": "data-quality/effects.md",
        "quick": "data-quality/quick.md",
        "scale": "data-quality/scale.md",
        "classes": "sets/classes.md",
        "again": "sets/again.md",
        "videos": "sets/videos.md",
        "chains": "sets/chains.md",
        "trained": "sets/trained.md",
        "asking": "asking.md",
        "titles": "titles.md",
    }
    blocks = {name: tables_in(f"runs/curation/{path}") for name, path in runs.items()}
    printed = [tables_in(f"runs/{path}") for path in ("thousand.txt", "thousand/check.txt")]
    blocks["charts"] = "```\n{}\n{}\n```".format(*printed) if all(printed) else None
    return {"contents": contents_table()} | blocks


# --------------------------------------------------------------------------------- the pages


def results_blocks() -> dict[str, str | None]:
    """Every block of RESULTS.md; None where the run is not here."""
    blocks = {
        "toy": tables_over_seeds("toy"),
        "real": tables_over_seeds("real"),
        "smol": smol_tables(),
        "memory": memory_table(),
    }
    for name, (path, columns) in TABLES.items():
        blocks[name] = run_table(path, columns)
    return blocks


def readme_blocks() -> dict[str, str | None]:
    """Every block of README.md."""
    return {"files": file_table(), "stages": stage_table(), "rungs": rung_table()}


def faq_blocks() -> dict[str, str | None]:
    """Every block of FAQ.md: what the last ladder took, and what thinking did to it."""
    ladder = json.loads((ROOT / "figures" / "ladder.json").read_text())
    minutes = (
        f"The last `make toy`: {ladder['total_seconds']:.0f} s on {ladder['cores']} cores, "
        f"{ladder['peak_memory_gib']:.1f} GiB ({ladder['date']}, torch {ladder['torch']})."
    )
    return {"minutes": minutes, "thinking": thinking_sentence("toy")}


def thinking_sentence(run: str) -> str | None:
    """Direct answers beside those that were asked to think; None where the run is not here."""
    path = ROOT / "runs" / run / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    modes = results["modes"]
    direct = modes["direct_accuracy"]
    thinking = modes["think_accuracy"]
    verdict = "wins" if thinking > direct else "loses"
    return (
        f"In the last `make toy` (seed {results['seed']}) it {verdict}: of the reasoning questions "
        f"{direct:.1%} are answered rightly at once, {thinking:.1%} after thinking."
    )


PAGES: dict[str, Callable[[], dict[str, str | None]]] = {
    "README.md": readme_blocks,
    "RESULTS.md": results_blocks,
    "scale/README.md": lambda: {"plan": plan_tables()},
    "curation/README.md": curation_blocks,
    "PAPER.md": paper_blocks,
    "FAQ.md": faq_blocks,
}


def replace_block(text: str, name: str, value: str, page: str) -> str:
    """The page's text with one block written anew. Raises ValueError unless there is exactly one."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    found = len(block.findall(text))
    if found != 1:
        raise ValueError(f"{page} has {found} blocks named {name}, wanted one")
    return block.sub(lambda match: f"{match[1]}{value}\n{match[2]}", text)


def rewrite_page(page: str) -> None:
    """Write the blocks of one page anew, but for those whose run is not here."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    for name, value in PAGES[page]().items():
        if value is None:
            print(f"{page}: block {name} is kept, its run is not here")
        else:
            text = replace_block(text, name, value, page)
    path.write_text(text, encoding="utf-8")


@dataclass
class ReadmeOptions:
    """Regenerate the measured parts of README.md and RESULTS.md."""

    check: bool = False  # only compare the table of files; fail when it differs


def write_pages(options: ReadmeOptions) -> int:
    """Write all pages and copy figures, or check the table of files."""
    if options.check:
        fresh = file_table() in (ROOT / "README.md").read_text(encoding="utf-8")
        state = "is up to date" if fresh else "is out of date; run `make readme`"
        print(f"README.md: the table of files {state}")
        return 0 if fresh else 1

    for page in PAGES:
        rewrite_page(page)
    for name, source in FIGURES.items():
        if (ROOT / source).is_file():
            shutil.copyfile(ROOT / source, ROOT / name)
    return 0


if __name__ == "__main__":
    command(write_pages)
