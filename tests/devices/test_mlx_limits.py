"""The MLX backend's errors about its limits: memory, dtypes, versions, threads."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mlx_models import agree, decoder, logits
from tiny_models import tiny

from tinychat_mlx.apps.doctor import devices
from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.device import INSTALL, MINIMUM, Chip, check_version, choose_dtype, find_chip
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import CacheShape, Norm
from tinychat_mlx.weights.weight import F32, Dense


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def chip(**given: Any) -> Chip:
    return Chip(**({"name": "Apple M1", "metal": True, "generation": 13, "memory": 8 << 30,
                    "working_set": 5 << 30} | given))  # fmt: skip


def test_a_cache_that_would_not_fit_is_refused_with_the_sum() -> None:
    b = MlxBackend(exact=True)
    b.chip = chip(working_set=1 << 30)
    shape = CacheShape(16, 8, 64)  # Llama-3.2-1B in float32: 64 KiB per token
    words = r"40000 tokens needs 2\.44 GB.*can use 1\.00 GB — use --context \d{4,5}"
    with pytest.raises(BackendError, match=words):
        b.new_cache(shape, 40000)
    assert b.new_cache(shape, 100).capacity == 100
    b.chip = chip(working_set=1 << 20)
    with pytest.raises(BackendError, match="smaller model"):
        b.new_cache(shape, 100)


def test_limits_stay_below_three_quarters_of_the_memory() -> None:
    assert chip().limit == 5 << 30
    assert chip(working_set=9 << 30).limit == 6 << 30
    assert find_chip().limit <= find_chip().memory * 3 // 4


def test_dtypes_by_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYCHAT_MLX_DTYPE", raising=False)
    assert choose_dtype(chip(), exact=False) == mx.float16
    assert choose_dtype(chip(), exact=True) == mx.float32
    assert choose_dtype(chip(metal=False, generation=0), exact=False) == mx.float32
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "bfloat16")
    assert choose_dtype(chip(name="Apple M3", generation=15), exact=False) == mx.bfloat16
    with pytest.raises(BackendError, match="emulated on Apple M1 — use float16"):
        choose_dtype(chip(), exact=False)
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "int4")
    with pytest.raises(BackendError, match="give one of"):
        choose_dtype(chip(), exact=False)


def test_float32_is_not_multiplied_with_fewer_bits() -> None:
    """MLX reads this once, at its first product, so `device` sets it before importing MLX."""
    assert os.environ["MLX_ENABLE_TF32"] == "0"


def test_float16_means_the_same_as_float32(monkeypatch: pytest.MonkeyPatch, tiny_root: Path) -> None:
    """The dtype of a Mac, on few tokens. Constants must be narrowed, or everything is computed in float32."""
    t = tiny("llama-llama3", tiny_root)
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    d = decoder(t.folder, MlxBackend(exact=True, compiled=True))
    cache = d.new_cache(8)
    y = d.forward(t.ids[:4], cache)
    assert y.dtype == mx.float16 and cache.parts["k"][0].dtype == mx.float16
    # MLX's CPU loops sum in float16: 96 terms · 2^-11, through 4 layers
    got = d.backend.to_host(d.forward((t.ids[4],), cache))
    assert np.abs(got - t.logits[4]).max() < 4 * 96 * 2**-11 * np.abs(t.logits[4]).max()


def test_what_adds_up_may_pass_float16_s_largest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's residual does: products are float16, their sum through the layers is not."""
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    b = MlxBackend()
    table = b.pack(Dense("t", np.full((4, 8), 60000, np.float16)))
    eye = b.pack(Dense("w", np.eye(8, dtype=np.float16) * 8))
    norm = Norm("n", "rms", b.put(np.full(8, 60.0, np.float32)), None, 1e-5)
    x = b.embed(table, b.ids([1, 2]))
    for _ in range(200):
        x = b.linear_add(b.norm(x, norm), eye, x)  # adds 480
    assert b.norm(x, norm).dtype == b.linear(x, eye).dtype == mx.float16
    assert np.abs(b.to_host(x) - (60000 + 200 * 480)).max() < 200 * 480 * 2**-11
    assert np.isfinite(b.to_host(b.norm(x, norm))).all()


def test_old_versions_and_macs_without_metal_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for good in ("0.32.1", "0.32.1.dev20260801", "0.33.0", "1.0"):
        check_version(good)
    for old in ("0.29.1", "0.32.0"):
        with pytest.raises(
            BackendError, match=rf"MLX {re.escape(old)} is too old — pip install -U 'mlx>=0\.32\.1'"
        ):
            check_version(old)
    needs = f"mlx>={'.'.join(map(str, MINIMUM))}'"
    asked = (ROOT / "pyproject.toml").read_text().replace("mlx[cpu]", "mlx")
    assert needs in INSTALL and asked.count(needs[:-1]) == 2, "for a Mac, and for the tests"
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(devices, "find_spec", lambda name: None if name == "mlx" else find_spec(name))
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert needs in str(devices.lacks("mlx"))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no Metal device.*--backend cpu"):
        MlxBackend(exact=True)


def test_threads_take_turns(tiny_root: Path) -> None:
    """MLX's default stream is per thread, and two evaluations at once abort the process."""
    t = tiny("llama", tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True))
    results: list[F32] = []

    def run() -> None:
        results.append(logits(d, t.ids, [20, *[1] * 20]))

    jobs = [threading.Thread(target=run) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(results) == 4
    for got in results:
        agree(got, t.logits)


def test_a_thread_may_finish_what_another_began(tiny_root: Path) -> None:
    """MLX is lazy: the first thread leaves unfinished work on a stream that the second must share."""
    t = tiny("llama", tiny_root)
    d = decoder(t.folder, MlxBackend(exact=True))
    cache, results = d.new_cache(40), []
    d.forward(t.ids[:20], cache)

    def finish() -> None:
        results.append(d.backend.to_host(d.forward(t.ids[20:], cache, last_only=False)))

    job = threading.Thread(target=finish)
    job.start()
    job.join()
    agree(results[0], t.logits[20:])


def test_a_failure_on_the_device_is_a_backend_error() -> None:
    class Broken:
        @property
        def dtype(self) -> Any:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes")  # MLX's message

    with pytest.raises(BackendError, match=r"MLX stopped: .*allocate 9 bytes — use a shorter --context"):
        MlxBackend(exact=True).to_host(Broken())


def test_it_says_what_it_runs_on() -> None:
    device = MlxBackend(exact=True).describe()
    where = "Metal" if mx.metal.is_available() else "CPU"
    assert where in device.detail and "float32" in device.detail and mx.__version__ in device.detail


def test_weights_that_would_not_fit_are_refused() -> None:
    b = MlxBackend(exact=True)
    b.chip = chip(working_set=300 << 20)
    w = Dense("model.layers.3.mlp.up_proj", np.zeros((4096, 4096), np.float32))
    with pytest.raises(BackendError, match=r"do not fit: .*up_proj, and Apple M1 can use 0\.29 GB"):
        b.pack(w)
