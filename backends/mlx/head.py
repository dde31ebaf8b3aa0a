"""Logits of a head in halves: every row by its upper halves, and by all its bits if that may affect a choice.

The upper halves omit a sum of s (l - 7.5) x from a logit. Lower halves are close to uniform on 0 to 15, so
the sum is close to normal, with a deviation d = sqrt(85/4 * sum over groups of s^2 |x|^2). The difference of
two logits has a deviation of sqrt(2) d. A token 6 of those below the best is the true best once in 10^9
times. If a token is sampled at a temperature T, one with estimate y has a mean weight of e^(y / T + (d / T)^2
/ 2). An estimate's bound is therefore
    reach = y + u |y| + the lesser of 6 sqrt(2) d and d^2 / 2T (greedy: the former),
and it is compared with best - u |best|. u, half a unit of the last place, is the rounding error of the
result's dtype, so that no unrefined estimate equals a best one that was refined. The effect on sampled
tokens: on the demo's held-out text at temperatures of 0.7 and 1 a mean KL of 2e-5, 3e-4 at most. The host
waits for none of the three kernels:
    upper   the estimates, and the largest estimate and reach of each tile of four rows
    least   the least reach that matters, by one threadgroup
    lower   adds the lower halves of tiles that reach it, and copies the other estimates
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.backends.mlx.shader_source import defined, text
from tinychat_mlx.backends.mlx.split_int8 import SplitHandle
from tinychat_mlx.contract import Choice, Norm

KIND = "head"
TILE = 4  # rows of a SIMD-group in head_1_estimate.metal, R there
THREADS = 64  # two SIMD-groups, in head_1_estimate.metal of a tile each, in head_3_refine.metal of 32 rows
LEAST_THREADS = 512  # a kernel with many registers may not support 1024
VARIANCE, MARGIN = 85 / 4, 6 * math.sqrt(2)
HALF_UNIT = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}


@dataclass(frozen=True)
class OnDevice(Choice):
    """A choice that is an input of a captured step. given (2,) float32: temperature, tail."""

    given: Any = None


def array_of(choice: Choice | None) -> Any:
    """Return (2,) float32: temperature, tail."""
    if isinstance(choice, OnDevice):
        return choice.given
    return mx.array([0.0, 0.0] if choice is None else [choice.temperature, choice.tail], mx.float32)


class Shortlist:
    """Launches the kernels. tally: if it is a list, each step appends its share of tiles read at full width."""

    def __init__(self) -> None:
        self.tally: list[Any] | None = None
        self._made: dict[tuple[Any, ...], Any] = {}
        self._every = mx.array([-math.inf], mx.float32)

    def logits(self, x: Any, w: SplitHandle, norm: Norm | None, choice: Choice | None) -> Any:
        """Return norm(x) · wᵀ for x (1, K) as (1, N) in the dtype of the scales.

        choice None: every tile is read at full width.
        """
        given = array_of(choice)
        estimate, top, reach = self.upper(x, w, norm, given)
        least = self._every if choice is None else self.least(top, reach, given, w.scales.dtype)
        if self.tally is not None:
            self.tally.append(mx.logical_not(reach < least).mean())
        return self.lower(x, w, norm, estimate, reach, least)

    def upper(self, x: Any, w: SplitHandle, norm: Norm | None, given: Any) -> list[Any]:
        """Return estimates (1, N), top and reach (tiles,), float32."""
        n, named = w.shape[0], {"x": x, "w": w.upper, "scales": w.scales, "biases": w.biases}
        named |= _norm(norm) | {"choice": given}
        defines = {"NORM": int(norm is not None), "UPPER": 1, "LOWER": 0}
        kernel = self._kernel(
            "head_1_estimate", defines, w.scales.dtype, tuple(named), ("estimate", "top", "reach")
        )
        tiles = -(-n // TILE)
        return kernel(  # type: ignore[no-any-return]
            inputs=list(named.values()), template=[("G", w.group_size)],
            grid=(-(-tiles // 2) * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
            output_shapes=[(1, n), (tiles,), (tiles,)], output_dtypes=[mx.float32] * 3,
        )  # fmt: skip

    def least(self, top: Any, reach: Any, given: Any, dtype: Any) -> Any:
        """Return the least reach that matters, (1,) float32. dtype: of the logits."""
        kernel = self._kernel(
            "head_2_threshold", {"THREADS": LEAST_THREADS}, dtype, ("top", "reach", "choice"), ("least",)
        )
        (found,) = kernel(
            inputs=[top, reach, given], grid=(LEAST_THREADS, 1, 1), threadgroup=(LEAST_THREADS, 1, 1),
            output_shapes=[(1,)], output_dtypes=[mx.float32],
        )  # fmt: skip
        return found

    def lower(self, x: Any, w: SplitHandle, norm: Norm | None, estimate: Any, reach: Any, least: Any) -> Any:
        n, dtype = w.shape[0], w.scales.dtype
        named = {"x": x, "w": w.lower, "scales": w.scales, **_norm(norm)}
        named |= {"estimate": estimate, "reach": reach, "least": least}
        defines = {"NORM": int(norm is not None), "UPPER": 0, "LOWER": 1}
        kernel = self._kernel("head_3_refine", defines, dtype, tuple(named), ("y",))
        (y,) = kernel(
            inputs=list(named.values()), template=[("T", dtype), ("G", w.group_size)],
            grid=(-(-n // THREADS) * THREADS, 1, 1), threadgroup=(THREADS, 1, 1),
            output_shapes=[(1, n)], output_dtypes=[dtype],
        )  # fmt: skip
        return y

    def _kernel(
        self, name: str, defines: dict[str, int], dtype: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> Any:  # fmt: skip
        """Return the variant for these operands, created once. mx.fast is looked up late, for tests."""
        digits = round(-math.log2(HALF_UNIT[dtype]))
        variant = (name, digits, *defines.values())
        if variant not in self._made:
            numbers = {"LEAST": -3e38, "VARIANCE": VARIANCE, "MARGIN": MARGIN, "HALF_UNIT": HALF_UNIT[dtype]}
            above = "".join(f"#define {key} {value:.9g}f\n" for key, value in numbers.items())
            self._made[variant] = mx.fast.metal_kernel(
                name="tinychat_" + "_".join(str(v) for v in variant),
                input_names=list(inputs), output_names=list(outputs),
                header=defined({"BITS": 4, **defines}) + above + text("affine"), source=text(name),
            )  # fmt: skip
        return self._made[variant]


def _norm(norm: Norm | None) -> dict[str, Any]:
    return {} if norm is None else {"norm_weight": norm.weight, "eps": mx.array(norm.eps, mx.float32)}
