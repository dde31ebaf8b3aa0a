"""The emulator detects deliberate bugs, and agrees with a kernel known to be correct on Apple's GPUs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

from emulators import absent
from metal import address_spaces
from metal.emulator import BEGIN, COMPILERS, CXX, END, ODD, build, guarded, host, run, traced, unwritten


@pytest.fixture(autouse=True)
def _emulator() -> None:
    if CXX is None:
        absent("no g++ or clang++ with _Float16, or a Mac")


def launch_of(
    body: str,
    out: tuple[int, ...],
    threads: tuple[int, int, int],
    group: tuple[int, int, int],
    *inputs: Any,
    names: tuple[str, ...] = ("x",),
    **template: Any,
) -> Any:
    """Generate MLX's source of a float kernel with one output."""
    kernel = mx.fast.metal_kernel(name="k", input_names=list(names), output_names=["y"], source=body)
    options: dict[str, Any] = {"template": list(template.items())} if template else {}
    (launch,) = traced(
        lambda *a: kernel(
            inputs=list(a),
            grid=threads,
            threadgroup=group,
            output_shapes=[out],
            output_dtypes=[mx.float32],
            **options,
        )[0],
        *inputs,
    )
    return launch


REDUCTION = """
  threadgroup float part[8];
  const uint t = thread_position_in_threadgroup.x;
  float s = simd_sum(x[threadgroup_position_in_grid.x * 256 + t]);
  if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = s;
  %s
  if (t == 0) {
    float a = 0;
    for (int i = 0; i < 8; i++) a += part[i];
    y[threadgroup_position_in_grid.x] = a;
  }
"""


@pytest.mark.parametrize("barrier", [True, False])
def test_two_lane_orders_show_a_missing_barrier(barrier: bool) -> None:
    x = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    line = "threadgroup_barrier(mem_flags::mem_threadgroup);" if barrier else ""
    launch = launch_of(REDUCTION % line, (4,), (1024, 1, 1), (256, 1, 1), mx.array(x))
    (kernel,), results = build([launch.text]), []
    for order in (0, 1):
        y = unwritten((4,), np.float32)
        run(kernel, [x, y], launch.grid, launch.threadgroup, order)
        results.append(y)
    assert np.allclose(*results, atol=1e-4) == barrier
    if barrier:
        # 256 terms of magnitude ~1: 256 * 2**-24 * 16 is a generous bound
        assert np.abs(results[0] - x.reshape(4, 256).sum(1)).max() < 3e-4


DIVERGENT = """
  const uint t = thread_position_in_threadgroup.x;
  float v = x[t];
  if (t < 7)
    v = simd_sum(v);
  else
    v = simd_max(v);
  y[t] = v;
"""
LONELY = """
  const uint t = thread_position_in_threadgroup.x;
  float v = x[t];
  if (t == 3) return;
  threadgroup_barrier(mem_flags::mem_none);
  y[t] = v;
"""
HALF_BARRIER = """
  const uint t = thread_position_in_threadgroup.x;
  if (t < 32)
    threadgroup_barrier(mem_flags::mem_none);
  y[t] = x[t];
  threadgroup_barrier(mem_flags::mem_none);
"""


@pytest.mark.parametrize(
    "body, message",
    [(DIVERGENT, "divergent"), (LONELY, "not reached"), (HALF_BARRIER, "not reached by every")],
)
def test_divergence_is_an_error(body: str, message: str) -> None:
    x = np.ones(64, np.float32)
    launch = launch_of(body, (64,), (64, 1, 1), (64, 1, 1), mx.array(x))
    (kernel,) = build([launch.text])
    with pytest.raises(RuntimeError, match=message):
        run(kernel, [x, np.zeros(64, np.float32)], launch.grid, launch.threadgroup)


@pytest.mark.parametrize("order", [0, 3])
@pytest.mark.parametrize("body", ["y[t] = x[t + PAST];", "y[t + PAST] = x[t];"])
def test_an_access_past_the_end_is_an_error(body: str, order: int) -> None:
    texts = [
        launch_of(f"uint t = thread_position_in_grid.x;\n {body}", (64,), (64, 1, 1), (32, 1, 1), mx.zeros(64), PAST=past)
        for past in (0, 1)
    ]  # fmt: skip
    good, bad = build([t.text for t in texts])
    buffers = [guarded(np.zeros(64, np.float32)) for _ in range(2)]
    run(good, buffers, (64, 1, 1), (32, 1, 1), order)
    with pytest.raises(RuntimeError, match=r"outside a buffer in threadgroup \(1,0,0\), thread 31"):
        run(bad, buffers, (64, 1, 1), (32, 1, 1), order)
    run(good, buffers, (64, 1, 1), (32, 1, 1), order)  # and the emulator still works afterwards


def test_an_access_before_the_beginning_is_an_error() -> None:
    body = "uint t = thread_position_in_grid.x;\n y[t] = (x - 1)[t];"
    launch = launch_of(body, (64,), (64, 1, 1), (32, 1, 1), mx.zeros(64))
    (kernel,) = build([launch.text])
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    run(kernel, [guarded(x, END), y], (64, 1, 1), (32, 1, 1))  # the memory there is not forbidden
    with pytest.raises(RuntimeError, match=r"outside a buffer in threadgroup \(0,0,0\), thread 0"):
        run(kernel, [guarded(x, BEGIN), y], (64, 1, 1), (32, 1, 1))


@pytest.mark.parametrize("kind, fails", [("uint2", True), ("packed_uint2", False)])
def test_a_misaligned_access_is_an_error(kind: str, fails: bool) -> None:
    """A file's tensors start at any address.

    A vector must be aligned to its size, a packed vector to its element's.
    """
    body = f"""
      const uint t = thread_position_in_grid.x;
      y[t] = float(uint2(((const device {kind}*)x)[t]).y);
    """
    x = np.arange(128, dtype=np.uint32)
    launch = launch_of(body, (64,), (64, 1, 1), (32, 1, 1), mx.array(x))
    (kernel,) = build([launch.text])
    for at in (END, BEGIN, ODD):
        y = unwritten((64,), np.float32)
        place = guarded(x, at)
        assert (place.ctypes.data % 8 != 0) == (at == ODD)
        if fails and at == ODD:
            with pytest.raises(RuntimeError, match="misaligned access in threadgroup"):
                run(kernel, [place, y], (64, 1, 1), (32, 1, 1))
        else:
            run(kernel, [place, y], (64, 1, 1), (32, 1, 1))
            assert (y == x[1::2]).all()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read as Linux shows them")
def test_guarded_pages_go_with_the_last_array_upon_them() -> None:
    """pytest shows a failed test's arrays long after the test."""

    def mapped(place: int) -> bool:
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = [[int(n, 16) for n in line.split()[0].split("-")] for line in lines]
        return any(begin <= place < end for begin, end in spans)

    array = guarded(np.arange(6.0))
    view, place = array.reshape(2, 3)[1], array.ctypes.data
    del array
    gc.collect()
    assert view.tolist() == [3, 4, 5] and mapped(place)
    del view
    gc.collect()
    assert not mapped(place)


@pytest.mark.parametrize("cxx", ["g++", "clang++"])
def test_both_compilers_emulate(cxx: str) -> None:
    """Each compiler has its own bugs and undefined behaviour; kernels run with the first one found."""
    if cxx not in COMPILERS:
        pytest.skip(f"{cxx} is not installed or lacks _Float16 (clang++ 16 has it)")
    x = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    line = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    launch = launch_of(REDUCTION % line, (4,), (1024, 1, 1), (256, 1, 1), mx.array(x))
    (kernel,) = build([launch.text], cxx)
    for order in (0, 1):
        y = unwritten((4,), np.float32)
        run(kernel, [x, y], launch.grid, launch.threadgroup, order)
        assert np.abs(y - x.reshape(4, 256).sum(1)).max() < 3e-4  # as above


def test_what_is_never_written_stays_nan() -> None:
    body = "uint t = thread_position_in_grid.x;\n if (t != 5) y[t] = x[t];"
    launch = launch_of(body, (64,), (64, 1, 1), (32, 1, 1), mx.zeros(64))
    (kernel,) = build([launch.text])
    y = unwritten((64,), np.float32)
    run(kernel, [np.zeros(64, np.float32), y], launch.grid, launch.threadgroup)
    assert np.flatnonzero(np.isnan(y)).tolist() == [5]


def test_half_rounds_after_every_operation() -> None:
    """2048 + 1 is 2048 in half. A compiler that keeps the sum in float would give 2050 after two additions."""
    body = "uint t = thread_position_in_grid.x;\n half a = half(x[t]);\n y[t] = float(a + half(1) + half(1));"
    launch = launch_of(body, (64,), (64, 1, 1), (32, 1, 1), mx.zeros(64))
    (kernel,) = build([launch.text])
    y = unwritten((64,), np.float32)
    run(kernel, [np.full(64, 2048, np.float32), y], launch.grid, launch.threadgroup)
    assert (y == 2048).all()


TILE = """
  threadgroup float tile[8 * 8];
  const uint K = x_shape[1], N = w_shape[0];
  const uint n0 = threadgroup_position_in_grid.x * 8, m0 = threadgroup_position_in_grid.y * 8;
  simdgroup_float8x8 acc = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), a, b;
  for (uint k = 0; k < K; k += 8) {
    for (uint e = thread_index_in_simdgroup; e < 64; e += 32) {
      const uint n = e / 8, kk = e % 8, g = (n0 + n) * (K / G) + k / G;
      const uint q = (w[(n0 + n) * (K / 8) + k / 8] >> (4 * kk)) & 15;
      tile[n * 8 + kk] = float(q) * float(scales[g]) + float(biases[g]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(a, x + m0 * K + k, K);
    simdgroup_load(b, tile, 8, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(acc, a, b, acc);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_store(acc, y + m0 * N + n0, N);
"""


def test_simdgroup_matrices() -> None:
    rows, n, k, rng = 16, 64, 256, np.random.default_rng(1)
    w, s, b = mx.quantize(mx.array(rng.standard_normal((n, k)).astype(np.float32)), group_size=128, bits=4)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    names = ("x", "w", "scales", "biases")
    launch = launch_of(
        TILE, (rows, n), (n // 8 * 32, rows // 8, 1), (32, 1, 1), mx.array(x), w, s, b, names=names, G=128
    )
    y, shapes = unwritten((rows, n), np.float32), (np.array(x.shape, np.int32), np.array(w.shape, np.int32))
    buffers = [x, shapes[0], host(w), shapes[1], host(s), host(b), y]
    run(build([launch.text])[0], buffers, launch.grid, launch.threadgroup)
    dense = np.array(mx.dequantize(w, s, b, group_size=128, bits=4)).astype(np.float64)
    expected = x.astype(np.float64) @ dense.T
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


QMV_FAST = (
    "qmv_fast_impl<T, 128, 4>(w, scales, biases, x, y, x_shape[1], w_shape[0], "
    "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);"
)


def mlx_header() -> str:
    """Return the installed wheel's source above the block loader, and qmv_fast_impl."""
    file = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels/quantized.h"
    lines = file.read_text().splitlines()
    loader = next(i for i, t in enumerate(lines) if "struct QuantizedBlockLoader" in t)
    while not lines[loader].startswith("template <"):
        loader -= 1
    start = next(i for i, t in enumerate(lines) if "void qmv_fast_impl" in t) - 1
    end = next(i for i in range(start, len(lines)) if lines[i] == "}") + 1
    skip = ("#pragma once", "#include", "constant bool", "using namespace")
    text = "\n".join(t for t in lines[:loader] + lines[start:end] if not t.startswith(skip)) + "\n"
    return "#define MLX_MTL_CONST static constant constexpr const\n#define SIMD_SIZE 32\n" + text.replace(
        "MLX_MTL_CONST int SIMD_SIZE = 32;", ""
    )


@pytest.mark.skipif(
    not mx.__version__.startswith("0.32") or mx.__version__ in ("0.32.0", "0.32.1"),
    reason="the excerpt matches the source of MLX 0.32, which sums inputs in half up to 0.32.1",
)
def test_mlx_own_kernel_gives_the_right_product() -> None:
    """A failure means that the emulator is wrong, not the kernel, which runs on every Mac."""
    rows, n, k = 2, 64, 1024
    names = ["x", "w", "scales", "biases"]
    kernel = mx.fast.metal_kernel(
        name="own", input_names=names, output_names=["y"], source=QMV_FAST, header=mlx_header()
    )
    rng = np.random.default_rng(0)
    w, s, b = mx.quantize(
        mx.array(rng.standard_normal((n, k)).astype(np.float32)).astype(mx.float16), group_size=128, bits=4
    )
    x = mx.array(rng.standard_normal((rows, k)).astype(np.float32)).astype(mx.float16)
    (launch,) = traced(
        lambda *a: kernel(
            inputs=list(a), grid=(rows * 32, n // 8 * 2, 1), threadgroup=(32, 2, 1), output_shapes=[(rows, n)],
            output_dtypes=[mx.float16], template=[("T", mx.float16)],
        )[0],
        x, w, s, b,
    )  # fmt: skip
    y = unwritten((rows, n), np.float16)
    shapes = np.array(x.shape, np.int32), np.array(w.shape, np.int32)
    run(build([launch.text])[0], [host(x), shapes[0], host(w), shapes[1], host(s), host(b), y],
        launch.grid, launch.threadgroup)  # fmt: skip
    wide = mx.dequantize(w, s.astype(mx.float32), b.astype(mx.float32), group_size=128, bits=4)
    expected = np.array(x).astype(np.float64) @ np.array(wide).astype(np.float64).T
    # y is rounded to half once, 2**-11; its float sums are far below that
    assert np.abs(y - expected).max() <= 2**-11 * np.abs(expected).max() + 1e-3


SWIZZLES = """
  const uint i = thread_position_in_grid.x;
  const device half4* v = (const device half4*)x;
  float4 a = float4(v[i]);
  float4 b = float4(1.0f, 2.0f, 3.0f, 4.0f);
  a.xy = b.zw;
  threadgroup float4 t[4];
  t[0] = a;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const device float* p = %s;
  y[i] = dot(t[0], b) + (a * 2.0f).x + p[0];
"""


def test_address_spaces_are_checked() -> None:
    if address_spaces.CLANG is None:
        absent("no clang++: address spaces are not checked")
    x = mx.zeros(16, mx.float16)
    good = launch_of(SWIZZLES % "(const device float*)x", (4,), (4, 1, 1), (4, 1, 1), x)
    assert address_spaces.errors(good.text) == []
    bad = launch_of(SWIZZLES % "(const threadgroup float*)t", (4,), (4, 1, 1), (4, 1, 1), x)
    assert address_spaces.errors(bad.text)
