"""The 64-bit Arm kernels under user-mode emulation: a Pi 4 (no dot product), a Pi 5, and int8 matrices.

Checks results, that no unsupported instruction is used, and the instructions per weight against the table.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from arm import lane as arm
from arm.lane import ARM, ROOT, run
from emulators import absent

TABLE = json.loads((ROOT / "tests" / "emulators" / "arm" / "counts.json").read_text())
PROMISED = {"neon": 0.40, "neondot": 0.22, "neoni8mm": 0.22}  # instructions per weight, int4 in groups of 128


@pytest.fixture(scope="module")
def build() -> Path:
    """The cross-built programs, built with the wheel for Arm, and the counting plugin; kept for the next run."""
    if why := arm.missing(("qemu-aarch64", "aarch64-linux-gnu-g++", "gcc")):
        absent(why)
    try:
        arm.build_wheel()
        run(
            "gcc",
            "-O2",
            "-shared",
            "-fPIC",
            ROOT / "tests/emulators/arm/icount.c",
            "-o",
            arm.BUILD / "icount.so",
        )
    except RuntimeError as e:
        absent(f"nothing is built for Arm here: {e}")
    return arm.BUILD


def instructions(build: Path, isa: str, *what: str) -> int:
    """Return the instructions retired by the kernels: a run with one repetition minus a run with none."""
    plugin = f"{build / 'icount.so'}"
    command = (
        "qemu-aarch64",
        "-cpu",
        ARM[isa],
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


@pytest.mark.parametrize("isa", ARM)
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_are_right_on_a_pi(build: Path, isa: str, threads: int) -> None:
    out = run("qemu-aarch64", "-cpu", ARM[isa], build / "fuzz", isa, str(threads), "15", str(threads))
    assert f"{isa}, {threads} threads: right" in out


def test_a_pi_4_is_not_offered_the_dot_product(build: Path) -> None:
    command = ["qemu-aarch64", "-cpu", ARM["neon"], build / "fuzz", "neondot", "1", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "the best is neon" in done.stderr


@pytest.mark.parametrize("isa", ARM)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, 128])
def test_instructions_a_weight_stay_as_in_the_table(build: Path, isa: str, bits: int, group: int) -> None:
    """Counts are the same on every run. Another compiler differs a little, a slower kernel differs more."""
    n, k = 512, 1024
    each = instructions(build, isa, "linear", str(bits), "1", str(n), str(k), str(group)) / (n * k)
    assert each <= TABLE[isa][f"int{bits}_g{group}"] * 1.03
    if bits == 4 and group == 128:
        assert each <= PROMISED[isa]


@pytest.mark.parametrize("isa", ARM)
def test_a_head_of_which_the_largest_logit_is_wanted_costs_little_more_than_int4(
    build: Path, isa: str
) -> None:
    """Its upper halves are read like int4 codes; tiles that may contain the largest are read again."""
    n, k = 8192, 1024
    each = instructions(build, isa, "linear", "head", "1", str(n), str(k), "128") / (n * k)
    assert each <= TABLE[isa]["head_g128"] * 1.03 <= 1.2 * 1.03 * TABLE[isa]["int4_g128"]


@pytest.mark.parametrize("isa", ARM)
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_share_the_work(build: Path, isa: str, bits: int) -> None:
    """96 rows: a whole number of panels of every kernel."""
    rows, n, k = 96, 512, 1024
    each = instructions(build, isa, "linear", str(bits), str(rows), str(n), str(k), "128") / (rows * n * k)
    assert each <= TABLE["many_rows"][isa][f"int{bits}_g128"] * 1.03
    if isa == "neoni8mm":  # 32 products per instruction, not 16; the rest is the same
        assert each <= 0.8 * TABLE["many_rows"]["neondot"][f"int{bits}_g128"]


@pytest.mark.parametrize("isa", ARM)
def test_everything_around_the_products_is_cheap(build: Path, isa: str) -> None:
    """One layer and the head of qwen2.5-0.5b: all ops except products add a few per cent at most."""
    layer = 896 * (1152 + 896) + 3 * 896 * 4864
    total = instructions(build, isa, "token", "qwen2.5-0.5b", "1")
    assert total <= 1.06 * TABLE[isa]["int4_g128"] * (layer + 896 * 151936)
