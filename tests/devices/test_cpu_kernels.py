"""The native kernels of every instruction set of this processor, against float64 NumPy."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from tinychat_mlx.awq.search.quantizer import round_to_nearest
from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Attention, CacheShape, Handle, Mlp, Norm, Rope, Segment, Step
from tinychat_mlx.weights.weight import Dense, Packed, Weight, pack_codes

EPS = 2.0**-24  # half a unit in the last place of float32: the largest relative error of one rounding
ISAS = c.instruction_sets()
pack_module = import_module("tinychat_mlx.backends.cpu.pack")  # `pack` is also a function there
RNG = np.random.default_rng(7)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TINYCHAT_CPU_ISA", request.param)
    return str(request.param)


def randn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def packed(n: int, k: int, w_bit: int, group: int, form: Any = np.float16, bias: bool = True) -> Packed:
    q = RNG.integers(0, 2**w_bit, (n, k), dtype=np.uint8)
    scales = RNG.uniform(0.005, 0.02, (n, k // group)).astype(form)
    biases = (-scales.astype(np.float32) * RNG.uniform(0, 2**w_bit, scales.shape)).astype(form)
    return Packed("w", pack_codes(q, w_bit), scales, biases, w_bit, group, randn(n) if bias else None)


def quantised(n: int, k: int, w_bit: int, group: int) -> Packed:
    """A weight like those of `convert`: scale and zero point fit in 16 bits."""
    return round_to_nearest(0.05 * randn(n, k), w_bit, group).packed("w", randn(n))


def rounded(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise activations like the kernels: integers (T, G, group) and one scale per group."""
    parts = x.reshape(x.shape[0], -1, group)
    top = np.abs(parts).max(-1, keepdims=True)
    whole = np.rint(parts * (np.float32(127) / np.maximum(top, np.float32(1e-30))))
    return whole.astype(np.float64), (top / np.float32(127)).astype(np.float64)


def expected_linear(w: Weight, x: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (y, a bound of its error): each term of the sum and each sum may be rounded a few times."""
    bias = 0.0 if w.bias is None else w.bias.astype(np.float64)
    if isinstance(w, Dense) or exact:
        # w itself is computed in float32 from its parts, then k products are summed in order
        m, k = w.to_float32().astype(np.float64), w.shape[1]
        size = np.abs(m) + (0 if isinstance(w, Dense) else 2 * np.abs(m).max())
        return x @ m.T + bias, EPS * (k + 4) * (np.abs(x) @ size.T + np.abs(bias))
    whole, scale = rounded(x, w.group_size)
    q = w.codes().astype(np.float64).reshape(w.shape[0], -1, w.group_size)
    s, b = w.scales.astype(np.float64), w.biases.astype(np.float64)
    dots = np.einsum("tgk,ngk->tng", whole, q)
    sums = (whole.sum(-1, keepdims=True) * scale)[:, :, 0]
    terms = dots * s * scale[:, :, 0][:, None], sums[:, None] * b
    # int32 inside a group is exact; wide codes may be stored as q - 128, which moves 128 * s to the bias
    offset = np.abs(sums[:, None] * s * 128) if w.w_bit == 8 else 0
    size = (np.abs(terms[0]) + np.abs(terms[1]) + 2 * offset).sum(-1) + np.abs(bias)
    return sum(terms).sum(-1) + bias, EPS * (2 * s.shape[1] + 6) * size


WEIGHTS = [
    packed(1, 64, 4, 32),
    packed(16, 128, 4, 128),
    packed(40, 384, 4, 128, bias=False),
    packed(67, 320, 4, 64, np.float32),
    packed(33, 480, 4, 160),
    packed(50, 256, 3, 32),
    quantised(67, 384, 4, 128),
    quantised(33, 192, 3, 32),
    packed(31, 256, 8, 128),
    packed(48, 192, 8, 32, np.float32),
    Dense("w", randn(35, 100), randn(35)),
    Dense("w", randn(64, 257).astype(np.float16)),
    Dense("w", (randn(17, 96).view(np.uint32) >> 16).astype(np.uint16), randn(17)),
]


def name(w: Weight) -> str:
    form = f"int{w.w_bit}g{w.group_size}" if isinstance(w, Packed) else str(w.w.dtype)
    return f"{form}-{w.shape[0]}x{w.shape[1]}"


@pytest.mark.parametrize("w_bit", [4, 3])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_zero_points_take_half_the_room_and_change_no_bit(
    w_bit: int, rows: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x, made = quantised(80, 512, w_bit, 128), randn(rows, 512), []
    for find in (pack_module.zeros_of, lambda w: None):
        monkeypatch.setattr(pack_module, "zeros_of", find)
        backend = CpuBackend()
        handle: Any = backend.pack(w)
        made.append(
            (handle.header.ends, handle.data.size, backend.to_host(backend.linear(backend.put(x), handle)))
        )
    (ends, small, y), (old_ends, large, old) = made
    assert (ends, old_ends) == (c.ZEROS, c.HALVES) and large - small == 80 * 4 * 2
    assert np.array_equal(y, old)


def test_other_scales_and_offsets_keep_all_their_bits() -> None:
    fits, one = quantised(16, 128, 4, 128), np.ones((16, 1), np.float16)
    assert pack_module.zeros_of(fits) is not None
    for scales, biases in [
        (np.nextafter(fits.scales, np.float16(1)), fits.biases),  # more than seven bits
        (-fits.scales, -fits.biases), (0 * one, 0 * one), (one, -16 * one), (one, one), (one, -one / 2),
        (one, np.nan * one), (one.astype(np.float32), -one.astype(np.float32)),
    ]:  # fmt: skip
        assert pack_module.zeros_of(replace(fits, scales=scales, biases=biases)) is None


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
@pytest.mark.parametrize("w", WEIGHTS, ids=name)
def test_linear_is_the_product_of_rounded_activations(isa: str, w: Weight, exact: bool) -> None:
    backend = CpuBackend(exact=exact, threads=2)
    handle = backend.pack(w)
    if isinstance(w, Dense) and w.w.dtype == np.float32 and not exact:
        w = Dense(w.name, w.w.astype(np.float16), w.bias)  # documented: rounded to 16 bits
    for rows in (1, 2, 3, 4, 7, 8, 9, 12, 13, 40):
        wide = np.full((rows + 2, w.shape[1] + 24), np.nan, np.float32)  # a view surrounded by NaN
        x = wide[1:-1, 8 : 8 + w.shape[1]]
        x[:] = randn(*x.shape) * RNG.choice([1e-3, 1, 30], (rows, 1))
        y, bound = expected_linear(w, x.astype(np.float32), exact)
        got = backend.to_host(backend.linear(x, handle))
        assert np.all(np.abs(got - y) <= bound), (
            f"{rows} rows: {np.max(np.abs(got - y) / bound):.2g} × the bound"
        )


def test_many_rows_in_more_than_one_pass(isa: str) -> None:
    """More rows than a pass of the many-row kernel, and a last panel that is not full."""
    if isa == "scalar":
        pytest.skip("the same code as on other instruction sets, a hundred times slower")
    w, x = packed(48, 64, 4, 32), randn(1100, 64)
    for exact in (False, True):
        backend = CpuBackend(exact=exact, threads=2)
        y, bound = expected_linear(w, x, exact)
        assert np.all(np.abs(backend.linear(x, backend.pack(w)) - y) <= bound)


def test_an_op_writes_its_rows_and_nothing_else(isa: str) -> None:
    for w in (packed(37, 128, 4, 64), packed(37, 128, 8, 64), Dense("w", randn(37, 128))):
        for exact in (False, True):
            backend = CpuBackend(exact=exact, threads=2)
            handle: Any = backend.pack(w)
            for rows in (1, 5, 30):
                room = np.full((rows + 2, 60), 7.5, np.float32)
                x = randn(rows, 128)
                op = c.LinearOp(c.LINEAR, rows, x.ctypes.data, 128, ctypes.pointer(handle.header))
                op.y, op.y_stride, op.exact = room[1:].ctypes.data + 40, 60, exact
                backend.engine.run_one(op)
                assert np.array_equal(room[1:-1, 10:47], backend.linear(x, handle))
                room[1:-1, 10:47] = 7.5
                assert np.all(room == 7.5)


def test_scratch_of_an_earlier_op_does_not_leak_into_a_later(isa: str) -> None:
    """Padding of panels, groups and heads is in reused memory: here all of it is NaN first."""
    backend = CpuBackend(threads=2)
    w = backend.pack(packed(40, 128, 4, 64))
    x = randn(13, 128)
    before = backend.to_host(backend.linear(x, w))
    for rows in (1, 5, 60):
        backend.linear(np.full((rows, 128), np.nan, np.float32), w)
    assert np.array_equal(backend.linear(x, w), before)


@pytest.mark.parametrize("w", WEIGHTS, ids=name)
def test_one_table_serves_embedding_and_head(isa: str, w: Weight) -> None:
    backend = CpuBackend(exact=True, threads=1)
    ids = [0, w.shape[0] - 1, w.shape[0] // 2]
    got = backend.embed(backend.pack(w), backend.ids(ids))
    parts = w.to_float32()
    # q * scale and the sum are rounded once each; q * scale may be larger than the sum
    assert np.all(np.abs(got - parts[ids]) <= 4 * EPS * np.abs(parts).max() * 2)


def test_an_id_outside_the_table_is_refused(isa: str) -> None:
    backend = CpuBackend(threads=1)
    table = backend.pack(packed(40, 64, 8, 64))
    for bad in (40, -1):
        with pytest.raises(BackendError, match="token id"):
            backend.embed(table, backend.ids([0, bad]))


# attention -----------------------------------------------------------------------------------------------


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: Attention) -> np.ndarray:
    rows, heads, dim = q.shape
    y = np.zeros((rows, heads, dim))
    for t in range(rows):
        at = k.shape[0] - rows + t
        low = max(0, at - spec.window + 1) if spec.window else 0
        for h in range(heads):
            kv = h * k.shape[1] // heads
            s = (k[low : at + 1, kv] @ q[t, h].astype(np.float64)) * spec.scale
            s = spec.softcap * np.tanh(s / spec.softcap) if spec.softcap else s
            s = s + spec.alibi[h] * (np.arange(low, at + 1) - at) if spec.alibi else s
            p = np.exp(s - s.max())
            y[t, h] = (p / p.sum()) @ v[low : at + 1, kv]
    return y.reshape(rows, -1)


HEADS = [(4, 4, 16), (4, 2, 24), (8, 1, 64), (7, 1, 40), (6, 2, 8), (71, 1, 16)]
SPECS = [
    Attention(1, 0.25),
    Attention(0, 0.2, window=20),
    Attention(1, 0.2, window=70),
    Attention(1, 0.3, softcap=3.0),
    Attention(0, 0.1, alibi=tuple(np.linspace(0.01, 0.5, 71).tolist())),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"window{s.window}-cap{s.softcap:g}-{bool(s.alibi)}")
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["fp16", "fp32"])
def test_attention_over_a_growing_cache(
    isa: str, heads: tuple[int, int, int], spec: Attention, exact: bool
) -> None:
    """Prompts, single tokens and few rows in turn. Everything beyond the cached tokens is NaN."""
    h, hkv, d = heads
    if isa == "scalar" and heads != HEADS[1]:
        pytest.skip("one shape is enough for the slowest")
    backend = CpuBackend(exact=exact, threads=3)
    cache: Any = backend.new_cache(CacheShape(2, hkv, d), 640)
    cache.data[:] = 0xFF  # NaN in float16 and float32
    k = v = np.zeros((0, hkv, d))
    for rows in (5, 1, 3, 90, 1, 150, 1, 4, 20, 1):
        joined = randn(rows, (h + 2 * hkv) * d)
        cut = [
            joined[:, a * d : b * d].reshape(rows, b - a, d)
            for a, b in ((0, h), (h, h + hkv), (h + hkv, h + 2 * hkv))
        ]
        held = [t if exact else t.astype(np.float16) for t in cut]
        k, v = np.concatenate([k, held[1]]), np.concatenate([v, held[2]])
        got = backend.attention(*cut, spec, backend.step([Segment(cache, rows)]))
        cache.length += rows
        # A score of d products has an error of (d + 4) eps |q||k| scale, below 40 here. It changes the
        # weights, and the mean of values below 5, by as much; exp and the running sums add a few more
        # roundings.
        assert np.abs(got - softmax_attention(cut[0], k, v, spec)).max() <= EPS * (d + 24) * 40 * 5


def test_attention_over_a_cache_in_int8(isa: str) -> None:
    """Keys and values are rounded to 127 steps of a token's largest, and then processed like exact ones."""

    def held(x: np.ndarray) -> np.ndarray:
        whole, scale = rounded(x.reshape(-1, x.shape[-1]), x.shape[-1])
        return (whole * scale).reshape(x.shape)

    backend, spec = CpuBackend(threads=2, kv="int8"), Attention(1, 0.2)
    cache: Any = backend.new_cache(CacheShape(2, 2, 40), 400)
    cache.data[:] = 0xFF
    k = v = np.zeros((0, 2, 40))
    for rows in (70, 1, 5, 250, 1):
        q, new_k, new_v = randn(rows, 6, 40), randn(rows, 2, 40), randn(rows, 2, 40)
        k, v = np.concatenate([k, held(new_k)]), np.concatenate([v, held(new_v)])
        got = backend.attention(q, new_k, new_v, spec, backend.step([Segment(cache, rows)]))
        cache.length += rows
        assert np.abs(got - softmax_attention(q, k, v, spec)).max() <= EPS * 64 * 40 * 5
    with pytest.raises(BackendError, match="fp16, int8"):
        CpuBackend(kv="int2")


def test_conversations_of_different_lengths_decode_together(isa: str) -> None:
    backend, spec = CpuBackend(exact=True, threads=2), Attention(0, 0.2)
    sizes, held = [300, 3, 0, 64], []
    caches = [backend.new_cache(CacheShape(1, 2, 32), 400) for _ in sizes]
    for cache, n in zip(caches, sizes, strict=True):
        k, v = randn(n, 2, 32), randn(n, 2, 32)
        if n:
            backend.attention(randn(n, 4, 32), k, v, spec, backend.step([Segment(cache, n)]))
        cache.length = n
        held.append((k, v))
    for rows in ([1, 1, 1, 1], [1, 9, 2, 40]):
        q, k, v = randn(sum(rows), 4, 32), randn(sum(rows), 2, 32), randn(sum(rows), 2, 32)
        segments = [Segment(cache, n) for cache, n in zip(caches, rows, strict=True)]
        got, at = backend.attention(q, k, v, spec, backend.step(segments)), 0
        for i, n in enumerate(rows):
            s = np.s_[at : at + n]
            held[i] = np.concatenate([held[i][0], k[s]]), np.concatenate([held[i][1], v[s]])
            caches[i].length += n
            assert np.abs(got[s] - softmax_attention(q[s], *held[i], spec)).max() < EPS * 56 * 200
            at += n


# whole steps ---------------------------------------------------------------------------------------------


class Toy:
    """A decoder of two layers that uses every op, written with the contract."""

    def __init__(self, backend: CpuBackend) -> None:
        self.b = b = backend
        self.table = b.pack(packed(70, 128, 8, 64, bias=False))
        self.norm = Norm("n", "rms", b.put(randn(128)), None, 1e-6)
        self.head_norm = Norm("h", "layer", b.put(randn(32)), b.put(randn(32)), 1e-5)
        self.rope = Rope(b.put(10000.0 ** (-np.arange(0, 32, 2, dtype=np.float32) / 32)), 1.1)
        self.layers = [self.layer() for _ in range(2)]

    def layer(self) -> tuple[Handle, Handle, Mlp]:
        pack = self.b.pack
        gated = Mlp("silu", pack(packed(128, 96, 4, 32)), gate_up=pack(packed(192, 128, 4, 128)))
        return pack(packed(256, 128, 4, 64)), pack(Dense("o", randn(128, 128).astype(np.float16))), gated

    def __call__(self, ids: Any, step: Step) -> Any:
        b = self.b
        x = b.scale(b.embed(self.table, ids), 3.0)
        for i, (qkv, o, mlp) in enumerate(self.layers):
            y, rows = b.norm_linear(x, self.norm, qkv), ids.shape[0]
            q, k, v = (y[:, s].reshape(rows, -1, 32) for s in (np.s_[:128], np.s_[128:192], np.s_[192:]))
            q, k = b.rope(b.norm(q, self.head_norm), self.rope, step), b.rope(k, self.rope, step)
            x = b.linear_add(b.attention(q, k, v, Attention(i, 0.2), step), o, x)
            x = b.add(x, b.mlp(x, mlp, self.norm), 0.5) if i else b.mlp(x, mlp, self.norm, x)
        return b.softcap(b.linear(b.norm(x, self.norm), self.table), 20.0)


def decode(backend: CpuBackend, fn: Any, prompt: int, tokens: int) -> list[np.ndarray]:
    """Return logits of a prompt and of some steps on two conversations in turn."""
    caches = [backend.new_cache(CacheShape(2, 2, 32), 600) for _ in range(2)]
    out = []
    for cache, n in zip(caches, (prompt, 7), strict=True):
        ids = backend.ids([(3 * i + n) % 70 for i in range(n)])
        out.append(backend.to_host(fn(ids, backend.step([Segment(cache, n)]))))
        cache.length += n
    for i in range(tokens):
        cache = caches[i % 3 == 0]
        ids = backend.ids([int(out[-1][-1].argmax()) if i % 2 else i])
        out.append(backend.to_host(fn(ids, backend.step([Segment(cache, 1)]))))
        cache.length += 1
        if i == 9:
            cache.rewind(cache.length - 4)
    return out


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
def test_a_replayed_step_is_the_eager_step_bit_for_bit(isa: str, exact: bool) -> None:
    backend = CpuBackend(exact=exact, threads=2)
    toy = Toy(backend)
    calls: list[int] = []

    def counted(ids: Any, step: Step) -> Any:
        calls.append(ids.shape[0])
        return toy(ids, step)

    eager = decode(backend, toy, 250, 30)
    replayed = decode(backend, backend.capture(counted), 250, 30)
    assert all(np.array_equal(a, b) for a, b in zip(eager, replayed, strict=True))
    assert all(np.isfinite(a).all() for a in eager)
    assert calls == [250, 7, 1, 1], "two prompts, then one recording a conversation"


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    def run(threads: int) -> list[np.ndarray]:
        global RNG
        RNG = np.random.default_rng(3)
        backend = CpuBackend(threads=threads)
        return decode(backend, backend.capture(Toy(backend)), 290, 6)

    one = run(1)
    for threads in (2, 3):
        assert all(np.array_equal(a, b) for a, b in zip(one, run(threads), strict=True))


def test_a_graph_that_computes_outside_its_backend_is_not_replayed(isa: str) -> None:
    backend = CpuBackend(threads=1)
    w = backend.pack(packed(64, 64, 4, 64))
    table = backend.pack(packed(64, 64, 8, 64))
    cache = backend.new_cache(CacheShape(1, 1, 8), 8)
    wrong = backend.capture(lambda ids, step: backend.linear(backend.embed(table, ids) * 2, w))
    with pytest.raises(AssertionError, match="outside its backend"):
        wrong(backend.ids([1]), backend.step([Segment(cache, 1)]))


# errors --------------------------------------------------------------------------------------------------


def test_unknown_instruction_set_and_thread_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="at least 1"):
        CpuBackend(threads=0)
    monkeypatch.setenv("TINYCHAT_THREADS", "two")
    with pytest.raises(BackendError, match="TINYCHAT_THREADS"):
        CpuBackend()
    monkeypatch.setenv("TINYCHAT_THREADS", "2")
    assert "2 threads" in CpuBackend().describe().detail
    monkeypatch.setenv("TINYCHAT_CPU_ISA", "sse9")
    with pytest.raises(BackendError, match="scalar"):
        CpuBackend()


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c, "_FILES", ("nowhere.so",))
    with pytest.raises(BackendError, match="cmake"):
        c.find_library()


def test_forms_that_tiles_cannot_hold_are_refused() -> None:
    backend = CpuBackend(threads=1)
    odd = packed(16, 48, 4, 16, bias=False)
    with pytest.raises(BackendError, match="groups of 16"):
        backend.pack(odd)


def test_a_full_cache_is_an_error_and_no_overrun() -> None:
    backend = CpuBackend(threads=1)
    cache = backend.new_cache(CacheShape(1, 1, 8), 64)
    cache.length = 64
    one = randn(1, 1, 8)
    with pytest.raises(BackendError, match="overflow"):
        backend.attention(one, one, one, Attention(0, 1.0), backend.step([Segment(cache, 1)]))
