"""How many threads quantising takes: as many as the user gave, else one for each core this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_given: list[int] = []


def count() -> int:
    if _given:
        return _given[-1]
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """While this lasts, NumPy's products and our own work take so many threads; None: what they take anyway."""
    if threads is None:
        yield
        return
    _given.append(threads)
    try:
        with threadpool_limits(threads, "blas"):
            yield
    finally:
        _given.pop()
