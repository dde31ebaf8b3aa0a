"""Issue a step in two halves of the layers, so that it is issued while the previous step runs.

A step writes its keys and values into the cache's arrays in place only if no other operation uses them when
MLX encodes the write. MLX copies an array with another user, here the attention of the previous step, which
is still running. A cache of 268 MB (Llama-3.2-1B after 8192 tokens) would be copied for every token. The
second step is therefore not encoded as a whole while the first runs, but one half later:

    device   | step n, lower half | step n, upper half | step n+1, lower half | step n+1, upper half |
    issued   | n, upper           | n+1, lower         | n+1, upper           | n+2, lower           |

When a half is encoded, the same layers of the previous step have been read, and the device still has half a
step of work. The layer whose attention is called identifies the half, so the graph needs no changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tinychat_mlx.backends.mlx.device import mx


class Pipeline:
    """The last issued halves. evaluating: context manager around every evaluation."""

    def __init__(self, evaluating: Callable[[], AbstractContextManager[None]]) -> None:
        self._evaluating = evaluating
        self._lower: Any = None  # of the last step, computed after its lower layers were read
        self._upper: Any = None  # the same for its upper layers
        self._writes = False  # whether the current step writes our caches; mlx-lm copies its own

    def writing(self) -> None:
        """Mark that the current step writes our caches."""
        self._writes = True

    def attending(self, q: Any, layer: int, layers: int) -> None:
        """Issue the lower half when the upper one starts. Called before each layer's attention."""
        self.writing()
        if layers < 2 or layer != layers // 2:
            return
        with self._evaluating():
            if self._lower is not None:
                mx.eval(self._lower)
            mx.async_eval(q)
        self._lower = q

    def issue(self, result: Any) -> Any:
        """Issue the rest of a step, whose result is given. Returns the result."""
        with self._evaluating():
            if self._writes and self._upper is not None:
                mx.eval(self._upper)
            mx.async_eval(result)
        self._upper, self._writes = result, False
        return result
