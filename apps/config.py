"""The config file (settings and presets in TOML), and `tinychat config`, which shows settings and their sources.

`tinychat config --help` documents every setting.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click

from tinychat_mlx.apps.config_file import config_path

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
EXIT_CODES = {
    0: "success",
    1: "failure: the last line on stderr states the reason",
    2: "usage error: an option, argument or file is not valid",
    130: "interrupted (Ctrl-C)",
}
HUBS = """HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT work as in huggingface-hub; HTTPS_PROXY and
NO_COLOR as usual."""


class _Everything(click.Group):
    """Adds the file's format, the environment variables and the exit codes to the help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from tinychat_mlx.apps import environment

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
    from tinychat_mlx.apps.options import origins
    from tinychat_mlx.apps.setting_table import SAMPLING

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
