"""Threads of the quantiser: the requested number, else those available. The result does not depend on them."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dense
from checkout import ROOT
from numpy._core._multiarray_umath import __cpu_features__
from threadpoolctl import threadpool_info

from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq import parallel
from tinychat_mlx.awq.calibration.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.search import cholesky, feedback
from tinychat_mlx.base import limits


def workers(row_bytes: int = 1 << 18) -> set[str]:
    """Return the names of the threads that took pieces of some work."""

    def work(rows: slice) -> str:
        barrier.wait(300)  # a thread waits until all have a piece
        return threading.current_thread().name

    barrier = threading.Barrier(parallel.count())
    return set(parallel.over_rows(2 * parallel.count(), row_bytes, work))


def test_the_affinity_counts_and_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has none")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(limits, "cpu_quota", lambda: None)
    assert parallel.count() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert parallel.count() == 1


def test_as_many_as_were_asked_for() -> None:
    before = parallel.count()
    for asked in (1, 3):
        with parallel.limited(asked):
            assert parallel.count() == asked and len(workers()) == asked
            blas = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
            assert blas and set(blas) == {1}
    assert parallel.count() == before


def test_one_thread_is_one_thread_for_error_feedback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, seen = np.random.default_rng(0), set()
    w, x = rng.normal(size=(64, 40)).astype(np.float32), rng.normal(size=(300, 64)).astype(np.float32)
    h = feedback.damped(x.T @ x, 1 / len(x))
    real = feedback.feed_back

    def noted(*args: Any) -> feedback.Codes:
        seen.add(threading.get_ident())
        barrier.wait(300)  # both halves run at the same time if there are two threads
        time.sleep(0.05)  # a second thread would not wait for the first
        return real(*args)

    monkeypatch.setattr(feedback, "feed_back", noted)
    made = []
    for asked in (1, 2):
        seen.clear()
        barrier = threading.Barrier(asked)
        with parallel.limited(asked):
            made.append(feedback.quantised(w, feedback.factor(h), h, 4, 32, 1))
        assert len(seen) == asked
    assert np.array_equal(made[0].q, made[1].q) and np.array_equal(made[0].scales, made[1].scales)


def test_a_piece_of_work_may_share_work_itself() -> None:
    """All threads are busy with the outer pieces, so no inner piece may wait for a free thread."""
    with parallel.limited(3):
        made = parallel.each(lambda i: parallel.each(lambda j: (i, j), range(5)), range(7))
    assert made == [[(i, j) for j in range(5)] for i in range(7)]


def test_a_thread_that_is_late_is_not_waited_for() -> None:
    """The only other thread is busy elsewhere, so the caller processes all pieces."""
    begun, done = threading.Event(), threading.Event()
    with parallel.limited(2):
        parallel._pool(1).submit(lambda: (begun.set(), done.wait(60)))
        assert begun.wait(60)
        try:
            assert set(parallel.each(lambda _: threading.get_ident(), range(4))) == {threading.get_ident()}
        finally:
            done.set()


def test_an_error_in_another_thread_reaches_the_caller() -> None:
    barrier, caller = threading.Barrier(2), threading.get_ident()

    def work(_: int) -> None:
        barrier.wait(60)  # each of two threads has a piece
        if threading.get_ident() != caller:
            raise ValueError("from another thread")

    with parallel.limited(2), pytest.raises(ValueError, match="another thread"):
        parallel.each(work, range(2))


def test_products_in_blocks_are_products() -> None:
    """Compared with float64. A sum of K terms has an error of at most K · 2⁻²⁴ · the sum of their magnitudes."""
    rng = np.random.default_rng(0)
    for n, k, m in ((700, 90, 300), (300, 90, 700), (3, 5, 4), (0, 5, 4)):
        a, b = rng.normal(size=(n, k)).astype(np.float32), rng.normal(size=(k, m)).astype(np.float32)
        exact, bound = a.astype(np.float64) @ b, k * 2**-24 * (np.abs(a) @ np.abs(b)) + 1e-30
        made, out = parallel.product(a, b), np.ones((n, m), np.float32)
        assert made.shape == (n, m) and (np.abs(made - exact) <= bound).all()
        parallel.add_product(out, a, b)
        assert (np.abs(out - 1 - exact) <= bound + 2**-23 * (1 + np.abs(exact))).all()


CORES = {  # OpenBLAS's name of a set of kernels: the CPU feature (NumPy's name) that it needs
    "x86": {"Prescott": "SSE3", "Sandybridge": "AVX", "Haswell": "AVX2", "Zen": "AVX2", "SkylakeX": "AVX512_SKX"},
    "arm": {"ARMV8": "NEON", "NEOVERSEN1": "ASIMDDP"},
}  # fmt: skip


def core_types() -> list[str]:
    """Return the kernel sets that OpenBLAS can use here; "" is its own choice."""
    blas = {library["internal_api"] for library in threadpool_info() if library["user_api"] == "blas"}
    family = CORES["arm" if platform.machine().lower() in ("arm64", "aarch64") else "x86"]
    found = [core for core, needed in family.items() if __cpu_features__.get(needed)]
    return ["", *(found if blas == {"openblas"} else [])]


@pytest.mark.parametrize("core", core_types())
def test_threads_do_not_change_a_sum(tmp_path: Path, core: str) -> None:
    """Each set of kernels splits a product at other places."""
    run(core, "products", tmp_path / "sums")
    sums = (tmp_path / "sums").read_text().split()
    assert len(sums) == 3 and len(set(sums)) == 1


@pytest.mark.parametrize("core", [core for core in core_types() if core in ("", "Haswell")])
def test_threads_do_not_change_the_bytes(tmp_path: Path, core: str) -> None:
    """With Haswell's kernels on a Zen 5 processor, two threads once gave other codes than one."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    tiny_dense.save(tmp_path / "dense", tiny_dense.tensors(tiny_dense.CONFIG | sizes), **sizes)
    run(core, "convert", tmp_path / "dense", tmp_path)
    made = [(tmp_path / n / "model.safetensors").read_bytes() for n in "123"]
    assert made[0] == made[1] == made[2]


def run(core: str, *args: str | Path) -> None:
    """Run this file as a program in a process whose OpenBLAS uses these kernels."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "fixtures")}
    if core:
        environment["OPENBLAS_CORETYPE"] = core
    command = [sys.executable, __file__, *map(str, args)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def large_products() -> str:
    """Return a digest of every product that a conversion splits, at sizes where it does."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((n, 768), np.float32) for n in (600, 600))
    full, blocks = FullMoments.empty(768, w), BlockMoments.empty(768, 32)
    full.add(x, x + 1)
    blocks.add(x)
    sums = full.sums.copy()
    h = feedback.damped(full.take_sums(np.arange(768)), 1 / len(x))
    factor, change = feedback.factor(h), full.correction(w)
    cholesky.solve(factor.u, factor.d, change)
    codes = feedback.quantised(np.ascontiguousarray(w.T), factor, h, 4, 32, 1)
    loss = blocks.loss(w)
    parts = (sums, blocks.blocks, h, factor.u, change, codes.q, codes.scales, codes.zeros, loss)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in parts)).hexdigest()


def products(target: Path) -> None:
    sums = []
    for n in (1, 2, 3):
        with parallel.limited(n):
            sums.append(large_products())
    target.write_text(" ".join(sums))


def convert(source: Path, target: Path) -> None:
    for n in ("1", "2", "3"):
        args = ["convert", str(source), "-o", str(target / n), "--group-size", "32"]
        assert main([*args, "--calib-tokens", "512", "--backend", "cpu", "--threads", n]) == 0


if __name__ == "__main__":
    {"products": products, "convert": convert}[sys.argv[1]](*map(Path, sys.argv[2:]))
