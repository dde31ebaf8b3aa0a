"""Ctrl-C while a bar is on the screen removes the bar, also a full-width one, and keeps the hint to resume."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tiny_dense
from checkout import ROOT
from stand_in_hub import Hub

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)
pytest.importorskip("pexpect")
pytest.importorskip("pyte")
from chat_screen import CTRL_C, Screen

BAR = ("━", "╸", "╺")
PROGRAM = "import sys, time; from tinychat_mlx.apps.cli import main; {}; sys.exit(main(sys.argv[1:]))"
# Everything but the embedding is done, which takes a minute.
SLOW = (
    "from tinychat_mlx.awq import layer_stream as stream; stream.Conversion._rim = lambda *_: time.sleep(60)"
)


def started(columns: int, *args: str, code: str = "pass", env: dict[str, str] | None = None) -> Screen:
    own = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    command = [sys.executable, "-c", PROGRAM.format(code), *args]
    return Screen(command, 24, columns, os.environ | own | (env or {}))


def stopped(screen: Screen, columns: int, says: str) -> None:
    """Press Ctrl-C and check that the program ends as interrupted with a hint to resume."""
    drawn = len(screen.raw) + 500  # not while the bar is being created
    screen.wait(lambda _: len(screen.raw) > drawn)
    screen.type(CTRL_C)
    screen.wait(lambda text: says in " ".join(text.split()))
    assert screen.exit_code() == 130
    assert not any(mark in screen.text for mark in BAR), screen.text
    assert all(len(row) <= columns for row in screen.lines)


def test_a_conversions_bar_goes(tmp_path: Path, columns: int = 60) -> None:
    tiny_dense.save(tmp_path / "dense")
    text = str(tiny_dense.text(tmp_path))
    command = ("convert", str(tmp_path / "dense"), "-o", str(tmp_path / "made"), "--calib", text)
    screen = started(columns, *command, "--group-size", "32", "--backend", "reference", code=SLOW)
    screen.wait("━ 3/3")
    stopped(screen, columns, "--resume to continue")


def test_a_downloads_bar_goes(tmp_path: Path, columns: int = 79) -> None:
    tiny_dense.save(tmp_path / "models" / "org" / "model")
    with Hub(tmp_path) as hub:
        hub.pause = 1.0
        screen = started(columns, "models", "pull", "org/model", env=hub.environ(tmp_path / "hf"))
        screen.wait("left")
        stopped(screen, columns, "resumes the download")
