"""Style lines of Markdown. Independent of the terminal and the cursor.

A chat's Markdown arrives and is printed line by line, so this module parses single lines: kind, indent, styled text.
A line break in the source is a line break on the screen, as expected for verse and addresses. Only code and tables
span several lines; `stream` keeps their state.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from tinychat_mlx.apps.terminal import Glyphs

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from rich.table import Table

_HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)(?:\s+#+\s*)?$")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])(\s+)(\[[ xX]\]\s+)?(.*)$")
_QUOTE = re.compile(r" {0,3}((?:>\s?)+)(.*)$")
_RULE = re.compile(r" {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$")
FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*([^\s`]*)[^`]*$")
TABLE_ROW = re.compile(r"\s*\|")
_DELIMITER = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")

_SPAN = re.compile(  # closed spans; an opener that remains after their removal is open
    r"(`+)[^`]+\1|\*\*\*?\S.*?\*\*\*?|\*[^*\s](?:[^*]*[^*\s])?\*|(?<!\w)__?[^_\s](?:[^_]*[^_\s])?__?(?!\w)"
    r"|~~\S.*?~~|!?\[[^\]]*\]\([^)]*\)|!?\[[^\]]*\](?=[^(]|$)|<[^>\s]+>"
)
_OPENER = re.compile(r"`|\*(?=[^\s*])|\*\*$|(?<!\w)_(?=\S)|~~(?=\S)|\[")
_BEGINS = re.compile(
    r"\S|\s*(?:@|def |class |async |fn |func|pub|private |protected |static |export |const )"
)
_STYLES = {"strong": "bold", "em": "italic", "s": "strike", "link": "underline"}


@dataclass(frozen=True)
class Line:
    """A line's prefix and text: `first` precedes its first row, `rest` the rows that it wraps to."""

    source: str
    first: Text = field(default_factory=Text)
    rest: Text = field(default_factory=Text)
    style: str = ""
    rule: bool = False

    @property
    def indent(self) -> int:
        return max(cell_len(self.first.plain), cell_len(self.rest.plain))


def parse(line: str, glyphs: Glyphs) -> Line:
    """Return the kind of a line. An unfinished line may change its kind as it grows."""
    if _RULE.match(line):
        return Line("", rule=True)
    if m := _HEADING.match(line):
        return Line(m[2], style="bold cyan" if len(m[1]) < 3 else "bold")
    if m := _QUOTE.match(line):
        bar = Text(f"{glyphs.bar} " * m[1].count(">"), "dim")
        return Line(m[2], bar, bar, "italic")
    if m := _ITEM.match(line):
        indent = " " * len(m[1].expandtabs(4))
        mark = glyphs.bullet if m[2] in "-*+" else m[2]
        box = {"": "", "[ ]": "[ ] "}.get((m[4] or "").strip(), "[x] ")
        first = Text(indent).append(mark, "cyan").append(f" {box}")
        return Line(m[5], first, Text(" " * cell_len(first.plain)))
    lead = line[: len(line) - len(line.lstrip())].expandtabs(4)
    return Line(line.lstrip(), Text(lead), Text(lead))


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # Without `escape`, \( and \[ of formulas are kept. Raw HTML is printed as text.
    return MarkdownIt("commonmark").disable(["escape", "html_inline"]).enable("strikethrough")


def inline(source: str, style: str = "") -> Text:
    """Style emphasis, code and links of one line."""
    text, styles, target = Text(style=style), [""], ""
    for token in _parser().parseInline(source)[0].children or []:
        name, _, side = token.type.rpartition("_")
        if side == "open":
            styles.append(_STYLES.get(name, ""))
            target = str(token.attrs.get("href", "")) if name == "link" and token.info != "auto" else ""
        elif side == "close":
            styles.pop()
            if name == "link" and target:
                text.append(f" ({target})", "dim")
                target = ""
        elif token.type == "code_inline":
            text.append(token.content, " ".join([*filter(None, styles), "cyan"]))
        elif token.type == "image":
            text.append(f"{token.content} ").append(f"({token.attrs.get('src', '')})", "dim")
        elif token.type in ("softbreak", "hardbreak"):
            text.append("\n")
        else:
            text.append(token.content, " ".join(s for s in styles if s))
    return text


def is_closed(source: str) -> bool:
    """Whether no emphasis, code or link is open at the end of source, so that more text cannot restyle it."""
    return not _OPENER.search(_SPAN.sub("", source))


def provisional(source: str) -> str:
    """Guess the final form of an unfinished row: hide dangling markers, close open spans."""
    source = (
        source.rstrip("*_~`") if source.endswith(("*", "_", "~", "`")) and not is_closed(source) else source
    )
    for marker in ("`", "**", "*"):
        bare = _SPAN.sub("", source)
        if re.search(re.escape(marker) + r"\S", bare) and not is_closed(source):
            return source.rstrip() + marker
    return source


def is_delimiter(row: str) -> bool:
    return "-" in row and bool(_DELIMITER.match(row))


def table(rows: list[str], unicode: bool) -> Table:
    """Convert the rows of a pipe table (the second is the delimiter) to a rich table; short rows are padded."""
    from rich import box
    from rich.table import Table

    cells = [_cells(r) for r in rows if r.strip()]
    width = max(len(c) for c in cells)
    sides = [("center" if c[:1] == c[-1:] == ":" else "right" if c[-1:] == ":" else "left") for c in cells[1]]
    made = Table(box=box.SIMPLE_HEAD if unicode else box.ASCII2, header_style="bold", show_edge=False)
    for i in range(width):
        head = inline(cells[0][i]) if i < len(cells[0]) else Text()
        made.add_column(head, justify=sides[i] if i < len(sides) else "left", overflow="fold")  # type: ignore[arg-type]
    for row in cells[2:]:
        made.add_row(*(inline(c) for c in row), *[""] * (width - len(row)))
    return made


def _cells(row: str) -> list[str]:
    row = row.strip().removeprefix("|")
    row = row[:-1] if row.endswith("|") and not row.endswith("\\|") else row
    return [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", row)]


class Highlighter:
    """Highlights the lines of a code block as they arrive."""

    FEW, MOST = 20, 100  # earlier lines given to the lexer: all up to FEW, at most MOST

    def __init__(self, language: str) -> None:
        from rich.syntax import Syntax

        lexer = Syntax("", language).lexer if language else None  # once, because the lookup is slow
        self.syntax = Syntax("", lexer, theme="ansi_dark") if lexer is not None else None
        self.lines: list[str] = []

    def line(self, source: str) -> Text:
        """Highlight the next complete line."""
        made = self._colour([*self.lines, source.expandtabs(4)])
        self.lines = self._context([*self.lines, source.expandtabs(4)])
        return made

    def unfinished(self, source: str) -> Text:
        """Highlight the unfinished line without context, because this runs thirty times per second."""
        return self._colour([source.expandtabs(4)])

    def _context(self, lines: list[str]) -> list[str]:
        """Return the lines that the next one depends on; if there are many, from the last new definition."""
        if len(lines) <= self.FEW:
            return lines
        begins = [i for i in range(1, len(lines)) if not lines[i - 1].strip() and _BEGINS.match(lines[i])]
        return lines[begins[-1] if begins else 0 :][-self.MOST :]

    def _colour(self, lines: list[str]) -> Text:
        """Return the last of the lines, styled."""
        source = lines[-1]
        if self.syntax is None:
            return Text(source)
        made = self.syntax.highlight("\n".join(lines) + "\n").split("\n", allow_blank=True)
        at = len(lines) - 1
        if at < len(made) and made[at].plain.rstrip() == source.rstrip():
            return made[at]
        return Text(source)  # the lexer changed the text: print it unstyled
