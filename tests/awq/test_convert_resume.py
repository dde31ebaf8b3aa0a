"""A conversion can be killed at any point and resumed, with the same bytes as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_dense
from checkout import ROOT

from tinychat_mlx import __version__
from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq import layer_stream
from tinychat_mlx.awq.output import finish

KILLED = """
import os, signal, sys
from pathlib import Path
from tinychat_mlx.apps.cli import main
name, after, renames = sys.argv[1], sys.argv[2] == "after", []
def watched(rename):
    def wrapped(a, b):
        if name and Path(b).match(name) and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)
        renames.append(Path(b).name)
        if name and Path(b).match(name):
            os.kill(os.getpid(), signal.SIGKILL)
    return wrapped
os.replace, os.rename = map(watched, (os.replace, os.rename))
if "reject" in os.environ:
    from tinychat_mlx.awq import convert
    class Failed(convert.Verdict):
        passed = property(lambda self: first is not self)
    judge, first = convert.verdict, None
    def verdict(*args):
        global first
        found = judge(*args)
        made = Failed(found.made, found.rounded)
        first = first or made
        return made
    convert.verdict = verdict
code = main(sys.argv[3:])
print(*renames, sep="\\n")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, `dense`, with a separate head, large enough for multi-threaded products."""
    home = tmp_path_factory.mktemp("resume")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    config = tiny_dense.CONFIG | sizes | {"tie_word_embeddings": False}
    tiny_dense.save(home / "dense", tiny_dense.tensors(config), **sizes, tie_word_embeddings=False)
    return home


def arguments(home: Path, target: Path, *more: str) -> list[str]:
    """Generated text, error feedback, and a head that is quantised like a layer."""
    common = ["--calib-tokens", "512", "--head", "int4", "--group-size", "32", "--backend", "cpu"]
    return ["convert", str(home / "dense"), "-o", str(target), *common, *more]


def run(
    home: Path, target: Path, *more: str, kill: str = "", when: str = "before", reject: bool = False
) -> tuple[int, list[str]]:
    """Run convert in a process that kills itself at the rename to the name `kill`, or the end of a path.

    reject: the method asked for fails the check at the end. The process uses as many threads as there are cores.
    Returns (exit code, renames).
    """
    env = {"reject": "1"} if reject else {}
    env |= {k: v for k, v in os.environ.items() if not k.endswith("_THREADS")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, kill, when, *arguments(home, target, *more)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    names = [
        line for line in done.stdout.splitlines() if " " not in line
    ]  # renames, without convert's messages
    return done.returncode, names


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, bytes]:
    """The files of two equal uninterrupted conversions. Every file appeared by a rename, in this order."""
    made = [run(home, home / f"whole-{i}") for i in range(2)]
    layers = [[f"rows-{i + 1:04}.npy", f"layer-{i:04}.json", f"layer-{i:04}.safetensors"] for i in range(2)]
    layers[1].insert(0, "judged.npy")  # the rows that check the result
    head = ["layer-0002.json", "layer-0002.safetensors"]
    side = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    order = ["plan.json", "calibration.npy", *layers[0], *layers[1], *head, "rim.safetensors"]
    order += ["model.safetensors", "config.json", *side, "README.md"]
    assert made == [(0, [*order, f"whole-{i}"]) for i in range(2)]
    assert files(home / "whole-0") == files(home / "whole-1")
    return files(home / "whole-0")


@pytest.mark.parametrize(
    ("kill", "when"),
    [
        ("calibration.npy", "before"),  # while text is generated
        ("rows-0001.npy", "after"),  # a layer has rows but no codes
        ("layer-0001.safetensors", "before"),
        ("layer-0002.safetensors", "before"),  # in the head
        ("rim.safetensors", "before"),
        ("model.safetensors", "before"),  # in the final write
        ("target", "before"),
        ("target", "after"),  # everything is done except the clean-up
    ],
)
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bytes(
    home: Path, whole: dict[str, bytes], kill: str, when: str
) -> None:
    folder = home / f"killed-{kill}-{when}"
    folder.mkdir()
    target, work = folder / "target", folder / ".target.converting"
    assert run(home, target, kill=kill, when=when)[0] == -signal.SIGKILL
    done = (kill, when) == ("target", "after")
    assert target.exists() == done and work.exists()
    assert main(arguments(home, target)) == 2  # not by accident: the message names --resume and --force
    assert run(home, target, "--resume")[0] == 0
    assert files(target) == whole and not work.exists()


@pytest.mark.parametrize("kill", ["awq/rows-0001.npy", "awq/rim.safetensors"])
def test_killed_in_the_method_that_replaced_another(home: Path, whole: dict[str, bytes], kill: str) -> None:
    """The rejected method's layers are kept, checked and rejected again."""
    replaced, folder = home / "replaced-method", home / f"in-{Path(kill).stem}"
    if not replaced.exists():
        assert run(home, replaced, reject=True)[0] == 0
        assert "awq+ lost more than plain rounding" in (replaced / "README.md").read_text()
        assert files(replaced)["model.safetensors"] != whole["model.safetensors"]
    assert run(home, folder, kill=kill, reject=True)[0] == -signal.SIGKILL
    assert run(home, folder, "--resume", reject=True)[0] == 0
    assert files(folder) == files(replaced)


@pytest.mark.parametrize("kill", ["old", "target"])
def test_killed_while_an_older_model_is_replaced(home: Path, whole: dict[str, bytes], kill: str) -> None:
    """Between the two renames, when neither folder has the name, and after them."""
    folder = home / f"replaced-{kill}"
    folder.mkdir()
    target, work = folder / "target", folder / ".target.converting"
    assert main(arguments(home, target, "--method", "rtn")) == 0
    old = files(target)
    assert run(home, target, "--force", kill=kill, when="after")[0] == -signal.SIGKILL
    assert files(work / "old") == old and target.exists() == (kill == "target")
    assert run(home, target, "--force", "--resume")[0] == 0
    assert files(target) == whole and not work.exists()


def test_tidying_that_is_interrupted_can_be_resumed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The marker that everything is done is deleted last."""
    target, real = home / "untidy", Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "layer-0000.safetensors":
            raise KeyboardInterrupt
        real(path, missing_ok)

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", unlink)
        assert main(arguments(home, target, "--method", "rtn")) == 130
    assert target.exists() and (home / ".untidy.converting").exists()
    assert f"{target} is finished; repeat the command" in capsys.readouterr().err
    assert main(arguments(home, target, "--method", "rtn", "--resume")) == 0
    assert not (home / ".untidy.converting").exists()


def test_what_is_finished_is_not_taken_for_another_conversion(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = home / "finished"
    assert run(home, target, kill=target.name, when="after")[0] == -signal.SIGKILL
    assert main(arguments(home, target, "--resume", "--force", "--w-bit", "3")) == 2
    assert "other settings" in capsys.readouterr().err
    assert main(arguments(home, target, "--resume")) == 0


def test_resuming_otherwise_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = home / "changed"
    assert run(home, target, kill="layer-0000.json")[0] == -signal.SIGKILL
    for more in (("--w-bit", "3"), ("--backend", "reference"), ("--seed", "1")):
        assert main(arguments(home, target, "--resume", *more)) == 2
        assert "other settings, another model, backend or version" in capsys.readouterr().err
    with monkeypatch.context() as m:
        m.setattr("tinychat_mlx.awq.convert.__version__", "99")
        assert main(arguments(home, target, "--resume")) == 2
    plan = json.loads((home / ".changed.converting" / "plan.json").read_text())
    assert plan["version"] == __version__ and plan["backend"] == "cpu"
    assert main(arguments(home, target, "--force", "--method", "rtn")) == 0


@pytest.mark.parametrize("first", [True, False], ids=["left out", "added"])
def test_a_report_may_be_left_out_or_added_when_resuming(
    home: Path, whole: dict[str, bytes], first: bool
) -> None:
    """Killed after layer 0: its measurements are read again, and the codes are the same."""
    folder = home / f"late-{first}"
    report = ("--report", str(folder), "--report-text", str(tiny_dense.text(home, 900, seed=8)))
    target = home / f"reported-{first}"
    killed = run(home, target, *report[: 4 * first], kill="layer-0000.safetensors", when="after")
    assert killed[0] == -signal.SIGKILL
    assert run(home, target, "--resume", *report[4 * first :])[0] == 0
    assert files(target) == whole
    if not first:
        text = (folder / "report.md").read_text()
        cells = [row.count("|") for row in text.partition("## Layer by layer")[2].splitlines() if "| " in row]
        assert len(cells) > 9 and len(set(cells)) == 1
        assert (folder / "layers.svg").read_text().count("<title>") == 4  # 2 layers, 2 methods


def test_a_full_disk_leaves_nothing_at_the_target(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(finish, "write_sharded", full)
        assert main(arguments(home, home / "full")) == 1
    assert not (home / "full").exists()
    assert main(arguments(home, home / "full", "--resume")) == 0


@pytest.mark.parametrize("before", [False, True])
def test_an_interrupt_leaves_what_was_at_the_target(
    home: Path, before: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    target = home / f"stopped-{before}"
    if before:
        assert main(arguments(home, target, "--method", "rtn")) == 0
    old = files(target)
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(layer_stream.Conversion, "_rim", stop)
        assert main(arguments(home, target, *(["--force"] if before else []))) == 130
    said = capsys.readouterr().err
    assert ("is unchanged" if before else "is missing") in said and "--resume" in said
    assert target.exists() == before and files(target) == old
