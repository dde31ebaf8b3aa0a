"""The cuda backend's graph on CPU tensors, against the reference backend."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import models
from tiny_models import REPRESENTATIVES

from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda import weights
from tinychat_mlx.backends.cuda.backend import CudaBackend
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Attention, CacheShape, Norm, Segment
from tinychat_mlx.weights.weight import Dense

IDS = [5, 80, 13, 2, 96, 41, 7, 7, 30, 64, 11]
FORMS = [("dense", 32), ("int4", 32), ("int4", 64), ("int8", 64), ("int3", 32)]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.ENVIRONMENT, "cpu")
    monkeypatch.delenv("TINYCHAT_CUDA_KV", raising=False)
    torch.set_num_threads(1)


def close(got: np.ndarray, expected: np.ndarray, bound: float) -> None:
    """Check that the largest difference is within bound × the largest expected value."""
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("form, group", FORMS)
@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_every_architecture_gives_the_references_logits(family: str, form: str, group: int) -> None:
    """The bound is 1e-4; float32 sums of 192 terms through 2 layers differ by about 1e-6."""
    config = models.config_of(family)
    expected = models.whole(models.decoder(config, ReferenceBackend(), form, group), IDS)
    close(models.whole(models.decoder(config, CudaBackend(), form, group), IDS), expected, 1e-4)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_steps_pieces_and_rewinding_give_the_logits_of_one_prefill(family: str) -> None:
    config = models.config_of(family)
    model = models.decoder(config, CudaBackend(), "int4")
    expected = models.whole(model, IDS)
    cache, to_host = model.new_cache(len(IDS)), model.backend.to_host
    rows = [to_host(model.forward([i], cache)) for i in IDS]
    close(np.concatenate(rows), expected, 1e-5)
    cache.rewind(3)
    pieces = (IDS[3:5], IDS[5:10], IDS[10:])
    rows = [to_host(model.forward(piece, cache, last_only=False)) for piece in pieces]
    close(np.concatenate(rows), expected[3:], 1e-5)


def test_several_conversations_in_one_pass_do_not_see_each_other() -> None:
    config = models.config_of("qwen3")
    parts = [IDS, IDS[::-1], [9, 8, 7]]
    expected = models.together(models.decoder(config, ReferenceBackend(), "int4"), parts)
    close(models.together(models.decoder(config, CudaBackend(), "int4"), parts), expected, 1e-4)


@pytest.mark.parametrize("form", ["dense", "int4", "int8"])
def test_float16_is_within_its_rounding(form: str) -> None:
    """Errors of fp16 arithmetic.

    Each linear rounds its input, its dequantised weight and (many rows) its output to 2⁻¹¹ relative,
    independently, so the relative error of a product is about √3 · 2⁻¹¹; q, k, v, p and the KV cache add as
    many again. Two layers of 4 products, two attentions and the head: √(9 · 3 + 2 · 5) · 2⁻¹¹ = 0.3 % of the
    typical logit. 97 · 11 logits reach 4 deviations, which the largest logit has too: 4 times.
    """
    config = models.config_of("qwen3")
    expected = models.whole(models.decoder(config, ReferenceBackend(), form), IDS)
    model = models.decoder(config, CudaBackend(dtype=torch.float16), form)
    rms = float(np.sqrt(np.square(expected).mean()))
    got = models.whole(model, IDS)
    assert np.abs(got - expected).max() <= 4 * 37**0.5 * 2**-11 * rms
    cache = model.new_cache(len(IDS))
    stepwise = np.concatenate([model.backend.to_host(model.forward([i], cache)) for i in IDS])
    assert np.abs(stepwise - expected).max() <= 4 * 37**0.5 * 2**-11 * rms


def test_int8_kv_is_within_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of int8 codes.

    A code has an error of half a step of max/127: 1/254 of a head's largest, at 32 inputs about 2.5
    deviations, so each key and value has a relative error of 2.5 / 254 / √3 = 0.6 %; two layers, keys and
    values: √4 · 0.6 %, 4 deviations over all logits.
    """
    config = models.config_of("llama")
    expected = models.whole(models.decoder(config, ReferenceBackend(), "int4"), IDS)
    monkeypatch.setenv("TINYCHAT_CUDA_KV", "int8")
    model = models.decoder(config, CudaBackend(), "int4")
    rms = float(np.sqrt(np.square(expected).mean()))
    error = np.abs(models.whole(model, IDS) - expected).max()
    assert 1e-4 * rms < error <= 4 * 2 * 0.006 * rms  # the lower bound shows that it was stored as int8
    assert model.new_cache(4).k.dtype == torch.int8
    assert not CudaBackend(exact=True).int8_kv


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_with_bias_agree_with_the_reference(kind: str) -> None:
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((3, 48)) + 1, rng.standard_normal(48), rng.standard_normal(48)
    results = []
    for backend in (ReferenceBackend(), CudaBackend()):
        put = [backend.put(a.astype(np.float32)) for a in (x, w, b)]
        results.append(backend.to_host(backend.norm(put[0], Norm("n", kind, put[1], put[2], 1e-5))))
    close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("rows, start", [(1, 0), (1, 9), (4, 0), (4, 7), (11, 3)])
@pytest.mark.parametrize("spec", [
    Attention(0, 0.2), Attention(0, 0.2, window=4), Attention(0, 0.2, softcap=1.5),
    Attention(0, 0.2, alibi=(0.5, 0.25, 0.125, 0.0625)), Attention(0, 0.2, 3, 2.0, (0.5, 0.1, 0.2, 0.3)),
])  # fmt: skip
def test_attention_agrees_with_the_reference(spec: Attention, rows: int, start: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((start + rows, h, 16)).astype(np.float32) for h in (4, 2, 2))
    results = []
    for backend in (ReferenceBackend(), CudaBackend()):
        cache = backend.new_cache(CacheShape(1, 2, 16), start + rows)
        for piece in (slice(0, start), slice(start, start + rows)):
            if piece.stop > piece.start:
                step = backend.step([Segment(cache, piece.stop - piece.start)])
                y = backend.attention(*(backend.put(a[piece]) for a in (q, k, v)), spec, step)
                cache.length = piece.stop
        results.append(backend.to_host(y))
    close(results[1], results[0], 1e-5)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_agree_with_the_reference(kind: str) -> None:
    x = np.linspace(-90, 90, 1001, dtype=np.float32)[None]
    results = []
    for backend in (ReferenceBackend(), CudaBackend()):
        t = backend.put(x)
        both = backend.act(t, kind), backend.glu(t, t, kind)
        results.append(np.stack([backend.to_host(y) for y in both]))
    close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("w_bit, group, n, k", [
    (4, 32, 16, 128), (4, 64, 17, 192), (4, 128, 5, 256), (4, 256, 33, 512), (4, 96, 3, 192),
    (8, 32, 20, 96), (8, 128, 31, 384), (3, 64, 9, 64), (4, 48, 7, 96), (8, 16, 4, 64),
])  # fmt: skip
def test_a_packed_weight_keeps_every_code_scale_and_bias(w_bit: int, group: int, n: int, k: int) -> None:
    """Exact through embed.

    Groups of 48 and 16 have no tiles and give a warning. Slabs of one tile are joined.
    """
    w = models.random_packed(np.random.default_rng(k), n, k, w_bit, group)
    backend = CudaBackend()
    if weights.stored_group(group) is None:
        with pytest.warns(UserWarning, match="no kernel"):
            handle = backend.pack(w)
    else:
        handle = backend.pack(w)
    got = backend.to_host(backend.embed(handle, backend.ids(range(n))))
    np.testing.assert_array_equal(got, w.to_float32())


def test_slabs_join_to_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    w = models.random_packed(np.random.default_rng(3), 70, 256, 4, 64)
    whole = CudaBackend().pack(w)
    monkeypatch.setattr(weights, "SLAB", 16 * 256)
    pieces = CudaBackend().pack(w)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)
    x = np.random.default_rng(4).standard_normal((3, 256)).astype(np.float32)
    backend = CudaBackend()
    close(backend.to_host(backend.linear(backend.put(x), pieces)), x @ w.to_float32().T, 1e-5)


def test_loading_holds_no_weight_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """In addition to the packed weight only one slab at a time goes to the device, never a second copy."""
    sizes = []

    def watched(array: np.ndarray, device: torch.device) -> torch.Tensor:
        sizes.append(array.nbytes)
        return original(array, device)

    original = weights.upload
    monkeypatch.setattr(weights, "upload", watched)
    monkeypatch.setattr(weights, "SLAB", 1 << 14)
    backend = CudaBackend()
    backend.pack(models.random_packed(np.random.default_rng(0), 512, 256, 8, 64))
    backend.pack(Dense("w", np.ones((512, 256), np.float32)))
    assert len(sizes) > 16 and max(sizes) <= 4 << 14


def test_tiles_lie_as_the_layout_says() -> None:
    """The docstring's formula, written as a loop over one unit of each width."""
    q = np.random.default_rng(0).integers(0, 16, (32, 256), dtype=np.uint8)
    four = weights.to_tiles(torch.from_numpy(q), 4).numpy().view(np.uint32)
    eight = weights.to_tiles(torch.from_numpy(q * 16), 8).numpy().view(np.uint32)
    for r, g, c, t, j, p, e in np.ndindex(2, 8, 4, 4, 2, 2, 2):
        row, k, lane = 16 + 8 * r + g, 128 + 32 * c + 8 * t + 4 * j + 2 * p + e, 4 * g + t
        nibble = four[1, 1, c // 2, lane, 2 * (c % 2) + j] >> (4 * (4 * e + 2 * p + r)) & 15
        assert nibble == q[row, k]
        assert eight[1, 1, c, lane, 2 * j + r] >> (8 * (2 * p + e)) & 255 == q[row, k] * 16


def test_bfloat16_and_float32_checkpoints_load_exactly() -> None:
    w = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    bits = (w.view(np.uint32) >> 16).astype(np.uint16)
    bits.setflags(write=False)  # like a mapped file's
    for weight in (Dense("a", bits), Dense("b", w)):
        backend = CudaBackend()
        got = backend.to_host(backend.embed(backend.pack(weight), backend.ids(range(5))))
        np.testing.assert_array_equal(got, weight.to_float32())


# errors ----------------------------------------------------------------------------------------------
def test_a_weight_outside_float16_is_refused() -> None:
    with pytest.raises(BackendError, match="lm_head: has values beyond torch.float16"):
        CudaBackend(dtype=torch.float16).pack(Dense("lm_head", np.full((2, 32), 1e6, np.float32)))


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend()
    monkeypatch.setattr(devices, "available", lambda device: 1 << 20)
    with pytest.raises(BackendError, match=r"KV cache of 8192 tokens needs 0.25 GiB.*smaller --context"):
        backend.new_cache(CacheShape(32, 2, 64), 8192)
    with pytest.raises(BackendError, match=r"model \(at model.layers.3.mlp\) needs .* smaller or a 4-bit"):
        backend.pack(models.random_packed(np.random.default_rng(0), 2048, 2048, 4, 128, "model.layers.3.mlp"))
    assert backend.memory().used == 0


def test_out_of_memory_is_one_line_and_the_backend_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.decoder(models.config_of("llama"), CudaBackend(), "int4")
    expected = models.whole(model, IDS)

    def full(*args: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "dense_tiles", full)
        with pytest.raises(BackendError, match=r"out of memory in embed \(CUDA out of memory.*smaller") as e:
            models.whole(model, IDS)
        assert "\n" not in str(e.value)
        patched.setattr(weights, "pack_tiled", full)
        with pytest.raises(BackendError, match="out of memory in pack"):
            model.backend.pack(models.random_packed(np.random.default_rng(0), 16, 128, 4, 32))
    np.testing.assert_array_equal(models.whole(model, IDS), expected)


def test_memory_is_counted_and_given_back() -> None:
    backend = CudaBackend()
    handle = backend.pack(models.random_packed(np.random.default_rng(0), 64, 256, 4, 128))
    cache = backend.new_cache(CacheShape(2, 2, 16), 10)
    held = 64 * 256 // 2 + 64 * 2 * 2 * 4 + 2 * 2 * 2 * 16 * 10 * 4
    assert backend.memory().used == backend.memory().peak == held == handle.nbytes + cache.nbytes
    assert backend.memory().limit > held
    del handle, cache
    gc.collect()
    assert backend.memory().used == 0 and backend.memory().peak == held


@pytest.mark.parametrize("text, line", [
    ("Found no NVIDIA driver on your system. Please check\nmore", "no NVIDIA driver is loaded"),
    ("The NVIDIA driver on your system is too old (found version 11040).", "driver is too old for torch"),
    ("CUDA error: no kernel image is available for execution", "no code for this GPU"),
    ("No CUDA GPUs are available", "no CUDA GPU is visible"),
    ("CUDA error: unknown error\nCUDA kernel errors might", "cannot be used: CUDA error: unknown error"),
])  # fmt: skip
def test_torchs_reasons_become_one_line(text: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError(text)

    monkeypatch.setenv(devices.ENVIRONMENT, "")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(BackendError, match=line) as e:
        CudaBackend()
    assert "\n" not in str(e.value)


def test_torch_without_cuda_and_a_wrong_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv(devices.ENVIRONMENT, "cuda:0")
    with pytest.raises(BackendError, match="built without CUDA"):
        CudaBackend()
    monkeypatch.setenv(devices.ENVIRONMENT, "gpu")
    with pytest.raises(BackendError, match="'gpu' is not a device"):
        CudaBackend()


def test_cpu_tensors_are_said_aloud_and_the_core_never_imports_torch() -> None:
    shown = CudaBackend().describe()
    assert shown.backend == "cuda" and "CPU tensors for testing" in shown.detail
    code = "import sys, tinychat_mlx.model.decoder, tinychat_mlx.engine.engine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
