"""`bench --kernels` measures what the model at hand computes, in its forms; with the emulator in Metal's place."""

from __future__ import annotations

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
from tinychat_mlx.backends.mlx import MlxBackend, bench, fused, winners
from tinychat_mlx.backends.mlx.device import find_chip
from tinychat_mlx.errors import BackendError


@pytest.fixture
def m1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An M1 whose measurements begin here."""
    chip = replace(find_chip(), metal=True, name="Apple M1")
    for module in ("bench", "backend"):
        monkeypatch.setattr(f"tinychat_mlx.backends.mlx.{module}.find_chip", lambda: chip)
    monkeypatch.setattr(winners, "path", lambda: tmp_path / "k.json")
    monkeypatch.delenv(winners.SWITCH, raising=False)
    monkeypatch.delenv("TINYCHAT_MLX_CAPTURE", raising=False)


def asked(d: Any, rows: int) -> set[str]:
    """Keys that a decoder asks for, where no kernel is chosen, and where all are."""
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
    """And numbers stay numbers, though a round has hundreds of them."""
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
    """A worker whose decoding takes 2 s, 1 s where steps are captured."""

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
    """What it measures here is slow, but it is the same program."""
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
    assert made["kept_in"].endswith("k.json") and len(winners.measured("Apple M1")) == len(keys) + 1
    assert winners.captures("Apple M1") and not winners.captures("Apple M2")


def test_doctor_shows_what_won(m1: None, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"norm 8x64 int4 g32 float16": (1.0, 2.0), "norm 9x64 int4 g32 float16": (1.0, 2.0)}
    times |= {"rows 8x64 int4 g32 float16 3 rows": (3.0, 9.0), "gate_up 8x64 int4 g32 float16": (2.0, 1.0)}

    class Child:
        """As doctor asks a backend, but here, where it is an M1."""

        def __init__(self, backend: str, measure: bool) -> None:
            self.backend = backend

        def answer(self) -> dict[str, Any]:
            return probe.ask(self.backend, False) if self.backend == "mlx" else {"error": "not asked"}

    monkeypatch.setattr(devices, "Child", Child)

    def line() -> str:
        found = devices.Backends("mlx", False).section()
        return next(f.text for f in found.findings if f.key == "mlx")

    assert "not measured on this Mac yet (tinychat bench --kernels)" in line()
    winners.save("Apple M1", times)
    assert "our kernels where they won here, 3 of 4: norm 2, rows 1" in line()


def test_another_machine_has_nothing_to_measure() -> None:
    if mx.metal.is_available():
        pytest.skip("this is a Mac")
    for measure in (bench.mac, lambda: bench.run([])):
        with pytest.raises(BackendError, match="needs a Mac"):
            measure()
