"""Deliver Ctrl-C as a signal while a line is read (systems with termios).

A line editor usually reads Ctrl-C as a key. If it is pressed directly after Enter, its byte stays in the queue while
the answer runs. Here the terminal always sends a signal. The editor's own handler is not used, because it loses a
signal that arrives while the editor closes.
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
    """Raw mode with Ctrl-C as a signal. On a signal, the kernel discards typed input that was not yet read."""

    @classmethod
    def _patch_lflag(cls, attrs: int) -> int:
        return super()._patch_lflag(attrs) | termios.ISIG

    def __enter__(self) -> None:
        super().__enter__()
        attributes = termios.tcgetattr(self.fileno)
        off = bytes([os.fpathconf(self.fileno, "PC_VDISABLE") & 0xFF])
        for key in (termios.VSUSP, termios.VQUIT):  # Ctrl-Z and Ctrl-\ remain keys
            attributes[6][key] = off
        termios.tcsetattr(self.fileno, termios.TCSANOW, attributes)


class Signals(Vt100Input):
    """A terminal input that delivers Ctrl-C as a signal while keys are read."""

    def raw_mode(self) -> AbstractContextManager[None]:
        return _Raw(self.fileno())


class Reading:
    """Reads one line. Ctrl-C is an editor key while the editor runs, and KeyboardInterrupt before and after."""

    def __init__(self, session: PromptSession[str]) -> None:
        self.app, self.waiting = session.app, False
        self.session = session

    def prompt(self, prefill: str) -> str:
        """Read a line. Raises KeyboardInterrupt, EOFError."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            text = self.session.prompt(default=prefill, handle_sigint=False, pre_run=self._hand_on)
        finally:
            signal.signal(signal.SIGINT, before)
        if self.waiting:  # it arrived after the line was sent
            raise KeyboardInterrupt
        return text

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.waiting = True
        if self.app.loop is not None and not self.app.loop.is_closed():
            self.app.loop.call_soon_threadsafe(self._key)

    def _hand_on(self) -> None:
        """Pass a signal that arrived before the editor started to it as its first key."""
        if self.waiting and self.app.loop is not None:
            self.app.loop.call_soon(self._key)

    def _key(self) -> None:
        if self.waiting and self.app.is_running and not self.app.is_done:
            self.waiting = False
            self.app.key_processor.feed(KeyPress(Keys.ControlC), first=True)
            self.app.key_processor.process_keys()
