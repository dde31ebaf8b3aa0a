"""Output of the chat other than answers: header, notes, errors, statistics, and the context meter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tinychat_mlx import __version__
from tinychat_mlx.apps.chat.stream import MarkdownAnswer, PlainAnswer
from tinychat_mlx.apps.terminal import Terminal
from tinychat_mlx.base.wording import size

if TYPE_CHECKING:
    from tinychat_mlx.engine.engine import Stats
    from tinychat_mlx.loaded_model import Model

WARN, ALARM = 0.7, 0.9  # shares of the context at which the meter turns yellow and red


def colour_of(share: float) -> str:
    return "red" if share >= ALARM else "yellow" if share >= WARN else "green"


class View:
    """Two streams: answers go to stdout; all else goes to stdout if it is interactive, otherwise to stderr."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal, self.glyphs = terminal, terminal.glyphs
        self.out = self._console(sys.stdout)
        self.notes = self.out if terminal.interactive else self._console(sys.stderr)

    def _console(self, file: object) -> Console:
        t = self.terminal
        return Console(
            file=file,  # type: ignore[arg-type]
            force_terminal=t.live,
            color_system="auto" if t.colour else None,
            no_color=not t.colour,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
        )

    def answer(self) -> MarkdownAnswer | PlainAnswer:
        return (MarkdownAnswer if self.terminal.live else PlainAnswer)(self.out, self.terminal)

    def replay(self, text: str) -> None:
        """Show an earlier answer."""
        shown = self.answer()
        shown.feed(text)
        shown.finish()

    # notes ------------------------------------------------------------------------------------------
    def say(self, text: str | Text = "", style: str = "") -> None:
        """Print a line that is not part of an answer."""
        self.notes.print(text if isinstance(text, Text) else Text(text), style=style or None)

    def note(self, text: str) -> None:
        self.say(text, "dim")

    def warn(self, text: str) -> None:
        self.say(text, "yellow")

    def error(self, text: str) -> None:
        self.say(f"error: {text}", "red")

    # facts ------------------------------------------------------------------------------------------
    def header(self, model: Model) -> None:
        """Print the model, its size, the device, and the reason for it."""
        g, device = self.glyphs, model.device
        facts = [f"{model.architecture} {size(model.nbytes)}", model.quantization]
        top = (
            Text().append("tinychat", "bold cyan").append(f" {__version__}{g.dot}").append(model.name, "bold")
        )
        self.say(top.append(g.dot + g.dot.join(f for f in facts if f)))
        where = Text().append(device.backend, "bold").append(f": {device.name}")
        where.append(f" ({device.detail})" if device.detail else "").append(
            f" {g.dash} {device.why}" if device.why else ""
        )
        self.say(where)
        self.note(
            f"context {model.context:,} tokens{g.dot}/help{g.dot}Ctrl-C stops an answer{g.dot}Ctrl-D leaves"
        )
        self.say()

    def stats(self, stats: Stats) -> None:
        """Print the time to the first token, the speed, and the use of the context."""
        g = self.glyphs
        wide = self.terminal.width >= 76
        facts = [f"first token {stats.ttft_s:.2f} s" if wide else f"{stats.ttft_s:.2f} s"]
        facts += [f"{stats.decode_tok_s:.1f} tok/s"] if stats.decode_tok_s else []
        facts += [f"{stats.completion_tokens:,} tokens"] if wide else []
        line = Text(g.dot.join(facts) + g.dot, "dim")
        self.say(line.append_text(self.meter(stats.context_used, stats.context_max, 5 if wide else 0)))
        self.say()

    def meter(self, used: int, most: int, cells: int) -> Text:
        """Return "context 412 / 2,048" with a bar of this many cells."""
        g, share = self.glyphs, used / max(1, most)
        full = min(cells, round(share * cells))
        bar = g.full * full + g.empty * (cells - full) + (" " if cells else "")
        return Text(f"context {used:,} / {most:,} ").append(f"{bar}{share:.0%}", colour_of(share))
