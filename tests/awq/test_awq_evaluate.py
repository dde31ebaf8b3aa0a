"""Perplexity, KL and agreement, compared with NumPy on whole windows and with values derived by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_dense

import tinychat_mlx
from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq.quality.evaluate import ROWS, Scores, clustered, evaluate, kl_ratio, percentile_error
from tinychat_mlx.base.errors import UsageError

V = 11
rng = np.random.default_rng(0)


def model(table: np.ndarray) -> Scores:
    """A bigram model: logits of the next token are a row of the table."""

    def of(ids: Sequence[int], _: int) -> Iterator[np.ndarray]:
        for at in range(0, len(ids), ROWS):
            yield table[np.asarray(ids[at : at + ROWS])]

    return of


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary() -> None:
    q = evaluate(list(rng.integers(0, V, 1000)), model(np.zeros((V, V), np.float32)), window=300)
    assert q.ppl == pytest.approx(V) and q.ppl_se == pytest.approx(0, abs=1e-9)
    assert q.tokens == 1000 - 4 and q.window == 300  # the first token of each window is not predicted
    assert set(q.as_dict()) == {"ppl", "ppl_se", "tokens", "window"}


def test_measures_are_those_of_the_definition() -> None:
    ids = rng.integers(0, V, 1500)
    p, q = (rng.normal(size=(V, V)).astype(np.float32) for _ in range(2))
    got = evaluate(list(ids), model(q), model(p), window=400)
    log = [
        np.log(np.exp(t.astype(np.float64)) / np.exp(t.astype(np.float64)).sum(-1, keepdims=True))
        for t in (p, q)
    ]
    at = [i for i in range(1499) if (i + 1) % 400]
    before, after = ids[at], ids[np.array(at) + 1]
    kl = (np.exp(log[0]) * (log[0] - log[1])).sum(-1)[before]
    for perplexity, logs in ((got.ppl, log[1]), (got.against_ppl, log[0])):
        assert perplexity == pytest.approx(np.exp(-logs[before, after].mean()))
    assert got.kl_mean == pytest.approx(kl.mean()) and got.kl_p99 == pytest.approx(np.percentile(kl, 99))
    assert got.top1 == pytest.approx((log[0].argmax(-1) == log[1].argmax(-1))[before].mean())


def test_a_model_against_itself_loses_nothing() -> None:
    table = rng.normal(size=(V, V)).astype(np.float32)
    q = evaluate(list(rng.integers(0, V, 500)), model(table), model(table), window=100)
    assert abs(q.kl_mean or 0) < 1e-12 and q.top1 == 1


def test_standard_errors_are_those_of_repeated_samples() -> None:
    """All tokens of a window are equal, so naive errors would be ten times too small."""
    r = np.random.default_rng(1)
    means, errors, percentiles, percentile_errors = [], [], [], []
    for _ in range(150):
        windows = [np.full(100, r.normal()) for _ in range(30)]
        mean, error = clustered(windows)
        means.append(mean)
        errors.append(error)
        percentiles.append(float(np.percentile(np.concatenate(windows), 75)))
        percentile_errors.append(percentile_error(windows, 75))
    # 150 draws estimate a standard deviation to 6 %; a bootstrapped percentile is less precise.
    assert np.std(means) == pytest.approx(float(np.mean(errors)), rel=0.2)
    assert np.std(percentiles) == pytest.approx(float(np.mean(percentile_errors)), rel=0.35)


def test_the_error_of_a_ratio_takes_windows_in_pairs() -> None:
    """Compared with the jackknife over windows, for two models with large errors in the same windows."""
    r, tables = np.random.default_rng(2), []
    sharp = np.where(np.arange(V) < 2, 4.0, 0.2)[:, None]  # after tokens 0 and 1 the loss can be large
    dense = r.normal(size=(V, V)) * sharp
    tables = [(dense + off * r.normal(size=(V, V)) * sharp).astype(np.float32) for off in (0.1, 0.3)]
    ids = np.where(
        r.random(4000) < np.repeat(r.random(40), 100), r.integers(0, 2, 4000), r.integers(2, V, 4000)
    )
    one, two = (evaluate(ids.tolist(), model(t), model(dense.astype(np.float32)), window=100) for t in tables)
    ratio, error = kl_ratio(one, two)
    assert ratio == pytest.approx((one.kl_mean or 0) / (two.kl_mean or 1))
    a, b = np.array(one.kl_sums), np.array(two.kl_sums)
    left_out = np.array([(a.sum() - x) / (b.sum() - y) for x, y in zip(a, b, strict=True)])
    jackknife = np.sqrt(39 / 40 * np.square(left_out - left_out.mean()).sum())
    assert error == pytest.approx(jackknife, rel=0.05)  # they agree to the order of 1 / windows
    unpaired = ratio * np.hypot(*(q.kl_mean_se / q.kl_mean for q in (one, two)))  # type: ignore[operator]
    assert error < 0.5 * unpaired


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UsageError, match="at least two"):
        evaluate([3], model(np.zeros((V, V), np.float32)))


def test_the_command_measures_what_the_library_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, text = tiny_dense.save(tmp_path / "dense"), tiny_dense.text(tmp_path, 200)
    small = tmp_path / "small"
    assert main(["convert", str(dense), "-o", str(small), "--method", "rtn", "--group-size", "32"]) == 0
    capsys.readouterr()
    args = ["eval", "-m", str(small), "--text", str(text), "--backend", "reference", "--window", "40"]
    assert main([*args, "--against", str(dense), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {"ppl", "kl_mean", "kl_p99", "top1"}
    assert set(found) >= keys | {f"{key}_se" for key in keys} and found["window"] == 40
    assert 0 < found["kl_mean"] < found["kl_p99"] and 0 < found["top1"] <= 1

    models = [tinychat_mlx.load(p, backend="reference") for p in (dense, small)]
    chats = [json.loads(line)["messages"] for line in text.read_text().splitlines()]
    ids = [i for chat in chats for i in models[0].tokenizer.encode_chat(chat)]
    kl = []
    for at in range(0, len(ids) - 1, 40):
        p, q = (m.logits(ids[at : at + 40])[:-1].astype(np.float64) for m in models)
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        kl.append((np.exp(p) * (p - q)).sum(-1))
    # The same logits in one piece and in several: values of size 10 in float32, 1e-5 of each.
    assert found["kl_mean"] == pytest.approx(np.concatenate(kl).mean(), rel=1e-3)
    assert main(args) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_single_window_has_no_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny_dense.save(tmp_path / "dense")
    (tmp_path / "short.txt").write_text("w1 w2 w3 w4 w5")
    args = ["eval", "-m", str(dense), "--against", str(dense), "--text", str(tmp_path / "short.txt")]
    assert main([*args, "--backend", "reference"]) == 0
    out = capsys.readouterr().out
    assert "±" not in out and "nan" not in out and "at least two windows" in out
    assert main([*args, "--backend", "reference", "--json"]) == 0
    assert not [key for key in json.loads(capsys.readouterr().out) if key.endswith("_se")]


def test_models_of_two_vocabularies_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, text = tiny_dense.save(tmp_path / "dense"), tiny_dense.text(tmp_path, 200)
    wider = tiny_dense.CONFIG | {"vocab_size": 128}
    other = tiny_dense.save(tmp_path / "wider", tiny_dense.tensors(wider), vocab_size=128)
    args = ["eval", "-m", str(dense), "--against", str(other), "--text", str(text), "--backend", "reference"]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "96 tokens" in error and "128" in error and "one vocabulary" in error and error.count("\n") == 1
