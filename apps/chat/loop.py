"""The loop of a chat: read, answer, repeat, until the user leaves.

Importing the modules of commands registers their commands in the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from tinychat_mlx.apps.chat import attach
from tinychat_mlx.apps.chat.commands import conversation, storage, table, tuning  # noqa: F401
from tinychat_mlx.apps.chat.prompt import Reader, make_reader
from tinychat_mlx.base.errors import TinychatError, one_line

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat


def run(chat: Chat) -> int:
    """Run until the user leaves -> exit code."""
    history = chat.data / "history" if chat.data else None
    reader = make_reader(chat.view.terminal, history, lambda before: complete(chat, before), chat.toolbar)
    chat.view.header(chat.model)
    chat.recall()
    chat.prime()
    try:
        while _turn(chat, reader):
            pass
    finally:
        with suppress(KeyboardInterrupt):  # skipped on Ctrl-C; it will be computed again
            chat.model.keep(whole=True)
    if chat.session.messages and chat.session.path and chat.view.terminal.interactive:
        chat.view.note(f"saved as {chat.session.ident}; `tinychat chat --continue` resumes it")
    return 0


def _turn(chat: Chat, reader: Reader) -> bool:
    """Read one input and process it -> whether to continue."""
    prefill, chat.prefill = chat.prefill, ""
    try:
        text = reader.read(prefill)
        if not text.strip():
            return True
        if text.startswith("/") and not text.startswith("//"):
            table.dispatch(chat, text)
            chat.view.say()
        else:
            chat.ask(text.removeprefix("/") if text.startswith("//") else text)
    except KeyboardInterrupt:
        if chat.prefill:
            chat.view.note("not sent")
            return True
        chat.hints += 1
        more = " (Ctrl-C only stops answers)" if chat.hints > 1 else ""
        chat.view.note(f"press Ctrl-D or type /exit to leave{more}")
    except (EOFError, table.Leave):
        return False
    except BrokenPipeError:  # the reader of the answers has closed the pipe
        raise
    except (TinychatError, OSError) as e:
        chat.view.error(one_line(e))
    return True


def complete(chat: Chat, before: str) -> Iterable[tuple[str, int, str]]:
    """Yield completions of the text before the cursor: (insert, start, description)."""
    yield from table.complete(chat, before) if before.startswith("/") else attach.complete(before)
