"""Commands that change the conversation: /new /clear /retry /edit /undo /branch /compact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinychat_mlx.apps.chat.commands import command
from tinychat_mlx.apps.chat.session import Session
from tinychat_mlx.base.errors import UsageError

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat

SUMMARY_REQUEST = (
    "Summarise our conversation so far in a few sentences, as notes for continuing it: facts about me, my requests, "
    "decisions, and open questions. Write nothing but the summary."
)


def last_question(chat: Chat) -> int:
    """Return the index of the user's last message. Raises UsageError if there is none."""
    found = [i for i, m in enumerate(chat.session.messages) if m["role"] == "user"]
    if not found:
        raise UsageError("the conversation is empty", remedy="send a message first")
    return found[-1]


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


def compact(chat: Chat) -> None:
    """Let the model summarise all but the last exchange. The messages stay in the file. Raises UsageError."""
    session = chat.session
    keep_from = last_question(chat)
    if keep_from <= session.seen_from:
        raise UsageError(
            "there is only one exchange, so there is nothing to summarise",
            remedy="send another message first",
        )
    chat.view.note(f"summarising {keep_from - session.seen_from} messages {chat.view.glyphs.ellipsis}")
    before = Session(system=session.system, summary=session.summary)
    before.messages = session.messages[session.seen_from : keep_from]
    asked = [*before.for_model(), {"role": "user", "content": SUMMARY_REQUEST}]
    room = max(32, min(256, chat.model.context // 6))
    template = {"enable_thinking": False} if chat.settings.think is not None else {}
    # Greedy, and the oldest messages may be dropped: otherwise a full context could not be summarised.
    events = chat.model.chat(asked, on_full="slide", template=template, temperature=0.0, max_tokens=room)
    text, dropped = "", 0
    for event in events:
        text += event.text
        dropped = event.stats.dropped_messages if event.stats else dropped
    if not text.strip():
        raise UsageError(
            "the model gave no summary; the conversation is unchanged", remedy="try again, or /clear"
        )
    session.sum_up(" ".join(text.split()), keep_from)
    unseen = f" (the oldest {dropped} did not fit and are not included)" if dropped else ""
    chat.used = 0
    chat.view.note(f"this replaces the first {keep_from} messages in the model's input{unseen}:")
    chat.view.note(session.summary)
