"""The config file: settings and presets in TOML, and `tinychat config` to see what counts and why.

`tinychat config --help` is where everything that can be set is written down.
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

from tinychat_mlx.errors import SettingsError
from tinychat_mlx.words import refusal

EXAMPLE = """\
model = "demo"
temperature = 0.5

[presets.coder]       # tinychat --preset coder
model = "Qwen/Qwen2.5-Coder-1.5B-Instruct-AWQ"
system = "@~/prompts/coder.txt"
stop = ["END"]
"""
FORMAT = """TOML. Each option of `tinychat chat` may stand there, with _ for - in its name; so may `preset`, the one to take
without --preset. A flag wins over the environment, that over the preset, that over the rest of the file, that over
the model's generation_config.json, that over what is built in. `tinychat config show --origin` says which did."""
HUBS = """HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they do for huggingface-hub, HTTPS_PROXY
and NO_COLOR what they do elsewhere."""


def config_path() -> Path:
    """TINYCHAT_CONFIG, or config.toml in the platform's folder for settings."""
    if named := os.environ.get("TINYCHAT_CONFIG"):
        return Path(named)
    from platformdirs import user_config_path

    return user_config_path("tinychat-mlx", appauthor=False) / "config.toml"


def settings(preset: str | None = None) -> dict[str, Any]:
    """What the file sets, the preset's settings over the others. Raises SettingsError naming file and key."""
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
    except ValueError as e:  # a TOML error names line and column
        raise SettingsError(f"not TOML: {e}", where=path) from None
    return found


def _checked(where: str, table: dict[str, Any]) -> dict[str, Any]:
    from tinychat_mlx.apps.options import known

    kinds = known()
    for name, value in table.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, [*kinds, "preset", "presets"], 1)
            remedy = f"use {near[0]!r}, if you meant that" if near else f"use one of {', '.join(kinds)}"
            raise SettingsError(f"unknown setting {name!r}", where=where, remedy=remedy)
        try:
            kinds[name](value)
        except (click.BadParameter, ValueError, TypeError) as e:
            reason = e.message.rstrip(".") if isinstance(e, click.BadParameter) else e
            raise SettingsError(f"{name}: {reason}", where=where) from None
    return table


class _Everything(click.Group):
    """Help that goes on with the file's format, the environment's variables and the exit codes."""

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
    """Show the settings and where each comes from. Below: all that can be set, and exit codes."""


@config.command()
def path() -> None:
    """Print where the config file is looked for."""
    click.echo(config_path())


def _show(ctx: click.Context, /, origin: bool, as_json: bool, **values: Any) -> None:
    """Print every setting that `tinychat chat` would begin with; takes the same options."""
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
            "(as the model says)" if row["value"] is None else json.dumps(row["value"], ensure_ascii=False)
        )
        click.echo(f"{name} = {value}" + (f"  # {row['origin']}" if origin else ""))


def _make_show() -> click.Command:
    from tinychat_mlx.apps.options import chat_options, model_options, sampling_options

    command = click.pass_context(_show)
    command = click.option("--json", "as_json", is_flag=True, help="As one JSON object.")(command)
    command = click.option("--origin", is_flag=True, help="Say where each value comes from.")(command)
    return click.command("show")(model_options(chat_options(sampling_options(command))))


config.add_command(_make_show())
