"""Mixture of experts on the device: experts are stacked and selected by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tinychat_mlx.backends.mlx.device import mx
from tinychat_mlx.backends.mlx.weights import GROUPS, arrays_of, pack
from tinychat_mlx.contract import Handle, Mlp, Moe
from tinychat_mlx.weights.weight import Dense, Weight

SORTED = 64  # products from which rows are sorted by expert, so that each expert is read once


@dataclass(frozen=True)
class Stack:
    """Matrices of one form: arrays as in a handle, with the experts as first axis."""

    arrays: tuple[Any, ...]  # (w,) (E, N, K), or w, scales, biases
    bits: int  # 0: dense
    group_size: int

    def matmul(self, x: Any, expert: Any, in_order: bool) -> Any:
        """x (M, 1, K), expert (M,) uint32 -> (M, 1, N). Multiplies row m with the matrix expert[m]."""
        if not self.bits:
            w = self.arrays[0].swapaxes(-1, -2)
            return mx.gather_mm(x, w, rhs_indices=expert, sorted_indices=in_order)
        return mx.gather_qmm(
            x, *self.arrays, rhs_indices=expert, transpose=True, group_size=self.group_size, bits=self.bits,
            sorted_indices=in_order,
        )  # fmt: skip


def form_of(w: Weight) -> tuple[Any, ...]:
    """Return what two weights must have in common to be stacked."""
    if w.bias is not None:
        return (id(w),)
    return (w.shape,) if isinstance(w, Dense) else (w.shape, w.w_bit, w.group_size)


def stack(weights: Sequence[Weight], dtype: Any, share: bool) -> Stack:
    """Stack weights of one form. Each byte is copied directly to its place."""
    first = weights[0]
    arrays = (a.reshape(len(weights), first.shape[0], -1) for a in arrays_of(weights, dtype, share))
    if isinstance(first, Dense):
        return Stack(tuple(arrays), 0, 0)
    return Stack(tuple(arrays), first.w_bit, min(first.group_size, GROUPS[-1]))


@dataclass(frozen=True)
class Experts:
    """The routed experts, stacked (gate and up joined), and the shared one, if any, as it is."""

    up: Stack
    down: Stack
    shared: Mlp | None


def pack_experts(
    pairs: list[tuple[Weight, Weight]], act: str, dtype: Any, share: bool
) -> Experts | tuple[Mlp, ...]:
    """Pack (gate_up, down) of each expert, the shared one last: stacked, or one by one if the forms differ.

    A shared expert with the routed experts' size is not distinguishable here. It is stacked and selected by
    index.
    """

    def alone(pair: tuple[Weight, Weight]) -> Mlp:
        up, down = (cast(Handle, pack(w, dtype, share)) for w in pair)
        return Mlp(act, down, gate_up=up)

    odd = len(pairs) > 1 and [form_of(w)[0] for w in pairs[-1]] != [form_of(w)[0] for w in pairs[0]]
    routed = pairs[:-1] if odd else pairs
    ups, downs = zip(*routed, strict=True)
    if any(side[0].bias is not None or len({form_of(w) for w in side}) > 1 for side in (ups, downs)):
        return tuple(alone(p) for p in pairs)
    up, down = stack(ups, dtype, share), stack(downs, dtype, share)
    return Experts(up, down, alone(pairs[-1]) if odd else None)


def route(logits: Any, moe: Moe) -> tuple[Any, Any, Any]:
    """Route logits (T, E [+ 1]) -> experts (T, k), their weights (T, k), the shared one's (T, 1) or None."""
    logits = logits.astype(mx.float32)
    p = mx.softmax(logits[:, : moe.num_experts], -1)
    choice = mx.argpartition(-p, moe.top_k - 1, -1)[:, : moe.top_k]
    share = mx.take_along_axis(p, choice, -1)
    if moe.normalise:
        share = share / share.sum(-1, keepdims=True)
    shared = mx.sigmoid(logits[:, moe.num_experts :]) if logits.shape[1] > moe.num_experts else None
    return choice.astype(mx.uint32), share, shared


def mixture(
    h: Any, logits: Any, moe: Moe, glu: Callable[[Any, Any], Any], mlp: Callable[[Any, Mlp], Any]
) -> Any:
    """Return the weighted sum of each row's experts (T, C) for h (T, C) and the router's logits."""
    experts = moe.experts
    assert isinstance(experts, Experts)
    choice, share, shared = route(logits, moe)
    if shared is not None and experts.shared is None:  # stacked after the routed ones
        choice = mx.concatenate([choice, mx.full(shared.shape, moe.num_experts, mx.uint32)], -1)
        share = mx.concatenate([share, shared], -1)
    rows, k = choice.shape
    flat = choice.reshape(-1)
    row = mx.repeat(mx.arange(rows), k)
    order = mx.argsort(flat) if rows * k >= SORTED else None
    if order is not None:
        flat, row = flat[order], row[order]
    y = experts.up.matmul(h[row][:, None], flat, order is not None)
    half = y.shape[-1] // 2
    y = experts.down.matmul(glu(y[..., :half], y[..., half:]), flat, order is not None).squeeze(1)
    if order is not None:
        y = y[mx.argsort(order)]
    total = (y.reshape(rows, k, -1).astype(mx.float32) * share[..., None]).sum(1)
    if shared is not None and experts.shared is not None:
        total = total + mlp(h, experts.shared).astype(mx.float32) * shared
    return total.astype(h.dtype)
