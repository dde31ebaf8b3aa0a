"""The options that several commands share, and what they mean to `load` and to the sampler.

Each has an environment variable, TINYCHAT_ and its name. A flag wins over the environment, that over the
config file, that over the model's generation_config.json, that over what is built in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tinychat_mlx.model import Model

F = TypeVar("F", bound=Callable[..., Any])
BACKENDS = ("auto", "mlx", "cuda", "cpu", "reference")

LOADING: dict[str, tuple[Any, str]] = {
    "model": (str, 'A folder, a Hugging Face id, or "demo".'),
    "backend": (click.Choice(BACKENDS), "Where to compute; a named one fails rather than falls back."),
    "exact": (bool, "Activations in full precision, not int8 (slower, reproduces the reference)."),
    "threads": (click.IntRange(1), "CPU threads."),
    "context": (click.IntRange(16), "Tokens the conversation may hold."),
}
SAMPLING: dict[str, tuple[Any, str]] = {
    "max_tokens": (click.IntRange(1), "Longest answer, in tokens."),
    "temperature": (click.FloatRange(0), "0 always takes the likeliest token; higher is freer."),
    "top_k": (click.IntRange(0), "Only the K likeliest tokens (0: all)."),
    "top_p": (click.FloatRange(0, 1, min_open=True), "Only the likeliest tokens that make up this share."),
    "min_p": (click.FloatRange(0, 1), "Only tokens at least this share as likely as the likeliest."),
    "repetition_penalty": (click.FloatRange(0, min_open=True), "Above 1: seen tokens become less likely."),
    "seed": (click.IntRange(0), "The same seed gives the same answer."),
}
DEFAULTS = {"model": "demo", "backend": "auto", "exact": False}


def _option(name: str, kind: Any, text: str) -> Callable[[F], F]:
    flags = [f"--{name.replace('_', '-')}", name]
    if name == "model":
        flags.insert(0, "-m")
    common: dict[str, Any] = {
        "help": text,
        "envvar": f"TINYCHAT_{name.upper()}",
        "default": DEFAULTS.get(name),
    }
    if kind is bool:
        return click.option(*flags, is_flag=True, **common)
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        common["metavar"] = "N" if isinstance(kind, click.IntRange) else "X"
    elif kind is str:
        common["metavar"] = name.upper()
    return click.option(*flags, type=kind, **common)


def model_options(command: F) -> F:
    """Add the options that say what to load."""
    for name, (kind, text) in reversed(LOADING.items()):
        command = _option(name, kind, text)(command)
    return command


def sampling_options(command: F) -> F:
    """Add the options that shape an answer."""
    stop = click.option(
        "--stop", multiple=True, metavar="TEXT", help="End the answer before this text (repeatable)."
    )
    command = stop(command)
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


def load_model(options: dict[str, Any]) -> Model:
    """Load what the options name. Raises a TinychatError that says what is missing."""
    import tinychat_mlx

    loading = {name: options[name] for name in ("backend", "exact", "threads", "context")}
    model: Model = tinychat_mlx.load(options["model"], **loading)
    return model


def text_or_file(value: str | None) -> str | None:
    """A system prompt, or @FILE that holds one."""
    if value is None or not value.startswith("@"):
        return value
    path = Path(value[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise click.BadParameter(f"cannot read {path}: {e}", param_hint="--system") from None
