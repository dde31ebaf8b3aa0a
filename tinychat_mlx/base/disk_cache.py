"""The caches on disk: where they are, how a file is written, and which files are deleted first.

All caches are below one folder, which TINYCHAT_CACHE moves. Their files are for their owner only (0600 in 0700
folders). A file appears whole or not at all. Where a cache is too large, the files used longest ago are deleted; a file
counts as used when it is written and when `touch` is called. Every file may be deleted at any time.

Imports nothing else of the project and no NumPy, so backends may use it.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

PLACES = {  # what is cached -> its folder or file below the root
    "weights": "weights",  # packed by the cpu backend
    "prefixes": "prefixes",  # keys and values of conversations
    "cubins": "cuda",  # compiled CUDA kernels
    "winners": "metal-kernels.json",  # measurements of Metal kernels
}
PARTIAL = ".partial"
ABANDONED_S = 60  # a partial file of a process that has only just opened it is not locked yet


def root() -> Path:
    """The folder of all caches. It may not exist."""
    named = os.environ.get("TINYCHAT_CACHE")
    if named:
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("tinychat-mlx", appauthor=False)


def place(kind: str) -> Path:
    """The folder or file of one cache, a key of PLACES. It may not exist."""
    return root() / PLACES[kind]


# writing -----------------------------------------------------------------------------------------------
def make_folder(folder: Path) -> None:
    """Create a folder for its owner only, unless it exists. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file next to `path` for writing; it takes the place of `path` at the end, unless an error occurs.

    The file is not buffered. It is locked while it is open, where the system has locks. Raises OSError.
    """
    make_folder(path.parent)
    fd, partial = tempfile.mkstemp(PARTIAL, path.stem, path.parent)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            _lock(file, wait=True)
            yield file
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            os.unlink(partial)


def write(path: Path, data: bytes) -> None:
    """Write a small file. Raises OSError."""
    with replacing(path) as file:
        at = 0
        while at < len(data):
            at += file.write(memoryview(data)[at:])


def remove_abandoned(folder: Path) -> None:
    """Delete the partial files of processes that were killed while they wrote."""
    for path in folder.glob(f"*{PARTIAL}"):
        with suppress(OSError), open(path, "rb") as file:
            _lock(file, wait=False)
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def _lock(file: BinaryIO, wait: bool) -> None:
    """Lock a file until it is closed or the process ends. Raises OSError where another process holds it and not `wait`."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


# eviction ----------------------------------------------------------------------------------------------
class CachedFile(NamedTuple):
    used_ns: int  # when it was used last
    size: int  # bytes
    path: Path


def files(folder: Path, name: re.Pattern[str]) -> list[CachedFile]:
    """The files of a folder whose whole name matches; the one used longest ago first. Raises OSError."""
    found: list[CachedFile] = []
    for entry in os.scandir(folder):
        if name.fullmatch(entry.name):
            with suppress(OSError):
                info = entry.stat()
                found.append(CachedFile(info.st_mtime_ns, info.st_size, Path(entry.path)))
    return sorted(found)


def touch(paths: Iterable[Path]) -> None:
    """Note files as used now, each a little earlier than the one before it."""
    now = time.time_ns()  # the system's own stamp is a few milliseconds behind
    for i, path in enumerate(paths):
        with suppress(OSError):
            os.utime(path, ns=(now - i, now - i))


def evict(candidates: Iterable[CachedFile], excess: int) -> int:
    """Delete files in the given order until at least `excess` bytes are free -> the bytes that became free."""
    freed = 0
    for file in candidates:
        if freed >= excess:
            break
        with suppress(OSError):
            file.path.unlink()
            freed += file.size
    return freed
