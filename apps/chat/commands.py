"""What do /words do? One function a command; its docstring is its help."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat


class Leave(Exception):
    """Raised by /exit."""


@dataclass(frozen=True)
class Command:
    name: str
    usage: str
    run: Callable[[Chat, str], None]

    @property
    def help(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]


COMMANDS: dict[str, Command] = {}
ALIASES = {"?": "help", "quit": "exit", "bye": "exit", "q": "exit", "regen": "retry"}


def command(
    name: str, usage: str = ""
) -> Callable[[Callable[[Chat, str], None]], Callable[[Chat, str], None]]:
    def register(run: Callable[[Chat, str], None]) -> Callable[[Chat, str], None]:
        COMMANDS[name] = Command(name, usage, run)
        return run

    return register


def dispatch(chat: Chat, line: str) -> None:
    """Run "/name argument"; an unknown name is answered with the nearest known one."""
    name, _, argument = line[1:].strip().partition(" ")
    name = ALIASES.get(name, name)
    if name in COMMANDS:
        COMMANDS[name].run(chat, argument.strip())
        return
    near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    hint = f"did you mean /{near[0]}?" if near else "/help lists them"
    chat.view.warn(f"no command /{name}: {hint} (a message may begin with // to send a slash)")


@command("help")
def show_help(chat: Chat, _: str) -> None:
    """List the commands and keys."""
    wide = max(len(f"/{c.name} {c.usage}") for c in COMMANDS.values()) + 2
    for c in COMMANDS.values():
        name = f"/{c.name} {c.usage}".strip()
        if chat.view.terminal.width > wide + 30:
            chat.view.say(Text(f"  {name:<{wide}}").append(c.help, "dim"))
        else:
            chat.view.say(Text(f"{name} ").append(c.help, "dim"))
    chat.view.say()
    chat.view.note('Alt-Enter or Ctrl-J: new line; """ opens and closes a block. Ctrl-R: search the history.')
    chat.view.note("Ctrl-G: edit in $EDITOR. Ctrl-C: stop an answer, clear the line. Ctrl-D: leave.")


@command("clear")
def clear(chat: Chat, _: str) -> None:
    """Forget the conversation and start anew; the system prompt stays."""
    chat.start_anew()
    chat.view.note("the conversation is forgotten; the system prompt stays")


@command("exit")
def leave(chat: Chat, _: str) -> None:
    """Leave (also Ctrl-D)."""
    raise Leave
