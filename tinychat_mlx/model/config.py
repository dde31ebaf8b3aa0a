"""Parse config.json into a ModelConfig. Unknown or contradictory values raise ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat_mlx.base.errors import ConfigError
from tinychat_mlx.model.families import resolve
from tinychat_mlx.model.family import ArchSpec
from tinychat_mlx.model.rope import RopeTable, rope_table, table_of
from tinychat_mlx.weights.weight import to_float32

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

# Keys that change the computation, with the values that have no effect. A family that does not list such a key
# in ArchSpec.reads must have one of these values: ignoring another value would give wrong results silently.
SCALARS: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "no_rope_layers": (None,),
    "clip_qkv": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "use_parallel_residual": (None, False),
    "alibi": (None, False),
    "qk_layernorm": (None, False),
    "attention_sinks": (None, False),
    "rope_local_base_freq": (None,),
}


@dataclass(frozen=True)
class MoeConfig:
    """Sizes of the mixture of experts, and the layers that have one."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int  # 0: no shared expert
    norm_topk_prob: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model. Per-layer tuples have num_hidden_layers entries."""

    spec: ArchSpec
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    act: str
    max_position_embeddings: int
    rope: tuple[RopeTable | None, ...]  # None: a layer without rotary positions
    window: tuple[int, ...]  # 0: full attention
    attention_scale: float
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    alibi: tuple[float, ...] | None = None  # one slope per head
    moe: MoeConfig | None = None
    eos_token_ids: tuple[int, ...] = ()


def parse_config(config: Mapping[str, Any], context: int | None = None) -> ModelConfig:
    """Parse config.json into a ModelConfig. Raises ConfigError naming the key.

    context: the context length in tokens; longrope chooses its factors by it.
    """
    spec, config = resolve({**config})
    _refuse_unread(config, spec)
    layers = _count(config, "num_hidden_layers", most=4096)
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    kv_heads = _count(config, "num_key_value_heads", default=heads)
    head_dim = _count(config, "head_dim", default=hidden // heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{heads} attention heads are not a multiple of {kv_heads} key/value heads", where="config.json"
        )
    scalar = _scalar(config, spec, "query_pre_attn_scalar", head_dim)
    windows = _windows(config, spec, layers)
    return ModelConfig(
        spec=spec,
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_epsilon(config),
        act=_activation(config),
        max_position_embeddings=_count(config, "max_position_embeddings"),
        rope=_ropes(config, spec, head_dim, windows, context),
        window=windows,
        attention_scale=_scalar(config, spec, "attention_multiplier", scalar**-0.5),
        attn_softcap=_scalar(config, spec, "attn_logit_softcapping", 0.0),
        final_softcap=_scalar(config, spec, "final_logit_softcapping", 0.0),
        embed_scale=_embed_scale(config, spec, hidden),
        residual_scale=_scalar(config, spec, "residual_multiplier", 1.0),
        logit_scale=_scalar(config, spec, "logit_scale", 1.0) / _scalar(config, spec, "logits_scaling", 1.0),
        alibi=tuple(config["alibi_slopes"]) if spec.positions == "alibi" else None,
        moe=_moe(config, spec, layers),
        eos_token_ids=token_ids(config.get("eos_token_id"), "config.json"),
    )


def token_ids(value: object, where: str) -> tuple[int, ...]:
    """Parse eos_token_id (absent, a number or a list) into a tuple. Raises ConfigError."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ConfigError(f"eos_token_id must be a token id or a list of them, not {value!r}", where=where)
    return tuple(ids)


def _refuse_unread(config: Mapping[str, Any], spec: ArchSpec) -> None:
    for key, neutral in SCALARS.items():
        value = config.get(key)
        if key not in spec.reads and not any(value is n or (n is not None and value == n) for n in neutral):
            raise ConfigError(
                f"{key} = {value!r} is not supported for {spec.model_type}", where="config.json"
            )


def _count(config: Mapping[str, Any], key: str, default: int | None = None, most: int = 1 << 31) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < most:
        raise ConfigError(f"{key} must be a positive integer, not {value!r}", where="config.json")
    return value


def _scalar(config: Mapping[str, Any], spec: ArchSpec, key: str, default: float) -> float:
    value = config.get(key) if key in spec.reads else None
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ConfigError(f"{key} must be a number, not {value!r}", where="config.json")
    return float(value)


def _epsilon(config: Mapping[str, Any]) -> float:
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if (value := config.get(key)) is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ConfigError(
                    f"{key} must be a small positive number, not {value!r}", where="config.json"
                )
            return float(value)
    raise ConfigError("rms_norm_eps (or layer_norm_eps) is missing", where="config.json")


def _moe(config: Mapping[str, Any], spec: ArchSpec, layers: int) -> MoeConfig | None:
    if not spec.moe:
        return None
    experts, chosen = _count(config, "num_experts"), _count(config, "num_experts_per_tok")
    if chosen > experts:
        raise ConfigError(
            f"num_experts_per_tok is {chosen}, but there are {experts} experts", where="config.json"
        )
    every, dense = _count(config, "decoder_sparse_step", default=1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers must be a list, not {dense!r}", where="config.json")
    return MoeConfig(
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=_count(config, "moe_intermediate_size"),
        shared_expert_intermediate_size=_count(config, "shared_expert_intermediate_size")
        if spec.shared_expert
        else 0,
        norm_topk_prob=bool(config.get("norm_topk_prob")),
        layers=tuple(i not in dense and (i + 1) % every == 0 for i in range(layers)),
    )


def _embed_scale(config: Mapping[str, Any], spec: ArchSpec, hidden: int) -> float:
    """Granite's multiplier, or Gemma's sqrt(hidden_size), rounded to the model's dtype as in training."""
    if not spec.embed_sqrt:
        return _scalar(config, spec, "embedding_multiplier", 1.0)
    root = np.float32(hidden**0.5)
    if (config.get("dtype") or config.get("torch_dtype")) == "bfloat16":
        root = to_float32(((root.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16))
    return float(root)


def _activation(config: Mapping[str, Any]) -> str:
    # Gemma's hidden_activation overrides the wrong hidden_act of its first config files.
    name = config.get("hidden_activation") or config.get("hidden_act")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(
            f"unknown hidden_act {name!r}; supported: {', '.join(ACTIVATIONS)}", where="config.json"
        )
    return ACTIVATIONS[name]


def _windows(config: Mapping[str, Any], spec: ArchSpec, layers: int) -> tuple[int, ...]:
    """Return the sliding window of each layer in tokens, 0 for full attention."""
    off = config.get("use_sliding_window") is False
    if not spec.window or off or config.get("sliding_window") in (None, 0):
        return (0,) * layers
    window = _count(config, "sliding_window")
    if spec.window == "all":
        return (window,) * layers
    kinds, sizes = config.get("layer_types"), {"full_attention": 0, "sliding_attention": window}
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers or any(k not in sizes for k in kinds):
            raise ConfigError(
                f"layer_types must name {layers} layers, each {' or '.join(sizes)}", where="config.json"
            )
        return tuple(sizes[k] for k in kinds)
    if spec.window_pattern:
        every = _count(config, "sliding_window_pattern", default=spec.window_pattern)
        return tuple(0 if (i + 1) % every == 0 else window for i in range(layers))
    if config.get("use_sliding_window") is None:  # the family's default: no window
        return (0,) * layers
    first = config.get("max_window_layers", 28)  # layers below it keep full attention
    return tuple(window if i >= first else 0 for i in range(layers))


def _ropes(
    config: Mapping[str, Any], spec: ArchSpec, head_dim: int, windows: tuple[int, ...], context: int | None
) -> tuple[RopeTable | None, ...]:
    """Return the rope table of each layer. Sliding and full layers may have different ones; None: no rope."""
    layers = len(windows)
    if spec.positions != "rope":
        return (None,) * layers
    p = config.get("rope_parameters")
    if isinstance(p, Mapping) and isinstance(p.get("full_attention"), Mapping):
        full = table_of(p["full_attention"], config, head_dim, spec.default_theta, context)
        # drop rope_theta of the full layers: the sliding layers have their own
        local = {k: v for k, v in config.items() if k != "rope_theta"}
        sliding = table_of(p.get("sliding_attention") or {}, local, head_dim, 10000.0, context)
    elif "rope_local_base_freq" in spec.reads:
        full = rope_table(config, head_dim, spec.default_theta, context)
        theta = config.get("rope_local_base_freq") or 10000.0
        sliding = table_of({"rope_theta": theta}, {}, head_dim, None, context)
    else:
        full = sliding = rope_table(config, head_dim, spec.default_theta, context)
    turned = _rope_layers(config, spec, windows)
    return tuple((sliding if windows[i] else full) if turned[i] else None for i in range(layers))


def _rope_layers(config: Mapping[str, Any], spec: ArchSpec, windows: tuple[int, ...]) -> list[bool]:
    """Return for each layer whether it rotates queries and keys."""
    layers = len(windows)
    if spec.rope_layers == "sliding" and any(windows):
        return [w > 0 for w in windows]
    if spec.rope_layers != "listed":
        return [True] * layers
    listed = config.get("no_rope_layers")
    if listed is None:
        every = _count(config, "no_rope_layer_interval", default=4)
        return [(i + 1) % every != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers or any(v not in (0, 1) for v in listed):
        raise ConfigError(
            f"no_rope_layers must list {layers} numbers, 1 for a layer with rope and 0 for one without",
            where="config.json",
        )
    return [bool(v) for v in listed]
