"""Capabilities of the terminal (colour, redraws, characters, width), and safe output of text."""

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

# A model's text may contain escape sequences, which could change the terminal's display or input.
_CONTROLS = {
    c: None
    for c in (*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F))
    if c not in (9, 10)
}


@dataclass(frozen=True)
class Glyphs:
    """Characters of the user interface, in Unicode; ASCII below is for other terminals."""

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
    """Capabilities of the streams of this process."""

    interactive: bool  # stdin and stdout are both terminals
    live: bool  # rows can be redrawn, keys read one by one
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
    """Inspect the streams and the environment (NO_COLOR, TERM). plain: no colour, no redraws."""
    interactive = _isatty(sys.stdin) and _isatty(sys.stdout)
    live = interactive and not plain and env.get("TERM", "") not in ("dumb", "unknown")
    if live and sys.platform == "win32":
        os.system("")  # as a side effect, enables escape sequences in the Windows console
    return Terminal(interactive, live, live and not env.get("NO_COLOR"), speaks_unicode(sys.stdout))


def _isatty(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def speaks_unicode(stream: TextIO) -> bool:
    try:
        return codecs.lookup(stream.encoding or "ascii").name.startswith("utf")
    except LookupError:
        return False


def forgive_encodings() -> None:
    """Replace characters outside a stream's encoding by "?" or U+FFFD instead of raising."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def safe(text: str) -> str:
    """Remove control characters and direction overrides; keep tabs and line feeds."""
    return text.translate(_CONTROLS)


def wrapped(text: str, stream: TextIO, indent: int = 0) -> str:
    """Wrap text between words at the terminal's width and indent the rest; unchanged for a pipe."""
    if not _isatty(stream):
        return text
    columns = max(20, shutil.get_terminal_size().columns)
    lines = textwrap.wrap(
        text, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Hide keys while an answer streams, and keep them for the next prompt.

    Also distinguishes Enter from Ctrl-J (in the usual mode both are line feeds). The terminal's mode is restored however
    the program ends, except by kill -9.
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
        with suppress(termios.error):  # the terminal is closed
            termios.tcsetattr(at, termios.TCSANOW, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """End with the signal's exit code, after every `finally`."""
    raise SystemExit(128 + number)
