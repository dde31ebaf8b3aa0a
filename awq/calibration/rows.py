"""The calibration rows between layers, and their split into fit, held and judged rows.

The rows are split by whole windows. Searches use `fit`. Choices between their results use `held`, which no
search uses. Neither uses `judged`, on which the loss of the conversion is measured at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.parallel import over_rows
from tinychat_mlx.weights.weight import F32

SHARE = 8  # one window in SHARE is held, and as many are judged
HALF_EXPONENT = 15  # float16 holds values below 2 ** 16
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


@dataclass
class HalfRows:
    """Rows (T, K) in float16, each scaled by a power of two to the upper end of float16's range."""

    values: npt.NDArray[np.float16]
    scales: F32  # (T, 1)

    @classmethod
    def empty(cls, rows: int, width: int) -> HalfRows:
        return cls(np.zeros((rows, width), np.float16), np.ones((rows, 1), np.float32))

    @property
    def width(self) -> int:
        return int(self.values.shape[1])

    def put(self, start: int, x: F32) -> None:
        """Store x (n, K) from row `start` on."""

        def piece(at: slice) -> None:
            rows, part = slice(start + at.start, start + at.stop), x[at]
            largest = np.maximum(part.max(1, keepdims=True), -part.min(1, keepdims=True))
            scales = np.ldexp(np.float32(1), np.clip(np.frexp(largest)[1] - HALF_EXPONENT, -126, 126))
            self.scales[rows] = scales
            np.multiply(part, 1 / scales, out=self.values[rows], casting="same_kind")

        over_rows(len(x), 4 * self.width, piece)

    def take(self, rows: slice, divisor: F32) -> F32:
        """Return rows / divisor (K,) in float32."""
        out = np.empty((rows.stop - rows.start, self.width), np.float32)

        def piece(at: slice) -> None:
            stored = slice(rows.start + at.start, rows.start + at.stop)
            np.multiply(self.values[stored], self.scales[stored], out=out[at])
            out[at] /= divisor

        over_rows(len(out), 4 * self.width, piece)
        return out


def distance(wanted: F32, x: F32) -> float:
    """Return the distance of rows x (T, C): |x - wanted| / |wanted|, averaged over the rows.

    Each row has the same weight, because a few rows (the first of a text) are a thousand times larger than
    the others.
    """
    off, size = (np.sqrt(np.einsum("tc,tc->t", a, a, dtype=np.float64)) for a in (x - wanted, wanted))
    return float(np.mean(off / np.maximum(size, 1e-30)))
