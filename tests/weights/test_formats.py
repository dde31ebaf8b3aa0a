"""Every layout on disk represents the same weights, and codes are carried bit for bit."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from counting import calls

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.formats import nibbles
from tinychat_mlx.weights.formats.awq_gemm import ORDER, awq_config, awq_entries
from tinychat_mlx.weights.formats.llm_awq import deinterleave
from tinychat_mlx.weights.formats.mlx import mlx_entries, to_bfloat16
from tinychat_mlx.weights.formats.stored import biases_of
from tinychat_mlx.weights.safetensors import Entry, entry, write
from tinychat_mlx.weights.weight import Dense, Packed, Weight, pack_codes, to_float32

MODULE = "model.layers.0.mlp.up_proj"


def folder(path: Path, config: dict[str, Any], tensors: list[Entry]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    write(path / "model.safetensors", tensors)
    return path


def stored(tensors: layouts.Tensors, module: str = MODULE) -> list[Entry]:
    return [entry(f"{module}.{suffix}", array) for suffix, array in tensors.items()]


def arrays(tensors: list[Entry]) -> layouts.Tensors:
    return {tensor.name.removeprefix(f"{MODULE}."): tensor.data for tensor in tensors}  # type: ignore[misc]


def packed(weight: Weight) -> Packed:
    assert isinstance(weight, Packed)
    return weight


def meaning(q: np.ndarray, z: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return (q - z) * s in float64."""
    group = q.shape[1] // s.shape[1]
    return (q - z.repeat(group, 1)) * s.astype(np.float64).repeat(group, 1)


def canonical(q: np.ndarray, z: np.ndarray, s: np.ndarray, **more: Any) -> Packed:
    words = pack_codes(q.astype(np.uint8), 4)
    return Packed(MODULE, words, s, biases_of(z.astype(np.uint8), s), 4, q.shape[1] // s.shape[1], **more)


GOLDEN = {  # the first 16 hex digits of the SHA-256 of the little-endian bytes
    ("awq-gemm", "qweight"): "fa3fa4bd520d29f4",
    ("awq-gemm", "qzeros"): "98c8e004ff11d825",
    ("awq-gemm", "scales"): "92d5cde48a459385",
    ("awq-gemv", "qweight"): "0ac8fca0a41cb8e9",
    ("awq-gemv", "qzeros"): "2cdd731eecf8c05d",
    ("awq-gemv", "scales"): "85c78a8e16ce2908",
    ("llm-awq", "qweight"): "1008e767407decdf",
    ("llm-awq", "scales"): "77cd7de29bac464c",
    ("llm-awq", "scaled_zeros"): "a9faf1068e95dbc9",
    ("compressed-tensors", "weight_packed"): "0ac8fca0a41cb8e9",
    ("compressed-tensors", "weight_scale"): "ecae2d1c18b84708",
    ("compressed-tensors", "weight_zero_point"): "b6d66c1bf83955a6",
    ("compressed-tensors", "weight_shape"): "72e6981aa0dd8647",
    ("mlx", "weight"): "0ac8fca0a41cb8e9",
    ("mlx", "scales"): "ecae2d1c18b84708",
    ("mlx", "biases"): "4ead86ec8b12dcf4",
}


def digests(layout: str, tensors: layouts.Tensors) -> dict[tuple[str, str], str]:
    return {
        (layout, suffix): hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]
        for suffix, a in tensors.items()
    }


def test_the_plain_layouts_of_the_tests_are_the_published_ones() -> None:
    found: dict[tuple[str, str], str] = {}
    for layout in ("awq-gemm", "awq-gemv", "llm-awq", "compressed-tensors", "mlx"):
        found |= digests(layout, layouts.WRITERS[layout](*layouts.golden()))
    assert found == GOLDEN


@pytest.mark.parametrize("layout", ["awq-gemm", "mlx"])
def test_written_tensors_have_the_golden_bytes(layout: str) -> None:
    weight = canonical(*layouts.golden())
    tensors = awq_entries(weight) if layout == "awq-gemm" else mlx_entries(weight)
    expected = {key: digest for key, digest in GOLDEN.items() if key[0] == layout}
    assert digests(layout, arrays(tensors)) == expected


SHAPES = [(64, 128, 32), (8, 256, 64), (24, 384, 128), (136, 1408, 128), (32, 4096, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", layouts.WRITERS)
def test_a_layout_is_read_with_the_same_codes_and_meaning(
    layout: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    n, k, group = shape
    q, z, s = layouts.sample(n, k, group)
    tensors = stored(layouts.WRITERS[layout](q, z, s)) + [
        entry(f"{MODULE}.bias", np.arange(n, dtype=np.float16))
    ]
    checkpoint = Checkpoint.open(folder(tmp_path, layouts.config(layout, group), tensors))
    weight = packed(checkpoint.weight(MODULE, (n, k)))
    assert checkpoint.quantization.format == layout
    np.testing.assert_array_equal(weight.codes(), q)
    np.testing.assert_array_equal(weight.scales, s)
    assert weight.scales.dtype == np.float16 and (weight.w_bit, weight.group_size) == (4, group)
    assert weight.bias is not None and weight.bias.tolist() == list(range(n))
    if layout in ("mlx", "llm-awq", "awq-gemv-fast"):  # they store -z * s, rounded to float16
        np.testing.assert_array_equal(weight.biases, (-(s * z.astype(np.float16))))
    else:  # float32: a product of 15 bits is exact, and so is adding it to q * s: 2 * 4 + 11 bits
        np.testing.assert_array_equal(weight.to_float32().astype(np.float64), meaning(q, z, s))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("layout", layouts.WRITERS)
def test_scales_of_other_dtypes_become_float32_exactly(layout: str, dtype: str, tmp_path: Path) -> None:
    q, z, s = layouts.golden()  # 3 bits: exact in every dtype
    tensors = []
    for e in stored(layouts.WRITERS[layout](q, z, s)):
        if e.dtype == "F16":
            wide = e.data.astype(np.float32)  # type: ignore[union-attr]
            e = entry(e.name, to_bfloat16(wide), "BF16") if dtype == "BF16" else entry(e.name, wide)
        tensors.append(e)
    weight = packed(Checkpoint.open(folder(tmp_path, layouts.config(layout, 64), tensors)).weight(MODULE))
    assert weight.scales.dtype == weight.biases.dtype == np.float32
    np.testing.assert_array_equal(weight.to_float32().astype(np.float64), meaning(q, z, s))


def test_biases_are_exact_for_every_scale_and_zero() -> None:
    """All positive float16 scales with all zeros: float16 is kept only if nothing is lost."""
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)[:, None].repeat(16, 1)
    zeros = np.arange(16, dtype=np.uint8)[None].repeat(len(scales), 0)
    exact = -(zeros * scales.astype(np.float64))
    assert biases_of(zeros, scales).dtype == np.float32
    np.testing.assert_array_equal(biases_of(zeros, scales).astype(np.float64), exact)
    small = scales[:8].copy()  # subnormal: whole multiples of the smallest step
    assert biases_of(zeros[:8], small).dtype == np.float16
    np.testing.assert_array_equal(biases_of(zeros[:8], small).astype(np.float64), exact[:8])


@pytest.mark.parametrize(("group", "k", "canonical_group"), [(-1, 896, 128), (-1, 192, 64), (256, 512, 128)])
def test_long_groups_are_split_into_equal_ones(
    group: int, k: int, canonical_group: int, tmp_path: Path
) -> None:
    q, z, s = layouts.sample(16, k, k if group == -1 else group)
    tensors = stored(layouts.autoawq_gemm(q, z, s))
    weight = packed(
        Checkpoint.open(folder(tmp_path, layouts.config("awq-gemm", group), tensors)).weight(MODULE)
    )
    assert weight.group_size == canonical_group
    np.testing.assert_array_equal(weight.to_float32().astype(np.float64), meaning(q, z, s))


def test_symmetric_compressed_tensors_have_zero_eight(tmp_path: Path) -> None:
    q, z, s = layouts.sample(16, 256, 128)
    tensors = layouts.compressed_tensors(q, z, s)
    config = layouts.config("compressed-tensors", 128)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True  # type: ignore[index]
    with pytest.raises(FormatError, match="weight_zero_point' exists, but config.json has symmetric: True"):
        Checkpoint.open(folder(tmp_path, config, stored(tensors))).weight(MODULE)
    del tensors["weight_zero_point"]
    weight = Checkpoint.open(folder(tmp_path, config, stored(tensors))).weight(MODULE)
    np.testing.assert_array_equal(weight.to_float32().astype(np.float64), meaning(q, np.full_like(z, 8), s))


def test_a_missing_version_is_settled_by_the_shapes_even_where_they_are_square(tmp_path: Path) -> None:
    q, z, s = layouts.sample(256, 256, 64)
    for layout in ("awq-gemm", "awq-gemv"):
        config = layouts.config("awq-gemm", 64)
        del config["quantization_config"]["version"]  # type: ignore[attr-defined]
        checkpoint = Checkpoint.open(folder(tmp_path, config, stored(layouts.WRITERS[layout](q, z, s))))
        assert checkpoint.quantization.format == layout
        np.testing.assert_array_equal(packed(checkpoint.weight(MODULE)).codes(), q)


@pytest.mark.parametrize("way", ["straight", "through mlx in float16", "through mlx in float32"])
def test_autoawq_comes_back_with_the_same_bytes(way: str, tmp_path: Path) -> None:
    q, z, s = layouts.sample(72, 512, 128)
    theirs = layouts.autoawq_gemm(q, z, s)
    weight = Checkpoint.open(folder(tmp_path, layouts.config("awq-gemm", 128), stored(theirs))).weight(MODULE)
    if way != "straight":
        tensors = mlx_entries(weight, "F16" if "16" in way else "F32")
        weight = Checkpoint.open(folder(tmp_path, layouts.config("mlx", 128), tensors)).weight(MODULE)
    ours = arrays(awq_entries(packed(weight)))
    assert ours.keys() == theirs.keys()
    for suffix, array in theirs.items():
        assert ours[suffix].dtype == array.dtype and ours[suffix].tobytes() == array.tobytes()


def test_rounding_biases_to_float16_costs_less_than_a_hundredth_of_a_step(tmp_path: Path) -> None:
    """float16 has 11 bits, so a product z s has an error of at most z s / 2^11, and z is at most 15."""
    q, z, s = layouts.sample(64, 512, 128)
    tensors = mlx_entries(canonical(q, z, s))
    weight = Checkpoint.open(folder(tmp_path, layouts.config("mlx", 128), tensors)).weight(MODULE)
    steps = np.abs(weight.to_float32() - meaning(q, z, s)) / s.astype(np.float64).repeat(128, 1)
    assert 0 < steps.max() <= 15 / 2048 + 16 * 2**-23  # and one float32 addition


def test_negative_scales_are_turned_round_on_export() -> None:
    q, z, s = layouts.golden()
    signed = np.where(np.arange(64)[:, None] % 3 == 0, -s, s)
    weight = canonical(q, z, signed)
    ours = arrays(awq_entries(weight))
    turned = signed < 0
    expected = layouts.autoawq_gemm(np.where(turned.repeat(64, 1), 15 - q, q), np.where(turned, 15 - z, z), s)
    for suffix, array in expected.items():
        np.testing.assert_array_equal(ours[suffix], array)


def change(weight: Packed, **fields: np.ndarray) -> Packed:
    return Packed(**(vars(weight) | fields))


def inexportable(kind: str) -> Packed:
    weight = canonical(*layouts.sample(16, 128, 64))
    scales, biases = weight.scales.astype(np.float32), weight.biases.astype(np.float32)
    row, group = 5, 1
    if kind == "half a zero":
        biases[row, group] = -7.5 * scales[row, group]
    elif kind == "zero 16":
        biases[row, group] = -16 * scales[row, group]
    elif kind == "zero -1":
        biases[row, group] = scales[row, group]
    elif kind == "scale finer than float16":  # 2^-24 or 2^-23
        scales[row, group] = np.float32(1.4 * 2**-24)
        biases[row, group] = -3 * scales[row, group]
    elif kind == "scale 0 with a bias":
        scales[row, group], biases[row, group] = 0, -0.3
    elif kind == "scale over float16":
        scales[row, group], biases[row, group] = 1e5, -1e5
    else:
        scales[row, group] = np.nan
    return change(weight, scales=scales, biases=biases)


KINDS = [
    "half a zero",
    "zero 16",
    "zero -1",
    "scale finer than float16",
    "scale 0 with a bias",
    "scale over float16",
    "NaN",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_autoawq_cannot_say_is_refused_naming_the_module(kind: str) -> None:
    with pytest.raises(FormatError, match=f"{MODULE}: cannot be written as AutoAWQ: row 5, group 1"):
        awq_entries(inexportable(kind))


def test_other_bits_and_odd_outputs_are_refused_for_autoawq() -> None:
    rng = np.random.default_rng(0)
    q, z, s = layouts.sample(12, 128, 64)
    with pytest.raises(FormatError, match="12 outputs"):
        awq_entries(canonical(q, z, s))
    words = pack_codes(rng.integers(0, 256, (8, 128), dtype=np.uint8), 8)
    with pytest.raises(FormatError, match="8 bits"):
        awq_entries(Packed(MODULE, words, s[:8], s[:8], 8, 64))


def test_a_seven_billion_models_layer_is_read_by_few_operations_on_whole_arrays() -> None:
    """11008 x 4096: no loop over rows in Python, and no more memory than the result and small change."""
    words = np.random.default_rng(0).integers(0, 2**32, (4096, 11008 // 8), dtype=np.uint32)
    jobs = {
        "gemm": lambda: nibbles.transpose(words, ORDER),
        "to gemm": lambda: nibbles.transpose(words, ORDER, inverse=True),
        "llm-awq": lambda: deinterleave(words.reshape(11008 // 4, -1)),
    }
    for name, job in jobs.items():
        assert calls(job) < len(words), name
        tracemalloc.start()
        job()
        assert tracemalloc.get_traced_memory()[1] < words.nbytes + (4 << 20), name
        tracemalloc.stop()


def test_transposing_twice_is_identity_and_keeps_its_input() -> None:
    words = np.random.default_rng(1).integers(0, 2**32, (8, 16), dtype=np.uint32)  # (A, B/8): A 8, B 128
    before = words.copy()
    once = nibbles.transpose(words, ORDER)
    np.testing.assert_array_equal(nibbles.transpose(once, ORDER, inverse=True), words)
    np.testing.assert_array_equal(words, before)


def test_bfloat16_rounds_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    theirs = torch.from_numpy(x).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(to_float32(to_bfloat16(x)), theirs)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_mlx_quantises_means_the_same_here(bits: int, group: int, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    w = mx.random.normal((24, 384), key=mx.random.key(bits))
    theirs = mx.quantize(w, group_size=group, bits=bits)
    tensors = [entry(f"{MODULE}.{s}", np.array(a)) for s, a in zip(("weight", "scales", "biases"), theirs)]
    config = {"quantization": {"group_size": group, "bits": bits, "mode": "affine"}}
    weight = packed(Checkpoint.open(folder(tmp_path, config, tensors)).weight(MODULE, (24, 384)))
    assert (weight.w_bit, weight.group_size) == (bits, group)
    # Same arithmetic in float32; MLX may fuse multiply and add: one rounding of |q s| <= 4.
    expected = np.array(mx.dequantize(*theirs, group_size=group, bits=bits))
    np.testing.assert_allclose(weight.to_float32(), expected, rtol=0, atol=4 * 2**-23)


def llama(path: Path, form: str) -> tuple[Path, dict[str, Weight]]:
    """A Llama of one layer, its linears quantised in one form, from one set of codes."""
    c, f, v, group = 128, 256, 64, 64
    shapes = {f"self_attn.{x}_proj": (c, c) for x in "qkvo"}
    shapes |= {"mlp.gate_proj": (f, c), "mlp.up_proj": (f, c), "mlp.down_proj": (c, f)}
    rng = np.random.default_rng(0)
    embed = rng.standard_normal((v, c)).astype(np.float16)
    weights: dict[str, Weight] = {"model.embed_tokens": Dense("model.embed_tokens", embed)}
    weights["lm_head"] = Dense("lm_head", embed[::-1].copy())
    for i, (name, (n, k)) in enumerate(shapes.items()):
        full = f"model.layers.0.{name}"
        q, z, s = layouts.sample(n, k, group, seed=i)
        weights[full] = Packed(
            full, *(canonical(q, z, s).__dict__[x] for x in ("qweight", "scales", "biases")), 4, group
        )
    norms = ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    tensors = [entry(f"{name}.weight", np.ones(c, np.float16)) for name in norms]
    for weight in weights.values():
        awq = form == "awq" and isinstance(weight, Packed)
        tensors += awq_entries(weight) if awq else mlx_entries(weight)  # type: ignore[arg-type]
    config = {
        "model_type": "llama", "hidden_size": c, "intermediate_size": f,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": v,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    block = {"group_size": group, "bits": 4}
    config |= {"quantization_config": awq_config(group)} if form == "awq" else {"quantization": block}
    return folder(path, config, tensors), weights


MOE = {
    "qwen3_moe": (
        "mlp.experts.{e}.",
        {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    ),
    "mixtral": ("block_sparse_moe.experts.{e}.", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
}


@pytest.mark.parametrize("family", MOE)
def test_experts_that_mlx_lm_stacks_are_read_one_by_one(family: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    config = {
        "model_type": family, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
        "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "vocab_size": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 64,
    }  # fmt: skip
    model_class, args = utils._get_classes(config)
    model = model_class(args.from_dict(config))
    model, config = utils.quantize_model(model, config, group_size=32, bits=4)
    utils.save_model(tmp_path, model)
    utils.save_config(config, tmp_path / "config.json")
    prefix, names = MOE[family]
    stacks = dict(model.named_modules())
    checkpoint = Checkpoint.open(tmp_path)
    for theirs, ours in names.items():
        block = "model.layers.0." + prefix.split(".")[0]
        stack = stacks[f"{block}.switch_mlp.{theirs}"]
        expected = np.array(mx.dequantize(stack.weight, stack.scales, stack.biases, group_size=32, bits=4))
        for e in range(3):
            weight = checkpoint.weight(f"model.layers.0.{prefix.format(e=e)}{ours}", expected.shape[1:])
            # float32 throughout: MLX may fuse multiply and add, one rounding of |q s| <= 2
            np.testing.assert_allclose(weight.to_float32(), expected[e], rtol=0, atol=2 * 2**-23)
    assert not any("switch_mlp" in name for name in checkpoint.names())


@pytest.mark.parametrize("form", ["mlx", "awq"])
def test_mlx_lm_loads_what_is_written_and_finds_the_same_weights(form: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    path, weights = llama(tmp_path / form, form)
    model, _ = utils.load_model(path)
    modules = dict(model.named_modules())
    checkpoint = Checkpoint.open(path)
    for name, weight in weights.items():
        theirs = modules[name]
        ours = checkpoint.weight(name, weight.shape)
        if isinstance(weight, Packed):
            parts = [mx.array(p) if p.dtype != mx.float16 else p.astype(mx.float32) for p in
                     (theirs.weight, theirs.scales, theirs.biases)]  # fmt: skip
            expected = np.array(mx.dequantize(*parts, group_size=64, bits=4))
            # mlx-lm rounds AWQ's -z * s to float16: by 15 / 2048 steps (above), of at most 0.1.
            np.testing.assert_allclose(ours.to_float32(), expected, rtol=0, atol=0.1 * 15 / 2048)
            np.testing.assert_array_equal(packed(ours).qweight, np.array(theirs.weight))
        else:
            np.testing.assert_array_equal(ours.to_float32(), np.array(theirs.weight.astype(mx.float32)))
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()
