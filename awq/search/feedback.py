"""Error feedback across columns: later columns compensate the rounding errors of earlier ones.

The mean squared output error of a row is e H eᵀ with e = w - w_hat and H the second moments of the input.
With H = U D Uᵀ, U unit upper triangular, it is the sum over columns j of D_j (e_j + Σ_{i<j} e_i U_ij)².
Rounding column j of w plus the errors before it, weighted by U, makes each term as small as a code can (GPTQ:
Frantar et al. 2022; in this form LDLQ: Chee et al. 2023). After all columns are known, each code is optimised
again and the scales are fitted by least squares (`refine`).

All arrays here are transposed, (K, N): a column of the weight is a row in memory. Columns come in groups of
G, in the order in which they are quantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.parallel import each, over_rows, product, spans
from tinychat_mlx.awq.search.cholesky import upper_factor
from tinychat_mlx.awq.search.quantizer import Grid, grid_between, storable
from tinychat_mlx.weights.weight import F32

Order = npt.NDArray[np.intp]
# times the mean of H's diagonal is added to it, for directions that the calibration tokens lack
DAMPING = 0.01
SHRINKS = [1 - i / 20 for i in range(9)]  # of a group's range: the joint clip
PIECE = 32  # columns per product inside a group
ROWS = 2048  # maximum weight rows per task of a thread
STRIPE = 512  # of these, rows processed at once where a product per group would be large


@dataclass(frozen=True)
class Factor:
    """The factors of H = U D Uᵀ."""

    u: F32  # (K, K) unit upper triangular
    d: F32  # (K,)


@dataclass
class Codes:
    """Codes q (K, N) as integers, scales and zeros (K/G, N). All are float32."""

    q: F32
    scales: F32
    zeros: F32
    w_bit: int

    @property
    def group_size(self) -> int:
        return len(self.q) // len(self.scales)

    def grid(self, g: int) -> Grid:
        return Grid(self.scales[g], self.zeros[g], self.w_bit)

    def values(self) -> F32:
        """Return w_hat (K, N)."""
        w = self.q.reshape(len(self.scales), -1, self.q.shape[1]) - self.zeros[:, None]
        w *= self.scales[:, None]
        return w.reshape(self.q.shape)


def damped(sums: F32, per_token: float = 1.0, damping: float = DAMPING) -> F32:
    """Convert sums of x xᵀ in place to their mean plus `damping` times its mean diagonal.

    Dead channels, whose inputs are always 0, get all of the mean diagonal.
    """
    sums *= np.float32(per_token)
    diagonal = np.diagonal(sums).copy()
    mean = np.float32(max(float(diagonal.mean()), 1e-20))
    sums[np.diag_indices_from(sums)] += np.where(diagonal > 0, np.float32(damping), np.float32(1)) * mean
    return sums


def factor(h: F32) -> Factor:
    """Factor a damped H (K, K)."""
    r = upper_factor(h)
    root = np.diagonal(r).copy()
    r /= root
    return Factor(r, root * root)


def by_importance(diagonal: F32, group_size: int) -> Order:
    """Return an order of columns that keeps groups together, heavy groups first, heavy columns first in each.

    Errors of columns that are rounded early can be compensated by the most columns.
    """
    grouped = diagonal.reshape(-1, group_size)
    groups = np.argsort(-grouped.sum(1), kind="stable")
    inside = np.argsort(-grouped, axis=1, kind="stable")
    order: Order = (groups[:, None] * group_size + inside[groups]).reshape(-1)
    return order


def fit_grid(v: F32, d: F32, w_bit: int) -> Grid:
    """Choose the grid (N,) with the smallest error among shrunken ranges.

    v (G, N): the columns of a group. d (G,): their weights.
    """

    def piece(rows: slice) -> tuple[F32, F32]:
        part = v[:, rows]
        low, high = part.min(0), part.max(0)
        least, scales, zeros = np.full_like(low, np.inf), np.ones_like(low), np.zeros_like(low)
        for shrink in SHRINKS:
            grid = grid_between(low * np.float32(shrink), high * np.float32(shrink), w_bit)
            miss = grid.nearest(part)
            miss -= part
            error = d @ np.square(miss, out=miss)
            better = error < least
            least = np.where(better, error, least)
            scales, zeros = np.where(better, grid.scales, scales), np.where(better, grid.zeros, zeros)
        return scales, zeros

    found = over_rows(v.shape[1], 4 * len(v), piece)
    return Grid(np.concatenate([s for s, _ in found]), np.concatenate([z for _, z in found]), w_bit)


def quantised(w: F32, f: Factor, h: F32, w_bit: int, group_size: int, rounds: int) -> Codes:
    """Quantise w (K, N). Rows of the weight are independent, so parts of them run in parallel."""

    def some(rows: slice) -> Codes:
        part = w[:, rows]
        codes = feed_back(part, f, w_bit, group_size)
        refine(part, codes, h, rounds)
        return codes

    pairs = -(-w.shape[1] // (2 * ROWS))
    made = each(
        some, spans(w.shape[1], -(-w.shape[1] // (2 * pairs)))
    )  # an even number of parts, for two threads
    q, scales, zeros = (
        np.concatenate([getattr(codes, field) for codes in made], 1) for field in ("q", "scales", "zeros")
    )
    return Codes(q, scales, zeros, w_bit)


def feed_back(w: F32, f: Factor, w_bit: int, group_size: int) -> Codes:
    """Quantise w (K, N) group by group. Each group's grid is chosen when the group is processed."""
    k, n = w.shape
    e = np.empty_like(w)
    codes = Codes(
        np.empty_like(w), np.empty((k // group_size, n), np.float32), np.empty((0,), np.float32), w_bit
    )
    codes.zeros = np.empty_like(codes.scales)
    for g in range(k // group_size):
        at = slice(g * group_size, (g + 1) * group_size)
        v = w[at] + product(f.u[: at.start, at].T, e[: at.start])
        grid = fit_grid(v, f.d[at], w_bit)
        codes.scales[g], codes.zeros[g] = grid.scales, grid.zeros
        _feed_group(w[at], v, grid, f.u[at, at], codes.q[at], e[at])
    return codes


def _feed_group(w: F32, v: F32, grid: Grid, u: F32, q: F32, e: F32) -> None:
    """Round a group's columns one by one: w is the target, v adds earlier feedback. Fills q and e (G, N)."""
    for start in range(0, len(w), PIECE):
        end = min(start + PIECE, len(w))
        if start:
            v[start:end] += u[:start, start:end].T @ e[:start]
        for j in range(start, end):
            column = v[j] if j == start else v[j] + u[start:j, j] @ e[start:j]
            q[j] = grid.codes(column)
            e[j] = w[j] - (q[j] - grid.zeros) * grid.scales


def refine(w: F32, codes: Codes, h: F32, rounds: int) -> None:
    """Improve codes in place: each code given all others, then all scales of a row together.

    Repeats `rounds` times.
    """
    for _ in range(rounds):
        descend(w, codes, h)
        refit_scales(w, codes, h)


def descend(w: F32, codes: Codes, h: F32) -> None:
    """Set each column in turn to the codes that minimise e H eᵀ with all others fixed (coordinate descent)."""
    size, e = codes.group_size, codes.values()
    np.subtract(w, e, out=e)
    curvature = np.diagonal(h)
    for g in range(len(codes.scales)):
        at = slice(g * size, (g + 1) * size)
        pull = product(h[at], e)  # (G, N): minus half the gradient
        _descend_group(w[at], pull, codes.grid(g), h[at, at], curvature[at], codes.q[at], e[at])


def _descend_group(w: F32, pull: F32, grid: Grid, h: F32, curvature: F32, q: F32, e: F32) -> None:
    """Run `descend` for one group. Changes q and e (G, N). `moved` is the change of this group's errors."""
    moved = np.zeros_like(e)
    for start in range(0, len(w), PIECE):
        end = min(start + PIECE, len(w))
        if start:
            pull[start:end] += h[start:end, :start] @ moved[:start]
        for j in range(start, end):
            force = pull[j] if j == start else pull[j] + h[j, start:j] @ moved[start:j]
            q[j] = grid.codes(w[j] - e[j] + force / curvature[j])
            new = w[j] - (q[j] - grid.zeros) * grid.scales
            moved[j] = new - e[j]
            e[j] = new


def refit_scales(w: F32, codes: Codes, h: F32) -> None:
    """Replace the scales by those that minimise e H eᵀ for the given codes, all groups of a row together.

    A row's w_hat is a sum over groups g of scale_g · z_g, so this is a K/G by K/G system per row.
    """
    k, n = w.shape
    groups, size = len(codes.scales), codes.group_size
    for rows in spans(n, STRIPE):
        z = codes.q[:, rows].reshape(groups, size, -1) - codes.zeros[:, None, rows]
        flat = z.reshape(k, -1)
        a = np.empty((flat.shape[1], groups, groups), np.float64)
        b = np.empty((flat.shape[1], groups), np.float64)
        hz = np.empty_like(flat)  # once: fresh pages for every group would cost a tenth of the time
        for g in range(groups):
            product(h[:, g * size : (g + 1) * size], z[g], hz)
            b[:, g] = np.einsum("kn,kn->n", w[:, rows], hz)
            a[:, :, g] = np.einsum("gkn,gkn->ng", z, hz.reshape(groups, size, -1))
        codes.scales[:, rows] = _solved(a, b, codes.scales[:, rows], codes.w_bit)


def _solved(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], old: F32, w_bit: int) -> F32:
    """Solve a (N, g, g) x = b (N, g). Keeps the old scale (g, N) where x differs too much from it."""
    groups = a.shape[1]
    diagonal = np.einsum("ngg->ng", a)
    diagonal += 1e-6 * diagonal.mean(1, keepdims=True) + 1e-30  # a group with only zeros has no defined scale
    x = np.linalg.solve(a, b[..., None])[..., 0].T.astype(np.float32)
    assert x.shape[0] == groups
    usable = np.isfinite(x) & (x > old / 2) & (x < old * 2)
    return np.where(usable, storable(np.where(usable, x, old), w_bit), old)
