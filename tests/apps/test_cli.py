"""The command line for programs and scripts: streams, exit codes, start-up cost."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import folders
import pytest
from checkout import ROOT

DRIVER = ROOT / "tests" / "fixtures" / "chat_driver.py"
ENV = {k: v for k, v in os.environ.items() if not k.startswith("TINYCHAT_")} | {
    "PYTHONPATH": str(ROOT),
    "TINYCHAT_CONFIG": str(ROOT / "absent.toml"),  # the user who runs the tests may have settings
}


def tinychat(*args: str, stdin: str | None = None, env: dict[str, str] | None = None) -> Any:
    """The command line without a scripted model."""
    argv = [sys.executable, "-m", "tinychat_mlx", *args]
    return subprocess.run(
        argv, input=stdin, capture_output=True, check=False, text=True, env=ENV | (env or {}), timeout=600
    )


@pytest.fixture
def scripted(tmp_path: Path) -> Any:
    """The command line with a scripted model."""

    def run(*args: str, stdin: str | None = None, env: dict[str, str] | None = None, **script: Any) -> Any:
        (tmp_path / "script.json").write_text(json.dumps(script))
        return subprocess.run(
            [sys.executable, str(DRIVER), str(tmp_path / "script.json"), *args],
            input=stdin,
            capture_output=True,
            check=False,
            text=True,
            encoding="utf-8",
            env=ENV | {"TINYCHAT_DATA": str(tmp_path / "data"), "PYTHONUTF8": "1"} | (env or {}),
            timeout=600,
        )

    return run


# start-up ----------------------------------------------------------------------------------------------
def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys, os; os.environ.pop('TINYCHAT_CONFIG'); from tinychat_mlx.apps.cli import main; main(['--help']); main(['--version']);"
        "main(['chat', '--help']); main(['run', '--help']);"
        "heavy = {'numpy', 'rich', 'prompt_toolkit', 'tokenizers', 'jinja2', 'torch', 'transformers', 'mlx',"
        " 'huggingface_hub', 'asyncio', 'platformdirs'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, text=True, env=ENV, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "")


def imported(*command: str, env: dict[str, str] = ENV) -> list[str]:
    """Every module that a Python program imports."""
    argv = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(argv, capture_output=True, check=True, text=True, env=env, timeout=600)
    return re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE)


def test_help_imports_few_modules_beyond_pythons_own() -> None:
    """100 modules take less than a tenth of a second; 96 when this was written."""
    own = imported("-c", "pass")
    assert len(imported("-m", "tinychat_mlx", "--help")) - len(own) <= 110


def test_help_lists_only_commands_that_exist() -> None:
    from importlib.util import find_spec

    from tinychat_mlx.apps.cli import COMMANDS

    done = tinychat("--help")
    listed = done.stdout.partition("Commands:")[2]
    for name, (module, _, _) in COMMANDS.items():
        try:
            there = find_spec(f"tinychat_mlx.{module}") is not None
        except ModuleNotFoundError:
            there = False
        assert (f"\n  {name} " in listed) == there
    assert done.stderr == "" and "chat" in listed and "run" in listed


def test_every_listed_command_opens_its_help() -> None:
    from click.testing import CliRunner

    from tinychat_mlx.apps.cli import cli

    for name in cli.list_commands(None):  # type: ignore[arg-type]
        done = CliRunner().invoke(cli, [name, "--help"])
        assert done.exit_code == 0 and done.output.startswith("Usage:"), name


# run ---------------------------------------------------------------------------------------------------
def test_run_prints_the_answer_alone(scripted: Any) -> None:
    done = scripted("run", "hello", answers=["**Hi** there"], stdin="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "**Hi** there\n", "")


def test_run_answers_what_is_piped_in(scripted: Any) -> None:
    done = scripted("run", stdin="hi\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    argv = [sys.executable, str(DRIVER), str(tmp_path / "s.json"), "run", "see"]
    for env in ({"PYTHONUTF8": "1"}, {"LC_ALL": "C"}):
        done = subprocess.run(
            argv, input=b"a\xffb", capture_output=True, check=False, env=ENV | env, timeout=600
        )
        shown = done.stdout.replace(b"\r\n", b"\n")
        assert (done.returncode, shown) == (0, "see\n\na\ufffdb\n".encode()), done.stderr


@pytest.mark.parametrize("words", [["sum", "this"], ["sum this", "-"], ["-", "sum this"]])
def test_piped_text_is_joined_to_the_prompt(scripted: Any, words: list[str]) -> None:
    assert scripted("run", *words, stdin="a\nb\n").stdout == "sum this\n\na\nb\n"


def test_json_has_the_keys_programs_rely_on(scripted: Any) -> None:
    done = scripted("run", "--json", "x", answers=["ä\n✓"], stdin="")
    made = json.loads(done.stdout)
    assert made["text"] == "ä\n✓" and made["finish_reason"] == "stop"
    assert {"prompt_tokens", "completion_tokens", "ttft_s", "decode_tok_s"} <= set(made)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_flags_win_over_the_environment(scripted: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    env = {"TINYCHAT_TEMPERATURE": "0.2", "TINYCHAT_TOP_K": "5", "TINYCHAT_SYSTEM": "Env."}
    scripted(
        "run", "x", "--temperature", "0.9", "--stop", "A", "--stop", "B", stdin="", env=env, log=str(log)
    )
    asked = json.loads(log.read_text())
    assert (asked["temperature"], asked["top_k"], asked["stop"]) == (0.9, 5, ["A", "B"])
    assert asked["messages"][0] == {"role": "system", "content": "Env."}


def test_system_prompt_may_come_from_a_file(scripted: Any, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("From a file.\n")
    scripted("run", "x", "--system", f"@{tmp_path / 's.txt'}", stdin="", log=str(tmp_path / "log"))
    assert json.loads((tmp_path / "log").read_text())["messages"][0]["content"] == "From a file."
    done = scripted("run", "x", "--system", f"@{tmp_path / 'absent'}", stdin="")
    assert done.returncode == 2 and "absent" in done.stderr


def test_an_answer_cut_by_the_context_says_so_on_stderr(scripted: Any) -> None:
    done = scripted("run", "x", answers=["w " * 100], context=20, piece=2, stdin="")
    assert done.returncode == 0 and "context of 20 tokens" in done.stderr and done.stdout.startswith("w w")


def test_the_bundled_model_answers(tmp_path: Path) -> None:
    """No script: the complete path from the command to the demo's weights."""
    from tinychat_mlx.open import DEMO

    if not DEMO.exists():
        pytest.skip("the demo model is not in this checkout")
    done = tinychat("run", "--temperature", "0", "--json", "who are you?", stdin="")
    made = json.loads(done.stdout)
    assert done.returncode == 0 and "demo" in made["text"].lower() and made["finish_reason"] == "stop"


# the config file ---------------------------------------------------------------------------------------
@pytest.fixture
def config(tmp_path: Path) -> Any:
    def write(text: str) -> dict[str, str]:
        (tmp_path / "config.toml").write_text(text)
        return {"TINYCHAT_CONFIG": str(tmp_path / "config.toml")}

    return write


CONFIG = """
system = "From the file."
temperature = 0.3
top_k = 9
stop = ["END", "STOP"]
[presets.calm]
temperature = 0.1
"""


def test_config_counts_below_flags_and_environment(scripted: Any, config: Any, tmp_path: Path) -> None:
    env = config(CONFIG) | {"TINYCHAT_TOP_K": "5"}
    for args, temperature in (
        ([], 0.3),
        (["--preset", "calm"], 0.1),
        (["--preset", "calm", "--temperature", "1"], 1),
    ):
        scripted("run", "x", *args, stdin="", env=env, log=str(tmp_path / "log"))
        asked = json.loads((tmp_path / "log").read_text().splitlines()[-1])
        assert (asked["temperature"], asked["top_k"], asked["stop"]) == (temperature, 5, ["END", "STOP"])
        assert asked["messages"][0]["content"] == "From the file."


def test_config_show_tells_the_origin_of_every_setting(config: Any) -> None:
    env = config(CONFIG) | {"TINYCHAT_TOP_K": "5", "TINYCHAT_PRESET": "calm"}
    done = tinychat("config", "show", "--origin", "--seed", "3", env=env)
    lines = done.stdout.splitlines()
    for line in ("top_k = 5  # environment", "temperature = 0.1  # config", "seed = 3  # flag"):
        assert line in lines, done.stdout + done.stderr
    assert 'model = "demo"  # built in' in lines and "min_p = (the model's default)  # model" in lines
    assert (
        json.loads(tinychat("config", "show", "--json", env=env).stdout)["top_k"]["origin"] == "environment"
    )


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("temprature = 1", "use 'temperature'"),
        ("temperature = -1", "temperature: -1"),
        ("exact = 'yes'", "exact: 'yes' is not true or false"),
        ("stop = 'x'", "is not a list of texts"),
        ("model = ", "config.toml: "),
        ("preset = 'absent'", "no preset 'absent'"),
        ("[presets]\nx = 1", "presets must be tables"),
        ("[presets.a]\nbackend = 'tpu'", "presets.a: backend: "),
    ],
)
def test_a_wrong_config_is_one_line_that_names_file_and_key(config: Any, text: str, wrong: str) -> None:
    done = tinychat("run", "x", stdin="", env=config(text))
    assert done.returncode == 1 and one_line(done) and wrong in done.stderr, done.stderr
    assert "config.toml" in done.stderr


# errors ------------------------------------------------------------------------------------------------
def one_line(done: Any) -> bool:
    return bool(done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stdout == "")


def test_a_model_that_is_not_there_is_one_line_and_exit_1(scripted: Any) -> None:
    for command in ("run", "chat"):
        done = scripted(command, "-m", "missing", stdin="hi")
        assert done.returncode == 1 and one_line(done), done.stderr
    assert "Traceback" in scripted("run", "-m", "missing", "--debug", stdin="hi").stderr


def test_a_folder_that_is_not_there_is_one_line_and_exit_1() -> None:
    done = tinychat("run", "-m", "./no/such/folder", "hi", stdin="")
    assert done.returncode == 1 and one_line(done) and "no/such/folder" in done.stderr, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sparse files need a special call there")
def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    done = tinychat("run", "-m", str(folders.huge(tmp_path / "huge")), "--backend", "cpu", "hi", stdin="")
    assert done.returncode == 1 and one_line(done) and "TB of memory" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["run", "--nonsense"],
        ["run"],
        ["run", "x", "--temperature", "-1"],
        ["run", "x", "--top-p", "0"],
        ["run", "x", "--max-tokens", "0"],
        ["run", "x", "--backend", "tpu"],
    ],
)
def test_wrong_use_is_exit_2_with_usage(args: list[str]) -> None:
    done = tinychat(*args, stdin="")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("Usage: tinychat")
    *_, usage, empty, error = done.stderr.splitlines()
    assert error.startswith("error: ") and "Error:" not in done.stderr and empty == ""
    assert usage.endswith("--help` prints all options.") and "Traceback" not in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [20, 43, 80])
def test_an_error_wraps_between_words_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any width: a word such as --resume is not split, and nothing is lost."""
    from tinychat_mlx.apps.cli import _report
    from tinychat_mlx.base.errors import UsageError

    monkeypatch.setenv("COLUMNS", str(columns))
    text = (
        "x is an interrupted conversion: add --resume to finish it, --force to start again, or look at " * 3
    )
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert _report(UsageError(text, remedy="choose")) == 2
        rows = stream.getvalue().splitlines()
        assert " ".join(" ".join(rows).split()) == f"error: {text.strip()} — choose"
        if stream.isatty():
            assert len(rows) > 3 and max(map(len, rows)) <= columns
            assert all(row.startswith("  ") and not row.endswith("--") for row in rows[1:])
        else:
            assert len(rows) == 1


def test_a_prompt_longer_than_the_context_is_one_line(scripted: Any) -> None:
    done = scripted("run", "w " * 100, context=20, stdin="")
    assert done.returncode == 1 and one_line(done)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_run_with_130_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"answers": ["word " * 1000], "delay": 0.02}))
    argv = [sys.executable, str(DRIVER), str(tmp_path / "s.json"), "run", "go"]
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV
    )
    assert child.stdout is not None
    child.stdout.read(8)  # the answer has started
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=3000)
    assert child.returncode == 130 and err == b""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_broken_pipe_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"answers": ["word " * 1000], "delay": 0.001}))
    argv = [sys.executable, str(DRIVER), str(tmp_path / "s.json"), "run", "go"]
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(8)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(timeout=300) == 0


# chat without a terminal -------------------------------------------------------------------------------
def test_a_piped_chat_writes_answers_to_stdout_and_the_rest_to_stderr(scripted: Any) -> None:
    done = scripted("chat", stdin="hello\n/help\nand you?\n", answers=["**one**", "two"])
    assert (done.returncode, done.stdout) == (0, "**one**\ntwo\n")
    assert "first token" in done.stderr and "/clear" in done.stderr and "\x1b" not in done.stderr


@pytest.mark.parametrize("columns", [40, 72, 100])
def test_the_chats_help_is_indented_where_it_wraps(scripted: Any, columns: int) -> None:
    done = scripted("chat", stdin="/help\n", env={"COLUMNS": str(columns)})
    rows = done.stderr[done.stderr.index("  /help") :].partition("\n\n")[0].splitlines()
    names = [row for row in rows if row.startswith("  /")]
    more = [row for row in rows if not row.startswith("  /")]
    assert len(names) > 20 and len(more) > 3 and max(map(len, rows)) <= columns
    start = len(names[0]) - len("List the commands and keys.") if columns > 62 else 4
    assert all(row[:start].strip() == "" and row[start] != " " for row in more)


def test_tinychat_alone_is_the_chat(scripted: Any) -> None:
    assert scripted(stdin="hello\n").stdout == "hello\n"
    assert scripted("-m", "demo", "--plain", stdin="hello\n").stdout == "hello\n"


def test_an_encoding_without_the_answers_letters_replaces_them(scripted: Any) -> None:
    for command in (["run", "x"], ["chat"]):
        done = scripted(
            *command, stdin="x\n", answers=["✓ ok"], env={"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        )
        assert (done.returncode, done.stdout) == (0, "? ok\n"), done.stderr


def test_a_chat_works_where_nothing_can_be_written(scripted: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = scripted("chat", stdin="hello\n", env={"TINYCHAT_DATA": str(tmp_path / "file" / "x")})
    assert (done.returncode, done.stdout) == (0, "hello\n") and "not saved" in done.stderr


def test_run_imports_neither_a_framework_nor_the_chats_libraries(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    argv = [sys.executable, "-X", "importtime", str(DRIVER), str(tmp_path / "s.json"), "run", "x"]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True, env=ENV
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported  # checks that the list is not empty
    assert not imported & {"torch", "transformers", "mlx", "rich", "prompt_toolkit", "asyncio", "markdown_it"}
