"""MLX attention without the fused kernel: packed caches, softcap, ALiBi, other head sizes, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mlx_models import agree, decoder, logits
from tiny_models import tiny

from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.cache import bytes_per_token, packed_parts
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Attention, Backend, CacheShape, Segment
from tinychat_mlx.weights.weight import F32

BLOCKS = "tinychat_mlx.backends.mlx.attention.SCORES"


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def random(rows: int, heads: int, kv: int, size: int, scale: float = 1.0) -> tuple[F32, F32, F32]:
    rng = np.random.default_rng(0)
    q, k, v = (scale * rng.standard_normal((rows, h, size)).astype(np.float32) for h in (heads, kv, kv))
    return q, k, v


def rounded(x: F32, bits: int) -> F32:
    """Return x after quantisation in a packed cache, in float32."""
    form = {"group_size": 64, "bits": bits}
    return np.array(mx.dequantize(*mx.quantize(mx.array(x), **form), **form))


def run(b: Backend, qkv: tuple[F32, F32, F32], spec: Attention, cuts: list[int]) -> F32:
    """Compute attention of all rows in pieces of these lengths, in the backend's dtype."""
    rows, kv, size = qkv[1].shape
    cache, at, out = b.new_cache(CacheShape(1, kv, size), rows), 0, []
    for n in cuts:
        piece = [b.put(t[at : at + n]) for t in qkv]
        if isinstance(b, MlxBackend):
            piece = [x.astype(b.dtype) for x in piece]
        out.append(b.to_host(b.attention(*piece, spec, b.step((Segment(cache, n),)))))
        cache.length, at = cache.length + n, at + n
    return np.concatenate(out)


PLAIN = Attention(0, 0.2)
WINDOW = Attention(0, 0.2, window=5, softcap=3.0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("spec", [PLAIN, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("scores", [1, 400, 1 << 20], ids=["row by row", "two rows", "at once"])
def test_packed_keys_and_values_mean_their_dequantised_numbers(
    bits: int, spec: Attention, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BLOCKS, scores)
    monkeypatch.setenv("TINYCHAT_MLX_KV_BITS", str(bits))
    q, k, v = random(11, 4, 2, 64)
    expected = run(ReferenceBackend(), (q, rounded(k, bits), rounded(v, bits)), spec, [11])
    for cuts in ([11], [6, 1, 1, 3]):
        agree(run(MlxBackend(exact=True), (q, k, v), spec, cuts), expected)


@pytest.mark.parametrize(
    "query, key, spread", [(0.0, 0.0, 1.0), (40.0, 40.0, 0.0), (10.0, 40.0, 0.1)], ids=str
)
def test_large_queries_and_keys_are_told_apart_in_float16(
    query: float, key: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 products of 40 by 40 exceed 65504. Scores near 3200 that differ by 1 are equal in float16."""
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    monkeypatch.setenv("TINYCHAT_MLX_KV_BITS", "8")
    q, k, v = random(9, 4, 2, 64)
    q, k, v = (x.astype(np.float16).astype(np.float32) for x in (query + spread * q, key + spread * k, v))
    spec = Attention(0, 0.125)
    expected = run(ReferenceBackend(), (q, rounded(k, 8), rounded(v, 8)), spec, [9])
    got = run(MlxBackend(exact=True), (q, k, v), spec, [8, 1])
    # A score sums 64 products in float32, and so does the reference's; the weights p change with it. p, v's
    # scales and biases and the running sum are halves: 9 terms and 3 roundings, twice for MLX's CPU loop,
    # which sums scale and bias separately.
    score = 64 * 2**-24 * 0.125 * 64 * (query + spread) * (key + spread)
    assert np.abs(got - expected).max() <= (4 * score + 2 * 12 * 2**-11) * np.abs(v).max()


@pytest.mark.parametrize("variant", ["gemma2", "bloom", "cohere2", "qwen2-window"])
def test_a_prompt_in_blocks_of_rows_means_the_same(
    variant: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softcap and windows, ALiBi, and MLX's own operation; 40 rows in blocks that do not divide them."""
    t = tiny(variant, tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True))
    expected = logits(d, t.ids, [40])
    for rows in (1, 7):
        monkeypatch.setattr(BLOCKS, rows * 4 * d.config.num_attention_heads * 40)
        agree(logits(d, t.ids, [13, 27]), expected)
        agree(logits(d, t.ids, [40]), expected)


@pytest.mark.parametrize(
    "spec, size", [(Attention(0, 0.1, softcap=9.0), 64), (Attention(0, 0.1), 192)], ids=str
)
def test_scores_of_a_prompt_stay_small(spec: Attention, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 rows of 8 heads after 1920 tokens: several arrays of 8 MB of scores if they were computed at once."""
    heads, kv, rows, before = 8, 1, 128, 1920
    monkeypatch.setattr(BLOCKS, 1 << 18)
    b = MlxBackend(exact=True)
    cache = b.new_cache(CacheShape(1, kv, size), before + rows)
    cache.length = before
    step = b.step((Segment(cache, rows),))
    q, k, v = (b.put(x) for x in random(rows, heads, kv, size))
    mx.eval(q, k, v, cache.arrays)
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    y = b.attention(q, k, v, spec, step)
    mx.eval(y)
    wide = 2 * cache.nbytes  # keys in float32, transposed
    # three arrays of scores in each of two blocks, their results, and the joined result
    assert mx.get_peak_memory() - held < wide + 2 * 3 * (1 << 18) + 3 * y.nbytes


def test_packed_caches_are_smaller_and_refuse_what_they_cannot_hold(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = tiny("llama-tied", tiny_root)
    monkeypatch.setenv("TINYCHAT_MLX_KV_BITS", "8")
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    got = logits(d, t.ids, [30, *[1] * 10])
    # the 8-bit error is at most half of 1/255 of a group's range: about 1 % of a typical value
    assert np.abs(got - t.logits).max() < 0.02 * np.abs(t.logits).max()
    cache = d.new_cache(1000)
    whole = bytes_per_token(cache.shape, packed_parts(cache.shape, mx.float32, 8)) * 1000
    assert cache.nbytes + cache.owed == whole < 0.35 * cache.shape.bytes_per_token(4) * 1000
    with pytest.raises(BackendError, match="24 per head cannot be packed"):
        d.backend.new_cache(CacheShape(1, 2, 24), 16)
    monkeypatch.setenv("TINYCHAT_MLX_KV_BITS", "5")
    with pytest.raises(BackendError, match="KV_BITS: 5 bits are not supported — give 4 or 8"):
        MlxBackend(exact=True)
