"""Which processor is this, and how many threads suit it?"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

_CPU = Path("/sys/devices/system/cpu")


@functools.cache
def processor_name() -> str:
    """What people call this processor: "Raspberry Pi 5 Model B Rev 1.0", "AMD Ryzen 7 7840U"."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    board = Path("/proc/device-tree/model")
    if board.exists():
        return board.read_text(errors="replace").rstrip("\0\n")
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def default_threads() -> int:
    """One thread a physical core of the fast kind, within what this process may use."""
    if sys.platform == "darwin":
        fast = _sysctl("hw.perflevel0.physicalcpu")
        return int(fast) if fast.isdigit() else os.cpu_count() or 1
    if sys.platform == "linux":
        return max(1, min(len(_fast_cores()), _quota()))
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _fast_cores() -> set[str]:
    """One logical CPU of each physical core, without the small cores of a mixed processor."""
    cpus = sorted(os.sched_getaffinity(0))
    cores = {_read(cpu, "topology/thread_siblings_list") or str(cpu): cpu for cpu in reversed(cpus)}
    # Arm says how strong a core is; Intel's small cores have a lower top frequency, the big ones differ a little.
    for file, share in (("cpu_capacity", 0.8), ("cpufreq/cpuinfo_max_freq", 0.8)):
        strength = {core: int(_read(cpu, file) or 0) for core, cpu in cores.items()}
        if top := max(strength.values(), default=0):
            return {core for core, s in strength.items() if s >= share * top}
    return set(cores)


def _read(cpu: int, file: str) -> str:
    try:
        return (_CPU / f"cpu{cpu}" / file).read_text().strip()
    except OSError:
        return ""


def _quota() -> int:
    """Whole CPUs a container may use (cgroup 2)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return 1 << 30
    return 1 << 30 if quota == "max" else max(1, int(quota) // int(period))
