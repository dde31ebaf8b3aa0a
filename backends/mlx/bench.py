"""Measures our kernels against the stock operations on this Mac, shape by shape, and keeps the winners.

`tinychat bench --kernels` calls `run`. On another machine there is nothing to measure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.backend import Norm
from tinychat_mlx.backends.mlx import cost, winners
from tinychat_mlx.backends.mlx.device import MB, choose_dtype, find_chip, mx
from tinychat_mlx.backends.mlx.fused import Kernels, key_of, kind_of, stock
from tinychat_mlx.backends.mlx.weights import PackedHandle
from tinychat_mlx.errors import BackendError

COLD = 96 * MB  # weights a round reads, one copy after the other: more than a Max's last-level cache holds
ROUNDS = 9  # of ours and stock in turn; the median is kept


@dataclass(frozen=True)
class Trial:
    """One product of a model: N rows of W (both halves of a gated pair), K inputs."""

    n: int
    k: int
    bits: int
    group_size: int
    rows: int = 1
    norm: bool = False
    act: str | None = None


@dataclass(frozen=True)
class Result:
    """Microseconds of one product, weights not in cache."""

    key: str
    ours_us: float
    stock_us: float

    @property
    def wins(self) -> bool:
        return self.ours_us < winners.MARGIN * self.stock_us


def trials(
    shape: cost.Shape, group_size: int = 128, head_bits: int = 8, act: str = "silu"
) -> Iterator[Trial]:
    """What a decoder of this shape computes: each product in its form, and few rows of each."""
    qkv, o, gate_up, down = shape.linears
    head = (shape.vocab_size, shape.hidden_size)
    yield Trial(*qkv, 4, group_size, norm=True)
    yield Trial(*o, 4, group_size)
    yield Trial(*gate_up, 4, group_size, norm=True, act=act)
    yield Trial(*down, 4, group_size)
    yield Trial(*head, head_bits, group_size, norm=True)
    for rows in (2, 4, 8):
        for n, k in shape.linears:
            yield Trial(n, k, 4, group_size, rows)
        yield Trial(*head, head_bits, group_size, rows)


def run(
    wanted: Iterable[Trial], progress: Callable[[Result], None] = lambda result: None
) -> tuple[list[Result], str]:
    """Measure, keep the winners -> (results, where they are kept). Raises BackendError without Metal."""
    chip = find_chip()
    if not chip.metal:
        raise BackendError("bench --kernels measures Metal kernels: it needs a Mac with Apple silicon")
    kernels, results = Kernels(lambda key: True), []
    for trial in wanted:
        result = measure(trial, kernels, choose_dtype(chip, exact=False))
        results.append(result)
        progress(result)
    file = winners.save(chip.name, {r.key: (r.ours_us, r.stock_us) for r in results})
    return results, str(file)


def keep_capture(captured_us: float, eager_us: float) -> None:
    """Keep the measurement of whole decode steps, with TINYCHAT_MLX_CAPTURE=1 and 0."""
    winners.save(find_chip().name, {winners.CAPTURE: (captured_us, eager_us)})


def measure(trial: Trial, kernels: Kernels, dtype: Any) -> Result:
    """Time one product, over copies of its weight that together are COLD bytes."""
    # A norm reads the residual, which is float32 beside float16 weights
    x = mx.random.normal((trial.rows, trial.k)).astype(mx.float32 if trial.norm else dtype)
    norm = Norm("", "rms", mx.ones(trial.k), None, 1e-5) if trial.norm else None
    one = weight(trial, dtype)
    copies = [one] + [weight(trial, dtype) for _ in range(COLD // one.w.nbytes)]
    mx.eval(x, [h.w for h in copies])
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS + 1):  # in turn, so that heat and other programs meet both; the first compiles
        ours.append(seconds(lambda h: kernels.launch(x, h, norm, trial.act, None), copies))
        theirs.append(seconds(lambda h: stock(x, h, norm, trial.act, None), copies))
    key = key_of(kind_of(trial.rows, norm, trial.act), trial.rows, one)
    return Result(key, 1e6 * statistics.median(ours[1:]), 1e6 * statistics.median(theirs[1:]))


def weight(trial: Trial, dtype: Any) -> PackedHandle:
    """Random codes: the time does not depend on them."""
    words = mx.random.randint(0, 1 << 31, (trial.n, trial.k * trial.bits // 32)).astype(mx.uint32)
    scales = mx.full((trial.n, trial.k // trial.group_size), 0.01, dtype)
    mx.eval(words, scales)
    return PackedHandle("", (trial.n, trial.k), words, scales, -scales, trial.bits, trial.group_size, None)


def seconds(f: Callable[[PackedHandle], Any], handles: list[PackedHandle]) -> float:
    """Of one call, from a chain of independent ones in one evaluation."""
    start = time.perf_counter()
    mx.eval([f(h) for h in handles])
    return (time.perf_counter() - start) / len(handles)
