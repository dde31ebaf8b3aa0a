"""The caches on disk: one root that a variable moves, whole files, and the one used longest ago goes first."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from platformdirs.windows import Windows

from tinychat_mlx.base import disk_cache

ANY = re.compile(r".*")


def test_one_variable_moves_every_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinychat_mlx.apps.doctor.disk import caches

    monkeypatch.setenv("TINYCHAT_CACHE", str(tmp_path))
    assert all(disk_cache.place(kind).parent == tmp_path for kind in disk_cache.PLACES)
    shown = {key: path for key, _, path, _ in caches()}
    assert {kind: shown[kind] for kind in disk_cache.PLACES} == {
        kind: disk_cache.place(kind) for kind in disk_cache.PLACES
    }


def test_on_windows_the_root_has_no_folder_of_an_author(monkeypatch: pytest.MonkeyPatch) -> None:
    """platformdirs puts the application's name twice into a path unless `appauthor=False`."""
    monkeypatch.delenv("TINYCHAT_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda name: "local")
    monkeypatch.setattr("platformdirs.PlatformDirs", Windows)
    assert re.split(r"[\\/]", str(disk_cache.root())) == ["local", "tinychat-mlx", "Cache"]


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    disk_cache.write(path, b"old")
    with pytest.raises(KeyError), disk_cache.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    disk_cache.write(path, b"new")
    assert path.read_bytes() == b"new"
    if os.name != "nt":
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_what_was_used_longest_ago_is_deleted_first_and_no_more_than_needed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abcd"]
    for path in paths:
        path.write_bytes(bytes(10))
    disk_cache.touch([paths[2], paths[0], paths[3], paths[1]])  # b is the oldest
    found = disk_cache.files(tmp_path, ANY)
    assert [file.path.name for file in found] == ["b", "d", "a", "c"]
    assert disk_cache.evict(found, 0) == 0 and disk_cache.evict(found, 11) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
