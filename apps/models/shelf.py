"""`tinychat models list`: the models on this machine, in the hub's cache and among our conversions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tinychat_mlx import hub
from tinychat_mlx.apps import fit
from tinychat_mlx.apps.models import facts
from tinychat_mlx.apps.models.opening import home
from tinychat_mlx.apps.models.table import print_table
from tinychat_mlx.apps.terminal import safe, size
from tinychat_mlx.errors import TinychatError


@dataclass(frozen=True)
class Entry:
    """A model on this machine. kind: demo, hub, or converted (by us); nbytes: of disk; used: seconds since 1970."""

    name: str
    kind: str
    folder: Path | None  # None: a download that is not complete
    nbytes: int
    used: float


def entries() -> Iterator[Entry]:
    """The demo, then our conversions, then what the hub's cache holds, complete or not."""
    from tinychat_mlx.loading import DEMO

    if DEMO.is_dir():
        yield Entry("demo", "demo", DEMO, disk_bytes(DEMO), last_used(DEMO))
    for folder in sorted(home().glob("*--*")) if home().is_dir() else []:
        if (folder / "config.json").exists():
            yield Entry(folder.name, "converted", folder, disk_bytes(folder), last_used(folder))
    for folder in sorted(hub.hub_cache().glob("models--*--*")):
        yield from _of_repo(folder)


def _of_repo(folder: Path) -> Iterator[Entry]:
    """A repository of the cache: its newest complete snapshot; others that a branch, tag or commit pins."""
    repo = "/".join(folder.name.split("--")[1:])
    used, nbytes = last_used(folder / "blobs"), disk_bytes(folder)
    whole = [s for s in folder.glob("snapshots/*") if hub.is_whole(s)]
    if not whole:
        if any(folder.glob("blobs/*.incomplete")):
            yield Entry(repo, "hub", None, nbytes, used)
        return
    main = hub.cached(hub.Ref(repo))
    newest = main or max(whole, key=lambda s: s.stat().st_mtime)
    yield Entry(repo if main else f"{repo}@{newest.name[:8]}", "hub", newest, nbytes, used)


def disk_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; links count nothing."""
    return sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())


def last_used(folder: Path) -> float:
    times = [max(f.stat().st_atime, f.stat().st_mtime) for f in folder.glob("*") if f.is_file()]
    return max(times, default=0.0)


def describe(entry: Entry) -> dict[str, Any]:
    """An entry with what its files say and whether it runs here."""
    made: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "bytes": entry.nbytes, "last_used": entry.used,
                            "folder": str(entry.folder or ""), "architecture": None, "quantization": None,
                            "parameters": None, "runs": False, "why": ""}  # fmt: skip
    if entry.folder is None:
        return made | {"why": f"incomplete: `tinychat models pull {entry.name}` goes on"}
    try:
        found = facts.local(entry.name, entry.folder)
    except TinychatError as error:
        return made | {"why": str(error)}
    need = fit.Need(found.nbytes)
    runs = not found.trouble and fit.fits(need)
    return made | {
        "architecture": found.architecture,
        "quantization": found.quantization,
        "parameters": found.parameters,
        "runs": runs,
        "why": found.trouble or ("" if runs else "too large for the memory that is free"),
    }


def show_shelf(as_json: bool) -> None:
    rows = [describe(e) for e in entries()]
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
