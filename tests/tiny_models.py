"""Tiny random checkpoints made by transformers, the oracle for the graph. Only for tests."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors.numpy import load_file, save_file

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
# these configs have no such key
MULTI_HEAD = {"opt", "gpt_bigcode", "gptj", "gpt_neox", "falcon", "bloom", "mpt"}
GROUPED = {"num_key_value_heads", "intermediate_size"}
# Every optional feature gets a non-neutral value; otherwise the test would prove nothing.
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
    "ministral": (
        "ministral",
        {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "internlm3": ("internlm3", {"head_dim": 16, "qkv_bias": True, "bias": True}),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_bias": True, "attention_out_bias": True}),
    "arcee": ("arcee", {"hidden_act": "relu2", "mlp_bias": True}),
    "ernie4_5": ("ernie4_5", {"head_dim": 32, "use_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 3.0,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3-longrope": (
        "phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                "original_max_position_embeddings": 32,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5}),
    "exaone4": ("exaone4", {"sliding_window": 5, "sliding_window_pattern": 2}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "final_logit_softcapping": 3.0},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe-all": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 16,
            "decoder_sparse_step": 2,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 5, "use_bias": True}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 5, "sliding_window_pattern": 2}),
    "phi": ("phi", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 96}),
    "gpt_bigcode-mha": ("gpt_bigcode", {"multi_query": False}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "intermediate_size": 96}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "intermediate_size": 96}),
    "falcon-7b": ("falcon", {}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", {"num_attention_heads": 6, "hidden_size": 96}),
    "mpt": ("mpt", {"num_attention_heads": 6, "hidden_size": 96, "max_seq_len": 128, "expansion_ratio": 4}),
}


# Families that transformers does not include, but that compute the same as Llama: a Llama in their storage
# layout.
RENAMED = {"internlm2": "llama-mha", "internlm2-gqa": "llama-llama3", "exaone": "llama-llama3"}

# One variant per structure, for tests of other subjects: plain, norms after the blocks and capped logits,
# parallel residual, mixture of experts, learned positions, ALiBi. test_support.py covers all variants.
REPRESENTATIVES = ["llama", "gemma2", "gpt_neox", "qwen2_moe", "opt", "bloom"]


@dataclass(frozen=True)
class Tiny:
    """A checkpoint folder with transformers' results: ids (T,), logits (T, V)."""

    folder: Path
    ids: list[int]
    logits: np.ndarray


def build(variant: str, seed: int = 0) -> Any:
    """Build a float32 transformers model with norms and biases moved away from 1 and 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind, extra = VARIANTS[variant]
    torch.manual_seed(seed)
    base = {k: v for k, v in BASE.items() if kind not in MULTI_HEAD or k not in GROUPED}
    config = AutoConfig.for_model(kind, **(base | extra))
    # transformers 5.23's eager Falcon adds ALiBi twice, in the mask and to the scores; its default path adds
    # it once
    implementation = "sdpa" if kind == "falcon" else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def save_renamed(model: Any, model_type: str, folder: Path) -> None:
    """Write a Llama in another family's published storage layout."""
    config, state = model.config, {k: v.detach().numpy() for k, v in model.state_dict().items()}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if model_type == "internlm2":  # wqkv: for each kv head its queries, its key, its value
        table = [
            ("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output"), ("self_attn.o_proj", "attention.wo"),
            ("post_attention_layernorm", "ffn_norm"), ("input_layernorm", "attention_norm"),
            ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
        ]  # fmt: skip
        for i in range(LAYERS):
            q, k, v = (state.pop(f"model.layers.{i}.self_attn.{p}_proj.weight") for p in "qkv")
            wide = q.reshape(groups, heads // groups, -1, q.shape[1])
            parts = [wide, *(t.reshape(groups, 1, -1, q.shape[1]) for t in (k, v))]
            fused = np.concatenate(parts, axis=1).reshape(-1, q.shape[1])
            state[f"model.layers.{i}.attention.wqkv.weight"] = fused
    else:
        table = [
            ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f"),
            ("model.layers", "transformer.h"), ("post_attention_layernorm", "ln_2"), ("input_layernorm", "ln_1"),
            ("mlp.gate_proj", "mlp.c_fc_0"), ("mlp.up_proj", "mlp.c_fc_1"), ("mlp.down_proj", "mlp.c_proj"),
            ("self_attn.o_proj", "attn.attention.out_proj"), ("self_attn", "attn.attention"),
        ]  # fmt: skip
    for old, new in table:
        state = {k.replace(old, new): v for k, v in state.items()}
    settings = {**config.to_dict(), "model_type": model_type}
    if model_type == "exaone":
        renames = {"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"}
        settings = {renames.get(k, k): v for k, v in settings.items()}
        settings["activation_function"] = settings.pop("hidden_act")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, folder / "model.safetensors")


@cache
def tiny(variant: str, root: Path, seed: int = 0, length: int = 40) -> Tiny:
    """Return a tiny model of a variant with transformers' logits of random ids.

    Builds it below `root` if it is absent.

    Every process of a run shares `root`, and later runs reuse it: the folder's name is a digest of everything
    that determines its content. Tests must not write into it.
    """
    made = root / f"{variant}-{seed}-{_digest(variant, length)}"
    if not made.exists():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(made.with_suffix(".lock")):
            if not made.exists():
                _build_into(made, variant, seed, length)
    expected = load_file(made / "expected.safetensors")
    return Tiny(made / variant, expected["ids"].tolist(), expected["logits"])


def _digest(variant: str, length: int) -> str:
    source = Path(__file__).read_text(encoding="utf-8")
    row = VARIANTS[RENAMED.get(variant, variant)]
    parts = [version("transformers"), version("torch"), source, repr(row), str(length)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build_into(made: Path, variant: str, seed: int, length: int) -> None:
    """Build in a temporary folder and rename it, so that a folder with this name is complete."""
    import torch

    aside = Path(tempfile.mkdtemp(dir=made.parent))
    model = build(RENAMED.get(variant, variant), seed)
    if variant in RENAMED:
        save_renamed(model, variant.split("-")[0], aside / variant)
    else:
        model.save_pretrained(aside / variant)
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, length)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None])).logits[0].numpy()
    save_file({"ids": ids, "logits": logits}, aside / "expected.safetensors")
    aside.rename(made)
