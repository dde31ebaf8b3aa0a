"""Format byte counts and OS errors for display."""

from __future__ import annotations

import errno

# errno -> the reason, and the remedy.
REFUSALS = {
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "check the path"),
    errno.EISDIR: ("this is a folder", "give a file"),
    errno.EEXIST: ("it exists already", "give another name"),
    errno.EACCES: ("no permission", "choose another place, or let its owner do it"),
    errno.EPERM: ("no permission", "choose another place, or let its owner do it"),
    errno.EROFS: ("this disk can only be read", "choose another place"),
    errno.ENOSPC: ("the disk is full", "make room, or choose another disk"),
    errno.EDQUOT: ("your share of the disk is used up", "make room, or choose another disk"),
    errno.EFBIG: ("larger than a file may be here", "choose another disk"),
    errno.ENAMETOOLONG: ("the name is too long", "shorten it"),
    errno.ELOOP: ("its links lead in a circle", "check the path"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.EIO: ("the disk cannot read or write it", "check the disk"),
}
LONGEST = 120  # characters of a path that are printed


def size(n: float) -> str:
    """Format a byte count with a decimal unit: 7.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def lasting(seconds: float) -> str:
    """Format a time for display: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def of_the_system(error: OSError) -> str:
    """Format an OSError as "path: reason — remedy"."""
    if error.errno is None:
        return str(error)
    where, reason, remedy = refusal(error)
    return f"{where}: {reason} — {remedy}" if where else f"{reason} — {remedy}"


def refusal(error: OSError) -> tuple[str, str, str]:
    """Split an OSError into its path ("" if none), the reason and the remedy."""
    paths = [_short(str(p)) for p in (error.filename, error.filename2) if p is not None]
    other = (error.strerror or str(error), "check it; `tinychat --debug …` shows what was tried")
    return " -> ".join(paths), *REFUSALS.get(error.errno or 0, other)


def _short(path: str) -> str:
    return path if len(path) <= LONGEST else f"{path[: LONGEST - 20]}…{path[-19:]}"
