"""The kernels' texts: read from kernels/, put together, and told from those of another version."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files

FOLDER = files("tinychat_mlx.backends.mlx") / "kernels"
INCLUDE = re.compile(r'^ *#include "(\w+)\.metal"$', re.MULTILINE)


@cache
def text(name: str) -> str:
    """A file of kernels/, with those it includes: Metal's compiler is given one text and no folder."""
    found = (FOLDER / f"{name}.metal").read_text(encoding="utf-8")
    return INCLUDE.sub(lambda m: text(m[1]), found)


def defined(names: dict[str, int]) -> str:
    """The lines that go above a text."""
    return "".join(f"#define {name} {value}\n" for name, value in names.items())


@cache
def digest() -> str:
    """Changes when a kernel does: measurements of another text are worth nothing."""
    found = sorted(
        (f.name, f.read_text(encoding="utf-8")) for f in FOLDER.iterdir() if f.name.endswith(".metal")
    )
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]
