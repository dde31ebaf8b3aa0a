"""Whether a result may be put at a place: asked before any work, so that nothing is lost and none done in vain."""

from __future__ import annotations

import os
from pathlib import Path

from tinychat_mlx.errors import UsageError


def check_target(source: Path | None, target: Path, force: bool) -> None:
    """Raises UsageError where the source, a stranger's files or the system stand in the way. None: it is not here yet."""
    if target.is_symlink():
        raise UsageError(f"{target} is a link, which would be replaced: give the folder that it leads to")
    holder = next(
        p for p in target.absolute().parents if os.path.lexists(p)
    )  # missing parents will be made in it
    if not holder.is_dir():
        raise UsageError(f"{holder} is a file, not a folder: choose another place")
    if source is not None and (_holds(source, target) or _holds(target, source)):
        raise UsageError(
            f"{target} is, holds or lies in the model that is read, {source}: choose another place"
        )
    if target.exists():
        if not force:
            raise UsageError(f"{target} exists: choose another name, or add --force to replace it")
        if not _is_model(target):
            raise UsageError(
                f"{target} holds no model: --force replaces model folders and empty ones alone: choose another name"
            )
        if target.is_mount():
            raise UsageError(
                f"{target} is a disk of its own, which cannot be replaced: choose a folder on it"
            )
    for place in (holder, *([target] if target.exists() else [])):
        if not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(f"{place} is read-only: choose another place, or allow writing there")


def _holds(outer: Path, inner: Path) -> bool:
    """Whether inner is outer or lies in it, by whatever names."""
    inner = inner.resolve()
    return any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents)) if outer.exists() else False


def _is_model(folder: Path) -> bool:
    """A folder with nothing in it, or with a config and weights."""
    if not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir()}
    return not names or "config.json" in names and any(n.endswith(".safetensors") for n in names)
