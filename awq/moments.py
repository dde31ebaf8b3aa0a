"""Second moments of a linear's input: all that the searches need to know about the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.awq.parallel import add_product, each, over_rows, product, spans
from tinychat_mlx.weight import F32

TILE = 256  # rows and columns of H added to at once


@dataclass
class BlockMoments:
    """Sums over tokens of |x| (K,) and of x xᵀ inside each group of G inputs (K/G, G, G).

    Enough for the published searches: a group is judged by its own partial output.
    """

    magnitude: F32
    blocks: F32
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, group_size: int) -> BlockMoments:
        blocks = np.zeros((k // group_size, group_size, group_size), np.float32)
        return cls(np.zeros(k, np.float32), blocks)

    def add(self, x: F32) -> None:
        """Take in rows x (T, K)."""
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
        """delta (N, K), a change of the weights -> (N, K/G): mean squared change of each partial output."""
        groups, size = self.blocks.shape[:2]
        per_token = np.float32(1 / max(self.tokens, 1))

        def piece(rows: slice) -> F32:
            d = delta[rows].reshape(-1, groups, size).transpose(1, 0, 2)  # (K/G, rows, G)
            error: F32 = np.einsum("grk,grk->rg", d @ self.blocks, d) * per_token
            return error

        return np.concatenate(over_rows(len(delta), 4 * delta.shape[1], piece))

    def divided(self, s: F32) -> BlockMoments:
        """The moments of x / s."""
        f = s.reshape(len(self.blocks), -1)
        blocks = self.blocks / (f[:, :, None] * f[:, None, :])
        return BlockMoments(self.magnitude / s, blocks, self.tokens)


@dataclass
class FullMoments:
    """What awq+ needs of a site: sums over tokens of |x| (K,), of x xᵀ (K, K), and of missing xᵀ (M, K).

    x is what the quantised layers before feed the site, missing what it lacks of the float model's input,
    (K, K); or, where w is given, that seen through the site's linears, (N, K), which is smaller.
    """

    magnitude: F32
    sums: F32  # while tokens come in, only tiles on and above the diagonal: `whole` has all
    cross: F32
    w: F32 | None = None
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, w: F32 | None = None) -> FullMoments:
        """w (N, K): weights whose rows no folding will scale; used if that makes `cross` cheaper."""
        w = w if w is not None and 2 * len(w) < k else None
        rows = k if w is None else len(w)
        zeros = np.zeros(k, np.float32), np.zeros((k, k), np.float32), np.zeros((rows, k), np.float32)
        return cls(*zeros, w)

    def add(self, x: F32, wanted: F32 | None = None) -> None:
        """Take in rows x (T, K), and the float model's inputs at the same places where they differ."""
        self.magnitude += np.abs(x).sum(0)
        parts = spans(len(self.sums), TILE)

        def tile(at: tuple[slice, slice]) -> None:
            self.sums[at] += x[:, at[0]].T @ x[:, at[1]]

        each(tile, [(a, b) for i, a in enumerate(parts) for b in parts[i:]])
        if wanted is not None:
            missing = wanted - x
            if self.w is not None:
                missing = product(missing, self.w.T)
            add_product(self.cross, missing.T, x)
        self.tokens += len(x)

    @property
    def mean_abs(self) -> F32:
        mean: F32 = self.magnitude / np.float32(max(self.tokens, 1))
        return mean

    def whole(self) -> F32:
        """The sums of x xᵀ, (K, K): what lies below the diagonal is filled in."""
        for part in spans(len(self.sums), TILE):
            self.sums[part.stop :, part] = self.sums[part, part.stop :].T
        return self.sums

    def correction(self, w: F32) -> F32:
        """w (N, K) -> mean of w · missing · xᵀ, transposed (K, N): what H⁻¹ turns into a change of w.

        `cross` is let go, for it is large and has nothing more to say.
        """
        through = self.cross.T if self.w is not None else product(self.cross.T, w.T)
        self.cross = np.empty((0, self.cross.shape[1]), np.float32)
        out: F32 = np.multiply(through, np.float32(1 / max(self.tokens, 1)), order="C")
        return out

    def blocks(self, group_size: int) -> BlockMoments:
        """What the published searches would have kept."""
        g = len(self.sums) // group_size
        diagonal = self.whole().reshape(g, group_size, g, group_size)[np.arange(g), :, np.arange(g)]
        return BlockMoments(self.magnitude, np.ascontiguousarray(diagonal), self.tokens)
