"""CPU backend: NumPy arrays and native kernels (kernels/), loaded with ctypes.

To build the library in a checkout without installing it (the result is in tinychat_mlx/, ignored by git):

    cmake -S backends/cpu -B build/dev && cmake --build build/dev

TINYCHAT_CPU_ISA=avx2 (neon, scalar, ...) selects a lower instruction set. TINYCHAT_THREADS=2, else
OMP_NUM_THREADS, sets the number of threads. TINYCHAT_KV=int8 halves the cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import pointer
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.backends.cpu import native_abi as c
from tinychat_mlx.backends.cpu.cores import default_threads, processor_name
from tinychat_mlx.backends.cpu.experts import Experts, Places
from tinychat_mlx.backends.cpu.kvcache import CpuCache, row_bytes
from tinychat_mlx.backends.cpu.memory import F32, Arena, Scratch, address
from tinychat_mlx.backends.cpu.pack import CpuWeight, pack, packed_bytes
from tinychat_mlx.backends.cpu.packed_weight_cache import PackedWeightCache
from tinychat_mlx.backends.cpu.recorded_step import Captured, RecordedStep
from tinychat_mlx.backends.cpu.rope import CosSinTable
from tinychat_mlx.backends.cpu.thread_pool import ThreadPool
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.base.limits import memory_peak, memory_total
from tinychat_mlx.contract import (
    Attention,
    Backend,
    Cache,
    CacheShape,
    Choice,
    Device,
    Handle,
    Memory,
    Mlp,
    Moe,
    Norm,
    Rope,
    Step,
    StepFn,
    Tensor,
)
from tinychat_mlx.weights.weight import Weight

__all__ = ["CpuBackend"]

# rows, as in kernels/linear_int.h; more rows use the many-row kernel, which processes all of them per tile
FEW = 8


class CpuBackend(Backend):
    """Multiplies int4 and int8 weights with activations rounded to int8 per group.

    In exact mode activations and the cache are float32. Tensors are float32 arrays whose last axis is
    contiguous.
    """

    name = "cpu"

    def __init__(self, exact: bool = False, threads: int | None = None, kv: str | None = None) -> None:
        """Open the native library and create its threads.

        threads: None means TINYCHAT_THREADS, else OMP_NUM_THREADS, else one per fast core. kv: fp16, int8 or
        fp32; None means TINYCHAT_KV, else fp16 (fp32 in exact mode). Raises BackendError without the native
        library.
        """
        self.exact = exact
        self._kv = _cache_kind(kv or os.environ.get("TINYCHAT_KV") or ("fp32" if exact else "fp16"))
        isa = os.environ.get("TINYCHAT_CPU_ISA")
        self.engine = ThreadPool(isa or None, _threads(threads))
        self.threads = self.engine.threads
        self.tape: RecordedStep | None = None  # of the step being recorded
        self.choice = c.CChoice()  # of the current step; counts the head tiles that are read at full width
        self._forced = bool(isa)
        self._arena, self._scratch = Arena(), Scratch()
        self._routes_on_host = False  # experts that no op supports; such a step cannot be replayed
        self._shelf: PackedWeightCache | None = None  # while a model is loaded
        self._norms: dict[int, tuple[Norm, c.CNorm]] = {}
        self._ropes: dict[int, CosSinTable] = {}

    # memory estimates ----------------------------------------------------------------------------
    def weight_bytes(self, weight: Weight) -> int:
        return packed_bytes(weight, self.exact)

    def kv_bytes(self, shape: CacheShape) -> int:
        return shape.num_hidden_layers * sum(row_bytes(shape, self._kv))

    # load ---------------------------------------------------------------------------------------
    def put(self, array: npt.NDArray[Any]) -> Tensor:
        form = np.float32 if array.dtype.kind == "f" else np.int32
        return np.array(array, form, order="C")

    def ids(self, ids: Sequence[int]) -> Tensor:
        return np.array(ids, np.int32)

    def pack(self, weight: Weight) -> Handle:
        packed = pack(weight, self._arena, self.engine.run_one, self.exact)
        if self._shelf is not None:
            self._shelf.add(packed)
        return packed

    @contextmanager
    def kept(self, model: str, digest: str) -> Iterator[None]:
        shelf = self._shelf = PackedWeightCache(model + ("-exact" if self.exact else ""), digest, self._arena)
        try:
            yield
            shelf.save()
        finally:
            self._shelf = None

    def held_bytes(self, handle: Handle) -> int | None:
        return int(_weight(handle).data.nbytes)

    def stored(self, name: str, shape: tuple[int, int]) -> Handle | None:
        return None if self._shelf is None else self._shelf.find(name, shape)

    def pack_experts(self, act: str, experts: Iterable[tuple[Weight, Weight]]) -> Any:
        pairs = [(_weight(self.pack(up)), _weight(self.pack(down))) for up, down in experts]
        if all(up.shape[0] % 32 == 0 for up, _ in pairs):
            return Experts(act, pairs)
        self._routes_on_host = True  # gate and up share a tile: use the contract's default
        return tuple(Mlp(act, down, gate_up=up) for up, down in pairs)

    def new_cache(self, shape: CacheShape, capacity: int) -> Cache:
        return CpuCache(shape, capacity, self._kv)

    def read_cache(self, cache: Cache, start: int, end: int) -> dict[str, npt.NDArray[Any]]:
        assert isinstance(cache, CpuCache), "a cache of another backend"
        return cache.read(start, end)

    def write_cache(self, cache: Cache, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        assert isinstance(cache, CpuCache), "a cache of another backend"
        cache.write(arrays)

    # step primitives ----------------------------------------------------------------------------
    def embed(self, table: Handle, ids: Tensor) -> Tensor:
        w = _weight(table)
        y = self._new(ids.shape[0], w.shape[1])
        op = c.EmbedOp(c.EMBED, ids.shape[0], address(ids), pointer(w.header), address(y))
        return self._run(op, (ids,), y, w)

    def linear(self, x: Tensor, w: Handle) -> Tensor:
        return self._linear(x, w)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        y = self._new(*x.shape)
        rows, heads, dim = x.shape if x.ndim == 3 else (x.shape[0], 1, x.shape[1])
        head = _stride(x, 1) if x.ndim == 3 else 0
        spec = self._norm(norm)
        op = c.NormOp(c.NORM, rows, heads, dim, _at(x), _stride(x, 0), head, pointer(spec), address(y))
        return self._run(op, (x,), y, norm)

    def rope(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        reach = max(s.cache.length + s.rows for s in step.segments)
        table = self._rope(rope, max(reach, *(s.cache.capacity for s in step.segments)))
        table.reach(reach)
        if self.tape is not None:
            self.tape.tables.append(table)
        op = c.RopeOp(c.ROPE, x.shape[0], x.shape[1], table.half, rope.interleaved, 0)
        op.x, op.row_stride, op.head_stride = _at(x), _stride(x, 0), _stride(x, 1)
        op.positions, op.table = address(step.positions), address(table.data)
        return self._run(op, (x, step.positions), x, table)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention, step: Step) -> Tensor:
        rows, heads, dim = q.shape
        y = self._new(rows, heads * dim)
        segments, lengths = self._segments(spec.layer, step)
        op = c.AttentionOp(
            c.ATTENTION, rows, heads, k.shape[1], dim, -(-dim // 16) * 16, len(segments), spec.window
        )
        cache = step.segments[0].cache
        assert isinstance(cache, CpuCache), "a cache of another backend"
        op.kv_kind, op.scale, op.softcap = cache.kind, spec.scale, spec.softcap
        op.q, op.q_stride, op.q_head = _at(q), _stride(q, 0), _stride(q, 1)
        op.k, op.k_stride, op.k_head = _at(k), _stride(k, 0), _stride(k, 1)
        op.v, op.v_stride, op.v_head = _at(v), _stride(v, 0), _stride(v, 1)
        op.y, op.segment = address(y), segments
        alibi = None if spec.alibi is None else np.array(spec.alibi, np.float32)
        op.alibi = None if alibi is None else address(alibi)
        return self._run(op, (q, k, v), y, (segments, lengths, alibi))

    def act(self, x: Tensor, kind: str) -> Tensor:
        return self._map(c.MAP_ACT, self._new(*x.shape), x, act=kind)

    def glu(self, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        return self._map(c.MAP_GLU, self._new(*gate.shape), gate, up, act=kind)

    def add(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self._map(c.MAP_ADD, a, a, b, scale)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self._map(c.MAP_SCALE, x, x, None, factor)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return self._map(c.MAP_SOFTCAP, x, x, None, cap)

    # composites ---------------------------------------------------------------------------------
    def norm_linear(self, x: Tensor, norm: Norm, w: Handle) -> Tensor:
        return self._linear(x, w, norm)

    def head(self, x: Tensor, norm: Norm, w: Handle, choice: Choice | None = None) -> Tensor:
        self.choice.set(choice)
        return self._linear(x, w, norm, choice=self.choice)

    def linear_add(self, x: Tensor, w: Handle, residual: Tensor) -> Tensor:
        return self._linear(x, w, residual=residual)

    def mlp(self, x: Tensor, mlp: Mlp, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        if mlp.gate_up is not None and mlp.gate_up.shape[0] % 32 == 0:
            h = self._linear(x, mlp.gate_up, norm, act=mlp.act, gated=True)
        elif mlp.gate_up is None and mlp.gate is None and mlp.up is not None:
            h = self._linear(x, mlp.up, norm, act=mlp.act)
        else:
            return super().mlp(x, mlp, norm, residual)
        return self._linear(h, mlp.down, residual=residual)

    def moe(self, x: Tensor, moe: Moe, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        experts = moe.experts
        if not isinstance(experts, Experts):
            return super().moe(x, moe, norm, residual)
        if norm is not None and x.shape[0] > 1:  # normalise once, not again for each expert of a row
            x, norm = self.norm(x, norm), None
        logits = self._linear(x, moe.router, norm)
        places = Places(x.shape[0], moe, self._new)
        route = places.route(logits.shape[1], _at(logits))
        self._run(route, (logits,), places.memory, None)
        h = self._new(experts.inner_size(places))
        op = experts.op(places, True, self.exact, _at(x), address(h))
        op.x_stride = _stride(x, 0)
        if norm is not None:
            op.norm = pointer(self._norm(norm))
        self._run(op, (x, places.memory), h, (experts, norm))
        y = self._new(*x.shape)
        op = experts.op(places, False, self.exact, address(h), address(y))
        op.y_stride = _stride(y, 0)
        if residual is not None:
            op.residual, op.residual_stride = _at(residual), _stride(residual, 0)
        read = (h, places.memory) if residual is None else (h, places.memory, residual)
        return self._run(op, read, y, experts)

    # whole steps --------------------------------------------------------------------------------
    def capture(self, fn: StepFn) -> StepFn:
        return fn if self._routes_on_host else Captured(fn, self)

    def to_host(self, x: Tensor) -> F32:
        return np.array(x, np.float32)

    def memory(self) -> Memory:
        used = self._arena.used + self._scratch.held
        return Memory(used, memory_peak(), memory_total())

    def describe(self) -> Device:
        e = self.engine
        why = "set by TINYCHAT_CPU_ISA" if self._forced else ""
        plural = "" if e.threads == 1 else "s"
        mode = ", exact" if self.exact else ""
        return Device(
            "cpu",
            processor_name(),
            f"{e.isa}, {e.threads} thread{plural}{mode}",
            why,
            tuple(c.instruction_sets()),
        )

    # ops ----------------------------------------------------------------------------------------
    def _new(self, *shape: int) -> F32:
        return (self._scratch if self.tape is None else self.tape.scratch).new(*shape)

    def _rows(self, rows: int, n: int) -> F32:
        """Allocate the result of a product (rows, n).

        With many rows, a row stride of a round number of bytes maps all rows to a few lines of each cache.
        The stride is then one line longer.
        """
        apart = n + 16 if rows > FEW and n % 256 == 0 else n
        return self._new(rows, apart)[:, :n]

    def _run(self, op: c.Op, tensors: Sequence[Tensor], y: Tensor, keep: object) -> Tensor:
        """Run an op that reads `tensors` and writes y.

        `keep` is kept alive as long as the op can be replayed.
        """
        self.engine.run_one(op)
        if self.tape is not None:
            self.tape.add(op, tensors, y, keep)
        return y

    def _linear(
        self,
        x: Tensor,
        handle: Handle,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        act: str = "",
        gated: bool = False,
        choice: c.CChoice | None = None,
    ) -> Tensor:
        """Compute [residual +] act(w · norm(x) + bias), or with the gate and up rows of w: act(gate) · up."""
        w = _weight(handle)
        assert x.shape[1] == w.shape[1], f"{w.name}: {x.shape[1]} inputs for {w.shape[1]}"
        n = w.shape[0] // 2 if gated else w.shape[0]
        y = self._rows(x.shape[0], n)
        op = c.LinearOp(c.LINEAR, x.shape[0], _at(x), _stride(x, 0), pointer(w.header))
        if norm is not None:
            op.norm = pointer(self._norm(norm))
        op.y, op.y_stride = address(y), _stride(y, 0)
        if residual is not None:
            op.residual, op.residual_stride = _at(residual), _stride(residual, 0)
        op.act, op.gated, op.exact = c.ACTS[act], gated, self.exact
        if choice is not None:
            op.choice = pointer(choice)
        return self._run(op, (x,) if residual is None else (x, residual), y, (w, norm, choice))

    def _map(
        self, kind: int, y: Tensor, a: Tensor, b: Tensor | None = None, factor: float = 1.0, act: str = ""
    ) -> Tensor:
        """Run an elementwise op on the rows of two-dimensional tensors."""
        op = c.MapOp(c.MAP, a.shape[0], a.shape[1], kind, c.ACTS[act], factor)
        op.a, op.a_stride, op.y, op.y_stride = _at(a), _stride(a, 0), _at(y), _stride(y, 0)
        if b is not None:
            op.b, op.b_stride = _at(b), _stride(b, 0)
        return self._run(op, (a,) if b is None else (a, b), y, None)

    def _segments(self, layer: int, step: Step) -> tuple[Any, npt.NDArray[np.int64]]:
        """Return the segments in native form for one layer, and the lengths that they point to."""
        if self.tape is not None:
            lengths = self.tape.length
        else:
            lengths = np.array([s.cache.length for s in step.segments], np.int64)
        first = address(lengths)
        native = (c.CSegment * len(step.segments))()
        for i, s in enumerate(step.segments):
            assert isinstance(s.cache, CpuCache), "a cache of another backend"
            if s.cache.length + s.rows > s.cache.rows:
                raise BackendError(
                    f"{s.rows} more tokens overflow a cache of {s.cache.capacity}",
                    where="cpu backend",
                    remedy="use a larger --context",
                )
            native[i] = s.cache.segment(layer, s.rows, first + 8 * i)
        return native, lengths

    def _norm(self, norm: Norm) -> c.CNorm:
        if id(norm) not in self._norms:
            bias = None if norm.bias is None else address(norm.bias)
            self._norms[id(norm)] = norm, c.CNorm(c.NORMS[norm.kind], norm.eps, address(norm.weight), bias)
        return self._norms[id(norm)][1]

    def _rope(self, rope: Rope, capacity: int) -> CosSinTable:
        table = self._ropes.get(id(rope))
        if table is None or table.capacity < capacity:
            table = self._ropes[id(rope)] = CosSinTable(rope, capacity)
        return table


def _threads(asked: int | None) -> int:
    if asked is not None:
        return asked
    text = os.environ.get("TINYCHAT_THREADS", "")
    if not text:
        return default_threads()
    if not text.isdigit():
        raise BackendError(
            f"{text!r} is not a number of threads", where="TINYCHAT_THREADS", remedy="give 1, 2, ..."
        )
    return int(text)


def _cache_kind(name: str) -> int:
    kinds = {"fp16": c.F16, "int8": c.INT8, "fp32": c.F32}
    if name not in kinds:
        raise BackendError(
            f"unknown KV cache type {name!r}", where="cpu backend", remedy="choose fp16, int8 or fp32"
        )
    return kinds[name]


def _weight(handle: Handle) -> CpuWeight:
    assert isinstance(handle, CpuWeight), f"{handle.name} was packed for another backend"
    if handle.wait is not None:
        handle.wait()
        handle.wait = None
    return handle


def _at(x: Tensor) -> int:
    """Return the address of a tensor whose last axis is contiguous."""
    assert x.dtype == np.float32 and (x.strides[-1] == 4 or x.shape[-1] <= 1), "not a tensor of this backend"
    return address(x)


def _stride(x: Tensor, axis: int) -> int:
    return int(x.strides[axis]) // 4
