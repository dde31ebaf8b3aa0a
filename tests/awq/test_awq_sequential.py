"""The split of calibration rows into fit, held-out and judged rows, and the bounded correction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_dense

from tinychat_mlx.awq import layer
from tinychat_mlx.awq.calibration.moments import FullMoments
from tinychat_mlx.awq.calibration.recorder import steps
from tinychat_mlx.awq.calibration.rows import HalfRows, Split, Streams, distance
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.layer import TURN, Factored, Form, Held, Judge, corrected
from tinychat_mlx.awq.search.feedback import DAMPING
from tinychat_mlx.awq.search.quantizer import storable
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.weights.checkpoint import Checkpoint

FORM = Form(4, 32)
K, N = 64, 24  # inputs and outputs of a site


def test_a_split_covers_all_rows_in_whole_windows_and_the_judged_are_never_seen() -> None:
    sizes = [*range(128, 400), *np.random.default_rng(0).integers(400, 40000, 60).tolist()]
    for tokens in sizes:
        for window in (1, 2, 7, 31, 64, 127, 500, 512, 4096):
            split = Split.of(tokens, window)
            assert split.fit + split.held + split.judged == split.tokens == tokens
            assert 1 <= split.window <= window and split.fit >= 2 * split.window
            assert split.fit % split.window == split.held % split.window == 0
            assert 1 <= split.held <= split.judged < split.fit + split.window
            fit, held = [], []
            for rows in steps(tokens, split.window):
                parts = (np.arange(rows.start, rows.stop)[part] for part in split.of_step(rows))
                for rest, part in zip((fit, held), parts, strict=True):
                    rest.extend(part.tolist())
            assert fit == list(range(split.fit)) and held == list(range(split.fit, split.seen))


@pytest.mark.parametrize("all_made", [True, False])
def test_streams_are_packed_and_unpacked_unchanged(all_made: bool) -> None:
    split, rng = Split.of(300, 64), np.random.default_rng(0)
    x = Streams.begin(rng.normal(size=(300, 8)).astype(np.float32), split, all_made)
    x.made += 1
    x.rounded += 2
    same = Streams.unpack(x.pack(), split)
    for name in ("wanted", "made", "rounded"):
        assert np.array_equal(getattr(same, name), getattr(x, name))
    wanted, made, rounded = same.judged(split)
    assert len(wanted) == split.judged and np.allclose(made - wanted, 1) and np.allclose(rounded - wanted, 2)


def test_rows_in_sixteen_bits_keep_their_channels_beside_one_a_million_times_larger() -> None:
    r = np.random.default_rng(0)
    x = r.normal(size=(20, 64)).astype(np.float32)
    x[::3, 5] = 1e6
    x[4] = 0
    kept = HalfRows.empty(24, 64)
    kept.put(4, x)
    back = kept.take(slice(4, 24), np.ones(64, np.float32))
    # float16 has 11 bits; below 2 ** -14 of its scale, steps are 2 ** -24 of it. Each row has a scale of 2 ** 15.
    step = 2.0**-24 * 2.0 ** np.frexp(np.abs(x).max(1, keepdims=True))[1] / 2**15
    assert (np.abs(back - x) <= np.maximum(2.0**-11 * np.abs(x), step / 2)).all()
    assert not kept.take(slice(0, 4), np.ones(64, np.float32)).any()


def test_a_distance_counts_each_row_the_same() -> None:
    """A row a thousand times larger than the others, such as the first of a text, does not hide their error."""
    wanted = np.ones((10, 4), np.float32)
    wanted[0] *= 1000
    x = wanted.copy()
    x[1:] *= 1.5
    assert distance(wanted, x) == pytest.approx(0.45)


# The correction ----------------------------------------------------------------------------------------------


Rows = tuple[np.ndarray, np.ndarray]  # given (T, K), wanted (T, K)


def rows(tokens: int, seed: int, bend: np.ndarray, noise: float) -> Rows:
    """Return a site's rows, and the float model's: the same rows times a matrix, plus noise."""
    r = np.random.default_rng(seed)
    given = r.normal(size=(tokens, K)).astype(np.float32)
    wanted = given @ bend + noise * r.normal(size=(tokens, K))
    return given, wanted.astype(np.float32)


def bent(size: float) -> np.ndarray:
    return np.eye(K) + size * np.random.default_rng(7).normal(size=(K, K)) / np.sqrt(K)


W = np.random.default_rng(3).normal(0, 0.1, (N, K)).astype(np.float32)


def correction(fit: Rows, held: Rows) -> tuple[np.ndarray, float]:
    moments = FullMoments.empty(K, W)
    moments.add(*fit)
    return corrected(W, moments, Factored.of(moments, FORM), Judge(W, Held(*held)))


def test_the_correction_is_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its bound, and applied completely, because the rows have no noise."""
    monkeypatch.setattr(layer, "TURN", 1e9)
    for noise in (0.0, 0.3):
        fit, held = rows(4096, 1, bent(0.3), noise), rows(1024, 2, bent(0.3), noise)
        change, share = correction(fit, held)
        given, wanted = (a.astype(np.float64) for a in fit)
        h = given.T @ given
        damped = h + DAMPING * np.diagonal(h).mean() * np.eye(K)
        best = np.linalg.solve(damped, given.T @ (wanted - given) @ W.T).T
        # Float32 sums of 4096 products: √4096 · 6e-8 of the largest, through a factor with condition 4.
        assert np.abs(change - share * best).max() < 5e-5 * np.abs(best).max()
        # Without noise the damping is missing; with noise, the part that was fitted to it is too much.
        assert share == pytest.approx(1, abs=0.03)


def test_nothing_is_corrected_by_noise() -> None:
    """A correction fitted to noise exceeds one standard error on other rows by chance in 1 of 40 draws.

    With p = 0.023, eight or more of 100 have a probability of 0.2 %.
    """
    taken = [
        correction(rows(96, i, np.eye(K), 0.3), rows(64, 1000 + i, np.eye(K), 0.3))[1] for i in range(100)
    ]
    assert sum(share > 0 for share in taken) < 8


def test_held_out_rows_decide() -> None:
    """A correction is applied to the extent that it also fits the other rows."""
    fit, away = rows(512, 1, bent(0.2), 0.1), 2 * np.eye(K) - bent(0.2)
    change, share = correction(fit, rows(256, 2, bent(0.2), 0.1))
    assert share > 0.5 and np.abs(change).max() > 0
    assert correction(fit, rows(256, 2, away, 0.1))[1] == 0
    between = correction(fit, rows(256, 2, (np.eye(K) + bent(0.2)) / 2, 0.1))[1]  # half of it is right
    assert between == pytest.approx(0.5 * share, rel=0.2)


def test_no_row_is_turned_beyond_the_bound() -> None:
    fit, held = rows(2048, 1, bent(3.0), 0.0), rows(512, 2, bent(3.0), 0.0)
    change, share = correction(fit, held)
    turned = np.linalg.norm(change, axis=1) / np.linalg.norm(W, axis=1)
    assert share == 1 and np.allclose(turned, TURN, rtol=1e-5)  # this change is longer for every row


# A whole layer -----------------------------------------------------------------------------------------------


def on_grid(shape: tuple[int, ...], r: np.random.Generator) -> np.ndarray:
    """Return weights that are exact in 4-bit codes, groups of 32: each group has the first and last code."""
    n, k = shape
    q = r.integers(0, 16, (n, k // 32, 32))
    q[..., 0], q[..., 1] = 0, 15
    scales = storable(np.exp(r.normal(-3.5, 0.3, (n, k // 32, 1))).astype(np.float32), 4)
    values = (q - r.integers(4, 12, scales.shape)) * scales
    return values.reshape(shape).astype(np.float16)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with matrices on the grid and norms without large channels, so that no scale improves it."""
    weights, r = tiny_dense.tensors(tiny_dense.CONFIG), np.random.default_rng(5)
    for name, a in weights.items():
        if "proj" in name:
            weights[name] = on_grid(a.shape, r)
        elif "norm" in name:
            weights[name] = np.ones_like(a)
    return tiny_dense.save(tmp_path_factory.mktemp("exact") / "dense", weights)


def ids(count: int = 1024, seed: int = 0) -> Callable[..., np.ndarray]:
    return lambda *_: np.random.default_rng(seed).integers(0, 80, count).astype(np.int32)


def test_weights_that_codes_hold_exactly_are_kept_and_nothing_drifts(exact: Path, tmp_path: Path) -> None:
    settings = Settings(group_size=32, head="fp16")
    result = convert(Checkpoint.open(exact), tmp_path / "out", settings, ReferenceBackend, ids())
    for one in result.layers:
        # Float32 sums of 128 products in another order, layer after layer.
        assert max(one.off, one.rounded) < 1e-5, one
        # The wanted rows are kept in float16: 2 ** -11 of a value at most, squared, in the mean a third of it.
        assert all(site.error < 2.0**-22 for site in one.sites), one.sites
    before, after = Checkpoint.open(exact), Checkpoint.open(tmp_path / "out")
    for name in sorted(after.modules):
        assert np.allclose(after.weight(name).to_float32(), before.weight(name).to_float32(), atol=1e-6), name
