"""Measures the loss from int8 activations in addition to int4 weights: the demo on held-out text."""

from __future__ import annotations

import pytest
from checkout import DATA

import tinychat_mlx
from tinychat_mlx.awq.calibration.tokens import encoded
from tinychat_mlx.awq.quality.evaluate import Quality, evaluate, scores
from tinychat_mlx.loaded_model import Model

TOKENS = 8192  # gives the difference of two means of 0.003 to about 2 %


def quality(model: Model, against: Model) -> Quality:
    ids = encoded(str(DATA / "demo_heldout_text.jsonl"), model.tokenizer)[:TOKENS]
    one, other = (scores(m.engine.decoder, m.backend.to_host) for m in (model, against))
    return evaluate(ids, one, other, 512)


@pytest.fixture(scope="module")
def exact() -> Model:
    return tinychat_mlx.load("demo", backend="cpu", exact=True)


@pytest.fixture(scope="module")
def fast() -> Model:
    return tinychat_mlx.load("demo", backend="cpu")


@pytest.fixture(scope="module")
def rounding(fast: Model, exact: Model) -> Quality:
    """The loss from int8 activations next to float32 ones."""
    return quality(fast, exact)


def test_int8_activations_lose_little_of_what_int4_weights_lost(
    fast: Model, exact: Model, rounding: Quality
) -> None:
    dense = tinychat_mlx.load(DATA / "demo-fp16", backend="cpu", exact=True)
    lost, also, own = quality(exact, dense).kl_mean, quality(fast, dense).kl_mean, rounding.kl_mean
    assert lost and also and own and own <= lost / 8
    # The KL of small changes is a squared length, so the roots of the two obey the triangle inequality. awq+ chooses
    # codes for int8 inputs, as on this backend, so exact inputs may lose more.
    assert (lost**0.5 - own**0.5) ** 2 <= also <= (lost**0.5 + own**0.5) ** 2, (lost, also, own)


def test_int8_activations_choose_the_same_token(rounding: Quality) -> None:
    assert rounding.top1 is not None and 0.99 <= rounding.top1 < 1
