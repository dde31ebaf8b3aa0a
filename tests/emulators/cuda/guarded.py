"""Kernels on guarded memory: every tensor ends at a forbidden page, and every output starts as NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from emulate import Change, Emulator, Guarded

from tinychat_mlx.backends.cuda.kernels import Kernels


class GuardedKernels(Kernels):
    """Kernels whose outputs and scratch are guarded. `put` copies an input into guarded memory."""

    def __init__(self, memory: Guarded, order: int = 0, change: Change | None = None) -> None:
        super().__init__(Emulator(order, change), torch.device("cpu"), 8)
        self.memory = memory

    def put(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        host = array.numpy() if isinstance(array, torch.Tensor) else array
        return torch.from_numpy(self.memory.copy(np.ascontiguousarray(host)))

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.put(torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype))

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        fresh = (name, shape) not in self._scratch
        made = super().scratch(name, shape, dtype)
        if fresh:
            made = self.put(
                made if name == "tickets" else made + (float("nan") if made.is_floating_point() else 9)
            )
            self._scratch[name, shape] = made
        return made

    def handle(self, w: Any) -> Any:
        """Copy a packed weight's tensors into guarded memory."""
        bias = None if w.bias is None else self.put(w.bias)
        return replace(w, codes=self.put(w.codes), scales=self.put(w.scales), bias=bias)


def both_orders(run: Any, change: Change | None = None) -> np.ndarray:
    """Call run(kernels) -> tensor in both orders of lanes and blocks. The results must be bit-identical."""
    results = []
    for order in (0, 3):
        with Guarded() as memory:
            results.append(run(GuardedKernels(memory, order, change)).numpy().copy())
    np.testing.assert_array_equal(results[0], results[1], "depends on the order of threads")
    return results[0]
