"""Decoders of tiny models, dense or int4, and their logits. Imports only the product and NumPy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Decoder
from tinychat_mlx.weight import Dense, Packed, Weight, pack_codes

GROUP = 32


def round_to_int4(weight: Dense) -> Packed:
    """Round to int4 with scale and offset from each group's minimum and maximum."""
    w = weight.to_float32()
    groups = w.reshape(w.shape[0], -1, GROUP)
    low, high = groups.min(-1), groups.max(-1)
    scales, biases = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    q = (groups - biases[..., None].astype(np.float32)) / scales[..., None].astype(np.float32)
    codes = np.clip(np.rint(q), 0, 15).astype(np.uint8).reshape(w.shape)
    return Packed(weight.name, pack_codes(codes, 4), scales, biases, 4, GROUP, weight.bias)


class Int4:
    """A checkpoint with int4 linears. Routers and learned positions stay dense, as after AWQ."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.has, self.vector = source, source.has, source.vector

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        weight = self.source.weight(module, shape)
        dense = re.search(r"(mlp|block_sparse_moe)\.gate$|shared_expert_gate$|wpe$|embed_positions$", module)
        return weight if dense or not isinstance(weight, Dense) else round_to_int4(weight)


def decoder(folder: Path, backend: Backend, int4: bool) -> Decoder:
    checkpoint = Checkpoint.open(folder)
    return Decoder(parse_config(checkpoint.config), Int4(checkpoint) if int4 else checkpoint, backend)


def logits(decoder: Decoder, ids: list[int], cuts: list[int]) -> np.ndarray:
    """Compute logits (T, V) of all ids in pieces of these lengths."""
    cache, host, at, rows = decoder.new_cache(len(ids)), decoder.backend.to_host, 0, []
    for n in cuts:
        rows.append(host(decoder.forward(ids[at : at + n], cache, last_only=False)))
        at += n
    assert at == len(ids)
    return np.concatenate(rows)
