"""A Hugging Face id -> a folder of the hub's own cache: found there, or fetched, resumed and checked."""

from __future__ import annotations

from pathlib import Path

from tinychat_mlx.errors import ModelNotFoundError
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
from tinychat_mlx.places import hub_cache

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
    """A hub id -> its folder, from the cache as it is, else fetched. Raises a TinychatError saying what to do."""
    ref = parse(name)
    if ref is None:
        raise ModelNotFoundError(
            "not a Hugging Face id (ORG/NAME or ORG/NAME@REVISION)", where=name, remedy="check the name"
        )
    return cached(ref) or fetch(look(ref, say), watch, say)
