"""The architecture as a test: who may import whom, and what the chat path never imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tinychat_mlx"
# Modules of the core that start a program, and so stand above the apps they start.
ENTRIES = {"tinychat_mlx/__main__.py", "tinychat_mlx/convert.py"}
# All of the core that a backend may see: the contract, and what asks the operating system alone.
CONTRACT = {"backend", "weight", "errors", "limits"}
CORE_IGNORES_DEVICE = {"decoder", "config", "arch", "rope", "generate", "sampler", "weight", "backend"}


def sources(folder: str) -> list[Path]:
    skip = {"apps", "awq", "backends"} if folder == PACKAGE else set()
    files = (ROOT / folder).rglob("*.py")
    return [p for p in files if p.relative_to(ROOT / folder).parts[0] not in skip]


def imports(path: Path) -> set[str]:
    """Every module a file names in an import statement, at any depth, absolute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer they reach"
            found.add(node.module or "")
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def reaches(path: Path, *layers: str) -> set[str]:
    return {m for m in imports(path) if any(m == x or m.startswith(x + ".") for x in layers)}


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_imports_no_app_quantiser_or_device(path: Path) -> None:
    if str(path.relative_to(ROOT)).replace("\\", "/") in ENTRIES:
        return
    assert not reaches(path, "tinychat_mlx.apps", "tinychat_mlx.awq", "tinychat_mlx.backends")
    assert not reaches(path, "torch", "transformers", "mlx", "mlx_lm")


@pytest.mark.parametrize("path", sources("awq"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_quantiser_imports_no_app_or_device(path: Path) -> None:
    assert not reaches(path, "tinychat_mlx.apps", "tinychat_mlx.backends", "torch", "transformers", "mlx")


@pytest.mark.parametrize("path", sources("backends"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_backend_sees_the_contract_itself_and_the_reference(path: Path) -> None:
    inside = path.relative_to(ROOT / "backends").parts[0].removesuffix(".py")
    allowed = {f"tinychat_mlx.{m}" for m in CONTRACT}
    allowed |= {"tinychat_mlx.backends", f"tinychat_mlx.backends.{inside}", "tinychat_mlx.backends.reference"}
    for module in reaches(path, PACKAGE):
        parts = module.split(".")
        prefixes = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        assert prefixes & allowed or module == PACKAGE, f"{path.name} imports {module}"


@pytest.mark.parametrize("name", ["errors", "limits", "places", "words"])
def test_what_everyone_may_ask_imports_nothing_heavy(name: str) -> None:
    """Neither NumPy, for a shell's Tab, nor any other part of ours that a backend must not see."""
    seen = reaches(ROOT / PACKAGE / f"{name}.py", PACKAGE, "numpy")
    assert seen <= {PACKAGE, f"{PACKAGE}.words"} | {f"{PACKAGE}.words.{n}" for n in ("of_the_system", "size")}


@pytest.mark.parametrize("name", sorted(CORE_IGNORES_DEVICE))
def test_the_graph_never_names_a_device(name: str) -> None:
    tree = ast.parse((ROOT / PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not strings & {"cpu", "mlx", "cuda", "reference"}


def test_the_chat_path_imports_no_heavy_library() -> None:
    """A whole answer of the demo, then a look at what was imported to give it."""
    code = (
        "import sys, tinychat_mlx\n"
        "m = tinychat_mlx.load('demo', backend='cpu')\n"
        "list(m.chat([{'role': 'user', 'content': 'hi'}], max_tokens=3, temperature=0))\n"
        "import tinychat_mlx.apps.cli, tinychat_mlx.apps.chat\n"
        "print(sorted({'torch', 'transformers', 'mlx', 'scipy', 'pydantic'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
