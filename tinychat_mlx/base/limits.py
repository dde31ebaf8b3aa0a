"""Limits of this process: memory, processors and disk space.

A container, a control group or `ulimit -v` may allow less than the machine has. This module reads only the operating
system and imports no other module of this project, so that every layer, backends included, gets the same answer.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
SYSTEM_SHARE = 0.9  # of free memory; the rest keeps the machine responsive
# Files with the limit and the use of memory, cgroup v2 and v1. Above memory.high the kernel throttles the process.
MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class Bound(NamedTuple):
    """A limit below the machine's memory. maps: mapped files count towards it, too."""

    name: str
    limit: int  # bytes
    used: int
    maps: bool = False


# memory ------------------------------------------------------------------------------------------------
def memory_total() -> int:
    """Return the largest number of bytes that this process can use."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(b.limit for b in bounds())])


def memory_free(mapped: int = 0) -> int:
    """Return the bytes that this process can still allocate. mapped: bytes of files that it will map in addition."""
    import psutil

    left = [b.limit - b.used - (mapped if b.maps else 0) for b in bounds()]
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def available(mapped: int = 0) -> int:
    """Return the bytes that a model or a conversion may use: SYSTEM_SHARE of the free memory."""
    return int(memory_free(mapped) * SYSTEM_SHARE)


def bounds() -> list[Bound]:
    """Return every memory limit of this process, the tightest first."""
    found = [Bound("the container or control group", *row) for row in _groups_memory()]
    if sys.platform != "win32":
        import resource

        import psutil

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(Bound("ulimit -v", soft, int(psutil.Process().memory_info().vms), maps=True))
    return sorted(found, key=lambda b: b.limit - b.used)


def _groups_memory() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes for each control group that contains this process."""
    for folder in cgroup_folders("memory"):
        for limit, used in MEMORY:
            text = _read(folder / limit)
            if text.isdecimal():
                yield int(text), max(0, int(_read(folder / used) or 0) - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Return the bytes of a group's file cache that the kernel can reclaim; `used` counts them, so subtract them."""
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def cgroup_folders(controller: str) -> list[Path]:
    """Return the folders of this process's control groups, v2 and v1, the innermost first (man 7 cgroups).

    In a container the process's own group may be mounted as the root, whatever path /proc/self/cgroup prints.
    """
    found: list[Path] = []
    for line in _read(OWN_GROUPS).splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            top = CGROUPS if (CGROUPS / "cgroup.controllers").exists() else CGROUPS / "unified"
        elif controller in names.split(","):
            top = CGROUPS / names if (CGROUPS / names).is_dir() else CGROUPS / controller
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        # ".." refers to groups outside a container's namespace, which it cannot read
        depths = range(0 if ".." in parts else len(parts), -1, -1)
        found += [top.joinpath(*parts[:n]) for n in depths]
    return [f for f in dict.fromkeys(found) if f.is_dir()]


def memory_peak() -> int:
    """The most bytes of memory that this process has held. On Linux ru_maxrss starts at the parent's value."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


# processors and disk -----------------------------------------------------------------------------------
def cpu_quota() -> float | None:
    """Return the CPU time that the control groups allow, in processors; None if there is no limit."""
    allowed = []
    for folder in cgroup_folders("cpu"):
        words = _read(folder / "cpu.max").split() or [
            _read(folder / f"cpu.cfs_{word}_us") for word in ("quota", "period")
        ]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            allowed.append(int(words[0]) / int(words[1]))
    return min(allowed, default=None)


def threads_asked() -> int | None:
    """Return OMP_NUM_THREADS, the usual thread setting of batch systems; of a list, the first number."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) else None


def threads() -> int:
    """Return the default thread count: OMP_NUM_THREADS, else one per processor that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads_asked() or max(1, min(cpus, int(cpu_quota() or cpus)))


def disk_free(path: Path) -> int:
    """Return the free bytes on the disk of a path that may not exist yet."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
