"""`doctor` agrees with other programs, survives broken libraries and settings, and reports nothing private."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkout import ROOT
from counting import Clock

from tinychat_mlx.apps.doctor import devices, machine, probe, report, software, speed
from tinychat_mlx.apps.doctor.examine import examine
from tinychat_mlx.apps.doctor.finding import BROKEN, Finding, Section, problems
from tinychat_mlx.backends.cpu import cores, native_abi
from tinychat_mlx.backends.cpu import probe as cpu_probe
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.backends.cpu.memory import address, raw
from tinychat_mlx.base.errors import pip_install

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's own tools")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="asks POSIX tools")


def environment(home: Path, *paths: Path, **more: str) -> dict[str, str]:
    """The environment of a user who has only `home`; modules in `paths` come first."""
    ours = ("TINYCHAT_", "HF_", "XDG_", "NO_COLOR", "TRANSFORMERS_", "OMP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    python = os.pathsep.join(map(str, [*paths, ROOT]))
    return kept | {"PYTHONPATH": python, "HOME": str(home), "USERPROFILE": str(home)} | more


def doctor(*args: str, env: dict[str, str], prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "tinychat_mlx", "doctor", *args]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", check=False, env=env, timeout=600
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def said(*args: str, env: dict[str, str], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    done = doctor("--json", "--quick", *args, env=env, prefix=prefix)
    assert done.returncode in (0, 1) and done.stderr == "", done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ok"] == (done.returncode == 0)
    return found


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}  # nproc obeys these
    return subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with files in every cache."""
    home = tmp_path_factory.mktemp("home")
    sizes = {
        ".cache/huggingface/hub/models--a--b/blobs/1": 3000,
        ".cache/tinychat-mlx/prefixes/x": 500,
        ".cache/tinychat-mlx/cuda/k.cubin": 70,
        ".local/share/tinychat-mlx/sessions/1.jsonl": 11,
        ".local/share/tinychat-mlx/models/a--b-int4/w": 900,
    }
    for name, nbytes in sizes.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"x" * nbytes)
    link = home / ".cache/huggingface/hub/models--a--b/snapshots/c"
    link.mkdir(parents=True)
    if sys.platform != "win32":
        (link / "model.safetensors").symlink_to(home / ".cache/huggingface/hub/models--a--b/blobs/1")
    return home


@pytest.fixture(scope="module")
def told(home: Path) -> dict[str, Any]:
    """Run doctor with measurements. Returns its JSON."""
    done = doctor("--json", env=environment(home))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# agreement with other programs -------------------------------------------------------------------------
@LINUX
def test_processor_and_cores_are_lscpus(told: dict[str, Any]) -> None:
    rows = [r.split(",") for r in output("lscpu", "-p=CPU,CORE,SOCKET").splitlines() if not r.startswith("#")]
    nproc = ("env", "-u", "OMP_NUM_THREADS", "-u", "OMP_THREAD_LIMIT", "nproc")  # nproc obeys these variables
    assert told["threads"]["logical_cpus"] == int(output(*nproc, "--all"))
    assert told["threads"]["usable_cpus"] == int(output(*nproc))
    assert told["threads"]["physical_cores"] == len({(core, socket) for _, core, socket in rows})
    model = re.search(r"^Model name:\s*(.+)$", output("lscpu"), re.MULTILINE)
    if platform.machine() == "x86_64" and model:
        assert told["machine"]["processor"] == model[1]
    assert output("uname", "-r").strip() in told["machine"]["system"]


@LINUX
def test_memory_is_the_kernels(told: dict[str, Any]) -> None:
    found = {k: int(v.split()[0]) * 1024 for k, v in
             (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())}  # fmt: skip
    assert told["memory"]["total_bytes"] == found["MemTotal"]
    assert told["memory"]["swap_bytes"] == found["SwapTotal"]
    if told["memory"]["limit_bytes"] is None:  # other programs change it meanwhile: a tenth of the total
        assert abs(told["memory"]["free_bytes"] - found["MemAvailable"]) < found["MemTotal"] / 10


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="reads x86 flags")
def test_instruction_sets_are_the_processors(told: dict[str, Any]) -> None:
    flags = set(re.search(r"^flags\s*:(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    sets = told["native"]["instruction_sets"]
    assert ("avx2" in sets) == ({"avx2", "fma"} <= flags)
    assert ("avxvnni" in sets) == ("avx_vnni" in flags)
    assert ("avx512vnni" in sets) == ("avx512_vnni" in flags and "avx512vl" in flags)
    assert sets[-1] == "scalar" and told["native"]["used"] == sets[0]


def test_library_versions_are_pips(told: dict[str, Any]) -> None:
    libraries = told["software"]["libraries"]
    assert {"numpy", "tokenizers", "click", "torch", "mlx"} <= set(libraries)
    for name, version in libraries.items():
        try:
            assert version == metadata.version(name)
        except metadata.PackageNotFoundError:
            assert version is None


@POSIX
def test_cache_sizes_are_finds(told: dict[str, Any], home: Path) -> None:
    if sys.platform == "darwin":
        pytest.skip("these are Linux folders")
    there = [key for key, row in told["disk"].items() if isinstance(row, dict) and row["exists"]]
    assert {"models", "conversions", "prefixes", "cubins", "sessions"} <= set(there)
    for key in there:
        row = told["disk"][key]
        sizes = output("find", row["path"], "-type", "f", "-printf", r"%s\n").split()
        assert row["bytes"] == sum(map(int, sizes)) > 0, key
        assert row["delete"]
    assert not told["disk"]["winners"]["exists"]
    free = int(output("df", "-B1", "--output=avail", str(home)).split()[-1])
    assert abs(told["disk"]["free_bytes"] - free) < 2e9


def test_the_speed_of_memory_is_bytes_read_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe looks at every byte, and divides their number by the time of its own clock."""
    engine, total = CpuBackend(threads=1).engine, 3 << 20
    data, sink = raw(total, huge=True), np.zeros(1, np.float32)
    for at in (0, 1, 1 << 19, (1 << 20) - 1, 1 << 20, (2 << 20) + 4097, total - 1):
        data[:], sink[:] = 0, 0
        data[at] = 1
        engine.run_one(native_abi.ProbeOp(native_abi.PROBE, 1, address(data), total, 0, None, address(sink)))
        assert sink[0] == 1, at
    monkeypatch.setattr(cpu_probe, "_READ", total)
    monkeypatch.setattr(cpu_probe, "time", SimpleNamespace(perf_counter=Clock(0.25)))
    assert cpu_probe.read_bandwidth(engine) == total / 0.25


def test_speed_is_measured_and_what_follows_from_it_computed(told: dict[str, Any]) -> None:
    if told["backends"]["chosen"]["name"] != "cpu":
        pytest.skip("another backend measures its own memory")
    measured = told["speed"]
    assert measured["read_bytes_s"] > 0 and measured["int8_ops_s"] > 0
    row = next(r for r in measured["expected"] if r["model"] == "llama-3.2-1b")
    # 16 layers of 60.8 million weights at 4.125 bits, 128256 x 2048 of the head at 8.25
    nbytes = (16 * 60_817_408 * 4.125 + 128256 * 2048 * 8.25) / 8
    assert row["bytes_per_token"] == pytest.approx(nbytes, rel=1e-6)
    assert row["tok_s"] == pytest.approx(measured["read_bytes_s"] / nbytes, rel=1e-3)


def test_a_backend_is_expected_to_read_what_it_packs() -> None:
    """4.125 bits per weight in the cpu backend's tiles, 4.25 in a file's groups of 128."""
    from tinychat_mlx.awq.search.quantizer import round_to_nearest
    from tinychat_mlx.backends.cpu.backend import CpuBackend

    def rows(backend: str) -> dict[str, float]:
        found = speed._expected(backend, 1e9, None, 0)
        return {r["model"]: r["bytes_per_token"] for r in found.value}

    weights = 16 * 60_817_408
    n, k = 512, 2048
    made = round_to_nearest(np.random.default_rng(0).standard_normal((n, k), np.float32), 4, 128)
    tiles = CpuBackend(threads=1).pack(made.packed("w", None)).data.nbytes * 8 / (n * k)
    saved = (rows("mlx")["llama-3.2-1b"] - rows("cpu")["llama-3.2-1b"]) * 8 / weights
    assert tiles == pytest.approx(4.25 - saved, rel=1e-3)


def test_the_chosen_backend_is_the_one_that_chats(told: dict[str, Any], home: Path) -> None:
    chosen = told["backends"]["chosen"]["name"]
    assert told["backends"][chosen]["works"]
    command = [sys.executable, "-m", "tinychat_mlx", "run", "-v", "--max-tokens", "1", "hi"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment(home), stdin=subprocess.DEVNULL
    )
    device = told["backends"][chosen]["device"]
    assert device["name"] in done.stderr and device["detail"] in done.stderr
    assert told["model"]["model"]["name"] == "demo" and told["model"]["model"]["fits_context"] > 0


@LINUX
def test_limits_of_this_process_are_seen(tmp_path: Path) -> None:
    allowed = str(1 << 33)  # KiB * 1024
    limited = ("sh", "-c", f'ulimit -v {int(allowed) // 1024}; exec "$@"', "sh")
    found = said(env=environment(tmp_path), prefix=limited)
    if found["memory"]["total_bytes"] > int(allowed):
        assert found["memory"]["limit_bytes"] == int(allowed) > found["memory"]["free_bytes"]
        assert any(p["where"] == "memory.limit_bytes" and "ulimit -v" in p["do"] for p in found["problems"])
    if (os.cpu_count() or 1) > 1 and shutil.which("taskset"):
        cpu = str(min(os.sched_getaffinity(0)))
        found = said(env=environment(tmp_path), prefix=("taskset", "-c", cpu))
        assert (found["threads"]["threads"], found["threads"]["usable_cpus"]) == (1, 1)
        assert f"1 of {os.cpu_count()} CPUs" in found["threads"]["threads_why"]


@LINUX
@pytest.mark.parametrize(("n", "allowed"), [(2, 1.0), (2, 2.0), (1, 1.0), (4, 2.5)])
def test_threads_and_a_containers_quota_do_not_contradict(
    n: int, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TINYCHAT_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "default_threads", lambda: n)
    monkeypatch.setattr(machine.limits, "cpu_quota", lambda: allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    found = {f.key: f for f in machine.threads().findings}
    assert ("this slows them down" in found["threads"].line) == (n > allowed) == bool(found["threads"].do)
    share = "1 CPU's time" if allowed == 1 else f"{allowed:g} CPUs' time"
    assert share in found["cpu_quota"].line and share in found["threads"].line


ARM_CPUINFO = (
    "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: {}\nCPU architecture: 8\nCPU part\t: {}\n"
)


@LINUX
def test_arm_cores_are_named_as_lscpu_names_them(tmp_path: Path) -> None:
    """lscpu can read a machine from a folder: one folder per core in our table."""
    cpu = tmp_path / "sys/devices/system/cpu"
    for name, text in (("online", "0"), ("possible", "0"), ("cpu0/topology/thread_siblings", "1")):
        (cpu / name).parent.mkdir(parents=True, exist_ok=True)
        (cpu / name).write_text(text)
    (tmp_path / "proc").mkdir()
    known = 0
    for core, name in cores.ARM_CORES.items():
        (tmp_path / "proc/cpuinfo").write_text(ARM_CPUINFO.format(*core.split()))
        said = re.search(r"^Model name:\s*(.+)$", output("lscpu", "-s", str(tmp_path)), re.MULTILINE)
        if said and said[1] != "-":  # this lscpu knows it
            assert said[1] == name, core
            known += 1
    assert known > 20


@pytest.mark.parametrize(
    ("cpuinfo", "arch", "name"),
    [
        (ARM_CPUINFO.format("0x41", "0xd0b") + ARM_CPUINFO.format("0x41", "0xd05") * 2, "aarch64", "Cortex-A76 and Cortex-A55"),
        (ARM_CPUINFO.format("0x99", "0x001"), "aarch64", "Arm processor (implementer, part: 0x99 0x001)"),
        ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "x86_64", "AMD EPYC"),
        ("vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "aarch64", "an Arm processor, emulated on AMD EPYC"),
    ],
    ids=["two kinds", "unknown", "a PC", "qemu"],
)  # fmt: skip
def test_a_processor_is_called_what_cpuinfo_tells(
    cpuinfo: str, arch: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(cores, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cores, "_BOARD", tmp_path / "absent")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: arch)
    assert cores.processor_name.__wrapped__() == name


# broken environments -----------------------------------------------------------------------------------
STUBS = {
    "raises": ("raise RuntimeError('half installed')", "half installed"),
    "aborts": ("import os; os.abort()", "signal 6" if sys.platform != "win32" else "exit code"),
    "exits": ("import sys; sys.exit(3)", "exit code 3"),
    "is damaged": ("import no_such_library_at_all", "no_such_library_at_all"),
}


MLX, TORCH = ("mlx", "mlx/core.py"), ("cuda", "torch/__init__.py")


@pytest.mark.parametrize(
    ("how", "backend", "module"),
    [("raises", *MLX), ("aborts", *MLX), ("raises", *TORCH), ("exits", *TORCH), ("is damaged", *TORCH)],
)
def test_a_library_that_crashes_is_a_line(how: str, backend: str, module: str, tmp_path: Path) -> None:
    code, word = STUBS[how]
    (tmp_path / module).parent.mkdir()
    (tmp_path / module).parent.joinpath("__init__.py").write_text("")
    (tmp_path / module).write_text(code)
    env = environment(tmp_path, tmp_path, TINYCHAT_CUDA_DEVICE="cpu")
    found = said("--backend", "cpu", env=env)
    row = found["backends"][backend]
    assert found["ok"] and not row["works"] and word in row["error"], row
    if how == "raises":
        broken = said("--backend", backend, env=env)
        assert not broken["ok"] and broken["problems"][0]["where"] == f"backends.{backend}"


def test_doctor_imports_no_heavy_library_itself(tmp_path: Path) -> None:
    code = (
        "import sys; from tinychat_mlx.apps.cli import main; main(['doctor', '--quick', '--backend', 'cpu']);"
        "print(sorted({'torch', 'mlx.core', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(tmp_path)
    )
    assert done.stdout.endswith("[]\n")


def test_what_a_backend_lacks_comes_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYCHAT_CUDA_DEVICE", raising=False)
    there = devices.find_spec
    monkeypatch.setattr(devices, "find_spec", lambda n: None if n in ("mlx", "torch") else there(n))
    monkeypatch.setattr(devices, "has_nvidia", lambda: True)
    assert pip_install("cuda") in devices.lacks("cuda")[1]  # type: ignore[index]
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert "pip install" in devices.lacks("mlx")[1]  # type: ignore[index]
    monkeypatch.setattr(devices, "has_nvidia", lambda: False)
    assert "NVIDIA" in devices.lacks("cuda")[0]  # type: ignore[index]
    assert devices.lacks("cpu") is None


def test_cuda_tells_the_driver_and_why_it_does_without_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU without NVRTC, simulated with torch's CPU tensors."""
    torch = pytest.importorskip("torch")
    from tinychat_mlx.backends.cuda import backend as cuda
    from tinychat_mlx.backends.cuda import nvrtc

    def no_nvrtc(version: str | None) -> None:
        raise OSError("libnvrtc.so.12 is not found")

    def start(self: Any, exact: bool = False, threads: int | None = None) -> None:
        cuda.TorchBackend.__init__(self, torch.device("cpu"), torch.float32, False)
        self.kernels = self._own_kernels()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))
    monkeypatch.setattr(nvrtc, "find_nvrtc", no_nvrtc)
    monkeypatch.setattr(cuda.CudaBackend, "__init__", start)
    answer = probe.ask("cuda", False)
    assert len(answer["remarks"]) == 1 and "libnvrtc.so.12 is not found" in answer["remarks"][0]

    (tmp_path / "version").write_text("580.65.06\n")
    monkeypatch.setattr(devices, "has_nvidia", lambda: True)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setenv("TINYCHAT_CUDA_KERNELS", "0")
    found = devices.Backends("cpu", False)
    found.answers = {"cuda": answer}
    told = found._backend("cuda")
    assert told.value["driver"] == "580.65.06" and "NVIDIA driver 580.65.06" in told.line
    assert "using torch" in told.line and "TINYCHAT_CUDA_KERNELS=0 selects" in told.line
    found.answers = {"cuda": {"error": "the NVIDIA driver is too old for torch 2.9"}}
    assert "580.65.06" in found._backend("cuda").line
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "absent")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if sys.platform != "win32":
        assert devices._driver("cuda") == {"driver": "570.1"}
    monkeypatch.setenv("PATH", "")
    assert devices._driver("cuda") == devices._driver("cpu") == {}


@pytest.mark.parametrize(
    ("variable", "value", "where"),
    [
        ("TINYCHAT_CPU_ISA", "sve9", "native.used"),
        ("TINYCHAT_THREADS", "many", "threads.threads"),
        ("TINYCHAT_BACKEND", "gpu", "backends.chosen"),
    ],
)
def test_what_keeps_the_backend_from_running_is_exit_code_1(
    variable: str, value: str, where: str, tmp_path: Path
) -> None:
    done = doctor("--quick", env=environment(tmp_path, **{variable: value}))
    assert done.returncode == 1 and "cannot run" in done.stdout.splitlines()[-1]
    found = said(env=environment(tmp_path, **{variable: value}))
    row = next(p for p in found["problems"] if p["where"] == where)
    assert row["state"] == "broken" and row["do"]


def test_a_damaged_config_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("temperature = 'hot'\n")
    found = said(env=environment(tmp_path, TINYCHAT_CONFIG=str(tmp_path / "c.toml")))
    row = next(p for p in found["problems"] if p["where"] == "configuration.file")
    assert not found["ok"] and "temperature" in row["what"] and row["do"]


# libraries ---------------------------------------------------------------------------------------------
def distribution(folder: Path, name: str, version: str, *files: str) -> None:
    """Create an installed distribution with pip's layout."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{f},,\n" for f in files))


def test_who_owns_our_files_and_what_is_there_twice(tmp_path: Path) -> None:
    distribution(tmp_path / "a", "torch", "1.0", "torch/__init__.py")
    distribution(tmp_path / "b", "torch", "2.0", "torch/__init__.py")
    distribution(tmp_path / "a", "numpy", "1.0", "numpy/__init__.py")  # a leftover record
    distribution(tmp_path / "a", "numpy", "9.0", "numpy/__init__.py")
    distribution(tmp_path / "a", "tinychat_fork", "3.0", "tinychat_mlx/__init__.py")
    distribution(tmp_path / "a", "autoawq", "0.2.9", "awq/__init__.py")
    distribution(tmp_path / "a", "mlx", "0.10.0", "mlx/core.so")
    found = said("--backend", "cpu", env=environment(tmp_path, tmp_path / "a", tmp_path / "b"))
    rows = {p["where"]: p for p in found["problems"]}
    assert rows["software.claim_tinychat-fork"]["state"] == "broken"
    assert "1.0" in rows["software.twice_torch"]["what"] and "2.0" in rows["software.twice_torch"]["what"]
    assert (
        "3 times" in rows["software.twice_numpy"]["what"] and "9.0 in" in rows["software.twice_numpy"]["what"]
    )
    assert "0.10.0" in rows["software.mlx"]["what"] and "0.32" in rows["software.mlx"]["do"]
    assert {"torch", "tinychat-fork"} <= set(found["software"]["conflicts"])
    assert found["software"]["awq_owner"] == "autoawq" and "software.awq_owner" not in rows


def test_a_missing_or_old_library_is_told_before_anything_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        software, "version_of", lambda name: {"tokenizers": None, "numpy": "1.9"}.get(name, "99")
    )
    sections, ok = examine(None, measure=False)
    rows = {p["where"]: p["do"] for p in problems(sections)}
    assert not ok and [s.key for s in sections] == ["software"]
    assert "pip install -U 'tokenizers>=" in rows["software.tokenizers"] and "numpy" in rows["software.numpy"]


def test_what_is_asked_for_is_pyprojects() -> None:
    asked = [re.split(r"[^\w-]", r)[0] for r in software.requirements()]
    assert {"numpy", "tokenizers", "jinja2", "huggingface-hub", "click", "psutil", "mlx"} <= set(asked)
    assert "torch" not in asked and len(asked) == len(set(asked)) >= 12


# settings ----------------------------------------------------------------------------------------------
def test_a_variable_nobody_knows_is_told(tmp_path: Path) -> None:
    found = said(env=environment(tmp_path, TINYCHAT_THREAD="4", TINYCHAT_SEED="7", TINYCHAT_SYSTEM="be rude"))
    row = next(p for p in found["problems"] if p["where"] == "configuration.unknown_variables")
    assert "TINYCHAT_THREAD" in row["what"] and "TINYCHAT_THREADS" in row["do"]
    assert found["configuration"]["environment"]["TINYCHAT_SEED"] == "7"
    assert found["configuration"]["environment"]["TINYCHAT_SYSTEM"] is None


# the report --------------------------------------------------------------------------------------------
def test_a_report_holds_nothing_private(tmp_path: Path) -> None:
    """A user with a name, tokens, prompts and folders in every place that doctor reads."""
    home = tmp_path / "homes" / "zaphodb"
    model = tmp_path / "secretproject" / "secretmodel"
    data = tmp_path / "secretdata"
    for folder in (home / "secretfolder", model, data / "sessions"):
        folder.mkdir(parents=True)
    (data / "sessions" / "1.jsonl").write_text('{"text": "secretprompt"}')
    (model / "config.json").write_text('{"model_type": "secretkind"}')
    config = home / "secretfolder" / "config.toml"
    config.write_text('system = "secretprompt"\nmodel = "secretorg/secretname"\nmin_p = 99\n')
    distribution(tmp_path / "secretlibs", "torch", "1.0", "torch/__init__.py")
    env = environment(
        home, tmp_path / "secretlibs", USER="zaphodb", LOGNAME="zaphodb", USERNAME="zaphodb",
        TINYCHAT_SYSTEM="secretprompt", TINYCHAT_MODEL=str(model), TINYCHAT_DATA=str(data),
        TINYCHAT_CONFIG=str(config), TINYCHAT_CACHE=str(tmp_path / "secretcache"), TINYCHAT_SECRETNAME="secretvalue",
        HF_TOKEN="hf_secrettoken", HF_HOME=str(tmp_path / "secrethub"), AWS_ACCESS_KEY_ID="secretkey",
        TINYCHAT_PRESET="secretpreset", TINYCHAT_STOP="secretstop",
    )  # fmt: skip
    done = doctor("--quick", "--report", "-", env=env)
    text = done.stdout
    assert "secret" not in text.lower() and "zaphodb" not in text and str(tmp_path) not in text, text
    host = platform.node().partition(".")[0]
    assert host in ("", "localhost") or not re.search(rf"\b{re.escape(host)}\b", text)
    assert "numpy" in text and "TINYCHAT_SYSTEM" in text and "PATH" not in text
    for model_name in ("secretorg/secretname", "nobody/secret"):  # on the hub
        env["TINYCHAT_MODEL"] = model_name
        assert "secret" not in doctor("--quick", "--report", "-", env=env).stdout.lower()


def test_a_report_of_a_checkout_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    commit = output("git", "-C", str(ROOT), "rev-parse", "HEAD")[:12]
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no").strip()
    text = doctor("--quick", "--report", "-", env=environment(tmp_path)).stdout
    assert f"(checkout of {commit}{'-dirty' if changed else ''})" in text
    assert software._commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software._commit(ROOT) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/home/pat/.cache/tinychat-mlx/weights", "~/.cache/tinychat-mlx/weights"),
        ("cannot read '/home/pat/thesis/model': bad", "cannot read '…/model': bad"),
        ("/srv/acme/x.so does not load", "…/x.so does not load"),
        ("/proc/meminfo and /sys/fs/cgroup", "/proc/meminfo and /sys/fs/cgroup"),
        ("pat on pats-mac, compat", "… on …, compat"),
        ("/home/patricia/a", "…/a"),
        ("GNU/Linux, 3 tokens/s", "GNU/Linux, 3 tokens/s"),
        (r"C:\Users\pat\models\x.dll", "…/x.dll"),
    ],
)
def test_paths_and_names_are_scrubbed(text: str, wanted: str) -> None:
    assert report.scrub(text, Path("/home/pat"), ["pats-mac", "pat"]) == wanted


def test_a_report_is_written_once_and_complete(tmp_path: Path) -> None:
    env, target = environment(tmp_path), tmp_path / "r.md"
    done = doctor("--quick", "--report", str(target), env=env)
    assert done.returncode == 0 and done.stdout == "" and str(target) in done.stderr
    text = target.read_text(encoding="utf-8")
    assert text.startswith("### tinychat doctor\n") and "**Backends**" in text
    again = doctor("--quick", "--report", str(target), env=env)
    assert again.returncode == 2 and "exists" in again.stderr and target.read_text(encoding="utf-8") == text
    nowhere = doctor("--quick", "--report", str(tmp_path / "no" / "r.md"), env=env)
    assert nowhere.returncode == 2 and len(nowhere.stderr.splitlines()) == 1
    assert doctor("--json", "--report", "-", env=env).returncode == 2


def test_plain_terminals_get_plain_marks(tmp_path: Path) -> None:
    shown = doctor("--quick", env=environment(tmp_path, NO_COLOR="1")).stdout
    assert "\n  + " in shown and "✓" not in shown and "\x1b" not in shown
    assert "\n  ✓ " in doctor("--quick", env=environment(tmp_path, PYTHONUTF8="1")).stdout


def test_each_section_and_key_is_in_the_docstring(told: dict[str, Any]) -> None:
    from tinychat_mlx.apps import doctor as module

    for section, rows in told.items():
        assert re.search(rf"^    {section}\b", module.__doc__ or "", re.MULTILINE), section
        for key in rows if isinstance(rows, dict) else ():
            if section == "software" and key in rows["libraries"]:
                continue
            assert key in (module.__doc__ or ""), f"{section}.{key}"


def test_problems_come_with_the_broken_ones_first() -> None:
    rows = (Finding("a", 1, "x", "note", "do"), Finding("b", 2, "y", BROKEN, "do"), Finding("c", 3))
    assert [p["where"] for p in problems([Section("s", "S", rows)])] == ["s.b", "s.a"]
