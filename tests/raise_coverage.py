"""Fail if a test run did not reach a `raise …Error(…)` of the product.

    coverage run -m pytest && coverage combine && coverage json -o coverage.json
    python tests/raise_coverage.py coverage.json

Only errors for users count: the classes of tinychat_mlx/errors.py. ALLOWED lists statements that no test can
reach on the machine of the nightly workflow, each with the reason.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tinychat_mlx", "apps", "awq", "backends")
# "file: first words of the statement" -> the reason
ALLOWED: dict[str, str] = {}


def error_classes() -> set[str]:
    tree = ast.parse((ROOT / "tinychat_mlx" / "errors.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Error")}


def sites(path: Path, classes: set[str]) -> list[tuple[int, str]]:
    """Return (line, source) of each `raise` or `return` in a file that creates an error of these classes."""
    source = path.read_text(encoding="utf-8")
    found = []
    for node in ast.walk(ast.parse(source)):
        value = (
            node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        )
        if isinstance(value, ast.Call):
            called = value.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in classes:
                found.append((node.lineno, " ".join((ast.get_source_segment(source, node) or "").split())))
    return sorted(found)


def uncovered(report: Path) -> list[str]:
    """Return "file:line: statement" of every raise that was not run and is not in ALLOWED."""
    files = json.loads(report.read_text(encoding="utf-8"))["files"]
    ran = {Path(name).resolve(): set(entry["executed_lines"]) for name, entry in files.items()}
    classes, missed = error_classes(), []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.resolve() != path:  # the links of tests/dev.py
                continue
            name = path.relative_to(ROOT).as_posix()
            for line, text in sites(path, classes):
                allowed = any(f"{name}: {text}".startswith(start) for start in ALLOWED)
                if line not in ran.get(path, set()) and not allowed:
                    missed.append(f"{name}:{line}: {text[:100]}")
    return missed


def main() -> int:
    missed = uncovered(Path(sys.argv[1]))
    print("\n".join([*missed, f"{len(missed)} raise statements are not covered by a test"]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
