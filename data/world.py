"""A small visual world with known answers, drawn by Pillow: what `make toy` trains on and is graded by.

What it teaches: that a recipe can be judged without a benchmark download, if every picture comes from a scene that is known.
A scene can be drawn (`draw`), put into words (`words`, its caption) and asked about (`ask`), so the same question exists with
a picture and, for the text-only part of the mixture, with a description in its place. An answer names what it is about and
then the value ("red 3"): looking a value up at the token that names its key is one step, carrying the key over from the
question is a second, and a model of this size learns the second late (LOG.md has the numbers).

Seven kinds of scene on a 32 x 32 canvas with a 2 x 2 grid of cells (each becomes one visual token):
    objects     1 to 3 shapes in different cells     caption, listing, attributes, spatial, counting, grounding
    dots        1 to 6 equal dots                    caption, counting
    reading     three characters                     caption, reading
    chart       three bars                           caption, listing, charts, arithmetic (differences)
    sum         digit, operator, digit               caption, arithmetic
    odd         one shape differs from the others    caption, odd
    video       three frames, one shape that moves   caption, video

Deterministic: sample i of a seed is always the same. Train and held-out scenes differ by content, not only by seed: a
scene's content is hashed, one in eight hashes is held out, and neither side ever draws the other's. `python -m data.world`
prints the number of scenes and answers of each kind and writes a sheet of examples.
"""

import functools
import hashlib
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.sample import Message, Sample
from data.stream import Drawn

SIZE, CELL, SIDE = 32, 16, 2
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 30),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("northwest", "northeast", "southwest", "southeast")
CHARACTERS = "0123456789ACEHKLNPTX"
INKS = ("red", "green", "blue", "black")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LEVELS, BAR_UNIT = 5, 6


@dataclass(frozen=True)
class Turn:
    """One question: its family, the answer as text, and the chain of thought that leads there."""

    family: str
    question: str
    answer: str
    chain: str


def canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    shade = rng.randrange(225, 256)
    image = Image.new("RGB", (SIZE, SIZE), (shade, shade, shade))
    return image, ImageDraw.Draw(image)


def draw_shape(
    d: ImageDraw.ImageDraw, shape: str, color: str, box: tuple[int, int, int, int]
) -> None:
    x0, y0, x1, y1 = box
    ink, third = COLORS[color], (x1 - x0) // 3
    if shape == "circle":
        d.ellipse(box, fill=ink)
    elif shape == "square":
        d.rectangle(box, fill=ink)
    elif shape == "triangle":
        d.polygon([((x0 + x1) // 2, y0), (x1, y1), (x0, y1)], fill=ink)
    else:
        d.rectangle((x0 + third, y0, x1 - third, y1), fill=ink)
        d.rectangle((x0, y0 + third, x1, y1 - third), fill=ink)


@functools.lru_cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=18)  # Pillow carries it: no file, no download


def write(d: ImageDraw.ImageDraw, rng: random.Random, text: str, ink: str) -> None:
    """Up to four characters, one to a cell in reading order, each moved by at most a pixel."""
    for i, c in enumerate(text):
        x, y = corner(i)
        d.text(
            (x + 8 + rng.randint(-1, 1), y + 8 + rng.randint(-1, 1)),
            c,
            fill=COLORS[ink],
            font=font(),
            anchor="mm",
        )


def corner(cell: int) -> tuple[int, int]:
    """Top left pixel of a cell."""
    return cell % SIDE * CELL, cell // SIDE * CELL


def say(objects) -> str:
    """Objects in words, place first: a place is enough to look the rest up."""
    return ", ".join(f"{PLACES[cell]} {color} {shape}" for shape, color, cell in objects)


class Objects:
    """Content: ((shape, color, cell), ...) in reading order, no two alike, plus each one's box by its cell's jitter."""

    families = ("caption", "listing", "attributes", "spatial", "counting", "grounding")
    turns = 5

    def __init__(self, rng: random.Random):
        cells = sorted(rng.sample(range(4), rng.choice((1, 2, 2, 3, 3))))
        pool = [(s, c) for s in rng.sample(SHAPES, rng.choice((2, 3, 4))) for c in COLORS]
        self.objects = tuple(
            (s, c, cell) for (s, c), cell in zip(rng.sample(pool, len(cells)), cells)
        )
        self.content = self.objects
        self.boxes = []
        for _, _, cell in self.objects:
            side, (x, y) = rng.randint(11, 13), corner(cell)
            x0, y0 = x + rng.randint(0, 15 - side), y + rng.randint(0, 15 - side)
            self.boxes.append((x0, y0, x0 + side, y0 + side))

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, d = canvas(rng)
        for (shape, color, _), box in zip(self.objects, self.boxes):
            draw_shape(d, shape, color, box)
        return [image]

    def words(self) -> str:
        return say(self.objects)

    def ask(self, family: str, rng: random.Random) -> Turn:
        shape, color, cell = rng.choice(self.objects)
        if family == "caption":
            return Turn(family, "describe the picture.", self.words(), "")
        if family == "listing":
            return self._list(rng)
        if family == "counting":
            chain = ", ".join(f"{i} {say([o])}" for i, o in enumerate(self.objects, 1))
            return Turn(family, "how many things are there?", str(len(self.objects)), f"{chain}.")
        if family == "grounding":
            at = self.objects.index((shape, color, cell))
            box = " ".join(str(round(1000 * v / SIZE / 25) * 25) for v in self.boxes[at])
            name, key = self._name(rng, shape, color)
            return Turn(
                family,
                f"box of {name}?",
                f"{key} {PLACES[cell]} {box}",
                f"{say([self.objects[at]])}.",
            )
        if family == "spatial":
            return self._place(rng, shape, color, cell)
        if rng.random() < 0.3:
            cell = rng.randrange(4)
            seen = [f"{c} {s}" for s, c, at in self.objects if at == cell]
            return Turn(
                family,
                f"what is in the {PLACES[cell]}?",
                f"{PLACES[cell]} {(seen or ['nothing'])[0]}",
                f"{self.words()}.",
            )
        alone_in_shape = [o for o in self.objects if [p[0] for p in self.objects].count(o[0]) == 1]
        alone_in_color = [o for o in self.objects if [p[1] for p in self.objects].count(o[1]) == 1]
        options = [("color", *o) for o in alone_in_shape] + [("shape", *o) for o in alone_in_color]
        what, shape, color, cell = rng.choice(
            options + [("color", "thing", color, cell), ("shape", shape, "thing", cell)]
        )
        if what == "color":
            name, key = (
                (f"the {shape}", shape)
                if shape != "thing"
                else (f"the thing in the {PLACES[cell]}", PLACES[cell])
            )
            return Turn(family, f"what color is {name}?", f"{key} {color}", f"{self.words()}.")
        name, key = (
            (f"the {color} thing", color)
            if color != "thing"
            else (f"the thing in the {PLACES[cell]}", PLACES[cell])
        )
        return Turn(family, f"what shape is {name}?", f"{key} {shape}", f"{self.words()}.")

    def _list(self, rng: random.Random) -> Turn:
        """A drill: eight look-ups in a row, `key value` with keys drawn again and again. Looking a value up at the token that
        names its key is the part of every question that is learned last; here it is asked for every third token."""
        key, value = rng.choice(
            ((0, 1), (1, 0), (2, 0), (2, 1), (0, 2), (0, 2), (1, 2), (1, 2))
        )  # of shape, color, place
        named = [(s, c, PLACES[cell]) for s, c, cell in self.objects]
        clear = [o for o in named if [p[key] for p in named].count(o[key]) == 1]
        if not clear:
            return Turn("listing", "describe the picture.", self.words(), "")
        asks = (
            ("what shape is", "what color is", "where is")[value]
            + " each "
            + ("shape", "color", "place")[key]
        )
        pairs = ", ".join(f"{o[key]} {o[value]}" for o in rng.choices(clear, k=8))
        return Turn("listing", f"{asks}?", pairs, "")

    def _name(self, rng: random.Random, shape: str, color: str) -> tuple[str, str]:
        """A thing by what sets it apart, its shape or its color if that is enough, else both: (in a question, in an answer)."""
        shapes, colors, _ = zip(*self.objects)
        clear = [(f"the {shape}", shape)] * (shapes.count(shape) == 1) + [
            (f"the {color} thing", color)
        ] * (colors.count(color) == 1)
        return rng.choice(clear or [(f"the {color} {shape}", f"{color} {shape}")])

    def _place(self, rng: random.Random, shape: str, color: str, cell: int) -> Turn:
        (name, key), chain = self._name(rng, shape, color), f"{say([(shape, color, cell)])}."
        if rng.random() < 0.7:
            return Turn("spatial", f"where is {name}?", f"{key} {PLACES[cell]}", chain)
        if rng.random() < 0.5:
            return Turn(
                "spatial",
                f"is {name} on the left or right?",
                f"{key} {('left', 'right')[cell % 2]}",
                chain,
            )
        return Turn(
            "spatial", f"is {name} above or below?", f"{key} {('above', 'below')[cell // 2]}", chain
        )


class Dots:
    """One to six equal dots on a 4 x 4 grid of patches: counting that no single cell can answer."""

    families = ("caption", "counting")
    turns = 1

    def __init__(self, rng: random.Random):
        self.color, self.cells = (
            rng.choice(list(COLORS)),
            sorted(rng.sample(range(16), rng.randint(1, 6))),
        )
        self.content = (self.color, tuple(self.cells))

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, d = canvas(rng)
        for cell in self.cells:
            x, y = cell % 4 * 8 + rng.randint(0, 2), cell // 4 * 8 + rng.randint(0, 2)
            d.ellipse((x, y, x + 5, y + 5), fill=COLORS[self.color])
        return [image]

    def words(self) -> str:
        return f"{self.color} dots {len(self.cells)}"

    def ask(self, family: str, rng: random.Random) -> Turn:
        if family == "caption":
            return Turn(family, "describe the picture.", self.words(), "")
        rows = [str(sum(cell // 4 == row for cell in self.cells)) for row in range(4)]
        return Turn(
            family,
            "how many things are there?",
            str(len(self.cells)),
            f"{' + '.join(rows)} = {len(self.cells)}.",
        )


class Reading:
    families = ("caption", "reading")
    turns = 1

    def __init__(self, rng: random.Random):
        self.text = "".join(rng.choice(CHARACTERS) for _ in range(3))
        self.ink = rng.choice(INKS)
        self.content = self.text  # a held-out string is held out in every colour

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, d = canvas(rng)
        write(d, rng, self.text, self.ink)
        return [image]

    def words(self) -> str:
        return f"text {self.text}"

    def ask(self, family: str, rng: random.Random) -> Turn:
        if family == "caption":
            return Turn(family, "describe the picture.", self.words(), "")
        return Turn(family, "what does it say?", self.text, f"{self.text}.")


class Chart:
    families = ("caption", "listing", "charts", "arithmetic")
    turns = 3

    def __init__(self, rng: random.Random):
        self.bars = tuple(zip(rng.sample(list(COLORS), 3), rng.sample(range(1, LEVELS + 1), 3)))
        self.columns = sorted(rng.sample(range(4), 3))
        self.content = (self.bars, self.columns)

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, d = canvas(rng)
        for column, (color, height) in zip(self.columns, self.bars):
            x = column * 8 + rng.randint(0, 1)
            d.rectangle((x, SIZE - 1 - height * BAR_UNIT, x + 6, SIZE - 1), fill=COLORS[color])
        return [image]

    def words(self) -> str:
        return ", ".join(f"{color} {height}" for color, height in self.bars)

    def ask(self, family: str, rng: random.Random) -> Turn:
        if family == "caption":
            return Turn(family, "describe the picture.", self.words(), "")
        if family == "listing":
            return Turn(
                family,
                "how high is each bar?",
                ", ".join(f"{c} {h}" for c, h in rng.choices(self.bars, k=8)),
                "",
            )
        if family == "arithmetic":
            (a, x), (b, y) = sorted(rng.sample(self.bars, 2), key=lambda bar: -bar[1])
            return Turn(
                family,
                f"how much higher is {a} than {b}?",
                str(x - y),
                f"{a} {x}, {b} {y}. {x} - {y} = {x - y}.",
            )
        kind, (color, height) = (
            rng.choice(("highest", "lowest", "value", "value")),
            rng.choice(self.bars),
        )
        if kind == "value":
            return Turn(
                family,
                f"how high is the {color} bar?",
                f"{color} {height}",
                f"{self.words()}. {color} {height}.",
            )
        color, height = (max if kind == "highest" else min)(self.bars, key=lambda bar: bar[1])
        return Turn(
            family,
            f"which bar is the {kind}?",
            f"{color} {height}",
            f"{self.words()}. {kind} {color} {height}.",
        )


class Sum:
    families = ("caption", "arithmetic")
    turns = 1

    def __init__(self, rng: random.Random):
        a, b, self.op = rng.randrange(10), rng.randrange(10), rng.choice("+-")
        self.a, self.b = (a, b) if self.op == "+" else (max(a, b), min(a, b))
        self.ink = rng.choice(INKS)
        self.content = (self.a, self.op, self.b, self.ink)

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, d = canvas(rng)
        write(d, rng, f"{self.a}{self.op}{self.b}", self.ink)
        return [image]

    def words(self) -> str:
        return f"sum {self.a} {self.op} {self.b}"

    def ask(self, family: str, rng: random.Random) -> Turn:
        if family == "caption":
            return Turn(family, "describe the picture.", self.words(), "")
        result = self.a + self.b if self.op == "+" else self.a - self.b
        return Turn(
            family, "what is the result?", str(result), f"{self.a} {self.op} {self.b} = {result}."
        )


class Odd:
    families = ("caption", "odd")
    turns = 1

    def __init__(self, rng: random.Random):
        cells = sorted(rng.sample(range(4), rng.choice((3, 4, 4))))
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        other = (
            (rng.choice([s for s in SHAPES if s != shape]), color)
            if rng.random() < 0.5
            else (shape, rng.choice([c for c in COLORS if c != color]))
        )
        self.cell = rng.choice(cells)
        self.objects = tuple(
            (*(other if cell == self.cell else (shape, color)), cell) for cell in cells
        )
        self.content = self.objects
        self.boxes = [(x + rng.randint(0, 3), y + rng.randint(0, 3)) for x, y in map(corner, cells)]

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, d = canvas(rng)
        for (shape, color, _), (x, y) in zip(self.objects, self.boxes):
            draw_shape(d, shape, color, (x, y, x + 12, y + 12))
        return [image]

    def words(self) -> str:
        return say(self.objects)

    def ask(self, family: str, rng: random.Random) -> Turn:
        if family == "caption":
            return Turn(family, "describe the picture.", self.words(), "")
        (shape, color, _), *_ = [o for o in self.objects if o[2] != self.cell]
        odd = [o for o in self.objects if o[2] == self.cell]
        return Turn(
            family,
            "where is the odd one out?",
            PLACES[self.cell],
            f"{self.words()}. most are {color} {shape}. {say(odd)}.",
        )


class Video:
    """Three frames of one shape that moves by a cell a frame (a wall stops it for the third)."""

    families = ("caption", "video")
    turns = 1

    def __init__(self, rng: random.Random):
        self.shape, self.color, self.move = (
            rng.choice(SHAPES),
            rng.choice(list(COLORS)),
            rng.choice(list(MOVES)),
        )
        dx, dy = MOVES[self.move]
        x, y = rng.choice(
            [
                (x, y)
                for x in range(SIDE)
                for y in range(SIDE)
                if 0 <= x + dx < SIDE and 0 <= y + dy < SIDE
            ]
        )
        self.cells = [(min(max(x + dx * t, 0), 1), min(max(y + dy * t, 0), 1)) for t in range(3)]
        self.content = (self.shape, self.color, self.move, x, y)

    def draw(self, rng: random.Random) -> list[Image.Image]:
        frames = []
        for x, y in self.cells:
            image, d = canvas(rng)
            x0, y0 = x * CELL + rng.randint(1, 3), y * CELL + rng.randint(1, 3)
            draw_shape(d, self.shape, self.color, (x0, y0, x0 + 12, y0 + 12))
            frames.append(image)
        return frames

    def words(self) -> str:
        return say([(self.shape, self.color, SIDE * y + x) for x, y in self.cells])

    def ask(self, family: str, rng: random.Random) -> Turn:
        if family == "caption":
            return Turn(family, "describe the picture.", self.words(), "")
        return Turn(family, "which way does it move?", self.move, f"{self.words()}.")


KINDS = {kind.__name__.lower(): kind for kind in (Objects, Dots, Reading, Chart, Sum, Odd, Video)}
FAMILIES = tuple(dict.fromkeys(f for kind in KINDS.values() for f in kind.families)) + ("text",)
REASONING = ("counting", "charts", "arithmetic", "odd")

# What is graded, in the order of the report; what each phase of fine-tuning teaches first; what
# earlier stages taught and later ones rehearse.
GRADED = (
    "caption",
    "attributes",
    "spatial",
    "counting",
    "grounding",
    "reading",
    "charts",
    "arithmetic",
    "odd",
    "video",
    "text",
)
PHASES = {
    "sft1": ("attributes", "spatial", "counting"),
    "sft2": ("charts", "grounding", "reading"),
    "sft3": ("arithmetic", "odd"),
    "sft4": ("video",),
}
CAPTION = {"caption": 1.0, "listing": 1.0, "reading": 0.5}
UNDERSTANDING = CAPTION | {"grounding": 0.8}
INSTRUCTION = {
    "attributes": 3.0,
    "spatial": 3.0,
    "counting": 2.0,
    "charts": 2.0,
    "arithmetic": 2.0,
    "odd": 1.5,
}
EARLIER = {"text": 0.05} | {f: 0.4 * w for f, w in (UNDERSTANDING | INSTRUCTION).items()}


def held_out(content) -> bool:
    return hashlib.blake2b(repr(content).encode(), digest_size=4).digest()[0] % 8 == 0


def scene(kind: str, rng: random.Random, test: bool):
    """A scene of this kind from the train side or the held-out side."""
    while True:
        s = KINDS[kind](rng)
        if held_out((kind, s.content)) == test:
            return s


def user(s, question: str, rng: random.Random, text_only: bool) -> Message:
    """The opening message: the picture (frames numbered, as for video) or its description, then the question."""
    if text_only:
        return Message("user", (f"picture: {s.words()}.\n{question}",))
    frames = s.draw(rng)
    if len(frames) == 1:
        return Message("user", (frames[0], "\n" + question))
    parts = [p for i, frame in enumerate(frames) for p in (f"Frame-{i + 1}: ", frame, "\n")]
    return Message("user", (*parts, question))


def sample(
    index: int, seed: int, mixture: dict[str, float], test: bool = False, turns: int = 0
) -> Sample:
    """Sample `index`: one scene and up to `turns` questions about it (0: as many as the kind usually gets).

    mixture: family -> share of the turns; "text" is the share of samples that describe the picture instead of showing it.
    Raises ValueError for an unknown family.
    """
    unknown = set(mixture) - set(FAMILIES)
    if unknown:
        raise ValueError(
            f"no family {sorted(unknown)[0]!r} in the world; choose from {', '.join(FAMILIES)}"
        )
    rng = random.Random(f"{seed}/{index}/{test}")
    visual = {f: w for f, w in mixture.items() if f != "text" and w > 0}
    text_only = rng.random() < mixture.get("text", 0.0) or not visual
    visual = visual or dict.fromkeys((f for f in FAMILIES if f not in ("text", "grounding")), 1.0)
    if text_only:  # a description has no pixels to box
        visual = {f: w for f, w in visual.items() if f != "grounding"} or {"caption": 1.0}
    homes = {
        f: sum(f in kind.families for kind in KINDS.values()) for f in visual
    }  # kinds that share a family's weight
    shares = {
        name: sum(visual.get(f, 0) / homes[f] for f in kind.families if f in homes) / kind.turns
        for name, kind in KINDS.items()
    }
    kind = rng.choices(list(shares), list(shares.values()))[0]
    s = scene(kind, rng, test)
    families = [f for f in s.families if visual.get(f, 0) > 0]
    asked: dict[str, Turn] = {}
    for _ in range(turns or s.turns):
        turn = s.ask(rng.choices(families, [visual[f] for f in families])[0], rng)
        asked.setdefault(turn.question, turn)
    messages: list[Message] = []
    for turn in asked.values():
        messages.append(
            user(s, turn.question, rng, text_only)
            if not messages
            else Message("user", (turn.question,))
        )
        messages.append(Message("assistant", (turn.answer,)))
    task = "text" if text_only else "+".join(sorted({t.family for t in asked.values()}))
    return Sample(
        tuple(messages),
        task=task,
        origin=f"world/{kind}/{seed}/{index}",
        facts={
            "answer": turn.answer,
            "family": turn.family,
            "words": s.words(),
            "chain": turn.chain,
        },
    )


class World:
    """The world as a data source: `stream` for training, `held_out` for grading. Twin of `readers.Folder`."""

    root = None

    def stream(self, mixture: dict[str, float], seed: int, turns: int = 0) -> Drawn:
        return Drawn(functools.partial(sample, seed=seed, mixture=mixture, turns=turns))

    def held_out(self, family: str, n: int, seed: int = 1) -> list[Sample]:
        """n single-question samples of a family, all from held-out scenes."""
        return [sample(i, seed, {family: 1.0}, test=True, turns=1) for i in range(n)]


def corpus(n: int, seed: int = 0) -> list[str]:
    """Text of the world's questions, answers and chains (no strings to read), for training the toy's tokenizer."""
    texts = []
    for i in range(n):
        rng = random.Random(f"{seed}/corpus/{i}")
        s = scene(rng.choice([k for k in KINDS if k != "reading"]), rng, False)
        turn = s.ask(rng.choice(s.families), rng)
        texts += [
            f"picture: {s.words()}.\n",
            turn.question,
            turn.answer,
            turn.chain,
            "Frame-1: ",
            "user\n",
            "assistant\n",
            "\n" + turn.question,
            f"\\boxed{{{turn.answer}}}",
            " think first.",
        ]
    return texts


def scene_counts() -> dict[str, str]:
    """How many different scenes each kind can show (before jitter, background shade and held-out split)."""
    looks = len(SHAPES) * len(COLORS)
    objects = sum(math.comb(4, n) * math.perm(looks, n) for n in range(1, 4))
    others = len(SHAPES) + len(COLORS) - 2
    odd = sum(math.comb(4, n) * n * looks * others for n in (3, 4))
    bars = math.perm(len(COLORS), 3) * math.perm(LEVELS, 3) * math.comb(4, 3)
    dots = len(COLORS) * sum(math.comb(16, n) for n in range(1, 7))
    return {
        "objects": objects,
        "dots": dots,
        "reading": len(CHARACTERS) ** 3 * len(INKS),
        "chart": bars,
        "sum": (100 + 55) * len(INKS),
        "odd": odd,
        "video": looks * 4 * 2,
    }


def main() -> None:
    import tyro

    def sheet(out: Path = Path("runs/world.png"), seed: int = 0) -> None:
        """Draw examples of every kind, and print how large this world is."""
        every = dict.fromkeys((f for f in FAMILIES if f != "text"), 1.0)
        answers: dict[str, Counter] = {f: Counter() for f in every}
        for i in range(4000):
            for family in every:
                if i < 400:
                    answers[family][sample(i, seed, {family: 1}, turns=1).facts["answer"]] += 1
        for kind, count in scene_counts().items():
            print(
                f"{kind:10s} {count:>14,} scenes   asked about: {', '.join(KINDS[kind].families)}"
            )
        for family, seen in answers.items():
            top, n = seen.most_common(1)[0]
            print(
                f"{family:12s} {len(seen):4d} answers in 400 questions; the commonest, {top!r}, {n / 400:.0%}"
            )
        board = Image.new("RGB", (12 * 36, len(KINDS) * 36), "white")
        for row, kind in enumerate(KINDS):
            for column in range(12):
                rng = random.Random(f"{seed}/{kind}/{column}")
                board.paste(scene(kind, rng, False).draw(rng)[0], (column * 36 + 2, row * 36 + 2))
        out.parent.mkdir(parents=True, exist_ok=True)
        board.resize((board.width * 3, board.height * 3), Image.NEAREST).save(out)
        print(f"wrote {out}")

    tyro.cli(sheet)


if __name__ == "__main__":
    sys.exit(main())
