"""Is this the very model that was loaded before? Told without reading its weights."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from tinychat_mlx.tensorfile import MAX_HEADER

MATTERS = ("*.safetensors", "*.safetensors.index.json", "config.json", "*quant_config.json")


def fingerprint(folder: Path) -> str:
    """A hash of what a model folder is now; "" if its files cannot be asked.

    Of each file that shapes the weights it takes in name, size, inode and both times, and what JSON or a header says.
    A program may set the time of change to any value, and two models may share a header: but the time at which the
    system noted the last change is nobody's to set. Take it before the files are opened: if they are replaced
    meanwhile, it is the fingerprint of files that will never be seen again.
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
                # Asked for more than there is, Python would allot it.
                digest.update(file.read(min(length, info.st_size, MAX_HEADER)))
    except (OSError, UnicodeEncodeError):
        return ""
    return digest.hexdigest()
