"""Group quantiser: scale, zero point and codes of each group of weights.

w_hat = (q - zero) * scale for groups of G consecutive inputs, with integer q and zero in 0 … 2^w_bit - 1. The
scale is rounded to its stored form before the codes are chosen, so the codes fit the stored scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinychat_mlx.weights.formats.mlx import half
from tinychat_mlx.weights.weight import F32, Packed, pack_codes

U8 = npt.NDArray[np.uint8]
LEAST_RANGE = np.float32(1e-5)  # of a group; keeps the scale of a constant group above zero


@dataclass(frozen=True)
class Grid:
    """The 2^w_bit values of each group. The shape of scales and zeros must broadcast with the groups."""

    scales: F32
    zeros: F32
    w_bit: int

    def codes(self, w: F32) -> F32:
        """Return the nearest code of each weight, as integers in float32."""
        q: F32 = np.rint(w / self.scales)
        q += self.zeros
        np.clip(q, 0, 2**self.w_bit - 1, out=q)
        return q

    def nearest(self, w: F32) -> F32:
        """Return the nearest grid value of each weight."""
        q = self.codes(w)
        q -= self.zeros
        q *= self.scales
        return q


@dataclass(frozen=True)
class Quantized:
    """Codes q (N, K) with scales and zeros (N, K/G) in float32. Scales are exact in float16."""

    q: U8
    scales: F32
    zeros: F32
    w_bit: int
    group_size: int

    def to_float32(self) -> F32:
        """Return w_hat (N, K)."""
        n, k = self.q.shape
        w = self.q.reshape(n, -1, self.group_size).astype(np.float32)
        w -= self.zeros[..., None]
        w *= self.scales[..., None]
        return w.reshape(n, k)

    def take(self, rows: npt.NDArray[np.intp]) -> Quantized:
        return Quantized(self.q[rows], self.scales[rows], self.zeros[rows], self.w_bit, self.group_size)

    def packed(self, name: str, bias: F32 | None) -> Packed:
        """Return the canonical weight.

        At 3 and 4 bits -zero · scale is exact in float16; at 8 bits it is rounded.

        Raises FormatError if a scale does not fit float16.
        """
        with np.errstate(invalid="ignore"):
            scales, biases = (half(name, a) for a in (self.scales, -self.zeros * self.scales))
        words = pack_codes(self.q, self.w_bit)
        return Packed(name, words, scales, biases, self.w_bit, self.group_size, bias)


def storable(scales: F32, w_bit: int) -> F32:
    """Round scales to 7 significant bits and to float16; at 8 bits only to float16.

    Zeros have at most 4 bits at w_bit 4, so zero · scale fits float16's 11 bits, and q·s + b equals (q - z)·s
    to the bit. The scale changes by at most 0.8 %, before the codes are chosen. Over 255 codes that change
    would be a whole step at either end, so at 8 bits the scale keeps 11 bits and zero · scale is rounded.
    """
    if w_bit == 8:
        return _float16(scales)
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    seven = (bits + np.uint32(1 << 16)) & np.uint32(0xFFFE0000)  # keeps 6 of 23 stored mantissa bits
    return _float16(seven.view(np.float32))


def _float16(scales: F32) -> F32:
    """Round to float16, at least its smallest number.

    Too large values become infinite, which `packed` rejects.
    """
    with np.errstate(over="ignore"):
        half: F32 = scales.astype(np.float16).astype(np.float32)
    np.maximum(half, np.float32(2**-24), out=half)
    return half


def grid_between(low: F32, high: F32, w_bit: int) -> Grid:
    """Return the asymmetric grid of groups with weights from low to high. The zero point is clamped (AWQ)."""
    top = 2**w_bit - 1
    scales = storable(np.maximum(high - low, LEAST_RANGE) / np.float32(top), w_bit)
    zeros = np.clip(-np.rint(low / scales), 0, top)
    return Grid(scales, zeros, w_bit)


def grid_of(groups: F32, w_bit: int) -> Grid:
    """Return the grid over the full range of each group (…, G), with scales and zeros (…, 1)."""
    return grid_between(groups.min(-1, keepdims=True), groups.max(-1, keepdims=True), w_bit)


def round_to_nearest(w: F32, w_bit: int, group_size: int) -> Quantized:
    """Round w (N, K) to codes, each weight independently."""
    groups = w.reshape(w.shape[0], -1, group_size)
    grid = grid_of(groups, w_bit)
    q = grid.codes(groups).astype(np.uint8).reshape(w.shape)
    return Quantized(q, grid.scales[..., 0], grid.zeros[..., 0], w_bit, group_size)


def round_values(w: F32, w_bit: int, group_size: int) -> F32:
    """Round w (N, K) to the nearest grid values and return the values, without codes."""
    groups = w.reshape(w.shape[0], -1, group_size)
    return grid_of(groups, w_bit).nearest(groups).reshape(w.shape)
