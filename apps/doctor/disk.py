"""Files of tinychat on the disk: location, size, and how to delete them. Creates no folders."""

from __future__ import annotations

import os
from pathlib import Path

from tinychat_mlx.apps.doctor.finding import NOTE, OK, Finding, Section
from tinychat_mlx.base import disk_cache, limits, paths
from tinychat_mlx.base.wording import size

LOW_DISK = 2_000_000_000  # bytes; the size of a small model and its conversion


def disk() -> Section:
    """Return the section: each cache with its folder, bytes and delete command, and the free space."""
    found = [_cache(*row) for row in caches()]
    free = limits.disk_free(paths.hub_cache())
    if free < LOW_DISK:
        text, do = (
            f"{size(free)} free on the disk of the models",
            "make room, or set HF_HOME to a folder on another disk",
        )
        found.append(Finding("free_bytes", free, text, NOTE, do))
    else:
        found.append(Finding("free_bytes", free, f"{size(free)} free on the disk of the models", OK))
    return Section("disk", "Disk", tuple(found))


def caches() -> list[tuple[str, str, Path, str]]:
    """(key, what it is, folder or file, what deletes it; "": the system's own way)."""
    return [
        ("models", "models (Hugging Face cache)", paths.hub_cache(), "tinychat models rm MODEL"),
        ("conversions", "conversions to int4", paths.conversions(), "tinychat models rm MODEL"),
        ("weights", "packed weights", disk_cache.place("weights"), ""),
        ("prefixes", "what was computed of chats", disk_cache.place("prefixes"), ""),
        ("cubins", "compiled CUDA kernels", disk_cache.place("cubins"), ""),
        ("winners", "measurements of Metal kernels", disk_cache.place("winners"), ""),
        ("sessions", "saved chats", paths.data() / "sessions", ""),
        ("history", "what was typed", paths.data() / "history", ""),
    ]


def _cache(key: str, what: str, path: Path, command: str) -> Finding:
    there = os.path.lexists(path)
    nbytes = paths.disk_bytes(path)
    delete = command or (f'rmdir /s "{path}"' if os.name == "nt" else f"rm -r '{path}'")
    value = {"path": str(path), "exists": there, "bytes": nbytes, "delete": delete}
    if not there:
        return Finding(key, value, f"{what}: none")
    return Finding(key, value, f"{what}: {size(nbytes)} in {path}; `{delete}`" if nbytes else f"{what}: empty",
                   shared=f"{what}: {size(nbytes)}")  # fmt: skip
