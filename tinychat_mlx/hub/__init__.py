"""Resolve a Hugging Face id to a folder of the hub's cache. Downloads are resumed and verified."""

from __future__ import annotations

from pathlib import Path

from tinychat_mlx.base.errors import ModelNotFoundError
from tinychat_mlx.base.paths import hub_cache
from tinychat_mlx.hub.ask import File, Remote, look, read_header, read_json
from tinychat_mlx.hub.cache import (
    COMMIT,
    Ref,
    cached,
    is_offline,
    is_whole,
    parse,
    repo_folder,
    repo_of,
    shards_of,
)
from tinychat_mlx.hub.fetch import Watch, check_room, fetch
from tinychat_mlx.hub.http import Say, login

__all__ = [
    "COMMIT",
    "File",
    "Ref",
    "Remote",
    "Say",
    "Watch",
    "cached",
    "check_room",
    "fetch",
    "find",
    "hub_cache",
    "is_offline",
    "is_whole",
    "login",
    "look",
    "parse",
    "read_header",
    "read_json",
    "repo_folder",
    "repo_of",
    "shards_of",
]  # fmt: skip


def find(name: str, watch: Watch = lambda done, total: None, say: Say = lambda text: None) -> Path:
    """Return the folder of a hub id, from the cache or downloaded. Raises TinychatError with a remedy."""
    ref = parse(name)
    if ref is None:
        raise ModelNotFoundError(
            "not a Hugging Face id (ORG/NAME or ORG/NAME@REVISION)", where=name, remedy="check the name"
        )
    return cached(ref) or fetch(look(ref, say), watch, say)
