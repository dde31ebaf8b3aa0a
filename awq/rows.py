"""Work over the rows of a weight matrix in pieces that stay in a core's cache, on all threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from tinychat_mlx.awq import threads

R = TypeVar("R")
PIECE_BYTES = 1 << 19  # a float32 piece and the few temporaries made from it fit a 2 MB L2


def over_rows(n: int, row_bytes: int, work: Callable[[slice], R]) -> list[R]:
    """Call work on consecutive slices of n rows and collect the results in order.

    NumPy releases the interpreter lock inside its loops, so threads help; the pieces do not depend on
    how many there are, so neither does the result.
    """
    size = max(1, PIECE_BYTES // row_bytes)
    pieces = [slice(at, min(at + size, n)) for at in range(0, n, size)]
    if len(pieces) == 1:
        return [work(pieces[0])]
    return list(_pool(threads.count()).map(work, pieces))


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, "awq")
