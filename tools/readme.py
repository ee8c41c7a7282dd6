"""Regenerate what README.md claims: lines per file, the recipe, and tables of the last `make toy`, `make real` and benches.

Text between `<!-- name -->` and `<!-- /name -->` is replaced; everything else is left alone. `--check` changes nothing and
fails when the file table is out of date (the suite runs it). The figures that it shows are copied into figures/.
"""

import ast
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = {"figures/rl.svg": "runs/bench-rl/figure.svg"}  # in the repository: where a bench drew it
TABLES = {  # block of README.md: the file that a bench wrote, and which of its columns
    "adalrs": (
        "runs/adalrs/table.md",
        (
            "method",
            "start / best rate",
            "quadratic",
            "regression",
            "language",
            "connector",
            "most steps",
        ),
    ),
    "moe-cpu": ("runs/moe-cpu.md", ("implementation", "fp32", "bf16")),
    "calibration": (
        "runs/calibration.md",
        ("design", "entropy of visual tokens", "entropy of text", "text loss", "exact answers"),
    ),
    "rl": (
        "runs/bench-rl/table.md",
        (
            "run",
            "model",
            "seeds",
            "pass@1 before",
            "gain (points)",
            "counting",
            "charts",
            "arithmetic",
            "odd",
            "pass@4 gain",
            "length",
            "entropy",
            "clipped",
        ),
    ),
    "modes": (
        "runs/bench-sft/modes/modes.md",
        (
            "run",
            "direct accuracy",
            "direct length",
            "direct that think",
            "thinking accuracy",
            "thinking length",
            "thinking that think",
        ),
    ),
    "soup": ("runs/bench-sft/soup/soup.md", ("run", "rows", "overall", "distance")),
    "curriculum": (
        "runs/bench-sft/curriculum/curriculum.md",
        ("run", "rows", "tokens", "overall", "charts", "arithmetic", "odd", "video", "text"),
    ),
    "twins": (
        "runs/bench-sft/experts/experts.md",
        ("run", "total", "active", "steps", "seconds", "overall"),
    ),
}


def files() -> str:
    """Every Python file at the top: lines, and the first sentence of its docstring."""
    rows = []
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text()
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(f"| [`{path.name}`]({path.name}) | {len(text.splitlines())} | {first} |")
    tests = sorted((ROOT / "tests").glob("*.py"))
    lines = sum(len(p.read_text().splitlines()) for p in tests)
    return "\n".join(
        [
            "| file | lines | what it teaches |",
            "|---|---:|---|",
            *rows,
            f"| `tests/` | {lines} | {len(tests)} files; the suite behind `make test` |",
        ]
    )


def ladder(run: str) -> str:
    """The stages and final scores of a finished run."""
    path = ROOT / "runs" / run / "results.json"
    if not path.is_file():
        return f"(no {path.relative_to(ROOT)} yet: run `make {run}`)"
    r = json.loads(path.read_text())
    out = [
        "| stage | seconds | graded by | before | after | chance | n |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for s in r["stages"]:
        out.append(
            f"| {s['name']} | {s['seconds']:.0f} | {s['metric']} | {s['before']:.3f} | **{s['after']:.3f}** | "
            f"{s['chance']:.3f} | {s['samples']} |"
        )
    out += [
        "",
        "| family | final accuracy | standard error | chance (best blind answer) | images swapped | n |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for family, s in r["final"].items():
        swapped = r["swap"].get(family, {}).get("swapped")
        out.append(
            f"| {family} | **{s['accuracy']:.1%}** | {s['error']:.1%} | {s['chance']:.1%} | "
            f"{'' if swapped is None else f'{swapped:.1%}'} | {s['n']} |"
        )
    a, m = r["adalrs"], r["modes"]
    out += [
        "",
        f"{r['total_seconds']:.0f} seconds on {r['cores']} cores, peak memory {r['peak_memory_gib']:.1f} GiB, torch {r['versions']['torch']}, seed {r['seed']}. AdaLRS moved "
        f"the rate from {a['start_lr']:.1e} to {a['final_lr']:.1e} in {len(a['decisions'])} decisions ({a['extra_steps']} extra "
        f"steps): loss {a['loss']:.3f}, against {a['fixed_rate_loss']:.3f} at the fixed rate. Rows at least "
        f"{r['packing']['filled']:.1%} full. By default {m['direct_thinks']:.0%} of reasoning answers think (accuracy "
        f"{m['direct_accuracy']:.1%}); asked to, {m['think_thinks']:.0%} do ({m['think_accuracy']:.1%}).",
    ]
    return "\n".join(out)


def stages() -> str:
    """The recipe of pre-training at both scales, from the tables that run."""
    import pretrain

    out = [
        "| stage | trains | on | paper scale: steps x rows x tokens | rate | toy: steps x rows x tokens | rate |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    size = lambda s: f"{s.steps:,} x {s.rows} x {s.length}" if s else ""
    rate = lambda s: f"{s.lr:.0e}{', AdaLRS' if s.adalrs else ''}" if s else ""
    for name, toy in pretrain.TOY.items():
        paper = pretrain.PAPER.get(name)
        mixture = (
            ", ".join(
                f"{task} {w / sum(paper.mixture.values()):.2f}" for task, w in paper.mixture.items()
            )
            if paper
            else f"{len(toy.mixture)} tasks"
            if len(toy.mixture) > 3
            else ", ".join(toy.mixture)
        )
        out.append(
            f"| {name} | {' + '.join(toy.trains)} | {mixture} | {size(paper)} | {rate(paper)} | {size(toy)} | {rate(toy)} |"
        )
    return "\n".join(out)


def picked(path: str, columns: tuple[str, ...]) -> str:
    """These columns of a markdown table that a bench left under runs/."""
    if not (ROOT / path).is_file():
        return f"(no {path} yet)"
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in (ROOT / path).read_text().splitlines()
        if line.startswith("|")
    ]
    at = [rows[0].index(c) for c in columns]
    return "\n".join("| " + " | ".join(row[i] for i in at) + " |" for row in rows)


def experts() -> str:
    """Dense and MoE ladders until the soup: size, training time, score, and the score after as many seconds as the dense one took."""
    out = [
        "| ladder | parameters | active for a token | seconds of training until the soup | overall there | overall after the dense one's seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    limit = 0.0
    for run in ("toy", "toy-moe"):
        path = ROOT / "runs" / run / "results.json"
        if not path.is_file():
            continue
        r, spent, curve = (
            json.loads(path.read_text()),
            0.0,
            [],
        )  # (seconds, overall accuracy) after each stage
        for s in r["stages"]:
            spent += s["seconds"]
            if s["name"] in r["families_after"]:
                curve.append((spent, r["families_after"][s["name"]]["overall"]))
            if s["name"] == "soup":
                break
        limit = limit or spent
        p, then = r["parameters"], [score for seconds, score in curve if seconds <= limit][-1]
        out.append(
            f"| `runs/{run}` | {p['total'] / 1e6:.2f} M | {p['active'] / 1e6:.2f} M | {spent:.0f} | {curve[-1][1]:.1%} | **{then:.1%}** |"
        )
    return "\n".join(out)


def rewrite(text: str) -> str:
    for name, value in (
        ("files", files()),
        ("stages", stages()),
        ("experts", experts()),
        ("toy", ladder("toy")),
        ("real", ladder("real")),
        *((name, picked(path, columns)) for name, (path, columns) in TABLES.items()),
    ):
        text, n = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m: m[1] + value + "\n" + m[2],
            text,
            flags=re.DOTALL,
        )
        assert n == 1, f"README.md has {n} blocks named {name}, wanted one"
    return text


@dataclass
class Options:
    """Regenerate the measured parts of README.md."""

    check: bool = False  # only compare the table of files; fail when it differs


def main(o: Options) -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    if o.check:
        fresh = files() in old
        print(
            "README.md is up to date"
            if fresh
            else "README.md: the table of files is out of date; run `make readme`"
        )
        return 0 if fresh else 1
    path.write_text(rewrite(old))
    for name, source in FIGURES.items():
        if (ROOT / source).is_file():
            (ROOT / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / source, ROOT / name)
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
