"""Make the documents' pictures of the chat by typing into the real program.

python tests/pictures.py        writes apps/chat/pictures/*.svg again, with this machine's name and speed
"""

from __future__ import annotations

import html
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "apps" / "chat" / "pictures"


@dataclass(frozen=True)
class Picture:
    """The typed lines and the size of the terminal. The last line is left at the prompt."""

    name: str
    title: str
    columns: int
    rows: int
    says: tuple[str, ...]
    left: str = ""
    args: tuple[str, ...] = ()


PICTURES = (
    Picture("chat", "tinychat", 88, 28, ("who are you?", "tell me a story about a fox", "/context")),
    Picture("menu", "tinychat", 88, 15, ("what is 12 + 30?",), "/se"),
    Picture("plain", "tinychat --plain", 68, 14, ("what is AWQ?",), "", ("--plain",)),
)


def taken(picture: Picture, folder: Path, *args: str) -> list[list[tuple[str, str]]]:
    """Run a chat and return the screen's rows: (text, style in rich's notation) from left to right."""
    from chat_screen import ENTER, Chats

    args = (
        "--temperature",
        "0",
        "--no-save",
        *picture.args,
        *args,
    )  # greedy decoding, the same on every machine
    screen = Chats(folder)(*args, rows=picture.rows, columns=picture.columns, real=True)
    for text in picture.says:
        screen.prompt(60)
        screen.type(text)
        screen.wait(text)
        screen.type(ENTER)
        screen.pump(0.3)
    screen.prompt(60)
    screen.type(picture.left)
    end = time.monotonic() + 1.5  # until menu and toolbar are drawn
    while time.monotonic() < end:
        screen.pump()
    rows = drawn(screen.raw, picture)
    screen.child.close(force=True)
    return rows


def drawn(raw: bytes, picture: Picture) -> list[list[tuple[str, str]]]:
    """Render the written bytes on a terminal of this size."""
    import pyte

    screen = pyte.Screen(picture.columns, picture.rows)
    pyte.ByteStream(screen).feed(re.sub(rb"\x1b\[([\d;]+)m", _dim_as_blinking, raw))
    found = []
    for y in range(picture.rows):
        cells: list[tuple[str, str]] = []
        for x in range(picture.columns):
            cell = screen.buffer[y][x]
            style = _style(cell)
            if cells and cells[-1][1] == style:
                cells[-1] = (cells[-1][0] + cell.data, style)
            else:
                cells.append((cell.data, style))
        found.append(cells)
    return found


def _dim_as_blinking(match: re.Match[bytes]) -> bytes:
    """Replace dim (2), which pyte lacks, with blinking (5); skip colour numbers after 38 and 48."""
    parameters, out = match[1].split(b";"), []
    while parameters:
        first = parameters.pop(0)
        out.append(b"5" if first == b"2" else first)
        if first in (b"38", b"48") and parameters:
            take = {b"5": 2, b"2": 4}.get(parameters[0], 0)
            out += parameters[:take]
            del parameters[:take]
    return b"\x1b[" + b";".join(out) + b"m"


def _style(cell: object) -> str:
    """Return a cell's style in rich's notation."""
    words = [w for w, on in (("bold", "bold"), ("italic", "italics"), ("underline", "underscore"), ("dim", "blink"),
                             ("reverse", "reverse")) if getattr(cell, on)]  # fmt: skip
    for ground, prefix in (("fg", ""), ("bg", "on ")):
        colour = getattr(cell, ground)
        if colour != "default":
            named = colour.replace("bright", "bright_").replace("brown", "yellow")
            words.append(prefix + (f"#{colour}" if re.fullmatch(r"[0-9a-f]{6}", colour) else named))
    return " ".join(words)


def svg(picture: Picture, rows: list[list[tuple[str, str]]]) -> str:
    """Render the screen as SVG, without the web font that rich would reference."""
    from rich.console import Console
    from rich.text import Text

    last = max(y for y, row in enumerate(rows) if any(text.strip() for text, _ in row))
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=picture.columns, file=nowhere, force_terminal=True)
        for row in rows[: last + 1]:
            console.print(Text.assemble(*row), soft_wrap=True)
        made = console.export_svg(title=picture.title, unique_id=picture.name)
    made = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", made, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in made.splitlines() if line.strip()) + "\n"


def words(picture: str) -> list[str]:
    """Return the rows of text in an SVG of rich."""
    rows: dict[float, dict[float, str]] = {}
    for x, y, text in re.findall(
        r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*clip-path[^>]*>([^<]*)</text>', picture
    ):
        rows.setdefault(float(y), {})[float(x)] = html.unescape(text).replace("\xa0", " ").strip("\n")
    found = []
    for _, parts in sorted(rows.items()):
        line = ""
        for x, text in sorted(parts.items()):
            line = line.ljust(round(x / 12.2)) + text
        found.append(line.rstrip())
    return found


if __name__ == "__main__":
    for each in PICTURES:
        with tempfile.TemporaryDirectory() as made_in:
            (FOLDER / f"{each.name}.svg").write_text(svg(each, taken(each, Path(made_in))), encoding="utf-8")
        print(FOLDER / f"{each.name}.svg")
