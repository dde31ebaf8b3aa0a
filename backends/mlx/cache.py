"""Keys and values on the device: fixed capacity, written in place, read as a view.

A layer's k and v are (1, Hkv, capacity, D). The whole capacity is taken at once: a cache that grows
is copied at every growth, and may meet the end of memory in the middle of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from tinychat_mlx.backend import Cache, CacheShape
from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.errors import BackendError

KV_BITS = "TINYCHAT_MLX_KV_BITS"  # 4 or 8: a PackedCache
SPAN = 256  # the least number of keys a captured step looks at; doubled as the conversation grows


@dataclass(frozen=True)
class View:
    """What the rows of a step attend to: keys, values (1, Hkv, S, D), and who sees whom.

    k_at (S,) and q_at (T,) are positions. mask: None where every row sees every key, "causal", or a
    boolean (T, S).
    """

    keys: Any
    values: Any
    k_at: Any
    q_at: Any
    mask: Any
    packing: tuple[int, int] | None = (
        None  # (group size, bits) of keys and values that are (w, scales, biases)
    )


Masked = tuple[tuple[int, int, int], View | None]
NOTHING_MASKED: Masked = ((-1, -1, -1), None)


class MlxCache(Cache):
    """One conversation's keys and values; positions are Python numbers."""

    def __init__(self, shape: CacheShape, capacity: int, dtype: Any) -> None:
        super().__init__(shape, capacity)
        size = (1, shape.num_key_value_heads, capacity, shape.head_dim)
        # Zeros, not garbage: a masked key has weight 0, and 0 times a NaN is a NaN
        self.k: list[Any] = [mx.zeros(size, dtype) for _ in range(shape.num_hidden_layers)]
        self.v: list[Any] = [mx.zeros(size, dtype) for _ in range(shape.num_hidden_layers)]
        self._masked: Masked = NOTHING_MASKED

    def span(self) -> int:
        """Keys a captured step must look at: a power of two, so that few programs serve all lengths."""
        return min(self.capacity, max(SPAN, 1 << self.length.bit_length()))

    def parts(self) -> dict[str, list[Any]]:
        """Everything that is held of a token, by name: arrays (1, Hkv, capacity, …), one a layer."""
        return {"k": self.k, "v": self.v}

    def read(self, start: int, end: int) -> dict[str, Any]:
        """As Backend.read_cache, still on the device."""
        rows = {name: mx.concatenate([layer[..., start:end, :] for layer in part])
                for name, part in self.parts().items()}  # fmt: skip
        # NumPy has no bfloat16: its bits stand for it
        return {name: x.view(mx.uint16) if x.dtype == mx.bfloat16 else x for name, x in rows.items()}

    def write(self, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """As Backend.write_cache."""
        start, end = self.length, self.length + next(iter(rows.values())).shape[2]
        for name, part in self.parts().items():
            for layer, row in zip(part, mx.array(rows[name]), strict=True):
                layer[..., start:end, :] = row.view(layer.dtype)
        self.length = end

    def append(self, layer: int, k: Any, v: Any, window: int) -> View:
        """Write k, v (1, Hkv, T, D) behind the first `length` -> what these rows see."""
        start, rows = self.length, k.shape[2]
        end = start + rows
        self.k[layer][..., start:end, :] = k.astype(self.k[layer].dtype)
        self.v[layer][..., start:end, :] = v.astype(self.v[layer].dtype)
        low = max(0, start - window + 1) if window else 0
        keys, values = self.k[layer][..., low:end, :], self.v[layer][..., low:end, :]
        k_at, q_at, mask = self._positions(low, start, end, window)
        return View(keys, values, k_at, q_at, mask)

    def _positions(self, low: int, start: int, end: int, window: int) -> tuple[Any, Any, Any]:
        """Positions and mask, made once a step for all layers of one window."""
        if self._masked[0] != (start, end, window) or self._masked[1] is None:
            k_at, q_at = mx.arange(low, end), mx.arange(start, end)
            mask: Any = None
            if end - start > 1:
                mask = seen(k_at, q_at, window) if window and end - low > window else "causal"
            self._masked = ((start, end, window), View(None, None, k_at, q_at, mask))
        view = self._masked[1]
        assert view is not None
        return view.k_at, view.q_at, view.mask


class PackedCache(MlxCache):
    """Keys and values in 4 or 8 bits, in groups along a head: longer contexts in less memory, no fused attention."""

    def __init__(self, shape: CacheShape, capacity: int, dtype: Any, bits: int) -> None:
        """Raises BackendError for a head that has no whole groups."""
        Cache.__init__(self, shape, capacity)
        self.packing = group_of(shape), bits
        rows, groups = (1, shape.num_key_value_heads, capacity), shape.head_dim // self.packing[0]
        parts = [((*rows, shape.head_dim * bits // 32), mx.uint32), *[((*rows, groups), dtype)] * 2]
        layers = range(shape.num_hidden_layers)
        self.k = [[mx.zeros(*part) for part in parts] for _ in layers]
        self.v = [[mx.zeros(*part) for part in parts] for _ in layers]
        self._masked = NOTHING_MASKED

    def parts(self) -> dict[str, list[Any]]:
        return {f"{name}{i}": [layer[i] for layer in held]
                for name, held in (("k", self.k), ("v", self.v)) for i in range(3)}  # fmt: skip

    def _pack(self, x: Any) -> list[Any]:
        return list(mx.quantize(x, group_size=self.packing[0], bits=self.packing[1]))

    def append(self, layer: int, k: Any, v: Any, window: int) -> View:
        start, end = self.length, self.length + k.shape[2]
        low = max(0, start - window + 1) if window else 0
        shown = []
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            for part, packed in zip(kept, self._pack(new), strict=True):
                part[..., start:end, :] = packed.astype(part.dtype)
            shown.append(tuple(part[..., low:end, :] for part in kept))
        k_at, q_at, mask = self._positions(low, start, end, window)
        return View(shown[0], shown[1], k_at, q_at, mask, self.packing)


def group_of(shape: CacheShape) -> int:
    for group in (64, 32):
        if shape.head_dim % group == 0:
            return group
    raise BackendError(
        f"keys and values of {shape.head_dim} a head cannot be packed in groups of 32: unset {KV_BITS}"
    )


class TracedCache(Cache):
    """The same inside a captured step of one row: the position is an array, shapes do not depend on it."""

    def __init__(self, shape: CacheShape, span: int, position: Any, k: list[Any], v: list[Any]) -> None:
        """k, v: an MlxCache's arrays as a program's arguments; position (1,) int32; looks at `span` keys."""
        super().__init__(shape, k[0].shape[2])
        self.at, self.k, self.v = position, list(k), list(v)
        self.k_at = mx.arange(span)
        self._masks: dict[int, Any] = {}

    def append(self, layer: int, k: Any, v: Any, window: int) -> View:
        """As MlxCache.append. Masked keys cost a byte: Metal's one-query kernel skips them unread."""
        span = self.k_at.shape[0]
        self.k[layer] = mx.slice_update(self.k[layer], k.astype(self.k[layer].dtype), self.at, axes=(2,))
        self.v[layer] = mx.slice_update(self.v[layer], v.astype(self.v[layer].dtype), self.at, axes=(2,))
        if window not in self._masks:
            self._masks[window] = seen(self.k_at, self.at, window)
        keys, values = self.k[layer][..., :span, :], self.v[layer][..., :span, :]
        return View(keys, values, self.k_at, self.at, self._masks[window])


def seen(k_at: Any, q_at: Any, window: int) -> Any:
    """-> boolean (T, S): keys not later than the row and less than `window` before it (0: all)."""
    mask = k_at <= q_at[:, None]
    return mask & (k_at > q_at[:, None] - window) if window else mask
