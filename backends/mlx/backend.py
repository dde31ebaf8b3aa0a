"""The contract on MLX arrays: fp16 on a Mac's GPU, float32 on any CPU for tests."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.backends.mlx import kernel_selection, sampling
from tinychat_mlx.backends.mlx.activations import act_of, glu_of
from tinychat_mlx.backends.mlx.attention import attend, heads_first
from tinychat_mlx.backends.mlx.cache import (
    KV_BITS,
    MlxCache,
    PackedCache,
    Parts,
    TracedCache,
    bytes_per_token,
    packed_parts,
    parts,
)
from tinychat_mlx.backends.mlx.device import GB, MB, choose_dtype, find_chip, mx, set_limits
from tinychat_mlx.backends.mlx.experts import Experts, mixture, pack_experts
from tinychat_mlx.backends.mlx.fused import Kernels
from tinychat_mlx.backends.mlx.head import OnDevice, array_of
from tinychat_mlx.backends.mlx.pipelining import Pipeline
from tinychat_mlx.backends.mlx.split_int8 import halved, key_of, suits
from tinychat_mlx.backends.mlx.weights import GROUPS, ends_of, nbytes_of, pack
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import (
    Attention,
    Backend,
    Cache,
    CacheShape,
    Choice,
    Device,
    Memory,
    Mlp,
    Moe,
    Norm,
    Rope,
    Segment,
    Step,
    StepFn,
    Tensor,
)
from tinychat_mlx.weights.weight import F32, Joined, Packed, Weight

SCRATCH = 256 * MB  # left free in addition to weights and caches, for activations of a prefill piece


class MlxBackend(Backend):
    """The device of one model.

    Several threads may use it in turn. A lock is held during evaluation, because MLX aborts if two threads
    evaluate.
    """

    name = "mlx"

    def __init__(
        self,
        exact: bool = False,
        threads: int | None = None,
        compiled: bool | None = None,
        kernels: str | None = None,
    ) -> None:
        """exact: float32 throughout, else float16 with a float32 residual. threads: ignored.

        compiled: capture steps with mx.compile (default: winners.captures). kernels: see winners.choice.
        Raises BackendError without a usable MLX or Metal device.
        """
        self.chip = find_chip()
        self.dtype = choose_dtype(self.chip, exact)
        # dtype of the residual sum over the layers: it exceeds float16's 65504 in Gemma, and is close to it
        # in others
        self.wide = mx.float32 if self.dtype == mx.float16 else self.dtype
        takes, self.chosen = kernel_selection.choice(kernels, self.chip.metal, self.chip.name)
        self.kernels = None if takes is None else Kernels(takes)
        self.kv_bits = choose_kv_bits()
        set_limits(self.chip)
        self.compiled = kernel_selection.captures(self.chip.name) if compiled is None else compiled
        # Usable from any thread, one at a time; `evaluating` ensures that
        self.stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._thread, self._lock = 0, threading.Lock()
        self._caches: weakref.WeakSet[MlxCache] = weakref.WeakSet()
        self._flight = Pipeline(self.evaluating)
        self._halves = False  # a head is stored in halves, so a step depends on its choice
        self._routes_on_host = False  # experts of mixed forms; such a step cannot be captured
        self._made: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._fused: dict[str, Callable[..., Any]] = {}

    # threads and evaluation -----------------------------------------------------------------------
    def enter(self) -> None:
        """Direct this thread's operations to the backend's stream. MLX's default stream is per thread."""
        if threading.get_ident() != self._thread:
            mx.set_default_stream(self.stream)
            self._thread = threading.get_ident()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold the device's lock. RuntimeErrors of MLX, usually out of memory, become BackendErrors."""
        with self._lock:
            try:
                yield
            except RuntimeError as e:
                raise BackendError(
                    f"MLX stopped: {e}",
                    where="mlx backend",
                    remedy="use a shorter --context, or close other programs",
                ) from None

    def _derived(self, of: Any, what: str, make: Callable[[Any], Any]) -> Any:
        """Compute make(of) once per constant. A lazy value would be computed in each call of a captured step."""
        key = (id(of), what)
        if key not in self._made:
            made = make(of)
            with self.evaluating():
                mx.eval(made)
            self._made[key] = (of, made)  # the reference keeps the id from being reused
        return self._made[key][1]

    def _fuse(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        """Compile f to one kernel on Metal, where that is cheap."""
        if name not in self._fused:
            self._fused[name] = mx.compile(f, shapeless=True) if self.chip.metal else f
        return self._fused[name]

    # memory estimates ------------------------------------------------------------------------------
    def weight_bytes(self, weight: Weight) -> int:
        return nbytes_of(weight, self.dtype.size)

    def kv_bytes(self, shape: CacheShape) -> int:
        return bytes_per_token(shape, self._parts(shape))

    def _parts(self, shape: CacheShape) -> Parts:
        return packed_parts(shape, self.dtype, self.kv_bits) if self.kv_bits else parts(shape, self.dtype)

    # load -----------------------------------------------------------------------------------------
    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """Copy integers unchanged and floats as float32: `norm` narrows its weights, `rope` must not."""
        self.enter()
        x = mx.array(array)
        if array.dtype == np.uint16:
            return x.view(mx.bfloat16).astype(mx.float32)
        return x if array.dtype.kind in "iu" else x.astype(mx.float32)

    def ids(self, ids: Sequence[int]) -> Tensor:
        self.enter()
        return mx.array(np.asarray(ids, np.int32))

    def pack(self, weight: Weight) -> Any:
        """Pack a weight. Raises BackendError if the weights so far exceed this machine's limit."""
        self.enter()
        self.check_weights(weight.name, self.weight_bytes(weight))
        with self.evaluating():
            if not isinstance(weight, Packed) or not self._halves_pay(weight):
                return pack(weight, self.dtype, self.chip.metal)
            self._halves = True
            ends = ends_of([weight], self.dtype, self.chip.metal)
            return halved(weight.name, weight.qweight, *ends, self._fuse)

    def _halves_pay(self, weight: Packed) -> bool:
        """Return whether the weight may be a head whose kernels were chosen.

        A joined weight is never a head. A tied embedding is.
        """
        if self.kernels is None or isinstance(weight, Joined):
            return False
        if not suits(weight.shape, weight.w_bit, weight.bias is not None):
            return False
        return self.kernels.takes(key_of(weight.shape, min(weight.group_size, GROUPS[-1]), self.dtype))

    def check_weights(self, name: str, nbytes: int) -> None:
        """Raise BackendError if `nbytes` more, of `name`, exceed the limit."""
        used, limit = self._taken(), self.chip.limit
        if used + nbytes + SCRATCH > limit:
            raise BackendError(
                f"the weights do not fit: {used / GB:.2f} GB are loaded at {name}, and {self.chip.name} can "
                f"use {limit / GB:.2f} GB",
                where="mlx backend",
                remedy="convert the model to fewer bits, or use a smaller one",
            )

    def _taken(self) -> int:
        """Return the bytes in use, plus those by which caches can still grow."""
        return int(mx.get_active_memory()) + sum(cache.owed for cache in self._caches)

    def new_cache(self, shape: CacheShape, capacity: int) -> MlxCache:
        """Allocate a cache. Raises BackendError if weights and cache do not fit together."""
        self.enter()
        self.check_context(self.kv_bytes(shape) * capacity, capacity)
        if self.kv_bits:
            cache: MlxCache = PackedCache(shape, capacity, self.dtype, self.kv_bits)
        else:
            cache = MlxCache(shape, capacity, self.dtype)
        with self.evaluating():
            mx.eval(cache.arrays)
        self._caches.add(cache)
        return cache

    def read_cache(self, cache: Cache, start: int, end: int) -> dict[str, npt.NDArray[Any]]:
        assert isinstance(cache, MlxCache)
        self.enter()
        with self.evaluating():
            return {name: np.array(x) for name, x in cache.read(start, end).items()}

    def write_cache(self, cache: Cache, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        assert isinstance(cache, MlxCache)
        self.enter()
        with self.evaluating():
            cache.reserve(next(iter(arrays.values())).shape[2], mx.eval)
            cache.write(arrays)
            mx.eval(cache.arrays)

    def check_context(self, nbytes: int, capacity: int) -> None:
        """Check nbytes, of keys and values of `capacity` tokens. Raises BackendError if they do not fit."""
        used, limit = self._taken(), self.chip.limit
        if nbytes and nbytes + used + SCRATCH > limit:
            fits = max(0, (limit - used - SCRATCH) * capacity // nbytes)
            raise BackendError(
                f"a context of {capacity} tokens needs {nbytes / GB:.2f} GB for keys and values; "
                f"{used / GB:.2f} GB are in use and {self.chip.name} can use {limit / GB:.2f} GB",
                where="mlx backend",
                remedy=f"use --context {fits} or less" if fits > 1 else "use a smaller model",
            )

    def step(self, segments: Sequence[Segment]) -> Step:
        self.enter()
        with self.evaluating():
            for s in segments:
                assert isinstance(s.cache, MlxCache)
                s.cache.reserve(s.rows, mx.eval)
                if s.rows > 1:  # finish the previous piece: MLX is lazy, and a whole prompt would accumulate
                    mx.eval(s.cache.arrays)
        return super().step(segments)

    # step primitives ------------------------------------------------------------------------------
    def embed(self, table: Any, ids: Tensor) -> Tensor:
        return table.rows(ids).astype(self.wide)

    def linear(self, x: Tensor, w: Any) -> Tensor:
        y = None if self.kernels is None else self.kernels.product(x, w)
        return w.matmul(x.astype(self.dtype)) if y is None else y

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        weight = self._narrow(norm.weight, x.dtype)
        if norm.kind == "rms":
            return mx.fast.rms_norm(x, weight, norm.eps).astype(self.dtype)
        bias = None if norm.bias is None else self._narrow(norm.bias, x.dtype)
        return mx.fast.layer_norm(x, weight, bias, norm.eps).astype(self.dtype)

    def _narrow(self, constant: Any, dtype: Any) -> Any:
        """Return a float32 constant in dtype. A float32 weight would widen the whole result."""
        if constant.dtype == dtype:
            return constant
        return self._derived(constant, str(dtype), lambda c: c.astype(dtype))

    def rope(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        rotated = 2 * rope.inv_freq.shape[0]
        # mx.fast.rope takes wavelengths, and one position per batch row: so T is the batch axis
        wavelengths = self._derived(rope.inv_freq, "1/x", mx.reciprocal)
        if rope.factor != 1:
            head = x.shape[-1]
            x = x * self._derived(rope.inv_freq, f"{rope.factor} {head} {x.dtype}", lambda _: mx.concatenate(
                [mx.full(rotated, rope.factor), mx.ones(head - rotated)]).astype(x.dtype))  # fmt: skip
        y = mx.fast.rope(
            x[:, :, None], rotated, traditional=rope.interleaved, base=None, scale=1.0,
            offset=step.positions, freqs=wavelengths,
        )  # fmt: skip
        return y.squeeze(2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention, step: Step) -> Tensor:
        if isinstance(step.segments[0].cache, MlxCache):
            self._flight.attending(q, spec.layer, step.segments[0].cache.shape.num_hidden_layers)
        outs, row = [], 0
        for segment in step.segments:
            rows, cache = slice(row, row + segment.rows), segment.cache
            assert isinstance(cache, MlxCache | TracedCache)
            view = cache.append(spec.layer, heads_first(k[rows]), heads_first(v[rows]), spec.window)
            outs.append(attend(q[rows], view, spec, self._block))
            row += segment.rows
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def _block(self, following: Tensor, done: list[Tensor]) -> None:
        """Issue a block of attention and wait for the previous ones, whose scores are in memory until then."""
        with self.evaluating():
            mx.async_eval(following)
            mx.eval(done)

    def act(self, x: Tensor, kind: str) -> Tensor:
        return self._fuse(kind, act_of(kind))(x)

    def glu(self, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        return self._fuse(f"{kind} glu", glu_of(kind))(gate, up)

    def add(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self._fuse(f"+ {scale}", lambda a, b: a + b if scale == 1 else a + scale * b)(a, b)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return mx.tanh(x.astype(mx.float32) / cap) * cap

    # composites: our kernels if they were chosen, else separate operations ------------------------
    def norm_linear(self, x: Tensor, norm: Norm, w: Any) -> Tensor:
        y = None if self.kernels is None else self.kernels.product(x, w, norm)
        return super().norm_linear(x, norm, w) if y is None else y

    def head(self, x: Tensor, norm: Norm, w: Any, choice: Choice | None = None) -> Tensor:
        y = None
        if self.kernels is not None and x.shape[0] == 1:
            folds = norm.kind == "rms"
            y = self.kernels.head(x if folds else self.norm(x, norm), w, norm if folds else None, choice)
        return super().head(x, norm, w, choice) if y is None else y

    def linear_add(self, x: Tensor, w: Any, residual: Tensor) -> Tensor:
        y = None if self.kernels is None else self.kernels.product(x, w, residual=residual)
        return super().linear_add(x, w, residual) if y is None else y

    def mlp(self, x: Tensor, mlp: Mlp, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        w: Any = mlp.gate_up
        h = None if self.kernels is None or w is None else self.kernels.product(x, w, norm, mlp.act)
        if h is None:
            return super().mlp(x, mlp, norm, residual)
        return self.linear(h, mlp.down) if residual is None else self.linear_add(h, mlp.down, residual)

    def pack_experts(self, act: str, experts: Iterable[tuple[Weight, Weight]]) -> Any:
        self.enter()
        pairs = list(experts)
        self.check_weights(pairs[0][0].name, sum(self.weight_bytes(w) for pair in pairs for w in pair))
        with self.evaluating():
            made = pack_experts(pairs, act, self.dtype, self.chip.metal)
        self._routes_on_host |= not isinstance(made, Experts)
        return made

    def moe(self, x: Tensor, moe: Moe, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        if not isinstance(moe.experts, Experts):
            return super().moe(x, moe, norm, residual)
        h = x if norm is None else self.norm(x, norm)
        glu = self._fuse(f"{moe.act} glu", glu_of(moe.act))
        y = mixture(h, self.linear(h, moe.router), moe, glu, self.mlp)
        return y if residual is None else self.add(residual, y)

    # whole steps ----------------------------------------------------------------------------------
    def capture(self, fn: StepFn) -> StepFn:
        """Capture with mx.compile: one program per span of keys, with the position as an input.

        If a head depends on a choice there is one program with a choice, whose numbers are inputs, and one
        without.
        """
        if not self.compiled or self._routes_on_host:
            return fn
        programs: dict[tuple[int, bool], Callable[..., Any]] = {}

        def run(ids: Tensor, step: Step) -> Tensor:
            cache = step.segments[0].cache
            if step.rows != 1 or type(cache) is not MlxCache:
                return fn(ids, step)
            self._flight.writing()
            choice = step.choice if self._halves else None
            form = (cache.span(), choice is not None)
            if form not in programs:
                programs[form] = mx.compile(traced(fn, *form))
            y, k, v = programs[form](
                ids, step.positions, array_of(choice), cache.parts["k"], cache.parts["v"]
            )
            cache.parts = {"k": k, "v": v}
            return y

        return run

    def sampler(
        self, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None,
        penalty: float = 1.0, seen: Sequence[int] = (),
    ) -> Callable[[Tensor], Tensor] | None:  # fmt: skip
        """Return a sampler whose draws are issued at once and in order, while Python reads the last token."""
        self.enter()
        draw = sampling.drawer(temperature, top_k, top_p, min_p, seed)
        if penalty != 1:
            draw = sampling.penalising(draw, penalty, seen)

        return lambda logits: self._flight.issue(draw(logits))

    def to_host(self, x: Tensor) -> F32:
        self.enter()
        with self.evaluating():
            if x.dtype == mx.bfloat16:  # NumPy has no bfloat16
                x = x.astype(mx.float32)
            # Widen here: on the device that would be one more operation, after the step in flight
            return np.array(x).astype(np.float32, copy=False)

    def memory(self) -> Memory:
        return Memory(int(mx.get_active_memory()), int(mx.get_peak_memory()), self.chip.limit)

    def describe(self) -> Device:
        where = "Metal" if self.chip.metal else "on the CPU, for tests: slow"
        dtype = str(self.dtype).removeprefix("mlx.core.")
        detail = f"mlx {mx.__version__}, {where}, {dtype}"
        return Device("mlx", self.chip.name, detail, features=(self.chosen,))


def choose_kv_bits() -> int:
    """Return the bits of keys and values, 0 for the compute dtype. Raises BackendError."""
    text = os.environ.get(KV_BITS) or "0"
    if text not in ("0", "4", "8"):
        raise BackendError(f"{text} bits are not supported", where=KV_BITS, remedy="give 4 or 8, or unset it")
    return int(text)


def traced(fn: StepFn, span: int, chosen: bool) -> Callable[..., Any]:
    """Wrap fn as a function of arrays: ids (1,), position (1,), choice (2,), k, v -> (result, k, v)."""

    def program(
        ids: Tensor, position: Tensor, given: Tensor, k: list[Any], v: list[Any]
    ) -> tuple[Tensor, list[Any], list[Any]]:
        _, kv_heads, _, head = k[0].shape
        cache = TracedCache(CacheShape(len(k), kv_heads, head), span, position, k, v)
        y = fn(ids, Step((Segment(cache, 1),), position, OnDevice(given=given) if chosen else None))
        return y, cache.k, cache.v

    return program
