"""Detect whether a model folder changed, without reading its weights."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from tinychat_mlx.tensorfile import MAX_HEADER

MATTERS = ("*.safetensors", "*.safetensors.index.json", "config.json", "*quant_config.json")


def fingerprint(folder: Path) -> str:
    """Return a hash of the current state of a model folder, or "" if a file cannot be read.

    The hash covers the name, size, inode, mtime and ctime of each file that determines the weights, and the content of
    JSON files and safetensors headers. A program can set mtime, and two models can have equal headers, but no program can
    set ctime. Call this before opening the files: if they are replaced in between, the fingerprint belongs to the old
    files and matches nothing later.
    """
    digest = hashlib.sha256(os.fsencode(folder.resolve()))
    try:
        for path in sorted({path for pattern in MATTERS for path in folder.glob(pattern)}):
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                return ""
            numbers = info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns
            digest.update(repr((path.name, numbers)).encode())
            with path.open("rb") as file:
                length = info.st_size
                if path.suffix == ".safetensors":
                    length = int.from_bytes(file.read(8), "little")
                # Python allocates the requested size up front, so cap it at the file's size.
                digest.update(file.read(min(length, info.st_size, MAX_HEADER)))
    except (OSError, UnicodeEncodeError):
        return ""
    return digest.hexdigest()
