"""Summarise a conversation, so that it takes less of the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tinychat_mlx.apps.chat.session import Session
from tinychat_mlx.base.errors import UsageError

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.settings import ChatSettings
    from tinychat_mlx.apps.chat.view import View
    from tinychat_mlx.loaded_model import Model

SUMMARY_REQUEST = (
    "Summarise our conversation so far in a few sentences, as notes for continuing it: facts about me, my requests, "
    "decisions, and open questions. Write nothing but the summary."
)


class Chat(Protocol):
    """The attributes of app.Chat that this module uses."""

    model: Model
    view: View
    session: Session
    settings: ChatSettings
    used: int


def last_question(chat: Chat) -> int:
    """Return the index of the user's last message. Raises UsageError if there is none."""
    found = [i for i, m in enumerate(chat.session.messages) if m["role"] == "user"]
    if not found:
        raise UsageError("the conversation is empty", remedy="send a message first")
    return found[-1]


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
