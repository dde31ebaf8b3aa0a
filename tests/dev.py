"""python tests/dev.py links: make the top-level folders visible to mypy and editors as tinychat_mlx.*."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def links() -> None:
    for name in ("apps", "awq", "backends"):
        link = ROOT / "tinychat_mlx" / name
        if link.exists():
            continue
        try:
            link.symlink_to(Path("..") / name, target_is_directory=True)
        except OSError:  # Windows without Developer Mode: a junction needs no privilege
            import _winapi

            _winapi.CreateJunction(str(ROOT / name), str(link))  # type: ignore[attr-defined,unused-ignore]


if __name__ == "__main__":
    commands = {"links": links}
    commands[sys.argv[1]]()
