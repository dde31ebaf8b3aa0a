"""Mixtures of experts: quantised experts, dense routers, readable by mlx-lm, byte-identical resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny

import tinychat_mlx
from tinychat_mlx.awq import layer_stream
from tinychat_mlx.awq.convert import Result, convert
from tinychat_mlx.awq.layer import QuantizedLayer
from tinychat_mlx.awq.layer_stream import Progress
from tinychat_mlx.awq.quality.evaluate import log_softmax
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import CacheShape, Segment
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.model.decoder import Graph, Loader
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.weight import Dense, Packed, Weight

MIXTURES = ["mixtral", "qwen2_moe", "qwen2_moe-all", "qwen3_moe", "qwen3_moe-mixed", "olmoe"]
SOME = [3, 45, 7, 80, 22, 9, 61, 5, 33, 70]

pytestmark = pytest.mark.usefixtures("accepted")


def converted(
    variant: str, root: Path, target: Path, ids: np.ndarray | None = None, more: Any = None, **settings: Any
) -> Result:
    ids = np.random.default_rng(3).integers(3, 97, 256).astype(np.int32) if ids is None else ids
    source = Checkpoint.open(tiny(variant, root).folder)
    chosen = Settings(**({"group_size": 32, "head": "fp16"} | settings))
    return convert(source, target, chosen, ReferenceBackend, lambda *_: ids, **(more or {}))


@pytest.fixture(scope="module")
def published(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (variant, format) -> folder of its conversion by the published method, made once."""

    @cache
    def make(variant: str, form: str = "mlx") -> Path:
        target = tmp_path_factory.mktemp("published") / f"{variant}-{form}"
        converted(variant, tiny_root, target, method="awq", format=form)
        return target

    return make


def logits(folder: Path) -> np.ndarray:
    return tinychat_mlx.load(folder, backend="reference").logits(SOME)


@pytest.mark.parametrize("form", ["mlx", "awq"])
@pytest.mark.parametrize("variant", MIXTURES)
def test_experts_are_codes_and_routers_are_not(
    variant: str, form: str, tiny_root: Path, published: Callable[..., Path]
) -> None:
    """In both formats, under the names of each format's readers, with equal codes."""
    folder = published(variant, form)
    found, source = Checkpoint.open(folder), Checkpoint.open(tiny(variant, tiny_root).folder)
    layers = {
        n.removesuffix(".weight") for n in source.names() if ".layers." in n and n.endswith("proj.weight")
    }
    layers |= {
        n.removesuffix(".weight")
        for n in source.names()
        if n.endswith(("w1.weight", "w2.weight", "w3.weight"))
    }
    assert found.modules == layers
    routers = {n.removesuffix(".weight") for n in source.names() if n.endswith("gate.weight")}
    assert routers and all(isinstance(found.weight(name), Dense) for name in routers)
    config = json.loads((folder / "config.json").read_text())
    if form == "mlx":
        assert {name for name, value in config["quantization"].items() if value is False} == {
            *routers, "model.embed_tokens", "lm_head"
        }  # fmt: skip
    else:
        assert set(config["quantization_config"]["modules_to_not_convert"]) == {*routers, "lm_head"}
        other = Checkpoint.open(published(variant))
        for name in layers:
            one, two = found.weight(name), other.weight(name)
            assert isinstance(one, Packed) and isinstance(two, Packed)
            assert np.array_equal(one.qweight, two.qweight) and np.array_equal(one.scales, two.scales)


@pytest.mark.parametrize("variant", [v for v in MIXTURES if v != "qwen2_moe"])  # it has no dense layers
def test_mlx_lm_reads_the_folder_and_gives_our_logits(variant: str, published: Callable[..., Path]) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    model, _ = utils.load_model(published(variant))
    model.set_dtype(mx.float32)
    theirs, ours = np.array(model(mx.array([SOME]))[0]), logits(published(variant))
    # The same codes, scales and biases; sums of at most 100 products in another order, through four layers.
    assert np.abs(theirs - ours).max() < 1e-4 * np.abs(ours).max()


class Kept:
    """The weights that a quantised layer reports for running."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer, self.has, self.vector = layer, layer.has, layer.vector
        self.experts = {part.name: part for expert in layer.experts for part in expert.values()}

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        return self.experts[module] if module in self.experts else self.layer.weight(module, shape)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe"])
def test_what_is_written_is_what_later_layers_were_made_for(
    variant: str, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[QuantizedLayer] = []
    write = layer_stream.layer_entries
    monkeypatch.setattr(
        layer_stream, "layer_entries", lambda layer, form: made.append(layer) or write(layer, form)
    )
    converted(variant, tiny_root, tmp_path / "out")
    config, backend = parse_config(Checkpoint.open(tmp_path / "out").config), ReferenceBackend()
    loader, graph = Loader(config, Checkpoint.open(tmp_path / "out"), backend), Graph(config, backend)
    cache = backend.new_cache(CacheShape(len(made), config.num_key_value_heads, config.head_dim), len(SOME))
    step = backend.step([Segment(cache, len(SOME))])
    inputs = loader.inputs()
    x = graph.embedded(inputs, backend.ids(SOME), step)
    for i, layer in enumerate(made):
        x = graph.block(x, Loader(config, Kept(layer), backend).layer(i), step)
    expected = backend.to_host(graph.logits(x, loader.final_norm(), loader.head(inputs.tokens)))
    # Scales, zeros, norms and routers are exact as stored; only the order of float32 sums differs.
    assert np.abs(logits(tmp_path / "out") - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe"])
def test_the_best_method_is_closer_than_rounding(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    """The size of the gain is random here: in a random model, changed routing is most of the loss."""
    rng, loss = np.random.default_rng(6), {}
    ids, texts = (
        rng.integers(3, 97, 1024).astype(np.int32),
        [rng.integers(3, 97, 100).tolist() for _ in range(5)],
    )
    dense = tinychat_mlx.load(tiny(variant, tiny_root).folder, backend="reference")
    for method in ("rtn", "awq+"):
        converted(variant, tiny_root, tmp_path / method, ids, method=method)
        model = tinychat_mlx.load(tmp_path / method, backend="reference")
        pairs = [(log_softmax(dense.logits(text)), log_softmax(model.logits(text))) for text in texts]
        loss[method] = float(np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in pairs]))
    assert loss["awq+"] < 0.8 * loss["rtn"]


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["awq", "awq+"])
def test_experts_that_saw_nothing_are_quantised_for_what_others_see(
    variant: str, method: str, tiny_root: Path, tmp_path: Path
) -> None:
    """A repeated token reaches few experts."""
    with np.errstate(all="raise", under="ignore"):
        result = converted(
            variant,
            tiny_root,
            tmp_path / "out",
            np.full(40, 5, np.int32),
            method=method,
        )
    sites = [site for layer in result.layers for site in layer.sites if site.note]
    assert sites and all("experts were sent fewer than 512 tokens" in site.note for site in sites)
    assert all(np.isfinite([site.error, site.rtn]).all() for site in sites)
    assert all(site.error <= site.rtn for site in sites)
    assert np.isfinite(logits(tmp_path / "out")).all()


def test_interrupted_between_layers_and_resumed_it_ends_with_the_same_bytes(
    tiny_root: Path, tmp_path: Path
) -> None:
    def stop(p: Progress) -> None:
        if p.phase == "layers" and p.done == 2:
            raise KeyboardInterrupt

    converted("qwen2_moe", tiny_root, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        converted("qwen2_moe", tiny_root, tmp_path / "broken", more={"watch": stop})
    assert not (tmp_path / "broken").exists()
    converted("qwen2_moe", tiny_root, tmp_path / "broken", more={"resume": True})
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.suffix != ".md"}
        for n in ("whole", "broken")
    )
    assert one == two
