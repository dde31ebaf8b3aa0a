"""How much of this machine may this process use: memory, processors, disk?

A container, a control group or `ulimit -v` may allow less than the machine has. Asks the system alone and imports
nothing of ours, so that every layer, backends too, gets the same answer.
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
SYSTEM_SHARE = 0.9  # of the memory that is free; the rest keeps the machine usable
# Limit and use of memory in a control group: versions 2 and 1. Above memory.high a process is slowed to a crawl.
MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class Bound(NamedTuple):
    """What keeps this process below the machine's memory. maps: mapped files count as used, too."""

    name: str
    limit: int  # bytes
    used: int
    maps: bool = False


# memory ------------------------------------------------------------------------------------------------
def memory_total() -> int:
    """Bytes of memory that this process could have at most."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(b.limit for b in bounds())])


def memory_free(mapped: int = 0) -> int:
    """Bytes that this process can still take. mapped: of files that it is going to map beside."""
    import psutil

    left = [b.limit - b.used - (mapped if b.maps else 0) for b in bounds()]
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def available(mapped: int = 0) -> int:
    """Bytes that a model or a conversion may take of what is free."""
    return int(memory_free(mapped) * SYSTEM_SHARE)


def bounds() -> list[Bound]:
    """Every limit set for this process, the tightest first."""
    found = [Bound("the container or control group", *row) for row in _groups_memory()]
    if sys.platform != "win32":
        import resource

        import psutil

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(Bound("ulimit -v", soft, int(psutil.Process().memory_info().vms), maps=True))
    return sorted(found, key=lambda b: b.limit - b.used)


def _groups_memory() -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group above this process."""
    for folder in cgroup_folders("memory"):
        for limit, used in MEMORY:
            text = _read(folder / limit)
            if text.isdecimal():
                yield int(text), max(0, int(_read(folder / used) or 0) - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Bytes of files that a group holds in memory and gives back when asked: not in use, though counted so."""
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's control groups, versions 2 and 1, the innermost first (man 7 cgroups).

    Inside a container its own group may be mounted as the root, whatever /proc/self/cgroup calls it.
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
        # ".." stands for groups above a container's own, which it cannot see
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
    """Processors' time that the control groups allow, in processors; None: all there is."""
    allowed = []
    for folder in cgroup_folders("cpu"):
        words = _read(folder / "cpu.max").split() or [
            _read(folder / f"cpu.cfs_{word}_us") for word in ("quota", "period")
        ]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            allowed.append(int(words[0]) / int(words[1]))
    return min(allowed, default=None)


def threads_asked() -> int | None:
    """OMP_NUM_THREADS: what users and batch systems set for every program; its first number, where it is a list."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) else None


def threads() -> int:
    """Threads that can work at once: as OMP_NUM_THREADS asks, or one a processor that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads_asked() or max(1, min(cpus, int(cpu_quota() or cpus)))


def disk_free(path: Path) -> int:
    """Bytes free where a path is, or will be."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
