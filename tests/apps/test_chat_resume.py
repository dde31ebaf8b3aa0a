"""Resuming a long chat computes none of its tokens again, with the bundled model."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("needs a POSIX pseudo-terminal", allow_module_level=True)
from chat_screen import CTRL_D, ENTER
from fake_terminal import FakeChats, FakeScreen

DEMO = ("-m", "demo", "--backend", "cpu", "--temperature", "0", "--max-tokens", "40")
WORDS = "the small fox thought that it was late and went home over the hill to sleep by the old river "


def tell(chat: FakeScreen, text: str, answers: int) -> None:
    """Paste a message and wait for the given number of answers in this run."""
    chat.prompt(60)
    chat.type(f"\x1b[200~{text}\x1b[201~")
    chat.wait(lambda shown: text[-12:] in shown.replace("\n", ""))
    chat.type(ENTER)
    chat.wait(lambda shown: shown.count("first token") >= answers, 60)


def long_chat(chats: Any, *args: str, messages: int = 3, leave: bool = True) -> Any:
    """Create a chat of about 1,000 tokens per message."""
    chat = chats(*DEMO, *args, real=True, rows=50, columns=120)
    for i in range(messages):
        tell(chat, f"number {i}: " + WORDS * 46 + f"and end {i}", i + 1)
    chat.prompt()
    if leave:
        chat.type(CTRL_D)
        assert chat.exit_code() == 0
    return chat


def last_prompt(chat: FakeScreen) -> tuple[int, int]:
    """Return the tokens of the last prompt, and how many of them were reused."""
    found = re.search(r"last prompt +([\d,]+) tokens, ([\d,]+) of them reused", chat.say("/stats", 60))
    assert found is not None
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def test_a_resumed_chat_of_3000_tokens_computes_only_what_is_new(chats: FakeChats, tmp_path: Path) -> None:
    long_chat(chats)
    chat = chats(*DEMO, "--continue", real=True, rows=50, columns=120)
    tell(chat, "who are you?", 1)
    prompt, reused = last_prompt(chat)
    assert prompt > 2950 and reused >= 2900
    assert prompt - reused < 40, "the new message, and what the template puts round it"
    files = list((tmp_path / "cache" / "prefixes").iterdir())
    assert len(files) >= 3000 // 256 and {f.stat().st_mode & 0o777 for f in files} == {0o600}
    assert (tmp_path / "cache" / "prefixes").stat().st_mode & 0o777 == 0o700


def test_the_answer_of_a_resumed_chat_is_that_of_one_never_left(
    chats: FakeChats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the cpu backend keys and values are restored bit for bit. The first chat here computes everything."""
    stayed = long_chat(chats, leave=False)
    tell(stayed, "who are you?", 4)
    stayed.prompt()
    (tmp_path / "other").mkdir()
    left = FakeChats(tmp_path / "other", monkeypatch)
    long_chat(left)
    again = left(*DEMO, "--continue", real=True, rows=50, columns=120)
    tell(again, "who are you?", 1)
    again.prompt()
    assert last_prompt(again)[1] >= 2900
    assert messages(tmp_path) == messages(tmp_path / "other")


def messages(folder: Path) -> list[tuple[str, str, list[int]]]:
    """Return the messages, and the exact tokens of the answers."""
    (path,) = (folder / "data" / "sessions").glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["role"], r["content"], r.get("ids", [])) for r in records if "role" in r]


@pytest.mark.parametrize("harm", ["deleted", "cut", "flipped", "folder is a file", "off"])
def test_without_a_usable_cache_the_chat_goes_on_and_computes(
    chats: FakeChats, tmp_path: Path, harm: str
) -> None:
    long_chat(chats, messages=1)
    folder, env = tmp_path / "cache" / "prefixes", {}
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        if harm == "cut":
            path.write_bytes(data[: len(data) // 2])
        elif harm == "flipped":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        elif harm in ("deleted", "folder is a file"):
            path.unlink()
    if harm == "folder is a file":
        folder.rmdir()
        folder.write_text("")
    elif harm == "off":
        env = {"TINYCHAT_PREFIX_MB": "0"}
    chat = chats(*DEMO, "--continue", real=True, rows=50, columns=120, env=env)
    tell(chat, "who are you?", 1)
    _, reused = last_prompt(chat)
    assert reused == 0 and "error" not in chat.text and "Traceback" not in chat.text
    chat.type(CTRL_D)
    assert chat.exit_code() == 0


def test_killed_after_an_answer_it_still_has_all_but_the_last_part(chats: FakeChats, tmp_path: Path) -> None:
    """Whole parts are on disk soon after each answer; the last, unfinished one is written when the chat is left.

    What is on the disk before that is all that a killed chat leaves.
    """
    long_chat(chats, messages=2, leave=False)
    folder, end = tmp_path / "cache" / "prefixes", time.monotonic() + 300
    while len(list(folder.glob("*.safetensors"))) < 8:
        assert time.monotonic() < end
        time.sleep(0.02)
    env = {
        "TINYCHAT_DATA": str(tmp_path / "left" / "data"),
        "TINYCHAT_CACHE": str(tmp_path / "left" / "cache"),
    }
    for name in ("data", "cache"):
        partial = shutil.ignore_patterns("*.partial")
        shutil.copytree(tmp_path / name, tmp_path / "left" / name, ignore=partial)
    again = chats(*DEMO, "--continue", real=True, rows=50, columns=120, env=env)
    tell(again, "who are you?", 1)
    prompt, reused = last_prompt(again)
    assert reused >= 7 * 256 and prompt - reused < 256 + 40


def test_an_unsaved_chat_leaves_nothing_in_the_cache(chats: FakeChats, tmp_path: Path) -> None:
    long_chat(chats, "--no-save", messages=1)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "data").exists()


def test_load_goes_on_without_computing_too(chats: FakeChats) -> None:
    chat = long_chat(chats, messages=1, leave=False)
    chat.say("/save long one")
    chat.say("/new")
    tell(chat, "hello", 2)
    chat.say("/load long one")
    tell(chat, "who are you?", 3)
    prompt, reused = last_prompt(chat)
    assert prompt > 950 and prompt - reused < 40
