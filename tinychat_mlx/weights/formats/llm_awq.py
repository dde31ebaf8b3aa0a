"""llm-awq v2, called GEMV_FAST by AutoAWQ. Read only, from safetensors.

    qweight int16 (N / 4, K)    four rows and 64 columns interleaved, below
    scales  float (8 Z, N)      groups past K / G are padding; Z as for GEMV
    scaled_zeros (llm-awq) or qzeros (GEMV_FAST), the same shape: -zero * scale

Two adjacent int16 form a word. For four rows, a block of 64 inputs, row r of 4, half h of 32 inputs:

    word j (0..3), nibble 4 b + i   is   input 32 h + 8 i + 2 j + b      (i 0..3, b 0..1)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.weights.formats.awq_gemv import zeros_width
from tinychat_mlx.weights.formats.nibbles import Words
from tinychat_mlx.weights.formats.stored import FLOATS, Stored
from tinychat_mlx.weights.weight import Packed

_ROWS = 8  # rows of qweight at a time: about 2^16 words at K = 4096, which fit in L2


@dataclass(frozen=True)
class LlmAwq:
    group_size: int  # -1: one group per row
    zeros: str = "scaled_zeros"  # or "qzeros"
    w_bit = 4
    key = "qweight"

    @property
    def name(self) -> str:
        return "llm-awq" if self.zeros == "scaled_zeros" else "awq-gemv-fast"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("qweight", "scales", self.zeros)

    def read(self, stored: Stored) -> Packed:
        """Return a Packed with the same codes, scales and biases as stored. Raises FormatError."""
        quads, k = stored.matrix("qweight", "I16")
        n = quads * 4
        stored.expect(n, k, "qweight")
        if k % 64:
            raise stored.wrong("qweight", f"has {k} inputs, not a multiple of 64")
        group = stored.group(self.group_size, k)
        table = (8 * zeros_width(k, group), n)
        scales, biases = (
            np.ascontiguousarray(stored.floats(suffix, table)[: k // group].T)
            for suffix in ("scales", self.zeros)
        )
        qweight = deinterleave(stored.take("qweight", (quads, k), "I16").view(np.uint32))
        return stored.packed(qweight, scales, biases, 4, group)

    def fits(self, stored: Stored) -> bool:
        has_zeros = stored.has(self.zeros) and stored.info(self.zeros)[0] in FLOATS
        return stored.info("qweight")[0] == "I16" and has_zeros


def deinterleave(words: Words) -> Words:
    """Convert words (N/4, K/2) in the layout above to canonical words (N, K/8)."""
    quads, width = words.shape
    blocks = width // 32
    eight = np.dtype("V32")  # the words of one row and block, copied as one item
    out = np.empty((quads, 4, blocks), eight)
    for q in range(0, quads, _ROWS):
        tile = words[q : q + _ROWS]
        by_word = tile.reshape(-1, 4).T.copy()  # (j, [quad, block, r, h])
        natural = np.empty((by_word.shape[1], 4), np.uint32)  # [..., i]
        for i in range(4):
            x = (by_word >> np.uint32(4 * i)) & np.uint32(0x000F000F)  # codes j, b at nibble 4 b
            x = x[0::2] | (x[1::2] << np.uint32(8))  # j of a pair, b at nibble 2 j + 4 b
            x = (x | (x >> np.uint32(12))) & np.uint32(0xFFFF)  # ... at nibble 2 j + b
            natural[:, i] = x[0] | (x[1] << np.uint32(16))
        out[q : q + _ROWS] = natural.reshape(-1, 8).view(eight).reshape(-1, blocks, 4).transpose(0, 2, 1)
    return out.view(np.uint32).reshape(quads * 4, blocks * 8)
