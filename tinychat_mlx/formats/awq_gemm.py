"""AutoAWQ GEMM: what the Hub, vLLM, SGLang and transformers mean by "AWQ". Read and written.

qweight int32 (K, N / 8)    packed along outputs; nibble i of word c is output 8 c + ORDER[i]
qzeros  int32 (K / G, N / 8)  the same way
scales  float16 (K / G, N)    w = (q - zero) * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.errors import FormatError
from tinychat_mlx.formats import nibbles
from tinychat_mlx.formats.mlx import float_entry
from tinychat_mlx.formats.stored import Stored, biases_of
from tinychat_mlx.tensorfile import Entry, entry
from tinychat_mlx.weight import Array, Packed

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqGemm:
    group_size: int  # -1: one group a row
    w_bit = 4
    name = "awq-gemm"
    key = "qweight"
    suffixes = ("qweight", "qzeros", "scales")

    def read(self, stored: Stored) -> Packed:
        """-> Packed: same codes, scales as stored, biases = -zero * scale exactly. Raises FormatError."""
        k, words = stored.matrix("qweight", "I32")
        n = words * 8
        stored.expect(n, k, "qweight")
        group = stored.group(self.group_size, k)
        scales = np.ascontiguousarray(stored.floats("scales", (k // group, n)).T)
        qzeros = stored.take("qzeros", (k // group, words), "I32")
        zeros = np.ascontiguousarray(nibbles.unpack(qzeros, ORDER).T)
        qweight = nibbles.transpose(stored.take("qweight", (k, words), "I32").view(np.uint32), ORDER)
        return stored.packed(qweight, scales, biases_of(zeros, scales), 4, group)

    @staticmethod
    def fits(stored: Stored) -> bool:
        """Whether a module's shapes are this layout's, and not those of GEMV, whose names are the same."""
        (dtype, qweight), (_, scales) = stored.info("qweight"), stored.info("scales")
        return dtype == "I32" and len(qweight) == len(scales) == 2 and scales[1] == 8 * qweight[1]


def awq_config(group_size: int, not_converted: list[str] | None = None) -> dict[str, object]:
    """The `quantization_config` that goes with `awq_entries`."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": not_converted,
    }


def awq_entries(packed: Packed, dtype: str = "F16") -> list[Entry]:
    """A weight as AutoAWQ GEMM tensors, the linear bias in `dtype`. Raises FormatError if it is none."""
    n = packed.shape[0]
    if packed.w_bit != 4 or n % 8:
        raise _not_awq(packed, f"{packed.w_bit} bits and {n} outputs: AWQ needs 4 bits and a multiple of 8")
    qweight, zeros, scales = with_zeros(packed)
    name = packed.name
    tensors = [
        entry(f"{name}.qweight", nibbles.transpose(qweight, ORDER, inverse=True).view(np.int32)),
        entry(f"{name}.qzeros", nibbles.pack(np.ascontiguousarray(zeros.T), ORDER).view(np.int32)),
        entry(f"{name}.scales", np.ascontiguousarray(scales.T)),
    ]
    return tensors + ([] if packed.bias is None else [float_entry(f"{name}.bias", packed.bias, dtype)])


def with_zeros(packed: Packed) -> tuple[nibbles.Words, nibbles.Codes, Array]:
    """-> qweight, zeros (N, K/G) uint8, scales (N, K/G) float16 > 0, with w = (q - zero) * scale.

    zero = -bias / scale must be a whole number of 0..15, to 1e-3, or the bias its product rounded to the
    float16 it is stored in (which moves the quotient by up to 15 / 2048). A negative scale is turned
    round: q -> 15 - q, zero -> 15 - zero. Raises FormatError.
    """
    scales, biases = packed.scales.astype(np.float32), packed.biases.astype(np.float32)
    with np.errstate(all="ignore"):
        quotient = np.where(scales == 0, -biases, -biases / scales)  # scale 0: only weights 0 can be said
        zeros = np.rint(quotient)
        whole = np.abs(quotient - zeros) <= 1e-3
        if packed.biases.dtype == np.float16:
            whole |= (-zeros * scales).astype(np.float16) == packed.biases
        half = scales.astype(np.float16)
    bad = ~(whole & (zeros >= 0) & (zeros <= 15) & (half == scales))
    if bad.any():
        row, group = np.argwhere(bad)[0]
        raise _not_awq(
            packed,
            f"row {row}, group {group} has scale {scales[row, group]:g} and bias {biases[row, group]:g}: "
            "not a float16 scale with a zero point of 0..15",
        )
    flip = scales < 0
    if not flip.any():
        return packed.qweight, zeros.astype(np.uint8), half
    ones = np.where(flip, np.uint32(0xFFFFFFFF), np.uint32(0))[..., None]  # 15 - q is q with its bits turned
    qweight = (packed.qweight.reshape(*flip.shape, -1) ^ ones).reshape(packed.qweight.shape)
    return qweight, np.where(flip, 15 - zeros, zeros).astype(np.uint8), np.abs(half)


def _not_awq(packed: Packed, what: str) -> FormatError:
    return FormatError(
        f"{packed.name}: cannot be written as AutoAWQ: {what} — use --format mlx, or quantise the original"
    )
