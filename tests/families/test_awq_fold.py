"""Scaling without quantising leaves the output of every layer of every family unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from proofs import proven
from tiny_models import RENAMED, REPRESENTATIVES, VARIANTS, tiny

from tinychat_mlx.awq.calibration.recorder import ExpertRun, LayerRun, Recorder
from tinychat_mlx.awq.experts import multiplied
from tinychat_mlx.awq.sites import LayerWeights, Site, experts, fold, shapes, shared, sites
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import CacheShape, Segment
from tinychat_mlx.model.config import ModelConfig, parse_config
from tinychat_mlx.model.decoder import Graph, Loader
from tinychat_mlx.model.families import ARCHITECTURES
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.weight import Weight

MIXTURES = sorted(name for name, (kind, _) in VARIANTS.items() if ARCHITECTURES[kind].moe)
ALL = [*VARIANTS, *RENAMED]


def opened(variant: str, root: Path) -> tuple[ModelConfig, Checkpoint]:
    checkpoint = Checkpoint.open(tiny(variant, root).folder)
    return parse_config(checkpoint.config), checkpoint


class Whole:
    """A scaled layer with its experts, as a source of one layer's weights."""

    def __init__(self, weights: LayerWeights, parts: list[LayerWeights]) -> None:
        self.names = {w.name(module): w for w in (weights, *parts) for module in w.modules()}
        self.has, self.vector = weights.has, weights.vector

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        return self.names[module].weight(module, shape)


def output(
    config: ModelConfig, weights: LayerWeights, x: np.ndarray, parts: list[LayerWeights] | None = None
) -> np.ndarray:
    """Run rows (T, C) through the graph's block, including experts."""
    backend, source = ReferenceBackend(), Whole(weights, parts or [])
    layer = Loader(config, source, backend).layer(weights.layer)
    layer = replace(layer, attention=replace(layer.attention, layer=0))
    cache = backend.new_cache(CacheShape(1, config.num_key_value_heads, config.head_dim), len(x))
    return backend.to_host(
        Graph(config, backend).block(x.copy(), layer, backend.step([Segment(cache, len(x))]))
    )


def read(config: ModelConfig, layer: int, source: Checkpoint) -> tuple[LayerWeights, list[LayerWeights]]:
    parts = [LayerWeights.read(config, layer, source, e) for e in experts(config, layer)]
    return LayerWeights.read(config, layer, source), parts


def random_scales(site: Site, config: ModelConfig, weights: LayerWeights) -> np.ndarray:
    at, k = shared(site, config), shapes(config, weights.layer, weights.expert)[site.roles[0]][1]
    n = k if at is None else int(at.max()) + 1
    return np.exp(np.random.default_rng(len(site.key)).uniform(-1.5, 1.5, n)).astype(np.float32)


def folded(
    site: Site, config: ModelConfig, weights: LayerWeights, parts: list[LayerWeights]
) -> tuple[LayerWeights, list[LayerWeights]]:
    """Return a layer and its experts with random scales at one site.

    An expert that absorbs scales has its own.
    """
    weights, parts = weights.copy(), [part.copy() for part in parts]
    if not site.experts:
        fold(weights, site, random_scales(site, config, weights), shared(site, config))
    elif site.absorber == "up":
        for part in parts:
            fold(part, site, random_scales(site, config, part), None)
    else:
        s = np.exp(np.random.default_rng(5).uniform(-1.5, 1.5, config.hidden_size)).astype(np.float32)
        s = fold(weights, site, s, None)
        parts = [multiplied(part, site, s) for part in parts]
    return weights, parts


@pytest.mark.parametrize("variant", ALL)
def test_scaling_every_site_leaves_the_layer_unchanged(variant: str, tiny_root: Path) -> None:
    """Routers included: a different expert changes a mixture's output by as much as the output itself."""
    config, source = opened(variant, tiny_root)
    x = np.random.default_rng(0).normal(size=(24, config.hidden_size)).astype(np.float32)
    for layer in (0, 1, config.num_hidden_layers - 1):
        weights, parts = read(config, layer, source)
        before = output(config, weights, x, parts)
        assert np.isfinite(before).all() and np.abs(before - x).max() > 0.1
        for site in sites(config, layer):
            if site.absorber is None:
                continue
            after, new = folded(site, config, weights, parts)
            held = [
                (w, v)
                for w, v in zip((after, *new), (weights, *parts), strict=True)
                if site.roles[0] in w.linears
            ]
            for new_one, old_one in held:
                assert np.abs(new_one.stacked(site) - old_one.stacked(site)).max() > 0.1
            # Products of ~100 terms, each with 3 float32 roundings, through three matrices: 100 · 3 · 6e-8. A
            # norm's bias divided in float32 and a float16 norm matched exactly by s add nothing larger.
            assert np.abs(output(config, after, x, new) - before).max() < 2e-5 * np.abs(before).max(), site
    proven(variant, "AWQ", "invariant", "every site")


@pytest.mark.parametrize("variant", MIXTURES)
def test_routers_choose_as_before_when_the_norm_absorbs_scales(variant: str, tiny_root: Path) -> None:
    config, source = opened(variant, tiny_root)
    assert config.moe is not None
    layer = config.moe.layers.index(True)
    x = np.random.default_rng(4).normal(size=(24, config.hidden_size)).astype(np.float32)
    weights, parts = read(config, layer, source)
    site = next(site for site in sites(config, layer) if site.key == "mlp_in")
    after, _ = folded(site, config, weights, parts)
    choices, shares = [], []
    for w in (weights, after):
        run = LayerRun(config, layer, w, Recorder(ReferenceBackend()), window=24)
        run.forward(x)
        choices.append(run.routings[0].choice)
        shares.append(run.routings[0].share)
    assert np.array_equal(*choices) and len(np.unique(choices[0])) > 2
    # Logits are sums of 64 products of size ~1 in float32; a softmax turns their errors into relative ones.
    assert np.abs(shares[0] - shares[1]).max() < 64 * 6e-8 * 10


@pytest.mark.parametrize("variant", REPRESENTATIVES)
def test_a_layer_taken_apart_and_put_together_is_the_layer(variant: str, tiny_root: Path) -> None:
    """The conversion's path, one expert at a time, gives the same result too."""
    config, source = opened(variant, tiny_root)
    x = np.random.default_rng(1).normal(size=(12, config.hidden_size)).astype(np.float32)
    for layer in (0, 1):
        weights, parts = read(config, layer, source)
        recorder = Recorder(ReferenceBackend())
        run = LayerRun(config, layer, weights, recorder, window=12)
        apart = run.forward(x)
        for part in parts:
            share = run.routings[0].weight(part.expert)[:, None]
            apart = apart + share * ExpertRun.of(part, recorder).forward(run.routings[0].h)[1]
        backend = ReferenceBackend()
        loaded = Loader(config, source, backend).layer(layer)
        loaded = replace(loaded, attention=replace(loaded.attention, layer=0))
        cache = backend.new_cache(CacheShape(1, config.num_key_value_heads, config.head_dim), 12)
        direct = Graph(config, backend).block(x.copy(), loaded, backend.step([Segment(cache, 12)]))
        assert np.abs(output(config, weights, x, parts) - direct).max() <= 1e-6 * np.abs(direct).max()
        assert np.abs(apart - direct).max() <= 1e-6 * np.abs(direct).max()


@pytest.mark.parametrize("variant", ALL)
def test_every_linear_belongs_to_one_site_and_every_norm_before_one_is_used(
    variant: str, tiny_root: Path
) -> None:
    config, source = opened(variant, tiny_root)
    for layer in (0, 1):
        weights, parts = read(config, layer, source)
        found = sites(config, layer)
        roles = [role for site in found for role in (*site.roles, *site.kept)]
        linears = weights.linears | (parts[0].linears if parts else {})
        assert sorted(roles) == sorted(linears)
        absorbers = {site.absorber for site in found}
        assert absorbers >= {role for role in config.spec.norms if role.startswith("pre_")}
        assert ("up" in absorbers) == (config.spec.gated or config.act == "relu")


def test_post_norm_families_scale_only_what_a_linear_can_absorb(tiny_root: Path) -> None:
    config, _ = opened("olmo2", tiny_root)
    assert [site.absorber for site in sites(config, 0)] == [None, "v", None, "up"]


def test_recorded_inputs_are_those_of_the_linears(tiny_root: Path) -> None:
    """The recorded input, multiplied by the site's linears, equals what the next norm or residual receives."""
    config, source = opened("llama", tiny_root)
    weights = LayerWeights.read(config, 0, source)
    run = LayerRun(config, 0, weights, Recorder(ReferenceBackend()), window=12)
    x = np.random.default_rng(2).normal(size=(20, config.hidden_size)).astype(np.float32)
    seen: dict[str, np.ndarray] = {}
    y = run.forward(x, lambda key, a: seen.update({key: a}))
    attn = seen["o_in"] @ weights.linears["o"].T + weights.biases["o"]
    mlp = seen["down_in"] @ weights.linears["down"].T + weights.biases["down"]
    assert np.allclose(x + attn + mlp, y, atol=1e-4 * float(np.abs(y).max()))
    short: dict[str, np.ndarray] = {}
    for key in seen:  # each site also separately, without what follows it
        short[key] = run.input_of(key, x)
    assert all(np.array_equal(short[key], seen[key]) for key in seen)


def test_a_norm_that_stores_one_less_is_divided_as_a_whole(tiny_root: Path) -> None:
    config, source = opened("gemma", tiny_root)
    weights = LayerWeights.read(config, 0, source)
    name = f"{config.spec.name('pre_attn', 0)}.weight"
    old = weights.vectors[name].copy()
    s = fold(weights, sites(config, 0)[0], np.full(config.hidden_size, 2, np.float32), None)
    assert np.allclose((1 + old) / (1 + weights.vectors[name]), s)
    assert np.allclose(s, 2, rtol=2e-3)  # float16 keeps 11 bits of (1 + w) / 2 - 1
    assert replace(config.spec).norm_offset == 1
