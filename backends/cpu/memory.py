"""Memory for weights, caches and intermediate results.

All of it is anonymous memory from the system. It is aligned and not touched before its first use. Large
blocks use huge pages where the system has them.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

HUGE = 2 << 20
CHUNK = 64 << 20  # chunk size for weights; many small matrices share a chunk and so its huge pages
ALIGN = 64


def raw(size: int, huge: bool = False) -> Bytes:
    """Return `size` bytes of zeroed memory, aligned to 64 bytes.

    huge: align to 2 MiB and advise the kernel to use huge pages for all whole ones.
    """
    if not huge:
        return np.frombuffer(_anonymous(max(size, 1)), np.uint8)[:size]
    area = _anonymous(size + HUGE)
    whole = np.frombuffer(area, np.uint8)
    start = -address(whole) % HUGE
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= HUGE:
        try:
            area.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE * HUGE)
        except OSError:  # the kernel has no huge pages; use ordinary ones
            pass
    return whole[start : start + size]


def _anonymous(size: int) -> mmap.mmap:
    """Map private memory. Python's default is shared memory, which gets no huge pages on most Linux systems."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)  # Windows


def address(a: npt.NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    return int(a.ctypes.data)


class Arena:
    """Allocator for weights. A chunk is freed when its last piece is freed."""

    def __init__(self) -> None:
        self._chunk = raw(0)
        self._at = 0
        self.used = 0

    def take(self, size: int) -> Bytes:
        """Return `size` bytes, aligned to a cache line."""
        if self._at + size > self._chunk.size:
            self._chunk, self._at = raw(max(size, CHUNK), huge=True), 0
        piece = np.frombuffer(self._chunk.data, np.uint8, size, self._at)
        self._at += -(-size // ALIGN) * ALIGN
        self.count(piece)
        return piece

    def count(self, piece: Bytes) -> None:
        """Count a piece of other memory, such as a mapped file, until it is freed."""
        self.used += piece.size
        weakref.finalize(piece, self._give_back, piece.size).atexit = False

    def _give_back(self, size: int) -> None:
        self.used -= size


KEPT = 40 << 20  # bytes; larger arrays are not kept for reuse


def size_class(size: int) -> int:
    """Round a size up to one of eight steps per power of two, so that there are few different sizes."""
    step = max(4096, (1 << size.bit_length()) >> 4)
    return max(-(-size // step), 1) * step


class Scratch:
    """Allocator for float32 results. It reuses the memory of arrays that are no longer referenced.

    A step therefore touches few pages, and a recording of it stays small. Arrays larger than KEPT return to
    the system.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[memoryview]] = defaultdict(list)
        self.held = 0

    def new(self, *shape: int) -> F32:
        """Return an array with arbitrary contents."""
        count = int(np.prod(shape, dtype=np.int64))
        size = size_class(4 * count)
        if size > KEPT:  # from a long prompt or calibration; never recorded
            return np.frombuffer(raw(size, huge=True), np.float32, count).reshape(shape)
        free = self._free[size]
        try:
            area = free.pop()
        except IndexError:
            # Rows of a product are a page or more away from each other. With huge pages a product of many rows is
            # 3 % faster.
            area = raw(size, huge=size >= HUGE).data
            self.held += size
        # Views of `a` keep `a` alive (its base is not an ndarray), so it is freed with the last of them.
        a = np.frombuffer(area, np.float32, count)
        weakref.finalize(a, free.append, area).atexit = False
        return a.reshape(shape)
