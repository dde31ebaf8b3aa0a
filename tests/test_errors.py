"""Errors as a user sees them: one line that names the fault, its place and what to do."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinychat_mlx import errors
from tinychat_mlx.errors import in_words

ROOT = Path(__file__).resolve().parent.parent
# What a message ends with: an instruction behind a dash, a command, an option, or a sentence behind a colon.
TO_DO = re.compile(r" — \w|`[^`]+`|--[a-z]|: \w+ ")


def test_what_helps_is_added_once() -> None:
    assert in_words(errors.FormatError("w: bad")).endswith(errors.FormatError.remedy)
    for text in ("w: bad — download it again", "w: bad: download it", "w: run `x`", "w: use --head"):
        assert in_words(errors.FormatError(text)) == text
    assert in_words(errors.UsageError("a\nb  c")) == "a b c" and in_words(OSError("x")) == "x"


def test_an_extra_is_installed_from_where_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quoted, as zsh takes brackets for a pattern; away from a checkout by its name."""
    if (ROOT / "pyproject.toml").exists() and Path(errors.__file__).parent.parent == ROOT:
        assert shlex.split(errors.pip_install("cuda")) == ["pip", "install", "-e", f"{ROOT}[cuda]"]
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "tinychat_mlx" / "errors.py"))
    assert errors.pip_install("cuda").replace('"', "'") == "pip install 'tinychat-mlx[cuda]'"
    assert errors.pip_install("", "--force").replace('"', "'") == "pip install --force 'tinychat-mlx'"
    for folder in ("apps", "awq", "backends", "tinychat_mlx"):
        for path in (ROOT / folder).rglob("*.py"):
            found = re.search(r"pip install[^'\"`{\n]*\w(\[|[<>=~]=)", path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found and found[0]} is not quoted"


# what the system refuses -------------------------------------------------------------------------------
def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(OSError) as error:
        call()
    return in_words(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX's numbers of errors")
def test_what_the_system_refuses_is_said_in_words(tmp_path: Path) -> None:
    """Real refusals where root meets them, too; a path stands first, and what to do last."""
    file = tmp_path / "file"
    file.write_text("")
    said = {
        "no such file or folder": ((tmp_path / "no").read_text, tmp_path / "no"),
        "a part of this path is a file, not a folder": ((file / "x").read_text, file / "x"),
        "this is a folder": (tmp_path.read_text, tmp_path),
        "it exists already": (lambda: os.close(os.open(file, os.O_CREAT | os.O_EXCL)), file),
        "its links lead in a circle": (lambda: circle(tmp_path / "a").stat(), tmp_path / "a"),
    }
    for words, (call, path) in said.items():
        line = refused(call)
        assert line.startswith(f"{path}: {words} — ") and TO_DO.search(line), line
    line = refused((tmp_path / ("x" * 5000)).read_text)
    assert ": the name is too long — shorten it" in line and len(line) < 200 and "xxx…xxx" in line
    if Path("/dev/full").exists():
        full = os.open("/dev/full", os.O_WRONLY)
        assert refused(lambda: os.write(full, b"x")) == "the disk is full — make room, or choose another disk"
        os.close(full)
    denied = PermissionError(13, "Permission denied", "/a")
    assert in_words(denied) == "/a: no permission — choose another place, or let its owner do it"
    moved = in_words(OSError(18, "Invalid cross-device link", "/a", None, "/b"))
    assert moved.startswith("/a -> /b: Invalid cross-device link — ") and TO_DO.search(moved)


def circle(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_places_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the conversion, or the measurements, were done."""
    monkeypatch.setattr("tinychat_mlx.checkpoint.Checkpoint.open", never)
    monkeypatch.setattr("tinychat_mlx.apps.doctor.examine.examine", never)
    (tmp_path / "file").write_text("")
    file, out = str(tmp_path / "file"), str(tmp_path / "out")
    convert = ["convert", str(ROOT / "tests" / "data" / "demo-fp16"), "-o"]
    said = {
        (*convert, "/proc/x"): "-o /proc/x: /proc takes no new files",
        (*convert, f"{file}/x"): f"{file} is a file, not a folder",
        (*convert, f"{file}/no/x"): f"{file} is a file, not a folder",
        (*convert, file): f"{file} exists",
        (*convert, str(tmp_path / ("x" * 250))): "the name is too long — shorten it",
        (*convert, out, "--report", f"{file}/x"): f"--report {file}/x: {file} is a file",
        (*convert, out, "--report", "/proc/x"): "--report /proc/x: /proc takes no new files",
        ("doctor", "--report", file): f"--report {file}: it exists already",
        ("doctor", "--report", f"{tmp_path}/no/r.md"): f"there is no folder {tmp_path}/no",
    }
    for command, words in said.items():
        assert one_line(command, capfd, 2).startswith("error: ") and words in _last[0], _last
    monkeypatch.setattr("tempfile.mkdtemp", lambda *a, **k: broken(13, "Permission denied"))
    assert "no permission — choose another place" in one_line((*convert, out), capfd, 2)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *a, **k: broken(28, "No space left on device"))
    assert "the disk is full — make room" in one_line((*convert, out), capfd, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


_last = [""]


def one_line(command: tuple[str, ...], capfd: pytest.CaptureFixture[str], code: int) -> str:
    """What a command that fails with this exit code prints, which is one line that says what to do."""
    from tinychat_mlx.apps.cli import main

    assert main(command) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "[Errno" not in err and TO_DO.search(err), err
    _last[0] = err
    return err


def broken(number: int, text: str) -> Any:
    raise OSError(number, text, "/x")


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this is work")


def test_a_folder_that_holds_no_model_is_called_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    line = one_line(("run", "-m", str(tmp_path), "hi"), capfd, 1)
    assert f"{tmp_path} is no model's folder: config.json is not in it" in line
    line = one_line(("run", "-m", "x" * 5000, "hi"), capfd, 1)
    assert "the name is too long — shorten it" in line and len(line) < 220


def test_the_command_line_prints_that_line_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tinychat_mlx.apps.cli import main

    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": "many"}')
    assert main(["run", "-m", str(tmp_path), "hi"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and TO_DO.search(lines[0])
