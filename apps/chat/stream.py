"""Print an answer while it is generated. Finished rows are printed once and never redrawn.

Only the tail (the last few rows of the current line) is redrawn, by overwriting. So nothing flickers, and an answer
of any length is correct in the terminal's scrollback.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

from tinychat_mlx.apps.chat import markdown
from tinychat_mlx.apps.terminal import Terminal, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

FRAME_S = 1 / 30  # minimum interval between redraws in seconds
TAIL_ROWS = 4  # number of rows that a line may keep open for unclosed emphasis


class Tail:
    """The rows at the bottom that may still change."""

    def __init__(self, console: Console) -> None:
        self.console, self.rows = console, [""]
        self.plain = [0]  # width of each row on the screen in cells

    def draw(self, done: Sequence[RenderableType], tail: Sequence[Text]) -> None:
        """Print `done` permanently in place of the old tail, then the new tail, with the cursor at its end."""
        if not tail:
            tail = [Text()]
        rows = [self.ansi(row, end="") for row in tail]
        if not done and rows == self.rows:
            return
        width, height = self.console.width, self._height()
        out = "\r" + (f"\x1b[{height - 1}A" if height > 1 else "")
        if done or len(rows) < height:
            out += "\x1b[J" + "".join(self.ansi(d, end="\n") for d in done) + "\n".join(rows)
        else:  # overwrite in place; clearing the end of a full row would erase its last character
            out += "\n".join(
                r if t.cell_len >= width else r + "\x1b[K" for r, t in zip(rows, tail, strict=True)
            )
        self.rows, self.plain = rows, [row.cell_len for row in tail]
        self.console.file.write(out)
        self.console.file.flush()

    def ansi(self, renderable: RenderableType, end: str) -> str:
        with self.console.capture() as capture:
            self.console.print(renderable, end=end, soft_wrap=isinstance(renderable, Text))
        return capture.get()

    def _height(self) -> int:
        """Return the rows of the old tail on the screen now: a narrower terminal has wrapped them."""
        width = max(1, self.console.width)
        return sum(max(1, -(-cells // width)) for cells in self.plain)


class PlainAnswer:
    """Prints the answer unchanged: for pipes, dumb terminals and --plain."""

    def __init__(self, console: Console, terminal: Terminal) -> None:
        self.file, self.clean = console.file, safe if terminal.interactive else str
        self.last = "\n"

    def feed(self, text: str) -> None:
        if text:
            self.last = text[-1]
            self.file.write(self.clean(text))
            self.file.flush()

    def status(self, text: str) -> None:
        """Show nothing: plain terminals have no status line."""

    def finish(self) -> None:
        if self.last != "\n":
            self.feed("\n")


class MarkdownAnswer:
    """Prints the answer as Markdown, line by line."""

    def __init__(self, console: Console, terminal: Terminal) -> None:
        self.console, self.terminal, self.glyphs = console, terminal, terminal.glyphs
        self.tail = Tail(console)
        self.pending = ""  # source of the current line that is not yet printed permanently
        self.line: markdown.Line | None = None  # the current line's prefix, set when its first row is printed
        self.prefix = Text()  # the text of the open row whose style is final
        self.code: markdown.Highlighter | None = None
        self.fence = ("", "")  # indent and marker of the opening fence
        self.rows: list[str] = []  # rows of a table, until it ends
        self.blank = False  # a blank line to print before the next text
        self.started = False
        self.drawn = 0.0

    def feed(self, text: str) -> None:
        """Add the next piece of the answer."""
        done: list[RenderableType] = []
        *lines, self.pending = (self.pending + safe(text)).split("\n")
        for line in lines:
            done += self._finished(line)
        now = time.monotonic()
        if done or now - self.drawn >= FRAME_S:
            done += self._overflow()
            self.tail.draw(done, self._open_rows())
            self.drawn = now

    def status(self, text: str) -> None:
        """Show a temporary status until something else is drawn."""
        self.tail.draw([], [Text(text, "dim", no_wrap=True)[: self.console.width - 1]] if text else [])

    def finish(self) -> None:
        """End the answer: print the open rows."""
        done = self._finished(self.pending) if self.pending or self.prefix else []
        self.pending = ""
        done += self._end_table() + self._end_code()
        self.tail.draw(done, [])

    # lines ------------------------------------------------------------------------------------------
    def _finished(self, line: str) -> list[RenderableType]:
        """Return the rows to print permanently for a complete line."""
        if self.code is not None:
            return self._code_line(line)
        if self.line is not None:  # its first rows are already printed
            rows = self._wrap(self.line, line)
            self.line, self.prefix = None, Text()
            return list(rows)
        if self.rows and not markdown.TABLE_ROW.match(line):
            return [*self._end_table(), *self._finished(line)]
        if not line.strip():
            self.blank = self.started
            return []
        gap: list[RenderableType] = [Text()] if self.blank else []
        self.blank, self.started = False, True
        if self._is_block(line) and (m := markdown.FENCE.match(line)):
            self.fence, self.code = (m[1], m[2]), markdown.Highlighter(m[3])
            return [*gap, self._ruler(m[3])]
        if self._is_block(line):
            self.rows.append(line)
            return gap
        parsed = self._parse(line)
        return [*gap, self._ruler()] if parsed.rule else [*gap, *self._wrap(parsed, parsed.source)]

    def _parse(self, line: str) -> markdown.Line:
        return markdown.parse(line, self.glyphs)

    def _is_block(self, line: str) -> bool:
        """Whether this line opens a code block or belongs to a table."""
        return bool(markdown.FENCE.match(line) or markdown.TABLE_ROW.match(line))

    def _code_line(self, line: str) -> list[RenderableType]:
        assert self.code is not None
        indent, marker = self.fence
        if line.strip().startswith(marker) and not line.strip().strip(marker[0]):
            return self._end_code()
        return [self.code.line(line.removeprefix(indent))]

    def _end_code(self) -> list[RenderableType]:
        was, self.code = self.code, None
        return [self._ruler()] if was is not None else []

    def _end_table(self) -> list[RenderableType]:
        rows, self.rows = self.rows, []
        if len(rows) > 1 and markdown.is_delimiter(rows[1]):
            return [markdown.table(rows, self.terminal.unicode)]
        return [row for r in rows for row in self._wrap(markdown.Line(r), r)]

    def _ruler(self, title: str = "") -> Text:
        width = min(self.console.width, 60)
        lead = f"{self.glyphs.rule * 2} {title} " if title else ""
        return Text(lead + self.glyphs.rule * (width - cell_len(lead)), "dim")

    # rows -------------------------------------------------------------------------------------------
    def _wrap(self, line: markdown.Line, source: str, final: bool = True) -> list[Text]:
        """Wrap the open row's prefix and source. final: False guesses the final form."""
        words = self.prefix.copy()
        words.append_text(markdown.inline(source if final else markdown.provisional(source), line.style))
        # Terminals and width tables disagree about some emoji, so leave two cells of slack.
        width = max(8, self.console.width - line.indent - 2)
        rows = words.wrap(self.console, width, overflow="fold") if words else [Text()]
        again = self.line is not None
        return [
            (line.rest if again or i else line.first).copy().append_text(row) for i, row in enumerate(rows)
        ]

    def _overflow(self) -> list[RenderableType]:
        """Return the rows of the unfinished line that can no longer change."""
        if self.code is not None or self.rows or not self.pending.strip():
            return []
        line = self.line or self._parse(self.pending)
        source = self.pending if self.line else line.source
        if line.rule or (self.line is None and self._is_block(self.pending)):
            return []
        head = source[: _last_break(source)]
        rows = self._wrap(line, head)
        if len(rows) < 2 or not (markdown.is_closed(head) or len(rows) > TAIL_ROWS):
            return []
        gap: list[RenderableType] = [Text()] if self.blank else []
        self.blank, self.started = False, True
        self.line, self.prefix = line, rows[-1][len(line.rest) :]
        self.pending = source[len(head) :]
        return [*gap, *rows[:-1]]

    def _open_rows(self) -> list[Text]:
        """Return the last rows of the current line."""
        if self.code is not None:
            row = self.code.unfinished(self.pending.removeprefix(self.fence[0]))
            row.truncate(self.console.width - 1, overflow="ellipsis")
            return [row]
        rows: list[Text] = []
        if self.rows:
            note = f"{self.glyphs.ellipsis} table, {len(self.rows)} rows"
            rows = [Text(note, "dim")]
        elif self.line is not None:
            rows = self._wrap(self.line, self.pending, final=False)
        elif self.pending.strip() and not self._is_block(self.pending):
            line = self._parse(self.pending)
            rows = [self._ruler()] if line.rule else self._wrap(line, line.source, final=False)
        gap = [Text()] if self.blank and rows else []
        return [*gap, *rows][-min(TAIL_ROWS + 2, self.terminal.height - 2) :]


def _last_break(source: str) -> int:
    """Return where source can be cut so that its end may still grow: before its last word or wide characters."""
    cut = len(source.rstrip())
    for back in range(1, min(40, cut)):
        c = source[cut - back]
        if c.isspace() or ord(c) >= 0x2E80:
            return cut - back
    return cut
