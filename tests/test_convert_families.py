"""Every dense family converts: at 8 bits its logits hardly move, whatever is fused, folded or renamed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import RENAMED, VARIANTS, tiny

import tinychat_mlx
from tinychat_mlx.arch import ARCHITECTURES
from tinychat_mlx.awq.convert import convert
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint

MIXTURES = {name for name, (kind, _) in VARIANTS.items() if ARCHITECTURES[kind].moe}  # not quantised yet


@pytest.mark.parametrize("variant", [name for name in (*VARIANTS, *RENAMED) if name not in MIXTURES])
def test_eight_bits_hardly_move_the_logits(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    t = tiny(variant, tiny_root)
    ids = np.random.default_rng(3).integers(3, 97, 256).astype(np.int32)
    settings = Settings(method="awq+", w_bit=8, group_size=32)
    source = Checkpoint.open(t.folder)
    result = convert(source, tmp_path / "out", settings, ReferenceBackend, lambda *_: ids)
    assert all(site.error < 1e-3 for layer in result.layers for site in layer)
    model = tinychat_mlx.load(tmp_path / "out", backend="reference")
    off, size = np.abs(model.logits(t.ids) - t.logits), np.abs(t.logits).max()
    # A step is 1/255 of a group's range, its rounding 0.3 % of a weight's size; over ~30 matrices, at random,
    # 5 of that. Rows in a wrong order, or a scale folded into the wrong place, give another model: 50 % and more.
    assert np.sqrt(np.square(off).mean()) < 0.02 * size


@pytest.mark.parametrize("variant", sorted(MIXTURES))
def test_mixtures_of_experts_are_refused_by_name(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny(variant, tiny_root).folder)
    with pytest.raises(tinychat_mlx.TinychatError, match="mixtures of experts"):
        convert(source, tmp_path / "out", Settings(group_size=32), ReferenceBackend, lambda *_: np.zeros(0))
    assert not list(tmp_path.iterdir())
