"""Address-space check of generated Metal source with clang's front end.

The emulator drops `device`, `constant`, `threadgroup` and `thread`, and so accepts pointers that Metal
rejects. This check finds them. g++ has no address spaces.
"""

from __future__ import annotations

import re
import shutil
import subprocess

from metal.emulator import HERE, threadgroup_variables

CLANG = next((n for n in ("clang++", "clang++-19") if shutil.which(n)), None)


def errors(text: str) -> list[str]:
    """Return clang's error lines for the generated source of one kernel; empty if there are none."""
    assert CLANG is not None
    instance = r"\ntemplate \[\[host_name.*?(decltype\(\w+<[^;]*?>\)) ([^;]*);\n"
    text = re.sub(instance, r"\ntemplate \1 \2;\n", threadgroup_variables(text), flags=re.DOTALL)
    # An Arm target, because older clangs have no _Float16 for x86
    command = [CLANG, "--target=aarch64-linux-gnu", "-ffreestanding", "-std=c++17", "-fsyntax-only"]
    command += ["-Wno-unknown-attributes"]
    command += ["-include", str(HERE / "msl_check.h"), "-x", "c++", "-"]
    result = subprocess.run(command, check=False, input=text, text=True, capture_output=True)
    return [line for line in result.stderr.splitlines() if "error" in line]
