"""Error feedback across columns: what rounding one column loses, the columns after it make good.

The mean squared output error of a row is e H eᵀ with e = w - w_hat and H the second moments of the input.
With H = U D Uᵀ, U unit upper triangular, it is the sum over columns j of D_j (e_j + Σ_{i<j} e_i U_ij)²: rounding
column j of w plus the errors before it, weighted by U, makes each term as small as a code can
(GPTQ: Frantar et al. 2022; in this form LDLQ: Chee et al. 2023).

Everything here is transposed, (K, N): a column of the weight is a row in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.quantizer import Grid, Quantized, grid_between, storable
from tinychat_mlx.awq.rows import over_rows
from tinychat_mlx.weight import F32

Order = npt.NDArray[np.intp]
DAMPING = 0.01  # of the mean of H's diagonal, added to it: what the calibration tokens did not show
SHRINKS = [1 - i / 20 for i in range(9)]
PIECE = 32  # columns fed back by one product inside a group


@dataclass(frozen=True)
class Factor:
    """H + damping = U D Uᵀ, columns in the order in which they are quantised."""

    u: F32  # (K, K) unit upper triangular
    d: F32  # (K,)


def damped(h: F32, damping: float = DAMPING) -> F32:
    """H + damping · mean(diag H); dead channels, whose inputs are always 0, get 1 of that mean."""
    diagonal = np.diagonal(h)
    mean = np.float32(max(float(diagonal.mean()), 1e-20))
    out = h.copy()
    out[np.diag_indices_from(out)] += np.where(diagonal > 0, np.float32(damping), np.float32(1)) * mean
    return out


def factor(h: F32) -> Factor:
    """A damped H (K, K) -> its factors."""
    r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    root = np.ascontiguousarray(np.diagonal(r))
    return Factor(r / root, root * root)


def by_importance(h: F32, group_size: int) -> Order:
    """An order of columns that keeps groups together: heavy groups first, heavy columns first in each.

    What is rounded early has the most columns left to make good for it.
    """
    diagonal = np.diagonal(h).reshape(-1, group_size)
    groups = np.argsort(-diagonal.sum(1), kind="stable")
    inside = np.argsort(-diagonal, axis=1, kind="stable")
    return (groups[:, None] * group_size + inside[groups]).reshape(-1)


def fit_grid(v: F32, d: F32, w_bit: int) -> Grid:
    """A group's columns v (G, N) with weights d (G,) -> the grid (N,) among shrunken ranges that errs least."""
    low, high = v.min(0), v.max(0)
    least = np.full(v.shape[1], np.inf, np.float32)
    scales, zeros = np.empty_like(least), np.empty_like(least)

    def piece(rows: slice) -> None:
        part = v[:, rows]
        for shrink in SHRINKS:
            grid = grid_between(low[rows] * np.float32(shrink), high[rows] * np.float32(shrink), w_bit)
            error = d @ np.square(grid.nearest(part) - part)
            better = error < least[rows]
            least[rows] = np.where(better, error, least[rows])
            scales[rows] = np.where(better, grid.scales, scales[rows])
            zeros[rows] = np.where(better, grid.zeros, zeros[rows])

    over_rows(v.shape[1], 4 * len(v), piece)
    return Grid(scales, zeros, w_bit)


def feed_back(wt: F32, f: Factor, w_bit: int, group_size: int) -> tuple[F32, F32, F32]:
    """wt (K, N) in quantisation order -> codes (K, N), scales and zeros (K/G, N), all float32."""
    k, n = wt.shape
    q, e = np.empty_like(wt), np.empty_like(wt)
    scales = np.empty((k // group_size, n), np.float32)
    zeros = np.empty_like(scales)
    for g in range(k // group_size):
        at = slice(g * group_size, (g + 1) * group_size)
        v = wt[at] + f.u[: at.start, at].T @ e[: at.start]
        grid = fit_grid(v, f.d[at], w_bit)
        scales[g], zeros[g] = grid.scales, grid.zeros
        _one_group(wt[at], v, grid, f.u[at, at], q[at], e[at])
    return q, scales, zeros


def _one_group(w: F32, v: F32, grid: Grid, u: F32, q: F32, e: F32) -> None:
    """Round a group's columns one by one: w what is wanted, v w plus the groups before; fills q and e (G, N)."""
    for start in range(0, len(w), PIECE):
        end = min(start + PIECE, len(w))
        if start:
            v[start:end] += u[:start, start:end].T @ e[:start]
        for j in range(start, end):
            column = v[j] if j == start else v[j] + u[start:j, j] @ e[start:j]
            q[j] = grid.codes(column)
            e[j] = w[j] - (q[j] - grid.zeros) * grid.scales


def refit_scales(wt: F32, q: F32, zeros: F32, scales: F32, h: F32, group_size: int) -> F32:
    """The scales (K/G, N) that minimise e H eᵀ for given codes, all groups of a row together."""
    k, n = wt.shape
    groups = k // group_size
    z = (q.reshape(groups, group_size, n) - zeros[:, None]).reshape(k, n)
    hz = np.empty((groups, k, n), np.float32)
    for g in range(groups):
        at = slice(g * group_size, (g + 1) * group_size)
        hz[g] = h[:, at] @ z[at]
    a = np.einsum("akn,gakn->nga", z.reshape(groups, group_size, n), hz.reshape(groups, groups, group_size, n))
    b = np.einsum("kn,gkn->ng", wt, hz)
    ridge = np.float32(1e-6) * np.einsum("ngg->n", a)[:, None, None] / groups + np.float32(1e-20)
    solved = np.linalg.solve(a + ridge * np.eye(groups, dtype=np.float32), b[..., None])[..., 0].T
    usable = np.isfinite(solved) & (solved > 0.5 * scales) & (solved < 2 * scales)
    return storable(np.where(usable, solved, scales))


def error(wt: F32, w_hat_t: F32, h: F32) -> npt.NDArray[np.float64]:
    """-> (N,) e H eᵀ of each row."""
    e = wt - w_hat_t
    return np.einsum("kn,kn->n", e, h @ e).astype(np.float64)
