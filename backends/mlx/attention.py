"""Attention over a view of a cache: MLX's fused operation, or separate operations if it lacks a feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinychat_mlx.backends.mlx.cache import CacheView, seen
from tinychat_mlx.backends.mlx.device import MB, mx
from tinychat_mlx.contract import Attention

SCORES = (
    32 * MB
)  # bytes of float32 scores at once; softmax needs as many again, and two blocks of rows are in flight
FUSED = (64, 80, 128)  # head sizes for which MLX uses its many-row kernel


def attend(q: Any, view: CacheView, spec: Attention, evaluate: Callable[[Any, list[Any]], None]) -> Any:
    """Compute attention of q (T, H, D) -> (T, H·D) in q's dtype.

    Scores that are materialised are computed for a block of rows at a time. Otherwise 512 rows of 32 heads
    after 8000 tokens would take 0.5 GB. evaluate(block, [the previous one]) issues one block and waits for
    the other; without it MLX would compute all of them at once.
    """
    rows, heads, size = q.shape
    block = rows
    if by_hand(view, spec) or size not in FUSED:
        block = max(1, SCORES // (4 * heads * view.k_at.shape[0]))
    if block >= rows:
        return attend_block(q, view, spec)
    outs: list[Any] = []
    for first in range(0, rows, block):
        last = min(first + block, rows)
        outs.append(attend_block(q[first:last], shown(view, first, last), spec))
        evaluate(outs[-1], outs[-2:-1])
    return mx.concatenate(outs)


def by_hand(view: CacheView, spec: Attention) -> bool:
    return bool(spec.softcap or spec.alibi is not None or view.packing is not None)


def shown(view: CacheView, first: int, last: int) -> CacheView:
    """Return what rows `first` to `last` see. Keys are ordered, so nothing after the last row's position."""
    end = view.k_at.shape[0] - view.q_at.shape[0] + last

    def cut(x: Any) -> Any:
        return tuple(map(cut, x)) if isinstance(x, tuple) else x[..., :end, :]

    mask = view.mask if view.mask is None or isinstance(view.mask, str) else view.mask[first:last, :end]
    q_at = view.q_at[first:last]
    return replace(
        view, keys=cut(view.keys), values=cut(view.values), k_at=view.k_at[:end], q_at=q_at, mask=mask
    )


def attend_block(q: Any, view: CacheView, spec: Attention) -> Any:
    """Compute `attend` for all rows at once."""
    rows, heads, size = q.shape
    if by_hand(view, spec):
        y = by_parts(q, view, spec)
    else:
        # The cache may have a narrower dtype than a test's q. Use one dtype, or MLX widens the whole cache.
        y = mx.fast.scaled_dot_product_attention(
            heads_first(q).astype(view.keys.dtype), view.keys, view.values, scale=spec.scale, mask=view.mask
        )
    return heads_last(y).reshape(rows, heads * size).astype(q.dtype)


def by_parts(q: Any, view: CacheView, spec: Attention) -> Any:
    """Compute attention in float32 with softcap and ALiBi -> (1, H, T, D).

    float32 from the start: q·k exceeds float16's 65504, and a score of 500 would have an error of 0.25 there.
    """
    rows, heads, size = q.shape
    first = view.keys if view.packing is None else view.keys[0]
    # query head h reads kv head h // n_rep
    grouped = (heads_first(q).astype(mx.float32) * spec.scale).reshape(1, first.shape[1], -1, size)
    scores = product(grouped, view.keys, view, transpose=True).reshape(1, heads, rows, -1)
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


def product(x: Any, kept: Any, view: CacheView, transpose: bool) -> Any:
    """Multiply x (1, Hkv, M, ·) with keys (transposed; x and scores float32) or with values (1, Hkv, S, D)."""
    if view.packing is None and transpose:
        return x @ kept.swapaxes(-1, -2).astype(mx.float32)
    if view.packing is None:
        return x.astype(kept.dtype) @ kept
    group, bits = view.packing
    return mx.quantized_matmul(
        x.astype(kept[1].dtype), *kept, transpose=transpose, group_size=group, bits=bits
    )


def heads_first(x: Any) -> Any:
    """(T, H, D) -> (1, H, T, D), the layout of mx.fast. No copy if T is 1."""
    return x.swapaxes(0, 1)[None]


def heads_last(x: Any) -> Any:
    """(1, H, T, D) -> (T, H, D)."""
    return x.squeeze(0).swapaxes(0, 1)  # x[0] would gather
