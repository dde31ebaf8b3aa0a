"""The published AWQ searches: a scale per input channel and a clip per group (Lin et al. 2024, §3).

A linear is measured by the quadratic form of its inputs' second moments, per group, so the cost does not grow
with the number of calibration tokens. The paper measures q, k, v by the whole attention and gate, up by the
whole MLP, which takes a forward pass per candidate. On the demo the choice per group has a 0.3 % larger error
(at most 3 %) than the best candidate by the linears' whole outputs, and 5 % (4 bits) or 1 % (3 bits) larger
than the best by the whole MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.calibration.moments import BlockMoments
from tinychat_mlx.awq.parallel import over_rows
from tinychat_mlx.awq.search.quantizer import grid_of, round_values
from tinychat_mlx.awq.sites import Index
from tinychat_mlx.weights.weight import F32

F64 = npt.NDArray[np.float64]
ALPHAS = [i / 20 for i in range(20)]  # alpha 0 is no scaling, so the result is never worse than rounding
SHRINKS = [1 - i / 20 for i in range(10)]


def tied_mean(magnitude: F32, at: Index | None) -> F32:
    """Average mean |x| per channel over the channels that share a scale."""
    if at is None:
        return magnitude
    return (np.bincount(at, magnitude) / np.bincount(at)).astype(np.float32)


def scale_of(magnitude: F32, alpha: float) -> F32:
    """Return the scales of one candidate from mean |x|, normalised around 1."""
    s = np.maximum(magnitude ** np.float32(alpha), np.float32(1e-4))
    s /= np.sqrt(s.max() * s.min())
    usable: F32 = np.where(np.isfinite(s), s, np.float32(1))
    return usable


def scaled_error(w: F32, s: F32, w_bit: int, group_size: int) -> F32:
    """Return Q(w · s) / s - w for w (N, K) and s (K,)."""
    out = np.empty_like(w)

    def piece(rows: slice) -> None:
        out[rows] = round_values(w[rows] * s, w_bit, group_size) / s - w[rows]

    over_rows(len(w), 4 * w.shape[1], piece)
    return out


def candidates(mean_abs: F32, at: Index | None) -> list[F32]:
    """Return the scales of each alpha from mean |x| per channel, one per channel or tied."""
    magnitude = tied_mean(mean_abs, at)
    return [scale_of(magnitude, alpha) for alpha in ALPHAS]


def losses(
    w: F32, moments: BlockMoments, scales: Sequence[F32], at: Index | None, w_bit: int, group_size: int
) -> F64:
    """Return the mean squared output error of rounding w (N, K) with each of the scales.

    w: the linears of one input, stacked.
    """

    def loss(s: F32) -> float:
        error = scaled_error(w, s if at is None else s[at], w_bit, group_size)
        return float(moments.loss(error).sum(dtype=np.float64))

    return np.array([loss(s) for s in scales])


def best(found: F64, scales: Sequence[F32]) -> tuple[F32, float]:
    """Return the scales with the smallest loss (the smallest alpha among equals) and their alpha."""
    i = int(np.argmin(np.where(np.isnan(found), np.inf, found)))
    return scales[i], ALPHAS[i]


def search_scale(
    w: F32, moments: BlockMoments, at: Index | None, w_bit: int, group_size: int
) -> tuple[F32, float]:
    """Return the best scales (one per channel or tied) for the stacked linears w (N, K), and their alpha."""
    scales = candidates(moments.mean_abs, at)
    return best(losses(w, moments, scales, at, w_bit, group_size), scales)


def clip(w: F32, moments: BlockMoments, w_bit: int, group_size: int) -> F32:
    """Clamp each group of w (N, K) to the symmetric bound whose rounding changes the group's output least."""
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
    """Compute `losses` for error feedback, which leaves Σ_j D_j · (rounding of column j)².

    The mean square of a rounding is proportional to the square of its group's range, and scaling channel j by
    s divides D_j by s². One pass over the ranges therefore evaluates a candidate. d (K,): D of the unscaled
    inputs.
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
    """Like `search_scale`, but with `fed_losses`."""
    scales = candidates(mean_abs, at)
    return best(fed_losses(w, d, scales, at, group_size), scales)
