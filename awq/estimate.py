"""What a conversion will take, before it starts: one step of calibration and one layer, done and timed.

Nothing is written. The first layer is read, run on one step of random tokens and quantised for real; time is
that, times the number of layers and steps. Memory and disk follow from the shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinychat_mlx.awq.layer import empty_moments, quantize_layer, round_layer
from tinychat_mlx.awq.record import STEP_ROWS, LayerRun, Recorder, embedded_rows, steps
from tinychat_mlx.awq.selftext import RoundedSource, sampled
from tinychat_mlx.awq.settings import WINDOW, Settings, default_tokens, open_dense
from tinychat_mlx.awq.sites import LayerWeights, shapes, sites
from tinychat_mlx.awq.stream import observe
from tinychat_mlx.awq.tensors import rim_group, rim_names, rounded_rows
from tinychat_mlx.backend import Backend, CacheShape, Segment
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import ModelConfig
from tinychat_mlx.decoder import Graph, Loader
from tinychat_mlx.weight import Dense

BASE_BYTES = 120 << 20  # Python, NumPy, the buffers of BLAS, the tokenizer
WRITE_BYTES_S = 300e6  # a modest disk, with fsync
SAMPLE_ROWS = 4096  # of the embedding, rounded and multiplied to see how fast that goes

Make = Callable[[bool], Backend]  # exact? -> the device


@dataclass(frozen=True)
class Estimate:
    """seconds of the whole conversion; peak_bytes of memory; disk while it runs, and in the end."""

    seconds: float
    peak_bytes: int
    disk_bytes: int
    result_bytes: int
    calibration_tokens: int


def estimate(source: Checkpoint, settings: Settings, backend: Make) -> Estimate:
    """Check everything a conversion checks, then measure."""
    start = time.perf_counter()
    config = open_dense(source, settings)
    seconds = time.perf_counter() - start
    tokens = 0 if settings.method == "rtn" else settings.tokens or default_tokens(config)
    result = result_bytes(config, source, settings)
    seconds += 2 * result / WRITE_BYTES_S + _rim_seconds(config, source, settings)
    seconds += config.num_hidden_layers * _layer_seconds(config, source, settings, backend, tokens)
    if tokens and settings.calib == "self":
        seconds += _writing_seconds(config, source, backend(False), tokens)
    rows = 4 * tokens * config.hidden_size * 4  # of two layers
    return Estimate(seconds, peak_bytes(config, source, settings, tokens), 2 * result + rows, result, tokens)


def window_of(config: ModelConfig) -> int:
    return min(WINDOW, config.max_position_embeddings)


def _layer_seconds(
    config: ModelConfig, source: Checkpoint, settings: Settings, backend: Make, tokens: int
) -> float:
    """One layer: read, all steps of the forward pass (the faster of two, after one to warm up), quantise."""
    start = time.perf_counter()
    weights = LayerWeights.read(config, 0, source)
    if not tokens:
        round_layer(weights, settings.form)
        return time.perf_counter() - start
    device, window = backend(True), window_of(config)
    run = LayerRun(config, 0, weights, Recorder(device), window)
    fixed = time.perf_counter() - start
    one = next(steps(tokens, window))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, one.stop).astype(np.int32)
    x = embedded_rows(config, source, device, ids, window)
    moments = empty_moments(settings.method, weights, settings.group_size)
    times, streams = [], 2 if settings.method == "awq+" else 1
    for _ in range(3):
        start = time.perf_counter()
        observe(run, moments, np.stack([x] * streams))
        if streams == 2:
            run.forward(x)  # once more when the layer is quantised
        times.append(time.perf_counter() - start)
    del run
    start = time.perf_counter()
    quantize_layer(weights, moments, settings.form, settings.compare)
    quantising = time.perf_counter() - start
    written = tokens * config.hidden_size * 4 / WRITE_BYTES_S
    return fixed + min(times[1:]) * tokens / len(x) + quantising + written


def _rim_seconds(config: ModelConfig, source: Checkpoint, settings: Settings) -> float:
    """Embedding and head: some rows are rounded and timed."""
    if settings.head_bits == 16:
        return 0.0
    sample, rows = _sample(config, source), config.vocab_size
    start = time.perf_counter()
    rounded_rows(sample, settings.head_bits, rim_group(config, settings.group_size))
    seconds = time.perf_counter() - start
    return seconds * rows / len(sample.w) * len(rim_names(config, source)[0])


def _sample(config: ModelConfig, source: Checkpoint) -> Dense:
    weight = source.weight(config.spec.name("embed"))
    assert isinstance(weight, Dense)
    return Dense(weight.name, weight.w[:SAMPLE_ROWS])


def _writing_seconds(config: ModelConfig, source: Checkpoint, device: Backend, tokens: int) -> float:
    """The model's own text: one layer and a part of the head at 8 bits, timed for a token of every conversation."""
    window, rounded = window_of(config), RoundedSource(source)
    count, layers = -(-tokens // window), config.num_hidden_layers
    start = time.perf_counter()
    layer = LayerRun(config, 0, rounded, Recorder(device), window).layer
    loading = (time.perf_counter() - start) * layers
    graph, norm = Graph(config, device), Loader(config, rounded, device).final_norm()
    sample = _sample(config, source)
    head = device.pack(rounded_rows(sample, 8, rim_group(config, 128)))
    shape = CacheShape(1, config.num_key_value_heads, config.head_dim)
    caches = [device.new_cache(shape, window) for _ in range(count)]
    for cache in caches:
        cache.length = window // 2  # the mean
    x = np.zeros((count, config.hidden_size), np.float32)
    body, top = [], []
    for _ in range(3):
        step = device.step([Segment(cache, 1) for cache in caches])
        start = time.perf_counter()
        y = device.to_host(graph.block(device.put(x.copy()), layer, step))
        body.append(time.perf_counter() - start)
        start = time.perf_counter()
        sampled(device.to_host(graph.logits(device.put(y), norm, head)), np.random.default_rng(0))
        top.append(time.perf_counter() - start)
    step_s = min(body) * layers + min(top) * config.vocab_size / len(sample.w)
    return loading + window * step_s


def result_bytes(config: ModelConfig, source: Checkpoint, settings: Settings) -> int:
    """Size of the converted weights: codes, a float16 scale and bias a group, all else in float16."""
    body = config.num_hidden_layers * sum(n * k for n, k in shapes(config).values())
    total = body * (settings.w_bit / 8 + 4 / settings.group_size)
    matrices, _ = rim_names(config, source)
    for name in matrices:
        n, k = source.info(f"{name}.weight")[1]
        plain = settings.head_bits == 16 or name == config.spec.name("positions")
        total += n * k * (2 if plain else settings.head_bits / 8 + 4 / rim_group(config, settings.group_size))
    return int(total)


def peak_bytes(config: ModelConfig, source: Checkpoint, settings: Settings, tokens: int) -> int:
    """The most memory any phase holds."""
    sizes = shapes(config)
    layer = 4 * sum(n * k for n, k in sizes.values())
    full = settings.method == "awq+"
    rows = 4 * tokens * config.hidden_size * (2 if full else 1)
    stacks = [(sum(sizes[r][0] for r in site.roles), sizes[site.roles[0]][1]) for site in sites(config)]
    moments = sum(4 * k * (k + min(k, 2 * n) if full else settings.group_size) for n, k in stacks)
    running = 2 * layer + moments + rows + 8 * STEP_ROWS * max(k for _, k in stacks) * 4
    # Of a site: its matrix about seven times over, and of H the permuted mean and its factor with a copy.
    site = max(7 * 4 * n * k + (3 * 4 * k * k if full else 0) for n, k in stacks)
    quantising = layer + moments + rows + site
    vocabulary = config.vocab_size * config.hidden_size
    rim = int(2 * vocabulary * settings.head_bits / 8)
    phases = [running, quantising, rim] if tokens else [2 * layer, rim]
    if tokens and settings.calib == "self":
        matrices = len(rim_names(config, source)[0])
        eight_bits = 1.04 * (layer / 4 * config.num_hidden_layers + matrices * vocabulary)
        kv = tokens * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        phases.append(int(eight_bits + kv + vocabulary))
    return BASE_BYTES + max(phases)
