"""Commands that change what was said: /new /clear /retry /edit /undo /branch /compact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinychat_mlx.apps.chat.commands import command
from tinychat_mlx.apps.chat.session import Session
from tinychat_mlx.errors import UsageError

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat

SUMMARY_REQUEST = (
    "Sum up our conversation so far in a few sentences, for yourself to go on from: what I told you about myself, "
    "what I asked for, what was decided, what is open. Write nothing but the summary."
)


def last_question(chat: Chat) -> int:
    """Index of the last thing the person said. Raises UsageError if there is none."""
    found = [i for i, m in enumerate(chat.session.messages) if m["role"] == "user"]
    if not found:
        raise UsageError("the conversation is empty", remedy="send a message first")
    return found[-1]


@command("new")
def new(chat: Chat, _: str) -> None:
    """Begin another conversation; this one stays saved."""
    chat.go_to(Session.new(chat.data, chat.session.model, chat.session.system))
    chat.view.note("a new conversation; the system prompt stays, /sessions lists the saved ones")


@command("clear")
def clear(chat: Chat, _: str) -> None:
    """Forget what was said and start anew; the system prompt stays."""
    chat.session.keep(0)
    chat.used, chat.last = 0, None
    chat.view.note("the conversation is forgotten; the system prompt stays")


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
    """Take the last message back into the prompt to change it."""
    at = last_question(chat)
    chat.prefill = chat.session.messages[at]["content"]
    chat.session.keep(at)


@command("undo")
def undo(chat: Chat, _: str) -> None:
    """Take back the last message and its answer."""
    at = last_question(chat)
    taken = " ".join(chat.session.messages[at]["content"].split())
    chat.session.keep(at)
    chat.view.note(f"taken back: {taken[:60]}{chat.view.glyphs.ellipsis if len(taken) > 60 else ''}")


@command("branch")
def branch(chat: Chat, _: str) -> None:
    """Go on in a copy; the conversation up to here stays as it is."""
    last_question(chat)
    before, used, other = chat.session.ident, chat.used, chat.session.branch()
    chat.go_to(other)
    chat.used = used
    chat.view.note(f"this is {other.ident} now; {before} stays as it was")


@command("compact")
def compact_command(chat: Chat, _: str) -> None:
    """Sum up what was said, so that it takes less of the context."""
    compact(chat)


def compact(chat: Chat) -> None:
    """Let the model sum up all but the last exchange; the messages stay on record. Raises UsageError."""
    session = chat.session
    keep_from = last_question(chat)
    if keep_from <= session.seen_from:
        raise UsageError(
            "there is only one exchange, so there is nothing to sum up", remedy="send another message first"
        )
    chat.view.note(f"summing up {keep_from - session.seen_from} messages {chat.view.glyphs.ellipsis}")
    before = Session(system=session.system, summary=session.summary)
    before.messages = session.messages[session.seen_from : keep_from]
    asked = [*before.for_model(), {"role": "user", "content": SUMMARY_REQUEST}]
    room = max(32, min(256, chat.model.context // 6))
    template = {"enable_thinking": False} if chat.settings.think is not None else {}
    # Greedy, and the oldest of what is summed up may go: only so can a full context be summed up at all.
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
    unseen = f" (the oldest {dropped} no longer fitted and are not in it)" if dropped else ""
    chat.used = 0
    chat.view.note(f"from here on the model sees this in place of the first {keep_from} messages{unseen}:")
    chat.view.note(session.summary)
