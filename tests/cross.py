"""make cross: compile and link the native library for the systems that this machine is not.

zig's wheel brings a compiler, the headers and the system libraries of macOS and Windows, and CMakeLists.txt is used as
it is. zig has its own spelling of -march, and it would first compile the C++ runtime, and for Windows the C runtime's
start files, for each target (two minutes of CPU time each). So this file is also the compiler that CMake calls: it
translates the flags, and links against a stub of these. Any other symbol that no system library defines is an error.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cross"


class Target(NamedTuple):
    name: str
    triple: str
    system: str  # as CMake names it
    processor: str
    magic: tuple[int, int]  # of the library: the format's own, and the machine's


MACHO_64, PE = 0xFEEDFACF, 0x00004550
TARGETS = (
    Target("macOS arm64", "aarch64-macos.11.0", "Darwin", "arm64", (MACHO_64, 0x0100000C)),
    Target("Windows x86-64", "x86_64-windows-gnu", "Windows", "AMD64", (PE, 0x8664)),
    Target("Windows arm64", "aarch64-windows-gnu", "Windows", "ARM64", (PE, 0xAA64)),
)
# Mangled names of namespace std, what the compiler calls in the C++ runtime, and the start files of Windows' C runtime.
RUNTIME = re.compile(
    r"_?(_Z(N[VK]*St|St|T[VISC]N?St|TVN10__cxxabiv1|n[wa]|d[la])\w*|__cxa_\w+|__gxx_personality_\w+"
    r"|__main|_tls_index|_tls_used|_Unwind_Resume)"
)
MINGW = {"ldexpf"}  # inline or static in every C runtime of Windows, so its library does not export it
UNDEFINED = re.compile(r"undefined symbol: (\S+)")
COFF = struct.Struct("<HHIIIHH")  # machine, sections, time, begin of the symbols, their number, …


def zig() -> str:
    """The compiler of the wheel."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise SystemExit("cross: zig is not installed: run make cross")
    return str(next(p for p in Path(spec.origin).parent.glob("zig*") if p.stem == "zig" and p.is_file()))


# the compiler that CMake calls ------------------------------------------------------------------------
def compiler(arguments: list[str]) -> int:
    """zig c++ with these arguments; a program or library gets a stub of the C++ runtime."""
    command = [zig(), "c++", "-O1", *(translated(a) for a in arguments)]
    if {"-c", "-E", "-S"} & set(arguments):
        return subprocess.run(command, check=False).returncode
    if any("windows" in a for a in arguments):
        return windows_link(command, arguments)
    command.append("-nostdlib++")
    first = subprocess.run(command, check=False, capture_output=True, text=True)
    missing = sorted(set(UNDEFINED.findall(first.stderr)))
    if first.returncode and missing and all(RUNTIME.fullmatch(name) for name in missing):
        return with_stub(command, missing)
    sys.stderr.write(first.stderr)
    return first.returncode


def windows_link(command: list[str], arguments: list[str]) -> int:
    """Link with the import libraries of Windows. lld prints demangled names, so the objects are asked first."""
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(a) for a in arguments if a.endswith((".obj", ".o"))]
        if not objects:  # CMake's first test gives a source file
            objects = [Path(folder) / "source.obj"]
            source = next(a for a in arguments if a.endswith((".cpp", ".cxx")))
            subprocess.run(
                [*command[:2], "-target", arguments[1], "-c", source, "-o", str(objects[0])], check=True
            )
        defined, undefined = set[str](), set[str]()
        for path in objects:
            for name, is_defined in coff_symbols(path.read_bytes()):
                (defined if is_defined else undefined).add(name)
        entry = "_DllMainCRTStartup" if "-shared" in command else "wWinMainCRTStartup"
        missing = sorted(name for name in undefined - defined if RUNTIME.fullmatch(name) or name in MINGW)
        return with_stub([*command, "-nostdlib", "-lkernel32", "-lucrtbase"], [*missing, entry])


def coff_symbols(data: bytes) -> Iterator[tuple[str, bool]]:
    """Each external symbol of a COFF object, and whether it is defined there."""
    _, _, _, begin, count, _, _ = COFF.unpack_from(data)
    strings, i = begin + 18 * count, 0
    while i < count:
        at = begin + 18 * i
        short, section, kind, more = struct.unpack_from("<8sxxxxhxxBB", data, at)
        if short[:4] == bytes(4):
            start = strings + int.from_bytes(short[4:], "little")
            short = data[start : data.index(0, start)]
        if kind == 2:  # IMAGE_SYM_CLASS_EXTERNAL
            yield short.rstrip(b"\0").decode(), section != 0
        i += 1 + more


def with_stub(command: list[str], names: list[str]) -> int:
    """Link with an object that defines these names. Nothing here is ever run."""
    with tempfile.TemporaryDirectory() as folder:
        stub = Path(folder) / "runtime.s"
        stub.write_text("".join(f".globl {name}\n{name}:\n" for name in dict.fromkeys(names)))
        return subprocess.run([*command, str(stub)], check=False).returncode


def translated(flag: str) -> str:
    """A flag in zig's words: -march=armv8.2-a+dotprod has others, and there are no bundles, only shared libraries.

    -O1 takes half of the time of -O3.
    """
    same = {"-bundle": "-dynamiclib", "-O3": "-O1"}
    found = re.fullmatch(r"-march=armv(\d)(?:\.(\d))?-a((?:\+\w+)*)", flag)
    if found is None:
        return same.get(flag, flag)
    major, minor, features = found.groups()
    return f"-mcpu=generic+v{major}{f'_{minor}' if minor else ''}a{features}"


# all targets --------------------------------------------------------------------------------------------
def build(target: Target) -> None:
    """Configure and build with CMake, then look at the library. Raises SystemExit."""
    folder = BUILD / target.triple
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    call = ";".join([sys.executable, str(Path(__file__).resolve()), "c++", "-target", target.triple])
    toolchain = folder / "toolchain.cmake"
    toolchain.write_text(
        f"set(CMAKE_SYSTEM_NAME {target.system})\n"
        f"set(CMAKE_SYSTEM_PROCESSOR {target.processor})\n"
        f'set(CMAKE_CXX_COMPILER "{call}")\n'
        'set(CMAKE_CXX_STANDARD_LIBRARIES "" CACHE STRING "")\n'  # `compiler` names them
        'set(CMAKE_HAVE_LIBC_PTHREAD TRUE CACHE BOOL "")\n'  # a check less; std::thread is in the C++ runtime
        "set(CMAKE_RC_COMPILER ${CMAKE_COMMAND})\n"  # CMake looks for these two; the library needs neither
        "set(CMAKE_INSTALL_NAME_TOOL ${CMAKE_COMMAND})\n"
    )
    native = ROOT / "backends" / "cpu"
    run(["cmake", "-G", "Ninja", "-S", str(native), "-B", str(folder), f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
         "-DSKBUILD=ON"])  # fmt: skip  # as for a wheel: nothing is copied into the checkout
    run(["cmake", "--build", str(folder)])
    made = [p for p in folder.glob("tinychat_cpu.*") if p.suffix in (".dylib", ".dll")]
    if len(made) != 1 or magic(made[0].read_bytes()) != target.magic:
        raise SystemExit(f"cross: {target.name}: the build made {made or 'no library'}, of another system")


def run(command: list[str]) -> None:
    """Run it quietly; what it printed is shown if it fails. Raises SystemExit."""
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout)
        raise SystemExit(f"cross: {command[0]} failed with exit code {done.returncode}")


def magic(data: bytes) -> tuple[int, int]:
    """The format and the machine of a library."""
    first, second = struct.unpack_from("<II", data)
    if first == MACHO_64:
        return first, second
    (at,) = struct.unpack_from("<I", data, 0x3C)
    return struct.unpack_from("<IH", data, at)


def main() -> int:
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(BUILD / "zig-cache"))
    for target in TARGETS:
        start = time.monotonic()
        build(target)
        print(f"cross: {target.name}: compiled and linked in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(compiler(sys.argv[2:]) if sys.argv[1:2] == ["c++"] else main())
