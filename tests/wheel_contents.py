"""python tests/wheel_contents.py DIST: check that a wheel contains what a chat needs and only tinychat_mlx."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

NEEDED = [
    r"tinychat_mlx/tinychat_cpu\.(so|dylib|dll)",
    r"tinychat_mlx/__init__\.py",
    r"tinychat_mlx/apps/cli\.py",
    r"tinychat_mlx/awq/__init__\.py",
    r"tinychat_mlx/backends/cpu/backend\.py",
    *(rf"tinychat_mlx/{part}/__init__\.py" for part in ("base", "weights", "text", "hub", "model", "engine")),
    r"tinychat_mlx/models/demo/(config|tokenizer)\.json",
    r"tinychat_mlx/models/demo/model\.safetensors",
    r"tinychat_mlx/py\.typed",
]


def faults(names: list[str]) -> list[str]:
    """Return what is missing from a wheel's file names, and what does not belong."""
    missing = [f"missing: {p}" for p in NEEDED if not any(re.fullmatch(p, n) for n in names)]
    alien = [n for n in names if not re.match(r"(tinychat_mlx/|tinychat_mlx-[^/]*\.dist-info/)", n)]
    sources = [
        n for n in names if n.endswith((".cpp", "CMakeLists.txt")) or "/tests/" in n or "/apps/demo/" in n
    ]
    return missing + [f"does not belong: {n}" for n in alien + sources]


def main() -> int:
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    if not wheels:
        print(f"no wheel in {sys.argv[1]}", file=sys.stderr)
        return 1
    bad = [f"{w.name}: {f}" for w in wheels for f in faults(zipfile.ZipFile(w).namelist())]
    print("\n".join(bad) or f"{len(wheels)} wheel(s) with the expected contents")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
