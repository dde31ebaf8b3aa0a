"""The quantisation in config.json and the tensors must agree; everything else is rejected by name."""

from __future__ import annotations

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from folders import dense_and, folder, quantised, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat_mlx.base.errors import ConfigError, FormatError
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.formats.detect import check_left_out, declared

METHODS = [
    "gptq", "GPTQ", "marlin", "fp8", "mxfp4", "bitsandbytes", "modelopt", "hqq", "aqlm", "quanto", "eetq",
    "torchao", "nvfp4", "auto-round", "bitnet", "something-new", "", 7, None, [], {},
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_other_quantisations_are_refused_by_name_with_a_remedy(method: Any, tmp_path: Path) -> None:
    block = {"quant_method": method, "group_size": 64}
    folder(tmp_path, {"quantization_config": block})
    refused(tmp_path, "which tinychat does not read — quantise the original model", ConfigError)


MUTATIONS: list[tuple[str, str, Any]] = [  # layout, dotted key of the block, its new value
    *(("awq-gemm", "bits", v) for v in (3, 8, 4.0, "4", None, True, [4], -4, 2**70)),
    *(("awq-gemm", "group_size", v) for v in (0, -2, 100, 48, 3, "64", None, 64.0, True, 2**64)),
    *(("awq-gemm", "zero_point", v) for v in (False, None, 0, "true")),
    *(("awq-gemm", "version", v) for v in ("marlin", "gemm2", "exllama", 1, [], {"a": 1})),
    *(("awq-gemm", "quant_method", v) for v in ("gptq", "awq2", "compressed-tensors")),
    *(
        ("awq-gemm", "modules_to_not_convert", v)
        for v in (["mlp.down_proj"], ["down_proj"], ["layers.0"], ["model"])
    ),
    *(("awq-gemm", "modules_to_not_convert", v) for v in (5, "lm_head", {"lm_head": True}, True, 1.5)),
    *(("compressed-tensors", "ignore", v) for v in (5, "lm_head", {"a": 1})),
    *(("mlx", "bits", v) for v in (0, 1, 2, 5, 6, 16, "4", 4.0, None, [], True)),
    *(("mlx", "group_size", v) for v in (0, 16, 256, -1, "64", None, 64.5)),
    *(("mlx", "mode", v) for v in ("mxfp4", "nvfp4", "mxfp8", "", None, 4)),
    *(
        ("mlx", "model.layers.0.mlp.down_proj", v)
        for v in (False, {"bits": 5}, {"mode": "mxfp4"}, {"group_size": 7}, 3, "x")
    ),
    *(
        ("compressed-tensors", "format", v)
        for v in ("float-quantized", "int-quantized", "marlin-24", "dense", None, 3)
    ),
    *(
        ("compressed-tensors", "config_groups", v)
        for v in ({}, None, [], {"a": None}, {"a": {}}, {"a": {"weights": 3}})
    ),
    *(("compressed-tensors", "kv_cache_scheme", v) for v in ({"num_bits": 8}, True)),
    ("compressed-tensors", "ignore", ["model.layers.0.mlp.down_proj"]),
    ("compressed-tensors", "sparsity_config", {"format": "sparse-24-bitmask"}),
    ("compressed-tensors", "config_groups.group_0.input_activations", {"num_bits": 8}),
    *(("compressed-tensors", "config_groups.group_0.weights.num_bits", v) for v in (8, 2, "4", None)),
    *(("compressed-tensors", "config_groups.group_0.weights.type", v) for v in ("float", None)),
    *(
        ("compressed-tensors", "config_groups.group_0.weights.strategy", v)
        for v in ("tensor", "block", "token", None)
    ),
    *(("compressed-tensors", "config_groups.group_0.weights.symmetric", v) for v in (None, "no", 1)),
    *(("compressed-tensors", "config_groups.group_0.weights.group_size", v) for v in (0, 33, None, "64")),
    *(
        ("compressed-tensors", "config_groups.group_0.weights.actorder", v)
        for v in ("group", "dynamic", True)
    ),
    *(("compressed-tensors", "config_groups.group_0.weights.dynamic", v) for v in (True, "local")),
]


@pytest.mark.parametrize(("layout", "key", "value"), MUTATIONS, ids=repr)
def test_a_mutated_quantisation_block_is_refused_before_anything_is_allocated(
    layout: str, key: str, value: Any, tmp_path: Path
) -> None:
    quantised(tmp_path, layout)
    config = copy.deepcopy(layouts.config(layout, 64))
    table = next(iter(config.values()))
    path = [key] if key.startswith("model.") else key.split(".")
    for part in path[:-1]:
        table = table[part]  # type: ignore[index]
    table[path[-1]] = value  # type: ignore[index]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        with pytest.raises((ConfigError, FormatError)) as error:
            Checkpoint.open(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert "config.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_config_and_tensors_of_different_layouts_are_refused_saying_both(tmp_path: Path) -> None:
    for written in layouts.WRITERS:
        for said in layouts.WRITERS:
            quantised(tmp_path, written)
            (tmp_path / "config.json").write_text(json.dumps(layouts.config(said, 64)))
            if said == written:
                assert Checkpoint.open(tmp_path).quantization.format == said
                continue
            with pytest.raises(FormatError) as error:
                Checkpoint.open(tmp_path)
            assert "download the model again" in str(error.value) and "down_proj" in str(error.value)
    folder(tmp_path, layouts.config("awq-gemm", 64))
    refused(tmp_path, "declares AWQ, but no tensor has this format")
    tensors = (
        dense_and(layouts.mlx_affine(*layouts.golden()))
        + dense_and(layouts.autoawq_gemm(*layouts.golden()), "x")[4:]
    )
    folder(tmp_path, layouts.config("awq-gemm", 64), tensors)
    refused(tmp_path, "is MLX affine, config.json declares AWQ")


def test_two_blocks_that_disagree_are_refused_and_equal_ones_are_not(tmp_path: Path) -> None:
    block = {"bits": 4, "group_size": 64}
    quantised(tmp_path, "mlx")
    (tmp_path / "config.json").write_text(json.dumps({"quantization": block, "quantization_config": block}))
    assert Checkpoint.open(tmp_path).quantization.format == "mlx"
    both = {"quantization": block, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(both))
    refused(tmp_path, "quantization and quantization_config disagree", ConfigError)


FOREIGN = {
    "GPTQ": {
        "qweight": np.zeros((16, 64), np.int32),
        "qzeros": np.zeros((2, 8), np.int32),
        "g_idx": np.zeros(128, np.int32),
    },
    "Marlin": {"qweight": np.zeros((8, 128), np.int32), "scales": np.ones((2, 64), np.float16)},
    "FP8 or INT8": {"weight": np.zeros((8, 8), np.int8), "weight_scale": np.ones(8, np.float32)},
    "FP8": {"weight": np.zeros((8, 8), np.uint8), "weight_scale_inv": np.ones((1, 1), np.float32)},
    "bitsandbytes": {"weight": np.zeros((32, 1), np.uint8), "absmax": np.ones(1, np.float32)},
    "MXFP4": {"gate_up_proj_blocks": np.zeros((1, 2, 3, 16), np.uint8)},
    "an MX or NV float form": {"weight": np.zeros((8, 8), np.uint32), "scales": np.ones((8, 2), np.uint8)},
}


@pytest.mark.parametrize("family", FOREIGN)
def test_foreign_tensors_that_config_does_not_mention_are_named(family: str, tmp_path: Path) -> None:
    folder(tmp_path, tensors=dense_and(FOREIGN[family]))
    refused(tmp_path, f"is {family}")


def test_modelopts_side_file_is_recognised(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    refused(tmp_path, "NVIDIA ModelOpt", ConfigError)


def test_a_left_out_list_matches_whole_parts_and_never_runs_a_pattern(tmp_path: Path) -> None:
    quantised(tmp_path)
    config = layouts.config("awq-gemm", 64)
    hostile = "re:" + "(a+)+" * 20 + "$"
    config["quantization_config"]["modules_to_not_convert"] = [
        "mlp.down",
        "down",
        "lm_head",
        "layers.1",
        hostile,
    ]  # type: ignore[index]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(tmp_path).modules


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(layouts.WRITERS)), st.integers(0, 99), JSON)
@settings(max_examples=500, deadline=None)
def test_any_value_anywhere_in_the_block_is_understood_or_refused(
    layout: str, place: int, value: Any
) -> None:
    """Any content of config.json gives a result or a TinychatError, never another exception."""
    config = copy.deepcopy(layouts.config(layout, 64))
    tables: list[tuple[dict[str, Any], str]] = [(config, key) for key in config]
    for table, key in tables:
        if isinstance(inner := table.get(key), dict):
            tables += [(inner, name) for name in [*inner, "modules_to_not_convert", "ignore"]]
    table, key = tables[place % len(tables)]
    table[key] = value
    try:
        declared(config)
        check_left_out(config, frozenset({"model.layers.0.mlp.down_proj"}))
    except ConfigError as error:
        assert "config.json" in str(error) and len(str(error)) < 600
