"""AdaLRS on trial: four problems, wrong starts, and the other ways of not choosing a learning rate.

What it teaches: a search for the rate is worth what it saves against a grid, so the grid is run too. Each problem is trained
at fixed rates a quarter of a decade apart; then from starts 32 times below to 10 times above the best of them, fixed, with
AdaLRS, and with AdaLRS that is `cautious`; then with an LR range test, Prodigy, D-Adaptation and Schedule-Free. Everything has
the same schedule (warm-up over 5 %, cosine to a tenth) but Schedule-Free, which has its own. 5 seeds: data, noise and initial
weights.

    python -m claims.rates                                  # all, about an hour on one core; resumes where it stopped
    python -m claims.rates --problems quadratic regression  # a part
    python -m claims.rates --report True                    # only the table and runs/adalrs/report.html

Starts are kept relative to the best rate of the grid: remove runs.jsonl after changing a grid.

Problems: a noisy quadratic under SGD, whose rates are known (stable below 2, the largest curvature being 1); streaming linear
regression under Adam; a small language model on the toy world's sentences; the toy VLM's adapter (the repository's basic
pre-training) on a language model and a ViT that were trained a little before. Needs requirements/bench.txt.
"""

import json
import math
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from adalrs import AdaLRS
from tools import report

STARTS = tuple(10**e for e in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0))
SCHEDULE_FREE = (0.1, 1.0, 10.0)  # its starts, as multiples of the best fixed rate


class Quadratic:
    """0.5 sum_i c_i (w_i - x_i)^2, curvatures c from 1 to .01, x fresh noise around 0; loss of a batch of 8."""

    steps, grid, adam = 1500, (-1.25, 0.5), False

    def __init__(self, seed: int):
        self.noise = torch.Generator().manual_seed(seed)
        self.curvature = torch.logspace(0, -2, 50)
        self.w = torch.nn.Parameter(3 * torch.randn(50, generator=self.noise))
        self.parameters = [self.w]

    def loss(self) -> torch.Tensor:
        x = 0.5 * torch.randn(8, 50, generator=self.noise)
        return 0.5 * (self.curvature * (self.w - x).square()).sum(1).mean()

    def final(self) -> float:
        """The expected loss, exactly."""
        return 0.5 * float((self.curvature * (self.w.detach().square() + 0.25)).sum())


class Regression:
    """Linear regression on a stream: 40 inputs of standard deviations 1 to .1, output noise .3, batches of 16."""

    steps, grid, adam = 1500, (-3.0, -1.0), True

    def __init__(self, seed: int):
        self.noise = torch.Generator().manual_seed(seed)
        self.spread, self.truth = (
            torch.logspace(0, -1, 40),
            0.5 * torch.randn(40, generator=self.noise),
        )
        self.w = torch.nn.Parameter(torch.zeros(40))
        self.parameters = [self.w]

    def loss(self) -> torch.Tensor:
        x = self.spread * torch.randn(16, 40, generator=self.noise)
        return (
            (x @ (self.w - self.truth) - 0.3 * torch.randn(16, generator=self.noise))
            .square()
            .mean()
        )

    def final(self) -> float:
        return float((self.spread * (self.w.detach() - self.truth)).square().sum()) + 0.09


class Language:
    """Next byte of the toy world's sentences: the repository's Qwen3 decoder, 2 layers of width 48."""

    steps, grid, adam = 400, (-3.5, -1.25), True
    text = None

    def __init__(self, seed: int):
        from attention import Segments
        from data.world import corpus
        from llm import LLM, LLMConfig

        if Language.text is None:
            Language.text = torch.tensor(list(" ".join(corpus(3000)).encode()))
        self.noise = torch.Generator().manual_seed(seed)
        self.model = LLM(
            LLMConfig(256, 48, 128, 2, 3, 1, 16, rope_theta=1e4, tie_word_embeddings=False)
        )
        self.model.init_weights(self.noise)
        self.parameters, self.segments = list(self.model.parameters()), Segments.of([64] * 8)
        self.held = self.batch(torch.Generator().manual_seed(99), 32)

    def batch(self, noise, rows: int = 8) -> torch.Tensor:
        at = torch.randint(len(self.text) - 65, (rows, 1), generator=noise)
        return self.text[at + torch.arange(65)]

    def loss(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        from attention import Segments, attend_inside

        ids = self.batch(self.noise) if ids is None else ids
        segments = Segments.of([64] * len(ids))
        x = self.model.embed(ids[:, :-1].reshape(-1))
        hidden = self.model(x, segments.positions(), attend_inside(segments, causal=True))
        return torch.nn.functional.cross_entropy(self.model.lm_head(hidden), ids[:, 1:].reshape(-1))

    @torch.no_grad()
    def final(self) -> float:
        return float(self.loss(self.held))


class Connector:
    """Basic pre-training of the toy: only the adapter trains, on captions; one packed row of 384 tokens a step."""

    steps, grid, adam = 240, (-2.75, -0.5), True
    parts = None

    def __init__(self, seed: int):
        self.model, self.encoder, self.supervised, self.answers, held = (
            self.parts or Connector.prepare()
        )
        self.model.mlp1.init_weights(torch.Generator().manual_seed(seed))
        self.parameters = list(self.model.mlp1.parameters())
        self.data, self.held = self.supervised(seed), held

    @staticmethod
    def prepare():
        """A language model that knows captions from descriptions and a ViT aligned to another copy of it, once."""
        import pretrain
        import recipe
        from data import world
        from data.encode import Encoder
        from data.sample import Faults
        from packing import collate
        from train import answers, freeze

        torch.manual_seed(0)
        source, base = world.World(), replace(pretrain.TOY["basic"], rows=1, length=384)
        model, tokenizer = recipe.new_model("toy", source)
        encoder = Encoder(tokenizer, model.config, max_length=384)
        for name, steps in (("language", 60), ("vit2", 80)):
            stage = replace(pretrain.TOY[name], steps=steps, rows=2, length=384, schedule="wsd")
            pretrain.run_stage(model, stage, source, encoder)
            if name == "language":
                language = pretrain.stand_in_parts(model)
        model.language_model.load_state_dict(language)
        freeze(model, ("adapter",))
        held = collate([[encoder(s) for s in source.held_out("caption", 60)]], None, tokenizer.pad)
        stream = lambda seed: pretrain.supervised(
            source, replace(base, seed=seed), encoder, Faults()
        )
        Connector.parts = model, encoder, stream, answers, held
        return Connector.parts

    def loss(self) -> torch.Tensor:
        (batch,) = next(self.data)
        return self.answers(self.model, batch)[0] / batch.weight

    @torch.no_grad()
    def final(self) -> float:
        return self.answers(self.model, self.held)[1]["loss"] / self.held.weight


PROBLEMS = {
    "quadratic": Quadratic,
    "regression": Regression,
    "language": Language,
    "connector": Connector,
}


def schedule(step: int, steps: int, kind: str = "cosine") -> float:
    """Share of the peak rate: warm-up over 5 %, then cosine to a tenth (or wsd: linear to zero over the last fifth)."""
    warm = steps // 20
    if step < warm:
        return (step + 1) / warm
    t = (step - warm) / (steps - warm)
    return min(1.0, 5 * (1 - t)) if kind == "wsd" else 0.1 + 0.45 * (1 + math.cos(math.pi * t))


def optimizer_for(problem, rate: float) -> torch.optim.Optimizer:
    return (
        torch.optim.AdamW(
            problem.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        if problem.adam
        else torch.optim.SGD(problem.parameters, lr=rate)
    )


def range_test(problem, low: float = 1e-6, high: float = 10.0, steps: int = 100) -> float:
    """Smith's LR range test: the rate grows exponentially; suggests where the smoothed loss falls fastest per decade. Stops
    at four times the best smoothed loss."""
    optimizer, rates, curve, mean = optimizer_for(problem, low), [], [], 0.0
    for i in range(steps):
        rate = low * (high / low) ** (i / (steps - 1))
        loss = one_step(problem, optimizer, rate)
        mean = 0.9 * mean + 0.1 * loss
        curve.append(mean / (1 - 0.9 ** (i + 1)))
        rates.append(rate)
        if not curve[-1] < 4 * min(curve):
            break
    steepest = min(range(5, len(curve) - 1), key=lambda i: curve[i + 1] - curve[i])
    return rates[steepest]


def one_step(problem, optimizer, rate: float | None) -> float:
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    loss = problem.loss()
    optimizer.zero_grad()
    loss.backward()
    if math.isfinite(float(loss.detach())):
        optimizer.step()
    return float(loss.detach())


def fixed(kind, seed: int, rate: float) -> dict:
    problem = kind(seed)
    optimizer = optimizer_for(problem, rate)
    losses = [
        one_step(problem, optimizer, rate * schedule(i, kind.steps)) for i in range(kind.steps)
    ]
    return {"final": problem.final(), "steps": 1.0, "losses": losses}


def adalrs(kind, seed: int, rate: float, shape: str = "cosine", cautious: bool = False) -> dict:
    problem, step, losses, rates = kind(seed), 0, [], []
    optimizer = optimizer_for(problem, rate)
    search = AdaLRS(problem.parameters, [optimizer], kind.steps, cautious=cautious)
    while step < kind.steps:
        rates.append(rate * schedule(step, kind.steps, shape) * search.scale)
        losses.append(one_step(problem, optimizer, rates[-1]))
        step = search.observe(losses[-1])
    return {
        "final": problem.final(),
        "steps": len(losses) / kind.steps,
        "scale": search.scale,
        "losses": losses,
        "lrs": rates,
        "decisions": search.log(),
    }


def after_range_test(kind, seed: int) -> dict:
    return fixed(kind, seed, rate := range_test(kind(seed))) | {
        "steps": 1 + 100 / kind.steps,
        "rate": rate,
    }


def package(name: str):
    """Rate-free methods as their authors recommend them: lr 1 and the cosine schedule."""

    def run(kind, seed: int) -> dict:
        import dadaptation
        import prodigyopt

        problem = kind(seed)
        made = {
            "prodigy": lambda: prodigyopt.Prodigy(
                problem.parameters, lr=1.0, betas=(0.9, 0.95), safeguard_warmup=True
            ),
            "d-adaptation": lambda: dadaptation.DAdaptAdam(
                problem.parameters, lr=1.0, betas=(0.9, 0.95)
            ),
        }[name]()
        losses = [one_step(problem, made, schedule(i, kind.steps)) for i in range(kind.steps)]
        return {"final": problem.final(), "steps": 1.0, "losses": losses}

    return run


def schedule_free(kind, seed: int, rate: float) -> dict:
    import schedulefree

    problem, warm = kind(seed), kind.steps // 20
    optimizer = (
        schedulefree.AdamWScheduleFree(problem.parameters, lr=rate, warmup_steps=warm)
        if kind.adam
        else schedulefree.SGDScheduleFree(problem.parameters, lr=rate, warmup_steps=warm)
    )
    optimizer.train()
    losses = [one_step(problem, optimizer, None) for _ in range(kind.steps)]
    optimizer.eval()
    return {"final": problem.final(), "steps": 1.0, "losses": losses}


class Results:
    """One JSON line per run, so that the bench can be stopped and goes on where it was."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = {tuple(r["key"]): r for r in map(json.loads, lines)}

    def get(self, problem: str, method: str, place: float, seed: int, run) -> dict:
        """`place`: log10 of the rate, or of the start over the best rate."""
        key = (problem, method, round(place, 3), seed)
        if key not in self.rows:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # Prodigy and D-Adaptation on deprecated torch calls
                row = run() | {"key": key}
            self.rows[key] = row
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        return self.rows[key]

    def mean(self, *key) -> float:
        values = [r["final"] for k, r in self.rows.items() if k[:3] == key]
        return sum(values) / len(values)

    def best(self, problem: str) -> float:
        """log10 of the best fixed rate, by the mean final loss over the seeds."""
        places = {k[2] for k in self.rows if k[:2] == (problem, "grid")}
        return min(
            places,
            key=lambda p: m if math.isfinite(m := self.mean(problem, "grid", p)) else math.inf,
        )


def measure(results: Results, name: str, seeds: int) -> None:
    kind, (low, high) = PROBLEMS[name], PROBLEMS[name].grid
    places = [low + 0.25 * i for i in range(round((high - low) / 0.25) + 1)]
    for seed in range(seeds):
        for p in places:
            results.get(name, "grid", p, seed, lambda: fixed(kind, seed, 10**p))
    best = 10 ** results.best(name)
    for seed in range(seeds):
        for start in STARTS:
            e = math.log10(start)
            results.get(name, "adalrs", e, seed, lambda: adalrs(kind, seed, best * start))
            results.get(
                name,
                "adalrs, cautious",
                e,
                seed,
                lambda: adalrs(kind, seed, best * start, cautious=True),
            )
            same = results.rows.get((name, "grid", round(math.log10(best) + e, 3), seed))
            results.get(name, "fixed", e, seed, lambda: same or fixed(kind, seed, best * start))
        for start in SCHEDULE_FREE:
            results.get(
                name,
                "schedule-free",
                math.log10(start),
                seed,
                lambda: schedule_free(kind, seed, best * start),
            )
        results.get(name, "range test", 0, seed, lambda: after_range_test(kind, seed))
        for method in ("prodigy", "d-adaptation"):
            results.get(name, method, 0, seed, lambda: package(method)(kind, seed))
        if name == "regression":
            results.get(
                name, "adalrs, wsd", -1, seed, lambda: adalrs(kind, seed, best * 0.1, "wsd")
            )


def table(results: Results) -> str:
    """Final loss over that of the best fixed rate with the same seed: mean (worst) over the seeds; and steps made."""
    found = [p for p in PROBLEMS if any(k[0] == p for k in results.rows)]
    out = [
        "| method | start / best rate | " + " | ".join(found) + " | most steps |",
        "|---|---:|" + "---:|" * (len(found) + 1),
    ]
    methods = defaultdict(set)
    for _, method, place, _ in results.rows:
        methods[method].add(place)
    for method in [m for m in methods if m != "grid"]:
        for place in sorted(methods[method]):
            cells, steps = [], 0.0
            for p in found:
                rows = [r for k, r in results.rows.items() if k[:3] == (p, method, place)]
                ratios = [
                    r["final"] / results.rows[p, "grid", results.best(p), r["key"][3]]["final"]
                    for r in rows
                ]
                steps = max([steps] + [r["steps"] for r in rows])
                bad = any(
                    not x < 1000 for x in ratios
                )  # a finite loss a thousand times too large has diverged too
                cells.append(
                    "diverged"
                    if bad
                    else f"{sum(ratios) / len(ratios):.3f} ({max(ratios):.3f})"
                    if ratios
                    else ""
                )
            start = (
                f"{10**place:.2g}" if len(methods[method]) > 1 or method == "adalrs, wsd" else ""
            )
            out.append(f"| {method} | {start} | " + " | ".join(cells) + f" | {steps:.2f} |")
    rates = ", ".join(f"{p} {10 ** results.best(p):.2g}" for p in found)
    return "\n".join(out) + f"\n\nBest fixed rates: {rates}."


def page(results: Results, path: Path) -> None:
    """Loss and rate with every decision, for each problem from each start (seed 0), beside the same start held fixed. Losses
    are drawn up to one and a half times the first."""
    runs, cut = (
        {},
        lambda losses: [
            min(x, 1.5 * losses[0]) if math.isfinite(x) else 1.5 * losses[0] for x in losses
        ],
    )
    for (problem, method, place, seed), r in results.rows.items():
        if method.startswith("adalrs") and not method.endswith("wsd") and seed == 0:
            runs[f"{problem}, {method}, start {10**place:.2g} of the best"] = {
                "losses": cut(r["losses"]),
                "lrs": r["lrs"],
                "decisions": r["decisions"],
                "compare": cut(results.rows[problem, "fixed", place, seed]["losses"]),
            }
    body = report.el("h1", "AdaLRS from wrong starts") + report.curves(runs)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">{report.el("title", "AdaLRS")}'
        f"{report.el('style', report.CSS)}<body>{body}</body></html>\n",
        encoding="utf-8",
    )


@dataclass
class Options:
    """Measure AdaLRS against a grid of fixed rates and the other methods."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    seeds: int = 5
    out: Path = Path("runs/adalrs")
    report: bool = False  # only table and page, of what was measured so far


def main(o: Options) -> int:
    results = Results(o.out / "runs.jsonl")
    for name in o.problems if not o.report else ():
        if name not in PROBLEMS:
            raise ValueError(f"--problems {name!r}: choose from {', '.join(PROBLEMS)}")
        measure(results, name, o.seeds)
    page(results, o.out / "report.html")
    (o.out / "table.md").write_text(table(results) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff,))))
