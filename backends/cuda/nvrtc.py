"""Compile and launch CUDA kernels on the target machine, with NVRTC and the driver through ctypes.

torch brings NVRTC along, so no toolkit is needed. Machine code is kept in the cache (disk_cache.py) under a hash of the text, the GPU's architecture and NVRTC's version.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinychat_mlx.backends.cuda import programs
from tinychat_mlx.base import disk_cache
from tinychat_mlx.base.errors import BackendError

INVALID_CONTEXT = 201  # raised in a thread that has not used CUDA yet


def find_nvrtc(version: str | None) -> ctypes.CDLL:
    """Load NVRTC: torch's, from NVIDIA's wheels, or the system's. Raises BackendError."""
    major = (version or "12").split(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    names: list[Path] = []
    for root in dict.fromkeys(Path(entry) for entry in sys.path if Path(entry).is_absolute()):
        if (root / "torch" / "lib").is_dir():
            names.append(root / "torch" / "lib" / name)
        names += [root / "nvidia" / p / name for p in ("cuda_nvrtc/lib", f"cu{major}/lib", "cuda_nvrtc/bin")]
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    names.append(cuda / "lib64" / name)
    for file in filter(Path.exists, names):
        with contextlib.suppress(OSError):
            # NVRTC opens libnvrtc-builtins by name, which succeeds if it is already loaded.
            for builtins in sorted(file.parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(file))
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name)  # search the system's library path
    raise BackendError(
        f"{name} is neither in torch's folder nor in {cuda}",
        where="cuda backend",
        remedy="install NVRTC, or set CUDA_HOME",
    )


class Compiler:
    """NVRTC for one architecture ("sm_87")."""

    def __init__(self, library: ctypes.CDLL, arch: str, folder: Path | None = None) -> None:
        self.nvrtc, self.arch = library, arch
        self.folder = folder or disk_cache.place("cubins")
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def cubin(self, program: str, defines: Mapping[str, int]) -> bytes:
        """Return a program's machine code from the cache or compile it. Raises BackendError with the log."""
        text = programs.source(program, defines).encode()
        key = hashlib.sha256(b"\0".join([text, self.arch.encode(), self.version.encode()])).hexdigest()[:24]
        file = self.folder / f"{program}-{self.arch}-{key}.cubin"
        with contextlib.suppress(OSError):
            return file.read_bytes()
        made = self.compile(program, text)
        with contextlib.suppress(OSError):  # if the cache is not writable, the next start compiles again
            disk_cache.write(file, made)
        return made

    def compile(self, program: str, text: bytes) -> bytes:
        nvrtc, handle, size = self.nvrtc, ctypes.c_void_p(), ctypes.c_size_t()
        nvrtc.nvrtcCreateProgram(ctypes.byref(handle), text, f"{program}.cu".encode(), 0, None, None)
        try:
            options = [f"--gpu-architecture={self.arch}".encode(), b"--std=c++17"]
            array = (ctypes.c_char_p * len(options))(*options)
            status = nvrtc.nvrtcCompileProgram(handle, len(options), array)
            if status:
                nvrtc.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
                log = ctypes.create_string_buffer(size.value)
                nvrtc.nvrtcGetProgramLog(handle, log)
                lines = log.value.decode(errors="replace").splitlines()
                reason = next((line for line in lines if "error" in line), f"status {status}")
                raise BackendError(
                    f"NVRTC {self.version} cannot compile {program} for {self.arch}: {reason}",
                    where="cuda backend",
                    remedy="update torch and the NVIDIA driver",
                )
            nvrtc.nvrtcGetCUBINSize(handle, ctypes.byref(size))
            code = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetCUBIN(handle, code)
            return code.raw
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))


class Driver:
    """Launches kernels on torch's current stream, in torch's context."""

    def __init__(self, compiler: Compiler, cuda: ctypes.CDLL | None = None) -> None:
        self.compiler = compiler
        self.cuda = cuda or ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self.cuda.cuLaunchKernel.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
        self.functions: dict[tuple[str, tuple[tuple[str, int], ...], str], ctypes.c_void_p] = {}
        self.context = ctypes.c_void_p()
        self._check(self.cuda.cuCtxGetCurrent(ctypes.byref(self.context)), "cuCtxGetCurrent")

    def launch(
        self,
        program: str,
        defines: Mapping[str, int],
        kernel: str,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
    ) -> None:
        """grid: up to three numbers of blocks. block: threads. arguments: ctypes scalars."""
        import torch

        function = self.function(program, tuple(sorted(defines.items())), kernel)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        x, y, z = (*grid, *[1] * (3 - len(grid)))
        stream = torch.cuda.current_stream().cuda_stream
        start = self.cuda.cuLaunchKernel
        status = start(function, x, y, z, block, 1, 1, 0, stream, pointers, None)
        if status == INVALID_CONTEXT:
            self._check(self.cuda.cuCtxSetCurrent(self.context), "cuCtxSetCurrent")
            status = start(function, x, y, z, block, 1, 1, 0, stream, pointers, None)
        self._check(status, kernel)

    def function(self, program: str, defines: tuple[tuple[str, int], ...], kernel: str) -> ctypes.c_void_p:
        key = program, defines, kernel
        if key not in self.functions:
            module, made = ctypes.c_void_p(), ctypes.c_void_p()
            code = self.compiler.cubin(program, dict(defines))
            self._check(self.cuda.cuModuleLoadData(ctypes.byref(module), code), f"loading {program}")
            found = self.cuda.cuModuleGetFunction(ctypes.byref(made), module, kernel.encode())
            self._check(found, f"finding {kernel}")
            self.functions[key] = made
        return self.functions[key]

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(status, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode()
            raise BackendError(f"{what}: {reason} (CUDA error {status})", where="cuda backend")
