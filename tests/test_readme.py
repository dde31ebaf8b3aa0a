"""Every command that README.md and CONTRIBUTING.md show runs as it stands there, pasted into a shell.

What needs a network, root, another machine or minutes is named in NOT_RUN, and at least parsed.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
import pytest
from markdown_it import MarkdownIt

from tinychat_mlx.apps.cli import cli

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are for a POSIX shell")
if not (ROOT / "README.md").exists():
    pytest.skip("a checkout's documents are not here", allow_module_level=True)

PROGRAMS = {
    "bash",
    "cd",
    "cmake",
    "echo",
    "eval",
    "git",
    "make",
    "pip",
    "python",
    "python3",
    "sudo",
    "tinychat",
}
NOT_RUN = {  # how a command begins -> why it is not run here
    "git clone": "needs a network",
    "sudo ": "needs root, and changes the machine",
    "pip install": "needs a network",
    ".venv/bin/pip install": "needs a network",
    "make ": "sets up a virtual environment from a network; `make -n` is run",
    ".venv/bin/tinychat bench": "measures for minutes, a billion weights in memory",
    ".venv/bin/tinychat chat -m Qwen/": "needs a network",
    ".venv/bin/tinychat models pull": "needs a network",
    ".venv/bin/tinychat models show Qwen/": "needs a network",
    ".venv/bin/tinychat models rm Qwen/": "there is nothing to remove yet",
    ".venv/bin/python -m tinychat_mlx.awq.table": "measures for minutes",
    ".venv/bin/python -m tinychat_mlx.awq.versus": "measures for minutes",
}
APPENDED = {  # to a command that would take more than seconds, or say nothing
    ".venv/bin/tinychat convert": "--calib-tokens 512",
    ".venv/bin/tinychat eval": "--max-tokens 1024",
    'eval "$(.venv/bin/tinychat completion': "&& complete -p tinychat",
}
STAND_INS = {
    "FOLDER": "tests/data/demo-fp16",
    "MODEL": "tests/data/demo-fp16",
    "ORG/MODEL": "tests/data/demo-fp16",
}
SAID = "who are you?\n"  # typed into a chat


@dataclass(frozen=True)
class Block:
    """A code block: the document, its first line's number, its text."""

    document: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def commands(self) -> list[str]:
        """Its lines, those that end in a backslash with their next."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]

    @property
    def is_python(self) -> bool:
        return self.text.startswith(("import ", "from "))

    @property
    def is_shell(self) -> bool:
        return any(program(line) for line in self.commands())


def program(line: str) -> bool:
    """Whether a line calls one."""
    first = line.split()[0]
    return first in PROGRAMS or first.startswith((".venv/bin/", "./"))


def blocks() -> list[Block]:
    found = []
    for document in ("README.md", "CONTRIBUTING.md"):
        for token in MarkdownIt().parse((ROOT / document).read_text(encoding="utf-8")):
            if token.type in ("code_block", "fence") and token.map:
                found.append(Block(document, token.map[0] + 1, token.content))
    return found


def not_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


SHELL = [b for b in blocks() if b.is_shell]
COMMANDS = [(str(b), c) for b in SHELL for c in b.commands()]
INLINE = sorted(
    {
        code
        for document in ("README.md", "CONTRIBUTING.md")
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", (ROOT / document).read_text(encoding="utf-8"))
        if re.match(r"(\.venv/bin/)?tinychat .", code)
    }
)


def test_a_block_with_a_command_has_nothing_else() -> None:
    assert len(SHELL) >= 5
    for block in SHELL:
        assert not block.is_python
        assert all(program(c) for c in block.commands()), f"{block}: a line is no command this test knows"


@pytest.mark.parametrize("block", [b for b in blocks() if b.is_python], ids=str)
def test_python_runs(block: Block, checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.text], cwd=checkout, env=environment(checkout), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr.strip()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree whose .venv/bin holds this interpreter and the command line run by it."""
    folder = tmp_path_factory.mktemp("checkout") / "tinychat-mlx"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name, arguments in (("python", ""), ("tinychat", "-m tinychat_mlx")):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        script.chmod(0o755)
    for name, target in STAND_INS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / target)
    return folder


def environment(checkout: Path) -> dict[str, str]:
    """Nothing of the user's own, and no network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TINYCHAT_", "PYTHON"))}
    home = str(checkout.parent / "home")
    return kept | {
        "PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "HOME": home,
        "XDG_DATA_HOME": home,
        "XDG_CONFIG_HOME": home,
        "XDG_CACHE_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "TINYCHAT_WEIGHT_CACHE": "0",
    }


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_run_one_after_the_other(document: str, checkout: Path) -> None:
    """As a newcomer pastes them, top to bottom."""
    for where, command in COMMANDS:
        if not where.startswith(document) or not_run(command):
            continue
        more = next((text for start, text in APPENDED.items() if command.startswith(start)), "")
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{re.sub(' +#.*', '', command)} {more}"],
            cwd=checkout, env=environment(checkout), input=SAID, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{where}: {command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or done.stderr.strip(), f"{where}: {command} says nothing"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [c for _, c in COMMANDS if not_run(c)])
def test_a_command_that_is_not_run_is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        made = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 0 and made.stdout.strip(), made.stderr
    elif words[0].endswith("tinychat"):
        parse_as_tinychat(words[1:], monkeypatch)
    elif words[0].endswith("python"):
        parse_as_python(words[1:], monkeypatch)


@pytest.mark.parametrize("command", INLINE)
def test_a_command_within_a_sentence_is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [w for w in shlex.split(command) if w != "…"]
    parse_as_tinychat(words[1:], monkeypatch)


def test_the_reasons_are_of_commands_that_are_shown() -> None:
    shown = [c for _, c in COMMANDS]
    assert all(any(c.startswith(start) for c in shown) for start in APPENDED)
    with pytest.raises(click.UsageError), pytest.MonkeyPatch.context() as patch:
        parse_as_tinychat(["bench", "--no-such-option"], patch)


def parse_as_tinychat(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that click does but the command itself. Raises click.UsageError."""
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    with cli.make_context("tinychat", list(args)) as context:
        cli.invoke(context)


class Parsed(Exception):
    """The arguments were understood."""


def parse_as_python(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`-m MODULE …` or `FILE …` up to the parsing of its arguments, which must leave nothing over."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *a: object) -> NoReturn:
        parse(self)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    if args[0] == "-m":
        monkeypatch.setattr(sys, "argv", args[1:])
        with pytest.raises(Parsed):
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        ast.parse((ROOT / args[0]).read_text(encoding="utf-8"))
