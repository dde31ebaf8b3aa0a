"""How many threads quantising takes: as many as the user gave, else as many as this process may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

from tinychat_mlx import limits

_given: list[int] = []


def count() -> int:
    return _given[-1] if _given else limits.threads()


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
