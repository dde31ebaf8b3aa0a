"""From where a weight lies to the device's memory, with as few copies as MLX's Python API allows.

Three ways, the leanest that applies is taken for each array:

shared     Metal only, no byte is copied: the pages of the mapped file become the array's buffer. `mx.asarray`
           adopts host memory through newBufferWithBytesNoCopy, since MLX 0.32.1 [mlx#3872], if it begins at a
           page; so the whole pages around an array are given, and the array is a slice of them. Arrays that
           lie one behind the other in the file (gate and up often do) are one slice. llama.cpp maps its
           models for Metal in this way [llama.cpp#1696]. What needs another dtype, or is joined from
           places apart, cannot be shared.
filled     One copy: the buffer is allocated where it is to stay, and NumPy writes each part into a view of it
           (unified memory; MLX documents such views as writable), in the wanted dtype.
converted  bfloat16, of which NumPy knows nothing, through MLX: a copy each for reading, converting and joining.

`mx.array` always copies, and so does `mx.load`: its arrays are lazy, but each is read into a buffer of its
own, and mx.concatenate writes another. `mx.mmap_weights` was proposed and not taken [mlx#4249].
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.weight import Array

PAGE = mmap.PAGESIZE
KINDS = {"uint32": mx.uint32, "float32": mx.float32, "float16": mx.float16, "uint16": mx.bfloat16}
NUMPY = {mx.uint32: np.uint32, mx.float32: np.float32, mx.float16: np.float16}


class Pages:
    """The whole pages around arrays that lie one behind the other, as bytes, through NumPy's array interface.

    It keeps the arrays alive, and so the map below them; NumPy and MLX in turn keep it.
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
    """Arrays (N, K) one below the other -> (sum of N, K) of the device in dtype, evaluated; uint16 is bfloat16's bits.

    share: the device may keep what lies in a mapped file where it is.
    """
    as_it_is = all(KINDS[a.dtype.name] == dtype for a in arrays)
    if share and as_it_is and in_a_row(arrays):
        out = shared(arrays, dtype)
    elif dtype not in NUMPY or any(a.dtype == np.uint16 for a in arrays):
        out = mx.concatenate([converted(a, dtype) for a in arrays])
    elif as_it_is and len(arrays) == 1:
        out = mx.array(arrays[0])  # one copy as well, and no zeros before
    else:
        out = filled(arrays, dtype)
    mx.eval(out)
    return out


def in_a_row(arrays: Sequence[Array]) -> bool:
    """Whether these are views of a mapped file, whole and in its order. Read-only: else someone may write there.

    Aligned to their items, as every kernel asks (ours load several words at once, but as packed vectors): a file of
    others may begin a tensor anywhere.
    """
    if any(a.flags.writeable or not (a.flags.c_contiguous and a.flags.aligned) for a in arrays):
        return False
    ends = [address(a) + a.nbytes for a in arrays]
    return all(address(a) == end for a, end in zip(arrays[1:], ends[:-1], strict=True))


def shared(arrays: Sequence[Array], dtype: Any) -> Any:
    """The device's array upon the pages of these; a copy of the pages where MLX cannot adopt them."""
    pages = Pages(arrays)
    held = np.asarray(pages)
    held[::PAGE].max()  # wait for the disk here, where the progress is shown, and not in the first answer
    data = mx.asarray(held)[pages.skip : pages.skip + pages.nbytes]
    return data.view(dtype).reshape(-1, arrays[0].shape[1])


def filled(arrays: Sequence[Array], dtype: Any) -> Any:
    out = mx.zeros((sum(len(a) for a in arrays), arrays[0].shape[1]), dtype)
    mx.eval(out)
    view, row = np.array(out, copy=False), 0
    with np.errstate(over="ignore"):  # float32 beyond float16 is infinite, as MLX has it
        for a in arrays:
            view[row : row + len(a)] = a
            row += len(a)
    return out


def converted(a: Array, dtype: Any) -> Any:
    x = mx.array(a)
    return (x.view(mx.bfloat16) if a.dtype == np.uint16 else x).astype(dtype)
