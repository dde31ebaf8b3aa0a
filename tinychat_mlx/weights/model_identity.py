"""The identity of a model folder: what changes when its files change, found without reading all weights.

| function | looks at | used for |
|---|---|---|
| `fingerprint` | path, sizes, inodes, times, headers | packed weights |
| `add_samples` | sizes, times, samples of the bytes | keys and values of conversations |
| `weight_files` | names, sizes, times | resuming a conversion |

A folder may move for the last two, because their results do not depend on where it is.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from tinychat_mlx.weights.safetensors import MAX_HEADER

if TYPE_CHECKING:
    from hashlib import _Hash

WEIGHTS = "*.safetensors"
MATTERS = (WEIGHTS, "*.safetensors.index.json", "config.json", "*quant_config.json")
SAMPLES, SAMPLE = 64, 4096  # of each weight file: places looked at, and bytes at each


def weight_files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of the last change in ns of each weight file. Raises OSError."""
    found = [(path.name, path.stat()) for path in sorted(folder.glob(WEIGHTS))]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def add_samples(digest: _Hash, folder: Path) -> None:
    """Add each weight file's size, time of the last change and samples of its bytes to a hash. Raises OSError."""
    for name, size, changed_ns in weight_files(folder):
        digest.update(f"{name} {size} {changed_ns}".encode())
        with (folder / name).open("rb") as file:
            for at in range(SAMPLES):
                file.seek(size * at // SAMPLES)
                digest.update(file.read(SAMPLE))


def fingerprint(folder: Path) -> str:
    """A hash of what a model folder is now; "" if its files cannot be asked.

    Of each file that shapes the weights it takes in name, size, inode and both times, and what JSON or a header says.
    A program may set the time of change to any value, and two models may share a header: but the time at which the
    system noted the last change cannot be set by a program. Take it before the files are opened: if they are replaced
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
