"""Locations of models on this machine. Imports no NumPy, because shell completion uses it."""

from __future__ import annotations

import os
from pathlib import Path


def hub_cache() -> Path:
    """Return huggingface_hub's cache folder, by its own rules, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or Path(home) / "hub").expanduser()


def data() -> Path:
    """The folder of saved chats and of the history of prompts, which TINYCHAT_DATA moves. It may not exist."""
    named = os.environ.get("TINYCHAT_DATA")
    if named:
        return Path(named)
    from platformdirs import user_data_path

    return user_data_path("tinychat-mlx", appauthor=False)


def conversions() -> Path:
    """Return the folder of the int4 models that `tinychat chat` converted, each named ORG--NAME-int4."""
    from platformdirs import user_data_path

    return user_data_path("tinychat-mlx", appauthor=False) / "models"


def find_conversion(name: str) -> Path | None:
    """Return the folder of a conversion by the name that `tinychat models list` prints; None if there is none."""
    if Path(name).name != name or "--" not in name:
        return None
    folder = conversions() / name
    return folder if (folder / "config.json").exists() else None


def disk_bytes(path: Path) -> int:
    """Return the bytes of the files at or below a path. Symbolic links and unreadable files count as 0."""
    if path.is_file():
        return path.lstat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            try:
                total += 0 if os.path.islink(file) else os.lstat(file).st_size
            except OSError:  # removed since os.walk listed it
                continue
    return total
