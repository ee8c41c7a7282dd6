"""What AdaLRS is tried on: twenty problems that its thresholds have seen, and five that they have not.

What it teaches: a rule for the rate must hold where data jump, drift or fail, where a loss goes to zero,
and where most of the path is noise; each of these is a small problem of its own. A problem is parameters,
a stream of losses and one number at the end, so that any loop and any optimizer can train it:

    problem = PROBLEMS["quadratic"](seed=0)
    optimizer = torch.optim.SGD(problem.parameters, lr=0.3)
    for step in range(problem.steps):
        problem.begin_step(step)
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    print(problem.final())

    KNOWN   noisy quadratics and regressions whose data change or fail; a valley; networks on handwritten
            digits; transformers that copy and that read; the toy VLM's adapter
    FRESH   tables, a factorisation, a recurrent network, a badly conditioned valley: written when the
            rule was finished, to see whether what it promises holds for them too

All of it is ours: the paper reports AdaLRS on its own pre-training alone. `claims/rates.py` measures.
"""

import math
from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Problem:
    """What is trained: `loss()` draws the next batch; `final()` is what counts, an expectation.

    `parameters` are optimized and `buffers` are restored with them. `begin_step` chooses the step's
    data (claims/rates.py says why); data that change as the run proceeds do so by the furthest step,
    since a stream does not go back.
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


# ---------------------------------------------------------------- problems that no rule was tuned on


@cache
def standard_table(name: str) -> tuple[Tensor, Tensor]:
    """One of scikit-learn's tables: columns standardized, (rows, columns), and what is asked, (rows,)."""
    from sklearn import datasets

    columns, asked = getattr(datasets, f"load_{name}")(return_X_y=True)
    x = torch.tensor(columns, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    return x, torch.tensor(asked)


class Tumours(Problem):
    """569 tumours of 2 classes, by 30 measurements: a network of one hidden layer, SGD with momentum. The
    final loss is the mean over all of them.
    """

    table = "breast_cancer"
    outputs = 2
    grid = (-3.5, 0.5)
    optimizer = "momentum"

    def __init__(self, seed: int):
        super().__init__(seed)
        self.x, self.asked = standard_table(self.table)
        torch.manual_seed(seed)
        inputs = self.x.shape[1]
        self.model = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, self.outputs))
        self.parameters = list(self.model.parameters())

    def distance(self, answers: Tensor, asked: Tensor) -> Tensor:
        return cross_entropy(answers, asked)

    def loss(self) -> Tensor:
        chosen = torch.randint(len(self.x), (32,), generator=self.noise)
        return self.distance(self.model(self.x[chosen]), self.asked[chosen])

    @torch.no_grad()
    def final(self) -> float:
        return float(self.distance(self.model(self.x), self.asked))


class Diabetes(Tumours):
    """442 patients: how a disease goes on is a number, which ten measurements hardly tell."""

    table = "diabetes"
    outputs = 1
    optimizer = "adamw"

    def __init__(self, seed: int):
        super().__init__(seed)
        number = self.asked.float()
        self.asked = (number - number.mean()) / number.std()

    def distance(self, answers: Tensor, asked: Tensor) -> Tensor:
        return (answers[:, 0] - asked).square().mean()


class Factorisation(Problem):
    """A 40 x 30 matrix of rank 4 as a product of two, from 64 entries a step, each with noise: a saddle at
    the start, then a fall.
    """

    grid = (-2.5, 1.0)
    optimizer = "momentum"
    sigma = 0.3  # standard deviation of an entry's noise

    def __init__(self, seed: int):
        super().__init__(seed)
        left = torch.randn(40, 4, generator=self.noise)
        right = torch.randn(4, 30, generator=self.noise)
        self.whole = left @ right / 2
        self.left = nn.Parameter(0.1 * torch.randn(40, 6, generator=self.noise))
        self.right = nn.Parameter(0.1 * torch.randn(6, 30, generator=self.noise))
        self.parameters = [self.left, self.right]

    def loss(self) -> Tensor:
        row = torch.randint(40, (64,), generator=self.noise)
        column = torch.randint(30, (64,), generator=self.noise)
        seen = self.whole[row, column] + self.sigma * torch.randn(64, generator=self.noise)
        entries = (self.left[row] * self.right.T[column]).sum(1)
        return (entries - seen).square().mean()

    @torch.no_grad()
    def final(self) -> float:
        return float((self.left @ self.right - self.whole).square().mean()) + self.sigma**2


class Recurrent(Problem):
    """Next letter of the toy world's sentences by a GRU of width 48, 16 letters at a time."""

    steps = 400
    grid = (-3.5, 0.0)

    def __init__(self, seed: int):
        super().__init__(seed)
        torch.manual_seed(seed)
        self.embed = nn.Embedding(256, 32)
        self.body = nn.GRU(32, 48, batch_first=True)
        self.head = nn.Linear(48, 256)
        self.model = nn.ModuleList([self.embed, self.body, self.head])
        self.parameters = list(self.model.parameters())

    def batch_loss(self, generator: torch.Generator, rows: int) -> Tensor:
        text = Language.text()
        at = torch.randint(len(text) - 17, (rows, 1), generator=generator)
        letters = text[at + torch.arange(17)]  # (rows, 17)
        hidden, _ = self.body(self.embed(letters[:, :-1]))  # (rows, 16, 48)
        return cross_entropy(self.head(hidden).flatten(0, 1), letters[:, 1:].flatten())

    def loss(self) -> Tensor:
        return self.batch_loss(self.noise, 8)

    @torch.no_grad()
    def final(self) -> float:
        return float(self.batch_loss(torch.Generator().manual_seed(99), 256))


class Crosswise(Problem):
    """0.5 sum_i c_i ((Q (w - x))_i)^2: curvatures c from 10 to .001 in directions Q that no single weight
    has, so that Adam's scale for each weight does not help.
    """

    grid = (-3.5, 0.5)

    def __init__(self, seed: int):
        super().__init__(seed)
        self.curvature = torch.logspace(1, -3, 60)
        self.turn = torch.linalg.qr(torch.randn(60, 60, generator=self.noise))[0]
        self.w = nn.Parameter(2 * torch.randn(60, generator=self.noise))
        self.parameters = [self.w]

    def loss(self) -> Tensor:
        x = 0.3 * torch.randn(4, 60, generator=self.noise)
        along = (self.w - x) @ self.turn
        return 0.5 * (self.curvature * along.square()).sum(1).mean()

    def final(self) -> float:
        along = self.w.detach() @ self.turn
        return 0.5 * float((self.curvature * (along.square() + 0.09)).sum())


OLD = {
    "quadratic": Quadratic,
    "regression": Regression,
    "language": Language,
    "connector": Connector,
}
KNOWN: dict[str, type[Problem]] = OLD | {
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
FRESH: dict[str, type[Problem]] = {
    "tumours": Tumours,
    "diabetes": Diabetes,
    "factorisation": Factorisation,
    "recurrent": Recurrent,
    "crosswise": Crosswise,
}
PROBLEMS = KNOWN | FRESH
