"""How does Ctrl-C reach the chat while a line is read? As a signal: where there is termios.

A line editor usually reads Ctrl-C as a key. Pressed right after Enter, its byte then lies in the queue while the
answer runs, and nobody looks at it. Here the terminal makes a signal of it all the time, and the editor's own handler,
which forgets a signal that comes while the editor closes, is not used.
"""

from __future__ import annotations

import os
import signal
import termios
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING

from prompt_toolkit.input.vt100 import Vt100Input, raw_mode
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


class _Raw(raw_mode):
    """Keys one by one, but Ctrl-C as a signal. The kernel then drops what was typed before it and not yet read."""

    @classmethod
    def _patch_lflag(cls, attrs: int) -> int:
        return super()._patch_lflag(attrs) | termios.ISIG

    def __enter__(self) -> None:
        super().__enter__()
        attributes = termios.tcgetattr(self.fileno)
        off = bytes([os.fpathconf(self.fileno, "PC_VDISABLE") & 0xFF])
        for key in (termios.VSUSP, termios.VQUIT):  # Ctrl-Z and Ctrl-\ stay keys
            attributes[6][key] = off
        termios.tcsetattr(self.fileno, termios.TCSANOW, attributes)


class Signals(Vt100Input):
    """A terminal whose Ctrl-C is a signal while keys are read."""

    def raw_mode(self) -> AbstractContextManager[None]:
        return _Raw(self.fileno())


class Reading:
    """One line being read: Ctrl-C is the editor's key while it takes keys, KeyboardInterrupt before and after."""

    def __init__(self, session: PromptSession[str]) -> None:
        self.app, self.waiting = session.app, False
        self.session = session

    def prompt(self, prefill: str) -> str:
        """Raises KeyboardInterrupt, EOFError."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            text = self.session.prompt(default=prefill, handle_sigint=False, pre_run=self._hand_on)
        finally:
            signal.signal(signal.SIGINT, before)
        if self.waiting:  # it came when the line was sent already
            raise KeyboardInterrupt
        return text

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.waiting = True
        if self.app.loop is not None and not self.app.loop.is_closed():
            self.app.loop.call_soon_threadsafe(self._key)

    def _hand_on(self) -> None:
        """The editor begins: a signal from before it is its first key."""
        if self.waiting and self.app.loop is not None:
            self.app.loop.call_soon(self._key)

    def _key(self) -> None:
        if self.waiting and self.app.is_running and not self.app.is_done:
            self.waiting = False
            self.app.key_processor.feed(KeyPress(Keys.ControlC), first=True)
            self.app.key_processor.process_keys()
