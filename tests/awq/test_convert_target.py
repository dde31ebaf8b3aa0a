"""The paths to which `convert` may write: never over its source or unrelated files."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_dense

from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq.output import finish
from tinychat_mlx.weights.checkpoint import Checkpoint

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder `hold` with a dense model, `dense`, and another file next to it."""
    tiny_dense.save(tmp_path / "hold" / "dense")
    (tmp_path / "hold" / "precious").write_text("mine")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rtn(source: Path, target: Path, *more: str) -> int:
    return main(["convert", str(source), "-o", str(target), "--method", "rtn", "--group-size", "32", *more])


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("target", ["hold/dense", "hold", "hold/dense/int4", "hold/../hold/dense", "same"])
def test_the_source_is_never_replaced(
    home: Path, target: str, force: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by its name, nor by a folder around it or in it, nor by another path to it."""
    (home / "same").symlink_to(home / "hold")
    before = files(home / "hold")
    assert rtn(home / "hold" / "dense", home / target, *force) == 2
    error = capsys.readouterr().err
    assert "choose another place" in error or "this is a link" in error
    assert error.count("\n") == 1 and files(home / "hold") == before


def test_a_format_changes_beside_its_source_only(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rtn(home / "hold" / "dense", home / "int4") == 0
    before = files(home / "int4")
    capsys.readouterr()
    assert main(["convert", str(home / "int4"), "-o", str(home / "int4"), "--format", "awq", "--force"]) == 2
    assert "choose another place" in capsys.readouterr().err and files(home / "int4") == before


def test_force_replaces_models_and_empty_folders_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = home / "hold" / "dense", home / "target"
    target.mkdir()
    assert rtn(source, target) == 2 and "--force" in capsys.readouterr().err
    assert rtn(source, target, "--force") == 0
    assert rtn(source, target, "--force", "--w-bit", "8") == 0  # now it is a model
    assert Checkpoint.open(target).quantization.w_bit == 8
    for name, text in (("precious", "mine"), ("config.json", "{}")):
        shutil.rmtree(target)
        target.mkdir()
        (target / name).write_text(text)
        capsys.readouterr()
        assert rtn(source, target, "--force") == 2
        assert "not a model folder" in capsys.readouterr().err and (target / name).read_text() == text
    shutil.rmtree(target)
    target.write_text("a file")
    assert rtn(source, target, "--force") == 2 and target.read_text() == "a file"
    assert not list(home.glob(".*"))


@pytest.mark.parametrize("leads_to", ["nowhere", "other"])
def test_a_link_is_refused_before_any_work(
    home: Path, leads_to: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "other").mkdir()
    (home / "target").symlink_to(home / leads_to)
    monkeypatch.setattr("tinychat_mlx.awq.convert.open_dense", None)  # would be the first work
    assert rtn(home / "hold" / "dense", home / "target", "--force") == 2
    assert "this is a link" in capsys.readouterr().err and (home / "target").is_symlink()


@pytest.mark.parametrize("place", ["", "target"])
def test_a_read_only_place_is_refused_before_any_work(
    home: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests may run as root, which may write everywhere, so the system's answer is simulated."""
    rtn(home / "hold" / "dense", home / "target")
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK or Path(path) != home / place)
    monkeypatch.setattr("tinychat_mlx.awq.convert.open_dense", None)
    capsys.readouterr()
    assert rtn(home / "hold" / "dense", home / "target", "--force") == 2
    assert f"{home / place}: this folder is read-only" in capsys.readouterr().err


def test_a_place_where_nothing_can_be_made_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert rtn(home / "hold" / "dense", home / "new") == 1
    error = capsys.readouterr().err
    assert "cannot be made: Permission denied" in error and error.count("\n") == 1


def test_missing_folders_above_the_target_are_made_when_nothing_refuses(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = home / "hold" / "dense", home / "new" / "folder" / "int4"
    assert main(["convert", str(source), "-o", str(target), "--method", "rtn", "--group-size", "128"]) == 1
    assert not (home / "new").exists()
    assert rtn(source, target, "--report", str(home / "reports" / "of" / "it")) == 0
    assert Checkpoint.open(target).quantization.w_bit == 4
    assert (home / "reports" / "of" / "it" / "report.md").exists()
    capsys.readouterr()
    assert rtn(source, source / "new" / "int4") == 2 and "choose another place" in capsys.readouterr().err
    (home / "file").write_text("mine")
    assert rtn(source, home / "file" / "new" / "int4") == 2
    assert f"{home / 'file'}: this is a file, not a folder" in capsys.readouterr().err


def test_a_disk_of_its_own_is_not_replaced(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "disk")
    assert rtn(home / "hold" / "dense", home / "disk", "--force") == 2
    assert "the mount point of a disk" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_anything_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enough space for the layers, but not for the merged model. What an interrupted run wrote counts."""
    source, target = home / "hold" / "dense", home / "target"
    assert rtn(source, target) == 0
    needed = 2 * Checkpoint.open(target).nbytes
    shutil.rmtree(target)
    free = int(0.98 * needed)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**9, 0, free))
    capsys.readouterr()
    assert rtn(source, target) == 1
    assert "on the disk of" in capsys.readouterr().err and not list(home.glob(".*"))
    free = int(1.02 * needed)
    assert rtn(source, target) == 0
    free = 1000
    assert main(["convert", str(target), "-o", str(home / "gemm"), "--format", "awq"]) == 1
    assert "on the disk of" in capsys.readouterr().err and not list(home.glob(".*"))


def test_an_older_model_is_back_where_the_new_one_cannot_take_its_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = home / "hold" / "dense", home / "target"
    assert rtn(source, target) == 0
    before, real = files(target), os.rename

    def rename(a: Path, b: Path) -> None:
        if Path(a).name == "out":
            raise OSError(16, "Device or resource busy")
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(finish.os, "rename", rename)
        assert rtn(source, target, "--force", "--w-bit", "8") == 1
    assert "busy" in capsys.readouterr().err and files(target) == before
    # The leftover marker announces the rename. If the process is killed there, the old model is not taken for
    # the new one.
    with monkeypatch.context() as patch:
        patch.setattr("tinychat_mlx.awq.convert.write_folder", None)  # the next run gets no further than this
        assert rtn(source, target, "--force", "--resume", "--w-bit", "8") == 1
    assert files(target) == before
    assert rtn(source, target, "--force", "--resume", "--w-bit", "8") == 0
    assert Checkpoint.open(target).quantization.w_bit == 8
