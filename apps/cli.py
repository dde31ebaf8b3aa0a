"""The command line: the table of commands, exit codes, and error output.

    tinychat [chat|run|…]        the answer goes to stdout, everything else to stderr

A command's module is imported when the command runs, so that --help imports only click.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from tinychat_mlx import __version__
from tinychat_mlx.apps.terminal import forgive_encodings, wrapped
from tinychat_mlx.base.errors import TinychatError, UsageError, one_line

# name -> module under tinychat_mlx, its click command, help. A row is hidden if its module is missing.
COMMANDS = {
    "chat": ("apps.chat.cli", "chat", "Chat in the terminal (the default command)."),
    "run": ("apps.run", "run", "Answer one prompt: plain text or JSON on stdout."),
    "serve": ("apps.serve", "serve", "Serve an OpenAI-compatible API."),
    "convert": ("apps.convert", "convert", "Quantise a model to int4 with AWQ."),
    "eval": ("apps.eval", "evaluate", "Measure the quality loss of quantisation."),
    "bench": ("apps.bench", "bench", "Measure speed on this machine."),
    "models": ("apps.models", "models", "List, download, show and remove models."),
    "config": ("apps.config", "config", "Show the settings, the source of each, and all available ones."),
    "doctor": (
        "apps.doctor",
        "doctor",
        "Show the devices and software of this machine, and what is missing.",
    ),
    "completion": ("apps.completion", "completion", "Let bash, zsh or fish complete commands and models."),
}


class Lazy(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _, _) in COMMANDS.items() if _exists(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module, attribute, _ = COMMANDS.get(cmd_name, ("", "", ""))
        if not module or not _exists(module):
            return None
        found: click.Command = getattr(importlib.import_module(f"tinychat_mlx.{module}"), attribute)
        return _completion().prepare(found) if ctx.resilient_parsing else found  # for shell completion

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept `tinychat [-m MODEL]` for `tinychat chat …`, and `tinychat help COMMAND` for its --help."""
        own = ["-h", "--help"] + [name for p in self.params for name in p.opts]
        if ctx.resilient_parsing and not args:
            return super().parse_args(ctx, args)  # shell completion after `tinychat`: the commands
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        if not args or (args[0].startswith("-") and args[0] not in own):
            args = ["chat", *args]
        return super().parse_args(ctx, args)


def _completion() -> Any:
    return importlib.import_module("tinychat_mlx.apps.completion")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(f"tinychat_mlx.{module}") is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


@click.group(
    cls=Lazy,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Run `tinychat COMMAND --help` for details. `tinychat config --help` lists the config file's settings, all "
    "environment variables and the exit codes.",
)
@click.version_option(__version__, prog_name="tinychat")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def cli(debug: bool) -> None:
    """Chat with int4 language models on a MacBook, a Jetson, a Raspberry Pi or a PC.

    MODEL is a folder, a Hugging Face id, or "demo" (bundled; the default).
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line -> its exit code. Every error becomes one line here."""
    forgive_encodings()
    if "_TINYCHAT_COMPLETE" in os.environ:
        return int(_completion().answer(cli))
    args = list(sys.argv[1:] if argv is None else argv)
    options = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in options
    if debug:  # anywhere on the line
        args.remove("--debug")
    try:
        # Not cli.main(): it prints a line for Ctrl-C and fails on a broken pipe.
        with cli.make_context("tinychat", args) as context:
            result: Any = cli.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader has closed the pipe. Python flushes stdout again at exit, so redirect it to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, click.Abort):
        return 130
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        return _misused(e)
    except Exception as e:
        if debug:
            raise
        return _report(e)


def _misused(error: click.ClickException) -> int:
    """Print the usage and the error -> exit code."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(
            f"{error.ctx.get_usage()}\n`{error.ctx.command_path} --help` prints all options.\n", err=True
        )
    _say_error(error.format_message())
    return error.exit_code


def _say_error(text: str) -> None:
    click.echo(wrapped(f"error: {' '.join(text.split())}", sys.stderr, 2), err=True)


def _report(error: Exception) -> int:
    """Print one line to stderr -> exit code."""
    if isinstance(error, (TinychatError, OSError)):
        text = one_line(error)
    elif isinstance(error, MemoryError):
        text = "out of memory — close other programs, or choose a smaller model or a smaller --context"
    else:
        text = f"a defect: {type(error).__name__}: {error} — run `tinychat --debug …` and report its output"
    _say_error(text)
    return 2 if isinstance(error, UsageError) else 1
