"""An emulated Raspberry Pi: an Arm Python with the cross-built wheel, run by qemu-user.

    python tests/emulators/arm/lane.py cortex-a76 -m tinychat_mlx run "who are you?"       # cortex-a72: a Pi 4; -a76: a Pi 5

Needs Debian or a derivative with: apt install qemu-user g++-aarch64-linux-gnu mmdebstrap. All files are in
build/pi (300 MB) and made once. The wheel is updated on every start. There is no chroot and no binfmt, and
dpkg gets no second architecture: packages are unpacked, and none of their scripts runs.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WORK = ROOT / "build" / "pi"
BUILD = (
    ROOT / "build" / "py3-none-linux_aarch64"
)  # where scikit-build-core builds this wheel, and the programs
PI = {"neon": "cortex-a72", "neondot": "cortex-a76"}
ARM = PI | {"neoni8mm": "max"}  # the matrix instruction: Apple's M2, Graviton 3; no Raspberry Pi has it yet
TOOLS = {
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "mmdebstrap": "mmdebstrap",
    "gcc": "gcc",
}
SYSTEM = "libstdc++6,python3"
BUILDER = ["scikit-build-core>=1.0", "cmake>=3.19", "ninja"]
TESTS_NEED = ["pytest>=8"]


def missing(tools: tuple[str, ...] = tuple(TOOLS)) -> str:
    """Return what must be installed first; empty if nothing."""
    absent = [package for tool, package in TOOLS.items() if tool in tools and shutil.which(tool) is None]
    if absent:
        return f"an Arm is not emulated here: apt install {' '.join(absent)}"
    return "" if (ROOT / "backends/cpu/CMakeLists.txt").exists() else "these tests come without the source"


def run(*command: str | Path, **environment: str) -> str:
    """Run in the project's folder. Returns stdout and stderr; raises RuntimeError with their ends on failure."""
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    if done.returncode:
        shown = " ".join(map(str, command))
        raise RuntimeError(
            f"{shown} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Lane:
    """An Arm system in a folder. Its Python imports from `packages` first."""

    root: Path
    python: Path
    packages: tuple[Path, ...]

    def environment(self, *more: Path) -> dict[str, str]:
        home = WORK / "home"
        home.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TMPDIR")}
        return kept | {
            "PYTHONPATH": os.pathsep.join(map(str, (*more, *self.packages))),
            # bytecode comes from `compile_all`; a Pi has it since the installation
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONSAFEPATH": "1",  # no imports from the current folder
            "PYTHONHASHSEED": "0",
            "OPENBLAS_NUM_THREADS": "1",
            "HOME": str(home),
        }

    def command(self, cpu: str, *arguments: str | Path) -> list[str]:
        return ["qemu-aarch64", "-cpu", cpu, "-L", str(self.root), str(self.python), *map(str, arguments)]

    def run(self, cpu: str, *arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments on that processor, outside the checkout."""
        return subprocess.run(
            self.command(cpu, *arguments), capture_output=True, text=True, check=False,
            env=self.environment(), cwd=WORK, timeout=timeout,
        )  # fmt: skip


def make() -> Lane:
    """Update everything. Raises RuntimeError with the reason; further calls fail fast."""
    WORK.mkdir(parents=True, exist_ok=True)
    root = _system(WORK / "root")
    python = (root / "usr/bin/python3").resolve()
    version = python.name.removeprefix("python")
    wheel = build_wheel()
    site = _once(
        WORK / "site", [*_dependencies(), *TESTS_NEED], lambda new, what: _arm_wheels(new, what, version)
    )
    package = WORK / "package"
    shutil.rmtree(package, ignore_errors=True)
    with zipfile.ZipFile(wheel) as z:
        z.extractall(package)
    lane = Lane(root, python, (package, site))
    _compile_all(
        lane, [package, *([] if (site / "compiled").exists() else [site, root / f"usr/lib/{python.name}"])]
    )
    (site / "compiled").touch()
    return lane


def build_wheel() -> Path:
    """Build the project's wheel for Arm, and the programs of backends/cpu/bench in BUILD."""
    builder = _once(WORK / "builder", BUILDER, lambda new, what: _pip(new, *what))
    made = WORK / "wheel"
    shutil.rmtree(made, ignore_errors=True)
    call = "import sys, scikit_build_core.build as b; b.build_wheel(sys.argv[1], {'cmake.define.TINYCHAT_TOOLS': 'ON'})"
    environment = {
        "PYTHONPATH": str(builder),
        "PATH": f"{builder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CMAKE_TOOLCHAIN_FILE": str(ROOT / "tests/emulators/arm/aarch64.cmake"),
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",  # otherwise the wheel would be tagged for this machine
    }
    run(sys.executable, "-c", call, made, **environment)
    (wheel,) = made.glob("*-py3-none-linux_aarch64.whl")
    return wheel


def _system(root: Path) -> Path:
    """Unpack this machine's release for arm64, from apt's mirror."""
    if (root / "complete").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    known = [line.split() for line in run("apt-get", "indextargets", "--format", form).splitlines()]
    mirrors = [uri for uri, *rest in known if release and rest == [release[1], "main"]]
    if not release or not mirrors:
        raise RuntimeError("apt has no source of this release's `main`: this needs Debian or a derivative")
    source = f"deb {mirrors[0]} {release[1]} main"
    run(
        "mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64", f"--include={SYSTEM}",
        release[1], root, source,
    )  # fmt: skip
    (root / "complete").touch()
    return root


def _once(folder: Path, what: list[str], make: Callable[[Path, list[str]], None]) -> Path:
    """Make the folder again if it was made from something else or is incomplete."""
    note = folder / "made-of"
    if not note.exists() or note.read_text() != "\n".join(what):
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, what)
        note.write_text("\n".join(what))
    return folder


def _pip(target: Path, *arguments: str) -> None:
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", target, *arguments)


def _arm_wheels(target: Path, what: list[str], version: str) -> None:
    """Install binary wheels for the Arm Python. glibc 2.35 is older than that of any supported Debian."""
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 36))]
    tags = [f"--platform={p}" for p in platforms]
    _pip(target, *tags, f"--python-version={version}", "--only-binary=:all:", *what)


def _dependencies() -> list[str]:
    """Return the project's dependencies, without those of other systems and Python versions."""
    listed = re.search(
        r"^dependencies = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    assert listed
    return [d for d in ast.literal_eval(listed[1]) if ";" not in d]


def _compile_all(lane: Lane, folders: list[Path]) -> None:
    """Compile bytecode with this machine's Python if it has the same version.

    An emulated one is ten times slower.
    """
    same = f"python{sys.version_info.major}.{sys.version_info.minor}" == lane.python.name
    command = [sys.executable] if same else lane.command("max")
    subprocess.run([*command, "-m", "compileall", "-q", *map(str, folders)], check=False, capture_output=True)


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    here = make()
    os.execvpe("qemu-aarch64", here.command(sys.argv[1], *sys.argv[2:]), here.environment())
