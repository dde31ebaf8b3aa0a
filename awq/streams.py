"""The calibration rows between layers, and their split into fit, held and judged rows.

The rows are split by whole windows. Searches use `fit`. Choices between their results use `held`, which no
search uses. Neither uses `judged`, on which the loss of the conversion is measured at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinychat_mlx.weight import F32

SHARE = 8  # one window in SHARE is held, and as many are judged
PARTS = 4  # minimum number of windows; a shorter text gets shorter windows


@dataclass(frozen=True)
class Split:
    """Numbers of rows: fit first, then held, then judged. window: rows of one text, from position 0."""

    fit: int
    held: int
    judged: int
    window: int

    @classmethod
    def of(cls, tokens: int, window: int) -> Split:
        """Split at least four tokens."""
        window = min(window, tokens // PARTS)
        each = max(1, tokens // window // SHARE) * window
        fit = tokens // window * window - 2 * each
        return cls(fit, each, tokens - fit - each, window)

    @property
    def tokens(self) -> int:
        return self.fit + self.held + self.judged

    @property
    def seen(self) -> int:
        """Number of rows that are not judged."""
        return self.fit + self.held

    def of_step(self, rows: slice) -> tuple[slice, slice]:
        """Return the fit rows and the held rows of a step."""
        fit, held = (min(max(end - rows.start, 0), rows.stop - rows.start) for end in (self.fit, self.seen))
        return slice(fit), slice(fit, held)


@dataclass
class Streams:
    """Rows between two layers.

    wanted (T, C): of the float model. made: of the quantised layers; (T, C) if layers are quantised for the
    outputs of the quantised ones before them, else the judged rows (J, C). rounded (J, C): of plain rounding.
    """

    wanted: F32
    made: F32
    rounded: F32

    @classmethod
    def begin(cls, x: F32, split: Split, all_made: bool) -> Streams:
        """Start all streams from the same embedded rows x (T, C)."""
        return cls(x, x.copy() if all_made else x[split.seen :].copy(), x[split.seen :].copy())

    @classmethod
    def unpack(cls, rows: F32, split: Split) -> Streams:
        made = len(rows) - split.judged
        return cls(rows[: split.tokens], rows[split.tokens : made], rows[made:])

    def pack(self) -> F32:
        return np.concatenate([self.wanted, self.made, self.rounded])

    def judged(self, split: Split) -> tuple[F32, F32, F32]:
        """Return the judged rows of each stream: wanted, made, rounded."""
        return self.wanted[split.seen :], self.made[-split.judged :], self.rounded


def distance(wanted: F32, x: F32) -> float:
    """Return the distance of rows x (T, C): |x - wanted| / |wanted|, averaged over the rows.

    Each row has the same weight, because a few rows (the first of a text) are a thousand times larger than
    the others.
    """
    off, size = (np.sqrt(np.einsum("tc,tc->t", a, a, dtype=np.float64)) for a in (x - wanted, wanted))
    return float(np.mean(off / np.maximum(size, 1e-30)))
