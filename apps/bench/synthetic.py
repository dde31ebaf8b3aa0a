"""A model of random packed weights: the speed of a shape without its download.

The decoder requests weights one at a time, and each is generated as codes. So memory holds only the packed model and
its largest matrix. The scales give every product a gain of about 1, so that logits stay finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinychat_mlx.awq.search.quantizer import storable
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight

HEADS = ("int4", "int8", "fp16")


@dataclass
class RandomSource:
    """decoder.Source of a dense, gated decoder with Hugging Face's names. head: form of embedding and head."""

    config: Mapping[str, Any]
    head: str = "int8"
    seed: int = 0
    seconds: float = 0.0  # spent on generating weights, which a real model does not need
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of each requested weight

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.SFC64(self.seed))

    def has(self, name: str) -> bool:
        """Whether a tensor exists: biases and a separate head as in the real model."""
        if name.startswith("lm_head"):
            return not self.config["tie_word_embeddings"]
        return not name.endswith(".bias")  # biases of norms; a linear layer's bias comes with its weight

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        assert shape is not None, "a random weight needs its shape"
        start = time.perf_counter()
        outer = module.endswith(("embed_tokens", "lm_head"))
        biased = self.config["model_type"] == "qwen2" and module.endswith(("q_proj", "k_proj", "v_proj"))
        bias = self.small(shape[0]) if biased else None
        if outer and self.head == "fp16":
            weight: Weight = Dense(module, self.halves(*shape), bias)
        else:
            weight = self.packed(module, *shape, 8 if outer and self.head == "int8" else 4, bias)
        self.sizes[module] = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.seconds += time.perf_counter() - start
        return weight

    def vector(self, name: str) -> F32:
        size = self.config["hidden_size"]
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            size = self.config["head_dim"]
        vector = 1 + self.small(size)
        self.sizes[name] = vector.nbytes
        return vector

    def small(self, size: int) -> F32:
        return (0.05 * self._random.standard_normal(size)).astype(np.float32)

    def packed(self, name: str, n: int, k: int, w_bit: int, bias: F32 | None) -> Packed:
        group = next(g for g in (128, 64, 32) if k % g == 0)
        words = self._random.integers(0, 1 << 32, (n, k * w_bit // 32), np.uint32)
        # Codes 0 … m have a deviation of m / sqrt(12): this scale gives weights a deviation of 1 / sqrt(k).
        step = math.sqrt(12 / k) / ((1 << w_bit) - 1)
        wanted = (step * self._random.uniform(0.8, 1.2, (n, k // group))).astype(np.float32)
        scales = storable(wanted, w_bit).astype(np.float16)  # as `convert` stores them
        zeros = (1 << (w_bit - 1)) - self._random.integers(0, 2, (n, k // group))
        return Packed(name, words, scales, (-zeros * scales).astype(np.float16), w_bit, group, bias)

    def halves(self, n: int, k: int) -> np.ndarray[Any, np.dtype[np.float16]]:
        """Return random signs and mantissas with one exponent: deviation within a factor of 1.5 of 1 / sqrt(k)."""
        exponent = round(math.log2(1 / (1.53 * math.sqrt(k))))
        bits = self._random.integers(0, 1 << 16, (n, k), np.uint16)
        bits &= np.uint16(0x83FF)
        bits |= np.uint16((exponent + 15) << 10)
        return bits.view(np.float16)
