"""Print tables: aligned to the terminal's width, or as plain lines to a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence

import click


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Print rows below a head. The last column wraps at the terminal's width. right: right-aligned columns.

    If the terminal is too narrow for the columns, each row is printed as a block of lines.
    """
    wide = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    start = sum(wide[:-1]) + 2 * (len(wide) - 1)
    if start + min(wide[-1], 16) > width():
        for row in rows:
            rest = ", ".join(f"{h} {v}" for h, v in zip(head[1:], row[1:], strict=True) if v)
            click.echo(f"{click.style(row[0], bold=True)}\n{hanging(f'  {rest}', 2)}")
        return
    for i, row in enumerate([head, *rows]):
        cells = [
            f"{c:>{w}}" if j in right else f"{c:<{w}}" for j, (c, w) in enumerate(zip(row, wide, strict=True))
        ]
        line = hanging("  ".join(cells).rstrip(), start)
        click.echo(click.style(line, bold=True) if i == 0 else line)


def hanging(text: str, indent: int) -> str:
    """Wrap a line at the terminal's width and indent the rest."""
    if len(text) <= width():
        return text
    lines = textwrap.wrap(text[indent:], max(10, width() - indent), break_on_hyphens=False)
    return text[:indent] + ("\n" + " " * indent).join(lines)


def width() -> int:
    """Return the columns of the terminal; for a pipe there is no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 30
