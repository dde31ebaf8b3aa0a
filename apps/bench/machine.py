"""Upper bounds of this machine's speed, measured in every round, in a separate process, with all threads."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from tinychat_mlx.base.errors import TinychatError

READ = 1 << 30  # bytes that a GPU's measurement reads


class Subject:
    """The limits of a backend's device; None for those that cannot be measured."""

    def __init__(self, backend: str, threads: int | None) -> None:
        self._engine: Any = None
        self._backend = backend
        if backend in ("cpu", "reference"):
            self._open_cpu(threads)

    def _open_cpu(self, threads: int | None) -> None:
        try:
            from tinychat_mlx.backends.cpu.backend import CpuBackend

            self._engine = CpuBackend(threads=threads).engine
        except TinychatError:
            if self._backend == "cpu":
                raise

    def about(self) -> None:
        return None

    def bandwidth(self) -> float | None:
        """Return the bytes per second of plain reads."""
        if self._engine is not None:
            from tinychat_mlx.backends.cpu import probe

            return probe.read_bandwidth(self._engine, repeats=3)
        return {"cuda": _cuda, "mlx": _mlx}.get(self._backend, lambda: None)()

    def int8_peak(self) -> float | None:
        """Return the int8 multiplications and additions per second of a pure loop."""
        if self._engine is None:
            return None
        from tinychat_mlx.backends.cpu import probe

        return probe.int8_peak(self._engine, repeats=2)


def _cuda() -> float | None:
    torch = import_module("torch")
    if not torch.cuda.is_available():
        return None
    data = torch.ones(READ // 4, device="cuda")
    return _best(lambda: torch.sum(data).item())


def _mlx() -> float | None:
    mx = import_module("mlx.core")
    data = mx.ones(READ // 4)
    mx.eval(data)
    return _best(lambda: mx.eval(mx.sum(data)))


def _best(read: Any, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one compiles
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return READ / min(times[1:])
