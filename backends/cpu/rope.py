"""Tables of cosines and sines for RoPE."""

from __future__ import annotations

import numpy as np

from tinychat_mlx.backends.cpu.memory import raw
from tinychat_mlx.contract import Rope

_AHEAD = 256  # positions computed at a time while decoding


class CosSinTable:
    """R/2 cosines and R/2 sines per position up to a capacity, computed when first needed."""

    def __init__(self, rope: Rope, capacity: int) -> None:
        self.rope, self.capacity, self._filled = rope, capacity, 0
        self.half = int(rope.inv_freq.shape[0])
        self.data = raw(capacity * 2 * self.half * 4).view(np.float32).reshape(capacity, 2, self.half)

    def reach(self, count: int) -> None:
        """Compute positions 0..count - 1.

        The angle is a float32 product, as in other backends; its cosine is float64.
        """
        if count <= self._filled:
            return
        start, end = self._filled, min(self.capacity, max(count, self._filled + _AHEAD))
        angles = np.arange(start, end, dtype=np.float32)[:, None] * self.rope.inv_freq
        self.data[start:end, 0] = np.cos(angles, dtype=np.float64) * self.rope.factor
        self.data[start:end, 1] = np.sin(angles, dtype=np.float64) * self.rope.factor
        self._filled = end
