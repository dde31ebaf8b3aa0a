"""The thread pool in a host process: it sleeps when idle, survives a fork, and serves several callers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.backends.cpu.native_abi import open_library
from tinychat_mlx.weights.weight import Dense

RNG = np.random.default_rng(0)


def backend_and_weight(threads: int) -> tuple[CpuBackend, object, np.ndarray, np.ndarray]:
    backend = CpuBackend(exact=True, threads=threads)
    w, x = RNG.standard_normal((96, 64)).astype(np.float32), RNG.standard_normal((20, 64)).astype(np.float32)
    handle = backend.pack(Dense("w", w))
    return backend, handle, x, backend.to_host(backend.linear(x, handle))


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def ran(thread: str) -> tuple[str, str]:
    """Its state (S: asleep), and the nanoseconds it ran."""
    folder = Path("/proc/self/task", thread)
    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
    return state, (folder / "schedstat").read_text().split()[0]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system shows no thread's state")
def test_idle_threads_sleep() -> None:
    """Not for an instant does one of them run, however busy the machine is."""
    backend_and_weight(4)  # ends here, and its threads with it
    before = threads()
    backend, handle, x, y = backend_and_weight(4)
    mine, end = threads() - before, time.monotonic() + 300
    assert len(mine) == 3
    while {ran(thread)[0] for thread in mine} != {"S"}:
        assert time.monotonic() < end, "they look for work all the time"
    then = {thread: ran(thread) for thread in mine}
    time.sleep(0.2)
    assert {thread: ran(thread) for thread in mine} == then
    assert np.array_equal(backend.linear(x, handle), y)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads() -> None:
    backend, handle, x, y = backend_and_weight(3)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(backend.linear(x, handle), y) else 1)  # type: ignore[arg-type]
    deadline = time.monotonic() + 300
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0), "the child hangs or computes something else"
    assert np.array_equal(backend.linear(x, handle), y)  # type: ignore[arg-type]


def test_callers_on_several_threads_take_turns() -> None:
    backend, handle, x, y = backend_and_weight(2)
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(50):
            if not np.array_equal(backend.linear(x, handle), y):  # type: ignore[arg-type]
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert not wrong


def test_a_team_gets_smaller_only_where_fewer_threads_would_have_more() -> None:
    """The rule gets the threads' lost time and used time, in threads."""
    rule = open_library().tc_fewer
    rule.argtypes = [ctypes.c_int32, ctypes.c_double, ctypes.c_double]
    assert rule(4, 0.0, 1.0) == 4  # they waited for each other, not for processors
    assert rule(4, 0.1, 1.0) == 4
    assert rule(2, 1.0, 0.5) == 1  # two loops on two processors: one thread gets at least half a processor
    assert rule(2, 0.4, 1.4) == 2  # a short load: one thread would have 1.0
    assert rule(8, 0.5, 4.0) == 7  # one loop delays eight threads that meet often
    assert rule(8, 0.5, 7.4) == 8  # the same when the others take over a late thread's work
    assert rule(8, 2.0, 3.0) == 4
    assert rule(4, 4.0, 0.0) == 1


def test_busy_processors_make_the_team_smaller_and_change_no_result() -> None:
    """Endless loops on every processor: the team becomes smaller, and every result stays the same."""
    processors = os.cpu_count() or 1
    backend, handle, x, y = backend_and_weight(processors + 1)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * processors)]
    try:
        end = time.monotonic() + 300
        while backend.engine.team == processors + 1 and time.monotonic() < end:
            assert np.array_equal(backend.to_host(backend.linear(x, handle)), y)  # type: ignore[arg-type]
        smaller = backend.engine.team
        for _ in range(100):
            assert np.array_equal(backend.to_host(backend.linear(x, handle)), y)  # type: ignore[arg-type]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert smaller <= processors
