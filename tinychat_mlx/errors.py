"""Every error a user can cause: what is wrong, where, what to do.

A message that ends otherwise than with what to do gets its class's `remedy` where it is shown: `in_words`.
"""

from __future__ import annotations

import os

from tinychat_mlx.words import of_the_system


class TinychatError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback."""

    remedy = ""  # what helps with most errors of this class


class ModelNotFoundError(TinychatError):
    """A model name or path that leads nowhere."""

    remedy = "`tinychat models list` shows what is here"


class DownloadError(TinychatError):
    """The hub is out of reach, refuses for now, or the disk does not take what it sends."""

    remedy = "repeat the command; what has arrived is kept"


class FormatError(TinychatError):
    """A file of a checkpoint is damaged, incomplete or not of the form it claims."""

    remedy = "download the model again (`tinychat models pull --verify`), or take another upload of it"


class ConfigError(TinychatError):
    """config.json says something unknown, contradictory or unsupported."""

    remedy = "take another model: `tinychat models list --recommended`"


class SettingsError(ConfigError):
    """The user's own config file says something unknown or refused."""

    remedy = "mend the file; `tinychat config show --origin` shows what counts"


class TokenizerError(TinychatError):
    """A tokenizer or chat template is missing, damaged or refuses its input."""

    remedy = FormatError.remedy


class ContextFullError(TinychatError):
    """A prompt or a conversation has more tokens than the context holds."""


class BackendError(TinychatError):
    """A device, its library or its memory is not there or not enough."""

    remedy = "`tinychat doctor` says what is missing"


class UsageError(TinychatError):
    """An argument outside its meaning (a negative temperature, an empty prompt)."""


def in_words(error: BaseException) -> str:
    """An error as one line that ends with what to do.

    Our messages say it after a dash, as a command in backticks, or after their last colon, in the imperative.
    """
    said = of_the_system(error) if isinstance(error, OSError) else str(error)
    text = " ".join(said.split())
    remedy = error.remedy if isinstance(error, TinychatError) else ""
    last = text.rpartition(": ")[2].partition(" ")[0].strip(",")
    if not remedy or " — " in text or "`" in text or last in IMPERATIVES or "--" in text:
        return text
    return f"{text} — {remedy}"


def pip_install(extra: str = "", *options: str) -> str:
    """The command that installs this program, with one of its extras: from the checkout, where it runs from one."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    here = os.path.exists(os.path.join(root, "pyproject.toml"))
    what, editable = (root, ["-e"]) if here else ("tinychat-mlx", [])
    quote = '"' if os.name == "nt" else "'"  # shells take the brackets for a pattern
    named = f"{quote}{what}{f'[{extra}]' if extra else ''}{quote}"
    return " ".join(["pip install", *options, *editable, named])


# fmt: off
IMPERATIVES = frozenset({
    "accept", "allow", "ask", "attach", "check", "choose", "close", "convert", "delete", "download", "export", "free",
    "give", "install", "leave", "log", "look", "make", "mend", "pass", "pip", "put", "quantise", "read", "remove",
    "rename", "repeat", "run", "say", "see", "set", "shorten", "take", "try", "unset", "update", "upgrade", "use",
    "wait", "write",
})
# fmt: on
