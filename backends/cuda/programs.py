"""Assemble the source of each CUDA program: a kernel file and the headers it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "kernels"
HEADERS = {  # in addition to prelude.cuh
    "matvec": ["tiles.cuh", "product.cuh"],
    "experts": ["tiles.cuh", "product.cuh"],
    "gemm": ["tiles.cuh"],
    "unpack": ["tiles.cuh"],
    "attention": ["rope.cuh"],
    "rows": ["rope.cuh"],
}


def source(program: str, defines: Mapping[str, int], prelude: bool = True) -> str:
    """Return a program's complete source. It includes no files, so no CUDA toolkit is needed to compile it."""
    files = ["prelude.cuh"] if prelude else []
    files += HEADERS.get(program, [])
    constants = "".join(f"#define {name} {value}\n" for name, value in sorted(defines.items()))
    texts = ((FOLDER / name).read_text().replace("#pragma once\n", "") for name in [*files, f"{program}.cu"])
    return constants + "\n".join(texts)
