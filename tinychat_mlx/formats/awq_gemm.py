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
from tinychat_mlx.weight import F32, Array, Packed

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

    A negative scale is turned round: q -> 15 - q, zero -> 15 - zero. Raises FormatError where a zero point is no
    whole number of 0..15, or more than the rounding of scale and bias as stored would have to be undone.
    """
    zeros, scales, off = _nearest(packed)
    bad = ~((off <= _allowed(packed)) & (zeros >= 0) & (zeros <= 15))
    if bad.any():
        row, group = np.argwhere(bad)[0]
        scale, bias = packed.scales[row, group], packed.biases[row, group]
        raise _not_awq(
            packed,
            f"row {row}, group {group} has scale {scale:g} and bias {bias:g}: "
            "not a float16 scale with a zero point of 0..15",
        )
    flip = scales < 0
    if not flip.any():
        return packed.qweight, zeros.astype(np.uint8), scales
    ones = np.where(flip, np.uint32(0xFFFFFFFF), np.uint32(0))[..., None]  # 15 - q is q with its bits turned
    qweight = (packed.qweight.reshape(*flip.shape, -1) ^ ones).reshape(packed.qweight.shape)
    return qweight, np.where(flip, 15 - zeros, zeros).astype(np.uint8), np.abs(scales)


def moved(packed: Packed) -> float:
    """By how much of a step between codes a weight moves at most, where `awq_entries` writes it."""
    return float(_nearest(packed)[2].max(initial=0))


def _nearest(packed: Packed) -> tuple[F32, Array, F32]:
    """-> zero points, float16 scales, and of each group how far a weight moves at most, in steps."""
    scales, biases = packed.scales.astype(np.float32), packed.biases.astype(np.float32)
    with np.errstate(all="ignore"):
        zeros = np.rint(
            np.where(scales == 0, -biases, -biases / scales)
        )  # scale 0: only weights 0 can be said
        half = scales.astype(np.float16)
        wide = half.astype(np.float32)
        # Between codes a weight moves in proportion: code 0 and code 15 move most.
        ends = np.maximum(
            np.abs(-zeros * wide - biases), np.abs(15 * (wide - scales) - zeros * wide - biases)
        )
        off: F32 = np.where(ends == 0, np.float32(0), ends / np.abs(scales))
    return zeros, half, off


def _allowed(packed: Packed) -> float:
    """The most that rounding can have moved a weight, in steps: scale and bias by half a unit in the last place each.

    bias / scale is at most 15, and so is the code. Numbers whose float32 ends in 16 zeros were bfloat16.
    """
    unit = 2.0**-11
    if packed.scales.dtype == packed.biases.dtype == np.float32:
        words = (np.ascontiguousarray(a).view(np.uint32) for a in (packed.scales, packed.biases))
        unit = 2.0**-11 if any((a & 0xFFFF).any() for a in words) else 2.0**-8
    return 15 * 2 * unit


def _not_awq(packed: Packed, what: str) -> FormatError:
    return FormatError(
        f"cannot be written as AutoAWQ: {what}",
        where=packed.name,
        remedy="use --format mlx, or quantise the original model",
    )
