"""The layer rules: allowed imports between parts, no circle, and libraries that the chat path never imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from checkout import ROOT

PACKAGE = "tinychat_mlx"
FOLDERS = ("apps", "awq", "backends")
# From the bottom to the top: a part imports itself and the parts before it.
ORDER = (
    "base", "weights", "contract", "text", "hub", "model", "engine",
    "loaded_model", "mlx_lm_engine", "open", "parts", "inspect", "memory_plan",
    "awq", "apps", "convert", "__main__",
)  # fmt: skip
# What a backend may import: the contract and what it needs, the reference backend, itself.
CONTRACT = (
    "contract",
    "weights.weight",
    "base.errors",
    "base.limits",
    "base.disk_cache",
    "base.shapes",
    "backends.reference",
)
HEAVY = {"torch", "transformers", "mlx", "mlx_lm"}
# A shell's Tab key imports base.
FORBIDDEN = {"base": HEAVY | {"numpy"}, "awq": HEAVY}
NO_DEVICE = ("weights.weight", "contract", "model", "engine")


def sources() -> dict[str, Path]:
    """Module, without the name of the package -> file. The package's own __init__ only re-exports names."""
    found = {}
    for folder in (PACKAGE, *FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / PACKAGE if folder == PACKAGE else ROOT).with_suffix("").parts
            if folder == PACKAGE and parts[0] in (*FOLDERS, "__init__"):  # links, see dev.py
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports(tree: ast.AST) -> set[str]:
    """Return every module that a file names in an import statement, at any depth; modules of ours without the package's name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides the layer that it reaches"
            module = node.module or ""
            found |= {
                name if name.removeprefix(f"{PACKAGE}.") in SOURCES else module
                for name in (f"{module}.{a.name}" for a in node.names)
            }
    return {name.removeprefix(f"{PACKAGE}.") for name in found}


IMPORTS = {name: imports(tree) for name, tree in TREES.items()}


def within(name: str, *parts: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def may(name: str, other: str) -> bool:
    """Whether a module may import another one of ours."""
    part, theirs = name.partition(".")[0], other.partition(".")[0]
    if part == "backends":
        return within(other, *CONTRACT, ".".join(name.split(".")[:2]))
    if theirs == "backends":
        return part == "apps"
    return ORDER.index(theirs) <= ORDER.index(part)


def test_no_module_imports_a_layer_above_it() -> None:
    found = []
    for name, others in IMPORTS.items():
        forbidden = FORBIDDEN.get(name.partition(".")[0], HEAVY if within(name, *ORDER[:-4]) else set())
        for other in sorted(others - {PACKAGE}):
            if not may(name, other) if other in SOURCES else other.partition(".")[0] in forbidden:
                found.append(f"{name} imports {other}")
    assert not found, "\n" + "\n".join(found)


def test_no_circle_of_imports() -> None:
    """Imports in functions and for type checkers count, too."""
    try:
        TopologicalSorter({name: others & {*SOURCES} for name, others in IMPORTS.items()}).prepare()
    except CycleError as error:
        raise AssertionError("a circle: " + " <- ".join(error.args[1])) from None


def test_the_graph_and_the_engine_name_no_device() -> None:
    found = [
        f"{name} names the device {node.value}"
        for name, tree in TREES.items()
        if within(name, *NO_DEVICE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("cpu", "mlx", "cuda", "reference")
    ]
    assert not found, "\n" + "\n".join(found)


def test_the_chat_path_imports_no_heavy_library() -> None:
    """Runs a whole answer of the demo, then checks what was imported."""
    code = (
        "import sys, tinychat_mlx\n"
        "m = tinychat_mlx.load('demo', backend='cpu')\n"
        "list(m.chat([{'role': 'user', 'content': 'hi'}], max_tokens=3, temperature=0))\n"
        "import tinychat_mlx.apps.cli, tinychat_mlx.apps.chat.loop\n"
        "print(sorted({'torch', 'transformers', 'mlx', 'scipy', 'pydantic'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
