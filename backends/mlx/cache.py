"""KV cache on the device: written in place, read as a view, and doubled as a conversation grows.

A layer's k and v are (1, Hkv, held, D), with space for `held` tokens of the capacity. Zeroing the whole
capacity would take memory from other programs that few conversations need. What MLX cannot write in place
(see pipelining.py) it copies with all its space. The backend counts the missing part as used, so that no answer
runs out of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Cache, CacheShape

KV_BITS = "TINYCHAT_MLX_KV_BITS"  # 4 or 8: a PackedCache
SPAN = 256  # initial tokens that a cache has space for, and that a captured step reads; then doubled


@dataclass(frozen=True)
class CacheView:
    """The view that the rows of a step attend to: keys, values (1, Hkv, S, D), and the mask.

    k_at (S,) and q_at (T,) are positions. mask: None if every row sees every key, "causal", or a boolean (T,
    S).
    """

    keys: Any
    values: Any
    k_at: Any
    q_at: Any
    mask: Any
    packing: tuple[int, int] | None = (
        None  # (group size, bits) of keys and values that are (w, scales, biases)
    )


Parts = dict[str, tuple[int, Any]]  # name of an array -> values per head and token, dtype
Masked = tuple[tuple[int, int, int], CacheView | None]
NOTHING_MASKED: Masked = ((-1, -1, -1), None)


class MlxCache(Cache):
    """Keys and values of one conversation. Positions are Python numbers."""

    def __init__(self, shape: CacheShape, capacity: int, dtype: Any) -> None:
        super().__init__(shape, capacity)
        self._allocate(parts(shape, dtype))

    def _allocate(self, parts: Parts) -> None:
        self.held = self.span()
        # All stored arrays by name: (1, Hkv, held, ...), one per layer.
        # Zeros, not uninitialised memory: a masked key has weight 0, and 0 times NaN is NaN
        self.parts: dict[str, list[Any]] = {
            name: [mx.zeros((1, self.shape.num_key_value_heads, self.held, size), dtype)
                   for _ in range(self.shape.num_hidden_layers)]
            for name, (size, dtype) in parts.items()
        }  # fmt: skip
        self._masked: Masked = NOTHING_MASKED

    def span(self, more: int = 1) -> int:
        """Return the space for `more` tokens.

        It is a power of two, so that a cache is seldom copied and few programs serve all lengths of a
        captured step.
        """
        return min(self.capacity, max(SPAN, 1 << (self.length + more - 1).bit_length()))

    def reserve(self, more: int, evaluate: Callable[..., None]) -> None:
        """Grow to space for `more` tokens.

        `evaluate` (mx.eval) is called per array, so that the old one is freed.
        """
        held = self.span(more)
        if held <= self.held:
            return
        for part in self.parts.values():
            for layer in range(len(part)):
                _, heads, rows, size = part[layer].shape
                empty = mx.zeros((1, heads, held - rows, size), part[layer].dtype)
                part[layer] = mx.concatenate([part[layer], empty], axis=2)
                evaluate(part[layer])
        self.held = held

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(array.nbytes for part in self.parts.values() for array in part)

    @property
    def owed(self) -> int:
        """Bytes that the cache can still grow by, up to its capacity."""
        return self.nbytes // self.held * (self.capacity - self.held)

    @property
    def arrays(self) -> list[Any]:
        """All stored arrays, to be evaluated."""
        return [array for part in self.parts.values() for array in part]

    def read(self, start: int, end: int) -> dict[str, Any]:
        """Implement Backend.read_cache. The arrays are still on the device."""
        rows = {name: mx.concatenate([layer[..., start:end, :] for layer in part])
                for name, part in self.parts.items()}  # fmt: skip
        # NumPy has no bfloat16; its bits are returned as uint16
        return {name: x.view(mx.uint16) if x.dtype == mx.bfloat16 else x for name, x in rows.items()}

    def write(self, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Implement Backend.write_cache."""
        start, end = self.length, self.length + next(iter(rows.values())).shape[2]
        for name, part in self.parts.items():
            for layer, row in zip(part, mx.array(rows[name]), strict=True):
                layer[..., start:end, :] = row.view(layer.dtype)
        self.length = end

    def append(self, layer: int, k: Any, v: Any, window: int) -> CacheView:
        """Write k, v (1, Hkv, T, D) after the first `length` tokens. Returns what these rows see."""
        start, end = self.length, self.length + k.shape[2]
        low = max(0, start - window + 1) if window else 0
        keys, values = (self._put(name, layer, x, low) for name, x in (("k", k), ("v", v)))
        k_at, q_at, mask = self._positions(low, start, end, window)
        return CacheView(keys, values, k_at, q_at, mask)

    def _put(self, name: str, layer: int, rows: Any, low: int) -> Any:
        """Write rows (1, Hkv, T, ...) after the first `length` of a part.

        Returns tokens low to the last written.
        """
        held, start, end = self.parts[name][layer], self.length, self.length + rows.shape[2]
        assert end <= self.held, "space is reserved before a step"
        held[..., start:end, :] = rows.astype(held.dtype)
        return held[..., low:end, :]

    def _positions(self, low: int, start: int, end: int, window: int) -> tuple[Any, Any, Any]:
        """Return positions and mask, computed once per step for all layers of one window."""
        if self._masked[0] != (start, end, window) or self._masked[1] is None:
            k_at, q_at = mx.arange(low, end), mx.arange(start, end)
            mask: Any = None
            if end - start > 1:
                mask = seen(k_at, q_at, window) if window and end - low > window else "causal"
            self._masked = ((start, end, window), CacheView(None, None, k_at, q_at, mask))
        view = self._masked[1]
        assert view is not None
        return view.k_at, view.q_at, view.mask


class PackedCache(MlxCache):
    """Keys and values in 4 or 8 bits, in groups along a head.

    Contexts take less memory; attention is not fused.
    """

    def __init__(self, shape: CacheShape, capacity: int, dtype: Any, bits: int) -> None:
        """Raises BackendError if the head size is not a multiple of a group size."""
        Cache.__init__(self, shape, capacity)
        self.packing = group_of(shape), bits
        self._allocate(packed_parts(shape, dtype, bits))

    def append(self, layer: int, k: Any, v: Any, window: int) -> CacheView:
        start, end = self.length, self.length + k.shape[2]
        low = max(0, start - window + 1) if window else 0
        form = {"group_size": self.packing[0], "bits": self.packing[1]}
        keys, values = (
            tuple(self._put(f"{name}{i}", layer, part, low) for i, part in enumerate(mx.quantize(x, **form)))
            for name, x in (("k", k.astype(mx.float32)), ("v", v))
        )
        k_at, q_at, mask = self._positions(low, start, end, window)
        return CacheView(keys, values, k_at, q_at, mask, self.packing)


def group_of(shape: CacheShape) -> int:
    for group in (64, 32):
        if shape.head_dim % group == 0:
            return group
    raise BackendError(
        f"keys and values of {shape.head_dim} per head cannot be packed in groups of 32",
        where="mlx backend",
        remedy=f"unset {KV_BITS}",
    )


def parts(shape: CacheShape, dtype: Any) -> Parts:
    """Return the parts of an MlxCache."""
    return {"k": (shape.head_dim, dtype), "v": (shape.head_dim, dtype)}


def packed_parts(shape: CacheShape, dtype: Any, bits: int) -> Parts:
    """Return the parts of a PackedCache: words, scales, biases. Raises BackendError.

    Scales and biases of keys are float32, like scores.
    """
    groups, words = shape.head_dim // group_of(shape), (shape.head_dim * bits // 32, mx.uint32)
    each = {
        "k": (words, (groups, mx.float32), (groups, mx.float32)),
        "v": (words, (groups, dtype), (groups, dtype)),
    }
    return {f"{name}{i}": part for name, three in each.items() for i, part in enumerate(three)}


def bytes_per_token(shape: CacheShape, parts: Parts) -> int:
    each = sum(int(size * dtype.size) for size, dtype in parts.values())
    return shape.num_hidden_layers * shape.num_key_value_heads * each


class TracedCache(Cache):
    """An MlxCache inside a captured step of one row. The position is an array; shapes do not depend on it."""

    def __init__(self, shape: CacheShape, span: int, position: Any, k: list[Any], v: list[Any]) -> None:
        """k, v: an MlxCache's arrays as arguments of a program. position (1,) int32. span: keys to read."""
        super().__init__(shape, k[0].shape[2])
        self.at, self.k, self.v = position, list(k), list(v)
        self.k_at = mx.arange(span)
        self._masks: dict[int, Any] = {}

    def append(self, layer: int, k: Any, v: Any, window: int) -> CacheView:
        """Like MlxCache.append.

        Masked keys cost one byte each: Metal's one-query kernel skips them without reading.
        """
        span = self.k_at.shape[0]
        self.k[layer] = mx.slice_update(self.k[layer], k.astype(self.k[layer].dtype), self.at, axes=(2,))
        self.v[layer] = mx.slice_update(self.v[layer], v.astype(self.v[layer].dtype), self.at, axes=(2,))
        if window not in self._masks:
            self._masks[window] = seen(self.k_at, self.at, window)
        keys, values = self.k[layer][..., :span, :], self.v[layer][..., :span, :]
        return CacheView(keys, values, self.k_at, self.at, self._masks[window])


def seen(k_at: Any, q_at: Any, window: int) -> Any:
    """Return a boolean mask (T, S): keys not after the row and less than `window` before it (0: all)."""
    mask = k_at <= q_at[:, None]
    return mask & (k_at > q_at[:, None] - window) if window else mask
