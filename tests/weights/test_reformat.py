"""A change of format keeps the codes, writes a folder that other readers accept, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import tiny_dense
from tiny_models import tiny

import tinychat_mlx
from tests.awq.test_convert_families import converted
from tinychat_mlx.apps.cli import main
from tinychat_mlx.awq.output.reformat import reformatted
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.safetensors import Entry, TensorFile, entry, write
from tinychat_mlx.weights.shards import write_sharded
from tinychat_mlx.weights.weight import Packed

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
IDS = np.random.default_rng(9).integers(0, 80, 40).tolist()


def quantised(folder: Path, layout: str, group: int, other: dict[str, int] | None = None) -> Path:
    """Write a model whose linears are random codes in a layout, by its definition.

    group -1: one per row. other: part of a name -> another group size.
    """
    config = tiny_dense.CONFIG | SIZES
    dense = tiny_dense.tensors(config)
    tiny_dense.save(folder, dense, **SIZES)
    tensors: list[Entry] = []
    named: dict[str, Any] = {}
    for i, (name, w) in enumerate(dense.items()):
        module = name.removesuffix(".weight")
        if not name.endswith("proj.weight"):
            tensors.append(entry(name, w))
            continue
        own = next((g for part, g in (other or {}).items() if part in name), group)
        if own != group:
            named[module] = {"group_size": own, "bits": 4}
        q, z, s = layouts.sample(*w.shape, w.shape[1] if own == -1 else own, seed=i)
        s = (s / np.float16(np.sqrt(w.shape[1]))).astype(np.float16)
        tensors += [entry(f"{module}.{end}", a) for end, a in layouts.WRITERS[layout](q, z, s).items()]
    raw = json.loads((folder / "config.json").read_text()) | layouts.config(layout, group)
    raw.get("quantization", {}).update(named)
    (folder / "config.json").write_text(json.dumps(raw))
    write(folder / "model.safetensors", tensors)
    return folder


def logits(folder: Path, ids: list[int] = IDS) -> np.ndarray:
    return tinychat_mlx.load(folder, backend="reference").logits(ids)


def to(source: Path, form: str, target: Path, *more: str) -> int:
    return main(["convert", str(source), "-o", str(target), "--format", form, *more])


def same_meaning(one: Path, two: Path) -> None:
    """Check codes times scales of all common modules, to float16's rounding of zero · scale."""
    a, b = Checkpoint.open(one), Checkpoint.open(two)
    assert a.modules and a.modules & b.modules
    for module in a.modules & b.modules:
        x, y = a.weight(module), b.weight(module)
        assert isinstance(x, Packed) and isinstance(y, Packed)
        assert np.array_equal(x.codes(), y.codes()), module
        step = np.repeat(x.scales.astype(np.float32), x.group_size, 1)
        assert (np.abs(x.to_float32() - y.to_float32()) <= 15 / 2048 * 1.01 * step).all(), module


@pytest.mark.parametrize("group", [-1, 256, 128])
@pytest.mark.parametrize("layout", ["awq-gemm", "awq-gemv", "llm-awq"])
def test_every_group_size_becomes_one_that_is_read(layout: str, group: int, tmp_path: Path) -> None:
    """A group of a whole row, or of 256, becomes several equal ones.

    AutoAWQ's config has the tensors' group size.
    """
    source = quantised(tmp_path / "source", layout, group)
    for form in ("awq", "mlx"):
        assert to(source, form, tmp_path / form) == 0
        same_meaning(source, tmp_path / form)
        # float32 sums of at most 512 products, and zero points whose product with a scale is rounded
        assert np.abs(logits(tmp_path / form) - logits(source)).max() < 2e-2 * np.abs(logits(source)).max()
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 128 and config["modules_to_not_convert"] is None


def test_a_module_with_a_group_of_its_own_keeps_it(tmp_path: Path) -> None:
    """In MLX by name; AutoAWQ has one size for all, so the others are split to it."""
    source = quantised(tmp_path / "source", "mlx", 128, {"layers.0.mlp.down": 64, "layers.1.self_attn.q": 32})
    for form in ("mlx", "awq"):
        assert to(source, form, tmp_path / form) == 0
        same_meaning(source, tmp_path / form)
    block = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert block["group_size"] == 128
    assert block["model.layers.0.mlp.down_proj"] == {"group_size": 64, "bits": 4}
    assert block["model.layers.1.self_attn.q_proj"] == {"group_size": 32, "bits": 4}
    assert Checkpoint.open(tmp_path / "awq").quantization.group_size == 32


def test_the_size_of_most_is_the_bodys(tmp_path: Path) -> None:
    """Rows of 256 and of 512 inputs with one group each become groups of 128, so no module needs an entry."""
    source = quantised(tmp_path / "source", "awq-gemm", -1)
    assert to(source, "mlx", tmp_path / "mlx") == 0
    block = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert block == {"group_size": 128, "bits": 4, "mode": "affine", "model.embed_tokens": False}


MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe-all", "olmoe"]


@pytest.mark.parametrize("variant", [*MIXTURES, "qwen2_moe", "qwen3_moe-mixed"])
def test_mixtures_go_from_one_format_to_the_other(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    """Routers are listed as dense, and the codes come back byte-identical."""
    converted(variant, tiny_root, tmp_path / "gemm", method="rtn", format="awq")
    assert to(tmp_path / "gemm", "mlx", tmp_path / "mlx") == 0
    assert to(tmp_path / "mlx", "awq", tmp_path / "back") == 0
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("gemm", "back"))
    assert one["quantization_config"] == two["quantization_config"]
    names = one["quantization_config"]["modules_to_not_convert"]
    assert any(name.endswith("gate") for name in names)
    first, last = (TensorFile(tmp_path / n / "model.safetensors") for n in ("gemm", "back"))
    assert set(first.names) == set(last.names)
    for name in first.names:
        assert first.read(name).tobytes() == last.read(name).tobytes(), name
    ids = tiny(variant, tiny_root).ids
    assert np.array_equal(logits(tmp_path / "mlx", ids), logits(tmp_path / "gemm", ids))


@pytest.mark.parametrize("variant", MIXTURES)
def test_mlx_lm_reads_a_mixture_that_came_from_autoawq(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    converted(variant, tiny_root, tmp_path / "gemm", method="rtn", format="awq")
    assert to(tmp_path / "gemm", "mlx", tmp_path / "mlx") == 0
    model, _ = utils.load_model(tmp_path / "mlx")
    model.set_dtype(mx.float32)
    ids = tiny(variant, tiny_root).ids
    theirs, ours = np.array(model(mx.array([ids]))[0]), logits(tmp_path / "mlx", ids)
    # The same codes, scales and biases; sums of at most 100 products in another order, through four layers.
    assert np.abs(theirs - ours).max() < 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_mlx_quantised_becomes_autoawq_and_says_how_exactly(
    dtype: str, group: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mx.quantize rounds scale and bias separately, so their quotient is not an exact integer.

    A float16 has 11 bits, a bfloat16 8: with zero points and codes up to 15, 15 · 2 · 2^-11 and 15 · 2 · 2^-8
    of a step.
    """
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    source = tiny_dense.save(tmp_path / "source", tiny_dense.tensors(tiny_dense.CONFIG | SIZES), **SIZES)
    arrays: dict[str, Any] = {}
    for name, w in tiny_dense.tensors(tiny_dense.CONFIG | SIZES).items():
        w = mx.array(w).astype(getattr(mx, dtype))
        if name.endswith("proj.weight"):
            parts = mx.quantize(w, group_size=group, bits=4)
            arrays |= dict(
                zip(
                    (name, name.replace("weight", "scales"), name.replace("weight", "biases")),
                    parts,
                    strict=True,
                )
            )
        else:
            arrays[name] = w
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "mlx"})
    raw = json.loads((source / "config.json").read_text()) | layouts.config("mlx", group)
    (source / "config.json").write_text(json.dumps(raw))

    assert to(source, "awq", tmp_path / "awq", "--json") == 0
    moved = json.loads(capsys.readouterr().out)["moved_steps"]
    assert 0 < moved < 15 * 2 * (2.0**-11 if dtype == "float16" else 2.0**-8)
    made, most = Checkpoint.open(tmp_path / "awq"), 0.0
    for name in (n for n in arrays if n.endswith("proj.weight")):
        parts = (
            arrays[name],
            arrays[name.replace("weight", "scales")],
            arrays[name.replace("weight", "biases")],
        )
        wide = [parts[0], *(a.astype(mx.float32) for a in parts[1:])]
        theirs = np.array(mx.dequantize(*wide, group_size=group, bits=4))
        step = np.abs(np.repeat(np.array(wide[1]), group, 1))
        most = max(
            most,
            float((np.abs(made.weight(name.removesuffix(".weight")).to_float32() - theirs) / step).max()),
        )
    assert most == pytest.approx(moved, rel=0.1)  # codes 0 and 15 are not in every group
    assert to(source, "awq", tmp_path / "again") == 0
    assert f"at most {moved:.4f} of a step" in capsys.readouterr().out


def test_what_no_format_holds_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A zero point that is not an integer is found before anything is written."""
    source = quantised(tmp_path / "source", "mlx", 128)
    file = TensorFile(source / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.names}
    tensors["model.layers.1.mlp.up_proj.biases"][3, 1] += (
        tensors["model.layers.1.mlp.up_proj.scales"][3, 1] / 2
    )
    broken = quantised(tmp_path / "broken", "mlx", 128)
    write(broken / "model.safetensors", [entry(n, a) for n, a in tensors.items()])
    before = sorted(p.name for p in tmp_path.iterdir())
    assert to(broken, "awq", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj" in error and "row 3, group 1" in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_bits_that_autoawq_lacks_are_refused(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted("llama", tiny_root, tmp_path / "eight", method="rtn", w_bit=8)
    assert to(tmp_path / "eight", "awq", tmp_path / "out") == 1
    assert "8 bits and 64 outputs: AWQ needs 4 bits" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eight"]


def test_a_model_of_which_nothing_would_stay_quantised_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_dense.save(tmp_path / "source")
    arrays = tiny_dense.tensors(tiny_dense.CONFIG)
    name, (q, z, s) = "model.embed_tokens", layouts.sample(96, 64, 32)
    del arrays[f"{name}.weight"]
    arrays |= {f"{name}.{end}": a for end, a in layouts.mlx_affine(q, z, s).items()}
    write(source / "model.safetensors", [entry(n, a) for n, a in arrays.items()])
    raw = json.loads((source / "config.json").read_text()) | layouts.config("mlx", 32)
    (source / "config.json").write_text(json.dumps(raw))
    assert to(source, "awq", tmp_path / "out") == 1
    assert "only embedding and head are quantised" in capsys.readouterr().err


def test_experts_of_two_forms_are_no_stack(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One expert in float16 among codes: mlx-lm has one tensor for all."""
    converted("mixtral", tiny_root, tmp_path / "gemm", method="rtn", format="awq")
    file = TensorFile(tmp_path / "gemm" / "model.safetensors")
    odd = "model.layers.1.block_sparse_moe.experts.0.w1."
    tensors = [entry(n, np.array(file.read(n))) for n in file.names if not n.startswith(odd)]
    n, k = Checkpoint.open(tmp_path / "gemm").weight(odd.removesuffix(".")).shape
    write(
        tmp_path / "gemm" / "model.safetensors",
        [*tensors, entry(f"{odd}weight", np.ones((n, k), np.float16))],
    )
    assert to(tmp_path / "gemm", "mlx", tmp_path / "out") == 1
    assert "layers.1.block_sparse_moe.switch_mlp.gate_proj: its experts" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_change_of_format_that_stops_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    source = quantised(tmp_path / "source", "awq-gemm", 128)
    with monkeypatch.context() as patch:
        patch.setattr("tinychat_mlx.weights.shards.write", stop)
        assert to(source, "mlx", tmp_path / "out") in (1, 130)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert to(source, "mlx", tmp_path / "out", "--resume") == 0


@pytest.mark.parametrize(
    "given",
    [["--w-bit", "3"], ["--method", "awq"], ["--group-size", "64"], ["--head", "int4"], ["--calib", "self"], ["--calib-tokens", "512"],
     ["--seed", "0"]],
    ids=lambda g: g[0],
)  # fmt: skip
def test_what_only_quantising_obeys_is_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = quantised(tmp_path / "source", "awq-gemm", 128)
    assert to(source, "mlx", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert f"leave out {given[0]}" in error and "int4 g128" in error and not (tmp_path / "out").exists()


def test_the_report_tells_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the defaults of options that a change of format ignores."""
    source, folder = quantised(tmp_path / "source", "awq-gemm", 64), tmp_path / "report"
    assert to(source, "mlx", tmp_path / "out", "--report", str(folder), "--json") == 0
    settings = {"format": "mlx", "w_bit": 4, "group_size": 64, "method": "codes kept"}
    assert json.loads(capsys.readouterr().out)["settings"] == settings
    found, text = json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()
    assert found["settings"] == settings and found["quality"] is None and 0 < found["moved_steps"] < 15 / 2048
    assert text.startswith("# source: 4 bits, groups of 64, codes kept\n") and "calibration" not in text
    assert "embedding and head 16 bits" in text and f"{found['moved_steps']:.4f} of a step" in text


@pytest.mark.parametrize("form", ["mlx", "awq"])
def test_a_dry_run_knows_the_size_and_writes_nothing(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = quantised(tmp_path / "source", "awq-gemm", 64)
    assert to(source, form, tmp_path / "out", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert to(source, form, tmp_path / "out") == 0
    assert found["result_bytes"] == found["disk_bytes"] == Checkpoint.open(tmp_path / "out").nbytes
    assert found["seconds"] > 0 and found["peak_bytes"] > 100e6


def test_a_head_keeps_its_bias(tiny_root: Path, tmp_path: Path) -> None:
    """Phi's has one; AutoAWQ stores the head in float16."""
    converted("phi", tiny_root, tmp_path / "mlx", method="rtn")
    assert to(tmp_path / "mlx", "awq", tmp_path / "awq") == 0
    ids = tiny("phi", tiny_root).ids
    one, two = logits(tmp_path / "mlx", ids), logits(tmp_path / "awq", ids)
    assert "lm_head.bias" in TensorFile(tmp_path / "awq" / "model.safetensors").names
    assert np.abs(one - two).max() < 2e-3 * np.abs(one).max()  # an 8-bit head, rounded to float16


@pytest.mark.parametrize("form", ["mlx", "awq"])
def test_one_module_is_in_memory_at_a_time(form: str, tmp_path: Path) -> None:
    """Of 24 modules with 2 MB of codes, less than a fifth is in memory."""
    rng, tensors = np.random.default_rng(0), []
    config = tiny_dense.CONFIG | {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 4,
                                  "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}  # fmt: skip
    layout = "awq-gemm" if form == "mlx" else "mlx"
    for layer in range(4):
        for name in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
            "mlp.down",
        ):
            module, shape = f"model.layers.{layer}.{name}_proj", (2048, 256)
            words = rng.integers(0, 2**32, shape, dtype=np.uint32)
            scales = np.full((2048, 16) if form == "awq" else (16, 2048), 0.0078125, np.float16)
            parts: dict[str, np.ndarray] = {"weight": words, "scales": scales, "biases": -8 * scales}
            if form == "mlx":
                parts = {
                    "qweight": words.view(np.int32),
                    "qzeros": words[:16].view(np.int32),
                    "scales": scales,
                }
            tensors += [entry(f"{module}.{end}", a) for end, a in parts.items()]
    tensors.append(entry("model.embed_tokens.weight", np.zeros((96, 2048), np.float16)))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config | layouts.config(layout, 128)))
    write(source / "model.safetensors", tensors)
    total = sum(t.nbytes for t in tensors)
    del tensors, words, scales, parts
    checkpoint = Checkpoint.open(source)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    write_sharded(tmp_path / "out", reformatted(checkpoint, form).tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total / 5, f"{peak / 1e6:.1f} MB of {total / 1e6:.1f}"


SPELT = ["llama-llama3", "llama-linear", "qwen2", "qwen2-yarn", "qwen3_moe", "smollm3", "granite", "phi3-longrope", "glm4",
         "stablelm", "cohere", "phi", "exaone", "ernie4_5", "olmo3"]  # fmt: skip


@pytest.mark.parametrize(  # mlx-lm reads no mixtures in AutoAWQ's format
    ("variant", "form"), [(v, f) for v in SPELT for f in ("mlx", "awq") if (v, f) != ("qwen3_moe", "awq")]
)
def test_mlx_lm_finds_the_settings_that_transformers_5_spells_anew(
    variant: str, form: str, tiny_root: Path, tmp_path: Path
) -> None:
    """mlx-lm reads rope_theta, rope_scaling, partial_rotary_factor, num_experts; without them, defaults."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    t = tiny(variant, tiny_root)
    raw = json.loads((t.folder / "config.json").read_text())
    assert "rope_theta" not in raw and "rope_scaling" not in raw or variant == "exaone"
    converted(variant, tiny_root, tmp_path / "out", method="rtn", format=form)
    model, _ = utils.load_model(tmp_path / "out")
    model.set_dtype(mx.float32)
    theirs, ours = np.array(model(mx.array([t.ids]))[0].astype(mx.float32)), logits(tmp_path / "out", t.ids)
    # The same codes, scales and biases; sums of at most 100 products in another order, through four layers.
    assert np.abs(theirs - ours).max() < 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize("variant", [*(v for v in SPELT if v != "exaone"), "gemma3", "gpt_neox", "mixtral"])
def test_the_older_spelling_changes_nothing_for_transformers_and_for_us(
    variant: str, tiny_root: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    converted(variant, tiny_root, tmp_path / "out", method="rtn")
    folders = tiny(variant, tiny_root).folder, tmp_path / "out"
    one, two = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in folders)
    for c in (one, two):
        c.get("rope_parameters", {}).pop("type", None)  # a second name of rope_type
    ours = {
        "dtype",
        "_name_or_path",
        "quantization",
        "quantization_config",
        "partial_rotary_factor",
        "rope_theta",
    }
    assert {k: one.get(k) for k in (one | two) if k not in ours} == {
        k: two.get(k) for k in (one | two) if k not in ours
    }
    a, b = (parse_config(json.loads((f / "config.json").read_text())) for f in folders)
    for x, y in zip(a.rope, b.rope, strict=True):
        assert x is y is None or np.array_equal(x.inv_freq, y.inv_freq) and x.factor == y.factor
