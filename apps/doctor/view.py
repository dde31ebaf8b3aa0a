"""Print findings on a terminal: a mark, a line, and the fix below it."""

from __future__ import annotations

import os

import click

from tinychat_mlx.apps.doctor.finding import BROKEN, NOTE, OK, Finding, Section, problems
from tinychat_mlx.apps.models.table import hanging
from tinychat_mlx.apps.terminal import detect, safe

MARKS = {OK: "✓", NOTE: "!", BROKEN: "✗", "": " "}
ASCII = {OK: "+", NOTE: "!", BROKEN: "x", "": " "}
COLOURS = {OK: "green", NOTE: "yellow", BROKEN: "red"}


def show(sections: list[Section], ok: bool) -> None:
    """Print all sections and a summary line."""
    terminal = detect()
    simple = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not terminal.unicode
    marks, colour = ASCII if simple else MARKS, terminal.colour
    for section in sections:
        click.echo(click.style(section.title, bold=True) if colour else section.title)
        for finding in section.findings:
            if finding.text is not None:
                _line(finding, marks, colour, "->" if simple else "→")
        click.echo()
    click.echo(summary(sections, ok))


def _line(finding: Finding, marks: dict[str, str], colour: bool, arrow: str) -> None:
    mark = marks[finding.state]
    text = hanging(f"  {mark} {' '.join(safe(finding.line).split())}", 4)
    if colour and finding.state:
        text = text.replace(mark, click.style(mark, fg=COLOURS[finding.state]), 1)
    click.echo(text)
    if finding.do:
        click.echo(hanging(f"    {arrow} {safe(finding.do)}", 4 + len(arrow) + 1))


def summary(sections: list[Section], ok: bool) -> str:
    found = [p["state"] for p in problems(sections)]
    broken, notes = found.count(BROKEN), found.count(NOTE)
    words = [f"{n} {name}{'s' * (n != 1)}" for n, name in ((broken, "problem"), (notes, "note")) if n]
    state = "the chosen backend runs" if ok else "the chosen backend cannot run"
    return f"{', '.join(words) or 'no problems'}: {state}"
