"""Laws of the graph. test_support.py compares it with transformers for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny

import tinychat_mlx
from tinychat_mlx.model.families import ARCHITECTURES

TOLERANCE = 1e-4  # of the largest logit: derived in test_support.py


def load(folder: Path, backend: str) -> tinychat_mlx.Model:
    return tinychat_mlx.load(folder, backend=backend, exact=True, threads=1)


def test_earlier_logits_do_not_see_later_tokens(tiny_root: Path) -> None:
    t = tiny("llama", tiny_root)
    model = load(t.folder, "reference")
    changed = [*t.ids[:20], (t.ids[20] + 1) % 97, *t.ids[21:]]
    difference = np.abs(model.logits(changed) - model.logits(t.ids)).max(-1)
    assert difference[:20].max() == 0 and difference[20:].min() > 0


@pytest.mark.parametrize(
    "field, value", [("rope_interleaved", True), ("norm_offset", 1.0), ("parallel", True)]
)
def test_a_wrong_spec_is_seen(
    field: str, value: object, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the tolerance above: the smallest mistake in a row of the table exceeds it."""
    from dataclasses import replace

    t = tiny("llama", tiny_root)
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], **{field: value}))
    got = load(t.folder, "reference").logits(t.ids)
    assert np.abs(got - t.logits).max() > 100 * TOLERANCE * np.abs(t.logits).max()


@pytest.mark.parametrize("variant", ["llama", "qwen2-window"])
def test_a_window_or_rewind_forgets_nothing_it_should_keep(variant: str, tiny_root: Path) -> None:
    """Rewinding and trying another continuation gives the result of a fresh cache."""
    t = tiny(variant, tiny_root)
    model = load(t.folder, "reference")
    decoder, host = model.engine.decoder, model.backend.to_host
    cache = decoder.new_cache(64)
    decoder.forward(t.ids, cache)
    cache.rewind(11)
    other = [5, 6, 7, 8]
    again = host(decoder.forward(other, cache, last_only=False))
    fresh = model.logits([*t.ids[:11], *other])[11:]
    assert np.abs(again - fresh).max() < TOLERANCE * np.abs(fresh).max()
