"""From an image of any size to what the ViT takes: square tiles, or one image of whole patches.

What it teaches: two answers to "my encoder was trained at 448 x 448". Fixed resolution cuts the
image into a grid of tiles of that size, chosen by aspect ratio, and adds the whole image once more,
small, for the view that tiles lose. Any resolution keeps the image whole and lets the encoder
stretch its positions (vit.py).

    photo 1000 x 700, at most 10 tiles of 448:        any resolution, merge unit 28:
        grid 3 x 2 -> 6 tiles + thumbnail                 1008 x 700 pixels = 72 x 50 patches
        7 x 256 = 1792 visual tokens                      72 x 50 / 4 = 900 visual tokens

Legend: sizes are (width, height), grids (columns, rows), images PIL's. Source: the released image
processor, which this follows bit for bit (grid and pixels), and the team's evaluation code for many
images and video.
"""

import math

from PIL import Image

# of one image at any resolution: 1792 x 1792 pixels in patches of 14 (paper, section 5)
MAX_PATCHES = 16384
MAX_TILES = 64  # of all images of a sample


# ----------------------------------------------------------------------------------------- which grid


def grids(max_tiles: int, min_tiles: int = 1) -> list[tuple[int, int]]:
    """All (columns, rows) of at least `min_tiles` and at most `max_tiles` tiles, few tiles first."""
    found = set()
    for n in range(min_tiles, max_tiles + 1):
        for columns in range(1, n + 1):
            for rows in range(1, n + 1):
                if min_tiles <= columns * rows <= max_tiles:
                    found.add((columns, rows))
    # The order of equally large grids decides ties below, and the released code leaves it to the set.
    return sorted(found, key=lambda grid: grid[0] * grid[1])


def nearest_grid(
    width: int, height: int, candidates: list[tuple[int, int]], tile: int
) -> tuple[int, int]:
    """The grid of the nearest aspect ratio; on a tie the larger one, if the image has over half its pixels.

    (1, 1) when there is none to choose from.
    """
    best = (1, 1)
    smallest = math.inf
    for columns, rows in candidates:
        difference = abs(width / height - columns / rows)
        if difference < smallest:
            best = (columns, rows)
            smallest = difference
        elif difference == smallest and width * height > 0.5 * tile * tile * columns * rows:
            best = (columns, rows)
    return best


def grid_for(
    width: int, height: int, max_tiles: int, tile: int, min_tiles: int = 1
) -> tuple[int, int]:
    """(columns, rows) of tiles, as the released tiler chooses among all grids of at most `max_tiles`."""
    return nearest_grid(width, height, grids(max_tiles, min_tiles), tile)


def second_grid(
    width: int, height: int, first: tuple[int, int], max_tiles: int, tile: int, min_tiles: int = 1
) -> tuple[int, int]:
    """The grid of the second pass: the nearest of those that do not divide the first one, so that
    new edges are cut."""
    others = []
    for columns, rows in grids(max_tiles, min_tiles):
        if first[0] % columns or first[1] % rows:
            others.append((columns, rows))
    return nearest_grid(width, height, others, tile)


# ---------------------------------------------------------------------------------- fixed resolution


def cut_tiles(image: Image.Image, grid: tuple[int, int], tile: int) -> list[Image.Image]:
    """The image resized (bicubic) to a grid of square tiles, row by row."""
    columns, rows = grid
    whole = image.resize((columns * tile, rows * tile))
    pieces = []
    for top in range(0, rows * tile, tile):
        for left in range(0, columns * tile, tile):
            pieces.append(whole.crop((left, top, left + tile, top + tile)))
    return pieces


def tiles(
    image: Image.Image,
    max_tiles: int,
    tile: int,
    thumbnail: bool = True,
    min_tiles: int = 1,
    msac: bool = False,
) -> list[Image.Image]:
    """The tiles of the image, and the whole image as a last thumbnail when there is more than one.

    msac: the tiles of a second grid go between the first ones and the last image (twice the tokens;
    off by default in the released processor, on in the team's evaluation). Of a single tile, that
    tile stays last, as in the released code.
    """
    grid = grid_for(*image.size, max_tiles, tile, min_tiles)
    first = cut_tiles(image, grid, tile)
    if thumbnail and len(first) > 1:
        first.append(image.resize((tile, tile)))
    if not msac:
        return first

    other = second_grid(*image.size, grid, max_tiles, tile, min_tiles)
    second = cut_tiles(image, other, tile)
    return first[:-1] + second + first[-1:]


# ------------------------------------------------------------------------------------ any resolution


def fit_to_patches(image: Image.Image, unit: int, max_patches: int, patch: int) -> Image.Image:
    """Keep the aspect ratio, round each side to the merge unit (2 patches), stay within `max_patches`.

    The rounding rule is our choice; the limit is the paper's.
    """
    limit = max_patches * patch * patch  # pixels
    width, height = image.size
    scale = min(1.0, math.sqrt(limit / (width * height)))
    width = max(unit, round(width * scale / unit) * unit)
    height = max(unit, round(height * scale / unit) * unit)

    # Rounding up may have gone over the limit: the longer side gives way.
    while width * height > limit:
        if width >= height:
            width -= unit
        else:
            height -= unit
    size = (width, height)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


# --------------------------------------------------------------------------------- what a model takes


def tiles_of(image: Image.Image, config, images: int = 1, video: bool = False) -> list[Image.Image]:
    """One image of a sample as the ViT takes it, in order: the rules of the released code.

    config: a VLMConfig. images: how many the sample has. Several share 64 tiles (up to 6 images
    this changes nothing; the released processor alone gives each the full number, which runs past
    the context) and get no second pass. A frame of a video is one tile.
    """
    patch = config.vision.patch_size
    if config.any_resolution:
        return [fit_to_patches(image, 2 * patch, MAX_PATCHES, patch)]

    share = max(1, min(config.max_tiles, MAX_TILES // images))
    max_tiles = 1 if video else share
    return tiles(
        image,
        max_tiles,
        config.vision.image_size,
        config.thumbnail,
        min(config.min_tiles, max_tiles),
        config.msac and images == 1,
    )
