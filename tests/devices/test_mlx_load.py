"""Weights are copied at most once from the mapped file to device memory, and not at all if Metal shares it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from mlx_models import quantised
from tiny_models import tiny

import tinychat_mlx
from tinychat_mlx.backends.mlx import transfer
from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.experts import Experts, pack_experts
from tinychat_mlx.backends.mlx.weights import pack
from tinychat_mlx.contract import Mlp
from tinychat_mlx.weights.formats.mlx import mlx_entries
from tinychat_mlx.weights.safetensors import TensorFile, entry, write
from tinychat_mlx.weights.weight import Array, Joined, Packed, Weight, join, to_float32

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """mx.compile on a CPU starts a C++ compiler for each fused kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def mapped(tmp_path: Path) -> TensorFile:
    """Tensors that start at no page: adjacent f16, u32 of odd sizes, bfloat16 bits."""
    made = [
        entry(f"u{i}", RNG.integers(0, 1 << 32, (n, 40), dtype=np.uint32)) for i, n in enumerate((3, 1700, 5))
    ]
    made += [
        entry(f"f{i}", RNG.standard_normal((n, 24)).astype(np.float16)) for i, n in enumerate((7, 900, 2))
    ]
    made.append(entry("b", RNG.integers(0, 1 << 14, (9, 24), dtype=np.uint16), "BF16"))
    write(tmp_path / "t.safetensors", made)
    return TensorFile(tmp_path / "t.safetensors")


def numbers(x: Any) -> Array:
    return np.array(x if x.dtype != mx.bfloat16 else x.astype(mx.float32))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "names", ["u0", "u1", "u0 u1 u2", "u2 u0", "f1", "f0 f1", "f1 f0", "b", "b f0"], ids=str.split
)
def test_every_way_brings_the_same_numbers(mapped: TensorFile, names: str, share: bool) -> None:
    arrays = [mapped.read(name) for name in names.split()]
    whole = np.concatenate([a if a.dtype == np.uint32 else to_float32(a) for a in arrays])
    wanted = (mx.uint32,) if whole.dtype == np.uint32 else (mx.float16, mx.bfloat16, mx.float32)
    for dtype in wanted:
        got = transfer.stacked(arrays, dtype, share)
        assert got.dtype == dtype and got.shape == whole.shape
        # one rounding to dtype, of numbers below 2^14 that overflow neither float16 nor bfloat16
        assert (numbers(got) == numbers(mx.array(whole).astype(dtype))).all()


@pytest.mark.parametrize("names, one", [("u1", True), ("u0 u1 u2", True), ("u2 u0", False), ("f0 f1", True)])
def test_what_is_shared_is_the_whole_pages_of_the_file(
    mapped: TensorFile, names: str, one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adjacent arrays are shared as one array. Metal needs memory that starts and ends at a page."""
    given: list[Array] = []
    adopt = mx.asarray
    monkeypatch.setattr(mx, "asarray", lambda a: given.append(a) or adopt(a))
    arrays = [mapped.read(name) for name in names.split()]
    dtype = mx.uint32 if "u" in names else mx.float16
    transfer.stacked(arrays, dtype, share=True)
    assert len(given) == one
    for pages in given:
        begin, end = transfer.address(pages), transfer.address(pages) + pages.nbytes
        assert begin % transfer.PAGE == 0 and end % transfer.PAGE == 0 and not pages.flags.writeable
        first, last = transfer.address(arrays[0]), transfer.address(arrays[-1]) + arrays[-1].nbytes
        assert begin <= first < begin + transfer.PAGE and end - transfer.PAGE < last <= end
    transfer.stacked(arrays, dtype, share=False)
    transfer.stacked([a.copy() for a in arrays], dtype, share=True)  # writable memory could change
    assert len(given) == one


@pytest.mark.parametrize("dtype, at", [("uint32", 2), ("uint32", 1), ("float16", 1), ("uint32", 4)])
def test_a_tensor_at_an_odd_address_is_copied(dtype: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another program need not align its tensors; a kernel cannot read a word across two."""
    adopted: list[Array] = []
    adopt = mx.asarray
    monkeypatch.setattr(mx, "asarray", lambda a: adopted.append(a) or adopt(a))
    held = np.frombuffer(bytes(range(256)) * 4, np.uint8)
    array = held[at : at + 960].view(dtype).reshape(8, -1)
    got = transfer.stacked([array], getattr(mx, dtype), share=True)
    assert np.array(got).tobytes() == held[at : at + 960].tobytes()
    assert len(adopted) == (at % array.itemsize == 0)


def test_the_pages_keep_the_map_alive(mapped: TensorFile) -> None:
    array = mapped.read("u1")
    alive = weakref.ref(array)
    held = np.asarray(transfer.Pages([array]))
    del array
    assert alive() is not None
    del held
    assert alive() is None


@pytest.mark.skipif(not mx.metal.is_available(), reason="only Metal can share host memory")
def test_metal_reads_the_file_itself(mapped: TensorFile) -> None:
    """The device sees later writes to the file, because there is no copy."""
    array = mapped.read("u1")
    got = transfer.stacked([array], mx.uint32, share=True)
    with open(mapped.path, "r+b") as file:
        file.seek(mapped._span("u1").begin)
        file.write((int(array[0, 0]) ^ 1).to_bytes(4, "little"))
    assert int(got[0, 0].item()) == int(array[0, 0])


@pytest.mark.parametrize("share", [False, True])
def test_joined_weights_and_experts_are_stacked_on_the_device(share: bool) -> None:
    parts = [quantised(RNG.standard_normal((n, 128)).astype(np.float32), 4, 64) for n in (8, 4, 12)]
    whole = join("qkv", list(parts))
    assert isinstance(whole, Joined)
    packed = pack(whole, mx.float32, share)
    assert "qweight" not in vars(whole), "the joined weight was made in host memory"
    assert (numbers(packed.rows(mx.arange(24))) == whole.to_float32()).all() and packed.shape == (24, 128)

    def pair(f: int, bits: int = 4) -> tuple[Packed, Packed]:
        up = [quantised(RNG.standard_normal((f, 128)).astype(np.float32), bits, 32, "e") for _ in range(2)]
        gate_up = join("e", list(up))
        assert isinstance(gate_up, Packed)
        return gate_up, quantised(RNG.standard_normal((128, f)).astype(np.float32), bits, 32)

    same = [pair(64) for _ in range(3)]
    made = pack_experts([*same, pair(96)], "silu", mx.float32, share)
    assert isinstance(made, Experts) and made.shared is not None and made.up.arrays[0].shape == (3, 128, 16)
    for e, weights in enumerate(same):
        for side, w in zip((made.up, made.down), weights, strict=True):
            got = mx.dequantize(*(a[e] for a in side.arrays), group_size=32, bits=4)
            assert (numbers(got) == w.to_float32()).all()
    mixed = pack_experts([same[0], pair(64, bits=8)], "silu", mx.float32, share)
    assert isinstance(mixed, tuple) and all(isinstance(m, Mlp) for m in mixed)


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_a_model_that_is_shared_means_the_same(variant: str, tiny_root: Path, monkeypatch: Any) -> None:
    """As on a Mac, except that MLX copies the pages here; unquantised float32 also needs no conversion."""
    t = tiny(variant, tiny_root)
    ways: list[str] = []
    for name in ("shared", "filled"):
        way = getattr(transfer, name)
        monkeypatch.setattr(transfer, name, lambda *a, n=name, w=way: ways.append(n) or w(*a))
    stacked = transfer.stacked
    plain = tinychat_mlx.load(t.folder, backend="mlx", exact=True).logits(t.ids)
    assert "shared" not in ways or mx.metal.is_available()
    monkeypatch.setattr(
        "tinychat_mlx.backends.mlx.weights.stacked", lambda a, dtype, share: stacked(a, dtype, True)
    )
    got = tinychat_mlx.load(t.folder, backend="mlx", exact=True).logits(t.ids)
    assert "shared" in ways and (got == plain).all()


# a folder of some 200 MB -----------------------------------------------------------------------------------
C, F, V, LAYERS, KV = 1024, 4096, 32000, 20, 256
CONFIG = {
    "model_type": "llama", "vocab_size": V, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": LAYERS,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rope_theta": 1e4, "tie_word_embeddings": False,
    "quantization": {"bits": 4, "group_size": 128},
}  # fmt: skip
MEASURE = """
import sys, tinychat_mlx
from tinychat_mlx.backends.mlx.backend import MlxBackend
import tinychat_mlx.weights.checkpoint

def kib(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

MlxBackend()
before = kib("VmRSS")
model = tinychat_mlx.load(sys.argv[1], backend="mlx", context=2)
print((kib("VmHWM") - before) * 1024, model.memory().used)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Return a folder in MLX's layout as `tinychat convert` writes it, and the bytes of its packed weights."""
    path = tmp_path_factory.mktemp("load") / "model"
    path.mkdir()
    sizes = {"self_attn.q_proj": (C, C), "self_attn.k_proj": (KV, C), "self_attn.v_proj": (KV, C),
             "self_attn.o_proj": (C, C), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}  # fmt: skip
    names = {"model.embed_tokens": (V, C), "lm_head": (V, C)}
    names |= {f"model.layers.{i}.{name}": size for i in range(LAYERS) for name, size in sizes.items()}
    tensors, held = [], 0
    for name, (n, k) in names.items():
        words = np.frombuffer(RNG.bytes(n * k // 2), np.uint32).reshape(n, k // 8)
        side = np.full((n, k // 128), 0.01, np.float16)
        weight = Packed(name, words, side, side, 4, 128)
        tensors += mlx_entries(weight)
        held += weight.nbytes
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(LAYERS) for n in ("input", "post_attention")]
    tensors += [entry(f"{name}.weight", np.ones(C, np.float16)) for name in ("model.norm", *norms)]
    write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path, held


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is only available on Linux")
def test_the_peak_of_loading_is_the_packed_weights_and_one_weight(large: tuple[Path, int]) -> None:
    """In float16, the dtype of a Mac, which widens nothing.

    Measured relative to the program's peak without a model.
    """
    folder, packed = large
    assert 190e6 < packed < 210e6
    env = {**os.environ, "TINYCHAT_MLX_DTYPE": "float16"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], env=env, capture_output=True, text=True, check=True
    )
    peak, used = (int(n) for n in done.stdout.split())
    largest = V * C * 17 // 32  # 4.25 bits of the head, whose pages are in memory while it is copied
    slack = 6 << 20  # temporary allocations of Python and MLX
    assert packed <= used < 1.01 * packed
    assert 0.95 * packed < peak < min(1.15 * packed, packed + largest + slack), (
        f"{peak / packed:.3f} x packed"
    )


def test_no_weight_is_copied_in_host_memory_first(large: tuple[Path, int], monkeypatch: Any) -> None:
    """NumPy allocates nothing of a weight's size: the only copy is the one to device memory."""
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    joined: list[int] = []
    concatenate = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda *a, **k: joined.append(1) or concatenate(*a, **k))
    peaks: list[int] = []
    pack_one = MlxBackend.pack

    def watched(self: MlxBackend, weight: Weight) -> Any:
        """Record the peak since the previous weight: reading, joining and packing of this one."""
        handle = pack_one(self, weight)
        now, peak = tracemalloc.get_traced_memory()
        peaks.append(peak - now)
        tracemalloc.reset_peak()
        return handle

    monkeypatch.setattr(MlxBackend, "pack", watched)
    tracemalloc.start()
    try:
        tinychat_mlx.load(large[0], backend="mlx", context=2)
    finally:
        tracemalloc.stop()
    assert len(peaks) == 2 + 4 * LAYERS and not joined
    smallest = KV * C // 2  # k's codes, in bytes; the first also opened the folder
    assert max(peaks[1:]) < smallest // 2, f"{max(peaks[1:]) >> 10} KiB"
