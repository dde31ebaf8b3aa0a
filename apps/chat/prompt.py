"""Read the user's input: multi-line editing, history, completion, an external editor; or plain lines from a pipe.

A reader's `read` returns one message. It raises EOFError at the end of input, and KeyboardInterrupt for Ctrl-C on an
empty line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tinychat_mlx.apps.terminal import Terminal

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

Fragments = list[tuple[str, str]]
Complete = Callable[
    [str], Iterable[tuple[str, int, str]]
]  # text before cursor -> (insert, start, description)


STYLE = {  # the terminal's own colours, readable on dark and light backgrounds
    "prompt": "bold ansicyan",
    "more": "ansibrightblack",
    "bottom-toolbar": "noreverse",
    "completion-menu": "bg:default fg:default",
    "completion-menu.completion.current": "noinherit reverse",
    "completion-menu.meta.completion": "bg:default ansibrightblack",
    "completion-menu.meta.completion.current": "noinherit reverse",
    "scrollbar.background": "bg:default",
}


class Reader(Protocol):
    def read(self, prefill: str = "") -> str: ...


def unblock(text: str) -> str:
    '''Return the text between """ and """ if the whole text is such a block, else the text.'''
    stripped = text.strip()
    if stripped.startswith('"""'):
        return stripped[3:].removesuffix('"""').strip("\n")
    return text


def in_block(text: str) -> bool:
    '''Whether a """ block is open.'''
    return text.lstrip().startswith('"""') and text.count('"""') < 2


class LineReader:
    """Reads lines from a pipe, or from a terminal that cannot redraw."""

    def __init__(self, terminal: Terminal) -> None:
        self.prompt, self.more = (
            (terminal.glyphs.prompt, terminal.glyphs.more) if terminal.interactive else ("", "")
        )

    def read(self, prefill: str = "") -> str:
        text = self._line(self.prompt)
        while in_block(text):
            text += "\n" + self._line(self.more)
        return unblock(text)

    def _line(self, prompt: str) -> str:
        sys.stdout.write(prompt)
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class RichReader:
    """A line editor: Enter sends, Alt-Enter or Ctrl-J inserts a line break, Ctrl-R searches, Ctrl-G opens $EDITOR."""

    def __init__(
        self, terminal: Terminal, history: Path | None, complete: Complete, toolbar: Callable[[], Fragments]
    ) -> None:
        self.terminal, self.complete, self.toolbar = terminal, complete, toolbar
        self.session = self._session(history)

    def read(self, prefill: str = "") -> str:
        if sys.platform == "win32":
            return unblock(self.session.prompt(default=prefill))
        from tinychat_mlx.apps.chat.keyboard import Reading

        return unblock(Reading(self.session).prompt(prefill))

    def _session(self, history: Path | None) -> PromptSession[str]:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.formatted_text import FormattedText
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.output import ColorDepth
        from prompt_toolkit.styles import Style

        kept: History = InMemoryHistory() if history is None else FileHistory(str(history))
        glyphs = self.terminal.glyphs
        session: PromptSession[str] = PromptSession(
            message=[("class:prompt", glyphs.prompt)],
            prompt_continuation=lambda width, line, wraps: [("class:more", "  " if wraps else glyphs.more)],
            multiline=True,
            history=kept,
            key_bindings=_keys(),
            completer=_completer(self.complete),
            complete_while_typing=Condition(lambda: self._completes()),
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            bottom_toolbar=lambda: FormattedText(self.toolbar()),
            color_depth=None if self.terminal.colour else ColorDepth.DEPTH_1_BIT,
            style=Style.from_dict(STYLE),
            reserve_space_for_menu=6,
        )
        # Serial consoles do not report the cursor position. The editor works without it, so print no warning.
        session.app.renderer.cpr_not_supported_callback = None
        return session

    def _completes(self) -> bool:
        text = self.session.default_buffer.document.text_before_cursor
        return text.startswith("/") or "@" in text


def _keys() -> KeyBindings:
    from prompt_toolkit.application.current import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter", filter=Condition(lambda: get_app().current_buffer.name == "DEFAULT_BUFFER"))
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # accept the completion; a second Enter sends
        elif in_block(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _break(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-g")
    def _editor(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    @keys.add("c-c", filter=Condition(lambda: bool(get_app().current_buffer.text)))
    def _clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


def _completer(complete: Complete) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class _Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            for text, start, what in complete(document.text_before_cursor):
                yield Completion(text, start_position=start, display_meta=what)

    return _Words()


def make_reader(
    terminal: Terminal, history: Path | None, complete: Complete, toolbar: Callable[[], Fragments]
) -> Reader:
    """Return the best reader for this terminal."""
    if not terminal.live:
        return LineReader(terminal)
    if history is not None:
        history.touch(mode=0o600)
        os.chmod(history, 0o600)
    return RichReader(terminal, history, complete, toolbar)
