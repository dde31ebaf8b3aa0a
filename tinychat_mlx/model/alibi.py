"""Slopes of attention with linear biases (ALiBi, Press et al. 2022), in the two variants of checkpoints."""

from __future__ import annotations

import math


def slopes(heads: int) -> list[float]:
    """Slopes of BLOOM and Falcon: a geometric series; heads beyond a power of 2 use odd steps of the next finer one."""
    power = 2 ** math.floor(math.log2(heads))
    base, finer = 2.0 ** -(8 / power), 2.0 ** -(4 / power)
    return [base**i for i in range(1, power + 1)] + [finer**i for i in range(1, 2 * (heads - power), 2)]


def mpt_slopes(heads: int, bias_max: float) -> list[float]:
    """Slopes of MPT: the series of the next power of 2, odd-numbered entries first."""
    power = 2 ** math.ceil(math.log2(heads))
    series = [2.0 ** -(bias_max * i / power) for i in range(1, power + 1)]
    return series if power == heads else (series[1::2] + series[::2])[:heads]
