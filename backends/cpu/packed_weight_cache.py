"""Cache of packed weights in the user's cache folder, one file per model. It can be deleted at any time.

    weights in tiles, each at a multiple of 64 bytes | index (JSON) | trailer

The index contains the model's fingerprint and, by name, each weight's header and offset. A first start packs
into memory, and a thread writes the file afterwards, so the user does not wait and a full disk has no other
effect. The next start reads the file into huge pages while the rest of the program starts: 0.1 to 0.2 seconds
per GB. A mapped file would be available at once and shared between processes, but decoding is then 8 % slower
(medians 35.3 and 33.7 -> 31.7 and 31.7 tok/s, llama-3.2-1b shape, 2 threads, ext4 with large folios; 15 %
slower with 4 KiB pages). The file is therefore mapped only if the system has no huge pages.

TINYCHAT_WEIGHT_CACHE=0 disables the cache; a number limits the bytes of all models together. Windows has no
such cache, because a mapped file can be neither replaced nor deleted there.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Iterable
from ctypes import byref
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.memory import ALIGN, HUGE, Arena, Bytes, raw
from tinychat_mlx.backends.cpu.pack import KINDS, LAYOUT, CpuWeight
from tinychat_mlx.base import disk_cache
from tinychat_mlx.base.errors import BackendError

MINIMUM = 64 << 20  # bytes; packing less takes under a fifth of a second
GIB = 1 << 30
READERS = 2  # threads; one reads 3 GB/s from the page cache, two nearly twice that
EXIT_S = 5.0  # seconds that the exit of the process waits for a file being written
NAME = re.compile(r".*\.tiles")
MAGIC = b"tc-tiles"
MAX_INDEX = 64 << 20
# magic, layout, CRC of the index, its offset, its length, durable flag, 0
TRAILER = struct.Struct("<8sIIQQII")

_saving: list[threading.Thread] = []


class Damaged(ValueError):
    """A file that `save` did not write, or that changed since."""


class PackedWeightCache:
    """One model's packed weights, read from disk or collected to be written there."""

    def __init__(self, model: str, digest: str, arena: Arena) -> None:
        """model: file name. digest: fingerprint of the model. Raises BackendError for an invalid setting."""
        self._digest, self._arena = digest, arena
        self._made: dict[str, CpuWeight] = {}
        self._found: dict[str, CpuWeight] = {}
        self._index: dict[str, list[int]] = {}
        self._image: Image | None = None
        self.path = None if (folder := home()) is None or not digest else folder / f"{model}.tiles"
        if self.path is not None:
            self._open(self.path)

    def find(self, name: str, shape: tuple[int, int]) -> CpuWeight | None:
        """Return the packed weight of this name and shape (N, K), or None if it is not on disk."""
        entry = self._index.get(name)
        if entry is None or (entry[1], entry[2]) != shape:
            return None
        if name not in self._found:
            assert self._image is not None
            header, offset = c.CWeight(*entry[:6]), entry[6]
            piece = np.frombuffer(self._image.data.data, np.uint8, _size(header), offset)
            self._arena.count(piece)
            self._found[name] = CpuWeight(name, header, piece, self._image.wait)
        return self._found[name]

    def add(self, weight: CpuWeight) -> None:
        """Add a weight that had to be packed."""
        self._made[weight.name] = weight

    def save(self) -> None:
        """Write the complete model in the background, unless it was read from the file."""
        weights = list((self._found | self._made).values())
        if self.path is not None and self._made and sum(w.data.size for w in weights) >= MINIMUM:
            _later(save, self.path, self._digest, weights, bound())

    def _open(self, path: Path) -> None:
        try:
            file = _open_own(path)
        except OSError:
            return
        with file:
            try:
                index, durable = read_index(file)
                if index["digest"] != self._digest:
                    raise Damaged("made from another model, or from an earlier version of it")
                if not durable and (index["boot"] != _boot() or not index["boot"]):
                    raise Damaged("the machine stopped before the file was on disk")
                self._image = Image(file)
            except (Damaged, OSError) as e:
                _log(f"{path}: discarded: {e}")
                return
        self._index = index["weights"]
        disk_cache.touch([path])
        if not durable:
            _later(settle, path, wait=False)


class Image:
    """Loads a file in the background.

    `data` has its full size at once; its contents are valid after `wait()`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._path, size = file.name, os.fstat(file.fileno()).st_size
        self._short = False
        self._readers: list[threading.Thread] = []
        if not huge_pages():
            self.data = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
            return
        self.data = raw(size, huge=True)
        share = -(-size // READERS // HUGE) * HUGE
        for begin in range(0, size, share):
            part = begin, min(begin + share, size), os.dup(file.fileno())
            self._readers.append(threading.Thread(target=self._read, args=part, daemon=True))
            self._readers[-1].start()

    def wait(self) -> None:
        """Block until every weight is loaded.

        Raises BackendError if the file was truncated, or on a disk error.
        """
        for reader in self._readers:
            reader.join()
        if self._short:
            raise BackendError("the file is truncated", where=self._path, remedy="delete it, and start again")

    def _read(self, at: int, end: int, fd: int) -> None:
        """Read in few large calls. Other threads hold the GIL for up to half a second (loading a tokenizer)."""
        with os.fdopen(fd, "rb") as file:
            try:
                while at < end:
                    got = os.preadv(file.fileno(), [self.data[at:end].data], at)
                    if not got:
                        break
                    at += got
            except OSError:
                pass
            self._short = self._short or at < end


def huge_pages() -> bool:
    """Return whether the system gives huge pages to memory that requests them."""
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def home() -> Path | None:
    """The folder of all files, or None where there are to be none."""
    return None if os.name == "nt" or bound() == 0 else disk_cache.place("weights")


def bound() -> int | None:
    """Return the maximum bytes of all files from TINYCHAT_WEIGHT_CACHE, or None. Raises BackendError."""
    text = os.environ.get("TINYCHAT_WEIGHT_CACHE", "")
    if text and not text.isdecimal():
        raise BackendError(
            f"{text!r} is not a number of bytes",
            where="TINYCHAT_WEIGHT_CACHE",
            remedy="give a number of bytes; 0 disables the cache",
        )
    return int(text) if text else None


# reading --------------------------------------------------------------------------------------------
def _open_own(path: Path) -> BinaryIO:
    """Open a regular file that belongs to this user. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.getuid():
        os.close(fd)
        raise PermissionError(f"{path} is not this user's own file")
    return os.fdopen(fd, "rb")


def read_index(file: BinaryIO) -> tuple[dict[str, Any], bool]:
    """Return the checked index, and whether the whole file is known to be on disk. Raises Damaged."""
    size = os.fstat(file.fileno()).st_size
    if size < TRAILER.size:
        raise Damaged(f"{size} bytes long")
    file.seek(size - TRAILER.size)
    magic, layout, crc, begin, length, durable, _ = TRAILER.unpack(file.read(TRAILER.size))
    if magic != MAGIC or layout != LAYOUT:
        raise Damaged("it has no trailer of this version")
    if length > MAX_INDEX or begin + length + TRAILER.size != size:
        raise Damaged("its parts do not add up to its length")
    file.seek(begin)
    text = file.read(length)
    if zlib.crc32(text) != crc:
        raise Damaged("the checksum of its index is wrong")
    try:
        index = json.loads(text)
        digest, boot, weights = index["digest"], index["boot"], index["weights"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise Damaged("its index is not JSON of the right form") from None
    if type(digest) is not str or type(boot) is not str or type(weights) is not dict:
        raise Damaged("its index is not of the right form")
    for name, entry in weights.items():
        _check(name, entry, begin)
    return index, bool(durable)


def _check(name: str, entry: Any, end: int) -> None:
    """Check a weight's entry: kind, n, k, group, ends, has_bias, offset. Raises Damaged."""
    if type(entry) is not list or len(entry) != 7 or not all(type(v) is int and v >= 0 for v in entry):
        raise Damaged(f"{name[:80]!r} is not described by seven numbers")
    kind, n, k, group, ends, biased, offset = entry
    grouped = kind in (c.INT4, c.INT8)
    ok = kind in KINDS and 0 < n < 1 << 31 and 0 < k < 1 << 31 and ends <= c.ZEROS and biased < 2
    ok = ok and (0 < group <= k and group % 32 == 0 and k % group == 0 if grouped else group == ends == 0)
    if not ok or offset % ALIGN or offset + _size(c.CWeight(*entry[:6])) > end:
        raise Damaged(f"{name[:80]!r} has an entry that does not fit the file")


def _size(header: c.CWeight) -> int:
    return int(c.open_library().tc_weight_bytes(byref(header)))


# writing --------------------------------------------------------------------------------------------
def save(path: Path, digest: str, weights: Iterable[CpuWeight], most: int | None) -> None:
    """Write a temporary file next to `path` and rename it. If the disk refuses, nothing is left behind."""
    offsets, end = {}, 0
    weights = list(weights)
    for w in weights:
        if w.wait is not None:
            w.wait()
        h = w.header
        offsets[w.name] = [h.kind, h.n, h.k, h.group, h.ends, h.has_bias, end]
        end += -(-w.data.size // ALIGN) * ALIGN
    boot = _boot()
    text = json.dumps({"digest": digest, "boot": boot, "weights": offsets}).encode()
    disk_cache.make_folder(path.parent)
    disk_cache.remove_abandoned(path.parent)
    if not make_room(path, end + len(text) + TRAILER.size, most):
        _log(f"{path}: not written: too little disk space")
        return
    with disk_cache.replacing(path) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, end)  # a full disk fails here, before the work
        for w in weights:
            _write(file, w.data, offsets[w.name][6])
        _write(file, np.frombuffer(text, np.uint8), end)
        rest = zlib.crc32(text), end, len(text), 0, 0
        _write(file, np.frombuffer(TRAILER.pack(MAGIC, LAYOUT, *rest), np.uint8), end + len(text))
        if not boot:
            os.fsync(file.fileno())
    settle(path)


def _write(file: Any, data: Bytes, offset: int) -> None:
    at = 0
    while at < data.size:
        at += os.pwrite(file.fileno(), data[at : at + (64 << 20)].data, offset + at)


def settle(path: Path) -> None:
    """Wait until a file is on disk and mark it as durable, so that it survives a power failure."""
    with open(path, "r+b", buffering=0) as file:
        os.fsync(file.fileno())
        file.seek(-8, os.SEEK_END)
        file.write(struct.pack("<II", 1, 0))


def make_room(path: Path, size: int, most: int | None) -> bool:
    """Delete the least recently used files until `size` more bytes are allowed. Returns whether they are.

    The default limit is a fifth of the disk, at most 32 GiB. A tenth of the disk, at least 2 and at most 20
    GiB, stays free.
    """
    import shutil

    disk = shutil.disk_usage(path.parent)
    limit = min(32 * GIB, disk.total // 5) if most is None else most
    spare = max(2 * GIB, min(20 * GIB, disk.total // 10))
    files = disk_cache.files(path.parent, NAME)
    others = [file for file in files if file.path != path]  # path goes when the new one is there, not before
    held, free = sum(file.size for file in others), disk.free
    if size > limit or free + sum(file.size for file in files) - size < spare:
        return False
    free += disk_cache.evict(others, max(held + size - limit, size + spare - free))
    return free - size >= spare


def _boot() -> str:
    """Return an id of this boot of the machine, or "" if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# later ----------------------------------------------------------------------------------------------
def _later(job: Any, *arguments: Any, wait: bool = True) -> None:
    """Run a job in a thread. Disk errors are logged only, because the cache is optional."""

    def run() -> None:
        try:
            job(*arguments)
        except OSError as e:
            _log(f"{arguments[0]}: not written: {e}")

    thread = threading.Thread(target=run, name="tinychat weights", daemon=True)
    thread.start()
    if wait:
        _saving.append(thread)


@atexit.register
def finish(timeout: float = EXIT_S) -> None:
    """Wait for files that are being written."""
    while _saving:
        _saving.pop().join(timeout)


def _log(text: str) -> None:
    import logging

    logging.getLogger(__name__).info(text)
