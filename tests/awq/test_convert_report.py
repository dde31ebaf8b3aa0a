"""`convert --report` shows measured values, checks its needs first, and does not change the model."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_dense
from tiny_models import tiny

from tests.awq.test_convert import arguments, converted, files, kl, logits
from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.quality.report import write_report
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import Backend
from tinychat_mlx.weights.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, `dense`, and calibration text."""
    home = tmp_path_factory.mktemp("report")
    tiny_dense.save(home / "dense")
    tiny_dense.text(home)
    return home


def test_the_report_shows_every_method_beside_the_others(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calib = home / "report", tiny_dense.text(home, 5000, seed=7)
    more = ("--report", str(folder), "--calib", str(calib), "--calib-tokens", "600")
    assert main(arguments(home, home / "reported", *more)) == 0
    assert f"wrote {folder / 'report.md'}\n" in capsys.readouterr().err
    found = json.loads((folder / "report.json").read_text())
    assert len(found["layers"]) == 3
    text = (folder / "report.md").read_text()
    for i, layer in enumerate(found["layers"]):
        assert 0 < layer["off"] < layer["rounded"]
        assert [site["key"] for site in layer["sites"]] == ["attn_in", "o_in", "mlp_in", "down_in"]
        for site in layer["sites"]:
            assert 0 < site["error"] < site["rtn"]
            assert f"| {i} | {site['key']} | {site['rtn']:.2e} | {site['error']:.2e} |" in text
    assert (folder / "layers.svg").read_text().count("<title>") == 6  # 3 layers, 2 methods
    assert 0 < found["check"]["made"]["kl_mean"] < found["check"]["rtn"]["kl_mean"] and not found["rejected"]
    assert f"- check: KL {found['check']['made']['kl_mean']:.4f}" in text
    for part, size in found["sizes"].items():
        assert sum(size.values()) == found[f"{part}_bytes"] and size["embedding and head"] > 0
    assert found["quality"]["text"] == "the part of text-7.jsonl that the calibration did not use"
    assert found["quality"]["text"] in text
    assert "KL is the deciding measure" in text and "differ by less than their standard errors" in text
    quality = found["quality"]["of"]
    assert list(quality) == ["rtn", "awq", "awq+"] and quality["rtn"]["tokens"] > 2048
    assert 0 < quality["awq+"]["kl_mean"] < quality["awq"]["kl_mean"] < quality["rtn"]["kl_mean"]
    assert not list(home.glob(".reported*"))  # temporary conversions are deleted
    for name in ("sizes", "quality", "layers"):
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")


def test_every_backend_estimates_converts_and_reports(
    home: Path, backend_name: str, backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    target, folder, text = (
        home / f"on-{backend_name}",
        home / f"r-{backend_name}",
        tiny_dense.text(home, 900, 8),
    )
    more = ("--w-bit", "4", "--backend", backend_name, "--threads", "1")
    assert main([*arguments(home, target, *more), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    assert main(arguments(home, target, *more, "--report", str(folder), "--report-text", str(text))) == 0
    of = json.loads((folder / "report.json").read_text())["quality"]["of"]
    assert of["awq+"]["kl_mean"] < of["rtn"]["kl_mean"]
    # A different rounding of activations changes a few codes; plain rounding loses three times as much.
    dense = logits(home / "dense")
    assert kl(target, dense) < 1.1 * kl(converted(home, "b-4", "--w-bit", "4"), dense)


@pytest.mark.parametrize("form", ["mlx", "awq"])
def test_the_reports_figures_are_those_of_eval(
    home: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder, target = tiny_dense.text(home, 900, seed=8), home / f"report-{form}", home / f"made-{form}"
    more = ("--report", str(folder), "--report-text", str(text), "--format", form, "--method", "rtn")
    assert main(arguments(home, target, *more)) == 0
    quality = json.loads((folder / "report.json").read_text())["quality"]
    assert quality["text"] == "text-8.jsonl" and set(quality["of"]) == {"rtn"}
    capsys.readouterr()
    args = ["eval", "-m", str(target), "--against", str(home / "dense"), "--text", str(text), "--json"]
    assert main([*args, "--backend", "reference"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["kl_mean"] > 1e-5
    for key, value in quality["of"]["rtn"].items():
        # Rows of several windows or of one, float32 sums of 128 terms in another order: 1e-5 of a logit.
        assert value == pytest.approx(measured[key], rel=2e-3), key


def test_without_text_left_over_the_report_says_that_the_model_wrote_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinychat_mlx.awq.calibration import tokens

    monkeypatch.setattr(tokens, "default_tokens", lambda _: 640)
    folder = home / "report-self"
    assert main(arguments(home, home / "reported-self", "--method", "rtn", "--report", str(folder))) == 0
    quality = json.loads((folder / "report.json").read_text())["quality"]
    assert quality["text"].startswith("text the model wrote itself, because the calibration left only")
    assert quality["of"]["rtn"]["tokens"] == 315  # 5 windows of 64, the first token of each not predicted


def test_a_report_does_not_change_the_model(home: Path) -> None:
    whole = converted(home, "b-4", "--w-bit", "4")
    more = ("--report", str(home / "rb"), "--report-text", str(home / "text-0.jsonl"))
    assert files(converted(home, "reported-b", "--w-bit", "4", *more)) == files(whole)


def test_the_published_method_is_measured_as_it_would_be_converted(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In addition to awq+, with the same calibration tokens, from any source."""
    text, folder = tiny_dense.text(home, 900, seed=8), home / "report-beside"
    own = ("--calib", "self", "--calib-tokens", "256")
    more = ("--report", str(folder), "--report-text", str(text), *own)
    assert main(arguments(home, home / "beside", *more)) == 0
    quality = json.loads((folder / "report.json").read_text())["quality"]["of"]
    assert main(arguments(home, home / "published", "--method", "awq", *own)) == 0
    capsys.readouterr()
    args = ["eval", "-m", str(home / "published"), "--against", str(home / "dense"), "--text", str(text)]
    assert main([*args, "--backend", "reference", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    for key, value in quality["awq"].items():
        # Rows of several windows or of one, float32 sums of 128 terms in another order: 1e-5 of a logit.
        assert value == pytest.approx(measured[key], rel=2e-3), key


@pytest.mark.parametrize(
    ("report", "text", "says"),
    [
        ("a-file", None, "a-file is a file, not a folder"),
        ("a-file/in-it", None, "a-file is a file, not a folder"),
        ("new", "w1", "1 tokens, at least two are needed"),
        ("new", "", "0 tokens, at least two are needed"),
        ("new", "\x93", "not UTF-8 text"),
    ],
)
def test_what_a_report_needs_is_asked_for_before_any_work(
    report: str, text: str | None, says: str, home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (home / "a-file").write_text("mine")
    more = ["--report", str(home / report)]
    if text is not None:
        (home / "held.txt").write_bytes(text.encode("latin-1"))
        more += ["--report-text", str(home / "held.txt")]
    monkeypatch.setattr("tinychat_mlx.awq.convert.check_target", None)  # would be the first work
    assert main(arguments(home, home / "never", *more)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (home / "new").exists()


def test_a_mixtures_notes_are_in_the_report(tiny_root: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny("mixtral", tiny_root).folder)
    settings, ids = Settings(method="awq", group_size=32), np.full(40, 5, np.int32)
    result = convert(source, tmp_path / "out", settings, ReferenceBackend, lambda *_: ids)
    write_report(tmp_path / "report", source, result, 1.0, None)
    notes = [(i, s.key, s.note) for i, layer in enumerate(result.layers) for s in layer.sites if s.note]
    assert notes
    text = (tmp_path / "report" / "report.md").read_text()
    for layer, key, note in notes:
        (line,) = [x for x in text.splitlines() if x.startswith(f"| {layer} | {key}")]
        assert note in line


def test_the_head_is_called_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head is quantised after the last layer, but reported as "head".

    A kept rounding is also reported as the head's.
    """
    weights = tiny_dense.tensors(tiny_dense.CONFIG | {"tie_word_embeddings": False})
    weights["lm_head.weight"][:] = 0
    source = tiny_dense.save(tmp_path / "dense", weights, tie_word_embeddings=False)
    text, folder = tiny_dense.text(tmp_path), tmp_path / "report"
    args = ["convert", str(source), "-o", str(tmp_path / "out"), "--head", "int4", "--group-size", "32"]
    more = ["--calib", str(text), "--report", str(folder), "--report-text", str(text)]
    assert main([*args, *more, "--backend", "reference"]) == 0
    said = capsys.readouterr().err
    assert "used, because nothing was better: head\n" in said and "layer 4" not in said
    report = (folder / "report.md").read_text()
    assert "| head | head (plain rounding kept" in report and "| 3 |" not in report
    layers = json.loads((folder / "report.json").read_text())["layers"]
    assert [site["key"] for site in layers[3]["sites"]] == ["head"]
