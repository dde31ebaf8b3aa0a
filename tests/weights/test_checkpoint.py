"""A model folder gives the weights that it declares, or a one-line error."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
from folders import UP, B, W, dense, dense_and, folder, quantised, refused, sharded

from tinychat_mlx.base.errors import FormatError, ModelNotFoundError, TinychatError
from tinychat_mlx.weights.checkpoint import INDEX, SINGLE, Checkpoint, Quantization, is_plain_name
from tinychat_mlx.weights.formats.mlx import to_bfloat16
from tinychat_mlx.weights.safetensors import entry, write
from tinychat_mlx.weights.weight import Dense, Packed

rng = np.random.default_rng(0)

# Valid folders


@pytest.mark.parametrize("whole", [True, False], ids=["one file", "shards"])
def test_a_dense_folder_gives_weights_vectors_and_names(whole: bool, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder(tmp_path) if whole else sharded(tmp_path))
    weight = checkpoint.weight(UP, (8, 128))
    assert isinstance(weight, Dense) and weight.bias is not None
    np.testing.assert_array_equal(weight.w, W)
    np.testing.assert_array_equal(weight.bias, B.astype(np.float32))
    assert checkpoint.weight("model.embed_tokens").bias is None
    assert checkpoint.vector("model.norm.weight").tolist() == [1] * 128
    modules = {"model.embed_tokens", UP, "model.norm"}
    assert checkpoint.names() == modules | {f"{m}.weight" for m in modules} | {f"{UP}.bias"}
    assert checkpoint.has(UP) and not checkpoint.has("lm_head") and checkpoint.has("model.norm.weight")
    assert checkpoint.quantization == Quantization("dense", 16, 0)
    assert checkpoint.nbytes == 2 * W.nbytes + B.nbytes + 4 * 128
    assert checkpoint.generation_config == {}


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_every_float_dtype_is_kept_and_widened_exactly(dtype: str, tmp_path: Path) -> None:
    wide = W.astype(np.float32)
    stored = {"F16": W, "BF16": to_bfloat16(wide), "F32": wide}[dtype]
    exact = (
        (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else stored.astype(np.float32)
    )
    tensors = [
        entry("a.weight", stored, dtype),
        entry("n.weight", stored[0], dtype),
        entry("a.bias", stored[:, 0], dtype),
    ]
    checkpoint = Checkpoint.open(folder(tmp_path, tensors=tensors))
    weight = checkpoint.weight("a")
    assert isinstance(weight, Dense) and weight.w.dtype == stored.dtype and weight.bias is not None
    np.testing.assert_array_equal(weight.to_float32(), exact)
    np.testing.assert_array_equal(weight.bias, exact[:, 0])
    np.testing.assert_array_equal(checkpoint.vector("n.weight"), exact[0])
    assert checkpoint.quantization.w_bit == (32 if dtype == "F32" else 16)


@pytest.mark.parametrize("layout", layouts.WRITERS)
def test_names_do_not_depend_on_the_layout(layout: str, tmp_path: Path) -> None:
    plain = Checkpoint.open(folder(tmp_path / "a", tensors=dense_and({"weight": W}))).names()
    checkpoint = Checkpoint.open(quantised(tmp_path / "b", layout))
    assert checkpoint.names() == plain and checkpoint.modules == {"model.layers.0.mlp.down_proj"}
    assert isinstance(checkpoint.weight(UP), Dense)
    assert checkpoint.quantization == Quantization(layout, 4, 64)


def test_arrays_outlive_the_checkpoint_and_the_files(tmp_path: Path) -> None:
    weight = Checkpoint.open(folder(tmp_path)).weight(UP)
    if sys.platform != "win32":
        (tmp_path / SINGLE).unlink()
    np.testing.assert_array_equal(weight.to_float32(), W)


def test_generation_config_is_read(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "top_p": 0.9}')
    assert Checkpoint.open(tmp_path).generation_config == {"eos_token_id": [1, 2], "top_p": 0.9}


def test_quantisation_may_stand_in_text_config_or_in_the_old_side_file(tmp_path: Path) -> None:
    nested = {"text_config": layouts.config("awq-gemm", 64)}
    quantised(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert Checkpoint.open(tmp_path).quantization.format == "awq-gemm"
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "is AWQ, config.json has no quantisation")
    side = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(side))
    assert Checkpoint.open(tmp_path).quantization == Quantization("awq-gemm", 4, 64)


def mlx_parts(n: int, k: int, bits: int, group: int) -> layouts.Tensors:
    words = rng.integers(0, 2**32, (n, k * bits // 32), dtype=np.uint32)
    return {
        "weight": words,
        "scales": np.ones((n, k // group), np.float16),
        "biases": np.zeros((n, k // group), np.float16),
    }


def test_mlx_bits_and_groups_come_from_the_entry_then_the_shape_then_the_default(tmp_path: Path) -> None:
    config = {
        "quantization": {"bits": 4, "group_size": 64, "head": {"bits": 8, "group_size": 32}, "gate": False}
    }
    tensors = []
    for name, form in {"head": (8, 32), "plain": (4, 64), "other": (8, 128), "twin": (8, 32)}.items():
        tensors += [entry(f"{name}.{s}", a) for s, a in mlx_parts(16, 256, *form).items()]
    tensors.append(entry("gate.weight", W))
    checkpoint = Checkpoint.open(folder(tmp_path, config, tensors))

    def form(name: str, shape: tuple[int, int] | None = None) -> tuple[int, int, tuple[int, int]]:
        weight = checkpoint.weight(name, shape)
        assert isinstance(weight, Packed)
        return weight.w_bit, weight.group_size, weight.shape

    assert form("head") == (8, 32, (16, 256)) and form("head", (16, 256)) == (8, 32, (16, 256))
    assert form("plain") == (4, 64, (16, 256))
    assert form("other", (16, 256)) == (8, 128, (16, 256))
    assert form("twin", (16, 256)) == (8, 32, (16, 256))  # by shapes only it could be (4, 64) with K = 512
    assert isinstance(checkpoint.weight("gate"), Dense)
    with pytest.raises(FormatError, match="head.scales"):
        checkpoint.weight("head", (16, 512))  # the entry declares another shape


# Errors


def test_a_missing_or_misshapen_weight_names_tensor_file_and_both_shapes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder(tmp_path))
    for call, message in [
        (lambda: checkpoint.weight("lm_head"), "'lm_head' has no 'weight' tensor"),
        (lambda: checkpoint.weight(UP, (8, 64)), f"{SINGLE}: '{UP}.weight' has [8, 128] weights, "),
        (lambda: checkpoint.weight(UP, (8, 64)), "config.json requires [8, 64]"),
        (lambda: checkpoint.weight("model.norm"), "'model.norm.weight' is F32 [128], not a matrix"),
        (lambda: checkpoint.vector(f"{UP}.weight"), "is F16 [8, 128], not a float vector"),
        (lambda: checkpoint.vector("x.weight"), "tensor 'x.weight' is missing"),
    ]:  # fmt: skip
        with pytest.raises(FormatError) as error:
            call()
        assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("layout", layouts.WRITERS)
def test_a_quantised_weight_of_another_shape_is_refused(layout: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(quantised(tmp_path, layout))
    for shape in [(64, 256), (128, 64), (32, 128)]:
        with pytest.raises(FormatError, match="down_proj"):
            checkpoint.weight("model.layers.0.mlp.down_proj", shape)


@pytest.mark.parametrize("layout", layouts.WRITERS)
def test_a_part_missing_or_of_another_size_or_dtype_is_refused(layout: str, tmp_path: Path) -> None:
    module = "model.layers.0.mlp.down_proj"
    good = layouts.WRITERS[layout](*layouts.sample(64, 128, 64))
    for suffix, array in good.items():
        for changed in (None, array[:-1], array.astype(np.int8), array[None]):
            tensors = {k: v for k, v in good.items() if k != suffix} | (
                {} if changed is None else {suffix: changed}
            )
            with pytest.raises(TinychatError):
                checkpoint = Checkpoint.open(folder(tmp_path, layouts.config(layout, 64), dense_and(tensors)))
                checkpoint.weight(module)


def test_no_folder_no_config_no_weights(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "no such folder", ModelNotFoundError)
    refused(tmp_path, "not a model folder: it has no config.json", ModelNotFoundError)
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, f"no {SINGLE} in it")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf", "weights.npz", "m.pt", "m.ckpt"]
)
def test_other_weight_files_are_named_and_never_opened(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    (tmp_path / "config.json").write_text(
        '{"auto_map": {"AutoModel": "evil.Model"}, "model_file": "evil.py"}'
    )
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, f"weights are in {name}; tinychat reads only safetensors")
    write(tmp_path / SINGLE, dense())
    Checkpoint.open(tmp_path)
    assert not canary.exists()


def test_an_interrupted_download_is_called_so(tmp_path: Path) -> None:
    shards = sorted(sharded(tmp_path).glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1])
    refused(tmp_path, f"the file has {len(whole) - 1} — download the file again")
    shards[1].unlink()
    refused(tmp_path, f"1 of 3 weight files are missing, the first is {shards[1].name}")
    shards[1].write_bytes(shards[0].read_bytes())
    refused(tmp_path, f"is missing, but {INDEX} lists it")
    shards[1].write_bytes(whole)
    assert Checkpoint.open(tmp_path).has(UP)
    (tmp_path / INDEX).unlink()
    refused(tmp_path, f"{shards[0].name} exists, but {INDEX} is missing")


NAMES = [
    "../model.safetensors", "/etc/passwd", "/tmp/x.safetensors", "~/x.safetensors", "~x.safetensors", "..",
    ".", "", "sub/x.safetensors", "sub\\x.safetensors", "C:\\x.safetensors", "C:x.safetensors",
    "\\\\host\\x.safetensors",
    "x\0.safetensors", "x.safetensors\0", ".x.safetensors", "x.bin", "x.safetensors/", "x.safetensors:stream",
    "con|x.safetensors", "file:///x.safetensors", "x.safetensors/../../y.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_only_files_of_its_folder(name: str, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    refused(tmp_path, "which is not a file of this folder")


BAD_MAPS = ["[]", "{}", '{"a": 1}', '{"a": null}', '{"a": ["b"]}', '"a"', "null", "1"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map":', *(f'{{"weight_map": {m}}}' for m in BAD_MAPS)]
)
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX)


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    write(sharded(tmp_path) / SINGLE, dense())
    refused(tmp_path, "are from different models")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_are_followed_within_the_folder_and_the_hub_cache_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    write(outside, dense())
    home = folder(tmp_path / "home")
    (home / SINGLE).unlink()
    (home / SINGLE).symlink_to(outside)
    refused(home, "a link to a file outside")
    os.replace(outside, home / "real")
    (home / SINGLE).unlink()
    (home / SINGLE).symlink_to("real")
    assert Checkpoint.open(home).has(UP)
    (tmp_path / "linked").symlink_to(home)
    assert Checkpoint.open(tmp_path / "linked").has(UP)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, blob in {"config.json": "1", SINGLE: "2"}.items():
        os.replace(home / ("real" if name == SINGLE else name), blobs / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert Checkpoint.open(snapshot).has(UP)


BAD_JSON = {
    "": "line 1, column 1",
    "nul": "line 1, column 1",
    '{"a": 1,}': "line 1, column",
    "[]": "contains a list, not a JSON object",
    "null": "contains a NoneType",
    '{"a": ' + "[" * 10**5: "not JSON",
    '{"a": ' + "9" * 10**4 + "}": "not JSON",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: repr(text[:12]))
def test_a_damaged_config_is_one_line(text: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, BAD_JSON[text])


def test_a_config_that_is_no_file_or_not_utf8_or_huge_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path) / "config.json"
    path.write_bytes(b'{"a": "\xff"}')
    refused(tmp_path, "not JSON")
    os.truncate(path, 65 << 20)
    refused(tmp_path, "larger than 64 MiB")
    path.unlink()
    path.mkdir()
    refused(tmp_path, "not a")
    if hasattr(os, "mkfifo"):
        path.rmdir()
        os.mkfifo(path)
        refused(tmp_path, "not a regular file")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_large_model_keeps_its_pages_out_of_memory(tmp_path: Path) -> None:
    """256 MiB are read in tensors of 16 MiB: little more than the current one is resident."""
    size = 16 << 20
    header = {
        f"l{i}.weight": {"dtype": "F16", "shape": [4096, 2048], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(16)
    }
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / SINGLE, 8 + len(text) + 16 * size)  # a sparse file: zeros that use no disk
    (tmp_path / "config.json").write_text("{}")
    code = """
        import sys
        from pathlib import Path
        from tinychat_mlx.weights.checkpoint import Checkpoint
        checkpoint = Checkpoint.open(sys.argv[1])
        peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
        before = peak()
        for i in range(16):
            assert not checkpoint.weight(f"l{i}").w.any()
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, check=True
    )
    assert int(done.stdout) < 40  # MiB: a view is dropped after the next one is made
