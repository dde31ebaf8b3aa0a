"""Our Metal kernels in the emulator: each form against float64, in both lane orders, at guard pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from emulators import absent
from metal import address_spaces
from metal.emulator import (
    BEGIN,
    COMPILERS,
    CXX,
    END,
    ODD,
    buffers_of,
    build,
    floats,
    guarded,
    host,
    run,
    traced,
    unwritten,
)
from virtual_gpu import SLACK

from tinychat_mlx.backends.mlx import fused, kernel_selection
from tinychat_mlx.backends.mlx.fused import Kernels, stock
from tinychat_mlx.backends.mlx.weights import PackedHandle, pack
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Norm
from tinychat_mlx.weights.weight import Packed, pack_codes

METAL = mx.metal.is_available()


@pytest.fixture
def _emulator() -> None:
    if CXX is None:
        absent("no g++ or clang++ with _Float16, or a Mac")


emulator = pytest.mark.usefixtures("_emulator")

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}  # half a unit of the last place
ROWS = (2, 3, 4, 5, 6, 7, 8, 2, 8)


@dataclass(frozen=True)
class Case:
    """One product. n: outputs. act: W has twice as many rows, gate first."""

    dtype: str
    group: int
    n: int
    k: int
    bits: int = 4
    rows: int = 1
    norm: bool = False
    act: str | None = None
    bias: bool = False
    residual: bool = False
    wide: bool = False  # x and the residual are float32

    def __str__(self) -> str:
        on = [w for w in ("norm", "bias", "residual", "wide") if getattr(self, w)] + (
            [self.act] if self.act else []
        )
        return f"{self.dtype}-int{self.bits}g{self.group}-{self.rows}x{self.n}x{self.k}-{'-'.join(on)}"


def cases(kind: str) -> list[Case]:
    """Every dtype and group; one group, K just above a block, ragged N, K of small models (896, 1152)."""
    out = []
    for i, (dtype, group) in enumerate((d, g) for d in DTYPES for g in (32, 64, 128)):
        for j, (n, k) in enumerate([(13, group), (8, 896), (37, 512), (18, 512 + group), (9, 1152)]):
            form: dict[str, Any] = {"bias": i % 3 == 0, "residual": i % 2 == 0}
            if kind == "norm":
                form |= {"norm": True, "residual": False}
            if kind == "gate_up":
                form = {"norm": i % 2 == 1, "act": fused.ACTS[i % 4], "bias": i % 3 == 0}
            if kind == "rows":
                form |= {"rows": ROWS[i], "norm": i % 3 == 1, "act": "silu" if i in (2, 4) else None}
                form["residual"] &= form["act"] is None
            wide = i % 2 == 1 or j == 1
            out.append(Case(dtype, group, n, k, bits=8 if j == 3 else 4, wide=wide, **form))
    return out


@dataclass(frozen=True)
class Operands:
    """A case's arrays on MLX, and the call of the kernel with them."""

    x: Any
    w: PackedHandle
    norm: Norm | None
    residual: Any

    def buffers(self, text: str) -> list[Any]:
        named = {"x": self.x, "w": self.w.w, "scales": self.w.scales, "biases": self.w.biases}
        if self.norm is not None:
            named |= {"norm_weight": self.norm.weight, "eps": mx.array(self.norm.eps)}
        named |= {"bias": self.w.bias, "residual": self.residual}
        given = {name: host(a) for name, a in named.items() if a is not None}
        return buffers_of(list(given), list(given.values()), text)


def operands(c: Case) -> Operands:
    rng = np.random.default_rng(c.n * c.k + c.rows)
    streams, groups = c.n * (2 if c.act else 1), c.k // c.group
    codes = rng.integers(0, 2**c.bits, (streams, c.k), dtype=np.uint8)
    scales = (rng.random((streams, groups)) + 0.5) * 2.0 / 2**c.bits * c.k**-0.5
    biases = -scales * rng.integers(0, 2**c.bits, scales.shape)
    bias = rng.standard_normal(streams).astype(np.float32) if c.bias else None
    f32 = (np.float32(a) for a in (scales, biases))
    w = pack(Packed("w", pack_codes(codes, c.bits), *f32, c.bits, c.group, bias), DTYPES[c.dtype])
    assert isinstance(w, PackedHandle)

    def floats_of(*shape: int) -> Any:
        dtype = mx.float32 if c.wide else DTYPES[c.dtype]
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    weight = mx.array(1 + 0.3 * rng.standard_normal(c.k).astype(np.float32))
    norm = Norm("n", "rms", weight, None, 1e-3) if c.norm else None
    return Operands(floats_of(c.rows, c.k), w, norm, floats_of(c.rows, c.n) if c.residual else None)


def launch(c: Case) -> tuple[Any, Operands]:
    """Return (MLX's trace of the kernel for this case, its operands)."""
    o, kernels = operands(c), Kernels(lambda key: True)
    (found,) = traced(lambda x: kernels.launch(x, o.w, o.norm, c.act, o.residual), o.x)
    return found, o


@cache
def compiled(kind: str) -> dict[str, Any]:
    """Compile every source that the cases of a kind need, with one start of the compiler."""
    texts = list(dict.fromkeys(launch(c)[0].text for c in cases(kind)))
    return dict(zip(texts, build(texts), strict=True))


ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def meaning(c: Case, o: Operands) -> tuple[Any, Any]:
    """Return (the result in float64, the error bound of float32 sums and one rounding to T)."""
    x, s, b = (floats(host(a)) for a in (o.x, o.w.scales, o.w.biases))
    shape = (s.shape[0], s.shape[1], c.group)
    codes = Packed("w", host(o.w.w), s, b, c.bits, c.group).codes().astype(np.float64).reshape(shape)
    dense = (codes * s[..., None] + b[..., None]).reshape(-1, c.k)
    parts = (codes * np.abs(s)[..., None] + np.abs(b)[..., None]).reshape(-1, c.k)  # summed separately
    if o.norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + o.norm.eps) * floats(host(o.norm.weight))
    y, magnitude = x @ dense.T, np.abs(x) @ parts.T
    if c.bias:
        y = y + floats(host(o.w.bias))
        magnitude = magnitude + np.abs(floats(host(o.w.bias)))
    error = c.k * 2.0**-23 * magnitude
    if c.act is not None:
        gate, up, f = y[:, : c.n], y[:, c.n :], ACTS[c.act]
        slope = np.maximum(1.2, 2 * np.abs(gate)) if c.act == "relu2" else 1.2  # the steepest of |act'|
        error = slope * error[:, : c.n] * np.abs(up) + np.abs(f(gate)) * error[:, c.n :] + 1e-6
        y = f(gate) * up
    if o.residual is not None:
        y = y + floats(host(o.residual))
    out = "float32" if c.wide and c.residual else c.dtype
    return y, error + 1.01 * UNIT[out] * np.abs(y) + 1e-7


@pytest.mark.parametrize("kind, case", [(k, c) for k in fused.KINDS for c in cases(k)], ids=str)
def test_a_kernel_means_the_product(kind: str, case: Case) -> None:
    found, o = launch(case)
    y64, bound = meaning(case, o)
    if METAL:
        y = floats(host(Kernels(lambda key: True).launch(o.x, o.w, o.norm, case.act, o.residual)))
        # exp and tanh of a GPU have errors of a few units
        assert (np.abs(y - y64) <= 4 * SLACK * bound).all()
        return
    if CXX is None:
        absent("no g++ or clang++ with _Float16, and no Metal")
    first, *others = emulated(compiled(kind)[found.text], case, found, o)
    assert all((first == y).all() for y in others), "neither the order of lanes nor the place may matter"
    assert (np.abs(first - y64) <= bound).all()  # a NaN fails


def emulated(kernel: Any, case: Case, found: Any, o: Operands) -> list[Any]:
    """Return results in both lane orders, for arrays that end, begin, or do neither at a forbidden page."""
    narrow = np.uint16 if case.dtype == "bfloat16" else np.dtype(case.dtype)
    dtype = np.float32 if case.wide and case.residual else narrow
    results = []
    for order, at in ((0, END), (3, BEGIN), (0, ODD)):
        buffers = [guarded(b, at) for b in o.buffers(found.text)]
        y = guarded(unwritten((case.rows, case.n), dtype), at)
        run(kernel, [*buffers, y], found.grid, found.threadgroup, order)
        results.append(floats(y))
    return results


def test_the_other_compiler_gives_the_same_numbers() -> None:
    """One case of each kind and dtype. Undefined behaviour differs between compilers."""
    if len(COMPILERS) < 2:
        pytest.skip("one compiler with _Float16 is here (clang++ 16 has it)")
    for kind in fused.KINDS:
        some = cases(kind)[3::15]
        assert {c.dtype for c in some} == set(DTYPES)
        launches = [launch(c) for c in some]
        kernels = build([found.text for found, _ in launches], COMPILERS[1])
        for case, kernel, (found, o) in zip(some, kernels, launches, strict=True):
            y64, bound = meaning(case, o)
            for y in emulated(kernel, case, found, o):
                assert (np.abs(y - y64) <= bound).all()


@pytest.mark.parametrize("kind", fused.KINDS)
def test_each_kernel_has_at_least_forty_cases_and_a_twin(kind: str) -> None:
    assert len(cases(kind)) >= 40
    for case in cases(kind):
        o = operands(case)
        form = (o.norm, case.act)
        assert fused.applies(o.x, o.w, *form) and fused.kind_of(case.rows, *form) == kind
        if case.dtype == "float32":  # MLX's CPU loops sum narrow types in that type
            twin = floats(host(stock(o.x, o.w, o.norm, case.act, o.residual)))
            y64, bound = meaning(case, o)
            assert (np.abs(twin - y64) <= 4 * SLACK * bound).all()  # it rounds after every operation


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_respect_address_spaces(dtype: str) -> None:
    if address_spaces.CLANG is None:
        absent("no clang++: address spaces are not checked")
    texts = {launch(c)[0].text for k in fused.KINDS for c in cases(k) if c.dtype == dtype}
    assert len(texts) > 8
    for text in texts:
        assert address_spaces.errors(text) == []
        assert address_spaces.errors(text.replace("const device uint32_t* w,", "const thread uint32_t* w,"))


def test_texts_are_ascii_and_a_name_means_one_text() -> None:
    """MLX caches a compiled kernel by name.

    Two sources with one name would give a recompilation or the wrong kernel.
    """
    named: dict[str, str] = {}
    for case in (c for kind in fused.KINDS for c in cases(kind)):
        found = launch(case)[0]
        assert found.text.isascii()
        assert named.setdefault(found.name, found.text) == found.text
    assert len(named) == len(set(named.values())) > 60


def test_a_kernel_is_used_only_where_it_means_the_same() -> None:
    o = operands(Case("float32", 32, 13, 96))
    layer = Norm("n", "layer", mx.ones(96), None, 1e-5)
    wide = mx.zeros((9, 96))
    assert fused.applies(o.x, o.w, None, None)
    for x, w, norm, act in [
        (wide, o.w, None, None),
        (o.x, o.w, layer, None),
        (o.x, o.w, None, "gelu"),
        (o.x.astype(mx.float16), o.w, None, None),
        (o.x.astype(mx.bfloat16), o.w, None, None),
        (o.x, operands(Case("float32", 32, 9, 96, bits=3)).w, None, None),
    ]:
        assert not fused.applies(x, w, norm, act)
    assert Kernels(lambda key: False).product(o.x, o.w) is None


def test_winners_are_kept_for_this_chip_this_mlx_and_these_kernels(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernel_selection, "path", lambda: tmp_path / "cache" / "k.json")
    monkeypatch.delenv(kernel_selection.SWITCH, raising=False)
    assert kernel_selection.choice(None, True, "Apple M1")[0] is None
    times = {"matvec 8x896 int4 g128 float16": (9.0, 12.0), "norm 8x64 int4 g32 float16": (9.9, 10.0)}
    kernel_selection.save("Apple M1", times)
    kernel_selection.save("Apple M1", {"gate_up 8x64 int4 g32 float16": (3.0, 2.0)})
    takes, why = kernel_selection.choice(None, True, "Apple M1")
    assert takes is not None and why == "our kernels where they were faster here, 1 of 3: matvec 1"
    assert len(kernel_selection.measured("Apple M1")) == 3
    assert [takes(k) for k in times] == [True, False]  # one per cent is noise
    assert kernel_selection.read("Apple M2") == frozenset()
    monkeypatch.setattr(kernel_selection, "digest", lambda: "another text")
    assert kernel_selection.read("Apple M1") == frozenset()
    kernel_selection.path().write_text('{"chip": 7')
    assert kernel_selection.choice(None, True, "Apple M1")[0] is None


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel_selection.SWITCH, "matvec,norm")
    takes, _ = kernel_selection.choice(None, True, "Apple M1")
    assert takes is not None
    assert [takes(f"{k} 8x64 int4 g32 float16") for k in fused.KINDS] == [True, True, False, False]
    assert kernel_selection.choice("off", True, "Apple M1")[0] is None
    assert kernel_selection.choice(None, False, "a CPU")[0] is None, "without Metal a kernel cannot run"
    with pytest.raises(BackendError, match="unknown kernel 'fast' — set it to off, all"):
        kernel_selection.choice("fast", True, "Apple M1")
