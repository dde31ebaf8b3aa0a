"""The CUDA kernels compile for their GPUs and fit them, and their launches pass correct arguments."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import emulate
import models
import resources

from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda import kernels, nvrtc, programs, weights
from tinychat_mlx.backends.cuda.backend import CudaBackend
from tinychat_mlx.base.errors import BackendError

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    emulate.compiler() is None, reason="no C++ compiler to emulate kernels with"
)

# Of an SM: registers, shared bytes, threads; and the shared bytes of one block without opting in.
LIMITS = {"sm_75": (65536, 65536, 1024), "sm_87": (65536, 167936, 1536), "sm_90": (65536, 233472, 2048)}
STATIC = 49152


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.ENVIRONMENT, "cpu")
    torch.set_num_threads(1)


# resources of the kernels ---------------------------------------------------------------------------
def test_no_kernel_spills_and_each_fits_as_often_as_it_says() -> None:
    """The table is of the current source. Launch bounds state how many blocks an SM holds (Turing: one)."""
    table = json.loads(resources.TABLE.read_text())["programs"]
    assert set(table) == {resources.label(*v) for v in resources.VARIANTS}
    for program, defines in resources.VARIANTS:
        row = table[resources.label(program, defines)]
        assert row["source"] == resources.digest(program, defines), "run tests/emulators/cuda/resources.py"
        for arch, (registers, shared, threads) in LIMITS.items():
            for name, used in row[arch].items():
                blocks = used["blocks"] if arch != "sm_75" else 1
                assert used["spilled"] == 0, (program, defines, arch, name)
                assert used["shared"] <= STATIC and used["shared"] * blocks <= shared
                # the hardware allocates multiples of eight
                granted = -(-used["registers"] // 8) * 8 * used["threads"]
                assert granted * blocks <= registers and used["threads"] * blocks <= threads


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["sm_87", "sm_90"])
def test_the_matvec_compiles_here_without_spills(arch: str) -> None:
    for name, used in resources.compiled("matvec", {"BITS": 4, "GROUP": 128}, arch).items():
        assert used["spilled"] == 0 and used["registers"] <= 128, name


def some_nvrtc() -> ctypes.CDLL | None:
    for version in ("13", "12"):
        try:
            return nvrtc.find_nvrtc(version)
        except (BackendError, OSError):
            continue
    return None


@pytest.fixture
def library() -> ctypes.CDLL:
    found = some_nvrtc()
    if found is None:
        pytest.skip("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")
    return found


@pytest.mark.parametrize("arch", ["sm_75", "sm_87", "sm_90"])
def test_nvrtc_compiles_every_program_without_a_toolkits_headers(
    library: ctypes.CDLL, arch: str, tmp_path: Path
) -> None:
    seen = set()
    for program, defines in resources.VARIANTS:
        if program not in seen:
            code = nvrtc.Compiler(library, arch, tmp_path).cubin(program, defines)
            assert code[:4] == b"\x7fELF"
        seen.add(program)
    assert {f.name.split("-")[0] for f in tmp_path.iterdir()} == seen == set(PROGRAMS)


PROGRAMS = {f.stem for f in programs.FOLDER.glob("*.cu")}


def test_machine_code_is_cached_by_text_and_architecture(library: ctypes.CDLL, tmp_path: Path) -> None:
    compiler = nvrtc.Compiler(library, "sm_87", tmp_path)
    first = compiler.cubin("rows", {})
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"kept")
    assert compiler.cubin("rows", {}) == b"kept"
    assert nvrtc.Compiler(library, "sm_90", tmp_path).cubin("rows", {}) != b"kept"
    assert compiler.cubin("rows", {"UNUSED": 1}) not in (b"kept", b"") and first[:4] == b"\x7fELF"


def test_what_does_not_compile_is_one_line(library: ctypes.CDLL, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot compile bad for sm_90: .*error") as e:
        nvrtc.Compiler(library, "sm_90", tmp_path).compile("bad", b"__global__ void f() { x }")
    assert "\n" not in str(e.value)
    with pytest.raises(BackendError, match="cannot compile rows for sm_10"):
        nvrtc.Compiler(library, "sm_10", tmp_path).cubin("rows", {})


def test_a_missing_nvrtc_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="libnvrtc.so.4 is neither in|nvrtc64_40_0.dll is neither in"):
        nvrtc.find_nvrtc("4.2")


# the driver -----------------------------------------------------------------------------------------
class FakeCompiler:
    """A "cubin" that contains its program's name."""

    def cubin(self, program: str, defines: dict[str, int]) -> bytes:
        return json.dumps([program, defines]).encode()


class FakeDriver:
    """A libcuda whose device is the emulator. It has only what it was passed."""

    def __init__(self) -> None:
        self.modules, self.names = [b""], [""]
        self.refuse: list[int] = []  # the statuses of the next launches
        self.contexts = 0

        # A C function with the driver's signature, so that ctypes' conversion of arguments is tested too.
        form = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
        self.cuLaunchKernel = form(self.start)

    def start(self, function: int, x: int, y: int, z: int, *rest: Any) -> int:
        (bx, by, bz, shared, stream, parameters, extra) = rest
        if self.refuse:
            return self.refuse.pop(0)
        if (by, bz, shared, stream, extra) != (1, 1, 0, 77, None):
            return 1
        program, defines = json.loads(self.modules[function // 100])
        run = getattr(emulate.build(program, defines), f"run_{self.names[function % 100]}")
        three, error = ctypes.c_uint * 3, ctypes.create_string_buffer(256)
        return int(run(ctypes.c_void_p(parameters), three(x, y, z), three(bx, by, bz), 0, error))

    def cuCtxGetCurrent(self, out: Any) -> int:
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.contexts += 1
        return 0

    def cuModuleLoadData(self, out: Any, code: bytes) -> int:
        self.modules.append(code)
        out._obj.value = len(self.modules) - 1
        return 0

    def cuModuleGetFunction(self, out: Any, module: Any, name: bytes) -> int:
        self.names.append(name.decode())
        out._obj.value = module.value * 100 + len(self.names) - 1
        return 0

    def cuGetErrorString(self, status: int, out: Any) -> int:
        out._obj.value = b"an illegal memory access was encountered"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> nvrtc.Driver:
    class Stream:
        cuda_stream = 77

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return nvrtc.Driver(FakeCompiler(), FakeDriver())  # type: ignore[arg-type]


@needs_compiler
def test_the_driver_gets_each_kernel_with_its_grid_and_arguments(driver: nvrtc.Driver) -> None:
    config = models.config_of("llama", intermediate_size=256)
    results = []
    for launcher in (emulate.Emulator(), driver):
        backend = CudaBackend(dtype=torch.float16, kernels=kernels.Kernels(launcher, CPU, 8))
        results.append(models.whole(models.decoder(config, backend, "int4", 64), [5, 80, 13]))
    np.testing.assert_array_equal(*results)
    loaded = len(driver.cuda.modules) - 1  # type: ignore[attr-defined]
    assert loaded == len({(p, d, k) for p, d, k in driver.functions})


@needs_compiler
def test_a_new_thread_gets_the_context_and_errors_are_one_line(driver: nvrtc.Driver) -> None:
    on, fake = kernels.Kernels(driver, CPU, 8), driver.cuda
    x = torch.ones(2, 32, dtype=torch.float16)
    fake.refuse = [nvrtc.INVALID_CONTEXT]
    assert torch.isfinite(on.glu(x, "silu")).all() and fake.contexts == 1
    fake.refuse = [700]
    with pytest.raises(BackendError, match=r"glu_rows: an illegal memory access.*\(CUDA error 700\)"):
        on.glu(x, "silu")


# on a GPU, and without -------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_this_gpu_every_architecture_agrees_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import measure

    monkeypatch.delenv(devices.ENVIRONMENT)
    assert max(measure.correct(CudaBackend, dry=False).values()) <= 1


def test_the_measuring_script_goes_through_on_cpu_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything except what needs a GPU, which it names. Its figures are marked as meaningless."""
    import measure

    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["measure.py", "--dry", "--out", str(out)])
    monkeypatch.setattr(measure, "ROUNDS", 1)
    measure.main()
    report, table = json.loads(out.read_text()), capsys.readouterr().out
    tiny = report["shapes"]["tiny"]
    assert "no measurement" in table and "| tiny |" in table and report["dry"]
    assert set(tiny["matvec"]["missing"]) == {"torch int4", "triton awq"}
    assert tiny["decode"]["tok_s"] > 0 and tiny["decode"]["graph_launches_per_token"] == 0
    # every int4 weight of the tiny shape with scale and bias in float32, and the tied int8 head
    c, f, layers = 256, 512, 4
    codes = layers * (c * (c + 256) + c * c + 3 * c * f)
    assert tiny["decode"]["bytes_per_token"] == codes * 4.5 / 8 + 1024 * c * 8.5 / 8


def test_kernels_that_cannot_be_had_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.warns(UserWarning, match="sm_61 is older than sm_75.*using torch"):
        assert backend._own_kernels() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))

    def missing(version: str | None) -> None:
        raise BackendError("libnvrtc.so.12 is missing", where="cuda backend")

    monkeypatch.setattr(nvrtc, "find_nvrtc", missing)
    with pytest.warns(UserWarning, match="libnvrtc.so.12 is missing.*using torch"):
        assert backend._own_kernels() is None
    assert weights.UNIT == 128
