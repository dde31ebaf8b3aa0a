"""A fake terminal: runs the chat in this process with a scripted model and a clock that only tests advance.

The chat runs in a thread and yields control where it reads the keyboard and after each piece of an answer. A
test therefore acts at a known moment and does not depend on the machine's speed.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chat_driver
import pytest
from chat_screen import CTRL_C, CTRL_D, CTRL_J, ENTER, Display

import tinychat_mlx
from tinychat_mlx.apps.chat import answer, app, cli, prompt, stream
from tinychat_mlx.apps.terminal import Terminal

CEILING_S = 300  # limit for the chat's computation between two yields
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


class Paper(io.TextIOBase):
    """Standard output of the chat. Text reaches the screen immediately."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, screen: FakeScreen) -> None:
        self.screen = screen

    def write(self, text: str) -> int:
        data = text.encode()
        self.screen.raw += data
        self.screen.stream.feed(data.replace(b"\n", b"\r\n"))
        return len(text)

    def isatty(self) -> bool:
        return True


class FakeScreen(Display):
    """One chat, with the interface of chat_screen.Screen."""

    def __init__(self, run: Callable[[], int], rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.run, self.paper = run, Paper(self)
        self.keys: deque[str] = deque()
        self.state, self.closing = "started", False
        self.code = 0
        self.handler: Any = signal.default_int_handler
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._main, daemon=True).start()

    def _main(self) -> None:
        self._go.acquire()
        try:
            self.code = 0 if self.closing else self.run()
        except SystemExit:  # from close()
            assert self.closing
        finally:
            self.state = "ended"
            self._back.release()

    # called by the chat -----------------------------------------------------------------------------
    def _pause(self, state: str) -> None:
        self.state = state
        self._back.release()
        self._go.acquire()
        if self.closing:
            raise SystemExit
        self.state = "running"

    def tick(self, seconds: float = 0) -> None:
        """Advance the clock by the model's work. Ctrl-C arrives here, like a signal between two bytecodes."""
        self._pause("working")
        if CTRL_C in self.keys:
            while self.keys.popleft() != CTRL_C:  # a terminal discards what was typed before it
                pass
            self.handler(signal.SIGINT, None)

    def read(self, prefill: str = "") -> str:
        """A line editor with Enter, line breaks, pastes, Ctrl-C and Ctrl-D."""
        line, pasting = prefill, False
        self.paper.write(f"❯ {prefill}")
        while True:
            while not self.keys:
                self._pause("reading")
            key = self.keys.popleft()
            if key in (PASTE, PASTED):
                pasting = key == PASTE
            elif key == CTRL_C and not line:
                self.paper.write("\n")
                raise KeyboardInterrupt
            elif key == CTRL_C:
                line = ""
                self.paper.write("\r\x1b[J❯ ")
            elif key == CTRL_D and not line:
                self.paper.write("\n")
                raise EOFError
            elif key == ENTER and not pasting and not prompt.in_block(line):
                self.paper.write("\n")
                return prompt.unblock(line)
            else:
                line += "\n" if key in (ENTER, CTRL_J) else key
                self.paper.write(line[-1])

    # called by the test -----------------------------------------------------------------------------
    def step(self) -> None:
        """Let the chat run to its next yield."""
        assert self.state != "ended", f"the chat has ended:\n{self.text.rstrip()}"
        with redirect_stdout(self.paper), redirect_stderr(self.paper):
            self._go.release()
            assert self._back.acquire(timeout=CEILING_S), f"the chat is stuck:\n{self.text.rstrip()}"

    def close(self) -> None:
        """End the chat in any state."""
        self.closing = True
        if self.state != "ended":
            self.step()

    @property
    def idle(self) -> bool:
        """Whether nothing more happens until a key is pressed."""
        return self.state == "ended" or (self.state == "reading" and not self.keys)

    def type(self, text: str) -> None:
        for marker in (PASTE, PASTED):
            text = text.replace(marker, f"\0{marker}\0")
        for part in text.split("\0"):
            self.keys.extend([part] if part in (PASTE, PASTED) else part)

    def wait(self, wanted: str | Callable[[str], bool], seconds: float = 0) -> str:
        """Run until the screen shows `wanted`. Returns all text."""
        seen = wanted if callable(wanted) else lambda text: wanted in text
        while not seen(self.text):
            assert not self.idle, f"never saw {wanted!r} in:\n{self.text.rstrip()}"
            self.step()
        return self.text

    def prompt(self, seconds: float = 0) -> str:
        """Run until the chat reads and no key is left. Returns all text."""
        while not self.idle:
            self.step()
        assert self.state == "reading", f"the chat has ended:\n{self.text.rstrip()}"
        return self.text

    def say(self, text: str, seconds: float = 0) -> str:
        """Type a line and run to the end of the answer. Returns all text."""
        self.prompt()
        self.type(text + ENTER)
        return self.prompt()

    def exit_code(self) -> int:
        while self.state != "ended":
            assert not self.idle, f"the chat waits for a key:\n{self.text.rstrip()}"
            self.step()
        return self.code


class FakeChats:
    """Starts chats whose files are in one folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.screen: FakeScreen | None = None
        self.open: list[FakeScreen] = []
        for name, value in {
            "TINYCHAT_DATA": folder / "data",
            "TINYCHAT_CACHE": folder / "cache",
            "TINYCHAT_CONFIG": "/absent",
            "TERM": "xterm-256color",
        }.items():
            patch.setenv(name, str(value))
        patch.setattr(cli, "detect", lambda plain: Terminal(True, True, not os.environ.get("NO_COLOR"), True))
        patch.setattr(cli, "quiet_keys", nullcontext)
        patch.setattr(app, "make_reader", lambda *_: self.screen)
        patch.setattr(answer, "signal", SimpleNamespace(SIGINT=signal.SIGINT, signal=self._handle))
        patch.setattr(answer, "PATIENCE_S", 1e9)  # the note after a second of waiting needs a real clock
        patch.setattr(stream, "FRAME_S", 0)
        self.loader = tinychat_mlx.load

    def _handle(self, number: int, handler: Any) -> Any:
        assert self.screen is not None
        before, self.screen.handler = self.screen.handler, handler
        return before

    def __call__(
        self,
        *args: str,
        rows: int = 24,
        columns: int = 80,
        env: dict[str, str] | None = None,
        real: bool = False,
        **script: Any,
    ) -> FakeScreen:
        """Start a chat with the scripted model, or with the model that the program loads."""
        from tinychat_mlx.apps.cli import main

        for name, value in {"COLUMNS": str(columns), "LINES": str(rows), **(env or {})}.items():
            self.patch.setenv(name, value)
        made = FakeScreen(lambda: main(args), rows, columns)
        self.patch.setattr(chat_driver, "time", SimpleNamespace(sleep=made.tick, perf_counter=lambda: 0.0))
        self.patch.setattr(tinychat_mlx, "load", self.loader if real else chat_driver.loader(script))
        self.screen = made
        self.open.append(made)
        return made
