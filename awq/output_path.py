"""Check the output path before any work starts."""

from __future__ import annotations

import os
from pathlib import Path

from tinychat_mlx.base.errors import UsageError


def check_target(source: Path | None, target: Path, force: bool) -> None:
    """Raise UsageError if the target cannot be written or would overwrite the source or other files.

    source is None if it is not downloaded yet.
    """
    if target.is_symlink():
        raise UsageError(
            "this is a link, which would be replaced", where=target, remedy="give the folder it points to"
        )
    # Missing parents are created inside the first folder that exists.
    holder = next(p for p in target.absolute().parents if os.path.lexists(p))
    if not holder.is_dir():
        raise UsageError("this is a file, not a folder", where=holder, remedy="choose another place")
    if source is not None and (_holds(source, target) or _holds(target, source)):
        raise UsageError(
            f"this is, contains or is inside the source model {source}",
            where=target,
            remedy="choose another place",
        )
    if target.exists():
        if not force:
            raise UsageError(
                "it exists", where=target, remedy="choose another name, or add --force to replace it"
            )
        if not _is_model(target):
            raise UsageError(
                "not a model folder; --force overwrites only model folders and empty folders",
                where=target,
                remedy="choose another name",
            )
        if target.is_mount():
            raise UsageError(
                "this is the mount point of a disk, which cannot be replaced",
                where=target,
                remedy="choose a folder on it",
            )
    for place in (holder, *([target] if target.exists() else [])):
        if not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(
                "this folder is read-only", where=place, remedy="choose another place, or allow writing there"
            )


def _holds(outer: Path, inner: Path) -> bool:
    """Return whether `inner` is `outer` or inside it, by any path name."""
    inner = inner.resolve()
    return any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents)) if outer.exists() else False


def _is_model(folder: Path) -> bool:
    """Return whether a folder is empty or has a config and weights."""
    if not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir()}
    return not names or "config.json" in names and any(n.endswith(".safetensors") for n in names)
