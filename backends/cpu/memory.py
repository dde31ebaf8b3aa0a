"""Where do weights, caches and intermediate results live?

All of it is anonymous memory straight from the system: aligned, in huge pages where it is large and the
system has them, and never touched before it is used.
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
CHUNK = 64 << 20  # weights share chunks of this size: huge pages hold many small matrices
ALIGN = 64


def raw(size: int, huge: bool = False) -> Bytes:
    """Zeroed memory of `size` bytes, aligned to 64 bytes; huge: to 2 MiB, and what fills huge pages advised to be such."""
    if not huge:
        return np.frombuffer(_anonymous(max(size, 1)), np.uint8)[:size]
    area = _anonymous(size + HUGE)
    whole = np.frombuffer(area, np.uint8)
    start = -address(whole) % HUGE
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= HUGE:
        try:
            area.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE * HUGE)
        except OSError:  # a kernel without them: ordinary pages do
            pass
    return whole[start : start + size]


def _anonymous(size: int) -> mmap.mmap:
    """Private to this process. Python's default is shared memory, to which most Linux systems give no huge pages."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)  # Windows


def address(a: npt.NDArray[Any]) -> int:
    """Of an array's first element."""
    return int(a.ctypes.data)


class Arena:
    """Memory for weights, handed out piece after piece; a chunk is freed when its last piece is."""

    def __init__(self) -> None:
        self._chunk = raw(0)
        self._at = 0
        self.used = 0

    def take(self, size: int) -> Bytes:
        """`size` bytes, aligned to a cache line."""
        if self._at + size > self._chunk.size:
            self._chunk, self._at = raw(max(size, CHUNK), huge=True), 0
        piece = np.frombuffer(self._chunk.data, np.uint8, size, self._at)
        self._at += -(-size // ALIGN) * ALIGN
        self.count(piece)
        return piece

    def count(self, piece: Bytes) -> None:
        """Count a piece of other memory, a mapped file say, as long as it lives."""
        self.used += piece.size
        weakref.finalize(piece, self._give_back, piece.size).atexit = False

    def _give_back(self, size: int) -> None:
        self.used -= size


KEPT = 40 << 20  # bytes


def size_class(size: int) -> int:
    """Bytes to take for `size`: eight steps from one power of two to the next, so that few sizes are kept apart."""
    step = max(4096, (1 << size.bit_length()) >> 4)
    return max(-(-size // step), 1) * step


class Scratch:
    """Float32 arrays for results. Memory of an array that is no longer referenced serves the next one.

    So a step touches few pages, again and again, and a recording of its calls stays small. What is larger than KEPT
    goes back to the system.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[memoryview]] = defaultdict(list)
        self.held = 0

    def new(self, *shape: int) -> F32:
        """An array with arbitrary contents."""
        count = int(np.prod(shape, dtype=np.int64))
        size = size_class(4 * count)
        if size > KEPT:  # of a long prompt or of calibration; never recorded
            return np.frombuffer(raw(size, huge=True), np.float32, count).reshape(shape)
        free = self._free[size]
        try:
            area = free.pop()
        except IndexError:
            # Rows that a product stores lie a page and more apart: on huge pages a product of many rows is 3 % faster.
            area = raw(size, huge=size >= HUGE).data
            self.held += size
        # Views of `a` keep `a` alive (its own base is no ndarray), so it dies with the last of them.
        a = np.frombuffer(area, np.float32, count)
        weakref.finalize(a, free.append, area).atexit = False
        return a.reshape(shape)
