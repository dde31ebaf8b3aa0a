"""Conversions of different structures with every method and backend. test_support.py converts every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, tiny

import tinychat_mlx
from tinychat_mlx.awq.convert import Result, convert
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import Backend
from tinychat_mlx.model.families import ARCHITECTURES
from tinychat_mlx.open import create
from tinychat_mlx.weights.checkpoint import Checkpoint

MIXTURES = sorted(name for name, (kind, _) in VARIANTS.items() if ARCHITECTURES[kind].moe)

pytestmark = pytest.mark.usefixtures("accepted")


def converted(
    variant: str, root: Path, target: Path, tokens: int = 256, make: Any = ReferenceBackend, **settings: Any
) -> Result:
    ids = np.random.default_rng(3).integers(3, 97, tokens).astype(np.int32)
    source = Checkpoint.open(tiny(variant, root).folder)
    return convert(source, target, Settings(group_size=32, **settings), make, lambda *_: ids)


def off(folder: Path, variant: str, root: Path) -> float:
    """Return the root mean square error of the logits against transformers, relative to the largest."""
    t = tiny(variant, root)
    logits = tinychat_mlx.load(folder, backend="reference").logits(t.ids)
    return float(np.sqrt(np.square(logits - t.logits).mean()) / np.abs(t.logits).max())


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("variant", MIXTURES)
def test_every_method_converts_mixtures(variant: str, method: str, tiny_root: Path, tmp_path: Path) -> None:
    converted(variant, tiny_root, tmp_path / "out", method=method, w_bit=8)
    assert off(tmp_path / "out", variant, tiny_root) < 0.02


@pytest.mark.parametrize("variant", ["llama-tied", "gemma2", "opt", "qwen2_moe"])
def test_every_backend_converts(
    variant: str, backend_name: str, backend: Backend, tiny_root: Path, tmp_path: Path
) -> None:
    """Dense layers, windows, learned positions, experts.

    Exact for the float model, default mode for the codes.
    """
    made = []

    def make(exact: bool) -> Backend:
        made.append(backend if exact else create(backend_name, False, 1))
        return made[-1]

    result = converted(variant, tiny_root, tmp_path / "out", make=make, method="awq+", w_bit=8)
    assert [b.name for b in made] == [backend_name] * 2
    # A site is measured with the inputs of a run: int8 activations have errors of 1e-4 per product.
    assert max(site.error for layer in result.layers for site in layer.sites) < 5e-3
    assert off(tmp_path / "out", variant, tiny_root) < 0.02
