"""How does Ctrl-C reach the chat while a line is read? As a signal: where there is termios.

A line editor usually reads Ctrl-C as a key. Pressed right after Enter, its byte then lies in the queue while the
answer runs, and nobody looks at it. Here the terminal makes a signal of it all the time.
"""

from __future__ import annotations

import os
import termios
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.input.vt100 import Vt100Input, raw_mode
from prompt_toolkit.keys import Keys

if TYPE_CHECKING:
    from prompt_toolkit.input import Input

SUSPEND_AND_QUIT = (termios.VSUSP, termios.VQUIT)


class _Raw(raw_mode):
    """Keys one by one, but Ctrl-C as a signal. The kernel then drops what was typed before it and not yet read."""

    @classmethod
    def _patch_lflag(cls, attrs: int) -> int:
        return super()._patch_lflag(attrs) | termios.ISIG

    def __enter__(self) -> None:
        super().__enter__()
        attributes = termios.tcgetattr(self.fileno)
        off = bytes([os.fpathconf(self.fileno, "PC_VDISABLE") & 0xFF])
        for key in SUSPEND_AND_QUIT:  # Ctrl-Z and Ctrl-\\ stay keys
            attributes[6][key] = off
        termios.tcsetattr(self.fileno, termios.TCSANOW, attributes)


class Signals(Vt100Input):
    """A terminal whose Ctrl-C is a signal while keys are read."""

    def raw_mode(self) -> AbstractContextManager[None]:
        return _Raw(self.fileno())  # type: ignore[return-value]  # as its base


def was_pressed(source: Input) -> bool:
    """Whether Ctrl-C came when the line was sent already; what was typed before it is forgotten."""
    keys = get_typeahead(source)
    last = max((i for i, key in enumerate(keys) if key.key in (Keys.SIGINT, Keys.ControlC)), default=-1)
    store_typeahead(source, keys[last + 1 :])
    return last >= 0
