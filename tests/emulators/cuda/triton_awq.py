"""An int4 product in Triton, of the kind in AWQ libraries: a peer for measure.py, not part of the package."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    x, w, s, b, y, M, N, K, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        xs = tl.load(x + m[:, None] * K + k[None, :], mask=m[:, None] < M, other=0.0)
        word = tl.load(w + n[None, :] * (K // 8) + k[:, None] // 8, mask=n[None, :] < N, other=0)
        q = (word >> ((k[:, None] % 8) * 4)) & 15
        group = n[None, :] * (K // GROUP) + k[:, None] // GROUP
        scale = tl.load(s + group, mask=n[None, :] < N, other=0.0)
        bias = tl.load(b + group, mask=n[None, :] < N, other=0.0)
        acc = tl.dot(xs, q.to(tl.float16) * scale + bias, acc)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y + m[:, None] * N + n[None, :], acc.to(tl.float16), mask=inside)


def product(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, group: int) -> torch.Tensor:
    """x (M, K) half, w (N, K / 8) int32, s, b (N, K / G) half -> (M, N) half."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty((m, n), dtype=torch.float16, device=x.device)
    grid: Any = (triton.cdiv(n, 64), triton.cdiv(m, 16))
    kernel[grid](x, w, s, b, y, m, n, k, group, 16, 64, 64)
    return y
