"""Causal attention of rows over a cache's keys and values, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tinychat_mlx.contract import Attention

SCORES = 1 << 26  # float32 scores in memory at a time if SDPA cannot be used (softcap)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: Attention) -> torch.Tensor:
    """Compute attention of q (T, H, D), the last T of S positions, over keys, values (Hkv, S, D).

    Returns (T, H·D) in q's dtype. Query head h reads key/value head h // (H / Hkv). The key/value heads are
    SDPA's batch axis, so keys are broadcast over their query heads and not copied.
    """
    rows, heads, size = q.shape
    kv_heads, length, _ = keys.shape
    shape = (kv_heads, heads // kv_heads, length, size)
    grouped = q.transpose(0, 1).reshape(kv_heads, -1, rows, size)
    if spec.softcap:
        y = softcapped(grouped, keys, values, spec)
    else:
        plain = not spec.window and spec.alibi is None  # only the causal mask
        causal = plain and rows == length and rows > 1
        mask = None if plain and (causal or rows == 1) else bias(spec, rows, keys).to(q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(kv_heads, -1, rows, length)
        y = F.scaled_dot_product_attention(
            grouped,
            keys[:, None].expand(shape),
            values[:, None].expand(shape),
            attn_mask=mask,
            is_causal=causal,
            scale=spec.scale,
        )
    return y.reshape(heads, rows, size).transpose(0, 1).reshape(rows, heads * size)


def bias(spec: Attention, rows: int, keys: torch.Tensor) -> torch.Tensor:
    """Return the float32 bias of scores: (T, S), or with ALiBi (H, T, S). Masked positions are -inf."""
    length = keys.shape[1]
    k_at = torch.arange(length, device=keys.device)
    distance = k_at - k_at[length - rows :, None]
    unseen = distance > 0
    if spec.window:
        unseen |= distance <= -spec.window
    added = torch.zeros((), device=keys.device)
    if spec.alibi is not None:
        added = torch.tensor(spec.alibi, device=keys.device)[:, None, None] * distance
    return added.masked_fill(unseen, float("-inf"))


def softcapped(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: Attention) -> torch.Tensor:
    """Compute attention with softcap, cap · tanh(score / cap), which SDPA lacks. q (Hkv, H/Hkv, T, D).

    Scores are computed for a few rows at a time.
    """
    kv_heads, group, rows, _ = q.shape
    added = bias(spec, rows, keys)
    if added.dim() == 3:
        added = added.view(kv_heads, group, rows, -1)
    step = max(SCORES // (kv_heads * group * keys.shape[1]), 1)
    pieces = []
    for at in range(0, rows, step):
        scores = torch.matmul(q[:, :, at : at + step], keys[:, None].transpose(-1, -2)).float() * spec.scale
        scores = torch.tanh(scores / spec.softcap) * spec.softcap + added[..., at : at + step, :]
        pieces.append(torch.matmul(scores.softmax(-1).to(q.dtype), values[:, None]))
    return torch.cat(pieces, 2)
