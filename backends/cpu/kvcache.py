"""Where do the keys and values of a conversation lie? (kernels/op.h: SegmentArg.)"""

from __future__ import annotations

import numpy as np

from tinychat_mlx.backend import Cache, CacheShape
from tinychat_mlx.backends.cpu import library as c
from tinychat_mlx.backends.cpu.memory import address, raw

_CHUNK, _SPLIT = 256, 32  # as in kernels/attention.h


class CpuCache(Cache):
    """Keys and values of every layer, in float16; in float32 where exactness is asked for; or in int8.

    Memory is claimed for the whole capacity, but the system gives only the pages that were written.
    """

    def __init__(self, shape: CacheShape, capacity: int, kind: int) -> None:
        super().__init__(shape, capacity)
        self.kind = kind
        self.rows = -(-capacity // 64) * 64
        self.dim_pad = -(-shape.head_dim // 16) * 16
        item = {c.F16: 2, c.F32: 4, c.INT8: 1}[kind]
        self._keys = shape.num_key_value_heads * self.rows * shape.head_dim * item
        self._values = shape.num_key_value_heads * self.rows * self.dim_pad * item
        self._scales = shape.num_key_value_heads * self.rows * 4 if kind == c.INT8 else 0
        self._layer = self._keys + self._values + 2 * self._scales
        self.data = raw(shape.num_hidden_layers * self._layer)
        chunks = -(-self.rows // _CHUNK)
        self.partial = raw(shape.num_key_value_heads * chunks * _SPLIT * (self.dim_pad + 2) * 4)
        self.done = np.zeros(shape.num_key_value_heads, np.int32)

    def segment(self, layer: int, rows: int, length: int) -> c.CSegment:
        """One layer's part of a step; `length` is the address of an int64, the tokens held before it."""
        keys = address(self.data) + layer * self._layer
        values = keys + self._keys
        key_scales = values + self._values
        value_scales = key_scales + self._scales
        rest = address(self.partial), address(self.done)
        return c.CSegment(rows, self.rows, length, keys, values, key_scales, value_scales, *rest)
