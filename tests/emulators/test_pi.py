"""The package on an emulated Raspberry Pi: the Arm wheel, installed, computes and chats as on this machine.

cortex-a72 is a Pi 4, cortex-a76 a Pi 5. qemu rejects instructions that such a processor lacks, so this also
proves that a Pi 4 gets no dot product. Without the emulator these tests skip, unless
TINYCHAT_REQUIRE_EMULATORS is set (as in CI).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from arm import lane as arm
from checkout import ROOT
from decoding import decoder, logits
from emulators import absent
from tiny_models import tiny

from tinychat_mlx.backends.reference import ReferenceBackend

TESTS = ROOT / "tests"
PI, ARM = arm.PI, arm.ARM
# Biases; caps, windows and a second norm; ALiBi; parallel layers with biases; experts; partly rotated heads.
FAMILIES = ("qwen2", "gemma2", "mpt", "gpt_neox", "mixtral", "phi")
QUESTIONS = ("who are you?", "what is the capital of France?", "how many legs has a spider?")


@pytest.fixture(scope="module")
def lane() -> arm.Lane:
    if platform.system() != "Linux" or (why := arm.missing()):
        absent(why or "the Arm lane runs on Linux")
    try:
        return arm.make()
    except RuntimeError as e:
        absent(f"the emulated Pi could not be made: {e}")


@pytest.fixture(params=PI)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_wheel_holds_arm_code_and_is_what_python_imports(lane: arm.Lane) -> None:
    library = lane.packages[0] / "tinychat_mlx" / "tinychat_cpu.so"
    head = library.read_bytes()[:20]
    assert head[:4] == b"\x7fELF" and head[18] == 183  # EM_AARCH64
    done = lane.run(
        "cortex-a72", "-c", "import tinychat_mlx as t, platform; print(t.__file__, platform.machine())"
    )
    assert done.stdout.split() == [str(lane.packages[0] / "tinychat_mlx/__init__.py"), "aarch64"]


@pytest.mark.parametrize("isa", ARM)
def test_a_processor_is_offered_what_it_has(lane: arm.Lane, isa: str) -> None:
    code = "from tinychat_mlx.backends.cpu import native_abi as library; print(*library.instruction_sets())"
    offered = lane.run(ARM[isa], "-c", code).stdout.split()
    assert offered == [*list(ARM)[: list(ARM).index(isa) + 1][::-1], "scalar"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ARM)
def test_the_kernels_own_tests_pass(lane: arm.Lane, isa: str, tmp_path: Path) -> None:
    """Runs all kernel tests except some that do not work under an emulator.

    These are: tests with minutes of float64 NumPy (test_cpu_arm.py fuzzes attention), the plain C++, which is
    processor-independent, fork (qemu 7 ends with a failed assertion when a forked child starts threads), and
    busy loops, which would run on another processor.
    """
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    others = [f"[{name}{end}" for name in ("scalar", *ARM) if name != isa for end in "]-"]
    left_out = " and ".join(
        f"not {what}" for what in ("growing_cache", "forked", "busy", "reference", "mlx", "cuda", *others)
    )
    command = lane.command(
        ARM[isa], "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", tmp_path / "pytest.ini",
        "--import-mode=importlib", "-k", left_out,
        *(TESTS / "devices" / f"test_{name}.py" for name in ("cpu_kernels", "cpu_threads", "backends")),
    )  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=lane.environment(TESTS / "fixtures"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"[{isa}" in done.stdout  # the names of the tests that ran


def test_the_graph_computes_transformers_logits(
    lane: arm.Lane, isa: str, tiny_root: Path, tmp_path: Path
) -> None:
    """float32 sums of about 100 terms through 4 layers: errors of 2e-5 of the largest (test_support.py)."""
    models = {family: tiny(family, tiny_root) for family in FAMILIES}
    wanted = json.dumps({family: [str(t.folder), t.ids] for family, t in models.items()})
    made = tmp_path / "logits.npz"
    command = lane.command(PI[isa], TESTS / "emulators" / "arm" / "on_device.py", made)
    done = subprocess.run(
        command,
        input=wanted,
        capture_output=True,
        text=True,
        check=False,
        env=lane.environment(TESTS / "fixtures"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(made) as got:
        for family, t in models.items():
            bound = 1e-4 * np.abs(t.logits).max()
            assert np.abs(got[f"{family}-dense"] - t.logits).max() < bound, family
            int4 = logits(decoder(t.folder, ReferenceBackend(), True), t.ids, [len(t.ids)])
            assert np.abs(got[f"{family}-int4"] - int4).max() < bound, family
            assert np.abs(got[f"{family}-int4"] - t.logits).max() > bound  # int4 was int4


def test_the_demo_answers_as_it_does_here(lane: arm.Lane, isa: str) -> None:
    """A conversation with the real program. The first line on stderr names the processor's instruction set."""
    arguments = (
        "-m",
        "tinychat_mlx",
        "chat",
        "--plain",
        "--no-save",
        "--temperature",
        "0",
        "--backend",
        "cpu",
    )
    asked = "\n".join(QUESTIONS) + "\n"
    environment = lane.environment()
    there = subprocess.run(
        lane.command(PI[isa], *arguments), input=asked, capture_output=True, text=True, check=False,
        env=environment, cwd=arm.WORK,
    )  # fmt: skip
    here = subprocess.run(
        [sys.executable, *arguments], input=asked, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": environment["HOME"]},
    )  # fmt: skip
    assert there.returncode == here.returncode == 0, there.stderr + here.stderr
    assert there.stdout == here.stdout and "Paris" in there.stdout
    assert f"({isa}, " in there.stderr


def test_one_answer_on_stdout(lane: arm.Lane) -> None:
    isa = list(PI)[-1]
    done = lane.run(PI[isa], "-m", "tinychat_mlx", "run", "-v", "who are you?")
    assert done.returncode == 0, done.stderr
    assert "TinyChat demo model" in done.stdout and f"({isa}, " in done.stderr


def test_the_chat_opens_at_once_on_a_pi_5(lane: arm.Lane) -> None:
    """Computed from the instructions to the first prompt (see startup.py): 0.45 s when this was written."""
    pytest.importorskip("pexpect")
    from arm.startup import BOARDS, STARTS, on_board

    n = on_board(lane, BOARDS[0], STARTS["tinychat, to the prompt"])
    assert 0.1 < BOARDS[0].seconds(n) < 0.6


def test_the_doctor_recognises_a_pi(lane: arm.Lane, isa: str) -> None:
    """An emulator can show an Arm's instruction sets and libraries; memory and /proc/cpuinfo are the host's."""
    done = lane.run(PI[isa], "-m", "tinychat_mlx", "doctor", "--json", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    offered = list(PI)[: list(PI).index(isa) + 1][::-1] + ["scalar"]
    assert found["native"]["instruction_sets"] == offered and found["native"]["used"] == isa
    assert "aarch64" in found["machine"]["system"]
    assert found["backends"]["chosen"]["name"] == "cpu" and not found["backends"]["mlx"]["works"]
    if "vendor_id" in Path("/proc/cpuinfo").read_text():
        row = next(p for p in found["problems"] if p["where"] == "machine.processor")
        assert "an Arm processor, emulated on" in row["what"]
        assert found["backends"]["cpu"]["device"]["name"] == found["machine"]["processor"]
    assert (lane.packages[0] / "tinychat_mlx" / "tinychat_cpu.so").stat().st_size > 0
