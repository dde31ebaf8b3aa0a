"""python tests/emulators/cuda/resources.py: what the kernels take on each GPU, by nvcc, into resources.json.

Run it after changing a kernel; tests/emulators/test_cuda_build.py checks that the table is of the present text.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tinychat_mlx.backends.cuda import programs

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = ("sm_75", "sm_87", "sm_90")
# The variants that models use most, and those with the largest use of a resource.
VARIANTS: list[tuple[str, dict[str, int]]] = [
    *(("matvec", {"BITS": bits, "GROUP": group}) for bits in (4, 8) for group in (32, 64, 128)),
    *(("experts", {"BITS": bits, "GROUP": group}) for bits in (4, 8) for group in (32, 64, 128)),
    *(("gemm", {"BITS": bits, "GROUP": group}) for bits, group in ((4, 32), (4, 128), (8, 32), (8, 128))),
    ("unpack", {"BITS": 4, "GROUP": 128}),
    ("unpack", {"BITS": 8, "GROUP": 32}),
    *(
        ("attention", {"HEAD": h, "QUERIES": q, "INT8": i})
        for h, q, i in ((64, 4, 0), (128, 1, 0), (128, 4, 0))
    ),
    *(("attention", {"HEAD": h, "QUERIES": 4, "INT8": i}) for h, i in ((128, 1), (256, 0), (256, 1))),
    ("rows", {}),
    ("sample", {}),
]


def digest(program: str, defines: dict[str, int]) -> str:
    """Of the code: a comment may change."""
    code = re.sub(r"\s*//.*", "", programs.source(program, defines))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def label(program: str, defines: dict[str, int]) -> str:
    return " ".join([program, *(f"{name}={value}" for name, value in defines.items())])


def compiled(program: str, defines: dict[str, int], arch: str) -> dict[str, dict[str, int]]:
    """Return nvcc's figures of each kernel: registers, shared bytes, spilled bytes, threads per block."""
    text = programs.source(program, defines)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{program}.cu"
        file.write_text(text)
        command = ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", "--resource-usage", "-cubin", str(file)]
        made = subprocess.run(
            [*command, "-o", f"{folder}/k.cubin"], capture_output=True, text=True, check=False
        )
    if made.returncode:
        raise RuntimeError(made.stderr)
    found = re.findall(r"KERNEL\((\d+), (\d+)\)\s+(\w+)", text)
    bounds = {name: (int(threads), int(blocks)) for threads, blocks, name in found}
    kernels: dict[str, dict[str, int]] = {}
    for part in made.stderr.split("Function properties for ")[1:]:
        name = part.split()[0]
        number = {w: int(n) for n, w in re.findall(r"(\d+) (?:bytes )?(registers|spill stores|smem)", part)}
        kernels[name] = {
            "registers": number["registers"],
            "shared": number.get("smem", 0),
            "spilled": number["spill stores"],
            "threads": bounds[name][0],
            "blocks": bounds[name][1],
        }
    return kernels


def main() -> None:
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on the path")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    table: dict[str, Any] = {"nvcc": release.group(1) if release else "?", "programs": {}}
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": None, "programs": {}}
    for program, defines in VARIANTS:
        name, source = label(program, defines), digest(program, defines)
        row = old["programs"].get(name, {})
        if old["nvcc"] != table["nvcc"] or row.get("source") != source:
            row = {"source": source, **{arch: compiled(program, defines, arch) for arch in ARCHITECTURES}}
            print(name, flush=True)
        table["programs"][name] = row
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
