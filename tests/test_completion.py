"""Tab in real shells, what it costs, and that every command and option says what it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash, zsh and fish are not there")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A shell's, with `tinychat` in the PATH, a model in the hub's cache and a folder of models."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "tinychat").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tinychat_mlx "$@"\n')
    (bin_ / "tinychat").chmod(0o755)
    snapshot = tmp_path / "hf" / "hub" / "models--Org--Cool-Model" / "snapshots" / "c0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "modelfolder").mkdir()
    (tmp_path / "modelfile").write_text("")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TINYCHAT_", "HF_", "XDG_"))}
    return kept | {"PATH": f"{bin_}:{kept['PATH']}", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"),
                   "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb"}  # fmt: skip


def run(shell: str, script: str, env: dict[str, str], cwd: Path) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    start = {
        "bash": ["bash", "--norc", "-c"],
        "zsh": ["zsh", "-f", "-c"],
        "fish": ["fish", "--no-config", "-c"],
    }
    done = subprocess.run(
        [*start[shell], script], capture_output=True, text=True, env=env, cwd=cwd, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


# Each line as typed -> some of what must be offered, and something that must not.
CASES = [
    ("tinychat mod", ["models"], "chat"),
    ("tinychat ", ["chat", "run", "doctor", "completion"], "demo"),
    ("tinychat chat -m ", ["demo", "Org/Cool-Model"], "chat"),
    ("tinychat -m Org", ["Org/Cool-Model"], "demo"),
    ("tinychat chat --backend m", ["mlx"], "cpu"),
    ("tinychat models show ", ["demo", "Org/Cool-Model"], "pull"),
    ("tinychat models pull Qwen/Qwen3-0", ["Qwen/Qwen3-0.6B"], "Org/Cool-Model"),
    ("tinychat run --temp", ["--temperature"], "--top-k"),
]


def bash(line: str) -> str:
    """What bash does at Tab: ask which function completes, set its variables, call it."""
    return f"""
eval "$(tinychat completion bash)"
complete -p tinychat >&2
COMP_LINE='{line}'; COMP_WORDS=({line}{"''" if line.endswith(" ") else ""}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
function compopt {{ echo "compopt $*"; }}
f=$(complete -p tinychat | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$f tinychat "${{COMP_WORDS[COMP_CWORD]}}" "" ; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(("line", "offered", "absent"), CASES)
def test_bash_completes(
    line: str, offered: list[str], absent: str, env: dict[str, str], tmp_path: Path
) -> None:
    found = run("bash", bash(line), env, tmp_path)
    assert set(offered) <= set(found) and absent not in found, found


@pytest.mark.parametrize(("line", "offered", "absent"), CASES)
def test_fish_completes(
    line: str, offered: list[str], absent: str, env: dict[str, str], tmp_path: Path
) -> None:
    lines = run("fish", f"tinychat completion fish | source; complete -C '{line}'", env, tmp_path)
    found = [each.partition("\t")[0] for each in lines]
    assert set(offered) <= set(found) and absent not in found, found


def test_zsh_completes(env: dict[str, str], tmp_path: Path) -> None:
    """In a pseudo-terminal, as zsh completes nowhere else: the script is loaded, Tab is pressed."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not here")
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn("zsh", ["-f", "-i"], env=env, cwd=str(tmp_path), encoding="utf-8", timeout=30)
    try:
        child.sendline(
            "PS1='> '; autoload -U compinit; compinit -u; eval \"$(tinychat completion zsh)\"; echo rea''dy"
        )
        child.expect("ready")
        child.send("echo tinychat; tinychat models sh\t")
        child.expect("models show")
        child.send("Org\t")
        child.expect("Org/Cool-Model")
    finally:
        child.close(force=True)


def test_folders_are_left_to_the_shell(env: dict[str, str], tmp_path: Path) -> None:
    """For a model that is no name, bash is told to complete folders; for a FILE, files."""
    assert any("dirnames" in row for row in run("bash", bash("tinychat chat -m ./mod"), env, tmp_path))
    found = run("bash", bash("tinychat doctor --report mod"), env, tmp_path)
    assert any("default" in row or "filenames" in row for row in found), found
    words = run(
        "fish", "tinychat completion fish | source; complete -C 'tinychat chat -m ./mod'", env, tmp_path
    )
    assert "./modelfolder/" in [w.partition("\t")[0] for w in words]


def test_tab_takes_at_most_200_ms_and_imports_nothing_heavy(env: dict[str, str]) -> None:
    """CPU time, best of five, of the dearest: model names."""
    import resource

    asked = {"_TINYCHAT_COMPLETE": "bash_complete", "COMP_WORDS": "tinychat chat -m ", "COMP_CWORD": "3"}
    costs = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "tinychat_mlx"],
            capture_output=True, text=True, check=True, env=env | asked,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "Org/Cool-Model" in done.stdout and min(costs) <= 0.2
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "click" in imported
    assert not imported & {"numpy", "rich", "prompt_toolkit", "tokenizers", "huggingface_hub", "torch", "mlx"}


def test_the_names_offered_are_those_that_models_list_knows(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completion repeats where models lie, as the modules that know import NumPy."""
    from tinychat_mlx import hub
    from tinychat_mlx.apps import completion
    from tinychat_mlx.apps.models import opening

    for variables in ({"HF_HUB_CACHE": str(tmp_path / "x")}, {"HF_HOME": str(tmp_path / "y")},
                      {"XDG_CACHE_HOME": str(tmp_path / "z")}):  # fmt: skip
        for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        name = f"Org/{next(iter(variables))}"
        (hub.hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots" / "c").mkdir(parents=True)
        (
            hub.hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots" / "c" / "config.json"
        ).write_text("")
        assert name in list(completion._here())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    opening.conversion(hub.Ref("Org/Made")).mkdir(parents=True)
    assert "Org/Made" in list(completion._here())


# --help ------------------------------------------------------------------------------------------------
def commands() -> Iterator[tuple[str, click.Command]]:
    from tinychat_mlx.apps.cli import cli

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
    assert max(map(len, shown.splitlines())) <= 100


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
