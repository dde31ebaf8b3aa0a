"""Every part of the program respects control groups, `ulimit -v` and OMP_NUM_THREADS."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkout import DATA

from tinychat_mlx import inspect, memory_plan
from tinychat_mlx.apps.doctor import machine
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.cpu import cores
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.base import limits
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.open import DEMO
from tinychat_mlx.weights.checkpoint import Checkpoint

DENSE = DATA / "demo-fp16"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="control groups and ulimit are POSIX's")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce the limit")

Tree = Callable[[str, dict[str, str]], None]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Pretend that this process is in these control groups, described by these files."""

    def make(mine: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "sys" / name).write_text(text)
        (tmp_path / "mine").write_text(mine)
        monkeypatch.setattr(limits, "CGROUPS", tmp_path / "sys")
        monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "mine")

    return make


MiB = 1 << 20
TREES = {
    "version 2": ("0::/a/b", {
        "cgroup.controllers": "", "a/memory.max": f"{80 * MiB}", "a/memory.current": f"{30 * MiB}",
        "a/memory.stat": f"anon 1\ninactive_file {10 * MiB}", "a/b/memory.max": "max", "a/cpu.max": "150000 100000"}),
    "version 2, nested": ("0::/a/b", {
        "cgroup.controllers": "", "a/memory.max": f"{999 * MiB}", "a/memory.current": "0",
        "a/b/memory.max": f"{80 * MiB}", "a/b/memory.current": f"{20 * MiB}", "a/b/cpu.max": "max 100000",
        "a/cpu.max": "150000 100000"}),
    "version 2 in a container": ("0::/not/mounted", {
        "cgroup.controllers": "", "memory.max": f"{80 * MiB}", "memory.current": f"{20 * MiB}", "cpu.max": "150000 100000"}),
    "version 2, a name space below": ("0::/../outside", {
        "cgroup.controllers": "", "memory.max": f"{80 * MiB}", "memory.current": f"{20 * MiB}", "cpu.max": "150000 100000"}),
    "version 2, throttled": ("0::/a", {
        "cgroup.controllers": "", "a/memory.max": "max", "a/memory.high": f"{80 * MiB}", "a/memory.current": f"{20 * MiB}",
        "a/cpu.max": "150000 100000"}),
    "version 1": ("4:memory:/a/b\n3:cpu,cpuacct:/a\n0::/", {
        "memory/a/memory.limit_in_bytes": f"{80 * MiB}", "memory/a/memory.usage_in_bytes": f"{20 * MiB}",
        "memory/a/b/memory.limit_in_bytes": "9223372036854771712", "memory/a/b/memory.usage_in_bytes": "5",
        "memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "7",
        "cpu,cpuacct/a/cpu.cfs_quota_us": "150000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}),
}  # fmt: skip


@POSIX
@pytest.mark.parametrize("kind", TREES)
def test_a_containers_limits_reach_everyone(
    kind: str, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 MiB, of which 20 are in use, and one and a half processors."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cores, "_cores", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    tree(*TREES[kind])
    assert (80 * MiB, 20 * MiB) in [(b.limit, b.used) for b in limits.bounds()]
    backend = CpuBackend()
    assert backend.memory().limit == 80 * MiB
    assert memory_plan.free_on(backend) == int(60 * MiB * limits.SYSTEM_SHARE)
    assert backend.engine.threads == limits.threads() == 1 and limits.cpu_quota() == 1.5
    seen = machine.memory().as_json() | machine.threads().as_json()
    assert (seen["limit_bytes"], seen["free_bytes"]) == (80 * MiB, 60 * MiB)
    assert (seen["threads"], seen["cpu_quota"]) == (1, 1.5)
    with pytest.raises(TinychatError, match=r"needs \d+ MB of memory, 56\.6 MB are free"):
        convert(Checkpoint.open(DENSE), tmp_path / "out", Settings(), lambda exact: backend, lambda *_: None)
    assert not list(tmp_path.glob("*out*"))


@POSIX
def test_without_a_limit_the_machine_is_what_counts(tree: Tree) -> None:
    tree("0::/", {"cgroup.controllers": "", "memory.max": "max", "cpu.max": "max 100000"})
    if limits.bounds():
        pytest.skip("these tests run under a ulimit")
    assert limits.memory_total() == psutil.virtual_memory().total
    assert limits.cpu_quota() is None


CALLERS = """
import json, os, sys
from pathlib import Path
from tinychat_mlx.base import limits
from tinychat_mlx import memory_plan as fit
from tinychat_mlx.apps.doctor import machine
from tinychat_mlx.awq.resources import Needs, shortage
from tinychat_mlx.backends.cpu.backend import CpuBackend
backend = CpuBackend(threads=1)
print(json.dumps({
    "limit": backend.memory().limit, "total": limits.memory_total(), "free": fit.free_on(backend),
    "mapping": fit.free_on(backend, 100 << 20), "doctor": machine.memory().as_json(),
    "convert": shortage(Needs(1 << 31, 0, 0, 0), Path.cwd() / "x"),
    "used": int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10,
}))
"""


def limited(nbytes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command under `ulimit -v`."""
    shell = ["sh", "-c", f'ulimit -v {nbytes // 1024}; exec "$@"', "sh"]
    return subprocess.run([*shell, *command], capture_output=True, text=True, check=False, timeout=600)


@LINUX
def test_ulimit_reaches_everyone() -> None:
    """A real limit of 2 GiB. The used part is the address space that the kernel reports."""
    allowed = 1 << 31
    if psutil.virtual_memory().total <= allowed:
        pytest.skip("this machine has less")
    done = limited(allowed, sys.executable, "-c", CALLERS)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["limit"] == found["total"] == found["doctor"]["limit_bytes"] == allowed
    left = allowed - found["used"]  # counted last: earlier parts had slightly more
    assert 0 <= found["doctor"]["free_bytes"] - left < 64 << 20
    assert -1 <= found["free"] - limits.SYSTEM_SHARE * left < 64 << 20
    assert found["free"] - found["mapping"] == pytest.approx(limits.SYSTEM_SHARE * (100 << 20), abs=1 << 20)
    assert "the conversion needs 2.1 GB of memory" in found["convert"]


@LINUX
def test_under_a_limit_the_context_that_is_said_to_fit_does(tmp_path: Path) -> None:
    """A larger context is refused without a MemoryError. The keys and values of this one take 1.5 GB."""
    import shutil

    folder = shutil.copytree(DEMO, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 500_000}))
    run = [sys.executable, "-m", "tinychat_mlx", "run", "-m", str(folder), "--backend", "cpu", "--threads", "1",
           "--max-tokens", "1", "hi"]  # fmt: skip
    needed = memory_plan.cost(inspect.local("long", folder), CpuBackend(threads=1)).peak(500_000)
    assert needed > 1.5e9
    asked = limited(1_700_000_000, *run, "--context", "500000")
    assert asked.returncode == 1 and "use --context" in asked.stderr, asked.stderr
    fits = int(asked.stderr.partition("use --context ")[2].partition(",")[0].replace(",", ""))
    done = limited(1_700_000_000, *run, "--context", str(fits))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("omp", "ours", "asked", "threads"),
    [("3", "", None, 3), ("2,4", "", None, 2), ("3", "5", None, 5), ("3", "5", 4, 4), ("0", "", None, 6),
     ("many", "", None, 6), ("", "", None, 6)],
)  # fmt: skip
def test_omp_num_threads_is_the_default(
    omp: str, ours: str, asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setenv("TINYCHAT_THREADS", ours)
    monkeypatch.setattr(cores, "_cores", lambda: 6)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert CpuBackend(threads=asked).engine.threads == threads
    if asked is None:
        told = machine.threads().as_json()
        assert told["threads"] == threads
        who = "TINYCHAT_THREADS" if ours else "OMP_NUM_THREADS"
        assert (who in told["threads_why"]) == (threads != 6)
