"""Tab completion in real shells, and its cost."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
import click.shell_completion
import pytest
from checkout import ROOT
from emulators import absent

from tinychat_mlx.apps.completion import SCRIPTS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash, zsh and fish are not there")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A shell's environment: models in the hub cache and a folder, and a `tinychat` outside PATH."""
    program = tmp_path / PROGRAM
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nfrom tinychat_mlx.apps.cli import main\nraise SystemExit(main())\n"
    )
    program.chmod(0o755)
    snapshot = tmp_path / "hf" / "hub" / "models--Org--Cool-Model" / "snapshots" / "c0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "modelfolder").mkdir()
    (tmp_path / "modelfile").write_text("")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("TINYCHAT_", "HF_", "HUGGINGFACE_", "XDG_"))
    }
    elsewhere = [p for p in kept["PATH"].split(os.pathsep) if not Path(p, "tinychat").exists()]
    return kept | {"PATH": os.pathsep.join(elsewhere), "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"),
                   "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb"}  # fmt: skip


PROGRAM = "a folder's/tinychat"  # a name that needs quoting
SOURCE = {  # the line of a shell's start file
    "bash": f'eval "$("./{PROGRAM}" completion bash)"',
    "zsh": f'eval "$("./{PROGRAM}" completion zsh)"',
    "fish": f'"./{PROGRAM}" completion fish | source',
}
START = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}


def run(shell: str, script: str, env: dict[str, str], cwd: Path) -> list[str]:
    if shutil.which(shell) is None:
        absent(f"{shell} is not here")
    command = [shell, *START[shell], "-c", f"{SOURCE[shell]}\ncd modelfolder/..\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


@pytest.mark.parametrize("shell", START)
def test_what_help_says_of_start_files_works_in_a_new_shell(
    shell: str, env: dict[str, str], tmp_path: Path
) -> None:
    """No environment is active. A shell that has read its start file can complete `tinychat`."""
    if shutil.which(shell) is None:
        absent(f"{shell} is not here")
    shown = subprocess.run(
        [tmp_path / PROGRAM, "completion", "--help"], capture_output=True, text=True, check=True, env=env
    )
    rows = dict(re.findall(r"^ +(~/\.bashrc|~/\.zshrc|fish) +(.+)$", shown.stdout, re.MULTILINE))
    line = rows[{"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "fish"}[shell]]
    (tmp_path / ".config/fish/completions").mkdir(parents=True)
    asks = {
        "bash": "complete -p tinychat",
        "zsh": "echo $_comps[tinychat]",
        "fish": "complete -C 'tinychat mod'",
    }
    reads = "; source ~/.config/fish/completions/tinychat.fish" if shell == "fish" else ""
    done = subprocess.run(
        [shell, *START[shell], "-c", f"{line}{reads}\n{asks[shell]}"], capture_output=True, text=True, env=env, cwd="/",
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and {"fish": "models"}.get(shell, "_tinychat") in done.stdout, done.stderr


# Each typed line -> some expected completions, and one that must not appear.
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


@pytest.mark.parametrize(("line", "offered", "absent"), CASES)
def test_bash_completes(
    line: str, offered: list[str], absent: str, env: dict[str, str], tmp_path: Path
) -> None:
    """Simulate bash at Tab: set its variables and call the function."""
    word = line.rpartition(" ")[2]
    script = (
        f"COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; _tinychat tinychat {shlex.quote(word)} x"
    )
    found = run("bash", f"{script}; printf '%s\\n' \"${{COMPREPLY[@]}}\"", env, tmp_path)
    assert set(offered) <= set(found) and absent not in found, found


@pytest.mark.parametrize(("line", "offered", "absent"), CASES)
def test_fish_completes(
    line: str, offered: list[str], absent: str, env: dict[str, str], tmp_path: Path
) -> None:
    found = [row.partition("\t")[0] for row in run("fish", f"complete -C '{line}'", env, tmp_path)]
    assert set(offered) <= set(found) and absent not in found, found


# Text before Tab -> the line after it. A model argument that is not a name is a folder, a FILE any file.
TABS = {
    "tinychat models sh": "tinychat models show",
    "tinychat models show Org": "tinychat models show Org/Cool-Model",
    "tinychat chat --model=Org": "tinychat chat --model=Org/Cool-Model",
    "tinychat chat --model org": "tinychat chat --model Org/Cool-Model",
    "echo; A=1 tinychat chat -m ./modelfo": "echo; A=1 tinychat chat -m ./modelfolder/",
    "tinychat doctor --report modelfi": "tinychat doctor --report modelfile",
    "tinychat doctor --report=modelfi": "tinychat doctor --report=modelfile",
}


@pytest.mark.parametrize("shell", START)
def test_tab_completes_what_is_typed(shell: str, env: dict[str, str], tmp_path: Path) -> None:
    """In a terminal: the start file's line, then each of TABS, from another folder than the program's."""
    if shutil.which(shell) is None:
        absent(f"{shell} is not here")
    pexpect, pyte = pytest.importorskip("pexpect"), pytest.importorskip("pyte")
    screen = pyte.Screen(100, 50)
    stream = pyte.ByteStream(screen)
    arguments = {"args": [*START[shell], "-i"], "dimensions": (50, 100), "timeout": 300}
    child = pexpect.spawn(shell, env=env | {"TERM": "xterm", "PS1": "> "}, cwd=str(tmp_path), **arguments)

    def wait(wanted: str) -> None:
        end = time.monotonic() + 300
        while not any(row.rstrip().endswith(wanted) for row in screen.display):
            assert time.monotonic() < end, f"no {wanted!r} in\n" + "\n".join(screen.display).rstrip()
            with suppress(pexpect.TIMEOUT):
                stream.feed(child.read_nonblocking(65536, timeout=0.1))

    try:
        child.send(f"{SOURCE[shell]}; cd modelfolder/..; echo rea''dy\r")
        wait("ready")
        for typed, wanted in TABS.items():
            child.send(f"\x15{typed}\t")  # Ctrl-U: an empty line
            wait(wanted)
    finally:
        child.close(force=True)


# Features of bash newer than 3.2, the version of macOS: an extended regular expression and an example of
# each.
AFTER_BASH_3_2 = {
    r"\b(declare|local|typeset)\s+-\w*[Aglnu]": "local -A map",
    r"\b(mapfile|readarray|coproc|compopt)\b": "mapfile -t rows",
    r"-o\s+nosort|\bcomplete\s+-\w*[DEI]\b": "complete -o nosort -F f tinychat",
    r"\$\{!?\w+(\[[^]]*\])?(,|\^|@[A-Za-z])": "echo ${x,,}",
    r"\$\{\w+\[-|\$\{\w+:[^}:]*:\s*-": "echo ${rows[-1]}",
    r"&>>|\|&|;;?&|\{\w+\}[<>]": "echo a &>> log",
    r"\[\[?\s+-[vR]\s": "[[ -v name ]]",
    r"\{\w+\.\.\w+\.\.": "echo {1..9..2}",
    r"%\([^)]*\)T|\$'[^']*\\[uU]": "printf '%(%F)T'",
    r"\b(BASHPID|COMP_TYPE|COMP_KEY|EPOCH\w+|globstar|lastpipe|wait\s+-n|read\s+-\w*[iN])\b": "echo $BASHPID",
}


def newer_than_3_2(script: str) -> list[str]:
    return [found[0] for pattern in AFTER_BASH_3_2 if (found := re.search(pattern, script))]


def test_the_script_for_bash_has_nothing_that_a_macs_lacks() -> None:
    for example in AFTER_BASH_3_2.values():
        assert newer_than_3_2(example), example
    assert newer_than_3_2(click.shell_completion.BashComplete.source_template)
    assert newer_than_3_2(SCRIPTS["bash"]) == []
    for shell in SCRIPTS:  # the syntax check of each shell
        if shutil.which(shell) is None:
            absent(f"{shell} is not here")
        subprocess.run([shell, *START[shell], "-n", "-c", SCRIPTS[shell]], check=True)


def test_tab_imports_few_modules_and_nothing_heavy(env: dict[str, str]) -> None:
    """Of the most expensive word, a model's name: 127 modules beyond Python's own when this was written."""
    asked = {"_TINYCHAT_COMPLETE": "bash", "COMP_LINE": "tinychat chat -m "}
    done = [
        subprocess.run(
            [sys.executable, "-X", "importtime", *program],
            capture_output=True, text=True, check=True, env=env | asked,
        )
        for program in (["-c", "pass"], ["-m", "tinychat_mlx"])
    ]  # fmt: skip
    assert "Org/Cool-Model" in done[1].stdout
    own, imported = (set(re.findall(r"\| +([\w.]+)$", d.stderr, re.MULTILINE)) for d in done)
    assert len(imported - own) <= 150
    assert "click" in imported
    assert not imported & {"numpy", "rich", "prompt_toolkit", "tokenizers", "huggingface_hub", "torch", "mlx"}


def test_the_names_offered_are_those_that_models_list_knows(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completion has its own copy of the model directories: the modules that define them import NumPy."""
    from tinychat_mlx import hub
    from tinychat_mlx.apps import completion
    from tinychat_mlx.apps.models import prepare

    places = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    for variables in ({name: str(tmp_path / name)} for name in places):
        for name in places:
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
    prepare.conversion_folder(hub.Ref("Org/Made")).mkdir(parents=True)
    assert "Org/Made" in list(completion._here())
