"""Every CUDA kernel, run on the CPU by tests/emulators/cuda/emulator.h, against float64 on more than 40 shapes each.

Inputs and outputs end at forbidden pages, outputs and shared memory start as NaN, and lanes, warps and blocks
run forwards and backwards: the two results must be bit-identical.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import emulate
import models
from guarded import GuardedKernels, both_orders

from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda import weights
from tinychat_mlx.backends.cuda.cache import CudaCache
from tinychat_mlx.backends.reference import ACTIVATIONS, attend
from tinychat_mlx.contract import Attention, CacheShape, Norm, Rope
from tinychat_mlx.engine.sampler import SamplingParams, distribution

pytestmark = pytest.mark.skipif(emulate.compiler() is None, reason="no C++ compiler to emulate kernels with")
CPU = torch.device("cpu")
HALF, FLOAT = 2.0**-11, 2.0**-23  # relative rounding (float: truncation, as in a tensor core)
WIDTHS = list(itertools.product((4, 8), (32, 64, 128)))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.ENVIRONMENT, "cpu")
    torch.set_num_threads(1)


def tiled(
    w_bit: int, group: int, n: int, k: int, bias: bool = False
) -> tuple[weights.TiledHandle, np.ndarray]:
    """Return (a random weight in tiles, its values in float64)."""
    rng = np.random.default_rng(n * 1000 + k + w_bit)
    offset = rng.standard_normal(n).astype(np.float32) if bias else None
    w = models.random_packed(rng, n, k, w_bit, group, bias=offset)
    return weights.pack_tiled(w, CPU, torch.float16), w.to_float32().astype(np.float64)


def halves(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def within(got: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> None:
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert (np.abs(got - expected) <= bound).all(), f"off by {np.abs(got - expected).max()}"


def offset_bound(w: weights.TiledHandle, x: np.ndarray) -> np.ndarray:
    """Return the bound of matvec's float32 error.

    An mma adds 8 products to a sum of at most (1024 + top) Σ|x| and truncates; so does the sum of ones, times
    1024. All of it is multiplied by the group's scale; the rest is a few roundings.
    """
    scale = w.scales[..., 0].float().numpy().transpose(0, 3, 2, 1).reshape(w.scales.shape[0] * 16, -1)
    group = np.zeros((x.shape[0], scale.shape[1]))
    mass = np.abs(x.astype(np.float64)).reshape(x.shape[0], -1, w.group_size).sum(-1)
    group[:, : mass.shape[1]] = mass
    once = FLOAT * (w.group_size / 8 + 8) * (2048 + 2**w.w_bit)
    return once * group @ np.abs(scale[: w.shape[0]]).T + 1e-5


MATVEC = [
    (1, 16, 128), (1, 17, 256), (1, 5, 384), (1, 33, 128), (2, 48, 256), (3, 16, 640), (5, 31, 384), (8, 64, 128),
]  # fmt: skip


@pytest.mark.parametrize("w_bit, group", WIDTHS)
def test_matvec_is_the_product_with_bias_and_residual(w_bit: int, group: int) -> None:
    """8 shapes each, with K of one group, of a part of a unit, and of more units than a block has."""
    for rows, n, k in [*MATVEC, (1, 7, group), (7, 20, 5 * group), (1, 16, 128 * 35)]:
        for bias, added in ((False, False), (True, True)):
            w, dense = tiled(w_bit, group, n, k, bias)
            x, residual = halves((rows, k)), halves((rows, n), 1).astype(np.float32)

            def run(on: GuardedKernels) -> Any:
                return on.matvec(on.put(x), on.handle(w), on.put(residual) if added else None)  # noqa: B023

            expected = x.astype(np.float64) @ dense.T
            if bias:
                expected += w.bias.numpy() + residual
            within(both_orders(run), expected, offset_bound(w, x))


@pytest.mark.parametrize("w_bit, group", WIDTHS)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_matvec_glu_is_the_gated_product(w_bit: int, group: int, act: str) -> None:
    """Each half's error passes through act(gate) · up, whose slopes are at most 1.13 (relu2: 2 |gate|)."""
    for rows, f, k in [(1, 16, 128), (2, 48, 256), (8, 32, 3 * group)]:
        w, dense = tiled(w_bit, group, 2 * f, k, bias=rows == 2)
        x = halves((rows, k))
        y = x.astype(np.float64) @ dense.T + (0 if w.bias is None else w.bias.numpy())
        gate, up, error = y[:, :f], y[:, f:], offset_bound(w, x)
        slope = 2 * np.abs(gate) + 0.1 if act == "relu2" else 1.13
        acted = ACTIVATIONS[act](gate)
        expected = acted * up
        bound = (
            slope * error[:, :f] * np.abs(up) + np.abs(acted) * error[:, f:] + HALF * np.abs(expected) + 1e-5
        )
        got = both_orders(lambda on, w=w, x=x: on.matvec_glu(on.put(x), on.handle(w), act))
        within(got.astype(np.float64), expected, bound)


# rows, N, K
GEMM = [
    (9, 16, 128),
    (16, 17, 64),
    (70, 130, 192),
    (129, 40, 128),
    (128, 144, 64),
    (33, 128, 384),
    (140, 260, 64),
]


@pytest.mark.parametrize("w_bit, group", WIDTHS)
def test_gemm_is_the_product_with_rounded_weights(w_bit: int, group: int) -> None:
    """Weights are rounded to half, sums truncated every 8 products, the output rounded to half (or float32)."""
    for i, (rows, n, k) in enumerate(GEMM):
        k = max(k // group, 1) * group
        w, dense = tiled(w_bit, group, n, k, bias=i % 2 == 1)
        x, residual = halves((rows, k)), halves((rows, n), 1).astype(np.float32)
        added = i % 3 == 2

        def run(on: GuardedKernels) -> Any:
            return on.gemm(on.put(x), on.handle(w), on.put(residual) if added else None)  # noqa: B023

        expected = x.astype(np.float64) @ dense.T + (residual if added else 0)
        expected += 0 if w.bias is None else w.bias.numpy()
        mass = np.abs(x.astype(np.float64)) @ np.abs(dense).T
        bound = mass * (HALF + FLOAT * (k / 8 + 4)) + np.abs(expected) * HALF + 1e-5
        within(both_orders(run).astype(np.float64), expected, bound)


@pytest.mark.parametrize("w_bit, group", WIDTHS)
def test_unpacking_is_exact(w_bit: int, group: int) -> None:
    """fma(code, scale, bias) is rounded once, like the reference's; dequantise rounds that to half once more."""
    for n, k in [(16, 128), (17, 256), (40, group), (5, 3 * group), (33, 640), (64, 1152), (100, 128)]:
        w, dense = tiled(w_bit, group, n, k)
        half = dense.astype(np.float32).astype(np.float16)
        for first in range(0, w.codes.shape[0], 2):
            tiles = min(2, w.codes.shape[0] - first)
            got = both_orders(lambda on, w=w, f=first, t=tiles: on.dequantise(on.handle(w), f, t))
            np.testing.assert_array_equal(got, half[first * 16 : first * 16 + 32])
        ids = np.array([n - 1, 0, n // 2, n - 1], np.int32)
        got = both_orders(lambda on, w=w, ids=ids: on.embed(on.handle(w), on.put(ids)))
        np.testing.assert_array_equal(got, dense[ids].astype(np.float32))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_agree_with_float64(kind: str) -> None:
    """A tree of sums of C terms: within 8 roundings of the result, which is of order 1 for any C."""
    shapes = [(t, 1, c) for t in (1, 3) for c in (1, 7, 32, 33, 100, 128, 1000, 4096)]
    shapes += [(t, h, c) for t in (1, 2) for h in (2, 5) for c in (8, 64, 96, 128)]
    for (rows, heads, size), bias, half in zip(shapes, itertools.cycle((0, 1, 1)), itertools.cycle((0, 1))):
        rng = np.random.default_rng(size)
        whole = (rng.standard_normal((rows, heads + 1, size)) * 3 + 1).astype(np.float32)
        w, b = rng.standard_normal((2, size)).astype(np.float32)
        x = whole[:, :heads].astype(np.float64)

        def run(on: GuardedKernels) -> Any:
            rows_apart = on.put(whole)[:, :heads]  # noqa: B023
            put = rows_apart if heads > 1 else rows_apart[:, 0]  # noqa: B023
            norm = Norm("n", kind, on.put(w), on.put(b) if bias else None, 1e-5)  # noqa: B023
            return on.norm(put, norm, bool(half))  # noqa: B023

        x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * w + (b if bias else 0)
        got = both_orders(run).reshape(y.shape).astype(np.float64)
        scale = np.abs(y) + np.abs(w) * 3
        within(got, y, scale * 16 * FLOAT + (np.abs(y) * HALF + 2.0**-25 if half else 0))


def turned(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rope by its definition in float64, factor 1.25. x (T, H, D)."""
    half, y = len(inv_freq), x.astype(np.float64)
    angle = positions[:, None, None] * inv_freq.astype(np.float64)
    c, s = np.cos(angle) * 1.25, np.sin(angle) * 1.25
    even = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    a_at, b_at = even if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = y[..., a_at].copy(), y[..., b_at].copy()
    y[..., a_at], y[..., b_at] = a * c - b * s, a * s + b * c
    return y


def test_rope_agrees_with_float64() -> None:
    """40 cases. An angle is a float32 product with an error of position · 2⁻²⁴ radians, times |x|."""
    sizes = ((8, 4), (64, 32), (80, 20), (128, 64), (96, 16))
    cases = itertools.product((1, 3), (1, 4), sizes, (False, True))
    for (rows, heads, (size, half), interleaved), start in zip(cases, itertools.cycle((0, 9, 4000))):
        rng = np.random.default_rng(size)
        whole = rng.standard_normal((rows, heads + 2, size)).astype(np.float32)
        inv_freq = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
        positions = np.arange(start, start + rows, dtype=np.int32)

        def run(on: GuardedKernels) -> Any:
            rope = Rope(on.put(inv_freq), 1.25, interleaved)  # noqa: B023
            return on.rope(on.put(whole)[:, :heads], rope, on.put(positions))  # noqa: B023

        x = whole[:, :heads].astype(np.float64)
        y = turned(x, positions, inv_freq, interleaved)
        bound = np.abs(x).max() * 2.5 * (positions.max() + 4) * FLOAT
        within(both_orders(run).astype(np.float64), y, bound)


def test_glu_of_many_rows_agrees_with_float64() -> None:
    sizes = itertools.product((1, 9, 17), (1, 8, 255, 256, 300))
    for (rows, f), act in itertools.product(sizes, ("silu", "gelu", "relu2")):
        x = halves((rows, 2 * f), f)
        expected = ACTIVATIONS[act](x[:, :f].astype(np.float64)) * x[:, f:]
        got = both_orders(lambda on, x=x, act=act: on.glu(on.put(x), act))
        within(got.astype(np.float64), expected, np.abs(expected) * HALF + 1e-5)


SPECS = [
    Attention(1, 0.2), Attention(1, 0.1, window=7), Attention(1, 0.2, softcap=1.5), Attention(1, 0.3, 100),
    Attention(1, 0.2, window=70, softcap=3.0, alibi=tuple(0.5 / (i + 1) for i in range(16))),
]  # fmt: skip
HEADS = [
    (64, 4, 8, False),
    (64, 2, 2, True),
    (128, 2, 8, False),
    (128, 1, 7, True),
    (80, 1, 3, False),
    (256, 2, 4, False),
]


@pytest.mark.parametrize("size, kv_heads, heads, int8", HEADS)
def test_attention_of_one_row_over_any_length(size: int, kv_heads: int, heads: int, int8: bool) -> None:
    """The expected value includes the cache's rounding. Float32 sums and one rounding to half remain.

    int8: a code may differ by one if its quotient is within rounding of a half, so the new position is
    compared as the kernel stored it.
    """
    lengths = [0, 1, 5, 63, 64, 65, 130, 300]
    for i, (length, spec) in enumerate(zip(lengths, itertools.cycle(SPECS))):
        rng = np.random.default_rng(length)
        capacity = length + 1 + length % 3 * 40
        cache = CudaCache(CacheShape(2, kv_heads, size), capacity, CPU, torch.float16, int8)
        old = torch.from_numpy(rng.standard_normal((2, length, kv_heads, size)).astype(np.float32))
        cache.append(1, 0, old[0], old[1])
        q = rng.standard_normal((1, heads, size)).astype(np.float32)
        k, v = rng.standard_normal((2, 1, kv_heads, size)).astype(np.float32)
        inv_freq, turn = (100.0 ** (-np.arange(size // 2 - 4) / size)).astype(np.float32), i % 2 == 1
        before = [t.clone() for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)]
        stored: list[torch.Tensor] = []

        def run(on: GuardedKernels) -> Any:
            fresh = [on.put(t) for t in before]  # noqa: B023
            cache.k, cache.v, cache.k_scale, cache.v_scale = fresh  # noqa: B023
            at = on.put(np.array([length], np.int32))  # noqa: B023
            rope = Rope(on.put(inv_freq), 1.25, size == 80) if turn else None  # noqa: B023
            given = on.put(q), on.put(k), on.put(v)  # noqa: B023
            for _ in range(2):  # twice: the tickets must be reset
                y = on.attend(*given, cache, spec, at, rope)  # noqa: B023
            read = cache.read(1, length + 1, torch.float32)  # noqa: B023
            stored[:] = [t.float().clone() for t in read]  # noqa: B023
            return y

        got = both_orders(run)
        keys, values = (t.numpy().transpose(1, 0, 2) for t in stored)
        if turn:  # an angle in float32 has an error of 300 · 2⁻²⁴, less than the bound's 2⁻¹¹
            q, k = (turned(x, np.array([length]), inv_freq, size == 80) for x in (q, k))
        step = np.abs(k).max() / 127 if int8 else HALF * np.abs(k).max()
        assert np.abs(keys[-1] - k[0]).max() <= step
        assert np.abs(values[-1] - v[0]).max() <= np.abs(v).max() / 100
        if length and not int8:
            np.testing.assert_array_equal(keys[:-1], old[0].half().float().numpy())
        sized = Attention(1, spec.scale, spec.window, spec.softcap, spec.alibi and spec.alibi[:heads])
        expected = attend(q.astype(np.float64), keys.astype(np.float64), values.astype(np.float64), sized)
        moved = (
            np.abs(q).max() * np.abs(keys).max() * size * 300 * FLOAT * spec.scale if turn else 0
        )  # scores
        bound = np.abs(values).max() * (HALF + 64 * FLOAT + 2 * moved)
        within(got.astype(np.float64).reshape(heads, size), expected.reshape(heads, size), bound)


PARAMETERS = [
    {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 0.2},
    {"temperature": 1.0, "min_p": 0.05}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 3.0, "top_p": 0.5}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1e-3}, {"temperature": 50.0},
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 31, 97, 1025, 5000])
def test_the_device_draws_the_host_samplers_token(size: int) -> None:
    """Expect the token whose stretch of the host's cumulative distribution contains the same chance.

    A chance within 1e-6 of a border may fall to either side (float32 exp, masses in units of 2⁻⁴⁰ and keys of
    2⁻²⁶).
    """
    for i, given in enumerate(PARAMETERS):
        rng = np.random.default_rng(i + size)
        logits = (rng.standard_normal(size) * 4).astype(np.float32)
        if i % 3 == 2:
            logits = np.round(logits)  # ties, also at the borders of top-k and top-p
        p = SamplingParams(**({"top_p": 1.0} | given))
        ids, probabilities = distribution(logits, p)
        total = np.cumsum(probabilities)
        for chance in (0.0, 0.999999, *rng.random(2)):
            got = both_orders(
                lambda on, x=logits, p=p, u=chance: on.sample(
                    on.put(x[None]), p.temperature, p.top_k, p.top_p, p.min_p, u
                )
            )[0]
            at = [
                min(int(np.searchsorted(total, chance + e, "right")), len(ids) - 1) for e in (-1e-6, 0, 1e-6)
            ]
            assert got in ids[at]


def test_greedy_takes_the_first_of_the_largest_and_damage_is_reported() -> None:
    logits = np.zeros((1, 300), np.float32)
    logits[0, [40, 41, 299]] = 2.5
    greedy = (0.0, 0, 1.0, 0.0, 0.0)
    assert both_orders(lambda on: on.sample(on.put(logits), *greedy))[0] == 40
    for bad in (np.nan, np.inf, -np.inf):
        logits[0, 123] = bad
        for args in (greedy, (0.7, 0, 0.9, 0.0, 0.5)):
            assert both_orders(lambda on, args=args: on.sample(on.put(logits), *args))[0] == -1


BUGS = [  # (the kernel, the replaced text, the replacement): the tests must detect each
    ("gemm", "copy_wait<1>();", ""),
    ("gemm", "__syncthreads();", ""),
    ("gemm", "&& k < K", ""),
    ("matvec", "g < rows && k < K", "k < K"),
    ("matvec", "0x54005400u", "0x64006400u"),
    ("matvec", "  __syncthreads();\n}", "}"),
    ("matvec", "|| n >= N", ""),
    ("attend", "      __syncthreads();\n      for (int h = warp", "      for (int h = warp"),
    ("attend", "s < end ? value : -INFINITE", "value"),
    ("attend", "if (threadIdx.x == 0) tickets[blockIdx.x] = 0;", ""),
]


@pytest.mark.parametrize("kernel, old, new", BUGS)
def test_the_emulator_sees_bugs_put_in_on_purpose(kernel: str, old: str, new: str) -> None:
    w, _dense = tiled(4, 32, 23, 160)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 4, 64)).astype(np.float32) for _ in range(2))

    def run(on: GuardedKernels) -> Any:
        if kernel == "attend":
            cache = CudaCache(CacheShape(1, 4, 64), 71, CPU, torch.float16, False)
            cache.append(0, 0, torch.ones(70, 4, 64), torch.ones(70, 4, 64))
            on.processors, spec, at = 4, Attention(0, 0.1), on.put(np.array([70], np.int32))
            for _ in range(2):
                y = on.attend(on.put(q), on.put(k), on.put(k), cache, spec, at)
            return y
        rows = 5 if kernel == "matvec" else 20
        return getattr(on, kernel)(on.put(halves((rows, 160))), on.handle(w), None)

    right = both_orders(run)
    try:
        changed = both_orders(run, (old, new))
    except (RuntimeError, AssertionError):
        return
    assert not np.allclose(right, changed, rtol=0.01, atol=0.01)
