"""Blocked factorisation H = R Rᵀ with R upper triangular. Most of the work is matrix products."""

from __future__ import annotations

import numpy as np

from tinychat_mlx.awq.parallel import each, product, spans
from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.weights.weight import F32

BLOCK = 256  # NumPy's factorisation of a block is slow; at 256 it takes 3 % of the time for K = 8192
STRIPE = 512  # rows of R, or columns of b, per task of a thread


def upper_factor(h: F32) -> F32:
    """Factor a symmetric positive definite h (K, K) as R Rᵀ with R (K, K) upper triangular.

    The factorisation runs from the last column to the first. Raises FormatError if h is not positive definite
    or not finite.
    """
    r = np.array(h[::-1, ::-1], np.float32)  # the lower Cholesky factor of the reversed h, reversed, is R
    k = len(r)
    try:
        for at in range(0, k, BLOCK):
            end = min(at + BLOCK, k)
            corner = np.linalg.cholesky(r[at:end, at:end])
            r[at:end, at:end] = corner
            panel = r[end:, at:end] = product(r[end:, at:end], np.linalg.inv(corner).T)
            _subtract_square(r[end:, end:], panel)
    except np.linalg.LinAlgError:
        raise _not_finite() from None
    if not np.isfinite(np.diagonal(r)).all():
        raise _not_finite()
    for rows in spans(k, STRIPE):  # above the diagonal, r still contains h
        r[rows] = np.tril(r[rows], rows.start)
    _turn_round(r)
    return r


def _subtract_square(r: F32, panel: F32) -> None:
    """Subtract panel @ panel.T from r (K, K), on and below the diagonal."""

    def stripe(rows: slice) -> None:
        r[rows, : rows.stop] -= panel[rows] @ panel[: rows.stop].T

    each(stripe, spans(len(r), STRIPE)[::-1])  # longest stripe first, to balance the threads


def _turn_round(r: F32) -> None:
    """Reverse both axes of r in place. A copy would take 268 MB at K = 8192, where memory use peaks."""
    flat, piece = r.reshape(-1), 1 << 20
    for at in range(0, flat.size // 2, piece):
        end = min(at + piece, flat.size // 2)
        first, last = flat[at:end], flat[flat.size - end : flat.size - at]
        kept = first[::-1].copy()
        first[:], last[:] = last[::-1], kept


def solve(u: F32, d: F32, b: F32) -> None:
    """Solve (U D Uᵀ) x = b (K, N) in place, with U (K, K) unit upper triangular and d (K,)."""
    parts = [(at, np.linalg.inv(u[at, at])) for at in spans(len(u), BLOCK)]

    def columns(these: slice) -> None:
        x = b[:, these]
        for at, inverse in reversed(parts):  # U y = b, from the last rows up
            x[at] = inverse @ x[at]
            x[: at.start] -= u[: at.start, at] @ x[at]
        x /= d[:, None]
        for at, inverse in parts:  # Uᵀ x = y, from the first rows down
            x[at] = inverse.T @ x[at]
            x[at.stop :] -= u[at, at.stop :].T @ x[at]

    each(columns, spans(b.shape[1], STRIPE))


def _not_finite() -> FormatError:
    return FormatError("the inputs of a linear layer are not finite: a weight is damaged or overflows")
