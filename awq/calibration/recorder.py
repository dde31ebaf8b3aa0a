"""Run one decoder layer over the calibration rows and record its linears' inputs, with a backend wrapper.

The graph needs no hooks, because the backend sees every input that it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.sites import LayerWeights, Site, sites
from tinychat_mlx.contract import (
    Attention,
    Backend,
    Cache,
    CacheShape,
    Device,
    Handle,
    Memory,
    Mlp,
    Moe,
    Norm,
    Rope,
    Segment,
    Step,
    Tensor,
    route,
)
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.decoder import Graph, Layer, Loader, Source
from tinychat_mlx.weights.weight import F32, Weight, join, take_rows

WINDOW = 512  # maximum tokens of a text read at once, for calibration and for measuring the loss
STEP_ROWS = 2048  # calibration rows per step; limits the memory of a layer's intermediates


class Reached(Exception):
    """The requested input has been recorded, so the rest of the layer need not run."""


@dataclass(frozen=True)
class Routing:
    """The input of a mixture: rows h (T, C) after the norm, their experts (T, k) and weights (T, k)."""

    h: F32
    choice: npt.NDArray[np.intp]
    share: F32

    @classmethod
    def joined(cls, steps: Sequence[Routing]) -> Routing:
        """Concatenate the rows of several steps."""
        parts = ([getattr(step, field) for step in steps] for field in ("h", "choice", "share"))
        h, choice, share = map(np.concatenate, parts)
        return cls(h, choice, share)

    def weight(self, expert: int) -> F32:
        """Return each row's weight (T,) of one expert, 0 if the row does not use it."""
        weight: F32 = np.where(self.choice == expert, self.share, np.float32(0)).sum(-1)
        return weight


Seen = Callable[[str, Tensor], None]  # called with a linear's name and its input


def _ignored(name: str, x: Tensor) -> None:
    """Ignore an input."""


class Recorder(Backend):
    """A wrapper of another backend whose `linear` first shows its input. Composites run as primitives.

    Experts are neither read nor run. A mixture stores its routing in `routed` and adds nothing to the
    residual. Afterwards all its rows are known, and the experts can be processed one at a time (experts.py).
    """

    def __init__(self, inner: Backend) -> None:
        self.inner, self.name = inner, inner.name
        self.seen: Seen = _ignored
        self.routed: Routing | None = None

    @contextmanager
    def showing(self, seen: Seen) -> Iterator[None]:
        """Call seen(name, input) at every linear. Afterwards `seen`, which may reference weights, is released."""
        self.seen = seen
        try:
            yield
        finally:
            self.seen = _ignored

    def linear(self, x: Tensor, w: Handle) -> Tensor:
        self.seen(w.name, x)
        return self.inner.linear(x, w)

    def put(self, array: npt.NDArray[Any]) -> Tensor:
        return self.inner.put(array)

    def ids(self, ids: Sequence[int]) -> Tensor:
        return self.inner.ids(ids)

    def pack(self, weight: Weight) -> Handle:
        return self.inner.pack(weight)

    def pack_experts(self, act: str, experts: Iterable[tuple[Weight, Weight]]) -> Any:
        return ()

    def moe(self, x: Tensor, moe: Moe, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        assert norm is not None and residual is not None, "experts are added to the residual afterwards"
        h = self.norm(x, norm)
        choice, share = route(self.to_host(self.linear(h, moe.router)), moe)
        self.routed = Routing(self.to_host(h), choice, share)
        return residual

    def new_cache(self, shape: CacheShape, capacity: int) -> Cache:
        return self.inner.new_cache(shape, capacity)

    def step(self, segments: Sequence[Segment]) -> Step:
        return self.inner.step(segments)

    def embed(self, table: Handle, ids: Tensor) -> Tensor:
        return self.inner.embed(table, ids)

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self.inner.norm(x, norm)

    def rope(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        return self.inner.rope(x, rope, step)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention, step: Step) -> Tensor:
        return self.inner.attention(q, k, v, spec, step)

    def act(self, x: Tensor, kind: str) -> Tensor:
        return self.inner.act(x, kind)

    def glu(self, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        return self.inner.glu(gate, up, kind)

    def add(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner.add(a, b, scale)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self.inner.scale(x, factor)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return self.inner.softcap(x, cap)

    def to_host(self, x: Tensor) -> F32:
        return self.inner.to_host(x)

    def memory(self) -> Memory:
        return self.inner.memory()

    def describe(self) -> Device:
        return self.inner.describe()


def window_of(config: ModelConfig, most: int = WINDOW) -> int:
    """Return the number of tokens that a model reads at once."""
    return min(most, config.max_position_embeddings)


class Windows:
    """Steps over rows of a text that is cut into windows.

    Each window is a separate conversation from position 0.

    The caches, for one layer, are created once. Their lengths stay 0, so every step starts from empty caches.
    """

    def __init__(self, config: ModelConfig, backend: Backend, window: int) -> None:
        self.backend, self.window = backend, window
        self._shape = CacheShape(1, config.num_key_value_heads, config.head_dim)
        self._caches: list[Cache] = []

    def step(self, rows: int) -> Step:
        """Return a step over whole windows; the last may be shorter."""
        while len(self._caches) * self.window < rows:
            self._caches.append(self.backend.new_cache(self._shape, self.window))
        starts = range(0, rows, self.window)
        sizes = [min(self.window, rows - at) for at in starts]
        return self.backend.step([Segment(*pair) for pair in zip(self._caches, sizes, strict=False)])


def alone(layer: Layer) -> Layer:
    """Return the layer with its keys and values in a cache of one layer."""
    return replace(layer, attention=replace(layer.attention, layer=0))


class LayerRun:
    """One layer on a device, without its experts, that runs the calibration rows in steps."""

    def __init__(
        self, config: ModelConfig, layer: int, source: Source, backend: Recorder, window: int
    ) -> None:
        self.backend, self.windows = backend, Windows(config, backend, window)
        self.graph = Graph(config, backend)
        self.layer = alone(Loader(config, source, backend).layer(layer))
        self.sites = sites(config, layer)
        self.keys = {name: site.key for site in self.sites for name in self._names(self.layer, site)}
        self.routings: list[Routing] = []  # of each pass, if the layer has experts

    @staticmethod
    def _names(layer: Layer, site: Site) -> list[str]:
        """Return the names of the handles that read the site's input, without those that would show it again."""
        mlp, first = layer.mlp, {"q": layer.qkv[0], "o": layer.o}
        if isinstance(mlp, Mlp):
            mlp_first = mlp.gate_up or mlp.gate or mlp.up
            assert mlp_first is not None
            first |= {"gate": mlp_first, "up": mlp_first, "down": mlp.down}
        else:  # the experts read what the router reads; later inputs belong to one expert
            first |= {"gate": mlp.router}
        role = site.roles[0]
        return [first[role].name] if role in first else []

    def forward(self, x: F32, seen: Callable[[str, F32], None] | None = None) -> F32:
        """Run rows x (T, C) of one step and return the layer's output. Calls seen(key, input) at every site."""

        def show(name: str, tensor: Tensor) -> None:
            if seen is not None and name in self.keys:
                seen(self.keys[name], self.backend.to_host(tensor))

        return self.backend.to_host(self._run(x, show))

    def input_of(self, site: str, x: F32) -> F32:
        """Run rows x (T, C) of one step up to a site, by its key, and return the site's input (T, K)."""
        found: list[F32] = []

        def show(name: str, tensor: Tensor) -> None:
            if self.keys.get(name) == site:
                found.append(self.backend.to_host(tensor))
                raise Reached

        with suppress(Reached):
            self._run(x, show)
        return found[0]

    def _run(self, x: F32, seen: Callable[[str, Tensor], None]) -> Tensor:
        step = self.windows.step(len(x))
        self.backend.routed = None
        with self.backend.showing(seen):
            y = self.graph.block(self.backend.put(x), self.layer, step)
        if self.backend.routed is not None:
            self.routings.append(self.backend.routed)
        return y


class ExpertRun:
    """One expert on a device."""

    def __init__(self, act: str, gate: Weight, up: Weight, down: Weight, backend: Recorder) -> None:
        joined = join("gate_up", [gate, up])
        assert joined is not None, "an expert's gate and up have one form"
        self.backend = backend
        self.mlp = Mlp(act, backend.pack(down), gate_up=backend.pack(joined))

    @classmethod
    def of(cls, weights: LayerWeights, backend: Recorder) -> ExpertRun:
        """Create a float expert."""
        gate, up, down = (weights.weight(weights.name(m)) for m in weights.modules())
        return cls(weights.config.act, gate, up, down, backend)

    def forward(self, h: F32) -> tuple[F32, F32]:
        """Run rows h (T, C). Returns the inputs of down (T, F) and the expert's output (T, C)."""
        got: list[F32] = []

        def seen(name: str, tensor: Tensor) -> None:
            if name == self.mlp.down.name:
                got.append(self.backend.to_host(tensor))

        with self.backend.showing(seen):
            y = self.backend.to_host(self.backend.mlp(self.backend.put(h), self.mlp))
        return got[0], y


def steps(rows: int, window: int) -> Iterator[slice]:
    """Split the calibration rows into steps of whole windows, about STEP_ROWS each."""
    size = max(1, STEP_ROWS // window) * window
    for at in range(0, rows, size):
        yield slice(at, min(at + size, rows))


class _Rows:
    """A source whose embedding has only the given rows."""

    def __init__(self, source: Source, module: str, rows: npt.NDArray[np.intp]) -> None:
        self.source, self.module, self.rows = source, module, rows

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        if module != self.module:
            return self.source.weight(module, shape)
        return take_rows(module, self.source.weight(module), self.rows)

    def vector(self, name: str) -> F32:
        return self.source.vector(name)


def embedded_rows(
    config: ModelConfig, source: Source, backend: Backend, ids: npt.NDArray[np.int32], window: int
) -> F32:
    """Embed calibration tokens (T,).

    Returns the rows (T, C) that enter the first layer; windows start at position 0.
    """
    used, at = np.unique(ids, return_inverse=True)
    config = replace(config, vocab_size=len(used))
    inputs = Loader(config, _Rows(source, config.spec.name("embed"), used.astype(np.intp)), backend).inputs()
    graph, windows, pieces = Graph(config, backend), Windows(config, backend, window), []
    for rows in steps(len(ids), window):
        x = graph.embedded(inputs, backend.ids(at[rows].tolist()), windows.step(rows.stop - rows.start))
        pieces.append(backend.to_host(x))
    return np.concatenate(pieces)
