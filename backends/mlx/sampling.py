"""Sampling on the device, so that the next step starts before Python reads the last token."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from tinychat_mlx.backends.mlx.device import mx


def drawer(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None
) -> Callable[[Any], Any]:
    """Return a function logits (1, V) -> token (1,) int32, or -1 if the logits are not finite.

    The same parameters and seed give the same tokens. They differ from the host sampler's, which uses NumPy's
    generator.
    """
    if temperature == 0:
        return lambda logits: checked(mx.argmax(logits[-1]), logits[-1])
    key = [mx.random.key(int.from_bytes(os.urandom(4), "little") if seed is None else seed & 0xFFFFFFFF)]

    def draw(logits: Any) -> Any:
        key[0], now = mx.random.split(key[0])
        kept = filtered(logits[-1], temperature, top_k, top_p, min_p)
        return checked(mx.random.categorical(kept, key=now), logits[-1])

    return draw


def penalising(draw: Callable[[Any], Any], penalty: float, seen: Sequence[int]) -> Callable[[Any], Any]:
    """Wrap `draw` so that tokens seen before are less likely, as in sampler.penalised.

    The seen tokens are tracked on the device, because Python does not have the last token when the next one
    is drawn.
    """
    state: list[Any] = []

    def drawn(logits: Any) -> Any:
        if not state:
            state.append(mx.zeros(logits.shape[-1], mx.bool_))
            state[0][mx.array(sorted(set(seen)), mx.int32)] = True
        x = logits.astype(mx.float32)
        token = draw(mx.where(state[0], mx.where(x > 0, x / penalty, x * penalty), x))
        state[0][token] = True
        return token

    return drawn


def checked(token: Any, logits: Any) -> Any:
    """Return token (), or -1 if a logit is not finite. A GPU does not stop at NaN and infinity."""
    return mx.where(mx.isfinite(logits).all(), token.astype(mx.int32), -1)[None]


def filtered(logits: Any, temperature: float, top_k: int, top_p: float, min_p: float) -> Any:
    """Scale logits (V,) by temperature -> float32 (V,), -inf where top-k, top-p or min-p excludes a token.

    Unlike the host's, top-p keeps all tokens that tie with the last one it needs.
    """
    x = logits.astype(mx.float32) / temperature
    if 0 < top_k < x.size:
        x = mx.where(x >= mx.min(mx.topk(x, top_k)), x, -mx.inf)
    if top_p < 1:
        p = mx.softmax(x)
        falling = -mx.sort(-p)
        before = mx.cumsum(falling) - falling
        x = mx.where(p >= mx.min(mx.where(before < top_p, falling, mx.inf)), x, -mx.inf)
    if min_p > 0:
        x = mx.where(x >= mx.max(x) + math.log(min_p), x, -mx.inf)
    return x
