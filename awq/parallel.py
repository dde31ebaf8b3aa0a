"""Parallel work whose result does not depend on the number of threads.

A floating-point sum depends on its order. A multi-threaded BLAS chooses the order by its number of threads.
BLAS is therefore limited to one thread per call, and products are split here into blocks of a fixed size.
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

from tinychat_mlx.base import limits
from tinychat_mlx.weights.weight import F32

T = TypeVar("T")
R = TypeVar("R")
PIECE_BYTES = 1 << 19  # a float32 piece and the temporaries made from it fit a 2 MB L2 cache
BLOCK = 256  # rows or columns of a product per call
SMALL = 1 << 24  # multiplications that one thread finishes before a second one starts

_given: list[int] = []


def count() -> int:
    """Return the number of threads: the user's setting, else the number available to this process."""
    return _given[-1] if _given else limits.threads()


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """Context manager that sets the number of threads (None: no change) and limits BLAS to one thread."""
    _given.append(count() if threads is None else threads)
    try:
        with threadpool_limits(1, "blas"):
            yield
    finally:
        _given.pop()


def each(work: Callable[[T], R], pieces: Sequence[T]) -> list[R]:
    """Call `work` on every piece. Returns the results in order.

    The caller processes pieces too and waits only for pieces that another thread has started. So `work` may
    call `each` again: if all threads are busy, the caller processes the inner pieces. NumPy releases the GIL
    in its loops.
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
        # A cancelled task stays in the pool's queue until a thread is free. Clear the work so that it holds
        # no arrays.
        todo.clear()
    for helper in begun:
        helper.result()
    return [results.pop(i) for i in range(len(pieces))]


def over_rows(n: int, row_bytes: int, work: Callable[[slice], R]) -> list[R]:
    """Call `work` on consecutive slices of n rows that fit a core's cache. Returns the results in order."""
    return each(work, spans(n, max(1, PIECE_BYTES // max(row_bytes, 1))))


def spans(n: int, size: int) -> list[slice]:
    """Split n rows into consecutive slices of nearly equal length, at most `size`."""
    number = -(-n // size)
    edges = [n * i // number for i in range(number + 1)] if number else []
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def product(a: F32, b: F32, out: F32 | None = None) -> F32:
    """Return a (N, K) @ b (K, M) as (N, M), in `out` if it is given."""
    out = np.empty((a.shape[0], b.shape[1]), np.float32) if out is None else out
    _blocks(a, b, lambda rows, columns: np.matmul(a[rows], b[:, columns], out=out[rows, columns]))
    return out


def add_product(out: F32, a: F32, b: F32) -> None:
    """Compute out (N, M) += a (N, K) @ b (K, M)."""

    def add(rows: slice, columns: slice) -> None:
        out[rows, columns] += a[rows] @ b[:, columns]

    _blocks(a, b, add)


def _blocks(a: F32, b: F32, work: Callable[[slice, slice], object]) -> None:
    """Call `work` on the rows and columns of each block of a product. Blocks split the longer side."""
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
    """Return freed memory to the system, if the C library keeps it.

    glibc keeps arrays of up to 32 MB in every thread's arena. A layer frees some hundred arrays of all sizes.
    If they are kept, they are a quarter of the peak with llama-3.2-1b.
    """
    if (release := _malloc_trim()) is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    return found
