"""Commands that save and find conversations: /save /load /sessions /search /export /file /copy."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tinychat_mlx.apps.chat import attach
from tinychat_mlx.apps.chat.commands.table import command, one_of
from tinychat_mlx.apps.chat.session import Session, find, saved
from tinychat_mlx.base.errors import FormatError, UsageError

if TYPE_CHECKING:
    from tinychat_mlx.apps.chat.app import Chat

SHOWN = 20  # most sessions or matches in a list
CLIPBOARDS = (["pbcopy"], ["wl-copy"], ["xclip", "-selection", "clipboard"], ["xsel", "-ib"], ["clip.exe"])


def _data(chat: Chat) -> Path:
    if chat.data is None:
        raise UsageError(
            "chats are not saved, because of --no-save or because there is no folder to write to",
            remedy="start without --no-save, or set TINYCHAT_DATA to a folder",
        )
    return chat.data


def _sessions(chat: Chat) -> Iterable[Session]:
    for path in saved(_data(chat)):
        try:
            yield Session.load(path)
        except FormatError as e:
            chat.view.warn(str(e))


def _names(chat: Chat, typed: str) -> Iterable[tuple[str, int, str]]:
    if chat.data is not None:
        for session in list(_sessions(chat))[:50]:
            if session.ident.startswith(typed):
                yield session.ident, -len(typed), session.name


@command("save", "[TITLE]")
def save(chat: Chat, title: str) -> None:
    """Set the conversation's title; it is saved automatically."""
    _data(chat)
    if not chat.session.messages:
        raise UsageError("the conversation is empty", where="/save", remedy="send a message first")
    if title:
        chat.session.set_title(title)
    chat.view.note(f"saved as {chat.session.ident}: {chat.session.name}")


@command("load", "NAME", words=_names)
def load(chat: Chat, name: str) -> None:
    """Resume a saved conversation, by its id or title."""
    if not name:
        raise UsageError(
            "it needs the id or title of a saved chat", where="/load", remedy="list them with /sessions"
        )
    chat.go_to(Session.load(find(_data(chat), name)))
    chat.recall()
    chat.prime()


@command("sessions")
def sessions(chat: Chat, _: str) -> None:
    """List the saved conversations, the latest first."""
    found = list(_sessions(chat))
    for session in found[:SHOWN]:
        assert session.path is not None
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.path.stat().st_mtime))
        here = "*" if session.path == chat.session.path else " "
        chat.view.say(f"{here} {session.ident}  {when}  {len(session.messages):>3}  {session.name}")
    if len(found) > SHOWN:
        chat.view.note(f"and {len(found) - SHOWN} older; /search searches all of them")
    if not found:
        chat.view.note("no saved chats yet")


@command("search", "TEXT")
def search(chat: Chat, text: str) -> None:
    """Find words in all saved conversations."""
    if not text:
        raise UsageError(
            "it needs the words to look for", where="/search", remedy="give them after the command"
        )
    count = 0
    for session in _sessions(chat):
        for message in session.messages:
            flat = " ".join(message["content"].split())
            at = flat.casefold().find(text.casefold())
            if at >= 0 and count < SHOWN:
                count += 1
                begin = max(0, at - 25)
                chat.view.say(f"{session.ident}  {message['role']:<9}  {flat[begin : at + len(text) + 35]}")
    if not count:
        chat.view.note(f"{text!r} was not found")


def _export_words(chat: Chat, typed: str) -> Iterable[tuple[str, int, str]]:
    return one_of(f"{chat.session.ident}.md", f"{chat.session.ident}.json")(chat, typed)


@command("export", "[FILE.md|FILE.json]", words=_export_words)
def export(chat: Chat, name: str) -> None:
    """Write the conversation to a Markdown or JSON file."""
    session = chat.session
    if not session.messages:
        raise UsageError("the conversation is empty", where="/export", remedy="send a message first")
    path = Path(name or f"{session.ident}.md").expanduser()
    if path.suffix not in (".md", ".json"):
        raise UsageError(
            "the name has another ending than .md or .json",
            where=path,
            remedy="give a name that ends in .md or .json",
        )
    text = as_json(session) if path.suffix == ".json" else as_markdown(session)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError("it exists already", where=path, remedy="choose another name") from None
    chat.view.note(f"written: {path} ({len(session.messages)} messages)")


def as_markdown(session: Session) -> str:
    parts = [
        f"# {session.name}",
        f"*{session.model}, {time.strftime('%Y-%m-%d', time.localtime(session.created))}*",
    ]
    parts += [f"> {session.system}"] if session.system else []
    for message in session.messages:
        parts.append(f"## {'You' if message['role'] == 'user' else 'Answer'}\n\n{message['content'].strip()}")
    return "\n\n".join(parts) + "\n"


def as_json(session: Session) -> str:
    """Return the messages in the format of chat APIs, with metadata."""
    head = [{"role": "system", "content": session.system}] if session.system else []
    made = {"id": session.ident, "title": session.name, "model": session.model, "created": session.created}
    said = [{key: value for key, value in m.items() if key != "ids"} for m in session.messages]
    return json.dumps(made | {"messages": head + said}, ensure_ascii=False, indent=2) + "\n"


@command("file", "PATH", words=lambda chat, typed: attach.paths(typed))
def file(chat: Chat, path: str) -> None:
    """Attach a text file to the next message."""
    if not path:
        raise UsageError("it needs a path", where="/file", remedy="give it after the command")
    found = attach.read(path.strip("\"'"))
    chat.attached.append(found)
    tokens = len(chat.model.tokenizer.encode(found.quoted(), special=False))
    chat.view.note(f"attached to the next message: {found.describe()}, {tokens:,} tokens")


@command("copy", "[code]", words=one_of("code"))
def copy(chat: Chat, what: str) -> None:
    """Copy the last answer, or its last code block, to the clipboard."""
    answers = [m["content"] for m in chat.session.messages if m["role"] == "assistant"]
    if not answers:
        raise UsageError("there is no answer yet", where="/copy", remedy="ask something first")
    text = answers[-1]
    if what == "code":
        blocks = re.findall(r"^ *(`{3,}|~{3,})[^\n]*\n(.*?)^ *\1", text, re.DOTALL | re.MULTILINE)
        if not blocks:
            raise UsageError(
                "the last answer has no code block",
                where="/copy code",
                remedy="use /copy for the whole answer",
            )
        text = blocks[-1][1]
    chat.view.note(f"copied {len(text):,} letters {_to_clipboard(chat, text)}")


def _to_clipboard(chat: Chat, text: str) -> str:
    """Copy text to the clipboard -> a description of the way used."""
    for argv in CLIPBOARDS:
        if shutil.which(argv[0]):
            try:
                subprocess.run(argv, input=text.encode(), check=True, timeout=5, stdout=subprocess.DEVNULL)
                return f"with {argv[0]}"
            except (subprocess.SubprocessError, OSError):
                continue  # installed, but without a display
    if not chat.view.terminal.live:
        raise UsageError(
            "no clipboard was found",
            where="/copy",
            remedy="install wl-copy or xclip, or /export to a file",
        )
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07")  # also works over SSH
    sys.stdout.flush()
    return "through the terminal (if it supports that)"
