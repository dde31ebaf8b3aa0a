"""The engine: reuse across turns, cancellation, the full context, stop strings, reproducibility."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny

import tinychat_mlx
from tinychat_mlx.base.errors import ContextFullError, UsageError
from tinychat_mlx.contract import Backend
from tinychat_mlx.engine.engine import FIRST_ROWS, PREFILL_ROWS, Engine, Event
from tinychat_mlx.engine.sampler import SamplingParams
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.model.decoder import Decoder
from tinychat_mlx.weights.checkpoint import Checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=12)


class Letters:
    """A stand-in for text: token t is the character chr(200 + t)."""

    def push(self, token: int) -> str:
        return chr(200 + token)

    def flush(self) -> str:
        return ""


@pytest.fixture(scope="module")
def model(tiny_root: Path) -> tinychat_mlx.Model:
    t = tiny("llama", tiny_root)
    return tinychat_mlx.load(t.folder, backend="reference")


@pytest.fixture
def engine(model: tinychat_mlx.Model) -> Engine:
    return Engine(model.engine.decoder, 128)


def answer(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY, **kw: Any) -> list[Event]:
    return list(engine.generate(prompt, params, kw.pop("stop_ids", frozenset()), Letters(), **kw))


def tokens(events: list[Event]) -> list[int]:
    return [ord(c) - 200 for e in events for c in e.text]


def naive(model: tinychat_mlx.Model, prompt: list[int], n: int) -> list[int]:
    """Greedy decoding without a cache: the whole text is computed for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_naive_loop(model: tinychat_mlx.Model, engine: Engine) -> None:
    prompt = [5, 9, 33, 7]
    assert tokens(answer(engine, prompt)) == naive(model, prompt, 12)


def test_a_second_turn_computes_only_its_new_tokens(model: tinychat_mlx.Model, engine: Engine) -> None:
    first = answer(engine, [5, 9, 33, 7])
    said = tokens(first)
    turn = [5, 9, 33, 7, *said, 40, 41, 42]
    events = answer(engine, turn)
    stats = events[-1].stats
    # the last sampled token was never computed; three are new
    assert stats is not None and stats.cached_tokens == len(turn) - 4
    assert [e.total for e in events if e.kind == "prefill"] == [4]
    assert tokens(events) == naive(model, turn, 12)


def test_an_edited_history_is_computed_from_the_edit_on(model: tinychat_mlx.Model, engine: Engine) -> None:
    answer(engine, list(range(3, 30)))
    edited = [*range(3, 13), 60, *range(14, 30)]
    events = answer(engine, edited)
    assert events[-1].stats is not None and events[-1].stats.cached_tokens == 10
    assert tokens(events) == naive(model, edited, 12)


def test_the_same_prompt_again_computes_one_token(engine: Engine) -> None:
    prompt = list(range(3, 30))
    one, two = answer(engine, prompt), answer(engine, prompt)
    assert tokens(one) == tokens(two)
    assert two[-1].stats is not None and two[-1].stats.cached_tokens == len(prompt) - 1


@pytest.mark.parametrize(
    ("row_s", "expected"),
    [
        (1e-9, [FIRST_ROWS, PREFILL_ROWS, 3]),  # a fast device computes the maximum at a time
        # 150 rows in half a second: the next smaller step
        (1 / 300, [FIRST_ROWS, *[4 * FIRST_ROWS] * 5, 35]),
        # A small board: 1.2 s between two points where it can be stopped. The rest is too short for another
        # step.
        (1 / 20, [FIRST_ROWS] * 21 + [35]),
    ],
)
def test_long_prompts_are_computed_in_pieces_of_half_a_second(
    model: tinychat_mlx.Model, monkeypatch: pytest.MonkeyPatch, row_s: float, expected: list[int]
) -> None:
    """The pieces follow the speed of the first one. The answer equals that of one piece."""
    now, forward = 0.0, model.engine.decoder.forward

    def timed(ids: Any, cache: Any, **kw: Any) -> Any:
        nonlocal now
        now += row_s * len(ids)
        return forward(ids, cache, **kw)

    prompt = np.random.default_rng(0).integers(3, 97, FIRST_ROWS + PREFILL_ROWS + 3).tolist()
    with monkeypatch.context() as m:
        m.setattr(model.engine.decoder, "forward", timed)
        m.setattr("tinychat_mlx.engine.engine.time.perf_counter", lambda: now)
        events = answer(Engine(model.engine.decoder, len(prompt) + 20), prompt)
    done = [0, *[e.done for e in events if e.kind == "prefill"]]
    assert [b - a for a, b in itertools.pairwise(done)] == expected
    assert {e.total for e in events if e.kind == "prefill"} == {len(prompt)}
    assert tokens(events) == naive(model, prompt, 12)


def test_closing_cancels_within_one_token_and_loses_nothing(
    model: tinychat_mlx.Model, engine: Engine
) -> None:
    calls = 0
    forward = engine.decoder.forward

    class Counting:
        config, backend, new_cache = engine.decoder.config, engine.decoder.backend, engine.decoder.new_cache

        def forward(self, *a: Any, **k: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*a, **k)

    engine.decoder = Counting()  # type: ignore[assignment]
    events: Iterator[Event] = engine.generate([5, 9, 33, 7], GREEDY, frozenset(), Letters())
    said = []
    for event in events:
        said += [ord(c) - 200 for c in event.text]
        if len(said) == 5:
            break
    before = calls
    events.close()  # type: ignore[attr-defined]
    assert calls == before, "nothing is computed after the close"
    turn = [5, 9, 33, 7, *said, 50]
    after = answer(engine, turn)
    assert after[-1].stats is not None and after[-1].stats.cached_tokens >= len(turn) - 2
    assert tokens(after) == naive(model, turn, 12)


def test_an_interrupt_inside_a_step_leaves_the_cache_right(
    model: tinychat_mlx.Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KeyboardInterrupt can come out of any call; the next answer must not build on half a token."""
    backend, calls = engine.decoder.backend, 0
    original = backend.to_host

    def interrupt(x: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(x)

    with monkeypatch.context() as m:
        m.setattr(backend, "to_host", interrupt)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, [5, 9, 33, 7])
    assert tokens(answer(engine, [5, 9, 33, 8])) == naive(model, [5, 9, 33, 8], 12)


def test_a_stop_token_ends_the_answer_unseen(engine: Engine) -> None:
    # with greedy decoding this model repeats itself
    params = SamplingParams(temperature=2.0, seed=1, max_tokens=12)
    whole = tokens(answer(engine, [5, 9, 33, 7], params))
    stop = next(t for i, t in enumerate(whole) if i > 1 and t not in whole[:i])
    events = answer(engine, [5, 9, 33, 7], params, stop_ids=frozenset({stop}))
    assert tokens(events) == whole[: whole.index(stop)]
    assert events[-1].stats is not None and events[-1].stats.finish_reason == "stop"


def test_max_tokens_and_the_end_of_the_context_are_told_apart(model: tinychat_mlx.Model) -> None:
    engine = Engine(model.engine.decoder, 16)
    short = answer(engine, [5, 9, 33, 7])[-1].stats
    full = answer(engine, list(range(3, 13)), SamplingParams(temperature=0))[-1].stats
    assert short is not None and (short.finish_reason, short.completion_tokens) == ("length", 12)
    assert full is not None and full.finish_reason == "context"
    assert full.completion_tokens == 16 - 10 + 1, "every position of the context is used"
    assert tokens(answer(engine, [5, 9], GREEDY)) == naive(model, [5, 9], 12)


def test_a_prompt_that_leaves_no_room_is_refused_with_the_counts(model: tinychat_mlx.Model) -> None:
    engine = Engine(model.engine.decoder, 16)
    with pytest.raises(ContextFullError, match=r"20 tokens.*16"):
        answer(engine, [5] * 20)
    with pytest.raises(UsageError, match="empty"):
        answer(engine, [])
    with pytest.raises(UsageError, match="vocabulary"):
        answer(engine, [97])


def test_seeded_sampling_repeats_itself(engine: Engine) -> None:
    def draw(seed: int) -> list[int]:
        return tokens(answer(engine, [5, 9, 33], SamplingParams(temperature=1.5, seed=seed, max_tokens=20)))

    assert draw(1) == draw(1) != draw(2)


def test_a_second_answer_at_the_same_time_is_refused(engine: Engine) -> None:
    first = engine.generate([5, 9], GREEDY, frozenset(), Letters())
    next(first)
    with pytest.raises(UsageError, match="already generating an answer"):
        next(engine.generate([5, 9], GREEDY, frozenset(), Letters()))
    first.close()  # type: ignore[attr-defined]
    assert answer(engine, [5, 9])


def test_stats_count_what_happened(engine: Engine) -> None:
    stats = answer(engine, [5, 9, 33, 7])[-1].stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (4, 0, 12)
    assert stats.context_used == 15 and stats.context_max == 128
    assert 0 < stats.ttft_s < 60 and stats.decode_tok_s > 0


def test_logits_ignore_what_was_cached(model: tinychat_mlx.Model, tiny_root: Path) -> None:
    before = model.logits([5, 9, 33])
    answer(model.engine, [7, 7, 7])
    assert (model.logits([5, 9, 33]) == before).all()


def test_a_dropped_decoder_gives_its_memory_back_at_once(backend: Backend, tiny_root: Path) -> None:
    """Not at the next garbage collection: until then two models would be in memory."""
    source = Checkpoint.open(tiny("llama", tiny_root).folder)
    gc.disable()
    try:
        decoder = Decoder(parse_config(source.config), source, backend)
        decoder.forward([1], decoder.new_cache(4))
        gone = weakref.ref(decoder)
        del decoder
        assert gone() is None
    finally:
        gc.enable()
