"""What `inside` found, as a page that stands alone, as one picture, or as lines in a terminal.

What it teaches: attention is numbers per token and per cell, and is read fastest as light. Each token of
the answer gets the pictures once more, dark where it did not look; the brightest cell is the one that it
looked at most, and a number says how much of its attention went to pictures at all.

    Inside, Cuts --> a card per token, layer by layer on request --> page.html    (no script, no network)
                 --> the same cards side by side                 --> sheet.png
                 --> a line per token                            --> the terminal

    python generate.py --image some.png --prompt "how many things are there?" --show runs/inside.html

Simplified: the picture of a card is written once, as a background; a veil of a pixel per cell lies over it.
"""

import base64
import io
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.encode import Encoder, question_turns
from data.sample import Sample
from infra.text import printable
from talk.inside import (
    CutPicture,
    Inside,
    Sheet,
    expert_shares,
    look_inside,
    picture_cuts,
    row_among_samples,
    row_length,
    visual_places,
)
from tokenizer import Tokenizer
from tools.drawing import drawn_rows, el, facts, heat, html_page, safe, section, svg, word
from vlm import SailVL

DARKEST = 224  # of 255: what lies over a cell that was not looked at
SHADES = 32  # between that and nothing: few, so that a veil is a small file
FEW = 16  # cells of a sheet that still have room for a number each

STYLE = """
.tokens { display: grid; grid-template-columns: repeat(auto-fill, minmax(236px, 1fr)); gap: 26px 28px }
.token { font-size: 12px; break-inside: avoid }
.token h3 { font: 500 17px/1.3 Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere }
.token h3 .soft { font-size: 12px }
.sheets { display: flex; flex-wrap: wrap; gap: 5px; margin: 6px 0; align-items: flex-start }
.sheet { position: relative; flex: 0 1 168px; background-size: 100% 100%; image-rendering: pixelated }
.sheet img, .sheet svg { position: absolute; inset: 0; width: 100%; height: 100% }
.sheet svg { font-size: .3px; fill: #fff; stroke: #000; stroke-width: .07px; paint-order: stroke }
.frames .sheet { flex-basis: 72px }
.looked + .looked { margin-top: 30px }
.looked > h3 { margin-bottom: 6px }
.original { max-width: 240px; max-height: 240px; min-width: 84px; image-rendering: pixelated }
.two-sided { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: flex-start; margin: 8px 0 18px }
.row { display: flex; height: 22px; margin: 4px 0 }
.row i { background: currentColor; margin-right: 1px; min-width: 1px }
.text { color: var(--pale) }
.seen { color: var(--ochre) }
.said { color: var(--blue) }
details { margin-top: 4px }
summary { cursor: pointer; color: var(--soft) }
.layers { display: flex; flex-wrap: wrap; gap: 4px 10px; margin-top: 4px }
.layer { flex: 0 0 72px }
.layer .sheet { flex: 0 0 72px }
"""


# --------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class View:
    """All that a page or a picture is made of.

    tiles: the arrays that the model was shown. by_cell (L, n, visual tokens): attention to pictures.
    words: of the answer's tokens. name: of the styles of its sheets, one for each view on a page.
    """

    inside: Inside
    cuts: list[CutPicture]
    tiles: list[np.ndarray]
    by_cell: Tensor
    words: list[str]
    encoder: Encoder
    name: str = "sheet"

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer

    @property
    def sheets(self) -> list[Sheet]:
        return [sheet for cut in self.cuts for sheet in cut.sheets]

    @property
    def shares(self) -> Tensor:
        """(n,) how much of each token's attention went to pictures, mean over layers."""
        return self.by_cell.mean(0).sum(-1)


def view_of(
    model: SailVL,
    encoder: Encoder,
    sample: Sample,
    answer: list[int],
    reply: bool = False,
    name: str = "sheet",
) -> View:
    """Look into one answer (ids) to a sample, asked as `Encoder.prompt` asks it."""
    asked = sample if reply else replace(sample, messages=question_turns(sample))
    prompt = encoder.prompt(asked, reply=True)
    inside = look_inside(model, prompt, answer)
    seen = visual_places(inside, encoder.tokenizer.image)
    return View(
        inside=inside,
        cuts=picture_cuts(encoder, asked),
        tiles=prompt[1],
        by_cell=inside.attention[:, :, seen],
        words=[word_of(encoder.tokenizer, token) for token in answer],
        encoder=encoder,
        name=name,
    )


def word_of(tokenizer: Tokenizer, token: int) -> str:
    """A token as it can be read: spaces as a dot in the middle, control characters spelled out."""
    if token in tokenizer.ends:
        return "(end)"
    text = tokenizer.decode([token])
    return printable(text).replace(" ", "\u00b7") or "(nothing)"


def veil(weights: np.ndarray, brightest: float) -> Image.Image:
    """What lies over a sheet: black, and the more opaque the less a cell (rows, columns) was looked at."""
    light = np.clip(weights / max(brightest, 1e-9), 0, 1)
    opacity = (DARKEST // SHADES * np.round(SHADES * (1 - light))).astype(np.uint8)
    black = np.zeros_like(opacity)
    return Image.merge("LA", [Image.fromarray(black), Image.fromarray(opacity)])


# --------------------------------------------------------------------------------------------- the page


def data_uri(image: Image.Image) -> str:
    """A picture as the address of itself."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def view_style(view: View) -> str:
    """A class for each sheet: its picture, once."""
    rules = []
    for number, sheet in enumerate(view.sheets):
        picture = Image.fromarray(sheet.pixels)
        picture.thumbnail((672, 672))
        shape = f"aspect-ratio:{sheet.pixels.shape[1]}/{sheet.pixels.shape[0]}"
        rules.append(
            f".{view.name}{number} {{ background-image:url({data_uri(picture)});{shape} }}"
        )
    return "\n".join(rules)


def lit_sheets(view: View, weights: Tensor) -> str:
    """All pictures, lit by the attention (visual tokens,) that one token paid to them."""
    # one scale for all of them
    paid = weights.numpy()
    brightest = float(paid.max())
    total = max(float(paid.sum()), 1e-9)

    # the picture is the box's background, the veil lies over it, the numbers over both
    boxes = []
    for number, sheet in enumerate(view.sheets):
        here = paid[sheet.cells]  # (rows, columns)
        cover = f'<img alt="" src="{data_uri(veil(here, brightest))}">'
        numbers = cell_numbers(here / total) if here.size <= FEW else ""
        boxes.append(el("div", cover, numbers, cls=f"sheet {view.name}{number}"))
    return el("div", *boxes, cls="sheets frames" if len(boxes) > 2 else "sheets")


def cell_numbers(shares: np.ndarray) -> str:
    """Percent of the attention that went to pictures, in the middle of each cell."""
    rows, columns = shares.shape
    labels = []
    for row in range(rows):
        for column in range(columns):
            percent = f"{100 * shares[row, column]:.0f}"
            labels.append(word(percent, column + 0.5, row + 0.6, "m"))
    return svg(columns, rows, "percent of the attention to pictures", *labels)


def token_card(view: View, number: int) -> str:
    """One token: what it was, how sure, where it looked, who computed it."""
    # how sure it was, and where it looked
    inside = view.inside
    pictures = ""
    lines = [f"chance {inside.chance[number]:.0%}, entropy {inside.entropy[number]:.2f} nats"]
    if view.cuts:
        lines.append(f"{view.shares[number]:.0%} of its attention to pictures")
        pictures = lit_sheets(view, view.by_cell[:, number].mean(0))
        pictures += by_layer_details(view, number)

    # what else it might have said, and who computed that
    lines.append("or " + rivals_of(view, number))
    if inside.experts is not None:
        chosen = inside.experts[:, inside.places[number]].tolist()
        by_layer = ["+".join(map(str, sorted(layer))) for layer in chosen]
        lines.append("experts by layer: " + ", ".join(by_layer))

    title = el("h3", safe(view.words[number]), " ", el("span", f"{number + 1}", cls="soft"))
    notes = [el("p", safe(text), cls="soft") for text in lines]
    return el("div", title, pictures, *notes, cls="token")


def rivals_of(view: View, number: int) -> str:
    """What might have been said in a token's place, likeliest first."""
    inside = view.inside
    said = int(inside.answer[number])
    rivals = []
    for token, chance in zip(inside.likeliest[number].tolist(), inside.chances[number].tolist()):
        if token != said and chance >= 0.005:
            rivals.append(f"{word_of(view.tokenizer, token)} {chance:.0%}")
    return ", ".join(rivals) or "nothing else (below 0.5%)"


def by_layer_details(view: View, number: int) -> str:
    """The same, layer by layer, folded."""
    layers = []
    for layer, weights in enumerate(view.by_cell[:, number]):
        share = el("p", f"{layer}: {weights.sum():.0%}", cls="soft")
        layers.append(el("div", share, lit_sheets(view, weights), cls="layer"))
    summary = el("summary", "layer by layer, and its share of attention to pictures")
    return el("details", summary, el("div", *layers, cls="layers"))


def whole_card(view: View) -> str:
    """The mean over all tokens, as a card before theirs."""
    if not view.cuts:
        return ""
    share = f"{view.shares.mean():.0%} of the attention to pictures, mean over all tokens"
    weights = view.by_cell.mean((0, 1))
    note = el("p", share, cls="soft")
    return el("div", el("h3", "the whole answer"), lit_sheets(view, weights), note, cls="token")


def token_cards(view: View) -> str:
    """The whole answer, then every token."""
    cards = [token_card(view, number) for number in range(len(view.words))]
    return el("div", whole_card(view), *cards, cls="tokens")


def cut_rows(view: View) -> str:
    """Each picture as it came, what became of it, and the sheets that the model was shown."""
    rows = []
    number = 0
    for place, cut in enumerate(view.cuts, 1):
        # as it came
        small = cut.picture.copy()
        small.thumbnail((480, 480))
        given = f'<img alt="" class="original" src="{data_uri(small)}">'

        # as the model was shown it
        shown = []
        for sheet in cut.sheets:
            tip = f"{sheet.title}: {sheet.cells.size} visual tokens"
            shown.append(el("div", cls=f"sheet {view.name}{number}", title=tip))
            number += 1
        rows.append(el("p", safe(f"Picture {place}: {cut.note}")))
        rows.append(el("div", given, el("div", *shown, cls="sheets"), cls="two-sided"))
    return "".join(rows)


def token_kinds(inside: Inside, image_token: int) -> list[tuple[str, int]]:
    """The conversation as runs of tokens of one kind: (text, seen or said, how many)."""
    asked = inside.ids[: int(inside.places[0]) + 1].tolist()
    kinds = ["seen" if token == image_token else "text" for token in asked]
    kinds += ["said"] * len(inside.answer)
    return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]


def conversation_bar(view: View) -> str:
    """The conversation's own tokens: text, pictures, answer."""
    meanings = {"text": "text", "seen": "a picture's visual tokens", "said": "the answer"}
    pieces = []
    for kind, count in token_kinds(view.inside, view.tokenizer.image):
        tip = f"{count} tokens: {meanings[kind]}"
        pieces.append(el("i", cls=kind, style=f"flex:{count}", title=tip))
    patches = [el("span", el("b", "■ ", cls=kind), meaning) for kind, meaning in meanings.items()]
    return el("div", *patches, cls="legend") + el("div", *pieces, cls="row")


def row_bar(view: View) -> str:
    """The packed row, this conversation first, and what is left over as padding."""
    documents = row_among_samples(view.encoder, view.inside, view.tiles)
    row: list[tuple[int, bool | None]] = [(len(d), bool(d.images)) for d in documents]
    left = row_length(len(documents[0])) - sum(map(len, documents))
    return drawn_rows([[*row, (left, None)] if left else row])


def expert_tables(view: View) -> str:
    """Which experts the answer's tokens took, and which the pictures' did."""
    inside = view.inside
    if inside.experts is None:
        return ""
    rows = {}
    kinds = {"answer": inside.places, "pictures": visual_places(inside, view.tokenizer.image)}
    for kind, places in kinds.items():
        if not len(places):
            continue
        for layer, shares in enumerate(expert_shares(inside, places)):
            rows[f"layer {layer}, {kind}"] = shares.tolist()
    names = [str(expert) for expert in range(inside.total_experts)]
    return heat(rows, names, 2 / inside.total_experts)


def inside_page(view: View, question: str) -> str:
    """The page as a string."""
    inside = view.inside
    numbers = [
        (str(len(inside.answer)), "tokens were said"),
        (f"{inside.chance.mean():.0%}", "mean chance of the chosen token"),
        (f"{inside.entropy.mean():.2f}", "nats, mean entropy"),
    ]
    if view.cuts:
        numbers.append((f"{view.shares.mean():.0%}", "of the attention went to pictures"))
    said = view.tokenizer.decode_answer(inside.answer.tolist())
    return html_page(
        f"Inside: {question}",
        el("h1", safe(question)),
        el("p", safe(said), cls="note"),
        facts(*numbers),
        section(
            "Where each token looked",
            "Bright: looked at most, when the token was chosen. Mean over heads and layers; the numbers "
            "are percent of its attention to pictures.",
            token_cards(view),
        ),
        section(
            "How the pictures were cut",
            "As they came, and what the model was shown.",
            cut_rows(view),
        ),
        section(
            "In a row",
            "The conversation's tokens, and the packed row that would hold it: its first rectangle. The "
            "others are samples of the drawn world.",
            conversation_bar(view),
            row_bar(view),
        ),
        section(
            "Experts",
            "Percent of a layer's choices; full colour: twice the even share.",
            expert_tables(view),
        ),
        style=STYLE + view_style(view),
    )


# ------------------------------------------------------------------------------------ one picture

LINE = 16  # pixels, of a line of text on the sheet
WIDE = 150  # pixels, of a card
COLUMNS = 6


def inside_picture(view: View, question: str) -> Image.Image:
    """The cards as one picture, row by row, below the question."""
    # all of one size, so many side by side
    cards = [picture_card(view, number) for number in range(len(view.words))]
    columns = min(COLUMNS, len(cards))
    height = max(card.height for card in cards)
    rows = -(-len(cards) // columns)
    top = LINE * 2

    # the question on top
    sheet = Image.new("RGB", (max(columns, 2) * WIDE, top + rows * height), "white")
    write(sheet, 0, 8, printable(question), 16)
    for number, card in enumerate(cards):
        row, column = divmod(number, columns)
        sheet.paste(card, (column * WIDE, top + row * height))
    return sheet


def picture_card(view: View, number: int) -> Image.Image:
    """A token: its text, how sure, and its pictures one below the other."""
    lines = [f"{view.words[number]}  {view.inside.chance[number]:.0%}"]
    lit = []
    if view.cuts:
        lines.append(f"{view.shares[number]:.0%} on pictures")
        lit = lit_pictures(view, view.by_cell[:, number].mean(0))

    # the lines, then the pictures
    height = LINE * len(lines) + sum(picture.height + 6 for picture in lit) + 10
    card = Image.new("RGB", (WIDE, height), "white")
    for place, text in enumerate(lines):
        write(card, 6, LINE * place, text, 13)
    at = LINE * len(lines)
    for picture in lit:
        card.paste(picture, (6, at))
        at += picture.height + 6
    return card


def lit_pictures(view: View, weights: Tensor) -> list[Image.Image]:
    """Every sheet at the width of a card, dark where the token did not look."""
    paid = weights.numpy()
    lit = []
    for sheet in view.sheets:
        picture = Image.fromarray(sheet.pixels)
        width = WIDE - 12
        size = (width, max(1, round(width * picture.height / picture.width)))
        cover = veil(paid[sheet.cells], float(paid.max())).convert("RGBA")
        picture = picture.resize(size, Image.Resampling.NEAREST).convert("RGBA")
        cover = cover.resize(size, Image.Resampling.NEAREST)
        lit.append(Image.alpha_composite(picture, cover).convert("RGB"))
    return lit


def write(picture: Image.Image, x: int, y: int, text: str, size: int) -> None:
    """A line of text. Pillow's own font has Latin letters; others become boxes."""
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(picture).text((x, y), text, fill="black", font=font)


# ----------------------------------------------------------------------------------- in a terminal


def inside_lines(view: View) -> list[str]:
    """A line per token: chance, entropy, how much it looked at pictures, and where most."""
    lines = ["chance  entropy  pictures  most at            token"]
    for number, text in enumerate(view.words):
        inside = view.inside
        share = f"{view.shares[number]:8.0%}" if view.cuts else " " * 8
        where = brightest_cell(view, number) if view.cuts else ""
        sure = f"{inside.chance[number]:6.0%}  {inside.entropy[number]:7.2f}"
        lines.append(f"{sure}  {share}  {where:17}  {text}")
    return lines


def brightest_cell(view: View, number: int) -> str:
    """`picture 2 row 1 col 3`: the cell that a token looked at most, counted from 1."""
    cell = int(view.by_cell[:, number].mean(0).argmax())
    for place, cut in enumerate(view.cuts, 1):
        for sheet in cut.sheets:
            found = np.argwhere(sheet.cells == cell)
            if len(found):
                row, column = found[0] + 1
                return f"{place}: row {row}, col {column}"
    raise AssertionError(f"visual token {cell} lies in no sheet")


# ------------------------------------------------------------------------------------------ writing


def check_page_path(path: Path) -> None:
    """Raises ValueError for a file that is neither .html nor .png."""
    if path.suffix.lower() not in (".html", ".png"):
        raise ValueError(f"{path}: where it looked is a page (.html) or a picture (.png)")


def write_view(path: Path, view: View, question: str) -> None:
    """Write the page (.html) or the picture (.png). Raises ValueError for any other ending."""
    check_page_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        inside_picture(view, question).save(path)
    else:
        path.write_text(inside_page(view, question), encoding="utf-8")
