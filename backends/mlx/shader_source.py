"""Read and assemble the Metal kernels' source from kernels/, and compute its digest."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files

FOLDER = files("tinychat_mlx.backends.mlx") / "kernels"
INCLUDE = re.compile(r'^ *#include "(\w+)\.metal"$', re.MULTILINE)


@cache
def text(name: str) -> str:
    """Return a file of kernels/ with its includes inserted. Metal's compiler gets one text and no folder."""
    found = (FOLDER / f"{name}.metal").read_text(encoding="utf-8")
    return INCLUDE.sub(lambda m: text(m[1]), found)


def defined(names: dict[str, int]) -> str:
    """Return the #define lines that precede a text."""
    return "".join(f"#define {name} {value}\n" for name, value in names.items())


@cache
def digest() -> str:
    """Return a digest of all kernels. Measurements of other versions are not used."""
    found = sorted(
        (f.name, f.read_text(encoding="utf-8")) for f in FOLDER.iterdir() if f.name.endswith(".metal")
    )
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]
