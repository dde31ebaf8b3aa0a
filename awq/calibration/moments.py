"""Second moments of a linear's input, the statistics of the calibration tokens that the searches use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.parallel import add_product, each, over_rows, product, spans
from tinychat_mlx.weights.weight import F32

# Rows and columns of H per task: a quarter of K, within these. Larger products are faster per multiplication.
LEAST_TILE, MOST_TILE = 256, 1024


@dataclass
class BlockMoments:
    """Sums over tokens of |x| (K,) and of x xᵀ inside each group of G inputs (K/G, G, G).

    This is enough for the published searches, which measure the partial output of each group.
    """

    magnitude: F32
    blocks: F32
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, group_size: int) -> BlockMoments:
        blocks = np.zeros((k // group_size, group_size, group_size), np.float32)
        return cls(np.zeros(k, np.float32), blocks)

    def add(self, x: F32) -> None:
        """Add rows x (T, K)."""
        self.magnitude += np.abs(x).sum(0)
        grouped = x.reshape(len(x), len(self.blocks), -1).transpose(1, 2, 0)  # (K/G, G, T)

        def piece(groups: slice) -> None:
            self.blocks[groups] += grouped[groups] @ grouped[groups].transpose(0, 2, 1)

        over_rows(len(grouped), grouped[0].size * 4, piece)
        self.tokens += len(x)

    @property
    def mean_abs(self) -> F32:
        mean: F32 = self.magnitude / np.float32(max(self.tokens, 1))
        return mean

    def loss(self, delta: F32) -> F32:
        """Return the mean squared change of each partial output (N, K/G) for a weight change delta (N, K)."""
        groups, size = self.blocks.shape[:2]
        per_token = np.float32(1 / max(self.tokens, 1))

        def piece(rows: slice) -> F32:
            d = delta[rows].reshape(-1, groups, size).transpose(1, 0, 2)  # (K/G, rows, G)
            error: F32 = np.einsum("grk,grk->rg", d @ self.blocks, d) * per_token
            return error

        return np.concatenate(over_rows(len(delta), 4 * delta.shape[1], piece))

    def divided(self, s: F32) -> BlockMoments:
        """Return the moments of x / s."""
        f = s.reshape(len(self.blocks), -1)
        blocks = self.blocks / (f[:, :, None] * f[:, None, :])
        return BlockMoments(self.magnitude / s, blocks, self.tokens)


def _tiles(k: int) -> list[slice]:
    """Split an axis of H (K, K) into tiles."""
    return spans(k, min(max(LEAST_TILE, k // 4), MOST_TILE))


@dataclass
class FullMoments:
    """Sums over tokens of |x| (K,), of x xᵀ (K, K) and of missing xᵀ (M, K), as awq+ needs them.

    x is the site's input after the quantised layers. missing is the float model's input minus x: (K, K), or
    if w is given, its product with the site's linears: (N, K), which is smaller. Moments of the float model's
    own inputs have no missing part.
    """

    magnitude: F32
    sums: F32  # only tiles on and above the diagonal are filled; see `whole`
    cross: F32
    w: F32 | None = None
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, w: F32 | None = None) -> FullMoments:
        """Create zero moments. w (N, K): the site's linears, if the missing part of the input is needed."""
        rows = 0 if w is None else min(k, len(w))
        w = w if w is not None and len(w) < k else None
        zeros = np.zeros(k, np.float32), np.zeros((k, k), np.float32), np.zeros((rows, k), np.float32)
        return cls(*zeros, w)

    def add(self, x: F32, wanted: F32 | None = None) -> None:
        """Add rows x (T, K), and the float model's inputs for the same tokens if they differ."""
        self.magnitude += np.abs(x).sum(0)
        parts = _tiles(len(self.sums))

        def tile(at: tuple[slice, slice]) -> None:
            self.sums[at] += x[:, at[0]].T @ x[:, at[1]]

        each(tile, [(a, b) for i, a in enumerate(parts) for b in parts[i:]])
        if self.has_cross and wanted is not None:
            missing = wanted - x
            if self.w is not None:
                missing = product(missing, self.w.T)
            add_product(self.cross, missing.T, x)
        self.tokens += len(x)

    @property
    def has_cross(self) -> bool:
        return len(self.cross) > 0

    @property
    def mean_abs(self) -> F32:
        mean: F32 = self.magnitude / np.float32(max(self.tokens, 1))
        return mean

    def take_sums(self, order: npt.NDArray[np.intp]) -> F32:
        """Return the sums of x xᵀ (K, K) with both axes in this order. Frees `sums`, which is as large."""
        for part in _tiles(len(self.sums)):
            self.sums[part.stop :, part] = self.sums[part, part.stop :].T
        ordered = np.empty_like(self.sums)

        def take(rows: slice) -> None:
            ordered[rows] = self.sums[np.ix_(order[rows], order)]

        each(take, spans(len(order), LEAST_TILE))
        self.sums = np.empty((0, 0), np.float32)
        return ordered

    def correction(self, w: F32) -> F32:
        """Return the mean of w · missing · xᵀ for w (N, K), transposed to (K, N).

        H⁻¹ maps it to a change of w.

        Frees `cross`, which is large and not needed again.
        """
        through = self.cross.T if self.w is not None else product(self.cross.T, w.T)
        self.cross = np.empty((0, self.cross.shape[1]), np.float32)
        out: F32 = np.multiply(through, np.float32(1 / max(self.tokens, 1)), order="C")
        return out
