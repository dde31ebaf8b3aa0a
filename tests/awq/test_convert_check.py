"""A conversion knows whether it worked: models made to drift lose nothing by it, and a sabotaged one is not used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_dense

from tinychat_mlx.awq import layer
from tinychat_mlx.awq.convert import Result, convert
from tinychat_mlx.awq.evaluate import Quality, evaluate, kl_ratio
from tinychat_mlx.awq.settings import Settings
from tinychat_mlx.awq.whole import Rounded, streamed
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config

WINDOW = 64
START = 80  # the token that begins a text


def ids(tokens: int, seed: int) -> np.ndarray:
    """Random words in windows that all begin with the same token."""
    found = np.random.default_rng(seed).integers(0, 80, tokens).astype(np.int32)
    found[::WINDOW] = START
    return found


# Models that are made to drift -------------------------------------------------------------------------------


def sink(root: Path) -> tuple[Path, Settings]:
    """The first token of a window has a channel a thousand times the others', and so has what an MLP makes of it."""
    config = tiny_dense.CONFIG | {"tie_word_embeddings": False}
    weights = tiny_dense.tensors(config)
    weights["model.embed_tokens.weight"][:80, 7] = 0
    weights["model.embed_tokens.weight"][START, 7] = 1000
    for i in range(config["num_hidden_layers"]):
        weights[f"model.layers.{i}.input_layernorm.weight"][7] = (
            0.05  # or no other token would be attended to
        )
    weights["model.layers.1.post_attention_layernorm.weight"][7] = 1
    for role in ("gate", "up"):
        weights[f"model.layers.1.mlp.{role}_proj.weight"][5, 7] = 8
    return tiny_dense.save(root / "sink", weights, tie_word_embeddings=False), Settings(
        w_bit=4, group_size=32
    )


def far(root: Path) -> tuple[Path, Settings]:
    """Heavy outliers among the weights, 3 bits, groups of 128: the quantised layers' rows are far from the float ones."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    weights, r = tiny_dense.tensors(tiny_dense.CONFIG | sizes), np.random.default_rng(1)
    for name, a in weights.items():
        if "proj" in name:
            a *= np.where(r.random(a.shape) < 0.01, 8, 1).astype(np.float16)
    return tiny_dense.save(root / "far", weights, **sizes), Settings(w_bit=3, group_size=128)


PLANTED = {"sink": sink, "far": far}


def measured(source: Checkpoint, made: Checkpoint | Rounded) -> Quality:
    """On text that no conversion saw."""
    config, text = parse_config(source.config), ids(4096, seed=99).tolist()
    dense, found = (streamed(config, model, ReferenceBackend(), text, WINDOW) for model in (source, made))
    return evaluate(text, found, dense, WINDOW)


@pytest.mark.parametrize("seed", [1, 2, 3])
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
    """As they were made to."""
    for plant, least in ((far, 0.5), (sink, 0.0)):
        folder, settings = plant(tmp_path)
        source = Checkpoint.open(folder)
        result = convert(
            source, tmp_path / f"{folder.name}-rtn", settings, ReferenceBackend, lambda *_: ids(512, 1)
        )
        assert result.layers[-1].rounded > least
