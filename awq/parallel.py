"""Work on all threads whose result does not depend on how many there are.

A sum in floating point depends on its order. A BLAS library that splits a product among its threads chooses the
order by their number, so it gets one thread for each call, and the product is split here, into blocks of a fixed size.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from tinychat_mlx import limits
from tinychat_mlx.weight import F32

T = TypeVar("T")
R = TypeVar("R")
PIECE_BYTES = 1 << 19  # a float32 piece and the few temporaries made from it fit a 2 MB L2
BLOCK = 256  # rows or columns of a product that one call computes
SMALL = 1 << 24  # multiplications of a product that one thread finishes before a second has begun

_given: list[int] = []


def count() -> int:
    """Threads to use: as many as the user gave, else as many as this process may use."""
    return _given[-1] if _given else limits.threads()


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """Inside, work takes this many threads (None: as many as the process may use), BLAS one for each call."""
    _given.append(count() if threads is None else threads)
    try:
        with threadpool_limits(1, "blas"):
            yield
    finally:
        _given.pop()


def each(work: Callable[[T], R], pieces: Sequence[T]) -> list[R]:
    """Call work on every piece -> the results in order.

    The caller takes pieces too and waits only for those that another thread has begun. So work may call this again:
    with all threads busy, the caller does the inner pieces itself. NumPy releases the interpreter lock in its loops.
    """
    results: dict[int, R] = {}
    turns, lock, todo = iter(enumerate(pieces)), threading.Lock(), [work]

    def share() -> None:
        while True:
            with lock:
                i, piece = next(turns, (-1, None))
            if i < 0:
                return
            results[i] = todo[0](piece)  # type: ignore[arg-type]

    helpers = min(count(), len(pieces)) - 1
    begun = [_pool(count() - 1).submit(share) for _ in range(helpers)]
    try:
        share()
    finally:
        begun = [helper for helper in begun if not helper.cancel()]
        for helper in begun:
            helper.exception()
        # What is cancelled waits in the pool's queue until a thread is free, and must not hold arrays meanwhile.
        todo.clear()
    for helper in begun:
        helper.result()
    return [results.pop(i) for i in range(len(pieces))]


def over_rows(n: int, row_bytes: int, work: Callable[[slice], R]) -> list[R]:
    """Call work on consecutive slices of n rows, small enough for a core's cache -> the results in order."""
    return each(work, spans(n, max(1, PIECE_BYTES // max(row_bytes, 1))))


def spans(n: int, size: int) -> list[slice]:
    """-> consecutive slices of n rows, as equal as can be, of at most this size."""
    number = -(-n // size)
    edges = [n * i // number for i in range(number + 1)] if number else []
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def product(a: F32, b: F32) -> F32:
    """a (N, K) @ b (K, M) -> (N, M)."""
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    _blocks(a, b, lambda rows, columns: np.matmul(a[rows], b[:, columns], out=out[rows, columns]))
    return out


def add_product(out: F32, a: F32, b: F32) -> None:
    """out (N, M) += a (N, K) @ b (K, M)."""

    def add(rows: slice, columns: slice) -> None:
        out[rows, columns] += a[rows] @ b[:, columns]

    _blocks(a, b, add)


def _blocks(a: F32, b: F32, work: Callable[[slice, slice], object]) -> None:
    """Call work on the rows and columns of each block of a product; blocks lie across its longer side."""
    rows, columns = a.shape[0], b.shape[1]
    if a.size * columns < SMALL:
        work(slice(rows), slice(columns))
    elif rows > columns:
        each(lambda part: work(part, slice(columns)), spans(rows, BLOCK))
    else:
        each(lambda part: work(slice(rows), part), spans(columns, BLOCK))


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, "awq")


def trim() -> None:
    """Give memory that was freed back to the system, where the C library keeps it.

    glibc keeps arrays of up to 32 MB in every thread's arena. A layer frees some hundred arrays of all sizes: kept,
    they are a quarter of the peak with llama-3.2-1b.
    """
    if (release := _malloc_trim()) is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    return found
