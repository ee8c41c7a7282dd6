"""Shards in an object store or HDFS: copied to this machine when they are needed, kept while there is room.

What it teaches: a store is a disk that may be away, slow, or changed behind one's back. So a shard is
copied whole, checked, and put in place by one rename; from then on it is a file like any other, and
everything that reads files works on it. What is kept is bounded in bytes, and what was used longest ago
goes first. A store that is away is not a bad record: it ends the run, which goes on from its last
checkpoint, with the same rows, when the store is back.

    s3://bucket/a.tar --held--> /cache/3f9a.../data/a.tar --containers.py--> records

    /cache/lock                  taken to count bytes, to make room and to rename
    /cache/3f9a.../lock          shared by readers; alone, to copy or to remove
    /cache/3f9a.../version.json  address, size and stamp (ETag, time of change) of the file that is read
    /cache/3f9a.../data/a.tar    there, or not

The version outlives the copy: a shard that is fetched again must be the one that the run began with.
`Folder` asks for it anew when it begins (`renew`).

Needs fsspec and, for each store, the package that fsspec asks for (requirements/remote.txt).
Simplified: a shard is one stream of ranges, not several at once; the pictures that a text container
names by path must lie on this machine (--images); write a host into hdfs:// addresses. All limits
are our choice.
"""

import hashlib
import json
import os
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator

from infra.system import lock_file
from infra.text import printable

CHUNK = 1 << 24  # bytes of a request
ATTEMPTS = 5  # of a request, half a second apart, then twice as long each time
PAUSE = 0.5
PATIENCE = 120.0  # seconds for one request
CROWD = 1800.0  # seconds that a process waits for others that copy the same shard, or for room

# What file systems call the mark of a file's version.
STAMPS = ("ETag", "etag", "checksum", "LastModified", "last_modified", "Last-Modified", "mtime")


class StoreError(ConnectionError):
    """The store cannot be read, or holds another file than before. Ends a run: no record is to blame."""


def is_remote(path: Path | str) -> bool:
    """Whether a path is an address: a scheme of two letters or more (C:/ is a drive)."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", str(path)) is not None


def store_address(path: Path | str) -> str:
    """The address that a Path was made of: it keeps one slash of two."""
    scheme, _, place = str(path).partition(":")
    return f"{scheme}://{place.lstrip('/')}"


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the place in it. Raises ValueError when a package is
    missing or the scheme unknown."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)
    except ImportError as error:
        raise ValueError(
            f"{address}: needs a package: pip install -r requirements/remote.txt ({error})"
        ) from error


def files_in_store(address: str) -> list[Path]:
    """The files of a folder, a pattern or a file of a store, as paths."""
    system, place = file_system(address)
    scheme = address.partition(":")[0]

    def look() -> list[str]:
        if any(sign in place for sign in "*?["):
            return system.glob(place)
        return system.find(place) if system.isdir(place) else [place]

    found = tried(look, address)
    return sorted(Path(store_address(f"{scheme}:/{name.split('://')[-1]}")) for name in found)


# ------------------------------------------------------------------------------------ asking the store


def tried(question: Callable[[], Any], address: str, patience: float = PATIENCE) -> Any:
    """question(), several times if it must be, each with a limit of time. Raises StoreError."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return in_time(question, patience)
        except (FileNotFoundError, PermissionError, StoreError) as error:
            raise StoreError(f"{address}: {reason_of(error)}") from error
        except Exception as error:
            last = error
    raise StoreError(
        f"{address}: {reason_of(last)}, {ATTEMPTS} times; the run can go on from its last checkpoint"
    ) from last


def reason_of(error: Exception) -> str:
    return printable(f"{type(error).__name__} {error}".strip())[:300]


def in_time(question: Callable[[], Any], seconds: float) -> Any:
    """question(), or TimeoutError: a connection that says nothing more may never return."""
    answer: list = []

    def ask() -> None:
        try:
            answer.append((question(), None))
        except Exception as error:
            answer.append((None, error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = answer[0]
    if error is not None:
        raise error
    return value


def version_of(address: str, patience: float = PATIENCE) -> dict:
    """Address, size and stamp of a file as the store has it now. Raises StoreError."""
    system, place = file_system(address)

    def ask() -> dict:
        system.invalidate_cache()
        return system.info(place)

    about = tried(ask, address, patience)
    if about.get("size") is None:
        raise StoreError(f"{address}: the store does not say how large it is")
    stamp = next((str(about[key]) for key in STAMPS if about.get(key)), "")
    return {"address": address, "size": int(about["size"]), "stamp": stamp}


# ------------------------------------------------------------------------------------ locks


@contextmanager
def locked(file: Path, shared: bool = False, patience: float = CROWD) -> Iterator[BinaryIO]:
    """Inside, this process holds the file's lock, alone or shared with others that read.

    Raises StoreError when others hold it too long.
    """
    until = time.monotonic() + patience
    with open(file, "ab") as lock:
        while not lock_file(lock, shared):
            if time.monotonic() > until:
                raise StoreError(f"{file}: another process has held it for {patience:g} s")
            time.sleep(0.02)
        yield lock


# ------------------------------------------------------------------------------------ the cache


@dataclass(frozen=True)
class ShardCache:
    """Copies of remote shards in `directory`, at most `limit` bytes of them, for all processes of this
    machine. Local paths pass through."""

    directory: Path
    limit: int
    patience: float = PATIENCE

    @contextmanager
    def held(self, path: Path) -> Iterator[Path]:
        """Inside, the file lies at the path that is given, and stays there.

        Raises StoreError when the store cannot be read or has another version than before, ValueError
        for a shard that is larger than the cache.
        """
        if not is_remote(path):
            yield path
            return

        entry = self.entry(path)
        copy = entry / "data" / path.name
        until = time.monotonic() + CROWD
        while time.monotonic() < until:
            with locked(entry / "lock", shared=True):
                if copy.exists():
                    mark_used(copy)
                    yield copy
                    return
            # not there, or others have just removed it
            with locked(entry / "lock"):
                if not copy.exists():
                    self.fetch(store_address(path), entry, copy)
        raise StoreError(f"{self.directory}: {path.name} is removed as soon as it is there")

    def place(self) -> Path:
        return Path(self.directory).expanduser()

    def entry(self, path: Path) -> Path:
        """The folder of one shard."""
        name = hashlib.sha256(store_address(path).encode()).hexdigest()[:24]
        entry = self.place() / name
        (entry / "data").mkdir(parents=True, exist_ok=True)
        return entry

    def renew(self, path: Path) -> dict:
        """The version that the store has now, which from here on is the one to be read; an older copy
        is removed."""
        address = store_address(path)
        entry = self.entry(path)
        found = version_of(address, self.patience)
        if known_version(entry) != found:
            with locked(entry / "lock"):
                # unless a neighbour has done so in the meantime
                if known_version(entry) != found:
                    remove_files(entry / "data")
                    write_whole(entry / "version.json", json.dumps(found))
        return found

    def fetch(self, address: str, entry: Path, copy: Path) -> None:
        """Copy a shard, with the entry's lock held alone."""
        # parts that a process left behind when it was killed
        remove_files(entry / "data")

        # it must be what it was, before and after
        want = known_version(entry) or version_of(address, self.patience)
        write_whole(entry / "version.json", json.dumps(want))
        self.compare(address, want)
        part = copy.with_name(f"part-{os.getpid()}")
        try:
            self.make_room(want["size"], address, part)
            self.copy_bytes(address, want["size"], part)
            self.compare(address, want)
            # not while another process counts, who would see neither name, or both
            with locked(self.place() / "lock"):
                os.replace(part, copy)
        finally:
            part.unlink(missing_ok=True)

    def compare(self, address: str, want: dict) -> None:
        found = version_of(address, self.patience)
        if found != want:
            raise StoreError(
                f"{address} was changed while it was used: {found['size']} bytes ({found['stamp']}), "
                f"and {want['size']} ({want['stamp']}) before; begin again, or put it back"
            )

    def copy_bytes(self, address: str, size: int, part: Path) -> None:
        """Range after range. One that is cut short is asked for again."""
        system, place = file_system(address)
        with open(part, "r+b") as file:
            for start in range(0, size, CHUNK):
                end = min(size, start + CHUNK)

                def ask() -> bytes:
                    piece = system.cat_file(place, start=start, end=end)
                    if len(piece) != end - start:
                        raise OSError(f"{len(piece)} bytes where {end - start} were asked for")
                    return piece

                file.write(tried(ask, address, self.patience))
            file.flush()
            os.fsync(file.fileno())

    # -------------------------------------------------------------------------------- room

    def make_room(self, size: int, address: str, part: Path) -> None:
        """Make `part`, a file of that size with nothing in it yet, when there is room: what was used
        longest ago and nobody reads goes first."""
        if size > self.limit:
            raise ValueError(
                f"{address}: {size} bytes, and the cache may hold {self.limit}: raise --cache-gib"
            )
        until = time.monotonic() + CROWD
        while time.monotonic() < until:
            with locked(self.place() / "lock"):
                if self.freed(size):
                    with open(part, "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(0.1)
        raise StoreError(f"{self.directory}: all shards are in use, no room for {address}")

    def freed(self, size: int) -> bool:
        """Whether there is room for so many bytes, once what may go is gone."""
        files = []
        for file in self.place().glob("*/data/*"):
            try:
                about = file.stat()
            except FileNotFoundError:
                continue
            files.append((about.st_atime_ns, about.st_size, file))
        used = sum(bytes_of for _, bytes_of, _ in files)

        for _, bytes_of, file in sorted(files):
            if used + size <= self.limit:
                break
            with open(file.parent.parent / "lock", "ab") as lock:
                if lock_file(lock):
                    file.unlink(missing_ok=True)
                    used -= bytes_of
        return used + size <= self.limit


def mark_used(file: Path) -> None:
    """Its time of use alone: its time of change tells readers whether what they kept of it is true."""
    os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))


def known_version(entry: Path) -> dict | None:
    try:
        return json.loads((entry / "version.json").read_text())
    except FileNotFoundError:
        return None


def remove_files(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """A small file, in place at once."""
    part = file.with_name(f"{file.name}-{os.getpid()}")
    part.write_text(text)
    os.replace(part, file)
