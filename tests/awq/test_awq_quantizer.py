"""The quantiser, the searches and the error feedback, compared with float64, exhaustive search and laws."""

from __future__ import annotations

import numpy as np
import pytest

from tinychat_mlx.awq.calibration.moments import BlockMoments, FullMoments
from tinychat_mlx.awq.search import feedback
from tinychat_mlx.awq.search.cholesky import BLOCK, solve, upper_factor
from tinychat_mlx.awq.search.quantizer import grid_of, round_to_nearest, round_values, storable
from tinychat_mlx.awq.search.scale_clip import SHRINKS, clip, scale_of, search_fed_scale, search_scale
from tinychat_mlx.base.errors import FormatError

rng = np.random.default_rng(0)


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (n, k)).astype(np.float32)


def inputs(tokens: int, k: int, seed: int = 1) -> np.ndarray:
    """Correlated channels of very different size, like activations."""
    r = np.random.default_rng(seed)
    mix = np.eye(k) + 0.3 * r.normal(size=(k, k)) / np.sqrt(k)
    return (r.normal(size=(tokens, k)) @ mix * np.exp(r.normal(size=k))).astype(np.float32)


def squared_error(w: np.ndarray, w_hat: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Return e H eᵀ per row (N,) for w, w_hat (K, N) with e = w - w_hat."""
    e = (w - w_hat).astype(np.float64)
    return np.einsum("kn,kn->n", e, h.astype(np.float64) @ e)


def by_definition(w: np.ndarray, w_bit: int, g: int) -> np.ndarray:
    """AWQ's rule in float64 and plain loops, with the stored scale."""
    out = np.empty(w.shape)
    for n in range(len(w)):
        for at in range(0, w.shape[1], g):
            group = w[n, at : at + g].astype(np.float64)
            scale = float(
                storable(np.float32([max(group.max() - group.min(), 1e-5) / (2**w_bit - 1)]), w_bit)[0]
            )
            zero = np.clip(-np.rint(group.min() / scale), 0, 2**w_bit - 1)
            q = np.clip(np.rint(group / scale) + zero, 0, 2**w_bit - 1)
            out[n, at : at + g] = (q - zero) * scale
    return out


@pytest.mark.parametrize("w_bit", [3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rounding_is_awqs_rule(w_bit: int, group_size: int) -> None:
    w = weights(12, 256)
    w[0] += 1  # a group with one sign: the zero point is clamped
    w[1, :128] = 0
    got = round_to_nearest(w, w_bit, group_size).to_float32()
    expected = by_definition(w, w_bit, group_size)
    step = round_to_nearest(w, w_bit, group_size).scales.max()
    wrong = np.abs(got - expected) > 1e-6
    # A weight on the border of two codes may go either way in float32. Such weights are rare, and differ by
    # one step.
    assert wrong.mean() < 1e-3 and np.abs(got - expected).max() <= step * 1.001
    assert np.array_equal(round_values(w, w_bit, group_size), got)


@pytest.mark.parametrize("w_bit", [3, 4])
def test_packed_in_float16_means_the_same_to_the_bit(w_bit: int) -> None:
    quantized = round_to_nearest(weights(16, 256) * np.float32(1e-3), w_bit, 64)
    packed = quantized.packed("w", None)
    assert packed.scales.dtype == packed.biases.dtype == np.float16
    # q·s + b and (q - z)·s agree exactly: scales have 7 significant bits, zeros 4, float16 has 11.
    assert np.array_equal(packed.to_float32(), quantized.to_float32())


def test_stored_scales_keep_seven_bits_and_move_little() -> None:
    s = np.exp(rng.uniform(-12, 8, 4096)).astype(np.float32)
    kept = storable(s, 4)
    normal = s > 2.0**-14  # smaller float16 numbers have fewer bits
    assert np.abs(kept / s - 1)[normal].max() <= 2.0**-7
    assert np.array_equal(kept, kept.astype(np.float16).astype(np.float32))
    mantissa, _ = np.frexp(kept[normal])
    assert np.array_equal(mantissa * 128, np.rint(mantissa * 128))


def test_moments_give_the_loss_of_the_tokens_themselves() -> None:
    x, delta = inputs(300, 128), weights(9, 128)
    blocks, full = BlockMoments.empty(128, 32), FullMoments.empty(128)
    for part in np.array_split(x, 7):
        blocks.add(part)
        full.add(part)
    x64 = x.astype(np.float64)
    for g in range(4):
        at = slice(32 * g, 32 * g + 32)
        partial = np.square(x64[:, at] @ delta[:, at].T).mean(0)
        assert np.allclose(blocks.loss(delta)[:, g], partial, rtol=1e-4)  # 300 terms of float32
    own = np.stack([full.sums[at, at] for at in (slice(32 * g, 32 * g + 32) for g in range(4))])
    h = full.take_sums(np.arange(128)) / full.tokens
    whole = np.square(x64 @ delta.T).mean(0)
    assert np.allclose(squared_error(delta.T, np.zeros_like(delta.T), h), whole, rtol=1e-4)
    assert np.allclose(own, blocks.blocks, rtol=1e-3, atol=1e-2)
    assert np.allclose(blocks.mean_abs, np.abs(x64).mean(0), rtol=1e-4)


def test_scale_search_finds_the_best_of_the_published_grid() -> None:
    x, w = inputs(500, 128), weights(24, 128)
    moments = BlockMoments.empty(128, 64)
    moments.add(x)
    s, alpha = search_scale(w, moments, None, 3, 64)

    def loss(a: float) -> float:
        s = scale_of(np.abs(x).mean(0), a)
        delta = (by_definition(w * s, 3, 64) / s - w).astype(np.float64)
        halves = [np.square(x[:, at] @ delta[:, at].T).sum() for at in (slice(64), slice(64, 128))]
        return float(sum(halves))

    losses = {i / 20: loss(i / 20) for i in range(20)}
    assert losses[alpha] <= 1.001 * min(losses.values()) < 0.98 * losses[0.0]
    assert np.allclose(s, scale_of(np.abs(x).mean(0), alpha), rtol=1e-4)


def test_clip_takes_for_each_group_the_bound_that_errs_least() -> None:
    x, w = inputs(200, 64), weights(6, 64)
    w[0, 0] = 1  # an outlier on a channel that is seldom active
    x[:, 0] *= 1e-3
    moments = BlockMoments.empty(64, 32)
    moments.add(x)
    got = clip(w, moments, 3, 32)

    def error(n: int, at: slice, bound: float) -> float:
        clamped = np.clip(w[n : n + 1, at], -bound, bound)
        return float(
            np.square(x[:, at].astype(np.float64) @ (by_definition(clamped, 3, 32) - w[n, at])[0]).mean()
        )

    for n in range(len(w)):
        for at in (slice(32), slice(32, 64)):
            m = float(np.abs(w[n, at]).max())
            best = min(error(n, at, m * s) for s in SHRINKS)
            assert error(n, at, float(np.abs(got[n, at]).max())) <= best * 1.01
    assert np.abs(got[0, :32]).max() < 0.6


@pytest.mark.parametrize("k", [1, 5, BLOCK, BLOCK + 44])
def test_factor_is_upper_triangular_and_exact(k: int) -> None:
    x = inputs(3 * k + 8, k)
    h = feedback.damped(x.T @ x, 1 / len(x))
    r = upper_factor(h).astype(np.float64)
    assert not np.tril(r, -1).any()
    # Backward stable: an error of about k · 2^-24 of the largest entry.
    assert np.abs(r @ r.T - h).max() <= max(k, 8) * 2**-23 * np.abs(h).max()
    f = feedback.factor(h)
    assert np.allclose(np.diagonal(f.u), 1) and np.allclose(
        (f.u * f.d) @ f.u.T, h, atol=1e-4 * np.abs(h).max()
    )


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(FormatError, match="not finite"):
        upper_factor(np.full((4, 4), np.nan, np.float32))


def sequential(w: np.ndarray, h: np.ndarray, codes: feedback.Codes) -> np.ndarray:
    """Quantise optimally column by column by definition, in float64.

    After each column the rest of w is set to the least-squares optimum given the errors so far (GPTQ's
    update, with an explicit inverse).
    """
    k, size = len(w), codes.group_size
    left, out = w.astype(np.float64).copy(), np.empty(w.shape)
    h = h.astype(np.float64)
    for j in range(k):
        grid = codes.grid(j // size)
        q = np.clip(np.rint(left[j] / grid.scales) + grid.zeros, 0, 2**grid.w_bit - 1)
        out[j] = (q - grid.zeros) * grid.scales
        if j + 1 < k:
            inverse = np.linalg.inv(h[j:, j:])
            left[j + 1 :] -= np.outer(inverse[1:, 0] / inverse[0, 0], left[j] - out[j])
    return out


def test_feedback_is_gptqs_update() -> None:
    w, x = weights(40, 96).T.copy(), inputs(400, 96)
    h = feedback.damped(x.T @ x, 1 / len(x))
    codes = feedback.feed_back(w, feedback.factor(h), 4, 32)
    expected = sequential(w, h, codes)
    off = np.abs(codes.values() - expected) > 1e-6
    # A weight on the border of two codes differs in float32, and then the rest of its row: few rows.
    assert off.any(0).mean() < 0.15


@pytest.mark.parametrize("w_bit", [3, 4])
def test_each_step_of_awq_plus_lowers_the_error(w_bit: int) -> None:
    w, x = weights(64, 128).T.copy(), inputs(1000, 128)
    h = feedback.damped(x.T @ x, 1 / len(x))
    plain = round_values(np.ascontiguousarray(w.T), w_bit, 64).T
    codes = feedback.feed_back(w, feedback.factor(h), w_bit, 64)
    errors = [squared_error(w, v, h).sum() for v in (plain, codes.values())]
    feedback.refit_scales(w, codes, h)
    errors.append(squared_error(w, codes.values(), h).sum())
    before = squared_error(w, codes.values(), h)
    feedback.descend(w, codes, h)
    after = squared_error(w, codes.values(), h)
    errors.append(after.sum())
    assert errors[1] < 0.7 * errors[0] and errors[2] < errors[1] and errors[3] < 0.95 * errors[2]
    # descent never makes a row worse, except for float32 rounding
    assert (after <= before * (1 + 1e-4)).all()


def test_scales_are_the_least_squares_solution() -> None:
    w, x = weights(5, 96).T.copy(), inputs(400, 96)
    h = feedback.damped(x.T @ x, 1 / len(x))
    codes = feedback.feed_back(w, feedback.factor(h), 4, 32)
    root = np.linalg.cholesky(h.astype(np.float64)).T  # ‖root · e‖² = e H eᵀ
    expected = np.empty_like(codes.scales)
    for n in range(w.shape[1]):
        z = codes.q[:, n].reshape(3, 32) - codes.zeros[:, n : n + 1]
        columns = [root[:, 32 * g : 32 * g + 32] @ z[g] for g in range(3)]
        expected[:, n] = np.linalg.lstsq(np.stack(columns, 1), root @ w[:, n], rcond=None)[0]
    feedback.refit_scales(w, codes, h)
    assert np.allclose(codes.scales, expected, rtol=2.0**-7)  # the change from storing 7 bits


def test_grid_fit_is_the_best_of_its_candidates() -> None:
    v, d = weights(20, 32).T.copy(), np.exp(rng.normal(size=32)).astype(np.float32)
    grid = feedback.fit_grid(v, d, 3)
    error = d @ np.square(grid.nearest(v) - v)
    whole = grid_of(np.ascontiguousarray(v.T), 3)
    plain = d @ np.square((whole.nearest(np.ascontiguousarray(v.T)) - v.T).T)
    assert (error <= plain * (1 + 1e-5)).all() and (error < 0.99 * plain).any()


def test_order_keeps_groups_together_heaviest_first() -> None:
    diagonal = np.exp(rng.normal(size=96)).astype(np.float32)
    order = feedback.by_importance(diagonal, 32)
    groups = order.reshape(3, 32) // 32
    assert sorted(order) == list(range(96)) and (groups == groups[:, :1]).all()
    sums = diagonal.reshape(3, 32).sum(1)
    assert list(groups[:, 0]) == list(np.argsort(-sums))
    assert (np.diff(diagonal[order].reshape(3, 32), axis=1) <= 0).all()


def test_scales_for_feedback_shrink_outlier_channels_and_may_be_none() -> None:
    w, d = weights(64, 128), np.ones(128, np.float32)
    _, alpha = search_fed_scale(w, np.ones(128, np.float32), d, None, 64)
    assert alpha == 0  # all channels are alike: nothing to scale
    loud = np.where(np.arange(128) % 64 == 3, 30, 1).astype(np.float32)
    s, alpha = search_fed_scale(w, loud, loud**2, None, 64)
    assert alpha > 0.2 and s[3] > 2 * s[4]


def test_correction_is_the_least_squares_answer_to_drifted_inputs() -> None:
    """W x wanted, x_hat given: the best linear map of x_hat, in both forms of the cross moment."""
    x = inputs(3000, 64)
    drifted = x + 0.3 * inputs(3000, 64, seed=5)
    for rows in (8, 96):  # fewer outputs than inputs, or more
        w = weights(rows, 64)
        best = np.linalg.lstsq(drifted.astype(np.float64), (x @ w.T).astype(np.float64), rcond=None)[0].T
        moments = FullMoments.empty(64, w)
        assert (moments.w is None) == (rows > 64)
        for a, b in zip(np.array_split(drifted, 3), np.array_split(x, 3), strict=True):
            moments.add(a, b)
        f = feedback.factor(feedback.damped(moments.take_sums(np.arange(64)), 1 / 3000, 1e-7))
        change = moments.correction(w)
        solve(f.u, f.d, change)
        assert np.abs(best - w).max() > 0.1 * np.abs(w).max()
        assert np.allclose(w + change.T, best, atol=1e-3 * np.abs(w).max())


@pytest.mark.parametrize("k", [3, BLOCK + 10])
def test_solve_inverts_the_factored_matrix(k: int) -> None:
    x = inputs(4 * k, k)
    h, b = feedback.damped(x.T @ x, 1 / len(x)), rng.normal(size=(k, 5)).astype(np.float32)
    f, got = feedback.factor(h), b.copy()
    solve(f.u, f.d, got)
    assert np.allclose(h.astype(np.float64) @ got, b, atol=1e-3)
