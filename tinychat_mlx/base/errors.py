"""The errors a user can cause. Each one states what is wrong, where, and what to do."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, TypeVar

from tinychat_mlx.base.wording import of_the_system


class TinychatError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback.

    what: the fault, as a clause without a full stop. where: the file, folder, option or device; "" if there is none.
    remedy: what the user can do, in the imperative. `str(error)` is "where: what — remedy" on one line.
    """

    remedy: str

    def __init__(self, what: str, *, where: object = "", remedy: str) -> None:
        super().__init__(what)
        self.what, self.where, self.remedy = _joined(what), _joined(str(where)), _joined(remedy)

    @property
    def problem(self) -> str:
        """The message without the remedy: "where: what"."""
        return f"{self.where}: {self.what}" if self.where else self.what

    def __str__(self) -> str:
        return f"{self.problem} — {self.remedy}"

    def __reduce__(self) -> tuple[Any, ...]:  # Exception's own drops keywords: pickle and copy fail
        return partial(type(self), where=self.where, remedy=self.remedy), (self.what,)


class _WithRemedy(TinychatError):
    """An error whose class declares the `remedy` that helps in most cases."""

    def __init__(self, what: str, *, where: object = "", remedy: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy or type(self).remedy)


class ModelNotFoundError(_WithRemedy):
    """No model has this name or path."""

    remedy = "run `tinychat models list` to see the installed models"


class DownloadError(_WithRemedy):
    """The hub cannot be reached or refuses, or the disk has no room for a download."""

    remedy = "repeat the command; files already downloaded are kept"


class FormatError(_WithRemedy):
    """A file of a checkpoint is damaged, incomplete or not in the format it claims."""

    remedy = "download the model again (`tinychat models pull --verify`), or use another upload of it"


class ConfigError(_WithRemedy):
    """config.json has a value that is unknown, contradictory or not supported."""

    remedy = "choose another model: `tinychat models list --recommended`"


class SettingsError(ConfigError):
    """The user's own config file has a value that is unknown or not valid."""

    remedy = "fix the file; `tinychat config show --origin` shows every setting and its source"


class TokenizerError(_WithRemedy):
    """A tokenizer or chat template is missing, damaged or refuses its input."""

    remedy = FormatError.remedy


class ContextFullError(TinychatError):
    """A prompt or a conversation has more tokens than the context holds."""


class BackendError(_WithRemedy):
    """A device, its library or its memory is missing or not sufficient."""

    remedy = "run `tinychat doctor` to see what is missing"


class UsageError(TinychatError):
    """An argument is not valid (a negative temperature, an empty prompt)."""


Error = TypeVar("Error", bound=TinychatError)


def within(where: object, error: Error) -> Error:
    """Return the same error with `where` prepended to its location."""
    places = filter(None, (str(where), error.where))
    return type(error)(error.what, where=": ".join(places), remedy=error.remedy)


def one_line(error: BaseException) -> str:
    """Return the error on one line. OSError becomes a plain reason and a remedy."""
    return _joined(of_the_system(error) if isinstance(error, OSError) else str(error))


def _joined(text: str) -> str:
    """Replace every run of white space by one space."""
    return " ".join(text.split())


def pip_install(extra: str = "", *options: str) -> str:
    """Return the pip command that installs this package with an extra; from a checkout, an editable install."""
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
    here = os.path.exists(os.path.join(root, "pyproject.toml"))
    what, editable = (root, ["-e"]) if here else ("tinychat-mlx", [])
    quote = '"' if os.name == "nt" else "'"  # shells expand unquoted brackets
    named = f"{quote}{what}{f'[{extra}]' if extra else ''}{quote}"
    return " ".join(["pip install", *options, *editable, named])
