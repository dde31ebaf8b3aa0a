"""Reference implementation of every operation in plain NumPy float32. Other backends are tested against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.contract import Attention, Backend, Cache, CacheShape, Device, Memory, Norm, Rope, Step
from tinychat_mlx.weights.weight import F32, Weight, to_float32

SCORES = 3  # arrays (heads, rows, tokens) of float32 that attention holds at once


class ReferenceHandle:
    """A weight converted to float32."""

    def __init__(self, weight: Weight) -> None:
        self.name, self.shape, self.bias = weight.name, weight.shape, weight.bias
        self.w = weight.to_float32()


class ReferenceCache(Cache):
    """Keys and values (layers, capacity, Hkv, D) in float32."""

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        super().__init__(shape, capacity)
        size = (shape.num_hidden_layers, capacity, shape.num_key_value_heads, shape.head_dim)
        self.k, self.v = np.empty(size, np.float32), np.empty(size, np.float32)


class ReferenceBackend(Backend):
    """Runs on every machine with NumPy."""

    name = "reference"

    def __init__(self, exact: bool = True, threads: int | None = None) -> None:
        """Accept the arguments of every backend and ignore them: always exact, NumPy chooses its threads."""
        self._held = 0

    def weight_bytes(self, weight: Weight) -> int:
        return 4 * weight.shape[0] * weight.shape[1]

    def kv_bytes(self, shape: CacheShape) -> int:
        return shape.bytes_per_token(4)

    def loading_bytes(self, largest: int) -> int:
        return 4 * largest

    def score_bytes(self, heads: int, rows: int) -> int:
        return SCORES * 4 * heads * rows

    def put(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array if array.dtype.kind in "iu" and array.dtype != np.uint16 else to_float32(array)

    def ids(self, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        return np.asarray(ids, np.int32)

    def pack(self, weight: Weight) -> ReferenceHandle:
        handle = ReferenceHandle(weight)
        self._held += handle.w.nbytes
        return handle

    def new_cache(self, shape: CacheShape, capacity: int) -> ReferenceCache:
        return ReferenceCache(shape, capacity)

    def read_cache(self, cache: Cache, start: int, end: int) -> dict[str, npt.NDArray[Any]]:
        assert isinstance(cache, ReferenceCache)
        return {
            "k": cache.k[:, start:end].swapaxes(1, 2).copy(),
            "v": cache.v[:, start:end].swapaxes(1, 2).copy(),
        }

    def write_cache(self, cache: Cache, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        assert isinstance(cache, ReferenceCache)
        start, end = cache.length, cache.length + arrays["k"].shape[2]
        cache.k[:, start:end], cache.v[:, start:end] = arrays["k"].swapaxes(1, 2), arrays["v"].swapaxes(1, 2)
        cache.length = end

    def embed(self, table: Any, ids: npt.NDArray[np.int32]) -> F32:
        rows: F32 = table.w[ids]
        return rows

    def linear(self, x: F32, w: Any) -> F32:
        y: F32 = x @ w.w.T
        if w.bias is not None:
            y += w.bias
        return y

    def norm(self, x: F32, norm: Norm) -> F32:
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        variance = np.square(x).mean(-1, keepdims=True)
        y: F32 = x / np.sqrt(variance + np.float32(norm.eps)) * norm.weight
        return y if norm.bias is None else y + norm.bias

    def rope(self, x: F32, rope: Rope, step: Step) -> F32:
        n = 2 * len(rope.inv_freq)
        angle = step.positions.astype(np.float32)[:, None, None] * rope.inv_freq
        cos, sin = np.cos(angle) * np.float32(rope.factor), np.sin(angle) * np.float32(rope.factor)
        y: F32 = x.copy()
        at = (slice(0, n, 2), slice(1, n, 2)) if rope.interleaved else (slice(n // 2), slice(n // 2, n))
        a, b = x[..., at[0]], x[..., at[1]]
        y[..., at[0]], y[..., at[1]] = a * cos - b * sin, a * sin + b * cos
        return y

    def attention(self, q: F32, k: F32, v: F32, spec: Attention, step: Step) -> F32:
        y, row = np.empty((q.shape[0], q.shape[1] * v.shape[2]), np.float32), 0
        for segment in step.segments:
            cache, rows = segment.cache, slice(row, row + segment.rows)
            assert isinstance(cache, ReferenceCache)
            start, end = cache.length, cache.length + segment.rows
            cache.k[spec.layer, start:end], cache.v[spec.layer, start:end] = k[rows], v[rows]
            keys, values = cache.k[spec.layer, :end], cache.v[spec.layer, :end]
            y[rows] = attend(q[rows], keys, values, spec).reshape(segment.rows, -1)
            row += segment.rows
        return y

    def act(self, x: F32, kind: str) -> F32:
        return ACTIVATIONS[kind](x)

    def glu(self, gate: F32, up: F32, kind: str) -> F32:
        return self.act(gate, kind) * up

    def add(self, a: F32, b: F32, scale: float = 1.0) -> F32:
        y: F32 = a + b * np.float32(scale)
        return y

    def scale(self, x: F32, factor: float) -> F32:
        y: F32 = x * np.float32(factor)
        return y

    def softcap(self, x: F32, cap: float) -> F32:
        y: F32 = np.tanh(x / np.float32(cap)) * np.float32(cap)
        return y

    def to_host(self, x: F32) -> F32:
        return np.array(x, np.float32)

    def memory(self) -> Memory:
        return Memory(self._held, self._held, 0)

    def describe(self) -> Device:
        return Device("reference", "NumPy", f"numpy {np.__version__}, float32")


def attend(q: F32, keys: F32, values: F32, spec: Attention) -> F32:
    """Compute causal attention of the last T positions: q (T, H, D), keys, values (S, Hkv, D) -> (T, H, D)."""
    rows, heads, _ = q.shape
    length, kv_heads, _ = keys.shape
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, -1)  # query head h reads kv head h // n_rep
    scores = np.einsum("tgrd,sgd->grts", grouped, keys) * np.float32(spec.scale)
    if spec.softcap:
        scores = np.tanh(scores / np.float32(spec.softcap)) * np.float32(spec.softcap)
    q_at, k_at = np.arange(length - rows, length)[:, None], np.arange(length)[None]
    if spec.alibi is not None:
        slopes = np.asarray(spec.alibi, np.float32).reshape(kv_heads, -1, 1, 1)
        scores = scores + slopes * (k_at - q_at).astype(np.float32)
    seen = k_at <= q_at
    if spec.window:
        seen &= k_at > q_at - spec.window
    scores = np.where(seen, scores, np.float32(-np.inf))
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y: F32 = np.einsum("grts,sgd->tgrd", p, values)
    return y.reshape(rows, heads, -1)


def _silu(x: F32) -> F32:
    y: F32 = x / (1 + np.exp(-np.clip(x, -80, None)))  # exp(80) is finite in float32; x/(1 + e^80) is 0
    return y


def _gelu(x: F32) -> F32:
    from math import erf  # NumPy has no erf

    y: F32 = (0.5 * x * (1 + np.vectorize(erf, otypes=[np.float64])(x / 2**0.5))).astype(np.float32)
    return y


def _gelu_tanh(x: F32) -> F32:
    y: F32 = 0.5 * x * (1 + np.tanh(np.float32(0.7978845608028654) * (x + 0.044715 * x * x * x)))
    return y


ACTIVATIONS: dict[str, Callable[[F32], F32]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
}
