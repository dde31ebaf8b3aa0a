"""Activations, computed in float32 and rounded once to the input's dtype: gelu's x³ overflows float16 at 40."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinychat_mlx.backends.mlx.device import mx

Unary = Callable[[Any], Any]

ACTIVATIONS: dict[str, Unary] = {
    "silu": lambda x: x * mx.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + mx.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
}


def act_of(kind: str) -> Callable[[Any], Any]:
    f = ACTIVATIONS[kind]
    return lambda x: f(x.astype(mx.float32)).astype(x.dtype)


def glu_of(kind: str) -> Callable[[Any, Any], Any]:
    f = ACTIVATIONS[kind]
    return lambda gate, up: (f(gate.astype(mx.float32)) * up).astype(up.dtype)
