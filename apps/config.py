"""The config file (settings and presets in TOML), and `tinychat config`, which shows settings and their sources.

`tinychat config --help` documents every setting.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from tinychat_mlx.base.errors import SettingsError
from tinychat_mlx.base.wording import refusal

EXAMPLE = """\
model = "demo"
temperature = 0.5

[presets.coder]       # tinychat --preset coder
model = "Qwen/Qwen2.5-Coder-1.5B-Instruct-AWQ"
system = "@~/prompts/coder.txt"
stop = ["END"]
"""
FORMAT = """TOML. Every option of `tinychat chat` is a key, with _ for - in its name. `preset` names the preset to use
without --preset. Order of precedence: flag, environment variable, preset, rest of the file, the model's
generation_config.json, built-in default. `tinychat config show --origin` prints the source of each value."""
HUBS = """HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT work as in huggingface-hub; HTTPS_PROXY and
NO_COLOR as usual."""


def config_path() -> Path:
    """Return TINYCHAT_CONFIG, or config.toml in the platform's config folder."""
    if named := os.environ.get("TINYCHAT_CONFIG"):
        return Path(named)
    from platformdirs import user_config_path

    return user_config_path("tinychat-mlx", appauthor=False) / "config.toml"


def settings(preset: str | None = None) -> dict[str, Any]:
    """Return the settings in the file, with the preset's values over them. Raises SettingsError."""
    path = config_path()
    if not path.is_file():
        if preset:
            raise SettingsError(
                f"there is no preset {preset!r}: the file does not exist",
                where=path,
                remedy="write the preset into it, or leave out --preset",
            )
        return {}
    table = _read(path)
    presets = table.pop("presets", {})
    preset = preset or table.pop("preset", None)
    table.pop("preset", None)
    if not isinstance(presets, dict) or not all(isinstance(p, dict) for p in presets.values()):
        raise SettingsError(
            "presets must be tables", where=path, remedy="write each preset as a table [presets.NAME]"
        )
    if preset and preset not in presets:
        raise SettingsError(
            f"there is no preset {preset!r}",
            where=path,
            remedy=f"use one of {', '.join(presets)}"
            if presets
            else "write it as a table [presets.NAME], or leave out --preset",
        )
    made = _checked(str(path), table)
    for name, values in presets.items():
        checked = _checked(f"{path}, presets.{name}", values)
        made |= checked if name == preset else {}
    return made


def _read(path: Path) -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        found: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        where, what, remedy = refusal(e)
        raise SettingsError(what, where=where, remedy=remedy) from None
    except ValueError as e:  # the message of a TOML error has line and column
        raise SettingsError(f"not TOML: {e}", where=path) from None
    return found


def _checked(where: str, table: dict[str, Any]) -> dict[str, Any]:
    from tinychat_mlx.apps.options import known

    kinds = known()
    for name, value in table.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, [*kinds, "preset", "presets"], 1)
            remedy = f"use {near[0]!r}" if near else f"use one of {', '.join(kinds)}"
            raise SettingsError(f"unknown setting {name!r}", where=where, remedy=remedy)
        try:
            kinds[name](value)
        except (click.BadParameter, ValueError, TypeError) as e:
            reason = e.message.rstrip(".") if isinstance(e, click.BadParameter) else e
            raise SettingsError(f"{name}: {reason}", where=where) from None
    return table


class _Everything(click.Group):
    """Adds the file's format, the environment variables and the exit codes to the help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from tinychat_mlx.apps import environment
        from tinychat_mlx.apps.cli import EXIT_CODES

        with formatter.section(f"Config file ({config_path()})"):
            formatter.write_text(" ".join(FORMAT.split()))
            formatter.write(f"\n{textwrap.indent(EXAMPLE, ' ' * (formatter.current_indent + 2))}")
        with formatter.section("Environment variables"):
            formatter.write_dl([*environment.ours().items()], col_max=24)
            formatter.write_paragraph()
            formatter.write_text(" ".join(HUBS.split()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


@click.group(cls=_Everything)
def config() -> None:
    """Show the settings and the source of each. Below: all settings, environment variables and exit codes."""


@config.command()
def path() -> None:
    """Print the path of the config file."""
    click.echo(config_path())


def _show(ctx: click.Context, /, origin: bool, as_json: bool, **values: Any) -> None:
    """Print every setting of `tinychat chat`. Takes the same options."""
    from tinychat_mlx.apps.options import SAMPLING, origins

    found = origins(ctx)
    rows = {
        name: {"value": value, "origin": found.get(name, "model" if name in SAMPLING else "built in")}
        for name, value in values.items()
    }
    if as_json:
        click.echo(json.dumps(rows, default=list))
        return
    for name, row in rows.items():
        value = (
            "(the model's default)" if row["value"] is None else json.dumps(row["value"], ensure_ascii=False)
        )
        click.echo(f"{name} = {value}" + (f"  # {row['origin']}" if origin else ""))


def _make_show() -> click.Command:
    from tinychat_mlx.apps.options import chat_options, model_options, sampling_options

    command = click.pass_context(_show)
    command = click.option("--json", "as_json", is_flag=True, help="As one JSON object.")(command)
    command = click.option("--origin", is_flag=True, help="Print the source of each value.")(command)
    return click.command("show")(model_options(chat_options(sampling_options(command))))


config.add_command(_make_show())
