"""KV cache on the device: one allocation for the whole capacity, in the backend's dtype or in int8."""

from __future__ import annotations

import torch

from tinychat_mlx.contract import Cache, CacheShape


class CudaCache(Cache):
    """k, v (layers, Hkv, capacity, D).

    The positions of a head are contiguous, in the order of attention's reads.

    int8: codes with one float16 scale (layers, Hkv, capacity) per head and position, x ≈ code * scale.
    """

    def __init__(
        self, shape: CacheShape, capacity: int, device: torch.device, dtype: torch.dtype, int8: bool
    ) -> None:
        super().__init__(shape, capacity)
        heads = (shape.num_hidden_layers, shape.num_key_value_heads, capacity)
        stored = torch.int8 if int8 else dtype
        self.k = torch.empty((*heads, shape.head_dim), dtype=stored, device=device)
        self.v = torch.empty_like(self.k)
        self.int8 = int8
        self.k_scale = torch.empty(heads if int8 else (0,), dtype=torch.float16, device=device)
        self.v_scale = torch.empty_like(self.k_scale)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.k_scale, self.v_scale))

    def append(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v (rows, Hkv, D) at positions start, start + 1, …"""
        at = slice(start, start + k.shape[0])
        for x, codes, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            x = x.transpose(0, 1)  # (Hkv, rows, D)
            if self.int8:
                codes[layer, :, at], scales[layer, :, at] = quantised(x)
            else:
                codes[layer, :, at] = x

    def parts(self) -> dict[str, torch.Tensor]:
        """Return all stored arrays by name: (layers, Hkv, capacity, …)."""
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale} if self.int8 else {}
        return {"k": self.k, "v": self.v, **scales}

    def read(self, layer: int, end: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys, values (Hkv, end, D) in dtype. They are views if no conversion is needed."""
        k, v = self.k[layer, :, :end], self.v[layer, :, :end]
        if not self.int8:
            return k, v
        k_scale, v_scale = self.k_scale[layer, :, :end, None], self.v_scale[layer, :, :end, None]
        return (k.float() * k_scale).to(dtype), (v.float() * v_scale).to(dtype)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x (…, D) to int8 codes and float16 scales (…), symmetric with a largest magnitude of 127.

    The scale is rounded before it is used. A row of zeros gets 2⁻²⁴, the smallest float16.
    """
    x = x.float()
    scale = (x.abs().amax(-1) / 127).clamp(2.0**-24, 65504).half()
    return (x / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def token_nbytes(shape: CacheShape, itemsize: int, int8: bool) -> int:
    """Return the cache's bytes per token."""
    scales = 4 * shape.num_hidden_layers * shape.num_key_value_heads if int8 else 0
    return shape.bytes_per_token(1 if int8 else itemsize) + scales
