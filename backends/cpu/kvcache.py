"""KV cache of a conversation (kernels/op.h: SegmentArg)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.memory import address, raw
from tinychat_mlx.contract import Cache, CacheShape

_CHUNK, _SPLIT = 256, 32  # as in kernels/attention.h
_TILE = 16  # keys per tile, interleaved as in kernels/op.h
_TYPES: dict[int, type[np.generic]] = {c.F16: np.float16, c.F32: np.float32, c.INT8: np.int8}


def row_bytes(shape: CacheShape, kind: int) -> tuple[int, int, int]:
    """Return bytes per layer and token of keys, of values, and of the scales of both."""
    heads, item = shape.num_key_value_heads, np.dtype(_TYPES[kind]).itemsize
    return heads * shape.head_dim * item, heads * _padded(shape) * item, heads * 8 if kind == c.INT8 else 0


def _padded(shape: CacheShape) -> int:
    return -(-shape.head_dim // 16) * 16


class CpuCache(Cache):
    """Keys and values of every layer in float16, float32 (exact mode) or int8.

    Memory is reserved for the whole capacity, but the system commits only the pages that are written.
    """

    def __init__(self, shape: CacheShape, capacity: int, kind: int) -> None:
        super().__init__(shape, capacity)
        self.kind = kind
        self.rows = -(-capacity // 64) * 64
        self.dim_pad = _padded(shape)
        self._keys, self._values, scales = (self.rows * n for n in row_bytes(shape, kind))
        self._scales = scales // 2
        self._layer = self._keys + self._values + 2 * self._scales
        self.data = raw(shape.num_hidden_layers * self._layer)
        chunks = -(-self.rows // _CHUNK)
        self.partial = raw(shape.num_key_value_heads * chunks * _SPLIT * (self.dim_pad + 2) * 4)
        self.done = np.zeros(shape.num_key_value_heads, np.int32)

    def read(self, start: int, end: int) -> dict[str, npt.NDArray[Any]]:
        """Implement Backend.read_cache.

        Returns "k" and "v" (layers, Hkv, tokens, D), and with int8 also "k_scale" and "v_scale".
        """
        first = start // _TILE  # keys of a tile are interleaved, so whole tiles are transposed
        tiles = self._keys_of()[:, :, first : -(-end // _TILE)].swapaxes(3, 4)
        layers, heads, count = tiles.shape[:3]
        keys = tiles.reshape(layers, heads, count * _TILE, self.shape.head_dim)
        rows = {"k": keys[:, :, start - first * _TILE : end - first * _TILE]}
        rows |= {name: part[:, :, start:end] for name, part in self._others().items()}
        return {name: np.array(part, order="C") for name, part in rows.items()}

    def write(self, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Implement Backend.write_cache."""
        start, end = self.length, self.length + rows["k"].shape[2]
        first = start - start % _TILE
        keys = np.concatenate([self.read(first, start)["k"], rows["k"]], 2)
        surplus = -keys.shape[2] % _TILE  # values beyond `length` are undefined
        keys = np.pad(keys, ((0, 0), (0, 0), (0, surplus), (0, 0)))
        tiles = keys.reshape(*keys.shape[:2], -1, _TILE, self.shape.head_dim).swapaxes(3, 4)
        self._keys_of()[:, :, first // _TILE : first // _TILE + tiles.shape[2]] = tiles
        for name, part in self._others().items():
            part[:, :, start:end] = rows[name]
        self.length = end

    def _view(self, offset: int, dtype: type[np.generic], *sizes: int) -> npt.NDArray[Any]:
        """Return a view (layers, Hkv, *sizes) of one part of every layer."""
        item = np.dtype(dtype).itemsize
        shape = (self.shape.num_hidden_layers, self.shape.num_key_value_heads, *sizes)
        inner = [item * int(np.prod(shape[i + 1 :])) for i in range(1, len(shape))]
        view: npt.NDArray[Any] = np.ndarray(shape, dtype, self.data.data, offset, (self._layer, *inner))
        return view

    def _keys_of(self) -> npt.NDArray[Any]:
        """Return the keys (layers, Hkv, tiles, D, 16)."""
        return self._view(0, _TYPES[self.kind], self.rows // _TILE, self.shape.head_dim, _TILE)

    def _others(self) -> dict[str, npt.NDArray[Any]]:
        """Return the parts that are stored row by row: (layers, Hkv, rows, …)."""
        values = self._view(self._keys, _TYPES[self.kind], self.rows, self.dim_pad)
        parts = {"v": values[..., : self.shape.head_dim]}
        if self._scales:
            for i, name in enumerate(("k_scale", "v_scale")):
                parts[name] = self._view(self._keys + self._values + i * self._scales, np.float32, self.rows)
        return parts

    def segment(self, layer: int, rows: int, length: int) -> c.CSegment:
        """Return one layer's part of a step.

        `length` is the address of an int64, the tokens held before the step.
        """
        keys = address(self.data) + layer * self._layer
        values = keys + self._keys
        key_scales = values + self._values
        value_scales = key_scales + self._scales
        rest = address(self.partial), address(self.done)
        return c.CSegment(rows, self.rows, length, keys, values, key_scales, value_scales, *rest)
