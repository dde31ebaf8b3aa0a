"""AutoAWQ GEMM: the layout called "AWQ" on the Hub and in vLLM, SGLang and transformers. Read and written.

qweight int32 (K, N / 8)    packed along outputs; nibble i of word c is output 8 c + ORDER[i]
qzeros  int32 (K / G, N / 8)  packed the same way
scales  float16 (K / G, N)    w = (q - zero) * scale
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.weights.formats import nibbles
from tinychat_mlx.weights.formats.mlx import float_entry
from tinychat_mlx.weights.formats.stored import Stored, biases_of
from tinychat_mlx.weights.safetensors import Entry, entry
from tinychat_mlx.weights.weight import F32, Array, Packed

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqGemm:
    group_size: int  # -1: one group per row
    w_bit = 4
    name = "awq-gemm"
    key = "qweight"
    suffixes = ("qweight", "qzeros", "scales")

    def read(self, stored: Stored) -> Packed:
        """Return a Packed: same codes, scales as stored, biases = -zero * scale exactly. Raises FormatError."""
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
        """Whether a module's shapes match this layout rather than GEMV, which has the same names."""
        (dtype, qweight), (_, scales) = stored.info("qweight"), stored.info("scales")
        return dtype == "I32" and len(qweight) == len(scales) == 2 and scales[1] == 8 * qweight[1]


def awq_config(group_size: int, not_converted: list[str] | None = None) -> dict[str, object]:
    """Return the `quantization_config` for `awq_entries`."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": not_converted,
    }


def awq_entries(packed: Packed, dtype: str = "F16") -> list[Entry]:
    """Return a weight as AutoAWQ GEMM tensors, the linear bias in `dtype`. Raises FormatError if it is not AWQ."""
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
    """Return qweight, zeros (N, K/G) uint8 and scales (N, K/G) float16 > 0, with w = (q - zero) * scale.

    A negative scale is replaced: q -> 15 - q, zero -> 15 - zero. Raises FormatError if a zero point is not an integer in
    0..15, or if the change exceeds the rounding of scale and bias as stored.
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
    ones = np.where(flip, np.uint32(0xFFFFFFFF), np.uint32(0))[..., None]  # 15 - q inverts the bits of q
    qweight = (packed.qweight.reshape(*flip.shape, -1) ^ ones).reshape(packed.qweight.shape)
    return qweight, np.where(flip, 15 - zeros, zeros).astype(np.uint8), np.abs(scales)


def moved(packed: Packed) -> float:
    """Return the largest change of a weight by `awq_entries`, in steps between codes."""
    return float(_nearest(packed)[2].max(initial=0))


def _nearest(packed: Packed) -> tuple[F32, Array, F32]:
    """Return zero points, float16 scales, and the largest change of a weight per group, in steps."""
    scales, biases = packed.scales.astype(np.float32), packed.biases.astype(np.float32)
    with np.errstate(all="ignore"):
        zeros = np.rint(
            np.where(scales == 0, -biases, -biases / scales)
        )  # scale 0 can represent only weights of 0
        half = scales.astype(np.float16)
        wide = half.astype(np.float32)
        # The change of a weight is linear in its code: codes 0 and 15 change most.
        ends = np.maximum(
            np.abs(-zeros * wide - biases), np.abs(15 * (wide - scales) - zeros * wide - biases)
        )
        off: F32 = np.where(ends == 0, np.float32(0), ends / np.abs(scales))
    return zeros, half, off


def _allowed(packed: Packed) -> float:
    """Return the largest change by rounding, in steps: scale and bias by half a unit in the last place each.

    bias / scale is at most 15, and so is the code. float32 values whose low 16 bits are 0 were bfloat16.
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
