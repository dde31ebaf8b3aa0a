"""Measure the machine's limits for benchmarks: memory bandwidth and int8 arithmetic."""

from __future__ import annotations

import time

import numpy as np

from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.memory import address, raw
from tinychat_mlx.backends.cpu.thread_pool import ThreadPool

_READ = 512 << 20  # bytes; much larger than any cache


def read_bandwidth(engine: ThreadPool, repeats: int = 7) -> float:
    """Return the bytes per second that all threads read from memory together, best of several runs."""
    data, sink = raw(_READ, huge=True), np.zeros(1, np.float32)
    data[:] = 1
    return max(
        _READ / _seconds(engine, c.ProbeOp(c.PROBE, 1, address(data), _READ, 0, None, address(sink)))
        for _ in range(repeats)
    )


def int8_peak(engine: ThreadPool, repeats: int = 5) -> float:
    """Return the multiplications and additions per second of all threads in a loop of int8 dot products."""
    dots, sink = np.zeros(1, np.int64), np.zeros(1, np.float32)
    op = c.ProbeOp(c.PROBE, 1, None, 0, 1, address(dots), address(sink))
    while _seconds(engine, op) < 0.05:
        op.work *= 2
    return max(engine.threads * int(dots[0]) / _seconds(engine, op) for _ in range(repeats))


def _seconds(engine: ThreadPool, op: c.ProbeOp) -> float:
    start = time.perf_counter()
    engine.run_one(op)
    return time.perf_counter() - start
