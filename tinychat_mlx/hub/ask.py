"""Query the hub: the files, sizes and hashes of a repository, and the content of small files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinychat_mlx.base.errors import DownloadError, FormatError, ModelNotFoundError
from tinychat_mlx.base.json_file import check_json_size, parse_json
from tinychat_mlx.hub.cache import COMMIT, Ref, is_offline, repo_folder, shards_of
from tinychat_mlx.hub.http import TIMEOUT, Say, endpoint, get, patiently
from tinychat_mlx.weights.checkpoint import INDEX, SINGLE, UNREAD
from tinychat_mlx.weights.safetensors import described, header_end

WANTED = (".json", ".jinja", ".model", ".txt")  # in addition to the weights: configs, tokenizer, template
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
HEAD_BYTES = 1 << 17  # bytes of a weight file to read first: most headers are shorter
SIDE = re.compile(r"(README\.md|(licen[sc]e|notice|use_policy)[\w.-]*)", re.IGNORECASE)


@dataclass(frozen=True)
class File:
    """A file of a repository. `digest` is its SHA-256 (git's hash for small files) and the name of its blob."""

    path: str
    size: int
    digest: str

    def hasher(self) -> Any:
        """Return a hash object; after all bytes it gives `digest`."""
        return hashlib.sha256() if len(self.digest) == 64 else hashlib.sha1(b"blob %d\0" % self.size)


@dataclass(frozen=True)
class Remote:
    """The files that a model needs from a repository, at one commit."""

    ref: Ref
    commit: str
    files: tuple[File, ...]
    licence: str = ""

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def weight_bytes(self) -> int:
        return sum(f.size for f in self.files if f.path.endswith(".safetensors"))

    @property
    def snapshot(self) -> Path:
        return repo_folder(self.ref.repo) / "snapshots" / self.commit

    def blob(self, file: File) -> Path:
        return repo_folder(self.ref.repo) / "blobs" / file.digest

    def held(self, file: File) -> int:
        """Return the bytes of a file that are in the cache, complete or partial."""
        for path in (self.snapshot / file.path, self.blob(file)):
            if size_of(path) == file.size:
                return file.size
        return min(file.size, max(0, size_of(partial(self.blob(file)))))

    @property
    def missing(self) -> int:
        """Bytes still to download."""
        return sum(f.size - self.held(f) for f in self.files)


def look(ref: Ref, say: Say = lambda text: None) -> Remote:
    """Query the hub for a model's files. Raises ModelNotFoundError, DownloadError, FormatError."""
    if is_offline():
        raise ModelNotFoundError(
            "not in the local cache, and HF_HUB_OFFLINE is set",
            where=ref,
            remedy="unset HF_HUB_OFFLINE, or give a folder",
        )
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi(endpoint=endpoint()).model_info(
            ref.repo, revision=ref.revision, files_metadata=True, timeout=TIMEOUT
        )

    info = patiently(ref, ask, say)
    if not COMMIT.fullmatch(str(info.sha)):
        raise DownloadError(
            f"{endpoint()} returned no commit",
            where=ref,
            remedy="check that HF_ENDPOINT is a Hugging Face hub",
        )
    files = {s.rfilename: File(s.rfilename, s.size or 0, _digest(ref, s)) for s in info.siblings or []}
    licence = next((t.partition(":")[2] for t in info.tags or [] if t.startswith("license:")), "")
    remote = Remote(ref, str(info.sha), tuple(files.values()), licence)
    weights = _weight_files(remote, files, say)
    kept = [f for f in files.values() if f.path in weights or is_wanted(f.path)]
    return Remote(ref, remote.commit, tuple(sorted(kept, key=lambda f: f.size)), licence)


def is_wanted(path: str) -> bool:
    """Whether a model needs a file other than weights: no code, and no folders of other programs."""
    if set(path) & set('\\:*?"<>|\0'):
        return False
    if path.startswith("additional_chat_templates/") and path.count("/") == 1:
        return path.endswith(".jinja")
    return "/" not in path and (path.endswith(WANTED) or SIDE.fullmatch(path) is not None)


def _weight_files(remote: Remote, files: dict[str, File], say: Say) -> set[str]:
    """Return the safetensors files of the model. A repository may have others in addition."""
    ref = remote.ref
    if "config.json" not in files:
        raise ModelNotFoundError(
            "the repository has no config.json",
            where=ref,
            remedy="choose a model in the format of transformers",
        )
    if INDEX in files:
        index = read_json(remote, files[INDEX], say)
        with _uploads(remote):
            shards = shards_of(index)
        if absent := sorted(shards - files.keys()):
            raise FormatError(
                f"{INDEX} names {absent[0]}, which the hub does not have",
                where=ref,
                remedy="use another repository",
            )
        return shards
    if SINGLE in files:
        return {SINGLE}
    other = next((f for f in sorted(files) if f.endswith(UNREAD)), None)
    raise ModelNotFoundError(
        f"the repository has no {SINGLE}" + (f"; its weights are in {other}" if other else ""),
        where=ref,
        remedy="look for an upload of the model in safetensors, the only format that tinychat reads",
    )


def read_json(remote: Remote, file: File, say: Say = lambda text: None) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FormatError."""
    with _uploads(remote):
        check_json_size(file.path, file.size)
        return parse_json(file.path, read(remote, file.path, say))


def read_header(
    remote: Remote, file: File, say: Say = lambda text: None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor in a weight file, from its first bytes. Raises FormatError."""
    with _uploads(remote):
        head = read(remote, file.path, say, (0, min(HEAD_BYTES, file.size))) if file.size else b""
        end = header_end(file.path, head, file.size)
        if end > len(head):
            head = read(remote, file.path, say, (0, end))
        spans = described(file.path, memoryview(head)[8:end], file.size)[1]
    return {name: (span.dtype, span.shape) for name, span in spans.items()}


@contextmanager
def _uploads(remote: Remote) -> Iterator[None]:
    """Change the remedy of FormatError: the file on the hub is damaged, so another download would not help."""
    try:
        yield
    except FormatError as error:
        raise FormatError(
            f"the uploaded model is not valid: {error.problem}",
            where=remote.ref,
            remedy="use another repository",
        ) from None


def read(
    remote: Remote, path: str, say: Say = lambda text: None, span: tuple[int, int] | None = None
) -> bytes:
    """Return a small file, or the bytes [begin, end) of a large one, without storing it."""

    def ask() -> bytes:
        body = bytearray()
        wanted = {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}
        with get(remote.ref, remote.commit, path, wanted) as (_, pieces):
            for piece in pieces:
                body += piece
                if span and len(body) >= span[1] - span[0]:
                    break  # a server that ignores ranges would send the whole file
        return bytes(body)

    found: bytes = patiently(remote.ref, ask, say)
    return found


def _digest(ref: Ref, sibling: Any) -> str:
    digest = str(sibling.lfs["sha256"] if sibling.lfs else sibling.blob_id)
    if not HASH.fullmatch(digest):  # it becomes a file name
        raise DownloadError(
            f"{endpoint()} returned no hash for {sibling.rfilename!r}",
            where=ref,
            remedy="check that HF_ENDPOINT is a Hugging Face hub",
        )
    return digest


def partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, -1 if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
