"""Tiny models on the MLX backend, dense or quantised, and their logits. Only for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from virtual_gpu import SLACK

from tinychat_mlx.backend import Backend
from tinychat_mlx.checkpoint import Checkpoint
from tinychat_mlx.config import parse_config
from tinychat_mlx.decoder import Decoder
from tinychat_mlx.generate import Engine, Event
from tinychat_mlx.sampler import SamplingParams
from tinychat_mlx.weight import F32, Packed, Weight, pack_codes

# float32 on both sides: a logit sums about 100 products through 4 layers, 100 · 6e-8 · 4 ≈ 2e-5 of the
# largest.
TOLERANCE = 1e-4 * SLACK


class Quantised:
    """A checkpoint with matrices quantised here, identical for every backend."""

    def __init__(self, folder: Path, w_bit: int, group: int) -> None:
        self.inner, self.w_bit, self.group = Checkpoint.open(folder), w_bit, group

    def has(self, name: str) -> bool:
        return self.inner.has(name)

    def vector(self, name: str) -> F32:
        return self.inner.vector(name)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        dense = self.inner.weight(module, shape)
        return quantised(dense.to_float32(), self.w_bit, self.group, module, dense.bias)


def quantised(w: F32, w_bit: int, group: int, name: str = "w", bias: F32 | None = None) -> Packed:
    """Round to nearest between each group's minimum and maximum."""
    n, k = w.shape
    g = w.reshape(n, k // group, group)
    low = g.min(-1)
    scales = np.maximum((g.max(-1) - low) / (2**w_bit - 1), 1e-4).astype(np.float16)
    low = low.astype(np.float16)
    q = np.rint((g - low[..., None].astype(np.float32)) / scales[..., None].astype(np.float32))
    codes = q.clip(0, 2**w_bit - 1).astype(np.uint8).reshape(n, k)
    return Packed(name, pack_codes(codes, w_bit), scales, low, w_bit, group, bias)


def decoder(folder: Path, backend: Backend, form: tuple[int, int] | None = None) -> Decoder:
    source: Any = Checkpoint.open(folder) if form is None else Quantised(folder, *form)
    return Decoder(parse_config(Checkpoint.open(folder).config), source, backend)


def logits(d: Decoder, ids: list[int], cuts: list[int]) -> F32:
    """Compute logits of all ids in pieces of these lengths."""
    cache, at, out = d.new_cache(len(ids)), 0, []
    for n in cuts:
        out.append(d.backend.to_host(d.forward(ids[at : at + n], cache, last_only=False)))
        at += n
    return np.concatenate(out)


def agree(got: F32, expected: F32) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


class Letters:
    """Token t is the character chr(200 + t)."""

    def push(self, token: int) -> str:
        return chr(200 + token)

    def flush(self) -> str:
        return ""


def answer(
    engine: Engine, prompt: list[int], stop: frozenset[int] = frozenset(), **params: Any
) -> list[Event]:
    return list(engine.generate(prompt, SamplingParams(**params), stop, Letters()))


def tokens(events: list[Event]) -> list[int]:
    return [ord(c) - 200 for e in events for c in e.text]
