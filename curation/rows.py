"""Samples as rows of our own format: what a curation command writes, any other command reads.

What it teaches: a pipeline of files stays simple when every step writes what the first step could
have read. A row is a line of JSON that `data.readers` knows: messages, the images that their marks
stand for, and facts for grading.

    {"messages": [{"role": "user", "content": "<image>how many?"}, {"role": "assistant", "content": "3"}],
     "images": ["photos/17.jpg"], "facts": {"answer": "3", "pass_rate": 0.5}, "task": "counting"}

Image paths are relative to the file, and a reader opens nothing outside the file's folder. So a
picture that lies elsewhere, or inside a container, is put beside the file: linked if that costs
nothing, else copied, under a name that is a hash, so that no picture is stored twice.

    hard.jsonl
    hard.images/1f0c6f....png

Simplified: `max_tiles`, which belongs to a data set and not to a sample, is not written: a mixture
file can name it again.
"""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable

from PIL import Image

from data.images import FORMATS, SUFFIXES, path_inside
from data.sample import BadSample, Faults, Message, Sample, Video

MARKS = ("<image>", "<video>")


class RowWriter:
    """Writes rows to a file that appears whole, or not at all.

    with RowWriter(path) as rows:
        rows.write(sample, pass_rate=0.5)
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.folder = self.path.parent.resolve()
        self.pictures = self.path.with_suffix(".images")
        self.unfinished = self.path.with_name(self.path.name + ".part")
        self.written = 0

    def __enter__(self) -> "RowWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # (a half of a character, as JSON can have, is written as its escape)
        self.file = open(self.unfinished, "w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, kind, *_) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.unfinished, self.path)
        else:
            self.unfinished.unlink()

    def write(self, sample: Sample, **facts: Any) -> None:
        """One more row; `facts` are added to the sample's. Raises BadSample for a picture that is gone."""
        row = self.row(sample)
        row["facts"] = sample.facts | facts
        self.file.write(json.dumps(row, ensure_ascii=False, default=as_json) + "\n")
        self.written += 1

    def row(self, sample: Sample) -> dict:
        """A sample as messages and what their marks stand for."""
        # A mark for each picture, in the order of the lists below.
        images: list[str] = []
        videos: list[str | list[str]] = []
        messages = []
        for message in sample.messages:
            content = ""
            for part in message.parts:
                if isinstance(part, str):
                    content += without_marks(part) if message.role == "user" else part
                elif isinstance(part, Video):
                    content += "<video>"
                    videos.append(self.video_path(part, sample))
                else:
                    content += "<image>"
                    images.append(self.image_path(part, sample))
            messages.append(turn_of(message, content))

        # Only what there is.
        row = {"messages": messages}
        if images:
            row["images"] = images
        if videos:
            row["videos"] = videos
        if sample.task:
            row["task"] = sample.task
        row["origin"] = sample.origin
        return row

    # ------------------------------------------------------------------------------------ pictures

    def video_path(self, video: Video, sample: Sample) -> str | list[str]:
        """A list of frames, or the path of the file or folder that holds them."""
        # Frames one by one, or a file with all of them.
        if isinstance(video.source, tuple):
            return [self.image_path(frame, sample) for frame in video.source]
        if not isinstance(video.source, Path):
            return self.image_path(video.source, sample)

        # A folder of frames is one if it is inside; elsewhere its frames are put beside the file.
        source = located(video.source, sample)
        if not source.is_dir():
            return self.image_path(video.source, sample)
        if source.is_relative_to(self.folder):
            return source.relative_to(self.folder).as_posix()
        frames = [path for path in sorted(source.iterdir()) if path.suffix.lower() in SUFFIXES]
        return [self.image_path(path, sample) for path in frames]

    def image_path(self, picture: Any, sample: Sample) -> str:
        """The path of a picture relative to the file, which has it beside it from now on."""
        # In memory, drawn or out of a container: beside the rows.
        if isinstance(picture, Image.Image):
            picture = png_bytes(picture)
        if isinstance(picture, bytes):
            suffix = suffix_of(picture, sample)
            beside = self.pictures / (hashed(picture) + suffix)
            if not beside.exists():
                self.pictures.mkdir(exist_ok=True)
                appear(beside, lambda place: place.write_bytes(picture))
            return self.relative(beside)

        # A file: where it is, when that is inside the folder.
        source = located(picture, sample)
        if not source.is_file():
            raise BadSample("missing image", f"{sample.origin}: no file {source}")
        if source.is_relative_to(self.folder):
            return source.relative_to(self.folder).as_posix()

        # Else beside the rows. A hard link is a second name, not a way out of the folder.
        beside = self.pictures / (hashed(str(source).encode()) + source.suffix.lower())
        if not beside.exists():
            self.pictures.mkdir(exist_ok=True)
            try:
                os.link(source, beside)
            except OSError:
                appear(beside, lambda place: shutil.copyfile(source, place))
        return self.relative(beside)

    def relative(self, path: Path) -> str:
        return path.relative_to(self.path.parent).as_posix()


def as_json(value: Any) -> Any:
    """A fact that JSON has no form for: a number of numpy or torch as a number, all else as its text."""
    single = getattr(value, "item", None)
    try:
        return single() if single else str(value)
    except (RuntimeError, ValueError):
        return str(value)  # an array


def appear(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is whole when it is there: a kill leaves no half of a picture under its name."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(unfinished)
    os.replace(unfinished, path)


def turn_of(message: Message, content: str) -> dict:
    """A message as JSON: the chain in front of its answer, and whether it is to be learned."""
    if message.think is not None:
        content = f"<think>{message.think}</think>{content}"
    turn = {"role": message.role, "content": content}
    if not message.learn:
        turn["loss"] = False
    return turn


def without_marks(text: str) -> str:
    """Words of a user that look like a mark: with a space, as the reader of typed parts has them."""
    for mark in MARKS:
        text = text.replace(mark, "< " + mark[1:])
    return text


def located(path: Path, sample: Sample) -> Path:
    """Where a path of a sample leads to. Raises BadSample when that is outside of its folder."""
    return path_inside(path, sample.root, sample.origin).resolve()


def hashed(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def suffix_of(picture: bytes, sample: Sample) -> str:
    """By content: `.png`, `.jpeg`, ... Raises BadSample when it is no picture that is read here."""
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            return f".{image.format.lower()}"
    except (OSError, SyntaxError, ValueError) as error:
        raise BadSample("unreadable image", f"{sample.origin}: {error}") from error


def write_rows(path: Path, rows: Iterable[tuple[Sample, dict]], faults: Faults) -> int:
    """Samples with the facts to add, as a file of rows; returns how many.

    A row that cannot be written is a fault.
    """
    with RowWriter(path) as writer:
        for sample, facts in rows:
            try:
                writer.write(sample, **facts)
            except BadSample as fault:
                faults.add(fault)
    return writer.written
