"""Attention over what a cache shows: MLX's fused operation, or its parts where it lacks a feature."""

from __future__ import annotations

from typing import Any

from tinychat_mlx.backend import Attention
from tinychat_mlx.backends.mlx.cache import View, seen
from tinychat_mlx.backends.mlx.device import mx


def attend(q: Any, view: View, spec: Attention) -> Any:
    """q (T, H, D) -> (T, H·D) in q's dtype."""
    rows, heads, size = q.shape
    if spec.softcap or spec.alibi is not None:
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
    kv_heads = view.keys.shape[1]
    grouped = heads_first(q).reshape(1, kv_heads, -1, size)  # query head h reads kv head h // n_rep
    scores = (grouped.astype(mx.float32) @ view.keys.swapaxes(-1, -2).astype(mx.float32)) * spec.scale
    scores = scores.reshape(1, heads, rows, -1)
    if spec.softcap:
        scores = mx.tanh(scores / spec.softcap) * spec.softcap
    if spec.alibi is not None:
        distance = (view.k_at - view.q_at[:, None]).astype(mx.float32)
        scores = scores + mx.array(spec.alibi, mx.float32).reshape(1, heads, 1, 1) * distance
    mask = seen(view.k_at, view.q_at, spec.window) if isinstance(view.mask, str) else view.mask
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    p = mx.softmax(scores, -1).reshape(1, kv_heads, -1, scores.shape[-1]).astype(view.values.dtype)
    return (p @ view.values).reshape(1, heads, rows, size)


def heads_first(x: Any) -> Any:
    """(T, H, D) -> (1, H, T, D), as mx.fast wants it; no copy where T is 1."""
    return x.swapaxes(0, 1)[None]


def heads_last(x: Any) -> Any:
    """(1, H, T, D) -> (T, H, D)."""
    return x.squeeze(0).swapaxes(0, 1)  # x[0] would gather
