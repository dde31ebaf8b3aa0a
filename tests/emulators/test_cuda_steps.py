"""Whole models and whole steps on emulated kernels, recorded and replayed as in a CUDA graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import emulate
import models

from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda import kernels
from tinychat_mlx.backends.cuda.backend import CudaBackend
from tinychat_mlx.backends.cuda.graph import Replay
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import Segment, Step

pytestmark = pytest.mark.skipif(emulate.compiler() is None, reason="no C++ compiler to emulate kernels with")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.ENVIRONMENT, "cpu")
    torch.set_num_threads(1)


IDS = [5, 80, 13, 2, 96, 41, 7, 7, 30, 64]


class Recorder(emulate.Emulator):
    """Records launches and repeats them, like a CUDA graph's replay, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        self.calls: list[tuple[Any, ...]] = []

    def launch(self, *call: Any) -> None:
        if self.recording:
            self.calls.append(call)
        super().launch(*call)

    def replay(self) -> None:
        for call in self.calls:
            super().launch(*call)


class Keeping(kernels.Kernels):
    """Never frees an output, like a graph's memory pool."""

    kept: ClassVar[list[torch.Tensor]] = []

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.kept.append(super().new(shape, dtype))
        return self.kept[-1]


@pytest.mark.parametrize(
    "family, form, group", [("llama", "int4", 64), ("qwen3", "int8", 32), ("gemma2", "int4", 128)]
)
def test_a_whole_model_on_kernels_agrees_with_the_reference(family: str, form: str, group: int) -> None:
    """fp16's bound of test_cuda_backend.py; prefill by gemm, steps by matvec."""
    config = models.config_of(family, intermediate_size=256)
    reference = models.decoder(config, ReferenceBackend(), form, group)
    expected = models.whole(reference, IDS)
    launcher = emulate.Emulator()
    backend = CudaBackend(dtype=torch.float16, kernels=kernels.Kernels(launcher, CPU, 8))
    model = models.decoder(config, backend, form, group)
    bound = 4 * 37**0.5 * 2**-11 * float(np.sqrt(np.square(expected).mean()))
    assert np.abs(models.whole(model, IDS) - expected).max() <= bound
    cache = model.new_cache(len(IDS))
    stepwise = np.concatenate([backend.to_host(model.forward([i], cache)) for i in IDS[:5]])
    assert np.abs(stepwise - expected[:5]).max() <= bound
    ours = {"embed", "gemm", "matvec", "matvec_glu", "norm_rows", "attend"}
    assert ours <= set(launcher.launched)


def test_a_step_recorded_once_serves_every_position_and_token() -> None:
    """Simulates a CUDA graph: the launches of one step, repeated with new ids and positions.

    A step runs only our kernels, and none gets a length from the host.
    """
    config = models.config_of("llama", intermediate_size=256)
    recorder = Recorder()
    backend = CudaBackend(dtype=torch.float16, kernels=Keeping(recorder, CPU, 8))
    model = models.decoder(config, backend, "int4", 64)
    cache, other = model.new_cache(40), model.new_cache(40)
    eager = [backend.to_host(model.forward([i], other)) for i in IDS]
    ids, positions = backend.ids(IDS[:1]), torch.zeros(1, dtype=torch.int32)
    step = Step((Segment(cache, 1),), positions)
    recorder.recording = True
    logits = model._logits(model._hidden(ids, step))
    recorder.recording = False
    assert len(recorder.calls) == 7 * config.num_hidden_layers + 3  # a CUDA graph would contain nothing else
    np.testing.assert_array_equal(logits.numpy(), eager[0])
    for at in range(1, len(IDS)):
        ids[0], positions[0] = IDS[at], at
        recorder.replay()
        np.testing.assert_array_equal(logits.numpy(), eager[at])


def test_sampling_on_the_device_follows_the_seed() -> None:
    backend = CudaBackend(dtype=torch.float16, kernels=kernels.Kernels(emulate.Emulator(), CPU, 8))
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 97)).astype(np.float32))
    draws = []
    for seed in (1, 1, 2):
        draw = backend.sampler(1.0, 0, 0.95, 0.0, seed)
        assert draw is not None
        draws.append([int(backend.to_host(draw(logits))[0]) for _ in range(8)])
    assert draws[0] == draws[1] != draws[2]
    assert CudaBackend().sampler(1.0, 0, 1.0, 0.0, 0) is None
    assert backend.sampler(1.0, 0, 0.95, 0.0, 1, 1.2, [3]) is None  # the host applies a penalty


class FakeGraphs:
    """torch's graphs on a CPU: launches are recorded and repeated by replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] | None = None
        self.emulator, outer = emulate.Emulator(), self

        class Graph:
            def replay(self) -> None:
                for call in self.calls:  # type: ignore[attr-defined]
                    outer.emulator.launch(*call)

        @contextmanager
        def recording(graph: Any) -> Iterator[None]:
            self.calls = graph.calls = []
            yield
            self.calls = None

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", recording)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def launch(self, *call: Any) -> None:
        if self.calls is not None:
            self.calls.append(call)
        else:
            self.emulator.launch(*call)


def test_decoding_replays_one_graph_a_token_for_each_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two caches in turn, one rewound, give the bits of eager steps. A dead cache's graph is freed."""
    graphs = FakeGraphs(monkeypatch)
    backend = CudaBackend(dtype=torch.float16, kernels=Keeping(graphs, CPU, 8))
    model = models.decoder(models.config_of("qwen3", intermediate_size=256), backend, "int4", 64)
    eager, to_host = model.new_cache(30), backend.to_host
    expected = [to_host(model.forward([i], eager)) for i in (5, 80, 13, 2, 96)]
    replay = model._one_row = Replay(model._one_row, lambda: backend._recordable)
    caches = [model.new_cache(30), model.new_cache(17)]
    for i, token in enumerate((5, 80, 13, 2, 96)):
        for cache in caches:
            np.testing.assert_array_equal(to_host(model.forward([token], cache)), expected[i])
    assert replay.replays == 2 * 4  # all but each cache's first step
    caches[0].rewind(2)
    np.testing.assert_array_equal(to_host(model.forward([13], caches[0])), expected[2])
    gone = weakref.ref(caches.pop())
    del cache
    gc.collect()
    assert gone() is None and len(replay.seen) == 1


def test_a_step_that_reads_lengths_on_the_host_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 20 inputs has no kernel: torch's attention runs, and no graph may record its length."""

    def record(*args: object) -> None:
        pytest.fail("a step that cannot be repeated was recorded")

    monkeypatch.setattr(Replay, "record", record)
    config = models.config_of("llama", head_dim=20, num_attention_heads=16, num_key_value_heads=8)
    backend = CudaBackend(dtype=torch.float16, kernels=kernels.Kernels(emulate.Emulator(), CPU, 8))
    model = models.decoder(config, backend, "int4")
    replay = model._one_row = Replay(model._one_row, lambda: backend._recordable)
    cache, ids = model.new_cache(8), [5, 80, 13, 2]
    stepwise = np.concatenate([backend.to_host(model.forward([i], cache)) for i in ids])
    whole = models.whole(model, ids)
    assert replay.replays == 0 and np.abs(stepwise - whole).max() < 0.02 * np.abs(whole).max()
