"""Weights on the device: dense fp16, or codes in tiles in the order in which a warp feeds its tensor core.

A tile is 16 outputs (an mma's rows), a unit 128 inputs of a tile. In a unit, lane = 4 g + t of a warp owns

    row = 16 tile + 8 r + g            r = 0, 1: the two halves of an mma's rows; g = 0..7
    k   = 128 unit + 32 c + 8 t + 4 j + 2 p + e      c = 0..3; t = 0..3; j, p, e = 0, 1

For every (c, j) the eight codes (r, p, e) are the A operand of one mma.sync.m16n8k16: a[2p + r] = the pair e
= 0, 1. Inputs 8 t … 8 t + 7 of a block of 32 belong to one lane, which reads its activations as 16 bytes. A
group of 32 inputs or more never shares an mma with its neighbour.

    4 bits: word (c, j), nibble 4 e + 2 p + r      codes[tile, unit, c / 2][lane][2 (c % 2) + j]
    8 bits: word (c, j, r), byte 2 p + e           codes[tile, unit, c][lane][2 j + r]

Every load of a warp is therefore 32 × 16 contiguous bytes. scales[tile, group][g][r] is a pair (scale, bias).
N is padded to 16 and K to 128 with scale and bias 0, which add nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.weights.weight import Dense, Packed, unpack_codes

TILE, UNIT = 16, 128
GROUPS = (32, 64, 128)  # supported by the kernels; a larger group is stored as several of 128 (or 64, or 32)
SLAB = 1 << 24  # weights converted at a time; limits the scratch memory of loading and of `dense_rows`


@dataclass(eq=False)
class DenseHandle:
    """w (N, K) in the backend's dtype, bias (N,) float32."""

    name: str
    shape: tuple[int, int]
    w: torch.Tensor
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return nbytes(self.w) + (0 if self.bias is None else nbytes(self.bias))


@dataclass(eq=False)
class TiledHandle:
    """codes (tiles, units, w_bit / 2, 32, 4) int32; scales (tiles, groups, 8, 2, 2); bias (N,) float32."""

    name: str
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    w_bit: int  # 4 or 8; 3-bit codes are stored as 4 bits
    group_size: int  # one of GROUPS
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        held = nbytes(self.codes) + nbytes(self.scales)
        return held + (0 if self.bias is None else nbytes(self.bias))


CudaHandle = DenseHandle | TiledHandle


def nbytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def tiled_nbytes(shape: tuple[int, int], w_bit: int, group_size: int, itemsize: int = 2) -> int:
    """Return the bytes that a packed weight takes on the device."""
    rows, inputs = -(-shape[0] // TILE) * TILE, -(-shape[1] // UNIT) * UNIT
    return rows * inputs * w_bit // 8 + rows * (inputs // group_size) * 2 * itemsize


def stored_group(group_size: int) -> int | None:
    """Return the group size on the device: the largest of GROUPS that divides it, or None."""
    return next((g for g in reversed(GROUPS) if group_size % g == 0), None)


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy any array, also a read-only view of a mapped file, to a new tensor. uint16 is read as bfloat16."""
    bf16 = array.dtype == np.uint16
    own = np.array(array.view(np.int16) if bf16 else array)  # torch needs writable, contiguous memory
    tensor = torch.from_numpy(own)
    return (tensor.view(torch.bfloat16) if bf16 else tensor).to(device)


def pack_dense(weight: Dense, device: torch.device, dtype: torch.dtype) -> DenseHandle:
    """Upload in slabs of rows. Raises BackendError if the dtype cannot represent a value."""
    n, k = weight.shape
    w = torch.empty((n, k), dtype=dtype, device=device)
    rows = max(SLAB // k, 1)
    for at in range(0, n, rows):
        w[at : at + rows] = upload(weight.w[at : at + rows], device).to(dtype)
    check_finite(w, weight.name, dtype)
    return DenseHandle(weight.name, weight.shape, w, put_bias(weight.bias, device))


def put_bias(bias: npt.NDArray[np.float32] | None, device: torch.device) -> torch.Tensor | None:
    return None if bias is None else upload(bias.astype(np.float32, copy=False), device)


def check_finite(t: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(t).all()):
        raise BackendError(
            f"has values beyond {dtype}", where=name, remedy="download the model again, or use --backend cpu"
        )


def pack_tiled(weight: Packed, device: torch.device, dtype: torch.dtype) -> TiledHandle:
    """Convert canonical codes to tiles, a slab of rows at a time. `stored_group` must support the group size."""
    n, k = weight.shape
    group, w_bit = stored_group(weight.group_size), 8 if weight.w_bit == 8 else 4
    assert group is not None and k % weight.group_size == 0
    tiles, units = -(-n // TILE), -(-k // UNIT)
    codes = torch.empty((tiles, units, w_bit // 2, 32, 4), dtype=torch.int32, device=device)
    scales = torch.zeros((tiles, units * UNIT // group, 8, 2, 2), dtype=dtype, device=device)
    step = max(SLAB // (TILE * k), 1)
    for at in range(0, tiles, step):
        rows = slice(at * TILE, min((at + step) * TILE, n))
        tile = slice(at, min(at + step, tiles))
        codes[tile] = to_tiles(canonical_codes(weight, rows, device), w_bit)
        for i, part in enumerate((weight.scales, weight.biases)):
            values = upload(part[rows], device).to(dtype).repeat_interleave(weight.group_size // group, 1)
            padded = torch.zeros(((tile.stop - at) * TILE, values.shape[1]), dtype=dtype, device=device)
            padded[: values.shape[0]] = values
            by_tile = padded.view(-1, 2, 8, values.shape[1]).permute(0, 3, 2, 1)  # (tile, group, g, r)
            scales[tile, : values.shape[1], :, :, i] = by_tile
    check_finite(scales, weight.name, dtype)
    return TiledHandle(weight.name, weight.shape, codes, scales, w_bit, group, put_bias(weight.bias, device))


def canonical_codes(weight: Packed, rows: slice, device: torch.device) -> torch.Tensor:
    """Return rows of a packed weight as (n, K) uint8 on the device."""
    if weight.w_bit not in (4, 8):  # 3-bit codes cross word boundaries, so the core unpacks them
        return upload(unpack_codes(weight.qweight[rows], weight.w_bit), device)
    words = np.ascontiguousarray(weight.qweight[rows]).astype("<u4", copy=False)
    octets = upload(words.view(np.uint8), device)
    if weight.w_bit == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def to_tiles(q: torch.Tensor, w_bit: int) -> torch.Tensor:
    """Convert codes (n, K) uint8 to (tiles, units, w_bit / 2, 32, 4) int32."""
    n, k = q.shape
    tiles, units = -(-n // TILE), -(-k // UNIT)
    padded = torch.zeros((tiles * TILE, units * UNIT), dtype=torch.uint8, device=q.device)
    padded[:n, :k] = q
    if w_bit == 4:
        x = padded.view(tiles, 2, 8, units, 2, 2, 4, 2, 2, 2)  # tile r g unit c1 c0 t j p e
        x = x.permute(0, 3, 4, 2, 6, 5, 7, 9, 8, 1)  # tile unit c1 | g t | c0 j | e p r
        octets = x.reshape(tiles, units, 2, 32, 16, 2)
        octets = octets[..., 0] | octets[..., 1] << 4
    else:
        x = padded.view(tiles, 2, 8, units, 4, 4, 2, 2, 2)  # tile r g unit c t j p e
        octets = x.permute(0, 3, 4, 2, 5, 6, 1, 7, 8)  # tile unit c | g t | j r | p e
    return octets.reshape(tiles, units, w_bit // 2, 32, 16).view(torch.int32)


def from_tiles(codes: torch.Tensor) -> torch.Tensor:
    """Invert `to_tiles`: (tiles, units, w_bit / 2, 32, 4) int32 -> codes (16 tiles, 128 units) uint8."""
    tiles, units, half = codes.shape[:3]
    octets = codes.contiguous().view(torch.uint8)
    if half == 2:
        x = torch.stack((octets & 15, octets >> 4), dim=-1).view(tiles, units, 2, 8, 4, 2, 2, 2, 2, 2)
        x = x.permute(0, 9, 3, 1, 2, 5, 4, 6, 8, 7)
    else:
        x = octets.view(tiles, units, 4, 8, 4, 2, 2, 2, 2).permute(0, 6, 3, 1, 2, 4, 5, 7, 8)
    return x.reshape(tiles * TILE, units * UNIT)


def dense_tiles(w: TiledHandle, tiles: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantise some tiles of a weight -> (16 tiles, K) in dtype, rounded once from float32."""
    codes = from_tiles(w.codes[tiles]).float()
    scales = w.scales[tiles].float().permute(0, 3, 2, 1, 4)  # (tile, r, g, group, 2)
    scales = scales.reshape(codes.shape[0], -1, 1, 2)
    grouped = codes.view(codes.shape[0], -1, w.group_size)
    return (grouped * scales[..., 0] + scales[..., 1]).view(codes.shape)[:, : w.shape[1]].to(dtype)
