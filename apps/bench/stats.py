"""Repeated measurements: median and deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """The values of one quantity, in the order of measurement."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation; 0 for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def over(self, other: Sample) -> Sample:
        """Return the ratio per round: effects on both (a slow period of the machine) cancel."""
        assert len(self.values) == len(other.values)
        return Sample(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def as_dict(self) -> dict[str, float | list[float]]:
        return {
            "median": self.median,
            "mean": statistics.fmean(self.values),
            "sd": self.deviation,
            "min": min(self.values),
            "max": max(self.values),
            "runs": list(self.values),
        }
