"""The error class, messages for system errors, and the one line that the command line prints."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import DATA, ROOT

from tinychat_mlx.base import errors
from tinychat_mlx.base.errors import FormatError, TinychatError, UsageError, one_line, within


def test_an_error_has_three_fields_and_is_one_line() -> None:
    error = UsageError("a\nb  c", where=Path("file"), remedy="do\nit")
    assert (error.what, error.where, error.remedy) == ("a b c", "file", "do it")
    assert str(error) == one_line(error) == "file: a b c — do it" and error.problem == "file: a b c"
    assert str(UsageError("bad", remedy="do it")) == "bad — do it"
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is UsageError and str(again) == str(error)


def test_a_class_has_a_remedy_or_its_caller_gives_one() -> None:
    classes = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, TinychatError)]
    for cls in classes:
        assert cls.__doc__ and str(cls("bad", remedy="do it")) == "bad — do it"
        if remedy := getattr(cls, "remedy", ""):
            assert str(cls("bad")) == f"bad — {remedy}"  # type: ignore[call-arg]
        elif cls.__init__ is TinychatError.__init__:
            with pytest.raises(TypeError, match="remedy"):
                cls("bad")  # type: ignore[call-arg]


def test_an_error_within_another_place_keeps_its_class_and_remedy() -> None:
    error = within("model", FormatError("bad", where="w", remedy="do it"))
    assert type(error) is FormatError and str(error) == "model: w: bad — do it"
    assert within("model", FormatError("bad")).where == "model"


def test_an_extra_is_installed_from_where_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quoted, because zsh treats brackets as a pattern; outside a checkout with the package's name."""
    if (ROOT / "pyproject.toml").exists() and Path(errors.__file__).parents[2] == ROOT:
        assert shlex.split(errors.pip_install("cuda")) == ["pip", "install", "-e", f"{ROOT}[cuda]"]
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "tinychat_mlx" / "base" / "errors.py"))
    assert errors.pip_install("cuda").replace('"', "'") == "pip install 'tinychat-mlx[cuda]'"
    assert errors.pip_install("", "--force").replace('"', "'") == "pip install --force 'tinychat-mlx'"
    for folder in ("apps", "awq", "backends", "tinychat_mlx"):
        for path in (ROOT / folder).rglob("*.py"):
            found = re.search(r"pip install[^'\"`{\n]*\w(\[|[<>=~]=)", path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found and found[0]} is not quoted"


# errors of the operating system ------------------------------------------------------------------------
def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(OSError) as error:
        call()
    return one_line(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX error numbers")
def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    """Real errors, also for root. A path comes first, the remedy last."""
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
        assert line.startswith(f"{path}: {words} — ") and " — " in line, line
    line = refused((tmp_path / ("x" * 5000)).read_text)
    assert ": the name is too long — shorten it" in line and len(line) < 200 and "xxx…xxx" in line
    if Path("/dev/full").exists():
        full = os.open("/dev/full", os.O_WRONLY)
        assert refused(lambda: os.write(full, b"x")) == "the disk is full — make room, or choose another disk"
        os.close(full)
    denied = PermissionError(13, "Permission denied", "/a")
    assert one_line(denied) == "/a: no permission — choose another place, or let its owner do it"
    moved = one_line(OSError(18, "Invalid cross-device link", "/a", None, "/b"))
    assert moved.startswith("/a -> /b: Invalid cross-device link — ") and " — " in moved


def written(path: Path) -> Path:
    path.write_text("")
    return path


def circle(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_places_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check runs before a conversion or measurements, not afterwards."""
    monkeypatch.setattr("tinychat_mlx.weights.checkpoint.Checkpoint.open", never)
    monkeypatch.setattr("tinychat_mlx.apps.doctor.examine.examine", never)
    file, out = str(written(tmp_path / "file")), str(tmp_path / "out")
    convert = ["convert", str(DATA / "demo-fp16"), "-o"]
    said = {
        (*convert, "/proc/x"): "-o /proc/x: /proc takes no new files",
        (*convert, f"{file}/x"): f"{file}: this is a file, not a folder",
        (*convert, file): f"{file}: it exists",
        (*convert, str(tmp_path / ("x" * 250))): "the name is too long — shorten it",
        (*convert, out, "--report", f"{file}/x"): f"--report {file}/x: {file} is a file",
        (*convert, out, "--report", "/proc/x"): "--report /proc/x: /proc takes no new files",
        ("doctor", "--report", file): f"--report {file}: it exists already",
        ("doctor", "--report", f"{tmp_path}/no/r.md"): f"there is no folder {tmp_path}/no",
    }
    for command, words in said.items():
        assert line_of(command, capfd, 2).startswith("error: ") and words in _last[0], _last
    monkeypatch.setattr("tempfile.mkdtemp", lambda *a, **k: broken(13, "Permission denied"))
    assert "no permission — choose another place" in line_of((*convert, out), capfd, 2)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *a, **k: broken(28, "No space left on device"))
    assert "the disk is full — make room" in line_of((*convert, out), capfd, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


_last = [""]


def line_of(command: tuple[str, ...], capfd: pytest.CaptureFixture[str], code: int) -> str:
    """Run a command that fails with this exit code and prints one line with a remedy. Returns that line."""
    from tinychat_mlx.apps.cli import main

    assert main(command) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "[Errno" not in err and " — " in err, err
    _last[0] = err
    return err


def broken(number: int, text: str) -> Any:
    raise OSError(number, text, "/x")


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the command started work")


def test_a_folder_that_holds_no_model_is_called_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    line = line_of(("run", "-m", str(tmp_path), "hi"), capfd, 1)
    assert f"{tmp_path}: not a model folder: it has no config.json" in line
    line = line_of(("run", "-m", "x" * 5000, "hi"), capfd, 1)
    assert "the name is too long — shorten it" in line and len(line) < 220


def test_the_command_line_prints_that_line_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinychat_mlx.apps.cli import main

    monkeypatch.setattr("sys.stdin", None)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": "many"}')
    assert main(["run", "-m", str(tmp_path), "hi"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and " — " in lines[0]
