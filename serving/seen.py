"""What `inside: true` adds to a reply: where each token of the answer looked, as JSON for the page.

What it teaches: numbers about a picture are useless without the picture as the model had it. So the tiles
go along, and for each the numbers of its cells; a token's `cells` are in the order of those numbers.

    {"tokens":   [{"text": "red", "chance": 0.98, "entropy": 0.1, "likeliest": [["red", 0.98], ...],
                   "looked": 0.4, "cells": [0.01, 0.2, ...]}, ...],
     "pictures": [{"note": "...", "sheets": [{"title": "...", "image": "data:...", "cells": [[0, 1], ...]}]}],
     "experts":  [[0.5, 0.5, ...], ...]}                      by layer; null for a dense model

Attention is the mean over heads and layers; talk/inside.py says how it is found, and what it is not.
"""

from PIL import Image

from talk.inside import CutPicture, Inside, expert_shares, visual_places
from talk.page import data_uri
from tokenizer import Tokenizer


def inside_json(inside: Inside, cuts: list[CutPicture], tokenizer: Tokenizer) -> dict:
    """An answer seen from inside, and the pictures of its question."""
    attention = inside.attention.mean(0)  # (n, S)
    cells = attention[:, visual_places(inside, tokenizer.image)]  # (n, visual tokens)

    # a token, what it was chosen from, and where it looked
    tokens = []
    for i, token in enumerate(inside.answer.tolist()):
        others = zip(inside.likeliest[i].tolist(), inside.chances[i].tolist())
        tokens.append(
            {
                "text": tokenizer.decode([token]),
                "chance": round(float(inside.chance[i]), 4),
                "entropy": round(float(inside.entropy[i]), 4),
                "likeliest": [[tokenizer.decode([other]), round(p, 4)] for other, p in others],
                "looked": round(float(cells[i].sum()), 4),
                "cells": [round(share, 5) for share in cells[i].tolist()],
            }
        )

    experts = None
    if inside.experts is not None:
        experts = expert_shares(inside, inside.places).tolist()
    return {"tokens": tokens, "pictures": [picture_json(cut) for cut in cuts], "experts": experts}


def picture_json(cut: CutPicture) -> dict:
    """A picture as the model had it: its sheets of tiles, and the number of each cell."""
    sheets = []
    for sheet in cut.sheets:
        image = data_uri(Image.fromarray(sheet.pixels))
        sheets.append({"title": sheet.title, "image": image, "cells": sheet.cells.tolist()})
    return {"note": cut.note, "sheets": sheets}
