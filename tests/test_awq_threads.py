"""Threads of the quantiser: those that were asked for, else those the process may use; the bytes do not depend on them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dense
from threadpoolctl import threadpool_info

from tinychat_mlx import limits
from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq import feedback, threads
from tinychat_mlx.awq.rows import over_rows


def workers(row_bytes: int = 1 << 18) -> set[str]:
    """Names of the threads that took pieces of some work."""

    def work(rows: slice) -> str:
        barrier.wait(5)  # a thread waits until all have a piece
        return threading.current_thread().name

    barrier = threading.Barrier(threads.count())
    return set(over_rows(2 * threads.count(), row_bytes, work))


def test_the_affinity_counts_and_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has none")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(limits, "cpu_quota", lambda: None)
    assert threads.count() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert threads.count() == 1


def test_as_many_as_were_asked_for() -> None:
    before = threads.count()
    for asked in (1, 3):
        with threads.limited(asked):
            assert threads.count() == asked and len(workers()) == asked
            blas = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
            assert blas and all(n <= asked for n in blas)
    assert threads.count() == before


def test_one_thread_is_one_thread_for_error_feedback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, seen = np.random.default_rng(0), set()
    w, x = rng.normal(size=(64, 40)).astype(np.float32), rng.normal(size=(300, 64)).astype(np.float32)
    h = feedback.damped(x.T @ x, 1 / len(x))
    real = feedback.feed_back

    def noted(*args: Any) -> feedback.Codes:
        seen.add(threading.get_ident())
        barrier.wait(5)  # the halves run at once, where there are two threads
        time.sleep(0.05)  # and a second thread would not wait for the first
        return real(*args)

    monkeypatch.setattr(feedback, "feed_back", noted)
    made = []
    for asked in (1, 2):
        seen.clear()
        barrier = threading.Barrier(asked)
        with threads.limited(asked):
            made.append(feedback.quantised(w, feedback.factor(h), h, 4, 32, 1))
        assert len(seen) == asked
    assert np.array_equal(made[0].q, made[1].q) and np.array_equal(made[0].scales, made[1].scales)


def test_threads_do_not_change_the_bytes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    tiny_dense.save(tmp_path / "dense", tiny_dense.tensors(tiny_dense.CONFIG | sizes), **sizes)
    made = []
    for n in ("1", "2", "3"):
        args = ["convert", str(tmp_path / "dense"), "-o", str(tmp_path / n), "--group-size", "32"]
        assert main([*args, "--calib-tokens", "512", "--backend", "cpu", "--threads", n]) == 0
        made.append((tmp_path / n / "model.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]
