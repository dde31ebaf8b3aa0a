"""`tinychat models list`: the models on this machine, in the hub's cache and among our conversions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tinychat_mlx import hub, places
from tinychat_mlx.apps import fit
from tinychat_mlx.apps.models import facts
from tinychat_mlx.apps.models.table import print_table
from tinychat_mlx.apps.terminal import safe
from tinychat_mlx.errors import TinychatError
from tinychat_mlx.loading import DEMO
from tinychat_mlx.words import size

if TYPE_CHECKING:
    from tinychat_mlx.backend import Backend


@dataclass(frozen=True)
class Entry:
    """A model on this machine by a name that `chat -m` takes. kind: demo, hub, or converted (by us)."""

    name: str
    kind: str
    folder: Path | None  # None: a download that is not complete
    place: Path  # of all its files

    @property
    def used(self) -> float:
        """When a file of it was last touched: seconds since 1970."""
        files = [f for f in (*self.place.glob("*"), *self.place.glob("blobs/*")) if f.is_file()]
        return max((max(f.stat().st_atime, f.stat().st_mtime) for f in files), default=0.0)


def entries() -> Iterator[Entry]:
    """The demo, then our conversions, then what the hub's cache holds, complete or not."""
    if DEMO.is_dir():
        yield Entry("demo", "demo", DEMO, DEMO)
    for folder in sorted(places.conversions().glob("*--*")):
        if places.conversion(folder.name):
            yield Entry(folder.name, "converted", folder, folder)
    for folder in sorted(hub.hub_cache().glob("models--*--*")):
        yield from _of_repo(folder)


def names() -> list[str]:
    """Of the models that are here as a whole."""
    return [entry.name for entry in entries() if entry.folder is not None]


def _of_repo(folder: Path) -> Iterator[Entry]:
    """A repository of the cache: its newest complete snapshot; others that a branch, tag or commit pins."""
    repo = "/".join(folder.name.split("--")[1:])
    whole = [s for s in folder.glob("snapshots/*") if hub.is_whole(s)]
    if not whole:
        if any(folder.glob("blobs/*.incomplete")):
            yield Entry(repo, "hub", None, folder)
        return
    main = hub.cached(hub.Ref(repo))
    newest = main or max(whole, key=lambda s: s.stat().st_mtime)
    yield Entry(repo if main else f"{repo}@{newest.name[:8]}", "hub", newest, folder)


def describe(entry: Entry, backend: Backend | None) -> dict[str, Any]:
    """An entry with what its files say and whether it runs here; backend: the one of this machine."""
    made: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "bytes": places.disk_bytes(entry.place),
                            "last_used": entry.used, "folder": str(entry.folder or ""), "architecture": None,
                            "quantization": None, "parameters": None, "runs": False, "why": ""}  # fmt: skip
    if entry.folder is None:
        return made | {"why": f"incomplete: `tinychat models pull {entry.name}` goes on"}
    try:
        found = facts.local(entry.name, entry.folder)
    except TinychatError as error:
        return made | {"why": str(error)}
    why = str(found.trouble or "")
    if not why and backend is None:
        why = "no backend comes up (`tinychat doctor`)"
    elif not why and backend is not None and not fit.room(found, backend).context:
        why = "too large for the memory that is free"
    return made | {
        "architecture": found.architecture,
        "quantization": found.quantization,
        "parameters": found.parameters,
        "runs": not why,
        "why": why,
    }


def show_shelf(as_json: bool) -> None:
    try:
        backend = fit.chosen({"backend": "auto"})
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
        click.echo("`tinychat models list --recommended` says what is worth having", err=True)


def ago(then: float) -> str:
    """How long ago, in one unit."""
    seconds = time.time() - then
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"
