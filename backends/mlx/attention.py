"""Attention over what a cache shows: MLX's fused operation, or its parts where it lacks a feature."""

from __future__ import annotations

from typing import Any

from tinychat_mlx.backend import Attention
from tinychat_mlx.backends.mlx.cache import View, seen
from tinychat_mlx.backends.mlx.device import mx


def attend(q: Any, view: View, spec: Attention) -> Any:
    """q (T, H, D) -> (T, H·D) in q's dtype."""
    rows, heads, size = q.shape
    if spec.softcap or spec.alibi is not None or view.packing is not None:
        y = by_parts(q, view, spec)
    else:
        # The cache may hold a narrower dtype than a test's q: one dtype, or MLX widens the whole cache
        y = mx.fast.scaled_dot_product_attention(
            heads_first(q).astype(view.keys.dtype), view.keys, view.values, scale=spec.scale, mask=view.mask
        )
    return heads_last(y).reshape(rows, heads * size).astype(q.dtype)


def by_parts(q: Any, view: View, spec: Attention) -> Any:
    """Scores and softmax in float32, with softcap and ALiBi. -> (1, H, T, D)."""
    rows, heads, size = q.shape
    first = view.keys if view.packing is None else view.keys[0]
    grouped = heads_first(q).reshape(1, first.shape[1], -1, size)  # query head h reads kv head h // n_rep
    scores = product(grouped, view.keys, view, transpose=True) * spec.scale
    scores = scores.reshape(1, heads, rows, -1)
    if spec.softcap:
        scores = mx.tanh(scores / spec.softcap) * spec.softcap
    if spec.alibi is not None:
        distance = (view.k_at - view.q_at[:, None]).astype(mx.float32)
        scores = scores + mx.array(spec.alibi, mx.float32).reshape(1, heads, 1, 1) * distance
    mask = seen(view.k_at, view.q_at, spec.window) if isinstance(view.mask, str) else view.mask
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    p = mx.softmax(scores, -1).reshape(*grouped.shape[:3], -1)
    return product(p.astype(q.dtype), view.values, view, transpose=False).reshape(1, heads, rows, size)


def product(x: Any, kept: Any, view: View, transpose: bool) -> Any:
    """x (1, Hkv, M, ·) by keys (transposed) or values (1, Hkv, S, D). Scores come out in float32."""
    if view.packing is None and transpose:
        return x.astype(mx.float32) @ kept.swapaxes(-1, -2).astype(mx.float32)
    if view.packing is None:
        return x.astype(kept.dtype) @ kept
    group, bits = view.packing
    y = mx.quantized_matmul(x, *kept, transpose=transpose, group_size=group, bits=bits)
    return y.astype(mx.float32) if transpose else y


def heads_first(x: Any) -> Any:
    """(T, H, D) -> (1, H, T, D), as mx.fast wants it; no copy where T is 1."""
    return x.swapaxes(0, 1)[None]


def heads_last(x: Any) -> Any:
    """(1, H, T, D) -> (T, H, D)."""
    return x.squeeze(0).swapaxes(0, 1)  # x[0] would gather
