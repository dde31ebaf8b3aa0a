"""One conversation, saved continuously: one JSON object per line, appended, so that a kill loses no message.

    {"session": 1, "id": "20260301-101500-3f", "created": …, "model": "demo"}      the first line
    {"role": "user", "content": "hi"}             a message; further keys belong to it (an answer's tokens: "ids")
    {"piece": "Hel"} {"piece": "lo"}              parts of an unfinished answer; the next message replaces them
    {"keep": 3}                                   only the first 3 messages are valid from here on
    {"system": "…"} {"title": "…"} {"model": "…"} the system prompt; the title; the model from here on
    {"summary": "…", "from": 8}                   replaces the messages before the ninth in the model's input

Only the owner can read the files (0600 in a 0700 folder). A kill may leave an incomplete last line, which is skipped.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinychat_mlx.base import paths as places
from tinychat_mlx.base.errors import FormatError, UsageError

Message = dict[str, Any]
PIECE_S = 0.3  # interval in seconds at which an unfinished answer is saved


def data_folder() -> Path:
    """Return the folder for chats and the history of prompts, readable by its owner only. Raises OSError."""
    folder = places.data()
    for each in (folder, folder / "sessions"):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@dataclass
class Session:
    """Messages after the system prompt, and their file. path None: in memory only."""

    path: Path | None = None
    model: str = ""
    system: str = ""
    title: str = ""
    created: float = field(default_factory=time.time)
    messages: list[Message] = field(default_factory=list)
    summary: str = ""  # replaces messages[:seen_from] in the model's input
    seen_from: int = 0
    _pieces: str = ""
    _flushed: float = 0.0

    @classmethod
    def new(cls, folder: Path | None, model: str = "", system: str = "") -> Session:
        """Create a session. Its file is written with the first message."""
        ident = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        return cls(folder / "sessions" / f"{ident}.jsonl" if folder else None, model, system)

    @classmethod
    def load(cls, path: Path) -> Session:
        """Load a file. Raises FormatError naming an invalid line."""
        made, pieces = cls(path), ""
        for number, record in _records(path):
            if "session" in record:
                made.model, made.created = str(record.get("model", "")), float(record.get("created", 0))
            elif "role" in record and isinstance(record.get("content"), str):
                made.messages.append(record)
                pieces = ""
            elif "piece" in record:
                pieces += str(record["piece"])
            elif isinstance(record.get("keep"), int):
                made._cut(record["keep"])
                pieces = ""
            elif "summary" in record and isinstance(record.get("from"), int):
                made.summary, made.seen_from = str(record["summary"]), record["from"]
            elif {"system", "title", "model"} & record.keys():
                for name in {"system", "title", "model"} & record.keys():
                    setattr(made, name, str(record[name]))
            else:
                raise FormatError(
                    "not a record of a chat",
                    where=f"{path}, line {number}",
                    remedy="remove the line or the file",
                )
        if pieces:  # killed during an answer: keep the partial one
            made.messages.append({"role": "assistant", "content": pieces, "finish_reason": "killed"})
        return made

    @property
    def ident(self) -> str:
        return self.path.stem if self.path else "unsaved"

    @property
    def name(self) -> str:
        """The given title, or the beginning of the first message."""
        first = next((m["content"] for m in self.messages if m["role"] == "user"), "")
        return self.title or " ".join(first.split())[:60]

    def for_model(self) -> list[Message]:
        """Return the messages for the chat template.

        A summary is prepended to the first message after it, because some templates do not accept a system prompt.
        """
        keys = ("role", "content", "reasoning_content", "ids")
        head = [{"role": "system", "content": self.system}] if self.system else []
        seen = [{k: m[k] for k in keys if k in m} for m in self.messages[self.seen_from :]]
        if self.summary and seen:
            seen[0]["content"] = (
                f"(Summary of the conversation so far: {self.summary})\n\n{seen[0]['content']}"
            )
        return head + seen

    # changes ----------------------------------------------------------------------------------------
    def add(self, message: Message) -> None:
        self.messages.append(message)
        self._pieces = ""
        self._append(message)

    def piece(self, text: str) -> None:
        """Save a part of an answer. `add` replaces all parts by the whole answer."""
        self._pieces += text
        now = time.monotonic()
        if self._pieces and now - self._flushed >= PIECE_S:
            self._append({"piece": self._pieces})
            self._pieces, self._flushed = "", now

    def keep(self, count: int) -> None:
        """Discard all but the first `count` messages."""
        self._cut(count)
        self._pieces = ""
        self._append({"keep": count})

    def _cut(self, count: int) -> None:
        del self.messages[count:]
        if count <= self.seen_from:  # the summary covers removed messages
            self.summary, self.seen_from = "", 0

    def sum_up(self, summary: str, seen_from: int) -> None:
        """Replace messages[:seen_from] by a summary in the model's input; the messages stay in the file."""
        self.summary, self.seen_from = summary, seen_from
        self._append({"summary": summary, "from": seen_from})

    def set_system(self, text: str) -> None:
        self.system = text
        self._append({"system": text})

    def set_model(self, name: str) -> None:
        if name != self.model:
            self.model = name
            self._append({"model": name})

    def set_title(self, text: str) -> None:
        self.title = text
        self._append({"title": text})

    def branch(self) -> Session:
        """Return a new session with the same messages, in a new file."""
        folder = self.path.parent.parent if self.path else None
        other = Session.new(folder, self.model, self.system)
        for message in self.messages:
            other.add(message)
        if self.summary:
            other.sum_up(self.summary, self.seen_from)
        if self.name:
            other.set_title(f"{self.name} (branch)")
        return other

    # disk -------------------------------------------------------------------------------------------
    def _append(self, record: Message) -> None:
        """Append to the file in one write. Nothing is written before the first message."""
        if self.path is None or not (self.messages or self.path.exists()):
            return
        lines = [record]
        if not self.path.exists():
            head: Message = {"session": 1, "id": self.ident, "created": self.created, "model": self.model}
            lines = [head, *([{"system": self.system}] if self.system else []), *lines]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, data.encode("utf-8", errors="surrogatepass"))
        finally:
            os.close(file)


def _records(path: Path) -> Iterator[tuple[int, Message]]:
    """Yield the numbered records of a file. The last line may be incomplete."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise FormatError(
            f"cannot be read: {e.strerror}", where=path, remedy="remove it, or begin a new chat"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:
            if number == len(lines):
                return
            raise FormatError(
                "not JSON", where=f"{path}, line {number}", remedy="remove the line or the file"
            ) from None
        if not isinstance(record, dict):
            raise FormatError(
                "not a record of a chat", where=f"{path}, line {number}", remedy="remove the line or the file"
            )
        if record:
            yield number, record


def saved(folder: Path) -> list[Path]:
    """Return the session files, the most recent first."""
    return sorted((folder / "sessions").glob("*.jsonl"), key=lambda p: p.stat().st_mtime, reverse=True)


def find(folder: Path, name: str) -> Path:
    """Return the session with this id, title or prefix; "last" is the latest. Raises UsageError."""
    paths = saved(folder)
    if name == "last" and paths:
        return paths[0]
    near = [p for p in paths if p.stem == name] or [p for p in paths if _title(p) == name]
    near = near or [p for p in paths if p.stem.startswith(name)]
    if not near:
        raise UsageError(f"no saved chat {name!r}", remedy="list them with /sessions")
    return near[0]


def _title(path: Path) -> str:
    try:
        return Session.load(path).title
    except FormatError:  # a damaged file must not hide the others
        return ""
