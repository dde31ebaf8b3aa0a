"""Find models in the hub's cache, and check that they are complete. Never uses the network.

    models--ORG--NAME/refs/main              the commit of a branch at the time of the download
                      snapshots/COMMIT/…     a link per file to …
                      blobs/HASH             … the files, named by their hash; HASH.incomplete while downloading

The layout is huggingface_hub's (its guide "Understand caching"), so other programs find the files, too. That library
makes the queries, logs in and names errors. This package downloads the bytes, because the library restarts an
interrupted file from 0, and most of a model is one file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from tinychat_mlx.base.errors import FormatError, TinychatError
from tinychat_mlx.base.json_file import read_json
from tinychat_mlx.base.paths import hub_cache
from tinychat_mlx.weights.checkpoint import INDEX, SINGLE, is_plain_name

_NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?"
HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([\w][\w./-]{{0,254}}))?", re.ASCII)
COMMIT, SHORT = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{7,39}")


class Ref(NamedTuple):
    """A model on the hub, at a branch, a tag or a commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def parse(name: str) -> Ref | None:
    """Parse "ORG/NAME" or "ORG/NAME@REVISION". Return None for any other text."""
    match = HUB_ID.fullmatch(name)
    if match is None or "--" in match[1] or ".." in name or match[1].endswith(".git"):
        return None
    return Ref(match[1], match[2] or "main")


def repo_folder(repo: str) -> Path:
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def repo_of(folder: Path) -> str | None:
    """Return ORG/NAME of a snapshot folder in any cache; None for any other folder."""
    snapshots = folder.resolve().parent
    found = re.fullmatch(r"models--(.+?)--(.+)", snapshots.parent.name)
    return f"{found[1]}/{found[2]}" if found and snapshots.name == "snapshots" else None


def is_offline() -> bool:
    """Whether the environment disables network access, by huggingface_hub's rule."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def cached(ref: Ref) -> Path | None:
    """Return the snapshot in the cache if it is complete. A commit may be abbreviated. Never uses the network."""
    folder, commit = repo_folder(ref.repo), ref.revision
    if not COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / ref.revision).read_text().strip()
        except OSError:
            meant = [s.name for s in folder.glob(f"snapshots/{commit}*")] if SHORT.fullmatch(commit) else []
            if len(meant) != 1:
                return None
            commit = meant[0]
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and is_whole(snapshot) else None


def is_whole(snapshot: Path) -> bool:
    """Whether a snapshot has its config and every weight file that its index names."""
    if not (snapshot / "config.json").exists():
        return False
    if not (snapshot / INDEX).exists():
        return (snapshot / SINGLE).exists()
    try:
        return all((snapshot / shard).exists() for shard in shards_of(read_json(snapshot / INDEX)))
    except TinychatError:
        return False


def shards_of(index: Any) -> set[str]:
    """Return the file names in an index. Raises FormatError."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    shards = set(weight_map.values()) if isinstance(weight_map, dict) and weight_map else {None}
    if not all(isinstance(s, str) and is_plain_name(s) for s in shards):
        raise FormatError(
            "weight_map does not map tensor names to file names", where=INDEX, remedy="use another repository"
        )
    return {str(s) for s in shards}
