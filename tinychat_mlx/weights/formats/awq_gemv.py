"""AutoAWQ GEMV, the same as llm-awq v1. Read only.

qweight int32 (N, K / 8)   nibble i of word c is input 8 c + i: the canonical order
qzeros  int32 (N, Z)       nibble i of word c is group 8 c + i; groups past K / G are padding
scales  float16 (N, 8 Z)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.weights.formats import nibbles
from tinychat_mlx.weights.formats.stored import Stored, biases_of
from tinychat_mlx.weights.weight import Packed


def zeros_width(k: int, group_size: int) -> int:
    """Return Z, words of zeros per row: enough for K / G, rounded up to what one warp reads at once."""
    multiple = {32: 4, 64: 2}.get(group_size, 1)
    words = (k // group_size + 7) // 8
    return (words + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class AwqGemv:
    group_size: int  # -1: one group per row
    w_bit = 4
    name = "awq-gemv"
    key = "qweight"
    suffixes = ("qweight", "qzeros", "scales")

    def read(self, stored: Stored) -> Packed:
        """Return a Packed: codes as a view, scales as stored, biases = -zero * scale exactly. Raises FormatError."""
        n, words = stored.matrix("qweight", "I32")
        k = words * 8
        stored.expect(n, k, "qweight")
        group = stored.group(self.group_size, k)
        width, groups = zeros_width(k, group), k // group
        scales = np.ascontiguousarray(stored.floats("scales", (n, 8 * width))[:, :groups])
        zeros = nibbles.unpack(stored.take("qzeros", (n, width), "I32"))[:, :groups]
        qweight = stored.take("qweight", (n, words), "I32").view(np.uint32)
        return stored.packed(qweight, scales, biases_of(zeros, scales), 4, group)

    @staticmethod
    def fits(stored: Stored) -> bool:
        """Whether a module's shapes match this layout rather than GEMM."""
        (dtype, qweight), (_, scales) = stored.info("qweight"), stored.info("scales")
        return dtype == "I32" and len(qweight) == len(scales) == 2 and scales[0] == qweight[0]
