"""compressed-tensors `pack-quantized`, written by llm-compressor. Read only, 4 bits.

weight_packed      int32 (N, K / 8)   nibble i = signed code + 8 of input 8 c + i: the canonical codes
weight_scale       float (N, K / G)
weight_zero_point  int32 (N / 8, K / G)   nibble i of row r = signed zero + 8 of output 8 r + i;
                                          absent if the scheme is symmetric: all zeros are 8
weight_shape       int64 (2,) = N, K
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.weights.formats import nibbles
from tinychat_mlx.weights.formats.stored import FLOATS, Stored, biases_of
from tinychat_mlx.weights.weight import Packed


@dataclass(frozen=True)
class CompressedTensors:
    group_size: int  # -1: one group per row (strategy "channel")
    symmetric: bool
    w_bit = 4
    name = "compressed-tensors"
    key = "weight_packed"
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def read(self, stored: Stored) -> Packed:
        """Return a Packed: codes as a view, scales as stored, biases = -zero * scale exactly. Raises FormatError."""
        n, words = stored.matrix("weight_packed", "I32")
        k = words * 8
        stored.expect(n, k, "weight_packed")
        shape = stored.take("weight_shape", (2,), "I64").tolist()
        if shape != [n, k]:
            raise stored.wrong("weight_shape", f"is {shape}, weight_packed has {[n, k]}")
        group = stored.group(self.group_size, k)
        scales = stored.floats("weight_scale", (n, k // group))
        zeros = self.zeros(stored, n, k // group)
        qweight = stored.take("weight_packed", (n, words), "I32").view(np.uint32)
        return stored.packed(qweight, scales, biases_of(zeros, scales), 4, group)

    def zeros(self, stored: Stored, n: int, groups: int) -> nibbles.Codes:
        """Return zeros (N, K/G) as codes in 0..15."""
        if stored.has("weight_zero_point") == self.symmetric:
            found = "exists" if self.symmetric else "is missing"
            raise stored.wrong(
                "weight_zero_point", f"{found}, but config.json has symmetric: {self.symmetric}"
            )
        if self.symmetric:
            return np.full((n, groups), 8, np.uint8)
        if n % 8:
            raise stored.wrong("weight_zero_point", f"belongs to {n} outputs, not a multiple of 8")
        packed = stored.take("weight_zero_point", (n // 8, groups), "I32")
        zeros: nibbles.Codes = nibbles.unpack(np.ascontiguousarray(packed.T)).T
        return zeros

    @staticmethod
    def fits(stored: Stored) -> bool:
        return stored.info("weight_packed")[0] == "I32" and stored.info("weight_scale")[0] in FLOATS
