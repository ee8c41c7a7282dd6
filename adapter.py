"""The adapter: from vision features to tokens of the language model.

What it teaches: four neighbouring patches become one visual token (2x2 pixel shuffle), and a LayerNorm and a two-layer
MLP carry it into the language model's width. It is the only part of a VLM that starts from noise, which is why the first
stages train it alone. Source: SAIL-VL2 section 2.1; the released `mlp1`, whose child names ("0", "1", "3") are kept.

Legend: S patches of all images end to end, C vision width, T = S / 4 visual tokens, M language-model width.
"""

import torch
import torch.nn as nn
from torch import Tensor


def pixel_shuffle(x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """(S, C) -> (S/4, 4C): cell (i, j) holds patches (2i,2j), (2i,2j+1), (2i+1,2j), (2i+1,2j+1), in that order.

    Raises ValueError when a grid has an odd side.
    """
    if any(h % 2 or w % 2 for h, w in grids):
        raise ValueError(
            f"the 2x2 merge wants even patch grids, got {[g for g in grids if g[0] % 2 or g[1] % 2][0]}"
        )

    def merge(part: Tensor, n: int, h: int, w: int) -> Tensor:
        return part.view(n, h // 2, 2, w // 2, 2, -1).transpose(2, 3).reshape(n * h * w // 4, -1)

    if len(set(grids)) == 1:  # equal images: one reshape for all
        return merge(x, len(grids), *grids[0])
    return torch.cat(
        [merge(part, 1, h, w) for part, (h, w) in zip(x.split([h * w for h, w in grids]), grids)]
    )


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
        return super().forward(pixel_shuffle(x, grids))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, scale: float = 1.0) -> None:
        """Fan-in. `scale` sets the size of the output beside the text embeddings that it will sit among."""
        for layer, gain in ((self[1], 1.0), (self[3], scale)):
            layer.weight.normal_(0.0, gain * layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        self[0].weight.fill_(1.0)
        self[0].bias.zero_()
