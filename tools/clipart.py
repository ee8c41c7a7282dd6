"""Open Clip Art: 8,043 drawings with the titles that their makers gave them, a really noisy data set.

What it teaches: what alt-texts are like where nobody looked. A sixth of these titles is "gramastar", a
twelfth is "Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)"; others are good, "Winter Hat".

    packages --apt-get--> openclipart-png  pictures --+--by path--> images/a/b.png, titles.jsonl
                          openclipart-svg  titles ----+

    python -m tools.clipart --out clipart                       # Debian, Ubuntu: downloads 156 MB
    python -m tools.clipart --out clipart --packages folder     # elsewhere: of the two .deb files, unpacked

A row is LLaVA's, with the title as the caption, and in its facts the keywords and the folder that the
drawing was filed under. Fetched, never committed. The drawings are in the public domain.

Simplified: drawings without a picture in the other package, or without a title, are left out.
"""

import html
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from data.images import open_image
from data.sample import BadSample, Faults
from infra.cli import command

PACKAGES = ("openclipart-png", "openclipart-svg")
SHARE = Path("usr/share/openclipart")
WORK = re.compile(r"<cc:Work.*?<dc:title>(.*?)</dc:title>", re.DOTALL)
KEYWORD = re.compile(r"<rdf:li>(.*?)</rdf:li>", re.DOTALL)
PATIENCE = 900  # seconds, for a download


@dataclass
class ClipartOptions:
    """Write images/ and titles.jsonl from Debian's packages of the Open Clip Art Library."""

    out: Path = Path("clipart")
    packages: Path | None = (
        None  # a folder with both .deb files unpacked; none: they are downloaded
    )
    side: int = 128  # pixels of a picture's longer side, at most


@dataclass(frozen=True)
class Drawing:
    """path: below the packages' folders, without its suffix. keywords: without empty and broken ones."""

    path: Path
    title: str
    keywords: list[str]


# ---------------------------------------------------------------------------------- from packages


def unpacked(folder: Path) -> Path:
    """Both packages, downloaded and unpacked below `folder`. Raises ValueError without Debian's tools."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(
                f"{tool} is not here: get {' and '.join(PACKAGES)} from packages.debian.org, unpack "
                "both into one folder, and give it as --packages"
            )
    shell(["apt-get", "download", *PACKAGES], folder)
    for package in sorted(folder.glob("*.deb")):
        shell(["dpkg-deb", "-x", package.name, "."], folder)
    return folder


def shell(words: list[str], folder: Path) -> None:
    """A command in this folder. Raises ValueError with its last line when it fails."""
    try:
        subprocess.run(
            words, cwd=folder, check=True, timeout=PATIENCE, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{' '.join(words)}: {last}") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{' '.join(words)}: not done within {PATIENCE} s") from None


def drawings(root: Path) -> Iterator[Drawing]:
    """All that have a picture and a title, in the order of their paths."""
    for path in sorted((root / SHARE / "svg").rglob("*.svg")):
        place = path.relative_to(root / SHARE / "svg").with_suffix("")
        if not picture_of(root, place).is_file():
            continue

        # What its maker wrote: in the file itself
        text = path.read_text(encoding="utf-8", errors="replace")
        found = WORK.search(text)
        title = one_line(found[1]) if found else ""
        words = [one_line(word) for word in KEYWORD.findall(text)]
        if title:
            yield Drawing(place, title, [word for word in words if is_keyword(word)])


def picture_of(root: Path, place: Path) -> Path:
    return root / SHARE / "png" / place.with_name(place.name + ".png")


def one_line(text: str) -> str:
    return " ".join(html.unescape(text).split())


def is_keyword(word: str) -> bool:
    """Some are what a script printed by mistake: hash(0x8a09834)."""
    return bool(word) and not word.startswith("hash")


# ---------------------------------------------------------------------------------------- to rows


def write_small(source: Path, target: Path, side: int) -> None:
    """A picture on white, its longer side at most `side` pixels. Raises BadSample for one that cannot
    be read, or is too large to be."""
    picture = open_image(source)
    picture.thumbnail((side, side))
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)


def row_of(drawing: Drawing) -> dict:
    name = drawing.path.as_posix()
    turns = [
        {"from": "human", "value": "<image>\ndescribe the picture."},
        {"from": "gpt", "value": drawing.title},
    ]
    facts = {"keywords": drawing.keywords, "folder": drawing.path.parent.as_posix()}
    return {"id": name, "image": f"images/{name}.png", "conversations": turns, "facts": facts}


def write_clipart(options: ClipartOptions) -> None:
    if options.side < 1:
        raise ValueError("--side must be positive")
    with tempfile.TemporaryDirectory() as folder:
        root = options.packages or unpacked(Path(folder))
        rows = []
        faults = Faults()
        for drawing in drawings(root):
            target = options.out / "images" / f"{drawing.path.as_posix()}.png"
            try:
                write_small(picture_of(root, drawing.path), target, options.side)
            except BadSample as fault:
                faults.add(fault)
            else:
                rows.append(row_of(drawing))
    if not rows:
        raise ValueError(f"{root / SHARE}: no drawings; are both packages unpacked there?")

    print(faults.report(), end="")

    # The file appears when all pictures are there
    unfinished = options.out / "titles.part"
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    unfinished.replace(options.out / "titles.jsonl")
    titles = Counter(row["conversations"][1]["value"] for row in rows)
    commonest, count = titles.most_common(1)[0]
    print(
        f"wrote {len(rows):,} drawings with {len(titles):,} different titles to {options.out}; "
        f"the commonest, {commonest!r}, {count:,} times"
    )


if __name__ == "__main__":
    command(write_clipart)
