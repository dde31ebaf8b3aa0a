"""Sampling equals transformers' processors, and generation_config keeps its meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat_mlx.base.errors import ConfigError, TinychatError, UsageError
from tinychat_mlx.engine.sampler import (
    Sampler,
    SamplingParams,
    distribution,
    from_generation_config,
    penalised,
)

RNG = np.random.default_rng(0)


def oracle(logits: np.ndarray, seen: list[int], p: SamplingParams) -> np.ndarray:
    """Return probabilities (V,) by transformers' processors, in its order."""
    import torch
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores, ids = torch.tensor(logits)[None].double(), torch.tensor([seen])
    steps: list[Any] = []
    if p.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    steps.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        steps.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        steps.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        steps.append(MinPLogitsWarper(p.min_p))
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


CASES = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.3, "top_p": 1.0},
    {"temperature": 1.7, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 7},
    {"temperature": 0.8, "top_p": 0.7, "top_k": 20},
    {"temperature": 1.2, "top_p": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_distribution_equals_transformers(case: dict[str, Any]) -> None:
    p = SamplingParams(**case)
    for _ in range(20):
        logits = (RNG.standard_normal(200) * 3).astype(np.float32)
        seen = RNG.integers(0, 200, 30).tolist()
        expected = oracle(logits, seen, p)
        after = penalised(logits, seen, p.repetition_penalty) if p.repetition_penalty != 1 else logits
        ids, probabilities = distribution(after, p)
        got = np.zeros(200)
        got[ids] = probabilities
        # one float32 rounding of the penalised logit (|l| < 16: 1e-6), then exp
        np.testing.assert_allclose(got, expected, atol=2e-6)


def test_draws_follow_the_distribution() -> None:
    """20,000 draws; each count is within 5 standard deviations of its expectation."""
    logits = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=1.0, seed=1))
    counts = np.bincount([sampler(logits) for _ in range(20000)], minlength=4)
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    assert (np.abs(counts - 20000 * p) < 5 * np.sqrt(20000 * p * (1 - p))).all()


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    logits = RNG.standard_normal(500).astype(np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler(logits) for _ in range(50)]

    assert draw(3) == draw(3) != draw(4)


def test_temperature_zero_is_the_largest_logit() -> None:
    logits = np.array([0.1, 0.5, 0.5, -3], np.float32)
    assert Sampler(SamplingParams(temperature=0))(logits) == 1


def test_logits_that_are_not_finite_are_named_not_sampled() -> None:
    with pytest.raises(TinychatError, match="not finite"):
        Sampler(SamplingParams())(np.array([0, np.nan], np.float32))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(0.05, 5),
    st.integers(0, 50),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_any_setting_leaves_a_distribution(raw: list[float], t: float, k: int, p: float, m: float) -> None:
    params = SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    ids, probabilities = distribution(np.array(raw, np.float32), params)
    assert len(ids) >= 1 and abs(probabilities.sum() - 1) < 1e-9
    assert raw[int(ids[0])] == max(raw)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"top_k": -1},
     {"max_tokens": 0}, {"repetition_penalty": 0}, {"stop": ("",)}, {"temperature": "hot"}],
    ids=str,
)  # fmt: skip
def test_a_parameter_out_of_range_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_flag_over_file_over_built_in() -> None:
    file = from_generation_config({"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    assert (file.temperature, file.top_p, file.top_k) == (0.6, 0.9, 50)
    assert file.updated(temperature=0.1, top_p=None).temperature == 0.1
    assert file.updated(temperature=0.1, top_p=None).top_p == 0.9
    assert from_generation_config({}) == SamplingParams()
    assert from_generation_config({"do_sample": False, "temperature": 0.6}).temperature == 0
    with pytest.raises(UsageError, match="tempo"):
        file.updated(tempo=3)
    with pytest.raises(ConfigError, match=r"generation_config.json.*top_p"):
        from_generation_config({"top_p": 7})
