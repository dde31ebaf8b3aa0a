"""Tiny random checkpoints made by transformers: the oracle for the graph. Imported by tests only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, LAYERS = 97, 4
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}
# Every optional feature gets a value that is not neutral, or the test would prove nothing.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
}


@dataclass(frozen=True)
class Tiny:
    """A checkpoint folder and what transformers makes of it: ids (T,), logits (T, V)."""

    folder: Path
    ids: list[int]
    logits: np.ndarray


def build(variant: str, seed: int = 0) -> Any:
    """-> the transformers model, float32, with norms and biases disturbed away from 1 and 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind, extra = VARIANTS[variant]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(BASE | extra))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@lru_cache(maxsize=None)
def tiny(variant: str, root: Path, seed: int = 0, length: int = 40) -> Tiny:
    """Save a tiny model of a variant below root, once, with transformers' logits of random ids."""
    import torch

    model = build(variant, seed)
    folder = root / f"{variant}-{seed}"
    model.save_pretrained(folder)
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    return Tiny(folder, ids, logits)
