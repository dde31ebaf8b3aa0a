"""Commands that change the conversation: /new /clear /retry /edit /undo /branch /compact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinychat_mlx.apps.chat.commands.compact import compact, last_question
from tinychat_mlx.apps.chat.commands.table import command
from tinychat_mlx.apps.chat.session import Session

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat


@command("new")
def new(chat: Chat, _: str) -> None:
    """Start another conversation; this one stays saved."""
    chat.go_to(Session.new(chat.data, chat.session.model, chat.session.system))
    chat.view.note("a new conversation; the system prompt stays, /sessions lists the saved ones")


@command("clear")
def clear(chat: Chat, _: str) -> None:
    """Empty the conversation; the system prompt stays."""
    chat.session.keep(0)
    chat.used, chat.last = 0, None
    chat.view.note("the conversation is empty; the system prompt stays")


@command("retry")
def retry(chat: Chat, _: str) -> None:
    """Answer the last message again."""
    at = last_question(chat)
    chat.session.keep(at + 1)
    if "seed" in chat.settings.sampling:  # the same seed would give the same answer
        chat.settings.sampling["seed"] += 1
        chat.view.note(f"seed {chat.settings.sampling['seed']}")
    chat.answer()


@command("edit")
def edit(chat: Chat, _: str) -> None:
    """Edit the last message and send it again."""
    at = last_question(chat)
    chat.prefill = chat.session.messages[at]["content"]
    chat.session.keep(at)


@command("undo")
def undo(chat: Chat, _: str) -> None:
    """Remove the last message and its answer."""
    at = last_question(chat)
    taken = " ".join(chat.session.messages[at]["content"].split())
    chat.session.keep(at)
    chat.view.note(f"removed: {taken[:60]}{chat.view.glyphs.ellipsis if len(taken) > 60 else ''}")


@command("branch")
def branch(chat: Chat, _: str) -> None:
    """Continue in a copy; the conversation up to here stays unchanged."""
    last_question(chat)
    before, used, other = chat.session.ident, chat.used, chat.session.branch()
    chat.go_to(other)
    chat.used = used
    chat.view.note(f"this is {other.ident} now; {before} is unchanged")


@command("compact")
def compact_command(chat: Chat, _: str) -> None:
    """Summarise earlier messages to free context."""
    compact(chat)
