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
from typing import BinaryIO, Callable, Iterable, Iterator, NamedTuple

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
    at = 0  # where we are
    first = 0  # where the member begins: a long name stands in a header before its own
    long_name = ""
    garbage = 0  # broken blocks in a row
    while True:
        file.seek(at)
        block = file.read(512)
        if len(block) < 512:
            yield "it ends without an end mark"
            return
        if not block.strip(b"\0"):
            return

        # A broken header: step from block to block to the next good one.
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

        # A good one says where the next begins.
        garbage = 0
        data = at + 512
        last = data + info.size
        at = data + (info.size + 511) // 512 * 512
        if last > size:
            yield f"{info.name} is cut short"
            return
        # Some only bring the name of the member after them.
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


def is_whole(part: list[Member], key: Callable) -> bool:
    """Whether there is something to see and something to say about it."""
    kinds = {key(member.name)[1] for member in part}
    return bool(kinds & {"txt", "json"}) and bool(kinds & {*PICTURES, "pdf", "tif"})


def group_spans(path: Path) -> Iterator[Span | BadSample]:
    """Neighbouring files of one key. Damage is one fault, together with the samples beside it that
    it leaves incomplete; a key that occurs again is a fault, and its first copy is kept."""
    seen: set[str] = set()
    number = 0
    with open(path, "rb") as file:
        for group, beside_damage in groups_of(members(file)):
            if isinstance(group, str):
                yield BadSample("damaged tar", f"{path.name}: {group}")
                continue
            parts, key = samples_of_group(group)
            for part in parts:
                number += 1
                # beside damage, what lacks its picture or its text is part of the damage
                if beside_damage and not is_whole(part, key):
                    continue
                whole = first_copy(part, key, seen)
                if whole:
                    yield whole[0].first, whole[-1].last, number
                if len(whole) < len(part):
                    again = part[len(whole)].name
                    yield BadSample("repeated key", f"{path.name}: {again} occurs again")


def groups_of(found: Iterable[Member | str]) -> Iterator[tuple[list[Member] | str, bool]]:
    """(members of one key, whether there is damage beside them); damage itself as its text."""
    group: list[Member] = []
    after_damage = False
    for member in found:
        damage = isinstance(member, str)
        # a group ends with the first member of another key
        if group and (damage or key_of(member.name)[0] != key_of(group[0].name)[0]):
            yield group, after_damage or damage
            group = []
            after_damage = False
        if damage:
            yield member, True
            after_damage = True
        else:
            group.append(member)
    if group:
        yield group, after_damage


def samples_of_group(group: list[Member]) -> tuple[list[list[Member]], Callable]:
    """The samples of a group and the rule of their keys: one, or several when their names have dots
    before the last one."""
    runs: list[list[Member]] = []
    for member in group:
        if runs and dotted_key_of(runs[-1][0].name)[0] == dotted_key_of(member.name)[0]:
            runs[-1].append(member)
        else:
            runs.append([member])

    # other views of one sample (0.jpg 0.seg.png 0.txt), or several (0.5.jpg 0.5.txt 0.6.jpg ...)?
    whole = sum(is_whole(run, dotted_key_of) for run in runs)
    plain = any("." not in key_of(member.name)[1] for member in group)
    if len(runs) > 1 and (whole > 1 or not plain):
        return runs, dotted_key_of
    return [group], key_of


def first_copy(part: list[Member], key: Callable, seen: set[str]) -> list[Member]:
    """The members before a kind occurs again; none when the key was `seen`. Adds the key to it."""
    stem = key(part[0].name)[0]
    if stem in seen:
        return []
    seen.add(stem)
    kinds: set[str] = set()
    for i, member in enumerate(part):
        kind = key(member.name)[1]
        if kind in kinds:
            return part[:i]
        kinds.add(kind)
    return part


def tar_fields(raw: bytes) -> dict:
    """The files of one sample by their kinds, and its key."""
    found = [m for m in members(io.BytesIO(raw)) if isinstance(m, Member)]
    # the rule of `samples_of_group`, from the sample alone
    stems = {dotted_key_of(m.name)[0] for m in found}
    key = dotted_key_of if len(stems) == 1 else key_of
    fields = {"__key__": key(found[0].name)[0]}
    for member in found:
        kind = key(member.name)[1]
        fields[kind] = raw[member.data : member.last]
    return fields
