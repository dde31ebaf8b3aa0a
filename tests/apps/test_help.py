"""--help covers every command and option, and `tinychat config --help` every setting, variable and exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import tinychat_mlx
from tinychat_mlx import apps, awq, backends
from tinychat_mlx.apps import cli as program
from tinychat_mlx.apps import config_file, environment, setting_table
from tinychat_mlx.apps.cli import cli, main
from tinychat_mlx.apps.config import EXIT_CODES


def commands() -> Iterator[tuple[str, click.Command]]:
    def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, click.Group):
            with click.Context(command) as ctx:
                for each in command.list_commands(ctx):
                    found = command.get_command(ctx, each)
                    assert found is not None
                    yield from below(f"{name} {each}", found)

    yield from below("tinychat", cli)


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[n for n, _ in commands()])
def test_every_command_and_option_says_what_it_is(name: str, command: click.Command) -> None:
    assert (command.help or "").strip(), name
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help and len(param.help) > 8, f"{name} {param.opts[0]} has no help"
            assert param.help[0].isupper() or not param.help[0].isalpha(), (
                f"{name} {param.opts[0]}: {param.help}"
            )
    shown = command.get_help(click.Context(command, info_name=name, terminal_width=80))
    assert max(len(row) for row in shown.splitlines() if sys.executable not in row) <= 100


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[n for n, _ in commands()])
def test_every_value_says_its_default_or_what_happens_without(name: str, command: click.Command) -> None:
    """Options with a built-in value show it, as [..] or in words."""
    with click.Context(command, info_name=name) as ctx:
        for param in command.params:
            default = param.get_default(ctx, call=False)
            if (
                not isinstance(param, click.Option)
                or param.is_flag
                or isinstance(default, (bool, type(None)))
            ):
                continue
            if not isinstance(default, (str, int, float)):
                continue
            record = param.get_help_record(ctx)
            assert record and str(default) in record[1], f"{name} {param.opts[0]}: {default!r} is not shown"


# settings ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def everything() -> str:
    done = CliRunner().invoke(cli, ["config", "--help"])
    assert done.exit_code == 0
    return done.output


def variables() -> set[str]:
    """Return the TINYCHAT_… variables that the source reads, or that click reads for an option."""
    names = {variable for _, c in commands() for p in c.params if isinstance(variable := p.envvar, str)}
    for package in (tinychat_mlx, apps, awq, backends):
        for path in Path(str(package.__file__)).parent.rglob("*"):
            if path.name != "environment.py" and path.suffix in (
                ".py",
                ".cpp",
                ".h",
                ".cu",
                ".cuh",
                ".metal",
            ):
                text = path.read_text(encoding="utf-8")
                names |= set(re.findall(r"\bTINYCHAT_[A-Z_]*[A-Z]\b", text))
    return names - {"TINYCHAT_TOOLS", "TINYCHAT_CONTINUES_HERE"}  # CMake's, and a mark in a template


def test_every_variable_is_listed_once_and_no_other(everything: str) -> None:
    listed = re.findall(r"^  (TINYCHAT_\w+)", everything, re.MULTILINE)
    assert set(listed) == variables() and len(listed) == len(set(listed)) > 30
    assert set(listed) == {*environment.ours()}


def test_the_config_files_example_is_one(
    everything: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = everything.partition("Config file")[2].partition("Environment variables")[0]
    example = "\n".join(line[4:] for line in shown.splitlines() if line.startswith("    "))
    (tmp_path / "config.toml").write_text(example)
    monkeypatch.setenv("TINYCHAT_CONFIG", str(tmp_path / "config.toml"))
    assert config_file.settings() == {"model": "demo", "temperature": 0.5}
    coder = config_file.settings("coder")
    assert coder["temperature"] == 0.5 and coder["model"].endswith("AWQ") and coder["stop"] == ["END"]
    assert str(tmp_path / "config.toml") in CliRunner().invoke(cli, ["config", "--help"]).output


def test_each_setting_of_the_file_is_an_option_of_the_chat_and_a_variable() -> None:
    chat = {p.name for name, c in commands() if name == "tinychat chat" for p in c.params}
    for name in setting_table.known():
        assert name in chat and f"TINYCHAT_{name.upper()}" in environment.ours()


def test_the_exit_codes_are_those(everything: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(r"^  (\d+)  ", everything.partition("Exit codes:")[2], re.MULTILINE)
    assert [int(row) for row in rows] == [*EXIT_CODES]

    def interrupted(context: click.Context) -> None:
        raise KeyboardInterrupt

    ends = [main(["--version"]), main(["run", "-m", "./no/such/folder", "x"]), main(["no-such-command"])]
    monkeypatch.setattr(program.cli, "invoke", interrupted)
    assert [*ends, main(["chat"])] == [*EXIT_CODES]


def test_help_is_found_where_it_is_looked_for() -> None:
    assert "tinychat config --help" in CliRunner().invoke(cli, ["--help"]).output
    for asked, same in ((["help"], ["--help"]), (["help", "models", "pull"], ["models", "pull", "--help"])):
        first, second = (
            subprocess.run(
                [sys.executable, "-m", "tinychat_mlx", *args], capture_output=True, check=True
            ).stdout
            for args in (asked, same)
        )
        assert first == second and first.startswith(b"Usage: ")
