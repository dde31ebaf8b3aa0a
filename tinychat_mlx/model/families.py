"""The table of decoder families. A family without new structure needs only a row here.

`names` maps a role of the graph to the module under a layer (`q`: "self_attn.q_proj"), or to the full name for
modules outside the layers. Omitted fields have Llama's values.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from tinychat_mlx.base.errors import ConfigError
from tinychat_mlx.model.alibi import mpt_slopes, slopes
from tinychat_mlx.model.family import ArchSpec

_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "embed_sqrt": True}
_ALL_FOUR = ("pre_attn", "post_attn", "pre_mlp", "post_mlp")
_SANDWICH = {
    "post_attn": "post_attention_layernorm",
    "pre_mlp": "pre_feedforward_layernorm",
    "post_mlp": "post_feedforward_layernorm",
}
_POST: dict[str, Any] = {
    "norms": ("post_attn", "post_mlp"),
    "names": {"post_attn": "post_attention_layernorm", "post_mlp": "post_feedforward_layernorm"},
}
_GEMMA2_READS = frozenset({"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"})
_GRANITE_READS = frozenset(
    {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"}
)
_GPT_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
}


def _four_times(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    """Set an intermediate size that is absent or null to four times the hidden size."""
    hidden = config.get("hidden_size")
    if config.get("intermediate_size") is None and isinstance(hidden, int):
        config["intermediate_size"] = 4 * hidden
    return spec


def _bigcode(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    spec = _four_times(spec, config)
    many = config.get("multi_query") is False
    config["num_key_value_heads"] = None if many else 1
    return replace(spec, qkv="heads") if many else spec


def _gptj(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    """Convert rotary_dim, a count of inputs per head, to a fraction of the head."""
    spec = _four_times(spec, config)
    heads, hidden, rotary = (config.get(k) for k in ("num_attention_heads", "hidden_size", "rotary_dim"))
    if isinstance(rotary, int) and isinstance(heads, int) and isinstance(hidden, int):
        config["partial_rotary_factor"] = rotary * heads / hidden
    return spec


def _neox(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    return replace(spec, parallel=bool(config.get("use_parallel_residual", True)))


def _stablelm(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    return replace(spec, parallel=True, norms=("pre_attn",)) if config.get("use_parallel_residual") else spec


def _falcon(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    """7B: multi-query, one norm, parallel; 40B: grouped, two norms, parallel; RW: ALiBi, serial."""
    spec = _four_times(spec, config)
    new = bool(config.get("new_decoder_architecture"))
    if not new:
        config["num_key_value_heads"] = 1 if config.get("multi_query", True) else None
    if config.get("alibi"):
        spec = replace(spec, positions="alibi")
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if isinstance(heads, int) and isinstance(hidden, int):  # scaled like the scores
            config["alibi_slopes"] = [s * (heads / hidden) ** 0.5 for s in slopes(heads)]
    if not new and not config.get("parallel_attn", True):
        return replace(spec, norms=("pre_attn", "pre_mlp"), parallel=False)
    if new and config.get("num_ln_in_parallel_attn") in (None, 2):
        names = {**spec.names, "pre_attn": "ln_attn", "pre_mlp": "ln_mlp"}
        return replace(spec, norms=("pre_attn", "pre_mlp"), names=names)
    return spec


def _mpt(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    attention = config.get("attn_config") or {}
    for key, neutral in (("clip_qkv", None), ("qk_ln", False), ("softmax_scale", None), ("prefix_lm", False)):
        if attention.get(key, neutral) not in (neutral, None):
            raise ConfigError(
                f"attn_config.{key} = {attention[key]!r} is not supported for mpt", where="config.json"
            )
    if not attention.get("alibi", True):
        raise ConfigError("attn_config.alibi = false is not supported for mpt", where="config.json")
    if isinstance(heads := config.get("num_attention_heads"), int):
        config["alibi_slopes"] = mpt_slopes(heads, attention.get("alibi_bias_max", 8))
    hidden, ratio = config.get("hidden_size"), config.get("expansion_ratio", 4)
    if isinstance(hidden, int) and isinstance(ratio, int):
        config["intermediate_size"] = ratio * hidden
    return spec


def _opt(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    if config.get("do_layer_norm_before") is False or config.get("word_embed_proj_dim") not in (
        None,
        config.get("hidden_size"),
    ):
        raise ConfigError(
            "OPT with do_layer_norm_before = false (opt-350m) is not supported", where="config.json"
        )
    return spec


def _bloom(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    if config.get("apply_residual_connection_post_layernorm"):
        raise ConfigError(
            "apply_residual_connection_post_layernorm = true is not supported for bloom", where="config.json"
        )
    config.setdefault("max_position_embeddings", config.get("seq_length") or 2048)
    if isinstance(heads := config.get("num_attention_heads"), int):
        config["alibi_slopes"] = slopes(heads)
    return _four_times(spec, config)


def _moe_sizes(spec: ArchSpec, config: dict[str, Any]) -> ArchSpec:
    """Treat num_experts and num_local_experts as one key. Experts may have their own size."""
    if config.get("num_experts") is None:
        config["num_experts"] = config.get("num_local_experts")
    if config.get("moe_intermediate_size") is None:
        config["moe_intermediate_size"] = config.get("intermediate_size")
    return spec


_MOE: dict[str, Any] = {
    "moe": True,
    "adapt": _moe_sizes,
    "reads": frozenset({"num_experts", "num_local_experts"}),
}
_ROWS = (
    # Llama and variants of it
    ArchSpec("llama"),
    ArchSpec("mistral", window="all"),
    ArchSpec("ministral", window="layers"),
    ArchSpec("qwen2", window="layers"),
    ArchSpec("qwen3", qk_norm="head", window="layers"),
    ArchSpec("internlm3"),
    ArchSpec("seed_oss"),
    ArchSpec("arcee", gated=False),
    ArchSpec("ernie4_5", rope_interleaved=True),
    ArchSpec("smollm3", rope_layers="listed", window="layers", reads=frozenset({"no_rope_layers"})),
    ArchSpec("granite", reads=_GRANITE_READS),
    ArchSpec("phi3", qkv="blocks", fused_gate_up=True, window="all"),
    ArchSpec(
        "internlm2",
        qkv="heads",
        names={
            "embed": "model.tok_embeddings",
            "head": "output",
            "pre_attn": "attention_norm",
            "pre_mlp": "ffn_norm",
            "qkv": "attention.wqkv",
            "o": "attention.wo",
            "gate": "feed_forward.w1",
            "up": "feed_forward.w3",
            "down": "feed_forward.w2",
        },
    ),
    ArchSpec(
        "exaone",
        keys={
            "num_hidden_layers": "num_layers",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        names={
            "embed": "transformer.wte",
            "final_norm": "transformer.ln_f",
            "layers": "transformer.h",
            "pre_attn": "ln_1",
            "pre_mlp": "ln_2",
            "q": "attn.attention.q_proj",
            "k": "attn.attention.k_proj",
            "v": "attn.attention.v_proj",
            "o": "attn.attention.out_proj",
            "gate": "mlp.c_fc_0",
            "up": "mlp.c_fc_1",
            "down": "mlp.c_proj",
        },
    ),
    # norms after the blocks, or before and after them
    ArchSpec("olmo2", qk_norm="full", **_POST),
    ArchSpec("olmo3", qk_norm="full", window="layers", window_pattern=4, **_POST),
    ArchSpec("exaone4", qk_norm="head", window="layers", window_pattern=4, rope_layers="sliding", **_POST),
    ArchSpec("gemma", defaults={"hidden_act": "gelu_pytorch_tanh"}, **_GEMMA),
    ArchSpec(
        "gemma2",
        norms=_ALL_FOUR,
        names=_SANDWICH,
        window="layers",
        window_pattern=2,
        reads=_GEMMA2_READS,
        **_GEMMA,
    ),
    ArchSpec(
        "gemma3_text",
        norms=_ALL_FOUR,
        names=_SANDWICH,
        qk_norm="head",
        window="layers",
        window_pattern=6,
        default_theta=1e6,
        reads=_GEMMA2_READS | {"rope_local_base_freq"},
        **_GEMMA,
    ),
    ArchSpec("glm", fused_gate_up=True, rope_interleaved=True, defaults={"partial_rotary_factor": 0.5}),
    ArchSpec(
        "glm4",
        norms=_ALL_FOUR,
        fused_gate_up=True,
        rope_interleaved=True,
        defaults={"partial_rotary_factor": 0.5},
        names={"post_attn": "post_self_attn_layernorm", "post_mlp": "post_mlp_layernorm"},
    ),
    # mixtures of experts
    ArchSpec(
        "mixtral",
        window="all",
        default_theta=1e6,
        defaults={"norm_topk_prob": True},
        names={
            "router": "block_sparse_moe.gate",
            "expert_gate": "block_sparse_moe.experts.{e}.w1",
            "expert_up": "block_sparse_moe.experts.{e}.w3",
            "expert_down": "block_sparse_moe.experts.{e}.w2",
        },
        **_MOE,
    ),
    ArchSpec("qwen2_moe", window="layers", shared_expert=True, **_MOE),
    ArchSpec("qwen3_moe", qk_norm="head", window="layers", **_MOE),
    ArchSpec("olmoe", qk_norm="full", **_MOE),
    # LayerNorm
    ArchSpec(
        "stablelm",
        norm="layer",
        adapt=_stablelm,
        defaults={"partial_rotary_factor": 0.25},
        reads=frozenset({"use_parallel_residual"}),
    ),
    ArchSpec(
        "starcoder2",
        norm="layer",
        gated=False,
        window="all",
        names={"up": "mlp.c_fc", "down": "mlp.c_proj"},
    ),
    ArchSpec(
        "cohere",
        norm="layer",
        norms=("pre_attn",),
        parallel=True,
        rope_interleaved=True,
        reads=frozenset({"logit_scale"}),
    ),
    ArchSpec(
        "cohere2",
        norm="layer",
        norms=("pre_attn",),
        parallel=True,
        rope_interleaved=True,
        rope_layers="sliding",
        window="layers",
        window_pattern=4,
        reads=frozenset({"logit_scale"}),
    ),
    ArchSpec(
        "phi",
        norm="layer",
        norms=("pre_attn",),
        parallel=True,
        gated=False,
        defaults={"partial_rotary_factor": 0.5},
        names={
            "final_norm": "model.final_layernorm",
            "o": "self_attn.dense",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
    ),
    # families of the AWQ paper and of that time
    ArchSpec(
        "opt",
        norm="layer",
        gated=False,
        positions="learned",
        position_offset=2,
        adapt=_opt,
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={"layer_norm_eps": 1e-5},
        names={
            "embed": "model.decoder.embed_tokens",
            "positions": "model.decoder.embed_positions",
            "final_norm": "model.decoder.final_layer_norm",
            "layers": "model.decoder.layers",
            "pre_attn": "self_attn_layer_norm",
            "pre_mlp": "final_layer_norm",
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
    ),
    ArchSpec(
        "gpt_bigcode",
        norm="layer",
        gated=False,
        qkv="blocks",
        positions="learned",
        adapt=_bigcode,
        keys=_GPT_KEYS,
        names={
            "embed": "transformer.wte",
            "positions": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "layers": "transformer.h",
            "pre_attn": "ln_1",
            "pre_mlp": "ln_2",
            "qkv": "attn.c_attn",
            "o": "attn.c_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
    ),
    ArchSpec(
        "gptj",
        norm="layer",
        norms=("pre_attn",),
        parallel=True,
        gated=False,
        rope_interleaved=True,
        adapt=_gptj,
        keys=_GPT_KEYS,
        names={
            "embed": "transformer.wte",
            "final_norm": "transformer.ln_f",
            "layers": "transformer.h",
            "pre_attn": "ln_1",
            "q": "attn.q_proj",
            "k": "attn.k_proj",
            "v": "attn.v_proj",
            "o": "attn.out_proj",
            "up": "mlp.fc_in",
            "down": "mlp.fc_out",
        },
    ),
    ArchSpec(
        "gpt_neox",
        norm="layer",
        gated=False,
        qkv="heads",
        adapt=_neox,
        reads=frozenset({"use_parallel_residual"}),
        keys={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
        defaults={"partial_rotary_factor": 0.25},
        names={
            "embed": "gpt_neox.embed_in",
            "final_norm": "gpt_neox.final_layer_norm",
            "head": "embed_out",
            "layers": "gpt_neox.layers",
            "qkv": "attention.query_key_value",
            "o": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
    ),
    ArchSpec(
        "falcon",
        norm="layer",
        norms=("pre_attn",),
        parallel=True,
        gated=False,
        qkv="heads",
        adapt=_falcon,
        keys={
            "intermediate_size": "ffn_hidden_size",
            "num_key_value_heads": "num_kv_heads",
            "hidden_act": "activation",
        },
        defaults={"hidden_act": "gelu", "max_position_embeddings": 2048},
        reads=frozenset({"alibi"}),
        names={
            "embed": "transformer.word_embeddings",
            "final_norm": "transformer.ln_f",
            "layers": "transformer.h",
            "qkv": "self_attention.query_key_value",
            "o": "self_attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
    ),
    ArchSpec(
        "bloom",
        norm="layer",
        gated=False,
        qkv="heads",
        positions="alibi",
        embed_norm=True,
        adapt=_bloom,
        keys={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        defaults={"hidden_act": "gelu_pytorch_tanh"},
        names={
            "embed": "transformer.word_embeddings",
            "embed_norm": "transformer.word_embeddings_layernorm",
            "final_norm": "transformer.ln_f",
            "layers": "transformer.h",
            "qkv": "self_attention.query_key_value",
            "o": "self_attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
    ),
    ArchSpec(
        "mpt",
        norm="layer",
        gated=False,
        qkv="blocks",
        positions="alibi",
        adapt=_mpt,
        keys={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
        defaults={"hidden_act": "gelu", "layer_norm_epsilon": 1e-5},
        names={
            "embed": "transformer.wte",
            "final_norm": "transformer.norm_f",
            "layers": "transformer.blocks",
            "pre_attn": "norm_1",
            "pre_mlp": "norm_2",
            "qkv": "attn.Wqkv",
            "o": "attn.out_proj",
            "up": "ffn.up_proj",
            "down": "ffn.down_proj",
        },
    ),
)
ARCHITECTURES: dict[str, ArchSpec] = {spec.model_type: spec for spec in _ROWS}


def find(model_type: object) -> ArchSpec:
    """Return the row of a family. Raises ConfigError naming the nearest supported one."""
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = ", ".join(sorted(ARCHITECTURES))
    near = difflib.get_close_matches(str(model_type), ARCHITECTURES, 1, 0.5)
    hint = f" (nearest: {near[0]})" if near else ""
    raise ConfigError(
        f"model_type {model_type!r} is not supported{hint}",
        where="config.json",
        remedy=f"use a model of one of these types: {known}",
    )


def resolve(config: dict[str, Any]) -> tuple[ArchSpec, dict[str, Any]]:
    """Return the family's spec, adapted to the flags in config.json, and the config with the standard keys."""
    spec = find(config.get("model_type"))
    usual = {**config}
    for key, own in spec.keys.items():
        if own in config:
            usual[key] = config[own]
    for key, value in spec.defaults.items():
        if usual.get(key) is None:
            usual[key] = value
    return (spec.adapt(spec, usual) if spec.adapt else spec), usual
