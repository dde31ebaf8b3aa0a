"""Download a model into the cache: resumed, verified, and visible only when complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinychat_mlx.base.errors import DownloadError, FormatError
from tinychat_mlx.base.limits import disk_free
from tinychat_mlx.base.paths import hub_cache
from tinychat_mlx.base.wording import size
from tinychat_mlx.hub.ask import File, Remote, partial, size_of
from tinychat_mlx.hub.cache import COMMIT, repo_folder
from tinychat_mlx.hub.http import PIECE, Say, get, patiently

Watch = Callable[[int, int], None]  # bytes done, bytes in total


def fetch(
    remote: Remote,
    watch: Watch = lambda done, total: None,
    say: Say = lambda text: None,
    verify: bool = False,
) -> Path:
    """Download the missing files into the cache and verify them -> the snapshot.

    An interrupted download keeps the bytes received and continues from there on the next call. verify: also check the
    files that were there before. Raises DownloadError, FormatError, ModelNotFoundError.
    """
    if verify:
        for file in remote.files:
            _drop_if_damaged(remote, file, say)
    check_room(remote)
    here = remote.nbytes - remote.missing
    watch(here, remote.nbytes)

    def gained(n: int) -> None:
        nonlocal here
        here += n
        watch(here, remote.nbytes)

    with _disk_errors(remote):
        for file in remote.files:
            if size_of(remote.snapshot / file.path) != file.size and size_of(remote.blob(file)) != file.size:
                _bring(remote, file, gained, say)
        for file in remote.files:
            _link(remote, file)
        if not COMMIT.fullmatch(remote.ref.revision):
            _write_ref(remote)
    return remote.snapshot


def check_room(remote: Remote) -> None:
    """Raise DownloadError if the cache's disk has too little space for the missing files."""
    folder = hub_cache()
    free = disk_free(folder)
    if remote.missing > free:
        raise DownloadError(
            f"needs {size(remote.missing)} more on the disk of {folder}, which has {size(free)} free",
            where=remote.ref,
            remedy="make room (`tinychat models list` shows the installed models), or set HF_HOME to a folder on another disk",
        )


def _bring(remote: Remote, file: File, gained: Callable[[int], None], say: Say) -> None:
    """Download one file into the cache's blobs, starting from the bytes already there."""
    from huggingface_hub import utils

    library: Any = utils
    blob = remote.blob(file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = hub_cache() / ".locks" / repo_folder(remote.ref.repo).name / f"{file.digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with library.WeakFileLock(lock):  # the library's lock: waits for another download of this file
        if size_of(blob) == file.size:
            return
        blob.unlink(missing_ok=True)
        for last in (False, True):
            if _receive(remote, file, gained, say):
                os.replace(partial(blob), blob)
                return
            gained(-file.size)
            partial(blob).unlink()
            if not last:
                say(f"{file.path} was damaged during the download: downloading it again")
    raise FormatError(
        f"the checksum of {file.path} differs from the hub's after two downloads; the file was deleted",
        where=remote.ref,
        remedy="try again later, or from another network",
    )


def _receive(remote: Remote, file: File, gained: Callable[[int], None], say: Say) -> bool:
    """Append to the partial file until it is complete -> whether its hash is correct."""
    with open(partial(remote.blob(file)), "a+b", buffering=0) as out:
        have, hasher = _hashed(out, file)

        def ask() -> None:
            nonlocal have, hasher
            while have < file.size:
                before = have
                with get(
                    remote.ref, remote.commit, file.path, {"Range": f"bytes={have}-"} if have else {}
                ) as (status, pieces):
                    if have and status != 206:  # the server sends the whole file again
                        out.truncate(0)
                        gained(-have)
                        have, hasher = 0, file.hasher()
                    for piece in pieces:
                        _write(out, piece, remote)
                        hasher.update(piece)
                        have += len(piece)
                        gained(len(piece))
                if have == before:
                    raise ConnectionError("the hub sent nothing")

        patiently(remote.ref, ask, say, lambda: have)
        os.fsync(out.fileno())
    return have == file.size and bool(hasher.hexdigest() == file.digest)


def _hashed(out: Any, file: File) -> tuple[int, Any]:
    """Return the length and hash of a partial file. A file that is too long is truncated to 0."""
    if os.fstat(out.fileno()).st_size > file.size:
        out.truncate(0)
    hasher, have = file.hasher(), 0
    out.seek(0)
    while piece := out.read(PIECE):
        hasher.update(piece)
        have += len(piece)
    return have, hasher


def _write(out: Any, piece: bytes, remote: Remote) -> None:
    view = memoryview(piece)
    with _disk_errors(remote):  # here, because the caller treats any OSError as a network error
        while view:
            view = view[out.write(view) :]


def _link(remote: Remote, file: File) -> None:
    """Link a snapshot's file name to its blob; on systems without links, move the file."""
    name, blob = remote.snapshot / file.path, remote.blob(file)
    if size_of(name) == file.size:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    try:
        os.symlink(os.path.relpath(blob, name.parent), name)
    except OSError:
        if not blob.exists():
            raise
        os.replace(blob, name)


def _write_ref(remote: Remote) -> None:
    path = repo_folder(remote.ref.repo) / "refs" / remote.ref.revision
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".partial")
    fresh.write_text(remote.commit)
    os.replace(fresh, path)


def _drop_if_damaged(remote: Remote, file: File, say: Say) -> None:
    name, blob = remote.snapshot / file.path, remote.blob(file)
    path = blob if blob.exists() else name
    if not path.exists():
        return
    with open(path, "rb") as data:
        _, hasher = _hashed(data, file) if size_of(path) <= file.size else (0, file.hasher())
    if hasher.hexdigest() != file.digest:
        say(f"{file.path} in the cache is damaged: downloading it again")
        path.unlink()


@contextmanager
def _disk_errors(remote: Remote) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = remote.nbytes - remote.missing
        raise DownloadError(
            f"{error.strerror or error}; {size(kept)} of {size(remote.nbytes)} of {remote.ref} is kept",
            where=error.filename or hub_cache(),
            remedy="make room or set HF_HOME to a folder on another disk, and repeat the command",
        ) from None
