"""A conversion checks its result: drifting models lose nothing, and a sabotaged result is not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dense

from tinychat_mlx.awq import layer, layer_stream
from tinychat_mlx.awq.convert import Result, convert
from tinychat_mlx.awq.layer_stream import Progress
from tinychat_mlx.awq.quality.evaluate import Quality, evaluate, kl_ratio
from tinychat_mlx.awq.quality.streamed_logits import Rounded, streamed
from tinychat_mlx.awq.search.quantizer import Quantized
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint

WINDOW = 64
START = 80  # the token that starts a text


def ids(tokens: int, seed: int) -> np.ndarray:
    """Return random words in windows that all start with the same token."""
    found = np.random.default_rng(seed).integers(0, 80, tokens).astype(np.int32)
    found[::WINDOW] = START
    return found


# Models with planted drift -----------------------------------------------------------------------------------


def sink(root: Path) -> tuple[Path, Settings]:
    """The first token of a window has a channel a thousand times larger than the others, also after an MLP."""
    config = tiny_dense.CONFIG | {"tie_word_embeddings": False}
    weights = tiny_dense.tensors(config)
    weights["model.embed_tokens.weight"][:80, 7] = 0
    weights["model.embed_tokens.weight"][START, 7] = 1000
    for i in range(config["num_hidden_layers"]):
        weights[f"model.layers.{i}.input_layernorm.weight"][7] = (
            0.05  # otherwise no other token would be attended to
        )
    weights["model.layers.1.post_attention_layernorm.weight"][7] = 1
    for role in ("gate", "up"):
        weights[f"model.layers.1.mlp.{role}_proj.weight"][5, 7] = 8
    return tiny_dense.save(root / "sink", weights, tie_word_embeddings=False), Settings(
        w_bit=4, group_size=32
    )


def far(root: Path) -> tuple[Path, Settings]:
    """Heavy outliers among the weights, 3 bits, groups of 128: quantised rows are far from the float ones."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    weights, r = tiny_dense.tensors(tiny_dense.CONFIG | sizes), np.random.default_rng(1)
    for name, a in weights.items():
        if "proj" in name:
            a *= np.where(r.random(a.shape) < 0.01, 8, 1).astype(np.float16)
    return tiny_dense.save(root / "far", weights, **sizes), Settings(w_bit=3, group_size=128)


PLANTED = {"sink": sink, "far": far}


def measured(source: Checkpoint, made: Checkpoint | Rounded) -> Quality:
    """Measure on text that no conversion used."""
    config, text = parse_config(source.config), ids(4096, seed=99).tolist()
    dense, found = (streamed(config, model, ReferenceBackend(), text, WINDOW) for model in (source, made))
    return evaluate(text, found, dense, WINDOW)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
@pytest.mark.parametrize("planted", PLANTED)
def test_the_correction_never_loses_to_leaving_it_out_nor_either_to_rounding(
    planted: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By more than a standard error of the text it is measured on."""
    folder, settings = PLANTED[planted](tmp_path)
    source = Checkpoint.open(folder)

    def made(name: str) -> tuple[Result, Quality]:
        text = lambda *_: ids(2048, seed)
        result = convert(source, tmp_path / name, settings, ReferenceBackend, text)
        assert not result.rejected
        return result, measured(source, Checkpoint.open(tmp_path / name))

    whole, corrected = made("whole")
    monkeypatch.setattr(layer, "corrected", lambda w, *_: (np.zeros_like(w), 0.0))
    _, left_out = made("left-out")
    rounded = measured(source, Rounded(source, Checkpoint.open(tmp_path / "whole")))
    assert any(site.share for one in whole.layers for site in one.sites)
    for better, worse in ((corrected, left_out), (corrected, rounded), (left_out, rounded)):
        ratio, error = kl_ratio(better, worse)
        assert ratio <= 1 + error, (ratio, error)


def test_the_planted_models_drift(tmp_path: Path) -> None:
    """The planted drift exists."""
    for plant, least in ((far, 0.5), (sink, 0.0)):
        folder, settings = plant(tmp_path)
        source = Checkpoint.open(folder)
        result = convert(
            source, tmp_path / f"{folder.name}-rtn", settings, ReferenceBackend, lambda *_: ids(512, 1)
        )
        assert result.layers[-1].rounded > least


# Conversions that a test sabotages ------------------------------------------------------------------------------


def shuffled(monkeypatch: pytest.MonkeyPatch, spoilt: int) -> None:
    """Reorder the rows of one layer's codes, with every method."""

    def mixed(codes: Quantized) -> Quantized:
        return codes.take(np.random.default_rng(0).permutation(len(codes.q)))

    for name in ("_fed", "_published"):
        whole = getattr(layer_stream.LayerQuantizer, name)

        def run(self: Any, weights: Any, x: Any, whole: Callable[..., Any] = whole) -> Any:
            made = whole(self, weights, x)
            if weights.layer != spoilt:
                return made
            return replace(made, parts={role: mixed(codes) for role, codes in made.parts.items()})

        monkeypatch.setattr(layer_stream.LayerQuantizer, name, run)


def attempts(folder: Path, out: Path, settings: Settings) -> tuple[Result, list[str]]:
    notes: list[str] = []

    def watch(p: Progress) -> None:
        notes.append(p.note)

    text = lambda *_: ids(2048, 1)
    return convert(Checkpoint.open(folder), out, settings, ReferenceBackend, text, watch), notes


@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_shuffled_codes_are_caught_named_and_not_used(
    spoilt: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_dense.save(tmp_path / "dense")
    settings = Settings(group_size=32, head="fp16")
    plain, _ = attempts(folder, tmp_path / "plain", replace(settings, method="rtn"))
    shuffled(monkeypatch, spoilt)
    result, notes = attempts(folder, tmp_path / "out", settings)
    assert [one.method for one in result.rejected] == ["awq+", "awq"] and result.settings.method == "rtn"
    assert [one.layer for one in result.rejected] == [spoilt, spoilt]
    assert sum(f"its error grew most at layer {spoilt + 1}; trying" in note for note in notes) == 2
    assert (result.folder / "model.safetensors").read_bytes() == (
        plain.folder / "model.safetensors"
    ).read_bytes()
    card = (result.folder / "README.md").read_text()
    assert "awq+ lost more than plain rounding" in card and f"layer {spoilt + 1}" in card
