"""An 8-bit weight stored as two 4-bit weights, so that a head can be read by its upper halves only (head.py).

An 8-bit code is |uuuu|llll|, its weight 16 s u + s l + b. Each plane is packed like MLX's 4-bit weights:

    word c:  | 8c+7 | 8c+6 | ... | 8c+1 | 8c |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat_mlx.backends.mlx import cost
from tinychat_mlx.backends.mlx.device import mx

LEAST_ROWS = 1 << 15  # a vocabulary has more; a smaller weight is read faster than three kernels are launched
BLOCK = 1 << 12  # rows split at once: some megabytes

Fuse = Callable[[str, Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class SplitHandle:
    """upper, lower (N, K / 8) uint32; scales, biases (N, K / G) of the 8-bit weight, in the compute dtype."""

    name: str
    shape: tuple[int, int]
    upper: Any
    lower: Any
    scales: Any
    biases: Any
    group_size: int
    join: Callable[[Any, Any], Any]  # `joined`, compiled to one kernel on Metal

    def matmul(self, x: Any) -> Any:
        """x (T, K) -> (T, N), the sum of two stock products. 16 s is exact; the products and sum are rounded."""
        form: dict[str, Any] = {"transpose": True, "group_size": self.group_size, "bits": 4}
        upper = mx.quantized_matmul(x, self.upper, 16 * self.scales, self.biases, **form)
        return upper + mx.quantized_matmul(x, self.lower, self.scales, mx.zeros_like(self.biases), **form)

    def rows(self, ids: Any) -> Any:
        """Return (T, K), bit-identical to the 8-bit weight, which may be the embedding too."""
        words = self.join(self.upper[ids].view(mx.uint16), self.lower[ids].view(mx.uint16))
        return mx.dequantize(words, self.scales[ids], self.biases[ids], group_size=self.group_size, bits=8)

    def left_out(self, share: float) -> float:
        """Return the bytes saved per token if the lower halves of this share of the tiles are read."""
        size = self.scales.dtype.size
        whole = self.upper.nbytes + self.lower.nbytes + self.scales.nbytes + self.biases.nbytes
        return float(whole - cost.halved_bytes(*self.shape, self.group_size, share, size))


def key_of(shape: tuple[int, int], group_size: int, dtype: Any) -> str:
    """Return a measurement's key: "head 128256x2048 int8 g128 float16"."""
    name = str(dtype).removeprefix("mlx.core.")
    return f"head {shape[0]}x{shape[1]} int8 g{group_size} {name}"


def suits(shape: tuple[int, int], bits: int, biased: bool) -> bool:
    """Return whether a packed weight may be stored in halves."""
    return bits == 8 and not biased and shape[0] >= LEAST_ROWS


def halved(name: str, words: Any, scales: Any, biases: Any, fuse: Fuse) -> SplitHandle:
    """Split words (N, K / 4) uint32 of four 8-bit codes each, from NumPy (a mapped file) or the device.

    They are split block by block, so the only memory needed is that of the planes. fuse(name, f): f as one
    kernel.
    """
    n, of_a_row = words.shape
    planes = [mx.zeros((n, of_a_row // 2), mx.uint32) for _ in range(2)]
    mx.eval(planes)
    ways = [fuse(f.__name__, f) for f in (upper_of, lower_of)]
    for at in range(0, n, BLOCK):
        block = mx.array(words[at : at + BLOCK])
        for plane, way in zip(planes, ways, strict=True):
            np.array(plane, copy=False)[at : at + BLOCK] = np.array(way(block).view(mx.uint32))
    k, join = 4 * of_a_row, fuse(joined.__name__, joined)
    return SplitHandle(name, (n, k), planes[0], planes[1], scales, biases, k // scales.shape[1], join)


def upper_of(words: Any) -> Any:
    """Words of four 8-bit codes -> uint16 of their upper halves."""
    return lower_of(words >> 4)


def lower_of(words: Any) -> Any:
    """Words of four 8-bit codes -> uint16 of their lower halves."""
    pairs = words & 0x0F0F0F0F
    pairs = (pairs | pairs >> 4) & 0x00FF00FF
    return (pairs | pairs >> 8).astype(mx.uint16)


def joined(upper: Any, lower: Any) -> Any:
    """uint16 of four upper and of four lower halves -> uint32 of the four codes.

    Inverse of the two functions above.
    """
    return spread(upper) << 4 | spread(lower)


def spread(halves: Any) -> Any:
    """uint16 of four halves -> uint32 with one in each byte's lower half."""
    x = halves.astype(mx.uint32)
    x = (x | x << 8) & 0x00FF00FF
    return (x | x << 4) & 0x0F0F0F0F
