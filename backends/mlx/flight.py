"""One step runs on the device while the next is issued, in two halves of the layers.

A step writes its keys and values into the cache's own arrays only where nobody else uses them when MLX encodes the
write: MLX copies an array that has another user, here the attention of the step before, which is still running. A
cache of 268 MB (Llama-3.2-1B after 8192 tokens) would be copied for every token. So the second step is not encoded
whole while the first runs, but one half behind it:

    device   | step n, lower half | step n, upper half | step n+1, lower half | step n+1, upper half |
    issued   | n, upper           | n+1, lower         | n+1, upper           | n+2, lower           |

When a half is encoded, the same layers of the step before have been read, and the device has a half step left to
work on. The halves are told apart by the layer whose attention is asked for, so the graph need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tinychat_mlx.backends.mlx.device import mx


class Flight:
    """What was issued last. evaluating: what stands round every evaluation."""

    def __init__(self, evaluating: Callable[[], AbstractContextManager[None]]) -> None:
        self._evaluating = evaluating
        self._lower: Any = None  # of the last step: made after its lower layers were read, and
        self._upper: Any = None  # after its upper ones were
        self._writes = False  # whether the step being made writes caches of ours; mlx-lm copies its own

    def writing(self) -> None:
        """Called while a step is made that writes caches of ours."""
        self._writes = True

    def attending(self, q: Any, layer: int, layers: int) -> None:
        """Called before each layer's attention: issues the lower half when the upper one begins."""
        self.writing()
        if layers < 2 or layer != layers // 2:
            return
        with self._evaluating():
            if self._lower is not None:
                mx.eval(self._lower)
            mx.async_eval(q)
        self._lower = q

    def issue(self, result: Any) -> Any:
        """Issue the rest of a step, of which this is the result -> the result."""
        with self._evaluating():
            if self._writes and self._upper is not None:
                mx.eval(self._upper)
            mx.async_eval(result)
        self._upper, self._writes = result, False
        return result
