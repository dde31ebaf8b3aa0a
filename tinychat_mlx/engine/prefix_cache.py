"""Store of computed keys and values on disk, so that a resumed conversation need not compute them again.

A part holds the keys and values of up to 256 consecutive tokens in one safetensors file, named by hashes:

    <hash of the model and of all earlier tokens>-<hash of its own tokens>.safetensors
    metadata    {"prefix": the first half of the name, "crc": of the bytes of all tensors, sorted by name}
    ids         (T,) int32; the other tensors are those of the backend's `read_cache`, tokens on axis 2

Chats with the same beginning share parts, and a longer chat only adds parts. A part that is damaged or belongs to
another model is ignored. A full disk stops the writing. Any failure here costs time but never correctness. Only the
owner can read the files (0600 in a 0700 folder). It is safe to delete them at any time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from tinychat_mlx import __version__
from tinychat_mlx.base import disk_cache
from tinychat_mlx.base.errors import TinychatError
from tinychat_mlx.contract import Backend, Cache
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.weights.model_identity import add_samples
from tinychat_mlx.weights.safetensors import TensorFile, entry, write
from tinychat_mlx.weights.weight import Array

LAYOUT = 1  # to be raised when files written before must not be read any more
PART = 256  # tokens: a few MB, so that an answer adds little, and an eviction takes little
LIMIT = 1 << 30  # bytes on disk, by default
SPARE = 256 << 20  # bytes that are left free on the disk
NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.safetensors(\.partial)?")

Rows = dict[str, Array]


def identity_of(folder: Path, config: ModelConfig, backend: str, exact: bool) -> str:
    """Return a hash of everything but the tokens that keys and values depend on. Raises OSError.

    Weight files are identified by size, mtime and samples of their bytes: reading them whole would take longer than the
    store saves. The cache's number format is not included, because it is visible in the tensors.
    """
    seen = hashlib.sha256(f"{LAYOUT} {__version__} {backend} {exact}".encode())
    seen.update((folder / "config.json").read_bytes())
    for table in config.rope:  # it may depend on the context length
        seen.update(b"-" if table is None else f"{table.factor}".encode() + table.inv_freq.tobytes())
    add_samples(seen, folder)
    return seen.hexdigest()


class PrefixStore:
    """The parts of one model, in a folder that all models share. Not thread-safe."""

    def __init__(self, folder: Path, identity: str, limit: int = LIMIT) -> None:
        self.folder, self.identity, self.limit = folder, identity, limit

    def restore(self, backend: Backend, cache: Cache, ids: Sequence[int]) -> None:
        """Extend cache, which holds a prefix of ids, with the parts on disk."""
        try:
            names = sorted(name for name in os.listdir(self.folder) if NAME.fullmatch(name))
        except OSError:
            return
        used: list[Path] = []
        ids = ids[: cache.capacity]
        for at, key in self._keys(ids):
            if cache.length >= at + PART:
                continue
            found = max((self._open(name, ids[at:], backend, cache) for name in names if name.startswith(key)),
                        key=lambda part: part.tokens, default=None)  # fmt: skip
            if found is None or at + found.tokens <= cache.length:
                break
            have, end = cache.length - at, found.tokens
            backend.write_cache(cache, {name: rows[:, :, have:end] for name, rows in found.rows.items()})
            used.append(found.path)
            if end < PART:
                break
        disk_cache.touch(used)  # an earlier part as the newer: a later one needs it

    def save(self, ids: Sequence[int], read: Callable[[int, int], Rows | None], whole: bool = False) -> None:
        """Write the parts of ids that are not on disk. whole: also the last incomplete part.

        read(start, end) returns the rows of those tokens, or None if they are no longer in the cache.
        """
        if len(ids) < PART:  # computing so few is as fast
            return
        used: list[Path] = []
        with suppress(OSError, TinychatError):
            disk_cache.make_folder(self.folder)
            for at, key in self._keys(ids):
                own = np.asarray(ids[at : at + PART], np.int32)
                if not whole and len(own) < PART:
                    break
                path = self.folder / f"{key}-{_hash(own.tobytes())[:16]}.safetensors"
                if not path.exists():
                    rows = read(at, at + len(own))
                    if rows is None or not self._write(path, key, own, rows):
                        break
                used.append(path)
            disk_cache.touch(used)
            self._make_room()

    def _keys(self, ids: Sequence[int]) -> Iterable[tuple[int, str]]:
        """Yield the start of each part of ids, and the hash of the model and all earlier tokens."""
        seen = hashlib.sha256(self.identity.encode())
        for at in range(0, len(ids), PART):
            yield at, seen.hexdigest()[:32]
            seen.update(np.asarray(ids[at : at + PART], np.int32).tobytes())

    def _open(self, name: str, ids: Sequence[int], backend: Backend, cache: Cache) -> _Part:
        """Read and verify a part; count its leading tokens that match ids. An invalid part counts 0."""
        path = self.folder / name
        try:
            file = TensorFile(path)
            own = file.read("ids")
            form = backend.read_cache(cache, 0, 0)
            if file.metadata.get("prefix") != name[:32] or set(file.names) != {"ids", *form}:
                return _Part(path)
            rows = {key: file.read(key) for key in form}
            if own.dtype != np.int32 or own.ndim != 1 or not 0 < len(own) <= PART:
                return _Part(path)
            same = own[: len(ids)] == np.asarray(ids[: len(own)], np.int32)
            tokens = len(same) if same.all() else int(same.argmin())
            if not all(_fits(rows[key], form[key], len(own)) for key in form):
                return _Part(path)
            if file.metadata.get("crc") != _crc({"ids": own, **rows}):
                return _Part(path)
            return _Part(path, tokens, rows)
        except (OSError, TinychatError):
            return _Part(path)

    def _write(self, path: Path, key: str, own: Array, rows: Rows) -> bool:
        """Write a part. Return whether it was written."""
        size = sum(array.nbytes for array in rows.values())
        if size > self.limit or shutil.disk_usage(self.folder).free < size + SPARE:
            return False
        arrays = {"ids": own, **rows}
        entries = [entry(name, array) for name, array in arrays.items()]
        write(path, entries, {"prefix": key, "crc": _crc(arrays)})
        path.chmod(0o600)
        return True

    def _make_room(self) -> None:
        """Delete what was used longest ago until the rest is within the limit."""
        files = disk_cache.files(self.folder, NAME)
        disk_cache.evict(files, sum(file.size for file in files) - self.limit)


class _Part:
    """A file, the number of its tokens that match (0: unusable), and its rows."""

    def __init__(self, path: Path, tokens: int = 0, rows: Rows | None = None) -> None:
        self.path, self.tokens, self.rows = path, tokens, rows or {}


def _fits(rows: Array, form: Array, tokens: int) -> bool:
    """Whether an array matches the form of a cache: an empty array with its dtype and other sizes."""
    shape = (*form.shape[:2], tokens, *form.shape[3:])
    return rows.dtype == form.dtype and rows.shape == shape and _finite(rows)


def _finite(rows: Array) -> bool:
    return rows.dtype.kind != "f" or bool(np.isfinite(rows).all())


def _crc(arrays: Mapping[str, Array]) -> str:
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
