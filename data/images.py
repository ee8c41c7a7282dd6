"""Pictures and videos: decoded safely, made RGB, and stacked for the ViT.

What it teaches: a picture from elsewhere is a program in the language of its decoder. So few
decoders are let near it, what its header promises is checked before a pixel is allocated (each
frame of an animation has a header of its own), and whatever goes wrong is a fault of that one
record. What is read is what the photographer saw: turned as the camera was held, transparent parts
on white, 16-bit greys scaled and not clipped.

    path, bytes --inside root?--> header: format, size --> pixels --> turned by EXIF --> RGB
    Video: folder, list, animation --> which frames? --> each as above, in order of time
    RGB --tiling.py--> tiles (H, W, 3) --stacked--> (N, 3, H, W) uint8 --vit.normalised--> float

Legend: N images, H x W pixels. Source: 16 frames of a video, drawn at random: the paper's
evaluation (Table 9); all limits are our choice.
Simplified: of the EXIF block only the orientation is read; colour profiles are ignored; video files
(MP4) are not decoded: extract their frames into a folder.
"""

import io
import random
import re
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Iterator

import numpy as np
import torch
from PIL import Image

from data.sample import BadSample, Video
from vit import normalised

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no other parser ever sees a user's file
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

MAX_FILE = 1 << 28  # bytes of a picture's file
MAX_PIXELS = 64_000_000  # of one picture
MAX_ASPECT = 200  # of the longer side to the shorter
MAX_VIDEO_PIXELS = 1 << 27  # of all frames that are taken: sixteen of 3840 x 2160
MAX_ANIMATION = 1 << 14  # frames that an animation may have
MAX_DECODED = 1 << 30  # pixels that are decoded on the way to the last frame that is taken

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---------------------------------------------------------------------------------- one picture


def open_image(source, root: Path | None = None, origin: str = "") -> Image.Image:
    """A picture as RGB; of an animation the first frame.

    source: a PIL image, a path (below `root`, if there is one) or a file's bytes. Raises BadSample
    for a path that leads out of `root` and for a file that is missing, foreign, damaged or too
    large, and nothing else.
    """
    if isinstance(source, Image.Image):
        if source.mode == "RGB":
            return source
        with faults_only("image in memory", origin):
            return to_rgb(source)
    with faults_only(source, origin), opened(source, root, origin) as image:
        return decode_image(image)


@contextmanager
def faults_only(source, origin: str) -> Iterator[None]:
    """Inside, every exception becomes a BadSample: a decoder can raise anything."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        raise BadSample.because(error, "unreadable image", f"{origin}: {brief(source)}") from error


@contextmanager
def opened(source, root: Path | None, origin: str) -> Iterator[Image.Image]:
    """The picture with its header read and its first frame's size checked; no pixels yet."""
    # a file in memory, or on disk and where it may be
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    else:
        path = path_inside(source, root, origin)
        if not path.is_file():
            raise BadSample("missing image", f"{origin}: no file {path}")
        if path.stat().st_size > MAX_FILE:
            raise BadSample("oversized image", f"{origin}: {path} has over {MAX_FILE} bytes")
        file = open(path, "rb")

    # Pillow reads no more than the header here
    with file, Image.open(file, formats=FORMATS) as image:
        check_pixels(image, f"{origin}: {brief(source)}")
        yield image


def brief(source) -> str:
    """A source in a message: bytes by their number."""
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)[:300]


def path_inside(source, root: Path | None, origin: str) -> Path:
    """The path of an image. Raises BadSample when it leads out of `root`: by `..`, by being
    absolute, or through a link."""
    if root is None:
        return Path(source)

    # links are followed before the two are compared
    path = Path(root, source)
    if path.resolve().is_relative_to(Path(root).resolve()):
        return path

    # Say how it leads out: a person's own link is the commonest case.
    below = [p for p in (path, *path.parents) if p.is_relative_to(root) and p != Path(root)]
    links = [p for p in below if p.is_symlink()]
    cause = f"{links[-1]} is a link to {links[-1].resolve()}" if links else f"not below {root}"
    raise BadSample(
        "path outside the image folder",
        f"{origin}: {source}: {cause}; --images can name another folder, --allow-outside opens all of them",
    )


def check_pixels(image: Image.Image, where: str, left: int = MAX_PIXELS) -> None:
    """Raises BadSample for a picture (or the frame it stands at) that would take too much memory, or
    is a mere line. left: of the pixels that a video may have."""
    width, height = image.size
    size = f"{where} is {width}x{height}"
    if width * height > MAX_PIXELS:
        raise BadSample("oversized image", f"{size}; the limit is {MAX_PIXELS} pixels")
    if width * height > left:
        raise BadSample("oversized image", f"{size}; the video has over {MAX_VIDEO_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("oversized image", f"{size}; a side is over {MAX_ASPECT} times the other")


def decode_image(image: Image.Image) -> Image.Image:
    """Pixels of the frame at which the picture stands, upright and RGB."""
    image.load()  # a PNG may state its orientation behind its pixels
    turn = TURNS.get(orientation(image))
    return to_rgb(image if turn is None else image.transpose(turn))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparent parts on white, 16-bit greys scaled."""
    if image.mode.startswith("I"):  # convert("RGB") would clip nearly all of them to white
        grey = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# ---------------------------------------------------------------------------------- orientation


def orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1 when nothing readable says it. Never raises: it is no
    reason to lose a picture."""
    found = orientation_in(image.info.get("exif"))

    # PNG and XMP have places of their own for it, which Pillow knows.
    if found is None:
        try:
            found = image.getexif().get(ORIENTATION)
        except Exception:
            return 1
    return found if isinstance(found, int) and found in TURNS else 1


def orientation_in(block) -> int | None:
    """The orientation that an EXIF block states. Its first directory alone is read, and of that one
    tag: the rest may be broken. Layout: byte order, 42, place of the directory; there a count, and
    12 bytes for each tag."""
    if not isinstance(block, bytes):
        return None
    block = block.removeprefix(b"Exif\0\0")

    # little or big endian, and where the directory begins
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return None
    (start,) = struct.unpack_from(order + "L", block, 4)
    if start + 2 > len(block):
        return None

    # tag by tag, as far as the block goes
    (count,) = struct.unpack_from(order + "H", block, start)
    for at in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", block, at)
        if tag == ORIENTATION and kind == 3:  # a 16-bit number, stored in place
            return struct.unpack_from(order + "H", block, at + 8)[0]
    return None


# ---------------------------------------------------------------------------------- videos


def frames_of(video: Video, root: Path | None, origin: str) -> list[Image.Image]:
    """The frames that are taken of a video, RGB, in order of time. Raises BadSample when there is
    none, or a bad one."""
    with faults_only(video.source, origin):
        source = video.source
        if isinstance(source, Path):
            source = listed_frames(source, root, origin)
        if isinstance(source, tuple):
            return frames_of_files(source, video, root, origin)
        return frames_of_animation(source, video, root, origin)


def stills_of(part: Any, root: Path | None, origin: str) -> list[Image.Image]:
    """A part of a message as pictures, RGB: a picture as one, a video as the frames that are taken of it.
    Raises BadSample as `open_image` and `frames_of` do."""
    if isinstance(part, Video):
        return frames_of(part, root, origin)
    return [open_image(part, root, origin)]


def listed_frames(source: Path, root: Path | None, origin: str) -> Path | tuple[Path, ...]:
    """The pictures in a folder in natural order, or the path itself when it is no folder."""
    folder = path_inside(source, root, origin)
    if not folder.is_dir():
        return source

    # hidden ones are macOS's, not the video's
    names = [p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES]
    seen = sorted((name for name in names if not name.startswith(".")), key=natural_key)
    return tuple(Path(source, name) for name in seen)


def natural_key(name: str) -> list:
    """frame_2 before frame_12: numbers in a name are compared as numbers."""
    pieces = re.split(r"([0-9]+)", name)
    return [int(piece) if i % 2 else piece.lower() for i, piece in enumerate(pieces)] + [name]


def frames_of_files(
    source: tuple, video: Video, root: Path | None, origin: str
) -> list[Image.Image]:
    if not source:
        raise BadSample("missing image", f"{origin}: a video without frames")

    # all frames that are taken share one budget of pixels
    left = MAX_VIDEO_PIXELS
    frames = []
    for i in chosen_frames(len(source), video, origin):
        one = source[i]
        if isinstance(one, Image.Image):
            frames.append(open_image(one))
            continue
        with opened(one, root, origin) as image:
            check_pixels(image, f"{origin}: with {brief(one)} the video", left)
            left -= image.width * image.height
            frames.append(decode_image(image))
    return frames


def frames_of_animation(source, video: Video, root: Path | None, origin: str) -> list[Image.Image]:
    """Frames of a GIF, WebP or PNG. All up to the last one that is taken must be decoded, so their
    number is limited."""
    where = f"{origin}: {brief(source)}"
    total = gif_frames(source, root, origin)
    with opened(source, root, origin) as image:
        total = total or getattr(image, "n_frames", 1)
        if total > MAX_ANIMATION:
            raise BadSample("oversized image", f"{where} has over {MAX_ANIMATION} frames")

        # budgets for what is kept, and for what is decoded on the way
        left = MAX_VIDEO_PIXELS
        decoded = 0
        wanted = chosen_frames(total, video, origin)
        frames = []
        for i in range(wanted[-1] + 1):
            # A frame may be larger than the one before: its own header decides, before its pixels.
            image.seek(i)
            check_pixels(image, f"{where}, frame {i}", left)
            pixels = image.width * image.height
            decoded += pixels
            if decoded > MAX_DECODED:
                raise BadSample(
                    "oversized image", f"{where} has over {MAX_DECODED} pixels to decode"
                )
            if i in wanted:
                left -= pixels
                frames.append(decode_image(image))
    return frames


def chosen_frames(n: int, video: Video, origin: str) -> list[int]:
    """Which of n frames are taken, rising. Raises BadSample for a rule that does not exist."""
    if n <= video.max_frames:
        return list(range(n))

    # too many: evenly spaced, or drawn by lot, where the lot is the record's place
    if video.sampling == "even":
        return evenly_spaced(n, video.max_frames)
    if video.sampling != "random":
        raise BadSample("malformed record", f"{origin}: frames {video.sampling!r}: random or even")
    rng = random.Random(zlib.crc32(origin.encode("utf-8", "replace")))
    return sorted(rng.sample(range(n), video.max_frames))


def evenly_spaced(n: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0..n-1, evenly spaced, the first and the last among them."""
    if n <= limit:
        return list(range(n))
    gap = (n - 1) / max(1, limit - 1)
    return [round(i * gap) for i in range(limit)]


def gif_frames(source, root: Path | None, origin: str) -> int:
    """How many frames a GIF has, by walking over its blocks without decoding; 0 when it is no GIF.

    Stops one above MAX_ANIMATION: Pillow's own count takes seconds for a million frames.
    """
    if isinstance(source, bytes):
        return count_gif_frames(io.BytesIO(source))
    path = path_inside(source, root, origin)
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        return count_gif_frames(file)


def count_gif_frames(file: BinaryIO) -> int:
    """GIF87a and GIF89a: a screen of 13 bytes, then blocks: `,` a frame, `!` an extension, `;` the end."""
    screen = file.read(13)
    if screen[:6] not in (b"GIF87a", b"GIF89a") or len(screen) < 13:
        return 0
    skip_palette(file, screen[10])

    # from block to block
    frames = 0
    while frames <= MAX_ANIMATION:
        kind = file.read(1)
        if kind == b",":
            header = file.read(9)
            if len(header) < 9:
                break
            skip_palette(file, header[8])
            frames += 1
        elif kind in (b"", b";"):
            break
        elif kind != b"!":  # Pillow passes over stray bytes as well
            continue
        file.read(1)  # size of the codes of a frame, label of an extension
        skip_blocks(file)
    return frames


def skip_palette(file: BinaryIO, flags: int) -> None:
    if flags & 128:
        file.seek(3 << (flags & 7) + 1, io.SEEK_CUR)


def skip_blocks(file: BinaryIO) -> None:
    """Data come in blocks of up to 255 bytes, each after its length; an empty one ends them."""
    while size := file.read(1):
        if size == b"\0":
            return
        file.seek(size[0], io.SEEK_CUR)


# ---------------------------------------------------------------------------------- for the ViT


def stacked(images: list[np.ndarray]) -> torch.Tensor | list[torch.Tensor]:
    """uint8 (H, W, 3) each -> (N, 3, H, W) uint8 when all are equal in size, else a list of (3,
    H_i, W_i). The ViT normalises them, where it runs: a byte a value is what travels."""
    # tiles: all of one size
    shapes = {image.shape for image in images}
    if len(shapes) == 1:
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (N, 3, H, W)

    # any resolution: each has its own
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]


def normalise(images: list[np.ndarray]) -> torch.Tensor | list[torch.Tensor]:
    """The same as floats, by `vit.normalised`."""
    pixels = stacked(images)
    if torch.is_tensor(pixels):
        return normalised(pixels)
    return [normalised(image) for image in pixels]
