"""`tinychat models list`: the installed models, in the hub's cache and in the conversions folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx import hub, inspect, memory_plan
from tinychat_mlx.apps.models.table import print_table
from tinychat_mlx.apps.terminal import safe
from tinychat_mlx.base import paths
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.base.wording import size
from tinychat_mlx.open import DEMO

if TYPE_CHECKING:
    from tinychat_mlx.contract import Backend


@dataclass(frozen=True)
class InstalledModel:
    """An installed model by a name for `chat -m`. kind: demo, hub or converted."""

    name: str
    kind: str
    folder: Path | None  # None: an incomplete download
    place: Path  # the folder of all its files

    @property
    def used(self) -> float:
        """Time of the last access to a file of it, in seconds since 1970."""
        files = [f for f in (*self.place.glob("*"), *self.place.glob("blobs/*")) if f.is_file()]
        return max((max(f.stat().st_atime, f.stat().st_mtime) for f in files), default=0.0)


def entries() -> Iterator[InstalledModel]:
    """Yield the demo, then the conversions, then the models in the hub's cache, complete or not."""
    if DEMO.is_dir():
        yield InstalledModel("demo", "demo", DEMO, DEMO)
    for folder in sorted(paths.conversions().glob("*--*")):
        if paths.find_conversion(folder.name):
            yield InstalledModel(folder.name, "converted", folder, folder)
    for folder in sorted(hub.hub_cache().glob("models--*--*")):
        yield from _of_repo(folder)


def names() -> list[str]:
    """Return the names of the completely installed models."""
    return [entry.name for entry in entries() if entry.folder is not None]


def _of_repo(folder: Path) -> Iterator[InstalledModel]:
    """Yield the newest complete snapshot of a repository in the cache."""
    repo = "/".join(folder.name.split("--")[1:])
    whole = [s for s in folder.glob("snapshots/*") if hub.is_whole(s)]
    if not whole:
        if any(folder.glob("blobs/*.incomplete")):
            yield InstalledModel(repo, "hub", None, folder)
        return
    main = hub.cached(hub.Ref(repo))
    newest = main or max(whole, key=lambda s: s.stat().st_mtime)
    yield InstalledModel(repo if main else f"{repo}@{newest.name[:8]}", "hub", newest, folder)


def describe(entry: InstalledModel, backend: Backend | None) -> dict[str, Any]:
    """Return an entry with its facts and whether it runs here. backend: the default one of this machine."""
    made: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "bytes": paths.disk_bytes(entry.place),
                            "last_used": entry.used, "folder": str(entry.folder or ""), "architecture": None,
                            "quantization": None, "parameters": None, "runs": False, "why": ""}  # fmt: skip
    if entry.folder is None:
        return made | {"why": f"incomplete: `tinychat models pull {entry.name}` resumes it"}
    try:
        found = inspect.local(entry.name, entry.folder)
    except TinychatError as error:
        return made | {"why": str(error)}
    why = str(found.trouble or "")
    if not why and backend is None:
        why = "no backend runs (`tinychat doctor`)"
    elif not why and backend is not None and not memory_plan.room(found, backend).context:
        why = "too large for the free memory"
    return made | {
        "architecture": found.architecture,
        "quantization": found.quantization,
        "parameters": found.parameters,
        "runs": not why,
        "why": why,
    }


def show_installed(as_json: bool) -> None:
    try:
        backend = memory_plan.chosen({"backend": "auto"})
    except TinychatError:
        backend = None
    rows = [describe(e, backend) for e in entries()]
    if as_json:
        return click.echo(json.dumps(rows))
    print_table(
        ["model", "disk", "weights", "architecture", "used", "runs here"],
        [
            [
                safe(r["name"]),
                size(r["bytes"]),
                r["quantization"] or "",
                safe(r["architecture"] or ""),
                ago(r["last_used"]),
                "yes" if r["runs"] else "no: " + safe(r["why"]) if r["why"] else "no",
            ]
            for r in rows
        ],
        right={1},
    )
    total = sum(r["bytes"] for r in rows if r["kind"] == "hub")
    click.echo(f"{size(total)} in {hub.hub_cache()}", err=True)
    if len(rows) < 2:
        click.echo("`tinychat models list --recommended` prints models to try", err=True)


def ago(then: float) -> str:
    """Format the time since then in one unit."""
    seconds = time.time() - then
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"
