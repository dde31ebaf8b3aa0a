"""Derive from the ArchSpec which linears share an input and which weight absorbs 1/s."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tinychat_mlx.awq.search.quantizer import Quantized
from tinychat_mlx.model.config import ModelConfig, MoeConfig
from tinychat_mlx.model.decoder import Source, heads_to_blocks
from tinychat_mlx.weights.weight import F32, Dense, Weight

Index = npt.NDArray[np.intp]
UNCLIPPED = ("q", "k")  # q and k multiply each other, so the error of one output does not measure the result


@dataclass(frozen=True)
class Site:
    """An input of a layer, the linears that read it, and the role (norm or linear) that absorbs 1/s.

    kept: linears that read the same input and are not quantised (routers). Their columns are scaled by s too.
    experts: each expert of the layer's mixture has linears with these roles and receives its own tokens.
    """

    key: str
    roles: tuple[str, ...]
    absorber: str | None
    kept: tuple[str, ...] = ()
    experts: bool = False


def mixture(config: ModelConfig, layer: int) -> MoeConfig | None:
    """Return a layer's mixture of experts, or None if its MLP is dense."""
    return config.moe if config.moe is not None and config.moe.layers[layer] else None


def sites(config: ModelConfig, layer: int) -> tuple[Site, ...]:
    """Return the sites of a layer in the order of the forward pass."""
    spec, moe = config.spec, mixture(config, layer)
    first = ("gate", "up") if spec.gated else ("up",)
    # act(gate) · up is linear in up, and ReLU(x / s) = ReLU(x) / s. After GELU no weight can absorb 1/s.
    scalable = spec.gated or config.act == "relu"
    o, down = Site("o_in", ("o",), "v"), Site("down_in", ("down",), "up" if scalable else None)
    before = {role: role if role in spec.norms else None for role in ("pre_attn", "pre_mlp")}
    if spec.parallel and before["pre_mlp"] is None:
        return Site("block_in", ("q", "k", "v", *first), before["pre_attn"]), o, down
    attn_in = Site("attn_in", ("q", "k", "v"), before["pre_attn"])
    if (
        moe is not None
    ):  # all experts and routers read one norm, so they share s; down and up belong to one expert
        mlp_in = Site("mlp_in", first, before["pre_mlp"], routers(moe), experts=True)
        return attn_in, o, mlp_in, replace(down, experts=True)
    return attn_in, o, Site("mlp_in", first, before["pre_mlp"]), down


def routers(moe: MoeConfig) -> tuple[str, ...]:
    return ("router", "shared_router") if moe.shared_expert_intermediate_size else ("router",)


def experts(config: ModelConfig, layer: int) -> range:
    """Return the indices of a layer's experts, the shared expert last. Empty if the MLP is dense."""
    moe = mixture(config, layer)
    return range(0 if moe is None else moe.num_experts + bool(moe.shared_expert_intermediate_size))


def shared(site: Site, config: ModelConfig) -> Index | None:
    """Return the index of the scale of each input channel if channels must share scales, else None.

    Under grouped-query attention channel (h, d) of o's input is a mean over positions of channel (h // n_rep,
    d) of v, so the query heads of one key/value head share their scales.
    """
    n_rep = config.num_attention_heads // config.num_key_value_heads
    if site.absorber != "v" or n_rep == 1:
        return None
    d = config.head_dim
    channels = np.arange(config.num_attention_heads * d)
    at: Index = channels // (n_rep * d) * d + channels % d
    return at


@dataclass(frozen=True)
class Module:
    """A tensor of the checkpoint (a role, "qkv") and the linears that it contains, stacked by rows."""

    role: str
    parts: tuple[str, ...]
    by_head: bool = False  # rows are ordered by head: each kv head's queries, its key, its value

    def stored_order(self, config: ModelConfig) -> Index | slice:
        """Return the index of each stored row among the parts' rows."""
        return np.argsort(heads_to_blocks(config)) if self.by_head else slice(None)


def modules(config: ModelConfig, layer: int, expert: int | None = None) -> tuple[Module, ...]:
    """Return the stored matrices of a layer without its experts, or of one expert."""
    spec, moe = config.spec, mixture(config, layer)
    if expert is not None:
        return tuple(Module(role, (role,)) for role in ("gate", "up", "down"))
    single = [Module("o", ("o",))]
    if spec.qkv:
        single.append(Module("qkv", ("q", "k", "v"), spec.qkv == "heads"))
    else:
        single += [Module(role, (role,)) for role in "qkv"]
    if moe is not None:
        return (*single, *(Module(role, (role,)) for role in routers(moe)))
    if spec.gated and spec.fused_gate_up:
        single.append(Module("gate_up", ("gate", "up")))
    else:
        single += [Module(role, (role,)) for role in (("gate", "up") if spec.gated else ("up",))]
    return (*single, Module("down", ("down",)))


def module_name(config: ModelConfig, layer: int, role: str, expert: int | None = None) -> str:
    """Return a module's name in the checkpoint."""
    moe = mixture(config, layer)
    if expert is None:
        return config.spec.name(role, layer)
    if moe is not None and expert == moe.num_experts:
        return config.spec.name(f"shared_{role}", layer)
    return config.spec.expert(role, layer, expert)


@dataclass
class LayerWeights:
    """The weights of one decoder layer without its experts, of one expert, or of sampled rows of the head.

    All are float32 and changed in place by folding. linears: part (q, k, v, o, gate, up, down, routers, head)
    -> (N, K). biases: part -> (N,). vectors: full tensor name -> values as stored. Implements Source for the
    graph's Loader.
    """

    config: ModelConfig
    layer: int
    linears: dict[str, F32]
    biases: dict[str, F32]
    vectors: dict[str, F32]
    expert: int | None = None

    @classmethod
    def read(cls, config: ModelConfig, layer: int, source: Source, expert: int | None = None) -> LayerWeights:
        """Read a layer, or one of its experts, from a source of dense weights."""
        made, sizes = cls(config, layer, {}, {}, {}, expert), shapes(config, layer, expert)
        for module in made.modules():
            n, k = sum(sizes[part][0] for part in module.parts), sizes[module.parts[0]][1]
            weight = source.weight(made.name(module), (n, k))
            rows = np.empty((n, k), np.float32)
            rows[module.stored_order(config)] = weight.to_float32()
            bias = None
            if weight.bias is not None:
                bias = np.empty(n, np.float32)
                bias[module.stored_order(config)] = weight.bias
            at = 0
            for part in module.parts:
                own = slice(at, at := at + sizes[part][0])
                made.linears[part] = rows[own]
                if bias is not None:
                    made.biases[part] = bias[own]
        norms = (*config.spec.norms, *(("q_norm", "k_norm") if config.spec.qk_norm else ()))
        for role in norms if expert is None else ():
            for end in ("weight", "bias"):
                name = f"{config.spec.name(role, layer)}.{end}"
                if end == "weight" or source.has(name):
                    made.vectors[name] = np.array(source.vector(name), np.float32)
        return made

    def copy(self) -> LayerWeights:
        """Return a copy whose arrays can be replaced without changing this layer."""
        return replace(self, linears=dict(self.linears), biases=dict(self.biases), vectors=dict(self.vectors))

    def modules(self) -> tuple[Module, ...]:
        return modules(self.config, self.layer, self.expert)

    def name(self, module: Module) -> str:
        return module_name(self.config, self.layer, module.role, self.expert)

    def has(self, name: str) -> bool:
        return name in self.vectors

    def vector(self, name: str) -> F32:
        return self.vectors[name]

    def weight(self, module: str, shape: tuple[int, int] | None = None) -> Weight:
        found = self.module(module)
        rows = np.concatenate([self.linears[part] for part in found.parts])[found.stored_order(self.config)]
        return Dense(module, rows, self.bias(found))

    def module(self, name: str) -> Module:
        return next(m for m in self.modules() if self.name(m) == name)

    def bias(self, module: Module) -> F32 | None:
        """Return a module's bias in the checkpoint's row order."""
        parts = [self.biases[part] for part in module.parts if part in self.biases]
        return np.concatenate(parts)[module.stored_order(self.config)] if parts else None

    def stacked(self, site: Site) -> F32:
        """Return the linears of a site stacked by rows (sum of N, K). A single linear is not copied."""
        first = self.linears[site.roles[0]]
        return first if len(site.roles) == 1 else np.concatenate([self.linears[role] for role in site.roles])

    def unstack_codes(self, site: Site, codes: Quantized) -> Iterator[tuple[str, Quantized]]:
        """Yield (role, codes) from the codes of stacked linears."""
        at = 0
        for role in site.roles:
            rows = slice(at, at := at + len(self.linears[role]))
            parts = codes.q[rows], codes.scales[rows], codes.zeros[rows]
            yield role, Quantized(*parts, codes.w_bit, codes.group_size)


def shapes(config: ModelConfig, layer: int, expert: int | None = None) -> dict[str, tuple[int, int]]:
    """Return (N, K) by role for the linears of a layer without its experts, or of one expert."""
    c, moe = config, mixture(config, layer)
    q, kv, hidden = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size
    table = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    inner = c.intermediate_size
    if moe is not None:
        if expert is None:
            sizes = {"router": moe.num_experts, "shared_router": 1}
            return table | {role: (sizes[role], hidden) for role in routers(moe)}
        is_shared = expert == moe.num_experts
        table, inner = {}, moe.shared_expert_intermediate_size if is_shared else moe.moe_intermediate_size
    table |= {"gate": (inner, hidden)} if c.spec.gated else {}
    return table | {"up": (inner, hidden), "down": (hidden, inner)}


def layer_shapes(config: ModelConfig, layer: int) -> list[dict[str, tuple[int, int]]]:
    """Return `shapes` of a layer and of each of its experts."""
    return [shapes(config, layer), *(shapes(config, layer, e) for e in experts(config, layer))]


def fold(weights: LayerWeights, site: Site, s: F32, at: Index | None) -> F32:
    """Multiply the columns of a site's linears by s and divide the absorber by s.

    The layer's output is unchanged.

    s: one scale per channel, or one per index of `at` (see `shared`). A norm is rounded to the float16 values
    that will be stored, and s is adjusted to match. Returns the scale of every input channel.
    """
    assert site.absorber is not None
    if site.absorber in (*weights.config.spec.norms, "final_norm"):
        s = _fold_norm(weights, site.absorber, s)
    else:
        weights.linears[site.absorber] = weights.linears[site.absorber] / s[:, None]
        if site.absorber in weights.biases:
            weights.biases[site.absorber] = weights.biases[site.absorber] / s
    per_channel = s if at is None else s[at]
    for role in (*site.roles, *site.kept):
        if role in weights.linears:  # experts are not loaded here; each is multiplied when it is processed
            weights.linears[role] = weights.linears[role] * per_channel
    return per_channel


def _fold_norm(weights: LayerWeights, role: str, s: F32) -> F32:
    spec = weights.config.spec
    name = spec.name(role, None if role == "final_norm" else weights.layer)
    offset = np.float32(spec.norm_offset)
    old = weights.vectors[f"{name}.weight"]
    new = ((old + offset) / s - offset).astype(np.float16).astype(np.float32)
    exact = np.divide(old + offset, new + offset, out=np.ones_like(s), where=(new + offset) != 0)
    usable = (exact > 0) & np.isfinite(exact)  # a channel that the norm zeroes keeps its scale
    s = np.where(usable, exact, np.float32(1))
    weights.vectors[f"{name}.weight"] = np.where(usable, new, old)
    if f"{name}.bias" in weights.vectors:
        weights.vectors[f"{name}.bias"] = weights.vectors[f"{name}.bias"] / s
    return s
