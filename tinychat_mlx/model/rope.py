"""Rotary position settings: parse both layouts of config.json into inverse frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinychat_mlx.base.errors import ConfigError
from tinychat_mlx.weights.weight import F32

# Keys that each rope_type may have. Any other key is an error: ignoring it would give wrong results silently.
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip
_IGNORED = {"finetuned", "original_max_position_embeddings"}  # do not affect the angles


@dataclass(frozen=True)
class RopeTable:
    """inv_freq (R/2,) float32 rotates R inputs of each head; cos and sin are multiplied by factor."""

    inv_freq: F32
    factor: float


def rope_table(
    config: Mapping[str, Any], head_dim: int, default_theta: float | None, context: int | None = None
) -> RopeTable:
    """Parse config.json into a RopeTable. Raises ConfigError for an unknown rope_type or key.

    transformers 5 writes `rope_parameters`; earlier versions wrote `rope_theta` and `rope_scaling` at top level.
    """
    p = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(p, Mapping):
        raise ConfigError(f"the rope settings must be an object, not {p!r}", where="config.json")
    return table_of(p, config, head_dim, default_theta, context)


def table_of(
    p: Mapping[str, Any],
    config: Mapping[str, Any],
    head_dim: int,
    default_theta: float | None,
    context: int | None = None,
) -> RopeTable:
    """Parse one object of rope settings into a RopeTable; top-level keys of config are the fall-back.

    context: the context length in tokens; longrope selects its factors by it, once per run.
    """
    kind = p.get("rope_type", p.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # the first name that Phi-3 used
    if kind not in _KEYS:
        raise ConfigError(f"unknown rope_type {kind!r}; supported: {', '.join(_KEYS)}", where="config.json")
    if unknown := sorted(set(p) - _COMMON - _KEYS[kind] - _IGNORED):
        raise ConfigError(f"unknown rope setting {unknown[0]!r} for rope_type {kind!r}", where="config.json")
    theta = p.get("rope_theta", config.get("rope_theta")) or default_theta
    if theta is None:
        raise ConfigError("rope_theta is missing and this family has no default", where="config.json")
    partial = p.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    theta, partial = _number("rope_theta", theta), _number("partial_rotary_factor", partial)
    dim = int(head_dim * partial)
    if dim <= 0 or dim % 2 or dim > head_dim:
        raise ConfigError(
            f"rope would rotate {dim} of {head_dim} inputs per head; the number must be even",
            where="config.json",
        )
    base = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if kind == "default":
        return RopeTable(base.astype(np.float32), 1.0)
    if kind == "linear":
        return RopeTable((base / _number("factor", p.get("factor"))).astype(np.float32), 1.0)
    # A top-level key overrides the nested one (Phi-3). If both are absent, the original length is the context length.
    original = (
        config.get("original_max_position_embeddings")
        or p.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
    )
    length = _number("original_max_position_embeddings", original)
    implied = None if kind == "llama3" else config.get("max_position_embeddings")
    ratio = implied / length if p.get("factor") is None and isinstance(implied, int) else p.get("factor")
    factor = _number("factor", ratio)  # by default, the ratio of the extended to the original length
    if kind == "llama3":
        return RopeTable(_llama3(base, p, factor, length).astype(np.float32), 1.0)
    if kind == "longrope":
        return _longrope(base, p, factor, length, context or int(_number("context", implied)))
    return RopeTable(_yarn(base, p, factor, length, theta, dim).astype(np.float32), _yarn_factor(p, factor))


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(
            f"rope setting {key!r} must be a positive number, not {value!r}", where="config.json"
        )
    return float(value)


def _llama3(base: Any, p: Mapping[str, Any], factor: float, length: float) -> Any:
    """Keep short wavelengths, divide long ones by factor, interpolate between (Llama 3.1)."""
    low = _number("low_freq_factor", p.get("low_freq_factor"))
    high = _number("high_freq_factor", p.get("high_freq_factor"))
    if high <= low:
        raise ConfigError(
            "rope setting high_freq_factor must be larger than low_freq_factor", where="config.json"
        )
    wavelength = 2 * math.pi / base
    blend = np.clip((length / wavelength - low) / (high - low), 0, 1)
    return (1 - blend) * base / factor + blend * base


def _yarn(base: Any, p: Mapping[str, Any], factor: float, length: float, theta: float, dim: int) -> Any:
    """Interpolate low frequencies, keep high ones (Peng et al. 2023, §3.2)."""

    def turns_at(beta: float) -> float:  # the index that turns `beta` times in the original length
        return dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(theta))

    low = turns_at(_number("beta_fast", p.get("beta_fast") or 32))
    high = turns_at(_number("beta_slow", p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return base / factor * ramp + base * (1 - ramp)


def _longrope(base: Any, p: Mapping[str, Any], factor: float, length: float, context: int) -> RopeTable:
    """Divide each frequency by its own factor: short_factor up to the original length, else long_factor
    (Ding et al. 2024).
    """
    key = "long_factor" if context > length else "short_factor"
    divisors = p.get(key)
    if not isinstance(divisors, list) or len(divisors) != len(base):
        raise ConfigError(f"rope setting {key!r} must list {len(base)} numbers", where="config.json")
    inv_freq = base / np.array([_number(key, d) for d in divisors])
    given = p.get("attention_factor")
    stretched = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return RopeTable(
        inv_freq.astype(np.float32), stretched if given is None else _number("attention_factor", given)
    )


def _yarn_factor(p: Mapping[str, Any], factor: float) -> float:
    """Return the multiplier of cos and sin: attention_factor, or from mscale, or 0.1 ln(factor) + 1."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    if (given := p.get("attention_factor")) is not None:
        return _number("attention_factor", given)
    top, bottom = p.get("mscale"), p.get("mscale_all_dim")
    if top and bottom:
        return mscale(_number("mscale", top)) / mscale(_number("mscale_all_dim", bottom))
    return mscale(1.0)
