"""Open files that come from elsewhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from tinychat_mlx.base.errors import FormatError


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises FormatError for a folder, or a pipe, which would block."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FormatError("the file is missing", where=path) from None
    except (OSError, ValueError) as error:  # Windows cannot open folders; other systems fail the check below
        reason = (
            "is a folder, not a file"
            if path.is_dir()
            else f"cannot be opened: {getattr(error, 'strerror', None) or error}"
        )
        raise FormatError(reason, where=path) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError("not a regular file (a folder, pipe or device)", where=path)
    return os.fdopen(fd, "rb")
