"""Read texts and chats from .txt .md .jsonl .json .csv .tsv .parquet files; all but .parquet also as .gz.

A record (a line of JSONL, a row of a table) is a chat or a text, depending on its columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import IO, Any

from tinychat_mlx.base.errors import UsageError, pip_install

Document = str | list[dict[str, Any]]  # a text, or the messages of a chat

CHATS = ("messages", "conversations", "conversation")
TEXTS = ("text", "content", "document", "article", "body")
# A question column and an answer column form a chat of two messages.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's names in "from"
KINDS = (".jsonl", ".parquet", ".csv", ".tsv", ".json", ".txt", ".md")
MAX_JSON = 256 << 20  # bytes per JSON value; a value is parsed in memory as a whole
MAX_CELL = 16 << 20  # characters per CSV cell


def kind_of(name: str) -> str | None:
    """Return the suffix that selects the reader, without .gz, or None if no reader supports the file."""
    plain = PurePath(name.removesuffix(".gz"))
    zipped = plain.name != PurePath(name).name
    return plain.suffix if plain.suffix in KINDS and not (zipped and plain.suffix == ".parquet") else None


def documents(name: str, file: IO[bytes], most: int = -1) -> Iterator[Document]:
    """Yield the documents of an open file lazily, without blank ones.

    `most` limits the characters of a plain text, which is one document. Raises UsageError with file and line.
    """
    yield from (d for d in _documents(name, file, most) if not isinstance(d, str) or d.strip())


def _documents(name: str, file: IO[bytes], most: int) -> Iterator[Document]:
    kind = kind_of(name)
    if kind is None:
        raise UsageError(
            f"not one of {', '.join(KINDS)}, or .gz of these", where=name, remedy="convert it to .jsonl"
        )
    try:
        if kind == ".parquet":
            yield from _parquet(name, file)
            return
        stream: Any = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        text = io.TextIOWrapper(
            stream, encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None
        )
        if kind in (".csv", ".tsv"):
            yield from _table(name, text, "\t" if kind == ".tsv" else ",")
        elif kind in (".jsonl", ".json"):
            yield from _json(name, text, kind)
        else:
            yield text.read(most)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8 text: {error.reason} at byte {error.start}", where=name, remedy="convert it to UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"the .gz file is damaged: {error}", where=name, remedy="make it again") from None


def _json(name: str, text: io.TextIOWrapper, kind: str) -> Iterator[Document]:
    """Read one value per line. A .json file may also be one value over several lines."""
    for number, line in enumerate(text, 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if kind == ".json" and number == 1:
                yield from _whole(name, line + text.read(MAX_JSON))
                return
            raise UsageError(f"not JSON: {error}", where=where, remedy="fix that line") from None
        if kind == ".json" and number == 1:
            yield from _records(name, value)
        else:
            yield document(value, where)


def _whole(name: str, text: str) -> Iterator[Document]:
    if len(text) > MAX_JSON:
        raise UsageError(
            f"one JSON value of more than {MAX_JSON >> 20} MiB", where=name, remedy="convert it to .jsonl"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"not JSON: {error}", where=name, remedy="fix the file, or give plain text as .txt"
        ) from None
    yield from _records(name, value)


def _records(name: str, value: Any) -> Iterator[Document]:
    """Yield the records of a list, or of an object that contains only one list ({"data": […]})."""
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    if len(lists) == 1 and _columns(value) is None:
        value = lists[0]
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield document(record, f"{name}, record {number}")


def _table(name: str, text: io.TextIOWrapper, delimiter: str) -> Iterator[Document]:
    csv.field_size_limit(MAX_CELL)
    rows = csv.DictReader(text, delimiter=delimiter)
    try:
        for number, row in enumerate(rows, 1):
            yield document(row, f"{name}, row {number}")
    except csv.Error as error:
        raise UsageError(
            f"not a valid table of this file type: {error}", where=name, remedy="convert it to .jsonl"
        ) from None


def _parquet(name: str, file: IO[bytes]) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError("parquet files need pyarrow", where=name, remedy=pip_install("parquet")) from None
    try:
        table = ParquetFile(file)
        wanted = _columns(table.schema_arrow.names)
        if wanted is None:
            raise _unknown(table.schema_arrow.names, name)
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=list(wanted)):
            for row in batch.to_pylist():
                number += 1
                yield document(row, f"{name}, row {number}")
    except ArrowException as error:
        raise UsageError(
            f"damaged, or not a parquet file: {str(error).splitlines()[0]}",
            where=name,
            remedy="make it again",
        ) from None


def _columns(names: Any) -> tuple[str, ...] | None:
    """Choose the columns with text: a chat, else a text, else question and answer."""
    for name in (*CHATS, *TEXTS):
        if name in names:
            return (name,)
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    return pair and (*pair, *(("input",) if pair[0] == "instruction" and "input" in names else ()))


def _unknown(names: Any, where: str) -> UsageError:
    has = ", ".join(str(n)[:30] for n in list(names)[:8])
    return UsageError(
        f"none of its columns has a known name: {has}",
        where=where,
        remedy=f"rename one to one of {', '.join((*CHATS, *TEXTS))}",
    )


def document(value: Any, where: str) -> Document:
    """Convert a string, or a record with a known column, to a text or a chat. Raises UsageError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{type(value).__name__} is neither a record nor a string",
            where=where,
            remedy='make it {"text": …}',
        )
    found = _columns(value)
    if found is None:
        raise _unknown(value, where)
    if len(found) > 1:
        return _pair(value, found, where)
    content = value[found[0]]
    if found[0] in CHATS:
        return _chat(content, f'{where}: "{found[0]}"')
    if not isinstance(content, str):
        raise UsageError(
            f'"{found[0]}" is not text but {type(content).__name__}', where=where, remedy="make it text"
        )
    return content


def _chat(content: Any, where: str) -> Document:
    messages = content if isinstance(content, list) else []
    chat = [m if isinstance(m, dict) and "role" in m else _from_sharegpt(m) for m in messages]
    if not chat or any(m is None for m in chat):
        raise UsageError(
            "not a list of messages with role and content",
            where=where,
            remedy="give each message a role and a content",
        )
    return [m for m in chat if m is not None]


def _from_sharegpt(message: Any) -> dict[str, Any] | None:
    if not isinstance(message, dict) or not {"from", "value"} <= set(message):
        return None
    return {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}


def _pair(value: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Document:
    question, answer, *more = (value[c] for c in columns)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UsageError(
            f"{columns[0]} and {columns[1]} are not both text", where=where, remedy="make both text"
        )
    asked = "\n\n".join([question, *(m for m in more if isinstance(m, str) and m.strip())])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
