"""What is this machine: its processor, its memory, and how much of both may this process use?"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from tinychat_mlx.apps.doctor.finding import NOTE, OK, Finding, Section
from tinychat_mlx.apps.terminal import size
from tinychat_mlx.backends.cpu.cores import default_threads, processor_name

CGROUPS = Path("/sys/fs/cgroup")


def machine() -> Section:
    """Processor, system, Python."""
    system = f"{platform.system()} {platform.release()} ({platform.machine()})"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    found = [
        _processor(),
        Finding("system", system, _distribution() or system),
        Finding("python", python, f"{python}, {64 if sys.maxsize > 1 << 32 else 32} bits"),
    ]
    if _rosetta():
        do = "install Python for arm64: MLX, and with it the GPU, needs it"
        found.append(Finding("translated", True, "this Python is translated by Rosetta", NOTE, do))
    return Section("machine", "Machine", tuple(found))


def _processor() -> Finding:
    name = processor_name()
    if " emulated on " in name:
        text = f"{name}: which one is emulated it does not tell; memory and cores are the host's too"
        return Finding("processor", name, text, NOTE, "on the device itself the model stands here")
    return Finding("processor", name)


def _distribution() -> str:
    """ "Debian GNU/Linux 12 (bookworm), Linux 6.1.0 (x86_64)"; "" elsewhere."""
    for line in _read(Path("/etc/os-release")).splitlines():
        if line.startswith("PRETTY_NAME="):
            name = line.partition("=")[2].strip("\"'")
            return f"{name}, {platform.system()} {platform.release()} ({platform.machine()})"
    return ""


def _rosetta() -> bool:
    """An x86 Python on Apple silicon."""
    return sys.platform == "darwin" and platform.machine() == "x86_64" and "Apple" in processor_name()


# memory ------------------------------------------------------------------------------------------------
def memory() -> Section:
    """Total, free, swap, and the limits set for this process."""
    import psutil

    seen = psutil.virtual_memory()
    bounds = [b for b in limits() if b[1] < seen.total]
    free = min([int(seen.available), *(limit - used for _, limit, used in bounds)])
    found = [
        Finding("total_bytes", int(seen.total), f"{size(seen.total)} in all", OK),
        Finding("free_bytes", free, f"{size(free)} free for programs"),
        Finding("swap_bytes", (swap := int(psutil.swap_memory().total)), f"swap: {size(swap)}"),
    ]
    for name, limit, used in bounds:
        text = f"{size(limit)} is all that {name} allows, {size(used)} of it are used"
        do = "the machine has more: raise the limit (docker run --memory, ulimit -v) for larger models"
        found.append(Finding("limit_bytes", limit, text, NOTE, do))
        break
    else:
        found.append(Finding("limit_bytes", None, "no limit set for this process"))
    return Section("memory", "Memory", tuple(found))


def limits() -> list[tuple[str, int, int]]:
    """What keeps this process below the machine's memory -> (name, bytes allowed, bytes used), tightest first."""
    found = [("the container or control group", limit, used) for limit, used in _memory_cgroups()]
    if sys.platform != "win32":
        import resource

        import psutil

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            found.append(("ulimit -v", soft, int(psutil.Process().memory_info().vms)))
    return sorted(found, key=lambda row: row[1] - row[2])


def _memory_cgroups() -> Iterator[tuple[int, int]]:
    """(limit, used) of each control group above this process, versions 1 and 2."""
    for folder in cgroup_folders("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            text = _read(folder / limit).strip()
            if text.isdecimal():
                yield int(text), max(0, int(_read(folder / used).strip() or 0) - _reclaimable(folder))


def _reclaimable(folder: Path) -> int:
    """Bytes of files that a group holds in memory and gives back when asked: not in use, though counted so."""
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def cgroup_folders(controller: str, root: Path = CGROUPS, mine: str | None = None) -> list[Path]:
    """Folders of this process's control groups, the innermost first (man 7 cgroups).

    Inside a container its own group may be mounted as the root, whatever /proc/self/cgroup calls it.
    """
    found: list[Path] = []
    for line in (_read(Path("/proc/self/cgroup")) if mine is None else mine).splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            top = root if (root / "cgroup.controllers").exists() else root / "unified"
        elif controller in names.split(","):
            top = root / names if (root / names).is_dir() else root / controller
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        found += [top.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
    return [f for f in dict.fromkeys(found) if f.is_dir()]


def quota() -> float | None:
    """CPUs that the control groups allow, or None."""
    allowed = []
    for folder in cgroup_folders("cpu"):
        words = _read(folder / "cpu.max").split() or [
            _read(folder / f"cpu.cfs_{w}_us").strip() for w in ("quota", "period")
        ]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            allowed.append(int(words[0]) / int(words[1]))
    return min(allowed, default=None)


# threads -----------------------------------------------------------------------------------------------
def threads() -> Section:
    """How many threads the cpu backend takes, and why."""
    import psutil

    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    physical = psutil.cpu_count(logical=False)
    allowed = quota()
    asked = os.environ.get("TINYCHAT_THREADS", "")
    n = int(asked) if asked.isdecimal() else default_threads()
    why = _why(n, asked, logical, usable, physical, allowed)
    found = [
        Finding("threads", n, f"{n} thread{'s' * (n != 1)}: {why}", OK),
        Finding("threads_why", why, None),
        Finding("logical_cpus", logical, f"{logical} logical CPUs, {usable} of them usable by this process"),
        Finding("usable_cpus", usable, None),
        Finding("physical_cores", physical, f"{physical or 'unknown'} physical cores"),
        Finding("cpu_quota", allowed, None if allowed is None else f"at most {_cpus(allowed)} (container)"),
    ]
    if asked and not asked.isdecimal():
        do = "set it to 1, 2, … or unset it"
        found[0] = Finding("threads", None, f"TINYCHAT_THREADS={asked!r} is no number", "broken", do)
    elif n > usable:
        text, do = f"{n} threads for {usable} usable CPUs: they wait for each other", "unset TINYCHAT_THREADS"
        found[0] = Finding("threads", n, text, NOTE, do)
    elif allowed is not None and n > max(1, allowed):
        text = f"{n} threads, but the container gives them {_cpus(allowed)}: they wait for each other"
        do = f"set TINYCHAT_THREADS={max(1, int(allowed))}"
        found[0] = Finding("threads", n, text, NOTE, do)
    return Section("threads", "Threads", tuple(found))


def _why(n: int, asked: str, logical: int, usable: int, physical: int | None, allowed: float | None) -> str:
    if asked:
        return "TINYCHAT_THREADS asks for it"
    if allowed is not None and n == max(1, int(allowed)):
        return f"the container gives it {_cpus(allowed)}"
    if usable < logical:
        return f"this process may use {usable} of {logical} CPUs"
    if physical and n < physical:
        return "one a fast core; the small cores would make the fast ones wait"
    if physical and physical < logical:
        return "one a physical core; two threads on a core share its arithmetic"
    return "one a core"


def _cpus(n: float) -> str:
    return "1 CPU's time" if n == 1 else f"{n:g} CPUs' time"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
