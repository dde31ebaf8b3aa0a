"""Measure our kernels against the stock operations on this Mac, product by product, and save the faster ones.

`tinychat bench --kernels` calls `products` and `run`. Without Metal there is nothing to measure.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.backends.mlx import kernel_selection, split_int8
from tinychat_mlx.backends.mlx.activations import glu_of
from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.device import MB, Chip, find_chip, mx
from tinychat_mlx.backends.mlx.fused import MOST_ROWS, Kernels, applies, key_of, kind_of, stock
from tinychat_mlx.backends.mlx.weights import MlxHandle, PackedHandle
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Choice, Norm

COLD = 96 * MB  # bytes of weights per round, one copy after another: more than a Max's last-level cache
ROUNDS = 9  # of ours and stock alternating; the median is used
ROWS = range(1, MOST_ROWS + 1)  # of an answer, and of drafted tokens or several conversations

Step = Callable[[int], Any]  # number of rows through a decoder -> their logits


@dataclass(frozen=True)
class Trial:
    """One product of a decoder: rows of x times N rows of W (both halves of a gated pair)."""

    n: int
    k: int
    bits: int
    group_size: int
    dtype: Any  # of the scales, and of the result if there is no residual
    rows: int
    x: Any  # x's dtype
    norm: bool
    act: str | None
    bias: bool
    residual: Any  # its dtype, or None
    head: bool = False  # a token is chosen from it: ours is the head in halves, stock the 8-bit product


@dataclass(frozen=True)
class Result:
    """Microseconds of one product, with weights not in the cache."""

    key: str
    ours_us: float
    stock_us: float

    @property
    def wins(self) -> bool:
        return self.ours_us < kernel_selection.MARGIN * self.stock_us


class Listener(Kernels):
    """Records each product that a kernel could compute, and leaves it to the stock operations.

    The stock operations request their parts too, such as the product without its norm, for which a kernel may
    be faster.
    """

    def __init__(self) -> None:
        super().__init__(lambda key: False)
        self.heard: dict[str, Trial] = {}

    def head(self, x: Any, w: Any, norm: Norm | None, choice: Choice | None) -> None:
        packed = isinstance(w, PackedHandle) and split_int8.suits(w.shape, w.bits, w.bias is not None)
        if packed or isinstance(w, split_int8.SplitHandle):
            key = split_int8.key_of(w.shape, w.group_size, w.scales.dtype)
            self.heard[key] = Trial(w.shape[0], w.shape[1], 8, w.group_size, w.scales.dtype, 1, x.dtype, norm is not None,
                                                 None, False, None, head=True)  # fmt: skip

    def product(
        self, x: Any, w: MlxHandle, norm: Norm | None = None, act: str | None = None, residual: Any = None
    ) -> None:
        if applies(x, w, norm, act):
            assert isinstance(w, PackedHandle)
            rows, added = x.shape[0], None if residual is None else residual.dtype
            key = key_of(kind_of(rows, norm, act), rows, w, added is not None)
            self.heard[key] = Trial(*w.shape, w.bits, w.group_size, w.scales.dtype, rows, x.dtype, norm is not None,
                                    act, w.bias is not None, added)  # fmt: skip


def products(backend: MlxBackend, step: Step) -> list[Trial]:
    """Record, without computing, what a decoder computes for 1 to MOST_ROWS rows, each form once."""
    kept, listener = backend.kernels, Listener()
    backend.kernels = listener
    try:
        for rows in ROWS:
            step(rows)
    finally:
        backend.kernels = kept
    return list(listener.heard.values())


def mac() -> Chip:
    """Return the chip. Raises BackendError without Metal."""
    chip = find_chip()
    if not chip.metal:
        raise BackendError(
            "this measures Metal kernels",
            where="bench --kernels",
            remedy="run it on a Mac with Apple silicon",
        )
    return chip


def run(
    wanted: Iterable[Trial], progress: Callable[[Result], None] = lambda result: None
) -> tuple[list[Result], str]:
    """Measure and save the faster kernels.

    Returns (results, path of the file). Raises BackendError without Metal.
    """
    chip = mac()
    kernels, results = Kernels(lambda key: True), []
    for trial in wanted:
        result = measure(trial, kernels)
        results.append(result)
        progress(result)
    file = kernel_selection.save(chip.name, {r.key: (r.ours_us, r.stock_us) for r in results})
    return results, str(file)


def keep_capture(captured_us: float, eager_us: float) -> None:
    """Save the measurement of whole decode steps with TINYCHAT_MLX_CAPTURE=1 and 0."""
    kernel_selection.save(find_chip().name, {kernel_selection.CAPTURE: (captured_us, eager_us)})


def measure(trial: Trial, kernels: Kernels) -> Result:
    """Time one product over copies of its weight that are COLD bytes in total."""
    t = trial
    norm = Norm("", "rms", mx.ones(t.k), None, 1e-5) if t.norm else None
    x = mx.random.normal((t.rows, t.k)).astype(t.x)
    residual = None if t.residual is None else mx.random.normal((t.rows, t.n)).astype(t.residual)
    one = weight(t)
    copies: list[Any] = [one, *(weight(t) for _ in range(COLD // one.w.nbytes))]
    ours_of = [split_int8.halved("", w.w, w.scales, w.biases, compiled) for w in copies] if t.head else copies
    weights = {True: ours_of, False: copies}
    mx.eval(x, residual)
    # one kernel, as in the backend
    glu = None if t.act is None else mx.compile(glu_of(t.act), shapeless=True)

    def theirs(x: Any, w: Any, residual: Any) -> Any:
        return stock(x, w, norm, t.act, residual, glu)

    def ours(x: Any, w: Any, residual: Any) -> Any:
        if t.head:
            return kernels.head(x, w, norm, Choice())
        return kernels.launch(x, w, norm, t.act, residual)

    times: dict[bool, list[float]] = {True: [], False: []}
    # alternating, so that heat and other programs affect both; the first round compiles
    for _ in range(ROUNDS + 1):
        for mine, product in ((True, ours), (False, theirs)):
            times[mine].append(seconds(product, x, residual, weights[mine]))
    key = key_of(kind_of(t.rows, norm, t.act), t.rows, one, residual is not None)
    if t.head:
        key = split_int8.key_of(one.shape, t.group_size, t.dtype)
    us, stock_us = (1e6 * statistics.median(times[mine][1:]) for mine in (True, False))
    return Result(key, us, stock_us)


def compiled(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
    return mx.compile(f, shapeless=True)  # type: ignore[no-any-return]


def weight(t: Trial) -> PackedHandle:
    """Random codes of all sizes with mean 0 and deviation 1 / (2 sqrt(k)).

    Products halve x, so no chain overflows.
    """
    rows = min(t.n, 1024)  # repeated, because drawing a head of 500 MB would take several times as long
    drawn = mx.random.randint(0, 1 << 16, (2, rows, t.k * t.bits // 32)).astype(mx.uint32)
    # drawn in two parts: MLX draws floats, and 32 bits at once would end in zeros
    words = drawn[0] << 16 | drawn[1]
    words = mx.tile(words, (-(-t.n // rows), 1))[: t.n]
    most = (1 << t.bits) - 1
    scales = mx.full((t.n, t.k // t.group_size), math.sqrt(3 / t.k) / most, t.dtype)
    biases = scales * (-most / 2)
    bias = mx.zeros(t.n, t.dtype) if t.bias else None
    mx.eval(words, scales, biases, bias)
    return PackedHandle("", (t.n, t.k), words, scales, biases, t.bits, t.group_size, bias)


def seconds(product: Callable[[Any, Any, Any], Any], x: Any, residual: Any, weights: list[Any]) -> float:
    """Return the seconds per product of a chain.

    Each waits for the one before, as in a decoder; otherwise they overlap.
    """
    start, first = time.perf_counter(), x
    for w in weights:
        y = product(x, w, residual)
        if residual is not None:
            residual = y
        else:
            x = following(y, first)
    mx.eval(y)
    return (time.perf_counter() - start) / len(weights)


def following(y: Any, x: Any) -> Any:
    """Return y as an input of x's shape and dtype, with repeated columns.

    A copy, if any, is the same for ours and stock.
    """
    times = -(-x.shape[1] // y.shape[1])
    wide = y if times == 1 else mx.concatenate([y] * times, axis=1)
    return wide[:, : x.shape[1]].astype(x.dtype)
