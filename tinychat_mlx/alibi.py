"""Slopes of attention with linear biases (Press et al. 2022), in the two spellings checkpoints use."""

from __future__ import annotations

import math


def slopes(heads: int) -> list[float]:
    """BLOOM's and Falcon's: a geometric series, odd steps of the next finer one for what exceeds a power of 2."""
    power = 2 ** math.floor(math.log2(heads))
    base, finer = 2.0 ** -(8 / power), 2.0 ** -(4 / power)
    return [base**i for i in range(1, power + 1)] + [finer**i for i in range(1, 2 * (heads - power), 2)]


def mpt_slopes(heads: int, bias_max: float) -> list[float]:
    """MPT's: the series of the next power of 2, every second first."""
    power = 2 ** math.ceil(math.log2(heads))
    series = [2.0 ** -(bias_max * i / power) for i in range(1, power + 1)]
    return series if power == heads else (series[1::2] + series[::2])[:heads]
