"""The whole contract in plain torch. It works on every torch device and is the fall-back of every kernel.

Activations between layers are float32, because residuals of real models exceed 65504, the maximum of fp16.
The input of a matrix product is in the backend's dtype. Its output is too, except for up to FEW rows, where
float32 costs no time.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda import weights
from tinychat_mlx.backends.cuda.attention import attend
from tinychat_mlx.backends.cuda.cache import CudaCache, token_nbytes
from tinychat_mlx.backends.cuda.experts import Experts, apart
from tinychat_mlx.backends.cuda.weights import CudaHandle, DenseHandle, TiledHandle
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import (
    Attention,
    Backend,
    Cache,
    CacheShape,
    Memory,
    Mlp,
    Moe,
    Norm,
    Rope,
    Step,
    Tensor,
)
from tinychat_mlx.weights.weight import F32, Dense, Packed, Weight

FEW = 8  # rows; an mma has eight columns

Method = TypeVar("Method", bound=Callable[..., Any])
Held = TypeVar("Held", DenseHandle, TiledHandle, CudaCache)


def guarded(method: Method) -> Method:
    """Convert an out-of-memory error of a method to a one-line BackendError, and free its temporary tensors."""

    @functools.wraps(method)
    def wrapper(self: TorchBackend, *args: Any) -> Any:
        try:
            return method(self, *args)
        except torch.cuda.OutOfMemoryError as e:
            text = str(e).splitlines()[0]
        # Outside the handler the traceback, and with it the method's tensors, is freed.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise BackendError(
            f"out of memory in {method.__name__} ({text})",
            where=self.device,
            remedy="use a smaller --context or model, or close other programs that use the GPU",
        )

    return cast(Method, wrapper)


class TorchBackend(Backend):
    """Runs on every torch device. dtype: type of weights, matrix products and the KV cache."""

    name = "torch"

    def __init__(self, device: torch.device, dtype: torch.dtype, int8_kv: bool = False) -> None:
        self.device, self.dtype, self.int8_kv = device, dtype, int8_kv
        self._held = self._peak = 0
        self._angles: tuple[torch.Tensor, Rope, torch.Tensor, torch.Tensor] | None = None

    # memory estimates ---------------------------------------------------------------------------
    def weight_bytes(self, weight: Weight) -> int:
        itemsize = self.dtype.itemsize
        if isinstance(weight, Packed) and (group := weights.stored_group(weight.group_size)) is not None:
            return weights.tiled_nbytes(weight.shape, 8 if weight.w_bit == 8 else 4, group, itemsize)
        return weight.shape[0] * weight.shape[1] * itemsize

    def kv_bytes(self, shape: CacheShape) -> int:
        return token_nbytes(shape, self.dtype.itemsize, self.int8_kv)

    def own_memory(self) -> bool:
        return True  # a card's; where it shares the system's, `memory` leaves more than the program takes

    # load ---------------------------------------------------------------------------------------
    @guarded
    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """Copy an array to the device.

        Floats become float32: norm weights and frequencies are used in float32.
        """
        x = weights.upload(array, self.device)
        return x.float() if x.is_floating_point() else x

    def ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int32).to(self.device)

    @guarded
    def pack(self, weight: Weight) -> CudaHandle:
        self._refuse(self.weight_bytes(weight), weight.name)
        if isinstance(weight, Packed):
            if weights.stored_group(weight.group_size) is not None:
                return self._hold(weights.pack_tiled(weight, self.device, self.dtype))
            self.announce(f"groups of {weight.group_size} have no kernel: held as {self.dtype}")
            weight = Dense(weight.name, weight.to_float32(), weight.bias)
        return self._hold(weights.pack_dense(weight, self.device, self.dtype))

    def pack_experts(self, act: str, experts: Iterable[tuple[Weight, Weight]]) -> Experts:
        mlps = [Mlp(act, self.pack(down), gate_up=self.pack(up)) for up, down in experts]
        return Experts(mlps, self.device)

    @guarded
    def new_cache(self, shape: CacheShape, capacity: int) -> CudaCache:
        size = capacity * self.kv_bytes(shape)
        advice = "use a smaller --context" + ("" if self.int8_kv else ", or TINYCHAT_CUDA_KV=int8")
        devices.refuse(size, f"a KV cache of {capacity} tokens", self.device, advice)
        cache = CudaCache(shape, capacity, self.device, self.dtype, self.int8_kv)
        return self._hold(cache)

    def read_cache(self, cache: Cache, start: int, end: int) -> dict[str, npt.NDArray[Any]]:
        parts = own(cache).parts()
        return {name: np.array(part[:, :, start:end].cpu().numpy()) for name, part in parts.items()}

    @guarded
    def write_cache(self, cache: Cache, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        start, end = cache.length, cache.length + arrays["k"].shape[2]
        for name, part in own(cache).parts().items():
            part[:, :, start:end] = torch.tensor(arrays[name])
        cache.length = end

    def announce(self, text: str) -> None:
        """Warn about a fall-back once, with the reason, because it is slow."""
        import warnings

        warnings.warn(f"cuda: {text}", stacklevel=3)

    def _refuse(self, size: int, name: str) -> None:
        advice = "use a smaller or a 4-bit model, or close other programs that use the memory"
        devices.refuse(size, f"the model (at {name})", self.device, advice)

    def _hold(self, thing: Held) -> Held:
        size = thing.nbytes
        self._held += size
        self._peak = max(self._peak, self._held)
        weakref.finalize(thing, self._release, size)
        return thing

    def _release(self, size: int) -> None:
        self._held -= size

    # step primitives ----------------------------------------------------------------------------
    @guarded
    def embed(self, table: Any, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(table, DenseHandle):
            return table.w[ids].float()
        assert isinstance(table, TiledHandle)
        rows = weights.dense_tiles(table, ids // weights.TILE, torch.float32)
        at = torch.arange(len(ids), device=ids.device) * weights.TILE + ids % weights.TILE
        return rows[at]

    @guarded
    def linear(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        x = x.to(self.dtype)
        y = F.linear(x, w.w) if isinstance(w, DenseHandle) else self.tiled_linear(x, w)
        y = y.float() if x.shape[0] <= FEW else y
        return y if w.bias is None else (y + w.bias).to(y.dtype)

    def tiled_linear(self, x: torch.Tensor, w: TiledHandle) -> torch.Tensor:
        """Multiply x (T, K) with packed weights, dequantised slab by slab."""
        n, k = w.shape
        y = torch.empty((x.shape[0], n), dtype=self.dtype, device=x.device)
        step = max(weights.SLAB // (weights.TILE * k), 1)
        for at in range(0, w.codes.shape[0], step):
            rows = slice(at * weights.TILE, min((at + step) * weights.TILE, n))
            dense = weights.dense_tiles(w, slice(at, at + step), self.dtype)[: rows.stop - rows.start]
            y[:, rows] = F.linear(x, dense)
        return y

    @guarded
    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        h = x.float()
        if norm.kind == "layer":
            h = h - h.mean(-1, keepdim=True)
        y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
        return self._narrow(y if norm.bias is None else y + norm.bias, x)

    def _narrow(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Convert a norm's result: matrix product inputs to dtype, heads (T, H, D) to their input dtype."""
        return y.to(x.dtype if x.dim() == 3 else self.dtype)

    @guarded
    def rope(self, x: torch.Tensor, rope: Rope, step: Step) -> torch.Tensor:
        cos, sin = self.angles(rope, step)
        n = 2 * cos.shape[-1]
        h = x[..., :n].float()
        a, b = (h[..., 0::2], h[..., 1::2]) if rope.interleaved else h.chunk(2, -1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        y = torch.stack(pair, -1).flatten(-2) if rope.interleaved else torch.cat(pair, -1)
        return torch.cat((y.to(x.dtype), x[..., n:]), -1)

    def angles(self, rope: Rope, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos, sin (T, 1, R/2) float32, computed once for all layers of a step that share a table."""
        if self._angles is None or self._angles[0] is not step.positions or self._angles[1] is not rope:
            angle = step.positions.float()[:, None, None] * rope.inv_freq
            self._angles = (step.positions, rope, angle.cos() * rope.factor, angle.sin() * rope.factor)
        return self._angles[2], self._angles[3]

    @guarded
    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Attention, step: Step
    ) -> torch.Tensor:
        outputs, row = [], 0
        for segment in step.segments:
            cache = own(segment.cache)
            rows, end = slice(row, row + segment.rows), cache.length + segment.rows
            cache.append(spec.layer, cache.length, k[rows], v[rows])
            keys, values = cache.read(spec.layer, end, self.dtype)
            outputs.append(attend(q[rows].to(self.dtype), keys, values, spec))
            row += segment.rows
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @guarded
    def act(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return ACTIVATIONS[kind](x.float()).to(self.dtype)

    @guarded
    def glu(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        return (ACTIVATIONS[kind](gate.float()) * up).to(self.dtype)

    @guarded
    def add(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.add(a.float(), b, alpha=scale)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    @guarded
    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return torch.tanh(x / cap) * cap

    def moe(self, x: Any, moe: Moe, norm: Norm | None = None, residual: Any | None = None) -> torch.Tensor:
        h = x if norm is None else self.norm(x, norm)
        y = apart(h, self.linear(h, moe.router), moe, self.mlp)
        return y if residual is None else self.add(residual, y)

    # whole steps ----------------------------------------------------------------------------------
    def to_host(self, x: torch.Tensor) -> F32:
        host: F32 = np.array(x.float().cpu().numpy())
        return host

    def memory(self) -> Memory:
        """Return the bytes of this backend's tensors; on a GPU all that torch allocated there."""
        used, peak = self._held, self._peak
        if self.device.type == "cuda":
            used = torch.cuda.memory_allocated(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        free = devices.available(self.device)
        return Memory(used, peak, used + free if free else 0)


def own(cache: Cache) -> CudaCache:
    assert isinstance(cache, CudaCache), "a cache of another backend"
    return cache


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
