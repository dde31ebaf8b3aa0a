"""Logits of a head in halves: every row by its upper halves, and by all its bits where that may matter to a choice.

What the upper halves leave out of a logit is a sum of s (l - 7.5) x. Lower halves are as good as random on 0 to 15, so
it is as good as normal, with a deviation d = sqrt(85/4 * sum over groups of s^2 |x|^2). The difference of two logits is
off by sqrt(2) d: a token 6 of those below the best is the best in truth once in 10^9 times. Where a token is drawn at a
temperature T, one of an estimate y weighs e^(y / T + (d / T)^2 / 2) in the mean. So an estimate is to be taken for
    reach = y + u |y| + the lesser of 6 sqrt(2) d and d^2 / 2T (greedy: the former),
and beside it stands best - u |best|: u, half a unit of the last place, is what rounding to the result's dtype may move
a logit, so that no estimate left as it is equals a best one that was read. What this does to a drawn token: on the demo's
held-out text at temperatures of 0.7 and 1 a KL of 2e-5 in the mean, 3e-4 at most. Three kernels, none of which the host waits for:
    upper   the estimates, and of each tile of four rows the largest and its reach
    least   the least reach that matters, by one threadgroup
    lower   adds the lower halves where a tile reaches it, and hands on the other estimates
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.backend import Choice, Norm
from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.backends.mlx.halves import HalvedHandle
from tinychat_mlx.backends.mlx.texts import defined, text

KIND = "head"
TILE = 4  # rows of a SIMD-group in upper.metal, R there
THREADS = 64  # two SIMD-groups, in upper.metal of a tile each, in lower.metal of 32 rows
LEAST_THREADS = 512  # a kernel of many registers may be refused 1024
VARIANCE, MARGIN = 85 / 4, 6 * math.sqrt(2)
HALF_UNIT = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}


@dataclass(frozen=True)
class OnDevice(Choice):
    """A choice that is an input of a captured step. given (2,) float32: temperature, tail."""

    given: Any = None


def array_of(choice: Choice | None) -> Any:
    """-> (2,) float32: temperature, tail."""
    if isinstance(choice, OnDevice):
        return choice.given
    return mx.array([0.0, 0.0] if choice is None else [choice.temperature, choice.tail], mx.float32)


class Shortlist:
    """Launches the kernels. tally: where it is a list, each step's share of tiles read whole is put there."""

    def __init__(self) -> None:
        self.tally: list[Any] | None = None
        self._made: dict[tuple[Any, ...], Any] = {}
        self._every = mx.array([-math.inf], mx.float32)

    def logits(self, x: Any, w: HalvedHandle, norm: Norm | None, choice: Choice | None) -> Any:
        """norm(x) · wᵀ, x (1, K) -> (1, N) in the dtype of the scales. choice None: every tile is read whole."""
        given = array_of(choice)
        estimate, top, reach = self.upper(x, w, norm, given)
        least = self._every if choice is None else self.least(top, reach, given, w.scales.dtype)
        if self.tally is not None:
            self.tally.append(mx.logical_not(reach < least).mean())
        return self.lower(x, w, norm, estimate, reach, least)

    def upper(self, x: Any, w: HalvedHandle, norm: Norm | None, given: Any) -> list[Any]:
        """-> estimates (1, N), top and reach (tiles,), float32."""
        n, named = w.shape[0], {"x": x, "w": w.upper, "scales": w.scales, "biases": w.biases}
        named |= _norm(norm) | {"choice": given}
        defines = {"NORM": int(norm is not None), "UPPER": 1, "LOWER": 0}
        kernel = self._kernel("upper", defines, w.scales.dtype, tuple(named), ("estimate", "top", "reach"))
        tiles = -(-n // TILE)
        return kernel(  # type: ignore[no-any-return]
            inputs=list(named.values()), template=[("G", w.group_size)],
            grid=(-(-tiles // 2) * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
            output_shapes=[(1, n), (tiles,), (tiles,)], output_dtypes=[mx.float32] * 3,
        )  # fmt: skip

    def least(self, top: Any, reach: Any, given: Any, dtype: Any) -> Any:
        """-> (1,) float32. dtype: of the logits."""
        kernel = self._kernel(
            "least", {"THREADS": LEAST_THREADS}, dtype, ("top", "reach", "choice"), ("least",)
        )
        (found,) = kernel(
            inputs=[top, reach, given], grid=(LEAST_THREADS, 1, 1), threadgroup=(LEAST_THREADS, 1, 1),
            output_shapes=[(1,)], output_dtypes=[mx.float32],
        )  # fmt: skip
        return found

    def lower(self, x: Any, w: HalvedHandle, norm: Norm | None, estimate: Any, reach: Any, least: Any) -> Any:
        n, dtype = w.shape[0], w.scales.dtype
        named = {"x": x, "w": w.lower, "scales": w.scales, **_norm(norm)}
        named |= {"estimate": estimate, "reach": reach, "least": least}
        defines = {"NORM": int(norm is not None), "UPPER": 0, "LOWER": 1}
        kernel = self._kernel("lower", defines, dtype, tuple(named), ("y",))
        (y,) = kernel(
            inputs=list(named.values()), template=[("T", dtype), ("G", w.group_size)],
            grid=(-(-n // THREADS) * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
            output_shapes=[(1, n)], output_dtypes=[dtype],
        )  # fmt: skip
        return y

    def _kernel(
        self, name: str, defines: dict[str, int], dtype: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> Any:  # fmt: skip
        """The variant for these operands, made once. mx.fast is asked late, so that a test may replace it."""
        digits = round(-math.log2(HALF_UNIT[dtype]))
        variant = (name, digits, *defines.values())
        if variant not in self._made:
            numbers = {"LEAST": -3e38, "VARIANCE": VARIANCE, "MARGIN": MARGIN, "HALF_UNIT": HALF_UNIT[dtype]}
            above = "".join(f"#define {key} {value:.9g}f\n" for key, value in numbers.items())
            self._made[variant] = mx.fast.metal_kernel(
                name="tinychat_" + "_".join(str(v) for v in variant),
                input_names=list(inputs), output_names=list(outputs),
                header=defined({"BITS": 4, **defines}) + above + text("packed"), source=text(name),
            )  # fmt: skip
        return self._made[variant]


def _norm(norm: Norm | None) -> dict[str, Any]:
    return {} if norm is None else {"norm_weight": norm.weight, "eps": mx.array(norm.eps, mx.float32)}
