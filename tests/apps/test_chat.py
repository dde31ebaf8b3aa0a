"""Whole conversations: typed into the chat and read off its screen.

A real terminal only where its kernel, its signals or another process matter (`terminals`).
"""

from __future__ import annotations

import io
import json
import os
import queue
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkout import DATA, ROOT
from rich.console import Console

from tinychat_mlx.apps.chat import answer, stream
from tinychat_mlx.apps.terminal import Terminal, detect
from tinychat_mlx.engine.engine import Event

if sys.platform == "win32":
    pytest.skip("needs a POSIX pseudo-terminal", allow_module_level=True)
from chat_screen import CTRL_C, CTRL_D, ENTER, Chats, Display
from fake_terminal import FakeChats


def after(text: str, marker: str) -> str:
    return text.rpartition(marker)[2]


# conversations -----------------------------------------------------------------------------------------
def test_header_names_model_size_quantisation_backend_reason_and_context(chats: FakeChats) -> None:
    text = chats().prompt()
    for fact in (
        "scripted",
        "llama 7.1 MB",
        "int4 g128",
        "cpu: Test CPU",
        "no Apple or NVIDIA GPU found",
        "2,048",
    ):
        assert fact in text


def test_answer_is_shown_with_speed_and_context(chats: FakeChats) -> None:
    text = chats(answers=["I am a test."]).say("who are you?")
    assert "❯ who are you?\nI am a test.\n" in text
    assert "50.0 tok/s" in text and "first token" in text and "context 7 / 2,048" in text


def test_ctrl_d_and_exit_leave_with_code_0(chats: FakeChats) -> None:
    for keys in (CTRL_D, "/exit" + ENTER):
        chat = chats()
        chat.prompt()
        chat.type(keys)
        assert chat.exit_code() == 0


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chats: FakeChats, tmp_path: Path) -> None:
    log = tmp_path / "log"
    chat = chats(answers=["word " * 1000, "second"], delay=0.02, piece=5, log=str(log))
    chat.prompt()
    chat.type("go" + ENTER)
    chat.wait("word word word")
    chat.type(CTRL_C)
    assert "the partial answer is saved" in chat.prompt()
    chat.say("and now?")
    asked = json.loads(log.read_text().splitlines()[-1])["messages"]
    assert [m["role"] for m in asked] == ["user", "assistant", "user"]
    assert asked[1]["content"].startswith("word word word")
    assert len(asked[1]["content"]) < 5000


def test_ctrl_c_is_back_after_at_most_one_more_piece(chats: FakeChats) -> None:
    chat = chats(answers=["word " * 1000], piece=5, rows=40)
    chat.prompt()
    chat.type("go" + ENTER)
    shown = chat.wait("word word word").count("word")
    chat.type(CTRL_C)
    assert chat.prompt().count("word") <= shown + 1


def test_ctrl_c_right_after_enter_is_never_missed(terminals: Chats) -> None:
    """Whenever it comes, the prompt is back. test_editor.py has each moment."""
    import termios

    chat = terminals(answers=["word " * 10_000], delay=0.02, piece=5, rows=40)
    for i in range(12):
        chat.prompt()
        # As a signal it would have the kernel discard what the editor draws.
        assert termios.tcgetattr(chat.child.child_fd)[3] & termios.ISIG == 0
        chat.type(f"go {i}")
        chat.wait(f"❯ go {i}")
        chat.type(ENTER)
        time.sleep(i * 0.004)  # not a wait: Ctrl-C is tried at different moments
        chat.type(CTRL_C + f"seen {i}")
        chat.wait(f"seen {i}")  # what is typed shows at a prompt only: an answer would run for minutes
        chat.type(CTRL_C)
    chat.say("/help")


def test_ctrl_c_works_where_the_program_was_started_with_it_ignored(terminals: Chats) -> None:
    """A shell script starts background programs with Ctrl-C ignored.

    A user at the terminal can still stop the answer.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        chat = terminals(load=30)
    finally:
        signal.signal(signal.SIGINT, before)
    chat.wait("loading")
    chat.type(CTRL_C)
    assert chat.exit_code() == 130


def test_ctrl_c_at_the_prompt_clears_the_line_then_hints_and_never_leaves(chats: FakeChats) -> None:
    chat = chats()
    chat.prompt()
    chat.type("half a thought")
    chat.wait("half a thought")
    chat.type(CTRL_C)
    chat.prompt()
    chat.type(CTRL_C)
    chat.wait("press Ctrl-D")
    assert "still here" in chat.say("still here")


def test_ctrl_c_while_the_model_loads_ends_with_130(chats: FakeChats) -> None:
    chat = chats(load=30)
    chat.wait("loading")
    chat.type(CTRL_C)
    assert chat.exit_code() == 130
    assert "Traceback" not in chat.text


def test_ctrl_c_while_the_prompt_is_read_comes_back_to_the_prompt(chats: FakeChats) -> None:
    chat = chats(prefill=3, prefill_chunks=30)
    chat.prompt()
    chat.type("long" + ENTER)
    chat.step()  # the first of 30 pieces of the prompt
    chat.type(CTRL_C)
    assert "there is no answer" in chat.prompt()


def test_a_slow_prompt_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the answer's first text; then no word of it is left."""
    shown: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(answer, "PATIENCE_S", 0)
    waiting = answer.Waiting(SimpleNamespace(status=shown.put))  # type: ignore[arg-type]
    with waiting:
        waiting.see(Event("prefill", done=1, total=2))
        while "reading the prompt: 1 of 2 tokens (0 s)" != shown.get(timeout=300):
            pass
        waiting.started -= 7
        while "reading the prompt: 1 of 2 tokens (7 s)" != shown.get(timeout=300):
            pass
        waiting.see(Event("text", "done"))
        words = [shown.get() for _ in range(shown.qsize())]
        assert words[-1] == "" and not waiting.is_alive()


def test_a_passing_word_leaves_no_trace() -> None:
    terminal, paper = Terminal(True, True, True, True), io.StringIO()
    made = stream.MarkdownAnswer(Console(file=paper, width=80, force_terminal=True), terminal)
    made.status("reading the prompt (1 s)")
    display = Display(24, 80)
    display.stream.feed(paper.getvalue().encode())
    assert "reading the prompt" in display.text
    made.status("")
    made.feed("done")
    made.finish()
    display.stream.feed(paper.getvalue().replace("\n", "\r\n").encode())
    assert "reading the prompt" not in display.text and "done" in display.text


def test_keys_typed_while_no_prompt_is_there_reach_the_next_and_show_nowhere_else(terminals: Chats) -> None:
    chat = terminals(load=1, answers=["slow {echo} here", "{echo}!"], delay=0.15)
    chat.wait("loading")
    chat.type("early bird" + ENTER)
    chat.wait("slow")
    chat.type("second" + ENTER)
    text = chat.wait("second!")
    assert "slow early bird here\n" in text


def test_unknown_command_names_the_nearest(chats: FakeChats) -> None:
    assert "did you mean /clear?" in chats().say("/claer")


def test_clear_forgets_the_conversation_and_keeps_the_system_prompt(chats: FakeChats, tmp_path: Path) -> None:
    log = tmp_path / "log"
    chat = chats("--system", "Be brief.", log=str(log))
    chat.say("one")
    chat.say("/clear")
    chat.say("two")
    asked = json.loads(log.read_text().splitlines()[-1])["messages"]
    assert asked == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]


def test_help_lists_every_command(chats: FakeChats) -> None:
    from tinychat_mlx.apps.chat.commands.table import COMMANDS

    text = chats(rows=60).say("/help")
    assert all(f"/{name}" in text for name in COMMANDS)


def test_sampling_flags_reach_the_model(chats: FakeChats, tmp_path: Path) -> None:
    log = tmp_path / "log"
    chats("--temperature", "0.5", "--seed", "7", "--on-full", "slide", log=str(log)).say("hi")
    asked = json.loads(log.read_text())
    assert (asked["temperature"], asked["seed"], asked["on_full"]) == (0.5, 7, "slide")
    assert "top_k" not in asked


def test_context_full_is_said_and_the_message_comes_back(chats: FakeChats) -> None:
    chat = chats(context=30, answers=["w " * 40], piece=2)
    chat.prompt()
    chat.type("first" + ENTER)
    chat.wait("the answer was cut")
    chat.prompt()
    chat.type("does this fit" + ENTER)
    text = chat.wait("error: the prompt has")
    chat.wait(lambda text: after(text, "error:").count("does this fit") == 1)
    assert "Traceback" not in text


# the bundled model -------------------------------------------------------------------------------------
def test_a_newcomers_first_chat_with_the_bundled_model(terminals: Chats, tmp_path: Path) -> None:
    """No script: the demo's weights. Talk, look, save, leave, resume: only new tokens are computed."""
    bundled = (ROOT / "tinychat_mlx" / "models" / "demo").exists()  # a checkout may have only the original
    args = ["-m", "demo" if bundled else str(DATA / "demo-fp16"), "--temperature", "0"]
    chat = terminals(*args, real=True, rows=60, columns=100)
    text = chat.say("who are you?")
    assert "demo" in after(text, "who are you?").lower() and "tok/s" in text
    chat.say("my name is Ada")
    chat.say("/save first chat")
    chat.type(CTRL_D)
    assert chat.exit_code() == 0
    chat = terminals(*args, "--session", "first chat", real=True, rows=60, columns=100)
    assert "Ada" in after(chat.say("what is my name?"), "what is my name?")
    chat.say("thank you")
    m = re.search(r"last prompt +(\d+) tokens, (\d+) of them reused", chat.say("/stats"))
    assert m is not None and int(m[2]) >= int(m[1]) - 12  # the new message and the template's text around it


# Markdown ----------------------------------------------------------------------------------------------
LONG = "\n".join(
    f"Line {i} of **many**, with `code` and 日本語 🎉 to wrap around the end of a row of eighty."
    for i in range(3000)
)


def test_an_answer_of_3000_lines_is_in_the_scrollback_exactly_once(chats: FakeChats) -> None:
    chat = chats(answers=[LONG], piece=700, context=100_000)
    text = chat.say("go", seconds=60)
    body = text[text.index("Line 0 of") : text.index("first token")]
    expected = LONG.replace("**", "").replace("`", "")
    assert "".join(body.split()) == "".join(expected.split())


def test_the_answer_on_the_screen_never_shrinks(chats: FakeChats) -> None:
    """Append-only: rows above the open tail never change once a later row exists."""
    chat = chats(
        answers=["para **one** is " + "long " * 60 + "\n\nsecond para\n\n- item\n- item\n\nend."], delay=0.005
    )
    chat.prompt()
    chat.type("go" + ENTER)
    best: list[str] = []
    while "first token" not in chat.text:
        chat.step()
        rows = [r for r in after(chat.text, "❯ go\n").split("\n") if r]
        fixed = rows[:-5]
        assert fixed[: len(best)] == best[: len(fixed)]
        best = fixed if len(fixed) > len(best) else best
    assert len(best) > 3


def test_escape_sequences_from_a_model_do_not_reach_the_terminal(chats: FakeChats) -> None:
    chat = chats(answers=["safe\x1b]0;owned\x07 text \x1b[2Jend\x9b31m"])
    text = chat.say("go")
    assert "safe]0;owned text [2Jend31m" in text and b"owned\x07" not in chat.raw


def test_slash_offers_commands(chats: FakeChats) -> None:
    """test_editor.py shows what the editor makes of it."""
    chat = chats()
    chat.prompt()
    offered = list(chat.complete("/cl"))
    assert any("Empty the conversation" in what for _, _, what in offered)


# plain terminals ---------------------------------------------------------------------------------------
def test_a_plain_terminal_gets_no_escape_sequence_and_only_its_own_characters(terminals: Chats) -> None:
    env = {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C"}
    chat = terminals("--plain", env=env, answers=["**hi**", "✓ fine 日本"])
    chat.prompt()
    chat.type("hello\n")
    assert "**hi**" in chat.wait("tok/s")
    chat.prompt()
    chat.type("hello\n")
    text = chat.wait(lambda text: text.count("tok/s") == 2)
    assert "? fine ??" in text and "Traceback" not in text
    chat.type(CTRL_D)
    assert chat.exit_code() == 0
    assert b"\x1b" not in chat.raw and max(chat.raw) < 128


@pytest.mark.parametrize(
    ("plain", "term", "live"),
    [(False, "xterm", True), (True, "xterm", False), (False, "dumb", False), (False, "unknown", False)],
)
def test_a_terminal_is_live_unless_it_is_dumb_or_plain_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, plain: bool, term: str, live: bool
) -> None:
    for name in ("stdin", "stdout"):
        tty = SimpleNamespace(closed=False, isatty=lambda: True, encoding="utf-8")
        monkeypatch.setattr(sys, name, tty)
    found = detect(plain, {"TERM": term})
    assert found.interactive and found.live == found.colour == live


def test_no_color_writes_no_colour(chats: FakeChats) -> None:
    chat = chats(env={"NO_COLOR": "1"}, answers=["# T\n`code` **b**"])
    chat.say("hi")
    codes = {int(c) for m in re.findall(rb"\x1b\[([\d;]*)m", chat.raw) for c in m.split(b";") if c}
    assert not {c for c in codes if 30 <= c <= 49 or 90 <= c <= 107}, codes


def test_a_terminal_of_40_columns_and_10_rows_works(chats: FakeChats) -> None:
    chat = chats(columns=40, rows=10, answers=["a long answer " * 30])
    text = chat.say("hi")
    assert max(len(row) for row in text.split("\n")) <= 40
    assert text.count("a long") + text.count("a\nlong") >= 29


@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_terminated_it_gives_the_terminal_its_mode_back(terminals: Chats, when: str) -> None:
    """Also a terminal that was made narrower in the middle of an answer."""
    import termios

    chat = terminals(answers=["word " * 120], delay=0.01)
    before = termios.tcgetattr(chat.child.child_fd)
    chat.prompt()
    if when == "answer":
        chat.type("go" + ENTER)
        chat.wait("word word word")
        chat.child.setwinsize(24, 40)
        chat.screen.resize(24, 40)
        assert "first token" in chat.prompt() or "context" in chat.text
        chat.type("again" + ENTER)
        chat.wait(lambda text: "word word" in after(text, "❯ again"))
    assert termios.tcgetattr(chat.child.child_fd)[3] & termios.ECHO == 0
    os.kill(chat.child.pid, signal.SIGTERM)
    chat.end()
    now = termios.tcgetattr(chat.child.child_fd)
    assert (now[0], now[3]) == (before[0], before[3])
    assert chat.exit_code() == 128 + signal.SIGTERM
    assert "Traceback" not in chat.text
