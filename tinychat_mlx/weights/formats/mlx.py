"""MLX affine, the layout that this project writes: X.weight, X.scales, X.biases.

weight  uint32 (N, K bits / 32)   codes from the lowest bits up; 3 bits are one little-endian stream
scales, biases  float (N, K / G)  w = q * scale + bias
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.weights.formats.stored import FLOATS, Stored
from tinychat_mlx.weights.safetensors import Entry, entry
from tinychat_mlx.weights.weight import Array, Dense, Packed, Weight, to_float32

BITS = (3, 4, 8)
GROUPS = (32, 64, 128)
PIECE = 1 << 22  # values converted to float16 at a time


@dataclass(frozen=True)
class Mlx:
    """The `quantization` of config.json: bits and group size of most modules, and of those in `overrides`."""

    w_bit: int
    group_size: int
    overrides: dict[str, tuple[int, int]] = field(default_factory=dict)  # module -> (bits, group)
    name = "mlx"
    key = "scales"  # exactly the quantised modules have this tensor
    suffixes = ("weight", "scales", "biases")

    def read(self, stored: Stored) -> Packed:
        """Return a Packed of views. Raises FormatError."""
        n, words = stored.matrix("weight", "U32")
        bits, group = self.form(stored, words, stored.matrix("scales", *FLOATS)[1])
        k = words * 32 // bits
        stored.expect(n, k, "weight")
        scales = stored.floats("scales", (n, k // group))
        biases = stored.floats("biases", (n, k // group))
        qweight = stored.take("weight", (n, words), "U32")
        return Packed(stored.module, qweight, scales, biases, bits, group, stored.bias(n))

    def form(self, stored: Stored, words: int, groups: int) -> tuple[int, int]:
        """Return bits and group size of a module: as named in config.json, else from its shapes.

        The shapes give bits * group. With a known K, that decides between e.g. (4, 64) and (8, 32).
        """
        named = self.overrides.get(stored.module)
        others = [] if named else [(b, g) for b in BITS for g in GROUPS]
        for bits, group in [named or (self.w_bit, self.group_size), *others]:
            fits = words * 32 % bits == 0 and words * 32 // bits == groups * group
            if fits and (stored.shape is None or stored.shape[1] == groups * group):
                return bits, group
        bits, group = named or (self.w_bit, self.group_size)
        raise stored.wrong(
            "scales", f"has {groups} groups for {words} words a row: not {bits} bits in groups of {group}"
        )

    @staticmethod
    def fits(stored: Stored) -> bool:
        return stored.info("weight")[0] == "U32" and stored.info("scales")[0] in FLOATS


def mlx_entries(weight: Weight, dtype: str = "F16") -> list[Entry]:
    """Return a weight as tensors for mlx-lm; scales, biases and bias in `dtype`, that of the activations.

    Codes are unchanged. Scales and biases are rounded to `dtype`: AWQ's -zero * scale in float16 by at most 15 / 2048
    steps of the codes.
    """
    name = weight.name
    if isinstance(weight, Dense):
        tensors = [entry(f"{name}.weight", weight.w, "BF16" if weight.w.dtype == np.uint16 else None)]
    else:
        tensors = [
            entry(f"{name}.weight", weight.qweight),
            float_entry(f"{name}.scales", weight.scales, dtype),
            float_entry(f"{name}.biases", weight.biases, dtype),
        ]
    return tensors + ([] if weight.bias is None else [float_entry(f"{name}.bias", weight.bias, dtype)])


def float_entry(name: str, array: Array, dtype: str) -> Entry:
    """Return a float array rounded to F16, BF16 or F32. Raises FormatError for a number too large for F16."""
    if dtype == "BF16":
        return entry(name, to_bfloat16(to_float32(array)), "BF16")
    return entry(name, half(name, array) if dtype == "F16" else to_float32(array))


def half(name: str, array: Array) -> Array:
    """Convert floats (bfloat16 as bits) to the nearest float16. Raises FormatError for numbers out of range."""
    if array.dtype == np.float16:
        return array
    out, flat = np.empty(array.size, np.float16), array.reshape(-1)
    for at in range(0, out.size, PIECE):  # in pieces, so that a large matrix is never in memory as float32
        with np.errstate(over="ignore"):
            out[at : at + PIECE] = to_float32(flat[at : at + PIECE])
    if (out.view(np.uint16) & 0x7FFF).max(initial=0) >= 0x7C00:  # all exponent bits set: infinite or NaN
        raise FormatError(
            "has numbers beyond 65504, the largest float16, which is the type of the result",
            where=name,
            remedy="use another upload of the model",
        )
    return out.reshape(array.shape)


def to_bfloat16(a: Array) -> Array:
    """Convert float32 to bfloat16 bits in uint16, rounding half to even. NaN stays NaN."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded: Array = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(a)] = 0x7FC0
    return rounded
