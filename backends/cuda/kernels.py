"""Launch each CUDA kernel with its shapes, scratch memory and grid, from torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tinychat_mlx import contract
from tinychat_mlx.backends.cuda.cache import CudaCache
from tinychat_mlx.backends.cuda.weights import TILE, UNIT, TiledHandle
from tinychat_mlx.contract import Attention, Norm, Rope

ACTS = {name: number for number, name in enumerate(contract.ACTS)}  # as in prelude.cuh's `activation`
MOST_QUERIES = 4  # query heads per block of `attend`, limited by registers
SPAN = 64  # minimum positions per split of `attend`; smaller splits are not worth a block


class Launcher(Protocol):
    """Interface of Driver on a GPU and of the emulator in tests."""

    def launch(
        self,
        program: str,
        defines: Mapping[str, int],
        kernel: str,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
    ) -> None: ...


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None or t.numel() == 0 else t.data_ptr())


@dataclass(frozen=True)
class Turned:
    """x (T, H, D) float32 that a kernel rotates by its positions when it reads it. This saves a launch."""

    x: torch.Tensor
    rope: Rope
    positions: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


class Kernels:
    """Kernels on one device. processors: the number of SMs that share a split attention."""

    def __init__(self, launcher: Launcher, device: torch.device, processors: int) -> None:
        self.launcher, self.device, self.processors = launcher, device, processors
        self._scratch: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._alibi: dict[tuple[float, ...], torch.Tensor] = {}

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return zeros that are allocated once. Kernels that share them run one after another on the stream."""
        key = name, shape
        if key not in self._scratch:
            self._scratch[key] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._scratch[key]

    def _tiled(self, program: str, w: TiledHandle, kernel: str, grid: Sequence[int], *arguments: Any) -> None:
        defines = {"BITS": w.w_bit, "GROUP": w.group_size}
        self.launcher.launch(program, defines, kernel, grid, 256, arguments)

    def matvec(self, x: torch.Tensor, w: TiledHandle, residual: torch.Tensor | None) -> torch.Tensor:
        """x (T ≤ 8, K) half -> (T, N) float32, plus the weight's bias and the residual (T, N) float32."""
        (n, k), rows = w.shape, x.shape[0]
        y = self.new((rows, n), torch.float32)
        self._tiled(
            "matvec", w, "matvec", [w.codes.shape[0]],
            pointer(w.codes), pointer(w.scales), pointer(x), pointer(w.bias), pointer(residual), pointer(y),
            ctypes.c_int(n), ctypes.c_int(k), ctypes.c_int(rows),
        )  # fmt: skip
        return y

    def matvec_glu(self, x: torch.Tensor, w: TiledHandle, act: str) -> torch.Tensor:
        """x (T ≤ 8, K) half, w gate then up (2F, K), F % 16 == 0 -> act(gate) · up (T, F) half."""
        f, rows = w.shape[0] // 2, x.shape[0]
        y = self.new((rows, f), torch.float16)
        self._tiled(
            "matvec", w, "matvec_glu", [f // TILE],
            pointer(w.codes), pointer(w.scales), pointer(x), pointer(w.bias), pointer(y),
            ctypes.c_int(f), ctypes.c_int(w.shape[1]), ctypes.c_int(rows), ctypes.c_int(ACTS[act]),
        )  # fmt: skip
        return y

    def gemm(self, x: torch.Tensor, w: TiledHandle, residual: torch.Tensor | None) -> torch.Tensor:
        """x (T, K) half -> (T, N) half, or float32 with the residual (T, N) float32 added."""
        (n, k), rows = w.shape, x.shape[0]
        y = self.new((rows, n), torch.float16 if residual is None else torch.float32)
        half, full = (y, None) if residual is None else (None, y)
        self._tiled(
            "gemm", w, "gemm", [-(-n // 128), -(-rows // 128)],
            pointer(w.codes), pointer(w.scales), pointer(x), pointer(w.bias), pointer(residual),
            pointer(half), pointer(full), ctypes.c_int(n), ctypes.c_int(k), ctypes.c_int(rows),
        )  # fmt: skip
        return y

    def dequantise(self, w: TiledHandle, first: int, tiles: int) -> torch.Tensor:
        """Dequantise tiles first, first + 1, … of a weight -> (rows, K) half, without padding rows."""
        (n, k), units = w.shape, w.codes.shape[1]
        rows = min(tiles * TILE, n - first * TILE)
        y = self.new((rows, k), torch.float16)
        self._tiled(
            "unpack", w, "dequantise", [-(-units // 8), tiles],
            pointer(w.codes), pointer(w.scales), pointer(y),
            ctypes.c_int(first), ctypes.c_int(k), ctypes.c_int(rows),
        )  # fmt: skip
        return y

    def embed(self, table: TiledHandle, ids: torch.Tensor) -> torch.Tensor:
        """ids (T,) int32 -> (T, K) float32."""
        k = table.shape[1]
        y = self.new((ids.shape[0], k), torch.float32)
        self._tiled(
            "unpack", table, "embed", [-(-k // 256), ids.shape[0]],
            pointer(table.codes), pointer(table.scales), pointer(ids), pointer(y), ctypes.c_int(k),
        )  # fmt: skip
        return y

    def norm(self, x: torch.Tensor, norm: Norm, half: bool) -> torch.Tensor:
        """x (T, C) or (T, H, D) float32, rows with any stride -> the same shape, half or float32."""
        heads, size = (x.shape[1], x.shape[2]) if x.dim() == 3 else (1, x.shape[1])
        y = self.new(tuple(x.shape), torch.float16 if half else torch.float32)
        threads = min(-(-size // 128) * 32, 1024)
        self.launcher.launch(
            "rows", {}, "norm_rows", [heads, x.shape[0]], threads,
            [
                pointer(x), pointer(norm.weight), pointer(norm.bias),
                pointer(y if half else None), pointer(None if half else y), ctypes.c_int(size),
                ctypes.c_int(x.stride(0)), ctypes.c_float(norm.eps), ctypes.c_int(norm.kind == "layer"),
            ],
        )  # fmt: skip
        return y

    def rope(self, x: torch.Tensor, rope: Rope, positions: torch.Tensor) -> torch.Tensor:
        """x (T, H, D) float32, rows with any stride -> (T, H, D) float32."""
        rows, heads, size = x.shape
        y = self.new((rows, heads, size), torch.float32)
        self.launcher.launch(
            "rows", {}, "rope_rows", [heads, rows], -(-size // 32) * 32,
            [
                pointer(x), pointer(rope.inv_freq), pointer(positions), pointer(y), ctypes.c_int(size),
                ctypes.c_int(rope.inv_freq.shape[0]), ctypes.c_int(x.stride(0)), ctypes.c_float(rope.factor),
                ctypes.c_int(rope.interleaved),
            ],
        )  # fmt: skip
        return y

    def glu(self, x: torch.Tensor, act: str) -> torch.Tensor:
        """x (T, 2F) half, gate first -> (T, F) half."""
        rows, f = x.shape[0], x.shape[1] // 2
        y = self.new((rows, f), torch.float16)
        arguments = [pointer(x), pointer(y), ctypes.c_int(f), ctypes.c_int(ACTS[act])]
        self.launcher.launch("rows", {}, "glu_rows", [-(-f // 256), rows], 256, arguments)
        return y

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: CudaCache, spec: Attention,
        position: torch.Tensor, rope: Rope | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attend with one row: q (1, H, D), k, v (1, Hkv, D) float32, position (1,) int32 -> (1, H·D) half.

        rope: rotate q and k by the position first.
        """
        heads, size, kv_heads = q.shape[1], q.shape[2], k.shape[1]
        n_rep = heads // kv_heads
        queries = min(n_rep, MOST_QUERIES)
        groups = kv_heads * -(-n_rep // queries)
        most = -(-cache.capacity // SPAN)
        splits = max(min(2 * self.processors // groups, most), 1)
        y = self.new((1, heads * size), torch.float16)
        at, alibi = spec.layer, self.alibi(spec.alibi)
        int8 = cache.int8
        self.launcher.launch(
            "attention", {"HEAD": size, "QUERIES": queries, "INT8": int(int8)}, "attend",
            [groups, splits], 128,
            [
                pointer(q), pointer(k), pointer(v), pointer(cache.k[at]), pointer(cache.v[at]),
                pointer(cache.k_scale[at] if int8 else None), pointer(cache.v_scale[at] if int8 else None),
                pointer(position), pointer(alibi),
                pointer(self.scratch("partial", (heads, splits, size + 2), torch.float32)),
                pointer(self.scratch("tickets", (groups,), torch.int32)), pointer(y),
                ctypes.c_int(n_rep), ctypes.c_int(cache.capacity), ctypes.c_int(spec.window),
                ctypes.c_float(spec.scale), ctypes.c_float(spec.softcap),
                pointer(None if rope is None else rope.inv_freq),
                ctypes.c_int(0 if rope is None else rope.inv_freq.shape[0]),
                ctypes.c_float(1.0 if rope is None else rope.factor),
                ctypes.c_int(rope is not None and rope.interleaved),
            ],
        )  # fmt: skip
        return y

    def alibi(self, slopes: tuple[float, ...] | None) -> torch.Tensor | None:
        if slopes is None:
            return None
        if slopes not in self._alibi:
            self._alibi[slopes] = torch.tensor(slopes, dtype=torch.float32, device=self.device)
        return self._alibi[slopes]

    def sample(
        self, logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, chance: float
    ) -> torch.Tensor:
        """logits (1, V) float32 -> token (1,) int32, or -1 if a logit is not finite."""
        size = logits.shape[-1]
        token = self.new((1,), torch.int32)
        keys, ids = (self.scratch(name, (size,), torch.int32) for name in ("keys", "ids"))
        self.launcher.launch(
            "sample", {}, "sample", [1], 1024,
            [
                pointer(logits), pointer(keys), pointer(ids), pointer(token), ctypes.c_int(size),
                ctypes.c_float(temperature), ctypes.c_int(top_k), ctypes.c_float(top_p),
                ctypes.c_float(min_p), ctypes.c_double(chance),
            ],
        )  # fmt: skip
        return token


def can_glu(w: Any) -> bool:
    """Return whether the gate and the up rows of a packed weight are in separate tiles."""
    return isinstance(w, TiledHandle) and w.shape[0] // 2 % TILE == 0


def can_attend(size: int) -> bool:
    return size % 8 == 0 and size <= 256


assert UNIT == 128, "as in tiles.cuh"
