"""`bench --kernels` measures the products of the given model. The emulator replaces Metal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from emulators import absent
from metal.emulator import CXX
from metal.in_graph import emulated_metal
from mlx_models import decoder
from tiny_models import tiny

from tinychat_mlx.apps.bench import mac
from tinychat_mlx.apps.bench.measure import Plan
from tinychat_mlx.apps.doctor import devices, probe
from tinychat_mlx.backends.mlx import bench, fused, kernel_selection, split_int8
from tinychat_mlx.backends.mlx.backend import MlxBackend
from tinychat_mlx.backends.mlx.device import find_chip
from tinychat_mlx.backends.mlx.weights import PackedHandle
from tinychat_mlx.base.errors import BackendError


@pytest.fixture
def m1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an M1 without measurements."""
    chip = replace(find_chip(), metal=True, name="Apple M1")
    for module in ("bench", "backend"):
        monkeypatch.setattr(f"tinychat_mlx.backends.mlx.{module}.find_chip", lambda: chip)
    monkeypatch.setattr(kernel_selection, "path", lambda: tmp_path / "k.json")
    monkeypatch.delenv(kernel_selection.SWITCH, raising=False)
    monkeypatch.delenv("TINYCHAT_MLX_CAPTURE", raising=False)


def asked(d: Any, rows: int) -> set[str]:
    """Return the keys that a decoder requests if no kernel is chosen, and if all are."""
    keys: set[str] = set()
    for chosen in (False, True):
        kernels = fused.Kernels(lambda key, chosen=chosen: keys.add(key) or chosen)
        kernels.launch = lambda x, w, norm, act, residual: fused.stock(x, w, norm, act, residual)  # type: ignore[method-assign]
        d.backend.kernels = kernels
        d.forward([1] * rows, d.new_cache(rows), last_only=False)
    d.backend.kernels = None
    return keys


@pytest.mark.parametrize("variant", ["llama", "qwen2-window", "gemma2", "phi", "mixtral"])
def test_every_product_that_a_decoder_asks_for_is_measured(variant: str, tiny_root: Path) -> None:
    d = decoder(tiny(variant, tiny_root).folder, MlxBackend(exact=True), (4, 32))
    kept = d.backend.kernels
    found = bench.products(d.backend, lambda rows: d.forward([1] * rows, d.new_cache(rows), last_only=False))
    assert d.backend.kernels is kept
    keys = {
        fused.key_of(fused.kind_of(t.rows, t.norm or None, t.act), t.rows, bench.weight(t), t.residual is not None)
        for t in found
    }  # fmt: skip
    assert keys == set.union(*(asked(d, rows) for rows in range(1, 9)))
    assert {t.rows for t in found} == set(range(1, 9)) and {t.group_size for t in found} == {32}


def test_a_product_is_measured_in_the_form_the_model_has(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float16")
    d = decoder(tiny("qwen2-window", tiny_root).folder, MlxBackend(), (8, 32))
    c = d.config
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    found = bench.products(d.backend, lambda rows: d.forward([1] * rows, d.new_cache(rows), last_only=False))
    half, wide = mx.float16, mx.float32
    form = {"bits": 8, "group_size": 32, "dtype": half, "rows": 1}
    for n, k, given in [
        (qkv, c.hidden_size, {"x": wide, "norm": True, "act": None, "bias": True, "residual": None}),
        (c.hidden_size, c.num_attention_heads * c.head_dim,
         {"x": half, "norm": False, "act": None, "bias": False, "residual": wide}),
        (2 * c.intermediate_size, c.hidden_size,
         {"x": wide, "norm": True, "act": "silu", "bias": False, "residual": None}),
        (c.hidden_size, c.intermediate_size,
         {"x": half, "norm": False, "act": None, "bias": False, "residual": wide}),
        (c.vocab_size, c.hidden_size, {"x": wide, "norm": True, "act": None, "bias": False, "residual": None}),
    ]:  # fmt: skip
        assert bench.Trial(n, k, **form, **given) in found


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
def test_each_product_of_a_chain_needs_the_one_before(shape: tuple[int, int], residual: bool) -> None:
    """Values also stay finite through a round of hundreds of products."""
    trial = bench.Trial(
        *shape, 4, 32, mx.float16, 1, mx.float16, False, None, False, mx.float32 if residual else None
    )
    seen: list[Any] = []

    def product(x: Any, w: Any, added: Any) -> Any:
        seen.append(added if residual else x)
        y = fused.stock(x, w, None, None, added)
        seen.append(y)
        return y

    x = mx.random.normal((1, shape[1])).astype(mx.float16)
    weights = [bench.weight(trial)] * 300
    assert bench.seconds(product, x, mx.zeros((1, shape[0])) if residual else None, weights) > 0
    assert np.isfinite(np.array(seen[-1]).astype(np.float32)).all()
    for y, following in zip(seen[1:-1:2], seen[2::2], strict=True):
        if residual:
            assert following is y
        else:
            assert (following[0] == mx.concatenate([y[0], y[0]])[: shape[1]]).all().item()


class StandIn:
    """A worker whose decoding takes 2 s, or 1 s with captured steps."""

    opened_with: list[tuple[str, Any, str]] = []  # noqa: RUF012

    def __init__(self, kind: str, options: dict[str, Any], env: dict[str, str]) -> None:
        self.capture = env["TINYCHAT_MLX_CAPTURE"]
        self.opened_with.append((kind, options["shape"], self.capture))

    def opened(self) -> None: ...

    def call(self, name: str) -> float:
        assert name == "decode"
        return 1.0 if self.capture == "1" else 2.0

    def close(self) -> None: ...


def test_the_command_measures_keeps_and_says_the_winners(
    m1: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulated measurements are slow, but the program is the same."""
    if CXX is None:
        absent("no g++ or clang++ with _Float16, or a Mac")
    for name, value in {"COLD": 0, "ROUNDS": 1, "ROWS": (1, 3)}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float32")
    monkeypatch.setattr(mac, "Worker", StandIn)
    plan, said = (
        Plan(None, "tiny", "mlx", "int8", pp=8, tg=4, depth=0, threads=None, exact=False, repeat=5),
        [],
    )
    with emulated_metal() as calls:
        made = mac.kernels(plan, said.append)
    keys = [r["key"] for r in made["kernels"]]
    assert len(keys) == len(set(keys)) == len(said) and sum(calls.values()) == 2 * len(keys)
    heads, hidden, inner = "512x256", "256x256", "1024x256"  # tiny: 4 and 2 heads of 64, 256, 512, 1024
    for key in (f"norm {heads} int4 g128 float32", f"matvec {hidden} int4 g128 float32 residual",
                f"gate_up {inner} int4 g128 float32", "norm 1024x256 int8 g128 float32",
                "rows 256x512 int4 g128 float32 residual 3 rows", "rows 1024x256 int8 g128 float32 3 rows"):  # fmt: skip
        assert key in keys
    assert all(r["ours_us"] > 0 and r["stock_us"] > 0 for r in made["kernels"])
    assert all(r["wins"] == (r["ours_us"] < 0.97 * r["stock_us"]) for r in made["kernels"])
    assert (made["captured_us"], made["eager_us"]) == (0.25e6, 0.5e6)
    assert StandIn.opened_with == [("ours", "tiny", "1"), ("ours", "tiny", "0")]
    assert made["kept_in"].endswith("k.json") and len(kernel_selection.measured("Apple M1")) == len(keys) + 1
    assert kernel_selection.captures("Apple M1") and not kernel_selection.captures("Apple M2")


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accept heads of 1024 rows, without mx.compile: on a CPU it starts a C++ compiler for each kernel."""
    if CXX is None:
        absent("no g++ or clang++ with _Float16, or a Mac")
    monkeypatch.setattr(split_int8, "LEAST_ROWS", 1024)
    monkeypatch.setenv("TINYCHAT_MLX_DTYPE", "float32")
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_a_head_of_8_bits_is_measured_in_halves(
    m1: None, small_heads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock product is measured too.

    If the kernels win, the next model's head is stored and measured in halves.
    """
    for name, value in {"COLD": 0, "ROUNDS": 1, "ROWS": (1, 3)}.items():
        monkeypatch.setattr(bench, name, value)
    key, options = "head 1024x256 int8 g128 float32", {"backend": "mlx", "shape": "tiny"}
    (trial,) = (t for t in mac.products(options) if t.head)
    assert (trial.n, trial.k, trial.bits, trial.rows, trial.norm) == (1024, 256, 8, 1, True)
    with emulated_metal() as calls:
        result = bench.measure(trial, fused.Kernels(lambda key: True))
    assert result.key == key and result.ours_us > 0 and result.stock_us > 0
    assert sorted(name.split("_")[3] for name in calls) == ["estimate", "refine", "threshold"]
    assert set(calls.values()) == {2}  # a round to compile, and a measured one
    for ours, kept_as in ((2.0, PackedHandle), (1.0, split_int8.SplitHandle)):
        kernel_selection.save("Apple M1", {key: (ours, 2.0)})
        head = mac.Subject(**options, pp=2, tg=1, depth=0).decoder.head
        assert isinstance(head, kept_as)
    assert trial in mac.products(options)


def test_bytes_a_token_are_those_of_the_tiles_that_were_read(
    m1: None, small_heads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiny: 256 tiles of 4 rows of 256 inputs, in groups of 128; everything but the codes in float32."""
    n, k, ends, made = 1024, 256, 1024 * 2 * 4, {}
    for kernels in ("off", "head"):
        monkeypatch.setenv(kernel_selection.SWITCH, kernels)
        with emulated_metal() as calls:
            subject = mac.Subject(shape="tiny", backend="mlx", pp=8, tg=2, depth=0)
            made[kernels] = subject.bytes_per_token()
        assert calls.total() == (0 if kernels == "off" else 3 * 4)  # two of eight tokens at a time
    # the upper halves, and the lower ones of some tiles with their scales; 15 bytes per row are passed on
    tiles = (made["head"] - made["off"] + n * k / 2 - 15 * n) / ((n * k / 2 + ends) / 256)
    assert 1 <= tiles < 64 and abs(4 * tiles - round(4 * tiles)) < 0.01, "a mean of four"


def test_doctor_shows_what_won(m1: None, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"norm 8x64 int4 g32 float16": (1.0, 2.0), "norm 9x64 int4 g32 float16": (1.0, 2.0)}
    times |= {"rows 8x64 int4 g32 float16 3 rows": (3.0, 9.0), "gate_up 8x64 int4 g32 float16": (2.0, 1.0)}

    class Child:
        """doctor's query of a backend, in this process with the simulated M1."""

        def __init__(self, backend: str, measure: bool) -> None:
            self.backend = backend

        def answer(self) -> dict[str, Any]:
            return probe.ask(self.backend, False) if self.backend == "mlx" else {"error": "not asked"}

    monkeypatch.setattr(devices, "Child", Child)

    def line() -> str:
        found = devices.Backends("mlx", False).section()
        return next(f.text for f in found.findings if f.key == "mlx")

    assert "not measured on this Mac yet (tinychat bench --kernels)" in line()
    kernel_selection.save("Apple M1", times)
    assert "our kernels where they were faster here, 3 of 4: norm 2, rows 1" in line()


def test_another_machine_has_nothing_to_measure() -> None:
    if mx.metal.is_available():
        pytest.skip("this is a Mac")
    for measure in (bench.mac, lambda: bench.run([])):
        with pytest.raises(BackendError, match="on a Mac"):
            measure()
