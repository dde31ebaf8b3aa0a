"""`tinychat models rm`: print what a removal frees, and remove files from the cache only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

from tinychat_mlx import hub
from tinychat_mlx.apps.terminal import detect
from tinychat_mlx.base import paths
from tinychat_mlx.base.errors import ModelNotFoundError, TinychatError, UsageError
from tinychat_mlx.base.wording import size


def remove(name: str, yes: bool) -> None:
    """Remove a repository of the cache, one revision of it, or a conversion. Asks for confirmation unless `yes`."""
    if name == "demo":
        raise UsageError(
            "the demo model is part of the program",
            where=name,
            remedy="remove it with `pip uninstall tinychat-mlx`",
        )
    ref = hub.parse(name)
    if ref is not None and "@" in name:
        return _remove_revision(ref, yes)
    folder = _folder(name, ref)
    what = f"{name}: {size(paths.disk_bytes(folder))} in {folder}"
    if _agreed(what, yes):
        _delete(folder)
        click.echo(f"removed {what}", err=True)


def _folder(name: str, ref: hub.Ref | None) -> Path:
    """Return the folder to remove: directly in the cache or the conversions, and not a link."""
    candidates = [hub.repo_folder(ref.repo)] if ref else [paths.conversions() / name]
    if ref is None and (Path(name).name != name or "--" not in name):
        raise UsageError(
            "neither a Hugging Face id nor a conversion",
            where=name,
            remedy="find its name with `tinychat models list`",
        )
    for folder in candidates:
        if folder.is_symlink():
            raise UsageError(
                f"this is a link to {folder.resolve()}", where=folder, remedy="remove it by hand"
            )
        if folder.is_dir():
            return folder
    raise ModelNotFoundError("not installed", where=name)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise TinychatError(
            f"cannot be removed: {error.strerror}", where=error.filename, remedy="remove it as its owner"
        ) from None
    shutil.rmtree(hub.hub_cache() / ".locks" / folder.name, ignore_errors=True)


def _remove_revision(ref: hub.Ref, yes: bool) -> None:
    """Remove one revision. Files that other revisions share stay (by huggingface_hub's scan)."""
    from huggingface_hub import scan_cache_dir

    found: list[Any] = []
    if hub.repo_folder(ref.repo).is_dir():
        found = [
            revision
            for repo in scan_cache_dir(hub.hub_cache()).repos
            if repo.repo_id == ref.repo and repo.repo_type == "model"
            for revision in repo.revisions
            if ref.revision in revision.refs
            or (len(ref.revision) >= 7 and revision.commit_hash.startswith(ref.revision))
        ]
    if len(found) != 1:
        raise ModelNotFoundError(
            "not installed",
            where=f"{ref.repo}@{ref.revision}",
            remedy="run `tinychat models list --json` to see the installed revisions",
        )
    plan = scan_cache_dir(hub.hub_cache()).delete_revisions(found[0].commit_hash)
    what = f"{ref.repo}@{found[0].commit_hash[:8]}: {size(plan.expected_freed_size)}"
    if _agreed(what, yes):
        plan.execute()
        click.echo(f"removed {what}", err=True)


def _agreed(what: str, yes: bool) -> bool:
    if yes:
        return True
    if not detect().interactive:
        raise UsageError(f"{what} would be removed", remedy="add --yes to remove it")
    return click.confirm(f"remove {what}?", err=True)
