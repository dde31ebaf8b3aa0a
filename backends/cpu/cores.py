"""Detect the processor's name and the default number of threads."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

from tinychat_mlx.base.limits import cpu_quota, threads_asked

_CPU = Path("/sys/devices/system/cpu")
_CPUINFO, _BOARD = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")
# "implementer part" of the Main ID Register -> the core's name in its vendor's manuals
ARM_CORES = {
    "0x41 0xd03": "Cortex-A53", "0x41 0xd04": "Cortex-A35", "0x41 0xd05": "Cortex-A55", "0x41 0xd07": "Cortex-A57",
    "0x41 0xd08": "Cortex-A72", "0x41 0xd09": "Cortex-A73", "0x41 0xd0a": "Cortex-A75", "0x41 0xd0b": "Cortex-A76",
    "0x41 0xd0c": "Neoverse-N1", "0x41 0xd0d": "Cortex-A77", "0x41 0xd0e": "Cortex-A76AE", "0x41 0xd40": "Neoverse-V1",
    "0x41 0xd41": "Cortex-A78", "0x41 0xd42": "Cortex-A78AE", "0x41 0xd44": "Cortex-X1", "0x41 0xd46": "Cortex-A510",
    "0x41 0xd47": "Cortex-A710", "0x41 0xd48": "Cortex-X2", "0x41 0xd49": "Neoverse-N2", "0x41 0xd4b": "Cortex-A78C",
    "0x41 0xd4c": "Cortex-X1C", "0x41 0xd4d": "Cortex-A715", "0x41 0xd4e": "Cortex-X3", "0x41 0xd4f": "Neoverse-V2",
    "0x41 0xd80": "Cortex-A520", "0x41 0xd81": "Cortex-A720", "0x41 0xd82": "Cortex-X4", "0x41 0xd84": "Neoverse-V3",
    "0x41 0xd8e": "Neoverse-N3", "0x46 0x001": "A64FX", "0x48 0xd01": "Kunpeng-920", "0x4e 0x003": "Denver 2",
    "0x4e 0x004": "Carmel", "0x51 0x802": "Kryo-3XX-Gold", "0x51 0x803": "Kryo-3XX-Silver",
    "0x51 0x804": "Kryo-4XX-Gold", "0x51 0x805": "Kryo-4XX-Silver",
}  # fmt: skip


@functools.cache
def processor_name() -> str:
    """Return the processor's common name: "Raspberry Pi 5 Model B Rev 1.0", "AMD Ryzen 7 7840U"."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.processor()
    if _BOARD.exists():
        return _BOARD.read_text(errors="replace").rstrip("\0\n")
    try:
        cpuinfo = _CPUINFO.read_text(errors="replace")
    except OSError:
        cpuinfo = ""
    name = next(iter(_column(cpuinfo, "model name")), "")
    if (
        platform.machine() in ("aarch64", "arm64") and "vendor_id" in cpuinfo
    ):  # an x86 cpuinfo: qemu-user shows its host's
        return f"an Arm processor, emulated on {name}"
    return name or _arm_cores(cpuinfo) or platform.processor() or platform.machine()


def _arm_cores(cpuinfo: str) -> str:
    """Return "Cortex-A76 and Cortex-A55" from the numbers that Linux gives for an Arm without a device tree."""
    cores = zip(_column(cpuinfo, "CPU implementer"), _column(cpuinfo, "CPU part"), strict=False)
    found = dict.fromkeys(f"{maker} {part}" for maker, part in cores)
    return " and ".join(ARM_CORES.get(core, f"Arm processor (implementer, part: {core})") for core in found)


def _column(cpuinfo: str, key: str) -> list[str]:
    """Return a key's value for each processor."""
    rows = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for name, _, value in rows if name.strip() == key]


def default_threads() -> int:
    """Return OMP_NUM_THREADS, else one thread per fast physical core within the limits of this process."""
    cores = _cores()
    return threads_asked() or max(1, min(cores, int(cpu_quota() or cores)))


def _cores() -> int:
    if sys.platform == "darwin":
        fast = _sysctl("hw.perflevel0.physicalcpu")
        return int(fast) if fast.isdigit() else os.cpu_count() or 1
    if sys.platform == "linux":
        return len(_fast_cores())
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _fast_cores() -> set[str]:
    """Return one logical CPU per physical core, without the small cores of a hybrid processor."""
    cpus = sorted(os.sched_getaffinity(0))
    cores = {_read(cpu, "topology/thread_siblings_list") or str(cpu): cpu for cpu in reversed(cpus)}
    # Arm reports the capacity of a core. Intel's small cores have a lower maximum frequency; big ones differ
    # slightly.
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
