"""Pictures and videos: decoded safely, made RGB, and normalised for the ViT.

Legend: H x W pixels.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data.sample import BadSample, Video

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no other parser ever sees a user's file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

MAX_PIXELS, MAX_ASPECT = 64_000_000, 200

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, as in the released preprocessor


def path_inside(source, root: Path | None, origin: str) -> Path:
    """The path of an image. Raises BadSample when it leads out of `root`: by `..`, by being absolute, or through a link."""
    path = Path(root, source) if root is not None else Path(source)
    if root is not None and not path.resolve().is_relative_to(Path(root).resolve()):
        raise BadSample("path outside the image folder", f"{origin}: {source}")
    return path


def decoded(source, root: Path | None, origin: str, most: int = 1) -> list[Image.Image]:
    """Up to `most` evenly spaced frames of an image file (a path, or the file's bytes), as RGB.

    Raises BadSample for a missing, foreign, truncated or oversized file, or a path that leads out of `root`.
    """
    try:
        name = (
            f"{len(source)} bytes"
            if isinstance(source, bytes)
            else path_inside(source, root, origin)
        )
        if not isinstance(source, bytes) and not name.is_file():
            raise BadSample("missing image", f"{origin}: no file {name}")
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else name, formats=FORMATS
        ) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or max(w, h) > MAX_ASPECT * min(w, h):
                raise BadSample("oversized image", f"{origin}: {name} is {w}x{h}")
            frames = []
            for i in evenly_spaced(getattr(image, "n_frames", 1), most):
                if i:
                    image.seek(i)
                image.load()
                frames.append(to_rgb(ImageOps.exif_transpose(image)))
            return frames
    except BadSample:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        RuntimeError,
        Image.DecompressionBombError,
    ) as e:  # RuntimeError: a link to itself
        raise BadSample("unreadable image", f"{origin}: {source!r:.200}: {e}") from e


def open_image(source, root: Path | None = None, origin: str = "") -> Image.Image:
    """An RGB image (the first frame of an animation). Transparency goes on white, EXIF rotation is applied, 16-bit greys are
    scaled, not clipped. Raises BadSample as `decoded` does."""
    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" else to_rgb(source)
    return decoded(source, root, origin)[0]


def frames_of(video: Video, root: Path | None, origin: str) -> list[Image.Image]:
    """Raises BadSample when there is no frame, or a bad one."""
    source = video.source
    try:
        if isinstance(source, Path) and (folder := path_inside(source, root, origin)).is_dir():
            source = tuple(
                Path(source, p.name)
                for p in sorted(folder.iterdir())
                if p.suffix.lower() in SUFFIXES
            )
    except (OSError, ValueError, RuntimeError) as e:
        raise BadSample("unreadable image", f"{origin}: {source!r:.200}: {e}") from e
    if not isinstance(source, tuple):
        return decoded(source, root, origin, video.most)
    if not source:
        raise BadSample("missing image", f"{origin}: a video without frames")
    return [open_image(source[i], root, origin) for i in evenly_spaced(len(source), video.most)]


def evenly_spaced(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0..n-1, evenly spaced, the first and the last among them."""
    return (
        list(range(n))
        if n <= most
        else [round(i * (n - 1) / max(1, most - 1)) for i in range(most)]
    )


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(
        "I"
    ):  # 16 bits per pixel: convert("RGB") would clip nearly all of them to white
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def normalise(images: list[np.ndarray]) -> torch.Tensor | list[torch.Tensor]:
    """uint8 (H, W, 3) each -> (N, 3, H, W) float when all are equal in size, else a list of (3, H_i, W_i)."""
    mean, std = torch.tensor(MEAN)[:, None, None] * 255, torch.tensor(STD)[:, None, None] * 255
    if len({i.shape for i in images}) == 1:
        return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() - mean) / std
    return [(torch.from_numpy(i.copy()).permute(2, 0, 1).float() - mean) / std for i in images]
