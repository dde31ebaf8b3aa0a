"""The stored tensors of one module. Each is checked against its layout when it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.weights.safetensors import show
from tinychat_mlx.weights.weight import F32, Array, Packed, to_float32

FLOATS = ("F16", "BF16", "F32")
Shape = tuple[int, ...]


class Tensors(Protocol):
    """All tensors of a checkpoint by name."""

    def __contains__(self, name: object, /) -> bool: ...

    def info(self, name: str) -> tuple[str, Shape]:
        """Return the dtype as safetensors names it, and the shape."""

    def read(self, name: str) -> Array:
        """Return the array, a view if possible; BF16 as bits in uint16."""

    def where(self, name: str) -> str:
        """Return the file that holds the tensor, for messages."""


@dataclass(frozen=True)
class Stored:
    """One module's tensors. shape: the (N, K) that config.json requires, or None if unknown."""

    tensors: Tensors
    module: str
    shape: tuple[int, int] | None = None

    def has(self, suffix: str) -> bool:
        return f"{self.module}.{suffix}" in self.tensors

    def info(self, suffix: str) -> tuple[str, Shape]:
        """Return dtype and shape. Raises FormatError if the module lacks this tensor."""
        if not self.has(suffix):
            raise FormatError(
                f"{show(self.module)} has no {suffix!r} tensor", where=self.tensors.where(self.module)
            )
        return self.tensors.info(f"{self.module}.{suffix}")

    def matrix(self, suffix: str, *dtypes: str) -> tuple[int, int]:
        """Return the shape of a tensor that must have two axes, neither empty, and one of these dtypes."""
        dtype, shape = self.info(suffix)
        if dtype not in dtypes or len(shape) != 2 or 0 in shape:
            raise self.wrong(suffix, f"is {dtype} {list(shape)}, not a matrix of {' or '.join(dtypes)}")
        return shape[0], shape[1]

    def take(self, suffix: str, shape: Shape, *dtypes: str) -> Array:
        """Return the stored array, which must have exactly this shape and one of these dtypes."""
        dtype, found = self.info(suffix)
        if found != shape or dtype not in dtypes:
            expected = f"{' or '.join(dtypes)} {list(shape)}"
            raise self.wrong(
                suffix, f"is {dtype} {list(found)}, the other tensors of the module require {expected}"
            )
        return self.tensors.read(f"{self.module}.{suffix}")

    def floats(self, suffix: str, shape: Shape) -> Array:
        """Return float16 as stored; bfloat16, which can exceed float16's range, as float32."""
        array = self.take(suffix, shape, *FLOATS)
        return array if array.dtype == np.float16 else to_float32(array)

    def bias(self, n: int) -> F32 | None:
        """Return the linear layer's own bias (N,), or None."""
        return to_float32(self.take("bias", (n,), *FLOATS)) if self.has("bias") else None

    def expect(self, n: int, k: int, suffix: str) -> None:
        """Raise FormatError unless N and K are those that config.json requires."""
        if self.shape is not None and self.shape != (n, k):
            raise self.wrong(suffix, f"has {[n, k]} weights, config.json requires {list(self.shape)}")

    def group(self, group_size: int, k: int) -> int:
        """Return G; -1 means one group per row. Raises FormatError if K is not a multiple of it."""
        size = k if group_size == -1 else group_size
        if k % size:
            raise FormatError(
                f"{show(self.module)} has {k} inputs, not a multiple of the group size {size} in config.json",
                where=self.tensors.where(self.module),
            )
        return size

    def wrong(self, suffix: str, what: str) -> FormatError:
        name = f"{self.module}.{suffix}"
        return FormatError(f"{show(name)} {what}", where=self.tensors.where(name))

    def packed(
        self, qweight: npt.NDArray[np.uint32], scales: Array, biases: Array, w_bit: int, group: int
    ) -> Packed:
        """Return a Packed with groups split into equal ones of 128, 64 or 32 inputs, which every device supports.

        A split repeats scale and bias and changes no weight. Raises FormatError for other group sizes.
        """
        size = next((g for g in (128, 64, 32) if group % g == 0), 0)
        if not size:
            raise FormatError(
                f"{show(self.module)} has groups of {group} inputs; tinychat reads multiples of 32",
                where=self.tensors.where(self.module),
                remedy="quantise the original model with `tinychat convert`",
            )
        if size != group:
            scales, biases = (np.repeat(a, group // size, axis=1) for a in (scales, biases))
        return Packed(self.module, qweight, scales, biases, w_bit, size, self.bias(qweight.shape[0]))


def biases_of(zeros: npt.NDArray[np.uint8], scales: Array) -> Array:
    """Return -zeros * scales (N, K / G) exactly: float16 if it holds every product, else float32.

    float16 has 11 significant bits and a zero has 4, so a product has at most 15 of float32's 24. float16 holds about
    half of the products; rounding the others changes a weight by up to 15 / 2048 steps of the codes.
    """
    exact = -(zeros * scales.astype(np.float32))
    if scales.dtype != np.float16:
        return exact
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    return half if np.array_equal(half, exact) else exact
