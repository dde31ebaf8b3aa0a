"""Ctrl-C at the prompt and right after Enter, where there is termios.

The editor reads Ctrl-C as a key. While an answer runs, the terminal sends it as a signal. Neither may miss a Ctrl-C that
comes between the two: its byte may still be in the terminal's queue, or the editor may have read it behind Enter.

Ctrl-C is no signal at the prompt, for the kernel then also discards output that the terminal has not read yet: with
it go moves of the cursor, and the editor would draw in the wrong place.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


class Reading:
    """One line being read. A signal is the editor's key while it takes keys, KeyboardInterrupt before and after."""

    def __init__(self, session: PromptSession[str]) -> None:
        self.app, self.waiting = session.app, False
        self.session = session

    def prompt(self, prefill: str) -> str:
        """Read a line. Raises KeyboardInterrupt, EOFError."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            # The library's own handler forgets a signal that comes while the editor closes.
            text = self.session.prompt(default=prefill, handle_sigint=False, pre_run=self._hand_on)
            interrupted = self._typed_after_enter()
        finally:
            signal.signal(signal.SIGINT, before)
        if interrupted or self.waiting:
            raise KeyboardInterrupt
        return text

    def _typed_after_enter(self) -> bool:
        """Whether Ctrl-C followed Enter. The next prompt gets the keys after it, or all keys without one.

        The terminal sends signals again by now, so a Ctrl-C that is not among these keys is one.
        """
        keys = get_typeahead(self.app.input)
        while more := self.app.input.read_keys():
            keys += more
        at = max((i for i, key in enumerate(keys) if key.key == Keys.ControlC), default=-1)
        store_typeahead(self.app.input, keys[at + 1 :])
        return at >= 0

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
