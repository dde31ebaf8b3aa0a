"""What can this terminal show? Colour, redraws, characters, width; and how text reaches it safely."""

from __future__ import annotations

import codecs
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TextIO

# A model's text may hold escape sequences; a terminal that obeyed them could be made to lie or to type.
_CONTROLS = {
    c: None
    for c in (*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F))
    if c not in (9, 10)
}


@dataclass(frozen=True)
class Glyphs:
    """Characters for furniture; the second set is for terminals that speak no Unicode."""

    prompt: str = "❯ "
    more: str = "… "
    bullet: str = "•"
    rule: str = "─"
    bar: str = "│"
    full: str = "▰"
    empty: str = "▱"
    dot: str = " · "
    dash: str = "—"
    ellipsis: str = "…"
    arrow: str = "→"
    fold: str = "▸"


ASCII = Glyphs("> ", ". ", "*", "-", "|", "#", ".", " | ", "-", "...", "->", "+")


@dataclass(frozen=True)
class Terminal:
    """What the streams of this process are good for."""

    interactive: bool  # a person types: stdin and stdout are both terminals
    live: bool  # rows may be redrawn, keys read one by one
    colour: bool
    unicode: bool

    @property
    def glyphs(self) -> Glyphs:
        return Glyphs() if self.unicode else ASCII

    @property
    def width(self) -> int:
        return max(20, shutil.get_terminal_size().columns)

    @property
    def height(self) -> int:
        return max(5, shutil.get_terminal_size().lines)


def detect(plain: bool = False, env: Mapping[str, str] = os.environ) -> Terminal:
    """Look at the streams and the environment (NO_COLOR, TERM); `plain` asks for neither colour nor redraws."""
    interactive = _isatty(sys.stdin) and _isatty(sys.stdout)
    live = interactive and not plain and env.get("TERM", "") not in ("dumb", "unknown")
    if live and sys.platform == "win32":
        os.system("")  # has the side effect of switching escape sequences on in the Windows console
    return Terminal(interactive, live, live and not env.get("NO_COLOR"), speaks_unicode(sys.stdout))


def _isatty(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def speaks_unicode(stream: TextIO) -> bool:
    try:
        return codecs.lookup(stream.encoding or "ascii").name.startswith("utf")
    except LookupError:
        return False


def forgive_encodings() -> None:
    """A character outside a stream's encoding becomes "?" or U+FFFD instead of ending the program."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def safe(text: str) -> str:
    """Text without control characters or direction overrides, tabs and line feeds kept."""
    return text.translate(_CONTROLS)


def wrapped(text: str, stream: TextIO, indent: int = 0) -> str:
    """Text broken between words where the terminal ends, the rest indented; for a pipe as it is."""
    if not _isatty(stream):
        return text
    columns = max(20, shutil.get_terminal_size().columns)
    lines = textwrap.wrap(
        text, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


@contextmanager
def quiet_keys() -> Iterator[None]:
    """While an answer streams, keys are neither shown nor lost: the next prompt gets them.

    Also keeps Enter apart from Ctrl-J (both are line feeds to a terminal in its usual mode). However the program
    is ended, short of kill -9, the terminal gets its mode back.
    """
    try:
        import termios

        at = sys.stdin.fileno()
        before = termios.tcgetattr(at)
    except (ImportError, OSError, ValueError):
        yield
        return
    quiet = termios.tcgetattr(at)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    handlers = {s: signal.signal(s, _end) for s in (signal.SIGTERM, signal.SIGHUP)}
    termios.tcsetattr(at, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # a terminal that has gone needs no mode
            termios.tcsetattr(at, termios.TCSANOW, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """End as a signal would, but through every `finally`."""
    raise SystemExit(128 + number)
