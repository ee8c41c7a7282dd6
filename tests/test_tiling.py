"""The tiler: the released one's grids and pixels, the second pass, many images, video, any resolution."""

import hashlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from data.encode import Encoder
from data.sample import Message, Sample
from data.tiling import MAX_PATCHES, cut_tiles, fit_to_patches, grid_for, grids, second_grid, tiles
from vlm import PRESETS

RELEASED = SHARED / "released"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released files are not here")


def chart(w, h):
    """The test image of tiling.json: pixel (x, y) is (x*255//(w-1), y*255//(h-1), (x+y)%256)."""
    x, y = np.arange(w)[None], np.arange(h)[:, None]
    parts = np.broadcast_arrays(x * 255 // (w - 1), y * 255 // (h - 1), (x + y) % 256)
    return Image.fromarray(np.stack(parts, -1).astype(np.uint8))


@released
def test_the_tiler_cuts_what_the_released_tiler_cuts():
    entries, seen = json.loads((RELEASED / "tiling.json").read_text()), 0
    pictures = {size: chart(*size) for size in {(e["width"], e["height"]) for e in entries}}
    for e in entries:
        w, h, side = e["width"], e["height"], e["image_size"]
        assert grid_for(w, h, e["max_num"], side) == (e["grid_cols"], e["grid_rows"]), e
        if side > 28:  # no hashes there; the number of tiles follows from the grid
            columns, rows = e["grid_cols"], e["grid_rows"]
            assert columns * rows + (columns * rows > 1) == e["tiles"], e
            continue
        cut = tiles(pictures[w, h], e["max_num"], side)
        assert [hashlib.sha256(t.tobytes()).hexdigest()[:16] for t in cut] == e["sha256"] and len(
            cut
        ) == e["tiles"], e
        seen += 1
    assert seen == 56 and len(entries) == 112


def test_a_thumbnail_comes_last_when_wanted_and_only_beside_several_tiles():
    wide, square = chart(200, 100), chart(50, 50)
    assert len(tiles(square, 10, 28)) > 1 and len(tiles(square, 1, 28)) == 1
    with_it, without = tiles(wide, 2, 28), tiles(wide, 2, 28, thumbnail=False)
    assert [t.tobytes() for t in with_it[:-1]] == [t.tobytes() for t in without]
    assert with_it[-1].tobytes() == wide.resize((28, 28)).tobytes()


def test_between_grids_of_one_shape_the_larger_is_taken_when_the_image_fills_over_half_of_it():
    assert grid_for(45, 45, 4, 32) == (1, 1)  # 2025 pixels of 2 * 2 * 32 * 32 = 4096
    assert grid_for(46, 46, 4, 32) == (2, 2)  # 2116


def bits(images):
    return [i.tobytes() for i in images]


@pytest.mark.parametrize(
    "size, first, second",
    [
        ((200, 100), (4, 2), (5, 2)),
        ((100, 100), (3, 3), (2, 2)),
        ((300, 200), (3, 2), (3, 3)),
        ((30, 30), (1, 1), (2, 2)),
        ((90, 30), (3, 1), (5, 2)),
    ],
)
def test_the_second_pass_takes_the_nearest_grid_that_does_not_divide_the_first(size, first, second):
    side, most = 28, 10
    assert grid_for(*size, most, side) == first and second_grid(*size, first, most, side) == second
    image = chart(*size)
    once, twice = tiles(image, most, side), tiles(image, most, side, msac=True)
    assert bits(twice) == bits(
        once[:-1] + cut_tiles(image, second, side) + once[-1:]
    )  # the whole image stays last
    assert twice[-1].tobytes() == image.resize((side, side)).tobytes()


def test_a_second_grid_never_divides_the_first_and_no_other_is_nearer():
    rng = random.Random(0)
    for _ in range(300):
        w, h, most = rng.randint(10, 900), rng.randint(10, 900), rng.randint(2, 12)
        first = grid_for(w, h, most, 28)
        i, j = second_grid(w, h, first, most, 28)
        assert first[0] % i or first[1] % j
        gap = abs(w / h - i / j)
        assert all(
            gap <= abs(w / h - a / b) for a, b in grids(most) if first[0] % a or first[1] % b
        )
    assert second_grid(100, 100, (1, 1), 1, 28) == (
        1,
        1,
    )  # no other grid: the whole image again, as in the released code


def sample(*sizes, words=""):
    parts = [p for n, size in enumerate(sizes) for p in (words.format(n + 1), chart(*size)) if p]
    return Sample((Message("user", (*parts, "what?")),))


@pytest.fixture(scope="module")
def config():
    c = PRESETS["toy"]
    return replace(c, vision=replace(c.vision, image_size=32, patch_size=8), max_tiles=10)


def tokens_of(tokenizer, config, *sizes, words=""):
    arrays, counts = Encoder(tokenizer, config).images(sample(*sizes, words=words))
    per = (config.vision.image_size // config.vision.patch_size // 2) ** 2
    assert sum(counts) == per * len(arrays) and all(a.shape == (32, 32, 3) for a in arrays)
    return [n // per for n in counts]


def test_several_images_share_64_tiles_and_get_no_second_pass(tokenizer, config):
    wide = (320, 160)  # 4 x 2 tiles and a thumbnail of at most 10
    assert (
        tokens_of(tokenizer, config, wide) == [9]
        and tokens_of(tokenizer, config, *[wide] * 6) == [9] * 6
    )
    assert (
        tokens_of(tokenizer, config, *[wide] * 16) == [3] * 16
    )  # at most 64 // 16 = 4 tiles: 2 x 1
    assert tokens_of(tokenizer, config, *[wide] * 70) == [1] * 70
    msac = replace(config, msac=True)
    assert tokens_of(tokenizer, msac, wide) == [8 + 10 + 1] and tokens_of(
        tokenizer, msac, wide, wide
    ) == [9, 9]


def test_a_frame_of_a_video_is_one_tile(tokenizer, config):
    wide = (320, 160)
    assert tokens_of(tokenizer, config, *[wide] * 3, words="Frame-{}: ") == [1] * 3
    assert tokens_of(tokenizer, config, *[wide] * 3, words="Image-{}: ") == [9] * 3


def test_any_resolution_keeps_shape_in_whole_units_within_the_limit():
    assert fit_to_patches(Image.new("RGB", (1792, 1792)), 28, MAX_PATCHES, 14).size == (1792, 1792)
    assert fit_to_patches(Image.new("RGB", (4000, 4000)), 28, MAX_PATCHES, 14).size == (1792, 1792)
    rng = random.Random(1)
    for _ in range(40):
        w, h = rng.randint(1, 6000), rng.randint(1, 6000)
        a, b = fit_to_patches(Image.new("L", (w, h)), 28, MAX_PATCHES, 14).size
        assert a % 28 == b % 28 == 0 and 0 < a * b <= MAX_PATCHES * 14 * 14
        scale = min(1, (MAX_PATCHES * 196 / (w * h)) ** 0.5)
        for new, old in ((a, w * scale), (b, h * scale)):
            assert abs(new - max(28, old)) <= (
                14 if w * h < 2e6 else 3 * 28
            )  # rounding; what the limit takes from the longer side
    small = Image.new("RGB", (56, 84))
    assert fit_to_patches(small, 28, MAX_PATCHES, 14) is small
