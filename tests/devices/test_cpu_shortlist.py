"""A head read at half its width gives the same greedy token, and nearly the same distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from checkout import DATA

import tinychat_mlx
from tinychat_mlx.awq.calibration.tokens import encoded
from tinychat_mlx.awq.search.quantizer import round_to_nearest
from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.backend import CpuBackend
from tinychat_mlx.contract import Choice, Norm, Segment
from tinychat_mlx.engine.sampler import TAIL, SamplingParams, choice_of, distribution
from tinychat_mlx.loaded_model import Model
from tinychat_mlx.model.decoder import Graph
from tinychat_mlx.weights.weight import Packed, pack_codes

GREEDY = Choice()


@pytest.fixture(params=c.instruction_sets())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuBackend:
    monkeypatch.setenv("TINYCHAT_CPU_ISA", request.param)
    return CpuBackend(threads=2)


@pytest.fixture(autouse=True)
def seed() -> None:
    global RNG
    RNG = np.random.default_rng(3)


def randn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def head_of(backend: CpuBackend, w: Packed) -> Any:
    """Return (logits of a row under a choice, the number of tiles of 16 read at full width)."""
    norm = Norm("n", "rms", backend.put(np.ones(w.shape[1], np.float32)), None, 1e-6)
    handle = backend.pack(w)

    def run(x: np.ndarray, choice: Choice | None) -> tuple[np.ndarray, int]:
        backend.choice.tiles = 0
        y = backend.to_host(backend.head(x, norm, handle, choice))[0]
        return y, backend.choice.tiles

    return run


@pytest.mark.parametrize(("n", "k", "group"), [(1000, 256, 128), (3072, 128, 32), (37, 64, 64)])
def test_the_largest_logit_is_found_and_its_tile_has_all_its_bits(
    backend: CpuBackend, n: int, k: int, group: int
) -> None:
    head = head_of(backend, round_to_nearest(0.05 * randn(n, k), 8, group).packed("w", None))
    read = []
    for _ in range(40):
        x = randn(1, k)
        (whole, none), (y, tiles) = head(x, None), head(x, GREEDY)
        best = int(whole.argmax())
        assert y.argmax() == best and none == 0
        same = y == whole
        assert same[best // 16 * 16 : best // 16 * 16 + 16].all()
        assert same.reshape(-1, 16).all(1).sum() == tiles if n % 16 == 0 else same.sum() >= 16 * (tiles - 1)
        read.append(tiles)
    assert min(read) >= 1 and (n < 100 or np.mean(read) < n / 16 / 2)  # the rest was skipped


def test_an_estimate_errs_as_much_as_its_lower_halves_can(backend: CpuBackend) -> None:
    """|scale * (lower - 7.5) * x| <= 7.5 scale |x|, summed over the rounded inputs."""
    w = round_to_nearest(0.05 * randn(800, 128), 8, 64).packed("w", None)
    head = head_of(backend, w)
    for _ in range(20):
        x = randn(1, 128)
        whole, y = head(x, None)[0], head(x, GREEDY)[0]
        normed = x / np.sqrt((x**2).mean() + 1e-6)
        size = np.abs(normed).reshape(2, 64)
        rounded = (size + size.max(1, keepdims=True) / 254).sum(1)
        bound = 7.5 * w.scales.astype(np.float64) @ rounded
        assert np.all(np.abs(y - whole) <= bound * 1.0001)
        assert np.abs(y - whole).max() > bound.mean() / 100  # the estimate is not exact


def test_tokens_that_are_nearly_as_good_are_all_read_whole(backend: CpuBackend) -> None:
    """Rows that differ only in their lower halves have one estimate; only all bits show which is the largest."""
    codes = RNG.integers(0, 256, (640, 128), dtype=np.uint8)
    x = randn(1, 128)
    rows = [5, 100, 250, 333, 639]
    codes[rows] = np.where(x > 0, 240, 0)
    for i, row in enumerate(rows):
        codes[row] += np.uint8(i) * (x[0] > 0)
    scales = np.full((640, 1), 0.01, np.float16)
    head = head_of(backend, Packed("w", pack_codes(codes, 8), scales, -128 * scales, 8, 128))
    y, tiles = head(x, GREEDY)
    assert y.argmax() == 639 and tiles == len(rows)
    assert np.array_equal(y[rows], head(x, None)[0][rows])


def test_flat_logits_are_all_read_whole_and_peaked_ones_are_not(backend: CpuBackend) -> None:
    w = round_to_nearest(0.01 * randn(1600, 128), 8, 128).packed("w", None)
    head, x = head_of(backend, w), randn(1, 128)
    whole, _ = head(x, None)
    y, tiles = head(x, Choice(1.0, TAIL))
    assert tiles == 100 and np.array_equal(y, whole)  # each token has about 1 / 1600
    _, tiles = head(x, Choice(0.005, TAIL))
    assert tiles < 50
    _, tiles = head(x, Choice(1.0, 2000.0))  # all of them may be approximate
    assert tiles < 50


def test_logits_that_are_no_numbers_stay_so(backend: CpuBackend) -> None:
    head = head_of(backend, round_to_nearest(randn(64, 64), 8, 64).packed("w", None))
    x = randn(1, 64)
    x[0, 3] = np.nan
    for choice in (GREEDY, Choice(1.0, TAIL)):
        assert not np.isfinite(head(x, choice)[0]).any()


def test_heads_that_have_no_halves_or_a_bias_are_read_whole(backend: CpuBackend) -> None:
    x = randn(1, 128)
    for w in (
        round_to_nearest(randn(64, 128), 4, 128).packed("w", None),
        round_to_nearest(randn(64, 128), 8, 128).packed("w", randn(64)),
    ):
        y, tiles = head_of(backend, w)(x, GREEDY)
        assert tiles == 0 and np.array_equal(y, head_of(backend, w)(x, None)[0])


# the model -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo() -> Model:
    return tinychat_mlx.load("demo", backend="cpu", threads=2)


@pytest.fixture(scope="module")
def rows(demo: Model) -> np.ndarray:
    """Last hidden states of held-out text, one row each."""
    decoder, backend = demo.engine.decoder, demo.backend
    ids = encoded(str(DATA / "demo_heldout_text.jsonl"), demo.tokenizer)[:1024]
    step = backend.step((Segment(decoder.new_cache(1024), 1024),))
    return np.array(decoder._hidden(backend.ids(ids), step))[::4]


@pytest.mark.parametrize(
    "given", [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 1.0}], ids=str
)
def test_what_may_be_drawn_on_real_text_stays_as_it_was(
    demo: Model, rows: np.ndarray, given: dict[str, float]
) -> None:
    """In the worst case approximate tokens lose or gain all their probability; half of that is the change."""
    params = SamplingParams(**given)
    choice, decoder = choice_of(params), demo.engine.decoder
    assert choice is not None
    moved, coarse = [], []
    for row in rows:
        x = np.ascontiguousarray(row[None])
        whole, y = (np.array(decoder._logits(x, how))[0] for how in (None, choice))
        assert y.argmax() == whole.argmax()
        coarse.append((y != whole).mean())
        if params.temperature:
            p, q = np.zeros(len(y)), np.zeros(len(y))
            for into, logits in ((p, whole), (q, y)):
                ids, probabilities = distribution(logits, params)
                into[ids] = probabilities
            moved.append(np.abs(p - q).sum() / 2)
    assert np.mean(coarse) > (0.9 if params.top_p < 1 else 0.5)
    assert not moved or max(moved) <= choice.tail and np.mean(moved) < choice.tail / 10


def test_a_captured_step_obeys_each_calls_choice(demo: Model) -> None:
    decoder, ids = demo.engine.decoder, [5, 9, 33, 7, 21, 40]
    whole = demo.logits(ids)
    for choices in ([None, GREEDY, None], [GREEDY, None, Choice(0.7, TAIL)]):
        cache = decoder.new_cache(8)
        decoder.forward(ids[:3], cache)
        for at, choice in enumerate(choices, 3):
            y = np.array(decoder.forward(ids[at : at + 1], cache, choice=choice))[0]
            assert np.array_equal(y, whole[at]) == (choice is None) and y.argmax() == whole[at].argmax()


def test_who_needs_every_logit_gets_it() -> None:
    assert choice_of(SamplingParams(repetition_penalty=1.1)) is None
    assert choice_of(SamplingParams(temperature=0.0, top_p=1.0)) == Choice(0.0, TAIL)
    assert choice_of(SamplingParams(temperature=0.5, top_p=0.9)) == Choice(0.5, pytest.approx(0.05))


def test_a_choice_is_made_before_logits_are_scaled_and_capped(demo: Model) -> None:
    def seen(choice: Choice | None, **config: float) -> Choice | None:
        return Graph(replace(demo.config, **config), demo.backend).before_scaling(choice)  # type: ignore[arg-type]

    warm = Choice(0.8, TAIL)
    assert seen(warm) == warm and seen(None) is None
    assert seen(warm, logit_scale=0.25) == Choice(3.2, TAIL)  # a distance of 3.2 there is 0.8 here
    assert seen(GREEDY, logit_scale=0.25, final_softcap=30.0) == GREEDY
    assert seen(warm, final_softcap=30.0) is None and seen(GREEDY, logit_scale=-1.0) is None
