"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Where the C library keeps freed arrays for later (glibc: up to 32 MB each, in every thread's arena): let go.

    A layer frees some hundred arrays of all sizes; kept, they are a quarter of the peak with llama-3.2-1b.
    """
    if (release := _release()) is not None:
        release(0)


@functools.cache
def _release() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    return found
