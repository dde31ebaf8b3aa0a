"""The text of each CUDA program: a kernel file with what it needs in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "kernels"
HEADERS = {  # beside prelude.cuh
    "matvec": ["tiles.cuh", "product.cuh"],
    "experts": ["tiles.cuh", "product.cuh"],
    "gemm": ["tiles.cuh"],
    "unpack": ["tiles.cuh"],
    "attention": ["turn.cuh"],
    "rows": ["turn.cuh"],
}


def source(program: str, defines: Mapping[str, int], prelude: bool = True) -> str:
    """A program's whole text; it includes nothing, so that no toolkit is needed to compile it."""
    files = ["prelude.cuh"] if prelude else []
    files += HEADERS.get(program, [])
    constants = "".join(f"#define {name} {value}\n" for name, value in sorted(defines.items()))
    texts = ((FOLDER / name).read_text().replace("#pragma once\n", "") for name in [*files, f"{program}.cu"])
    return constants + "\n".join(texts)
