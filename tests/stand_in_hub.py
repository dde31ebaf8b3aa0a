"""A local Hugging Face hub that serves a folder, for the tests of downloads.

    ROOT/models/ORG/NAME/config.json …      ROOT/datasets/ORG/NAME/data/train.jsonl …

    with Hub(root) as hub:
        subprocess.run(command, env=os.environ | hub.environ(tmp_path / "hf-home"))

huggingface-hub reads HF_ENDPOINT when it is imported, so clients run in a separate process. Files may change
while the hub runs; the next answer then has another commit. Answers have the headers of the real hub
(X-Repo-Commit, ETag, X-Linked-Size, X-Linked-ETag, X-Error-Code); bodies are whole or by Range. As on the
real hub, large files redirect to another server, here another port, which must not receive the token. `python
tests/stand_in_hub.py ROOT` serves a folder until Ctrl-C, to try it by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote, urlsplit

# A "/" in a revision's name arrives as %2F.
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
STORED = re.compile(r"/stored/((?:models|datasets)/[^/]+/[^/]+)/([0-9a-f]{40})/(.+)")  # on the other port
SAYS = {401: "RepoNotFound", 403: "GatedRepo", 404: "EntryNotFound"}  # X-Error-Code of the real hub
PIECE = 1 << 16  # bytes per write


class Hub:
    """The local hub. Its switches may be set at any time.

    refuse: prefix of "models/ORG/NAME/FILE" or "datasets/…" -> status of every answer about it: 401 (absent
    or private), 403 (gated: as on the real hub its files are listed but not served), 404, 429, 500. refusals:
    prefix -> number of times that it refuses; without an entry always. spoil: "models/ORG/NAME/FILE" -> "cut"
    (the connection ends half-way) or "corrupted" (one bit is wrong). busy: headers of an answer 429. token:
    the accepted token ("": any). revisions: "models/ORG/NAME" -> branch or tag -> the folder with its files.
    tags: "models/ORG/NAME" -> its tags. pause: seconds before each 64 KiB of a body. log: (method, path,
    Range) of every request. sent: bytes of files. shown: (port, Authorization) of every request.
    """

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root
        self.refuse: dict[str, int] = {}
        self.refusals: dict[str, int] = {}
        self.spoil: dict[str, str] = {}
        self.busy = {"Retry-After": "0"}
        self.token = ""
        self.revisions: dict[str, dict[str, Path]] = {}
        self.tags: dict[str, list[str]] = {}
        self.pause = 0.0
        self.log: list[tuple[str, str, str]] = []
        self.shown: list[tuple[int, str]] = []
        self.sent = 0
        answers = type("Answers", (_Answers,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", p), answers) for p in (port, 0)]
        self.port, self.store = (s.server_port for s in self.servers)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:  # noqa: PYI034 (Python 3.10 has no Self)
        for server in self.servers:
            server.daemon_threads = True
            Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environ(self, home: Path) -> dict[str, str]:
        """Return environment variables for a client of this hub with an empty cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": "", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """Return {path: bytes} of "models/ORG/NAME" at a branch, tag or commit; None if there is none."""
        named = {"main": self.root / repo} | self.revisions.get(repo, {})
        if revision in named:
            return _files(named[revision])
        return next((f for f in map(_files, named.values()) if commit(f) == revision), None)

    def refused(self, path: str, gives_file: bool) -> int:
        """Return the status that a switch sets for this path, or 0."""
        for prefix, status in self.refuse.items():
            if f"{path}/".startswith(f"{prefix}/") and (gives_file or status != HTTPStatus.FORBIDDEN):
                if self.refusals.get(prefix, 1) <= 0:
                    continue
                if prefix in self.refusals:
                    self.refusals[prefix] -= 1
                return status
        return 0


def _files(folder: Path) -> dict[str, bytes]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def commit(files: dict[str, bytes]) -> str:
    """Return forty digits that change with any file."""
    return hashlib.sha1(b"".join(n.encode() + hashlib.sha1(b).digest() for n, b in files.items())).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = urlsplit(self.path).path
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token, port = self.headers.get("Authorization", ""), self.server.server_address[1]
        self.hub.log.append((self.command, unquote(path), self.headers.get("Range", "")))
        self.hub.shown.append((port, token))
        if port == self.hub.store:
            match = STORED.fullmatch(unquote(path))
            return self.stored(*match.groups()) if match else self.error(403, "")
        if token and self.hub.token and token != f"Bearer {self.hub.token}":
            return self.error(401, "", says="Invalid credentials in Authorization header")
        if match := API.fullmatch(path):
            kind, name, what, revision, rest = (unquote(g or "") for g in match.groups())
            self.repo(f"{kind}/{name}", what or "revision", revision or "main", rest, asked)
        elif match := RESOLVE.fullmatch(path):
            kind, name, revision, file = (unquote(g or "") for g in match.groups())
            self.file(f"{kind or 'models'}/{name}", revision, file)
        else:
            self.error(404, "RepoNotFound")

    def known(self, repo: str, revision: str, file: str = "") -> dict[str, bytes] | None:
        """Return the files of a repo, or None after sending an error."""
        files = self.hub.files(repo, revision)
        if status := self.hub.refused(f"{repo}/{file}".rstrip("/"), bool(file)):
            self.error(status, "RepoNotFound" if status == 404 and not file else SAYS.get(status, ""))
        elif not self.hub.files(repo):
            self.error(401, "RepoNotFound")  # the real hub does not disclose private repositories
        elif files is None:
            self.error(404, "RevisionNotFound")
        else:
            return files
        return None

    def repo(self, repo: str, what: str, revision: str, under: str, asked: bytes) -> None:
        files = self.known(repo, revision)
        if files is None:
            return
        entries = [_entry(name, body) for name, body in files.items()]
        if what == "tree":
            deep = "recursive=true" in self.path.lower()
            inside = [e for e in entries if e["path"].startswith(f"{under.rstrip('/')}/" if under else "")]
            start = len(under.rstrip("/")) + 1 if under else 0
            shown = [e for e in inside if deep or "/" not in e["path"][start:]]
            folders = {e["path"][: e["path"].index("/", start)] for e in inside if "/" in e["path"][start:]}
            dirs = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in sorted(folders)]
            return self.json(dirs + shown)
        if what == "paths-info":
            wanted = json.loads(asked)["paths"] if asked.startswith(b"{") else []
            return self.json([e for e in entries if e["path"] in wanted])
        gated = "auto" if self.hub.refuse.get(repo) == HTTPStatus.FORBIDDEN else False
        name = repo.partition("/")[2]
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
            | ({"lfs": e["lfs"] | {"sha256": e["lfs"]["oid"]}} if "lfs" in e else {})
            for e in entries
        ]
        about = {"id": name, "modelId": name, "sha": commit(files), "private": False, "gated": gated}
        self.json(
            about | {"siblings": siblings, "tags": self.hub.tags.get(repo, []), "downloads": 0, "likes": 0}
        )

    def file(self, repo: str, revision: str, name: str) -> None:
        files = self.known(repo, revision, name)
        if files is None:
            return
        if name not in files:
            return self.error(404, "EntryNotFound", commit(files))
        sha, etag = commit(files), f'"{_etag(name, files[name])}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "X-Linked-ETag": etag, "Accept-Ranges": "bytes",
                   "X-Linked-Size": str(len(files[name])), "Content-Type": "application/octet-stream"}  # fmt: skip
        if _is_lfs(name):
            place = f"http://127.0.0.1:{self.hub.store}/stored/{repo}/{sha}/{quote(name)}"
            return self.send(302, b"", headers | {"Location": place})
        self.body(repo, name, files[name], headers)

    def stored(self, repo: str, sha: str, name: str) -> None:
        """Answer as the storage server, which knows hashes but no repositories."""
        files = self.hub.files(repo, sha) or {}
        if status := self.hub.refused(f"{repo}/{name}", True):
            return self.error(status, "")
        self.body(
            repo, name, files[name], {"ETag": f'"{_etag(name, files[name])}"', "Accept-Ranges": "bytes"}
        )

    def body(self, repo: str, name: str, body: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the requested range of it."""
        if self.hub.spoil.get(f"{repo}/{name}") == "corrupted":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.send(200, body, headers, f"{repo}/{name}")
        start, end = int(part[1]), min(int(part[2] or len(body)) + 1, len(body))
        if start >= len(body):
            return self.send(416, b"", headers | {"Content-Range": f"bytes */{len(body)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        self.send(206, body[start:end], headers, f"{repo}/{name}")

    def send(self, status: int, body: bytes, headers: dict[str, str], path: str = "") -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.spoil.get(path) == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        try:
            for at in range(0, len(body), PIECE):
                time.sleep(self.hub.pause if path else 0)
                self.wfile.write(body[at : at + PIECE])
                self.hub.sent += len(body[at : at + PIECE]) if path else 0
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was stopped

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str, sha: str = "", says: str = "") -> None:
        said = {"X-Error-Code": code} if code else {}
        said |= {"X-Error-Message": says or HTTPStatus(status).phrase} if code or says else {}
        said |= {"X-Repo-Commit": sha} if sha else {}
        said |= self.hub.busy if status == HTTPStatus.TOO_MANY_REQUESTS else {}
        self.send(status, b"{}", said)


def _etag(name: str, body: bytes) -> str:
    """Return the ETag: SHA-256 for large and binary files, git's blob hash for others."""
    if _is_lfs(name):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".parquet", ".bin", ".gz", ".model"))


def _entry(name: str, body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(body),
        "oid": _etag(name, body)[:40],
    }
    if _is_lfs(name):
        found["lfs"] = {"oid": _etag(name, body), "size": len(body), "pointerSize": 134}
    return found


if __name__ == "__main__":
    with Hub(Path(sys.argv[1]), 8000) as served:
        print(f"HF_ENDPOINT={served.url}")
        while True:
            time.sleep(60)
