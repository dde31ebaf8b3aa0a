"""--engine mlx-lm: our engine over mlx-lm's model gives mlx-lm's tokens, with turns reused and taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.models.cache import RotatingKVCache
from mlx_models import answer, tokens
from tiny_models import tiny

import tinychat_mlx
from tinychat_mlx.backends.mlx.interop import MlxLmDecoder
from tinychat_mlx.errors import BackendError, FormatError, UsageError
from tinychat_mlx.generate import Engine


@pytest.fixture(autouse=True)
def uncompiled() -> Any:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen3", tmp_path_factory.mktemp("interop")).folder


def naive(folder: Path, prompt: list[int], n: int) -> list[int]:
    """mlx-lm alone, the whole text through it for each token."""
    model, _ = mlx_lm.utils.load_model(folder)
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("rotating", [False, True])
def test_turns_give_mlx_lm_s_tokens(folder: Path, rotating: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotating cache that has wrapped cannot be cut back: then the kept tokens are computed again."""
    decoder = MlxLmDecoder(folder)
    if rotating:
        monkeypatch.setattr(
            decoder.model, "make_cache", lambda: [RotatingKVCache(64) for _ in decoder.model.layers], raising=False
        )  # fmt: skip
        monkeypatch.setattr(RotatingKVCache, "is_trimmable", lambda self: False)
    engine = Engine(decoder, 64)  # type: ignore[arg-type]  # it has the decoder's calls
    first = answer(engine, [5, 9, 33], temperature=0, max_tokens=8)
    assert tokens(first) == naive(folder, [5, 9, 33], 8)
    turn = [5, 9, 33, *tokens(first)[:4], 40, 41]
    second = answer(engine, turn, temperature=0, max_tokens=8)
    assert tokens(second) == naive(folder, turn, 8)
    stats = second[-1].stats
    assert stats is not None and stats.cached_tokens == 7
    assert "mlx-lm" in decoder.describe()


def test_logits_of_all_rows(folder: Path) -> None:
    decoder = MlxLmDecoder(folder)
    cache = decoder.new_cache(16)
    got = decoder.backend.to_host(decoder.forward([5, 9, 33, 7], cache, last_only=False))
    model, _ = mlx_lm.utils.load_model(folder)
    expected = np.array(model(mx.array([[5, 9, 33, 7]]))[0].astype(mx.float32))
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_loaded_model_says_who_computes_it(folder: Path) -> None:
    model = tinychat_mlx.load(folder, engine="mlx-lm", context=64)
    assert "mlx-lm" in model.device.why and "not tinychat's own graph" in model.device.why
    assert model.context == 64 and model.architecture == "qwen3" and model.nbytes > 0
    ours = tinychat_mlx.load(folder, backend="reference")
    expected = ours.logits([5, 9, 33])
    assert np.abs(model.logits([5, 9, 33]) - expected).max() < 1e-4 * np.abs(expected).max()
    assert tokens(answer(model.engine, [5, 9, 33], temperature=0, max_tokens=8)) == naive(
        folder, [5, 9, 33], 8
    )
    with pytest.raises(UsageError, match="engine 'other' is unknown; known are tinychat, mlx-lm"):
        tinychat_mlx.load(folder, engine="other")


def test_bad_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is this a model folder"):
        MlxLmDecoder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    with pytest.raises(FormatError, match="names Python code"):
        MlxLmDecoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(BackendError, match="mlx-lm says: .*unheard_of"):
        MlxLmDecoder(tmp_path)
