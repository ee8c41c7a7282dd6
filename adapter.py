"""The adapter: from vision features to tokens of the language model.

What it teaches: four neighbouring patches become one visual token (2x2 pixel shuffle), and a
LayerNorm and a two-layer MLP carry it into the language model's width. It is the only part of a VLM
that starts from noise, which is why the first stages train it alone.

    patches (S, C) --pixel_shuffle--> (T, 4C) --LayerNorm, Linear, GELU, Linear--> visual tokens (T, M)

    a b | c d        one image of 2 x 4 patches: its visual tokens are
    e f | g h        (a b e f) and (c d g h)

Legend: S patches of all images end to end, C vision width, T = S / 4 visual tokens, M language-model
width. Source: SAIL-VL2 section 2.1; the released `mlp1`, whose child names ("0", "1", "3") are kept.
"""

import torch
import torch.nn as nn
from torch import Tensor


def pixel_shuffle(x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """Patches (S, C) of images with (h, w) patch grids -> (S / 4, 4C), cells in reading order.

    Cell (i, j) holds patches (2i, 2j), (2i, 2j + 1), (2i + 1, 2j), (2i + 1, 2j + 1), in that order.
    Raises ValueError when a grid has an odd side.
    """
    # Half a cell has no place to go.
    for h, w in grids:
        if h % 2 or w % 2:
            raise ValueError(f"the 2x2 merge wants even patch grids, got {(h, w)}")

    # Equal images: one reshape for all of them.
    if len(set(grids)) == 1:
        return merge_cells(x, len(grids), *grids[0])

    # Images of several sizes: each by itself.
    merged = []
    sizes = [h * w for h, w in grids]
    for patches, (h, w) in zip(x.split(sizes), grids):
        merged.append(merge_cells(patches, 1, h, w))
    return torch.cat(merged)


def merge_cells(x: Tensor, images: int, h: int, w: int) -> Tensor:
    """(images * h * w, C) -> (images * h/2 * w/2, 4C)."""
    # Axes: image, row of cells, row in the cell, column of cells, column in the cell, C.
    cells = x.view(images, h // 2, 2, w // 2, 2, -1)

    # The cell's own two axes side by side.
    cells = cells.transpose(2, 3)
    return cells.reshape(images * h * w // 4, -1)


class Adapter(nn.Sequential):
    """LayerNorm(4C) -> Linear(4C, M) -> GELU -> Linear(M, M). Call with patch features and grids."""

    def __init__(self, vision_width: int, text_width: int):
        super().__init__(
            nn.LayerNorm(4 * vision_width),
            nn.Linear(4 * vision_width, text_width),
            nn.GELU(),
            nn.Linear(text_width, text_width),
        )

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """(S, C) -> (S / 4, M)."""
        return super().forward(pixel_shuffle(x, grids))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, scale: float = 1.0) -> None:
        """Fan-in. scale: size of the output, that of the text embeddings it will sit among."""
        norm, first, _, last = self
        norm.weight.fill_(1.0)
        norm.bias.zero_()
        first.weight.normal_(0.0, first.in_features**-0.5, generator=generator)
        first.bias.zero_()
        last.weight.normal_(0.0, scale * last.in_features**-0.5, generator=generator)
        last.bias.zero_()
