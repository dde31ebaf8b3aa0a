"""Locate the native library and declare its C interface.

The structs mirror kernels/op.h field by field. `open_library` compares their sizes with those of the library.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import tinychat_mlx
from tinychat_mlx import contract
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Choice

_FILES = ("tinychat_cpu.so", "tinychat_cpu.dylib", "tinychat_cpu.dll")
_BUILD = "install the package (pip install .), or in a checkout run: cmake -S backends/cpu -B build/dev && cmake --build build/dev"

EMBED, LINEAR, NORM, ROPE, ATTENTION, MAP, PACK, PROBE, ROUTE, EXPERTS = range(1, 11)
INT4, INT8, F16, BF16, F32 = range(5)
HALVES, FLOATS, ZEROS = range(3)
NORMS = {"rms": 1, "layer": 2}
ACTS = {name: number for number, name in enumerate(("", *contract.ACTS))}  # as op.h's Act
MAP_ACT, MAP_GLU, MAP_ADD, MAP_SCALE, MAP_SOFTCAP = range(5)


class CWeight(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("group", c_int32),
        ("ends", c_int32),
        ("has_bias", c_int32),
        ("data", c_void_p),
    ]


class CNorm(Structure):
    _fields_ = [("kind", c_int32), ("eps", c_float), ("weight", c_void_p), ("bias", c_void_p)]


class CChoice(Structure):
    _fields_ = [("on", c_int32), ("temperature", c_float), ("tail", c_float), ("tiles", c_int32)]

    def set(self, choice: Choice | None) -> None:
        self.on = choice is not None
        if choice is not None:
            self.temperature, self.tail = choice.temperature, choice.tail


class CSegment(Structure):
    _fields_ = [
        ("rows", c_int32),
        ("capacity", c_int32),
        ("length", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("partial", c_void_p),
        ("done", c_void_p),
    ]


class EmbedOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("ids", c_void_p),
        ("table", POINTER(CWeight)),
        ("y", c_void_p),
    ]


class LinearOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("w", POINTER(CWeight)),
        ("norm", POINTER(CNorm)),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("act", c_int32),
        ("gated", c_int32),
        ("exact", c_int32),
        ("pad", c_int32),
        ("from_", c_void_p),
        ("to", c_void_p),
        ("share", c_void_p),
        ("choice", POINTER(CChoice)),
    ]


class RouteOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("experts", c_int32),
        ("k", c_int32),
        ("normalise", c_int32),
        ("shared", c_int32),
        ("logits", c_void_p),
        ("stride", c_int64),
        ("first", c_void_p),
        ("row", c_void_p),
        ("share", c_void_p),
    ]


class ExpertsOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("experts", c_int32),
        ("each", c_int32),
        ("up", c_int32),
        ("act", c_int32),
        ("exact", c_int32),
        ("pad", c_int32),
        ("w", POINTER(CWeight)),
        ("first", c_void_p),
        ("row", c_void_p),
        ("share", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("norm", POINTER(CNorm)),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
    ]


class NormOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("heads", c_int32),
        ("dim", c_int32),
        ("x", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("norm", POINTER(CNorm)),
        ("y", c_void_p),
    ]


class RopeOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("heads", c_int32),
        ("half", c_int32),
        ("interleaved", c_int32),
        ("pad", c_int32),
        ("x", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("positions", c_void_p),
        ("table", c_void_p),
    ]


class AttentionOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("dim", c_int32),
        ("dim_pad", c_int32),
        ("segments", c_int32),
        ("window", c_int32),
        ("kv_kind", c_int32),
        ("pad", c_int32),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_stride", c_int64),
        ("q_head", c_int64),
        ("k_stride", c_int64),
        ("k_head", c_int64),
        ("v_stride", c_int64),
        ("v_head", c_int64),
        ("y", c_void_p),
        ("segment", POINTER(CSegment)),
        ("alibi", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class MapOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("kind", c_int32),
        ("act", c_int32),
        ("factor", c_float),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
    ]


class PackOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("row", c_int32),
        ("pad", c_int32),
        ("w", POINTER(CWeight)),
        ("source", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
    ]


class ProbeOp(Structure):
    _fields_ = [
        ("code", c_int32),
        ("rows", c_int32),
        ("data", c_void_p),
        ("bytes", c_int64),
        ("work", c_int64),
        ("dots", c_void_p),
        ("sink", c_void_p),
    ]


Op = EmbedOp | LinearOp | NormOp | RopeOp | AttentionOp | MapOp | PackOp | ProbeOp | RouteOp | ExpertsOp
_SIZES: dict[int, type[Structure]] = {
    EMBED: EmbedOp,
    LINEAR: LinearOp,
    NORM: NormOp,
    ROPE: RopeOp,
    ATTENTION: AttentionOp,
    MAP: MapOp,
    PACK: PackOp,
    PROBE: ProbeOp,
    ROUTE: RouteOp,
    EXPERTS: ExpertsOp,
    0: CWeight,
    -1: CNorm,
    -2: CSegment,
    -3: CChoice,
}


def find_library() -> Path:
    """Return the library's path. Raises BackendError if it was not built."""
    # In an editable install __path__ has two entries: site-packages/tinychat_mlx and the checkout.
    for folder in tinychat_mlx.__path__:
        for name in _FILES:
            if (path := Path(folder) / name).exists():
                return path
    raise BackendError(
        f"its native library is missing from {tinychat_mlx.__path__[0]}", where="cpu backend", remedy=_BUILD
    )


@functools.cache
def open_library() -> Any:
    """Open the library and declare argument types. Raises BackendError if it is absent or of another version."""
    path = find_library()
    try:
        lib: Any = ctypes.CDLL(str(path))
    except OSError as e:
        raise BackendError(
            f"{path} does not load ({e})", where="cpu backend", remedy=f"rebuild it: {_BUILD}"
        ) from None
    lib.tc_isa.argtypes, lib.tc_isa.restype = [c_int32], c_char_p
    lib.tc_new.argtypes, lib.tc_new.restype = [c_char_p, c_int32], c_void_p
    lib.tc_free.argtypes, lib.tc_free.restype = [c_void_p], None
    lib.tc_run.argtypes, lib.tc_run.restype = [c_void_p, c_void_p, c_int32], c_int32
    lib.tc_weight_bytes.argtypes, lib.tc_weight_bytes.restype = [POINTER(CWeight)], c_int64
    lib.tc_sizeof.argtypes, lib.tc_sizeof.restype = [c_int32], c_int32
    if any(lib.tc_sizeof(code) != ctypes.sizeof(struct) for code, struct in _SIZES.items()):
        raise BackendError(
            f"{path} belongs to another version of tinychat-mlx",
            where="cpu backend",
            remedy=f"rebuild it: {_BUILD}",
        )
    return lib


def instruction_sets() -> list[str]:
    """Return this processor's instruction sets in the library, best first: ["avx512vnni", "avx2", "scalar"]."""
    lib = open_library()
    found: list[str] = []
    while (name := lib.tc_isa(len(found))) is not None:
        found.append(name.decode())
    return found
