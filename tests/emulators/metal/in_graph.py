"""Replaces mx.fast.metal_kernel with the emulator, so that a whole model runs with our kernels without Metal.

with emulated_metal() as calls:
    ...make kernels and call the model as on a Mac...; calls counts launches by kernel name
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from metal.emulator import buffers_of, build, host, run, traced, unwritten

NUMPY = {mx.float16: np.float16, mx.float32: np.float32, mx.bfloat16: np.uint16}
real_metal_kernel = mx.fast.metal_kernel


def emulated(calls: Counter[str], order: int) -> Callable[..., Any]:
    """Return a function with the signature of mx.fast.metal_kernel. Outputs are floats and start as NaN."""

    def metal_kernel(
        name: str, input_names: list[str], output_names: list[str], source: str, header: str = ""
    ) -> Callable[..., Any]:
        kernel = real_metal_kernel(
            name=name, input_names=input_names, output_names=output_names, source=source, header=header
        )
        built: dict[Any, Any] = {}

        def call(inputs: list[Any], **launch: Any) -> list[Any]:
            # the generated source depends on it: a small input becomes `constant`, not `device`
            key = (str(launch.get("template")), tuple((i.dtype, i.ndim, i.size < 8) for i in inputs))
            if key not in built:
                (found,) = traced(lambda *a: kernel(inputs=list(a), **launch)[0], *inputs)
                (built[key],) = build([found.text])
            outputs = [
                unwritten(shape, NUMPY[dtype])
                for shape, dtype in zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
            ]
            buffers = buffers_of(input_names, [host(i) for i in inputs], source) + outputs
            run(built[key], buffers, launch["grid"], launch["threadgroup"], order)
            calls[name] += 1
            return [
                mx.array(o).view(mx.bfloat16) if d == mx.bfloat16 else mx.array(o)
                for o, d in zip(outputs, launch["output_dtypes"], strict=True)
            ]

        return call

    return metal_kernel


@contextmanager
def emulated_metal(order: int = 0) -> Iterator[Counter[str]]:
    """order: of lanes and threadgroups, as in emulator.run."""
    calls: Counter[str] = Counter()
    mx.fast.metal_kernel = emulated(calls, order)
    try:
        yield calls
    finally:
        mx.fast.metal_kernel = real_metal_kernel
