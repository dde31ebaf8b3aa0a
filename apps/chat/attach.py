"""Files attached to a message: /file PATH, or @path in the text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.base.wording import size

MOST_BYTES = 1_000_000  # far above any context; a larger file is a mistake
_MENTION = re.compile(r'(?<!\S)@(?:"([^"]+)"|(\S+))')


@dataclass(frozen=True)
class Attachment:
    """A text file, read when it was attached."""

    name: str
    text: str

    def describe(self) -> str:
        return f"{self.name} ({size(len(self.text.encode()))}, {self.text.count(chr(10)) + 1} lines)"

    def quoted(self) -> str:
        """Return the file in a code fence that is longer than any fence inside it."""
        ticks = max((len(m) for m in re.findall(r"`{3,}", self.text)), default=2) + 1
        fence = "`" * max(3, ticks)
        return f"{self.name}:\n{fence}\n{self.text.rstrip()}\n{fence}"


def read(path: str) -> Attachment:
    """Read a text file. Raises UsageError with the reason if that fails."""
    at = Path(path).expanduser()
    try:
        if not at.is_file():
            raise UsageError("no such file", where=path, remedy="check the path")
        if at.stat().st_size > MOST_BYTES:
            raise UsageError(
                f"the file has {size(at.stat().st_size)}, more than fits a context",
                where=path,
                remedy="attach a part of it",
            )
        return Attachment(at.name, at.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UsageError("not UTF-8 text", where=path, remedy="attach a text file") from None
    except OSError as e:
        raise UsageError(
            f"cannot be read: {e.strerror}", where=path, remedy="give a file that you may read"
        ) from None


def expand(text: str, attached: list[Attachment]) -> tuple[str, list[Attachment]]:
    """Prepend the attached files to the message -> (content, the existing files named by @path)."""
    names = [m[1] or m[2].rstrip(",;:!?.") for m in _MENTION.finditer(text)]
    mentioned = [read(name) for name in dict.fromkeys(names) if Path(name).expanduser().is_file()]
    return "\n\n".join([*(a.quoted() for a in [*attached, *mentioned]), text]), mentioned


def complete(before: str) -> Iterable[tuple[str, int, str]]:
    """Complete the path after an @ before the cursor."""
    m = re.search(r"(?<!\S)@(\S*)$", before)
    yield from paths(m[1]) if m else ()


def paths(typed: str) -> Iterable[tuple[str, int, str]]:
    """Yield paths that begin with the text typed."""
    folder, _, begin = typed.rpartition("/")
    root = Path(f"{folder}/" if folder or typed.startswith("/") else ".").expanduser()
    try:
        found = sorted(p for p in root.iterdir() if p.name.startswith(begin))
    except OSError:
        return
    for path in [p for p in found if begin.startswith(".") or not p.name.startswith(".")][:50]:
        yield path.name + ("/" if path.is_dir() else ""), -len(begin), "folder" if path.is_dir() else "file"
