"""The programs behind the quality tables in docs/quantising.md print measured values, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_dense

from tinychat_mlx.apps.cli import main as tinychat
from tinychat_mlx.awq.quality import table, versus


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("table")
    tiny_dense.save(home / "dense")
    tiny_dense.text(home, 900, seed=1).rename(home / "calib.jsonl")
    tiny_dense.text(home, 900, seed=2).rename(home / "held.jsonl")
    return home


def arguments(home: Path) -> list[str]:
    return [str(home / "dense"), "--text", str(home / "held.jsonl"), "--calib", str(home / "calib.jsonl"),
            "--group-size", "32", "--backend", "reference"]  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_what_eval_measures(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--bits", "3", "--seeds", "2", "--calib-tokens", "512", "--json"]
    assert table.main([*arguments(home), *more]) == 0
    out = capsys.readouterr()
    lines, found = out.out.splitlines(), json.loads(out.out.splitlines()[-1])
    whole = lines.index("") + 1
    rows = {(c[1], c[2]): c for c in map(cells, lines[whole + 3 : whole + 8])}
    calibs = [(m, c) for m in ("awq", "awq+") for c in ("calib.jsonl", "self")]
    assert list(rows) == [("rtn", "none"), *calibs]
    assert "[9/9]" in out.err and "min left" in out.err
    share, error = map(float, rows["awq+", "calib.jsonl"][5].split(" ± "))
    assert share < 0.9 and 0 < error < 0.1 and rows["rtn", "none"][5] == "1.000"
    assert [len(r["seeds"]) for r in found] == [1, 2, 2, 2, 2]
    seeds = found[3]["seeds"]
    assert seeds[0]["kl_mean"] != seeds[1]["kl_mean"] and all(s["forwards"] > 0 for s in seeds)
    assert rows["awq+", "calib.jsonl"][4] == f"{(seeds[0]['kl_mean'] + seeds[1]['kl_mean']) / 2:.5f}"

    short = [cells(line) for line in lines[:4]]
    assert short[0] == ["bits", "rtn", "awq, real text", "awq, self", "awq+, real text", "awq+, self"]
    assert short[2][:2] == ["3", f"{float(rows['rtn', 'none'][4]):#.3g}"] and short[3][0] == "forward passes"
    kl, ratio = short[2][4].split(" (")
    assert float(kl) == pytest.approx(float(rows["awq+", "calib.jsonl"][4]), rel=5e-3)  # three digits
    assert ratio == f"{share:.2f} ± {error:.2f} ×)" and short[3][4] == rows["awq+", "calib.jsonl"][9]

    small = home / "small"
    args = ["--method", "awq+", "--w-bit", "3", "--group-size", "32", "--calib", str(home / "calib.jsonl")]
    args += ["--calib-tokens", "512", "--seed", "1", "--backend", "reference"]
    assert tinychat(["convert", str(home / "dense"), "-o", str(small), *args]) == 0
    args = ["-m", str(small), "--against", str(home / "dense"), "--text", str(home / "held.jsonl")]
    assert tinychat(["eval", *args, "--backend", "reference", "--exact", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Float32 sums in pieces of other sizes: 1e-5 of a logit, of a KL near 0.1.
    assert seeds[1]["kl_mean"] == pytest.approx(measured["kl_mean"], rel=1e-3)


def test_side_by_side_with_mlx_lm(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlx_lm.quant.awq")
    more = ["--tokens", "140", "--w-bit", "3"]
    assert versus.main([*arguments(home), *more]) == 0
    out = capsys.readouterr().out
    rows = {c[0]: c for c in map(cells, out.splitlines()[2:6])}
    assert list(rows) == ["mlx_lm.awq", "rtn", "awq", "awq+"]
    share = {name: float(row[5]) for name, row in rows.items()}
    assert share["mlx_lm.awq"] == 1 and 0 < share["awq+"] < share["rtn"]
    assert "128 calibration tokens" in out  # whole windows of 64


def test_without_mlx_lm_one_line_says_what_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm.quant.awq", None)
    assert versus.main([*arguments(home), "--tokens", "140"]) == 1
    error = capsys.readouterr().err
    assert "pip install mlx-lm" in error.splitlines()[-1] and "Traceback" not in error
