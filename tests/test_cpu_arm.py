"""The kernels of 64-bit Arm under user-mode emulation: a Pi 4 (no dot product) and a Pi 5.

Right results, no instruction beyond the processor's, and no more instructions a weight than the table says.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "aarch64"
TABLE = json.loads((ROOT / "tests" / "arm" / "counts.json").read_text())
PI = {"neon": "cortex-a72", "neondot": "cortex-a76"}
PROMISED = {"neon": 0.40, "neondot": 0.22}  # instructions a weight, int4 in groups of 128
TOOLS = ["aarch64-linux-gnu-g++", "qemu-aarch64", "cmake", "gcc"]


@pytest.fixture(scope="module")
def build() -> Path:
    """The cross-built programs and the counting plugin; kept in build/ for the next run."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (apt install qemu-user g++-aarch64-linux-gnu cmake gcc)")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'tests/arm/aarch64.cmake'}"
    run("cmake", "-S", str(ROOT / "backends/cpu"), "-B", str(BUILD), toolchain, "-DTINYCHAT_TOOLS=ON")
    run("cmake", "--build", str(BUILD), "--target", "fuzz", "count", "--parallel", "2")
    run("gcc", "-O2", "-shared", "-fPIC", str(ROOT / "tests/arm/icount.c"), "-o", str(BUILD / "icount.so"))
    return BUILD


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def instructions(build: Path, isa: str, *what: str) -> int:
    """Retired by the kernels: a run with one repetition less a run with none."""
    plugin = f"{build / 'icount.so'}"
    command = (
        "qemu-aarch64",
        "-cpu",
        PI[isa],
        "-plugin",
        plugin,
        "-d",
        "plugin",
        str(build / "count"),
        isa,
        *what,
    )
    found = [re.search(r"total=(\d+)", run(*command, repeat)) for repeat in ("1", "0")]
    one, none = (int(m.group(1)) for m in found if m)
    return one - none


@pytest.mark.parametrize("isa", PI)
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_are_right_on_a_pi(build: Path, isa: str, threads: int) -> None:
    out = run("qemu-aarch64", "-cpu", PI[isa], str(build / "fuzz"), isa, str(threads), "15", str(threads))
    assert f"{isa}, {threads} threads: right" in out


def test_a_pi_4_is_not_offered_the_dot_product(build: Path) -> None:
    command = ["qemu-aarch64", "-cpu", PI["neon"], str(build / "fuzz"), "neondot", "1", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "the best is neon" in done.stderr


@pytest.mark.parametrize("isa", PI)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, 128])
def test_instructions_a_weight_stay_as_in_the_table(build: Path, isa: str, bits: int, group: int) -> None:
    """Counts are the same on every run; another compiler may differ a little, a slower kernel differs more."""
    n, k = 512, 1024
    each = instructions(build, isa, "matvec", str(bits), str(n), str(k), str(group)) / (n * k)
    assert each <= TABLE[isa][f"int{bits}_g{group}"] * 1.03
    if bits == 4 and group == 128:
        assert each <= PROMISED[isa]


@pytest.mark.parametrize("isa", PI)
def test_everything_around_the_products_is_cheap(build: Path, isa: str) -> None:
    """One layer and the head of qwen2.5-0.5b: norms, rope, attention, quantising add a few per cent at most."""
    layer = 896 * (1152 + 896) + 3 * 896 * 4864
    total = instructions(build, isa, "token", "qwen2.5-0.5b", "1")
    assert total <= 1.06 * TABLE[isa]["int4_g128"] * (layer + 896 * 151936)
