"""Copy weights to the device's memory with as few copies as MLX's Python API allows.

There are three methods. For each array the cheapest one that applies is used:

shared     Metal only, no copy: the pages of the mapped file become the array's buffer. `mx.asarray` adopts
           host memory through newBufferWithBytesNoCopy, since MLX 0.32.1 [mlx#3872], if it begins at a page.
           So the whole pages around an array are passed, and the array is a slice of them. Arrays that are
           adjacent in the file (gate and up often are) are one slice. llama.cpp maps its models for Metal in
           this way [llama.cpp#1696]. Arrays that need another dtype, or are joined from separate places,
           cannot be shared.
filled     One copy: the final buffer is allocated, and NumPy writes each part into a view of it (unified
           memory; MLX documents such views as writable), in the wanted dtype.
converted  bfloat16, which NumPy does not support, through MLX: a copy each for reading, converting and
           joining.

`mx.array` always copies, and so does `mx.load`: its arrays are lazy, but each is read into a new buffer, and
mx.concatenate writes another. `mx.mmap_weights` was proposed and not accepted [mlx#4249].
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.weights.weight import Array

PAGE = mmap.PAGESIZE
KINDS = {"uint32": mx.uint32, "float32": mx.float32, "float16": mx.float16, "uint16": mx.bfloat16}
NUMPY = {mx.uint32: np.uint32, mx.float32: np.float32, mx.float16: np.float16}


class Pages:
    """The whole pages around adjacent arrays, as bytes, through NumPy's array interface.

    It keeps the arrays and so the file's map alive. NumPy and MLX keep a reference to it.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        first, self.nbytes = address(arrays[0]), sum(a.nbytes for a in arrays)
        begin = first // PAGE * PAGE
        size = -(-(first + self.nbytes - begin) // PAGE) * PAGE
        self.arrays, self.skip = arrays, first - begin
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (begin, True)}


def address(a: Array) -> int:
    return int(a.__array_interface__["data"][0])


def stacked(arrays: Sequence[Array], dtype: Any, share: bool) -> Any:
    """Stack arrays (N, K) by rows on the device -> (sum of N, K) in dtype. uint16 is read as bfloat16.

    share: allow the device to use a mapped file's memory in place.
    """
    as_it_is = all(KINDS[a.dtype.name] == dtype for a in arrays)
    if share and as_it_is and in_a_row(arrays):
        out = shared(arrays, dtype)
    elif dtype not in NUMPY or any(a.dtype == np.uint16 for a in arrays):
        out = mx.concatenate([converted(a, dtype) for a in arrays])
    elif as_it_is and len(arrays) == 1:
        out = mx.array(arrays[0])  # one copy too, without writing zeros first
    else:
        out = filled(arrays, dtype)
    mx.eval(out)
    return out


def in_a_row(arrays: Sequence[Array]) -> bool:
    """Return whether these are adjacent, ordered views of a mapped file.

    Read-only: otherwise they could change.

    They must be aligned to their items, as every kernel requires (ours load several words at once, but as
    packed vectors). Files of other programs may store a tensor at any offset.
    """
    if any(a.flags.writeable or not (a.flags.c_contiguous and a.flags.aligned) for a in arrays):
        return False
    ends = [address(a) + a.nbytes for a in arrays]
    return all(address(a) == end for a, end in zip(arrays[1:], ends[:-1], strict=True))


def shared(arrays: Sequence[Array], dtype: Any) -> Any:
    """Create the device's array on the pages of these arrays. MLX copies the pages if it cannot adopt them."""
    pages = Pages(arrays)
    held = np.asarray(pages)
    held[::PAGE].max()  # wait for the disk here, where progress is shown, and not in the first answer
    data = mx.asarray(held)[pages.skip : pages.skip + pages.nbytes]
    return data.view(dtype).reshape(-1, arrays[0].shape[1])


def filled(arrays: Sequence[Array], dtype: Any) -> Any:
    out = mx.zeros((sum(len(a) for a in arrays), arrays[0].shape[1]), dtype)
    mx.eval(out)
    view, row = np.array(out, copy=False), 0
    with np.errstate(over="ignore"):  # float32 beyond float16 becomes infinite, as in MLX
        for a in arrays:
            view[row : row + len(a)] = a
            row += len(a)
    return out


def converted(a: Array, dtype: Any) -> Any:
    x = mx.array(a)
    return (x.view(mx.bfloat16) if a.dtype == np.uint16 else x).astype(dtype)
