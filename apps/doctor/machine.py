"""Processor, memory and threads of this machine, and the limits of this process."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from tinychat_mlx.apps.doctor.finding import NOTE, OK, Finding, Section
from tinychat_mlx.backends.cpu.cores import default_threads, processor_name
from tinychat_mlx.base import limits
from tinychat_mlx.base.wording import size


def machine() -> Section:
    """Return the section on processor, system and Python."""
    system = f"{platform.system()} {platform.release()} ({platform.machine()})"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    found = [
        _processor(),
        Finding("system", system, _distribution() or system),
        Finding("python", python, f"{python}, {64 if sys.maxsize > 1 << 32 else 32} bits"),
    ]
    if _rosetta():
        do = "install Python for arm64: MLX (and so the GPU) requires it"
        found.append(Finding("translated", True, "this Python is translated by Rosetta", NOTE, do))
    return Section("machine", "Machine", tuple(found))


def _processor() -> Finding:
    name = processor_name()
    if " emulated on " in name:
        text = f"{name}: the emulated model is unknown; memory and cores are those of the host"
        return Finding("processor", name, text, NOTE, "run this on the device to see its model")
    return Finding("processor", name)


def _distribution() -> str:
    """ "Debian GNU/Linux 12 (bookworm), Linux 6.1.0 (x86_64)"; "" elsewhere."""
    for line in _read(Path("/etc/os-release")).splitlines():
        if line.startswith("PRETTY_NAME="):
            name = line.partition("=")[2].strip("\"'")
            return f"{name}, {platform.system()} {platform.release()} ({platform.machine()})"
    return ""


def _rosetta() -> bool:
    """Whether this is an x86 Python on Apple silicon."""
    return sys.platform == "darwin" and platform.machine() == "x86_64" and "Apple" in processor_name()


# memory ------------------------------------------------------------------------------------------------
def memory() -> Section:
    """Return the section on memory: total, free, swap, and the limits of this process."""
    import psutil

    seen = psutil.virtual_memory()
    free = limits.memory_free()
    found = [
        Finding("total_bytes", int(seen.total), f"{size(seen.total)} total", OK),
        Finding("free_bytes", free, f"{size(free)} available"),
        Finding("swap_bytes", (swap := int(psutil.swap_memory().total)), f"swap: {size(swap)}"),
    ]
    if bound := next((b for b in limits.bounds() if b.limit < seen.total), None):
        text = f"{bound.name} allows {size(bound.limit)}, of which {size(bound.used)} is used"
        do = "the machine has more: raise the limit (docker run --memory, ulimit -v) for larger models"
        found.append(Finding("limit_bytes", bound.limit, text, NOTE, do))
    else:
        found.append(Finding("limit_bytes", None, "no limit set for this process"))
    return Section("memory", "Memory", tuple(found))


# threads -----------------------------------------------------------------------------------------------
def threads() -> Section:
    """Return the section on the threads of the cpu backend, with the reason for their number."""
    import psutil

    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    physical = psutil.cpu_count(logical=False)
    allowed = limits.cpu_quota()
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
        found[0] = Finding("threads", None, f"TINYCHAT_THREADS={asked!r} is not a number", "broken", do)
    elif n > usable:
        text, do = (
            f"{n} threads for {usable} usable CPUs: this slows them down",
            f"unset {why.partition(' ')[0]}",
        )
        found[0] = Finding("threads", n, text, NOTE, do)
    elif allowed is not None and n > max(1, allowed):
        text = f"{n} threads, but the container allows {_cpus(allowed)}: this slows them down"
        do = f"set TINYCHAT_THREADS={max(1, int(allowed))}"
        found[0] = Finding("threads", n, text, NOTE, do)
    return Section("threads", "Threads", tuple(found))


def _why(n: int, asked: str, logical: int, usable: int, physical: int | None, allowed: float | None) -> str:
    if asked:
        return "set by TINYCHAT_THREADS"
    if limits.threads_asked():
        return "set by OMP_NUM_THREADS"
    if allowed is not None and n == max(1, int(allowed)):
        return f"the container allows {_cpus(allowed)}"
    if usable < logical:
        return f"this process may use {usable} of {logical} CPUs"
    if physical and n < physical:
        return "one per fast core; slower cores would delay the fast ones"
    if physical and physical < logical:
        return "one per physical core; two threads on a core share its arithmetic units"
    return "one per core"


def _cpus(n: float) -> str:
    return "1 CPU's time" if n == 1 else f"{n:g} CPUs' time"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
