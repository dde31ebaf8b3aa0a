"""Tiny random models of every family in ARCHITECTURES, with the reference backend as oracle."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinychat_mlx.contract import Backend, Segment
from tinychat_mlx.model.config import ModelConfig, parse_config
from tinychat_mlx.model.decoder import Decoder
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight, pack_codes

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"],
}
NOT_NEUTRAL = {  # values for the families that read these keys
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 24,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
    "logit_scale": 0.25,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 192,
    "norm_topk_prob": True,
}


def config_of(family: str, **changes: Any) -> ModelConfig:
    """Return a family's tiny config. Every scalar that the family reads has a non-neutral value."""
    from tinychat_mlx.model.families import ARCHITECTURES

    spec = ARCHITECTURES[family]
    extra = {key: value for key, value in NOT_NEUTRAL.items() if key in spec.reads}
    if spec.moe:
        extra |= EXPERTS
    return parse_config(BASE | {"model_type": family} | extra | changes)


class RandomSource:
    """A source of random weights created on demand from their names. form: dense | int4 | int8 | int3.

    With biases.
    """

    def __init__(self, config: ModelConfig, form: str = "dense", group_size: int = 32) -> None:
        self.config, self.form, self.group_size = config, form, group_size

    def has(self, name: str) -> bool:
        return True

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(name.encode()))

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        assert shape is not None
        rng, (n, k) = self.rng(module), shape
        bias = (rng.standard_normal(n) * 0.1).astype(np.float32)
        if self.form == "dense":
            return Dense(module, (rng.standard_normal((n, k)) / k**0.5).astype(np.float16), bias)
        return random_packed(rng, n, k, int(self.form[3:]), self.group_size, module, bias)

    def vector(self, name: str) -> F32:
        c = self.config
        size, role = c.hidden_size, name.split(".")[-2]
        if role in ("q_norm", "k_norm"):
            heads = c.num_attention_heads if role == "q_norm" else c.num_key_value_heads
            size = c.head_dim * (heads if c.spec.qk_norm == "full" else 1)
        return (1 + self.rng(name).standard_normal(size) * 0.1).astype(np.float32)


def random_packed(
    rng: np.random.Generator, n: int, k: int, w_bit: int, group: int, name: str = "w", bias: F32 | None = None
) -> Packed:
    """Return codes over the whole range. The matrix has a gain of about 1."""
    top = 2**w_bit - 1
    q = rng.integers(0, top + 1, (n, k), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, (n, k // group)) * 3.4 / top / k**0.5).astype(np.float16)
    zero = rng.uniform(0.3, 0.7, scales.shape) * top
    return Packed(name, pack_codes(q, w_bit), scales, (-zero * scales).astype(np.float16), w_bit, group, bias)


def decoder(config: ModelConfig, backend: Backend, form: str = "dense", group_size: int = 32) -> Decoder:
    return Decoder(config, RandomSource(config, form, group_size), backend)


def whole(model: Decoder, ids: Sequence[int]) -> F32:
    """Compute logits (T, V) in one prefill."""
    return model.backend.to_host(model.forward(ids, model.new_cache(len(ids)), last_only=False))


def together(model: Decoder, parts: Sequence[Sequence[int]]) -> F32:
    """Run several conversations in one pass, each after a prefill of its first half -> logits (T, V)."""
    backend, segments, ids = model.backend, [], []
    for part in parts:
        cache, half = model.new_cache(len(part)), len(part) // 2
        model.forward(part[:half], cache)
        segments.append(Segment(cache, len(part) - half))
        ids += part[half:]
    hidden = model._hidden(backend.ids(ids), backend.step(segments))
    return backend.to_host(model._logits(hidden))
