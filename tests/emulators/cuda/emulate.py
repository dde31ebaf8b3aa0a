"""Runs the project's CUDA kernels on a CPU: their source compiled as C++ with emulator.h's names.

    emulator = Emulator(order=3)     # bit 0 reverses lanes and warps, bit 1 blocks: results must not change
    emulator.launch("matvec", {"BITS": 4, "GROUP": 128}, "matvec", grid, block, arguments)

`launch` has the signature of the driver's launcher, so a whole backend can run on it. `Guarded` creates
arrays that end at a forbidden page: a read or a write past the end is an error that names the block.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compiled
import numpy as np

from tinychat_mlx.backends.cuda import programs

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O1", "-march=native", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
HALF = {"g++": "-fexcess-precision=16", "clang++": "-ffloat16-excess-precision=none"}


def compiler() -> str | None:
    return next((c for c in ("g++", "clang++") if shutil.which(c)), None)


def kernels(text: str) -> dict[str, list[str]]:
    """Return each kernel of a file with the types of its parameters."""
    found = re.findall(r"KERNEL\([^)]*\)\s*(\w+)\((.*?)\)\s*\{", text, re.DOTALL)
    return {
        name: [re.sub(r"\s*\w+$", "", " ".join(p.split())) for p in parameters.split(",")]
        for name, parameters in found
    }


Change = tuple[str, str]


def build(program: str, defines: Mapping[str, int], change: Change | None = None) -> ctypes.CDLL:
    """Compile one program for the CPU; cached by content. change (old, new): a deliberate bug."""
    text = programs.source(program, defines, prelude=False)
    if change is not None:
        assert change[0] in text
        text = text.replace(*change)
    unit = f'#include "{HERE}/emulator.h"\n#include "{programs.FOLDER}/prelude.cuh"\n{text}\n'
    for name, types in kernels(text).items():
        call = ", ".join(f"*({t}*)b[{i}]" for i, t in enumerate(types))
        unit += f"static void body_{name}(void** b) {{ {name}({call}); }}\n"
        unit += f'extern "C" int run_{name}(void** b, const unsigned* g, const unsigned* t, int o, char* e)\n'
        unit += f"{{ return emulate(body_{name}, b, g, t, o, e); }}\n"
    headers = [HERE / "emulator.h", HERE / "fibers.h", programs.FOLDER / "prelude.cuh"]
    cxx = compiler()
    assert cxx is not None
    return compiled.library([cxx, *FLAGS, HALF[cxx]], unit, headers)


class Emulator:
    """A launcher whose device is this CPU."""

    def __init__(self, order: int = 0, change: Change | None = None) -> None:
        self.order, self.change = order, change
        self.loaded: dict[tuple[str, str], ctypes.CDLL] = {}
        self.launched: dict[str, int] = {}  # kernel -> number of launches

    def launch(
        self,
        program: str,
        defines: Mapping[str, int],
        kernel: str,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
    ) -> None:
        key = program, str(sorted(defines.items()))
        if key not in self.loaded:
            self.loaded[key] = build(program, defines, self.change)
        self.launched[kernel] = self.launched.get(kernel, 0) + 1
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        three, error = ctypes.c_uint * 3, ctypes.create_string_buffer(256)
        blocks = three(*grid, *[1] * (3 - len(grid)))
        run = getattr(self.loaded[key], f"run_{kernel}")
        if run(pointers, blocks, three(block, 1, 1), self.order, error):
            raise RuntimeError(f"{kernel}: {error.value.decode()}")


_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
    """Arrays between forbidden pages, freed together by `close`."""

    def __init__(self) -> None:
        self.mappings: list[tuple[int, int]] = []

    def __enter__(self) -> Guarded:  # noqa: PYI034
        return self

    def __exit__(self, *exc: object) -> None:
        for start, size in self.mappings:
            _libc.munmap(start, size)

    def copy(self, array: np.ndarray) -> np.ndarray:
        """Return a copy that ends at a forbidden page. Another forbidden page precedes its first page."""
        page = mmap.PAGESIZE
        size = max(-(-array.nbytes // page), 1) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = _libc.mmap(None, size + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        _libc.mprotect(start, page, 0)
        _libc.mprotect(start + page + size, page, 0)
        self.mappings.append((start, size + 2 * page))
        memory = (ctypes.c_char * array.nbytes).from_address(start + page + size - array.nbytes)
        copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
        copy[...] = array
        return copy
