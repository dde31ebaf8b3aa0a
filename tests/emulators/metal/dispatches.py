"""Count the kernels that a decode step launches on Metal, from MLX's trace of it.

On a CPU MLX traces mx.fast's operations and dequantize as their parts. Here each is one opaque kernel, as on
Metal. A trace includes everything that is not evaluated, and merges equal parts. `placeholder` creates
weights without history, duplicates or memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from metal.emulator import primitives

# Operations that only describe memory. Contiguous copies only non-contiguous arrays, and there are none here.
VIEWS = {
    "AsStrided", "Broadcast", "Contiguous", "Copy", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# A slice at a position that only the device knows: one kernel computes the offset, one copies.
SEVERAL = {"DynamicSliceUpdate": 2, "DynamicSlice": 2}


def opaque(name: str) -> Callable[..., Any]:
    """Return a function (x, ...) -> x's shape, as one kernel that is traced and never run."""

    def call(x: Any, *others: Any, **options: Any) -> Any:
        # It must read every array that the operation reads, otherwise their producers are dropped from the
        # trace
        inputs = [a for a in (x, *others, *options.values()) if isinstance(a, mx.array)]
        dtype = options.get("dtype", x.dtype)
        kernel = mx.fast.metal_kernel(
            name=name,
            input_names=[f"x{i}" for i in range(len(inputs))],
            output_names=["y"],
            source="y[0] = x0[0];",
        )
        (y,) = kernel(
            inputs=inputs, grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[x.shape], output_dtypes=[dtype]
        )  # fmt: skip
        return y

    return call


def dequantize(w: Any, scales: Any, biases: Any, **options: Any) -> Any:
    """Replace mx.dequantize by shape."""
    codes = 32 // options["bits"]  # per word
    wide = mx.broadcast_to(mx.expand_dims(w, -1), (*w.shape, codes)).reshape(*w.shape[:-1], -1)
    return opaque("dequantize")(mx.view(wide, mx.uint32), scales, biases, dtype=scales.dtype)


def placeholder(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an array of this shape whose trace is one view of one element."""
    one = mx.zeros((1,) * len(shape), dtype)
    mx.eval(one)
    return mx.broadcast_to(one, shape)


@contextmanager
def opaque_fast_operations() -> Iterator[None]:
    """Replace mx.fast's operations with kernels that are traced and never run."""
    fast = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
    kept = {(mx.fast, n): getattr(mx.fast, n) for n in fast} | {(mx, "dequantize"): mx.dequantize}

    try:
        for module, name in kept:
            setattr(module, name, opaque(name) if module is mx.fast else dequantize)
        yield
    finally:
        for (module, name), f in kept.items():
            setattr(module, name, f)


def count(step: Callable[..., Any], *inputs: Any) -> Counter[str]:
    """Return {operation or kernel: dispatches} of one call."""
    found: Counter[str] = Counter()
    for name, arguments in primitives(step, *inputs):
        if name not in VIEWS:
            found[arguments[0] if name == "CustomKernel" else name] += SEVERAL.get(name, 1)
    return found
