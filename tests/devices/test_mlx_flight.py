"""A step is issued before the previous token is read, and the cache is still written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mlx_models import agree, answer, decoder, logits, tokens
from tiny_models import tiny

from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.cache import SPAN, MlxCache
from tinychat_mlx.backends.mlx.pipelining import Pipeline
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Attention, CacheShape, Segment
from tinychat_mlx.engine.engine import Engine
from tinychat_mlx.weights.weight import Dense


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def attentions(layers: int, rows: int, held: int) -> tuple[MlxBackend, MlxCache, Callable[[Any], Any]]:
    """Return a backend, its cache with `rows` tokens, and a step of only attention: little work, many reads."""
    b, heads, size = MlxBackend(exact=True), 2, 64
    cache = b.new_cache(CacheShape(layers, heads, size), held)
    b.step((Segment(cache, held),))  # reserves
    cache.length = rows
    table = b.pack(
        Dense("t", np.random.default_rng(0).standard_normal((256, heads * size)).astype(np.float32))
    )

    def advance(token: Any) -> Any:
        step, x = b.step((Segment(cache, 1),)), b.embed(table, token)
        for layer in range(layers):
            x = x.reshape(1, heads, size)
            x = b.attention(x, x, x, Attention(layer, 0.1), step)
        cache.length += 1
        return x

    return b, cache, advance


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_step_in_flight_does_not_copy_the_cache(layers: int) -> None:
    """The previous step reads the cache's arrays while the next is encoded.

    Without halves MLX would copy them all.
    """
    b, cache, advance = attentions(layers, rows=32000, held=1 << 15)
    draw = b.sampler(0.0, 0, 1.0, 0.0, None)
    assert draw is not None and cache.nbytes == layers * 32 << 20
    token = draw(advance(b.ids([5])))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(8):
        following = draw(advance(token))
        b.to_host(token)
        token = following
    b.to_host(token)
    assert mx.get_peak_memory() - before < 4 << 20  # the keys of one layer are 16 MB


@pytest.mark.parametrize("compiled", [True, False])
def test_the_cache_is_written_in_place(compiled: bool, tiny_root: Path) -> None:
    """Step by step, waiting for each."""
    d = decoder(tiny("llama", tiny_root).folder, MlxBackend(exact=True, compiled=compiled))
    cache = d.new_cache(1 << 16)
    cache.length = (1 << 16) - 10
    d.backend.to_host(d.forward((5,), cache))
    assert cache.nbytes == cache.shape.bytes_per_token(4) << 16 and cache.nbytes > 30 << 20
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for token in range(5, 8):
        d.backend.to_host(d.forward((token,), cache))
    assert mx.get_peak_memory() - before < cache.nbytes / 4


def test_a_token_is_read_while_the_next_step_runs() -> None:
    """Reading must not be one more operation of the device: it would wait behind the step in flight.

    An array that only gives its values: MLX can compute nothing with it.
    """

    class Token:
        dtype = mx.int32

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.array([4], np.int32)

    assert MlxBackend(exact=True).to_host(Token()).tolist() == [4.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_what_is_read_is_float32(dtype: str) -> None:
    got = MlxBackend(exact=True).to_host(mx.array([[1.5, -3.0]]).astype(getattr(mx, dtype)))
    assert got.dtype == np.float32 and got.tolist() == [[1.0 if dtype == "int32" else 1.5, -3.0]]
    got[0, 0] = 7  # the caller owns the array


def test_the_next_step_is_issued_before_a_token_is_read(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half is issued as soon as it is known, then the rest: the device never waits for Python."""
    d = decoder(tiny("llama", tiny_root).folder, MlxBackend(exact=True))
    told: list[str] = []
    numbers: dict[int, int] = {}  # a token's array -> its number in the answer
    kept: list[Any] = []  # keeps ids unique
    issue, read = mx.async_eval, d.backend.to_host

    def issued(x: Any) -> None:
        kept.append(x)
        if x.shape == (1,):
            numbers[id(x)] = len(numbers)
        told.append(f"issue {numbers[id(x)]}" if id(x) in numbers else "half")
        issue(x)

    def to_host(x: Any) -> Any:
        told.append(f"read {numbers[id(x)]}" if id(x) in numbers else "logits")
        return read(x)

    monkeypatch.setattr(mx, "async_eval", issued)
    monkeypatch.setattr(d.backend, "to_host", to_host)
    said = answer(Engine(d, 64), [5, 9, 33], temperature=0, max_tokens=4)
    assert len(tokens(said)) == 4
    expected = ["half", "issue 0"]
    for n in range(3):
        expected += ["half", f"issue {n + 1}", f"read {n}"]
    assert told == [*expected, "read 3"]


def test_a_cache_holds_little_more_than_was_said(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinychat_mlx.backends.mlx.cache.SPAN", 8)
    t = tiny("llama", tiny_root)
    expected = logits(decoder(t.folder, MlxBackend(exact=True)), t.ids, [40])
    for compiled in (True, False):
        d = decoder(t.folder, MlxBackend(exact=True, compiled=compiled))
        cache, held = d.new_cache(36), []
        each = cache.shape.bytes_per_token(4)
        for i, token in enumerate(t.ids[:36]):
            agree(d.backend.to_host(d.forward((token,), cache)), expected[i : i + 1])
            held.append(cache.held)
            assert cache.nbytes == each * cache.held and cache.owed == each * (36 - cache.held)
        assert held == [8] * 8 + [16] * 8 + [32] * 16 + [36] * 4
        cache.rewind(3)
        agree(d.backend.to_host(d.forward(t.ids[3:20], cache, last_only=False)), expected[3:20])
        assert cache.held == 36


def test_growing_needs_one_array_more(tiny_root: Path) -> None:
    """The old arrays are freed one by one, even if a step that reads them is in flight."""
    b, cache, advance = attentions(8, rows=1, held=1 << 14)
    cache = b.new_cache(cache.shape, 1 << 15)
    b.step((Segment(cache, 1 << 14),))
    token = advance(b.ids([5]))
    mx.async_eval(token)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    b.step((Segment(cache, 1 << 15),))
    assert cache.held == 1 << 15
    # half is new; an array is 1/16 of the total
    assert mx.get_peak_memory() - before < 1.2 * cache.nbytes / 2


def test_what_caches_may_still_grow_by_is_taken() -> None:
    b = MlxBackend(exact=True)
    shape = CacheShape(16, 8, 64)  # 64 KiB per token
    b.chip = b.chip.__class__("Apple M1", True, 13, 8 << 30, 1 << 30)
    first = b.new_cache(shape, 8000)
    assert first.held == SPAN and first.owed == (8000 - SPAN) << 16
    with pytest.raises(BackendError, match=r"0\.\d\d GB are in use and Apple M1 can use 1\.00 GB"):
        b.new_cache(shape, 8000)
    del first
    assert b.new_cache(shape, 8000).capacity == 8000


def test_a_captured_step_waits_for_the_one_before(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one program without halves: MLX writes in place only what the previous step has read."""
    d = decoder(tiny("llama", tiny_root).folder, MlxBackend(exact=True, compiled=True))
    cache, draw = d.new_cache(16), d.backend.sampler(0.0, 0, 1.0, 0.0, None)
    assert draw is not None
    first = draw(d.advance(d.backend.ids([5]), cache))
    waited: list[Any] = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: waited.extend(a) or evaluate(*a))
    draw(d.advance(first, cache))
    assert any(x is first for x in waited)


def test_only_a_step_that_writes_our_caches_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm runs a whole step ahead and copies its caches. With its engine we are as fast."""
    waited: list[Any] = []
    monkeypatch.setattr(mx, "eval", waited.append)
    flight, steps = Pipeline(nullcontext), [mx.zeros(n) + 1 for n in range(1, 5)]
    for step in steps[:2]:
        flight.issue(step)
    assert not waited
    flight.writing()
    flight.issue(steps[2])
    assert len(waited) == 1 and waited[0] is steps[1]
    flight.issue(steps[3])
    assert len(waited) == 1
