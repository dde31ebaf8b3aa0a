"""The table of the /commands: one function each, whose docstring is its help."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat

Run = Callable[["Chat", str], None]
Words = Callable[["Chat", str], Iterable[tuple[str, int, str]]]  # completions of the argument


class Leave(Exception):
    """Raised by /exit."""


@dataclass(frozen=True)
class Command:
    name: str
    usage: str
    run: Run
    words: Words | None = None

    @property
    def help(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]


COMMANDS: dict[str, Command] = {}
ALIASES = {"?": "help", "quit": "exit", "bye": "exit", "q": "exit", "regen": "retry", "compress": "compact"}


def command(name: str, usage: str = "", words: Words | None = None) -> Callable[[Run], Run]:
    """Return a decorator that registers a command."""

    def register(run: Run) -> Run:
        COMMANDS[name] = Command(name, usage, run, words)
        return run

    return register


def one_of(*choices: str) -> Words:
    """Complete an argument with a fixed set of values."""
    return lambda chat, typed: ((c, -len(typed), "") for c in choices if c.startswith(typed))


def dispatch(chat: Chat, line: str) -> None:
    """Run "/name argument". For an unknown name, print the nearest one."""
    name, _, argument = line[1:].strip().partition(" ")
    name = ALIASES.get(name, name)
    if name in COMMANDS:
        COMMANDS[name].run(chat, argument.strip())
        return
    near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    hint = f"did you mean /{near[0]}?" if near else "/help lists them"
    chat.view.warn(f"no command /{name}: {hint} (a message may begin with // to send a slash)")


def complete(chat: Chat, before: str) -> Iterable[tuple[str, int, str]]:
    """Complete a slash command."""
    name, space, typed = before[1:].partition(" ")
    if not space:
        yield from (
            (f"/{c.name}", -len(before), c.help) for c in COMMANDS.values() if c.name.startswith(name)
        )
        return
    found = COMMANDS.get(ALIASES.get(name, name))
    if found is not None and found.words is not None:
        yield from found.words(chat, typed)


@command("help")
def show_help(chat: Chat, _: str) -> None:
    """List the commands and keys."""
    start = max(len(f"/{c.name} {c.usage}") for c in COMMANDS.values()) + 4
    width = chat.view.terminal.width
    start = start if width > start + 28 else 4  # in a narrow terminal, below the name
    for c in COMMANDS.values():
        lines = textwrap.wrap(c.help, width - start, break_on_hyphens=False)
        name = f"  /{c.name} {c.usage}".rstrip()
        begin = f"{name:<{start}}" if len(name) < start else f"{name}\n{' ' * start}"
        chat.view.say(Text(begin).append(f"\n{' ' * start}".join(lines), "dim"))
    chat.view.say()
    chat.view.note('Alt-Enter or Ctrl-J: new line; """ opens and closes a block. Ctrl-R: search the history.')
    chat.view.note("Ctrl-G: edit in $EDITOR. Ctrl-C: stop an answer, clear the line. Ctrl-D: leave.")
    chat.view.note("@path in a message attaches a file. // at the beginning sends a slash.")


@command("exit")
def leave(chat: Chat, _: str) -> None:
    """Leave (also Ctrl-D)."""
    raise Leave
