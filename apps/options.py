"""The options that several commands share, and what they mean to `load` and to the sampler.

Each has an environment variable, TINYCHAT_ and its name. A flag wins over the environment, that over the
config file, that over the model's generation_config.json, that over what is built in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tinychat_mlx import backend_names
from tinychat_mlx.errors import UsageError
from tinychat_mlx.words import refusal

if TYPE_CHECKING:
    from tinychat_mlx.model import Model

F = TypeVar("F", bound=Callable[..., Any])
BACKENDS = ("auto", *backend_names.BACKENDS)

LOADING: dict[str, tuple[Any, str]] = {
    "model": (str, 'A folder, a Hugging Face id, or "demo".'),
    "backend": (click.Choice(BACKENDS), "Where to compute; a named one fails rather than falls back."),
    "engine": (
        click.Choice(["tinychat", "mlx-lm"]),
        "Whose graph computes: mlx-lm knows architectures that ours does not (on a Mac).",
    ),
    "exact": (bool, "Activations in full precision, not int8 (slower, reproduces the reference)."),
    "threads": (click.IntRange(1), "CPU threads [OMP_NUM_THREADS, or one a fast core]."),
    "context": (
        click.IntRange(16),
        "Tokens the conversation may hold [all the model can, at most 8192, and what fits in memory].",
    ),
    "convert": (
        click.Choice(["ask", "always", "never"]),
        "Make a hub model that is in 16 bits int4, once; without a terminal ask means never.",
    ),
}
SAMPLING: dict[str, tuple[Any, str]] = {
    "max_tokens": (click.IntRange(1), "Longest answer, in tokens [what the context has room for]."),
    "temperature": (click.FloatRange(0), "0 always takes the likeliest token; higher is freer."),
    "top_k": (click.IntRange(0), "Only the K likeliest tokens (0: all)."),
    "top_p": (click.FloatRange(0, 1, min_open=True), "Only the likeliest tokens that make up this share."),
    "min_p": (click.FloatRange(0, 1), "Only tokens at least this share as likely as the likeliest."),
    "repetition_penalty": (click.FloatRange(0, min_open=True), "Above 1: seen tokens become less likely."),
    "seed": (click.IntRange(0), "The same seed gives the same answer [another each time]."),
}
CHATTING: dict[str, tuple[Any, str]] = {
    "system": (str, "System prompt, or @FILE."),
    "on_full": (
        click.Choice(["stop", "slide", "compact"]),
        "When the context is full: cut the answer, drop the oldest messages, or sum up; it is always said.",
    ),
    "think": (bool, "Let a model that can think do so, or not [as its template has it]."),
    "plain": (bool, "No colour, no Markdown, no redraws."),
    "no_save": (bool, "Keep this chat off the disk."),
}
DEFAULTS = {
    "model": "demo",
    "backend": "auto",
    "engine": "tinychat",
    "exact": False,
    "convert": "ask",
    "on_full": "stop",
    "plain": False,
    "no_save": False,
}


def known() -> dict[str, Callable[[Any], Any]]:
    """Setting -> what checks its value; for the config file."""

    def check(kind: Any) -> Callable[[Any], Any]:
        if kind in (bool, str):
            return lambda value: value if isinstance(value, kind) else _refuse(value, kind)
        return lambda value: kind.convert(value, None, None)

    rows = {**LOADING, **CHATTING, **SAMPLING}
    checks = {name: check(kind) for name, (kind, _) in rows.items()}
    texts = check(str)
    return checks | {
        "stop": lambda value: [texts(v) for v in value] if isinstance(value, list) else _refuse(value, list)
    }


def _refuse(value: object, kind: type) -> None:
    raise TypeError(
        f"{value!r} is not {({bool: 'true or false', str: 'text', list: 'a list of texts'})[kind]}"
    )


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
    """Before the other options are looked at: their defaults come from the config file."""
    from tinychat_mlx.apps.config import settings

    mine = {p.name for p in ctx.command.params}
    ctx.default_map = {name: value for name, value in settings(preset).items() if name in mine}


def model_options(command: F) -> F:
    """Add the options that say what to load, and the config file with its presets."""
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
    """Add the options that shape an answer."""
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
    """Those of the options that shape an answer and were given; the rest is the model's to say."""
    given = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    return given | ({"stop": tuple(options["stop"])} if options.get("stop") else {})


def origins(ctx: click.Context) -> dict[str, str]:
    """Where each option's value comes from: flag, environment, config; what has only a default is left out."""
    words = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "config"}
    found = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name: words[source.name] for name, source in found.items() if source and source.name in words}


def load_model(
    options: dict[str, Any],
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    freed: int = 0,
) -> Model:
    """Load what the options name, after the download and the conversion that the user agrees to.

    `say` gets notes, `progress` layers done and in total. freed: bytes that a model about to go gives back.
    Raises a TinychatError: what is missing, or does not fit.
    """
    import tinychat_mlx

    name, context = str(options["model"]), options["context"]
    if name != "demo":
        from tinychat_mlx.apps import fit
        from tinychat_mlx.apps.models.opening import facts_of, settle

        name = settle(options, say, freed)
        if found := facts_of(name, options):
            context = fit.context_for(found, fit.chosen(options), context, say, freed)
    loading = {key: options[key] for key in LOADING if key not in ("model", "convert")} | {"context": context}
    if progress is not None:
        loading["progress"] = progress
    model: Model = tinychat_mlx.load(name, **loading)
    if options["engine"] != "tinychat":
        say(model.device.why)
    return model


def check_writable(path: Path, option: str) -> None:
    """Raises UsageError, before any work, if nothing could be written at `path`: it is tried in the nearest folder there is.

    Nothing is left behind.
    """
    from tempfile import TemporaryDirectory

    whole = path.absolute()
    there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise UsageError(
            f"{there} is a file, not a folder", where=f"{option} {path}", remedy="choose another place"
        )
    try:
        path.with_name(f".{path.name}.converting").exists()  # the longest name that is made of it
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
    """A system prompt, or @FILE that holds one. Raises UsageError where the file cannot be read."""
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
