"""Estimate the time, memory and disk space of a conversion by timing one calibration step and one layer.

Nothing is written. The first layer is read, run on one step of random tokens and quantised. The time is that,
multiplied by the number of layers and steps. Memory and disk space follow from the shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tinychat_mlx.awq import head
from tinychat_mlx.awq.calibration.recorder import (
    STEP_ROWS,
    Recorder,
    Routing,
    alone,
    embedded_rows,
    window_of,
)
from tinychat_mlx.awq.calibration.rows import Split, Streams
from tinychat_mlx.awq.calibration.selftext import RoundedSource, conversations, sampled
from tinychat_mlx.awq.experts import LEAST, Mixture, add_experts, round_experts
from tinychat_mlx.awq.layer import Moments, QuantizedLayer, SiteReport, round_layer
from tinychat_mlx.awq.layer_stream import LayerQuantizer
from tinychat_mlx.awq.output.reformat import reformatted
from tinychat_mlx.awq.output.tensors import rim_names, rounded_rows
from tinychat_mlx.awq.resources import Needs, needs
from tinychat_mlx.awq.settings import Settings, fitting_group, open_dense
from tinychat_mlx.awq.sites import LayerWeights, mixture
from tinychat_mlx.awq.sizes import BASE_BYTES, kinds
from tinychat_mlx.contract import Backend, CacheShape, Segment
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Graph, Layer, Loader
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.weight import F32, Dense

WRITE_BYTES_S = 300e6  # bytes per second of a slow disk, with fsync
SAMPLE_ROWS = 4096  # embedding rows that are rounded and multiplied for timing

Make = Callable[[bool], Backend]  # make(exact) returns the device


@dataclass(frozen=True)
class Estimate(Needs):
    """The needs of a conversion and its duration in seconds."""

    seconds: float = 0.0


def estimate(source: Checkpoint, settings: Settings, backend: Make) -> Estimate:
    """Run all checks of a conversion, then measure."""
    if source.quantization.format != "dense":
        return _of_reformat(source, settings)
    start = time.perf_counter()
    config, settings = open_dense(source, settings)
    seconds = time.perf_counter() - start
    takes = needs(config, source, settings)
    tokens = takes.calibration_tokens
    seconds += 2 * takes.result_bytes / WRITE_BYTES_S + _rim_seconds(config, source, settings)
    for layer, count in kinds(config).items():
        seconds += count * _layer_seconds(config, layer, source, settings, backend, tokens)
    if tokens and settings.calib == "self":
        seconds += _writing_seconds(config, source, backend(False), tokens)
    if head.is_site(config, source, settings):
        seconds += _head_seconds(config, source, settings, backend(True), tokens)
    return Estimate(**asdict(takes), seconds=seconds)


def _of_reformat(source: Checkpoint, settings: Settings) -> Estimate:
    """Estimate a change of format. Every module is read once now, and twice more when it is written."""
    start = time.perf_counter()
    tensors = reformatted(source, settings.format).tensors
    seconds, nbytes = time.perf_counter() - start, sum(tensor.nbytes for tensor in tensors)
    peak = BASE_BYTES + 4 * max(tensor.nbytes for tensor in tensors)
    return Estimate(peak, nbytes, nbytes, seconds=3 * seconds + nbytes / WRITE_BYTES_S)


def _layer_seconds(
    config: ModelConfig, layer: int, source: Checkpoint, settings: Settings, backend: Make, tokens: int
) -> float:
    """Time one layer, read and quantised for one step of rows. Row-dependent work is scaled up to all rows."""
    start = time.perf_counter()
    weights = LayerWeights.read(config, layer, source)
    if not tokens:
        round_layer(weights, settings.form)
        round_experts(weights, source, settings.form)
        return time.perf_counter() - start
    split = Split.of(min(tokens, STEP_ROWS), window_of(config))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, split.tokens).astype(np.int32)
    x = embedded_rows(config, source, backend(True), ids, split.window)
    quantizer = _Timed(tokens, source, config, settings, split, backend(True), backend(False))
    start = time.perf_counter()
    quantizer.run(weights, Streams.begin(x, split, settings.method == "awq+"))
    running = quantizer.rows_s.seconds
    fixed = time.perf_counter() - start - running - quantizer.skipped
    written = tokens * config.hidden_size * 4 / WRITE_BYTES_S
    return fixed + quantizer.experts_s + running * tokens / split.tokens + written


class _Timed(LayerQuantizer):
    """Quantises a layer, but only one average expert and the shared one.

    experts_s: estimated seconds of all experts. skipped: seconds that the sample took.
    """

    def __init__(self, tokens: int, *args: Any) -> None:
        super().__init__(*args)
        self.tokens, self.experts_s, self.skipped = tokens, 0.0, 0.0

    def _rounded(self, weights: LayerWeights) -> QuantizedLayer:
        return round_layer(weights, self.form)

    def _mixture(
        self, weights: LayerWeights, wanted: list[Routing], given: list[Routing], moments: Moments, x: Streams
    ) -> tuple[LayerWeights, Any, tuple[SiteReport, ...]]:
        start = time.perf_counter()
        self.experts_s = _experts_seconds(
            weights, self.source, self.settings, self.backend, wanted[0].h, moments, self.tokens
        )
        self.skipped = time.perf_counter() - start
        return weights, (), ()


def fastest(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _experts_seconds(
    weights: LayerWeights,
    source: Checkpoint,
    settings: Settings,
    device: Backend,
    h: F32,
    moments: Moments,
    tokens: int,
) -> float:
    """Time one expert with an average share of the tokens, and the shared one, which gets all tokens."""
    moe = mixture(weights.config, weights.layer)
    assert moe is not None
    each = {0: (moe.num_experts, tokens * moe.num_experts_per_tok // moe.num_experts)}
    if moe.shared_expert_intermediate_size:
        each[moe.num_experts] = (1, tokens)
    seconds = 0.0
    for e, (count, sent) in each.items():
        rows = np.resize(h, (max(sent, LEAST), h.shape[1]))
        one = np.ones((len(rows), 1), np.float32)
        routing, split = Routing(rows, np.full(one.shape, e, np.intp), one), Split.of(len(rows), len(rows))
        start = time.perf_counter()
        mixed = Mixture(
            weights, source, Recorder(device), routing, routing, split, settings.form, settings.method, (e,)
        )
        _, codes, _ = mixed.quantize(moments, np.zeros_like(rows))
        first = replace(routing, choice=np.zeros_like(routing.choice))  # once more with the codes
        add_experts(QuantizedLayer(weights, {}, (), codes), first, Recorder(device), np.zeros_like(rows))
        seconds += count * (time.perf_counter() - start)
    return seconds


def _rim_seconds(config: ModelConfig, source: Checkpoint, settings: Settings) -> float:
    """Estimate embedding and head by rounding some rows."""
    if settings.head_bits == 16:
        return 0.0
    sample, rows = _sample(config, source), config.vocab_size
    start = time.perf_counter()
    rounded_rows(sample, settings.head_bits, settings.group_size)
    seconds = time.perf_counter() - start
    matrices = len(rim_names(config, source)[0]) - head.is_site(config, source, settings)
    return seconds * rows / len(sample.w) * matrices


def _head_seconds(
    config: ModelConfig, source: Checkpoint, settings: Settings, device: Backend, tokens: int
) -> float:
    """Estimate a quantised head: time one step of rows, the search, and one stripe."""
    form = head.head_form(settings)
    x = np.random.default_rng(0).standard_normal((STEP_ROWS, config.hidden_size)).astype(np.float32)
    start = time.perf_counter()
    split = Split.of(len(x), len(x) // 4)
    moments, held = head.head_inputs(config, source, device, x, split, form, settings.method)
    shown = time.perf_counter() - start
    start = time.perf_counter()
    made = head.Head.chosen_by(config, source, moments, held, form)
    chosen = time.perf_counter() - start
    start = time.perf_counter()
    rows = len(next(made.stripes()).q)
    coded = time.perf_counter() - start
    return shown * tokens / STEP_ROWS + chosen + coded * config.vocab_size / rows


def _sample(config: ModelConfig, source: Checkpoint) -> Dense:
    weight = source.weight(config.spec.name("embed"))
    assert isinstance(weight, Dense)
    return Dense(weight.name, weight.w[:SAMPLE_ROWS])


def _writing_seconds(config: ModelConfig, source: Checkpoint, device: Backend, tokens: int) -> float:
    """Estimate the generated text: time a layer of each kind and a part of the head at 8 bits for one token."""
    rounded, (count, length) = RoundedSource(source), conversations(tokens, window_of(config))
    graph, loader = Graph(config, device), Loader(config, rounded, device)
    sample = _sample(config, source)
    norm, head = (
        loader.final_norm(),
        device.pack(rounded_rows(sample, 8, fitting_group([config.hidden_size]))),
    )
    shape = CacheShape(1, config.num_key_value_heads, config.head_dim)
    caches = [device.new_cache(shape, length) for _ in range(count)]
    for cache in caches:
        cache.length = length // 2  # the mean
    x = np.random.default_rng(0).standard_normal((count, config.hidden_size)).astype(np.float32)
    step = device.step([Segment(cache, 1) for cache in caches])

    def top() -> None:
        sampled(device.to_host(graph.logits(device.put(x.copy()), norm, head)), np.random.default_rng(0))

    def block(layer: Layer) -> None:
        with np.errstate(all="ignore"):  # the caches are uninitialised
            device.to_host(graph.block(device.put(x.copy()), layer, step))

    seconds = length * fastest(top) * config.vocab_size / len(sample.w)
    for number, layers in kinds(config).items():
        start = time.perf_counter()
        layer = alone(loader.layer(number))
        loading = time.perf_counter() - start
        seconds += layers * (loading + length * fastest(partial(block, layer)))
    return seconds
