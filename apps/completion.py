"""`tinychat completion SHELL`, and what is offered when the Tab key is pressed: commands, options, models, files.

The scripts and the talking are click's; here is what it cannot know. It runs at every Tab: nothing heavy is imported,
and no model is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

VARIABLE = "_TINYCHAT_COMPLETE"  # set by the scripts: bash_complete, …
INSTALL = {
    "bash": """ eval "$(tinychat completion bash)" """.strip()
    + "      # at the end of ~/.bashrc; bash 4.4 or newer",
    "zsh": """ eval "$(tinychat completion zsh)" """.strip()
    + "       # at the end of ~/.zshrc, after compinit",
    "fish": "tinychat completion fish > ~/.config/fish/completions/tinychat.fish",
}


@click.command(
    epilog="\b\nTo have it in every new shell:\n" + "\n".join(f"  {line}" for line in INSTALL.values())
)
@click.argument("shell", type=click.Choice(list(INSTALL)))
def completion(shell: str) -> None:
    """Print the script that lets a shell complete commands, options and models with Tab."""
    from tinychat_mlx.apps.cli import cli

    found = get_completion_class(shell)
    assert found is not None, shell
    click.echo(found(cli, {}, "tinychat", VARIABLE).source())


def answer() -> int:
    """Print what a shell's Tab asks for -> exit code."""
    from tinychat_mlx.apps.cli import cli

    return shell_complete(cli, {}, "tinychat", VARIABLE, os.environ[VARIABLE])


def prepare(command: click.Command) -> click.Command:
    """Give the parameters of a command, and of those below it, the types that complete models, folders and files."""
    for param in command.params:
        metavar = param.metavar or ""
        if param.name == "model" or metavar.startswith(("MODEL", "SRC")):
            param.type = ModelName()
        elif metavar.startswith("ORG/NAME"):
            param.type = ModelName(recommended=True)
        elif metavar.startswith(("DIR", "DST")):
            param.type = click.Path(file_okay=False)
        elif metavar.startswith("FILE"):
            param.type = click.Path()
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        prepare(each)
    return command


class ModelName(click.types.StringParamType):
    """Models at hand, else folders; recommended: models worth fetching."""

    name = "model"

    def __init__(self, recommended: bool = False) -> None:
        self.recommended = recommended

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = _recommended() if self.recommended else _here()
        found = [CompletionItem(n) for n in dict.fromkeys(names) if n.lower().startswith(incomplete.lower())]
        return found or ([] if self.recommended else [CompletionItem(incomplete, type="dir")])


def _here() -> Iterator[str]:
    """The demo, the models of the hub's cache, and those we converted."""
    yield "demo"
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(
        os.environ.get("HF_HUB_CACHE") or Path(home) / "hub"
    ).expanduser()  # as hub.hub_cache, without NumPy
    for folder in sorted(cache.glob("models--*--*")):
        if any(folder.glob("snapshots/*/config.json")):
            yield "/".join(folder.name.split("--")[1:])
    from platformdirs import user_data_path

    ours = user_data_path("tinychat-mlx", appauthor=False) / "models"  # as apps.models.opening.home
    for folder in sorted(ours.glob("*--*-int4")):
        yield folder.name.removesuffix("-int4").replace("--", "/", 1)


def _recommended() -> list[str]:
    text = (files("tinychat_mlx.apps") / "models" / "recommended.json").read_text(encoding="utf-8")
    return [model["id"] for model in json.loads(text)["models"]]
