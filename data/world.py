"""A small visual world with known answers, drawn by Pillow: what `make toy` trains on and is graded by.

What it teaches: that a recipe can be judged without a benchmark download, if every picture comes
from a scene that is known. A scene can be drawn (`draw`), put into words (`words`, its caption) and
asked about (`ask`), so the same question exists with a picture and, for the text-only part of the
mixture, with a description in its place. An answer names what it is about and then the value
("red 3"): looking a value up at the token that names its key is one step, carrying the key over
from the question is a second, and a model of this size learns the second late (LOG.md has the
numbers).

    seed, index -> random numbers -> kind -> scene -+- draw ---> picture or frames --------+
                                                    +- words --> description (text only) --+-> Sample
                                                    +- ask ----> question, answer, chain --+

Seven kinds of scene on 32 x 32 pixels with a 2 x 2 grid of cells (each becomes one visual token):
    objects  1 to 3 shapes in different cells   caption, listing, attributes, spatial, counting,
                                                grounding
    dots     1 to 6 equal dots                  caption, counting
    reading  three characters                   caption, reading
    chart    three bars                         caption, listing, charts, arithmetic (differences)
    sum      digit, operator, digit             caption, arithmetic
    odd      one shape differs from the others  caption, odd
    video    three frames, a shape that moves   caption, video

How to add a task family, say `sizes`, in at most three places:
    1. a row of TABLE: what shows, teaches, and grades it
    2. `sizes` in the `families` of every scene that can be asked, and its method `ask_sizes`
    3. sft.py: its weight in the phase that TABLE names as the one that teaches it
It is then drawn in pre-training, graded on every rung of the ladder and reported, and asked in long
CoT and RL where TABLE calls it reasoning.

Deterministic: sample i of a seed is always the same. Train and held-out scenes differ by content,
not only by seed: a scene's content is hashed, one in eight hashes is held out, and neither side
ever draws the other's. `python -m data.world` prints the number of scenes and answers of each kind
and writes a sheet of examples.
"""

import functools
import hashlib
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data.sample import Message, Sample
from data.stream import Drawn
from infra.cli import command

# --------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """What the ladder must know about one task family."""

    shown: str = ""  # the part of pre-training that shows it: captions, understanding, instruction
    weight: float = 0.0  # its share there
    taught: str = ""  # the SFT phase that teaches it
    graded: bool = True  # whether the ladder reports it
    reasoning: bool = False  # whether it has chains: long CoT, RL and think-fusion ask it
    grader: str = "auto"  # a key of graders.GRADERS


# The one list of the world's families, in the order in which they are reported.
TABLE = {
    "caption": Family("captions", 1.0, grader="phrases"),
    "listing": Family("captions", 1.0, graded=False),  # a drill, see ObjectScene.ask_listing
    "attributes": Family("instruction", 3.0, "sft1"),
    "spatial": Family("instruction", 3.0, "sft1"),
    "counting": Family("instruction", 2.0, "sft1", reasoning=True),
    "grounding": Family("understanding", 0.8, "sft2", grader="box"),
    "reading": Family("captions", 0.5, "sft2"),
    "charts": Family("instruction", 2.0, "sft2", reasoning=True),
    "arithmetic": Family("instruction", 2.0, "sft3", reasoning=True),
    "odd": Family("instruction", 1.5, "sft3", reasoning=True),
    "video": Family(taught="sft4"),
    "text": Family(),  # any of the others, with a description in the picture's place
}
FAMILIES = tuple(TABLE)
GRADED = tuple(name for name, family in TABLE.items() if family.graded)
REASONING = tuple(name for name, family in TABLE.items() if family.reasoning)
PHASES = {
    phase: tuple(name for name, family in TABLE.items() if family.taught == phase)
    for phase in ("sft1", "sft2", "sft3", "sft4")
}


def shown_in(*parts: str) -> dict[str, float]:
    """The mixture of the families that these parts of pre-training show, part after part."""
    mixture = {}
    for part in parts:
        mixture |= {name: family.weight for name, family in TABLE.items() if family.shown == part}
    return mixture


# Mixtures (family -> share): what pre-training shows, and what later stages rehearse of it.
CAPTION = shown_in("captions")
UNDERSTANDING = shown_in("captions", "understanding")
INSTRUCTION = shown_in("instruction")
EARLIER = {"text": 0.05} | {f: 0.4 * w for f, w in (UNDERSTANDING | INSTRUCTION).items()}


@dataclass(frozen=True)
class Turn:
    """One question: its family, the answer as text, and the chain of thought that leads there."""

    family: str
    question: str
    answer: str
    chain: str = ""


# ---------------------------------------------------------------------------------------- drawing

SIZE = 32  # pixels, of a picture's side
CELL = 16  # pixels, of a cell's side
SIDE = 2  # cells in a row and in a column
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
MOVES = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
LEVELS = 5  # heights that a bar can have
BAR_UNIT = 6  # pixels, of one level


def canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture, nearly white, and the pen to draw on it."""
    shade = rng.randrange(225, 256)
    image = Image.new("RGB", (SIZE, SIZE), (shade, shade, shade))
    return image, ImageDraw.Draw(image)


def corner(cell: int) -> tuple[int, int]:
    """Top left pixel of a cell."""
    return cell % SIDE * CELL, cell // SIDE * CELL


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, all of them inside


def square(x: int, y: int, side: int) -> Box:
    return x, y, x + side, y + side


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, color: str, box: Box) -> None:
    x0, y0, x1, y1 = box
    ink = COLORS[color]

    if shape == "circle":
        pen.ellipse(box, fill=ink)
    elif shape == "square":
        pen.rectangle(box, fill=ink)
    elif shape == "triangle":
        middle = (x0 + x1) // 2
        pen.polygon([(middle, y0), (x1, y1), (x0, y1)], fill=ink)
    else:
        # A cross is two bars, each a third as wide as it is long.
        third = (x1 - x0) // 3
        upright = (x0 + third, y0, x1 - third, y1)
        across = (x0, y0 + third, x1, y1 - third)
        pen.rectangle(upright, fill=ink)
        pen.rectangle(across, fill=ink)


@functools.lru_cache
def font() -> ImageFont.FreeTypeFont:
    """Pillow carries it: no file, no download."""
    return ImageFont.load_default(size=18)


def write_characters(pen: ImageDraw.ImageDraw, rng: random.Random, text: str, ink: str) -> None:
    """Up to four characters, one to a cell in reading order, each moved by at most a pixel."""
    half = CELL // 2
    for cell, character in enumerate(text):
        # The middle of the cell ("mm"), and a pixel to any side.
        left, top = corner(cell)
        x = left + half + rng.randint(-1, 1)
        y = top + half + rng.randint(-1, 1)
        pen.text((x, y), character, fill=COLORS[ink], font=font(), anchor="mm")


# ----------------------------------------------------------------------------------------- scenes


class Thing(NamedTuple):
    """A shape in a cell (0 to 3, in reading order)."""

    shape: str
    color: str
    cell: int

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def words(self) -> str:
        """Place first: a place is enough to look the rest up."""
        return f"{self.place} {self.color} {self.shape}"


def say(things: list[Thing] | tuple[Thing, ...]) -> str:
    """Things in words: `northwest red circle, southeast blue cross`."""
    return ", ".join(thing.words for thing in things)


def things_of(looks: list[tuple[str, str]], cells: list[int]) -> tuple[Thing, ...]:
    """(shape, color) and a cell each -> things."""
    return tuple(Thing(shape, color, cell) for (shape, color), cell in zip(looks, cells))


def plain_tuples(things: tuple[Thing, ...]) -> tuple:
    """As a scene's content: hashes are of what it looks like when printed, without class names."""
    return tuple(tuple(thing) for thing in things)


class Scene:
    """What all kinds share. A kind is made from random numbers alone: `Kind(rng)`.

    content: what makes two scenes the same one, for the held-out split; families: what can be asked;
    turns: how many questions a sample usually has.
    """

    content: tuple | str
    families: tuple[str, ...] = ("caption",)
    turns = 1

    def draw(self, rng: random.Random) -> list[Image.Image]:
        """The picture, or the frames; `rng` moves things that do not matter."""
        raise NotImplementedError

    def words(self) -> str:
        """The caption: all that the picture says."""
        raise NotImplementedError

    def ask(self, family: str, rng: random.Random) -> Turn:
        """A question of this family: each has a method of its own."""
        question_of_family = getattr(self, f"ask_{family}")
        return question_of_family(rng)

    def ask_caption(self, rng: random.Random) -> Turn:
        return Turn(
            family="caption",
            question="describe the picture.",
            answer=self.words(),
        )


class ObjectScene(Scene):
    """One to three things in different cells, in reading order, no two alike."""

    families = ("caption", "listing", "attributes", "spatial", "counting", "grounding")
    turns = 5

    def __init__(self, rng: random.Random):
        # Where things are, and what they look like: no two looks are drawn twice.
        count = rng.choice((1, 2, 2, 3, 3))
        cells = sorted(rng.sample(range(4), count))
        shapes = rng.sample(SHAPES, rng.choice((2, 3, 4)))
        looks = [(shape, color) for shape in shapes for color in COLORS]
        chosen = rng.sample(looks, count)
        self.objects = things_of(chosen, cells)

        # The boxes are no part of the content: a scene that is only shifted is the same one.
        self.content = plain_tuples(self.objects)
        self.boxes = [self._box(thing.cell, rng) for thing in self.objects]

    @staticmethod
    def _box(cell: int, rng: random.Random) -> Box:
        """A square of 11 to 13 pixels somewhere in its cell."""
        side = rng.randint(11, 13)
        room = CELL - 1 - side
        left, top = corner(cell)
        x = left + rng.randint(0, room)
        y = top + rng.randint(0, room)
        return square(x, y, side)

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, pen = canvas(rng)
        for thing, box in zip(self.objects, self.boxes):
            draw_shape(pen, thing.shape, thing.color, box)
        return [image]

    def words(self) -> str:
        return say(self.objects)

    def ask(self, family: str, rng: random.Random) -> Turn:
        # The thing that a question is about is drawn before the family is looked at, needed or not.
        self.about = rng.choice(self.objects)
        return super().ask(family, rng)

    def ask_counting(self, rng: random.Random) -> Turn:
        # The chain counts aloud: `1 northwest red circle, 2 southeast blue cross.`
        steps = []
        for number, thing in enumerate(self.objects, 1):
            steps.append(f"{number} {thing.words}")
        return Turn(
            family="counting",
            question="how many things are there?",
            answer=str(len(self.objects)),
            chain=", ".join(steps) + ".",
        )

    def ask_grounding(self, rng: random.Random) -> Turn:
        # Thousandths of the picture's side, in steps of 25: few different ones, for a small model.
        box = self.boxes[self.objects.index(self.about)]
        corners = []
        for pixel in box:
            steps = round(1000 * pixel / SIZE / 25)
            corners.append(str(25 * steps))

        name, key = self._name(rng)
        return Turn(
            family="grounding",
            question=f"box of {name}?",
            answer=" ".join([key, self.about.place, *corners]),
            chain=f"{self.about.words}.",
        )

    def ask_attributes(self, rng: random.Random) -> Turn:
        chain = f"{self.words()}."

        # What is in a place, which may be empty.
        if rng.random() < 0.3:
            place = PLACES[rng.randrange(4)]
            seen = "nothing"
            for thing in self.objects:
                if thing.place == place:
                    seen = f"{thing.color} {thing.shape}"
            return Turn(
                family="attributes",
                question=f"what is in the {place}?",
                answer=f"{place} {seen}",
                chain=chain,
            )

        # The color of a shape or the shape of a color, where only one thing has it ...
        options = []  # (what is asked, name in the question, key in the answer, value)
        for thing in self._alone("shape"):
            options.append(("color", f"the {thing.shape}", thing.shape, thing.color))
        for thing in self._alone("color"):
            options.append(("shape", f"the {thing.color} thing", thing.color, thing.shape))

        # ... and either of the thing in a place, which is always clear.
        place = self.about.place
        options.append(("color", f"the thing in the {place}", place, self.about.color))
        options.append(("shape", f"the thing in the {place}", place, self.about.shape))

        asked, name, key, value = rng.choice(options)
        return Turn(
            family="attributes",
            question=f"what {asked} is {name}?",
            answer=f"{key} {value}",
            chain=chain,
        )

    def ask_listing(self, rng: random.Random) -> Turn:
        """A drill: eight look-ups in a row, `key value` with keys drawn again and again.

        Looking a value up at the token that names its key is the part of every question that is
        learned last; here it is asked for every third token.
        """
        # Key and value: in half of the pairs the value is a place.
        pairs = (
            ("shape", "color"),
            ("color", "shape"),
            ("place", "shape"),
            ("place", "color"),
            ("shape", "place"),
            ("shape", "place"),
            ("color", "place"),
            ("color", "place"),
        )
        key, value = rng.choice(pairs)

        # Without a key that tells things apart there is nothing to look up.
        clear = self._alone(key)
        if not clear:
            return replace(self.ask_caption(rng), family="listing")

        # Eight times, with repetition.
        answers = []
        for thing in rng.choices(clear, k=8):
            answers.append(f"{getattr(thing, key)} {getattr(thing, value)}")
        asked = "where" if value == "place" else f"what {value}"
        return Turn(
            family="listing",
            question=f"{asked} is each {key}?",
            answer=", ".join(answers),
        )

    def ask_spatial(self, rng: random.Random) -> Turn:
        name, key = self._name(rng)
        row, column = divmod(self.about.cell, SIDE)

        # Mostly one of four places, else one of two sides.
        if rng.random() < 0.7:
            question = f"where is {name}?"
            where = self.about.place
        elif rng.random() < 0.5:
            question = f"is {name} on the left or right?"
            where = ("left", "right")[column]
        else:
            question = f"is {name} above or below?"
            where = ("above", "below")[row]
        return Turn(
            family="spatial",
            question=question,
            answer=f"{key} {where}",
            chain=f"{self.about.words}.",
        )

    def _alone(self, key: str) -> list[Thing]:
        """The things that no other equals in shape, color or place."""
        values = [getattr(thing, key) for thing in self.objects]
        return [thing for thing in self.objects if values.count(getattr(thing, key)) == 1]

    def _name(self, rng: random.Random) -> tuple[str, str]:
        """The thing in question by what sets it apart: (in a question, in an answer).

        That is its shape or its color if one is enough, else both.
        """
        shape, color, _ = self.about
        clear = []
        if self.about in self._alone("shape"):
            clear.append((f"the {shape}", shape))
        if self.about in self._alone("color"):
            clear.append((f"the {color} thing", color))

        both = (f"the {color} {shape}", f"{color} {shape}")
        return rng.choice(clear or [both])


class DotScene(Scene):
    """One to six equal dots on a 4 x 4 grid of patches: counting that no single cell can answer."""

    families = ("caption", "counting")

    def __init__(self, rng: random.Random):
        self.color = rng.choice(list(COLORS))
        self.cells = sorted(rng.sample(range(16), rng.randint(1, 6)))
        self.content = (self.color, tuple(self.cells))

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, pen = canvas(rng)
        for cell in self.cells:
            # A patch is eight pixels wide, a dot six.
            row, column = divmod(cell, 4)
            x = 8 * column + rng.randint(0, 2)
            y = 8 * row + rng.randint(0, 2)
            pen.ellipse(square(x, y, 5), fill=COLORS[self.color])
        return [image]

    def words(self) -> str:
        return f"{self.color} dots {len(self.cells)}"

    def ask_counting(self, rng: random.Random) -> Turn:
        """Counted row by row: `1 + 0 + 2 + 1 = 4`."""
        count = str(len(self.cells))
        in_row = Counter(cell // 4 for cell in self.cells)
        rows = [str(in_row[row]) for row in range(4)]
        return Turn(
            family="counting",
            question="how many things are there?",
            answer=count,
            chain=" + ".join(rows) + f" = {count}.",
        )


class ReadingScene(Scene):
    """Three characters. A string that is held out is held out in every colour."""

    families = ("caption", "reading")

    def __init__(self, rng: random.Random):
        self.text = "".join(rng.choice(CHARACTERS) for _ in range(3))
        self.ink = rng.choice(INKS)
        self.content = self.text

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, pen = canvas(rng)
        write_characters(pen, rng, self.text, self.ink)
        return [image]

    def words(self) -> str:
        return f"text {self.text}"

    def ask_reading(self, rng: random.Random) -> Turn:
        return Turn(
            family="reading",
            question="what does it say?",
            answer=self.text,
            chain=f"{self.text}.",
        )


def height_of(bar: tuple[str, int]) -> int:
    return bar[1]


def say_bars(bars) -> str:
    """(color, height) each in words: `red 3, blue 1`."""
    return ", ".join(f"{color} {height}" for color, height in bars)


class ChartScene(Scene):
    """Three bars of different colours and heights in three of four columns."""

    families = ("caption", "listing", "charts", "arithmetic")
    turns = 3

    def __init__(self, rng: random.Random):
        colors = rng.sample(list(COLORS), 3)
        heights = rng.sample(range(1, LEVELS + 1), 3)
        self.bars = tuple(zip(colors, heights))
        self.columns = sorted(rng.sample(range(4), 3))
        self.content = (self.bars, self.columns)

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, pen = canvas(rng)
        bottom = SIZE - 1
        for column, (color, height) in zip(self.columns, self.bars):
            # A column is eight pixels wide, a bar seven; all stand on the picture's edge.
            left = 8 * column + rng.randint(0, 1)
            top = bottom - height * BAR_UNIT
            pen.rectangle((left, top, left + 6, bottom), fill=COLORS[color])
        return [image]

    def words(self) -> str:
        return say_bars(self.bars)

    def ask_listing(self, rng: random.Random) -> Turn:
        """The drill of ObjectScene.ask_listing, with bars."""
        chosen = rng.choices(self.bars, k=8)
        return Turn(
            family="listing",
            question="how high is each bar?",
            answer=say_bars(chosen),
        )

    def ask_arithmetic(self, rng: random.Random) -> Turn:
        """How much higher one bar is than a lower one."""
        # The chain reads both bars before it subtracts.
        two = rng.sample(self.bars, 2)
        low, high = sorted(two, key=height_of)
        difference = high[1] - low[1]
        equation = f"{high[1]} - {low[1]} = {difference}"
        return Turn(
            family="arithmetic",
            question=f"how much higher is {high[0]} than {low[0]}?",
            answer=str(difference),
            chain=f"{say_bars([high, low])}. {equation}.",
        )

    def ask_charts(self, rng: random.Random) -> Turn:
        """The value of a bar, or which is the highest or lowest and how high it is."""
        kind = rng.choice(("highest", "lowest", "value", "value"))
        bar = rng.choice(self.bars)

        # One bar's height.
        if kind == "value":
            answer = say_bars([bar])
            return Turn(
                family="charts",
                question=f"how high is the {bar[0]} bar?",
                answer=answer,
                chain=f"{self.words()}. {answer}.",
            )

        # Which bar, and how high it is.
        choose = max if kind == "highest" else min
        answer = say_bars([choose(self.bars, key=height_of)])
        return Turn(
            family="charts",
            question=f"which bar is the {kind}?",
            answer=answer,
            chain=f"{self.words()}. {kind} {answer}.",
        )


class SumScene(Scene):
    """A sum or a difference of two digits; no result is negative."""

    families = ("caption", "arithmetic")

    def __init__(self, rng: random.Random):
        a = rng.randrange(10)
        b = rng.randrange(10)
        self.sign = rng.choice("+-")

        # The larger digit first, so that no difference is negative.
        if self.sign == "-":
            a, b = max(a, b), min(a, b)
        self.numbers = (a, b)
        self.ink = rng.choice(INKS)
        self.content = (a, self.sign, b, self.ink)

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, pen = canvas(rng)
        a, b = self.numbers
        write_characters(pen, rng, f"{a}{self.sign}{b}", self.ink)
        return [image]

    def words(self) -> str:
        a, b = self.numbers
        return f"sum {a} {self.sign} {b}"

    def ask_arithmetic(self, rng: random.Random) -> Turn:
        a, b = self.numbers
        result = a + b if self.sign == "+" else a - b
        return Turn(
            family="arithmetic",
            question="what is the result?",
            answer=str(result),
            chain=f"{a} {self.sign} {b} = {result}.",
        )


class OddScene(Scene):
    """Three or four things, all alike but one, which differs in shape or in color."""

    families = ("caption", "odd")

    def __init__(self, rng: random.Random):
        count = rng.choice((3, 4, 4))
        cells = sorted(rng.sample(range(4), count))
        shape = rng.choice(SHAPES)
        color = rng.choice(list(COLORS))

        # The odd one: another shape, or another color.
        if rng.random() < 0.5:
            other_shapes = [other for other in SHAPES if other != shape]
            odd = (rng.choice(other_shapes), color)
        else:
            other_colors = [other for other in COLORS if other != color]
            odd = (shape, rng.choice(other_colors))
        self.cell = rng.choice(cells)

        # All other places hold the usual look.
        looks = [odd if cell == self.cell else (shape, color) for cell in cells]
        self.objects = things_of(looks, cells)
        self.content = plain_tuples(self.objects)

        # Where each is drawn inside its cell.
        self.boxes = []
        for cell in cells:
            left, top = corner(cell)
            x = left + rng.randint(0, 3)
            y = top + rng.randint(0, 3)
            self.boxes.append(square(x, y, 12))

    def draw(self, rng: random.Random) -> list[Image.Image]:
        image, pen = canvas(rng)
        for thing, box in zip(self.objects, self.boxes):
            draw_shape(pen, thing.shape, thing.color, box)
        return [image]

    def words(self) -> str:
        return say(self.objects)

    def ask_odd(self, rng: random.Random) -> Turn:
        # The chain says what is usual before it names the exception.
        odd = next(thing for thing in self.objects if thing.cell == self.cell)
        usual = next(thing for thing in self.objects if thing.cell != self.cell)
        rule = f"most are {usual.color} {usual.shape}"
        return Turn(
            family="odd",
            question="where is the odd one out?",
            answer=odd.place,
            chain=f"{rule}. {odd.words}.",
        )


class MovingScene(Scene):
    """Three frames of one shape that moves by a cell a frame (a wall stops it for the third)."""

    families = ("caption", "video")

    def __init__(self, rng: random.Random):
        self.shape = rng.choice(SHAPES)
        self.color = rng.choice(list(COLORS))
        self.move = rng.choice(list(MOVES))

        # A start from which the first move stays inside.
        dx, dy = MOVES[self.move]
        starts = []
        for x in range(SIDE):
            for y in range(SIDE):
                if 0 <= x + dx < SIDE and 0 <= y + dy < SIDE:
                    starts.append((x, y))
        x, y = rng.choice(starts)

        # Where it is in each frame: a wall keeps it in the last cell inside.
        last = SIDE - 1
        self.cells = []
        for frame in range(3):
            column = min(max(x + dx * frame, 0), last)
            row = min(max(y + dy * frame, 0), last)
            self.cells.append(SIDE * row + column)
        self.content = (self.shape, self.color, self.move, x, y)

    def draw(self, rng: random.Random) -> list[Image.Image]:
        frames = []
        for cell in self.cells:
            # Every frame has its own shade and shift, as a filmed thing would.
            image, pen = canvas(rng)
            left, top = corner(cell)
            x = left + rng.randint(1, 3)
            y = top + rng.randint(1, 3)
            draw_shape(pen, self.shape, self.color, square(x, y, 12))
            frames.append(image)
        return frames

    def words(self) -> str:
        looks = [(self.shape, self.color)] * len(self.cells)
        return say(things_of(looks, self.cells))

    def ask_video(self, rng: random.Random) -> Turn:
        return Turn(
            family="video",
            question="which way does it move?",
            answer=self.move,
            chain=f"{self.words()}.",
        )


# The names are part of every sample's origin and of the held-out hash: they stay what they are.
KINDS = {
    "objects": ObjectScene,
    "dots": DotScene,
    "reading": ReadingScene,
    "chart": ChartScene,
    "sum": SumScene,
    "odd": OddScene,
    "video": MovingScene,
}


def held_out(content) -> bool:
    """Whether a scene is kept for grading: one hash in eight is."""
    digest = hashlib.blake2b(repr(content).encode(), digest_size=4).digest()
    return digest[0] % 8 == 0


def scene(kind: str, rng: random.Random, test: bool) -> Scene:
    """A scene of this kind from the train side or the held-out side."""
    while True:
        candidate = KINDS[kind](rng)
        if held_out((kind, candidate.content)) == test:
            return candidate


# ---------------------------------------------------------------------------------------- samples


def weights_of(mixture: dict[str, float], text_only: bool) -> dict[str, float]:
    """Family -> weight of what can be asked, without "text". A mixture of text alone asks everything."""
    weights = {name: w for name, w in mixture.items() if name != "text" and w > 0}

    # Nothing to look at is named: everything that words can describe.
    if not weights:
        weights = {name: 1.0 for name in FAMILIES if name not in ("text", "grounding")}

    # A description has no pixels to box.
    if text_only:
        weights.pop("grounding", None)
    return weights or {"caption": 1.0}


def kind_shares(weights: dict[str, float]) -> dict[str, float]:
    """Kind -> how often it is drawn, such that each family gets its weight of the *turns*.

    Kinds that share a family share its weight; a kind that asks several questions a sample is
    drawn less often.
    """
    homes = Counter(family for kind in KINDS.values() for family in kind.families)
    shares = {}
    for name, kind in KINDS.items():
        asked = [family for family in kind.families if family in weights]
        turns = sum(weights[family] / homes[family] for family in asked)
        shares[name] = turns / kind.turns
    return shares


def turns_about(
    subject: Scene, weights: dict[str, float], turns: int, rng: random.Random
) -> list[Turn]:
    """Questions about a scene, by weight; one that is drawn twice is asked once."""
    families = [name for name in subject.families if name in weights]
    family_weights = [weights[name] for name in families]
    asked: dict[str, Turn] = {}
    for _ in range(turns):
        family = rng.choices(families, family_weights)[0]
        turn = subject.ask(family, rng)
        asked.setdefault(turn.question, turn)
    return list(asked.values())


def opening(subject: Scene, question: str, rng: random.Random, text_only: bool) -> Message:
    """The first message: picture (or numbered frames, or a description) and question."""
    # In words.
    if text_only:
        return Message("user", (f"picture: {subject.words()}.\n{question}",))

    # One picture.
    frames = subject.draw(rng)
    if len(frames) == 1:
        return Message("user", (frames[0], "\n" + question))

    # Several: announced as the released prompt announces the frames of a video.
    parts = []
    for number, frame in enumerate(frames, 1):
        parts += [f"Frame-{number}: ", frame, "\n"]
    return Message("user", (*parts, question))


def facts_of(subject: Scene, turn: Turn) -> dict[str, str]:
    """What grading may know of a sample's last turn."""
    facts = {
        "answer": turn.answer,
        "family": turn.family,
        "words": subject.words(),
        "chain": turn.chain,
        "question": turn.question,
    }
    grader = TABLE[turn.family].grader
    if grader != "auto":
        facts["grader"] = grader
    return facts


def sample(
    index: int, seed: int, mixture: dict[str, float], test: bool = False, turns: int = 0
) -> Sample:
    """Sample `index`: one scene and up to `turns` questions about it (0: as many as the kind has).

    mixture: family -> share of the turns; "text" is the share of samples that describe the picture
    instead of showing it. test: from a held-out scene. turns: 1 for grading and RL.
    Raises ValueError for an unknown family.
    """
    # A mixture names families and nothing else.
    unknown = sorted(set(mixture) - set(FAMILIES))
    if unknown:
        names = ", ".join(FAMILIES)
        raise ValueError(f"no family {unknown[0]!r} in the world; choose from {names}")
    rng = random.Random(f"{seed}/{index}/{test}")

    # Described or drawn? A mixture that names nothing to look at is only described.
    lookable = any(w > 0 for name, w in mixture.items() if name != "text")
    text_only = rng.random() < mixture.get("text", 0.0) or not lookable
    weights = weights_of(mixture, text_only)

    # The scene and what is asked about it.
    shares = kind_shares(weights)
    kind = rng.choices(list(shares), list(shares.values()))[0]
    subject = scene(kind, rng, test)
    asked = turns_about(subject, weights, turns or subject.turns, rng)

    # As messages: the first question comes with the picture.
    messages = []
    for turn in asked:
        if not messages:
            messages.append(opening(subject, turn.question, rng, text_only))
        else:
            messages.append(Message("user", (turn.question,)))
        messages.append(Message("assistant", (turn.answer,)))

    # The task counts and mixes samples; facts are of the last turn, the one that is graded.
    families = "+".join(sorted({turn.family for turn in asked}))
    return Sample(
        tuple(messages),
        task="text" if text_only else families,
        origin=f"world/{kind}/{seed}/{index}",
        facts=facts_of(subject, asked[-1]),
    )


class World:
    """The world as a data source: `stream` for training, `held_out` for grading. Twin of `readers.Folder`."""

    root = None

    def stream(self, mixture: dict[str, float], seed: int, turns: int = 0) -> Drawn:
        """Endless samples of the train side; `stream[n]` is `sample(n, ...)`."""
        return Drawn(functools.partial(sample, seed=seed, mixture=mixture, turns=turns))

    def held_out(self, family: str, n: int, seed: int = 1) -> list[Sample]:
        """n single-question samples of a family, all from held-out scenes."""
        return [sample(i, seed, {family: 1.0}, test=True, turns=1) for i in range(n)]


def corpus(n: int, seed: int = 0) -> list[str]:
    """Text to train the toy's tokenizer on: questions, answers, chains (no strings to read)."""
    kinds = [kind for kind in KINDS if kind != "reading"]
    texts = []
    for i in range(n):
        rng = random.Random(f"{seed}/corpus/{i}")
        subject = scene(rng.choice(kinds), rng, test=False)
        turn = subject.ask(rng.choice(subject.families), rng)

        # What stands around them in a conversation.
        texts += [
            f"picture: {subject.words()}.\n",
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


# ------------------------------------------------------------------------------------------ sheet


def scene_counts() -> dict[str, int]:
    """How many different scenes each kind can show (before jitter, background shade and held-out split)."""
    looks = len(SHAPES) * len(COLORS)

    # Where things can be, times how they can look.
    objects = sum(math.comb(4, n) * math.perm(looks, n) for n in (1, 2, 3))
    dots = sum(math.comb(16, n) for n in range(1, 7))

    # Three of the colors and three of the heights, in three of four columns.
    bars = math.perm(len(COLORS), 3) * math.perm(LEVELS, 3)

    # Two digits each; a difference has the larger one first.
    sums = 10 * 10
    differences = 10 * 11 // 2

    # Which of the places is odd, how the others look, and in what it differs.
    places = sum(math.comb(4, n) * n for n in (3, 4))
    differing = len(SHAPES) - 1 + len(COLORS) - 1

    return {
        "objects": objects,
        "dots": dots * len(COLORS),
        "reading": len(CHARACTERS) ** 3 * len(INKS),
        "chart": bars * math.comb(4, 3),
        "sum": (sums + differences) * len(INKS),
        "odd": places * looks * differing,
        "video": looks * len(MOVES) * SIDE,  # in either row or column
    }


def print_sizes(seed: int, questions: int = 400) -> None:
    """Scenes of each kind, and how varied the answers of each family are."""
    for kind, count in scene_counts().items():
        families = ", ".join(KINDS[kind].families)
        print(f"{kind:10s} {count:>14,} scenes   asked about: {families}")

    for family in FAMILIES:
        if family == "text":
            continue

        # A family whose commonest answer is common can be guessed.
        asked = [sample(i, seed, {family: 1}, turns=1) for i in range(questions)]
        answers = Counter(s.facts["answer"] for s in asked)
        commonest, count = answers.most_common(1)[0]
        print(
            f"{family:12s} {len(answers):4d} answers in {questions} questions; "
            f"the commonest, {commonest!r}, {count / questions:.0%}"
        )


def sheet(seed: int, columns: int = 12) -> Image.Image:
    """One row of examples for each kind, three times as large."""
    step = SIZE + 4
    board = Image.new("RGB", (columns * step, len(KINDS) * step), "white")
    for row, kind in enumerate(KINDS):
        for column in range(columns):
            # The first frame stands for a video.
            rng = random.Random(f"{seed}/{kind}/{column}")
            picture = scene(kind, rng, test=False).draw(rng)[0]
            left = column * step + 2
            top = row * step + 2
            board.paste(picture, (left, top))
    return board.resize((board.width * 3, board.height * 3), Image.NEAREST)


@dataclass
class SheetOptions:
    """Draw examples of every kind, and print how large this world is."""

    out: Path = Path("runs/world.png")
    seed: int = 0


def show_world(options: SheetOptions) -> None:
    print_sizes(options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(options.seed).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    command(show_world)
