"""Every command in README.md, CONTRIBUTING.md and docs/ runs as written, pasted into a shell.

A command that needs a network, root, another machine or minutes is listed in NOT_RUN and only parsed.
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
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
import pytest
import tiny_dense
from checkout import ROOT
from markdown_it import MarkdownIt
from stand_in_hub import Hub

from tinychat_mlx.apps.cli import cli
from tinychat_mlx.backends.cpu.native_abi import find_library

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are for a POSIX shell")
if not (ROOT / "README.md").exists():
    pytest.skip("the documents are in the checkout only", allow_module_level=True)

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
PROGRAMS = {
    ".",
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
NOT_RUN = {  # start of a command -> reason why it is not run here
    "git clone": "needs a network",
    "sudo ": "needs root, and changes the machine",
    "pip install": "needs a network",
    "make ": "sets up a virtual environment from a network; `make -n` is run",
    "tinychat bench --shape llama-3.2-1b --head int4 --against": "needs packages that the tests have not",
    "tinychat bench --shape llama-3.2-1b --kernels": "needs a Mac",
}
ACTIVATE = ". .venv/bin/activate\n"  # README.md shows it; the pages in docs/ assume it
# pattern -> text that makes a command shorter, non-interactive, or visible; the last of two values counts
APPENDED = {
    r"\. \.venv/bin/activate": "&& command -v tinychat",
    "tinychat convert .*demo-fp16": "--calib-tokens 256",
    "tinychat convert .*--report": "--report-text CONTRIBUTING.md",
    "tinychat convert .*--format awq": "--method rtn",
    "tinychat eval": "--max-tokens 1024",
    "tinychat bench": "--shape tiny --pp 16 --tg 4",
    "tinychat models rm": "--yes",
    r"python -m tinychat_mlx\.awq\.quality\.table": "--calib-tokens 256 --bits 3 --seeds 1 --group-size 32",
    r"python -m tinychat_mlx\.awq\.quality\.versus": "--tokens 140 --group-size 32",
    r'eval "\$\(tinychat completion': "&& complete -p tinychat",
}
ON_LESS = "docs/quantising.md"  # its conversions and tables run with a tiny model under the demo's name
ON_THE_HUB = {  # model -> the stand-in's content under its name
    "Qwen/Qwen2.5-1.5B-Instruct-AWQ": "tinychat_mlx/models/demo",
    "Qwen/Qwen3-0.6B": "tests/data/demo-fp16",
}
STAND_INS = {
    "FOLDER": "tests/data/demo-fp16",
    "MODEL": "tests/data/demo-fp16",
    "ORG/MODEL": "tests/data/demo-fp16",
}
SAID = "who are you?\n"  # typed into a chat


@dataclass(frozen=True)
class Block:
    """A code block: the document, the number of its first line, its text."""

    document: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def commands(self) -> list[str]:
        """Return its lines, joining lines that end in a backslash with the next."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]

    @property
    def is_python(self) -> bool:
        return self.text.startswith(("import ", "from "))

    @property
    def is_shell(self) -> bool:
        return any(program(line) for line in self.commands())


def program(line: str) -> bool:
    """Return whether a line calls a program."""
    first = line.split()[0]
    return first in PROGRAMS or first.startswith("./")


def blocks() -> list[Block]:
    found = []
    for document in DOCUMENTS:
        for token in MarkdownIt().parse((ROOT / document).read_text(encoding="utf-8")):
            if token.type in ("code_block", "fence") and token.map:
                found.append(Block(document, token.map[0] + 1, token.content))
    return found


def appended(command: str) -> str:
    return " ".join(text for pattern, text in APPENDED.items() if re.match(pattern, command))


def not_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


SHELL = [b for b in blocks() if b.is_shell]
COMMANDS = [(str(b), c) for b in SHELL for c in b.commands()]
INLINE = sorted(
    {
        code
        for document in DOCUMENTS
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", (ROOT / document).read_text(encoding="utf-8"))
        if code.startswith("tinychat ")
    }
)


def test_a_block_with_a_command_has_nothing_else() -> None:
    assert len(SHELL) >= 5
    for block in SHELL:
        assert not block.is_python
        assert all(program(c) for c in block.commands()), f"{block}: a line is no command this test knows"
        assert "#" not in block.text, (
            f"{block}: zsh, the default shell of macOS, accepts no comments at the prompt"
        )


@pytest.mark.parametrize("block", [b for b in blocks() if b.is_python], ids=str)
def test_python_runs(block: Block, checkout: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [".venv/bin/python", "-c", block.text], cwd=checkout, env=environment, capture_output=True, text=True, timeout=1200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr.strip()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with a .venv like that of `make chat`, but with this interpreter's packages."""
    folder = tmp_path_factory.mktemp("checkout") / "tinychat-mlx"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    venv.create(folder / ".venv", symlinks=True)
    (packages,) = (folder / ".venv").glob("lib/python*/site-packages")
    places = dict.fromkeys([str(folder), *(sysconfig.get_path(name) for name in ("purelib", "platlib"))])
    (packages / "tinychat.pth").write_text("\n".join(places))
    script = folder / ".venv" / "bin" / "tinychat"
    script.write_text(
        f"#!{script.parent}/python\nfrom tinychat_mlx.apps.cli import main\nraise SystemExit(main())\n"
    )
    script.chmod(0o755)
    shutil.copy(find_library(), folder / "tinychat_mlx")
    for name, target in STAND_INS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / target)
    return folder


@pytest.fixture(scope="session")
def less(checkout: Path) -> Path:
    """A folder with the same names, with a model of a few thousand weights and its vocabulary."""
    data = checkout.parent / "less" / "tests" / "data"
    tiny_dense.save(data / "demo-fp16")
    for seed, name in enumerate(("demo_calib.jsonl", "demo_heldout_text.jsonl"), 1):
        tiny_dense.text(data, 900, seed).rename(data / name)
    folder = data.parent.parent
    (folder / ".venv").symlink_to(checkout / ".venv")
    return folder


@pytest.fixture(scope="session")
def environment(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment without user settings or `tinychat` in PATH, with the stand-in hub and one thread."""
    root = tmp_path_factory.mktemp("hub")
    for name, target in ON_THE_HUB.items():
        (root / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "models" / name).symlink_to(checkout / target)
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("TINYCHAT_", "PYTHON", "VIRTUAL_ENV", "HF_"))
    }
    home = str(checkout.parent / "home")
    elsewhere = [p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "tinychat").exists()]
    own = {name: home for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    with Hub(root) as hub:
        more = {
            "PATH": os.pathsep.join(elsewhere),
            "TINYCHAT_WEIGHT_CACHE": "0",
            "OMP_NUM_THREADS": "1",
        } | own
        yield kept | more | hub.environ(checkout.parent / "hf")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run_one_after_the_other(
    document: str, checkout: Path, less: Path, environment: dict[str, str]
) -> None:
    """A page from top to bottom, as a newcomer pastes it: a sourced file affects the commands after it."""
    entered = "" if document == "README.md" else ACTIVATE
    for where, command in COMMANDS:
        if not where.startswith(f"{document}:") or not_run(command):
            continue
        more = appended(command)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", f"{entered}{command} {more}"],
            cwd=less if document == ON_LESS else checkout, env=environment, input=SAID, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{where}: {command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or done.stderr.strip(), f"{where}: {command} prints nothing"
        assert "Traceback" not in done.stderr
        entered += f"{command}\n" if command.startswith(". ") else ""
    if document == "README.md":
        (report,) = re.findall(r"The report is `(\S+)`", (ROOT / document).read_text(encoding="utf-8"))
        assert (checkout / report).read_text(encoding="utf-8").startswith("# ")


def test_make_chat_says_what_it_does_and_no_more() -> None:
    """No recipe of `make chat` and its prerequisites is echoed."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("chat", ".venv/python.done", ".venv/chat.done"):
        (recipe,) = re.findall(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert all(line.startswith("\t@") for line in recipe.splitlines()), recipe


@pytest.mark.parametrize("command", [c for _, c in COMMANDS if not_run(c)])
def test_a_command_that_is_not_run_is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = shlex.split(command)
    if words[0] == "make":
        made = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 0 and made.stdout.strip(), made.stderr
    elif words[0].endswith("tinychat"):
        parse_as_tinychat(words[1:], monkeypatch)
    elif words[0].endswith("python"):
        parse_as_python(words[1:], monkeypatch)


@pytest.mark.parametrize("command", INLINE)
def test_a_command_within_a_sentence_is_one(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [w for w in shlex.split(command.partition("|")[0]) if w != "…"]
    parse_as_tinychat(words[1:], monkeypatch)


def test_the_reasons_are_of_commands_that_are_shown() -> None:
    shown = [c for _, c in COMMANDS]
    assert all(any(re.match(pattern, c) for c in shown) for pattern in APPENDED)
    assert ACTIVATE.strip() in shown
    with pytest.raises(click.UsageError), pytest.MonkeyPatch.context() as patch:
        parse_as_tinychat(["bench", "--no-such-option"], patch)


def parse_as_tinychat(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything that click does before the command itself. Raises click.UsageError."""
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    try:
        with cli.make_context("tinychat", list(args)) as context:
            cli.invoke(context)
    except click.exceptions.Exit as e:  # --help
        assert e.exit_code == 0


class Parsed(Exception):
    """The arguments were parsed successfully."""


def parse_as_python(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `-m MODULE …` or `FILE …` up to parsing its arguments, which must all be recognised."""
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
