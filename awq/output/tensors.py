"""List the tensors of a converted model: those of a layer, and those outside the layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from tinychat_mlx.awq.layer import QuantizedLayer
from tinychat_mlx.awq.search.quantizer import Quantized, round_to_nearest
from tinychat_mlx.awq.sites import mixture
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Source
from tinychat_mlx.weights.formats.awq_gemm import awq_entries
from tinychat_mlx.weights.formats.mlx import float_entry, half, mlx_entries
from tinychat_mlx.weights.formats.stacked import stack
from tinychat_mlx.weights.safetensors import Entry
from tinychat_mlx.weights.weight import Dense, Packed, Weight, to_float32

ROWS = 4096  # embedding rows rounded at once: 4096 · 4096 · 4 bytes


def weight_entries(weight: Weight, format: str) -> list[Entry]:
    """Return a weight in the chosen format. Floats become float16."""
    if isinstance(weight, Packed) and format == "awq":
        return awq_entries(weight)
    if isinstance(weight, Dense):
        return mlx_entries(Dense(weight.name, half(weight.name, weight.w), weight.bias))
    return mlx_entries(weight)


def layer_entries(layer: QuantizedLayer, format: str) -> list[Entry]:
    """Return all tensors of a quantised layer, under the checkpoint's names."""
    weights = layer.weights
    tensors: list[Entry] = []
    for module in weights.modules():
        tensors += weight_entries(layer.weight(weights.name(module)), format)
    tensors += _expert_entries(layer, format)
    return tensors + [float_entry(name, v, "F16") for name, v in weights.vectors.items()]


def _expert_entries(layer: QuantizedLayer, format: str) -> list[Entry]:
    """Return the tensors of the experts. For MLX those of the mixture are stacked, as mlx-lm stores them."""
    moe = mixture(layer.weights.config, layer.weights.layer)
    if moe is None:
        return []
    each = [[weight_entries(part, format) for part in expert.values()] for expert in layer.experts]
    tensors: list[Entry] = []
    if format == "mlx":
        for parts in zip(*each[: moe.num_experts], strict=True):
            tensors += [stack(same) for same in zip(*parts, strict=True)]
        each = each[moe.num_experts :]
    return tensors + [tensor for expert in each for part in expert for tensor in part]


def rim_names(config: ModelConfig, source: Source) -> tuple[list[str], list[str]]:
    """Return the names outside the layers: matrices (embedding, head, positions) and vectors (norms)."""
    spec = config.spec
    matrices = [spec.name("embed")]
    if source.has(spec.name("head")):
        matrices.append(spec.name("head"))
    if spec.positions == "learned":
        matrices.append(spec.name("positions"))
    norms = [spec.name("final_norm")] + ([spec.name("embed_norm")] if spec.embed_norm else [])
    vectors = [f"{norm}.{end}" for norm in norms for end in ("weight", "bias") if source.has(f"{norm}.{end}")]
    return matrices, vectors


def rim_entries(
    config: ModelConfig, source: Source, bits: int, group_size: int, head: bool = True
) -> Iterator[Entry]:
    """Yield embedding and head at `bits` (16: float16), positions and norms in float16, one matrix at a time.

    head=False omits the head and the final norm, which head.py quantises together.
    """
    matrices, vectors = rim_names(config, source)
    if not head:
        norm = f"{config.spec.name('final_norm')}."
        matrices.remove(config.spec.name("head"))
        vectors = [name for name in vectors if not name.startswith(norm)]
    for name in matrices:
        weight = source.weight(name)
        assert isinstance(weight, Dense)
        if bits == 16 or name == config.spec.name("positions"):
            yield from weight_entries(weight, "mlx")
        else:
            yield from weight_entries(rounded_rows(weight, bits, group_size), "mlx")
    for name in vectors:
        yield float_entry(name, source.vector(name), "F16")


def rounded_rows(weight: Dense, bits: int, group_size: int) -> Packed:
    """Round a matrix in chunks, so that it is never in float32 as a whole."""
    starts = range(0, len(weight.w), ROWS)
    pieces = (round_to_nearest(to_float32(weight.w[at : at + ROWS]), bits, group_size) for at in starts)
    return joined_rows(weight, pieces)


def joined_rows(weight: Dense, pieces: Iterable[Quantized]) -> Packed:
    """Join the codes of consecutive chunks of rows into one matrix. Only packed codes are kept in memory."""
    packed = [piece.packed(weight.name, weight.bias) for piece in pieces]
    stack = [np.concatenate([getattr(p, f) for p in packed]) for f in ("qweight", "scales", "biases")]
    return replace(packed[0], qweight=stack[0], scales=stack[1], biases=stack[2])
