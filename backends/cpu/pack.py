"""Convert canonical weights to tiles (layout in kernels/op.h).

A handle is a small header and one buffer of position-independent bytes, which can be written to disk and
mapped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.memory import Arena, Bytes, address
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.weights.weight import Dense, Packed, Weight, pack_codes, to_float32

Run = Callable[[c.Op], None]
Zeros = npt.NDArray[np.uint16]

LAYOUT = 3  # version of the tile layout; increment it when older files must no longer be read
STRIPE = 16 << 20  # bytes of float32 weights converted at a time
KINDS = {c.INT4: "int4", c.INT8: "int8", c.F16: "float16", c.BF16: "bfloat16", c.F32: "float32"}


class CpuWeight:
    """A weight in tiles. `CpuBackend.pack` returns it."""

    def __init__(
        self, name: str, header: c.CWeight, data: Bytes, wait: Callable[[], None] | None = None
    ) -> None:
        """wait: blocks until the bytes are loaded, if they are loaded in the background."""
        self.name, self.wait = name, wait
        self.header = header
        self.data = data
        header.data = address(data)
        self.shape = (int(header.n), int(header.k))

    @property
    def kind(self) -> str:
        return KINDS[self.header.kind]


def pack(weight: Weight, arena: Arena, run: Run, exact: bool) -> CpuWeight:
    """Convert `weight` to tiles natively on all threads, without an intermediate copy.

    exact keeps float32 matrices in float32. Otherwise they are rounded to float16.
    """
    zeros = zeros_of(weight) if isinstance(weight, Packed) else None
    header = _header(weight, zeros, exact)
    data = arena.take(_bytes_of(header))
    handle = CpuWeight(weight.name, header, data)
    if isinstance(weight, Packed):
        _pack_codes(weight, header, zeros, run)
    else:
        _pack_dense(weight, header, run)
    if weight.bias is not None:
        tail = data[data.size - -(-header.n // 16) * 64 :].view(np.float32)
        tail[: header.n], tail[header.n :] = weight.bias, 0
    return handle


def packed_bytes(weight: Weight, exact: bool) -> int:
    """Return the number of bytes of the tiles that `pack` creates."""
    return _bytes_of(_header(weight, zeros_of(weight) if isinstance(weight, Packed) else None, exact))


def _bytes_of(header: c.CWeight) -> int:
    return int(c.open_library().tc_weight_bytes(byref(header)))


def _header(weight: Weight, zeros: Zeros | None, exact: bool) -> c.CWeight:
    header = _dense_header(weight, exact) if isinstance(weight, Dense) else _packed_header(weight, zeros)
    header.has_bias = weight.bias is not None
    return header


def _packed_header(w: Packed, zeros: Zeros | None = None) -> c.CWeight:
    n, k = w.shape
    if w.w_bit not in (3, 4, 8):
        raise BackendError(
            f"{w.name} has {w.w_bit} bits per weight", where="cpu backend", remedy="use 3, 4 or 8 bits"
        )
    if w.group_size % 32 or k % w.group_size:
        raise BackendError(
            f"{w.name} has {k} inputs in groups of {w.group_size}",
            where="cpu backend",
            remedy="use groups of a multiple of 32 that divides the inputs",
        )
    ends = c.ZEROS
    if zeros is None:
        ends = c.HALVES if _fits_half(w.scales) and _fits_half(w.biases) else c.FLOATS
    return c.CWeight(c.INT8 if w.w_bit == 8 else c.INT4, n, k, w.group_size, ends)


def zeros_of(w: Packed) -> Zeros | None:
    """Return the zero points (N, K/G) of an int4 weight if its scales have room for them, else None.

    This is the case for weights quantised by awq/search/quantizer.py. It saves 3 % of the bytes per token without
    loss.
    """
    scales, biases = w.scales, w.biases
    if (
        w.w_bit == 8
        or scales.dtype != np.float16
        or biases.dtype != np.float16
        or (scales.view(np.uint16) & 0x800F).any()
    ):
        return None
    with np.errstate(all="ignore"):
        zeros = np.rint(-biases.astype(np.float32) / scales.astype(np.float32))
        if not (zeros >= 0).all() or (zeros > 15).any():  # also true for NaN
            return None
        exact = np.array_equal(zeros * scales.astype(np.float32), -biases.astype(np.float32))
    return zeros.astype(np.uint16) if exact else None


def _fits_half(a: npt.NDArray[Any]) -> bool:
    """Return whether every value of `a` is exact in float16."""
    if a.dtype == np.float16:
        return True
    with np.errstate(over="ignore"):
        return bool(np.array_equal(a.astype(np.float16).astype(np.float32), a))


def _pack_codes(w: Packed, header: c.CWeight, zeros: Zeros | None, run: Run) -> None:
    words = w.qweight
    if w.w_bit == 3:  # 3-bit codes use four bits here: tiles are optimised for speed, not for size
        words = pack_codes(w.codes(), 4)
    words = np.ascontiguousarray(words, "<u4")
    form = np.float32 if header.ends == c.FLOATS else np.float16
    scales, biases = (np.ascontiguousarray(a, form) for a in (w.scales, w.biases))
    ends: npt.NDArray[Any] = scales if zeros is None else scales.view(np.uint16) | zeros
    places = address(words), address(ends), address(biases)
    run(c.PackOp(c.PACK, header.n, 0, 0, ctypes.pointer(header), *places))


def _dense_header(w: Dense, exact: bool) -> c.CWeight:
    n, k = w.shape
    if w.w.dtype == np.float16:
        kind = c.F16
    elif w.w.dtype == np.uint16:
        kind = c.BF16
    else:
        kind = c.F32 if exact or float(np.abs(w.w).max(initial=0)) > 65504 else c.F16
    return c.CWeight(kind, n, k)


def _pack_dense(w: Dense, header: c.CWeight, run: Run) -> None:
    n, k = w.shape
    form = {c.F16: np.float16, c.BF16: np.uint16, c.F32: np.float32}[header.kind]
    step = max(16, STRIPE // (4 * k) // 16 * 16)
    for row in range(0, n, step):
        part = w.w[row : row + step]
        part = np.ascontiguousarray(part if part.dtype == form else to_float32(part), form)
        run(c.PackOp(c.PACK, part.shape[0], row, 0, ctypes.pointer(header), address(part), None, None))
