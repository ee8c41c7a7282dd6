"""What a machine may lack, or do in its own way: packages, locks on files, peak memory, the disk's folders.

What it teaches: Python's standard library has parts that a system may lack (`fcntl` and `resource` are
Unix's), and words that mean something else (the same counter is in KiB on Linux and in bytes on macOS).
Asked for in one place, such a part is missing once, and everything that needs none of it goes on.

    packages             those that a feature needs, and the file of requirements/ that installs them
    a lock on a file     held until the file is closed, however the process ends
    a lock on one byte   of an empty file, at a place that stands for something: many locks, one file
    peak memory          the most that this process has held so far
    a folder             flushed to the disk, where a folder can be opened

Without `fcntl`, on Windows, every lock is granted, which is said once: two processes that write into one
folder are not kept apart there.
"""

import functools
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:
    fcntl = None

try:
    import resource
except ImportError:
    resource = None

WINDOWS = sys.platform == "win32"

# for a file that must not be followed where it leads, nor inherited: nothing where a system knows neither
PRIVATE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def require_packages(how: str, *packages: str) -> None:
    """Raises ValueError when one of the packages cannot be imported. how: the words after `pip install`."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed, which this needs: pip install {how}")


@functools.cache
def say_no_locks() -> None:
    """Once a process."""
    logging.getLogger(__name__).warning(
        "this system has no fcntl: nothing keeps two processes that write into one folder apart"
    )


def lock_file(file: BinaryIO | int, shared: bool = False, wait: bool = False) -> bool:
    """Hold a file's lock until it is closed: alone, or shared with others that share. False when somebody
    else holds it; wait: there is no such answer.

    Raises OSError for a file system without locks.
    """
    if fcntl is None:
        say_no_locks()
        return True
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_byte(file: BinaryIO, place: int) -> bool:
    """Hold one byte of a file, which need not be there, against other processes. False when one holds it.

    On a file system without locks all are granted.
    """
    if fcntl is None:
        say_no_locks()
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def unlock_byte(file: BinaryIO, place: int) -> None:
    """The other half of `lock_byte`."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place, os.SEEK_SET)
    except OSError as error:
        logging.getLogger(__name__).debug("a claim is not let go: %s", error)


def peak_memory() -> int:
    """The most bytes that this process has held so far; 0 where the system does not say."""
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def flush_to_disk(path: Path) -> None:
    """A file or a folder, so that it outlives a loss of power.

    Windows opens no folder, and flushes only what may be written to.
    """
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
