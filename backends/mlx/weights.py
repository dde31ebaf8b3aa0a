"""Weights on the device: dense in the compute dtype, or integers in MLX's affine layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.backends.mlx.transfer import stacked
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.weights.weight import Array, Dense, Joined, Packed, Weight

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # supported by mx.quantized_matmul


@dataclass(frozen=True, eq=False)
class DenseHandle:
    """w (N, K), bias (N,) or None, in the compute dtype."""

    name: str
    shape: tuple[int, int]
    w: Any
    bias: Any

    def matmul(self, x: Any) -> Any:
        """x (T, K) -> (T, N)."""
        return x @ self.w.T if self.bias is None else mx.addmm(self.bias, x, self.w.T)

    def rows(self, ids: Any) -> Any:
        """Return rows as (T, K)."""
        return self.w[ids]


@dataclass(frozen=True, eq=False)
class PackedHandle:
    """w (N, K · bits / 32) uint32 as in the file; scales, biases (N, K / G) in the compute dtype."""

    name: str
    shape: tuple[int, int]
    w: Any
    scales: Any
    biases: Any
    bits: int
    group_size: int
    bias: Any

    def matmul(self, x: Any) -> Any:
        """x (T, K) -> (T, N). The weight stays packed."""
        y = mx.quantized_matmul(
            x, self.w, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits
        )
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Any) -> Any:
        """Return rows as (T, K)."""
        parts = (self.w[ids], self.scales[ids], self.biases[ids])
        return mx.dequantize(*parts, group_size=self.group_size, bits=self.bits)


MlxHandle = DenseHandle | PackedHandle


def nbytes_of(weight: Weight, itemsize: int) -> int:
    """Return the bytes of a weight packed by `pack`, in a compute dtype of `itemsize` bytes."""
    n, k = weight.shape
    if not isinstance(weight, Packed):
        return n * k * itemsize
    return n * k * weight.w_bit // 8 + 2 * itemsize * n * (k // min(weight.group_size, GROUPS[-1]))


def pack(weight: Weight, dtype: Any, share: bool = False) -> MlxHandle:
    """Copy a weight to the device without intermediate copies. share: as in transfer.stacked.

    Raises BackendError.
    """
    bias = None if weight.bias is None else mx.array(weight.bias).astype(dtype)
    arrays = arrays_of([weight], dtype, share)
    if isinstance(weight, Packed):
        w, scales, biases = arrays
        group = min(weight.group_size, GROUPS[-1])
        return PackedHandle(weight.name, weight.shape, w, scales, biases, weight.w_bit, group, bias)
    return DenseHandle(weight.name, weight.shape, arrays[0], bias)


def arrays_of(weights: Sequence[Weight], dtype: Any, share: bool) -> tuple[Any, ...]:
    """Stack weights of one form and one K along N -> (w,), or (w, scales, biases). Raises BackendError."""
    if isinstance(weights[0], Dense):
        return (stacked([w.w for w in weights if isinstance(w, Dense)], dtype, share),)
    packed = [w for w in weights if isinstance(w, Packed)]
    parts = [part for w in packed for part in (w.parts if isinstance(w, Joined) else (w,))]
    scales, biases = ends_of(parts, dtype, share)
    return stacked([p.qweight for p in parts], mx.uint32, share), scales, biases


def ends_of(parts: Sequence[Packed], dtype: Any, share: bool) -> tuple[Any, Any]:
    """Return scales and biases of parts of one form, stacked along N.

    Raises BackendError for an unsupported form.
    """
    first = parts[0]
    group = min(first.group_size, GROUPS[-1])
    if first.w_bit not in BITS or group not in GROUPS or first.group_size % group:
        raise BackendError(
            f"MLX cannot multiply {first.w_bit}-bit weights in groups of {first.group_size} "
            f"(bits {BITS}, groups of 32, 64 or multiples of 128)",
            where=first.name,
            remedy="use --backend cpu, or convert the model again",
        )
    sides: list[list[Array]] = [[p.scales for p in parts], [p.biases for p in parts]]
    if times := first.group_size // group - 1:  # the same numbers, repeated per 128 inputs
        sides = [[np.repeat(a, times + 1, axis=1) for a in side] for side in sides]
    scales, biases = (stacked(side, dtype, share) for side in sides)
    return scales, biases
