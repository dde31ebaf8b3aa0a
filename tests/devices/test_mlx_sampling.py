"""Sampling on the device with one step in flight: the same text, and only tokens that the host would allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mlx_models import answer, decoder, tokens
from tiny_models import tiny

from tinychat_mlx.backends.mlx import sampling
from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.engine.engine import Engine
from tinychat_mlx.engine.sampler import SamplingParams, distribution, penalised


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def engines(tiny_root: Path) -> tuple[Engine, Engine]:
    folder = tiny("qwen3", tiny_root).folder
    on_host = MlxBackend(exact=True)
    on_host.sampler = lambda *a: None  # type: ignore[method-assign]
    return Engine(decoder(folder, MlxBackend(exact=True, compiled=True)), 64), Engine(
        decoder(folder, on_host), 64
    )


def test_one_step_ahead_gives_the_same_greedy_text(engines: tuple[Engine, Engine]) -> None:
    ahead, in_turn = engines
    for params in ({"max_tokens": 20}, {}):
        got, expected = (answer(e, [5, 9, 33], temperature=0, **params) for e in (ahead, in_turn))
        assert tokens(got) == tokens(expected) and len(tokens(got)) >= 20
        for name in ("finish_reason", "completion_tokens", "context_used"):
            assert getattr(got[-1].stats, name) == getattr(expected[-1].stats, name)
    turn = [5, 9, 33, *tokens(got)[:10], 40, 41]
    got, expected = (answer(e, turn, temperature=0, max_tokens=9) for e in (ahead, in_turn))
    assert tokens(got) == tokens(expected)
    assert got[-1].stats.cached_tokens == expected[-1].stats.cached_tokens == 13


def test_a_repetition_penalty_is_the_host_s(engines: tuple[Engine, Engine]) -> None:
    """Qwen2.5 sets one, so it must not prevent the step in flight. Prompt and answer both count."""
    ahead = engines[0]
    assert ahead.decoder.backend.sampler(0, 0, 1, 0, None, 1.5, [1]) is not None
    plain = tokens(answer(ahead, [5, 9, 33], temperature=0, max_tokens=30))
    for penalty in (1.5, 0.7):
        given = {"temperature": 0, "max_tokens": 30, "repetition_penalty": penalty}
        for prompt in ([5, 9, 33], [5, 9, 33, plain[0], plain[1], plain[1]]):
            got, expected = (tokens(answer(e, prompt, **given)) for e in engines)
            assert got == expected
        assert got != plain
    rng, ids = np.random.default_rng(1), [3, 3, 17, 49]
    x = rng.standard_normal(50).astype(np.float32)
    shown: list[np.ndarray] = []

    def draw(logits: Any) -> Any:
        shown.append(np.array(logits))
        return mx.array([7], mx.int32)

    drawn = sampling.penalising(draw, 1.3, ids)
    for _ in range(2):
        drawn(mx.array(x[None]))
    assert np.allclose(shown[0][0], penalised(x, ids, 1.3), rtol=1e-6)
    assert np.allclose(shown[1][0], penalised(x, [*ids, 7], 1.3), rtol=1e-6)


def test_the_step_begun_ahead_of_a_stop_is_taken_back(engines: tuple[Engine, Engine]) -> None:
    ahead = engines[0]
    whole = tokens(answer(ahead, [5, 9, 33], temperature=2, seed=3, max_tokens=20))
    stop = next(t for i, t in enumerate(whole) if i > 1 and t not in whole[:i])
    events = answer(ahead, [5, 9, 33], frozenset({stop}), temperature=2, seed=3, max_tokens=20)
    said = whole[: whole.index(stop)]
    assert tokens(events) == said and events[-1].stats.finish_reason == "stop"
    assert ahead.cache.length == len(ahead.ids) == 3 + len(said)


def test_the_device_draws_what_the_host_would_allow() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(200) * 3).astype(np.float32)
    cases = [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}]
    for given in cases:
        p = SamplingParams(**({"temperature": 0.8, "top_p": 1.0} | given))
        ids, expected = distribution(x, p)
        kept = np.array(mx.softmax(sampling.filtered(mx.array(x), p.temperature, p.top_k, p.top_p, p.min_p)))
        assert sorted(np.flatnonzero(kept)) == sorted(ids)
        assert np.abs(kept[ids] - expected).max() < 1e-5  # float32 against float64
    draw = sampling.drawer(0.8, 5, 1.0, 0.0, seed=11)
    ids, expected = distribution(x, SamplingParams(temperature=0.8, top_k=5, top_p=1.0))
    drawn = np.array([draw(mx.array(x[None])).item() for _ in range(2000)])
    for token, p in zip(ids, expected, strict=True):  # five standard deviations of a binomial
        assert abs((drawn == token).mean() - p) < 5 * (p * (1 - p) / 2000) ** 0.5
    again = sampling.drawer(0.8, 5, 1.0, 0.0, seed=11)
    assert [again(mx.array(x[None])).item() for _ in range(50)] == drawn[:50].tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_told(bad: float, temperature: float) -> None:
    x = np.zeros((1, 50), np.float32)
    x[0, 3] = bad
    assert sampling.drawer(temperature, 0, 0.9, 0.0, 1)(mx.array(x)).item() == -1
