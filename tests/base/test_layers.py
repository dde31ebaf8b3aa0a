"""The layer rules: allowed imports between parts, and libraries that the chat path never imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from checkout import ROOT

PACKAGE = "tinychat_mlx"
# Core modules that start a program, and so are above the apps that they start.
ENTRIES = {"tinychat_mlx/__main__.py", "tinychat_mlx/convert.py"}
# All of the core that a backend may see: the contract, and what asks the operating system alone.
CONTRACT = {"backend", "weight", "errors", "limits", "disk_cache", "shapes"}
EVERYONE = ["errors", "limits", "disk_cache", "shapes", "places", "words"]  # modules that everyone may import
HEAVY = ["torch", "transformers", "mlx", "mlx_lm"]
CORE_IGNORES_DEVICE = {"decoder", "config", "arch", "rope", "generate", "sampler", "weight", "backend"}


def sources(folder: str) -> list[Path]:
    skip = {"apps", "awq", "backends"} if folder == PACKAGE else set()
    files = (ROOT / folder).rglob("*.py")
    return [p for p in files if p.relative_to(ROOT / folder).parts[0] not in skip]


def imports(path: Path) -> set[str]:
    """Return every module that a file names in an import statement, at any depth, absolute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the layer that it reaches"
            found.add(node.module or "")
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def reaches(path: Path, *layers: str) -> set[str]:
    return {m for m in imports(path) if any(m == x or m.startswith(x + ".") for x in layers)}


def offenders() -> list[str]:
    """Return one line per import and per device name that the layers forbid."""
    found: list[str] = []

    def forbid(path: Path, modules: set[str]) -> None:
        found.extend(f"{path.relative_to(ROOT).as_posix()} imports {module}" for module in sorted(modules))

    for path in sources(PACKAGE):
        if path.relative_to(ROOT).as_posix() not in ENTRIES:
            forbid(
                path, reaches(path, "tinychat_mlx.apps", "tinychat_mlx.awq", "tinychat_mlx.backends", *HEAVY)
            )
    for path in sources("awq"):
        forbid(
            path, reaches(path, "tinychat_mlx.apps", "tinychat_mlx.backends", "torch", "transformers", "mlx")
        )
    for path in sources("backends"):
        inside = path.relative_to(ROOT / "backends").parts[0].removesuffix(".py")
        allowed = {f"{PACKAGE}.{m}" for m in CONTRACT} | {PACKAGE, f"{PACKAGE}.backends"}
        layers = [f"{PACKAGE}.{m}" for m in (*CONTRACT, f"backends.{inside}", "backends.reference")]
        forbid(path, reaches(path, PACKAGE) - allowed - reaches(path, *layers))
    # no NumPy (for the shell's Tab), and no part of ours that a backend must not import
    for name in EVERYONE:
        path = ROOT / PACKAGE / f"{name}.py"
        words = {f"{PACKAGE}.words", f"{PACKAGE}.words.of_the_system", f"{PACKAGE}.words.size"}
        forbid(path, reaches(path, PACKAGE, "numpy") - {PACKAGE} - words)
    for name in sorted(CORE_IGNORES_DEVICE):
        path = ROOT / PACKAGE / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        named = sorted(strings & {"cpu", "mlx", "cuda", "reference"})
        found.extend(f"{path.relative_to(ROOT).as_posix()} names the device {device}" for device in named)
    return found


def test_no_file_imports_a_layer_above_it() -> None:
    found = offenders()
    assert not found, "\n" + "\n".join(found)


def test_the_chat_path_imports_no_heavy_library() -> None:
    """Runs a whole answer of the demo, then checks what was imported."""
    code = (
        "import sys, tinychat_mlx\n"
        "m = tinychat_mlx.load('demo', backend='cpu')\n"
        "list(m.chat([{'role': 'user', 'content': 'hi'}], max_tokens=3, temperature=0))\n"
        "import tinychat_mlx.apps.cli, tinychat_mlx.apps.chat\n"
        "print(sorted({'torch', 'transformers', 'mlx', 'scipy', 'pydantic'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
