"""Types into the real chat in a pseudo-terminal and reads the screen."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pyte

ROOT = Path(__file__).resolve().parent.parent
DRIVER = ROOT / "tests" / "chat_driver.py"
CEILING_S = 120  # maximum wait; only reached on a machine under heavy load
CTRL_C, CTRL_D, CTRL_J, CTRL_R, ENTER, UP = "\x03", "\x04", "\x0a", "\x12", "\r", "\x1b[A"


class Display:
    """A terminal display of what a program writes, including scrollback."""

    def __init__(self, rows: int, columns: int) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.001)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""

    @property
    def lines(self) -> list[str]:
        """Scrollback and screen, as rows of text."""

        def words(row: Any) -> str:
            # pyte stores an empty cell after a wide letter
            return "".join(row[x].data for x in range(self.screen.columns)).rstrip()

        return [words(r) for r in self.screen.history.top] + [
            words(self.screen.buffer[y]) for y in range(self.screen.lines)
        ]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Screen(Display):
    """A program in a pseudo-terminal: types text and shows the screen."""

    def __init__(self, argv: list[str], rows: int, columns: int, env: dict[str, str]) -> None:
        super().__init__(rows, columns)
        self.child = pexpect.spawn(argv[0], argv[1:], dimensions=(rows, columns), env=env, timeout=CEILING_S)
        self.child.delaybeforesend = None
        # Programs query the cursor's position, and a terminal answers.
        self.screen.write_process_input = lambda data: self.child.send(data)

    def pump(self, seconds: float = 0.05) -> bool:
        """Process the program's output. Returns whether it is still running."""
        try:
            data = self.child.read_nonblocking(65536, timeout=seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self.stream.feed(data)
        return True

    def type(self, text: str) -> None:
        self.child.send(text)

    def wait(self, wanted: str | Callable[[str], bool], seconds: float = CEILING_S) -> str:
        """Wait until the screen shows `wanted`. Returns all text; fails with the screen's contents."""
        seen = wanted if callable(wanted) else lambda text: wanted in text
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = self.pump()
            if seen(self.text):
                return self.text
            if not alive:
                break
        raise AssertionError(f"never saw {wanted!r} in:\n{self.text.rstrip()}")

    def prompt(self, seconds: float = CEILING_S) -> str:
        """Wait for an empty prompt at the end of the screen."""
        return self.wait(lambda text: self._at_prompt(), seconds)

    def _at_prompt(self) -> bool:
        row = "".join(self.screen.buffer[self.screen.cursor.y][x].data for x in range(self.screen.columns))
        return row.strip() in ("❯", ">") and self.screen.cursor.x == 2

    def say(self, text: str, seconds: float = CEILING_S) -> str:
        """Type a line and wait for the end of the answer. Returns all text."""
        self.prompt()
        self.type(text)
        self.wait(text.split("\n")[-1][-20:])
        self.type(ENTER)
        self.pump(0.2)
        return self.prompt(seconds)

    def exit_code(self) -> int:
        while self.pump():
            pass
        self.child.close()
        return -self.child.signalstatus if self.child.signalstatus else self.child.exitstatus


class Chats:
    """Starts chats whose files are in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, []

    def __call__(
        self,
        *args: str,
        rows: int = 24,
        columns: int = 80,
        env: dict[str, str] | None = None,
        real: bool = False,
        **script: Any,
    ) -> Screen:
        """Start a chat with the scripted model, or with the model that the program loads."""
        path = self.folder / f"script{len(self.open)}.json"
        path.write_text(json.dumps(script))
        own = {
            "TINYCHAT_DATA": str(self.folder / "data"),
            "TINYCHAT_CACHE": str(self.folder / "cache"),
            "TERM": "xterm-256color",
            "PYTHONPATH": str(ROOT),
            "TINYCHAT_CONFIG": "/absent",
        }
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "VIRTUAL_ENV", "SYSTEMROOT")}
        program = ["-m", "tinychat_mlx"] if real else [str(DRIVER), str(path)]
        argv = [sys.executable, *program, *args]
        made = Screen(argv, rows, columns, kept | {"LANG": "C.UTF-8"} | own | (env or {}))
        self.open.append(made)
        return made
