"""config.json is read in both spellings, and unsupported keys are rejected by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinychat_mlx.base.errors import ConfigError
from tinychat_mlx.model.config import SCALARS, parse_config, token_ids
from tinychat_mlx.model.families import ARCHITECTURES
from tinychat_mlx.model.rope import rope_table

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.3},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: str(s["rope_type"]))
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
def test_rope_frequencies_equal_transformers(scaling: dict[str, Any], spelling: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta, sizes = (
        LLAMA["rope_theta"],
        {k: v for k, v in LLAMA.items() if k not in ("model_type", "rope_theta")},
    )
    oracle = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters={**scaling, "rope_theta": theta}))
    config = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    if spelling == "rope_parameters":
        config["rope_parameters"] = {**scaling, "rope_theta": theta}
    else:
        old = dict(scaling)
        if spelling == "type":
            old["type"] = old.pop("rope_type")
        config |= {"rope_theta": theta, "rope_scaling": old}
    table = rope_table(config, 16, None)
    # transformers computes in float32 throughout (a power, a few products): 16 roundings at most
    np.testing.assert_allclose(table.inv_freq, oracle.inv_freq.numpy(), rtol=16 * 2**-23)
    assert table.factor == pytest.approx(oracle.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"rope_scaling": {"rope_type": "cubist", "factor": 2.0}}, "cubist"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wobble": 1}}, "wobble"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor"),
        ({"rope_scaling": "linear"}, "rope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"partial_rotary_factor": 0.2}, "rotate"),
        ({"model_type": "llamma"}, "nearest: llama"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "swoosh"}, "swoosh"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
    ],
)
def test_what_is_unknown_or_absurd_is_refused_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_config({**LLAMA, **change})


@pytest.mark.parametrize("key", [k for k in SCALARS])
def test_a_setting_this_family_does_not_obey_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config({**LLAMA, key: 3.5})
    for neutral in SCALARS[key]:
        parse_config({**LLAMA, key: neutral})


def test_missing_values_take_the_meaning_transformers_gives_them() -> None:
    config = parse_config({k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rope_theta")})
    assert config.num_key_value_heads == 4 and config.head_dim == 16
    assert config.rope[0] is not None and config.rope[0].inv_freq[1] == np.float32(10000 ** (-1 / 8))


@pytest.mark.parametrize("value, ids", [(None, ()), (2, (2,)), ([2, 5], (2, 5))])
def test_end_tokens_may_be_absent_one_or_many(value: object, ids: tuple[int, ...]) -> None:
    assert token_ids(value, "config.json") == ids


def test_a_window_starts_at_the_layer_that_config_names() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert parse_config({**qwen, "use_sliding_window": True}).window == (0, 0, 0, 8)
    assert parse_config({**qwen, "use_sliding_window": False}).window == (0, 0, 0, 0)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert parse_config({**qwen, "layer_types": kinds}).window == (0, 8, 0, 8)
    with pytest.raises(ConfigError, match="layer_types"):
        parse_config({**qwen, "layer_types": kinds[:3]})
    assert parse_config({**LLAMA, "model_type": "mistral", "sliding_window": 8}).window == (8,) * 4


def test_rows_of_the_table_are_named_by_their_key() -> None:
    assert all(name == spec.model_type for name, spec in ARCHITECTURES.items())
