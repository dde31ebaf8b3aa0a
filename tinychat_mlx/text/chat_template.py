"""Chat templates: render messages to the text format that the model was trained on."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat_mlx.base.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template

    from tinychat_mlx.text.sandbox import Sandbox

Message = Mapping[str, Any]

# Three names of the same field. Most templates read the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Marks the end of the unfinished last message. The space shows whether the template strips its input.
_MARK = "TINYCHAT_CONTINUES_HERE "


class ChatTemplate:
    """The chat template of one model: Jinja text under one or more names, compiled on first use."""

    def __init__(self, sources: Mapping[str, str], origin: str, special_tokens: Mapping[str, str]) -> None:
        """sources: name -> Jinja text. origin: its file, for messages. special_tokens: `bos_token`, …."""
        self.sources = dict(sources)
        self.origin = origin
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, Template] = {}
        self._sandbox: Sandbox | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> str:
        """Render messages as transformers' apply_chat_template(tokenize=False) does.

        The text includes its special tokens: encode it without adding them again. continue_final_message leaves the last
        message open for the model to continue (a string names the field, e.g. "reasoning_content"); then no generation
        prompt is added. Further arguments (`enable_thinking`, …) are variables of the template. The template gets plain
        JSON types only. Raises TokenizerError.
        """
        try:
            chat = _plain_messages(messages)
            plain_tools, plain_documents = _plain_dicts("tool", tools), _plain_dicts("document", documents)
            variables = {**self._special_tokens, **plain(kwargs)}
        except RecursionError:
            raise TokenizerError(
                "nested too deeply", where="messages", remedy="pass plain JSON values"
            ) from None
        source = self._source(tools is not None)
        opened = _open_final_message(chat, continue_final_message, source) if continue_final_message else None
        variables |= {
            "messages": chat,
            "tools": plain_tools,
            "documents": plain_documents,
            "add_generation_prompt": add_generation_prompt and opened is None,
        }
        text = self._run(source, variables)
        return text if opened is None else _cut_at_mark(text, opened)

    def _source(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" in self.sources:
            return self.sources["default"]
        names = ", ".join(sorted(self.sources))
        raise TokenizerError(
            f"no template named 'default', only {names}", where=self.origin, remedy="choose one explicitly"
        )

    def _run(self, source: str, variables: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        from tinychat_mlx.text.sandbox import MAX_LENGTH, LimitError

        sandbox = self._shared_sandbox()
        pieces, length = [], 0
        try:
            with sandbox.deadline():
                for piece in self._template(sandbox, source).generate(variables):
                    sandbox.tick()
                    pieces.append(piece)
                    length += len(piece)
                    if length > MAX_LENGTH:
                        raise LimitError(f"it makes more than {MAX_LENGTH} characters of text")
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template is not valid: {_line(error)}", where=f"{self.origin}, line {error.lineno}"
            ) from error
        except LimitError as error:
            raise TokenizerError(
                f"the chat template was stopped: {_line(error)}", where=self.origin
            ) from error
        except TemplateError as error:
            raise TokenizerError(
                f"the chat template refuses the messages: {_line(error)}",
                where=self.origin,
                remedy="change the messages to what the template accepts",
            ) from error
        except Exception as error:  # template code may raise anything
            kind = type(error).__name__
            raise TokenizerError(
                f"the chat template failed: {kind}: {_line(error)}", where=self.origin
            ) from error
        return "".join(pieces)

    def _shared_sandbox(self) -> Sandbox:
        from tinychat_mlx.text.sandbox import Sandbox

        with self._lock:
            if self._sandbox is None:
                self._sandbox = Sandbox()
            return self._sandbox

    def _template(self, sandbox: Sandbox, source: str) -> Template:
        if source not in self._compiled:
            self._compiled[source] = sandbox.from_string(source)
        return self._compiled[source]


def find_template(
    folder: Path, tokenizer_config: Mapping[str, Any], explicit: str | None = None
) -> tuple[dict[str, str], str] | None:
    """Find a model's chat template -> (name -> Jinja text, its location), or None.

    In this order: the explicit text, chat_template.jinja with additional_chat_templates/*.jinja,
    tokenizer_config.json, chat_template.json (old processors). Raises TokenizerError if it is damaged.
    """
    if explicit is not None:
        return {"default": explicit}, "given chat template"
    path = folder / "chat_template.jinja"
    files = {"default": path} if path.is_file() else {}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if files:
        return {name: _read(file) for name, file in files.items()}, str(path)
    path = folder / "tokenizer_config.json"
    if tokenizer_config.get("chat_template") is not None:
        return _named(tokenizer_config["chat_template"], path), str(path)
    path = folder / "chat_template.json"
    if path.is_file():
        try:
            value = json.loads(_read(path))
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"not JSON ({error})", where=path, remedy="download it again") from error
        return _named(value.get("chat_template") if isinstance(value, dict) else None, path), str(path)
    return None


def _named(value: Any, path: Path) -> dict[str, str]:
    """Normalise the three forms of "chat_template" (text, dict, list of {name, template})."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and value and all(isinstance(x, str) for pair in value.items() for x in pair):
        return value
    raise TokenizerError("'chat_template' is neither text nor a list of {name, template}", where=path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TokenizerError(f"cannot be read ({reason})", where=path, remedy="download it again") from error


def _line(error: Exception) -> str:
    """Return the error's message on one line of at most 500 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:500] + "…"


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copy messages to plain JSON types, without None fields, with reasoning under both its names."""
    if not messages:
        raise TokenizerError("there is no message", where="messages", remedy="give at least one")
    chat = _plain_dicts("message", messages)
    assert chat is not None
    result = []
    for message in chat:
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        result.append(message)
    return result


def _plain_dicts(what: str, values: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    result = []
    for number, value in enumerate(values):
        copy = plain(value)
        if not isinstance(copy, dict):
            raise TokenizerError(
                f"{type(value).__name__} is not a JSON object",
                where=f"{what} {number}",
                remedy="give a dict",
            )
        result.append(copy)
    return result


def plain(value: Any) -> Any:
    """Copy a value as plain JSON types. Other objects become the name of their type, `<Image>`.

    The sandbox guards only methods of Python's built-in types. Other objects could give the template methods that
    write files (as in CVE-2024-56326).
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):  # subclasses (enums, NumPy scalars) have additional methods
        if isinstance(value, base):
            return getattr(base, f"__{base.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    numpy = sys.modules.get("numpy")  # NumPy scalars exist only if NumPy is imported
    if numpy is not None and isinstance(value, numpy.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return plain(dump())
    return f"<{type(value).__name__}>"


def _open_final_message(chat: list[dict[str, Any]], field: bool | str, source: str) -> str:
    """Append the mark to the last message's text (changes chat). Return that text."""
    name = field if isinstance(field, str) else "content"
    last = chat[-1]
    value = last.get(name)
    if value is None:
        raise TokenizerError(
            f"the last message has no {name!r} to continue",
            where="continue_final_message",
            remedy="give the last message this field",
        )
    copies = [key for key in _REASONING if last.get(key) == value] if name in _REASONING else [name]
    if not any(key in source for key in copies):
        raise TokenizerError(
            f"this chat template does not show {name!r}",
            where="continue_final_message",
            remedy="continue another field, or none",
        )
    if isinstance(value, str):
        last.update({key: value + _MARK for key in copies})
        return value
    if isinstance(value, list | tuple):
        for part in reversed(value):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + _MARK
                return text
    raise TokenizerError(
        "the last message has no text to continue",
        where="continue_final_message",
        remedy="give the last message a text",
    )


def _cut_at_mark(text: str, opened: str) -> str:
    """Cut the rendered text at the end of the open message."""
    end = text.rfind(_MARK.strip())
    if end < 0 or opened.strip() not in text:
        raise TokenizerError(
            "the chat template changes or omits the last message",
            where="continue_final_message",
            remedy="do not continue messages with this template",
        )
    # No space after the mark: the template strips messages, so it would have stripped this one too.
    return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()
