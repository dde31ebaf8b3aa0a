"""`tinychat completion SHELL`: shell completion of commands, options, models and files.

Each script runs this program by its full path with the line up to the cursor. click computes the completions. The
scripts are not click's, because click's needs bash 4.4 and macOS has 3.2. This runs at every Tab key, so it imports
nothing heavy and opens no model.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import click
from click.shell_completion import CompletionItem, ShellComplete, split_arg_string

from tinychat_mlx.base import paths

VARIABLE = "_TINYCHAT_COMPLETE"  # the name of the calling shell
# PROGRAM is replaced by the command that starts this program. The scripts work in bash 3.2. For an empty answer, bash
# completes files and folders itself; zsh and fish get a marker for either (LEFT, below).
SCRIPTS = {
    "bash": """\
_tinychat() {
    local IFS=$'\\n'
    COMPREPLY=($(_TINYCHAT_COMPLETE=bash COMP_LINE="${COMP_LINE:0:$COMP_POINT}" COMP_WORD="$2" PROGRAM 2>/dev/null))
}
complete -o default -F _tinychat tinychat
""",
    "zsh": """\
#compdef tinychat
_tinychat() {
    local -a found
    local line="${(j: :)words[1,CURRENT-1]} $IPREFIX$PREFIX"
    found=("${(@f)$(_TINYCHAT_COMPLETE=zsh COMP_LINE="$line" PROGRAM 2>/dev/null)}")
    case $found[1] in
        //dirs) compset -P '--*='; _path_files -/ ;;
        //files) compset -P '--*='; _files ;;
        ?*) _describe -V tinychat found -U ;;
    esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _tinychat "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
    compdef _tinychat tinychat
fi
""",
    "fish": """\
function _tinychat
    set -lx COMP_LINE (commandline -cp)
    set -l found (_TINYCHAT_COMPLETE=fish PROGRAM 2>/dev/null)
    set -l option (string match -r '^--[^=]+=' -- (commandline -ct))
    set -l typed (string replace -r '^--[^=]+=' '' -- (commandline -ct))
    switch "$found[1]"
        case //dirs
            __fish_complete_directories "$typed" '' | string replace -r -- '^' "$option"
        case //files
            __fish_complete_path "$typed" | string replace -r -- '^' "$option"
        case '*'
            printf '%s\\n' $found
    end
end
complete -c tinychat -f -a '(_tinychat)'
""",
}
LEFT = {"dir": "//dirs", "file": "//files"}


def program() -> list[str]:
    """Return the command that starts this program from any folder."""
    path = Path(os.path.abspath(sys.argv[0]))
    if path.suffix == ".py" or not path.is_file():  # python -m tinychat_mlx
        return [sys.executable, "-m", "tinychat_mlx"]
    return [str(path)]


def quoted_for_fish(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def start_files() -> str:
    """Return the help on enabling completion in every new shell, with the full path of this program."""
    here, in_fish = (" ".join(map(quote, program())) for quote in (shlex.quote, quoted_for_fish))
    return (
        "\b\nTo enable it in every new shell:\n"
        f'  ~/.bashrc  eval "$({here} completion bash)"\n'
        f'  ~/.zshrc   eval "$({here} completion zsh)"\n'
        f"  fish       {in_fish} completion fish > ~/.config/fish/completions/tinychat.fish"
    )


@click.command(epilog=start_files())
@click.argument("shell", type=click.Choice(list(SCRIPTS)))
def completion(shell: str) -> None:
    """Print the script that lets a shell complete commands, options and models with Tab.

    The script has this program's full path, so it works wherever `tinychat` is installed.
    """
    quote = quoted_for_fish if shell == "fish" else shlex.quote
    click.echo(SCRIPTS[shell].replace("PROGRAM", " ".join(map(quote, program()))), nl=False)


def answer(cli: click.Command) -> int:
    """Print the completions at the cursor, one per line -> exit code."""
    shell, line = os.environ[VARIABLE], os.environ.get("COMP_LINE", "")
    *words, last = split_arg_string(
        f"{line}x"
    )  # after a space, the added x is a separate word; it is removed below
    last = last[:-1]
    found = ShellComplete(cli, {}, "tinychat", VARIABLE).get_completions(words[1:], last)
    option = f"{last.partition('=')[0]}=" if last.startswith("-") and "=" in last else ""
    for item in found:
        if item.type in LEFT:
            sys.stdout.write(f"{LEFT[item.type]}\n" if shell != "bash" else "")
        else:
            sys.stdout.write(f"{_format(shell, option, item, last)}\n")
    return 0


def _format(shell: str, option: str, item: CompletionItem, last: str) -> str:
    """Return the completed word, with its description if the shell shows one."""
    word, meaning = f"{option}{item.value}", " ".join((item.help or "").split())
    if shell == "zsh":
        word = word.replace("\\", "\\\\").replace(":", "\\:")
        return f"{word}:{meaning}" if meaning else word
    if shell == "fish":
        return f"{word}\t{meaning}" if meaning else word
    # bash replaces only the text after its last word break: in --model=a the part after the =.
    here = os.environ.get("COMP_WORD", "").lstrip("=")
    return word[len(last) - len(here) :] if last.endswith(here) else word


def prepare(command: click.Command) -> click.Command:
    """Set the parameter types that complete models, folders and files, for a command and its subcommands."""
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
    """Completes local models, else folders; recommended: models to download."""

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
    """Yield the demo, the models in the hub's cache, and the converted models."""
    yield "demo"
    for folder in sorted(paths.hub_cache().glob("models--*--*")):
        if any(folder.glob("snapshots/*/config.json")):
            yield "/".join(folder.name.split("--")[1:])
    for folder in sorted(paths.conversions().glob("*--*-int4")):
        yield folder.name.removesuffix("-int4").replace("--", "/", 1)


def _recommended() -> list[str]:
    text = (files("tinychat_mlx.apps") / "models" / "recommended.json").read_text(encoding="utf-8")
    return [model["id"] for model in json.loads(text)["models"]]
