"""--engine mlx-lm: our engine with mlx-lm's model gives mlx-lm's tokens, with reused and rewound turns."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.models.cache import RotatingKVCache
from mlx_models import TOLERANCE, answer, tokens
from tiny_models import tiny
from virtual_gpu import SLACK

import tinychat_mlx
from tinychat_mlx.apps.cli import main
from tinychat_mlx.backends.mlx import mlx_lm_decoder
from tinychat_mlx.backends.mlx.backend import SCRATCH, MlxBackend
from tinychat_mlx.backends.mlx.mlx_lm_decoder import MlxLmDecoder
from tinychat_mlx.base.errors import BackendError, FormatError, UsageError
from tinychat_mlx.engine.engine import Engine
from tinychat_mlx.mlx_lm_engine import read_config
from tinychat_mlx.open import DEMO


@pytest.fixture(autouse=True)
def uncompiled() -> Any:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tiny_root: Path) -> Path:
    return tiny("qwen3", tiny_root).folder


def opened(folder: Path, backend: MlxBackend | None = None) -> MlxLmDecoder:
    """As loading.load_foreign opens a folder."""
    return MlxLmDecoder(folder, read_config(folder), backend)


def naive(folder: Path, prompt: list[int], n: int) -> list[int]:
    """Decode with only mlx-lm, computing the whole text for each token."""
    model, _ = mlx_lm.utils.load_model(folder)
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("rotating", [False, True])
def test_turns_give_mlx_lm_s_tokens(folder: Path, rotating: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotating cache that has wrapped cannot be truncated, so the kept tokens are computed again."""
    decoder = opened(folder)
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
    decoder = opened(folder)
    cache = decoder.new_cache(16)
    got = decoder.backend.to_host(decoder.forward([5, 9, 33, 7], cache, last_only=False))
    model, _ = mlx_lm.utils.load_model(folder)
    expected = np.array(model(mx.array([[5, 9, 33, 7]]))[0].astype(mx.float32))
    assert np.abs(got - expected).max() < 1e-5 * SLACK * np.abs(expected).max()


def test_a_loaded_model_says_who_computes_it(folder: Path) -> None:
    model = tinychat_mlx.load(folder, engine="mlx-lm", context=64)
    assert "mlx-lm" in model.device.why and "not tinychat's own graph" in model.device.why
    assert model.context == 64 and model.architecture == "qwen3" and model.nbytes > 0
    ours = tinychat_mlx.load(folder, backend="reference")
    expected = ours.logits([5, 9, 33])
    assert np.abs(model.logits([5, 9, 33]) - expected).max() < TOLERANCE * np.abs(expected).max()
    assert tokens(answer(model.engine, [5, 9, 33], temperature=0, max_tokens=8)) == naive(
        folder, [5, 9, 33], 8
    )
    with pytest.raises(UsageError, match="unknown engine 'other' — use tinychat or mlx-lm"):
        tinychat_mlx.load(folder, engine="other")


def test_bad_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="config.json: the file is missing"):
        opened(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    with pytest.raises(FormatError, match="names Python code"):
        opened(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(BackendError, match="mlx-lm does not load .*unheard_of"):
        opened(tmp_path)
    del config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackendError, match="mlx-lm does not load .*num_hidden_layers"):
        opened(tmp_path)


def small(limit: int) -> MlxBackend:
    """A machine with `limit` more bytes available."""
    b = MlxBackend(exact=True)
    used = mx.get_active_memory()
    b.chip = replace(b.chip, name="Apple M1", memory=1 << 40, working_set=used + SCRATCH + limit)
    return b


@pytest.mark.parametrize("variant", ["llama", "cohere2"])
def test_what_a_context_will_take_is_known_before(variant: str, tiny_root: Path) -> None:
    """Compared with the bytes of mlx-lm's caches afterwards; Cohere's sliding layers hold their window."""
    decoder = opened(tiny(variant, tiny_root).folder)
    cache = decoder.new_cache(512)
    decoder.backend.to_host(decoder.forward([1] * 511, cache))
    decoder.backend.to_host(decoder.forward([1], cache))
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert kinds == ({"KVCache"} if variant == "llama" else {"KVCache", "RotatingKVCache"})
    # a prompt leaves a rotating cache larger by its length, until the next token cuts it to the window
    assert mlx_lm_decoder.kv_bytes(decoder.model, 512) == sum(layer.nbytes for layer in cache.layers)


def test_nested_and_constant_caches_are_counted() -> None:
    from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache

    plain, state, packed = KVCache(), ArraysCache(2), QuantizedKVCache(group_size=32, bits=8)
    rows = mx.zeros((1, 2, 3, 64), mx.float16)
    for cache in (plain, packed):
        cache.update_and_fetch(rows, rows)
    state.cache = [mx.zeros((1, 8)), mx.zeros((1, 2, 16))]
    each = 2 * 2 * 64 * 2  # k and v, 2 heads of 64 halves
    assert mlx_lm_decoder.held(plain, 1000) == 1000 * each
    assert mlx_lm_decoder.held(packed, 1000) == 1000 * 2 * 2 * (
        64 + 2 * 2 * 2
    )  # 64 bytes, 2 groups of scale and bias
    assert mlx_lm_decoder.held(CacheList(plain, state), 1000) == 1000 * each + (8 + 32) * 4


def test_what_does_not_fit_is_refused_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    with pytest.raises(BackendError, match=r"the weights do not fit: .*Apple M1 can use .*fewer bits"):
        opened(folder, small(weights // 2))
    decoder = opened(folder, small(weights + (8 << 20)))
    assert decoder.new_cache(64).capacity == 64
    words = r"a context of 100000 tokens needs .* GB for keys and values; .* — use --context \d+ or less"
    with pytest.raises(BackendError, match=words):
        decoder.new_cache(100000)

    def full(*a: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 9 bytes")  # MLX's message

    monkeypatch.setattr(mlx_lm.utils, "load_model", full)
    with pytest.raises(BackendError, match=r"MLX stopped: .*allocate 9 bytes — use a shorter --context"):
        opened(folder)


def test_the_command_line_says_aloud_who_computes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    command = ["run", "-m", str(DEMO), "--max-tokens", "2", "--temperature", "0", "hello"]
    assert main([*command, "--engine", "mlx-lm"]) == 0
    said = capfd.readouterr()
    assert f"mlx-lm {mlx_lm.__version__} runs this model, not tinychat's own graph" in said.err
    assert said.out.strip() and "mlx-lm" not in said.out
    assert main([*command, "--backend", "mlx"]) == 0
    assert "mlx-lm" not in capfd.readouterr().err
