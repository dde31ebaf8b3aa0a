"""Transpose 4-bit codes between words packed along inputs and words packed along outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Codes = npt.NDArray[np.uint8]
# Columns of words per step: reads one cache line per row, and the block fits in L2.
_COLUMNS = 16


def transpose(words: Words, order: tuple[int, ...] = tuple(range(8)), inverse: bool = False) -> Words:
    """Convert codes (A, B) packed along B, 8 per word, to codes packed along A: (A, B/8) -> (B, A/8).

    Nibble i of an input word c is column 8 c + order[i]. With `inverse`, the input is in natural order and nibble i of
    an output word c is row 8 c + order[i]. A and B are multiples of 8.
    """
    a, columns = words.shape
    out = np.empty((columns, 8, a // 8), np.uint32)
    take, put = (order, range(8)) if inverse else (range(8), order)
    blocks = words.reshape(a // 8, 8, columns)
    for c in range(0, columns, _COLUMNS):
        rows = [blocks[:, i, c : c + _COLUMNS].copy() for i in take]
        _swap_nibbles(rows)
        for row, i in zip(rows, put, strict=True):
            out[c : c + _COLUMNS, i] = row.T
    return out.reshape(columns * 8, a // 8)


def _swap_nibbles(rows: list[Words]) -> None:
    """Transpose in place: nibble j of rows[i] becomes nibble i of rows[j].

    An 8 x 8 matrix is transposed by swapping its off-diagonal quarters, then those of each quarter, then again
    (Hacker's Delight, 7-3), for all words of the arrays at once.
    """
    for step, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift = np.uint32(4 * step)
        for i in (i for i in range(8) if not i & step):
            low, high = rows[i], rows[i + step]
            swap = low >> shift
            swap ^= high
            swap &= np.uint32(mask)
            high ^= swap
            swap <<= shift
            low ^= swap


def unpack(words: npt.NDArray[Any], order: tuple[int, ...] = tuple(range(8))) -> Codes:
    """Unpack a small table: (R, C) words -> (R, 8 C) codes; nibble i of word c is column 8 c + order[i]."""
    shifts = np.empty(8, np.uint32)
    shifts[list(order)] = np.arange(0, 32, 4)
    wide = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    codes: Codes = wide.astype(np.uint8).reshape(words.shape[0], -1)
    return codes


def pack(codes: Codes, order: tuple[int, ...] = tuple(range(8))) -> Words:
    """The inverse of `unpack`: (R, 8 C) codes -> (R, C) words."""
    wide = codes.reshape(codes.shape[0], -1, 8)[..., list(order)].astype(np.uint32)
    words: Words = np.bitwise_or.reduce(wide << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return words
