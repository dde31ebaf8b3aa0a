"""Write config.json of a quantised model: the original keys and the quantisation settings."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from tinychat_mlx.awq.settings import Settings, quantised_shapes
from tinychat_mlx.awq.sites import experts, module_name, modules
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Source
from tinychat_mlx.model.family import ArchSpec
from tinychat_mlx.weights.formats.awq_gemm import awq_config

BLOCKS = ("quantization", "quantization_config", "compression_config")


def carried(raw: dict[str, Any], spec: ArchSpec) -> dict[str, Any]:
    """Return config.json without an earlier quantisation block and with dtype float16."""
    out = {key: value for key, value in raw.items() if key not in BLOCKS}
    named = [key for key in ("dtype", "torch_dtype") if key in out] or ["torch_dtype"]
    older = {key: value for key, value in older_spelling(raw, spec).items() if key not in out}
    return out | dict.fromkeys(named, "float16") | older


def older_spelling(raw: dict[str, Any], spec: ArchSpec) -> dict[str, Any]:
    """Return the keys that transformers 5 renamed, under the names that mlx-lm reads.

    Without them mlx-lm uses its defaults and reports nothing. Both spellings have the same value, so readers
    of the new names are not affected.
    """
    p, out = raw.get("rope_parameters"), {}
    if isinstance(p, dict):
        full, sliding = p.get("full_attention", p), p.get("sliding_attention") or {}
        if "rope_local_base_freq" in spec.reads and "rope_theta" in sliding:
            out["rope_local_base_freq"] = sliding["rope_theta"]
        known = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        for key in (k for k in known if k in full):
            out[key] = out[known[key] if spec.model_type == "gpt_neox" else key] = full[key]
        kind = full.get("rope_type", "default")
        if kind == "longrope" and "original_max_position_embeddings" in full:
            out["original_max_position_embeddings"] = full["original_max_position_embeddings"]
        scaling = {k: v for k, v in full.items() if k not in known} | {"type": kind}
        out["rope_scaling"] = scaling if kind != "default" else None
    if spec.moe and "num_local_experts" in raw:
        out["num_experts"] = raw["num_local_experts"]
    return out


def model_config(
    raw: dict[str, Any], settings: Settings, config: ModelConfig, source: Source
) -> dict[str, Any]:
    """Build config.json for a quantised dense model."""
    kept = dense_linears(config, source, {name for name, _, _ in quantised_shapes(config)})
    if settings.format == "awq":
        return carried(raw, config.spec) | {
            "quantization_config": awq_config(settings.group_size, kept or None)
        }
    block = mlx_block(kept, config, source, settings)
    return carried(raw, config.spec) | {"quantization": block, "quantization_config": block}


def mlx_block(kept: list[str], config: ModelConfig, source: Source, settings: Settings) -> dict[str, object]:
    """Build the `quantization` block in MLX's form.

    Layers with other settings than the default are listed by name.
    """
    block: dict[str, object] = {"group_size": settings.group_size, "bits": settings.w_bit, "mode": "affine"}
    bits, group = settings.head_bits, settings.group_size
    edge = False if bits == 16 else {"group_size": group, "bits": bits}
    edges = [name for role in ("embed", "head") if source.has(name := config.spec.name(role))]
    return block | dict.fromkeys(edges, edge) | dict.fromkeys((n for n in kept if n not in edges), False)


def dense_linears(config: ModelConfig, source: Source, quantised: Container[str]) -> list[str]:
    """List the linears that stay in float16: the head, if it is separate, and layer linears such as routers."""
    layers = range(config.num_hidden_layers)
    names = [config.spec.name("head")] if source.has(config.spec.name("head")) else []
    for layer, expert in ((i, e) for i in layers for e in (None, *experts(config, i))):
        names += [module_name(config, layer, m.role, expert) for m in modules(config, layer, expert)]
    return [name for name in names if name not in quantised]
