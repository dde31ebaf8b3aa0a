"""Contract tests for every backend: each operation against a float64 NumPy version in this file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinychat_mlx.contract import Attention, Backend, CacheShape, Mlp, Norm, Rope, Segment
from tinychat_mlx.open import create
from tinychat_mlx.weights.weight import Dense, Packed, pack_codes

RNG = np.random.default_rng(0)
EPS = 2.0**-23


def randn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def packed(n: int, k: int, w_bit: int, group: int, bias: bool = False) -> Packed:
    q = RNG.integers(0, 2**w_bit, (n, k), dtype=np.uint8)
    scales = (RNG.random((n, k // group)) * 0.05 + 0.01).astype(np.float16)
    biases = (-scales.astype(np.float32) * RNG.integers(0, 2**w_bit, scales.shape)).astype(np.float16)
    return Packed("w", pack_codes(q, w_bit), scales, biases, w_bit, group, randn(n) if bias else None)


def meaning(w: Dense | Packed) -> np.ndarray:
    """Return a weight's values in float64, by definition."""
    if isinstance(w, Dense):
        return w.to_float32().astype(np.float64)
    q = w.codes().astype(np.float64).reshape(w.scales.shape[0], -1, w.group_size)
    return (q * w.scales[..., None].astype(np.float64) + w.biases[..., None].astype(np.float64)).reshape(
        w.shape
    )


def close(got: np.ndarray, expected: np.ndarray, magnitude: np.ndarray | float, terms: int) -> None:
    """Check a float32 sum of `terms` products of total magnitude: terms · eps · magnitude, and no NaN."""
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.all(np.abs(got - expected) <= terms * EPS * np.asarray(magnitude) + 1e-6)


WEIGHTS = [
    Dense("w", randn(48, 64)),
    Dense("w", randn(40, 96).astype(np.float16), randn(40)),
    Dense("w", (randn(33, 64).view(np.uint32) >> 16).astype(np.uint16)),
    packed(48, 128, 4, 128),
    packed(37, 128, 4, 32, bias=True),
    packed(64, 384, 4, 64),
    packed(48, 128, 8, 64),
    packed(20, 256, 3, 64),
]


def held(thing: Any) -> int:
    """Return the bytes of all arrays in a handle or a cache of any backend."""
    if isinstance(thing, (list, tuple, dict)):
        return sum(map(held, thing.values() if isinstance(thing, dict) else thing))
    if hasattr(thing, "nbytes") and hasattr(thing, "dtype"):
        return int(thing.nbytes)
    fields = getattr(thing, "__dict__", {})
    return sum(held(v) for name, v in fields.items() if name not in ("partial", "done"))  # cpu's scratch


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: f"{type(w).__name__}{w.shape}")
def test_what_a_weight_takes_is_known_before_it_is_packed(backend: Backend, weight: Dense | Packed) -> None:
    plain = replace(weight, bias=None)
    assert backend.weight_bytes(plain) == held(backend.pack(plain))


@pytest.mark.parametrize("head_dim", [32, 40])
def test_what_a_token_takes_is_known_before_there_is_a_cache(backend: Backend, head_dim: int) -> None:
    shape = CacheShape(3, 2, head_dim)
    assert 128 * backend.kv_bytes(shape) == held(backend.new_cache(shape, 128))


def test_what_a_token_takes_is_known_of_small_caches(
    backend_name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "TINYCHAT_KV": "int8",
        "TINYCHAT_CUDA_KV": "int8",
        "TINYCHAT_MLX_KV_BITS": "4",
    }.items():
        monkeypatch.setenv(name, value)
    request.getfixturevalue("backend")  # skips if its library is missing
    backend = create(backend_name, exact=False, threads=1)
    shape = CacheShape(3, 2, 64)
    assert 128 * backend.kv_bytes(shape) == held(backend.new_cache(shape, 128))
    assert (backend.kv_bytes(shape) < shape.bytes_per_token(2)) == (backend_name != "reference")


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 33])
@pytest.mark.parametrize(
    "weight", WEIGHTS, ids=lambda w: f"{type(w).__name__}{w.shape}{getattr(w, 'w_bit', w)!s:.4}"
)
def test_linear_is_the_matrix_product(backend: Backend, weight: Dense | Packed, rows: int) -> None:
    x, w = randn(rows, weight.shape[1]), meaning(weight)
    bias = 0 if weight.bias is None else weight.bias.astype(np.float64)
    got = backend.to_host(backend.linear(backend.put(x), backend.pack(weight)))
    # codes and offsets are summed separately: the magnitude is that of the parts, not of their difference
    parts = np.abs(w) if isinstance(weight, Dense) else np.abs(w) + 2 * np.abs(w).max()
    close(got, x.astype(np.float64) @ w.T + bias, np.abs(x) @ parts.T + np.abs(bias), weight.shape[1])


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: f"{type(w).__name__}{w.shape}")
def test_embed_gives_the_rows_of_the_table(backend: Backend, weight: Dense | Packed) -> None:
    if weight.bias is not None:
        pytest.skip("an embedding has no bias")
    ids = [0, weight.shape[0] - 1, 3, 3]
    got = backend.to_host(backend.embed(backend.pack(weight), backend.ids(ids)))
    expected = meaning(weight)[ids]
    close(got, expected, np.abs(expected) + np.abs(expected).max(), 4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (3, 4, 32)])
def test_norms(backend: Backend, kind: str, shape: tuple[int, ...]) -> None:
    x, w, b = randn(*shape) * 3 + 1, randn(shape[-1]), randn(shape[-1])
    norm = Norm("n", kind, backend.put(w), backend.put(b) if kind == "layer" else None, 1e-5)
    got = backend.to_host(backend.norm(backend.put(x), norm))
    z = x.astype(np.float64)
    if kind == "layer":
        z = z - z.mean(-1, keepdims=True)
    expected = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * w + (b if kind == "layer" else 0)
    close(got, expected, np.abs(w) * np.abs(x).max() + np.abs(b), shape[-1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [16, 8])
def test_rope_turns_pairs_by_position(backend: Backend, interleaved: bool, rotated: int) -> None:
    inv = (10000.0 ** (-np.arange(0, rotated, 2) / rotated)).astype(np.float32)
    cache = backend.new_cache(CacheShape(1, 2, 16), 4096)
    cache.length = 3000
    step = backend.step((Segment(cache, 3),))
    x = randn(3, 2, 16)
    got = backend.to_host(backend.rope(backend.put(x), Rope(backend.put(inv), 1.5, interleaved), step))
    # the contract uses float32 angles: position · inv_freq is rounded before the rotation
    angle = (np.arange(3000, 3003, dtype=np.float32)[:, None, None] * inv).astype(np.float64)
    half = rotated // 2
    first, second = (np.s_[..., 0:rotated:2], np.s_[..., 1:rotated:2]) if interleaved else (
        np.s_[..., :half], np.s_[..., half:rotated])  # fmt: skip
    expected = x.astype(np.float64)
    a, b = x[first].astype(np.float64), x[second].astype(np.float64)
    expected[first] = 1.5 * (a * np.cos(angle) - b * np.sin(angle))
    expected[second] = 1.5 * (a * np.sin(angle) + b * np.cos(angle))
    # one more rounding of an angle of 3000 changes the result by 3000 · eps
    close(got, expected, 6 * 3000.0, 1)


def softmax_attention(q: Any, k: Any, v: Any, spec: Attention) -> np.ndarray:
    """Row by row, head by head, in float64: q (T, H, D), all keys and values (S, Hkv, D) -> (T, H·D)."""
    rows, heads, _ = q.shape
    y = np.zeros(q.shape)
    for t in range(rows):
        at = k.shape[0] - rows + t
        low = max(0, at - spec.window + 1) if spec.window else 0
        for h in range(heads):
            g = h * k.shape[1] // heads
            s = k[low : at + 1, g].astype(np.float64) @ q[t, h].astype(np.float64) * spec.scale
            if spec.softcap:
                s = spec.softcap * np.tanh(s / spec.softcap)
            if spec.alibi is not None:
                s = s + spec.alibi[h] * (np.arange(low, at + 1) - at)
            p = np.exp(s - s.max())
            y[t, h] = (p / p.sum()) @ v[low : at + 1, g].astype(np.float64)
    return y.reshape(rows, -1)


SPECS = [
    Attention(1, 0.25),
    Attention(0, 0.25, window=5),
    Attention(1, 0.3, softcap=2.0),
    Attention(0, 0.25, alibi=(0.5, 0.25, 0.125, 0.0625)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"w{s.window}c{s.softcap:g}a{s.alibi is not None:d}")
@pytest.mark.parametrize("cuts", [[11], [7, 1, 1, 2], [1] * 11])
def test_attention_is_causal_grouped_and_remembers(
    backend: Backend, spec: Attention, cuts: list[int]
) -> None:
    # values that are exact in fp16, so that fp16 and float32 caches give the same answer
    q, k, v = (randn(11, h, 32).astype(np.float16).astype(np.float32) for h in (4, 2, 2))
    cache, row, got = backend.new_cache(CacheShape(2, 2, 32), 16), 0, []
    for n in cuts:
        step = backend.step((Segment(cache, n),))
        piece = (backend.put(t[row : row + n]) for t in (q, k, v))
        got.append(backend.to_host(backend.attention(*piece, spec, step)))
        cache.length, row = cache.length + n, row + n
    expected = softmax_attention(q, k, v, spec)
    # exp of a score error of 32 terms, then a mean of 11 values
    close(np.concatenate(got), expected, 4 * np.abs(v).max(), 32 * 4)


def test_two_conversations_in_one_step_do_not_mix(backend: Backend) -> None:
    spec, shape = Attention(0, 0.25), CacheShape(1, 2, 32)
    q, k, v = (randn(9, h, 32).astype(np.float16).astype(np.float32) for h in (4, 2, 2))
    caches = [backend.new_cache(shape, 16) for _ in range(2)]
    step = backend.step((Segment(caches[0], 4), Segment(caches[1], 5)))
    assert step.rows == 9
    got = backend.to_host(backend.attention(*(backend.put(t) for t in (q, k, v)), spec, step))
    expected = [softmax_attention(q[s], k[s], v[s], spec) for s in (np.s_[:4], np.s_[4:])]
    close(got, np.concatenate(expected), 4 * np.abs(v).max(), 128)


def test_rewinding_overwrites(backend: Backend) -> None:
    spec = Attention(0, 0.25)
    q, k, v = (randn(6, 2, 32).astype(np.float16).astype(np.float32) for _ in range(3))
    cache = backend.new_cache(CacheShape(1, 2, 32), 8)
    for keep, rows in ((0, np.s_[:5]), (2, np.s_[2:6])):
        cache.rewind(keep)
        step = backend.step((Segment(cache, rows.stop - (rows.start or 0)),))
        y = backend.attention(*(backend.put(t[rows] + (0 if keep else 1)) for t in (q, k, v)), spec, step)
        cache.length = rows.stop
    mixed_k, mixed_v = (np.concatenate([t[:2] + 1, t[2:]]) for t in (k, v))
    close(backend.to_host(y), softmax_attention(q[2:], mixed_k, mixed_v, spec), 16.0, 128)


ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: (
        0.5 * x * (1 + np.array([__import__("math").erf(t / 2**0.5) for t in x.flat]).reshape(x.shape))
    ),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize("kind", ACTS)
def test_activations(backend: Backend, kind: str) -> None:
    x = np.concatenate([randn(3, 50) * 4, [[-100, 100, 0, -0.0, 1e-6] * 10]]).astype(np.float32)
    expected = ACTS[kind](x.astype(np.float64))
    # exp and tanh of fast libraries have errors of a few units; near zero gelu's 1 + tanh cancels
    close(backend.to_host(backend.act(backend.put(x), kind)), expected, np.abs(x) + np.abs(expected), 16)
    joined = randn(4, 24)
    y = backend.put(joined)
    got = backend.to_host(backend.glu(y[:, :12], y[:, 12:], kind))
    expected = ACTS[kind](joined[:, :12].astype(np.float64)) * joined[:, 12:]
    close(got, expected, (np.abs(joined[:, :12]) + 1) ** 2 * np.abs(joined[:, 12:]), 16)


def test_add_scale_softcap(backend: Backend) -> None:
    a, b = randn(3, 40), randn(3, 40)
    close(
        backend.to_host(backend.add(backend.put(a.copy()), backend.put(b.copy()), 0.5)), a + 0.5 * b, 8.0, 2
    )
    close(backend.to_host(backend.scale(backend.put(a.copy()), 2.5)), a * 2.5, 8.0, 2)
    capped = backend.to_host(backend.softcap(backend.put(a.copy() * 9), 5.0))
    close(capped, 5 * np.tanh(a.astype(np.float64) * 9 / 5), 30.0, 4)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_composites_equal_their_parts(backend: Backend, joined: bool, rows: int) -> None:
    """A fused kernel may round differently from its parts, but computes the same function."""
    x, residual = randn(rows, 128), randn(rows, 128)
    norm = Norm("n", "rms", backend.put(randn(128)), None, 1e-5)
    whole, down = packed(256, 128, 4, 64), packed(128, 128, 4, 128)
    part = [
        Packed("p", whole.qweight[s], whole.scales[s], whole.biases[s], 4, 64)
        for s in (np.s_[:128], np.s_[128:])
    ]
    if joined:
        mlp = Mlp("silu", backend.pack(down), gate_up=backend.pack(whole))
    else:
        mlp = Mlp("silu", backend.pack(down), gate=backend.pack(part[0]), up=backend.pack(part[1]))

    def composed(base: Any) -> list[np.ndarray]:
        def put(t: np.ndarray) -> Any:
            return backend.put(t.copy())

        handle = backend.pack(whole)
        results = (
            base.norm_linear(backend, put(x), norm, handle),
            base.linear_add(backend, put(x), mlp.down, put(residual)),
            base.mlp(backend, put(x), mlp, norm, put(residual)),
            base.mlp(backend, put(x), mlp, None, None),
        )
        return [backend.to_host(y) for y in results]

    for got, expected in zip(composed(type(backend)), composed(Backend), strict=True):
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_captured_step_equals_the_eager_one(backend: Backend) -> None:
    """Replayed at each position, with another token each time, on two caches in turn."""
    table, w = backend.pack(packed(64, 128, 8, 64)), backend.pack(packed(384, 128, 4, 64))
    rope = Rope(backend.put((10000.0 ** (-np.arange(0, 32, 2) / 32)).astype(np.float32)))

    def fn(ids: Any, step: Any) -> Any:
        y = backend.linear(backend.embed(table, ids), w)
        q, k, v = (y[:, i * 128 : (i + 1) * 128].reshape(-1, 4, 32) for i in range(3))
        return backend.attention(backend.rope(q, rope, step), k, v, Attention(0, 0.1), step)

    captured, shape = backend.capture(fn), CacheShape(1, 4, 32)
    fast, slow = ([backend.new_cache(shape, 16) for _ in range(2)] for _ in range(2))
    for i, token in enumerate([5, 9, 5, 63, 0, 17, 9, 9]):
        results = []
        for run, caches in ((captured, fast), (fn, slow)):
            cache = caches[i % 2]
            results.append(backend.to_host(run(backend.ids([token]), backend.step((Segment(cache, 1),)))))
            cache.length += 1
        assert np.abs(results[0] - results[1]).max() <= 1e-5 * np.abs(results[1]).max()


def test_a_backend_says_what_it_is(backend: Backend, backend_name: str) -> None:
    device = backend.describe()
    assert device.backend == backend_name and device.name
    before = backend.memory().used
    backend.pack(packed(512, 512, 4, 64))
    assert backend.memory().used >= before
