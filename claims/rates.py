"""AdaLRS on trial: twenty problems, wrong starts, and the other ways of not choosing a learning rate.

What it teaches: a search for the rate is worth what it saves against a grid, so the grid is run too.
Each problem is trained at fixed rates half a decade apart; then from starts ten times below to ten times
above the best of them: fixed, with AdaLRS as published (rule="paper"), and with the rule that means to
do no harm (rule="safe", the default). The four oldest problems are also given to an LR range test,
Prodigy, D-Adaptation and Schedule-Free. Everything has the same schedule (warm-up over 5 %, cosine to a
tenth) but Schedule-Free, which has its own. 5 seeds: data, noise and initial weights.

    grid of fixed rates -> best -> starts .1 .. 10 of it -> fixed | paper | safe -> runs.jsonl -> table.md

    python -m claims.rates                                  # all, an hour on one core; resumes
    python -m claims.rates --problems quadratic regression  # a part
    python -m claims.rates --report                         # only the table and runs/adalrs/report.html

Starts are kept relative to the best rate of the grid: remove runs.jsonl after changing a grid, a problem
or the number of seeds.

Losses below a thousandth of the one before training count as that thousandth (`FLOOR`): what lies below
is called zero. Every final loss is an expectation, or the mean over a whole set, not the loss of a
batch.

A stream of data is never rewound, so a step that was taken back draws fresh data when it is made again.
But the first time it is made, a step has the same data in every run (common random numbers): a search
that keeps nothing ends exactly where the fixed rate does, and what differs is what the search did.

Needs requirements/bench.txt.
"""

import importlib.util
import json
import math
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adalrs import AdaLRS
from infra.cli import command
from optim import Muon
from tools import report

STARTS = tuple(10**e for e in (-1.0, -0.5, 0.0, 0.5, 1.0))
FLOOR = 1e-3  # of the loss before training: what lies below is called zero
SCHEDULE_FREE = (0.1, 1.0, 10.0)  # its starts, as multiples of the best fixed rate
PACKAGES = ("sklearn", "schedulefree", "prodigyopt", "dadaptation")


# --------------------------------------------------------------------------------------- problems


class Problem:
    """What is trained: `loss()` draws the next batch; `final()` is what counts, an expectation.

    `parameters` are optimized and `buffers` are restored with them. `begin_step` chooses the step's
    data, see above; data that change as the run proceeds do so by the furthest step, since a stream does
    not go back.
    """

    steps = 600
    grid = (-3.0, 0.0)  # log10 of the lowest and of the highest fixed rate
    optimizer = "adamw"
    buffers: list[Tensor] = []
    parameters: list[nn.Parameter]

    def __init__(self, seed: int):
        self.seed = seed
        self.noise = torch.Generator().manual_seed(seed)
        self.visits: dict[int, int] = defaultdict(int)
        self.furthest = 0

    def begin_step(self, step: int) -> None:
        """The first time, a step has the data that it has in every run; made again, it has fresh ones."""
        fresh = self.seed + 1000 * self.visits[step]
        self.visits[step] += 1
        self.furthest = max(self.furthest, step)
        self.noise.manual_seed(100_003 * (fresh + 1) + step)
        torch.manual_seed(100_003 * (fresh + 1) + step)  # dropout

    def loss(self) -> Tensor:
        raise NotImplementedError

    def final(self) -> float:
        raise NotImplementedError


class Quadratic(Problem):
    """0.5 sum_i c_i (w_i - x_i)^2, curvatures c from 1 to .01, x fresh noise around 0; loss of a batch of 8.

    Under gradient descent its rates are known: stable below 2."""

    steps = 1500
    grid = (-1.5, 1.0)
    optimizer = "sgd"

    def __init__(self, seed: int):
        super().__init__(seed)
        self.curvature = torch.logspace(0, -2, 50)
        self.w = nn.Parameter(3 * torch.randn(50, generator=self.noise))
        self.parameters = [self.w]

    def loss(self) -> Tensor:
        x = 0.5 * torch.randn(8, 50, generator=self.noise)
        return 0.5 * (self.curvature * (self.w - x).square()).sum(1).mean()

    def final(self) -> float:
        return 0.5 * float((self.curvature * (self.w.detach().square() + 0.25)).sum())


class Regression(Problem):
    """Linear regression on a stream: 40 inputs of standard deviations 1 to .1, batches of 16, output noise
    .3.
    """

    steps = 1500
    grid = (-3.5, 0.5)
    sigma = 0.3  # standard deviation of the output noise

    def __init__(self, seed: int):
        super().__init__(seed)
        self.spread = torch.logspace(0, -1, 40)
        self.truth = 0.5 * torch.randn(40, generator=self.noise)
        self.w = nn.Parameter(torch.zeros(40))
        self.parameters = [self.w]

    def output_noise(self) -> Tensor:
        """Of a batch, (16,)."""
        return self.sigma * torch.randn(16, generator=self.noise)

    def target(self) -> Tensor:
        """The weights that make the outputs, (40,)."""
        return self.truth

    def loss(self) -> Tensor:
        x = self.spread * torch.randn(16, 40, generator=self.noise)
        error = x @ (self.w - self.target()) - self.output_noise()
        return error.square().mean()

    def final(self) -> float:
        distance = self.spread * (self.w.detach() - self.target())
        return float(distance.square().sum()) + self.sigma**2


class NoiseDoubles(Regression):
    """The output noise doubles after 15 % of the run: the loss jumps to four times its floor, and no rate
    is to blame.
    """

    steps = 800

    def output_noise(self) -> Tensor:
        factor = 2 if self.furthest >= 0.15 * self.steps else 1
        return factor * super().output_noise()

    def final(self) -> float:
        return super().final() + 3 * self.sigma**2


class LevelShift(Regression):
    """A constant that is in no one's power joins the loss after a quarter of the run."""

    steps = 800
    shift = 0.5

    def loss(self) -> Tensor:
        late = self.furthest >= 0.25 * self.steps
        return super().loss() + self.shift * late

    def final(self) -> float:
        return super().final() + self.shift


class HeavyTails(Regression):
    """Output noise with Student's t distribution of 2 degrees of freedom: its variance is infinite."""

    steps = 800

    def output_noise(self) -> Tensor:
        normal = torch.randn(16, generator=self.noise)
        spread = torch.randn(2, 16, generator=self.noise).square().mean(0).sqrt()
        return 0.2 * normal / spread


class MissingLosses(Regression):
    """One loss in a hundred is not a number, and the loop skips its step: a fault of the data."""

    steps = 800

    def loss(self) -> Tensor:
        loss = super().loss()
        fault = float(torch.rand(1, generator=self.noise)) < 0.01
        return loss * math.nan if fault else loss


class NewTask(Regression):
    """A curriculum: after half of the run the outputs follow other weights."""

    steps = 1000

    def __init__(self, seed: int):
        super().__init__(seed)
        self.second = 0.5 * torch.randn(40, generator=self.noise)

    def target(self) -> Tensor:
        return self.second if self.furthest >= self.steps // 2 else self.truth


class ReachesZero(Regression):
    """No output noise: the loss goes to zero, and its relative changes stay as large as ever."""

    steps = 600
    sigma = 0.0
    grid = (-2.5, 0.5)
    optimizer = "momentum"


class Valley(Problem):
    """Four of Rosenbrock's curved valleys (two dimensions each), with a little noise on the gradient."""

    steps = 800
    grid = (-3.5, 0.0)

    def __init__(self, seed: int):
        super().__init__(seed)
        start = torch.tensor([[-1.2], [1.0]]).expand(2, 4)
        self.w = nn.Parameter(start + 0.2 * torch.randn(2, 4, generator=self.noise))
        self.parameters = [self.w]

    def height(self, w: Tensor) -> Tensor:
        x, y = w
        steep = 10 * (y - x.square()).square()
        flat = (1 - x).square()
        return (steep + flat).sum()

    def loss(self) -> Tensor:
        push = 0.3 * torch.randn(2, 4, generator=self.noise)
        return self.height(self.w) + (push * self.w).sum()

    def final(self) -> float:
        return float(self.height(self.w.detach()))


@cache
def digit_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, (1797, 64) standardized, and their classes."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)
    x = (x - x.mean()) / x.std()
    return x, torch.tensor(classes)


class Digits(Problem):
    """A network on real digits; the final loss is the mean over all of them."""

    batch = 32
    widths = (64, 64, 10)
    wrong = 0.0  # share of labels that are drawn at random, anew each time
    extras: tuple[str, ...] = ()  # "norm": batch norm; "dropout"
    grid = (-3.5, 0.0)

    def __init__(self, seed: int):
        super().__init__(seed)
        self.images, self.classes = digit_images()
        torch.manual_seed(seed)  # initial weights and dropout
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths[:-1], self.widths[1:]):
            layers.append(nn.Linear(inputs, outputs))
            if outputs != self.widths[-1]:
                layers += [nn.BatchNorm1d(outputs)] if "norm" in self.extras else []
                layers.append(nn.ReLU())
                layers += [nn.Dropout(0.2)] if "dropout" in self.extras else []
        self.model = nn.Sequential(*layers)
        self.parameters = list(self.model.parameters())
        self.buffers = list(self.model.buffers())

    def labels(self, chosen: Tensor) -> Tensor:
        labels = self.classes[chosen]
        if not self.wrong:
            return labels
        other = torch.randint(10, labels.shape, generator=self.noise)
        flipped = torch.rand(labels.shape, generator=self.noise) < self.wrong
        return torch.where(flipped, other, labels)

    def loss(self) -> Tensor:
        chosen = torch.randint(len(self.images), (self.batch,), generator=self.noise)
        return cross_entropy(self.model(self.images[chosen]), self.labels(chosen))

    @torch.no_grad()
    def final(self) -> float:
        self.model.eval()
        scores = self.model(self.images)
        self.model.train()
        right = float(cross_entropy(scores, self.classes))
        blind = float(-scores.log_softmax(1).mean())  # expected, over labels drawn at random
        return (1 - self.wrong) * right + self.wrong * blind


class DigitsLogistic(Digits):
    """Logistic regression, small batches, SGD with momentum."""

    widths = (64, 10)
    batch = 16
    optimizer = "momentum"


class DigitsSmallBatch(Digits):
    batch = 8


class DigitsLargeBatch(Digits):
    batch = 256
    optimizer = "momentum"


class DigitsLabelNoise(Digits):
    wrong = 0.2


class DigitsNorm(Digits):
    """Batch norm and dropout: buffers that must be restored, and a loss that is not the final one's."""

    extras = ("norm", "dropout")
    optimizer = "momentum"


class DigitsMuon(Digits):
    widths = (64, 64, 64, 10)
    optimizer = "muon"


class DigitsScheduleFree(Digits):
    optimizer = "schedule-free"


class DigitsNewTask(Digits):
    """A curriculum on real data: after half of the run every class has another name."""

    steps = 800

    def labels(self, chosen: Tensor) -> Tensor:
        shift = 3 if self.furthest >= self.steps // 2 else 0
        return (super().labels(chosen) + shift) % 10

    @torch.no_grad()
    def final(self) -> float:
        return float(cross_entropy(self.model(self.images), (self.classes + 3) % 10))


class Copying(Problem):
    """A transformer of two layers and width 32 learns to repeat six letters: long flat, then suddenly near
    zero.
    """

    steps = 500
    grid = (-3.5, -1.0)
    letters = 12
    length = 6

    def __init__(self, seed: int):
        super().__init__(seed)
        torch.manual_seed(seed)
        width = 32
        self.embed = nn.Embedding(self.letters + 1, width)
        self.place = nn.Embedding(2 * self.length + 1, width)
        layer = nn.TransformerEncoderLayer(
            width, 2, 64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, self.letters)
        self.model = nn.ModuleList([self.embed, self.place, self.body, self.head])
        self.parameters = list(self.model.parameters())
        self.mask = nn.Transformer.generate_square_subsequent_mask(2 * self.length)

    def batch_loss(self, generator: torch.Generator, rows: int) -> Tensor:
        letters = torch.randint(self.letters, (rows, self.length), generator=generator)
        divider = torch.full((rows, 1), self.letters)
        ids = torch.cat((letters, divider, letters), 1)  # (rows, 2 length + 1)
        inputs = ids[:, :-1]

        # From the divider on, the next letter is known
        x = self.embed(inputs) + self.place.weight[: inputs.shape[1]]  # (rows, 2 length, width)
        hidden = self.body(x, mask=self.mask, is_causal=True)
        scores = self.head(hidden[:, self.length :])  # (rows, length, letters)
        return cross_entropy(scores.flatten(0, 1), letters.flatten())

    def loss(self) -> Tensor:
        return self.batch_loss(self.noise, 16)

    @torch.no_grad()
    def final(self) -> float:
        return float(self.batch_loss(torch.Generator().manual_seed(99), 256))


class Language(Problem):
    """Next byte of the toy world's sentences: the repository's Qwen3 decoder, 2 layers of width 48."""

    steps = 400
    grid = (-3.5, -0.5)

    def __init__(self, seed: int):
        from attention import Segments
        from llm import LLM, LLMConfig

        super().__init__(seed)
        config = LLMConfig(256, 48, 128, 2, 3, 1, 16, rope_theta=1e4, tie_word_embeddings=False)
        self.model = LLM(config)
        self.model.init_weights(self.noise)
        self.parameters = list(self.model.parameters())
        self.segments = Segments.of([64] * 8)
        self.held = self.rows(torch.Generator().manual_seed(99), 32)

    @staticmethod
    @cache
    def text() -> Tensor:
        from data.world import corpus

        return torch.tensor(list(" ".join(corpus(3000)).encode()))

    def rows(self, noise: torch.Generator, rows: int = 8) -> Tensor:
        text = self.text()
        at = torch.randint(len(text) - 65, (rows, 1), generator=noise)
        return text[at + torch.arange(65)]

    def loss(self, ids: Tensor | None = None) -> Tensor:
        from attention import Segments, attend_inside

        ids = self.rows(self.noise) if ids is None else ids
        segments = Segments.of([64] * len(ids))
        x = self.model.embed(ids[:, :-1].reshape(-1))
        hidden = self.model(x, segments.positions(), attend_inside(segments, causal=True))
        return cross_entropy(self.model.lm_head(hidden), ids[:, 1:].reshape(-1))

    @torch.no_grad()
    def final(self) -> float:
        return float(self.loss(self.held))


class Connector(Problem):
    """Basic pre-training of the toy: only the adapter trains, on captions; one packed row of 384 tokens a
    step.
    """

    steps = 240
    grid = (-3.0, 0.0)

    def __init__(self, seed: int):
        super().__init__(seed)
        self.setup, self.stage, self.held = self.parts()
        self.setup.model.mlp1.init_weights(torch.Generator().manual_seed(seed))
        self.parameters = list(self.setup.model.mlp1.parameters())
        self.data = {True: self.stream(seed), False: self.stream(seed + 1000)}

    @staticmethod
    @cache
    def parts() -> tuple:
        """A language model that knows captions from descriptions and a ViT aligned to another copy, once."""
        import pretrain
        import recipe
        from data.encode import Encoder
        from data.world import World
        from optim import freeze_all_but
        from packing import collate

        # A model, and the stages before basic pre-training, shortened
        torch.manual_seed(0)
        source = World()
        model, tokenizer = recipe.new_model("toy", source)
        encoder = Encoder(tokenizer, model.config, max_length=384)
        setup = recipe.Setup(model, encoder, source)
        language: dict[str, Tensor] = {}
        for name, steps in (("language", 60), ("vit2", 80)):
            stage = replace(pretrain.TOY[name], steps=steps, rows=2, length=384, schedule="wsd")
            recipe.fit(setup, stage)
            if name == "language":
                state = model.language_model.state_dict()
                language = {key: value.clone() for key, value in state.items()}

        # The language model as it was, a new adapter, held-out captions
        recipe.restart(model, language)
        freeze_all_but(model, ("adapter",))
        held = collate([[encoder(s) for s in source.held_out("caption", 60)]], None, tokenizer.pad)
        return setup, replace(pretrain.TOY["basic"], rows=1, length=384), held

    def stream(self, seed: int) -> Iterator:
        from recipe import SAMPLES, packed_rows

        stage = replace(self.stage, seed=seed)
        _, batches = packed_rows(self.setup, stage, SAMPLES[stage.samples](self.setup, stage))
        return iter(batches)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.first = self.visits[step] == 1

    def loss(self) -> Tensor:
        from objective import supervised

        (batch,) = next(self.data[self.first])
        return supervised(self.setup.model, batch, self.stage)[0] / batch.weight

    @torch.no_grad()
    def final(self) -> float:
        from objective import supervised

        _, statistics = supervised(self.setup.model, self.held, self.stage)
        return float(statistics["loss"]) / self.held.weight


OLD = {
    "quadratic": Quadratic,
    "regression": Regression,
    "language": Language,
    "connector": Connector,
}
PROBLEMS: dict[str, type[Problem]] = OLD | {
    "noise doubles": NoiseDoubles,
    "level shift": LevelShift,
    "heavy tails": HeavyTails,
    "missing losses": MissingLosses,
    "new task": NewTask,
    "reaches zero": ReachesZero,
    "valley": Valley,
    "digits logistic": DigitsLogistic,
    "digits small batch": DigitsSmallBatch,
    "digits large batch": DigitsLargeBatch,
    "digits label noise": DigitsLabelNoise,
    "digits norm": DigitsNorm,
    "digits muon": DigitsMuon,
    "digits schedule-free": DigitsScheduleFree,
    "digits new task": DigitsNewTask,
    "copying": Copying,
}


# --------------------------------------------------------------------------------------- training


def schedule(step: int, steps: int, kind: str = "cosine") -> float:
    """Share of the peak rate: warm-up over 5 %, then cosine to a tenth.

    Or wsd: linear to zero over the last fifth; or constant."""
    warm = steps // 20
    if step < warm:
        return (step + 1) / warm
    if kind == "constant":
        return 1.0
    t = (step - warm) / (steps - warm)
    if kind == "wsd":
        return min(1.0, 5 * (1 - t))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * t))


def optimizers_for(problem: Problem, rate: float) -> list:
    """As the problem's class names them."""
    parameters = problem.parameters
    kind = problem.optimizer
    if kind == "adamw":
        return [
            torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        ]
    if kind == "sgd":
        return [torch.optim.SGD(parameters, lr=rate)]
    if kind == "momentum":
        return [torch.optim.SGD(parameters, lr=rate, momentum=0.9)]
    if kind == "schedule-free":
        import schedulefree

        optimizer = schedulefree.AdamWScheduleFree(
            parameters, lr=rate, warmup_steps=problem.steps // 20
        )
        optimizer.train()
        return [optimizer]
    assert kind == "muon", kind
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=rate, weight_decay=0.0), adam]


def trial_step(problem: Problem, optimizers: list, rate: float | None) -> float:
    """Draws a batch; a step whose loss is not finite is skipped. Returns the loss before the step."""
    loss = problem.loss()
    value = float(loss.detach())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if rate is not None:
                group["lr"] = rate
        optimizer.zero_grad()
    if math.isfinite(value):
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return value


def final_loss(problem: Problem, optimizers: list) -> float:
    """Schedule-Free's weights are those of its average; they are asked for by eval()."""
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    return problem.final()


def train_problem(
    kind: type[Problem],
    seed: int,
    rate: float,
    rule: str = "",
    shape: str = "cosine",
) -> dict:
    """One run. rule: of AdaLRS, "" for a fixed rate.

    Returns losses before and after training, the steps as a share of the plan, and with AdaLRS its
    decisions.
    """
    problem = kind(seed)
    optimizers = optimizers_for(problem, rate)  # (Schedule-Free's needs no schedule)
    shape = "constant" if kind.optimizer == "schedule-free" else shape
    row: dict = {"start": problem.final()}
    search = None
    if rule:
        tensors = [*problem.parameters, *problem.buffers]
        search = AdaLRS(tensors, optimizers, kind.steps, rule=rule)

    # The loop that anyone would write
    step = 0
    losses: list[float] = []
    rates: list[float] = []
    while step < kind.steps:
        scale = search.scale if search else 1.0
        rates.append(rate * schedule(step, kind.steps, shape) * scale)
        problem.begin_step(step)
        losses.append(trial_step(problem, optimizers, rates[-1]))
        step = search.observe(losses[-1]) if search else step + 1

    # The result; curves are drawn for the first seed only
    row |= {"final": final_loss(problem, optimizers), "steps": len(losses) / kind.steps}
    if seed == 0:
        row |= {"losses": losses, "lrs": rates}
    if search:
        row |= {"scale": search.scale, "decisions": search.log()}
    return row


# ---------------------------------------------------------------------------------- other methods


def range_test(problem: Problem, low: float = 1e-6, high: float = 10.0, steps: int = 100) -> float:
    """Smith's LR range test: the rate grows exponentially; suggests where the smoothed loss falls fastest
    per decade.

    Stops at four times the best smoothed loss.
    """
    optimizers = optimizers_for(problem, low)
    rates: list[float] = []
    curve: list[float] = []
    mean = 0.0
    for i in range(steps):
        rates.append(low * (high / low) ** (i / (steps - 1)))
        problem.begin_step(i)

        # The smoothed loss, without the bias of its start
        mean = 0.9 * mean + 0.1 * trial_step(problem, optimizers, rates[-1])
        curve.append(mean / (1 - 0.9 ** (i + 1)))
        if not curve[-1] < 4 * min(curve):
            break
    falls = [curve[i + 1] - curve[i] for i in range(5, len(curve) - 1)]
    return rates[5 + falls.index(min(falls))]


def after_range_test(kind: type[Problem], seed: int) -> dict:
    rate = range_test(kind(seed))
    return train_problem(kind, seed, rate) | {"steps": 1 + 100 / kind.steps, "rate": rate}


def train_with(kind: type[Problem], seed: int, make: Callable, rate: Callable) -> dict:
    """A run with an optimizer made by `make(parameters)`; `rate(step)` is None where it sets its own."""
    problem = kind(seed)
    optimizers = [make(problem.parameters)]
    if hasattr(optimizers[0], "train"):
        optimizers[0].train()
    for step in range(kind.steps):
        problem.begin_step(step)
        trial_step(problem, optimizers, rate(step))
    return {"final": final_loss(problem, optimizers), "steps": 1.0}


def without_rate(name: str, kind: type[Problem], seed: int) -> dict:
    """Rate-free methods as their authors recommend them: lr 1 and the cosine schedule."""
    import dadaptation
    import prodigyopt

    def make(parameters: list) -> torch.optim.Optimizer:
        if name == "prodigy":
            return prodigyopt.Prodigy(parameters, lr=1.0, betas=(0.9, 0.95), safeguard_warmup=True)
        return dadaptation.DAdaptAdam(parameters, lr=1.0, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        return schedule(step, kind.steps)

    return train_with(kind, seed, make, rate)


def schedule_free(kind: type[Problem], seed: int, rate: float) -> dict:
    import schedulefree

    def make(parameters: list) -> torch.optim.Optimizer:
        adam = kind.optimizer == "adamw"
        method = schedulefree.AdamWScheduleFree if adam else schedulefree.SGDScheduleFree
        return method(parameters, lr=rate, warmup_steps=kind.steps // 20)

    def own(step: int) -> None:
        return None

    return train_with(kind, seed, make, own)


# -------------------------------------------------------------------------------------- measuring


def ratio(loss: float, other: float, floor: float) -> float:
    """What lies below the floor counts as the floor; two that diverged are equal."""
    if not math.isfinite(loss):
        return math.inf if math.isfinite(other) else 1.0
    return max(loss, floor) / max(other, floor)


class Results:
    """One JSON line per run, so that the measurement can be stopped and goes on where it was."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def get(
        self, problem: str, method: str, place: float, seed: int, run: Callable[[], dict]
    ) -> dict:
        """`place`: log10 of the rate, or of the start over the best rate. An exception is a result, too."""
        key = (problem, method, round(place, 3), seed)
        if key not in self.rows:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Prodigy's, on deprecated torch calls
                try:
                    row = run()
                except (ValueError, RuntimeError, ArithmeticError) as error:
                    row = {"final": math.inf, "steps": 1.0, "raised": repr(error)}
            self.rows[key] = row | {"key": key}
            with open(self.path, "a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]

    def of(self, problem: str, method: str, place: float) -> list[dict]:
        """All seeds that were measured."""
        place = round(place, 3)
        return [row for key, row in self.rows.items() if key[:3] == (problem, method, place)]

    def best(self, problem: str) -> float:
        """log10 of the best fixed rate, by the mean final loss over the seeds (of those all measured)."""
        places = {key[2] for key in self.rows if key[:2] == (problem, "grid")}
        seeds = max(len(self.of(problem, "grid", place)) for place in places)

        def badness(place: float) -> float:
            rows = self.of(problem, "grid", place)
            mean = sum(row["final"] for row in rows) / len(rows)
            return mean if math.isfinite(mean) and len(rows) == seeds else math.inf

        return min(places, key=badness)

    def ratios(
        self, problem: str, method: str, place: float, to: float | None = None
    ) -> list[float]:
        """Final losses over those of a fixed rate with the same seed (to: log10 of it; the best), floor
        below both.
        """
        best = self.best(problem)
        to = best if to is None else to
        if method == "fixed":
            method, place = "grid", best + place
        found = []
        for row in self.of(problem, method, place):
            other = self.rows[problem, "grid", round(to, 3), row["key"][3]]
            found.append(ratio(row["final"], other["final"], FLOOR * other["start"]))
        return found


def measure(results: Results, name: str, seeds: int) -> None:
    """The grid, then everything that starts relative to its best rate."""
    kind = PROBLEMS[name]
    low, high = kind.grid
    for seed in range(seeds):
        for i in range(round((high - low) / 0.5) + 1):
            place = low + 0.5 * i
            results.get(name, "grid", place, seed, lambda: train_problem(kind, seed, 10**place))

    best = results.best(name)
    for seed in range(seeds):
        for start in STARTS:
            off = math.log10(start)
            rate = 10 ** (best + off)
            results.get(name, "grid", best + off, seed, lambda: train_problem(kind, seed, rate))
            for rule in ("safe", "paper"):
                results.get(name, rule, off, seed, lambda: train_problem(kind, seed, rate, rule))
    if name in OLD:
        measure_others(results, name, seeds, best)


def measure_others(results: Results, name: str, seeds: int, best: float) -> None:
    kind = PROBLEMS[name]
    for seed in range(seeds):
        for start in SCHEDULE_FREE:
            rate = start * 10**best
            off = math.log10(start)
            results.get(name, "schedule-free", off, seed, lambda: schedule_free(kind, seed, rate))
        results.get(name, "range test", 0, seed, lambda: after_range_test(kind, seed))
        for method in ("prodigy", "d-adaptation"):
            results.get(name, method, 0, seed, lambda: without_rate(method, kind, seed))


# -------------------------------------------------------------------------------------- reporting


def cell(ratios: list[float]) -> str:
    """Mean (worst); a finite loss a thousand times too large has diverged too."""
    if not ratios:
        return ""
    if max(ratios) > 1000:
        return "diverged"
    return f"{sum(ratios) / len(ratios):.3f} ({max(ratios):.3f})"


def measured(results: Results) -> list[str]:
    return [name for name in PROBLEMS if any(key[:2] == (name, "safe") for key in results.rows)]


def table(results: Results) -> str:
    """Every problem under every rule: final loss over the best fixed rate's with the same seed."""
    starts = [math.log10(start) for start in STARTS]
    labels = " | ".join(f"{start:.2g}" for start in STARTS)
    out = [f"| problem | rule | {labels} | most steps |", "|---|---|" + "---:|" * (len(starts) + 1)]
    for name in measured(results):
        for rule in ("fixed", "paper", "safe"):
            cells = [cell(results.ratios(name, rule, start)) for start in starts]
            rows = [row for start in starts for row in results.of(name, rule, start)]
            steps = max((row["steps"] for row in rows), default=1.0)
            out.append(f"| {name} | {rule} | " + " | ".join(cells) + f" | {steps:.2f} |")

    rates = ", ".join(f"{name} {10 ** results.best(name):.2g}" for name in measured(results))
    return "\n".join(out) + f"\n\nBest fixed rates: {rates}."


def table_of_others(results: Results) -> str:
    """The methods that choose no rate, on the problems that they were given."""
    names = [name for name in OLD if any(key[:2] == (name, "prodigy") for key in results.rows)]
    out = ["| method | start | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for method in ("range test", "prodigy", "d-adaptation", "schedule-free"):
        for start in SCHEDULE_FREE if method == "schedule-free" else (1.0,):
            cells = [cell(results.ratios(name, method, math.log10(start))) for name in names]
            label = f"{start:g}" if method == "schedule-free" else ""
            out.append(f"| {method} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def summary_table(results: Results) -> str:
    """What the rules promise, over all problems, starts and seeds."""
    out = [
        "| rule | runs | above 1.05 of fixed | worst | below .95 | recovered from .1 | steps | raised |",
        "|---|" + "---:|" * 7,
    ]
    for rule in ("paper", "safe"):
        against: list[float] = []
        recovered: list[float] = []
        rows: list[dict] = []
        for name in measured(results):
            for start in STARTS:
                place = math.log10(start)
                rows += results.of(name, rule, place)
                against += results.ratios(name, rule, place, to=results.best(name) + place)
            found = results.of(name, rule, -1.0)
            recovered += [math.log10(row.get("scale", 1.0)) for row in found]
        if not rows:
            continue

        # One line
        worse = sum(ratio > 1.05 for ratio in against)
        better = sum(ratio < 0.95 for ratio in against)
        share = sum(recovered) / max(len(recovered), 1)
        capped = sum(min(x, 1.0) for x in recovered) / max(len(recovered), 1)
        raised = sum("raised" in row for row in rows)
        out.append(
            f"| {rule} | {len(rows)} | {worse} | {max(against):.3g} | {better} | {share:.2f} ({capped:.2f}) "
            f"| {max(row['steps'] for row in rows):.3f} | {raised} |"
        )
    note = (
        "Recovered: log10 of the final scale, mean over runs from a tenth of the best rate; in brackets, no "
        "run counted as more than 1. Raised: runs that ended with an exception."
    )
    return "\n".join(out) + f"\n\n{note}"


def shorten(losses: list[float]) -> list[float]:
    """Drawn up to one and a half times the first."""
    top = 1.5 * losses[0]
    return [min(loss, top) if math.isfinite(loss) else top for loss in losses]


def page(results: Results, path: Path) -> None:
    """Loss and rate with every decision, for each problem from each start (seed 0), beside the same start
    held fixed.
    """
    runs: dict[str, dict] = {}
    for (problem, method, place, seed), row in results.rows.items():
        if method not in ("safe", "paper") or seed or "losses" not in row:
            continue
        fixed = results.rows[problem, "grid", round(results.best(problem) + place, 3), 0]
        runs[f"{problem}, {method}, start {10**place:.2g} of the best"] = {
            "losses": shorten(row["losses"]),
            "lrs": row["lrs"],
            "decisions": row["decisions"],
            "compare": shorten(fixed["losses"]) if "losses" in fixed else [],
        }
    body = report.el("h1", "AdaLRS from wrong starts") + report.curves(runs)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">{report.el("title", "AdaLRS")}'
        f"{report.el('style', report.CSS)}<body>{body}</body></html>\n",
        encoding="utf-8",
    )


@dataclass
class RatesOptions:
    """Measure AdaLRS against a grid of fixed rates and the other methods."""

    problems: tuple[str, ...] = tuple(PROBLEMS)  # names, see PROBLEMS
    seeds: int = 5
    out: Path = Path("runs/adalrs")
    report: bool = False  # only table and page, of what was measured so far


def measure_rates(options: RatesOptions) -> None:
    """Raises ValueError for unknown problems, and when packages are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing and not options.report:
        raise ValueError(
            f"{', '.join(missing)} not installed; claims/rates.py needs pip install -r requirements/bench.txt"
        )
    for name in options.problems:
        if name not in PROBLEMS:
            raise ValueError(f"--problems {name!r}: choose from {', '.join(PROBLEMS)}")

    results = Results(options.out / "runs.jsonl")
    for name in options.problems if not options.report else ():
        measure(results, name, options.seeds)
    page(results, options.out / "report.html")
    for name, write in (("table", table), ("summary", summary_table), ("others", table_of_others)):
        text = write(results)
        (options.out / f"{name}.md").write_text(text + "\n")
        print(text, end="\n\n")


if __name__ == "__main__":
    command(measure_rates)
