"""The contract between the decoder graph and the backends.

The graph passes opaque tensors between backend methods. It reads their `shape`, reshapes them and slices them, and
computes nothing itself. Every number comes from a backend method, so a backend can record the calls once and replay
them (`capture`).

The methods form three groups: loading (`put`, `pack`, `new_cache`), step primitives, and composites, which have a
default implementation in terms of the primitives. A new backend implements the primitives; a fast one overrides
composites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinychat_mlx.weights.weight import F32, Weight

ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # activations; native kernels number them in this order
Tensor = Any  # a backend's own array: numpy.ndarray, mlx.core.array, torch.Tensor


class Handle(Protocol):
    """A weight on its device, in the device's layout: the result of `pack`."""

    name: str
    shape: tuple[int, int]  # (N, K)


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm: weight (C,), bias (C,) or None. For Gemma, weight already includes the + 1."""

    name: str
    kind: str  # "rms" | "layer"
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Rope:
    """Rotary positions: inv_freq (R/2,) rotates the first R inputs of a head; cos and sin are multiplied by factor.

    Pairs are (i, i + R/2), or (2i, 2i + 1) if interleaved.
    """

    inv_freq: Tensor
    factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class Attention:
    """Parameters of one layer's attention: scores q·k × scale, soft-capped, causal within a window (0: no limit)."""

    layer: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    alibi: tuple[float, ...] | None = None  # one slope per head


@dataclass(frozen=True)
class Mlp:
    """A gated MLP (gate_up joined along N with the gate rows first, or separate gate and up), or a plain one (up)."""

    act: str
    down: Handle
    gate_up: Handle | None = None
    gate: Handle | None = None
    up: Handle | None = None


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: each row goes to top_k of E experts, weighted by the router's softmax.

    router (E, C), or (E + 1, C) with a shared expert that sees every row: the sigmoid of the last row is its weight.
    normalise: scale the chosen weights to sum to 1. experts: the result of `pack_experts` for the E experts, with the
    shared one last.
    """

    act: str
    router: Handle
    experts: Any
    num_experts: int
    top_k: int
    normalise: bool


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a KV cache."""

    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int

    def bytes_per_token(self, itemsize: int = 2) -> int:
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize


class Cache:
    """Keys and values of one conversation; subclasses hold the storage.

    `length` tokens are valid. The engine advances it after a step; storage beyond it is scratch.
    """

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.shape, self.capacity, self.length = shape, capacity, 0

    def rewind(self, length: int) -> None:
        """Discard all but the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length


@dataclass(frozen=True)
class Segment:
    """`rows` consecutive rows of a step that continue the tokens in `cache`."""

    cache: Cache
    rows: int


@dataclass(frozen=True)
class Choice:
    """The rule by which a token is chosen from a row of logits: the largest (temperature 0), or sampled.

    The backend may return approximate logits for tokens that cannot be chosen: those that cannot be the maximum, or
    whose total probability is at most `tail`.
    """

    temperature: float = 0.0
    tail: float = 0.0


@dataclass(frozen=True)
class Step:
    """The assignment of a pass's rows to caches. Only `rope`, `attention` and `head` (its choice) read it.

    positions (T,) int32 is on the device; each segment counts up from its cache's length. choice None: all logits must
    be exact.
    """

    segments: tuple[Segment, ...]
    positions: Tensor
    choice: Choice | None = None

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.segments)


@dataclass(frozen=True)
class Memory:
    """Bytes that this backend uses now, its peak, and the limit that the device recommends (0: unknown)."""

    used: int
    peak: int
    limit: int


@dataclass(frozen=True)
class Device:
    """The device that runs the model, and why it was selected; printed in the chat's header and by `doctor`."""

    backend: str  # "cpu"
    name: str  # "AMD Ryzen …", "Apple M1"
    detail: str  # "avx512vnni, 2 threads"
    why: str = ""
    features: tuple[str, ...] = field(default=())


StepFn = Callable[[Tensor, Step], Tensor]


class Backend:
    """Base class of the backends. Shapes: T rows, H heads of D, Hkv key/value heads, N outputs, K inputs."""

    name = "abstract"
    threads: int | None = None  # of the host that compute; None: this backend does not choose

    # costs, known before loading ---------------------------------------------------------------------
    def weight_bytes(self, weight: Weight) -> int:
        """Bytes that `pack` keeps for a weight of this form. The weight may be a small example of its form."""
        raise NotImplementedError

    def kv_bytes(self, shape: CacheShape) -> int:
        """Cache bytes per token."""
        raise NotImplementedError

    def loading_bytes(self, largest: int) -> int:
        """Bytes taken for a while as weights are packed, besides the weights. largest: numbers of the largest one."""
        return 0

    def score_bytes(self, heads: int, rows: int) -> int:
        """Bytes per token of context that `attention` takes while `rows` rows of `heads` heads are computed."""
        return 0

    def own_memory(self) -> bool:
        """Whether weights are in memory of the device's own, which the system knows nothing of."""
        return False

    # load ---------------------------------------------------------------------------------------
    def put(self, array: npt.NDArray[Any]) -> Tensor:
        """Copy a small constant (norm weight, inverse frequencies) to the device."""
        raise NotImplementedError

    def ids(self, ids: Sequence[int]) -> Tensor:
        """Copy token ids (T,) to the device as int32."""
        raise NotImplementedError

    def pack(self, weight: Weight) -> Handle:
        """Convert a canonical weight to the device's layout, once. The input may be a view of a mapped file."""
        raise NotImplementedError

    def kept(self, model: str, digest: str) -> AbstractContextManager[None]:
        """Return a context manager for the loading of a model: `pack` may write its results to disk for `stored`.

        model: a name for files; digest: identifies the model's exact content ("": unknown, so nothing is cached).
        """
        return nullcontext()

    def held_bytes(self, handle: Handle) -> int | None:
        """Bytes of a packed weight in this device's layout; None: those of the weight as it was given."""
        return None

    def stored(self, name: str, shape: tuple[int, int]) -> Handle | None:
        """Return the cached result of `pack` for the weight of this name and shape (N, K), or None if there is none."""
        return None

    def pack_experts(self, act: str, experts: Iterable[tuple[Weight, Weight]]) -> Any:
        """Pack the experts' weights, each (gate_up (2F, C), down (C, F)), the shared one last, for `moe`."""
        return tuple(Mlp(act, self.pack(down), gate_up=self.pack(up)) for up, down in experts)

    def new_cache(self, shape: CacheShape, capacity: int) -> Cache:
        raise NotImplementedError

    def read_cache(self, cache: Cache, start: int, end: int) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the stored state of tokens start to end: arrays (layers, Hkv, tokens, …) by name.

        Names, dtypes and the other sizes are the same for all caches of one model and storage type.
        """
        raise NotImplementedError

    def write_cache(self, cache: Cache, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append the arrays of `read_cache` after the tokens in cache; its length grows by their number."""
        raise NotImplementedError

    def step(self, segments: Sequence[Segment]) -> Step:
        """Describe a pass over the next rows of these segments."""
        spans = [np.arange(s.cache.length, s.cache.length + s.rows, dtype=np.int32) for s in segments]
        return Step(tuple(segments), self.put(np.concatenate(spans)))

    # step primitives ----------------------------------------------------------------------------
    def embed(self, table: Handle, ids: Tensor) -> Tensor:
        """Look up rows of table (V, C) -> (T, C)."""
        raise NotImplementedError

    def linear(self, x: Tensor, w: Handle) -> Tensor:
        """x (T, K) · w (N, K)ᵀ + the weight's bias -> (T, N)."""
        raise NotImplementedError

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Normalise the last axis, statistics in float32. x (T, C) or (T, H, D)."""
        raise NotImplementedError

    def rope(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        """Rotate x (T, H, D) by each row's position; may overwrite x."""
        raise NotImplementedError

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention, step: Step) -> Tensor:
        """Append k, v (T, Hkv, D) to the caches, then compute causal attention of q (T, H, D) -> (T, H·D)."""
        raise NotImplementedError

    def act(self, x: Tensor, kind: str) -> Tensor:
        """An activation, one of ACTS, elementwise."""
        raise NotImplementedError

    def glu(self, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        """act(gate) · up; both (T, F), possibly views into one joined tensor."""
        raise NotImplementedError

    def add(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """a + scale · b; may overwrite either."""
        raise NotImplementedError

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """factor · x; may overwrite x."""
        raise NotImplementedError

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap · tanh(x / cap); may overwrite x."""
        raise NotImplementedError

    # composites: a fast backend overrides these ---------------------------------------------------
    def norm_linear(self, x: Tensor, norm: Norm, w: Handle) -> Tensor:
        return self.linear(self.norm(x, norm), w)

    def head(self, x: Tensor, norm: Norm, w: Handle, choice: Choice | None = None) -> Tensor:
        """norm_linear to logits (T, V). One token per row is chosen by `choice`; None: all logits must be exact."""
        return self.norm_linear(x, norm, w)

    def linear_add(self, x: Tensor, w: Handle, residual: Tensor) -> Tensor:
        """residual + linear(x, w). Must not overwrite residual: parallel blocks read it again."""
        return self.add(residual, self.linear(x, w))

    def mlp(self, x: Tensor, mlp: Mlp, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """[residual +] down(act(up(norm(x)))), gated or plain. x (T, C) -> (T, C)."""
        h = x if norm is None else self.norm(x, norm)
        if mlp.gate_up is not None:
            y, half = self.linear(h, mlp.gate_up), mlp.gate_up.shape[0] // 2
            h = self.glu(y[:, :half], y[:, half:], mlp.act)
        elif mlp.gate is not None and mlp.up is not None:
            h = self.glu(self.linear(h, mlp.gate), self.linear(h, mlp.up), mlp.act)
        else:
            assert mlp.up is not None, "a plain MLP has `up`"
            h = self.act(self.linear(h, mlp.up), mlp.act)
        return self.linear(h, mlp.down) if residual is None else self.linear_add(h, mlp.down, residual)

    def moe(self, x: Tensor, moe: Moe, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """[residual +] the weighted sum of each row's experts. x (T, C) -> (T, C).

        This default routes on the host and runs the experts one after another. It is the reference, and the fall-back for
        experts that a backend cannot multiply by index. A step that uses it must not be captured.
        """
        h = x if norm is None else self.norm(x, norm)
        choice, share = route(self.to_host(self.linear(h, moe.router)), moe)
        rows, y = self.to_host(h), np.zeros(h.shape, np.float32)
        for e in np.unique(choice):
            t, slot = np.nonzero(choice == e)
            y[t] += share[t, slot, None] * self.to_host(self.mlp(self.put(rows[t]), moe.experts[e]))
        return self.put(y) if residual is None else self.add(residual, self.put(y))

    # whole steps ----------------------------------------------------------------------------------
    def capture(self, fn: StepFn) -> StepFn:
        """Return an equivalent function that is fast for repeated calls with one row and one segment."""
        return fn

    def sampler(
        self, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None,
        penalty: float = 1.0, seen: Sequence[int] = (),
    ) -> Callable[[Tensor], Tensor] | None:  # fmt: skip
        """Return a device-side sampler: logits (1, V) -> token id (1,) int32. It does not synchronise.

        It returns -1 if the logits are not finite. penalty applies to the tokens in seen and to each sampled token
        (sampler.penalised); 1 has no effect. The default None means that tokens are sampled on the host. A device that runs
        asynchronously to Python should implement this method.
        """
        return None

    def to_host(self, x: Tensor) -> F32:
        """Copy to a float32 ndarray: the only method that waits for the device."""
        raise NotImplementedError

    def memory(self) -> Memory:
        return Memory(0, 0, 0)

    def describe(self) -> Device:
        raise NotImplementedError


def route(logits: F32, moe: Moe) -> tuple[npt.NDArray[np.intp], F32]:
    """Router logits (T, E [+ 1]) -> the chosen experts (T, k [+ 1]) and their weights, largest first."""
    routed = logits[:, : moe.num_experts]
    p = np.exp(routed - routed.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    choice = np.argsort(-p, axis=-1, kind="stable")[:, : moe.top_k]
    share = np.take_along_axis(p, choice, -1)
    if moe.normalise:
        share /= share.sum(-1, keepdims=True)
    if logits.shape[1] > moe.num_experts:
        shared = 1 / (1 + np.exp(-logits[:, moe.num_experts :]))
        choice = np.concatenate([choice, np.full_like(choice[:, :1], moe.num_experts)], -1)
        share = np.concatenate([share, shared], -1)
    return choice, share.astype(np.float32)
