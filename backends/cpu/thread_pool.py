"""Runs lists of ops on the native thread pool, one list at a time."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

from tinychat_mlx.backends.cpu.native_abi import Op, instruction_sets, open_library
from tinychat_mlx.base.errors import BackendError

_NO_MEMORY, _BAD_ID = 1, 2


class OpList:
    """Ops in execution order, and the objects that their pointers refer to."""

    def __init__(self, ops: Sequence[Op], keep: object = None) -> None:
        self.ops, self.keep = list(ops), keep
        self.pointers = (ctypes.c_void_p * len(ops))(*(ctypes.addressof(op) for op in ops))


class ThreadPool:
    """A native thread pool and the kernels of one instruction set."""

    def __init__(self, isa: str | None, threads: int) -> None:
        """isa None selects the best one. Raises BackendError if the processor lacks it, or for threads < 1."""
        self._lib = open_library()
        here = instruction_sets()
        if isa and isa not in here:
            raise BackendError(
                f"this processor has no {isa}",
                where="TINYCHAT_CPU_ISA",
                remedy=f"set it to one of {', '.join(here)}, or unset it",
            )
        if threads < 1:
            raise BackendError(f"{threads} threads are too few", where="cpu backend", remedy="use at least 1")
        self.isa, self.threads = isa or here[0], threads
        self._handle = self._lib.tc_new(self.isa.encode(), threads)
        if not self._handle:
            raise BackendError("out of memory", where="cpu backend", remedy="close other programs")
        weakref.finalize(self, self._lib.tc_free, self._handle)

    @property
    def team(self) -> int:
        """Number of threads that run the next ops.

        It is less than `threads` while other programs use the processors.
        """
        return int(self._lib.tc_team(ctypes.c_void_p(self._handle)))

    def run_one(self, op: Op) -> None:
        pointer = ctypes.c_void_p(ctypes.addressof(op))
        self._check(self._lib.tc_run(self._handle, ctypes.byref(pointer), 1))

    def run(self, ops: OpList) -> None:
        self._check(self._lib.tc_run(self._handle, ops.pointers, len(ops.ops)))

    def _check(self, status: int) -> None:
        if status == _BAD_ID:
            raise BackendError(
                "a token id is outside the embedding table",
                where="cpu backend",
                remedy="use the model's own tokenizer",
            )
        if status == _NO_MEMORY:
            raise BackendError(
                "out of memory", where="cpu backend", remedy="use a smaller model or a shorter --context"
            )
