"""Pictures to ask the toy about: some of each kind that it was taught, and some that it cannot get right.

What it teaches: what a model of a million parameters has seen is all that it knows. Its world has two by
two cells, five colours, four shapes, six dots at most (data/world.py); the first pictures are of that world,
from scenes that training never drew, with their true answers. The others leave it by one thing each, and
the list says why the answer will be wrong: every visual token is one cell, every answer one of its words.

    python -m talk.samples --out runs/pictures                           # the pictures, and what to ask
    python -m talk.samples --out runs/pictures --model runs/toy/final    # and what a model says
    make chat                                      # > runs/pictures/odd-1.png where is the odd one out?
"""

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from data.encode import Encoder
from data.sample import Sample, Video
from data.world import CELL, COLORS, KINDS, SIZE, canvas, draw_shape, font, scene, square
from generate import generate, load_model, user_turn
from infra.cli import command
from infra.text import printable


@dataclass(frozen=True)
class SamplePicture:
    """A picture (or a video's frames), questions with their true answers, and why it is hard, if it is."""

    name: str
    frames: tuple[Image.Image, ...]
    asked: tuple[tuple[str, str], ...]
    why: str = ""

    @property
    def file(self) -> str:
        return self.name + (".gif" if len(self.frames) > 1 else ".png")


# ------------------------------------------------------------------------------------ what it was taught


def taught(seed: int, each: int) -> list[SamplePicture]:
    """Held-out scenes of every kind of the toy's world, and all that they can be asked."""
    found = []
    for kind in KINDS:
        for number in range(1, each + 1):
            rng = random.Random(f"{seed}/samples/{kind}/{number}")
            subject = scene(kind, rng, test=True)
            turns = [subject.ask(family, rng) for family in subject.families if family != "listing"]
            asked = tuple((turn.question, turn.answer) for turn in turns)
            found.append(SamplePicture(f"{kind}-{number}", tuple(subject.draw(rng)), asked))
    return found


# ------------------------------------------------------------------------------------ what it was not


def empty_picture() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture of the toy's size, always of the same shade."""
    return canvas(random.Random(0))


def colour_beyond() -> Image.Image:
    image, pen = empty_picture()
    pen.ellipse(square(2, 2, 12), fill=(150, 60, 200))
    return image


def shape_beyond() -> Image.Image:
    image, pen = empty_picture()
    pen.polygon([(24, 1), (30, 7), (24, 14), (18, 7)], fill=COLORS["red"])
    return image


def between_cells() -> Image.Image:
    image, pen = empty_picture()
    middle = (SIZE - 12) // 2
    draw_shape(pen, "circle", "blue", square(middle, middle, 12))
    return image


def too_many() -> Image.Image:
    image, pen = empty_picture()
    for cell in range(9):
        pen.ellipse(square(10 * (cell % 3) + 2, 10 * (cell // 3) + 2, 5), fill=COLORS["green"])
    return image


def small_letters() -> Image.Image:
    image, pen = empty_picture()
    for cell, letter in enumerate("dog"):
        x = cell % 2 * CELL + CELL // 2
        y = cell // 2 * CELL + CELL // 2
        pen.text((x, y), letter, fill=COLORS["black"], font=font(), anchor="mm")
    return image


def large_picture() -> Image.Image:
    """640 x 320 pixels with eight crosses: squeezed to 32 x 32, two crosses share a cell's width."""
    image = Image.new("RGB", (640, 320), (240, 240, 240))
    pen = ImageDraw.Draw(image)
    for number in range(8):
        x = 160 * (number % 4) + 40
        y = 160 * (number // 4) + 40
        draw_shape(pen, "cross", "red", square(x, y, 80))
    return image


def beyond() -> list[SamplePicture]:
    """One thing each that is not in the toy's world."""
    cells = "the picture is two by two cells, and each visual token is one of them"
    return [
        SamplePicture(
            "beyond-colour",
            (colour_beyond(),),
            (("what color is the circle?", "purple"),),
            f"it has five words for colours: {', '.join(COLORS)}",
        ),
        SamplePicture(
            "beyond-shape",
            (shape_beyond(),),
            (("what shape is the red thing?", "a diamond"),),
            "it has four words for shapes: circle, square, triangle, cross",
        ),
        SamplePicture(
            "beyond-place",
            (between_cells(),),
            (("where is the circle?", "in the middle"),),
            f"{cells}; there is no word for the middle",
        ),
        SamplePicture(
            "beyond-six",
            (too_many(),),
            (("how many things are there?", "9"),),
            "it has counted to six, and never further",
        ),
        SamplePicture(
            "beyond-letters",
            (small_letters(),),
            (("what does it say?", "dog"),),
            "it has read twenty characters, capitals and digits",
        ),
        SamplePicture(
            "beyond-size",
            (large_picture(),),
            (("how many things are there?", "8"),),
            f"any picture is made 32 x 32; {cells}",
        ),
        SamplePicture(
            "beyond-words",
            (between_cells(),),
            (("is there a dog?", "no"),),
            "it answers the questions that it was taught; to any other it says what it would say to those",
        ),
    ]


# --------------------------------------------------------------------------------------------- the command


@dataclass
class SampleOptions:
    """Draw pictures to ask the toy about, and list what to ask."""

    out: Path = Path("runs/pictures")
    each: int = 1  # pictures of every kind
    seed: int = 0
    model: Path | None = None  # ask it everything, and list its answers


def write_picture(shown: SamplePicture, out: Path) -> None:
    """A PNG; a video as a GIF, half a second a frame."""
    first, *others = shown.frames
    if others:
        first.save(out / shown.file, save_all=True, append_images=others, duration=500, loop=0)
    else:
        first.save(out / shown.file)


def contact_sheet(pictures: list[SamplePicture], columns: int = 7, side: int = 128) -> Image.Image:
    """All of them, enlarged, in the order of the list."""
    step = side + 8
    rows = -(-len(pictures) // columns)
    board = Image.new("RGB", (columns * step, rows * step), "white")
    for number, shown in enumerate(pictures):
        row, column = divmod(number, columns)
        picture = shown.frames[0].resize((side, side), Image.Resampling.NEAREST)
        board.paste(picture, (column * step + 4, row * step + 4))
    return board


def answers_of(directory: Path, pictures: list[SamplePicture]) -> list[str]:
    """What a model says to every question, in order."""
    model, tokenizer = load_model(directory)
    encoder = Encoder(tokenizer, model.config)

    # every question by itself, all in one batch
    prompts = []
    for shown in pictures:
        seen = shown.frames[0] if len(shown.frames) == 1 else Video(shown.frames)
        for question, _ in shown.asked:
            prompts.append(encoder.prompt(Sample((user_turn([seen], question),))))
    answers = generate(model, prompts, tokenizer.ends)
    return [tokenizer.decode_answer(answer.ids) for answer in answers]


def listing(pictures: list[SamplePicture], out: Path, said: list[str]) -> str:
    """The list: file, question, truth, and what a model said where one was asked."""
    known = ["What it was taught:", ""]
    unknown = ["", "What it cannot get right, and why:", ""]
    replies = iter(said)
    for shown in pictures:
        lines = unknown if shown.why else known
        lines.append(f"{out / shown.file}")
        for question, truth in shown.asked:
            reply = next(replies, None)
            heard = "" if reply is None else f"; it said: {printable(reply)}"
            lines.append(f"    {question}  truth: {truth}{heard}")
        if shown.why:
            lines.append(f"    why: {shown.why}")
    return "\n".join(known + unknown) + "\n"


def draw_samples(options: SampleOptions) -> None:
    """Write the pictures, a sheet of all, and the list, which is also printed."""
    if options.each < 1:
        raise ValueError(f"--each {options.each}: at least 1")
    pictures = taught(options.seed, options.each) + beyond()
    said = answers_of(options.model, pictures) if options.model else []
    options.out.mkdir(parents=True, exist_ok=True)
    for shown in pictures:
        write_picture(shown, options.out)
    contact_sheet(pictures).save(options.out / "sheet.png")
    text = listing(pictures, options.out, said)
    (options.out / "questions.txt").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    command(draw_samples)
