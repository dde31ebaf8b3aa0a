"""Weights on the device: dense in the compute dtype, integers packed as MLX's affine layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.errors import BackendError
from tinychat_mlx.weight import Dense, Packed, Weight

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what mx.quantized_matmul knows


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
        """-> (T, K)."""
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
        """x (T, K) -> (T, N); the weight stays packed."""
        y = mx.quantized_matmul(
            x, self.w, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits
        )
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Any) -> Any:
        """-> (T, K)."""
        parts = (self.w[ids], self.scales[ids], self.biases[ids])
        return mx.dequantize(*parts, group_size=self.group_size, bits=self.bits)


MlxHandle = DenseHandle | PackedHandle


def pack(weight: Weight, dtype: Any) -> MlxHandle:
    """Copy a weight to the device, once, straight from where it lies. Raises BackendError."""
    bias = None if weight.bias is None else mx.array(weight.bias).astype(dtype)
    if isinstance(weight, Dense):
        handle: MlxHandle = DenseHandle(weight.name, weight.shape, floats(weight.w, dtype), bias)
        mx.eval(handle.w)
    else:
        handle = _packed(weight, dtype, bias)
        mx.eval(handle.w, handle.scales, handle.biases)
    return handle


def _packed(weight: Packed, dtype: Any, bias: Any) -> PackedHandle:
    group, scales, biases = weight.group_size, weight.scales, weight.biases
    if group > 128 and group % 128 == 0:  # the same numbers, said once per 128 inputs
        scales, biases = (np.repeat(a, group // 128, axis=1) for a in (scales, biases))
        group = 128
    if weight.w_bit not in BITS or group not in GROUPS:
        raise BackendError(
            f"{weight.name}: MLX cannot multiply {weight.w_bit}-bit weights in groups of {weight.group_size} "
            f"(bits {BITS}, groups of 32, 64 or multiples of 128): use --backend cpu, or convert again"
        )
    w = mx.array(weight.qweight)
    return PackedHandle(
        weight.name, weight.shape, w, floats(scales, dtype), floats(biases, dtype), weight.w_bit, group, bias
    )


def floats(a: Any, dtype: Any) -> Any:
    """float16, float32 or bfloat16 bits (uint16) -> a device array of dtype."""
    x = mx.array(a)
    return (x.view(mx.bfloat16) if a.dtype == np.uint16 else x).astype(dtype)
