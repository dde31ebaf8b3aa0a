"""Separate a model's thought from its answer, and show it: folded into one line, or streamed dimmed.

Models think between <think> and </think> at the beginning of an answer. Some templates write the opening tag, so
that only the closing tag is in the answer.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.text import Text

from tinychat_mlx.apps.chat import markdown
from tinychat_mlx.apps.chat.stream import MarkdownAnswer
from tinychat_mlx.apps.terminal import safe

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.view import View

OPEN, CLOSE = "<think>", "</think>"


class Splitter:
    """Separates thought from answer in streamed text; a tag may be split across pieces."""

    def __init__(self, inside: bool = False) -> None:
        self.state = "thought" if inside else "start"  # start | thought | gap (after it) | answer
        self.held = ""  # possible beginning of a tag

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """Add text -> pieces (is_thought, text). The total may be shorter or longer than this text."""
        self.held += text
        pieces: list[tuple[bool, str]] = []
        if self.state == "start":
            begun = self.held.lstrip()
            if OPEN.startswith(begun[: len(OPEN)]) and len(begun) < len(OPEN):
                return []
            if begun.startswith(OPEN):
                self.state, self.held = "thought", begun[len(OPEN) :].lstrip("\n")
            else:
                self.state = "answer"
        if self.state == "thought":
            thought, closed, rest = self.held.partition(CLOSE)
            if closed:
                pieces.append((True, thought))
                self.state, self.held = "gap", rest
            else:
                keep = _overlap(self.held, CLOSE)
                pieces.append((True, self.held[: len(self.held) - keep]))
                self.held = self.held[len(self.held) - keep :]
        if self.state == "gap" and self.held.strip():
            self.state, self.held = "answer", self.held.lstrip()
        if self.state == "answer":
            pieces.append((False, self.held))
            self.held = ""
        return [p for p in pieces if p[1]]

    def flush(self) -> list[tuple[bool, str]]:
        """Return the text held back, which was not a tag."""
        held, self.held = self.held, ""
        return [(self.state == "thought", held)] if held and self.state != "gap" else []


def _overlap(text: str, tag: str) -> int:
    """Return the number of characters at the end of text that may begin the tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class Thought:
    """Shows a thought: its last words in a temporary row, or all of it dimmed; then a summary line."""

    def __init__(self, view: View, unfold: bool) -> None:
        self.view, self.started = view, time.monotonic()
        live = view.terminal.live
        self.rows = Unfolded(view.out, view.terminal) if unfold and live else None
        self.folded = MarkdownAnswer(view.out, view.terminal) if live and not unfold else None
        self.plain = unfold and not live
        self.text, self.drawn = "", 0.0

    def feed(self, text: str) -> None:
        self.text += text
        if self.rows is not None:
            self.rows.feed(text)
        elif self.folded is not None and time.monotonic() - self.drawn > 0.1:
            self.drawn = time.monotonic()
            self.folded.status(f"thinking {self.view.glyphs.ellipsis} {self._last_words()}")
        elif self.plain:
            self.view.notes.file.write(safe(text))

    def finish(self) -> None:
        """Print the summary line: duration and number of words."""
        if self.rows is not None:
            self.rows.finish()
        if self.folded is not None:
            self.folded.status("")
        if self.plain:
            self.view.say()
        seconds, words = time.monotonic() - self.started, len(self.text.split())
        if words:
            hint = " (/think show unfolds)" if self.rows is None and not self.plain else ""
            self.view.note(f"{self.view.glyphs.fold} thought for {seconds:.1f} s, {words:,} words{hint}")

    def _last_words(self) -> str:
        room = max(10, self.view.terminal.width - 16)
        return " ".join(safe(self.text[-4 * room :]).split())[-room:]


class Unfolded(MarkdownAnswer):
    """Prints a whole thought, dimmed, after a bar."""

    def _parse(self, line: str) -> markdown.Line:
        bar = Text(f"{self.glyphs.bar} ", "dim")
        return markdown.Line(line, bar, bar, "dim")

    def _is_block(self, line: str) -> bool:
        return False
