"""Slash commands and saved chats."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import folders
import pytest

if sys.platform == "win32":
    pytest.skip("needs a POSIX pseudo-terminal", allow_module_level=True)
from chat_screen import CTRL_C, CTRL_D, ENTER, Chats, Screen
from fake_terminal import FakeChats, FakeScreen


def asked(tmp_path: Path, at: int = -1) -> list[dict[str, Any]]:
    """Return the messages of a call that reached the model."""
    return list(json.loads((tmp_path / "log").read_text().splitlines()[at])["messages"])


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [m["content"] for m in messages]


def leave(chat: Screen | FakeScreen) -> None:
    chat.prompt()
    chat.type(CTRL_D)
    assert chat.exit_code() == 0


# messages ----------------------------------------------------------------------------------------------
def test_undo_retry_edit_change_what_the_model_sees(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats("--seed", "5", log=str(tmp_path / "log"), answers=["A1", "A2", "A3", "A4", "A5"], rows=60)
    chat.say("one")
    chat.say("two")
    assert "seed 6" in chat.say("/retry")
    assert texts(asked(tmp_path)) == ["one", "A1", "two"]
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["seed"] == 6
    assert "removed: two" in chat.say("/undo")
    chat.type("/edit" + ENTER)
    chat.wait(lambda text: text.rstrip("\n").count("❯ one") == 2)
    chat.type(" and more" + ENTER)
    chat.wait("A4")
    assert texts(asked(tmp_path)) == ["one and more"]
    chat.say("/undo")
    assert "the conversation is empty" in chat.say("/undo")


def test_branch_and_new_leave_the_old_chat_as_it_was(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats(rows=60)
    chat.say("shared")
    chat.say("/branch")
    chat.say("only here")
    chat.say("/new")
    chat.say("fresh")
    text = chat.say("/sessions")
    rows = [r for r in text.split("\n") if "202" in r and ("shared" in r or "fresh" in r)]
    counts = sorted(int(r.split("shared")[0].split("fresh")[0].split()[-1]) for r in rows)
    assert counts == [2, 2, 4], rows


def test_compact_replaces_old_messages_for_the_model_and_keeps_them_on_record(
    chats: FakeChats, tmp_path: Path
) -> None:
    chat = chats(
        log=str(tmp_path / "log"), answers=["A1", "A2", "they like herons", "A3"], rows=60, columns=160
    )
    chat.say("I like herons")
    assert "nothing to summarise" in chat.say("/compact")
    chat.say("two")
    assert "they like herons" in chat.say("/compact")
    chat.say("three")
    seen = texts(asked(tmp_path))
    assert len(seen) == 3 and "they like herons" in seen[0] and seen[0].endswith("two") and seen[2] == "three"
    chat.say(f"/export {tmp_path / 'out.json'}")
    kept = json.loads((tmp_path / "out.json").read_text())["messages"]
    assert texts(kept) == ["I like herons", "A1", "two", "A2", "three", "A3"]


def test_when_the_context_fills_the_policy_compact_sums_up_by_itself(
    chats: FakeChats, tmp_path: Path
) -> None:
    chat = chats(
        "--on-full",
        "compact",
        context=64,
        piece=2,
        answers=["w " * 25, "w " * 25, "short sum", "fine"],
        rows=60,
    )
    chat.say("one")
    chat.say("two")
    text = chat.say("three " * 8)
    assert "summarising" in text and "short sum" in text and "fine" in text


def test_when_the_context_fills_the_policy_slide_says_what_it_dropped(chats: FakeChats) -> None:
    chat = chats("--on-full", "slide", context=60, piece=2, answers=["w " * 25], rows=60)
    chat.say("one")
    chat.say("two")
    assert "no longer sees the oldest 2 messages" in chat.say("three " * 5)


# settings ----------------------------------------------------------------------------------------------
def test_set_and_show_tell_value_and_origin(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats("--top-k", "7", log=str(tmp_path / "log"), rows=80, env={"TINYCHAT_MIN_P": "0.1"})
    text = chat.say("/show")
    assert "top_k               7  (flag)" in text and "min_p               0.1  (environment)" in text
    assert "temperature         0.6  (model)" in text and "top_p               0.95  (built in)" in text
    assert "temperature         0.2  (/set)" in chat.say("/set temperature 0.2")
    chat.say("hi")
    settings = json.loads((tmp_path / "log").read_text())
    assert settings["temperature"] == 0.2 and settings["top_k"] == 7
    assert "NAME one of" in chat.say("/set colour blue")
    assert "-1.0 is not in the range" in chat.say("/set temperature -1")
    assert "0.6  (model)" in chat.say("/set temperature default")


def test_system_prompt_is_changed_shown_and_taken_away(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats(log=str(tmp_path / "log"), rows=60)
    chat.say("/system Speak like a heron.")
    chat.say("one")
    assert asked(tmp_path)[0] == {"role": "system", "content": "Speak like a heron."}
    assert "system prompt: none" in chat.say("/system none")
    chat.say("two")
    assert asked(tmp_path)[0]["role"] == "user"


def test_model_and_backend_switch_and_the_conversation_goes_on(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats(log=str(tmp_path / "log"), rows=60)
    chat.say("one")
    assert "other · llama" in chat.say("/model other")
    assert "reference: Test CPU" in chat.say("/backend reference")
    assert "'tpu'" in chat.say("/backend tpu")
    assert "error: missing: no such folder" in chat.say("/model missing")
    assert "other" in chat.say("two")
    assert texts(asked(tmp_path)) == ["one", "one", "two"]


def test_a_model_that_does_not_load_leaves_the_meter_as_it_was(chats: FakeChats) -> None:
    chat = chats()
    chat.say("one")
    assert "3 / 2,048" in chat.say("/context")
    chat.say("/model missing")
    assert "3 / 2,048" in chat.say("/context").rpartition("/context")[2]


def test_a_model_too_large_for_memory_is_refused_before_it_is_loaded(
    chats: FakeChats, tmp_path: Path
) -> None:
    huge = folders.huge(tmp_path / "huge")
    chat = chats(rows=60, columns=160)
    text = chat.say(f"/model {huge}")
    assert "error:" in text and "GB is free" in text and "TB of memory" in text
    assert "scripted" in chat.say("/show")


def test_models_at_hand_are_listed_and_offered(chats: FakeChats, tmp_path: Path) -> None:
    """A complete model stays listed as such while a newer upload of it is incomplete."""
    commit = "0123456789" * 4
    for name, whole in (("org--whole", True), ("org--half", False)):
        repo = tmp_path / "hub" / f"models--{name}"
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True)
        for made in ("refs", "blobs"):
            (repo / made).mkdir()
        (repo / "refs" / "main").write_text(commit)
        (repo / "blobs" / "x.incomplete").write_text("")
        (folder / "config.json").write_text("{}")
        if whole:
            (folder / "model.safetensors").write_text("")
    ours = tmp_path / "share" / "tinychat-mlx" / "models" / "org--other-int4"
    ours.mkdir(parents=True)
    (ours / "config.json").write_text("{}")
    chat = chats(env={"HF_HUB_CACHE": str(tmp_path / "hub"), "XDG_DATA_HOME": str(tmp_path / "share")})
    text = chat.say("/model")
    assert "* demo" in text and "org/whole" in text and "org/half" not in text
    assert sys.platform != "linux" or "org--other-int4" in text
    assert [text for text, _, _ in chat.complete("/model org/")] == ["org/whole"]


def test_stats_and_context_count(chats: FakeChats) -> None:
    chat = chats(answers=["one two three"], rows=60)
    chat.say("hello there")
    assert "first token" in chat.say("/stats") and "weights         7.1 MB" in chat.text
    text = chat.say("/context")
    assert "2  user" in text and "3  assistant" in text and "an answer that does not fit is cut" in text


# thinking ----------------------------------------------------------------------------------------------
def test_a_thought_is_folded_kept_apart_and_can_be_shown(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats(
        log=str(tmp_path / "log"),
        answers=["<think>\nsecret musing\n</think>\n\nThe answer."],
        piece=3,
        rows=60,
    )
    text = chat.say("why?")
    assert (
        "thought for" in text and "2 words" in text and "secret musing" not in text and "think>" not in text
    )
    chat.say("/think show")
    text = chat.say("again?")
    assert "│ secret musing" in text and "think>" not in text
    answer = asked(tmp_path)[1]
    assert answer["content"] == "The answer." and answer["reasoning_content"] == "secret musing"
    chat.say("/think off")
    chat.say("third?")
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["template"] == {
        "enable_thinking": False
    }


def test_a_thought_that_the_template_opened_is_a_thought(chats: FakeChats) -> None:
    text = chats(template_thinks=True, answers=["secret musing</think>\nThe answer."]).say("why?")
    assert "2 words" in text and "secret" not in text and "\nThe answer.\n" in text


def test_a_thought_beyond_its_budget_is_cut_and_answered(chats: FakeChats) -> None:
    chat = chats(answers=["<think>" + "muse " * 500 + "</think>late", "In time."], piece=5, rows=60)
    chat.say("/think budget 10")
    text = chat.say("why?")
    assert "budget of 10 tokens" in text and "In time." in text and "late" not in text


# files -------------------------------------------------------------------------------------------------
def test_files_go_along_with_a_message(chats: FakeChats, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("water the ```fern```\n")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    chat = chats(log=str(tmp_path / "log"), answers=["ok"], rows=60, columns=160)
    assert "attached to the next message: notes.txt" in chat.say(f"/file {tmp_path / 'notes.txt'}")
    chat.say("what is to do?")
    assert asked(tmp_path)[-1]["content"] == "notes.txt:\n````\nwater the ```fern```\n````\n\nwhat is to do?"
    chat.say("and now?")
    assert asked(tmp_path)[-1]["content"] == "and now?"
    chat.say(f"see @{tmp_path / 'notes.txt'}, please; me@example.org asked")
    assert asked(tmp_path)[-1]["content"].startswith("notes.txt:\n````\nwater")
    assert "not UTF-8 text" in chat.say(f"/file {tmp_path / 'bytes.bin'}")
    assert "no such file" in chat.say(f"/file {tmp_path / 'absent'}")


def test_an_at_sign_offers_files(chats: FakeChats, tmp_path: Path) -> None:
    (tmp_path / "heron.txt").write_text("x")
    chat = chats()
    chat.prompt()
    assert any("heron.txt" in text for text, _, _ in chat.complete(f"see @{tmp_path}/her"))


def test_export_writes_markdown_and_json_and_overwrites_nothing(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats("--system", "Be brief.", answers=["**A** 日本"], rows=60, columns=160)
    chat.say("question?")
    chat.say(f"/export {tmp_path / 'o.md'}")
    chat.say(f"/export {tmp_path / 'o.json'}")
    # The length of the path decides where the terminal breaks the line.
    assert "exists already" in " ".join(chat.say(f"/export {tmp_path / 'o.md'}").split())
    assert "ends in" in " ".join(chat.say(f"/export {tmp_path / 'o.txt'}").split())
    made = (tmp_path / "o.md").read_text(encoding="utf-8")
    assert "## You\n\nquestion?" in made and "## Answer\n\n**A** 日本" in made and "> Be brief." in made
    saved = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert texts(saved["messages"]) == ["Be brief.", "question?", "**A** 日本"]


def test_copy_reaches_the_clipboard_of_the_terminal(chats: FakeChats, tmp_path: Path) -> None:
    """Without a clipboard program in PATH, the terminal's clipboard (OSC 52) is used."""
    import base64

    (tmp_path / "bin").mkdir()
    chat = chats(answers=["Text\n```python\nx = 1\n```\n"], rows=60, env={"PATH": str(tmp_path / "bin")})
    chat.say("code?")
    chat.say("/copy code")
    assert b"\x1b]52;c;" + base64.b64encode(b"x = 1\n") + b"\x07" in chat.raw


# saved chats -------------------------------------------------------------------------------------------
def test_continue_goes_on_with_the_latest_chat(chats: FakeChats, tmp_path: Path) -> None:
    first = chats("--system", "Be brief.", answers=["A1"])
    first.say("my name is Ada")
    leave(first)
    second = chats("--continue", answers=["A2"], log=str(tmp_path / "log"))
    text = second.prompt()
    assert "resumed: my name is Ada (2 messages)" in text and "A1" in text
    second.say("who am I?")
    assert texts(asked(tmp_path)) == ["Be brief.", "my name is Ada", "A1", "who am I?"]
    leave(second)
    files = list((tmp_path / "data" / "sessions").iterdir())
    assert len(files) == 1 and files[0].stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "data" / "sessions").stat().st_mode & 0o777 == 0o700


def test_session_save_load_search_by_title(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats(rows=70, answers=["the heron flies", "B"])
    chat.say("about birds")
    chat.say("/save birds")
    chat.say("/new")
    chat.say("about trees")
    assert "the heron flies" in chat.say("/search HERON")
    assert "was not found" in chat.say("/search zebra")
    assert "resumed: birds (2 messages)" in chat.say("/load birds")
    assert "no saved chat 'cats'" in chat.say("/load cats")
    leave(chat)
    assert "resumed: birds" in chats("--session", "birds").prompt()
    missing = chats("--session", "cats")
    assert missing.exit_code() == 2 and "no saved chat 'cats'" in missing.text


def test_killed_in_the_middle_of_an_answer_it_continues_with_what_was_said(
    chats: FakeChats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed chat leaves what was on the disk in the middle of the answer."""
    monkeypatch.setattr("tinychat_mlx.apps.chat.session.PIECE_S", 0)
    first = chats(answers=["word " * 500], piece=5)
    first.prompt()
    first.type("go" + ENTER)
    first.wait("word " * 10)
    shutil.copytree(tmp_path / "data", tmp_path / "left")
    env = {"TINYCHAT_DATA": str(tmp_path / "left")}
    second = chats("--continue", answers=["A2"], log=str(tmp_path / "log"), env=env)
    assert "resumed: go (2 messages)" in second.prompt()
    second.say("on")
    seen = asked(tmp_path)
    assert [m["role"] for m in seen] == ["user", "assistant", "user"]
    assert seen[1]["content"].startswith("word word") and len(seen[1]["content"]) >= 5 * 10


def test_a_torn_last_line_is_skipped_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    from tinychat_mlx.apps.chat.session import Session
    from tinychat_mlx.base.errors import FormatError

    session = Session.new(tmp_path)
    (tmp_path / "sessions").mkdir()
    session.add({"role": "user", "content": "hi"})
    assert session.path is not None
    with session.path.open("a") as file:
        file.write('{"role": "assist')
    assert texts(Session.load(session.path).messages) == ["hi"]
    session.path.write_text('{"session": 1}\nnonsense\n{"piece": "x"}\n')
    with pytest.raises(FormatError, match="line 2: not JSON"):
        Session.load(session.path)
    session.path.write_text('{"session": 1}\n[1]\n')
    with pytest.raises(FormatError, match="line 2: not a record"):
        Session.load(session.path)


def change(session: Any, rng: random.Random, step: int) -> None:
    """Apply a random change that a user or an answer can make to a session."""
    what, n = rng.randrange(6), rng.randint(0, len(session.messages))
    if what == 0:
        session.add({"role": "user", "content": f"q{step} ü\n\u2028"})
    elif what == 1:
        session.piece("par")
        session.add({"role": "assistant", "content": "part"})
    elif what == 2:
        session.keep(n)
    elif what == 3:
        session.set_system(f"s{step}")
    elif what == 4:
        session.set_title(f"t{step}")
    else:
        session.sum_up(f"sum{step}", n)


def test_replaying_a_session_gives_the_session(tmp_path: Path) -> None:
    """Law: after any sequence of changes, the session's file loads as the same session."""
    from tinychat_mlx.apps.chat.session import Session

    (tmp_path / "sessions").mkdir()
    rng = random.Random(0)
    for _ in range(50):
        session = Session.new(tmp_path, "demo", rng.choice(["", "Sys"]))
        session.add({"role": "user", "content": "first"})
        for step in range(12):
            change(session, rng, step)
        assert session.path is not None
        again = Session.load(session.path)
        for name in ("messages", "system", "title", "summary", "seen_from", "model", "created"):
            assert getattr(again, name) == getattr(session, name), name
        assert again.for_model() == session.for_model()


def test_no_save_writes_nothing(chats: FakeChats, tmp_path: Path) -> None:
    chat = chats("--no-save")
    chat.say("private")
    assert "chats are not saved" in chat.say("/sessions")
    leave(chat)
    assert not (tmp_path / "data").exists()


def test_ctrl_c_at_save_loses_nothing(terminals: Chats, tmp_path: Path) -> None:
    chat = terminals(answers=["A", "B"])
    chat.say("one")
    for title in ("first", "second", "third"):
        chat.type(f"/save {title}" + ENTER + CTRL_C)
        chat.prompt()
    chat.say("two")
    leave(chat)
    (file,) = (tmp_path / "data" / "sessions").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    said = [line["content"] for line in lines if "content" in line]
    assert said == ["one", "A", "two", "B"]


def test_ctrl_c_while_another_model_loads_keeps_the_old_one(chats: FakeChats) -> None:
    chat = chats(load=1.5)
    chat.say("one")
    chat.type("/model other" + ENTER)
    chat.wait("loading other")
    chat.type(CTRL_C)
    chat.prompt()
    assert "other · llama" not in chat.say("two")
