"""Other int4 products for comparison, on the same weights in the same run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tinychat_mlx.weights.weight import Packed

Calls = list[Callable[[], object]]


class MissingError(Exception):
    """This machine cannot run a peer; the text gives the reason."""


def torch_int4(weight: Packed, x: torch.Tensor, copies: int, device: torch.device) -> Calls:
    """torch's tinygemm: bfloat16 activations, int4 codes repacked by torch, scale and zero in bfloat16."""
    if device.type != "cuda":
        raise MissingError("torch's int4 product is for CUDA")
    octets = torch.from_numpy(np.array(weight.qweight.view(np.uint8))).to(device)
    flipped = (octets << 4) | (octets >> 4)  # torch expects the even input in the high nibble
    scales = torch.from_numpy(weight.scales.astype(np.float32)).to(device)
    biases = torch.from_numpy(weight.biases.astype(np.float32)).to(device)
    middle = biases + 8 * scales  # w = (q - 8) * scale + middle
    pairs = torch.stack((scales, middle), -1).transpose(0, 1).contiguous().bfloat16()  # (K / G, N, 2)
    row, calls = x.bfloat16(), Calls()
    for _ in range(copies):
        packed = torch.ops.aten._convert_weight_to_int4pack(flipped, 8)
        calls.append(lambda p=packed: torch.ops.aten._weight_int4pack_mm(row, p, weight.group_size, pairs))
    expected = x.float() @ torch.from_numpy(weight.to_float32()).to(device).T
    error = (calls[0]().float() - expected).abs().max() / expected.abs().max()  # type: ignore[attr-defined]
    if not error < 0.05:
        raise MissingError(f"torch's int4 product is wrong here by {error:.0%}: not compared")
    return calls


def triton_awq(weight: Packed, x: torch.Tensor, copies: int, device: torch.device) -> Calls:
    """A Triton kernel like those of AWQ libraries: a block of outputs, K in steps, dequantised, tl.dot."""
    if device.type != "cuda":
        raise MissingError("Triton needs a GPU")
    try:
        from triton_awq import product
    except ImportError as e:
        raise MissingError(f"Triton is not installed ({e})") from None
    calls = Calls()
    for _ in range(copies):
        parts = [torch.from_numpy(np.array(a)).to(device) for a in (weight.qweight.view(np.int32),)]
        parts += [torch.from_numpy(np.array(a)).to(device).half() for a in (weight.scales, weight.biases)]
        calls.append(lambda p=parts: product(x.half(), *p, weight.group_size))
    return calls


MATVECS: dict[str, Callable[[Packed, torch.Tensor, int, torch.device], Calls]] = {
    "torch int4": torch_int4,
    "triton awq": triton_awq,
}
