"""torch's matrix products on the CPU as a subject: int4 and dense bfloat16 weights, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from tinychat_mlx.base.errors import BackendError

COLD = 256 << 20  # bytes of int4 weights per round
GROUP = 128


class Subject:
    """The products of as many layers as fill COLD bytes. linears: (N, K) of one layer's products."""

    def __init__(self, *, linears: list[tuple[int, int]], layers: int, threads: int) -> None:
        try:
            self.torch: Any = import_module("torch")
        except ImportError as e:
            raise BackendError(
                f"torch does not load ({e})", where="--against torch", remedy="pip install torch"
            ) from None
        self.torch.set_num_threads(threads)
        one = sum(n * k for n, k in linears) // 2
        count = max(1, min(layers, -(-COLD // one)))
        self.weights = [self._int4(n, k) for _ in range(count) for n, k in linears]
        self.dense = [self._dense(n, k) for _ in range(count) for n, k in linears]
        self.count = sum(n * k for n, k in linears) * count

    def about(self) -> dict[str, Any]:
        return {"version": str(self.torch.__version__)}

    def _int4(self, n: int, k: int) -> tuple[int, Any, Any]:
        t, ops = self.torch, self.torch.ops.aten
        try:
            pack = ops._convert_weight_to_int4pack_for_cpu
            self.product = ops._weight_int4pack_mm_for_cpu
        except AttributeError:
            raise BackendError(
                f"torch {t.__version__} has no int4 CPU product",
                where="--against torch",
                remedy="install a newer torch",
            ) from None
        packed = pack(t.randint(0, 16, (n, k), dtype=t.int32), 1)
        scales = t.full((k // GROUP, n, 2), 0.01, dtype=t.bfloat16)
        return k, packed, scales

    def _dense(self, n: int, k: int) -> Any:
        return self.torch.randn(n, k).to(self.torch.bfloat16)

    def int4(self, rows: int) -> dict[str, float]:
        """Return operations and weight bytes per second of the int4 products at `rows` rows."""
        inputs = self._inputs(rows, {k for k, _, _ in self.weights})
        seconds = self._time(lambda: [self.product(inputs[k], w, GROUP, s) for k, w, s in self.weights])
        nbytes = sum(w.nbytes + s.nbytes for _, w, s in self.weights)
        return {"ops_per_s": 2 * rows * self.count / seconds, "bytes_per_s": nbytes / seconds}

    def bf16(self, rows: int) -> dict[str, float]:
        """Return operations per second of dense bfloat16 linear layers of the same shapes."""
        inputs = self._inputs(rows, {w.shape[1] for w in self.dense})
        linear = self.torch.nn.functional.linear
        seconds = self._time(lambda: [linear(inputs[w.shape[1]], w) for w in self.dense])
        return {"ops_per_s": 2 * rows * self.count / seconds}

    def _inputs(self, rows: int, sizes: set[int]) -> dict[int, Any]:
        return {k: self.torch.randn(rows, k).to(self.torch.bfloat16) for k in sizes}

    def _time(self, run: Callable[[], object]) -> float:
        with self.torch.inference_mode():
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
