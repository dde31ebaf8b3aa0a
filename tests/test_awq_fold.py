"""Scaling without quantising leaves every layer of every family as it was (reference/awq: the best test there is)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import RENAMED, VARIANTS, tiny

from tinychat_mlx.arch import ARCHITECTURES
from tinychat_mlx.awq.record import LayerRun, Recorder
from tinychat_mlx.awq.sites import LayerWeights, Site, fold, shared, sites
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig, parse_config

MIXTURES = {name for name, (kind, _) in VARIANTS.items() if ARCHITECTURES[kind].moe}  # not quantised yet
ALL = [name for name in (*VARIANTS, *RENAMED) if name not in MIXTURES]


def opened(variant: str, root: Path) -> tuple[ModelConfig, Checkpoint]:
    checkpoint = Checkpoint.open(tiny(variant, root).folder)
    return parse_config(checkpoint.config), checkpoint


def output(config: ModelConfig, weights: LayerWeights, x: np.ndarray) -> np.ndarray:
    return LayerRun(config, weights.layer, weights, Recorder(ReferenceBackend()), window=12).forward(x)


def random_scales(site: Site, config: ModelConfig, weights: LayerWeights) -> np.ndarray:
    at, k = shared(site, config), weights.linears[site.roles[0]].shape[1]
    n = k if at is None else int(at.max()) + 1
    return np.exp(np.random.default_rng(len(site.key)).uniform(-1.5, 1.5, n)).astype(np.float32)


@pytest.mark.parametrize("variant", ALL)
def test_scaling_every_site_leaves_the_layer_unchanged(variant: str, tiny_root: Path) -> None:
    config, source = opened(variant, tiny_root)
    x = np.random.default_rng(0).normal(size=(24, config.hidden_size)).astype(np.float32)
    for layer in (0, config.num_hidden_layers - 1):
        weights = LayerWeights.read(config, layer, source)
        before = output(config, weights, x)
        assert np.isfinite(before).all() and np.abs(before - x).max() > 0.1
        for site in sites(config):
            if site.absorber is None:
                continue
            folded = weights.copy()
            fold(folded, site, random_scales(site, config, weights), shared(site, config))
            assert np.abs(folded.stacked(site) - weights.stacked(site)).max() > 0.1
            # Products of ~100 terms, each off by 3 roundings of float32, through three matrices: 100 · 3 · 6e-8.
            # A norm's bias divided in float32 and a float16 norm followed exactly by s add nothing larger.
            assert np.abs(output(config, folded, x) - before).max() < 2e-5 * np.abs(before).max(), site


@pytest.mark.parametrize("variant", ALL)
def test_a_layer_taken_apart_and_put_together_is_the_layer(variant: str, tiny_root: Path) -> None:
    config, source = opened(variant, tiny_root)
    x = np.random.default_rng(1).normal(size=(12, config.hidden_size)).astype(np.float32)
    weights = LayerWeights.read(config, 1, source)
    direct = LayerRun(config, 1, source, Recorder(ReferenceBackend()), window=12).forward(x)
    assert np.abs(output(config, weights, x) - direct).max() <= 1e-6 * np.abs(direct).max()


@pytest.mark.parametrize("variant", ALL)
def test_every_linear_belongs_to_one_site_and_every_norm_before_one_is_used(
    variant: str, tiny_root: Path
) -> None:
    config, source = opened(variant, tiny_root)
    weights = LayerWeights.read(config, 0, source)
    roles = [role for site in sites(config) for role in site.roles]
    assert sorted(roles) == sorted(weights.linears)
    absorbers = {site.absorber for site in sites(config)}
    assert absorbers >= {role for role in config.spec.norms if role.startswith("pre_")}
    assert ("up" in absorbers) == (config.spec.gated or config.act == "relu")


def test_post_norm_families_scale_only_what_a_linear_can_absorb(tiny_root: Path) -> None:
    config, _ = opened("olmo2", tiny_root)
    assert [site.absorber for site in sites(config)] == [None, "v", None, "up"]


def test_recorded_inputs_are_those_of_the_linears(tiny_root: Path) -> None:
    """What a site shows, put through its linears by hand, gives what the next norm or residual gets."""
    config, source = opened("llama", tiny_root)
    weights = LayerWeights.read(config, 0, source)
    run = LayerRun(config, 0, weights, Recorder(ReferenceBackend()), window=12)
    x = np.random.default_rng(2).normal(size=(20, config.hidden_size)).astype(np.float32)
    seen: dict[str, np.ndarray] = {}
    y = run.forward(x, lambda key, a: seen.update({key: a}))
    attn = seen["o_in"] @ weights.linears["o"].T + weights.biases["o"]
    mlp = seen["down_in"] @ weights.linears["down"].T + weights.biases["down"]
    assert np.allclose(x + attn + mlp, y, atol=1e-4 * float(np.abs(y).max()))
    for site in sites(config):
        assert np.array_equal(run.inputs(x, site.key), seen[site.key])


def test_a_norm_that_stores_one_less_is_divided_as_a_whole(tiny_root: Path) -> None:
    config, source = opened("gemma", tiny_root)
    weights = LayerWeights.read(config, 0, source)
    name = f"{config.spec.name('pre_attn', 0)}.weight"
    old = weights.vectors[name].copy()
    s = fold(weights, sites(config)[0], np.full(config.hidden_size, 2, np.float32), None)
    assert np.allclose((1 + old) / (1 + weights.vectors[name]), s)
    assert np.allclose(s, 2, rtol=2e-3)  # float16 keeps 11 bits of (1 + w) / 2 - 1
    assert replace(config.spec).norm_offset == 1
