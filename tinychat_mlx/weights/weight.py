"""The canonical weight: the content of a checkpoint in any format, before a device packs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Dense:
    """A float matrix w (N, K) as stored: float16, float32, or bfloat16 bits viewed as uint16.

    bias (N,) float32 is the linear layer's own additive bias, or None.
    """

    name: str
    w: Array
    bias: F32 | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape[0], self.w.shape[1]

    @property
    def nbytes(self) -> int:
        return int(self.w.nbytes)

    def to_float32(self) -> F32:
        """Return the matrix as (N, K) float32, exactly."""
        return to_float32(self.w)


@dataclass(frozen=True)
class Packed:
    """An integer matrix in groups of G inputs: w[n, k] = q[n, k] * scales[n, k // G] + biases[n, k // G].

    qweight (N, K * w_bit / 32) uint32 holds the codes from the lowest bits up (MLX's affine layout; 3-bit codes are a
    little-endian bit stream, 8 codes in 3 bytes). scales, biases (N, K / G) are float16 or float32.
    AWQ: biases = -zero * scale.
    """

    name: str
    qweight: npt.NDArray[np.uint32]
    scales: Array
    biases: Array
    w_bit: int
    group_size: int
    bias: F32 | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.qweight.shape[0], self.qweight.shape[1] * 32 // self.w_bit

    @property
    def nbytes(self) -> int:
        return int(self.qweight.nbytes + self.scales.nbytes + self.biases.nbytes)

    def codes(self) -> npt.NDArray[np.uint8]:
        """Return q (N, K) uint8."""
        return unpack_codes(self.qweight, self.w_bit)

    def to_float32(self) -> F32:
        """Return the dequantised matrix (N, K) float32."""
        n, k = self.shape
        q = self.codes().reshape(n, k // self.group_size, self.group_size).astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        return (q * scales + self.biases.astype(np.float32)[..., None]).reshape(n, k)


class Joined(Packed):
    """Packed weights with the same input, stacked along N. The stacked arrays are computed on first use.

    A device that allocates the stacked weight copies the `parts` into it directly, without an intermediate copy.
    """

    def __init__(self, name: str, parts: tuple[Packed, ...], bias: F32 | None) -> None:
        first = parts[0]
        fields = {"name": name, "w_bit": first.w_bit, "group_size": first.group_size, "bias": bias}
        for key, value in {**fields, "parts": parts}.items():
            object.__setattr__(self, key, value)  # assigns as a frozen dataclass's __init__ does

    parts: tuple[Packed, ...]

    @cached_property
    def qweight(self) -> npt.NDArray[np.uint32]:
        return np.concatenate([p.qweight for p in self.parts])

    @cached_property
    def scales(self) -> Array:
        return np.concatenate([p.scales for p in self.parts])

    @cached_property
    def biases(self) -> Array:
        return np.concatenate([p.biases for p in self.parts])

    @property
    def shape(self) -> tuple[int, int]:
        return sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


Weight = Dense | Packed


def to_float32(a: Array) -> F32:
    """Convert float16, float32 or bfloat16 bits (uint16) to float32, exactly."""
    if a.dtype == np.uint16:
        wide: npt.NDArray[np.uint32] = a.astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    return a.astype(np.float32, copy=False)


def pack_codes(q: npt.NDArray[np.uint8], w_bit: int) -> npt.NDArray[np.uint32]:
    """Pack codes (N, K) into words (N, K * w_bit / 32). K * w_bit must be a multiple of 32."""
    n, k = q.shape
    if w_bit == 8:
        return np.ascontiguousarray(q).view("<u4").astype(np.uint32, copy=False)
    if w_bit == 4:
        pairs = q[:, 0::2] | (q[:, 1::2] << 4)
        return np.ascontiguousarray(pairs).view("<u4").astype(np.uint32, copy=False)
    bits = np.unpackbits(q[..., None], axis=-1, count=w_bit, bitorder="little")
    stream = np.packbits(bits.reshape(n, k * w_bit), axis=-1, bitorder="little")
    return np.ascontiguousarray(stream).view("<u4").astype(np.uint32, copy=False)


def unpack_codes(words: npt.NDArray[np.uint32], w_bit: int) -> npt.NDArray[np.uint8]:
    """Unpack words (N, K * w_bit / 32) into codes (N, K): the inverse of `pack_codes`."""
    n = words.shape[0]
    octets = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8).reshape(n, -1)
    if w_bit == 8:
        return octets
    if w_bit == 4:
        q = np.empty((n, octets.shape[1] * 2), np.uint8)
        q[:, 0::2], q[:, 1::2] = octets & 15, octets >> 4
        return q
    bits = np.unpackbits(octets, axis=-1, bitorder="little").reshape(n, -1, w_bit)
    return np.packbits(bits, axis=-1, bitorder="little")[..., 0]


def take_rows(name: str, weight: Weight, rows: npt.NDArray[np.intp]) -> Weight:
    """Return the weight with the outputs `rows` only, in that order."""
    bias = None if weight.bias is None else weight.bias[rows]
    if isinstance(weight, Dense):
        return Dense(name, weight.w[rows], bias)
    parts = weight.qweight[rows], weight.scales[rows], weight.biases[rows]
    return Packed(name, *parts, weight.w_bit, weight.group_size, bias)


def join(name: str, parts: list[Weight]) -> Weight | None:
    """Stack weights of one input along N (q/k/v, gate/up). Return None if their forms differ.

    Packed weights become a `Joined`, which copies nothing yet.
    """
    first = parts[0]
    if any(type(p) is not type(first) or p.shape[1] != first.shape[1] for p in parts):
        return None
    bias = None
    if any(p.bias is not None for p in parts):
        zeros = (np.zeros(p.shape[0], np.float32) if p.bias is None else p.bias for p in parts)
        bias = np.concatenate(list(zeros))
    if isinstance(first, Dense):
        dense = [p.w for p in parts if isinstance(p, Dense)]
        if any(w.dtype != first.w.dtype for w in dense):
            return None
        return Dense(name, np.concatenate(dense), bias)
    packed = [p for p in parts if isinstance(p, Packed)]
    form = (first.w_bit, first.group_size, first.scales.dtype)
    if any((p.w_bit, p.group_size, p.scales.dtype) != form for p in packed):
        return None
    return Joined(name, tuple(packed), bias)
