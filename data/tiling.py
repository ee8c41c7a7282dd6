"""From an image of any size to what the ViT takes: square tiles, or the image itself at a size made of whole patches.

What it teaches: two answers to "my encoder was trained at 448 x 448". Fixed resolution cuts the image into a grid of tiles of
that size, chosen by aspect ratio, and adds the whole image once more, small, for the view that tiles lose. Any resolution keeps
the image whole and lets the encoder stretch its positions (vit.py).

    photo 1000 x 700, at most 10 tiles of 448:        any resolution, merge unit 28:
        grid 3 x 2 -> 6 tiles + thumbnail                 1008 x 700 pixels = 72 x 50 patches
        7 x 256 = 1792 visual tokens                      72 x 50 / 4 = 900 visual tokens

Source: the released image processor, which this follows bit for bit (grid and pixels), and the team's evaluation code for
many images and video. Images are PIL's, sizes (width, height), grids (columns, rows).
"""

import math

from PIL import Image

MAX_PATCHES = (
    16384  # of one image at any resolution: 1792 x 1792 pixels in patches of 14 (paper, section 5)
)
MAX_TILES = 64  # of all images of a sample


def grids(max_tiles: int, min_tiles: int = 1) -> list[tuple[int, int]]:
    """All (columns, rows) of at least `min_tiles` and at most `max_tiles` tiles, few tiles first."""
    return sorted(
        {
            (i, j)
            for n in range(min_tiles, max_tiles + 1)
            for i in range(1, n + 1)
            for j in range(1, n + 1)
            if min_tiles <= i * j <= max_tiles
        },
        key=lambda g: g[0] * g[1],
    )


def nearest(
    width: int, height: int, candidates: list[tuple[int, int]], tile: int
) -> tuple[int, int]:
    """The grid of the nearest aspect ratio; on a tie the larger one, if the image has over half its pixels. (1, 1) of none."""
    best, gap = (1, 1), math.inf
    for i, j in candidates:
        difference = abs(width / height - i / j)
        if difference < gap:
            best, gap = (i, j), difference
        elif difference == gap and width * height > 0.5 * tile * tile * i * j:
            best = (i, j)
    return best


def grid_for(
    width: int, height: int, max_tiles: int, tile: int, min_tiles: int = 1
) -> tuple[int, int]:
    """(columns, rows) of tiles, as the released tiler chooses among all grids of at most `max_tiles`."""
    return nearest(width, height, grids(max_tiles, min_tiles), tile)


def second_grid(
    width: int, height: int, first: tuple[int, int], max_tiles: int, tile: int, min_tiles: int = 1
) -> tuple[int, int]:
    """The grid of the second pass: the nearest of those that do not divide the first one, so that new edges are cut."""
    others = [(i, j) for i, j in grids(max_tiles, min_tiles) if first[0] % i or first[1] % j]
    return nearest(width, height, others, tile)


def cut(image: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """The image resized (bicubic) to a grid of square tiles, row by row."""
    columns, rows = grid
    big = image.resize((columns * tile, rows * tile))
    return [
        big.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile))
        for y in range(rows)
        for x in range(columns)
    ]


def tiles(
    image: Image.Image,
    max_tiles: int,
    tile: int,
    thumbnail: bool = True,
    min_tiles: int = 1,
    msac: bool = False,
) -> list[Image.Image]:
    """Fixed resolution: the tiles of the image, and the whole image as a last thumbnail when there is more than one.

    msac: the tiles of a second grid go between the first ones and the last image (twice the tokens; off by default in the
    released processor, on in the team's evaluation). Of a single tile, that tile stays last, as in the released code.
    """
    grid = grid_for(*image.size, max_tiles, tile, min_tiles)
    first = cut(image, grid, tile)
    if thumbnail and len(first) > 1:
        first.append(image.resize((tile, tile)))
    if not msac:
        return first
    return (
        first[:-1]
        + cut(image, second_grid(*image.size, grid, max_tiles, tile, min_tiles), tile)
        + first[-1:]
    )


def fit_to_patches(image: Image.Image, unit: int, max_patches: int, patch: int) -> Image.Image:
    """Any resolution: keep the aspect ratio, round each side to the merge unit (2 patches), stay within `max_patches`.
    The rounding rule is our choice; the limit is the paper's."""
    w, h = image.size
    scale = min(1.0, math.sqrt(max_patches * patch * patch / (w * h)))
    sides = [max(unit, round(s * scale / unit) * unit) for s in (w, h)]
    while sides[0] * sides[1] > max_patches * patch * patch:
        sides[sides.index(max(sides))] -= unit
    return image if tuple(sides) == image.size else image.resize(tuple(sides), Image.BICUBIC)


def tiles_of(image: Image.Image, config, images: int = 1, video: bool = False) -> list[Image.Image]:
    """One image of a sample as the ViT takes it, in order: the rules of the released code. config: a VLMConfig.

    images: how many the sample has. Several share 64 tiles (up to 6 images this changes nothing; the released processor alone
    gives each the full number, which runs past the context) and get no second pass. A frame of a video is one tile.
    """
    patch = config.vision.patch_size
    if config.any_resolution:
        return [fit_to_patches(image, 2 * patch, MAX_PATCHES, patch)]
    most = 1 if video else max(1, min(config.max_tiles, MAX_TILES // images))
    return tiles(
        image,
        most,
        config.vision.image_size,
        config.thumbnail,
        min(config.min_tiles, most),
        config.msac and images == 1,
    )
