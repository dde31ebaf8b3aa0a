"""A whole model with our kernels gives the same logits, with fewer dispatches per token than mlx-lm."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from emulators import absent
from metal import dispatches
from metal.emulator import CXX
from metal.in_graph import emulated_metal
from tiny_models import VARIANTS, tiny

from tinychat_mlx.backends.mlx import cost
from tinychat_mlx.backends.mlx.backend import MlxBackend, traced
from tinychat_mlx.backends.mlx.split_int8 import SplitHandle, key_of, suits
from tinychat_mlx.backends.mlx.weights import PackedHandle
from tinychat_mlx.backends.reference import ReferenceBackend
from tinychat_mlx.contract import Choice, Step
from tinychat_mlx.model.config import parse_config
from tinychat_mlx.model.decoder import Decoder
from tinychat_mlx.weights.checkpoint import Checkpoint
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight, pack_codes


@pytest.fixture
def _emulator() -> None:
    if CXX is None:
        absent("no g++ or clang++ with _Float16, or a Mac")


emulator = pytest.mark.usefixtures("_emulator")


class Quantised:
    """A checkpoint's matrices as int4 g32, identical for every backend."""

    def __init__(self, folder: Path) -> None:
        self.inner = Checkpoint.open(folder)
        self.has, self.vector = self.inner.has, self.inner.vector

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        dense = self.inner.weight(module, shape)
        g = dense.to_float32().reshape(dense.shape[0], -1, 32)
        low = g.min(-1).astype(np.float16)
        scales = ((g.max(-1) - g.min(-1)) / 15).astype(np.float16)
        q = np.rint((g - low[..., None].astype(np.float32)) / scales[..., None]).clip(0, 15).astype(np.uint8)
        return Packed(module, pack_codes(q.reshape(dense.shape), 4), scales, low, 4, 32, dense.bias)


def logits(folder: Path, backend: Any, cuts: list[int], ids: list[int]) -> F32:
    d = Decoder(parse_config(Checkpoint.open(folder).config), Quantised(folder), backend)
    cache, at, out = d.new_cache(len(ids)), 0, []
    for n in cuts:
        out.append(backend.to_host(d.forward(ids[at : at + n], cache, last_only=False)))
        at += n
    return np.concatenate(out)


@emulator
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2"])
def test_logits_with_emulated_kernels_equal_the_reference(variant: str, tiny_root: Path) -> None:
    """float32: 1e-4, like the stock operations. Nine rows are prefill; then one row, three rows, one row."""
    t, cuts = tiny(variant, tiny_root), [9, 1, 3, 1]
    expected = logits(t.folder, ReferenceBackend(), cuts, t.ids[:14])
    results = []
    for order in (0, 3):
        with emulated_metal(order) as calls:
            results.append(logits(t.folder, MlxBackend(exact=True, kernels="all"), cuts, t.ids[:14]))
        assert np.abs(results[-1] - expected).max() <= 1e-4 * np.abs(expected).max()
        layers = VARIANTS[variant][1].get("num_hidden_layers", 4)
        # qkv, o, gate_up, down of each layer, and the head, in each of three steps
        assert sum(calls.values()) == 3 * (4 * layers + 1)
    assert (results[0] == results[1]).all(), "the order of lanes must not matter"


@emulator
def test_float16_with_emulated_kernels_agrees_with_stock(tiny_root: Path, monkeypatch: Any) -> None:
    """Both are compared with the reference in float32.

    A rounding to half has an error of at most 2^-11 of its number, u / sqrt(3) of it in the mean, with random
    sign. Ours keeps float32 inside a product and rounds 8 results per layer (normed input, qkv, rotated q and
    k, the heads' sums, o, gated, down) and those of embedding and head. If each reached the logits
    undiminished, their relative errors would add up to sqrt(roundings / 3) * u in the mean. MLX's CPU loop
    also sums in half: a sum of K terms has K partial sums whose mean square is half its own at the end,
    sqrt(K / 6) * u more per product. On Metal it sums in float like ours. None of the 582 logits should have
    an error of 4.5 times the mean (one in 250 such tests would).
    """
    t, cuts = tiny("llama", tiny_root), [4, 1, 1]
    exact = logits(t.folder, ReferenceBackend(), cuts, t.ids[:6])
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    stock = logits(t.folder, MlxBackend(exact=True), cuts, t.ids[:6])
    with emulated_metal() as calls:
        ours = logits(t.folder, MlxBackend(exact=True, kernels="all"), cuts, t.ids[:6])
    assert sum(calls.values()) == 3 * 17
    c = parse_config(Checkpoint.open(t.folder).config)
    layers, u = c.num_hidden_layers, 2.0**-11 * np.sqrt((exact**2).mean())
    rounded = (8 * layers + 2) / 3
    terms = (
        layers * (2 * c.hidden_size + c.num_attention_heads * c.head_dim + c.intermediate_size)
        + c.hidden_size
    )
    assert np.abs(ours - exact).max() <= 4.5 * rounded**0.5 * u
    assert np.abs(ours - stock).max() <= 4.5 * (2 * rounded + terms / 6) ** 0.5 * u
    assert np.abs(ours - exact).max() <= np.abs(stock - exact).max(), (
        "float sums are not worse than half ones"
    )


# dispatches -------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131072, "rope_theta": 5e5,
    "tie_word_embeddings": True,
}  # fmt: skip


class Shapes:
    """A source with the shapes of all weights and no values."""

    def has(self, name: str) -> bool:
        return "lm_head" not in name and "bias" not in name

    def vector(self, name: str) -> F32:
        return np.ones(2048, np.float32)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        assert shape is not None
        return Dense(module, np.broadcast_to(np.float16(0), shape))


class Lazy(MlxBackend):
    """A backend whose weights are never evaluated, so that a model of a billion parameters takes no memory."""

    head_bits = 4

    def pack(self, weight: Weight) -> PackedHandle | SplitHandle:
        n, k = weight.shape
        bits = self.head_bits if "embed" in weight.name else 4
        halves = [dispatches.placeholder((n, k // 8), mx.uint32) for _ in range(2)]
        scales, biases = (dispatches.placeholder((n, k // 128), self.dtype) for _ in range(2))
        w = halves[0] if bits == 4 else dispatches.placeholder((n, k // 4), mx.uint32)
        packed = PackedHandle(weight.name, (n, k), w, scales, biases, bits, 128, None)
        suit = self.kernels is not None and suits((n, k), bits, False)
        if not suit or not self.kernels.takes(key_of((n, k), 128, self.dtype)):
            return packed

        def join(upper: Any, lower: Any) -> Any:  # on Metal it is compiled
            return dispatches.opaque("joined")(upper, lower, dtype=mx.uint32)

        return SplitHandle(weight.name, (n, k), *halves, scales, biases, 128, join)


def llama_step(monkeypatch: pytest.MonkeyPatch, kernels: str, head_bits: int = 4) -> tuple[Lazy, Any, Any]:
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    monkeypatch.setattr("tinychat_mlx.model.decoder.join", joined)
    backend = Lazy(kernels=kernels)
    backend.head_bits = head_bits
    monkeypatch.setattr(backend._flight, "attending", lambda *a: None)  # a trace cannot issue a half
    d = Decoder(parse_config(LLAMA), Shapes(), backend)
    return backend, d, d.new_cache(512)


def joined(name: str, parts: list[Weight]) -> Weight:
    """Join shapes. weight.join would materialise the zeros."""
    shape = (sum(p.shape[0] for p in parts), parts[0].shape[1])
    return Dense(name, np.broadcast_to(np.float16(0), shape))


def ours(monkeypatch: pytest.MonkeyPatch, kernels: str, head_bits: int = 4) -> dict[str, int]:
    backend, d, cache = llama_step(monkeypatch, kernels, head_bits)
    backend._fused["silu glu"] = dispatches.opaque("swiglu")  # on Metal these are compiled
    backend._fused["+ 1.0"] = dispatches.opaque("add")
    cache.length = 3
    with dispatches.opaque_fast_operations():

        def step(ids: Any) -> Any:
            return d.advance(ids, cache, Choice(0.7, 0.025))

        return dispatches.count(step, mx.array([5], mx.int32))


def captured(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    _, d, cache = llama_step(monkeypatch, "all")

    def fn(ids: Any, step: Step) -> Any:
        return d._logits(d._hidden(ids, step))

    program: Callable[..., Any] = traced(fn, 512, False)
    with dispatches.opaque_fast_operations():
        return dispatches.count(
            lambda ids, at, *kv: program(ids, at, None, list(kv[:16]), list(kv[16:]))[0],
            mx.array([5], mx.int32), mx.array([3], mx.int32), *cache.parts["k"], *cache.parts["v"],
        )  # fmt: skip


def mlx_lm_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx import nn
    from mlx.utils import tree_map
    from mlx_lm.models import llama
    from mlx_lm.models.cache import make_prompt_cache

    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=64, bits=4)
    model.update(tree_map(lambda a: dispatches.placeholder(a.shape, a.dtype), model.parameters()))
    cache = make_prompt_cache(model)
    for c in cache:
        c.keys, c.values = (mx.zeros((1, 8, 256, 64), mx.float16) for _ in range(2))
        mx.eval(c.keys, c.values)
        c.offset = 3
    monkeypatch.setattr(
        llama, "swiglu", dispatches.opaque("swiglu")
    )  # it is compiled into one kernel, which cannot be exported
    with dispatches.opaque_fast_operations():
        return dispatches.count(lambda ids: model(ids, cache=cache), mx.array([[5]], mx.int32))


def test_a_token_needs_at_most_sixty_per_cent_of_mlx_lm_s_dispatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from MLX's trace; the roofline formula must agree. The default head has 8 bits."""
    shape = cost.Shape.of(LLAMA)
    assert shape == cost.SHAPES["llama-3.2-1b"]
    theirs, fused = mlx_lm_step(monkeypatch), ours(monkeypatch, "all")
    default = ours(monkeypatch, "all", head_bits=8)
    stock = replace(cost.OURS[4], fused=False)
    assert sum(theirs.values()) == cost.launches_per_token(shape, cost.MLX_LM)
    assert sum(fused.values()) == cost.launches_per_token(shape, cost.OURS[4])
    assert sum(ours(monkeypatch, "off").values()) == cost.launches_per_token(shape, stock)
    assert sum(default.values()) == cost.launches_per_token(shape, cost.OURS[8])
    assert sum(fused.values()) < sum(default.values()) <= 0.6 * sum(theirs.values())
    assert sum(count for name, count in default.items() if re.search("head_[123]_", name)) == 3
    # A captured step writes its cache at a traced position, two launches each time, so it is not the default
    assert sum(fused.values()) < sum(captured(monkeypatch).values()) < sum(theirs.values())


@pytest.mark.parametrize("name", cost.SHAPES)
def test_a_token_reads_fewer_bytes_than_with_mlx_lm(name: str) -> None:
    """At equal bits of head and body, groups of 128 against mlx-lm's 64; and our default against theirs."""
    shape = cost.SHAPES[name]
    for (
        bits
        # mlx_lm.convert's default, 4 bits for every weight, compared with ours, which has 8 in the head
    ) in cost.OURS:
        assert cost.bytes_per_token(shape, cost.OURS[bits]) < cost.bytes_per_token(shape, cost.MLX_LM)
    rows = {row["chip"]: row for row in cost.table(shape, 2048)}
    assert len(rows) >= 10 and all(r[cost.OURS[4].name] < r["ceiling"] for r in rows.values())
    for bits in (4, 8):  # comparable forms, as in the table
        ours, theirs = cost.OURS[bits], cost.MLX_LMS[bits]
        assert cost.bytes_per_token(shape, ours) < cost.bytes_per_token(shape, theirs)
        assert all(r[ours.name] > r[theirs.name] for r in rows.values())
    megabytes, launches = cost.reads(shape)
    assert megabytes.keys() == launches.keys() == rows["M1"].keys()
    assert megabytes[cost.OURS[8].name] == round(cost.bytes_per_token(shape, cost.OURS[8]) / 1e6, 1)


def test_the_documented_table_is_computed() -> None:
    page = ROOT / "docs" / "devices.md"
    if not page.exists():
        pytest.skip("the documents are in the checkout only")
    lines = page.read_text(encoding="utf-8").splitlines()
    for name, shape in cost.SHAPES.items():
        forms = cost.OURS[8], cost.MLX_LM
        columns = [
            [cost.bytes_per_token(shape, f) / 1e6 for f in forms],
            [cost.launches_per_token(shape, f) for f in forms],
        ]
        for chip in ("M1", "M4 Max"):
            columns.append([1 / cost.seconds_per_token(shape, f, cost.CHIPS[chip][0]) for f in forms])
        assert f"| {name} | " + " | ".join(f"{a:.0f} / {b:.0f}" for a, b in columns) + " |" in lines


def test_bytes_are_those_of_the_packed_arrays() -> None:
    shape = cost.Shape(64, 128, 2, 4, 2, 16, 96)
    rng = np.random.default_rng(0)
    held = 0
    for n, k in [*shape.linears * 2, (96, 64)]:
        q = rng.integers(0, 16, (n, k), dtype=np.uint8)
        held += Packed("w", pack_codes(q, 4), *np.zeros((2, n, k // 64), np.float16), 4, 64).nbytes
    form = cost.Form("g64", 4, 64, 4)
    assert cost.bytes_per_token(shape, form) == held
    assert cost.bytes_per_token(shape, form, 10) == held + 10 * 2 * 2 * 2 * 16 * 2
    with_head = cost.bytes_per_token(shape, replace(form, head_bit=8))
    assert with_head == held + 96 * 64 // 2
    halves = cost.bytes_per_token(shape, replace(form, head_bit=8, shortlist=0.5))
    upper, scales, between = (
        96 * 64 // 2,
        96 * 1 * 4,
        96 * 15,
    )  # half of the lower ones, with a scale per group and no bias
    assert halves == held - 96 * (64 // 2 + 4) + upper + scales + (upper + scales // 2) // 2 + between
    assert "M1 Max" in cost.report("qwen3-0.6b", 100)
