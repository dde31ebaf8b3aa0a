"""H = R Rᵀ with R upper triangular, in blocks, so that nearly all of it is matrix products."""

from __future__ import annotations

import numpy as np

from tinychat_mlx.errors import FormatError
from tinychat_mlx.weight import F32

BLOCK = 256  # NumPy's own factor of one block, which is slow, takes 3 % of the work at K = 8192
STRIPE = 1024  # rows updated at once: bounds the temporary


def upper_factor(h: F32) -> F32:
    """A symmetric positive definite h (K, K) -> R (K, K), upper triangular: the last column comes first.

    Raises FormatError where h is not positive definite or not finite.
    """
    r = np.array(h[::-1, ::-1], np.float32)  # an ordinary Cholesky factor of h turned round
    k = len(r)
    try:
        for at in range(0, k, BLOCK):
            end = min(at + BLOCK, k)
            corner = np.linalg.cholesky(r[at:end, at:end])
            r[at:end, at:end] = corner
            panel = r[end:, at:end] @ np.linalg.inv(corner).T
            r[end:, at:end] = panel
            for low in range(end, k, STRIPE):
                high = min(low + STRIPE, k)
                r[low:high, end:high] -= panel[low - end : high - end] @ panel[: high - end].T
    except np.linalg.LinAlgError:
        raise _not_finite() from None
    if not np.isfinite(np.diagonal(r)).all():
        raise _not_finite()
    for at in range(0, k, STRIPE):  # what lies above the diagonal is left over from h
        rows = slice(at, at + STRIPE)
        r[rows] = np.tril(r[rows], at)
    _turn_round(r)
    return r


def _turn_round(r: F32) -> None:
    """r[::-1, ::-1] in place: at K = 8192 a copy is 268 MB, at the very point where memory peaks."""
    flat, piece = r.reshape(-1), 1 << 20
    for at in range(0, flat.size // 2, piece):
        end = min(at + piece, flat.size // 2)
        first, last = flat[at:end], flat[flat.size - end : flat.size - at]
        kept = first[::-1].copy()
        first[:], last[:] = last[::-1], kept


def solve(u: F32, d: F32, b: F32) -> None:
    """Solve (U D Uᵀ) x = b (K, N) in place, U (K, K) unit upper triangular, d (K,)."""
    k = len(u)
    spans = [slice(at, min(at + BLOCK, k)) for at in range(0, k, BLOCK)]
    for span in reversed(spans):  # U y = b, from the last rows up
        b[span] = np.linalg.inv(u[span, span]) @ b[span]
        b[: span.start] -= u[: span.start, span] @ b[span]
    b /= d[:, None]
    for span in spans:  # Uᵀ x = y, from the first rows down
        b[span] = np.linalg.inv(u[span, span].T) @ b[span]
        b[span.stop :] -= u[span, span.stop :].T @ b[span]


def _not_finite() -> FormatError:
    return FormatError("the inputs of a linear layer are not finite: a weight is damaged or overflows")
