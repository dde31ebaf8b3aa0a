"""The published searches: a scale for each input channel, a clip for each group (Lin et al. 2024, §3).

A linear is judged by the quadratic form of its inputs' second moments, group by group, so the cost does not
grow with the number of calibration tokens. The paper judges q, k, v by the whole attention and gate, up by
the whole MLP, which takes a forward pass for each candidate. On the demo what is chosen by groups errs 0.3 % more (at
most 3 %) than the best candidate by the linears' whole outputs; by the whole MLP's 5 % at 4 bits, 1 % at 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.moments import BlockMoments
from tinychat_mlx.awq.parallel import over_rows
from tinychat_mlx.awq.quantizer import grid_of, round_values
from tinychat_mlx.awq.sites import Index
from tinychat_mlx.weight import F32

F64 = npt.NDArray[np.float64]
ALPHAS = [i / 20 for i in range(20)]  # 0 is no scaling: the result is never worse than rounding
SHRINKS = [1 - i / 20 for i in range(10)]


def tied_mean(magnitude: F32, at: Index | None) -> F32:
    """Mean |x| of each channel -> of each scale, averaged over the channels that share it."""
    if at is None:
        return magnitude
    return (np.bincount(at, magnitude) / np.bincount(at)).astype(np.float32)


def scale_of(magnitude: F32, alpha: float) -> F32:
    """Mean |x| -> the scales of one candidate, normalised around 1."""
    s = np.maximum(magnitude ** np.float32(alpha), np.float32(1e-4))
    s /= np.sqrt(s.max() * s.min())
    usable: F32 = np.where(np.isfinite(s), s, np.float32(1))
    return usable


def scaled_error(w: F32, s: F32, w_bit: int, group_size: int) -> F32:
    """w (N, K), s (K,) -> Q(w · s) / s - w."""
    out = np.empty_like(w)

    def piece(rows: slice) -> None:
        out[rows] = round_values(w[rows] * s, w_bit, group_size) / s - w[rows]

    over_rows(len(w), 4 * w.shape[1], piece)
    return out


def candidates(mean_abs: F32, at: Index | None) -> list[F32]:
    """Mean |x| of each channel -> the scales of each alpha, one per channel or tied."""
    magnitude = tied_mean(mean_abs, at)
    return [scale_of(magnitude, alpha) for alpha in ALPHAS]


def losses(
    w: F32, moments: BlockMoments, scales: Sequence[F32], at: Index | None, w_bit: int, group_size: int
) -> F64:
    """Linears of one input w (N, K), stacked -> mean squared output error of rounding with each of the scales."""

    def loss(s: F32) -> float:
        error = scaled_error(w, s if at is None else s[at], w_bit, group_size)
        return float(moments.loss(error).sum(dtype=np.float64))

    return np.array([loss(s) for s in scales])


def best(found: F64, scales: Sequence[F32]) -> tuple[F32, float]:
    """-> the scales whose loss is least (the smallest alpha of equals), their alpha."""
    i = int(np.argmin(np.where(np.isnan(found), np.inf, found)))
    return scales[i], ALPHAS[i]


def search_scale(
    w: F32, moments: BlockMoments, at: Index | None, w_bit: int, group_size: int
) -> tuple[F32, float]:
    """Linears of one input w (N, K), stacked -> the best scales (one per channel or tied), their alpha."""
    scales = candidates(moments.mean_abs, at)
    return best(losses(w, moments, scales, at, w_bit, group_size), scales)


def clip(w: F32, moments: BlockMoments, w_bit: int, group_size: int) -> F32:
    """Clamp every group of w (N, K) to the symmetric bound whose rounding errs least on the group's output."""
    per_token = np.float32(1 / max(moments.tokens, 1))

    def piece(rows: slice) -> F32:
        groups = w[rows].reshape(-1, w.shape[1] // group_size, group_size)
        bound = np.abs(groups).max(-1, keepdims=True)
        least, best = np.full(bound.shape, np.inf, np.float32), bound
        for shrink in SHRINKS:
            candidate = bound * np.float32(shrink)
            clamped = np.clip(groups, -candidate, candidate)
            delta = (grid_of(clamped, w_bit).nearest(clamped) - groups).transpose(1, 0, 2)
            error = np.einsum("grk,grk->rg", delta @ moments.blocks, delta)[..., None] * per_token
            better = error < least
            least, best = np.where(better, error, least), np.where(better, candidate, best)
        return np.clip(groups, -best, best).reshape(len(groups), -1)

    return np.concatenate(over_rows(len(w), 4 * w.shape[1], piece))


def fed_losses(w: F32, d: F32, scales: Sequence[F32], at: Index | None, group_size: int) -> F64:
    """As `losses`, for weights quantised with error feedback, which leaves Σ_j D_j · (rounding of column j)².

    A rounding's mean square goes with the square of its group's range, and scaling channel j by s divides D_j
    by s². So one pass for the ranges judges a candidate. d (K,): the D of the unscaled inputs.
    """
    groups = w.shape[1] // group_size

    def loss(s: F32) -> float:
        weight = (d / (s * s)).reshape(groups, group_size).sum(1)

        def piece(rows: slice) -> float:
            scaled = (w[rows] * s).reshape(-1, groups, group_size)
            span = scaled.max(-1) - scaled.min(-1)
            return float(np.sum(np.square(span, out=span) @ weight, dtype=np.float64))

        return sum(over_rows(len(w), 4 * w.shape[1], piece))

    return np.array([loss(s if at is None else s[at]) for s in scales])


def search_fed_scale(w: F32, mean_abs: F32, d: F32, at: Index | None, group_size: int) -> tuple[F32, float]:
    """As `search_scale`, by `fed_losses`."""
    scales = candidates(mean_abs, at)
    return best(fed_losses(w, d, scales, at, group_size), scales)
