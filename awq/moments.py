"""Second moments of a linear's input: all that the searches need to know about the calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.awq.rows import over_rows
from tinychat_mlx.weight import F32


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
        self.blocks += grouped @ grouped.transpose(0, 2, 1)
        self.tokens += len(x)

    @property
    def mean_abs(self) -> F32:
        return self.magnitude / np.float32(max(self.tokens, 1))

    def loss(self, delta: F32) -> F32:
        """delta (N, K), a change of the weights -> (N, K/G): mean squared change of each partial output."""
        groups, size = self.blocks.shape[:2]
        per_token = np.float32(1 / max(self.tokens, 1))

        def piece(rows: slice) -> F32:
            d = delta[rows].reshape(-1, groups, size).transpose(1, 0, 2)  # (K/G, rows, G)
            return np.einsum("grk,grk->rg", d @ self.blocks, d) * per_token

        return np.concatenate(over_rows(len(delta), 4 * delta.shape[1], piece))


@dataclass
class FullMoments:
    """Sums over tokens of x xᵀ (K, K) and of error xᵀ (N or K, K), where x is what the quantised model
    feeds a site and error what it lacks of what the float model would feed it."""

    h: F32
    cross: F32
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, n: int) -> FullMoments:
        return cls(np.zeros((k, k), np.float32), np.zeros((n, k), np.float32))

    def add(self, x: F32, missing: F32) -> None:
        """Take in rows x (T, K) and missing (T, N)."""
        self.h += x.T @ x
        self.cross += missing.T @ x
        self.tokens += len(x)
