"""Our Metal kernels: when they apply, how they are launched, and the MLX operations that they replace.

All are variants of one source: a packed product of one row (`matvec`) or of 2 to 8 rows (`rows`), fused with
the preceding RMSNorm (`norm`), the gated activation (`gate_up`), the bias and the residual. A head has three
other kernels (head.py).

There is none for prefill. MLX's qmm_t decodes a 32 x 32 tile of weights for 32 rows of x: about 4 operations
for each of 1024 weights compared with 32 · 1024 multiply-adds, 12 %. Tiles of 64 rows would save half of
that, 6 % at best, for twice the accumulators (fewer threadgroups in flight on an 8-core M1). MLX also has
kernels for the M5's matrix units, which ours would bypass. A theoretical gain this small must first be
measured on a Mac.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinychat_mlx import contract
from tinychat_mlx.backends.mlx.activations import glu_of
from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.backends.mlx.head import Shortlist
from tinychat_mlx.backends.mlx.shader_source import defined, text
from tinychat_mlx.backends.mlx.split_int8 import SplitHandle
from tinychat_mlx.backends.mlx.weights import MlxHandle, PackedHandle
from tinychat_mlx.contract import Choice, Norm

KINDS = ("matvec", "norm", "gate_up", "rows")
MOST_ROWS = 8
ACTS = tuple(
    act for act in contract.ACTS if act != "gelu"
)  # as affine.metal numbers them; Metal has no erf for gelu
THREADS, ROWS_A_THREADGROUP = 64, 8  # two SIMD-groups of four rows of W, or of two gate and two up rows

Takes = Callable[[str], bool]
Binary = Callable[[Any, Any], Any]


def kind_of(rows: int, norm: Norm | None, act: str | None) -> str:
    if rows > 1:
        return "rows"
    return "gate_up" if act is not None else "norm" if norm is not None else "matvec"


def key_of(kind: str, rows: int, w: PackedHandle, residual: bool) -> str:
    """Return a measurement's key: "norm 3072x2048 int4 g128 float16", what is added, and the rows if several."""
    name = str(w.scales.dtype).removeprefix("mlx.core.")
    tail = " bias" * (w.bias is not None) + " residual" * residual + (f" {rows} rows" if rows > 1 else "")
    return f"{kind} {w.shape[0]}x{w.shape[1]} int{w.bits} g{w.group_size} {name}{tail}"


def applies(x: Any, w: MlxHandle, norm: Norm | None, act: str | None) -> bool:
    """Return whether a kernel computes the same as the stock operations here."""
    if not isinstance(w, PackedHandle) or w.bits not in (4, 8) or x.dtype not in (w.scales.dtype, mx.float32):
        return False
    n, k = w.shape
    # 256: MLX passes inputs of under 8 elements as constants, which the kernels do not read
    sizes = 1 <= x.shape[0] <= MOST_ROWS and k % 32 == 0 and n * k >= 256
    return sizes and (norm is None or norm.kind == "rms") and (act is None or act in ACTS)


class Kernels:
    """The kernels that a backend may use. takes(key) returns whether a shape's kernel is chosen."""

    def __init__(self, takes: Takes) -> None:
        self.takes = takes
        self.shortlist = Shortlist()
        self._made: dict[tuple[Any, ...], Any] = {}
        self._eps: dict[float, Any] = {}

    def product(
        self,
        x: Any,
        w: MlxHandle,
        norm: Norm | None = None,
        act: str | None = None,
        residual: Any = None,
    ) -> Any | None:
        """Return [residual +] [glu of] (norm(x) · wᵀ + bias), or None to use the stock operations."""
        if not applies(x, w, norm, act):
            return None
        assert isinstance(w, PackedHandle)
        rows = x.shape[0]
        if not self.takes(key_of(kind_of(rows, norm, act), rows, w, residual is not None)):
            return None
        return self.launch(x, w, norm, act, residual)

    def head(self, x: Any, w: Any, norm: Norm | None, choice: Choice | None) -> Any | None:
        """Return norm(x) · wᵀ of one row if a token is chosen from it (head.py), else None.

        A weight is stored in halves only if its kernels were chosen.
        """
        return self.shortlist.logits(x, w, norm, choice) if isinstance(w, SplitHandle) else None

    def launch(self, x: Any, w: PackedHandle, norm: Norm | None, act: str | None, residual: Any) -> Any:
        """Compute `product` unconditionally: x (T, K), T ≤ MOST_ROWS -> (T, N), or (T, N / 2) with act.

        The result has the dtype of the residual, or else of the weight's scales; x may be float32.
        """
        rows, streams = x.shape[0], w.shape[0]
        optional = {
            "norm_weight": None if norm is None else norm.weight,
            "eps": None if norm is None else self._scalar(norm.eps),
            "bias": w.bias,
            "residual": residual,
        }
        given = {name: a for name, a in optional.items() if a is not None}
        kernel = self._kernel(w.bits, rows, act, tuple(given))
        n = streams if act is None else streams // 2
        out = w.scales.dtype if residual is None else residual.dtype
        (y,) = kernel(
            inputs=[x, w.w, w.scales, w.biases, *given.values()],
            template=[("T", out), ("G", w.group_size)],
            grid=(-(-streams // ROWS_A_THREADGROUP) * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(rows, n)],
            output_dtypes=[out],
        )
        return y

    def _scalar(self, value: float) -> Any:
        return self._eps.setdefault(value, mx.array(value, mx.float32))

    def _kernel(self, bits: int, rows: int, act: str | None, given: tuple[str, ...]) -> Any:
        """Return the variant for these operands, created once. mx.fast is looked up late, for tests."""
        variant = (bits, rows, act, given)
        if variant not in self._made:
            defines = {
                "BITS": bits,
                "ROWS": rows,
                "NORM": int("norm_weight" in given),
                "GLU": int(act is not None),
                "ACT": 0 if act is None else ACTS.index(act),
                "BIAS": int("bias" in given),
                "RESIDUAL": int("residual" in given),
            }
            self._made[variant] = mx.fast.metal_kernel(
                name="tinychat_" + "_".join(str(v) for v in defines.values()),
                input_names=["x", "w", "scales", "biases", *given],
                output_names=["y"],
                header=defined(defines) + text("affine"),
                source=text("qmv"),
            )
        return self._made[variant]


def stock(
    x: Any, w: MlxHandle | SplitHandle, norm: Norm | None, act: str | None, residual: Any,
    glu: Binary | None = None,
) -> Any:  # fmt: skip
    """Compute Kernels.launch with MLX's operations, as the reference in tests and measurements.

    glu: replaces the gated activation of `act`.
    """
    h = x if norm is None else mx.fast.rms_norm(x, norm.weight.astype(x.dtype), norm.eps)
    y = w.matmul(h.astype(w.scales.dtype) if isinstance(w, PackedHandle | SplitHandle) else h)
    if act is not None:
        half = w.shape[0] // 2
        y = (glu or glu_of(act))(y[:, :half], y[:, half:])
    return y if residual is None else residual + y
