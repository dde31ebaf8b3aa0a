"""Options shared by several commands, and their effect on `load` and on sampling.

Each option has an environment variable, TINYCHAT_ plus its name. Order of precedence: flag, environment variable,
config file, the model's generation_config.json, built-in default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tinychat_mlx.apps.setting_table import CHATTING, DEFAULTS, LOADING, SAMPLING
from tinychat_mlx.base.errors import UsageError
from tinychat_mlx.base.wording import refusal

if TYPE_CHECKING:
    from tinychat_mlx.loaded_model import Model

F = TypeVar("F", bound=Callable[..., Any])


def _option(name: str, kind: Any, text: str) -> Callable[[F], F]:
    flag = f"--{name.replace('_', '-')}"
    flags = [flag, name]
    if name == "model":
        flags.insert(0, "-m")
    common: dict[str, Any] = {
        "help": text,
        "envvar": f"TINYCHAT_{name.upper()}",
        "default": DEFAULTS.get(name),
        "show_default": name in DEFAULTS and kind is not bool,
    }
    if name == "think":
        return click.option(f"{flag}/--no-{name}", **common)
    if kind is bool:
        return click.option(*flags, is_flag=True, **common)
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        common["metavar"] = "N" if isinstance(kind, click.IntRange) else "X"
    elif kind is str:
        common["metavar"] = "TEXT" if name == "system" else name.upper()
    return click.option(*flags, type=kind, **common)


def _use_config(ctx: click.Context, param: click.Parameter, preset: str | None) -> None:
    """Read the config file before the other options: it provides their defaults."""
    from tinychat_mlx.apps.config_file import settings

    mine = {p.name for p in ctx.command.params}
    ctx.default_map = {name: value for name, value in settings(preset).items() if name in mine}


def model_options(command: F) -> F:
    """Add the options for loading a model, and --preset."""
    for name, (kind, text) in reversed(LOADING.items()):
        command = _option(name, kind, text)(command)
    return click.option(
        "--preset",
        metavar="NAME",
        envvar="TINYCHAT_PRESET",
        is_eager=True,
        expose_value=False,
        callback=_use_config,
        help="A set of settings from the config file (`tinychat config path`).",
    )(command)


def chat_options(command: F) -> F:
    """Add the options of a conversation."""
    for name, (kind, text) in reversed(CHATTING.items()):
        command = _option(name, kind, text)(command)
    return command


def sampling_options(command: F) -> F:
    """Add the options of sampling."""
    command = click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        envvar="TINYCHAT_STOP",
        help="End the answer before this text (repeatable).",
    )(command)
    for name, (kind, text) in reversed(SAMPLING.items()):
        command = _option(name, kind, text)(command)
    return command


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling options that were given; the model provides the others."""
    given = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    return given | ({"stop": tuple(options["stop"])} if options.get("stop") else {})


def origins(ctx: click.Context) -> dict[str, str]:
    """Return the source of each option's value: flag, environment or config. Defaults are left out."""
    words = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "config"}
    found = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name: words[source.name] for name, source in found.items() if source and source.name in words}


def load_model(
    options: dict[str, Any],
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    freed: int = 0,
) -> Model:
    """Load the model that the options name. Downloads and converts it if the user agrees.

    `say` gets notes; `progress` gets (layers done, total). freed: bytes of a model that will be unloaded.
    Raises a TinychatError if something is missing or does not fit.
    """
    import tinychat_mlx

    name, context = str(options["model"]), options["context"]
    if name != "demo":
        from tinychat_mlx import memory_plan
        from tinychat_mlx.apps.models.prepare import facts_of, settle

        name = settle(options, say, freed)
        if found := facts_of(name, options):
            context = memory_plan.context_for(found, memory_plan.chosen(options), context, say, freed)
    loading = {key: options[key] for key in LOADING if key not in ("model", "convert")} | {"context": context}
    if progress is not None:
        loading["progress"] = progress
    model: Model = tinychat_mlx.load(name, **loading)
    if options["engine"] != "tinychat":
        say(model.device.why)
    return model


def check_writable(path: Path, option: str) -> None:
    """Raise UsageError, before any work, if `path` cannot be written. Tests the nearest existing parent folder.

    No file remains.
    """
    from tempfile import TemporaryDirectory

    whole = path.absolute()
    there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise UsageError(
            f"{there} is a file, not a folder", where=f"{option} {path}", remedy="choose another place"
        )
    try:
        path.with_name(f".{path.name}.converting").exists()  # the longest name that will be derived from it
        with TemporaryDirectory(prefix=".tinychat-", dir=there):
            pass
    except FileNotFoundError:
        raise UsageError(
            f"{there} takes no new files", where=f"{option} {path}", remedy="choose another place"
        ) from None
    except OSError as e:
        where, what, remedy = refusal(OSError(e.errno, e.strerror, str(path)))
        raise UsageError(what, where=f"{option} {where}", remedy=remedy) from None


def text_or_file(value: str | None) -> str | None:
    """Return a system prompt, or the content of @FILE. Raises UsageError if the file cannot be read."""
    if value is None or not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as e:
        where, what, remedy = refusal(e)
        raise UsageError(what, where=f"system prompt {where}", remedy=remedy) from None
    except UnicodeDecodeError:
        raise UsageError(
            "not UTF-8 text", where=f"system prompt {path}", remedy="convert it to UTF-8"
        ) from None
