"""CUDA backend: NVIDIA GPUs (PC cards and Jetsons) through torch. Only this package imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

try:
    import torch
except ImportError as e:
    from tinychat_mlx.base.errors import BackendError, pip_install

    raise BackendError(
        f"torch does not load ({e})", where="cuda backend", remedy=pip_install("cuda")
    ) from None

import torch.nn.functional as F

from tinychat_mlx.backends.cuda import device as devices
from tinychat_mlx.backends.cuda import weights
from tinychat_mlx.backends.cuda.experts import Experts, Mixture, route_rows
from tinychat_mlx.backends.cuda.graph import Replay
from tinychat_mlx.backends.cuda.kernels import Kernels, Turned, can_attend, can_glu
from tinychat_mlx.backends.cuda.torch_ops import FEW, TorchBackend, guarded, own
from tinychat_mlx.backends.cuda.weights import TiledHandle
from tinychat_mlx.base.errors import BackendError
from tinychat_mlx.contract import Attention, Backend, Device, Mlp, Moe, Norm, Rope, Segment, Step, StepFn
from tinychat_mlx.weights.weight import F32

KV = "TINYCHAT_CUDA_KV"  # fp16 (default) or int8: storage type of the KV cache
PURE = "TINYCHAT_CUDA_KERNELS"  # 0: use only torch
# Above this number of rows a weight is dequantised for cuBLAS. Writing and reading it costs 4.5 bytes per
# weight; our gemm reaches perhaps half of cuBLAS's rate. This gives 0.94 ps against 3.6 fs per row on an H200
# and 44 ps against 0.15 ps on an Orin: about 260 to 290 rows. Computed, not measured.
MANY = 256


class CudaBackend(TorchBackend):
    """fp16 on a GPU. With TINYCHAT_CUDA_DEVICE=cpu: float32 on CPU tensors, for tests."""

    name = "cuda"

    def __init__(
        self,
        exact: bool = False,
        threads: int | None = None,
        dtype: torch.dtype | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """exact: float32 in plain torch. threads: torch's on CPU tensors. dtype, kernels: for tests.

        Raises BackendError if there is no usable device.
        """
        device = devices.find()
        kv = os.environ.get(KV, "fp16")
        if kv not in ("fp16", "int8"):
            raise BackendError(f"{kv!r} is not a cache type", where=KV, remedy="set it to fp16 or int8")
        if threads and device.type == "cpu":
            torch.set_num_threads(threads)
        chosen = dtype or (torch.float16 if device.type == "cuda" and not exact else torch.float32)
        super().__init__(device, chosen, kv == "int8" and not exact)
        if device.type == "cuda":
            devices.fence(device)
        self.kernels = kernels
        self._recordable = True  # until a one-row step reads a cache's length or a choice on the host
        if kernels is None and device.type == "cuda" and not exact and os.environ.get(PURE) != "0":
            self.kernels = self._own_kernels()

    def _own_kernels(self) -> Kernels | None:
        """Compile one kernel as a trial. If that fails, print a warning and use only torch."""
        from tinychat_mlx.backends.cuda.nvrtc import Compiler, Driver, find_nvrtc

        major, minor = torch.cuda.get_device_capability(self.device)
        try:
            if (major, minor) < devices.OLDEST:
                raise BackendError(
                    f"sm_{major}{minor} is older than sm_75",
                    where="cuda backend",
                    remedy="use a newer GPU, or --backend cpu",
                )
            driver = Driver(Compiler(find_nvrtc(torch.version.cuda), f"sm_{major}{minor}"))
            driver.function("rows", (), "norm_rows")
        except (BackendError, OSError) as e:
            reason = e.problem if isinstance(e, BackendError) else e
            self.announce(
                f"the CUDA kernels are not available ({reason}); using torch, which is several times slower"
            )
            return None
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return Kernels(driver, self.device, processors)

    # step primitives, with a kernel if there is one -----------------------------------------------------
    def ids(self, ids: Sequence[int]) -> torch.Tensor:
        return self._send(torch.tensor(ids, dtype=torch.int32))

    def step(self, segments: Sequence[Segment]) -> Step:
        spans = [np.arange(s.cache.length, s.cache.length + s.rows, dtype=np.int32) for s in segments]
        return Step(tuple(segments), self._send(torch.from_numpy(np.concatenate(spans))))

    def _send(self, host: torch.Tensor) -> torch.Tensor:
        """Copy to the device without waiting. Only a copy from pinned memory is asynchronous."""
        if self.device.type != "cuda":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    @guarded
    def embed(self, table: Any, ids: torch.Tensor) -> torch.Tensor:
        if self.kernels is not None and isinstance(table, TiledHandle):
            return self.kernels.embed(table, ids)
        return super().embed(table, ids)

    @guarded
    def linear(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        if self.kernels is None or not isinstance(w, TiledHandle) or x.shape[0] > MANY:
            return super().linear(x, w)
        x = self._rows(x)
        few = x.shape[0] <= FEW
        return self.kernels.matvec(x, w, None) if few else self.kernels.gemm(x, w, None)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """Convert x for a kernel: half, contiguous rows, 16-byte aligned (K % 32 == 0)."""
        x = x.to(self.dtype).contiguous()
        return x if x.data_ptr() % 16 == 0 else x.clone()

    def tiled_linear(self, x: torch.Tensor, w: TiledHandle) -> torch.Tensor:
        """Multiply many rows: dequantise the weight slab by slab and multiply with cuBLAS."""
        if self.kernels is None:
            return super().tiled_linear(x, w)
        n, k = w.shape
        step = max(weights.SLAB // (weights.TILE * k), 1)
        if step >= w.codes.shape[0]:
            return F.linear(x, self.kernels.dequantise(w, 0, w.codes.shape[0]))
        y = torch.empty((x.shape[0], n), dtype=self.dtype, device=x.device)
        for at in range(0, w.codes.shape[0], step):
            dense = self.kernels.dequantise(w, at, min(step, w.codes.shape[0] - at))
            y[:, at * weights.TILE : at * weights.TILE + dense.shape[0]] = F.linear(x, dense)
        return y

    @guarded
    def linear_add(self, x: torch.Tensor, w: Any, residual: torch.Tensor) -> torch.Tensor:
        if self.kernels is None or not isinstance(w, TiledHandle) or x.shape[0] > MANY:
            return self.add(residual, self.linear(x, w))
        x, residual = self._rows(x), residual.float().contiguous()
        few = x.shape[0] <= FEW
        return self.kernels.matvec(x, w, residual) if few else self.kernels.gemm(x, w, residual)

    @guarded
    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        if self.kernels is None or x.dtype != torch.float32 or not _rows_only(x):
            return super().norm(x, norm)
        return self.kernels.norm(x, norm, half=x.dim() == 2)

    @guarded
    def rope(self, x: torch.Tensor, rope: Rope, step: Step) -> Any:
        """Mark few rows as to be rotated; the attention kernel rotates them when it reads them."""
        if self.kernels is None or x.shape[0] > FEW or not _rows_only(x):
            return super().rope(x, rope, step)
        return Turned(x.float(), rope, step.positions)

    def _turn(self, x: torch.Tensor | Turned) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x
        assert self.kernels is not None
        return self.kernels.rope(x.x, x.rope, x.positions)

    @guarded
    def attention(self, q: Any, k: Any, v: torch.Tensor, spec: Attention, step: Step) -> torch.Tensor:
        one_each = step.rows == len(step.segments)
        if self.kernels is None or not one_each or not can_attend(q.shape[2]):
            self._recordable = self._recordable and not one_each
            return super().attention(self._turn(q), self._turn(k), v, spec, step)
        rope = None
        if isinstance(q, Turned) and isinstance(k, Turned) and q.rope is k.rope:
            q, k, rope = q.x, k.x, q.rope
        else:
            q, k = self._turn(q), self._turn(k)
        outputs = []
        for i, segment in enumerate(step.segments):
            row = slice(i, i + 1)
            q1, k1, v1 = (x[row].float().contiguous() for x in (q, k, v))
            cache, position = own(segment.cache), step.positions[row]
            outputs.append(self.kernels.attend(q1, k1, v1, cache, spec, position, rope))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @guarded
    def glu(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        joined = gate._base if gate._base is not None and gate._base is up._base else None
        halves = joined is not None and joined.shape == (gate.shape[0], 2 * gate.shape[1])
        if self.kernels is None or joined is None or not halves or joined.dtype != torch.float16:
            return super().glu(gate, up, kind)
        return self.kernels.glu(joined, kind)

    def mlp(self, x: Any, mlp: Mlp, norm: Norm | None = None, residual: Any | None = None) -> torch.Tensor:
        if self.kernels is None or x.shape[0] > FEW or not can_glu(mlp.gate_up):
            made: torch.Tensor = Backend.mlp(self, x, mlp, norm, residual)
            return made
        h = self._rows(x if norm is None else self.norm(x, norm))
        assert isinstance(mlp.gate_up, TiledHandle)
        h = self.kernels.matvec_glu(h, mlp.gate_up, mlp.act)
        return self.linear(h, mlp.down) if residual is None else self.linear_add(h, mlp.down, residual)

    @guarded
    def moe(self, x: Any, moe: Moe, norm: Norm | None = None, residual: Any | None = None) -> torch.Tensor:
        experts: Experts = moe.experts
        if self.kernels is None or not experts.on_kernels(moe):
            self._recordable = False  # the host reads which rows go to which expert
            return super().moe(x, moe, norm, residual)
        h = self._rows(x if norm is None else self.norm(x, norm))
        choice, share = route_rows(self.kernels, self.linear(h, moe.router).float().contiguous(), moe)
        shared = experts.shared(moe)
        other = None if shared is None else self.mlp(h, shared).float().contiguous()
        added = None if residual is None else residual.float().contiguous()
        mixture = Mixture(self.kernels, moe, choice, share, other, added)
        return mixture.few(h) if h.shape[0] <= FEW else mixture.many(h)

    # whole steps ----------------------------------------------------------------------------------------
    def capture(self, fn: StepFn) -> StepFn:
        """Record a CUDA graph.

        This needs kernels that read the position from the device, so not in pure torch.
        """
        if self.kernels is None or self.device.type != "cuda":
            return fn
        return Replay(fn, lambda: self._recordable)

    def sampler(
        self, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None,
        penalty: float = 1.0, seen: Sequence[int] = (),
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:  # fmt: skip
        """Sample with the host sampler's random numbers.

        The same seed gives the same tokens, except for rounding.

        Returns None without kernels and with a penalty. Then the host samples, and no step runs ahead.
        """
        if self.kernels is None or penalty != 1:
            return None
        kernels, rng = self.kernels, np.random.default_rng(seed)

        def draw(logits: torch.Tensor) -> torch.Tensor:
            chance = 0.0 if temperature == 0 else float(rng.random())
            row = logits[-1:].float().contiguous()
            token = kernels.sample(row, temperature, top_k, top_p, min_p, chance)
            if self.device.type == "cuda":
                host = torch.empty(1, dtype=torch.int32, pin_memory=True)
                host.copy_(token, non_blocking=True)
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                arrived.record()
                token.arrived = arrived, host  # type: ignore[attr-defined]
            return token

        return draw

    def to_host(self, x: torch.Tensor | Turned) -> F32:
        """Copy to the host. For a sampled token only its event is waited for; the next step keeps running."""
        x = self._turn(x)
        arrived = getattr(x, "arrived", None)
        if arrived is None:
            return super().to_host(x)
        event, host = arrived
        event.synchronize()
        token: F32 = host.numpy().astype(np.float32)
        return token

    def describe(self) -> Device:
        kind = str(self.dtype).removeprefix("torch.")
        kv = "int8" if self.int8_kv else kind
        if self.device.type == "cpu":
            note = f"CPU tensors for testing ({devices.ENVIRONMENT}=cpu), pure torch, {kind}, KV {kv}"
            return Device(self.name, "CPU", f"torch {torch.__version__}: {note}")
        p = torch.cuda.get_device_properties(self.device)
        memory = "shared memory" if devices.is_shared(self.device) else "memory"
        path = "pure torch" if self.kernels is None else "own int4 kernels"
        detail = f"sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB {memory}, {path}, {kind}, KV {kv}"
        return Device(self.name, p.name, f"{detail}, torch {torch.__version__} (CUDA {torch.version.cuda})")


def _rows_only(x: torch.Tensor) -> bool:
    """Return whether x (T, C) or (T, H, D) is contiguous within a row. Rows may have any stride."""
    return x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])
