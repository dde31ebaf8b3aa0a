"""The sizes of known models, from their config.json: `bench --shape` builds them without a download."""

from __future__ import annotations

import difflib
from typing import Any

from tinychat_mlx.errors import UsageError

Config = dict[str, Any]


def _llama3_rope(factor: float) -> Config:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_theta": 500000.0, "rope_scaling": scaling | {"original_max_position_embeddings": 8192}}


_LLAMA2 = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
_LLAMA3 = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
}
_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
_QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960}
_QWEN3 |= {"vocab_size": 151936, "head_dim": 128}


def _shape(
    family: Config, hidden: int, intermediate: int, layers: int, heads: int, kv: int, tied: bool, **other: Any
) -> Config:
    return family | other | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }  # fmt: skip


SHAPES: dict[str, Config] = {
    # for tests: takes seconds on any machine; its speed is meaningless
    "tiny": _shape(_LLAMA2, 256, 512, 4, 4, 2, True, vocab_size=1024, max_position_embeddings=1024),
    "qwen2.5-0.5b": _shape(_QWEN2, 896, 4864, 24, 14, 2, True, vocab_size=151936),
    "qwen3-0.6b": _shape(_QWEN3, 1024, 3072, 28, 16, 8, True),
    "tinyllama-1.1b": _shape(
        _LLAMA2, 2048, 5632, 22, 32, 4, False, vocab_size=32000, max_position_embeddings=2048
    ),
    "llama-3.2-1b": _shape(_LLAMA3 | _llama3_rope(32.0), 2048, 8192, 16, 32, 8, True, head_dim=64),
    "qwen2.5-1.5b": _shape(_QWEN2, 1536, 8960, 28, 12, 2, True, vocab_size=151936),
    "qwen3-1.7b": _shape(_QWEN3, 2048, 6144, 28, 16, 8, True),
    "llama-3.2-3b": _shape(_LLAMA3 | _llama3_rope(32.0), 3072, 8192, 28, 24, 8, True, head_dim=128),
    "qwen3-4b": _shape(_QWEN3, 2560, 9728, 36, 32, 8, True),
    "llama-2-7b": _shape(
        _LLAMA2, 4096, 11008, 32, 32, 32, False, vocab_size=32000, max_position_embeddings=4096
    ),
    "qwen2.5-7b": _shape(_QWEN2, 3584, 18944, 28, 28, 4, False, vocab_size=152064),
    "llama-3.1-8b": _shape(_LLAMA3 | _llama3_rope(8.0), 4096, 14336, 32, 32, 8, False),
    "qwen3-8b": _shape(_QWEN3, 4096, 12288, 36, 32, 8, False),
}


def find(name: str) -> Config:
    """Return a shape's config. Raises UsageError naming the nearest."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.3)
    hint = f" (nearest: {near[0]})" if near else ""
    raise UsageError(
        f"unknown shape {name!r}{hint}", where="--shape", remedy=f"use one of {', '.join(SHAPES)}"
    )
