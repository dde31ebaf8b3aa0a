"""An older PC gets the kernels it supports, and runs no newer instruction."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from emulators import absent

import tinychat_mlx

HASWELL = ("qemu-x86_64", "-cpu", "Haswell-v4")

# A quantised product of one, few and many rows and an attention; prints the instruction set and a checksum of
# the bits.
SCRIPT = """
import zlib
import numpy as np
from tinychat_mlx.contract import Attention, CacheShape, Segment
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.weights.weight import Packed, pack_codes
rng = np.random.default_rng(1)
q = rng.integers(0, 16, (48, 128), dtype=np.uint8)
scales = rng.uniform(0.01, 0.02, (48, 2)).astype(np.float16)
backend = CpuBackend(threads=2)
w = backend.pack(Packed("w", pack_codes(q, 4), scales, -8 * scales, 4, 64))
out = [backend.linear(rng.standard_normal((rows, 128)).astype(np.float32), w) for rows in (1, 5, 40)]
cache = backend.new_cache(CacheShape(1, 2, 32), 64)
q, k, v = (rng.standard_normal((9, h, 32)).astype(np.float32) for h in (4, 2, 2))
out.append(backend.attention(q, k, v, Attention(0, 0.2), backend.step([Segment(cache, 9)])))
print(backend.engine.isa, zlib.crc32(b"".join(x.tobytes() for x in out)))
"""


# The kernel tests that finish in seconds under an emulator; -v lists those that ran.
KERNELS = """
import sys
import pytest
left_out = "not growing_cache and not scalar and not reference and not mlx and not cuda"
sys.exit(pytest.main(["-v", "-p", "no:cacheprovider", "-c", sys.argv[1], "--import-mode=importlib", "-k", left_out, *sys.argv[2:]]))
"""

DEMO = """
import sys
from tinychat_mlx.apps.cli import main
sys.exit(main(["run", "-v", "--backend", "cpu", "who are you?"]))
"""


def run(*command: str, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # NumPy's dispatch of CPU features is not tested here.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"} | environment
    # An editable install is found through hooks that the bare interpreter does not run, so pass the folders.
    found = f"import tinychat_mlx\ntinychat_mlx.__path__[:] = {list(tinychat_mlx.__path__)!r}\n"
    emulator = () if environment.get("TINYCHAT_CPU_ISA") else HASWELL
    python = str(Path(sys.executable).resolve())
    argv = [*emulator, python, "-c", found + script, *command]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done


@pytest.fixture(autouse=True)
def emulator() -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("this is not x86-64 Linux")
    if shutil.which(HASWELL[0]) is None:
        absent(f"{HASWELL[0]} is not installed (apt install qemu-user)")


def test_a_haswell_runs_avx2_and_gets_the_same_bits() -> None:
    """Emulated without AVX-512 and VNNI: such an instruction outside their files ends the process."""
    emulated = run(script=SCRIPT).stdout
    assert emulated.startswith("avx2 ")
    assert emulated == run(script=SCRIPT, TINYCHAT_CPU_ISA="avx2").stdout


@pytest.mark.slow
def test_a_haswell_passes_the_kernels_own_tests(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    tests = [str(ROOT / "tests" / "devices" / f"test_{name}.py") for name in ("cpu_kernels", "backends")]
    done = run(str(tmp_path / "pytest.ini"), *tests, script=KERNELS)
    assert "[avx2" in done.stdout and "[cpu" in done.stdout and "avx512" not in done.stdout


def test_a_haswell_chats(tmp_path: Path) -> None:
    emulated = run(script=DEMO, HOME=str(tmp_path))
    assert "(avx2, " in emulated.stderr
    assert emulated.stdout == run(script=DEMO, HOME=str(tmp_path), TINYCHAT_CPU_ISA="avx2").stdout
