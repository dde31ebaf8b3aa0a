"""The decoder graph. Differences between families are data (ArchSpec); a Backend executes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tinychat_mlx.base.errors import FormatError
from tinychat_mlx.contract import (
    Attention,
    Backend,
    Cache,
    CacheShape,
    Choice,
    Handle,
    Mlp,
    Moe,
    Norm,
    Rope,
    Segment,
    Step,
    StepFn,
    Tensor,
)
from tinychat_mlx.model.config import ModelConfig
from tinychat_mlx.model.rope import RopeTable
from tinychat_mlx.weights.weight import F32, Weight, join, take_rows


class Source(Protocol):
    """A provider of weights: a checkpoint, or the layer that AWQ is quantising."""

    def has(self, name: str) -> bool: ...

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight: ...

    def vector(self, name: str) -> F32: ...


@dataclass(frozen=True)
class Layer:
    """One block's weights on the device. A norm that the family lacks is absent."""

    norms: dict[str, Norm]  # a subset of pre_attn, post_attn, pre_mlp, post_mlp, q_norm, k_norm
    qkv: tuple[Handle, ...]  # q, k, v joined into one, or three of different forms
    o: Handle
    mlp: Mlp | Moe
    rope: Rope | None
    attention: Attention


@dataclass(frozen=True)
class Inputs:
    """The weights before the first layer: token embeddings, and learned positions and a norm if there are any."""

    tokens: Handle
    positions: Handle | None = None
    norm: Norm | None = None


class Graph:
    """The computation. Each call gets its weights, so that AWQ can run one layer at a time."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend

    def embedded(self, inputs: Inputs, ids: Tensor, step: Step) -> Tensor:
        """ids (T,) -> the first layer's input (T, C)."""
        b = self.backend
        x = b.embed(inputs.tokens, ids)
        if self.config.embed_scale != 1:
            x = b.scale(x, self.config.embed_scale)
        if inputs.positions is not None:
            x = b.add(x, b.embed(inputs.positions, step.positions))
        return x if inputs.norm is None else b.norm(x, inputs.norm)

    def logits(self, x: Tensor, norm: Norm, head: Handle, choice: Choice | None = None) -> Tensor:
        """The last layer's output (T, C) -> (T, V). choice: as returned by `before_scaling`."""
        y = self.backend.head(x, norm, head, choice)
        if self.config.logit_scale != 1:
            y = self.backend.scale(y, self.config.logit_scale)
        return self.backend.softcap(y, self.config.final_softcap) if self.config.final_softcap else y

    def before_scaling(self, choice: Choice | None) -> Choice | None:
        """Translate choice to the head's raw output (before scaling and soft-cap); None if impossible."""
        if choice is None or self.config.logit_scale <= 0:
            return None
        if choice.temperature == 0 or self.config.logit_scale == 1 and not self.config.final_softcap:
            return choice
        if self.config.final_softcap:  # changes the distances between logits: `tail` would not hold
            return None
        return replace(choice, temperature=choice.temperature / self.config.logit_scale)

    def block(self, x: Tensor, layer: Layer, step: Step) -> Tensor:
        """One decoder layer: x (T, C) -> (T, C)."""
        norms, b = layer.norms, self.backend
        if self.config.spec.parallel:
            h = b.norm(x, norms["pre_attn"])
            y = b.linear_add(self.attention(h, None, layer, step), layer.o, x)
            if "pre_mlp" in norms:
                return self.mlp(x, layer, norms["pre_mlp"], y)
            return self.mlp(h, layer, None, y)
        y = self.attention(x, norms.get("pre_attn"), layer, step)
        x = self.add(y, layer.o, x, norms.get("post_attn"))
        if self.config.residual_scale == 1 and "post_mlp" not in norms:
            return self.mlp(x, layer, norms.get("pre_mlp"), x)
        y = self.mlp(x, layer, norms.get("pre_mlp"))
        if "post_mlp" in norms:
            y = b.norm(y, norms["post_mlp"])
        return b.add(x, y, self.config.residual_scale)

    def mlp(self, x: Tensor, layer: Layer, norm: Norm | None, residual: Tensor | None = None) -> Tensor:
        if isinstance(layer.mlp, Moe):
            return self.backend.moe(x, layer.mlp, norm, residual)
        return self.backend.mlp(x, layer.mlp, norm, residual)

    def add(self, y: Tensor, w: Handle, residual: Tensor, norm: Norm | None) -> Tensor:
        """residual + scale * norm(linear(y))."""
        if norm is None and self.config.residual_scale == 1:
            return self.backend.linear_add(y, w, residual)
        y = self.backend.linear(y, w)
        return self.backend.add(
            residual, y if norm is None else self.backend.norm(y, norm), self.config.residual_scale
        )

    def attention(self, x: Tensor, norm: Norm | None, layer: Layer, step: Step) -> Tensor:
        """x (T, C) -> the outputs of the heads (T, H·D), before the o projection."""
        b, c = self.backend, self.config
        q, k, v = self.qkv(x, norm, layer)
        norms, rows = layer.norms, q.shape[0]
        if c.spec.qk_norm == "full":
            q, k = b.norm(q, norms["q_norm"]), b.norm(k, norms["k_norm"])
        q = q.reshape(rows, c.num_attention_heads, c.head_dim)
        k = k.reshape(rows, c.num_key_value_heads, c.head_dim)
        v = v.reshape(rows, c.num_key_value_heads, c.head_dim)
        if c.spec.qk_norm == "head":
            q, k = b.norm(q, norms["q_norm"]), b.norm(k, norms["k_norm"])
        if layer.rope is not None:
            q, k = b.rope(q, layer.rope, step), b.rope(k, layer.rope, step)
        return b.attention(q, k, v, layer.attention, step)

    def qkv(self, x: Tensor, norm: Norm | None, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, C) -> q (T, H·D), k, v (T, Hkv·D): slices of one product if the three are joined."""
        b, c = self.backend, self.config
        if len(layer.qkv) == 3:
            h = x if norm is None else b.norm(x, norm)
            q, k, v = (b.linear(h, w) for w in layer.qkv)
            return q, k, v
        w = layer.qkv[0]
        y = b.linear(x, w) if norm is None else b.norm_linear(x, norm, w)
        q_end = c.num_attention_heads * c.head_dim
        k_end = q_end + c.num_key_value_heads * c.head_dim
        return y[:, :q_end], y[:, q_end:k_end], y[:, k_end:]


class Decoder:
    """A whole model on its device: token ids -> logits; T rows, no batch axis."""

    def __init__(
        self,
        config: ModelConfig,
        source: Source,
        backend: Backend,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Read, join and pack the weights, one at a time."""
        self.config, self.backend, self.graph = config, backend, Graph(config, backend)
        loader = Loader(config, source, backend)
        total = config.num_hidden_layers + 2
        self.inputs = loader.inputs()
        # before the layers: packing holds a large matrix in memory twice
        self.head = loader.head(self.inputs.tokens)
        progress(1, total)
        self.layers = []
        for layer in range(config.num_hidden_layers):
            self.layers.append(loader.layer(layer))
            progress(layer + 2, total)
        self.final_norm = loader.final_norm()
        progress(total, total)
        me = weakref.proxy(self)  # a reference cycle would keep the weights until the garbage collector runs
        self._one_row: StepFn = backend.capture(
            lambda ids, step: me._logits(me._hidden(ids, step), step.choice)
        )

    def new_cache(self, capacity: int) -> Cache:
        return self.backend.new_cache(cache_shape(self.config), capacity)

    def forward(
        self, ids: Sequence[int], cache: Cache, last_only: bool = True, choice: Choice | None = None
    ) -> Tensor:
        """Continue cache with ids (T,) -> logits (1, V) of the last token, or (T, V) of all.

        choice: the rule for choosing the next token, if the last token's logits have no other use.
        """
        on_device = self.backend.ids(ids)
        if len(ids) == 1:
            return self.advance(on_device, cache, choice)
        x = self._hidden(on_device, self.backend.step((Segment(cache, len(ids)),)))
        cache.length += len(ids)
        return self._logits(x[len(ids) - 1 :] if last_only else x, self.graph.before_scaling(choice))

    def advance(self, token: Tensor, cache: Cache, choice: Choice | None = None) -> Tensor:
        """Run `forward` for one token (1,) that is on the device -> logits (1, V)."""
        step = self.backend.step((Segment(cache, 1),))
        logits = self._one_row(token, replace(step, choice=self.graph.before_scaling(choice)))
        cache.length += 1
        return logits

    def _hidden(self, ids: Tensor, step: Step) -> Tensor:
        x = self.graph.embedded(self.inputs, ids, step)
        for layer in self.layers:
            x = self.graph.block(x, layer, step)
        return x

    def _logits(self, x: Tensor, choice: Choice | None = None) -> Tensor:
        return self.graph.logits(x, self.final_norm, self.head, choice)


def cache_shape(config: ModelConfig) -> CacheShape:
    return CacheShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


class Loader:
    """Reads a family's weights from a source by role, joins those with the same input, and packs them."""

    def __init__(self, config: ModelConfig, source: Source, backend: Backend) -> None:
        self.config, self.spec, self.source, self.backend = config, config.spec, source, backend
        self.ropes: dict[int, Rope] = {}

    def inputs(self) -> Inputs:
        c = self.config
        tokens = self.matrix("embed", None, c.vocab_size, c.hidden_size)
        norm = self.norm(self.spec.name("embed_norm"), c.hidden_size) if self.spec.embed_norm else None
        if self.spec.positions != "learned":
            return Inputs(tokens, None, norm)
        rows, offset = c.max_position_embeddings, self.spec.position_offset
        name = self.spec.name("positions")

        def table() -> Weight:
            whole = self.source.weight(name, (rows + offset, c.hidden_size))
            return take_rows(name, whole, np.arange(offset, rows + offset))

        return Inputs(tokens, self.packed(name, (rows, c.hidden_size), table), norm)

    def head(self, embed: Handle) -> Handle:
        """Return the output projection: the embedding if the checkpoint has no head (tied)."""
        if not self.source.has(self.spec.name("head")):
            return embed
        return self.matrix("head", None, self.config.vocab_size, self.config.hidden_size)

    def final_norm(self) -> Norm:
        return self.norm(self.spec.name("final_norm"), self.config.hidden_size)

    def weight(self, role: str, layer: int | None, n: int, k: int) -> Weight:
        return self.source.weight(self.spec.name(role, layer), (n, k))

    def packed(self, name: str, shape: tuple[int, int], read: Callable[[], Weight]) -> Handle:
        """Return the weight that the device has stored, else read and pack it."""
        return self.backend.stored(name, shape) or self.backend.pack(read())

    def matrix(self, role: str, layer: int | None, n: int, k: int) -> Handle:
        name = self.spec.name(role, layer)
        return self.packed(name, (n, k), lambda: self.source.weight(name, (n, k)))

    def norm(self, name: str, size: int) -> Norm:
        weight = self.vector(f"{name}.weight", size) + np.float32(self.spec.norm_offset)
        has_bias = self.spec.norm == "layer" and self.source.has(f"{name}.bias")
        bias = self.backend.put(self.vector(f"{name}.bias", size)) if has_bias else None
        return Norm(name, self.spec.norm, self.backend.put(weight), bias, self.config.norm_eps)

    def vector(self, name: str, size: int) -> F32:
        v = self.source.vector(name)
        if v.shape != (size,):
            raise FormatError(f"the shape is {list(v.shape)}, config.json requires [{size}]", where=name)
        return v

    def norms(self, layer: int) -> dict[str, Norm]:
        c = self.config
        sizes = dict.fromkeys(self.spec.norms, c.hidden_size)
        if self.spec.qk_norm:
            heads = {"head": (1, 1), "full": (c.num_attention_heads, c.num_key_value_heads)}
            q, k = heads[self.spec.qk_norm]
            sizes |= {"q_norm": q * c.head_dim, "k_norm": k * c.head_dim}
        return {role: self.norm(self.spec.name(role, layer), size) for role, size in sizes.items()}

    def joined(self, layer: int, name: str, sizes: dict[str, int]) -> tuple[Handle, ...]:
        """Return one handle for weights with the same input (role -> N), or one each if their forms differ."""
        k, name = self.config.hidden_size, f"{self.spec.prefix(layer)}.{name}"
        if one := self.backend.stored(name, (sum(sizes.values()), k)):
            return (one,)
        names = {self.spec.name(role, layer): n for role, n in sizes.items()}
        if len(names) > 1:
            each = [self.backend.stored(part, (n, k)) for part, n in names.items()]
            if (found := tuple(w for w in each if w is not None)) and len(found) == len(each):
                return found
        parts = [self.source.weight(part, (n, k)) for part, n in names.items()]
        if self.spec.qkv == "heads" and "qkv" in sizes:
            parts = [take_rows(parts[0].name, parts[0], heads_to_blocks(self.config))]
        whole = join(name, parts)
        return tuple(self.backend.pack(w) for w in ([whole] if whole is not None else parts))

    def rope(self, table: RopeTable | None) -> Rope | None:
        """Return the device's copy of a table. Layers that share a table share the copy."""
        if table is None:
            return None
        if id(table) not in self.ropes:
            inv_freq = self.backend.put(table.inv_freq)
            self.ropes[id(table)] = Rope(inv_freq, table.factor, self.spec.rope_interleaved)
        return self.ropes[id(table)]

    def layer(self, layer: int) -> Layer:
        c = self.config
        return Layer(
            norms=self.norms(layer),
            qkv=self.qkv(layer),
            o=self.matrix("o", layer, c.hidden_size, c.num_attention_heads * c.head_dim),
            mlp=self.moe(layer) if c.moe is not None and c.moe.layers[layer] else self.mlp(layer),
            rope=self.rope(c.rope[layer]),
            attention=Attention(layer, c.attention_scale, c.window[layer], c.attn_softcap, c.alibi),
        )

    def qkv(self, layer: int) -> tuple[Handle, ...]:
        c = self.config
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return self.joined(layer, "qkv", {"qkv": q + 2 * kv} if self.spec.qkv else {"q": q, "k": kv, "v": kv})

    def mlp(self, layer: int) -> Mlp:
        c = self.config
        inner = c.intermediate_size
        down = self.matrix("down", layer, c.hidden_size, inner)
        if not self.spec.gated:
            return Mlp(c.act, down, up=self.matrix("up", layer, inner, c.hidden_size))
        sizes = {"gate_up": 2 * inner} if self.spec.fused_gate_up else {"gate": inner, "up": inner}
        handles = self.joined(layer, "gate_up", sizes)
        if len(handles) == 1:
            return Mlp(c.act, down, gate_up=handles[0])
        return Mlp(c.act, down, gate=handles[0], up=handles[1])

    def moe(self, layer: int) -> Moe:
        c, m = self.config, self.config.moe
        assert m is not None
        router = self.weight("router", layer, m.num_experts, c.hidden_size)
        if m.shared_expert_intermediate_size:
            gate = self.weight("shared_router", layer, 1, c.hidden_size)
            whole = join(f"{router.name}+shared", [router, gate])
            assert whole is not None, "a router is dense"
            router = whole
        experts = self.backend.pack_experts(c.act, self.experts(layer))
        handle = self.backend.pack(router)
        return Moe(c.act, handle, experts, m.num_experts, m.num_experts_per_tok, m.norm_topk_prob)

    def experts(self, layer: int) -> Iterator[tuple[Weight, Weight]]:
        """Yield each expert's (gate_up, down), read on demand; the shared expert last."""
        c, m = self.config, self.config.moe
        assert m is not None
        names = [
            tuple(self.spec.expert(r, layer, e) for r in ("gate", "up", "down")) for e in range(m.num_experts)
        ]
        sizes = [m.moe_intermediate_size] * m.num_experts
        if m.shared_expert_intermediate_size:
            names.append(tuple(self.spec.name(f"shared_{r}", layer) for r in ("gate", "up", "down")))
            sizes.append(m.shared_expert_intermediate_size)
        for (gate, up, down), size in zip(names, sizes, strict=True):
            parts = [self.source.weight(name, (size, c.hidden_size)) for name in (gate, up)]
            whole = join(f"{gate}+up", parts)
            if whole is None:
                raise FormatError(
                    f"{gate} and {up} are stored in different forms", remedy="quantise both in the same form"
                )
            yield whole, self.source.weight(down, (c.hidden_size, size))


def heads_to_blocks(config: ModelConfig) -> npt.NDArray[np.intp]:
    """Return the row order that turns a per-head qkv (each kv head's queries, k, v) into all q, all k, all v."""
    kv_heads, size = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // kv_heads
    rows = np.arange(kv_heads * (queries + 2) * size).reshape(kv_heads, queries + 2, size)
    return np.concatenate([rows[:, :queries].ravel(), rows[:, queries].ravel(), rows[:, queries + 1].ravel()])
