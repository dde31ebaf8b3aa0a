"""Runs kernels made with mx.fast.metal_kernel on a CPU: the source that MLX generates, compiled as C++.

    launches = traced(call, *inputs)          # MLX's own trace: source, grid, threadgroup of its kernels
    kernels = build([l.text for l in launches])
    run(kernels[0], buffers, launches[0].grid, launches[0].threadgroup)   # buffers: inputs, then outputs

MLX without Metal refuses to call a metal_kernel, but traces it for export. So shapes, dtypes, address spaces,
attributes and template instantiation are MLX's own. If a source names an input's shape, strides or ndim, MLX
passes it as another buffer after the input: int32 shape, int64 strides, int32 ndim.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compiled
import mlx.core as mx
import numpy as np

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O1", "-march=native", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
# Metal's half rounds after every operation; on x86 both compilers need an option for that. A misaligned load
# must trap: x86 allows it, Metal does not.
OWN = {
    "g++": ["-fexcess-precision=16", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"],
    "clang++": [
        "-Xclang",
        "-ffloat16-excess-precision=none",
        "-fsanitize=alignment",
        "-fsanitize-trap=alignment",
    ],
}
INSTANCE = re.compile(r"\ntemplate \[\[host_name.*?decltype\((\w+<[^;]*?>)\) [^;]*;\n", re.DOTALL)


def works(name: str) -> bool:
    """Return whether a compiler is installed that has _Float16 and can round it after every operation."""
    if not shutil.which(name):
        return False
    probe = [name, "-std=c++17", *OWN[name], "-march=native", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(probe, check=False, input=b"_Float16 x;", capture_output=True).returncode == 0


# None on a Mac, where the kernels run on the GPU
COMPILERS = [] if mx.metal.is_available() else [name for name in OWN if works(name)]
CXX = COMPILERS[0] if COMPILERS else None


@dataclass(frozen=True)
class Launch:
    """One kernel of a trace, as MLX would launch it. A grid counts threads."""

    name: str
    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]


def traced(call: Callable[..., Any], *inputs: Any) -> list[Launch]:
    """Return every metal_kernel launched by call(*inputs), in order."""
    return [
        Launch(a[0], a[1], (a[2], a[3], a[4]), (a[5], a[6], a[7]))
        for name, a in primitives(call, *inputs)
        if name == "CustomKernel"
    ]


def primitives(call: Callable[..., Any], *inputs: Any) -> list[tuple[str, list[Any]]]:
    """Return (name, arguments) of every operation in MLX's trace of call(*inputs), in order."""
    events: list[dict[str, Any]] = []
    mx.export_function(events.append, call, *inputs)
    return [(e["name"], e["arguments"]) for e in events if e["type"] == "primitive"]


def threadgroup_variables(text: str) -> str:
    """Mark `threadgroup T name[...]` as a variable, because a macro cannot distinguish it from a pointer."""
    return re.sub(r"\bthreadgroup\s+((?:const\s+)?[\w:<>, ]+?\s+\w+\s*\[)", r"MTL_TG_STATIC \1", text)


def entry(text: str, number: int) -> str:
    """Convert the source of one kernel to C++ in a separate namespace, with an entry point emulate_<number>."""
    found = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.DOTALL)
    assert found, "not a kernel that MLX generated"
    instance = INSTANCE.search(text)
    body = threadgroup_variables(text[: instance.start()] if instance else text)
    body = re.sub(r"\bthreadgroup\b(?!_)", "", body)
    called = instance.group(1) if instance else found.group(1)
    arguments = ", ".join(argument(p) for p in found.group(2).split(",\n"))
    return (
        f"namespace k{number} {{\n{body}\nstatic void call(void** b) {{ {called}({arguments}); }}\n}}\n"
        f'extern "C" int emulate_{number}(void** b, const unsigned* g, const unsigned* t, int o, char* e) '
        f"{{ return shim::emulate(k{number}::call, b, g, t, o, e); }}\n"
    )


def argument(parameter: str) -> str:
    """Convert a parameter of the generated signature to an argument: a buffer, or an attribute's value."""
    buffer = re.match(r"\s*(const )?(?:device|constant) (.+?)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]", parameter)
    if buffer:
        const, dtype, kind, _, index = buffer.groups()
        return f"{'*' if kind == '&' else ''}({const or ''}{dtype}*)b[{index}]"
    attribute = re.search(r"\[\[(\w+)\]\]", parameter)
    assert attribute, parameter
    return f"attr_{attribute.group(1)}()"


def build(texts: Sequence[str], cxx: str | None = CXX) -> list[Any]:
    """Compile kernels as one file, with one start of the compiler; cached by content."""
    assert cxx is not None, "needs g++ or clang++ 16"
    unit = f'#include "{HERE}/msl_shim.h"\n' + "".join(entry(t, i) for i, t in enumerate(texts))
    headers = [HERE / "msl_shim.h", HERE.parent / "cuda" / "fibers.h"]
    loaded = compiled.library([cxx, *FLAGS, *OWN[cxx]], unit, headers)
    return [getattr(loaded, f"emulate_{i}") for i in range(len(texts))]


def run(
    kernel: Any, buffers: Sequence[Any], grid: Sequence[int], threadgroup: Sequence[int], order: int = 0
) -> None:
    """Run a kernel. order: bit 0 reverses lanes and SIMD-groups, bit 1 threadgroups.

    Results must not depend on the order. Raises RuntimeError for divergence, a barrier that not all reach, an
    access outside a guarded buffer, and a misaligned one.
    """
    pointers = (ctypes.c_void_p * len(buffers))(*[b.ctypes.data for b in buffers])
    three, error = ctypes.c_uint * 3, ctypes.create_string_buffer(256)
    if kernel(pointers, three(*grid), three(*threadgroup), order, error):
        raise RuntimeError(error.value.decode())


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

END, BEGIN, ODD = "end", "begin", "odd"  # position of an array between its forbidden pages


def guarded(array: Any, at: str = END) -> Any:
    """Copy an array to separate pages.

    It ends at a forbidden page, begins after one, or is at an odd address: a multiple of the item size only.
    The pages are freed with the last array that uses them.
    """
    page, odd = mmap.PAGESIZE, array.itemsize if at == ODD else 0
    size = -(-(array.nbytes + odd) // page) * page or page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = LIBC.mmap(None, size + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    LIBC.mprotect(start, page, 0)
    LIBC.mprotect(start + page + size, page, 0)
    place = start + page + (size - array.nbytes if at == END else odd)
    memory = (ctypes.c_char * array.nbytes).from_address(place)
    # A failing test shows its arrays later, so they must still exist
    weakref.finalize(memory, LIBC.munmap, start, size + 2 * page).atexit = False
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def host(a: Any) -> Any:
    """Convert an MLX array to NumPy; bfloat16, which NumPy lacks, to its bits."""
    return np.ascontiguousarray(np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a))


def floats(a: Any) -> Any:
    """Convert a host array to float64; uint16 is read as bfloat16's bits."""
    wide = (a.astype(np.uint32) << 16).view(np.float32) if a.dtype == np.uint16 else a
    return wide.astype(np.float64)


def unwritten(shape: Sequence[int], dtype: Any) -> Any:
    """Return an output filled with NaN, so that unwritten values are detected."""
    if dtype == np.uint16:
        return np.full(shape, 0x7FFF, np.uint16)
    return np.full(shape, np.nan, dtype)


def buffers_of(names: Sequence[str], inputs: Sequence[Any], source: str) -> list[Any]:
    """Return host arrays as MLX passes them, with the shapes, strides and ranks that the source names."""
    out: list[Any] = []
    for name, value in zip(names, inputs, strict=True):
        out.append(value)
        if value.ndim == 0:
            continue
        if f"{name}_shape" in source:
            out.append(np.array(value.shape, np.int32))
        if f"{name}_strides" in source:
            out.append(np.array([s // value.itemsize for s in value.strides], np.int64))
        if f"{name}_ndim" in source:
            out.append(np.array([value.ndim], np.int32))
    return out
