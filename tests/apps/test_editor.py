"""The line editor: lines, pastes, history, completion, an editor of the environment, and where Ctrl-C goes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("keys come through a POSIX pipe", allow_module_level=True)
from chat_screen import CTRL_C, CTRL_D, CTRL_J, CTRL_R, ENTER
from editor import Editor
from prompt_toolkit.input import create_pipe_input

from tinychat_mlx.apps.chat import attach


@pytest.fixture
def keys() -> Iterator[Any]:
    with create_pipe_input() as pipe:
        yield pipe


@pytest.mark.parametrize("typed", ["one\x1b\rtwo", f"one{CTRL_J}two", f'"""{ENTER}one{ENTER}two{ENTER}"""'])
def test_many_lines_by_alt_enter_ctrl_j_and_block(keys: Any, typed: str) -> None:
    assert Editor(keys).read(typed, ENTER) == "one\ntwo"


def test_a_paste_of_200_lines_is_one_message(keys: Any) -> None:
    pasted = "\n".join(f"line {i}" for i in range(200))
    assert Editor(keys).read(f"\x1b[200~{pasted}\x1b[201~", ENTER) == pasted


def test_history_is_kept_across_runs_and_searched(keys: Any, tmp_path: Path) -> None:
    history = tmp_path / "history"
    first = Editor(keys, history)
    assert first.read("remember the heron", ENTER) == "remember the heron"
    assert first.read("another thing", ENTER) == "another thing"
    second = Editor(keys, history)
    found = second.read(CTRL_R, steps=[("I-search", "heron"), ("remember the heron", ENTER + ENTER)])
    assert found == "remember the heron"
    assert history.stat().st_mode & 0o777 == 0o600


def test_the_editor_of_the_environment_writes_the_message(
    keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "editor"
    program.write_text("#!/bin/sh\nprintf 'written in\\nan editor' >> \"$1\"\n")
    program.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(program))
    monkeypatch.delenv("VISUAL", raising=False)
    made = Editor(keys).read("begun, \x07", steps=[("an editor", ENTER)])  # Ctrl-G
    assert made == "begun, written in\nan editor"


def test_enter_takes_what_the_menu_offers_and_a_second_one_sends(keys: Any, tmp_path: Path) -> None:
    (tmp_path / "heron.txt").write_text("x")
    (tmp_path / "heroic.txt").write_text("x")
    editor = Editor(keys, complete=attach.complete)
    text = editor.read(f"see @{tmp_path}/her", steps=[("heron.txt", "\t\t"), ("heroic.txt ", ENTER + ENTER)])
    assert text.startswith(f"see @{tmp_path}/hero")
    assert Path(text.partition("@")[2].strip()).exists()


# Ctrl-C ------------------------------------------------------------------------------------------------
def test_ctrl_c_clears_a_line_and_is_keyboard_interrupt_on_an_empty_one(keys: Any) -> None:
    editor = Editor(keys)
    assert editor.read(f"half a thought{CTRL_C}still here{ENTER}") == "still here"
    with pytest.raises(KeyboardInterrupt):
        editor.read(CTRL_C)
    with pytest.raises(EOFError):
        editor.read(CTRL_D)


def test_ctrl_c_behind_enter_interrupts_and_the_keys_after_it_are_kept(keys: Any) -> None:
    """The editor reads both keys at once; what it does not need is for the next prompt."""
    editor = Editor(keys)
    with pytest.raises(KeyboardInterrupt):
        editor.read(f"go{ENTER}lost{CTRL_C}kept")
    assert editor.read(ENTER) == "kept"


def test_ctrl_c_that_arrives_while_the_editor_closes_interrupts(
    keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its byte is still in the terminal's queue."""
    editor = Editor(keys)
    monkeypatch.setattr(
        editor.app.renderer, "reset", closing(editor.app.renderer.reset, editor, CTRL_C + "kept")
    )
    with pytest.raises(KeyboardInterrupt):
        editor.read("go", ENTER)
    monkeypatch.undo()
    assert editor.read(ENTER) == "kept"


def closing(reset: Any, editor: Editor, text: str) -> Any:
    """The renderer's reset of an editor that has its answer, with more keys pressed at that moment."""

    def press(*args: Any, **options: Any) -> None:
        reset(*args, **options)
        if editor.app.is_running and editor.app.is_done:
            editor.keys.send_text(text)

    return press


def test_keys_behind_enter_are_for_the_next_prompt(keys: Any) -> None:
    editor = Editor(keys)
    assert editor.read(f"first{ENTER}sec") == "first"
    assert editor.read(f"ond{ENTER}") == "second"


@pytest.mark.parametrize("when", ["before", "while keys are read", "after"])
def test_a_signal_is_never_missed(keys: Any, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """From `kill -INT`, or from the terminal before and after the editor reads keys."""
    editor, sent = Editor(keys), list[str]()
    session: Any = editor.reader.session  # type: ignore[attr-defined]
    real = session.prompt

    def interrupt(now: str) -> None:
        if now == when and not sent:
            sent.append(now)
            os.kill(os.getpid(), signal.SIGINT)

    def prompt(*args: Any, **options: Any) -> str:
        interrupt("before")
        text: str = real(*args, **options)
        interrupt("after")
        return text

    def rendered(_: Any) -> None:
        if "half" in editor.text:
            interrupt("while keys are read")
        elif sent == ["while keys are read"]:  # it has cleared the line
            sent.append("whole")
            keys.send_text("whole" + ENTER)

    monkeypatch.setattr(session, "prompt", prompt)
    editor.app.after_render += rendered
    if when == "while keys are read":
        assert editor.read("half") == "whole"
    else:
        with pytest.raises(KeyboardInterrupt):
            editor.read("go", ENTER)
