"""Tar: neighbouring files of one key are a sample, WebDataset's rule.

What it teaches: an archive is a chain in which every link says where the next one begins, so one
broken header ends it for most programs, in silence. Headers start at multiples of 512 bytes and
carry a checksum: the next good one can be searched, and the damage costs the samples beside it.

    0.jpg | 0.txt | ._1.jpg | 1.jpg | 1.txt | <broken> | 2.txt | 3.jpg | 3.txt
    `-- sample 1 -'   noise    `- sample 2 -'   one fault, 2 with it    `- sample 4 -'

    key      folder/name up to the first dot; to the last one where the first would make one sample of many
    fields   kind -> bytes: {"jpg": ..., "txt": ..., "__key__": "0"}
"""

import io
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, NamedTuple

from data.container_base import PICTURES, Span, is_noise
from data.sample import BadSample

MAX_GARBAGE = 1 << 20  # broken blocks of 512 bytes in which the next header is searched
MAX_HEADER = 1 << 20  # bytes of an extended header


# ------------------------------------------------------------------------------------ members


class Member(NamedTuple):
    """A file in a tar: where its header begins, its data begin, and its data end."""

    name: str
    first: int
    data: int
    last: int


def members(file: BinaryIO) -> Iterator[Member | str]:
    """The files in a tar that can belong to samples; a string tells of damage, behind which the
    next header is searched block by block. tarfile itself ends in silence there."""
    size = file.seek(0, io.SEEK_END)
    first = at = (
        0  # where the member begins (long names stand in headers before its own), and where we are
    )
    long_name = ""
    garbage = 0
    while True:
        file.seek(at)
        block = file.read(512)
        if len(block) < 512:
            yield "it ends without an end mark"
            return
        if not block.strip(b"\0"):
            return

        try:
            info = tar_header(block)
        except tarfile.HeaderError as error:
            if garbage == 0:
                yield f"bad header at byte {at} ({error})"
            garbage += 1
            if garbage > MAX_GARBAGE:
                return
            at += 512
            first = at
            long_name = ""
            continue

        garbage = 0
        data = at + 512
        last = data + info.size
        at = data + (info.size + 511) // 512 * 512
        if last > size:
            yield f"{info.name} is cut short"
            return
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            long_name = name_in(file.read(min(info.size, MAX_HEADER)), info.type) or long_name
            continue

        name = long_name or info.name
        if info.isreg() and not is_noise(name):
            yield Member(name, first, data, last)
        first = at
        long_name = ""


def tar_header(block: bytes) -> tarfile.TarInfo:
    """Raises tarfile.HeaderError for a block that is none."""
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if info.size < 0:
        raise tarfile.InvalidHeaderError("negative size")
    return info


def name_in(body: bytes, kind: bytes) -> str:
    """The name that an extended header states for the member after it, "" when it states none."""
    pattern = rb"\d+ path=(.*)\n" if kind == tarfile.XHDTYPE else rb"([^\0]*)"
    found = re.search(pattern, body)
    return found.group(1).decode("utf-8", "replace") if found else ""


# ------------------------------------------------------------------------------------ samples


def key_of(name: str) -> tuple[str, str]:
    """WebDataset's rule: the path up to the first dot of the file's name is the sample, the rest
    says what it is."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return f"{folder}/{stem}", kind.lower()


def dotted_key_of(name: str) -> tuple[str, str]:
    """The same with the last dot: for names like img_0.5.jpg."""
    stem, _, kind = name.rpartition(".")
    return stem, kind.lower()


def runs_of(group: list[Member], key) -> list[list[Member]]:
    """Neighbours whose names have the same key."""
    runs: list[list[Member]] = []
    for member in group:
        if runs and key(runs[-1][0].name)[0] == key(member.name)[0]:
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def is_whole(names: Iterable[str], key) -> bool:
    """Whether there is something to see and something to say about it."""
    kinds = {key(name)[1] for name in names}
    return bool(kinds & {"txt", "json"}) and bool(kinds & {*PICTURES, "pdf", "tif"})


def group_spans(path: Path) -> Iterator[Span | BadSample]:
    """Neighbouring files of one key. Damage is one fault, together with the samples beside it that
    it leaves incomplete."""
    group: list[Member] = []
    seen: set[str] = set()
    number = 0
    damaged = False  # since the group began, or just before
    with open(path, "rb") as file:
        for found in members(file):
            begins = bool(group) and (
                isinstance(found, str) or key_of(found.name)[0] != key_of(group[0].name)[0]
            )
            if begins:
                only_whole = damaged or isinstance(found, str)
                yield from records_of(path, group, number, seen, only_whole)
                number += 1
                group = []
                damaged = False
            if isinstance(found, str):
                damaged = True
                yield BadSample("damaged tar", f"{path.name}: {found}")
            else:
                group.append(found)
    if group:
        yield from records_of(path, group, number, seen, damaged)


def records_of(
    path: Path, group: list[Member], number: int, seen: set[str], only_whole: bool
) -> Iterator[Span | BadSample]:
    """The samples of a group of files: one, or several when their names have dots before the last one.

    only_whole: beside damage, what lacks its picture or its text is part of the damage, and no
    fault of its own.
    """
    key = key_of
    parts = [group]
    runs = runs_of(group, dotted_key_of)
    if len(runs) > 1:
        whole = sum(is_whole((m.name for m in run), dotted_key_of) for run in runs)
        plain = any("." not in key_of(m.name)[1] for m in group)
        if whole > 1 or not plain:
            key = dotted_key_of
            parts = runs

    for part in parts:
        if only_whole and not is_whole((m.name for m in part), key):
            continue
        number += 1
        stem = key(part[0].name)[0]
        kinds = [key(m.name)[1] for m in part]
        again = next((i for i, kind in enumerate(kinds) if kind in kinds[:i]), len(part))
        if stem in seen:
            again = 0
        seen.add(stem)
        if again > 0:
            yield part[0].first, part[again - 1].last, number
        if again < len(part):
            yield BadSample("repeated key", f"{path.name}: {part[again].name} occurs again")


def tar_fields(raw: bytes) -> dict:
    """The files of one sample by their kinds, and its key."""
    found = [m for m in members(io.BytesIO(raw)) if isinstance(m, Member)]
    stems = {dotted_key_of(m.name)[0] for m in found}
    key = dotted_key_of if len(stems) == 1 else key_of
    fields = {key(m.name)[1]: raw[m.data : m.last] for m in found}
    return fields | {"__key__": key(found[0].name)[0]}
